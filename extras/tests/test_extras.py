"""The scripts in extras/: tables and figures from runs, and the measurements in small."""

import itertools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

EXTRAS = Path(__file__).resolve().parent.parent

import alpha as extras_alpha  # noqa: E402
import benchmark  # noqa: E402
import compare  # noqa: E402
import plot  # noqa: E402
import shared  # noqa: E402
import sweep  # noqa: E402

import copg  # noqa: E402
import gpg  # noqa: E402
import grpo  # noqa: E402
import run as run_module  # noqa: E402
from tasks import UserError  # noqa: E402


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
    if path.name == "on_trl.py":
        pytest.importorskip("trl")
    if path.name != "shared.py":  # a module, no script
        monkeypatch.setattr(sys, "argv", [str(path), "--help"])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(path), run_name="__main__")
        assert stopped.value.code == 0 and f"usage: {path.name}" in capsys.readouterr().out


def test_has_a_run_reached_its_last_step(tmp_path):
    run = write_run(tmp_path / "run")
    assert shared.finished(run, 4) and not shared.finished(run, 5)
    assert not shared.finished(tmp_path, 1)
    assert shared.where(run) == ["--out", str(run)]  # killed before it wrote anything
    (run / "config.json").write_text("{}")
    assert shared.where(run) == ["--resume", str(run)]


@pytest.mark.parametrize("best, tried", [(3, [2, 3, 4]), (1, [2, 3, 4, 1, 0]), (5, [2, 3, 4, 5])])
def test_climb(best, tried):
    """The search of a grid ends when both neighbours of the best are worse, or there are none."""
    seen = []

    def value(x):
        seen.append(x)
        return -abs(x - best) if x != 4 or best == 5 else np.nan

    assert shared.climb([0, 1, 2, 3, 4, 5], range(2, 5), value) == best
    assert seen == tried


def test_compare_reads_a_curve(tmp_path):
    """Completions are B G a round; an evaluation comes after the seconds of its own step."""
    expected = [[0, 384, 640], [0, 5, 15], [0.2, 0.6, 0.8]]
    np.testing.assert_allclose(compare.curve(write_run(tmp_path / "run"), 128), expected)


def test_compare_table(tmp_path):
    """By hand: two seeds that are .1 apart have a standard error of .05."""
    runs, methods = [], compare.CHAIN[:2]
    for method, slower in zip(methods, (1, 2), strict=True):
        pair = [(0.2, 0.6, 0.8), (0.3, 0.7, 0.9)]
        pair = [write_run(tmp_path / f"{method.name}-{i}", x, slower) for i, x in enumerate(pair)]
        runs.append([compare.curve(path, 128) for path in pair])
    text = compare.format_table("add", methods, ["1e-4", "3e-4"], runs, 384, 3)
    head, _, grpo, no_kl = text.splitlines()
    assert head == (
        "| add | paper | learning rate | 128 completions | 384 completions | 15 s | 3 steps "
        "| these took |"
    )
    after = ".383 ± .050 | .650 ± .050"  # .2 + .4 * 128 / 384 = .333, and .433
    last = "| .850 ± .050 | 640 completions,"
    assert grpo == f"| GRPO | 43.7 | 1e-4 | {after} | .850 ± .050 {last} 15 s |"
    after = f"{after} | .700 ± .050"  # a quarter of the way from 10 to 30 s: .65, and .75
    assert no_kl == f"| {methods[1].label} |  | 3e-4 | {after} {last} 30 s |"


def test_compare_runs_what_is_missing(tmp_path, monkeypatch, capsys):
    """The learning rate is chosen with a seed of its own. A finished run is not run again, an
    interrupted one is continued, a failure is told."""
    commands = []

    def fake(command, **_):
        commands.append([str(word) for word in command[1:]])
        rate = float(command[command.index("--lr") + 1])
        write_run(Path(command[-1]), (0.1, 0.2, 0.6 - abs(rate - 1e-3)))  # 1e-3 is the best
        return subprocess.CompletedProcess(command, int("--no-alpha" in command), "", "it broke")

    monkeypatch.setattr(subprocess, "run", fake)
    rows = [(method, 16, 8) for method in compare.CHAIN if method.name in ("gpg", "grpo")]
    monkeypatch.setattr(compare, "TABLES", [compare.Table("B = 16", 4, rows)])
    write_run(tmp_path / "add" / "gpg-B16-G8-1e-3-0")
    half = tmp_path / "add" / "grpo-B16-G8-1e-3-0"
    half.mkdir()
    (half / "config.json").write_text("{}")
    flags = ["--task", "add", "--out", str(tmp_path), "--seeds", "1", "--jobs", "1"]
    compare.main(flags)
    chosen = [
        f"{name}-B16-G8-{rate}-100"
        for name in ("grpo", "gpg")
        for rate in ("3e-5", "1e-4", "3e-4", "1e-3", "3e-3")
    ]
    assert [Path(command[-1]).name for command in commands] == [*chosen, half.name]
    assert commands[-1][-2:] == ["--resume", str(half)] and commands[0][-2] == "--out"
    assert " --max-rounds 8 " in " ".join(commands[5]) and "--seed 100" in " ".join(commands[5])
    assert "--eval-first" in commands[0] and "--eval-first" not in commands[-1]
    assert "--prompts 16 --group-size 8 --lr 1e-3 --steps 4" in " ".join(commands[-1])
    printed = capsys.readouterr().out
    assert (
        "| GRPO | 43.7 | 1e-3 |" in printed and "| + beta_th = .6: GPG | 48.3 | 1e-3 |" in printed
    )
    rows = [(method, 16, 8) for method in compare.CHAIN if method.name == "plain"]
    monkeypatch.setattr(compare, "TABLES", [compare.Table("B = 16", 4, rows)])
    with pytest.raises(UserError, match="plain-B16-G8-3e-5-100: it broke"):
        compare.main(flags)
    rows = [(compare.CHAIN[0], 16, 8)]  # a signal stops a run, which still ends well
    monkeypatch.setattr(compare, "TABLES", [compare.Table("B = 16", 9, rows)])
    with pytest.raises(UserError, match="grpo-B16-G8-3e-5-100: it was stopped"):
        compare.main(flags)


def test_compare_changes_one_thing_at_a_time():
    """Every command is one of the script it names, and each link of the chain changes what it
    says."""
    args = []
    for method in compare.CHAIN[:6]:
        script, *flags = method.command.split()
        args.append({"grpo.py": grpo, "gpg.py": gpg}[script].parse_args(flags))
    first, second, third = (vars(a) for a in args[:3])
    changed = [{k for k in a if a[k] != b[k]} - {"out"}
               for a, b in ((first, second), (second, third))]  # fmt: skip
    assert changed == [{"kl_beta"}, {"scale"}]
    assert args[2].aggregate == "sequence" and args[2].clip_high == 0.2
    plain, alpha, full = args[3:]
    assert (plain.f_norm, plain.no_alpha, plain.beta_th) == ("1", True, 0)
    assert (alpha.no_alpha, alpha.beta_th) == (False, 0) and full.beta_th == 0.6
    caps = [m.command.split("--max-rounds ")[1] for m in compare.CHAIN + compare.MORE
            if "--max-rounds" in m.command]  # fmt: skip
    assert caps == ["8"] * 3 and full.max_rounds == 8


# ---- extras/alpha.py ----


@pytest.mark.parametrize("f_norm, alpha", [("1", True), ("1", False), ("std", True)])
def test_the_moments_of_an_update(f_norm, alpha):
    """Every batch of three groups of three, enumerated, through gpg.py's own functions."""
    p, B, n = np.array([0.2, 0.7]), 3, 3
    outcomes = [  # of a group: probability, kind, rewards
        (0.5 * np.prod([p[k] if r else 1 - p[k] for r in rewards]), k, rewards)
        for k in (0, 1)
        for rewards in itertools.product((0.0, 1.0), repeat=n)
    ]
    mean, square = np.zeros(2), 0.0
    for batch in itertools.product(outcomes, repeat=B):
        rewards = torch.tensor([rewards for _, _, rewards in batch], dtype=torch.float64)
        theta = torch.tensor(np.log(p / (1 - p)), requires_grad=True)
        kinds = torch.tensor([k for _, k, _ in batch]).repeat_interleave(n)
        logprobs = F.logsigmoid(theta[kinds] * (2 * rewards.flatten() - 1))[:, None]
        scale = gpg.gradient_scale(rewards)
        if scale:
            advantages = gpg.group_advantages(rewards, f_norm).flatten()
            scale = scale if alpha else 1.0
            loss = gpg.gpg_loss(logprobs, advantages, torch.ones(B * n, 1), scale)
            loss.backward()
            weight = np.prod([w for w, _, _ in batch])
            mean -= weight * theta.grad.numpy()
            square += weight * (theta.grad**2).sum().item()
    ours = extras_alpha.update(p, B, f_norm, alpha, G=n)
    np.testing.assert_allclose(ours["mean"], mean, rtol=1e-12)
    assert ours["variance"] == pytest.approx(square - (mean**2).sum(), rel=1e-10)
    assert ours["sampled"] == B


@pytest.mark.parametrize("need, cap", [(0, 1), (2, 3), (4, 2)])
def test_the_number_of_valid_groups(need, cap):
    """Against 200,000 simulated steps."""
    rng, V, sampled = np.random.default_rng(0), np.zeros(200_000, int), np.zeros(200_000)
    going = np.full(len(V), True)
    for _ in range(cap):
        V += going * rng.binomial(4, 0.3, len(V))
        sampled += 4 * going
        going &= need > V
    weight, groups = extras_alpha.valid_groups(0.3, 4, need, cap)
    np.testing.assert_allclose(weight, np.bincount(V, minlength=len(weight)) / len(V), atol=5e-3)
    assert groups == pytest.approx(sampled.mean(), rel=1e-2) and weight.sum() == pytest.approx(1)


def test_alpha_changes_the_length_of_the_expected_update_only():
    """The README's three lines, as numbers: one factor for all kinds of prompts; with the std, or
    with batches of one kind, another factor for each."""
    true = extras_alpha.P * (1 - extras_alpha.P)

    def spread(mean):
        return np.ptp(mean / true) / (mean / true).mean()

    for beta_th in (0.0, 0.6):
        assert spread(extras_alpha.update(extras_alpha.P, 16, beta_th=beta_th)["mean"]) < 1e-12
    assert spread(extras_alpha.update(extras_alpha.P, 16, "std")["mean"]) > 0.2
    sorted_batches = extras_alpha.update_of_sorted_batches(extras_alpha.P, 16, True)
    assert spread(sorted_batches) > 1
    weights = sorted_batches / true * len(true)
    np.testing.assert_allclose(weights, [5.42, 1.54, 0.88, 2.60], rtol=5e-3)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_alpha_trains_as_torch_does(optimizer, monkeypatch):
    """One learning rate and one seed of twenty, step by step with torch.optim."""
    monkeypatch.setattr(extras_alpha, "SEEDS", 3)
    prompts = extras_alpha.Prompts(2, "rising")  # two prompts: all of them are dead in many steps
    ours, alphas = extras_alpha.train(prompts, optimizer)
    rate, seed = 5, 1
    w = torch.zeros(extras_alpha.FEATURES, dtype=torch.float64, requires_grad=True)
    kind = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[optimizer]
    optimizer = kind([w], lr=extras_alpha.RATES[optimizer][rate], weight_decay=0)
    for step in range(extras_alpha.STEPS):
        x, b, u, dead = (torch.tensor(getattr(prompts, name)[step, seed])
                         for name in ("x", "b", "u", "dead"))  # fmt: skip
        logits = x @ w + b
        rewards = ((u < logits.detach().sigmoid()[:, None]) & ~dead[:, None]).double()  # [B, G]
        alpha = gpg.gradient_scale(rewards)
        assert alphas[step, rate, seed] == alpha or (
            np.isnan(alphas[step, rate, seed]) and not alpha
        )
        if alpha:
            logprobs = F.logsigmoid(logits[:, None] * (2 * rewards - 1)).view(-1, 1)
            advantages = gpg.group_advantages(rewards).flatten()
            optimizer.zero_grad()
            gpg.gpg_loss(logprobs, advantages, torch.ones(len(logprobs), 1), alpha).backward()
            optimizer.step()
    assert np.isnan(alphas).any()
    test = torch.tensor(prompts.test_x) @ w + torch.tensor(prompts.test_b)
    assert ours[rate, seed] == pytest.approx(test.sigmoid().mean().item(), rel=1e-6)


def test_alpha_chooses_rates_on_other_seeds():
    """By hand: two rates. The second is better on the seeds that choose and worse on the others."""
    values = np.repeat([[0.2], [0.5]], extras_alpha.SEEDS, 1)
    values[1, 10:] = np.linspace(0.05, 0.15, 10)
    ends = dict.fromkeys(extras_alpha.ARMS, values) | {"alpha": values + 0.1}
    row = extras_alpha.training_row(ends)
    assert row[0] == "0.100 ± 0.011" and row[1] == "0.200 ± 0.011"
    assert row[4] == row[5] == "+0.100 ± 0.000"


def test_alpha_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extras_alpha, "STEPS", 2)
    extras_alpha.main(["--out", str(tmp_path / "alpha.png")])
    assert (tmp_path / "alpha.png").stat().st_size > 20_000
    tables = capsys.readouterr().out.split("\n\n")
    assert [text.count("\n|") for text in tables] == [0, 9, 7, 0, 13, 0]


def test_sweep(tmp_path, monkeypatch, capsys, model_dirs):
    """Real runs of two steps, of which the evaluation says 1 - |log10 beta| + seed / 100: the grid
    of CoPG has to widen upwards, that of IPO downwards, and DPO diverges at its smallest beta."""
    monkeypatch.setattr(sweep, "BETAS", [0.1, 1.0, 10.0])
    monkeypatch.setattr(sweep, "PAPER", {"copg": range(1), "ipo": range(2, 3), "dpo": range(3)})
    monkeypatch.setattr(sweep, "SEEDS", (0, 1))

    def evaluate(model, ref_model, tokenizer, reward_model, task, args):
        assert args.eval_first == (200 if args.seed == 100 else 0)
        names = "eval_reward", "eval_utility", "eval_kl", "eval_length"
        value = float(1 - abs(np.log10(args.beta)) + args.seed / 100)
        return dict.fromkeys(names, value), []

    started, train = [], copg.train

    def watched(args):
        started.append((args.loss, args.beta, args.seed, args.resume))
        run = train(args)
        if (args.loss, args.beta) == ("dpo", 0.1):
            raise RuntimeError("the total norm is non-finite")
        return run

    monkeypatch.setattr(run_module, "draw_curves", lambda *_: None)  # slow
    monkeypatch.setattr(copg, "evaluate", evaluate)
    monkeypatch.setattr(copg, "train", watched)
    flags = ["--model", str(model_dirs["qwen2"]), "--task", "add", "--pairs", "8", "--prompts", "4"]
    flags += ["--max-new-tokens", "3", "--eval-every", "1"]
    out, half = tmp_path / "sweep", tmp_path / "sweep" / "ipo-10.0-100"
    own = ["--loss", "ipo", "--beta", "10", "--seed", "100", "--eval-first", "200"]
    train(copg.parse_args([*flags, *own, "--out", str(half), "--steps", "1"]))
    flags += ["--steps", "2", "--out", str(out)]
    sweep.main(flags)
    seeds = [(1.0, 0, None), (1.0, 1, None)]
    copg_runs = [(0.1, 100, None), (1.0, 100, None), (10.0, 100, None), *seeds]
    ipo_runs = [(10.0, 100, str(half)), (1.0, 100, None), (0.1, 100, None), *seeds]
    expected = [("copg", *x) for x in copg_runs] + [("ipo", *x) for x in ipo_runs]
    assert started == expected + [("dpo", *x) for x in copg_runs]
    lines = (out / "sweep.csv").read_text().splitlines()
    assert lines[0] == "loss,beta,seed,step,eval_reward,eval_utility,eval_kl,eval_length"
    assert len(lines) == 1 + 15 * 3 + 1  # the row of the divergence
    assert "dpo,0.1,100,nan,nan,nan,nan,nan" in lines and "copg,1.0,1,2,1.01,1.01" in lines[15]
    assert (out / "sweep.png").stat().st_size > 20_000
    printed = capsys.readouterr().out
    assert "| copg | 10.0 | chooses | 1.000 |" in printed  # 1 - 1 + 1
    assert "| copg | **1.0** | 2 others | 1.005 ± 0.005 |" in printed
    assert "| dpo | 0.1 | chooses | nan |" in printed
    curve = {name: [0.5] for name in sweep.END} | {"eval_utility": [np.nan]}  # it is the reward
    table = sweep.table({"copg": {1.0: curve}}, {"copg": (1.0, [curve, curve])})
    assert table.splitlines()[0] == "| loss | beta | seeds | reward | KL | length |"
    started.clear()
    sweep.main(flags)
    assert not started  # nothing is run again
    sweep.main([*flags, "--out", str(tmp_path / "2"), "--losses", "copg", "--betas", "1", "10"])
    assert started[:3] == [("copg", beta, 100, None) for beta in (1.0, 10.0, 0.1)]
    with pytest.raises(UserError, match=r"--lr 0\.5 contradicts"):
        sweep.main([*flags, "--lr", "0.5"])
    with pytest.raises(UserError, match="--beta: the sweep sets it itself"):
        sweep.main([*flags, "--beta=0.2"])


def test_plot(tmp_path, monkeypatch, capsys):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", (0.1, 0.2, 0.3), 3)]
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: figures.append(self) or savefig(self, *a, **k)
    )
    plot.main([*map(str, runs), "--out", str(tmp_path / "two.png")])
    assert (tmp_path / "two.png").stat().st_size > 5000
    axes = {axis.get_title(): axis for axis in figures[0].axes}
    assert set(axes) == {"rounds", "seconds", "eval_accuracy"}
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


def test_the_gpus_parts_of_the_benchmark_run_dry(capsys):
    """Every cell of the three tables is a number, no error."""
    benchmark.main(["precision", "decode", "update", "--dry-run"])
    tables = capsys.readouterr().out.split("\n\n| model")[1:]
    rows = [[line for line in table.splitlines() if line.startswith("|")] for table in tables]
    assert [len(lines) - 1 for lines in rows] == [2, 1, 6]
    cells = [cell.strip() for lines in rows for line in lines[1:] for cell in line.split("|")[3:-1]]
    for cell in cells:
        float(cell.strip("%").replace(",", ""))


def test_the_benchmark_measures_both_sides(capsys, monkeypatch):
    """Without TRL and with one turn; what is printed are medians and a ratio."""
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(benchmark, "take_turns", one_turn)
    benchmark.main(["step", "sample"])
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step: ours [\d.]+ s", lines[1]) and len(lines) == 6
    line = r"sample, .*: ours [\d,.]+ tokens/s, generate [\d,.]+ tokens/s, ratio [\d.]+"
    assert all(re.fullmatch(line, x) for x in lines[2:])


def one_turn(repeats, **sides):
    return {name: [function(*args)] for name, (function, *args) in sides.items()}


def test_the_benchmark_refuses(monkeypatch):
    with pytest.raises(UserError, match="nonsense"):
        benchmark.main(["--dry-run", "nonsense"])
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU here"):
        benchmark.main(["decode"])
