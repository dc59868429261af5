"""Shared by these scripts: reading runs, searching a grid, tables."""

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tasks import UserError


def read_metrics(run: Path) -> dict[str, np.ndarray]:
    """metrics.csv as {column: a value per row}, NaN where a row has none. Raises UserError."""
    path = Path(run) / "metrics.csv"
    try:
        with path.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        columns = {name: [float(row[name] or "nan") for row in rows] for name in rows[0]}
        columns["step"] = list(map(int, columns["step"]))
    except OSError as error:
        raise UserError(f"{run}: no metrics.csv to read there ({error.strerror})") from error
    except IndexError as error:
        raise UserError(f"{path}: no step in it") from error
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: not the metrics of a run") from error
    return {name: np.array(values) for name, values in columns.items()}


def finished(run: Path, steps: int) -> bool:
    """Has this run reached step `steps`?"""
    try:
        return read_metrics(run)["step"][-1] >= steps
    except UserError:
        return False


def where(run: Path) -> list[str]:
    """The flag that starts a run in this directory, or continues an interrupted one."""
    return ["--resume" if (Path(run) / "config.json").exists() else "--out", str(run)]


SELECTION_SEED = 100  # of the runs that choose; the reported seeds are 0, 1, 2, ...


def seed_flags(seed: int) -> list[str]:
    """Runs that choose a hyper-parameter are also evaluated on problems of their own."""
    flags = ["--seed", str(seed)]
    if seed == SELECTION_SEED:
        flags += ["--eval-first", "200"]
    return flags


def climb(grid: list, start: Sequence[int], value: Callable) -> object:
    """The x of the grid with the highest value(x), once both of its neighbours have been tried.

    Tries the indices `start`, then the neighbours of the best. NaN is the lowest value.
    """
    values, new = {}, start
    while new:
        values |= {i: np.nan_to_num(value(grid[i]), nan=-np.inf) for i in new}
        best = max(values, key=values.get)
        new = [i for i in (best - 1, best + 1) if 0 <= i < len(grid) and i not in values]
    return grid[best]


def mean_and_error(values: Sequence[float], sign: str = "") -> str:
    """The mean of the values with its standard error, if there is more than one."""
    text = f"{np.mean(values):{sign}.3f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}"
    return text


def markdown(rows: list[list[str]]) -> str:
    """A table as Markdown; the first row is its head."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
