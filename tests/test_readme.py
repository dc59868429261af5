"""What README.md and docs/ say is what the code does."""

import ast
import importlib
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mutations import MUTATIONS

from run import plain_errors
from tasks import make_task, tiny

ROOT = Path(__file__).resolve().parent.parent
README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
TEXTS = {page: page.read_text(encoding="utf-8") for page in (README, *DOCS)}
SCRIPTS = ("gpg", "grpo", "copg", "bandit_toy")

# What the papers say under these numbers: GPG version 4, GRPO (DeepSeekMath), CoPG version 1.
GPG = {5: "the loss|its denominator", 6: "the advantage", 7: "alpha", 8: "the loss"}
GPG |= {"section 3": "(a )?valid group", "algorithm 1": "the (samples|threshold|batch|log-probs)"}
GRPO = {3: "the ratio|the clipped|the KL inside the loss|1 / length", 4: "the estimate of the KL"}
GRPO |= {"section 4.1.2": "the advantage", "algorithm 1": "mu updates"}
COPG = {1: "the regularised reward|h of", 2: "the objective J", 26: "the reward model"}
COPG |= dict.fromkeys((5, 6), "importance sampling") | dict.fromkeys((7, 8, 9, 10, 17), "the loss")
COPG |= dict.fromkeys(range(12, 17), "the expected") | dict.fromkeys((18, 19), "the gradient")
COPG |= dict.fromkeys((21, 22), "IPO") | dict.fromkeys((23, 24), "policy gradient with a baseline")
COPG |= {29: "the optimal policy"} | dict.fromkeys((65, 66), "RLOO")
COPG |= {"property 1": "policy gradient", "property 2": "RLOO", "property 3": "IPO"}
COPG |= {"theorem 1": "the optimum"}
PAPERS = {"gpg.py": GPG, "grpo.py": GRPO, "copg.py": COPG, "bandit_toy.py": COPG}


def quotes() -> list[tuple]:
    """(page, place in the paper, script, function, line, is it there?) of every quoted line."""
    found = []
    for page, text in TEXTS.items():
        tables = re.findall(
            r"^\| in the paper \|.*\| in `(\w+\.py)` \|\n\|.*\n((?:\|.*\n)+)", text, re.M
        )
        for script, rows in tables:
            for place, line in re.findall(r"^\| (.*?) \|.*\| `([^`]+)` \|$", rows, re.M):
                found.append((page.name, place, script, None, line, True))
        place = None
        pattern = r"^###? ([^\n]*)$|^`(\w+)` in `(\w+\.py)`:\n\n```(python|diff)\n(.*?)```"
        for heading, function, script, kind, code in re.findall(pattern, text, re.M | re.S):
            place = heading or place
            for line in code.splitlines():
                wrong = kind == "diff" and line[0] == "+"
                line = line[1:] if kind == "diff" else line
                found.append((page.name, place, script, function, line, not wrong))
    return found


QUOTES = quotes()


def code_lines(script: str, function: str | None) -> list[str]:
    """The lines of a script, or of a function in it, without comments and indentation."""
    text = (ROOT / script).read_text(encoding="utf-8")
    if function:
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        (node,) = (node for node in nodes if node.name == function)
        text = ast.get_source_segment(text, node)
    return [line.split("  #")[0].strip() for line in text.splitlines()]


@pytest.mark.parametrize("page, place, script, function, line, right", QUOTES)
def test_quoted_lines_are_those_of_the_code(page, place, script, function, line, right):
    assert (line in code_lines(script, function)) == right


def test_every_guide_quotes_its_scripts():
    quoted = {(page, script) for page, _, script, *_ in QUOTES}
    assert quoted >= {("README.md", f"{x}.py") for x in ("gpg", "grpo", "copg")}
    assert quoted >= {("gpg.md", "gpg.py"), ("grpo.md", "grpo.py"), ("copg.md", "copg.py")}
    assert quoted >= {("copg.md", "bandit_toy.py"), ("mistakes.md", "common.py")}
    assert sum(page == "mistakes.md" for page, *_ in QUOTES) > 12


PLACES = [(place, script) for page, place, script, *_ in QUOTES if page != "mistakes.md"]
PROOFS = re.findall(r"^\| (.*?) \| `test_\w+` \|$", "\n".join(TEXTS.values()), re.M)
NUMBERED = (
    r"(eq\. \d+(?:-\d+)?(?: and \d+)?|algorithm 1|section [\d.]*\d|theorem 1|property \d)[,:] "
)


@pytest.mark.parametrize("place, script", PLACES + [(place, "copg.py") for place in PROOFS])
def test_the_numbers_are_those_of_the_papers(place, script):
    place = place[0].lower() + place[1:]
    numbered = re.match(NUMBERED, place)
    if not numbered:  # a section of ours
        assert not re.match("eq|algorithm|section|theorem|property", place)
        return
    numbers = re.findall(r"(\d+)(?:-(\d+))?", numbered[1]) if place.startswith("eq") else []
    for key in [n for a, b in numbers for n in range(int(a), int(b or a) + 1)] or [numbered[1]]:
        assert re.match(PAPERS[script][key], place[numbered.end() :]), PAPERS[script][key]


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page):
    files = [*ROOT.glob("tests/test_*.py"), *ROOT.glob("extras/tests/test_*.py")]
    tests = [file.read_text(encoding="utf-8") for file in files]
    for name in re.findall(r"`(test_\w+)`", TEXTS[page]):
        assert any(f"\ndef {name}(" in text for text in tests), name


def test_the_guides_name_tests():
    for page, least in {"gpg.md": 12, "grpo.md": 12, "copg.md": 20, "mistakes.md": 10}.items():
        assert len(re.findall("`test_", TEXTS[ROOT / "docs" / page])) >= least


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_formulas_survive_markdown(page):
    """Markdown takes \\{ for {, a bar in a table for the next cell, and _ after punctuation for the
    beginning of an emphasis."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", TEXTS[page], flags=re.S)
    pattern = r"\$\$([^$]+)\$\$|\$([^$\n]+)\$"
    for formula in map("".join, re.findall(pattern, text)):
        assert not re.search(r"\\[^A-Za-z]|[])}]_|\|", formula), formula
        assert formula.count("{") == formula.count("}"), formula
        assert formula.count(r"\left") == formula.count(r"\right"), formula
    assert "$" not in re.sub(pattern, "", text)


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 14_000


def test_line_counts():
    """To within ten lines, so that not every edit is one of the README."""
    rows = re.findall(r"^\| \[`(.*?)`\]\((.*?)\) \| ([\d,]+) \|", TEXTS[README], re.M)
    assert len(rows) >= 7
    for name, link, said in rows:
        files = sorted((ROOT / link).glob("*.py")) or [ROOT / link]
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        assert abs(lines - int(said.replace(",", ""))) <= 10, f"{name} has {lines} lines"


def test_the_metrics_that_matter_are_logged():
    table = TEXTS[README].split("| in `metrics.csv` |")[1].split("\n\n")[0]
    names = re.findall(r"^\| `(\w+)` \|", table, re.M)
    code = "".join((ROOT / f"{x}.py").read_text() for x in ("common", "gpg", "grpo"))
    assert len(names) == 8 and all(f'"{name}"' in code for name in names)


FLAGS = {
    "gpg": ["--prompts", "2", "--group-size", "2"],
    "grpo": ["--prompts", "2", "--group-size", "2"],
    "copg": ["--prompts", "2", "--online"],
}


@pytest.mark.parametrize("name", FLAGS)
def test_every_metric_is_explained(name, tmp_path, model_dirs):
    script = importlib.import_module(name)
    flags = [*FLAGS[name], "--model", str(model_dirs["qwen2"]), "--task", "add"]
    flags += ["--steps", "1", "--max-new-tokens", "4", "--eval-problems", "2"]
    script.train(script.parse_args([*flags, "--out", str(tmp_path / "run"), "--device", "cpu"]))
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    explained = re.findall(r"`([a-z]\w*)`", TEXTS[ROOT / "docs/metrics.md"])
    assert set(header.split(",")) <= set(explained)


def test_the_arithmetic_of_a_dead_group():
    """What mistakes.md says of eight times 0.1."""
    ((code, said),) = re.findall(
        r"```python\n(.*?)  # (-?[\d.]+), eight times\n", TEXTS[ROOT / "docs/mistakes.md"], re.S
    )
    names = {"torch": torch}
    *statements, expression = code.splitlines()
    exec("\n".join(statements), names)
    assert eval(expression, names).tolist() == pytest.approx([float(said)] * 8, abs=0.005)


def test_every_wrong_version_can_be_made():
    for name, file, right, _, tests in MUTATIONS:
        assert (ROOT / file).read_text(encoding="utf-8").count(right) == 1, name
        found = {
            p.stem for folder in ("tests", "extras/tests") for p in (ROOT / folder).glob("*.py")
        }
        assert {f"test_{test}" for test in tests.split()} <= found, name


def test_every_flag_exists(capsys, monkeypatch):
    def flags(text):
        return set(re.findall(r"--[a-z][a-z-]+", text))

    helps = {"extras/on_trl.py": None}  # it needs TRL even to list its flags
    monkeypatch.syspath_prepend(ROOT / "extras")
    pattern = r"python ((?:extras/|tests/)?\w+\.py)([^\n`]*)"
    commands = re.findall(pattern, "\n".join(TEXTS.values()))
    assert {script for script, _ in commands} >= {f"{name}.py" for name in SCRIPTS}
    for script, rest in commands:
        assert (ROOT / script).exists(), script
        if flags(rest) and script not in helps:
            monkeypatch.setattr(sys, "argv", [script, "--help"])
            with pytest.raises(SystemExit):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            helps[script] = flags(capsys.readouterr().out)
        assert helps.get(script, set()) is None or flags(rest) <= helps.get(script, set())
    pages = (README, *(ROOT / f"docs/{name}.md" for name in ("gpg", "grpo", "copg")))
    mentioned = flags(" ".join(x for page in pages for x in re.findall("`--[^`]*`", TEXTS[page])))
    assert len(mentioned) > 15 and mentioned <= set.union(*filter(None, helps.values()))


def test_the_task_of_the_readme_works_as_pasted(tmp_path, monkeypatch):
    """With a warm-start of two steps: the example is to run, not to learn."""
    blocks = re.findall(r"```python\n(.*?)```", TEXTS[README], re.S)
    (example,) = (block for block in blocks if "gymnasium.register" in block)
    (tmp_path / "my_tasks.py").write_text(example)
    name, rest = re.search(r"python gpg\.py --task (my_tasks:\S+)(.*)", TEXTS[README]).groups()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_tasks", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(tiny.WARM_START, "steps", 2)
    gpg = importlib.import_module("gpg")
    args = ["--task", name, *rest.split(), "--steps", "1", "--eval-problems", "4"]
    with plain_errors("gpg.py"):
        run = gpg.train(gpg.parse_args(args))
    assert (run.checkpoint / "model.safetensors").exists()
    task = make_task(name, "test").unwrapped
    assert task.split == "test"
    right = [task.demonstration(i) == task.problem(i)[1] for i in range(400)]
    assert 0.3 < sum(right) / 400 < 0.8  # demonstrations with slips leave room to learn


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_pictures_and_links_exist(page):
    text = TEXTS[page]
    for link, place in re.findall(r"\]\(([^)#\s]*)#?([^)]*)\)", text):
        if not link.startswith("https://"):
            there = page.parent / link if link else page
            assert there.exists(), link
            heads = re.findall(r"^#+ (.*)$", there.read_text(), re.M) if place else []
            places = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert not place or place in places, place
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        path = (page.parent / picture).resolve()
        assert path.parent == ROOT / "docs/figures"
        if shutil.which("git"):  # 0: git ignores it, so that it would never be committed
            command = ["git", "check-ignore", "-q", path]
            assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode != 0
    assert text.count("![") <= 2 or page != README
