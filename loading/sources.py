"""What a data set reads from: for each of its roots the photos, the person index and, if wanted, the cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loading.annotations import DataError, split_names
from loading.cache import PhotoCache, open_cache
from loading.index import index_candidates, index_of
from loading.layout import (
    DEFAULT_OPTIONS,
    OWN_NEGATIVES,
    DataOptions,
    Layout,
    MissingSplitError,
    find_layout,
    negative_layout,
)
from loading.letterbox import fitted_size, letterbox, pad, placement, to_rgba, unpadded
from loading.reading import read_photo
from loading.workers import usable_cores


class Source:
    """One root's photos of a split that show at least one person, with their masks.

    Args:
        layout: where they lie; a DataError if they cannot be used.
        image_size: the side of the squares in pixels.
        name: what the photo folder is called in lists.
        bars: what fills the squares' bars, one of `BARS`.
    """

    def __init__(self, layout: Layout, image_size: int, name: str, bars: str = "reflect"):
        self.layout, self.image_size, self.name, self.bars = layout, image_size, name, bars
        self.root, self.photos = layout.root, layout.photos
        self.index = index_of(layout)
        self.cache: PhotoCache | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def meaning(self) -> str:
        """What its annotations or masks mean, as text."""
        layout = self.layout
        if not layout.has_persons:
            return f"photos of {layout.photos.name}/ without persons"
        if layout.category:
            what = f"category {layout.category} of {layout.annotations.name}"
        else:
            what = f"masks in {layout.annotations.name}/: {self.index.meaning}"
        return what + ", and photos without" * layout.keeps_empty

    def path(self, local_index: int) -> Path:
        return self.photos / self.index.file_name(local_index)

    def photo(self, local_index: int) -> np.ndarray:
        """Returns the photo as uint8 RGB (height, width, 3); raises a DataError if it cannot be read."""
        return read_photo(self.path(local_index), self.index.size(local_index), self.index.exif_applied)

    def original(self, local_index: int) -> np.ndarray:
        """Returns the photo and its mask before any resizing: uint8 RGBA (height, width, 4)."""
        return to_rgba(self.photo(local_index), self.index.alpha(local_index))

    def square(self, local_index: int) -> tuple[np.ndarray, np.ndarray, dict]:
        """Returns the letterboxed photo, uint8 (S, S, 3), its mask (S, S), 0 or 255, and `letterbox`'s metadata."""
        size, cached = self.image_size, self.cache.get(local_index) if self.cache is not None else None
        if cached is None:
            photo, metadata = letterbox(self.photo(local_index), size, self.bars)
            return photo, letterbox(self.index.alpha(local_index), size, self.bars)[0], metadata
        metadata = placement(self.index.size(local_index), size)
        photo, mask = (pad(fitted, metadata["padding"], self.bars) for fitted in cached)
        return photo, mask, metadata

    def use_cache(self) -> None:
        """Keeps the letterboxed photos on disk from now on; raises a DataError if they do not fit."""

        def make(local_index: int) -> tuple[np.ndarray, np.ndarray]:
            photo, mask, metadata = self.square(local_index)
            return unpadded(photo, metadata["padding"]), unpadded(mask, metadata["padding"])

        candidates = index_candidates(self.layout.index_folder, self.layout.index_name)
        self.cache = open_cache(
            name=f"{self.index.path.stem}.{self.image_size}",
            state=repr((self.index.fingerprint, self.index.exif_applied)),
            folders=list(dict.fromkeys(path.parent for path in (self.index.path, *candidates))),
            files=[self.path(i) for i in range(len(self))],
            sizes=np.array([fitted_size(self.index.size(i), self.image_size) for i in range(len(self))]),
            make=make,
            threads=usable_cores(),
        )


def open_sources(
    root: str | Path, split: str, image_size: int, splits: Sequence[str] = (),
    options: DataOptions = DEFAULT_OPTIONS, bars: str = "reflect",
) -> list[Source]:  # fmt: skip
    """Returns a source for each root that has the split, in the order given; the others must have another of `splits`.

    Raises:
        DataError: a root has none of the splits or is named twice, or its data cannot be used.
    """
    named = options.annotations or options.masks
    roots = data_roots(root) if not named else [Path(options.photos)]
    several, layouts = len(roots) > 1, []
    for path in roots:
        try:
            layouts.append(find_layout(path, split, splits, options, is_only=not several))
        except MissingSplitError as error:
            if not (several and error.has_other):
                raise
    if not layouts:
        raise DataError(f"none of {root} has the split {split}")
    for name in (name for name in split_names(options.negatives) if name != OWN_NEGATIVES):
        if any(layout.photos.resolve().is_relative_to(Path(name).resolve()) for layout in layouts):
            raise DataError(f"--negatives {name} holds the photos with persons: {OWN_NEGATIVES} names those of them "
                            "that show nobody")  # fmt: skip
        layouts.append(negative_layout(Path(name)))
    several = len(layouts) > 1 or several  # photos of two roots may have the same split and name
    return [Source(each, image_size, str(each.photos) if several else each.photos.name, bars) for each in layouts]


def shared_folders(train: Sequence[Source], val: Sequence[Source]) -> list[Path]:
    """Returns the photo folders of which the same photos are trained on and validated."""
    validated = {(os.path.realpath(source.photos), source.layout.subset) for source in val}
    return [source.photos for source in train if (os.path.realpath(source.photos), source.layout.subset) in validated]


def data_roots(text: str | Path) -> list[Path]:
    """Returns the folders in a text: one, whose name may have commas, or several separated by commas."""
    names = split_names(str(text))
    if "," not in str(text) or not names or os.path.isdir(text):
        return [Path(text)]
    if len({os.path.realpath(name) for name in names}) < len(names):
        raise DataError(f"a data root is named twice in {text}")
    return [Path(name) for name in names]
