"""What several test files need: small models and runs, brute-force log-probs, by-hand rollouts."""

import json

import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from common import Rollout
from tasks import TextTask
from tasks.prompts import pad

PROMPTS = ["7", "12+5=", "a longer prompt, of quite another length: ", "1+1="]

# Four groups of four rewards; the second and the fourth group are dead.
REWARDS = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).double()


def make_model(model_type: str, kind=AutoModelForCausalLM, **config):
    """A random model of a Hugging Face model type, with distributions far from uniform."""
    sizes = {
        "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.3, "init_std": 0.3,
        "bos_token_id": None, "eos_token_id": 256, "pad_token_id": None,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **sizes | config)
    return kind.from_config(config)


def write_jsonl(path, *records: dict) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_around(tokenizer, pattern: str) -> None:
    """From now on the tokenizer writes special tokens around a text: "<bos> $A", for example."""
    special = {x: tokenizer.convert_tokens_to_ids(x) for x in pattern.split() if x != "$A"}
    processor = TemplateProcessing(single=pattern, special_tokens=list(special.items()))
    tokenizer.backend_tokenizer.post_processor = processor


def close(a: Tensor, b: Tensor, atol: float) -> None:
    """Asserts that no element differs by more than atol, and that shapes and dtypes agree."""
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def gradient(model, scalar: Tensor) -> Tensor:
    """The gradient of scalar in all parameters, as one vector. It leaves no .grad behind."""
    gradients = torch.autograd.grad(scalar, list(model.parameters()), materialize_grads=True)
    return torch.cat([x.flatten() for x in gradients])


def random_logprobs(N: int = 16, T: int = 12) -> tuple[Tensor, Tensor]:
    """Log-probs [N, T] in float64, to differentiate, and the mask of N completions of 1 to T."""
    logprobs = torch.randn(N, T).double().sub(2).requires_grad_()
    return logprobs, torch.arange(T) < torch.randint(1, T + 1, (N, 1))


def naive_logprobs(model, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """log pi of each token, [N, T]: the full log-softmax, one row at a time, no padding, no cache.

    With a picture, transformers finds the positions by itself.
    """
    rows, T = [], rollout.completion_ids.shape[1]
    for i, picture in enumerate(rollout.pictures):
        prompt = rollout.prompt_ids[i, rollout.prompt_mask[i]]  # [p]
        completion = rollout.completion_ids[i, rollout.completion_mask[i]]  # [t]
        ids, inputs = torch.cat([prompt, completion[:-1]])[None], {}  # [1, p + t - 1]
        if picture:
            inputs = picture | {"mm_token_type_ids": (ids == model.config.image_token_id).int()}
        model.base_model.rope_deltas = None  # what Qwen-VL remembers of the row before
        logits = model(ids, use_cache=False, **inputs).logits[0, len(prompt) - 1 :] / temperature
        logprobs = logits.log_softmax(-1).gather(1, completion[:, None]).squeeze(1)  # [t]
        rows.append(F.pad(logprobs, (0, T - len(completion))))
    return torch.stack(rows)


def make_rollout(prompts: list[list[int]], completions: list[list[int]], **fields) -> Rollout:
    """A rollout of N prompts and N completions, given as token ids.

    Its log-probs are 0, no row is truncated, the texts are empty and each row is alone in its
    group, unless `fields` says otherwise.
    """
    prompt_ids, prompt_mask = pad(prompts, "left", "cpu")
    completion_ids, completion_mask = pad(completions, "right", "cpu")
    defaults = {
        "logprobs": torch.zeros(completion_ids.shape),
        "truncated": torch.zeros(len(prompts), dtype=torch.bool),
        "texts": [""] * len(prompts),
    }
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        **defaults | fields,
    )


class ManyAs(TextTask):
    """The reward is the share of a's: a dense signal that a random model can climb in seconds."""

    def problem(self, index):
        return f"{index % 7}:", "a"

    def reward(self, completion, answer):
        return completion.count("a") / 8


def metrics(run) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv, without their empty cells."""
    names, *rows = [line.split(",") for line in (run.dir / "metrics.csv").read_text().splitlines()]
    rows = [zip(names, row, strict=True) for row in rows]
    return [{name: float(value) for name, value in row if value} for row in rows]


def run_script(script, tmp_path, monkeypatch, model_dir, task: TextTask, *flags):
    """Train with a script (its module) on a task object: three short steps, or what flags say.

    Gives the run and the rows of its metrics.csv, without that of step 0.
    """
    monkeypatch.setattr(script, "make_tasks", lambda name, eval_name: (task, task))
    small = ["--max-new-tokens", 8, "--steps", 3, "--prompts", 4]
    small += ["--eval-problems", 4, "--eval-samples", 2]
    small += ["--out", tmp_path / f"run{len(list(tmp_path.iterdir()))}"]
    flags = [str(flag) for flag in ["--model", model_dir, *small, *flags]]
    run = script.train(script.parse_args(flags))
    return run, metrics(run)[1:]
