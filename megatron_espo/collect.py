"""Rank 0's side of a step: prompts -> engine -> rewards; every rank receives the scored rollouts."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_espo.batch import ScoredGroups
from megatron_espo.config import Config
from megatron_espo.data.prompts import PromptStream
from megatron_espo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_espo.errors import InputError
from megatron_espo.mcore.runtime import Runtime
from megatron_espo.progress import Phases
from megatron_espo.rewards import RewardPool
from megatron_espo.rollout import Engine, EngineConfig, resolve_transport


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
        self.tokenizer: Tokenizer | None = None
        if not runtime.is_main:
            return
        rollout = config.rollout
        self.tokenizer = tokenizer = load_tokenizer(config.model.tokenizer or config.model.path, config.model.path)
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
                transport=resolve_transport(rollout.transport),
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
            ),
            tokenizer.decode,
        ).start()

    def collect(self, step: int, phases: Phases) -> ScoredGroups:
        """Sample and judge one rollout batch. Collective over all ranks: one object broadcast from rank 0."""
        box: list[ScoredGroups | None] = [None]
        if self.runtime.is_main:
            box[0] = self._sample_and_judge(step, phases)
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def close(self) -> None:
        """End the engine and the reward workers."""
        if self.engine is not None:
            self.engine.close()
            self._rewards.close()

    def _sample_and_judge(self, step: int, phases: Phases) -> ScoredGroups:
        """One batch; with dynamic sampling, groups of equal rewards give way to other prompts' that have some to learn from."""
        wanted = self.config.rollout.prompts_per_step
        best = self._sample_round(wanted, step, 0, phases)
        for round_number in range(1, self.config.rollout.max_resampling_rounds + 1):
            missing = int((~best.vary).sum())
            if not missing:
                break
            best = _replace_equal(best, self._sample_round(missing, step, round_number, phases))
        if bool(best.rewards.isnan().all()):
            raise InputError(
                f"reward.function: expected a number for each response, but all {best.rewards.numel()} of step {step} failed; "
                f"the last one: {self._rewards.last_failure}"
            )
        return best

    def _sample_round(self, count: int, step: int, round_number: int, phases: Phases) -> ScoredGroups:
        rollout, steps = self.config.rollout, self.config.run.steps
        prompts = self._stream.take(count)
        with phases.phase("rollout", step, steps) as on_progress:
            # A seed of its own for every step and round: rerunning a run gives the same rollouts.
            seed = self.config.run.seed * 1_000_003 + step + (round_number << 40)
            groups = self.engine.generate(prompts, rollout.group_size, seed=seed, on_progress=on_progress)
        with phases.phase("reward", step, steps) as on_progress:
            items = [(sample.prompt, sample.text) for group in groups for sample in group]
            scores = self._rewards.score(items, on_progress)
        rewards = torch.tensor([float("nan") if score is None else score for score in scores])
        return ScoredGroups(groups, rewards.view(len(groups), rollout.group_size))


def _replace_equal(groups: ScoredGroups, others: ScoredGroups) -> ScoredGroups:
    """Put those of ``others`` whose rewards vary in the place of groups whose rewards do not."""
    places, found = (~groups.vary).nonzero()[:, 0].tolist(), others.vary.nonzero()[:, 0].tolist()
    rollouts, rewards = list(groups.rollouts), groups.rewards.clone()
    pairs = list(zip(places, found, strict=False))
    for place, number in pairs:
        rollouts[place], rewards[place] = others.rollouts[number], others.rewards[number]
    return ScoredGroups(rollouts, rewards, groups.replaced + len(pairs))
