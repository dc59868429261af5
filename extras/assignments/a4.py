"""A4, GRPO: the questions of grpo.py."""

import torch
from probe import Case, Question, call, gradient
from training import rewards_of, sampling_case, stop_case, train_case


def advantages(seed: int) -> list[Case]:
    cases = [call("group_advantages", rewards) for rewards in rewards_of(seed)]
    return cases + [call("group_advantages", rewards, "none") for rewards in rewards_of(seed)[1:]]


def kl(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    policy = -torch.rand(4, 8, generator=generator, dtype=torch.float64) * 3
    near = policy + 1e-5 * torch.rand(4, 8, generator=generator, dtype=torch.float64)
    far = policy + torch.randn(4, 8, generator=generator, dtype=torch.float64)
    single = [(policy.float(), (policy + 1e-3).float()), (policy.float(), far.float())]
    pairs = [(policy, near), (policy, far), *single]
    return [gradient("kl_k3", *pair, tolerance=1e-3) for pair in pairs]


def loss(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(4, 5, generator=generator, dtype=torch.float64)
    old = logprobs + 0.4 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    ref = logprobs + 0.4 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [2], [3], [1]])
    cases = []
    for aggregate in ("sequence", "token", "constant"):
        for more in ({}, {"clip_low": 0.1, "clip_high": 0.3}, {"total": 12.0}):
            fixed = {"aggregate": aggregate, **more}
            cases.append(gradient("grpo_loss", logprobs, old, advantages, mask, **fixed))
        with_kl = {"ref_logprobs": ref, "kl_beta": 0.2, "aggregate": aggregate}
        cases.append(gradient("grpo_loss", logprobs, old, advantages, mask, **with_kl))
    return cases


def clips(seed: int) -> list[Case]:
    ratio = torch.tensor([[0.5, 0.85, 1.0, 1.15, 1.5]]).repeat(3, 1)
    advantages = torch.tensor([1.0, -1.0, 0.0])
    clips = (0.2, 0.2), (0.1, 0.3)
    cases = [call("is_clipped", ratio, advantages, low, high) for low, high in clips]

    def passes(module, N, mu, n):
        parts = [part.tolist() for part in module.minibatches(N, mu, n)]
        order = [[i for part in parts[k * n : (k + 1) * n] for i in part] for k in range(mu)]
        return {
            "number": len(parts),
            "sizes": sorted(map(len, parts)),
            "each pass has every row": all(sorted(rows) == list(range(N)) for rows in order),
            "passes differ": order[0] != order[-1] or mu == 1,
            "shuffled": order[0] != list(range(N)),
        }

    sizes = (40, 1, 4), (41, 3, 6), (30, 2, 1)
    return cases + [Case(f"minibatches{x}", passes, x) for x in sizes]


def sampling(seed: int) -> list[Case]:
    dynamic = "--dynamic-sampling --max-rounds"
    cases = [sampling_case(x, seed) for x in ("", f"{dynamic} 3", f"{dynamic} 8")]
    return cases + [sampling_case(f"{dynamic} 3", seed, task) for task in ("few-dead", "all-dead")]


def batch(seed: int) -> list[Case]:
    def values(chosen, batch, A, ref_logprobs):
        """In any order of the rows."""
        given = [batch.completion_ids, batch.logprobs, ref_logprobs]
        sums = [(A * x.double().sum(1)).sum() for x in given if x is not None]
        return {"rows": chosen.sort().values, "advantages": A.sort().values, "sums": sums}

    flags = ["", "--kl-beta 0", "--dynamic-sampling --max-rounds 3", "--scale none"]
    flags += ["--temperature 0.7", "--mask-truncated"]
    return [stop_case("choose_batch", x, seed, values) for x in flags]


def updates(seed: int) -> list[Case]:
    def strided(N, mu, n_minibatches):
        """Without chance, so that the updates do not depend on how a student shuffles."""
        return [torch.arange(k, N, n_minibatches) for _ in range(mu) for k in range(n_minibatches)]

    several = "--updates-per-batch 2 --minibatches 3"
    flags = [several, f"{several} --micro-batch-tokens 40 --kl-beta 0", f"{several} --variant dapo"]
    flags += [f"{several} --variant dr_grpo --micro-batch-tokens 40"]
    columns = ["loss", "grad_norm", "clip_share", "ratio_min", "ratio_max", "kl"]
    cases = [train_case(x, seed, columns, minibatches=strided) for x in flags]
    return [*cases, train_case("--kl-beta 0", seed, columns, "all-dead", minibatches=strided)]


ROUNDS = "prompts, rollouts, rollout, rewards, valid"
BATCH = "chosen, batch, A, ref_logprobs"
TRAIN = [  # the paragraphs of train that the handout makes functions
    f"sample_groups(model, tokenizer, task, run, B, G, args) -> {ROUNDS}",
    f"choose_batch(model, ref_model, rollout, rewards, valid, B, G, args) -> {BATCH}",
    f"update(step, model, optimizer, ref_model, {BATCH}, args)"
    " -> losses, grad_norms, last_logprobs, lr",
]
QUESTIONS = {
    "Q1": Question("grpo.py", "group_advantages", advantages),
    "Q2": Question("grpo.py", "kl_k3", kl),
    "Q3": Question("grpo.py", "grpo_loss", loss),
    "Q4": Question("grpo.py", "is_clipped minibatches", clips),
    "Q5": Question("grpo.py", "sample_groups", sampling),
    "Q6": Question("grpo.py", "choose_batch", batch),
    "Q7": Question("grpo.py", "update", updates),
}
