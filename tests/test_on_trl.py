"""GPG and CoPG on TRL: the gradient that reaches the optimizer is that of gpg.py and copg.py.

With two processes, torchrun runs this file as a script, and its first process compares.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras"), str(ROOT / "tests")]

pytest.importorskip("trl", reason='pip install "trl==1.16.*"')

import on_trl  # noqa: E402
from accelerate.utils import gather_object  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import GRPOTrainer, RLOOTrainer  # noqa: E402

import common  # noqa: E402
import copg  # noqa: E402
import gpg  # noqa: E402
from common import Rollout, UserError  # noqa: E402
from tasks import TextTask  # noqa: E402

G, T = 4, 12
TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


class Bytes(TextTask):
    """Rewards that are pseudo-random, and equal (to .1) in two of three groups."""

    size = 40

    def problem(self, index):
        return "abcdefgh"[: 1 + index % 8] + f" {index}", f"{index}"

    def reward(self, completion, answer):
        return 0.1 if int(answer) % 3 else sum(map(ord, completion)) % 4 - 1.5


class Dead(Bytes):
    def reward(self, completion, answer):
        return 0.1


class Letters(Bytes):
    """The share of letters from a to p: easy to learn."""

    def reward(self, completion, answer):
        return sum("a" <= c <= "p" for c in completion) / T


for task in (Bytes, Dead, Letters):
    gymnasium.register(f"{task.__name__}-v0", entry_point=task)


class Gradient(TrainerCallback):
    """What the optimizer gets in the first step; unclipped with --max_grad_norm 0."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not hasattr(self, "gradient"):
            parameters = model.parameters()
            self.gradient = [None if p.grad is None else p.grad.clone() for p in parameters]


def flat(gradient) -> torch.Tensor:
    return torch.cat([x.flatten() for x in gradient])


def run_one_step(monkeypatch, command, base, flags):
    """-> (gradient of the first optimizer step, every call of TRL's own methods, trainer)."""
    calls, callback = {"ids": [], "rewards": []}, Gradient()
    generate, score = on_trl.COMMANDS[command][2], base._calculate_rewards
    turn = (base if command == "gpg" else on_trl.CoPGTrainer)._generate_single_turn

    def recorded_turn(self, prompt_ids, *args):
        out = turn(self, prompt_ids, *args)
        completion_ids = out[0] if command == "gpg" else out
        calls["ids"].append(gather_object(list(zip(prompt_ids, completion_ids, strict=True))))
        return out

    def recorded_rewards(self, *args):
        rewards = score(self, *args)
        calls["rewards"].append(rewards[:, 0].clone())
        return rewards

    def with_callback(*args):
        trainer = generate(*args)
        trainer.add_callback(callback)
        return trainer

    owner = base if command == "gpg" else on_trl.CoPGTrainer
    monkeypatch.setattr(owner, "_generate_single_turn", recorded_turn)
    monkeypatch.setattr(base, "_calculate_rewards", recorded_rewards)
    classes = on_trl.COMMANDS[command][:2]
    monkeypatch.setitem(on_trl.COMMANDS, command, (*classes, with_callback))
    trainer = on_trl.main([command, *flags])
    return callback.gradient, calls, trainer


def as_rollout(rows) -> Rollout:
    device = torch.device("cpu")
    prompts, completions = ([list(ids) for ids in column] for column in zip(*rows, strict=True))
    ids, mask = common.pad(completions, "right", device)
    return Rollout(
        *common.pad(prompts, "left", device), ids, mask, 0.0 * mask, ~mask[:, 0], [""] * len(ids)
    )


def gpg_gradient(model, calls, alpha=True, f_norm="1"):
    """As in gpg.train, of the rows that TRL has sampled; cut at B groups."""
    rewards = torch.cat(calls["rewards"]).view(-1, G)
    B = len(rewards) // len(calls["rewards"])
    rollout = as_rollout([row for rows in calls["ids"] for row in rows])
    valid = gpg.is_valid(rewards)
    groups = gpg.choose_groups(valid, B)[:B]
    rollout = rollout.rows((groups[:, None] * G + torch.arange(G)).flatten())
    advantages = gpg.group_advantages(rewards[groups], f_norm) * valid[groups, None]
    scale = gpg.gradient_scale(rewards[groups]) if alpha else 1.0
    logprobs = common.completion_logprobs(model, rollout)
    mask = rollout.completion_mask
    gpg.gpg_loss(logprobs, advantages.flatten(), mask, scale).backward()
    return [p.grad for p in model.parameters()], valid, scale


def copg_gradient(model, reference, calls, beta, K):
    """copg_loss of the rows that TRL was given, with the policy moved away from the reference."""
    rollout = as_rollout(calls["ids"][0])
    logratios = common.completion_logprobs(model, rollout).sum(1)
    logratios = logratios - common.completion_logprobs(reference, rollout).sum(1).detach()
    rewards = calls["rewards"][0].view(-1, K)
    copg.copg_loss(logratios.view(-1, K), rewards, beta).backward()
    return [p.grad for p in model.parameters()]


COMMON = [
    "--use_cpu", "--max_steps", "1", "--max_grad_norm", "0", "--report_to", "none",
    "--save_strategy", "no", "--gradient_checkpointing", "false", "--disable_tqdm", "true",
    "--dataloader_pin_memory", "false",
]  # fmt: skip
GPG_FLAGS = [*COMMON, "--num_generations", str(G), "--max_completion_length", str(T)]

CASES = {  # flags, and what the rollout has to show
    "alpha": ["--beta_th", "0"],
    "no alpha": ["--beta_th", "0", "--no_alpha"],
    "two rounds": ["--beta_th", "0.4", "--max_rounds", "2"],
    "more than B valid": ["--beta_th", "1", "--max_rounds", "4"],
    "std": ["--beta_th", "0", "--f_norm", "std"],
    "accumulation": ["--beta_th", "0.4", "--gradient_accumulation_steps", "3"],
}
WRONG = {"grpo": ["--loss_type", "grpo"], "bnpo": ["--loss_type", "bnpo"]}


def gpg_difference(monkeypatch, directory, out, name, rows=24) -> dict:
    """The largest difference from gpg.py's gradient, over the norm of that."""
    flags = (CASES | WRONG)[name]
    if name in ("accumulation", *WRONG):
        rows //= 3
        flags = [*flags] + ["--gradient_accumulation_steps", "3"] * (name in WRONG)
    rows //= int(os.environ.get("WORLD_SIZE", "1"))
    flags = [*GPG_FLAGS, *flags, "--per_device_train_batch_size", str(rows)]
    flags += ["--model", str(directory), "--task", "Bytes-v0", "--output_dir", str(out)]
    gradient, calls, trainer = run_one_step(monkeypatch, "gpg", GRPOTrainer, flags)
    model, _ = common.load_model(str(directory), "cpu")
    f_norm = "std" if "std" in flags else "1"
    right, valid, alpha = gpg_gradient(model, calls, "--no_alpha" not in flags, f_norm)
    right, gradient = flat(right), flat(gradient)
    history = trainer.state.log_history[0]
    return {
        "difference": ((gradient - right).norm() / right.norm()).item(),
        "rounds": len(calls["rewards"]), "alpha": alpha, "valid": int(valid.sum()),
        "groups": len(valid), "logged": [history[x] for x in ("alpha", "rounds", "valid_share")],
    }  # fmt: skip


def copg_difference(monkeypatch, directory, out, K, rows=24) -> float:
    rows //= int(os.environ.get("WORLD_SIZE", "1"))
    data = Path(out).with_suffix(".jsonl")
    lines = [
        {"prompt": f"p{i}" * (1 + i % 3), "completions": [f"{i}" * (1 + j) for j in range(K)]}
        | {"rewards": [((7 * i + 3 * j) % 5) / 5 for j in range(K)]}
        for i in range(40)
    ]
    data.write_text("\n".join(map(json.dumps, lines)) + "\n")
    flags = [*COMMON, "--num_generations", str(K), "--per_device_train_batch_size", str(rows // 2)]
    flags += ["--gradient_accumulation_steps", "2", "--model", str(directory), "--beta", "0.3"]
    flags += ["--data", str(data), "--output_dir", str(out)]
    moved, reference = (common.load_model(str(directory), "cpu")[0] for _ in range(2))
    move(moved)
    make = on_trl.COMMANDS["copg"][2]

    def away_from_the_reference(*args):
        trainer = make(*args)
        move(trainer.model)
        return trainer

    classes = on_trl.COMMANDS["copg"][:2]
    monkeypatch.setitem(on_trl.COMMANDS, "copg", (*classes, away_from_the_reference))
    gradient, calls, _ = run_one_step(monkeypatch, "copg", RLOOTrainer, flags)
    right = flat(copg_gradient(moved, reference, calls, 0.3, K))
    return ((flat(gradient) - right).norm() / right.norm()).item()


def move(model) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)


def torchrun(*command, **environment) -> str:
    """Two processes; -> what they print. 29500 may be in use: torchrun chooses a port."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | environment
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*program, *map(str, command)], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture
def directory(model_dirs):
    return model_dirs["qwen2"]


@pytest.mark.parametrize("name", CASES)
def test_gpg_gradient(name, directory, tmp_path, monkeypatch):
    result = gpg_difference(monkeypatch, directory, tmp_path / "out", name)
    check(name, result)


def check(name, result):
    assert result["difference"] < 1e-5, result
    if name == "no alpha":
        assert result["alpha"] == 1.0 and result["valid"] < result["groups"]
    elif name == "more than B valid":
        assert result["valid"] > result["groups"] / result["rounds"]
    else:
        assert result["alpha"] > 1.0
    share = result["valid"] / result["groups"]
    assert result["logged"] == pytest.approx([result["alpha"], result["rounds"], share])


@pytest.mark.parametrize("name", WRONG)
def test_other_losses_of_trl_are_not_gpg(name, directory, tmp_path, monkeypatch):
    assert gpg_difference(monkeypatch, directory, tmp_path / "out", name)["difference"] > 1e-3


@pytest.mark.parametrize("K", [2, 4])
def test_copg_gradient(K, directory, tmp_path, monkeypatch):
    assert copg_difference(monkeypatch, directory, tmp_path / "out", K) < 1e-5


if __name__ == "__main__":
    directory, out, *names = sys.argv[1:]
    results = {}
    for name in names:
        with pytest.MonkeyPatch.context() as patch:
            if name.startswith("K="):
                result = copg_difference(patch, directory, f"{out}/{name}", int(name[2:]))
            else:
                result = gpg_difference(patch, directory, f"{out}/{name}", name)
        results[name] = result
    if os.environ["RANK"] == "0":
        print("RESULTS" + json.dumps(results))
