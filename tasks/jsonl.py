"""Files of problems, one JSON object per line."""

import functools
import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .base import PROBLEMS_PER_SEED, TextTask, UserError
from .pictures import DATA_URI, read_image
from .verifier import gold_answer, is_correct


@dataclass
class Problem:
    """A line of a file."""

    prompt: str | list | dict  # see `read_prompt`
    answer: str
    where: str  # file and line, for error messages


class JSONLines(TextTask):
    """The problems of a file. Training reshuffles for every pass; the test keeps their order.

    Pictures are read when they are needed.
    """

    def __init__(self, records: list[Problem], split: str = "train"):
        super().__init__(split)
        self.records, self.size = records, len(records)

    def record(self, index: int) -> Problem:
        if self.split == "test":
            return self.records[index % self.size]
        # Passes count from where a run starts, so that the first one is whole, too.
        place = index % PROBLEMS_PER_SEED % self.size
        return self.records[shuffled(self.size, seed=index - place)[place]]

    def problem(self, index):
        record = self.record(index)
        prompt, answer = record.prompt, gold_answer(record.answer)
        if isinstance(prompt, dict):
            prompt = prompt | {"image": read_image(prompt["image"], record.where)}
        return prompt, answer

    def reward(self, completion, answer):
        return float(is_correct(completion, answer))

    def demonstration(self, index):
        return re.sub(r"<<.*?>>", "", self.record(index).answer)  # no calculator notes of GSM8K


@functools.lru_cache(maxsize=8)
def shuffled(n: int, seed: int) -> list[int]:
    """The numbers 0 to n - 1 in a random order."""
    return random.Random(seed).sample(range(n), n)


def read_records(path: Path) -> list[Problem]:
    """The problems of a file: each line has a prompt (see `read_prompt`) and an `answer`. Raises
    UserError with the number of a bad line."""
    records = []
    for where, line in json_lines(path):
        prompt, answer = read_prompt(line, path, where), line.get("answer")
        is_number = type(answer) in (int, float) and abs(answer) < math.inf  # False for NaN
        if not is_number and not (isinstance(answer, str) and answer.strip()):
            raise UserError(f"{where}: needs a text or a finite number under 'answer'")
        records.append(Problem(prompt, str(answer), where))
    return records


def choose(records: list[Problem], split: str) -> list[Problem]:
    """The records of the split "train" or "test". Every tenth prompt is held out, beginning with
    the first; a file with a single prompt has it in both splits."""
    mask = held_out_mask([record.prompt for record in records])
    pairs = zip(records, mask, strict=True)
    return [record for record, held_out in pairs if held_out == (split == "test")] or records


def held_out_mask(prompts: list) -> list[bool]:
    """True for every tenth prompt. Records with equal prompts are never on both sides."""
    numbers = {}  # of the distinct prompts
    keys = [json.dumps(prompt) for prompt in prompts]
    return [numbers.setdefault(key, len(numbers)) % 10 == 0 for key in keys]


def json_lines(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Every record of a JSONL file, after "file, line n" for error messages. A field that is null
    counts as absent.

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
        yield where, {name: value for name, value in record.items() if value is not None}


def read_prompt(line: dict, path: str | Path, where: str) -> str | list[dict] | dict:
    """The prompt of a line: a text under `prompt` or `question`, or messages under `prompt` or
    `messages`: a list of {"role", "content"}.

    With a picture, its path (relative to the file) or data URI under `image`, or in a list under
    `images`, the prompt is {"image", "text"}; the mark <image> is dropped from the text.
    """
    images = line.get("images", [line.get("image")])
    several = not isinstance(images, list) or len(images) != 1
    if several or ("image" in line and "images" in line):
        raise UserError(f"{where}: needs one picture, under 'image' or in a list in 'images'")
    image = images[0]
    prompt = next((line[x] for x in ("prompt", "question", "messages") if x in line), None)
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
    return {"image": image, "text": prompt.replace("<image>", "").strip()}


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
