"""The course kit: handouts made from the code, and a grader that names the mistake.

    python extras/course.py list                                   the assignments
    python extras/course.py make A3 OUT                            a handout for students
    python extras/course.py make A3 OUT --gradescope AUTOGRADER    and the files of an autograder
    python extras/course.py grade A3 SUBMISSION --student ID --out results.json
    python extras/course.py grade A3 FOLDER --out grades.csv       a folder of many submissions
    python extras/course.py check A3                               does the grader itself work?

A submission is a folder with the student's files, as in the handout. A folder of submissions has
one such folder per student, named by the student's id, or with a file answers.json that has it
under "id". A question is graded by what its functions return, beside what the finished code
returns: how they are written does not matter.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import functools
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ROOT / "extras" / "assignments"
sys.path[:0] = [str(ROOT), str(TEXTS)]

import written  # noqa: E402
from answers import ANSWERS  # noqa: E402
from mistakes import MISTAKES  # noqa: E402
from probe import same  # noqa: E402

from run import Parser, plain_errors  # noqa: E402
from tasks import UserError  # noqa: E402

TITLES = {
    "A1": "CoPG on a bandit",
    "A2": "Sampling and log-probabilities",
    "A3": "Group Policy Gradient",
    "A4": "GRPO",
    "A5": "Contrastive Policy Gradient",
    "A6": "A task of your own",
}
CONTRACT = {  # A6: pytest of the handout's own contract
    "Q1": ("The task", 15, "problem or training or rewards"),
    "Q2": ("The runs", 10, "runs"),
    "Q3": ("The report", 5, "report"),
}
LIBRARY = {  # beside the file that the student writes
    "A1": ["bandit_toy.py", "run.py", "tasks"],
    "A2": ["common.py", "run.py", "gpg.py", "tasks"],
    "A3": ["gpg.py", "common.py", "run.py", "tasks"],
    "A4": ["grpo.py", "common.py", "run.py", "tasks"],
    "A5": ["copg.py", "common.py", "run.py", "tasks"],
    "A6": ["gpg.py", "grpo.py", "common.py", "run.py", "tasks", "extras/assignments/contract.py"],
}
HIDDEN_SEED = int(os.environ.get("COURSE_SEED", "1"))  # choose another one every year
SECONDS = 120  # a question may take, with imports
MEMORY = 8 * 2**30  # bytes of address space
LARGEST = 2**20  # bytes of a submitted file

# --------------------------------------------------------------------------------------------------
# What a module returns
# --------------------------------------------------------------------------------------------------


def questions(name: str) -> dict:
    return {} if name == "A6" else importlib.import_module(name.lower()).QUESTIONS


def limits() -> None:
    """In the child, before it runs anything of the student's."""
    os.setsid()
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**27, 2**27))


def run_limited(command: list[str], cwd: Path, seconds: float) -> str:
    """Run a command with limits in a process group of its own, which is dead afterwards, on every
    path. -> what went wrong, or ""."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(cwd), "MPLBACKEND": "agg"}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=limits if os.name == "posix" else None,
    )
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"it ran for more than {seconds:.0f} seconds and was stopped"
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
        process.wait()
    return "" if status == 0 else f"the process ended with status {status}"


def outcomes(name: str, key: str, seed: int, *folders: Path) -> list[list[dict]] | str:
    """What the cases of a question give with the files of each folder; or what went wrong."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.json"
        command = [sys.executable, str(TEXTS / "probe.py"), name, key, str(seed), str(out)]
        seconds = SECONDS * len(folders)
        problem = run_limited([*command, *map(str, folders)], Path(scratch), seconds)
        try:
            return json.loads(out.read_text())
        except (OSError, ValueError):
            return problem or "the process ended without a result"


@functools.cache
def expected(name: str, key: str, seed: int) -> list[dict]:
    """What the finished code gives."""
    found = outcomes(name, key, seed, ROOT)
    if isinstance(found, str) or any("error" in outcome for outcome in found[0]):
        raise RuntimeError(f"{name} {key}: the finished code fails: {found}")
    return found[0]


@functools.cache
def mistaken(name: str, key: str, seed: int) -> dict[str, list[dict]]:
    """What each known mistake gives."""
    mistakes, file = MISTAKES[name].get(key, {}), questions(name)[key].file
    source = (ROOT / file).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(i) for i in range(len(mistakes))]
        for folder, (right, wrong, _) in zip(folders, mistakes.values(), strict=True):
            (folder / file).parent.mkdir(parents=True)
            (folder / file).write_text(source.replace(right, wrong), encoding="utf-8")
        found = outcomes(name, key, seed, *folders)
    return {} if isinstance(found, str) else dict(zip(mistakes, found, strict=True))


def agree(a: dict, b: dict, tolerance: float) -> bool:
    if "error" in a or "error" in b:
        return a.get("error") == b.get("error")
    return same(a["value"], b["value"], tolerance)


# --------------------------------------------------------------------------------------------------
# Grading
# --------------------------------------------------------------------------------------------------


def find_files(name: str, folder: Path, scratch: Path) -> None:
    """Copy the submitted files into a folder of their own. Links and huge files are left out."""
    wanted = {question.file for question in questions(name).values()} | {"answers.json"}
    if name == "A6":
        wanted |= {"my_tasks.py", "report.md"}
        wanted |= {f"runs/{run}/{file}" for run in "ab" for file in ("config.json", "metrics.csv")}
    folders = [folder]
    for path in folder.iterdir():  # a zip file often wraps everything in one more folder
        if path.is_dir() and not path.is_symlink() and path.name[0] not in "._":
            folders.append(path)
    for file in wanted:
        for place in folders:
            path = next((p for p in (place / file, place / Path(file).name) if p.is_file()), None)
            if path and not path.is_symlink() and path.stat().st_size <= LARGEST:
                (scratch / file).parent.mkdir(parents=True, exist_ok=True)
                text = path.read_bytes().decode("utf-8-sig", errors="replace")
                (scratch / file).write_text(text, encoding="utf-8")
                break


def grade(name: str, folder: Path, student: str | None, out: Path) -> dict:
    """One submission -> Gradescope's results: score, and tests with their feedback.

    They are written to `out` after every question: if the grader is stopped, what it did counts.
    """
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        find_files(name, folder, scratch)
        answers = read_answers(scratch / "answers.json")
        student = student or str(answers.get("id") or folder.name)
        jobs = []
        for key, question in questions(name).items():
            job = functools.partial(grade_question, name, key, scratch)
            jobs.append((f"{key} {question.title}", question.points, job))
        for key, (title, points, keyword) in CONTRACT.items() if name == "A6" else ():
            job = functools.partial(grade_contract, scratch, keyword)
            jobs.append((f"{key} {title}", points, job))
        for key, points in written_points(name).items():
            job = functools.partial(grade_answer, name, student, answers, key)
            jobs.append((f"{key} written", points, job))
        tests = [
            {"name": title, "score": 0.0, "max_score": points, "output": "Not graded yet."}
            for title, points, _ in jobs
        ]
        results = {"score": 0.0, "tests": tests}
        for test, (_, points, job) in zip(tests, jobs, strict=True):
            share, test["output"] = job()
            test["score"] = round(points * share, 2)
            results["score"] = round(sum(test["score"] for test in tests), 2)
            write_json(out, results)
    return results


def grade_question(name: str, key: str, folder: Path) -> tuple[float, str]:
    """-> share of the points, feedback. Every function has the same share; a function counts if all
    of its cases are right."""
    question = questions(name)[key]
    if not (folder / question.file).exists():
        return 0.0, f"{question.file} is missing."
    got, right = outcomes(name, key, HIDDEN_SEED, folder), expected(name, key, HIDDEN_SEED)
    if isinstance(got, str):
        return 0.0, f"Your code could not be graded: {got}."
    (got,) = got
    cases = question.cases(HIDDEN_SEED)
    passed = [agree(a, b, c.tolerance) for a, b, c in zip(got, right, cases, strict=True)]
    parts = {}
    for case, ok in zip(cases, passed, strict=True):
        parts.setdefault(re.split(r"[( ]", case.label)[0], []).append(ok)
    if all(outcome.get("error") == "not done yet" for outcome in got):
        return 0.0, "Not done yet."
    share = sum(all(part) for part in parts.values()) / len(parts)
    lines = [f"{sum(passed)} of {len(passed)} checks passed."]
    shown = 0
    for case, ok, a, b in zip(cases, passed, got, right, strict=True):
        if not ok and shown < 2:
            shown += 1
            yours = a.get("error") or brief(a["value"])
            lines.append(f"- {case.label}\n  expected: {brief(b['value'])}\n  yours:    {yours}")
    for mistake in known_mistakes(name, key, got, right, cases) if share < 1 else ():
        hint = MISTAKES[name][key][mistake][2]
        lines.append(f'Your code behaves like a known mistake, "{mistake}": {hint}')
    return share, "\n".join(lines)


def known_mistakes(name: str, key: str, got: list, right: list, cases: list) -> list[str]:
    """The mistakes whose every deviation from the finished code the submission shows, too."""
    found = []
    for mistake, wrong in mistaken(name, key, HIDDEN_SEED).items():
        rows = list(zip(got, right, wrong, cases, strict=True))
        shows = [row for row in rows if not agree(row[2], row[1], row[3].tolerance)]
        if shows and all(agree(a, w, c.tolerance) for a, _, w, c in shows):
            found.append(mistake)
    return found


def brief(value) -> str:
    text = json.dumps(round_numbers(value))
    return text if len(text) <= 300 else f"{text[:300]} ..."


def round_numbers(value):
    if isinstance(value, dict):
        return {key: round_numbers(x) for key, x in value.items()}
    if isinstance(value, list):
        return [round_numbers(x) for x in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def grade_contract(folder: Path, keyword: str) -> tuple[float, str]:
    """A6: the tests of the handout whose names have one of these words."""
    shutil.copy(TEXTS / "contract.py", folder / "test_contract.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_contract.py"]
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, '.']; import pytest; "
    code += f"sys.exit(pytest.main({[*command[3:], '-k', keyword]!r}))"
    problem = run_limited([sys.executable, "-c", code], folder, SECONDS)
    return (
        (0.0, f"A test of the contract fails ({problem}): run it.") if problem else (1.0, "Right.")
    )


def written_points(name: str) -> dict[str, int]:
    return {} if name == "A6" else importlib.import_module(name.lower()).WRITTEN


def read_answers(path: Path) -> dict:
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return answers if isinstance(answers, dict) else {}


def grade_answer(name: str, student: str, answers: dict, key: str) -> tuple[float, str]:
    """A number, compared with the reference's for this student's numbers."""
    answer = answers.get(key)
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        return 0.0, f"answers.json has no number under {key!r}."
    right = ANSWERS[name][key](written.numbers(name, key, student))
    try:
        close = math.isclose(answer, right, rel_tol=1e-3, abs_tol=1e-9)
    except OverflowError:  # an integer of 400 digits
        close = False
    return float(close), "Right." if close else f"Not right for the numbers of {student!r}."


def grade_many(name: str, folder: Path, out: Path) -> None:
    """grades.csv, and a results file per student beside it. Raises UserError."""
    students = sorted(path for path in folder.iterdir() if path.is_dir())
    if not students:
        raise UserError(f"{folder}: no folder in it; one per student is expected")
    keys = [*questions(name), *(CONTRACT if name == "A6" else {}), *written_points(name)]
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
        scores = dict(zip(keys, (test["score"] for test in results["tests"]), strict=True))
        rows[path.name] = {"student": path.name, "score": results["score"], **scores}
        rows[path.name]["hash"] = digest
        with out.with_suffix(".new").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ["student", "score", *keys, "hash"], lineterminator="\n")
            table.writeheader()
            table.writerows(rows[student] for student in sorted(rows))
        out.with_suffix(".new").replace(out)


def write_json(path: Path, results: dict) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    new.replace(path)


# --------------------------------------------------------------------------------------------------
# Handouts
# --------------------------------------------------------------------------------------------------


def make(name: str, out: Path) -> None:
    """Write the handout into a folder that is new or empty. Raises UserError."""
    new_folder(out)
    ignore = shutil.ignore_patterns("__pycache__")
    for part in [*LIBRARY[name], "requirements.txt"]:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, out / part, ignore=ignore)
        else:
            shutil.copy(ROOT / part, out / Path(part).name)
    for file in {question.file for question in questions(name).values()}:
        source = (ROOT / file).read_text(encoding="utf-8")
        for key, question in questions(name).items():
            for region in question.names if question.file == file else ():
                source = stub(source, region, key)
        (out / file).write_text(source, encoding="utf-8")
    (out / f"{name}.md").write_text(text_of(name), encoding="utf-8")
    if name == "A6":
        (out / "contract.py").rename(out / "test_contract.py")
        return
    for file in ("probe.py", "training.py", "written.py", f"{name.lower()}.py", "test_public.py"):
        shutil.copy(TEXTS / file, out / file)
    if name == "A4":
        shutil.copy(TEXTS / "a3.py", out / "a3.py")
    values = {key: expected(name, key, 0) for key in questions(name)}
    (out / "expected.json").write_text(json.dumps({"assignment": name, "values": values}))
    answers = dict.fromkeys(["id", *written_points(name)])
    write_json(out / "answers.json", answers)


def new_folder(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is not an empty folder; name another")
    path.mkdir(parents=True, exist_ok=True)


def stub(source: str, region: str, key: str) -> str:
    """The source with a function, a class's method, or a paragraph "train 2" left to be written.

    Signature, docstring and the comment of a paragraph stay.
    """
    path, _, number = region.partition(" ")
    node = ast.parse(source)
    for part in path.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    lines = source.split("\n")
    if isinstance(node, ast.ClassDef):
        for method in [n.name for n in node.body if isinstance(n, ast.FunctionDef)]:
            source = stub(source, f"{path}.{method}", key)
        return source
    body = node.body
    if number:
        marks = [i for i in range(node.lineno, node.end_lineno) if re.match(r" +# \d\. ", lines[i])]
        here = next(i for i, line in enumerate(marks) if f"# {number}. " in lines[line])
        first, end = marks[here] + 1, marks[here + 1] if here + 1 < len(marks) else node.end_lineno
        while not lines[end - 1].strip():
            end -= 1
    else:
        documented = ast.get_docstring(node) is not None
        first = body[0].end_lineno if documented else body[0].lineno - 1
        end = body[-1].end_lineno
    indent = " " * (len(lines[first]) - len(lines[first].lstrip()))
    new = [f"{indent}# {shape}" for shape in shapes(lines[first:end])]
    lines[first:end] = [*new, f'{indent}raise NotImplementedError("{key}")']
    return "\n".join(lines)


def shapes(lines: list[str]) -> list[str]:
    """ "name: [B, G]" for each name whose line ends in such a comment."""
    found = {}
    for line in lines:
        if match := re.match(r" *(\w+) = .*  # (\[.*?\].*|.* rows)$", line):
            found[match[1]] = f"{match[1]}: {match[2]}"
    return list(found.values())


def text_of(name: str) -> str:
    """The text of an assignment: its headings get titles, points, and what is to be written."""
    text = (TEXTS / f"{name}.md").read_text(encoding="utf-8")
    for key, question in questions(name).items():
        places = [
            f"`{x}`" if " " not in x else f"paragraph {x[-1]} of `train`" for x in question.names
        ]
        title = f"## {key}. {question.title} ({question.points} points)\n\n"
        text = text.replace(f"## {key}\n", f"{title}In `{question.file}`: {', '.join(places)}.\n")
    for key, (title, points, _) in CONTRACT.items() if name == "A6" else ():
        text = text.replace(f"## {key}\n", f"## {key}. {title} ({points} points)\n")
    rows = [
        f"`python written.py {name} YOUR_ID` prints these questions with your own numbers. Put "
        "your id and the answers into `answers.json`, as numbers with four digits or more. On "
        "Gradescope your id is the email address with which you are registered.\n"
    ]
    for key, points in written_points(name).items():
        rows.append(f"- **{key}** ({points} points): {written.QUESTIONS[name][key][0]}")
    rules = (TEXTS / "rules.md").read_text(encoding="utf-8").rstrip()
    return text.replace("{rules}", rules).replace("{written}", "\n".join(rows))


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
id=$(python3 -c 'import json; m = json.load(open("/autograder/submission_metadata.json"))
print(m["users"][0]["email"])')
/autograder/venv/bin/python extras/course.py grade {name} /autograder/submission \\
    --student "$id" --out /autograder/results/results.json
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


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def check(name: str) -> bool:
    """Grade the finished code, an untouched handout and every known mistake; print the outcome."""
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for key, question in questions(name).items():
            path = Path(folder) / question.file
            path.parent.mkdir(exist_ok=True)
            source = (ROOT / question.file).read_text(encoding="utf-8")
            path.write_text(source)
            share, _ = grade_question(name, key, Path(folder))
            empty = source
            for region in question.names:
                empty = stub(empty, region, key)
            path.write_text(empty)
            nothing, _ = grade_question(name, key, Path(folder))
            good &= share == 1 and nothing == 0
            print(f"{name} {key}: finished code {share:.0%}, empty {nothing:.0%}", flush=True)
            for mistake, (right, wrong, _) in MISTAKES[name].get(key, {}).items():
                path.write_text(source.replace(right, wrong))
                share, output = grade_question(name, key, Path(folder))
                named = f'"{mistake}"' in output
                good &= share < 1 and named and source.count(right) == 1
                told = "named" if named else "NOT NAMED"
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
        sub.add_argument("assignment", choices=TITLES, metavar="A1..A6")
    parse["make"].add_argument("out", type=Path, help="a folder, new or empty")
    parse["make"].add_argument("--gradescope", type=Path, metavar="DIR", help="for autograder.zip")
    parse["grade"].add_argument("submission", type=Path, help="a folder; or a folder of them")
    parse["grade"].add_argument("--student", help="the id that the written questions depend on")
    parse["grade"].add_argument("--out", type=Path, required=True, help="results.json, or a .csv")
    args = parser.parse_args(argv)
    if args.command == "list":
        for name, title in TITLES.items():
            print(f"{name}  {title}")
            for key, question in questions(name).items():
                print(f"    {key}  {question.points:3}  {question.title}")
            for key, (title, points, _) in CONTRACT.items() if name == "A6" else ():
                print(f"    {key}  {points:3}  {title}")
            for key, points in written_points(name).items():
                print(f"    {key}  {points:3}  written")
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
