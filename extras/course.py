"""The course kit: handouts made from the code, and a grader that names the mistake.

    python extras/course.py list                                   the assignments
    python extras/course.py make A3 OUT                            a handout for students
    python extras/course.py make A3 OUT --gradescope AUTOGRADER    and the files of an autograder
    python extras/course.py grade A3 SUBMISSION --student ID --out results.json
    python extras/course.py grade A3 FOLDER --out grades.csv       a folder of many submissions
    python extras/course.py check A3                               does the grader itself work?

A submission is a folder with the student's files in it, as in the handout. A folder of submissions
has one such folder per student, named by the student's id.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import json
import math
import runpy
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from assignments import regions, sandbox, written
from assignments.hints import EXEMPT, HINTS
from assignments.table import ANSWERS, ASSIGNMENTS, HIDDEN_SEED, Assignment, Question
from tqdm import tqdm

import common
from common import UserError

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ROOT / "extras" / "assignments"
LARGEST = 2**20  # bytes of a submitted file that is read
TOLERANCE = 1e-3  # relative, of a number in a written answer

# --------------------------------------------------------------------------------------------------
# Handouts
# --------------------------------------------------------------------------------------------------


def make(name: str, out: Path) -> None:
    """Write the handout into a folder that is new or empty. Raises UserError."""
    new_folder(out)
    assignment, files = ASSIGNMENTS[name], {}
    for file in assignment.files:
        paths = sorted((ROOT / file).glob("*.py")) if (ROOT / file).is_dir() else [ROOT / file]
        files |= {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in paths}
    for file in {q.file for q in assignment.questions.values()} & files.keys():
        left_out = {
            region: key for key, question in assignment.questions.items()
            for region in question.regions if question.file == file
        }  # fmt: skip
        files[file] = regions.stub(files[file], left_out)
    public = [test for q in assignment.questions.values() for test in q.public]
    if name == "A6":
        files["tests/test_contract.py"] = (TEXTS / "contract.py").read_text(encoding="utf-8")
    else:
        cut = regions.cut_tests(ROOT / "tests", public)
        files |= {f"tests/{file}": source for file, source in cut.items()}
    files["tests/conftest.py"] = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    files[f"{name}.md"] = text_of(name)
    if assignment.written:
        files["written.py"] = (TEXTS / "written.py").read_text(encoding="utf-8")
        files["answers.json"] = json.dumps(dict.fromkeys(assignment.written), indent=2) + "\n"
    sandbox.write(out, files)


def new_folder(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is not an empty folder; name another")
    path.mkdir(parents=True, exist_ok=True)


def text_of(name: str) -> str:
    """The text of an assignment: its headings get titles, points, and what is to be written."""
    text = (TEXTS / f"{name}.md").read_text(encoding="utf-8")
    for key, q in ASSIGNMENTS[name].questions.items():
        places = [f"`{r}`" if " " not in r else "`{}`, below the comment `# {}. ...`".format(
            *r.split()) for r in q.regions]  # fmt: skip
        title = f"## {key}. {q.title} ({q.points} points)\n"
        title += f"\nIn `{q.file}`: {', '.join(places)}.\n" if places else ""
        text = text.replace(f"## {key}\n", title)
    rows = [f"`python written.py {name} YOUR_ID` prints these questions with your own numbers. Put "
            "the answers into `answers.json`, as numbers with four digits or more.\n"]  # fmt: skip
    rows += [f"- **{key}** ({points} points): {written.QUESTIONS[name][key][0]}"
             for key, points in ASSIGNMENTS[name].written.items()]  # fmt: skip
    rules = (TEXTS / "rules.md").read_text(encoding="utf-8").rstrip()
    return text.replace("{rules}", rules).replace("{written}", "\n".join(rows))


SETUP = """#!/usr/bin/env bash
set -e
apt-get update && apt-get install -y python3 python3-pip python3-venv
python3 -m venv /autograder/venv
cd /autograder/source/project
pip=/autograder/venv/bin/pip
$pip install "$(grep '^torch' requirements.txt)" --index-url https://download.pytorch.org/whl/cpu
$pip install -r requirements.txt
"""
RUN = """#!/usr/bin/env bash
cd /autograder/source/project
export OMP_NUM_THREADS=1
id=$(python3 -c 'import json; m = json.load(open("/autograder/submission_metadata.json"))
print(m["users"][0]["email"])')
/autograder/venv/bin/python extras/course.py grade {name} /autograder/submission \\
    --student "$id" --out /autograder/results/results.json
"""


def make_gradescope(name: str, out: Path) -> None:
    """What goes into Gradescope's autograder.zip: setup.sh, run_autograder, and the project."""
    new_folder(out)
    sandbox.write(out, {"setup.sh": SETUP, "run_autograder": RUN.format(name=name)})
    (out / "run_autograder").chmod(0o755)
    for part in ("*.py", "requirements.txt", "tasks/*.py", "tests/*.py", "extras/*.py",
                 "extras/assignments/*"):  # fmt: skip
        for path in ROOT.glob(part):
            if path.is_file():
                to = out / "project" / path.relative_to(ROOT)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, to)


# --------------------------------------------------------------------------------------------------
# Grading
# --------------------------------------------------------------------------------------------------


@functools.cache
def reference() -> dict[str, str]:
    """The project, as a student's functions are put into it: {path: source}."""
    paths = [path for part in ("", "tasks", "tests") for path in (ROOT / part).glob("*.py")]
    files = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}
    contract = (TEXTS / "contract.py").read_text(encoding="utf-8")
    return files | {"tests/test_contract.py": contract}


@functools.cache
def docstrings() -> dict[str, str]:
    found = regions.first_lines(ROOT / "tests")
    contract = regions.first_lines(TEXTS, "contract.py")
    return found | {
        key.replace("contract.py", "test_contract.py"): contract[key] for key in contract
    }


@functools.cache
def wrong_versions(file: str, region: str) -> dict[str, str]:
    """{name: source} of the known mistakes in a region, from tests/mutations.py."""
    source, found = reference()[file], {}
    _, block, _, j, line = regions.find(regions.ast.parse(source), source, region)
    for name, where, right, wrong, _ in runpy.run_path(ROOT / "tests" / "mutations.py")[
        "MUTATIONS"
    ]:
        if where == file and source.count(right) == 1:
            at = source[: source.index(right)].count("\n") + 1
            if line < at <= block[j - 1].end_lineno:
                found[name] = source.replace(right, wrong)
    return found


def read_submission(assignment: Assignment, folder: Path) -> dict[str, str]:
    """The submitted files, as texts. A link, a folder or a huge file counts as missing."""
    wanted = assignment.submitted or sorted({q.file for q in assignment.questions.values()})
    found = {}
    while folder.is_dir():  # a zip file often wraps everything in one more folder
        inside = [path for path in folder.iterdir() if path.name[0] not in "._"]
        if len(inside) != 1 or not inside[0].is_dir() or inside[0].is_symlink():
            break
        folder = inside[0]
    for pattern in [*wanted, "answers.json"]:
        paths = sorted(folder.glob(pattern)) or sorted(folder.glob(Path(pattern).name))
        for path in paths[:4]:
            if path.is_file() and not path.is_symlink() and path.stat().st_size <= LARGEST:
                name = str(path.relative_to(folder)) if "*" in pattern else pattern
                found[name] = path.read_bytes().decode("utf-8-sig", errors="replace")
    return found


def grade(name: str, folder: Path, student: str, out: Path) -> dict:
    """One submission -> Gradescope's results: score, and tests with their feedback.

    They are written to `out` at the start and after every question: if the grader is stopped, what
    it has done counts.
    """
    assignment = ASSIGNMENTS[name]
    submitted = read_submission(assignment, folder)
    answers = read_answers(submitted.get("answers.json"))
    jobs = [(f"{key} {q.title}", q.points, functools.partial(grade_question, q, submitted))
            for key, q in assignment.questions.items()]  # fmt: skip
    answer = functools.partial(grade_answer, name, student, answers)
    jobs += [(f"{key} written", points, functools.partial(answer, key))
             for key, points in assignment.written.items()]  # fmt: skip
    tests = [
        {"name": title, "score": 0.0, "max_score": points, "output": "Not graded: out of time.",
         "visibility": "visible"} for title, points, _ in jobs
    ]  # fmt: skip
    results = {"score": 0.0, "tests": tests}
    write_json(out, results)
    for test, (_, points, job) in zip(tests, jobs, strict=True):
        try:
            share, test["output"] = job()
        except Exception as error:  # of the grader: the other questions are graded
            share, test["output"] = 0.0, f"The grader failed ({type(error).__name__}): tell us."
        test["score"] = round(points * share, 2)
        results["score"] = round(sum(test["score"] for test in tests), 2)
        write_json(out, results)
    return results


def grade_question(question: Question, submitted: dict[str, str]) -> tuple[float, str]:
    """-> share of the points, feedback."""
    text = submitted.get(question.file)
    if text is None:
        return 0.0, f"{question.file} is missing."
    if question.regions and untouched(text, question.regions):
        return 0.0, "Not done yet."
    if question.regions:
        source, complaints = regions.graft(reference()[question.file], text, question.regions)
        results = run(question, {question.file: source})
    else:  # a task of the student's own: everything submitted is put beside the project
        source, complaints, results = None, [], run(question, submitted)
    done = [
        sum(f is None for f in cases.values()) / max(1, len(cases)) for cases in results.values()
    ]
    share = sum(done) / len(done)
    lines = [f"{question.file}: {complaint}." for complaint in complaints]
    lines.append(f"{sum(x == 1 for x in done)} of {len(done)} tests passed.")
    for ((_, test), cases), passed in zip(results.items(), done, strict=True):
        if passed < 1:
            of = f" ({round(passed * len(cases))} of {len(cases)} cases passed)" * (len(cases) > 1)
            kind = f"{test.split('::')[1]}: " if test in question.public else ""
            lines.append(f"- {kind}{docstrings()[test.split('[')[0]]}{of}")
            notes = {f[1:] for f in cases.values() if f and f.startswith("!")}
            lines += [f"  Your code: {note}" for note in sorted(notes)[:2]]
    failures = [f for cases in results.values() for f in cases.values() if f]
    hangs = any(f == "no result" or "it ran for" in f for f in failures)  # and would, once more
    named = source and share < 1 and not hangs
    mistakes = known_mistakes(question, source, results) if named else []
    for mistake in mistakes:
        lines.append(f'This looks like a known mistake ("{mistake}"). {HINTS.get(mistake, "")}')
    if mistakes and share > 0.5:
        share = 0.5
        lines.append("A question with a known mistake in it gets half of its points at most.")
    return share, "\n".join(lines)


def untouched(text: str, names: list[str]) -> bool:
    try:
        return all(regions.is_stub(text, name) for name in names)
    except (LookupError, SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def run(
    question: Question, files: dict[str, str], seed: int = HIDDEN_SEED, public: bool = True
) -> dict:
    """Public tests with seed 0, hidden ones with another."""
    sessions = [(0, question.public)] * public + [(seed, question.hidden)] * bool(question.hidden)
    return sandbox.run_tests(reference() | files, question.file, sessions, sandbox.QUESTION_SECONDS)


def known_mistakes(question: Question, source: str, results: dict) -> list[str]:
    """The names of the wrong versions that behave like the student's functions.

    Functions are compared by recorded calls, paragraphs of a function by how the tests fail.
    """
    functions, found = {}, []
    right, _ = regions.graft(
        reference()[question.file], reference()[question.file], question.regions
    )
    for region in question.regions:
        for name, text in wrong_versions(question.file, region).items():
            if " " in region:
                seen = {test: cases for test, cases in results.items() if test[0] == HIDDEN_SEED}
                failed = any(f for cases in seen.values() for f in cases.values())
                found += [name] if failed and fingerprint(question, name, text) == seen else []
            else:
                functions[name], _ = regions.graft(
                    reference()[question.file], text, question.regions
                )
    if functions:
        files, tests = reference() | {question.file: right}, question.public + question.hidden
        tests = list(dict.fromkeys(tests))
        found += sandbox.replay(
            files, question.file, tests, source, functions, sandbox.QUESTION_SECONDS
        )
    return found[:3] if functions else found[:1]


FINGERPRINTS: dict[str, dict] = {}  # of wrong versions, for the next submission


def fingerprint(question: Question, name: str, text: str) -> dict:
    """How the hidden tests of a question fail on a wrong version."""
    if name not in FINGERPRINTS:
        source, _ = regions.graft(reference()[question.file], text, question.regions)
        FINGERPRINTS[name] = run(question, {question.file: source}, public=False)
    return FINGERPRINTS[name]


def read_answers(text: str | None) -> dict:
    try:
        answers = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return answers if isinstance(answers, dict) else {}


def grade_answer(name: str, student: str, answers: dict, key: str) -> tuple[float, str]:
    """A number, compared with the reference's for this student's numbers."""
    answer = answers.get(key)
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        return 0.0, f"answers.json has no number under {key!r}."
    numbers = written.numbers(name, key, student)
    ((right,),) = sandbox.limited(lambda send: send([ANSWERS[name][key](numbers)]), {}, 60)
    try:
        close = math.isclose(answer, right, rel_tol=TOLERANCE, abs_tol=1e-9)
    except OverflowError:  # an integer of 400 digits
        close = False
    return float(close), "Right." if close else "Not right, for your numbers."


# --------------------------------------------------------------------------------------------------
# Many submissions
# --------------------------------------------------------------------------------------------------


def grade_many(name: str, folder: Path, out: Path) -> None:
    """grades.csv, and a results file per student beside it. Raises UserError."""
    students = sorted(path for path in folder.iterdir() if path.is_dir())
    if not students:
        raise UserError(f"{folder}: no folder in it; one per student is expected")
    assignment, rows = ASSIGNMENTS[name], {}
    keys = [*assignment.questions, *assignment.written]
    if out.exists():
        with out.open(encoding="utf-8", newline="") as file:
            rows = {row["student"]: row for row in csv.DictReader(file) if row.get("student")}
    details = out.with_suffix("")
    details.mkdir(parents=True, exist_ok=True)
    for path in tqdm(students, unit="submission"):
        try:
            digest = digest_of(name, path)
            if path.name in rows and rows[path.name].get("hash") == digest:
                continue
            results = grade(name, path, path.name, details / f"{path.name}.json")
            scores = dict(zip(keys, (test["score"] for test in results["tests"]), strict=True))
            row = {"score": results["score"], **scores, "hash": digest, "error": ""}
        except Exception as error:  # one that fails does not stop the rest, and is tried again
            row = {"error": f"{type(error).__name__}: {error}"[:200]}
        rows[path.name] = {"student": path.name} | row
        with out.with_suffix(".new").open("w", encoding="utf-8", newline="") as file:
            columns = ["student", "score", *keys, "hash", "error"]
            table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(rows[student] for student in sorted(rows))
        out.with_suffix(".new").replace(out)


def digest_of(name: str, folder: Path) -> str:
    """Of a submission, and of all that grades it."""
    parts = [name, *sorted(reference().items()), *sorted(HINTS.items())]
    parts += [path.read_text(encoding="utf-8") for path in sorted(TEXTS.glob("*.py"))]
    parts += sorted(read_submission(ASSIGNMENTS[name], folder).items())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def write_json(path: Path, results: dict) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    new.replace(path)


# --------------------------------------------------------------------------------------------------
# Does the grader work?
# --------------------------------------------------------------------------------------------------


def check(name: str) -> bool:
    """Grade the reference, an untouched handout, and every known mistake; print what comes out."""
    good = True
    for key, question in ASSIGNMENTS[name].questions.items():
        if not question.regions:
            continue
        file, start = question.file, time.perf_counter()
        share, _ = grade_question(question, reference())
        seconds = time.perf_counter() - start
        stub = regions.stub(reference()[file], dict.fromkeys(question.regions, key))
        empty, _ = grade_question(question, {file: stub})
        seeds = [
            seed for seed in (0, 2, 3)
            if any(f for cases in run(question, {}, seed).values() for f in cases.values())
        ]  # fmt: skip
        good &= share == 1 and empty == 0 and not seeds
        print(f"{name} {key}: reference {share:.0%} in {seconds:.1f} s, empty {empty:.0%}", end="")
        print(f", FAILS with seeds {seeds}" if seeds else "", flush=True)
        for region in question.regions:
            for mistake, text in wrong_versions(file, region).items():
                start = time.perf_counter()
                share, output = grade_question(question, {file: text})
                told = [other for other, hint in HINTS.items() if hint in output]
                verdict = "named" if mistake in told else f"named {told}" if told else "NO NAME"
                if share == 1:
                    verdict = f"exempt: {EXEMPT[mistake]}" if mistake in EXEMPT else "FULL MARKS"
                    good &= mistake in EXEMPT
                seconds = time.perf_counter() - start
                print(f"    {share:4.0%}  {seconds:4.1f} s  {mistake}: {verdict}", flush=True)
    return good


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser("course.py", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True, parser_class=common.Parser)
    commands.add_parser("list", help="the assignments, their questions and points")
    parse = {
        command: commands.add_parser(command, help=text)
        for command, text in (
            ("make", "a handout"), ("grade", "grade submissions"), ("check", "grade the mistakes"),
        )
    }  # fmt: skip
    for sub in parse.values():
        sub.add_argument("assignment", choices=ASSIGNMENTS, metavar="A1..A6")
    parse["make"].add_argument("out", type=Path, help="a folder, new or empty")
    parse["make"].add_argument("--gradescope", type=Path, metavar="DIR", help="for autograder.zip")
    parse["grade"].add_argument("submission", type=Path, help="a folder; or a folder of them")
    parse["grade"].add_argument("--student", help="the id that the written questions depend on")
    parse["grade"].add_argument("--out", type=Path, required=True, help="results.json, or a .csv")
    args = parser.parse_args(argv)
    if args.command == "list":
        for name, a in ASSIGNMENTS.items():
            print(f"{name}  {a.title}")
            for key, q in a.questions.items():
                print(f"    {key}  {q.points:3}  {q.title}")
            for key, points in a.written.items():
                print(f"    {key}  {points:3}  written")
    elif args.command == "make":
        make(args.assignment, args.out)
        print(f"see {args.out / args.assignment}.md")
        if args.gradescope:
            make_gradescope(args.assignment, args.gradescope)
            print(f"zip the contents of {args.gradescope} for Gradescope")
    elif args.command == "check":
        sandbox.warm_up()
        return 0 if check(args.assignment) else 1
    elif not args.submission.is_dir():
        raise UserError(f"{args.submission} is not a folder")
    elif args.out.suffix == ".csv":
        if args.student:
            raise UserError("--student does nothing with a .csv: the folders are named by the ids")
        sandbox.warm_up()
        grade_many(args.assignment, args.submission, args.out)
    else:
        if not args.student and ASSIGNMENTS[args.assignment].written:
            raise UserError("--student ID is needed: the written questions depend on it")
        sandbox.warm_up()
        results = grade(args.assignment, args.submission, args.student or "", args.out)
        print(f"{args.submission}: {results['score']:g} points; see {args.out}")
    return 0


if __name__ == "__main__":
    with common.plain_errors("course.py"):
        sys.exit(main())
