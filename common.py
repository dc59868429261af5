"""Sampling and log-probabilities. No algorithm lives here.

    B  prompts per step          P  prompt length, left-padded        V  vocabulary size
    G  completions per prompt    T  completion length, right-padded   H  hidden size
    N  = B * G rows, prompt-major: the G rows of a group are adjacent

Start with `sample` and `completion_logprobs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import accumulate

import gymnasium
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

from tasks import UserError, get_prompts, get_rewards, held_out, make_task, pictures
from tasks.prompts import encode_prompts, prompt_text, set_system, stop_token_ids
from tasks.tiny import tiny_model

# ---- Sampling ------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """N completions and their prompts. The rows of a group are adjacent."""

    prompt_ids: Tensor  # [N, P] left-padded
    prompt_mask: Tensor  # [N, P] bool
    completion_ids: Tensor  # [N, T] right-padded
    completion_mask: Tensor  # [N, T] bool, True for every sampled token, including the EOS
    logprobs: Tensor  # [N, T] of each token when it was sampled; 0 where the mask is False
    truncated: Tensor  # [N] bool, True if max_new_tokens came before an EOS
    texts: list[str]  # N completions, without the EOS
    group: Tensor | None = None  # [N], equal in the rows of a group; by default each is alone
    pictures: list | None = None  # N, the inputs that the prompt's picture adds, or None

    def __post_init__(self):
        self.prompt_mask = self.prompt_mask.bool()
        self.completion_mask = self.completion_mask.bool()
        if self.group is None:
            self.group = torch.arange(len(self.texts), device=self.prompt_ids.device)
        if self.pictures is None:
            self.pictures = [None] * len(self.texts)

    def select(self, index: Tensor) -> Rollout:
        """These rows (indices or a mask), without columns of padding alone."""
        index = torch.arange(len(self.texts), device=index.device)[index]
        P = max(self.prompt_mask[index].sum(1).tolist(), default=0)
        T = max(self.completion_mask[index].sum(1).tolist(), default=0)
        return Rollout(
            prompt_ids=self.prompt_ids[index, -P:],
            prompt_mask=self.prompt_mask[index, -P:],
            completion_ids=self.completion_ids[index, :T],
            completion_mask=self.completion_mask[index, :T],
            logprobs=self.logprobs[index, :T],
            truncated=self.truncated[index],
            texts=[self.texts[i] for i in index.tolist()],
            group=self.group[index],
            pictures=[self.pictures[i] for i in index.tolist()],
        )

    @staticmethod
    def cat(rollouts: list[Rollout]) -> Rollout:
        """The rows of all rollouts, padded to the longest prompt and completion."""

        def join(name: str):
            values = [getattr(rollout, name) for rollout in rollouts]
            if isinstance(values[0], list):
                return [x for value in values for x in value]
            if name == "group":  # no group is in two rollouts
                starts = [0, *accumulate(int(x.max()) + 1 for x in values)]
                values = [x + start for x, start in zip(values, starts, strict=False)]
            if values[0].ndim == 2:
                widest = max(x.shape[1] for x in values)
                missing = [widest - x.shape[1] for x in values]
                sides = [(n, 0) if name.startswith("prompt") else (0, n) for n in missing]
                values = [F.pad(x, side) for x, side in zip(values, sides, strict=True)]
            return torch.cat(values)

        return Rollout(**{field.name: join(field.name) for field in fields(Rollout)})


@torch.no_grad()
def sample(
    model, tokenizer, prompts: list, group_size: int, max_new_tokens: int, temperature=1.0
) -> Rollout:
    """Sample G completions of each of B prompts. temperature=0: greedy, log-probs at temperature 1.

    Each prompt is prefilled once, and its keys and values are repeated for the G rows of its group.
    A row that has drawn an EOS leaves the batch. Raises UserError if a prompt does not fit the
    context, RuntimeError if the model's logits are NaN.
    """
    G, device = group_size, model.device
    ids, mask, images = encode_prompts(model, tokenizer, prompts, max_new_tokens)  # [B, P]
    position = positions(model, ids, mask, images)  # [B, P] or [3, B, P]
    stop_ids = torch.tensor(stop_token_ids(model, tokenizer), device=device)
    cache = DynamicCache(config=model.config)
    training = model.training
    model.eval()  # in train mode, which checkpointing needs, transformers drops the cache

    def next_logits(ids: Tensor, mask: Tensor, position: Tensor, **image_inputs) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": position}
        output = model(**inputs, **image_inputs, cache=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]  # [n, V]

    with autocast(device):  # one context, so that the bf16 copies of the weights are kept
        logits = next_logits(ids, mask, position, **pictures.model_inputs(images, device))  # [B, V]
        repeat_cache(cache, G, max_new_tokens)
        logits = logits.repeat_interleave(G, 0)  # [N, V]
        prompt_ids, prompt_mask = ids.repeat_interleave(G, 0), mask.repeat_interleave(G, 0)
        position = next_position(position).repeat_interleave(G, 0)  # [N, 1]

        N, P = prompt_ids.shape
        completion_ids = torch.zeros(N, max_new_tokens, dtype=torch.long, device=device)
        completion_mask = torch.zeros(N, max_new_tokens, dtype=torch.bool, device=device)
        logprobs = torch.zeros(N, max_new_tokens, device=device)
        running = torch.arange(N, device=device)  # the rows without an EOS, in the cache's order
        attention_mask = F.pad(prompt_mask, (0, max_new_tokens), value=True)
        for t in range(max_new_tokens):
            tokens, token_logprobs = draw(logits, temperature)  # [n], for the n running rows
            completion_ids[running, t] = tokens
            completion_mask[running, t] = True
            logprobs[running, t] = token_logprobs
            goes_on = ~torch.isin(tokens, stop_ids)  # [n]
            n = int(goes_on.sum())
            if n == 0 or t == max_new_tokens - 1:
                running = running[goes_on]
                break
            if n < len(running):  # the last running rows move into the places of those that ended
                keep = torch.arange(n, device=device)
                keep[~goes_on[:n]] = n + goes_on[n:].nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                running, tokens, position = running[keep], tokens[keep], position[keep]
                attention_mask = attention_mask[keep]
            logits = next_logits(tokens[:, None], attention_mask[:, : P + t + 1], position + t)
    model.train(training)
    if logprobs.isnan().any():
        raise RuntimeError("the logits are non-finite")

    T = t + 1
    truncated = torch.zeros(N, dtype=torch.bool, device=device)
    truncated[running] = True
    lengths = (completion_mask.sum(1) - (~truncated).long()).tolist()  # without the EOS
    texts = [row[:n] for row, n in zip(completion_ids.tolist(), lengths, strict=True)]
    # Special tokens may carry meaning for the reward; only the one that ended the row is dropped.
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids[:, :T],
        completion_mask=completion_mask[:, :T],
        logprobs=logprobs[:, :T],
        truncated=truncated,
        texts=tokenizer.batch_decode(texts),
        group=torch.arange(len(prompts), device=device).repeat_interleave(G),
        pictures=[image for image in images for _ in range(G)],
    )


def draw(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits [n, V] -> tokens [n] and their log-probs [n].

    There is no top-k and no top-p: the distribution that is sampled is the one that is scored.
    """
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # [n, V]
    if temperature == 0:
        tokens = logprobs.argmax(-1, keepdim=True)  # [n, 1]
    else:  # inverse-CDF sampling; in float32 the cumulative sum would blur rare tokens
        cdf = logprobs.double().exp().cumsum(-1)  # [n, V]
        u = torch.rand(len(cdf), 1, dtype=cdf.dtype, device=cdf.device) * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, u, right=True).clamp(max=cdf.shape[1] - 1)  # [n, 1]
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def positions(model, ids: Tensor, mask: Tensor, images: list) -> Tensor:
    """Position ids [N, L]: 0, 1, 2, ... from the first real token on. With pictures [3, N, L]."""
    if any(images):
        return pictures.positions(model, ids, mask, images)
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def next_position(position: Tensor) -> Tensor:
    """Position ids [N, L] or [3, N, L] -> the position of the token that follows, [N, 1]."""
    position = position.amax(0) if position.ndim == 3 else position
    return position.amax(1, keepdim=True) + 1


class PreallocatedLayer(DynamicLayer):
    """The keys and values of one layer, repeated for each group, with space for new tokens.

    transformers copies the whole cache for every new token and whenever a row ends. Here a token is
    written in place, and only the rows that move are copied: twice as fast after long prompts.
    """

    def __init__(self, layer: DynamicLayer, repeats: int, new_tokens: int):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values  # [B, heads, P, d]
        self.buffers = [
            F.pad(x.repeat_interleave(repeats, 0), (0, 0, 0, new_tokens))
            for x in (layer.keys, layer.values)
        ]  # [N, heads, P + new_tokens, d]; keys and values become views of them

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs):
        n, L = len(keys), self.keys.shape[2]
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[:n, :, L : L + new.shape[2]] = new
        self.keys, self.values = (x[:n, :, : L + keys.shape[2]] for x in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, keep: Tensor) -> None:
        moved = (keep != torch.arange(len(keep), device=keep.device)).nonzero().squeeze(1)
        for x in self.buffers:
            x[moved] = x[keep[moved]]


def repeat_cache(cache: DynamicCache, repeats: int, new_tokens: int) -> None:
    """Repeat every row, with space for new tokens. (Sliding-window layers are only repeated.)"""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[i] = PreallocatedLayer(layer, repeats, new_tokens)
        elif not hasattr(layer, "batch_repeat_interleave"):
            raise ValueError("it has layers with a recurrent state; attention alone is supported")
        else:
            layer.batch_repeat_interleave(repeats)


# ---- Log-probabilities ---------------------------------------------------------------------------

LOGITS_AT_ONCE = 2**24  # in one chunk: 64 MiB in fp32


def completion_logprobs(model, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """log pi(token | everything before it) of each sampled token, [N, T], differentiable.

    It is 0 where the mask is False. The logits [N, T, V] never exist as a whole: only the hidden
    states that predict a sampled token go through the LM head, in chunks, and the backward pass
    computes each chunk again.
    """
    mask, targets = rollout.completion_mask, rollout.completion_ids[rollout.completion_mask]  # [n]
    body, head = body_and_head(model)

    def score(states: Tensor, targets: Tensor) -> Tensor:  # [m, H], [m] -> [m]
        logits = head(states)  # [m, V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    with autocast(model.device):
        states = predicting_states(model, body, rollout)[mask]  # [n, H]
        m = max(1, LOGITS_AT_ONCE // model.get_output_embeddings().weight.shape[0])
        chunks = zip(states.split(m), targets.split(m), strict=True)
        logprobs = torch.cat([checkpoint(score, *c, use_reentrant=False) for c in chunks])  # [n]
    return torch.zeros_like(mask, dtype=logprobs.dtype).masked_scatter(mask, logprobs)


def predicting_states(model, body: Callable, rollout: Rollout) -> Tensor:
    """The hidden state that predicts each completion token, [N, T, H].

    As in `sample`, each prompt is read once, and its keys and values are repeated for the rows of
    its group. The gradients of these rows accumulate in the prompt.
    """
    r, T = rollout, rollout.completion_ids.shape[1]

    def read(keep: int, ids: Tensor, mask: Tensor, position: Tensor, images=(), cache=None):
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": position}
        inputs |= pictures.model_inputs(images, ids.device)
        return body(keep, **inputs, cache=cache, use_cache=cache is not None)

    completion_ids = pictures.without_image_tokens(model, r.completion_ids)
    _, prompt_of, sizes = r.group.unique_consecutive(return_inverse=True, return_counts=True)
    if len(sizes) == len(r.group) or T == 1 or model.training:  # checkpointing drops the cache
        ids = torch.cat([r.prompt_ids, completion_ids], 1)  # [N, P + T]
        mask = torch.cat([r.prompt_mask, r.completion_mask], 1)
        position = positions(model, ids, mask, r.pictures)
        return read(T + 1, ids, mask, position, r.pictures)[:, :-1]

    prompts = r.select(sizes.cumsum(0) - sizes)  # the first row of each of the U groups
    position = positions(model, prompts.prompt_ids, prompts.prompt_mask, prompts.pictures)
    cache = DynamicCache(config=model.config)
    last = read(1, prompts.prompt_ids, prompts.prompt_mask, position, prompts.pictures, cache)
    cache.reorder_cache(prompt_of)  # by index_select: indexing has a non-deterministic backward
    mask = torch.cat([prompts.prompt_mask[prompt_of], r.completion_mask[:, :-1]], 1)
    place = (r.completion_mask.long().cumsum(1) - 1)[:, :-1]  # padding stays in the context
    position = next_position(position)[prompt_of] + place  # [N, T - 1]
    rest = read(T - 1, completion_ids[:, :-1], mask, position, cache=cache)
    return torch.cat([last.index_select(0, prompt_of), rest], 1)


def body_and_head(model) -> tuple[Callable, Callable]:
    """(body, head) such that head(body(keep, **inputs)) are the logits of the last `keep` tokens.

    Usually the body gives hidden states and the head is the LM head. Some models change its logits
    (Gemma 2 caps them, Granite scales them): there the body is the whole model. Checked once per
    model, bit for bit: a cap hardly changes the small logits of a new model.
    """
    lm_head = model.get_output_embeddings()
    if not hasattr(model, "logits_are_plain"):
        with torch.no_grad():
            inputs = {"input_ids": torch.arange(4, device=model.device)[None], "use_cache": False}
            logits = lm_head(model.base_model(**inputs).last_hidden_state)
            model.logits_are_plain = torch.equal(logits, model(**inputs).logits)
    if model.logits_are_plain:
        return lambda keep, **inputs: model.base_model(**inputs)[0][:, -keep:], lm_head
    return lambda keep, **inputs: model(**inputs, logits_to_keep=keep).logits, torch.nn.Identity()


@torch.no_grad()
def frozen_logprobs(model, rollout: Rollout, max_tokens: int, temperature: float = 1.0) -> Tensor:
    """completion_logprobs [N, T] of a reference model: no gradient, in micro-batches."""
    logprobs = torch.zeros_like(rollout.logprobs)
    for rows in micro_batches(rollout, max_tokens):
        values = completion_logprobs(model, rollout.select(rows), temperature)  # [n, longest]
        logprobs[rows, : values.shape[1]] = values.to(logprobs.dtype)
    return logprobs


def micro_batches(rollout: Rollout, max_tokens: int, block: int = 1) -> list[Tensor]:
    """Row indices in batches of similar length: rows x longest <= max_tokens, if possible.

    Blocks of `block` adjacent rows stay together, for losses that compare completions.
    """
    lengths = rollout.prompt_mask.sum(1) + rollout.completion_mask.sum(1)  # [N]
    lengths = lengths.view(-1, block).amax(1).tolist()  # [N / block]
    batches = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches[-1] and (len(batches[-1]) + block) * lengths[i] > max_tokens:
            batches.append([])
        batches[-1] += range(i * block, (i + 1) * block)
    # In order, so that the rows of a group are adjacent and share their prompt.
    return [torch.tensor(sorted(batch), device=rollout.group.device) for batch in batches]


# ---- Models and their metrics --------------------------------------------------------------------


def autocast(device: torch.device):
    """bf16 arithmetic on CUDA. Weights stay fp32: in bf16 an update of 1e-6 rounds to nothing."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


def load_model(
    name: str, device, task=None, chat_template=True, system=None, grad_checkpointing=False
):
    """(model, tokenizer) of "tiny", a directory, or a Hugging Face id; fp32 weights, no dropout.

    "tiny" is warm-started on the demonstrations of `task` ("add" if None). system: a turn that the
    tokenizer puts before every prompt. Raises UserError.
    """
    transformers.utils.logging.disable_progress_bar()
    if name == "tiny":
        name = tiny_model(task or make_task("add"))
    try:
        config = AutoConfig.from_pretrained(name)
        # The policy that is scored must be the policy that was sampled: no dropout, ever.
        parts = [config, *(getattr(config, part) for part in config.sub_configs)]
        for part in filter(None, parts):  # a part may be absent
            for key, value in part.to_dict().items():
                if "drop" in key and isinstance(value, float):
                    setattr(part, key, 0.0)
        is_vision = pictures.is_vision(config)
        load = pictures.load_weights if is_vision else AutoModelForCausalLM.from_pretrained
        model, info = load(name, config=config, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"missing weights: {min(info['missing_keys'])}")
        model.to(device)
        tokenizer = AutoTokenizer.from_pretrained(name)
        if is_vision:
            tokenizer.image_processor = pictures.load_processor(name)
        if not chat_template:
            tokenizer.chat_template = None
        sample(model, tokenizer, ["1", "2 and 3"], 2, 3)  # does all of it work together?
        last_differs = torch.tensor([[0, 1, 2], [0, 1, 3]], device=model.device)
        with torch.no_grad():
            before, after = model(input_ids=last_differs, use_cache=False).logits[:, 1]
        if not torch.allclose(before, after, atol=1e-4):
            raise ValueError("a token changes the logits before it: it is not causal")
    except Exception as error:  # hub, parsers, file formats, devices: many causes, one line
        reason = " ".join(str(error).split())
        message = f"{name} cannot be loaded as a language model on {device}: {reason:.300}"
        raise UserError(message) from error
    if system is not None:
        set_system(model, tokenizer, system)
    if grad_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train(grad_checkpointing), tokenizer  # transformers checkpoints in train mode only


def evaluate(model, tokenizer, task: gymnasium.Env, args) -> dict[str, float]:
    """Metrics on held-out problems, always with the same random numbers.

    eval_accuracy is the share solved at the training temperature, with its standard error over
    problems; eval_greedy the share solved by greedy decoding; eval_pass_at_k the share of problems
    that any of --eval-samples completions solves.
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
    metrics = mean_and_error("eval_accuracy", sampled.mean(1))
    metrics["eval_greedy"] = greedy.mean().item()
    metrics["eval_pass_at_k"] = sampled.amax(1).mean().item()
    return metrics


def mean_and_error(name: str, values: Tensor) -> dict[str, float]:
    """values [n] -> {name: mean, name_stderr: its standard error}."""
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else torch.tensor(math.nan)
    return {name: values.mean().item(), f"{name}_stderr": error.item()}


def rollout_metrics(rollout: Rollout, rewards: Tensor) -> dict[str, float]:
    """Metrics of a rollout and its rewards [groups, G]."""
    tokens = rollout.completion_mask.sum().item()
    dead = rewards.amax(1) == rewards.amin(1)  # [groups]
    return {
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std(1).mean().item(),  # within the groups
        "valid_share": (~dead).double().mean().item(),
        "all_right": (dead & (rewards[:, 0] > 0)).double().mean().item(),
        "all_wrong": (dead & (rewards[:, 0] <= 0)).double().mean().item(),
        # -log pi of tokens drawn from pi: an unbiased estimate of the entropy, for free
        "entropy": -rollout.logprobs.sum().item() / tokens,
        "completion_length": tokens / len(rollout.texts),
        "truncated_share": rollout.truncated.double().mean().item(),
        "tokens": tokens,
    }


def rollout_samples(prompts: list, rollout: Rollout, scores: dict, n: int) -> list[dict]:
    """The first n rows of a rollout, with their scores {name: [N] or [groups, G]}, to be logged."""
    G, rows = len(rollout.texts) // len(prompts), []
    for i in range(min(n, len(rollout.texts))):
        mask = rollout.completion_mask[i]
        row = {name: round(x.flatten()[i].item(), 6) for name, x in scores.items()}
        row |= {
            "prompt": prompt_text(prompts[i // G]),
            "completion": rollout.texts[i],
            "truncated": rollout.truncated[i].item(),
            "prompt_tokens": rollout.prompt_ids[i, rollout.prompt_mask[i]].tolist(),
            "tokens": rollout.completion_ids[i, mask].tolist(),
            "logprobs": [round(x, 3) for x in rollout.logprobs[i, mask].tolist()],
        }
        rows.append(row)
    return rows
