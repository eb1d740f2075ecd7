"""One update by verl's FSDP engine class, on the CPU; runs in verl's environment.

The engine scores the old policy, the weights change, and two micro-batches are trained through the
loss function that verl's worker imports. Only the setup of the engine (FSDP, devices) is skipped.
Arguments: the model's folder, and the file that gets the batch, weights and gradients.
"""

import os
import sys
from functools import partial
from types import SimpleNamespace

import torch

os.environ["VERL_USE_EXTERNAL_MODULES"] = "examples.integrations.verl_espo"
from tensordict import TensorDict
from transformers import AutoModelForCausalLM
from verl.utils import tensordict_utils
from verl.workers import engine_workers
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.utils.padding import response_from_nested

folder, out = sys.argv[1:]
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
transformer_impl.get_device_id = transformer_impl.get_device_name = lambda: "cpu"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
Engine = transformer_impl.FSDPEngineWithLMHead
engine = Engine.__new__(Engine)
vars(engine).update(
    module=model,
    ulysses_device_mesh=None,
    ulysses_sequence_parallel_size=1,
    use_ulysses_sp=False,
    pad_to_length=False,
    scaler=None,
    _autocast_dtype=torch.float64,
    engine_config=SimpleNamespace(entropy_checkpointing=False, strategy="fsdp"),
)

draw = torch.Generator().manual_seed(5)
sizes = [(3, 9), (5, 6), (2, 12), (4, 1)]
vocab = model.config.vocab_size
rows = [torch.randint(4, vocab, (prompt + response,), generator=draw) for prompt, response in sizes]
prompts = [row[:prompt] for row, (prompt, _) in zip(rows, sizes, strict=True)]
responses = [row[prompt:] for row, (prompt, _) in zip(rows, sizes, strict=True)]
masks = [torch.ones_like(response) for response in responses]
masks[1][2:4] = 0
advantages = [torch.full((n,), a) for (_, n), a in zip(sizes, [1.0, -0.7, 0.4, -1.2], strict=True)]
loss_masks = [torch.cat([prompt * 0, mask]) for prompt, mask in zip(prompts, masks, strict=True)]
lists = {
    "prompts": prompts,
    "responses": responses,
    "input_ids": rows,
    "position_ids": [torch.arange(len(row)) for row in rows],
    "response_mask": masks,
    "loss_mask": loss_masks,
    "advantages": advantages,
}
nested = partial(torch.nested.as_nested_tensor, layout=torch.jagged)
data = TensorDict({name: nested(values) for name, values in lists.items()}, batch_size=len(rows))
tensordict_utils.assign_non_tensor(
    data,
    use_remove_padding=False,
    use_dynamic_bsz=False,
    use_fused_kernels=False,
    micro_batch_size_per_gpu=2,
    temperature=0.7,
    calculate_entropy=True,
    global_batch_size=6,
)
scored = engine.forward_backward_batch(data, None, forward_only=True)["model_output"]
data["old_log_probs"] = response_from_nested(scored["log_probs"], data["response_mask"])
data["entropy"] = response_from_nested(scored["entropy"], data["response_mask"])
old = {name: values.clone() for name, values in model.state_dict().items()}
with torch.no_grad():
    for p in model.parameters():
        p += 0.01 * torch.randn(p.shape, generator=draw)
config = FSDPActorConfig(
    rollout_n=1,
    ppo_micro_batch_size_per_gpu=2,
    policy_loss=PolicyLossConfig(loss_mode="espo"),
    model_config=SimpleNamespace(hf_config=model.config),
)
engine.forward_backward_batch(data, partial(engine_workers.ppo_loss, config=config))
gradients = {name: p.grad for name, p in model.named_parameters()}
torch.save(lists | {"old": old, "new": model.state_dict(), "gradients": gradients}, out)
