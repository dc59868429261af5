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
METHODS = {  # name: (what the table calls it, script, flags)
    "grpo": ("GRPO", "grpo.py"),
    "gpg-std-plain": ("GPG, F = std, alpha = 1", "gpg.py --f-norm std --no-alpha --beta-th 0"),
    "gpg-plain": ("GPG, F = 1, alpha = 1", "gpg.py --no-alpha --beta-th 0"),
    "gpg-std-alpha": ("GPG, F = std, alpha", "gpg.py --f-norm std --beta-th 0"),
    "gpg-alpha": ("GPG, F = 1, alpha", "gpg.py --beta-th 0"),
    "gpg-0.6": ("GPG, F = 1, alpha, beta_th = .6", "gpg.py"),
    "gpg-0.8": ("GPG, F = 1, alpha, beta_th = .8", "gpg.py --beta-th 0.8"),
    "dr_grpo": ("Dr. GRPO", "grpo.py --variant dr_grpo"),
    "dapo": ("DAPO", "grpo.py --variant dapo"),
}


def run(method: str, seed: int, args) -> None:
    out = args.out / args.task / f"{method}-{seed}"
    if (out / "curves.png").exists():
        return
    flags = f"--task {args.task} --steps {args.steps} --schedule constant --seed {seed}"
    command = [sys.executable, *METHODS[method][1].split(), *flags.split(), "--out", str(out)]
    print(" ".join(["python", *command[1:]]), flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--overwrite"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if result.returncode:
        raise SystemExit(f"{method}, seed {seed}: {result.stderr[-500:]}")


def curve(directory: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Completions, seconds and accuracy at each evaluation, and the mean share of valid groups."""
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
    valid_share = float(np.mean([float(row["valid_share"]) for row in rows[1:]]))
    return *np.array(points).T, valid_share


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
    least = min(np.mean([seconds[-1] for _, seconds, _, _ in runs]) for runs in curves.values())

    def cell(runs, axis: int, x: float) -> str:
        values = [np.interp(x, run[axis], run[2]) for run in runs]
        error = np.std(values, ddof=1) / len(values) ** 0.5
        return f"{np.mean(values):.3f} ± {error:.3f}".replace("0.", ".")

    print(f"\n| {args.task} | {budget // 3:,} completions | {budget:,} completions "
          f"| equal time, {least / 3:.0f} s | {least:.0f} s | {args.steps} steps | completions "
          "| seconds | valid |\n|---" + "|---" * 8 + "|")  # fmt: skip
    for method, runs in curves.items():
        print(
            f"| {METHODS[method][0]} | {cell(runs, 0, budget / 3)} | {cell(runs, 0, budget)} "
            f"| {cell(runs, 1, least / 3)} | {cell(runs, 1, least)} "
            f"| {cell(runs, 0, np.inf)} | {np.mean([r[0][-1] for r in runs]):,.0f} "
            f"| {np.mean([r[1][-1] for r in runs]):.0f} "
            f"| {np.mean([r[3] for r in runs]):.2f} |"
        )


if __name__ == "__main__":
    main()
