"""Data that could be trained on with wrong masks, photos or splits without a word: right, or refused in a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import refusal, write_photo
from PIL import Image

from datasets import COCOPersonDataset
from loading.layout import DataOptions

SPLITS, HALF = ("train2017", "val2017"), DataOptions(val_fraction=0.5)
PERSON = cv2.ellipse(np.zeros((48, 64), np.uint8), (26, 24), (9, 16), 0, 0, 360, 1, -1)
CAR = np.zeros_like(PERSON)
CAR[36:44, 44:60] = 1


def write(root: Path, mask: Image.Image | np.ndarray, names: str = "abcdefgh", photos: str = "photos") -> None:
    """Writes the same mask for photos of these names."""
    for name in names:
        write_photo(root / photos / f"{name}.jpg", np.full((48, 64, 3), 90, np.uint8))
        path = root / photos.replace("photos", "masks") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(path)


def open_both(root: Path, options: DataOptions = HALF) -> list[COCOPersonDataset]:
    return [COCOPersonDataset(root, split, 48, other_splits=SPLITS, options=options) for split in SPLITS]


def palette(indices: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(indices, "P")
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def two_palettes(root: Path) -> None:
    write(root, palette(PERSON, (0, 0, 0), (255, 0, 0)), "abcd")
    write(root, palette(1 - PERSON, (255, 0, 0), (0, 0, 0)), "efgh")


def classes_on_nothing(root: Path) -> None:
    write(root, np.dstack([255 * PERSON, 0 * CAR, 255 * CAR, 255 * (PERSON | CAR)]))


def colours_of_a_list(root: Path) -> None:
    write(root, palette(PERSON + 2 * CAR, (0, 0, 0), (128, 0, 0), (0, 128, 0)))
    (root / "labelmap.txt").write_text("background:0,0,0::\nperson:128,0,0::\ncar:0,128,0::\n")


def list_without_background(root: Path) -> None:
    write(root, PERSON + 2 * CAR)
    (root / "class_names.txt").write_text("person\ncar\n")


def trimap(root: Path) -> None:
    edge = cv2.morphologyEx(PERSON, cv2.MORPH_GRADIENT, np.ones((2, 2))) > 0
    write(root, np.where(edge, 128, 255 * PERSON).astype(np.uint8))


def half_ones_half_soft(root: Path) -> None:
    write(root, PERSON, "abcd")
    write(root, cv2.GaussianBlur(255 * PERSON, (3, 3), 0), "efgh")


def validation_inside_training(root: Path) -> None:
    write(root, 255 * PERSON)
    write(root, 255 * PERSON, "xy", photos="photos/val")


def one_list(root: Path) -> None:
    write(root, 255 * PERSON)
    (root / "train.txt").write_text("a\nb\n")


def keypoints(root: Path) -> None:
    write_photo(root / "images" / "a.jpg", np.full((48, 64, 3), 90, np.uint8))
    (root / "labels").mkdir()
    (root / "labels" / "a.txt").write_text("0 " + "0.5 " * 38)
    (root / "data.yaml").write_text("names: [person]\nkpt_shape: [17, 2]\n")


def coco_beside_masks(root: Path) -> None:
    write(root, 255 * PERSON, photos="train2017/photos")
    write_photo(root / "val2017" / "v.jpg", np.full((48, 64, 3), 90, np.uint8))
    (root / "annotations").mkdir()
    content: dict = {"images": [], "annotations": [], "categories": []}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("draw", "why"),
    [
        (two_palettes, "palettes differ"),
        (classes_on_nothing, "more than two values"),
        (list_without_background, "more than two values"),
        (trimap, "a third value along the edges"),
        (half_ones_half_soft, "the masks have"),
        (validation_inside_training, "no folder of its own"),
        (one_list, "lists the photos of one split"),
        (keypoints, "keypoints, which are no masks"),
        (coco_beside_masks, "of different kinds"),
    ],
)
def test_what_is_not_plain_is_refused(draw: Callable[[Path], None], why, tmp_path):
    draw(tmp_path)
    assert why in refusal(open_both, tmp_path)


def test_a_lists_colours_are_those_of_the_palette(tmp_path):
    colours_of_a_list(tmp_path)
    for dataset in open_both(tmp_path):
        assert all(np.array_equal(dataset.alpha(i), 255 * PERSON) for i in range(len(dataset)))


def test_a_photo_with_a_second_mask_is_left_out(tmp_path):
    write(tmp_path, 255 * PERSON)
    Image.fromarray(255 * CAR).save(tmp_path / "masks" / "a_1.png")
    names = {dataset.file_name(i) for dataset in open_both(tmp_path) for i in range(len(dataset))}
    assert names == {f"{name}.jpg" for name in "bcdefgh"}


def test_negatives_are_not_the_data_themselves(tmp_path):
    write(tmp_path, 255 * PERSON)
    assert "holds the photos with persons" in refusal(open_both, tmp_path, HALF._replace(negatives=str(tmp_path)))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_lists_are_read_in_any_encoding_and_with_spaces_in_names(encoding, tmp_path):
    write(tmp_path, 255 * PERSON, ["a b", "é", "c.001", "d"])
    for split, names in (("train", "a b\né\n"), ("val", "c.001\nd\n")):
        (tmp_path / f"{split}.txt").write_text(names, encoding=encoding)
    train, val = open_both(tmp_path)
    assert {val.file_name(i) for i in range(len(val))} == {"c.001.jpg", "d.jpg"}
    assert "a b.jpg" in {train.file_name(i) for i in range(len(train))}


def test_the_names_of_splits_may_have_another_case(tmp_path):
    for split, names in (("Train", "abc"), ("VAL", "de")):
        write(tmp_path, 255 * PERSON, names, photos=f"photos/{split}")
    assert [*map(len, open_both(tmp_path))] == [3, 2]


def test_classes_in_another_order_are_read_anew(tmp_path):
    (tmp_path / "labels").mkdir()
    for name in "abcdefgh":
        write_photo(tmp_path / "images" / f"{name}.jpg", np.full((48, 64, 3), 90, np.uint8))
        (tmp_path / "labels" / f"{name}.txt").write_text("0 0 0 0.5 0 0.5 1\n1 0.5 0 1 0 1 1\n")
    lefts = []
    for names in ("[person, car]", "[car, person]"):
        (tmp_path / "data.yaml").write_text(f"names: {names}\n")
        datasets = open_both(tmp_path)
        lefts.append({int(np.nonzero(each.alpha(i).any(axis=0))[0][0]) for each in datasets for i in range(len(each))})
    assert lefts[0] == {0}
    assert min(lefts[1]) >= 31
