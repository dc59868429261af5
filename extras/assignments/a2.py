"""A2, sampling and log-probabilities: the questions of common.py."""

import functools

import torch
from probe import Case, Question
from training import small_model

from common import Rollout, load_model

PROMPTS = ["7", "12+5=", "a longer prompt, of quite another length: ", "1+1="]
STOP_IDS = torch.tensor([256, *range(100, 130)])  # of the small model


@functools.cache
def loaded():
    return load_model(small_model(), "cpu")


def draws(seed: int) -> list[Case]:
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(seed)) * 2
    mask = torch.arange(6) >= torch.tensor([[0], [3], [5]])

    def numbered(module):
        return module.positions(loaded()[0], mask.long(), mask, [None] * 3)[mask]

    def greedy(module):
        return [x.tolist() for x in module.draw(torch.cat([logits, -logits]), 0.0)]

    def shares(module, temperature):
        tokens, _ = module.draw(logits.repeat(20_000, 1), temperature)
        return [(tokens == i).double().mean() for i in range(6)]

    def logprobs(module, temperature):
        tokens, found = module.draw(logits.repeat(2000, 1), temperature)
        frequent = (logits[0] / temperature).softmax(-1) > 0.01  # others may not be drawn
        return torch.zeros(6).scatter(0, tokens, found.float())[frequent]

    cases = [Case("positions of left-padded rows, where the mask is True", numbered)]
    cases.append(Case("draw at temperature 0: tokens and log-probs", greedy))
    for t in (1.0, 0.5, 1.7):
        cases.append(Case(f"draw at temperature {t}: shares of the tokens", shares, (t,), 0.04))
        cases.append(Case(f"draw at temperature {t}: log-probs", logprobs, (t,)))
    return cases


def exact_logprobs(model, r: Rollout, temperature: float) -> torch.Tensor:
    """The log-probs of a rollout's tokens, from all logits at once."""
    ids = torch.cat([r.prompt_ids, r.completion_ids], 1)
    mask = torch.cat([r.prompt_mask, r.completion_mask], 1).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=places).logits / temperature
    logprobs = logits[:, r.prompt_ids.shape[1] - 1 : -1].log_softmax(-1)
    return logprobs.gather(2, r.completion_ids[..., None])[..., 0] * r.completion_mask


def samples(seed: int) -> list[Case]:
    def greedy(module):
        rollout = module.sample(*loaded(), PROMPTS, 2, 12, temperature=0)
        rows = zip(rollout.completion_ids, rollout.completion_mask.bool(), strict=True)
        return [ids[mask].tolist() for ids, mask in rows]

    @functools.cache
    def facts(module):
        torch.manual_seed(seed)
        model, tokenizer = loaded()
        r = module.sample(model, tokenizer, PROMPTS, 8, 12, temperature=0.8)
        mask, ids = r.completion_mask.bool(), r.completion_ids
        lengths, stops = mask.sum(1), torch.isin(ids, STOP_IDS) & mask
        ended = stops.gather(1, lengths[:, None] - 1)[:, 0]
        rows = zip(ids, lengths - ended.long(), strict=True)
        texts = tokenizer.batch_decode([row[:n] for row, n in rows])
        rows = zip(r.prompt_ids, r.prompt_mask.bool(), strict=True)
        prompts = [tokenizer.decode(row[m]) for row, m in rows]
        in_order = [prompt for prompt in PROMPTS for _ in range(8)]
        exact = exact_logprobs(model, r, 0.8)
        return {
            "log-probs": {"of a full forward pass": torch.allclose(r.logprobs, exact, atol=1e-3)},
            "the EOS": {
                "one at most, the last token": torch.equal(stops.sum(1), ended.long()),
                "none where truncated": torch.equal(ended, ~r.truncated),
            },
            "padding": {
                "behind the tokens": bool((mask[:, 1:] <= mask[:, :-1]).all()),
                "all 0": not ids[~mask].any() and not r.logprobs[~mask].any(),
                "no empty column": ids.shape[1] == int(lengths.max()),
                "none in truncated rows": bool((lengths[r.truncated] == 12).all()),
            },
            "texts": {"without the EOS": r.texts == texts, "adjacent": prompts == in_order},
        }

    label = "sample(temperature=0.8): {}".format
    parts = ("log-probs", "the EOS", "padding", "texts")
    cases = [Case(label(x), lambda m, x=x: facts(m)[x], part=x) for x in parts]
    return [Case("sample(temperature=0), the tokens of 4 x 2 completions", greedy), *cases]


def rollout_by_hand(seed: int) -> Rollout:
    tokens = torch.randint(100, (6, 12), generator=torch.Generator().manual_seed(seed))
    starts, ends = torch.tensor([0, 2, 4, 1, 0, 3]), torch.tensor([7, 3, 1, 5, 2, 7])
    return Rollout(
        prompt_ids=tokens[:, :5],
        prompt_mask=torch.arange(5) >= starts[:, None],
        completion_ids=tokens[:, 5:],
        completion_mask=torch.arange(7) < ends[:, None],
        logprobs=torch.zeros(6, 7),
        truncated=torch.zeros(6).bool(),
        texts=[""] * 6,
    )


def logprobs(seed: int) -> list[Case]:
    def scored(module, temperature):
        model, _ = loaded()
        values = module.completion_logprobs(model, rollout_by_hand(seed), temperature)
        weights = torch.linspace(-1, 1, values.numel()).view(values.shape)
        slopes = torch.autograd.grad((values * weights).sum(), list(model.parameters()))
        norms = [slope.norm() for slope in slopes]
        return {"logprobs": values, "gradient norms": norms, "dtype": str(values.dtype)}

    label = "completion_logprobs at {}".format
    return [Case(label(t), scored, (t,), 1e-3, label(t)) for t in (1.0, 0.6)]


def batches(seed: int) -> list[Case]:
    def properties(module, budget, block):
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

    sizes = [(20, 1), (30, 1), (5, 1), (40, 2), (36, 3)]
    label = "micro_batches(rollout, {}, block={})".format
    return [Case(label(*x), properties, x) for x in sizes]


SCORE = "completion_logprobs predicting_states"
QUESTIONS = {
    "Q1": Question("common.py", "positions draw", draws),
    "Q2": Question("common.py", "sample", samples),
    "Q3": Question("common.py", SCORE, logprobs),
    "Q4": Question("common.py", "micro_batches", batches),
}
