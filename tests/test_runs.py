"""The life of a run: files, resume, signals, kills, bad input. Real processes where it matters."""

import csv
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import gpg
from common import UserError

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = ("seconds", "tokens_per_second")


def flags(model_dir, out, *more):
    """A run of six steps that takes a second or two."""
    small = [
        "--model", model_dir, "--out", out, "--steps", 6, "--prompts", 4, "--group-size", 4,
        "--max-new-tokens", 6, "--eval-every", 2, "--eval-problems", 4, "--eval-samples", 2,
        "--save-every", 1, "--lr", 1e-2, "--task", "tests.run_tasks:Digits-v0", *more,
    ]  # fmt: skip
    return [str(flag) for flag in small]


def run(argv):
    """gpg.py as the command line runs it, in this process or in a forked one."""
    torch.set_num_threads(1)
    os.chdir(ROOT)
    with common.plain_errors("gpg.py"):
        gpg.train(gpg.parse_args(argv))


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def forks():
    """Processes forked from one that has imported everything: ten starts cost what one costs."""
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "test_runs"])
    return context


def start(forks, argv):
    process = forks.Process(target=run, args=(argv,))
    process.start()
    return process


def rows(out):
    with (Path(out) / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(forks, model_dirs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    process = start(forks, flags(model_dirs["qwen2"], out))
    process.join(120)
    assert process.exitcode == 0
    return out


# ---- what a run leaves ----


def test_files(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {"config.json", "metrics.csv", "samples.jsonl", "curves.png", "checkpoint"}
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["group_size"] == 4 and config["beta_th"] == 0.6
    table = rows(uninterrupted)
    assert list(table[0])[: len(common.COLUMNS) - 2] == [
        name for name in common.COLUMNS if name not in TIMINGS
    ]
    assert [row["step"] for row in table] == [str(i) for i in range(7)]
    assert [bool(row["eval_accuracy"]) for row in table] == [True, False] * 3 + [True]
    assert len({row["reward_mean"] for row in table[1:]}) > 1  # or "equal" below proves nothing
    samples = [json.loads(line) for line in (uninterrupted / "samples.jsonl").open()]
    assert len(samples) == 6 * 4 and set(samples[0]) == {"step", "prompt", "completion", "reward"}
    assert (uninterrupted / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_checkpoint_is_a_hugging_face_directory(uninterrupted):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(uninterrupted / "checkpoint")
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(uninterrupted / "checkpoint")("12").input_ids == [16, 17]


# ---- resume ----


def test_killed_ten_times(forks, model_dirs, tmp_path):
    """SIGKILL at ten arbitrary moments, inside a save too: resumed, the metrics are the same."""
    longer = ["--steps", 150, "--eval-every", 50]  # so many that a busy machine kills in time too
    whole, out, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    process = start(forks, flags(model_dirs["qwen2"], whole, *longer))
    process.join(120)
    argv = flags(model_dirs["qwen2"], out, *longer)
    for kill in range(10):
        done = step_of(out / "checkpoint")
        process = start(forks, argv)
        argv = ["--resume", str(out)]
        wait_for(process, lambda: (out / "config.json").exists())  # before, there is no run to kill
        if kill > 1:  # the first two come at the very beginning
            goal = done + kill - 1
            wait_for(process, lambda goal=goal: step_of(out / "checkpoint") >= goal)
        if kill % 2:
            wait_for(process, (out / "checkpoint.new").exists)
        time.sleep(rng.random() * 0.03)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert 10 < step_of(out / "checkpoint") < 150
    process = start(forks, argv)
    process.join(120)
    assert process.exitcode == 0
    assert rows(out) == rows(whole) and len(rows(out)) == 151
    assert (out / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert not (out / "checkpoint.old").exists()


def step_of(checkpoint):
    """The step of a checkpoint that is there right now; -1 if there is none to be read."""
    try:
        state = torch.load(checkpoint / "training_state.pt", weights_only=True)["state"]
    except Exception:  # it is being replaced
        return -1
    return state["step"]


def wait_for(process, condition):
    deadline = time.time() + 120
    while not condition():
        assert time.time() < deadline and process.is_alive()
        time.sleep(0.001)


def test_a_kill_between_the_two_renames(forks, uninterrupted, model_dirs, tmp_path, monkeypatch):
    """The narrowest moment of a save, hit on purpose: only checkpoint.old is left."""
    out = tmp_path / "run"
    stop_after(3, monkeypatch)
    gpg.train(gpg.parse_args(flags(model_dirs["qwen2"], out)))
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    (out / "checkpoint").rename(out / "checkpoint.old")
    gpg.train(gpg.parse_args(["--resume", str(out)]))
    assert rows(out) == rows(uninterrupted)


def stop_after(step, monkeypatch):
    """As if Ctrl-C came during this step."""
    log = common.Run.log

    def log_then_stop(self, number, *args, **more):
        log(self, number, *args, **more)
        if number == step:
            self.stop(signal.SIGINT, None)

    monkeypatch.setattr(common.Run, "log", log_then_stop)


def test_rows_after_the_checkpoint_are_cut(uninterrupted, model_dirs, tmp_path, monkeypatch):
    """A crash after the row and before the save leaves a row too many, and perhaps half a line."""
    out = tmp_path / "run"
    stop_after(3, monkeypatch)
    gpg.train(gpg.parse_args(flags(model_dirs["qwen2"], out)))
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    with (out / "metrics.csv").open("a") as file:
        file.write("4,9,9,9,9,9,9,9,9,9,9,9,9,9,9\n5,0.1")
    with (out / "samples.jsonl").open("a") as file:
        file.write('{"step": 4, "prompt": "x"}\n{"step": 5, "pro')
    gpg.train(gpg.parse_args(["--resume", str(out)]))
    assert rows(out) == rows(uninterrupted)
    assert (out / "samples.jsonl").read_text() == (uninterrupted / "samples.jsonl").read_text()


def test_more_steps(uninterrupted, model_dirs, tmp_path):
    out = tmp_path / "run"
    gpg.train(gpg.parse_args(flags(model_dirs["qwen2"], out, "--steps", 4)))
    gpg.train(gpg.parse_args(["--resume", str(out), "--steps", "6"]))
    assert rows(out) == rows(uninterrupted)
    assert json.loads((out / "config.json").read_text())["steps"] == 6


# ---- signals ----


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(forks, model_dirs, tmp_path, signum):
    out = tmp_path / "run"
    process = start(forks, flags(model_dirs["qwen2"], out, "--steps", 500, "--eval-every", 100))
    wait_for(process, lambda: step_of(out / "checkpoint") >= 2)
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == 0
    done = len(rows(out))
    assert 3 <= done < 501 and (out / "curves.png").exists()
    state = torch.load(out / "checkpoint" / "training_state.pt", weights_only=True)["state"]
    assert state["step"] == done - 1
    process = start(forks, ["--resume", str(out), "--steps", str(done + 2)])
    process.join(60)
    assert len(rows(out)) == done + 3


def test_a_second_signal_stops_at_once(model_dirs, tmp_path, monkeypatch, capsys):
    def twice(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    monkeypatch.setattr(common.Run, "next_problems", twice)
    with pytest.raises(SystemExit) as stop:
        run(flags(model_dirs["qwen2"], tmp_path / "run"))
    assert stop.value.code == 130
    assert capsys.readouterr().err.endswith("gpg.py: stopped\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- bad input: one line, exit status 2, nothing overwritten ----


def refused(argv, *parts, status=2, capsys=None):
    with pytest.raises(SystemExit) as stop:
        run([str(flag) for flag in argv])
    assert stop.value.code == status
    err = capsys.readouterr().err
    line = err.rstrip("\n").rpartition("\n")[2].rpartition("\r")[2]
    assert line.startswith("gpg.py: ") and "Traceback" not in err
    for part in parts:
        assert part in line
    return line


@pytest.mark.parametrize(
    "given, parts",
    [
        (["--task", "subtract"], ["--task subtract", "add, gsm8k"]),
        (["--task", "none.jsonl"], ["none.jsonl"]),
        (["--model", "/no/such/model"], ["/no/such/model"]),
        (["--group-size", "1"], ["--group-size 1"]),
        (["--group-size", "0"], ["--group-size", "above 0"]),
        (["--prompts", "-3"], ["--prompts", "above 0"]),
        (["--steps", "0"], ["--steps", "above 0"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens", "above 0"]),
        (["--max-new-tokens", "300"], ["context of 256", "--max-new-tokens"]),
        (["--temperature", "0"], ["--temperature", "above 0"]),
        (["--lr", "nan"], ["--lr", "above 0"]),
        (["--lr", "-1"], ["--lr", "above 0"]),
        (["--warmup", "-1"], ["--warmup"]),
        (["--weight-decay", "-1"], ["--weight-decay"]),
        (["--seed", "-1"], ["--seed"]),
        (["--beta-th", "1.5"], ["--beta-th", "between 0 and 1"]),
        (["--f-norm", "2"], ["--f-norm"]),
        (["--micro-batch-tokens", "0"], ["--micro-batch-tokens"]),
        (["--eval-problems", "0"], ["--eval-problems"]),
        (["--device", "cuda:77"], ["--device cuda:77", "--device cpu"]),
        (["--device", "abacus"], ["--device abacus"]),
        (["--data", "x"], ["--data"]),
        (["--no-such-flag"], ["--no-such-flag", "--help"]),
    ],
)
def test_bad_flags(given, parts, model_dirs, tmp_path, capsys):
    refused([*flags(model_dirs["qwen2"], tmp_path / "run"), *given], *parts, capsys=capsys)
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_directories_that_are_no_causal_model(tmp_path, model_dirs, capsys):
    from conftest import SIZES
    from transformers import (
        Lfm2Config,
        Lfm2ForCausalLM,
        LlamaForSequenceClassification,
        T5Config,
        T5ForConditionalGeneration,
    )

    (tmp_path / "empty").mkdir()
    argv = flags(tmp_path / "empty", tmp_path / "run")
    refused(argv, "empty", "config.json", capsys=capsys)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=258, **sizes)).save_pretrained(tmp_path / "t5")
    common.tiny_tokenizer().save_pretrained(tmp_path / "t5")
    refused(flags(tmp_path / "t5", tmp_path / "run"), "t5", "no causal language", capsys=capsys)
    model, _ = common.load_model(str(model_dirs["llama"]), torch.device("cpu"))
    LlamaForSequenceClassification(model.config).save_pretrained(tmp_path / "classifier")
    common.tiny_tokenizer().save_pretrained(tmp_path / "classifier")
    refused(
        flags(tmp_path / "classifier", tmp_path / "run"), "not a causal language", "lm_head",
        capsys=capsys,
    )  # fmt: skip
    hybrid = Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]))
    hybrid.save_pretrained(tmp_path / "hybrid")
    common.tiny_tokenizer().save_pretrained(tmp_path / "hybrid")
    refused(flags(tmp_path / "hybrid", tmp_path / "run"), "hybrid", "recurrent", capsys=capsys)
    assert not (tmp_path / "run").exists()


def test_a_used_out_is_left_alone(uninterrupted, model_dirs, capsys):
    before = {p: p.read_bytes() for p in uninterrupted.rglob("*") if p.is_file()}
    argv = flags(model_dirs["qwen2"], uninterrupted)
    refused(argv, str(uninterrupted), "--resume", "--overwrite", capsys=capsys)
    # --overwrite with another mistake: nothing is thrown away before the run can begin
    refused([*argv, "--overwrite", "--model", "/no/such"], "/no/such", capsys=capsys)
    refused([*argv, "--overwrite", "--task", "subtract"], "subtract", capsys=capsys)
    assert {p: p.read_bytes() for p in uninterrupted.rglob("*") if p.is_file()} == before


def test_overwrite(uninterrupted, model_dirs, tmp_path):
    out = tmp_path / "run"
    run(flags(model_dirs["qwen2"], out, "--steps", 2))
    run(flags(model_dirs["qwen2"], out, "--overwrite"))
    assert rows(out) == rows(uninterrupted)


def test_out_that_cannot_be_made(model_dirs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused(flags(model_dirs["qwen2"], tmp_path / "file"), "file", capsys=capsys)
    refused(flags(model_dirs["qwen2"], tmp_path / "file" / "run"), "file", capsys=capsys)


def test_resume_of_nothing_and_of_damage(uninterrupted, model_dirs, tmp_path, capsys, monkeypatch):
    refused(["--resume", tmp_path / "none"], "--resume", "none", capsys=capsys)
    refused(["--resume", uninterrupted], "raise --steps", capsys=capsys)
    out = tmp_path / "run"
    stop_after(3, monkeypatch)
    run(flags(model_dirs["qwen2"], out))
    for name in ("training_state.pt", "model.safetensors"):
        path = out / "checkpoint" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        refused(["--resume", out], "checkpoint", capsys=capsys)
        path.write_bytes(whole)
    config = out / "config.json"
    whole = config.read_text()
    for text in ("{", "[]", "{}", whole.replace("gpg.py", "other.py")):
        config.write_text(text)
        refused(["--resume", out], "config.json", capsys=capsys)
    config.write_text(whole)
    assert len(rows(out)) == 4


@pytest.mark.parametrize(
    "given, part",
    [
        (["--lr", "5"], "--lr 5.0 contradicts"),
        (["--beta-th", "0.5"], "--beta-th 0.5 contradicts"),
        (["--prompts", "16"], "--prompts 16 contradicts"),  # the default, but not the run's
        (["--model", "tiny"], "--model tiny contradicts"),
        (["--overwrite"], "--overwrite True contradicts"),
        (["--out", "elsewhere"], "--out elsewhere contradicts"),
    ],
)
def test_resume_with_contradicting_flags(uninterrupted, given, part, capsys):
    refused(["--resume", uninterrupted, "--steps", 9, *given], part, capsys=capsys)


def test_resume_with_the_same_flags(uninterrupted, model_dirs):
    argv = flags(model_dirs["qwen2"], uninterrupted, "--resume", uninterrupted, "--steps", 7)
    args = gpg.parse_args(argv)
    assert args.steps == 7 and args.lr == 1e-2


def full_disk(argv, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.stderr = open(argv[argv.index("--out") + 1] + ".err", "w")  # noqa: SIM115
    run(argv)


def test_a_full_disk_keeps_the_last_checkpoint(forks, uninterrupted, model_dirs, tmp_path):
    """A limit on the size of files stands in for a full disk: the state with Adam's moments, from
    step 1 on, is over it; the one of step 0 is not."""
    out = tmp_path / "run"
    weights = (uninterrupted / "checkpoint" / "model.safetensors").stat().st_size
    argv = flags(model_dirs["qwen2"], out)
    process = forks.Process(target=full_disk, args=(argv, int(weights * 1.5)))
    process.start()
    process.join(60)
    assert process.exitcode == 2
    line = Path(f"{out}.err").read_text().splitlines()[-1]
    assert line.startswith("gpg.py: ") and "checkpoint.new could not be written" in line
    process = start(forks, ["--resume", str(out)])
    process.join(60)
    assert rows(out) == rows(uninterrupted)


def test_nan_stops_the_run_and_keeps_the_checkpoint(model_dirs, tmp_path, capsys, monkeypatch):
    loss, calls = gpg.gpg_loss, []

    def nan_in_step_3(*args):
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(gpg, "gpg_loss", nan_in_step_3)
    out = tmp_path / "run"
    argv = flags(model_dirs["qwen2"], out)
    refused(argv, "step 3", "nan", "checkpoint", status=1, capsys=capsys)
    state = torch.load(out / "checkpoint" / "training_state.pt", weights_only=True)["state"]
    assert state["step"] == 2
    model, _ = common.load_model(str(out / "checkpoint"), torch.device("cpu"))
    assert all(p.isfinite().all() for p in model.parameters())


def test_cuda_out_of_memory_names_the_flags(capsys):
    with pytest.raises(SystemExit) as stop, common.plain_errors("gpg.py"):
        raise torch.cuda.OutOfMemoryError("2 GiB")
    assert stop.value.code == 2
    assert "--micro-batch-tokens" in capsys.readouterr().err


def test_truncated_completions_are_said(model_dirs, tmp_path, capsys):
    run(flags(model_dirs["qwen2"], tmp_path / "run", "--max-new-tokens", 1, "--steps", 2))
    err = capsys.readouterr().err
    assert "no completion ended within --max-new-tokens 1" in err


# ---- the tiny model's cache ----


@pytest.fixture
def quick_warm_start(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(common, "WARM_START", common.WARM_START | {"steps": 2})


def test_tiny_is_made_once_and_a_broken_cache_is_made_again(quick_warm_start, monkeypatch):
    task = common.make_task("add")
    first = Path(common.tiny_model(task))
    weights = (first / "model.safetensors").read_bytes()
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert common.tiny_model(task) == str(first)
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    for damage in (weights[:-1], weights[:-1] + bytes([weights[-1] ^ 1]), b""):
        (first / "model.safetensors").write_bytes(damage)
        common.tiny_model(task)
        assert (first / "model.safetensors").read_bytes() == weights
    for file in list(first.iterdir()):
        file.unlink()
        common.tiny_model(task)
        assert file.exists() and (first / "model.safetensors").read_bytes() == weights
    assert [p.name for p in first.parent.iterdir()] == [first.name]  # nothing half-made is left


def test_tiny_is_another_for_another_task_or_recipe(quick_warm_start, monkeypatch):
    paths = {common.tiny_model(common.make_task(name)) for name in ("add", "add2")}
    model, _ = common.load_model("tiny", "cpu")  # without a task: that of "add"
    assert model.name_or_path in paths
    monkeypatch.setattr(common, "WARM_START", common.WARM_START | {"lr": 1e-3})
    paths.add(common.tiny_model(common.make_task("add")))
    assert len(paths) == 3


def test_tiny_leaves_the_random_numbers_alone(quick_warm_start):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    common.tiny_model(common.make_task("add"))
    assert torch.equal(torch.rand(3), expected)


# ---- the command line ----


def script(*argv):
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_command_line(uninterrupted, model_dirs, tmp_path):
    result = script("gpg.py", *flags(model_dirs["qwen2"], tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path / "run") == rows(uninterrupted)
    for part in ("before", "after", "accuracy", "+-", "greedy", "pass@2", "GiB", "curves.png"):
        assert part in result.stdout
    for part in ("reward", "valid", "alpha", "accuracy", "tokens/s"):
        assert part in result.stderr
    figure = tmp_path / "both.png"
    result = script("common.py", tmp_path / "run", uninterrupted, "--out", figure)
    assert result.returncode == 0 and figure.read_bytes()[:4] == b"\x89PNG"
    result = script("common.py", tmp_path, "--out", figure)
    assert result.returncode == 2 and "metrics.csv" in result.stderr


def test_help():
    result = script("gpg.py", "--help")
    assert result.returncode == 0
    for flag in ("--beta-th", "--resume", "--micro-batch-tokens", "--seed"):
        assert flag in result.stdout


def test_evaluation_takes_no_random_number_from_training(model_dirs):
    model, tokenizer = common.load_model(str(model_dirs["qwen2"]), torch.device("cpu"))
    args = gpg.parse_args(flags(model_dirs["qwen2"], "x", "--task", "add"))
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.rand(1)
        torch.manual_seed(seed)
        results.append(common.evaluate(model, tokenizer, common.make_task("add", "test"), args))
        assert torch.equal(torch.rand(1), expected)
    assert results[0] == results[1]


def test_warnings_are_said_at_powers_of_two(model_dirs, tmp_path, capsys):
    run = common.Run(gpg.parse_args(flags(model_dirs["qwen2"], tmp_path / "run")))
    for step in range(1, 10):
        run.warn(step, "hm")
    said = [line for line in capsys.readouterr().err.splitlines() if "hm" in line]
    assert [line.split(":")[0] for line in said] == ["step 1", "step 2", "step 4", "step 8"]


def test_user_errors_are_value_errors():
    assert issubclass(UserError, ValueError)
