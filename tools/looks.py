"""Measures what the second look, left-out specks and persons continued to the borders are worth in cutouts.

    python tools/looks.py bundled --data-root data/coco --empty data/without_persons

Each row is what evaluate.py measures with something changed; --empty names folders of photos without persons. What the
network computes is kept in checkpoints/looks: another threshold, which is a line of `rows`, takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it is in tools/ that Python looks

from cutting import cutter as cutters
from cutting import persons
from cutting.cutter import Cutter, Look, load, model_digest
from cutting.edges import refine_alpha
from datasets import COCOPersonDataset
from evaluate import evaluate_photos, summarise_by_size
from loading.letterbox import resize
from training.command_line import OneLineParser, run_cli
from utils import atomic_write

FURTHER_IN, TOUCHING = 10, 5  # a fade is alpha so many rows from a border minus that at it; on at least so many pixels
HEAD = "| row | IoU | boundary | <1 % | 1 to 10 % | >10 % | fade at bars | at edges | empty | painted |"


def rows(cutter: Cutter) -> dict[str, dict[str, Any]]:
    """Returns what each row changes: attributes of the cutter, of cutting.cutter or of cutting.persons."""
    one_look, unchanged = {"second_size": None}, lambda probabilities, *_: probabilities
    specks_stay, borders_stay = {"keep_persons": unchanged}, {"continue_to_borders": unchanged}
    wide = {"has_small_persons": lambda look: persons.largest_component(look[0], look[2]["padding"]) < 0.1}
    return {
        "as it is": {},
        "as it was: one look, specks and borders stay": {**one_look, **specks_stay, **borders_stay},
        "one look": one_look,
        **{f"second look {times} times as large": {"second_size": times * cutter.image_size} for times in (2, 3)},
        **{f"second look below {part:.0%}": {"SMALL_PERSONS": part} for part in (0.05, 0.2)},
        "second look where nobody is found too": wide,
        "both looks averaged": {"_look_at": partial(look_at_both, cutter, cutter._look_at)},
        "specks stay": specks_stay,
        **{f"sure from {sure}": {"SURE": sure} for sure in (0.8, 0.95)},
        **{f"specks below {part:.1%} of the photo": {"SMALL_SPECK": part} for part in (0, 0.003)},
        "borders stay": borders_stay,
        "who ends near a border is continued too": {"GOES_ON": 0},
    }


def look_at_both(cutter: Cutter, look_at: Any, photos: list[np.ndarray], size: int) -> list[Look]:
    """Does what `Cutter._look_at` does, but returns the mean of both looks for the second one."""
    looks = look_at(photos, size)
    firsts = looks if size == cutter.image_size else look_at(photos, cutter.image_size)
    pairs = ((look, resize(first.probabilities, (size, size))) for look, first in zip(looks, firsts, strict=True))
    return [look._replace(probabilities=(look.probabilities + first) / 2) for look, first in pairs]


def read_or_compute(compute: Any, folder: Path, squares: list[np.ndarray]) -> np.ndarray:
    """Does what `Cutter.probabilities` does, or reads from the disk what it has computed before."""
    paths = [folder / f"{blake2b(square.tobytes(), digest_size=12).hexdigest()}.npy" for square in squares]
    for path, square in zip(paths, squares, strict=True):
        if not path.exists():
            with atomic_write(path) as file:
                np.save(file, compute([square])[0])
    return np.stack([np.load(path) for path in paths])


def fades(cutter: Cutter, rgba: np.ndarray) -> Iterator[tuple[bool, float]]:
    """Yields of each border that persons touch whether a bar lies beside it, and how much lower alpha is at it."""
    rgb = np.ascontiguousarray(rgba[..., :3])
    look = cutter.look([rgb])[0]
    alpha = refine_alpha(*look[:3], rgb)
    for turns, bar in enumerate(np.roll(look.metadata["padding"], -1)):  # top, right, bottom, left
        touching = np.rot90(rgba[..., 3] > 0, turns)[: FURTHER_IN + 1].all(axis=0)
        if touching.sum() >= TOUCHING:
            yield bar > 0, float(np.subtract(*np.rot90(alpha, turns)[[FURTHER_IN, 0]])[touching].mean())


def measure(cutter: Cutter, dataset: COCOPersonDataset, empty: list[Path]) -> list[Any]:
    """Returns the values of a row, at the photos' own size."""
    scores = evaluate_photos(cutter, dataset, range(len(dataset)), threads=1)
    sizes = summarise_by_size([row for row in scores if isinstance(row, dict)], "original")
    borders = [fade for index in range(len(dataset)) for fade in fades(cutter, dataset.original(index))]
    at_borders = [np.mean([fade for bar, fade in borders if bar == beside_bar]) for beside_bar in (True, False)]
    painted = [cutter(path)[..., 3] / 255 for path in empty]
    on_empty = [np.mean([alpha.max() < 0.5 for alpha in painted]), np.mean([alpha.mean() for alpha in painted])]
    ious = [group["iou"] for group in sizes.values()]
    return [ious[0], sizes["all"]["boundary_iou"], *ious[1:], *at_borders, *on_empty]


def main(argv: list[str]) -> None:
    parser = OneLineParser("looks.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", help="the trained model, or bundled")
    parser.add_argument("--data-root", required=True, help="photos with persons, annotated: those of val2017")
    parser.add_argument("--empty", default="", help="folders of photos without persons: a,b")
    options = parser.parse_args(argv)
    cutter, cache = load(options.checkpoint), Path("checkpoints/looks", model_digest(options.checkpoint))
    cache.mkdir(parents=True, exist_ok=True)
    cutter.probabilities = partial(read_or_compute, cutter.probabilities, cache)  # type: ignore[method-assign]
    dataset = COCOPersonDataset(options.data_root, "val2017", cutter.image_size)
    empty = sorted(path for folder in options.empty.split(",") if folder for path in Path(folder).glob("*.jpg"))
    print(HEAD, "|" + " --- |" * (HEAD.count("|") - 1), sep="\n")
    for name, changes in rows(cutter).items():
        with ExitStack() as stack:
            for attribute, value in changes.items():
                owner = next(owner for owner in (cutter, cutters, persons) if hasattr(owner, attribute))
                stack.enter_context(patch.object(owner, attribute, value))
            values = [f"{value:.3f}" for value in measure(cutter, dataset, empty)]
            print("|", " | ".join([name, *values]), "|", flush=True)


if __name__ == "__main__":
    sys.exit(run_cli("looks.py", lambda: main(sys.argv[1:])))
