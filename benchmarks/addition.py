"""The task of the step benchmark, for both trainers: "What is a + b?" with a, b in 1..20, the last integer judged."""

import json
import random
import re
from pathlib import Path

INTEGER = re.compile(r"-?\d+")


def write_prompts(path: Path, count: int, seed: int) -> None:
    """Writes ``count`` rows ``{"prompt": text, "answer": text}`` as JSONL."""
    rng = random.Random(seed)
    pairs = [(rng.randint(1, 20), rng.randint(1, 20)) for _ in range(count)]
    rows = [{"prompt": f"What is {a} + {b}? Answer with the number only.", "answer": str(a + b)} for a, b in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def judge(answer: str, response: str) -> float:
    """1.0 where the last integer in ``response`` is ``answer``, else 0.0."""
    found = INTEGER.findall(response)
    return float(bool(found) and found[-1] == answer)


def reward(prompt, response: str) -> float:
    """:func:`judge` as a reward function of megatron_espo."""
    return judge(prompt.answer, response)
