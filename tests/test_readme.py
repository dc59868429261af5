"""What the README says is what the code does."""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import MUTATIONS

import bandit_toy
import common
import copg
import gpg
import grpo
from tasks import tiny

ROOT = Path(__file__).resolve().parent.parent
README, PAGES = ROOT / "README.md", sorted((ROOT / "extras").glob("*.md"))
TEXT = README.read_text(encoding="utf-8")
ALL = "\n".join([TEXT, *(page.read_text(encoding="utf-8") for page in PAGES)])
MODULES = {"gpg": gpg, "grpo": grpo, "copg": copg, "bandit_toy": bandit_toy}
TABLE = re.compile(r"\| in the paper \| in `(\w+)\.py` \| the line \|\n\|[-|]+\|\n((?:\|.*\n)+)")
ROW = re.compile(r"\| (.*?) \| `(\w+)` \| `(.*)` \|")
ROWS = [
    (m, *ROW.fullmatch(r).groups())
    for m, rows in TABLE.findall(TEXT)
    for r in rows.split("\n")[:-1]
]

# What the papers say under these numbers: GPG version 4, GRPO (DeepSeekMath), CoPG version 1.
GPG = {5: "the loss", 6: "the advantage", 7: "alpha", 8: "the scaled loss"}
GPG |= {"Algorithm 1": "the (threshold|batch)"}
GRPO = {3: "the ratio|the clipped|the KL inside the loss|1 / length", 4: "the estimate of the KL"}
GRPO |= {"section 4.1.2": "the advantage", "Algorithm 1": "mu updates"}
COPG = {1: "the regularised reward|h of", 2: "the objective J", 26: "the reward model"}
COPG |= dict.fromkeys((5, 6), "importance sampling") | dict.fromkeys((7, 8, 9, 10, 17), "the loss")
COPG |= dict.fromkeys(range(12, 17), "the expected") | dict.fromkeys((18, 19), "the gradient")
COPG |= dict.fromkeys((21, 22), "IPO") | dict.fromkeys((23, 24), "policy gradient with a baseline")
COPG |= {29: "the optimal policy"} | dict.fromkeys((65, 66), "RLOO")
COPG |= {"property 1": "policy gradient", "property 2": "RLOO", "property 3": "IPO"}
COPG |= {"theorem 1": "the (loss|optim)"}  # the minimum of the loss is the optimal policy
PAPERS = {"gpg": GPG, "grpo": GRPO, "copg": COPG, "bandit_toy": COPG}


def test_there_is_a_table_for_each_file():
    assert {module for module, *_ in ROWS} == MODULES.keys() and len(ROWS) > 20


@pytest.mark.parametrize("module, paper, function, line", ROWS, ids=lambda x: x[:30])
def test_the_equation_tables_quote_the_code(module, paper, function, line):
    code = inspect.getsource(getattr(MODULES[module], function)).splitlines()
    assert line in [text.split("  #")[0].strip() for text in code]
    numbers = re.match(r"eq\. \d+(-\d+)?( and \d+)?", paper)
    numbers = re.findall(r"(\d+)(?:-(\d+))?", numbers[0]) if numbers else []
    places = [n for a, b in numbers for n in range(int(a), int(b or a) + 1)]
    places += re.findall(r"Algorithm \d|theorem \d|property \d|section 4\.1\.2", paper)
    said = re.sub(r"^(eq\. \d+(-\d+)?( and \d+)?|Algorithm \d|section [\d.]+), ?", "", paper)
    for place in places:
        assert re.match(PAPERS[module][place], said), f"{place} is {PAPERS[module][place]}"


TESTS = re.search(r"\| in the paper \| the test that holds it \|\n\|[-|]+\|\n((?:\|.*\n)+)", TEXT)[
    1
]
PLACE = re.compile(r"(theorem \d|property \d|eq\. (\d+)-(\d+)), ")


@pytest.mark.parametrize("row", TESTS.splitlines(), ids=lambda row: row[2:12])
def test_what_the_paper_proves_has_a_test(row):
    paper, test = re.fullmatch(r"\| (.*?) \| `(test_\w+)` \|", row).groups()
    tests = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    assert sum(f"\ndef {test}(" in text for text in tests) == 1
    place = PLACE.match(paper)
    first, last = place[2], place[3]
    for number in range(int(first), int(last) + 1) if first else [place[1]]:
        assert re.match(COPG[number], paper[place.end() :]), f"{number} is {COPG[number]}"


def test_every_column_is_explained():
    table = TEXT.split("| column | meaning |")[1].split("\n\n")[0]
    cells = " ".join(row.split(" | ")[0] for row in table.split("\n")[2:])
    columns = {name for module in (gpg, grpo, copg) for name in module.COLUMNS.split()}
    assert set(re.findall(r"`([a-z]\w*)`", cells)) == columns


def test_every_wrong_version_can_be_made():
    assert f"makes {len(MUTATIONS)} wrong versions" in TEXT
    for name, file, right, _, tests in MUTATIONS:
        assert (ROOT / file).read_text(encoding="utf-8").count(right) == 1, name
        assert all((ROOT / f"tests/test_{test}.py").exists() for test in tests.split()), name


def test_every_flag_exists(capsys):
    def flags(text):
        return set(re.findall(r"--[a-z][a-z-]+", text))

    helps = {}
    for name, module in MODULES.items():
        with pytest.raises(SystemExit):
            getattr(module, "parse_args" if name != "bandit_toy" else "main")(["--help"])
        helps[f"{name}.py"] = flags(capsys.readouterr().out)
    commands = re.findall(r"python ((?:extras/|tests/)?\w+\.py)([^\n`]*)", ALL)
    assert {script for script, _ in commands} >= helps.keys()
    for script, rest in commands:
        assert (ROOT / script).exists(), script
        if flags(rest) and script not in helps:
            result = subprocess.run(
                [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True
            )
            helps[script] = flags(result.stdout)
        assert flags(rest) <= helps.get(script, set()), (script, rest)
    mentioned = flags(" ".join(re.findall(r"`--[^`]*`", TEXT)))
    assert len(mentioned) > 8 and mentioned <= set.union(*helps.values())


def test_the_task_of_the_readme_works_as_pasted(tmp_path, monkeypatch):
    """With a warm-start of two steps: the example is to run, not to learn."""
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    (example,) = (block for block in blocks if "gymnasium.register" in block)
    (tmp_path / "my_tasks.py").write_text(example)
    name, rest = re.search(r"python gpg\.py --task (my_tasks:\S+)(.*)", TEXT).groups()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_tasks", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(tiny.WARM_START, "steps", 2)
    args = ["--task", name, *rest.split(), "--steps", "1", "--eval-problems", "4"]
    run = gpg.train(gpg.parse_args(args))
    assert (run.checkpoint / "model.safetensors").exists()
    task = common.make_task(name, "test").unwrapped
    assert task.split == "test"
    right = [task.demonstration(i) == task.problem(i)[1] for i in range(400)]
    assert 0.3 < sum(right) / 400 < 0.8  # demonstrations with slips leave room to learn


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_pictures_and_links_exist(page):
    text = page.read_text(encoding="utf-8")
    for link, place in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if not link.startswith("https://"):
            there = page.parent / link if link else page
            assert there.exists(), link
            heads = re.findall(r"^#+ (.*)$", there.read_text(), re.M) if place else []
            places = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert not place or place in places, place
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    for picture in pictures:
        assert (page.parent / picture).resolve().parent == ROOT / ".assets"
        if shutil.which("git"):  # 0: git ignores it, so that it would never be committed
            command = ["git", "check-ignore", "-q", (page.parent / picture).resolve()]
            assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode != 0
    assert bool(pictures) == (page.name in ("README.md", "RESULTS.md"))
    assert "@@" not in text  # a placeholder
