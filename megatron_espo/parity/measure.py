"""Loss and gradient of the recorded batch in one layout, and how far they are from the one-rank reference. Runs on every rank."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_espo.config import Algorithm, Config, Megatron, Optimizer
from megatron_espo.data.packing import TrainSequence, batch_totals, pack
from megatron_espo.mcore import runtime as mcore_runtime
from megatron_espo.mcore.forward_step import make_forward_step
from megatron_espo.mcore.learner import build_chunks, packing_options
from megatron_espo.mcore.optimizer import Policy
from megatron_espo.metrics import reduce_metrics_everywhere
from megatron_espo.weights.source import MegatronWeightSource


@dataclass(frozen=True)
class Difference:
    """One gradient against the reference's.

    Attributes:
        loss, grad_norm: of this layout; the norm is the one by which Megatron clips.
        loss_error, norm_error: relative to the reference's loss and to the norm of all its tensors.
        worst: largest relative difference (L2 norm of the difference over that of the reference) of a tensor.
        tensor: that tensor's Hugging Face name.
    """

    loss: float
    grad_norm: float
    loss_error: float
    norm_error: float
    worst: float
    tensor: str

    def within(self, tolerance: float) -> bool:
        """Whether loss, norm and every tensor agree (NaN does not)."""
        return all(error <= tolerance for error in (self.loss_error, self.norm_error, self.worst))


class Model:
    """The configured model in its layout, with Megatron's DDP and distributed optimizer. Collective over all ranks.

    Args:
        config: ``model`` and ``megatron`` are used.
        hf_config: the model's ``config.json``.
    """

    def __init__(self, config: Config, hf_config: dict[str, Any]) -> None:
        self.config, self.vocab_size = config, hf_config["vocab_size"]
        self.runtime = mcore_runtime.initialize(**mcore_runtime.parallel_sizes(config.megatron), seed=config.run.seed)
        self.policy = Policy(build_chunks(config, hf_config, self.runtime), self.runtime.groups, Optimizer(), 1)
        self._gradients = MegatronWeightSource(
            self.policy.chunks, hf_config, self.runtime.groups, dtype=torch.float32, read=lambda p: p.main_grad
        )

    def score(self, sequences: list[TrainSequence]) -> tuple[list[list[float]], list[list[float]]]:
        """Log-probs and entropies of each sequence, on one rank."""
        batches = [batch for sequence in sequences for batch in self._pack([sequence], self.config.megatron)]
        scored = self.policy.score(self._forward_step("espo"), batches)
        return [values[0].tolist() for values in scored], [values[1].tolist() for values in scored]

    def backward(self, sequences: list[TrainSequence], megatron: Megatron, objective: str) -> tuple[float, float]:
        """Compute the gradient; returns the loss, and the norm by which Megatron would clip, on every rank."""
        reports = self.policy.backward(self._forward_step(objective), self._pack(sequences, megatron))
        norm = self.policy.grad_norm()
        self.policy.gather_gradients()
        return reduce_metrics_everywhere(reports, self.runtime.groups.dp_cp)["loss/policy"], norm

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole gradients under Hugging Face names, on rank 0 and whoever gathers with it."""
        return iter(self._gradients)

    def _pack(self, sequences: list[TrainSequence], megatron: Megatron):
        tokens = sum(sequence.num_trained for sequence in sequences)
        totals = batch_totals(sequences, num_responses=len(sequences), num_response_tokens=tokens)
        return pack(sequences, totals, **packing_options(megatron, self.runtime.groups))

    def _forward_step(self, objective: str):
        return make_forward_step(
            Algorithm(objective=objective),
            groups=self.runtime.groups,
            vocab_size=self.vocab_size,
            temperature=self.config.rollout.temperature,
        )


def write_reference(model: Model, sequences: list[TrainSequence], objectives: tuple[str, ...], folder: Path) -> None:
    """Write loss, norm and gradients of one rank."""
    numbers = {}
    for objective in objectives:
        loss, _ = model.backward(sequences, model.config.megatron, objective)
        gradients = {name: tensor.clone() for name, tensor in model.gradients()}
        norm = torch.stack([tensor.double().norm() for tensor in gradients.values()]).norm()
        numbers[objective] = {"loss": loss, "grad_norm": float(norm)}
        save_file(gradients, folder / f"{objective}.safetensors")
    (folder / "reference.json").write_text(json.dumps(numbers))


def compare(model: Model, loss: float, norm: float, objective: str, folder: Path) -> Difference | None:
    """The gradient that ``model`` now holds against the reference's; ``None`` on all ranks but rank 0."""
    is_main = model.runtime.is_main
    errors = {}
    reference = safe_open(folder / f"{objective}.safetensors", "pt") if is_main else None
    for name, tensor in model.gradients():
        if is_main:
            wanted, found = reference.get_tensor(name).double(), tensor.cpu().double()
            errors[name] = _relative(float((found - wanted).norm()), float(wanted.norm()))
    if not is_main:
        return None
    missing = set(reference.keys()) ^ set(errors)
    assert not missing, missing
    numbers = json.loads((folder / "reference.json").read_text())[objective]
    # NaN is the worst of all.
    tensor = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return Difference(
        loss=loss,
        grad_norm=norm,
        loss_error=_relative(abs(loss - numbers["loss"]), abs(numbers["loss"])),
        norm_error=_relative(abs(norm - numbers["grad_norm"]), numbers["grad_norm"]),
        worst=errors[tensor],
        tensor=tensor,
    )


def _relative(difference: float, size: float) -> float:
    if size:
        return difference / size
    return 0.0 if difference == 0 else float("inf")
