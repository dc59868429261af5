"""The course kit: handouts made from the code, and a grader that names the mistake.

    python extras/course.py make A3 OUT                          a handout for students
    python extras/course.py gradescope A3 OUT                    the contents of its autograder.zip
    python extras/course.py grade A3 SUBMISSION --out results.json --student ID
    python extras/course.py grade A3 FOLDER --out grades.csv     a folder of many submissions
    python extras/course.py check A3                             does the grader itself work?

A submission is a folder with the student's files, as in the handout. A folder of submissions has
one such folder per student, named by the student's id, or with a file answers.json that has it
under "id". A question is graded by what its functions return, beside what the finished functions
return: how they are written does not matter.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import functools
import importlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ROOT / "extras" / "assignments"
sys.path[:0] = [str(ROOT), str(TEXTS)]

import written  # noqa: E402
from answers import ANSWERS  # noqa: E402
from mistakes import known_in  # noqa: E402
from probe import agree, difference, limited, outcomes  # noqa: E402

from run import Parser, plain_errors, write  # noqa: E402
from tasks import UserError  # noqa: E402

NAMES = [f"A{i}" for i in range(8)]
SHARED = ["requirements.txt", "run.py", "tasks"]  # what a handout has beside the student's file;
GIVEN = {"A0": SHARED[:1], "A1": SHARED, "A2": SHARED}  # in the others common.py as well
SEED = int(os.environ.get("COURSE_SEED", "1"))  # of the hidden checks; change it every year
VISIBILITY = os.environ.get("COURSE_VISIBILITY", "visible")  # on Gradescope; "after_due_date", ...
SECONDS = 120  # a question may take
LARGEST = 2**20  # bytes of a submitted file


def module_of(name: str):
    return importlib.import_module(name.lower())


def questions(name: str) -> dict:
    return {} if name == "A6" else module_of(name).QUESTIONS


def text_of(name: str) -> str:
    """The text of an assignment."""
    text, rules = ((TEXTS / f"{x}.md").read_text(encoding="utf-8") for x in (name, "rules"))
    return text.replace("{rules}", rules.rstrip()).replace("{name}", name)


def points_of(name: str) -> dict[str, int]:
    """{title: points} of what the program grades: questions, written questions, A7's tests."""
    found = re.findall(r"\*\*([QTW]\d[^*]*)\*\* \((\d+) points", text_of(name))
    return {title: int(points) for title, points in found}


# ---- What a module returns -----------------------------------------------------------------------


@functools.cache
def processes():
    """Where submissions run: processes forked from one that has imported torch and the scripts."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{TEXTS}"}
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    context.set_forkserver_preload(["probe", "training", "answers", "torch._dynamo", "pytest"])
    return context


def run_limited(scratch: Path, seconds: float, function: Callable, *args) -> str:
    """Call a function in a process of its own, with limits; on every path its process group is dead
    afterwards. -> what went wrong, or ""."""
    process = processes().Process(target=limited, args=(scratch, seconds, function, *args))
    process.start()
    process.join(seconds)
    late = process.is_alive()
    process.kill()
    with contextlib.suppress(OSError, AttributeError):  # the group has ended; or this is Windows
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if late:
        return f"it ran for more than {seconds:.0f} seconds and was stopped"
    return f"the process ended with status {process.exitcode}" if process.exitcode else ""


def finished(name: str, file: str, change: tuple[str, str] = ("", "")) -> str:
    """The source of a finished file, or with a mistake made in it, as it is in the handout: the
    paragraphs of `train` that students write are functions of their own."""
    path = ROOT / file if (ROOT / file).exists() else TEXTS / file
    source = path.read_text(encoding="utf-8").replace(*change)
    for number, signature in enumerate(getattr(module_of(name), "TRAIN", []), 1):
        source = lift(source, number, signature)
    return source


def returned(name: str, key: str, seed: int, *sources: str) -> list[list[dict]]:
    """What the cases of a question give with each of these sources. Raises RuntimeError."""
    file = questions(name)[key].file
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        places = {scratch / str(i): source for i, source in enumerate(sources)}
        for folder, source in {**places, scratch / "finished": finished(name, file)}.items():
            (folder / file).parent.mkdir(parents=True)
            (folder / file).write_text(source, encoding="utf-8")
        out, seconds = scratch / "out.json", SECONDS * len(sources)
        problem = run_limited(scratch, seconds, outcomes, name, key, seed, [*places], out)
        try:
            return json.loads(out.read_text())
        except (OSError, ValueError):
            raise RuntimeError(problem or "the process ended without a result") from None


@functools.cache
def expected(name: str, key: str, seed: int) -> list[dict]:
    """What the finished code gives."""
    (found,) = returned(name, key, seed, finished(name, questions(name)[key].file))
    assert not any("error" in outcome for outcome in found), f"{name} {key}: {found}"
    return found


@functools.cache
def mistaken(name: str, key: str) -> dict[str, list[dict]]:
    """What each known mistake gives."""
    mistakes, file = known_in(f"{name} {key}"), questions(name)[key].file
    sources = [finished(name, file, (right, wrong)) for right, wrong, _ in mistakes.values()]
    found = returned(name, key, SEED, *sources) if sources else []
    return dict(zip(mistakes, found, strict=True))


# ---- Grading -------------------------------------------------------------------------------------


def find_files(name: str, folder: Path, scratch: Path) -> None:
    """Copy the submitted files, from wherever they are, into a folder of their own. Links and huge
    files are left out."""
    files = ["answers.json", "my_tasks.py", "test_bugs.py"]
    files += [f"runs/{run}/{file}" for run in "ab" for file in ("config.json", "metrics.csv")]
    files += [question.file for question in questions(name).values()]
    for file in files:
        place = file if file.startswith("runs/") else Path(file).name
        found = [p for p in folder.rglob(place) if p.is_file() and not p.is_symlink()]
        found = [p for p in found if p.stat().st_size <= LARGEST]
        if found:
            path = min(found, key=lambda p: len(p.parts))
            text = path.read_bytes().decode("utf-8-sig", errors="replace")
            (scratch / file).parent.mkdir(parents=True, exist_ok=True)
            (scratch / file).write_text(text, encoding="utf-8")


def grade(name: str, folder: Path, students: list[str] | None, out: Path) -> dict:
    """One submission -> Gradescope's results, written to `out`: score, and tests with feedback."""
    tests = []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        find_files(name, folder, scratch)
        answers = read_answers(scratch / "answers.json")
        students = students or [str(answers.get("id") or folder.name)]
        for title, points in points_of(name).items():
            key = title[:2]
            if key[0] == "W":
                share, feedback = grade_answer(name, key, students, answers)
            elif key[0] == "T":
                share, feedback = grade_test(f"Q{key[1]}", scratch)
            elif name == "A6":
                share, feedback = grade_contract(key, scratch)
            else:
                share, feedback = grade_question(name, key, scratch)
            test = {"name": title, "score": round(points * share, 2), "max_score": points}
            tests.append(test | {"output": feedback, "visibility": VISIBILITY})
            results = {"score": round(sum(test["score"] for test in tests), 2), "tests": tests}
            write(out, json.dumps(results, indent=2) + "\n")  # if it is stopped, this counts
    return results


def grade_question(name: str, key: str, folder: Path) -> tuple[float, str]:
    """-> share of the points, feedback."""
    path = folder / questions(name)[key].file
    if not path.exists():
        return 0.0, f"{path.name} is missing."
    try:
        (got,) = returned(name, key, SEED, path.read_text(encoding="utf-8"))
    except RuntimeError as error:
        return 0.0, f"Not graded: {error}."
    return judge(name, key, got)


def judge(name: str, key: str, got: list[dict]) -> tuple[float, str]:
    """What a submission returns -> share of the points, feedback. Every function has the same
    share; a function counts if all of its cases are right."""
    right, cases = expected(name, key, SEED), questions(name)[key].cases(SEED)
    parts, shown = {}, {}  # of each function; the first wrong case of each
    for case, a, b in zip(cases, got, right, strict=True):
        parts.setdefault(case.part, []).append(agree(a, b, case.tolerance))
        if not parts[case.part][-1]:
            shown.setdefault(case.part, f"- {case.label}\n{difference(a, b, case.tolerance)}")
    share = sum(map(all, parts.values())) / len(parts)
    lines = [f"{sum(map(sum, parts.values()))} of {len(cases)} checks passed.", *shown.values()]
    for mistake in known_mistakes(name, key, got) if share < 1 else ():
        hint = known_in(f"{name} {key}")[mistake][2]
        lines.append(f'Your code behaves like a known mistake, "{mistake}": {hint}')
    return share, "\n".join(lines)


def known_mistakes(name: str, key: str, got: list[dict]) -> list[str]:
    """The mistakes that explain all that the functions they change return, right or wrong. If some
    explain all that the submission returns, only those. A mistake that only crashes is none."""
    right, cases = expected(name, key, SEED), questions(name)[key].cases(SEED)
    found, exact = [], []
    for mistake, wrong in mistaken(name, key).items():
        rows = list(zip(got, right, wrong, cases, strict=True))
        changed = {case.function for _, b, w, case in rows if not agree(w, b, case.tolerance)}
        unlike = {case.function for a, _, w, case in rows if not agree(a, w, case.tolerance)}
        if changed and not changed & unlike and any("value" in w for w in wrong):
            found.append(mistake)
            exact += [] if unlike else [mistake]
    return exact or found


def run_pytest(folder: Path, *args: str) -> str:
    """Run tests in a folder, with the project's modules behind its own. -> "", or what is wrong."""
    return run_limited(folder, SECONDS, call_pytest, str(folder), *args)


def call_pytest(folder: str, *args: str) -> None:
    sys.path[:0] = [folder]
    sys.modules.pop("gpg", None)  # the project's
    sys.exit(int(pytest.main(["-q", "-p", "no:cacheprovider", *args])))


def grade_contract(key: str, folder: Path) -> tuple[float, str]:
    """A6: the tests of the handout that have this question's number in their names."""
    shutil.copy(TEXTS / "contract.py", folder / "test_contract.py")
    problem = run_pytest(folder, "test_contract.py", "-k", key)
    return (0.0, f"Run python -m pytest -k {key}: a test fails.") if problem else (1.0, "Right.")


def grade_test(key: str, folder: Path) -> tuple[float, str]:
    """A7: do the student's tests pass on the finished code, and fail with this bug alone in it?"""
    if not (folder / "test_bugs.py").exists():
        return 0.0, "test_bugs.py is missing."
    right, wrong, _ = module_of("A7").bugs(SEED)[key]
    problems = []
    for change in (("", ""), (right, wrong)):
        with tempfile.TemporaryDirectory() as place:
            shutil.copy(folder / "test_bugs.py", place)
            Path(place, "gpg.py").write_text(finished("A7", "gpg.py", change), encoding="utf-8")
            problems.append(run_pytest(Path(place), "test_bugs.py"))
    if problems[0]:
        return 0.0, f"Your tests fail on the finished gpg.py ({problems[0]})."
    if "status 1" not in problems[1]:
        return 0.0, "No test of yours fails if this bug alone is in gpg.py."
    return 1.0, "Right."


def read_answers(path: Path) -> dict:
    """answers.json; or what is wrong with it, under "error"."""
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
        return answers if isinstance(answers, dict) else {"error": "it has to be an object, {...}"}
    except (OSError, ValueError, RecursionError) as error:
        return {"error": f"it is missing or no JSON: {error!s:.100}"}


def grade_answer(name: str, key: str, students: list, answers: dict) -> tuple[float, str]:
    """A number, compared with the reference's for the numbers of this student, or, in a group, of
    any of these."""
    try:
        answer = float(answers.get(key))
    except (TypeError, ValueError, OverflowError):
        return 0.0, f"answers.json: {answers.get('error', f'it has no number under {key!r}')}."
    for student in students:
        right = ANSWERS[f"{name} {key}"](**written.numbers(name, key, student))
        if math.isclose(answer, right, rel_tol=1e-3, abs_tol=1e-9):
            return 1.0, "Right."
    return 0.0, f"Not right for the numbers of {' or '.join(students)}."


def grade_many(name: str, folder: Path, out: Path) -> None:
    """grades.csv, and a results file per student beside it. Raises UserError."""
    submissions = sorted(path for path in folder.iterdir() if path.is_dir())
    if not submissions:
        raise UserError(f"{folder}: no folder in it; one per student is expected")
    details = out.with_suffix("")
    details.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["student", "score", *(title[:2] for title in points_of(name))])
        for path in tqdm(submissions, unit="submission"):
            results = grade(name, path, None, details / f"{path.name}.json")
            scores = [test["score"] for test in results["tests"]]
            table.writerow([path.name, results["score"], *scores])
            file.flush()


# ---- Handouts ------------------------------------------------------------------------------------


def new_folder(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is not an empty folder; name another")
    path.mkdir(parents=True, exist_ok=True)


def copy(paths: list[Path], out: Path) -> None:
    """Copy files and folders into a folder."""
    ignore = shutil.ignore_patterns("__pycache__", "tests")
    for path in paths:
        if path.is_dir():
            shutil.copytree(path, out / path.name, ignore=ignore)
        else:
            shutil.copy(path, out)


def make(name: str, out: Path) -> None:
    """Write the handout into a folder that is new or empty. Raises UserError."""
    new_folder(out)
    more = ["gpg.py", "grpo.py"] if name == "A6" else []
    copy([ROOT / part for part in GIVEN.get(name, [*SHARED, "common.py", *more])], out)
    for file in {question.file for question in questions(name).values()}:
        (out / file).write_text(handout(name, file), encoding="utf-8")
    (out / f"{name}.md").write_text(text_of(name), encoding="utf-8")
    (out / "pytest.ini").write_text("[pytest]\naddopts = -q --tb=short\nfilterwarnings = ignore\n")
    if name == "A6":
        shutil.copy(TEXTS / "contract.py", out / "test_contract.py")
    if name in ("A6", "A7"):
        return
    checks = ["probe.py", "written.py", "test_public.py", f"{name.lower()}.py"]
    checks += [] if name in ("A0", "A1") else ["training.py"]
    copy([TEXTS / file for file in checks], out)
    values = {key: expected(name, key, 0) for key in questions(name)}
    (out / "expected.json").write_text(json.dumps({"assignment": name, "values": values}))
    blank = dict.fromkeys(["id", *(title for title in points_of(name) if title[0] == "W")])
    write(out / "answers.json", json.dumps(blank, indent=2) + "\n")


def handout(name: str, file: str) -> str:
    """A file as students get it: with stubs or, in A7, with bugs."""
    source = finished(name, file)
    if name == "A7":
        for right, wrong, _ in module_of(name).bugs(SEED).values():
            source = source.replace(right, wrong)
        return source
    for key, question in questions(name).items():
        for function in question.names.split() if question.file == file else ():
            source = stub(source, function, key)
    return source


def lift(source: str, number: int, signature: str) -> str:
    """Make paragraph `number` of `train` a function: "name(inputs) -> outputs"."""
    call, outputs = signature.split(" -> ")
    lines = source.split("\n")
    marks = [i for i, line in enumerate(lines) if re.match(r" {8}# \d\. ", line)]
    start, end = marks[number - 1 : number + 1]
    title, body = lines[start].split(". ", 1)[1], [line[4:] for line in lines[start + 1 : end - 1]]
    if "ref_logprobs" in outputs:  # the paragraph sets it only if there is a reference
        body = ["    ref_logprobs = None", *body]
    lines[start + 1 : end] = [f"        {outputs} = (", f"            {call}", "        )", ""]
    at = lines.index("def train(args: argparse.Namespace) -> Run:")
    text = [f'    """{title}', "", f"    -> {outputs}", '    """']
    lines[at:at] = [f"def {call}:", *text, *body, f"    return {outputs}", "", ""]
    return "\n".join(lines)


def stub(source: str, function: str, key: str) -> str:
    """The source with a function or method left to be written: its signature, its docstring and the
    shapes of its tensors stay."""
    node = ast.parse(source)
    for part in function.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    lines, body = source.split("\n"), node.body
    first = body[0].end_lineno if ast.get_docstring(node) else body[0].lineno - 1
    indent = " " * body[0].col_offset
    shapes = {}  # of each name whose line ends in such a comment
    for line in lines[first : body[-1].end_lineno]:
        if match := re.match(r" *(\w+) = .*  # (.*\[.*\].*|.*[BGNn] rows.*)$", line):
            shapes[match[1]] = f"{indent}# {match[1]}: {match[2]}"
    new = [*shapes.values(), f'{indent}raise NotImplementedError("{key}")']
    lines[first : body[-1].end_lineno] = new
    return "\n".join(lines)


SETUP = """#!/usr/bin/env bash
set -e
export DEBIAN_FRONTEND=noninteractive
apt-get update && apt-get install -y python3 python3-pip python3-venv
python3 -m venv /autograder/venv
cd /autograder/source/project
cpu=https://download.pytorch.org/whl/cpu
/autograder/venv/bin/pip install -r requirements.txt --extra-index-url $cpu
"""
RUN = """#!/usr/bin/env bash
cd /autograder/source/project
ids=$(python3 -c 'import json; m = json.load(open("/autograder/submission_metadata.json"))
print(*(user["email"] for user in m["users"]))')
/autograder/venv/bin/python extras/course.py grade {name} /autograder/submission \\
    --student $ids --out /autograder/results/results.json
"""


def make_gradescope(name: str, out: Path) -> None:
    """What goes into Gradescope's autograder.zip: setup.sh, run_autograder, and the project."""
    new_folder(out)
    (out / "project").mkdir()
    (out / "setup.sh").write_text(SETUP)
    (out / "run_autograder").write_text(RUN.format(name=name))
    (out / "run_autograder").chmod(0o755)
    folders = [ROOT / "tasks", ROOT / "extras", ROOT / "requirements.txt"]
    copy([*folders, *ROOT.glob("*.py")], out / "project")


# ---- The command line ----------------------------------------------------------------------------


def check(name: str) -> bool:
    """Grade the finished code, the handout and every known mistake; print what comes of it."""
    good = True
    for key, question in questions(name).items():
        code = finished(name, question.file), handout(name, question.file)
        shares = [judge(name, key, got)[0] for got in returned(name, key, SEED, *code)]
        good &= shares == [1, 0]
        print(f"{name} {key}: finished code {shares[0]:.0%}, handout {shares[1]:.0%}", flush=True)
        for mistake, got in mistaken(name, key).items():
            share, named = judge(name, key, got)[0], known_mistakes(name, key, got)
            good &= share < 1 and named == [mistake]
            told = "named" if named == [mistake] else f"NAMED {named}"
            print(f"    {share:4.0%}  {mistake}: {told}", flush=True)
    return good


def main(argv: list[str] | None = None) -> int:
    parser = Parser("course.py", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    helps = {"make": "a handout", "gradescope": "what goes into its autograder.zip"}
    helps |= {"grade": "a submission, or a folder of them", "check": "grade the mistakes"}
    for command, text in helps.items():
        sub = commands.add_parser(command, help=text)
        sub.add_argument("assignment", choices=NAMES, metavar="A0..A7")
        if command != "check":
            sub.add_argument("folder", type=Path, help="to write, or to grade")
        if command == "grade":
            sub.add_argument("--student", nargs="+", metavar="ID", help="for written questions")
            sub.add_argument("--out", type=Path, required=True, help="results.json, or a .csv")
    args = parser.parse_args(argv)
    if args.command == "check":
        return 0 if check(args.assignment) else 1
    if args.command == "make":
        make(args.assignment, args.folder)
        print(f"see {args.folder / args.assignment}.md")
    elif args.command == "gradescope":
        make_gradescope(args.assignment, args.folder)
        print(f"zip the contents of {args.folder} for Gradescope")
    elif not args.folder.is_dir():
        raise UserError(f"{args.folder} is not a folder")
    elif args.out.suffix == ".csv":
        if args.student:
            raise UserError("--student has no effect with a .csv: folders are named by the ids")
        grade_many(args.assignment, args.folder, args.out)
    else:
        results = grade(args.assignment, args.folder, args.student, args.out)
        print(f"{args.folder}: {results['score']:g} points; see {args.out}")
    return 0


if __name__ == "__main__":
    with plain_errors("course.py"):
        sys.exit(main())
