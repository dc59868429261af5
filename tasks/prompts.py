"""From a task's prompt to the token ids that a model reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .base import UserError
from .pictures import expand_image_tokens, read_pictures


def prompt_text(prompt: str | dict) -> str:
    return prompt if isinstance(prompt, str) else prompt["text"]


def encode_prompts(
    model, tokenizer, prompts: list, max_new_tokens: int
) -> tuple[Tensor, Tensor, list]:
    """prompt_ids and prompt_mask [B, P], through the chat template if there is one, and the
    pictures [B]. Raises UserError if a prompt and its completion do not fit the model."""
    pictures = read_pictures(tokenizer, prompts)  # None for a prompt without one
    texts = render_prompts(prompts, model, tokenizer)
    # A template writes its own special tokens; adding them again would give a second BOS.
    rows = tokenizer(texts, add_special_tokens=not tokenizer.chat_template).input_ids
    rows = expand_image_tokens(rows, pictures, model, tokenizer)
    check_token_ids(model, rows, [prompt_text(p) for p in prompts], max_new_tokens)
    return *pad(rows, "left", model.device), pictures


def check_token_ids(model, rows: list[list[int]], texts: list[str], max_new_tokens: int) -> None:
    """Raises UserError for a row that is empty, outside the vocabulary, or beyond the context."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or math.inf
    V = model.get_input_embeddings().weight.shape[0]
    for row, text in zip(rows, texts, strict=True):
        if not row or max(row) >= V:
            problem = f"token {max(row)} in a vocabulary of {V}" if row else "no token"
            raise UserError(f"the tokenizer does not fit the model: {text!r:.60} gives {problem}")
        if len(row) + max_new_tokens > context:
            raise UserError(
                f"{text!r:.60} has {len(row)} tokens, which with {max_new_tokens} more exceed the "
                f"model's context of {context}: shorten it or lower --max-new-tokens"
            )


def pad(rows: list[list[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists -> ids [N, L] and mask [N, L], padded on this side."""
    ids = pad_sequence([torch.tensor(row) for row in rows], True, padding_side=side)
    mask = pad_sequence([torch.ones(len(row)) for row in rows], True, padding_side=side)
    return ids.to(device), mask.bool().to(device)


def render_prompts(prompts: list, model, tokenizer) -> list[str]:
    """The text of each prompt, through the chat template if the tokenizer has one.

    A picture is one placeholder, before the text.
    """
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": user_content(prompt)}] for prompt in prompts]
        return tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    return [plain_text(prompt, model, tokenizer) for prompt in prompts]


def user_content(prompt: str | dict) -> str | list[dict]:
    if isinstance(prompt, str):
        return prompt
    return [{"type": "image"}, {"type": "text", "text": prompt["text"]}]


def plain_text(prompt: str | dict, model, tokenizer) -> str:
    if isinstance(prompt, str):
        return prompt
    config = model.config
    ids = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    return "".join(tokenizer.convert_ids_to_tokens(ids)) + prompt["text"]


def end_of_answer(tokenizer) -> int | None:
    """The token that ends an answer: what the chat template writes after one, else the EOS."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "ANSWER"}]
        _, answer, rest = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("ANSWER")
        added = tokenizer.added_tokens_decoder
        for token in tokenizer(rest if answer else "", add_special_tokens=False).input_ids:
            if token in added and added[token].special:
                return token
    return tokenizer.eos_token_id
