"""The scripts in extras/: tables and figures from runs, and the measurements in small."""

import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

EXTRAS = Path(__file__).resolve().parent.parent / "extras"
sys.path.insert(0, str(EXTRAS))

import compare  # noqa: E402
import gpu  # noqa: E402
import plot  # noqa: E402
import read_runs  # noqa: E402
import sweep  # noqa: E402

import common  # noqa: E402
import copg  # noqa: E402
from common import UserError  # noqa: E402


def write_run(path, accuracies=(0.2, 0.6, 0.8), slower=1, rounds=(1, 2, 1, 1)):
    """Four steps, with evaluations at steps 0, 2 and 4, as in metrics.csv."""
    path.mkdir(parents=True, exist_ok=True)
    lines = ["step,rounds,seconds,eval_accuracy", f"0,,,{accuracies[0]}"]
    for step, (n, seconds) in enumerate(zip(rounds, (2, 3, 5, 5), strict=True), 1):
        accuracy = accuracies[step // 2] if step % 2 == 0 else ""
        lines.append(f"{step},{n},{slower * seconds},{accuracy}")
    (path / "metrics.csv").write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("path", sorted(EXTRAS.glob("*.py")), ids=lambda path: path.name)
def test_help(path, monkeypatch, capsys):
    if path.name != "read_runs.py":  # a module, no script
        monkeypatch.setattr(sys, "argv", [str(path), "--help"])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(path), run_name="__main__")
        assert stopped.value.code == 0 and f"usage: {path.name}" in capsys.readouterr().out


def test_has_a_run_reached_its_last_step(tmp_path):
    run = write_run(tmp_path / "run")
    assert read_runs.finished(run, 4) and not read_runs.finished(run, 5)
    assert not read_runs.finished(tmp_path, 1)
    assert read_runs.where(run) == ["--out", str(run)]  # killed before it wrote anything
    (run / "config.json").write_text("{}")
    assert read_runs.where(run) == ["--resume", str(run)]


def test_compare_reads_a_curve(tmp_path):
    """Completions are 128 a round; an evaluation comes after the seconds of its own step."""
    expected = [[0, 384, 640], [0, 5, 15], [0.2, 0.6, 0.8]]
    np.testing.assert_allclose(compare.curve(write_run(tmp_path / "run")), expected)


def test_compare_table(tmp_path):
    """By hand: two seeds that are .1 apart have a standard error of .05."""
    curves = {}
    for method, slower in (("grpo", 1), ("dapo", 2)):
        runs = [(0.2, 0.6, 0.8), (0.3, 0.7, 0.9)]
        runs = [write_run(tmp_path / f"{method}-{i}", run, slower) for i, run in enumerate(runs)]
        curves[method] = list(map(compare.curve, runs))
    head, _, grpo, dapo = compare.table(curves, "add", 3).splitlines()
    assert head == (
        "| add | paper | 128 completions | 384 completions | 15 s | 3 steps | these took |"
    )
    after = ".383 ± .050 | .650 ± .050"  # .2 + .4 * 128 / 384 = .333, and .433
    assert grpo == f"| GRPO | 43.7 | {after} | .850 ± .050 | .850 ± .050 | 640 completions, 15 s |"
    after = f"{after} | .700 ± .050"  # a quarter of the way from 10 to 30 s: .65, and .75
    assert dapo == f"| DAPO |  | {after} | .850 ± .050 | 640 completions, 30 s |"


def test_compare_runs_what_is_missing(tmp_path, monkeypatch, capsys):
    """A finished run is not run again, an interrupted one is continued, a failure is told."""
    commands = []

    def fake(command, **_):
        commands.append(command[1:])
        if command[1].name == "grpo.py":
            write_run(Path(command[-1]))
        return subprocess.CompletedProcess(command, int("--no-alpha" in command), "", "it broke")

    monkeypatch.setattr(subprocess, "run", fake)
    methods = {name: compare.METHODS[name] for name in ("gpg-0.6", "grpo")}
    monkeypatch.setattr(compare, "METHODS", methods)
    write_run(tmp_path / "add" / "gpg-0.6-0")
    half = tmp_path / "add" / "grpo-0"
    half.mkdir()
    (half / "config.json").write_text("{}")
    flags = ["--out", str(tmp_path), "--seeds", "1"]
    compare.main([*flags, "--steps", "4"])
    assert [command[0].name for command in commands] == ["grpo.py"]
    assert commands[0][-2:] == ["--resume", str(half)]
    assert "| GRPO | 43.7 | .378 |" in capsys.readouterr().out
    methods = {"gpg-plain": ("GPG", "", "gpg.py --no-alpha")}
    monkeypatch.setattr(compare, "METHODS", methods)
    with pytest.raises(UserError, match="gpg-plain, seed 0: it broke"):
        compare.main(flags)
    assert commands[1][-2:] == ["--out", str(tmp_path / "add" / "gpg-plain-0")]


def test_sweep(tmp_path, monkeypatch, capsys, model_dirs):
    """Real runs of two steps, of which the evaluation says reward = beta + seed / 100."""
    monkeypatch.setattr(sweep, "GRID", {"copg": [1.0, 0.1], "ipo": [0.1], "dpo": [0.3]})
    monkeypatch.setattr(sweep, "SEEDS", 2)

    def evaluate(model, ref_model, tokenizer, reward_model, task, args):
        names = "reward", "utility", "kl", "length"
        return {name: args.beta + args.seed / 100 for name in names}, []

    resumed, train = [], copg.train

    def watched(args):
        resumed.append(args.resume)
        return train(args)

    monkeypatch.setattr(common, "draw_curves", lambda directory: None)  # slow
    monkeypatch.setattr(copg, "evaluate", evaluate)
    monkeypatch.setattr(copg, "train", watched)
    flags = ["--model", str(model_dirs["qwen2"]), "--task", "add", "--pairs", "8", "--prompts", "4"]
    flags += ["--max-new-tokens", "3", "--eval-every", "1"]
    out, half = tmp_path / "sweep", tmp_path / "sweep" / "ipo-0.1-0"
    own = ["--loss", "ipo", "--beta", "0.1", "--seed", "0", "--out", str(half)]
    train(copg.parse_args([*flags, *own, "--steps", "1"]))
    flags += ["--steps", "2", "--out", str(out)]
    sweep.main(flags)
    assert resumed == [None] * 3 + [str(half)] + [None] * 3
    lines = (out / "sweep.csv").read_text().splitlines()
    assert lines[0].startswith("loss,beta,seed,step,eval_reward,") and len(lines) == 1 + 7 * 3
    assert lines[4].startswith("copg,1.0,1,0,1.01,") and (out / "sweep.png").exists()
    printed = capsys.readouterr().out
    assert "| copg | 1.0 | 2 | 1.005 ± 0.005 |" in printed  # the best beta, with both seeds
    assert "| copg | 0.1 | 1 | 0.100 |" in printed and "| ipo | 0.1 | 2 | 0.105 ±" in printed
    sweep.main(flags)
    assert len(resumed) == 7  # nothing is run again
    with pytest.raises(UserError, match=r"--lr 0\.5 contradicts"):
        sweep.main([*flags, "--lr", "0.5"])
    with pytest.raises(UserError, match="--beta: the sweep sets it itself"):
        sweep.main([*flags, "--beta=0.2"])


def test_plot(tmp_path, monkeypatch, capsys):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", (0.1, 0.2, 0.3), 3)]
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plot.main([*map(str, runs), "--out", str(tmp_path / "two.png")])
    assert (tmp_path / "two.png").stat().st_size > 5000
    axes = {axis.get_title(): axis for axis in plt.gcf().axes}
    assert set(axes) == {"rounds", "seconds", "eval_accuracy", ""}
    lines = [line.get_xydata().tolist() for line in axes["eval_accuracy"].lines]
    assert lines == [[[0, 0.2], [2, 0.6], [4, 0.8]], [[0, 0.1], [2, 0.2], [4, 0.3]]]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no metrics.csv to read there"),
        ("step,loss\n", "no step in it"),
        ("name,price\ntea,3\n", "not the metrics of a run"),
        ("price\n3\n", "not the metrics of a run"),
        ("step,loss\n0,1,2\n", "not the metrics of a run"),
    ],
)
def test_plot_refuses_what_is_no_run(tmp_path, text, message):
    if text:
        (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        plot.main([str(tmp_path)])
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="--out"):
        plot.main([str(run), "--out", str(tmp_path / "curves.nonsense")])


def test_gpu_dry_run(tmp_path, monkeypatch):
    """A part that fails does not stop the others; what they have seen is in the file."""

    def broken():
        raise RuntimeError("no luck")

    monkeypatch.setitem(gpu.PARTS, "tests", broken)
    parts = ["tests", "sampling", "update", "step"]
    gpu.main(["--dry-run", "--out", str(tmp_path / "gpu.md"), *parts])
    text = (tmp_path / "gpu.md").read_text()
    assert "**failed**: RuntimeError('no luck')" in text and text.count("**failed**") == 1
    for section, rows in (("sampling", 3), ("update", 12), ("step", 4)):
        table = text.split(f"## {section}\n")[1].split("\n\n## ")[0].splitlines()
        table = [line.count("|") for line in table if line.startswith("|")]
        assert len(table) == 2 + rows and len(set(table)) == 1  # no cell with an error
    assert "of micro-batches of 8192 are padding; attention is sdpa" in text


def test_gpu_refuses(monkeypatch):
    with pytest.raises(UserError, match="no such part: nonsense"):
        gpu.main(["--dry-run", "nonsense"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU here"):
        gpu.main([])
