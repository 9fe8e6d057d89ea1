"""Lays runs over one another: their curves in one picture, their best epochs, the settings in which they differ.

    python tools/compare.py checkpoints/first checkpoints/second
    python tools/compare.py checkpoints/* --output talk.png
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it is in tools/ that Python looks

from training.checkpoints import HISTORY, RUN_JSON
from training.curves import COLOURS, best_row, column, label, marker, save_figure
from training.settings import OneLineParser, answer
from training.streams import steady_streams
from utils import UserError, writing_to

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {  # by the column that each shows, its title and unit
    "val_iou": ("IoU", "validation, mean over photos"), "val_dice": ("Dice", "validation, mean over photos"),
    "val_loss": ("Loss", "validation, by its own weights"),
    "learning_rate": ("Learning rate", "at the epoch's last step"),
}  # fmt: skip
PLACES = {"checkpoint_dir", "run_name", "resume"}  # settings that say where a run lies, not what it is
STYLES = ("-", (0, (4, 2)), ":")  # for more runs than there are colours


@dataclass
class Finished:
    """What a run has left."""

    name: str  # in the picture
    history: list[dict[str, float]]  # a row an epoch
    settings: dict | None  # by name, and by annotation file what it held; None where nothing tells


def main(options: argparse.Namespace) -> None:
    names = [folder.name for folder in options.runs]
    runs = [read_run(folder, folder.name if names.count(folder.name) == 1 else str(folder)) for folder in options.runs]
    print(table(best_rows(runs)), table(differences(runs)), sep="\n\n")
    for run in runs:
        if run.settings is None:
            print(f"{run.name} has no {RUN_JSON} that can be read: its settings are not known")
    with writing_to(str(options.output)):
        save_figure(functools.partial(draw, runs=runs), options.output)
    print(f"\nwritten to {options.output}")


# --- reading ----------------------------------------------------------------------------------------------


def read_run(folder: Path, name: str) -> Finished:
    """A run's history and settings.

    Raises:
        UserError: it has no history, or one without an epoch.
    """
    path = folder / HISTORY
    try:
        with open(path, newline="") as file:
            rows = [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(file)]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError):  # a word, a row that is too short or too long
        rows = []
    if not rows or not rows[0].keys() >= {"epoch", *PANELS}:
        raise UserError(f"{path} is no history of a run, or holds no epoch")
    return Finished(name, rows, read_settings(folder / RUN_JSON))


def read_settings(path: Path) -> dict | None:
    """Of a run.json; None where there is none that can be read."""
    try:
        facts = json.loads(path.read_bytes())
        return facts["settings"] | (facts["data"] or {})
    except (OSError, ValueError, KeyError, TypeError):  # an older run, or somebody has edited it
        return None


# --- telling ----------------------------------------------------------------------------------------------


def best_rows(runs: list[Finished]) -> list[list[str]]:
    rows = [["run", "epochs", "best epoch", "IoU", "Dice"]]
    for run in runs:
        best = best_row(run.history)
        scores = f"{best['val_iou']:.3f}", f"{best['val_dice']:.3f}"
        rows.append([run.name, f"{run.history[-1]['epoch']:.0f}", f"{best['epoch']:.0f}", *scores])
    return rows


def differences(runs: list[Finished]) -> list[list[str]]:
    """A row a setting that is not the same in all runs of which the settings are known."""
    known = [run for run in runs if run.settings is not None]
    rows = [["setting", *(run.name for run in known)]]
    for name in dict.fromkeys(name for run in known for name in run.settings if name not in PLACES):
        values = [str(run.settings.get(name, "-")) for run in known]
        if len({*values}) > 1:
            rows.append([name, *values])
    return rows if len(rows) > 1 else [["no setting differs"]]


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


# --- drawing ----------------------------------------------------------------------------------------------


def draw(figure: Figure, runs: list[Finished]) -> None:
    """Four panels over the epochs; a run is a line, its best epoch a star."""
    panels = dict(zip(PANELS, figure.subplots(2, 2).flat, strict=True))
    for place, run in enumerate(runs):
        look = {"color": COLOURS[place % len(COLOURS)], "linestyle": STYLES[place // len(COLOURS) % len(STYLES)]}
        best = best_row(run.history)
        for name, axes in panels.items():
            axes.plot(column(run.history, "epoch"), column(run.history, name), marker=marker(run.history), **look)
            if name in ("val_iou", "val_dice"):
                axes.plot(best["epoch"], best[name], "*", color=look["color"], markeredgecolor="black", markersize=16)
    for name, axes in panels.items():
        axes.set(title=PANELS[name][0], ylabel=PANELS[name][1])
        label(axes)
    columns = max(1, min(4, 90 // max(len(run.name) for run in runs)))
    names = [f" {run.name}" for run in runs]  # with an underscore at its beginning it would be left out
    figure.legend(panels["val_loss"].get_lines(), names, loc="outside lower center", ncols=columns, handlelength=2.5)
    figure.suptitle("star: the best epoch, by IoU")


# --- the command line -------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("compare.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, e.g. checkpoints/first")
    parser.add_argument("--output", type=Path, default=Path("compare.png"), help="the picture to make (%(default)s)")
    return parser.parse_args(argv)


def run_command(argv: list[str]) -> int:
    """The whole program. Returns its exit code: 0, or 2 for a user's mistake."""
    steady_streams()
    return answer("compare.py", lambda: main(parse(argv[1:])))


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
