"""Scored completions: what copg.py learns from, read from a file and written to one."""

import json
from dataclasses import dataclass
from pathlib import Path

from .base import TextTask, UserError
from .jsonl import held_out_mask, json_lines, read_messages, read_prompt
from .pictures import data_uri

LARGEST = 1e15  # a number whose square is far from the largest float32


@dataclass
class Record:
    """A prompt with G completions of it."""

    prompt: str | list | dict
    completions: list[str]
    rewards: list[float] | None = None  # G
    ends: list[int] | None = None  # G, the EOS of each completion, -1 if it was truncated
    ref_logprobs: list[float] | None = None  # G, ln pi_ref of whole completions
    held_out: bool = False
    where: str = ""  # file and line, for error messages


def read_records(path: str | Path) -> list[Record]:
    """A JSONL file of {"prompt", "completions": [G texts], "rewards": [G numbers]}, the rewards
    optional, or of {"prompt", "chosen", "rejected"}. Raises UserError with the number of the line.

    Prompts are those of tasks/jsonl.py. A completion may be a text or a conversation: its last turn
    is the completion, and the turns before it are the prompt, which needs no field of its own then.
    A preference becomes R = 1/4 and -1/4, with which CoPG is IPO (property 3). Every tenth prompt
    is held out. `write_records` adds the fields `ends`, `ref_logprobs` and `held_out`.
    """
    lines, records = list(json_lines(path)), []
    fields = set(lines[0][1])  # of the first line
    for where, line in lines:
        for name in ("chosen", "rewards", "ends", "ref_logprobs", "held_out"):
            if (name in line) != (name in fields):
                raise UserError(f"{where}: {name!r} must be in every line or in none")
        if "chosen" in line:
            if "completions" in line or "rewards" in line:
                raise UserError(f"{where}: either 'chosen' and 'rejected', or 'completions'")
            line["completions"] = [line["chosen"], line.get("rejected")]
            line["rewards"] = [0.25, -0.25]
        completions = line.get("completions")
        if not isinstance(completions, list) or len(completions) < 2:
            raise UserError(f"{where}: needs two completions or more, or 'chosen' and 'rejected'")
        G = len(records[0].completions) if records else len(completions)
        if len(completions) != G:
            raise UserError(f"{where}: needs {G} completions, like the first line")
        kinds = {type(completion) for completion in completions}
        if kinds == {list}:
            context, completions = split_conversations(completions, line.get("prompt"), where)
            if context:
                line["prompt"] = context
        elif kinds != {str}:
            raise UserError(f"{where}: a completion is neither a text nor a list of messages")
        records.append(
            Record(
                prompt=read_prompt(line, path, where),
                completions=completions,
                rewards=numbers(line, "rewards", G, where),
                ends=numbers(line, "ends", G, where),
                ref_logprobs=numbers(line, "ref_logprobs", G, where),
                held_out=line.get("held_out"),
                where=where,
            )
        )
    if records[0].held_out is None:
        mask = held_out_mask([record.prompt for record in records])
        for record, held_out in zip(records, mask, strict=True):
            record.held_out = held_out
    return records


def split_conversations(
    completions: list[list], prompt, where: str
) -> tuple[list[dict], list[str]]:
    """Conversations -> the turns before their last one, and the texts of the last ones. A prompt
    beside them must be what they begin with, or one of its turns."""
    conversations = [read_messages(turns, where) for turns in completions]
    if any(turns[-1]["role"] != "assistant" for turns in conversations):
        raise UserError(f"{where}: a completion does not end with a turn of the assistant")
    context = conversations[0][:-1]
    if context and prompt not in (None, context, *(turn["content"] for turn in context)):
        raise UserError(f"{where}: its conversations do not begin with its prompt")
    if any(turns[:-1] != context for turns in conversations):
        raise UserError(f"{where}: its completions do not answer the same prompt")
    return context, [turns[-1]["content"] for turns in conversations]


def numbers(line: dict, name: str, G: int, where: str) -> list[float] | None:
    """One number for each completion, under `name`; None if the line has none."""
    values = line.get(name)
    if values is None:
        return None
    is_list = isinstance(values, list) and len(values) == G
    if not is_list or not all(type(x) in (int, float) and abs(x) <= LARGEST for x in values):
        raise UserError(
            f"{where}: needs a number for each completion, at most {LARGEST:g}, in {name!r}"
        )
    if name == "ends" and not all(type(x) is int and x >= -1 for x in values):
        raise UserError(f"{where}: needs token ids, or -1, in 'ends'")
    return values


def write_records(path: Path, records: list[Record]) -> None:
    """As a file that `read_records` reads."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            line = {name: x for name, x in vars(record).items() if name != "where"}
            if isinstance(record.prompt, dict):
                image = record.prompt["image"]  # a path or data URI, or an array
                image = image if isinstance(image, str) else data_uri(image)
                line |= {"prompt": record.prompt["text"], "image": image}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


class HeldOutPrompts(TextTask):
    """The held-out prompts of a file of records as a task. It defines no reward."""

    def __init__(self, records: list[Record]):
        super().__init__("test")
        self.records = [record for record in records if record.held_out]
        self.size = len(self.records)

    def problem(self, index):
        return self.records[index].prompt, ""
