"""The base class of the tasks, and what every other file stands on."""

from __future__ import annotations

import copy
import os
import string
from pathlib import Path

import gymnasium
import numpy as np


class UserError(ValueError):
    """An error the user can fix. The scripts print it as one line and exit with status 2."""


def cache_dir() -> Path:
    """Where tiny models and GSM8K are kept: below $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "policy-gradients"


class AnyText(gymnasium.spaces.Text):
    """All strings. Gymnasium's own Text needs a finite alphabet; here only sample() uses one."""

    def __init__(self):
        super().__init__(max_length=80, min_length=0, charset=string.printable)

    def contains(self, x) -> bool:
        return isinstance(x, str)


class AnyImage(gymnasium.spaces.Box):
    """Pictures of any size: uint8 [H, W, 3]. sample() gives a small one."""

    def __init__(self):
        super().__init__(0, 255, (8, 8, 3), np.uint8)

    def contains(self, x) -> bool:
        return isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.shape[2:] == (3,)


class TextTask(gymnasium.Env):
    """A one-step episode: observe a prompt, act with a completion, receive a reward, terminate.

    Subclasses define `problem` and `reward`. The tiny model also needs `demonstration(index)`, a
    completion of problem `index` to imitate; it need not be right. A prompt is a text, or with a
    picture {"image": uint8 [H, W, 3], "text": ...}.
    """

    size: int | None = None  # number of problems; None: endless
    words: list[str] | None = None  # the tiny model's vocabulary; None: one token per byte

    def __init__(self, split: str = "train"):
        self.split = split  # "train" or "test"
        self.observation_space, self.action_space = AnyText(), AnyText()

    def problem(self, index: int) -> tuple[str | dict, str]:
        """Problem `index` >= 0 as (prompt, answer). The same index gives the same problem."""
        raise NotImplementedError

    def reward(self, completion: str, answer: str) -> float:
        """The reward of a completion. Above 0 counts as solved."""
        raise NotImplementedError

    def reset(self, *, seed=None, options=None):
        """reset(seed=i) gives problem i; without a seed, a random one."""
        super().reset(seed=seed)
        index = int(self.np_random.integers(2**31)) if seed is None else seed
        self.prompt, self.answer = self.problem(index)
        return self.prompt, {}

    def step(self, completion: str):
        reward = self.reward(completion, self.answer)
        return copy.deepcopy(self.prompt), reward, True, False, {"answer": self.answer}
