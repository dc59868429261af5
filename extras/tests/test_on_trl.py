"""GPG and CoPG on TRL: the gradient that reaches the optimizer is that of gpg.py and copg.py.

With two processes, torchrun runs this file as a script, and its first process compares.
"""

import importlib.util
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras"), str(ROOT / "tests")]

pytest.importorskip("trl", reason='pip install "trl==1.16.*"')

import on_trl  # noqa: E402
from accelerate.commands.launch import launch_command_parser  # noqa: E402
from accelerate.utils import gather_object  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import GRPOTrainer, RLOOTrainer  # noqa: E402

import common  # noqa: E402
import copg  # noqa: E402
import gpg  # noqa: E402
from common import Rollout  # noqa: E402
from run import plain_errors  # noqa: E402
from tasks import TextTask, UserError, get_prompts, get_rewards, make_task  # noqa: E402
from tasks.pairs import Record  # noqa: E402
from tasks.prompts import encode_prompts, end_of_answer, pad  # noqa: E402

G, T = 4, 12
TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


class Bytes(TextTask):
    """Rewards that are pseudo-random, and equal (to .1) in two of three groups."""

    size = 40

    def problem(self, index):
        return "abcdefgh"[: 1 + index % 8] + f" {index}", f"{index}"

    def reward(self, completion, answer):
        return 0.1 if int(answer) % 3 else sum(map(ord, completion)) % 4 - 1.5


class Fading(Bytes):
    live = True

    def reward(self, completion, answer):
        return sum(map(ord, completion)) % 4 - 1.5 if self.live else 0.1


for task in (Bytes, Fading):
    gymnasium.register(f"{task.__name__}-v0", entry_point=task)


class Gradient(TrainerCallback):
    """What the optimizer gets in the first step; unclipped with --max_grad_norm 0."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not hasattr(self, "gradient"):
            parameters = model.parameters()
            self.gradient = [None if p.grad is None else p.grad.clone() for p in parameters]


def flat(gradient) -> torch.Tensor:
    return torch.cat([x.flatten() for x in gradient if x is not None])  # None: frozen


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
    ids, mask = pad(completions, "right", device)
    zeros, texts = torch.zeros(mask.shape), [""] * len(ids)
    return Rollout(*pad(prompts, "left", device), ids, mask, zeros, ~mask[:, 0], texts)


def gpg_gradient(model, calls, alpha=True, f_norm="1"):
    """As in gpg.train, of the rows that TRL has sampled; cut at B groups."""
    prompts = [[tuple(prompt) for prompt, _ in rows] for rows in calls["ids"]]
    for rows in prompts:  # groups are side by side, and every round has prompts of its own
        assert len(set(rows)) == len(rows) // G and rows == [p for p in rows[::G] for _ in range(G)]
    assert len(prompts) == 1 or set(prompts[0]) != set(prompts[1])
    rewards = torch.cat(calls["rewards"]).view(-1, G)
    B = len(rewards) // len(calls["rewards"])
    rollout = as_rollout([row for rows in calls["ids"] for row in rows])
    valid = gpg.is_valid(rewards)
    groups = gpg.fill_batch(valid, B)[:B]
    rollout = rollout.select((groups[:, None] * G + torch.arange(G)).flatten())
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
    "two rounds": ["--beta_th", "0.9", "--max_rounds", "2", "--seed", "6"],
    "more than B valid": ["--beta_th", "1", "--max_rounds", "4"],
    "std": ["--beta_th", "0", "--f_norm", "std"],
    "accumulation": ["--beta_th", "0.9", "--max_rounds", "2", "--seed", "6"],
}
LORA = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"]
if importlib.util.find_spec("peft"):
    CASES["LoRA"] = ["--beta_th", "0", *LORA]
WRONG = {"grpo": ["--loss_type", "grpo"], "bnpo": ["--loss_type", "bnpo"]}


def gpg_difference(monkeypatch, directory, out, name, rows=36) -> dict:
    """The largest difference from gpg.py's gradient, over the norm of that."""
    flags = (CASES | WRONG)[name]
    if name in ("accumulation", *WRONG):
        rows, flags = rows // 3, [*flags, "--gradient_accumulation_steps", "3"]
    rows //= int(os.environ.get("WORLD_SIZE", "1"))
    flags = [*GPG_FLAGS, *flags, "--per_device_train_batch_size", str(rows)]
    flags += ["--model", str(directory), "--task", "Bytes-v0", "--output_dir", str(out)]
    if name == "LoRA":
        begin_elsewhere(monkeypatch, "gpg")
    gradient, calls, trainer = run_one_step(monkeypatch, "gpg", GRPOTrainer, flags)
    model, _ = common.load_model(str(directory), "cpu")
    if name == "LoRA":
        with_adapters(model, trainer)
    f_norm = "std" if "std" in flags else "1"
    right, valid, alpha = gpg_gradient(model, calls, "--no_alpha" not in flags, f_norm)
    right, gradient = flat(right), flat(gradient)
    history = trainer.state.log_history[0]
    return {
        "difference": ((gradient - right).norm() / right.norm()).item(),
        "rounds": len(calls["rewards"]), "alpha": alpha, "valid": int(valid.sum()),
        "groups": len(valid), "logged": [history[x] for x in ("alpha", "rounds", "valid_share")],
    }  # fmt: skip


def copg_difference(monkeypatch, directory, out, K, lora=False, rows=12) -> float:
    rows_of_a_step = rows
    rows //= int(os.environ.get("WORLD_SIZE", "1"))
    data = Path(out).with_suffix(".jsonl")
    lines = [
        {"prompt": f"p{i}" * (1 + i % 3), "completions": [f"{i}" * (1 + j) for j in range(K)]}
        | {"rewards": [((7 * i + 3 * j) % 5) / 5 for j in range(K)]}
        for i in range(40)
    ]
    for i, line in enumerate(lines) if K > 2 else []:  # cut, or ended by another stop token
        line["ends"] = [(256, -1, 7)[(i + j) % 3] for j in range(K)]
    data.write_text("\n".join(map(json.dumps, lines)) + "\n")
    flags = [*COMMON, "--num_generations", str(K), "--per_device_train_batch_size", str(rows // 2)]
    flags += ["--gradient_accumulation_steps", "2", "--model", str(directory), "--beta", "0.3"]
    flags += ["--data", str(data), "--output_dir", str(out)]
    flags += LORA if lora else []
    moved, reference = (common.load_model(str(directory), "cpu")[0] for _ in range(2))
    begin_elsewhere(monkeypatch, "copg")
    gradient, calls, trainer = run_one_step(monkeypatch, "copg", RLOOTrainer, flags)
    with_adapters(moved, trainer) if lora else move(moved)
    given = {}  # (prompt's ids, completion's ids) as copg.py encodes them -> reward
    for line in lines:
        ends = line.get("ends") or [end_of_answer(trainer.processing_class)] * K
        record = Record(line["prompt"], line["completions"], ends=ends)
        rows = copg.encode(moved, trainer.processing_class, [record])
        for i in range(K):
            pair = (
                rows.prompt_ids[i].tolist(),
                rows.completion_ids[i][rows.completion_mask[i]].tolist(),
            )
            given[str(pair)] = line["rewards"][i]
    scores = [given[str((list(a), list(b)))] for a, b in calls["ids"][0]]
    assert scores == pytest.approx(calls["rewards"][0].tolist())
    assert len({str(row) for row in calls["ids"][0]}) == rows_of_a_step
    right = flat(copg_gradient(moved, reference, calls, 0.3, K))
    return ((flat(gradient) - right).norm() / right.norm()).item()


def begin_elsewhere(monkeypatch, command) -> None:
    """The policy of the next trainer is not its reference; new adapters would do nothing."""
    *classes, make = on_trl.COMMANDS[command]

    def moved(*args):
        trainer = make(*args)
        move(trainer.model)
        return trainer

    monkeypatch.setitem(on_trl.COMMANDS, command, (*classes, moved))


def move(model) -> None:
    """Its parameters that are trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p += 0.02 * torch.randn(p.shape, generator=generator)


def with_adapters(model, trainer) -> None:
    """Put the trainer's adapters into the layers of a model. The one step has not moved them: the
    learning rate begins at 0."""
    from peft import PeftModel

    trainer.accelerator.wait_for_everyone()  # the first process writes
    folder = f"{trainer.args.output_dir}/adapter"
    PeftModel.from_pretrained(model, folder, is_trainable=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all(p.abs().max() > 0 for p in trained.values())
    assert all("lora" in name for name in trained)


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
        assert result["alpha"] > 1.0 and result["rounds"] == 1 + ("--max_rounds" in CASES[name])
    share = result["valid"] / result["groups"]
    assert result["logged"] == pytest.approx([result["alpha"], result["rounds"], share])


@pytest.mark.parametrize("name", WRONG)
def test_other_losses_of_trl_are_not_gpg(name, directory, tmp_path, monkeypatch):
    assert gpg_difference(monkeypatch, directory, tmp_path / "out", name)["difference"] > 1e-3


@pytest.mark.parametrize("K", [2, 4])
def test_copg_gradient(K, directory, tmp_path, monkeypatch):
    assert copg_difference(monkeypatch, directory, tmp_path / "out", K) < 1e-5


def test_copg_gradient_of_adapters(directory, tmp_path, monkeypatch):
    """The reference is the model without them."""
    pytest.importorskip("peft")
    assert copg_difference(monkeypatch, directory, tmp_path / "out", 2, lora=True) < 1e-5


def test_adapters_are_merged_into_the_model_that_is_saved(directory, tmp_path):
    """With a base in bf16, too, which would round the sum. Nothing but the adapters is trained."""
    peft = pytest.importorskip("peft")
    flags = [*GPG_FLAGS, *LORA, "--model", str(directory), "--output_dir", str(tmp_path / "out")]
    flags += ["--task", "Bytes-v0", "--per_device_train_batch_size", "24", "--max_steps", "3"]
    flags += ["--warmup_steps", "0", "--learning_rate", "1e-2", "--lora_alpha", "8"]
    on_trl.main(["gpg", *flags, "--model_init_kwargs", '{"dtype": "bfloat16"}'])
    merged, _ = common.load_model(str(tmp_path / "out"), "cpu")
    model, _ = common.load_model(str(directory), "cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16().float())
    assert torch.equal(merged.get_input_embeddings().weight, model.get_input_embeddings().weight)
    rollout = as_rollout([([65, 66], [97 + i, 98, 99 + i]) for i in range(8)])
    scores = [common.completion_logprobs(x, rollout).detach() for x in (model, merged)]
    peft.PeftModel.from_pretrained(model, tmp_path / "out" / "adapter")
    with_adapters = common.completion_logprobs(model, rollout).detach()
    assert (scores[0] - scores[1]).abs().max() > 0.05
    torch.testing.assert_close(with_adapters, scores[1], atol=1e-4, rtol=0)


def dead_steps(directory, out, deepspeed=False) -> list[bool]:
    """Two live steps, two dead ones, a live one: does each of the five move a weight?"""
    weights = []

    class Weights(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
            Fading.live = len(weights) not in (3, 4)

        def on_train_end(self, args, state, control, model=None, **kwargs):
            self.on_step_begin(args, state, control, model)

    flags = [*GPG_FLAGS, "--model", str(directory), "--output_dir", str(out), "--max_steps", "5"]
    flags += ["--task", "Fading-v0", "--beta_th", "0", "--learning_rate", "1e-3"]
    flags += ["--weight_decay", "0.1", "--warmup_steps", "0", "--max_grad_norm", "1"]
    flags += ["--gradient_accumulation_steps", "2"]
    make, compute_loss = on_trl.COMMANDS["gpg"][2], on_trl.GPGTrainer.compute_loss

    def watched(*args):
        trainer = make(*args)
        trainer.add_callback(Weights())
        return trainer

    def under_deepspeed(self, *args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self, "is_deepspeed_enabled", deepspeed)
            return compute_loss(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(on_trl.COMMANDS, "gpg", (*on_trl.COMMANDS["gpg"][:2], watched))
        patch.setattr(on_trl.GPGTrainer, "compute_loss", under_deepspeed)
        trainer = on_trl.main(["gpg", *flags])
    history = trainer.state.log_history[:5]
    (steps,) = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == (5 if deepspeed else 3)  # else Adam's moments fade in a dead step
    assert [row["alpha"] == 0 for row in history] == [False, False, True, True, False]
    assert [row["grad_norm"] == 0 for row in history] == [False, False, True, True, False]
    return [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]


MOVES = [True, True, False, False, True]


@pytest.mark.parametrize("deepspeed", [False, True])
def test_a_step_without_a_valid_group_moves_nothing(deepspeed, directory, tmp_path):
    """DeepSpeed itself is not there: this is the branch that is made for it."""
    assert dead_steps(directory, tmp_path / "out", deepspeed) == MOVES


LETTERS = """
import gymnasium
from tasks import TextTask

class Vowels(TextTask):
    size = 64

    def problem(self, index):
        return f"{index}", ""

    def reward(self, completion, answer):
        return sum("a" <= c <= "p" for c in completion) / (12 if self.split == "train" else 24)

gymnasium.register("Vowels-v0", entry_point=Vowels)
"""
LEARN = [
    *GPG_FLAGS, "--model", "first/checkpoint", "--task", "letters:Vowels-v0", "--output_dir",
    "second", "--learning_rate", "3e-3", "--max_steps", "25", "--warmup_steps", "2",
    "--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "64",
    "--max_grad_norm", "1", "--logging_steps", "5", "--eval_strategy", "steps", "--eval_steps",
    "25", "--eval_on_start", "true",
]  # fmt: skip


@pytest.fixture(scope="module")
def two_processes(model_dirs, tmp_path_factory):
    """All that two processes do, in one start: -> (what they print, their folder)."""
    folder, directory = tmp_path_factory.mktemp("two"), model_dirs["qwen2"]
    (folder / "letters.py").write_text(LETTERS)
    flags = ["--model", str(directory), "--task", "letters:Vowels-v0", "--max-new-tokens", "12"]
    flags += ["--steps", "1", "--eval-problems", "4", "--prompts", "4", "--lr", "1e-3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        gpg.train(gpg.parse_args([*flags, "--device", "cpu", "--out", "first"]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    names = [*CASES, "bnpo", "K=2", "K=4", *(["K=2 LoRA"] if "LoRA" in CASES else [])]
    names += ["dead", "learn"]  # the last one ends the process group
    result = subprocess.run(
        [*program, __file__, str(directory), str(folder), *names],
        capture_output=True, text=True, env=environment, cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.split("RESULTS")[1].splitlines()[0]), folder


@pytest.mark.parametrize("name", CASES)
def test_gpg_gradient_with_two_processes(name, two_processes):
    check(name, two_processes[0][name])


def test_copg_and_the_rest_with_two_processes(two_processes):
    results, _ = two_processes
    assert results["K=2"] < 1e-5 and results["K=4"] < 1e-5 and results.get("K=2 LoRA", 0) < 1e-5
    assert results["bnpo"]["difference"] > 1e-3
    assert results["dead"] == MOVES


def test_from_a_checkpoint_of_gpg_to_trl_and_back(two_processes, monkeypatch):
    """Two processes learn in 25 steps, from gpg.py's directory to one that gpg.py loads."""
    monkeypatch.chdir(two_processes[1])
    log = json.loads(Path("second/trainer_state.json").read_text())["log_history"]
    rewards = [row["reward"] for row in log if "reward" in row]  # each a mean of five steps
    assert len(rewards) == 5 and rewards[-1] > rewards[0] + 0.2, rewards
    before, after = (row["eval_reward"] for row in log if "eval_reward" in row)
    assert after > before + 0.2
    (first, _), (model, tokenizer) = (
        common.load_model(x, "cpu") for x in ("first/checkpoint", "second")
    )
    assert 0 < (first.lm_head.weight - model.lm_head.weight).abs().max() < 25 * 3e-3 * 2
    task = make_task("letters:Vowels-v0", "test")
    texts = common.sample(model, tokenizer, get_prompts(task, range(64)), 1, T).texts
    mean = get_rewards(task, range(64), texts)[0].mean().item()
    assert mean == pytest.approx(after, abs=0.1)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_bridge_from_a_task(template, directory, tmp_path, monkeypatch):
    """Prompts as gpg.py encodes them, and each completion rewarded for its own problem."""
    model, tokenizer = common.load_model(str(directory), "cpu")
    tokenizer.chat_template = template
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    flags = [*GPG_FLAGS, "--task", "Bytes-v0", "--per_device_train_batch_size", "24"]
    flags += ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    _, calls, _ = run_one_step(monkeypatch, "gpg", GRPOTrainer, flags)
    task = make_task("Bytes-v0")
    prompts = get_prompts(task, range(40))
    ids, mask, _ = encode_prompts(model, tokenizer, prompts, 0)
    rows = [tuple(row[here].tolist()) for row, here in zip(ids, mask, strict=True)]
    rewards = torch.cat(calls["rewards"]).tolist()
    for (prompt, completion), reward in zip(itertools.chain(*calls["ids"]), rewards, strict=True):
        text = tokenizer.decode(completion).removesuffix(tokenizer.eos_token)
        problem = rows.index(tuple(prompt))
        assert get_rewards(task, [problem], [text])[0].item() == pytest.approx(reward)
    assert len({tuple(prompt) for prompt, _ in calls["ids"][0]}) == 6
    ends = [completion[-1] == 256 for _, completion in calls["ids"][0]]
    lengths = [len(completion) for _, completion in calls["ids"][0]]
    assert all(end or length == T for end, length in zip(ends, lengths, strict=True))


PAGE = (ROOT / "docs" / "scaling.md").read_text()


def test_the_page_names_options_that_exist_with_these_values():
    rows = re.findall(r"\| `(\w+)=(\S+)` \|", PAGE)
    assert len(rows) > 8
    for name, value in rows:
        configs = [c for c in (on_trl.GPGConfig, on_trl.CoPGConfig) if hasattr(c, name)]
        assert any(repr(getattr(config, name)) == value for config in configs), name


def test_the_commands_of_the_page_parse():
    commands = re.findall(r"(python|accelerate launch) (.*)extras/on_trl.py (gpg|copg)(.*)", PAGE)
    assert {(start, command) for start, _, command, _ in commands} == {
        *itertools.product(("python", "accelerate launch"), ("gpg", "copg"))
    }
    zero3, bf16 = re.search(r'ZERO3="(.*)"', PAGE)[1], re.search(r"BF16='(.*)'", PAGE)[1]
    for start, launch, command, flags in commands:
        if start != "python":
            launch = launch.replace("$ZERO3", zero3)
            parsed = launch_command_parser().parse_args([*launch.split(), "script"])
            assert parsed.num_processes == 8 and parsed.zero_stage == 3
            assert parsed.training_script == "script"
        parser = on_trl.Parser(on_trl.COMMANDS[command][:2])
        args, unknown = parser.parse_known_args(flags.replace("$BF16", bf16).split())
        assert not unknown
        if args.use_peft:
            assert json.loads(args.model_init_kwargs) == {"dtype": "bfloat16"}


def test_the_memory_on_the_page():
    """18 P and 2 P + 16 A, and what they leave 4 GiB of."""
    rows = [[cell.strip() for cell in line.split("|")] for line in PAGE.splitlines()]
    rows = [row[1:8] for row in rows if len(row) == 9 and re.match(r"\S+ \(\d+M\)", row[1])]
    assert len(rows) == 6
    for name, full, A, lora, *fits in rows:
        P, A = float(re.search(r"\((\d+)M\)", name)[1]), float(A[:-1])
        full_now, lora_now = 18e6 * P / 2**30, (2e6 * P + 16e6 * A) / 2**30
        assert float(full) == pytest.approx(full_now, abs=0.06)
        assert float(lora) == pytest.approx(lora_now, abs=0.06)
        for size, said in zip((16, 24, 80), fits, strict=True):
            best = "all weights" if full_now + 4 < size else "LoRA" if lora_now + 4 < size else ""
            assert said == best


PAIRS = [{"prompt": f"{i}", "completions": ["a", "b"]} for i in range(20)]
SCORED = [row | {"rewards": [1.0, 0.0]} for row in PAIRS]
BAD = [
    ("", "required: command"),
    ("sft --task add", "invalid choice: 'sft'"),
    ("gpg --num_iterations 2", "--num_iterations"),
    ("gpg --steps_per_generation 2", "a batch is one step"),
    ("gpg --beta_th 2", "--beta_th"),
    ("gpg --max_rounds 0", "--max_rounds"),
    ("gpg --scale_rewards batch", "--f_norm"),
    ("gpg --f_norm mean", "invalid choice"),
    ("gpg --betath 1", "--betath"),
    ("gpg --per_device_train_batch_size 12", "divisible by num_generations"),
    ("gpg --output_dir full", "full is not empty"),
    ("gpg --lora_r 4", "--lora_r has no effect without --use_peft"),
    ("gpg --use_peft --lora_dropout 0.1", "--lora_dropout"),
    ("gpg --task nothing", "--task nothing"),
    ("gpg --task Bytes-v0 --per_device_train_batch_size 400", "fewer than the groups"),
    ("copg", "--data file.jsonl is needed"),
    ("copg --data missing.jsonl", "missing.jsonl: cannot be read"),
    ("copg --data pairs.jsonl", "no rewards"),
    ("copg --data scored.jsonl --num_generations 4", "--num_generations 2 is needed"),
    ("copg --data scored.jsonl --per_device_train_batch_size 40", "fewer than those of a step"),
]


@pytest.mark.parametrize("command, message", BAD, ids=lambda x: x[:30])
def test_errors_of_the_user_are_one_line(
    command, message, directory, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("pairs", PAIRS), ("scored", SCORED)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    extra = ["--use_cpu", "--model", str(directory)] if command[:3] in ("gpg", "cop") else []
    with pytest.raises(SystemExit) as status, plain_errors("on_trl.py"):
        on_trl.main([*command.split(), *extra])
    error = capsys.readouterr().err
    assert status.value.code == 2 and message in error and error.count("\n") == 1, error


def test_processes_that_do_not_see_each_other(directory, monkeypatch):
    """Without --use_cpu, each of torchrun's processes would train alone, into one directory."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--use_cpu"):
        on_trl.main(["gpg", "--model", str(directory)])


@pytest.mark.parametrize("version", [None, "1.15.0", "2.0.0"])
def test_without_trl_it_says_what_to_install(version, monkeypatch):
    if version:
        monkeypatch.setattr("trl.__version__", version)
    else:
        monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match=r'^on_trl.py: pip install "trl==1.16.\*"$'):
        runpy.run_path(str(ROOT / "extras" / "on_trl.py"))


if __name__ == "__main__":
    directory, out, *names = sys.argv[1:]
    results = {}
    for name in names:
        with pytest.MonkeyPatch.context() as patch:
            if name.startswith("K="):
                K, lora = int(name[2]), "LoRA" in name
                result = copg_difference(patch, directory, f"{out}/{name}", K, lora)
            elif name == "dead":
                result = dead_steps(directory, f"{out}/{name}")
            elif name == "learn":
                patch.setattr(sys, "argv", ["on_trl.py", "gpg", *LEARN])
                result = runpy.run_path(on_trl.__file__, run_name="__main__") and "done"
            else:
                result = gpg_difference(patch, directory, f"{out}/{name}", name)
        results[name] = result
    if os.environ["RANK"] == "0":
        print("RESULTS" + json.dumps(results))
    if torch.distributed.is_initialized():  # else gloo's threads may abort a process that exits
        torch.distributed.destroy_process_group()
