"""A5, Contrastive Policy Gradient: the questions of copg.py and of the posts."""

import torch
from probe import Case, Question, gradient

from tasks import Posts


def h_and_rewards(seed: int, G: int):
    generator = torch.Generator().manual_seed(seed + G)
    h = torch.randn(3, G, generator=generator, dtype=torch.float64)
    return h, torch.randn(3, G, generator=generator, dtype=torch.float64)


def copg(seed: int) -> list[Case]:
    sizes = [(G, beta) for G in (2, 3, 5) for beta in (0.06, 0.7)]
    return [gradient("copg_loss", *h_and_rewards(seed, G), beta) for G, beta in sizes]


def preferences(seed: int) -> list[Case]:
    best, worst = h_and_rewards(seed, 2)[0].T
    names = "ipo_loss", "dpo_loss"
    cases = [gradient(x, best, worst, 0.3, wrt=wrt) for x in names for wrt in (0, 1)]
    for loss in ("copg", "ipo", "dpo"):
        for G in (2, 4):
            h, rewards = h_and_rewards(seed, G)
            rewards[0] = 1.0  # all equal
            cases.append(gradient("policy_loss", loss, h, rewards, 0.2, wrt=1))
    return cases


def reward_model(seed: int) -> list[Case]:
    h, _ = h_and_rewards(seed, 2)
    return [gradient("bradley_terry_loss", h[:, 0] * k, h[:, 1], wrt=k % 2) for k in (1, 2, 40)]


def utility(seed: int) -> list[Case]:
    def reward(module, *texts):
        return module.Posts().reward(*texts)

    task, cases = Posts(), []
    for index in range(seed, seed + 4):
        answer = task.problem(index)[1]
        facts = answer.split(" ; ")
        texts = ["", answer, facts[0], " ; ".join([*facts[:2], facts[0]]), "thanks for reading"]
        texts += [f"{facts[1]} ; my boss lost my bike", task.write(index, 1), task.write(index, 2)]
        cases += [Case(f"Posts().reward{x, answer}", reward, (x, answer)) for x in texts]
    return cases


QUESTIONS = {
    "Q1": Question("copg.py", "copg_loss", copg),
    "Q2": Question("copg.py", "ipo_loss dpo_loss policy_loss", preferences),
    "Q3": Question("copg.py", "bradley_terry_loss", reward_model),
    "Q4": Question("tasks/posts.py", "Posts.reward", utility),
}
