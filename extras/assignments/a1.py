"""A1, CoPG on a bandit: the questions of bandit_toy.py."""

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


def losses(names: str):
    """Questions about the gradient of each loss, which is all that counts: a constant does not."""

    def gradient(module, name, seed):
        p, logits = pairs(module, seed)
        weight = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(3, 4)
        value = getattr(module, name)(p)
        if not value.requires_grad:
            why = "rb is detached; build the loss from r and h, or from logp"
            raise ValueError(f"what your loss returns has no gradient: {why}")
        return torch.autograd.grad((value * weight).sum(), logits)[0]

    def cases(seed: int) -> list[Case]:
        label = "{}(pairs), its gradient in the logits".format
        return [Case(label(x), gradient, (x, seed)) for x in names.split()]

    return cases


def data(seed: int) -> list[Case]:
    def episodes(module):
        env, rng = module.ThreeArmedBandit(), module.np.random.default_rng(seed)
        env.step = lambda arm: (0, 10.0 - arm, True, False, {})  # not the rewards of the file
        found = module.collect((0.2, 0.3, 0.5), 4000, rng, env)
        arms, rewards = map(torch.as_tensor, found)
        shares = [(arms == i).double().mean() for i in range(3)]
        return {"shares": shares, "rewards": [rewards[arms == i].unique() for i in range(3)]}

    def columns(module, labels):
        y, y_, wins = map(torch.as_tensor, module.data_set((seed, seed + 1), 3000, labels))
        difference = torch.tensor(module.R)[y] - torch.tensor(module.R)[y_]
        preferred = [wins[difference == d].double().mean() for d in (1.5, -1.5)]
        shares = [(arm == i).double().mean() for arm in (y, y_) for i in range(3)]
        apart = bool((y[0] != y[1]).any() and (y != y_).any())
        return {"wins": preferred, "shares": shares, "seeds differ": apart}

    label = "data_set, {}: shares and preferences".format
    cases = [Case(label(x), columns, (x,), 0.1) for x in ("sampled", "ranked")]
    return [Case("collect((.2, .3, .5), 4000, rng, env)", episodes, (), 0.05), *cases]


QUESTIONS = {
    "Q1": Question("bandit_toy.py", "optimal_policy objective regret", optimum),
    "Q2": Question("bandit_toy.py", "PairBatch.__init__", attributes),
    "Q3": Question("bandit_toy.py", "copg_loss", losses("copg_loss")),
    "Q4": Question("bandit_toy.py", RIVALS, losses(RIVALS)),
    "Q5": Question("bandit_toy.py", "collect data_set", data),
}
