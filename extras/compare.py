"""From GRPO to GPG, one change at a time, with DAPO beside them: `python extras/compare.py`.

Three tables: the methods with B = 16 and with B = 64 prompts per step (tables 1, 9 and 15 of the
GPG paper), and the group size with 128 completions per step (its table 11). All methods that sample
again have the same cap on the rounds per step. The learning rate of each is chosen by its accuracy
after equal numbers of completions, from a grid that widens until the best is inside, with a seed
that is not reported and on other draws of the test problems. Five other seeds are reported.

The learning rate is constant, so that a run's curve may be read at any point: after equal numbers
of sampled completions, after equal times (sampling and updates only), and after equal steps. Runs
are in OUT/<task>/<method>-B<B>-G<G>-<learning rate>-<seed>: a finished one is not run again, an
interrupted one is continued. Each has one thread, and two go at a time.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run import Parser, plain_errors, positive_int
from tasks import UserError

ROOT = Path(__file__).resolve().parent.parent
RATES = ["1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3"]


class Method(NamedTuple):
    name: str
    label: str  # in the table
    paper: str  # the average in the paper's tables, for Qwen2.5-Math-7B
    command: str


CHAIN = [
    Method("grpo", "GRPO", "43.7", "grpo.py"),
    Method("no-kl", "- KL (and clip: it never acts)", "", "grpo.py --kl-beta 0"),
    Method("no-std", "- std", "", "grpo.py --kl-beta 0 --scale none"),
    Method("plain", "token mean: GPG, alpha = 1", "43.9", "gpg.py --no-alpha --beta-th 0"),
    Method("alpha", "+ alpha", "47.8", "gpg.py --beta-th 0"),
    Method("gpg", "+ beta_th = .6: GPG", "48.3", "gpg.py --max-rounds 8"),
    Method("dapo", "DAPO", "", "grpo.py --variant dapo --max-rounds 8"),
]
STD = "gpg.py --f-norm std --beta-th 0"
MORE = [
    Method("gpg-0.8", "GPG, beta_th = .8", "48.6", "gpg.py --beta-th 0.8 --max-rounds 8"),
    Method("std", "GPG, F = std, alpha = 1", "45.3", f"{STD} --no-alpha"),
    Method("std-alpha", "GPG, F = std, alpha", "44.1", STD),
]
SIZES = {2: "41.9", 4: "43.3", 8: "45.3", 16: "47.3"}  # G: table 11, F = std, alpha = 1


class Table(NamedTuple):
    name: str
    steps: int
    rows: list[tuple[Method, int, int]]  # with B and G


TABLES = [
    Table("B = 16", 60, [(method, 16, 8) for method in CHAIN + MORE]),
    Table("B = 64", 20, [(method, 64, 8) for method in CHAIN]),
    Table("128 completions per step", 60, [
        (Method("std", f"G = {G}", paper, f"{STD} --no-alpha"), 128 // G, G)
        for G, paper in SIZES.items()
    ]),
]  # fmt: skip


def run(method: Method, B: int, G: int, rate: str, seed: int, steps: int, args) -> np.ndarray:
    """Bring one run to its last step -> its curve. Raises UserError if the run fails."""
    out = args.out / args.task / f"{method.name}-B{B}-G{G}-{rate}-{seed}"
    if not finished(out, steps):
        script, *flags = (
            f"{method.command} --task {args.task} --prompts {B} --group-size {G}".split()
        )
        flags += f"--lr {rate} --steps {steps} --schedule constant".split()
        flags += [*seed_flags(seed), *where(out)]
        tqdm.write(" ".join(["python", script, *flags]))
        command = [sys.executable, ROOT / script, *flags]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=env, capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"{out.name}: {result.stderr.strip()[-500:]}")
        if not finished(out, steps):
            raise UserError(f"{out.name}: it was stopped; the same command continues it")
    return curve(out, B * G)


def curve(directory: Path, completions: int) -> np.ndarray:
    """[3, n]: completions, seconds and accuracy at each of n evaluations; a round samples
    `completions`."""
    metrics = read_metrics(directory)
    sampled = np.nancumsum(completions * metrics["rounds"])
    seconds = np.nancumsum(metrics["seconds"])  # a step's, without evaluation and checkpoint
    evaluated = ~np.isnan(metrics["eval_accuracy"])
    return np.array([sampled, seconds, metrics["eval_accuracy"]])[:, evaluated]


def measure(table: Table, args) -> str:
    """All runs of a table -> the table as Markdown."""
    budget = min(B * G for _, B, G in table.rows) * table.steps  # completions

    def best_rate(row) -> str:
        def accuracy(rate: str) -> float:
            completions, _, accuracies = run(*row, rate, SELECTION_SEED, table.steps, args)
            return np.interp(budget, completions, accuracies)

        return climb(RATES, range(1, 4), accuracy)

    def reported(job) -> np.ndarray:
        seed, row, rate = job
        return run(*row, rate, seed, table.steps, args)

    with ThreadPoolExecutor(args.jobs) as pool:
        rates = list(pool.map(best_rate, table.rows))
        rows = list(zip(table.rows, rates, strict=True))
        curves = pool.map(reported, [(seed, *row) for seed in range(args.seeds) for row in rows])
        curves = list(curves)  # all methods with seed 0, then with seed 1, ...
    runs = [curves[i :: len(rows)] for i in range(len(rows))]
    methods = [method for method, _, _ in table.rows]
    head = f"{args.task}, {table.name}"
    return format_table(head, methods, rates, runs, budget, table.steps)


def format_table(head: str, methods, rates, runs, budget: int, steps: int) -> str:
    """The curves of each method's seeds as Markdown: mean and standard error over the seeds."""
    least = min(np.mean([run[1][-1] for run in seeds]) for seeds in runs)

    def cell(seeds, axis: int, x: float) -> str:
        values = [np.interp(x, run[axis], run[2]) for run in seeds]
        return mean_and_error(values).replace("0.", ".")

    budgets = [f"{budget // 3:,} completions", f"{budget:,} completions"]
    lines = [
        [head, "paper", "learning rate", *budgets, f"{least:.0f} s", f"{steps} steps", "these took"]
    ]
    for method, rate, seeds in zip(methods, rates, runs, strict=True):
        completions, seconds, _ = np.mean([run[:, -1] for run in seeds], 0)
        cells = [cell(seeds, 0, budget / 3), cell(seeds, 0, budget)]
        cells += [cell(seeds, 1, least), cell(seeds, 0, np.inf)]
        cost = f"{completions:,.0f} completions, {seconds:.0f} s"
        lines.append([method.label, method.paper, rate, *cells, cost])
    return markdown(lines)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("compare.py", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    add = parser.add_argument
    add("--task", default="add-hard", help="of gpg.py (default: add-hard)")
    add("--seeds", type=positive_int, default=5, help="reported runs per method (default: 5)")
    add("--jobs", type=positive_int, default=2, help="runs at a time (default: 2)")
    add("--out", type=Path, default=ROOT / "runs" / "compare", help="default: runs/compare")
    args = parser.parse_args(argv)
    for table in TABLES:
        print(f"\n{measure(table, args)}", flush=True)


if __name__ == "__main__":
    with plain_errors("compare.py"):
        main()
