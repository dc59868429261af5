"""Prompts with pictures: sampling and scoring in three generations of Qwen-VL, and bad input."""

import importlib
import json
import random

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import common
import copg
from common import UserError, completion_logprobs, make_task, read_pictures, sample
from tasks import Count, tiny
from tasks.count import COLOURS
from tasks.pictures import data_uri, read_image

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},
}  # fmt: skip
VISION = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def make_model(family, patch):
    """A random model of the family, and its tokenizer with an image processor."""
    tokenizer = tiny.tiny_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if family == "qwen3_vl":
        patch.setattr(tiny, "TINY_TEXT", tiny.TINY_TEXT | {"initializer_range": 0.3})
        patch.setattr(tiny, "TINY_VISION", tiny.TINY_VISION | {"initializer_range": 0.3})
        return tiny.tiny_vision_model(tokenizer, special).eval(), tokenizer
    tiny.tiny_vision_model(tokenizer, special)  # for the tokenizer
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in (
        ("vision_start", "vision_start"), ("vision_end", "vision_end"), ("image", "image_pad"),
        ("video", "video_pad"))}  # fmt: skip
    text = TEXT | special | {"vocab_size": len(tokenizer)}
    if family == "qwen2_vl":
        vision = VISION | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        config, kind = Qwen2VLConfig, Qwen2VLForConditionalGeneration
    else:
        vision = VISION | {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        config, kind = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    vision["initializer_range"] = 0.3
    return kind(config(text_config=text, vision_config=vision, **ids, **special)).eval(), tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def sees(request):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        return make_model(request.param, patch)


def picture(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def prompts():
    """Pictures of three sizes, the same text for two pictures, and a prompt without one."""
    return [
        {"image": picture(24, 24, 0), "text": "red?"},
        {"image": picture(24, 24, 1), "text": "red?"},
        "7+8=",
        {"image": picture(16, 40, 2), "text": "how many green ones are there?"},
    ]


def naive(model, rollout, row, temperature=1.0):
    """Log-probs of one row, alone, without padding and cache: transformers finds the positions."""
    ids = torch.cat([rollout.prompt_ids[row][rollout.prompt_mask[row]],
                     rollout.completion_ids[row][rollout.completion_mask[row]]])[None]  # fmt: skip
    n, inputs, read = int(rollout.completion_mask[row].sum()), {}, ids[:, :-1]
    if rollout.pictures[row]:
        kinds = (read == model.config.image_token_id).int()
        inputs = rollout.pictures[row] | {"mm_token_type_ids": kinds}
    model.base_model.rope_deltas = None
    logits = model(input_ids=read, use_cache=False, **inputs).logits[0, -n:] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, -n:, None]).squeeze(1)


def rollout_of(sees, G=3, T=10):
    model, tokenizer = sees
    torch.manual_seed(1)
    return sample(model, tokenizer, prompts(), G, T, 1.3)


def test_sampled_scored_and_naive_logprobs_agree(sees):
    rollout = rollout_of(sees)
    scored = completion_logprobs(sees[0], rollout, 1.3)
    torch.testing.assert_close(scored, rollout.logprobs, atol=3e-5, rtol=0)
    for row in range(12):
        n = int(rollout.completion_mask[row].sum())
        expected = naive(sees[0], rollout, row, 1.3)
        torch.testing.assert_close(scored[row, :n], expected, atol=3e-5, rtol=0)
    one_of_each = rollout.rows(torch.arange(0, 12, 3))  # no prompt is shared
    torch.testing.assert_close(
        completion_logprobs(sees[0], one_of_each, 1.3), one_of_each.logprobs, atol=3e-5, rtol=0
    )
    shuffled = torch.tensor([11, 0, 5, 3, 8, 4])  # rows keep their own pictures
    some = common.Rollout.cat([rollout.rows(shuffled[:3]), rollout.rows(shuffled[3:])])
    scored = completion_logprobs(sees[0], some, 1.3)
    torch.testing.assert_close(scored, some.logprobs, atol=3e-5, rtol=0)


def test_greedy_equals_generate(sees):
    model, tokenizer = sees
    for prompt in prompts():
        rollout = sample(model, tokenizer, [prompt], 1, 8, 0)
        inputs = rollout.pictures[0] or {}
        if inputs:
            kinds = (rollout.prompt_ids == model.config.image_token_id).int()
            inputs = inputs | {"mm_token_type_ids": kinds}
        model.base_model.rope_deltas = None
        expected = model.generate(
            input_ids=rollout.prompt_ids, max_new_tokens=8, do_sample=False, **inputs
        )[0, rollout.prompt_ids.shape[1] :]
        model.base_model.rope_deltas = None
        assert (
            rollout.completion_ids[0].tolist()
            == expected[: rollout.completion_ids.shape[1]].tolist()
        )


def test_the_picture_matters(sees):
    """With another picture the log-probs are others, though the tokens are the same."""
    rollout = rollout_of(sees)
    a, b = rollout.pictures[0], rollout.pictures[3]
    swapped = [b if p is a else a if p is b else p for p in rollout.pictures]
    other = common.Rollout(*(getattr(rollout, name) for name in (
        "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "logprobs", "truncated",
        "texts")), swapped)  # fmt: skip
    difference = (completion_logprobs(sees[0], other) - completion_logprobs(sees[0], rollout)).abs()
    assert difference[:6].max() > 0.05 and difference[6:].max() < 1e-5


def test_gradients_equal_naive_and_reach_the_patches(sees):
    model = sees[0]
    rollout = rollout_of(sees)
    weights = torch.randn(rollout.completion_mask.shape)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    ours = gradients((completion_logprobs(model, rollout) * weights).sum())
    total = 0.0
    for row in range(12):
        n = int(rollout.completion_mask[row].sum())
        total = total + (naive(model, rollout, row) * weights[row, :n]).sum()
    theirs = gradients(total)
    assert ours.keys() == theirs.keys()
    patches = [name for name in ours if "patch_embed" in name]
    assert patches and all(ours[name].norm() > 1e-3 for name in patches)
    norm = sum(g.norm() ** 2 for g in theirs.values()).sqrt()
    assert sum((ours[n] - theirs[n]).norm() ** 2 for n in ours).sqrt() < 1e-4 * norm
    model.zero_grad()


def test_checkpointing_changes_nothing(sees):
    rollout, model = rollout_of(sees), sees[0]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    again = rollout_of(sees)
    scored = completion_logprobs(model, rollout, 1.3)
    model.gradient_checkpointing_disable()
    model.eval()
    assert torch.equal(again.completion_ids, rollout.completion_ids)
    torch.testing.assert_close(scored, rollout.logprobs, atol=3e-5, rtol=0)


def test_a_sampled_image_token_ends_its_row(sees):
    """There is no picture for it; and scoring does not take one from the next row."""
    model, tokenizer = sees
    image = model.config.image_token_id
    assert image in common.stop_token_ids(model, tokenizer)
    rollout = rollout_of(sees)
    rollout.completion_ids[0, 2] = rollout.completion_ids[7, 1] = image
    rollout.completion_mask[0, 3:] = rollout.completion_mask[7, 2:] = False
    scored = completion_logprobs(model, rollout)
    for row in (0, 3, 7):
        n = int(rollout.completion_mask[row].sum())
        if row == 3:
            expected = naive(model, rollout, row)
            torch.testing.assert_close(scored[row, :n], expected, atol=3e-5, rtol=0)
    alone = rollout.rows(torch.tensor([0, 7]))  # nothing is shared
    ours = completion_logprobs(model, alone)
    torch.testing.assert_close(ours[0, :3], scored[0, :3], atol=3e-5, rtol=0)
    torch.testing.assert_close(ours[1, :2], scored[7, :2], atol=3e-5, rtol=0)


def test_a_chat_template_gets_its_pictures(sees):
    model, tokenizer = sees
    tokenizer.chat_template = (
        "{% for m in messages %}<{% if m.content is string %}{{ m.content }}{% else %}{% for c in "
        "m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}>{% endfor %}"
    )
    try:
        all_prompts = prompts()
        pictures = read_pictures(tokenizer, all_prompts)
        ids, mask = common.encode_prompts(model, tokenizer, all_prompts, 1, pictures)
        shown = [tokenizer.decode(row[real]) for row, real in zip(ids, mask, strict=True)]
        pads = [9, 9, 0, 10]  # 24 x 24 pixels are 9 tokens of 8 x 8, 16 x 40 are 10
        images = [f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" if n else "" for n in pads]
        texts = ["red?", "red?", "7+8=", "how many green ones are there?"]
        assert shown == [f"<{i}{t}>" for i, t in zip(images, texts, strict=True)]
        tokenizer.chat_template = "{{ messages[0].content }}"
        tokenizer.chat_template = "{% for m in messages %}text only{% endfor %}"
        with pytest.raises(UserError, match="0 image tokens for 1 pictures"):
            common.encode_prompts(model, tokenizer, all_prompts, 1, pictures)
    finally:
        tokenizer.chat_template = None
    liar = {"image": picture(24, 24, 0), "text": "<|image_pad|>?"}
    with pytest.raises(UserError, match="2 image tokens for 1 pictures"):
        sample(model, tokenizer, [liar], 1, 4)


# ---- the task, its tiny model, files ----


def test_count():
    for split in ("train", "test"):
        check_env(make_task("count", split).unwrapped)
    task = make_task("count")
    prompt = common.get_prompts(task, [7])[0]
    rows, asked = task.unwrapped.squares(7)
    assert prompt["image"].shape == (24, 24, 3) and prompt["text"] == f"{asked}?"
    for i in range(3):
        for j in range(3):
            block = prompt["image"][8 * i : 8 * i + 8, 8 * j : 8 * j + 8].reshape(-1, 3)
            assert (block == COLOURS[rows[i][j]]).all()
    answer = sum(row.count(asked) for row in rows)
    rewards, _ = common.get_rewards(task, [7], [f"={answer}", f"={answer + 1}", ""])
    assert rewards.tolist() == [[1, 0, 0]]
    right = [common.get_rewards(task, [i], [task.unwrapped.demonstration(i)])[0].item()
             for i in [*range(200), *range(50_000, 50_400)]]  # fmt: skip
    assert sum(right[:200]) == 200 and 0.4 < sum(right[200:]) / 400 < 0.6
    parts = [task.unwrapped.demonstration(i) for i in range(50_000, 50_400)]
    for text in parts:
        numbers, total = text.split("=")
        assert sum(map(int, numbers.split("+"))) == int(total) and len(numbers.split("+")) == 3


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "WARM_START", {"steps": 2, "tokens_per_step": 512, "lr": 1e-3})
        return tiny.tiny_model(make_task("count"))


def test_the_tiny_model_is_an_ordinary_directory(tiny_directory, tmp_path):
    model, tokenizer = common.load_model(tiny_directory, "cpu")
    assert sum(p.numel() for p in model.parameters()) < 1e6
    a = sample(model, tokenizer, common.get_prompts(make_task("count"), [1, 2]), 2, 6)
    assert len(a.texts) == 4 and a.pictures[0] is a.pictures[1] is not a.pictures[2]


def test_a_trained_model_needs_its_picture(monkeypatch):
    """How many of 2 x 2 squares are red? Learnt in a few seconds, and lost with a blank picture or
    with that of the next problem: chance is .3."""

    class Few(Count):
        def squares(self, index):
            rng = random.Random(f"{self.split} {index}")
            return [[rng.choice(["red", "blue"]) for _ in range(2)] for _ in range(2)], "red"

        def demonstration(self, index):
            return str(sum(row.count("red") for row in self.squares(index)[0]))

    monkeypatch.setattr(tiny, "WARM_START", {"steps": 60, "tokens_per_step": 512, "lr": 3e-3})
    task, problems = Few(), list(range(10**6, 10**6 + 100))
    model, tokenizer = common.load_model("tiny", "cpu", task)
    shown = common.get_prompts(task, problems)

    def accuracy(prompts):
        texts = sample(model, tokenizer, prompts, 1, 4, 0).texts
        return common.get_rewards(task, problems, texts)[0].mean().item()

    assert accuracy(shown) > 0.95
    assert accuracy(shown[1:] + shown[:1]) < 0.5
    assert accuracy([prompt | {"image": 0 * prompt["image"]} for prompt in shown]) < 0.5


def test_given_completions_are_scored_with_their_pictures(tiny_directory):
    model, tokenizer = common.load_model(tiny_directory, "cpu")
    a, b = common.get_prompts(make_task("count"), [1, 2])
    rollout = copg.encode(model, tokenizer, [a, a, b, b], ["1", "2", "1", "2"])
    pictures = rollout.pictures
    assert pictures[0] is pictures[1] and pictures[2] is pictures[3]
    for picture, prompt in ((pictures[0], a), (pictures[2], b)):
        expected = tokenizer.image_processor(Image.fromarray(prompt["image"]))["pixel_values"]
        assert np.array_equal(picture["pixel_values"].numpy(), np.array(expected))


@pytest.mark.parametrize("script", ["gpg.py", "grpo.py", "copg.py"])
def test_scripts_run_resume_and_keep_the_image_processor(
    script, tiny_directory, tmp_path, monkeypatch
):
    """Three steps at once equal two and one, bit for bit; copg.py reads its data again."""
    monkeypatch.setattr(common, "draw_curves", lambda *_: None)  # slow
    module, runs = importlib.import_module(script.removesuffix(".py")), []
    flags = ["--model", tiny_directory, "--task", "count", "--prompts", "2", "--eval-problems", "3"]
    flags += ["--max-new-tokens", "6", "--save-every", "1", "--eval-every", "5", "--lr", "1e-3"]
    flags += ["--pairs", "8"] if script == "copg.py" else ["--group-size", "3"]
    for name, steps in (("whole", [3]), ("parts", [2, 3])):
        where = ["--out", str(tmp_path / name)]
        for n in steps:
            module.train(module.parse_args([*flags, *where, "--steps", str(n)]))
            where = ["--resume", str(tmp_path / name)]
        runs.append(tmp_path / name)
    a, b = ((run / "checkpoint/model.safetensors").read_bytes() for run in runs)
    assert a == b and (runs[0] / "checkpoint/preprocessor_config.json").exists()
    samples = (runs[0] / "samples.jsonl").read_text().splitlines()
    assert json.loads(samples[0])["prompt"].endswith("?")
    if script == "copg.py":
        data = copg.read_data(runs[0] / "data.jsonl")
        prompt = common.get_prompts(make_task("count"), [3])[0]
        assert data.prompts[3]["text"] == prompt["text"]
        assert np.array_equal(read_image(data.prompts[3]["image"], "x"), prompt["image"])


def write_jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_pictures_of_a_file_are_read_when_they_are_asked_for(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(picture(10, 20, 3)).save(tmp_path / "images" / "a.png")
    records = [{"prompt": "what?", "answer": "x", "image": "images/a.png"},
               {"prompt": "and this?", "answer": "y", "image": "images/missing.png"},
               {"prompt": "no picture", "answer": "z"},
               {"prompt": "here", "answer": "w", "image": data_uri(picture(4, 5, 6))}]  # fmt: skip
    task = make_task(write_jsonl(tmp_path / "p.jsonl", *records[:1]), "test")
    (prompt,) = common.get_prompts(task, [0])
    assert np.array_equal(prompt["image"], picture(10, 20, 3)) and prompt["text"] == "what?"
    assert task.observation_space.contains(prompt)
    task = make_task(write_jsonl(tmp_path / "q.jsonl", *records[3:]), "test")
    assert np.array_equal(common.get_prompts(task, [0])[0]["image"], picture(4, 5, 6))
    task = make_task(write_jsonl(tmp_path / "r.jsonl", records[1], records[2]), "test")  # no error
    with pytest.raises(UserError, match=r"r\.jsonl, line 1: its picture cannot be read .*missing"):
        common.get_prompts(task, [0])


@pytest.mark.parametrize(
    "content, message",
    [(b"", "cannot be read"), (b"no picture at all", "cannot be read"), ("cut", "cannot be read"),
     ("folder", "cannot be read"), ("huge", "exceeds limit")],
)  # fmt: skip
def test_bad_pictures(tmp_path, content, message, monkeypatch):
    path = tmp_path / "a.png"
    if content == "folder":
        path.mkdir()
    elif content == "cut":
        Image.fromarray(picture(50, 50, 0)).save(path)
        path.write_bytes(path.read_bytes()[:600])
    elif content == "huge":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        Image.fromarray(picture(50, 50, 0)).save(path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"x: its picture cannot be read .*|{message}"):
        read_image(str(path), "x")


def test_a_picture_that_changes_is_an_error():
    class Restless(Count):
        def problem(self, index):
            answer = super().problem(index)[1]
            return {"image": picture(8, 8, int(np.random.randint(10**6))), "text": "?"}, answer

    with pytest.raises(UserError, match=r"problem 3 .* has another prompt"):
        common.get_rewards(Restless(), [3], ["a", "b"])


def test_text_only_models_refuse_pictures(model_dirs):
    model, tokenizer = common.load_model(str(model_dirs["qwen2"]), "cpu")
    with pytest.raises(UserError, match="this model reads text only: --model takes Qwen2-VL"):
        sample(model, tokenizer, common.get_prompts(make_task("count"), [1]), 1, 4)


def test_a_picture_of_an_impossible_shape(sees):
    prompt = {"image": picture(1, 300, 0), "text": "?"}
    with pytest.raises(UserError, match=r"a picture of 300 x 1 pixels: .*aspect ratio"):
        sample(*sees, [prompt], 1, 4)
