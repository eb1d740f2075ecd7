"""The study of objectives: equal compute, finished runs are kept, tables equal a count by hand."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_espo.config import load_config
from tests.support.distributed import ROOT

sys.path.insert(0, str(ROOT / "examples"))
import compare_objectives as study
from compare_report import BEGIN, END, OLDER, Run, claims, correlations, table, write_results


def jobs(out: Path, **changes):
    choice = {"seeds": [1, 2, 3], "tasks": list(study.TASKS), "variants": list(study.VARIANTS)}
    return list(study.plan(Namespace(**{**choice, "out": out, "overrides": [], **changes})))


def test_every_run_is_valid_and_has_the_same_compute(tmp_path):
    planned = jobs(tmp_path)
    assert len(planned) == 3 * (2 * 6 + 6 + 2) == len({job.folder for job in planned})
    # Seeds are complete one after the other, so an interrupted study has whole seeds.
    assert [job.seed for job in planned] == sorted(job.seed for job in planned)
    path = ROOT / "examples" / "quickstart.yaml"
    configs = [load_config(path, [f"run.dir={job.folder}", *job.settings]) for job in planned]
    varied = dict.fromkeys(("algorithm", "run", "data", "eval"), True)
    varied["rollout"] = {"max_staleness", "over_sampling_prompts"}
    assert len({config.model_dump_json(exclude=varied) for config in configs}) == 1
    for c in configs:
        assert (c.run.steps, c.rollout.max_resampling_rounds) == (10, 0)
        assert (c.algorithm.num_mini_batches, c.algorithm.num_epochs) == (4, 1)
        assert c.eval.task_args["seed"] != c.run.seed and c.eval.prompts == c.data.prompts
    assert {c.algorithm.objective for c in configs} == set(study.OBJECTIVES)


def test_a_finished_run_is_kept_and_other_settings_are_an_error(tmp_path):
    (job,) = jobs(tmp_path, seeds=[1], tasks=["sums"], variants=["espo"])
    job.folder.mkdir()
    (job.folder / "settings.json").write_text(json.dumps(job.settings))
    assert not job.finished(), "no summary"
    (job.folder / "summary.json").write_text("{}")
    assert not job.finished(), "no evaluation"
    (job.folder / "eval.jsonl").write_text("{}")
    assert job.finished()
    choice = {"seeds": [1], "tasks": ["sums"], "variants": ["espo"]}
    (longer,) = jobs(tmp_path, **choice, overrides=["run.steps=99"])
    with pytest.raises(SystemExit, match="run.steps=99"):
        longer.finished()


def run(task, variant, seed, rewards, clipped) -> Run:
    lines = [
        {"step": i, "reward/mean": reward, "policy/clipped": clipped}
        for i, reward in enumerate(rewards, 1)
    ]
    lines[0].pop("policy/clipped")  # a step that trained nothing
    return Run(task, variant, seed, lines)


RUNS = [
    run("sums", "espo", 1, [0, 0, 0.3, 0.6, 0.9], 0.5),
    run("sums", "espo", 2, [0, 0, 0, 0, 0.3], 0.7),
    run("sums", "grpo", 1, [0, 0, 0.3, 0.3, 0.3], 0.1),
    run("sums", "grpo", 2, [0, 0, 0.3, 0.3, 0.3], 0.1),
]


def test_the_table_and_the_pairs_equal_a_count_by_hand():
    cells = [[c.strip(" |") for c in row.split(" | ")] for row in table(RUNS).splitlines()[2:]]
    rows = {row[1]: row for row in cells}
    espo = "2; nan; 0.35 (0.10–0.60); 0.21 (0.06–0.36); nan; 0.60 (0.50–0.70); nan"
    assert rows["espo"][2:] == espo.split("; ")
    assert rows["grpo"][4] == "0.30 (0.30–0.30)"
    text = claims(RUNS)
    assert "ESPO ends with a higher reward than | grpo | 1 of 2 | +0.050 |" in text
    assert "(Figure 4) | grpo | 2 of 2 | +0.500 |" in text and "entropy" not in text


def test_rank_correlation_of_entropy_and_clipped_share_skips_the_first_step():
    """Ranks after the first step: (1, 2, 3), (1, 3, 2); 1 - 6 (0 + 1 + 1) / (3 (9 - 1)) = 0.5."""
    # The last step trained nothing.
    values = [(9, 9), (0.1, 0.2), (0.2, 0.9), (0.3, 0.8), (0.4, None)]
    lines = [
        {"policy/entropy": entropy} | ({"policy/clipped": clipped} if clipped else {})
        for entropy, clipped in values
    ]
    assert correlations([Run("sums", "espo", 1, lines)]).endswith(": espo +0.50.\n")


def test_each_variant_is_in_one_picture():
    assert OLDER == set(study.ASYNCHRONOUS) and not OLDER & set(study.ABLATIONS)
    assert all("-" not in name for name in study.OBJECTIVES)
    assert all(name.startswith("espo-") for name in study.ABLATIONS | study.ASYNCHRONOUS)


def test_the_page_keeps_the_text_around_the_results(tmp_path):
    found = []
    for one in RUNS:
        folder = tmp_path / f"{one.variant}-{one.seed}"
        folder.mkdir()
        (folder / "summary.json").write_text('{"seconds": 5}')
        (folder / "processor_seconds.json").write_text("7.2")
        metrics = "".join(json.dumps(line) + "\n" for line in one.lines)
        (folder / "metrics.jsonl").write_text(metrics)
        found.append((one.task, one.variant, one.seed, folder))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        write_results(found, tmp_path, page, "python study.py")
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith(f"{END}\nafter\n")
        assert "old" not in text and text.count("`python study.py` on ") == 1
    charts = {path.name for path in tmp_path.glob("*.png")}
    assert charts == {"study-sums.png", "study-clipping.png"}
    text = (ROOT / "docs" / "study.md").read_text()
    assert BEGIN in text and END in text
