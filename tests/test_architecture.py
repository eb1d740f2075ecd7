"""Import contracts (``[tool.importlinter]`` in pyproject.toml) and what an import costs."""

import subprocess
import sys
from pathlib import Path

import megatron_espo

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=360)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_contracts():
    run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")


def test_algo_imports_no_other_part_and_no_heavy_package():
    code = """
import sys, megatron_espo.algo
found = {name.split(".")[0] for name in sys.modules}
heavy = {"megatron", "vllm", "transformers", "pydantic"} & found
ours = {n for n in sys.modules if n.startswith("megatron_espo.")}
allowed = ("megatron_espo.algo", "megatron_espo.errors", "megatron_espo.plugins")
print(sorted(heavy | {n for n in ours if not n.startswith(allowed)}))
"""
    assert run(sys.executable, "-c", code).strip() == "[]"


def test_importing_the_package_does_not_import_torch():
    code = "import sys, megatron_espo; print('torch' in sys.modules)"
    assert run(sys.executable, "-c", code).strip() == "False"


def test_every_public_name_exists():
    assert all(getattr(megatron_espo, name) for name in megatron_espo.__all__)
