"""Makes a COCO-format split of any size, by default of train2017's, to measure with: shapes at random, grey photos.

    python tools/bench/full_size.py /tmp/full_size                            # 0.6 GB, in a new or an empty folder
    python tools/bench/full_size.py /tmp/small --photos 1000 --annotations 7000
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, it is in tools/bench/ that Python looks

import cv2
import numpy as np
from tqdm import tqdm

from training.settings import OneLineParser, UsageError, answer
from utils import UserError, make_writable

# What COCO's instances_train2017.json holds.
PHOTOS, ANNOTATIONS, PERSONS, PHOTOS_WITH_PERSONS = 118_287, 860_001, 262_465, 64_115
SIZES = [(640, 480), (480, 640), (640, 427), (500, 375)]  # width, height
PERSON, OTHER = 1, 18
# Per category, counted in COCO: the median of the points of a polygon and their logarithm's spread; the share of
# the annotations that are a crowd's run lengths.
POINTS = {PERSON: (22, 0.67), OTHER: (14, 0.69)}
CROWDS = {PERSON: 0.02, OTHER: 0.006}
LINKS = 10_000  # names that one file may go by: ext4 allows 65,000


def make_split(root: Path, split: str, photos: int = PHOTOS, annotations: int = ANNOTATIONS, seed: int = 0) -> Path:
    """Writes `root/annotations/instances_{split}.json` and the photos that it names, and returns the first's path.

    Persons and other things come in COCO's proportions. The photos are grey, and most are further names (hard
    links) of a few files. Drawn from `seed`: the same every time.

    Raises:
        UserError: `root` holds anything, which is then left as it is, or cannot be written.
    """
    _refuse_what_is_there(root)
    names = [f"{number:012d}.jpg" for number in range(1, photos + 1)]
    sizes = [SIZES[number % len(SIZES)] for number in range(photos)]
    _write_photos(root / split, names, sizes)
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:  # piece by piece: it would be gigabytes as Python objects
        file.write('{"info": {}, "licenses": [], "images": ')
        _write_list(file, (_photo_record(n, *record) for n, record in enumerate(zip(names, sizes, strict=True), 1)))
        file.write(', "annotations": ')
        records = _annotation_records(sizes, annotations, np.random.default_rng(seed))
        bar = tqdm(records, path.name, annotations, unit="annotation", disable=not sys.stderr.isatty())
        _write_list(file, bar)
        file.write(', "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]}')
    return path


def _refuse_what_is_there(root: Path) -> None:
    try:
        if root.exists() and any(root.iterdir()):
            raise UserError(f"{root} is not empty: name a folder that is, or that does not exist")
        make_writable(root)
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror}") from None


def _write_list(file, records: Iterator[dict]) -> None:
    opening = "["
    for record in records:
        file.write(opening + json.dumps(record))
        opening = ", "
    file.write("]" if opening == ", " else "[]")


def _write_photos(folder: Path, names: list[str], sizes: list[tuple[int, int]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    originals: dict[tuple[int, int], tuple[Path, int]] = {}
    for name, size in zip(names, sizes, strict=True):
        original, links = originals.get(size, (None, LINKS))
        if links < LINKS:
            os.link(original, folder / name)
        else:
            original, links = folder / name, 0
            cv2.imwrite(str(original), np.full((size[1], size[0], 3), 128, np.uint8))
        originals[size] = (original, links + 1)


def _photo_record(image_id: int, name: str, size: tuple[int, int]) -> dict:
    """With the fields that COCO has and nobody here reads: they make a quarter of a photo's reading time."""
    return {
        "license": 3, "file_name": name, "coco_url": f"http://images.cocodataset.org/train2017/{name}",
        "height": size[1], "width": size[0], "date_captured": "2013-11-19 20:40:11",
        "flickr_url": f"http://farm5.staticflickr.com/4026/4622125393_{image_id:010x}_z.jpg", "id": image_id,
    }  # fmt: skip


def _annotation_records(sizes: list[tuple[int, int]], count: int, rng: np.random.Generator) -> Iterator[dict]:
    with_persons = rng.permutation(len(sizes))[: max(1, len(sizes) * PHOTOS_WITH_PERSONS // PHOTOS)]
    is_person = rng.permutation(np.arange(count) < count * PERSONS // ANNOTATIONS)
    on_persons, on_any = rng.choice(with_persons, count), rng.integers(len(sizes), size=count)
    for annotation_id in range(1, count + 1):
        person = bool(is_person[annotation_id - 1])
        photo = int((on_persons if person else on_any)[annotation_id - 1])
        category = PERSON if person else OTHER
        crowd = rng.random() < CROWDS[category]
        shape = _crowd(sizes[photo], rng) if crowd else _polygons(sizes[photo], *POINTS[category], rng)
        yield {
            "segmentation": shape, "area": 1234.56785, "iscrowd": int(crowd), "image_id": photo + 1,
            "bbox": [1.08, 187.69, 611.59, 285.84], "category_id": category, "id": annotation_id,
        }  # fmt: skip


def _polygons(size: tuple[int, int], points: int, spread: float, rng: np.random.Generator) -> list[list[float]]:
    """A ragged outline; one thing in ten comes in two pieces, as if something stood before it."""
    return [_outline(size, max(3, int(rng.lognormal(np.log(points), spread))), rng)] * (1 + (rng.random() < 0.1))


def _outline(size: tuple[int, int], points: int, rng: np.random.Generator) -> list[float]:
    radius = min(np.sqrt(rng.lognormal(np.log(1200), 2)), max(size)) / 2
    angles = np.arange(points) * (2 * np.pi / points)
    centre = rng.random((2, 1)) * np.array(size)[:, None]
    outline = centre + np.stack([np.cos(angles), np.sin(angles)]) * (radius * rng.uniform(0.6, 1.4, points))
    return np.clip(outline, 0, np.array(size)[:, None]).T.ravel().round(2).tolist()


def _crowd(size: tuple[int, int], rng: np.random.Generator) -> dict:
    """Run lengths as they are written out for crowds: about a thousand, of all the photo's pixels."""
    cuts = np.sort(rng.integers(size[0] * size[1], size=min(4000, int(rng.lognormal(np.log(800), 0.6)))))
    runs = np.diff(cuts, prepend=0, append=size[0] * size[1])
    return {"counts": runs.tolist(), "size": [size[1], size[0]]}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("full_size.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("root", type=Path, help="new or empty folder to make the split in")
    parser.add_argument("--split", default="train2017", help="the photo folder's name (%(default)s)")
    parser.add_argument("--photos", type=int, default=PHOTOS, help="how many (%(default)s)")
    parser.add_argument("--annotations", type=int, default=ANNOTATIONS, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another one draws others (%(default)s)")
    options = parser.parse_args(argv)
    if min(options.photos, options.annotations) < 1 or options.seed < 0:
        raise UsageError("--photos and --annotations are at least 1, --seed at least 0")
    if options.split in ("", ".", "..", "annotations") or Path(options.split).name != options.split:
        raise UsageError(f"--split {options.split!r} is no name of a photo folder")
    return options


def run_command(argv: list[str]) -> int:
    """The whole program. Returns its exit code: 0, or 2 for a user's mistake."""
    return answer("full_size.py", lambda: print(f"made {make_split(**vars(parse(argv[1:])))}"))


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
