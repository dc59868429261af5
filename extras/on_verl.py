"""The paper's alpha for verl: one advantage estimator, for verl 0.9.1 in an environment of its own.

verl's own estimator "gpg" divides by the share of rewards that are not 0. This one, "gpg_groups",
is eq. 6 to 8 of gpg.py; verl's loss "gpg" does the rest. In front of verl's usual command and at
its end (the variables have to reach Ray's workers, too; no training has been run with it):

    PYTHONPATH=.:extras VERL_USE_EXTERNAL_MODULES=on_verl python -m verl.trainer.main_ppo ...
        algorithm.adv_estimator=gpg_groups actor_rollout_ref.actor.policy_loss.loss_mode=gpg

verl's filter_groups is DAPO's, not beta_th, and a step without a valid group is not skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpg import gradient_scale, group_advantages, is_valid


@register_adv_est("gpg_groups")
def gpg_groups(
    token_level_rewards: Tensor,  # [N, T]
    response_mask: Tensor,  # [N, T]
    index: np.ndarray,  # [N], equal for the G completions of a prompt, in any order
    config=None,
    **_,
) -> tuple[Tensor, Tensor]:
    """Advantages times alpha, [N, T], and again as verl's returns. N is the whole batch."""
    groups, group_of = np.unique(index, return_inverse=True)
    order = torch.from_numpy(np.argsort(group_of, kind="stable"))  # groups side by side
    rewards = token_level_rewards.sum(1)[order].view(len(groups), -1)  # [B, G]
    scaled = gradient_scale(rewards) * group_advantages(rewards) * is_valid(rewards)[:, None]
    advantages = torch.empty_like(token_level_rewards[:, 0])  # [N]
    advantages[order] = scaled.flatten()
    advantages = advantages[:, None] * response_mask
    return advantages, advantages
