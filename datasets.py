"""COCO's persons as RGBA samples, and their loaders. A photo passes through:

person index ► photo and mask ► letterbox ► augmentations ► dataset ► loader.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, default_collate

from loading.annotations import DataError
from loading.index import PersonIndex
from loading.layout import DEFAULT_OPTIONS, DataOptions
from loading.letterbox import letterbox, placement, restore, unpadded
from loading.sources import Source, open_sources
from loading.workers import signals_blocked, start_loader_worker, start_method

__all__ = ["COCOPersonDataset", "DataError", "PhotoLoader", "batches", "letterbox", "make_loader", "restore"]


class COCOPersonDataset(Dataset):
    """The photos of a COCO-format set that show at least one person, as RGBA squares.

    Args:
        root: the folder that holds `annotations/` and the photo folder, or `photos/` and `masks/`; or several folders,
            separated by commas, whose photos make one set in the order given.
        split: the photo folder's name, e.g. "train2017".
        image_size: the square's side in pixels.
        augment: whether to apply `augmentations()`.
        store_metadata: whether a sample is (tensor, metadata) instead of the tensor alone.
        seed: of the augmentations. A sample depends on (seed, epoch, index) and on nothing else.
        cache: whether to keep the letterboxed photos on disk, for faster epochs; the samples are the same.
        other_splits: of several roots, one that has one of these instead of the split is left out. Where the data have
            no split, they are the names of the training and the validation split, by default COCO's.
        options: how the data are to be read, where not as COCO's.
        bars: what fills the squares' bars, and what the augmentations bring in from beyond them: "reflect", the photo
            and its mask reflected, or "black", nothing.

    Raises:
        DataError: the data cannot be used, or the cache does not fit on the disk.
    """

    def __init__(
        self, root: str | Path, split: str, image_size: int = 384, augment: bool = False,
        store_metadata: bool = False, seed: int = 0, cache: bool = False, other_splits: Sequence[str] = (),
        options: DataOptions = DEFAULT_OPTIONS, bars: str = "reflect",
    ):  # fmt: skip
        self.sources = open_sources(root, split, image_size, other_splits, options, bars)  # one for each root
        self._ends = [*accumulate(map(len, self.sources))]
        self.image_size, self.store_metadata, self.seed = image_size, store_metadata, seed
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._augment = None
        if augment:
            from loading.augmentation import Augmenter  # its imports take a second, which an evaluation does without

            self._augment = Augmenter(bars)
        if cache:
            for source in self.sources:
                source.use_cache()

    def __len__(self) -> int:
        return self._ends[-1]

    def share_memory(self) -> None:
        """Lets loader workers that start later see the epoch change."""
        self._epoch.share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the augmentations depend on, in loader workers as well."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Any:
        """Returns a sample, uint8 (4, S, S): R, G, B, A; A is 0 or 255. With `store_metadata`, (sample, metadata).

        A DataError names a photo that cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"there is no photo {index} among {len(self)}")  # it ends a loop over the samples
        source, local_index = self._locate(index)
        photo, mask, metadata = source.square(local_index)
        if self._augment is not None:
            photo, mask = self._augment(photo, mask, [self.seed, int(self._epoch), index])
        sample = to_sample(photo, mask)
        if not self.store_metadata:
            return sample
        return sample, {"image_id": self.image_id(index), "file_name": self.file_name(index)} | metadata

    def original(self, index: int) -> np.ndarray:
        """Returns the photo and its mask before any resizing: uint8 RGBA (height, width, 4)."""
        source, local_index = self._locate(index)
        return source.original(local_index)

    def alpha(self, index: int) -> np.ndarray:
        """Returns the mask before any resizing: uint8 (height, width), 0 or 255."""
        source, local_index = self._locate(index)
        return source.index.alpha(local_index)

    def largest_person(self, index: int) -> int:
        """Returns the pixels of the largest annotation."""
        source, local_index = self._locate(index)
        return source.index.largest_person(local_index)

    def own_pixels(self, indices: list[int]) -> torch.Tensor:
        """Returns which pixels of squares that are not augmented are the photos' and not a bar's: bool (N, S, S)."""
        own = np.zeros((len(indices), self.image_size, self.image_size), bool)
        for square, (source, local_index) in zip(own, map(self._locate, indices), strict=True):
            unpadded(square, placement(source.index.size(local_index), self.image_size)["padding"])[...] = True
        return torch.from_numpy(own)

    def image_id(self, index: int) -> int:
        source, local_index = self._locate(index)
        return source.index.image_id(local_index)

    def file_name(self, index: int) -> str:
        """Returns the photo's path relative to its photo folder."""
        source, local_index = self._locate(index)
        return source.index.file_name(local_index)

    def path(self, index: int) -> Path:
        source, local_index = self._locate(index)
        return source.path(local_index)

    def name(self, index: int) -> str:
        """Returns a name for lists, which no other photo of the set has."""
        source, local_index = self._locate(index)
        return f"{source.name}/{source.index.file_name(local_index)}"

    @property
    def index(self) -> PersonIndex:
        """The person index of the only source."""
        (only,) = self.sources
        return only.index

    def _locate(self, index: int) -> tuple[Source, int]:
        """Returns the source of a photo, and its index there."""
        number = bisect_right(self._ends, index)
        source = self.sources[number]
        return source, index - self._ends[number] + len(source)


def to_sample(photo: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """Returns uint8 RGB (S, S, 3) and a mask (S, S) as a sample (4, S, S), the mask thresholded at one half."""
    sample = np.empty((4, *mask.shape), np.uint8)
    cv2.split(photo, [*sample[:3]])  # straight into the sample's memory
    cv2.threshold(mask, 127, 255, cv2.THRESH_BINARY, dst=sample[3])
    return torch.from_numpy(sample)


class PhotoLoader(DataLoader):
    """A loader of samples; says of its parts what torch's own hints leave open."""

    dataset: Any  # a COCOPersonDataset, or SkipUnreadable with one
    batch_size: int
    sampler: range | ResumableSampler
    batch_sampler: BatchSampler  # yields the indices of each batch


def make_loader(
    dataset: Any, batch_size: int, num_workers: int, training: bool,
    rank: int = 0, world_size: int = 1, pin_memory: bool = False,
) -> PhotoLoader:  # fmt: skip
    """Returns a loader of one process's shard, in batches of uint8 (N, 4, S, S).

    Training: shuffled by (the dataset's seed, epoch), and every process gets the same number of batches.
    Validation: in order, each photo in exactly one process, nothing padded and nothing dropped.
    """
    if num_workers:  # without any, a machine without shared memory will do
        dataset.share_memory()
    sampler: range | ResumableSampler = range(rank, len(dataset), world_size)
    drop_last = False
    if training:
        sampler = ResumableSampler(dataset, world_size, rank, shuffle=True, seed=dataset.seed)
        drop_last = len(sampler) > 1 and len(sampler) % batch_size == 1  # BatchNorm needs two images
    return PhotoLoader(
        dataset, batch_size, sampler=sampler, num_workers=num_workers, drop_last=drop_last,
        multiprocessing_context=start_method(world_size == 1) if num_workers else None,
        collate_fn=stack, pin_memory=pin_memory, persistent_workers=num_workers > 0, worker_init_fn=start_loader_worker,
        generator=torch.Generator().manual_seed(dataset.seed),  # workers must not draw from torch's global generator
    )  # fmt: skip


class ResumableSampler(DistributedSampler):
    """Yields one process's indices in an epoch's order, without the `first` ones."""

    first = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.first, None)


def stack(samples: list) -> torch.Tensor:
    """Returns samples as a batch; of none, uint8 (0, 4, 0, 0)."""
    return default_collate(samples) if samples else torch.empty(0, 4, 0, 0, dtype=torch.uint8)


def batches(loader: PhotoLoader, epoch: int, first: int = 0) -> Iterator[torch.Tensor]:
    """Iterates over one epoch, from its batch `first` on; order and augmentations depend on the epoch's number."""
    loader.dataset.set_epoch(epoch)
    if isinstance(loader.sampler, ResumableSampler):
        loader.sampler.set_epoch(epoch)
        loader.sampler.first = first * loader.batch_size
    with signals_blocked(loader):
        return iter(loader)
