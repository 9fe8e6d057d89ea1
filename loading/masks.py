"""Reads a folder of mask files: which mask belongs to which photo, and which of its pixels are the person."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import sha256
from itertools import takewhile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from loading.annotations import DataError, LeftOut, PhotoRecord, is_possible_size, with_example
from loading.files import all_files, composed
from loading.headers import ORIENTATION, PHOTO_FORMATS, THREADS, UNREADABLE_BY_PILLOW, Size, read_header, shown_size
from loading.mask_values import (
    COLOUR,
    COVERED,
    INDICES,
    MAX_ODD,
    ODD,
    PALETTE_COLOURS,
    PICTURE,
    MaskRule,
    Survey,
    covers_border,
    decide,
    palette_of,
)
from loading.mask_values import name as value_name
from loading.places import MASK_ENDINGS
from loading.run_lengths import Mask

UNREADABLE = "photo{s} whose mask cannot be read"
LOSSY = {"JPEG", "MPO", "JPEG2000", "WEBP", "AVIF"}
MAX_CLASSES = 32  # colours beside a transparent one in a palette; more are a cutout's
UNSUPPORTED = {".heic", ".heif", ".jxl"}  # photos that OpenCV does not read: found, and named as unreadable

warnings.filterwarnings("ignore", module=r"PIL\.")  # of a file's oddities; a filter cannot be set for threads alone


def read_pairs(photos: Path, masks: Path, left_out: LeftOut) -> tuple[list[tuple[PhotoRecord, str]], str]:
    """Returns the photos that have a mask file in the same subfolder, with its path, and how its name differs.

    They are sorted by name. A photo's size is the one that its mask was drawn on, as stored or as shown; what is left
    out joins `left_out`.
    """
    names, affix = pair_files(photos, masks, left_out)
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = [*pool.map(lambda pair: _annotated_size(photos / pair[0], masks / pair[1]), names)]
    pairs = []
    for number, ((photo, mask), size) in enumerate(zip(names, sizes, strict=True), start=1):
        if isinstance(size, str):
            left_out[size].append(photo)
        else:
            pairs.append((PhotoRecord(number, photo, *size), mask))
    return pairs, affix


def read_photos(photos: Path, left_out: LeftOut) -> list[tuple[PhotoRecord, list]]:
    """Returns all photos of a folder, at the size that they are shown at, without annotations."""
    names = sorted(_photos_by_stem(photos, left_out).values())
    with ThreadPoolExecutor(THREADS) as pool:
        headers = [*pool.map(lambda name: read_header(photos / name), names)]
    read = [*zip(names, headers, strict=True)]
    left_out["photo{s} that cannot be read"] += [file for file, header in read if not header]
    known = [(file, shown_size(*header)) for file, header in read if header]
    return [(PhotoRecord(number, file, *size), []) for number, (file, size) in enumerate(known, start=1)]


def pair_files(photos: Path, masks: Path, left_out: LeftOut) -> tuple[list[tuple[str, str]], str]:
    """Returns the relative paths of photos and their masks, sorted, and what a mask's name has beside its photo's.

    Masks have the stems of their photos, or else one beginning and one ending that pairs all of them.
    """
    photos_by_stem = _photos_by_stem(photos, left_out)
    masks_by_stem = _by_stem(masks, "mask", extensions(mask_formats()), left_out)
    affix = ""
    if masks == photos:  # the masks lie among the photos
        ending = next((e for e in MASK_ENDINGS if any(stem.endswith(e) for stem in masks_by_stem)), "")
        masks_by_stem = {stem: name for stem, name in masks_by_stem.items() if ending and stem.endswith(ending)}
        photos_by_stem = {stem: name for stem, name in photos_by_stem.items() if stem not in masks_by_stem}
    if masks_by_stem and not photos_by_stem.keys() & masks_by_stem:
        renamed, affix = _match_affixes(photos_by_stem, masks_by_stem)
        masks_by_stem = {stem: masks_by_stem[mask] for stem, mask in renamed.items()} or masks_by_stem
    extra = {re.sub(r"[-_. ]\w+$", "", stem) for stem in masks_by_stem.keys() - photos_by_stem} & masks_by_stem.keys()
    several = sorted(extra & photos_by_stem.keys())
    left_out["photo{s} with several masks"] += [photos_by_stem.pop(stem) for stem in several]
    left_out["photo{s} without a mask"] += [photos_by_stem[s] for s in sorted(photos_by_stem.keys() - masks_by_stem)]
    left_out["mask{s} without a photo"] += [masks_by_stem[s] for s in sorted(masks_by_stem.keys() - photos_by_stem)]
    stems = sorted(photos_by_stem.keys() & masks_by_stem)
    return [(photos_by_stem[stem], masks_by_stem[stem]) for stem in stems], affix


def _match_affixes(photos: dict[str, str], masks: dict[str, str]) -> tuple[dict[str, str], str]:
    """Returns each photo's stem with its mask's, where one beginning and one ending of the names pair all masks."""
    first = min(masks)
    folder, base = os.path.split(first)
    beginning, ending = _common_affixes([os.path.basename(stem) for stem in photos])
    for core in (  # what of a photo's name a mask's has: the stem, the whole name, what differs from other photos
        lambda stem: os.path.basename(stem),
        lambda stem: os.path.basename(photos[stem]),
        lambda stem: os.path.basename(stem)[len(beginning) :].removesuffix(ending),
    ):
        stems = {os.path.join(os.path.dirname(stem), core(stem)): stem for stem in photos}
        parts = [(start, end) for start in range(len(base)) for end in range(start + 1, len(base) + 1)]
        for start, end in sorted(parts, key=lambda part: part[0] - part[1]):
            if os.path.join(folder, base[start:end]) not in stems:
                continue
            before, after = base[:start], base[end:]
            pattern = re.compile(re.escape(before) + "(.+)" + re.escape(after))
            matches = {mask: pattern.fullmatch(os.path.basename(mask)) for mask in masks}
            cores = {os.path.join(os.path.dirname(mask), m[1]): mask for mask, m in matches.items() if m}
            if cores.keys() <= stems.keys() and len(cores) == len(masks):
                return {stems[core]: mask for core, mask in cores.items()}, f"{before}*{after}"
    return {}, ""


def _common_affixes(names: list[str]) -> tuple[str, str]:
    """Returns what all names begin and end with, without the digits next to what differs."""

    def common(words: list[str]) -> str:
        letters = takewhile(lambda letters: len({*letters}) == 1, zip(*words, strict=False))
        return "".join(letter for letter, *_ in letters).rstrip("0123456789")

    beginning = common(names)
    return beginning, common([name[len(beginning) :][::-1] for name in names])[::-1]


@cache
def mask_formats() -> tuple[str, ...]:
    """Returns the names of the formats that Pillow can decode."""
    Image.init()
    return tuple(name for name in Image.ID if name not in UNREADABLE_BY_PILLOW)


def extensions(formats: Sequence[str]) -> set[str]:
    """Returns the file extensions of formats, in lower case."""
    mask_formats()  # registers them
    return {extension for extension, name in Image.registered_extensions().items() if name in formats}


def _photos_by_stem(folder: Path, left_out: LeftOut) -> dict[str, str]:
    return _by_stem(folder, "photo", extensions((*PHOTO_FORMATS, "JPEG", "MPO")) | UNSUPPORTED, left_out)


def _by_stem(folder: Path, what: str, extensions: set[str], left_out: LeftOut) -> dict[str, str]:
    """Returns the relative paths of files by their path without extension; of several with one stem none is used."""
    by_stem = defaultdict(list)
    for name, is_inside in all_files(folder):
        stem, extension = os.path.splitext(name)
        if extension.lower() not in extensions:
            continue
        if is_inside and name == name.encode(errors="replace").decode():  # Linux allows any bytes in a name
            by_stem[composed(stem)].append(name)
        else:
            left_out[f"{what}{{s}} behind a link, or with a name that is not Unicode"].append(name)
    several = [name for names in by_stem.values() if len(names) > 1 for name in names]
    left_out[f"{what}{{s}} with the same name as another"] += several
    return {stem: names[0] for stem, names in by_stem.items() if len(names) == 1}


def masks_state(masks: Path) -> str:
    """Returns a hash of all mask files' sizes and times: a change of any shows in it, unlike in the folder's time."""
    stats = ((name, os.stat(masks / name)) for name, is_inside in all_files(masks) if is_inside)
    listed = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
    return sha256(repr(listed).encode(errors="surrogateescape")).hexdigest()


def _annotated_size(photo: Path, mask: Path) -> Size | str:
    """Returns the size of the photo, as stored or as shown, that a mask was drawn on; or why there is none."""
    header = read_header(photo)
    if header is None:
        return "photo{s} that cannot be read"
    try:
        with Image.open(mask, formats=mask_formats()) as image:
            mask_size = shown_size(image.size, image.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever a damaged header makes one of Pillow's readers raise
        return UNREADABLE
    stored, shown = header[0], shown_size(*header)
    if not (is_possible_size(*stored) and is_possible_size(*mask_size)):
        return "photo{s} with an impossible size"
    candidates = (stored, shown) if stored == mask_size else (shown, stored)
    return next((size for size in candidates if same_shape(size, mask_size)), "photo{s} whose mask has another shape")


def same_shape(first: Size, second: Size) -> bool:
    """Returns whether two sizes have one aspect ratio, to less than a pixel of the smaller one."""
    (width, height), (wide, high) = sorted((first, second), key=lambda size: size[0] * size[1])
    return abs(height - width * high / wide) < 1 or abs(width - height * wide / high) < 1


def find_rule(masks: Sequence[Path], wanted: str, folder: Path, threads: int) -> MaskRule:
    """Returns what the values of mask files mean, by all of them; `wanted` is --mask-values.

    Raises:
        DataError: they do not tell it.
    """

    def survey(path: Path) -> Survey | None:
        with contextlib.suppress(Exception):  # it is left out when it is read
            values, is_lossy = _read_values(path, palette_of(wanted))
            return Survey.of(values, is_lossy)
        return None

    total = None
    with ThreadPoolExecutor(threads) as pool:
        for each in filter(None, pool.map(survey, masks)):
            total = each if total is None else total.merged(each)
    if total is None:
        raise DataError(f"{folder}: no mask can be read")
    if not wanted:
        _refuse_palettes(masks, total.census.values, folder)
    return decide(total, wanted, folder)


def _refuse_palettes(masks: Sequence[Path], values: np.ndarray, folder: Path) -> None:
    """Raises a DataError if a value is of another colour in another file: then it means something else in each."""
    colours: dict[int, tuple[int, ...]] = {}
    for palette in {palette for palette in map(_palette, masks) if palette}:
        for index in range(len(palette) // 3):
            colour = palette[3 * index : 3 * index + 3]
            if index in values and colours.setdefault(index, colour) != colour:
                raise DataError(f"{folder}: the masks' palettes differ, as in value {index}: save them as RGB, or "
                                "--mask-values says which values are persons in all")  # fmt: skip


def _palette(path: Path) -> tuple[int, ...]:
    """Returns the palette of a mask whose indices count; () if it has none."""
    with contextlib.suppress(Exception), Image.open(path, formats=mask_formats()) as image:
        return tuple(image.getpalette() or ()) if image.mode == "P" and not _has_grey_palette(image) else ()
    return ()


def read_masks(files: Sequence[tuple[Path, Size]], rule: MaskRule, threads: int) -> Iterator[Mask | str]:
    """Yields for each mask file and its photo's size what `read_mask` returns, in order."""
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda file: read_mask(file[0], file[1], rule), files)


def read_mask(path: Path, size: Size, rule: MaskRule) -> Mask | str:
    """Returns a mask file at its photo's (width, height) as run lengths, or why it cannot be used."""
    try:
        values, _ = _read_values(path, rule.palette)
    except Exception:  # whatever a damaged file makes one of Pillow's decoders raise
        return UNREADABLE
    if oddity := rule.oddity(values):
        return oddity
    alpha = rule.opacity(values)
    if alpha.shape != size[::-1]:
        shrinks = alpha.size > size[0] * size[1]
        alpha = cv2.resize(alpha, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    person = alpha > 127
    if person.all() or (not rule.is_chosen and covers_border(person)):
        return COVERED
    return Mask(coco_mask.encode(np.asfortranarray(person, np.uint8))["counts"], int(person.sum()))


def refuse_wrong_masks(left_out: LeftOut, number: int, rule: MaskRule, folder: Path) -> None:
    """Raises a DataError if of a number of masks so many are odd or inverted that the others are doubtful as well."""
    for reason, allowed in ((COVERED, 0.5 * number), (ODD, MAX_ODD * rule.masks), (PICTURE, MAX_ODD * rule.masks)):
        if len(names := left_out[reason]) > allowed:
            example = value_name(rule.background if reason == COVERED else rule.person)
            many = with_example(f"{len(names)} {reason}", names)
            raise DataError(f"{folder}: {many}, of {number}: --mask-values says which values are persons, as in "
                            f"--mask-values {example}")  # fmt: skip


def _read_values(path: Path, palette: str) -> tuple[np.ndarray, bool]:
    """Returns the values of a mask's pixels, (height, width), and whether its format changes them a little.

    They are whole numbers or floats: of an alpha channel, unless it is opaque, as many programs add one to every
    picture; of a palette the indices, unless it has greys only; of colours 2**24 + 0xRRGGBB.
    """
    with Image.open(path, formats=mask_formats()) as opened:
        is_lossy = opened.format in LOSSY
        image = ImageOps.exif_transpose(opened)
        if image.mode == "1":
            image = image.convert("L")
        if image.mode[0] in "IF":  # more than 8 bits
            values = np.nan_to_num(np.asarray(image))
            return values.astype(values.dtype.newbyteorder("=")), is_lossy
        rgba = np.asarray(image.convert("RGBA"))
        alpha = rgba[..., 3]
        if image.mode == "P" and palette != PALETTE_COLOURS and not _has_grey_palette(image):
            indices = np.asarray(image)
            if palette == INDICES or "transparency" not in image.info:
                return indices, is_lossy
            if len(np.unique(indices[alpha > 0])) <= MAX_CLASSES and indices[alpha > 0].any():
                return np.where(alpha > 0, indices, 0).astype(np.uint8), is_lossy
    if not 0 < alpha.max() > alpha.min():
        return _colours(rgba), is_lossy
    drawn = _colours(rgba)
    classes = np.unique(drawn[alpha > 0])
    if {*np.unique(alpha)} == {0, 255} and len(classes) <= MAX_CLASSES and classes.any():
        return np.where(alpha > 0, drawn, 0).astype(drawn.dtype), is_lossy  # colours on a transparent ground
    return alpha, is_lossy


def _colours(rgba: np.ndarray) -> np.ndarray:
    """Returns the colours of an image: uint8 if all are grey, else int32 with 2**24 + 0xRRGGBB for others."""
    if (rgba[..., :1] == rgba[..., 1:3]).all():
        return rgba[..., 0]
    red, green, blue = np.moveaxis(rgba[..., :3].astype(np.int32), 2, 0)
    is_grey = (red == green) & (green == blue)
    return np.where(is_grey, red, COLOUR + (red << 16) + (green << 8) + blue)


def _has_grey_palette(image: Image.Image) -> bool:
    colours = np.reshape(image.getpalette(), (-1, 3))
    return bool((colours[:, :1] == colours).all())
