"""The course kit: handouts, and a grader that neither accuses nor misses. All mistakes: `check`."""

import contextlib
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]

import course  # noqa: E402
from mistakes import MISTAKES, known_in  # noqa: E402
from probe import same  # noqa: E402

from tasks import UserError  # noqa: E402


def submit(tmp_path, name, key, replacements=(), source=None):
    """-> share, feedback of one question, with parts of the finished file replaced."""
    file = course.questions(name)[key].file
    text = source or course.finished(name, file)
    for right, wrong in replacements:
        assert text.count(right) == 1, right
        text = text.replace(right, wrong)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    return course.grade_question(name, key, tmp_path)


def test_every_mistake_can_be_made_once():
    for questions, mistake, right, wrong, hint in MISTAKES:
        for name, key in map(str.split, questions.split(", ")):
            file = course.questions(name)[key].file
            source = course.finished(name, file, (right, wrong))
            assert source != course.finished(name, file) and hint.endswith("."), mistake
            path = ROOT / file if (ROOT / file).exists() else course.TEXTS / file
            assert path.read_text().count(right) == 1, mistake


def test_points_add_up():
    """To a hundred by the program; to 30 and 75 where a reader gives the rest."""
    for name in course.NAMES:
        assert sum(course.points_of(name).values()) == {"A6": 30, "A7": 75}.get(name, 100), name


def test_the_texts_name_what_is_to_be_written():
    for name in ("A0", "A1", "A2", "A3", "A4", "A5"):
        for key, question in course.questions(name).items():
            names = "`, `".join(x.removesuffix(".__init__") for x in question.names.split())
            where = rf"\*\*{key} [^*]*\*\* \(\d+ points; `{names}` in `{question.file}`\)"
            assert re.search(where, course.text_of(name)), f"{name} {key}"


def test_the_grader_works_for_every_mistake_of_four_assignments(capsys):
    """`check` of the cheap ones: full marks, none for the handout, every mistake named alone."""
    for name in ("A0", "A1", "A5", "A7"):
        assert course.check(name), capsys.readouterr().out
    assert capsys.readouterr().out.count(": named") == sum(x[0][:2] in "A0 A1 A5" for x in MISTAKES)


@pytest.mark.parametrize("name, key", [("A2", "Q2"), ("A4", "Q7")])
def test_the_finished_code_gets_full_marks_and_a_stub_none(tmp_path, name, key):
    assert submit(tmp_path, name, key)[0] == 1
    share, feedback = submit(
        tmp_path, name, key, source=course.handout(name, course.questions(name)[key].file)
    )
    assert share == 0 and f"not done yet ({key})" in feedback


UNUSUAL = """
import functools

EPS = 10 ** -4
LOW = functools.reduce(lambda a, b: a * b, [1.0, 1e-4])


class Centre:
    def __call__(self, rewards):
        return rewards - sum(rewards.unbind(1))[:, None] / rewards.shape[1]


@torch.no_grad()
def spread(rewards):
    return ((rewards - rewards.mean(1, True)) ** 2).sum(1).div(rewards.shape[1] - 1).sqrt()


def is_valid(rewards):
    # 1. look at every group
    # 2. compare with its first reward
    return (rewards != rewards[:, :1]).any(dim=1)


def group_advantages(rewards, f_norm="1"):
    centred = Centre()(rewards)
    return centred if f_norm == "1" else centred / (spread(rewards)[:, None] + (EPS + LOW) / 2)
"""


def test_unusual_correct_code_gets_full_marks_without_an_accusation(tmp_path):
    """Own constants, classes, decorators and numbered comments."""
    source = (ROOT / "gpg.py").read_text()
    source = source.replace(
        'if __name__ == "__main__":', UNUSUAL + '\n\nif __name__ == "__main__":'
    )
    share, feedback = submit(tmp_path, "A3", "Q1", source=source)
    assert share == 1 and "mistake" not in feedback


ONE_BACKWARD = [
    ("            mb_loss.backward()\n", "            losses.append(mb_loss)\n"),
    ("        for rows in micro_b", "        losses = []\n        for rows in micro_b"),
    (
        "        grad_norm = clip",
        "        model.zero_grad(set_to_none=False)\n        sum(losses).backward()\n"
        "        grad_norm = clip",
    ),
    ("        optimizer.zero_grad()\n", ""),
]  # fmt: skip


def test_gradients_may_be_cleared_in_any_way(tmp_path):
    """All forwards, gradients set to zeros, one backward: as good as any."""
    share, feedback = submit(tmp_path, "A3", "Q7", ONE_BACKWARD)
    assert share == 1 and "mistake" not in feedback


def test_a_mistake_in_other_words_is_named(tmp_path):
    """The same behaviour from code that has nothing in common with the listed text."""
    words = "a = rewards - rewards.mean(1, True)\n    B, n_valid = a.numel(), int((a != 0).sum())"
    right = "B, n_valid = len(rewards), int(is_valid(rewards).sum())"
    share, feedback = submit(tmp_path, "A3", "Q2", [(right, words)])
    mistake = "samples for groups"
    hint = known_in("A3 Q2")[mistake][2]
    assert share < 1 and f'"{mistake}": {hint}' in feedback


def test_other_mistakes_are_shown_but_not_named(tmp_path):
    share, feedback = submit(tmp_path, "A3", "Q2", [("return B / n_valid if", "return B / 3 if")])
    assert share == 0 and "known mistake" not in feedback
    assert "expected: 2\n  yours:    1.3333" in feedback
    change = (
        "centred = rewards - rewards.mean(1, keepdim=True)  #",
        "rewards -= rewards.mean(1, keepdim=True); centred = rewards  #",
    )
    share, feedback = submit(tmp_path, "A3", "Q1", [change])
    assert share == 0.5 and "changes its arguments" in feedback


def test_a_mistake_that_explains_only_a_part_is_not_named(tmp_path):
    """It gets the wrong check of "validity by a statistic" wrong, and others."""
    change = "rewards.amax(1) != rewards.amin(1)", "rewards.mean(1) > 0.1"
    share, feedback = submit(tmp_path, "A3", "Q1", [change])
    assert share == 0.5 and "known mistake" not in feedback


@pytest.mark.parametrize(
    "code, reason",
    [
        ("def is_valid(:", "SyntaxError"),
        ("import os; os._exit(0)", "without a result"),
        ("raise SystemExit(3)", "SystemExit"),
        ("x = bytearray(2**43)", "MemoryError"),
        ("import time; time.sleep(600)", "stopped"),
    ],
)
def test_broken_submissions_cost_their_question_only(tmp_path, monkeypatch, code, reason):
    monkeypatch.setattr(course, "SECONDS", 10)
    share, feedback = submit(tmp_path, "A3", "Q1", source=code)
    assert share == 0 and reason in feedback


def running(words: str) -> bool:
    """Is there a process with these words in its command? A killed one may take a moment to end."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        commands = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # a process that has just ended
                commands.append(path.read_text(errors="replace").replace("\0", " "))
        if not any(words in command for command in commands):
            return False
        time.sleep(0.05)
    return True


def test_what_a_student_starts_does_not_go_on(tmp_path):
    seconds = str(10**6 + os.getpid())  # no other run of this test has this argument
    code = f"import subprocess\nsubprocess.Popen(['sleep', '{seconds}'])\n"
    source = course.finished("A3", "gpg.py") + code
    assert submit(tmp_path, "A3", "Q2", source=source)[0] == 1
    assert not running(f"sleep {seconds}")


@pytest.mark.skipif(sys.platform != "linux", reason="there the child only ends when its time is up")
def test_a_grader_that_is_killed_leaves_no_process(tmp_path):
    (tmp_path / "gpg.py").write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "while True:\n    try:\n        time.sleep(0.1)\n    except BaseException:\n        pass\n"
    )
    command = [sys.executable, str(ROOT / "extras" / "course.py"), "grade", "A3", str(tmp_path)]
    grader = subprocess.Popen([*command, "--out", str(tmp_path / "results.json")])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    grader.kill()
    grader.wait()
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")

    def alive():
        return status.exists() and "zombie" not in status.read_text()

    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive()


def test_a_handout_has_no_solution_and_its_checks_turn_green(tmp_path):
    """Red as it is, with one line a check; green with the finished functions."""
    out = tmp_path / "handout"
    course.make("A3", out)
    stub = (out / "gpg.py").read_text()
    assert stub.count("raise NotImplementedError") == 8 and "# trains: [rounds" in stub
    hidden = [right for question, _, right, _, _ in MISTAKES if question.startswith("A3")]
    assert not any(right.strip() in stub for right in hidden if len(right) > 25)
    text = (out / "A3.md").read_text()
    assert not (out / "mistakes.py").exists() and "{" not in text and text.count("**Q") == 7
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def checks(key):
        return subprocess.run(
            [*command, key], cwd=out, capture_output=True, text=True, env=environment
        )

    red = checks("Q1 or Q2")
    assert red.returncode == 1 and "not done yet" in red.stdout and "passed" not in red.stdout
    full = course.finished("A3", "gpg.py")
    (out / "gpg.py").write_text(course.stub(course.stub(full, "update", "Q7"), "gpg_loss", "Q3"))
    green = checks("Q1 or Q5 or Q6")  # although training cannot be run yet
    assert green.returncode == 0, green.stdout
    with pytest.raises(UserError, match="not an empty folder"):
        course.make("A3", out)


def test_a_class_is_graded(tmp_path, monkeypatch):
    monkeypatch.setattr(course, "grade_question", lambda name, key, folder: (0.5, "half"))
    numbers = course.written.numbers("A3", "W1", "ann")
    right = course.ANSWERS["A3 W1"](**numbers)
    for name, answers in (("one", {"id": "ann", "W1": str(right)}), ("bob", {"W1": right})):
        (tmp_path / "class" / name).mkdir(parents=True)
        (tmp_path / "class" / name / "answers.json").write_text(json.dumps(answers))
    out = tmp_path / "grades.csv"
    course.main(["grade", "A3", str(tmp_path / "class"), "--out", str(out)])
    lines = out.read_text().splitlines()
    assert lines[0].startswith("student,score,Q1,Q2") and len(lines) == 3
    assert lines[2].startswith("one,47.5,7.5,")  # 42.5 and one written question
    assert lines[1].startswith("bob,42.5,7.5,")  # whose numbers are others
    results = json.loads((tmp_path / "grades" / "one.json").read_text())
    assert {"score", "tests"} <= results.keys() and results["tests"][0]["max_score"] == 15


def test_numbers_are_compared_relative_to_the_largest():
    assert same([1.0, 1e-9], [1.0, 0.0], 1e-4) and not same([1.0, 2.0], [1.0, 2.1], 1e-4)
    assert same(float("nan"), float("nan"), 0) and not same([1], [1, 2], 1)
    assert same({"a": [True]}, {"a": [1]}, 0) and not same({"a": 1}, {"b": 1}, 1)


CONTRACT = textwrap.dedent(
    """
    import gymnasium
    from tasks import TextTask

    TASK = "my_tasks:Long-v0"

    class Long(TextTask):
        def problem(self, index):
            return f"{self.split} {index}", str(index)

        def reward(self, completion, answer):
            return float(completion == answer)

        def demonstration(self, index):
            return str(index)

    gymnasium.register("Long-v0", entry_point=Long)
    """
)


def test_an_own_task_and_its_runs_are_graded(tmp_path):
    (tmp_path / "my_tasks.py").write_text(CONTRACT)
    for run, lr in (("a", 0.1), ("b", 0.2)):
        config = {"script": "gpg.py", "task": "my_tasks:Long-v0", "steps": 20, "lr": lr, "seed": lr}
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "config.json").write_text(json.dumps(config))
        rows = "step,loss,eval_accuracy\n0,,0.1\n" + f"20,{lr},{lr}\n"
        (tmp_path / "runs" / run / "metrics.csv").write_text(rows)

    def scores():
        results = course.grade("A6", tmp_path, ["ann"], tmp_path / "out.json")
        return [test["score"] for test in results["tests"]]

    assert scores() == [20, 10]
    (tmp_path / "runs" / "b" / "config.json").write_text(json.dumps(config | {"clip_grad": 1}))
    (tmp_path / "my_tasks.py").write_text(CONTRACT.replace('f"{self.split} {index}"', 'f"{index}"'))
    assert scores() == [0, 0]


def test_three_bugs_are_found_by_tests_and_repaired(tmp_path):
    """The handout's bugs cost all; with the finished file and one test, two tests are missing."""
    (tmp_path / "gpg.py").write_text(course.handout("A7", "gpg.py"))
    assert [course.grade_question("A7", f"Q{i}", tmp_path)[0] for i in (1, 2, 3)] == [0, 0, 0]
    (tmp_path / "gpg.py").write_text((ROOT / "gpg.py").read_text())
    (tmp_path / "test_bugs.py").write_text(
        "import torch\nimport gpg\n\n"
        "def test_alpha():\n"
        "    rewards = torch.tensor([[0, 0.5, 1], [0, 0, 0]])\n"
        "    assert gpg.gradient_scale(rewards) == 2\n"
    )
    results = course.grade("A7", tmp_path, None, tmp_path / "out.json")
    assert [test["score"] for test in results["tests"]] == [15, 15, 15, 10, 0, 0]
