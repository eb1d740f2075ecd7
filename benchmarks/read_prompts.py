"""Seconds and memory of reading a large prompt file: ``python benchmarks/read_prompts.py``.

Writes Parquet files (text; chat messages with a nested answer) and a JSONL file of ``--rows`` short
rows, a hundred of them with each prompt, and reads each in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

QUESTION = "In triangle ABC, sin A = 4/5. Let BD = {}. Find AD, as m + n in lowest terms. "
NESTED = {"prompt": "prompt", "answer": "reward_model.ground_truth"}


def write_files(folder: Path, rows: int) -> dict[str, dict[str, str]]:
    """Write the three files; returns the columns of each."""
    texts = [QUESTION.format(i % max(rows // 100, 1)) * 2 for i in range(rows)]
    answers = [str(i % 997) for i in range(rows)]
    parquet.write_table(pa.table({"prompt": texts, "answer": answers}), folder / "text.parquet")
    with (folder / "text.jsonl").open("w") as file:
        for text, answer in zip(texts, answers, strict=True):
            file.write(json.dumps({"prompt": text, "answer": answer}) + "\n")
    chat = pa.array([[{"role": "user", "content": text}] for text in texts])
    nested = pa.array([{"ground_truth": answer, "style": "rule"} for answer in answers])
    table = pa.table({"prompt": chat, "reward_model": nested, "ability": ["MATH"] * rows})
    parquet.write_table(table, folder / "chat.parquet")
    return {"text.parquet": {}, "chat.parquet": NESTED, "text.jsonl": {}}


def read(path: str, columns: dict[str, str]) -> None:
    from megatron_espo.config.tasks import Source
    from megatron_espo.data.sources import read_rows

    start = time.perf_counter()
    rows = read_rows(Source(prompts=path, columns=columns), 0)
    seconds = time.perf_counter() - start
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{Path(path).name}: {len(rows):,} rows, {seconds:.1f} s, peak {gib:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_791_700)
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read(args.read[0], json.loads(args.read[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, columns in write_files(Path(folder), args.rows).items():
            file, text = str(Path(folder, name)), json.dumps(columns)
            subprocess.run([sys.executable, __file__, "--read", file, text], check=True)


if __name__ == "__main__":
    main()
