"""MATH and the five test sets: each file by its own columns, and the download."""

import email.message
import hashlib
import io
import json
import urllib.error

import pytest
import torch
from helpers import write_jsonl

from tasks import UserError, cache_dir, get_rewards, make_task, maths

SOLUTION = "We add. So $\\boxed{\\frac{1}{2}}$ it is."
FILES = {  # task: a record of its form, the problem, the answer
    "math": (
        {"problem": "P", "solution": "S", "answer": "\\frac{1}{2}", "level": 4, "subject": ""},
        "P", "\\frac{1}{2}",
    ),
    "math500": ({"problem": "P", "solution": SOLUTION, "answer": "x=5", "level": 1}, "P", "x=5"),
    "aime24": ({"id": 60, "problem": "P", "answer": "025", "url": "", "question": "P"}, "P", "025"),
    "amc23": ({"id": 0, "problem": "P", "answer": 27.0, "url": "", "question": "P"}, "P", "27"),
    "minerva": ({"problem": "P", "solution": SOLUTION, "type": "", "idx": 0}, "P", "\\frac{1}{2}"),
    "olympiadbench": (
        {"context": "C", "question": "Q", "final_answer": ["$69$,$84$"], "unit": "km",
         "is_multiple_answer": True, "answer_type": "Numerical", "error": None, "solution": ["S"]},
        "C\nQ", "$69$,$84$",
    ),
}  # fmt: skip


def put(task, split, *records):
    path = cache_dir() / ("math" if task == "math500" else task) / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, *records)


@pytest.fixture(autouse=True)
def own_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("name", FILES)
def test_each_file_by_its_own_columns(name):
    record, problem, answer = FILES[name]
    put(name, "test", record)
    task = make_task(name, "test")
    prompt, gold = task.unwrapped.problem(0)
    assert (prompt.partition("\nReason")[0], gold, task.unwrapped.size) == (problem, answer, 1)
    assert prompt.endswith("write the final answer as \\boxed{answer}.")
    assert task.unwrapped.records[0].prompt == prompt  # `leave_out_misfits` judges all of it
    completions = [f"\\boxed{{{gold}}}", "\\boxed{7}"]
    assert get_rewards(task, [0], completions)[0].tolist() == [[1, 0]]


def test_math_trains_on_levels_3_to_5():
    levels = [1, 2, 3, 4, 5, "Level 2", "Level 3", "Level ?", None]
    records = [{"problem": f"P{level}", "answer": 1, "level": level} for level in levels]
    put("math", "train", *records)
    put("math", "test", *records)
    problems = {split: make_task("math", split).unwrapped.records for split in ("train", "test")}
    prompts = [problem.prompt.partition("\n")[0] for problem in problems["train"]]
    assert prompts == ["P3", "P4", "P5", "PLevel 3"]
    assert len(problems["test"]) == len(levels)
    put("math", "train", *records[:2])
    with pytest.raises(UserError, match=r"train.jsonl: no problem of level 3, 4, 5$"):
        make_task("math")


@pytest.mark.parametrize("name", [name for name in FILES if name != "math"])
def test_no_run_trains_on_a_test_set(name):
    put(name, "train", FILES[name][0])
    with pytest.raises(UserError, match=f"^{name} is a test set, .* use --eval-task {name}$"):
        make_task(name)


def test_a_tolerance():
    record = FILES["olympiadbench"][0] | {"final_answer": ["4.2"], "unit": "%", "error": "1e-1"}
    put("olympiadbench", "test", record)
    several = FILES["olympiadbench"][0] | {"final_answer": ["3", "5"]}
    put("olympiadbench", "test", several)
    task = make_task("olympiadbench", "test")
    rewards = get_rewards(task, [0], ["\\boxed{5, 3}", "\\boxed{3}", "\\boxed{5}"])[0]
    assert rewards.tolist() == [[1, 0, 0]]
    put("olympiadbench", "test", record)
    completions = [r"\boxed{4.2}", r"\boxed{4.3\%}", r"\boxed{4.11}", r"\boxed{4.31}", "4", "", "x"]
    rewards = get_rewards(make_task("olympiadbench", "test"), [0], completions)[0]
    assert rewards.tolist() == [[1, 1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    "record",
    [
        {}, {"problem": "P"}, {"answer": 1}, {"problem": "P", "answer": ""},
        {"problem": 1, "answer": 1}, {"problem": "P", "answer": {}},
        {"problem": "P", "solution": "no box"},
    ],
)  # fmt: skip
def test_a_record_without_a_problem_or_an_answer_is_named(record):
    put("aime24", "test", FILES["aime24"][0], record)
    with pytest.raises(UserError, match=r"test.jsonl, line 2: needs a problem, and an answer or"):
        make_task("aime24", "test")


def test_a_download_is_checked_and_made_once(monkeypatch):
    content, asked = json.dumps(FILES["math"][0]).encode() + b"\n", []

    def answer(request):
        asked.append(request.full_url)
        if len(asked) == 1:
            raise urllib.error.URLError("no route")
        body = io.BytesIO(content)
        body.info = email.message.Message
        return body

    monkeypatch.setattr(torch.hub, "urlopen", answer)
    put_it = r"could not be downloaded \(.*{}.*\): put it into .*math as train.jsonl$"
    for reason in ("no route", "invalid hash value"):
        with pytest.raises(UserError, match=put_it.format(reason)):
            make_task("math")
        assert not list((cache_dir() / "math").iterdir())  # nothing is left behind
    monkeypatch.setitem(maths.SHA256, ("math", "train"), hashlib.sha256(content).hexdigest())
    for _ in range(2):
        assert make_task("math").unwrapped.size == 1
    assert asked == [maths.URLS["math", "train"]] * 3
