"""The page of report.py: its data, what is hostile in it, what it refuses; and in a browser."""

import json
import re
import runpy
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import report
from helpers import ManyAs, make_rollout, naive_logprobs, run_script
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import common
import gpg
import grpo
from tasks import UserError, first_problem, get_prompts, make_task, tiny
from tasks.pictures import data_uri
from tasks.tiny import tiny_tokenizer

HOSTILE = [
    "</script><script>document.title = 'no'</script>",
    "<img src=x onerror=\"document.title = 'no'\">",
    "<!-- <script> a\u2028b\u2029c\r\0 &lt; ]]> ' \"",
    "\\u003c/script\\u003e DATA ${x} {{y}} \ud83d\ude42 \u202egnp",
]


def read_page(path) -> dict:
    """The data of a page; no text of it became a tag, an attribute or a comment."""
    tags, texts = [], []

    class Reader(HTMLParser):
        handle_starttag = lambda self, tag, attributes: tags.append((tag, attributes))  # noqa: E731
        handle_data = lambda self, text: texts.append(text)  # noqa: E731
        handle_comment = lambda self, text: tags.append(text)  # noqa: E731

    Reader().feed(report.Path(report.__file__).with_suffix(".html").read_text(encoding="utf-8"))
    expected, tags[:], texts[:] = list(tags), [], []
    Reader().feed(path.read_text(encoding="utf-8"))
    assert tags == expected
    return json.loads(next(text for text in texts if text.startswith('{"runs"')))


class Letters(ManyAs):
    """Of either sign; equal in a group where the problem's number is a multiple of 3."""

    def problem(self, index):
        return f"{index % 7}:", f"{index % 3}"

    def reward(self, completion, answer):
        return 0.5 if answer == "0" else sum(map(ord, completion)) % 3 - 1.5


@pytest.fixture(scope="module")
def runs(model_dirs, tmp_path_factory):
    """A run of gpg.py and one of grpo.py, three steps each, at a rate that moves the model."""
    path, flags = tmp_path_factory.mktemp("runs"), ["--lr", 0.01, "--warmup", 0, "--group-size", 4]
    with pytest.MonkeyPatch.context() as patch:
        for script in (gpg, grpo):
            run_script(script, path, patch, str(model_dirs["qwen2"]), Letters("train"), *flags)
    return path / "run0", path / "run1"


def write_samples(run, path, samples, **config):
    """A copy of a run with other samples."""
    shutil.copytree(run, path)
    (path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    config = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(config))
    return path


def make_page(*argv):
    out = report.Path(argv[-1])
    report.main([*map(str, argv[:-1]), "--out", str(out)])
    return read_page(out)


def test_page(runs, tmp_path):
    data, tokenizer = make_page(*runs, tmp_path / "report.html"), tiny_tokenizer()
    for run, found, script in zip(runs, data["runs"], (gpg, grpo), strict=True):
        samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        rows = [(group, row) for group in found["groups"] for row in group["rows"]]
        assert len(rows) == len(samples) == 3 * 3 * 4
        assert any(group["valid"] for group in found["groups"])
        for sample, (group, row) in zip(samples, rows, strict=True):
            assert {x: group[x] for x in ("step", "group", "prompt")}.items() <= sample.items()
            for name in ("completion", "reward", "truncated", "logprobs"):
                assert row[name] == sample[name]
            assert "".join(row["tokens"]) == tokenizer.decode(sample["tokens"])  # with its EOS
            assert len(row["tokens"]) == len(sample["tokens"])
            rewards = np.array([other["reward"] for other in group["rows"]])
            advantage = row["reward"] - rewards.mean()
            if script is grpo:
                advantage /= rewards.std(ddof=1) + 1e-4
            assert row["advantage"] == pytest.approx(advantage, abs=1e-6)
            assert group["valid"] == (len(set(rewards)) > 1)
        (name, before, after), *_ = found["closing"]
        assert name == str(run) and re.fullmatch(r"accuracy 0\.\d{3} ± 0\.\d{3}", before)
        assert found["metrics"]["step"] == [0, 1, 2, 3] and found["metrics"]["loss"][0] is None
        assert after == "accuracy {:.3f} ± {:.3f}".format(
            *(found["metrics"][x][-1] for x in ("eval_accuracy", "eval_accuracy_stderr"))
        )
    flags = {name: values for name, *values in data["flags"]}
    assert flags["script"] == ["gpg.py", "grpo.py"] and flags["kl_beta"] == ["-", "0.04"]
    assert not {"lr", "out", "steps"} & flags.keys()


def test_a_dead_group():
    """Its advantages are 0, although three .1s have another mean in floating point."""
    rows = [{"step": 1, "group": 0, "prompt": "p", "reward": 0.1} for _ in range(3)]
    group = report.make_group({"script": "gpg.py", "f_norm": "1"}, rows)
    assert [row["advantage"] for row in group["rows"]] == [0.0] * 3 and not group["valid"]


def test_what_became_likelier(runs, tmp_path):
    """Before training is what the first step has sampled with; after training is the checkpoint."""
    run = runs[0]
    data = make_page("--rescore", run, tmp_path / "report.html")["runs"][0]
    model, tokenizer = common.load_model(str(run / "checkpoint"), "cpu")
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    rows = [row for group in data["groups"] for row in group["rows"]]
    prompts = [tokenizer(sample["prompt"]).input_ids for sample in samples]
    rollout = make_rollout(prompts, [sample["tokens"] for sample in samples])
    expected = naive_logprobs(model, rollout).tolist()
    moved, changes = 0.0, {-1: [], 0: [], 1: []}
    for sample, row, after in zip(samples, rows, expected, strict=True):
        if sample["step"] == 1:
            assert row["before"] == pytest.approx(sample["logprobs"], abs=2e-3)
        assert row["after"] == pytest.approx(after[: len(row["tokens"])], abs=2e-3)
        moved = max(moved, *np.abs(np.subtract(row["after"], row["before"])))
        changes[np.sign(row["advantage"])].append(sum(row["after"]) - sum(row["before"]))
    assert moved > 0.2 and all(changes.values())
    names = {"above 0": 1, "0 (dead)": 0, "below 0": -1}
    assert [name for _, name, *_ in data["change"]] == list(names)
    for _, name, n, change in data["change"]:
        assert int(n) == len(changes[names[name]])
        assert float(change.split()[0]) == pytest.approx(np.mean(changes[names[name]]), abs=1e-3)


def test_copg(runs, tmp_path):
    """Its evaluations are not trained on; its online steps are as GPG's."""
    tokens = {"prompt_tokens": [80], "tokens": [65, 66], "logprobs": [-1, -2]}
    shown = [{"step": 0, "prompt": f"p{i // 2}", "completion": "ab"} | tokens for i in range(4)]
    shown = [s | {"reward": 1.5, "kl": 0.1, "length": 3} for s in shown]
    online = {"step": 1, "group": 0, "prompt": "p", "completion": "ab", "truncated": True} | tokens
    online = [online | {"reward": r} for r in (1, 4)]
    path = write_samples(runs[0], tmp_path / "copg", [*shown, *online], script="copg.py")
    data = make_page("--rescore", path, tmp_path / "report.html")["runs"][0]
    first, second, third = data["groups"]
    assert [len(group["rows"]) for group in data["groups"]] == [2, 2, 2]
    assert first["group"] is None and "valid" not in second and third["valid"]
    assert [row["advantage"] for row in third["rows"]] == [-1.5, 1.5]
    for row in first["rows"] + second["rows"]:
        assert row["kl"] == 0.1 and "advantage" not in row
        assert len(row["after"]) == len(row["before"]) == len(row["tokens"]) == 2


def hostile_run(run, path):
    fields = {"step": 1, "truncated": False, "prompt": HOSTILE[0]}
    fields |= {"prompt_tokens": [1, 2], "tokens": [65], "logprobs": [-0.5]}
    samples = [fields | {"group": 0, "completion": x, "reward": i} for i, x in enumerate(HOSTILE)]
    samples += [fields | {"step": 2, "group": 0, "completion": "half \ud83d", "reward": 0.0}] * 2
    return write_samples(run, path, samples, schedule=HOSTILE[0])


def test_hostile_texts(runs, tmp_path):
    """They stay texts, to the last character; half of a surrogate pair is shown as a "?"."""
    run = hostile_run(runs[0], tmp_path / "<b>hostile")
    data = make_page(run, runs[0], tmp_path / "report.html")
    first, second = data["runs"][0]["groups"]
    assert [row["completion"] for row in first["rows"]] == [
        text.encode("utf-16", "surrogatepass").decode("utf-16") for text in HOSTILE
    ]
    assert first["prompt"] == HOSTILE[0] and second["rows"][0]["completion"] == "half ?"
    assert ["schedule", HOSTILE[0], "constant"] in data["flags"]


SAMPLE = {"step": 1, "group": 0, "prompt": "p", "completion": "c", "reward": 1.0}
SAMPLE |= {"prompt_tokens": [1], "tokens": [65], "logprobs": [-0.5]}
DAMAGED = [
    ("samples.jsonl", None, "no samples.jsonl"),
    ("metrics.csv", None, "no metrics.csv"),
    ("metrics.csv", "step,loss\n", "no step in it"),
    ("config.json", None, "config.json: not of a run"),
    ("config.json", "[1]", "config.json: not of a run"),
    ("config.json", "{}", "config.json: not of a run"),
    ("samples.jsonl", "", "no completions in samples.jsonl yet"),
    ("samples.jsonl", '{"step": 1\n', "line 1: not of a run"),
    ("samples.jsonl", "\xff\n".encode("latin-1"), "samples.jsonl: not of a run"),
    ("samples.jsonl", "[]\n", "line 1: not of a run"),
    ("checkpoint", None, "checkpoint: not readable"),
    *(
        ("samples.jsonl", json.dumps(SAMPLE) + "\n" + json.dumps(SAMPLE | wrong) + "\n", "line 2:")
        for wrong in (
            {"prompt": 1}, {"completion": None}, {"step": "1"}, {"reward": "1"}, {"group": 0.5},
            {"reward": float("nan")}, {"tokens": ["a"]}, {"tokens": [-1]}, {"tokens": [2**40]},
            {"prompt_tokens": [None]}, {"prompt_tokens": None}, {"tokens": 5},
            {"logprobs": [None]}, {"logprobs": []}, {"reward": 10**400},
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("name, text, message", DAMAGED)
def test_damaged_runs(runs, tmp_path, name, text, message):
    run = write_samples(runs[0], tmp_path / "run", [SAMPLE])
    shutil.rmtree(run / name) if name == "checkpoint" else (run / name).unlink()
    if text is not None:
        (run / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        report.main([str(runs[0]), str(run), "--out", str(tmp_path / "report.html")])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(run) in str(error.value) and not (tmp_path / "report.html").exists()


def test_a_directory_without_samples(tmp_path, monkeypatch, capsys):
    (tmp_path / "regret.csv").write_text("epoch,CoPG\n0,1\n")  # as bandit_toy.py leaves it
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(report.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "no samples.jsonl" in error


def test_steps_are_thinned(runs, tmp_path):
    samples = [SAMPLE | {"step": step} for step in range(1, 101) for _ in range(2)]
    data = make_page(
        "--steps", "4", write_samples(runs[0], tmp_path / "r", samples), tmp_path / "p"
    )
    assert [group["step"] for group in data["runs"][0]["groups"]] == [1, 34, 67, 100]
    assert [len(group["rows"]) for group in data["runs"][0]["groups"]] == [2] * 4


def test_token_texts():
    """Characters of several tokens are whole; a space before a word is not lost."""
    tokenizer, text = tiny_tokenizer(), "1é+🙂 ü"
    ids = tokenizer(text).input_ids
    assert report.token_texts(tokenizer, ids) == [
        *"1",
        "",
        "é",
        "+",
        "",
        "",
        "",
        "🙂",
        " ",
        "",
        "ü",
    ]
    assert "".join(report.token_texts(tokenizer, ids[:6])).startswith("1é+")  # cut in the middle
    words = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "?": 2}, "?"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = PreTrainedTokenizerFast(tokenizer_object=words)
    assert report.token_texts(words, words("one two one").input_ids) == ["one", " two", " one"]


@pytest.mark.parametrize("kind", ["task", "file"])
def test_pictures(monkeypatch, tmp_path, kind):
    """The picture of a group is found by its place in the run, and it is scored with it. With
    --eval-task nothing of a file is held out, so that its problems have other places."""
    name, more = "count", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "WARM_START", {"steps": 2, "tokens_per_step": 512, "lr": 1e-3})
        if kind == "file":
            name, lines = str(tmp_path / "count.jsonl"), ""
            for x in get_prompts(make_task("count"), range(25)):
                line = {"prompt": x["text"], "image": data_uri(x["image"]), "answer": "3"}
                lines += json.dumps(line) + "\n"
            Path(name).write_text(lines)
            more = ["--eval-task", "count", "--model", tiny.tiny_model(make_task("count"))]
        flags = "--steps 2 --prompts 4 --group-size 2 --max-new-tokens 6 --device cpu"
        flags += " --eval-problems 2 --beta-th 1 --max-rounds 3"
        patch.setattr("run.draw_curves", lambda *_: None)
        flags = [*flags.split(), *more, "--task", name, "--out", str(tmp_path / "run")]
        gpg.train(gpg.parse_args(flags))
        data = make_page("--rescore", tmp_path / "run", tmp_path / "report.html")["runs"][0]
    assert data["metrics"]["rounds"][1:] == [3, 3]
    task, first = make_task(name, "train", whole=kind == "file"), first_problem(0)
    for i, group in enumerate(data["groups"]):
        (prompt,) = get_prompts(task, [first + 12 * (i // 3) + i % 3])
        assert group["prompt"] == prompt["text"] and group["image"] == data_uri(prompt["image"])
        for row in group["rows"]:
            if group["step"] == 1:
                assert row["before"] == pytest.approx(row["logprobs"], abs=2e-3)
            assert len(row["after"]) == len(row["tokens"])
    assert len({group["image"] for group in data["groups"]}) == 6


# ---- in a browser ----


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    names = ("chromium", "chromium-headless-shell", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)  # None: Playwright's own
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error:
            pytest.skip("no Chromium")
        yield browser
        browser.close()


@pytest.mark.parametrize("width, scheme", [(1200, "light"), (390, "dark")])
def test_in_a_browser(browser, runs, tmp_path, width, scheme):
    run = hostile_run(runs[0], tmp_path / "hostile")
    make_page("--rescore", runs[0], run, tmp_path / "report.html")
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    texts = lambda css: page.locator(css).all_text_contents()  # noqa: E731
    assert len(texts(".row")) == 12 and page.locator("polyline").count() > 10
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    luminance = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert (int(luminance) > 128) == (scheme == "light")

    first = texts(".text")
    page.locator("#step").press("ArrowRight")  # the keyboard chooses the step
    assert texts("#number") == ["2"] and texts(".text") != first
    page.select_option("#right", "1")
    assert 0 < len(texts(".row")) < 12
    page.locator(".text").first.focus()
    page.keyboard.press("ArrowRight")
    assert "first model" in texts("#token")[0] and "checkpoint" in texts("#token")[0]
    page.select_option("#right", "")

    page.select_option("#run", "1")  # the hostile run
    page.locator("#step").press("Home")
    page.select_option("#colour", "log-prob when sampled")
    assert texts("pre") == [HOSTILE[0]] and len(texts(".row")) == 4
    page.fill("#search", "ONERROR")
    assert len(texts(".row")) == 1
    page.fill("#search", "half")
    assert texts(".row") == []
    page.locator("#search").press("Enter")
    assert texts("#number") == ["2"] and len(texts(".row")) == 2
    assert page.title() == "Policy gradient report" and page.locator("main img").count() == 0
    assert said == [(tmp_path / "report.html").as_uri()]
    page.close()
