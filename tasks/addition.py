"""Column addition: the default task, easy enough to learn on a CPU in a minute."""

import random
import zlib

from .base import TextTask
from .verifier import is_correct

FLAWLESS = 18_000  # demonstrations before this one contain no mistakes


class Addition(TextTask):
    """`47+85=` is answered by `7+5+0=12 4+8+1=13 =132`: columns with their carries, then the sum.

    The first demonstrations are flawless, so that the tiny model learns the procedure. Half of the
    later ones contain one slip, in a digit or in a carry, and go on from there. A model that
    imitates them is right about half of the time, which leaves room for reinforcement learning.
    The hard variant slips in four columns out of five: few answers are right, most groups are dead.
    One sum in ten is held out.
    """

    def __init__(self, split: str = "train", digits: int = 3, hard: bool = False):
        super().__init__(split)
        self.digits, self.hard = digits, hard

    def problem(self, index):
        rng = random.Random(f"{self.split} {index}")
        while True:
            a, b = (rng.randrange(10 ** rng.randint(1, self.digits)) for _ in range(2))
            is_held_out = zlib.crc32(f"{a}+{b}".encode()) % 10 == 0
            if is_held_out == (self.split == "test"):
                return f"{a}+{b}=", str(a + b)

    def reward(self, completion, answer):
        return float(is_correct(completion, answer))

    def demonstration(self, index):
        a, b = self.problem(index)[0].rstrip("=").split("+")
        n = max(len(a), len(b))
        rng = random.Random(f"slip {self.split} {index}")
        slips = []  # the columns with a slip, counted from the right
        if index >= FLAWLESS and self.hard:
            slips = [column for column in range(n) if rng.random() < 0.8]
        elif index >= FLAWLESS and rng.random() < 0.5:
            slips = [rng.randrange(n)]

        work, answer, carry = [], "", 0
        columns = zip(reversed(a.zfill(n)), reversed(b.zfill(n)), strict=True)
        for column, (x, y) in enumerate(columns):
            new_carry, digit = divmod(int(x) + int(y) + carry, 10)
            if column in slips and rng.random() < 0.5:  # a carry forgotten or invented
                new_carry = 1 - new_carry
            elif column in slips:  # a wrong digit
                digit = rng.choice([d for d in range(10) if d != digit])
            work.append(f"{x}+{y}+{carry}={10 * new_carry + digit}")
            answer = f"{digit}{answer}"
            carry = new_carry
        return f"{' '.join(work)} ={carry or ''}{answer}"
