"""GPG, Group Policy Gradient (Chu et al. 2025, arXiv 2504.02546v4), for language models.

Sample G completions for each of B prompts, compare each reward with the mean of its group, and
follow the plain policy gradient. Compared with GRPO, there is no reference model and no KL, no
ratio to old log-probs and no clip, and no division by the group's standard deviation. GPG adds
alpha (the paper's AGE, accurate gradient estimation), which makes up for the dead groups, those
whose rewards are all equal; and a threshold: while too few groups are valid, it samples again.

    A_i   = (r_i - mean(r_1 .. r_G)) / F_norm, with F_norm = 1                            eq. 6
    J     = sum_i sum_t -log pi(o_it | q, o_i<t) A_i / sum_i |o_i|, to minimise           eq. 5
    alpha = B / (B - M), where M of the B groups are dead                                 eq. 7
    J^    = alpha J                                                                       eq. 8
    sample again while alpha > 1 / beta_th (in the paper: >=)                      Algorithm 1

As printed, eq. 5 divides the tokens of each group by the length of that group. Here, as in the
authors' code, the sums run over all groups of the batch.

    python gpg.py                                            a tiny model learns to add, on a CPU
    python gpg.py --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k                      on one GPU
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import common
from common import Rollout, count, number, positive, share

# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------

# The paper trains 7B models with AdamW at 1e-6 (appendix B.1). The tiny model needs a 100x larger
# learning rate.
TINY = {"lr": 1e-4, "schedule": "cosine", "steps": 120, "max_new_tokens": 48}
TINY |= {"micro_batch_tokens": 2048, "eval_every": 10, "save_every": 1}
REAL = {"lr": 1e-6, "schedule": "constant", "steps": 500, "max_new_tokens": 512}
REAL |= {"micro_batch_tokens": 8192, "eval_every": 50, "save_every": 25}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line as flags. Raises UserError."""
    parser = common.Parser("gpg.py", description="Group Policy Gradient for language models.")

    add = parser.add_argument_group("model and task").add_argument
    add("--model", default="tiny", help="tiny, a Hugging Face directory or id (default: tiny)")
    add("--task", default="add", help="add, gsm8k, ..., file.jsonl, module:Name-v0 (default: add)")
    add("--no-chat-template", action="store_true", help="give the model the bare prompt")

    add = parser.add_argument_group("Group Policy Gradient").add_argument
    add("--prompts", type=count, default=16, help="B per step (default: 16; paper: 144)")
    add("--group-size", type=number(int, 2), default=8, help="G (default: 8, as in the paper)")
    add("--f-norm", choices=["1", "std"], default="1", help="eq. 6 (default: 1, as in the paper)")
    add("--no-alpha", action="store_true", help="alpha = 1: nothing makes up for dead groups")
    add("--beta-th", type=share, default=0.6, help="valid share to reach; 0: off (default: 0.6)")
    add("--max-rounds", type=count, help="at most this many batches per step (default: 4)")

    add = parser.add_argument_group("sampling and optimisation").add_argument
    add("--max-new-tokens", type=count, help="default: 512; tiny: 48")
    add("--temperature", type=positive, default=1.0, help="of sampling and scoring (default: 1)")
    add("--steps", type=count, help="default: 500; tiny: 120")
    add("--lr", type=positive, help="default: 1e-6, as in the paper; tiny: 1e-4")
    add("--warmup", type=number(int, 0), default=10, help="steps of linear warm-up (default: 10)")
    add("--schedule", choices=["constant", "cosine"], help="default: constant; tiny: cosine")
    add("--weight-decay", type=number(float, 0), default=0.0, help="default: 0; paper: 0.1")
    add("--clip-grad", type=positive, default=1.0, help="gradient norm (default: 1)")
    add("--micro-batch-tokens", type=count, help="per forward pass (default: 8192; tiny: 2048)")
    add("--grad-checkpointing", action="store_true", help="less memory, more time")

    common.add_run_flags(parser, TINY, REAL)
    return common.parse_flags(parser, argv, defaults)


def defaults(args: argparse.Namespace) -> dict:
    """The defaults that depend on other flags."""
    if args.max_rounds and args.beta_th == 0:
        raise common.UserError("--max-rounds does nothing with --beta-th 0, which never resamples")
    return (TINY if args.model == "tiny" else REAL) | {"max_rounds": 4}


# --------------------------------------------------------------------------------------------------
# The equations
# --------------------------------------------------------------------------------------------------


def is_valid(rewards: Tensor) -> Tensor:
    """rewards [B, G] -> [B], True for a valid group, False for a dead one: all rewards equal.

    Compares the raw rewards: in floating point the mean of eight times 0.1 is not 0.1.
    """
    return rewards.amax(1) != rewards.amin(1)


def group_advantages(rewards: Tensor, f_norm: str = "1") -> Tensor:
    """rewards [B, G] -> advantages [B, G] (eq. 6). f_norm: "1", or "std" as in GRPO."""
    centred = rewards - rewards.mean(1, keepdim=True)  # [B, G]; the mean includes the sample itself
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if f_norm == "std" else centred


def gradient_scale(rewards: Tensor) -> float:
    """rewards [B, G] -> alpha = B / (B - M), with M dead groups (eq. 7); 0.0 if all are dead.

    Dead groups add nothing to the sum of eq. 5, but they count in its denominator; alpha takes them
    out again. This is exact for a mean over groups. For the mean over all tokens of the batch it is
    exact if dead groups are as long as valid ones.
    """
    B, valid = len(rewards), int(is_valid(rewards).sum())
    return B / valid if valid else 0.0


def gpg_loss(
    logprobs: Tensor,  # [N, T]
    advantages: Tensor,  # [N]
    mask: Tensor,  # [N, T]
    alpha: float = 1.0,
    total_tokens: float | None = None,
) -> Tensor:
    """The scalar to minimise (eq. 5 and 8).

    total_tokens is sum_i |o_i| over the whole batch, so that the losses of micro-batches add up to
    the loss of the batch. By default these rows are the whole batch.
    """
    total_tokens = mask.sum() if total_tokens is None else total_tokens
    return alpha * (-logprobs * advantages[:, None] * mask).sum() / total_tokens


def choose_groups(valid: Tensor, B: int) -> Tensor:
    """valid [rounds * B] -> indices of the groups in the batch, [max(B, V)]: the V valid groups of
    all rounds, then dead groups up to B, those of the last round first."""
    alive, dead = valid.nonzero().squeeze(1), (~valid).nonzero().squeeze(1)
    return torch.cat([alive, dead.flip(0)[: max(0, B - len(alive))]])


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

COLUMNS = """step reward_mean reward_std valid_share all_right all_wrong alpha loss grad_norm
entropy completion_length truncated_share lr tokens_per_second seconds rounds
eval_accuracy eval_accuracy_stderr eval_greedy eval_pass_at_k"""


def train(args: argparse.Namespace) -> common.Run:
    run = common.Run(args, COLUMNS)
    task, test_task = common.make_task(args.task), common.make_task(args.task, "test")
    model, tokenizer = common.load_model(
        run.weights or args.model, args.device, task, not args.no_chat_template,
        args.grad_checkpointing,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    torch.manual_seed(args.seed)
    run.begin(
        model, tokenizer, optimizer, lambda: common.evaluate(model, tokenizer, test_task, args)
    )

    B, G = args.prompts, args.group_size
    for step in run.steps(args.steps):
        # 1. Sample with the current policy until enough groups are valid (Algorithm 1).
        prompts, rollouts, rewards = [], [], torch.zeros(0, G)
        for _ in range(args.max_rounds):
            problems = run.next_problems(B)
            prompts += common.get_prompts(task, problems)
            rollout = common.sample(
                model, tokenizer, prompts[-B:], G, args.max_new_tokens, args.temperature
            )
            rollouts.append(rollout)  # B * G rows
            new_rewards, _ = common.get_rewards(task, problems, rollout.texts)  # [B, G]
            rewards = torch.cat([rewards, new_rewards])  # [rounds * B, G]
            valid = is_valid(rewards)  # [rounds * B]
            if valid.sum() / B >= args.beta_th:
                break
        rollout = Rollout.cat(rollouts)  # rounds * B * G rows

        # 2. The batch of the update: its alpha and its tokens.
        batch = choose_groups(valid, B)  # [max(B, V)]
        alpha = gradient_scale(rewards[batch])
        if args.no_alpha and alpha > 0:
            alpha = 1.0
        group_tokens = rollout.completion_mask.view(len(rewards), -1).sum(1).cpu()  # [rounds * B]
        total_tokens = group_tokens[batch].sum().item()  # sum_i |o_i|, dead groups included

        # 3. One gradient step. Dead groups have no gradient, so they skip the model.
        loss = grad_norm = 0.0
        lr = common.learning_rate(step, args.steps, args.lr, args.warmup, args.schedule)
        if alpha > 0:
            advantages = group_advantages(rewards[valid], args.f_norm)  # [V, G]
            advantages = advantages.flatten().to(model.device)  # [V * G]
            live = rollout.rows(valid.repeat_interleave(G).to(model.device))  # V * G rows
            for rows in common.micro_batches(live, args.micro_batch_tokens):
                mb = live.rows(rows)  # n rows
                logprobs = common.completion_logprobs(model, mb, args.temperature)  # [n, T]
                mb_loss = gpg_loss(
                    logprobs, advantages[rows], mb.completion_mask, alpha, total_tokens
                )
                mb_loss.backward()
                loss += mb_loss.item()
            grad_norm = torch.nn.utils.clip_grad_norm_(
                model.parameters(), args.clip_grad, error_if_nonfinite=True
            ).item()
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        else:
            run.warn("every group is dead (equal rewards): nothing to learn, step skipped")

        # 4. Record the step.
        run.log(
            prompts, rollout, rewards, valid_share=valid.double().mean().item(),
            all_right=(~valid & (rewards[:, 0] > 0)).double().mean().item(),
            all_wrong=(~valid & (rewards[:, 0] <= 0)).double().mean().item(), alpha=alpha,
            loss=loss, grad_norm=grad_norm, lr=lr, rounds=len(rollouts),
        )  # fmt: skip
    return run


if __name__ == "__main__":
    with common.plain_errors("gpg.py"):
        train(parse_args())
