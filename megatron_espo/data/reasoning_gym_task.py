"""reasoning-gym tasks: creation with readable errors, and generation in a process of its own.

A few generators (``word_ladder``, ``ransom_note``, ...) iterate over sets of strings, so that the same seed gives other
questions in another process. Rows are therefore generated in a child process with ``PYTHONHASHSEED=0``: a resumed run and
every rank see the same rows.
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
    """reasoning-gym's dataset ``task`` with ``task_args``; ``composite`` takes its ``datasets`` as a list of mappings.

    Raises:
        InputError: unknown task or argument (with the nearest known names), or values that the task refuses.
    """
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise InputError(f"data.prompts: unknown reasoning-gym task {task!r}{_nearest(task, DATASETS)}")
    known = [field.name for field in dataclasses.fields(DATASETS[task][1])]
    for name in task_args:
        if name not in known:
            raise InputError(
                f"data.task_args.{name}: not an argument of reasoning_gym:{task}{_nearest(name, known)};"
                f" it takes {', '.join(known)}"
            )
    try:
        if task == "composite":
            task_args = task_args | {"datasets": [DatasetSpec(**spec) for spec in task_args.get("datasets", [])]}
        return reasoning_gym.create_dataset(task, **task_args)
    except Exception as error:  # tasks validate with assert, ValueError and TypeError alike
        raise InputError(f"data.task_args: reasoning_gym:{task} refused {task_args}: {error}") from error


def generate_entries(task: str, task_args: dict[str, Any]) -> list[dict[str, Any]]:
    """All entries ``{question, answer, metadata}`` of the task, the same in every process for the same arguments.

    Raises:
        InputError: as :func:`create_task`, or the generator itself failed.
    """
    call = (
        "import pickle, sys; path, task, task_args = pickle.load(sys.stdin.buffer); sys.path[:] = path;"
        " from megatron_espo.data.reasoning_gym_task import _write_entries; _write_entries(task, task_args)"
    )
    process = subprocess.run(
        [sys.executable, "-P", "-c", call],
        input=pickle.dumps((sys.path, task, task_args)),
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
    )
    if process.returncode != 0:
        raise InputError(f"data.prompts: generating reasoning_gym:{task} failed (exit status {process.returncode})")
    entries, message = pickle.loads(process.stdout)
    if message is not None:
        raise InputError(message)
    return entries


def _write_entries(task: str, task_args: dict[str, Any]) -> None:
    """The child's side of :func:`generate_entries`: pickles ``(entries, error message)`` to standard output."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a generator that prints must not corrupt the answer
    try:
        dataset = create_task(task, task_args)
        answer = ([dataset[index] for index in range(len(dataset))], None)
    except InputError as error:
        answer = (None, str(error))
    except Exception as error:
        answer = (None, f"data.task_args: reasoning_gym:{task} failed to generate with {task_args}: {error!r}")
    pickle.dump(answer, output)
    output.close()


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
