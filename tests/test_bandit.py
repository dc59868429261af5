"""CoPG's theorems as numbers, on bandits where everything can be enumerated."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from helpers import close

import bandit_toy as bandit
from bandit_toy import LOSSES, expected_gradient, f64, limit, objective, optimal_policy, regret
from tasks import UserError

UNIFORM = (1 / 3,) * 3
PI_STAR = (0.705385, 0.259496, 0.035119)


def random_problem(seed):
    rng = np.random.default_rng(seed)
    ref, *mu = rng.dirichlet((3, 3, 3), size=3)
    return {"rewards": rng.normal(size=3), "ref": ref, "mu": mu, "beta": 0.4}


def exact(problem):
    return optimal_policy(problem["rewards"], problem["ref"], problem["beta"])


# ---- exact values ----


def test_exact_values_of_the_paper():
    """pi*, J and the regret of the paper's bandit, also where a policy never pulls an arm."""
    best = optimal_policy()
    close(best, f64(PI_STAR), 1e-6)
    assert float(objective(best)) == pytest.approx(2.125200, abs=1e-6)
    assert float(objective(UNIFORM)) == pytest.approx(1.833333, abs=1e-6)
    assert float(regret(UNIFORM)) == pytest.approx(0.291867, abs=1e-6)
    assert float(regret(best)) == pytest.approx(0, abs=1e-12)
    assert float(objective((0.0, 0.0, 1.0))) == pytest.approx(1 - 0.5 * np.log(3))  # 0 ln 0 = 0


@pytest.mark.parametrize("seed", range(5))
def test_regularised_reward_objective_and_the_optimum(seed):
    """Eq. 1, 2 and 29: J is the mean of R_beta, and no policy has a higher one than pi*."""
    problem = random_problem(seed)
    arguments = problem["rewards"], problem["ref"], problem["beta"]
    policies = f64(np.random.default_rng(seed).dirichlet((1, 1, 1), size=200))
    reward, ref = f64(problem["rewards"]), f64(problem["ref"])
    r_beta = reward - 0.4 * (policies.log() - ref.log())  # eq. 1
    arms = torch.arange(3).expand(200, 3)
    ours = bandit.PairBatch(policies.log(), arms, arms, arms == 0, *arguments)
    torch.testing.assert_close(ours.rb, r_beta)
    torch.testing.assert_close(objective(policies, *arguments), (policies * r_beta).sum(1))
    assert (regret(policies, *arguments) > 0).all()
    assert float(objective(exact(problem), *arguments)) == pytest.approx(
        0.4 * float((ref * (reward / 0.4).exp()).sum().log())  # beta ln Z
    )


LIMITS = {  # of each method: the policy at the end, and its regret
    "copg": (PI_STAR, 0.0), "pg": ((0.194, 0.250, 0.556), 0.6378),
    "pg-value": ((0.812, 0.168, 0.0209), 0.0148), "ipo": ((0.4242, 0.3527, 0.2231), 0.1525),
    "pg-value-kl": (PI_STAR, 0.0), "is": (PI_STAR, 0.0), "rloo": (PI_STAR, 0.0),
    "dpo": (PI_STAR, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("method", LIMITS)
def test_limits(method):
    """Where gradient descent on each expected loss ends, and the regret there."""
    policy, value = LIMITS[method]
    found = limit(method, 600, lr=4.0) if method == "dpo" else limit(method, 400)
    close(found, f64(policy), 6e-4)
    assert float(regret(found)) == pytest.approx(value, abs=6e-5)
    assert expected_gradient(method, found.log()).abs().max() < 1e-9  # it is the end


# ---- eq. 12-16: the expected gradient ----


@pytest.mark.parametrize("seed", range(4))
def test_the_baseline_of_each_half_is_the_mean_of_the_other(seed):
    """-grad L = E_mu1[(R_beta - mean_mu2 R_beta) grad ln pi] + the same with mu1, mu2 swapped."""
    problem, logits = random_problem(seed), torch.randn(3).double()
    mu1, mu2, pi = f64(problem["mu"][0]), f64(problem["mu"][1]), logits.softmax(-1)
    r_beta = f64(problem["rewards"]) - 0.4 * (pi / f64(problem["ref"])).log()
    scores = torch.eye(3).double() - pi  # [y, :] is grad ln pi(y) in the logits

    def half(mu, other):
        return (mu * (r_beta - other @ r_beta)) @ scores

    ours = -expected_gradient("copg", logits, **problem)
    close(ours, half(mu1, mu2) + half(mu2, mu1), 1e-12)
    assert (ours - half(mu1, mu1) - half(mu2, mu2)).norm() > 1e-3  # with its own mean, another
    one = -expected_gradient("copg", logits, **problem | {"mu": (mu1, mu1)})
    close(one, 2 * half(mu1, mu1), 1e-12)  # eq. 16


# ---- theorem 1: one optimum, pi*, whatever collected the data ----


@pytest.mark.parametrize("seed", range(4))
def test_copg_finds_the_one_optimum_from_any_data(seed):
    problem = random_problem(seed)
    best = exact(problem)
    assert expected_gradient("copg", best.log(), **problem).abs().max() < 1e-12
    close(limit("copg", 150, **problem), best, 1e-6)
    assert expected_gradient("copg", torch.zeros(3).double(), **problem).norm() > 1e-3
    # Convex in the logits, and strictly so but for a constant added to all: no other minimum.
    hessian = torch.autograd.functional.hessian(
        lambda logits: bandit.expected_loss("copg", logits, **problem), torch.randn(3).double()
    )
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert eigenvalues[0].abs() < 1e-12 and eigenvalues[1] > 1e-3
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    at_best = bandit.PairBatch(
        best.log(), *pairs, pairs[0] == 0, problem["rewards"], problem["ref"], 0.4
    )
    assert LOSSES["copg"](at_best).abs().max() < 1e-12  # of every single pair


def test_an_arm_that_nobody_pulls_stays_where_it_was():
    """Only differences of log-ratios between arms in the data are learned."""
    found = limit("copg", 300, mu=((0.5, 0.5, 0.0), (0.4, 0.6, 0.0)))
    assert float(found[0] / found[1]) == pytest.approx(np.e, rel=1e-6)
    close(found, f64((0.5065, 0.1863, 0.3072)), 1e-4)
    assert float(regret(found)) == pytest.approx(0.218, abs=1e-3)


def test_connected_pairs_are_enough():
    """mu1 pulls arm 2 only, mu2 the others only: the supports differ, the optimum is found."""
    found = limit("copg", 150, mu=((0.0, 0.0, 1.0), (0.5, 0.5, 0.0)))
    close(found, optimal_policy(), 1e-6)


def test_a_restricted_policy_has_another_optimum():
    """Theorem 1 needs a policy that can be pi*. With one parameter, pi in proportion to
    exp(theta (1, 0, 1/2)), the data decide, and neither optimum is that of J."""
    features, grid = f64((1, 0, 0.5)), torch.linspace(-2, 6, 8001, dtype=torch.float64)

    def best(mu):
        losses = [bandit.expected_loss("copg", theta * features, mu=mu) for theta in grid[::25]]
        a, b, _ = np.polyfit(grid[::25].numpy(), torch.stack(losses).numpy(), 2)  # a parabola
        return -b / (2 * a)

    policies = (grid[:, None] * features).softmax(-1)
    assert float(grid[objective(policies).argmax()]) == pytest.approx(4.384, abs=2e-3)
    assert best((UNIFORM, UNIFORM)) == pytest.approx(1.0, abs=1e-6)
    assert best(bandit.MU) == pytest.approx(-0.125, abs=1e-3)


# ---- properties 1 to 3, and eq. 7-9 ----


@pytest.mark.parametrize("seed", range(4))
def test_on_policy_the_gradient_is_twice_that_of_the_objective(seed):
    """Property 1: if the policy itself writes both completions, CoPG is policy gradient."""
    problem = random_problem(seed)
    logits = torch.randn(3).double().requires_grad_()
    arguments = problem["rewards"], problem["ref"], problem["beta"]
    (gradient,) = torch.autograd.grad(objective(logits.softmax(-1), *arguments), logits)
    pi = logits.detach().softmax(-1)
    ours = expected_gradient("copg", logits, **problem | {"mu": (pi, pi)})
    close(-ours, 2 * gradient, 1e-12)
    torch.testing.assert_close(
        -expected_gradient("is", logits, **problem), 2 * gradient, atol=1e-12, rtol=0
    )  # importance weights give it from any data (eq. 5-6)
    assert (expected_gradient("copg", logits, **problem) + 2 * gradient).norm() > 1e-2


def margin(p):  # of the preferred arm
    return (p.h - p.h_) * (2.0 * p.wins - 1)


def copg_as_printed(p):  # eq. 7-9: beta / 2 in the weights, differentiated through, maximised
    half, half_ = p.r - p.beta / 2 * p.h, p.r_ - p.beta / 2 * p.h_
    return -((half - half_) * p.h + (half_ - half) * p.h_)


def copg_with_rewards_of_a_quarter(p):  # property 3
    p.r, p.r_ = 0.5 * p.wins - 0.25, 0.25 - 0.5 * p.wins
    return 2 * p.beta * LOSSES["copg"](p)


@pytest.mark.parametrize(
    "method, other",
    [
        ("copg", copg_as_printed), ("copg", LOSSES["rloo"]),  # property 2
        ("ipo", copg_with_rewards_of_a_quarter),
        ("ipo", lambda p: (0.5 - p.beta * margin(p)) ** 2),  # eq. 21-22
        ("dpo", lambda p: (1 + (-p.beta * margin(p)).exp()).log()),
    ],
)  # fmt: skip
def test_equal_gradients(method, other):
    """Over random pairs, with beta = 0.3: at 0.5 a forgotten 2 beta would not show."""
    logits = torch.tensor([0.4, -0.3, 0.7], dtype=torch.float64, requires_grad=True)
    y, y_, wins = *torch.randint(3, (2, 50)), torch.rand(50) < 0.5

    def gradient(loss):
        p = bandit.PairBatch(logits, y, y_, wins, beta=0.3)
        p.wins = wins  # for the functions above
        return torch.autograd.grad(loss(p).sum(), logits)[0]

    ours, theirs = gradient(LOSSES[method]), gradient(other)
    assert ours.norm() > 0.1
    close(ours, theirs, 1e-12)


def test_a_constant_added_to_the_rewards_changes_nothing():
    shifted = tuple(r + 10 for r in bandit.R)
    close(limit("copg", 300, rewards=shifted), optimal_policy(), 1e-9)
    fatal = float(regret(limit("pg", 400, lr=0.05, rewards=shifted)))  # without a baseline
    assert fatal == pytest.approx(1.052, abs=1e-3)


# ---- wrong codings end where they should end ----


def weighted(b, through):
    """l = (R_b(y) - R_b(y')) (h - h'), with or without a gradient through the weights R_b."""

    def loss(p):
        weight = (p.r - b * p.h) - (p.r_ - b * p.h_)
        return -(weight if through else weight.detach()) * (p.h - p.h_)

    return loss


@pytest.mark.parametrize(
    "b, through, effective_beta, value",
    [
        (0.25, True, 0.5, 0),
        (0.5, False, 0.5, 0),
        (0.25, False, 0.25, 0.0472),
        (0.5, True, 1, 0.0468),
    ],
)
def test_two_right_and_two_wrong_codings(b, through, effective_beta, value, monkeypatch):
    monkeypatch.setitem(LOSSES, "another", weighted(b, through))
    found = limit("another", 500)
    close(found, optimal_policy(beta=effective_beta), 1e-6)
    assert float(regret(found)) == pytest.approx(value, abs=1e-4)


def test_minimising_l_runs_away(monkeypatch):
    monkeypatch.setitem(LOSSES, "another", lambda p: -LOSSES["copg"](p))
    assert regret(limit("another", 100)) > 0.5


# ---- the environment, the data, the training ----


@pytest.mark.filterwarnings("ignore")  # gymnasium's own checks
def test_environment():
    env = bandit.ThreeArmedBandit()
    check_env(env)
    for arm, reward in enumerate(bandit.R):
        assert env.reset(seed=0) == (0, {})
        assert env.step(arm) == (0, reward, True, False, {})


def test_data_follow_the_two_policies_and_bradley_terry():
    """y is drawn from mu1, y' from mu2, preferences by Bradley-Terry; each seed has its own."""
    y, y_, wins = bandit.data_set((0, 1), 10_000, "sampled")
    assert y.shape == y_.shape == wins.shape == (2, 10_000)
    for arms, mu in zip((y, y_), bandit.MU, strict=True):
        shares = torch.bincount(arms.flatten(), minlength=3) / 20_000
        assert shares.tolist() == pytest.approx(mu, abs=0.01)
    some = (y == 0) & (y_ == 2)
    assert wins[some].double().mean() == pytest.approx(1 / (1 + np.exp(-1.5)), abs=0.03)
    assert not torch.equal(y[0], y[1])
    same_y, same_y_, ranked = bandit.data_set((0, 1), 10_000, "ranked")
    assert torch.equal(same_y, y) and torch.equal(same_y_, y_)  # only the labels differ
    assert torch.equal(ranked, y < y_)  # arm 0 is the best


def test_limits_with_ranked_labels():
    """Section 6 has pairs ranked by a reward model: DPO runs to the best arm, IPO to a policy other
    than with sampled labels, and CoPG, which has no labels, to pi* as before."""
    found = limit("ipo", 300, labels="ranked")
    close(found, f64((0.4576, 0.3902, 0.1522)), 1e-4)
    assert float(regret(found)) == pytest.approx(0.0922, abs=6e-5)
    torch.testing.assert_close(limit("copg", 400, labels="ranked"), optimal_policy())
    for method in set(LOSSES) - {"ipo", "dpo"}:  # pairs of one arm with itself count, too
        gradients = [expected_gradient(method, found, labels=x) for x in ("sampled", "ranked")]
        torch.testing.assert_close(*gradients)
    best_arm = 2.125200 - (2.5 - 0.5 * np.log(3))  # J(pi*) - J(always arm 0) = .1745
    assert float(regret(limit("dpo", labels="ranked"))) == pytest.approx(best_arm, abs=1e-6)
    regrets, logits = [], torch.zeros(3).double()
    for _ in range(300):
        logits = logits - 100 * expected_gradient("dpo", logits, labels="ranked")
        regrets.append(float(regret(logits.softmax(-1))))
    assert regrets[-1] == pytest.approx(best_arm, abs=1e-3)
    assert expected_gradient("dpo", logits, labels="ranked")[0] < 0  # and on: there is no minimum
    curve = bandit.train("dpo", seeds=range(2), labels="ranked")
    assert (curve[-1] > curve.min(0) + 0.02).all()  # good early, then past pi*


def test_the_figures_claims():
    """With lr 5e-3, two seeds: CoPG at zero regret, the others at their limits."""
    for method in bandit.PAPER:
        curve = bandit.train(method, seeds=range(2), epochs=60)
        assert curve.shape == (61, 2)
        assert curve[0] == pytest.approx(0.291867, abs=1e-6)
        assert curve[-1] == pytest.approx(LIMITS[method][1], abs=0.02)
        assert method != "copg" or curve[-1].max() < 1e-6


def test_the_literal_learning_rate():
    """With the paper's learning rate: the regret of CoPG on the way."""
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


def test_on_policy_training_draws_from_the_policy(monkeypatch):
    """RLOO does not see the data, which have few arms 0. Without a gradient, pi stays uniform."""
    seen = []

    def no_gradient(p):
        seen.append(torch.stack([p.r, p.r_]))  # [2, S, n]
        return 0 * p.logp

    monkeypatch.setitem(LOSSES, "rloo", no_gradient)
    bandit.train("rloo", seeds=range(2), epochs=1)
    best = torch.cat(seen, 2) == bandit.R[0]
    assert best.double().mean((1, 2)).tolist() == pytest.approx([1 / 3, 1 / 3], abs=0.02)


# ---- the command ----

QUICK = ["--epochs", "2", "--seeds", "3", "--methods"]


@pytest.fixture
def quick(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bandit, "N_PAIRS", 1000)
    monkeypatch.setattr(bandit, "limit", lambda method, **more: limit(method, 300, **more))


def test_command_line(quick, capsys):
    bandit.main([*QUICK, "copg", "ipo"])
    out = capsys.readouterr().out
    assert "J(pi*) = 2.125200" in out and "optimal" in out and "biased" in out
    assert out.endswith("see runs/bandit_toy: regret.csv, figure1.png\n")
    with open("runs/bandit_toy/regret.csv") as file:
        rows = list(csv.DictReader(file))
    curve = bandit.train("ipo", range(3), 2)  # [3, 3]
    for row in rows[9:]:
        exact = curve[int(row["epoch"]), int(row["seed"])]
        assert row["method"] == "ipo" and float(row["regret"]) == pytest.approx(exact, rel=1e-6)
    assert len(rows) == 2 * 3 * 3
    assert Path("runs/bandit_toy/figure1.png").read_bytes()[:4] == b"\x89PNG"

    bandit.main([*QUICK, "copg", "ipo", "--labels", "ranked"])  # in a directory of its own
    lines = out.splitlines() + capsys.readouterr().out.splitlines()
    assert lines[-1] == "see runs/bandit_toy-2: regret.csv, figure1.png"
    copg, again = (line for line in lines if line.startswith("copg"))
    ipo, ranked = (line for line in lines if line.startswith("ipo"))
    assert copg == again and " 0.1525 " in ipo and " 0.0922 " in ranked


@pytest.mark.parametrize(
    "flags, line",
    [
        (["copg", "--labels", "ranked"], "--labels ranked has no effect"),
        (["copg", "--out", "full"], "--out full is not empty; name another"),
        (["copg", "--out="], "an argument is empty"),
        (["ppo"], "invalid choice: 'ppo'"),
    ],
)
def test_bad_flags(quick, monkeypatch, flags, line):
    Path("full").mkdir()
    Path("full/regret.csv").write_text("mine")
    monkeypatch.setattr(bandit, "train_policies", None)  # said before training
    with pytest.raises(UserError, match=line):
        bandit.main([*QUICK, *flags])
    assert Path("full/regret.csv").read_text() == "mine"


def test_the_table_does_not_need_the_figure(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    bandit.main([*QUICK, "copg", "--out", str(tmp_path)])
    *_, row, last = capsys.readouterr().out.splitlines()
    assert row.startswith("copg ") and "regret.csv; no figure1.png: ModuleNotFoundError" in last
    assert (tmp_path / "regret.csv").exists()


def test_a_reader_that_stops_loses_no_file(quick, tmp_path, monkeypatch):
    """python bandit_toy.py | head -1: the files are written before the first line."""

    def closed(text):
        assert {path.name for path in tmp_path.iterdir()} == {"regret.csv", "figure1.png"}
        raise BrokenPipeError

    monkeypatch.setattr(bandit, "print", closed, raising=False)
    with pytest.raises(BrokenPipeError):
        bandit.main([*QUICK, "copg", "--out", str(tmp_path)])
