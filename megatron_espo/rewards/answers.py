"""Finds the answer in a response and compares it with the expected one, for all built-in judges."""

import functools
import logging
import re
from decimal import Decimal, InvalidOperation
from typing import Any

_THINK = "think|thinking|thought|reasoning"
_THINK_END = re.compile(rf"</(?:{_THINK})>", re.IGNORECASE)
_THINK_START = re.compile(rf"<(?:{_THINK})>", re.IGNORECASE)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox|boxed\s*\{\s*\\boxed)\s*(?=[{\w\\-])")
# A minus directly after a word, digit or closing bracket is a subtraction, not a sign.
NUMBER = re.compile(
    r"(?:(?<![A-Za-z0-9_.)\]])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+",
    re.ASCII,
)
_CURRENCY = (
    r"\\?[$€£¥₹₩₽¢]|\\(?:pounds|euro|yen)\b|(?:US|A|C|HK|NT)\\?\$|Rs\.?(?=\s*\d)|"
    "USD|EUR|GBP|JPY|RMB|CNY|INR"
)
_CURRENCY_BEFORE = re.compile(rf"^(-?)\s*(?:{_CURRENCY})\s*(?=[-\d.])")
_CURRENCY_AFTER = re.compile(
    rf"(?<=\d)\s*(?:{_CURRENCY}|\\text\{{\s*(?:dollars?|euros?|pounds?|yen|rupees?|cents?)\s*\}}|"
    r"dollars?|euros?|pounds?|yen|rupees?|cents?|元|円|원)$"
)
# Digits and punctuation of East Asian keyboards.
_WIDE = str.maketrans("０１２３４５６７８９．，－＋％（）：　−", "0123456789.,-+%(): -")


def final_text(response: str, prompt: str = "") -> str | None:
    """The response after its reasoning; ``None``: the reasoning did not end, so there is no answer.

    Args:
        prompt: the rendered prompt. A template may open the reasoning there.
    """
    *_, last = _THINK_END.split(response)
    is_open = prompt.rstrip().endswith(tuple(f"<{tag}>" for tag in _THINK.split("|")))
    if _THINK_START.search(last) or (is_open and last == response):
        return None
    return last


def extract_answer(response: str, gold: str, prompt: str = "") -> str | None:
    """The part of ``response`` that is judged; ``None``: there is none.

    Reasoning between ``<think>`` and ``</think>`` is dropped. The answer is the first of these
    that exists: the content of the last ``<answer>``; of the last box; if ``gold`` is a
    number, the last number; the whole text.
    """
    text = final_text(response, prompt)
    if text is None:
        return None
    if (marked := marked_answer(text)) is not None:
        return marked
    if is_number(gold) and (numbers := NUMBER.findall(text.translate(_WIDE))):
        return numbers[-1]
    return text.strip()


def marked_answer(text: str) -> str | None:
    """Content of the last ``<answer>`` tag, or of the last box; ``None``: neither exists."""
    if tags := _ANSWER.findall(text):
        inner = tags[-1].strip()
        boxed = last_boxed(inner)
        return inner if boxed is None else boxed
    return last_boxed(text)


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed``, ``\\fbox`` or ``\\framebox`` whose brace closes.

    If no brace closes: the last box, to the end of its line.
    """
    starts = [match.end() for match in _BOX.finditer(text)]
    for start in reversed(starts):
        if text[start] != "{":  # \boxed5, \boxed\frac12
            bare = re.match(r"\\?[\w.]+(?:\{[^{}]*\})*|-?[\d.,]+", text[start:])
            return bare[0].rstrip(".,") if bare else ""
        depth = 0
        for index in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[start + 1 : index].strip()
    if not starts:
        return None
    return re.split(r"[\n$]", text[starts[-1] + 1 :], maxsplit=1)[0].strip()


def normalize(answer: str) -> str:
    """An answer without wide digits, currency, enclosing ``$`` or ``\\text{}``, or a full stop."""
    text = answer.translate(_WIDE).strip()
    if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1]:
        text = text[1:-1].strip()
    text = re.sub(r"(?:[.,;:!]|[。、；])+$", "", text).strip() or text
    text = re.sub(r"^\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}$", r"\1", text).strip()
    text = _CURRENCY_AFTER.sub("", _CURRENCY_BEFORE.sub(r"\1", text)).strip()
    return text


def is_number(text: str) -> bool:
    """Whether ``text`` is a decimal number, perhaps with commas or a currency."""
    return _number(text) is not None


def _number(text: str) -> Decimal | None:
    plain = normalize(text).replace("{,}", ",").replace("\\!", "").replace("\\,", "")
    if "," in plain and not re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", plain):
        return None
    try:
        value = Decimal(plain.replace(",", ""))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


class MathJudge:
    """Mathematical equality of answers, by math-verify."""

    def __init__(self) -> None:
        from math_verify import parse, verify

        # Without time limits of its own, math-verify warns; the reward pool kills a slow process.
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        self._parse = functools.partial(parse, parsing_timeout=None)
        self._verify = functools.partial(verify, timeout_seconds=None)
        self.read_gold = functools.lru_cache(maxsize=4096)(self._read_gold)

    def _read_gold(self, answer: str) -> list[Any]:
        """The parsed expected answer.

        Raises:
            ValueError: math-verify cannot read it.
        """
        marked = last_boxed(answer)
        text = normalize(answer if marked is None else marked)
        # Bare LaTeX is read as LaTeX only inside an environment: 3\\sqrt{2} would be read as 3.
        gold = self._parse(answer if "$" in text else f"\\boxed{{{text}}}")
        if not gold:
            raise ValueError(f"math-verify cannot read the answer {answer!r}")
        return gold

    def __call__(self, gold: str, response: str, prompt: str = "") -> bool:
        """Whether the answer of ``response`` equals ``gold`` (GSM8K: its part after ``####``)."""
        gold = gold.rpartition("####")[2].strip()
        expected = self.read_gold(gold)
        text = final_text(response, prompt)
        if text is None:
            return False
        marked = marked_answer(text)
        if marked is not None:
            value, wanted = _number(marked), _number(gold)
            if value is not None and wanted is not None:
                return value == wanted
            return self._verify(expected, self._parse(f"\\boxed{{{normalize(marked)}}}"))
        found = self._parse(text.translate(_WIDE))
        if self._verify(expected, found):
            return True
        # math-verify reads no number that touches a letter of a language without blanks.
        numbers = NUMBER.findall(text.translate(_WIDE))
        is_read = bool(found) and not re.search(r"[^\x00-\x7f]\d|\d[^\x00-\x7f]", text)
        wanted = _number(gold)
        return (
            wanted is not None and not is_read and bool(numbers) and _number(numbers[-1]) == wanted
        )
