"""Loading a model, evaluating it, and the metrics of a rollout."""

import math
import re
import statistics
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import make_model, make_rollout

import common
from tasks import TextTask, UserError
from tasks.prompts import encode_prompts
from tasks.tiny import tiny_tokenizer

# ---- loading ----


def test_a_model_may_lack_a_part(tmp_path):
    """Gemma 4 comes without its audio tower."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    text = {"vocab_size": 258, "vocab_size_per_layer_input": 258, "hidden_size_per_layer_input": 0}
    text |= {"num_kv_shared_layers": 0, "layer_types": ["full_attention"], "eos_token_id": 256}
    config = transformers.Gemma4Config(
        text_config=sizes | heads | text, vision_config=sizes | heads, audio_config=None
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert common.load_model(tmp_path, "cpu")[0].config.audio_config is None


def test_a_loaded_model_has_no_dropout_and_float32_weights(model_dirs, tmp_path):
    model, tokenizer = common.load_model(model_dirs["gpt2"], "cpu")
    assert not model.training
    tokenizer.chat_template = "{{ messages[0].content }}!"
    model.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for chat_template, length in ((True, 2), (False, 1)):
        model, tokenizer = common.load_model(tmp_path, "cpu", chat_template=chat_template)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert encode_prompts(model, tokenizer, ["7"], 1)[0].shape == (1, length)
    model.train()
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def bad_model(how, llama):
    """A model that cannot be trained here, or llama itself if something else is to be wrong."""
    if how == "another architecture":
        sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    if how == "no head":
        return transformers.LlamaForSequenceClassification(llama.config)
    if how == "hybrid":
        return make_model("lfm2", layer_types=["conv", "full_attention"])
    if how == "mamba":
        return make_model("mamba", state_size=4)
    if how == "few tokens":
        return make_model("llama", vocab_size=10, eos_token_id=1)
    if how in ("nan", "inf"):
        llama.model.layers[1].mlp.up_proj.weight.data[3, 3] = float(how)
    return llama


@pytest.mark.parametrize(
    "how, reason",
    [
        ("another architecture", "T5Config"), ("no head", "missing weights: lm_head.weight"),
        ("hybrid", "recurrent state"), ("mamba", "recurrent state"),
        ("few tokens", "'1' gives token 16 in a vocabulary of 10"),
        ("nan", "non-finite"), ("inf", "non-finite"), ("no config.json", "model_type"),
        ("no tokenizer.json", "tokenizer"), ("bad chat_template.jinja", "expected an expression"),
        ("bad model.safetensors", "header"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_refused_in_one_line(how, reason, tmp_path, model_dirs):
    llama, _ = common.load_model(model_dirs["llama"], "cpu")
    bad_model(how, llama).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    verb, _, name = how.partition(" ")
    if verb == "bad":
        (tmp_path / name).write_text("{% for m in %}")
    elif "." in name:
        (tmp_path / name).unlink()
    with pytest.raises(UserError) as error:
        common.load_model(tmp_path, "cpu")
    said = str(error.value)
    assert said.startswith(f"{tmp_path} cannot be loaded as a language model on cpu: ")
    assert re.search(reason, said, re.IGNORECASE), said
    assert "\n" not in said and len(said) < 500


# ---- evaluate ----


class Judged(TextTask):
    """Solved or not is one thing, the reward another."""

    def problem(self, index):
        return f"{self.split} {index}", ""

    def step(self, completion):
        solved, reward = completion.split()
        return self.prompt, float(reward), True, False, {"solved": solved == "True"}


@pytest.mark.parametrize("size, first, n", [(None, 7, 130), (70, 0, 70), (1, 0, 1)])
def test_evaluate(monkeypatch, size, first, n):
    """Three samples of each of n problems at the training temperature, and a greedy one."""
    calls = []

    def sample(model, tokenizer, prompts, k, max_new_tokens, temperature=1.0):
        draws = torch.rand(len(prompts) * k).tolist()  # some problems are easier than others
        solved = [x < 0.1 + 0.4 * (i // k % 3 == 0) for i, x in enumerate(draws)]
        calls.append((model, tokenizer, prompts, k, max_new_tokens, temperature, solved))
        return SimpleNamespace(
            texts=[f"{s} {x - 0.5:.2f}" for s, x in zip(solved, draws, strict=True)]
        )

    monkeypatch.setattr(common, "sample", sample)
    task = Judged("test")
    task.size = size
    args = SimpleNamespace(
        eval_problems=130, eval_samples=3, eval_first=first, max_new_tokens=9, temperature=0.7
    )
    state = torch.get_rng_state()
    metrics = common.evaluate("model", "tokenizer", task, args)
    assert torch.equal(torch.get_rng_state(), state)

    end = first + n
    prompts = [
        [f"test {i}" for i in range(start, min(start + 64, end))] for start in range(first, end, 64)
    ]
    expected = [("model", "tokenizer", p, k, 9, t) for k, t in ((3, 0.7), (1, 0)) for p in prompts]
    assert [call[:-1] for call in calls] == expected
    solved, greedy = ([s for call in calls if call[3] == k for s in call[-1]] for k in (3, 1))
    shares = [sum(solved[3 * i : 3 * i + 3]) / 3 for i in range(n)]
    error = statistics.stdev(shares) / math.sqrt(n) if n > 1 else math.nan  # over problems
    assert metrics == pytest.approx(
        {
            "eval_accuracy": statistics.mean(shares),
            "eval_accuracy_stderr": error,
            "eval_greedy": sum(greedy) / n,
            "eval_pass_at_k": sum(s > 0 for s in shares) / n,
        },
        abs=1e-9,
        nan_ok=True,
    )
    torch.manual_seed(5)  # the next evaluation draws the same numbers, whatever was drawn before
    common.evaluate("model", "tokenizer", task, args)
    assert calls[len(expected) :] == calls[: len(expected)]


# ---- metrics of a rollout ----

GROUPS = torch.tensor([[1.0, 1], [0, 0], [-2, -2], [0, 3], [0.5, 0.5]])


def rollout_of_groups(**fields):
    completions = [[1] * n for n in (1, 2, 3, 4, 1, 1, 2, 2, 3, 3)]
    return make_rollout([[1]] * 10, completions, **fields)


def test_rollout_metrics():
    """Ten completions of 22 tokens in five groups: two all right, two all wrong, one valid."""
    rollout = rollout_of_groups(truncated=torch.arange(10) < 3)
    rollout.logprobs = -2.5 * rollout.completion_mask
    assert common.rollout_metrics(rollout, GROUPS) == pytest.approx(
        {
            "reward_mean": 2 / 10,
            "reward_std": 3 / math.sqrt(2) / 5,  # within groups, where the mean is no parameter
            "valid_share": 1 / 5,
            "all_right": 2 / 5,
            "all_wrong": 2 / 5,
            "entropy": 2.5,  # per token
            "completion_length": 2.2,
            "truncated_share": 0.3,
            "tokens": 22,
        }
    )


def test_rollout_samples():
    """The first six rows, token by token, without padding; of a picture's prompt the text."""
    texts = [f"answer {i}" for i in range(10)]
    rollout = rollout_of_groups(texts=texts, truncated=torch.arange(10) == 3)
    rollout.logprobs = torch.linspace(-3, 0, 40).view(10, 4)
    prompts = ["what?", {"image": None, "text": "this?"}, "so?", "no", "no"]
    samples = common.rollout_samples(prompts, rollout, {"reward": GROUPS}, 6)
    assert [s["prompt"] for s in samples] == ["what?"] * 2 + ["this?"] * 2 + ["so?"] * 2
    assert [s["reward"] for s in samples] == [1, 1, 0, 0, -2, -2]
    assert samples[3] == {
        "prompt": "this?",
        "completion": "answer 3",
        "reward": 0,
        "truncated": True,
        "prompt_tokens": [1],
        "tokens": [1] * 4,
        "logprobs": [-2.077, -2.0, -1.923, -1.846],
    }
    assert [len(s["tokens"]) for s in samples] == [1, 2, 3, 4, 1, 1]
    assert [len(s["logprobs"]) for s in samples] == [1, 2, 3, 4, 1, 1]
