"""A real vLLM engine in its child process, synced from and compared with transformers."""

import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_espo.errors import InputError
from megatron_espo.rollout import Engine, EngineConfig, EngineError, Enough, make_trainer_transport, push_weights
from megatron_espo.rollout.lifecycle import State
from megatron_espo.rollout.manifest import check_manifest
from megatron_espo.rollout.process import child_environment
from megatron_espo.rollout.requests import request_seeds
from megatron_espo.rollout.transport import _init_info, check_placement, resolve_transport
from megatron_espo.types import Prompt

EOS, TEMPERATURE, RESPONSE_TOKENS = 2, 0.7, 12


def make_llama(path, **changes):
    torch.manual_seed(0)
    options = dict(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=192,
        vocab_size=260, max_position_embeddings=128, bos_token_id=1, eos_token_id=EOS, tie_word_embeddings=True,
        initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**options | changes))
    model.save_pretrained(path)
    return model.eval()


def perturb(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def make_prompts(count=6):
    generator = torch.Generator().manual_seed(7)
    # Some longer than a block of the prefix cache, some sharing their beginning.
    ids = torch.randint(3, 260, (count, 40), generator=generator)
    ids[1::2, :36] = ids[0, :36]
    return [Prompt(f"p{i}", "", "", tuple(row[: 40 - 3 * i].tolist())) for i, row in enumerate(ids)]


def engine_config(model, log_path, **changes):
    options = dict(
        model=str(model), log_path=str(log_path), dtype="float32", transport="shared_memory", temperature=TEMPERATURE,
        max_response_tokens=RESPONSE_TOKENS, eos_ids=frozenset({EOS}), cpu_kv_cache_gib=0.25, timeout_s=120,
    )  # fmt: skip
    return EngineConfig(**options | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tied")
    make_llama(path)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    with Engine(engine_config(folder, folder / "engine.log"), decode=lambda ids: " ".join(map(str, ids))) as engine:
        engine.start().wait_ready()
        yield engine


def connect(engine, model, source=None, name="auto"):
    from vllm.distributed.weight_transfer.base import ModuleSource

    return make_trainer_transport(name, engine=engine, source=source or ModuleSource(model), rank=0)


@torch.no_grad()
def reference_logprobs(model, prompt_ids, response_ids, temperature):
    """log softmax(logits / temperature) of each response token, one dense forward pass."""
    ids = torch.tensor([prompt_ids + response_ids])
    logprobs = (model(ids).logits[0].double() / temperature).log_softmax(-1)
    return logprobs[len(prompt_ids) - 1 : -1].gather(-1, torch.tensor(response_ids)[:, None])[:, 0]


def assert_serves(engine, model, atol=1e-4):
    """Prompts go through prefill and decode; the engine's log-probs are the reference's."""
    for group in engine.generate(make_prompts(), 2, seed=1):
        for rollout in group:
            expected = reference_logprobs(model, rollout.prompt.token_ids, rollout.response_ids, TEMPERATURE)
            torch.testing.assert_close(torch.tensor(rollout.logprobs).double(), expected, atol=atol, rtol=0)


# -- one engine: stale, synced, synced again, broken, restarted ----------------------------------------------------


def test_engine_listens_to_this_machine_only(engine):
    inodes = set()
    for pid in living_in_group(engine.pid):
        inodes |= {os.readlink(fd).removeprefix("socket:[").rstrip("]") for fd in Path(f"/proc/{pid}/fd").iterdir()}
    assert inodes
    for table, loopback in (("tcp", "0100007F"), ("tcp6", "01000000".rjust(32, "0"))):
        rows = [line.split() for line in Path("/proc/net", table).read_text().splitlines()[1:]]
        addresses = {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}  # 0A: listening
        assert addresses <= {loopback}


def test_unsynced_engine_serves_nothing(engine):
    assert engine.state == "stale" and engine.policy_version is None and engine.max_model_len == 128
    for call in (lambda: engine.generate(make_prompts(), 1), lambda: engine.logprobs([(5, 6)])):
        with pytest.raises(EngineError, match="stale; it serves only after a weight sync"):
            call()


def test_synced_engine_equals_transformers(engine, folder):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    transport = connect(engine, model)
    for version in (3, 4):
        perturb(model, seed=version)
        push_weights(transport, engine, version)
        assert engine.policy_version == version
        assert_serves(engine, model)
    push_weights(transport, engine, 5)
    prompt = make_prompts()[0]
    expected = reference_logprobs(model, prompt.token_ids[:1], prompt.token_ids[1:], 1.0)
    (logprobs,) = engine.logprobs([prompt.token_ids])
    torch.testing.assert_close(torch.tensor(logprobs).double(), expected, atol=1e-4, rtol=0)


def test_a_sleeping_engine_serves_nothing_and_wakes_without_weights(engine, folder):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    transport = connect(engine, model)
    engine.sleep()
    assert engine.state == "asleep" and engine.policy_version is None
    refused = [
        lambda: engine.generate(make_prompts(), 1),
        lambda: engine.logprobs([(5, 6)]),
        lambda: engine.canary([(5, 6)], 1),
        lambda: push_weights(transport, engine, 9),
        engine.serve,
        engine.sleep,
    ]
    for call in refused:
        with pytest.raises(EngineError, match="the rollout engine is asleep; "):
            call()
    engine.wake([(name, tuple(tensor.shape)) for name, tensor in load_file(folder / "model.safetensors").items()])
    with pytest.raises(EngineError, match="stale; it serves only after a weight sync"):
        engine.generate(make_prompts(), 1)
    engine.state = State.READY  # whoever asks nevertheless is not told numbers of the weights that were
    (logprobs,) = engine.logprobs([make_prompts()[0].token_ids])
    assert all(map(math.isnan, logprobs))
    engine.state = State.STALE
    perturb(model, seed=5)
    push_weights(transport, engine, 5)
    assert_serves(engine, model)


def test_bfloat16_on_the_wire(engine, folder):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    perturb(model, seed=9)
    push_weights(connect(engine, model), engine, 6)
    assert_serves(engine, model.float())


def test_groups_seeds_versions_and_finish_reasons(engine):
    prompts, seen = make_prompts(), []
    groups = engine.generate(prompts, 8, seed=11, on_progress=lambda done, total: seen.append((done, total)))
    rollouts = [rollout for group in groups for rollout in group]
    assert [len(group) for group in groups] == [8] * len(prompts) and {r.policy_version for r in rollouts} == {6}
    assert all(rollout.prompt is prompt for prompt, group in zip(prompts, groups, strict=True) for rollout in group)
    assert len({rollout.response_ids for rollout in groups[0]}) > 1
    for rollout in rollouts:
        assert EOS not in rollout.response_ids[:-1] and len(rollout.logprobs) == len(rollout.response_ids)
        stopped = rollout.response_ids[-1] == EOS
        assert rollout.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(rollout.response_ids) == RESPONSE_TOKENS
        assert rollout.text == " ".join(map(str, rollout.response_ids))
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    assert seen == sorted(seen) and {total for done, total in seen if done} == {8 * len(prompts)}
    # The same seed samples the same responses, in another order and company too.
    again = engine.generate(prompts[::-1][:3], 8, seed=11)
    assert [r.response_ids for group in again for r in group] == [
        r.response_ids for group in groups[::-1][:3] for r in group
    ]
    other = engine.generate(prompts, 8, seed=12)
    assert [r.response_ids for group in other for r in group] != [r.response_ids for r in rollouts]


def test_unfinished_responses_are_gone_on_with(engine, folder):
    """Three calls: until one prompt has its responses; until the first of those begun has, which new ones join; to the end, with a newer version."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    push_weights(connect(engine, model), engine, 7)
    prompts, options = make_prompts(10), {"sampling": {"max_tokens": 40}}
    groups = engine.generate(prompts[:8], 1, seed=5, enough=Enough(1), **options)
    assert groups == engine.generate(prompts[:8], 1, seed=5, enough=Enough(1), **options), "the same again"
    begun = [group for group in groups if any(rollout.unfinished for rollout in group)]
    assert 0 < len(begun) < 8, groups
    more = engine.generate([group[0].prompt for group in begun] + prompts[8:], 1, seed=6, begun=begun, enough=Enough(1, first=1), **options)
    assert not any(rollout.unfinished for rollout in more[0]) and all(rollout.unfinished for rollout in more[-1])
    push_weights(connect(engine, model), engine, 8)
    rest = [group for group in more if any(rollout.unfinished for rollout in group)]
    ended = engine.generate([group[0].prompt for group in rest], 1, seed=7, begun=rest, **options)
    for old, rollout in [*zip(sum(begun, []), sum(more, []), strict=False), *zip(sum(rest, []), sum(ended, []), strict=True)]:
        assert rollout.response_ids[: len(old.response_ids)] == old.response_ids and rollout.logprobs[: len(old.logprobs)] == old.logprobs
        assert rollout == old if not old.unfinished else len(rollout.response_ids) > len(old.response_ids)
        assert rollout.policy_version == 7 and rollout.prompt is old.prompt
    for rollout in sum(ended, []):
        assert rollout.finish_reason == ("stop" if rollout.response_ids[-1] == EOS else "length")
        assert len(rollout.response_ids) <= 40 and rollout.text == " ".join(map(str, rollout.response_ids))
        expected = reference_logprobs(model, rollout.prompt.token_ids, rollout.response_ids, TEMPERATURE)
        torch.testing.assert_close(torch.tensor(rollout.logprobs).double(), expected, atol=1e-4, rtol=0)


def test_prompt_without_room_for_a_response_is_refused(engine):
    with pytest.raises(InputError, match=r"Prompt 'long' has 117 tokens.*max_response_tokens=12.*max_model_len=128"):
        engine.generate([Prompt("long", "", "", (5,) * 117)], 1)
    assert engine.state == "ready"


def test_dropped_tensor_kills_the_update_and_a_restart_mends_it(engine, folder):
    from vllm.distributed.weight_transfer.base import ModuleSource

    class Forgetful(ModuleSource):
        def iter_groups(self):
            for names, tensors in super().iter_groups():
                kept = [i for i, name in enumerate(names) if "layers.1.self_attn.k_proj" not in name]
                yield [names[i] for i in kept], [tensors[i] for i in kept]

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with pytest.raises(
        EngineError, match=r"1 weights did not reach worker 0: model\.layers\.1\.self_attn\.k_proj\.weight"
    ):
        push_weights(connect(engine, model, Forgetful(model)), engine, 7)
    assert engine.state == "dead" and engine.policy_version is None
    with pytest.raises(EngineError, match="dead; it serves only after a weight sync"):
        engine.generate(make_prompts(), 1)

    engine.restart().wait_ready()
    assert engine.state == "stale"
    push_weights(connect(engine, model), engine, 8)
    assert_serves(engine, model)


def test_hung_engine_is_named_within_its_timeout(folder, engine):
    os.killpg(engine.pid, signal.SIGSTOP)
    object.__setattr__(engine.config, "timeout_s", 1.0)
    with pytest.raises(EngineError, match=r"logprobs: the rollout engine gave no news for 1 s(.|\n)*engine.log"):
        engine.logprobs([(5, 6)])
    assert engine.state == "dead"


def test_lost_reply_is_asked_for_once_more(engine, folder, monkeypatch, caplog):
    monkeypatch.setenv("MEGATRON_ESPO_FAULT", "reply:0:0:lose")
    object.__setattr__(engine.config, "timeout_s", 10.0)
    engine.restart().wait_ready()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    push_weights(connect(engine, model), engine, 9)
    with_loss, without = (engine.generate(make_prompts(), 2, seed=3) for _ in range(2))
    assert with_loss == without and "1 of 12 responses never came back (prompt 'p0')" in caplog.text
    monkeypatch.setattr(engine, "_call", lambda method, requests, *_, **__: [None] * len(requests))
    with pytest.raises(EngineError, match="lost the responses to 2 prompts twice: p0, p1"):
        engine.generate(make_prompts(2), 3, seed=3)


def test_engine_killed_while_it_samples_is_an_error_at_once(engine):
    def kill(done, total):
        os.killpg(engine.pid, signal.SIGKILL)

    began = time.monotonic()
    with pytest.raises(EngineError, match=r"generate: the rollout engine has died(.|\n)*engine.log"):
        engine.generate(make_prompts(), 8, on_progress=kill)
    assert engine.state == "dead" and time.monotonic() - began < 5


# -- children that never get as far as a model ----------------------------------------------------------------------


def test_killed_child_is_an_error_at_once(folder, tmp_path):
    engine = Engine(engine_config(folder, tmp_path / "engine.log"), decode=str).start()
    os.killpg(engine.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineError, match="start: the rollout engine has died"):
        engine.wait_ready()
    assert time.monotonic() - began < 3
    engine.close()


def test_error_of_the_child_arrives_with_its_log_and_code_in_the_folder_never_runs(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["NoSuchModel"], "auto_map": {"AutoModel": "code.Model", "AutoModelForCausalLM": "code.Model"}}'
    )
    (tmp_path / "code.py").write_text(f"from pathlib import Path; Path({str(tmp_path / 'ran')!r}).touch()")
    with Engine(engine_config(tmp_path, tmp_path / "engine.log"), decode=str) as engine:
        with pytest.raises(
            EngineError, match=r"start: the rollout engine failed(.|\n)*NoSuchModel(.|\n)*Last lines of"
        ):
            engine.start().wait_ready()
    assert not (tmp_path / "ran").exists()


OWNER = """
import sys, time
from tests.test_rollout import Engine, EngineConfig
if __name__ == "__main__":
    engine = Engine({config!r}, decode=str).start()
    {wait}
    print(engine.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("tensor_parallel_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_engine_dies_with_its_killed_owner(folder, tmp_path, tensor_parallel_size):
    """One that starts, and one whose tensor-parallel workers run."""
    config = engine_config(folder, tmp_path / "engine.log", tensor_parallel_size=tensor_parallel_size, load_weights=True)
    (tmp_path / "owner.py").write_text(OWNER.format(config=config, wait="engine.wait_ready()" if tensor_parallel_size > 1 else ""))
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    owner = subprocess.Popen([sys.executable, str(tmp_path / "owner.py")], stdout=subprocess.PIPE, text=True, env=environment)
    engine = int(owner.stdout.readline())
    assert len(living_in_group(engine)) >= (1 if tensor_parallel_size == 1 else 3)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 30
    while living_in_group(engine):
        assert time.monotonic() < deadline, "the engine outlived its owner"
        time.sleep(0.1)


def living_in_group(group):
    """Processes that run, not merely wait to be reaped."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == group and (process / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(int(process.name))
        except OSError:
            pass
    return found


# -- without an engine ----------------------------------------------------------------------------------------------


def test_manifest_problems_are_named(folder):
    shapes = [(name, tuple(tensor.shape)) for name, tensor in load_file(folder / "model.safetensors").items()]
    check_manifest(shapes, folder)
    check_manifest([*shapes, ("lm_head.weight", (260, 128))], folder)  # tied: vLLM skips it
    query = "model.layers.0.self_attn.q_proj.weight"
    wrong = [(name, (64, 128) if name == query else shape) for name, shape in shapes]
    for announced, message in [
        ([item for item in shapes if item[0] != query], rf"{query}: missing"),
        ([*shapes, ("model.layers.9.bias", (3,))], r"model.layers.9.bias: unknown"),
        (wrong, rf"{query}: shape \(64, 128\), expected \(128, 128\)"),
        ([*shapes, shapes[0]], rf"{shapes[0][0]}: announced more than once"),
    ]:
        with pytest.raises(InputError, match=message):
            check_manifest(announced, folder)


def test_manifest_reads_all_shards(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(4)}, tmp_path / "model-00002-of-00002.safetensors")
    check_manifest([("b", (4,)), ("a", (2, 3))], tmp_path)
    with pytest.raises(InputError, match="b: missing"):
        check_manifest([("a", (2, 3))], tmp_path)


def test_transport_names_and_placement(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_transport("auto") == "shared_memory"
    with pytest.raises(InputError, match="'ipc' needs a GPU"):
        resolve_transport("ipc")
    with pytest.raises(InputError, match=r"expected auto, shared_memory, tcp, ipc, nccl, nccl_m2n, sharded_rdt; got 'rdma'"):
        resolve_transport("rdma")
    assert resolve_transport("auto", on_hosts=True) == "tcp"
    with pytest.raises(InputError, match="'nccl' needs a GPU and none is available; use tcp or auto"):
        resolve_transport("nccl", on_hosts=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_transport("auto", on_hosts=True) == resolve_transport("nccl", on_hosts=True) == "nccl"
    with pytest.raises(InputError, match="'tcp' gathers weights in a CPU's memory; use nccl"):
        resolve_transport("tcp", on_hosts=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_transport("auto") == "ipc" and resolve_transport("auto", "6,7") == "nccl"
    with pytest.raises(InputError, match="'nccl_m2n' needs the package 'nccl'"):
        resolve_transport("nccl_m2n", "6,7")


def test_nccl_meets_where_the_engine_reaches_its_owner():
    config = SimpleNamespace(tensor_parallel_size=4)
    info = _init_info("nccl", SimpleNamespace(own_address="10.9.8.7", config=config), rank=32)  # the owner of a second engine
    assert (info.master_address, info.world_size, info.is_sender) == ("10.9.8.7", 5, True) and 0 < info.master_port < 65536
    assert not _init_info("nccl", None, rank=1).is_sender


@pytest.mark.parametrize(
    "name, devices, message",
    [
        ("nccl", None, r"transport nccl needs the engine on GPUs of its own, got null"),
        ("sharded_rdt", "3,7", r"needs the engine on GPUs of its own, got '3,7', of which a trainer rank uses 3\."),
        ("ipc", "7", r"transport ipc needs the engine on the trainer's GPU, got '7', which no trainer rank uses"),
        ("nccl_m2n", "6,7", None),
        ("ipc", None, None),
        ("shared_memory", None, None),
    ],
)
def test_engine_on_the_wrong_gpus(name, devices, message):
    environment = {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "2,3,6,7"}
    with nullcontext() if message is None else pytest.raises(InputError, match=message):
        check_placement(name, devices, environment)


def test_seeds_depend_on_prompt_and_position_only():
    prompts = make_prompts(3)
    seeds = request_seeds(prompts, 4, seed=5)
    assert request_seeds(prompts[1:], 2, seed=5) == [row[:2] for row in seeds[1:]]
    repeated = request_seeds([prompts[0]] * 2, 4, seed=5) + request_seeds(prompts[1:], 4, seed=5)
    assert len({seed for row in repeated for seed in row}) == 16
    assert request_seeds(prompts, 1, seed=None) == [[None]] * 3


def test_child_environment_is_free_of_the_launcher(monkeypatch, folder, tmp_path):
    for name in ("RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    environment = child_environment(engine_config(folder, tmp_path / "log", visible_devices="3"))
    assert not {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "GROUP_RANK"} & set(environment)
    threads = environment.get("OMP_NUM_THREADS")
    assert threads == (None if torch.cuda.is_available() else str(len(os.sched_getaffinity(0))))
    assert environment["CUDA_VISIBLE_DEVICES"] == "3" and environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "0"


def test_vllm_is_not_imported_early():
    code = "import sys, megatron_espo.rollout; assert not {'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
