"""ESPO in verl, as the loss function of its training engines. Written for verl 0.9.1.

    export VERL_USE_EXTERNAL_MODULES=examples.integrations.verl_espo
    python -m verl.trainer.main_ppo trainer.use_v1=True \\
        actor_rollout_ref.actor.policy_loss.loss_mode=espo \\
        actor_rollout_ref.actor.calculate_entropy=True ...

The import replaces ``verl.workers.utils.losses.ppo_loss``. Other loss modes keep verl's function.

Exact: segments, clip ranges, weights; the result does not depend on micro-batches, dynamic batch
sizes or ranks. N is ``ppo_mini_batch_size * rollout.n``, responses without trained tokens included.
The trainer of ``use_v1=True`` hands over the entropies of the old policy with the batch. The older
trainer drops them: entropies are then those of the trained policy, which is exact in the first
update of a rollout only (``train_batch_size = ppo_mini_batch_size``, ``ppo_epochs = 1``).
"""

from typing import Any

from verl.utils.metric import AggregationType, Metric
from verl.workers.utils import losses
from verl.workers.utils.padding import no_padding_2_padding

from megatron_espo.algo import ESPO, padded_loss

OBJECTIVE = ESPO()
_verl_loss = losses.ppo_loss


def espo_loss(config: Any, model_output: dict, data: Any, dp_group: Any = None):
    """Loss of one micro-batch, as ``verl.workers.utils.losses.ppo_loss`` returns it.

    Args:
        config: ``ActorConfig``, with the model's ``HFModelConfig``.
        model_output: nested ``[batch, time]`` ``log_probs`` and ``entropy`` of prompts and
            responses.
        data: ``TensorDict`` of the micro-batch; ``entropy``, if present, is the old policy's.
        dp_group: not used.
    """
    if config.policy_loss.loss_mode != "espo":
        return _verl_loss(config, model_output, data, dp_group)
    if config.use_kl_loss or config.entropy_coeff:
        raise ValueError("actor: expected use_kl_loss=False and entropy_coeff=0 for loss_mode=espo")
    logprob = no_padding_2_padding(model_output["log_probs"], data)
    optional = [name for name in ("entropy", "rollout_is_weights") if name in data]
    batch = data.select("response_mask", "old_log_probs", "advantages", *optional)
    batch = batch.to_padded_tensor()
    if "entropy" not in batch and "entropy" not in model_output:
        raise ValueError("actor.calculate_entropy: expected True for loss_mode=espo, got False")
    if "entropy" in batch:
        entropy = batch["entropy"]
    else:
        entropy = no_padding_2_padding(model_output["entropy"], data)
    mask = batch["response_mask"].bool()
    output = padded_loss(
        OBJECTIVE,
        logprob,
        batch["old_log_probs"],
        entropy,
        batch["advantages"],
        mask,
        vocab_size=config.model_config.hf_config.get_text_config().vocab_size,
        num_responses=data["global_batch_size"],
        num_tokens=data["batch_num_tokens"],
        correction=batch.get("rollout_is_weights", None),
    )
    loss = output.loss * data["dp_size"]  # verl averages the gradients of data-parallel ranks
    no_gradient = output.no_gradient[mask].float().mean().nan_to_num()
    return loss, {
        "actor/pg_loss": Metric(value=loss, aggregation=AggregationType.SUM),
        "actor/no_gradient": Metric(value=no_gradient, aggregation=AggregationType.MEAN),
    }


losses.ppo_loss = espo_loss
