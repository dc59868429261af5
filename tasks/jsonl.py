"""Problems from a JSONL file, and GSM8K."""

from __future__ import annotations

import functools
import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gymnasium.spaces import Dict

from .base import PROBLEMS_PER_SEED, AnyImage, AnyMessages, AnyText, TextTask, UserError, cache_dir
from .pictures import DATA_URI, read_image
from .verifier import extract_answer, is_correct


@dataclass
class Problem:
    """A line of a file."""

    prompt: str | list | dict  # see `read_prompt`
    answer: str
    where: str  # file and line, for error messages


class JSONLines(TextTask):
    """A file of JSON objects, one per line, with a prompt (see `read_prompt`) and an `answer`.

    Every tenth prompt is held out, beginning with the first; a file with a single prompt has it in
    both splits. whole=True: no prompt is held out, all are in this split. Training reshuffles for
    every pass; the test keeps the order of the file. Pictures are read when they are needed.
    """

    instruction = ""

    def __init__(self, path: Path, split: str = "train", whole: bool = False):
        super().__init__(split)
        records = read_records(path)
        self.records = records if whole else self.choose(records)
        self.size = len(self.records)
        first = self.records[0].prompt
        if isinstance(first, dict):
            self.observation_space = Dict(image=AnyImage(), text=AnyText())
        elif isinstance(first, list):
            self.observation_space = AnyMessages()

    def choose(self, records: list[Problem]) -> list[Problem]:
        is_test, mask = self.split == "test", held_out_mask([r.prompt for r in records])
        chosen = [r for r, held_out in zip(records, mask, strict=True) if held_out == is_test]
        return chosen or records

    def record(self, index: int) -> Problem:
        if self.split == "test":
            return self.records[index % self.size]
        # Passes count from where a run starts, so that the first one is whole, too.
        place = index % PROBLEMS_PER_SEED % self.size
        return self.records[shuffled(self.size, seed=index - place)[place]]

    def problem(self, index):
        record = self.record(index)
        prompt, answer = record.prompt, record.answer
        answer = extract_answer(answer) if "####" in answer else answer
        if isinstance(prompt, dict):
            return {
                "image": read_image(prompt["image"], record.where),
                "text": prompt["text"],
            }, answer
        return prompt + self.instruction if self.instruction else prompt, answer

    def reward(self, completion, answer):
        return float(is_correct(completion, answer))

    def demonstration(self, index):
        return re.sub(r"<<.*?>>", "", self.record(index).answer)  # no calculator notes of GSM8K


class GSM8K(JSONLines):
    """Grade-school maths (Cobbe et al. 2021, arXiv 2110.14168), downloaded once from its authors.

    Without a network, put train.jsonl and test.jsonl into ~/.cache/policy-gradients/gsm8k.
    """

    url = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
    instruction = "\nReason step by step, then write the final answer as \\boxed{answer}."

    def __init__(self, split: str = "train"):
        path = cache_dir() / "gsm8k" / f"{split}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(f"{self.url}/{split}.jsonl", str(path))
            except OSError as error:
                raise UserError(
                    f"GSM8K could not be downloaded ({error}): put its train.jsonl and test.jsonl "
                    f"into {path.parent}"
                ) from error
        super().__init__(path, split)

    def choose(self, records):
        return records  # the authors' own split


@functools.lru_cache(maxsize=8)
def shuffled(n: int, seed: int) -> list[int]:
    """The numbers 0 to n - 1 in a random order."""
    return random.Random(seed).sample(range(n), n)


def held_out_mask(prompts: list) -> list[bool]:
    """True for every tenth prompt. Records with equal prompts are never on both sides."""
    numbers = {}  # of the distinct prompts
    keys = [json.dumps(p["text"] + p["image"] if isinstance(p, dict) else p) for p in prompts]
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


def read_records(path: Path) -> list[Problem]:
    """The problems of a JSONL file. Raises UserError with the number of a bad line."""
    records = []
    for where, line in json_lines(path):
        prompt, answer = read_prompt(line, path, where), line.get("answer")
        if type(answer) not in (str, int, float) or not str(answer).strip():
            raise UserError(f"{where}: needs a text or a number under 'answer'")
        if isinstance(answer, float) and not math.isfinite(answer):
            raise UserError(f"{where}: needs a finite number under 'answer'")
        records.append(Problem(prompt, str(answer), where))
    return records


def read_prompt(line: dict, path: Path, where: str) -> str | list[dict] | dict:
    """The prompt of a line: a text under `prompt` or `question`, or messages under `prompt` or
    `messages`: a list of {"role", "content"}. null counts as absent.

    With a picture, its path (relative to the file) or data URI under `image`, or in a list under
    `images`, the prompt is {"image", "text", "where"}; the mark <image> is dropped from the text.
    """
    image, images = line.get("image"), line.get("images")
    if images is not None:
        if image is not None or not isinstance(images, list) or len(images) != 1:
            raise UserError(f"{where}: needs one picture, under 'image' or in a list in 'images'")
        image = images[0]
    found = [line[x] for x in ("prompt", "question", "messages") if line.get(x) is not None]
    prompt = found[0] if found else None
    if isinstance(prompt, list):
        prompt = read_messages(prompt, where, has_picture=image is not None)
        if prompt[-1]["role"] == "assistant":
            raise UserError(f"{where}: its messages end with an answer, not with a question")
        if image is not None and len(prompt) == 1:
            prompt = prompt[0]["content"]
    elif not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: needs a text under 'prompt' or 'question', or 'messages'")
    if image is None:
        return prompt
    if not isinstance(image, str) or not image:
        raise UserError(f"{where}: needs the path of a picture, not {image!r:.40}")
    if not isinstance(prompt, str):
        raise UserError(f"{where}: needs one text beside its picture, not {len(prompt)} messages")
    if not image.startswith(DATA_URI):
        image = str((Path(path).parent / image).resolve())
    return {"image": image, "text": prompt.replace("<image>", "").strip(), "where": where}


def read_messages(messages: list, where: str, has_picture: bool = False) -> list[dict]:
    """Chat messages, each {"role": text, "content": text}. The content may be a list of parts
    {"type": "text", "text": text}, which become one text, and {"type": "image"} for a picture."""
    turns = []
    for turn in messages:
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, list):
            parts = [x for x in content if not (has_picture and x == {"type": "image"})]
            if all(isinstance(x, dict) and isinstance(x.get("text"), str) for x in parts):
                content = "".join(x["text"] for x in parts)
        if not isinstance(content, str) or not isinstance(turn.get("role"), str):
            raise UserError(f"{where}: not a message with a role and a text: {turn!r:.60}")
        turns.append({"role": turn["role"], "content": content})
    if not turns:
        raise UserError(f"{where}: needs at least one message")
    return turns
