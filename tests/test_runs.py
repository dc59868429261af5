"""The life of a run: files, resume, kills, signals, bad input. Real processes where it matters."""

import csv
import errno
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import copg
import gpg
import grpo
import run as run_module
from run import Run, learning_rate, plain_errors
from tasks import TextTask, UserError

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"gpg.py": gpg, "grpo.py": grpo, "copg.py": copg}
OWN_FLAGS = {
    "gpg.py": ["--group-size", 4],
    "grpo.py": ["--group-size", 4, "--minibatches", 2],
    "copg.py": ["--pairs", 24, "--beta", 0.3],
}
STEPS = 6
every_script = pytest.mark.parametrize("script", SCRIPTS)


class Letters(TextTask):
    """An untrained model gets some rewards and solves some problems, not all of them."""

    def problem(self, index):
        return f"{index % 10}?", ""

    def reward(self, completion, answer):
        return sum(map(len, completion.split("\ufffd"))) / 8 - 0.4


gymnasium.register("Letters-v0", Letters)


def flags(script, model, out, *more):
    """A run of six steps that takes a second or two."""
    small = [
        "--model", model, "--out", out, "--task", "test_runs:Letters-v0", "--steps", STEPS,
        "--prompts", 4, "--max-new-tokens", 6, "--eval-every", 2, "--eval-problems", 4,
        "--eval-samples", 2, "--save-every", 1, "--lr", 1e-2, "--device", "cpu",
        *OWN_FLAGS[script], *more,
    ]  # fmt: skip
    return [str(flag) for flag in small]


def run(script, argv):
    """What a script does with its command line, in this process."""
    with plain_errors(script):
        SCRIPTS[script].train(SCRIPTS[script].parse_args([str(flag) for flag in argv]))


CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def child(script, argv, log, die=None, disk=None, watch=None, draw=False):
    """The same in a process of its own, as `python script` does it.

    die=(event, name, n): it kills itself just before the n-th such event of Python's audit hooks on
    a file of this name (None: on any file). disk: no file can be larger. watch: the directory of a
    run that must have a whole checkpoint before every change of any file. draw: the curves, too.
    """
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    if disk:
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))
    seen, busy, truth, save = [], [], {}, Run.save

    def hook(event, args):
        if event not in CHANGES or busy:
            return
        busy.append(event)  # what the hook itself opens does not count
        if die and die[:2] in ((None, None), (event, Path(str(args[0])).name)):
            seen.append(event)
            if len(seen) == die[2]:
                os.kill(os.getpid(), signal.SIGKILL)
        if watch and len(truth) > 1:  # step 0 has been saved
            places = watch / "checkpoint", watch / "checkpoint.old"
            assert any(is_whole(place, truth) for place in places)
        busy.clear()

    def remember(run):
        truth[run.step] = {k: w.clone() for k, w in run.model.state_dict().items()}
        save(run)

    Run.save = remember
    if not draw:
        run_module.draw_curves = lambda runs, path: path.touch()
    sys.addaudithook(hook)
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name="__main__")
    assert not watch or len(truth) == STEPS + 1


def is_whole(checkpoint, truth):
    """Can it be resumed, and are its weights those of its step?"""
    try:
        step, weights = step_of(checkpoint), load_file(checkpoint / "model.safetensors")
        complete = all((checkpoint / name).exists() for name in ("config.json", "tokenizer.json"))
    except Exception:  # many ways to be damaged
        return False
    return complete and all(torch.equal(weights[key], truth[step][key]) for key in weights)


def step_of(checkpoint):
    return torch.load(checkpoint / "training_state.pt", weights_only=True)["step"]


@pytest.fixture(scope="module")
def start():
    """start(script, argv, out, ...): `child` in a process forked from one that has imported
    everything, so that ten starts cost what one costs. Its output is in out.log."""
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "test_runs", "matplotlib.pyplot"])

    def start(script, argv, out, **more):
        args = script, argv, Path(f"{out}.log")
        process = context.Process(target=child, args=args, kwargs=more)
        process.start()
        return process

    return start


def finish(process, out, status=0):
    process.join(120)
    assert process.exitcode == status, Path(f"{out}.log").read_text()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the forked processes: results are compared bit for bit
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(model_dirs):
    return model_dirs["qwen2"]


@pytest.fixture(scope="module")
def whole(start, model, tmp_path_factory):
    """{script: the directory of an uninterrupted run}. All the while it had a whole checkpoint."""
    runs = {}
    for script in SCRIPTS:
        runs[script] = tmp_path_factory.mktemp("whole") / "run"
        argv = flags(script, model, runs[script])
        process = start(script, argv, runs[script], watch=runs[script], draw=True)
        finish(process, runs[script])
    return runs


def rows_with_timings(out):
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def rows(out):
    """metrics.csv without the timings."""
    timings = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timings} for line in rows_with_timings(out)]


def assert_same(out, other, why=""):
    """Equal bit for bit: metrics, samples, weights, optimizer, random states, counters."""
    assert rows(out) == rows(other), why
    for name in ("samples.jsonl", "checkpoint/model.safetensors"):
        assert (out / name).read_bytes() == (other / name).read_bytes(), (name, why)
    states = [torch.load(run / "checkpoint/training_state.pt") for run in (out, other)]
    assert states[0].pop("data") == states[1].pop("data")
    for saved in states:
        for row in saved["rows"]:
            row.pop("seconds"), row.pop("tokens_per_second", None)  # timings
    torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True, msg=f"state; {why}")
    assert not (out / "checkpoint.new").exists() and not (out / "checkpoint.old").exists()


def contents(folder):
    return {p: (p.is_file() and p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*")}


# ---- the learning rate ----


def test_learning_rate():
    def rate(step, schedule, steps=100, warmup=4):
        args = SimpleNamespace(steps=steps, lr=2.0, warmup=warmup, schedule=schedule)
        return learning_rate(step, args)

    assert [rate(s, "constant") for s in (1, 2, 4, 5, 100)] == [0.5, 1, 2, 2, 2]
    assert rate(52, "cosine") == pytest.approx(1.0)
    assert rate(28, "cosine") == pytest.approx(1 + math.sqrt(0.5))
    assert rate(100, "cosine") == pytest.approx(0.0, abs=1e-12)
    assert rate(1, "cosine", 1, 0) == pytest.approx(0.0, abs=1e-12)


# ---- what a run leaves ----


@every_script
def test_files(whole, script):
    out = whole[script]
    names = {"config.json", "metrics.csv", "samples.jsonl", "curves.png", "checkpoint"}
    assert {path.name for path in out.iterdir()} - {"data.jsonl"} == names
    config = json.loads((out / "config.json").read_text())
    assert config["prompts"] == 4 and config["script"] == script
    table = rows(out)
    assert [row["step"] for row in table] == [str(i) for i in range(STEPS + 1)]
    figure = "eval_reward" if script == "copg.py" else "eval_accuracy"
    assert [bool(row[figure]) for row in table] == [True, False] * 3 + [True]
    assert len({row["loss"] for row in table}) > 4  # or "equal" below proves nothing
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    steps = [0, 2, 4, 6] if script == "copg.py" else range(1, STEPS + 1)
    assert sorted({sample["step"] for sample in samples}) == list(steps)
    assert {"prompt", "completion", "reward"} <= samples[0].keys()
    assert AutoModelForCausalLM.from_pretrained(out / "checkpoint").dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out / "checkpoint")("12").input_ids == [16, 17]


@every_script
def test_curves_and_summary(whole, script):
    import matplotlib.pyplot as plt

    out, table = whole[script], rows(whole[script])
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    blue = torch.tensor(plt.imread(out / "curves.png")[..., :3]) - torch.tensor([0.12, 0.47, 0.71])
    assert (blue.abs().amax(-1) < 0.1).sum() > 1000  # pixels of the curves
    summary = Path(f"{out}.log").read_text().rpartition("6 of 6 steps")[2]
    figure = "reward" if script == "copg.py" else "accuracy"
    for name, row in (("before", table[0]), ("after", table[-1])):
        mean, error = (float(row[f"eval_{figure}{x}"]) for x in ("", "_stderr"))
        said = re.search(rf"{name} +{figure} (\S+) ± (\S+)", summary).groups()
        assert [float(x) for x in said] == pytest.approx([mean, error], abs=6e-4)
    assert re.search(r"took +\d+ s\n", summary)
    for path in ("curves.png", "samples.jsonl", "checkpoint"):
        assert f"{out}/{path}" in summary
    assert "--resume" not in summary


# ---- kills and resume ----


@every_script
def test_killed_at_random_instants(start, whole, model, tmp_path, script):
    """SIGKILL after random times and at random changes of files; then equal bit for bit."""
    seed = time.time_ns() % 10**6
    why, rng, kills = f"seed {seed}", random.Random(seed), 0
    out = tmp_path / "run"
    argv = flags(script, model, out)
    for attempt in range(9):
        die = None if attempt % 3 == 2 else (None, None, rng.randrange(10, 100))  # 26 per save
        process = start(script, argv, out, die=die)
        process.join(120 if die else rng.uniform(0, 0.5))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if (out / "checkpoint").exists() and step_of(out / "checkpoint") == STEPS:
            shutil.rmtree(out / "checkpoint.old", ignore_errors=True)  # killed while it was deleted
            break
        argv = ["--resume", str(out)]
        if not (out / "config.json").exists():  # killed before there was a run
            shutil.rmtree(out, ignore_errors=True)
            argv = flags(script, model, out)
    else:
        finish(start(script, argv, out), out)
    assert kills > 1, why
    assert_same(out, whole[script], why)


@pytest.mark.parametrize(
    "die, written, saved",  # steps
    [
        (("os.rename", "checkpoint.new", 1), 0, None),  # before step 0 is saved
        (("os.rename", "checkpoint", 3), 3, 2),  # before the old checkpoint makes room
        (("os.rename", "checkpoint.new", 4), 3, 2),  # between the two renames
        (("shutil.rmtree", "checkpoint.old", 7), 3, 3),  # before the old checkpoint is deleted
        (("shutil.rmtree", "checkpoint.new", 4), 3, 2),  # before the new one is written
    ],
)
def test_killed_at_the_narrowest_instants(start, whole, model, tmp_path, die, written, saved):
    out = tmp_path / "run"
    finish(start("gpg.py", flags("gpg.py", model, out), out, die=die), out, -signal.SIGKILL)
    assert len(rows(out)) == written + 1
    resumed = Run(gpg.parse_args(["--resume", str(out)]))
    assert resumed.resumed == (saved is not None)
    if resumed.resumed:  # and no new start, which would lead to the same files
        assert step_of(Path(resumed.weights)) == saved
    del resumed  # and its lock
    finish(start("gpg.py", ["--resume", str(out)], out), out)
    assert_same(out, whole["gpg.py"])


def test_rows_beyond_the_checkpoint_are_cut(whole, model, tmp_path, monkeypatch):
    """Killed between two checkpoints, and while a line was written."""
    out = tmp_path / "run"
    stop_after(3, monkeypatch)
    run("gpg.py", flags("gpg.py", model, out))
    with (out / "metrics.csv").open("a") as file:
        file.write("4,9,9\r\n5,0.1")
    with (out / "samples.jsonl").open("a") as file:
        file.write('{"step": 4, "prompt": "x"}\n{"step": 5, "pro')
    run("gpg.py", ["--resume", out])
    assert_same(out, whole["gpg.py"])


def stop_after(step, monkeypatch, signum=signal.SIGINT):
    """The signal comes during this step."""
    log = Run.log

    def log_then_signal(self, *args, **more):
        log(self, *args, **more)
        if self.step == step and "loss" in self.rows[-1] and not self.stopping:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(Run, "log", log_then_signal)


# ---- resume ----


@every_script
def test_more_steps(whole, model, tmp_path, script):
    out = tmp_path / "run"
    run(script, flags(script, model, out, "--steps", 4))
    run(script, ["--resume", out, "--steps", STEPS])
    assert_same(out, whole[script])
    assert json.loads((out / "config.json").read_text())["steps"] == STEPS


def test_a_lengthened_run_that_is_interrupted_goes_on_to_its_new_end(
    whole, model, tmp_path, monkeypatch
):
    """--resume --steps 6, stopped at 5, and --resume without --steps."""
    out = tmp_path / "run"
    run("gpg.py", flags("gpg.py", model, out, "--steps", 4))
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        run("gpg.py", ["--resume", out, "--steps", STEPS])
    assert step_of(out / "checkpoint") == 5
    run("gpg.py", ["--resume", out])
    assert_same(out, whole["gpg.py"])


def test_more_steps_of_a_cosine(model, tmp_path):
    out = tmp_path / "run"
    run("gpg.py", flags("gpg.py", model, out, "--steps", 2, "--schedule", "cosine", "--warmup", 0))
    run("gpg.py", ["--resume", out, "--steps", 4])
    rates = [float(row["lr"] or 0) for row in rows(out)]
    assert rates[2] == 0 and rates[3] > 0 and rates[4] == 0


def test_flags_beside_resume(whole, model):
    out = whole["gpg.py"]
    for more in (
        ["--lr", "5"], ["--beta-th", "0.5"], ["--prompts", "16"], ["--model", "tiny"],
        ["--seed", "1"], ["--no-alpha"], ["--save-every", "2"],
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{more[0]} .* contradicts --resume .*run, where it"):
            gpg.parse_args(["--resume", str(out), "--steps", "9", *more])
    same = flags("gpg.py", model, out, "--resume", out, "--steps", 7)
    assert gpg.parse_args(same).steps == 7 and gpg.parse_args(same).lr == 1e-2
    assert gpg.parse_args(["--resume", str(out), "--device", "cuda:1"]).device == "cuda:1"
    with pytest.raises(UserError, match=r"it was not begun by this grpo\.py"):
        grpo.parse_args(["--resume", str(out)])


def test_resume_of_the_default_directory_under_any_name(model, tmp_path, monkeypatch):
    """runs/gpg/ with a slash, as the shell completes it; moved somewhere else."""
    monkeypatch.chdir(tmp_path)
    argv = flags("gpg.py", model, "x", "--steps", 1)
    del argv[2:4]  # no --out
    for script in SCRIPTS:
        (tmp_path / "runs").mkdir(exist_ok=True)
        stem, parse = Path(script).stem, SCRIPTS[script].parse_args
        for name in (stem, f"{stem}-2", f"{stem}-3"):
            assert parse([]).out == f"runs/{name}"
            (tmp_path / "runs" / name).mkdir()
    shutil.rmtree("runs/gpg")
    run("gpg.py", argv)
    run("gpg.py", ["--resume", "runs/gpg/", "--steps", 2])
    Path("runs/gpg").rename("moved")
    run("gpg.py", ["--resume", tmp_path / "moved", "--steps", 3])
    assert len(rows(tmp_path / "moved")) == 4


# ---- signals ----


@pytest.fixture
def restored_signals():
    """A signal that the run does not handle fails the test; afterwards its handlers are gone."""

    def unhandled(signum, frame):
        raise AssertionError(f"signal {signum} was not handled")

    signals = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(signum, unhandled) for signum in signals]
    yield
    left = [signal.signal(signum, old) for signum, old in zip(signals, before, strict=True)]
    assert left == [unhandled, unhandled]


@pytest.mark.usefixtures("restored_signals")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(whole, model, tmp_path, monkeypatch, signum, capsys):
    out = tmp_path / "run"
    stop_after(3, monkeypatch, signum)
    run("gpg.py", flags("gpg.py", model, out, "--save-every", 100))
    assert len(rows(out)) == 4 and step_of(out / "checkpoint") == 3
    said = capsys.readouterr()
    assert "3 of 6 steps" in said.out and f"python gpg.py --resume {out}" in said.out
    assert said.out.split("after    ")[1].splitlines()[0].endswith("   (step 2)")
    assert "finishing this step" in said.err and (out / "curves.png").exists()
    run("gpg.py", ["--resume", out])
    assert_same(out, whole["gpg.py"])


@pytest.mark.usefixtures("restored_signals")
def test_a_second_signal_stops_at_once(model, tmp_path, monkeypatch, capsys):
    def twice(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(Run, "next_problems", twice)
    out = tmp_path / "run"
    line = refused("gpg.py", flags("gpg.py", model, out), capsys, status=130)
    assert line == "gpg.py: stopped; --resume goes on from the last checkpoint"
    assert step_of(out / "checkpoint") == 0


# ---- two processes ----


def test_two_processes_in_one_directory(start, whole, model, tmp_path):
    out = tmp_path / "run"
    first = flags("gpg.py", model, out, "--steps", 4)
    for argv in (first, ["--resume", str(out), "--steps", str(STEPS)]):
        held = Run(gpg.parse_args(argv))  # has not written anything yet
        process = start("gpg.py", argv, tmp_path / "second")
        finish(process, tmp_path / "second", 2)
        (line,) = (tmp_path / "second.log").read_text().splitlines()
        assert line == f"gpg.py: {out}: another process is training there"
        del held
        both = [start("gpg.py", argv, tmp_path / f"both-{i}") for i in range(2)]
        for process in both:
            process.join(120)
        assert sorted(process.exitcode for process in both) == [0, 2]
    assert_same(out, whole["gpg.py"])


# ---- bad input: one line, exit status 2, nothing written ----


def refused(script, argv, capsys, *parts, status=2):
    """Runs it, and returns the one line that it ends with."""
    with pytest.raises(SystemExit) as stop:
        run(script, argv)
    code, error = stop.value.code, stop.value
    while error:  # its traceback holds the run, and the run its lock and signal handlers
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    err = capsys.readouterr().err
    line = err.rstrip("\n").rpartition("\n")[2].rpartition("\r")[2]
    assert code == status and line.startswith(f"{script}: ") and "Traceback" not in err
    for part in parts:
        assert part in line
    return line


ALL = "gpg.py grpo.py copg.py"
RANGES = {  # scripts: flags with values that they refuse
    ALL: "steps 0 -1 many 2.5 2000000000, lr 0 -1 nan inf x, warmup -1 1.5, weight-decay -1 nan, "
    "clip-grad 0 inf, seed -1 1000001, schedule linear, prompts 0, max-new-tokens 0, "
    "micro-batch-tokens 0, save-every 0, eval-every 0, eval-problems 0, eval-first -1, "
    "eval-samples 0 -3",
    "gpg.py grpo.py": "group-size 0 1, temperature 0 -1 nan inf, max-rounds 0",
    "gpg.py": "f-norm 2, beta-th 1.5 -0.1 nan",
    "grpo.py": "variant ppo, scale batch, aggregate group, clip-low 0, clip-high -0.2, "
    "kl-beta -0.1 nan, minibatches 0 17, updates-per-batch 0",
    "copg.py": "loss ppo, beta 0 nan, pairs 0, completions 0 -1, epochs 0",
}
RANGES = [
    (script, f"--{flag}", values)
    for scripts, table in RANGES.items()
    for script in scripts.split()
    for flag, *values in map(str.split, table.split(", "))
]
COMBINATIONS = [  # scripts, flags, what the line says
    (ALL, "--task subtract", ["--task subtract", "such as add or gsm8k"]),
    (ALL, "--task no_module:Task-v0", ["--task no_module:Task-v0", "no_module"]),
    (ALL, "--task none.jsonl", ["none.jsonl: cannot be read"]),
    (ALL, "--model /no/such", ["/no/such cannot be loaded as a language model"]),
    (ALL, "--task add --model tests", ["tests cannot be loaded as a language model"]),
    (ALL, "--task add --max-new-tokens 300", ["context of 256", "--max-new-tokens"]),
    *((ALL, f"{flag} ", ["an argument is empty"]) for flag in ("--out", "--resume", "--model")),
    (ALL, "--out=", ["an argument is empty"]),
    (ALL, "--no-such-flag", ["--no-such-flag", "--help"]),
    (ALL, "stray", ["stray", "--help"]),
    *((ALL, f"--task add --device {x}", [f" on {x}: "]) for x in ("abacus", "cuda:77", "mps")),
    ("gpg.py", "--beta-th 0 --max-rounds 2", ["--max-rounds has no effect with --beta-th 0"]),
    ("grpo.py", "--max-rounds 2", ["--max-rounds has no effect without --dynamic-sampling"]),
    ("grpo.py", "--variant dapo --no-dynamic-sampling", ["--no-dynamic-sampling"]),
    ("copg.py", "--data none.jsonl", ["none.jsonl: cannot be read"]),
    ("copg.py", "--data none.jsonl --completions 3", ["--completions has no effect"]),
    ("copg.py", "--data none.jsonl --pairs 5", ["--pairs has no effect"]),
    ("copg.py", "--model tiny --data none.jsonl", ["--data with --model tiny needs --task"]),
    ("copg.py", "--data none.jsonl --online", ["--online samples its own", "--data"]),
    ("copg.py", "--completions 3", ["--completions has no effect"]),  # posts come with theirs
    ("copg.py", "--task add --completions 1", ["--completions must be at least 2"]),
    ("copg.py", "--online --pairs 5", ["--pairs has no effect"]),
    ("copg.py", "--epochs 1 --steps 5", ["--epochs and --steps"]),
    ("copg.py", "--task add --pairs 2 --reward-model /no/such", ["--reward-model /no/such"]),
]
BAD = [(script, [f"{flag}={x}"], [flag, x]) for script, flag, values in RANGES for x in values]
BAD += [(s, given.split(" "), parts) for ss, given, parts in COMBINATIONS for s in ss.split()]


@pytest.mark.parametrize("script, given, parts", BAD, ids=lambda x: "".join(x).strip())
def test_bad_flags(script, given, parts, model, tmp_path, capsys):
    if "--task add" not in " ".join(given):
        model = "/no/such"  # what is wrong shows before a model is loaded
    group = [] if script == "copg.py" else ["--group-size", 4]
    argv = ["--model", model, "--out", tmp_path / "run", "--prompts", 4, *group, *given]
    refused(script, argv, capsys, *parts)
    assert not list(tmp_path.glob("run/*"))  # the same --out can be tried again


def refused_and_untouched(script, argv, folder, capsys, *parts):
    before = contents(folder)
    refused(script, argv, capsys, *parts)
    assert contents(folder) == before


@every_script
@pytest.mark.parametrize("name", ["checkpoint-500/model.bin", "samples.jsonl", "curves.png", "."])
def test_an_out_that_is_not_empty_is_left_alone(script, name, model, tmp_path, capsys):
    """What somebody else has written: a Trainer's checkpoint, own files, a Hugging Face model."""
    out, argv = tmp_path / "run", flags(script, model, tmp_path / "run")
    if name == ".":
        shutil.copytree(model, out)
    else:
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
    refused_and_untouched(script, argv, tmp_path, capsys, "is not empty", f"--out {out}")
    refused_and_untouched(script, ["--resume", out], tmp_path, capsys, "no run to continue")
    refused(script, flags(script, model, next(out.rglob("*.*"))), capsys, str(out))  # a file


def damages(run):
    """(file, its damaged content or None, what the line says)"""
    for text in ("{", "[]", "{}", "null", "5", '{"command": "gpg.py"}', "[" * 10**5):
        yield "config.json", text.encode(), "no run to continue"
    yield "config.json", b"\xff", "no run to continue"
    for old, new, part in (
        ('"gpg.py"', '"grpo.py"', "it was not begun by this gpg.py"),
        ('"steps": 6', '"steps": "many"', "invalid int value: 'many'"),
        ('"lr": 0.01,', "", "another version began it: lr"),
    ):
        config = (run / "config.json").read_text()
        assert old in config
        yield "config.json", config.replace(old, new).encode(), part
    path = "checkpoint/training_state.pt"
    whole = torch.load(run / path)
    states = [{k: v for k, v in whole.items() if k != name} for name in whole]
    states += [whole | {"rng": 5}, whole | {"optimizer": {}}, [1]]
    for state in states:
        torch.save(state, file := io.BytesIO())
        yield path, file.getvalue(), "is damaged"
    for name, part in (
        (path, "is damaged"),
        ("checkpoint/model.safetensors", "cannot be loaded as a language model"),
        ("checkpoint/tokenizer.json", "cannot be loaded as a language model"),
    ):
        data = (run / name).read_bytes()
        for damaged in (None, b"", data[: len(data) // 2]):
            yield name, damaged, part


def test_damaged_runs(whole, tmp_path, capsys):
    """One line, and no other file is changed."""
    out = tmp_path / "run"
    shutil.copytree(whole["gpg.py"], out)
    for name, damaged, part in list(damages(out)):
        path = out / name
        data = path.read_bytes()
        path.unlink() if damaged is None else path.write_bytes(damaged)
        more = [] if "many" in part else ["--steps", 9]
        refused_and_untouched("gpg.py", ["--resume", out, *more], out, capsys, part)
        path.write_bytes(data)
    shutil.rmtree(out / "checkpoint")
    argv, said = ["--resume", out, "--steps", 9], "checkpoint is gone; start another"
    refused_and_untouched("gpg.py", argv, out, capsys, said)


def test_a_finished_run(whole, capsys):
    out, said = whole["gpg.py"], "step 6 is done; --steps must be higher"
    for more in ([], ["--steps", 6], ["--steps", 2]):
        refused_and_untouched("gpg.py", ["--resume", out, *more], out, capsys, said)
    refused("gpg.py", ["--resume", out.parent / "none"], capsys, "--resume", "none")


# ---- what can go wrong on the way ----


def test_a_full_disk_keeps_the_last_checkpoint(start, whole, model, tmp_path):
    """A limit on the size of files stands in for a full disk: the state with Adam's moments, from
    step 1 on, is over it; the one of step 0 is not."""
    out = tmp_path / "run"
    size = (whole["gpg.py"] / "checkpoint" / "model.safetensors").stat().st_size
    argv = flags("gpg.py", model, out)
    finish(start("gpg.py", argv, out, disk=int(size * 1.5)), out, 2)
    line = Path(f"{out}.log").read_text().splitlines()[-1]
    assert line.startswith(f"gpg.py: {out}/checkpoint.new could not be written (")
    finish(start("gpg.py", ["--resume", str(out)], out), out)
    assert_same(out, whole["gpg.py"])


@every_script
def test_nan_stops_the_run_and_keeps_the_checkpoint(script, model, tmp_path, capsys, monkeypatch):
    module, steps = SCRIPTS[script], []
    learning_rate, logprobs = module.learning_rate, module.completion_logprobs

    def note_the_step(step, *args):
        steps.append(step)
        return learning_rate(step, *args)

    def nan_in_step_3(*args):
        return logprobs(*args) * (float("nan") if steps and steps[-1] == 3 else 1.0)

    monkeypatch.setattr(module, "learning_rate", note_the_step)
    monkeypatch.setattr(module, "completion_logprobs", nan_in_step_3)
    out = tmp_path / "run"
    refused(script, flags(script, model, out), capsys, "non-finite", "--lr", status=1)
    assert steps[-1] == 3 and step_of(out / "checkpoint") == 2
    weights = load_file(out / "checkpoint" / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_names_the_flags(error, capsys):
    with pytest.raises(SystemExit) as stop, plain_errors("gpg.py"):
        raise error
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpg.py: out of memory") and "--micro-batch-tokens" in line


def test_other_trouble_with_memory_is_not_a_lack_of_it():
    error = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match=error), plain_errors("gpg.py"):
        raise RuntimeError(error)


def test_warnings_are_said_once(model, tmp_path, capsys):
    run("gpg.py", flags("gpg.py", model, tmp_path / "run", "--max-new-tokens", 1, "--steps", 9))
    said = re.findall(r"step (\d): more than a tenth of the completions", capsys.readouterr().err)
    assert said == ["1"]


def test_a_figure_that_cannot_be_drawn_costs_a_line(model, tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr(run_module, "draw_curves", fail)
    run("gpg.py", flags("gpg.py", model, tmp_path / "run", "--steps", 1))
    out = capsys.readouterr().out
    assert "1 of 1 steps" in out and "no curves.png: ModuleNotFoundError" in out


def test_the_seconds_of_a_step_are_its_own(model, tmp_path):
    start = time.perf_counter()
    run("gpg.py", flags("gpg.py", model, tmp_path / "run", "--steps", 20, "--eval-every", 20))
    seconds = [float(row["seconds"]) for row in rows_with_timings(tmp_path / "run")]
    assert min(seconds) > 0 and sum(seconds) < time.perf_counter() - start


def test_in_a_thread_there_are_no_signals(model, tmp_path):
    argv = flags("gpg.py", model, tmp_path / "run", "--steps", 1)
    thread = threading.Thread(target=lambda: gpg.train(gpg.parse_args(argv)))
    thread.start()
    thread.join()
    assert len(rows(tmp_path / "run")) == 2


def test_a_file_system_without_locks(model, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_module.fcntl, "flock", fail)
    run("gpg.py", flags("gpg.py", model, tmp_path / "run", "--steps", 1))
    assert len(rows(tmp_path / "run")) == 2


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_metrics_go_to_another_log_too(model, tmp_path, monkeypatch, capsys, kind):
    """Under the names of metrics.csv. A package that is missing costs one line, before step 0."""
    seen, out = {}, tmp_path / "run"

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(out)

        def add_scalar(self, name, value, step):
            seen.setdefault(step, {})[name] = value

    def init(dir, name, config):
        assert (dir, name, config["steps"]) == (str(out), str(out), 2)
        return SimpleNamespace(log=lambda row, step: seen.setdefault(step, {}).update(row))

    module = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[kind]
    argv = flags("gpg.py", model, out, "--steps", 2, "--log", kind)
    monkeypatch.setitem(sys.modules, module, None)
    refused("gpg.py", argv, capsys, f"--log {kind} needs a package: pip install {kind}")
    assert not list(out.iterdir())
    monkeypatch.setitem(
        sys.modules, module, SimpleNamespace(SummaryWriter=SummaryWriter, init=init)
    )
    run("gpg.py", argv)
    assert list(seen) == [0, 1, 2]
    for row in rows(out):
        for name, value in seen[int(row["step"])].items():
            assert float(row[name]) == pytest.approx(value, rel=1e-5)


# ---- the command line ----


@every_script
def test_help_lists_the_flags(script, start, tmp_path):
    finish(start(script, ["--help"], tmp_path / "help"), tmp_path / "help")
    listed = set(re.findall(r"--[a-z][a-z-]+", (tmp_path / "help.log").read_text()))
    ranged = {flag for name, flag, _ in RANGES if name == script}  # so none is forgotten
    others = {"--help", "--model", "--task", "--no-chat-template", "--grad-checkpointing"}
    others |= {"--eval-task", "--system", "--log"}
    others |= {"--out", "--resume", "--device"} | {
        "gpg.py": {"--no-alpha", "--mask-truncated"},
        "grpo.py": {"--dynamic-sampling", "--mask-truncated"},
        "copg.py": {"--reward-model", "--data", "--online"},
    }[script]
    assert listed == ranged | others


def command(cwd, *argv, **environment):
    """A new process, which has imported nothing; one of each script."""
    environment |= {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_command_line(whole, model, tmp_path):
    result = command(ROOT, "grpo.py", *flags("grpo.py", model, tmp_path / "run", "--steps", 2))
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path / "run") == rows(whole["grpo.py"])[:3]
    assert "2 of 2 steps" in result.stdout and "loss=" in result.stderr


def test_an_error_in_the_users_task_shows_its_traceback(model, tmp_path):
    (tmp_path / "my_tasks.py").write_text(
        "import gymnasium\nfrom tasks import TextTask\n\nclass Bad(TextTask):\n"
        "    def problem(self, index): return str(index), 'x'\n"
        "    def reward(self, completion, answer): return len(open('/no/such/file').read())\n\n"
        "gymnasium.register('Bad-v0', Bad)\n"
    )
    argv = flags("gpg.py", model, "run", "--task", "my_tasks:Bad-v0")
    result = command(tmp_path, ROOT / "gpg.py", *argv)
    named, _, shown = result.stderr.partition("Traceback")
    assert result.returncode == 1, result.stderr
    assert re.search(r"the task failed at problem 0, completion '.*':\n", named)
    assert "len(open(" in shown and "No such file or directory: '/no/such/file'" in shown


def test_without_locks_and_without_matplotlib(whole, model, tmp_path):
    """Windows has no fcntl. A notebook's backend is not there in a script."""
    code = "import common, runpy, sys; sys.modules['fcntl'] = None; "
    code += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    argv = flags("copg.py", model, tmp_path / "run")
    backend = "module://matplotlib_inline.backend_inline"
    result = command(ROOT, "-c", code, "copg.py", *argv, MPLBACKEND=backend)
    assert result.returncode == 0, result.stderr
    assert "6 of 6 steps" in result.stdout and rows(tmp_path / "run") == rows(whole["copg.py"])
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
