"""What the values of a set's masks mean: against the arrays that the masks were written from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import refusal
from PIL import Image
from pycocotools.coco import COCO

from loading.mask_values import COVERED, ODD, PICTURE, MaskRule, parse_values
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


def image(values: np.ndarray, mode: str, colours: list[int]) -> Image.Image:
    result = Image.fromarray(values.astype(np.uint8))
    if mode == "P":
        result.putpalette(colours)
    return result.convert(mode)


def labels(number: int, person: int, other: int, background: int = 0, void: int | None = None) -> np.ndarray:
    """Returns a map of classes, uint8, of a person and a car, with a border of `void` around both."""
    values = np.full((HEIGHT, WIDTH), background, np.uint8)
    values[CARS[number]], values[PERSONS[number]] = other, person
    if void is not None:
        edges = cv2.morphologyEx(np.int16(values), cv2.MORPH_GRADIENT, np.ones((3, 3)))
        values[edges > 0] = void
    return values


def write(folder: Path, draw: Callable, numbers: range = NUMBERS, suffix: str = "png", **options: object) -> list[Path]:
    """Writes a mask file for each number: `draw` returns it as an array or a picture."""
    paths = [folder / f"{number:03d}.{suffix}" for number in numbers]
    for path, drawn in zip(paths, map(draw, numbers), strict=True):
        (drawn if isinstance(drawn, Image.Image) else Image.fromarray(drawn)).save(path, **options)
    return paths


def rule_of(paths: list[Path], wanted: str = "") -> MaskRule:
    return find_rule(paths, wanted, paths[0].parent, 2)


def drawn(path: Path, rule: MaskRule, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = read_mask(path, size, rule)
    assert isinstance(mask, Mask), mask
    alpha = draw_mask(mask.counts, size[1], size[0]) > 0
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


def coloured(n: int, background: tuple = (0, 0, 0), person: tuple = (250, 50, 83)) -> np.ndarray:
    return np.where(PERSONS[n][..., None], person, background).astype(np.uint8)


TURNED = Image.Exif()
TURNED[0x0112] = 6  # shown a quarter turn clockwise
EXACT = {  # how a mask is drawn, and how it is saved
    **{f"0 and {value}": (grey(value), {}) for value in (1, 2, 127, 255)},
    "16 bits": (grey(65535, np.uint16), {}), "16 bits, dark": (grey(255, np.uint16), {}),
    "floats": (lambda n: PERSONS[n].astype(np.float32), {"suffix": "tif"}),
    "1 bit": (lambda n: image(grey(255)(n), "1", []), {}),
    **{suffix: (grey(255), {"suffix": suffix}) for suffix in ("gif", "bmp", "tif", "pgm", "PNG")},
    "turned": (lambda n: np.rot90(grey(255)(n)), {"exif": TURNED}),
    "webp": (grey(255), {"suffix": "webp", "lossless": True}),
    "palette": (lambda n: image(PERSONS[n], "P", [0, 0, 0, 192, 128, 128]), {}),
    "grey palette": (lambda n: image(PERSONS[n], "P", [0, 0, 0, 1, 1, 1]), {}),
    "bright palette": (lambda n: image(PERSONS[n], "P", [255, 255, 0, 9, 9, 200]), {}),  # the index counts
    "colour on black": (coloured, {}),
    "cutout": (lambda n: np.dstack([PHOTO, grey(255)(n)]), {}),
    "grey cutout": (lambda n: np.dstack([PHOTO[..., 0], grey(255)(n)]), {}),
    "opaque": (lambda n: np.dstack([grey(255)(n)] * 3 + [np.full((HEIGHT, WIDTH), 255, np.uint8)]), {}),
}  # fmt: skip
NEARLY = {
    "JPEG": (grey(255), {"suffix": "jpg", "quality": 60}), "soft": (soft, {}),
    **{f"{factor} of the size": (resized(factor), {}) for factor in (0.25, 0.5, 1.5, 3)},
    "soft, 16 bits": (lambda n: soft(n).astype(np.uint16) * 257, {}), "soft and dark": (lambda n: soft(n) // 2, {}),
    "anti-aliased": (lambda n: soft(n, 0.5), {}), "lossy webp": (grey(255), {"suffix": "webp", "quality": 60}),
    "soft cutout": (lambda n: np.dstack([PHOTO, soft(n)]), {}), "JPEG of 0 and 127": (grey(127), {"suffix": "jpg"}),
    "JPEG of a colour": (coloured, {"suffix": "jpg", "quality": 80}), "soft JPEG": (soft, {"suffix": "jpg"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", EXACT | NEARLY)
def test_two_values_are_background_and_person(tmp_path, kind):
    draw, options = (EXACT | NEARLY)[kind]
    paths = write(tmp_path, draw, **options)
    assert worst_iou(paths) == 1 if kind in EXACT else worst_iou(paths) > 0.9


@pytest.mark.parametrize("values", [(0, 1), (3, 5), (0, 15)])
def test_a_thin_border_of_255_is_given_to_what_is_nearest(tmp_path, values):
    paths = write(tmp_path, lambda n: labels(n, values[1], values[0], values[0], void=255))
    assert worst_iou(paths) > 0.93
    assert "255 is a border" in rule_of(paths).described
    for path in paths:  # what is not of the border stays as it is
        stored, alpha = np.asarray(Image.open(path)), drawn(path, rule_of(paths))
        assert (alpha[stored == values[1]]).all()
        assert not (alpha[stored == values[0]]).any()


def trimap(n: int) -> np.ndarray:
    inside, around = cv2.erode(grey(1)(n), np.ones((7, 7))), cv2.dilate(grey(1)(n), np.ones((7, 7)))
    return np.where(inside > 0, 255, np.where(around > 0, 128, 0)).astype(np.uint8)


def on(background: int | tuple) -> Callable:
    return lambda n: np.where(PERSONS[n][..., None], PHOTO, background).astype(np.uint8)


REFUSED = {
    "classes": (lambda n: labels(n, 2, 1), "more than two values that fill areas: 0 (", "--mask-values 2"),
    "classes over 127": (lambda n: labels(n, 1, 3, background=(184, 191, 200)[n % 3]), "more than two", "-values"),
    "a palette of classes": (lambda n: image(labels(n, 15, 7), "P", [*range(1, 256)] * 3), "more than two", "-values"),
    "classes with a border": (lambda n: labels(n, 15, 7, void=255), "more than two values", "--mask-values"),
    "ignored areas": (lambda n: labels(n, 1, 255), "more than two values that fill areas", "--mask-values"),
    "trimap": (trimap, "more than two values that fill areas", "--mask-values"),
    "instances": (lambda n: labels(n, 1, 2 + n % 3), "more than two", "--mask-values"),
    "two kinds of files": (lambda n: grey((1, 255)[n % 2])(n), "more than two values", "--mask-values"),
    "colours": (lambda n: np.stack([labels(n, 250, 51), labels(n, 50, 221), labels(n, 83, 255)], axis=2),
                "more than two values that fill areas: 0 (", "--mask-values 250,50,83"),
    "cutouts on black": (on(0), "", "--mask-values"), "cutouts on white": (on(255), "", "--mask-values"),
    "cutouts on green": (on((0, 255, 0)), "", "--mask-values"),
    "overlays": (lambda n: np.where(PERSONS[n][..., None], PHOTO // 2 + (120, 0, 0), PHOTO).astype(np.uint8), "", ""),
    "grey pictures": (lambda n: np.where(PERSONS[n], PHOTO[..., 0] + 70, PHOTO[..., 1]), "", "--mask-values"),
    "smooth pictures": (lambda n: cv2.GaussianBlur(PHOTO[..., 0], (0, 0), 4 + n), "are pictures", ""),
    "a coloured background": (lambda n: coloured(n, background=(0, 90, 200)), "have a coloured background", ""),
    "white alone": (lambda _: np.full((HEIGHT, WIDTH), 255, np.uint8), "have one value alone: 255 (100 %)", ""),
    "black alone": (lambda _: np.zeros((HEIGHT, WIDTH), np.uint8), "have one value alone: 0 (100 %)", ""),
}  # fmt: skip


SMALL_NUMBERS = {"a palette of classes", "classes with a border", "ignored areas", "two kinds of files"}  # lost in JPEG


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_plain_is_refused_with_the_values_and_the_way_out(tmp_path, kind):
    draw, *words = REFUSED[kind]
    message = refusal(rule_of, write(tmp_path, draw))
    assert message.startswith(f"{tmp_path}: the masks ")
    assert all(word in message for word in words)
    if kind not in SMALL_NUMBERS:
        larger = write(tmp_path, lambda n: cv2.resize(draw(n), None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST),
                       suffix="jpg")  # fmt: skip
        assert refusal(rule_of, larger).startswith(f"{tmp_path}: the masks ")


VOC, LIP = (lambda n: labels(n, 15, 7, void=255)), (lambda n: labels(n, 4 + n % 3, 13))
COLOURS = REFUSED["colours"][0]
BOTH = [person | car for person, car in zip(PERSONS, CARS, strict=True)]
CHOSEN = {
    "15": (VOC, PERSONS, 0.93), "7,15": (VOC, BOTH, 0.93), "1-19": (LIP, BOTH, 1), "1-": (LIP, BOTH, 1),
    "4-6": (LIP, PERSONS, 1), "4, 5;6": (LIP, PERSONS, 1), "250,50,83": (COLOURS, PERSONS, 1), "13": (LIP, CARS, 1),
    "250,50,83,51,221,255": (COLOURS, BOTH, 1), "51,221,255": (COLOURS, CARS, 1),
    "0": (lambda n: labels(n, 0, 255, background=255), PERSONS, 1), "1": (lambda n: grey(1)(n), PERSONS, 1),
}  # fmt: skip


@pytest.mark.parametrize("wanted", CHOSEN)
def test_the_values_that_the_user_names_are_the_persons(tmp_path, wanted):
    draw, truth, least = CHOSEN[wanted]
    assert worst_iou(write(tmp_path, draw), wanted, truth) >= least
    if "," not in wanted:
        paths = write(tmp_path, lambda n: image(draw(n), "P", [*range(255, 0, -1)] * 3))
        assert worst_iou(paths, wanted, truth) >= least


def portrait(n: int) -> np.ndarray:
    """Returns a person down to both lower corners of the photo."""
    mask = cv2.rectangle(np.zeros((HEIGHT, WIDTH), np.uint8), (0, 66 + n), (WIDTH, HEIGHT), 255, -1)
    return cv2.circle(mask, (64, 40), 18 + n, 255, -1)


INVERTED = {
    "hard": (lambda n: 255 - grey(255)(n), "png"), "soft": (lambda n: 255 - soft(n), "png"),
    "JPEG": (lambda n: 255 - grey(255)(n), "jpg"), "soft JPEG": (lambda n: 255 - soft(n), "jpg"),
    "16 bits": (lambda n: 65535 - soft(n).astype(np.uint16) * 257, "png"),
    "portraits": (lambda n: 255 - portrait(n), "png"),
}  # fmt: skip


@pytest.mark.parametrize("kind", INVERTED)
def test_inverted_masks_are_left_out_and_read_with_0_as_the_person(tmp_path, kind):
    draw, suffix = INVERTED[kind]
    paths = write(tmp_path, draw, suffix=suffix)
    assert {read_mask(path, SIZE, rule_of(paths)) for path in paths} == {COVERED}
    truth = [portrait(n) > 0 for n in NUMBERS] if kind == "portraits" else PERSONS
    assert worst_iou(paths, "0", truth) > 0.95
    assert kind != "portraits" or worst_iou(write(tmp_path, portrait), "", truth) == 1


def test_values_that_no_mask_has_or_no_numbers_are_refused(tmp_path):
    paths = write(tmp_path, lambda n: labels(n, 15, 7))
    for text in ("16", "16-255"):
        assert f"--mask-values {text}" in refusal(rule_of, paths, text)
        assert ", 7 (" in refusal(rule_of, paths, text)
    for text in ("person", "1-2-3", "-1", "1,,2", "", "1.5", "#ff0000", "250,50,x"):
        assert f"--mask-values {text} has to be numbers" in refusal(parse_values, text)
    colours = write(tmp_path, COLOURS)
    assert "250,50,83 (" in refusal(rule_of, colours, "250,50,84")
    for text in ("15", "250,50", "250,50,256", "1-3,4,5"):
        assert "one is written as 250,50,83" in refusal(rule_of, colours, text)


def test_a_mask_unlike_the_others_is_no_mask(tmp_path):
    rule = rule_of(write(tmp_path, grey(255)))
    odd = {"classes": (lambda n: labels(n, 255, 128), ODD), "a picture": (lambda _: PHOTO, PICTURE),
           "a grey one": (lambda _: PHOTO[..., 0], PICTURE), "white": (lambda n: labels(n, 255, 255, 255), COVERED),
           "inverted": (lambda n: 255 - grey(255)(n), COVERED)}  # fmt: skip
    for draw, reason in odd.values():
        (path,) = write(tmp_path, draw, range(1), "tif")
        assert read_mask(path, SIZE, rule) == reason
    (nobody,) = write(tmp_path, grey(0), range(1))
    assert read_mask(nobody, SIZE, rule).largest == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["png", "jpg", "half", "palette", "16 bits", "soft"])
def test_masks_of_coco_are_understood(shared_coco, tmp_path, kind):
    coco, scores = COCO(shared_coco / "annotations" / "instances_train2017.json"), []
    persons = coco.getCatIds(catNms=["person"])
    annotations = [coco.loadAnns(coco.getAnnIds(i, persons)) for i in sorted(coco.getImgIds(catIds=persons))[:60]]
    truth = [np.bitwise_or.reduce([*map(coco.annToMask, each)]) for each in annotations]
    draw = {
        "half": lambda n: cv2.resize(truth[n] * 255, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
        "palette": lambda n: image(truth[n], "P", [0, 0, 0, 192, 128, 128]),
        "16 bits": lambda n: truth[n].astype(np.uint16) * 65535,
        "soft": lambda n: cv2.GaussianBlur(truth[n] * 255, (5, 5), 0),
    }.get(kind, lambda n: truth[n] * 255)
    paths = write(tmp_path, draw, range(60), **({"suffix": "jpg", "quality": 60} if kind == "jpg" else {}))
    rule = rule_of(paths)
    for path, mask in zip(paths, truth, strict=True):
        if read_mask(path, mask.shape[::-1], rule) == COVERED:
            assert np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).mean() > 0.7
        else:
            alpha = drawn(path, rule, mask.shape[::-1])
            scores.append((alpha & mask).sum() / (alpha | mask).sum())
    assert np.mean(scores) > 0.9
    assert len(scores) > 50
