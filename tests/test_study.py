"""The study of objectives: equal compute, finished runs are kept, tables equal a count by hand."""

import json
import math
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from megatron_espo.config import load_config
from tests.support.distributed import ROOT

sys.path.insert(0, str(ROOT / "examples"))
import compare_objectives as study
import compare_report as report
import study_sums
from compare_report import EVERY, Run


def jobs(out: Path, steps: int = 300) -> list[study.Job]:
    args = Namespace(objectives=list(study.OBJECTIVES), seeds=[2, 3, 4], steps=steps, out=out)
    return study.tuning(args) + study.final(args, dict.fromkeys(study.OBJECTIVES, 3e-5))


def test_runs_of_a_phase_differ_only_in_what_is_compared(tmp_path):
    planned = jobs(tmp_path)
    assert len(planned) == 3 * 6 + 3 * 6 + 3 * len(study.ABLATIONS)
    assert len({job.folder for job in planned}) == len(planned)
    tuned = {job.seed for job in planned if job.phase == "tuning"}
    assert not tuned & {job.seed for job in planned if job.phase != "tuning"}
    configs = []
    for job in planned:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(job.settings()))
        configs.append(load_config(path))
        split = "validation" if job.phase == "tuning" else "test"
        assert configs[-1].eval.prompts == str(tmp_path / "sums" / f"{split}.jsonl")
    varied = {"algorithm": True, "optimizer": {"lr"}, "eval": {"prompts"}}
    varied |= {"run": {"dir", "seed", "steps"}, "rollout": {"max_staleness"}}
    assert len({config.model_dump_json(exclude=varied) for config in configs}) == 1
    objectives = [c for c in configs if c.run.steps == 300]
    assert {c.algorithm.objective for c in objectives} == set(study.OBJECTIVES)
    same = {c.algorithm.model_dump_json(exclude={"objective"}) for c in objectives}
    assert len(same) == 1 and objectives[0].algorithm.num_mini_batches == 4


def test_a_finished_run_is_kept_and_other_settings_are_an_error(tmp_path):
    job, *_ = jobs(tmp_path)
    job.folder.mkdir()
    job.file(".yaml").write_text(yaml.safe_dump(job.settings()))
    assert not job.finished(), "no summary"
    (job.folder / "summary.json").write_text("{}")
    assert not job.finished(), "no evaluation"
    (job.folder / "eval.jsonl").write_text("{}")
    assert job.finished()
    longer, *_ = jobs(tmp_path, steps=600)
    with pytest.raises(SystemExit, match=r"\.yaml: not the settings of this call"):
        longer.finished()


def test_solutions_are_right_and_the_sum_counts():
    assert study_sums.solution(347, 586) == "7+6=13,4+8+1=13,3+5+1=9;933"
    prompt = Namespace(answer="933")
    assert study_sums.correct(prompt, study_sums.solution(347, 586)) == 1
    assert study_sums.correct(prompt, "7+6=13;93") == study_sums.correct(prompt, "") == 0
    some = study_sums.pairs(5000, seed=1)
    assert len(set(some)) == 5000 and all(100 <= x <= 999 for pair in some for x in pair)
    assert max(len(study_sums.solution(a, b)) for a, b in some) < study_sums.RESPONSE_TOKENS


def run(variant, seed, accuracy, phase="final", rate=1e-5, clipped=(0.1, 0.3, 0.2)) -> Run:
    curves = {name: [0.5] * len(accuracy) for name in report.COLUMNS}
    curves |= {"accuracy": list(accuracy), "entropy": [9, 2, 3], "clipped": list(clipped)}
    return Run(phase, variant, rate, seed, curves)


RUNS = [
    run("espo", 1, [0.1, 0.2, 0.4], phase="tuning"),
    run("espo", 1, [0.9, 0.3, 0.2], phase="tuning", rate=3e-5),
    run("espo", 2, [0.5, 0.8, 0.9]),
    run("espo", 3, [0.5, 0.6, 0.7]),
    run("grpo", 2, [0.9, 0.5, 0.4]),
    run("grpo", 3, [0.5, 0.8, 0.8]),
    run("espo-one-group", 2, [0.5, 0.6, 0.5], phase="ablation"),
]


def test_tables_equal_a_count_by_hand():
    assert report.choose_rates(RUNS) == {"espo": 1e-5}  # 0.3 against 0.25
    assert "| espo | **0.300** | 0.250 |" in report.tuning_table(RUNS)
    # Half of the 95% interval of two values: 12.706 x 0.1414 / sqrt(2).
    text = report.table(report.groups(RUNS, "final"))
    assert "| espo | 2 | 0.800 (0.700–0.900) ± 1.271 |" in text
    assert text.splitlines()[2].endswith("| 0 | 40, never |")
    assert text.splitlines()[3].endswith("| 1 | 20, 40 |")  # 0.4 < 0.9 / 2
    of = report.groups(RUNS, "final")
    assert "| grpo | +0.200 ± 3.812 | 1 of 2 |" in report.differences(of, of["espo"])
    assert "| espo-one-group | +0.400 | 1 of 1 |" in report.results(RUNS)


def test_rank_correlation_skips_the_first_mean():
    assert report.correlations({"espo": [run("espo", 2, [0.5] * 3)]}) == "espo -1.00"


def test_a_run_is_read_as_means_and_kept_as_csv(tmp_path):
    lines = [{"step": i, "reward/mean": float(i > EVERY)} for i in range(1, 2 * EVERY + 1)]
    lines[EVERY - 1] |= {"eval/avg@1": 0.25, "policy/clipped": 0.5, "policy/no_gradient": 0.125}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = report.read_run("final", "espo", 3e-5, 2, tmp_path)
    assert read.curves["reward"] == [0, 1] and read.curves["accuracy"][0] == 0.25
    assert read.curves["with_gradient"][0] == 0.875 and math.isnan(read.curves["clipped"][1])
    report.write_csv([read], tmp_path / "study.csv")
    (again,) = report.read_csv(tmp_path / "study.csv")
    assert str(again) == str(read)


def test_the_page_keeps_the_text_around_the_results(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.write_results(RUNS, {"2026-01-01 10:00": 1800.0}, page)
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith(f"{report.END}\nafter\n")
        assert "old" not in text and text.count("0.50 hours from 2026-01-01 10:00") == 1
        assert report.results(report.read_csv(tmp_path / "study.csv")) in text
    assert len(list(tmp_path.glob("study-*.png"))) == 3


@pytest.mark.parametrize("phases", [["tuning"], ["tuning", "ablation"], ["tuning", "final"]])
def test_a_study_that_is_not_finished_has_a_page(tmp_path, phases):
    runs = [run for run in RUNS if run.phase in phases]
    assert "| espo | **0.300**" in report.write_results(runs, {}, tmp_path / "page.md")


def test_the_published_page_follows_from_its_record():
    """The tables are those of ``study.csv``. Rates come from seeds that the other runs lack."""
    runs = report.read_csv(ROOT / "docs" / "study.csv")
    assert report.results(runs) in (ROOT / "docs" / "study.md").read_text()
    assert {run.phase for run in runs} == {"tuning", "final", "ablation"}
    rates = report.choose_rates(runs)
    assert rates.keys() == set(study.OBJECTIVES)
    for run in runs:
        assert (run.seed == study.TUNING_SEED) == (run.phase == "tuning")
        if run.phase != "tuning":
            assert run.rate == rates[run.variant.partition("-")[0]]
            assert len(run.curves["reward"]) * EVERY == (300 if run.phase == "final" else 100)
