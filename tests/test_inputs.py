"""Inputs as people have them: chat data, stop tokens, records that do not fit, other test files."""

import io
import json

import numpy as np
import pytest
import torch
from helpers import ManyAs, close, make_model, naive_logprobs, write_around, write_jsonl
from PIL import Image
from transformers import AutoModelForMaskedLM

import common
import copg
import gpg
import grpo
from common import completion_logprobs, sample
from copg import encode
from tasks import TextTask, UserError, get_prompts, get_rewards, make_task, make_tasks
from tasks.pairs import Record, read_records
from tasks.pictures import read_image
from tasks.prompts import encode_prompts, render_prompts, set_system

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
]
RENDERED = "[system]Be brief.\n[user]1+1?\n[assistant]2\n[user]2+2?\n[assistant]"


def answer(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def chat(small):
    model, tokenizer = small
    tokenizer.chat_template = CHAT
    return model, tokenizer


@pytest.fixture
def chat_dir(model_dirs, tmp_path):
    model, tokenizer = common.load_model(model_dirs["qwen2"], "cpu")
    tokenizer.chat_template = CHAT
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def train(script, model, out, *flags):
    small = ["--max-new-tokens", 8, "--prompts", 2, "--eval-problems", 2, "--eval-samples", 1]
    flags = ["--model", model, "--out", out, "--steps", 1, "--device", "cpu", *small, *flags]
    return script.train(script.parse_args([str(flag) for flag in flags]))


# ---- chat data ----


@pytest.mark.parametrize("name", ["prompt", "messages"])
@pytest.mark.parametrize("in_parts", [False, True])
def test_messages_go_through_the_template_as_they_are(chat, tmp_path, name, in_parts):
    turns = TURNS
    if in_parts:
        parts = [[{"type": "text", "text": x} for x in turn["content"]] for turn in TURNS]
        turns = [turn | {"content": part} for turn, part in zip(TURNS, parts, strict=True)]
    path = write_jsonl(tmp_path / "a.jsonl", {name: turns, "answer": 4})
    task = make_task(path)
    (prompt,) = get_prompts(task, [0])
    assert task.observation_space.contains(prompt)
    assert render_prompts([prompt], *chat) == [RENDERED]
    ids, mask, _ = encode_prompts(*chat, [prompt, "1+1?"], 8)
    assert chat[1].decode(ids[0][mask[0]]) == RENDERED
    assert chat[1].decode(ids[1][mask[1]]) == "[user]1+1?\n[assistant]"
    rewards, _ = get_rewards(task, [0], ["4", "5"])
    assert rewards.tolist() == [[1, 0]]


def test_a_prompt_counts_before_messages_and_equal_messages_are_held_out_together(tmp_path):
    both = {"prompt": "a", "messages": [{"role": "user", "content": "b"}], "answer": 1}
    assert make_task(write_jsonl(tmp_path / "a.jsonl", both)).reset(seed=0)[0] == "a"
    turns = [{"role": "user", "content": f"{i // 2}"} for i in range(40)]
    lines = [{"messages": [turn], "answer": 1} for turn in turns]
    train, test = make_tasks(write_jsonl(tmp_path / "b.jsonl", *lines), None)
    numbers = [
        {prompt[0]["content"] for prompt in get_prompts(task, range(task.unwrapped.size))}
        for task in (train, test)
    ]
    assert numbers[1] == {"0", "10"} and numbers[0] == {f"{i}" for i in range(20)} - numbers[1]


def test_messages_need_a_template(small, tmp_path, model_dirs):
    with pytest.raises(UserError, match="messages, which needs a chat template"):
        encode_prompts(*small, [TURNS], 8)
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": TURNS, "answer": 4})
    with pytest.raises(UserError, match=r"a.jsonl, line 1: .* needs a chat template"):
        train(gpg, model_dirs["qwen2"], tmp_path / "run", "--task", path)


def test_a_template_may_refuse_a_prompt(chat, tmp_path):
    chat[1].chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="template refuses a prompt: roles must alternate"):
        encode_prompts(*chat, ["1"], 8)


@pytest.mark.parametrize("where", ["in completions", "beside", "beside as a text", "both"])
def test_preferences_as_conversations(chat, tmp_path, where):
    """The last turn is the completion, what is before it the prompt."""
    context = [] if where.startswith("beside") else TURNS
    line = {"chosen": [*context, answer("4")], "rejected": [*context, answer("5")]}
    if where != "in completions":
        line["prompt"] = "2+2?" if where == "beside as a text" else TURNS
    (record,) = read_records(write_jsonl(tmp_path / "a.jsonl", line))
    assert record.completions == ["4", "5"] and record.rewards == [0.25, -0.25]
    assert record.prompt == ("2+2?" if where == "beside as a text" else TURNS)
    scored = {"completions": [line["rejected"], line["chosen"]], "rewards": [1, 2]}
    line = scored | ({"prompt": line["prompt"]} if "prompt" in line else {})
    (record,) = read_records(write_jsonl(tmp_path / "b.jsonl", line))
    assert record.completions == ["5", "4"] and record.rewards == [1, 2]
    record.ends = [256, 256]
    rollout = encode(*chat, [record])
    prompt = chat[1].decode(rollout.prompt_ids[0][rollout.prompt_mask[0]])
    assert prompt == (RENDERED if where != "beside as a text" else "[user]2+2?\n[assistant]")


FOUR, FIVE = [*TURNS, answer("4")], [*TURNS, answer("5")]
SCORED = {"prompt": "a", "completions": ["b", "c"], "rewards": [1, 2]}


@pytest.mark.parametrize(
    "line, message",
    [
        ({"chosen": FOUR, "rejected": FIVE[1:]}, "do not answer the same prompt"),
        ({"completions": [FOUR, FOUR, FIVE[1:]]}, "do not answer the same prompt"),
        ({"chosen": FOUR, "rejected": FIVE, "prompt": "3+3?"}, "do not begin with its prompt"),
        ({"chosen": TURNS, "rejected": TURNS}, "does not end with a turn of the assistant"),
        ({"chosen": [answer("4")], "rejected": [answer("5")]}, "needs a text under 'prompt'"),
        ({"prompt": "a", "chosen": [answer("4")], "rejected": "5"}, "neither a text nor a list"),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "neither a text nor a list"),
        ({"prompt": "a", "chosen": [], "rejected": []}, "needs at least one message"),
        (SCORED | {"ends": [1, -5]}, "'ends'"),
        (SCORED | {"ends": [1, 1.5]}, "'ends'"),
    ],
)
def test_conversations_that_do_not_fit_together(tmp_path, line, message):
    with pytest.raises(UserError, match=f"a.jsonl, line 1: .*{message}"):
        read_records(write_jsonl(tmp_path / "a.jsonl", line))


@pytest.mark.parametrize("script", [gpg, grpo, copg])
def test_scripts_train_on_chat_data(script, chat_dir, tmp_path):
    """On messages, with a system turn before those that have none."""
    lines = [{"messages": [{"role": "user", "content": f"{i}?"}], "answer": i} for i in range(20)]
    path, out = write_jsonl(tmp_path / "a.jsonl", *lines), tmp_path / "run"
    flags = ["--task", path, "--system", "Be brief."]
    if script is copg:
        flags += ["--pairs", 4]
    else:
        flags += ["--group-size", 2]
    train(script, chat_dir, out, *flags)
    script.train(script.parse_args(["--resume", str(out), "--steps", "2"]))
    assert json.loads((out / "config.json").read_text())["system"] == "Be brief."


# ---- a system turn ----


def test_a_system_turn_stands_before_every_prompt(chat_dir):
    model, tokenizer = common.load_model(chat_dir, "cpu", system="Be brief.")
    rollout = sample(model, tokenizer, ["1+1?", TURNS[1:]], 2, 3)
    rows = zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
    texts = [tokenizer.decode(ids[mask]) for ids, mask in rows]
    assert texts == ["[system]Be brief.\n[user]1+1?\n[assistant]"] * 2 + [RENDERED] * 2
    with pytest.raises(UserError, match="a system turn of its own: leave out --system"):
        encode_prompts(model, tokenizer, [TURNS], 3)


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "--system needs a chat template"),
        (CHAT.replace("[{{ m.role }}]", "{% if m.role == 'system' %}{{ raise_exception('no') }}"
                      "{% endif %}"), "--system: .*refuses a prompt: no"),
        ("{{ messages[-1].content }}", "leaves the system turn out"),
    ],
)  # fmt: skip
def test_a_template_without_a_place_for_a_system_turn(small, template, message):
    model, tokenizer = small
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        set_system(model, tokenizer, "Be brief.")


# ---- stop tokens ----


def test_a_given_completion_has_one_end(chat, tmp_path):
    """Written out in the text or not; one in the middle is refused."""
    model, tokenizer = chat
    args = copg.parse_args(["--model", "m", "--data", "d", "--micro-batch-tokens", "999"])
    eos = "<|endoftext|>"
    texts = [f"2{eos}", "2", f"2{eos}!", f"{eos}2", f"2{eos}{eos}"]
    records = [Record("1+1?", [text, "3"], [1.0, 0.0], where=f"f, line {text}") for text in texts]
    kept = copg.score_records(records, model, tokenizer, None, args)
    assert [record.where for record in kept] == [f"f, line 2{eos}", "f, line 2"]
    assert kept[0].completions == kept[1].completions == ["2", "3"]
    assert kept[0].ends == kept[1].ends == [256, 256]
    assert kept[0].ref_logprobs == kept[1].ref_logprobs
    ids = encode(model, tokenizer, kept[:1]).completion_ids
    assert [tokenizer.decode(row) for row in ids] == [f"2{eos}", f"3{eos}"]


def test_the_token_0_may_end_a_completion(small):
    """As in GPT-NeoX. -1 says that it was cut."""
    rollout = encode(*small, [Record("1", ["2", "3"], ends=[0, -1])])
    assert rollout.completion_ids[:, 1].tolist() == [0, 0]
    assert rollout.completion_mask.tolist() == [[True, True], [True, False]]


def test_a_prompt_has_no_end(small, model_dirs):
    """Some tokenizers write an EOS after every text."""
    model, tokenizer = small
    write_around(tokenizer, "<|pad|> $A <|endoftext|> <|pad|>")
    assert tokenizer.decode(tokenizer("1").input_ids) == "<|pad|>1<|endoftext|><|pad|>"
    ids, mask, _ = encode_prompts(model, tokenizer, ["1", "23"], 4)
    texts = [tokenizer.decode(row[m]) for row, m in zip(ids, mask, strict=True)]
    assert texts == ["<|pad|>1", "<|pad|>23"]


def test_special_tokens_reach_the_reward(small, monkeypatch):
    model, tokenizer = small
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>"]})
    a, b = tokenizer("ab").input_ids
    draws = [[a, a, a], [257, 256, 257], [b, 256]]
    steps = iter(draws)

    def draw(logits, temperature):
        tokens = torch.tensor(next(steps))[: len(logits)]
        return tokens, torch.zeros(len(tokens))

    monkeypatch.setattr(common, "draw", draw)
    rollout = sample(model, tokenizer, ["1"], 3, 3)
    assert rollout.texts[0] == "a<|pad|>b" and rollout.texts[1] == "a"
    assert "<|endoftext|>" not in "".join(rollout.texts)


# ---- what fits ----


def test_records_that_do_not_fit_are_named_and_left_out(model_dirs, tmp_path, capsys):
    lengths = {2: 300, 5: 250, 11: 256}
    lines = [{"prompt": "1" * lengths.get(i, 3 + i), "answer": 1} for i in range(1, 21)]
    path, out = write_jsonl(tmp_path / "a.jsonl", *lines), tmp_path / "run"
    run = train(gpg, model_dirs["qwen2"], out, "--task", path, "--save-every", 1)
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(said) == 2  # line 11 is held out
    assert said[0].startswith("2 of 18 records left out: lines 2, 5; ") and "300 tokens" in said[0]
    assert said[1].startswith("1 of 2 records left out: lines 11; ")
    problem, _ = run.problem, gpg.train(gpg.parse_args(["--resume", str(out), "--steps", "12"]))
    assert problem < 10**7 + 18  # the second run went beyond a pass
    lines = [{"prompt": "1" * 300, "answer": 1}] * 30
    with pytest.raises(UserError, match=r"no record is left: .*bad.jsonl, line 1: .*300 tokens"):
        bad = write_jsonl(tmp_path / "bad.jsonl", *lines)
        train(grpo, model_dirs["qwen2"], tmp_path / "other", "--task", bad)
    assert not list((tmp_path / "other").iterdir())


def test_at_most_ten_lines_are_named(model_dirs, tmp_path, capsys):
    lines = [{"prompt": "1" * (3 if i % 2 else 300), "answer": 1} for i in range(30)]
    path = write_jsonl(tmp_path / "a.jsonl", *lines)
    train(gpg, model_dirs["qwen2"], tmp_path / "run", "--task", path, "--eval-task", "add")
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(said) == 1 and said[0].startswith("15 of 30 records left out: lines 1, 3, 5, 7, 9, ")
    assert ", 19, ...; " in said[0] and "line 21" not in said[0]


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_each_record_is_judged_by_itself(model_dirs, tmp_path, family, capsys):
    """Context 256: a long prompt with short completions beside a short prompt with long ones."""
    model, tokenizer = common.load_model(model_dirs[family], "cpu")
    records = [
        Record("1" * 201, ["abc", "d"], [1.0, 0.0], [256, 256], where="f, line 1"),
        Record("12", ["x" * 200, "y" * 90], [1.0, 0.0], [256, -1], where="f, line 2"),
        Record("12", ["x" * 200, "y" * 254], [1.0, 0.0], [256, 256], where="f, line 3"),
        Record("12", ["x" * 200, ""], [1.0, 0.0], [256, -1], where="f, line 4"),
    ]
    args = copg.parse_args(["--model", "m", "--data", "d", "--micro-batch-tokens", "9999"])
    kept = copg.score_records(records, model, tokenizer, None, args)
    assert [record.where for record in kept] == ["f, line 1", "f, line 2"]
    assert "2 of 4 records left out: lines 3, 4; f, line 3: " in capsys.readouterr().out
    rollout = encode(model, tokenizer, kept)
    close(completion_logprobs(model, rollout), naive_logprobs(model, rollout), 5e-5)
    expected = naive_logprobs(model, rollout).sum(1).view(2, 2)
    close(torch.tensor([record.ref_logprobs for record in kept]), expected, 1e-3)


def test_a_record_that_the_reward_model_cannot_read_is_left_out(small):
    class Judge:
        def encode(self, prompts, completions):
            assert len(prompts) == len(completions)
            if "bad" in completions:
                raise UserError("too long for the reward model")

        def rewards(self, prompts, completions):
            return torch.tensor([float(len(text)) for text in completions])

    records = [Record("1", [text, "b"], None, where=f"f, line {text}") for text in ("bad", "good")]
    args = copg.parse_args(["--model", "m", "--data", "d", "--micro-batch-tokens", "999"])
    (record,) = copg.score_records(records, *small, Judge(), args)
    assert record.where == "f, line good" and record.rewards == [4, 1]


def test_equal_rewards_are_said(small, capsys):
    records = [Record("1", ["a", "b"], rewards) for rewards in ([1, 1], [2, 2], [0, 1], [0, 0])]
    args = copg.parse_args(["--model", "m", "--data", "d", "--micro-batch-tokens", "999"])
    copg.score_records(records, *small, None, args)
    assert "the rewards of 0.750 of the prompts are all equal" in capsys.readouterr().out


# ---- other files ----


def test_an_eval_task_leaves_all_files_whole(model_dirs, tmp_path, monkeypatch):
    paths = []
    for name in ("mine", "other"):
        lines = [{"prompt": f"{name} {i}", "answer": i} for i in range(20)]
        paths.append(write_jsonl(tmp_path / f"{name}.jsonl", *lines))
    mine, other = paths
    tasks = make_tasks(mine, other)
    for task, name in zip(tasks, ("mine", "other"), strict=True):
        found = {x.rpartition(" ")[2] for x in get_prompts(task, range(20)) if x.startswith(name)}
        assert found == {str(i) for i in range(20)}
    assert [task.unwrapped.size for task in make_tasks(mine, None)] == [18, 2]
    assert [task.unwrapped.split for task in make_tasks("add", "count")] == ["train", "test"]
    seen = []
    evaluate = common.evaluate
    for script in (gpg, grpo):
        monkeypatch.setattr(script, "evaluate", lambda *a: seen.append(a[2]) or evaluate(*a))
        flags = ["--task", mine, "--eval-task", other]
        train(script, model_dirs["qwen2"], tmp_path / script.__name__, *flags)
    assert [task.unwrapped.records[0].prompt for task in seen] == ["other 0"] * 4
    assert {task.unwrapped.size for task in seen} == {20}


def test_copg_evaluates_on_another_task_and_trains_on_all_of_its_data(
    model_dirs, tmp_path, monkeypatch
):
    lines = [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    path = write_jsonl(tmp_path / "a.jsonl", *lines)
    run = train(copg, model_dirs["qwen2"], tmp_path / "run", "--data", path, "--eval-task", "add")
    samples = [json.loads(x) for x in (run.dir / "samples.jsonl").read_text().splitlines()]
    assert all("+" in sample["prompt"] and "reward" in sample for sample in samples)
    seen = set()

    def encode_and_note(model, tokenizer, records):
        seen.update(record.prompt for record in records)
        return encode(model, tokenizer, records)

    monkeypatch.setattr(copg, "encode", encode_and_note)
    copg.train(copg.parse_args(["--resume", str(run.dir), "--steps", "4"]))
    assert seen == {"0", "1", "2", "3"}


@pytest.mark.parametrize("script, name", [(gpg, "task"), (gpg, "eval-task"), (copg, "data")])
def test_data_that_changed_are_not_resumed(model_dirs, tmp_path, script, name):
    lines = [{"prompt": f"{i}", "answer": 1} for i in range(20)]
    if script is copg:
        lines = [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(20)]
    path, out = write_jsonl(tmp_path / "a.jsonl", *lines), tmp_path / "run"
    train(script, model_dirs["qwen2"], out, f"--{name}", path)
    resume = script.parse_args(["--resume", str(out), "--steps", "3"])
    if script is copg:  # its own copy counts; the file that was given need not be there any more
        (tmp_path / "a.jsonl").unlink()
        script.train(script.parse_args(["--resume", str(out), "--steps", "2"]))
        path = out / "data.jsonl"
        changed = path.read_text().replace('"a"', '"c"', 1)
        path.write_text(changed)
    else:
        write_jsonl(tmp_path / "a.jsonl", *lines[:-1], lines[-1] | {"answer": 2})
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="run: its data have changed since it was begun"):
        script.train(resume)
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


# ---- rewards of a group at once ----


class Ranked(TextTask):
    """The rank of a completion in its group, which no completion has by itself."""

    def problem(self, index):
        return f"prompt {index}", f"answer {index}"

    def rewards(self, completions, answer):
        assert answer.startswith("answer")
        order = sorted(completions)
        return torch.tensor([float(order.index(text)) for text in completions])


def test_a_task_may_judge_a_group_at_once():
    rewards, solved = get_rewards(Ranked(), [3, 4], ["b", "a", "c", "z", "y", "x"])
    assert rewards.tolist() == [[1, 0, 2], [2, 1, 0]]
    assert solved.tolist() == [[True, False, True], [True, True, False]]
    assert Ranked().reward("a", "answer 1") == 0
    assert ManyAs().rewards(["a", "ba", "b"], "a") == [1 / 8, 1 / 8, 0]

    class Short(Ranked):
        def rewards(self, completions, answer):
            return [1.0]

    with pytest.raises(UserError, match="problem 3 of the task has 1 rewards for 2 completions"):
        get_rewards(Short(), [3], ["a", "b"])


# ---- pictures ----


def saved(image, kind="png", **options):
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def test_a_picture_is_read_as_a_viewer_shows_it(tmp_path):
    path = tmp_path / "a.png"
    black_on_nothing = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    black_on_nothing.putpixel((1, 0), (0, 0, 0, 255))
    path.write_bytes(saved(black_on_nothing))
    expected = np.full((2, 4, 3), 255, np.uint8)
    expected[0, 1] = 0
    assert np.array_equal(read_image(str(path), "x"), expected)
    path.write_bytes(saved(black_on_nothing.convert("LA")))
    assert np.array_equal(read_image(str(path), "x"), expected)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path.write_bytes(saved(Image.new("RGB", (24, 16)), "jpeg", exif=exif))
    assert read_image(str(path), "x").shape == (24, 16, 3)
    for kind, dtype in (("png", np.uint16), ("tiff", np.int32), ("tiff", np.float32)):
        path.write_bytes(saved(Image.fromarray(np.zeros((4, 4), dtype)), kind))
        with pytest.raises(UserError, match="8 bits per channel"):
            read_image(str(path), "x")


PARTS = [{"type": "image"}, {"type": "text", "text": "what?"}]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "<image>what?", "images": ["a.png"]},
        {"prompt": "what?", "image": "a.png", "images": None},
        {"messages": [{"role": "user", "content": "<image>\nwhat?"}], "images": ["a.png"]},
        {"prompt": [{"role": "user", "content": PARTS}], "images": ["a.png"]},
    ],
)
def test_one_picture_in_a_list(tmp_path, record):
    pixels = np.random.default_rng(0).integers(256, size=(5, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    task = make_task(write_jsonl(tmp_path / "a.jsonl", record | {"answer": 1}))
    (prompt,) = get_prompts(task, [0])
    assert prompt["text"] == "what?" and np.array_equal(prompt["image"], pixels)
    line = record | {"chosen": "a", "rejected": "b"}
    (read,) = read_records(write_jsonl(tmp_path / "b.jsonl", line))
    assert read.prompt["text"] == "what?" and read.prompt["image"].endswith("a.png")


def test_models_that_see_the_future_are_refused(tmp_path, small):
    for part in (make_model("bert", AutoModelForMaskedLM), small[1]):
        part.save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="it is not causal"):
        common.load_model(str(tmp_path / "bert"), "cpu")
