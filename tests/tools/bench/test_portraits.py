"""Photos of one kind: the part of each photo that shows its tallest person, and that part's mask."""

from __future__ import annotations

import cv2
import numpy as np

from datasets import COCOPersonDataset
from tools.bench import portraits


def test_the_part_around_a_box_ends_where_the_photo_does():
    assert portraits.around([20, 10, 10, 20], height=100, width=90) == (slice(7, 33), slice(17, 33))
    assert portraits.around([1.5, 2.5, 10, 20], height=20, width=12) == (slice(0, 20), slice(0, 12))


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
    assert "of a person of 20 pixels or more, not 99" in capsys.readouterr().err
    assert portraits.run_command(["portraits.py", str(coco_root), "train2017", "3", str(tmp_path / "made")]) == 2
