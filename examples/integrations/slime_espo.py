"""ESPO in slime and vime, as a custom loss function. Commits: docs/own_trainer.md.

    --loss-type custom_loss --custom-loss-function-path examples.integrations.slime_espo.espo_loss
    --use-rollout-entropy
    --rollout-data-postprocess-path examples.integrations.slime_espo.keep_old_entropy

Exact: log-probs and entropies of the tensor-parallel shards, segments, clip ranges, weights; the
result does not depend on micro-batches or data-parallel ranks. N is the global batch size of the
step, responses without trained tokens included. With the last two flags the entropies are those of
the old policy; without them, those of the trained policy, which is exact in the first update of a
rollout. Padded columns of the vocabulary count, as in the frameworks'
own old log-probs. Packed sequences only (``--qkv-format thd``, the default). No context
parallelism, KL loss, entropy bonus, TIS, OPSM or top-p replay.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu
from torch.nn.utils.rnn import pad_sequence

from megatron_espo.algo import ESPO, padded_loss
from megatron_espo.numerics import vocab_parallel_logprob_entropy

OBJECTIVE = ESPO()
REFUSED = ("calculate_per_token_loss", "use_tis", "use_opsm", "use_kl_loss", "entropy_coef")


def keep_old_entropy(args: Any, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    """Store the old policy's entropies under ``values``, a key that reaches the loss function."""
    if not args.use_critic and "entropy" in rollout_data:
        rollout_data["values"] = rollout_data["entropy"]


def espo_loss(
    args: Any,
    batch: dict[str, Any],
    logits: torch.Tensor,
    sum_of_sample_mean: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the responses' losses; the framework divides it by the step's global batch size.

    Args:
        args: arguments of slime or vime.
        batch: lists with one tensor per response.
        logits: ``[1, tokens, vocab/tp]`` float32, packed sequences and padding.
        sum_of_sample_mean: the framework's reduction, for metrics.
    """
    if wrong := [name for name in REFUSED if getattr(args, name)]:
        raise ValueError(f"expected no {', '.join(wrong)} for ESPO")
    packed = getattr(args, "qkv_format", "thd") == "thd"
    if mpu.get_context_parallel_world_size() > 1 or args.rollout_top_p != 1 or not packed:
        raise ValueError("expected context_parallel_size=1, rollout_top_p=1, qkv_format=thd")
    lengths, ends = batch["response_lengths"], torch.tensor(batch["total_lengths"]).cumsum(0)
    rows = [torch.arange(e - n - 1, e - 1) for e, n in zip(ends.tolist(), lengths, strict=True)]
    index = torch.cat(rows).to(logits.device)
    targets = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    tokens = zip(batch["unconcat_tokens"], lengths, strict=True)
    targets[index] = torch.cat([sequence[len(sequence) - n :] for sequence, n in tokens])
    logprob, entropy = (
        values[index].split(lengths)
        for values in vocab_parallel_logprob_entropy(
            logits[0],
            targets,
            mpu.get_tensor_model_parallel_group(),
            temperature=args.rollout_temperature,
        )
    )
    old = batch["rollout_log_probs" if args.use_rollout_logprobs else "log_probs"]
    old_entropy = None if args.use_critic else batch.get("values")
    padded = [logprob, old or logprob, old_entropy or entropy, batch["advantages"]]
    padded = [pad_sequence(list(values), batch_first=True) for values in padded]
    mask = pad_sequence(batch["loss_masks"], batch_first=True)
    output = padded_loss(OBJECTIVE, *padded, mask, vocab_size=args.vocab_size, num_responses=1)
    within = pad_sequence([torch.ones_like(x) for x in batch["loss_masks"]], batch_first=True)
    no_gradient = sum_of_sample_mean(output.no_gradient[within.bool()].float())
    return output.loss, {"loss": output.loss.detach(), "no_gradient": no_gradient}
