"""What a data set reads from: for each of its roots the photos, the person index and, if wanted, the cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loading.annotations import DataError
from loading.cache import PhotoCache, open_cache
from loading.index import index_of, index_places
from loading.layout import AS_COCO, Choices, Layout, find_layout
from loading.letterbox import fitted_size, letterbox, pad, placement, to_rgba, unpadded
from loading.reading import read_photo
from utils import usable_cores


class Source:
    """One root's photos of a split that show at least one person, with their masks.

    Args:
        layout: where they lie.
        image_size: the side in pixels of the squares.
        name: what a list calls the photo folder.

    Attributes:
        photos: the photo folder.
        index: what is known of the photos, in their order here.
        cache: the letterboxed photos on disk, after `keep_cache`.

    Raises:
        DataError: the data cannot be used.
    """

    def __init__(self, layout: Layout, image_size: int, name: str):
        self.layout, self.photos, self.index, self.image_size = layout, layout.photos, index_of(layout), image_size
        self.name = name
        self._folders = [self.index.path.parent, *(it.parent for it in index_places(layout.home, layout.index))]
        self.cache: PhotoCache | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def root(self) -> Path:
        """What was named as the data."""
        return self.layout.root

    def path(self, place: int) -> Path:
        return self.photos / self.index.file_name(place)

    def photo(self, place: int) -> np.ndarray:
        """uint8 RGB (height, width, 3); a DataError where it cannot be read."""
        return read_photo(self.path(place), self.index.size(place), self.index.is_shown)

    def original(self, place: int) -> np.ndarray:
        """The photo and its mask before any resizing: uint8 RGBA (height, width, 4)."""
        return to_rgba(self.photo(place), self.index.alpha(place))

    def square(self, place: int) -> tuple[np.ndarray, np.ndarray, dict]:
        """The letterboxed photo, uint8 (S, S, 3), its mask (S, S), 0 or 255, and the metadata of `letterbox`."""
        fitted = self.cache.get(place) if self.cache is not None else None
        if fitted is None:
            photo, metadata = letterbox(self.photo(place), self.image_size)
            return photo, letterbox(self.index.alpha(place), self.image_size)[0], metadata
        metadata = placement(self.index.size(place), self.image_size)
        photo, mask = (pad(image, metadata["padding"], self.image_size) for image in fitted)
        return photo, mask, metadata

    def keep_cache(self) -> None:
        """Keeps the letterboxed photos on disk from now on; a DataError where they do not fit."""
        everything, size = range(len(self)), self.image_size

        def draw(place: int) -> tuple[np.ndarray, np.ndarray]:
            photo, mask, metadata = self.square(place)
            return unpadded(photo, metadata["padding"]), unpadded(mask, metadata["padding"])

        self.cache = open_cache(
            name=f"{self.index.path.stem}.{size}",
            state=repr((self.index.fingerprint, self.index.is_shown)),
            folders=list(dict.fromkeys(self._folders)),
            files=[self.path(place) for place in everything],
            sizes=np.array([fitted_size(self.index.size(place), size) for place in everything]),
            draw=draw,
            threads=usable_cores(),
        )


# --- several roots ----------------------------------------------------------------------------------------


def open_sources(
    root: str | Path, split: str, image_size: int, splits: Sequence[str] = (), choices: Choices = AS_COCO
) -> list[Source]:
    """A source for each root that has the split, in the order given.

    The photo folder decides whether a root has it: COCO's archive of annotations holds those of both splits.

    Args:
        root: the data root, or several as `data_roots` takes them.
        splits: a root without the split may have one of these instead, if another root has the split; and as
            `find_layout` takes them.

    Raises:
        DataError: a root has none of them, or one is named twice; the data of one cannot be used.
    """
    roots = data_roots(root) if not choices.annotations else [Path(choices.photos)]
    elsewhere = [it for it in roots if not (it / split).exists() and any((it / o).exists() for o in splits)]
    chosen = [it for it in roots if it not in elsewhere] or roots
    several = len(roots) > 1  # photos of two roots may have the same split and name
    layouts = [find_layout(it, split, splits, choices) for it in chosen]
    return [Source(it, image_size, str(it.photos) if several else it.photos.name) for it in layouts]


def shared_folders(*parts: Sequence[Source]) -> list[Path]:
    """The photo folders of which the same photos are in two data sets."""
    places = [{(os.path.realpath(it.photos), it.layout.part): it.photos for it in sources} for sources in parts]
    return [folder for place, folder in places[0].items() if any(place in others for others in places[1:])]


def data_roots(text: str | Path) -> list[Path]:
    """The folders of a text that names one, or several between commas; one whose own name has commas is that one.

    Raises:
        DataError: the same folder twice.
    """
    names = [name.strip() for name in str(text).split(",") if name.strip()]
    if "," not in str(text) or not names or os.path.isdir(text):
        return [Path(text)]
    places = [os.path.realpath(name) for name in names]
    for number, name in enumerate(names):
        if places[number] in places[:number]:
            raise DataError(f"the data root {name} is named twice in {text}")
    return [Path(name) for name in names]
