"""CoPG's equations against hand values, brute force, enumeration and RLOO; its loop and data."""

import itertools
import json
import math
from statistics import mean, stdev

import pytest
import torch
from helpers import ManyAs, close, make_model, metrics, run_script, write_around, write_jsonl
from stage import OTHER_FLAGS, Bigrams, Numbered, Row, Stage
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import copg
from copg import bradley_terry_loss, copg_loss, dpo_loss, ipo_loss, policy_loss
from tasks import Posts, UserError, first_problem, get_prompts, tiny
from tasks.pairs import HeldOutPrompts, Record, read_records, write_records
from tasks.posts import PREFERENCES
from tasks.tiny import tiny_tokenizer

# ---- the losses ----


def test_losses_by_hand():
    """CoPG, IPO, DPO and Bradley-Terry on one pair, computed by hand."""
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
    assert bradley_terry_loss(r[0], r[0].flip(0)).item() == pytest.approx(0.8132617, abs=1e-6)


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
    close(loss, brute + constant, 1e-12)
    (gradient,) = torch.autograd.grad(loss, h)
    close(gradient, expected, 1e-12)
    assert expected.norm() > 0.1


def test_ipo_and_dpo_see_best_and_worst():
    """Of K completions they compare the best with the worst; from equal ones they learn nothing."""
    h = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    r = torch.tensor([[0.0, 5.0, -1.0], [9.0, 5.0, 7.0]])
    best, worst = torch.tensor([2.0, 1.0]), torch.tensor([4.0, 2.0])
    for loss, function in (("ipo", ipo_loss), ("dpo", dpo_loss)):
        assert policy_loss(loss, h, r, 0.3) == function(best, worst, 0.3)
        tied = h.clone().requires_grad_()
        policy_loss(loss, tied, torch.ones(2, 3), 0.3).backward()
        assert (tied.grad == 0).all()


# ---- data and batches ----


def test_records_shuffle_every_epoch():
    n = 10
    numbers = [i for step in range(5) for i in copg.shuffled_passes(step * 4, 4, n, seed=1)]
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != numbers[10:]
    assert numbers[:4] != copg.shuffled_passes(0, 4, n, seed=2)


@pytest.mark.parametrize("bos", [False, True])
def test_log_ratios_count_completion_tokens_only(small, bos):
    """ln pi of a completion by brute force: the whole text's log-prob less the prompt's. A prompt
    has the tokenizer's BOS, a completion has none."""
    model, tokenizer = small
    eos, start = tokenizer.eos_token_id, [257] if bos else []
    prompts, texts = ["12+5=", "a longer prompt: "], [["17", "3"], ["no", "yes!"]]
    ids_of = {text: tokenizer(text).input_ids for text in [*prompts, *texts[0], *texts[1]]}
    if bos:
        write_around(tokenizer, "<|pad|> $A")
    ends = [[eos, 7], [-1, eos]]  # another stop token; one that was truncated
    records = [
        Record(p, t, rewards=[1, 0], ends=e) for p, t, e in zip(prompts, texts, ends, strict=True)
    ]
    args = copg.parse_args(["--model", "x"])
    copg.score_records(records, model, tokenizer, None, args)
    for record in records:
        for k, completion in enumerate(record.completions):
            end = [*ids_of[completion], *([record.ends[k]] if record.ends[k] >= 0 else [])]
            ids = torch.tensor([[*start, *ids_of[record.prompt], *end]])
            with torch.no_grad():
                logprobs = model(ids).logits.log_softmax(-1)[0]
            first = ids.shape[1] - len(end)
            total = sum(logprobs[t - 1, ids[0, t]] for t in range(first, ids.shape[1]))
            assert record.ref_logprobs[k] == pytest.approx(total.item(), abs=1e-4)


def test_default_betas():
    """The paper's for real models, what the sweep found for the tiny one."""

    def beta(*argv):
        return copg.parse_args(list(argv)).beta

    assert [beta("--model", "x", "--loss", loss) for loss in copg.BETA] == [0.06, 0.01, 0.1]
    assert beta() == beta("--loss", "copg") == 0.3 and beta("--loss", "ipo") == 0.06
    assert beta("--loss", "dpo") == 1.0 and beta("--loss", "dpo", "--beta", "0.5") == 0.5


# ---- what train hands on ----


@pytest.fixture
def stage(stage, monkeypatch):
    def evaluate(model, ref_model, tokenizer, reward_model, task, args):
        assert (model, ref_model) == tuple(stage.models)
        judged = args.reward_model != "task" or args.task == "posts"
        assert isinstance(reward_model, Judge) == judged
        stage.evaluations.append((model, tokenizer, task.split, args))
        stage.test_task = task
        metrics = {"eval_reward": 0.5, "eval_reward_stderr": 0.1, "eval_kl": 2.0}
        return metrics, [{"prompt": "p", "utility": 3}]

    monkeypatch.setattr(copg, "evaluate", evaluate)
    monkeypatch.setattr(copg, "RewardModel", Judge)
    return stage


def judged(prompt, text):
    return (sum(map(ord, text)) % 50 - sum(map(ord, prompt)) % 9) / 10


class Judge:
    def __init__(self, name, device):
        assert (name, device) == ("rm", "cpu")

    def encode(self, prompts, completions):
        assert len(prompts) == len(completions)

    def rewards(self, prompts, texts):
        return torch.tensor([judged(*pair) for pair in zip(prompts, texts, strict=True)])


def scored(n, K):
    """n records of K completions, all different, with rewards of which some are equal."""
    return [
        {"prompt": f"{i}+{i}=", "completions": [f"{i}{'+1' * k}" for k in range(K)],
         "rewards": (3 * torch.randn(K)).round().tolist()} for i in range(n)
    ]  # fmt: skip


def given(stage, prompt, texts, rewards, ends=None):
    """The rows of a record. Each ends with an EOS, or as it was sampled."""
    encode, rows = stage.tokenizer, []
    for text, reward, end in zip(texts, rewards, ends or [[256]] * len(texts), strict=True):
        ids = [*encode(text).input_ids, *end]
        rows.append(Row(text, encode(prompt).input_ids[-1], ids, None, reward))
    return rows


def loss_by_loops(loss, groups, theta, ref, beta):
    """Eq. 10 and 17, 22, and DPO's, a pair at a time; and the share of groups ranked rightly."""
    total, ranked = 0.0, 0
    for rows in groups:
        h = [row.logprobs(theta).sum() - row.logprobs(ref).sum() for row in rows]
        R, K = [row.reward for row in rows], len(rows)
        best, worst = R.index(max(R)), R.index(min(R))
        d = beta * (h[best] - h[worst])
        if loss == "copg":
            for i, j in itertools.combinations(range(K), 2):
                total += ((R[i] - R[j]) - beta * (h[i] - h[j])) ** 2 / (2 * beta) / (K - 1)
        else:
            total += (0.5 - d) ** 2 if loss == "ipo" else (1 + (-d).exp()).log()
        ranked += R[max(range(K), key=lambda k: h[k].item())] == max(R)
    return total / len(groups), ranked / len(groups)


def check(stage, run, rows, groups_of, rates):
    """groups_of: the rows of the groups of each step."""
    args, ranked = stage.args, []
    ref = stage.models[1].theta
    assert torch.equal(ref, Bigrams(1).theta) and not ref.requires_grad

    def loss_of_a_step(i, theta):
        texts = [row.text for group in groups_of[i] for row in group]
        assert sorted(stage.updates[i]["rows"]) == sorted(texts)
        loss, share = loss_by_loops(args.loss, groups_of[i], theta, ref.double(), args.beta)
        ranked.append(share)
        return loss

    losses, norms = stage.check_updates(loss_of_a_step, rates)
    stage.check_evaluations(rows, ["eval_reward", "eval_reward_stderr", "eval_kl"])
    assert sum(training for _, training, *_ in stage.scored) > len(rates)  # micro-batches
    for i, row in enumerate(rows[1:]):
        expected = {"loss": losses[i], "grad_norm": norms[i], "lr": rates[i]}
        expected |= {"top1_agreement": ranked[i]}
        for column, value in expected.items():
            assert row[column] == pytest.approx(value, rel=1e-4), column


FLAGS = ["--clip-grad", 1e-3, "--weight-decay", 0.03, "--lr", 0.02, "--micro-batch-tokens", 60]
FLAGS += ["--beta", 0.2, "--seed", 4, "--max-new-tokens", 5]


@pytest.mark.parametrize(
    "K, flags",
    [
        (2, []),
        (3, []),
        (3, ["--loss", "ipo", *OTHER_FLAGS]),
        (3, ["--loss", "dpo", "--schedule", "cosine"]),
        (3, ["--reward-model", "rm", "--warmup", 0]),
        (3, ["--reward-model", "rm", "--task", "add"]),
        ("chosen", []),
    ],
)
def test_everything_that_train_hands_on_offline(stage, tmp_path, K, flags):
    records, choices = scored(23, 2 if K == "chosen" else K), K == "chosen"
    if choices:
        for record in records:
            record["chosen"], record["rejected"] = record.pop("completions")
            del record["rewards"]
    path = write_jsonl(tmp_path / "data.jsonl", *records)
    more = ["--prompts", 8, "--epochs", 5, "--data", path, *flags]
    run, rows, samples = stage.train(copg, *FLAGS, *more)
    (policy, ref), args = stage.loads, stage.args
    assert policy[:2] == ("m", args.device) and ref == policy[:3]
    without = "--no-chat-template" in flags
    assert policy[3:] == ((False, "Be brief.", True) if without else (True, None, False))
    held_out = [record["prompt"] for record in records[::10]]
    if args.task:
        assert stage.tasks == [("add", "train"), ("add", "test")] and policy[2].split == "train"
    else:  # the held-out prompts are the test
        assert policy[2] is None and [r.prompt for r in stage.test_task.records] == held_out
        assert get_prompts(stage.test_task, [2, 0]) == [held_out[2], held_out[0]]

    groups = []
    for i, record in enumerate(records):
        completions = [record["chosen"], record["rejected"]] if choices else record["completions"]
        rewards = [0.25, -0.25] if choices else record["rewards"]
        if args.reward_model != "task":
            rewards = [judged(record["prompt"], text) for text in completions]
        if i % 10:
            groups.append(given(stage, record["prompt"], completions, rewards))
    orders = [copg.shuffled_passes(8 * i, 8, 20, seed=4) for i in range(13)]  # ceil(5 * 20 / 8)
    if args.schedule == "cosine":
        rates = [0.01, *(0.01 + 0.01 * math.cos(math.pi * i / 11) for i in range(12))]
    else:  # a tenth of 13 steps, rounded up, to warm up
        rates = [0.02 if "--warmup" in flags else 0.01, *[0.02] * 12]
    check(stage, run, rows, [[groups[i] for i in order] for order in orders], rates)
    assert [sample["step"] for sample in samples] == [0, 2, 4, 6, 8, 10, 12, 13]
    assert not {"reward_mean", "entropy", "tokens_per_second"} & rows[-1].keys()

    # What is kept is what was trained on, and can be trained on again, with the same test.
    kept = read_records(run.dir / "data.jsonl")
    assert [record.prompt for record in kept] == [record["prompt"] for record in records]
    assert [record.held_out for record in kept] == [i % 10 == 0 for i in range(23)]
    kept = [record for record in kept if not record.held_out]
    assert [record.completions for record in kept] == [[r.text for r in g] for g in groups]
    rewards = torch.tensor([record.rewards for record in kept])
    assert rewards.tolist() == torch.tensor([[r.reward for r in g] for g in groups]).tolist()
    ref = [[row.logprobs(stage.models[1].theta).sum() for row in group] for group in groups]
    ref_logprobs = torch.tensor([record.ref_logprobs for record in kept])
    close(ref_logprobs, torch.tensor(ref), 1e-4)
    stage.out = tmp_path / "again"
    again, _, _ = stage.train(copg, *FLAGS, "--data", run.dir / "data.jsonl", "--steps", 1)
    assert (again.dir / "data.jsonl").read_text() == (run.dir / "data.jsonl").read_text()


@pytest.mark.parametrize("K, flags", [(2, []), (3, ["--reward-model", "rm", "--loss", "ipo"])])
def test_everything_that_train_hands_on_online(stage, K, flags):
    more = ["--task", "add", "--online", "--completions", K, "--prompts", 4, "--steps", 11]
    run, rows, samples = stage.train(copg, *FLAGS, *more, *flags)
    stage.check_calls(4, [1] * 11)
    assert {(call["group_size"], call["temperature"]) for call in stage.samples} == {(K, 1.0)}
    for call in stage.samples if flags else []:
        call["groups"] = [
            [row._replace(reward=judged(prompt, row.text)) for row in group]
            for prompt, group in zip(call["prompts"], call["groups"], strict=True)
        ]
    groups = [call["groups"] for call in stage.samples]
    check(stage, run, rows, groups, [0.01, *[0.02] * 10])  # two steps of warm-up
    stage.check_log(run, rows, samples, [1] * 11)
    assert not (run.dir / "data.jsonl").exists()


def test_data_is_collected_from_the_task(stage, capsys):
    """70 prompts in batches of 64, K completions of the first policy, the task's own rewards, and
    the token at the end of each, if it was not cut."""
    more = ["--task", "add", "--completions", 3, "--pairs", 70, "--prompts", 16, "--epochs", 1]
    run, rows, _ = stage.train(copg, *FLAGS, *more)
    calls = stage.samples
    assert [call["prompts"] for call in calls] == [
        [f"train {first_problem(4) + i}" for i in part] for part in (range(64), range(64, 70))
    ]
    for call in calls:
        assert (call["group_size"], call["T"], call["temperature"], call["seed"]) == (3, 5, 1.0, 4)
    groups, kept = [], [record.ends for record in read_records(run.dir / "data.jsonl")]
    for call in calls:
        cut = iter(call["truncated"])
        for prompt, group in zip(call["prompts"], call["groups"], strict=True):
            ends = [[] if next(cut) else row.tokens[-1:] for row in group]
            record = [row.text for row in group], [row.reward for row in group]
            groups.append(given(stage, prompt, *record, ends))
            assert [[end] * (end >= 0) for end in kept[len(groups) - 1]] == ends
    cut = [x for call in calls for x in call["truncated"]]
    said = f"sampled data: {sum(cut) / len(cut):.3f} of the completions end at --max-new-tokens"
    assert 0.2 < sum(cut) / len(cut) < 0.6 and said in capsys.readouterr().out
    orders = [copg.shuffled_passes(16 * i, 16, 70, seed=4) for i in range(5)]
    steps = [[groups[i] for i in order] for order in orders]
    check(stage, run, rows, steps, [0.02] * 5)


def test_a_resumed_run_keeps_its_data_and_reference(stage, tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", *scored(12, 2))
    run, _, _ = stage.train(copg, *FLAGS, "--data", path, "--prompts", 4, "--steps", 3)
    kept = (run.dir / "data.jsonl").read_text()
    write_jsonl(tmp_path / "data.jsonl", *scored(12, 2))  # other rewards
    stage.train(copg, "--resume", run.dir, "--steps", 41)  # it does not warm up again
    assert [row["lr"] for row in metrics(run)[1:]] == [0.02] * 41
    assert [load[0] for load in stage.loads] == [str(run.checkpoint), "m"]
    assert (run.dir / "data.jsonl").read_text() == kept


def test_posts_are_compared_as_preferred(stage, monkeypatch, capsys):
    """The preferred completion comes first; the rewards are the learned reward model's, or, with
    --reward-model task, the hidden utility."""
    monkeypatch.setattr(copg, "make_tasks", lambda name, eval_name: (Posts(), Posts("test")))
    monkeypatch.setattr(copg, "learned_reward_model", lambda: "rm")
    flags = [*FLAGS, "--pairs", 9, "--prompts", 4, "--steps", 1]
    run, _, _ = stage.train(copg, *flags)
    records = read_records(run.dir / "data.jsonl")
    pairs = [(record.prompt, record.completions) for record in records]
    assert pairs == [Posts().preference(i) for i in range(9)]
    rewards = [[judged(prompt, text) for text in texts] for prompt, texts in pairs]
    assert [r.rewards for r in records] == [pytest.approx(row, abs=1e-6) for row in rewards]
    stage.patch.setattr(copg, "evaluate", lambda *args: ({"eval_reward": 0.0}, []))
    stage.out = f"{stage.out}-2"
    run, _, _ = stage.train(copg, *flags, "--reward-model", "task")
    records, posts = read_records(run.dir / "data.jsonl"), Posts()
    for i, (_, texts) in enumerate(pairs):
        answer = posts.problem(PREFERENCES + i)[1]
        utilities = [posts.reward(text, answer) for text in texts]
        assert records[i].rewards == pytest.approx(utilities, abs=1e-6)
    assert mean(r.rewards[0] > r.rewards[1] for r in records) > 0.5  # the preferred one

    real = copg.encode

    def encode(model, tokenizer, records):
        if any(record.prompt == pairs[4][0] for record in records):
            raise UserError("too long")
        return real(model, tokenizer, records)

    monkeypatch.setattr(copg, "encode", encode)
    stage.out = f"{stage.out}-3"
    stage.train(copg, *flags)
    said = "1 of 9 records left out: preferences 4; preference 4: too long"
    assert said in capsys.readouterr().out


# ---- evaluation ----


HELD_OUT = HeldOutPrompts([Record(f"test {i}", [], held_out=True) for i in range(99)])


@pytest.mark.parametrize("judge", [None, Judge("rm", "cpu")])
@pytest.mark.parametrize("task", [Numbered("test"), HELD_OUT])
def test_evaluate(monkeypatch, tmp_path, judge, task):
    stage = Stage(monkeypatch, tmp_path)
    args = copg.parse_args(["--model", "m", "--eval-samples", "2", "--eval-problems", "130"])
    args.eval_first = 30
    args.max_new_tokens = 6
    policy, ref = stage.load_model()[0], stage.load_model()[0]
    state = torch.get_rng_state()
    found, samples = copg.evaluate(policy, ref, stage.tokenizer, judge, task, args)
    assert torch.equal(torch.get_rng_state(), state)
    end = 99 if isinstance(task, HeldOutPrompts) else 160
    batches = [list(range(i, min(i + 64, end))) for i in range(30, end, 64)]
    assert [c["prompts"] for c in stage.samples] == [[f"test {i}" for i in b] for b in batches]
    for call in stage.samples:
        assert (call["group_size"], call["T"], call["temperature"], call["seed"]) == (2, 6, 1.0, 0)
        assert call["model"] is policy

    expected, shown = {"reward": [], "utility": [], "kl": [], "length": []}, []
    for call in stage.samples:
        for prompt, group in zip(call["prompts"], call["groups"], strict=True):
            of_task = [] if end == 99 else [row.reward for row in group]
            values = {
                "reward": [judged(prompt, row.text) for row in group] if judge else of_task,
                "utility": of_task if judge else [],
                "kl": [(row.old.sum() - row.logprobs(ref.theta).sum()).item() for row in group],
                "length": [float(len(row.tokens)) for row in group],
            }
            for name, numbers in values.items():
                expected[name] += [mean(numbers)] if numbers else []
            for k, row in enumerate(group):
                of_row = {name: pytest.approx(x[k], abs=6e-4) for name, x in values.items() if x}
                shown.append({"prompt": prompt, "completion": row.text} | of_row)
                shown[-1]["tokens"] = row.tokens
                shown[-1]["logprobs"] = pytest.approx(row.old.tolist(), abs=6e-4)
    assert len(samples) == len(shown[:8])
    assert all(a | b == a for a, b in zip(samples, shown, strict=False))
    for name, numbers in expected.items():
        if numbers:
            assert found.pop(f"eval_{name}") == pytest.approx(mean(numbers), rel=1e-4)
            error = stdev(numbers) / math.sqrt(end - 30)  # over prompts
            assert found.pop(f"eval_{name}_stderr") == pytest.approx(error, rel=1e-4)
    assert not found
    torch.manual_seed(5)
    again, _ = copg.evaluate(policy, ref, stage.tokenizer, judge, task, args)
    assert again["eval_length"] == pytest.approx(mean(expected["length"]))


# ---- the reward model ----


@pytest.fixture
def classifier(tmp_path):
    """save(**changes) -> the directory of a sequence classifier."""

    def save(kind=AutoModelForSequenceClassification, tokenizer=True, broken=False, **changes):
        model = make_model("llama", kind, **{"pad_token_id": 257, "num_labels": 1} | changes)
        if broken:
            model.model.norm.weight.data[3] = torch.nan
        model.save_pretrained(tmp_path / "classifier")
        if tokenizer:
            tiny_tokenizer().save_pretrained(tmp_path / "classifier")
        return str(tmp_path / "classifier")

    return save


def score_alone(judge, *ids):
    """The score at the last of these tokens."""
    with torch.no_grad():
        hidden = judge.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        return judge.model.score(hidden).item()


def test_scores_are_read_at_the_end_and_do_not_depend_on_the_others(classifier):
    judge = copg.RewardModel(classifier(), "cpu")
    prompts = ["a", "a longer prompt, much longer", "b", *"cdefg" * 20]
    texts = ["yes, it is so", "no", "", *"hijkl" * 20]
    pairs = zip(judge.tokenizer(prompts).input_ids, map(judge.tokenizer, texts), strict=True)
    expected = [score_alone(judge, *prompt, *text.input_ids, 256) for prompt, text in pairs]
    together = judge.rewards(prompts, texts)
    close(together, torch.tensor(expected), 1e-5)
    assert together.std() > 1e-2


@pytest.mark.parametrize("pad", [0, None])
def test_scores_with_another_padding(classifier, pad):
    """Token 0 is as good a padding as any; without one, the EOS is it, and is not read."""
    directory, tokenizer = classifier(), tiny_tokenizer()
    tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
    tokenizer.save_pretrained(directory)
    judge = copg.RewardModel(directory, "cpu")
    prompts, texts = ["a", "a much longer prompt"], ["yes, it is so", "no"]
    together = judge.rewards(prompts, texts)
    for i in range(2):
        ids = judge.tokenizer(prompts[i]).input_ids + judge.tokenizer(texts[i]).input_ids
        alone = score_alone(judge, *ids, *([256] if pad == 0 else []))
        assert together[i].item() == pytest.approx(alone, abs=1e-5)


def test_scores_use_the_chat_template(classifier):
    judge = copg.RewardModel(classifier(), "cpu")
    tokenizer = judge.tokenizer
    plain = judge.score(["<u>hi<a>"], ["yes"])
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}?{% endif %}<|endoftext|>"
    )
    torch.testing.assert_close(judge.score(["hi"], ["yes"]), plain)
    write_around(tokenizer, "<|pad|> $A")  # under a template it would be a second one
    torch.testing.assert_close(judge.score(["hi"], ["yes"]), plain)


def test_scores_read_the_bos_of_a_prompt(classifier):
    """Without a template, a prompt begins with the tokenizer's BOS, and a completion does not."""
    judge = copg.RewardModel(classifier(), "cpu")
    prompt, text = judge.tokenizer(["hi", "yes"]).input_ids
    write_around(judge.tokenizer, "<|pad|> $A")
    alone = score_alone(judge, 257, *prompt, *text, 256)
    judge.model.config.pad_token_id = 255  # the BOS is no padding
    assert judge.rewards(["hi"], ["yes"]).item() == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"kind": AutoModelForCausalLM}, "one label: its score.weight is missing"),
        ({"num_labels": 2}, "one label: its score.weight is missing, or is for another number"),
        ({"tokenizer": False}, "tokenizer"),
        ({"vocab_size": 100, "pad_token_id": None}, "'1' gives token 256 in a vocabulary of 100"),
        ({"max_position_embeddings": 9}, "'0.1.1' has 10 tokens, .* context of 9"),
        ({"broken": True}, "NaN"),
    ],
)
def test_bad_reward_models(classifier, tmp_path, model_dirs, wrong, message):
    path = write_jsonl(tmp_path / "data.jsonl", *scored(12, 3))
    out, rm = tmp_path / "run", classifier(**wrong)
    flags = ["--model", model_dirs["qwen2"], "--data", path, "--reward-model", rm, "--out", out]
    with pytest.raises(UserError, match=message) as error:
        copg.train(copg.parse_args([str(flag) for flag in flags]))
    assert len(str(error.value).splitlines()) == 1 and not list(out.iterdir())


def test_the_learned_reward_model(monkeypatch, capsys):
    """Fitted a little, it agrees with the preferences, and with others, better than chance."""
    little = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    monkeypatch.setattr(tiny, "TINY", tiny.TINY | little)
    monkeypatch.setattr(tiny, "WARM_START", tiny.WARM_START | {"steps": 2})
    monkeypatch.setattr(copg, "RECIPE", copg.RECIPE | {"pairs": 640, "lr": 1e-2})
    path = copg.learned_reward_model()
    out = capsys.readouterr().out
    assert copg.learned_reward_model() == path  # the second time from the cache
    said = [float(word) for word in out.split() if word.startswith("0.")]
    prompts, texts = zip(*map(Posts("test").preference, range(1000)), strict=True)
    judge = copg.RewardModel(path, "cpu")
    chosen, rejected = (judge.rewards(prompts, [text[k] for text in texts]) for k in (0, 1))
    agree = (chosen > rejected).double().mean().item()
    assert agree > 0.6 and said == pytest.approx([0.73, agree], abs=0.02)
    assert said[1] == pytest.approx(agree, abs=0.002)


# ---- files ----


PAIR = {"prompt": "a", "completions": ["b", "c"]}
BAD_FILES = [  # the lines of a file, the error
    ([{"completions": ["b", "c"]}], "line 1: needs a text under 'prompt'"),
    ([{"prompt": "a"}], "line 1: needs two completions"),
    ([PAIR | {"completions": ["b"]}], "line 1: needs two completions"),
    ([PAIR | {"completions": "bc"}], "line 1: needs two completions"),
    ([PAIR | {"completions": ["b", 3]}], "line 1: a completion is neither a text"),
    ([{"prompt": "a", "chosen": "b"}], "line 1: a completion is neither a text"),
    ([PAIR | {"rewards": [1]}], "a number for each completion"),
    ([PAIR | {"rewards": [1, True]}], "a number for each completion"),
    ([PAIR | {"rewards": 7}], "a number for each completion"),
    ([PAIR | {"rewards": [1, math.nan]}], r"at most 1e\+15"),
    ([PAIR | {"rewards": [1, 1e39]}], r"at most 1e\+15"),
    ([PAIR], "no rewards in it"),
    (
        [{"prompt": "a", "chosen": "b", "rejected": "c"}, PAIR | {"rewards": [1, 2]}],
        "line 3: 'chosen' must be in every line or in none",
    ),
    ([PAIR, PAIR | {"completions": [*"bcd"]}], "line 3: needs 2 completions, like the first line"),
    ([PAIR, PAIR | {"rewards": [1, 2]}], "line 3: 'rewards' must be in every line or in none"),
]


@pytest.mark.parametrize("lines, message", BAD_FILES)
def test_bad_files(stage, tmp_path, lines, message):
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=message):
        stage.train(copg, "--data", path)
    assert not list(stage.out.iterdir())


def test_records_are_kept_bit_for_bit(tmp_path):
    """Any text, the empty one too, and any float32."""
    records = [
        Record("a", ["", " b\r\n"], [0.1, -1e-38], [256, -1], [-3.25, -1 / 3]),
        Record('\u2028\n"é', ["\U0001f600", "c"], [1e15, 1 / 3], [7, 256], [0.0, -1e-7], True),
    ]
    write_records(tmp_path / "data.jsonl", records)
    read = read_records(tmp_path / "data.jsonl")
    for a, b in zip(read, records, strict=True):
        assert vars(a) | {"where": ""} == vars(b)


def test_a_single_record_is_trained_on_and_held_out(stage, tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", *scored(1, 2))
    stage.train(copg, *FLAGS, "--data", path, "--prompts", 1, "--steps", 1)
    assert [r.prompt for r in stage.test_task.records] == ["0+0="] and len(stage.updates) == 1


def test_no_prompt_is_trained_on_and_held_out(tmp_path):
    """Two records of each of twelve prompts, the first ones thrice."""
    lines = [{"prompt": f"{i // 2 % 12}", "completions": ["b", "c"]} for i in range(30)]
    records = read_records(write_jsonl(tmp_path / "data.jsonl", *lines))
    held_out = [record.prompt for record in records if record.held_out]
    assert held_out == ["0", "0", "10", "10", "0", "0"]
    assert not {r.prompt for r in records if not r.held_out} & set(held_out)


# ---- with a real model ----


class Letters(ManyAs):
    """The reward is the share of letters among three characters: a dense signal."""

    def reward(self, completion, answer):
        return sum(c in "abcdefghijklmnopqrstuvwxyz" for c in completion) / 3


@pytest.mark.parametrize("where", [["--pairs", 256], ["--online"]])
def test_training_raises_the_reward(tmp_path, monkeypatch, model_dirs, where):
    """Offline, on completions of the reference alone, and online."""
    more = ["--task", "x", "--lr", 1e-2, "--beta", 0.02, "--completions", 4, "--max-new-tokens", 3]
    more += ["--prompts", 16, "--steps", 20, "--eval-problems", 100, "--eval-every", 20, *where]
    run, _ = run_script(copg, tmp_path, monkeypatch, model_dirs["qwen2"], Letters(), *more)
    rows = metrics(run)
    assert rows[0]["eval_kl"] == pytest.approx(0, abs=1e-4)  # the policy is the reference
    assert rows[0]["eval_reward"] < 0.15 and rows[-1]["eval_reward"] > 2 * rows[0]["eval_reward"]
