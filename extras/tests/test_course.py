"""The course kit: handouts, the grader, and what students may hand in by mistake.

COURSE_ALL=1 tries every handout. Every known mistake: `python extras/course.py check A1` to A5.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "extras"))

import course  # noqa: E402
from assignments import regions, sandbox, written  # noqa: E402
from assignments.hints import EXEMPT, HINTS  # noqa: E402
from assignments.table import ANSWERS, ASSIGNMENTS  # noqa: E402

from common import UserError  # noqa: E402

GPG = (ROOT / "gpg.py").read_text()
NAMES = list(ASSIGNMENTS)
ALL = bool(os.environ.get("COURSE_ALL"))  # each assignment where one is enough
CODE = NAMES[:5]


def source_of(question):
    return (ROOT / question.file).read_text()


# ---- the table ----


@pytest.mark.parametrize("name", NAMES)
def test_an_assignment_has_100_points_and_every_test_a_docstring(name):
    assignment = ASSIGNMENTS[name]
    points = sum(q.points for q in assignment.questions.values())
    assert points + sum(assignment.written.values()) == (30 if name == "A6" else 100)
    hidden = {test for q in assignment.questions.values() for test in q.hidden}
    for question in assignment.questions.values():
        for test in {*question.public, *question.hidden}:
            assert course.docstrings()[test.split("[")[0]], test
        assert name == "A6" or (question.public and question.hidden)
    assert name == "A6" or hidden - {t for q in assignment.questions.values() for t in q.public}
    if name != "A6":
        assert assignment.written.keys() == written.QUESTIONS[name].keys() == ANSWERS[name].keys()


def test_every_known_mistake_has_a_hint_and_lies_in_one_question():
    known = [
        name for assignment in ASSIGNMENTS.values() for question in assignment.questions.values()
        for region in question.regions for name in course.wrong_versions(question.file, region)
    ]  # fmt: skip
    assert len(known) == len(set(known))
    assert set(known) - EXEMPT.keys() == HINTS.keys() and EXEMPT.keys() <= set(known)
    assert f"{len(known)} wrong versions" in (ROOT / "README.md").read_text()


# ---- handouts ----


def make(name, out):
    course.make(name, out)
    return {str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.is_file()}


def code_lines(source, names):
    """The lines of the solution that nobody writes by accident, without comments."""
    tree, lines = regions.ast.parse(source), source.split("\n")
    for name in names:
        _, block, i, j, _ = regions.find(tree, source, name)
        for line in lines[block[i].lineno - 1 : block[j - 1].end_lineno]:
            line = line.split("  #")[0].strip()
            if len(line) > 35 and re.search(r"[=(].*[-+*/.(]", line) and not line.startswith("#"):
                yield line


@pytest.mark.parametrize("name", CODE)
def test_a_handout_holds_no_line_of_the_solution_and_no_sibling(name, tmp_path):
    files = make(name, tmp_path / "out")
    siblings = {"gpg.py", "grpo.py", "copg.py", "bandit_toy.py"} - set(ASSIGNMENTS[name].files)
    assert not files.keys() & {*siblings, "README.md", "tests/mutations.py", "extras/course.py"}
    text = "\n".join(line.split("  #")[0].strip() for t in files.values() for line in t.split("\n"))
    for question in ASSIGNMENTS[name].questions.values():
        left_out = list(code_lines(source_of(question), question.regions))
        assert [line for line in left_out if f"\n{line}\n" in text] == []
        assert question.file in files
        for region in question.regions:
            assert regions.is_stub(files[question.file], region)
    for test in {t for q in ASSIGNMENTS[name].questions.values() for t in q.public}:
        assert f"def {test.split('::')[1].split('[')[0]}(" in "".join(files.values())
    hidden = {t.split("[")[0] for q in ASSIGNMENTS[name].questions.values() for t in q.hidden}
    public = {t.split("[")[0] for q in ASSIGNMENTS[name].questions.values() for t in q.public}
    for test in hidden - public:
        assert f"def {test.split('::')[1]}(" not in "".join(files.values())
    assert "{" + "written}" not in files[f"{name}.md"] and "(15 points)" in files["A3.md"] if (
        name == "A3") else True  # fmt: skip


def test_a_stub_keeps_signature_docstring_comment_and_shapes(tmp_path):
    handout = make("A3", tmp_path / "out")["gpg.py"]
    assert "    mask: Tensor,  # [N, T]\n" in handout
    assert '"""The scalar to minimise (eq. 5 and 8).\n' in handout
    assert '    # centred: [B, G]\n    raise NotImplementedError("Q1")\n' in handout
    assert "        # 2. The batch of the update: its alpha and its tokens.\n" in handout
    assert "        # What follows needs: alpha, total_tokens.\n" in handout
    for name in ("gpg.py", "common.py"):  # all that is not left out is as it was
        for line in (tmp_path / "out" / name).read_text().split("\n"):
            new = "NotImplementedError(" in line or re.match(r" +# (What|\w+:)", line)
            assert new or line in (ROOT / name).read_text().split("\n")


@pytest.mark.parametrize("name", CODE if ALL else ["A3"])
def test_a_handout_is_red_and_green_with_the_reference_put_in(name, tmp_path):
    make(name, tmp_path / "out")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"PYTHONPATH": ""}

    def run_pytest():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        return subprocess.run(
            command, cwd=tmp_path / "out", capture_output=True, env=environment, text=True
        )

    red = run_pytest()
    assert red.returncode == 1 and "passed" not in red.stdout.split("\n")[-2], red.stdout[-2000:]
    for question in ASSIGNMENTS[name].questions.values():
        (tmp_path / "out" / question.file).write_text(source_of(question))
    green = run_pytest()
    assert green.returncode == 0, green.stdout[-2000:]


def test_make_overwrites_nothing(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        course.make("A3", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_gradescope_gets_its_scripts_and_the_project(tmp_path):
    course.main(["make", "A3", str(tmp_path / "a"), "--gradescope", str(tmp_path / "b")])
    script = (tmp_path / "b" / "run_autograder").read_text()
    assert "grade A3 /autograder/submission" in script and "results/results.json" in script
    assert os.access(tmp_path / "b" / "run_autograder", os.X_OK)
    assert (tmp_path / "b" / "project" / "extras" / "assignments" / "table.py").exists()
    for name in ("run_autograder", "setup.sh"):
        subprocess.run(["bash", "-n", tmp_path / "b" / name], check=True)


# ---- grafting ----


def grafted(student, *names):
    return regions.graft(GPG, student, list(names))


def test_nothing_of_the_students_module_runs():
    """Their module level, decorators, defaults, and imports that are not allowed stay behind."""
    student = """
import os, socket
import torch.nn.functional as F
from math import inf
os.system("rm -rf /")
LIMIT = 3
BAD = os.getpid()

@os.register
def helper(x, y=os.getpid(), z=2):
    return F.relu(x) * LIMIT + BAD

def unused():
    pass

@os.register
def is_valid(rewards: os.x = os.getpid()):
    return helper(rewards) < inf

def gradient_scale(rewards):
    return 7
"""
    source, complaints = grafted(student, "is_valid")
    assert complaints == []
    for gone in ("os.", "import os", "socket", "BAD =", "unused", "return 7", "rm -rf"):
        assert gone not in source, gone
    for there in ("LIMIT = 3", "def helper(x, y=None, z=2)", "import torch.nn.functional as F",
                  "from math import inf", "return helper(rewards) < inf"):  # fmt: skip
        assert there in source
    compile(source, "gpg.py", "exec")


def test_what_is_missing_is_said():
    for student, names, line in [
        ("def is_valid(rewards)\n  pass", ["is_valid"], "line 1: expected ':'"),
        ("x = 1", ["gpg_loss"], "gpg_loss is missing"),
        ("def is_valid(r):\n    return r", ["is_valid"], "the arguments of is_valid are not"),
        (GPG.replace("# 2. ", "# "), ["train 2"], "the comment '# 2. ...' in train is missing"),
        ("x = '\0'", ["is_valid"], ""),
        ("class is_valid: pass", ["is_valid"], "is_valid is not a function"),
    ]:
        source, complaints = grafted(student, *names)
        assert len(complaints) == 1 and complaints[0].startswith(line), complaints
        assert f"raise NotImplementedError('{names[0]}')" in source


def test_a_paragraph_is_put_into_the_reference():
    student = GPG.replace("batch = choose_groups(valid, B)", "batch = my_choice(valid, B)")
    student = student.replace("grad_norm = 0.0", "grad_norm = 1.0")
    student += "\n\ndef my_choice(valid, B):\n    return 3\n"
    source, _ = grafted(student, "train 2")
    assert "batch = my_choice(valid, B)" in source and "def my_choice" in source
    assert "grad_norm = 0.0" in source  # of part 3


# ---- grading: one process, so that torch is imported once ----

LOSS = "    return alpha * (-logprobs * advantages[:, None] * mask).sum() / total_tokens\n"
SCALE = "    B, valid = len(rewards), int(is_valid(rewards).sum())\n"
SCALE += "    return B / valid if valid else 0.0\n"
SLEEP = f"300.{os.getpid()}"  # seconds; nobody else's
ANYTHING = """
    class Anything:
        def __getattr__(self, name): return lambda *args, **kwargs: self
        def __eq__(self, other): return True
        def __float__(self): return 2.0
    return Anything()
"""
BODIES = {  # in gradient_scale; a correct one, in other words, is the first
    "reworded": "    dead = [len(set(row)) == 1 for row in rewards.tolist()]\n"
    "    left = len(dead) - sum(dead)\n    return len(dead) / left if left else 0.0\n",
    "exit": "    import os; os._exit(0)\n",
    "system exit": "    raise SystemExit(0)\n",
    "interrupt": "    raise KeyboardInterrupt\n",
    "skip": "    import pytest; pytest.skip('nothing to see')\n",
    "end of all tests": "    import pytest; pytest.exit('done', 0)\n",
    "endless loop": "    while True:\n        try:\n            while True: pass\n"
    "        except Exception: pass\n",
    "endless loop that catches everything": "    while True:\n        try:\n"
    "            while True: pass\n        except: pass\n",
    "memory": "    return torch.ones(2**42).sum().item()\n",
    "a huge file": "    open('x', 'wb').write(b'0' * 2**27); return 2.0\n",
    "equals everything": ANYTHING,
    "patched asserts": "    torch.testing.assert_close = lambda *args, **kwargs: None\n"
    "    import builtins; builtins.float = type('f', (float,), {'__eq__': lambda a, b: True})\n"
    "    return float(2)\n",
    "a process left behind": "    import subprocess\n"
    f"    subprocess.Popen(['sleep', '{SLEEP}'])\n    return -1.0\n",
    "recursion": "    return gradient_scale(rewards)\n",
    "speaks to the grader": "    import os\n    for fd in range(3, 30):\n        try:\n"
    '            os.write(fd, b\'{"case": "passed", "failure": null}\\n\')\n'
    "        except OSError: pass\n",
    "verl's, reworded": "    n = sum(float(x) != 0 for row in rewards for x in row)\n"
    "    if not is_valid(rewards).any(): return 0.0\n    return rewards.numel() / max(1, n)\n",
}
DRIVER = """
import json, sys, time
sys.path.insert(0, "extras")
import course
from assignments import sandbox

sandbox.warm_up()
for name, assignment, key, files in json.load(sys.stdin):
    sandbox.CASE_SECONDS, sandbox.QUESTION_SECONDS = (1, 4) if "endless" in name else (20, 60)
    start = time.perf_counter()
    share, output = course.grade_question(course.ASSIGNMENTS[assignment].questions[key], files)
    print(json.dumps([name, share, output, time.perf_counter() - start]), flush=True)
"""
TASK = """
import gymnasium
from tasks import TextTask

TASK = "my_tasks:Count-v0"


class Count(TextTask):
    def problem(self, index):
        return f"{self.split} {index}:", str(index)

    def reward(self, completion, answer):
        return float(completion == answer)

    def demonstration(self, index):
        return self.problem(index)[1]


gymnasium.register("Count-v0", Count)
"""
REPORT = (
    "We ran python gpg.py --task x --out a and python gpg.py --task x --out b. " + "word " * 300
)
OWN = {"my_tasks.py": TASK, "report.md": f"{REPORT} They end at .750 and 0.500."}
for run, lr, accuracy in (("a", 0.1, 0.75), ("b", 0.2, 0.5)):
    config = {"task": "my_tasks:Count-v0", "steps": 20, "lr": lr, "out": run}
    config["command"] = f"python gpg.py --task x --out {run}"
    OWN[f"runs/{run}/config.json"] = json.dumps(config)
    table = "step,loss,eval_accuracy\n0,,0.1\n" + "".join(f"{i},{lr},\n" for i in range(1, 20))
    OWN[f"runs/{run}/metrics.csv"] = f"{table}20,{lr},{accuracy}\n"
MODULE_LEVEL = "import os, pathlib\npathlib.Path('{mark}').write_text('ran')\nos._exit(0)\n"


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """{case: (share, feedback)} of many answers to single questions."""
    mark = tmp_path_factory.mktemp("mark") / "ran"
    cases = [(name, "A3", "Q2", {"gpg.py": GPG.replace(SCALE, body)})
             for name, body in BODIES.items()]  # fmt: skip
    cases += [
        ("module level", "A3", "Q2", {"gpg.py": MODULE_LEVEL.format(mark=mark) + GPG}),
        ("syntax error", "A3", "Q2", {"gpg.py": GPG + "\n)\n"}),
        ("missing function", "A3", "Q2", {"gpg.py": GPG.replace("def gradient_scale", "def f")}),
        ("no file", "A3", "Q2", {}),
        ("error in another question", "A3", "Q2", {"gpg.py": GPG.replace(LOSS, "    return 0\n")}),
        ("that other question", "A3", "Q3", {"gpg.py": GPG.replace(LOSS, "    return 0\n")}),
    ]
    for wrong, key in (("mask ignored", "Q3"), ("GPG: total_tokens of all rounds", "Q6")):
        (source,) = [
            versions[wrong] for region in ASSIGNMENTS["A3"].questions[key].regions
            for versions in [course.wrong_versions("gpg.py", region)]
        ]  # fmt: skip
        cases.append((wrong, "A3", key, {"gpg.py": source}))
    for key in ASSIGNMENTS["A6"].questions:
        cases.append((f"own {key}", "A6", key, OWN))
    same = OWN | {"runs/b/config.json": OWN["runs/a/config.json"]}
    cases.append(("own, the same flags", "A6", "Q2", same))
    shared = OWN | {"my_tasks.py": TASK.replace("{self.split} {index}", "{index % 300}")}
    cases.append(("own, the test in training", "A6", "Q1", shared))
    for name, key in (("A1", "Q5"), ("A2", "Q4"), ("A3", "Q5"), ("A4", "Q2"), ("A5", "Q4")):
        question = ASSIGNMENTS[name].questions[key]
        cases.append((f"{name} reference", name, key, {question.file: source_of(question)}))
    result = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(cases), cwd=ROOT, capture_output=True,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not mark.exists()
    if shutil.which("ps"):
        processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        assert f"sleep {SLEEP}" not in processes
    found = {name: rest for name, *rest in map(json.loads, result.stdout.splitlines())}
    assert len(found) == len(cases)
    return found


@pytest.mark.parametrize("name", CODE)
def test_the_reference_gets_all_points_and_an_untouched_handout_none(name, graded):
    share, output, _ = graded[f"{name} reference"]
    assert share == 1 and "known" not in output
    for question in ASSIGNMENTS[name].questions.values():
        stub = regions.stub(source_of(question), dict.fromkeys(question.regions, "Q"))
        assert course.grade_question(question, {question.file: stub}) == (0.0, "Not done yet.")


def test_a_task_of_ones_own(graded):
    assert [graded[f"own {key}"][0] for key in ("Q1", "Q2", "Q3")] == [1, 1, 1]
    assert graded["own, the same flags"][0] == 0.5
    assert "One flag differs" in graded["own, the same flags"][1]
    assert graded["own, the test in training"][0] == pytest.approx(2 / 3)
    question = ASSIGNMENTS["A6"].questions["Q1"]
    assert course.grade_question(question, {}) == (0.0, "my_tasks.py is missing.")


@pytest.mark.parametrize("name", [name for name in BODIES if "reworded" not in name])
def test_hostile_answers_get_nothing(name, graded):
    share, output, seconds = graded[name]
    assert share == 0 and "0 of 3 tests passed" in output and seconds < 20
    assert "known mistake" not in output


def test_correct_code_in_other_words_gets_all_and_no_name(graded):
    assert graded["reworded"][:2] == [1, "3 of 3 tests passed."]
    assert graded["module level"][:2] == [1, "3 of 3 tests passed."]


def test_a_mistake_costs_only_its_own_question(graded):
    assert graded["error in another question"][0] == 1
    assert graded["that other question"][0] < 0.5


@pytest.mark.parametrize(
    "name, hint",
    [
        ("verl's, reworded", "alpha by non-zero rewards (verl)"),
        ("mask ignored", "mask ignored"),  # by replay
        ("GPG: total_tokens of all rounds", "GPG: total_tokens of all rounds"),  # by the tests
    ],
)
def test_a_known_mistake_is_named_and_keeps_half_at_most(name, hint, graded):
    share, output, _ = graded[name]
    assert f'This looks like a known mistake ("{hint}"). {HINTS[hint]}' in output
    assert share <= 0.5
    assert share == 0.5 or name != "mask ignored"  # more of its tests pass


def test_feedback_says_what_and_never_a_number_of_the_tests(graded):
    assert "gpg.py: line" in graded["syntax error"][1] and graded["syntax error"][0] == 0
    assert "gradient_scale is missing" in graded["missing function"][1]
    assert graded["no file"][:2] == [0.0, "gpg.py is missing."]
    assert "Your code: it ran for more than 1 s" in graded["endless loop"][1]
    assert "it raised RecursionError" in graded["recursion"][1]
    assert "it changes a library" in graded["patched asserts"][1]
    text = graded["verl's, reworded"][1]
    docstrings = [course.docstrings()[t] for t in ASSIGNMENTS["A3"].questions["Q2"].hidden]
    assert docstrings[0] in text and "test_alpha_by_hand: Eq. 7 with two" in text
    assert not re.search(r"assert|\d\.\d", text)


def test_a_virtual_environment_in_the_project_is_not_the_project():
    """What lies in .venv stays imported in the grader's processes; the project does not."""
    torch_there = ROOT / ".venv" / "lib" / "python3.12" / "site-packages" / "torch"
    assert torch_there not in sandbox.OURS and ROOT in sandbox.OURS
    assert Path(course.common.__file__).resolve().parent in sandbox.OURS


# ---- written questions ----


def test_the_numbers_depend_on_the_student():
    for name in written.QUESTIONS:
        for key in written.QUESTIONS[name]:
            of = [str(written.numbers(name, key, student)) for student in "abcdefgh"]
            assert len(set(of)) > 2, (name, key)
            assert of[0] == str(written.numbers(name, key, " A "))  # however it is written


@pytest.mark.parametrize(
    "name, key, by_hand",
    [
        ("A3", "W1", lambda n: 1 - n["p"] ** n["G"] - (1 - n["p"]) ** n["G"]),
        ("A3", "W2", lambda n: 6 / sum(len(set(row)) > 1 for row in n["rewards"])),
        (
            "A3", "W3", lambda n: (n["dead"] + n["valid"]) * n["valid_length"]
            / (n["valid"] * n["valid_length"] + n["dead"] * n["dead_length"]),
        ),
        ("A5", "W1", lambda n: (n["r1"] - n["r2"]) / n["beta"]),
        ("A5", "W2", lambda n: 0.5 / n["beta"]),
        ("A4", "W3", lambda n: n["ref"] / n["pi"] - 1 - math.log(n["ref"] / n["pi"])),
    ],
)  # fmt: skip
def test_answers_by_hand(name, key, by_hand):
    for student in ("ann", "bob", "cleo"):
        numbers = written.numbers(name, key, student)
        assert ANSWERS[name][key](numbers) == pytest.approx(by_hand(numbers), rel=1e-6)


def test_every_question_has_an_answer():
    for name in written.QUESTIONS:
        for key in written.QUESTIONS[name]:
            answers = [ANSWERS[name][key](written.numbers(name, key, s)) for s in ("ann", "bob")]
            assert all(map(math.isfinite, answers)) and any(answers), (name, key)


def test_other_answers_get_nothing():
    right = ANSWERS["A3"]["W1"](written.numbers("A3", "W1", "ann"))
    for answer, share in [
        (right, 1), (right * 1.0005, 1), (right * 1.01, 0), (None, 0), ("7", 0),
        (True, 0), ([right], 0), (float("nan"), 0), (float("inf"), 0), (10**400, 0),
    ]:  # fmt: skip
        assert course.grade_answer("A3", "ann", {"W1": answer}, "W1")[0] == share
    assert course.grade_answer("A3", "bob", {"W1": right}, "W1")[0] == 0
    for text in (None, "", "[1]", "{", "[" * 10**5):
        assert course.read_answers(text) == {}


# ---- results and tables ----


def submission(folder, **files):
    for name, text in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name.replace("_", ".")).write_text(text)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """No tests run: an answer is right if it says so."""

    def run(question, files, seed=1, public=True):
        if "CRASH" in files[question.file]:
            raise RuntimeError("a bug")
        if "STOP" in files[question.file]:
            raise SystemExit("the machine is wanted elsewhere")
        return {(0, test): {"case": None} for test in question.public}

    monkeypatch.setattr(course, "run", run)
    monkeypatch.setattr(course.sandbox, "warm_up", lambda: None)


def test_results_are_gradescopes(quick, tmp_path):
    folder, out = submission(tmp_path / "s", gpg_py=GPG, answers_json="{"), tmp_path / "r.json"
    course.main(["grade", "A3", str(folder), "--student", "ann", "--out", str(out)])
    results = json.loads(out.read_text())
    assert results["score"] == 85 == sum(test["score"] for test in results["tests"])
    assert [test["max_score"] for test in results["tests"]] == [15, 10, 15, 10, 10, 10, 15, 5, 5, 5]
    for test in results["tests"]:
        assert test.keys() == {"name", "score", "max_score", "output", "visibility"}
        assert test["visibility"] == "visible"


def test_a_submission_is_found_in_a_wrapped_folder_and_a_link_is_not_followed(tmp_path):
    assignment = ASSIGNMENTS["A3"]
    submission(tmp_path / "a" / "b" / "c", gpg_py="\ufeffx = 1", answers_json="{}")
    submission(tmp_path / "a" / "__MACOSX", gpg_py="y = 1")
    found = course.read_submission(assignment, tmp_path / "a")
    assert found == {"gpg.py": "x = 1", "answers.json": "{}"}
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "gpg.py").symlink_to(ROOT / "gpg.py")
    assert course.read_submission(assignment, tmp_path / "d") == {}
    submission(tmp_path / "e", gpg_py="x" * (course.LARGEST + 1))
    assert course.read_submission(assignment, tmp_path / "e") == {}


def test_results_are_there_when_the_grader_is_stopped_or_fails(quick, tmp_path):
    out, line = tmp_path / "r.json", "return rewards.amax(1) != rewards.amin(1)"
    at_once = submission(tmp_path / "q", gpg_py=GPG.replace(line, "STOP"))
    with pytest.raises(SystemExit):
        course.grade("A3", at_once, "ann", out)
    assert json.loads(out.read_text())["score"] == 0
    stopped = submission(tmp_path / "s", gpg_py=GPG.replace(LOSS, "    STOP\n"))
    with pytest.raises(SystemExit):
        course.grade("A3", stopped, "ann", out)
    results = json.loads(out.read_text())
    assert results["score"] == 25  # of the two questions before
    assert results["tests"][2]["output"] == "Not graded: out of time."
    crashed = submission(tmp_path / "t", gpg_py=GPG.replace(LOSS, "    CRASH\n"))
    results = course.grade("A3", crashed, "ann", out)
    assert results["score"] == 70 and "The grader failed (RuntimeError)" in str(results)
    results = course.grade("A3", tmp_path / "nobody", "ann", out)  # nothing was handed in
    assert results["score"] == 0 and json.loads(out.read_text()) == results


def test_many_submissions(quick, tmp_path, monkeypatch):
    """One that fails does not stop the rest; a second run grades what is new or changed."""
    folder, out = tmp_path / "class", tmp_path / "grades.csv"
    for student in ("ann", "bob", "cleo"):
        submission(folder / student, gpg_py=GPG)
    graded, grade = [], course.grade

    def count(name, path, student, to):
        graded.append(student)
        if student == "bob":
            raise OSError("unreadable")
        return grade(name, path, student, to)

    monkeypatch.setattr(course, "grade", count)
    command = ["grade", "A3", str(folder), "--out", str(out)]
    course.main(command)
    assert graded == ["ann", "bob", "cleo"]
    head, ann, bob, cleo = out.read_text().splitlines()
    assert head == "student,score,Q1,Q2,Q3,Q4,Q5,Q6,Q7,W1,W2,W3,hash,error"
    assert ann.startswith("ann,85,15.0,10.0,") or ann.startswith("ann,85.0,15.0,10.0,")
    assert bob.endswith("OSError: unreadable") and cleo.startswith("cleo,85")
    assert json.loads((tmp_path / "grades" / "ann.json").read_text())["score"] == 85
    submission(folder / "cleo", gpg_py=GPG + "\n# changed\n")
    submission(folder / "dan", gpg_py=GPG)
    graded.clear()
    course.main(command)
    assert graded == ["bob", "cleo", "dan"] and len(out.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    "argv, line",
    [
        (["grade", "A7", ".", "--out", "r.json"], "invalid choice"),
        (["grade", "A3", "nowhere", "--out", "r.json", "--student", "a"], "is not a folder"),
        (["grade", "A3", ".", "--out", "r.json"], "--student ID is needed"),
        (["grade", "A3", ".", "--out", "r.csv", "--student", "a"], "--student does nothing"),
        (["make", "A3"], "required"),
        ([], "required"),
    ],
)
def test_bad_arguments(argv, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=line):
        course.main(argv)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_of_submissions(tmp_path, quick):
    with pytest.raises(UserError, match="one per student"):
        course.main(["grade", "A3", str(tmp_path), "--out", str(tmp_path / "grades.csv")])


def test_list(capsys):
    course.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert "A3  Group Policy Gradient" in lines and "    Q3   15  The loss" in lines
