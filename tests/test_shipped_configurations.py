"""`plan` and the rehearsal accept every file in examples/; headers have the plan's numbers."""

import json
import subprocess
import sys

import pytest

from megatron_espo.config import checks, load_config
from tests.support.distributed import ROOT
from tests.test_run_espo_70b import MODELS, shape

# From the config.json of SmolLM2-135M-Instruct, which two examples train.
SMOLLM2 = shape("Llama", 576, 1536, 30, 9, 3, 49152, 8192, tie_word_embeddings=True)
KINDS = {"Llama": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "Qwen3Moe": "qwen3_moe"}
CONFIGS = sorted((ROOT / "examples").glob("*.yaml"))
PLAN_ALL = """
import json, sys
from megatron_espo.cli import main
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0, arguments
"""


def shape_of(path) -> dict:
    """The content of the model's config.json."""
    shape = {"head_dim": 128} | MODELS.get(path.stem.rsplit("_", 1)[0], {})
    if path.stem in ("quickstart", "tool_use"):
        shape = SMOLLM2
    kind = KINDS[shape["architectures"][0].removesuffix("ForCausalLM")]
    return shape | {"model_type": kind, "norm_topk_prob": True}


def gpus_of(path) -> int:
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {path.stem: json.loads((folder / f"{path.stem}.json").read_text()) for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_plan_accepts_with_the_numbers_of_the_header(path, plans):
    plan, header = plans[path.stem], path.read_text()
    assert plan["fits"] and plan["world_size"] == gpus_of(path)
    memory, engine = plan["memory"], plan["engine"]
    if "memory" in header:
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
        assert config.megatron.expert_model_parallel_size == (2 if "a3b" in path.stem else 1)
