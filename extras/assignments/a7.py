"""A7, three bugs: what is repaired in gpg.py. This file is not handed out."""

import random
from dataclasses import replace

import a3
from mistakes import known_in
from probe import Case, Question

HUNTED = {  # A3's mistakes from which each bug is chosen; not all show in a default run
    "Q1": ("Q2", ["samples for groups", "share of valid groups"]),
    "Q2": ("Q3", ["total_tokens ignored", "mean of each completion first"]),
    "Q3": ("Q7", ["gradients not cleared", "advantages of the first rows"]),
}


def bugs(seed: int) -> dict[str, tuple[str, str, str]]:
    """{question: (right text, wrong text, hint)}, others every year."""
    rng = random.Random(seed)
    return {key: known_in(f"A3 {q}")[rng.choice(names)] for key, (q, names) in HUNTED.items()}


def training(seed: int) -> list[Case]:
    return [replace(case, part="train") for case in a3.update(seed)]


QUESTIONS = {
    "Q1": Question("gpg.py", "gradient_scale", a3.alpha),
    "Q2": Question("gpg.py", "gpg_loss", a3.loss),
    "Q3": Question("gpg.py", "train", training),
}
