"""Megatron's DDP, optimizer, learning-rate schedule and one optimizer step through its pipeline schedule."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_espo.data.packing import MicroBatch
from megatron_espo.mcore.guards import SpikeGuard

Tick = Callable[[], None]


def _no_tick() -> None:
    pass


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Attributes:
        grad_norm: global gradient norm before clipping; NaN where it is not finite.
        lr: learning rate used.
        metrics: the last stage's, per micro-batch.
        refused: why no rank changed a weight; ``None``: the step was taken.
    """

    grad_norm: float
    lr: float
    metrics: list[dict[str, torch.Tensor]]
    refused: str | None = None


class Policy:
    """The trained model: Megatron's chunks under DDP with optimizer and schedule.

    Args:
        chunks: from :func:`megatron_espo.mcore.model.build_model`, weights loaded.
        groups: Megatron's ``ProcessGroupCollection``.
        settings: the ``optimizer`` section of the configuration.
        train_steps: optimizer steps of the whole run, the default length of the decay.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], groups, settings, train_steps: int) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        self.config = chunks[0].config
        self.groups = groups
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=settings.use_distributed_optimizer, grad_reduce_in_fp32=True
        )
        self.chunks = [DistributedDataParallel(self.config, ddp, chunk, pg_collection=groups) for chunk in chunks]
        adam = {name: getattr(settings, name) for name in ("lr", "min_lr", "weight_decay", "clip_grad", "use_distributed_optimizer")}
        adam |= {name: getattr(settings, name) for name in ("adam_beta1", "adam_beta2", "adam_eps")}
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", bf16=self.config.bf16, params_dtype=self.config.params_dtype, **adam), self.chunks
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.lr_warmup_iters,
            lr_decay_steps=max(settings.lr_decay_iters or train_steps, settings.lr_warmup_iters + 1),
            lr_decay_style=settings.lr_decay_style,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=train_steps,
            wd_incr_style="constant",
            # A run that goes on follows its configuration: a checkpoint only tells how far it is.
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        self.spikes = SpikeGuard(settings.spike_factor, settings.spike_window)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads

    def run(self, forward_step, micro_batches: Sequence[MicroBatch], tick: Tick, **options) -> list:
        """Megatron's own schedule over ``micro_batches``; the last stage's list of what the loss function reported.

        ``tick`` is called before each micro-batch's forward.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        iterators = [_ticking(micro_batches, tick) for _ in self.chunks]
        # Pipeline stages exchange tensors of this one shape; without a pipeline it is not used.
        rows, length = map(max, zip(*(batch.tokens.shape for batch in micro_batches), strict=True))
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=length * self.groups.cp.size(),
            micro_batch_size=rows,
            **options,
        )

    def backward(self, forward_step, micro_batches: Sequence[MicroBatch], tick: Tick = _no_tick) -> list[dict[str, torch.Tensor]]:
        """Forward and backward; leaves the finished gradient in DDP's ``main_grad``. Collective over all ranks."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self.run(forward_step, micro_batches, tick, forward_only=False)

    def grad_norm(self) -> float:
        """After :meth:`backward`, the global gradient norm by which Megatron clips; the same on every rank. Collective."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """After :meth:`backward`, make the gradient whole on every data-parallel rank: one all-gather for each of DDP's buckets.

        The distributed optimizer reduce-scatters it and needs no more than a shard; a look at it does.
        """
        if not self.chunks[0].ddp_config.use_distributed_optimizer:
            return
        for chunk in self.chunks:
            for bucket_group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                group = bucket_group.intra_distributed_optimizer_instance_group
                for bucket in bucket_group.buckets:
                    shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)

    def step(self, forward_step, micro_batches: Sequence[MicroBatch], tick: Tick = _no_tick) -> StepResult:
        """One optimizer step; or none on any rank, if one rank's gradient is not finite or the norm is a spike. Collective over all ranks."""
        metrics = self.backward(forward_step, micro_batches, tick)
        lr = self.optimizer.param_groups[0]["lr"]
        bad_rank = self._vote_finite()
        if bad_rank is not None:
            return StepResult(float("nan"), lr, metrics, f"expected finite values, got NaN or infinity first on rank {bad_rank}")
        if self.spikes.factor is not None:
            norm = self.grad_norm()
            if spike := self.spikes.refuse(norm):
                return StepResult(norm, lr, metrics, spike)
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        return StepResult(float(grad_norm), lr, metrics)

    @torch.no_grad()
    def score(self, forward_step, micro_batches: Sequence[MicroBatch], tick: Tick = _no_tick) -> list:
        """Forward only: ``[2, response_tokens]`` log-probs and entropies of each micro-batch on the last pipeline stage, ``[]`` elsewhere."""
        return self.run(forward_step, micro_batches, tick, forward_only=True, collect_non_loss_data=True)

    def _vote_finite(self) -> int | None:
        """The first rank whose gradient is not finite; the same answer on all ranks. One all-reduce of an integer."""
        # A norm clip does not see NaN (nan > x is False), so without the vote one bad rank would poison every weight.
        buffers = [buffer for chunk in self.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
        finite = torch.stack([buffer.grad_data.sum().isfinite() for buffer in buffers]).all()
        vote = torch.where(finite, dist.get_world_size(), dist.get_rank()).to(torch.int64)
        dist.all_reduce(vote, op=dist.ReduceOp.MIN)
        return int(vote) if int(vote) < dist.get_world_size() else None


def _ticking(micro_batches: Sequence[MicroBatch], tick: Tick) -> Iterator[MicroBatch]:
    for batch in micro_batches:
        tick()
        yield batch
