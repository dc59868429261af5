"""The curves of several runs in one figure: `python extras/plot.py runs/gpg runs/grpo`."""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from read_runs import read_metrics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common


def draw(runs: list[Path], out: Path) -> None:
    """Every column that one of the runs has, against the step. Raises UserError."""
    tables = [read_metrics(run) for run in runs]
    names = dict.fromkeys(name for table in tables for name in table if name != "step")
    names = [n for n in names if any(np.isfinite(table.get(n, np.nan)).any() for table in tables)]
    rows = math.ceil(len(names) / 4)
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(
        rows, 4, figsize=(12, 2.2 * rows + 0.5), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        for table, color in zip(tables, plt.cm.tab10.colors * len(tables), strict=False):
            values = table.get(name, np.full(len(table["step"]), np.nan))
            there = np.isfinite(values)
            style = {"lw": 1, "color": color}
            axis.plot(table["step"][there], values[there], ".-" if "eval" in name else "-", **style)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
    figure.legend(axes.flat[0].lines, [str(run) for run in runs], loc="outside upper center")
    try:
        figure.savefig(out, dpi=80)
    except ValueError as error:  # it names the formats that there are
        raise common.UserError(f"--out {out}: {error}") from error
    finally:
        plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = common.Parser("plot.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="default: curves.png")
    args = parser.parse_args(argv)
    draw(args.runs, args.out)
    print(args.out)


if __name__ == "__main__":
    with common.plain_errors("plot.py"):
        main()
