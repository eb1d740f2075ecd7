"""The rollouts of one step, as arrays for the rollout log and for the broadcast to all ranks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_espo.distributed.collectives import control_device
from megatron_espo.types import Prompt, Trajectory

# Per-token fields of a trajectory.
_RESPONSE_FIELDS = ("response_ids", "loss_mask", "logprobs", "versions")
Columns = dict[str, list[np.ndarray]]
# JSON values, and ``{name: (dtype, shape)}`` of the arrays in a buffer.
Header = tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]


@dataclass(frozen=True)
class ScoredGroups:
    """A step's rollouts and their rewards.

    Attributes:
        rollouts: ``[prompt][sample]``.
        rewards: ``[prompts, group_size]`` float32, NaN where the verifier failed.
        dispatched: number of new prompts sent to the engine; with dynamic sampling more than
            ``rollouts`` has.
        in_flight: number of prompts whose responses continue in the next step.
    """

    rollouts: list[list[Trajectory]]
    rewards: torch.Tensor
    dispatched: int
    in_flight: int = 0

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
        The JSON values, and by name the arrays of all trajectories in their order, not
            concatenated. Beside arrays of different
        lengths are the lengths, under ``<name>_lengths``.
    """
    prompts = [group[0].prompt for group in groups.rollouts]
    samples = groups.samples
    parts = [part for sample in samples for part in sample.parts]
    content = {
        "dispatched": groups.dispatched,
        "in_flight": groups.in_flight,
        "prompts": [{k: v for k, v in vars(p).items() if k != "token_ids"} for p in prompts],
        "group_sizes": [len(group) for group in groups.rollouts],
        "num_parts": [len(sample.parts) for sample in samples],
        "parts": [[part.finish_reason, part.text, part.reward, part.rewards] for part in parts],
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
    names = ("prompt_ids", "turns", *_RESPONSE_FIELDS)
    lengths = [arrays.get(f"{name}_lengths", arrays["response_lengths"]) for name in names]
    fields = [_split(arrays[name], n) for name, n in zip(names, lengths, strict=True)]
    experts: Any = [None] * len(content["parts"])
    if "routed_experts" in arrays:
        rows = _split(arrays["routed_experts"], arrays["routed_experts_lengths"])
        experts = (part if len(part) else None for part in rows)
    parts = zip(content["parts"], zip(*fields, strict=True), experts, strict=True)
    num_parts = iter(content["num_parts"])

    def next_trajectory(prompt: Prompt) -> Trajectory:
        found = []
        for _ in range(next(num_parts)):
            (finish_reason, text, reward, rewards), values, rows = next(parts)
            rest = {"text": text, "reward": reward, "rewards": rewards, "routed_experts": rows}
            per_part = dict(zip(names, values, strict=True))
            found.append(Trajectory(prompt, **per_part, finish_reason=finish_reason, **rest))
        *earlier, last = found
        return replace(last, earlier=tuple(earlier)) if earlier else last

    sizes = zip(prompts, content["group_sizes"], strict=True)
    rollouts = [[next_trajectory(prompt) for _ in range(size)] for prompt, size in sizes]
    rewards = torch.from_numpy(arrays["rewards"])
    return ScoredGroups(rollouts, rewards, content["dispatched"], content["in_flight"])


def to_buffer(groups: ScoredGroups) -> tuple[Header, np.ndarray]:
    """All arrays of ``groups`` in one uint8 buffer, and a header.

    Omits texts, prompt metadata and routed experts.
    """
    content, columns = to_columns(groups)
    omitted = {"text": "", "answer": "", "metadata": {}}
    content["prompts"] = [prompt | omitted for prompt in content["prompts"]]
    content["parts"] = [[reason, "", *rest] for reason, _, *rest in content["parts"]]
    shapes, flat = {}, []
    # Wide elements come first, so that every array is aligned.
    for name, arrays in sorted(columns.items(), key=lambda item: -item[1][0].itemsize):
        if not name.startswith("routed_experts"):
            shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
            shapes[name] = (arrays[0].dtype.str, shape)
            flat += [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays]
    return (content, shapes), np.concatenate(flat)


def from_buffer(header: Header, buffer: np.ndarray) -> ScoredGroups:
    """The rollouts of which :func:`to_buffer` made the header and the buffer.

    Its arrays are views of the buffer.
    """
    content, shapes = header
    arrays, start = {}, 0
    for name, (dtype, shape) in shapes.items():
        end = start + math.prod(shape) * np.dtype(dtype).itemsize
        arrays[name] = buffer[start:end].view(dtype).reshape(shape)
        start = end
    return from_columns(content, arrays)


def broadcast_groups(groups: ScoredGroups | None) -> ScoredGroups:
    """Send the rollouts of rank 0 to every rank. Collective: one object broadcast and one tensor
    broadcast over all ranks.

    Args:
        groups: the rollouts on rank 0, ``None`` on other ranks.

    Returns:
        ``groups`` itself on rank 0; on other ranks a copy without texts, prompt metadata and routed
            experts.
    """
    box: list[Any] = [None]
    if groups is not None:
        if dist.get_world_size() == 1:
            return groups
        header, flat = to_buffer(groups)
        buffer, box = torch.from_numpy(flat), [(header, len(flat))]
    dist.broadcast_object_list(box, src=0)
    header, size = box[0]
    if groups is None:
        buffer = torch.empty(size, dtype=torch.uint8)
    buffer = buffer.to(control_device())
    dist.broadcast(buffer, src=0)
    return groups or from_buffer(header, buffer.cpu().numpy())


def _with_lengths(name: str, vectors: list[np.ndarray]) -> Columns:
    return {f"{name}_lengths": [np.array([len(vector) for vector in vectors])], name: vectors}


def _split(values: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Views of ``values`` with the given lengths, one after the other."""
    if lengths.sum() != len(values):
        raise ValueError(f"expected {lengths.sum()} values, got {len(values)}")
    ends = lengths.cumsum().tolist()
    return (values[start:end] for start, end in zip(chain([0], ends), ends, strict=False))
