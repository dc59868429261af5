"""GRPO, Group Relative Policy Optimization (Shao et al. 2024, arXiv 2402.03300), the baseline.

Sample G completions for each of B prompts, compare each reward with the mean of its group, divide
by the group's standard deviation, and maximise PPO's clipped surrogate, with a KL penalty towards a
frozen reference model. `diff gpg.py grpo.py` shows what GPG deletes (the reference and its KL, the
ratio and its clipping, several updates per batch, the std) and adds (alpha and the threshold).

    A_i   = (r_i - mean(r_1 .. r_G)) / std(r_1 .. r_G)                            section 4.1.2
    rho   = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)
    D_KL  = pi_ref / pi - log(pi_ref / pi) - 1, of the token o_it, >= 0                   eq. 4
    J     = 1/G sum_i 1/|o_i| sum_t [ min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i)
                                      - beta D_KL ], to maximise                          eq. 3

--variant selects a relative:

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
from torch.nn.utils import clip_grad_norm_

from common import (
    Rollout,
    completion_logprobs,
    evaluate,
    frozen_logprobs,
    load_model,
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
from tasks import UserError, get_prompts, get_rewards, make_tasks
from tasks.prompts import leave_out_misfits

# ---- Arguments -----------------------------------------------------------------------------------

# The paper trains a 7B model with AdamW at 1e-6; the tiny model needs 100 times more.
TINY = dict(lr=1e-4, schedule="cosine", steps=120, max_new_tokens=48, micro_batch_tokens=2048)
REAL = dict(lr=1e-6, schedule="constant", steps=500, max_new_tokens=512, micro_batch_tokens=8192)

# What --variant sets. Explicit flags take precedence.
VARIANTS = {
    "grpo": dict(scale="std", kl_beta=0.04, aggregate="sequence"),
    "dr_grpo": dict(scale="none", kl_beta=0.0, aggregate="constant"),
    "dapo": dict(
        scale="std", kl_beta=0.0, aggregate="token", clip_high=0.28, dynamic_sampling=True
    ),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Raises UserError."""
    parser = Parser("grpo.py", description="GRPO, Dr. GRPO and DAPO for language models.")

    add = parser.add_argument_group("model and task").add_argument
    add("--model", default="tiny", help="tiny, a Hugging Face directory or id (default: tiny)")
    add("--task", default="add", help="add, gsm8k, ..., file.jsonl, module:Name-v0 (default: add)")
    add("--eval-task", help="evaluate on its test problems; files are then used whole")
    add("--system", help="text of a system turn before every prompt")
    add("--no-chat-template", action="store_true", help="feed the raw prompt to the model")

    add = parser.add_argument_group("Group Relative Policy Optimization").add_argument
    add("--variant", choices=VARIANTS, default="grpo", help="preset for the flags below")
    add("--prompts", type=positive_int, default=16, help="B per step (default: 16; paper: 16)")
    add("--group-size", type=number(int, 2), default=8, help="G (default: 8; paper: 64)")
    add("--scale", choices=["std", "none"], help="of the advantages (default: std; dr_grpo: none)")
    add("--clip-low", type=positive_float, default=0.2, help="rho >= 1 - CLIP_LOW (default: 0.2)")
    add("--clip-high", type=positive_float, help="rho <= 1 + CLIP_HIGH (default: 0.2; dapo: 0.28)")
    add("--kl-beta", type=number(float, 0), help="0: no reference (default: 0.04; others: 0)")
    add("--aggregate", choices=["sequence", "token", "constant"], help="see grpo_loss")
    add("--updates-per-batch", type=positive_int, default=1, help="passes (mu) (default: 1)")
    add("--minibatches", type=positive_int, default=1, help="updates per pass (default: 1)")
    add("--dynamic-sampling", action="store_true", help="sample until B groups are valid (dapo)")
    add("--max-rounds", type=positive_int, help="most batches to sample per step (default: 10)")

    add = parser.add_argument_group("sampling and optimisation").add_argument
    add("--max-new-tokens", type=positive_int, help="longest completion (default: 512; tiny: 48)")
    add("--mask-truncated", action="store_true", help="truncated completions leave the loss")
    add("--temperature", type=positive_float, default=1.0, help="of the softmax (default: 1)")
    add("--steps", type=positive_int, help="training steps (default: 500; tiny: 120)")
    add("--lr", type=positive_float, help="peak learning rate (default: 1e-6; tiny: 1e-4)")
    add("--warmup", type=number(int, 0), default=10, help="steps of linear warm-up (default: 10)")
    add("--schedule", choices=["constant", "cosine"], help="default: constant; tiny: cosine")
    add("--weight-decay", type=number(float, 0), default=0.0, help="default: 0")
    add("--clip-grad", type=positive_float, default=1.0, help="largest gradient norm (default: 1)")
    add("--micro-batch-tokens", type=positive_int, help="tokens per forward pass, padding included")
    add("--grad-checkpointing", action="store_true", help="less memory, more time")

    add_run_flags(parser)
    return parse_flags(parser, argv, defaults)


def defaults(args: argparse.Namespace) -> dict:
    """The defaults that depend on other flags."""
    flags = {"clip_high": args.clip_low, "dynamic_sampling": False} | VARIANTS[args.variant]
    dynamic = args.dynamic_sampling or flags["dynamic_sampling"]
    if args.max_rounds and not dynamic:
        raise UserError("--max-rounds has no effect without --dynamic-sampling")
    if args.minibatches > args.prompts * args.group_size:
        raise UserError(f"--minibatches {args.minibatches} exceeds the number of completions")
    flags["max_rounds"] = 10 if dynamic else 1
    return (TINY if args.model == "tiny" else REAL) | flags


# ---- The equations -------------------------------------------------------------------------------


def is_valid(rewards: Tensor) -> Tensor:
    """rewards [B, G] -> [B], True for a valid group, False for a dead one: all rewards equal.

    It compares rewards, not advantages: the floating-point mean of eight 0.1s is not 0.1.
    """
    return rewards.amax(1) != rewards.amin(1)


def group_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """rewards [B, G] -> advantages [B, G] (section 4.1.2). scale: "std", or "none" (Dr. GRPO)."""
    centred = rewards - rewards.mean(1, keepdim=True)  # [B, G]; the mean includes the sample itself
    centred = centred * is_valid(rewards)[:, None]  # exactly 0 in dead groups, despite rounding
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if scale == "std" else centred


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """pi_ref / pi - log(pi_ref / pi) - 1 of each token (eq. 4), >= 0, in the shape of logprobs.

    Over tokens sampled from pi its mean is KL(pi || pi_ref), since E_pi[pi_ref / pi] = 1. Its
    expected gradient is that of KL(pi_ref || pi) at each token, with prefixes sampled from pi.
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

    aggregate says how the terms of the tokens are averaged:

        sequence  over the tokens of a row, then over rows: 1/|o_i|, then 1/N      GRPO
        token     over all tokens: 1 / sum_i |o_i|                                 DAPO
        constant  divided by N * max_new_tokens, whatever the lengths              Dr. GRPO

    total is N, sum_i |o_i| or N * max_new_tokens of the whole batch, so that the losses of
    micro-batches add up to the loss of the batch. Default: these rows are the whole batch.
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
    """mask [N, T] of the whole batch -> N, sum_i |o_i| or N * max_new_tokens."""
    if aggregate == "token":
        return mask.sum().item()
    return len(mask) if aggregate == "sequence" else len(mask) * max_new_tokens


def choose_groups(valid: Tensor, B: int, dynamic_sampling: bool) -> Tensor:
    """valid [rounds * B] -> indices of the groups in the batch: all B or, with dynamic sampling,
    the first B valid ones. If none is valid, the first B."""
    valid_groups = valid.nonzero().squeeze(1)[:B]
    return valid_groups if dynamic_sampling and len(valid_groups) else torch.arange(B)


def minibatches(N: int, mu: int, n_minibatches: int) -> list[Tensor]:
    """Row indices: mu passes over N rows, each in a new random order and cut into minibatches."""
    return [rows for _ in range(mu) for rows in torch.randperm(N).tensor_split(n_minibatches)]


# ---- Training ------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> Run:
    run = Run(args)
    task, test_task = make_tasks(args.task, args.eval_task)
    model, tokenizer = load_model(
        run.weights or args.model,
        args.device,
        task,
        chat_template=not args.no_chat_template,
        system=args.system,
        grad_checkpointing=args.grad_checkpointing,
    )
    ref_model = None
    if args.kl_beta > 0:  # the model before training, in a resumed run too
        ref_model = load_model(args.model, args.device, task)[0].requires_grad_(False)
    leave_out_misfits(model, tokenizer, args.max_new_tokens, task, test_task)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    torch.manual_seed(args.seed)
    run.begin(model, tokenizer, optimizer)
    if not run.resumed:
        run.log(0, evaluate(model, tokenizer, test_task, args))
        run.save()

    B, G = args.prompts, args.group_size
    for step in run.steps(args.steps):
        # 1. Sample with the current policy; with dynamic sampling, until B groups are valid.
        prompts, rollouts, rewards = [], [], torch.zeros(0, G)
        for _ in range(args.max_rounds):
            problems = run.next_problems(B)
            batch = get_prompts(task, problems)  # B prompts
            rollout = sample(model, tokenizer, batch, G, args.max_new_tokens, args.temperature)
            new_rewards, _ = get_rewards(task, problems, rollout.texts)  # [B, G]
            prompts, rollouts = prompts + batch, [*rollouts, rollout]
            rewards = torch.cat([rewards, new_rewards])  # [rounds * B, G]
            valid = is_valid(rewards)  # [rounds * B]
            if valid.sum() >= B:
                break
        rollout = Rollout.cat(rollouts)  # rounds * B * G rows

        # 2. Choose the groups of the updates, and compute their advantages and reference log-probs.
        groups = choose_groups(valid, B, args.dynamic_sampling)  # [at most B]
        chosen = (groups[:, None] * G + torch.arange(G)).flatten()  # the rows of these groups, [N]
        if args.mask_truncated:  # as in DAPO; their rewards keep their part in the group's mean
            chosen = chosen[~rollout.truncated.cpu()[chosen]]
        batch = rollout.select(chosen.to(model.device))  # N rows
        A = group_advantages(rewards, args.scale).flatten()[chosen].to(model.device)  # [N]
        if ref_model and len(chosen) > 0:
            tokens, temperature = args.micro_batch_tokens, args.temperature
            ref_logprobs = frozen_logprobs(ref_model, batch, tokens, temperature)  # [N, T]

        # 3. mu passes over the batch, one gradient step for each minibatch.
        losses, grad_norms, last_logprobs = [], [], batch.logprobs.clone()  # [N, T]
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        for index in minibatches(len(chosen), args.updates_per_batch, args.minibatches):
            index = index.to(model.device)  # of the rows in this update
            mask = batch.completion_mask[index]  # dead rows included
            total = batch_total(mask, args.aggregate, args.max_new_tokens)
            if args.kl_beta == 0:  # rows without an advantage have no gradient: they skip the model
                index = index[A[index] != 0]
            if len(index) == 0:
                continue
            loss = 0.0
            for part in micro_batches(batch.select(index), args.micro_batch_tokens):
                rows = index[part]
                mb = batch.select(rows)  # n rows
                logprobs = completion_logprobs(model, mb, args.temperature)  # [n, T]
                T = logprobs.shape[1]
                mb_loss = grpo_loss(
                    logprobs,
                    mb.logprobs,
                    A[rows],
                    mb.completion_mask,
                    args.clip_low,
                    args.clip_high,
                    ref_logprobs[rows, :T] if ref_model else None,
                    args.kl_beta,
                    args.aggregate,
                    total,
                )
                mb_loss.backward()
                loss += mb_loss.item()
                last_logprobs[rows, :T] = logprobs.detach()
            grad_norm = clip_grad_norm_(model.parameters(), args.clip_grad, error_if_nonfinite=True)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            grad_norms.append(float(grad_norm))

        # 4. Log, evaluate, save.
        metrics = {"loss": 0.0, "grad_norm": 0.0, "lr": lr}
        if losses:
            metrics["loss"] = sum(losses) / len(losses)
            metrics["grad_norm"] = sum(grad_norms) / len(losses)
            mask, ratio = batch.completion_mask, (last_logprobs - batch.logprobs).exp()  # [N, T]
            clipped = is_clipped(ratio, A, args.clip_low, args.clip_high)  # [N, T]
            metrics["clip_share"] = clipped[mask].double().mean().item()
            metrics["ratio_min"] = ratio[mask].min().item()
            metrics["ratio_max"] = ratio[mask].max().item()
            if ref_model:
                metrics["kl"] = kl_k3(last_logprobs, ref_logprobs)[mask].mean().item()
        else:
            run.warn("all groups are dead (equal rewards): nothing to learn; step skipped")
        metrics |= {"rounds": len(rollouts)} | rollout_metrics(rollout, rewards)
        scores = {"group": rollout.group, "reward": rewards}
        run.log(step, metrics, rollout_samples(prompts, rollout, scores, 3 * G))
        if step % args.eval_every == 0 or step == args.steps:
            run.log(step, evaluate(model, tokenizer, test_task, args))
        if step % args.save_every == 0 or step == args.steps or run.stopping:
            run.save()
    run.finish()
    return run


if __name__ == "__main__":
    with plain_errors("grpo.py"):
        train(parse_args())
