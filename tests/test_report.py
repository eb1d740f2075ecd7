"""The report's page contains the values of the run's files.

A real browser shows it at several widths and in both themes.
"""

import json
import math
import random
import re
import time
from pathlib import Path

import pytest

from megatron_espo import cli
from megatron_espo.config import Config
from megatron_espo.errors import InputError
from megatron_espo.monitoring.report.page import SAMPLE_TOKENS, number, sample_steps, write_report
from megatron_espo.monitoring.report.runs import read_runs
from tests.support.browser import Browser, find_browser

PHASES = {"rollout": 3.0, "reward": 0.5, "train": 4.0, "sync": 1.0}


def write_run(folder: Path, steps: int = 50, seed: int = 1) -> Path:
    """Write a run's folder with every file."""
    chance = random.Random(seed)
    folder.mkdir(parents=True)
    settings = {
        "run": {"dir": str(folder), "steps": steps, "seed": seed},
        "model": {"path": "m/tiny"},
    }
    config = Config.model_validate(settings | {"data": {"prompts": "reasoning_gym:chain_sum"}})
    (folder / "config.json").write_text(config.model_dump_json())
    lines, entropies, samples = [], [], []
    for step in range(1, steps + 1):
        line = {
            "step": step,
            "reward/mean": step / steps,
            "reward/standard_error": 0.05,
            "optimizer/lr": 1e-6,
        }
        line |= {
            f"time/{name}_s": seconds * (1 + chance.random()) for name, seconds in PHASES.items()
        }
        line["time/step_s"] = sum(line[f"time/{name}_s"] for name in PHASES)
        line |= {
            "mismatch/logprob_gap_mean": 1e-5,
            "mismatch/logprob_gap_max": 1e-3,
            "throughput/response_tokens_per_s": 100.0 + step,
        }
        for group in (0, 1):
            line |= {
                f"group{group}/entropy": 0.5 + 2 * group,
                f"group{group}/ratio": 1.0,
                f"group{group}/no_gradient": chance.random(),
            }
            line |= {f"group{group}/ratio_min": 0.9, f"group{group}/ratio_max": 1.1}
        if step % 10 == 0:
            line |= {
                "eval/avg@4": 0.3,
                "eval/avg@4_low": 0.2,
                "eval/avg@4_high": 0.4,
                "eval/pass@1": 0.3,
                "eval/pass@4": 0.6,
            }
            line |= {"eval/pass@4_low": 0.5, "eval/pass@4_high": 0.7}
        lines.append(line)
        counts = [[chance.randrange(50) for _ in range(64)] for _ in range(2)]
        entropies.append({"step": step, "highest": 10.0, "counts": counts, "boundaries": [1.5]})
        pieces = [chance.choice([" the", "<b>", "x" * 80, "\n", "", "漢"]) for _ in range(2000)]
        values = [chance.random() * 3 for _ in pieces]
        sample = {
            "step": step,
            "prompt_id": "p",
            "prompt": "<script>alert(1)</script>",
            "answer": "4",
            "response": "",
            "reward": 1.0,
        }
        sample |= {
            "advantage": 0.5,
            "finish_reason": "stop",
            "policy_versions": [step - 1],
            "tokens": [7] * len(pieces),
            "pieces": pieces,
        }
        samples += [
            sample | {"entropies": values, "groups": [int(v > 2) for v in values]},
            sample | {"entropies": None, "groups": None},
        ]
    for name, rows in {"metrics": lines, "entropy": entropies, "samples": samples}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"seconds": 600.0, "steps": steps}))
    (folder / "status.json").write_text(json.dumps({"state": "done", "why": None, "rank": 0}))
    (folder / "engine.log").write_text("INFO fine\nWARNING Error handling is on\n")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / "first"), write_run(folder / "warm start", 30, 2)]


@pytest.fixture(scope="module")
def pages(runs, tmp_path_factory):
    """The page of one run, the page of two runs, and the processor seconds of the first."""
    folder = tmp_path_factory.mktemp("pages")
    began = time.process_time()
    one = write_report(runs[:1], folder / "one.html")
    seconds = time.process_time() - began
    return one, write_report(runs, folder / "several.html"), seconds


def test_a_report_of_fifty_steps_is_quick_small_and_needs_no_network(pages):
    one, several, seconds = pages
    assert seconds < 10
    for page in (one, several):
        text = page.read_text()
        assert len(text.encode()) < 3e6
        assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|@import|url\((?!#)', text)
        assert "<script" not in text  # the prompt's is escaped


def test_the_page_contains_the_values_of_the_files(pages, runs):
    text = pages[0].read_text()
    assert "0.040 → 0.980" in text and "50 / 50" in text and "finished" in text
    lines = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert number(sum(line["time/step_s"] for line in lines) / 50) in text
    assert "interval 0.200 – 0.400" in text and "problems" not in text
    compared = pages[1].read_text()
    for run in read_runs(runs):
        assert run.phases == list(PHASES)
        assert f"<b>{run.name}</b>: mean step {run.mean('time/step_s'):.2f} s" in compared
    assert "warm start" in compared and "2 runs compared" in compared
    differing = set(re.findall(r"<td>([\w.]+) ≠</td>", compared))
    assert differing == {"run.dir", "run.seed", "run.steps"}


def test_the_heat_is_the_entropy_and_long_samples_are_truncated(runs):
    run = read_runs(runs[:1])[0]
    steps = sample_steps(run)
    assert [at["step"] for at in steps] == [1, 11, 21, 30, 40, 50]
    highest = max(e for at in steps for s in at["samples"] for e in s["entropies"] or [0])
    trained, untrained = steps[0]["samples"]
    for token, value, group in zip(
        trained["shown"], trained["entropies"], trained["groups"], strict=False
    ):
        assert token["heat"] == round(100 * value / highest) and token["top"] == (group == 1)
    assert len(trained["shown"]) == SAMPLE_TOKENS and trained["cut"] == 2000 - SAMPLE_TOKENS
    assert {token["heat"] for token in untrained["shown"]} == {0}


def test_problems_are_listed(tmp_path):
    folder = write_run(tmp_path / "run", 4)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[3]) | {
        "optimizer/grad_norm": math.nan,
        "reward/failed": 3.0,
        "sync/restarts": 2,
        "optimizer/skipped": 0.5,
        "mismatch/logprob_gap_mean": 0.2,
    }
    repeated = json.loads(lines[0]) | {"reward/mean": 0.125}
    (folder / "metrics.jsonl").write_text(
        "\n".join([*lines[:2], json.dumps(last), json.dumps(repeated)]) + '\n{"step": 5, "rew'
    )
    (folder / "status.json").write_text(
        '{"state": "failed", "why": "EngineError: gave up", "rank": 0}'
    )
    (folder / "summary.json").write_text('{"steps": 2, "performance": {"step_s": 1}}')
    (folder / "engine-rank1.log").write_text("torch.OutOfMemoryError: none left\n")
    (folder / "engine.log").write_text(
        "x\n  File y\nvllm.errors.DeadError: gone\n"
        "(Main pid=3) WARNING 11-23 [a.py:1] ValueError: no\n" * 2
    )
    run = read_runs([folder])[0]
    assert run.series("reward/mean") == ([1, 2, 4], [0.125, 0.5, 1.0])
    expected = [
        ("the run failed after step 4", "EngineError: gave up"),
        ("no metrics of 1 steps: 3",),
        ("optimizer/grad_norm is NaN or infinite", "steps 4"),
        ("restarts of the rollout engine", ": 2, in steps 4"),
        ("updates skipped", "bad_batches/), in steps 4"),
        ("responses not judged", ": 3, in steps 4"),
        ("engine and trainer differ by more than 0.05 nats", "steps 4"),
        ("engine.log: vllm.errors.DeadError: gone (2 times)",),
        ("engine.log: ValueError: no (2 times)",),
        ("engine-rank1.log: torch.OutOfMemoryError: none left",),
    ]
    for problem, words in zip(run.problems(), expected, strict=True):
        assert all(word in problem for word in words), problem
    assert "gave up" in write_report([folder]).read_text()
    assert not run.summary, "it is of the first two steps"


def test_a_folder_with_only_one_step_can_be_reported(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    page = write_report([tmp_path])
    assert page == tmp_path / "report.html" and "had not finished" in page.read_text()


def test_a_folder_without_steps_raises(tmp_path, capsys):
    with pytest.raises(InputError, match="expected a run's folder with at least one step"):
        read_runs([tmp_path])
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err


def test_the_command_prints_the_path(runs, tmp_path, capsys):
    assert cli.main(["report", str(runs[1]), "--out", str(tmp_path / "x" / "page.html")]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'x' / 'page.html'}\n"


def test_the_page_of_a_long_run_is_small(tmp_path):
    chance, folder = random.Random(1), tmp_path / "long"
    folder.mkdir()
    names = ("reward/mean", "optimizer/grad_norm", "rollout/length_mean", "time/train_s")
    lines = [{"step": i} | {name: chance.random() for name in names} for i in range(1, 5001)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(write_report([folder]).read_bytes()) < 4e5


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0.000"),
        (0.5, "0.500"),
        (12.345, "12.3"),
        (1234.56, "1,234.6"),
        (2e-6, "2.00e-06"),
        (math.nan, "–"),
        (None, "–"),
    ],
)
def test_number_format(value, text):
    assert number(value) == text


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    browser = Browser(program)
    yield browser
    browser.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_a_browser_shows_the_page(browser, pages, width, dark):
    for page in pages[:2]:
        browser.requests.clear()
        browser.open(page, width=width, dark=dark)
        assert browser.complaints == [] and browser.requests == [page.resolve().as_uri()]
        assert browser.evaluate("document.documentElement.scrollWidth") == width, "scrolls sideways"
        assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth)")
        boxes = "[...document.images].map(i => i.getBoundingClientRect())"
        boxes += ".map(b => [b.width, b.height, b.right])"
        found = browser.evaluate(boxes)
        assert len(found) >= 12 and all(
            w > 250 and h > 120 and right <= width for w, h, right in found
        )
        ground, ink = browser.evaluate(
            "(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))"
        )
        assert (brightness(ground) < 64) == dark and (brightness(ink) > 192) == dark
        inverted = browser.evaluate("getComputedStyle(document.images[0]).filter") != "none"
        assert inverted == dark


def brightness(color: str) -> float:
    red, green, blue = map(int, re.findall(r"\d+", color)[:3])
    return 0.3 * red + 0.6 * green + 0.1 * blue
