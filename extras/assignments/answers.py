"""Right answers to the written questions; their numbers come from written.py. Not handed out."""

import math
from types import SimpleNamespace

import reinforce
import torch

import bandit_toy
import common
import copg
import gpg
from tasks import Posts


def bandit_regret(method: str, mu1: list[float], mu2: list[float]) -> float:
    return float(bandit_toy.regret(bandit_toy.limit(method, mu=(mu1, mu2))))


def number_of_micro_batches(lengths: list[int], budget: int) -> int:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rollout = SimpleNamespace(prompt_mask=mask[:, :0], completion_mask=mask, group=torch.zeros(1))
    return len(common.micro_batches(rollout, budget))


def clipped(ratio: float, advantage: float, clip_low: float, clip_high: float):
    """J of one token, and its derivative with respect to the ratio."""
    bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
    if ratio * advantage <= bounded * advantage:
        return ratio * advantage, advantage
    return bounded * advantage, 0.0


ANSWERS = {
    "A0 W1": lambda logits, rewards: float(
        reinforce.exact_gradient(torch.tensor(logits), torch.tensor(rewards))[0]
    ),
    "A0 W2": lambda G: (G - 1) / G,
    "A1 W1": lambda mu1, mu2: bandit_regret("pg-value", mu1, mu2),
    "A1 W2": lambda mu1, mu2: bandit_regret("pg", mu1, mu2),
    "A2 W1": lambda logits, temperature: float(
        (torch.tensor(logits) / temperature).log_softmax(0)[0]
    ),
    "A2 W2": number_of_micro_batches,
    "A3 W1": lambda p, G: 1 - p**G - (1 - p) ** G,
    "A3 W2": lambda rewards: gpg.gradient_scale(torch.tensor(rewards)),
    "A3 W3": lambda dead, valid, dead_length, valid_length: (
        (dead + valid) * valid_length / (dead * dead_length + valid * valid_length)
    ),
    "A4 W1": lambda **token: clipped(**token)[0],
    "A4 W2": lambda **token: clipped(**token)[1],
    "A4 W3": lambda pi, ref: ref / pi - math.log(ref / pi) - 1,
    "A5 W1": lambda r1, r2, beta: (r1 - r2) / beta,
    "A5 W2": lambda beta: 1 / (2 * beta),
    "A5 W3": lambda summary, answer: Posts().reward(summary, answer),
    "A5 W4": lambda h, r, beta: copg.copg_loss(torch.tensor([h]), torch.tensor([r]), beta).item(),
}
