"""Rewards of every kind, and training runs of a few steps on a small random model."""

from __future__ import annotations

import functools
import tempfile

import gymnasium
import torch
from probe import Case
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from run import Run
from tasks import TextTask
from tasks.tiny import tiny_tokenizer


class Letters(TextTask):
    """Rewards of 0, .5 or 1 by the first byte; some of every eight groups are dead."""

    dead = 0, 3, 6  # of the first four groups two, of the next four one

    def problem(self, index):
        return "abcdefgh"[: 1 + index % 8] + f" {index}", f"{index}"

    def reward(self, completion, answer):
        first = completion.encode()[0] if completion else 0
        return 0.1 if int(answer) % 8 in self.dead else (first % 3) / 2


class FewDead(Letters):
    dead = (0,)


class AllDead(Letters):
    dead = range(8)


for task in (Letters, FewDead, AllDead):
    gymnasium.register(f"{task.__name__}-v0", entry_point=task)


def rewards_of(seed: int) -> list[torch.Tensor]:
    """Groups of every kind: mixed, dead at 0, at .1, above and below 0, all positive, negative."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 3, (6, 4), generator=generator) / 2
    return [
        torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0.5, 1, 0.5]]),
        torch.tensor([[-1.0, -1, -1, -1], [1, -1, -1, -1], [2, 3, 2, 3], [-2, -1, -2, -2]]),
        torch.tensor([[0.7] * 8]),
        drawn,
        drawn.double() + 3,
    ]


@functools.cache
def small_model() -> str:
    """The directory of a random Qwen2 of 40,000 parameters."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 258}
    directory = tempfile.mkdtemp()
    torch.manual_seed(1)
    config = Qwen2Config(**sizes, initializer_range=0.3, eos_token_id=256, bos_token_id=None)
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = [256, *range(100, 130)]  # most rows end early
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def train_case(flags: str, columns: list[str], task: str = "Letters-v0") -> Case:
    """The metrics of a run with these flags in every step; "weights" is how far they have moved."""

    def run(module) -> dict:
        fixed = f"--model {small_model()} --task {task} --prompts 4 --group-size 4 --lr 1e-3 "
        fixed += "--max-new-tokens 8 --warmup 2 --eval-problems 1 --eval-samples 1 "
        fixed += f"--eval-every 99 --device cpu --out {tempfile.mkdtemp()} "
        Run.save = Run.finish = lambda run: None  # slow, and not looked at
        trained = module.train(module.parse_args((fixed + flags).split()))
        before = AutoModelForCausalLM.from_pretrained(small_model())
        moved = zip(trained.model.parameters(), before.parameters(), strict=True)
        values = {x: [row.get(x) for row in trained.rows[1:]] for x in columns}
        if "weights" in columns:
            values["weights"] = [(now - old).norm().item() for now, old in moved]
        return values

    label = f"train with {flags or 'its defaults'} on {task}"
    return Case(label, run, 1e-3, part=label)
