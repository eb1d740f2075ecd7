"""Parts of the training loop, without engines and ranks."""

from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest

from megatron_espo.config import load_config
from megatron_espo.distributed.stop_request import Stopped
from megatron_espo.distributed.watchdog import SLOW_PHASES
from megatron_espo.monitoring.progress import Phases
from megatron_espo.trainer.checkpoints import fingerprint, record_fingerprint
from megatron_espo.trainer.colocation import Colocation
from megatron_espo.trainer.train import Run
from tests.support.tiny import save_tiny_model, write_tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    save_tiny_model(folder / "model")
    write_tiny_run(folder)
    return folder


def config(folder, *overrides: str):
    return load_config(str(folder / "run.yaml"), [f"run.dir={folder / 'out'}", *overrides])


@pytest.mark.parametrize(
    "change",
    [
        "reward.function=my_rewards:fixed", "optimizer.lr=1e-4", "environment.args={turns: 2}",
        "data.template_args={enable_thinking: true}", "data.raw=true", "model.dtype=bfloat16",
        "rollout.engine_args={max_num_seqs: 3}", "rollout.temperature=0.5", "run.seed=5",
    ],
)  # fmt: skip
def test_recorded_rollouts_depend_on(folder, change):
    found = [record_fingerprint(config(folder, *each)) for each in ((), (change,))]
    assert found[0] != found[1]


def test_recorded_rollouts_do_not_depend_on_the_layout(folder):
    others = (
        "megatron.tensor_model_parallel_size=2", "rollout.timeout_s=7", "rollout.sleep=true",
        "rollout.gpu_memory_utilization=0.4", "run.steps=9", "judge.url=http://other:8000/v1",
    )  # fmt: skip
    for read in (fingerprint, record_fingerprint):
        assert read(config(folder)) == read(config(folder, *others))


def test_a_stop_saves_although_the_rollouts_cannot_be_closed():
    run = Run.__new__(Run)
    run.rollouts, run.reporter = Mock(), Mock()
    run.checkpoints = Mock(due_at_stop=lambda step: True)
    run.step, run._save, run._finish_save = 137, Mock(), Mock()
    run.rollouts.close.side_effect = TimeoutError
    with pytest.raises(TimeoutError), run:
        raise Stopped("SIGUSR1")
    run._save.assert_called_once_with(last=True)
    run._finish_save.assert_called_once_with(wait=True)


def test_the_restart_of_an_engine_is_a_phase():
    """The watchdog adds the time limit of an engine to its own."""
    seen: list[str] = []
    phases = Phases(False, lambda name=None, *_: seen.append(name))
    colocation = Colocation.__new__(Colocation)
    colocation._phases, colocation._steps, colocation._offloader = phases, 9, MagicMock()
    colocation._sync = SimpleNamespace(recover=lambda: seen.append("restart"))
    colocation.recover(3)
    assert seen[:2] == ["sync", "restart"] and "sync" in SLOW_PHASES
    assert phases.seconds.keys() == {"sync"}


def test_seconds_of_inner_phases_count_as_the_outer_one():
    phases = Phases(False)
    phases.seconds = {"sync": 5.0, "checkpoint": 1.0}
    with phases.counted_as("checkpoint"):
        for name in ("sleep", "checkpoint", "sync"):
            phases.seconds[name] = phases.seconds.get(name, 0.0) + 2.0
    assert phases.pop() == {"sync": 5.0, "checkpoint": 7.0}
