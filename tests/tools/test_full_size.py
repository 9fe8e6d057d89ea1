"""The made annotation file: COCO's proportions, readable by COCO's own tools, the same every time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools.coco import COCO

from datasets import COCOPersonDataset
from loading.index import open_index
from tools.bench import full_size

PHOTOS, ANNOTATIONS = 600, 4362  # 1 photo in 197 of train2017


@pytest.fixture(scope="module")
def made_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    full_size.main([str(root), "--photos", str(PHOTOS), "--annotations", str(ANNOTATIONS)])
    return root


@pytest.fixture(scope="module")
def coco(made_root) -> COCO:
    return COCO(made_root / "annotations" / "instances_train2017.json")


def test_it_has_the_proportions_of_train2017(made_root, coco):
    persons = coco.loadAnns(coco.getAnnIds(catIds=[1]))
    assert (len(coco.imgs), len(coco.anns)) == (PHOTOS, ANNOTATIONS)
    assert len(persons) == pytest.approx(ANNOTATIONS * 262_465 / 860_001, abs=1)
    assert len(coco.getImgIds(catIds=[1])) == pytest.approx(PHOTOS * 64_115 / 118_287, rel=0.1)
    assert np.mean([a["iscrowd"] for a in persons]) == pytest.approx(0.02, abs=0.01)
    points = [len(p) / 2 for a in persons if not a["iscrowd"] for p in a["segmentation"]]
    assert (np.median(points), np.mean(points)) == (pytest.approx(22, abs=3), pytest.approx(27.6, abs=3))
    size = (made_root / "annotations" / "instances_train2017.json").stat().st_size
    assert size == pytest.approx(470e6 * ANNOTATIONS / 860_001, rel=0.1)


def test_its_masks_are_those_that_pycocotools_draws(made_root, coco):
    dataset = COCOPersonDataset(made_root, "train2017")
    for index in range(0, len(dataset), 10):
        rgba = dataset.original(index)
        masks = [coco.annToMask(a) for a in coco.imgToAnns[dataset.index.image_id(index)] if a["category_id"] == 1]
        assert np.array_equal(rgba[..., 3], np.max(masks, axis=0) * 255)
    assert sum(open_index(made_root, "train2017").left_out.values()) < 5


def test_it_is_the_same_every_time(made_root, tmp_path, monkeypatch):
    monkeypatch.setattr(full_size, "LINKS", 7)
    again = full_size.make_split(tmp_path, "train2017", PHOTOS, ANNOTATIONS)
    assert again.read_bytes() == (made_root / "annotations" / "instances_train2017.json").read_bytes()
    assert len([*(tmp_path / "train2017").iterdir()]) == PHOTOS
    assert max(path.stat().st_nlink for path in (tmp_path / "train2017").iterdir()) == 7
    other = full_size.make_split(tmp_path / "other", "train2017", PHOTOS, ANNOTATIONS, seed=1)
    assert json.loads(other.read_text())["annotations"] != json.loads(again.read_text())["annotations"]
