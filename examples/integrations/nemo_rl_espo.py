"""ESPO in NeMo RL, as a loss function class. Written for the commit in docs/own_trainer.md.

NeMo RL has no setting for the loss class. Replace it before ``setup`` in ``examples/run_grpo.py``
(``nemo_rl.algorithms.grpo.ClippedPGLossFn = ESPOLossFn``), with this file on the workers' path.

Exact: segments, clip ranges, weights; the result does not depend on micro-batches, sequence
packing (``fuse_loss=false``), data or tensor parallelism. NeMo RL keeps no entropies of the old
policy: they are those of the trained policy, which is exact if a rollout has one update
(``num_prompts_per_step * num_generations_per_prompt = train_global_batch_size``). N counts only
responses with ``sample_mask`` 1. No context parallelism, KL penalty or top-p filtering.
"""

from typing import Any

import torch
from nemo_rl.algorithms.loss.interfaces import LossFunction, LossInputType, LossType
from torch.distributed.tensor import DTensor

from megatron_espo.algo import ESPO, padded_loss
from megatron_espo.numerics import vocab_parallel_logprob_entropy


class ESPOLossFn(LossFunction):
    """Loss of one micro-batch or packed sequence, from logits at the sampling temperature."""

    loss_type = LossType.SEQUENCE_LEVEL
    input_type = LossInputType.LOGIT

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False) -> None:
        self.objective = ESPO(dual_clip=cfg.ratio_clip_c)
        self.force_on_policy_ratio = cfg.force_on_policy_ratio
        kl = 0 if cfg.use_kl_in_reward else cfg.reference_policy_kl_penalty
        if kl or use_fused_linear_logprobs or cfg.use_importance_sampling_correction:
            raise ValueError("expected no KL penalty, fused log-probs or importance correction")

    def __call__(
        self,
        logits: torch.Tensor,
        data: Any,
        global_valid_seqs: torch.Tensor,
        global_valid_toks: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        group, tokens = None, data["input_ids"]
        if isinstance(logits, DTensor):
            group, logits = logits.device_mesh.get_group("tp"), logits.to_local()
        elif _megatron_is_initialized():
            from megatron.core import parallel_state

            group = parallel_state.get_tensor_model_parallel_group()
            if parallel_state.get_context_parallel_world_size() > 1:
                raise ValueError("context_parallel_size: expected 1 for ESPO")
        size = 1 if group is None else group.size()
        logprob, entropy = (
            values.unflatten(0, tokens.shape)[:, :-1]
            for values in vocab_parallel_logprob_entropy(
                logits[:, : tokens.shape[1]].flatten(0, 1), tokens.roll(-1, 1).flatten(), group
            )
        )
        output = padded_loss(
            self.objective,
            logprob,
            logprob if self.force_on_policy_ratio else data["prev_logprobs"][:, 1:],
            entropy,
            data["advantages"][:, 1:],
            data["token_mask"][:, 1:] * data["sample_mask"][:, None],
            vocab_size=logits.shape[-1] * size,
            num_responses=int(global_valid_seqs),
            num_tokens=int(global_valid_toks),
        )
        valid = int(data["sample_mask"].sum())
        return output.loss, {"loss": output.loss.item(), "num_valid_samples": valid}


def _megatron_is_initialized() -> bool:
    try:
        from megatron.core import parallel_state
    except ImportError:
        return False
    return parallel_state.is_initialized()
