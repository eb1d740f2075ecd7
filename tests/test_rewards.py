"""Reward functions against known scores; the pool with verifiers that hang, crash or misbehave."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks import reward_throughput
from megatron_espo.config.tasks import Reward
from megatron_espo.errors import InputError
from megatron_espo.rewards.answers import extract_answer
from megatron_espo.rewards.functions import load_reward_function
from megatron_espo.rewards.pool import RewardPool, wait_or_cancel
from megatron_espo.tools.doctor import reward_isolation_row
from megatron_espo.types import Prompt

ROOT = Path(__file__).parent.parent
isolated = pytest.mark.skipif(
    reward_isolation_row().state != "works",
    reason=f"no isolation here: {reward_isolation_row().advice}",
)
HOSTILE = """
import ctypes, glob, os, socket, subprocess, sys, time

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
    if kind == "children":
        for session in (False, True): subprocess.Popen(["sleep", "300"], start_new_session=session)
        time.sleep(float(rest)); return 1.0
    if kind == "memory": return len(bytearray(int(rest) << 20))
    if kind == "file":
        with open("large", "wb") as file:
            for _ in range(1024): file.write(bytes(1 << 20))
    if kind == "write": open(os.path.expanduser(rest), "w").write("x"); return 1.0
    if kind == "remount":
        assert ctypes.CDLL(None).mount(None, b"/", None, 0x1020, None) == 0; return 1.0
    if kind == "connect": socket.create_connection(("127.0.0.1", int(rest)), timeout=5); return 1.0
    if kind == "multiprocessing":
        import multiprocessing
        with multiprocessing.Pool(1) as pool: return pool.apply(abs, (-1,))
    if kind == "spy":  # the environment, its own and that of every process that it sees
        seen = [str(os.environ).encode()]
        for name in glob.glob("/proc/[0-9]*/environ"):
            try: seen.append(open(name, "rb").read())
            except OSError: pass
        return float(any(rest.encode() in text for text in seen))
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


def items(*responses):
    return [(prompt(), response) for response in responses]


def pool(function, timeout_s=10.0, workers=2, **limits):
    limits |= {"timeout_s": timeout_s, "workers": workers}
    return closing(RewardPool(Reward(**limits), function))


def score(rewards, asked, on_progress=lambda *_: None):
    """The rewards of ``(prompt, response)`` pairs."""
    return wait_or_cancel([rewards.submit(*item) for item in asked], on_progress)


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    (tmp_path / "hostile_verifier.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path)
    return "hostile_verifier:judge"


def descendants(pid: int) -> list[int]:
    """Processes below ``pid``. An isolated worker is two below the one that the pool started."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    children = [int(child) for child in text.split()]
    return children + [below for child in children for below in descendants(child)]


def all_processes(rewards: RewardPool) -> list[int]:
    pids = [worker.process.pid for worker in rewards._workers.values()]
    return pids + [below for pid in pids for below in descendants(pid)]


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether the process is dead or a zombie within the time."""
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
        assert reward(asked, f"I think <answer>{gold}</answer>") == 1.0
        assert auto(asked, f"<answer>{gold}</answer>") == 1.0
        assert reward(asked, "<answer>nonsense</answer>") < 0.5
    # Countdown accepts every expression with the right value.
    (entry,) = generate_entries("countdown", {"seed": 1, "size": 1})
    source = {"task": "countdown", "task_args": {}, "entry": entry}
    asked = prompt(entry["answer"], reasoning_gym=source)
    assert reward(asked, f"<answer>{entry['answer']} + 0*1</answer>") < 1.0  # uses other numbers
    assert reward(asked, f"<answer>({entry['metadata']['expression']})</answer>") == 1.0


@pytest.mark.parametrize(
    "answer, response, score",
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
def test_math_verify(answer, response, score):
    assert load_reward_function("math_verify")(prompt(answer), response) == score
    assert load_reward_function("auto")(prompt(answer), response) == score


def test_math_answers_and_hostile_ones():
    """An unreadable answer has no score. A hanging verifier is killed; the others are scored."""
    asked, scores = reward_throughput.make_items(50)
    hostile = [(prompt("9"), response) for response in reward_throughput.HOSTILE.values()]
    hangs = [(prompt("9"), "9**9**9**9"), (prompt("9"), "\\boxed{9^{9^{9^9}}}")]
    with pool("math_verify", timeout_s=4.0) as rewards:
        rewards.start()
        assert score(rewards, [asked[0], hangs[0], asked[1], hangs[1], *asked[2:]]) == [
            scores[0], None, scores[1], None, *scores[2:],
        ]  # fmt: skip
        assert rewards.failures == {"timeout": 2}
        assert set(score(rewards, hostile)) <= {None, 0.0}
        assert set(rewards.failures) <= {"timeout", "crash", "exception"}
        assert score(rewards, [(prompt(""), "42"), *asked[:2]]) == [None, *scores[:2]]
        assert "cannot read the answer ''" in rewards.last_failure


def test_scores_keep_their_places(hostile):
    with pool(hostile) as rewards:
        asked = items(*(f"number {i / 7}" for i in range(100)))
        assert score(rewards, asked) == [i / 7 for i in range(100)]
        assert score(rewards, []) == [] and score(rewards, items("int 3")) == [3.0]
        assert not rewards.failures


def test_hostile_verifiers_cost_only_their_item(hostile):
    wrong = ["sysexit", "text 1.0", "none", "number nan", "number inf", "number 1e39", "raise"]
    bad = dict.fromkeys(["exit", "segfault", "garbage", "mislabel"], "crash")
    bad |= dict.fromkeys(wrong, "exception") | {"hang": "timeout"}
    responses = [response for kind in bad for response in ("number 0.5", kind)]
    with pool(hostile, timeout_s=1.0) as rewards:
        scores = score(rewards, items(*responses, "number 0.25"))
        assert scores == [0.5, None] * len(bad) + [0.25]
        assert rewards.failures == Counter(bad.values())
        score(rewards, items("raise"))
        assert "KeyError: 'no such unit test'" in rewards.last_failure
        assert "hostile_verifier.py" in rewards.last_failure
        score(rewards, items("exit"))
        assert "exit status 3" in rewards.last_failure
        # Extra lines never become the score of another item.
        assert score(rewards, items("forge", "number 0.5"))[1] == 0.5


def test_the_time_limit_is_for_one_item(hostile):
    with pool(hostile, timeout_s=1.0, workers=1) as rewards:
        assert score(rewards, items("sleep 0.4") * 3) == [1.0] * 3


def test_large_request_to_a_stopped_worker(hostile):
    """A stopped worker never reads. Writing to it must not block longer than the time limit."""
    large = (prompt(padding="x" * 1_000_000), "number 1")
    with pool(hostile, timeout_s=1.0, workers=1) as rewards:
        assert score(rewards, [large]) == [1.0]
        os.kill(all_processes(rewards)[-1], signal.SIGSTOP)
        assert score(rewards, [large, *items("number 1")]) == [None, 1.0]


def test_workers_persist_and_an_idle_death_costs_nothing(hostile):
    with pool(hostile, workers=1) as rewards:
        assert not rewards._workers  # nothing started yet
        starter = threading.Thread(target=rewards.start)  # workers outlive the thread
        starter.start()
        starter.join()
        first = all_processes(rewards)
        assert score(rewards, items("number 1") * 2) == [1.0, 1.0]
        assert all_processes(rewards) == first
        os.kill(first[-1], signal.SIGKILL)
        assert gone(first[0])
        assert score(rewards, items("number 1")) == [1.0] and not rewards.failures
        second = all_processes(rewards)
        assert not set(first) & set(second)
    assert all(map(gone, second))


@isolated
def test_nothing_that_a_verifier_started_outlives_it(hostile):
    seen = set()
    with pool(hostile, timeout_s=2.0) as rewards:
        asked = items("children 0.5", "children 300")
        assert score(rewards, asked, lambda *_: seen.update(all_processes(rewards))) == [1.0, None]
        seen.update(all_processes(rewards))
    assert len(seen) >= 2 * 3 + 4 and all(map(gone, seen))


def test_without_isolation_a_kill_reaches_the_process_group(hostile):
    seen = set()
    with pool(hostile, timeout_s=2.0, isolate=False) as rewards:
        asked = items("children 300")
        assert score(rewards, asked, lambda *_: seen.update(all_processes(rewards))) == [None]
    alive = [pid for pid in seen if not gone(pid, within_s=0.5)]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert len(seen) == 3 and len(alive) == 1  # the one in its own session


@isolated
def test_an_isolated_worker_has_its_folder_and_nothing_else(hostile, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret-of-the-owner")
    monkeypatch.setenv("JUDGE_KEY", "meant-for-the-verifier")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        allowed = ["write ~/of-the-home", "write relative", "multiprocessing"]
        allowed.append("spy meant-for-the-verifier")
        outside = (f"write {folder}/absolute" for folder in (tmp_path, Path.home()))
        refused = [*outside, f"connect {port}", "remount"]
        expected = dict.fromkeys(allowed, 1.0) | dict.fromkeys(refused, None)
        expected["spy secret-of-the-owner"] = 0.0
        with pool(hostile, environment=("JUDGE_KEY",)) as rewards:
            scores = score(rewards, items(*expected))
            folders = [Path(worker._home.name) for worker in rewards._workers.values()]
            assert any((folder / "of-the-home").exists() for folder in folders)
        assert dict(zip(expected, scores, strict=True)) == expected
        assert rewards.failures == {"exception": 4}
        assert not any(path.exists() for path in (*folders, tmp_path / "absolute"))
        with pool(hostile, isolate=False) as rewards:  # for a verifier that asks a server
            asked = items(f"connect {port}", "spy secret-of-the-owner-in-its-own-environment")
            assert score(rewards, asked) == [1.0, 0.0]


@pytest.mark.parametrize("isolate", [pytest.param(True, marks=isolated), False])
def test_limits(hostile, isolate):
    """Each limit has its cause and its message. The next response is scored."""
    limits = {
        "memory 2048": ("exception", "MemoryError"),
        "file": ("exception", "File too large"),
        "hang": ("timeout", "no answer in 6 s (reward.timeout_s)"),
        "segfault": ("crash", "signal SIGSEGV"),
        "exit": ("crash", "exit status 3"),
    }
    with pool(hostile, timeout_s=6.0, memory_gib=1, isolate=isolate) as rewards:
        for response, (cause, message) in limits.items():
            before = rewards.failures[cause]
            assert score(rewards, items(response, "number 1")) == [None, 1.0], response
            assert rewards.failures[cause] == before + 1
            assert rewards.last_failure.startswith("prompt 'p': ")
            assert message in rewards.last_failure
        assert score(rewards, items("memory 256")) == [float(256 << 20)]


@isolated
def test_a_kernel_that_refuses_namespaces_is_logged_once(tmp_path):
    # In another user namespace, where the setting applies to child namespaces.
    forbid = "echo 0 > /proc/sys/user/max_user_namespaces"
    program = run_script(
        tmp_path,
        'import logging; logging.basicConfig(level="WARNING", stream=sys.stdout)\n'
        'rewards.start(); print(score("number 1", "exit", "number 2"))\n',
        ["unshare", "--user", "--map-root-user", "sh", "-c", f'{forbid} && exec "$@"', "sh"],
    )
    output = program.communicate(timeout=180)[0]
    warning = "limited, but not isolated (user namespaces: No space left on device)"
    assert output.count(warning) == 1 and "[1.0, None, 2.0]" in output


def test_progress_and_interruption(hostile):
    """Progress is reported at least every second. The pool is usable after an exception."""
    calls = []

    def interrupt(*counts):
        calls.append(counts)
        if counts[0] == 1:
            raise InterruptedError

    with pool(hostile, workers=1) as rewards:
        rewards.start()
        with pytest.raises(InterruptedError):
            score(rewards, items("sleep 1.5", "sleep 0.5", "sleep 300"), interrupt)
        assert calls.count((0, 3)) >= 2 and calls[-1] == (1, 3)
        assert score(rewards, items("number 0.5")) == [0.5]


def test_items_are_scored_in_the_background(hostile):
    with pool(hostile, workers=1) as rewards:
        first, second = [rewards.submit(*item) for item in items("number 4", "sleep 0.1")]
        assert first.result(60) == 4.0 and second.result(60) == 1.0
        running = rewards.submit(*items("sleep 300")[0])
        waiting = rewards.submit(*items("number 5")[0])
        while not running.running():
            time.sleep(0.01)
        rewards.close()
        assert waiting.cancelled() and running.result(60) is None
        assert not rewards.failures


@pytest.mark.parametrize(
    "function, message",
    [
        ("no_such_module:judge", "No module named 'no_such_module'"),
        ("hostile_verifier:jugde", "has no attribute 'jugde'"),
        ("hostile_verifier:not_callable", "not_callable to take .*3 is not a callable"),
        ("broken_verifier:judge", "SyntaxError"),
        ("dying_verifier:judge", "worker ended before .* exit status 7"),
    ],
)
def test_function_that_cannot_be_loaded(hostile, tmp_path, function, message):
    (tmp_path / "broken_verifier.py").write_text("def judge(:\n")
    (tmp_path / "dying_verifier.py").write_text("import os; os._exit(7)\n")
    with pool(function) as rewards:
        with pytest.raises(InputError, match=message):
            rewards.start()
        with pytest.raises(InputError, match=message):
            score(rewards, items("number 1"))


def run_script(tmp_path: Path, body: str, launcher: Sequence[str] = ()) -> subprocess.Popen:
    """Start a program without a ``__main__`` guard, with its verifier beside it."""
    (tmp_path / "hostile_verifier.py").write_text(HOSTILE)
    script = tmp_path / "program.py"
    head = f"""
import sys
sys.path.append({str(ROOT)!r})
print("main", flush=True)
from megatron_espo.config.tasks import Reward
from megatron_espo.rewards.pool import RewardPool
from megatron_espo.types import Prompt
rewards = RewardPool(Reward(timeout_s=60, workers=1), "hostile_verifier:judge")
prompt = Prompt("p", "text", "1", (1,))

def score(*responses):
    futures = [rewards.submit(prompt, response) for response in responses]
    return [future.result() for future in futures]

"""
    script.write_text(head + body)
    command = [*launcher, sys.executable, str(script)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/")


def test_workers_never_run_main_nor_write_to_stdout(tmp_path):
    program = run_script(tmp_path, 'print(score("print"))\n')
    assert program.communicate(timeout=180)[0] == "main\n[1.0]\n"


def test_heavy_libraries_stay_out_of_the_worker(tmp_path, monkeypatch):
    (tmp_path / "spy.py").write_text(
        "import sys\nfrom megatron_espo.rewards.functions import load_auto\nload_auto()\n"
        "heavy = [m for m in ('torch', 'transformers', 'vllm', 'sandbox') if m in sys.modules]\n"
        "def judge(prompt, response): return float(bool(heavy))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pool("spy:judge") as rewards:
        assert score(rewards, items("")) == [0.0]


@pytest.mark.parametrize("last", ["sleep 300", "hang"])
def test_workers_die_with_their_owner(tmp_path, last):
    program = run_script(
        tmp_path,
        "rewards.start(); (worker,) = rewards._workers.values()\n"
        f"print(worker.process.pid, flush=True)\nscore({last!r})\n",
    )
    assert program.stdout.readline() == "main\n"
    pid = int(program.stdout.readline())
    pids = [pid, *descendants(pid)]
    time.sleep(0.3)
    program.kill()
    program.communicate()
    assert all(map(gone, pids))
