"""Right answers to the written questions, by the reference; their numbers come from written.py."""

import torch

import bandit_toy
import common
import copg
import gpg
import grpo
from tasks import Posts


def bandit_regret(method: str, mu1: list[float], mu2: list[float]) -> float:
    return float(bandit_toy.regret(bandit_toy.limit(method, mu=(mu1, mu2))))


def tempered(logits: list[float], temperature: float) -> float:
    generator = torch.random.get_rng_state()
    logits = torch.tensor([[*logits]] * 200)
    tokens, logprobs = common.draw(logits, temperature)
    torch.random.set_rng_state(generator)
    return logprobs[tokens == 0].mean().item()


def number_of_micro_batches(lengths: list[int], budget: int) -> int:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    n = len(lengths)
    rollout = common.Rollout(
        prompt_ids=mask[:, :0].long(),
        prompt_mask=mask[:, :0],
        completion_ids=mask.long(),
        completion_mask=mask,
        logprobs=torch.zeros(mask.shape),
        truncated=mask[:, 0],
        texts=[""] * n,
    )
    return len(common.micro_batches(rollout, budget))


def share_of_valid_groups(p: float, G: int) -> float:
    """Every group of 0s and 1s, enumerated, by its probability."""
    groups = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * G)  # [2^G, G]
    right = groups.sum(1).double()
    return float((p**right * (1 - p) ** (G - right))[gpg.is_valid(groups)].sum())


def alpha_over_exact(dead: int, valid: int, dead_length: int, valid_length: int) -> float:
    """The loss with alpha over the loss of the valid groups alone, G = 2."""
    rewards = torch.tensor([[1.0, 0.0]] * valid + [[1.0, 1.0]] * dead).double()
    lengths = torch.tensor([[valid_length, 1]] * valid + [[dead_length, 1]] * dead).flatten()
    lengths[1::2] = lengths[::2]
    mask = torch.arange(max(dead_length, valid_length)) < lengths[:, None]
    logprobs = -torch.arange(1.0, mask.numel() + 1).view(mask.shape).double()
    advantages, n = gpg.group_advantages(rewards).flatten(), 2 * valid
    loss = gpg.gpg_loss(logprobs, advantages, mask, gpg.gradient_scale(rewards))
    return float(loss / gpg.gpg_loss(logprobs[:n], advantages[:n], mask[:n]))


def clipped_slope(ratio: float, advantage: float, clip_low: float, clip_high: float, slope: bool):
    """J of one token, or its derivative by the ratio."""
    ratio = torch.tensor([[ratio]], dtype=torch.double, requires_grad=True)
    ones, zeros = torch.ones(1, 1), torch.zeros(1, 1).double()
    J = -grpo.grpo_loss(ratio.log(), zeros, torch.tensor([advantage]), ones, clip_low, clip_high)
    return torch.autograd.grad(J, ratio)[0].item() if slope else J.item()


def least(loss, start: float = 0.0) -> float:
    """Where a parabola of one number is least: one step of Newton's."""
    d = torch.tensor([start], dtype=torch.double, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(d), d, create_graph=True)
    return (d - slope / torch.autograd.grad(slope.sum(), d)[0]).item()


def copg_optimum(r1: float, r2: float, beta: float) -> float:
    rewards = torch.tensor([[r1, r2]]).double()
    return least(lambda d: copg.copg_loss(torch.stack([d, 0 * d], 1), rewards, beta))


def copg_value(h: list[float], r: list[float], beta: float) -> float:
    return copg.copg_loss(torch.tensor([h]).double(), torch.tensor([r]).double(), beta).item()


ANSWERS = {
    "A1": {
        "W1": lambda n: bandit_regret("pg-value", n["mu1"], n["mu2"]),
        "W2": lambda n: bandit_regret("pg", n["mu1"], n["mu2"]),
    },
    "A2": {
        "W1": lambda n: tempered(n["logits"], n["temperature"]),
        "W2": lambda n: number_of_micro_batches(n["lengths"], n["budget"]),
    },
    "A3": {
        "W1": lambda n: share_of_valid_groups(n["p"], n["G"]),
        "W2": lambda n: gpg.gradient_scale(torch.tensor(n["rewards"])),
        "W3": lambda n: alpha_over_exact(**n),
    },
    "A4": {
        "W1": lambda n: clipped_slope(**n, slope=False),
        "W2": lambda n: clipped_slope(**n, slope=True),
        "W3": lambda n: grpo.kl_k3(*(torch.tensor([n[x]]).log() for x in ("pi", "ref"))).item(),
    },
    "A5": {
        "W1": lambda n: copg_optimum(**n),
        "W2": lambda n: least(lambda d: copg.ipo_loss(d, 0 * d, n["beta"])),
        "W3": lambda n: Posts().reward(n["summary"], n["answer"]),
        "W4": lambda n: copg_value(**n),
    },
}
