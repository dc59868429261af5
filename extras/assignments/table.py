"""The assignments: what is left out, the tests, the points, the answers to the written questions.

Public tests go into the handout. Hidden ones do not; they run with another seed, and so may be
public ones once more. Within a question every test has the same weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import bandit_toy
import common
import copg
import gpg
import grpo
from tasks import Posts

HIDDEN_SEED = 1


@dataclass
class Question:
    """A part of one file, with the tests of it."""

    title: str
    points: int
    file: str
    regions: list[str]
    public: list[str]
    hidden: list[str]


@dataclass
class Assignment:
    title: str
    files: list[str]  # in the handout, beside tests/conftest.py; a folder stands for its *.py
    questions: dict[str, Question]
    written: dict[str, int] = field(default_factory=dict)  # points; texts are in written.py
    submitted: list[str] = field(default_factory=list)  # patterns, where not the questions' files


def tests(file: str, names: str) -> list[str]:
    """ "test_a test_b" -> ["test_file.py::test_a", "test_file.py::test_b"]"""
    return [f"test_{file}.py::{name}" for name in names.split()]


A1 = {
    "Q1": Question(
        "The optimum and the regret", 20, "bandit_toy.py",
        ["optimal_policy", "objective", "regret"],
        tests("bandit", "test_exact_values_of_the_paper"),
        tests("bandit", """test_on_policy_the_gradient_is_twice_that_of_the_objective
            test_regularised_reward_objective_and_the_optimum test_connected_pairs_are_enough"""),
    ),
    "Q2": Question(
        "What a loss may look at", 25, "bandit_toy.py",
        ["Pairs.__init__", "Pairs.value", "Pairs.value_kl", "Pairs.weights", "Pairs.margin"],
        tests("bandit", "test_regularised_reward_objective_and_the_optimum test_limits"),
        tests("bandit", """test_on_policy_the_gradient_is_twice_that_of_the_objective
            test_equal_gradients test_the_baseline_of_each_half_is_the_mean_of_the_other"""),
    ),
    "Q3": Question(
        "The loss of CoPG", 15, "bandit_toy.py", ["copg_loss"],
        tests("bandit", "test_connected_pairs_are_enough"),
        tests("bandit", """test_equal_gradients test_an_arm_that_nobody_pulls_stays_where_it_was
            test_the_baseline_of_each_half_is_the_mean_of_the_other"""),
    ),
    "Q4": Question(
        "Its rivals", 20, "bandit_toy.py",
        ["pg_loss", "pg_value_loss", "pg_value_kl_loss", "is_loss", "rloo_loss", "ipo_loss",
         "dpo_loss"],
        tests("bandit", "test_limits"),
        tests("bandit", """test_on_policy_the_gradient_is_twice_that_of_the_objective
            test_equal_gradients"""),
    ),
    "Q5": Question(
        "Collecting the data", 10, "bandit_toy.py", ["collect", "data_set"],
        tests("bandit", "test_data_follow_the_two_policies_and_bradley_terry"),
        tests("bandit", "test_seeds_do_not_mix test_the_literal_learning_rate"),
    ),
}  # fmt: skip

A2 = {
    "Q1": Question(
        "Positions, and drawing a token", 20, "common.py", ["positions", "draw"],
        tests("sampling", "test_frequencies_match_the_distribution"),
        tests("sampling", """test_frequencies_match_the_distribution
            test_greedy_equals_generate[qwen2] test_greedy_equals_generate[gpt2]
            test_sampled_scored_and_naive_logprobs_agree[gpt2]"""),
    ),
    "Q2": Question(
        "The sampler", 30, "common.py", ["sample"],
        tests("sampling", """test_greedy_equals_generate[qwen2] test_greedy_equals_generate[gpt2]
            test_eos_is_in_the_mask_and_in_no_text_and_nothing_follows_it"""),
        tests("sampling", """test_sampled_scored_and_naive_logprobs_agree[llama]
            test_sampled_scored_and_naive_logprobs_agree[gpt2]
            test_every_eos_id_of_the_generation_config_stops_and_there_may_be_none
            test_pad_token_that_equals_eos_changes_nothing
            test_gradient_checkpointing_changes_no_sample_and_no_gradient"""),
    ),
    "Q3": Question(
        "Log-probabilities", 30, "common.py", ["completion_logprobs", "predicting_states"],
        tests("sampling", """test_sampled_scored_and_naive_logprobs_agree[qwen2]
            test_a_rollout_by_hand_may_have_masks_of_0_and_1"""),
        tests("sampling", """test_sampled_scored_and_naive_logprobs_agree[gpt2]
            test_gradients_equal_naive[qwen2-16777216] test_gradients_equal_naive[gpt2-16777216]
            test_frozen_logprobs_are_the_same_in_their_rows_without_gradient
            test_scores_are_right_where_checkpointing_drops_the_cache
            test_rows_and_cat_keep_every_log_prob test_a_row_alone_scores_as_among_others
            test_padding_is_no_token_of_a_prompt
            test_log_probs_are_float32_whatever_the_logits_are"""),
    ),
    "Q4": Question(
        "Micro-batches", 10, "common.py", ["micro_batches"],
        tests("sampling", "test_micro_batches_hold_every_row_once_within_the_budget[1]"),
        tests("sampling", "test_micro_batches_hold_every_row_once_within_the_budget[4]")
        + tests("copg", "test_micro_batches_keep_prompts_together"),
    ),
}  # fmt: skip

A3 = {
    "Q1": Question(
        "Valid groups and their advantages", 15, "gpg.py", ["is_valid", "group_advantages"],
        tests("gpg", """test_advantages_by_hand test_advantages_with_std_by_hand
            test_validity_is_judged_on_raw_rewards"""),
        tests("gpg", """test_advantages_are_groupwise_and_shift_free
            test_expected_gradient_is_that_of_the_expected_reward
            test_validity_is_judged_on_raw_rewards"""),
    ),
    "Q2": Question(
        "Alpha", 10, "gpg.py", ["gradient_scale"],
        tests("gpg", "test_alpha_by_hand"),
        tests("gpg", """test_alpha_counts_equal_rewards_not_zero_rewards
            test_alpha_undoes_the_dilution_exactly_for_equal_lengths"""),
    ),
    "Q3": Question(
        "The loss", 15, "gpg.py", ["gpg_loss"],
        tests("gpg", "test_loss_by_hand test_gradient_raises_what_was_better"),
        tests("gpg", """test_loss_and_gradient_equal_brute_force test_eos_is_trained
            test_alpha_undoes_the_dilution_exactly_for_equal_lengths"""),
    ),
    "Q4": Question(
        "The groups of the batch", 10, "gpg.py", ["choose_groups"],
        tests("gpg", "test_choose_groups"), tests("gpg", "test_everything_that_train_hands_on"),
    ),
    "Q5": Question(
        "Training: sampling until enough groups are valid", 10, "gpg.py", ["train 1"],
        tests("gpg", "test_threshold"),
        tests("gpg", """test_everything_that_train_hands_on
            test_all_dead_steps_are_skipped_and_said"""),
    ),
    "Q6": Question(
        "Training: the batch of the update", 10, "gpg.py", ["train 2"],
        tests("gpg", "test_threshold"), tests("gpg", "test_everything_that_train_hands_on"),
    ),
    "Q7": Question(
        "Training: one gradient step", 15, "gpg.py", ["train 3"],
        tests("gpg", "test_every_family_trains_and_micro_batches_change_no_step[qwen2]"),
        tests("gpg", """test_everything_that_train_hands_on
            test_all_dead_steps_are_skipped_and_said"""),
    ),
}  # fmt: skip

A4 = {
    "Q1": Question(
        "Advantages", 10, "grpo.py", ["group_advantages"],
        tests("grpo", "test_advantages_by_hand"),
        tests("grpo", """test_dead_groups_have_no_advantage_at_all
            test_at_ratio_1_the_gradient_is_gpgs"""),
    ),
    "Q2": Question(
        "The estimate of the KL", 15, "grpo.py", ["kl_k3"],
        tests("grpo", "test_k3_by_hand"),
        tests("grpo", """test_k3_is_never_negative test_k3_estimates_the_kl_to_the_reference
            test_the_gradient_of_k3_is_that_of_the_other_kl"""),
    ),
    "Q3": Question(
        "The loss", 20, "grpo.py", ["grpo_loss"],
        tests("grpo", """test_clip_by_hand test_aggregation_by_hand
            test_the_kl_is_a_cost_times_beta"""),
        tests("grpo", """test_the_two_clips_are_apart test_loss_and_gradient_equal_brute_force
            test_at_ratio_1_the_gradient_is_gpgs"""),
    ),
    "Q4": Question(
        "What is clipped, and the minibatches", 10, "grpo.py", ["is_clipped", "minibatches"],
        tests("grpo", "test_is_clipped_where_the_gradient_is_zero test_minibatches"),
        tests("grpo", "test_is_clipped_where_the_gradient_is_zero")
        + tests("grpo", "test_everything_that_train_hands_on"),
    ),
    "Q5": Question(
        "Training: sampling", 10, "grpo.py", ["train 1"],
        tests("grpo", "test_all_dead"), tests("grpo", "test_everything_that_train_hands_on"),
    ),
    "Q6": Question(
        "Training: the batch of the update", 10, "grpo.py", ["train 2"],
        tests("grpo", "test_the_first_update_has_ratio_1[qwen2]"),
        tests("grpo", "test_everything_that_train_hands_on test_all_dead"),
    ),
    "Q7": Question(
        "Training: the updates", 10, "grpo.py", ["train 3"],
        tests("grpo", "test_the_first_update_has_ratio_1[qwen2]"),
        tests("grpo", "test_everything_that_train_hands_on test_all_dead"),
    ),
}  # fmt: skip

A5 = {
    "Q1": Question(
        "The loss of CoPG", 25, "copg.py", ["copg_loss"],
        tests("copg", "test_losses_by_hand"),
        tests("copg", """test_copg_equals_the_pairs_by_brute_force
            test_losses_are_means_over_prompts test_copg_is_rloo_with_the_kl_in_the_reward
            test_copg_finds_the_optimal_policy_off_policy"""),
    ),
    "Q2": Question(
        "IPO and DPO", 20, "copg.py", ["ipo_loss", "dpo_loss", "policy_loss"],
        tests("copg", "test_losses_by_hand test_ipo_and_dpo_see_best_and_worst"),
        tests("copg", """test_ipo_is_copg_with_rewards_of_a_quarter
            test_losses_are_means_over_prompts test_the_bandits_losses_are_the_same"""),
    ),
    "Q3": Question(
        "The loss of a reward model", 10, "copg.py", ["bradley_terry_loss"],
        tests("copg", "test_losses_by_hand"),
        tests("copg", "test_bradley_terry_is_minus_the_log_likelihood_of_the_preferences"),
    ),
    "Q4": Question(
        "The utility of a summary", 15, "tasks/posts.py", ["Posts.reward"],
        tests("tasks", "test_utility_by_hand"),
        tests("tasks", """test_writers_are_of_mixed_quality
            test_preferences_follow_bradley_terry"""),
    ),
}  # fmt: skip

A6 = {
    "Q1": Question(
        "The task", 15, "my_tasks.py", [],
        tests("contract", """test_a_problem_is_always_the_same test_training_is_not_the_test
            test_rewards_tell_good_from_bad"""), [],
    ),
    "Q2": Question(
        "The runs", 10, "my_tasks.py", [],
        tests("contract", "test_two_runs_are_finished test_the_runs_differ_in_one_flag"), [],
    ),
    "Q3": Question(
        "The report", 5, "my_tasks.py", [], tests("contract", "test_the_report_says_what_was_run"),
        [],
    ),
}  # fmt: skip

LIBRARY = ["common.py", "tasks", "requirements.txt"]
ASSIGNMENTS = {
    "A1": Assignment("CoPG on a bandit", ["bandit_toy.py", *LIBRARY], A1, {"W1": 5, "W2": 5}),
    "A2": Assignment("Sampling and log-probabilities", LIBRARY, A2, {"W1": 5, "W2": 5}),
    "A3": Assignment(
        "Group Policy Gradient", ["gpg.py", *LIBRARY], A3, {"W1": 5, "W2": 5, "W3": 5}
    ),
    "A4": Assignment("GRPO", ["grpo.py", *LIBRARY], A4, {"W1": 5, "W2": 5, "W3": 5}),
    "A5": Assignment(
        "Contrastive Policy Gradient", ["copg.py", *LIBRARY], A5,
        {"W1": 10, "W2": 5, "W3": 5, "W4": 10},
    ),
    "A6": Assignment(
        "A task of your own", ["gpg.py", "grpo.py", *LIBRARY], A6,
        submitted=["my_tasks.py", "report.md", "runs/*/config.json", "runs/*/metrics.csv"],
    ),
}  # fmt: skip

# --------------------------------------------------------------------------------------------------
# Right answers to the written questions, by the reference; their numbers come from written.py
# --------------------------------------------------------------------------------------------------


def bandit_regret(method: str, mu1: list[float], mu2: list[float]) -> float:
    return float(bandit_toy.regret(bandit_toy.limit(method, mu1=mu1, mu2=mu2)))


def tempered(logits: list[float], temperature: float) -> float:
    generator = torch.random.get_rng_state()
    logits = torch.tensor([[*logits]] * 200)
    tokens, logprobs = common.draw(logits, temperature)
    torch.random.set_rng_state(generator)
    return logprobs[tokens == 0].mean().item()


def number_of_micro_batches(lengths: list[int], budget: int) -> int:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    n = len(lengths)
    rollout = common.Rollout(mask[:, :0].long(), mask[:, :0], mask.long(), mask, mask * 0.0,
                             mask[:, 0], [""] * n)  # fmt: skip
    return len(common.micro_batches(rollout, budget))


def share_of_valid_groups(p: float, G: int) -> float:
    """Every group of 0s and 1s, enumerated, by its probability."""
    groups = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * G)  # [2^G, G]
    right = groups.sum(1).double()
    return float((p**right * (1 - p) ** (G - right))[gpg.is_valid(groups)].sum())


def alpha_over_exact(dead: int, valid: int, dead_length: int, valid_length: int) -> float:
    """The loss with alpha over the loss of the valid groups alone, G = 2."""
    rewards = torch.tensor([[1.0, 0.0]] * valid + [[1.0, 1.0]] * dead).double()
    lengths = torch.tensor([[valid_length, 1]] * valid + [[dead_length, 1]] * dead).flatten()
    lengths[1::2] = lengths[::2]
    mask = torch.arange(max(dead_length, valid_length)) < lengths[:, None]
    logprobs = -torch.arange(1.0, mask.numel() + 1).view(mask.shape).double()
    advantages, n = gpg.group_advantages(rewards).flatten(), 2 * valid
    loss = gpg.gpg_loss(logprobs, advantages, mask, gpg.gradient_scale(rewards))
    return float(loss / gpg.gpg_loss(logprobs[:n], advantages[:n], mask[:n]))


def clipped_slope(ratio: float, advantage: float, clip_low: float, clip_high: float, slope: bool):
    """J of one token, or its derivative by the ratio."""
    ratio = torch.tensor([[ratio]], dtype=torch.double, requires_grad=True)
    ones, zeros = torch.ones(1, 1), torch.zeros(1, 1).double()
    J = -grpo.grpo_loss(ratio.log(), zeros, torch.tensor([advantage]), ones, clip_low, clip_high)
    return torch.autograd.grad(J, ratio)[0].item() if slope else J.item()


def least(loss, start: float = 0.0) -> float:
    """Where a parabola of one number is least: one step of Newton's."""
    d = torch.tensor([start], dtype=torch.double, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(d), d, create_graph=True)
    return (d - slope / torch.autograd.grad(slope.sum(), d)[0]).item()


def copg_optimum(r1: float, r2: float, beta: float) -> float:
    rewards = torch.tensor([[r1, r2]]).double()
    return least(lambda d: copg.copg_loss(torch.stack([d, 0 * d], 1), rewards, beta))


def copg_value(h: list[float], r: list[float], beta: float) -> float:
    return copg.copg_loss(torch.tensor([h]).double(), torch.tensor([r]).double(), beta).item()


ANSWERS = {
    "A1": {
        "W1": lambda n: bandit_regret("pg-value", n["mu1"], n["mu2"]),
        "W2": lambda n: bandit_regret("pg", n["mu1"], n["mu2"]),
    },
    "A2": {
        "W1": lambda n: tempered(n["logits"], n["temperature"]),
        "W2": lambda n: number_of_micro_batches(n["lengths"], n["budget"]),
    },
    "A3": {
        "W1": lambda n: share_of_valid_groups(n["p"], n["G"]),
        "W2": lambda n: gpg.gradient_scale(torch.tensor(n["rewards"])),
        "W3": lambda n: alpha_over_exact(**n),
    },
    "A4": {
        "W1": lambda n: clipped_slope(**n, slope=False),
        "W2": lambda n: clipped_slope(**n, slope=True),
        "W3": lambda n: grpo.kl_k3(*(torch.tensor([n[x]]).log() for x in ("pi", "ref"))).item(),
    },
    "A5": {
        "W1": lambda n: copg_optimum(**n),
        "W2": lambda n: least(lambda d: copg.ipo_loss(d, 0 * d, n["beta"])),
        "W3": lambda n: Posts().reward(n["summary"], n["answer"]),
        "W4": lambda n: copg_value(**n),
    },
}
