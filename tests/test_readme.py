"""What the README says is what the code does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bandit_toy
import common
import copg
import gpg
import grpo

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "section, module, rows",
    [
        ("## The paper in the code", gpg, 7),
        ("## GRPO, the baseline", grpo, 8),
        ("## CoPG on a bandit", bandit_toy, 8),
        ("### The paper in `copg.py`", copg, 6),
    ],
)
def test_the_equation_tables_quote_the_code(section, module, rows):
    code = Path(module.__file__).read_text(encoding="utf-8").splitlines()
    code = [line.split("  #")[0].strip() for line in code]
    table = README.split(section)[1].split("| in the paper |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) == rows
    for row in table:
        function, line = re.search(r"\| `(\w+)`.*\| `(.*)` \|$", row).groups()
        assert hasattr(module, function) and line in code


def test_every_column_is_explained():
    table = README.split("## What each metric means")[1].split("\n\n**")[0]
    others = {"rounds", "kl", "clip_share", "ratio_mean", "ratio_min", "ratio_max"}
    assert set(re.findall(r"`([a-z_]+)`", table)) >= {*common.COLUMNS, *others}


def test_every_flag_in_the_readme_exists():
    def flags(text):
        return set(re.findall(r"--[a-z][a-z-]+", text))

    helps = {}
    scripts = ["gpg.py", "grpo.py", "copg.py", "bandit_toy.py"]
    for script in [*scripts, "tests/compare.py", "tests/benchmark.py"]:
        command = [sys.executable, script, "--help"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        helps[script] = flags(result.stdout)
        commands = re.findall(rf"python {script}[^\n`]*", README)
        assert commands and flags(" ".join(commands)) <= helps[script]
    mentioned = flags(" ".join(re.findall(r"`--[^`]*`", README)))
    assert len(mentioned) > 8 and mentioned <= set.union(*helps.values())


def test_the_task_of_the_readme_works_as_pasted(tmp_path, monkeypatch):
    """With a warm-start of two steps: the example is to run, not to learn."""
    example = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "Reverse" in b)
    (tmp_path / "my_tasks.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(common, "WARM_START", common.WARM_START | {"steps": 2})
    command = re.search(r"python gpg\.py (--task my_tasks:.*)", README)[1].split()
    gpg.train(gpg.parse_args([*command, "--steps", "1", "--eval-problems", "4"]))
    assert (tmp_path / "runs" / "reverse" / "checkpoint" / "model.safetensors").exists()
    task = common.make_task("my_tasks:Reverse-v0", "test")
    assert task.unwrapped.split == "test"
    right = [task.unwrapped.demonstration(i) == task.unwrapped.problem(i)[1] for i in range(400)]
    assert sum(right) / 400 == pytest.approx(0.55, abs=0.1)


def test_no_placeholder_is_left():
    assert "@@" not in README
