"""A loaded actor continues bit for bit: moments, step count, learning rate."""

from types import SimpleNamespace

import pytest

from tests.support.distributed import run_ranks
from tests.support.weights_models import save_model

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP = PP2 | {"virtual_pipeline_model_parallel_size": 2}
BF16 = {"dtype": "bfloat16"}
# (ranks, model) -> cases of one launch.
CASES = {
    (1, "untied"): {"one rank bf16": BF16},
    (2, "tied"): {"dp2 bf16": BF16, "tp2": {"sizes": TP2}, "pp2 vpp2": {"sizes": VPP}},
    (2, "untied"): {"pp2": {"sizes": PP2}, "pp2 vpp2 bf16": {"sizes": VPP} | BF16},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tied and an untied tiny model, and one with experts."""
    folder = tmp_path_factory.mktemp("resume")
    save_model("qwen3_moe", folder / "experts")
    save_model("qwen3", folder / "tied", tie_word_embeddings=True)
    save_model("qwen3", folder / "untied")
    return folder


@pytest.mark.parametrize(
    ("ranks", "name"),
    [pytest.param(*c, marks=() if c == (2, "tied") else pytest.mark.slow) for c in CASES],
)
def test_continued_equals_uninterrupted_bit_for_bit(folder, tmp_path, ranks, name):
    answers = run_ranks(
        ranks, "tests.support.ranks.resume:check_continues", timeout=900,
        folder=str(folder / name), out=str(tmp_path), cases=list(CASES[ranks, name].values()),
    )  # fmt: skip
    for case, answer in zip(CASES[ranks, name], answers, strict=True):
        assert answer["weights"] == 0 and answer["metrics"] == 0, (case, answer)
        assert answer["trained"] > 1e-2 and answer["learning rates"] == 3, (case, answer)


def test_another_layout_continues(folder, tmp_path):
    """Saved at DP=2: other layouts differ only by the order of float32 sums."""
    checkpoint, out = str(tmp_path / "checkpoint"), str(tmp_path / "weights")
    run_ranks(
        2,
        "tests.support.ranks.resume:save_and_continue",
        folder=str(folder / "untied"),
        checkpoint=checkpoint,
        out=out,
    )
    for ranks, layouts in ((1, [{}]), (2, [TP2, PP2, VPP])):
        answers = run_ranks(
            ranks, "tests.support.ranks.resume:continue_in_layouts", folder=str(folder / "untied"),
            checkpoint=checkpoint, expected=out, layouts=layouts,
        )  # fmt: skip
        assert all(answer < 1e-5 for answer in answers), answers


def test_tied_pipelines_continue_in_another_layout(folder, tmp_path):
    answers = run_ranks(
        2,
        "tests.support.ranks.resume:check_continues",
        folder=str(folder / "tied"),
        out=str(tmp_path),
        cases=[{"sizes": PP2}, {"sizes": VPP}],
    )
    assert all(answer["weights"] == 0 and answer["trained"] > 1e-2 for answer in answers)
    expected = str(tmp_path / "weights")
    run_ranks(
        2,
        "tests.support.ranks.resume:save_and_continue",
        folder=str(folder / "tied"),
        checkpoint=str(tmp_path / "dp2"),
        out=expected,
    )
    for name, layouts in (("0", [{}, TP2]), ("1", [{}, TP2]), ("dp2", [PP2, VPP])):
        found = run_ranks(
            2, "tests.support.ranks.resume:continue_in_layouts", folder=str(folder / "tied"),
            checkpoint=str(tmp_path / name), expected=expected, layouts=layouts,
        )  # fmt: skip
        assert all(difference < 1e-5 for difference in found), (name, found)


@pytest.mark.parametrize(
    ("ranks", "sizes"), [pytest.param(1, {}, marks=pytest.mark.slow), (2, PP2)]
)
def test_the_first_update_needs_no_scores(folder, ranks, sizes):
    """The policy of the first update is the old policy. A second epoch trains the same again."""
    for epochs, passes in ((1, 1), (2, 2)):
        found = run_ranks(
            ranks,
            "tests.support.ranks.resume:check_first_update",
            folder=str(folder / "untied"),
            sizes=sizes,
            epochs=epochs,
        )
        assert found["difference"] < 1e-6 < 1e-3 < found["trained"], found
        assert found["score passes"] == passes


def test_the_optimizer_follows_the_configuration(folder, tmp_path):
    """Learning rates, betas and eps may change when a run continues."""
    for name, sizes in (("tied", TP2), ("experts", {"expert_model_parallel_size": 2})):
        cases = [(sizes, {}), (sizes, {"use_distributed_optimizer": False})]
        found = run_ranks(
            2, "tests.support.ranks.resume:check_other_settings", folder=str(folder / name),
            out=str(tmp_path / name), cases=cases,
        )  # fmt: skip
        assert found == [0, 0], (name, found)


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
def test_a_longer_schedule_is_reported(monkeypatch, capsys, style):
    """The learning rate of a resumed run with another ``run.steps`` follows the new schedule."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from megatron_espo.megatron import actor

    def schedule(steps):
        lengths = {"lr_warmup_steps": 0, "lr_decay_steps": steps, "wd_incr_steps": steps}
        decay = {"lr_decay_style": style, "init_lr": 0.0, "max_lr": 1.0, "min_lr": 0.0}
        weight_decay = {"start_wd": 0.0, "end_wd": 0.0, "wd_incr_style": "constant"}
        return OptimizerParamScheduler(
            SimpleNamespace(param_groups=[]), **lengths, **decay, **weight_decay,
            use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=True,
        )  # fmt: skip

    saved, resumed = schedule(8), actor.Actor.__new__(actor.Actor)
    saved.step(2)
    resumed.chunks, resumed.spec = [], None
    resumed.config = SimpleNamespace(optimizer=SimpleNamespace(lr_decay_style=style))
    resumed.train_engine = SimpleNamespace(optimizer=None, spikes=SimpleNamespace(norms=[]))
    monkeypatch.setattr(actor.dist, "get_rank", lambda: 0)
    for steps in (8, 12):
        state = {"scheduler": saved.state_dict()}
        monkeypatch.setattr(actor, "load_checkpoint", lambda *_, found=state, **__: found)
        resumed.train_engine.scheduler = schedule(steps)
        resumed.load("step_000002")
        assert resumed.train_engine.scheduler.num_steps == 2
        warned = steps != 8 and style != "constant"
        lines = capsys.readouterr().out.splitlines()
        found = [line for line in lines if line.startswith("warning:")]
        assert len(found) == warned and all("12" in line and "8" in line for line in found)
