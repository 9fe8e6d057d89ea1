"""Photos of one kind: the part of each photo that shows its tallest person, and that part's mask."""

from __future__ import annotations

from unittest.mock import patch

import cv2
import numpy as np
from conftest import write_annotations

from datasets import COCOPersonDataset
from tools.bench import portraits


def test_the_part_around_a_box_ends_where_the_photo_does():
    assert portraits.around([20, 10, 10, 20], height=100, width=90) == (slice(7, 33), slice(17, 33))
    assert portraits.around([1.5, 2.5, 10, 20], height=20, width=12) == (slice(0, 20), slice(0, 12))


def test_the_tallest_person_is_chosen_and_nobody_else(tmp_path):
    boxes = [  # category, crowd, box: of three photos
        (1, 1, 0, [30, 10, 20, 40]), (1, 1, 0, [60, 20, 45, 30]), (1, 1, 1, [5, 0, 20, 90]), (1, 18, 0, [5, 0, 9, 90]),
        (2, 1, 0, [10, 10, 90, 19]), (3, 1, 0, [10, 20, 10, 20]),
    ]  # fmt: skip
    path = write_annotations(tmp_path, "train2017", {
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 120, "height": 100} for n in (1, 2, 3)],
        "annotations": [{"id": n, "image_id": image, "category_id": kind, "iscrowd": crowd, "bbox": box, "area": 1}
                        for n, (image, kind, crowd, box) in enumerate(boxes)],
    })  # fmt: skip
    dataset = type("Photos", (), {"__len__": lambda _: 3, "image_id": lambda _, index: index + 1})()
    with patch.object(portraits, "TALL", 20):
        found = dict(portraits.portraits(dataset, path))
    # A margin of 0.15 times 40 is 6, and of 0.15 times 20 is 3; the wide person of 19 pixels is not tall enough.
    assert found == {0: (slice(4, 56), slice(24, 56)), 2: (slice(17, 43), slice(7, 23))}


def test_the_photos_can_be_trained_on_and_have_the_masks_of_the_whole_ones(coco_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(portraits, "TALL", 20)
    for split in ("train2017", "val2017"):
        path = coco_root / f"annotations/instances_{split}.json"
        path.write_text(path.read_text().replace("[0, 0, 10, 10]", "[12, 8, 30, 25]"))
        assert portraits.run_command(["portraits.py", str(coco_root), split, "3", str(tmp_path / "made" / split)]) == 0
    made, whole = COCOPersonDataset(tmp_path / "made", "train2017", 64), COCOPersonDataset(coco_root, "train2017", 64)
    parts = dict(portraits.portraits(whole, coco_root / "annotations/instances_train2017.json"))
    assert len(made) == 3
    for index, part in [*parts.items()][:3]:
        name = f"{whole.image_id(index):012d}"
        mask = cv2.imread(str(tmp_path / f"made/train2017/masks/{name}.png"), cv2.IMREAD_GRAYSCALE)
        photo = cv2.imread(str(tmp_path / f"made/train2017/photos/{name}.jpg"))[..., ::-1]
        assert (mask == whole.alpha(index)[part]).all()
        assert np.abs(photo.astype(int) - whole.original(index)[part][..., :3]).mean() < 10
    assert portraits.run_command(["portraits.py", str(coco_root), "train2017", "99", str(tmp_path / "more")]) == 2
    assert "of a person of 20 pixels or more: 99 cannot be made" in capsys.readouterr().err
    assert portraits.run_command(["portraits.py", str(coco_root), "train2017", "0", str(tmp_path / "more")]) == 2
    assert portraits.run_command(["portraits.py", str(tmp_path), "train2017", "3", str(tmp_path / "more")]) == 2
    assert portraits.run_command(["portraits.py", str(coco_root), "train2017", "3", str(tmp_path / "made")]) == 2
