"""Seconds to judge 1,000 math answers with math-verify in the run's own worker processes, and what hostile answers cost.

    python benchmarks/reward_throughput.py [--answers 1000] [--workers 2]
"""

import argparse
import os
import time

from megatron_espo.config import Reward
from megatron_espo.rewards import RewardPool
from megatron_espo.rewards.functions import load_math_verify
from megatron_espo.types import Prompt

# Answer, what the model writes, whether that is right.
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
REASONING = "Let us write $a_{k+1} = 3a_k - 2$ and look at small cases: for k = 1 this is $\\frac{5}{2}$, which is not whole. " * 10
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
    """``count`` pairs of prompt and response, each of about 1 kB, and their verdicts; no two alike."""
    items, verdicts = [], []
    for i in range(count):
        answer, written, right = ANSWERS[i % len(ANSWERS)]
        n = i + 3
        items.append((Prompt(str(i), "", answer.format(n=n), (1,)), f"{REASONING}{written.format(n=n)}"))
        verdicts.append(right)
    return items, verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    items, verdicts = make_items(args.answers)
    with RewardPool(Reward(function="math_verify", workers=args.workers, timeout_s=5)) as rewards:
        began = time.perf_counter()
        rewards.start()
        started = time.perf_counter()
        scores = rewards.score(items)
        seconds = time.perf_counter() - started
        print(f"{args.workers} workers: first one ready after {started - began:.1f} s")
        print(f"{args.answers} answers: {seconds:.1f} s, {args.answers / seconds:.0f} a second; wrong verdicts: {sum(map(float.__ne__, scores, verdicts))}")
        judge, began = load_math_verify(), time.process_time()
        for item in items[:200]:
            judge(*item)
        print(f"processor time of one answer: {(time.process_time() - began) / 200 * 1e3:.1f} ms (load average {os.getloadavg()[0]:.1f})")
        for name, response in HOSTILE.items():
            before = time.perf_counter()
            (score,) = rewards.score([(Prompt(name, "", "9", (1,)), response)])
            end = f"score {score:g}" if score is not None else rewards.last_failure
            print(f"{name}: {time.perf_counter() - before:.1f} s, {end}")


if __name__ == "__main__":
    main()
