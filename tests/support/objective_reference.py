"""Loss and gradient of the objectives in plain Python floats, from the equations alone.

It imports nothing from the package and uses no tensor.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction


@dataclass(frozen=True)
class Response:
    """One response: per-token lists, and the advantage of all tokens or of each."""

    logprob: list[float]
    old_logprob: list[float]
    entropy: list[float]
    advantage: float | list[float]


@dataclass(frozen=True)
class Rules:
    """An objective's settings; bounds are ``None`` for ESPO, which derives them."""

    objective: str
    low: float | None = None
    high: float | None = None
    quantiles: tuple[float, ...] = (0.8,)
    alpha: float = 0.02
    clip_floor: float = 0.0
    ratio: str = "segment"
    dual_clip: float | None = None
    objective_args: dict[str, float] = field(default_factory=dict)


@dataclass
class Expected:
    """The loss, and per token surrogate, gradient, weight, bounds, group, ratio and distance to a
    bound.

    The gradient jumps at a bound, so tests skip tokens whose ``margin`` is within rounding.
    """

    loss: float = 0.0
    value: list[float] = field(default_factory=list)
    gradient: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)


def exponential(x: float) -> float:
    return math.exp(max(-20.0, min(20.0, x)))


def clip(x: float, low: float, high: float) -> float:
    return max(low, min(high, x))


def groups_of(entropy: list[float], quantiles: tuple[float, ...]) -> list[int]:
    """Entropy group of each token: ``ceil((1 - q) T)`` tokens lie above each boundary."""
    order = sorted(range(len(entropy)), key=lambda t: (-entropy[t], t))
    group = [0] * len(entropy)
    for q in quantiles:
        for t in order[: math.ceil((1 - Fraction(str(q))) * len(entropy))]:
            group[t] += 1
    return group


def expected(
    responses: list[Response],
    rules: Rules,
    *,
    num_responses: int,
    num_tokens: int,
    max_tokens: int,
    vocab: int,
) -> Expected:
    """``-Σ_t w_t surrogate_t`` and its gradient; the step has ``num_responses`` in all."""
    answer = Expected()
    for response in responses:
        length = len(response.logprob)
        d = [new - old for new, old in zip(response.logprob, response.old_logprob, strict=True)]
        group = groups_of(response.entropy, rules.quantiles)
        name = rules.objective
        for t in range(length):
            # The tokens that share this token's ratio.
            if name == "espo":
                members = [u for u in range(length) if group[u] == group[t]]
                weight = 1 / (num_responses * len(set(group)) * len(members))
                epsilon = (
                    rules.alpha
                    / math.log(vocab)
                    * sum(response.entropy[u] for u in members)
                    / len(members)
                )
                low = high = max(epsilon, rules.clip_floor)
            else:
                members = list(range(length)) if name in ("gspo", "gmpo") else [t]
                low, high = rules.low, rules.high
                weight = {
                    "gspo": 1 / (num_responses * length),
                    "gmpo": 1 / (num_responses * length),
                    "grpo": 1 / (num_responses * length),
                    "dr_grpo": 1 / (num_responses * max_tokens),
                    "dapo": 1 / num_tokens,
                    "cispo": 1 / num_tokens,
                    "ce_gppo": 1 / num_tokens,
                    "dppo": 1 / num_tokens,
                    "sapo": 1 / (num_responses * length),
                }[name]
            value, slope, ratio, margin = _token(rules, response, d, members, t, low, high)
            answer.loss -= weight * value
            answer.value.append(value)
            answer.gradient.append(-weight * slope)
            answer.weight.append(weight)
            answer.low.append(low)
            answer.high.append(high)
            answer.group.append(group[t])
            answer.ratio.append(ratio)
            answer.margin.append(margin)
    return answer


def _token(rules, response, d, members, t, low, high) -> tuple[float, float, float, float]:
    """A token's surrogate, its derivative in the log-prob, its ratio, its distance to a bound."""
    a = response.advantage
    a = a[t] if isinstance(a, list) else a
    args = {"beta_low": 0.75, "beta_high": 1.0, "max_ratio": 20.0, "tau_pos": 1.0, "tau_neg": 1.05}
    args |= rules.objective_args
    if rules.objective == "gmpo":
        # Clipping lowers a·d of each token; the mean comes after.
        limited = [min(d[u], high) if a > 0 else max(d[u], -low) for u in members]
        s = exponential(sum(limited) / len(members))
        beyond = d[t] > high if a > 0 else d[t] < -low
        return s * a, 0.0 if beyond else s * a, s, min(abs(d[t] - high), abs(d[t] + low))
    if rules.objective == "cispo":
        s = exponential(d[t])
        weight = clip(s, 1 - low, 1 + high)
        return weight * a * response.logprob[t], weight * a, s, math.inf
    if rules.objective == "dppo":
        s = exponential(d[t])
        new = response.logprob[t]
        moved = math.exp(new) - math.exp(new - d[t])
        beyond = moved > high if a > 0 else moved < -low
        factor = 0.0 if beyond else min(s, args["max_ratio"]) * a
        return factor * new, factor, s, min(abs(moved - high), abs(moved + low))
    if rules.objective == "ce_gppo":
        s = exponential(d[t])
        factor = s
        if a > 0 and s > 1 + high:
            factor = args["beta_high"] * (1 + high)
        elif a < 0 and s < 1 - low:
            factor = args["beta_low"] * (1 - low)
        return factor * a, factor * a, s, min(abs(s - 1 - high), abs(s - 1 + low))
    if rules.objective == "sapo":
        s = exponential(d[t])
        tau = args["tau_pos"] if a > 0 else args["tau_neg"]
        odds = math.exp(-tau * (s - 1))
        gate = 1 / (1 + odds)
        # The gradient of a wide open gate underflows to 0, in float32 earlier than here.
        margin = 0.0 if odds < 1e-30 else math.inf
        return 4 / tau * gate * a, 4 * odds * gate**2 * s * a, s, margin
    exponent = sum(d[u] for u in members) / len(members)
    if rules.ratio == "segment_times_token":
        exponent += d[t]
    s = exponential(exponent)
    value, slope = s * a, s * a
    if a > 0 and s > 1 + high:
        value, slope = (1 + high) * a, 0.0
    if a < 0 and s < 1 - low:
        value, slope = (1 - low) * a, 0.0
    margin = min(abs(s - 1 - high), abs(s - 1 + low))
    if rules.dual_clip is not None and a < 0:
        margin = min(margin, abs(s - rules.dual_clip))
        if value < rules.dual_clip * a:
            value, slope = rules.dual_clip * a, 0.0
    return value, slope, s, margin
