"""CoPG, Contrastive Policy Gradient (Flet-Berliac et al. 2024, arXiv 2406.19185v1).

Learn offline from pairs of completions that somebody else has written, with any reward, without
importance weights and without a critic. The loss compares two completions of a prompt: their
log-probabilities under the policy should differ as their rewards do.

    R_b(y)   = R(y) - b h(y),  h(y) = ln(pi(y | x) / pi_ref(y | x)), whole completions     eq. 1
    J(pi)    = E_pi[R_beta] = E_pi[R] - beta KL(pi || pi_ref), to maximise                  eq. 2
    l        = (R_{beta/2}(y) - R_{beta/2}(y')) h(y)
             + (R_{beta/2}(y') - R_{beta/2}(y)) h(y'), to maximise                          eq. 7-9
             = [dR^2 - (dR - beta dh)^2] / (2 beta),  d: difference of y and y'
    loss     = mean of (dR - beta dh)^2 / (2 beta), to minimise                          eq. 10, 17
    gradient = -(R_beta(y) - R_beta(y')) (grad ln pi(y) - grad ln pi(y'))                 eq. 18-19

At the minimum pi = pi_ref exp(R / beta) / Z (theorem 1, eq. 29), whoever wrote the pairs, if each y
had a chance in both halves and pi can be anything. With both completions from pi this is policy
gradient (property 1), in the form of RLOO (property 2). With R = 1/4 for the preferred completion
and -1/4 for the other it is IPO over 2 beta (property 3).

    python copg.py                   section 6 scaled down, on a CPU: summaries and a learned reward
    python copg.py --task add        any Gymnasium task instead, with its own reward
    python copg.py --model Qwen/Qwen2.5-0.5B --data pairs.jsonl --reward-model DIR_OR_ID
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

import common
from common import Rollout, UserError, count, number, positive
from tasks import Posts, TextTask
from tasks.jsonl import is_held_out, json_lines, shuffled, with_image
from tasks.pictures import data_uri
from tasks.posts import PREFERENCES
from tasks.tiny import cached_model, fit, tiny_model

# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------

# The paper trains Llama-2-7B (section 6).
TINY = {"lr": 1e-4, "prompts": 64, "max_new_tokens": 48, "micro_batch_tokens": 4096}
TINY |= {"eval_every": 20, "save_every": 10}
REAL = {"lr": 1e-6, "prompts": 128, "max_new_tokens": 128, "micro_batch_tokens": 8192}
REAL |= {"eval_every": 50, "save_every": 50}
BETA = {"copg": 0.06, "ipo": 0.01, "dpo": 0.1}  # the best ones of the paper (section 6.2)
TINY_BETA = {"copg": 0.3, "ipo": 0.06, "dpo": 1.0}  # near the best reward, at the smallest KL


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line as flags. Raises UserError."""
    parser = common.Parser("copg.py", description="Contrastive Policy Gradient, IPO and DPO.")

    add = parser.add_argument_group("model, reward and data").add_argument
    add("--model", default="tiny", help="tiny, a Hugging Face directory or id (default: tiny)")
    add("--reward-model", help="sequence classifier with one label, or task: the task's own reward "
        "(default: task; posts: a learned one)")  # fmt: skip
    add("--task", help="posts, add, count, gsm8k, file.jsonl, module:Name-v0 (default: posts)")
    add("--data", help="file.jsonl of scored completions or preferences")
    add("--no-chat-template", action="store_true", help="give the model the bare prompt")
    add("--pairs", type=count, help="prompts to collect data for (default: 6400)")
    add("--completions", type=count, help="K sampled for each of them (default: 2)")

    add = parser.add_argument_group("Contrastive Policy Gradient").add_argument
    add("--loss", choices=BETA, default="copg", help="IPO and DPO see only which one is better")
    add("--beta", type=positive, help="default: .06, ipo .01, dpo .1, as in the paper's best runs; "
        "tiny: .3, .06, 1")  # fmt: skip
    add("--online", action="store_true", help="sample K per prompt from the current policy: RLOO")

    add = parser.add_argument_group("optimisation").add_argument
    add("--prompts", type=count, help="P per step (default: 128, as in the paper; tiny: 64)")
    add("--epochs", type=count, help="passes over the data (default: 2, as in the paper)")
    add("--steps", type=count, help="instead of --epochs")
    add("--lr", type=positive, help="default: 1e-6, as in the paper; tiny: 1e-4")
    add("--warmup", type=number(int, 0), help="steps of linear warm-up (default: a tenth)")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="after the warm-up")
    add("--weight-decay", type=number(float, 0), default=0.0, help="default: 0")
    add("--clip-grad", type=positive, default=1.0, help="gradient norm (default: 1; not in paper)")
    add("--max-new-tokens", type=count, help="of a sampled completion (default: 128; tiny: 48)")
    add("--micro-batch-tokens", type=count, help="per forward pass (default: 8192; tiny: 4096)")
    add("--grad-checkpointing", action="store_true", help="less memory, more time")

    common.add_run_flags(parser, TINY, REAL, eval_samples=1)
    return common.parse_flags(parser, argv, defaults)


def defaults(args: argparse.Namespace) -> dict:
    """The defaults that depend on other flags. Raises UserError for flags that would do nothing."""
    task = args.task or (None if args.data else "posts")
    written = args.data or (task == "posts" and not args.online)  # nothing is sampled
    if args.data and args.online:
        raise UserError("--online samples its own completions: leave out --data")
    if args.data and args.model == "tiny" and not task:
        raise UserError("--data with --model tiny needs --task: whose demonstrations to imitate?")
    if args.completions and written:
        raise UserError("--completions does nothing: the completions are given, not sampled")
    if args.completions == 1:
        raise UserError("--completions 1: a completion needs another one to compare with")
    if args.pairs and (args.data or args.online):
        raise UserError("--pairs does nothing with --data or --online")
    if args.epochs and args.steps and not args.resume:
        raise UserError("--epochs and --steps: give one of them")
    tiny = args.model == "tiny"
    flags = (TINY if tiny else REAL) | {"beta": (TINY_BETA if tiny else BETA)[args.loss]}
    flags["reward_model"] = None if task == "posts" else "task"  # None: one that is learned
    return flags | {"task": task, "pairs": 6400, "completions": 2, "epochs": 2}


# --------------------------------------------------------------------------------------------------
# The equations
# --------------------------------------------------------------------------------------------------


def copg_loss(logratios: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """h [P, K], R [P, K] -> the scalar to minimise (eq. 7-10 and 17, as a square).

    K = 2 is the paper's. K > 2 is the mean over prompts of the sum over pairs, divided by K - 1
    (Command A, arXiv 2504.00698): its gradient is RLOO's, with the mean of the others as baseline.
    """
    K = rewards.shape[1]
    R_beta = rewards - beta * logratios  # [P, K]
    i, j = torch.triu_indices(K, K, 1)  # all pairs i < j
    pairs = (R_beta[:, i] - R_beta[:, j]) ** 2 / (2 * beta)  # [P, K (K - 1) / 2]
    return pairs.sum(1).mean() / (K - 1)


def ipo_loss(logratio_chosen: Tensor, logratio_rejected: Tensor, beta: float) -> Tensor:
    """h [P], h [P] -> scalar. Azar et al. 2023 (arXiv 2310.12036), as in the paper's eq. 21-22."""
    return ((0.5 - beta * (logratio_chosen - logratio_rejected)) ** 2).mean()


def dpo_loss(logratio_chosen: Tensor, logratio_rejected: Tensor, beta: float) -> Tensor:
    """h [P], h [P] -> scalar. Rafailov et al. 2023 (arXiv 2305.18290), eq. 7."""
    return -logsigmoid(beta * (logratio_chosen - logratio_rejected)).mean()


def bradley_terry_loss(score_chosen: Tensor, score_rejected: Tensor) -> Tensor:
    """Scores [P], [P] of a reward model -> scalar: -ln P(chosen is preferred) (eq. 26)."""
    return -logsigmoid(score_chosen - score_rejected).mean()


def policy_loss(loss: str, logratios: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """h [P, K], R [P, K] -> scalar. IPO and DPO see the best and the worst of the K, not how much
    better; if all are equal they learn nothing."""
    if loss == "copg":
        return copg_loss(logratios, rewards, beta)
    best, worst = rewards.argmax(1, keepdim=True), rewards.argmin(1, keepdim=True)  # [P, 1]
    h_best, h_worst = logratios.gather(1, best)[:, 0], logratios.gather(1, worst)[:, 0]  # [P]
    return {"ipo": ipo_loss, "dpo": dpo_loss}[loss](h_best, h_worst, beta)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

COLUMNS = """step loss grad_norm ranked reward_mean reward_std entropy completion_length
truncated_share lr tokens_per_second seconds eval_reward eval_reward_stderr eval_utility
eval_utility_stderr eval_kl eval_kl_stderr eval_length eval_length_stderr"""


def train(args: argparse.Namespace) -> common.Run:
    run = common.Run(args, COLUMNS)
    data, test_prompts = read_data(args.data).split() if args.data else (None, [])
    task = common.make_task(args.task) if args.task else None
    test_task = common.make_task(args.task, "test") if args.task else Prompts(test_prompts)
    model, tokenizer = common.load_model(
        run.weights or args.model, args.device, task, not args.no_chat_template,
        args.grad_checkpointing,
    )  # fmt: skip
    ref_model = common.load_model(args.model, args.device, task)[0].requires_grad_(False)
    reward_model = None
    if args.reward_model != "task":
        reward_model = load_reward_model(args.reward_model or learned_reward_model(), args.device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    torch.manual_seed(args.seed)

    # The data, its rewards, and its log-probs under the reference are computed once and kept.
    if run.resumed and not args.online:
        data = read_data(run.dir / "data.jsonl")
    elif not args.online:
        data = data or collect_data(model, tokenizer, task, args)
        if reward_model:
            data.rewards = frozen_scores(*reward_model, *data.rows()).view(len(data.prompts), -1)
        elif data.rewards is None:
            raise UserError(f"{args.data}: no rewards in it; --reward-model gives them")
        if data.ends is None:
            data.ends = torch.full_like(data.rewards, end_token(model, tokenizer)).long()
        data.ref_logprobs = reference_logprobs(ref_model, tokenizer, data, args)
    n = len(data.prompts) if data else args.pairs
    steps = args.steps or math.ceil(args.epochs * n / args.prompts)
    # A resumed run that is to be longer does not warm up again: begin() restores the state.
    run.state["warmup"] = math.ceil(steps / 10) if args.warmup is None else args.warmup

    def evaluate_policy() -> dict:
        figures, samples = evaluate(model, ref_model, tokenizer, reward_model, test_task, args)
        run.shown += samples
        return figures

    run.begin(model, tokenizer, optimizer, evaluate_policy)
    warmup = run.state["warmup"]
    if data and not run.resumed:
        data.save(run.dir / "data.jsonl")

    P, K = args.prompts, len(data.completions[0]) if data else args.completions
    for step in run.steps(steps):
        # 1. The batch: P prompts with K completions each, from the data or from the policy.
        prompts, rollout = [], None
        if args.online:
            problems = run.next_problems(P)
            prompts = common.get_prompts(task, problems)
            batch = rollout = common.sample(model, tokenizer, prompts, K, args.max_new_tokens)
            rewards = get_rewards(reward_model, task, problems, prompts, rollout.texts)  # [P, K]
            ref_logprobs = common.frozen_logprobs(ref_model, batch, args.micro_batch_tokens)
            ref_logprobs = ref_logprobs.sum(1).view(P, K)
        else:
            index = records((step - 1) * P, P, n, args.seed)
            batch = encode(model, tokenizer, *data.rows(index), data.ends[index])  # P * K rows
            rewards, ref_logprobs = data.rewards[index], data.ref_logprobs[index]  # [P, K]
        rewards, ref_logprobs = rewards.to(model.device), ref_logprobs.to(model.device)

        # 2. One gradient step. The completions of a prompt stay in one micro-batch.
        loss, ranked = 0.0, 0
        lr = common.learning_rate(step, steps, args.lr, warmup, args.schedule)
        for rows in common.micro_batches(batch, args.micro_batch_tokens, K):
            mb, i = batch.rows(rows), rows[::K] // K  # p * K rows, of the prompts i [p]
            logprobs = common.completion_logprobs(model, mb)  # [p * K, T]
            logratios = logprobs.sum(1).view(-1, K) - ref_logprobs[i]  # h [p, K]
            mb_loss = policy_loss(args.loss, logratios, rewards[i], args.beta) * len(i) / P
            mb_loss.backward()
            loss += mb_loss.item()
            likeliest = rewards[i].gather(1, logratios.argmax(1, keepdim=True))[:, 0]  # [p]
            ranked += (likeliest == rewards[i].amax(1)).sum().item()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), args.clip_grad, error_if_nonfinite=True
        ).item()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        # 3. Record the step.
        run.log(
            prompts, rollout, rewards.cpu(), loss=loss, grad_norm=grad_norm, lr=lr,
            ranked=ranked / P,
        )  # fmt: skip
    return run


def encode(
    model, tokenizer, prompts: list, completions: list[str], ends: Tensor | None = None
) -> Rollout:
    """Given completions as a Rollout without log-probs. `ends` are the N tokens at their ends, -1
    where one was cut; by default each has the EOS. Raises UserError."""
    if ends is None:
        ends = torch.full((len(completions),), end_token(model, tokenizer))
    ends = ends.flatten().long()
    rows = tokenizer(completions, add_special_tokens=False).input_ids
    rows = [row + [end] * (end >= 0) for row, end in zip(rows, ends.tolist(), strict=True)]
    common.check_rows(model, completions, rows)
    ids, mask = common.pad(rows, "right", model.device)
    pictures = common.read_pictures(tokenizer, prompts)
    prompt = common.encode_prompts(model, tokenizer, prompts, ids.shape[1], pictures)
    cut = ends.to(model.device) < 0
    return Rollout(*prompt, ids, mask, 0.0 * mask, cut, completions, pictures)


def end_token(model, tokenizer) -> int:
    """The EOS of a given completion: the stop token that the chat template writes after an answer
    (Gemma's is not the tokenizer's), else the tokenizer's; -1 if there is none."""
    eos = [-1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id]
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        stops = common.stop_token_ids(model, tokenizer)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        eos += [i for i in ids if i in stops]
    return eos[-1]


def records(first: int, count: int, n: int, seed: int) -> list[int]:
    """Indices of the next `count` of n records, which every epoch shuffles anew."""
    places = (divmod(i, n) for i in range(first, first + count))
    return [shuffled(n, seed + 1000 * epoch)[place] for epoch, place in places]


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


def evaluate(model, ref_model, tokenizer, reward_model, task, args) -> tuple[dict, list[dict]]:
    """Completions of held-out prompts -> means with standard errors, and the first eight of them.

    reward, by the reward model or the task; utility, by the task itself where a reward model is
    trained on; kl, of whole completions, KL(pi || pi_ref) in nats; length, in tokens. The prompts
    and the random numbers are the same every time.
    """
    parts, samples = {"reward": [], "utility": [], "kl": [], "length": []}, []
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        for problems in common.held_out(task, args.eval_problems, args.eval_first):
            prompts, k = common.get_prompts(task, problems), args.eval_samples
            rollout = common.sample(model, tokenizer, prompts, k, args.max_new_tokens)  # p * k rows
            ref = common.frozen_logprobs(ref_model, rollout, args.micro_batch_tokens)  # [p * k, T]
            new = {"kl": (rollout.logprobs - ref).sum(1)}  # E_pi[ln pi - ln pi_ref]
            new["length"] = rollout.completion_mask.sum(1)
            if reward_model or not isinstance(task, Prompts):
                new["reward"] = get_rewards(reward_model, task, problems, prompts, rollout.texts)
            if reward_model and not isinstance(task, Prompts):
                new["utility"] = common.get_rewards(task, problems, rollout.texts)[0]
            for name, values in new.items():  # the mean over the completions of a prompt, [p]
                parts[name].append(values.double().cpu().view(len(problems), k).mean(1))
            for row, text in enumerate(rollout.texts[: 8 - len(samples)]):
                numbers = {name: round(x.flatten()[row].item(), 3) for name, x in new.items()}
                prompt = common.prompt_text(prompts[row // k])
                samples.append({"prompt": prompt, "completion": text} | numbers)
    figures = {}
    for name, values in parts.items():
        figures |= common.mean_and_error(name, torch.cat(values)) if values else {}
    return figures, samples


def get_rewards(reward_model, task, problems: list[int], prompts: list, texts) -> Tensor:
    """[P, K] rewards of P * K completions, by the reward model or, without one, by the task."""
    if not reward_model:
        return common.get_rewards(task, problems, texts)[0]
    K = len(texts) // len(prompts)
    return frozen_scores(*reward_model, [p for p in prompts for _ in range(K)], texts).view(-1, K)


# --------------------------------------------------------------------------------------------------
# Data: n prompts with K scored completions each
# --------------------------------------------------------------------------------------------------


@dataclass
class Data:
    prompts: list  # n, texts or dicts of an image and a text
    completions: list[list[str]]  # n lists of K
    rewards: Tensor | None = None  # [n, K]
    ref_logprobs: Tensor | None = None  # [n, K], ln pi_ref of whole completions
    ends: Tensor | None = None  # [n, K], the EOS that was sampled, -1 if it was cut before one
    where: list[str] = field(default_factory=list)  # file and line of each, for error messages

    def rows(self, index=None) -> tuple[list[str], list[str]]:
        """Prompts and completions of the records `index` (default: all), a row per completion."""
        index = range(len(self.prompts)) if index is None else index
        prompts = [self.prompts[i] for i in index for _ in self.completions[i]]
        return prompts, [completion for i in index for completion in self.completions[i]]

    def split(self) -> tuple[Data, list[str]]:
        """-> training data, and every tenth prompt, held out. (A single prompt serves both.)"""
        held_out = is_held_out(self.prompts)
        index = [i for i, held in enumerate(held_out) if not held] or list(range(len(held_out)))
        rest = Data(*([column[i] for i in index] for column in (self.prompts, self.completions)))
        rest.rewards = None if self.rewards is None else self.rewards[index]
        rest.ends = None if self.ends is None else self.ends[index]
        rest.where = [self.where[i] for i in index]
        return rest, [p for p, held in zip(self.prompts, held_out, strict=True) if held]

    def save(self, path: Path) -> None:
        """As a JSONL file, which --data reads, too."""
        tensors = self.rewards, self.ref_logprobs, self.ends
        columns = self.prompts, self.completions, *(x.tolist() for x in tensors)
        names = "prompt", "completions", "rewards", "ref_logprobs", "ends"
        with path.open("w", encoding="utf-8") as file:
            for values in zip(*columns, strict=True):
                record = dict(zip(names, values, strict=True))
                if isinstance(prompt := record["prompt"], dict):
                    image = prompt["image"]  # a path or data URI, or an array
                    image = image if isinstance(image, str) else data_uri(image)
                    record |= {"prompt": prompt["text"], "image": image}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_data(path: str | Path) -> Data:
    """A JSONL file of {"prompt", "completions": [K texts], "rewards": [K numbers]}, the rewards
    optional, or of {"prompt", "chosen", "rejected"}. Raises UserError with the number of the line.
    What `Data.save` writes has more columns: for an own file, they are computed.

    A preference without scores becomes R = 1/4 and -1/4, with which CoPG is IPO (property 3).
    """
    data, columns = Data([], []), {"rewards": [], "ref_logprobs": [], "ends": []}
    for where, record in json_lines(path):
        prompt, completions = record.get("prompt"), record.get("completions")
        if "chosen" in record:
            completions = [record["chosen"], record.get("rejected")]
            record["rewards"] = [0.25, -0.25]
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f"{where}: needs a text under 'prompt'")
        if not isinstance(completions, list) or len(completions) < 2:
            raise UserError(f"{where}: needs two completions or more, or 'chosen' and 'rejected'")
        if any(not isinstance(text, str) for text in completions):
            raise UserError(f"{where}: a completion is not a text")
        data.prompts.append(with_image(record, prompt, path, where))
        data.completions.append(completions)
        data.where.append(where)
        if len(completions) != len(data.completions[0]):
            raise UserError(f"{where}: needs {len(data.completions[0])} completions, as above it")
        for name, rows in columns.items():
            if (values := record.get(name)) is not None:
                numbers = isinstance(values, list) and all(type(x) in (int, float) for x in values)
                if not numbers or len(values) != len(completions) or not all(map(finite, values)):
                    raise UserError(f"{where}: needs a finite number per completion in {name!r}")
                rows.append(values)
            if len(rows) not in (0, len(data.prompts)):
                raise UserError(f"{where}: {name!r} must be in every line or in none")
    tensors = (torch.tensor(x) if x else None for x in columns.values())
    data.rewards, data.ref_logprobs, data.ends = tensors
    return data


def finite(x: float) -> bool:
    return abs(x) <= torch.finfo(torch.float32).max


def collect_data(model, tokenizer, task, args) -> Data:
    """The two summaries of every preference; or, for other tasks, K completions of each prompt,
    sampled from the model as it is. The task scores them."""
    if args.task == "posts":
        data = Data(*zip(*map(task.unwrapped.preference, range(args.pairs)), strict=True))
        problems = range(PREFERENCES, PREFERENCES + args.pairs)
        data.rewards = common.get_rewards(task, problems, data.rows()[1])[0]
        return data
    data, rewards, ends, K = Data([], []), [], [], args.completions
    for i in tqdm(range(0, args.pairs, 64), desc="sampling data"):
        problems = list(range(i, min(i + 64, args.pairs)))
        prompts = common.get_prompts(task, problems)
        rollout = common.sample(model, tokenizer, prompts, K, args.max_new_tokens)
        texts = rollout.texts
        data.prompts += prompts
        data.completions += [texts[j : j + K] for j in range(0, len(texts), K)]
        rewards.append(common.get_rewards(task, problems, texts)[0])
        last = rollout.completion_mask.sum(1, keepdim=True) - 1  # [N, 1]
        end = rollout.completion_ids.gather(1, last)[:, 0].masked_fill(rollout.truncated, -1)
        end[[not text for text in texts]] = end_token(model, tokenizer)  # cut, of special tokens
        ends.append(end.view(-1, K).cpu())
    data.rewards, data.ends = torch.cat(rewards), torch.cat(ends)
    cut, equal = (data.ends < 0).double().mean(), data.rewards.amax(1) == data.rewards.amin(1)
    print(
        f"sampled data: {cut:.3f} of the completions end at --max-new-tokens; the rewards of "
        f"{equal.double().mean():.3f} of the prompts are all equal"
    )
    return data


def reference_logprobs(ref_model, tokenizer, data: Data, args) -> Tensor:
    """ln pi_ref of all completions [n, K]. Raises UserError for one that is too long."""
    parts, n = [], len(data.prompts)
    for i in tqdm(range(0, n, 64), desc="log-probs of the reference"):
        index = range(i, min(i + 64, n))
        try:
            rollout = encode(ref_model, tokenizer, *data.rows(index), data.ends[index])
        except UserError as error:
            where = f"{data.where[i]}, or below: " if data.where else ""
            raise UserError(f"{where}{error}") from error
        logprobs = common.frozen_logprobs(ref_model, rollout, args.micro_batch_tokens)  # [N, T]
        parts.append(logprobs.sum(1).view(len(index), -1).cpu())  # [64, K]
    return torch.cat(parts)


class Prompts(TextTask):
    """The held-out prompts of a data file as a task. It has no reward of its own."""

    def __init__(self, prompts: list):
        super().__init__("test")
        self.prompts, self.size = prompts, len(prompts)

    def problem(self, index):
        return self.prompts[index], ""


# --------------------------------------------------------------------------------------------------
# Reward models (section 6, eq. 26)
# --------------------------------------------------------------------------------------------------

REWARD_MODEL = {"pairs": 6400, "epochs": 2, "pairs_per_step": 32, "lr": 3e-4}


def learned_reward_model() -> str:
    """The directory of a reward model: the tiny model of the posts, fitted to their preferences."""
    start, pairs, n = tiny_model(Posts()), REWARD_MODEL["pairs"], REWARD_MODEL["pairs_per_step"]

    def make(directory: Path) -> None:
        model, tokenizer = load_reward_model(start, "cpu", new_head=True)

        def scores(split: str, index) -> tuple[Tensor, Tensor]:  # of the preferred, of the others
            prompts, texts = zip(*map(Posts(split).preference, index), strict=True)
            both = [text for text, _ in texts] + [text for _, text in texts]
            return score(model, tokenizer, list(prompts) * 2, both).chunk(2)

        def batch_loss(step: int) -> Tensor:
            return bradley_terry_loss(*scores("train", records(step * n, n, pairs, 0)))

        steps = REWARD_MODEL["epochs"] * pairs // n
        fit(model, batch_loss, steps, REWARD_MODEL["lr"], "reward model")
        with torch.no_grad():
            pairs_of = {split: scores(split, range(1000)) for split in ("train", "test")}
        agree = {split: (a > b).double().mean().item() for split, (a, b) in pairs_of.items()}
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "agreement.json").write_text(json.dumps(agree))

    path = cached_model([Path(start).name, REWARD_MODEL, "preferences"], make)
    agree = json.loads((Path(path) / "agreement.json").read_text())
    print(
        f"reward model: agrees with {agree['train']:.3f} of the preferences it was fitted to and "
        f"{agree['test']:.3f} of others (paper: .891, .728)"
    )
    return path


def load_reward_model(name: str, device, new_head: bool = False):
    """-> (model, tokenizer) of a sequence classifier with one label. Raises UserError."""
    logging.set_verbosity_error()  # what transformers would report is checked below
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
        wrong = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
        if wrong and not new_head:
            raise ValueError(f"its {wrong[0]} is missing, or is for another number of labels")
        tokenizer = AutoTokenizer.from_pretrained(name)
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError("some of its weights are NaN or infinite")
        pads = tokenizer.pad_token_id, tokenizer.eos_token_id, 0
        model.config.pad_token_id = next(pad for pad in pads if pad is not None)
        model.to(device).eval()
        score(model, tokenizer, ["1"], ["1"])
    except Exception as error:  # as in common.load_model
        reason = " ".join(str(error).split())
        raise UserError(
            f"--reward-model {name}: not a sequence classifier with one label: {reason:.300}"
        ) from error
    return model, tokenizer


def score(model, tokenizer, prompts: list[str], completions: list[str]) -> Tensor:
    """The reward model's score of each completion of each prompt, [N]; differentiable. Raises
    UserError for prompts with pictures."""
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError("--reward-model reads text only, and the prompts have pictures")
    if tokenizer.chat_template:
        chats = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        rows = tokenizer(texts, add_special_tokens=False).input_ids
    else:
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ends = tokenizer(completions, add_special_tokens=False).input_ids
        starts = tokenizer(prompts).input_ids
        rows = [start + end + eos for start, end in zip(starts, ends, strict=True)]
    common.check_rows(model, completions, rows)
    ids, mask = common.pad(rows, "right", model.device)  # [N, L]
    ids = ids.where(mask, model.config.pad_token_id)  # the score is read at the last other token
    with common.autocast(model.device):
        return model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float()


@torch.no_grad()
def frozen_scores(model, tokenizer, prompts: list[str], completions: list[str]) -> Tensor:
    """score [N] without gradient, 64 rows at a time."""
    parts = [
        score(model, tokenizer, prompts[i : i + 64], completions[i : i + 64])
        for i in range(0, len(prompts), 64)
    ]
    return torch.cat(parts).cpu()


if __name__ == "__main__":
    with common.plain_errors("copg.py"):
        train(parse_args())
