"""COCO-format files from other hands: their categories, and the names that they give to photos."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import add_person, edit, refusal
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from datasets import COCOPersonDataset
from loading.index import PersonIndex, index_of, open_index
from loading.layout import Choices, find_layout

TRAIN = "train2017"
FIRST = "000000000001.jpg"
STRAY = "photos of which the last parts of the name fit several files"


def names_of(index: PersonIndex) -> list[str]:
    return [index.file_name(i) for i in range(len(index))]


def with_categories(root: Path, category: str) -> PersonIndex:
    return index_of(find_layout(root, TRAIN, choices=Choices(category)))


# --- categories -------------------------------------------------------------------------------------------


@pytest.fixture
def street(coco_root) -> Path:
    """Its categories are Pedestrian, rider and dog: the first person of each photo is one, the second the other."""

    def rename(content: dict) -> None:
        content["categories"] = [{"id": n, "name": name} for n, name in ((1, "Pedestrian"), (5, "rider"), (18, "dog"))]
        for annotation in content["annotations"][1::3]:
            annotation["category_id"] = 5

    edit(coco_root, rename)
    return coco_root


@pytest.mark.parametrize(
    ("category", "chosen"),
    [("pedestrian,rider", ["Pedestrian", "rider"]), (" RIDER ,", ["rider"]), ("Pedestrian", ["Pedestrian"]),
     ("dog", ["dog"])],
)  # fmt: skip
def test_categories_are_merged_as_pycocotools_merges_them(street, category, chosen):
    coco = COCO(street / "annotations" / f"instances_{TRAIN}.json")
    ids = coco.getCatIds(catNms=chosen)
    index = with_categories(street, category)
    assert len(index) == 10
    for place in range(10):
        drawn = [coco.annToRLE(it) for it in coco.loadAnns(coco.getAnnIds(index.image_id(place), catIds=ids))]
        assert np.array_equal(index.alpha(place) > 0, coco_mask.decode(coco_mask.merge(drawn)))


def test_a_file_without_the_category_is_refused_with_the_names_that_it_has(street):
    message = refusal(open_index, street, TRAIN)
    assert f"{TRAIN}.json has no category named 'person': it has Pedestrian, dog, rider; --category names" in message
    assert "named 'car' or 'bus'" in refusal(with_categories, street, "car,bus")
    assert "--category names no category" in refusal(with_categories, street, " ,")
    edit(street, lambda content: content.update(categories=[{"id": n, "name": f"{n}\n"} for n in range(1000, 1150)]))
    assert "1099 and 50 more; " in refusal(open_index, street, TRAIN)


def test_one_of_several_that_a_file_has_not_is_said(street):
    index = with_categories(street, "rider,car")
    assert (len(index), index.left_out) == (10, {"name in --category that the file has not (car)": 1})


def test_case_counts_where_it_tells_two_categories_apart(coco_root):
    def add_a_scan(content: dict) -> None:
        content["categories"] = [{"id": 1, "name": "Cat"}, {"id": 5, "name": "CAT"}]
        add_person(content, [[1, 1, 9, 1, 9, 9]])
        content["annotations"][-1]["category_id"] = 5

    edit(coco_root, add_a_scan)
    assert [len(with_categories(coco_root, name)) for name in ("CAT", "Cat", "cat", "cAT")] == [1, 10, 10, 10]
    sums = [with_categories(coco_root, name).checksum() for name in ("Cat", "cat", "cAT")]
    assert sums[0] != sums[1] == sums[2]


def test_a_supercategory_that_is_wanted_is_not_background(street):
    def add_kin(content: dict) -> None:
        content["categories"].append({"id": 7, "name": "child", "supercategory": "rider"})
        add_person(content, [[1, 1, 9, 1, 9, 9]])
        content["annotations"][-1]["category_id"] = 7

    edit(street, add_kin)
    assert [len(with_categories(street, name)) for name in ("rider", "pedestrian", "child")] == [9, 10, 1]


def test_each_choice_has_its_own_index_which_is_kept(street, capsys):
    sums = {name: with_categories(street, name).checksum() for name in ("rider", "Pedestrian") * 2}
    assert capsys.readouterr().out.count("Reading") == 2
    assert len({*sums.values()}) == 2
    caches = {COCOPersonDataset(street, TRAIN, 32, cache=True, choices=Choices(name)).cache.path for name in sums}
    assert len([path for path in caches if path.exists()]) == 2


# --- names ------------------------------------------------------------------------------------------------


def rename_photos(root: Path, names: dict[int, str]) -> None:
    def rename(content: dict) -> None:
        for image in content["images"]:
            image["file_name"] = names.get(image["id"], image["file_name"])

    edit(root, rename)


def test_folders_that_are_not_there_are_passed_over(coco_root):
    photos = coco_root / TRAIN
    (photos / "a" / "b").mkdir(parents=True)
    for number in (2, 3):
        (photos / f"{number:012d}.jpg").rename(photos / "a" / f"{number:012d}.jpg")
    names = {1: f"export/images/{FIRST}", 2: "project\\a\\000000000002.jpg", 3: "x/000000000003.jpg"}
    rename_photos(coco_root, names)
    index = open_index(coco_root, TRAIN)
    assert names_of(index)[:4] == [FIRST, "a/000000000002.jpg", "a/000000000003.jpg", "000000000004.jpg"]
    assert index.left_out == {}
    os.utime(photos / "a", ns=(0, 0))
    (photos / "a" / "b" / FIRST).write_bytes((photos / FIRST).read_bytes())
    os.utime(photos / "a" / "b", ns=(10**9, 10**9))
    assert len(open_index(coco_root, TRAIN)) == 9  # it sees what came, and that the name fits two files now


def test_names_that_fit_several_files_are_left_out_unless_a_folder_tells(coco_root):
    photos = coco_root / TRAIN
    for folder in ("day", "night"):
        (photos / folder).mkdir()
        os.link(photos / FIRST, photos / folder / FIRST)
    (photos / FIRST).unlink()
    rename_photos(coco_root, {1: f"x/{FIRST}"})
    index = open_index(coco_root, TRAIN)
    assert index.left_out == {f"{STRAY.replace('photos', 'photo')} (x/{FIRST})": 1}
    rename_photos(coco_root, {1: f"x/night/{FIRST}"})
    assert names_of(open_index(coco_root, TRAIN))[0] == f"night/{FIRST}"


def test_a_photo_that_is_not_in_the_folder_that_it_is_said_to_be_in_is_not_looked_for_elsewhere(coco_root):
    (coco_root / TRAIN / "a").mkdir()
    (coco_root / TRAIN / FIRST).rename(coco_root / TRAIN / "a" / FIRST)
    assert len(open_index(coco_root, TRAIN)) == 9
    rename_photos(coco_root, {2: "a/000000000002.jpg"})
    left_out = open_index(coco_root, TRAIN).left_out
    tried = f"photos not on disk ({FIRST}, tried as {coco_root / TRAIN / FIRST}, ...)"
    assert left_out == {tried: 2}


def test_a_link_out_of_the_folder_is_not_found_by_its_last_part(coco_root, tmp_path):
    photos = coco_root / TRAIN
    for name in ("away", "hidden"):
        (tmp_path / name).mkdir()
    (photos / FIRST).rename(tmp_path / "away" / FIRST)
    (photos / "a").mkdir()
    (photos / "a" / FIRST).symlink_to(tmp_path / "away" / FIRST)
    (photos / "b").symlink_to(tmp_path / "away")
    rename_photos(coco_root, {1: f"x/{FIRST}"})
    assert len(open_index(coco_root, TRAIN)) == 9


def test_where_nothing_is_found_one_example_says_what_was_tried(coco_root):
    rename_photos(coco_root, {number: f"gone/{number}.png" for number in range(1, 12)})
    message = refusal(open_index, coco_root, TRAIN)
    assert f"(10 photos not on disk (gone/1.png, tried as {coco_root / TRAIN}/gone/1.png, ...))" in message
