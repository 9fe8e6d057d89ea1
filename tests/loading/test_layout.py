"""Data without a split, and where they are looked for: against hashes worked out here and COCO's own layout."""

from __future__ import annotations

import hashlib
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import refusal

from datasets import COCOPersonDataset
from loading.index import index_of
from loading.layout import Choices, Part, find_layout

TRAIN, VAL = "train2017", "val2017"


@pytest.fixture
def export(coco_root) -> Choices:
    """The training photos of `coco_root` as an annotation tool writes them: one file in the folder of the photos."""
    folder = coco_root.parent / "export"
    shutil.copytree(coco_root / TRAIN, folder)
    shutil.copy(coco_root / "annotations" / f"instances_{TRAIN}.json", folder / "_annotations.coco.json")
    return Choices(annotations=str(folder / "_annotations.coco.json"), photos=str(folder), val_share=0.3)


def parts(choices: Choices, **options: object) -> list[COCOPersonDataset]:
    return [COCOPersonDataset("data/coco", split, 48, choices=choices, **options) for split in (TRAIN, VAL)]


def names_of(dataset: COCOPersonDataset) -> list[str]:
    return [dataset.file_name(i) for i in range(len(dataset))]


def position(name: str) -> float:
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12


def test_a_single_file_is_split_by_the_names_of_its_photos(coco_root, export):
    whole = COCOPersonDataset(coco_root, TRAIN, 48)
    train, val = parts(export)
    names = [f"{number:012d}.jpg" for number in range(1, 11)]
    assert names_of(val) == [name for name in names if position(name) < 0.3]
    assert names_of(train) == [name for name in names if position(name) >= 0.3]
    assert 0 < len(val) < len(train)
    found = {dataset.file_name(i): dataset[i] for dataset in (train, val) for i in range(len(dataset))}
    assert all(torch.equal(found[whole.file_name(i)], whole[i]) for i in range(10))


def test_the_index_and_the_cache_of_a_part_are_kept_for_each_choice(export, capsys):
    caches = [it.cache.path for it in parts(export, cache=True)]
    assert [it.cache.path for it in parts(export, cache=True)] == caches  # and the index did not change its own folder
    assert capsys.readouterr().out.count("Reading") == 2
    assert len({path.name for path in caches if path.exists()}) == 2
    lengths = [[*map(len, parts(export._replace(val_share=share)))] for share in (0.3, 0.6, 0.3)]
    assert lengths[0] == lengths[2] != lengths[1]
    assert capsys.readouterr().out.count("Reading") == 2
    other = Path(export.photos).with_name("other")
    shutil.copytree(export.photos, other)
    shutil.rmtree(export.photos)
    assert "there is no file" in refusal(parts, export)
    shutil.copytree(other, export.photos)
    (other / names_of(parts(export)[0])[0]).unlink()
    assert sum(map(len, parts(export._replace(photos=str(other))))) == 9


def test_what_is_left_out_is_counted_in_one_part_alone(export):
    for number in range(1, 6):
        (Path(export.photos) / f"{number:012d}.jpg").unlink()
    counts = [sum(it.index.left_out.values()) for it in parts(export)]
    assert sum(counts) == 5


def test_a_photo_stays_in_its_part_when_others_come_and_on_every_disk():
    names = [f"{folder}/é{n}.jpg" for folder in ("a", "b") for n in range(2000)]
    part, rest = Part(False, 0.1), Part(True, 0.1)
    chosen = {name for name in names if part.has(name)}
    assert chosen == {name for name in names if position(name) < 0.1}
    assert 320 < len(chosen) < 480
    assert all(part.has(name) != rest.has(name) for name in names)
    assert chosen == {name for name in names if part.has(unicodedata.normalize("NFD", name))}
    assert chosen < {name for name in names if Part(False, 0.2).has(name)}


@pytest.mark.parametrize(("share", "split"), [(0.001, VAL), (0.999, TRAIN)])
def test_a_part_without_a_photo_is_refused_with_a_share_that_gives_it_one(export, share, split):
    message = refusal(COCOPersonDataset, "", split, 48, False, False, 0, False, (), export._replace(val_share=share))
    assert f"of 10 photos in {export.photos} none is for {'validation' if split == VAL else 'training'}" in message
    better = float(message.split("; ")[1].split()[0])
    assert len(COCOPersonDataset("", split, 48, choices=export._replace(val_share=better))) == 1


@pytest.mark.parametrize(
    ("split", "splits", "words"),
    [("val", (), f"no split val: what is made of them is {TRAIN} to train on, and {VAL} to validate"),
     ("a", ("a", "a"), "--train-split and --val-split are both a")],
)  # fmt: skip
def test_the_name_of_a_split_tells_which_part_is_meant(export, split, splits, words):
    assert words in refusal(COCOPersonDataset, "", split, 48, False, False, 0, False, splits, export)
    assert len(COCOPersonDataset("", "val", 48, other_splits=("a", "val"), choices=export)) == len(parts(export)[1])


def test_files_that_are_not_there_are_named_with_their_flags(export):
    for choices, place in (
        (export._replace(photos="none"), "folder none"),
        (export._replace(annotations=export.photos), f"file {export.photos}"),
    ):
        message = refusal(parts, choices)
        assert message == f"there is no {place}: --annotations names a file, --photos its photos' folder"


def test_the_index_of_cocos_layout_lies_where_it_lay(coco_root):
    layout = find_layout(coco_root, TRAIN)
    assert index_of(layout).path == coco_root / ".silueta" / f"{TRAIN}.index"
    assert layout.label == f"annotations/instances_{TRAIN}.json"
