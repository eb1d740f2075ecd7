"""Padded losses; the adapters of ``examples/integrations`` against a dense float64 reference."""

import importlib
import os
import random
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_espo.algo import DAPO, ESPO, GRPO, GSPO, LossInputs, padded_loss
from megatron_espo.algo.segments import entropy_groups
from tests.support.distributed import ROOT
from tests.support.reference import espo_loss
from tests.support.tiny import save_tiny_model

VOCAB, TEMPERATURE = 23, 0.7


def test_the_loss_and_the_numerics_need_only_torch():
    code = """
import sys, torch
before = set(sys.modules)
import megatron_espo.algo, megatron_espo.numerics
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names) - {"megatron_espo", "torch"}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("objective", [ESPO(), GSPO(), GRPO(), DAPO(), ESPO(quantiles=(0.3, 0.8))])
@pytest.mark.parametrize("seed", range(5))
def test_padded_loss_equals_the_packed_objective(objective, seed):
    draw, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    shape = rng.randint(1, 6), rng.randint(1, 30)
    mask = torch.rand(shape, generator=draw) < 0.7
    mask[0] = seed > 0  # seed 0 has a response without trained tokens
    logprob = -3 * torch.rand(shape, generator=draw, dtype=torch.float64)
    old = (logprob + 0.02 * torch.randn(shape, generator=draw, dtype=torch.float64)).clamp(max=0)
    entropy = torch.rand(shape, generator=draw, dtype=torch.float64) * 3
    advantage = torch.randn(shape[0], generator=draw, dtype=torch.float64)
    factor = torch.rand(shape, generator=draw, dtype=torch.float64)
    totals = {"num_responses": 11, "num_tokens": 97}

    packed = logprob[mask].clone().requires_grad_()
    lengths = mask.sum(1)
    segments = objective.segment_tokens(
        entropy[mask], lengths[lengths > 0], vocab_size=VOCAB, **totals
    )
    segments = segments.__class__(**vars(segments) | {"weight": segments.weight * factor[mask]})
    advantages = advantage[:, None].expand(shape)[mask]
    expected = objective.loss(LossInputs(packed, old[mask], advantages, segments))
    expected.loss.backward()

    # Values outside the mask are never read.
    spoiled = [x.masked_fill(~mask, float("nan")) for x in (logprob, old, entropy, factor)]
    leaf = spoiled[0].clone().requires_grad_()
    found = padded_loss(
        objective, leaf, *spoiled[1:3], advantage, mask, vocab_size=VOCAB,
        correction=spoiled[3], **totals,
    )  # fmt: skip
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(leaf.grad[mask], packed.grad)
    assert (leaf.grad[~mask] == 0).all()
    assert torch.equal(found.ratio[mask], expected.ratio) and (found.ratio[~mask] == 1).all()
    assert torch.equal(found.no_gradient[mask], expected.no_gradient)
    assert found.no_gradient[~mask].all()


def test_padded_loss_without_totals_and_without_trained_tokens():
    logprob = torch.full((2, 3), -1.0, requires_grad=True)
    entropy, advantage = torch.ones(2, 3), torch.tensor([1.0, -1.0])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = padded_loss(ESPO(), logprob, logprob, entropy, advantage, mask, vocab_size=VOCAB).loss
    assert loss.item() == pytest.approx(0, abs=1e-7)
    mask.zero_()
    loss = padded_loss(ESPO(), logprob, logprob, entropy, advantage, mask, vocab_size=VOCAB).loss
    (grad,) = torch.autograd.grad(loss, logprob)
    assert loss == 0 and (grad == 0).all()


def test_padded_loss_names_a_wrong_shape():
    logprob, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"entropy: .*\[2, 3\].*\[2, 1\]"):
        padded_loss(ESPO(), logprob, logprob, logprob[:, :1], logprob, mask, vocab_size=VOCAB)


@dataclass
class Batch:
    """Responses with the logits of the trained and the old policy, and the reference's gradient."""

    prompts: list[list[int]]
    responses: list[list[int]]
    masks: list[list[bool]]
    advantages: torch.Tensor
    logits: torch.Tensor  # [batch, time, vocab]; row t predicts token t + 1
    old_logits: torch.Tensor

    @property
    def ids(self) -> torch.Tensor:
        rows = [torch.tensor(p + r) for p, r in zip(self.prompts, self.responses, strict=True)]
        return pad_sequence(rows, batch_first=True)

    def statistics(self, logits: torch.Tensor, temperature: float = TEMPERATURE):
        """Log-prob and entropy of token t + 1 at position t, each ``[batch, time - 1]``."""
        logp = (logits[:, :-1] / temperature).log_softmax(-1)
        token = self.ids[:, 1:, None]
        return logp.gather(2, token)[..., 0], -(logp.exp() * logp).sum(-1)

    def response(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Per response, the values ``[batch, time - 1]`` at the positions of its tokens."""
        sizes = [(len(p), len(r)) for p, r in zip(self.prompts, self.responses, strict=True)]
        return [row[p - 1 : p + r - 1] for row, (p, r) in zip(values, sizes, strict=True)]

    def token_mask(self) -> torch.Tensor:
        """``[batch, time]``, 1 at trained tokens."""
        mask = torch.zeros(self.ids.shape)
        for row, prompt, trained in zip(mask, self.prompts, self.masks, strict=True):
            row[len(prompt) : len(prompt) + len(trained)] = torch.tensor(trained).float()
        return mask

    def gradient(self, num_responses: int) -> torch.Tensor:
        """Gradient of the logits, dense, in float64."""
        leaf = self.logits.detach().double().requires_grad_()

        def model(logits: torch.Tensor):
            rows = iter(logits)
            return lambda ids: SimpleNamespace(logits=next(rows)[None, : ids.shape[1]])

        triples = list(zip(self.prompts, self.responses, self.advantages.tolist(), strict=True))
        loss = espo_loss(
            model(leaf), triples, num_responses=num_responses, temperature=TEMPERATURE,
            vocab_size=VOCAB, old_model=model(self.old_logits.double()), masks=self.masks,
        )  # fmt: skip
        loss.backward()
        return leaf.grad


@pytest.fixture
def batch() -> Batch:
    """Four responses; the second has untrained tokens in between."""
    draw, rng = torch.Generator().manual_seed(3), random.Random(3)
    sizes = [(4, 9), (2, 12), (5, 3), (3, 1)]
    prompts = [[rng.randrange(VOCAB) for _ in range(p)] for p, _ in sizes]
    responses = [[rng.randrange(VOCAB) for _ in range(r)] for _, r in sizes]
    masks = [[row != 1 or t not in (3, 4) for t in range(r)] for row, (_, r) in enumerate(sizes)]
    shape = len(sizes), max(p + r for p, r in sizes), VOCAB
    old = torch.randn(shape, generator=draw)
    new = old + 0.7 * torch.randn(shape, generator=draw)
    advantages = torch.tensor([1.0, -0.7, 0.4, -1.2])
    batch = Batch(prompts, responses, masks, advantages, new, old)
    groups = []
    for logits in (old, new):
        entropy = batch.response(batch.statistics(logits)[1])
        rows = zip(entropy, masks, strict=True)
        entropy = torch.cat([row[torch.tensor(mask)] for row, mask in rows])
        groups.append(entropy_groups(entropy, torch.tensor([sum(mask) for mask in masks])))
    assert not torch.equal(*groups)  # the two policies cut the responses differently
    new.requires_grad_()
    return batch


def load(monkeypatch, name: str, **modules: dict):
    """Import an adapter of ``examples/integrations`` with stand-ins for its framework."""
    for path, contents in modules.items():
        parts = path.split("__")
        for end in range(1, len(parts) + 1):
            dotted = ".".join(parts[:end])
            if not isinstance(sys.modules.get(dotted), ModuleType) or end == len(parts):
                monkeypatch.setitem(sys.modules, dotted, ModuleType(dotted))
            if end > 1:
                parent = sys.modules[".".join(parts[: end - 1])]
                monkeypatch.setattr(parent, parts[end - 1], sys.modules[dotted], raising=False)
        vars(sys.modules[dotted]).update(contents)
    dotted = f"examples.integrations.{name}"
    monkeypatch.delitem(sys.modules, dotted, raising=False)
    module = importlib.import_module(dotted)
    monkeypatch.delitem(sys.modules, dotted)
    return module


def check(batch: Batch, num_responses: int) -> None:
    assert batch.logits.grad.norm() > 1e-3
    torch.testing.assert_close(
        batch.logits.grad.double(), batch.gradient(num_responses), rtol=1e-5, atol=1e-7
    )


class GRPOTrainer:
    """The parts of TRL's trainer that the adapter uses."""

    def __init__(self, batch: Batch, scores_old: bool) -> None:
        self.batch, self.scores_old = batch, scores_old
        self.args = SimpleNamespace(
            beta=0.0, top_entropy_quantile=1.0, off_policy_mask_threshold=None
        )
        self._entropy_bonus_enabled = self.aux_loss_enabled = False
        self.model = SimpleNamespace(
            training=True,
            config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCAB)),
        )
        self.current_gradient_accumulation_steps = 3
        self._metrics = {"train": {"entropy": [], "no_gradient": []}}
        self.accelerator = SimpleNamespace(gather=lambda x: x[None])

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None,
        compute_entropy=False, compute_aux_loss=False, **forward,
    ):  # fmt: skip
        logits = self.batch.logits if torch.is_grad_enabled() else self.batch.old_logits
        logps, entropies = self.batch.statistics(logits)
        logps, entropies = (
            pad_sequence(self.batch.response(x), batch_first=True) for x in (logps, entropies)
        )
        assert logps.shape == (len(input_ids), logits_to_keep)
        return logps, entropies if compute_entropy else None, None

    def _generate_and_score_completions(self, inputs):
        batch = self.batch
        ids = pad_sequence([torch.tensor(r) for r in batch.responses], batch_first=True)
        prompts = pad_sequence([torch.tensor(p) for p in batch.prompts], batch_first=True)
        mask = pad_sequence([torch.ones(len(r)).int() for r in batch.responses], batch_first=True)
        tools = pad_sequence([torch.tensor(m).int() for m in batch.masks], batch_first=True)
        output = {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": batch.advantages,
            "num_items_in_batch": mask.sum(),
            "tool_mask": tools,
        }
        if self.scores_old:
            with torch.no_grad():
                output["old_per_token_logps"], _, _ = self._get_per_token_logps_and_entropies(
                    self.model, torch.cat([prompts, ids], 1), None, ids.shape[1], batch_size=2
                )
        return output


@pytest.mark.parametrize("scores_old", [True, False])
def test_trl_adapter(batch, monkeypatch, scores_old):
    module = load(monkeypatch, "trl_espo", trl={"GRPOTrainer": GRPOTrainer})
    trainer = module.ESPOTrainer(batch, scores_old)
    inputs = trainer._generate_and_score_completions([])
    trainer._compute_loss(trainer.model, inputs).backward()
    if not scores_old:
        batch.old_logits = batch.logits.detach()
    check(batch, len(batch.responses) * 3)
    assert len(trainer._metrics["train"]["entropy"]) == 1


def no_padding_2_padding(nested, data):
    """As in verl: the log-probs of the responses, padded."""
    rows = zip(nested.unbind(), data["prompts"], data["responses"], strict=True)
    found = [row[len(p) - 1 : len(p) + len(r) - 1] for row, p, r in rows]
    return pad_sequence(found, batch_first=True)


class Data(dict):
    """The methods of verl's ``TensorDict`` that the adapter uses."""

    def select(self, *names):
        return Data({name: self[name] for name in names})

    def to_padded_tensor(self):
        return Data({k: pad_sequence(v, batch_first=True) for k, v in self.items()})


@pytest.mark.parametrize("use_v1", [True, False])
def test_verl_adapter(batch, monkeypatch, use_v1):
    if not use_v1:  # the old trainer hands over no entropies: exact while nothing was updated
        batch.old_logits = batch.logits.detach()
    metric = SimpleNamespace(SUM="sum", MEAN="mean")
    losses = {"ppo_loss": lambda *args: "verl's own"}
    module = load(
        monkeypatch,
        "verl_espo",
        verl__utils__metric={"Metric": SimpleNamespace, "AggregationType": metric},
        verl__workers__utils__losses=losses,
        verl__workers__utils__padding={"no_padding_2_padding": no_padding_2_padding},
    )
    config = SimpleNamespace(
        policy_loss=SimpleNamespace(loss_mode="espo"),
        use_kl_loss=False,
        entropy_coeff=0,
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCAB))
        ),
    )
    sizes = [len(p) + len(r) for p, r in zip(batch.prompts, batch.responses, strict=True)]
    logprob, entropy = batch.statistics(batch.logits)
    nested = (
        lambda x: torch.nested.as_nested_tensor(  # noqa: E731
            [torch.cat([row, row[:1]])[:n] for row, n in zip(x, sizes, strict=True)],
            layout=torch.jagged,
        )
    )
    old_logprob, old_entropy = batch.statistics(batch.old_logits)
    rows = zip(batch.advantages, batch.responses, strict=True)
    data = Data(
        prompts=batch.prompts,
        responses=batch.responses,
        response_mask=[torch.tensor(mask) for mask in batch.masks],
        old_log_probs=batch.response(old_logprob),
        advantages=[advantage.expand(len(response)) for advantage, response in rows],
        dp_size=2,
        batch_num_tokens=100,
        global_batch_size=16,
    )
    if use_v1:
        data["entropy"] = batch.response(old_entropy)
    output = {"log_probs": nested(logprob), "entropy": nested(entropy)}
    espo = sys.modules["verl.workers.utils.losses"].ppo_loss
    assert espo is module.espo_loss
    loss, _ = espo(config, model_output=output, data=data, dp_group=None)
    loss.backward()
    batch.logits.grad /= 2  # verl averages over the two data-parallel ranks
    check(batch, 16)
    config.policy_loss.loss_mode = "vanilla"
    assert espo(config, output, data) == "verl's own"


@pytest.mark.parametrize("packed", [False, True])
def test_nemo_rl_adapter(batch, monkeypatch, packed):
    interfaces = {
        "LossFunction": object,
        "LossInputType": SimpleNamespace(LOGIT="logit"),
        "LossType": SimpleNamespace(SEQUENCE_LEVEL="sequence_level"),
    }
    state = SimpleNamespace(
        is_initialized=lambda: True,
        get_tensor_model_parallel_group=lambda: None,
        get_context_parallel_world_size=lambda: 1,
    )
    module = load(
        monkeypatch,
        "nemo_rl_espo",
        nemo_rl__algorithms__loss__interfaces=interfaces,
        megatron__core={"parallel_state": state},
    )
    config = SimpleNamespace(
        ratio_clip_c=None, force_on_policy_ratio=False, use_kl_in_reward=False,
        reference_policy_kl_penalty=0, use_importance_sampling_correction=False,
    )  # fmt: skip
    loss_fn = module.ESPOLossFn(config, use_fused_linear_logprobs=False)
    batch.old_logits = batch.logits.detach()  # exact while nothing was updated
    old, _ = batch.statistics(batch.old_logits)
    # A fifth response has sample_mask 0.
    extended = lambda x: torch.cat([x, x[:1]])  # noqa: E731
    data = {
        "input_ids": extended(batch.ids),
        "advantages": extended(batch.advantages[:, None].expand(batch.ids.shape)),
        "prev_logprobs": extended(torch.cat([torch.zeros(4, 1), old], 1)),
        "token_mask": extended(batch.token_mask()),
        "sample_mask": torch.tensor([1.0, 1, 1, 1, 0]),
    }
    totals = {"global_valid_seqs": torch.tensor(8.0), "global_valid_toks": torch.tensor(50.0)}
    logits = extended(batch.logits / TEMPERATURE)  # NeMo RL divides by the temperature before
    if packed:  # SequencePackingLossWrapper: one response a call, logits with padding
        for row in range(5):
            size = len((batch.prompts + batch.prompts[:1])[row]) + len(
                (batch.responses + batch.responses[:1])[row]
            )
            single = {k: v[row : row + 1] for k, v in data.items()}
            single = {k: v[:, :size] if v.ndim > 1 else v for k, v in single.items()}
            loss, _ = loss_fn(logits=logits[row : row + 1], data=single, **totals)
            loss.backward(retain_graph=True)
    else:
        loss_fn(logits=logits, data=data, **totals)[0].backward()
    check(batch, 8)


@pytest.mark.parametrize("old_entropy", [True, False])
def test_slime_adapter(batch, monkeypatch, old_entropy):
    mpu = {
        "get_context_parallel_world_size": lambda: 1,
        "get_tensor_model_parallel_group": lambda: None,
    }
    module = load(monkeypatch, "slime_espo", megatron__core={"mpu": SimpleNamespace(**mpu)})
    if not old_entropy:
        batch.old_logits = batch.logits.detach()  # exact while nothing was updated
    names = ("calculate_per_token_loss", "use_tis", "use_opsm", "use_kl_loss", "use_critic")
    args = SimpleNamespace(
        **dict.fromkeys(names, False), entropy_coef=0.0, rollout_top_p=1.0,
        use_rollout_logprobs=False, rollout_temperature=TEMPERATURE, vocab_size=VOCAB,
    )  # fmt: skip
    old_logprob, entropy = batch.statistics(batch.old_logits)
    rollout_data = {"log_probs": batch.response(old_logprob)}
    if old_entropy:
        rollout_data["entropy"] = batch.response(entropy)
    module.keep_old_entropy(args, 0, rollout_data)
    sequences = [p + r for p, r in zip(batch.prompts, batch.responses, strict=True)]
    lengths = [len(response) for response in batch.responses]
    masks = [torch.tensor(mask).int() for mask in batch.masks]
    micro_batch = {
        "unconcat_tokens": [torch.tensor(sequence) for sequence in sequences],
        "total_lengths": [len(sequence) for sequence in sequences],
        "response_lengths": lengths,
        "loss_masks": masks,
        "log_probs": rollout_data["log_probs"],
        "values": rollout_data.get("values"),
        "rollout_log_probs": None,
        "advantages": [a.expand(n) for a, n in zip(batch.advantages, lengths, strict=True)],
    }

    def sum_of_sample_mean(x: torch.Tensor) -> torch.Tensor:
        rows = zip(x.split(lengths), masks, strict=True)
        return sum((row * mask).sum() / mask.sum() for row, mask in rows)

    rows = [row[: len(s)] for row, s in zip(batch.logits, sequences, strict=True)]
    packed = torch.cat([*rows, torch.zeros(5, VOCAB)])[None]  # slime pads to a multiple of 128
    loss, log = module.espo_loss(args, micro_batch, packed, sum_of_sample_mean)
    (loss / 16).backward()
    check(batch, 16)
    assert 0 <= log["no_gradient"] <= 4 and log.keys() == {"loss", "no_gradient"}


def run_in(package: str, script: str, folder: Path, *also: str) -> dict:
    """Run a script of ``tests/support`` in an environment with ``package``, made once with pip.

    The environment sees the packages of this one and adds what is missing. The script gets a tiny
    model and a file to write, and this function returns the contents of the file.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    environment = cache / f"megatron_espo_{package.replace('==', '_')}"
    python = environment / "bin" / "python"
    try:
        if not python.exists():
            command = [sys.executable, "-m", "venv", "--without-pip", environment]
            subprocess.run(command, check=True, capture_output=True)
        (site,) = environment.glob("lib/python*/site-packages")
        site.joinpath("zz-parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        if not (site / package.split("==")[0]).exists():
            install = [python, "-m", "pip", "install", "-qq", package, *also]
            subprocess.run(install, check=True, capture_output=True, timeout=900)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{package} cannot be installed in {environment} ({error})")
    out = folder / "record.pt"
    model = save_tiny_model(folder / "model")
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [python, ROOT / "tests" / "support" / script, model, out]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=810)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out)


def check_model_gradients(folder: Path, old: dict, new: dict, found: dict, triples, **settings):
    """Compare the gradients of all parameters with ESPO's in float64."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(folder / "model").double() for _ in range(2)]
    for model, weights in zip(models, (old, new), strict=True):
        model.load_state_dict(weights, strict=False)
    loss = espo_loss(
        models[1], triples, temperature=0.7, vocab_size=models[1].config.vocab_size,
        old_model=models[0], **settings,
    )  # fmt: skip
    loss.backward()
    for name, parameter in models[1].named_parameters():
        error = (found[name].double() - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, name


@pytest.mark.slow
def test_second_update_of_a_rollout_in_trl(tmp_path):
    """TRL's trainer takes two optimizer steps of two micro-batches on the same rollout."""
    record = run_in("trl==1.16.0", "trl_step.py", tmp_path)
    triples = []
    for inputs in record["inputs"][2:]:
        for row, advantage in enumerate(inputs["advantages"].tolist()):
            prompt, response = (
                inputs[f"{name}_ids"][row][inputs[f"{name}_mask"][row].bool()].tolist()
                for name in ("prompt", "completion")
            )
            triples.append((prompt, response, advantage))
    assert len(triples) == 8
    weights, found = record["weights"], record["gradients"][1]
    check_model_gradients(tmp_path, *weights, found, triples, num_responses=8)


@pytest.mark.slow
def test_update_by_verls_engine(tmp_path):
    """verl's engine scores the old policy and trains two micro-batches of an optimizer step."""
    record = run_in("verl==0.9.1", "verl_step.py", tmp_path, "TransferQueue>=0.1.10")
    names = ("prompts", "responses", "advantages")
    rows = zip(*(record[name] for name in names), strict=True)
    triples = [(p.tolist(), r.tolist(), float(a[0])) for p, r, a in rows]
    masks = [mask.tolist() for mask in record["response_mask"]]
    check_model_gradients(
        tmp_path, record["old"], record["new"], record["gradients"], triples,
        num_responses=6, masks=masks,
    )  # fmt: skip
