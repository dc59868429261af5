"""The estimator for verl, against verl's own functions; skipped without verl."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gpg

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "extras"))

algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs verl 0.9.1")

import on_verl  # noqa: E402

B, G, T = 6, 4, 5


def batch(rewards):
    """Rows in a random order, with the reward at the last token, as verl has them."""
    mask = (torch.arange(T) < torch.randint(1, T + 1, (B * G, 1))).float()
    token_rewards = torch.zeros(B * G, T)
    token_rewards[torch.arange(B * G), mask.sum(1).long() - 1] = rewards.flatten()
    prompts = np.repeat([f"prompt {i}" for i in range(B)], G).astype(object)
    order = torch.randperm(B * G)
    return token_rewards[order], mask[order], prompts[order.numpy()], order


@pytest.mark.parametrize("kind", ["0/1", "+-1", "dead"])
def test_verl_s_loss_with_our_estimator_is_gpg_loss(kind):
    rewards = torch.randint(0, 2, (B, G)).float()
    rewards[::2] = rewards[::2, :1]  # half of the groups are dead
    rewards = {"0/1": rewards, "+-1": 2 * rewards - 1, "dead": torch.full((B, G), 0.1)}[kind]
    token_rewards, mask, index, order = batch(rewards)
    logprobs = torch.randn(B * G, T, requires_grad=True)
    advantages, returns = on_verl.gpg_groups(token_rewards, mask, index)
    assert torch.equal(advantages, returns)
    config = SimpleNamespace(global_batch_info={})
    loss, _ = algos.get_policy_loss_fn("gpg")(
        None, logprobs, advantages, mask, "token-mean", config
    )
    right = gpg.group_advantages(rewards) * gpg.is_valid(rewards)[:, None]
    alpha = gpg.gradient_scale(rewards)
    right = gpg.gpg_loss(logprobs, right.flatten()[order], mask, alpha)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    (right_gradient,) = torch.autograd.grad(right, logprobs)
    torch.testing.assert_close(gradient, right_gradient)
    torch.testing.assert_close(loss, right)
    own, _ = algos.compute_gpg_outcome_advantage(token_rewards.clone(), mask, index)
    own_alpha = B * G / max(1, int((rewards != 0).sum()))
    if kind != "dead":  # where verl's own estimator differs, it is by its alpha
        torch.testing.assert_close(own / own_alpha, advantages / alpha)
        assert own_alpha != pytest.approx(alpha)


def test_verl_finds_the_plug_in():
    code = (
        "from verl.trainer.ppo import core_algos as c; print(c.get_adv_estimator_fn('gpg_groups'))"
    )
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "on_verl"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'extras'}"
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "function gpg_groups" in out.stdout, out.stderr[-2000:]
