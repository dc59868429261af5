r"""The verifier: which answer does a completion give, and is it right?

The answer is the last \boxed{}, else what follows the last ####, else the last number. Text is
never evaluated as code, and the time is linear in its length.
"""

from __future__ import annotations

import re
from fractions import Fraction

NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?"  # a sign, unless it is the minus between two numbers
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"  # 1,000.5 or 1000.5 or .5
    r"(?:e[-+]?\d+)?(?:/\d+)?",  # an exponent; a denominator
    re.IGNORECASE | re.ASCII,
)


def extract_answer(text: str) -> str | None:
    r"""The last \boxed{}, else the line after the last ####, else the last number, else None."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        start, depth = start + len("\\boxed{"), 1
        for i in range(start, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start:i].strip()
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip()
    return last_number(text)


def is_correct(completion: str, answer: str) -> bool:
    """Numbers compare exactly, other answers after folding white space and case."""
    found, target = extract_answer(completion), as_number(answer)
    if found is None:
        return False
    if target is None:
        return " ".join(found.split()).casefold() == " ".join(answer.split()).casefold()
    value = as_number(found)
    return target == (as_number(last_number(found)) if value is None else value)  # "72 apples"


def last_number(text: str) -> str | None:
    numbers = NUMBER.findall(plain_math(text))
    return numbers[-1] if numbers else None


def plain_math(text: str) -> str:
    r"""$\frac{1}{2}$ -> 1/2, 50\% -> 50: drops currency, percent signs and TeX spacing."""
    text = re.sub(r"\\[dt]?frac\{([^{}]{1,50})\}\{([^{}]{1,50})\}", r"\1/\2", text)
    return re.sub(r"\\[$%,;! ]|[$%€£]", "", text).replace("\u2212", "-")


def as_number(text: str | None) -> Fraction | None:
    """The exact value of a number. None for other text, and for numbers too long to write out."""
    text = plain_math(text or "").strip().rstrip(".")
    if len(text) > 100 or not NUMBER.fullmatch(text) or re.search(r"[eE][-+]?\d{4}", text):
        return None
    numerator, _, denominator = text.replace(",", "").partition("/")
    denominator = int(denominator or 1)
    return Fraction(numerator) / denominator if denominator else None
