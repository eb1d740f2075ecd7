"""The terminal's screen says what the run's files say, follows them as they grow, and ends with the run."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from rich.console import Console

from megatron_espo import cli
from megatron_espo.report.tail import RunView, sparkline
from tests.distributed import ROOT
from tests.test_report import write_run


def screen(view: RunView, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(view.render(width))
    return console.file.getvalue()


def test_one_screen_shows_the_run(tmp_path):
    view = RunView(write_run(tmp_path / "run", 12))
    view.refresh()
    text = screen(view)
    lines = text.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert lines[0].startswith("run  ESPO on tiny  done") and "step 12 of 12, last step" in text
    row = next(line for line in lines if line.startswith("reward ")).split()
    assert row[1:4] == ["1.00", "0.083", "1.00"] and row[4] == sparkline([i / 12 for i in range(1, 13)], 18)
    assert "pass@k, held out" in text and "■ rollout" in text and "■ sync" in text


def test_new_lines_are_read_once_and_half_ones_later(tmp_path):
    folder = write_run(tmp_path / "run", 3)
    path = folder / "metrics.jsonl"
    first, second, third = path.read_text().splitlines(keepends=True)
    path.write_text(first + second[:50])
    view = RunView(folder)
    view.refresh()
    assert [line["step"] for line in view.lines] == [1]
    path.write_text(first + second)
    view.refresh()
    view.refresh()
    assert [line["step"] for line in view.lines] == [1, 2]
    path.write_text(first)  # the run went on from step 1
    view.refresh()
    assert [line["step"] for line in view.lines] == [1]
    path.write_text(first + third)
    view.refresh()
    assert [line["step"] for line in view.lines] == [1, 3]


def test_a_run_before_its_first_step(tmp_path, capsys):
    assert cli.main(["tail", str(tmp_path), "--once"]) == 0
    assert "waiting for the first step" in capsys.readouterr().out


def test_trouble_is_shown(tmp_path):
    folder = write_run(tmp_path / "run", 2)
    last = {"step": 3, "mismatch/logprob_gap_mean": 0.2, "reward/failed": 4.0, "sync/restarts": 1.0, "reward/mean": float("nan")}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(last) + "\n")
    (folder / "status.json").write_text('{"state": "requeue", "why": "SIGTERM", "rank": 0}')
    view = RunView(folder)
    view.refresh()
    text = screen(view, 120)
    for part in ("requeue: SIGTERM", "differ by 0.2 nats", "4 responses were not judged", "restarted 1 times", "×"):
        assert part in text


def start_tail(folder) -> subprocess.Popen:
    command = [sys.executable, "-m", "megatron_espo", "tail", str(folder), "--every", "0.1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "90", "LINES": "40"}
    # A shell that starts these tests in the background makes them, and their children, deaf to Ctrl-C.
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear)


@pytest.mark.parametrize("state, code", [("done", 0), ("failed", 1)])
def test_it_ends_when_the_run_ends(tmp_path, state, code):
    folder = write_run(tmp_path / "run", 2)
    (folder / "status.json").write_text('{"state": "running"}')
    process = start_tail(folder)
    timer = threading.Timer(2.5, (folder / "status.json").write_text, [json.dumps({"state": state, "why": "x"})])
    timer.start()
    began = time.monotonic()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code and errors == "" and time.monotonic() - began > 2
    assert f"ESPO on tiny  {state}" in output


def test_ctrl_c_ends_it(tmp_path):
    folder = write_run(tmp_path / "run", 2)
    (folder / "status.json").write_text('{"state": "running"}')
    process = start_tail(folder)
    time.sleep(4)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors == "" and "running" in output


def test_no_folder_is_a_mistake(tmp_path, capsys):
    assert cli.main(["tail", str(tmp_path / "gone")]) == 2
    assert "expected a run's folder, found none" in capsys.readouterr().err


def test_bars_reach_from_the_lowest_to_the_highest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0], 8) == "▁▁"
    assert sparkline([1.0, 3.0, 7.0, 9.0], 2) == "▁█"
    assert sparkline([1.0, float("nan"), 2.0], 8) == "▁×█"
