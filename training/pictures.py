"""Pictures of a run: the curves of its history, and rows of photos with their masks and cutouts."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Callable, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor

from loading.unreadable import SkipUnreadable
from models import UNetAutoencoder
from training.batches import autocast, to_model_input
from utils import SCORES, UserError, atomic_write, reason

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart. Training curves are dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TRAIN_LINE = {"linestyle": (0, (4, 2)), "markerfacecolor": "white"}
BEST_LINE = {"color": "#F0E442", "linewidth": 5}
RESTART_LINE = {"color": "#555555", "linewidth": 1.2, "linestyle": ":"}
MAX_MARKERS = 30  # epochs; the points of a longer history are not marked one by one
STYLE = {
    "figure.figsize": (11, 7.5), "savefig.dpi": 150, "figure.constrained_layout.use": True,
    "font.size": 14, "axes.titlesize": 15, "axes.titlelocation": "left", "figure.titlesize": 17, "legend.fontsize": 13,
    "legend.frameon": False, "legend.handlelength": 1.2, "legend.handletextpad": 0.4, "legend.columnspacing": 1,
    "legend.borderpad": 0.1, "legend.borderaxespad": 0.2,
    "lines.linewidth": 2, "lines.markersize": 6, "axes.grid": True, "grid.color": "#dddddd",
    "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False,
}  # fmt: skip

PREVIEW_PHOTOS = 6
SAMPLES, SAMPLES_A_ROW, SAMPLE_SIDE = 12, 6, 160  # of each split in data.png; pixels
CAPTIONS = ("photo", "truth", "prediction", "cutout")
CAPTION_HEIGHT = 24  # pixels
GAP = 4  # pixels between two pictures


def save_curves(history: list[dict], path: Path, best_metric: str = "iou") -> None:
    """Writes the loss, its terms, the scores and the learning rates of a history's epochs, of at least one."""
    save_figure(lambda figure: draw_curves(figure, history, best_metric), path)


def save_figure(draw: Callable[[Figure], None], path: Path) -> None:
    """Writes what `draw` draws on an empty figure as a PNG of 1650 x 1125 pixels, whole or not at all."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"matplotlib|training\.pictures")  # for good: threads share the filters
    try:
        import matplotlib.figure  # takes a second

        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # not the user's own configuration
            matplotlib.rcParams.update(STYLE)
            figure = matplotlib.figure.Figure()  # without pyplot, which may look for a screen
            draw(figure)
            with atomic_write(path) as file:
                figure.savefig(file, format="png")
    except OSError:
        raise
    except Exception as error:  # whatever matplotlib raises
        raise UserError(f"{path} cannot be drawn: {reason(error)}") from None


def draw_curves(figure: Figure, history: list[dict], best_metric: str) -> None:
    """Draws four panels: the loss, the scores with a star for the best epoch, the loss's terms, the learning rates."""
    (loss, scores), (terms, rates) = figure.subplots(2, 2)
    names = {name: SCORES[name] for name in dict.fromkeys(["iou", "dice", best_metric])}
    plot_metrics(loss, history, {"loss": ""}, COLOURS[-1:])
    plot_metrics(scores, history, names)
    plot_metrics(terms, history, {name[4:]: name[4:-5] for name in history[-1] if re.fullmatch("val_.+_loss", name)})
    plot_learning_rates(rates, history)
    loss.set(title="Loss", ylabel="weighted sum of its terms")
    scores.set(title="Scores", ylabel="at best 1")
    terms.set(title="Terms", ylabel="of the loss, not weighted", yscale="log")  # some are a hundred times smaller
    rates.set(title="Learning rate", ylabel="at the epoch's last step")
    best, last = best_row(history, best_metric), history[-1]["epoch"]
    star = {"color": BEST_LINE["color"], "markeredgecolor": "black", "markersize": 18}
    scores.plot(best["epoch"], best[f"val_{best_metric}"], "*", **star)
    values = ", ".join(f"{text} {best[f'val_{name}']:.3f}" for name, text in names.items())
    figure.suptitle(f"best epoch by validation {names[best_metric]}: {best['epoch']:.0f} of {last:.0f} ({values})")
    mark_epochs(figure, history, best["epoch"])


def mark_epochs(figure: Figure, history: list[dict], best: float) -> None:
    """Marks the best epoch and the learning rate's restarts in each panel; explains all lines below the panels."""
    from matplotlib.lines import Line2D

    restarts = [row["epoch"] for row, after in pairwise(history) if after["learning_rate"] > row["learning_rate"]]
    for axes in figure.axes:
        axes.axvline(best, zorder=0, **BEST_LINE)
        for epoch in restarts:
            axes.axvline(epoch, **RESTART_LINE)
        axes.set_xlim(history[0]["epoch"] - 0.5, history[-1]["epoch"] + 0.5)
        label(axes)
    grey = {"color": "#555555", "marker": "o"}
    key: dict[str, dict] = {"validation": grey, "training": grey | TRAIN_LINE, "best epoch": BEST_LINE}
    key |= {"restart of the learning rate": RESTART_LINE} if restarts else {}
    lines = [Line2D([], [], label=name, **look) for name, look in key.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), handlelength=2.5)


def best_row(history: list[dict], metric: str = "iou") -> dict:
    """Returns the epoch that best_model.pth is of; without such a mark that of a metric's highest validation value."""
    marked = [row for row in history if row.get("best")]
    if marked:
        return marked[-1]
    return max(history, key=lambda row: (math.isfinite(row[f"val_{metric}"]), row[f"val_{metric}"]))


def column(history: list[dict], name: str) -> list[float]:
    """Returns a value of each epoch, NaN, which is not drawn, where there is none."""
    return [row.get(name, math.nan) for row in history]


def plot_metrics(axes: Axes, history: list[dict], labels: dict[str, str], colours: Sequence[str] = COLOURS) -> None:
    """Plots training and validation curves; `labels` are the legend's, by column name without train_ and val_."""
    epochs = column(history, "epoch")
    for colour, (name, text) in zip(cycle(colours), labels.items(), strict=False):
        look = {"color": colour, "marker": marker(history)}
        axes.plot(epochs, column(history, f"train_{name}"), **look, **TRAIN_LINE)
        axes.plot(epochs, column(history, f"val_{name}"), label=text, **look)


def plot_learning_rates(axes: Axes, history: list[dict]) -> None:
    """Plots the encoder's and the decoder's, or one curve if they are the same."""
    encoder, decoder = column(history, "learning_rate"), column(history, "decoder_learning_rate")
    lines = {"": encoder} if encoder == decoder else {"encoder": encoder, "decoder": decoder}
    for colour, (text, values) in zip(COLOURS, lines.items(), strict=False):
        axes.plot(column(history, "epoch"), values, color=colour, marker=marker(history), label=text)


def marker(history: list[dict]) -> str:
    """Returns matplotlib's marker for the points of a curve: circles, or none in a long history."""
    return "o" if len(history) <= MAX_MARKERS else ""


def label(axes: Axes) -> None:
    """Gives a panel whole epochs, plain numbers, and its legend above, where no curve can be."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4)


@torch.inference_mode()
def preview(
    model: UNetAutoencoder, dataset: SkipUnreadable, device: torch.device, amp_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Returns targets and predictions of a few photos of a data set, the same ones every time, for `save_sheet`."""
    indices = np.linspace(0, len(dataset) - 1, min(PREVIEW_PHOTOS, len(dataset)), dtype=int).tolist()
    images, targets = to_model_input(torch.stack([dataset[index] for index in indices]).to(device))
    model.eval()
    with autocast(device, amp_dtype):  # one at a time: the memory may not hold them all
        predictions = torch.cat([model.predict(image) for image in images.split(1)])
    own = dataset.own_pixels([*map(dataset.shown, indices)])[:, None]  # bars would be taken for the photo
    return targets.cpu() * own, predictions.cpu() * own


def save_sheet(targets: Tensor, predictions: Tensor, path: Path, labels: Sequence[str] = ()) -> None:
    """Writes a picture with a row for each photo: the photo, its true mask, the predicted alpha, the cutout.

    `targets` and `predictions` are RGBA, float (N, 4, S, S) in [0, 1]; `labels` are lines of text above the rows.
    """
    targets, predictions = ((rgba * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
                            for rgba in (targets, predictions))  # fmt: skip
    truths, alphas = (np.repeat(rgba[..., 3:], 3, axis=3) for rgba in (targets, predictions))
    columns = targets[..., :3], truths, alphas, on_checkerboard(predictions)  # each (N, S, S, 3)
    padding = (0, 0), (0, GAP), (0, GAP), (0, 0)
    rows = np.concatenate([np.pad(cells, padding, constant_values=255) for cells in columns], axis=2)
    width, step = rows.shape[2], targets.shape[2] + GAP
    if labels:
        rows = [np.vstack([_text_strip({0: text}, width), row]) for text, row in zip(labels, rows, strict=True)]
    captions = _text_strip({column * step: caption for column, caption in enumerate(CAPTIONS)}, width)
    write_png(np.vstack([captions, *rows]), path)


def save_samples(train: SkipUnreadable, val: SkipUnreadable, path: Path) -> None:
    """Writes a sheet of samples as they are trained on and validated: photos, and what their masks cut out."""
    strips = []
    for name, dataset in (("training", train), ("validation", val)):
        indices = np.linspace(0, len(dataset) - 1, min(SAMPLES, len(dataset)), dtype=int)
        samples = [cv2.resize(dataset[int(i)].permute(1, 2, 0).numpy(), (SAMPLE_SIDE,) * 2) for i in indices]
        samples += [np.full_like(samples[0], 255)] * (-len(samples) % SAMPLES_A_ROW)
        cells = [np.hstack([rgba[..., :3], on_checkerboard(rgba)]) for rgba in samples]
        padded = [np.pad(cell, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for cell in cells]
        rows = [np.hstack(padded[k : k + SAMPLES_A_ROW]) for k in range(0, len(padded), SAMPLES_A_ROW)]
        strips += [_text_strip({0: f"{name}: photo, and what its mask cuts out"}, rows[0].shape[1]), *rows]
    write_png(np.vstack(strips), path)


def write_png(rgb: np.ndarray, path: Path) -> None:
    """Writes uint8 RGB (height, width, 3) as a PNG, whole or not at all."""
    with atomic_write(path) as file:
        file.write(cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes())


def on_checkerboard(rgba: np.ndarray, side: int = 8) -> np.ndarray:
    """Returns straight RGBA, uint8 (..., H, W, 4), over a grey checkerboard: uint8 RGB (..., H, W, 3)."""
    rows, columns = np.indices(rgba.shape[-3:-1]) // side
    ground = np.where((rows + columns) % 2, 204, 255)[..., None]
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return (rgba[..., :3] * alpha + ground * (1 - alpha)).round().astype(np.uint8)


def _text_strip(texts: dict[int, str], width: int) -> np.ndarray:
    """Returns a white strip with texts at the given columns."""
    strip = np.full((CAPTION_HEIGHT, width, 3), 255, np.uint8)
    for column, text in texts.items():
        origin = (column + 4, CAPTION_HEIGHT - 7)
        cv2.putText(strip, text, origin, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (40, 40, 40), 1, cv2.LINE_AA)
    return strip
