"""Makes the mistakes of docs/bad_inputs.md and records the error message of each.

python -m tests.support.bad_inputs          writes docs/bad_inputs.md
python -m tests.support.bad_inputs --json   prints the messages, for the test
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_espo import cli
from megatron_espo.config import load_config
from megatron_espo.errors import InputError
from megatron_espo.models.registry import read_spec
from tests.support.model_folder import write_tensors

DOCUMENT = Path(__file__).parents[2] / "docs" / "bad_inputs.md"
HEAD = """\
# User errors and their messages

`python -m tests.support.bad_inputs` makes each mistake and writes this page. Mistakes in settings,
rows and model folder end the run with exit code 2 before torch, Megatron-Core or vLLM loads.
Mistakes in tokenizer, prompt lengths, checkpoints and reward functions end it on rank 0 before the
model loads. One error lists all mistakes of a kind; here each is alone.
"""
HEAVY = ("torch", "megatron.core", "vllm", "transformers")

WORDS = ["<s>", "</s>", "<unk>", "What", "is", "two", "and", "three", "?"]
RUN = """\
model: {path: model}
data: {prompts: prompts.jsonl}
run: {dir: out}
rollout: {max_response_tokens: 64}
"""
SIZES = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 128,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "eos_token_id": 1,
    **SIZES,
}
MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "head_dim": 2,
}
PROMPT = '{"prompt": "What is two and three ?", "answer": "5"}\n'
VOCAB = {word: i for i, word in enumerate(WORDS)}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
TOKENIZER = {
    "version": "1.0",
    "pre_tokenizer": {"type": "Whitespace"},
    "added_tokens": [{"id": 1, "content": "</s>", "special": True, **FLAGS}],
    "model": {"type": "WordLevel", "vocab": VOCAB, "unk_token": "<unk>"},
}
FILES = {
    "run.yaml": RUN,
    "prompts.jsonl": PROMPT,
    "model/config.json": LLAMA,
    "model/tokenizer.json": TOKENIZER,
    "model/tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
    },
}


class Bad:
    """One mistake.

    Attributes:
        what: description.
        overrides: arguments after ``train run.yaml``.
        files: differences from ``FILES``. ``None`` removes a file; a mapping is written as JSON.
        more: lines added to run.yaml.
        ranks: world size.
        check: code that meets the mistake after the settings are read. It raises InputError.
    """

    def __init__(
        self,
        what: str,
        *overrides: str,
        files: dict[str, Any] | None = None,
        more: str = "",
        ranks: int = 1,
        check: Callable[["Bad"], object] | None = None,
    ) -> None:
        self.what, self.overrides, self.files = what, overrides, files or {}
        self.more, self.ranks, self.check = more, ranks, check


def weights(hf_config: dict[str, Any] = LLAMA, **changes: Any) -> bytes:
    """A weight file of the model. ``changes``: shapes by name; ``None`` leaves a tensor out."""
    own = read_spec(hf_config).tensor_shapes
    shapes = {name.replace(".", "_"): name for name in own}
    changed = {shapes.get(name, name): shape for name, shape in changes.items()}
    tensors = own | changed
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        write_tensors(file, {name: shape for name, shape in tensors.items() if shape})
        return file.read_bytes()


def rows(*lines: str) -> dict[str, str]:
    return {"prompts.jsonl": "".join(f"{line}\n" for line in lines)}


def config_json(**changes: Any) -> dict[str, Any]:
    return {"model/config.json": LLAMA | changes}


# -- checks on rank 0 after the settings, in the order of a run ----------------------------------


def find_checkpoint(bad: Bad) -> None:
    """Find a checkpoint, then verify it before loading, as a run does."""
    from megatron_espo.megatron.checkpoint import (
        _checksum,
        model_identity,
        read_manifest,
        verify_files,
    )
    from megatron_espo.trainer.checkpoints import Checkpoints, fingerprint

    good, config = load_config("run.yaml"), load_config("run.yaml", bad.overrides)
    folder = Path("out/checkpoints/step_000002")
    for path in (folder, folder.with_name("step_000001")):
        path.mkdir(parents=True)
        (path / "state.json").write_text(
            json.dumps({"fingerprint": fingerprint(good), "rollouts": {}})
        )
        (path / "weights.distcp").write_bytes(bytes(64))
        files = {file.name: _checksum(file) for file in path.iterdir()}
        (path / "megatron_espo.json").write_text(
            json.dumps({"version": 1, "model": model_identity(read_spec(LLAMA)), "files": files})
        )
    (folder.parent / "latest").write_text("step_000002\n")
    write(
        {
            name.removeprefix("after/"): content
            for name, content in bad.files.items()
            if name.startswith("after/")
        }
    )
    checkpoints = Checkpoints(config)
    spec = read_spec(json.loads(Path("model/config.json").read_text()))
    actor = SimpleNamespace(load=lambda path: verify_files(path, read_manifest(path, spec)))
    checkpoints.load(checkpoints._find(), actor)


def convert_checkpoint(bad: Bad) -> None:
    from megatron_espo.megatron.checkpoint import read_manifest

    Path("mine").mkdir()
    read_manifest("mine", read_spec(LLAMA))


def read_prompts(bad: Bad) -> None:
    from megatron_espo.data import PromptStream, load_tokenizer

    config = load_config("run.yaml", bad.overrides)
    tokenizer = load_tokenizer(config.model.path, config.model.path)
    PromptStream(
        config.data,
        tokenizer,
        1,
        max_response_tokens=config.rollout.max_response_tokens,
        max_model_len=128,
    )


def start_rewards(bad: Bad) -> None:
    from megatron_espo.rewards.pool import RewardPool

    settings = load_config("run.yaml", bad.overrides).reward
    with contextlib.closing(RewardPool(settings, settings.function)) as rewards:
        rewards.start()


def judge_a_step(bad: Bad) -> None:
    from megatron_espo.rollout.http_client import LoopThread
    from megatron_espo.rollout.scorer import Scorer
    from megatron_espo.types import Prompt
    from tests.support.trajectories import single_turn

    prompt, text = Prompt("prompts:1", "", "5", (1,)), "the answer is 5"
    found = single_turn(prompt, [2], [0.0], 0, "stop", text)
    loop = LoopThread()
    config = load_config("run.yaml", bad.overrides)
    with contextlib.closing(loop), contextlib.closing(Scorer(config, None, loop)) as scorer:
        futures = [scorer.submit(found) for _ in range(4)]
        scored = [future.result() for future in futures]
        scorer.check_failures(sum(sample.reward != sample.reward for sample in scored), 4, step=1)


def replay_a_step(bad: Bad) -> None:
    from megatron_espo.data.rollout_store import RolloutLog

    RolloutLog(Path("other/rollouts"), {}).read(1, None)


def replay_without_experts(bad: Bad) -> None:
    """As rank 0 of a run on a mixture of experts."""
    import torch

    from megatron_espo.data.rollout_store import RolloutLog
    from megatron_espo.data.scored_groups import ScoredGroups
    from megatron_espo.monitoring.progress import Phases
    from megatron_espo.trainer.rollout_manager import RolloutManager
    from megatron_espo.types import Prompt
    from tests.support.trajectories import single_turn

    rollouts = [
        [single_turn(Prompt("a", "", "", (3,)), (5,), (-1.0,), 0, "stop", "") for _ in range(2)]
    ]
    log = RolloutLog(Path("other/rollouts"), {})
    log.write(1, ScoredGroups(rollouts, torch.tensor([[0.0, 1.0]]), 1), before={}, after={})
    log.wait()
    runtime = SimpleNamespace(is_main=True, rank=0, world_size=1)
    stop = SimpleNamespace(check=lambda: None)
    manager = RolloutManager(load_config("run.yaml", bad.overrides), read_spec(MOE), runtime, stop)
    manager.source.batch(1, Phases(draw=False))


def in_a_checkpoint(name: str, content: Any) -> dict[str, Any]:
    return {f"after/out/checkpoints/{name}": content}


TABLE: dict[str, list[Bad]] = {
    "Settings": [
        Bad("a missing file", files={"run.yaml": None}),
        Bad("an empty file", files={"run.yaml": "# nothing yet\n"}),
        Bad("a list instead of sections", files={"run.yaml": "- model\n"}),
        Bad("invalid YAML", more="megatron: tensor: 2"),
        Bad("wrong encoding", files={"run.yaml": b"run: {name: caf\xe9}\n"}),
        Bad("a duplicate key", more="optimizer:\n  lr: 1e-6\n  lr: 2e-6"),
        Bad("a misspelt key", more="optimizer:\n  weigth_decay: 0.1"),
        Bad("a key in the wrong section", more="megatron:\n  group_size: 4"),
        Bad("a misspelt section", more="optimiser: {lr: 1e-6}"),
        Bad(
            "a missing required key",
            files={"run.yaml": "model: {}\ndata: {prompts: prompts.jsonl}\n"},
        ),
        Bad("a number in quotes", more='optimizer: {lr: "1e-6"}'),
        Bad("a string instead of a number", "optimizer.lr=fast"),
        Bad("a number instead of a string", "run.dir=2024"),
        Bad("a value out of range", "run.steps=0"),
        Bad("an unknown choice", "algorithm.objective=ppo"),
        Bad("a wrong item in a list", "algorithm.quantiles=[0.5, high]"),
        Bad("an override without a section", "steps=5"),
        Bad("an override that is not YAML", "run.dir=["),
        Bad("one response per prompt", "rollout.group_size=1"),
        Bad("greedy sampling in training", "rollout.temperature=0"),
        Bad("top-p above 1", "rollout.top_p=1.5"),
        Bad("a setting that the objective does not use", "algorithm.clip_high=0.2"),
        Bad("mini-batches of unequal size", "algorithm.num_mini_batches=3"),
        Bad("a warm-up as long as the run", "run.steps=5", "optimizer.lr_warmup_iters=20"),
        Bad(
            "full recomputation without a method",
            "megatron.recompute_granularity=full",
            "megatron.recompute_num_layers=1",
        ),
        Bad("stale rollouts without correction", "rollout.max_staleness=1"),
        Bad("quantized rollouts without correction", "rollout.quantization=fp8"),
        Bad("fp8 with float32 weights", "megatron.fp8=hybrid", "model.dtype=float32"),
        Bad("a response limit as long as the context", "rollout.max_model_len=64"),
        Bad(
            "more prompts in flight than max_staleness allows",
            "rollout.prompts_per_step=8",
            "rollout.max_staleness=1",
            "rollout.over_sampling_prompts=9",
            "algorithm.rollout_correction=token",
        ),
        Bad("an engine argument that is a setting", "rollout.engine_args={dtype: float16}"),
        Bad(
            "sleep with an engine on its own GPUs",
            "rollout.sleep=true",
            'rollout.visible_devices="6,7"',
        ),
        Bad("a host without a port", "rollout.hosts=[10.0.0.5]"),
        Bad("a wildcard address", "rollout.hosts=['0.0.0.0:7700']"),
        Bad("a duplicate host", "rollout.hosts=['10.0.0.5:7700', '10.0.0.5:7700']"),
        Bad(
            "fewer hosts than engines",
            "rollout.hosts=['10.0.0.5:7700']",
            "rollout.engines=2",
            ranks=2,
        ),
        Bad(
            "visible_devices with hosts",
            "rollout.hosts=['10.0.0.5:7700']",
            "rollout.visible_devices='6,7'",
        ),
        Bad(
            "a one-machine transport with hosts",
            "rollout.hosts=['10.0.0.5:7700']",
            "rollout.transport=ipc",
        ),
    ],
    "Layout": [
        Bad(
            "a world size that does not fit the layout",
            "megatron.tensor_model_parallel_size=2",
            ranks=3,
        ),
        Bad(
            "TP does not divide the heads",
            "megatron.tensor_model_parallel_size=2",
            files=config_json(num_attention_heads=3, num_key_value_heads=None, head_dim=2),
            ranks=2,
        ),
        Bad(
            "TP does not divide the key-value heads",
            "megatron.tensor_model_parallel_size=4",
            ranks=4,
        ),
        Bad("PP does not divide the layers", "megatron.pipeline_model_parallel_size=3", ranks=3),
        Bad(
            "PP x VPP does not divide the layers",
            "megatron.pipeline_model_parallel_size=2",
            "megatron.virtual_pipeline_model_parallel_size=2",
            ranks=2,
        ),
        Bad("sequence parallelism without TP", "megatron.sequence_parallel=true"),
        Bad("EP without experts", "megatron.expert_model_parallel_size=2", ranks=2),
        Bad(
            "EP does not divide the experts",
            "megatron.expert_model_parallel_size=4",
            files={"model/config.json": MOE},
            ranks=4,
        ),
        Bad(
            "experts without router replay",
            "rollout.router_replay=false",
            files={"model/config.json": MOE},
        ),
        Bad(
            "more ranks than responses",
            "rollout.prompts_per_step=4",
            "rollout.group_size=2",
            ranks=4,
        ),
        Bad("the engine's TP does not divide the heads", "rollout.tensor_parallel_size=3"),
        Bad(
            "engines do not divide the ranks",
            "rollout.hosts=['a:1', 'b:1']",
            "rollout.engines=2",
            ranks=3,
        ),
        Bad("max_model_len above the model's context", "rollout.max_model_len=4096"),
    ],
    "Model folder": [
        Bad("the name of a hub model", "model.path=Qwen/Qwen3-4B"),
        Bad("no config.json", files={"model/config.json": None}),
        Bad("a damaged config.json", files={"model/config.json": '{"architectures": ['}),
        Bad("an unsupported architecture", files=config_json(architectures=["GPT2LMHeadModel"])),
        Bad(
            "missing sizes",
            files={"model/config.json": {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}},
        ),
        Bad("quantised weights", files=config_json(quantization_config={"bits": 4})),
        Bad("no weights", files={"model/model.safetensors": None}),
        Bad(
            "a Git LFS pointer",
            files={"model/model.safetensors": "version https://git-lfs.github.com/spec/v1\n"},
        ),
        Bad(
            "a missing shard",
            files={
                "model/model.safetensors.index.json": {
                    "weight_map": {"v": "b.safetensors", "w": "model.safetensors"}
                }
            },
        ),
        Bad("a damaged index of shards", files={"model/model.safetensors.index.json": "{}"}),
        Bad("an adapter", files={"model/adapter_config.json": {"r": 8}}),
        Bad(
            "two sets of weights",
            files={
                "model/model-00001-of-00001.safetensors": weights(),
                "model/model.safetensors.index.json": {
                    "weight_map": dict.fromkeys(
                        read_spec(LLAMA).tensor_shapes, "model-00001-of-00001.safetensors"
                    )
                },
            },
        ),
        Bad(
            "shards without an index",
            files={
                "model/model.safetensors": None,
                "model/model-00001-of-00002.safetensors": weights(),
            },
        ),
        Bad("a missing tensor", files={"model/model.safetensors": weights(lm_head_weight=None)}),
        Bad("an unknown tensor", files={"model/model.safetensors": weights(head_bias=(9,))}),
        Bad(
            "a tensor of another size",
            files=config_json(vocab_size=12)
            | {
                "model/model.safetensors": weights(),
            },
        ),
        Bad(
            "a scaled rotary embedding",
            files=config_json(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        ),
        Bad(
            "an end token that is text",
            check=read_prompts,
            files={
                "model/generation_config.json": {"eos_token_id": "</s>"},
            },
        ),
        Bad("truncated weights", files={"model/model.safetensors": weights()[:-3]}),
        Bad("no tokenizer", files={"model/tokenizer.json": None}),
    ],
    "Prompts": [
        Bad("a missing file", files={"prompts.jsonl": None}),
        Bad("an unknown file format", "data.prompts=prompts.csv"),
        Bad("a row that is not JSON", files=rows(PROMPT.strip(), '{"prompt": "What is")')),
        Bad(
            "a row without an answer",
            files=rows(PROMPT.strip(), '{"prompt": "What ?", "solution": "5"}'),
        ),
        Bad("an answer that is a list", files=rows('{"prompt": "What ?", "answer": [5]}')),
        Bad("an empty prompt", files=rows('{"prompt": " ", "answer": "5"}')),
        Bad(
            "a row that is not UTF-8",
            files={"prompts.jsonl": b'{"prompt": "caf\xe9", "answer": "5"}\n'},
        ),
        Bad("no rows", files=rows()),
        Bad(
            "a duplicate id",
            files=rows(
                '{"id": "a", "prompt": "What ?", "answer": "5"}',
                '{"id": "a", "prompt": "two ?", "answer": "2"}',
            ),
        ),
        Bad(
            "a message without content", files=rows('{"prompt": [{"role": "user"}], "answer": "5"}')
        ),
        Bad(
            "an assistant message at the end",
            files=rows('{"prompt": [{"role": "assistant", "content": "5"}], "answer": "5"}'),
        ),
        Bad(
            "a file that is not Parquet",
            "data.prompts=prompts.parquet",
            files={"prompts.parquet": "no"},
        ),
        Bad("task arguments for a file", "data.task_args={size: 3}"),
        Bad(
            "rows without a pass rate",
            "data.pass_rate=[0.1, 0.9]",
            files=rows(PROMPT.strip()),
        ),
        Bad("a percentage as pass rate", "data.pass_rate=[10, 90]"),
        Bad(
            "weights that are all zero",
            "data.prompts=null",
            "data.mixture={math: {prompts: prompts.jsonl, weight: 0}}",
        ),
        Bad("an unknown task", "data.prompts=reasoning_gym:chain_sums"),
        Bad(
            "an unknown task argument",
            "data.prompts=reasoning_gym:chain_sum",
            "data.task_args={max_term: 3}",
        ),
        Bad("a prompt that is too long", "rollout.max_response_tokens=125", check=read_prompts),
        Bad(
            "messages without a chat template",
            files=rows('{"prompt": [{"role": "user", "content": "two ?"}], "answer": "2"}'),
            check=read_prompts,
        ),
    ],
    "Tokenizer": [
        Bad("a damaged tokenizer.json", files={"model/tokenizer.json": "{}"}, check=read_prompts),
        Bad(
            "no end-of-sequence token",
            files={
                "model/tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
                **config_json(eos_token_id=None),
            },
            check=read_prompts,
        ),
        Bad("the tokenizer of another model", files=config_json(vocab_size=6), check=read_prompts),
        Bad(
            "an end-of-sequence id outside the vocabulary",
            files=config_json(eos_token_id=99),
            check=read_prompts,
        ),
    ],
    "Rewards": [
        Bad("an unknown built-in", "reward.function=math_verfy"),
        Bad("reasoning_gym rewards for a file", "reward.function=reasoning_gym"),
        Bad("an unknown name among several rewards", "reward.terms={math_verify: 1, helpfull: 1}"),
        Bad(
            "a judge without a server", "reward.terms={good: 1}", "judge.prompts.good='{response}'"
        ),
        Bad("a judge's prompt that is no file", "judge.prompts.good=prompts/good.txt"),
        Bad("an API key that is not set", "judge.key=NO_SUCH_VARIABLE"),
        Bad("a pattern without a group", "judge.pattern='[0-9]+'"),
        Bad("a missing module", "reward.function=verifer:judge", check=start_rewards),
        Bad(
            "a module with a syntax error",
            "reward.function=verifier:judge",
            files={"verifier.py": "def judge(:\n"},
            check=start_rewards,
        ),
        Bad(
            "a missing function",
            "reward.function=verifier:jugde",
            files={"verifier.py": "def judge(prompt, response): return 1\n"},
            check=start_rewards,
        ),
        Bad(
            "a wrong signature",
            "reward.function=verifier:judge",
            files={"verifier.py": "def judge(response): return 1\n"},
            check=start_rewards,
        ),
        Bad(
            "a module that ends the process",
            "reward.function=verifier:judge",
            files={"verifier.py": "import os\nos._exit(7)\n"},
            check=start_rewards,
        ),
        Bad(
            "a function that always raises",
            "reward.function=verifier:judge",
            files={
                "verifier.py": "def judge(prompt, response):\n    return prompt.metadata['unit']\n"
            },
            check=judge_a_step,
        ),
        Bad(
            "a function that returns text",
            "reward.function=verifier:judge",
            files={"verifier.py": "def judge(prompt, response):\n    return 'right'\n"},
            check=judge_a_step,
        ),
    ],
    "Checkpoints": [
        Bad("an unknown checkpoint name", "run.resume=step_000007", check=find_checkpoint),
        Bad("an empty `latest`", files=in_a_checkpoint("latest", ""), check=find_checkpoint),
        Bad("no `latest`", files=in_a_checkpoint("latest", None), check=find_checkpoint),
        Bad("settings of another run", "run.seed=7", "algorithm.alpha=0.1", check=find_checkpoint),
        Bad(
            "a checkpoint of another model",
            files={"after/model/config.json": LLAMA | {"hidden_size": 16}},
            check=find_checkpoint,
        ),
        Bad(
            "a flipped byte",
            files=in_a_checkpoint("step_000002/weights.distcp", bytes(63) + b"\x01"),
            check=find_checkpoint,
        ),
        Bad(
            "a missing file",
            files=in_a_checkpoint("step_000002/weights.distcp", None),
            check=find_checkpoint,
        ),
        Bad(
            "a damaged state",
            files=in_a_checkpoint("step_000002/state.json", '{"fingerpr'),
            check=find_checkpoint,
        ),
        Bad(
            "a damaged manifest",
            files=in_a_checkpoint("step_000002/megatron_espo.json", "{}"),
            check=find_checkpoint,
        ),
        Bad("a folder without a checkpoint (`convert to-hf`)", check=convert_checkpoint),
    ],
    "Paths": [
        Bad("a run folder that is a file", files={"out": "text"}),
        Bad("a run folder that cannot be created", "run.dir=/proc/runs"),
        Bad("missing rollouts", "run.replay=other/rollouts"),
        Bad(
            "damaged rollouts",
            files={"other/rollouts/step_000001.npz": b"PK\x03\x04"},
            check=replay_a_step,
        ),
        Bad(
            "rollouts without routed experts",
            "run.replay=other/rollouts",
            check=replay_without_experts,
        ),
    ],
}


def all_rows() -> Iterator[tuple[str, Bad]]:
    return ((section, bad) for section, bads in TABLE.items() for bad in bads)


def write(files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.unlink(missing_ok=True)
        else:
            content = json.dumps(content) if isinstance(content, dict) else content
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def message_of(bad: Bad) -> str:
    """The error message. The folder of the run appears as /home/me/work."""
    hf_config = bad.files.get("model/config.json")
    try:
        read_spec(hf_config if isinstance(hf_config, dict) else {})
    except InputError:
        hf_config = LLAMA
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write(
            FILES
            | {"model/model.safetensors": weights(hf_config)}
            | {
                name: content
                for name, content in bad.files.items()
                if not name.startswith("after/")
            }
        )
        if bad.more:
            write({"run.yaml": f"{RUN}{bad.more}\n"})
        os.environ["WORLD_SIZE"] = str(bad.ranks)
        os.environ["RANK"] = "0"
        output = io.StringIO()
        try:
            if bad.check:
                bad.check(bad)
                return "no error"
            with contextlib.redirect_stderr(output):
                code = cli.main(["train", "run.yaml", *bad.overrides])
            message = (
                output.getvalue().removeprefix("error: ").strip()
                if code == 2
                else f"exit code {code}"
            )
        except InputError as error:
            message = str(error)
        finally:
            sys.path[:] = [entry for entry in sys.path if entry != folder]
        return message.replace(os.path.realpath(folder), "/home/me/work")


def messages() -> dict[str, str]:
    """``{"section: what": message}``. Cases without heavy imports run first."""

    def check_only(args: Any) -> None:
        cli._load_config(args)
        print("no error", file=sys.stderr)

    cli._run_with_config = check_only
    found: dict[str, str] = {}
    for section, bad in sorted(all_rows(), key=lambda row: row[1].check is not None):
        if bad.check is None:
            loaded = [name for name in HEAVY if name in sys.modules]
            assert not loaded, f"{loaded} loaded before {bad.what}"
        found[f"{section}: {bad.what}"] = message_of(bad)
    return {key: found[key] for key in (f"{section}: {bad.what}" for section, bad in all_rows())}


def render_row(bad: Bad, message: str) -> str:
    lines = message.replace("|", "\\|").splitlines()
    quoted = [f"`` {line} ``" if "`" in line else f"`{line}`" for line in lines]
    return f"| {bad.what} | {'<br>'.join(quoted)} |"


def render(found: dict[str, str]) -> str:
    """The page."""
    lines = [HEAD]
    for section, bads in TABLE.items():
        lines += [f"\n## {section}\n", "| mistake | message |", "|---|---|"]
        lines += [render_row(bad, found[f"{section}: {bad.what}"]) for bad in bads]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    found = messages()
    if "--json" in sys.argv:
        print(json.dumps(found))
    else:
        DOCUMENT.write_text(render(found), encoding="utf-8")
        print(f"{DOCUMENT}: {len(found)} rows")
