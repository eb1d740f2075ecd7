"""`plan` and the rehearsal accept every file in examples/; headers have the plan's numbers."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron_espo.config import checks, load_config
from megatron_espo.models.registry import read_spec
from megatron_espo.tools.plan.memory import plan_pipeline
from tests.support.distributed import ROOT
from tests.test_run_espo_70b import MODELS, shape

# From the config.json of SmolLM2-135M-Instruct, which two examples train.
SMOLLM2 = shape("Llama", 576, 1536, 30, 9, 3, 49152, 8192, tie_word_embeddings=True)
KINDS = {"Llama": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "Qwen3Moe": "qwen3_moe"}
CONFIGS = sorted((ROOT / "examples").glob("*.yaml"))
RECIPE, A3B = (
    ROOT / "examples" / f"{name}.yaml"
    for name in ("espo_production_recipe", "qwen3_30b_a3b_4nodes")
)
SAME_LAYOUT = {RECIPE: A3B}
PLAN_ALL = """
import json, sys
from megatron_espo.cli import main
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0, arguments
"""


def shape_of(path) -> dict:
    """The content of the model's config.json."""
    path = SAME_LAYOUT.get(path, path)
    shape = {"head_dim": 128} | MODELS.get(path.stem.rsplit("_", 1)[0], {})
    if path.stem in ("quickstart", "tool_use"):
        shape = SMOLLM2
    kind = KINDS[shape["architectures"][0].removesuffix("ForCausalLM")]
    return shape | {"model_type": kind, "norm_topk_prob": True}


def gpus_of(path) -> int:
    path = SAME_LAYOUT.get(path, path)
    nodes = "".join(filter(str.isdigit, path.stem.rsplit("_", 1)[-1]))
    return 8 * int(nodes) if nodes else 2


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> dict[str, dict]:
    """Plans of all configurations, from one process and from folders with only config.json."""
    folder, commands = tmp_path_factory.mktemp("plans"), []
    for path in CONFIGS:
        model = folder / path.stem
        model.mkdir()
        (model / "config.json").write_text(json.dumps(shape_of(path)))
        out = ["--gpus", str(gpus_of(path)), "--json", str(folder / f"{path.stem}.json")]
        commands.append(["plan", str(path), f"model.path={model}", *out])
    command = [sys.executable, "-c", PLAN_ALL, json.dumps(commands)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {path.stem: json.loads((folder / f"{path.stem}.json").read_text()) for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_plan_accepts_with_the_numbers_of_the_header(path, plans):
    plan, header = plans[path.stem], path.read_text()
    assert plan["fits"] and plan["world_size"] == gpus_of(path)
    memory, engine, config = plan["memory"], plan["engine"], load_config(str(path))
    if "node" in path.stem:
        dp, rollout, algorithm = plan["data_parallel_size"], config.rollout, config.algorithm
        assert f"DP {dp};" in header.replace(", experts EP 8", "") or dp == 1
        assert (rollout.prompts_per_step, rollout.group_size) == (128, 8)
        assert (rollout.max_response_tokens, config.optimizer.lr) == (16384, 1e-6)
        assert (algorithm.alpha, algorithm.quantiles) == (0.02, (0.8,))
    if "#   memory" in header:
        assert f"memory  {max(stage['total'] for stage in memory) / 1e9:.1f} GB" in header
    if "#   host" in header:
        assert f"host    {plan['host_bytes'] / 1e9:.0f} GB a node" in header
        assert f"takes {plan['offload_s']:.1f} s a step" in header
        assert f" GB a GPU at most: {engine['budget_bytes'] / 1e9:.1f} of the engine" in header
        training = max(sum(stage["phases"]["training"]) for stage in memory)
        assert f"; {training / 1e9:.1f} in training" in header
    if "#   engine" in header:
        each = engine["kv_tokens"] // engine["max_model_len"]
        several = f"each of {engine['number']} caches {each} sequences"
        assert f"caches for {each} sequences" in header or several in header
    if "#   idle" in header:
        spec, dp = read_spec(shape_of(path)), plan["data_parallel_size"]
        idle = [plan_pipeline(config, spec, dp, n).bubble for n in (8192, 2048)]
        text = "idle    {:.1%} of the step at 8,192 tokens a response, {:.1%} at 2,048"
        assert text.format(*idle) in header
    if "#   sync" in header:
        assert f" in {plan['transfer']['seconds']:.1f} s a step" in header


def test_the_rehearsal_passes_every_check_before_training(tmp_path, monkeypatch):
    """On four ranks, with the tiny models that the rehearsal writes."""
    from examples.rehearsal import prepare

    monkeypatch.chdir(tmp_path)
    for path in CONFIGS:
        config = load_config(str(path), prepare(str(path)))
        assert checks.check_world_size(config, 4) >= 1
        checks.check_router(config, checks.check_model(config))
        checks.check_paths(config)
        is_moe = "a3b" in SAME_LAYOUT.get(path, path).stem
        assert config.megatron.expert_model_parallel_size == (2 if is_moe else 1)


def test_the_recipe_has_the_layout_of_its_base_and_every_part():
    recipe, base = load_config(str(RECIPE)), load_config(str(A3B))
    assert (recipe.model, recipe.megatron, recipe.optimizer) == (
        base.model,
        base.megatron,
        base.optimizer,
    )
    algorithm, rollout, data = recipe.algorithm, recipe.rollout, recipe.data
    assert (algorithm.objective, algorithm.rollout_correction) == ("espo", "token")
    assert algorithm.zero_variance_scale and algorithm.num_mini_batches > 1
    assert rollout.router_replay and rollout.max_staleness and not rollout.max_resampling_rounds
    assert rollout.quantization == "fp8"
    assert recipe.reward.terms.keys() & recipe.judge.prompts.keys()
    assert len(data.sources) > 1 and data.skip_solved
    assert any(source.pass_rate for source in data.sources.values())


def test_steps_of_the_recipe_with_a_fake_engine(tmp_path, monkeypatch):
    """Prompts -> rollouts -> advantages -> sequences to train, with the rehearsal's settings."""
    from examples.rehearsal import prepare
    from megatron_espo.data import PromptStream
    from megatron_espo.monitoring.metrics import rollout_metrics
    from megatron_espo.trainer.ledger import Ledger
    from megatron_espo.trainer.train import advantages_of, train_sequences
    from tests.support.fake_engine import TOKENIZER, FakeRun

    monkeypatch.chdir(tmp_path)
    config = load_config(str(RECIPE), prepare(str(RECIPE)))
    tokenizer = SimpleNamespace(**vars(TOKENIZER))
    tokenizer.encode_prompt = lambda prompt: [int(prompt.split()[2]) + 3]
    sizes = {"max_response_tokens": 8, "max_model_len": 64}
    stream, ledger = PromptStream(config.data, tokenizer, config.run.seed, **sizes), Ledger()
    rewards = iter([*[1.0] * 64, *[0.0, 1.0, 0.0, 0.0] * 400])  # the first prompts are solved
    with FakeRun(config.rollout, lambda *_: next(rewards), stream=stream) as run:
        for step in range(1, 6):
            groups = run.batch(step)
            ledger.count(groups)
            advantages, signs = advantages_of(groups, config)
            found = rollout_metrics(groups.rollouts, groups.rewards, advantages)
            trained = sum(train_sequences(groups, advantages, False, None, signs), [])
            assert len(trained) == 32 and all(sequence.advantage for sequence in trained)
            if found["reward/solved_all"] == 1:
                assert (signs == 1).all() and (advantages - 0.1).abs().max() < 1e-6
            shares = [found.get(f"rollout/share_{name}", 0.0) for name in ("math", "logic")]
            assert sum(shares) == 1 and groups.max_staleness(step) <= 1
    assert (ledger.trained, ledger.dispatched, ledger.in_flight) == (40, 48, 8)
    # Of the 32 rows of math the pass rates skip 8, in three epochs. 13 solved rows rest for one.
    assert ledger.skipped == 3 * 8 + 13


@pytest.mark.slow
def test_the_recipe_is_rehearsed_with_the_engine(tmp_path):
    """The command in its header: four ranks, TP 2 x PP 2 x VPP 2, experts EP 2, vLLM on CPUs."""
    script = ROOT / "examples" / "run_espo_70b.sh"
    command = [shutil.which("torchrun"), "--nproc-per-node", "4", str(script), "--rehearse"]
    command += ["--config", str(RECIPE)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "timeout": 900}
    done = subprocess.run(command, cwd=tmp_path, env=env, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "rehearsal" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    last, names = lines[-1], {name for line in lines for name in line}
    assert (last["ledger/trained"], last["ledger/in_flight"]) == (24, 8)
    assert last["ledger/skipped"] >= 8
    assert {"rollout/share_math", "rollout/share_logic", "moe/router_mismatch"} <= names
