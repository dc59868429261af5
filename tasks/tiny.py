"""Tiny models for the CPU: made from a config, warm-started on demonstrations, cached."""

import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .base import UserError, cache_dir, is_text
from .episodes import get_prompts, get_size, task_code
from .pictures import expand_image_tokens, model_inputs, read_pictures
from .prompts import plain_text

# A Llama of 0.9 million parameters, and the supervised run it starts from.
TINY = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "initializer_range": 0.06, "tie_word_embeddings": True,
}  # fmt: skip
WARM_START = {"steps": 350, "tokens_per_step": 2048, "lr": 2e-3}

# For tasks with pictures, a Qwen3-VL of 0.9 million parameters. One image token for 8 x 8 pixels.
TINY_TEXT = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "initializer_range": 0.06,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10_000.0,
        "mrope_section": [6, 5, 5], "mrope_interleaved": True,
    },
}  # fmt: skip
TINY_VISION = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 4,
    "out_hidden_size": 128, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    "initializer_range": 0.06,
}  # fmt: skip
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def tiny_model(task: gymnasium.Env) -> str:
    """The directory of a tiny model that imitates the task's demonstrations.

    It is made on the CPU the first time, then cached. Raises UserError for a task that has no
    demonstrations.
    """
    task = task.unwrapped
    if not hasattr(task, "demonstration"):
        raise UserError(
            f"--model tiny imitates demonstrations, and {type(task).__name__} has none: give it a "
            "method demonstration(index), or name another --model"
        )
    words, size = getattr(task, "words", None), get_size(task)
    shown = range(size) if size else range(0, 100_000, 97)  # a sample, if the task is endless
    demonstrations = [demonstrate(task, i) for i in shown]
    is_vision = any(isinstance(prompt, dict) for prompt, _ in demonstrations)

    def make(directory: Path) -> None:
        tokenizer = tiny_tokenizer(words)
        special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        if is_vision:
            model = tiny_vision_model(tokenizer, special)
            tokenizer.image_processor.save_pretrained(directory)
        else:
            special |= {"vocab_size": len(tokenizer), "bos_token_id": None}
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **special))
        warm_start(model, tokenizer, task)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    recipe = ["Qwen3-VL", TINY_TEXT, TINY_VISION] if is_vision else ["Llama", TINY]
    return cached_model([*recipe, WARM_START, words, demonstrations], make)


def demonstrate(task: gymnasium.Env, index: int) -> tuple[str | dict, str]:
    """Problem `index` as (prompt, completion to imitate). Raises UserError."""
    (prompt,) = get_prompts(task, [index])
    with task_code(f"at the demonstration of problem {index}"):
        completion = task.demonstration(index)
    if not is_text(completion):
        raise UserError(f"the demonstration of problem {index} is {completion!r:.60}: not a text")
    return prompt, completion


def tiny_vision_model(tokenizer, special: dict):
    """A new Qwen3-VL. The tokenizer gets the vision tokens and an image processor."""
    tokenizer.add_tokens(VISION_TOKENS, special_tokens=True)
    tokenizer.image_processor = transformers.Qwen2VLImageProcessorPil(
        patch_size=TINY_VISION["patch_size"], size={"shortest_edge": 64, "longest_edge": 65536}
    )
    start, end, image, video = tokenizer.convert_tokens_to_ids(VISION_TOKENS)
    config = transformers.Qwen3VLConfig(
        text_config=TINY_TEXT | special | {"vocab_size": len(tokenizer)},
        vision_config=TINY_VISION, tie_word_embeddings=True,
        vision_start_token_id=start, vision_end_token_id=end,
        image_token_id=image, video_token_id=video, **special,
    )  # fmt: skip
    return transformers.Qwen3VLForConditionalGeneration(config)


def tiny_tokenizer(words: list[str] | None = None):
    """One token per byte, so that any text can be written; or, given `words`, one per word."""
    if words is None:  # Qwen2's tokenizer without merges
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 of them
        vocab = {token: i for i, token in enumerate([*alphabet, "<|endoftext|>", "<|pad|>"])}
        return transformers.Qwen2Tokenizer(vocab=vocab, merges=[], pad_token="<|pad|>")
    vocab = {token: i for i, token in enumerate(["<unk>", "<eos>", "<pad>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )


def warm_start(model, tokenizer, task) -> None:
    """Supervised learning on the task's demonstrations 0, 1, 2, ..."""
    batches = demonstration_batches(model, tokenizer, task)

    def batch_loss(step: int) -> Tensor:
        return model(**next(batches)).loss

    steps, lr = WARM_START["steps"], WARM_START["lr"]
    fit(model, batch_loss, steps, lr, "warm-start of the tiny model")


def demonstration_batches(model, tokenizer, task) -> Iterator[dict[str, Tensor]]:
    """Demonstrations as inputs of the model, with labels, in batches of WARM_START's tokens."""
    rows, labels, pictures = [], [], []
    for index in itertools.count():
        prompt, completion = demonstrate(task, index)
        picture = read_pictures(tokenizer, [prompt])  # [None] for a text
        prompt_ids = tokenizer([plain_text(prompt, model, tokenizer)]).input_ids
        (prompt_ids,) = expand_image_tokens(prompt_ids, picture, model, tokenizer)
        completion_ids = [*tokenizer(completion).input_ids, tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt_ids + completion_ids))
        labels.append(torch.tensor([-100] * len(prompt_ids) + completion_ids))  # -100: no loss
        pictures += picture
        if sum(map(len, rows)) >= WARM_START["tokens_per_step"]:
            ids = pad_sequence(rows, batch_first=True)
            batch = {"input_ids": ids, "labels": pad_sequence(labels, True, -100)}
            batch |= model_inputs(pictures, ids.device)
            if any(pictures):
                batch["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
            yield batch
            rows, labels, pictures = [], [], []


def fit(model, batch_loss: Callable[[int], Tensor], steps: int, lr: float, name: str) -> None:
    """Supervised learning with AdamW; batch_loss(step) is the loss of batch 0, 1, 2 ..."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 7, steps)
    bar = tqdm(range(steps), desc=name, unit="step")
    for step in bar:
        loss = batch_loss(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def cached_model(recipe: list, make: Callable[[Path], None]) -> str:
    """The directory of a model that make(directory) saves: made the first time, then cached.

    It is named by a hash of `recipe`, which holds everything that shapes the model. It gets its
    name when it is finished, so that a directory with this name is whole.
    """

    def hash_of(image) -> str:
        return hashlib.sha256(image.tobytes()).hexdigest()

    text = json.dumps(recipe, sort_keys=True, default=hash_of)
    path = cache_dir() / f"tiny-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, torch.random.fork_rng([]):
            new = Path(folder) / "model"
            torch.manual_seed(0)
            make(new)
            try:
                new.rename(path)
            except OSError:  # another process was faster
                if not path.exists():
                    raise
    return str(path)
