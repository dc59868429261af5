"""Tasks: prompts and rewards.

Every task is registered with Gymnasium: `gymnasium.make("add", split="test")`.
"""

import gymnasium

from .addition import Addition
from .base import TextTask, UserError, cache_dir, first_problem
from .count import Count
from .episodes import get_prompts, get_rewards, held_out, make_task, make_tasks
from .jsonl import GSM8K, JSONLines
from .posts import Posts
from .verifier import extract_answer, is_correct
from .words import ExactWords

__all__ = [
    "GSM8K", "Addition", "Count", "ExactWords", "JSONLines", "Posts", "TextTask", "UserError",
    "cache_dir", "extract_answer", "first_problem", "get_prompts", "get_rewards", "held_out",
    "is_correct", "make_task", "make_tasks",
]  # fmt: skip

gymnasium.register("add", Addition)
gymnasium.register("add-hard", Addition, kwargs={"hard": True})
for digits in range(1, 7):
    gymnasium.register(f"add{digits}", Addition, kwargs={"digits": digits})
gymnasium.register("count", Count)
gymnasium.register("gsm8k", GSM8K)
gymnasium.register("posts", Posts)
gymnasium.register("words", ExactWords)
