"""The curves of several runs in one figure: `python extras/plot.py runs/gpg runs/grpo`."""

import math
import sys
from pathlib import Path

from shared import read_metrics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run import Parser, draw_curves, plain_errors
from tasks import UserError


def main(argv: list[str] | None = None) -> None:
    parser = Parser("plot.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="default: curves.png")
    args = parser.parse_args(argv)
    runs = {}
    for run in args.runs:
        columns = read_metrics(run)
        rows = [{x: columns[x][i] for x in columns} for i in range(len(columns["step"]))]
        runs[str(run)] = [{x: v for x, v in row.items() if not math.isnan(v)} for row in rows]
    try:
        draw_curves(runs, args.out)
    except ValueError as error:  # it names the formats that there are
        raise UserError(f"--out {args.out}: {error}") from error
    print(args.out)


if __name__ == "__main__":
    with plain_errors("plot.py"):
        main()
