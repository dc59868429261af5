"""From a task's prompt to the token ids that a model reads.

A prompt is a text, a list of messages {"role", "content"}, or {"image", "text"}.
"""

import math
from collections.abc import Callable

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .base import UserError
from .pictures import expand_image_tokens, read_pictures


def prompt_text(prompt: str | list | dict) -> str:
    """The prompt as one text, to show it."""
    text = prompt["text"] if isinstance(prompt, dict) else prompt
    if isinstance(text, str):
        return text
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)


def as_messages(prompt: str | list | dict) -> list[dict]:
    """The prompt as a chat. A picture is one placeholder, before the text."""
    if isinstance(prompt, list):
        return prompt
    content = prompt
    if isinstance(prompt, dict):
        content = [{"type": "image"}, {"type": "text", "text": prompt["text"]}]
    return [{"role": "user", "content": content}]


def encode_prompts(
    model, tokenizer, prompts: list, new_tokens: int | list[int]
) -> tuple[Tensor, Tensor, list]:
    """prompt_ids and prompt_mask [B, P], through the chat template if there is one, and the
    pictures [B]. new_tokens: the length of the longest completion, of each prompt or of all.
    Raises UserError if a prompt and its completion do not fit the model."""
    pictures = read_pictures(tokenizer, prompts)  # None for a prompt without one
    texts = render_prompts(prompts, model, tokenizer)
    # A template writes its own special tokens; adding them again would give a second BOS.
    before = [] if tokenizer.chat_template else tokens_before_a_text(tokenizer)
    rows = [before + row for row in tokenizer(texts, add_special_tokens=False).input_ids]
    rows = expand_image_tokens(rows, pictures, model, tokenizer)
    check_token_ids(model, rows, [prompt_text(p) for p in prompts], new_tokens)
    return *pad(rows, "left", model.device), pictures


def tokens_before_a_text(tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a text, such as a BOS. Those that it puts
    after one, such as an EOS, have no place in a prompt, which is to be continued."""
    special, plain = tokenizer("1").input_ids, tokenizer("1", add_special_tokens=False).input_ids
    starts = (i for i in range(len(special)) if special[i : i + len(plain)] == plain)
    return special[: next(starts, 0)]


def check_token_ids(model, rows: list[list[int]], texts: list[str], new_tokens) -> None:
    """Raises UserError for a row that is empty, outside the vocabulary, or beyond the context."""
    if isinstance(new_tokens, int):
        new_tokens = [new_tokens] * len(rows)
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or math.inf
    V = model.get_input_embeddings().weight.shape[0]
    for row, text, n in zip(rows, texts, new_tokens, strict=True):
        if not row or max(row) >= V:
            problem = f"token {max(row)} in a vocabulary of {V}" if row else "no token"
            raise UserError(f"the tokenizer does not fit the model: {text!r:.60} gives {problem}")
        if len(row) + n > context:
            raise UserError(
                f"{text!r:.60} has {len(row)} tokens, which with {n} more exceed the "
                f"model's context of {context}: shorten it or lower --max-new-tokens"
            )


def without_misfits(records: list, encode: Callable[[list], object]) -> list:
    """The records that `encode` takes, each judged by itself. Prints a line about the others;
    raises UserError if none is left."""
    kept, misfits, reasons = [], [], []
    for i in range(0, len(records), 64):
        part = records[i : i + 64]
        try:
            encode(part)
            kept += part
        except UserError:  # which of them?
            for record in part:
                try:
                    encode([record])
                    kept.append(record)
                except UserError as error:
                    misfits.append(record.where)
                    reasons.append(f"{record.where}: {error}")
    if misfits and not kept:
        raise UserError(f"no record is left: {reasons[0]}")
    if misfits:
        kind = misfits[0].split()[-2]  # "line" of a file, or "problem"
        names = ", ".join(where.split()[-1] for where in misfits[:10])
        names += ", ..." if len(misfits) > 10 else ""
        print(f"{len(misfits)} of {len(records)} records left out: {kind}s {names}; {reasons[0]}")
    return kept


def leave_out_misfits(model, tokenizer, max_new_tokens: int, *tasks) -> None:
    """Drop the problems of a file whose prompts the model cannot read. Raises UserError if none is
    left."""

    def encode(records: list):
        encode_prompts(model, tokenizer, [record.prompt for record in records], max_new_tokens)

    for env in tasks:
        task = env.unwrapped
        if hasattr(task, "records"):
            task.records = without_misfits(task.records, encode)
            task.size = len(task.records)


def pad(rows: list[list[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists -> ids [N, L] and mask [N, L], padded on this side."""
    ids = pad_sequence([torch.tensor(row) for row in rows], True, padding_side=side)
    mask = pad_sequence([torch.ones(len(row)) for row in rows], True, padding_side=side)
    return ids.to(device), mask.bool().to(device)


def render_prompts(prompts: list, model, tokenizer) -> list[str]:
    """The text of each prompt, through the chat template if the tokenizer has one. Raises UserError
    if the template refuses a prompt."""
    if not tokenizer.chat_template:
        return [plain_text(prompt, model, tokenizer) for prompt in prompts]
    chats, system = [as_messages(prompt) for prompt in prompts], getattr(tokenizer, "system", None)
    if system is not None:
        if any(turns[0]["role"] == "system" for turns in chats):
            raise UserError("a prompt has a system turn of its own: leave out --system")
        chats = [[{"role": "system", "content": system}, *turns] for turns in chats]
    try:
        return tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise UserError(f"the model's chat template refuses a prompt: {error}") from error


def set_system(model, tokenizer, system: str) -> None:
    """Put this system turn before every prompt. Raises UserError if there is no place for it."""
    tokenizer.system = system
    if not tokenizer.chat_template:
        raise UserError("--system needs a chat template, and this model has none")
    try:
        (text,) = render_prompts(["1"], model, tokenizer)
    except UserError as error:
        raise UserError(f"--system: {error}") from error
    if system.strip() not in text:
        raise UserError("--system: the model's chat template leaves the system turn out")


def plain_text(prompt: str | list | dict, model, tokenizer) -> str:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list):
        raise UserError("a prompt is a list of messages, which needs a chat template")
    config = model.config
    ids = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    return "".join(tokenizer.convert_ids_to_tokens(ids)) + prompt["text"]


def end_of_answer(tokenizer) -> int | None:
    """The token that ends an answer: what the chat template writes after one, else the EOS."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "ANSWER"}]
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False)
        except TemplateError:  # a template without assistant turns
            return tokenizer.eos_token_id
        _, answer, rest = text.rpartition("ANSWER")
        added = tokenizer.added_tokens_decoder
        for token in tokenizer(rest if answer else "", add_special_tokens=False).input_ids:
            if token in added and added[token].special:
                return token
    return tokenizer.eos_token_id


def stop_token_ids(model, tokenizer) -> list[int]:
    """The ids that end a completion: every EOS of the generation config, the tokenizer's, what the
    chat template writes after an answer, and the image token, which must never be sampled."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    ids = [*ids, tokenizer.eos_token_id, end_of_answer(tokenizer)]
    ids.append(getattr(model.config, "image_token_id", None))
    return sorted({i for i in ids if i is not None})
