"""Your written questions: `python written.py A3 YOUR_ID` prints them with your own numbers."""

import random
import sys


def arms(rng):
    """Probabilities of three arms, none small, in hundredths."""
    a, b = rng.randint(10, 40), rng.randint(10, 40)
    return [a / 100, b / 100, (100 - a - b) / 100]


def group_rewards(rng):
    """Six groups of four rewards of -1 and 1, of which two to four are dead."""
    dead = rng.randint(2, 4)
    rows = [[rng.choice((-1.0, 1.0))] * 4 for _ in range(dead)]
    rows += [rng.choice(([1.0, -1.0, -1.0, 1.0], [-1.0, -1.0, 1.0, -1.0])) for _ in range(6 - dead)]
    rng.shuffle(rows)
    return rows


def summary(rng):
    """A summary with some of four facts, one of them twice, and something else."""
    facts = ["my boss lost my bike", "in the park", "because of a bet", "should i pay them"]
    stated = rng.sample(facts, rng.randint(1, 3))
    stated += [stated[0]] * rng.randint(0, 1) + ["thanks for reading"] * rng.randint(0, 1)
    return {"answer": " ; ".join(facts), "summary": " ; ".join(stated)}


QUESTIONS = {  # assignment: question: (text, the numbers of a student)
    "A0": {
        "W1": (
            "A policy over three arms has these logits, the arms these rewards. What is the "
            "derivative of J with respect to the first logit?",
            lambda rng: {
                "logits": [rng.randint(-10, 10) / 10 for _ in range(3)],
                "rewards": [rng.randint(-20, 20) / 10 for _ in range(3)],
            },
        ),
        "W2": (
            "The baseline is the mean of all G rewards. By which factor is the expected estimate "
            "of the gradient too small?",
            lambda rng: {"G": rng.randint(3, 12)},
        ),
    },
    "A1": {
        "W1": (
            "The data come from mu1 and mu2 below; rewards, reference and beta are those of the "
            "file. What is the regret of the policy to which gradient descent on the expected "
            "pg-value loss converges?",
            lambda rng: {"mu1": arms(rng), "mu2": arms(rng)},
        ),
        "W2": (
            "The same for pg.",
            lambda rng: {"mu1": arms(rng), "mu2": arms(rng)},
        ),
    },
    "A2": {
        "W1": (
            "A vocabulary of three tokens has these logits. What is the log-probability (natural "
            "logarithm) of the first token at this temperature?",
            lambda rng: {
                "logits": [rng.randint(5, 15) / 10, rng.randint(0, 10) / 10, 0.0],
                "temperature": rng.choice([0.5, 0.7, 1.3, 1.6]),
            },
        ),
        "W2": (
            "Rows of these lengths (prompt and completion) go into micro-batches of at most "
            "`budget` tokens. Into how many does `micro_batches` put them?",
            lambda rng: {
                "lengths": [rng.randint(10, 60) for _ in range(12)],
                "budget": rng.choice([120, 150, 180]),
            },
        ),
    },
    "A3": {
        "W1": (
            "Each of the G completions of a prompt is right with probability p, independently; the "
            "reward is 1 or 0. What is the probability that the group is valid?",
            lambda rng: {"p": rng.randint(5, 45) / 50, "G": rng.randint(4, 10)},
        ),
        "W2": (
            "These are the rewards of six groups. What is alpha (eq. 7)?",
            lambda rng: {"rewards": group_rewards(rng)},
        ),
        "W3": (
            "A batch has `dead` dead and `valid` valid groups of the same size. All completions of "
            "dead groups have `dead_length` tokens, others `valid_length`. Divide the loss with "
            "alpha (eq. 8, over the tokens of the whole batch) by the loss of the valid groups "
            "alone (eq. 5): what do you get?",
            lambda rng: {
                "dead": rng.randint(1, 5), "valid": rng.randint(2, 6),
                "dead_length": rng.randint(4, 9), "valid_length": rng.randint(10, 20),
            },
        ),
    },
    "A4": {
        "W1": (
            "A token has this ratio and advantage. What is its J in eq. 3, without the KL?",
            lambda rng: clip_numbers(rng),
        ),
        "W2": (
            "What is the derivative of J with respect to the ratio? (Other numbers than in W1.)",
            lambda rng: clip_numbers(rng),
        ),
        "W3": (
            "A token has the probability `pi` under the policy and `ref` under the reference. What "
            "is the estimate D_KL of eq. 4?",
            lambda rng: {"pi": rng.randint(2, 9) / 20, "ref": rng.randint(10, 19) / 20},
        ),
    },
    "A5": {
        "W1": (
            "Two completions of a prompt have the rewards r1 and r2. At the minimum of the loss of "
            "CoPG, what is h(1) - h(2)?",
            lambda rng: {
                "r1": rng.randint(10, 30) / 10, "r2": rng.randint(-10, 9) / 10,
                "beta": rng.choice([0.06, 0.2, 0.3, 0.8]),
            },
        ),
        "W2": (
            "At the minimum of the loss of IPO, what is h(chosen) - h(rejected)?",
            lambda rng: {"beta": rng.choice([0.01, 0.02, 0.06, 0.3, 0.4])},
        ),
        "W3": ("What is the utility of this summary of a post with these facts?", summary),
        "W4": (
            "One prompt has three completions with these h and rewards r. What is CoPG's loss?",
            lambda rng: {
                "h": [rng.randint(-10, 10) / 10 for _ in range(3)],
                "r": [rng.randint(-20, 20) / 10 for _ in range(3)], "beta": 0.3,
            },
        ),
    },
}  # fmt: skip


def clip_numbers(rng):
    return {
        "ratio": rng.choice([0.55, 0.65, 0.9, 1.1, 1.45, 1.6]),
        "advantage": rng.choice([-2.0, -1.5, -0.5, 0.5, 1.5, 2.0]),
        "clip_low": rng.choice([0.15, 0.2, 0.25]),
        "clip_high": rng.choice([0.22, 0.28, 0.3]),
    }


def numbers(assignment: str, question: str, student: str) -> dict:
    """The numbers of a student in a question, the same every time and on every machine."""
    rng = random.Random(f"{assignment} {question} {student.strip().lower()}")
    return QUESTIONS[assignment][question][1](rng)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in QUESTIONS:
        sys.exit("usage: python written.py A3 YOUR_ID")
    for question, (text, _) in QUESTIONS[sys.argv[1]].items():
        print(f"{question}  {text}")
        for name, value in numbers(sys.argv[1], question, sys.argv[2]).items():
            print(f"      {name} = {value}")
