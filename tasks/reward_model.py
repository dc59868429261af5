"""A learned reward: a sequence classifier that reads a prompt and its completion."""

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from .base import UserError
from .prompts import as_messages, check_token_ids, pad, tokens_before_a_text


class RewardModel:
    """A sequence classifier with one label: a directory or a Hugging Face id. Raises UserError."""

    def __init__(self, name: str, device, new_head: bool = False):
        logging.set_verbosity_error()  # what transformers would report is checked below
        try:
            self.model, info = AutoModelForSequenceClassification.from_pretrained(
                name,
                num_labels=1,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            wrong = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
            if wrong and not new_head:
                raise ValueError(f"its {wrong[0]} is missing, or is for another number of labels")
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            pads = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0
            self.model.config.pad_token_id = next(pad for pad in pads if pad is not None)
            self.model.to(device).eval()
            if not self.rewards(["1"], ["1"]).isfinite().all():
                raise ValueError("its score is NaN or infinite")
        except Exception as error:  # many causes, reported on one line
            reason = " ".join(str(error).split())
            raise UserError(
                f"--reward-model {name}: not a sequence classifier with one label: {reason:.300}"
            ) from error

    def encode(self, prompts: list, completions: list[str]) -> list[list[int]]:
        """The token ids of each completion after its prompt. Raises UserError."""
        tokenizer = self.tokenizer
        if any(isinstance(prompt, dict) for prompt in prompts):
            raise UserError("--reward-model reads text only, and the prompts have pictures")
        if tokenizer.chat_template:
            chats = [
                [*as_messages(prompt), {"role": "assistant", "content": completion}]
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
            texts = tokenizer.apply_chat_template(chats, tokenize=False)
            rows = tokenizer(texts, add_special_tokens=False).input_ids
        else:
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise UserError("--reward-model needs a chat template for prompts of messages")
            before, eos = tokens_before_a_text(tokenizer), tokenizer.eos_token_id
            texts = [*prompts, *completions]
            rows = tokenizer(texts, add_special_tokens=False).input_ids
            pairs = zip(rows[: len(prompts)], rows[len(prompts) :], strict=True)
            rows = [[*before, *q, *a, *([] if eos is None else [eos])] for q, a in pairs]
        check_token_ids(self.model, rows, completions, 0)
        return rows

    def score(self, prompts: list, completions: list[str]) -> Tensor:
        """The score of each completion of each prompt, [N], differentiable. Raises UserError."""
        rows = self.encode(prompts, completions)
        ids, mask = pad(rows, "right", self.model.device)  # [N, L]
        ids = ids.where(mask, self.model.config.pad_token_id)  # it reads the last other token
        with torch.autocast("cuda", torch.bfloat16, enabled=self.model.device.type == "cuda"):
            return self.model(ids, attention_mask=mask.long()).logits[:, 0].float()

    @torch.no_grad()
    def rewards(self, prompts: list, completions: list[str]) -> Tensor:
        """score [N] without gradient, 64 rows at a time."""
        chunks = [slice(i, i + 64) for i in range(0, len(prompts), 64)]
        return torch.cat([self.score(prompts[c], completions[c]) for c in chunks]).cpu()
