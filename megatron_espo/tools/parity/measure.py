"""Loss and gradient of the recorded batch in one layout, compared with the one-rank reference."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_espo.config import Algorithm, Config, Megatron, Optimizer
from megatron_espo.data.packing import TrainSequence, batch_totals, pack
from megatron_espo.distributed import runtime as distributed_runtime
from megatron_espo.megatron.actor import build_chunks, packing_spec
from megatron_espo.megatron.forward_step import make_forward_step
from megatron_espo.megatron.train_engine import TrainEngine
from megatron_espo.models.spec import ModelSpec
from megatron_espo.monitoring.metrics import reduce_metrics_everywhere
from megatron_espo.tools.parity.cases import Objective
from megatron_espo.weights.source import WeightGatherer


@dataclass(frozen=True)
class Difference:
    """One gradient compared with the reference.

    Attributes:
        loss, grad_norm: of this layout; Megatron clips by this norm.
        worst: largest relative difference of the loss, of the norm of all tensors, or of a tensor,
            |gradient - reference| / |reference| (L2). NaN is the largest.
        tensor: that tensor's Hugging Face name, ``loss`` or ``grad norm``.
    """

    loss: float
    grad_norm: float
    worst: float
    tensor: str


class Model:
    """The model in its layout, with Megatron's DDP and distributed optimizer. Collective.

    Args:
        config: ``model`` and ``megatron`` are used.
        spec: the model.

    Attributes:
        gradients: Hugging Face names, with whole gradients on the ranks that gather them.
    """

    def __init__(self, config: Config, spec: ModelSpec) -> None:
        self.config, self.vocab_size = config, spec.vocab_size
        sizes = distributed_runtime.parallel_sizes(config.megatron)
        self.runtime = distributed_runtime.initialize(**sizes, seed=config.run.seed)
        groups = self.runtime.groups
        chunks = build_chunks(config, spec, self.runtime)
        self.train_engine = TrainEngine(chunks, groups, Optimizer(), 1)
        chunks = self.train_engine.chunks
        self.gradients = WeightGatherer(chunks, spec, groups, dtype=torch.float32, read=_gradient)

    def score(self, sequences: list[TrainSequence]) -> tuple[list[list[float]], list[list[float]]]:
        """Log-probs and entropies of each sequence, on one rank."""
        megatron = self.config.megatron
        batches = [batch for sequence in sequences for batch in self._pack([sequence], megatron)]
        scored = self.train_engine.score(self._forward_step("espo"), batches)
        return [values[0].tolist() for values in scored], [values[1].tolist() for values in scored]

    def backward(
        self, sequences: list[TrainSequence], megatron: Megatron, objective: Objective
    ) -> tuple[float, float]:
        """Compute the gradient; return the loss and Megatron's gradient norm, on every rank."""
        batches = self._pack(sequences, megatron)
        reports = self.train_engine.backward(self._forward_step(objective), batches)
        norm = self.train_engine.grad_norm()
        self.train_engine.gather_gradients()
        return reduce_metrics_everywhere(reports, self.runtime.groups.dp_cp)["loss/policy"], norm

    def _pack(self, sequences: list[TrainSequence], megatron: Megatron) -> list:
        tokens = sum(sequence.num_trained for sequence in sequences)
        totals = batch_totals(sequences, num_responses=len(sequences), num_response_tokens=tokens)
        return pack(sequences, totals, packing_spec(megatron, self.runtime.groups))

    def _forward_step(self, objective: Objective) -> Any:
        return make_forward_step(
            Algorithm(objective=objective),
            groups=self.runtime.groups,
            vocab_size=self.vocab_size,
            temperature=self.config.rollout.temperature,
        )


def write_reference(
    model: Model, sequences: list[TrainSequence], objectives: tuple[Objective, ...], folder: Path
) -> None:
    """Write loss, norm and gradients of the one-rank model."""
    for objective in objectives:
        loss, _ = model.backward(sequences, model.config.megatron, objective)
        gradients = {name: tensor.clone() for name, tensor in model.gradients if tensor is not None}
        norm = torch.stack([tensor.double().norm() for tensor in gradients.values()]).norm()
        reference = {"loss": loss, "grad_norm": float(norm), "gradients": gradients}
        torch.save(reference, folder / f"{objective}.pt")


def compare(
    model: Model, loss: float, norm: float, objective: str, folder: Path
) -> Difference | None:
    """Compare the gradient that ``model`` holds; the result on rank 0, None on other ranks."""
    errors, reference = dict[str, float](), None
    if model.runtime.is_main:
        reference = torch.load(folder / f"{objective}.pt", mmap=True)
    for name, tensor in model.gradients:
        if reference and tensor is not None:
            wanted, found = reference["gradients"].pop(name).double(), tensor.cpu().double()
            errors[name] = _relative(float((found - wanted).norm()), float(wanted.norm()))
    if reference is None:
        return None
    assert not reference["gradients"], f"not compared: {list(reference['gradients'])}"
    errors["loss"] = _relative(abs(loss - reference["loss"]), abs(reference["loss"]))
    errors["grad norm"] = _relative(abs(norm - reference["grad_norm"]), reference["grad_norm"])
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return Difference(loss, norm, errors[worst], worst)


def _gradient(parameter: Any) -> torch.Tensor:
    return parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter)


def _relative(difference: float, size: float) -> float:
    if size:
        return difference / size
    return 0.0 if difference == 0 else float("inf")
