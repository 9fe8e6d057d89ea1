"""Samples and batches beside the ways that people use today, each written as its users write it."""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before its import: it would ask the network

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from pycocotools.coco import COCO
from torchvision import tv_tensors
from torchvision.io import decode_image
from torchvision.transforms import v2

from datasets import COCOPersonDataset, batches, make_loader
from tools.bench.measuring import Way, alternate, table

SIZE, BATCH, WORKERS = 384, 32, 2
PHOTOS = 250  # of the split at most, for one sample after the other: a round is to last seconds
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def sample(options: argparse.Namespace) -> str:
    """One sample after the other, on one core; each way in a process of its own, as in a loader's worker."""
    ours, theirs = silueta(options), references(options)
    ways = [Way(name, in_a_process(one_by_one(dataset), one_thread)) for name, dataset in theirs.items()]
    for name, dataset in ours.items():
        start = make_loader(dataset, 1, num_workers=1, training=True).worker_init_fn
        ways.append(Way(name, in_a_process(one_by_one(dataset), start)))
    ways.append(Way("JPEG decode alone", in_a_process(decode_alone(theirs["tutorial"]), one_thread)))
    alternate(ways, options.rounds)
    return table(f"Samples of {SIZE} x {SIZE}, one core", "sample", ways[0], ways)


def one_thread(_worker: int) -> None:
    cv2.setNumThreads(0)


def in_a_process(work: Callable[[], int], start: Callable[[int], None]) -> Callable[[], int]:
    """The same work, done in a forked process of its own."""

    def begin() -> None:
        global _work
        _work = work
        torch.set_num_threads(1)
        start(0)

    pool = ProcessPoolExecutor(1, multiprocessing.get_context("fork"), begin)
    return lambda: pool.submit(_do).result()


_work: Callable[[], int]


def _do() -> int:
    return _work()


def loader(options: argparse.Namespace) -> str:
    """Through the DataLoader into the training process."""
    cv2.setNumThreads(-1)  # as it is where nobody sets it
    ours, theirs = silueta(options), references(options)
    ways = [Way(name, batch_by_batch(dataset)) for name, dataset in (theirs | ours).items()]
    alternate(ways, options.rounds)
    title = f"Batches of {BATCH} at {SIZE} x {SIZE} from {WORKERS} workers, in the training process"
    return table(title, "sample", ways[0], ways)


def references(options: argparse.Namespace) -> dict[str, CocoFiles]:
    kinds = {"tutorial": Tutorial, "torchvision": Torchvision}
    return {name: kind(options.data_root, options.split, SIZE) for name, kind in kinds.items()}


def silueta(options: argparse.Namespace) -> dict[str, COCOPersonDataset]:
    return {
        name: COCOPersonDataset(options.data_root, options.split, SIZE, augment=True, cache=cache)
        for name, cache in (("Silueta", False), ("Silueta --cache", True))
    }


def one_by_one(dataset: torch.utils.data.Dataset) -> Callable[[], int]:
    """A round over the same photos with new draws, which an epoch's number stands for with ours."""
    indices = range(min(PHOTOS, len(dataset)))
    epochs = iter(range(10**6))

    def work() -> int:
        if isinstance(dataset, COCOPersonDataset):
            dataset.set_epoch(next(epochs))
        for index in indices:
            dataset[index]
        return len(indices)

    return work


def batch_by_batch(dataset: torch.utils.data.Dataset) -> Callable[[], int]:
    """A round over the whole split, with the loader that each way's users have."""
    if isinstance(dataset, COCOPersonDataset):
        ours, epochs = make_loader(dataset, BATCH, WORKERS, training=True), iter(range(10**6))
        return lambda: sum(map(len, batches(ours, next(epochs))))
    theirs = torch.utils.data.DataLoader(dataset, BATCH, True, num_workers=WORKERS, persistent_workers=True)
    return lambda: sum(len(images) for images, _ in theirs)


def decode_alone(dataset: CocoFiles) -> Callable[[], int]:
    encoded = [np.fromfile(dataset.file(index), np.uint8) for index in range(min(PHOTOS, len(dataset)))]

    def work() -> int:
        for content in encoded:
            cv2.imdecode(content, cv2.IMREAD_COLOR)
        return len(encoded)

    return work


class CocoFiles(torch.utils.data.Dataset):
    """What the references share: pycocotools' annotations, a mask drawn per annotation."""

    def __init__(self, root: str, split: str):
        self.folder = Path(root, split)
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(Path(root, "annotations", f"instances_{split}.json"))
        self.persons = self.coco.getCatIds(catNms=["person"])
        self.ids = sorted(self.coco.getImgIds(catIds=self.persons))

    def __len__(self) -> int:
        return len(self.ids)

    def file(self, index: int) -> str:
        return str(self.folder / self.coco.loadImgs(self.ids[index])[0]["file_name"])

    def mask(self, index: int) -> np.ndarray:
        """The union of the persons, uint8 (height, width), 0 or 1."""
        annotations = self.coco.loadAnns(self.coco.getAnnIds(imgIds=self.ids[index], catIds=self.persons))
        record = self.coco.loadImgs(self.ids[index])[0]
        mask = np.zeros((record["height"], record["width"]), np.uint8)
        for annotation in annotations:
            mask = np.maximum(mask, self.coco.annToMask(annotation))
        return mask


class Tutorial(CocoFiles):
    """pycocotools, cv2.imread and one A.Compose: the way of most tutorials and notebooks."""

    def __init__(self, root: str, split: str, size: int):
        super().__init__(root, split)
        self.transform = A.Compose([
            A.LongestMaxSize(size),
            A.PadIfNeeded(size, size, border_mode=cv2.BORDER_CONSTANT),
            A.HorizontalFlip(p=0.5),
            A.RandomRotate90(p=0.1),
            A.ShiftScaleRotate(shift_limit=0.0625, scale_limit=0.2, rotate_limit=15, p=0.5),
            A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.3),
            A.HueSaturationValue(hue_shift_limit=10, sat_shift_limit=20, val_shift_limit=10, p=0.3),
            A.GaussianBlur(blur_limit=(3, 5), p=0.1),
            A.Normalize(MEAN, STD),
            ToTensorV2(),
        ])  # fmt: skip

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The input, float32 (3, S, S), and the target, float32 (4, S, S)."""
        image = cv2.cvtColor(cv2.imread(self.file(index)), cv2.COLOR_BGR2RGB)
        out = self.transform(image=image, mask=self.mask(index))
        alpha = out["mask"].float().unsqueeze(0)
        return out["image"], torch.cat([out["image"], alpha])


class Torchvision(CocoFiles):
    """torchvision's own way: decode_image, tv_tensors and transforms v2, with equivalent steps."""

    def __init__(self, root: str, split: str, size: int):
        super().__init__(root, split)
        self.size = size
        warp = v2.RandomAffine(15, (0.0625, 0.0625), (0.8, 1.2), interpolation=v2.InterpolationMode.BILINEAR)
        quarter_turns = v2.RandomChoice([v2.RandomRotation((a, a)) for a in (0, 90, 180, 270)])
        self.transform = v2.Compose([
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([quarter_turns], 0.1),
            v2.RandomApply([warp], 0.5),
            v2.RandomApply([v2.ColorJitter(brightness=0.2, contrast=0.2)], 0.3),
            v2.RandomApply([v2.ColorJitter(brightness=0.04, saturation=0.1, hue=10 / 180)], 0.3),
            v2.RandomApply([v2.GaussianBlur(5, (0.5, 3.0))], 0.1),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(MEAN, STD),
        ])  # fmt: skip

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The input, float32 (3, S, S), and the target, float32 (4, S, S)."""
        image = tv_tensors.Image(decode_image(self.file(index), mode="RGB"))
        mask = tv_tensors.Mask(torch.from_numpy(self.mask(index)))
        height, width = image.shape[-2:]
        scale = self.size / max(height, width)
        fitted = round(height * scale), round(width * scale)
        left, top = (self.size - fitted[1]) // 2, (self.size - fitted[0]) // 2
        padding = [left, top, self.size - fitted[1] - left, self.size - fitted[0] - top]
        image, mask = self.transform(*v2.Compose([v2.Resize(fitted), v2.Pad(padding)])(image, mask))
        return image, torch.cat([image, mask.float().unsqueeze(0)])
