"""GPG, Group Policy Gradient (Chu et al. 2025, arXiv 2504.02546v4), for language models.

Sample G completions for each of B prompts, compare each reward with the mean of its group, and
follow the plain policy gradient. GPG is GRPO without the reference model and its KL, without the
importance ratio and its clipping, and without the division by the group's standard deviation. It
adds two things: *alpha* (AGE in the paper) rescales the loss to compensate for dead groups, whose
rewards are all equal; and a *threshold* keeps sampling until enough groups are valid.

    A_i   = (r_i - mean(r_1 .. r_G)) / F_norm, with F_norm = 1                            eq. 6
    J     = sum_i sum_t -log pi(o_it | q, o_i<t) A_i / sum_i |o_i|, to minimise           eq. 5
    alpha = B / (B - M), where M of the B groups are dead                                 eq. 7
    J_hat = alpha J                                                                       eq. 8
    sample again while alpha > 1 / beta_th (in the paper: >=)                      Algorithm 1

As printed, eq. 5 divides the tokens of each group by the length of that group. Like the authors'
code, we sum over the whole batch.

    python gpg.py                                            a tiny model learns to add, on a CPU
    python gpg.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k                      on one GPU
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
    fraction,
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

# The paper trains 7B models with AdamW at 1e-6 (appendix B.1); the tiny model needs 100 times more.
TINY = dict(lr=1e-4, schedule="cosine", steps=120, max_new_tokens=48, micro_batch_tokens=2048)
REAL = dict(lr=1e-6, schedule="constant", steps=500, max_new_tokens=512, micro_batch_tokens=8192)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Raises UserError."""
    parser = Parser("gpg.py", description="Group Policy Gradient for language models.")

    add = parser.add_argument_group("model and task").add_argument
    add("--model", default="tiny", help="tiny, a Hugging Face directory or id (default: tiny)")
    add("--task", default="add", help="add, gsm8k, ..., file.jsonl, module:Name-v0 (default: add)")
    add("--eval-task", help="evaluate on its test problems; files are then used whole")
    add("--system", help="text of a system turn before every prompt")
    add("--no-chat-template", action="store_true", help="feed the raw prompt to the model")

    add = parser.add_argument_group("Group Policy Gradient").add_argument
    add("--prompts", type=positive_int, default=16, help="B per step (default: 16; paper: 144)")
    add("--group-size", type=number(int, 2), default=8, help="G (default: 8, as in the paper)")
    add("--f-norm", choices=["1", "std"], default="1", help="eq. 6 (default: 1, as in the paper)")
    add("--no-alpha", action="store_true", help="fix alpha at 1")
    add("--beta-th", type=fraction, default=0.6, help="wanted share of valid groups (default: 0.6)")
    add("--max-rounds", type=positive_int, help="most batches to sample per step (default: 4)")

    add = parser.add_argument_group("sampling and optimisation").add_argument
    add("--max-new-tokens", type=positive_int, help="longest completion (default: 512; tiny: 48)")
    add("--mask-truncated", action="store_true", help="truncated completions leave the loss")
    add("--temperature", type=positive_float, default=1.0, help="of the softmax (default: 1)")
    add("--steps", type=positive_int, help="training steps (default: 500; tiny: 120)")
    add("--lr", type=positive_float, help="peak learning rate (default: 1e-6; tiny: 1e-4)")
    add("--warmup", type=number(int, 0), default=10, help="steps of linear warm-up (default: 10)")
    add("--schedule", choices=["constant", "cosine"], help="default: constant; tiny: cosine")
    add("--weight-decay", type=number(float, 0), default=0.0, help="default: 0; paper: 0.1")
    add("--clip-grad", type=positive_float, default=1.0, help="largest gradient norm (default: 1)")
    add("--micro-batch-tokens", type=positive_int, help="tokens per forward pass, padding included")
    add("--grad-checkpointing", action="store_true", help="less memory, more time")

    add_run_flags(parser)
    return parse_flags(parser, argv, defaults)


def defaults(args: argparse.Namespace) -> dict:
    """The defaults that depend on other flags."""
    if args.max_rounds and args.beta_th == 0:
        raise UserError("--max-rounds has no effect with --beta-th 0, which samples once")
    return (TINY if args.model == "tiny" else REAL) | {"max_rounds": 4}


# ---- The equations -------------------------------------------------------------------------------


def is_valid(rewards: Tensor) -> Tensor:
    """rewards [B, G] -> [B], True for a valid group, False for a dead one: all rewards equal.

    It compares rewards, not advantages: the floating-point mean of eight 0.1s is not 0.1.
    """
    return rewards.amax(1) != rewards.amin(1)


def group_advantages(rewards: Tensor, f_norm: str = "1") -> Tensor:
    """rewards [B, G] -> advantages [B, G] (eq. 6). f_norm: "1", or "std" as in GRPO."""
    centred = rewards - rewards.mean(1, keepdim=True)  # [B, G]; the mean includes the sample itself
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if f_norm == "std" else centred


def gradient_scale(rewards: Tensor) -> float:
    """rewards [B, G] -> alpha = B / (B - M), with M dead groups (eq. 7); 0.0 if all are dead.

    Dead groups add nothing to the numerator of eq. 5 but count in its denominator; alpha undoes
    this. That is exact if the loss averages over groups. If it averages over tokens, it is exact
    when dead and valid groups are equally long.
    """
    B, n_valid = len(rewards), int(is_valid(rewards).sum())
    return B / n_valid if n_valid else 0.0


def gpg_loss(
    logprobs: Tensor,  # [N, T]
    advantages: Tensor,  # [N]
    mask: Tensor,  # [N, T]
    alpha: float = 1.0,
    total_tokens: float | None = None,
) -> Tensor:
    """The scalar to minimise (eq. 5 and 8).

    total_tokens is sum_i |o_i| over the whole batch, so that the losses of micro-batches add up to
    the loss of the batch. Default: these rows are the whole batch.
    """
    total_tokens = mask.sum() if total_tokens is None else total_tokens
    return alpha * (-logprobs * advantages[:, None] * mask).sum() / total_tokens


def fill_batch(valid: Tensor, B: int) -> Tensor:
    """valid [rounds * B] -> indices of the groups in the batch: every valid group, then dead ones
    (newest first) until there are B."""
    dead = (~valid).nonzero().squeeze(1).flip(0)
    valid = valid.nonzero().squeeze(1)
    return torch.cat([valid, dead[: max(0, B - len(valid))]])


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
    leave_out_misfits(model, tokenizer, args.max_new_tokens, task, test_task)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    torch.manual_seed(args.seed)
    run.begin(model, tokenizer, optimizer)
    if not run.resumed:
        run.log(0, evaluate(model, tokenizer, test_task, args))
        run.save()

    B, G = args.prompts, args.group_size
    for step in run.steps(args.steps):
        # 1. Sample with the current policy until enough groups are valid (Algorithm 1).
        prompts, rollouts, rewards = [], [], torch.zeros(0, G)
        for _ in range(args.max_rounds):
            problems = run.next_problems(B)
            batch = get_prompts(task, problems)  # B prompts
            rollout = sample(model, tokenizer, batch, G, args.max_new_tokens, args.temperature)
            new_rewards, _ = get_rewards(task, problems, rollout.texts)  # [B, G]
            prompts, rollouts = prompts + batch, [*rollouts, rollout]
            rewards = torch.cat([rewards, new_rewards])  # [rounds * B, G]
            valid = is_valid(rewards)  # [rounds * B]
            if valid.sum() / B >= args.beta_th:
                break
        rollout = Rollout.cat(rollouts)  # rounds * B * G rows

        # 2. Choose the groups of the update, and compute their alpha and their tokens.
        groups = fill_batch(valid, B)  # [max(B, n_valid)]
        alpha = 1.0 if args.no_alpha else gradient_scale(rewards[groups])
        lengths = rollout.completion_mask.sum(1).cpu()  # |o_i|, [rounds * B * G]
        if args.mask_truncated:  # as in DAPO; their rewards keep their part in the group's mean
            lengths[rollout.truncated.cpu()] = 0
        total_tokens = lengths.view(-1, G)[groups].sum().item()  # dead groups included

        # 3. One gradient step. Dead groups have no gradient, so they skip the model.
        loss = grad_norm = 0.0
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        trains = valid.repeat_interleave(G) & (lengths > 0)  # [rounds * B * G]
        if trains.any():
            live = rollout.select(trains.to(model.device))  # n_valid * G rows, less the truncated
            A = group_advantages(rewards, args.f_norm).flatten()[trains].to(model.device)
            for rows in micro_batches(live, args.micro_batch_tokens):
                mb = live.select(rows)  # n rows
                logprobs = completion_logprobs(model, mb, args.temperature)  # [n, T]
                mb_loss = gpg_loss(logprobs, A[rows], mb.completion_mask, alpha, total_tokens)
                mb_loss.backward()
                loss += mb_loss.item()
            grad_norm = clip_grad_norm_(model.parameters(), args.clip_grad, error_if_nonfinite=True)
            optimizer.step()
            optimizer.zero_grad()
        else:
            run.warn("all groups are dead (equal rewards): nothing to learn; step skipped")

        # 4. Log, evaluate, save.
        metrics = {"loss": loss, "grad_norm": float(grad_norm), "lr": lr, "alpha": alpha}
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
    with plain_errors("gpg.py"):
        train(parse_args())
