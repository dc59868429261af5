"""CoPG's theorems as numbers, on bandits where everything can be enumerated."""

import csv

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import bandit_toy as bandit
from bandit_toy import LOSSES, expected_gradient, limit, objective, optimal_policy, regret, tensor

UNIFORM = (1 / 3,) * 3


def random_problem(seed):
    rng = np.random.default_rng(seed)
    ref, mu1, mu2 = rng.dirichlet((3, 3, 3), size=3)
    return {"rewards": rng.normal(size=3), "ref": ref, "mu1": mu1, "mu2": mu2, "beta": 0.4}


def exact(problem):
    return optimal_policy(problem["rewards"], problem["ref"], problem["beta"])


# ---- exact values ----


def test_exact_values_of_the_paper():
    torch.testing.assert_close(
        optimal_policy(), tensor([0.705385, 0.259496, 0.035119]), atol=1e-6, rtol=0
    )
    assert float(objective(optimal_policy())) == pytest.approx(2.125200, abs=1e-6)
    assert float(objective(UNIFORM)) == pytest.approx(1.833333, abs=1e-6)
    assert float(regret(UNIFORM)) == pytest.approx(0.291867, abs=1e-6)
    assert float(regret(optimal_policy())) == pytest.approx(0, abs=1e-12)
    assert float(objective((0.0, 0.0, 1.0))) == pytest.approx(1 - 0.5 * np.log(3))  # 0 ln 0 = 0


@pytest.mark.parametrize("seed", range(5))
def test_the_optimal_policy_is_the_best(seed):
    problem = random_problem(seed)
    arguments = problem["rewards"], problem["ref"], problem["beta"]
    for policy in np.random.default_rng(seed).dirichlet((1, 1, 1), size=200):
        assert regret(policy, *arguments) > 0


@pytest.mark.parametrize(
    "method, policy, value",
    [
        ("copg", (0.705385, 0.259496, 0.035119), 0.0),
        ("pg", (0.194, 0.250, 0.556), 0.6378),
        ("pg-value", (0.812, 0.168, 0.0209), 0.0148),
        ("ipo", (0.4242, 0.3527, 0.2231), 0.1525),
        ("pg-value-kl", (0.705385, 0.259496, 0.035119), 0.0),
        ("is", (0.705385, 0.259496, 0.035119), 0.0),
        ("rloo", (0.705385, 0.259496, 0.035119), 0.0),
        ("dpo", (0.705385, 0.259496, 0.035119), 0.0),
    ],
)
def test_limits(method, policy, value):
    found = limit(method, 5000 if method == "dpo" else 1500)
    torch.testing.assert_close(found, tensor(policy), atol=6e-4, rtol=0)
    assert float(regret(found)) == pytest.approx(value, abs=6e-5)
    gradient = expected_gradient(method, found.log())
    assert gradient.abs().max() < 1e-9  # it is the end


# ---- theorem 1: the optimum of CoPG is pi*, whatever collected the data ----


@pytest.mark.parametrize("seed", range(4))
def test_copg_finds_the_optimum_from_any_data(seed):
    problem = random_problem(seed)
    best = exact(problem)
    assert expected_gradient("copg", best.log(), **problem).abs().max() < 1e-12
    torch.testing.assert_close(limit("copg", 4000, **problem), best, atol=1e-6, rtol=0)
    assert expected_gradient("copg", torch.zeros(3).double(), **problem).norm() > 1e-3


def test_an_arm_that_nobody_pulls_stays_where_it_was():
    found = limit("copg", mu1=(0.5, 0.5, 0.0), mu2=(0.4, 0.6, 0.0))
    assert float(found[0] / found[1]) == pytest.approx(np.e, rel=1e-6)
    torch.testing.assert_close(found, tensor((0.5065, 0.1863, 0.3072)), atol=1e-4, rtol=0)
    assert float(regret(found)) == pytest.approx(0.218, abs=1e-3)


def test_connected_pairs_are_enough():
    """mu1 pulls arm 2 only, mu2 the others only: the supports differ, the optimum is found."""
    found = limit("copg", 3000, mu1=(0.0, 0.0, 1.0), mu2=(0.5, 0.5, 0.0))
    torch.testing.assert_close(found, optimal_policy(), atol=1e-6, rtol=0)


# ---- properties 1 to 3 ----


@pytest.mark.parametrize("seed", range(4))
def test_on_policy_the_gradient_is_twice_that_of_the_objective(seed):
    logits = torch.randn(3).double().requires_grad_()
    (gradient,) = torch.autograd.grad(objective_of(logits), logits)
    pi = logits.detach().softmax(-1)
    ours = expected_gradient("copg", logits, mu1=pi, mu2=pi)
    torch.testing.assert_close(-ours, 2 * gradient, atol=1e-12, rtol=0)
    off_policy = expected_gradient("copg", logits)
    assert (off_policy + 2 * gradient).norm() > 1e-2


def objective_of(logits):
    pi, ref = logits.softmax(-1), tensor(UNIFORM)
    return (pi * (tensor(bandit.R) - bandit.BETA * (pi / ref).log())).sum()


def pairs(logits, n=50, **more):
    y, y_ = torch.randint(3, (2, n))
    return bandit.Pairs(logits, y, y_, torch.rand(n) < 0.5, **more)


def gradient_of(loss, logits, **more):
    torch.manual_seed(0)
    return torch.autograd.grad(loss(pairs(logits, **more)).sum(), logits)[0]


@pytest.fixture
def logits():
    return torch.tensor([0.4, -0.3, 0.7], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("beta", [0.5, 0.3])  # at 0.5 a forgotten 2 beta would not show
def test_copg_is_rloo_with_two_samples(logits, beta):
    copg, rloo = (gradient_of(LOSSES[m], logits, beta=beta) for m in ("copg", "rloo"))
    assert copg.norm() > 1
    torch.testing.assert_close(copg, rloo, atol=1e-12, rtol=0)


def test_copg_equals_the_papers_formula(logits):
    """Eq. 7-9 as they stand: beta / 2 in the weights, differentiated through, maximised."""

    def as_printed(p):
        half, half_ = p.r - p.beta / 2 * p.h, p.r_ - p.beta / 2 * p.h_
        return -((half - half_) * p.h + (half_ - half) * p.h_)

    ours = gradient_of(LOSSES["copg"], logits)
    torch.testing.assert_close(ours, gradient_of(as_printed, logits), atol=1e-12, rtol=0)


def test_copg_with_rewards_of_a_quarter_is_ipo(logits):
    def copg_on_preferences(p):
        p.r = torch.where(p.wins, 0.25, -0.25)
        p.r_ = -p.r
        return LOSSES["copg"](p)

    ipo = gradient_of(LOSSES["ipo"], logits)
    ours = gradient_of(copg_on_preferences, logits)
    torch.testing.assert_close(ours, ipo / (2 * bandit.BETA), atol=1e-12, rtol=0)


def test_a_constant_added_to_the_rewards_changes_nothing():
    shifted = tuple(r + 10 for r in bandit.R)
    torch.testing.assert_close(limit("copg", rewards=shifted), optimal_policy(), atol=1e-9, rtol=0)
    fatal = float(regret(limit("pg", 4000, lr=0.05, rewards=shifted)))  # without a baseline
    assert fatal == pytest.approx(1.052, abs=1e-3)


# ---- wrong codings end where they should end ----


@pytest.fixture
def descend(monkeypatch):
    """The limit of a loss that is not in the list."""

    def limit_of(loss, steps=3000):
        monkeypatch.setitem(LOSSES, "another", loss)
        return limit("another", steps)

    return limit_of


def weighted(p, b, through):
    """l = (R_b(y) - R_b(y')) (h - h'), with or without a gradient through the weights R_b."""
    weight = (p.r - b * p.h) - (p.r_ - b * p.h_)
    return -(weight if through else weight.detach()) * (p.h - p.h_)


def test_the_two_wrong_codings(descend):
    beta = bandit.BETA
    for b, through in ((beta / 2, True), (beta, False)):  # the two right ones
        found = descend(lambda p, b=b, through=through: weighted(p, b, through))
        torch.testing.assert_close(found, optimal_policy(), atol=1e-6, rtol=0)
    stopped = descend(lambda p: weighted(p, beta / 2, False))
    torch.testing.assert_close(stopped, optimal_policy(beta=beta / 2), atol=1e-6, rtol=0)
    assert float(regret(stopped)) == pytest.approx(0.0472, abs=1e-4)
    full = descend(lambda p: weighted(p, beta, True))
    torch.testing.assert_close(full, optimal_policy(beta=2 * beta), atol=1e-6, rtol=0)
    assert float(regret(full)) == pytest.approx(0.0468, abs=1e-4)


def test_minimising_l_runs_away(descend):
    assert regret(descend(lambda p: -weighted(p, bandit.BETA / 2, True), steps=100)) > 0.5


# ---- the environment, the data, the training ----


def test_environment():
    env = bandit.ThreeArmedBandit()
    check_env(env)
    for arm, reward in enumerate(bandit.R):
        assert env.reset(seed=0) == (0, {})
        assert env.step(arm) == (0, reward, True, False, {})


def test_data_follow_the_two_policies_and_bradley_terry():
    y, y_, wins = bandit.data_set((0, 1), 10_000)
    assert y.shape == y_.shape == wins.shape == (2, 10_000)
    for arms, mu in ((y, bandit.MU1), (y_, bandit.MU2)):
        shares = torch.bincount(arms.flatten(), minlength=3) / 20_000
        assert shares.tolist() == pytest.approx(mu, abs=0.01)
    some = (y == 0) & (y_ == 2)
    assert wins[some].double().mean() == pytest.approx(1 / (1 + np.exp(-1.5)), abs=0.03)
    assert not torch.equal(y[0], y[1])


def test_the_figures_claims():
    """With lr 5e-3, two seeds: CoPG at zero regret, the others at their limits."""
    for method in bandit.PAPER:
        curve = bandit.train(method, seeds=range(2), epochs=100)
        assert curve.shape == (101, 2)
        assert curve[0] == pytest.approx(0.291867, abs=1e-6)
        assert curve[-1] == pytest.approx(float(regret(limit(method))), abs=0.02)
    copg = bandit.train("copg", seeds=range(2), epochs=100)
    assert copg[-1].max() < 1e-6


def test_the_literal_learning_rate():
    curve = bandit.train("copg", seeds=range(2), lr=1e-3)
    assert curve[[1, 10, 20, 40, 60, 80, 100]].mean(1) == pytest.approx(
        [0.281, 0.200, 0.140, 0.077, 0.046, 0.027, 0.0131], abs=1.5e-3
    )


def test_seeds_do_not_mix():
    """The first of two seeds trains as it does alone."""
    alone = bandit.train("copg", seeds=range(1), epochs=3)
    both = bandit.train("copg", seeds=range(2), epochs=3)
    assert both[:, 0] == pytest.approx(alone[:, 0], abs=1e-12)
    assert (both[1:, 0] != both[1:, 1]).all()


def test_command_line(tmp_path, capsys):
    argv = ["--methods", "copg", "ipo", "--epochs", "2", "--seeds", "3", "--out", str(tmp_path)]
    bandit.main(argv)
    out = capsys.readouterr().out
    assert "J(pi*) = 2.125200" in out and "optimal" in out and "biased" in out
    with (tmp_path / "regret.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 3
    assert (tmp_path / "figure1.png").read_bytes()[:4] == b"\x89PNG"
