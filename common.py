"""What the scripts share: sampling, log-probabilities, and the run directory.

No algorithm lives here. The symbols are the same in every file:

    B  prompts per step          P  prompt length, left-padded        V  vocabulary size
    G  completions per prompt    T  completion length, right-padded   H  hidden size
    N  = B * G rows, prompt-major: the G rows of a group are adjacent
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DynamicCache,
)
from transformers.cache_utils import DynamicLayer

from tasks import UserError, get_prompts, get_rewards, held_out, make_task
from tasks.pictures import (
    FAMILIES,
    chat_content,
    forward_inputs,
    insert_picture,
    picture_mark,
    prompt_text,
    read_pictures,
)
from tasks.tiny import tiny_model

# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """N completions and their prompts, prompt-major: the first G rows answer the first prompt."""

    prompt_ids: Tensor  # [N, P] left-padded
    prompt_mask: Tensor  # [N, P] bool
    completion_ids: Tensor  # [N, T] right-padded
    completion_mask: Tensor  # [N, T] bool, True where a token was sampled, its EOS included
    logprobs: Tensor  # [N, T] of each token when it was sampled; 0 where the mask is False
    truncated: Tensor  # [N] bool, True if max_new_tokens came before an EOS
    texts: list[str]  # N completions, without the EOS
    pictures: list | None = None  # N, of the prompts; one object for the rows of a group, or None

    def __post_init__(self):
        self.pictures = self.pictures or [None] * len(self.texts)
        self.prompt_mask = self.prompt_mask.bool()
        self.completion_mask = self.completion_mask.bool()

    def rows(self, index: Tensor) -> Rollout:
        """The rows `index` (indices or a mask, at least one), without the columns nobody uses."""
        index = torch.arange(len(self.texts), device=index.device)[index]
        P = int(self.prompt_mask[index].sum(1).amax())
        T = int(self.completion_mask[index].sum(1).amax())
        prompt = (x[index, -P:] for x in (self.prompt_ids, self.prompt_mask))
        completion = self.completion_ids, self.completion_mask, self.logprobs
        completion = (x[index, :T] for x in completion)
        texts = [self.texts[i] for i in index.tolist()]
        pictures = [self.pictures[i] for i in index.tolist()]
        return Rollout(*prompt, *completion, self.truncated[index], texts, pictures)

    @staticmethod
    def cat(rollouts: list[Rollout]) -> Rollout:
        """All rows of several rollouts, padded to the longest prompt and completion."""

        def padded(name: str, left: bool) -> Tensor:
            tensors = [getattr(rollout, name) for rollout in rollouts]
            L = max(x.shape[1] for x in tensors)
            room = ((L - x.shape[1], 0) if left else (0, L - x.shape[1]) for x in tensors)
            return torch.cat([F.pad(x, n) for x, n in zip(tensors, room, strict=True)])

        prompt = (padded(name, left=True) for name in ("prompt_ids", "prompt_mask"))
        completion = ("completion_ids", "completion_mask", "logprobs")
        completion = (padded(name, left=False) for name in completion)
        truncated = torch.cat([rollout.truncated for rollout in rollouts])
        texts = [text for rollout in rollouts for text in rollout.texts]
        pictures = [picture for rollout in rollouts for picture in rollout.pictures]
        return Rollout(*prompt, *completion, truncated, texts, pictures)


@torch.no_grad()
def sample(
    model,
    tokenizer,
    prompts: list,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> Rollout:
    """Sample G completions for each of B prompts. temperature=0 is greedy, with log-probs at 1.

    A prompt is read once, and its key-value cache is repeated for the G rows of its group. A row
    that has drawn an EOS leaves the batch. Raises UserError if a prompt does not fit the context.
    """
    G, T, device = group_size, max_new_tokens, model.device
    pictures = read_pictures(tokenizer, prompts)  # [B], None for a prompt without one
    prompt_ids, prompt_mask = encode_prompts(model, tokenizer, prompts, T, pictures)  # [B, P]
    prompt_positions = positions(prompt_mask, model, prompt_ids, pictures)  # [B, P] or [3, B, P]
    stop_ids = torch.tensor(stop_token_ids(model, tokenizer), dtype=torch.long, device=device)
    cache = DynamicCache(config=model.config)
    training = model.training
    model.eval()  # in train mode, which checkpointing needs, transformers drops the cache

    def next_logits(ids: Tensor, mask: Tensor, position: Tensor, **images) -> Tensor:  # [n, V]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position, **images}
        inputs |= {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        return model(**inputs).logits[:, -1]

    with autocast(device):  # once around all: it keeps its bf16 copies of the weights
        images = forward_inputs(pictures, device)
        logits = next_logits(prompt_ids, prompt_mask.long(), prompt_positions, **images)  # [B, V]
        repeat_cache(cache, G, room=T)
        logits = logits.repeat_interleave(G, 0)  # [N, V]
        prompt_ids = prompt_ids.repeat_interleave(G, 0)  # [N, P]
        prompt_mask = prompt_mask.repeat_interleave(G, 0)

        N, P = prompt_ids.shape
        ids = torch.zeros(N, T, dtype=torch.long, device=device)
        mask = torch.zeros(N, T, dtype=torch.bool, device=device)
        logprobs = torch.zeros(N, T, device=device)
        running = torch.arange(N, device=device)  # the rows without an EOS, in the cache's order
        seen = torch.cat([prompt_mask, torch.ones_like(mask)], 1).long()  # [N, P + T], no padding
        position = next_position(prompt_positions).repeat_interleave(G, 0)  # [N, 1], of a new token
        for t in range(T):
            tokens, token_logprobs = draw(logits, temperature)  # [n] for the n running rows
            ids[running, t], logprobs[running, t], mask[running, t] = tokens, token_logprobs, True
            alive = ~torch.isin(tokens, stop_ids)
            n = int(alive.sum())
            if n == 0 or t == T - 1:
                running = running[alive]
                break
            if n < len(running):  # the last rows take the places of those that ended
                keep = torch.arange(n, device=device)
                keep[~alive[:n]] = n + alive[n:].nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                running, tokens = running[keep], tokens[keep]
                seen, position = seen[keep], position[keep]
            logits = next_logits(tokens[:, None], seen[:, : P + t + 1], position + t)
    model.train(training)

    T = t + 1
    truncated = torch.zeros(N, dtype=torch.bool, device=device)
    truncated[running] = True
    lengths = (mask.sum(1) - (~truncated).long()).tolist()  # without the EOS
    texts = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    texts = tokenizer.batch_decode(texts, skip_special_tokens=True)
    return Rollout(
        prompt_ids, prompt_mask, ids[:, :T], mask[:, :T], logprobs[:, :T], truncated, texts,
        [picture for picture in pictures for _ in range(G)],
    )  # fmt: skip


def draw(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits [n, V] -> tokens [n] and their log-probs [n].

    There is no top-k and no top-p: the distribution that is sampled is the one that is scored.
    """
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # [n, V]
    if temperature == 0:
        tokens = logprobs.argmax(-1, keepdim=True)  # [n, 1]
    else:  # where a uniform number falls in the cumulative distribution; multinomial is slower
        cdf = logprobs.double().exp().cumsum(-1)  # [n, V]
        u = torch.rand(len(cdf), 1, dtype=cdf.dtype, device=cdf.device) * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, u, right=True).clamp(max=cdf.shape[1] - 1)  # [n, 1]
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def positions(mask: Tensor, model=None, ids: Tensor | None = None, pictures=()) -> Tensor:
    """mask [N, L] -> position ids [N, L]: 0, 1, 2, ... from the first real token on.

    With pictures, [3, N, L]: an image token has a time, a row and a column (M-RoPE of Qwen2-VL,
    arXiv 2409.12191, section 2.1), and the text goes on after the largest of them.
    """
    if not any(pictures):
        return (mask.long().cumsum(1) - 1).clamp(min=0)
    grids = torch.cat([p["image_grid_thw"] for p in pictures if p is not None]).to(ids.device)
    kinds = (ids == model.config.image_token_id).int()  # 1: of an image
    return model.base_model.get_rope_index(ids, kinds, grids, attention_mask=mask.long())[0]


def next_position(position: Tensor) -> Tensor:
    """position ids [N, L] or [3, N, L] -> [N, 1], of the next token."""
    position = position.amax(0) if position.ndim == 3 else position
    return position.amax(1, keepdim=True) + 1


class RoomyLayer(DynamicLayer):
    """The keys and values of one layer, repeated for each group, with room for new tokens.

    transformers copies the whole cache for every new token and every row that ends. Here a token
    is written in place, and only the rows that move are copied.
    """

    def __init__(self, layer: DynamicLayer, repeats: int, room: int):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.buffers = [  # [N, heads, P + room, d]; self.keys and self.values are views of them
            F.pad(x.repeat_interleave(repeats, 0), (0, 0, 0, room))
            for x in (layer.keys, layer.values)
        ]
        self.resize(len(self.buffers[0]), layer.keys.shape[2])

    def resize(self, n: int, L: int) -> None:
        self.keys, self.values = (x[:n, :, :L] for x in self.buffers)

    def update(self, keys, values, *args, **kwargs):
        n, _, L, _ = self.keys.shape
        self.resize(n, L + keys.shape[2])
        self.keys[:, :, L:], self.values[:, :, L:] = keys, values
        return self.keys, self.values

    def batch_select_indices(self, keep: Tensor) -> None:
        moved = (keep != torch.arange(len(keep), device=keep.device)).nonzero().squeeze(1)
        for x in (self.keys, self.values):
            x[moved] = x[keep[moved]]
        self.resize(len(keep), self.keys.shape[2])


def repeat_cache(cache: DynamicCache, repeats: int, room: int) -> None:
    """Repeat every row of the cache, with room for more tokens (not in sliding windows)."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[i] = RoomyLayer(layer, repeats, room)
        else:
            layer.batch_repeat_interleave(repeats)


def stop_token_ids(model, tokenizer) -> list[int]:
    """The ids that end a completion: every EOS of the generation config, the tokenizer's, and the
    image token, which would have no picture."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    ids = [*ids, tokenizer.eos_token_id, getattr(model.config, "image_token_id", None)]
    return sorted({i for i in ids if i is not None})


def encode_prompts(
    model, tokenizer, prompts: list, room: int, pictures: list | None = None
) -> tuple[Tensor, Tensor]:
    """-> prompt_ids and prompt_mask [B, P], through the chat template if the tokenizer has one.

    A picture has as many image tokens as the model makes vectors of it. Raises UserError if a
    prompt and `room` more tokens do not fit the model.
    """
    pictures = pictures or [None] * len(prompts)
    texts = [prompt_text(prompt) for prompt in prompts]
    if tokenizer.chat_template:
        contents = [chat_content(t, p) for t, p in zip(texts, pictures, strict=True)]
        chats = [[{"role": "user", "content": content}] for content in contents]
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    elif any(pictures):
        mark = picture_mark(tokenizer, model.config)
        texts = [mark * (p is not None) + t for t, p in zip(texts, pictures, strict=True)]
    # A template writes its own special tokens; adding them again would give a second BOS.
    rows = tokenizer(texts, add_special_tokens=not tokenizer.chat_template).input_ids
    if any(pictures):
        both = zip(rows, pictures, strict=True)
        rows = [insert_picture(tokenizer, row, model.config.image_token_id, p) for row, p in both]
    check_rows(model, [prompt_text(prompt) for prompt in prompts], rows, room)
    return pad(rows, "left", model.device)


def check_rows(model, texts: list[str], rows: list[list[int]], room: int = 0) -> None:
    """Raises UserError for a row that is empty, beyond the context, or outside the vocabulary."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or math.inf
    V = model.get_input_embeddings().weight.shape[0]
    for text, row in zip(texts, rows, strict=True):
        if not row or max(row) >= V:
            wrong = f"the token {max(row)} of a vocabulary of {V}" if row else "no token"
            raise UserError(f"the tokenizer does not fit the model: it gives {text!r:.60} {wrong}")
        if len(row) + room > context:
            raise UserError(
                f"{text!r:.60} has {len(row)} tokens, which with {room} more exceed the model's "
                f"context of {context}: shorten it or lower --max-new-tokens"
            )


def pad(rows: list[list[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists -> ids [N, L], mask [N, L], padded on this side."""
    ids = pad_sequence([torch.tensor(row) for row in rows], True, padding_side=side)
    mask = pad_sequence([torch.ones(len(row)) for row in rows], True, padding_side=side)
    return ids.to(device), mask.bool().to(device)


# --------------------------------------------------------------------------------------------------
# Log-probabilities
# --------------------------------------------------------------------------------------------------

LOGITS_AT_ONCE = 2**24  # in one chunk: 64 MiB in fp32


def completion_logprobs(model, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """log pi(token | everything before it) of each sampled token, [N, T], differentiable.

    It is 0 where the mask is False. The logits [N, T, V] never exist as a whole: only the hidden
    states that predict a sampled token go through the LM head, in chunks, and the backward pass
    computes each chunk again.
    """
    mask, targets = rollout.completion_mask, rollout.completion_ids[rollout.completion_mask]  # [n]
    head, head_alone = model.get_output_embeddings(), head_gives_logits(model)

    def score(states: Tensor, targets: Tensor) -> Tensor:  # [m, H] or logits [m, V], [m] -> [m]
        logits = head(states) if head_alone else states
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)

    with autocast(model.device):
        states = predicting_states(model, rollout, head_alone)[mask]  # [n, H] or [n, V]
        m = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        if len(targets) <= m:
            logprobs = score(states, targets)  # [n]
        else:
            chunks = zip(states.split(m), targets.split(m), strict=True)
            logprobs = torch.cat([checkpoint(score, *c, use_reentrant=False) for c in chunks])
    return torch.zeros_like(mask, dtype=logprobs.dtype).masked_scatter(mask, logprobs)


def predicting_states(model, rollout: Rollout, head_alone: bool) -> Tensor:
    """The hidden state that predicts each completion token, [N, T, H]. Without head_alone, its
    logits, [N, T, V].

    As in `sample`, a prompt is read once and its rows share its keys and values. In the backward
    pass their gradients meet there.
    """
    T = rollout.completion_ids.shape[1]
    mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1)  # [N, P + T]

    def states(ids, mask, position, keep, cache=None, pictures=()):  # of the last `keep` tokens
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": position}
        inputs |= forward_inputs(pictures, ids.device)
        inputs |= {"past_key_values": cache, "use_cache": cache is not None}
        if head_alone:
            return model.base_model(**inputs).last_hidden_state[:, -keep:]
        return model(**inputs, logits_to_keep=keep).logits

    marked = rollout.prompt_ids.masked_fill(~rollout.prompt_mask, -1)  # [N, P]
    completion_ids = rollout.completion_ids
    if any(rollout.pictures):  # the same prompt has the same picture, too
        numbers = {id(picture): i for i, picture in enumerate(rollout.pictures)}
        picture_of = [numbers[id(picture)] for picture in rollout.pictures]
        marked = torch.cat([marked, marked.new_tensor(picture_of)[:, None]], 1)
        sampled_image = completion_ids == model.config.image_token_id  # it has no picture
        completion_ids = completion_ids.masked_fill(sampled_image, 0)
    unique, prompt_of = marked.unique(dim=0, return_inverse=True)  # U of them, [N]
    N, U = len(mask), len(unique)
    row_of = prompt_of.new_full((U,), N)  # a row with each of the prompts
    row_of.scatter_reduce_(0, prompt_of, torch.arange(N, device=mask.device), "amin")
    prompt_ids, prompt_mask = rollout.prompt_ids[row_of], rollout.prompt_mask[row_of]  # [U, P]
    pictures = [rollout.pictures[i] for i in row_of.tolist()]
    position = positions(prompt_mask, model, prompt_ids, pictures)  # [U, P] or [3, U, P]
    # The position of each completion token, [N, T].
    later = next_position(position)[prompt_of] + positions(rollout.completion_mask)
    if U == N or T == 1 or model.training:  # nothing shared, or checkpointing
        ids = torch.cat([rollout.prompt_ids, completion_ids], 1)
        position = position[..., prompt_of, :]  # [N, P] or [3, N, P]
        position = torch.cat([position, later.expand(*position.shape[:-1], T)], -1)
        return states(ids, mask, position, T + 1, pictures=rollout.pictures)[:, :-1]
    cache = DynamicCache(config=model.config)
    first = states(prompt_ids, prompt_mask, position, 1, cache, pictures)  # [U, 1, H]
    cache.reorder_cache(prompt_of)  # by index_select: indexing adds gradients in any order
    rest = states(completion_ids[:, :-1], mask[:, :-1], later[:, :-1], T - 1, cache)  # [N, T-1, H]
    return torch.cat([first.index_select(0, prompt_of), rest], 1)


def head_gives_logits(model) -> bool:
    """Are the logits head(hidden state) and nothing more? Gemma 2 caps them, Granite scales them.

    Checked once per model, bit for bit: a cap hardly changes the small logits of a new model.
    """
    if not hasattr(model, "head_gives_logits"):
        with torch.no_grad():
            inputs = {"input_ids": torch.arange(4, device=model.device)[None], "use_cache": False}
            states = model.base_model(**inputs).last_hidden_state
            logits = model.get_output_embeddings()(states)
            model.head_gives_logits = torch.equal(logits, model(**inputs).logits)
    return model.head_gives_logits


@torch.no_grad()
def frozen_logprobs(model, rollout: Rollout, max_tokens: int, temperature: float = 1.0) -> Tensor:
    """completion_logprobs [N, T] of a reference model: no gradient, in micro-batches."""
    logprobs = torch.zeros_like(rollout.logprobs)
    for rows in micro_batches(rollout, max_tokens):
        values = completion_logprobs(model, rollout.rows(rows), temperature)  # [n, its longest]
        logprobs[rows, : values.shape[1]] = values.to(logprobs.dtype)
    return logprobs


def micro_batches(rollout: Rollout, max_tokens: int, together: int = 1) -> list[Tensor]:
    """Row indices in batches of similar length: rows x longest <= max_tokens, if possible.

    Blocks of `together` adjacent rows stay whole, for losses that compare completions.
    """
    lengths = rollout.prompt_mask.sum(1) + rollout.completion_mask.sum(1)  # [N]
    lengths = lengths.view(-1, together).amax(1).tolist()  # [N / together]
    batches = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches[-1] and (len(batches[-1]) + together) * lengths[i] > max_tokens:
            batches.append([])
        batches[-1] += range(i * together, (i + 1) * together)
    return [torch.tensor(batch, device=rollout.prompt_ids.device) for batch in batches]


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------


def autocast(device: torch.device):
    """bf16 arithmetic on CUDA. Weights stay fp32: in bf16 an update of 1e-6 rounds to nothing."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


def load_model(
    name: str,
    device: torch.device | str,
    task: gymnasium.Env | None = None,
    chat_template: bool = True,
    grad_checkpointing: bool = False,
):
    """-> (model, tokenizer): "tiny", a Hugging Face directory, or a Hugging Face id; fp32 weights.

    "tiny" is warm-started on the demonstrations of `task` ("add" if None). Raises UserError.
    """
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # every backend raises its own
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {device}: {reason:.200}; try cpu or cuda") from error
    transformers.utils.logging.disable_progress_bar()
    if name == "tiny":
        name = tiny_model(task or make_task("add"))
    try:
        config = AutoConfig.from_pretrained(name)
        # The policy that is scored must be the policy that was sampled: no dropout, ever.
        parts = [getattr(config, x, None) for x in ("text_config", "vision_config")]
        for part in [config, *filter(None, parts)]:
            for key, value in part.to_dict().items():
                if "drop" in key and isinstance(value, float):
                    setattr(part, key, 0.0)
        sees = config.model_type in FAMILIES
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model, info = auto.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"]:
            raise ValueError(f"its weights have no {min(info['missing_keys'])}")
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError("some of its weights are NaN or infinite")
        kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
        if kinds - {"DynamicLayer", "DynamicSlidingWindowLayer"}:  # only these can be repeated
            raise ValueError("some of its layers keep a recurrent state, which is not supported")
        model.to(device)
        tokenizer = AutoTokenizer.from_pretrained(name)
        if sees:  # the one of Pillow: torchvision is not needed
            tokenizer.image_processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        if not chat_template:
            tokenizer.chat_template = None
        encode_prompts(model, tokenizer, ["1"], room=0)  # do tokenizer and template work at all?
    except Exception as error:  # hub, parsers, file formats, devices: many reasons, one line
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: no causal language model loads from it: {reason:.300}") from error
    if grad_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(grad_checkpointing), tokenizer  # transformers checkpoints in train mode only


def evaluate(model, tokenizer, task: gymnasium.Env, args) -> dict[str, float]:
    """Held-out problems -> accuracy, greedy and pass_at_k, with the same random numbers each time.

    accuracy is the share solved at the training temperature, with its standard error over problems;
    greedy the share solved by the likeliest tokens; pass_at_k the share of problems that any of
    --eval-samples completions solves.
    """

    def solve(k: int, temperature: float) -> Tensor:  # [n, k]
        parts = []
        for problems in held_out(task, args.eval_problems, args.eval_first):
            prompts = get_prompts(task, problems)
            rollout = sample(model, tokenizer, prompts, k, args.max_new_tokens, temperature)
            parts.append(get_rewards(task, problems, rollout.texts)[1])
        return torch.cat(parts).double()

    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        sampled, greedy = solve(args.eval_samples, args.temperature), solve(1, 0.0)
    figures = mean_and_error("accuracy", sampled.mean(1))
    return figures | {"greedy": greedy.mean().item(), "pass_at_k": sampled.amax(1).mean().item()}


def mean_and_error(name: str, values: Tensor) -> dict[str, float]:
    """values [n] -> {name: mean, name_stderr: its standard error}."""
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else torch.tensor(math.nan)
    return {name: values.mean().item(), f"{name}_stderr": error.item()}


# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints as one-line errors."""

    def error(self, message):
        raise UserError(f"{message}; --help shows all flags")


def number(kind: type, low: float, high: float = 1e9) -> Callable:
    """An argparse type: an int or a float from low to high."""

    def parse(text: str):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse's own message names it
    return parse


count, positive, share = number(int, 1), number(float, 1e-12), number(float, 0, 1)


def add_run_flags(parser: Parser, tiny: dict, real: dict, eval_samples: int = 4) -> None:
    """The flags that concern the run, not the algorithm."""
    add, k = parser.add_argument_group("run").add_argument, eval_samples
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--out", help="directory of the run, new or empty (default: runs/<script>, -2, -3, ...)")
    add("--resume", metavar="DIR", help="continue the run in DIR; --steps and --device may change")
    for name, what in ("save_every", "checkpoints"), ("eval_every", "evaluations"):
        text = f"steps between {what} (default: {real[name]}; tiny: {tiny[name]})"
        add(f"--{name.replace('_', '-')}", type=count, help=text)
    add("--eval-problems", type=count, default=200, help="held-out problems (default: 200)")
    add("--eval-first", type=number(int, 0), default=0, help="number of the first, to choose flags "
        "on some problems and report on others (default: 0)")  # fmt: skip
    add("--eval-samples", type=count, default=k, help=f"completions of each (default: {k})")
    add("--device", default=device, help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--seed", type=number(int, 0, 10**6), default=0, help="of data and sampling (default: 0)")


def parse_flags(parser: Parser, argv: list[str] | None, defaults: Callable) -> argparse.Namespace:
    """The command line; defaults(args) gives the defaults that depend on other flags.

    --resume DIR parses the command line of that run again, with this one behind it: every flag goes
    through the same parser, and only --steps and --device may differ. Raises UserError.
    """
    argv = sys.argv[1:] if argv is None else argv
    given, config = parser.parse_args(argv), {}
    if "" in vars(given).values():
        raise UserError("an argument is empty; --help shows all flags")
    if given.resume:
        path = Path(given.resume) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            script, *command = shlex.split(config["command"])
            command += ["--steps", str(config["steps"])] if config["steps"] else []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--resume: {path} does not describe a run ({error!r:.100})") from error
        if script != parser.prog:
            raise UserError(f"--resume {given.resume}: that is a run of {script}")
        config["out"] = str(Path(given.resume))  # it may have been moved
        argv = [*command, "--out", config["out"], *argv]
    parser.set_defaults(**defaults(parser.parse_args(argv)))
    args = parser.parse_args(argv)
    names = (f"runs/{Path(parser.prog).stem}{i}" for i in ["", *range(-2, -1000, -1)])
    args.out = str(Path(args.out or next(name for name in names if not Path(name).exists())))
    args.command = config.get("command") or shlex.join([parser.prog, *argv])
    for flag, value in vars(args).items() if config else ():
        if flag not in ("resume", "steps", "device") and value != config.get(flag):
            raise UserError(
                f"--{flag.replace('_', '-')} {value} contradicts --resume {given.resume}, where it "
                f"is {config.get(flag)}"
            )
    if config and args.schedule == "cosine" and args.steps != config["steps"]:
        print(f"the cosine schedule now ends at step {args.steps}: the learning rate jumps")
    return args


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


class Run:
    """The directory of a run: config.json, metrics.csv, samples.jsonl, curves.png, checkpoint/.

    A script calls `begin` when its inputs are validated, loops over `steps`, and calls `log` in
    each. Evaluations and checkpoints happen between the steps.
    """

    def __init__(self, args: argparse.Namespace, columns: str):
        """Lock the directory, write nothing yet. Raises UserError if it is in use or not empty."""
        self.args, self.columns, self.dir = args, columns.split(), Path(args.resume or args.out)
        self.state = {"step": 0, "problem": 10**6 * (args.seed + 1), "tokens": 0, "seconds": 0.0}
        self.state |= {"before": {}, "after": {}, "warnings": {}, "bytes": {}}
        script = args.command.split()[0]
        self.how_to_resume = f"to continue: python {script} --resume {shlex.quote(str(self.dir))}"
        self.dir.mkdir(parents=True, exist_ok=True)
        directory = os.open(self.dir, os.O_RDONLY)
        self.unlock = weakref.finalize(self, os.close, directory)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.dir}: another process is training there") from error
        if not args.resume and any(self.dir.iterdir()):
            raise UserError(f"--out {self.dir} is not empty; name another, or --resume {self.dir}")
        self.checkpoint, old = self.dir / "checkpoint", self.dir / "checkpoint.old"
        if args.resume and old.exists() and not self.checkpoint.exists():
            old.rename(self.checkpoint)  # killed between the two renames of `save`
        self.resumed = bool(args.resume) and self.checkpoint.exists()  # else killed before step 0
        metrics = self.dir / "metrics.csv"
        lines = metrics.read_text(encoding="utf-8").count("\n") if metrics.exists() else 0
        if not self.resumed and lines > 2:  # more than the head and step 0
            raise UserError(f"{self.checkpoint} is gone; start another run with --out")
        self.weights = str(self.checkpoint) if self.resumed else None

    def begin(self, model, tokenizer, optimizer, evaluate: Callable[[], dict]) -> None:
        """Start the files, or restore optimizer and random states. evaluate() gives figures."""
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        self.evaluate = evaluate
        if self.resumed:
            try:
                saved = torch.load(self.checkpoint / "training_state.pt", "cpu", weights_only=True)
                self.state = {name: saved["state"][name] for name in self.state}
                optimizer.load_state_dict(saved["optimizer"])
                torch.set_rng_state(saved["rng"])
                torch.cuda.set_rng_state_all(saved["cuda_rng"][: torch.cuda.device_count()])
                for path, size in ((self.dir / x, n) for x, n in self.state["bytes"].items()):
                    if path.stat().st_size < size:
                        raise ValueError(f"{path.name} has been cut")
                    os.truncate(path, size)  # drop what came after the checkpoint
            except Exception as error:  # many ways to be damaged, one line
                raise UserError(f"{self.checkpoint} is damaged ({error!r:.200})") from error
        new = self.dir / "config.json.new"
        new.write_text(json.dumps(vars(self.args) | {"resume": None}, indent=2) + "\n")
        new.replace(self.dir / "config.json")
        mode = "a" if self.resumed else "w"
        self.metrics = (self.dir / "metrics.csv").open(mode, encoding="utf-8")
        self.samples = (self.dir / "samples.jsonl").open(mode, encoding="utf-8")
        self.writer = csv.DictWriter(self.metrics, self.columns, lineterminator="\n")
        if not self.resumed:
            self.writer.writeheader()

    def next_problems(self, n: int) -> list[int]:
        """The indices of the next n training problems."""
        self.state["problem"] += n
        return list(range(self.state["problem"] - n, self.state["problem"]))

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left of `total`, numbered from 1. Evaluates and saves in between."""
        args, state = self.args, self.state
        if state["step"] >= total:
            raise UserError(f"{self.dir}: all {total} steps are done; raise --steps")
        self.stopping, self.row, self.shown = False, {"step": 0}, []
        handlers = {s: signal.signal(s, self.stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tqdm(total=total, initial=state["step"], unit="step") as self.bar:
                if not self.resumed:
                    try:
                        self.end_step(evaluate=True, save=True)
                    except Exception:  # take away what this run has written, for another try
                        shutil.rmtree(self.dir / "checkpoint.new", ignore_errors=True)
                        for name in ("config.json", "metrics.csv", "samples.jsonl", "data.jsonl"):
                            (self.dir / name).unlink(missing_ok=True)
                        raise
                while state["step"] < total and not self.stopping:
                    self.row, self.start = {"step": state["step"] + 1}, time.perf_counter()
                    yield self.row["step"]
                    step = state["step"] = self.row["step"]
                    evaluate = step % args.eval_every == 0 or step == total
                    self.end_step(evaluate, save=step % args.save_every == 0 or step == total)
                    self.bar.update()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        self.finish(total)

    def stop(self, signum, frame) -> None:
        if self.stopping:
            raise KeyboardInterrupt(f"stopped; {self.how_to_resume}")
        self.stopping = True
        tqdm.write("\nfinishing this step, then saving; once more stops at once", file=sys.stderr)

    def warn(self, message: str) -> None:
        """Print it the 1st, 2nd, 4th, 8th, ... time, so that repeats do not bury the bar."""
        times = self.state["warnings"][message] = self.state["warnings"].get(message, 0) + 1
        if times & (times - 1) == 0:
            tqdm.write(f"step {self.row['step']}: {message} ({times} so far)", file=sys.stderr)

    def log(self, prompts=(), rollout: Rollout | None = None, rewards=None, **row: float) -> None:
        """Collect the step's row of metrics.csv; of a rollout and its rewards [groups, G], the
        statistics, and the first group for samples.jsonl."""
        self.row |= row | {"seconds": time.perf_counter() - self.start}
        self.state["seconds"] += self.row["seconds"]
        if rollout:
            tokens, cut = rollout.completion_mask.sum().item(), rollout.truncated.double().mean()
            self.state["tokens"] += tokens
            self.row["reward_mean"] = rewards.mean().item()
            self.row["reward_std"] = rewards.std(1).mean().item()  # within the groups
            # -log pi of tokens drawn from pi: an unbiased estimate of the entropy, for free
            self.row["entropy"] = -rollout.logprobs.sum().item() / tokens
            self.row["completion_length"] = tokens / len(rollout.texts)
            self.row["truncated_share"] = cut.item()
            self.row["tokens_per_second"] = tokens / self.row["seconds"]
            group = zip(rollout.texts, rewards[0].tolist(), strict=False)
            prompt = prompt_text(prompts[0])
            self.shown += [{"prompt": prompt, "completion": c, "reward": r} for c, r in group]
            if cut > 0.1:
                self.warn("over a tenth of the completions end at --max-new-tokens; raise it")
        shown = ("reward_mean", "valid_share", "alpha", "loss", "tokens_per_second")
        shown = {name: self.row[name] for name in shown if name in self.row}
        self.bar.set_postfix(shown, refresh=False)

    def end_step(self, evaluate: bool, save: bool) -> None:
        """Evaluate if due, write the step's row and samples, save if due."""
        step = self.row["step"]
        if evaluate:
            figures = self.state["after" if step else "before"] = self.evaluate()
            self.row |= {f"eval_{name}": value for name, value in figures.items()}
            tqdm.write(f"step {step}: {describe(figures)}", file=sys.stderr)
        self.writer.writerow({name: f"{value:.6g}" for name, value in self.row.items()})
        for sample in self.shown:
            self.samples.write(json.dumps({"step": step} | sample, ensure_ascii=False) + "\n")
        self.shown = []
        for file in (self.metrics, self.samples):
            file.flush()
            os.fsync(file.fileno())
            self.state["bytes"][Path(file.name).name] = file.tell()
        if save or self.stopping:
            self.save()

    def save(self) -> None:
        """checkpoint/: a Hugging Face directory, with the training state beside it.

        It is written under another name and renamed: at every instant `checkpoint` is whole or,
        between the two renames, `checkpoint.old`. Raises UserError if it cannot be written.
        """
        new, old = self.dir / "checkpoint.new", self.dir / "checkpoint.old"
        state = {"state": self.state, "optimizer": self.optimizer.state_dict()}
        state |= {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
        try:
            shutil.rmtree(new, ignore_errors=True)
            self.model.save_pretrained(new)
            self.tokenizer.save_pretrained(new)
            if hasattr(self.tokenizer, "image_processor"):
                self.tokenizer.image_processor.save_pretrained(new)
            torch.save(state, new / "training_state.pt")
            for path in new.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            if self.checkpoint.exists():
                shutil.rmtree(old, ignore_errors=True)
                self.checkpoint.rename(old)
            new.rename(self.checkpoint)
            shutil.rmtree(old, ignore_errors=True)
        except Exception as error:  # a full disk: OSError, RuntimeError or SafetensorError
            rest = f"; {self.how_to_resume}" if self.checkpoint.exists() else ""
            raise UserError(f"{new} could not be written ({error}){rest}") from error

    def finish(self, total: int) -> None:
        """Draw the curves and print the summary."""
        self.metrics.close()
        self.samples.close()
        self.unlock()
        draw_curves([self.dir], self.dir / "curves.png")
        state, peak = self.state, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        if self.model.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        missed = state["step"] % self.args.eval_every if state["step"] < total else 0
        stale = f"   (at step {state['step'] - missed})" if missed else ""
        lines = [
            f"\n{self.args.command}: {state['step']} of {total} steps",
            f"before   {describe(state['before'])}",
            *([f"after    {describe(state['after'])}{stale}"] if state["after"] else []),
            f"took     {state['seconds']:.0f} s, {peak / 2**30:.2f} GiB at the peak"
            + (f", {state['tokens']:,} sampled tokens" if state["tokens"] else ""),
            *(f"warning  {message}: {n} times" for message, n in state["warnings"].items()),
            f"look at  {self.dir}/curves.png, and read {self.dir}/samples.jsonl",
            f"model    {self.checkpoint}, a Hugging Face directory",
            *([self.how_to_resume] if state["step"] < total else []),
        ]
        print("\n  ".join(lines))


def describe(figures: dict[str, float]) -> str:
    """An evaluation as one line: every figure, with its standard error if there is one."""
    parts = []
    for name, value in figures.items():
        if not name.endswith("_stderr"):
            error = figures.get(f"{name}_stderr")
            parts.append(f"{name} {value:.3f}" + (f" +- {error:.3f}" if error is not None else ""))
    return "   ".join(parts)


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Linear warm-up to `peak`, then "constant", or "cosine" to 0. Steps count from 1."""
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (0.5 + 0.5 * math.cos(math.pi * progress) if schedule == "cosine" else 1.0)


def draw_curves(runs: list[Path], path: Path) -> None:
    """Every column of the runs' metrics.csv against the step."""
    import matplotlib.pyplot as plt  # slow to import

    plt.switch_backend("Agg")
    tables = [np.genfromtxt(run / "metrics.csv", delimiter=",", names=True) for run in runs]
    tables = [np.atleast_1d(table) for table in tables]
    names = dict.fromkeys(
        name
        for table in tables
        for name in table.dtype.names[1:]
        if not name.endswith("_stderr") and np.isfinite(table[name]).any()
    )
    rows = math.ceil(len(names) / 4)
    figure, axes = plt.subplots(
        rows, 4, figsize=(12, 2.2 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        for number, (run, table) in enumerate(zip(runs, tables, strict=True)):
            values = table[name] if name in table.dtype.names else np.full(len(table), np.nan)
            there, look = np.isfinite(values), ".-" if "eval" in name else "-"
            style = {"lw": 1, "color": f"C{number}", "label": str(run)}
            axis.plot(table["step"][there], values[there], look, **style)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
    if len(runs) > 1:
        figure.legend(handles=axes.flat[0].lines, loc="outside upper center")
    figure.savefig(path, dpi=80)
    plt.close(figure)


@contextlib.contextmanager
def plain_errors(script: str):
    """Errors the user can fix become one line on stderr and an exit status, not a traceback."""
    try:
        yield
        return
    except (UserError, OSError) as error:  # OSError: a full disk, a directory without permission
        line, status = error, 2
    except KeyboardInterrupt as error:
        line, status = str(error) or "stopped", 130
    except (RuntimeError, MemoryError) as error:
        if "non-finite" in str(error):  # clip_grad_norm_ says so before the optimizer sees it
            line = "the gradient is NaN or infinite, so training stops; a lower --lr may help, and "
            line, status = line + "--resume continues from the last checkpoint", 1
        elif re.search("out of memory|(allocate|enough) memory|memoryerror", repr(error), re.I):
            line = "out of memory: lower --micro-batch-tokens, --prompts or --max-new-tokens, or "
            line, status = line + "add --grad-checkpointing", 2
        else:
            raise
    print(f"{script}: {line}", file=sys.stderr)
    sys.exit(status)
