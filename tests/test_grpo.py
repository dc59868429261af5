"""The equations of GRPO against hand-computed values, enumeration and GPG, and its loop."""

import pytest
import torch
from test_gpg import (
    REWARDS,
    Hopeless,
    Levels,
    ManyAs,
    Variety,
    gradient,
    metrics,
    run_script,
)

import common
import gpg
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
    assert one_token(ratio, advantage) == (J, slope)


def test_the_two_clips_are_apart():
    flags = {"clip_low": 0.1, "clip_high": 0.28}
    assert one_token(1.25, 1.0, **flags) == (1.25, 1.0)
    assert one_token(1.5, 1.0, **flags) == (1.28, 0.0)
    assert one_token(0.85, -1.0, **flags) == (-0.9, 0.0)
    assert one_token(0.95, -1.0, **flags) == (-0.95, -1.0)


def test_is_clipped_where_the_gradient_is_zero():
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
    torch.testing.assert_close(expected, exact, atol=1e-12, rtol=0)
    assert (exact - other).abs() > 0.05


def test_the_gradient_of_k3_is_that_of_the_other_kl(two_policies):
    """E_pi[gradient of k3], the samples held fixed, is the gradient of KL(pi_ref || pi)."""
    theta, ref = two_policies
    log_pi = theta.log_softmax(0)
    (ours,) = torch.autograd.grad(
        (log_pi.detach().exp() * kl_k3(log_pi, ref)).sum(), theta, retain_graph=True
    )
    (other,) = torch.autograd.grad((ref.exp() * (ref - log_pi)).sum(), theta)
    torch.testing.assert_close(ours, other, atol=1e-12, rtol=0)


def test_the_kl_is_a_cost_times_beta():
    logprobs = torch.tensor([[0.2, 0.4]]).log()
    ref, mask = torch.tensor([[0.4, 0.2]]).log(), torch.ones(1, 2)
    flags = {"ref_logprobs": ref, "kl_beta": 0.1}
    loss = grpo_loss(logprobs, logprobs, torch.tensor([0.0]), mask, **flags)
    assert loss.item() == pytest.approx(0.1 * (0.306853 + 0.193147) / 2, abs=1e-6)
    assert grpo_loss(logprobs, logprobs, torch.tensor([0.0]), mask, ref_logprobs=ref) == 0


# ---- against brute force, and against GPG ----


@pytest.fixture
def batch(small):
    """A rollout of 4 prompts x 4 completions in float64, with REWARDS: groups 1 and 3 are dead."""
    model, tokenizer = small
    rollout = common.sample(model, tokenizer, ["7", "12+5=", "a longer one: ", "1+1="], 4, 12)
    rollout.logprobs = rollout.logprobs.double() + 0.2 * torch.randn(16, 12)  # an older policy
    return model.double(), rollout


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
def test_loss_and_gradient_equal_brute_force(batch, aggregate):
    model, rollout = batch
    advantages = group_advantages(REWARDS).flatten()
    mask, old = rollout.completion_mask, rollout.logprobs
    logprobs = common.completion_logprobs(model, rollout)
    ref = (logprobs + 0.3 * torch.randn(16, 12)).detach()
    ours = grpo_loss(logprobs, old, advantages, mask, 0.2, 0.28, ref, 0.3, aggregate)
    brute = brute_force_loss(logprobs, old, ref, advantages, mask, aggregate)
    torch.testing.assert_close(ours, brute, atol=1e-12, rtol=0)
    expected = gradient(model, brute)
    assert expected.norm() > 1e-2
    logprobs = common.completion_logprobs(model, rollout)
    ours = grpo_loss(logprobs, old, advantages, mask, 0.2, 0.28, ref, 0.3, aggregate)
    torch.testing.assert_close(gradient(model, ours), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("scale, f_norm", [("none", "1"), ("std", "std")])
def test_at_ratio_1_the_gradient_is_gpgs(batch, scale, f_norm):
    """mu = 1, no KL, the mean over tokens: what is left of GRPO is GPG with alpha = 1."""
    model, rollout = batch
    mask = rollout.completion_mask
    logprobs = common.completion_logprobs(model, rollout)
    plain = gpg.gpg_loss(logprobs, gpg.group_advantages(REWARDS, f_norm).flatten(), mask)
    expected = gradient(model, plain)
    logprobs = common.completion_logprobs(model, rollout)
    advantages = group_advantages(REWARDS, scale).flatten()
    loss = grpo_loss(logprobs, logprobs.detach(), advantages, mask, aggregate="token")
    assert expected.norm() > 1e-2
    torch.testing.assert_close(gradient(model, loss), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("max_tokens", [1, 100, 10**6])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_micro_batches_change_nothing(batch, aggregate, max_tokens):
    model, rollout = batch
    advantages = group_advantages(REWARDS).flatten()
    ref = common.frozen_logprobs(model, rollout, max_tokens) + 0.3
    logprobs = common.completion_logprobs(model, rollout)
    mask = rollout.completion_mask
    flags = {"kl_beta": 0.3, "aggregate": aggregate}
    loss = grpo_loss(logprobs, rollout.logprobs, advantages, mask, ref_logprobs=ref, **flags)
    expected = gradient(model, loss)
    total = batch_total(mask, aggregate, 12)
    model.zero_grad()
    for rows in common.micro_batches(rollout, max_tokens):
        mb = rollout.rows(rows)
        logprobs = common.completion_logprobs(model, mb)
        mb_ref = ref[rows, : logprobs.shape[1]]
        grpo_loss(
            logprobs, mb.logprobs, advantages[rows], mb.completion_mask, ref_logprobs=mb_ref,
            total=total, **flags,
        ).backward()  # fmt: skip
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(ours, expected, atol=1e-6 * expected.norm().item(), rtol=0)


def test_frozen_logprobs(batch, family, loaded):
    """The same numbers as with gradient, whatever the micro-batches; nothing for autograd."""
    model, rollout = loaded[0], batch[1]
    expected = common.completion_logprobs(model, rollout, 0.7).detach()
    for max_tokens in (1, 60, 10**6):
        frozen = common.frozen_logprobs(model, rollout, max_tokens, 0.7)
        assert not frozen.requires_grad
        torch.testing.assert_close(frozen.float(), expected, atol=1e-4, rtol=0)


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
    given = ["--variant", "dapo", "--clip-high", "0.3", "--no-dynamic-sampling", "--scale", "none"]
    assert defining(*given) == ("none", 0.0, "token", 0.2, 0.3, False)


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--group-size", "1"], "another reward"),
        (["--minibatches", "129"], "more than there are"),
        (["--variant", "ppo"], "invalid choice"),
        (["--clip-low", "0"], "above 0"),
        (["--kl-beta", "-1"], "at least 0"),
        (["--updates-per-batch", "0"], "above 0"),
    ],
)
def test_bad_flags(flags, line):
    with pytest.raises(common.UserError, match=line):
        grpo.parse_args(flags)


# ---- the loop ----


def numbers(rows):
    """The rows of metrics.csv, {column: number}, without their empty cells."""
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def run_grpo(*args):
    run, rows = run_script(grpo, *args)
    return run, numbers(rows)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--variant", "dr_grpo"],
        ["--variant", "dapo"],
        ["--updates-per-batch", 2, "--minibatches", 2, "--lr", 5e-3],
    ],
)
def test_training_raises_the_reward(tmp_path, monkeypatch, model_dirs, flags):
    flags = ["--steps", 40, "--lr", 1e-2, "--group-size", 16, *flags]
    _, rows = run_grpo(tmp_path, monkeypatch, model_dirs["qwen2"], ManyAs(), *flags)
    rewards = [row["reward_mean"] for row in rows]
    assert sum(rewards[:3]) / 3 < 0.1 and sum(rewards[-3:]) / 3 > 0.5


def test_the_first_update_has_ratio_1(tmp_path, monkeypatch, model_dirs, family):
    flags = ["--temperature", 0.8, "--lr", 1e-3, "--micro-batch-tokens", 50]
    _, rows = run_grpo(tmp_path, monkeypatch, model_dirs[family], Variety(), *flags)
    for row in rows:
        assert row["ratio_min"] == pytest.approx(1, abs=2e-4)
        assert row["ratio_max"] == pytest.approx(1, abs=2e-4)
        assert row["clip_share"] == 0 and row["alpha"] == 1
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)  # the policy is still the reference
    assert rows[2]["kl"] > 1e-5


def test_later_updates_are_clipped(tmp_path, monkeypatch, model_dirs):
    """The old log-probs stay those of the sampler: in later passes the ratio leaves 1."""
    distances = []

    def loss_and_look(logprobs, old, *others):
        distances.append(float((logprobs - old).detach().abs().max()))
        return grpo_loss(logprobs, old, *others)

    monkeypatch.setattr(grpo, "grpo_loss", loss_and_look)
    flags = ["--updates-per-batch", 3, "--minibatches", 2, "--lr", 1e-3, "--group-size", 16]
    flags += ["--warmup", 0, "--kl-beta", 0]
    run, rows = run_grpo(tmp_path, monkeypatch, model_dirs["qwen2"], Variety(), *flags)
    assert distances[0] < 1e-4 and min(distances[-4:]) > 0.1  # the loss sees it too
    for row in rows:
        assert row["ratio_min"] < 0.8 and row["ratio_max"] > 1.2
        assert 0.01 < row["clip_share"] < 1 and "kl" not in row
    optimizer = torch.load(run.checkpoint / "training_state.pt")["optimizer"]
    assert optimizer["state"][0]["step"] == 3 * 3 * 2


def test_what_train_hands_to_the_loss(tmp_path, monkeypatch, model_dirs):
    """One group of four is valid. Without a KL only its rows go through the model, and the total
    counts all; with a KL all rows do; with dynamic sampling there are no others."""
    calls = []

    def loss_and_look(logprobs, old, advantages, mask, low, high, ref, beta, aggregate, total):
        assert (low, high) == (0.1, 0.3)
        torch.testing.assert_close(logprobs, old, atol=1e-4, rtol=0)
        if ref is not None:  # at a learning rate of 1e-9 the policy is still the reference
            torch.testing.assert_close(logprobs, ref, atol=1e-4, rtol=0)
        calls.append((len(logprobs), total, beta, aggregate, float(advantages.abs().min()) > 0))
        return grpo_loss(logprobs, old, advantages, mask, low, high, ref, beta, aggregate, total)

    monkeypatch.setattr(grpo, "grpo_loss", loss_and_look)
    flags = ["--group-size", 16, "--lr", 1e-9, "--micro-batch-tokens", 10**6, "--temperature", 0.7]
    flags += ["--clip-low", 0.1, "--clip-high", 0.3, "--steps", 1]

    def call(*more):
        calls.clear()
        out = ["--overwrite", *flags, *more]
        _, rows = run_grpo(tmp_path, monkeypatch, model_dirs["qwen2"], Levels(), *out)
        assert len(calls) == 1
        return calls[0], rows[0]

    assert call("--kl-beta", 0)[0] == (16, 64, 0, "sequence", True)
    assert call("--kl-beta", 0.5)[0] == (64, 64, 0.5, "sequence", False)
    assert call("--kl-beta", 0, "--aggregate", "constant")[0] == (16, 64 * 8, 0, "constant", True)
    (n, total, *_), row = call("--kl-beta", 0, "--aggregate", "token")
    assert n == 16 and total == pytest.approx(64 * row["completion_length"], rel=1e-5)
    seen, row = call("--variant", "dapo", "--aggregate", "sequence")
    assert seen == (64, 64, 0, "sequence", True) and row["rounds"] == 4
    seen, row = call("--variant", "dapo", "--aggregate", "sequence", "--max-rounds", 3)
    assert seen == (48, 48, 0, "sequence", True) and row["rounds"] == 3


def test_the_reference_is_frozen(tmp_path, monkeypatch, model_dirs):
    """It gets no gradient and keeps its weights, and without a KL it is not even loaded."""
    models = []
    load_model = common.load_model

    def load_and_keep(*args):
        models.append(load_model(*args))
        return models[-1]

    monkeypatch.setattr(common, "load_model", load_and_keep)
    flags = ["--lr", 1e-2, "--grad-checkpointing"]
    run_grpo(tmp_path, monkeypatch, model_dirs["qwen2"], ManyAs(), *flags)
    (policy, _), (ref, _) = models
    start, _ = load_model(str(model_dirs["qwen2"]), "cpu")
    assert not ref.training
    for p, r, s in zip(policy.parameters(), ref.parameters(), start.parameters(), strict=True):
        assert torch.equal(r, s) and r.grad is None and not r.requires_grad
        assert not torch.equal(p, s)
    models.clear()
    run_grpo(
        tmp_path, monkeypatch, model_dirs["qwen2"], ManyAs(), "--kl-beta", 0, "--overwrite"
    )
    assert len(models) == 1


def test_the_kl_holds_the_policy_back(tmp_path, monkeypatch, model_dirs):
    kls = []
    for beta in (1e-9, 3):
        flags = ["--steps", 25, "--lr", 1e-2, "--group-size", 16, "--kl-beta", beta, "--overwrite"]
        _, rows = run_grpo(tmp_path, monkeypatch, model_dirs["qwen2"], ManyAs(), *flags)
        kls.append(rows[-1]["kl"])
    assert kls[1] < 0.2 * kls[0]


def test_all_dead(tmp_path, monkeypatch, model_dirs, capsys):
    """Without a KL there is nothing to learn; with one the step is done. Dynamic sampling ends."""

    def skipped(*flags):
        flags = ["--overwrite", "--lr", 1e-2, *flags]
        run, rows = run_grpo(tmp_path, monkeypatch, model_dirs["qwen2"], Hopeless(), *flags)
        return run.state["skipped"], rows[-1]["rounds"]

    assert skipped("--kl-beta", 0) == (3, 1)
    assert "step 1: every group is dead" in capsys.readouterr().err
    assert skipped() == (0, 1)
    assert skipped("--variant", "dapo") == (3, 10)
    assert skipped("--variant", "dapo", "--kl-beta", 0.1) == (0, 10)


def test_resume_keeps_the_first_reference(tmp_path, monkeypatch, model_dirs):
    """Three steps and three more are six steps: the same ratios, and the KL to the same model."""
    flags = ["--lr", 1e-2, "--updates-per-batch", 2, "--schedule", "constant", "--minibatches", 2]
    task = ManyAs()
    _, whole = run_grpo(tmp_path, monkeypatch, model_dirs["qwen2"], task, *flags, "--steps", 6)
    halves = tmp_path / "halves"
    run_grpo(tmp_path, monkeypatch, model_dirs["qwen2"], task, *flags, "--out", halves)
    run = grpo.train(grpo.parse_args(["--resume", str(halves), "--steps", "6"]))
    resumed = numbers(metrics(run)[1:])
    for a, b in zip(whole, resumed, strict=True):
        for name in set(a) - {"seconds", "tokens_per_second", "eval_accuracy"}:
            assert a[name] == b[name]


def test_the_variant_is_printed(tmp_path, monkeypatch, model_dirs, capsys):
    run_grpo(
        tmp_path, monkeypatch, model_dirs["qwen2"], ManyAs(), "--variant", "dapo", "--steps", 1
    )
    line = "dapo: scale std, kl_beta 0.0, aggregate token, clip_low 0.2, clip_high 0.28, dynamic"
    assert line in capsys.readouterr().out
