"""Your numbers for the written questions: `python written.py A3 YOUR_ID`."""

import random
import sys

DEAD, MIXED = ([1.0] * 4, [-1.0] * 4), ([1.0, -1.0, -1.0, 1.0], [-1.0, -1.0, 1.0, -1.0])
FACTS = ["my boss lost my bike", "in the park", "because of a bet", "should i pay them"]


def numbers(assignment: str, question: str, student: str) -> dict:
    """The numbers of a student in a question, the same every time and on every machine."""
    rng = random.Random(f"{assignment} {question} {student.strip().lower()}")

    def one(low, high):
        return rng.randint(round(100 * low), round(100 * high)) / 100

    def several(n, low, high):
        return [one(low, high) for _ in range(n)]

    def arms():
        a, b = several(2, 0.1, 0.4)
        return [a, b, round(1 - a - b, 2)]

    token = {
        "ratio": rng.choice([0.55, 0.65, 0.9, 1.1, 1.45, 1.6]),
        "advantage": rng.choice([-2, -0.5, 0.5, 2]),
        "clip_low": rng.choice([0.15, 0.2, 0.25]),
        "clip_high": rng.choice([0.22, 0.28, 0.3]),
    }
    dead = rng.randint(2, 4)
    groups = rng.choices(DEAD, k=dead) + rng.choices(MIXED, k=6 - dead)
    stated = rng.sample(FACTS, rng.randint(1, 3))  # one of them twice, and something else
    stated += rng.choice([[], [stated[0]], ["thanks for reading"]])
    return {
        "A0 W1": {"logits": several(3, -1, 1), "rewards": several(3, -2, 2)},
        "A0 W2": {"G": rng.randint(3, 12)},
        "A1 W1": {"mu1": arms(), "mu2": arms()},
        "A1 W2": {"mu1": arms(), "mu2": arms()},
        "A2 W1": {"logits": several(3, 0, 1.5), "temperature": rng.choice([0.5, 0.7, 1.3, 1.6])},
        "A2 W2": {
            "lengths": [rng.randint(10, 60) for _ in range(12)],
            "budget": rng.choice([120, 150, 180]),
        },
        "A3 W1": {"p": one(0.1, 0.9), "G": rng.randint(4, 10)},
        "A3 W2": {"rewards": rng.sample(groups, 6)},
        "A3 W3": {
            "dead": rng.randint(1, 5),
            "valid": rng.randint(2, 6),
            "dead_length": rng.randint(4, 9),
            "valid_length": rng.randint(10, 20),
        },
        "A4 W1": token,
        "A4 W2": token,
        "A4 W3": {"pi": one(0.1, 0.45), "ref": one(0.5, 0.95)},
        "A5 W1": {"r1": one(1, 3), "r2": one(-1, 0.9), "beta": one(0.1, 1)},
        "A5 W2": {"beta": one(0.02, 0.4)},
        "A5 W3": {"answer": " ; ".join(FACTS), "summary": " ; ".join(stated)},
        "A5 W4": {"h": several(3, -1, 1), "r": several(3, -2, 2), "beta": 0.3},
    }.get(f"{assignment} {question}", {})


if __name__ == "__main__":
    if len(sys.argv) != 3 or not numbers(sys.argv[1], "W1", ""):
        sys.exit("usage: python written.py A3 YOUR_ID")
    for question in ("W1", "W2", "W3", "W4"):
        for name, value in numbers(sys.argv[1], question, sys.argv[2]).items():
            print(f"{question}  {name} = {value}")
