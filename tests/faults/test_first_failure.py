"""Ranks that fail at once tell it once."""

import pytest

from megatron_espo.distributed.watchdog import Watchdog
from megatron_espo.files import read_json
from megatron_espo.trainer.status import _report_failure, write_status


@pytest.mark.parametrize("folder_is_cleared", [True, False])
def test_of_ranks_that_fail_at_once_one_tells_it(tmp_path, capsys, monkeypatch, folder_is_cleared):
    """The others may look at ``status.json`` before the first has written it: nobody has, here."""
    if folder_is_cleared:
        Watchdog.clear(tmp_path)
    watchdog = Watchdog(tmp_path, 0, 1, limit_s=1.0, slow_s=1.0, log=print)
    monkeypatch.setattr("megatron_espo.trainer.status.write_status", lambda *_: None)
    for cause in ("first", "second"):
        _report_failure(tmp_path, watchdog, RuntimeError(cause))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "RuntimeError: first" in told[0] and len(told) == (1 if folder_is_cleared else 2), (
        "rather twice than never"
    )


def test_a_later_rank_leaves_the_first_cause(tmp_path):
    Watchdog.clear(tmp_path)
    write_status(tmp_path, "failed", "the cause")
    _report_failure(
        tmp_path,
        Watchdog(tmp_path, 0, 1, limit_s=1.0, slow_s=1.0, log=print),
        RuntimeError("a consequence"),
    )
    assert read_json(tmp_path / "status.json")["why"] == "the cause"


def test_a_checkpoint_is_named_only_if_there_is_one(tmp_path, capsys):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for name in (None, "step_000020"):
        if name:
            (checkpoints / "latest").write_text(name + "\n")
        Watchdog.clear(tmp_path)
        write_status(tmp_path, "running")
        watchdog = Watchdog(tmp_path, 0, 1, limit_s=1.0, slow_s=1.0, log=print)
        _report_failure(tmp_path, watchdog, KeyboardInterrupt())
        line = capsys.readouterr().err
        assert "KeyboardInterrupt" in line and ("continues from step_000020" in line) == bool(name)
