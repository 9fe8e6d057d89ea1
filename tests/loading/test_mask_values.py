"""What the values of a set's masks mean: against the arrays that the masks were written from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import refusal
from PIL import Image

from loading.mask_values import COVERED, MaskRule, parse_values
from loading.masks import find_rule, read_mask
from loading.run_lengths import Mask, draw_mask

SIZE = WIDTH, HEIGHT = 128, 96


def person(n: int) -> np.ndarray:
    head = cv2.circle(np.zeros((HEIGHT, WIDTH), np.uint8), (36 + 2 * n, 22 + n), 9, 1, -1)
    return cv2.ellipse(head, (36 + 2 * n, 60), (12 + n, 34), 2.0 * n, 0, 360, 1, -1) > 0


NUMBERS = range(9)
PERSONS = [person(n) for n in NUMBERS]
CARS = [cv2.rectangle(np.zeros((HEIGHT, WIDTH), np.uint8), (92, 50), (112, 90 - n), 1, -1) > 0 for n in NUMBERS]
TEXTURE = np.random.default_rng(0).integers(0, 90, (HEIGHT, WIDTH, 3), np.uint8)
PHOTO = cv2.resize(TEXTURE[:7, :9], SIZE, interpolation=cv2.INTER_CUBIC) + TEXTURE  # 0 to about 180


def with_palette(indices: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(colours)
    return image


def labels(number: int, person: int, other: int, background: int = 0, void: int | None = None) -> np.ndarray:
    """Returns a map of classes, uint8, of a person and a car, with a border of `void` around both."""
    values = np.full((HEIGHT, WIDTH), background, np.uint8)
    values[CARS[number]], values[PERSONS[number]] = other, person
    if void is not None:
        edges = cv2.morphologyEx(np.int16(values), cv2.MORPH_GRADIENT, np.ones((3, 3)))
        values[edges > 0] = void
    return values


def write(folder: Path, draw: Callable, suffix: str = "png", **options: object) -> list[Path]:
    """Writes a mask file for each number: `draw` returns it as an array or a picture."""
    paths = [folder / f"{number}.{suffix}" for number in NUMBERS]
    for path, mask in zip(paths, map(draw, NUMBERS), strict=True):
        (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(path, **options)
    return paths


def rule_of(paths: list[Path], wanted: str = "") -> MaskRule:
    return find_rule(paths, wanted, paths[0].parent, 2)


def drawn(path: Path, rule: MaskRule) -> np.ndarray:
    mask = read_mask(path, SIZE, rule)
    assert isinstance(mask, Mask), mask
    alpha = draw_mask(mask.counts, HEIGHT, WIDTH) > 0
    assert mask.largest == alpha.sum()
    return alpha


def worst_iou(paths: list[Path], wanted: str = "", truth: list[np.ndarray] = PERSONS) -> float:
    rule = rule_of(paths, wanted)
    pairs = [(drawn(path, rule), expected) for path, expected in zip(paths, truth, strict=True)]
    return min((one & other).sum() / (one | other).sum() for one, other in pairs)


def grey(value: int, dtype: type = np.uint8) -> Callable:
    return lambda n: (PERSONS[n] * value).astype(dtype)


def soft(n: int, sigma: float = 1.5) -> np.ndarray:
    return cv2.GaussianBlur(grey(255)(n), (0, 0), sigma)


def resized(factor: float) -> Callable:
    return lambda n: cv2.resize(grey(255)(n), None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def coloured(n: int, background: tuple = (0, 0, 0), person: tuple | np.ndarray = (250, 50, 83)) -> np.ndarray:
    return np.where(PERSONS[n][..., None], person, background).astype(np.uint8)


def colours(n: int) -> np.ndarray:
    return np.stack([labels(n, 250, 51), labels(n, 50, 221), labels(n, 83, 255)], axis=2)


TURNED = Image.Exif()
TURNED[0x0112] = 6  # shown a quarter turn clockwise
EXACT = {  # how a mask is drawn, and how it is saved
    "0 and 1": (grey(1), {}), "0 and 255": (grey(255), {}), "gif": (grey(255), {"suffix": "gif"}),
    "turned": (lambda n: np.rot90(grey(255)(n)), {"exif": TURNED}), "16 bits": (grey(65535, np.uint16), {}),
    "floats": (grey(1, np.float32), {"suffix": "tif"}), "1 bit": (lambda n: Image.fromarray(PERSONS[n]), {}),
    "grey palette": (lambda n: with_palette(PERSONS[n], [0, 0, 0, 1, 1, 1]), {}), "colour on black": (coloured, {}),
    "bright palette": (lambda n: with_palette(PERSONS[n], [255, 255, 0, 9, 9, 200]), {}),  # the index counts
    "cutout": (lambda n: np.dstack([PHOTO, grey(255)(n)]), {}),
    "opaque": (lambda n: np.dstack([grey(255)(n)] * 3 + [np.full((HEIGHT, WIDTH), 255, np.uint8)]), {}),
}  # fmt: skip
NEARLY = {
    "JPEG": (grey(255), {"suffix": "jpg", "quality": 60}), "soft": (soft, {}),
    "a quarter of the size": (resized(0.25), {}), "three times the size": (resized(3), {}),
    "soft, 16 bits": (lambda n: soft(n).astype(np.uint16) * 257, {}), "anti-aliased": (lambda n: soft(n, 0.5), {}),
    "soft, thousands of values": (lambda n: cv2.GaussianBlur(grey(1, np.float32)(n), (0, 0), 1.5), {"suffix": "tif"}),
    "JPEG of 0 and 127": (grey(127), {"suffix": "jpg"}), "JPEG of a colour": (coloured, {"suffix": "jpg"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", EXACT | NEARLY)
def test_two_values_are_background_and_person(tmp_path, kind):
    draw, options = (EXACT | NEARLY)[kind]
    paths = write(tmp_path, draw, **options)
    assert worst_iou(paths) == 1 if kind in EXACT else worst_iou(paths) > 0.9


def test_a_thin_border_of_255_is_given_to_what_is_nearest(tmp_path):
    paths = write(tmp_path, lambda n: labels(n, 5, 3, background=3, void=255))
    assert worst_iou(paths) > 0.93
    assert "255 is a border" in rule_of(paths).described
    for path in paths:  # what is not of the border stays as it is
        stored, alpha = np.asarray(Image.open(path)), drawn(path, rule_of(paths))
        assert np.array_equal(alpha[stored != 255], stored[stored != 255] == 5)


AREAS = "more than two values that fill areas"
REFUSED = {  # a mask, and words of the refusal
    "classes": (lambda n: labels(n, 2, 1), f"{AREAS}: 0 (", "--mask-values 2"),
    "classes over 127": (lambda n: labels(n, 1, 3, background=(184, 191, 200)[n % 3]), AREAS),
    "classes with a border": (lambda n: labels(n, 15, 7, void=255), AREAS),
    "colours": (colours, AREAS, "250,50,83"), "ignored areas": (lambda n: labels(n, 1, 255), AREAS),
    "cutouts on black": (lambda n: coloured(n, person=PHOTO), "--mask-values"),
    "cutouts on green": (lambda n: coloured(n, (0, 255, 0), PHOTO), "--mask-values"),
    "grey pictures": (lambda n: np.where(PERSONS[n], PHOTO[..., 0] + 70, PHOTO[..., 1]), "--mask-values"),
    "smooth pictures": (lambda n: cv2.GaussianBlur(PHOTO[..., 0], (0, 0), 4 + n), "are pictures", "alpha of a cutout"),
    "a coloured background": (lambda n: coloured(n, background=(0, 90, 200)), "have a coloured background"),
    "white alone": (lambda _: np.full((HEIGHT, WIDTH), 255, np.uint8), "have one value alone: 255 (100 %)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_plain_is_refused_with_the_values_and_the_way_out(tmp_path, kind):
    draw, *words = REFUSED[kind]
    message = refusal(rule_of, write(tmp_path, draw))
    assert message.startswith(f"{tmp_path}: the masks ")
    assert all(word in message for word in words)
    if kind not in ("classes with a border", "ignored areas"):  # small numbers, which a JPEG loses
        larger = write(tmp_path, lambda n: draw(n).repeat(4, axis=0).repeat(4, axis=1), "jpg")
        assert refusal(rule_of, larger).startswith(f"{tmp_path}: the masks ")


VOC, LIP = (lambda n: labels(n, 15, 7, void=255)), (lambda n: labels(n, 4 + n % 3, 13))
BOTH = [person | car for person, car in zip(PERSONS, CARS, strict=True)]
CHOSEN = {
    "15": (VOC, PERSONS, 0.93), "7,15": (VOC, BOTH, 0.93), "1-19": (LIP, BOTH, 1), "1-": (LIP, BOTH, 1),
    "4, 5;6": (LIP, PERSONS, 1), "250,50,83": (colours, PERSONS, 1), "250,50,83,51,221,255": (colours, BOTH, 1),
    "0": (lambda n: labels(n, 0, 255, background=255), PERSONS, 1),
}  # fmt: skip


@pytest.mark.parametrize("wanted", CHOSEN)
def test_the_values_that_the_user_names_are_the_persons(tmp_path, wanted):
    draw, truth, least = CHOSEN[wanted]
    assert worst_iou(write(tmp_path, draw), wanted, truth) >= least
    if "," not in wanted:
        paths = write(tmp_path, lambda n: with_palette(draw(n), [*range(255, 0, -1)] * 3))
        assert worst_iou(paths, wanted, truth) >= least


def portrait(n: int) -> np.ndarray:
    mask = cv2.rectangle(np.zeros((HEIGHT, WIDTH), np.uint8), (0, 66 + n), (WIDTH, HEIGHT), 255, -1)
    return cv2.circle(mask, (64, 40), 18 + n, 255, -1)


@pytest.mark.parametrize(("draw", "suffix"), [(soft, "jpg"), (portrait, "png")])
def test_inverted_masks_are_left_out_and_read_with_0_as_the_person(tmp_path, draw, suffix):
    truth = [draw(n) > 127 for n in NUMBERS]
    assert worst_iou(write(tmp_path, draw, suffix), "", truth) > 0.95
    paths = write(tmp_path, lambda n: ~draw(n), suffix)
    assert {read_mask(path, SIZE, rule_of(paths)) for path in paths} == {COVERED}
    assert worst_iou(paths, "0", truth) > 0.95


def test_values_that_no_mask_has_or_no_numbers_are_refused(tmp_path):
    paths = write(tmp_path, lambda n: labels(n, 15, 7))
    message = refusal(rule_of, paths, "16-255")
    assert "--mask-values 16-255" in message
    assert ", 7 (" in message
    for text in ("person", "1-2-3", "-1", "1,,2", "", "1.5"):
        assert f"--mask-values {text} has to be numbers" in refusal(parse_values, text)
    paths = write(tmp_path, colours)
    assert "250,50,83 (" in refusal(rule_of, paths, "250,50,84")
    for text in ("15", "250,50,256", "1-3,4,5"):
        assert "one is written as 250,50,83" in refusal(rule_of, paths, text)
