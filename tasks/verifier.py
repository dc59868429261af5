r"""The verifier: which answer does a completion give, and is it right?

The answer is the last \boxed{}, else what follows the last ####, else the last number. Numbers and
words are compared here, exactly and in microseconds; other mathematics in symbolic.py. Every text
is judged within seconds, and none is evaluated as code. docs/gpg.md has the conventions.
"""

import re
from fractions import Fraction

from .symbolic import same_mathematics

LONGEST = 500  # characters of an answer that is more than a number

NUMBER = re.compile(
    r"(?:(?<![\w.)}\]])[-+])?"  # a sign, unless it is the minus between two numbers
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+|\.(?=/))?|\.\d+)"  # 1,000.5 or 1000.5 or .5
    r"(?:e[-+]?\d+)?(?:/\d+)?",  # an exponent; a denominator
    re.IGNORECASE | re.ASCII,
)
INTEGER = re.compile(r"-?[0-9]{1,50}")
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# Prose may end in TeX or a tuple, whose last number is only a part. "$5 and $6" is no TeX.
SPAN = re.compile(
    r"(?<!\\)\$(?=\S)[^$\n]+(?<=\S)\$(?!\d)"
    r"|\\\(.+?\\\)|\\\[.+?\\\]|[(\[][-+\d./ ]+,[-+\d./, ]+[)\]]",
    re.DOTALL,
)

WORD = r"(?!(?:or|and|more|less|mod|pi|[ienxyz]|\w*(?:dred|sand|llion))\b)[A-Za-z]+"
UNITS = re.compile(  # 72\text{ km/h}, 72\,\mathrm{cm}^2
    r"(?:(?:\\[,;:! ]|[ ~/])*\\(?:text\w*|mathrm|mbox) *"
    rf"\{{[ .~/]*{WORD}(?:[ .~/]+{WORD})*[ .]*\}}(?:\^\{{?-?\d\}}?)?)+[ .$]*$"
)
WORDS = re.compile(  # 72 apples, 72km
    rf"(?<=\d)(?: ?(?:[kcm]m|[km]g|ft|lbs?|hrs?|k?mph)|(?: (?=\w\w){WORD}){{1,3}})(?:\^[23])?$"
)
LEFT_SIDE = re.compile(  # y =, f(x) =, m_{1} =; and 5 + 67 =
    r"(?:^|(?<=,))(?:\\[a-z]+|[A-Za-z])(?:_\{[^{}]*\}|_\w)?(?:\([a-z]\))?="
    r"|^(?:[^A-Za-z<>!\\]|\\(?:frac|cdot|times|div|sqrt))+="
)

FOLDS = [  # what changes no answer, in this order
    (r"(?<!\\)\\!\s*|\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])", ""),
    (r"(?<!\\)\\[,;:> ()\[\]]|~|\\q?quad(?![a-z])|\\?[$€£]|\s+", " "),
    (r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|operatorname) ?\{([^{}]*)\}", r"\1"),
    (r"\{ ?, ?\}", ","),  # 2{,}400
    (r"\^ ?(?:\\circ|\{ ?\\circ ?\})|\\degree|°|\\?%", ""),  # degrees and percent are units
    (r",? *\b(?:and|or)\b *", ","),
    (r"−", "-"),
    (r"(?<![\\A-Za-z])(pi|sin|cos|tan|ln|log|exp)(?![a-z])", r"\\\1 "),
    (r"\\?sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac ?(\d) ?(?=[\d{])", r"\\frac{\1}"),
    (r"(\\frac ?\{[^{}]*\}) ?(\d)", r"\1{\2}"),
    (r"\\in(?![a-z])", "="),
    (r"(\d)_ ?\{ ?(\d+) ?\}", r"\1_\2"),  # a base
    (r"(?<=\d)i(?![a-zA-Z])", " i"),
    (r"'", r"^{\\prime}"),
    (r" +", " "),
    (r"(?<!\w) | (?!\w)|[ .]+$", ""),
    (r"^\(([A-Za-z])\)$", r"\1"),  # a choice
]
FOLDS = [(re.compile(pattern), new) for pattern, new in FOLDS]
# What math-verify takes for something else: words, 1 2, 5:30, 6_8, 1e9, ..., endless numbers.
NO_MATHS = re.compile(
    r"^[A-Za-z]{2}[A-Za-z ,]*$|(?<![\\{A-Za-z])[A-Za-z]{4}|mod|dots|\.\."
    r"|\d [\d.]|[:?]|\d_|\de[-+\d]|\d{60}"
)
UNFINISHED = re.compile(r"[+*!]|(?<=[\w)}])-|\\(?:cdot|times|div)")  # 8*9 is not yet 72


def extract_answer(text: str) -> str | None:
    r"""The last \boxed{}, else the line after the last ####, else the last number, else None."""
    boxes = list(BOX.finditer(text))
    if boxes:
        depth, start = 1, boxes[-1].end()
        for brace in BRACE.finditer(text, start):
            depth += (brace[0] == "{") - (brace[0] == "}")
            if depth == 0:
                return text[start : brace.start()].strip()
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip()
    end = text[-LONGEST:]
    spans = list(SPAN.finditer(end))
    if spans and not re.search(r"\d", end[spans[-1].end() :]):
        return spans[-1][0].strip("$")
    numbers = NUMBER.findall(re.sub(r"\\[$%,;! ]|[$%€£]", "", text).replace("−", "-"))
    return numbers[-1] if numbers else None


def gold_answer(answer: str) -> str:
    """The box or the #### of a worked solution; any other text is itself the answer."""
    if BOX.search(answer) or "####" in answer:
        return extract_answer(answer) or answer
    return answer


def is_correct(completion: str, answer: str) -> bool:
    """Is the completion's answer, or the whole completion, equal to this answer?"""
    gold, found = gold_answer(answer), extract_answer(completion)
    if found is not None and INTEGER.fullmatch(found) and INTEGER.fullmatch(gold):
        return int(found) == int(gold)  # the common case, ten times faster
    return same_text(completion, gold) or (found is not None and same_answer(found, gold))


def same_text(a: str, b: str) -> bool:
    """Are they equal up to typesetting, white space and case?"""
    if max(len(a), len(b)) > LONGEST:
        return a.strip() == b.strip()
    return fold(a).casefold() == fold(b).casefold()


def same_answer(found: str, gold: str) -> bool:
    """Texts and numbers compare exactly; what is neither goes to math-verify."""
    if same_text(found, gold) or max(len(found), len(gold)) > LONGEST:
        return same_text(found, gold)
    found, gold = fold(found), fold(gold)
    if ("=" in found) != ("=" in gold):  # x = 5 against 5
        found, gold = LEFT_SIDE.sub("", found), LEFT_SIDE.sub("", gold)
    value, target = as_number(found), as_number(gold)
    if value is not None and target is not None:
        return value == target
    if NO_MATHS.search(found) or NO_MATHS.search(gold):
        return False
    unfinished = target is not None and UNFINISHED.search(found)
    return not unfinished and same_mathematics(found, gold)


def fold(text: str) -> str:
    value = UNITS.sub("", text)
    if re.search(r"\d", value) and not re.search(r"\\text|\\mathrm|\\mbox", value):
        text = value
    for pattern, new in FOLDS:
        text = pattern.sub(new, text)
    return text


def as_number(text: str) -> Fraction | None:
    """The exact value of a number. None for other text, and for numbers too long to write out."""
    text = re.sub(r"\\frac\{(-?[\d.,]+)\}\{(\d+)\}", r" \1/\2", text).strip().replace("- ", "-")
    text = re.sub(r"^10\^", "1*10^", text)
    text = re.sub(r"(?<=\d) ?(?:\*|\\times|\\cdot) ?10\^\{?(-?\d+)\}?$", r"e\1", text)
    text = WORDS.sub("", text)
    if re.fullmatch(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?", text):  # 1 000
        text = text.replace(" ", "")
    if mixed := re.fullmatch(r"([-+]?)(\d{1,50}) (\d{1,50})/(\d{1,50})", text):  # 4 3/5
        sign, whole, top, bottom = mixed.groups()
        text = f"{sign}{int(whole) * int(bottom) + int(top)}/{bottom}"
    if len(text) > 100 or not NUMBER.fullmatch(text) or re.search(r"[eE][-+]?\d{4}", text):
        return None
    numerator, _, denominator = text.replace(",", "").partition("/")
    denominator = int(denominator or 1)
    return Fraction(numerator) / denominator if denominator else None
