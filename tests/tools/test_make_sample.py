"""The built-in sample: what it shows, that annotations fit the photos, that no file of a user is touched."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from helpers import mistake
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from tools import make_sample
from tools.make_sample import SPLITS, draw_photo, draw_sample, segmentation
from utils import UserError

TRAIN, VAL = 24, 4


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return draw_sample(tmp_path_factory.mktemp("drawn") / "sample", TRAIN, VAL, seed=3)


@pytest.fixture(scope="module")
def photos() -> list[tuple]:
    """The photos of `root` and the masks of who is visible in each."""
    return [draw_photo(3, 0, number) for number in range(TRAIN)]


def files_in(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_photo_depends_on_seed_split_and_number_alone(root, tmp_path):
    first, again, other = (files_in(draw_sample(tmp_path / str(index), 3, 1, seed))
                           for index, seed in enumerate((3, 3, 4)))  # fmt: skip
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)
    assert {(name, content) for name, content in first.items() if ".jpg" in name} <= {*files_in(root).items()}
    assert not np.array_equal(draw_photo(3, 0, 1)[0], draw_photo(3, 1, 1)[0])


def test_photos_vary_in_shape_and_people_in_number_size_and_place(photos):
    assert {photo.ndim for photo, _ in photos} == {2, 3}  # grey ones
    assert {photo.shape[0] > photo.shape[1] for photo, _ in photos} == {False, True}
    people = [masks for _, masks in photos]
    assert {0, 1, 2, 3} <= {len(masks) for masks in people}
    fractions = [np.any(masks, axis=0).mean() for masks in people if masks]
    assert 0.06 < 2 * min(fractions) < max(fractions)
    assert any(mask[:, 0].any() or mask[:, -1].any() for masks in people for mask in masks)  # cut off by the border


def test_annotations_are_what_was_drawn(root, photos):
    train, val = (COCO(root / "annotations" / f"instances_{split}.json") for split in SPLITS)
    assert (len(train.imgs), len(val.imgs), len(train.imgs | val.imgs)) == (TRAIN, VAL, TRAIN + VAL)
    assert train.loadCats(train.getCatIds()) == [{"id": 1, "name": "person"}]
    assert len(train.anns) == len(train.dataset["annotations"])  # each has an id of its own
    for (image_id, image), (photo, masks) in zip(sorted(train.imgs.items()), photos, strict=True):
        assert cv2.imread(root / SPLITS[0] / image["file_name"]).shape[:2] == (image["height"], image["width"])
        assert photo.shape[:2] == (image["height"], image["width"])
        for record, mask in zip(train.loadAnns(train.getAnnIds(image_id)), masks, strict=True):
            rows, columns = np.nonzero(mask)
            size = np.ptp(columns) + 1, np.ptp(rows) + 1
            assert np.array_equal(train.annToMask(record).astype(bool), mask)
            assert (record["area"], record["bbox"]) == (mask.sum(), [columns.min(), rows.min(), *size])
    assert {type(record["segmentation"]) for record in train.anns.values()} == {list, dict}


def test_outlines_lie_on_edges_of_the_photo(photos):
    """Grey levels change more across the outlines of people than across the same outlines moved away."""
    on, away = [], []
    for photo, masks in ((photo, masks) for photo, masks in photos if masks):
        grey = np.float32(cv2.cvtColor(photo, cv2.COLOR_BGR2GRAY) if photo.ndim == 3 else photo)
        change = np.hypot(*np.gradient(grey))
        outline = cv2.morphologyEx(np.uint8(np.any(masks, axis=0)), cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0
        on.append(change[outline].mean())
        away.append(max(change[np.roll(outline, move, (0, 1))].mean() for move in ((-5, 0), (5, 0), (0, -5), (0, 5))))
    assert np.mean(np.array(on) > away) > 0.9
    assert np.mean(on) > 1.3 * np.mean(away)


ISLANDS = np.zeros((40, 50), bool)
ISLANDS[2:9, 3:8] = ISLANDS[4, 3:20] = ISLANDS[30:, 40:] = ISLANDS[0, 49] = True
RAGGED = np.random.default_rng(0).uniform(size=(40, 50)) < 0.6  # with holes, and islands in holes


@pytest.mark.parametrize("mask", [ISLANDS, RAGGED, ~RAGGED])
def test_a_mask_survives_as_segmentation(mask):
    encoded = coco_mask.frPyObjects(segmentation(mask), *mask.shape)
    decoded = coco_mask.decode(coco_mask.merge(encoded) if isinstance(encoded, list) else encoded)
    assert np.array_equal(decoded, mask)


def test_a_second_call_changes_nothing(tmp_path, monkeypatch):
    root = draw_sample(tmp_path / "sample", 3, 1)
    (root / ".silueta").mkdir()  # the index of its photos
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    assert draw_sample(root, 3, 1) == root
    assert before == {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    with pytest.raises(UserError, match="not this sample"):
        draw_sample(root, 3, 1, seed=1)
    monkeypatch.setattr(make_sample, "VERSION", 0)
    with pytest.raises(UserError, match="not this sample"):
        draw_sample(root, 3, 1)


@pytest.mark.parametrize("name", ["photos/holiday.jpg", "photos/sample.json", "photos"])
def test_what_is_the_users_is_refused_and_untouched(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=r"^[^\n]*photos[^\n]*$"):
        draw_sample(tmp_path / "photos", 2, 1)
    assert files_in(tmp_path) == {name: b"mine"}


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(make_sample, "draw_photo", Mock(side_effect=[draw_photo(0, 0, 0), KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        draw_sample(tmp_path / "sample", 2, 1)
    assert list(tmp_path.iterdir()) == []


def test_the_command_fills_an_empty_folder_and_no_other(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(draw_sample, "__defaults__", (2, 1, 0))
    assert make_sample.run_command(["make_sample.py", "--root", str(tmp_path)]) == 0
    assert len(files_in(tmp_path)) == 2 + 1 + 3
    assert "is not empty" in mistake(capsys, make_sample, "--root", tmp_path / "train2017")
    assert "/proc/sample cannot be" in mistake(capsys, make_sample, "--root", "/proc/sample")
