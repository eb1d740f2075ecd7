"""Run one plain function on several gloo ranks under ``torchrun``.

    run_ranks(2, "tests.ranks.numerics:check_gradient", temperature=0.7)

The function is called on every rank with the keyword arguments (sent as JSON). What rank 0 returns comes back (as JSON). Any
rank's exception fails the caller with the ranks' output.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(nproc: int, target: str, timeout: float = 240, **kwargs: Any) -> Any:
    """Call ``target`` (``module:function``) on ``nproc`` ranks; return rank 0's answer."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
        command += ["-m", "tests.distributed", target, json.dumps(kwargs), str(answer)]
        # Behind it what the caller has, such as another Megatron-Core (tools/test_compat.sh).
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"{target} on {nproc} ranks: no end after {timeout} s\n{output[-6000:]}") from None
        assert process.returncode == 0, f"{target} on {nproc} ranks failed\n{output[-6000:]}"
        return json.loads(answer.read_text())


def main() -> None:
    """Entry of each rank: bring up gloo, call the function, write rank 0's answer."""
    target, kwargs, answer = sys.argv[1:]
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    module, function = target.split(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(kwargs))
    if torch.distributed.get_rank() == 0:
        Path(answer).write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
