"""Runs the `gpu` tests of the numerics and their benchmark on one GPU.

    python tools/gpu_check.py [--tokens 8192] [--vocab 152064]

Needs torch with CUDA, Triton and pytest, but neither vLLM nor Transformer Engine. The benchmark
compares with Megatron-Core: where it is not installed, unpack its wheel and name the folder with
--megatron.
Exits with 1 if a test fails, with 2 if the machine lacks something.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def missing() -> str | None:
    """What this machine lacks, or None."""
    for name in ("torch", "triton", "pytest"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed in {sys.executable}"
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


def main() -> int:
    """Run the tests, then the benchmark."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    sizes = {"tokens": 8192, "vocab": 152064, "hidden": 4096}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--megatron", type=Path, help="folder with an unpacked megatron_core wheel")
    args = parser.parse_args()
    problem, folder = missing(), args.megatron
    if not problem and folder and not (folder / "megatron" / "core").is_dir():
        problem = f"no megatron/core in {folder}"
    if problem:
        print(f"gpu_check: {problem}", file=sys.stderr)
        return 2
    path = (str(ROOT), str(folder or ""), os.environ.get("PYTHONPATH", ""))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    tests = "-m pytest -q -m gpu tests/test_numerics.py tests/test_numerics_head.py"
    benchmark = "benchmarks/logprob_entropy.py --device cuda --tp 1 --dtype bfloat16"
    options = [f"--{name}={getattr(args, name)}" for name in sizes]
    for words in (tests.split(), [*benchmark.split(), *options]):
        if subprocess.run([sys.executable, *words], cwd=ROOT, env=env).returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
