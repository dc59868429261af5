"""Counting coloured squares in a picture: the default task with pictures."""

import random

import numpy as np

from .base import TextTask
from .verifier import is_correct

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
}
SIDE, CELL = 3, 8  # a picture has SIDE x SIDE squares of CELL x CELL pixels
FLAWLESS = 20_000  # demonstrations before this one contain no mistakes


class Count(TextTask):
    """How many squares are red? `red?` is answered by `1+0+2=3`: row by row, then the sum.

    After the first, flawless demonstrations, half of them miscount one row. Test pictures use
    other seeds, but half of them also occur in the demonstrations.
    """

    def squares(self, index: int) -> tuple[list[list[str]], str]:
        """The colours of problem `index`, row by row, and the colour to count."""
        rng = random.Random(f"{self.split} {index}")
        asked = rng.choice(list(COLOURS))
        # Half of the squares have this colour on purpose, else most counts would be about 2.
        rows = [
            [asked if rng.random() < 0.5 else rng.choice(list(COLOURS)) for _ in range(SIDE)]
            for _ in range(SIDE)
        ]
        return rows, asked

    def problem(self, index):
        rows, asked = self.squares(index)
        pixels = np.array([[COLOURS[colour] for colour in row] for row in rows], np.uint8)
        image = pixels.repeat(CELL, 0).repeat(CELL, 1)
        return {"image": image, "text": f"{asked}?"}, str(sum(row.count(asked) for row in rows))

    def reward(self, completion, answer):
        return float(is_correct(completion, answer))

    def demonstration(self, index):
        rows, asked = self.squares(index)
        counts = [row.count(asked) for row in rows]
        rng = random.Random(f"slip {self.split} {index}")
        if index >= FLAWLESS and rng.random() < 0.5:
            row = rng.randrange(SIDE)
            counts[row] = rng.choice([n for n in range(SIDE + 1) if n != counts[row]])
        return f"{'+'.join(map(str, counts))}={sum(counts)}"
