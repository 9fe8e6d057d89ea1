"""Makes a data set of a COCO-format one: photos held out of a split, some of one kind, crops, or many copies.

    python tools/subsets.py hold-out data/more train2017 200 data/parted
    python tools/subsets.py portraits data/parted val2017 100 data/portraits/train2017
    python tools/subsets.py portraits data/coco val2017 43 data/portraits/val2017
    python tools/subsets.py few data/coco train2017 20 data/vehicles/train2017 --category car,bus,truck
    python tools/subsets.py few data/coco train2017 20 data/dinners/train2017 --beside "dining table"
    python tools/subsets.py copies data/coco train2017 118287 data/large

data/parted then holds annotations and links to the photos: 200 in val2017, all others in train2017. data/portraits,
crops around one person each, and data/vehicles and data/dinners hold photos/ and masks/ of each split: what somebody
may have who has few photos of one kind. data/large is of COCO's size, for `tools/benchmark.py start`: the same
photos, by hard links, and annotations under new names and numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it is in tools/ that Python looks

from datasets import COCOPersonDataset
from loading.annotations import split_names
from loading.layout import DEFAULT_OPTIONS, DataOptions
from training.command_line import OneLineParser, run_cli
from utils import UserError, atomic_write, counted

MIN_HEIGHT = 128  # pixels: the smallest person that a portrait is made of
MARGIN = 0.15  # of the longer side of a person's box, on each side of it


def hold_out(content: dict, options: argparse.Namespace) -> str:
    """Writes annotations of two splits, and links to their photos. Returns what was made."""
    total = len(content["images"])
    if not 0 < options.number < total:
        raise UserError(f"{options.number} of {total} photos cannot be held out: some, and not all")
    (options.output / "annotations").mkdir(parents=True)
    splits = split_by_name(content, options.number)
    for split, part in splits.items():
        with atomic_write(options.output / "annotations" / f"instances_{split}.json") as file:
            file.write(json.dumps(part).encode())
        os.symlink((options.root / options.split).resolve(), options.output / split)
    return ", ".join(f"{len(part['images'])} photos in {options.output / split}" for split, part in splits.items())


def split_by_name(content: dict, number: int) -> dict[str, dict]:
    """Splits the content of an annotation file: `number` photos, by the hash of their names, are val2017."""
    images = sorted(content["images"], key=lambda image: sha256(image["file_name"].encode()).hexdigest())
    splits = {}
    for split, chosen in (("val2017", images[:number]), ("train2017", images[number:])):
        ids = {image["id"] for image in chosen}
        annotations = [annotation for annotation in content["annotations"] if annotation["image_id"] in ids]
        splits[split] = content | {"images": chosen, "annotations": annotations}
    return splits


def portraits(content: dict, options: argparse.Namespace) -> str:
    """Writes a crop around the tallest person of each photo, and its mask. Returns what was made."""
    boxes = tallest_persons(content)
    what = f"of a person of {MIN_HEIGHT} pixels or more"
    for rgba, image_id in chosen_photos(options, DEFAULT_OPTIONS, boxes, what):
        save_pair(rgba[crop_around(boxes[image_id], *rgba.shape[:2])], options.output, image_id)
    return f"{counted(options.number, 'portrait')} in {options.output}"


def few(content: dict, options: argparse.Namespace) -> str:
    """Writes photos of a category, or those that show others beside it, and their masks. Returns what was made."""
    wanted, beside = DEFAULT_OPTIONS._replace(category=options.category), {*split_names(options.beside)}
    ids = {category["id"] for category in content["categories"] if category["name"] in beside}
    if unknown := beside - {category["name"] for category in content["categories"]}:
        raise UserError(f"{options.root} has no category {', '.join(sorted(unknown))}")
    shown = {annotation["image_id"] for annotation in content["annotations"]
             if annotation["category_id"] in ids or not beside}  # fmt: skip
    what = f"of {options.category}" + f" beside {options.beside}" * bool(beside)
    for rgba, image_id in chosen_photos(options, wanted, shown, what):
        save_pair(rgba, options.output, image_id)
    return f"{counted(options.number, 'photo')} in {options.output}"


def chosen_photos(
    options: argparse.Namespace, wanted: DataOptions, image_ids: Collection[int], what: str
) -> Iterator[tuple[np.ndarray, int]]:
    """Makes the output's folders, and yields the first photos among some with their masks, as RGBA, and their ids.

    Raises:
        UserError: there are fewer than are to be made.
    """
    dataset = COCOPersonDataset(options.root, options.split, options=wanted)
    indices = [index for index in range(len(dataset)) if dataset.image_id(index) in image_ids]
    if not 0 < options.number <= len(indices):
        photos = f"{counted(len(indices), 'photo')} {what}"
        raise UserError(f"{options.number} cannot be made: {options.root} has {photos}")
    for folder in ("photos", "masks"):
        (options.output / folder).mkdir(parents=True)
    for index in indices[: options.number]:
        yield dataset.original(index), dataset.image_id(index)


def copies(content: dict, options: argparse.Namespace) -> str:
    """Writes annotations of as many photos as wanted, by turns, and links to them. Returns what was made."""
    originals, folder = content["images"], options.output / options.split
    by_image = defaultdict(list)
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    folder.mkdir(parents=True)
    (options.output / "annotations").mkdir()
    images, annotations = [], []
    for number in range(options.number):
        image = originals[number % len(originals)]
        name = f"{number:012d}{Path(image['file_name']).suffix}"
        os.link(options.root / options.split / image["file_name"], folder / name)
        images.append(image | {"id": number, "file_name": name})
        annotations += [annotation | {"image_id": number} for annotation in by_image[image["id"]]]
    annotations = [annotation | {"id": number} for number, annotation in enumerate(annotations)]
    with atomic_write(options.output / "annotations" / f"instances_{options.split}.json") as file:
        file.write(json.dumps(content | {"images": images, "annotations": annotations}).encode())
    return f"{len(images)} photos with {len(annotations)} annotations in {options.output}"


def tallest_persons(content: dict) -> dict[int, list[float]]:
    """Returns, by image id, the box (left, top, width, height) of the tallest person, if it is tall enough."""
    person = next(category["id"] for category in content["categories"] if category["name"] == "person")
    boxes: dict[int, list[float]] = {}
    for annotation in content["annotations"]:
        if annotation["category_id"] == person and not annotation.get("iscrowd"):
            number = annotation["image_id"]
            boxes[number] = max(boxes.get(number, annotation["bbox"]), annotation["bbox"], key=lambda box: box[3])
    return {number: box for number, box in boxes.items() if box[3] >= MIN_HEIGHT}


def crop_around(box: list[float], height: int, width: int) -> tuple[slice, slice]:
    """Returns the rows and columns of a photo that show a box (left, top, width, height) with a margin."""
    margin = MARGIN * max(box[2:])
    left, top = np.maximum(0, np.floor(np.array(box[:2]) - margin)).astype(int)
    right, bottom = (int(np.ceil(box[side] + box[side + 2] + margin)) for side in (0, 1))
    return slice(int(top), min(height, bottom)), slice(int(left), min(width, right))


KINDS = {"hold-out": hold_out, "portraits": portraits, "few": few, "copies": copies}


def save_pair(rgba: np.ndarray, output: Path, image_id: int) -> None:
    """Writes RGBA as a photo and its mask."""
    save(cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGR), output / "photos" / f"{image_id:012d}.jpg")
    save(rgba[..., 3], output / "masks" / f"{image_id:012d}.png")


def save(pixels: np.ndarray, path: Path) -> None:
    with atomic_write(path) as file:
        file.write(cv2.imencode(path.suffix, pixels)[1])


def main(argv: list[str]) -> None:
    parser = OneLineParser("subsets.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=tuple(KINDS), help="what to make")
    parser.add_argument("root", type=Path, help="the COCO-format set")
    parser.add_argument("split", help="its photo folder")
    parser.add_argument("number", type=int, help="photos to hold out, photos or portraits to make, or copies in all")
    parser.add_argument("output", type=Path, help="the folder to make")
    person = DEFAULT_OPTIONS.category
    parser.add_argument("--category", default=person, help="of few: what the masks are of (%(default)s); several: a,b")
    parser.add_argument("--beside", default="", metavar="A,B", help="of few: only photos that show one of these too")
    options = parser.parse_args(argv)
    annotations = options.root / "annotations" / f"instances_{options.split}.json"
    if not annotations.is_file():
        raise UserError(f"there is no {annotations}")
    if options.output.exists():
        raise UserError(f"{options.output} exists: choose another folder")
    print(KINDS[options.kind](json.loads(annotations.read_text()), options))


if __name__ == "__main__":
    sys.exit(run_cli("subsets.py", lambda: main(sys.argv[1:])))
