"""`plan` and the rehearsal take every configuration in examples/, and what their headers say is what is planned."""

import json
import subprocess
import sys

import pytest

from megatron_espo.config import load_config
from tests.distributed import ROOT
from tests.test_run_espo_70b import LLAMA, MODELS

# From the config.json of SmolLM2-135M-Instruct.
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
SHAPES = MODELS | {"quickstart": LLAMA | SMALL | {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}}
KINDS = {"Llama": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "Qwen3Moe": "qwen3_moe"}
CONFIGS = sorted((ROOT / "examples").glob("*.yaml"))
PLAN_ALL = """
import json, sys
from megatron_espo.cli import main
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0, arguments
"""


def model_of(path) -> str:
    return "quickstart" if path.stem == "tool_use" else path.stem.rsplit("_", 1)[0]  # both train SmolLM2


def gpus_of(path) -> int:
    nodes = "".join(filter(str.isdigit, path.stem.rsplit("_", 1)[-1]))
    return 8 * int(nodes) if nodes else 2


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> dict[str, dict]:
    """One process plans them all, from folders with nothing but ``config.json``."""
    folder, commands = tmp_path_factory.mktemp("plans"), []
    for path in CONFIGS:
        model = folder / path.stem
        model.mkdir()
        shape = SHAPES[model_of(path)]
        kind = KINDS[shape["architectures"][0].removesuffix("ForCausalLM")]
        head = {} if model_of(path) == "quickstart" else {"head_dim": 128}
        model.joinpath("config.json").write_text(json.dumps(shape | head | {"model_type": kind, "norm_topk_prob": True}))
        commands.append(["plan", str(path), f"model.path={model}", "--gpus", str(gpus_of(path)), "--json", str(folder / f"{path.stem}.json")])
    done = subprocess.run([sys.executable, "-c", PLAN_ALL, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {path.stem: json.loads((folder / f"{path.stem}.json").read_text()) for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_plan_accepts_and_the_header_tells_its_numbers(path, plans):
    plan = plans[path.stem]
    assert plan["fits"] and plan["world_size"] == gpus_of(path)
    header = path.read_text()
    if "memory" in header:
        assert f"memory  {max(stage['total'] for stage in plan['memory']) / 1e9:.1f} GB" in header
    if "#   host" in header:
        assert f"host    {plan['host_bytes'] / 1e9:.0f} GB a node" in header and f"takes {plan['offload_s']:.1f} s a step" in header
        training = max(sum(stage["phases"]["training"]) for stage in plan["memory"])
        engine = plan["engine"]["budget_bytes"]
        assert f" GB a GPU at most: {engine / 1e9:.1f} of the engine" in header and f"; {training / 1e9:.1f} in training" in header
    if "#   engine" in header:
        each = plan["engine"]["kv_tokens"] // plan["engine"]["max_model_len"]
        assert f"caches for {each} sequences" in header or f"each of {plan['engine']['number']} caches {each} sequences" in header
    if "#   sync" in header:
        assert f" in {plan['transfer']['seconds']:.1f} s a step" in header


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_rehearsal_accepts(path, tmp_path_factory, monkeypatch):
    """Every check that `train` makes before it starts its ranks, four of them, on the tiny model that the rehearsal writes."""
    from examples.rehearsal import prepare

    monkeypatch.chdir(tmp_path_factory.getbasetemp())  # one folder for all: as many models as there are kinds
    config = load_config(str(path), prepare(str(path)))
    assert config.validate_for(4) >= 1
    hf_config = config.validate_model()
    config.validate_router(hf_config)
    config.validate_paths()
    assert config.megatron.expert_model_parallel_size == (2 if "a3b" in path.stem else 1)
