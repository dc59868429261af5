"""Rewards of every kind, and training runs of a few steps on a small random model."""

from __future__ import annotations

import functools
import tempfile
from unittest import mock

import gymnasium
import torch
from probe import Case
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from run import Run
from tasks import TextTask
from tasks.tiny import tiny_tokenizer


class Letters(TextTask):
    """Rewards that hardly ever agree; of the first four groups two are dead, of the next four one.

    Which groups are valid does not depend on chance: every seed tells the same mistakes apart.
    """

    def __init__(self, split: str = "train", dead=(0, 3, 6)):
        super().__init__(split)
        self.dead = dead

    def problem(self, index):
        return "abcdefgh"[: 1 + index % 8] + f" {index}", f"{index}"

    def reward(self, completion, answer):
        i = int(answer) % 8
        if i in self.dead:
            return 0.0 if i == 3 else 0.1
        return sum(completion.encode()) % 97 / 97


gymnasium.register("letters", Letters)
gymnasium.register("few-dead", Letters, kwargs={"dead": (0,)})
gymnasium.register("all-dead", Letters, kwargs={"dead": range(8)})


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


def trained(module, flags: str, task: str = "letters", **replaced) -> Run:
    """A training with these flags, with functions of the module replaced by others."""
    fixed = f"--model {small_model()} --task {task} --prompts 4 --group-size 4 --lr 1e-3 "
    fixed += "--max-new-tokens 8 --warmup 2 --eval-problems 1 --eval-samples 1 "
    fixed += f"--eval-every 99 --device cpu --out {tempfile.mkdtemp()} "
    Run.save = Run.finish = lambda run: None  # slow, and not looked at
    with mock.patch.dict(vars(module), replaced):
        return module.train(module.parse_args((fixed + flags).split()))


def train_case(flags: str, seed: int, columns: list[str], task="letters", **replaced) -> Case:
    """Columns of the metrics of two steps, how far each weight has moved, and whether dead groups
    were reported."""

    def run(module):
        run = trained(module, f"{flags} --steps 2 --seed {seed}", task, **replaced)
        before = AutoModelForCausalLM.from_pretrained(small_model()).parameters()
        moved = zip(run.model.parameters(), before, strict=True)
        found = {x: [row.get(x) for row in run.rows[1:]] for x in columns}
        found["weights"] = [(now - old).norm().item() for now, old in moved]
        return found | {"warned": any("dead" in message for message in run.warned)}

    label = f"train with {flags or 'its defaults'} on {task}"
    return Case(label, run, tolerance=1e-3, part=label)


class Returned(Exception):
    """What the function at which a training is stopped has returned."""


def stop_case(function: str, flags: str, seed: int, values, task="letters") -> Case:
    """`values` of what a function of the module returns in the first step of a training."""

    def run(module):
        original = getattr(module, function)

        def stop(*args):
            raise Returned(*original(*args))

        try:
            trained(module, f"{flags} --steps 1 --seed {seed}", task, **{function: stop})
        except Returned as returned:
            return values(*returned.args)

    label = f"{function} with {flags or 'its defaults'} on {task}"
    return Case(label, run, tolerance=1e-3, part=label)


def sampling_case(flags: str, seed: int, task="letters") -> Case:
    def values(prompts, rollouts, rollout, rewards, valid):
        found = {"prompts": len(prompts), "rollouts": len(rollouts), "rows": len(rollout.texts)}
        return found | {"rewards": rewards, "valid": valid}

    return stop_case("sample_groups", flags, seed, values, task)
