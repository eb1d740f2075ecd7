"""Finished rollouts on disk, step by step: nothing sampled is lost, and a run can be trained again from them."""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from megatron_espo.batch import InFlight, ScoredGroups
from megatron_espo.errors import InputError
from megatron_espo.types import Prompt, Rollout


class Recorded(NamedTuple):
    """A step's rollouts, and how the prompt stream and the prompts in flight stood after they were sampled."""

    groups: ScoredGroups
    after: dict[str, Any]
    in_flight: list[InFlight]


class RolloutLog:
    """The folder ``rollouts``: ``step_000007.json.gz``, one for each step's batch, and ``step_000007.npy`` with its routed experts, if it has any.

    Args:
        folder: where they are.
        fingerprint: the run's; rollouts of a run with another one are not taken.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder, self._fingerprint = folder, fingerprint

    def write(
        self, step: int, groups: ScoredGroups, *, before: dict[str, Any], after: dict[str, Any], in_flight: Sequence[InFlight] = ()
    ) -> None:
        """Make a step's scored rollouts durable, with the prompt stream's state before and after them and what was left in flight."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path(step).unlink(missing_ok=True)  # of another attempt at this step, whose experts are about to be replaced
        experts: list[np.ndarray] = []
        content = {
            "fingerprint": self._fingerprint,
            "before": before,
            "after": after,
            "dispatched": groups.dispatched,
            "rewards": [[None if r != r else r for r in row] for row in groups.rewards.tolist()],
            **_as_json(groups.rollouts, experts),
            "in_flight": {"since": [entry.since for entry in in_flight], **_as_json([entry.rollouts for entry in in_flight], experts)},
        }
        # First the experts: where the other file is, theirs is there too.
        content["routed_experts"] = _write(self._path(step, ".npy"), lambda file: _save_arrays(file, experts)) if experts else None
        text = json.dumps(content).encode()
        _write(self._path(step), lambda file: file.write(gzip.compress(text, compresslevel=1, mtime=0)))

    def read(self, step: int, before: dict[str, Any] | None) -> Recorded | None:
        """A step's rollouts and what was after them; ``None`` if there are none of this run at this place.

        Args:
            before: the prompt stream's state now; ``None`` takes the file whatever it says.

        Raises:
            InputError: a damaged file.
        """
        path = self._path(step)
        if not path.is_file():
            return None
        content = _load(path)
        if before is not None and (content["before"] != before or content["fingerprint"] != self._fingerprint):
            return None
        rewards = torch.tensor([[float("nan") if r is None else r for r in row] for row in content["rewards"]])
        experts = _load_experts(path, content)
        groups, in_flight = _from_json(content, experts), _in_flight(content, experts)
        return Recorded(ScoredGroups(groups, rewards, content["dispatched"], len(in_flight)), content["after"], in_flight)

    def in_flight_after(self, step: int) -> list[InFlight]:
        """What a step left in flight.

        Raises:
            InputError: the step's file is missing or damaged.
        """
        path = self._path(step)
        if not path.is_file():
            raise InputError(
                f"{path}: expected the responses that were in flight after step {step}, found no file; set run.resume to a checkpoint whose step has one"
            )
        content = _load(path)
        return _in_flight(content, _load_experts(path, content))

    def forget(self, up_to_step: int) -> None:
        """Remove what a checkpoint has made unnecessary."""
        for path in self.folder.glob("step_*.json.gz"):
            step = int(path.name[5:-8])
            if step <= up_to_step:
                path.unlink()
                self._path(step, ".npy").unlink(missing_ok=True)

    def _path(self, step: int, ending: str = ".json.gz") -> Path:
        return self.folder / f"step_{step:06d}{ending}"


def _load(path: Path) -> dict[str, Any]:
    try:
        return json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _damage(path, error) from None


def _damage(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: expected recorded rollouts, found damage ({error}); remove the file to sample the step anew")


def _load_experts(path: Path, content: dict[str, Any]) -> np.ndarray | None:
    """All experts of a step, in memory as far as they are used; ``None``: it has none."""
    if content.get("routed_experts") is None:
        return None
    file = path.with_name(path.name.removesuffix(".json.gz") + ".npy")
    try:
        experts = np.load(file, mmap_mode="r")
        if zlib.crc32(experts.data.cast("B")) != content["routed_experts"]:
            raise ValueError(f"{file.name}: another checksum than when it was written")
    except (OSError, ValueError) as error:
        raise _damage(path, error) from None
    return experts


def _in_flight(content: dict[str, Any], experts: np.ndarray | None) -> list[InFlight]:
    entry = content.get("in_flight", {"since": [], "prompts": [], "rollouts": []})
    return [InFlight(*pair) for pair in zip(entry["since"], _from_json(entry, experts), strict=True)]


def _as_json(groups: Sequence[Sequence[Rollout]], experts: list[np.ndarray]) -> dict[str, Any]:
    """Adds the groups' experts to ``experts``."""
    rollouts = [[_sample(rollout, experts) for rollout in group] for group in groups]
    return {"prompts": [asdict(group[0].prompt) for group in groups], "rollouts": rollouts}


def _from_json(content: dict[str, Any], experts: np.ndarray | None) -> list[list[Rollout]]:
    prompts = [Prompt(**entry | {"token_ids": tuple(entry["token_ids"])}) for entry in content["prompts"]]
    return [
        [_rollout(prompt, *sample, experts=experts) for sample in samples] for prompt, samples in zip(prompts, content["rollouts"], strict=True)
    ]


def _sample(rollout: Rollout, experts: list[np.ndarray]) -> list[Any]:
    sample = [rollout.response_ids, rollout.logprobs, rollout.finish_reason, rollout.policy_version, rollout.text]
    if rollout.routed_experts is not None:
        start = sum(map(len, experts))
        experts.append(rollout.routed_experts)
        sample.append([start, start + len(rollout.routed_experts)])
    return sample


def _rollout(prompt: Prompt, ids: list[int], logprobs: list[float], *rest: Any, experts: np.ndarray | None) -> Rollout:
    """What :func:`_sample` was made of; the last of ``rest`` may be the place of its experts."""
    reason, version, text, *place = rest
    chosen = experts[slice(*place[0])] if place else None
    return Rollout(prompt, tuple(ids), tuple(logprobs), reason, version, text, chosen)


def _write(path: Path, fill: Callable[[IO[bytes]], int]) -> int:
    """Make a file that is there whole or not at all; returns what ``fill`` does."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        answer = fill(stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    return answer


def _save_arrays(file: IO[bytes], arrays: list[np.ndarray]) -> int:
    """``np.save`` of their concatenation, without making it; returns a checksum of the numbers."""
    shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
    np.lib.format.write_array_header_1_0(file, {"descr": arrays[0].dtype.str, "fortran_order": False, "shape": shape})
    checksum = 0
    for array in arrays:
        content = np.ascontiguousarray(array).data.cast("B")
        file.write(content)
        checksum = zlib.crc32(content, checksum)
    return checksum
