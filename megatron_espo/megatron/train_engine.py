"""Megatron's DDP, optimizer and learning-rate schedule, and one optimizer step through them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_espo.data.packing import MicroBatch
from megatron_espo.errors import InputError
from megatron_espo.megatron.guards import SpikeGuard
from megatron_espo.megatron.overrides import OPTIMIZER_SETTINGS, check_overrides

Tick = Callable[[], object]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Attributes:
        grad_norm: global gradient norm before clipping; NaN if it is not finite.
        lr: learning rate.
        metrics: of each micro-batch, on the last pipeline stage.
        skipped: why no rank changed its weights; ``None``: the step was taken.
    """

    grad_norm: float
    lr: float
    metrics: list[dict[str, torch.Tensor]]
    skipped: str | None = None


class TrainEngine:
    """Megatron's chunks under DDP, with optimizer and schedule.

    Args:
        chunks: from :func:`megatron_espo.megatron.model.build_model`, weights loaded.
        groups: Megatron's ``ProcessGroupCollection``.
        settings: the ``optimizer`` section of the configuration.
        train_steps: optimizer steps of the whole run, the length of the decay.
        overrides: ``megatron.overrides`` of the configuration.
        updates_per_step: optimizer steps between two calls of :meth:`gather_weights`.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        groups: Any,
        settings: Any,
        train_steps: int,
        overrides: Mapping[str, Any] | None = None,
        updates_per_step: int = 1,
    ) -> None:
        from megatron.core import distributed
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        self.config: Any = chunks[0].config
        self.groups = groups
        is_sharded, has_cuda = settings.use_distributed_optimizer, torch.cuda.is_available()
        _, of_ddp, of_optimizer = check_overrides(overrides or {}, {})
        # NCCL reduces gradients while backward runs. gloo has no streams to overlap.
        overlap = of_ddp.get("overlap_grad_reduce", has_cuda)
        ddp_settings = {
            "use_distributed_optimizer": is_sharded,
            "grad_reduce_in_fp32": True,
            "overlap_grad_reduce": overlap,
            # Weights are gathered during the next step's forward. After the last step they are read
            # at once: there is nothing to overlap.
            "overlap_param_gather": overlap and has_cuda and is_sharded and updates_per_step > 1,
        }
        ddp_config = distributed.DistributedDataParallelConfig(**ddp_settings | of_ddp)
        if ddp_config.overlap_param_gather and not (is_sharded and overlap):
            raise InputError(
                "megatron.overrides.overlap_param_gather: expected false without "
                "optimizer.use_distributed_optimizer and overlap_grad_reduce, got true"
            )
        ddp = distributed.DistributedDataParallel
        self.chunks = [ddp(self.config, ddp_config, c, pg_collection=groups) for c in chunks]
        if overlap:
            # The schedule reduces gradients in the backward of the last micro-batch only.
            no_sync = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        adam = OptimizerConfig(
            bf16=self.config.bf16,
            params_dtype=self.config.params_dtype,
            **{name: getattr(settings, name) for name in OPTIMIZER_SETTINGS}
            | {"overlap_param_gather": ddp_config.overlap_param_gather}
            | of_optimizer,
        )
        self.optimizer = get_megatron_optimizer(adam, self.chunks)
        warmup = settings.lr_warmup_iters
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=warmup,
            lr_decay_steps=max(train_steps, warmup + 1),
            lr_decay_style=settings.lr_decay_style,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=train_steps,
            wd_incr_style="constant",
            # A continued run follows its configuration. A checkpoint has only the step count.
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        self.spikes = SpikeGuard(settings.spike_factor)
        self.config.finalize_model_grads_func = distributed.finalize_model_grads

    def gather_weights(self) -> None:
        """After the last :meth:`step`, complete the weights on every data-parallel rank.

        Collective over data-parallel ranks with ``overlap_param_gather``, which leaves this
        all-gather to the next forward.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def buffers(self) -> list[Any]:
        """Return DDP's buffers of all chunks, those of the experts included."""
        return [b for chunk in self.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]

    def run(
        self, forward_step: Callable, micro_batches: Sequence[MicroBatch], tick: Tick, scores: bool
    ) -> list:
        """Run Megatron's schedule over ``micro_batches``. Collective over all ranks.

        Args:
            tick: called before each micro-batch's forward, of this rank's first chunk.
            scores: forward only, and without the loss.

        Returns:
            On the last pipeline stage what the loss function reported for each micro-batch.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        # The shape of the tensors between pipeline stages. Without a pipeline it is not used.
        rows, length = map(max, zip(*(batch.tokens.shape for batch in micro_batches), strict=True))
        ticks = [tick] + [int] * (len(self.chunks) - 1)  # each chunk takes every micro-batch
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[_ticking(micro_batches, t) for t in ticks],
            model=self.chunks,
            num_microbatches=len(micro_batches),
            seq_length=length * self.groups.cp.size(),
            micro_batch_size=rows,
            forward_only=scores,
            collect_non_loss_data=scores,
        )

    def backward(
        self, forward_step: Callable, micro_batches: Sequence[MicroBatch], tick: Tick = int
    ) -> list[dict[str, torch.Tensor]]:
        """Run forward and backward; DDP's ``main_grad`` has the gradient. Collective: all ranks."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self.run(forward_step, micro_batches, tick, scores=False)

    def grad_norm(self) -> float:
        """After :meth:`backward`, return the global gradient norm by which Megatron clips.

        It is the same on every rank. Collective over all ranks.
        """
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """After :meth:`backward`, complete the gradient on every data-parallel rank.

        The distributed optimizer, which must be in use, reduce-scatters gradients: each rank has a
        shard of the sum. To inspect them takes one all-gather for each of DDP's buckets.
        """
        for chunk in self.chunks:
            for bucket_group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                group = bucket_group.intra_distributed_optimizer_instance_group
                for bucket in bucket_group.buckets:
                    shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)

    def step(
        self, forward_step: Callable, micro_batches: Sequence[MicroBatch], tick: Tick = int
    ) -> StepResult:
        """Take one optimizer step on all ranks, or on none. Collective over all ranks.

        The step is skipped if any rank's gradient is not finite or the norm is a spike.
        """
        metrics = self.backward(forward_step, micro_batches, tick)
        lr = self.optimizer.param_groups[0]["lr"]
        bad_rank = self._first_bad_rank()
        if bad_rank is not None:
            why = f"expected finite values, got NaN or infinity first on rank {bad_rank}"
            return StepResult(float("nan"), lr, metrics, why)
        if self.spikes.factor is not None:
            norm = self.grad_norm()
            if spike := self.spikes.check(norm):
                return StepResult(norm, lr, metrics, spike)
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        return StepResult(float(grad_norm), lr, metrics)

    @torch.no_grad()
    def score(
        self, forward_step: Callable, micro_batches: Sequence[MicroBatch], tick: Tick = int
    ) -> list[torch.Tensor]:
        """Run forward only. Collective over all ranks.

        Returns:
            On the last pipeline stage ``[2, response_tokens]`` log-probs and entropies of each
            micro-batch; ``[]`` elsewhere.
        """
        return self.run(forward_step, micro_batches, tick, scores=True)

    def _first_bad_rank(self) -> int | None:
        """Return, on all ranks, the first rank with a non-finite gradient. One all-reduce."""
        # Clipping does not detect NaN (nan > x is False): one bad rank would spoil every weight.
        finite = torch.stack([b.grad_data.sum().isfinite() for b in self.buffers()]).all()
        vote = torch.where(finite, dist.get_world_size(), dist.get_rank()).to(torch.int64)
        dist.all_reduce(vote, op=dist.ReduceOp.MIN)
        return int(vote) if int(vote) < dist.get_world_size() else None


def _ticking(micro_batches: Sequence[MicroBatch], tick: Tick) -> Iterator[MicroBatch]:
    for batch in micro_batches:
        tick()
        yield batch
