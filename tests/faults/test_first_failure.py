"""Ranks that fail at once tell it once."""

import pytest

from megatron_espo.config import Run
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
        _report_failure(Run(dir=str(tmp_path)), watchdog, RuntimeError(cause))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "RuntimeError: first" in told[0] and len(told) == (1 if folder_is_cleared else 2), (
        "rather twice than never"
    )


def test_a_later_rank_leaves_the_first_cause(tmp_path):
    Watchdog.clear(tmp_path)
    write_status(tmp_path, "failed", "the cause")
    _report_failure(
        Run(dir=str(tmp_path)),
        Watchdog(tmp_path, 0, 1, limit_s=1.0, slow_s=1.0, log=print),
        RuntimeError("a consequence"),
    )
    assert read_json(tmp_path / "status.json")["why"] == "the cause"


@pytest.mark.parametrize(
    ("resume", "latest", "words"),
    [
        ("latest", None, "starts again"),
        ("latest", "step_000040", "continues from step_000040"),
        ("step_000020", "step_000040", "continues from step_000020"),
        ("never", "step_000040", "starts again"),
    ],
)
def test_where_the_same_command_continues(tmp_path, capsys, resume, latest, words):
    (tmp_path / "checkpoints").mkdir()
    if latest:
        (tmp_path / "checkpoints" / "latest").write_text(latest + "\n")
    Watchdog.clear(tmp_path)
    write_status(tmp_path, "running")
    watchdog = Watchdog(tmp_path, 0, 1, limit_s=1.0, slow_s=1.0, log=print)
    _report_failure(Run(dir=str(tmp_path), resume=resume), watchdog, KeyboardInterrupt())
    line = capsys.readouterr().err
    assert "KeyboardInterrupt" in line and f"the same command {words}" in line
