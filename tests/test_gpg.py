"""The equations of GPG against hand-computed values, brute force in float64, and invariances."""

import functools
import math

import pytest
import torch

import common
import gpg
from gpg import choose_groups, gpg_loss, gradient_scale, group_advantages, is_valid

REWARDS = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).double()


# ---- eq. 6 ----


def test_advantages_by_hand():
    expected = [[0.5, -0.5, -0.5, 0.5], [0] * 4, [0.75, -0.25, -0.25, -0.25], [0] * 4]
    assert group_advantages(REWARDS).tolist() == expected


def test_advantages_with_std_by_hand():
    """[1, 0, 0, 1]: the unbiased std is sqrt(4 * .25 / 3) = .57735, not .5."""
    advantages = group_advantages(REWARDS, "std")
    a = 0.86587
    assert advantages[0].tolist() == pytest.approx([a, -a, -a, a], abs=1e-5)
    assert advantages[2].tolist() == pytest.approx([1.4997, -0.4999, -0.4999, -0.4999], abs=1e-4)
    assert (advantages[[1, 3]] == 0).all()


@pytest.mark.parametrize("f_norm", ["1", "std"])
def test_advantages_are_groupwise_and_shift_free(f_norm):
    rewards = torch.randn(5, 8).double()
    advantages = group_advantages(rewards, f_norm)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(5).double(), atol=1e-12, rtol=0)
    shift = torch.randn(5, 1).double()
    torch.testing.assert_close(
        group_advantages(rewards + shift, f_norm), advantages, atol=1e-12, rtol=0
    )
    torch.testing.assert_close(group_advantages(rewards[2:3], f_norm)[0], advantages[2])
    scaled = group_advantages(10 * rewards, f_norm)
    torch.testing.assert_close(scaled, (10 if f_norm == "1" else 1) * advantages, atol=0, rtol=1e-3)


# ---- eq. 7 ----


def test_alpha_by_hand():
    assert gradient_scale(REWARDS) == 2.0  # 4 groups, 2 of them dead
    assert gradient_scale(REWARDS[:3]) == 1.5  # 3 groups, 1 of them dead
    assert gradient_scale(REWARDS[[0, 2]]) == 1.0
    assert gradient_scale(REWARDS[[1, 3]]) == 0.0  # nothing to learn


def test_alpha_counts_equal_rewards_not_zero_rewards():
    """Another implementation counts non-zero rewards; with +-1 rewards that always gives 1."""
    assert gradient_scale(2 * REWARDS - 1) == 2.0
    assert gradient_scale(REWARDS + 5) == 2.0
    all_right = torch.ones(3, 8)
    all_right[0, 0] = 0
    assert gradient_scale(all_right) == 3.0


def test_validity_is_judged_on_raw_rewards():
    """The mean of eight times 0.1 is not 0.1 in float32; a std threshold misses small spreads."""
    rewards = torch.full((2, 8), 0.1)
    rewards[1, 3] += 1e-7
    assert is_valid(rewards).tolist() == [False, True]
    assert gradient_scale(rewards) == 2.0
    for value in torch.rand(200):
        assert not is_valid(torch.full((1, 7), float(value))).any()


# ---- eq. 5 and 8 ----


def test_loss_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -5.0, -7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    advantages = torch.tensor([0.5, -0.25])
    # -(0.5 * (-1 - 2) - 0.25 * (-3 - 5 - 7)) / 5 tokens = -(-1.5 + 3.75) / 5
    assert gpg_loss(logprobs, advantages, mask).item() == pytest.approx(-0.45, abs=1e-7)
    assert gpg_loss(logprobs, advantages, mask, alpha=2.0).item() == pytest.approx(-0.9, abs=1e-7)
    assert gpg_loss(logprobs, advantages, mask, 2.0, 10).item() == pytest.approx(-0.45, abs=1e-7)


def test_gradient_raises_what_was_better():
    logits = torch.zeros(2, 1, 2, dtype=torch.double, requires_grad=True)
    logprobs = logits.log_softmax(-1)[:, :, 0]
    gpg_loss(logprobs, torch.tensor([0.5, -0.5]), torch.ones(2, 1)).backward()
    # d loss / d logit = -A (1 - pi) / 2 = -+ .5 * .5 / 2
    assert logits.grad[:, 0, 0].tolist() == pytest.approx([-0.125, 0.125], abs=1e-12)


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
    torch.testing.assert_close(mean, -exact / 2, atol=1e-12, rtol=0)


def brute_force_loss(logprobs, rewards, mask, alpha):
    """Eq. 5 to 8 as loops."""
    B, G = rewards.shape
    total, tokens = 0.0, 0
    for b in range(B):
        for g in range(G):
            for t in range(logprobs.shape[1]):
                if mask[b * G + g, t]:
                    advantage = rewards[b, g] - sum(rewards[b]) / G
                    total += -logprobs[b * G + g, t] * advantage
                    tokens += 1
    return alpha * total / tokens


@pytest.fixture
def batch(small):
    """A rollout of 4 prompts x 4 completions in float64, with REWARDS: groups 1 and 3 are dead."""
    model, tokenizer = small
    rollout = common.sample(model, tokenizer, ["7", "12+5=", "a longer one: ", "1+1="], 4, 12)
    return model.double(), rollout


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def whole_batch_gradient(model, rollout):
    logprobs = common.completion_logprobs(model, rollout)
    advantages = group_advantages(REWARDS).flatten()
    alpha = gradient_scale(REWARDS)
    return gradient(model, gpg_loss(logprobs, advantages, rollout.completion_mask, alpha))


def test_loss_and_gradient_equal_brute_force(batch):
    model, rollout = batch
    logprobs = common.completion_logprobs(model, rollout)
    brute = brute_force_loss(logprobs, REWARDS, rollout.completion_mask, alpha=4 / 2)
    advantages = group_advantages(REWARDS).flatten()
    ours = gpg_loss(logprobs, advantages, rollout.completion_mask, gradient_scale(REWARDS))
    torch.testing.assert_close(ours, brute, atol=1e-12, rtol=0)
    expected = gradient(model, brute)
    assert expected.norm() > 1e-2
    torch.testing.assert_close(whole_batch_gradient(model, rollout), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("max_tokens", [1, 30, 100, 10**6])
def test_micro_batches_and_dropped_dead_groups_change_nothing(batch, max_tokens):
    """The way of train(): valid rows only, in micro-batches, by the whole batch's tokens."""
    model, rollout = batch
    expected = whole_batch_gradient(model, rollout)
    alpha, valid = gradient_scale(REWARDS), is_valid(REWARDS)
    total_tokens = rollout.completion_mask.sum().item()
    live = rollout.rows(valid.repeat_interleave(4))
    advantages = group_advantages(REWARDS[valid]).flatten()
    model.zero_grad()
    for rows in common.micro_batches(live, max_tokens):
        mb = live.rows(rows)
        logprobs = common.completion_logprobs(model, mb)
        gpg_loss(logprobs, advantages[rows], mb.completion_mask, alpha, total_tokens).backward()
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(ours, expected, atol=1e-6 * expected.norm().item(), rtol=0)


def test_row_order_and_padding_change_nothing(batch):
    model, rollout = batch
    expected = whole_batch_gradient(model, rollout)
    order = torch.randperm(16)
    shuffled = rollout.rows(order)
    padded = common.Rollout.cat([shuffled, make_longer(rollout)]).rows(torch.arange(16))
    padded.completion_mask = torch.nn.functional.pad(padded.completion_mask, (0, 5))
    padded.completion_ids = torch.nn.functional.pad(padded.completion_ids, (0, 5), value=256)
    advantages = group_advantages(REWARDS).flatten()[order]
    logprobs = common.completion_logprobs(model, padded)
    ours = gradient(model, gpg_loss(logprobs, advantages, padded.completion_mask, 2.0))
    torch.testing.assert_close(ours, expected, atol=1e-6 * expected.norm().item(), rtol=0)


def make_longer(rollout):
    longer = rollout.rows(torch.arange(2))
    longer.prompt_ids = torch.nn.functional.pad(longer.prompt_ids, (9, 0))
    longer.prompt_mask = torch.nn.functional.pad(longer.prompt_mask, (9, 0))
    return longer


def test_alpha_undoes_the_dilution_exactly_for_equal_lengths():
    """Then alpha times the loss of all groups is the loss of the valid groups alone."""
    logprobs = torch.randn(16, 6).double()
    mask, advantages = torch.ones(16, 6), group_advantages(REWARDS).flatten()
    valid = is_valid(REWARDS).repeat_interleave(4)
    alone = gpg_loss(logprobs[valid], advantages[valid], mask[valid])
    alpha = gradient_scale(REWARDS)
    torch.testing.assert_close(gpg_loss(logprobs, advantages, mask, alpha), alone)
    assert not torch.isclose(gpg_loss(logprobs, advantages, mask), alone)


def test_eos_is_trained(small):
    """The EOS is a sampled token: its log-prob gets a gradient, and it counts among the tokens."""
    model, tokenizer = small
    rollout = common.encode(model, tokenizer, ["1+1="], ["2"])
    assert rollout.completion_mask.sum() == 2
    logprobs = common.completion_logprobs(model, rollout)
    logprobs.retain_grad()
    gpg_loss(logprobs, torch.tensor([1.0]), rollout.completion_mask).backward()
    assert logprobs.grad.tolist() == [[-0.5, -0.5]]


# ---- Algorithm 1: the threshold ----


def test_choose_groups():
    F, T = False, True
    # one round of four: valid ones first, then the dead, four in all
    assert sorted(choose_groups(torch.tensor([F, T, F, T]), 4).tolist()) == [0, 1, 2, 3]
    # two rounds of four: valid 1, 5, 6 of both rounds, filled with a dead one of the last round
    chosen = choose_groups(torch.tensor([F, T, F, F, F, T, T, F]), 4).tolist()
    assert sorted(chosen[:3]) == [1, 5, 6] and chosen[3:] == [7]
    # more valid ones than B: all of them, no dead one
    assert choose_groups(torch.tensor([T, T, F, T, F, T, T, T]), 4).tolist() == [0, 1, 3, 5, 6, 7]
    assert len(choose_groups(torch.tensor([F] * 8), 4)) == 4


class Levels(common.TextTask):
    """Problem i is dead unless i % 4 == 0: then completions of an even length win."""

    def problem(self, index):
        return f"{index % 4}", "x"

    def reward(self, completion, answer):
        return float(self.prompt == "0" and len(completion) % 2 == 0)

    def step(self, completion):
        reward = self.reward(completion, self.answer)
        return self.prompt, reward, True, False, {}


def metrics(run):
    """Every row of metrics.csv, {column: text}."""
    rows = [line.split(",") for line in (run.dir / "metrics.csv").read_text().splitlines()]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def run_script(script, tmp_path, monkeypatch, model_dir, task, *flags):
    """A small run of a script on a task object -> the run, and its rows without that of step 0."""
    monkeypatch.setattr(common, "make_task", lambda name, split, data: task)
    flags = [
        "--model", model_dir, "--out", tmp_path / "run", "--max-new-tokens", "8", "--steps", "3",
        "--prompts", "4", "--eval-problems", "4", "--eval-samples", "2", *flags,
    ]  # fmt: skip
    run = script.train(script.parse_args([str(flag) for flag in flags]))
    return run, metrics(run)[1:]


run_gpg = functools.partial(run_script, gpg)


@pytest.mark.parametrize(
    "beta_th, rounds, alpha", [(0, 1, 4.0), (0.25, 1, 4.0), (0.5, 2, 2.0), (1, 4, 1.0)]
)
def test_threshold(tmp_path, monkeypatch, model_dirs, beta_th, rounds, alpha):
    """One of four groups is valid in every round: after k rounds k are, and alpha = 4 / k."""
    flags = ["--beta-th", beta_th, "--group-size", 16, "--lr", 1e-9]
    _, rows = run_gpg(tmp_path, monkeypatch, model_dirs["qwen2"], Levels(), *flags)
    for row in rows:
        assert (float(row["rounds"]), float(row["alpha"])) == (rounds, alpha)
        assert float(row["valid_share"]) == 0.25


def test_no_alpha(tmp_path, monkeypatch, model_dirs):
    flags = ["--no-alpha", "--beta-th", 0, "--group-size", 16, "--lr", 1e-9]
    _, rows = run_gpg(tmp_path, monkeypatch, model_dirs["qwen2"], Levels(), *flags)
    assert [float(row["alpha"]) for row in rows] == [1.0] * 3


def test_what_train_hands_to_the_loss(tmp_path, monkeypatch, model_dirs):
    """All tokens of the batch, dead groups included; rows of valid groups only; gradients of one
    step only; log-probs at the temperature of sampling."""
    calls = []

    def loss_and_look(logprobs, advantages, mask, alpha, total_tokens):
        calls.append((len(logprobs), total_tokens, alpha, float(advantages.abs().min())))
        return gpg_loss(logprobs, advantages, mask, alpha, total_tokens)

    def logprobs_and_look(model, mb, temperature=1.0):
        assert all(p.grad is None for p in model.parameters())
        scored = logprobs(model, mb, temperature)
        torch.testing.assert_close(scored, mb.logprobs, atol=1e-4, rtol=0)
        assert temperature == 0.7
        return scored

    logprobs = common.completion_logprobs
    monkeypatch.setattr(gpg, "gpg_loss", loss_and_look)
    monkeypatch.setattr(common, "completion_logprobs", logprobs_and_look)
    flags = ["--beta-th", 0, "--group-size", 16, "--lr", 1e-9, "--micro-batch-tokens", 10**6]
    flags += ["--temperature", 0.7]
    _, rows = run_gpg(tmp_path, monkeypatch, model_dirs["qwen2"], Levels(), *flags)
    assert len(calls) == 3  # one forward pass a step
    for (n, total_tokens, alpha, least), row in zip(calls, rows, strict=True):
        assert n == 16 and alpha == 4.0 and least > 0
        assert total_tokens == pytest.approx(4 * 16 * float(row["completion_length"]), rel=1e-5)


class Hopeless(Levels):
    def reward(self, completion, answer):
        return 0.0


def test_all_dead_steps_are_skipped_and_said(tmp_path, monkeypatch, model_dirs, capsys):
    run, rows = run_gpg(tmp_path, monkeypatch, model_dirs["qwen2"], Hopeless(), "--lr", 1e-2)
    assert [float(row["alpha"]) for row in rows] == [0.0] * 3
    assert [float(row["rounds"]) for row in rows] == [4] * 3
    assert [float(row["grad_norm"]) for row in rows] == [0.0] * 3
    assert run.state["skipped"] == 3
    out, err = capsys.readouterr()
    assert "step 1: every group is dead" in err and "3 steps skipped" in out
    before, _ = common.load_model(str(model_dirs["qwen2"]), torch.device("cpu"))
    after, _ = common.load_model(str(run.checkpoint), torch.device("cpu"))
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- the loop ----


class ManyAs(common.TextTask):
    """The reward is the share of a's: a dense signal that a random model can climb in seconds."""

    def problem(self, index):
        return f"{index % 7}:", "a"

    def reward(self, completion, answer):
        return completion.count("a") / 8


@pytest.mark.parametrize("flags", [[], ["--f-norm", "std"], ["--no-alpha"], ["--temperature", 1.3]])
def test_training_raises_the_reward(tmp_path, monkeypatch, model_dirs, flags):
    flags = ["--steps", 40, "--lr", 1e-2, "--group-size", 16, *flags]
    _, rows = run_gpg(tmp_path, monkeypatch, model_dirs["qwen2"], ManyAs(), *flags)
    rewards = [float(row["reward_mean"]) for row in rows]
    assert sum(rewards[:3]) / 3 < 0.1 and sum(rewards[-3:]) / 3 > 0.5


class Variety(ManyAs):
    def reward(self, completion, answer):
        return len(set(completion)) / 8


def test_every_family_trains(tmp_path, monkeypatch, model_dirs, family):
    flags = ["--steps", 2, "--lr", 1e-3, "--micro-batch-tokens", 100]
    _, rows = run_gpg(tmp_path, monkeypatch, model_dirs[family], Variety(), *flags)
    assert all(float(row["grad_norm"]) > 0 for row in rows)


def test_micro_batch_size_changes_no_step(tmp_path, monkeypatch, model_dirs):
    losses = []
    for tokens in (40, 10**6):
        flags = ["--lr", 1e-3, "--micro-batch-tokens", tokens, "--overwrite"]
        _, rows = run_gpg(tmp_path, monkeypatch, model_dirs["qwen2"], ManyAs(), *flags)
        losses.append([(float(row["loss"]), float(row["grad_norm"])) for row in rows])
    for a, b in zip(*losses, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)


def test_logged_metrics(tmp_path, monkeypatch, model_dirs):
    _, rows = run_gpg(tmp_path, monkeypatch, model_dirs["qwen2"], ManyAs(), "--lr", 1e-3)
    row = {name: float(value) for name, value in rows[0].items() if value}
    assert 0 < row["entropy"] < math.log(258)
    assert 1 <= row["completion_length"] <= 8 and 0 <= row["truncated_share"] <= 1
    assert row["lr"] == pytest.approx(1e-3 / 10, rel=1e-5)  # the first of ten warm-up steps
    assert row["tokens_per_second"] > 0 and row["seconds"] > 0


def test_learning_rate():
    rate = common.learning_rate
    assert [rate(s, 100, 2.0, 4, "constant") for s in (1, 2, 4, 5, 100)] == [0.5, 1, 2, 2, 2]
    assert rate(52, 100, 2.0, 4, "cosine") == pytest.approx(1.0)
    assert rate(100, 100, 2.0, 4, "cosine") == pytest.approx(0.0, abs=1e-12)
    assert rate(1, 1, 2.0, 0, "cosine") == pytest.approx(0.0, abs=1e-12)
