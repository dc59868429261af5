"""Sampling and log-probs against Hugging Face's own generate, brute force, and statistics."""

import math

import pytest
import torch

import common
from common import Rollout, completion_logprobs, sample

PROMPTS = ["7", "12+5=", "a longer prompt, of quite another length: ", "1+1="]


def naive_logprobs(model, rollout, temperature=1.0):
    """The full log-softmax, one unpadded row at a time."""
    out = torch.zeros(rollout.completion_mask.shape)
    for i in range(len(rollout.texts)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        completion = rollout.completion_ids[i][rollout.completion_mask[i]]
        logits = model(torch.cat([prompt, completion])[None]).logits[0].float() / temperature
        logprobs = logits.log_softmax(-1)
        for t, token in enumerate(completion):
            out[i, t] = logprobs[len(prompt) - 1 + t, token]
    return out


def test_greedy_equals_generate(loaded):
    model, tokenizer = loaded
    ours = sample(model, tokenizer, PROMPTS, 2, 24, temperature=0)
    stop = common.stop_token_ids(model, tokenizer)
    for row in range(8):
        prompt = tokenizer(PROMPTS[row // 2], return_tensors="pt").input_ids
        theirs = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False,
            eos_token_id=stop, pad_token_id=0,
        )[0, prompt.shape[1] :]  # fmt: skip
        length = int(ours.completion_mask[row].sum())
        assert ours.completion_ids[row, :length].tolist() == theirs[:length].tolist()
        assert length == len(theirs)


def test_some_rows_end_early_and_some_do_not(loaded):
    """The tests below would prove little if no row, or every row, came to an EOS."""
    model, tokenizer = loaded
    rollout = sample(model, tokenizer, PROMPTS, 64, 24)
    assert 0.02 < rollout.truncated.float().mean() < 0.98


def test_most_rows_of_llama_end_early(model_dirs):
    """So that the cache is cut down several times, which the tests below then cover."""
    model, tokenizer = common.load_model(str(model_dirs["llama"]), torch.device("cpu"))
    rollout = sample(model, tokenizer, PROMPTS, 64, 24)
    assert rollout.truncated.float().mean() < 0.3


def test_sampled_logprobs_equal_scored_and_naive(loaded):
    model, tokenizer = loaded
    for temperature in (1.0, 0.7, 1.3):
        rollout = sample(model, tokenizer, PROMPTS, 16, 24, temperature)
        scored = completion_logprobs(model, rollout, temperature)
        torch.testing.assert_close(rollout.logprobs, scored, atol=1e-4, rtol=0)
        naive = naive_logprobs(model, rollout, temperature)
        torch.testing.assert_close(scored, naive, atol=1e-5, rtol=1e-5)
    assert (scored[~rollout.completion_mask] == 0).all()


@pytest.mark.parametrize("chunk", [2**24, 1000])  # in one piece; in pieces of three tokens
def test_gradients_equal_naive(loaded, monkeypatch, chunk):
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", chunk)
    model, tokenizer = loaded
    rollout = sample(model, tokenizer, PROMPTS, 3, 12)
    weight = torch.randn(rollout.completion_mask.shape)

    def gradient(logprobs):
        model.zero_grad()
        (logprobs * weight).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    ours = gradient(completion_logprobs(model, rollout, 0.8))
    naive = gradient(naive_logprobs(model, rollout, 0.8))
    assert (ours - naive).norm() < 1e-5 * naive.norm()
    wrong = gradient(naive_logprobs(model, rollout, 1.0))
    assert (wrong - naive).norm() > 1e-2 * naive.norm()


def test_capped_logits_are_scored_as_they_are(tmp_path):
    """Gemma 2 bends its logits after the head: head(states) alone would be wrong."""
    from conftest import SIZES
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = SIZES | {"initializer_range": 0.02, "head_dim": 8, "tie_word_embeddings": False}
    config = Gemma2Config(**sizes, final_logit_softcapping=30.0, eos_token_id=256)
    model, tokenizer = Gemma2ForCausalLM(config).eval(), common.tiny_tokenizer()
    assert not common.head_gives_logits(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    rollout = sample(model, tokenizer, PROMPTS, 4, 12)
    scored = completion_logprobs(model, rollout)
    torch.testing.assert_close(scored, rollout.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(scored, naive_logprobs(model, rollout), atol=1e-5, rtol=1e-5)
    assert rollout.logprobs.std() > 0.5


def test_head_alone_is_recognised(loaded):
    assert common.head_gives_logits(loaded[0])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_frequencies_match_the_distribution(small, temperature):
    """Chi-square over the first token and, given the commonest first token, over the second."""
    model, tokenizer = small
    n = 20_000
    rollout = sample(model, tokenizer, ["12+5="], n, 2, temperature)
    prompt = tokenizer(["12+5="], return_tensors="pt").input_ids
    first = rollout.completion_ids[:, 0]
    assert chi_square_ok(first, model(prompt).logits[0, -1] / temperature)
    common_first = first[first != 256].mode().values
    second = rollout.completion_ids[first == common_first, 1]
    assert len(second) > 100
    logits = model(torch.cat([prompt, common_first.view(1, 1)], 1)).logits[0, -1]
    assert chi_square_ok(second, logits / temperature)
    assert not chi_square_ok(first, model(prompt).logits[0, -1] / (temperature * 1.15))


def chi_square_ok(tokens, logits):
    """Is the statistic within five of its standard deviations? Rare tokens share a bin."""
    expected = logits.softmax(-1) * len(tokens)
    observed = torch.bincount(tokens, minlength=len(expected)).float()
    often = expected >= 5
    e = torch.cat([expected[often], expected[~often].sum()[None]])
    o = torch.cat([observed[often], observed[~often].sum()[None]])
    e, o = e[e > 0], o[e > 0]
    statistic, freedom = ((o - e) ** 2 / e).sum().item(), len(e) - 1
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def test_eos_is_inside_the_mask_and_nothing_after_it(loaded):
    model, tokenizer = loaded
    stop = common.stop_token_ids(model, tokenizer)
    rollout = sample(model, tokenizer, PROMPTS, 64, 24)
    for ids, mask, cut in zip(
        rollout.completion_ids, rollout.completion_mask, rollout.truncated, strict=True
    ):
        n = int(mask.sum())
        assert mask[:n].all() and not mask[n:].any()
        ends = [i for i, token in enumerate(ids[:n].tolist()) if token in stop]
        assert ends == ([] if cut else [n - 1])
    assert all((r.logprobs[~r.completion_mask] == 0).all() for r in [rollout])


def test_every_eos_id_of_the_generation_config_stops(model_dirs):
    model, tokenizer = common.load_model(str(model_dirs["gemma"]), torch.device("cpu"))
    assert common.stop_token_ids(model, tokenizer) == [10, 256]
    rollout = sample(model, tokenizer, PROMPTS, 64, 24)
    last = rollout.completion_ids.gather(1, rollout.completion_mask.sum(1, keepdim=True) - 1)
    assert {10, 256} <= set(last.flatten().tolist())


def test_a_model_without_any_eos_samples_to_the_end(model_dirs):
    model, tokenizer = common.load_model(str(model_dirs["gpt2"]), torch.device("cpu"))
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    rollout = sample(model, tokenizer, PROMPTS, 4, 12)
    assert rollout.truncated.all() and rollout.completion_mask.all()


def test_pad_token_that_equals_eos_changes_nothing(small):
    model, tokenizer = small
    torch.manual_seed(3)
    before = sample(model, tokenizer, PROMPTS, 8, 16)
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(3)
    after = sample(model, tokenizer, PROMPTS, 8, 16)
    assert after.texts == before.texts
    assert torch.equal(after.completion_mask, before.completion_mask)
    assert not before.truncated.all()
    torch.testing.assert_close(
        completion_logprobs(model, after), completion_logprobs(model, before), atol=0, rtol=0
    )


def test_rows_do_not_depend_on_the_other_prompts(loaded):
    model, tokenizer = loaded
    together = sample(model, tokenizer, PROMPTS, 1, 20, temperature=0)
    for i, prompt in enumerate(PROMPTS):
        alone = sample(model, tokenizer, [prompt], 1, 20, temperature=0)
        n = int(alone.completion_mask.sum())
        assert alone.texts[0] == together.texts[i]
        torch.testing.assert_close(
            alone.logprobs[0], together.logprobs[i, :n], atol=1e-4, rtol=0
        )
        scored = completion_logprobs(model, together)[i, :n]
        torch.testing.assert_close(completion_logprobs(model, alone)[0], scored, atol=1e-4, rtol=0)


def test_texts_are_the_tokens_without_eos(small):
    model, tokenizer = small
    rollout = sample(model, tokenizer, PROMPTS, 16, 16)
    for i, text in enumerate(rollout.texts):
        ids = rollout.completion_ids[i][rollout.completion_mask[i]].tolist()
        ids = ids if rollout.truncated[i] else ids[:-1]
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
        assert "endoftext" not in text


def test_rows_and_cat_keep_every_log_prob(small):
    model, tokenizer = small
    a = sample(model, tokenizer, PROMPTS[:1], 6, 20)
    b = sample(model, tokenizer, PROMPTS[1:], 2, 9)
    both = Rollout.cat([a, b])
    expected = torch.cat([completion_logprobs(model, r).sum(1) for r in (a, b)])
    torch.testing.assert_close(completion_logprobs(model, both).sum(1), expected, atol=1e-4, rtol=0)
    order = torch.randperm(12)
    shuffled = both.rows(order)
    torch.testing.assert_close(
        completion_logprobs(model, shuffled).sum(1), expected[order], atol=1e-4, rtol=0
    )
    assert shuffled.texts == [both.texts[i] for i in order]
    chosen = torch.tensor([True] + [False] * 10 + [True])
    assert both.rows(chosen).texts == [both.texts[0], both.texts[-1]]
    one = both.rows(torch.tensor([0]))
    assert one.prompt_ids.shape[1] == 1  # "7": the columns of longer prompts are gone


def test_a_rollout_by_hand(small):
    """As a course would write one: without the optional field, and with masks of 0 and 1."""
    model, tokenizer = small
    a = common.encode(model, tokenizer, ["1+1=", "12+5="], ["2", "17"])
    b = Rollout(
        a.prompt_ids, a.prompt_mask.long(), a.completion_ids, a.completion_mask.long(), a.logprobs,
        a.texts,
    )  # fmt: skip
    assert b.truncated.tolist() == [False, False]
    assert torch.equal(completion_logprobs(model, a), completion_logprobs(model, b))
    assert b.rows(torch.tensor([1])).texts == ["17"]


def test_encode_ends_each_completion_with_eos(small):
    model, tokenizer = small
    rollout = common.encode(model, tokenizer, ["1+1=", "12+5="], ["2", "17"])
    assert rollout.completion_ids[rollout.completion_mask].tolist() == [17, 256, 16, 22, 256]
    naive = naive_logprobs(model, rollout)
    torch.testing.assert_close(completion_logprobs(model, rollout), naive, atol=1e-5, rtol=1e-5)


def test_chat_template_is_applied_once(model_dirs):
    """A tokenizer that begins every text with a BOS (here 257), and a template that does too."""
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = common.load_model(str(model_dirs["llama"]), torch.device("cpu"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", 257)]
    )
    ids, mask = common.encode_prompts(model, tokenizer, ["1+1=", "7"], room=1)
    assert tokenizer.decode(ids[0][mask[0]]) == "<|pad|>1+1="
    tokenizer.chat_template = (
        "<|pad|>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[bot]{% endif %}"
    )
    ids, mask = common.encode_prompts(model, tokenizer, ["1+1=", "7"], room=1)
    assert tokenizer.decode(ids[0][mask[0]]) == "<|pad|>[user]1+1=[bot]"
    assert tokenizer.decode(ids[1][mask[1]]) == "<|pad|>[user]7[bot]"


def test_a_prompt_that_does_not_fit_is_refused(small):
    model, tokenizer = small
    sample(model, tokenizer, ["1" * 240], 1, 16)
    with pytest.raises(common.UserError, match=r"241 tokens.*16.*256.*--max-new-tokens"):
        sample(model, tokenizer, ["1" * 241], 1, 16)


def test_dropout_is_off(model_dirs):
    model, _ = common.load_model(str(model_dirs["gpt2"]), torch.device("cpu"))
    model.train()
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_gradient_checkpointing_changes_no_sample_and_no_gradient(model_dirs, family):
    """transformers drops the cache where it checkpoints: samples would not see the prompt."""
    samples, gradients = [], []
    for checkpointing in (False, True):
        model, tokenizer = common.load_model(
            str(model_dirs[family]), torch.device("cpu"), grad_checkpointing=checkpointing
        )
        torch.manual_seed(0)
        samples.append(sample(model, tokenizer, PROMPTS, 4, 12))
        assert model.training == checkpointing  # transformers checkpoints in train mode only
        completion_logprobs(model, samples[-1]).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(samples[0].completion_ids, samples[1].completion_ids)
    assert torch.equal(samples[0].logprobs, samples[1].logprobs)
    difference = (gradients[1] - gradients[0]).norm()
    assert 0 < difference < 1e-5 * gradients[0].norm()  # not 0: another order of sums


def test_a_prompt_is_read_once_when_sampled_and_when_scored(loaded):
    """4 prompts of 4 rows each: their tokens go through the model once, not 4 times."""
    model, tokenizer = loaded
    tokens = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].numel()))
    rollout = sample(model, tokenizer, PROMPTS, 4, 12)
    prompt_tokens, T = 4 * rollout.prompt_ids.shape[1], rollout.completion_ids.shape[1]
    assert tokens[0] == prompt_tokens
    common.head_gives_logits(model)  # tried once
    tokens.clear()
    completion_logprobs(model, rollout)
    hook.remove()
    assert tokens == [prompt_tokens, 16 * (T - 1)]


def test_gradients_repeat_bit_for_bit(small):
    """Where the gradients of many rows meet, in a shared prompt, threads may not take turns."""
    model, tokenizer = small
    rollout = sample(model, tokenizer, ["x" * 240], 64, 4)
    threads, gradients = torch.get_num_threads(), []
    torch.set_num_threads(2)
    for _ in range(8):
        model.zero_grad()
        completion_logprobs(model, rollout).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_masked_mean():
    x, mask = torch.tensor([[1.0, 5.0], [3.0, 7.0]]), torch.tensor([[1, 0], [1, 0]])
    assert common.masked_mean(x, mask) == 2.0
    assert common.masked_mean(x, torch.zeros(2, 2)) == 0.0


def test_micro_batches_hold_every_row_once_within_the_budget(small):
    model, tokenizer = small
    rollout = sample(model, tokenizer, PROMPTS, 16, 24)
    batches = common.micro_batches(rollout, 100)
    assert sorted(torch.cat(batches).tolist()) == list(range(64))
    assert len(batches) > 1
    for rows in batches:
        mb = rollout.rows(rows)
        longest = (mb.prompt_mask.sum(1) + mb.completion_mask.sum(1)).max()
        assert len(rows) * longest <= 100 or len(rows) == 1
    assert len(common.micro_batches(rollout, 1)) == 64


@pytest.mark.cuda
def test_cuda_samples_and_scores_alike(model_dirs):
    """bf16 arithmetic: sampled and scored log-probs agree to its precision."""
    model, tokenizer = common.load_model(str(model_dirs["llama"]), torch.device("cuda"))
    rollout = sample(model, tokenizer, PROMPTS, 16, 24)
    scored = completion_logprobs(model, rollout)
    assert scored.dtype == torch.float32
    assert (scored - rollout.logprobs).abs()[rollout.completion_mask].mean() < 0.05
    scored.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
