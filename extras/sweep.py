"""CoPG, IPO and DPO over the paper's betas: `python extras/sweep.py --eval-every 20`.

Runs copg.py with every beta of the paper's grids (section 6), or of --betas, and beyond while the
best is an edge. The beta of each loss is chosen by the reward at the end, with a seed and on posts
that are not reported; then three other seeds run with it and are evaluated on other posts. Writes
sweep.csv and sweep.png: reward along training for each beta (the paper's figures 2 to 4), reward
against beta (figure 5), the best betas along training (figure 6), and reward and hidden utility
against the KL.

Runs are in OUT/<loss>-<beta>-<seed>: a finished one is not run again, an interrupted one is
continued. All flags but --out, --losses and --betas are copg.py's own; `--reward-model task` sweeps
on the hidden utility, a reward that is not learned from preferences.
"""

import argparse
import csv
import math
import sys
from pathlib import Path

import numpy as np
from shared import (
    SELECTION_SEED,
    climb,
    finished,
    markdown,
    mean_and_error,
    read_metrics,
    seed_flags,
    where,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import copg
from run import Parser, plain_errors
from tasks import UserError
from tasks.pairs import read_records

BETAS = [0.001, 0.003, 0.01, 0.03, 0.06, 0.1, 0.3, 1.0, 3.0, 10.0]
PAPER = {"copg": range(2, 8), "ipo": range(1, 7), "dpo": range(2, 8)}  # which of them it tries
SEEDS = (0, 1, 2)
END = {  # what the table shows
    "eval_reward": "reward",
    "eval_utility": "utility",  # NaN if the utility is the reward
    "eval_kl": "KL",
    "eval_length": "length",
}


def run(directory: Path, flags: list[str]) -> dict[str, np.ndarray]:
    """Bring one run to its last step -> {column: a value at each evaluation}, the last value NaN if
    the gradient became non-finite."""
    args = copg.parse_args([*flags, *where(directory)])  # a run that began with others is refused
    n = args.pairs
    if args.data:
        n = sum(not record.held_out for record in read_records(args.data))
    diverged = False
    if not finished(directory, args.steps or math.ceil(args.epochs * n / args.prompts)):
        print(f"\n{directory}", flush=True)
        try:
            if copg.train(args).stopping:
                raise KeyboardInterrupt("stopped; the same command continues")
        except RuntimeError as error:
            diverged = "non-finite" in str(error)
            if not diverged:
                raise
    metrics = read_metrics(directory)
    rows = ~np.isnan(metrics["eval_kl"])
    curve = {k: metrics.get(k, np.full(len(rows), np.nan))[rows] for k in ("step", *END)}
    if diverged:
        curve = {name: np.append(values, np.nan) for name, values in curve.items()}
    return curve


def sweep(out: Path, losses: list[str], betas: list[float], flags: list[str]) -> None:
    """The betas of each loss with one seed, then the best with others. Raises UserError."""
    tried: dict[str, dict[float, dict]] = {loss: {} for loss in losses}  # with SELECTION_SEED
    best: dict[str, tuple[float, list[dict]]] = {}  # beta, a curve per seed

    def curve_of(loss: str, beta: float, seed: int) -> dict:
        own = ["--loss", loss, "--beta", str(beta), *seed_flags(seed)]
        return run(out / f"{loss}-{beta}-{seed}", [*flags, *own])

    for loss in losses:

        def reward(beta: float, loss: str = loss) -> float:
            tried[loss][beta] = curve_of(loss, beta, SELECTION_SEED)
            if np.isnan(tried[loss][beta]["eval_reward"][0]):
                raise UserError("the evaluation has no reward; add --reward-model")
            return tried[loss][beta]["eval_reward"][-1]

        start = [BETAS.index(beta) for beta in betas] or PAPER[loss]
        beta = climb(BETAS, start, reward)
        best[loss] = beta, [curve_of(loss, beta, seed) for seed in SEEDS]
    with (out / "sweep.csv").open("w", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["loss", "beta", "seed", "step", *END])
        for loss, (beta, curves) in best.items():
            runs = [(b, SELECTION_SEED, tried[loss][b]) for b in sorted(tried[loss])]
            for b, seed, curve in runs + [(beta, *x) for x in zip(SEEDS, curves, strict=True)]:
                writer.writerows([loss, b, seed, *r] for r in zip(*curve.values(), strict=True))
    draw(tried, best, out / "sweep.png")
    print(f"\n{table(tried, best)}\n\nlook at {out}: sweep.csv, sweep.png")


def table(tried: dict, best: dict) -> str:
    """The last evaluation of every beta, and of the best ones with their seeds, as Markdown."""
    ends = [curve for loss in best for curve in (*tried[loss].values(), *best[loss][1])]
    names = [name for name in END if not all(np.isnan(curve[name][-1]) for curve in ends)]
    rows = [["loss", "beta", "seeds", *(END[name] for name in names)]]
    for loss in best:
        for beta in sorted(tried[loss]):
            cells = [f"{tried[loss][beta][name][-1]:.3f}" for name in names]
            rows.append([loss, str(beta), "chooses", *cells])
    for loss, (beta, curves) in best.items():
        cells = [mean_and_error([curve[name][-1] for curve in curves]) for name in names]
        rows.append([loss, f"**{beta}**", f"{len(curves)} others", *cells])
    return markdown(rows)


def draw(tried: dict, best: dict, out: Path) -> None:
    """sweep.png. tried: {loss: {beta: curve}}, best: {loss: (beta, [curve of each seed])}."""
    from matplotlib import colormaps  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6.5), layout="constrained")
    axes = figure.subplots(2, 4)
    for axis, (loss, curves) in zip(axes[0], tried.items(), strict=False):
        for i, beta in enumerate(sorted(curves)):
            x, y = curves[beta]["step"], curves[beta]["eval_reward"]
            color = colormaps["viridis"](0.9 * i / len(curves))
            lw = 2.5 if beta == best[loss][0] else 1
            axis.plot(x, y, color=color, lw=lw, label=f"{beta:g}")
        axis.set(xlabel="step", ylabel="reward", title=f"{loss}, by beta; the best is thick")
    figure_5, figure_6, reward_kl, utility_kl = axes[1]
    for number, (loss, curves) in enumerate(tried.items()):
        style = {"color": f"C{number}", "marker": "o", "label": loss}
        betas = sorted(curves)
        ends = {name: [curves[beta][name][-1] for beta in betas] for name in END}
        figure_5.plot(betas, ends["eval_reward"], **style)
        style |= {"ls": "none"}  # a smaller beta is not always a larger KL
        reward_kl.plot(ends["eval_kl"], ends["eval_reward"], **style)
        utility_kl.plot(ends["eval_kl"], ends["eval_utility"], **style)
        beta, seeds = best[loss]
        n = min(len(curve["step"]) for curve in seeds)  # one that diverged is shorter
        steps, rewards = seeds[0]["step"][:n], np.array([x["eval_reward"][:n] for x in seeds])
        mean, error = rewards.mean(0), rewards.std(0, ddof=1) / len(seeds) ** 0.5
        figure_6.plot(steps, mean, color=f"C{number}", label=f"{loss}, beta = {beta:g}")
        figure_6.fill_between(steps, mean - error, mean + error, color=f"C{number}", alpha=0.3)
    figure_5.set(xscale="log", xlabel="beta", ylabel="reward at the end")
    figure_6.set(xlabel="step", ylabel="reward", title=f"the best, {len(SEEDS)} other seeds")
    reward_kl.set(xscale="symlog", xlabel="KL(pi || pi_ref) at the end", ylabel="reward")
    utility_kl.set(xscale="symlog", xlabel="KL(pi || pi_ref) at the end", ylabel="hidden utility")
    for axis in axes.flat:
        if axis.lines:
            axis.legend(fontsize=8)
        else:
            axis.set_axis_off()
    figure.savefig(out, dpi=80)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("sweep.py", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    start = "where the search of each loss begins (default: the paper's grid)"
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/sweep"), help="default: runs/sweep")
    add("--losses", nargs="+", choices=PAPER, default=list(PAPER), help="default: all")
    add("--betas", nargs="+", type=float, choices=BETAS, default=[], help=start)
    args, flags = parser.parse_known_args(argv)
    for flag in "--loss", "--beta", "--seed", "--eval-first", "--resume":
        if any(word.split("=")[0] == flag for word in flags):
            raise UserError(f"{flag}: the sweep sets it itself; leave it out")
    sweep(args.out, args.losses, args.betas, flags)


if __name__ == "__main__":
    with plain_errors("sweep.py"):
        main()
