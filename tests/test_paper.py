"""The papers as tests: what they prove or claim exactly, a few lines each, in float64.

GPG is arXiv 2504.02546, CoPG arXiv 2406.19185, GRPO arXiv 2402.03300. `test_bandit.py` has theorem
1 and the properties of CoPG once more, on three arms, with every pair enumerated.
"""

import itertools

import pytest
import torch
from helpers import REWARDS, close, random_logprobs

import bandit_toy
from copg import copg_loss, dpo_loss, ipo_loss
from gpg import gpg_loss, gradient_scale, group_advantages, is_valid
from grpo import group_advantages as grpo_advantages
from grpo import grpo_loss

# ---- GPG ----


def test_expected_gradient_is_that_of_the_expected_reward():
    """A policy over 3 tokens, groups of 2, every group enumerated: the mean gradient of the loss is
    -(G - 1) / G times the gradient of E[r], since the group's mean includes the sample itself."""
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.double, requires_grad=True)
    reward = torch.tensor([1.0, 0.0, 0.4]).double()
    (exact,) = torch.autograd.grad((theta.softmax(0) * reward).sum(), theta)
    mean = torch.zeros(3).double()
    probs = theta.softmax(0).detach()
    for i in range(3):
        for j in range(3):
            pair = torch.tensor([i, j])
            advantages = group_advantages(reward[pair][None]).flatten()
            loss = gpg_loss(theta.log_softmax(0)[pair][:, None], advantages, torch.ones(2, 1))
            mean += probs[i] * probs[j] * torch.autograd.grad(loss, theta)[0]
    close(mean, -exact / 2, 1e-12)


def test_alpha_undoes_the_dilution_exactly_for_equal_lengths():
    """Then alpha times the loss of all groups is the loss of the valid groups alone."""
    logprobs = torch.randn(16, 6).double()
    mask, advantages = torch.ones(16, 6), group_advantages(REWARDS).flatten()
    valid = is_valid(REWARDS).repeat_interleave(4)
    alone = gpg_loss(logprobs[valid], advantages[valid], mask[valid])
    alpha = gradient_scale(REWARDS)
    torch.testing.assert_close(gpg_loss(logprobs, advantages, mask, alpha), alone)
    assert not torch.isclose(gpg_loss(logprobs, advantages, mask), alone)


# ---- GRPO without what GPG deletes ----


@pytest.mark.parametrize("scale, f_norm", [("none", "1"), ("std", "std")])
def test_at_ratio_1_the_gradient_is_gpgs(scale, f_norm):
    """mu = 1, no KL, the mean over tokens: what is left of GRPO is GPG with alpha = 1."""
    logprobs, mask = random_logprobs()
    plain = gpg_loss(logprobs, group_advantages(REWARDS, f_norm).flatten(), mask)
    advantages = grpo_advantages(REWARDS, scale).flatten()
    loss = grpo_loss(logprobs, logprobs.detach(), advantages, mask, aggregate="token")
    (expected,), (found,) = (torch.autograd.grad(x, logprobs) for x in (plain, loss))
    assert expected.norm() > 1e-2
    close(found, expected, 1e-12)


# ---- CoPG: properties 2 and 3 ----


@pytest.mark.parametrize("K", [2, 3, 5])
def test_copg_is_rloo_with_the_kl_in_the_reward(K):
    """The gradient of -sum_i (R_beta(y_i) - mean of the others') ln pi(y_i), R_beta held fixed."""
    beta = 0.3
    h = torch.randn(4, K).double().requires_grad_()
    r = torch.randn(4, K).double()
    (ours,) = torch.autograd.grad(copg_loss(h, r, beta), h)
    R_beta = (r - beta * h).detach()
    baseline = (R_beta.sum(1, keepdim=True) - R_beta) / (K - 1)
    rloo = -((R_beta - baseline) * h).sum(1).mean()  # ln pi_ref has no gradient
    close(ours, torch.autograd.grad(rloo, h)[0], 1e-12)


def test_ipo_is_copg_with_rewards_of_a_quarter():
    """Property 3: IPO is CoPG with R = 1/4 and -1/4, times 2 beta."""
    h = torch.randn(6, 2).double()
    quarter = torch.tensor([[0.25, -0.25]]).double().expand(6, 2)
    copg_of_it = copg_loss(h, quarter, 0.3)
    torch.testing.assert_close(copg_of_it, ipo_loss(h[:, 0], h[:, 1], 0.3) / (2 * 0.3))


def test_the_bandits_losses_are_the_same():
    """bandit_toy.py has them a pair at a time, on arms; the mean over pairs is what copg.py has."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, generator=generator).double()
    arms = torch.randint(3, (50, 2), generator=generator)
    rewards = torch.tensor(bandit_toy.R).double()[arms]
    first = rewards[:, 0] >= rewards[:, 1]
    log_ratio = logits.log_softmax(1)[0] - torch.tensor(bandit_toy.REF).double().log()
    h, beta = log_ratio[arms], bandit_toy.BETA
    pairs = bandit_toy.PairBatch(logits[0], arms[:, 0], arms[:, 1], first)
    theirs = bandit_toy.copg_loss(pairs).mean()
    close(copg_loss(h, rewards, beta), theirs, 1e-12)
    chosen = h.gather(1, (~first).long()[:, None])[:, 0]
    rejected = h.gather(1, first.long()[:, None])[:, 0]
    for ours, other in ((ipo_loss, bandit_toy.ipo_loss), (dpo_loss, bandit_toy.dpo_loss)):
        close(ours(chosen, rejected, beta), other(pairs).mean(), 1e-12)


# ---- CoPG: theorem 1, on a language model small enough to enumerate ----

SEQUENCES = list(itertools.product(range(3), range(3)))  # two tokens out of three


def sequence_logprobs(theta):  # [12] -> [9]
    first, second = theta[:3].log_softmax(0), theta[3:].view(3, 3).log_softmax(1)
    return torch.stack([first[a] + second[a, b] for a, b in SEQUENCES])


REF = sequence_logprobs(torch.linspace(-0.4, 0.5, 12).double())
UTILITIES = torch.tensor([0.3, 1.0, -0.5, 0.0, 2.0, 0.4, 1.1, -1.0, 0.7]).double()
BETA = 0.5


def fitted(loss):
    """Descent on all pairs of what a skewed behaviour policy wrote: the policy at the end, [9]."""
    counts = [5, 4, 3, 2, 2, 1, 1, 1, 1]  # of each sequence in the data
    data = [y for y, count in enumerate(counts) for _ in range(count)]
    pairs = torch.tensor(list(itertools.product(data, data)))  # [P, 2]
    theta = torch.linspace(-0.4, 0.5, 12).double().requires_grad_()
    optimizer = torch.optim.Adam([theta])
    for step in range(1000):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 1000)
        h = sequence_logprobs(theta) - REF
        optimizer.zero_grad()
        loss(h[pairs], UTILITIES[pairs], BETA).backward()
        optimizer.step()
    return sequence_logprobs(theta).detach()


def tilted(beta):
    """pi_ref exp(R / beta) / Z, the optimal policy for this beta."""
    return (REF + UTILITIES / beta).log_softmax(0)


def test_copg_finds_the_optimal_policy_off_policy():
    """Theorem 1: descent on pairs by a skewed writer ends in pi_ref exp(R / beta) / Z."""
    close(fitted(copg_loss), tilted(BETA), 1e-5)
