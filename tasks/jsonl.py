"""Problems from a JSONL file, and GSM8K."""

from __future__ import annotations

import functools
import json
import math
import random
import re
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

import gymnasium
import torch

from .base import PROBLEMS_PER_SEED, AnyImage, AnyText, TextTask, UserError, cache_dir
from .pictures import DATA_URI, read_image
from .verifier import gold_answer, is_correct


class JSONLines(TextTask):
    """A file of JSON objects, one per line: `prompt` (or `question`), `answer` and, where a prompt
    has an image, `image`: its path, relative to the file. Images are read when they are needed.

    Every tenth prompt is held out, beginning with the first. A file with a single prompt has it in
    both splits. Training reshuffles for every pass; the test keeps the order of the file.
    """

    instruction = ""

    def __init__(self, path: Path, split: str = "train"):
        super().__init__(split)
        self.records = self.choose(read_records(path))  # [(prompt, answer)]
        self.size = len(self.records)
        if any(isinstance(prompt, dict) for prompt, _ in self.records):
            self.observation_space = gymnasium.spaces.Dict(image=AnyImage(), text=AnyText())

    def choose(self, records: list) -> list:
        is_test, mask = self.split == "test", held_out_mask([prompt for prompt, _ in records])
        chosen = [r for r, held_out in zip(records, mask, strict=True) if held_out == is_test]
        return chosen or records

    def record(self, index: int) -> tuple[str | dict, str]:
        if self.split == "test":
            return self.records[index % self.size]
        # Passes count from where a run starts, so that the first one is whole, too.
        place = index % PROBLEMS_PER_SEED % self.size
        return self.records[shuffled(self.size, seed=index - place)[place]]

    def problem(self, index):
        question, answer = self.record(index)
        answer = gold_answer(answer)
        if isinstance(question, dict):
            image = read_image(question["image"], question["where"])
            return {"image": image, "text": question["text"] + self.instruction}, answer
        return question + self.instruction, answer

    def reward(self, completion, answer):
        return float(is_correct(completion, answer))

    def demonstration(self, index):
        return re.sub(r"<<.*?>>", "", self.record(index)[1])  # without GSM8K's calculator notes


class GSM8K(JSONLines):
    """Grade-school maths (Cobbe et al. 2021, arXiv 2110.14168), downloaded once from its authors.

    Without a network, put train.jsonl and test.jsonl into ~/.cache/policy-gradients/gsm8k.
    """

    url = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
    instruction = "\nReason step by step, then write the final answer as \\boxed{answer}."

    def __init__(self, split: str = "train"):
        path = download("gsm8k", f"{split}.jsonl", f"{self.url}/{split}.jsonl")
        super().__init__(path, split)

    def choose(self, records):
        return records  # the authors' own split


def download(folder: str, name: str, url: str, sha256: str | None = None) -> Path:
    """The file `name` of a folder of the cache, downloaded if it is not there. Raises UserError."""
    path = cache_dir() / folder / name
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # It writes beside the path, compares the checksum, then renames.
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the checksum
            raise UserError(
                f"{url} could not be downloaded ({error}): put it into {path.parent} as {name}"
            ) from error
    return path


@functools.lru_cache(maxsize=8)
def shuffled(n: int, seed: int) -> list[int]:
    """The numbers 0 to n - 1 in a random order."""
    return random.Random(seed).sample(range(n), n)


def held_out_mask(prompts: list) -> list[bool]:
    """True for every tenth prompt. Records with equal prompts are never on both sides."""
    numbers = {}  # of the distinct prompts
    keys = [(p["text"], p["image"]) if isinstance(p, dict) else p for p in prompts]
    return [numbers.setdefault(key, len(numbers)) % 10 == 0 for key in keys]


def json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Every record of a JSONL file, after "file, line n" for error messages.

    Raises UserError for a file without records and for a line that is not a JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # -sig: a BOM is fine
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: no records in it")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()  # reject lone surrogates
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not a JSON object ({error})") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object")
        yield where, record


def with_image(record: dict, prompt: str, path: Path, where: str) -> str | dict:
    """The prompt of a record of the file `path`: a text, or {"image": path or data URI, "text",
    "where"}."""
    image = record.get("image")
    if record.get("images") is not None:
        raise UserError(f"{where}: needs one path under 'image'; 'images' is not read")
    if image is None:
        return prompt
    if not isinstance(image, str) or not image:
        raise UserError(f"{where}: needs the path of a picture under 'image'")
    if not image.startswith(DATA_URI):
        image = str((Path(path).parent / image).resolve())
    return {"image": image, "text": prompt, "where": where}


def read_records(path: Path) -> list[tuple[str | dict, str]]:
    """A JSONL file as [(prompt, answer)]. Raises UserError with the number of a bad line."""
    records = []
    for where, record in json_lines(path):
        prompt, answer = record.get("prompt"), record.get("answer")  # null counts as absent
        if prompt is None:
            prompt = record.get("question")
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{where}: needs a text under 'prompt' or 'question'")
        if type(answer) not in (str, int, float) or not str(answer).strip():
            raise UserError(f"{where}: needs a text or a number under 'answer'")
        if isinstance(answer, float) and not math.isfinite(answer):
            raise UserError(f"{where}: needs a finite number under 'answer'")
        records.append((with_image(record, prompt, path, where), str(answer)))
    return records
