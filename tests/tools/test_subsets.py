"""Smaller data sets: which photos are held out does not depend on the others; portraits show the tallest person."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from datasets import COCOPersonDataset
from tools import subsets
from utils import UserError


def test_held_out_photos_and_the_others_are_the_whole_set(coco_root, tmp_path):
    subsets.main(["hold-out", str(coco_root), "train2017", "3", str(tmp_path / "parted")])
    whole = COCOPersonDataset(coco_root, "train2017", 64)
    parts = [COCOPersonDataset(tmp_path / "parted", split, 64) for split in ("val2017", "train2017")]
    assert len(json.loads((tmp_path / "parted/annotations/instances_val2017.json").read_text())["images"]) == 3
    found = {part.file_name(index): part[index] for part in parts for index in range(len(part))}
    assert sum(map(len, parts)) == len(found) == len(whole)
    assert all((found[whole.file_name(index)] == whole[index]).all() for index in range(len(whole)))


def test_copies_are_the_photos_by_turns(coco_root, tmp_path):
    subsets.main(["copies", str(coco_root), "train2017", "25", str(tmp_path / "large")])
    whole, large = (COCOPersonDataset(root, "train2017", 64) for root in (coco_root, tmp_path / "large"))
    originals = [number % 11 for number in range(25) if number % 11 < 10]  # the eleventh photo shows nobody
    assert len(large) == len(originals)
    assert all((large[index] == whole[original]).all() for index, original in enumerate(originals))


def test_a_photo_stays_held_out_when_others_go():
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(50)]
    content = {"images": images, "annotations": []}
    held = [image["id"] for image in subsets.split_by_name(content, 10)["val2017"]["images"]]
    fewer = content | {"images": [image for image in images if image["id"] in held or image["id"] % 2]}
    assert [image["id"] for image in subsets.split_by_name(fewer, 10)["val2017"]["images"]] == held


def test_the_crop_has_a_margin_and_ends_where_the_photo_does():
    assert subsets.crop_around([20, 10, 10, 20], height=100, width=90) == (slice(7, 33), slice(17, 33))
    assert subsets.crop_around([1.5, 2.5, 10, 20], height=20, width=12) == (slice(0, 20), slice(0, 12))


def test_the_tallest_person_is_chosen_and_no_crowd_animal_or_child(monkeypatch):
    monkeypatch.setattr(subsets, "MIN_HEIGHT", 20)
    boxes = [  # image, category, crowd, box
        (1, 1, 0, [30, 10, 20, 40]), (1, 1, 0, [60, 20, 45, 30]), (1, 1, 1, [5, 0, 20, 90]), (1, 18, 0, [5, 0, 9, 90]),
        (2, 1, 0, [10, 10, 90, 19]), (3, 1, 0, [10, 20, 10, 20]),
    ]  # fmt: skip
    annotations = [dict(zip(("image_id", "category_id", "iscrowd", "bbox"), row, strict=True)) for row in boxes]
    categories = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]
    found = subsets.tallest_persons({"annotations": annotations, "categories": categories})
    assert found == {1: [30, 10, 20, 40], 3: [10, 20, 10, 20]}


def test_portraits_can_be_trained_on_and_have_the_masks_of_the_whole_photos(coco_root, tmp_path, monkeypatch):
    monkeypatch.setattr(subsets, "MIN_HEIGHT", 20)
    for split in ("train2017", "val2017"):
        path = coco_root / f"annotations/instances_{split}.json"
        path.write_text(path.read_text().replace("[0, 0, 10, 10]", "[12, 8, 30, 25]"))
        subsets.main(["portraits", str(coco_root), split, "3", str(tmp_path / "made" / split)])
    made, whole = COCOPersonDataset(tmp_path / "made", "train2017", 64), COCOPersonDataset(coco_root, "train2017", 64)
    assert len(made) == 3
    for index in range(3):
        rgba = whole.original(index)[3:38, 7:47]  # a margin of 0.15 times 30, as far as whole pixels go
        name = f"{whole.image_id(index):012d}"
        assert (made.alpha(index) == rgba[..., 3]).all()
        photo = cv2.imread(str(tmp_path / f"made/train2017/photos/{name}.jpg"))[..., ::-1]
        assert np.abs(photo.astype(int) - rgba[..., :3]).mean() < 10


def test_few_photos_are_of_a_category_or_show_another_one_beside_it(coco_root, tmp_path):
    path = coco_root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    kites = sorted(photo["id"] for photo in content["images"])[-4:]
    kite = {"category_id": 77, "iscrowd": 0, "bbox": [0, 0, 9, 9], "segmentation": [[0, 0, 9, 0, 9, 9, 0, 9]]}
    content["categories"].append({"id": 77, "name": "kite"})
    content["annotations"] += [kite | {"id": 900 + image_id, "image_id": image_id} for image_id in kites]
    path.write_text(json.dumps(content))
    whole = COCOPersonDataset(coco_root, "train2017", 64)
    persons = {f"{whole.image_id(i):012d}": whole.alpha(i) for i in range(len(whole)) if whole.image_id(i) in kites}
    few = ["few", str(coco_root), "train2017"]
    subsets.main([*few, str(len(persons)), str(tmp_path / "persons"), "--beside", "kite"])
    subsets.main([*few, "4", str(tmp_path / "kites"), "--category", "kite"])
    with pytest.raises(UserError, match="has no category kiet"):
        subsets.main([*few, "1", str(tmp_path / "none"), "--beside", "kite,kiet"])
    expected = {"persons": persons, "kites": {f"{image_id:012d}": np.full((9, 9), 255) for image_id in kites}}
    for name, masks in expected.items():
        made = {mask.stem: cv2.imread(str(mask), 0) for mask in (tmp_path / name / "masks").iterdir()}
        assert made.keys() == masks.keys() == {photo.stem for photo in (tmp_path / name / "photos").iterdir()}
        assert all(made[stem].sum() == mask.sum() for stem, mask in masks.items())


@pytest.mark.parametrize(("kind", "root", "number", "output", "message"), [
    ("hold-out", ".", "3", "new", "there is no "),
    ("hold-out", "coco", "3", "coco", "exists: choose another folder"),
    ("hold-out", "coco", "11", "new", "11 of 11 photos cannot be held out"),
    ("portraits", "coco", "1", "new", "has 0 photos of a person of 128 pixels or more"),
])  # fmt: skip
def test_a_mistake_gets_one_line_and_makes_nothing(coco_root, tmp_path, kind, root, number, output, message):
    with pytest.raises(UserError, match=message) as caught:
        subsets.main([kind, str(tmp_path / root), "train2017", number, str(tmp_path / output)])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
