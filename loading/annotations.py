"""Reads COCO's annotation files: which photos show persons, and what of the file cannot be trusted."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec

from loading.headers import MAX_PIXELS
from utils import UserError

MAX_SIDE = 2**20  # pixels
MAX_LISTED = 1000  # characters of category names in an error: COCO's 80 have 650


class DataError(UserError):
    """The data on disk cannot be used; the message is one line for the user."""


class PhotoRecord(msgspec.Struct, gc=False):
    id: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # the index keeps it as int64
    file_name: str
    width: int
    height: int


class ImageRecord(msgspec.Struct, gc=False):
    id: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
    width: int
    height: int
    file_name: str | None = None
    coco_url: str | None = None  # LVIS has it in the name's stead


class Annotation(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    segmentation: msgspec.Raw = msgspec.Raw(b"null")  # parsed for persons only: most of the file is not theirs


class Category(msgspec.Struct, gc=False):
    id: int
    name: str
    supercategory: Any = None


class CocoFile(msgspec.Struct, gc=False):
    images: list[ImageRecord]
    annotations: list[Annotation]
    categories: list[Category]


_coco_file = msgspec.json.Decoder(CocoFile, strict=False)  # some tools write "1" and 120.0

AnnotatedPhoto = tuple[PhotoRecord, list[msgspec.Raw]]  # with the persons' segmentations
LeftOut = dict[str, list[str]]  # reason, with {s} for the plural -> names of what is left out for it


def with_example(reason: str, names: list[str]) -> str:
    """Returns a reason in its singular or plural, with the first of its names: "photos not on disk (a.jpg, ...)"."""
    example = repr(names[0])[1:-1]  # a file's name may hold line breaks
    return f"{reason.format(s='s' * (len(names) != 1))} ({example}{', ...' * (len(names) > 1)})"


def describe_left_out(left_out: dict[str, int]) -> str:
    """Returns what a person index leaves out as text: "2 photos not on disk (a.jpg, ...), ..."."""
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items())


def read_persons(
    annotations: Path, left_out: LeftOut, category: str = "person", keeps_empty: bool = False
) -> list[AnnotatedPhoto]:
    """Returns the photos with persons and the persons' segmentations, as copies: the file's content can be freed.

    What cannot be used joins `left_out`. Several categories that stand for persons are separated by commas. With
    `keeps_empty` photos without a person are there as well, with no segmentation.

    Raises:
        DataError: it is not a COCO annotation file, or has no such category.
    """
    coco = _parse(annotations)
    is_wanted = _match_categories(coco.categories, category, annotations, left_out)
    photos = _photos_by_id([_photo_record(image, annotations) for image in coco.images], left_out)
    segmentations: dict[int, list[msgspec.Raw]] = {}
    unclear: set[int] = set()
    for annotation in coco.annotations:
        if annotation.category_id not in is_wanted:
            continue
        if annotation.image_id not in photos:
            left_out["annotation{s} of an unknown photo"].append(f"image_id {annotation.image_id}")
        elif is_wanted[annotation.category_id]:
            segmentations.setdefault(annotation.image_id, []).append(annotation.segmentation)
        else:
            unclear.add(annotation.image_id)
    usable = {image_id: photo for image_id in segmentations if (photo := photos[image_id])}
    reason = "photo{s} with an object that is a person by its supercategory only"
    left_out[reason] += [photo.file_name for image_id, photo in usable.items() if image_id in unclear]
    if keeps_empty:
        usable |= {image_id: photo for image_id, photo in photos.items() if photo}
    return [(photo, segmentations.get(image_id, [])) for image_id, photo in usable.items() if image_id not in unclear]


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
        # Python's json module writes and reads these numbers. As null they are harmless in fields that are not read;
        # elsewhere the error names the field.
        return _coco_file.decode(json.dumps(json.loads(text, parse_constant=lambda _: None)))
    except msgspec.ValidationError as error:
        raise DataError(f"{annotations} is not a COCO annotation file: {error}") from None
    except (ValueError, RecursionError) as error:
        kind = "is cut short" if "truncated" in str(error) or not text.strip() else "is not JSON"
        raise DataError(f"{annotations} {kind}: {error}") from None
    except MemoryError:
        raise DataError(f"{annotations} does not fit into the memory") from None


def split_names(category: str) -> list[str]:
    """Returns the names in a text that has one, or several separated by commas."""
    return [name.strip() for name in category.split(",") if name.strip()]


def _match_categories(categories: list[Category], wanted: str, path: Path, left_out: LeftOut) -> dict[int, bool]:
    """Returns the ids of the wanted categories as True, and those that match by their supercategory only as False.

    The latter may be a man or a helmet: that depends on the tool that wrote the file.
    """
    names = {category.name.strip() for category in categories}
    matches = {  # a name with a capital means itself where there is one: CAT beside Cat may be the scan
        name: {name} if name in names and name != name.casefold()
        else {other for other in names if other.casefold() == name.casefold()}
        for name in split_names(wanted)
    }
    missing, chosen = [name for name in matches if not matches[name]], set().union(*matches.values())
    if not chosen:
        listed = shorten(", ".join(sorted(names)), MAX_LISTED, placeholder=" ...") or "none"
        raise DataError(f"{path} has no category named {' or '.join(map(repr, missing))}: it has {listed}; "
                        "--category names another, or several: a,b")  # fmt: skip
    left_out["--category name{s} that the file does not have"] += missing
    ids = {category.id for category in categories if category.name.strip() in chosen}
    if shared := ids & {category.id for category in categories if category.name.strip() not in chosen}:
        raise DataError(f"{path} has one id for {wanted!r} and another category, {min(shared)}")
    folded = {name.casefold() for name in matches}
    related = {category.id for category in categories if str(category.supercategory).strip().casefold() in folded}
    return {category_id: category_id in ids for category_id in ids | related}


def _photos_by_id(images: list[PhotoRecord], left_out: LeftOut) -> dict[int, PhotoRecord | None]:
    """Returns the photos by id, None for an id that cannot be used."""
    photos: dict[int, PhotoRecord | None] = {}
    for photo in images:
        first = photos.setdefault(photo.id, photo)
        if first != photo:  # which of the two its annotations belong to is unknown
            left_out["photo{s} with the id of another photo"] += [each.file_name for each in (first, photo) if each]
            photos[photo.id] = None
        elif not is_possible_size(photo.width, photo.height):
            left_out["photo record{s} with an impossible size"].append(photo.file_name)
            photos[photo.id] = None
    return photos


def is_possible_size(width: int, height: int) -> bool:
    """Returns whether a photo may have this size; others are taken for broken records."""
    return 0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS


def _photo_record(image: ImageRecord, annotations: Path) -> PhotoRecord:
    """Returns a photo with its file name, or the name in its address; a DataError if it has neither."""
    name = image.file_name or posixpath.basename(urlsplit(image.coco_url or "").path)
    if not name:
        raise DataError(f"{annotations} has an image without file_name: the one of id {image.id}")
    return PhotoRecord(image.id, name, image.width, image.height)
