"""Training runs of a few steps on a small random model, as cases of a question."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import gymnasium
import torch
from probe import Case

from tasks import TextTask
from tasks.tiny import tiny_tokenizer


class Letters(TextTask):
    """Rewards of 0, .5 or 1 by the first byte; every third group is dead."""

    def problem(self, index):
        return "abcdefgh"[: 1 + index % 8] + f" {index}", f"{index}"

    def reward(self, completion, answer):
        first = completion.encode()[0] if completion else 0
        return 0.1 if int(answer) % 3 == 0 else (first % 3) / 2


class AllDead(Letters):
    def reward(self, completion, answer):
        return 1.0


for task in (Letters, AllDead):
    gymnasium.register(f"{task.__name__}-v0", entry_point=task)


@functools.cache
def small_model() -> str:
    """The directory of a random Qwen2 of 40,000 parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

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
        out = f"{tempfile.mkdtemp()}/run"
        fixed = f"--model {small_model()} --task {task} --prompts 4 --group-size 4 --lr 1e-3 "
        fixed += "--max-new-tokens 8 --warmup 2 --eval-problems 1 --eval-samples 1 "
        fixed += f"--eval-every 99 --save-every 99 --device cpu --out {out} "
        trained = module.train(module.parse_args((fixed + flags).split()))
        result = {
            column: [row.get(column) for row in trained.rows[1:]]
            for column in columns
            if column != "weights"
        }
        if "weights" in columns:
            from transformers import AutoModelForCausalLM

            now, before = (
                AutoModelForCausalLM.from_pretrained(x).state_dict()
                for x in (Path(out) / "checkpoint", small_model())
            )
            result["weights"] = [(now[x] - before[x]).norm().item() for x in sorted(now)]
        return result

    return Case(
        f"train with {flags or 'its defaults'}{'' if 'Letters' in task else ', all groups dead'}",
        run,
        1e-3,
    )
