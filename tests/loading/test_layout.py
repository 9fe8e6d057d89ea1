"""Where data are found: the folders and annotation files that data sets and tools have, by their names alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import refusal

from loading.layout import DataOptions, MissingSplitError, find_layout

TRAIN, VAL = "train2017", "val2017"
HALVES = ("training", "validation")  # of data without a split


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"images": []}' if name.endswith(".json") else "")


def found(root: Path, options: DataOptions = DataOptions()) -> list[tuple[str, str, str]]:  # noqa: B008
    """Returns for both splits where the photos and the masks or annotations lie, and the subset's name or ""."""
    layouts = [find_layout(root, split, options=options) for split in (TRAIN, VAL)]
    return [(*(path.relative_to(root).as_posix() for path in (layout.photos, layout.annotations)),
             layout.subset.name if layout.subset else "") for layout in layouts]  # fmt: skip


@pytest.mark.parametrize(
    ("photos", "masks", "words"),
    [("photos", "masks", ("train", "val")), ("JPEGImages", "SegmentationClass", ("Train", "VAL")),
     ("Images", "annotations", ("training", "valid"))],
)  # fmt: skip
def test_photos_and_masks_are_found_by_their_folders_names(tmp_path, photos, masks, words):
    touch(tmp_path, f"{photos}/a.jpg", f"{masks}/a.png", "notes/a.txt", ".git/a.png", "annotations/notes.txt")
    assert found(tmp_path) == [(photos, masks, name) for name in HALVES]
    for word in words:  # splits of the user's own, below the folders
        touch(tmp_path, f"{photos}/{word}/sub/a.jpg", f"{masks}/{word}/sub/a.png")
    assert found(tmp_path) == [(f"{photos}/{word}", f"{masks}/{word}", "") for word in words]
    assert find_layout(tmp_path, TRAIN).other_masks == ((tmp_path / photos / words[1], tmp_path / masks / words[1]),)


def test_splits_may_be_above_the_folders_and_one_to_train_on_alone_is_split(tmp_path):
    for word in ("training", "valid", "test"):
        touch(tmp_path, f"{word}/images/a.jpg", f"{word}/masks/a.png")
    assert found(tmp_path) == [(f"{word}/images", f"{word}/masks", "") for word in ("training", "valid")]
    assert find_layout(tmp_path, "test").photos == tmp_path / "test" / "images"
    shutil.rmtree(tmp_path / "valid")
    assert found(tmp_path) == [("training/images", "training/masks", name) for name in HALVES]
    with pytest.raises(MissingSplitError):
        find_layout(tmp_path, VAL, is_only=False)  # of several roots


def test_several_pairs_are_refused_and_photos_and_masks_name_one(tmp_path):
    touch(tmp_path, *(f"{folder}/a.png" for folder in ("images", "masks", "mattes", "person masks")))
    images, advice = tmp_path / "images", "--photos FOLDER and --masks FOLDER name one"
    pairs = f"{images} with {tmp_path / 'masks'}, {images} with {tmp_path / 'mattes'}"
    assert f"{pairs}. {advice}" in refusal(find_layout, tmp_path, TRAIN)
    options = DataOptions(photos=str(images), masks=str(tmp_path / "person masks"))
    assert found(tmp_path, options) == [("images", "person masks", name) for name in HALVES]
    touch(tmp_path, *(f"{folder}/{word}/a.png" for folder in ("images", "person masks") for word in ("train", "valid")))
    assert found(tmp_path, options) == [(f"images/{word}", f"person masks/{word}", "") for word in ("train", "valid")]
    others = ((images / "valid", tmp_path / "person masks" / "valid"),)
    assert find_layout(tmp_path, TRAIN, (), options).other_masks == others
    none = options._replace(masks="none")
    assert "there is no folder none: --photos" in refusal(find_layout, tmp_path, TRAIN, (), none)


@pytest.mark.parametrize("where", ["", "masks"])
def test_a_list_of_classes_beside_the_masks_tells_which_value_is_a_person(tmp_path, where):
    touch(tmp_path, "photos/a.jpg", "masks/a.png")
    path = tmp_path / where / "labelmap.txt"
    path.write_text("# label:color_rgb:parts:actions\ncar:51,221,255::\nperson:250,50,83::\n")
    options = [DataOptions(), DataOptions(category="car"), DataOptions(mask_values="7")]
    layouts = [find_layout(tmp_path, TRAIN, (), each) for each in options]
    assert [layout.mask_values for layout in layouts] == ["list:rgb:250,50,83", "list:rgb:51,221,255", "7"]
    assert len({layout.index_name for layout in layouts}) == 3
    message = refusal(find_layout, tmp_path, TRAIN, (), DataOptions(category="dog"))
    assert all(word in message for word in (str(path), "'dog'", "car, person", "--category"))


PLACES = [  # where a split's annotation file and photos lie
    ("annotations/instances_{}.json", "{}"), ("annotations/instances_{}.json", "images/{}"),
    ("{}/_annotations.coco.json", "{}"), ("{}/result.json", "{}/images"), ("instances_{}.json", "images"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "photos"), PLACES)
@pytest.mark.parametrize("words", [(TRAIN, VAL), ("train", "valid")])
def test_an_annotation_file_is_found_where_tools_write_it(tmp_path, name, photos, words):
    places = [(photos.replace("{}", word), name.replace("{}", word)) for word in words]
    for folder, file in places:
        touch(tmp_path, file, f"{folder}/x/a.jpg")
    assert found(tmp_path) == [(*place, "") for place in places]
    (tmp_path / places[1][1]).unlink()
    with pytest.raises(MissingSplitError):
        find_layout(tmp_path, VAL, is_only=False)
    if words[0] == TRAIN and name == "annotations/instances_{}.json":  # half of a download of COCO is no set
        assert "no data of the split val2017" in refusal(found, tmp_path)
    else:
        assert found(tmp_path) == [(*places[0], half) for half in HALVES]


@pytest.mark.parametrize("name", ["_annotations.coco.json", "annotations/people.json"])
def test_a_single_file_is_split_here(tmp_path, name):
    touch(tmp_path, name, "a.jpg", "annotations/a folder.json/notes.txt")
    assert found(tmp_path) == [(".", name, half) for half in HALVES]


def test_several_annotation_files_or_photo_folders_are_named(tmp_path):
    files = [tmp_path / "annotations/instances_train.json", tmp_path / "train.json"]
    touch(tmp_path, "annotations/person_keypoints_train.json", "annotations/instances_train.json", "train/a.jpg")
    assert find_layout(tmp_path, TRAIN).annotations == files[0]  # keypoints beside the same persons' masks
    touch(tmp_path, "images/train/a.jpg")
    advice = "--annotations FILE and --photos FOLDER name one"
    folders = f"{tmp_path / 'train'}, {tmp_path / 'images/train'}"
    assert f": {folders}. {advice}" in refusal(find_layout, tmp_path, TRAIN)
    touch(tmp_path, "train.json")
    assert f"several annotation files: {files[0]}, {files[1]}. {advice}" in refusal(find_layout, tmp_path, TRAIN)


def test_an_annotation_file_comes_before_masks_and_plain_coco_keeps_its_index(tmp_path):
    touch(tmp_path, "photos/a.jpg", "masks/a.png")
    for split in (TRAIN, VAL):
        touch(tmp_path, f"annotations/instances_{split}.json", f"{split}/a.jpg")
    assert [find_layout(tmp_path, split).index_name for split in (TRAIN, VAL)] == [TRAIN, VAL]


def test_where_nothing_is_found_the_refusal_says_what_there_is(tmp_path, monkeypatch):
    touch(tmp_path, "pictures/a.JPG", "pictures/b.jpg", "pictures/c.txt", "notes.md", ".hidden/a.png")
    (tmp_path / "empty").mkdir()
    message, there = refusal(find_layout, tmp_path, TRAIN), "empty/ (empty), notes.md, pictures/ (2 .jpg, 1 .txt)"
    assert message.startswith(f"no data of the split {TRAIN}: {tmp_path} holds {there}. ")
    assert all(word in message for word in ("--annotations FILE", "--masks FOLDER", "--data-root", "--sample"))
    assert "download" not in message  # 20 GB into somebody's own folder
    assert f"{tmp_path / 'none'} is no folder" in refusal(find_layout, tmp_path / "none", TRAIN)
    touch(tmp_path, f"annotations/instances_{TRAIN}.json")
    assert f": {tmp_path / TRAIN} is missing; " in refusal(find_layout, tmp_path, TRAIN)
    monkeypatch.chdir(tmp_path)
    assert "tools/download_coco.py --root data/coco` fetches" in refusal(find_layout, Path("data/coco"), TRAIN)
