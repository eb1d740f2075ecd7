"""Compare the engine's weights and log-probs with the trainer's."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_espo.rollout.engine import Generation

_SHOWN = 5
# Mean |engine - trainer| log-prob gap that counts as rounding, nats a token. Measured on a 135M
# model: 1e-5 in float32, 0.03 in bfloat16, 0.17 in fp8; stale weights give 0.2 and more. With fewer
# bits than bfloat16 the audit finds stale weights.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "8 bits": 0.5, "4 bits": 1.0}
# Largest relative error of a tensor, |served - sent| / |sent|. Rounding to the 3 mantissa bits of
# fp8 changes a value by at most 1/16 of it, and a tensor by about 0.026; int8 by about 0.01; 4 bits
# by about 0.12. A wrong layout gives 1.4. The error is estimated with a standard error of 18 %.
LIMITS = {"high precision": 0.01, "8 bits": 0.1, "4 bits": 0.3}


def bits(quantization: str) -> str:
    """Key of ``TOLERANCE`` and ``LIMITS`` for a value of ``rollout.quantization``."""
    return "4 bits" if "4" in quantization else "8 bits"


def wrong_tensors(sent: Mapping[str, int], served: Mapping[str, int]) -> str | None:
    """Describe the tensors whose checksums differ between trainer and engine; None if none does.

    Tensors that only one side has are not compared, except a tied output layer, which must equal
    the embedding.
    """
    expected = _with_tied(sent)
    wrong = [name for name in expected if name in served and served[name] != expected[name]]
    return _summary("tensors", wrong, len(expected))


def _with_tied(sent: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(sent)
    if "model.embed_tokens.weight" in sent:
        found.setdefault("lm_head.weight", sent["model.embed_tokens.weight"])
    return found


def _summary(what: str, wrong: Sequence[str], count: int) -> str | None:
    """Describe the ``wrong`` of ``count`` tensors; None if none is."""
    if not wrong:
        return None
    more = f" (and {len(wrong) - _SHOWN} more)" if len(wrong) > _SHOWN else ""
    first = ", ".join(wrong[:_SHOWN])
    return f"{len(wrong)} of {count} {what} are not served as they were sent: {first}{more}"


def audit_quantization(
    sent: Mapping[str, tuple[float, Sequence[float]]],
    served: Iterable[tuple[str, str, bool, Sequence[float]]],
    quantization: str,
) -> tuple[list[dict[str, Any]], str | None]:
    """Compare the matrices that the engine serves with those that were sent.

    Args:
        sent: norm and ``checksum.tensor_sketch`` of each matrix.
        served: ``read_back.read_back_sketches`` of all workers.
        quantization: ``rollout.quantization``.

    Returns:
        For each matrix its ``name`` in the checkpoint, ``error`` (estimate of |served - sent| /
        |sent|; None: the engine cannot read it back), ``dtype`` in the engine's memory, and whether
        it is ``quantized`` to fewer bits than bfloat16. Then a description of those whose error is
        above the limit; None if none is.
    """
    sketches, kinds = dict[str, np.ndarray](), dict[str, tuple[str, bool]]()
    for name, dtype, quantized, part in served:
        sketches[name] = sketches.get(name, 0) + np.asarray(part)
        kinds[name] = dtype, quantized
    rows, wrong = list[dict[str, Any]](), list[str]()
    for name, (norm, sketch) in _with_tied(sent).items():
        if name not in sketches:
            if name in sent:
                rows.append({"name": name, "error": None, "dtype": "unknown", "quantized": False})
            continue
        (dtype, quantized), own = kinds[name], sketches[name]
        error = _distance(own, sketch) / (norm or 1e-30)
        rows.append({"name": name, "error": error, "dtype": dtype, "quantized": quantized})
        limit = LIMITS[bits(quantization) if quantized else "high precision"]
        if not error <= limit:
            wrong.append(
                f"{name} ({dtype}): relative error {error:.3g}, expected at most {limit:g}"
            )
            same = (n for n, s in sent.items() if _distance(own, s[1]) <= limit * s[0])
            if len(wrong) <= _SHOWN and (other := next(same, "")):
                wrong[-1] += f" (it holds the values of {other})"
    return rows, _summary("matrices", wrong, len(rows))


def _distance(one: np.ndarray, other: Sequence[float]) -> float:
    """Estimate of the norm of the difference of two tensors."""
    return float(np.sqrt(np.mean((one - other) ** 2)))


@dataclass(frozen=True)
class CanarySample:
    """The engine's response to one canary prompt.

    Attributes:
        prompt_id: names the prompt in messages.
        prompt_ids: token ids.
    """

    prompt_id: str
    prompt_ids: tuple[int, ...]
    response: Generation

    @property
    def scored(self) -> tuple[tuple[int, ...], tuple[int, ...], Any]:
        """The arguments with which the trainer scores this sample."""
        response = self.response
        return self.prompt_ids, tuple(response.token_ids.tolist()), response.routed_experts

    @property
    def key(self) -> tuple:
        """A hashable form of :attr:`scored`."""
        prompt, response, experts = self.scored
        return prompt, response, None if experts is None else experts.tobytes()


def canary_gap(
    samples: Sequence[CanarySample], trained: Sequence[Sequence[float]]
) -> tuple[float, str]:
    """Return the mean |engine - trainer| log-prob gap (NaN if one is) and the worst token as text.

    Args:
        trained: the trainer's log-probs of each sample's response, nats.
    """
    gaps = []
    for sample, row in zip(samples, trained, strict=True):
        response = sample.response
        tokens = zip(response.token_ids, response.logprobs.tolist(), row, strict=True)
        for position, (token, engine, trainer) in enumerate(tokens):
            where = f"prompt {sample.prompt_id!r}, token {position} (id {token})"
            text = f"{where}: engine {engine:.4f}, trainer {trainer:.4f}"
            gaps.append((abs(engine - trainer), text))
    worst = max(gaps, key=lambda gap: math.inf if math.isnan(gap[0]) else gap[0])
    return sum(gap for gap, _ in gaps) / len(gaps), worst[1]
