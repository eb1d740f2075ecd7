"""Run the `gpu` tests of the numerics and their benchmark on one GPU.

    python tools/gpu_check.py [--tokens 8192] [--vocab 152064]

Needs torch with CUDA, Triton and pytest; neither vLLM nor Transformer Engine. Megatron-Core is only compared against:
without an installed one, unpack its wheel beside this checkout and name the folder with --megatron. Exits with 1 if a
test fails, with 2 if the machine lacks something.
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
    """Tests first: times of wrong numbers are of no use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--megatron", type=Path, help="folder with an unpacked megatron_core wheel")
    args = parser.parse_args()
    lack = missing()
    if lack:
        print(f"gpu_check: {lack}", file=sys.stderr)
        return 2
    if args.megatron is not None and not (args.megatron / "megatron" / "core").is_dir():
        print(f"gpu_check: no megatron/core in {args.megatron}", file=sys.stderr)
        return 2
    path = [str(ROOT), *([str(args.megatron)] if args.megatron else []), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    tests = [str(ROOT / "tests" / name) for name in ("test_numerics.py", "test_numerics_head.py")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", *tests], cwd=ROOT, env=env)
    if done.returncode != 0:
        return 1
    benchmark = [sys.executable, str(ROOT / "benchmarks" / "logprob_entropy.py"), "--device", "cuda", "--tp", "1"]
    sizes = ["--tokens", str(args.tokens), "--vocab", str(args.vocab), "--hidden", str(args.hidden)]
    return 1 if subprocess.run([*benchmark, *sizes, "--dtype", "bfloat16"], cwd=ROOT, env=env).returncode else 0


if __name__ == "__main__":
    sys.exit(main())
