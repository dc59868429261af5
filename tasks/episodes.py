"""Create a task, get its prompts, score completions."""

import contextlib
import importlib
import inspect
import math
import numbers
import os
import sys
from pathlib import Path

import gymnasium
import torch
from gymnasium.envs.registration import load_env_creator
from gymnasium.utils.env_checker import data_equivalence
from torch import Tensor
from tqdm import tqdm

from .base import TextTask, UserError, is_prompt
from .jsonl import JSONLines, choose, read_records

# ---- Creating a task -----------------------------------------------------------------------------


def make_task(name: str, split: str = "train", whole: bool = False) -> gymnasium.Env:
    """A task for the split "train" or "test"; whole=True gives all of a file to this split. Raises
    UserError for a name that is no task.

    `name` is an id of this folder ("add", "gsm8k", "posts"), a file ("problems.jsonl"), or any
    Gymnasium environment whose actions and observations are text, with its module
    ("my_tasks:Haiku-v0").
    """
    if name.endswith(".jsonl"):
        records = read_records(Path(name))
        return JSONLines(records if whole else choose(records, split), split)
    unknown = f"--task {name}: not a task such as add or gsm8k, a .jsonl file or module:Name-v0"
    module, _, env_id = name.rpartition(":")
    if name.startswith((".", ":")):  # ./my_tasks:Haiku-v0
        raise UserError(unknown)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for the user's my_tasks.py
    with task_code("while it was made"):
        try:
            if module:
                importlib.import_module(module)
            spec = gymnasium.spec(env_id)
        except (gymnasium.error.Error, ModuleNotFoundError) as error:
            raise UserError(f"{unknown} ({error})") from error
        constructor = spec.entry_point
        if isinstance(constructor, str):
            constructor = load_env_creator(constructor)
        parameters = inspect.signature(constructor).parameters.values()
        if any(p.name == "split" or p.kind is p.VAR_KEYWORD for p in parameters):
            return gymnasium.make(spec, disable_env_checker=True, split=split)
        env = gymnasium.make(spec, disable_env_checker=True)
        return env if split == "train" else HeldOutSeeds(env)


def make_tasks(name: str, eval_name: str | None) -> tuple[gymnasium.Env, gymnasium.Env]:
    """The training task, and the test of the same or of another task: then nothing is held out of
    the files of either."""
    whole = eval_name is not None
    return make_task(name, "train", whole), make_task(eval_name or name, "test", whole)


class HeldOutSeeds(gymnasium.Wrapper):
    """The test of a task without splits: seeds beyond those of training (see `first_problem`)."""

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=None if seed is None else 2**31 + seed, options=options)


@contextlib.contextmanager
def task_code(when: str):
    """Around a task's own code: say when it failed, before the traceback that shows where."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        tqdm.write(f"the task failed {when}:", file=sys.stderr)
        if isinstance(error, (OSError, RuntimeError, MemoryError, SystemExit)):
            raise TaskError(repr(error)) from error
        raise


class TaskError(Exception):
    """In place of an exception from which a script would conclude something about itself."""


def get_size(task: gymnasium.Env) -> int | None:
    """The number of problems; None if the task is endless. Raises UserError."""
    size = getattr(task.unwrapped, "size", None)
    if size is not None and not (isinstance(size, numbers.Integral) and size > 0):
        raise UserError(f"the task has the size {size!r:.60}: not a number of problems")
    return size


def held_out(task: gymnasium.Env, count: int, first: int = 0) -> list[list[int]]:
    """The problems of an evaluation: up to `count`, starting at `first`, in batches of 64.

    Raises UserError if there are none.
    """
    end = min(first + count, get_size(task) or first + count)
    if first >= end:
        raise UserError(f"--eval-first {first}: there are only {end} held-out problems")
    return [list(range(i, min(i + 64, end))) for i in range(first, end, 64)]


# ---- Episodes ------------------------------------------------------------------------------------


def get_prompts(task: gymnasium.Env, problems: list[int]) -> list:
    """The prompts of these problems: what reset(seed=i) returns, a text, a list of messages or
    {"image", "text"}. Raises UserError if there is no text."""
    prompts = []
    for index in problems:
        with task_code(f"at problem {index}"):
            prompt, _ = task.reset(seed=index)
        if not is_prompt(prompt):
            raise UserError(
                f"problem {index} of the task has the prompt {prompt!r:.60}: not a text"
            )
        prompts.append(prompt)
    return prompts


def get_rewards(
    task: gymnasium.Env, problems: list[int], completions: list[str]
) -> tuple[Tensor, Tensor]:
    """B problems and B * G completions -> rewards [B, G] and solved [B, G], one episode each.

    A completion has solved its problem if info["solved"] says so; without that, if its reward is
    above 0. A TextTask that defines `rewards` is asked once for each group instead. Raises
    UserError if a problem changes its prompt, if an episode does not end after one step, and for a
    reward that is not a finite float32.
    """
    G = len(completions) // len(problems)
    together = getattr(type(task.unwrapped), "rewards", TextTask.rewards) is not TextTask.rewards
    rewards, solved = [], []
    for i, index in enumerate(problems):
        group, problem = completions[i * G : (i + 1) * G], f"problem {index} of the task"
        (prompt,) = get_prompts(task, [index])  # it resets the task
        if together:
            with task_code(f"at problem {index}, completions {group!r:.200}"):
                outcomes = [(r, {}) for r in task.unwrapped.rewards(group, task.unwrapped.answer)]
            if len(outcomes) != G:
                raise UserError(f"{problem} has {len(outcomes)} rewards for {G} completions")
        else:
            outcomes = [episode(task, index, prompt, completion) for completion in group]
        for completion, (reward, info) in zip(group, outcomes, strict=True):
            value = as_number(reward)
            if not math.isfinite(value):
                raise UserError(
                    f"{problem} has the reward {reward!r:.60} for {completion!r:.60}: "
                    "not a finite number"
                )
            is_solved = info.get("solved", value > 0)
            if as_number(is_solved) not in (0, 1):
                raise UserError(f"{problem} has the info 'solved': {is_solved!r:.60}, not a bool")
            rewards.append(value)
            solved.append(bool(is_solved))
    return torch.tensor(rewards).view(-1, G), torch.tensor(solved).view(-1, G)


def episode(task: gymnasium.Env, index: int, prompt, completion: str) -> tuple:
    """The reward and the info of one episode."""
    problem, again = f"problem {index} of the task", get_prompts(task, [index])
    if not data_equivalence(again, [prompt], exact=True):
        raise UserError(f"{problem} has another prompt after another reset(seed={index})")
    with task_code(f"at problem {index}, completion {completion!r:.200}"):
        _, reward, terminated, _, info = task.step(completion)
    if as_number(terminated) != 1:
        raise UserError(f"{problem} does not terminate after one step")
    if not isinstance(info, dict):
        raise UserError(f"{problem} has the info {info!r:.60}: not a dict")
    return reward, info


def as_number(x) -> float:
    """A number, bool or scalar tensor as a float32; NaN for anything else."""
    try:
        value = torch.as_tensor(x, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan
    return value.item() if value.ndim == 0 else math.nan
