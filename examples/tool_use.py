"""Prompts and reward of ``examples/tool_use.sh``: products for a calculator.

python examples/tool_use.py > examples/tool_use.jsonl
"""

import json
import random
import re


def correct(prompt, response: str) -> float:
    """Return 1.0 where the last number after the last result is the answer."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", response.rpartition("</result>")[2])
    return float(bool(numbers) and numbers[-1].replace(",", "") == prompt.answer)


def rows(count: int = 200, seed: int = 0):
    """Yield chat prompts with one solved example. The factors have three digits."""
    draw = random.Random(seed)
    for _ in range(count):
        first, second = draw.randint(100, 999), draw.randint(100, 999)
        solved = "<tool>412 * 365</tool>\n<result>150380</result>\n150380"
        prompt = [
            {"role": "user", "content": "What is 412 * 365?"},
            {"role": "assistant", "content": solved},
            {"role": "user", "content": f"What is {first} * {second}?"},
        ]
        yield {"prompt": prompt, "answer": str(first * second)}


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
