"""A plain Megatron-Core training script with ESPO as its loss.

    python examples/existing_megatron_script.py
    torchrun --nproc-per-node 2 examples/existing_megatron_script.py    # TP 2, the same numbers

Model, DDP, optimizer and the call of Megatron's schedule are plain Megatron-Core. Comments with
"ESPO" mark what megatron_espo adds: group_advantages -> TrainSequence -> pack -> make_forward_step.
The model is tiny and random and samples its own responses. The reward is the share of even token
ids in a response.
"""

import os

import torch
import torch.distributed as dist

from megatron_espo.distributed import cpu

cpu.install()  # before megatron is imported; only machines without CUDA need it

from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

# ESPO
from megatron_espo import (
    PackingSpec,
    TrainSequence,
    batch_totals,
    group_advantages,
    make_forward_step,
    pack,
)
from megatron_espo.config import Algorithm
from megatron_espo.megatron.attention import PackedDotProductAttention  # without Transformer Engine
from megatron_espo.megatron.model import use_transformer_engine

VOCAB, PROMPT, RESPONSE = 64, 4, 16  # token ids, tokens, tokens
PROMPTS, GROUP, STEPS, SEED = 8, 8, 20, 1


def initialize() -> None:
    """Make one tensor-parallel group of this process, or of all processes of torchrun."""
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **alone)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    tensor_parallel.model_parallel_cuda_manual_seed(SEED)
    # Same seed on all ranks: with use_cpu_initialization, each rank takes its shard of one matrix.
    torch.manual_seed(SEED)


def build_model() -> DistributedDataParallel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=dist.get_world_size(),
        calculate_per_token_loss=True,  # ESPO: the schedule must not rescale the loss
        finalize_model_grads_func=finalize_model_grads,
    )
    if use_transformer_engine("auto"):
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec()
        # ESPO: Megatron's local attention refuses packed sequences.
        spec.submodules.self_attention.submodules.core_attention = PackedDotProductAttention
    model = GPTModel(config, spec, VOCAB, PROMPT + RESPONSE, position_embedding_type="rope").cuda()
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model)


@torch.no_grad()
def sample(model, tokens: torch.Tensor, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Continue ``tokens [responses, PROMPT]``.

    Returns:
        Response ids and their log-probs, each ``[responses, RESPONSE]``.
    """
    logprobs = []
    for _ in range(RESPONSE):
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        shard = model(tokens, positions, None)[:, -1]
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(shard)
        every = logits.float().log_softmax(-1)
        # On the CPU with one seed, every rank draws the same tokens.
        chosen = torch.multinomial(every.exp().cpu(), 1, generator=draw).to(tokens.device)
        tokens = torch.cat([tokens, chosen], dim=1)
        logprobs.append(every.gather(1, chosen))
    return tokens[:, PROMPT:], torch.cat(logprobs, dim=1)


def main() -> None:
    initialize()
    model = build_model()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=3e-3, weight_decay=0.0, clip_grad=1.0), [model]
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    forward_step = make_forward_step(Algorithm(), groups=groups, vocab_size=VOCAB)  # ESPO
    spec = PackingSpec(512, groups.dp.rank(), groups.dp.size())  # ESPO: tokens, rank, ranks
    draw = torch.Generator().manual_seed(SEED)
    for step in range(1, STEPS + 1):
        prompts = torch.randint(VOCAB, (PROMPTS, PROMPT), generator=draw)
        prompts = prompts.repeat_interleave(GROUP, 0)
        responses, logprobs = sample(model, prompts.to(torch.cuda.current_device()), draw)
        rewards = (responses % 2 == 0).float().mean(1).cpu()

        advantages = group_advantages(rewards.view(PROMPTS, GROUP)).flatten()  # ESPO, from here
        columns = (prompts, responses, logprobs, advantages)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        sequences = [TrainSequence(*row) for row in rows]
        counts = {"num_responses": len(sequences), "num_response_tokens": responses.numel()}
        totals = batch_totals(sequences, **counts)
        micro_batches = pack(sequences, totals, spec)  # to here

        model.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,  # ESPO
            data_iterator=iter(micro_batches),
            model=model,
            num_microbatches=len(micro_batches),
            seq_length=512,
            micro_batch_size=1,
            forward_only=False,
        )
        _, grad_norm, _ = optimizer.step()
        if dist.get_rank() == 0:
            reward = rewards.mean()
            print(f"step {step:2d}  reward {reward:.4f}  grad norm {grad_norm:.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
