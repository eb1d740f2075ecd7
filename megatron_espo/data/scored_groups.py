"""The rollouts of one step, as arrays for the rollout log, and their outline for all ranks."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_espo.types import Prompt, SamplingMask, Trajectory

# Per-token fields of a trajectory.
_RESPONSE_FIELDS = ("response_ids", "loss_mask", "logprobs", "versions")
Columns = dict[str, list[np.ndarray]]
# By prompt, sample and part what ``from_outline`` makes a trajectory of; and the rest.
Outline = tuple[list[list[list[tuple[Any, ...]]]], "ScoredGroups"]


@dataclass(frozen=True)
class ScoredGroups:
    """A step's rollouts and their rewards.

    Attributes:
        rollouts: ``[prompt][sample]``.
        rewards: ``[prompts, group_size]`` float32, NaN where the verifier failed.
        dispatched: number of new prompts sent to the engine; with dynamic sampling more than
            ``rollouts`` has.
        in_flight: number of prompts whose responses continue in the next step.
        metrics: of scoring, on rank 0 in the step that sampled them.
        skipped: number of prompts that filters skipped since the start of the run.
    """

    rollouts: list[list[Trajectory]]
    rewards: torch.Tensor
    dispatched: int
    in_flight: int = 0
    skipped: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def samples(self) -> list[Trajectory]:
        """All trajectories, prompt after prompt."""
        return [sample for group in self.rollouts for sample in group]

    @property
    def have_routed_experts(self) -> bool:
        """Whether every sequence has the engine's choice of experts."""
        return all(p.routed_experts is not None for s in self.samples for p in s.parts)

    def staleness(self, step: int) -> float:
        """Versions between the weights that ``step`` starts from and the weights that sampled; mean
        over sampled tokens.
        """
        return float(self._ages(step).mean())

    def max_staleness(self, step: int) -> int:
        """The staleness of the oldest sampled token."""
        return int(self._ages(step).max())

    def _ages(self, step: int) -> np.ndarray:
        parts = [part for sample in self.samples if not sample.failed for part in sample.parts]
        versions = [part.versions[part.loss_mask] for part in parts]
        return step - 1 - np.concatenate(versions) if versions else np.zeros(1)

    def lengths(self) -> torch.Tensor:
        """Sampled tokens, ``[prompts, group_size]`` int64."""
        return torch.tensor([[sample.num_trained for sample in group] for group in self.rollouts])


def to_columns(groups: ScoredGroups) -> tuple[dict[str, Any], Columns]:
    """Split ``groups`` into JSON values and arrays; :func:`from_columns` joins them.

    Returns:
        The JSON values, with the texts under ``texts``, and by name the arrays of all trajectories
            in their order, not concatenated. Beside arrays of different lengths are the lengths,
            under ``<name>_lengths``. No array is copied.
    """
    prompts = [group[0].prompt for group in groups.rollouts]
    samples = groups.samples
    parts = [part for sample in samples for part in sample.parts]
    content = {
        "dispatched": groups.dispatched,
        "in_flight": groups.in_flight,
        "skipped": groups.skipped,
        "prompts": [{k: v for k, v in vars(p).items() if k != "token_ids"} for p in prompts],
        "group_sizes": [len(group) for group in groups.rollouts],
        "num_parts": [len(sample.parts) for sample in samples],
        "parts": [[part.finish_reason, part.reward, part.rewards] for part in parts],
        "texts": [part.text for part in parts],
    }
    token_ids = [np.array(prompt.token_ids, np.int32) for prompt in prompts]
    columns = {"rewards": [groups.rewards.numpy()]} | _with_lengths("token_ids", token_ids)
    for name in ("prompt_ids", "turns"):
        columns |= _with_lengths(name, [getattr(part, name) for part in parts])
    columns["response_lengths"] = [np.array([len(part.response_ids) for part in parts])]
    columns |= {name: [getattr(part, name) for part in parts] for name in _RESPONSE_FIELDS}
    experts = [part.routed_experts for part in parts]
    if known := [rows for rows in experts if rows is not None]:
        rows = [0 if rows is None else len(rows) for rows in experts]
        columns |= {"routed_experts_lengths": [np.array(rows)], "routed_experts": known}
    if any(part.sampling_mask is not None for part in parts):
        masks = [part.sampling_mask or SamplingMask.empty(len(part.response_ids)) for part in parts]
        columns["mask_counts"] = [mask.counts for mask in masks]
        columns |= _with_lengths("mask_ids", [mask.ids for mask in masks])
    return content, columns


def from_columns(content: dict[str, Any], arrays: dict[str, np.ndarray]) -> ScoredGroups:
    """The rollouts of which :func:`to_columns` made ``content`` and, concatenated, ``arrays``.

    Raises:
        ValueError, LookupError, TypeError: values are missing or do not match each other.
    """

    def column(name: str, lengths: str = "") -> list[np.ndarray]:
        return split(arrays[name], arrays[f"{lengths or name}_lengths"])

    prompts = [
        Prompt(**entry, token_ids=tuple(ids.tolist()))
        for entry, ids in zip(content["prompts"], column("token_ids"), strict=True)
    ]
    columns: dict[str, Iterable[Any]] = {"text": content["texts"]}
    for i, name in enumerate(("finish_reason", "reward", "rewards")):
        columns[name] = [part[i] for part in content["parts"]]
    columns |= {name: column(name) for name in ("prompt_ids", "turns")}
    columns |= {name: column(name, "response") for name in _RESPONSE_FIELDS}
    if "routed_experts" in arrays:
        experts = column("routed_experts")
        columns["routed_experts"] = (part if len(part) else None for part in experts)
    if "mask_ids" in arrays:
        masks = map(SamplingMask, column("mask_ids"), column("mask_counts", "response"))
        columns["sampling_mask"] = (mask if len(mask.ids) else None for mask in masks)
    values = zip(*columns.values(), strict=True)
    parts = (dict(zip(columns, each, strict=True)) for each in values)
    num_parts = iter(content["num_parts"])

    def next_trajectory(prompt: Prompt) -> Trajectory:
        found = islice(parts, next(num_parts))
        return _join_parts([Trajectory(prompt, **attributes) for attributes in found])

    sizes = zip(prompts, content["group_sizes"], strict=True)
    rollouts = [[next_trajectory(prompt) for _ in range(size)] for prompt, size in sizes]
    rewards = torch.from_numpy(arrays["rewards"])
    counts = (content["dispatched"], content["in_flight"], content.get("skipped", 0))
    return ScoredGroups(rollouts, rewards, *counts)


def to_outline(groups: ScoredGroups) -> Outline:
    """What every rank needs of ``groups``: lengths, loss masks, rewards and counts, without tokens,
    log-probs, versions, texts, prompts, routed experts and sampling masks.
    """
    keys: dict[bytes, int] = {}

    def outline(part: Trajectory) -> tuple[Any, ...]:
        key = keys.setdefault(part.prompt_ids.tobytes(), -1 - len(keys))
        lengths = len(part.prompt_ids), len(part.response_ids)
        return key, *lengths, np.packbits(part.loss_mask), part.finish_reason

    outlines = [
        [[outline(part) for part in sample.parts] for sample in group] for group in groups.rollouts
    ]
    return outlines, replace(groups, rollouts=[], metrics={})


def from_outline(outline: Outline) -> ScoredGroups:
    """Trajectories of the right lengths, loss masks and rewards. Prompts, ids, log-probs and
    versions are placeholders.

    The ids of a prompt are one negative number, equal for equal prompts: prompts can be grouped.
    """

    def part(key: int, prompt: int, length: int, mask: np.ndarray, reason: str) -> Trajectory:
        absent = np.broadcast_to(np.int32(0), length)
        return Trajectory(
            prompt=Prompt("", "", "", ()),
            prompt_ids=np.full(prompt, key, np.int32),
            response_ids=absent,
            loss_mask=np.unpackbits(mask, count=length).view(np.bool_),
            logprobs=np.broadcast_to(np.float32(0), length),
            versions=absent,
            finish_reason=reason,
            text="",
            turns=absent[:0],
        )

    outlines, rest = outline
    rollouts = [
        [_join_parts([part(*each) for each in sample]) for sample in group] for group in outlines
    ]
    return replace(rest, rollouts=rollouts)


def broadcast_groups(groups: ScoredGroups | None) -> ScoredGroups:
    """Send the outline of rank 0's rollouts to every rank. Collective: one object broadcast over
    all ranks, a bit a token and a few hundred bytes a response.

    :func:`megatron_espo.megatron.scatter.scatter_sequences` sends the tokens to the ranks that
    train them.

    Args:
        groups: the rollouts on rank 0, ``None`` on other ranks.

    Returns:
        ``groups`` itself on rank 0; on other ranks the result of :func:`from_outline`.
    """
    if groups is not None and dist.get_world_size() == 1:
        return groups
    box = [None if groups is None else to_outline(groups)]
    dist.broadcast_object_list(box, src=0)
    if groups is None:
        assert box[0]
        groups = from_outline(box[0])
    return groups


def split(values: Any, lengths: np.ndarray) -> list[Any]:
    """Slices of ``values`` with the given lengths, one after the other.

    Raises:
        ValueError: the lengths do not add up to that of ``values``.
    """
    if lengths.sum() != len(values):
        raise ValueError(f"expected {lengths.sum()} values, got {len(values)}")
    return [values[start:end] for start, end in pairwise([0, *lengths.cumsum().tolist()])]


def _with_lengths(name: str, vectors: list[np.ndarray]) -> Columns:
    return {f"{name}_lengths": [np.array([len(vector) for vector in vectors])], name: vectors}


def _join_parts(parts: list[Trajectory]) -> Trajectory:
    *earlier, last = parts
    return replace(last, earlier=tuple(earlier)) if earlier else last
