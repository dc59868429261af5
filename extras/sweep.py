"""CoPG, IPO and DPO over the paper's betas: `python extras/sweep.py --eval-every 40`.

Runs copg.py with every beta of every loss, in OUT/<loss>-<beta>-<seed>, then the best beta of each
with two more seeds, and writes sweep.csv and sweep.png: reward against beta (the paper's figure 5),
along training (figure 6), and against the KL; and the hidden utility against the KL. A finished run
is not run again, an interrupted one is continued. All flags but --out are copg.py's own.
"""

import argparse
import csv
import math
import sys
from pathlib import Path

import numpy as np
from read_runs import finished, read_metrics, where

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import copg

GRID = {  # section 6 of the paper, before 6.1
    "copg": [0.01, 0.03, 0.06, 0.1, 0.3, 1.0],
    "ipo": [0.003, 0.01, 0.03, 0.06, 0.1, 0.3],
    "dpo": [0.01, 0.03, 0.06, 0.1, 0.3, 1.0],
}
SEEDS = 3  # of the best beta of each loss
END = "eval_reward", "eval_utility", "eval_kl", "eval_length"  # what the table shows


def run(directory: Path, flags: list[str]) -> dict[str, np.ndarray]:
    """Bring one run to its last step -> {column: a value at each evaluation}."""
    args = copg.parse_args([*flags, *where(directory)])  # also: are these the flags it began with?
    n = len(copg.read_data(args.data).split()[0].prompts) if args.data else args.pairs
    if not finished(directory, args.steps or math.ceil(args.epochs * n / args.prompts)):
        print(f"\n{directory}", flush=True)
        if copg.train(args).stopping:
            raise KeyboardInterrupt("stopped; the same command continues")
    metrics = read_metrics(directory)
    evaluated = ~np.isnan(metrics["eval_kl"])
    return {k: v[evaluated] for k, v in metrics.items() if k == "step" or k.startswith("eval_")}


def sweep(out: Path, flags: list[str]) -> None:
    """Every loss with every beta, then the best of each with more seeds. Raises UserError."""
    curves: dict[tuple[str, float], list[dict]] = {}  # by loss and beta, one of each seed
    best = {}  # {loss: beta}
    seed0 = copg.parse_args(flags).seed
    for loss, betas in GRID.items():

        def reward(beta: float, seed: int = seed0, loss: str = loss) -> float:
            own = ["--loss", loss, "--beta", str(beta), "--seed", str(seed)]
            curve = run(out / f"{loss}-{beta}-{seed}", [*flags, *own])
            if np.isnan(curve["eval_reward"][-1]):
                raise common.UserError("the evaluation has no reward; add --reward-model")
            curves.setdefault((loss, beta), []).append(curve)
            return curve["eval_reward"][-1]

        best[loss] = max(betas, key=reward)
        for seed in range(seed0 + 1, seed0 + SEEDS):
            reward(best[loss], seed)
    with (out / "sweep.csv").open("w", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["loss", "beta", "seed", *curves[loss, best[loss]][0]])
        for key, seeds in curves.items():
            for seed, curve in enumerate(seeds, seed0):
                writer.writerows([*key, seed, *row] for row in zip(*curve.values(), strict=True))
    draw(curves, best, out / "sweep.png")
    print("\n| loss | beta | seeds | reward | utility | KL | length |\n|" + "---|" * 7)
    for (loss, beta), seeds in curves.items():
        ends = np.array([[curve[name][-1] for name in END] for curve in seeds])  # [seeds, 4]
        cells = [f"{mean:.3f}" for mean in ends.mean(0)]
        if len(seeds) > 1:
            errors = ends.std(0, ddof=1) / len(seeds) ** 0.5
            cells = [f"{cell} ± {error:.3f}" for cell, error in zip(cells, errors, strict=True)]
        print(f"| {loss} | {beta} | {len(seeds)} | {' | '.join(cells)} |")
    print(f"\nlook at {out}: sweep.csv, sweep.png")


def draw(curves: dict, best: dict, out: Path) -> None:
    """sweep.png. curves: {(loss, beta): [{column: values} of each seed]}."""
    import matplotlib.pyplot as plt  # slow to import

    plt.switch_backend("Agg")
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for loss, color in zip(GRID, ["C0", "C1", "C2"], strict=True):
        first = [curves[loss, beta][0] for beta in GRID[loss]]  # the first seed of every beta
        ends = {name: [curve[name][-1] for curve in first] for name in END}
        style = {"color": color, "marker": "o", "label": loss}
        axes[0, 0].plot(GRID[loss], ends["eval_reward"], **style)
        seeds = curves[loss, best[loss]]
        steps, rewards = seeds[0]["step"], np.array([curve["eval_reward"] for curve in seeds])
        mean, error = rewards.mean(0), rewards.std(0, ddof=1) / len(seeds) ** 0.5
        axes[0, 1].plot(steps, mean, color=color, label=f"{loss}, beta = {best[loss]}")
        axes[0, 1].fill_between(steps, mean - error, mean + error, color=color, alpha=0.3)
        axes[1, 0].plot(ends["eval_kl"], ends["eval_reward"], **style)
        axes[1, 1].plot(ends["eval_kl"], ends["eval_utility"], **style)
    axes[0, 0].set(xscale="log", xlabel="beta", ylabel="reward at the end")
    axes[0, 1].set(xlabel="step", ylabel=f"reward, {SEEDS} seeds with standard errors")
    axes[1, 0].set(xscale="symlog", xlabel="KL(pi || pi_ref) at the end", ylabel="reward")
    axes[1, 1].set(xscale="symlog", xlabel="KL(pi || pi_ref) at the end", ylabel="hidden utility")
    for axis in axes.flat:
        axis.legend(fontsize=8)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = common.Parser("sweep.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="default: runs/sweep")
    args, flags = parser.parse_known_args(argv)
    for flag in "--loss", "--beta", "--resume":
        if any(word.split("=")[0] == flag for word in flags):
            raise common.UserError(f"{flag}: the sweep sets it itself; leave it out")
    sweep(args.out, flags)


if __name__ == "__main__":
    with common.plain_errors("sweep.py"):
        main()
