"""Measures this checkout beside another one, of an older commit say, both in turn, and prints tables of ratios.

    git worktree add ../before HEAD~20
    python tools/bench/versions.py ../before --data-root data/coco --split val2017
    python tools/bench/versions.py ../before sample loader --rounds 9

Each side runs in processes of its own, with an index and a cache of its own, on the split's first photos with
persons. `start` builds and opens the index of the whole split, and `training` is a short run of trainer.py itself.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, it is in tools/bench/ that Python looks

from datasets import COCOPersonDataset
from tools.bench.measuring import Way, alternate, machine, table
from training.settings import OneLineParser, UsageError, answer
from utils import UserError

HERE = Path(__file__).resolve().parents[2]
SIDE = Path(__file__).with_name("one_side.py")
FEW, PHOTOS = "few", 128  # a split of so many photos, so that a round takes seconds
MOST_TRAININGS = 3  # rounds of `training`: one takes half a minute
# Of each section but `training`: what one_side.py does for it, the title of the table, and what is counted.
TABLES = {
    "sample": [("sample", "Augmented samples at 384, one core", "sample")],
    "cached": [("cached", "The same with the cache", "sample")],
    "loader": [("loader", "Batches of 8 at 384 from 2 workers", "sample")],
    "start": [("build", "The person index, built", "start"), ("opened", "The person index, opened again", "start")],
    "step": [("step", "A plain training step of mobilenet_v2 at 256, batch 8, one thread", "image")],
}
SECTIONS = [*TABLES, "training"]
TRAINING = (
    *(sys.executable, "trainer.py", f"--train-split={FEW}", f"--val-split={FEW}", "--encoder=mobilenet_v2"),
    *("--no-pretrained", "--image-size=256", "--batch-size=8", "--num-epochs=1", "--num-workers=0", "--device=cpu"),
)
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


# --- both sides -----------------------------------------------------------------------------------------------


def compare(checkouts: dict[str, Path], roots: dict[str, Path], section: str, split: str, rounds: int) -> str:
    """The tables of a section: of the other side and of this one, in that order."""
    if section == "training":
        return training(checkouts, roots, min(rounds, MOST_TRAININGS))
    tables = []
    for work, title, unit in TABLES[section]:
        chosen = split if section == "start" else FEW
        with ExitStack() as stack:
            ways = [Way(side, rounds_of(checkouts[side], work, roots[side], chosen, stack)) for side in checkouts]
            alternate(ways, rounds)
        tables.append(table(title, unit, ways[0], ways))
    return "\n".join(tables)


def rounds_of(checkout: Path, work: str, root: Path, split: str, stack: ExitStack) -> Callable[[], int]:
    """A process in that checkout, and what makes it do its next round. Its imports fall into the one that warms up."""
    command = [sys.executable, str(SIDE), work, str(root), split]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = stack.enter_context(subprocess.Popen(command, cwd=checkout, env=ONE_THREAD, **pipes))
    numbers = itertools.count()

    def do_round() -> int:
        with suppress(BrokenPipeError):  # it has ended: no answer comes
            os.write(process.stdin.fileno(), f"{next(numbers)}\n".encode())
        for line in process.stdout:  # what the program itself says stands between the answers
            if line.startswith("done "):
                return int(line.split()[1])
        raise UserError(f"{work} does not run in {checkout}: its last lines are above")

    return do_round


def training(checkouts: dict[str, Path], roots: dict[str, Path], rounds: int) -> str:
    """An epoch of trainer.py as its user starts it: the images a second that it writes down itself."""
    ways = [Way(side, int) for side in checkouts]
    for _ in range(rounds):  # in turn, as measuring.alternate does
        for way in ways:
            way.seconds.append(1 / trained(checkouts[way.name], roots[way.name]))
    return table("trainer.py: mobilenet_v2 at 256, batch 8, one thread", "image", ways[0], ways)


def trained(checkout: Path, root: Path) -> float:
    """Images a second of a run in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*TRAINING, f"--data-root={root}", f"--checkpoint-dir={folder}"]
        done = subprocess.run(command, cwd=checkout, env=ONE_THREAD, stdout=subprocess.PIPE)
        if done.returncode:
            raise UserError(f"trainer.py does not run in {checkout}: its last lines are above")
        row = next(csv.DictReader(Path(folder, "history.csv").read_text().splitlines()))
    return float(row["images_per_second"])


# --- the data -------------------------------------------------------------------------------------------------


def link_data(source: Path, split: str, root: Path) -> None:
    """A data root for one side, of links to the annotations and the photos, and the split FEW beside them.

    Nothing is written where the links lead to.
    """
    annotations = source.resolve() / "annotations" / f"instances_{split}.json"
    if not annotations.is_file() or not (source / split).is_dir():
        raise UserError(f"no COCO data: {annotations} or {source / split} is missing (see --data-root and --split)")
    (root / "annotations").mkdir(parents=True)
    (root / "annotations" / annotations.name).symlink_to(annotations)
    for name in (split, FEW):
        (root / name).symlink_to((source / split).resolve())
    dataset = COCOPersonDataset(root, split)
    chosen = {dataset.image_id(index) for index in range(min(PHOTOS, len(dataset)))}
    content = json.loads(annotations.read_text())
    few = {
        "images": [image for image in content["images"] if image["id"] in chosen],
        "annotations": [each for each in content["annotations"] if each["image_id"] in chosen],
        "categories": content["categories"],
    }
    (root / "annotations" / f"instances_{FEW}.json").write_text(json.dumps(few))


# --- the command line -----------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("versions.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT", help="the folder of another version")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (all)")
    parser.add_argument("--data-root", type=Path, default=Path("data/coco"), help="COCO's layout (%(default)s)")
    parser.add_argument("--split", default="val2017", help="the photo folder (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds of each side (%(default)s)")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        raise UsageError(f"there is no section {unknown[0]}: there are {', '.join(SECTIONS)}")
    if options.rounds < 1:
        raise UsageError(f"--rounds {options.rounds} is out of range: at least 1")
    if not (options.other / "trainer.py").is_file():
        raise UsageError(f"{options.other} is no checkout of this program: it holds no trainer.py")
    return options


def main(options: argparse.Namespace) -> None:
    checkouts = {"other": options.other.resolve(), "this": HERE}
    print(machine(), *(f"{side}: {folder}" for side, folder in checkouts.items()), sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as work:
        roots = {side: Path(work, side) for side in checkouts}
        for root in roots.values():
            link_data(options.data_root, options.split, root)
        for section in options.sections or SECTIONS:
            print(f"\n{compare(checkouts, roots, section, options.split, options.rounds)}", flush=True)


def run_command(argv: list[str]) -> int:
    """The whole program. Returns its exit code: 0, or 2 for a user's mistake."""
    return answer("versions.py", lambda: main(parse(argv[1:])))


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
