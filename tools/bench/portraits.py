"""Makes photos of one kind of a COCO-format set: the tallest person of each photo, with some margin.

    python tools/bench/portraits.py data/parted val2017 100 data/portraits/train2017
    python tools/bench/portraits.py data/coco val2017 43 data/portraits/val2017

data/portraits then holds photos and masks for `trainer.py --data-root`: what somebody may bring who has few.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, it is in tools/bench/ that Python looks

from datasets import COCOPersonDataset
from tools.bench.hold_out import command
from tools.bench.variants import coco_of
from utils import UserError, atomic_write, counted

TALL = 128  # pixels of a person's height
MARGIN = 0.15  # of a person's longer side, to each side


def main(options: argparse.Namespace) -> None:
    annotations = options.root / "annotations" / f"instances_{options.split}.json"
    if not annotations.is_file():
        raise UserError(f"there is no {annotations}")
    if options.output.exists():
        raise UserError(f"{options.output} is there already: choose another folder")
    dataset = COCOPersonDataset(options.root, options.split)
    found = [*portraits(dataset, annotations)]
    if not 0 < options.number <= len(found):
        has = f"{options.root} has {counted(len(found), 'photo')}"
        raise UserError(f"{has} of a person of {TALL} pixels or more: {options.number} cannot be made")
    for folder in ("photos", "masks"):
        (options.output / folder).mkdir(parents=True)
    for index, part in found[: options.number]:
        write(dataset.original(index)[part], options.output, f"{dataset.image_id(index):012d}")
    print(f"{options.output}: {counted(options.number, 'photo')}")


def write(photo: np.ndarray, folder: Path, name: str) -> None:
    """uint8 RGBA as a photo and its mask."""
    for kind, pixels in (("photos", cv2.cvtColor(photo, cv2.COLOR_RGBA2BGR)), ("masks", photo[..., 3])):
        ending, options = (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 95]) if kind == "photos" else (".png", [])
        with atomic_write(folder / kind / f"{name}{ending}") as file:
            file.write(cv2.imencode(ending, pixels, options)[1])


def portraits(dataset: COCOPersonDataset, annotations: Path) -> Iterator[tuple[int, tuple[slice, slice]]]:
    """The places of the photos on which a person is tall enough, and the part around the tallest."""
    known = coco_of(annotations)
    for index in range(len(dataset)):
        image = known.imgs[dataset.image_id(index)]
        persons = known.loadAnns(known.getAnnIds([image["id"]], known.getCatIds(["person"]), iscrowd=False))
        box = max((person["bbox"] for person in persons), key=lambda box: box[3], default=[0, 0, 0, 0])
        if box[3] >= TALL:
            yield index, around(box, image["height"], image["width"])


def around(box: list[float], height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of a photo that show a box (left, top, width, height) and a margin, as far as the photo goes."""
    margin = MARGIN * max(box[2:])
    left, top = np.maximum(0, np.floor(np.array(box[:2]) - margin)).astype(int)
    right, bottom = (int(np.ceil(box[side] + box[side + 2] + margin)) for side in (0, 1))
    return slice(int(top), min(height, bottom)), slice(int(left), min(width, right))


def run_command(argv: list[str]) -> int:
    """The whole program. Returns its exit code: 0, or 2 for a user's mistake."""
    return command("portraits.py", __doc__, main, argv)


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
