"""One policy-gradient step in dense float64 on one rank, from the equations alone.

It imports nothing from the package.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import torch


@contextmanager
def routed(model, experts) -> Iterator[None]:
    """Make the routers take ``experts [tokens - 1, layers with experts, top_k]``.

    The last token, and with ``None`` every token, takes the router's own choice.
    """

    def choose(layer: int):
        def hook(router, _, output):
            logits, _, own = output
            chosen = torch.cat([torch.as_tensor(experts[:, layer], dtype=torch.int64), own[-1:]])
            is_sigmoid = hasattr(router, "e_score_correction_bias")
            weights = (logits.sigmoid() if is_sigmoid else logits.softmax(-1)).gather(1, chosen)
            if getattr(router, "norm_topk_prob", False):
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights * getattr(router, "routed_scaling_factor", 1.0), chosen

        return hook

    routers = (
        []
        if experts is None
        else [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
    )
    handles = [router.register_forward_hook(choose(layer)) for layer, router in enumerate(routers)]
    yield
    for handle in handles:
        handle.remove()


def token_statistics(
    model, prompt: list[int], response: list[int], temperature: float, experts=None, kept=None
):
    """Log-probs and entropies ``[response]``, with gradient.

    They are those of the whole vocabulary, or of the ``kept`` ids of each token.
    """
    with routed(model, experts):
        logits = (
            model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
        )
    for row, ids in enumerate(kept or ()):
        dropped = torch.ones(logits.size(1), dtype=torch.bool)
        dropped[ids] = False
        logits[row, dropped] = -1e9
    logp = logits.log_softmax(-1)
    return logp.gather(1, torch.tensor(response)[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def espo_loss(
    model, batch, *, num_responses, temperature, vocab_size, old_model=None, alpha=0.02, rho="0.2",
    reference_model=None, rollout_logprobs=None, kl_coef=0.0, entropy_coef=0.0,
    rollout_correction="off", routed_experts=None, masks=None, kept=None,
):  # fmt: skip
    """ESPO's loss over ``(prompt, response, advantage)`` triples.

    ``-Σ_responses Σ_groups Σ_t 1/(N K n) (c_t min(s A, clip(s, 1 - ε, 1 + ε) A) - kl_coef k3_t +
    entropy_coef H_t)`` with the truncated importance sampling factor ``c`` of at most 2. All models
    take the ``routed_experts`` and ``kept`` ids of a triple. Only tokens with a True in ``masks``
    have a loss.
    """
    loss = 0.0
    for number, (prompt, response, advantage) in enumerate(batch):
        experts = routed_experts and routed_experts[number]
        trained = [t for t in range(len(response)) if masks is None or masks[number][t]]

        inputs = (prompt, response, temperature, experts, kept and kept[number])

        def statistics(model, inputs=inputs, trained=trained):
            return [values[trained] for values in token_statistics(model, *inputs)]

        logp, entropy = statistics(model)
        old_logp, old_entropy = logp.detach(), entropy.detach()
        if old_model is not None:
            with torch.no_grad():
                old_logp, old_entropy = statistics(old_model)
        factor, kl = torch.ones_like(old_logp), torch.zeros_like(old_logp)
        if rollout_correction != "off":
            difference = (
                old_logp - torch.tensor(rollout_logprobs[number], dtype=old_logp.dtype)[trained]
            )
            ratio = (
                difference.exp()
                if rollout_correction == "token"
                else difference.sum().exp().expand_as(difference)
            )
            factor = ratio.clamp(max=2.0)
        if reference_model is not None:
            with torch.no_grad():
                reference_logp, _ = statistics(reference_model)
            r = reference_logp - logp
            kl = r.exp() - 1 - r
        order = sorted(range(len(trained)), key=lambda t: (-float(old_entropy[t]), t))
        k = math.ceil(Fraction(rho) * len(trained))
        groups = [group for group in (order[:k], order[k:]) if group]
        for group in groups:
            epsilon = alpha / math.log(vocab_size) * float(old_entropy[group].mean())
            mean_difference = (logp[group] - old_logp[group]).mean().detach()
            s = mean_difference.exp() * (logp[group] - logp[group].detach()).exp()
            clipped = s.clamp(1 - epsilon, 1 + epsilon)
            value = factor[group] * torch.minimum(s * advantage, clipped * advantage)
            value = value - kl_coef * kl[group] + entropy_coef * entropy[group]
            loss = loss - value.sum() / (num_responses * len(groups) * len(group))
    return loss


def vespo_loss(
    model, batch, *, num_responses, temperature, old_model, masks, routed_experts, vocab_size
):
    """``-Σ_t 1/99 φ(W) A log π_θ`` with ``φ(W) = W^k exp(λ (1 - W))``, detached.

    ``W`` is the ratio of the response's trained tokens; ``k`` and ``λ`` are 2 and 3 for A > 0,
    otherwise 3 and 2. The step has 99 tokens. The arguments are those of :func:`espo_loss`.
    """
    loss = 0.0
    for number, (prompt, response, advantage) in enumerate(batch):
        logp, _ = token_statistics(model, prompt, response, temperature)
        with torch.no_grad():
            old_logp, _ = token_statistics(old_model, prompt, response, temperature)
        trained = [t for t in range(len(response)) if masks is None or masks[number][t]]
        ratio = (logp - old_logp)[trained].sum().exp().detach()
        k, scale = (2, 3) if advantage > 0 else (3, 2)
        weight = ratio**k * (scale * (1 - ratio)).exp()
        loss = loss - (weight * advantage * logp[trained]).sum() / 99
    return loss


def gradients(model, loss) -> dict[str, torch.Tensor]:
    """Gradient of every parameter by name."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
