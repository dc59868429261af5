"""The equations of GPG against hand-computed values, brute force in float64, and invariances."""

import pytest
import torch
from helpers import REWARDS, ManyAs, close, random_logprobs, run_script
from stage import OTHER_FLAGS

import common
import copg
import gpg
from gpg import fill_batch, gpg_loss, gradient_scale, group_advantages, is_valid
from tasks.pairs import Record

# ---- eq. 6 ----


def test_advantages_by_hand():
    """Eq. 6 with F_norm = 1, on four groups of four rewards."""
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
    """A group's advantages sum to 0 and depend on no other group and on no added constant."""
    rewards = torch.randn(5, 8).double()
    advantages = group_advantages(rewards, f_norm)
    close(advantages.sum(1), torch.zeros(5).double(), 1e-12)
    close(group_advantages(rewards + torch.randn(5, 1), f_norm), advantages, 1e-12)
    torch.testing.assert_close(group_advantages(rewards[2:3], f_norm)[0], advantages[2])
    scaled = group_advantages(10 * rewards, f_norm)
    torch.testing.assert_close(scaled, (10 if f_norm == "1" else 1) * advantages, atol=0, rtol=1e-3)


# ---- eq. 7 ----


def test_alpha_by_hand():
    """Eq. 7 with two, one, none and all of the groups dead."""
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
    """Eq. 5 and 8 on two completions of two and three tokens; with a given total, too."""
    logprobs = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -5.0, -7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    advantages = torch.tensor([0.5, -0.25])
    # -(0.5 * (-1 - 2) - 0.25 * (-3 - 5 - 7)) / 5 tokens = -(-1.5 + 3.75) / 5
    assert gpg_loss(logprobs, advantages, mask).item() == pytest.approx(-0.45, abs=1e-7)
    assert gpg_loss(logprobs, advantages, mask, alpha=2.0).item() == pytest.approx(-0.9, abs=1e-7)
    assert gpg_loss(logprobs, advantages, mask, 2.0, 10).item() == pytest.approx(-0.45, abs=1e-7)


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


def test_loss_and_gradient_equal_brute_force():
    """Eq. 5 to 8 as loops over groups, completions and tokens, in float64."""
    logprobs, mask = random_logprobs()
    brute = brute_force_loss(logprobs, REWARDS, mask, alpha=4 / 2)
    ours = gpg_loss(logprobs, group_advantages(REWARDS).flatten(), mask, gradient_scale(REWARDS))
    close(ours, brute, 1e-12)
    (expected,), (found,) = (torch.autograd.grad(loss, logprobs) for loss in (brute, ours))
    assert expected.norm() > 1e-2
    close(found, expected, 1e-12)


def test_eos_is_trained(small):
    """The EOS is a sampled token: its log-prob gets a gradient, and it counts among the tokens."""
    model, tokenizer = small
    rollout = copg.encode(model, tokenizer, [Record("1+1=", ["2"], ends=[256])])
    assert rollout.completion_mask.sum() == 2
    logprobs = common.completion_logprobs(model, rollout)
    logprobs.retain_grad()
    gpg_loss(logprobs, torch.tensor([1.0]), rollout.completion_mask).backward()
    assert logprobs.grad.tolist() == [[-0.5, -0.5]]


# ---- Algorithm 1: the threshold ----


def test_fill_batch():
    """All valid groups of all rounds, then dead ones of the last round, B or more in all."""
    F, T = False, True
    # one round of four: valid ones first, then the dead, four in all
    assert sorted(fill_batch(torch.tensor([F, T, F, T]), 4).tolist()) == [0, 1, 2, 3]
    # two rounds of four: valid 1, 5, 6 of both rounds, filled with a dead one of the last round
    chosen = fill_batch(torch.tensor([F, T, F, F, F, T, T, F]), 4).tolist()
    assert sorted(chosen[:3]) == [1, 5, 6] and chosen[3:] == [7]
    # more valid ones than B: all of them, no dead one
    assert fill_batch(torch.tensor([T, T, F, T, F, T, T, T]), 4).tolist() == [0, 1, 3, 5, 6, 7]
    assert len(fill_batch(torch.tensor([F] * 8), 4)) == 4


# ---- what train hands on ----


SMALL = ["--prompts", 3, "--group-size", 4, "--max-new-tokens", 5, "--steps", 3, "--seed", 4]
SMALL += ["--temperature", 0.7, "--clip-grad", 1e-3, "--weight-decay", 0.03, "--lr", 0.04]
SMALL += ["--warmup", 2, "--schedule", "cosine", "--micro-batch-tokens", 90]
RATES = [0.02, 0.04, 0.0]  # of the three steps

NO_ALPHA = ["--no-alpha", *OTHER_FLAGS]

# The valid groups in each round of each step; the groups in the batch; alpha.
STEPS = [
    ([[0, 1, 0], [1, 0, 0]], [1, 3, 5], 3 / 2),
    ([[1, 1, 0]], [0, 1, 2], 3 / 2),
    ([[1, 0, 0], [1, 1, 1]], [0, 3, 4, 5], 1.0),
]


@pytest.mark.parametrize("flags", [[], ["--f-norm", "std"], NO_ALPHA, ["--mask-truncated"]])
def test_everything_that_train_hands_on(stage, flags):
    """Three steps of training against loops: batches, alpha, gradients, rates and the log."""
    stage.plan = [valid for rounds, _, _ in STEPS for valid in rounds]
    run, rows, samples = stage.train(gpg, *SMALL, *flags)
    rounds = [len(rounds) for rounds, _, _ in STEPS]
    alphas = [1.0 if "--no-alpha" in flags else alpha for *_, alpha in STEPS]
    stage.check_calls(3, rounds)
    assert {(call["group_size"], call["temperature"]) for call in stage.samples} == {(4, 0.7)}
    assert {temperature for _, _, temperature, _ in stage.scored} == {0.7}
    ((name, device, task, *others),) = stage.loads  # no reference
    assert (name, device, task.split) == ("m", stage.args.device, "train")
    assert others == ([False, "Be brief.", True] if flags is NO_ALPHA else [True, None, False])

    groups_of, calls = [], iter(stage.samples)
    for n in rounds:
        groups_of.append([group for _ in range(n) for group in next(calls)["groups"]])

    def loss_of_a_step(step, theta):
        """Eq. 5 to 8 as loops over the groups of all rounds."""
        groups, (_, batch, _) = groups_of[step], STEPS[step]
        total, tokens, texts = 0.0, 0, []
        for group in (groups[i] for i in batch):
            rewards = torch.tensor([row.reward for row in group]).double()
            advantages = rewards - rewards.mean()
            if "std" in flags:
                advantages = advantages / (rewards.std() + 1e-4)
            for row, advantage in zip(group, advantages, strict=True):
                if row.cut and "--mask-truncated" in flags:
                    continue
                total = total - advantage * row.logprobs(theta, 0.7).sum()
                tokens += len(row.tokens)
            if len(set(rewards.tolist())) > 1:
                left = [row for row in group if not (row.cut and "--mask-truncated" in flags)]
                texts += [row.text for row in left]
        assert sorted(stage.updates[step]["rows"]) == sorted(texts)  # dead groups skip the model
        return alphas[step] * total / tokens

    losses, norms = stage.check_updates(loss_of_a_step, RATES)
    assert len(stage.scored) > 5  # micro-batches
    stage.check_log(run, rows, samples, rounds)
    stage.check_evaluations(rows, ["eval_accuracy", "eval_accuracy_stderr", "eval_greedy"])
    for i, row in enumerate(rows[1:]):
        valid = [x for valid in STEPS[i][0] for x in valid]
        expected = {"loss": losses[i], "grad_norm": norms[i], "lr": RATES[i], "alpha": alphas[i]}
        expected |= {"rounds": rounds[i], "valid_share": sum(valid) / len(valid)}
        for column, value in expected.items():
            assert row[column] == pytest.approx(value, rel=1e-4, abs=1e-6), column


@pytest.mark.parametrize(
    "flags, rounds, alpha",
    [
        (["--beta-th", 0], 1, 4.0),
        (["--beta-th", 0.25], 1, 4.0),
        (["--beta-th", 0.5], 2, 2.0),
        (["--beta-th", 1], 4, 1.0),
        (["--beta-th", 1, "--max-rounds", 3], 3, 4 / 3),
    ],
)
def test_threshold(stage, flags, rounds, alpha):
    """One of four groups is valid in every round: after k rounds k are, and alpha = 4 / k."""
    stage.plan = [[0, 0, 1, 0]] * 9
    _, rows, _ = stage.train(gpg, *SMALL, *flags, "--prompts", 4, "--steps", 1)
    assert rows[1]["rounds"] == rounds and rows[1]["alpha"] == pytest.approx(alpha, rel=1e-5)
    assert rows[1]["valid_share"] == 0.25


@pytest.mark.parametrize("flags", [[], ["--no-alpha"]])
def test_all_dead_steps_are_skipped_and_said(stage, capsys, flags):
    """Not even the moments of AdamW from the step before move the weights."""
    stage.plan = [[1, 1, 1], *[[0, 0, 0]] * 8]
    _, rows, _ = stage.train(gpg, *SMALL, *flags)
    alpha = 1 if flags else 0  # nothing is divided by it
    assert [row["alpha"] for row in rows[1:]] == [1, alpha, alpha]
    assert [row["rounds"] for row in rows[1:]] == [1, 4, 4]
    assert [(row["grad_norm"], row["loss"]) for row in rows[2:]] == [(0, 0)] * 2
    assert len(stage.updates) == 1 and stage.optimizer.state[stage.models[0].theta]["step"] == 1
    err = capsys.readouterr().err
    assert "step 2: all groups are dead" in err and err.count("all groups are dead") == 1


# ---- with a real model ----


@pytest.mark.parametrize("flags", [[], ["--f-norm", "std", "--no-alpha", "--temperature", 1.3]])
def test_training_raises_the_reward(tmp_path, monkeypatch, model_dirs, flags):
    flags = ["--steps", 20, "--lr", 2e-2, "--group-size", 16, *flags]
    _, rows = run_script(gpg, tmp_path, monkeypatch, model_dirs["qwen2"], ManyAs(), *flags)
    rewards = [row["reward_mean"] for row in rows]
    assert sum(rewards[:3]) / 3 < 0.1 and sum(rewards[-3:]) / 3 > 0.5


class Variety(ManyAs):
    def reward(self, completion, answer):
        return len(set(completion)) / 8


def test_every_family_trains_and_micro_batches_change_no_step(
    tmp_path, monkeypatch, model_dirs, family
):
    """Real small models train, and small micro-batches take the same steps as one large one."""
    steps = []
    for tokens in (40, 10**6):
        flags = ["--steps", 2, "--lr", 1e-3, "--micro-batch-tokens", tokens]
        _, rows = run_script(gpg, tmp_path, monkeypatch, model_dirs[family], Variety(), *flags)
        steps.append([(row["loss"], row["grad_norm"]) for row in rows])
        assert all(row["grad_norm"] > 0 for row in rows)
    for a, b in zip(*steps, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5)
