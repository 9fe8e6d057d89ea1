"""Decides what the values of a set's mask files mean: all masks decide together, and what is not plain is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from loading.annotations import DataError
from loading.class_lists import COLOURS, LISTED

COLOUR = 2**24  # added to a colour, 0xRRGGBB, to tell it from a grey value
OTHERS, MAX_COUNTED = -1e9, 1024  # stands for all values of a mask but the commonest, if it has more
NOISE = 16 / 255  # of the values' range: JPEG's noise, and the ends of a slow gradient
COLOUR_NOISE = 40  # of a channel's 255: JPEG halves the resolution of colours
MANY_VALUES = 128  # more different ones are of soft edges or of a picture, and not the numbers of classes
MAX_ODD = 0.01  # of a set's masks may look like no other: they are left out
# Thresholds from COCO's masks, written as PNG, JPEG, halved, blurred, and as maps of classes, trimaps and cutouts:
MIN_FLAT = 0.12  # of the pixels in between two values: blurred edges have 0.07 at most, areas of a third value 0.7
MIN_FLAT_AREA = 0.0001, 0.002  # of all pixels of the set, and of one mask
MAX_BEYOND = 0.01  # of all pixels: brighter than both of the two values
MIN_EDGE = 0.001  # of all pixels of the set: a value that soft edges alone would not have
MIN_SOLID = 0.1  # the pixels of the rarer of the two values, in those in between: soft masks have 0.4, pictures 0.04
MIN_BORDER = 0.75  # of the photo's border, and its corners: a mask that covers them is inverted, or of no use
VOC_PERSON, VOID = 15, 255  # Pascal VOC's values of persons, and of the border around objects
VOID_REACH, MIN_BETWEEN, MIN_TOUCHING = 9, 0.6, 0.05  # pixels: of a border, so many have two others around them
MAX_LISTED = 8  # values in an error

PICTURES = "are pictures"
ALPHA, INDICES, PALETTE_COLOURS = "alpha", "indices", "colours"  # what counts of an image with a palette
Range = tuple[float, float]  # of values, both ends included

ODD = "photo{s} whose mask has areas of other values than most"
PICTURE = "photo{s} whose mask is a picture"
COVERED = "photo{s} whose mask covers the photo's border, as an inverted one does"


class MaskRule(NamedTuple):
    """Which values of a set's mask files are the person: those nearer to `person` than to `background`, or `ranges`.

    Colours count by their brightest channel, and in `ranges` as 2**24 + 0xRRGGBB.
    """

    background: float
    person: float
    ranges: tuple[Range, ...] = ()
    has_void: bool = False  # pixels of 255 belong to what is nearest
    is_colour: bool = False
    noise: float = 0.0
    is_chosen: bool = False  # by the user, who may have photos that a person covers
    palette: str = ALPHA  # what of an image with a palette counts
    masks: int = 0  # how many of the set decided
    described: str = ""  # for the banner

    def opacity(self, values: np.ndarray) -> np.ndarray:
        """Returns a mask's values (height, width) as uint8, 0 to 255 for background to person."""
        if not self.ranges:
            values = brightness(values) if self.is_colour else values
            scaled = (values - np.float32(self.background)) * np.float32(255 / (self.person - self.background))
            return np.clip(scaled, 0, 255).round().astype(np.uint8)
        person = np.any([_within(values, *each, self.noise) for each in self.ranges], axis=0)
        if self.has_void and (void := values == VOID).any():
            person |= void & (_distance_to(person) < _distance_to(~person & ~void))
        return person.astype(np.uint8) * 255

    def oddity(self, values: np.ndarray) -> str:
        """Returns why a mask is not like the others of its set; "" if it is."""
        if self.ranges:
            return ""
        if not self.is_colour and values.max(initial=0) >= COLOUR:
            return PICTURE
        census = Census.of(values)
        between = ~census.near(self.background, self.noise) & ~census.near(self.person, self.noise)
        if census.flat[between].sum() > max(MIN_FLAT * census.pixels[between].sum(), MIN_FLAT_AREA[1] * values.size):
            return ODD
        return PICTURE if census.pixels[between].sum() > values.size / 2 else ""


class Census:
    """How many pixels of masks have each value, and how many lie in the middle of 3 x 3 equal ones."""

    def __init__(self, values: np.ndarray, pixels: np.ndarray, flat: np.ndarray):
        self.values, self.pixels, self.flat = values, pixels, flat

    @classmethod
    def of(cls, values: np.ndarray) -> Census:
        """Counts one mask's values, (height, width)."""
        kernel = np.ones((3, 3))
        channels = values.view(np.uint8).reshape(*values.shape, -1)  # OpenCV compares no whole numbers of 32 bits
        middle = (cv2.erode(channels, kernel) == cv2.dilate(channels, kernel)).reshape(channels.shape).all(axis=2)
        seen, pixels = _count(values)
        flat = np.zeros_like(pixels)
        flat_values, counts = _count(values[middle])
        flat[np.searchsorted(seen, flat_values)] = counts
        return cls(seen, pixels, flat)._commonest()

    def _commonest(self) -> Census:
        if len(self.values) <= MAX_COUNTED:
            return self
        order = np.argsort(-self.pixels)
        kept, others = self[order[:MAX_COUNTED]], self[order[MAX_COUNTED:]]
        return kept + Census(np.array([OTHERS]), others.pixels.sum(keepdims=True), others.flat.sum(keepdims=True))

    def __add__(self, other: Census) -> Census:
        values, codes = np.unique(np.concatenate([self.values, other.values]), return_inverse=True)
        counts = ((self.pixels, other.pixels), (self.flat, other.flat))
        return Census(values, *(np.bincount(codes, np.concatenate(both)).astype(np.int64) for both in counts))

    def __getitem__(self, chosen: np.ndarray) -> Census:
        return Census(self.values[chosen], self.pixels[chosen], self.flat[chosen])

    def near(self, value: float, noise: float) -> np.ndarray:
        return distance(self.values, value) <= noise

    def listed(self) -> str:
        """Returns the commonest values, with the part of all pixels that each covers, as text."""
        commonest = sorted(np.argsort(-self.pixels, kind="stable")[:MAX_LISTED])
        texts = [f"{name(self.values[i])} ({percent(self.pixels[i] / self.pixels.sum())})" for i in commonest]
        return ", ".join(texts) + f" and {len(self.values) - MAX_LISTED} more" * (len(self.values) > MAX_LISTED)


def _count(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if values.dtype != np.uint8:
        return np.unique(values, return_counts=True)
    counts = np.bincount(values.ravel(), minlength=256)  # much faster
    return np.flatnonzero(counts), counts[counts > 0]


class Survey(NamedTuple):
    """What all masks of a set have: their values, the files and those in colours, and whether any is lossy."""

    census: Census
    files: int = 1
    colour_files: int = 0
    is_lossy: bool = False
    void: int = 0  # pixels of 255
    void_between: int = 0  # of them, those that have two other values beside them
    void_touching: int = 0  # and those that touch the commonest value

    @classmethod
    def of(cls, values: np.ndarray, is_lossy: bool) -> Survey:
        void = _void(values) if values.dtype == np.uint8 and not is_lossy else (0, 0, 0)
        return cls(Census.of(values), 1, int(values.max(initial=0) >= COLOUR), is_lossy, *void)

    def merged(self, other: Survey) -> Survey:
        """Returns what the masks of both have."""
        sums: list[Any] = [one + two for one, two in zip(list[Any](self), list[Any](other), strict=True)]
        return Survey(*sums)


def decide(survey: Survey, wanted: str, folder: Path) -> MaskRule:
    """Returns which values are the person in the masks of a folder.

    Args:
        survey: of all masks of the set.
        wanted: the values, as a user writes them: "15", "1-19", "1-", "24,25", or colours "250,50,83"; or as
            `class_lists.values_of` returns them; "": those that the masks tell by themselves.

    Raises:
        DataError: the masks do not tell it, or do not have what is wanted.
    """
    census, is_colour, has_void = _areas(survey, bool(wanted))
    noise = _noise(census, survey.is_lossy, is_colour)
    background, person, fault = _two_values(census, noise)
    if not fault and is_colour and brightness(background) > noise:
        fault = "have a coloured background"
    has = f"{folder}: the masks {fault or 'have two values'}: {census.listed()}"
    if wanted:
        two = () if fault or has_void else (background, person)
        rule = _chosen(census, wanted, two, is_colour, noise if survey.is_lossy else 0.0, has)
    elif fault == PICTURES:
        raise DataError(f"{has}. A mask is white where persons are, and black elsewhere, or the alpha of a cutout")
    elif fault:
        raise DataError(f"{has}. --mask-values says which are persons, as in --mask-values {_example(census, folder)}")
    else:
        dark, bright = (float(brightness(value)) for value in (background, person))
        soft = ", with soft edges" * (len(census.values) > 2)
        described = f"value {name(person)} of {name(background)} and {name(person)}{soft}"
        rule = MaskRule(dark, bright, ((person, person),) * has_void, noise=noise, described=described)
    void = f"; {VOID} is a border, given to what is nearest" * has_void
    rule = rule._replace(has_void=has_void, is_colour=is_colour, masks=survey.files)
    return rule._replace(described=rule.described + void)


def _areas(survey: Survey, is_wanted: bool) -> tuple[Census, bool, bool]:
    """Returns the values that mean background or objects, whether they are colours, and whether 255 is a border."""
    census, is_colour = survey.census, survey.colour_files > MAX_ODD * survey.files
    if not is_colour:
        census = census[census.values < COLOUR]
    others = census[census.values != VOID]
    has_void = survey.void_between > MIN_BETWEEN * survey.void and bool(np.count_nonzero(others.flat) > 1)
    if not is_wanted:  # the core of a trimap does not touch the background, and soft edges have no border
        has_void &= survey.void_touching > MIN_TOUCHING * survey.void and len(others.values) == 2
    return others if has_void else census, is_colour, has_void


def _two_values(census: Census, noise: float) -> tuple[float, float, str]:
    """Returns the two values that fill the largest areas, the darker one first, and what else the masks have."""
    first = census.values[census.flat.argmax()]
    others = census[~census.near(first, noise)]
    if not others.flat.any():
        return first, first, "have one value alone"
    second = others.values[others.flat.argmax()]
    between = others[~others.near(second, noise)]
    beyond = (brightness(between.values) > max(map(brightness, (first, second)))) & (between.values != OTHERS)
    rarer = min(census.flat[census.near(value, noise)].sum() for value in (first, second))
    total, in_between = census.pixels.sum(), between.pixels.sum()
    faults = {
        "have more than two values that fill areas": between.flat.sum()
        > max(MIN_FLAT * in_between, MIN_FLAT_AREA[0] * total),
        PICTURES: rarer < MIN_SOLID * in_between,
        "have a third value along the edges, as trimaps": noise == 0
        and len(between.values) == 1 and between.values[0] != OTHERS
        and in_between > MIN_EDGE * total,
        "have values beyond the two that fill areas": between.pixels[beyond].sum() > MAX_BEYOND * total,
    }
    fault = next((words for words, is_so in faults.items() if is_so), "")
    return *sorted((first, second), key=brightness), fault


def _noise(census: Census, is_lossy: bool, is_colour: bool) -> float:
    """Returns how far a value may be from the one that it stands for."""
    if not is_lossy and len(census.values) <= MANY_VALUES:
        return 0.0
    return COLOUR_NOISE if is_colour else NOISE * float(np.ptp(census.values[census.values != OTHERS]))


def _chosen(census: Census, wanted: str, two: tuple[float, ...], is_colour: bool, noise: float, has: str) -> MaskRule:
    """Returns the rule of values that the user or a list of classes names; `two` are all that the masks have.

    Raises:
        DataError: no mask has them, or only one kind of pixel is left. `has` says what the masks have.
    """
    is_listed, named = wanted.startswith(LISTED), wanted.removeprefix(LISTED)
    if named.startswith(COLOURS) and not is_colour:
        raise DataError(f"{has}. The list of classes beside them has colours: --mask-values says what are persons")
    named = named.removeprefix(COLOURS)
    ranges = parse_values(named, is_colour)
    found = np.any([_within(census.values, *each, noise) for each in ranges], axis=0)
    persons = [value for value in two if found[census.values == value].all()]
    if len(persons) == 1:  # of the two, and what is nearer to it than to the other one: edges may be soft
        other = two[int(two[0] == persons[0])]
        rule = MaskRule(float(brightness(other)), float(brightness(persons[0])), noise=noise)
    elif two or not found.any():
        by_list = f"the list of classes beside the masks, by which persons are {named},"
        raise DataError(f"{by_list if is_listed else f'--mask-values {named}'} tells no persons from the background: "
                        f"{has}{'. --mask-values says which values are persons' * is_listed}")  # fmt: skip
    else:
        rule = MaskRule(0, 1, ranges, noise=noise)
    described = f"value {named} of {census.listed()}"
    return rule._replace(is_chosen=not is_listed, palette=palette_of(wanted), described=described)


def parse_values(text: str, is_colour: bool = False) -> tuple[Range, ...]:
    """Returns the ranges in a text such as "15", "1-19", "1-" or "24,25", or the colours in one such as "250,50,83".

    Raises:
        DataError: it is no such text.
    """
    items = [item.strip() for item in re.split("[,;]", text)]
    parsed = [re.fullmatch(r"(\d+)(-(\d*))?", item) for item in items]
    if not all(parsed):
        raise DataError(f"--mask-values {text} has to be numbers, as 15, 1-19, 1- or 24,25, or colours, as 250,50,83")
    if is_colour:
        if len(items) % 3 or not all(item.isdecimal() and int(item) < 256 for item in items):
            raise DataError(f"--mask-values {text}: the masks have colours, and one is written as 250,50,83")
        red, green, blue = (np.array(items[channel::3], np.int64) for channel in range(3))
        return tuple((int(each), int(each)) for each in COLOUR + (red << 16) + (green << 8) + blue)
    return tuple((int(m[1]), (int(m[3]) if m[3] else math.inf) if m[2] else int(m[1])) for m in parsed if m)


def _within(values: np.ndarray, low: float, high: float, noise: float) -> np.ndarray:
    return (values >= low) & (values <= high) | (distance(values, low) <= noise)


def _example(census: Census, folder: Path) -> str:
    """Returns what the user may type: the value of the largest area that is not the background, as far as known."""
    if folder.name.startswith("SegmentationClass") and VOC_PERSON in census.values:
        return f"{VOC_PERSON}, if the classes are Pascal VOC's"
    areas = np.argsort(-census.flat)
    return name(census.values[areas[min(1, len(areas) - 1)]])


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %" if fraction < 0.995 else "100 %"


def name(value: float) -> str:
    """Returns a value as text, a colour as "250,50,83"."""
    if value < COLOUR:
        return f"{value:g}" if value != OTHERS else "others"
    return ",".join(str(int(value) >> shift & 255) for shift in (16, 8, 0))


def brightness(values: np.ndarray | float) -> np.ndarray:
    """Returns values with the brightest channel in each colour's stead."""
    values = np.asarray(values)
    if values.dtype == np.uint8 or values.max(initial=0) < COLOUR:
        return values
    return np.where(values < COLOUR, values, np.max(_channels(values), axis=0))


def distance(values: np.ndarray, value: float) -> np.ndarray:
    """Returns how far values are from another one; of colours, in the channel that differs most."""
    if value < COLOUR:
        return np.abs(brightness(values) - np.float64(value))
    apart = [np.abs(one - other) for one, other in zip(_channels(values), _channels(np.asarray(value)), strict=True)]
    return np.max(apart, axis=0)


def _channels(values: np.ndarray) -> list[np.ndarray]:
    """Returns red, green and blue of colours; a grey value has it in each."""
    colours = values.astype(np.int64)
    return [np.where(colours < COLOUR, colours, colours >> shift & 255) for shift in (16, 8, 0)]


def palette_of(wanted: str) -> str:
    """Returns what of an image with a palette counts: alpha or colours, and indices where values are named."""
    return PALETTE_COLOURS if COLOURS in wanted else INDICES if wanted else ALPHA


def _void(values: np.ndarray) -> tuple[int, int, int]:
    """Returns how many pixels are 255, how many have two others beside them, and how many touch the commonest."""
    void, kernel = values == VOID, np.ones((VOID_REACH, VOID_REACH))
    if not void.any() or void.all():
        return int(void.sum()), 0, 0
    low, high = cv2.erode(values, kernel), cv2.dilate(np.where(void, np.uint8(0), values), kernel)
    commonest = (values == np.bincount(values[~void]).argmax()).astype(np.uint8)
    touching = void & (cv2.dilate(commonest, np.ones((3, 3))) > 0)
    return int(void.sum()), int((void & (low < high)).sum()), int(touching.sum())


def _distance_to(pixels: np.ndarray) -> np.ndarray:
    return cv2.distanceTransform((~pixels).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def covers_border(mask: np.ndarray) -> bool:
    """Returns whether a mask, bool (height, width), has the corners and most of the border, or those of its top.

    A person may have both lower corners: an inverted mask then has the upper ones.
    """
    corners = mask[:: max(1, len(mask) - 1), :: max(1, mask.shape[1] - 1)]
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return bool((corners.all() and border.mean() > MIN_BORDER) or (corners[0].all() and mask[0].mean() > MIN_BORDER))
