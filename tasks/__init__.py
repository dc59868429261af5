"""Tasks: prompts and rewards.

Every task is registered with Gymnasium: `gymnasium.make("add", split="test")`.
"""

import gymnasium

from .addition import Addition
from .base import TextTask, UserError, cache_dir, first_problem
from .count import Count
from .episodes import get_prompts, get_rewards, held_out, make_task, make_tasks
from .jsonl import JSONLines
from .maths import Maths
from .posts import Posts
from .verifier import extract_answer, is_correct
from .words import ExactWords

__all__ = [
    "Addition", "Count", "ExactWords", "JSONLines", "Maths", "Posts", "TextTask", "UserError",
    "cache_dir", "extract_answer", "first_problem", "get_prompts", "get_rewards", "held_out",
    "is_correct", "make_task", "make_tasks",
]  # fmt: skip

gymnasium.register("add", Addition)
gymnasium.register("add-hard", Addition, kwargs={"hard": True})
for digits in range(1, 7):
    gymnasium.register(f"add{digits}", Addition, kwargs={"digits": digits})
gymnasium.register("count", Count)
for name in ("gsm8k", "math", "math500", "aime24", "amc23", "minerva", "olympiadbench"):
    gymnasium.register(name, Maths, kwargs={"name": name})
gymnasium.register("posts", Posts)
gymnasium.register("words", ExactWords)
