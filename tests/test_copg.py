"""CoPG's equations against hand values, brute force, enumeration and RLOO; its world; its loop."""

import itertools
import json
import math

import pytest
import torch
from gymnasium.utils.env_checker import check_env
from test_gpg import ManyAs, metrics
from test_grpo import numbers

import bandit_toy
import common
import copg
from common import UserError
from copg import Posts, bradley_terry_loss, copg_loss, dpo_loss, ipo_loss, policy_loss

# ---- the losses ----


def test_losses_by_hand():
    h, r = torch.tensor([[0.5, -0.5]]), torch.tensor([[2.0, 1.0]])
    # (1 - 0.5 * 1)^2 / (2 * 0.5)
    assert copg_loss(h, r, 0.5).item() == pytest.approx(0.25, abs=1e-7)
    assert copg_loss(h, r, 0.25).item() == pytest.approx(0.75**2 / 0.5, abs=1e-6)
    # (1/2 - 0.1 * 1)^2, and 1/2 - 0.1 * -1
    assert ipo_loss(h[:, 0], h[:, 1], 0.1).item() == pytest.approx(0.16, abs=1e-7)
    assert ipo_loss(h[:, 1], h[:, 0], 0.1).item() == pytest.approx(0.36, abs=1e-7)
    # ln(1 + exp(-0.1)), ln(1 + exp(0.1))
    assert dpo_loss(h[:, 0], h[:, 1], 0.1).item() == pytest.approx(0.6443967, abs=1e-6)
    assert dpo_loss(h[:, 1], h[:, 0], 0.1).item() == pytest.approx(0.7443967, abs=1e-6)
    # ln(1 + exp(-1)), ln(1 + exp(1))
    assert bradley_terry_loss(r[:, 0], r[:, 1]).item() == pytest.approx(0.3132617, abs=1e-6)
    assert bradley_terry_loss(r[:, 1], r[:, 0]).item() == pytest.approx(1.3132617, abs=1e-6)


def test_losses_are_means_over_prompts():
    h, r = torch.randn(7, 2).double(), torch.randn(7, 2).double()
    for loss in ("copg", "ipo", "dpo"):
        alone = [policy_loss(loss, h[i : i + 1], r[i : i + 1], 0.3) for i in range(7)]
        torch.testing.assert_close(policy_loss(loss, h, r, 0.3), torch.stack(alone).mean())


@pytest.mark.parametrize("K", [2, 3, 5])
def test_copg_equals_the_pairs_by_brute_force(K):
    """Minus l of eq. 7-9 summed over the pairs, up to a constant; and its gradient, eq. 18-19."""
    beta, P = 0.3, 4
    h = torch.randn(P, K).double().requires_grad_()
    r = torch.randn(P, K).double()
    brute, constant, expected = 0.0, 0.0, torch.zeros(P, K).double()
    for p in range(P):
        for i, j in itertools.combinations(range(K), 2):
            half = (r[p, i] - beta / 2 * h[p, i]) - (r[p, j] - beta / 2 * h[p, j])
            brute -= (half * h[p, i] - half * h[p, j]) / P / (K - 1)
            constant += (r[p, i] - r[p, j]) ** 2 / (2 * beta) / P / (K - 1)
            full = (r[p, i] - beta * h[p, i]) - (r[p, j] - beta * h[p, j])
            expected[p, i] -= full.detach() / P / (K - 1)
            expected[p, j] += full.detach() / P / (K - 1)
    loss = copg_loss(h, r, beta)
    torch.testing.assert_close(loss, brute + constant, atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(loss, h)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)
    assert expected.norm() > 0.1


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
    torch.testing.assert_close(ours, torch.autograd.grad(rloo, h)[0], atol=1e-12, rtol=0)


def test_copg_is_zero_where_log_ratios_follow_rewards():
    r = torch.randn(5, 3).double()
    h = r / 0.2 + torch.randn(5, 1).double()
    assert copg_loss(h, r, 0.2).item() == pytest.approx(0, abs=1e-24)
    h[2, 1] += 0.1
    assert copg_loss(h, r, 0.2) > 1e-5


def test_copg_ignores_order_and_constants():
    h, r = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    loss = copg_loss(h, r, 0.2)
    order = [2, 0, 1]
    torch.testing.assert_close(copg_loss(h[:, order], r[:, order], 0.2), loss)
    shift = torch.randn(5, 1).double()
    torch.testing.assert_close(copg_loss(h, r + shift, 0.2), loss)
    torch.testing.assert_close(copg_loss(h + shift, r, 0.2), loss)
    assert not torch.isclose(copg_loss(h[:, order], r, 0.2), loss)


def test_ipo_is_copg_with_rewards_of_a_quarter():
    h = torch.randn(6, 2).double()
    quarter = torch.tensor([[0.25, -0.25]]).double().expand(6, 2)
    copg_of_it = copg_loss(h, quarter, 0.3)
    torch.testing.assert_close(copg_of_it, ipo_loss(h[:, 0], h[:, 1], 0.3) / (2 * 0.3))


def test_ipo_and_dpo_see_best_and_worst():
    h = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    r = torch.tensor([[0.0, 5.0, -1.0], [9.0, 5.0, 7.0]])
    best, worst = torch.tensor([2.0, 1.0]), torch.tensor([4.0, 2.0])
    for loss, function in (("ipo", ipo_loss), ("dpo", dpo_loss)):
        assert policy_loss(loss, h, r, 0.3) == function(best, worst, 0.3)
        tied = h.clone().requires_grad_()
        policy_loss(loss, tied, torch.ones(2, 3), 0.3).backward()
        assert (tied.grad == 0).all()


def test_the_bandits_losses_are_the_same():
    """bandit_toy.py has them a pair at a time, on arms; the mean over pairs is what copg.py has."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, generator=generator).double()
    arms = torch.randint(3, (50, 2), generator=generator)
    rewards = torch.tensor(bandit_toy.R).double()[arms]
    first = rewards[:, 0] >= rewards[:, 1]
    log_ratio = logits.log_softmax(1)[0] - torch.tensor(bandit_toy.REF).double().log()
    h, beta = log_ratio[arms], bandit_toy.BETA
    pairs = bandit_toy.Pairs(logits[0], arms[:, 0], arms[:, 1], first)
    theirs = bandit_toy.copg_loss(pairs).mean()
    torch.testing.assert_close(copg_loss(h, rewards, beta), theirs, atol=1e-12, rtol=0)
    chosen = h.gather(1, (~first).long()[:, None])[:, 0]
    rejected = h.gather(1, first.long()[:, None])[:, 0]
    for ours, other in ((ipo_loss, bandit_toy.ipo_loss), (dpo_loss, bandit_toy.dpo_loss)):
        torch.testing.assert_close(
            ours(chosen, rejected, beta), other(pairs).mean(), atol=1e-12, rtol=0
        )


# ---- theorem 1, on a language model small enough to enumerate ----

SEQUENCES = list(itertools.product(range(3), range(3)))  # two tokens out of three


def sequence_logprobs(theta):  # [12] -> [9]
    first, second = theta[:3].log_softmax(0), theta[3:].view(3, 3).log_softmax(1)
    return torch.stack([first[a] + second[a, b] for a, b in SEQUENCES])


REF = sequence_logprobs(torch.linspace(-0.4, 0.5, 12).double())
REWARDS = torch.tensor([0.3, 1.0, -0.5, 0.0, 2.0, 0.4, 1.1, -1.0, 0.7]).double()
BETA = 0.5


def fitted(loss):
    """Descent on all pairs of what a skewed behaviour policy wrote: the policy at the end, [9]."""
    counts = [5, 4, 3, 2, 2, 1, 1, 1, 1]  # of each sequence in the data
    data = [y for y, count in enumerate(counts) for _ in range(count)]
    pairs = torch.tensor(list(itertools.product(data, data)))  # [P, 2]
    theta = torch.linspace(-0.4, 0.5, 12).double().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.03)
    for step in range(3000):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 3000)
        h = sequence_logprobs(theta) - REF
        optimizer.zero_grad()
        loss(h[pairs], REWARDS[pairs], BETA).backward()
        optimizer.step()
    return sequence_logprobs(theta).detach()


def tilted(beta):
    """pi_ref exp(R / beta) / Z, the optimal policy for this beta."""
    return (REF + REWARDS / beta).log_softmax(0)


def test_copg_finds_the_optimal_policy_off_policy():
    torch.testing.assert_close(fitted(copg_loss), tilted(BETA), atol=1e-5, rtol=0)


def test_the_two_codings_that_look_right_do_not():
    """Eq. 7-9 with a stop-gradient on R_{beta/2}, and eq. 7-9 with R_beta, differentiated through:
    they end in the optimum for half and for twice the beta."""

    def stop_gradient(h, r, beta):
        half = (r - beta / 2 * h).detach()
        return -((half[:, 0] - half[:, 1]) * (h[:, 0] - h[:, 1])).mean()

    def full_beta(h, r, beta):
        full = r - beta * h
        return -((full[:, 0] - full[:, 1]) * (h[:, 0] - h[:, 1])).mean()

    torch.testing.assert_close(fitted(stop_gradient), tilted(BETA / 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(fitted(full_beta), tilted(2 * BETA), atol=1e-3, rtol=0)
    for wrong in (BETA / 2, 2 * BETA):
        assert (tilted(wrong) - tilted(BETA)).abs().max() > 0.3


# ---- the world ----


def test_posts_are_a_gymnasium_environment():
    check_env(Posts(), skip_render_check=True)
    task = Posts()
    prompt, _ = task.reset(options={"index": 7})
    assert prompt == task.problem(7)[0] == Posts().problem(7)[0]
    assert prompt.endswith("summary :")


def test_utility_by_hand():
    answer = "my boss lost my bike ; in the park ; because of a bet ; should i pay them"
    utility = Posts().reward
    assert utility(answer, answer) == pytest.approx(4.2 - 0.1 * 16)
    assert utility("my boss lost my bike", answer) == pytest.approx(2 - 0.5)
    assert utility("in the park ; in the park", answer) == pytest.approx(0.6 - 0.6)
    assert utility("in the zoo", answer) == pytest.approx(-1 - 0.3)
    assert utility("my boss lost my bike ; thanks for reading", answer) == pytest.approx(0.2)
    assert utility("", answer) == -1


def test_the_posts_of_the_test_are_others():
    events = [{Posts(split).problem(i)[1].split(" ; ")[0] for i in range(300)} for split in
              ("train", "test")]  # fmt: skip
    assert len(events[0]) > 250 and not events[0] & events[1]


def test_the_facts_stand_in_the_post():
    task = Posts("test")
    for i in range(100):
        post, answer = task.problem(i)
        event, place, cause, ask = answer.split(" ; ")
        for fact in (f"{event} .", f"it happened {place} .", f"it was {cause} .", f"{ask} ?"):
            assert fact in post
        assert len(set(answer.split(" ; "))) == 4


def test_writers_are_of_mixed_quality():
    task = Posts()
    utilities = [task.reward(task.write(i, w), task.problem(i)[1]) for i in range(500)
                 for w in (1, 2)]  # fmt: skip
    utilities = torch.tensor(utilities)
    assert -0.5 < utilities.mean() < 1 and utilities.std() > 1.5 and utilities.max() > 2.5
    assert task.write(3, 1) == task.write(3, 1) != task.write(3, 2)
    assert task.demonstration(3) == task.write(3, 0)


def test_preferences_follow_bradley_terry():
    """The preferred summary is the better one as often as the utilities say."""
    task, expected, seen = Posts(), [], []
    for i in range(1500):
        prompt, pair = task.preference(i)
        answer = task.problem(i)[1]
        assert prompt == task.problem(i)[0]
        assert sorted(pair) == sorted([task.write(i, 1), task.write(i, 2)])
        margin = task.reward(pair[0], answer) - task.reward(pair[1], answer)
        expected.append(1 / (1 + math.exp(-abs(margin))))
        seen.append(float(margin > 0) + 0.5 * (margin == 0))
    assert sum(seen) / 1500 == pytest.approx(sum(expected) / 1500, abs=0.03)


def test_every_word_of_the_world_is_one_token():
    tokenizer = copg.word_tokenizer()
    task = Posts()
    for i in range(200):
        text = task.problem(i)[0] + " " + " ; ".join(task.preference(i)[1])
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert 150 < len(tokenizer) < 400


# ---- the small models: made with two steps each, which is enough to see how they are used ----


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """copg with supervised and reward models that take a second to make."""
    patch = pytest.MonkeyPatch()
    patch.setattr(copg, "SFT", {"steps": 30, "posts_per_step": 16, "lr": 3e-3})
    patch.setattr(copg, "REWARD_MODEL", copg.REWARD_MODEL | {"pairs": 64, "epochs": 1})
    patch.setattr(common, "TINY", common.TINY | {"hidden_size": 64, "intermediate_size": 128})
    patch.setattr(common, "WARM_START", common.WARM_START | {"steps": 2})
    yield copg
    patch.undo()


def flags(out, *more):
    small = ["--out", out, "--pairs", 24, "--prompts", 8, "--epochs", 1, "--eval-problems", 6,
             "--eval-every", 2, "--save-every", 1, "--max-new-tokens", 12, *more]  # fmt: skip
    return [str(flag) for flag in small]


def rows_of(run):
    return numbers(metrics(run))


def train(*argv):
    run = copg.train(copg.parse_args(flags(*argv)))
    return run, rows_of(run)


def test_the_default_goes_through(quick, tmp_path, capsys):
    run, rows = train(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["eval_kl"] == pytest.approx(0, abs=1e-4)  # the policy is the reference
    assert {"eval_reward", "eval_utility", "eval_kl", "eval_length"} <= set(rows[2])
    assert rows[1]["loss"] > 0 and rows[1]["grad_norm"] > 0
    out = capsys.readouterr().out
    for part in ("reward model: agrees with", "prompt", "completion", "utility", "before", "after"):
        assert part in out
    samples = [json.loads(x) for x in (run.dir / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0] * 6 + [2] * 6 + [3] * 6
    task = Posts("test")
    for i, sample in enumerate(samples[:6]):
        prompt, answer = task.problem(common.HELD_OUT + i)
        utility = task.reward(sample["completion"], answer)
        assert sample["prompt"] == prompt
        assert sample["utility"] == pytest.approx(utility, abs=1e-3)


def test_the_first_loss_is_that_of_the_rewards(quick, tmp_path):
    """Before the first step h = 0: the loss is the mean of dR^2 / (2 beta), 1/4, or ln 2."""
    run, rows = train(tmp_path / "a", "--beta", 0.5, "--prompts", 24)
    data = copg.Data.load(run.dir / "data.pt")
    assert data.rewards.shape == data.ref_logprobs.shape == (24, 2)
    dR = data.rewards[:, 0] - data.rewards[:, 1]
    assert rows[1]["loss"] == pytest.approx((dR**2).mean().item(), rel=1e-4)
    assert train(tmp_path / "b", "--loss", "ipo")[1][1]["loss"] == pytest.approx(0.25, rel=1e-3)
    _, rows = train(tmp_path / "c", "--loss", "dpo")
    assert rows[1]["loss"] == pytest.approx(math.log(2), rel=1e-3)


@pytest.mark.parametrize("loss", ["copg", "ipo", "dpo"])
def test_micro_batch_size_changes_no_step(quick, tmp_path, loss):
    seen = []
    for tokens in (1, 300, 10**6):
        more = ["--micro-batch-tokens", tokens, "--lr", 1e-3, "--loss", loss]
        _, rows = train(tmp_path / str(tokens), *more)
        seen.append([(row["loss"], row["grad_norm"]) for row in rows[1:]])
    for a, b, c in zip(*seen, strict=True):
        assert a == pytest.approx(b, rel=1e-3) and a == pytest.approx(c, rel=1e-3)


def test_micro_batches_keep_prompts_together():
    rollout = common.Rollout(
        torch.ones(12, 3), torch.ones(12, 3), torch.ones(12, 9),
        torch.arange(9)[None] < torch.randint(1, 9, (12, 1)), torch.zeros(12, 9), [""] * 12,
    )  # fmt: skip
    for max_tokens in (1, 40, 80, 10**4):
        batches = common.micro_batches(rollout, max_tokens, together=3)
        assert sorted(torch.cat(batches).tolist()) == list(range(12))
        for batch in batches:
            groups = (batch[::3] // 3).tolist()
            assert batch.tolist() == [3 * group + k for group in groups for k in range(3)]
            longest = 3 + int(rollout.completion_mask[batch].sum(1).max())
            assert len(batch) == 3 or len(batch) * longest <= max_tokens


def test_records_shuffle_every_epoch():
    n = 10
    numbers = [i for step in range(5) for i in copg.records(step * 4, 4, n, seed=1)]
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != numbers[10:]
    assert numbers[:4] != copg.records(0, 4, n, seed=2)


def test_log_ratios_count_completion_tokens_only(small):
    """ln pi of a completion by brute force: the whole text's log-prob less the prompt's."""
    model, tokenizer = small
    data = copg.Data(["12+5=", "a longer prompt: "], [["17", "3"], ["no", "yes!"]])
    args = copg.parse_args(["--model", "x"])
    ours = copg.reference_logprobs(model, tokenizer, data, args)
    for i, prompt in enumerate(data.prompts):
        for k, completion in enumerate(data.completions[i]):
            start, end = tokenizer(prompt).input_ids, tokenizer(completion).input_ids
            ids = torch.tensor([start + end + [tokenizer.eos_token_id]])
            with torch.no_grad():
                logprobs = model(ids).logits.log_softmax(-1)[0]
            total = sum(logprobs[t - 1, ids[0, t]] for t in range(len(start), ids.shape[1]))
            assert ours[i, k].item() == pytest.approx(total.item(), abs=1e-4)


# ---- the reward model ----


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    path = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = LlamaConfig(**sizes, pad_token_id=257, eos_token_id=256, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(path)
    common.tiny_tokenizer().save_pretrained(path)
    return path


def test_scores_do_not_depend_on_the_others_in_the_batch(classifier):
    model, tokenizer = copg.load_reward_model(str(classifier), "cpu")
    prompts = ["a", "a longer prompt, much longer", "b"]
    completions = ["yes, it is so", "no", ""]
    together = copg.frozen_scores(model, tokenizer, prompts, completions)
    alone = [
        copg.frozen_scores(model, tokenizer, prompts[i : i + 1], completions[i : i + 1])
        for i in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        copg.frozen_scores(model, tokenizer, prompts, completions, rows=2), together
    )
    assert together.std() > 1e-2
    other = copg.frozen_scores(model, tokenizer, prompts, ["yes, it is no", "no", ""])
    assert (other - together)[0].abs() > 1e-4  # the last token is read


def test_scores_use_the_chat_template(classifier):
    model, tokenizer = copg.load_reward_model(str(classifier), "cpu")
    plain = copg.score(model, tokenizer, ["<u>hi<a>"], ["yes"])
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<|endoftext|>"
    )
    torch.testing.assert_close(copg.score(model, tokenizer, ["hi"], ["yes"]), plain)


def test_the_reward_model_learns(quick):
    """A hundred steps of Bradley-Terry on 64 preferences: it knows most of them by heart."""
    model, tokenizer = copg.load_reward_model(copg.supervised_model(), "cpu")
    task = Posts()

    def batch_loss(i):
        return bradley_terry_loss(*copg.preference_scores(model, tokenizer, task, range(64)))

    common.fit(model, batch_loss, 60, 3e-3, "test")
    chosen, rejected = copg.preference_scores(model, tokenizer, task, range(64))
    assert (chosen > rejected).double().mean() > 0.85


# ---- other sources of prompts, completions and rewards ----


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def scored(n, K=2):
    return [
        {"prompt": f"{i}+{i}=", "completions": [f"{i + k}" for k in range(K)],
         "rewards": [float(k) for k in range(K)]} for i in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize("K", [2, 3])
def test_scored_completions_from_a_file(tmp_path, model_dirs, K):
    path = write(tmp_path / "data.jsonl", *scored(30, K))
    more = ["--model", model_dirs["qwen2"], "--data", path, "--epochs", 6, "--lr", 5e-3]
    run, rows = train(tmp_path / "run", *more)
    data = copg.Data.load(run.dir / "data.pt")
    held_out = {f"{i}+{i}=" for i in range(0, 30, 10)}
    assert len(data.prompts) == 27 and not held_out & set(data.prompts)
    assert data.rewards.tolist() == [[float(k) for k in range(K)]] * 27
    assert rows[-1]["loss"] < 0.6 * rows[1]["loss"] and rows[-1]["ranked"] > 0.8
    assert "eval_reward" not in rows[-1] and rows[-1]["eval_kl"] > 0


def test_preferences_from_a_file_are_ipo(tmp_path, model_dirs):
    records = [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(20)]
    path = write(tmp_path / "data.jsonl", *records)
    more = ["--model", model_dirs["qwen2"], "--data", path, "--beta", 0.2]
    _, copg_rows = train(tmp_path / "copg", *more)
    _, ipo_rows = train(tmp_path / "ipo", *more, "--loss", "ipo")
    assert copg_rows[1]["loss"] == pytest.approx(ipo_rows[1]["loss"] / 0.4, rel=1e-4)
    assert copg_rows[1]["loss"] == pytest.approx(0.25 / 0.4, rel=1e-3)


def test_a_reward_model_scores_the_file_anew(tmp_path, model_dirs, classifier):
    path = write(tmp_path / "data.jsonl", *scored(12))
    more = ["--model", model_dirs["qwen2"], "--data", path, "--reward-model", classifier]
    run, rows = train(tmp_path / "run", *more)
    data = copg.Data.load(run.dir / "data.pt")
    expected = copg.frozen_scores(
        *copg.load_reward_model(str(classifier), "cpu"), *data.rows(range(len(data.prompts)))
    )
    torch.testing.assert_close(data.rewards.flatten(), expected, atol=1e-5, rtol=0)
    assert "eval_reward" in rows[-1] and "eval_utility" not in rows[-1]


@pytest.mark.parametrize(
    "lines, message",
    [
        ('{"prompt": "a"', "line 1: not a JSON object"),
        ("[1]", "line 1: not a JSON object"),
        ("", "no records"),
        ('{"completions": ["a", "b"]}', "line 1: needs a text under 'prompt'"),
        ('{"prompt": " ", "completions": ["a", "b"]}', "line 1: needs a text under 'prompt'"),
        ('{"prompt": "a"}', "two completions"),
        ('{"prompt": "a", "completions": ["b"]}', "two completions"),
        ('{"prompt": "a", "completions": ["b", ""]}', "line 1: a completion is empty"),
        ('{"prompt": "a", "completions": ["b", 3]}', "line 1: a completion is empty, or no text"),
        ('{"prompt": "a", "chosen": "b"}', "line 1: a completion is empty, or no text"),
        ('{"prompt": "a", "completions": ["b", "c"], "rewards": [1]}', "finite number"),
        ('{"prompt": "a", "completions": ["b", "c"], "rewards": [1, NaN]}', "finite number"),
        ('{"prompt": "a", "completions": ["b", "c"], "rewards": [1, true]}', "finite number"),
        ('{"prompt": "a", "completions": ["b", "c"], "rewards": 7}', "finite number"),
        ('{"prompt": "a", "completions": ["b", "c"]}', "no rewards in it"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
            '{"prompt": "a", "completions": ["b", "c", "d"], "rewards": [1, 2, 3]}',
            "line 2: 3 completions; those before have 2",
        ),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
            '{"prompt": "a", "completions": ["b", "c"]}',
            "only 1 of 2 records have rewards",
        ),
    ],
)
def test_bad_files(tmp_path, lines, message):
    path = tmp_path / "data.jsonl"
    path.write_text(lines + "\n")
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", "--model", "nowhere", "--data", path)
    assert not (tmp_path / "run").exists()


def test_too_long_a_completion_is_named(tmp_path, model_dirs):
    records = scored(5)
    records[3]["completions"][1] = "x" * 300
    path = write(tmp_path / "data.jsonl", *records)
    with pytest.raises(UserError, match=r"data.jsonl, line 4: the prompt .* context of 256"):
        train(tmp_path / "run", "--model", model_dirs["qwen2"], "--data", path)
    assert not (tmp_path / "run").exists()


def test_too_long_a_completion_without_a_file_is_numbered(small):
    model, tokenizer = small
    data = copg.Data(["a", "b"], [["c", "d"], ["e", "x" * 300]])
    with pytest.raises(UserError, match="record 1: the prompt 'b'"):
        copg.reference_logprobs(model, tokenizer, data, copg.parse_args(["--model", "x"]))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--completions", "1"], "another one to compare"),
        (["--online", "--data", "x.jsonl"], "leave out --data"),
        (["--make-data", "y.jsonl", "--data", "x.jsonl"], "leave out --data"),
        (["--sweep", "--beta", "0.1"], "leave them out"),
        (["--sweep", "--loss", "copg"], "leave them out"),
        (["--loss", "ppo"], "invalid choice"),
        (["--beta", "0"], "above 0"),
        (["--task", "nothing"], "--task nothing"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--model", "nowhere", "--task", "add"], "nowhere: no causal"),
        (["--task", "add", "--reward-model", "nowhere"], "--reward-model nowhere: no sequence"),
        (["--make-data", "tests/conftest.py"], "there is such a file"),
    ],
)
def test_bad_flags(quick, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(common.Path(copg.__file__).parent)
    with pytest.raises(UserError, match=message):
        args = copg.parse_args(flags(tmp_path / "run", *argv))
        (copg.make_data if args.make_data else copg.train)(args)
    assert not (tmp_path / "run").exists()


def test_default_betas():
    """The paper's for real models, what the sweep found for the tiny one."""

    def beta(*argv):
        return copg.parse_args(list(argv)).beta

    assert [beta("--model", "x", "--loss", loss) for loss in copg.BETA] == [0.06, 0.01, 0.1]
    assert beta() == beta("--loss", "copg") == 0.3 and beta("--loss", "ipo") == 0.06
    assert beta("--loss", "dpo") == 1.0 and beta("--loss", "dpo", "--beta", "0.5") == 0.5


def test_any_task_offline(quick, tmp_path):
    """--task add: the reference writes the completions, the environment judges them."""
    run, rows = train(tmp_path / "run", "--task", "add", "--completions", 3)
    data = copg.Data.load(run.dir / "data.pt")
    assert len(data.prompts) == 24 and data.rewards.shape == (24, 3)
    task = common.make_task("add")
    for i in range(24):
        prompt, answer = task.unwrapped.problem(i)
        assert data.prompts[i] == prompt
        rewards = [float(common.is_correct(text, answer)) for text in data.completions[i]]
        assert data.rewards[i].tolist() == rewards
    assert "eval_reward" in rows[-1] and "eval_utility" not in rows[-1]


def test_make_data_and_train_on_it(quick, tmp_path, model_dirs, capsys):
    path, model = tmp_path / "made.jsonl", model_dirs["qwen2"]
    argv = ["--model", model, "--task", "add", "--completions", 3, "--make-data", path]
    copg.make_data(copg.parse_args(flags(tmp_path / "run", *argv)))
    assert "prompts" in capsys.readouterr().out
    data = copg.read_data(path)
    assert 12 < len(data.prompts) <= 24 and data.rewards.shape[1] == 3
    assert all(text.strip() for texts in data.completions for text in texts)
    run, rows = train(tmp_path / "run", "--model", model, "--data", path, "--task", "add")
    assert "eval_reward" in rows[-1]  # the task judges what the policy samples
    held_out = math.ceil(len(data.prompts) / 10)
    assert run.state["step"] == math.ceil((len(data.prompts) - held_out) / 8)


def test_online_is_rloo(quick, tmp_path, monkeypatch):
    """The gradient of an online step is RLOO's on the regularised reward, and h is that of now."""
    gradients = []
    clip = torch.nn.utils.clip_grad_norm_

    def look(parameters, norm):
        parameters = list(parameters)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return clip(parameters, norm)

    def rloo(loss, logratios, rewards, beta):
        R_beta = (rewards - beta * logratios).detach()
        baseline = (R_beta.sum(1, keepdim=True) - R_beta) / 2
        return -((R_beta - baseline) * logratios).sum(1).mean()

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
    more = ["--online", "--completions", 3, "--steps", 2, "--beta", 0.4, "--overwrite"]
    _, rows = train(tmp_path / "run", *more)
    monkeypatch.setattr(copg, "policy_loss", rloo)
    train(tmp_path / "run", *more)
    first, second = gradients[-4:-2], gradients[-2:]
    for a, b in zip(first, second, strict=True):
        assert a.norm() > 1e-3
        torch.testing.assert_close(a, b, atol=1e-4 * a.norm().item(), rtol=0)
    assert rows[1]["reward_std"] > 0 and rows[1]["completion_length"] > 0
    assert not (tmp_path / "run" / "data.pt").exists()


def test_resume(quick, tmp_path):
    """Two steps and four more are six: same data, same order, same reference."""
    more = ["--steps", 6, "--lr", 1e-3, "--warmup", 0]
    _, whole = train(tmp_path / "whole", *more)
    train(tmp_path / "halves", *more[2:], "--steps", 2)
    run = copg.train(copg.parse_args(["--resume", str(tmp_path / "halves"), "--steps", "6"]))
    for a, b in zip(whole, rows_of(run), strict=True):
        for name in {"step", "loss", "grad_norm", "ranked", "lr"}:
            assert a.get(name) == b.get(name)
    assert whole[-1] | {"seconds": 0} == rows_of(run)[-1] | {"seconds": 0}


def test_sweep(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(copg, "GRID", {"copg": [0.1, 1.0], "ipo": [0.1], "dpo": [0.3]})
    monkeypatch.setattr(copg, "SEEDS", 2)
    args = copg.parse_args(flags(tmp_path / "sweep", "--sweep", "--steps", 2, "--lr", 1e-3))
    copg.sweep(args)
    out = capsys.readouterr().out
    assert (tmp_path / "sweep" / "sweep.png").exists()
    lines = (tmp_path / "sweep" / "sweep.csv").read_text().splitlines()
    assert lines[0].startswith("loss,beta,seed,step,eval_reward") and len(lines) == 1 + 7 * 2
    table = out.split("means at the end\n")[1].splitlines()
    assert [line.split()[:3] for line in table[2:4]] == [["ipo", "0.1", "2"], ["dpo", "0.3", "2"]]
    copg.sweep(args)
    assert "seed 0" not in capsys.readouterr().out  # finished runs are not run again
    metrics = tmp_path / "sweep" / "ipo-0.1-0" / "metrics.csv"
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:-1]) + "\n")
    copg.sweep(args)
    assert "ipo, beta 0.1, seed 0" in capsys.readouterr().out  # an unfinished one is
    run = copg.parse_args(["--resume", str(tmp_path / "sweep" / "ipo-0.1-0"), "--steps", "9"])
    assert not run.sweep and run.loss == "ipo"


def test_a_used_directory_and_a_damaged_one(quick, tmp_path):
    train(tmp_path / "run", "--steps", 1)
    with pytest.raises(UserError, match="holds a run already"):
        train(tmp_path / "run")
    (tmp_path / "run" / "data.pt").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is damaged or gone"):
        copg.train(copg.parse_args(["--resume", str(tmp_path / "run"), "--steps", "2"]))


class Letters(ManyAs):
    """The reward is the share of letters among three characters: a dense signal."""

    def reward(self, completion, answer):
        return sum(c in "abcdefghijklmnopqrstuvwxyz" for c in completion) / 3


@pytest.mark.parametrize("where", [[], ["--online"]])
def test_training_raises_the_reward(tmp_path, monkeypatch, model_dirs, where):
    """Offline, on completions of the reference alone, and online."""
    monkeypatch.setattr(common, "make_task", lambda name, split="train", data=None: Letters())
    more = ["--model", model_dirs["qwen2"], "--task", "x", "--lr", 5e-3, "--beta", 0.02, *where]
    more += ["--pairs", 512, "--prompts", 32, "--completions", 4, "--steps", 40]
    more += ["--eval-problems", 200, "--eval-every", 40, "--max-new-tokens", 3]
    _, rows = train(tmp_path / "run", *more)
    assert rows[0]["eval_reward"] < 0.15 and rows[-1]["eval_reward"] > 2 * rows[0]["eval_reward"]
