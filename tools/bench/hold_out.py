"""Holds photos out of a COCO-format set: the same ones whenever and wherever it is done.

    python tools/bench/hold_out.py data/more train2017 200 data/parted

data/parted then holds annotations and links to the photos: val2017 of 200 photos, train2017 of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, it is in tools/bench/ that Python looks

from training.settings import OneLineParser, answer
from utils import UserError, atomic_write


def part(content: dict, number: int) -> dict[str, dict]:
    """The content of an annotation file as those of two, by split; a photo's place is decided by its name's hash."""
    order = sorted(content["images"], key=lambda image: sha256(image["file_name"].encode()).hexdigest())
    return {"val2017": only(content, order[:number]), "train2017": only(content, order[number:])}


def only(content: dict, images: list[dict]) -> dict:
    numbers = {image["id"] for image in images}
    annotations = [annotation for annotation in content["annotations"] if annotation["image_id"] in numbers]
    return {**content, "images": images, "annotations": annotations}


def main(options: argparse.Namespace) -> None:
    source = options.root / "annotations" / f"instances_{options.split}.json"
    if not source.is_file():
        raise UserError(f"there is no {source}")
    photos = len(json.loads(source.read_text())["images"])
    if not 0 < options.number < photos:
        raise UserError(f"{options.number} of {photos} photos cannot be held out: some, and not all")
    if options.output.exists():
        raise UserError(f"{options.output} is there already: choose another folder")
    (options.output / "annotations").mkdir(parents=True)
    for split, content in part(json.loads(source.read_text()), options.number).items():
        with atomic_write(options.output / "annotations" / f"instances_{split}.json") as file:
            file.write(json.dumps(content).encode())
        os.symlink((options.root / options.split).resolve(), options.output / split)
        print(f"{options.output / split}: {len(content['images'])} photos")


def command(name: str, about: str, main: Callable[[argparse.Namespace], None], argv: list[str]) -> int:
    """The whole of a program that makes a folder of some photos of a set. Returns its exit code."""
    parser = OneLineParser(name, description=about.splitlines()[0], allow_abbrev=False)
    parser.add_argument("root", type=Path, help="the set")
    parser.add_argument("split", help="its photo folder")
    parser.add_argument("number", type=int, help="of the photos")
    parser.add_argument("output", type=Path, help="the folder to make")
    return answer(name, lambda: main(parser.parse_args(argv[1:])))


def run_command(argv: list[str]) -> int:
    """The whole program. Returns its exit code: 0, or 2 for a user's mistake."""
    return command("hold_out.py", __doc__, main, argv)


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
