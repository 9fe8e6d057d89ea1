"""Compares runs: their curves in one picture, their best epochs, the settings in which they differ.

    python tools/compare.py checkpoints/first checkpoints/second
    python tools/compare.py checkpoints/* --output talk.png
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks for imports in tools/

from training.checkpoints import HISTORY, RUN_JSON
from training.command_line import OneLineParser, run_cli
from training.pictures import COLOURS, best_row, column, label, marker, save_figure
from utils import UserError, explain_write_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {"val_iou": "validation IoU", "val_dice": "validation Dice", "val_loss": "validation loss",
          "learning_rate": "learning rate"}  # fmt: skip
RESULTS = ("epochs", "best epoch", "IoU", "Dice")


class Run(NamedTuple):
    """What a run has left."""

    name: str
    history: list[dict[str, float]]  # a row an epoch
    best: dict[str, float]  # the row of the best epoch
    facts: dict  # its results, its settings and what its annotation files held


def read_run(folder: Path) -> Run:
    """Reads a run's history and settings; raises UserError if a file is missing or damaged, or there is no epoch."""
    try:
        with open(folder / HISTORY, newline="") as file:
            history = [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(file)]
        content = json.loads((folder / RUN_JSON).read_bytes())
        best = best_row(history, content["settings"].get("best_metric", "iou"))
        epochs = f"{history[-1]['epoch']:.0f}", f"{best['epoch']:.0f}"
        results = *epochs, f"{best['val_iou']:.3f}", f"{best['val_dice']:.3f}"
        facts = dict(zip(RESULTS, results, strict=True)) | content["settings"] | (content["data"] or {})
        return Run(str(folder), history, best, facts)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{folder / HISTORY} or {RUN_JSON} is damaged, or holds no epoch of a run") from None


def draw(figure: Figure, runs: list[Run]) -> None:
    """Draws four panels over the epochs: each run is a line, and its best epoch a star."""
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for run, colour in zip(runs, cycle(COLOURS), strict=False):
            axes.plot(column(run.history, "epoch"), column(run.history, name), color=colour, marker=marker(run.history))
            axes.plot(run.best["epoch"], run.best[name], "*", color=colour, markeredgecolor="black", markersize=16)
        axes.set_title(title)
        label(axes)
    names = [run.name for run in runs]
    columns = max(1, min(4, 90 // max(map(len, names))))
    figure.legend(figure.axes[0].get_lines()[::2], names, loc="outside lower center", ncols=columns, handlelength=2.5)


def main(options: argparse.Namespace) -> None:
    """Prints a column for each run, of its results and the settings that are not the same in all; draws the curves."""
    runs = [read_run(folder) for folder in options.runs]
    names = dict.fromkeys(name for run in runs for name in run.facts)
    rows = [[name, *(str(run.facts.get(name, "-")) for run in runs)] for name in names]
    rows = [["", *(run.name for run in runs)], *(row for row in rows if row[0] in RESULTS or len({*row[1:]}) > 1)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    with explain_write_errors(str(options.output)):
        save_figure(lambda figure: draw(figure, runs), options.output)
    print(f"written to {options.output}")


def run_command(argv: list[str]) -> int:
    """Runs the whole program and returns its exit code: 0, or 2 for a user's mistake."""
    parser = OneLineParser("compare.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, e.g. checkpoints/first")
    parser.add_argument("--output", type=Path, default=Path("compare.png"), help="the picture to make (%(default)s)")
    return run_cli("compare.py", lambda: main(parser.parse_args(argv[1:])))


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
