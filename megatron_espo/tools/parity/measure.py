"""Loss and gradient of the recorded batch in one layout, compared with the one-rank reference."""

from itertools import chain
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
from megatron_espo.weights.source import WeightGatherer


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
        self.gradients = WeightGatherer(
            self.train_engine.chunks, spec, groups, dtype=torch.float32, read=_gradient
        )

    def score(self, sequences: list[TrainSequence]) -> list[torch.Tensor]:
        """``[2, response_tokens]`` log-probs and entropies of each sequence, on one rank."""
        megatron = self.config.megatron
        batches = [batch for sequence in sequences for batch in self._pack([sequence], megatron)]
        return self.train_engine.score(self._forward_step("espo"), batches)

    def backward(
        self, sequences: list[TrainSequence], megatron: Megatron, objective: str
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

    def _forward_step(self, objective: str) -> Any:
        return make_forward_step(
            Algorithm(objective=objective),
            groups=self.runtime.groups,
            vocab_size=self.vocab_size,
            temperature=self.config.rollout.temperature,
        )


def write_reference(
    model: Model, sequences: list[TrainSequence], objective: str, file: Path
) -> None:
    """Write loss, norm and gradients of the one-rank model."""
    loss, _ = model.backward(sequences, model.config.megatron, objective)
    gradients = dict(model.gradients)
    norm = torch.stack([tensor.double().norm() for tensor in gradients.values()]).norm()
    torch.save(gradients | _named(loss, float(norm)), file)


def compare(model: Model, loss: float, norm: float, file: Path) -> tuple[float, str] | None:
    """Compare loss, Megatron's gradient norm, and the gradients that ``model`` holds.

    Returns:
        On rank 0 the largest relative difference |value - reference| / |reference| (L2) of the
        loss, of the norm or of a tensor; NaN is the largest. Then ``loss``, ``grad norm``, or that
        tensor's Hugging Face name. None on other ranks.
    """
    is_main, errors = model.runtime.is_main, dict[str, float]()
    wanted = torch.load(file, mmap=True) if is_main else {}
    for name, tensor in chain(model.gradients, _named(loss, norm).items()):
        if is_main:
            errors[name] = _relative(tensor.cpu().double(), wanted.pop(name).double())
    if not is_main:
        return None
    assert not wanted, f"not compared: {list(wanted)}"
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return errors[worst], worst


def _named(loss: float, norm: float) -> dict[str, torch.Tensor]:
    values = torch.tensor([loss, norm], dtype=torch.float64)
    return dict(zip(("loss", "grad norm"), values, strict=True))


def _gradient(parameter: Any) -> torch.Tensor:
    return parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter)


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    difference, size = float((found - wanted).norm()), float(wanted.norm())
    if size:
        return difference / size
    return 0.0 if difference == 0 else float("inf")
