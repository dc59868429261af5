"""Mathematics: GSM8K and MATH for training, and the five test sets of the GPG paper (table 1).

Each file is downloaded once, or put by hand into ~/.cache/policy-gradients/<task>/ as train.jsonl
or test.jsonl; math500 is the test of math.
"""

from fractions import Fraction
from http.client import HTTPException
from pathlib import Path

import torch

from .base import UserError, cache_dir
from .jsonl import JSONLines, Problem, json_lines
from .verifier import as_number, extract_answer, fold, is_correct

# No address here could be tried where this was written; the files' columns and MATH's checksum are
# those of the published files.
QWEN = "https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math/main/evaluation/data"
MATH = "https://media.githubusercontent.com/media/openai/prm800k/main/prm800k/math_splits"
GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
URLS = {
    ("gsm8k", "train"): f"{GSM8K}/train.jsonl",  # 7,473 problems
    ("gsm8k", "test"): f"{GSM8K}/test.jsonl",  # 1,319
    ("math", "train"): f"{MATH}/train.jsonl",  # 12,000, of which levels 3 to 5 are used
    ("math", "test"): f"{MATH}/test.jsonl",  # 500: MATH-500
    ("aime24", "test"): f"{QWEN}/aime24/test.jsonl",  # 30
    ("amc23", "test"): f"{QWEN}/amc23/test.jsonl",  # 40
    ("minerva", "test"): f"{QWEN}/minerva_math/test.jsonl",  # 272
    ("olympiadbench", "test"): f"{QWEN}/olympiadbench/test.jsonl",  # 675
}
SHA256 = {  # where it is known
    ("math", "train"): "90d96daeac3fe343ebb1e22ce93dd99690f75983e957f88de42f87cffe1e8076",
}
INSTRUCTION = "\nReason step by step, then write the final answer as \\boxed{answer}."


class Maths(JSONLines):
    """Problems with one answer, which the verifier judges. Raises UserError for a test set that is
    asked for its training split."""

    def __init__(self, split: str = "train", name: str = "math"):
        if split == "train" and name not in ("gsm8k", "math"):
            raise UserError(f"{name} is a test set, not to be trained on: use --eval-task {name}")
        path = download("math" if name == "math500" else name, split)
        levels = "345" if (name, split) == ("math", "train") else ""
        super().__init__(read_problems(path, levels), split)

    def reward(self, completion, answer):
        answer, _, error = answer.partition(" ± ")
        if is_correct(completion, answer):
            return 1.0
        found, gold = (as_number(fold(x or "")) for x in (extract_answer(completion), answer))
        return float(error != "" and found is not None and abs(found - gold) <= Fraction(error))


def download(folder: str, split: str) -> Path:
    """The file of a split in the cache, downloaded if it is not there. Raises UserError."""
    path, url = cache_dir() / folder / f"{split}.jsonl", URLS[folder, split]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # It writes beside the path, compares the checksum, then renames.
            sha256 = SHA256.get((folder, split))
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the checksum
            raise UserError(
                f"{url} could not be downloaded ({error}): put it into {path.parent} as {path.name}"
            ) from error
    return path


def read_problems(path: Path, levels: str) -> list[Problem]:
    """The problems of a file; with `levels`, only those of these. Raises UserError.

    The files name the problem `problem` or `question`, after a `context`; the answer `answer` or
    `final_answer`, else it is in the box of the `solution`. A tolerance under `error` becomes a
    part of the answer: "4.2 ± 1e-1".
    """
    records = []
    for where, record in json_lines(path):
        if levels and str(record.get("level"))[-1:] not in levels:  # 3 or "Level 3"
            continue
        problem = record.get("problem", record.get("question"))
        answer = record.get("answer", record.get("final_answer"))
        if answer is None and "\\boxed" in str(record.get("solution")):
            answer = record["solution"]  # `problem` takes the box
        if isinstance(answer, list):
            answer = ", ".join(map(str, answer))
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)  # AMC's 27.0
        if not isinstance(problem, str) or type(answer) not in (str, int, float) or answer == "":
            raise UserError(
                f"{where}: needs a problem, and an answer or a solution with a \\boxed{{}}"
            )
        if record.get("context"):
            problem = f"{record['context']}\n{problem}"
        if record.get("error"):
            answer = f"{answer} ± {record['error']}"
        records.append(Problem(problem + INSTRUCTION, str(answer), where))
    if not records:
        raise UserError(f"{path}: no problem of level {', '.join(levels)}")
    return records
