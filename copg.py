"""CoPG, Contrastive Policy Gradient (Flet-Berliac et al. 2024, arXiv 2406.19185v1).

Learn offline from pairs of completions from any source, with any reward, without importance weights
and without a critic. The loss compares two completions of a prompt: their log-probabilities under
the policy should differ as their rewards do.

    R_b(y)   = R(y) - b h(y),  h(y) = ln(pi(y | x) / pi_ref(y | x)), whole completions     eq. 1
    J(pi)    = E_pi[R_beta] = E_pi[R] - beta KL(pi || pi_ref), to maximise                  eq. 2
    l        = (R_{beta/2}(y) - R_{beta/2}(y')) h(y)
             + (R_{beta/2}(y') - R_{beta/2}(y)) h(y'), to maximise                          eq. 7-9
             = [dR^2 - (dR - beta dh)^2] / (2 beta),  d: difference of y and y'
    loss     = mean of (dR - beta dh)^2 / (2 beta), to minimise                          eq. 10, 17
    gradient = -(R_beta(y) - R_beta(y')) (grad ln pi(y) - grad ln pi(y'))                 eq. 18-19

At the minimum pi = pi_ref exp(R / beta) / Z (theorem 1, eq. 29), whatever the sampling
distributions, provided both cover every y and the policy class is unrestricted. With both
completions from pi this is policy gradient (property 1), in the form of RLOO (property 2). With
R = 1/4 for the preferred completion and -1/4 for the other it is IPO over 2 beta (property 3).

    python copg.py                   section 6 scaled down, on a CPU: summaries and a learned reward
    python copg.py --task add        any Gymnasium task instead, with its own reward
    python copg.py --model Qwen/Qwen2.5-0.5B --data pairs.jsonl --reward-model DIR_OR_ID
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from common import (
    Rollout,
    completion_logprobs,
    frozen_logprobs,
    load_model,
    mean_and_error,
    micro_batches,
    rollout_metrics,
    rollout_samples,
    sample,
)
from run import (
    Parser,
    Run,
    add_run_flags,
    learning_rate,
    number,
    parse_flags,
    plain_errors,
    positive_float,
    positive_int,
)
from tasks import (
    Posts,
    UserError,
    first_problem,
    get_prompts,
    get_rewards,
    held_out,
    make_task,
    make_tasks,
)
from tasks.pairs import HeldOutPrompts, Record, read_records, write_records
from tasks.posts import PREFERENCES
from tasks.prompts import (
    check_token_ids,
    encode_prompts,
    end_of_answer,
    leave_out_misfits,
    pad,
    stop_token_ids,
    without_misfits,
)
from tasks.reward_model import RewardModel
from tasks.tiny import cached_model, fit, tiny_model

# ---- Arguments -----------------------------------------------------------------------------------

# The paper trains Llama-2-7B (section 6).
TINY = dict(lr=1e-4, prompts=64, max_new_tokens=48, micro_batch_tokens=4096)
REAL = dict(lr=1e-6, prompts=128, max_new_tokens=128, micro_batch_tokens=8192)
BETA = {"copg": 0.06, "ipo": 0.01, "dpo": 0.1}  # the best ones of the paper (section 6.2)
TINY_BETA = {"copg": 0.3, "ipo": 0.06, "dpo": 1.0}  # near the best reward, at the smallest KL


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Raises UserError."""
    parser = Parser("copg.py", description="Contrastive Policy Gradient, IPO and DPO.")

    add = parser.add_argument_group("model, reward and data").add_argument
    add("--model", default="tiny", help="tiny, a Hugging Face directory or id (default: tiny)")
    add("--reward-model", help="classifier with one label, or task: its own reward (default: task)")
    add("--task", help="posts, add, count, gsm8k, file.jsonl, module:Name-v0 (default: posts)")
    add("--data", help="file.jsonl of scored completions or preferences")
    add("--eval-task", help="evaluate on its test problems; files are then used whole")
    add("--system", help="text of a system turn before every prompt")
    add("--no-chat-template", action="store_true", help="feed the raw prompt to the model")
    add("--pairs", type=positive_int, help="prompts to collect data for (default: 6400)")
    add("--completions", type=positive_int, help="G sampled for each of them (default: 2)")

    add = parser.add_argument_group("Contrastive Policy Gradient").add_argument
    add("--loss", choices=BETA, default="copg", help="ipo and dpo use only the ranking")
    add("--beta", type=positive_float, help="default: .06, ipo .01, dpo .1; tiny: .3, .06, 1")
    add("--online", action="store_true", help="sample from the current policy instead: RLOO")

    add = parser.add_argument_group("optimisation").add_argument
    add("--prompts", type=positive_int, help="B per step (default: 128, as in the paper; tiny: 64)")
    add("--epochs", type=positive_int, help="passes over the data (default: 2, as in the paper)")
    add("--steps", type=positive_int, help="training steps, instead of --epochs")
    add("--lr", type=positive_float, help="peak learning rate (default: 1e-6; tiny: 1e-4)")
    add("--warmup", type=number(int, 0), help="steps of linear warm-up (default: a tenth)")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="after the warm-up")
    add("--weight-decay", type=number(float, 0), default=0.0, help="default: 0")
    add("--clip-grad", type=positive_float, default=1.0, help="largest gradient norm (default: 1)")
    add("--max-new-tokens", type=positive_int, help="longest completion (default: 128; tiny: 48)")
    add("--micro-batch-tokens", type=positive_int, help="tokens per forward pass, padding included")
    add("--grad-checkpointing", action="store_true", help="less memory, more time")

    add_run_flags(parser, eval_samples=1)
    return parse_flags(parser, argv, defaults)


def defaults(args: argparse.Namespace) -> dict:
    """The defaults that depend on other flags. Raises UserError for flags that have no effect."""
    task = args.task or (None if args.data else "posts")
    offline = args.data or (task == "posts" and not args.online)  # nothing is sampled
    if args.data and args.online:
        raise UserError("--online samples its own completions: leave out --data")
    if args.data and args.model == "tiny" and not task:
        raise UserError("--data with --model tiny needs --task, whose demonstrations it imitates")
    if args.completions and offline:
        raise UserError("--completions has no effect: the completions are given, not sampled")
    if args.completions == 1:
        raise UserError("--completions must be at least 2")
    if args.pairs and (args.data or args.online):
        raise UserError("--pairs has no effect with --data or --online")
    if args.epochs and args.steps:
        raise UserError("--epochs and --steps exclude each other")
    tiny = args.model == "tiny"
    flags = (TINY if tiny else REAL) | {"beta": (TINY_BETA if tiny else BETA)[args.loss]}
    flags["reward_model"] = None if task == "posts" else "task"  # None: one that is learned
    return flags | {"task": task, "pairs": 6400, "completions": 2, "epochs": 2}


# ---- The equations -------------------------------------------------------------------------------


def copg_loss(logratios: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """h [B, G], R [B, G] -> the scalar to minimise (eq. 7-10 and 17, as a square).

    G = 2 is the paper's. For G > 2: average over prompts, sum over pairs, divide by G - 1
    (Command A, arXiv 2504.00698). The gradient is RLOO's, with the mean of the others as baseline.
    """
    G = rewards.shape[1]
    R_beta = rewards - beta * logratios  # [B, G]
    i, j = torch.triu_indices(G, G, 1)  # all pairs i < j
    pairs = (R_beta[:, i] - R_beta[:, j]) ** 2 / (2 * beta)  # [B, G (G - 1) / 2]
    return pairs.sum(1).mean() / (G - 1)


def ipo_loss(h_chosen: Tensor, h_rejected: Tensor, beta: float) -> Tensor:
    """h [B], h [B] -> scalar. Azar et al. 2023 (arXiv 2310.12036), as in the paper's eq. 21-22."""
    return ((0.5 - beta * (h_chosen - h_rejected)) ** 2).mean()


def dpo_loss(h_chosen: Tensor, h_rejected: Tensor, beta: float) -> Tensor:
    """h [B], h [B] -> scalar. Rafailov et al. 2023 (arXiv 2305.18290), eq. 7."""
    return -logsigmoid(beta * (h_chosen - h_rejected)).mean()


def bradley_terry_loss(score_chosen: Tensor, score_rejected: Tensor) -> Tensor:
    """Scores [B], [B] of a reward model -> scalar: -ln P(chosen is preferred) (eq. 26)."""
    return -logsigmoid(score_chosen - score_rejected).mean()


def policy_loss(loss: str, logratios: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """h [B, G], R [B, G] -> scalar. IPO and DPO see the best and the worst of the G, not how much
    better it is. Equal rewards teach them nothing: the best is the worst, and h cancels."""
    if loss == "copg":
        return copg_loss(logratios, rewards, beta)
    h_best = logratios.gather(1, rewards.argmax(1, keepdim=True))[:, 0]  # [B]
    h_worst = logratios.gather(1, rewards.argmin(1, keepdim=True))[:, 0]  # [B]
    return {"ipo": ipo_loss, "dpo": dpo_loss}[loss](h_best, h_worst, beta)


# ---- Training ------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> Run:
    run = Run(args)
    given = None if args.online else run.dir / "data.jsonl" if run.resumed else args.data
    records = read_records(given) if given else []
    task, test_task = None, HeldOutPrompts(records)
    if args.task:
        task, test_task = make_tasks(args.task, args.eval_task)
    elif args.eval_task:
        test_task = make_task(args.eval_task, "test", whole=True)
    model, tokenizer = load_model(
        run.weights or args.model,
        args.device,
        task,
        chat_template=not args.no_chat_template,
        system=args.system,
        grad_checkpointing=args.grad_checkpointing,
    )
    ref_model = load_model(args.model, args.device, task)[0].requires_grad_(False)
    reward_model = None  # the task itself
    if args.reward_model != "task":
        reward_model = RewardModel(args.reward_model or learned_reward_model(), args.device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    torch.manual_seed(args.seed)
    tasks = [test_task] if task is None else [task, test_task]
    leave_out_misfits(model, tokenizer, args.max_new_tokens, *tasks)
    if not args.online and not run.resumed:  # rewards and reference are computed once and kept
        records = records or collect_records(model, tokenizer, task, args)
        records = score_records(records, ref_model, tokenizer, reward_model, args)
        write_records(run.dir / "data.jsonl", records)
    data = [record for record in records if args.eval_task or not record.held_out]
    data = data or records
    n = args.pairs if args.online else len(data)
    args.steps = args.steps or math.ceil(args.epochs * n / args.prompts)
    args.warmup = math.ceil(args.steps / 10) if args.warmup is None else args.warmup
    run.begin(model, tokenizer, optimizer)
    if not run.resumed:
        run.log(0, *evaluate(model, ref_model, tokenizer, reward_model, test_task, args))
        run.save()

    B, G = args.prompts, args.completions if args.online else len(data[0].completions)
    for step in run.steps(args.steps):
        # 1. The batch: B prompts with G completions each, from the data or from the policy.
        metrics, samples = {}, []
        if args.online:
            problems = run.next_problems(B)
            prompts = get_prompts(task, problems)
            batch = sample(model, tokenizer, prompts, G, args.max_new_tokens)  # B * G rows
            rewards = judge(reward_model, task, problems, prompts, batch.texts)  # [B, G]
            ref_logprobs = frozen_logprobs(ref_model, batch, args.micro_batch_tokens)
            ref_logprobs = ref_logprobs.sum(1).view(B, G)
            metrics = rollout_metrics(batch, rewards)
            scores = {"group": batch.group, "reward": rewards}
            samples = rollout_samples(prompts, batch, scores, 3 * G)
        else:
            chosen = [data[i] for i in shuffled_passes((step - 1) * B, B, n, args.seed)]
            batch = encode(model, tokenizer, chosen)  # B * G rows
            rewards = torch.tensor([record.rewards for record in chosen])  # [B, G]
            ref_logprobs = torch.tensor([record.ref_logprobs for record in chosen])  # [B, G]
        rewards, ref_logprobs = rewards.to(model.device), ref_logprobs.to(model.device)

        # 2. One gradient step. The completions of a prompt stay in one micro-batch.
        loss, agreement = 0.0, 0
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        for rows in micro_batches(batch, args.micro_batch_tokens, block=G):
            mb, index = batch.select(rows), rows[::G] // G  # b * G rows, of the prompts [b]
            logprobs = completion_logprobs(model, mb)  # [b * G, T]
            logratios = logprobs.sum(1).view(-1, G) - ref_logprobs[index]  # h [b, G]
            mb_loss = policy_loss(args.loss, logratios, rewards[index], args.beta)
            mb_loss = mb_loss * len(index) / B
            mb_loss.backward()
            loss += mb_loss.item()
            preferred = rewards[index].gather(1, logratios.argmax(1, keepdim=True))[:, 0]  # [b]
            agreement += (preferred == rewards[index].amax(1)).sum().item()
        grad_norm = clip_grad_norm_(model.parameters(), args.clip_grad, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()

        # 3. Log, evaluate, save.
        metrics |= {"loss": loss, "grad_norm": float(grad_norm), "lr": lr}
        metrics["top1_agreement"] = agreement / B
        run.log(step, metrics, samples)
        if step % args.eval_every == 0 or step == args.steps:
            run.log(step, *evaluate(model, ref_model, tokenizer, reward_model, test_task, args))
        if step % args.save_every == 0 or step == args.steps or run.stopping:
            run.save()
    run.finish()
    return run


def shuffled_passes(first: int, count: int, n: int, seed: int) -> list[int]:
    """`count` record numbers from place `first` of an endless sequence of passes over n records,
    each in a new random order."""
    passes = range(first // n, (first + count - 1) // n + 1)
    order = [i for k in passes for i in random.Random(f"{seed} {k}").sample(range(n), n)]
    return order[first % n : first % n + count]


def encode(model, tokenizer, records: list[Record]) -> Rollout:
    """Given completions as a Rollout, with log-probs of 0. Raises UserError if one does not fit."""
    texts = [text for record in records for text in record.completions]
    ends = [end for record in records for end in record.ends]
    rows = tokenizer(texts, add_special_tokens=False).input_ids
    rows = [[*row, end] if end >= 0 else row for row, end in zip(rows, ends, strict=True)]
    check_token_ids(model, rows, texts, 0)
    ids, mask = pad(rows, "right", model.device)  # [N, T]
    G = len(records[0].completions)
    prompts, longest = [record.prompt for record in records], mask.sum(1).view(-1, G).amax(1)
    prompt_ids, prompt_mask, pictures = encode_prompts(model, tokenizer, prompts, longest.tolist())
    return Rollout(
        prompt_ids=prompt_ids.repeat_interleave(G, 0),
        prompt_mask=prompt_mask.repeat_interleave(G, 0),
        completion_ids=ids,
        completion_mask=mask,
        logprobs=torch.zeros(mask.shape, device=model.device),
        truncated=torch.tensor(ends, device=model.device) < 0,
        texts=texts,
        group=torch.arange(len(records), device=model.device).repeat_interleave(G),
        pictures=[picture for picture in pictures for _ in range(G)],
    )


# ---- Data and evaluation -------------------------------------------------------------------------


def collect_records(model, tokenizer, task, args) -> list[Record]:
    """Both summaries of every preference of the posts; for another task, G completions of each
    prompt, sampled from the initial model. The task scores them."""
    records = []
    if args.task == "posts":
        problems = range(PREFERENCES, PREFERENCES + args.pairs)
        for i in range(args.pairs):
            prompt, texts = task.unwrapped.preference(i)
            records.append(Record(prompt, texts, where=f"preference {i}"))
        texts = [text for record in records for text in record.completions]
        for record, rewards in zip(records, get_rewards(task, problems, texts)[0], strict=True):
            record.rewards = rewards.tolist()
        return records
    G, eos, first = args.completions, end_of_answer(tokenizer), first_problem(args.seed)
    for i in tqdm(range(first, first + args.pairs, 64), desc="sampling data"):
        problems = list(range(i, min(i + 64, first + args.pairs)))
        prompts = get_prompts(task, problems)
        rollout = sample(model, tokenizer, prompts, G, args.max_new_tokens)
        rewards = get_rewards(task, problems, rollout.texts)[0].tolist()  # [b, G]
        last = rollout.completion_mask.sum(1, keepdim=True) - 1  # [N, 1]
        ends = rollout.completion_ids.gather(1, last)[:, 0].masked_fill(rollout.truncated, -1)
        ends[[not text for text in rollout.texts]] = eos  # truncated after special tokens alone
        ends = ends.view(-1, G).tolist()
        for j, prompt in enumerate(prompts):
            texts = rollout.texts[j * G : (j + 1) * G]
            where = f"problem {problems[j]}"
            records.append(Record(prompt, texts, rewards[j], ends[j], where=where))
    truncated = sum(end < 0 for record in records for end in record.ends) / len(records) / G
    print(f"sampled data: {truncated:.3f} of the completions end at --max-new-tokens")
    return records


def score_records(records: list[Record], ref_model, tokenizer, reward_model, args) -> list[Record]:
    """Fill in rewards, ends and ref_logprobs of the records that fit. Raises UserError."""
    eos, stop_ids = end_of_answer(tokenizer), stop_token_ids(ref_model, tokenizer)
    stops = dict(zip(tokenizer.convert_ids_to_tokens(stop_ids), stop_ids, strict=True))
    for record in records:
        if record.ends is None:
            record.ends = [-1 if eos is None else eos] * len(record.completions)
            for i, text in enumerate(record.completions):  # it may be written at the end
                end = next((x for x in stops if text.endswith(x)), None)
                if end:
                    record.completions[i], record.ends[i] = text.removesuffix(end), stops[end]

    def flat(part: list[Record]) -> tuple[list, list[str]]:  # N prompts, N completions
        prompts = [record.prompt for record in part for _ in record.completions]
        return prompts, [text for record in part for text in record.completions]

    def check(part: list[Record]) -> None:
        prompts, texts = flat(part)
        rows = tokenizer(texts, add_special_tokens=False).input_ids
        for row, text in zip(rows, texts, strict=True):
            if any(token in stop_ids for token in row):
                raise UserError(f"{text!r:.60} goes on after a token that ends a completion")
        encode(ref_model, tokenizer, part)
        if reward_model:
            reward_model.encode(prompts, texts)

    records = without_misfits(records, check)
    for i in tqdm(range(0, len(records), 64), desc="scoring the data"):
        part = records[i : i + 64]
        rollout = encode(ref_model, tokenizer, part)
        logprobs = frozen_logprobs(ref_model, rollout, args.micro_batch_tokens).sum(1)  # [N]
        for record, values in zip(part, logprobs.view(len(part), -1).tolist(), strict=True):
            record.ref_logprobs = values
        if reward_model:
            rewards = reward_model.rewards(*flat(part)).view(len(part), -1).tolist()
            for record, values in zip(part, rewards, strict=True):
                record.rewards = values
    if records[0].rewards is None:
        raise UserError(f"{records[0].where}: no rewards in it; --reward-model gives them")
    dead = sum(len(set(record.rewards)) == 1 for record in records) / len(records)
    if dead > 0:
        print(f"the rewards of {dead:.3f} of the prompts are all equal")
    return records


def evaluate(model, ref_model, tokenizer, reward_model, task, args) -> tuple[dict, list[dict]]:
    """Sample completions of held-out prompts -> metrics, and the first eight of them.

    eval_reward is from the reward model if there is one, else from the task. eval_utility is the
    task's own reward, when the policy is trained on a reward model. eval_kl is KL(pi || pi_ref) of
    whole completions in nats, eval_length in tokens. The prompts and the random numbers are the
    same every time.
    """
    parts, samples, k = [], [], args.eval_samples
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        for problems in held_out(task, args.eval_problems, args.eval_first):
            prompts = get_prompts(task, problems)
            rollout = sample(model, tokenizer, prompts, k, args.max_new_tokens)  # b * k rows
            ref = frozen_logprobs(ref_model, rollout, args.micro_batch_tokens)  # [b * k, T]
            part = {}
            if reward_model or not isinstance(task, HeldOutPrompts):
                part["reward"] = judge(reward_model, task, problems, prompts, rollout.texts)
            if reward_model and not isinstance(task, HeldOutPrompts):
                part["utility"] = get_rewards(task, problems, rollout.texts)[0]
            part["kl"] = (rollout.logprobs - ref).sum(1)  # E_pi[ln pi - ln pi_ref]
            part["length"] = rollout.completion_mask.sum(1)
            part = {name: values.double().cpu().view(-1, k) for name, values in part.items()}
            samples += rollout_samples(prompts, rollout, part, 8 - len(samples))
            parts.append(part)
    metrics = {}
    for name in parts[0]:  # the mean over the completions of a prompt, with errors over prompts
        values = torch.cat([part[name] for part in parts]).mean(1)
        metrics |= mean_and_error(f"eval_{name}", values)
    return metrics, samples


def judge(reward_model, task, problems: list[int], prompts: list, texts: list[str]) -> Tensor:
    """Rewards [B, G] of B * G completions, by the reward model or, without one, by the task."""
    if not reward_model:
        return get_rewards(task, problems, texts)[0]
    G = len(texts) // len(prompts)
    return reward_model.rewards([p for p in prompts for _ in range(G)], texts).view(-1, G)


# ---- The learned reward (section 6, eq. 26) ------------------------------------------------------


RECIPE = {"pairs": 6400, "epochs": 2, "pairs_per_step": 32, "lr": 3e-4}


def learned_reward_model() -> str:
    """The directory of the tiny model of the posts, fitted to their preferences (eq. 26)."""
    start = tiny_model(Posts())
    path = cached_model([Path(start).name, RECIPE, "preferences"], lambda to: fit_reward(start, to))
    agree = json.loads((Path(path) / "agreement.json").read_text())
    print(
        f"reward model: agrees with {agree['train']:.3f} of the preferences it was fitted to and "
        f"{agree['test']:.3f} of others (paper: .891, .728)"
    )
    return path


def fit_reward(start: str, directory: Path) -> None:
    """Fit the model `start` to the preferences, and save it in `directory`."""
    reward_model = RewardModel(start, "cpu", new_head=True)
    n, pairs = RECIPE["pairs_per_step"], RECIPE["pairs"]

    def scores(split: str, index) -> tuple[Tensor, Tensor]:  # (chosen, rejected)
        prompts, texts = zip(*map(Posts(split).preference, index), strict=True)
        texts = [chosen for chosen, _ in texts] + [rejected for _, rejected in texts]
        return reward_model.score(list(prompts) * 2, texts).chunk(2)

    def batch_loss(step: int) -> Tensor:
        return bradley_terry_loss(*scores("train", shuffled_passes(step * n, n, pairs, 0)))

    steps = RECIPE["epochs"] * pairs // n
    fit(reward_model.model, batch_loss, steps, RECIPE["lr"], "reward model")
    agreement = {}
    with torch.no_grad():
        for split in ("train", "test"):
            chosen, rejected = scores(split, range(1000))
            agreement[split] = (chosen > rejected).double().mean().item()
    reward_model.model.save_pretrained(directory)
    reward_model.tokenizer.save_pretrained(directory)
    (directory / "agreement.json").write_text(json.dumps(agreement))


if __name__ == "__main__":
    with plain_errors("copg.py"):
        train(parse_args())
