"""The task of the step benchmark: "What is a + b?" with a, b in 1..20; the last integer counts."""

import json
import random
import re
from pathlib import Path

INTEGER = re.compile(r"-?\d+")


def write_prompts(path: Path, count: int, seed: int) -> None:
    """Write ``count`` rows ``{"prompt": text, "answer": text}`` as JSONL."""
    rng = random.Random(seed)
    with path.open("w") as stream:
        for _ in range(count):
            a, b = rng.randint(1, 20), rng.randint(1, 20)
            prompt = f"What is {a} + {b}? Answer with the number only."
            stream.write(json.dumps({"prompt": prompt, "answer": str(a + b)}) + "\n")


def judge(answer: str, response: str) -> float:
    """1.0 where the last integer in ``response`` is ``answer``, else 0.0."""
    found = INTEGER.findall(response)
    return float(bool(found) and found[-1] == answer)


def reward(prompt, response: str) -> float:
    """:func:`judge` as a reward function of megatron_espo."""
    return judge(prompt.answer, response)
