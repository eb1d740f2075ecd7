"""Settings without a server: weight names, transports, placement, environment, seeds."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from safetensors.torch import load_file, save_file

from megatron_espo.config import Rollout
from megatron_espo.errors import InputError
from megatron_espo.rollout import transport
from megatron_espo.rollout.check_names import check_names
from megatron_espo.rollout.pool import request_seeds
from megatron_espo.rollout.server import log_tail, server_environment
from megatron_espo.rollout.transport import _init_info, resolve_transport
from megatron_espo.types import Prompt
from tests.support.distributed import ROOT
from tests.support.real_engine import engine_config
from tests.support.tiny import WORDS, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_names_and_shapes_that_do_not_fit_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    check_names(shapes, folder)
    check_names([*shapes, ("lm_head.weight", (len(WORDS), 64))], folder)  # tied: vLLM skips it
    query = "model.layers.0.self_attn.q_proj.weight"
    wrong = [(name, (64, 64) if name == query else shape) for name, shape in shapes]
    for announced, message in [
        (
            [item for item in shapes if item[0] != query],
            rf"{query}: shape missing, expected \(128, 64\)",
        ),
        (
            [*shapes, ("model.layers.9.bias", (3,))],
            r"model.layers.9.bias: shape \(3,\), expected no tensor",
        ),
        (wrong, rf"{query}: shape \(64, 64\), expected \(128, 64\)"),
    ]:
        with pytest.raises(InputError, match=message):
            check_names(announced, folder)


def test_the_files_of_the_index_are_read(tmp_path):
    """Folders of Mistral models have the same weights again, with other names, in one file."""
    (tmp_path / "config.json").write_text("{}")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    save_file({"a": torch.zeros(2, 3)}, tmp_path / files["a"])
    save_file({"b": torch.zeros(4)}, tmp_path / files["b"])
    save_file({"layers.0.a": torch.zeros(2, 3)}, tmp_path / "consolidated.safetensors")
    check_names([("b", (4,)), ("a", (2, 3))], tmp_path)
    with pytest.raises(InputError, match="b: shape missing"):
        check_names([("a", (2, 3))], tmp_path)


def test_transport_names_and_placement(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def resolve(name: str, **settings) -> str:
        return resolve_transport(Rollout(transport=name, **settings))

    hosts = ("10.0.0.5:7700",)
    assert resolve("auto") == "files"
    with pytest.raises(InputError, match="'ipc' needs a GPU"):
        resolve("ipc")
    assert resolve("auto", hosts=hosts) == "files"
    with pytest.raises(InputError, match="'nccl' needs a GPU and none is available; use files"):
        resolve("nccl", hosts=hosts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert {resolve(name, hosts=hosts) for name in ("auto", "nccl")} == {"nccl"}
    assert resolve("files", hosts=hosts) == resolve("files") == "files"
    assert resolve("auto") == "ipc" and resolve("auto", visible_devices="6,7") == "nccl"


def test_nccl_meets_where_the_engine_reaches_its_owner(monkeypatch, folder, tmp_path):
    monkeypatch.setattr(transport, "address_towards", {"10.0.0.5": "10.9.8.7"}.get)
    config = engine_config(folder, tmp_path, tensor_parallel_size=4, hosts=("10.0.0.5:7700",))
    engine = SimpleNamespace(address="10.0.0.5:7700", config=config)
    info = _init_info("nccl", engine, 32, None)  # the owner of a second engine
    assert info.master_address == "10.9.8.7" and 0 < info.master_port < 65536
    assert info.world_size == 5 and info.is_sender
    assert not _init_info("nccl", None, 1, None).is_sender


@pytest.mark.parametrize(
    "name, devices, message",
    [
        ("nccl", None, r"on GPUs of its own \(the trainer has GPUs 2,3\), got null"),
        ("sharded_rdt", "3,7", r"transport sharded_rdt needs .* has GPUs 2,3\), got 3,7"),
        ("ipc", "7", r"on the trainer's GPU \(the trainer has GPUs 2,3\), got 7"),
        ("nccl_m2n", "6,7", None),
        ("ipc", None, None),
        ("files", None, None),
    ],
)
def test_engine_on_the_wrong_gpus(name, devices, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6,7")
    with nullcontext() if message is None else pytest.raises(InputError, match=message):
        assert resolve_transport(Rollout(transport=name, visible_devices=devices)) == name


def test_seeds_depend_on_prompt_and_position_only():
    prompts = [Prompt(f"p{i}", "", "", (5, 6)) for i in range(3)]
    seeds = request_seeds(prompts, 4, seed=5)
    assert request_seeds(prompts[1:], 2, seed=5) == [row[:2] for row in seeds[1:]]
    repeated = request_seeds([prompts[0]] * 2, 4, seed=5) + request_seeds(prompts[1:], 4, seed=5)
    flat = {seed for row in repeated for seed in row}
    assert len(flat) == 16 and all(0 <= seed < 2**63 for seed in flat)


def test_server_environment_lacks_what_the_launcher_sets(monkeypatch, folder, tmp_path):
    torchrun = {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "GROUP_RANK"}
    for name in torchrun:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    config = engine_config(folder, tmp_path, visible_devices="3")
    environment = server_environment(config)
    assert not torchrun & set(environment)
    assert environment["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "OMP_NUM_THREADS" not in server_environment(config)


def test_vllm_is_not_imported_early():
    code = "import sys, megatron_espo.trainer.rollout_manager\n"
    code += "assert not {'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_end_of_the_log_shows_the_first_error(tmp_path):
    """vLLM's API server reports only that its engine failed, after a long traceback of its own."""
    log = tmp_path / "engine.log"
    log.write_text("\n".join(f"line {i}" for i in range(30)))
    assert log_tail(log).splitlines()[-1] == "line 29"
    prefix = "(EngineCore pid=7) ERROR 11-27 22:14:07 [core.py:1510] "
    trace = [f"{prefix}  File {i}" for i in range(30)] + [f"{prefix}ValueError: the cause"]
    later = ["Traceback (most recent call last):", *["  File"] * 60, "RuntimeError: See above."]
    log.write_text("\n".join(["INFO: no Error here", *trace, *later]))
    assert "ValueError: the cause" in log_tail(log)
    assert log_tail(log).endswith("...\n  File\n  File\nRuntimeError: See above.")
    start = log.stat().st_size  # of the next server
    log.write_text("\n".join([log.read_text(), "INFO", "RuntimeError: another cause"]))
    assert log_tail(log, start).split("\n") == ["", "INFO", "RuntimeError: another cause"]
