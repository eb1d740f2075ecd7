"""Settings of what is asked and how it is judged."""

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from megatron_espo.config import rules
from megatron_espo.config.section import Section


class Data(Section):
    """The questions."""

    prompts: str = Field(
        min_length=1,
        description="reasoning_gym:<task>, or a *.jsonl or *.parquet file (path from the current directory).",
    )
    task_args: dict[str, Any] = Field(default_factory=dict, description="Arguments of the reasoning_gym task.")
    system_prompt: str | None = Field(None, description="System message put before every prompt; null for none.")
    shuffle: bool = Field(True, description="New prompt order each epoch (from run.seed); false keeps the file's.")

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from rules.data(self)


class Eval(Section):
    """Held-out prompts: judged every so many steps of a run, and by ``megatron-espo eval``."""

    prompts: str | None = Field(
        None, min_length=1, description="As data.prompts; null: no evaluation in training, and `eval` takes data.prompts."
    )
    task_args: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of the reasoning_gym task; give it a seed other than data's."
    )
    max_prompts: int | None = Field(None, ge=1, description="Only the first so many prompts; null: all.")
    every: int = Field(10, ge=1, description="Evaluate after so many steps, and after the last one.")
    samples: int = Field(4, ge=1, description="Responses to each prompt: the k of avg@k and the largest k of pass@k.")
    temperature: float | None = Field(
        None, ge=0, description="Sampling temperature; 0: greedy, with samples 1; null: rollout.temperature."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling in evaluations.")
    max_response_tokens: int | None = Field(
        None, ge=1, description="Longest response, in tokens; null: rollout.max_response_tokens."
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from rules.evaluation(self)


class Environment(Section):
    """What turns a prompt into a trajectory of one or several turns."""

    name: str = Field(
        "single_turn", min_length=1, description="single_turn, tool, verifiers:<id>, or your module:Class."
    )
    args: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of that class.")
    max_concurrent: int = Field(4096, ge=1, description="Most trajectories at the same time.")
    timeout_s: float | None = Field(
        None, gt=0, description="Seconds for one trajectory, after which it failed; null: no limit."
    )
    retries: int = Field(
        1, ge=0, description="Further attempts at a trajectory whose environment failed; then it counts as one without a reward."
    )


class Reward(Section):
    """The verifier, run in processes that can be killed."""

    function: str = Field(
        "auto",
        min_length=1,
        description="auto (fits data.prompts), reasoning_gym, math_verify, or your module:function.",
    )
    timeout_s: float = Field(
        10.0, gt=0, description="Seconds for one response; then the verifier is killed and the response left out."
    )
    memory_gib: float = Field(4.0, gt=0, description="Most memory of one verifier process, in GiB.")
    isolate: bool = Field(
        True,
        description="Verifiers have no network, write to a temporary folder only (their working directory and home), and leave no process "
        "behind, where the kernel grants it; false for one that asks a server.",
    )
    environment: tuple[str, ...] = Field(
        (), strict=False, description="Environment variables that verifiers see, such as the key of a server; the others stay hidden."
    )
    max_failed: float = Field(
        0.5, ge=0, le=1, description="Largest share of a step's responses that may go unjudged (no advantage, no gradient) before the run ends."
    )
    overlong_buffer_tokens: int | None = Field(
        None,
        ge=1,
        description="DAPO's soft overlong penalty: rewards fall over the last so many tokens before the limit.",
    )
    overlong_penalty: float = Field(1.0, gt=0, description="What a response at the length limit loses by it.")
    workers: int = Field(2, ge=1, description="Verifier processes on each node; each takes one CPU core.")

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from rules.reward(self)
