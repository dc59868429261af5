"""The public tests: every check of every question. `python -m pytest -k Q3` runs those of Q3."""

import importlib
import json
from pathlib import Path

import probe
import pytest

HERE = Path(__file__).resolve().parent
GIVEN = json.loads((HERE / "expected.json").read_text())
QUESTIONS = importlib.import_module(GIVEN["assignment"].lower()).QUESTIONS
CASES = [(key, i) for key, question in QUESTIONS.items() for i in range(len(question.cases(0)))]


@pytest.mark.parametrize("key, i", CASES, ids=[f"{key}-{i + 1}" for key, i in CASES])
def test_question(key, i):
    module = importlib.import_module(QUESTIONS[key].file.removesuffix(".py").replace("/", "."))
    case, right = QUESTIONS[key].cases(0)[i], GIVEN["values"][key][i]
    got = probe.outcome(case, module)
    if not probe.agree(got, right, case.tolerance):
        pytest.fail(f"{case.label}\n{probe.difference(got, right, case.tolerance)}", pytrace=False)
