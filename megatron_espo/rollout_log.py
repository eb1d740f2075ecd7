"""Finished rollouts on disk, step by step: nothing sampled is lost, and a run can be trained again from them."""

import gzip
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

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
    """The folder ``rollouts``: ``step_000007.json.gz``, one for each step's batch.

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
        content = {
            "fingerprint": self._fingerprint,
            "before": before,
            "after": after,
            "dispatched": groups.dispatched,
            "rewards": [[None if r != r else r for r in row] for row in groups.rewards.tolist()],
            **_as_json(groups.rollouts),
            "in_flight": {"since": [entry.since for entry in in_flight], **_as_json([entry.rollouts for entry in in_flight])},
        }
        path = self._path(step)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as stream:
            stream.write(gzip.compress(json.dumps(content).encode(), compresslevel=1, mtime=0))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)

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
        in_flight = _in_flight(content)
        return Recorded(ScoredGroups(_from_json(content), rewards, content["dispatched"], len(in_flight)), content["after"], in_flight)

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
        return _in_flight(_load(path))

    def forget(self, up_to_step: int) -> None:
        """Remove what a checkpoint has made unnecessary."""
        for path in self.folder.glob("step_*.json.gz"):
            if int(path.name[5:-8]) <= up_to_step:
                path.unlink()

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.json.gz"


def _load(path: Path) -> dict[str, Any]:
    try:
        return json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: expected recorded rollouts, found damage ({error}); remove the file to sample the step anew") from None


def _in_flight(content: dict[str, Any]) -> list[InFlight]:
    entry = content.get("in_flight", {"since": [], "prompts": [], "rollouts": []})
    return [InFlight(*pair) for pair in zip(entry["since"], _from_json(entry), strict=True)]


def _as_json(groups: Sequence[Sequence[Rollout]]) -> dict[str, Any]:
    return {"prompts": [asdict(group[0].prompt) for group in groups], "rollouts": [[_sample(rollout) for rollout in group] for group in groups]}


def _from_json(content: dict[str, Any]) -> list[list[Rollout]]:
    prompts = [Prompt(**entry | {"token_ids": tuple(entry["token_ids"])}) for entry in content["prompts"]]
    return [
        [Rollout(prompt, tuple(ids), tuple(logprobs), *rest) for ids, logprobs, *rest in samples]
        for prompt, samples in zip(prompts, content["rollouts"], strict=True)
    ]


def _sample(rollout: Rollout) -> list[Any]:
    return [rollout.response_ids, rollout.logprobs, rollout.finish_reason, rollout.policy_version, rollout.text]
