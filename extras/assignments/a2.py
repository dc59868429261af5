"""A2, sampling and log-probabilities: the questions of common.py."""

import functools

import torch
from probe import Case, Question
from training import small_model

from common import Rollout, load_model

PROMPTS = ["7", "12+5=", "a longer prompt, of quite another length: ", "1+1="]


@functools.cache
def loaded():
    return load_model(small_model(), "cpu")


def draws(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 6, generator=generator) * 2

    def frequencies(module, temperature):
        tokens, logprobs = module.draw(logits.repeat(20_000, 1), temperature)
        shares = [(tokens == i).double().mean().item() for i in range(6)]
        return {"shares": shares, "logprob": logprobs[tokens == tokens[0]][0].exp().item() > 0}

    def logprob(module, temperature):
        tokens, logprobs = module.draw(logits.repeat(2000, 1), temperature)
        found = dict(zip(tokens.tolist(), logprobs.tolist(), strict=True))
        frequent = ((logits[0] / temperature).softmax(-1) > 0.01).nonzero().flatten().tolist()
        return {token: found.get(token) for token in frequent}

    def greedy(module):
        return [x.tolist() for x in module.draw(torch.cat([logits, -logits]), 0.0)]

    mask = (torch.arange(6) >= torch.tensor([[0], [3], [5]])).bool()

    def numbered(module):
        model, _ = loaded()
        return module.positions(model, mask.long(), mask, [None] * 3)[mask]

    cases = [Case("positions of left-padded rows, where the mask is True", numbered)]
    cases.append(Case("draw at temperature 0: tokens and log-probs", greedy))
    for temperature in (1.0, 0.5, 1.7):
        shares = functools.partial(frequencies, temperature=temperature)
        values = functools.partial(logprob, temperature=temperature)
        cases.append(Case(f"draw at temperature {temperature}, 20,000 shares", shares, 0.04))
        cases.append(Case(f"draw at temperature {temperature}, log-probs by token", values))
    return cases


def naive_logprobs(model, rollout, temperature=1.0) -> torch.Tensor:
    """The full log-softmax, one unpadded row at a time."""
    out = torch.zeros(rollout.completion_mask.shape)
    for i in range(len(rollout.texts)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i].bool()]
        completion = rollout.completion_ids[i][rollout.completion_mask[i].bool()]
        logits = model(torch.cat([prompt, completion])[None]).logits[0].float() / temperature
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        out[i, : len(completion)] = logprobs.gather(1, completion[:, None])[:, 0]
    return out


def samples(seed: int) -> list[Case]:
    def greedy(module):
        rollout = module.sample(*loaded(), PROMPTS, 2, 12, temperature=0)
        rows = zip(rollout.completion_ids, rollout.completion_mask.bool(), strict=True)
        return [ids[mask].tolist() for ids, mask in rows]

    def checked(module, what):
        torch.manual_seed(seed)
        model, tokenizer = loaded()
        rollout = module.sample(model, tokenizer, PROMPTS, 8, 12, temperature=0.8)
        mask, ids = rollout.completion_mask.bool(), rollout.completion_ids
        stop = torch.isin(ids, torch.tensor([256, *range(100, 130)])) & mask
        lengths = mask.sum(1)
        if what == "log-probs":
            return bool(
                torch.allclose(rollout.logprobs, naive_logprobs(model, rollout, 0.8), atol=1e-3)
            )
        if what == "the EOS":
            last = ids.gather(1, lengths[:, None] - 1)[:, 0]
            ended = torch.isin(last, torch.tensor([256, *range(100, 130)]))
            return [bool((ended == ~rollout.truncated).all()), bool((stop.sum(1) <= 1).all())]
        if what == "padding":
            behind = torch.arange(ids.shape[1]) >= lengths[:, None]
            zero = all(bool((x[behind] == 0).all()) for x in (ids, mask, rollout.logprobs))
            return [
                zero,
                ids.shape[1] == int(lengths.max()),
                bool((lengths[rollout.truncated] == 12).all()),
            ]
        ends = lengths - (~rollout.truncated).long()
        texts = [row[:n].tolist() for row, n in zip(ids, ends, strict=True)]
        prompts = zip(rollout.prompt_ids, rollout.prompt_mask.bool(), strict=True)
        groups = [tokenizer.decode(ids[mask]) for ids, mask in prompts]
        decoded = tokenizer.batch_decode(texts, skip_special_tokens=True)
        return [rollout.texts == decoded, groups == [p for p in PROMPTS for _ in range(8)]]

    kinds = ["log-probs", "the EOS", "padding", "texts and the order of rows"]
    cases = [Case("sample(temperature=0), the tokens of 4 x 2 completions", greedy, part="greedy")]
    for kind in kinds:
        run = functools.partial(checked, what=kind)
        cases.append(Case(f"sample(temperature=0.8), right: {kind}", run, part=kind))
    return cases


def rollout_by_hand(seed: int) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(100, (6, 5), generator=generator)
    completions = torch.randint(100, (6, 7), generator=generator)
    starts, ends = torch.tensor([0, 2, 4, 1, 0, 3]), torch.tensor([7, 3, 1, 5, 2, 7])
    return Rollout(
        prompt_ids=prompts,
        prompt_mask=torch.arange(5) >= starts[:, None],
        completion_ids=completions,
        completion_mask=torch.arange(7) < ends[:, None],
        logprobs=torch.zeros(6, 7),
        truncated=torch.zeros(6).bool(),
        texts=[""] * 6,
    )


def logprobs(seed: int) -> list[Case]:
    def scored(module, temperature):
        model, _ = loaded()
        model.zero_grad()
        rollout = rollout_by_hand(seed)
        values = module.completion_logprobs(model, rollout, temperature)
        (values * torch.linspace(-1, 1, values.numel()).view(values.shape)).sum().backward()
        slopes = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return {"logprobs": values.detach(), "gradient norms": slopes, "dtype": str(values.dtype)}

    return [
        Case(
            f"completion_logprobs at temperature {temperature}, with its gradient",
            functools.partial(scored, temperature=temperature),
            1e-3,
        )
        for temperature in (1.0, 0.6)
    ]


def batches(seed: int) -> list[Case]:
    def properties(module, block, budget):
        rollout = rollout_by_hand(seed)
        lengths = (rollout.prompt_mask.sum(1) + rollout.completion_mask.sum(1)).tolist()
        parts = [rows.tolist() for rows in module.micro_batches(rollout, budget, block)]
        fits = [len(p) * max(lengths[i] for i in p) <= budget or len(p) == block for p in parts]
        blocks = [{i // block for i in p} for p in parts]
        return {
            "every row once": sorted(i for p in parts for i in p) == list(range(6)),
            "within the budget": all(fits),
            "blocks stay whole": sum(map(len, blocks)) == 6 // block,
            "number of batches": len(parts),
        }

    return [
        Case(
            f"micro_batches(rollout, {budget}, block={block})",
            functools.partial(properties, block=block, budget=budget),
        )
        for block, budget in ((1, 20), (1, 30), (1, 5), (2, 40), (3, 36))
    ]


QUESTIONS = {
    "Q1": Question("Positions, and drawing a token", 20, "common.py", ["positions", "draw"], draws),
    "Q2": Question("The sampler", 30, "common.py", ["sample"], samples),
    "Q3": Question(
        "Log-probabilities",
        30,
        "common.py",
        ["completion_logprobs", "predicting_states"],
        logprobs,
    ),
    "Q4": Question("Micro-batches", 10, "common.py", ["micro_batches"], batches),
}
WRITTEN = {"W1": 5, "W2": 5}
