"""A stage on which the scripts train: a policy simple enough to compute by hand, everything
recorded. The tests of each script check what is recorded."""

import json
import statistics
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from helpers import metrics
from transformers import GenerationConfig, PretrainedConfig

import common
import copg
import gpg
import grpo
from common import Rollout
from tasks import TextTask, first_problem
from tasks.prompts import encode_prompts
from tasks.tiny import tiny_tokenizer

V = 258

OTHER_FLAGS = ["--no-chat-template", "--system", "Be brief.", "--grad-checkpointing"]


class Bigrams(torch.nn.Module):
    """A policy that sees only the token before the next one."""

    device = torch.device("cpu")
    config = PretrainedConfig(max_position_embeddings=512)
    generation_config = GenerationConfig()

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.theta = torch.nn.Parameter(torch.randn(V, V, generator=generator))

    def get_input_embeddings(self):
        return SimpleNamespace(weight=self.theta)

    def save_pretrained(self, path):
        path.mkdir()


def bigram_logprobs(theta, rollout, temperature=1.0):
    before = torch.cat([rollout.prompt_ids[:, -1:], rollout.completion_ids[:, :-1]], 1)
    logprobs = (theta[before] / temperature).log_softmax(-1)  # [N, T, V]
    logprobs = logprobs.gather(2, rollout.completion_ids[..., None]).squeeze(2)
    return logprobs.masked_fill(~rollout.completion_mask, 0.0)


class Row(NamedTuple):
    """A completion, as the tests compute with it."""

    text: str
    before: int  # the last token of the prompt
    tokens: list[int]
    old: torch.Tensor  # log-probs of the sampler
    reward: float
    cut: bool = False  # at max_new_tokens

    def logprobs(self, theta, temperature=1.0):
        before = [self.before, *self.tokens[:-1]]
        return (theta[before] / temperature).log_softmax(-1)[range(len(before)), self.tokens]


class Numbered(TextTask):
    """The sampler below writes the reward into the completion; the problem adds its own."""

    def problem(self, index):
        return f"{self.split} {index}", str(index)

    def reward(self, completion, answer):
        return float(completion.split()[0]) + int(answer) % 5


class Stage:
    """Stands in for models, sampler, scorer and evaluation, and records every call."""

    def __init__(self, monkeypatch, tmp_path):
        self.patch, self.out = monkeypatch, tmp_path / "run"
        self.tokenizer = tiny_tokenizer()
        self.plan = []  # of each call of the sampler: which groups are valid; empty: all
        self.loads, self.models, self.tasks, self.samples = [], [], [], []
        self.scored, self.pending, self.updates, self.evaluations = [], [], [], []
        clip, stage = torch.nn.utils.clip_grad_norm_, self

        class AdamW(torch.optim.AdamW):
            def step(self):
                (group,) = self.param_groups
                assert stage.updates[-1].keys().isdisjoint({"lr", "clipped"})  # one step per clip
                stage.updates[-1] |= {"lr": group["lr"], "clipped": group["params"][0].grad.clone()}
                stage.optimizer = self
                super().step()

        def clip_and_record(parameters, max_norm, error_if_nonfinite=False):
            (theta,) = parameters
            self.updates.append({"theta": theta.detach().double(), "grad": theta.grad.clone()})
            self.updates[-1] |= {"max_norm": max_norm, "rows": self.pending}
            self.pending = []
            assert error_if_nonfinite
            return clip([theta], max_norm)

        monkeypatch.setattr(torch.optim, "AdamW", AdamW)
        for module in (gpg, grpo, copg):
            monkeypatch.setattr(module, "clip_grad_norm_", clip_and_record)
        names = ("make_task", "make_tasks", "load_model", "sample", "completion_logprobs")
        for module in (common, gpg, grpo, copg):
            for name in (*names, "evaluate"):
                if hasattr(module, name) and (module, name) != (copg, "evaluate"):
                    monkeypatch.setattr(module, name, getattr(self, name))

    def make_task(self, name, split="train"):
        self.tasks.append((name, split))
        return Numbered(split)

    def make_tasks(self, name, eval_name):
        return self.make_task(name), self.make_task(eval_name or name, "test")

    def load_model(self, *args, **kwargs):
        self.loads.append((*args, *kwargs.values()))
        self.models.append(Bigrams(len(self.models)))
        return self.models[-1], self.tokenizer

    def evaluate(self, model, tokenizer, task, args):
        self.evaluations.append((model, tokenizer, task.split, args))
        greedy = len(self.evaluations) / 8
        return {"eval_accuracy": 0.25, "eval_accuracy_stderr": 0.125, "eval_greedy": greedy}

    def sample(self, model, tokenizer, prompts, group_size, max_new_tokens, temperature=1.0):
        """Random tokens, lengths and rewards. The log-probs are those of a somewhat older policy:
        a ratio starts away from 1."""
        N, T = len(prompts) * group_size, max_new_tokens - 1  # no row is as long as it may be
        valid = self.plan.pop(0) if self.plan else [True] * len(prompts)
        rewards = torch.randn(len(prompts), group_size)
        rewards[~torch.tensor(valid).bool()] = -1
        call = {"model": model, "prompts": prompts, "group_size": group_size}
        call |= {"T": max_new_tokens, "temperature": temperature, "seed": torch.initial_seed()}
        n = len(self.samples)  # no two texts are equal
        texts = [f"{r:.2f} {n}.{i}" for i, r in enumerate(rewards.flatten().tolist())]
        prompt = encode_prompts(model, tokenizer, prompts, T)[:2]
        prompt = [x.repeat_interleave(group_size, 0) for x in prompt]
        ids, lengths = torch.randint(200, (N, T)), torch.randint(1, T + 1, (N, 1))
        mask = torch.arange(T) < lengths
        group = torch.arange(len(prompts)).repeat_interleave(group_size)
        zeros, truncated = torch.zeros(N, T), torch.rand(N) < 0.4
        rollout = Rollout(*prompt, ids, mask, zeros, truncated, texts, group)
        logprobs = bigram_logprobs(model.theta.detach(), rollout, temperature)
        rollout.logprobs = (logprobs + 0.4 * torch.randn(N, T)) * mask
        call["groups"] = groups = [[] for _ in prompts]
        for i, text in enumerate(texts):
            n, reward = int(lengths[i]), float(text.split()[0])
            reward += int(prompts[i // group_size].split()[-1]) % 5
            row = text, int(rollout.prompt_ids[i, -1]), ids[i, :n].tolist(), rollout.logprobs[i, :n]
            groups[i // group_size].append(Row(*row, reward, rollout.truncated[i].item()))
        call["truncated"] = rollout.truncated.tolist()
        self.samples.append(call)
        return rollout

    def completion_logprobs(self, model, rollout, temperature=1.0):
        training = torch.is_grad_enabled()
        self.scored.append((model, training, temperature, rollout.texts))
        if training:
            assert model is self.models[0]
            assert self.pending or model.theta.grad is None  # no gradient of an earlier update
            self.pending = self.pending + rollout.texts
        return bigram_logprobs(model.theta, rollout, temperature)

    def train(self, script, *flags):
        """-> run, rows of metrics.csv without step 0's, records of samples.jsonl."""
        self.models.clear()
        self.loads.clear()
        flags = ["--model", "m", "--out", self.out, "--eval-every", 2, *flags]
        self.args = script.parse_args([str(flag) for flag in flags])
        run = script.train(self.args)
        samples = [json.loads(x) for x in (run.dir / "samples.jsonl").read_text().splitlines()]
        return run, metrics(run), samples

    def check_calls(self, B, rounds):
        """Tasks, prompts and settings of a run that samples in `rounds` of each step."""
        args = self.args
        assert self.tasks == [(args.task, "train"), (args.task, "test")]
        assert all(call["model"] is self.models[0] for call in self.samples)
        prompts = [prompt for call in self.samples for prompt in call["prompts"]]
        start = first_problem(args.seed)
        assert prompts == [f"train {start + i}" for i in range(B * sum(rounds))]
        for call in self.samples:
            assert (call["T"], call["seed"]) == (args.max_new_tokens, args.seed)

    def check_updates(self, losses, rates):
        """losses(i, theta): the loss of update i, to differentiate; rates: the learning rates.
        -> the value of each loss, and the norm of each gradient."""
        values, norms = [], []
        for i, (update, rate) in enumerate(zip(self.updates, rates, strict=True)):
            theta = update["theta"].requires_grad_()
            loss = losses(i, theta)
            (expected,) = torch.autograd.grad(loss, theta)
            norm = expected.norm().item()
            torch.testing.assert_close(
                update["grad"].double(), expected, atol=1e-5 * norm, rtol=1e-4
            )
            assert update["max_norm"] == self.args.clip_grad
            clipped = pytest.approx(min(norm, self.args.clip_grad), rel=1e-3)
            assert update["clipped"].norm().item() == clipped
            assert update["lr"] == pytest.approx(rate, rel=1e-6, abs=1e-12)
            values.append(loss.item())
            norms.append(norm)
        assert statistics.median(norms) > 2 * self.args.clip_grad
        settings = {"betas": (0.9, 0.999), "eps": 1e-8, "fused": True, "amsgrad": False}
        settings |= {"weight_decay": self.args.weight_decay, "maximize": False}
        assert settings.items() <= self.optimizer.defaults.items()
        return values, norms

    def check_log(self, run, rows, samples, rounds):
        """The columns and samples that every sampling script writes, recomputed from the calls."""
        calls, total = iter(self.samples), 0
        for step, (row, n) in enumerate(zip(rows[1:], rounds, strict=True), 1):
            batches = [next(calls) for _ in range(n)]
            groups = [group for call in batches for group in call["groups"]]
            rewards = [[row.reward for row in group] for group in groups]
            tokens = sum(len(row.tokens) for group in groups for row in group)
            cut = [x for call in batches for x in call["truncated"]]
            total += tokens
            expected = {
                "step": step,
                "reward_mean": statistics.mean(r for group in rewards for r in group),
                "reward_std": statistics.mean(statistics.stdev(group) for group in rewards),
                "entropy": -sum(row.old.sum().item() for g in groups for row in g) / tokens,
                "completion_length": tokens / len(cut),
                "truncated_share": sum(cut) / len(cut),
            }
            for name, value in expected.items():
                assert row[name] == pytest.approx(value, rel=1e-4), name
            assert row["tokens_per_second"] * row["seconds"] == pytest.approx(tokens, rel=1e-3)
            shown = [s for s in samples if s["step"] == step and "group" in s]
            kept, G = [row for group in groups[:3] for row in group], len(groups[0])
            prompts = [prompt for call in batches for prompt in call["prompts"]]
            assert [s["completion"] for s in shown] == [row.text for row in kept]
            assert [s["group"] for s in shown] == [i // G for i in range(len(kept))]
            assert [s["prompt"] for s in shown] == [prompts[s["group"]] for s in shown]
            assert [s["reward"] for s in shown] == pytest.approx([r.reward for r in kept], abs=1e-5)
            assert [s["prompt_tokens"][-1] for s in shown] == [row.before for row in kept]
            assert [s["tokens"] for s in shown] == [row.tokens for row in kept]
            for s, row in zip(shown, kept, strict=True):
                assert s["logprobs"] == pytest.approx(row.old.tolist(), abs=1e-3)
            assert [s["truncated"] for s in shown] == cut[: len(kept)]
        assert sum(row["tokens"] for row in run.rows[1:]) == total and next(calls, None) is None

    def check_evaluations(self, rows, columns):
        """Before the first step, every second step and after the last, on the test split."""
        evaluated = [row for i, row in enumerate(rows) if i % 2 == 0 or i == len(rows) - 1]
        assert [row for row in rows if columns[0] in row] == evaluated
        for (model, tokenizer, split, args), row in zip(self.evaluations, evaluated, strict=True):
            assert model is self.models[0] and tokenizer is self.tokenizer
            assert split == "test" and args is self.args
            assert all(name in row for name in columns)
