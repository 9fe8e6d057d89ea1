"""The curves of a run: its loss and the terms of it, IoU and Dice, the learning rate, drawn from its history alone."""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from utils import CheckpointError, atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, whom everybody can tell apart. What a curve is of has a colour; the training's is dashed and hollow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TRAINING = {"linestyle": (0, (4, 2)), "markerfacecolor": "white"}
RESTART = {"color": "#555555", "linewidth": 1.2, "linestyle": ":"}
BEST = {"color": "#F0E442", "linewidth": 5}
FEW = 30  # epochs: so many points are shown one by one
STYLE = {
    "figure.figsize": (11, 7.5), "savefig.dpi": 150, "figure.constrained_layout.use": True,
    "font.size": 14, "axes.titlesize": 15, "axes.titlelocation": "left", "figure.titlesize": 17, "legend.fontsize": 13,
    "legend.frameon": False, "legend.handlelength": 1.2, "legend.handletextpad": 0.4, "legend.columnspacing": 1,
    "legend.borderpad": 0.1, "legend.borderaxespad": 0.2,
    "lines.linewidth": 2, "lines.markersize": 6, "axes.grid": True, "grid.color": "#dddddd",
    "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False,
}  # fmt: skip


def save_curves(history: list[dict], path: Path) -> None:
    """Writes a PNG of 1650 x 1125 pixels, whole or not at all.

    Args:
        history: a row an epoch, as `report.history_row` makes them; at least one.
        path: of the PNG.

    Raises:
        CheckpointError: it cannot be drawn.
        OSError: it cannot be written.
    """
    save_figure(lambda figure: draw_run(figure, history), path)


def save_figure(draw: Callable[[Figure], None], path: Path) -> None:
    """Writes what `draw` makes of an empty figure; raises as `save_curves`."""
    try:
        matplotlib = import_matplotlib()
        # Of letters that its font lacks. For good: what is restored after a while may be another thread's by then.
        warnings.filterwarnings("ignore", module=r"matplotlib|training\.curves")
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # or it would look as the user's own configuration has it
            matplotlib.rcParams.update(STYLE)
            figure = matplotlib.figure.Figure()  # not pyplot's, which looks for a screen: this one is drawn by Agg
            draw(figure)
            with atomic_write(path) as file:
                figure.savefig(file, format="png")
    except OSError:
        raise
    except Exception as error:  # whatever it is: a picture is not worth a training
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be drawn: {reason}") from None


def import_matplotlib() -> ModuleType:
    """Only when something is drawn: it takes a second. Without a word, and without a file in the user's home."""
    if "matplotlib.figure" in sys.modules:
        return sys.modules["matplotlib"]
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of the fonts that it looks for
    chosen = os.environ.get("MPLCONFIGDIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MPLCONFIGDIR"] = chosen or folder  # for what it learns of the fonts, in the time of the import
        try:
            import matplotlib.figure
        finally:
            if chosen is None:
                del os.environ["MPLCONFIGDIR"]
    return matplotlib


# --- one run ----------------------------------------------------------------------------------------------


def draw_run(figure: Figure, history: list[dict]) -> None:
    """Four panels over the epochs: the loss, its terms, IoU and Dice, the learning rate."""
    (loss, shares), (terms, rates) = panels = figure.subplots(2, 2)
    names = [name[4:] for name in history[-1] if name.startswith("val_") and name.endswith("_loss")][1:]  # not the sum
    draw_parts(loss, history, {"loss": ""}, COLOURS[-1:])
    draw_parts(terms, history, {name: name.removesuffix("_loss") for name in names})
    draw_parts(shares, history, {"iou": "IoU", "dice": "Dice"})
    draw_rates(rates, history)
    loss.set(title="Loss", ylabel="weighted sum of its terms")
    terms.set(title="Terms", ylabel="of the loss, not weighted", yscale="log")  # of colours it is a hundredth
    shares.set(title="IoU and Dice", ylabel="mean over photos, at best 1")
    rates.set(title="Learning rate", ylabel="at the epoch's last step")
    best = best_row(history)
    for axes in panels.flat:
        mark(axes, history, best)
    shares.plot(best["epoch"], best["val_iou"], "*", color=BEST["color"], markeredgecolor="black", markersize=18)
    figure.suptitle(f"best epoch {best['epoch']:.0f} of {history[-1]['epoch']:.0f}: validation IoU "
                    f"{best['val_iou']:.3f}, Dice {best['val_dice']:.3f}")  # fmt: skip
    add_key(figure, {"restart of the learning rate": RESTART} if restarts(history) else {})


def best_row(history: list[dict]) -> dict:
    """The epoch of the highest validation IoU, the first of several."""
    return max(history, key=lambda row: (math.isfinite(row["val_iou"]), row["val_iou"]))


def column(history: list[dict], name: str) -> list[float]:
    """A value an epoch; NaN, which is not drawn, where there is none."""
    return [row.get(name, math.nan) for row in history]


def draw_parts(axes: Axes, history: list[dict], names: dict[str, str], colours: tuple[str, ...] = COLOURS) -> None:
    """Curves of the training and of the validation.

    Args:
        names: what the legend says, by the column's name without `val_` and `train_`.
        colours: one a name, from the first again where they are used up.
    """
    for place, (name, shown) in enumerate(names.items()):
        look = {"color": colours[place % len(colours)], "marker": marker(history)}
        axes.plot(column(history, "epoch"), column(history, f"train_{name}"), **look, **TRAINING)
        axes.plot(column(history, "epoch"), column(history, f"val_{name}"), label=shown, **look)


def draw_rates(axes: Axes, history: list[dict]) -> None:
    """The encoder's and the decoder's, or the one that is both's; a cosine cycle's curve ends with the cycle."""
    names = {"learning_rate": "encoder", "decoder_learning_rate": "decoder"}
    if all(row.get("decoder_learning_rate", row["learning_rate"]) == row["learning_rate"] for row in history):
        names = {"learning_rate": ""}
    ends = [0, *(history.index(row) + 1 for row in restarts(history)), len(history)]
    for colour, (name, shown) in zip(COLOURS, names.items(), strict=False):
        for part in (history[start:end] for start, end in pairwise(ends)):
            label = shown if part[0] is history[0] else ""
            axes.plot(column(part, "epoch"), column(part, name), color=colour, marker=marker(history), label=label)


def marker(history: list[dict]) -> str:
    return "o" if len(history) <= FEW else ""


def restarts(history: list[dict]) -> list[dict]:
    """The epochs after which the learning rate rose again."""
    return [row for row, following in pairwise(history) if following["learning_rate"] > row["learning_rate"]]


def mark(axes: Axes, history: list[dict], best: dict) -> None:
    """The best epoch and the restarts of the learning rate, as upright lines."""
    axes.axvline(best["epoch"], zorder=0, **BEST)
    for row in restarts(history):
        axes.axvline(row["epoch"], **RESTART)
    label(axes)
    axes.set_xlim(history[0]["epoch"] - 0.5, history[-1]["epoch"] + 0.5)


def label(axes: Axes) -> None:
    """Whole epochs and plain numbers; the legend above the panel, where no curve can be."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4)


def add_key(figure: Figure, more: dict[str, dict]) -> None:
    """Below all panels: what the styles of the lines mean."""
    from matplotlib.lines import Line2D

    grey = {"color": "#555555", "marker": "o"}
    key = {"validation": grey, "training": grey | TRAINING, "best epoch": BEST, **more}
    lines = [Line2D([], [], label=name, **look) for name, look in key.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), handlelength=2.5)
