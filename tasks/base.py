"""The base class of the tasks, and shared helpers."""

import copy
import os
from pathlib import Path

import gymnasium

PROBLEMS_PER_SEED = 10**7


class UserError(ValueError):
    """An error the user can fix. The scripts print it as one line and exit with status 2."""


def cache_dir() -> Path:
    """Where tiny models and data sets are cached: under $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "policy-gradients"


def first_problem(seed: int) -> int:
    """The index of the first training problem of a run with this --seed.

    Demonstrations count from 0, so that no run trains on them. Seeds 0 to 199 have ten million
    problems each, seed 200 those of seed 0 again: every index stays below 2**31, where the test
    of an environment without splits begins.
    """
    return PROBLEMS_PER_SEED * (1 + seed % 200)


def is_text(x) -> bool:
    """Is x a string that can be encoded? One with a lone surrogate cannot."""
    return isinstance(x, str) and x.encode(errors="ignore").decode() == x


def is_prompt(x) -> bool:
    """Is x a text, a list of messages {"role", "content"}, or {"image", "text"}? Not empty."""
    if isinstance(x, dict):
        return "image" in x and is_text(x.get("text")) and x["text"] != ""
    if isinstance(x, list):
        return x != [] and all(
            isinstance(turn, dict) and is_text(turn.get("role")) and is_text(turn.get("content"))
            for turn in x
        )
    return is_text(x) and x != ""


class Texts(gymnasium.spaces.Text):
    """All texts. Gymnasium's own have an alphabet and a length; here only those of sample() do."""

    def contains(self, x) -> bool:
        return is_text(x)


class Prompts(Texts):
    """All prompts, with and without pictures. sample() gives a text."""

    def contains(self, x) -> bool:
        return is_prompt(x)


class TextTask(gymnasium.Env):
    """A one-step episode: observe a prompt, act with a completion, receive a reward, terminate.

    Subclasses define `problem` and `reward` or `rewards`. The tiny model also needs
    `demonstration(index)`, a completion of problem `index` to imitate; it may be wrong. A prompt is
    a string, a list of chat messages {"role", "content"}, or {"image": uint8 [H, W, 3], "text":
    string}.
    """

    observation_space, action_space = Prompts(80), Texts(80)
    size: int | None = None  # number of problems; None: endless
    words: list[str] | None = None  # the tiny model's vocabulary; None: one token per byte

    def __init__(self, split: str = "train"):
        self.split = split  # "train" or "test"

    def problem(self, index: int) -> tuple[str | list | dict, str]:
        """Problem `index` as (prompt, answer). The same index gives the same problem.

        The test counts from 0, to at most `size`. Training counts on from `first_problem(seed)`:
        a task with a `size` makes one pass over its problems every `size` indices.
        """
        raise NotImplementedError

    def reward(self, completion: str, answer: str) -> float:
        """The reward of a completion. Above 0 counts as solved."""
        return self.rewards([completion], answer)[0]

    def rewards(self, completions: list[str], answer: str) -> list[float]:
        """The rewards of a group of completions, for a task that judges them together, with a model
        for example. It may be defined in place of `reward`."""
        return [self.reward(completion, answer) for completion in completions]

    def reset(self, *, seed=None, options=None):
        """reset(seed=i) gives problem i; without a seed, a random one."""
        super().reset(seed=seed)
        index = int(self.np_random.integers(2**31)) if seed is None else seed
        self.prompt, self.answer = self.problem(index)
        return self.prompt, {}

    def step(self, completion: str):
        reward = self.reward(completion, self.answer)
        return copy.deepcopy(self.prompt), reward, True, False, {"answer": self.answer}
