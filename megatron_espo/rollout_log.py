"""Recorded rollouts on disk, one file a step. A run continues from them, or trains from them again (``run.replay``)."""

import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike

from megatron_espo.batch import ScoredGroups
from megatron_espo.errors import InputError
from megatron_espo.run_files import make_durable
from megatron_espo.types import Prompt, Trajectory

_JSON = "step.json"
# Per-token fields of a trajectory, stored one part after the other.
_RESPONSE_FIELDS = ("response_ids", "loss_mask", "logprobs", "versions")
# What zipfile, numpy and json raise for a damaged file.
_DAMAGE = (OSError, EOFError, ValueError, LookupError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)


class Recorded(NamedTuple):
    """A step's rollouts, and the state of the prompt stream after they were sampled."""

    groups: ScoredGroups
    after: dict[str, Any]


class RolloutLog:
    """The folder ``rollouts`` with one ``step_000007.npz`` for each step.

    The file is an uncompressed zip archive. Its ``.npy`` members hold the numbers of all trajectories, one after the other, with
    the lengths beside them; ``step.json`` holds the rest. The zip format's CRC finds damage.

    Args:
        folder: where the files are.
        fingerprint: the run's. ``read`` does not return rollouts of a run with another fingerprint.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder, self._fingerprint = folder, fingerprint

    def write(self, step: int, groups: ScoredGroups, *, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Make a step's scored rollouts durable. The file appears whole or not at all.

        Args:
            step: counted from 1.
            groups: the rollouts.
            before, after: JSON values, the state of the prompt stream before and after them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        samples = [sample for group in groups.rollouts for sample in group]
        parts = [part for sample in samples for part in sample.parts]
        content = {
            "fingerprint": self._fingerprint,
            "before": before,
            "after": after,
            "dispatched": groups.dispatched,
            "in_flight": groups.in_flight,
            "prompts": [_without_ids(group[0].prompt) for group in groups.rollouts],
            "group_sizes": [len(group) for group in groups.rollouts],
            "num_parts": [len(sample.parts) for sample in samples],
            "parts": [[part.finish_reason, part.text, part.reward, part.rewards] for part in parts],
        }
        path = self._path(step)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as stream:
            with zipfile.ZipFile(stream, "w") as archive:
                archive.writestr(_JSON, json.dumps(content))
                _write_array(archive, "rewards", [groups.rewards.numpy()], np.float32)
                token_ids = [np.array(group[0].prompt.token_ids, np.int32) for group in groups.rollouts]
                _write_vectors(archive, "token_ids", token_ids, np.int32)
                for name, dtype in (("prompt_ids", np.int32), ("turns", np.int32)):
                    _write_vectors(archive, name, [getattr(part, name) for part in parts], dtype)
                _write_array(archive, "response_lengths", [np.array([len(part.response_ids) for part in parts])], np.int64)
                for name, dtype in zip(_RESPONSE_FIELDS, (np.int32, np.bool_, np.float32, np.int32), strict=True):
                    _write_array(archive, name, [getattr(part, name) for part in parts], dtype)
                experts = [part.routed_experts for part in parts]
                known = [rows for rows in experts if rows is not None]
                if known:
                    rows = [0 if rows is None else len(rows) for rows in experts]
                    _write_array(archive, "routed_experts_lengths", [np.array(rows)], np.int64)
                    _write_array(archive, "routed_experts", known, known[0].dtype)
        make_durable(partial)
        partial.replace(path)

    def read(self, step: int, before: dict[str, Any] | None) -> Recorded | None:
        """A step's rollouts and the state after them; ``None`` if there are none of this run at this place.

        Args:
            step: counted from 1.
            before: the prompt stream's state now; ``None`` accepts any.

        Raises:
            InputError: a damaged file.
        """
        path = self._path(step)
        if not path.is_file():
            return None
        try:
            with np.load(path) as file:
                content = json.loads(file[_JSON])
                state = (content["before"], content["fingerprint"])
                if before is not None and state != (before, self._fingerprint):
                    return None
                arrays = {name: file[name] for name in file.files if name != _JSON}
            groups = ScoredGroups(
                _trajectories(content, arrays),
                torch.from_numpy(arrays["rewards"]),
                content["dispatched"],
                content["in_flight"],
            )
            return Recorded(groups, content["after"])
        except _DAMAGE as error:
            raise InputError(
                f"{path}: expected recorded rollouts, found damage ({error}); remove the file to sample the step again"
            ) from None

    def forget(self, up_to_step: int) -> None:
        """Remove the files up to a step, because a checkpoint makes them unnecessary."""
        for path in self.folder.glob("step_*.npz"):
            if int(path.stem[5:]) <= up_to_step:
                path.unlink()

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.npz"


def _without_ids(prompt: Prompt) -> dict[str, Any]:
    return {name: value for name, value in vars(prompt).items() if name != "token_ids"}


def _write_array(archive: zipfile.ZipFile, name: str, parts: list[np.ndarray], dtype: DTypeLike) -> None:
    """Write the concatenation of ``parts`` as a ``.npy`` member. Does not build it in memory: experts may take gigabytes."""
    shape = (sum(map(len, parts)), *(parts[0].shape[1:] if parts else ()))
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for part in parts:
            member.write(np.ascontiguousarray(part, dtype).reshape(-1).view(np.uint8))


def _write_vectors(archive: zipfile.ZipFile, name: str, vectors: list[np.ndarray], dtype: DTypeLike) -> None:
    """Vectors one after the other, and their lengths."""
    _write_array(archive, f"{name}_lengths", [np.array([len(vector) for vector in vectors])], np.int64)
    _write_array(archive, name, vectors, dtype)


def _trajectories(content: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[list[Trajectory]]:
    token_ids = _cut(arrays["token_ids"], arrays["token_ids_lengths"])
    prompts = [
        Prompt(**entry, token_ids=tuple(ids.tolist()))
        for entry, ids in zip(content["prompts"], token_ids, strict=True)
    ]
    names = ("prompt_ids", "turns", *_RESPONSE_FIELDS)
    per_part = [_cut(arrays[name], arrays.get(f"{name}_lengths", arrays["response_lengths"])) for name in names]
    fields = (dict(zip(names, values, strict=True)) for values in zip(*per_part, strict=True))
    experts: Iterable[np.ndarray | None] = [None] * len(content["parts"])
    if "routed_experts" in arrays:
        rows = _cut(arrays["routed_experts"], arrays["routed_experts_lengths"])
        experts = (part if len(part) else None for part in rows)
    rest = zip(content["parts"], fields, experts, strict=True)
    num_parts = iter(content["num_parts"])
    return [
        [_next_trajectory(prompt, next(num_parts), rest) for _ in range(size)]
        for prompt, size in zip(prompts, content["group_sizes"], strict=True)
    ]


def _next_trajectory(prompt: Prompt, num_parts: int, rest: Iterator[tuple]) -> Trajectory:
    """The trajectory whose parts come next."""
    parts = []
    for _ in range(num_parts):
        (finish_reason, text, reward, rewards), arrays, experts = next(rest)
        parts.append(
            Trajectory(
                prompt,
                **arrays,
                finish_reason=finish_reason,
                text=text,
                reward=reward,
                rewards=rewards,
                routed_experts=experts,
            )
        )
    return replace(parts[-1], earlier=tuple(parts[:-1])) if parts[:-1] else parts[-1]


def _cut(values: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Views of ``values``, one after the other."""
    if lengths.sum() != len(values):
        raise ValueError(f"expected {lengths.sum()} values, got {len(values)}")
    ends = lengths.cumsum().tolist()
    return (values[start:end] for start, end in zip(chain([0], ends), ends, strict=False))
