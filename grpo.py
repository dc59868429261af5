"""GRPO, Group Relative Policy Optimization (Shao et al. 2024, arXiv 2402.03300), the baseline.

Sample G completions for each of B prompts, compare each reward with the mean of its group, divide
by the group's standard deviation, and climb PPO's clipped surrogate, with a KL to a frozen
reference model inside the loss. `diff gpg.py grpo.py` shows what GPG deletes (the
reference and its KL, the old log-probs with ratio and clip, several updates per batch, the std) and
what it adds (alpha and the threshold).

    A_i   = (r_i - mean(r_1 .. r_G)) / std(r_1 .. r_G)                            section 4.1.2
    rho   = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)
    D_KL  = pi_ref / pi - log(pi_ref / pi) - 1, of the token o_it, >= 0                   eq. 4
    J     = 1/G sum_i 1/|o_i| sum_t [ min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i)
                                      - beta D_KL ], to maximise                          eq. 3

Its relatives are a few flags away; --variant sets them:

    dr_grpo  Liu et al. 2025, arXiv 2503.20783: no std, no 1/|o_i|, no KL
    dapo     Yu et al. 2025, arXiv 2503.14476: a higher upper clip, the mean over all tokens, no KL,
             and dynamic sampling: dead groups (equal rewards) are replaced by sampling again

    python grpo.py                                           a tiny model learns to add, on a CPU
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k                     on one GPU
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import common
from common import Rollout, count, number, positive

# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------

# The paper trains a 7B model with AdamW at 1e-6. The tiny model needs a 100x larger learning rate.
TINY = {"lr": 1e-4, "schedule": "cosine", "steps": 120, "max_new_tokens": 48}
TINY |= {"micro_batch_tokens": 2048, "eval_every": 10, "save_every": 1}
REAL = {"lr": 1e-6, "schedule": "constant", "steps": 500, "max_new_tokens": 512}
REAL |= {"micro_batch_tokens": 8192, "eval_every": 50, "save_every": 25}

# The flags that define a variant. Explicit flags take precedence.
VARIANTS = {
    "grpo": {"scale": "std", "kl_beta": 0.04, "aggregate": "sequence", "dynamic_sampling": False},
    "dr_grpo": {"scale": "none", "kl_beta": 0, "aggregate": "constant", "dynamic_sampling": False},
    "dapo": {"scale": "std", "kl_beta": 0, "aggregate": "token", "dynamic_sampling": True},
}
VARIANTS["dapo"]["clip_high"] = 0.28


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line as flags. Raises UserError."""
    parser = common.Parser("grpo.py", description="GRPO, Dr. GRPO and DAPO for language models.")

    add = parser.add_argument_group("model and task").add_argument
    add("--model", default="tiny", help="tiny, a Hugging Face directory or id (default: tiny)")
    add("--task", default="add", help="add, gsm8k, ..., file.jsonl, module:Name-v0 (default: add)")
    add("--no-chat-template", action="store_true", help="give the model the bare prompt")

    add = parser.add_argument_group("Group Relative Policy Optimization").add_argument
    add("--variant", choices=VARIANTS, default="grpo", help="sets the flags below that define it")
    add("--prompts", type=count, default=16, help="B per step (default: 16, as in the paper)")
    add("--group-size", type=number(int, 2), default=8, help="G (default: 8; paper: 64)")
    add("--scale", choices=["std", "none"], help="of the advantages (default: std; dr_grpo: none)")
    add("--clip-low", type=positive, default=0.2, help="rho >= 1 - this (default: 0.2)")
    add("--clip-high", type=positive, help="rho <= 1 + this (default: --clip-low; dapo: 0.28)")
    add("--kl-beta", type=number(float, 0), help="0: no reference (default: 0.04; others: 0)")
    add(
        "--aggregate", choices=["sequence", "token", "constant"],
        help="divide by |o_i| and N, by sum |o_i|, or by N * max_new_tokens (default: by variant)",
    )  # fmt: skip
    add("--updates-per-batch", type=count, default=1, help="mu, passes over a batch (default: 1)")
    add("--minibatches", type=count, default=1, help="updates per pass (default: 1)")
    dynamic = argparse.BooleanOptionalAction
    add("--dynamic-sampling", action=dynamic, help="sample until B groups are valid (dapo only)")
    add("--max-rounds", type=count, help="at most this many batches per step (default: 10)")

    add = parser.add_argument_group("sampling and optimisation").add_argument
    add("--max-new-tokens", type=count, help="default: 512; tiny: 48")
    add("--temperature", type=positive, default=1.0, help="of sampling and scoring (default: 1)")
    add("--steps", type=count, help="default: 500; tiny: 120")
    add("--lr", type=positive, help="default: 1e-6, as in the paper; tiny: 1e-4")
    add("--warmup", type=number(int, 0), default=10, help="steps of linear warm-up (default: 10)")
    add("--schedule", choices=["constant", "cosine"], help="default: constant; tiny: cosine")
    add("--weight-decay", type=number(float, 0), default=0.0, help="default: 0")
    add("--clip-grad", type=positive, default=1.0, help="gradient norm (default: 1)")
    add("--micro-batch-tokens", type=count, help="per forward pass (default: 8192; tiny: 2048)")
    add("--grad-checkpointing", action="store_true", help="less memory, more time")

    common.add_run_flags(parser, TINY, REAL)
    args = common.parse_flags(parser, argv, defaults)
    if args.minibatches > args.prompts * args.group_size:
        raise common.UserError(f"--minibatches {args.minibatches}: more than there are completions")
    return args


def defaults(args: argparse.Namespace) -> dict:
    """The defaults that depend on other flags."""
    flags = (TINY if args.model == "tiny" else REAL) | {"max_rounds": 10}
    flags |= {"clip_high": args.clip_low} | VARIANTS[args.variant]
    dynamic = args.dynamic_sampling
    if args.max_rounds and not (flags["dynamic_sampling"] if dynamic is None else dynamic):
        raise common.UserError("--max-rounds does nothing without --dynamic-sampling")
    return flags


# --------------------------------------------------------------------------------------------------
# The equations
# --------------------------------------------------------------------------------------------------


def is_valid(rewards: Tensor) -> Tensor:
    """rewards [B, G] -> [B], True for a valid group, False for a dead one: all rewards equal.

    Compares the raw rewards: in floating point the mean of eight times 0.1 is not 0.1.
    """
    return rewards.amax(1) != rewards.amin(1)


def group_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """rewards [B, G] -> advantages [B, G] (section 4.1.2). scale: "std", or "none" (Dr. GRPO)."""
    centred = rewards - rewards.mean(1, keepdim=True)  # [B, G]; the mean includes the sample itself
    centred = centred * is_valid(rewards)[:, None]  # 0 in dead groups, not what rounding leaves
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if scale == "std" else centred


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """pi_ref / pi - log(pi_ref / pi) - 1 of each token (eq. 4), >= 0, in the shape of logprobs.

    Over tokens sampled from pi its mean is KL(pi || pi_ref), since E_pi[pi_ref / pi] = 1. The mean
    of its gradient is that of KL(pi_ref || pi), per token, with prefixes from pi.
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


def is_clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """[N, T], True where the minimum in eq. 3 is the clipped term: the token has no gradient."""
    up, down = advantages[:, None] > 0, advantages[:, None] < 0  # [N, 1]
    return (up & (ratio > 1 + clip_high)) | (down & (ratio < 1 - clip_low))


def grpo_loss(
    logprobs: Tensor,  # [N, T]
    old_logprobs: Tensor,  # [N, T], of the policy that sampled
    advantages: Tensor,  # [N]
    mask: Tensor,  # [N, T]
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logprobs: Tensor | None = None,  # [N, T]
    kl_beta: float = 0.0,
    aggregate: str = "sequence",
    total: float | None = None,
) -> Tensor:
    """The scalar to minimise: minus eq. 3.

    aggregate says what the sum over tokens is divided by: "sequence", |o_i| and the number of rows
    (GRPO); "token", the number of tokens (DAPO); "constant", rows times columns (Dr. GRPO). total
    is that number for the whole batch (see `batch_total`), so that the losses of micro-batches add
    up to the loss of the batch. By default these rows are the whole batch.
    """
    A = advantages[:, None]  # [N, 1]
    ratio = (logprobs - old_logprobs).exp()  # [N, T]
    J = torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)  # [N, T]
    if kl_beta > 0:
        J = J - kl_beta * kl_k3(logprobs, ref_logprobs)  # [N, T]
    if aggregate == "sequence":
        J = J / mask.sum(1, keepdim=True)  # [N, T]
    total = batch_total(mask, aggregate, mask.shape[1]) if total is None else total
    return -(J * mask).sum() / total


def batch_total(mask: Tensor, aggregate: str, max_new_tokens: int) -> float:
    """mask [N, T] of the whole batch -> N, sum |o_i|, or N * max_new_tokens."""
    N = len(mask)
    return {"sequence": N, "token": mask.sum().item(), "constant": N * max_new_tokens}[aggregate]


def choose_groups(valid: Tensor, B: int, dynamic_sampling: bool) -> Tensor:
    """valid [rounds * B] -> indices of the groups in the batch, at most B: those of the only round
    or, with dynamic sampling, the first valid ones of all rounds, if there are any."""
    alive = valid.nonzero().squeeze(1)[:B]
    return alive if dynamic_sampling and len(alive) else torch.arange(B)


def minibatches(N: int, mu: int, K: int) -> list[Tensor]:
    """Row indices: mu passes over N rows, each in a new random order and cut into K minibatches."""
    return [rows for _ in range(mu) for rows in torch.randperm(N).tensor_split(K)]


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

COLUMNS = """step reward_mean reward_std valid_share all_right all_wrong alpha loss grad_norm
entropy completion_length truncated_share lr tokens_per_second seconds rounds
kl clip_share ratio_mean ratio_min ratio_max
eval_accuracy eval_accuracy_stderr eval_greedy eval_pass_at_k"""


def train(args: argparse.Namespace) -> common.Run:
    run = common.Run(args, COLUMNS)
    task, test_task = common.make_task(args.task), common.make_task(args.task, "test")
    model, tokenizer = common.load_model(
        run.weights or args.model, args.device, task, not args.no_chat_template,
        args.grad_checkpointing,
    )  # fmt: skip
    ref_model = None
    if args.kl_beta > 0:  # the model before training, in a resumed run too
        ref_model = common.load_model(args.model, args.device, task)[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    torch.manual_seed(args.seed)
    run.begin(
        model, tokenizer, optimizer, lambda: common.evaluate(model, tokenizer, test_task, args)
    )
    defining = "scale", "kl_beta", "aggregate", "clip_low", "clip_high", "dynamic_sampling"
    print(f"{args.variant}:", ", ".join(f"{flag} {getattr(args, flag)}" for flag in defining))

    B, G = args.prompts, args.group_size
    for step in run.steps(args.steps):
        # 1. Sample with the current policy: one batch or, with dynamic sampling, until B are valid.
        prompts, rollouts, rewards = [], [], torch.zeros(0, G)
        for _ in range(args.max_rounds if args.dynamic_sampling else 1):
            problems = run.next_problems(B)
            prompts += common.get_prompts(task, problems)
            rollout = common.sample(
                model, tokenizer, prompts[-B:], G, args.max_new_tokens, args.temperature
            )
            rollouts.append(rollout)  # B * G rows
            new_rewards, _ = common.get_rewards(task, problems, rollout.texts)  # [B, G]
            rewards = torch.cat([rewards, new_rewards])  # [rounds * B, G]
            valid = is_valid(rewards)  # [rounds * B]
            if valid.sum() >= B:
                break
        rollout = Rollout.cat(rollouts)  # rounds * B * G rows

        # 2. The batch of the update: its advantages, and the log-probs of the reference.
        groups = choose_groups(valid, B, args.dynamic_sampling)  # [at most B]
        rows = (groups[:, None] * G + torch.arange(G)).flatten()  # [N]
        batch = rollout.rows(rows.to(model.device))  # N rows
        advantages = group_advantages(rewards[groups], args.scale)  # [groups, G]
        advantages = advantages.flatten().to(model.device)  # [N]
        ref_logprobs = None
        if ref_model:
            ref_logprobs = common.frozen_logprobs(
                ref_model, batch, args.micro_batch_tokens, args.temperature
            )  # [N, T]
        # Without a KL, dead groups have no gradient, so they skip the model.
        live = (advantages != 0) | (args.kl_beta > 0)  # [N]

        # 3. mu passes over the batch, one gradient step for each minibatch.
        losses, grad_norms, ratios, clipped, kls = [], [], [], [], []
        lr = common.learning_rate(step, args.steps, args.lr, args.warmup, args.schedule)
        for minibatch in minibatches(len(live), args.updates_per_batch, args.minibatches):
            mask = batch.completion_mask[minibatch]  # dead rows count in the total
            total = batch_total(mask, args.aggregate, args.max_new_tokens)
            minibatch = minibatch.to(model.device)[live[minibatch]]
            if len(minibatch) == 0:
                continue
            loss = 0.0
            for rows in common.micro_batches(batch.rows(minibatch), args.micro_batch_tokens):
                rows = minibatch[rows]  # n rows
                mb, A = batch.rows(rows), advantages[rows]
                ref = ref_logprobs[rows, : mb.logprobs.shape[1]] if ref_model else None  # [n, T]
                logprobs = common.completion_logprobs(model, mb, args.temperature)  # [n, T]
                mb_loss = grpo_loss(
                    logprobs, mb.logprobs, A, mb.completion_mask, args.clip_low, args.clip_high,
                    ref, args.kl_beta, args.aggregate, total,
                )  # fmt: skip
                mb_loss.backward()
                loss += mb_loss.item()
                logprobs, mask = logprobs.detach(), mb.completion_mask  # for metrics.csv:
                ratio = (logprobs - mb.logprobs).exp()
                ratios.append(ratio[mask])
                clipped.append(is_clipped(ratio, A, args.clip_low, args.clip_high)[mask])
                if ref_model:
                    kls.append(kl_k3(logprobs, ref)[mask])
            grad_norm = torch.nn.utils.clip_grad_norm_(
                model.parameters(), args.clip_grad, error_if_nonfinite=True
            ).item()
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            grad_norms.append(grad_norm)

        # 4. Record the step: means over its updates and their tokens.
        metrics = {"loss": 0.0, "grad_norm": 0.0}
        if losses:
            ratio, clipped = torch.cat(ratios), torch.cat(clipped).double()
            metrics = {"loss": sum(losses) / len(losses), "clip_share": clipped.mean().item()}
            metrics |= {"grad_norm": sum(grad_norms) / len(losses)}
            metrics |= {"ratio_mean": ratio.mean().item()}
            metrics |= {"ratio_min": ratio.min().item(), "ratio_max": ratio.max().item()}
            if ref_model:
                metrics["kl"] = torch.cat(kls).mean().item()
        else:
            run.warn("every group is dead (equal rewards): nothing to learn, step skipped")
        run.log(
            prompts, rollout, rewards, valid_share=valid.double().mean().item(),
            all_right=(~valid & (rewards[:, 0] > 0)).double().mean().item(),
            all_wrong=(~valid & (rewards[:, 0] <= 0)).double().mean().item(), alpha=1.0, lr=lr,
            rounds=len(rollouts), **metrics,
        )  # fmt: skip
    return run


if __name__ == "__main__":
    with common.plain_errors("grpo.py"):
        train(parse_args())
