"""Sampling and log-probs against Hugging Face's own generate, brute force, and statistics."""

import itertools
import math
import re

import pytest
import torch
import transformers
from conftest import FAMILIES, SIZES
from transformers import AutoConfig, AutoModelForCausalLM

import common
from common import Rollout, completion_logprobs, sample
from tasks import UserError
from tasks.tiny import tiny_tokenizer

PROMPTS = ["7", "12+5=", "a longer prompt, of quite another length: ", "1+1="]
OTHERS = {  # model type: what its config needs beside SIZES; a window of 8 is shorter than a prompt
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
BENT = {"gemma2", "granite", "cohere"}  # their logits are not head(states) alone


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


def gradient(model, scalar):
    model.zero_grad()
    scalar.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def close(a, b, atol):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def save(model, directory):
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def made(model_type, **config):
    sizes = SIZES | {"eos_token_id": 256, "bos_token_id": None, "pad_token_id": 257}
    config = AutoConfig.for_model(model_type, **sizes | {"init_std": 0.3} | config)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(params=[*FAMILIES, *OTHERS])
def every(request, model_dirs, tmp_path):
    """(model, tokenizer) of every family; 31 ids end a row, so that most rows end early."""
    directory = model_dirs.get(request.param)
    if directory is None:
        torch.manual_seed(1)
        directory = save(made(request.param, **OTHERS[request.param]), tmp_path)
    model, tokenizer = common.load_model(str(directory), "cpu")
    model.generation_config.eos_token_id = [256, *range(100, 130)]
    return model, tokenizer


# ---- every family ----


def test_greedy_equals_generate(every):
    """At temperature 0 the tokens are those of transformers' generate, and log-probs at 1."""
    model, tokenizer = every
    ours = sample(model, tokenizer, PROMPTS, 2, 16, temperature=0)
    for row in range(8):
        prompt = tokenizer(PROMPTS[row // 2], return_tensors="pt").input_ids
        theirs = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False,
            eos_token_id=common.stop_token_ids(model, tokenizer), pad_token_id=0,
        )[0, prompt.shape[1] :]  # fmt: skip
        assert ours.completion_ids[row][ours.completion_mask[row]].tolist() == theirs.tolist()
    close(ours.logprobs, naive_logprobs(model, ours), 1e-4)  # of the untempered distribution


def test_sampled_scored_and_naive_logprobs_agree(every):
    """Log-probs when sampled, when scored, and row by row without padding are the same."""
    model, tokenizer = every
    lengths = set()
    for temperature in (1.0, 0.7, 1.3):
        rollout = sample(model, tokenizer, PROMPTS, 6, 16, temperature)
        scored = completion_logprobs(model, rollout, temperature)
        close(rollout.logprobs, scored, 1e-4)
        close(scored, naive_logprobs(model, rollout, temperature), 2e-5)
        assert (scored[~rollout.completion_mask] == 0).all()
        lengths |= set(rollout.completion_mask.sum(1).tolist())
    assert len(lengths) >= 8 and rollout.logprobs.std() > 0.3  # else this would prove little


@pytest.mark.parametrize("chunk", [2**24, 1000])  # in one piece; in pieces of three tokens
def test_gradients_equal_naive(every, monkeypatch, chunk):
    """Gradients are those of the full log-softmax, one unpadded row at a time."""
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", chunk)
    model, tokenizer = every
    rollout = sample(model, tokenizer, PROMPTS, 2, 8)
    weight = torch.randn(rollout.completion_mask.shape)
    ours = gradient(model, (completion_logprobs(model, rollout, 0.8) * weight).sum())
    naive = gradient(model, (naive_logprobs(model, rollout, 0.8) * weight).sum())
    assert (ours - naive).norm() < 1e-5 * naive.norm()
    wrong = gradient(model, (naive_logprobs(model, rollout) * weight).sum())
    assert (wrong - naive).norm() > 1e-2 * naive.norm()


def test_only_bent_logits_take_the_long_way(every):
    assert (common.body_and_head(every[0])[1] is every[0].get_output_embeddings()) == (every[0].config.model_type not in BENT)


def test_a_cap_is_noticed_while_the_logits_are_small():
    model = made("gemma2", initializer_range=0.02, head_dim=8).eval()
    assert not common.head_gives_logits(model)


# ---- sampling ----


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_frequencies_match_the_distribution(small, temperature):
    """Chi-square over the first token and, given the commonest first token, over the second."""
    model, tokenizer = small
    rollout = sample(model, tokenizer, ["12+5="], 20_000, 2, temperature)
    prompt = tokenizer(["12+5="], return_tensors="pt").input_ids
    first = rollout.completion_ids[:, 0]
    assert chi_square_ok(first, model(prompt).logits[0, -1] / temperature)
    assert not chi_square_ok(first, model(prompt).logits[0, -1] / (temperature * 1.15))
    common_first = first[first != 256].mode().values
    second = rollout.completion_ids[first == common_first, 1]
    assert len(second) > 100
    logits = model(torch.cat([prompt, common_first.view(1, 1)], 1)).logits[0, -1]
    assert chi_square_ok(second, logits / temperature)


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


def test_eos_is_in_the_mask_and_in_no_text_and_nothing_follows_it(loaded):
    """The mask ends with the EOS, the text before it; behind it everything is 0."""
    model, tokenizer = loaded
    stop = common.stop_token_ids(model, tokenizer)
    rollout = sample(model, tokenizer, PROMPTS, 64, 24)
    assert 0.02 < rollout.truncated.float().mean() < 0.98  # some rows end early, some do not
    for i, text in enumerate(rollout.texts):
        mask, ids = rollout.completion_mask[i], rollout.completion_ids[i].tolist()
        n = int(mask.sum())
        assert mask[:n].all() and not mask[n:].any() and not rollout.logprobs[i, n:].any()
        ends = [t for t, token in enumerate(ids[:n]) if token in stop]
        assert ends == ([] if rollout.truncated[i] else [n - 1])
        kept = ids[:n] if rollout.truncated[i] else ids[: n - 1]
        assert text == tokenizer.decode(kept, skip_special_tokens=True)


def test_every_eos_id_of_the_generation_config_stops_and_there_may_be_none(model_dirs):
    """Each of a list of EOS ids ends a row; without any, all rows are truncated."""
    model, tokenizer = common.load_model(str(model_dirs["gemma"]), "cpu")
    assert common.stop_token_ids(model, tokenizer) == [10, 256]
    rollout = sample(model, tokenizer, PROMPTS, 64, 24)
    last = rollout.completion_ids.gather(1, rollout.completion_mask.sum(1, keepdim=True) - 1)
    assert {10, 256} <= set(last.flatten().tolist())
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    rollout = sample(model, tokenizer, PROMPTS, 4, 12)
    assert rollout.truncated.all() and rollout.completion_mask.all()


def test_pad_token_that_equals_eos_changes_nothing(small):
    """Masks come from the sampler, not from the values of tokens."""
    model, tokenizer = small
    torch.manual_seed(3)
    before = sample(model, tokenizer, PROMPTS, 8, 16)
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(3)
    after = sample(model, tokenizer, PROMPTS, 8, 16)
    assert after.texts == before.texts and not before.truncated.all()
    assert torch.equal(after.completion_mask, before.completion_mask)
    close(completion_logprobs(model, after), completion_logprobs(model, before), 0)


def test_a_prompt_is_read_once_when_sampled_and_when_scored(loaded):
    """4 prompts of 4 rows each: their tokens go through the model once, not 4 times."""
    model, tokenizer = loaded
    tokens = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].numel()))
    rollout = sample(model, tokenizer, PROMPTS, 4, 12)
    prompt_tokens, T = 4 * rollout.prompt_ids.shape[1], rollout.completion_ids.shape[1]
    assert tokens[0] == prompt_tokens
    assert sum(tokens[1:]) <= rollout.completion_mask.sum()  # rows that have ended are gone
    common.head_gives_logits(model)  # tried once
    tokens.clear()
    completion_logprobs(model, rollout)
    assert tokens == [prompt_tokens, 16 * (T - 1)]


# ---- log-probs ----


def test_the_logits_never_exist_as_a_whole(small, monkeypatch):
    model, tokenizer = small
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 10 * 258)
    rollout, rows = sample(model, tokenizer, PROMPTS, 4, 12), []
    common.head_gives_logits(model)
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    completion_logprobs(model, rollout).sum().backward()
    assert max(rows) == 10 and sum(rows) == 2 * rollout.completion_mask.sum()  # once more backward


def test_gradient_checkpointing_changes_no_sample_and_no_gradient(model_dirs, family):
    """transformers drops the cache where it checkpoints: samples would not see the prompt."""
    samples, gradients = [], []
    for checkpointing in (False, True):
        model, tokenizer = common.load_model(
            str(model_dirs[family]), "cpu", grad_checkpointing=checkpointing
        )
        torch.manual_seed(0)
        samples.append(sample(model, tokenizer, PROMPTS, 4, 12))
        assert model.training == checkpointing  # transformers checkpoints in train mode only
        gradients.append(gradient(model, completion_logprobs(model, samples[-1]).sum()))
    assert torch.equal(samples[0].completion_ids, samples[1].completion_ids)
    assert torch.equal(samples[0].logprobs, samples[1].logprobs)
    difference = (gradients[1] - gradients[0]).norm()
    assert 0 < difference < 1e-5 * gradients[0].norm()  # not 0: another order of sums


def test_scores_are_right_where_checkpointing_drops_the_cache(model_dirs):
    """In train mode with gradient checkpointing the log-probs are those of the naive way."""
    model, tokenizer = common.load_model(str(model_dirs["qwen2"]), "cpu", grad_checkpointing=True)
    rollout = sample(model, tokenizer, PROMPTS, 4, 12)
    close(completion_logprobs(model, rollout), naive_logprobs(model, rollout), 2e-5)


def test_gradients_repeat_bit_for_bit(small):
    """Where the gradients of many rows meet, in a shared prompt, threads may not take turns."""
    model, tokenizer = small
    rollout = sample(model, tokenizer, ["x" * 240], 64, 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    gradients = [gradient(model, completion_logprobs(model, rollout).sum()) for _ in range(6)]
    torch.set_num_threads(threads)
    assert all(torch.equal(other, gradients[0]) for other in gradients)


def test_frozen_logprobs_are_the_same_in_their_rows_without_gradient(small):
    """Scored in micro-batches, every row gets the log-probs it gets in one batch."""
    model, tokenizer = small
    rollout = sample(model, tokenizer, PROMPTS, 6, 20)
    frozen = common.frozen_logprobs(model, rollout, 150, temperature=0.7)
    assert not frozen.requires_grad and len(common.micro_batches(rollout, 150)) > 3
    close(frozen, completion_logprobs(model, rollout, 0.7), 1e-4)


# ---- rollouts ----


def test_rows_and_cat_keep_every_log_prob(small):
    """Rollouts that are joined, shuffled and cut score as before."""
    model, tokenizer = small
    a, b = sample(model, tokenizer, PROMPTS[:1], 6, 20), sample(model, tokenizer, PROMPTS[1:], 2, 9)
    both = Rollout.cat([a, b])
    expected = torch.cat([completion_logprobs(model, r).sum(1) for r in (a, b)])
    close(completion_logprobs(model, both).sum(1), expected, 1e-4)
    close(both.logprobs.sum(1), expected, 1e-4)
    assert both.truncated.tolist() == [*a.truncated.tolist(), *b.truncated.tolist()]
    order = torch.randperm(12)
    shuffled = both.select(order)
    close(completion_logprobs(model, shuffled).sum(1), expected[order], 1e-4)
    close(shuffled.logprobs.sum(1), expected[order], 1e-4)
    assert shuffled.texts == [both.texts[i] for i in order]
    assert torch.equal(shuffled.truncated, both.truncated[order])
    chosen = torch.tensor([True] + [False] * 10 + [True])
    assert both.select(chosen).texts == [both.texts[0], both.texts[-1]]
    one = both.select(torch.tensor([0]))  # of "7": the columns of longer rows are gone
    assert one.prompt_ids.shape[1] == 1
    assert one.completion_ids.shape == one.logprobs.shape == (1, int(a.completion_mask[0].sum()))


def test_a_row_alone_scores_as_among_others(small):
    """A row without another one of its prompt has the log-probs that it has in the batch."""
    rollout = sample(*small, PROMPTS, 2, 8)
    together = completion_logprobs(small[0], rollout)
    for i in range(8):
        row = rollout.select(torch.tensor([i]))
        n = row.completion_ids.shape[1]
        close(completion_logprobs(small[0], row)[0], together[i, :n], 1e-4)


def test_a_rollout_by_hand_may_have_masks_of_0_and_1(small):
    """Masks of 0 and 1 score as masks of False and True."""
    rollout = sample(*small, PROMPTS, 2, 6)
    fields = vars(rollout) | {
        "prompt_mask": rollout.prompt_mask.long(), "completion_mask": rollout.completion_mask.long()
    }  # fmt: skip
    by_hand = Rollout(**fields)
    close(completion_logprobs(small[0], by_hand), completion_logprobs(small[0], rollout), 0)


def test_padding_is_no_token_of_a_prompt(small):
    """The prompts "\\0 7" and "7", padded with the token 0, are not the same prompt."""
    ids = torch.tensor([[0, 55]]).repeat(4, 1)
    prompt_mask = torch.tensor([[1, 1], [0, 1]]).repeat_interleave(2, 0)
    completion = torch.randint(1, 200, (4, 3))
    mask = torch.ones(4, 3)
    rollout = Rollout(ids, prompt_mask, completion, mask, 0 * mask, 0 * mask[:, 0], [""] * 4)
    close(completion_logprobs(small[0], rollout), naive_logprobs(small[0], rollout), 1e-4)


def test_log_probs_are_float32_whatever_the_logits_are():
    """bf16, as under autocast: eight bits are too few for a log-softmax."""
    model = made("qwen2").to(torch.bfloat16)
    rollout = sample(model, tiny_tokenizer(), PROMPTS, 2, 6)
    logprobs = completion_logprobs(model, rollout)
    assert logprobs.dtype == rollout.logprobs.dtype == torch.float32


@pytest.mark.parametrize("together", [1, 4])
def test_micro_batches_hold_every_row_once_within_the_budget(small, together):
    """Every row is in one micro-batch, blocks stay whole, and no two batches could be one."""
    rollout = sample(*small, PROMPTS, 16, 24)
    lengths = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1).sum(1)
    batches = common.micro_batches(rollout, 300, together)
    assert sorted(torch.cat(batches).tolist()) == list(range(64))
    for rows in batches:
        assert len(rows) * lengths[rows].max() <= 300 or len(rows) == together
        assert (rows.view(-1, together) % together == torch.arange(together)).all()
    for a, b in itertools.pairwise(batches):  # none could hold the next one's first block too
        assert (len(a) + together) * lengths[b[:together]].max() > 300
        assert lengths[a].max() <= lengths[b].max()
    assert len(common.micro_batches(rollout, 1, together)) == 64 // together


# ---- prompts ----


def test_chat_template_is_applied_once(model_dirs):
    """A tokenizer that begins every text with a BOS (here 257), and a template that does too."""
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = common.load_model(str(model_dirs["llama"]), "cpu")
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


def test_rows_that_the_model_cannot_read_are_refused(small):
    model, tokenizer = small
    sample(model, tokenizer, ["1" * 240], 1, 16)
    with pytest.raises(UserError, match=r"241 tokens.*16.*256.*--max-new-tokens"):
        sample(model, tokenizer, ["1" * 241], 1, 16)
    common.check_rows(model, ["a"], [[0, 257]], room=254)
    for row, message in (([], "gives 'a' no token"), ([258], "'a' the token 258 of a .* 258")):
        with pytest.raises(UserError, match=message):
            common.check_rows(model, ["b", "a"], [[1], row])
    model = made("bloom")
    del model.config.max_position_embeddings  # Bloom has none
    common.check_rows(model, ["a"], [[1] * 9999], room=1)


# ---- loading ----


def test_a_loaded_model_has_no_dropout_and_float32_weights(model_dirs, tmp_path):
    model, tokenizer = common.load_model(str(model_dirs["gpt2"]), "cpu")
    assert not model.training
    tokenizer.chat_template = "{{ messages[0].content }}!"
    model.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for chat_template, length in ((True, 2), (False, 1)):
        model, tokenizer = common.load_model(str(tmp_path), "cpu", chat_template=chat_template)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert common.encode_prompts(model, tokenizer, ["7"], 1)[0].shape == (1, length)
    model.train()
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def no_good(how, llama):
    """A model that cannot be trained here; `llama` itself if something else is to be wrong."""
    if how == "another architecture":
        sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    if how == "no head":
        return transformers.LlamaForSequenceClassification(llama.config)
    if how == "hybrid":
        return made("lfm2", layer_types=["conv", "full_attention"])
    if how == "mamba":
        return made("mamba", state_size=4)
    if how == "few tokens":
        return made("llama", vocab_size=10, eos_token_id=1, pad_token_id=0)
    if how in ("nan", "inf"):
        llama.model.layers[1].mlp.up_proj.weight.data[3, 3] = float(how)
    return llama


@pytest.mark.parametrize(
    "how, reason",
    [
        ("another architecture", "T5Config"), ("no head", "no lm_head.weight"),
        ("hybrid", "recurrent state"), ("mamba", "recurrent state"),
        ("few tokens", "the token 16 of a vocabulary of 10"), ("nan", "NaN or infinite"),
        ("inf", "NaN or infinite"), ("no config.json", "model_type"),
        ("no tokenizer.json", "tokenizer"), ("bad chat_template.jinja", "expected an expression"),
        ("bad model.safetensors", "safetensor|header"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_refused_in_one_line(how, reason, tmp_path, model_dirs):
    llama, _ = common.load_model(str(model_dirs["llama"]), "cpu")
    directory = save(no_good(how, llama), tmp_path / "model")
    verb, _, name = how.partition(" ")
    if verb == "bad":
        (tmp_path / "model" / name).write_text("{% for m in %}")
    elif "." in name:
        (tmp_path / "model" / name).unlink()
    with pytest.raises(UserError) as error:
        common.load_model(directory, "cpu")
    said = str(error.value)
    assert said.startswith(f"{directory}: no causal language model loads from it: ")
    assert re.search(reason, said, re.IGNORECASE), said
    assert "\n" not in said and len(said) < 500


@pytest.mark.cuda
def test_cuda_samples_and_scores_alike(model_dirs):
    """bf16 arithmetic: sampled and scored log-probs agree to its precision."""
    model, tokenizer = common.load_model(str(model_dirs["llama"]), "cuda")
    rollout = sample(model, tokenizer, PROMPTS, 16, 24)
    scored = completion_logprobs(model, rollout)
    assert scored.dtype == torch.float32
    assert (scored - rollout.logprobs).abs()[rollout.completion_mask].mean() < 0.05
    scored.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
