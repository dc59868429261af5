"""Making a task, asking it for prompts, and letting it reward completions."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .base import UserError
from .jsonl import JSONLines


def make_task(name: str, split: str = "train") -> gymnasium.Env:
    """A task for the split "train" or "test". Raises UserError.

    `name` is an id of this folder ("add", "gsm8k", "posts"), a file ("problems.jsonl"), or any
    Gymnasium environment that takes and gives text, with its module ("my_tasks:Haiku-v0").
    """
    if name.endswith(".jsonl"):
        return JSONLines(Path(name), split)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for the user's my_tasks.py
    try:
        try:
            return gymnasium.make(name, disable_env_checker=True, split=split)
        except TypeError:  # it has no splits
            env = gymnasium.make(name, disable_env_checker=True)
            return env if split == "train" else Elsewhere(env)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise UserError(
            f"--task {name}: not a task such as add or gsm8k, a .jsonl file or module:Name-v0 "
            f"({error})"
        ) from error


class Elsewhere(gymnasium.Wrapper):
    """The test of a task without splits: problems whose numbers no training reaches."""

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed + 10**15, options=options)


def get_prompts(task: gymnasium.Env, problems: list[int]) -> list:
    """The prompts of these problems: what reset(seed=i) gives, a text or a dict of an image and a
    text. Raises UserError if there is no text."""
    prompts = []
    for index in problems:
        with point_at(f"problem {index}"):
            prompt, _ = task.reset(seed=index)
        text = prompt.get("text") if isinstance(prompt, dict) and "image" in prompt else prompt
        if not isinstance(text, str) or not text:
            raise UserError(f"problem {index} of the task has the prompt {prompt!r:.60}: no text")
        prompts.append(prompt)
    return prompts


def get_rewards(
    task: gymnasium.Env, problems: list[int], completions: list[str]
) -> tuple[Tensor, Tensor]:
    """B problems and B * G completions -> rewards [B, G] and solved [B, G], one episode each.

    A completion has solved its problem if info["solved"] says so; without that, if its reward is
    above 0. Raises UserError if a problem changes its prompt, if an episode does not terminate
    after one step, and for a reward that is not a finite float32.
    """
    G = len(completions) // len(problems)
    prompts, rewards, solved = {}, [], []
    for row, completion in enumerate(completions):
        index = problems[row // G]
        (prompt,) = get_prompts(task, [index])
        if not same_prompt(prompt, prompts.setdefault(index, prompt)):
            raise UserError(f"the task gives problem {index} another prompt at every reset")
        with point_at(f"problem {index}, completion {completion!r:.200}"):
            _, reward, terminated, _, info = task.step(completion)
        try:
            value = torch.as_tensor(reward, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            value = torch.tensor(torch.nan)
        if value.ndim or not value.isfinite():
            raise UserError(
                f"the task gives problem {index} the reward {reward!r:.60}, no finite number; "
                f"the completion is {completion!r:.60}"
            )
        if not terminated:
            raise UserError(f"problem {index} of the task does not terminate after one step")
        rewards.append(value.item())
        solved.append(bool(info.get("solved", value > 0)))
    return torch.tensor(rewards).view(-1, G), torch.tensor(solved).view(-1, G)


def same_prompt(a: str | dict, b: str | dict) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a["text"] == b["text"] and np.array_equal(a["image"], b["image"])
    return isinstance(a, str) and a == b


def held_out(task: gymnasium.Env, count: int, first: int = 0) -> list[list[int]]:
    """The problems of an evaluation, `count` from `first` on or as many as there are, in batches of
    64. Raises UserError if there are none."""
    end = min(first + count, getattr(task.unwrapped, "size", None) or first + count)
    if first >= end:
        raise UserError(f"--eval-first {first}: there are only {end} held-out problems")
    return [list(range(i, min(i + 64, end))) for i in range(first, end, 64)]


@contextlib.contextmanager
def point_at(where: str):
    """Say where the user's own task failed; the traceback that follows shows the line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        tqdm.write(f"the task failed at {where}:", file=sys.stderr)
        if isinstance(error, OSError):  # the scripts print one line for those: a full disk
            raise RuntimeError(str(error)) from error
        raise
