"""Finds the answer in a response and compares it with the expected one, for all built-in judges."""

import functools
import logging
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

_THINK = r"(?:\w+:)?(?:think|thinking|thought|reasoning)\s*"
_THINK_START, _THINK_END = (
    re.compile(
        rf"<{end}{_THINK}>|\u25c1{end}{_THINK}\u25b7|(?-i:\[{end}THINK\])|<\|{name}_of_thought\|>",
        re.IGNORECASE,
    )
    for end, name in (("", "begin"), ("/", "end"))
)
_ANSWER = re.compile(
    r"<(?:final_)?answer>(.*?)(?:</(?:final_)?answer>|\Z)", re.DOTALL | re.IGNORECASE
)
_NAMED = r"\b(?:answers?|option|choice)\b"
_STATED, _IS = (
    re.compile(
        # Atomic, so that long runs of blanks or stars take linear time.
        rf"{start}(?>[\s*_]*[:=][\s*_]+|[\s*_]+)(?!not\b|isn|.*{_NAMED})(.+?)(?:[.!](?=\s|$)|$)",
        re.IGNORECASE | re.MULTILINE,
    )
    for start in (rf"{_NAMED}(?:\s+(?:is|are))?", r"\b(?:is|are)\b")
)
_STATED_ELSEWHERE = re.compile(r"(?:答案|答え|정답)\s*(?:是|为|為|は|은|选)?\s*:?")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox|boxed\s*\{\s*\\boxed)\s*(?=[{\w\\-])")
_BETWEEN_BOXES = re.compile(r"[\s$,;]*+(?:and|or|\\text\{\s*(?:and|or)\s*\})?[\s$]*", re.ASCII)
# A minus directly after a word, digit or closing bracket is a subtraction, not a sign.
NUMBER = re.compile(
    r"(?:(?<![A-Za-z0-9_.)\]])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+",
    re.ASCII,
)
_SIGN = r"[A-Z]{0,3}\\?[$\u00a2-\u00a5\u20a0-\u20cf]|\\(?:pounds|euro|yen)\b"
_CODE = "USD|EUR|GBP|JPY|RMB|CNY|INR|CHF|KRW|AUD|CAD|SEK|NOK|DKK|PLN|BRL|MXN"
_CURRENCY_BEFORE = re.compile(rf"^(-?)\s*(?:{_SIGN}|{_CODE}|Rs\.?(?=\s*\d))\s*(?=[-\d.])")
_CURRENCY_AFTER = re.compile(
    rf"(?<=\d)\s*(?:{_SIGN}|{_CODE}|dollars?|euros?|pounds?|yen|rupees?|cents?|z\u0142|元|円|원)$"
)
_SYMBOLS = {
    "\u221e": r"\infty ", "\u03c0": r"\pi ", "\u2264": r"\le ", "\u2265": r"\ge ",
    "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u00f7": "/", "\u2044": "/", "\u00b0": r"^\circ",
    "\u00b1": r"\pm ", "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2205": r"\emptyset ",
    "\u3002": ". ", "\u200b": "", "\u200c": "", "\u2060": "", "\ufeff": "",
}  # fmt: skip
_DASHES = dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-")
_TABLE = str.maketrans(_SYMBOLS | _DASHES)
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf|textit|mbox|boldsymbol)\s*\{([^{}]*)\}")
_WORD = re.compile(r"(?<![\\\w])[^\W\d_]{3,}")
_SPACE = re.compile(r"\\[ ,;:!]|~")
_DOTS = r"\\[lc]?dots|\.{3}"
# A series with dots, a number with its base: math-verify drops the dots and the base.
_LITERAL = re.compile(rf"{_DOTS}|\d_")
_POWER_OF_TEN = re.compile(r"\s*(?:\\times|\\cdot|\*)\s*10\^(?:\{([-+]?\d+)\}|([-+]?\d))(?!\d)")
# A longer answer is a solution.
_MOST_WORDS, _MOST_CHARACTERS = 15, 1000


def final_text(response: str, prompt: str = "") -> str | None:
    """The response after its reasoning; ``None``: the reasoning did not end, so there is no answer.

    Args:
        prompt: the rendered prompt. A template may open the reasoning there.
    """
    *_, last = _THINK_END.split(response)
    *_, end_of_prompt = _THINK_START.split(prompt)
    is_open = end_of_prompt != prompt and not end_of_prompt.strip()
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
    if is_number(gold) and (numbers := NUMBER.findall(plain_symbols(text))):
        return numbers[-1]
    return text.strip()


def marked_answer(text: str) -> str | None:
    """Content of the last ``<answer>`` tag, or of the last box; ``None``: neither exists.

    The content of a tag is the content of its last box, if it has one.
    """
    tags = _ANSWER.findall(text)
    inner = tags[-1].strip() if tags else None
    boxes = _boxes(text if inner is None else inner)
    return boxes[-1][2] if boxes else inner


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(first, end, content) of each ``\\boxed``, ``\\fbox`` or ``\\framebox`` whose brace closes.

    If no brace closes: the last box, to the end of its line.
    """
    found, starts = [], [(match.start(), match.end()) for match in _BOX.finditer(text)]
    opened: list[int] = []
    closed_at: dict[int, int] = {}  # by the position of the opening brace
    for brace in re.finditer("[{}]", text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            closed_at[opened.pop()] = brace.start()
    for first, start in starts:
        if text[start] != "{":  # \boxed5, \boxed\frac12
            bare = re.match(r"\\?[\w.]+(?:\{[^{}]*\})*|-?[\d.,]+", text[start:])
            content = bare[0] if bare else ""
            found.append((first, start + len(content), content.rstrip(".,")))
        elif end := closed_at.get(start):
            found.append((first, end + 1, text[start + 1 : end].strip()))
    if starts and not found:
        first, start = starts[-1]
        line = re.split(r"[\n$]", text[start + 1 :], maxsplit=1)[0].strip()
        found.append((first, len(text), line))
    return found


def _last_boxes(text: str) -> str | None:
    """The last boxes with nothing but commas, *and* or *or* between them, joined by commas."""
    boxes, begin = _boxes(text), len(text)
    joined: list[str] = []
    for first, end, content in reversed(boxes):
        if joined and not _BETWEEN_BOXES.fullmatch(text, end, begin):
            break
        joined.insert(0, content)
        begin = first
    return ", ".join(joined) if len(joined) > 1 else None


def _stated(text: str) -> str | None:
    """What follows the last *answer is*, or else the last *is*, to the end of the sentence."""
    found = _STATED.findall(text) or _IS.findall(text)
    return found[-1].rstrip("*_ \t\r") if found else None


def plain_symbols(text: str) -> str:
    """Unicode digits, dashes, fractions and signs as ASCII and LaTeX. Other letters stay."""
    if text.isascii():
        return text
    text = re.sub(r"(?<=\d)\uff0c(?=\d{3})", ",", text).replace("\uff0c", ", ")
    text = text.translate(_TABLE)
    text = re.sub("\u221a\\s*(\\w+)", r"\\sqrt{\1}", text)
    text = "".join(char if char.isascii() else _plain(char) for char in text)
    return text.replace("}^{", "")


@functools.cache
def _plain(char: str) -> str:
    form = unicodedata.normalize("NFKC", char).translate(_TABLE)
    kind = unicodedata.decomposition(char)
    if kind.startswith("<super>"):
        return f"^{{{form}}}"
    if kind.startswith("<fraction>"):
        above, _, below = form.partition("/")
        return f"\\frac{{{above}}}{{{below}}}"
    return str(unicodedata.decimal(form)) if len(form) == 1 and form.isdecimal() else form


def normalize(answer: str) -> str:
    """An answer in ASCII, without currency, enclosing ``$`` or ``\\text{}``, or a full stop."""
    text = plain_symbols(answer).strip().strip("`").strip()
    for _ in range(3):
        before = text
        text = re.sub(r"^(\*\*|__)(.+)\1$", r"\2", text).strip()
        if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1].strip("$"):
            text = text.strip("$").strip()
        if text[:2] + text[-2:] in (r"\(\)", r"\[\]"):
            text = text[2:-2].strip()
        text = re.sub(
            r"^(?:\\[ ,;:!]|~|\s)+|(?:\\[ ,;:!]|~|\s|\\$|(?<!\\)[.,;:]|\u3001)+$", "", text
        )
        text = re.sub(rf"^{_WRAPPED.pattern}$", r"\1", text).strip() or text
        if text == before:
            break
    text = re.sub(r"(?<=\d)(\s|~)*\\text\s*\{([^{}]*)\}$", r"\1 \2", text)
    text = re.sub(r"\\text\{(\\?\$)\}", r"\1", text)
    text = _CURRENCY_AFTER.sub("", _CURRENCY_BEFORE.sub(r"\1", text.rstrip())).strip()
    text = re.sub(r"(?<![A-Za-z\\])\\?sqrt\s*[({]([^(){}]*)[)}]", r"\\sqrt{\1}", text)
    text = re.sub(r"\\(?:mathrm|operatorname)\s*\{([ei])\}", r" \1", text)
    text = re.sub(r"^(-?\d+) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    text = text.replace(r"\varnothing", r"\emptyset").replace(r"\degree", r"^\circ")
    return text or answer.strip()


def is_number(text: str) -> bool:
    """Whether ``text`` is a decimal number, perhaps with commas, a power of ten or a currency."""
    return _number(normalize(text)) is not None


def _number(text: str) -> Decimal | None:
    """The value of a normalized answer; ``None``: it is not a number."""
    plain = _SPACE.sub("", text.replace("{,}", ",")) if "\\" in text or "{" in text else text
    plain = _POWER_OF_TEN.sub(lambda match: f"e{match[1] or match[2]}", plain)
    if re.fullmatch(r"-?\d{1,3}(?:[ ~]\d{3})+", plain):
        plain = re.sub(r"[ ~]", "", plain)
    if "," in plain and not re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", plain):
        return None
    if "_" in plain:  # 52_8 is 52 in base 8; Python's Decimal reads 528
        return None
    try:
        value = Decimal(plain.replace(",", ""))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def _values(text: str) -> set[Decimal]:
    """The values that a normalized answer may mean: a percentage may be written as a share."""
    if (value := _number(text)) is not None:
        return {value}
    value = _number(re.sub(r"\s*(?:\\?%|percent)$", "", text))
    return set() if value is None else {value, value / 100}


def _canonical(text: str) -> str:
    """The form in which two equal texts are equal."""
    text = re.sub(r"(?<!,)\s+", "", _WRAPPED.sub(r"\1", _SPACE.sub("", text)))
    if _LITERAL.search(text):
        text = re.sub(r"_\{(\w+)\}", r"_\1", re.sub(_DOTS, "...", "".join(text.split())))
    return text.casefold() if text.isalpha() else text


def _letter(text: str) -> str | None:
    """The letter of a multiple-choice answer such as ``(A)``, ``A.`` or ``\\text{A) } 5``."""
    text = _SPACE.sub(" ", _WRAPPED.sub(r"\1", text)).strip()
    match = re.match(r"\(([A-Z])\)|([A-Z])(?:[.):]|$)", text)
    return match and (match[1] or match[2])


@dataclass(frozen=True)
class Gold:
    """An expected answer.

    Attributes:
        text: normalized.
        values: if it is a number, what it may mean.
        parsed: as math-verify reads it; empty: only equal texts are equal.
        is_words: it is not mathematics, of which math-verify would multiply the letters.
    """

    text: str
    values: set[Decimal]
    parsed: list[Any]
    is_words: bool


def gold_text(answer: str) -> str | None:
    """The normalized expected answer (GSM8K: after ``####``); ``None``: nothing to compare with.

    Fast, because it is also called for the answers of whole data sets.
    """
    answer = answer.rpartition("####")[2].strip()
    marked = marked_answer(answer) if "\\" in answer or "<" in answer else None
    answer = answer if marked is None else marked
    if len(answer) > _MOST_CHARACTERS or len(_WORD.findall(answer)) > _MOST_WORDS:
        return None
    text = normalize(answer)
    if text.count("{") - text.count("\\{") != text.count("}") - text.count("\\}"):
        return None
    is_empty = not any(char.isalnum() for char in text) and "\\{" not in text
    return None if is_empty else text


class MathJudge:
    """Mathematical equality of answers, by math-verify."""

    def __init__(self) -> None:
        from math_verify import parse, verify

        # Without time limits of its own, math-verify warns; the reward pool kills a slow process.
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        self._parse: Callable[[str], list[Any]] = functools.partial(parse, parsing_timeout=None)
        self._verify = functools.partial(verify, timeout_seconds=None, allow_set_relation_comp=True)
        self.read_gold = functools.lru_cache(maxsize=4096)(self._read_gold)

    def _read_gold(self, answer: str) -> Gold:
        """The parsed expected answer.

        Raises:
            ValueError: see :func:`gold_text`.
        """
        text = gold_text(answer)
        if text is None:
            raise ValueError(f"cannot read the answer {answer!r:.200}")
        values, words = _values(text), _WRAPPED.sub(r"\1", text)
        is_words = bool(re.fullmatch(r"[^\W\d_]{4,}|[^\W\d_]+(?: [^\W\d_]+)+", words))
        # Bare LaTeX is read as LaTeX only inside an environment: 3\\sqrt{2} would be read as 3.
        parsed = self._parse(answer if "$" in text else f"\\boxed{{{text}}}")
        return Gold(text, values, parsed, is_words)

    def __call__(self, gold: str, response: str, prompt: str = "") -> bool:
        """Whether the answer of ``response`` equals ``gold`` (GSM8K: its part after ``####``)."""
        expected = self.read_gold(gold)
        text = final_text(response, prompt)
        if text is None:
            return False
        if (marked := marked_answer(text)) is not None:
            forms = (marked, _last_boxes(text), _stated(marked))
            return any(form is not None and self._equals(expected, form) for form in forms)
        text = _STATED_ELSEWHERE.sub(" The answer is ", plain_symbols(text))
        if self._equals(expected, _stated(text) or text):
            return True
        if expected.is_words or _letter(expected.text):
            return False
        # math-verify reads no number that touches a letter of a language without blanks.
        found = self._parse(re.sub(r"[^\x00-\x7f]+", " ", text))
        if not found and (numbers := NUMBER.findall(text)):
            return _number(numbers[-1]) in expected.values
        return self._agree(expected, found)

    def _equals(self, gold: Gold, answer: str) -> bool:
        if len(answer) > 2 * _MOST_CHARACTERS:  # the parser takes quadratic time
            return False
        text = normalize(answer)
        if _canonical(text) == _canonical(gold.text):
            return True
        if gold.is_words:
            return False
        if (letter := _letter(gold.text)) and (other := _letter(text)):
            return letter == other
        if gold.values and (values := _values(text)):
            both = len(gold.values) == len(values)
            return max(gold.values) == max(values) if both else bool(gold.values & values)
        return self._agree(gold, self._parse(f"\\boxed{{{text}}}"))

    def _agree(self, gold: Gold, found: list[Any]) -> bool:
        if _LITERAL.search(gold.text):
            return False
        return self._verify(gold.parsed, found) and not _differ(gold.parsed, found)


def _differ(gold: list[Any], found: list[Any]) -> bool:
    """Whether two numbers differ that math-verify rounds to the same: it has absolute limits."""
    from sympy import Expr

    first, second = gold[0], found[0]
    if not all(isinstance(x, Expr) and not x.free_symbols for x in (first, second)):
        return False
    try:
        a, b = first.evalf(20), second.evalf(20)
        return bool(abs(a - b) > 1e-3 * max(abs(a), abs(b)))
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return False
