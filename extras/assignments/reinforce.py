"""REINFORCE (Williams 1992) on a bandit: the policy gradient in its smallest form.

pi     = softmax(logits), a policy over A arms, without a state
J      = E_pi[R] = sum_a pi(a) R(a), to maximise
grad J = E_pi[(R(a) - b) grad ln pi(a)], for every baseline b that does not depend on the arm a

python reinforce.py        how three baselines spread the estimate, and what they make of it
"""

import torch
from torch import Tensor

R = torch.tensor([2.5, 2.0, 1.0], dtype=torch.float64)  # rewards of the arms
STEPS, LR, G = 100, 0.3, 8


def exact_gradient(logits: Tensor, rewards: Tensor) -> Tensor:
    """Logits [A], R [A] -> the gradient of J with respect to the logits, [A]."""
    pi = logits.softmax(-1)
    return pi * (rewards - (pi * rewards).sum())


def reinforce_loss(logits: Tensor, arms: Tensor, rewards: Tensor, baseline: Tensor) -> Tensor:
    """Logits [A], arms drawn from them [G], their rewards and baselines [G] -> the scalar to
    minimise. Minus its gradient is an estimate of the gradient of J."""
    return -((rewards - baseline) * logits.log_softmax(-1)[arms]).mean()


def group_mean(rewards: Tensor) -> Tensor:
    """Rewards [G] -> the mean of all of them, for each, [G]."""
    return rewards.mean().expand(len(rewards))


def mean_of_others(rewards: Tensor) -> Tensor:
    """Rewards [G] -> for each, the mean of the others, [G]."""
    return (rewards.sum() - rewards) / (len(rewards) - 1)


BASELINES = {"none": torch.zeros_like, "group mean": group_mean, "mean of others": mean_of_others}


def train(baseline: str, steps: int = STEPS, lr: float = LR, group_size: int = G) -> Tensor:
    """Gradient descent from logits of 0, each step with G fresh arms -> J before the first step and
    after each, [steps + 1]."""
    logits = torch.zeros(len(R), dtype=torch.float64, requires_grad=True)
    curve = [logits.softmax(-1) @ R]
    for _ in range(steps):
        arms = logits.detach().softmax(-1).multinomial(group_size, replacement=True)
        loss = reinforce_loss(logits, arms, R[arms], BASELINES[baseline](R[arms]))
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - lr * gradient).detach().requires_grad_()
        curve.append(logits.softmax(-1) @ R)
    return torch.stack(curve).detach()


def estimates(baseline: str, n: int = 4000) -> Tensor:
    """n estimates of the gradient at logits of 0, [n, A]."""
    logits, found = torch.zeros(len(R), dtype=torch.float64, requires_grad=True), []
    for arms in torch.randint(len(R), (n, G)):
        loss = reinforce_loss(logits, arms, R[arms], BASELINES[baseline](R[arms]))
        found.append(-torch.autograd.grad(loss, logits)[0])
    return torch.stack(found)


if __name__ == "__main__":
    torch.manual_seed(0)
    print("exact gradient", exact_gradient(torch.zeros(len(R)).double(), R).tolist())
    for name in BASELINES:
        first = estimates(name)[:, 0]
        ends = torch.stack([train(name)[-1] for _ in range(20)])
        print(f"{name:15} first component {first.mean():.4f}, std {first.std():.4f}; ", end="")
        print(f"J after {STEPS} steps {ends.mean():.4f} ± {ends.std() / 20**0.5:.4f}")
