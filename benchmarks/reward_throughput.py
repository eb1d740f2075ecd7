"""Seconds to judge 1,000 math answers with math-verify in worker processes, and hostile answers.

python benchmarks/reward_throughput.py [--answers 1000] [--workers 2]
"""

import argparse
import os
import time
from contextlib import closing

from megatron_espo.config import Reward
from megatron_espo.rewards.functions import load_math_verify
from megatron_espo.rewards.pool import RewardPool
from megatron_espo.types import Prompt

# Answer, end of the response, verdict.
ANSWERS = [
    ("{n}", "\\boxed{{{n}}}", 1.0),
    ("{n}", "the answer is {n}.", 1.0),
    ("{n}", "so \\boxed{{{n} + 1}}", 0.0),
    ("\\frac{{{n}}}{{7}}", "\\boxed{{\\dfrac{{{n}}}{{7}}}}", 1.0),
    ("{n}\\sqrt{{2}}", "$\\boxed{{\\sqrt{{2}} \\cdot {n}}}$", 1.0),
    ("x^2 + {n}x", "\\boxed{{x(x + {n})}}", 1.0),
    ("(-\\infty, {n}]", "\\boxed{{(-\\infty, {n}]}}", 1.0),
    ("\\{{1, {n}\\}}", "\\boxed{{\\{{{n}, 1\\}}}}", 1.0),
]
REASONING = (
    "Let us write $a_{k+1} = 3a_k - 2$ and look at small cases: for k = 1 this is $\\frac{5}{2}$, "
    "which is not whole. "
) * 10
HOSTILE = {
    "9^9^9^9": "\\boxed{9^{9^{9^9}}}",
    "9**9**9**9": "9**9**9**9",
    "2,000 nested fractions": "\\boxed{" + "\\frac{1}{" * 2000 + "2" + "}" * 2001,
    "10,000 open brackets": "\\boxed{" + "(" * 10_000 + "1" + ")" * 10_000 + "}",
    "100 kB of digits": "\\boxed{" + "7" * 100_000 + "}",
    "100 kB of dollar signs": "$" * 100_000,
    "100 kB of \\boxed{": "\\boxed{" * 14_000,
}


def make_items(count: int) -> tuple[list[tuple[Prompt, str]], list[float]]:
    """``count`` different pairs of prompt and response, each of about 1 kB, and their verdicts."""
    items, verdicts = [], []
    for i in range(count):
        answer, written, verdict = ANSWERS[i % len(ANSWERS)]
        prompt = Prompt(str(i), "", answer.format(n=i + 3), (1,))
        items.append((prompt, f"{REASONING}{written.format(n=i + 3)}"))
        verdicts.append(verdict)
    return items, verdicts


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    items, verdicts = make_items(args.answers)
    settings = Reward(workers=args.workers, timeout_s=5)
    with closing(RewardPool(settings, "math_verify")) as rewards:
        start = time.perf_counter()
        rewards.start()
        ready = time.perf_counter() - start
        print(f"{args.workers} workers: first one ready after {ready:.1f} s")
        start = time.perf_counter()
        scores = [future.result() for future in [rewards.submit(*item) for item in items]]
        taken = time.perf_counter() - start
        wrong = sum(score != verdict for score, verdict in zip(scores, verdicts, strict=True))
        rate = args.answers / taken
        print(
            f"{args.answers} answers: {taken:.1f} s, {rate:.0f} a second; wrong verdicts: {wrong}"
        )
        judge, start, sample = load_math_verify(), time.process_time(), items[:200]
        for item in sample:
            judge(*item)
        each = (time.process_time() - start) / len(sample) * 1e3
        load = os.getloadavg()[0]
        print(f"processor time of one answer: {each:.1f} ms (load average {load:.1f})")
        for name, response in HOSTILE.items():
            start = time.perf_counter()
            score = rewards.submit(Prompt(name, "", "9", (1,)), response).result()
            end = f"score {score:g}" if score is not None else rewards.last_failure
            print(f"{name}: {time.perf_counter() - start:.1f} s, {end}")


if __name__ == "__main__":
    main()
