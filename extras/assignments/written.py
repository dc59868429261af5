"""Your numbers for the written questions: `python written.py A3 YOUR_ID`."""

import random
import sys
from itertools import permutations


def hundredths(low: int, high: int) -> list[float]:
    return [i / 100 for i in range(low, high + 1)]


ARMS = list(permutations((0.2, 0.3, 0.5)))
THREE = list(permutations((-0.9, -0.35, 0.15, 0.6, 1.2), 3))
DEAD, MIXED = (1.0, 1.0, 1.0, 1.0), (1.0, -1.0, -1.0, 1.0)  # rewards of a group
FACTS = ["my boss lost my bike", "in the park", "because of a bet", "should i pay them"]
STATED = [facts for n in (1, 2, 3) for facts in permutations(FACTS, n)]
SUMMARIES = [" ; ".join([*facts, facts[0], "thanks for reading"]) for facts in STATED]
TOKEN = {
    "ratio": [0.55, 0.65, 0.9, 1.1, 1.45, 1.6],
    "advantage": [-2, -0.5, 0.5, 2],
    "clip_low": [0.15, 0.2, 0.25],
    "clip_high": [0.22, 0.28, 0.3],
}
LENGTHS = {"dead_length": range(4, 10), "valid_length": range(10, 21)}
NUMBERS = {  # what each number is chosen from
    "A0 W1": {"logits": THREE, "rewards": THREE},
    "A0 W2": {"G": range(3, 13)},
    "A1 W1": {"mu1": ARMS, "mu2": ARMS},
    "A1 W2": {"mu1": ARMS, "mu2": ARMS},
    "A2 W1": {"logits": THREE, "temperature": [0.5, 0.7, 1.3, 1.6]},
    "A2 W2": {"lengths": [range(i, i + 48, 4) for i in range(8, 20)], "budget": [120, 150, 180]},
    "A3 W1": {"p": hundredths(10, 90), "G": range(4, 11)},
    "A3 W2": {"rewards": [[DEAD] * n + [MIXED] * (6 - n) for n in (2, 3, 4)]},
    "A3 W3": {"dead": range(1, 6), "valid": range(2, 7), **LENGTHS},
    "A4 W1": TOKEN,
    "A4 W2": TOKEN,
    "A4 W3": {"pi": hundredths(10, 45), "ref": hundredths(50, 95)},
    "A5 W1": {"r1": hundredths(100, 300), "r2": hundredths(-100, 90), "beta": hundredths(10, 100)},
    "A5 W2": {"beta": hundredths(2, 40)},
    "A5 W3": {"answer": [" ; ".join(FACTS)], "summary": SUMMARIES},
    "A5 W4": {"h": THREE, "r": THREE, "beta": [0.3]},
}


def numbers(assignment: str, question: str, student: str) -> dict:
    """The numbers of a student in a question, the same every time and on every machine."""
    rng = random.Random(f"{assignment} {question} {student.strip().lower()}")
    choices = NUMBERS.get(f"{assignment} {question}", {})
    return {name: rng.choice(values) for name, values in choices.items()}


if __name__ == "__main__":
    if len(sys.argv) != 3 or f"{sys.argv[1]} W1" not in NUMBERS:
        sys.exit("usage: python written.py A3 YOUR_ID")
    for question in ("W1", "W2", "W3", "W4"):
        for name, value in numbers(sys.argv[1], question, sys.argv[2]).items():
            print(f"{question}  {name} = {list(value) if isinstance(value, range) else value}")
