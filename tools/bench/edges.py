"""Edges: composites whose alpha and colours are known, cut out with and without what cutting.edges does for them."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from cutting.cutter import Cutter, load
from cutting.edges import alpha_of, foreground, to_opacity
from datasets import COCOPersonDataset, letterbox, restore
from evaluate import compare

COMPOSITES = 12
SIDE = 1600  # pixels of a composite's longer side
SQUARE = 384  # pixels: the network's
SOFTNESS = (0.0, 1.0, 2.0)  # pixels of the square by which a network blurs its edges


@dataclass
class Composite:
    photo: np.ndarray  # uint8 RGB
    alpha: np.ndarray  # float32, in [0, 1]
    person: np.ndarray  # uint8 RGB: what was mixed with a background


def edges(options: argparse.Namespace) -> str:
    """Mean errors in the edge band, in 1/1000 of the range; and real photos, if there is a checkpoint."""
    dataset = COCOPersonDataset(options.data_root, options.split)
    rows = [measure(composite, softness) for composite in composites(dataset) for softness in SOFTNESS]
    head = "| network's blur | alpha: enlarged | refined | ratio | colours: photo's | freed | ratio |"
    title = f"### Edges of {COMPOSITES} composites of {SIDE} pixels, network of {SQUARE}"
    lines = [title, "", head, "|" + " --- |" * 7]
    for softness in SOFTNESS:
        chosen = [row for row in rows if row["softness"] == softness]
        cells = [f"{softness} px"]
        for before, after in (("enlarged", "refined"), ("spill", "freed")):
            cells += [f"{1000 * statistics.mean(row[name] for row in chosen):.1f}" for name in (before, after)]
            ratios = sorted(row[after] / row[before] for row in chosen)
            cells.append(f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *on_photos(options)])


def composites(dataset: COCOPersonDataset) -> Iterator[Composite]:
    """The silhouette of one photo, hairs added, filled with a second photo's colours, before a third."""
    rng = np.random.default_rng(0)
    large = [i for i in range(len(dataset)) if 0.05 < (dataset.alpha(i) > 0).mean() < 0.5]
    for _ in range(COMPOSITES):
        shape, *fillings = (dataset.original(int(i)) for i in rng.choice(large, 3, replace=False))
        scale = SIDE / max(shape.shape[:2])
        size = tuple(round(side * scale) for side in shape.shape[1::-1])
        person, background = (cv2.resize(f[..., :3], size, interpolation=cv2.INTER_CUBIC) for f in fillings)
        alpha = silhouette(np.ascontiguousarray(shape[..., 3]), size, rng)
        photo = person * alpha[..., None] + background * (1 - alpha[..., None])
        yield Composite(photo.round().astype(np.uint8), alpha, person)


def silhouette(mask: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A mask enlarged with a smooth contour, hairs growing out of it, and the soft edge of a lens."""
    smooth = cv2.GaussianBlur(cv2.resize(mask, size, interpolation=cv2.INTER_CUBIC), (0, 0), size[0] / 400)
    drawn = (smooth > 127).astype(np.uint8) * np.uint8(255)
    for contour in cv2.findContours(drawn, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]:
        for start in contour.reshape(-1, 2)[rng.integers(0, 80) :: 40]:
            angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(5, 30)
            end = (start + length * np.array([np.cos(angle), np.sin(angle)])).astype(int)
            cv2.line(drawn, start.tolist(), end.tolist(), 255, int(rng.integers(1, 3)), cv2.LINE_AA)
    return cv2.GaussianBlur(drawn.astype(np.float32) / 255, (0, 0), rng.uniform(0.8, 2.5))


def measure(composite: Composite, softness: float) -> dict[str, float]:
    photo, alpha = composite.photo, composite.alpha
    square, metadata = letterbox(photo, SQUARE)
    exact = letterbox(np.dstack([(alpha * 255).astype(np.uint8)] * 3), SQUARE)[0][..., 0].astype(np.float32) / 255
    probabilities = cv2.GaussianBlur(exact, (0, 0), softness) if softness else exact
    enlarged, refined = restore(probabilities, metadata), alpha_of(probabilities, square, metadata, photo)
    band = cv2.dilate(((alpha > 0.01) & (alpha < 0.99)).astype(np.uint8), np.ones((15, 15), np.uint8)) > 0
    mixed = (alpha > 0.02) & (alpha < 0.98)
    freed = foreground(photo, to_opacity(refined, None), square, metadata)
    return {
        "softness": softness,
        "enlarged": np.abs(enlarged - alpha)[band].mean(), "refined": np.abs(refined - alpha)[band].mean(),
        "spill": spill(photo, composite, mixed), "freed": spill(freed, composite, mixed),
    }  # fmt: skip


def spill(colours: np.ndarray, composite: Composite, mixed: np.ndarray) -> float:
    """Mean error of the colours, counted by alpha: as much of it as is seen."""
    error = np.abs(colours[mixed].astype(np.float32) - composite.person[mixed]) / 255
    return float((error * composite.alpha[mixed][:, None]).mean())


def on_photos(options: argparse.Namespace) -> list[str]:
    if not Path(options.checkpoint).exists():
        return [f"No checkpoint {options.checkpoint}: real photos were not measured.", ""]
    cutter = load(options.checkpoint, "cpu")
    dataset = COCOPersonDataset(options.data_root, options.split)
    found = [on_photo(cutter, dataset.original(index)) for index in range(len(dataset))]
    lines = [f"On {len(dataset)} real photos of {options.split}, means:", "", "| | IoU | boundary IoU |"]
    lines.append("| --- | --- | --- |")
    for way in ("enlarged", "refined", "cut"):
        figures = (statistics.mean(photo[way][name] for photo in found) for name in ("iou", "boundary_iou"))
        lines.append(f"| {way} | {' | '.join(f'{figure:.4f}' for figure in figures)} |")
    return [*lines, ""]


def on_photo(cutter: Cutter, rgba: np.ndarray) -> dict[str, dict]:
    rgb, truth = np.ascontiguousarray(rgba[..., :3]), rgba[..., 3] > 0
    square, metadata = letterbox(rgb, cutter.image_size)
    probabilities = cutter.probabilities([square])[0]
    refined = alpha_of(probabilities, square, metadata, rgb)
    ways = {"enlarged": restore(probabilities, metadata) > 0.5, "refined": refined > 0.5}
    ways["cut"] = to_opacity(refined, None, 0.5, metadata["scale"]) > 127  # by predict.py --threshold 0.5
    return {name: compare(mask, truth) for name, mask in ways.items()}
