"""Rank 0's side of a step: prompts -> engine -> rewards; every rank receives the scored rollouts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_espo.config import Config
from megatron_espo.data.prompts import PromptStream
from megatron_espo.data.tokenizer import load_tokenizer
from megatron_espo.errors import InputError
from megatron_espo.mcore.runtime import Runtime
from megatron_espo.progress import Phases
from megatron_espo.rewards import RewardPool
from megatron_espo.rollout import Engine, EngineConfig, EngineError, resolve_transport
from megatron_espo.types import Prompt, Rollout


@dataclass(frozen=True)
class ScoredGroups:
    """A step's rollouts: ``rollouts[prompt][sample]`` and ``rewards [prompts, group_size]`` float32, NaN where the verifier failed."""

    rollouts: list[list[Rollout]]
    rewards: torch.Tensor


class Collector:
    """The prompt stream, the rollout engine and the reward workers. They live on rank 0; other ranks hold ``None``.

    Data and reward function are checked here, before any rank builds its model; the engine starts in the background meanwhile.

    Args:
        config: the run's configuration.
        hf_config: the model's ``config.json``.
        runtime: this rank's place.

    Raises:
        InputError: bad rows, tokenizer or reward function (rank 0).
    """

    def __init__(self, config: Config, hf_config: dict[str, Any], runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.engine: Engine | None = None
        if not runtime.is_main:
            return
        rollout = config.rollout
        tokenizer = load_tokenizer(config.model.tokenizer or config.model.path, config.model.path)
        max_model_len = rollout.max_model_len or hf_config["max_position_embeddings"]
        self._stream = PromptStream(
            config.data,
            tokenizer,
            config.run.seed,
            max_response_tokens=rollout.max_response_tokens,
            max_model_len=max_model_len,
        )
        self._rewards = RewardPool(config.reward)
        self._rewards.start()
        self.engine = Engine(
            EngineConfig(
                model=config.model.path,
                log_path=str(Path(config.run.dir, "engine.log")),
                dtype=config.model.dtype if rollout.dtype == "auto" else rollout.dtype,
                transport=resolve_transport(rollout.transport, rollout.visible_devices),
                max_response_tokens=rollout.max_response_tokens,
                eos_ids=tokenizer.eos_ids,
                max_model_len=max_model_len,
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                top_k=rollout.top_k,
                seed=config.run.seed,
                tensor_parallel_size=rollout.tensor_parallel_size,
                gpu_memory_utilization=rollout.gpu_memory_utilization,
                cpu_kv_cache_gib=rollout.cpu_kv_cache_gib,
                timeout_s=rollout.timeout_s,
                start_timeout_s=rollout.timeout_s,
                visible_devices=rollout.visible_devices,
            ),
            tokenizer.decode,
        ).start()

    def canary(self) -> list[Prompt]:
        """The first prompts of the stream on rank 0, which does not move on; none elsewhere."""
        if not self.runtime.is_main:
            return []
        state = self._stream.state_dict()
        prompts = self._stream.take(self.config.rollout.canary_prompts)
        self._stream.load_state_dict(state)
        return prompts

    def collect(self, step: int, phases: Phases, recover: Callable[[], None]) -> ScoredGroups:
        """Sample and judge one rollout batch. Collective over all ranks: one object broadcast from rank 0.

        Args:
            recover: called on every rank when the engine failed; it brings it back (``WeightSync.recover``), and the same
                prompts are sampled again, ``rollout.max_restarts`` times.
        """
        prompts = self._stream.take(self.config.rollout.prompts_per_step) if self.runtime.is_main else []
        for restarts in range(self.config.rollout.max_restarts + 1):
            box: list[ScoredGroups | str] = [""]
            if self.runtime.is_main:
                try:
                    box[0] = self._sample_and_judge(step, prompts, phases)
                except EngineError as error:
                    box[0] = str(error)
            dist.broadcast_object_list(box, src=0)
            if isinstance(box[0], ScoredGroups):
                return box[0]
            if restarts < self.config.rollout.max_restarts:
                if self.runtime.is_main:
                    print(f"warning: {box[0]}\nrestarting the rollout engine", flush=True)
                recover()
        raise EngineError(f"{box[0]}\ngave up after {restarts} engine restarts")

    def close(self) -> None:
        """End the engine and the reward workers."""
        if self.engine is not None:
            self.engine.close()
            self._rewards.close()

    def _sample_and_judge(self, step: int, prompts: list[Prompt], phases: Phases) -> ScoredGroups:
        rollout, steps = self.config.rollout, self.config.run.steps
        with phases.phase("rollout", step, steps) as on_progress:
            # A seed of its own for every step: rerunning a run gives the same rollouts.
            seed = self.config.run.seed * 1_000_003 + step
            groups = self.engine.generate(prompts, rollout.group_size, seed=seed, on_progress=on_progress)
        with phases.phase("reward", step, steps) as on_progress:
            items = [(sample.prompt, sample.text) for group in groups for sample in group]
            scores = self._rewards.score(items, on_progress)
        if all(score is None for score in scores):
            raise InputError(
                f"reward.function: expected a number for each response, but all {len(scores)} of step {step} failed; "
                f"the last one: {self._rewards.last_failure}"
            )
        rewards = torch.tensor([float("nan") if score is None else score for score in scores])
        return ScoredGroups(groups, rewards.view(len(groups), rollout.group_size))
