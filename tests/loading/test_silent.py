"""Data that could be trained on with wrong masks, photos or splits without a word: right, or refused in a line."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import refusal, write_annotations, write_photo
from PIL import Image

from datasets import COCOPersonDataset
from loading.layout import DataOptions

SPLITS, NAMES = ("train2017", "val2017"), "abcdefgh"
PHOTO = np.full((48, 64, 3), 90, np.uint8)
PERSON = cv2.ellipse(np.zeros((48, 64), np.uint8), (26, 24), (9, 16), 0, 0, 360, 1, -1)
CAR = cv2.rectangle(np.zeros_like(PERSON), (44, 36), (59, 43), 1, -1)
EDGE = cv2.morphologyEx(PERSON, cv2.MORPH_GRADIENT, np.ones((2, 2)))


def write(root: Path, mask: Image.Image | np.ndarray, names: str | list[str] = NAMES, photos: str = "photos") -> None:
    """Writes the same mask for photos of these names."""
    for name in names:
        write_photo(root / photos / f"{name}.jpg", PHOTO)
        path = root / photos.replace("photos", "masks") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(path)


def open_both(root: Path) -> list[COCOPersonDataset]:
    options = DataOptions(val_fraction=0.5)
    return [COCOPersonDataset(root, split, 48, other_splits=SPLITS, options=options) for split in SPLITS]


def alphas(root: Path) -> dict[str, np.ndarray]:
    return {dataset.file_name(i): dataset.alpha(i) for dataset in open_both(root) for i in range(len(dataset))}


def palette(indices: np.ndarray, *colours: int) -> Image.Image:
    image = Image.fromarray(indices, "P")
    image.putpalette(colours)
    return image


MASKS = {  # why they are refused, and those of the first four photos and of the others
    "palettes differ": (palette(PERSON, 0, 0, 0, 255, 0, 0), palette(1 - PERSON, 255, 0, 0, 0, 0, 0)),
    "more than two values": [np.dstack([255 * PERSON, 0 * CAR, 255 * CAR, 255 * (PERSON | CAR)])] * 2,  # on nothing
    "a third value along the edges": [np.where(EDGE > 0, 128, 255 * PERSON).astype(np.uint8)] * 2,
    "the masks have": (PERSON, cv2.GaussianBlur(255 * PERSON, (3, 3), 0)),
}


@pytest.mark.parametrize("why", MASKS)
def test_masks_that_are_not_plain_are_refused(tmp_path, why):
    for mask, names in zip(MASKS[why], ("abcd", "efgh"), strict=True):
        write(tmp_path, mask, names)
    assert why in refusal(open_both, tmp_path)


def test_splits_that_are_not_plain_are_refused(tmp_path):
    write(tmp_path, 255 * PERSON)
    (tmp_path / "train.txt").write_text("a\nb\n")
    assert "lists the photos of one split" in refusal(open_both, tmp_path)
    write(tmp_path, 255 * PERSON, "xy", photos="photos/val")
    assert "no folder of its own" in refusal(open_both, tmp_path)
    write_photo(tmp_path / "val2017" / "v.jpg", PHOTO)
    write_annotations(tmp_path, "val2017", {"images": [], "annotations": [], "categories": []})
    write(tmp_path, 255 * PERSON, photos="train2017/photos")
    assert "of different kinds" in refusal(open_both, tmp_path)


def test_a_list_of_classes_names_the_colours_of_a_palette_and_counts_only_with_a_background(tmp_path):
    write(tmp_path, palette(PERSON + 2 * CAR, 0, 0, 0, 128, 0, 0, 0, 128, 0))
    (tmp_path / "class_names.txt").write_text("person\ncar\n")
    assert "more than two values" in refusal(open_both, tmp_path)
    (tmp_path / "labelmap.txt").write_text("background:0,0,0::\nperson:128,0,0::\ncar:0,128,0::\n")
    assert all(np.array_equal(alpha, 255 * PERSON) for alpha in alphas(tmp_path).values())


def test_a_photo_with_a_second_mask_is_left_out(tmp_path):
    write(tmp_path, 255 * PERSON)
    Image.fromarray(255 * CAR).save(tmp_path / "masks" / "a_1.png")
    assert {*alphas(tmp_path)} == {f"{name}.jpg" for name in NAMES[1:]}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_lists_are_read_in_any_encoding_and_with_spaces_in_names(encoding, tmp_path):
    write(tmp_path, 255 * PERSON, ["a b", "é", "c.001", "d"])
    for split, names in (("train", "a b\né\n"), ("val", "c.001\nd\n")):
        (tmp_path / f"{split}.txt").write_text(names, encoding=encoding)
    train, val = ({dataset.file_name(i) for i in range(len(dataset))} for dataset in open_both(tmp_path))
    assert ("a b.jpg" in train, val) == (True, {"c.001.jpg", "d.jpg"})


def test_yolos_classes_in_another_order_are_read_anew_and_boxes_and_keypoints_are_no_masks(tmp_path):
    (tmp_path / "labels").mkdir()
    for name in NAMES:
        write_photo(tmp_path / "images" / f"{name}.jpg", PHOTO)
        (tmp_path / "labels" / f"{name}.txt").write_text("0 0 0 0.5 0 0.5 1\n1 0.5 0 1 0 1 1\n")
    for names, left in (("[person, car]", 0), ("[car, person]", 32)):
        (tmp_path / "data.yaml").write_text(f"names: {names}\n")
        lefts = [np.flatnonzero(alpha.any(axis=0))[0] for alpha in alphas(tmp_path).values()]
        assert lefts == pytest.approx([left] * 8, abs=1)
    (tmp_path / "labels" / "a.txt").write_text("1 0.5 0.5 0.4 0.4\n")
    assert {*alphas(tmp_path)} == {f"{name}.jpg" for name in NAMES[1:]}  # a person with a box alone
    (tmp_path / "data.yaml").write_text("names: [person]\nkpt_shape: [17, 2]\n")
    assert "keypoints, which are no masks" in refusal(open_both, tmp_path)
