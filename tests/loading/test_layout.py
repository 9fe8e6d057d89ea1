"""Where data are found: the folders and annotation files that data sets and tools have, by their names alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import refusal, write_annotations, write_photo, write_split
from PIL import Image

from datasets import COCOPersonDataset
from loading.layout import DataOptions, Layout, Listed, MissingSplitError, find_layout

TRAIN, VAL = "train2017", "val2017"
BLOB = cv2.circle(np.zeros((48, 64), np.uint8), (30, 20), 12, 255, -1)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"images": []}' if name.endswith(".json") else "")


def splits_of(root: Path, options: DataOptions = DataOptions()) -> list[Layout]:  # noqa: B008
    return [find_layout(root, split, options=options) for split in (TRAIN, VAL)]


def folders_of(layout: Layout, root: Path) -> tuple[str, str, str]:
    """Returns the folders of the photos and the masks, and the subset's name or ""."""
    places = (layout.photos, layout.annotations)
    return *(path.relative_to(root).as_posix() for path in places), layout.subset.name if layout.subset else ""


# --- masks ------------------------------------------------------------------------------------------------

FOLDERS = [
    ("photos", "masks"), ("images", "mask"), ("imgs", "labels"), ("image", "alpha"), ("img", "mattes"),
    ("JPEGImages", "SegmentationClass"), ("PNGImages", "PedMasks"), ("Images", "annotations"), ("photos", "gt"),
]  # fmt: skip


@pytest.mark.parametrize(("photos", "masks"), FOLDERS)
def test_photos_and_masks_are_found_by_their_folders_names(tmp_path, photos, masks):
    touch(tmp_path, f"{photos}/a.jpg", f"{masks}/a.png", "notes/a.txt", ".git/a.png", "annotations/notes.txt")
    train, val = splits_of(tmp_path)
    assert folders_of(train, tmp_path) == (photos, masks, "training")
    assert folders_of(val, tmp_path) == (photos, masks, "validation")
    for name in ("train", "val"):  # a split of the user's own, below the folders
        touch(tmp_path, f"{photos}/{name}/sub/a.jpg", f"{masks}/{name}/sub/a.png")
    train, val = splits_of(tmp_path)
    assert folders_of(train, tmp_path) == (f"{photos}/train", f"{masks}/train", "")
    assert folders_of(val, tmp_path) == (f"{photos}/val", f"{masks}/val", "")
    assert train.other_masks == ((val.photos, val.annotations),)


@pytest.mark.parametrize("words", [("train", "val"), ("training", "validation"), ("train", "valid"), (TRAIN, VAL)])
def test_splits_may_be_above_the_folders_and_have_the_names_that_mean_the_same(tmp_path, words):
    for word in words:
        touch(tmp_path, f"{word}/images/a.jpg", f"{word}/masks/a.png", "test/images/a.jpg", "test/masks/a.png")
    train, val = splits_of(tmp_path)
    assert folders_of(train, tmp_path) == (f"{words[0]}/images", f"{words[0]}/masks", "")
    assert folders_of(val, tmp_path) == (f"{words[1]}/images", f"{words[1]}/masks", "")
    assert find_layout(tmp_path, "test").photos == tmp_path / "test" / "images"
    shutil.rmtree(tmp_path / words[1])  # what there is to train on is split here, but not beside another root
    subsets = [folders_of(layout, tmp_path) for layout in splits_of(tmp_path)]
    assert subsets == [(f"{words[0]}/images", f"{words[0]}/masks", name) for name in ("training", "validation")]
    with pytest.raises(MissingSplitError):
        find_layout(tmp_path, VAL, is_only=False)


def test_lists_of_pascal_voc_are_the_splits(tmp_path):
    for name in "abcd":
        touch(tmp_path, f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png", f"SegmentationObject/{name}.png")
    lists = tmp_path / "ImageSets" / "Segmentation"
    touch(lists, "train.txt", "val.txt")
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\nd\n")
    train, val = splits_of(tmp_path)
    assert isinstance(train.subset, Listed)
    assert [[name for name in "abcd" if split.subset.contains(f"{name}.jpg")] for split in (train, val)] == [
        ["a", "b"], ["c", "d"]]  # fmt: skip


def test_several_pairs_are_refused_and_photos_and_masks_name_one(tmp_path):
    touch(tmp_path, *(f"{folder}/a.png" for folder in ("images", "masks", "mattes", "person masks")))
    message = refusal(find_layout, tmp_path, TRAIN)
    images = tmp_path / "images"
    assert f"{images} with {tmp_path / 'masks'}, {images} with {tmp_path / 'mattes'}. --photos" in message
    assert "--photos FOLDER and --masks FOLDER name one" in message
    options = DataOptions(photos=str(images), masks=str(tmp_path / "person masks"))
    assert folders_of(splits_of(tmp_path, options)[1], tmp_path) == ("images", "person masks", "validation")
    touch(tmp_path, *(f"{folder}/{word}/a.png" for folder in ("images", "person masks") for word in ("train", "valid")))
    train, val = splits_of(tmp_path, options)
    assert folders_of(train, tmp_path) == ("images/train", "person masks/train", "")
    assert folders_of(val, tmp_path) == ("images/valid", "person masks/valid", "")
    assert train.other_masks == ((val.photos, val.annotations),)
    none = options._replace(masks=str(tmp_path / "none"))
    assert f"there is no folder {tmp_path / 'none'}: --photos" in refusal(find_layout, tmp_path, TRAIN, (), none)


CLASS_LISTS = {  # their names and texts, and the value of the person
    "_classes.csv": ("Pixel Value, Class\n0, background\n1, car\n2, Person\n", "2"),
    "labelmap.txt": ("# label:color_rgb:parts:actions\ncar:51,221,255::\nperson:250,50,83::\n", "250,50,83"),
    "class_names.txt": ("__ignore__\n_background_\ncar\nperson\n", "2"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASS_LISTS)
@pytest.mark.parametrize("where", ["", "masks"])
def test_a_list_of_classes_beside_the_masks_tells_which_value_is_a_person(tmp_path, name, where):
    touch(tmp_path, "photos/a.jpg", "masks/a.png")
    text, value = CLASS_LISTS[name]
    (tmp_path / where / name).write_text(text)
    train, car = find_layout(tmp_path, TRAIN), find_layout(tmp_path, TRAIN, (), DataOptions(category="car"))
    kind = "list:" + "rgb:" * (name == "labelmap.txt")
    assert train.mask_values == kind + value
    assert car.mask_values == kind + ("51,221,255" if name == "labelmap.txt" else "1")
    assert car.index_name != train.index_name
    assert find_layout(tmp_path, TRAIN, (), DataOptions(mask_values="7")).mask_values == "7"
    assert "dog" in refusal(find_layout, tmp_path, TRAIN, (), DataOptions(category="dog"))
    (tmp_path / where / name).write_text(text.replace("erson", "lant"))  # its masks may be of two values: car's
    message = refusal(find_layout, tmp_path, TRAIN)
    assert all(word in message for word in (str(tmp_path / where / name), "'person'", "car", "--category"))


@pytest.mark.parametrize("value", [1, 2])
def test_masks_of_roboflow_lie_beside_their_photos(tmp_path, value):
    for split in ("train", "valid"):
        for name in ("a", "b"):
            write_photo(tmp_path / split / f"{name}.jpg", np.zeros((48, 64, 3), np.uint8))
            mask = BLOB // 255 * value
            mask[40:, 50:] = 3 - value
            Image.fromarray(mask).save(tmp_path / split / f"{name}_mask.png")
        (tmp_path / split / "_classes.csv").write_text(f"Pixel Value, Class\n{3 - value}, car\n{value}, person\n")
    for split in (TRAIN, VAL):
        dataset = COCOPersonDataset(tmp_path, split, 48)
        assert [dataset.file_name(i) for i in range(len(dataset))] == ["a.jpg", "b.jpg"]
        assert all(np.array_equal(dataset.alpha(i), BLOB) for i in range(2))
        assert dataset.index.left_out == {}


# --- annotation files -------------------------------------------------------------------------------------

PLACES = {  # where a split's annotation file and photos lie
    "annotations/instances_{}.json": ("{}", "images/{}"), "annotations/{}.json": ("images",), "{}.json": ("{}",),
    "annotations/person_keypoints_{}.json": ("{}",), "lvis_v1_{}.json": ("{}",), "instances_{}.json": ("images",),
    "{}/_annotations.coco.json": ("{}", "{}/images"), "{}/labels.json": ("{}/data",), "{}/result.json": ("{}/images",),
    "{}/annotations/instances_{}.json": ("{}",), "labels/{}.json": ("data/{}",), "{}/coco.json": ("{}",),
}  # fmt: skip


@pytest.mark.parametrize(("name", "photos"), [(name, photos) for name in PLACES for photos in PLACES[name]])
@pytest.mark.parametrize("words", [(TRAIN, VAL), ("train", "valid"), ("training", "validation")])
def test_an_annotation_file_is_found_where_tools_write_it(tmp_path, name, photos, words):
    for word in words:
        touch(tmp_path, name.replace("{}", word), f"{photos.replace('{}', word)}/x/a.jpg")
    for layout, word in zip(splits_of(tmp_path), words, strict=True):
        expected = (photos.replace("{}", word), name.replace("{}", word), "")
        assert folders_of(layout, tmp_path) == expected
    (tmp_path / name.replace("{}", words[1])).unlink()
    if words[0] != TRAIN or name != "annotations/instances_{}.json":  # half of a download of COCO is no set
        assert [layout.subset.name for layout in splits_of(tmp_path)] == ["training", "validation"]
        assert len({layout.index_name for layout in splits_of(tmp_path)}) == 2
        with pytest.raises(MissingSplitError):
            find_layout(tmp_path, VAL, is_only=False)
    else:
        assert "no data of the split val2017" in refusal(splits_of, tmp_path)


@pytest.mark.parametrize(
    ("name", "photos"),
    [("annotations/instances_default.json", "images"), ("_annotations.coco.json", "."), ("result.json", "images"),
     ("labels.json", "data"), ("annotations/people.json", "images"), ("people.json", ".")],
)  # fmt: skip
def test_a_single_file_is_split_here(tmp_path, name, photos):
    touch(tmp_path, name, f"{photos}/a.jpg", "annotations/a folder.json/notes.txt")
    subsets = [folders_of(layout, tmp_path) for layout in splits_of(tmp_path)]
    assert subsets == [(photos, name, "training"), (photos, name, "validation")]


def test_several_annotation_files_or_photo_folders_are_named(tmp_path):
    touch(tmp_path, "train/_annotations.coco.json", "train/a.jpg", "annotations/person_keypoints_train.json")
    files = [tmp_path / "annotations/person_keypoints_train.json", tmp_path / "train/_annotations.coco.json"]
    assert find_layout(tmp_path, TRAIN).annotations == files[1]  # keypoints beside the same persons' masks
    touch(tmp_path, "train.json")
    message = refusal(find_layout, tmp_path, TRAIN)
    assert message.startswith(f"there are several annotation files: {files[1]}, {tmp_path / 'train.json'}. --annot")
    other = tmp_path / "other"
    touch(other, "annotations/instances_train.json", "annotations/person_keypoints_train.json", "train/a.jpg")
    assert find_layout(other, TRAIN).annotations.name == "instances_train.json"
    touch(other, "images/train/a.jpg")
    message = refusal(find_layout, other, TRAIN)
    assert f": {other / 'train'}, {other / 'images/train'}. --annotations FILE and --photos FOLDER name one" in message


def test_an_annotation_file_comes_before_masks_and_plain_coco_keeps_its_index(tmp_path):
    touch(tmp_path, "photos/a.jpg", "masks/a.png")
    write_split(tmp_path, TRAIN, 3, first_id=1)
    write_annotations(tmp_path, VAL, {"images": [], "annotations": [], "categories": []})
    assert len(COCOPersonDataset(tmp_path, TRAIN, 48)) == 3
    assert find_layout(tmp_path, TRAIN).index_name == TRAIN


def test_where_nothing_is_found_the_refusal_says_what_there_is(tmp_path):
    touch(tmp_path, "pictures/a.JPG", "pictures/b.jpg", "pictures/c.txt", "notes.md", ".hidden/a.png")
    (tmp_path / "empty").mkdir()
    message = refusal(find_layout, tmp_path, TRAIN)
    assert message.startswith(
        f"no data of the split {TRAIN}: {tmp_path} holds empty/ (empty), notes.md, pictures/ (2 .jpg, 1 .txt). "
    )
    assert all(word in message for word in ("--annotations FILE", "--masks FOLDER", "--data-root", "--sample"))
    assert f"{tmp_path / 'none'} is no folder" in refusal(find_layout, tmp_path / "none", TRAIN)
