"""GPG, its ablations, GRPO, Dr. GRPO and DAPO side by side: `python extras/compare.py --task add`.

Runs every method with every seed, in OUT/<task>/<method>-<seed>, and prints a table. A finished run
is not run again, an interrupted one is continued. The learning rate is constant, so that a run's
curve may be read at any point: after equal numbers of sampled completions, and after equal times.
The time is that of sampling and updates. Each run has one thread, and two go at a time.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from read_runs import finished, read_metrics, where

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

ROOT = Path(__file__).resolve().parent.parent

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
COMPLETIONS = 128  # of a round: the scripts' 16 prompts with 8 completions each


def run(method: str, seed: int, args) -> None:
    """Bring one run to its last step. Raises UserError with what the run says if it fails."""
    out = args.out / args.task / f"{method}-{seed}"
    if finished(out, args.steps):
        return
    script, *flags = METHODS[method][2].split()
    flags += f"--task {args.task} --steps {args.steps} --schedule constant --seed {seed}".split()
    flags += where(out)
    print(" ".join(["python", script, *flags]), flush=True)
    result = subprocess.run(
        [sys.executable, ROOT / script, *flags], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode:
        raise common.UserError(f"{method}, seed {seed}: {result.stderr.strip()[-500:]}")


def curve(directory: Path) -> np.ndarray:
    """[3, n]: completions, seconds and accuracy at each of n evaluations."""
    metrics = read_metrics(directory)
    completions = np.nancumsum(COMPLETIONS * metrics["rounds"])
    seconds = np.nancumsum(metrics["seconds"])  # a step's, without evaluation and checkpoint
    evaluated = ~np.isnan(metrics["eval_accuracy"])
    return np.array([completions, seconds, metrics["eval_accuracy"]])[:, evaluated]


def table(curves: dict[str, list[np.ndarray]], task: str, steps: int) -> str:
    """{method: the curve of each seed} as Markdown: mean and standard error over the seeds."""
    budget = COMPLETIONS * steps
    least = min(np.mean([run[1][-1] for run in runs]) for runs in curves.values())

    def cell(runs, axis: int, x: float) -> str:
        values = [np.interp(x, run[axis], run[2]) for run in runs]
        text = f"{np.mean(values):.3f}"
        if len(values) > 1:
            text += f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}"
        return text.replace("0.", ".")

    heads = [
        task, "paper", f"{budget // 3:,} completions", f"{budget:,} completions",
        f"{least:.0f} s", f"{steps} steps", "these took",
    ]  # fmt: skip
    lines = [heads, ["---"] * len(heads)]
    for method, runs in curves.items():
        completions, seconds, _ = np.mean([run[:, -1] for run in runs], 0)
        lines.append([
            *METHODS[method][:2], cell(runs, 0, budget / 3), cell(runs, 0, budget),
            cell(runs, 1, least), cell(runs, 0, np.inf),
            f"{completions:,.0f} completions, {seconds:.0f} s",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(argv: list[str] | None = None) -> None:
    parser = common.Parser("compare.py", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    add = parser.add_argument
    add("--task", default="add", help="as of gpg.py (default: add)")
    add("--steps", type=common.count, default=60, help="of every run (default: 60)")
    add("--seeds", type=common.count, default=5, help="runs of every method (default: 5)")
    add("--jobs", type=common.count, default=2, help="runs at a time (default: 2)")
    add("--out", type=Path, default=ROOT / "runs" / "compare", help="default: runs/compare")
    args = parser.parse_args(argv)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [(method, seed, args) for seed in range(args.seeds) for method in METHODS]
        list(pool.map(lambda job: run(*job), jobs))
    curves = {
        method: [curve(args.out / args.task / f"{method}-{s}") for s in range(args.seeds)]
        for method in METHODS
    }
    print(f"\n{table(curves, args.task, args.steps)}")


if __name__ == "__main__":
    with common.plain_errors("compare.py"):
        main()
