"""GPG, its ablations, GRPO, Dr. GRPO and DAPO side by side: `python tests/compare.py --task add`.

Runs every method with every seed (runs/compare/<task>/<method>-<seed>; a finished run is not run
again) and prints the README's table. The learning rate is constant, so that a run's curve may be
read at any point: after equal numbers of sampled completions, and after equal times. The time is
that of sampling and updates, without evaluations. Each run has one thread, and two go at a time.
"""

import argparse
import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

METHODS = {  # name: (what the table calls it, the average of the paper's table 1, the command)
    "grpo": ("GRPO", "43.7", "grpo.py"),
    "gpg-std-plain": (
        "GPG, F = std, alpha = 1", "45.3", "gpg.py --f-norm std --no-alpha --beta-th 0",
    ),
    "gpg-plain": ("GPG, F = 1, alpha = 1", "43.9", "gpg.py --no-alpha --beta-th 0"),
    "gpg-std-alpha": ("GPG, F = std, alpha", "44.1", "gpg.py --f-norm std --beta-th 0"),
    "gpg-alpha": ("GPG, F = 1, alpha", "47.8", "gpg.py --beta-th 0"),
    "gpg-0.6": ("GPG, F = 1, alpha, beta_th = .6", "48.3", "gpg.py"),
    "gpg-0.8": ("GPG, F = 1, alpha, beta_th = .8", "48.6", "gpg.py --beta-th 0.8"),
    "dr_grpo": ("Dr. GRPO", "43.7", "grpo.py --variant dr_grpo"),
    "dapo": ("DAPO", "", "grpo.py --variant dapo"),
}  # fmt: skip


def run(method: str, seed: int, args) -> None:
    out = args.out / args.task / f"{method}-{seed}"
    if common.finished(out):
        return
    flags = f"--task {args.task} --steps {args.steps} --schedule constant --seed {seed}"
    command = [sys.executable, *METHODS[method][2].split(), *flags.split(), "--out", str(out)]
    print(" ".join(["python", *command[1:]]), flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--overwrite"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if result.returncode:
        raise SystemExit(f"{method}, seed {seed}: {result.stderr[-500:]}")


def curve(directory: Path) -> np.ndarray:
    """[3, n]: completions, seconds and accuracy at each of n evaluations."""
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    completions = seconds = 0.0
    points = [(0.0, 0.0, float(rows[0]["eval_accuracy"]))]
    since = []  # seconds of the steps since the last evaluation
    for row in rows[1:]:
        completions += 128 * float(row["rounds"])
        if row["eval_accuracy"]:  # its own seconds are the evaluation's too
            seconds += sum(since) + np.mean(since)
            points.append((completions, seconds, float(row["eval_accuracy"])))
            since = []
        else:
            since.append(float(row["seconds"]))
    return np.array(points).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="add")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "compare")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [(method, seed, args) for seed in range(args.seeds) for method in METHODS]
        list(pool.map(lambda job: run(*job), jobs))

    curves = {
        method: [curve(args.out / args.task / f"{method}-{s}") for s in range(args.seeds)]
        for method in METHODS
    }
    budget = 128 * args.steps
    least = min(np.mean([run[1][-1] for run in runs]) for runs in curves.values())

    def cell(runs, axis: int, x: float) -> str:
        values = [np.interp(x, run[axis], run[2]) for run in runs]
        error = np.std(values, ddof=1) / len(values) ** 0.5
        return f"{np.mean(values):.3f} ± {error:.3f}".replace("0.", ".")

    heads = [
        args.task, "paper", f"{budget // 3:,} completions", f"{budget:,} completions",
        f"{least:.0f} s", f"{args.steps} steps", "these took",
    ]  # fmt: skip
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for method, runs in curves.items():
        cells = [
            *METHODS[method][:2], cell(runs, 0, budget / 3), cell(runs, 0, budget),
            cell(runs, 1, least), cell(runs, 0, np.inf),
            f"{np.mean([run[0][-1] for run in runs]):,.0f} completions, "
            f"{np.mean([run[1][-1] for run in runs]):.0f} s",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
