"""COCO's persons as RGBA samples, in the order in which a photo meets the code:

person index ► photo and mask ► letterbox ► augmentations ► dataset ► loader.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from loading.annotations import DataError
from loading.cache import PhotoCache
from loading.index import PersonIndex
from loading.layout import AS_COCO, Choices
from loading.letterbox import letterbox, restore
from loading.sources import Source, open_sources
from loading.workers import start_loader_worker, start_method, starting_workers

__all__ = ["COCOPersonDataset", "DataError", "batches", "letterbox", "make_loader", "restore"]


class COCOPersonDataset(Dataset):
    """The photos of a COCO-format set that show at least one person, as RGBA squares.

    Args:
        root: the folder that holds `annotations/` and the photo folder, or `photos/` and `masks/`; or several,
            separated by commas, whose photos are one set: an index is a photo's place among those of all roots, in the
            order given.
        split: the photo folder's name, e.g. "train2017".
        image_size: the square's side in pixels.
        augment: whether to apply `augmentations()`.
        store_metadata: whether a sample is (tensor, metadata) instead of the tensor alone.
        seed: of the augmentations. A sample depends on (seed, epoch, index) and on nothing else.
        cache: whether to keep the letterboxed photos on disk, for faster epochs; the samples are the same.
        other_splits: of several roots one without the split is left out if it has one of these; else it is refused.
            Where the data have no split, they are the names of the parts to train on and to validate.
        choices: how the data are to be read, where not as COCO's.

    Attributes:
        sources: of the roots that have the split, in their order.

    Raises:
        DataError: the data cannot be used, or the cache does not fit on the disk.
    """

    def __init__(
        self, root: str | Path, split: str, image_size: int = 384, augment: bool = False,
        store_metadata: bool = False, seed: int = 0, cache: bool = False, other_splits: Sequence[str] = (),
        choices: Choices = AS_COCO,
    ):  # fmt: skip
        self.sources = open_sources(root, split, image_size, other_splits, choices)
        self._ends = [*accumulate(map(len, self.sources))]
        self.image_size, self.store_metadata, self.seed = image_size, store_metadata, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        self._augment = None
        if augment:
            from loading.augmentation import Augmenter  # a second of imports that a measurement can do without

            self._augment = Augmenter()
        if cache:
            for source in self.sources:
                source.keep_cache()

    def __len__(self) -> int:
        return self._ends[-1]

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """uint8 (4, S, S): R, G, B, A; A is 0 or 255. With `store_metadata`, (that, metadata)."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no photo {index} among {len(self)}")  # it ends a loop over the samples
        source, place = self._find(index)
        photo, mask, metadata = source.square(place)
        if self._augment is not None:
            photo, mask = self._augment(photo, mask, [self.seed, int(self._epoch), index])
        sample = to_sample(photo, mask)
        if not self.store_metadata:
            return sample
        return sample, {"image_id": self.image_id(index), "file_name": self.file_name(index)} | metadata

    def original(self, index: int) -> np.ndarray:
        """The photo and its mask before any resizing: uint8 RGBA (height, width, 4)."""
        source, place = self._find(index)
        return source.original(place)

    def alpha(self, index: int) -> np.ndarray:
        """The mask before any resizing: uint8 (height, width), 0 or 255."""
        source, place = self._find(index)
        return source.index.alpha(place)

    def largest_person(self, index: int) -> int:
        """Pixels of the largest annotation."""
        source, place = self._find(index)
        return source.index.largest_person(place)

    def image_id(self, index: int) -> int:
        source, place = self._find(index)
        return source.index.image_id(place)

    def file_name(self, index: int) -> str:
        """As the annotations have it."""
        source, place = self._find(index)
        return source.index.file_name(place)

    def path(self, index: int) -> Path:
        source, place = self._find(index)
        return source.path(place)

    def name(self, index: int) -> str:
        """What a list calls the photo; no other of the set is called so."""
        source, place = self._find(index)
        return f"{source.name}/{source.index.file_name(place)}"

    @property
    def index(self) -> PersonIndex:
        """That of the only source."""
        (only,) = self.sources
        return only.index

    @property
    def cache(self) -> PhotoCache | None:
        """That of the only source."""
        (only,) = self.sources
        return only.cache

    def _find(self, index: int) -> tuple[Source, int]:
        """Whose photo it is, and its place there."""
        number = bisect_right(self._ends, index)
        source = self.sources[number]
        return source, index - self._ends[number] + len(source)


def to_sample(photo: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """uint8 RGB (S, S, 3) and mask (S, S) as a sample (4, S, S), the mask cut at one half."""
    sample = np.empty((4, *mask.shape), np.uint8)
    cv2.split(photo, [*sample[:3]])  # straight into the sample's memory
    cv2.threshold(mask, 127, 255, cv2.THRESH_BINARY, dst=sample[3])
    return torch.from_numpy(sample)


# --- loaders ----------------------------------------------------------------------------------------------


def make_loader(
    dataset: Dataset, batch_size: int, num_workers: int, training: bool,
    rank: int = 0, world_size: int = 1, pin_memory: bool = False,
) -> DataLoader:  # fmt: skip
    """One process's share of the data, in batches of uint8 (N, 4, S, S).

    Training: shuffled by (the dataset's seed, epoch), and every process gets the same number of batches.
    Validation: in order, each photo in exactly one process, nothing padded and nothing dropped.
    """
    sampler, drop_last = range(rank, len(dataset), world_size), False
    if training:
        sampler = ResumableSampler(dataset, world_size, rank, shuffle=True, seed=dataset.seed)
        drop_last = len(sampler) > 1 and len(sampler) % batch_size == 1  # BatchNorm needs two
    return DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=num_workers, drop_last=drop_last,
        multiprocessing_context=start_method(world_size == 1) if num_workers else None,
        collate_fn=stack, pin_memory=pin_memory, persistent_workers=num_workers > 0, worker_init_fn=start_loader_worker,
        generator=torch.Generator().manual_seed(dataset.seed),  # workers must not draw from the model's dice
    )  # fmt: skip


class ResumableSampler(DistributedSampler):
    """One process's photos in an epoch's order, from the one at place `first` on."""

    first = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.first, None)


def stack(samples: list) -> torch.Tensor:
    """Samples as a batch, which may be one of no photos: uint8 (0, 4, 0, 0)."""
    return default_collate(samples) if samples else torch.empty(0, 4, 0, 0, dtype=torch.uint8)


def batches(loader: DataLoader, epoch: int, first: int = 0) -> Iterator[torch.Tensor]:
    """Iterates over one epoch, from its batch `first` on: order and augmentations both depend on the epoch's number."""
    loader.dataset.set_epoch(epoch)
    if isinstance(loader.sampler, ResumableSampler):
        loader.sampler.set_epoch(epoch)
        loader.sampler.first = first * loader.batch_size
    with starting_workers(loader):
        return iter(loader)
