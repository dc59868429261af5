"""A1, CoPG on a bandit: the questions of bandit_toy.py."""

import torch
from probe import Case, Question, call

ATTRIBUTES = ["r", "r_", "rb", "rb_", "logp", "logp_", "h", "h_", "w", "w_"]
ATTRIBUTES += ["value", "value_kl", "margin"]
METHODS = ["pg_loss", "pg_value_loss", "pg_value_kl_loss", "is_loss", "rloo_loss", "ipo_loss"]


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
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    y, y_ = torch.randint(3, (2, 3, 4), generator=generator)
    wins = torch.rand(3, 4, generator=generator) < 0.5
    mu = (0.2, 0.3, 0.5), (0.6, 0.3, 0.1)
    p = module.PairBatch(logits, y, y_, wins, beta=0.3, mu=mu)  # with 0.5, 2 beta would be 1
    return p, logits


def value_and_slope(value, logits) -> dict:
    slope = torch.zeros_like(logits)
    if value.requires_grad:
        slope = torch.autograd.grad(value.sum(), logits, allow_unused=True)[0]
    return {"value": value.detach(), "gradient": slope}


def attributes(seed: int) -> list[Case]:
    cases = []
    for name in ATTRIBUTES:

        def run(module, name=name):
            p, logits = pairs(module, seed)
            return value_and_slope(torch.as_tensor(getattr(p, name)), logits)

        cases.append(Case(f"PairBatch(...).{name}, with its gradient", run))
    return cases


def loss_cases(names: list[str], seed: int) -> list[Case]:
    """The gradient of each loss, which is all that counts: a constant does not matter."""
    cases = []
    for name in names:

        def run(module, name=name):
            p, logits = pairs(module, seed)
            loss = getattr(module, name)(p)  # [3, 4]
            weight = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(3, 4)
            return torch.autograd.grad((loss * weight).sum(), logits)[0]

        cases.append(Case(f"{name}(pairs), its gradient with respect to the logits", run))
    return cases


def data(seed: int) -> list[Case]:
    def episodes(module):
        arms, rewards = module.collect(
            (0.2, 0.3, 0.5), 4000, module.np.random.default_rng(seed), module.ThreeArmedBandit()
        )
        shares = [sum(arm == i for arm in arms) / 4000 for i in range(3)]
        seen = {str(arm): float(r) for arm, r in zip(arms, rewards, strict=True)}
        return {"shares": [round(x, 1) for x in shares], "rewards": seen, "n": len(arms)}

    def columns(module, labels):
        y, y_, wins = module.data_set((seed, seed + 1), 3000, labels)
        difference = torch.tensor(module.R)[y] - torch.tensor(module.R)[y_]
        preferred = [wins[difference == d].double().mean().item() for d in (1.5, -1.5)]
        shares = [(arm == i).double().mean().item() for arm in (y, y_) for i in range(3)]
        apart = bool((y[0] != y[1]).any() and (y != y_).any())
        return {"wins": preferred, "shares": shares, "seeds differ": apart}

    return [
        Case("collect((.2, .3, .5), 4000, rng, env), shares and rewards of the arms", episodes),
        Case(
            "data_set(...), sampled: shares and preferences", lambda m: columns(m, "sampled"), 0.1
        ),
        Case("data_set(...), ranked: shares and preferences", lambda m: columns(m, "ranked"), 0.1),
    ]


QUESTIONS = {
    "Q1": Question(
        "The optimum and the regret",
        20,
        "bandit_toy.py",
        ["optimal_policy", "objective", "regret"],
        optimum,
    ),
    "Q2": Question("What a loss may look at", 25, "bandit_toy.py", ["PairBatch"], attributes),
    "Q3": Question(
        "The loss of CoPG",
        15,
        "bandit_toy.py",
        ["copg_loss"],
        lambda seed: loss_cases(["copg_loss"], seed),
    ),
    "Q4": Question(
        "Its rivals",
        20,
        "bandit_toy.py",
        [*METHODS, "dpo_loss"],
        lambda seed: loss_cases([*METHODS, "dpo_loss"], seed),
    ),
    "Q5": Question("Collecting the data", 10, "bandit_toy.py", ["collect", "data_set"], data),
}
WRITTEN = {"W1": 5, "W2": 5}
