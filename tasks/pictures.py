"""Everything specific to pictures: reading them, and turning them into a model's inputs.

A prompt with a picture is {"image": uint8 [H, W, 3], "text": str}. The models are the Qwen-VL
family. The vision tower turns a picture into embeddings, each of which takes the place of one image
token in the prompt.
"""

import base64
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from .base import UserError

FAMILIES = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}  # by config.model_type
DATA_URI = "data:image/png;base64,"

# ---- Files and arrays ----------------------------------------------------------------------------


def read_image(source: str, where: str) -> np.ndarray:
    """A picture file or a data URI -> uint8 [H, W, 3], as a viewer shows it: turned as its EXIF
    data say, transparent parts white. Raises UserError, naming `where`, if it cannot be read."""
    try:
        file = Path(source)
        if source.startswith(DATA_URI):
            file = io.BytesIO(base64.b64decode(source.removeprefix(DATA_URI), validate=True))
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"mode {image.mode}: save it with 8 bits per channel")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: its picture cannot be read ({error!s:.200})") from error


def data_uri(image: np.ndarray) -> str:
    """uint8 [H, W, 3] -> a PNG data URI."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return DATA_URI + base64.b64encode(file.getvalue()).decode()


# ---- Models --------------------------------------------------------------------------------------


def is_vision(config) -> bool:
    return config.model_type in FAMILIES


load_weights = AutoModelForImageTextToText.from_pretrained


def load_processor(name: str):
    """The image processor. The Pillow backend, to avoid torchvision."""
    return AutoImageProcessor.from_pretrained(name, backend="pil")


# ---- Prompts -------------------------------------------------------------------------------------


def read_pictures(tokenizer, prompts: list) -> list[dict[str, Tensor] | None]:
    """Each prompt's picture as the model's inputs, None for a prompt without one: pixel_values
    [patches, features] and image_grid_thw [1, 3], the patches in time, height and width. Raises
    UserError if the model reads text only or cannot take the picture."""
    return [picture_inputs(tokenizer, p) if isinstance(p, dict) else None for p in prompts]


def picture_inputs(tokenizer, prompt: dict) -> dict[str, Tensor]:
    processor, image = getattr(tokenizer, "image_processor", None), prompt["image"]
    if processor is None:
        raise UserError(
            "the task has pictures, and this model reads text only: --model takes Qwen2-VL, "
            "Qwen2.5-VL and Qwen3-VL"
        )
    if isinstance(image, str):
        image = read_image(image, "a prompt")
    try:
        return dict(processor(images=Image.fromarray(image), return_tensors="pt"))
    except ValueError as error:  # 1 x 300 pixels, for example
        size = " x ".join(map(str, image.shape[1::-1]))
        raise UserError(f"a picture of {size} pixels: {error}") from error


def expand_image_tokens(rows: list, pictures: list, model, tokenizer) -> list[list[int]]:
    """Token ids of prompts, with one image token for each embedding of their picture.

    Raises UserError unless a prompt with a picture has exactly one image token to expand, and a
    prompt without one has none: its text may contain one, or the chat template may leave it out.
    """
    if not any(pictures):
        return rows
    image_id, expanded = model.config.image_token_id, []
    for row, picture in zip(rows, pictures, strict=True):
        found, wanted = row.count(image_id), 0 if picture is None else 1
        if found != wanted:
            raise UserError(
                f"a prompt has {found} image tokens for {wanted} pictures: its text, or the "
                "model's chat template, does not fit"
            )
        if picture is not None:
            n = int(picture["image_grid_thw"].prod()) // tokenizer.image_processor.merge_size**2
            i = row.index(image_id)
            row = [*row[:i], *[image_id] * n, *row[i + 1 :]]
        expanded.append(row)
    return expanded


# ---- The forward pass ----------------------------------------------------------------------------


def positions(model, ids: Tensor, mask: Tensor, pictures: list) -> Tensor:
    """Position ids [3, N, L] (M-RoPE of Qwen2-VL, arXiv 2409.12191, section 2.1).

    An image token has a time, a row and a column; the text goes on after the largest of them.
    """
    grids = torch.cat([picture["image_grid_thw"] for picture in pictures if picture is not None])
    kinds = (ids == model.config.image_token_id).int()  # 1: of an image
    rope_index = model.base_model.get_rope_index
    return rope_index(ids, kinds, grids.to(ids.device), attention_mask=mask.long())[0]


def model_inputs(pictures: list, device) -> dict[str, Tensor]:
    """What the forward pass needs of the pictures of its rows; nothing if there are none."""
    real = [picture for picture in pictures if picture is not None]
    if not real:
        return {}
    return {name: torch.cat([picture[name] for picture in real]).to(device) for name in real[0]}


def without_image_tokens(model, ids: Tensor) -> Tensor:
    """Completion ids with another token for a sampled image token, which has no picture. It stops
    its completion, so that nothing is predicted from it."""
    image_id = getattr(model.config, "image_token_id", None)
    return ids if image_id is None else ids.masked_fill(ids == image_id, 0)
