"""The contract of a task of your own and of its two runs. `-k q1` runs the tests of Q1."""

import csv
import json
import math
from pathlib import Path

import pytest

import tasks as project

HERE = Path(__file__).resolve().parent
FREE = {"out", "resume", "seed", "device"}  # flags that may differ as they like


@pytest.fixture
def tasks(monkeypatch):
    """Your task, for training and for the test, as the scripts make them."""
    monkeypatch.chdir(HERE)
    monkeypatch.syspath_prepend(HERE)
    import my_tasks

    return [project.make_task(my_tasks.TASK, split) for split in ("train", "test")]


def test_q1_a_problem_is_always_the_same(tasks):
    """The same index gives the same prompt, text that is not empty; there are many problems."""
    for task in tasks:
        problems = list(range(min(task.unwrapped.size or 200, 200)))
        prompts = project.get_prompts(task, problems)
        assert prompts == project.get_prompts(task, problems)
        assert len(set(prompts)) >= 50 and all(prompt.strip() for prompt in prompts)


def test_q1_training_is_not_the_test(tasks):
    """No prompt of the first 500 for training is among the first 200 of the test."""
    train = project.get_prompts(tasks[0], list(range(500)))
    assert not set(train) & set(project.get_prompts(tasks[1], list(range(200))))


def test_q1_rewards_tell_good_from_bad(tasks):
    """Rewards are finite; demonstrations get more than nonsense, and not all get the same."""
    task, problems = tasks[0], list(range(50))
    good = [task.unwrapped.demonstration(i) for i in problems]
    rewards, _ = project.get_rewards(task, problems, good)
    nonsense, _ = project.get_rewards(task, problems, ["?! nonsense"] * 50)
    empty, _ = project.get_rewards(task, problems, [""] * 50)
    assert rewards.mean() > max(nonsense.mean(), empty.mean())
    assert rewards.unique().numel() > 1 or (rewards > nonsense).all()


@pytest.fixture
def runs():
    """(config, rows of metrics.csv) of runs/a and runs/b."""
    found = []
    for folder in (HERE / "runs" / run for run in "ab"):
        with (folder / "metrics.csv").open(encoding="utf-8") as file:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            found.append((config, list(csv.DictReader(file))))
    return found


def test_q2_the_runs_are_finished(runs):
    """Both runs are of your task, reached their last step, 20 or more, and were evaluated."""
    for config, rows in runs:
        assert config["task"].startswith("my_tasks:")
        assert config["steps"] >= 20 and int(rows[-1]["step"]) == config["steps"]
        evaluated = [float(row["eval_accuracy"]) for row in rows if row.get("eval_accuracy")]
        assert len(evaluated) >= 2 and all(map(math.isfinite, evaluated))


def test_q2_the_runs_differ_in_one_flag(runs):
    """One flag differs, beside --out, --seed and --device; and the metrics differ, too."""
    (a, first), (b, second) = runs
    flags = [name for name in (a.keys() | b.keys()) - FREE if a.get(name) != b.get(name)]
    assert len(flags) == 1, flags
    assert [row["loss"] for row in first] != [row["loss"] for row in second]
