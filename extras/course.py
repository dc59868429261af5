"""The course kit: handouts made from the code, and a grader that names the mistake.

    python extras/course.py list                                   the assignments
    python extras/course.py make A3 OUT                            a handout for students
    python extras/course.py make A3 OUT --gradescope AUTOGRADER    and the files of an autograder
    python extras/course.py grade A3 SUBMISSION --student ID --out results.json
    python extras/course.py grade A3 FOLDER --out grades.csv       a folder of many submissions
    python extras/course.py check A3                               does the grader itself work?

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
import hashlib
import importlib
import io
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
from functools import partial
from pathlib import Path

import pytest
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ROOT / "extras" / "assignments"
sys.path[:0] = [str(ROOT), str(TEXTS)]

import written  # noqa: E402
from answers import ANSWERS  # noqa: E402
from mistakes import known_in  # noqa: E402
from probe import difference, limited, outcomes, same  # noqa: E402

from run import Parser, plain_errors, write  # noqa: E402
from tasks import UserError  # noqa: E402

NAMES = [f"A{i}" for i in range(8)]
CONTRACT = {  # A6: points, and words in the names of the tests of the handout's own contract
    "Q1 The task": (15, "problem or training or rewards"),
    "Q2 The runs": (10, "runs"),
    "Q3 The report": (5, "report"),
}
SHARED = ["run.py", "tasks", "requirements.txt"]  # what a handout has beside the student's file;
BESIDE = {"A0": SHARED[2:], "A1": SHARED, "A2": SHARED}  # in the others common.py as well
SEED = int(os.environ.get("COURSE_SEED", "1"))  # of the hidden checks; change it every year
VISIBILITY = os.environ.get("COURSE_VISIBILITY", "visible")  # on Gradescope; "after_due_date", ...
SECONDS = 120  # a question may take
LARGEST = 2**20  # bytes of a submitted file

# ---- What a module returns -----------------------------------------------------------------------


def module_of(name: str):
    return importlib.import_module(name.lower())


def questions(name: str) -> dict:
    return {} if name == "A6" else module_of(name).QUESTIONS


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
    path = ROOT / file
    source = (path if path.exists() else TEXTS / file).read_text(encoding="utf-8")
    source = source.replace(*change) if change[0] else source
    for number, signature in getattr(module_of(name), "TRAIN", {}).items():
        source = lift(source, number, signature)
    return source


def returned(name: str, key: str, seed: int, *sources: str) -> list[list[dict]] | str:
    """What the cases of a question give with each of these sources; or what went wrong."""
    file = questions(name)[key].file
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        folders = [scratch / str(i) for i in range(len(sources) + 1)]
        for folder, source in zip(folders, [finished(name, file), *sources], strict=True):
            (folder / file).parent.mkdir(parents=True)
            (folder / file).write_text(source, encoding="utf-8")
        out, seconds = scratch / "out.json", SECONDS * len(sources)
        args = name, key, seed, out, folders[0], folders[1:]
        problem = run_limited(scratch, seconds, outcomes, *args)
        try:
            return json.loads(out.read_text())
        except (OSError, ValueError):
            return problem or "the process ended without a result"


@functools.cache
def expected(name: str, key: str, seed: int) -> list[dict]:
    """What the finished code gives."""
    found = returned(name, key, seed, finished(name, questions(name)[key].file))
    if isinstance(found, str) or any("error" in outcome for outcome in found[0]):
        raise RuntimeError(f"{name} {key}: the finished code fails: {found}")
    return found[0]


@functools.cache
def mistaken(name: str, key: str) -> dict[str, list[dict]]:
    """What each known mistake gives."""
    mistakes, file = known_in(f"{name} {key}"), questions(name)[key].file
    sources = [finished(name, file, (right, wrong)) for right, wrong, _ in mistakes.values()]
    found = returned(name, key, SEED, *sources) if sources else []
    if isinstance(found, str):
        raise RuntimeError(f"{name} {key}: the known mistakes: {found}")
    return dict(zip(mistakes, found, strict=True))


def agree(a: dict, b: dict, tolerance: float) -> bool:
    if "error" in a or "error" in b:
        return a.get("error") == b.get("error")
    return same(a["value"], b["value"], tolerance)


# ---- Grading -------------------------------------------------------------------------------------


def find_files(name: str, folder: Path, scratch: Path) -> None:
    """Copy the submitted files into a folder of their own. Links and huge files are left out."""
    wanted = ["answers.json", "my_tasks.py", "report.md", "test_bugs.py"]
    wanted += [f"runs/{run}/{file}" for run in "ab" for file in ("config.json", "metrics.csv")]
    # A zip file often wraps everything in one more folder.
    folders = [folder, *(x for x in folder.iterdir() if x.is_dir() and x.name[0] not in "._")]
    for file in [*wanted, *(question.file for question in questions(name).values())]:
        for path in (x / part for x in folders for part in (file, Path(file).name)):
            if path.is_file() and not path.is_symlink() and path.stat().st_size <= LARGEST:
                text = path.read_bytes().decode("utf-8-sig", errors="replace")
                (scratch / file).parent.mkdir(parents=True, exist_ok=True)
                (scratch / file).write_text(text, encoding="utf-8")
                break


def jobs(name: str, folder: Path, answers: dict | str, students: list[str]) -> dict:
    """{title: (points, a function that gives the share of the points and feedback)}."""
    found = {}
    for key, question in questions(name).items():
        job = partial(grade_question, name, key, folder)
        found[f"{key} {question.title}"] = question.points, job
    for title, (points, words) in CONTRACT.items() if name == "A6" else ():
        found[title] = points, partial(grade_contract, folder, words)
    for key in questions(name) if name == "A7" else ():
        found[f"T{key[1:]} A test"] = 10, partial(grade_test, folder, key)
    for key, points in written_points(name).items():
        found[f"{key} written"] = points, partial(grade_answer, name, key, students, answers)
    return found


def grade(name: str, folder: Path, students: list[str] | None, out: Path) -> dict:
    """One submission -> Gradescope's results: score, and tests with their feedback.

    They are written to `out` after every question: if the grader is stopped, what it did counts.
    """
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        find_files(name, folder, scratch)
        answers = read_answers(scratch / "answers.json")
        if not students:
            students = [str((isinstance(answers, dict) and answers.get("id")) or folder.name)]
        found = jobs(name, scratch, answers, students)
        fixed = {"score": 0.0, "output": "The grader was stopped.", "visibility": VISIBILITY}
        tests = [{"name": x, "max_score": points} | fixed for x, (points, _) in found.items()]
        results = {"score": 0.0, "tests": tests}
        for test, (points, job) in zip(tests, found.values(), strict=True):
            share, test["output"] = job()
            test["score"] = round(points * share, 2)
            results["score"] = round(sum(test["score"] for test in tests), 2)
            write(out, json.dumps(results, indent=2) + "\n")
    return results


def grade_question(name: str, key: str, folder: Path) -> tuple[float, str]:
    """-> share of the points, feedback."""
    path = folder / questions(name)[key].file
    if not path.exists():
        return 0.0, f"{path.name} is missing."
    got = returned(name, key, SEED, path.read_text(encoding="utf-8"))
    return (0.0, f"Not graded: {got}.") if isinstance(got, str) else judge(name, key, got[0])


def judge(name: str, key: str, got: list[dict]) -> tuple[float, str]:
    """What a submission returns -> share of the points, feedback. Every function has the same
    share; a function counts if all of its cases are right."""
    right, cases = expected(name, key, SEED), questions(name)[key].cases(SEED)
    errors = {outcome.get("error", "") for outcome in got}
    if len(errors) == 1 and errors != {""}:
        return 0.0, f"Nothing to grade: {errors.pop()}."
    parts, shown = {}, {}  # shown: the first wrong case of each
    for case, a, b in zip(cases, got, right, strict=True):
        part, ok = case.part or function_of(case), agree(a, b, case.tolerance)
        parts.setdefault(part, []).append(ok)
        if not ok:
            shown.setdefault(part, f"- {case.label}\n{difference(a, b, case.tolerance)}")
    share = sum(map(all, parts.values())) / len(parts)
    lines = [f"{sum(map(sum, parts.values()))} of {len(cases)} checks passed.", *shown.values()]
    lines[4:] = [line.partition("\n")[0] for line in lines[4:]]  # only their names
    for mistake in known_mistakes(name, key, got) if share < 1 else ():
        hint = known_in(f"{name} {key}")[mistake][2]
        lines.append(f'Your code behaves like a known mistake, "{mistake}": {hint}')
    return share, "\n".join(lines)


def function_of(case) -> str:
    return re.split(r"[(, ]", case.label)[0]


def known_mistakes(name: str, key: str, got: list[dict]) -> list[str]:
    """The mistakes that explain all that the functions they change return, right or wrong. If some
    explain all that the submission returns, only those. A mistake that only crashes is none."""
    right, cases = expected(name, key, SEED), questions(name)[key].cases(SEED)
    found, exact = [], []
    for mistake, wrong in mistaken(name, key).items():
        rows = list(zip(got, right, wrong, cases, strict=True))
        changed = {function_of(c) for _, b, w, c in rows if not agree(w, b, c.tolerance)}
        alike = [function_of(c) in changed for a, _, w, c in rows if not agree(a, w, c.tolerance)]
        if changed and not any(alike) and any("value" in w for w in wrong):
            found.append(mistake)
            exact += [] if alike else [mistake]
    return exact or found


def run_pytest(folder: Path, *args: str) -> str:
    """Run tests in a folder, with the project's modules behind its own. -> "", or what is wrong."""
    return run_limited(folder, SECONDS, call_pytest, str(folder), *args)


def call_pytest(folder: str, *args: str) -> None:
    sys.path[:0] = [folder]
    for name in ("gpg", "test_bugs", "test_contract"):
        sys.modules.pop(name, None)
    sys.exit(int(pytest.main(["-q", "-p", "no:cacheprovider", *args])))


def grade_contract(folder: Path, keyword: str) -> tuple[float, str]:
    """A6: the tests of the handout whose names have one of these words."""
    shutil.copy(TEXTS / "contract.py", folder / "test_contract.py")
    problem = run_pytest(folder, "test_contract.py", "-k", keyword)
    return (0.0, "A test of test_contract.py fails: run it.") if problem else (1.0, "Right.")


def grade_test(folder: Path, key: str) -> tuple[float, str]:
    """A7: do the student's tests pass on the finished code, and fail with this bug alone in it?"""
    if not (folder / "test_bugs.py").exists():
        return 0.0, "test_bugs.py is missing."
    right, wrong, _ = module_of("A7").bugs(SEED)[key]
    with tempfile.TemporaryDirectory() as scratch:
        for change in (("", ""), (right, wrong)):
            place = Path(scratch) / str(len(change[0]))
            place.mkdir()
            shutil.copy(folder / "test_bugs.py", place)
            (place / "gpg.py").write_text(finished("A7", "gpg.py", change), encoding="utf-8")
            problem = run_pytest(place, "test_bugs.py")
            if problem and not change[0]:
                return 0.0, f"Your tests fail on the finished gpg.py ({problem})."
    if "status 1" not in problem:
        return 0.0, "No test of yours fails if this bug alone is in gpg.py."
    return 1.0, "Right."


def written_points(name: str) -> dict[str, int]:
    text = (TEXTS / f"{name}.md").read_text(encoding="utf-8")
    return {key: int(n) for key, n in re.findall(r"- \*\*(W\d)\*\* \((\d+) points\)", text)}


def read_answers(path: Path) -> dict | str:
    """answers.json, or what is wrong with it."""
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"answers.json is missing or no JSON: {error!s:.100}."
    return answers if isinstance(answers, dict) else "answers.json has to be an object, {...}."


def grade_answer(name: str, key: str, students: list, answers: dict | str) -> tuple[float, str]:
    """A number, compared with the reference's for the numbers of this student, or, in a group, of
    any of these."""
    if isinstance(answers, str):
        return 0.0, answers
    try:
        answer = float(answers.get(key))
    except (TypeError, ValueError, OverflowError):
        return 0.0, f"answers.json has no number under {key!r}."
    for student in students:
        right = ANSWERS[f"{name} {key}"](**written.numbers(name, key, student))
        if math.isclose(answer, right, rel_tol=1e-3, abs_tol=1e-9):
            return 1.0, "Right."
    return 0.0, f"Not right for the numbers of {' or '.join(students)}."


def grade_many(name: str, folder: Path, out: Path) -> None:
    """grades.csv, and a results file per student beside it. Raises UserError."""
    students = sorted(path for path in folder.iterdir() if path.is_dir())
    if not students:
        raise UserError(f"{folder}: no folder in it; one per student is expected")
    keys = [title.split()[0] for title in jobs(name, folder, {}, [])]
    rows, details = {}, out.with_suffix("")
    details.mkdir(parents=True, exist_ok=True)
    if out.exists():
        with out.open(encoding="utf-8", newline="") as file:
            rows = {row["student"]: row for row in csv.DictReader(file)}
    for path in tqdm(students, unit="submission"):
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.is_symlink())
        digest = hashlib.sha256(b"".join(p.read_bytes()[:LARGEST] for p in files)).hexdigest()[:16]
        if rows.get(path.name, {}).get("hash") == digest:
            continue
        results = grade(name, path, None, details / f"{path.name}.json")
        rows[path.name] = {"student": path.name, "score": results["score"], "hash": digest}
        rows[path.name] |= {k: x["score"] for k, x in zip(keys, results["tests"], strict=True)}
        text, names = io.StringIO(), ["student", "score", *keys, "hash"]
        table = csv.DictWriter(text, names, lineterminator="\n")
        table.writeheader()
        table.writerows(rows[student] for student in sorted(rows))
        write(out, text.getvalue())


# ---- Handouts ------------------------------------------------------------------------------------


def new_folder(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is not an empty folder; name another")
    path.mkdir(parents=True, exist_ok=True)


def make(name: str, out: Path) -> None:
    """Write the handout into a folder that is new or empty. Raises UserError."""
    new_folder(out)
    ignore = shutil.ignore_patterns("__pycache__")
    more = ["gpg.py", "grpo.py"] if name == "A6" else []
    for part in BESIDE.get(name, [*SHARED, "common.py", *more]):
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, out / part, ignore=ignore)
        else:
            shutil.copy(ROOT / part, out)
    for file in {question.file for question in questions(name).values()}:
        (out / file).write_text(handout(name, file), encoding="utf-8")
    (out / f"{name}.md").write_text(text_of(name), encoding="utf-8")
    (out / "pytest.ini").write_text("[pytest]\naddopts = -q --tb=short\nfilterwarnings = ignore\n")
    if name == "A6":
        shutil.copy(TEXTS / "contract.py", out / "test_contract.py")
    if name in ("A6", "A7"):
        return
    files = ["probe.py", "written.py", "test_public.py", f"{name.lower()}.py"]
    for file in files if name in ("A0", "A1") else [*files, "training.py"]:
        shutil.copy(TEXTS / file, out)
    values = {key: expected(name, key, 0) for key in questions(name)}
    (out / "expected.json").write_text(json.dumps({"assignment": name, "values": values}))
    blank = dict.fromkeys(["id", *written_points(name)])
    write(out / "answers.json", json.dumps(blank, indent=2) + "\n")


def handout(name: str, file: str) -> str:
    """A file as students get it: with stubs or, in A7, with bugs."""
    source = finished(name, file)
    for right, wrong, _ in module_of(name).bugs(SEED).values() if name == "A7" else ():
        source = source.replace(right, wrong)
    for key, question in questions(name).items() if name != "A7" else ():
        for region in question.names.split() if question.file == file else ():
            source = stub(source, region, key)
    return source


def lift(source: str, number: int, signature: str) -> str:
    """Make paragraph `number` of `train` a function: "name(inputs) -> outputs"."""
    call, outputs = signature.split(" -> ")
    lines = source.split("\n")
    marks = [i for i, line in enumerate(lines) if re.match(r" {8}# \d\. ", line)]
    start, end = marks[number - 1], marks[number]
    comment, body = lines[start].split(". ", 1)[1], "\n".join(lines[start + 1 : end]).rstrip()
    first = {"B": "args.prompts", "G": "args.group_size", "ref_logprobs": "None"}
    used = [x for x in first if re.search(rf"\b{x}\b", body) and x not in re.split(r"\W+", call)]
    first = [f"    {x} = {first[x]}" for x in used]
    body = [line[4:] for line in body.split("\n")]
    text = [f'    """{comment}', "", f"    -> {outputs}", '    """']
    lines[start + 1 : end] = [f"        {outputs} = (", f"            {call}", "        )", ""]
    at = lines.index("def train(args: argparse.Namespace) -> Run:")
    lines[at:at] = [f"def {call}:", *text, *first, *body, f"    return {outputs}", "", ""]
    return "\n".join(lines)


def stub(source: str, region: str, key: str) -> str:
    """The source with a function or a class's methods left to be written.

    Signature, docstring and the shapes of tensors stay.
    """
    node = ast.parse(source)
    for part in region.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    if isinstance(node, ast.ClassDef):
        for method in [n.name for n in node.body if isinstance(n, ast.FunctionDef)]:
            source = stub(source, f"{region}.{method}", key)
        return source
    lines, body = source.split("\n"), node.body
    documented = ast.get_docstring(node) is not None
    first = body[0].end_lineno if documented else body[0].lineno - 1
    indent = " " * body[0].col_offset
    shapes = {}  # of each name whose line ends in such a comment
    for line in lines[first : body[-1].end_lineno]:
        if match := re.match(r" *(\w+) = .*  # (.*\[.*\].*|.*[BGNn] rows.*)$", line):
            shapes[match[1]] = f"{indent}# {match[1]}: {match[2]}"
    new = [*shapes.values(), f'{indent}raise NotImplementedError("{key}")']
    lines[first : body[-1].end_lineno] = new
    return "\n".join(lines)


def text_of(name: str) -> str:
    """The text of an assignment; its questions get titles, points, and what is to be written."""
    text, rules = ((TEXTS / f"{x}.md").read_text(encoding="utf-8") for x in (name, "rules"))
    for title, (points, _) in jobs(name, Path(), {}, []).items():
        key, question = title[:2], questions(name).get(title[:2])
        parts = question and question.names.replace(" ", "`, `")
        where = f"; `{parts}` in `{question.file}`" if question else ""
        if not title.endswith("written"):  # those have their points in the text
            text = text.replace(f"- **{key}** ", f"- **{title}** ({points} points{where}). ")
    read = re.findall(r"^## (.*) \((\d+) points\)", text, re.MULTILINE)
    total = 100 + sum(int(points) for _, points in read)
    parts = "; ".join(f"{heading.lower()}, {points} points" for heading, points in read)
    torch = re.search(r"^torch\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[0]
    rules = rules.rstrip().format(name=name, read=parts, torch=torch, total=total)
    return text.replace("{rules}", rules)


SETUP = """#!/usr/bin/env bash
set -e
export DEBIAN_FRONTEND=noninteractive
apt-get update && apt-get install -y python3 python3-pip python3-venv
python3 -m venv /autograder/venv
cd /autograder/source/project
pip=/autograder/venv/bin/pip
$pip install "$(grep '^torch' requirements.txt)" --index-url https://download.pytorch.org/whl/cpu
$pip install -r requirements.txt
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
    (out / "setup.sh").write_text(SETUP)
    (out / "run_autograder").write_text(RUN.format(name=name))
    (out / "run_autograder").chmod(0o755)
    ignore = shutil.ignore_patterns("__pycache__", "tests")
    for part in ("tasks", "extras"):
        shutil.copytree(ROOT / part, out / "project" / part, ignore=ignore)
    for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt"]:
        shutil.copy(path, out / "project" / path.name)


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
    commands.add_parser("list", help="the assignments, their questions and points")
    helps = {"make": "a handout", "grade": "grade submissions", "check": "grade the mistakes"}
    parse = {command: commands.add_parser(command, help=text) for command, text in helps.items()}
    for sub in parse.values():
        sub.add_argument("assignment", choices=NAMES, metavar="A0..A7")
    parse["make"].add_argument("out", type=Path, help="a folder, new or empty")
    parse["make"].add_argument("--gradescope", type=Path, metavar="DIR", help="for autograder.zip")
    parse["grade"].add_argument("submission", type=Path, help="a folder; or a folder of them")
    parse["grade"].add_argument("--student", nargs="+", metavar="ID", help="for written questions")
    parse["grade"].add_argument("--out", type=Path, required=True, help="results.json, or a .csv")
    args = parser.parse_args(argv)
    if args.command == "list":
        for name in NAMES:
            print((TEXTS / f"{name}.md").read_text(encoding="utf-8").partition("\n")[0][2:])
            for question, (points, _) in jobs(name, Path(), {}, []).items():
                print(f"    {points:3}  {question}")
    elif args.command == "make":
        if args.gradescope:
            new_folder(args.gradescope)
        make(args.assignment, args.out)
        print(f"see {args.out / args.assignment}.md")
        if args.gradescope:
            make_gradescope(args.assignment, args.gradescope)
            print(f"zip the contents of {args.gradescope} for Gradescope")
    elif args.command == "check":
        return 0 if check(args.assignment) else 1
    elif not args.submission.is_dir():
        raise UserError(f"{args.submission} is not a folder")
    elif args.out.suffix == ".csv":
        if args.student:
            raise UserError("--student has no effect with a .csv: folders are named by the ids")
        grade_many(args.assignment, args.submission, args.out)
    else:
        results = grade(args.assignment, args.submission, args.student, args.out)
        print(f"{args.submission}: {results['score']:g} points; see {args.out}")
    return 0


if __name__ == "__main__":
    with plain_errors("course.py"):
        sys.exit(main())
