"""Prompts with pictures: sampling and scoring in three generations of Qwen-VL, and bad input."""

import importlib
import json
import random

import numpy as np
import pytest
import torch
from helpers import close, gradient, naive_logprobs, run_script
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

import common
import copg
from common import Rollout, completion_logprobs, sample
from tasks import Count, UserError, first_problem, get_prompts, get_rewards, make_task, tiny
from tasks.count import COLOURS
from tasks.pairs import Record, read_records
from tasks.pictures import data_uri, read_image
from tasks.prompts import encode_prompts, stop_token_ids

FAMILIES = {  # what their vision towers need beside TINY_VISION
    "qwen2_vl": {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2},
    "qwen2_5_vl": {"window_size": 16, "fullatt_block_indexes": [1]},
    "qwen3_vl": {},
}


@pytest.fixture(params=FAMILIES)
def sees(request):
    """(model, tokenizer) of each family, random."""
    tokenizer = tiny.tiny_tokenizer()
    ids = {"eos_token_id": 256, "pad_token_id": 257}
    config = tiny.tiny_vision_model(tokenizer, ids).config  # also prepares the tokenizer
    ids |= {name: x for name, x in vars(config).items() if name.endswith("token_id")}
    spread = {"initializer_range": 0.3}
    text = tiny.TINY_TEXT | spread | ids | {"vocab_size": len(tokenizer)}
    vision = tiny.TINY_VISION | spread | FAMILIES[request.param]
    config = AutoConfig.for_model(request.param, text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval(), tokenizer


def picture(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


PROMPTS = [  # three sizes, the same text for two pictures, and a prompt without a picture
    {"image": picture(24, 24, 0), "text": "red?"},
    {"image": picture(24, 24, 1), "text": "red?"},
    "7+8=",
    {"image": picture(16, 40, 2), "text": "how many green ones are there?"},
]


def sample_of_each(sees):
    torch.manual_seed(1)
    return sample(*sees, PROMPTS, 3, 10, 1.3)


def test_sampled_scored_and_naive_logprobs_agree(sees):
    """In groups, without groups, and where rows of two rollouts are joined and shuffled."""
    rollout = sample_of_each(sees)
    close(naive_logprobs(sees[0], rollout, 1.3), rollout.logprobs, 3e-5)
    one_of_each = rollout.select(torch.arange(0, 12, 3))
    order = torch.tensor([11, 0, 5, 3, 8, 4])
    joined = Rollout.cat([rollout.select(order[:3]), one_of_each, rollout.select(order[3:])])
    for some in (rollout, one_of_each, joined):
        close(completion_logprobs(sees[0], some, 1.3), some.logprobs, 3e-5)


def test_greedy_equals_generate(sees):
    model, tokenizer = sees
    for prompt in PROMPTS:
        rollout = sample(model, tokenizer, [prompt], 1, 8, 0)
        inputs, ids = rollout.pictures[0] or {}, rollout.prompt_ids
        if inputs:
            inputs = inputs | {"mm_token_type_ids": (ids == model.config.image_token_id).int()}
        model.base_model.rope_deltas = None  # of the prompt before
        expected = model.generate(ids, max_new_tokens=8, do_sample=False, **inputs)
        expected = expected[:, ids.shape[1] :][:, : rollout.completion_ids.shape[1]]
        assert torch.equal(rollout.completion_ids, expected)


def test_the_picture_matters(sees):
    """With another picture the log-probs are others, though the tokens are the same."""
    rollout = sample_of_each(sees)
    a, b = rollout.pictures[0], rollout.pictures[3]
    swapped = Rollout(**vars(rollout) | {"pictures": [b] * 3 + [a] * 3 + rollout.pictures[6:]})
    difference = completion_logprobs(sees[0], swapped) - completion_logprobs(sees[0], rollout)
    assert difference[:3].abs().max() > 0.05 and difference[3:6].abs().max() > 0.05
    assert difference[6:].abs().max() < 1e-5


def test_gradients_equal_naive_and_reach_the_patches(sees):
    model, rollout = sees[0], sample_of_each(sees)
    weight = torch.randn(rollout.completion_mask.shape)
    ours = gradient(model, (completion_logprobs(model, rollout) * weight).sum())
    naive = gradient(model, (naive_logprobs(model, rollout) * weight).sum())
    assert (ours - naive).norm() < 1e-4 * naive.norm()
    (completion_logprobs(model, rollout) * weight).sum().backward()
    patches = [p for name, p in model.named_parameters() if "patch_embed" in name]
    assert patches and all(p.grad.norm() > 1e-3 for p in patches)


def test_checkpointing_changes_nothing(sees):
    model, rollout = sees[0], sample_of_each(sees)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert torch.equal(sample_of_each(sees).completion_ids, rollout.completion_ids)
    close(completion_logprobs(model, rollout, 1.3), rollout.logprobs, 3e-5)


def test_a_sampled_image_token_ends_its_row(sees):
    """There is no picture for it; and scoring does not take one from the next row."""
    model, tokenizer = sees
    image = model.config.image_token_id
    assert image in stop_token_ids(model, tokenizer)
    rollout = sample_of_each(sees)
    rollout.completion_ids[0, 2] = rollout.completion_ids[7, 1] = image
    rollout.completion_mask[0, 3:] = rollout.completion_mask[7, 2:] = False
    expected = naive_logprobs(model, rollout)
    close(completion_logprobs(model, rollout), expected, 3e-5)
    alone = rollout.select(torch.tensor([0, 7]))
    close(completion_logprobs(model, alone), expected[[0, 7], :3], 3e-5)


def test_a_chat_template_gets_its_pictures(sees):
    model, tokenizer = sees
    tokenizer.chat_template = (
        "{% for m in messages %}<{% if m.content is string %}{{ m.content }}{% else %}{% for c in "
        "m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}>{% endfor %}"
    )
    ids, mask, _ = encode_prompts(model, tokenizer, PROMPTS, 1)
    shown = [tokenizer.decode(row[real]) for row, real in zip(ids, mask, strict=True)]
    start, end, image = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
    assert shown == [  # 24 x 24 pixels are 9 tokens of 8 x 8, 16 x 40 are 10
        f"<{start}{9 * image}{end}red?>", f"<{start}{9 * image}{end}red?>", "<7+8=>",
        f"<{start}{10 * image}{end}how many green ones are there?>",
    ]  # fmt: skip
    tokenizer.chat_template = "{% for m in messages %}text only{% endfor %}"
    with pytest.raises(UserError, match="0 image tokens for 1 pictures"):
        encode_prompts(model, tokenizer, PROMPTS, 1)
    tokenizer.chat_template = None
    for prompt, found in ((PROMPTS[0] | {"text": f"{image}?"}, "2 .* 1"), (image, "1 .* 0")):
        with pytest.raises(UserError, match=found.replace(".*", "image tokens for")):
            sample(model, tokenizer, [prompt, PROMPTS[0]], 1, 4)
    with pytest.raises(UserError, match=r"a picture of 300 x 1 pixels: .*aspect ratio"):
        sample(model, tokenizer, [{"image": picture(1, 300, 0), "text": "?"}], 1, 4)


# ---- the task, its tiny model, files ----


def test_count():
    """The picture shows the squares, and half of the later demonstrations have a slip."""
    task = make_task("count")
    (prompt,), (squares, asked) = get_prompts(task, [7]), task.unwrapped.squares(7)
    colours = np.array([[COLOURS[colour] for colour in row] for row in squares])
    assert np.array_equal(prompt["image"], colours.repeat(8, 0).repeat(8, 1))
    answer = sum(row.count(asked) for row in squares)
    rewards, _ = get_rewards(task, [7], [f"={answer}", f"={answer + 1}", ""])
    assert prompt["text"] == f"{asked}?" and rewards.tolist() == [[1, 0, 0]]
    problems = [*range(200), *range(50_000, 50_400)]
    shown = [task.unwrapped.demonstration(i) for i in problems]
    right = get_rewards(task, problems, shown)[0].flatten()
    assert right[:200].all() and 0.4 < right[200:].mean() < 0.6
    for text in shown:  # a slip is in a part, never in the sum of the three
        parts, total = text.split("=")
        parts = [int(part) for part in parts.split("+")]
        assert len(parts) == 3 and sum(parts) == int(total)


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "WARM_START", {"steps": 2, "tokens_per_step": 512, "lr": 1e-3})
        return tiny.tiny_model(make_task("count"))


class Few(Count):
    """How many of 2 x 2 squares are red? Chance is .3."""

    def squares(self, index):
        rng = random.Random(f"{self.split} {index}")
        return [[rng.choice(["red", "blue"]) for _ in range(2)] for _ in range(2)], "red"

    def demonstration(self, index):
        return self.problem(index)[1]


def test_a_trained_model_needs_its_picture(monkeypatch):
    """Learnt in a few seconds, and lost with the picture of the next problem."""
    monkeypatch.setattr(tiny, "WARM_START", {"steps": 30, "tokens_per_step": 512, "lr": 4e-3})
    task, problems = Few(), list(range(10**6, 10**6 + 100))
    model, tokenizer = common.load_model("tiny", "cpu", task)
    shown = get_prompts(task, problems)
    for prompts, learnt in ((shown, True), (shown[1:] + shown[:1], False)):
        texts = sample(model, tokenizer, prompts, 1, 4, 0).texts
        accuracy = get_rewards(task, problems, texts)[0].mean()
        assert accuracy > 0.95 if learnt else accuracy < 0.5


def test_given_completions_are_scored_with_their_pictures(tiny_directory):
    model, tokenizer = common.load_model(tiny_directory, "cpu")
    prompts = get_prompts(make_task("count"), [1, 2])
    records = [Record(p, ["1", "2", "3"], ends=[256, -1, 256]) for p in prompts]
    rollout = copg.encode(model, tokenizer, records)
    for i, shown in enumerate(rollout.pictures):
        assert shown is rollout.pictures[i // 3 * 3]
        image = Image.fromarray(prompts[i // 3]["image"])
        expected = tokenizer.image_processor(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(shown["pixel_values"], expected)
    close(completion_logprobs(model, rollout), naive_logprobs(model, rollout), 3e-5)


@pytest.mark.parametrize("script", ["gpg", "grpo", "copg"])
def test_a_script_trains_and_goes_on(script, tiny_directory, tmp_path, monkeypatch):
    """From a checkpoint, which has the image processor, and from copg.py's data."""
    module, task = importlib.import_module(script), make_task("count")
    flags = ["--task", "count", "--steps", 1]
    flags += ["--pairs", 8] if script == "copg" else ["--group-size", 3]
    run, _ = run_script(module, tmp_path, monkeypatch, tiny_directory, task, *flags)
    module.train(module.parse_args(["--resume", str(run.dir), "--steps", "2"]))
    if script == "copg":
        record = read_records(run.dir / "data.jsonl")[3]
        (prompt,) = get_prompts(task, [first_problem(0) + 3])
        assert record.prompt["text"] == prompt["text"]
        assert np.array_equal(read_image(record.prompt["image"], "x"), prompt["image"])


def test_pictures_of_a_file_are_read_when_they_are_asked_for(tmp_path):
    def task(*images):
        lines = [json.dumps({"prompt": "what?", "answer": "x"} | image) for image in images]
        (tmp_path / "p.jsonl").write_text("\n".join(lines))
        return make_task(str(tmp_path / "p.jsonl"), "test")

    Image.fromarray(PROMPTS[0]["image"]).save(tmp_path / "a.png")
    for image in ("a.png", data_uri(PROMPTS[0]["image"])):
        (prompt,) = get_prompts(task({"image": image}), [0])
        assert np.array_equal(prompt["image"], PROMPTS[0]["image"]) and prompt["text"] == "what?"
    assert task({"image": image}).observation_space.contains(prompt)
    missing = task({"image": "missing.png"}, {})  # no error yet
    with pytest.raises(UserError, match=r"p\.jsonl, line 1: its picture cannot be read .*missing"):
        get_prompts(missing, [0])


@pytest.mark.parametrize("content", ["", "not a picture", "truncated", "folder", "huge", "uri"])
def test_bad_pictures(tmp_path, content, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(picture(50, 50, 0)).save(path)
    if content == "huge":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    elif content != "folder":
        path.write_bytes(path.read_bytes()[:600] if content == "truncated" else content.encode())
    source = {"folder": tmp_path, "uri": "data:image/png;base64,AAA"}.get(content, path)
    with pytest.raises(UserError, match=r"^x: its picture cannot be read \(.+\)$"):
        read_image(str(source), "x")


def test_text_only_models_refuse_pictures(small):
    with pytest.raises(UserError, match="this model reads text only: --model takes Qwen2-VL"):
        sample(*small, PROMPTS, 1, 4)
