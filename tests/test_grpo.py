"""The equations of GRPO against hand-computed values, enumeration and GPG, and its loop."""

from statistics import mean

import pytest
import torch
from helpers import REWARDS, ManyAs, close, random_logprobs, run_script
from stage import OTHER_FLAGS, Bigrams
from test_gpg import RATES, SMALL, Variety

import grpo
from grpo import batch_total, group_advantages, grpo_loss, is_clipped, kl_k3, minibatches

AGGREGATES = ["sequence", "token", "constant"]


# ---- advantages ----


def test_advantages_by_hand():
    """[1, 0, 0, 1]: the unbiased std is .57735; [1, 0, 0, 0]: it is .5."""
    a = 0.86587
    advantages = group_advantages(REWARDS)
    assert advantages[0].tolist() == pytest.approx([a, -a, -a, a], abs=1e-5)
    assert advantages[2].tolist() == pytest.approx([1.4997, -0.4999, -0.4999, -0.4999], abs=1e-4)
    assert (advantages[[1, 3]] == 0).all()
    centred = group_advantages(REWARDS, "none")
    assert centred[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    assert centred[2].tolist() == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("scale", ["std", "none"])
def test_dead_groups_have_no_advantage_at_all(scale):
    """The mean of eight times 0.1 is not 0.1 in float32; over a std near 0 the rest would grow."""
    for value in torch.rand(200):
        assert (group_advantages(torch.full((1, 7), float(value)), scale) == 0).all()


# ---- the clipped surrogate ----


def one_token(ratio, advantage, **flags):
    """J of one token, and its derivative by the ratio."""
    ratio = torch.tensor([[ratio]], dtype=torch.double, requires_grad=True)
    ones, zeros = torch.ones(1, 1), torch.zeros(1, 1).double()
    J = -grpo_loss(ratio.log(), zeros, torch.tensor([advantage]), ones, **flags)
    (slope,) = torch.autograd.grad(J, ratio)
    return pytest.approx(J.item(), abs=1e-12), pytest.approx(slope.item(), abs=1e-12)


@pytest.mark.parametrize(
    "ratio, advantage, J, slope",
    [
        (1.1, 2.0, 2.2, 2.0),  # inside: the plain product
        (0.9, -2.0, -1.8, -2.0),
        (1.5, 2.0, 2.4, 0.0),  # better than before, and far enough: 1.2 * 2
        (0.5, 2.0, 1.0, 2.0),  # worse than before: pulled back from any distance
        (0.5, -2.0, -1.6, 0.0),  # 0.8 * -2
        (1.5, -2.0, -3.0, -2.0),
    ],
)
def test_clip_by_hand(ratio, advantage, J, slope):
    """J of one token and its derivative, on both sides of both clips."""
    assert one_token(ratio, advantage) == (J, slope)


def test_the_two_clips_are_apart():
    """clip_low bounds the ratio below and clip_high above, each for its sign of A."""
    flags = {"clip_low": 0.1, "clip_high": 0.28}
    assert one_token(1.25, 1.0, **flags) == (1.25, 1.0)
    assert one_token(1.5, 1.0, **flags) == (1.28, 0.0)
    assert one_token(0.85, -1.0, **flags) == (-0.9, 0.0)
    assert one_token(0.95, -1.0, **flags) == (-0.95, -1.0)


def test_is_clipped_where_the_gradient_is_zero():
    """is_clipped marks exactly the tokens without a gradient."""
    logprobs = (0.5 * torch.randn(50, 6).double()).requires_grad_()
    advantages = torch.randn(50).double()
    mask, old = torch.ones(50, 6), torch.zeros(50, 6).double()
    grpo_loss(logprobs, old, advantages, mask, 0.2, 0.3).backward()
    clipped = is_clipped(logprobs.exp(), advantages, 0.2, 0.3)
    assert torch.equal(clipped, logprobs.grad == 0)
    assert 0.1 < clipped.double().mean() < 0.9
    assert not is_clipped(logprobs.exp(), 0 * advantages, 0.2, 0.3).any()


# ---- aggregation ----


def test_aggregation_by_hand():
    """At ratio 1 a token's J is its A: two tokens of .75, four of -.25, in five columns."""
    zeros = torch.zeros(2, 5).double()
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    advantages = torch.tensor([0.75, -0.25])

    def loss(aggregate, **total):
        return grpo_loss(zeros, zeros, advantages, mask, aggregate=aggregate, **total).item()

    assert loss("sequence") == pytest.approx(-(0.75 - 0.25) / 2, abs=1e-12)
    assert loss("token") == pytest.approx(-(1.5 - 1.0) / 6, abs=1e-12)
    assert loss("constant") == pytest.approx(-(1.5 - 1.0) / 10, abs=1e-12)
    assert loss("sequence", total=5) == pytest.approx(-0.1, abs=1e-12)
    assert [batch_total(mask, aggregate, 9) for aggregate in AGGREGATES] == [2, 6, 18]


# ---- the KL ----


def test_k3_by_hand():
    """pi_ref / pi = 2 and 1/2: 2 - ln 2 - 1 and 1/2 + ln 2 - 1."""
    logprobs, ref = torch.tensor([0.2, 0.4]).log(), torch.tensor([0.4, 0.2]).log()
    assert kl_k3(logprobs, ref).tolist() == pytest.approx([0.306853, 0.193147], abs=1e-6)


def test_k3_is_never_negative():
    """Every single estimate is >= 0, for tiny differences too."""
    log_ratio = torch.cat([torch.randn(10000), 1e-4 * torch.randn(10000), torch.zeros(1)])
    assert (kl_k3(-log_ratio, torch.zeros(20001)) >= 0).all()


@pytest.fixture
def two_policies():
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(5, generator=generator).double().requires_grad_()
    return theta, torch.randn(5, generator=generator).double().log_softmax(0)


def test_k3_estimates_the_kl_to_the_reference(two_policies):
    """Weighted with pi, over all five tokens: KL(pi || pi_ref), and not KL(pi_ref || pi)."""
    theta, ref = two_policies
    log_pi = theta.detach().log_softmax(0)
    expected = (log_pi.exp() * kl_k3(log_pi, ref)).sum()
    exact = (log_pi.exp() * (log_pi - ref)).sum()
    other = (ref.exp() * (ref - log_pi)).sum()
    close(expected, exact, 1e-12)
    assert (exact - other).abs() > 0.05


def test_the_gradient_of_k3_is_that_of_the_other_kl(two_policies):
    """E_pi[gradient of k3], the samples held fixed, is the gradient of KL(pi_ref || pi)."""
    theta, ref = two_policies
    log_pi = theta.log_softmax(0)
    expected_k3 = (log_pi.detach().exp() * kl_k3(log_pi, ref)).sum()
    (ours,) = torch.autograd.grad(expected_k3, theta, retain_graph=True)
    (other,) = torch.autograd.grad((ref.exp() * (ref - log_pi)).sum(), theta)
    close(ours, other, 1e-12)


def test_the_kl_is_a_cost_times_beta():
    """The KL raises the loss, in proportion to beta; with beta = 0 it is not there."""
    logprobs = torch.tensor([[0.2, 0.4]]).log()
    ref, mask = torch.tensor([[0.4, 0.2]]).log(), torch.ones(1, 2)
    flags = {"ref_logprobs": ref, "kl_beta": 0.1}
    loss = grpo_loss(logprobs, logprobs, torch.tensor([0.0]), mask, **flags)
    assert loss.item() == pytest.approx(0.1 * (0.306853 + 0.193147) / 2, abs=1e-6)
    assert grpo_loss(logprobs, logprobs, torch.tensor([0.0]), mask, ref_logprobs=ref) == 0


# ---- against brute force, and against GPG ----


def brute_force_loss(logprobs, old, ref, advantages, mask, aggregate, beta=0.3):
    """Eq. 3 as loops, clips .2 and .28."""
    N, T = logprobs.shape
    rows = []
    for i in range(N):
        terms = []
        for t in range(T):
            if mask[i, t]:
                ratio = (logprobs[i, t] - old[i, t]).exp()
                A = advantages[i]
                J = ratio * A
                if (A > 0 and ratio > 1.28) or (A < 0 and ratio < 0.8):
                    J = (1.28 if A > 0 else 0.8) * A
                r = (ref[i, t] - logprobs[i, t]).exp()
                terms.append(J - beta * (r - r.log() - 1))
        rows.append(terms)
    if aggregate == "sequence":
        return -sum(sum(row) / len(row) for row in rows) / N
    return -sum(map(sum, rows)) / (sum(map(len, rows)) if aggregate == "token" else N * T)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_loss_and_gradient_equal_brute_force(aggregate):
    """Eq. 3 as loops over rows and tokens, in float64, for each way to aggregate."""
    advantages = group_advantages(REWARDS).flatten()
    logprobs, mask = random_logprobs()
    old = logprobs.detach() + 0.2 * torch.randn(16, 12)
    ref = logprobs.detach() + 0.3 * torch.randn(16, 12)
    ours = grpo_loss(logprobs, old, advantages, mask, 0.2, 0.28, ref, 0.3, aggregate)
    brute = brute_force_loss(logprobs, old, ref, advantages, mask, aggregate)
    close(ours, brute, 1e-12)
    (expected,), (found,) = (torch.autograd.grad(loss, logprobs) for loss in (brute, ours))
    assert expected.norm() > 1e-2
    close(found, expected, 1e-12)


def test_minibatches():
    """mu passes, each with every row once, in as many parts as asked, in another order."""
    parts = minibatches(10, 2, 3)
    assert [len(part) for part in parts] == [4, 3, 3] * 2
    first, second = torch.cat(parts[:3]), torch.cat(parts[3:])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(10))
    assert first.tolist() != second.tolist()


def test_choose_groups():
    F, T = False, True
    assert grpo.choose_groups(torch.tensor([F, T, F, F]), 4, False).tolist() == [0, 1, 2, 3]
    valid = torch.tensor([F, T, F, F, T, T, T, T])
    assert grpo.choose_groups(valid, 4, True).tolist() == [1, 4, 5, 6]
    assert grpo.choose_groups(valid[:4], 4, True).tolist() == [1]
    assert grpo.choose_groups(torch.tensor([F] * 8), 4, True).tolist() == [0, 1, 2, 3]


# ---- the flags ----


def test_variants():
    def defining(*argv):
        a = grpo.parse_args(list(argv))
        return a.scale, a.kl_beta, a.aggregate, a.clip_low, a.clip_high, a.dynamic_sampling

    assert defining() == ("std", 0.04, "sequence", 0.2, 0.2, False)
    assert defining("--variant", "dr_grpo") == ("none", 0.0, "constant", 0.2, 0.2, False)
    assert defining("--variant", "dapo") == ("std", 0.0, "token", 0.2, 0.28, True)
    assert defining("--clip-low", "0.1") == ("std", 0.04, "sequence", 0.1, 0.1, False)
    given = ["--variant", "dapo", "--clip-high", "0.3", "--scale", "none"]
    assert defining(*given, "--aggregate", "constant") == ("none", 0.0, "constant", 0.2, 0.3, True)
    assert grpo.parse_args(["--dynamic-sampling", "--max-rounds", "3"]).max_rounds == 3
    rounds = [grpo.parse_args(x).max_rounds for x in ([], ["--variant", "dapo"])]
    assert rounds == [1, 10]


# ---- what train hands on ----


DYNAMIC = ["--variant", "dapo", "--kl-beta", 0.3, "--clip-low", 0.1, "--aggregate", "sequence"]
CASES = {  # flags; the valid groups in each round of each step; the groups in each batch
    "dynamic sampling": (
        DYNAMIC,
        [[[0, 1, 0], [1, 1, 0]], [[1, 1, 1]], [[1, 0, 1], [0, 1, 1]]],
        [[1, 3, 4], [0, 1, 2], [0, 2, 4]],
    ),
    "too few are valid": (
        [*DYNAMIC[:-1], "token", "--kl-beta", 0, "--max-rounds", 2],
        [[[0, 1, 0], [0, 0, 1]], [[1, 1, 1]], [[0, 0, 0], [0, 1, 0]]],
        [[1, 5], [0, 1, 2], [4]],
    ),
    "dead rows have a KL": (
        ["--kl-beta", 0.3, "--clip-high", 0.3, "--scale", "none", "--aggregate", "token"],
        [[[0, 1, 0]], [[1, 1, 0]], [[0, 0, 0]]],
        [[0, 1, 2]] * 3,
    ),
    "dead rows count": (
        ["--variant", "dr_grpo", *OTHER_FLAGS],
        [[[0, 1, 0]], [[1, 1, 0]], [[0, 0, 1]]],
        [[0, 1, 2]] * 3,
    ),
    "truncated rows leave the loss": (
        ["--variant", "dapo", "--max-rounds", 1, "--mask-truncated"],
        [[[1, 1, 1]], [[0, 1, 1]], [[1, 1, 1]]],
        [[0, 1, 2], [1, 2], [0, 1, 2]],
    ),
    "truncated rows are no part of N": (
        ["--kl-beta", 0.3, "--mask-truncated"],
        [[[0, 1, 1]], [[1, 1, 1]], [[1, 1, 1]]],
        [[0, 1, 2]] * 3,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_everything_that_train_hands_on(stage, monkeypatch, name):
    """Three steps of training against loops: batches, updates, rates and the log."""
    flags, steps, batches = CASES[name]
    orders = []

    def minibatches_and_record(N, mu, K):
        orders.append(minibatches(N, mu, K))
        assert (mu, K) == (2, 3)
        return orders[-1]

    monkeypatch.setattr(grpo, "minibatches", minibatches_and_record)
    stage.plan = [valid for rounds in steps for valid in rounds]
    flags = ["--updates-per-batch", 2, "--minibatches", 3, "--micro-batch-tokens", 40, *flags]
    flags = [*SMALL, *flags]  # several micro-batches in a minibatch
    run, rows, samples = stage.train(grpo, *flags)
    args, rounds = stage.args, [len(valid) for valid in steps]
    stage.check_calls(3, rounds)
    assert {(call["group_size"], call["temperature"]) for call in stage.samples} == {(4, 0.7)}
    assert {temperature for _, _, temperature, _ in stage.scored} == {0.7}
    assert stage.loads[0][:2] == ("m", args.device)
    others = (False, "Be brief.", True) if args.grad_checkpointing else (True, None, False)
    assert stage.loads[0][3:] == others
    assert [load[:2] for load in stage.loads[1:]] == [("m", args.device)] * (args.kl_beta > 0)

    calls, parts = iter(stage.samples), []  # of each update: its step, its rows and advantages
    whole, seen = [], []  # of each step: its batch; the log-probs of a row at its last update
    for step, n in enumerate(rounds):
        groups = [group for _ in range(n) for group in next(calls)["groups"]]
        batch = []
        for group in (groups[i] for i in batches[step]):
            rewards = torch.tensor([row.reward for row in group]).double()
            advantages = rewards - rewards.mean()
            if len(set(rewards.tolist())) == 1:
                advantages = torch.zeros(4).double()
            elif args.scale == "std":
                advantages = advantages / (rewards.std() + 1e-4)
            pairs = zip(group, advantages, strict=True)
            batch += [(row, A) for row, A in pairs if not (args.mask_truncated and row.cut)]
        assert sum(map(len, orders[step])) == 2 * len(batch)
        whole.append(batch)
        seen.append({row.text: row.old for row, _ in batch})
        for order in orders[step]:
            part = [batch[i] for i in order]
            if args.kl_beta > 0 or any(A != 0 for _, A in part):
                parts.append((step, part))
    if args.kl_beta > 0:
        ref = stage.models[1].theta
        assert torch.equal(ref, Bigrams(1).theta) and not ref.requires_grad
        texts = [t for model, *_, texts in stage.scored if model is stage.models[1] for t in texts]
        assert len(texts) == len(set(texts)) == sum(map(len, whole))  # once

    def eq_3(row, A, logprobs):
        """Ratio, clipping, KL and J of each token."""
        ratio = (logprobs - row.old).exp()
        low, high = ratio < 1 - args.clip_low, ratio > 1 + args.clip_high
        clipped = (low & (A < 0)) | (high & (A > 0))
        bound = 1 + args.clip_high if A > 0 else 1 - args.clip_low
        J, kl = torch.where(clipped, bound * A, ratio * A), torch.zeros(len(row.tokens))
        if args.kl_beta > 0:
            r = (row.logprobs(ref.double(), 0.7) - logprobs).exp()
            kl = r - r.log() - 1
            J = J - args.kl_beta * kl
        return ratio, clipped, kl, J

    def loss_of_an_update(i, theta):
        """Eq. 3 over the rows of a minibatch, a token at a time."""
        step, part = parts[i]
        total, tokens = 0.0, sum(len(row.tokens) for row, _ in part)
        for row, A in part:
            if A == 0 and args.kl_beta == 0:
                continue
            logprobs, n = row.logprobs(theta, 0.7), len(row.tokens)
            seen[step][row.text] = logprobs.detach()
            share = {"sequence": n * len(part), "token": tokens, "constant": 5 * len(part)}
            total = total - eq_3(row, A, logprobs)[3].sum() / share[args.aggregate]
        live = [row.text for row, A in part if A != 0 or args.kl_beta > 0]
        assert sorted(stage.updates[i]["rows"]) == sorted(live)
        return total

    rates = [RATES[step] for step, _ in parts]
    losses, norms = stage.check_updates(loss_of_an_update, rates)
    stage.check_log(run, rows, samples, rounds)
    stage.check_evaluations(rows, ["eval_accuracy", "eval_accuracy_stderr", "eval_greedy"])
    for step, row in enumerate(rows[1:]):
        valid = [x for valid in steps[step] for x in valid]
        updates = [i for i, (s, _) in enumerate(parts) if s == step]
        last = [eq_3(row, A, seen[step][row.text]) for row, A in whole[step]]
        ratio, clipped, kl, _ = (torch.cat(x).tolist() for x in zip(*last, strict=True))
        expected = {  # means over the updates, and tokens of the batch after the last pass
            "loss": mean(losses[i] for i in updates),
            "grad_norm": mean(norms[i] for i in updates),
            "ratio_min": min(ratio),
            "ratio_max": max(ratio),
            "clip_share": mean(clipped),
            "valid_share": mean(valid),
            "rounds": rounds[step],
            "lr": RATES[step],
        }
        if args.kl_beta > 0:
            expected["kl"] = mean(kl)
        assert ("kl" in row) == (args.kl_beta > 0)
        for column, value in expected.items():
            assert row[column] == pytest.approx(value, rel=1e-3, abs=1e-6), column


def test_the_reference_of_a_resumed_run_is_the_first_model(stage):
    run, _, _ = stage.train(grpo, *SMALL, "--schedule", "constant")
    stage.train(grpo, "--resume", run.dir, "--steps", 4)
    assert [load[0] for load in stage.loads] == [str(run.checkpoint), "m"]


def test_all_dead(stage, capsys):
    """Without a KL there is nothing to learn; with one the step is done. Dynamic sampling ends."""

    def updates_and_rounds(*flags):
        stage.plan, stage.out = [[0, 0, 0]] * 99, f"{stage.out}2"
        stage.updates.clear()
        _, rows, _ = stage.train(grpo, *SMALL, *flags)
        assert all((row["grad_norm"] > 0) == (len(stage.updates) > 0) for row in rows[1:])
        return len(stage.updates), rows[-1]["rounds"]

    assert updates_and_rounds("--kl-beta", 0) == (0, 1)
    assert "step 1: all groups are dead" in capsys.readouterr().err
    assert updates_and_rounds() == (3, 1)
    assert updates_and_rounds("--variant", "dapo") == (0, 10)
    assert updates_and_rounds("--variant", "dapo", "--kl-beta", 0.1) == (3, 10)


# ---- with a real model ----


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--variant", "dr_grpo"],
        ["--variant", "dapo", "--updates-per-batch", 2, "--minibatches", 2],
    ],
)
def test_training_raises_the_reward(tmp_path, monkeypatch, model_dirs, flags):
    flags = ["--steps", 20, "--lr", 2e-2, "--group-size", 16, *flags]
    _, rows = run_script(grpo, tmp_path, monkeypatch, model_dirs["qwen2"], ManyAs(), *flags)
    rewards = [row["reward_mean"] for row in rows]
    assert sum(rewards[:3]) / 3 < 0.1 and sum(rewards[-3:]) / 3 > 0.5


def test_the_first_update_has_ratio_1(tmp_path, monkeypatch, model_dirs, family):
    """Sampler and scorer agree, and before the first update so do policy and reference."""
    flags = ["--temperature", 0.8, "--lr", 1e-3, "--micro-batch-tokens", 50]
    _, rows = run_script(grpo, tmp_path, monkeypatch, model_dirs[family], Variety(), *flags)
    for row in rows:
        assert row["ratio_min"] == pytest.approx(1, abs=2e-4)
        assert row["ratio_max"] == pytest.approx(1, abs=2e-4)
        assert row["clip_share"] == 0
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[2]["kl"] > 1e-5
