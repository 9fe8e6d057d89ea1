"""COCO's annotation file: which photos show persons, and what is not to be trusted in it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import msgspec

from loading.headers import MAX_PIXELS
from utils import UserError

MAX_SIDE = 2**20  # of a photo: more is taken for a broken record, not for a photo
NAMED_IN_ERROR = 100  # categories: COCO has 80


class DataError(UserError):
    """The data on disk cannot be used; the message is one line for the user."""


_Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # what an array can hold


class Photo(msgspec.Struct, gc=False):
    id: _Id
    file_name: str
    width: int
    height: int


class Annotation(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    segmentation: msgspec.Raw = msgspec.Raw(b"null")  # parsed only for persons: most of the file is not


class Category(msgspec.Struct, gc=False):
    id: int
    name: str
    supercategory: Any = None


class CocoFile(msgspec.Struct, gc=False):
    images: list[Photo]
    annotations: list[Annotation]
    categories: list[Category]


_coco_file = msgspec.json.Decoder(CocoFile)


Person = tuple[Photo, list[msgspec.Raw]]  # a photo with persons: their segmentations
LeftOut = dict[str, list[str]]  # names by the reason, in which {s} is the plural's


def with_example(reason: str, names: list[str]) -> str:
    """A reason with its first example; a name may hold a line's end."""
    return f"{reason.format(s='s' * (len(names) != 1))} ({in_one_line(names[0])}{', ...' * (len(names) > 1)})"


def in_one_line(name: str) -> str:
    return repr(name)[1:-1]


def describe_left_out(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items())


def _parse(annotations: Path) -> CocoFile:
    try:
        text = annotations.read_bytes()
        if (encoding := json.detect_encoding(text[:4])) != "utf-8":  # a byte order mark, or UTF-16 or UTF-32
            text = text.decode(encoding).encode()
        try:
            return _coco_file.decode(text)
        except msgspec.DecodeError as error:
            if isinstance(error, msgspec.ValidationError) or not re.search(b"NaN|Infinity", text):
                raise
        # Python's json writes and reads them. As null they do no harm where nobody looks; elsewhere the key is named.
        return _coco_file.decode(json.dumps(json.loads(text, parse_constant=lambda _: None)))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{annotations} is cut short or not a COCO annotation file: {error}") from None
    except MemoryError:
        raise DataError(f"{annotations} does not fit into the memory") from None


def read_persons(annotations: Path, left_out: LeftOut, category: str = "person") -> list[Person]:
    """The photos with persons and their persons' segmentations, as copies: the rest of the file can go.

    Args:
        category: what is to be taken for a person; several names are separated by commas.

    Raises:
        DataError: not a COCO annotation file, or one without such a category.
    """
    coco = _parse(annotations)
    is_named = _categories(coco.categories, category, annotations, left_out)
    photos = _photos_by_id(coco.images, left_out)
    grouped: dict[int, list[msgspec.Raw]] = {}
    unclear: set[int] = set()
    for annotation in coco.annotations:
        if (is_person := is_named.get(annotation.category_id)) is None:
            continue
        if annotation.image_id not in photos:
            left_out["annotation{s} of an unknown photo"].append(f"image_id {annotation.image_id}")
        elif is_person:
            grouped.setdefault(annotation.image_id, []).append(annotation.segmentation)
        else:
            unclear.add(annotation.image_id)
    usable = {image_id: photos[image_id] for image_id in grouped if photos[image_id]}
    reason = "photo{s} with what is a person by its supercategory alone"
    left_out[reason] += [photo.file_name for image_id, photo in usable.items() if image_id in unclear]
    return [(photo, grouped[image_id]) for image_id, photo in usable.items() if image_id not in unclear]


def wanted_names(category: str) -> list[str]:
    """The categories of a text that names one, or several between commas."""
    return [name.strip() for name in category.split(",") if name.strip()]


def _categories(categories: list[Category], wanted: str, annotations: Path, left_out: LeftOut) -> dict[int, bool]:
    """True for the categories of the wanted names; False for what has such a name as its supercategory alone.

    The latter may be a man or a helmet: that depends on the tool that wrote the file.
    """
    names = {category.name.strip() for category in categories}
    taken = {name: _spellings(name, names) for name in wanted_names(wanted)}
    missing, chosen = [name for name, found in taken.items() if not found], set().union(*taken.values())
    if not chosen:
        raise DataError(f"{annotations} has no category named {' or '.join(map(repr, missing))}: it has "
                        f"{_listed(sorted(names))}; --category names another, or several: a,b")  # fmt: skip
    left_out["name{s} in --category that the file has not"] += missing
    named = {category.id for category in categories if category.name.strip() in chosen}
    if clash := named & {category.id for category in categories if category.name.strip() not in chosen}:
        raise DataError(f"{annotations} has one id for {wanted!r} and another category, {min(clash)}")
    folded = {name.casefold() for name in taken}
    kin = {it.id for it in categories if str(it.supercategory).strip().casefold() in folded}
    return {number: number in named for number in named | kin}


def _spellings(wanted: str, names: set[str]) -> set[str]:
    """The names that differ from the wanted one in case at most. With a capital it means just itself where it is there.

    So 'cat' is 'Cat' and 'CAT' as well, and 'CAT' beside a 'Cat' is the scan.
    """
    if wanted in names and wanted != wanted.casefold():
        return {wanted}
    return {name for name in names if name.casefold() == wanted.casefold()}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED_IN_ERROR} more" * (len(names) > NAMED_IN_ERROR)
    return (", ".join(map(in_one_line, names[:NAMED_IN_ERROR])) or "none") + more


def _photos_by_id(images: list[Photo], left_out: LeftOut) -> dict[int, Photo | None]:
    """None for an id that no photo can be had by."""
    photos: dict[int, Photo | None] = {}
    for photo in images:
        sides = sorted((photo.width, photo.height))
        first = photos.setdefault(photo.id, photo)
        if first != photo:  # nobody can tell whose the persons are
            left_out["photo{s} under an id that another has"] += [it.file_name for it in (first, photo) if it]
            photos[photo.id] = None
        elif sides[0] <= 0 or sides[1] > MAX_SIDE or sides[0] * sides[1] > MAX_PIXELS:
            left_out["photo record{s} of an impossible size"].append(photo.file_name)
            photos[photo.id] = None
    return photos


def safe_name(photo: Photo, annotations: Path) -> str:
    name = photo.file_name
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or not parts[-1] or os.path.isabs(name) or re.match("[A-Za-z]:|.*\0", name):
        raise DataError(f"{annotations} names a photo outside the photo folder: {name!r}")
    return name
