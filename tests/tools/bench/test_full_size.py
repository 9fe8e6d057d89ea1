"""The made split: COCO's proportions, readable by COCO's own tools, the same every time, and never over other data."""

from __future__ import annotations

import json
from pathlib import Path

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
    command = ["full_size.py", str(root), f"--photos={PHOTOS}", f"--annotations={ANNOTATIONS}"]
    assert full_size.run_command(command) == 0
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
    again = full_size.make_split(tmp_path / "again", "train2017", PHOTOS, ANNOTATIONS)
    assert again.read_bytes() == (made_root / "annotations" / "instances_train2017.json").read_bytes()
    photos = [*(tmp_path / "again" / "train2017").iterdir()]
    assert len(photos) == PHOTOS
    assert max(path.stat().st_nlink for path in photos) == 7
    other = full_size.make_split(tmp_path / "other", "train2017", PHOTOS, ANNOTATIONS, seed=1)
    assert json.loads(other.read_text())["annotations"] != json.loads(again.read_text())["annotations"]


def files_of(folder) -> dict:
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("split", ["train2017", "other"])
def test_a_users_data_stays_as_it_is(coco_root, capsys, split):
    before = files_of(coco_root)
    assert full_size.run_command(["full_size.py", str(coco_root), "--split", split]) == 2
    said = capsys.readouterr()
    assert said.err == f"full_size.py: error: {coco_root} is not empty: name a folder that is, or that does not exist\n"
    assert not said.out
    assert files_of(coco_root) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: root"),
        (["ROOT", "--photos=many"], "argument --photos: invalid int value: 'many'"),
        (["ROOT", "--photo=3"], "unknown argument --photo=3: did you mean --photos?"),
        (["ROOT", "--photos=0"], "--photos and --annotations are at least 1, --seed at least 0"),
        (["ROOT", "--split=../val2017"], "--split '../val2017' is no name of a photo folder"),
        (["FILE"], "FILE cannot be written: Not a directory"),
        (["FILE/inside"], "FILE/inside cannot be written: Not a directory"),
    ],
)
def test_a_mistake_gets_one_line_and_makes_no_folder(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    assert full_size.run_command(["full_size.py", *arguments]) == 2
    assert capsys.readouterr().err == f"full_size.py: error: {said}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]
