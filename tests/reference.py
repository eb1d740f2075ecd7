"""One policy-gradient step in dense float64 on one rank, written from the equations alone: the judge of everything distributed.

Nothing here is imported from the package.
"""

import math
from fractions import Fraction

import torch


def token_statistics(model, prompt: list[int], response: list[int], temperature: float):
    """Log-probs and entropies ``[response]`` of the response tokens, with gradient, from the whole vocabulary."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(1, torch.tensor(response)[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def espo_loss(model, batch, *, num_responses, temperature, vocab_size, old_model=None, alpha=0.02, rho="0.2"):
    """``-Σ_responses Σ_groups Σ_t 1/(N K n) min(s A, clip(s, 1 - ε, 1 + ε) A)`` over ``(prompt, response, advantage)`` triples."""
    loss = 0.0
    for prompt, response, advantage in batch:
        logp, entropy = token_statistics(model, prompt, response, temperature)
        if old_model is None:
            old_logp, old_entropy = logp.detach(), entropy.detach()
        else:
            with torch.no_grad():
                old_logp, old_entropy = token_statistics(old_model, prompt, response, temperature)
        order = sorted(range(len(response)), key=lambda t: (-float(old_entropy[t]), t))
        k = math.ceil(Fraction(rho) * len(response))
        groups = [group for group in (order[:k], order[k:]) if group]
        for group in groups:
            epsilon = alpha / math.log(vocab_size) * float(old_entropy[group].mean())
            mean_difference = (logp[group] - old_logp[group]).mean().detach()
            s = mean_difference.exp() * (logp[group] - logp[group].detach()).exp()
            clipped = s.clamp(1 - epsilon, 1 + epsilon)
            surrogate = torch.minimum(s * advantage, clipped * advantage)
            loss = loss - surrogate.sum() / (num_responses * len(groups) * len(group))
    return loss


def gradients(model, loss) -> dict[str, torch.Tensor]:
    """Gradient of every parameter by name."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
