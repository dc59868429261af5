"""A1, CoPG on a bandit: the questions of bandit_toy.py."""

from functools import partial

import torch
from probe import Case, Question, call

RIVALS = "pg_loss pg_value_loss pg_value_kl_loss is_loss rloo_loss ipo_loss dpo_loss"


def numbers(seed: int):
    """Policies [5, 3], one with a zero, and a problem that is not the paper's."""
    generator = torch.Generator().manual_seed(seed)
    policies = torch.rand(5, 3, generator=generator, dtype=torch.float64).softmax(-1)
    policies[0] = torch.tensor([0.5, 0.0, 0.5])
    problem = {"rewards": (1.5, -0.5, 0.25), "ref": (0.2, 0.5, 0.3), "beta": 0.8}
    return policies, problem


def optimum(seed: int) -> list[Case]:
    policies, problem = numbers(seed)
    cases = [call("optimal_policy"), call("optimal_policy", **problem)]
    for name in ("objective", "regret"):
        cases += [call(name, policies[i]) for i in (0, 1)]
        cases += [call(name, policies, **problem), call(name, policies.view(1, 5, 3))]
    return cases


def pairs(module, seed: int):
    """A PairBatch of 3 seeds x 4 pairs, and its logits, which have a gradient."""
    generator, (_, problem) = torch.Generator().manual_seed(seed), numbers(seed)
    logits = torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    y, y_ = torch.randint(3, (2, 3, 4), generator=generator)
    wins = torch.rand(3, 4, generator=generator) < 0.5
    mu = (0.2, 0.3, 0.5), (0.6, 0.3, 0.1)
    return module.PairBatch(logits, y, y_, wins, mu=mu, **problem), logits


def attributes(seed: int) -> list[Case]:
    def shown(module, name):
        p, logits = pairs(module, seed)
        value, slope = getattr(p, name), torch.zeros(logits.shape)
        if value.requires_grad:
            slope = torch.autograd.grad(value.sum(), logits)[0]
        return {"value": value.detach(), "gradient": slope}

    names = ["r", "r_", "rb", "rb_", "logp", "logp_", "h", "h_", "w", "w_", "margin"]
    names += ["value", "value_kl"]
    return [Case(f"PairBatch.{x}, with its gradient", shown, (x,), part=x) for x in names]


def slope(module, name: str, seed: int):
    """The gradient of a loss is all that counts: a constant does not."""
    p, logits = pairs(module, seed)
    weight = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(3, 4)
    value = getattr(module, name)(p)
    if not value.requires_grad:
        why = "rb is detached; build the loss from r and h, or from logp"
        raise ValueError(f"what your loss returns has no gradient: {why}")
    return torch.autograd.grad((value * weight).sum(), logits)[0]


def losses(seed: int, names: str) -> list[Case]:
    label = "{}(pairs), its gradient in the logits".format
    return [Case(label(x), slope, (x, seed)) for x in names.split()]


QUESTIONS = {
    "Q1": Question("bandit_toy.py", "optimal_policy objective regret", optimum),
    "Q2": Question("bandit_toy.py", "PairBatch.__init__", attributes),
    "Q3": Question("bandit_toy.py", "copg_loss", partial(losses, names="copg_loss")),
    "Q4": Question("bandit_toy.py", RIVALS, partial(losses, names=RIVALS)),
}
