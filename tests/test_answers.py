"""Answers in responses: what models write, and the verdict of the math judge."""

import json
from functools import cache
from pathlib import Path

import pytest

from megatron_espo.rewards.answers import MathJudge, extract_answer

CASES = [json.loads(line) for line in (Path(__file__).with_name("math_answers.jsonl")).open()]


@cache
def judge():
    return MathJudge()


def test_verdicts():
    wrong = [
        case for case in CASES if judge()(case["answer"], case["response"]) != bool(case["correct"])
    ]
    assert len(CASES) >= 120 and not wrong


def test_reasoning_that_the_template_opened():
    prompt = "<|im_start|>assistant\n<think>\n"
    assert not judge()("5", "2 + 3 is 5", prompt)
    assert judge()("5", "2 + 3</think>5", prompt)
    assert extract_answer("the last number is 5", "5", prompt) is None


def test_an_expected_answer_that_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="cannot read the answer"):
        judge().read_gold("")


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
