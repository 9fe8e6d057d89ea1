"""Measures Silueta beside what people use today, or beside another checkout of it, and prints tables of ratios.

    python tools/benchmark.py                                      # everything, on COCO's val2017
    python tools/benchmark.py sample loader --data-root data/coco --rounds 9
    python tools/benchmark.py start --split train2017              # annotations as large as people train on
    python tools/benchmark.py step predict --against ../before     # git worktree add ../before HEAD~20

Sections: `sample` (an augmented training sample), `loader` (the DataLoader with workers), `step` (a training step),
`start` (opening the annotations), `predict` (cutting out photos). Every side is a process of its own, on one thread of
the CPU. The sides take turns, as the machine's speed may change.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# A side's process, which works in the folder of its checkout, imports the modules from there.
sys.path.insert(0, os.getcwd() if sys.argv[1:2] == ["--serve"] else str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from utils import UserError

# The project's modules are imported where they are used; our own sides use only names that old checkouts have as well.

ROOT = Path(__file__).resolve().parents[1]
BATCH, WORKERS = 8, 2
PHOTOS, CUTOUTS = 128, 16  # at most, in a round
VERSIONS = {"torch", "numpy", "opencv-python-headless", "albumentations", "pycocotools", "segmentation_models_pytorch"}
# Does the round of a number and returns how many units it did; or, as a float, the seconds per unit that it measured.
Round = Callable[[int], int | float]


@dataclass
class Side:
    """One of the things that are compared, and how long its rounds took."""

    name: str
    work: Callable[[], int | float]  # returns what a Round does
    seconds: list[float] = field(default_factory=list)  # per unit, of each counted round

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def alternate(sides: list[Side], rounds: int) -> None:
    """Runs a round of each side in turn, again and again, and fills in their `seconds`; the first one only warms up."""
    for number in range(rounds + 1):
        for side in sides:
            seconds = seconds_per_unit(side.work)
            if number:
                side.seconds.append(seconds)


def seconds_per_unit(work: Callable[..., int | float], *args: object) -> float:
    start = time.perf_counter()
    done = work(*args)
    return done if isinstance(done, float) else (time.perf_counter() - start) / done


def table(title: str, unit: str, sides: list[Side]) -> str:
    """Returns a Markdown table of medians and of their ratios to the first side's, with the range over the rounds."""
    first = sides[0]
    lines = [
        f"### {title}\n\nRounds: {len(first.seconds)}. Medians, and in brackets the smallest and the largest ratio.",
        f"\n| | time per {unit} | times as fast as {first.name} |\n|{' --- |' * 3}",
    ]
    for side in sides:
        duration = f"{side.median:.3g} s" if side.median >= 1 else f"{1e3 * side.median:.3g} ms"
        ratios = [reference / own for reference, own in zip(first.seconds, side.seconds, strict=True)]
        ratio = f"**{first.median / side.median:.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {side.name} | {duration} | {ratio} |")
    return "\n".join(lines)


def machine() -> str:
    """Returns a line with the processor, the number of cores and the versions that measurements depend on."""
    versions = [f"{each.name} {each.version}" for each in importlib.metadata.distributions() if each.name in VERSIONS]
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    processor = models[0] if models else platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(sorted(versions))}"


def start_side(name: str, checkout: Path, job: dict, stack: contextlib.ExitStack) -> Side:
    """Starts a process that does the job's rounds with a checkout's modules, until the stack is closed."""
    process: Any = stack.enter_context(subprocess.Popen(
        [sys.executable, __file__, "--serve", json.dumps(job)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"},
        cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ))  # fmt: skip

    def work() -> float:
        with contextlib.suppress(BrokenPipeError):  # it has ended: no answer will come
            os.write(process.stdin.fileno(), f"{len(side.seconds)}\n".encode())
        for line in process.stdout:  # what the measured code prints stands between the answers
            if line.startswith("done "):
                return float(line.split()[1])
        raise UserError(f"{job['side']} ({job['section']}) does not run in {checkout}: its last lines are above")

    side = Side(name, work)
    return side


def serve() -> None:
    """Does a round for each number that comes in, and answers with the seconds per unit."""
    job = Namespace(**json.loads(sys.argv[2]))
    if job.section != "loader":  # whose workers run as their users leave them
        cv2.setNumThreads(1)
    work = TABLES[job.section][2][job.side](job)
    for line in sys.stdin:
        print(f"\ndone {seconds_per_unit(work, int(line))}", flush=True)


# --- what a side does -------------------------------------------------------------------------------------


class Tutorial(Dataset):
    """pycocotools, cv2.imread and one A.Compose: the dataset of most tutorials and notebooks."""

    def __init__(self, root: str, split: str, size: int):
        import albumentations as A
        from albumentations.pytorch import ToTensorV2
        from pycocotools.coco import COCO

        self.folder = Path(root, split)
        self.coco = COCO(Path(root, "annotations", f"instances_{split}.json"))
        self.persons = self.coco.getCatIds(catNms=["person"])
        self.ids = sorted(self.coco.getImgIds(catIds=self.persons))
        self.transform = A.Compose([
            A.LongestMaxSize(size),
            A.PadIfNeeded(size, size, border_mode=cv2.BORDER_CONSTANT),
            A.HorizontalFlip(p=0.5),
            A.RandomRotate90(p=0.1),
            A.ShiftScaleRotate(shift_limit=0.0625, scale_limit=0.2, rotate_limit=15, p=0.5),
            A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.3),
            A.HueSaturationValue(hue_shift_limit=10, sat_shift_limit=20, val_shift_limit=10, p=0.3),
            A.GaussianBlur(blur_limit=(3, 5), p=0.1),
            A.Normalize(),
            ToTensorV2(),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns the input, float32 (3, S, S), and the target, float32 (4, S, S)."""
        record = self.coco.loadImgs(self.ids[index])[0]
        image = cv2.cvtColor(cv2.imread(str(self.folder / record["file_name"])), cv2.COLOR_BGR2RGB)
        mask = np.zeros(image.shape[:2], np.uint8)
        for annotation in self.coco.loadAnns(self.coco.getAnnIds(imgIds=self.ids[index], catIds=self.persons)):
            mask = np.maximum(mask, self.coco.annToMask(annotation))
        augmented = self.transform(image=image, mask=mask)
        return augmented["image"], torch.cat([augmented["image"], augmented["mask"].float().unsqueeze(0)])


def tutorial_data(with_workers: bool, job: Namespace) -> Round:
    dataset = Tutorial(job.root, job.split, job.size)
    if not with_workers:
        return lambda _number: len([dataset[index] for index in range(len(dataset))])
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    return lambda _number: sum(len(images) for images, _ in loader)


def our_data(with_workers: bool, cache: bool, job: Namespace) -> Round:
    from datasets import COCOPersonDataset, batches, make_loader

    dataset = COCOPersonDataset(job.root, job.split, job.size, augment=True, cache=cache)
    loader = make_loader(dataset, BATCH, WORKERS, training=True)
    passes = 10 if cache else 1  # or a round would be too short
    if with_workers:
        return lambda number: sum(len(batch) for _ in range(passes) for batch in batches(loader, number))
    if loader.worker_init_fn:
        loader.worker_init_fn(0)  # this process becomes what a worker is

    def work(number: int) -> int:
        dataset.set_epoch(number)  # new augmentations, the same ones in another checkout
        return len([dataset[index] for _ in range(passes) for index in range(len(dataset))])

    return work


def smp_unet(encoder: str, *_others: object) -> nn.Module:
    """Returns smp's U-Net with attention, which normalises like UNetAutoencoder and ignores its other arguments."""
    from segmentation_models_pytorch import Unet

    class SmpUNet(Unet):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward((images - self.mean) / self.std)

    model = SmpUNet(encoder, encoder_weights=None, decoder_attention_type="scse", classes=4)
    model.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
    model.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
    return model


def steps(ours: bool, job: Namespace) -> Round:
    """Does one training step per round, with the same loss, metrics, optimiser and memory layout for either model."""
    from models import UNetAutoencoder
    from utils import LossCalculator, SegmentationMetrics

    network, layout = UNetAutoencoder if ours else smp_unet, torch.channels_last
    model = network(job.encoder, False).to(memory_format=layout)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, weight_decay=1e-6, fused=True)
    criterion, metrics = LossCalculator(), SegmentationMetrics()
    target = torch.rand(BATCH, 4, job.size, job.size).round_().to(memory_format=layout)

    def work(_number: int) -> int:
        raw = model(target[:, :3])
        loss, _ = criterion(raw, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        metrics.update(raw[:, 3].detach().sigmoid(), target[:, 3])
        return BATCH

    return work


def trainer_epochs(job: Namespace) -> Round:
    """Runs an epoch of trainer.py per round, and takes from history.csv how long an image took; no workers help."""
    flags = f"--encoder={job.encoder} --no-pretrained --image-size={job.size} --batch-size={BATCH}"
    flags += f" --train-split={job.split} --val-split={job.split} --num-workers=0 --num-epochs=1 --device=cpu"
    command = [sys.executable, "trainer.py", f"--data-root={job.root}", *flags.split()]

    def work(_number: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*command, f"--checkpoint-dir={folder}"], stdout=subprocess.DEVNULL, check=True)
            (row,) = csv.DictReader(Path(folder, "history.csv").read_text().splitlines())
        return 1 / float(row["images_per_second"])

    return work


def pycocotools_start(job: Namespace) -> Round:
    from pycocotools.coco import COCO

    return lambda _number: len([COCO(Path(job.root, "annotations", f"instances_{job.split}.json"))])


def our_start(first: bool, job: Namespace) -> Round:
    """Builds the person index, or opens it as often as it takes to be measurable."""
    from datasets import COCOPersonDataset

    def work(_number: int) -> int:
        if first:
            shutil.rmtree(Path(job.root, ".silueta"), ignore_errors=True)
        return len([COCOPersonDataset(job.root, job.split) for _ in range(1 if first else 20)])

    return work


def cutouts(whole: bool, job: Namespace) -> Round:
    """Cuts out a few photos with the model that predict.load returns, or runs its network alone as often."""
    from datasets import COCOPersonDataset
    from predict import load

    cutter = load(next(Path("cutting").glob("*.pth")), "cpu")  # the bundled model of this checkout
    dataset = COCOPersonDataset(job.root, job.split)
    photos = [dataset.path(index) for index in range(min(len(dataset), CUTOUTS))]
    square = np.zeros((cutter.image_size, cutter.image_size, 3), np.uint8)
    return lambda _number: len([cutter(photo) if whole else cutter.probabilities([square]) for photo in photos])


# By section: the title, the unit, and what its sides do. All are compared with the first; ours begin with Silueta.
TABLES: dict[str, tuple[str, str, dict[str, Callable[[Namespace], Round]]]] = {
    "sample": ("An augmented sample at {size}", "sample", {
        "tutorial": partial(tutorial_data, False),
        "Silueta": partial(our_data, False, False),
        "Silueta --cache": partial(our_data, False, True),
    }),
    "loader": (f"Batches of {BATCH} at {{size}} from {WORKERS} workers", "sample", {
        "tutorial": partial(tutorial_data, True),
        "Silueta": partial(our_data, True, False),
        "Silueta --cache": partial(our_data, True, True),
    }),
    "step": (f"A training step of {{encoder}} at {{size}}, batch {BATCH}", "image", {
        "smp": partial(steps, False),
        "Silueta": partial(steps, True),
        "Silueta's trainer.py, samples included": trainer_epochs,
    }),
    "start": ("Opening the annotations of {split}", "start", {
        "pycocotools": pycocotools_start,
        "Silueta, first start": partial(our_start, True),
        "Silueta, later starts": partial(our_start, False),
    }),
    "predict": ("Cutting out a photo, file to RGBA", "photo", {
        "the network alone": partial(cutouts, False),
        "Silueta": partial(cutouts, True),
    }),
}  # fmt: skip


def link_split(source: Path, split: str, root: Path, photos: int | None) -> None:
    """Makes a data root of links to another one, listing so many photos with persons, or all photos for None."""
    annotations = Path("annotations", f"instances_{split}.json")
    if not (source / annotations).is_file() or not (source / split).is_dir():
        raise UserError(f"no COCO data: {source / annotations} or {source / split} is missing: see --data-root")
    (root / "annotations").mkdir(parents=True)
    (root / split).symlink_to((source / split).resolve())
    if photos is None:
        (root / annotations).symlink_to((source / annotations).resolve())
        return
    content = json.loads((source / annotations).read_text())
    person = [category["id"] for category in content["categories"] if category["name"] == "person"]
    with_persons = {record["image_id"] for record in content["annotations"] if record["category_id"] in person}
    chosen = {*sorted(with_persons)[:photos]}
    content["images"] = [record for record in content["images"] if record["id"] in chosen]
    content["annotations"] = [record for record in content["annotations"] if record["image_id"] in chosen]
    (root / annotations).write_text(json.dumps(content))


def main(options: Namespace) -> None:
    """Measures the sections that are asked for, each with data roots of its own, and prints their tables."""
    checkouts = {"this": ROOT} if options.against is None else {"other": options.against.resolve(), "this": ROOT}
    print(machine(), *(f"{name}: {path}" for name, path in checkouts.items()), sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for section in dict.fromkeys(options.sections or TABLES):
            photos = None if section == "start" else 3 if options.quick else PHOTOS
            for name in checkouts:
                link_split(options.data_root, options.split, Path(folder, section, name), photos)
            compare(section, checkouts, Path(folder, section), options)


def compare(section: str, checkouts: dict[str, Path], folder: Path, options: Namespace) -> None:
    """Prints a section's table; of two checkouts, one for each of Silueta's sides. `folder` holds their data roots."""
    title, unit, works = TABLES[section]
    size = 64 if options.quick else 256 if section == "step" else 384
    job = {"section": section, "size": size, "split": options.split, "encoder": options.encoder}
    comparisons = {title: [(name, "this", name) for name in works]}
    if options.against:
        ours = [name for name in works if name.startswith("Silueta")]
        comparisons = {f"{title}: {name}": [(checkout, checkout, name) for checkout in checkouts] for name in ours}
    for heading, compared in comparisons.items():
        with contextlib.ExitStack() as stack:
            sides = [
                start_side(name, checkouts[checkout], job | {"side": side, "root": str(folder / checkout)}, stack)
                for name, checkout, side in compared
            ]
            alternate(sides, 1 if options.quick else options.rounds)
        print(f"\n{table(heading.format(**job), unit, sides)}", flush=True)


def parse(argv: list[str]) -> Namespace:
    from training.command_line import OneLineParser, UsageError

    parser = OneLineParser("benchmark.py", description="Measures Silueta beside others, or another checkout of it.")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(TABLES)} (all)")
    parser.add_argument("--data-root", type=Path, default=Path("data/coco"), help="data in COCO's layout (%(default)s)")
    parser.add_argument("--split", default="val2017", help="the photo folder (%(default)s)")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of this program")
    parser.add_argument("--encoder", default="mobilenet_v2", help="of the training step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds of each side (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: only whether everything runs")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.sections if name not in TABLES]:
        raise UsageError(f"there is no section {unknown[0]}: there are {', '.join(TABLES)}")
    if options.rounds < 1:
        raise UsageError(f"--rounds {options.rounds} must be 1 or more")
    if options.against and not (options.against / "trainer.py").is_file():
        raise UsageError(f"{options.against} is no checkout of this program: it holds no trainer.py")
    return options


def run_command(argv: list[str]) -> int:
    """Runs the whole program and returns its exit code: 0, or 2 for a user's mistake."""
    from training.command_line import run_cli

    return run_cli("benchmark.py", lambda: main(parse(argv[1:])))


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:2] == ["--serve"] else run_command(sys.argv))
