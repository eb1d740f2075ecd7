"""Finished rollouts on disk, step by step: nothing sampled is lost, and a run can be trained again from them."""

import gzip
import json
import os
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_espo.batch import ScoredGroups
from megatron_espo.errors import InputError
from megatron_espo.types import Prompt, Rollout


class RolloutLog:
    """The folder ``rollouts``: ``step_000007.json.gz``, one for each step's batch.

    Args:
        folder: where they are.
        fingerprint: the run's; rollouts of a run with another one are not taken.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder, self._fingerprint = folder, fingerprint

    def write(self, step: int, groups: ScoredGroups, *, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Make a step's scored rollouts durable, with the prompt stream's state before and after them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "fingerprint": self._fingerprint,
            "before": before,
            "after": after,
            "dispatched": groups.dispatched,
            "rewards": [[None if r != r else r for r in row] for row in groups.rewards.tolist()],
            "prompts": [asdict(group[0].prompt) for group in groups.rollouts],
            "rollouts": [[_sample(rollout) for rollout in group] for group in groups.rollouts],
        }
        path = self._path(step)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as stream:
            stream.write(gzip.compress(json.dumps(content).encode(), compresslevel=1, mtime=0))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)

    def read(self, step: int, before: dict[str, Any] | None) -> tuple[ScoredGroups, dict[str, Any]] | None:
        """A step's rollouts and the stream's state after them; ``None`` if there are none of this run at this place.

        Args:
            before: the prompt stream's state now; ``None`` takes the file whatever it says.

        Raises:
            InputError: a damaged file.
        """
        path = self._path(step)
        if not path.is_file():
            return None
        try:
            content = json.loads(gzip.decompress(path.read_bytes()))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InputError(f"{path}: expected recorded rollouts, found damage ({error}); remove the file to sample the step anew") from None
        if before is not None and (content["before"] != before or content["fingerprint"] != self._fingerprint):
            return None
        prompts = [Prompt(**entry | {"token_ids": tuple(entry["token_ids"])}) for entry in content["prompts"]]
        rollouts = [
            [Rollout(prompt, tuple(ids), tuple(logprobs), *rest) for ids, logprobs, *rest in samples]
            for prompt, samples in zip(prompts, content["rollouts"], strict=True)
        ]
        rewards = torch.tensor([[float("nan") if r is None else r for r in row] for row in content["rewards"]])
        return ScoredGroups(rollouts, rewards, content["dispatched"]), content["after"]

    def forget(self, up_to_step: int) -> None:
        """Remove what a checkpoint has made unnecessary."""
        for path in self.folder.glob("step_*.json.gz"):
            if int(path.name[5:-8]) <= up_to_step:
                path.unlink()

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.json.gz"


def _sample(rollout: Rollout) -> list[Any]:
    return [rollout.response_ids, rollout.logprobs, rollout.finish_reason, rollout.policy_version, rollout.text]
