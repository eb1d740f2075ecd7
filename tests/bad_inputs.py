"""Everything that a user can get wrong, made for real and shown to the check that meets it in a run.

    python -m tests.bad_inputs          writes docs/bad_inputs.md anew
    python -m tests.bad_inputs --json   prints the messages, for the test
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_espo import cli
from megatron_espo.config import load_config
from megatron_espo.errors import InputError

DOCUMENT = Path(__file__).parents[1] / "docs" / "bad_inputs.md"
HEAD = """\
# What can be wrong, and what you are told

Each row is produced for real by `tests/bad_inputs.py`, which also writes this page (`python -m tests.bad_inputs`). Mistakes in settings, rows and model folder end
the run with exit code 2 before torch, Megatron-Core or vLLM load; those in tokenizer, prompt lengths, checkpoints and reward functions on rank 0 before the model
does. All mistakes of a kind are told at once; here each is alone.
"""
HEAVY = ("torch", "megatron.core", "vllm", "transformers")

WORDS = ["<s>", "</s>", "<unk>", "What", "is", "two", "and", "three", "?"]
RUN = "model: {path: model}\ndata: {prompts: prompts.jsonl}\nrun: {dir: out}\nrollout: {max_response_tokens: 64}\n"
SIZES = {
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16,
    "vocab_size": len(WORDS), "max_position_embeddings": 128,
}  # fmt: skip
LLAMA = {"architectures": ["LlamaForCausalLM"], "eos_token_id": 1, **SIZES}
MOE = LLAMA | {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 2}
PROMPT = '{"prompt": "What is two and three ?", "answer": "5"}\n'
HEADER = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + bytes(8)
TOKENIZER = {
    "version": "1.0", "pre_tokenizer": {"type": "Whitespace"},
    "added_tokens": [{"id": 1, "content": "</s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}],
    "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": "<unk>"},
}  # fmt: skip
FILES = {
    "run.yaml": RUN,
    "prompts.jsonl": PROMPT,
    "model/config.json": LLAMA,
    "model/tokenizer.json": TOKENIZER,
    "model/tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"},
    "model/model.safetensors": WEIGHTS,
}


@dataclass(frozen=True)
class Bad:
    """One mistake.

    Attributes:
        what: in the user's words.
        files: what differs from ``FILES``; ``None`` removes one, a mapping is written as JSON.
        more: lines added to run.yaml.
        overrides: after ``train run.yaml``.
        ranks: world size.
        check: what meets it, given the folder; it raises InputError, or prints the message and exits.
    """

    what: str
    files: dict[str, Any] = field(default_factory=dict)
    more: str = ""
    overrides: tuple[str, ...] = ()
    ranks: int = 1
    check: Callable[["Bad"], object] | None = None


def rows(*lines: str) -> dict[str, str]:
    return {"prompts.jsonl": "".join(f"{line}\n" for line in lines)}


def config_json(**changes: Any) -> dict[str, Any]:
    return {"model/config.json": LLAMA | changes}


# -- checks that a run makes on rank 0 after the settings': in the order in which it makes them ----------------------------


def find_checkpoint(bad: Bad) -> None:
    """As a run does: find, then verify before anything is loaded."""
    from megatron_espo.checkpoints import Checkpoints, fingerprint
    from megatron_espo.mcore.checkpoint import _checksum, model_identity, read_manifest, verify_files
    good, config = load_config("run.yaml"), load_config("run.yaml", bad.overrides)
    folder = Path("out/checkpoints/step_000002")
    for path in (folder, folder.with_name("step_000001")):
        path.mkdir(parents=True)
        (path / "state.json").write_text(json.dumps({"fingerprint": fingerprint(good), "rollouts": {}}))
        (path / "weights.distcp").write_bytes(bytes(64))
        files = {file.name: _checksum(file) for file in path.iterdir()}
        (path / "megatron_espo.json").write_text(json.dumps({"version": 1, "model": model_identity(LLAMA), "files": files}))
    (folder.parent / "latest").write_text("step_000002\n")
    write({name.removeprefix("after/"): content for name, content in bad.files.items() if name.startswith("after/")})
    checkpoints = Checkpoints(config)
    hf_config = json.loads(Path("model/config.json").read_text())
    learner = SimpleNamespace(load=lambda path: verify_files(path, read_manifest(path, hf_config)))
    checkpoints.load(checkpoints._find(), learner)


def convert_checkpoint(bad: Bad) -> None:
    from megatron_espo.mcore.checkpoint import read_manifest

    Path("mine").mkdir()
    read_manifest("mine", LLAMA)


def read_prompts(bad: Bad) -> None:
    from megatron_espo.data import PromptStream, load_tokenizer

    config = load_config("run.yaml", bad.overrides)
    tokenizer = load_tokenizer(config.model.path, config.model.path)
    PromptStream(config.data, tokenizer, 1, max_response_tokens=config.rollout.max_response_tokens, max_model_len=128)


def start_rewards(bad: Bad) -> None:
    from megatron_espo.rewards import RewardPool

    with RewardPool(load_config("run.yaml", bad.overrides).reward) as rewards:
        rewards.start()


def judge_a_step(bad: Bad) -> None:
    from megatron_espo.rewards import RewardPool
    from megatron_espo.types import Prompt

    with RewardPool(load_config("run.yaml", bad.overrides).reward) as rewards:
        scores = rewards.score([(Prompt("prompts:1", "", "5", (1,)), "the answer is 5")] * 4)
        rewards.refuse_failures(scores.count(None), 4, step=1)


def replay_a_step(bad: Bad) -> None:
    from megatron_espo.rollout_log import RolloutLog

    RolloutLog(Path("other/rollouts"), {}).read(1, None)


def replay_without_experts(bad: Bad) -> None:
    """As rank 0 of a run on a mixture of experts."""
    import torch

    from megatron_espo.batch import ScoredGroups
    from megatron_espo.progress import Phases
    from megatron_espo.rollout_log import RolloutLog
    from megatron_espo.rollout_manager import RolloutManager
    from megatron_espo.types import Prompt, Trajectory

    rollouts = [[Trajectory.single_turn(Prompt("a", "", "", (3,)), (5,), (-1.0,), 0, "stop", "") for _ in range(2)]]
    RolloutLog(Path("other/rollouts"), {}).write(1, ScoredGroups(rollouts, torch.tensor([[0.0, 1.0]]), 1), before={}, after={})
    runtime = SimpleNamespace(is_main=True, rank=0, world_size=1)
    manager = RolloutManager(load_config("run.yaml", bad.overrides), MOE, runtime, SimpleNamespace(check=lambda: None))
    manager._batch(1, Phases(draw=False))


def in_a_checkpoint(name: str, content: Any) -> dict[str, Any]:
    return {f"after/out/checkpoints/{name}": content}


TABLE: dict[str, list[Bad]] = {
    "Settings": [
        Bad("no such file", {"run.yaml": None}),
        Bad("an empty file", {"run.yaml": "# nothing yet\n"}),
        Bad("a list instead of sections", {"run.yaml": "- model\n"}),
        Bad("not YAML", more="megatron: tensor: 2"),
        Bad("not UTF-8", {"run.yaml": b"run: {name: caf\xe9}\n"}),
        Bad("a key twice", more="optimizer:\n  lr: 1e-6\n  lr: 2e-6"),
        Bad("a misspelt key", more="optimizer:\n  weigth_decay: 0.1"),
        Bad("a key in another's section", more="megatron:\n  group_size: 4"),
        Bad("a misspelt section", more="optimiser: {lr: 1e-6}"),
        Bad("a required key left out", {"run.yaml": "model: {}\ndata: {prompts: prompts.jsonl}\n"}),
        Bad("a number in quotes", more='optimizer: {lr: "1e-6"}'),
        Bad("a word for a number", overrides=("optimizer.lr=fast",)),
        Bad("a number for a word", overrides=("run.name=2024",)),
        Bad("out of range", overrides=("run.steps=0",)),
        Bad("a choice that there is not", overrides=("algorithm.objective=ppo",)),
        Bad("a wrong item in a list", overrides=("algorithm.quantiles=[0.5, high]",)),
        Bad("an override without a section", overrides=("steps=5",)),
        Bad("an override that is not YAML", overrides=("run.name=[",)),
        Bad("one response a prompt", overrides=("rollout.group_size=1",)),
        Bad("greedy sampling", overrides=("rollout.temperature=0",)),
        Bad("top-p without consent", overrides=("rollout.top_p=0.9",)),
        Bad("a setting that the objective does not use", overrides=("algorithm.clip_high=0.2",)),
        Bad("unequal mini-batches", overrides=("algorithm.num_mini_batches=3",)),
        Bad("a warm-up as long as the run", overrides=("run.steps=5", "optimizer.lr_warmup_iters=5")),
        Bad("full recomputation, but how?", overrides=("megatron.recompute_granularity=full", "megatron.recompute_num_layers=1")),
        Bad("older rollouts without their correction", overrides=("rollout.max_staleness=1",)),
        Bad("8-bit products of float32 weights", overrides=("megatron.fp8=hybrid", "model.dtype=float32")),
        Bad("a response as long as the engine's context", overrides=("rollout.max_model_len=64",)),
        Bad(
            "more prompts in flight than can be trained in time",
            overrides=(
                "rollout.prompts_per_step=8", "rollout.max_staleness=1", "rollout.over_sampling_prompts=9",
                "algorithm.rollout_correction=token",
            ),
        ),
        Bad("a setting of an older release", overrides=("rollout.extra_prompts=4",)),
        Bad("an argument of the engine that a setting owns", overrides=("rollout.engine_args={dtype: float16}",)),
        Bad("a sleeping engine on GPUs of its own", overrides=("rollout.sleep=true", 'rollout.visible_devices="6,7"')),
        Bad("an engine's machine without a port", overrides=("rollout.hosts=[10.0.0.5]",)),
        Bad("all addresses of a machine", overrides=("rollout.hosts=['0.0.0.0:7700']",)),
        Bad("a machine twice", overrides=("rollout.hosts=['10.0.0.5:7700', '10.0.0.5:7700']",)),
        Bad("more engines than machines for them", overrides=("rollout.hosts=['10.0.0.5:7700']", "rollout.engines=2"), ranks=2),
        Bad("GPUs of another machine", overrides=("rollout.hosts=['10.0.0.5:7700']", "rollout.visible_devices='6,7'")),
        Bad("a transport that stays on one machine", overrides=("rollout.hosts=['10.0.0.5:7700']", "rollout.transport=ipc")),
    ],
    "Layout": [
        Bad("a world size that is no multiple", overrides=("megatron.tensor_model_parallel_size=2",), ranks=3),
        Bad("TP against the heads", config_json(num_attention_heads=3, num_key_value_heads=None), overrides=("megatron.tensor_model_parallel_size=2",), ranks=2),
        Bad("TP against the key-value heads", overrides=("megatron.tensor_model_parallel_size=4",), ranks=4),
        Bad("PP against the layers", overrides=("megatron.pipeline_model_parallel_size=3",), ranks=3),
        Bad(
            "virtual stages against the layers",
            overrides=("megatron.pipeline_model_parallel_size=2", "megatron.virtual_pipeline_model_parallel_size=2"),
            ranks=2,
        ),
        Bad("sequence parallelism alone", overrides=("megatron.sequence_parallel=true",)),
        Bad("EP without experts", overrides=("megatron.expert_model_parallel_size=2",), ranks=2),
        Bad("EP against the experts", {"model/config.json": MOE}, overrides=("megatron.expert_model_parallel_size=4",), ranks=4),
        Bad("experts without router replay", {"model/config.json": MOE}, overrides=("rollout.router_replay=false",)),
        Bad("router replay, and consent to do without", {"model/config.json": MOE}, overrides=("rollout.allow_router_mismatch=true",)),
        Bad("more ranks than responses", overrides=("rollout.prompts_per_step=1", "rollout.group_size=2"), ranks=4),
        Bad("the engine's TP against the heads", overrides=("rollout.tensor_parallel_size=3",)),
        Bad("an engine without an owner", overrides=("rollout.hosts=['a:1', 'b:1']", "rollout.engines=2"), ranks=3),
        Bad("a context longer than the model's", overrides=("rollout.max_model_len=4096",)),
    ],
    "Model folder": [
        Bad("a hub's name", overrides=("model.path=Qwen/Qwen3-4B",)),
        Bad("no config.json", {"model/config.json": None}),
        Bad("a damaged config.json", {"model/config.json": '{"architectures": ['}),
        Bad("an architecture that is not supported", config_json(architectures=["GPT2LMHeadModel"])),
        Bad("sizes left out", {"model/config.json": {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}}),
        Bad("quantised weights", config_json(quantization_config={"bits": 4})),
        Bad("no weights", {"model/model.safetensors": None}),
        Bad("a Git LFS pointer", {"model/model.safetensors": "version https://git-lfs.github.com/spec/v1\n"}),
        Bad("a missing shard", {"model/model.safetensors.index.json": {"weight_map": {"v": "b.safetensors", "w": "model.safetensors"}}}),
        Bad("a damaged index of shards", {"model/model.safetensors.index.json": "{}"}),
        Bad("truncated weights", {"model/model.safetensors": WEIGHTS[:-3]}),
        Bad("no tokenizer", {"model/tokenizer.json": None}),
    ],
    "Prompts": [
        Bad("no such file", {"prompts.jsonl": None}),
        Bad("another format", overrides=("data.prompts=prompts.csv",)),
        Bad("a row that is not JSON", rows(PROMPT.strip(), '{"prompt": "What is")')),
        Bad("a row without an answer", rows(PROMPT.strip(), '{"prompt": "What ?", "solution": "5"}')),
        Bad("an answer that is a number", rows('{"prompt": "What ?", "answer": 5}')),
        Bad("an empty prompt", rows('{"prompt": " ", "answer": "5"}')),
        Bad("a row that is not UTF-8", {"prompts.jsonl": b'{"prompt": "caf\xe9", "answer": "5"}\n'}),
        Bad("no rows", rows()),
        Bad("an id twice", rows('{"id": "a", "prompt": "What ?", "answer": "5"}', '{"id": "a", "prompt": "two ?", "answer": "2"}')),
        Bad("a message without content", rows('{"prompt": [{"role": "user"}], "answer": "5"}')),
        Bad("the assistant's message last", rows('{"prompt": [{"role": "assistant", "content": "5"}], "answer": "5"}')),
        Bad("a file that is not Parquet", {"prompts.parquet": "no"}, overrides=("data.prompts=prompts.parquet",)),
        Bad("arguments of a task for a file", overrides=("data.task_args={size: 3}",)),
        Bad("a task that there is not", overrides=("data.prompts=reasoning_gym:chain_sums",)),
        Bad("an argument that the task does not have", overrides=("data.prompts=reasoning_gym:chain_sum", "data.task_args={max_term: 3}")),
        Bad("a prompt that is too long", overrides=("rollout.max_response_tokens=125",), check=read_prompts),
        Bad("messages without a chat template", rows('{"prompt": [{"role": "user", "content": "two ?"}], "answer": "2"}'), check=read_prompts),
    ],
    "Tokenizer": [
        Bad("a damaged tokenizer.json", {"model/tokenizer.json": "{}"}, check=read_prompts),
        Bad("no end of sequence", {"model/tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}, **config_json(eos_token_id=None)}, check=read_prompts),
        Bad("another model's tokenizer", config_json(vocab_size=6), check=read_prompts),
        Bad("an end of sequence that the model does not have", config_json(eos_token_id=99), check=read_prompts),
    ],
    "Rewards": [
        Bad("no such built-in", overrides=("reward.function=math_verfy",)),
        Bad("a task's verifier for a file", overrides=("reward.function=reasoning_gym",)),
        Bad("no such module", overrides=("reward.function=verifer:judge",), check=start_rewards),
        Bad("a module that does not compile", {"verifier.py": "def judge(:\n"}, overrides=("reward.function=verifier:judge",), check=start_rewards),
        Bad("no such function", {"verifier.py": "def judge(prompt, response): return 1\n"}, overrides=("reward.function=verifier:jugde",), check=start_rewards),
        Bad("a wrong signature", {"verifier.py": "def judge(response): return 1\n"}, overrides=("reward.function=verifier:judge",), check=start_rewards),
        Bad("a module that ends the process", {"verifier.py": "import os\nos._exit(7)\n"}, overrides=("reward.function=verifier:judge",), check=start_rewards),
        Bad(
            "a function that always raises",
            {"verifier.py": "def judge(prompt, response):\n    return prompt.metadata['unit']\n"},
            overrides=("reward.function=verifier:judge",),
            check=judge_a_step,
        ),
        Bad(
            "a function that returns text",
            {"verifier.py": "def judge(prompt, response):\n    return 'right'\n"},
            overrides=("reward.function=verifier:judge",),
            check=judge_a_step,
        ),
    ],
    "Checkpoints": [
        Bad("a name that there is not", overrides=("run.resume=step_000007",), check=find_checkpoint),
        Bad("an empty `latest`", in_a_checkpoint("latest", ""), check=find_checkpoint),
        Bad("no `latest`", in_a_checkpoint("latest", None), check=find_checkpoint),
        Bad("settings of another run", overrides=("run.seed=7", "algorithm.alpha=0.1"), check=find_checkpoint),
        Bad("another model's", {"after/model/config.json": LLAMA | {"hidden_size": 16}}, check=find_checkpoint),
        Bad("a flipped byte", in_a_checkpoint("step_000002/weights.distcp", bytes(63) + b"\1"), check=find_checkpoint),
        Bad("a missing file", in_a_checkpoint("step_000002/weights.distcp", None), check=find_checkpoint),
        Bad("a damaged state", in_a_checkpoint("step_000002/state.json", '{"fingerpr'), check=find_checkpoint),
        Bad("a damaged manifest", in_a_checkpoint("step_000002/megatron_espo.json", "{}"), check=find_checkpoint),
        Bad("a folder that is no checkpoint (`convert to-hf`)", check=convert_checkpoint),
    ],
    "Paths": [
        Bad("a run folder that is a file", {"out": "text"}),
        Bad("a run folder that cannot be made", overrides=("run.dir=/proc/runs",)),
        Bad("rollouts that are not there", overrides=("run.replay=other/rollouts",)),
        Bad("damaged rollouts", {"other/rollouts/step_000001.npz": b"PK\3\4"}, check=replay_a_step),
        Bad("rollouts of a run without router replay", overrides=("run.replay=other/rollouts",), check=replay_without_experts),
    ],
}  # fmt: skip


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
    """What the user is told; the folder of the run is called /home/me/work."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write(FILES | {name: content for name, content in bad.files.items() if not name.startswith("after/")})
        if bad.more:
            write({"run.yaml": f"{RUN}{bad.more}\n"})
        os.environ["WORLD_SIZE"] = str(bad.ranks)
        output = io.StringIO()
        try:
            if bad.check:
                bad.check(bad)
                return "nothing was said"
            with contextlib.redirect_stderr(output):
                code = cli.main(["train", "run.yaml", *bad.overrides])
            message = output.getvalue().removeprefix("error: ").strip() if code == 2 else f"exit code {code}"
        except InputError as error:
            message = str(error)
        finally:
            sys.path[:] = [entry for entry in sys.path if entry != folder]
        return message.replace(os.path.realpath(folder), "/home/me/work")


def messages() -> dict[str, str]:
    """``{"section: what": message}``; first those that must come before anything heavy loads."""
    cli._work = lambda *_: print("nothing was said", file=sys.stderr)
    found: dict[str, str] = {}
    for section, bad in sorted(all_rows(), key=lambda row: row[1].check is not None):
        if bad.check is None:
            loaded = [name for name in HEAVY if name in sys.modules]
            assert not loaded, f"{loaded} loaded before {bad.what}"
        found[f"{section}: {bad.what}"] = message_of(bad)
    return {key: found[key] for key in (f"{section}: {bad.what}" for section, bad in all_rows())}


def render_row(bad: Bad, message: str) -> str:
    lines = message.replace("|", "\\|").splitlines()
    return f"| {bad.what} | {'<br>'.join(f'`` {line} ``' if '`' in line else f'`{line}`' for line in lines)} |"


def render(told: dict[str, str]) -> str:
    """The page."""
    lines = [HEAD]
    for section, bads in TABLE.items():
        lines += [f"\n## {section}\n", "| what is wrong | what you are told |", "|---|---|"]
        lines += [render_row(bad, told[f"{section}: {bad.what}"]) for bad in bads]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    told = messages()
    if "--json" in sys.argv:
        print(json.dumps(told))
    else:
        DOCUMENT.write_text(render(told), encoding="utf-8")
        print(f"{DOCUMENT}: {len(told)} rows")
