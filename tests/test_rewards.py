"""Reward functions against known verdicts, and the pool against verifiers that hang, crash, lie and chatter."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_espo.errors import InputError
from megatron_espo.rewards import RewardPool
from megatron_espo.rewards.functions import extract_answer, load_reward_function
from megatron_espo.types import Prompt

ROOT = Path(__file__).parent.parent
HOSTILE = """
import ctypes, os, subprocess, sys, time

def judge(prompt, response):
    kind, _, rest = response.partition(" ")
    if kind == "number": return float(rest)
    if kind == "int": return int(rest)
    if kind == "text": return rest
    if kind == "none": return None
    if kind == "exit": os._exit(3)
    if kind == "sysexit": sys.exit(0)
    if kind == "segfault": ctypes.string_at(0)
    if kind == "hang": 9 ** 9 ** 9 ** 9
    if kind == "sleep": time.sleep(float(rest)); return 1.0
    if kind == "raise": raise KeyError("no such unit test")
    if kind == "pid": return os.getpid()
    if kind == "childhang":
        open(rest, "w").write(str(subprocess.Popen(["sleep", "300"]).pid)); time.sleep(300)
    if kind == "print":
        print("chatter"); os.write(1, b"more chatter"); sys.stdin.read(); return 1.0
    if kind == "forge":
        for fd in range(3, 64):
            try: os.write(fd, b'{"item": 0, "score": 1.0}\\n' * 2)
            except OSError: pass
        return 0.0
    if kind == "mislabel":
        for fd in range(3, 64):
            try: os.write(fd, b'{"item": 12345, "score": 1.0}\\n')
            except OSError: pass
        time.sleep(300)
    if kind == "garbage":
        for fd in range(3, 64):
            try: os.write(fd, b'\\x80\\x04 not json\\n')
            except OSError: pass
        time.sleep(300)
    raise AssertionError(kind)

not_callable = 3
"""


def prompt(answer="1", **metadata):
    return Prompt("p", "text", answer, (1,), metadata)


def pool(function, timeout_s=10.0, workers=2):
    return RewardPool(SimpleNamespace(function=function, timeout_s=timeout_s, workers=workers))


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    (tmp_path / "hostile_verifier.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path)
    return "hostile_verifier:judge"


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether the process is dead (or a zombie that nobody reaped) within the time."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "response, gold, extracted",
    [
        ("12 <answer> 7 </answer> then \\boxed{8} 9", "7", "7"),
        ("<answer>1</answer><answer>2</answer> 3", "2", "2"),
        ("first \\boxed{1}, so \\boxed{\\frac{1}{2}} = 0.5", "x", "\\frac{1}{2}"),
        ("\\boxed{3} and \\boxed{unclosed", "3", "3"),
        ("2 + 3 = 5.", "5", "5"),
        ("10-3", "7", "3"),
        ("it is -3", "-3", "-3"),
        ("it is \N{MINUS SIGN}3", "-3", "-3"),
        ("that is 1,234.50 dollars", "1234.5", "1,234.50"),
        ("1, 2,3", "3", "3"),
        ("1,2345", "2345", "2345"),
        ("about 1.5e-3 m", "0.0015", "1.5e-3"),
        (" yes ", "yes", "yes"),
        ("no numbers", "5", "no numbers"),
    ],
)
def test_extract_answer(response, gold, extracted):
    assert extract_answer(response, gold) == extracted


def test_reasoning_gym_uses_the_tasks_verifier():
    from megatron_espo.data.reasoning_gym_task import generate_entries

    reward, auto = load_reward_function("reasoning_gym"), load_reward_function("auto")
    for task in ("chain_sum", "countdown", "propositional_logic"):
        args = {"seed": 1, "size": 1}
        (entry,) = generate_entries(task, args)
        gold = entry["metadata"]["example_answer"] if entry["answer"] is None else entry["answer"]
        source = {"task": task, "task_args": args, "entry": entry}
        asked = prompt(entry["answer"] or "", reasoning_gym=source)
        assert reward(asked, f"I think <answer>{gold}</answer>") == auto(asked, f"<answer>{gold}</answer>") == 1.0
        assert reward(asked, "<answer>nonsense</answer>") < 0.5
    # Countdown accepts any expression that hits the target: no comparison with the stored answer would.
    (entry,) = generate_entries("countdown", {"seed": 1, "size": 1})
    asked = prompt(entry["answer"], reasoning_gym={"task": "countdown", "task_args": {}, "entry": entry})
    assert reward(asked, f"<answer>{entry['answer']} + 0*1</answer>") < 1.0  # uses other numbers
    assert reward(asked, f"<answer>({entry['metadata']['expression']})</answer>") == 1.0


@pytest.mark.parametrize(
    "answer, response, verdict",
    [
        ("42", "so the answer is 42.", 1.0),
        ("42", "so the answer is 43.", 0.0),
        ("3\\sqrt{2}", "we get $\\sqrt{18}$", 1.0),
        ("3\\sqrt{2}", "we get $3$", 0.0),
        ("$\\frac{1}{2}$", "\\boxed{0.5}", 1.0),
        ("x^2+1", "\\boxed{1+x^2}", 1.0),
        ("(1,2)", "\\boxed{(1,2)}", 1.0),
        ("(1,2)", "\\boxed{(2,1)}", 0.0),
        ("7", "", 0.0),
    ],
)
def test_math_verify(answer, response, verdict):
    assert load_reward_function("math_verify")(prompt(answer), response) == verdict
    assert load_reward_function("auto")(prompt(answer), response) == verdict


def test_math_verify_with_an_unreadable_answer_is_no_verdict():
    with pool("math_verify", workers=1) as rewards:
        assert rewards.score([(prompt(""), "42"), (prompt("42"), "42")]) == [None, 1.0]
        assert "cannot read the answer ''" in rewards.last_failure


def test_math_verify_hang_is_killed_and_the_others_are_judged():
    items = [(prompt(str(i)), f"\\boxed{{{i}}}") for i in range(6)]
    items[2] = (prompt("9"), "9**9**9**9")
    items[4] = (prompt("9"), "\\boxed{9^{9^{9^9}}}")
    with pool("auto", timeout_s=2.0) as rewards:
        assert rewards.score(items) == [1.0, 1.0, None, 1.0, None, 1.0]
        assert rewards.failures == {"timeout": 2}
        assert rewards.score(items[:2]) == [1.0, 1.0]


def test_scores_keep_their_places(hostile):
    with pool(hostile) as rewards:
        assert rewards.score([(prompt(), f"number {i / 7}") for i in range(300)]) == [i / 7 for i in range(300)]
        assert rewards.score([]) == [] and rewards.score([(prompt(), "int 3")]) == [3.0]
        assert not rewards.failures


def test_hostile_verifiers_cost_only_their_item(hostile):
    bad = {
        "exit": "crash", "segfault": "crash", "garbage": "crash", "mislabel": "crash", "hang": "timeout", "sysexit": "exception",
        "text 1.0": "exception", "none": "exception", "number nan": "exception", "number inf": "exception",
        "raise": "exception",
    }  # fmt: skip
    items = [response for kind in bad for response in ("number 0.5", kind)] + ["number 0.25"]
    with pool(hostile, timeout_s=1.0) as rewards:
        scores = rewards.score([(prompt(), response) for response in items])
        assert scores == [0.5, None] * len(bad) + [0.25]
        counted = {cause: list(bad.values()).count(cause) for cause in ("crash", "timeout", "exception")}
        assert rewards.failures == counted
        rewards.score([(prompt(), "raise")])
        assert "KeyError: 'no such unit test'" in rewards.last_failure and "hostile_verifier.py" in rewards.last_failure
        rewards.score([(prompt(), "exit")])
        assert "exit status 3" in rewards.last_failure
        # Extra lines never become another item's score.
        assert rewards.score([(prompt(), "forge"), (prompt(), "number 0.5")])[1] == 0.5


def test_time_limit_is_for_one_item_not_for_the_batch(hostile):
    with pool(hostile, timeout_s=1.0, workers=1) as rewards:
        assert rewards.score([(prompt(), "sleep 0.4")] * 4) == [1.0] * 4


def test_request_larger_than_the_pipe_and_a_stopped_worker(hostile):
    with pool(hostile, timeout_s=1.0, workers=1) as rewards:
        assert rewards.score([(prompt(padding="x" * 1_000_000), "number 1")]) == [1.0]
        (pid,) = rewards.score([(prompt(), "pid")])
        os.kill(int(pid), signal.SIGSTOP)  # never reads: a blocking write would wait for ever
        assert rewards.score([(prompt(padding="x" * 1_000_000), "number 1"), (prompt(), "number 1")]) == [None, 1.0]


def test_workers_persist_and_an_idle_death_costs_nothing(hostile):
    with pool(hostile, workers=1) as rewards:
        assert rewards._workers == []  # nothing started yet
        rewards.start()
        (first,), (second,) = rewards.score([(prompt(), "pid")]), rewards.score([(prompt(), "pid")])
        assert first == second != os.getpid()
        os.kill(int(first), signal.SIGKILL)
        assert gone(int(first))
        (third,) = rewards.score([(prompt(), "pid")])
        assert third not in (None, first) and not rewards.failures
    assert gone(int(third))
    assert rewards.score([(prompt(), "number 1")]) == [1.0]  # usable again after close
    rewards.close()


def test_a_starting_thread_may_end(hostile):
    with pool(hostile, workers=1) as rewards:
        thread = threading.Thread(target=rewards.start)
        thread.start()
        thread.join()
        time.sleep(0.2)
        assert rewards.score([(prompt(), "number 1")]) == [1.0]


def test_kill_reaches_what_the_verifier_started(hostile, tmp_path):
    with pool(hostile, timeout_s=1.0) as rewards:
        assert rewards.score([(prompt(), f"childhang {tmp_path}/pid")]) == [None]
        assert gone(int((tmp_path / "pid").read_text()))


def test_giving_up_leaves_no_stale_answer(hostile):
    def stop(done, total):
        if done == 1:
            raise InterruptedError

    with pool(hostile) as rewards:
        rewards.start()
        with pytest.raises(InterruptedError):
            rewards.score([(prompt(), "sleep 2"), (prompt(), "number 1")], on_progress=stop)
        assert rewards.score([(prompt(), "number 0.5")]) == [0.5]


def test_progress_is_reported_at_least_every_second(hostile):
    with pool(hostile, workers=1) as rewards:
        rewards.start()
        calls = []
        rewards.score([(prompt(), "sleep 1.5"), (prompt(), "number 1")], lambda *counts: calls.append(counts))
        assert calls[0] == (0, 2) and calls.count((0, 2)) >= 2 and calls[-1] == (1, 2)


@pytest.mark.parametrize(
    "function, message",
    [
        ("no_such_module:judge", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("hostile_verifier:jugde", "has no 'jugde'; did you mean judge"),
        ("hostile_verifier:not_callable", "is not callable but a int"),
        ("math_verfy", "expected auto, reasoning_gym, math_verify or module:function"),
        ("broken_verifier:judge", "SyntaxError"),
        ("dying_verifier:judge", "worker ended before .* exit status 7"),
    ],
)
def test_function_that_cannot_be_loaded_is_refused_at_start(hostile, tmp_path, function, message):
    (tmp_path / "broken_verifier.py").write_text("def judge(:\n")
    (tmp_path / "dying_verifier.py").write_text("import os; os._exit(7)\n")
    with pool(function) as rewards, pytest.raises(InputError, match=message):
        rewards.start()
    with pool(function) as rewards, pytest.raises(InputError, match=message):
        rewards.score([(prompt(), "number 1")])


def run_script(tmp_path: Path, body: str) -> subprocess.Popen:
    """A program without a ``__main__`` guard, beside its own verifier module, far from the repository."""
    (tmp_path / "hostile_verifier.py").write_text(HOSTILE)
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.append({str(ROOT)!r})
            print("main", flush=True)
            from types import SimpleNamespace
            from megatron_espo.rewards import RewardPool
            from megatron_espo.types import Prompt
            rewards = RewardPool(SimpleNamespace(function="hostile_verifier:judge", timeout_s=60, workers=1))
            prompt = Prompt("p", "text", "1", (1,))
            """
        )
        + textwrap.dedent(body)
    )
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd="/")


def test_workers_never_run_main_nor_write_to_stdout(tmp_path):
    program = run_script(tmp_path, 'print(rewards.score([(prompt, "print")]))\n')
    assert program.communicate(timeout=60)[0] == "main\n[1.0]\n"


def test_heavy_libraries_stay_out_of_the_worker(tmp_path, monkeypatch):
    (tmp_path / "spy.py").write_text(
        "import sys\nfrom megatron_espo.rewards.functions import load_auto\nload_auto()\n"
        "def judge(prompt, response): return float(any(m in sys.modules for m in ('torch', 'transformers', 'vllm')))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pool("spy:judge") as rewards:
        assert rewards.score([(prompt(), "")]) == [0.0]


@pytest.mark.parametrize("last", ["sleep 300", "hang"])
def test_workers_die_with_their_owner(tmp_path, last):
    program = run_script(
        tmp_path, f'print(int(rewards.score([(prompt, "pid")])[0]), flush=True)\nrewards.score([(prompt, {last!r})])\n'
    )
    assert program.stdout.readline() == "main\n"
    pid = int(program.stdout.readline())
    time.sleep(0.3)
    program.kill()
    program.communicate()
    assert gone(pid)
