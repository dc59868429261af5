"""What is about pictures alone: reading them, and turning them into a model's inputs.

A prompt with a picture is a Dict observation: {"image": array [H, W, 3] uint8, "text": str}. The
models are the Qwen-VL family: a picture becomes patches for the vision tower, and as many image
tokens in the prompt as the tower gives vectors.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .base import UserError

FAMILIES = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}  # by config.model_type
DATA_URI = "data:image/png;base64,"


def prompt_text(prompt: str | dict) -> str:
    return prompt if isinstance(prompt, str) else prompt["text"]


def read_image(source: str, where: str) -> np.ndarray:
    """A picture file or a data URI -> [H, W, 3] uint8.

    Raises UserError, with `where` it was named, for one that is missing, truncated or no picture.
    """
    try:
        file = Path(source)
        if source.startswith(DATA_URI):
            file = io.BytesIO(base64.b64decode(source.removeprefix(DATA_URI), validate=True))
        with Image.open(file) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: its picture cannot be read ({error!s:.200})") from error


def data_uri(image: np.ndarray) -> str:
    """[H, W, 3] uint8 -> a PNG as a text, without loss."""
    Image.fromarray(image).save(file := io.BytesIO(), "png")
    return DATA_URI + base64.b64encode(file.getvalue()).decode()


def read_pictures(tokenizer, prompts: list) -> list[dict[str, Tensor] | None]:
    """Each prompt's picture as the model's inputs, None for a prompt without one.

    pixel_values [patches, features] and image_grid_thw [1, 3], its patches in time, height and
    width. Prompts that are one object share them. Raises UserError if the model is for text only,
    or cannot take a picture.
    """
    done = {id(p): picture_inputs(tokenizer, p) for p in prompts if not isinstance(p, str)}
    return [done.get(id(p)) for p in prompts]


def picture_inputs(tokenizer, prompt: dict) -> dict[str, Tensor]:
    processor, image = getattr(tokenizer, "image_processor", None), prompt["image"]
    if processor is None:
        raise UserError(
            "the task has pictures, and this model reads text only: --model takes Qwen2-VL, "
            "Qwen2.5-VL and Qwen3-VL"
        )
    if isinstance(image, str):
        image = read_image(image, prompt["where"])
    try:
        return dict(processor(images=Image.fromarray(image), return_tensors="pt"))
    except ValueError as error:  # 1 x 300 pixels, for example
        size = " x ".join(map(str, image.shape[1::-1]))
        raise UserError(f"a picture of {size} pixels: {error}") from error


def image_tokens(tokenizer, picture: dict[str, Tensor]) -> int:
    """The number of image tokens that stand for a picture."""
    return int(picture["image_grid_thw"].prod()) // tokenizer.image_processor.merge_size**2


def chat_content(text: str, picture) -> str | list[dict]:
    """The content of a user's turn: the text, after the picture if there is one."""
    return text if picture is None else [{"type": "image"}, {"type": "text", "text": text}]


def picture_mark(tokenizer, config) -> str:
    """What stands for a picture in a prompt without a chat template."""
    ids = config.vision_start_token_id, config.image_token_id, config.vision_end_token_id
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def insert_picture(tokenizer, row: list[int], image_id: int, picture) -> list[int]:
    """A prompt's token ids, its one image token repeated. Raises UserError if it has another
    number of them: none with a chat template that leaves pictures out, two if the text has one."""
    places = [i for i, token in enumerate(row) if token == image_id]
    if len(places) != (picture is not None):
        raise UserError(
            f"a prompt has {len(places)} image tokens for {int(picture is not None)} pictures: "
            "its text, or the model's chat template, does not fit"
        )
    if picture is None:
        return row
    i, n = places[0], image_tokens(tokenizer, picture)
    return [*row[:i], *[image_id] * n, *row[i + 1 :]]


def forward_inputs(pictures: list, device) -> dict[str, Tensor]:
    """What the forward pass needs of the pictures of its rows; nothing if there are none."""
    real = [picture for picture in pictures if picture is not None]
    if not real:
        return {}
    return {name: torch.cat([picture[name] for picture in real]).to(device) for name in real[0]}
