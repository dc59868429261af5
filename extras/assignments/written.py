"""Your numbers for the written questions: `python written.py A3 YOUR_ID`."""

import random
import sys


def drawn(rng, low, high, n=1, unit=100):
    """n numbers between low and high, in steps of 1 / unit."""
    found = [rng.randint(round(low * unit), round(high * unit)) / unit for _ in range(n)]
    return found if n > 1 else found[0]


def arms(rng):
    """Probabilities of three arms, none small."""
    a, b = drawn(rng, 0.1, 0.4, 2)
    return [a, b, round(1 - a - b, 2)]


def group_rewards(rng):
    """Six groups of four rewards of -1 and 1, of which two to four are dead."""
    dead = rng.randint(2, 4)
    rows = [[rng.choice((-1.0, 1.0))] * 4 for _ in range(dead)]
    rows += [rng.choice(([1.0, -1.0, -1.0, 1.0], [-1.0, -1.0, 1.0, -1.0])) for _ in range(6 - dead)]
    return rng.sample(rows, 6)


def a_token(rng):
    """Its ratio and advantage, and the clips."""
    ratio, advantage = rng.choice([0.55, 0.65, 0.9, 1.1, 1.45, 1.6]), rng.choice([-2, -0.5, 0.5, 2])
    clip_low, clip_high = rng.choice([0.15, 0.2, 0.25]), rng.choice([0.22, 0.28, 0.3])
    return dict(ratio=ratio, advantage=advantage, clip_low=clip_low, clip_high=clip_high)


def summary(rng):
    """A summary with some of four facts, one of them twice, and something else."""
    facts = ["my boss lost my bike", "in the park", "because of a bet", "should i pay them"]
    stated = rng.sample(facts, rng.randint(1, 3))
    stated += [stated[0]] * rng.randint(0, 1) + ["thanks for reading"] * rng.randint(0, 1)
    return {"answer": " ; ".join(facts), "summary": " ; ".join(stated)}


NUMBERS = {
    "A0 W1": lambda rng: {"logits": drawn(rng, -1, 1, 3), "rewards": drawn(rng, -2, 2, 3)},
    "A0 W2": lambda rng: {"G": rng.randint(3, 12)},
    "A1 W1": lambda rng: {"mu1": arms(rng), "mu2": arms(rng)},
    "A1 W2": lambda rng: {"mu1": arms(rng), "mu2": arms(rng)},
    "A2 W1": lambda rng: {
        "logits": drawn(rng, 0, 1.5, 3), "temperature": rng.choice([0.5, 0.7, 1.3, 1.6])
    },
    "A2 W2": lambda rng: {
        "lengths": drawn(rng, 10, 60, 12, unit=1), "budget": rng.choice([120, 150, 180])
    },
    "A3 W1": lambda rng: {"p": drawn(rng, 0.1, 0.9), "G": rng.randint(4, 10)},
    "A3 W2": lambda rng: {"rewards": group_rewards(rng)},
    "A3 W3": lambda rng: {
        "dead": rng.randint(1, 5), "valid": rng.randint(2, 6),
        "dead_length": rng.randint(4, 9), "valid_length": rng.randint(10, 20),
    },
    "A4 W1": a_token,
    "A4 W2": a_token,
    "A4 W3": lambda rng: {"pi": drawn(rng, 0.1, 0.45), "ref": drawn(rng, 0.5, 0.95)},
    "A5 W1": lambda rng: {
        "r1": drawn(rng, 1, 3), "r2": drawn(rng, -1, 0.9), "beta": drawn(rng, 0.1, 1)
    },
    "A5 W2": lambda rng: {"beta": drawn(rng, 0.02, 0.4)},
    "A5 W3": summary,
    "A5 W4": lambda rng: {"h": drawn(rng, -1, 1, 3), "r": drawn(rng, -2, 2, 3), "beta": 0.3},
}  # fmt: skip


def numbers(assignment: str, question: str, student: str) -> dict:
    """The numbers of a student in a question, the same every time and on every machine."""
    rng = random.Random(f"{assignment} {question} {student.strip().lower()}")
    return NUMBERS[f"{assignment} {question}"](rng)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in {name.split()[0] for name in NUMBERS}:
        sys.exit("usage: python written.py A3 YOUR_ID")
    for assignment, question in map(str.split, NUMBERS):
        for name, value in numbers(assignment, question, sys.argv[2]).items():
            if assignment == sys.argv[1]:
                print(f"{question}  {name} = {value}")
