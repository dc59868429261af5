"""A3, Group Policy Gradient: the questions of gpg.py."""

import math

import torch
from probe import Case, Question, call, gradient
from training import rewards_of, sampling_case, stop_case, train_case, trained


def advantages(seed: int) -> list[Case]:
    cases = [call("is_valid", rewards) for rewards in rewards_of(seed)]
    mixed = [rewards_of(seed)[i] for i in (0, 1, 3, 4)]
    cases += [call("group_advantages", rewards) for rewards in mixed]
    spreads = torch.tensor([[0.0, 0, 1, 1], [4, 0, -4, 2]])
    stds = [*(rewards[:1] for rewards in mixed[:2]), spreads]
    return cases + [call("group_advantages", rewards, "std") for rewards in stds]


def alpha(seed: int) -> list[Case]:
    dead = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    return [call("gradient_scale", rewards) for rewards in [*rewards_of(seed), dead, dead - 1]]


def loss(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for dtype, mask_type in ((torch.float32, torch.bool), (torch.float64, torch.float64)):
        logprobs = -torch.rand(4, 5, generator=generator).to(dtype)
        advantages = torch.tensor([0.5, -0.5, 0.25, -0.25], dtype=dtype)
        mask = (torch.arange(5) < torch.tensor([[5], [2], [3], [1]])).to(mask_type)
        for more in ({}, {"alpha": 2.0}, {"alpha": 1.5, "total_tokens": 30}):
            cases.append(gradient("gpg_loss", logprobs, advantages, mask, **more))
    return cases


def groups(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    patterns = [[0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 1, 0]]
    patterns += [(torch.rand(9, generator=generator) < 0.4).tolist(), [1] * 6]

    def run(module, pattern):
        return sorted(torch.as_tensor(module.fill_batch(torch.tensor(pattern).bool(), 3)).tolist())

    return [Case(f"fill_batch({x}, B=3), in any order", run, (x,)) for x in patterns]


def sampling(seed: int) -> list[Case]:
    flags = [f"--beta-th {x} --max-rounds 4" for x in (0.5, 0.7, 0.75, 0.9)]
    flags += ["--beta-th 1 --max-rounds 1", "--beta-th 0 --temperature 0.3", "--beta-th 0"]
    return [sampling_case(x, seed) for x in flags]


def batch(seed: int) -> list[Case]:
    def values(alpha, lengths, total_tokens):
        return {"alpha": alpha, "lengths": lengths, "total_tokens": total_tokens}

    more = "--beta-th 0.9 --max-rounds 3"
    flags = ["--beta-th 0", "--beta-th 0 --no-alpha", more, f"{more} --mask-truncated"]
    return [stop_case("choose_batch", x, seed, values) for x in flags]


def update(seed: int) -> list[Case]:
    def stops(module):
        def is_nan(logprobs, *args, **kwargs):
            return logprobs.sum() * math.nan

        try:
            trained(module, f"--steps 1 --seed {seed}", gpg_loss=is_nan)
        except RuntimeError as error:
            return "total norm" in str(error)  # `sample` stops at NaNs, too

    flags = ["", "--micro-batch-tokens 40", "--f-norm std --temperature 0.7", "--clip-grad 0.01"]
    columns = ["loss", "grad_norm", "lr"]
    cases = [train_case(x, seed, columns) for x in [*flags, "--mask-truncated"]]
    cases.append(train_case("", seed, columns, "all-dead"))
    label = "clip_grad_norm_ stops a training whose loss is NaN"
    return [*cases, Case(label, stops, part=label)]


ROUNDS = "prompts, rollouts, rollout, rewards, valid"
BATCH = "alpha, lengths, total_tokens"
TRAIN = [  # the paragraphs of train that the handout makes functions
    f"sample_groups(model, tokenizer, task, run, B, G, args) -> {ROUNDS}",
    f"choose_batch(rollout, rewards, valid, B, G, args) -> {BATCH}",
    f"update(step, model, optimizer, run, rollout, rewards, valid, {BATCH}, G, args)"
    " -> loss, grad_norm, lr",
]
QUESTIONS = {
    "Q1": Question("gpg.py", "is_valid group_advantages", advantages),
    "Q2": Question("gpg.py", "gradient_scale", alpha),
    "Q3": Question("gpg.py", "gpg_loss", loss),
    "Q4": Question("gpg.py", "fill_batch", groups),
    "Q5": Question("gpg.py", "sample_groups", sampling),
    "Q6": Question("gpg.py", "choose_batch", batch),
    "Q7": Question("gpg.py", "update", update),
}
