"""Settings of prompts, environments, rewards, judges and evaluations."""

import re
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from megatron_espo.config.rollout import LOWEST_TEMPERATURE
from megatron_espo.config.rules import Count, Items, Problems, Section, Share, Text

FUNCTIONS = ("auto", "reasoning_gym", "math_verify")
_OF_SOURCE = ("prompts", "task_args", "columns", "pass_rate")
# ``reward/<name>`` has another meaning.
METRIC_NAMES = "mean std standard_error equal_groups solved_all solved_none failed".split()


class Source(Section):
    """One source of ``data.mixture``."""

    prompts: Text
    """As data.prompts."""
    weight: NonNegativeFloat = 1.0
    """Share of this source in the prompts, relative to the other weights. 0: not used."""
    task_args: dict[str, Any] = {}
    """As data.task_args."""
    columns: dict[str, str] = {}
    """As data.columns."""
    pass_rate: Items[float] = ()
    """As data.pass_rate."""

    def problems(self) -> Problems:
        yield from _source_problems(self)


class Data(Section):
    """Training prompts."""

    prompts: Text | None = None
    """reasoning_gym:<task>, or a *.jsonl or *.parquet file. Required without mixture."""
    mixture: dict[str, Source] = {}
    """Several sources by name, instead of prompts, task_args, columns and pass_rate, such as
    {math: {prompts: math.parquet, weight: 0.7}, code: {prompts: code.jsonl, weight: 0.3}}. Every
    batch has the prompts of each source by weight, and each source has its own epochs."""
    task_args: dict[str, Any] = {}
    """Arguments of the reasoning_gym task."""
    columns: dict[str, str] = {}
    """Columns of the file, such as {prompt: question, answer: reward_model.ground_truth}. a.b is
    field b of column a. id and metadata for the reward function may be added. Other columns are not
    read. Empty: prompt, answer and id, and all other columns as metadata."""
    pass_rate: Items[float] = ()
    """[low, high]: skip prompts whose column pass_rate (share of correct responses of an earlier
    model; null is kept) lies outside. columns may rename it. Empty: the column is metadata."""
    # Limited, because an epoch without an unsolved prompt is read row by row.
    skip_solved: int = Field(0, ge=0, le=100)
    """Epochs to skip a prompt after all its responses had a reward of at least 1. 0: none."""
    raw: bool = False
    """Prompts are text that the model reads as it is, without the chat template."""
    template_args: dict[str, Any] = {}
    """Arguments of the chat template, such as {enable_thinking: false}."""
    system_prompt: str | None = None
    """System message before every prompt. null adds none."""
    shuffle: bool = True
    """Shuffle the prompts each epoch, from run.seed. false keeps the order of the file."""

    @property
    def sources(self) -> dict[str, Source]:
        """The sources that are used, by the path of their settings."""
        if not self.mixture:
            return {"data": Source(**{key: getattr(self, key) for key in _OF_SOURCE})}
        named = sorted(self.mixture.items())
        return {f"data.mixture.{name}": source for name, source in named if source.weight}

    def problems(self) -> Problems:
        if not self.mixture:
            if self.prompts is None:
                yield self.expect("prompts", "a source of prompts, or data.mixture")
            yield from _source_problems(self)
            return
        for key in _OF_SOURCE:
            if getattr(self, key):
                yield self.expect(key, "none with data.mixture (its sources have their own)")
        if not any(source.weight for source in self.mixture.values()):
            yield self.expect("mixture", "a source with a weight above 0", list(self.mixture))
        for name in self.mixture:
            if name in METRIC_NAMES or not re.fullmatch("[A-Za-z0-9_-]+", name):
                expected = f"letters, digits, _ and - as name, and not {', '.join(METRIC_NAMES)}"
                yield self.expect(f"mixture.{name}", expected, name)


class Eval(Section):
    """Held-out prompts, evaluated during training and by ``megatron-espo eval``."""

    prompts: Text | None = None
    """As data.prompts. null: no evaluation during training, and `eval` uses data.prompts. Required
    for `eval` with data.mixture."""
    task_args: dict[str, Any] = {}
    """Arguments of the reasoning_gym task. Give it another seed than data.task_args."""
    columns: dict[str, str] | None = None
    """As data.columns. null uses data.columns."""
    max_prompts: Count | None = None
    """Use only the first this many prompts. null uses all."""
    every: Count = 10
    """Steps between evaluations. The last step is always evaluated."""
    samples: Count = 4
    """Responses per prompt: the k of avg@k and the largest k of pass@k."""
    temperature: NonNegativeFloat | None = None
    """Temperature, with rollout.top_p and top_k. 0: greedy, with samples 1. null: rollout's."""

    def problems(self) -> Problems:
        yield from _source_problems(self)
        if self.task_args and self.prompts is None:
            yield self.expect("task_args", "none without eval.prompts")
        if self.temperature == 0 and self.samples > 1:
            yield self.expect("samples", "1 with temperature 0 (greedy)")
        if 0 < (self.temperature or 0) < LOWEST_TEMPERATURE:
            expected = f"0 or at least {LOWEST_TEMPERATURE} (vLLM silently raises lower values)"
            yield self.expect("temperature", expected)


class Environment(Section):
    """The environment that turns a prompt into a trajectory of one or several turns."""

    name: Text = "single_turn"
    """single_turn, tool, verifiers:<id>, or your module:Class."""
    args: dict[str, Any] = {}
    """Keyword arguments of the environment."""
    timeout_s: PositiveFloat | None = None
    """Seconds for one trajectory. It is started once more after a failure. null: no limit."""


class Reward(Section):
    """Reward functions, called in worker processes, and how several rewards are added."""

    function: Text = "auto"
    """auto (depends on data.prompts), reasoning_gym, math_verify, or your module:function."""
    terms: dict[str, float] = {}
    """Several rewards and their weights, such as {math_verify: 1, helpful: 0.2}: names as in
    function, and names of judge.prompts. The reward is the weighted sum. Empty: function alone."""
    timeout_s: PositiveFloat = 10.0
    """Seconds for one response. Then the worker is killed and the response gets no reward."""
    memory_gib: PositiveFloat = 4.0
    """Memory limit of one worker process, in GiB."""
    isolate: bool = True
    """Workers have no network, write only to a temporary folder (their working directory and
    home) and leave no process behind, where the kernel allows it. false for a function that
    calls a server."""
    environment: Items[str] = ()
    """Environment variables that workers see, such as a server's key. All others are hidden."""
    max_failed: Share = 0.5
    """The run ends when a larger share of a step's responses gets no reward (no gradient)."""
    overlong_buffer_tokens: Count | None = None
    """DAPO's soft overlong penalty falls to -1 over this many tokens before the length limit."""
    workers: Count = 2
    """Worker processes per node and function. Each uses one CPU core."""

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every reward by its name."""
        return self.terms or {self.function: 1.0}

    def problems(self) -> Problems:
        yield from self.expect_function("function", self.function, *FUNCTIONS)
        if self.terms and self.function != "auto":
            yield self.expect("function", "no value with reward.terms")
        if len({name.rpartition(":")[2] for name in self.terms}) < len(self.terms):
            yield self.expect("terms", "functions with different names", list(self.terms))


class Judge(Section):
    """A model that scores responses, behind an OpenAI-compatible server (/v1/chat/completions)."""

    url: str | None = None
    """Base of its routes, such as https://api.openai.com/v1 or http://host:8000/v1 (vLLM)."""
    model: str | None = None
    """Name of the model on the server."""
    prompts: dict[str, str] = {}
    """Templates by name, for reward.terms: a text with {response}, or the path of a file with one.
    {prompt}, {answer} and {column} of the metadata are replaced too."""
    key: str | None = None
    """Name of the environment variable that has the API key. null sends no key."""
    sampling: dict[str, Any] = {}
    """More fields of the request, such as {temperature: 0, max_tokens: 1024}."""
    pattern: str = r"(?i)score[\s:=*]*(-?\d+(?:\.\d+)?)"
    """Regular expression with one group, the score. The last match in the reply counts."""
    min_score: float = 0.0
    """Score that becomes the reward 0. Lower scores too."""
    max_score: float = 10.0
    """Score that becomes the reward 1. Higher scores too."""
    timeout_s: PositiveFloat = 60.0
    """Seconds for one request."""
    retries: NonNegativeInt = 4
    """More requests after 429, 5xx, no connection, no answer in time or no score in the reply."""
    max_concurrent: Count = 64
    """Most requests at the same time."""
    requests_per_minute: PositiveFloat | None = None
    """Most requests in a minute, evenly spaced. null: no limit."""
    cache: Text | None = None
    """SQLite file of the replies. Several runs may share it. null: judge.sqlite in run.dir."""

    def template(self, name: str) -> str:
        """Return the text of a template. OSError, ValueError: its file cannot be read."""
        text = self.prompts[name]
        return text if "{response}" in text else Path(text).read_text(encoding="utf-8")

    def problems(self) -> Problems:
        if self.url and not self.url.startswith(("http://", "https://")):
            yield self.expect("url", "an address with http:// or https://")
        for name in self.prompts:
            if name in FUNCTIONS or not name.isidentifier():
                yield self.expect("prompts", "names of letters, unlike those of functions", name)
        if self.key is not None and not self.key.isidentifier():  # it may be the key: not shown
            yield "key", "expected the name of an environment variable, got something else"
        for name in self.sampling.keys() & {"model", "messages", "n", "stream"}:
            yield self.expect("sampling", "no model, messages, n or stream", name)
        try:
            groups = re.compile(self.pattern).groups
        except re.error:
            groups = 0
        if groups != 1:
            yield self.expect("pattern", "a regular expression with one group")
        if self.min_score >= self.max_score:
            yield self.expect("min_score", f"less than max_score ({self.max_score:g})")


def _source_problems(settings: Source | Data | Eval) -> Problems:
    prompts, rate = settings.prompts, getattr(settings, "pass_rate", ())
    if prompts is None:
        return
    is_task = prompts.startswith("reasoning_gym:")
    if prompts == "reasoning_gym:" or not (is_task or prompts.endswith((".jsonl", ".parquet"))):
        yield settings.expect("prompts", '"reasoning_gym:<task>", a *.jsonl or a *.parquet file')
    elif settings.task_args and not is_task:
        yield settings.expect("task_args", f'none with a file of prompts ("{prompts}")')
    if rate and (len(rate) != 2 or not 0 <= rate[0] <= rate[1] <= 1):
        yield settings.expect("pass_rate", "[low, high] with 0 <= low <= high <= 1")
    elif rate and is_task:
        yield settings.expect("pass_rate", "none with a reasoning_gym task")
