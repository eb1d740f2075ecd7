"""ESPO in TRL: ``ESPOTrainer`` replaces ``trl.GRPOTrainer``. Written for TRL 1.16.0.

    trainer = ESPOTrainer(model, reward, args=GRPOConfig(beta=0.0), train_dataset=data)

Exact: segments, clip ranges and weights; the result does not depend on micro-batches or ranks.
Completions that TRL masks still count in N. Entropies are those of the old policy: if TRL scores
the old policy (``num_iterations > 1``, ``steps_per_generation > gradient_accumulation_steps``, or
vLLM), they come from the same forward pass; otherwise the trained policy is the old policy.
TRL's truncated importance sampling against vLLM multiplies the surrogates.
"""

from typing import Any

import torch
from trl import GRPOTrainer

from megatron_espo.algo import ESPO, Objective, padded_loss

# Settings of GRPOConfig that change TRL's own loss, with the values that leave it alone.
REQUIRED = {"beta": 0.0, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None}
FORWARD = (
    "pixel_values image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles "
    "image_sizes token_type_ids mm_token_type_ids image_position_ids"
).split()


class ESPOTrainer(GRPOTrainer):
    """GRPOTrainer with ESPO, or another objective of ``megatron_espo.algo``, as its loss."""

    def __init__(self, *args: Any, objective: Objective | None = None, **kwargs: Any) -> None:
        self.objective, self._scored = objective or ESPO(), []
        super().__init__(*args, **kwargs)
        wrong = [name for name, value in REQUIRED.items() if getattr(self.args, name) != value]
        if wrong or self._entropy_bonus_enabled or self.aux_loss_enabled:
            raise ValueError(f"expected {REQUIRED} and no auxiliary loss (wrong: {wrong})")

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any):
        found = super()._get_per_token_logps_and_entropies(
            *args, **kwargs | {"compute_entropy": True}
        )
        if not torch.is_grad_enabled():
            self._scored.append(found)
        return found

    def _generate_and_score_completions(self, inputs):
        self._scored.clear()
        output = super()._generate_and_score_completions(inputs)
        for logps, entropies, _ in self._scored:
            if logps is output.get("old_per_token_logps"):
                output["old_entropies"] = entropies
        self._scored.clear()
        return output

    def _compute_loss(self, model, inputs):
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            mask.shape[1],
            **{name: inputs.get(name) for name in FORWARD},
        )
        mode = "train" if self.model.training else "eval"
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        output = padded_loss(
            self.objective,
            logps,
            inputs.get("old_per_token_logps", logps),
            inputs.get("old_entropies", entropies),
            inputs["advantages"],
            mask,
            vocab_size=model.config.get_text_config().vocab_size,
            num_responses=len(mask) * steps,  # the trainer averages the gradients of the ranks
            correction=inputs.get("importance_sampling_ratio"),
        )
        count = mask.sum().clamp(min=1)
        for name, values in (("entropy", entropies), ("no_gradient", output.no_gradient)):
            mean = (values.detach() * mask).sum() / count
            self._metrics[mode][name].append(self.accelerator.gather(mean).mean().item())
        return output.loss
