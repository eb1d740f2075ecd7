"""``tools/gpu_check.py``: outcomes of steps, and every stage at tiny size."""

import json
import sys

import pytest

from tools import gpu_check
from tools.gpu_check import Step


@pytest.fixture
def one_stage(monkeypatch, tmp_path):
    """Run a stage with the given steps; return the exit code and the rows of the JSON by name."""

    def run(*steps: Step, arguments: tuple[str, ...] = ()) -> tuple[int, dict]:
        monkeypatch.setattr(gpu_check, "PROBE", "print('[null, null]')")
        monkeypatch.setattr(gpu_check.Plan, "kernels", lambda plan: (step for step in steps))
        words = ["gpu_check", "--stages", "a", "--out", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", words)
        code = gpu_check.main()
        report = json.loads((tmp_path / "a.json").read_text())
        assert report["ok"] == (code == 0)
        assert {"device", "date", "versions"} <= report.keys()
        return code, {row["step"]: row for row in report["steps"]}

    return run


def python(name: str, code: str, limit: float = 20, **options) -> Step:
    return Step(name, ["-c", code], limit, **options)


def test_a_step_that_fails_or_hangs_ends_no_other_step(one_stage, tmp_path, capsys):
    child = "import subprocess; subprocess.run(['sleep', '60'])"
    code, rows = one_stage(
        python("broken", "print('result: x 1'); raise ValueError('why')"),
        python("hangs", child, limit=1),
        python("silent", "print('skipped: no result')"),
        python("lacks", "", needs=("no_such_module",)),
        python("works", "print('result: rate 2,000.5 tokens in 1e-3 s of H100')"),
    )
    assert code == 1
    failed = {name for name, row in rows.items() if not row["outcome"].startswith(("ok", "skip"))}
    assert failed == {"broken", "hangs", "silent"}
    assert rows["broken"]["outcome"].endswith("ValueError: why")
    assert rows["hangs"]["seconds"] < 30
    assert rows["lacks"]["outcome"] == "skipped: no_such_module not installed"
    assert rows["works"]["outcome"] == "ok"
    assert rows["works"]["values"] == [["rate tokens in s of H100", [2000.5, 1e-3]]]
    assert "why" in (tmp_path / "a-broken.txt").read_text()
    assert "rate 2,000.5 tokens" in capsys.readouterr().out


def test_skipped_steps_are_no_failure_and_the_limit_is_that_of_all_steps(one_stage):
    works, lacks = python("works", "print('result: x 1')"), Step("lacks", [], 1, needs=("no_such",))
    assert one_stage(works, lacks)[0] == 0
    code, rows = one_stage(works, arguments=("--limit", "0"))
    assert code == 1 and rows["works"]["outcome"].startswith("not started")


def test_later_engines_run_without_graphs_if_the_first_one_fails():
    """If the engine with CUDA graphs fails, the same stage runs one without."""
    plan = gpu_check.Plan(True, True, False, {}, None)
    steps = plan.engine()
    assert '"eager": false' in next(steps).command[-1]
    assert '"eager": true' in steps.send(True).command[-1] and plan.eager
    plan.eager = False
    steps = plan.engine()
    next(steps)
    assert "pytest" in steps.send(False).command and not plan.eager


@pytest.mark.slow
@pytest.mark.parametrize("stage", "abcde")
def test_stages_at_tiny_size(tmp_path, monkeypatch, stage):
    words = ["gpu_check", "--stages", stage, "--out", str(tmp_path), "--tiny"]
    monkeypatch.setattr(sys, "argv", words)
    code = gpu_check.main()
    logs = {path.name: path.read_text()[-3000:] for path in tmp_path.glob("*.txt")}
    assert code == 0, logs
    rows = json.loads((tmp_path / f"{stage}.json").read_text())["steps"]
    assert any(row["values"] for row in rows)
    skipped = [row["outcome"] for row in rows if row["outcome"] != "ok"]
    assert set(skipped) <= {"skipped: transformer_engine not installed"}
