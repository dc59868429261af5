"""Column addition: the default task, easy enough to learn on a CPU in a minute."""

from __future__ import annotations

import random
import zlib

from .base import TextTask
from .verifier import is_correct

CAREFUL = 18_000  # the first demonstrations have no slips


class Addition(TextTask):
    """`47+85=` is answered by `7+5+0=12 4+8+1=13 =132`: columns with their carries, then the sum.

    The first demonstrations are flawless, so that the tiny model learns the procedure. Half of the
    later ones contain one slip, in a digit or in a carry, and continue from it. A model that
    imitates them is right about half of the time, which leaves room for reinforcement learning.
    The hard variant slips in four columns out of five: few answers are right, most groups are dead.
    """

    def __init__(self, split: str = "train", digits: int = 3, hard: bool = False):
        super().__init__(split)
        self.digits, self.hard = digits, hard

    def problem(self, index):
        rng = random.Random(f"{self.split} {index}")
        while True:
            a, b = (rng.randrange(10 ** rng.randint(1, self.digits)) for _ in range(2))
            held_out = zlib.crc32(f"{a}+{b}".encode()) % 10 == 0  # one sum in ten is for the test
            if held_out == (self.split == "test"):
                return f"{a}+{b}=", str(a + b)

    def reward(self, completion, answer):
        return float(is_correct(completion, answer))

    def demonstration(self, index):
        a, b = self.problem(index)[0].rstrip("=").split("+")
        columns = max(len(a), len(b))
        rng = random.Random(f"slip {self.split} {index}")
        slips = []
        if index >= CAREFUL and self.hard:
            slips = [column for column in range(columns) if rng.random() < 0.8]
        elif index >= CAREFUL and rng.random() < 0.5:
            slips = [rng.randrange(columns)]
        work, answer, carry = [], "", 0
        for column in range(columns):
            x, y = (int(n.zfill(columns)[-1 - column]) for n in (a, b))
            total = x + y + carry
            if column in slips and rng.random() < 0.5:  # a carry forgotten or invented
                total = (total + 10) % 20
            elif column in slips:  # a wrong digit
                total += rng.choice([d for d in range(10) if d != total % 10]) - total % 10
            work.append(f"{x}+{y}+{carry}={total}")
            answer = f"{total % 10}{answer}"
            carry = total // 10
        return f"{' '.join(work)} ={'1' * carry}{answer}"
