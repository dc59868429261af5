"""Sampling and log-probs against transformers' generate, brute force, and statistics."""

import itertools
import math

import pytest
import torch
from conftest import FAMILIES
from helpers import PROMPTS, close, gradient, make_model, make_rollout, naive_logprobs

import common
from common import Rollout, completion_logprobs, sample
from tasks.prompts import stop_token_ids
from tasks.tiny import tiny_tokenizer

# ---- sampling ----


def chi_square_ok(tokens, logits):
    """Is the statistic within five of its standard deviations? Rare tokens share a bin."""
    expected = logits.softmax(-1) * len(tokens)
    observed = torch.bincount(tokens, minlength=len(expected)).float()
    often = expected >= 5
    e = torch.cat([expected[often], expected[~often].sum()[None]])
    o = torch.cat([observed[often], observed[~often].sum()[None]])
    statistic, freedom = ((o - e) ** 2 / e).sum().item(), len(e) - 1
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_frequencies_match_the_distribution(small, temperature):
    """Chi-square over the first token and, given the commonest first token, over the second."""
    model, tokenizer = small
    rollout = sample(model, tokenizer, ["12+5="], 10_000, 2, temperature)
    prompt = rollout.prompt_ids[:1]
    first = rollout.completion_ids[:, 0]
    logits = model(prompt).logits[0, -1] / temperature
    assert chi_square_ok(first, logits) and not chi_square_ok(first, logits / 1.15)
    commonest = first[first != 256].mode().values
    second = rollout.completion_ids[first == commonest, 1]
    assert len(second) > 100
    logits = model(torch.cat([prompt, commonest.view(1, 1)], 1)).logits[0, -1] / temperature
    assert chi_square_ok(second, logits) and not chi_square_ok(second, logits.roll(1))


def test_rare_tokens_are_drawn_as_often_as_they_should_be(monkeypatch):
    """5,000 tokens of probability 1e-9 behind a common one. In float32, numbers just below 1 are
    6e-8 apart: of the 5,000 only 84 would ever be drawn."""
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **kind: 1 - 5e-6 * rand(*size, **kind))
    logits = torch.tensor([1.0] + [1e-9] * 5000).log()
    tokens, _ = common.draw(logits.expand(400, -1), 1.0)
    assert len(tokens.unique()) > 350  # 400 draws of 5,000: 384
    rare = tokens > 0
    assert rare.sum() > 390 and (tokens[rare] > 2500).double().mean().sub(0.5).abs() < 0.1


def test_eos_is_in_the_mask_and_in_no_text_and_nothing_follows_it(loaded):
    """The mask ends with the EOS, the text before it; behind it everything is 0."""
    model, tokenizer = loaded
    stop, ends = stop_token_ids(model, tokenizer), set()
    rollout = sample(model, tokenizer, PROMPTS, 64, 24)
    assert rollout.truncated.any() and not rollout.truncated.all()
    for i, text in enumerate(rollout.texts):
        mask, ids = rollout.completion_mask[i], rollout.completion_ids[i].tolist()
        n = int(mask.sum())
        assert mask[:n].all() and not mask[n:].any() and not rollout.logprobs[i, n:].any()
        places = [t for t, token in enumerate(ids[:n]) if token in stop]
        assert places == ([] if rollout.truncated[i] else [n - 1])
        assert n == 24 or not rollout.truncated[i]
        assert text == tokenizer.decode(ids[: n - len(places)])
        ends |= {ids[t] for t in places}
    assert ends == set(stop)  # each of several EOS ids ends a row
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    rollout = sample(model, tokenizer, PROMPTS, 4, 12)
    assert rollout.truncated.all() and rollout.completion_mask.all()


def test_masks_come_from_the_sampler_not_from_the_values_of_tokens(small):
    """A pad token that is the EOS changes nothing, nor do EOS and pad tokens inside a prompt."""
    model, tokenizer = small
    prompts = [*PROMPTS, "a<|endoftext|>b<|pad|>c"]
    rollouts = []
    for tokenizer.pad_token in ("<|pad|>", "<|endoftext|>"):
        torch.manual_seed(3)
        rollouts.append(sample(model, tokenizer, prompts, 8, 16))
    a, b = rollouts
    assert a.texts == b.texts and not a.truncated.all()
    assert torch.equal(a.completion_mask, b.completion_mask)
    assert a.prompt_mask.sum(1)[-1] == 5
    close(b.logprobs, naive_logprobs(model, b), 1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_logits_are_an_error(model_dirs, value):
    """Also if they come late: here from the embedding of a token that no prompt has."""
    model, tokenizer = common.load_model(model_dirs["llama"], "cpu")
    model.get_input_embeddings().weight.data[30:90] = value
    sample(model, tokenizer, PROMPTS[:2], 16, 1)
    with pytest.raises(RuntimeError, match="the logits are non-finite"):
        sample(model, tokenizer, PROMPTS[:2], 16, 8)


# ---- log-probs ----


def test_a_prompt_is_read_once_per_group_when_sampled_and_when_scored(loaded):
    """Two equal prompts in different groups are two groups."""
    model, tokenizer = loaded
    common.body_and_head(model)  # looks once at four tokens
    tokens, embedding = [], model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].numel()))
    rollout = sample(model, tokenizer, [PROMPTS[0], *PROMPTS], 4, 12)
    prompt_tokens, T = 5 * rollout.prompt_ids.shape[1], rollout.completion_ids.shape[1]
    assert tokens[0] == prompt_tokens
    assert sum(tokens[1:]) <= rollout.completion_mask.sum()  # rows that have ended are gone
    assert rollout.group.tolist() == [b for b in range(5) for _ in range(4)]
    tokens.clear()
    completion_logprobs(model, rollout)
    assert tokens == [prompt_tokens, 20 * (T - 1)]


def test_the_logits_never_exist_as_a_whole(small, monkeypatch):
    model, tokenizer = small
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 10 * 258)
    rollout, rows = sample(model, tokenizer, PROMPTS, 4, 12), []
    common.body_and_head(model)
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    completion_logprobs(model, rollout).sum().backward()
    assert max(rows) == 10 and sum(rows) == 2 * rollout.completion_mask.sum()  # once more backward


def test_micro_batches_change_no_logprob_and_no_gradient(small):
    """Though they cut groups in the middle."""
    model, tokenizer = small
    rollout = sample(model, tokenizer, PROMPTS, 6, 16)
    batches = common.micro_batches(rollout, 150)
    parts_of_groups = sum(len(rollout.group[rows].unique()) for rows in batches)
    assert len(batches) > 3 and parts_of_groups > 4
    frozen = common.frozen_logprobs(model, rollout, 150, temperature=0.7)
    assert not frozen.requires_grad
    close(frozen, completion_logprobs(model, rollout, 0.7).detach(), 1e-4)
    weight, parts = torch.randn(rollout.logprobs.shape), 0.0
    for rows in batches:
        logprobs = completion_logprobs(model, rollout.select(rows))
        parts += gradient(model, (logprobs * weight[rows, : logprobs.shape[1]]).sum())
    whole = gradient(model, (completion_logprobs(model, rollout) * weight).sum())
    assert (parts - whole).norm() < 1e-5 * whole.norm()


def test_gradient_checkpointing_changes_no_sample_and_no_gradient(model_dirs, family):
    """transformers drops the cache where it checkpoints: samples would not see the prompt."""
    samples, gradients = [], []
    for on in (False, True):
        model, tokenizer = common.load_model(model_dirs[family], "cpu", grad_checkpointing=on)
        torch.manual_seed(0)
        samples.append(sample(model, tokenizer, PROMPTS, 4, 12))
        assert model.training == on  # transformers checkpoints in train mode only
        scored = completion_logprobs(model, samples[-1])
        close(scored, samples[0].logprobs, 1e-4)
        gradients.append(gradient(model, scored.sum()))
    assert torch.equal(samples[0].completion_ids, samples[1].completion_ids)
    assert torch.equal(samples[0].logprobs, samples[1].logprobs)
    difference = (gradients[1] - gradients[0]).norm()
    assert 0 < difference < 1e-5 * gradients[0].norm()  # not 0: another order of sums


def test_gradients_repeat_bit_for_bit(small):
    """Where the gradients of many rows meet, in a shared prompt, threads may not take turns."""
    model, tokenizer = small
    rollout = sample(model, tokenizer, ["x" * 240], 64, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    gradients = [gradient(model, completion_logprobs(model, rollout).sum()) for _ in range(3)]
    torch.set_num_threads(threads)
    assert all(torch.equal(other, gradients[0]) for other in gradients)


def test_logprobs_are_float32_whatever_the_logits_are():
    """bf16, as under autocast: eight bits are too few for a log-softmax."""
    model = make_model("qwen2").to(torch.bfloat16).eval()
    rollout = sample(model, tiny_tokenizer(), PROMPTS, 2, 6)
    logprobs = completion_logprobs(model, rollout)
    assert logprobs.dtype == rollout.logprobs.dtype == torch.float32


@pytest.mark.cuda
def test_cuda_samples_and_scores_alike(model_dirs):
    """bf16 arithmetic: sampled and scored log-probs agree to its precision."""
    model, tokenizer = common.load_model(model_dirs["llama"], "cuda")
    rollout = sample(model, tokenizer, PROMPTS, 16, 24)
    scored = completion_logprobs(model, rollout)
    assert scored.dtype == torch.float32
    assert (scored - rollout.logprobs).abs()[rollout.completion_mask].mean() < 0.05
    scored.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


# ---- rollouts ----


def test_rollouts_that_are_joined_shuffled_and_cut_score_as_before(small):
    """Groups of different rollouts stay apart, whatever their numbers; rows keep what is theirs."""
    model, _ = small
    parts = [sample(*small, [PROMPTS[i]], 3, T) for i, T in enumerate((20, 9, 1, 5))]
    joined = Rollout.cat([Rollout.cat(parts[:2]), parts[2], parts[3], parts[0]])
    assert len(joined.group.unique()) == 5
    assert joined.texts == [text for i in (0, 1, 2, 3, 0) for text in parts[i].texts]
    close(completion_logprobs(model, joined), joined.logprobs, 1e-4)
    order = torch.randperm(15)
    shuffled = joined.select(order)
    close(completion_logprobs(model, shuffled), joined.logprobs[order], 1e-4)
    for name in ("truncated", "group"):
        assert torch.equal(getattr(shuffled, name), getattr(joined, name)[order])
    assert shuffled.texts == [joined.texts[i] for i in order]
    first = joined.select(torch.arange(15) == 0)  # of "7": the columns of longer rows are gone
    n = int(joined.completion_mask[0].sum())
    assert first.prompt_ids.shape == (1, 1) and first.logprobs.shape == (1, n)
    close(completion_logprobs(model, first), joined.logprobs[:1, :n], 1e-4)


def test_a_rollout_by_hand(small):
    """Its masks may be of 0 and 1, its rows are alone unless it says so, its tokens may be EOS and
    pad, and its completions empty."""
    prompts = [[0, 55], [55], [256, 1, 257], [256, 1, 257]]
    by_hand = make_rollout(prompts, [[65, 256, 66], [], [257, 7], [0]])
    assert by_hand.group.tolist() == [0, 1, 2, 3] and by_hand.pictures == [None] * 4
    expected = naive_logprobs(small[0], by_hand)
    close(completion_logprobs(small[0], by_hand), expected, 1e-4)
    masks = {name: getattr(by_hand, name).long() for name in ("prompt_mask", "completion_mask")}
    grouped = Rollout(**vars(by_hand) | masks | {"group": torch.tensor([5, 3, 4, 4])})
    close(completion_logprobs(small[0], grouped), expected, 1e-4)


@pytest.mark.parametrize("block", [1, 4])
def test_micro_batches_hold_every_row_once_within_the_budget(small, block):
    """Every row is in one micro-batch, blocks stay whole, and no two batches could be one."""
    rollout = sample(*small, PROMPTS, 16, 24)
    lengths = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1).sum(1)
    batches = common.micro_batches(rollout, 300, block)
    assert sorted(torch.cat(batches).tolist()) == list(range(64))
    for rows in batches:
        assert len(rows) * lengths[rows].max() <= 300 or len(rows) == block
        assert (rows.view(-1, block) % block == torch.arange(block)).all()
        assert (rows.diff() > 0).all()  # rows of a group stay adjacent
    for a, b in itertools.pairwise(batches):  # a could not hold one more block of b
        shortest = lengths[b].view(-1, block).amax(1).min()
        assert (len(a) + block) * shortest > 300 and lengths[a].max() <= shortest
    assert len(common.micro_batches(rollout, 1, block)) == 64 // block


# ---- every family ----

OTHERS = {  # model type: what its config needs; a window of 8 is shorter than a prompt
    "bloom": {}, "falcon": {}, "gpt_neox": {}, "gptj": {"rotary_dim": 4}, "olmo2": {}, "phi3": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "qwen3": {}, "smollm3": {}, "stablelm": {},
    "gemma2": {"final_logit_softcapping": 50.0, "sliding_window": 8, "head_dim": 8},
    "gemma3_text": {"sliding_window": 8, "head_dim": 8}, "mistral": {"sliding_window": 8},
    "granite": {"logits_scaling": 4.0}, "cohere": {"logit_scale": 0.5},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 8},
    "deepseek_v3": {
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=[*FAMILIES, *OTHERS])
def every(request, model_dirs, tmp_path_factory):
    """(model, tokenizer) of every family; 31 ids end a row, so that most rows end early."""
    directory = model_dirs.get(request.param)
    if directory is None:
        directory = tmp_path_factory.mktemp(request.param)
        torch.manual_seed(1)
        make_model(request.param, **OTHERS[request.param]).save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)
    model, tokenizer = common.load_model(directory, "cpu")
    model.generation_config.eos_token_id = [256, *range(100, 130)]
    return model, tokenizer


def test_greedy_equals_generate(every):
    """At temperature 0 the tokens are those of transformers' generate, the log-probs those at 1."""
    model, tokenizer = every
    ours = sample(model, tokenizer, PROMPTS, 2, 16, temperature=0)
    close(ours.logprobs, naive_logprobs(model, ours), 1e-4)
    for i, text in enumerate(PROMPTS):
        prompt = tokenizer(text, return_tensors="pt").input_ids
        theirs = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False,
            eos_token_id=stop_token_ids(model, tokenizer), pad_token_id=0,
        )[0, prompt.shape[1] :]  # fmt: skip
        for row in (2 * i, 2 * i + 1):
            found = ours.completion_ids[row][ours.completion_mask[row]]
            assert found.tolist() == theirs.tolist()


def test_sampled_scored_and_naive_logprobs_agree(every):
    """Log-probs when sampled, when scored, and row by row without padding are the same."""
    model, tokenizer = every
    lengths = set()
    for temperature in (0.7, 1.3):
        rollout = sample(model, tokenizer, PROMPTS, 6, 16, temperature)
        scored = completion_logprobs(model, rollout, temperature)
        close(rollout.logprobs, scored, 1e-4)
        close(scored, naive_logprobs(model, rollout, temperature), 2e-5)
        lengths |= set(rollout.completion_mask.sum(1).tolist())
    assert len(lengths) >= 8 and rollout.logprobs.std() > 0.3  # else this would prove little


def test_gradients_equal_naive(every, monkeypatch):
    """Also through a prompt that rows share, and where the head sees three tokens at a time."""
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 1000)
    model, tokenizer = every
    rollout = sample(model, tokenizer, PROMPTS, 2, 8)
    weight = torch.randn(rollout.completion_mask.shape)
    ours = gradient(model, (completion_logprobs(model, rollout, 0.8) * weight).sum())
    naive = gradient(model, (naive_logprobs(model, rollout, 0.8) * weight).sum())
    assert (ours - naive).norm() < 1e-5 * naive.norm()


def test_the_head_is_applied_alone_unless_the_model_changes_its_logits(every):
    alone = common.body_and_head(every[0])[1] is every[0].get_output_embeddings()
    assert alone == (every[0].config.model_type not in ("gemma2", "granite", "cohere"))


def test_a_cap_is_noticed_while_the_logits_are_small():
    model = make_model("gemma2", initializer_range=0.005, head_dim=8).eval()
    assert common.body_and_head(model)[1] is not model.lm_head
