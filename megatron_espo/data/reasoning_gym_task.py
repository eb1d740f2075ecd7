"""reasoning-gym tasks: creation with readable errors, and generation in a child process.

Some generators (``word_ladder``, ``ransom_note``, ...) iterate over sets of strings, so their rows
depend on the hash seed of the process. A child process with ``PYTHONHASHSEED=0`` generates the
rows, so that a resumed run and every rank get the same rows.
"""

import dataclasses
import difflib
import os
import pickle
import subprocess
import sys
from typing import Any

from megatron_espo.errors import InputError


def create_task(task: str, task_args: dict[str, Any]) -> Any:
    """Create the reasoning-gym dataset ``task``; ``composite`` takes its ``datasets`` as a list of
    mappings.

    Raises:
        InputError: unknown task or argument (with the nearest known names), or values that the task
            rejects.
    """
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise InputError(
            f"data.prompts: unknown reasoning-gym task {task!r}{_nearest(task, DATASETS)}"
        )
    known = [field.name for field in dataclasses.fields(DATASETS[task][1])]
    for name in task_args:
        if name not in known:
            raise InputError(
                f"data.task_args.{name}: not an argument of reasoning_gym:{task}"
                f"{_nearest(name, known)}; it takes {', '.join(known)}"
            )
    try:
        if task == "composite":
            specs = [DatasetSpec(**spec) for spec in task_args.get("datasets", [])]
            task_args = task_args | {"datasets": specs}
        return reasoning_gym.create_dataset(task, **task_args)
    except Exception as error:  # tasks raise AssertionError, ValueError or TypeError
        raise InputError(
            f"data.task_args: reasoning_gym:{task} refused {task_args}: {error}"
        ) from error


def generate_entries(task: str, task_args: dict[str, Any]) -> list[dict[str, Any]]:
    """Generate all entries ``{question, answer, metadata}`` of the task; the same arguments give
    the same entries in every process.

    Raises:
        InputError: see :func:`create_task`, or the generator failed.
    """
    call = (
        "import pickle, sys; sys.path[:], task, task_args = pickle.load(sys.stdin.buffer); "
        "from megatron_espo.data import reasoning_gym_task as module; "
        "module._write_entries(task, task_args)"
    )
    process = subprocess.run(
        [sys.executable, "-P", "-c", call],
        input=pickle.dumps((sys.path, task, task_args)),
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
    )
    if status := process.returncode:
        raise InputError(f"data.prompts: reasoning_gym:{task} ended with exit status {status}")
    entries = pickle.loads(process.stdout)
    if isinstance(entries, InputError):
        raise entries
    return entries


def _write_entries(task: str, task_args: dict[str, Any]) -> None:
    """In the child process: pickle the entries, or an InputError, to standard output."""
    output, sys.stdout = sys.stdout.buffer, sys.stderr  # for what a generator prints
    try:
        dataset = create_task(task, task_args)
        result: Any = [dataset[index] for index in range(len(dataset))]
    except InputError as error:
        result = error
    except Exception as error:
        failed = f"reasoning_gym:{task} failed to generate with {task_args}: {error!r}"
        result = InputError(f"data.task_args: {failed}")
    pickle.dump(result, output)
    output.flush()


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
