"""The rollouts of one step, as arrays for the rollout log, and their outline for all ranks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_espo.types import Prompt, SamplingMask, Trajectory

# Per-token fields of a trajectory.
_RESPONSE_FIELDS = ("response_ids", "loss_mask", "logprobs", "versions")
Columns = dict[str, list[np.ndarray]]
# JSON values, and the arrays of which ``from_outline`` makes trajectories without tokens.
Outline = tuple[dict[str, Any], dict[str, np.ndarray]]


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
        ages = self._ages(step)
        return float(ages.mean()) if ages.size else 0.0

    def max_staleness(self, step: int) -> int:
        """The staleness of the oldest sampled token."""
        ages = self._ages(step)
        return int(ages.max()) if ages.size else 0

    def _ages(self, step: int) -> np.ndarray:
        parts = [part for sample in self.samples if not sample.failed for part in sample.parts]
        versions = [part.versions[part.loss_mask] for part in parts]
        return step - 1 - np.concatenate([np.zeros(0, np.int32), *versions])

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
    token_ids = _split(arrays["token_ids"], arrays["token_ids_lengths"])
    prompts = [
        Prompt(**entry, token_ids=tuple(ids.tolist()))
        for entry, ids in zip(content["prompts"], token_ids, strict=True)
    ]
    columns: dict[str, Iterable[Any]] = {"text": content["texts"]}
    for i, name in enumerate(("finish_reason", "reward", "rewards")):
        columns[name] = [part[i] for part in content["parts"]]
    for name in ("prompt_ids", "turns", *_RESPONSE_FIELDS):
        lengths = arrays.get(f"{name}_lengths", arrays["response_lengths"])
        columns[name] = _split(arrays[name], lengths)
    if "routed_experts" in arrays:
        rows = _split(arrays["routed_experts"], arrays["routed_experts_lengths"])
        columns["routed_experts"] = (part if len(part) else None for part in rows)
    if "mask_ids" in arrays:
        ids = _split(arrays["mask_ids"], arrays["mask_ids_lengths"])
        kept = _split(arrays["mask_counts"], arrays["response_lengths"])
        masks = map(SamplingMask, ids, kept)
        columns["sampling_mask"] = (mask if len(mask.ids) else None for mask in masks)
    values = zip(*columns.values(), strict=True)
    parts = (dict(zip(columns, each, strict=True)) for each in values)
    num_parts = iter(content["num_parts"])

    def next_trajectory(prompt: Prompt) -> Trajectory:
        found = islice(parts, next(num_parts))
        *earlier, last = [Trajectory(prompt, **attributes) for attributes in found]
        return replace(last, earlier=tuple(earlier)) if earlier else last

    sizes = zip(prompts, content["group_sizes"], strict=True)
    rollouts = [[next_trajectory(prompt) for _ in range(size)] for prompt, size in sizes]
    rewards = torch.from_numpy(arrays["rewards"])
    counts = (content["dispatched"], content["in_flight"], content.get("skipped", 0))
    return ScoredGroups(rollouts, rewards, *counts)


def to_outline(groups: ScoredGroups) -> Outline:
    """What every rank needs of ``groups``: lengths, loss masks, rewards and counts, without tokens,
    log-probs, versions, texts, prompt metadata, routed experts and sampling masks.
    """
    content, columns = to_columns(groups)
    content["prompts"] = [
        prompt | {"text": "", "answer": "", "metadata": {}} for prompt in content["prompts"]
    ]
    content["texts"] = [""] * len(content["parts"])
    mask = np.packbits(np.concatenate(columns["loss_mask"]))
    first: dict[bytes, int] = {}
    keys = [first.setdefault(ids.tobytes(), -1 - len(first)) for ids in columns["prompt_ids"]]
    known = {name: columns[name][0] for name in ("prompt_ids_lengths", "response_lengths")}
    arrays = {"rewards": groups.rewards.numpy(), "loss_mask": mask, "prompt_keys": np.array(keys)}
    return content, arrays | known


def from_outline(outline: Outline) -> ScoredGroups:
    """Trajectories of the right lengths, loss masks and rewards. Ids, log-probs and versions are
    placeholders.

    The ids of a prompt are one negative number, equal for equal prompts: prompts can be grouped.
    """
    content, arrays = outline
    tokens = int(arrays["response_lengths"].sum())

    def absent(dtype: type, length: int = tokens) -> np.ndarray:
        return np.broadcast_to(np.zeros((), dtype), length)

    prompt_ids = arrays["prompt_keys"].astype(np.int32).repeat(arrays["prompt_ids_lengths"])
    none = np.zeros(len(content["parts"]), np.int64)
    return from_columns(
        content,
        arrays
        | {"token_ids": absent(np.int32, 0), "token_ids_lengths": none[: len(content["prompts"])]}
        | {"turns": absent(np.int32, 0), "turns_lengths": none, "prompt_ids": prompt_ids}
        | {"loss_mask": np.unpackbits(arrays["loss_mask"], count=tokens).view(np.bool_)}
        | {"response_ids": absent(np.int32), "versions": absent(np.int32)}
        | {"logprobs": absent(np.float32)},
    )


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


def _with_lengths(name: str, vectors: list[np.ndarray]) -> Columns:
    return {f"{name}_lengths": [np.array([len(vector) for vector in vectors])], name: vectors}


def _split(values: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Views of ``values`` with the given lengths, one after the other."""
    if lengths.sum() != len(values):
        raise ValueError(f"expected {lengths.sum()} values, got {len(values)}")
    ends = lengths.cumsum().tolist()
    return (values[start:end] for start, end in zip(chain([0], ends), ends, strict=False))
