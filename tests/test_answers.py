"""Answers in responses: what models write, and the verdict of the math judge."""

import json
import time
from functools import cache
from pathlib import Path

import pytest

from megatron_espo.config import Config
from megatron_espo.config.tasks import Source
from megatron_espo.data.sources import read_rows
from megatron_espo.errors import InputError
from megatron_espo.rewards.answers import MathJudge, extract_answer
from megatron_espo.rewards.golds import check_golds

CASES = [json.loads(line) for line in (Path(__file__).with_name("math_answers.jsonl")).open()]


@cache
def judge():
    return MathJudge()


def test_verdicts():
    wrong = [
        case for case in CASES if judge()(case["answer"], case["response"]) != bool(case["correct"])
    ]
    assert len(CASES) >= 300 and not wrong


def test_reasoning_that_the_template_opened():
    prompt = "<|im_start|>assistant\n<think>\n"
    assert not judge()("5", "2 + 3 is 5", prompt)
    assert judge()("5", "2 + 3</think>5", prompt)
    assert extract_answer("the last number is 5", "5", prompt) is None


# Responses that repeat themselves up to the limit of tokens; the last ones end with an answer.
LONG = ["so" + part * (28_000 // len(part)) + "x" for part in ("\n", " ", ".", " .", "wait! ")]
LONG += ["The answer is" + part * 9000 + "option" for part in ("\n", " ", " **", " \n", " *\n:")]
LONG += ["answer is 7" + part * 9000 + "x" for part in (" ", "*\n", ". ")]
LONG += [
    part * (28_000 // len(part)) for part in ("\\boxed{", "this is it ", "The answer is ", "la ")
]
LONG += ["\\boxed{6}" + "\n" * 28_000 + "x\\boxed{7}", "The answer is" + "\n" * 9000 + "7."]
LONG += ["lorem ipsum dolor sit amet " * 1000 + end for end in ("= 7", "so it is 7.", "\\boxed{7}")]


def test_long_responses_take_little_time():
    judge()("5", "5")
    verdicts = []
    for response in LONG:
        start = time.perf_counter()
        verdicts.append(judge()("5", response) or judge()("7", response))
        assert time.perf_counter() - start < 6, response[:40]
    assert verdicts[-5:] == [True] * 5


UNREADABLE = ["", "$", ".", "\\$", "\\boxed{}", "\\frac{1", "--", "so we add the two numbers " * 9]


@pytest.mark.parametrize("answer", UNREADABLE)
def test_an_expected_answer_that_cannot_be_read_is_an_error(answer):
    with pytest.raises(ValueError, match="cannot read the answer"):
        judge().read_gold(answer)


@pytest.mark.parametrize("answer", UNREADABLE)
def test_expected_answers_that_cannot_be_read_are_found_with_the_rows(tmp_path, caplog, answer):
    source = tmp_path / "p.jsonl"

    def check(answers, function="math_verify"):
        source.write_text("".join(json.dumps({"prompt": "x", "answer": a}) + "\n" for a in answers))
        sections = {"model": {"path": "m"}, "reward": {"function": function}}
        config = Config.model_validate(sections | {"data": {"prompts": str(source)}})
        check_golds(read_rows(Source(prompts=str(source)), 0), str(source), config)
        return [r.message for r in caplog.records if "expected one that" in r.message]

    readable = ["7", "\\frac12", "Evelyn", "(1, 2]", "\\emptyset", "\\{\\}", "A", "x\n#### 72"]
    assert check(readable) == [] == check([answer], function="mine:judge")
    (message,) = check([*readable, answer])
    assert "p.jsonl:9: " in message and " 1 of 9 rows" in message
    with pytest.raises(InputError, match=r"p.jsonl:1: .*in 2 of 3 rows"):
        check([answer, answer, "7"])


@pytest.mark.parametrize(
    ("response", "gold", "answer"),
    [
        ("so 3, 4 and 5", "1", "5"),
        ("so 3, 4 and 5", "x", "so 3, 4 and 5"),
        ("4 <answer> 3 </answer> 5", "1", "3"),
        ("4 \\boxed{3} 5", "1", "3"),
        ("<think>7</think> 4 and 5", "1", "5"),
        ("<think>7", "1", None),
        ("1,234.5 in all", "1", "1,234.5"),
        ("5-3", "1", "3"),
        ("it is \N{MINUS SIGN}3", "1", "-3"),
    ],
)
def test_extracted_part(response, gold, answer):
    assert extract_answer(response, gold) == answer
