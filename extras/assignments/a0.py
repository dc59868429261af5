"""A0, REINFORCE on a bandit: the questions of reinforce.py."""

import torch
from probe import Case, Question, call, gradient


def numbers(seed: int):
    """Logits [4], rewards of the arms [4], arms drawn [6]."""
    generator = torch.Generator().manual_seed(seed)
    logits, rewards = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    return logits, rewards, torch.randint(4, (6,), generator=generator)


def exact(seed: int) -> list[Case]:
    logits, rewards, _ = numbers(seed)
    return [call("exact_gradient", logits, r) for r in (rewards, rewards + 5, rewards.abs())]


def loss(seed: int) -> list[Case]:
    logits, rewards, arms = numbers(seed)
    rewards, baselines = rewards[arms], (torch.zeros(6).double(), torch.arange(6.0).double())
    return [gradient("reinforce_loss", logits, arms, rewards, b) for b in baselines]


def baselines(seed: int) -> list[Case]:
    rewards = [torch.randn(n, generator=torch.Generator().manual_seed(seed)) for n in (2, 5)]
    return [call(name, r) for name in ("group_mean", "mean_of_others") for r in rewards]


def training(seed: int) -> list[Case]:
    """With so many arms per step that chance does not matter."""

    def curve(module, baseline):
        return module.train(baseline, steps=30, lr=0.5, group_size=40_000)

    def still(module):
        module.BASELINES["the rewards"] = lambda rewards: rewards
        return module.train("the rewards", steps=3, lr=0.5, group_size=8)

    names = ["none", "mean of others"]
    cases = [Case(f"train({x!r})", curve, (x,), 0.01) for x in names]
    return [*cases, Case("train with the rewards as their own baseline: nothing changes", still)]


QUESTIONS = {
    "Q1": Question("reinforce.py", "exact_gradient", exact),
    "Q2": Question("reinforce.py", "reinforce_loss", loss),
    "Q3": Question("reinforce.py", "group_mean mean_of_others", baselines),
    "Q4": Question("reinforce.py", "train", training),
}
