"""Where data are looked for: data without a split against hashes worked out here, several roots against each alone."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import add_person, edit, refusal, write_photo, write_split

from datasets import COCOPersonDataset, letterbox, to_sample
from loading.augmentation import Augmenter
from loading.layout import DataOptions, Subset
from loading.sources import data_roots

TRAIN, VAL = "train2017", "val2017"


@pytest.fixture
def export(coco_root) -> DataOptions:
    """The training photos of `coco_root` as an annotation tool writes them: one file in the folder of the photos."""
    folder = coco_root.parent / "export"
    shutil.copytree(coco_root / TRAIN, folder)
    shutil.copy(coco_root / "annotations" / f"instances_{TRAIN}.json", folder / "_annotations.coco.json")
    return DataOptions(annotations=str(folder / "_annotations.coco.json"), photos=str(folder), val_fraction=0.3)


def opened(options: DataOptions, split: str = TRAIN, splits: tuple = (), **more: object) -> COCOPersonDataset:
    return COCOPersonDataset("data/coco", split, 48, other_splits=splits, options=options, **more)


def both(options: DataOptions, **more: object) -> list[COCOPersonDataset]:
    return [opened(options, split, **more) for split in (TRAIN, VAL)]


def names_of(dataset: COCOPersonDataset) -> list[str]:
    return [dataset.file_name(i) for i in range(len(dataset))]


def position(name: str) -> float:
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12


def test_a_single_file_is_split_by_the_names_of_its_photos(coco_root, export):
    whole = COCOPersonDataset(coco_root, TRAIN, 48)
    train, val = both(export)
    names = [f"{number:012d}.jpg" for number in range(1, 11)]
    assert names_of(val) == [name for name in names if position(name) < 0.3]
    assert names_of(train) == [name for name in names if position(name) >= 0.3]
    assert 0 < len(val) < len(train)
    samples = {dataset.file_name(i): dataset[i] for dataset in (train, val) for i in range(len(dataset))}
    assert all(torch.equal(samples[whole.file_name(i)], whole[i]) for i in range(10))


def test_each_subset_and_fraction_has_an_index_and_a_cache_of_its_own(export, capsys):
    caches = [dataset.sources[0].cache.path for dataset in both(export, cache=True)]
    assert [dataset.sources[0].cache.path for dataset in both(export, cache=True)] == caches
    assert capsys.readouterr().out.count("Reading") == 2  # the index does not change the folder that it lies in
    assert len({path.name for path in caches if path.exists()}) == 2
    other = shutil.copytree(export.photos, Path(export.photos).with_name("other"))
    (other / names_of(opened(export))[0]).unlink()
    for changes in ({"val_fraction": 0.6}, {"photos": str(other)}):
        assert [*map(len, both(export._replace(**changes)))] != [*map(len, both(export))]


def test_what_is_left_out_is_counted_in_one_subset_only(export):
    for number in range(1, 6):
        (Path(export.photos) / f"{number:012d}.jpg").unlink()
    assert sum(sum(dataset.index.left_out.values()) for dataset in both(export)) == 5


def test_a_photo_stays_in_its_subset_when_others_come_and_on_every_disk():
    names = [f"{folder}/é{n}.jpg" for folder in ("a", "b") for n in range(2000)]
    val, train = Subset("validation", 0.1), Subset("training", 0.1)
    chosen = {name for name in names if val.contains(name)}
    assert chosen == {name for name in names if position(name) < 0.1}
    assert 320 < len(chosen) < 480
    assert all(val.contains(name) != train.contains(name) for name in names)
    assert chosen == {name for name in names if val.contains(unicodedata.normalize("NFD", name))}
    assert chosen < {name for name in names if Subset("validation", 0.2).contains(name)}


@pytest.mark.parametrize(
    ("fraction", "split", "words"),
    [(0.001, VAL, "is for validation: their names decide, with --val-fraction 0.001; try a larger one"),
     (0.999, TRAIN, "is for training: their names decide, with --val-fraction 0.999; try a smaller one")],
)  # fmt: skip
def test_a_subset_without_a_photo_is_refused(export, fraction, split, words):
    message = refusal(opened, export._replace(val_fraction=fraction), split)
    assert message == f"of 10 photos in {export.photos} none {words}"


@pytest.mark.parametrize(
    ("split", "splits", "words"),
    [("val", (), f"no split val: what is made of them is {TRAIN} to train on, and {VAL} to validate"),
     ("a", ("a", "a"), "--train-split and --val-split are both a")],
)  # fmt: skip
def test_the_name_of_a_split_tells_which_subset_is_meant(export, split, splits, words):
    assert words in refusal(opened, export, split, splits)
    assert len(opened(export, "val", ("a", "val"))) == len(opened(export, VAL))


def test_missing_files_are_named_with_their_flags(export):
    advice = ": --annotations names a file, --photos its photos' folder"
    assert refusal(opened, export._replace(photos="none")) == f"there is no folder none{advice}"
    folder = export._replace(annotations=export.photos)
    assert refusal(opened, folder) == f"there is no file {export.photos}{advice}"


@pytest.fixture
def other(tmp_path) -> Path:
    """Six training photos, under ids and names that `coco_root` has as well; nothing to validate."""
    write_split(tmp_path / "other", TRAIN, 6, first_id=3)
    return tmp_path / "other"


@pytest.mark.parametrize("cache", [False, True])
def test_the_samples_are_those_of_the_roots_in_their_order(coco_root, other, cache):
    edit(other, lambda content: add_person(content, [[0, 0, 47, 0, 47, 47, 0, 47]], 5))
    options = {"image_size": 48, "store_metadata": True}
    both = COCOPersonDataset(f"{other}, {coco_root}", TRAIN, cache=cache, **options)
    alone = [COCOPersonDataset(root, TRAIN, **options) for root in (other, coco_root)]
    received = list(pickle.loads(pickle.dumps(both)))  # as a spawned worker gets it
    assert len(both) == len(received) == 16
    for index, (sample, metadata) in enumerate(received):
        dataset, i = (alone[0], index) if index < 6 else (alone[1], index - 6)
        assert torch.equal(sample, dataset[i][0])
        assert metadata == dataset[i][1]
        for method in ("file_name", "image_id", "path", "largest_person"):
            assert getattr(both, method)(index) == getattr(dataset, method)(i)
        assert (both.original(index)[..., 3] == both.alpha(index)).all()
    assert len({both.name(i) for i in range(16)}) == 16
    assert both.largest_person(2) != both.largest_person(1)


def test_photos_of_two_roots_have_augmentations_of_their_own(coco_root, tmp_path):
    shutil.copytree(coco_root, tmp_path / "twin")
    roots = (coco_root, f"{coco_root},{tmp_path / 'twin'}")
    alone, both = (COCOPersonDataset(root, TRAIN, 48, augment=True, seed=3) for root in roots)
    both.set_epoch(2)
    square, _ = letterbox(alone.original(7), 48)
    for index in (7, 17):
        photo, mask = Augmenter()(square[..., :3].copy(), square[..., 3].copy(), [3, 2, index])
        assert torch.equal(both[index], to_sample(photo, mask))
    assert sum(torch.equal(both[i], both[i + 10]) for i in range(10)) < 5


def test_a_text_names_one_folder_or_several(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my, photos").mkdir()
    texts = {"data/coco": ["data/coco"], "a,b/c": ["a", "b/c"], " a , b c": ["a", "b c"], "my, photos": ["my, photos"],
             " a": [" a"], ",": [","]}  # fmt: skip
    assert {text: [*map(str, data_roots(text))] for text in texts} == texts
    assert data_roots(tmp_path) == [tmp_path]


def test_the_same_root_twice_is_refused(coco_root, other, monkeypatch):
    monkeypatch.chdir(coco_root.parent)
    Path("link").symlink_to("coco")
    for text in ("coco,other,coco", "coco,other/../coco", "link,coco"):
        assert refusal(COCOPersonDataset, text, TRAIN) == f"a data root is named twice in {text}"


def test_a_root_may_lack_a_split_only_if_it_has_another(coco_root, other, tmp_path):
    def folders(split: str, *roots: Path, splits: tuple = (TRAIN, VAL)) -> list[Path]:
        dataset = COCOPersonDataset(",".join(map(str, roots)), split, 48, other_splits=splits)
        return [source.photos for source in dataset.sources]

    assert folders(VAL, other, coco_root) == [coco_root / VAL]
    assert folders(TRAIN, other, coco_root) == [other / TRAIN, coco_root / TRAIN]
    lacking = f"no data of the split {VAL}: {other} holds annotations/"
    shutil.copytree(other, tmp_path / "third")
    assert lacking in refusal(folders, VAL, other)
    assert refusal(folders, VAL, other, tmp_path / "third").endswith(f"{tmp_path / 'third'} has the split {VAL}")
    assert lacking in refusal(lambda: folders(VAL, coco_root, other, splits=()))
    (tmp_path / "none").mkdir()
    assert str(tmp_path / "none") in refusal(folders, VAL, coco_root, tmp_path / "none")
    (other / "images").mkdir()
    (other / TRAIN).rename(other / "images" / TRAIN)
    assert folders(VAL, coco_root, other) == [coco_root / VAL]  # none of what is trained on is validated
    assert lacking in refusal(folders, VAL, other)


@pytest.fixture
def nobody(tmp_path) -> list[str]:
    """Two folders of photos without persons, of three and of two."""
    for folder, names in (("streets", ("a.jpg", "sub/b.png", "c.webp")), ("rooms", ("a.jpg", "d.jpg"))):
        for name in names:
            write_photo(tmp_path / folder / name, np.full((30, 40, 3), 90, np.uint8))
    (tmp_path / "rooms" / "notes.txt").touch()
    (tmp_path / "rooms" / "broken.jpg").write_bytes(b"no photo")
    return [str(tmp_path / "streets"), str(tmp_path / "rooms")]


@pytest.mark.parametrize("cache", [False, True])
def test_photos_without_persons_are_samples_of_an_empty_alpha_where_they_are_asked_for(coco_root, nobody, cache):
    counts = {"": 10, "data": 11, nobody[0]: 13, ",".join(nobody): 15, f"data, {nobody[1]}": 13}
    for text, number in counts.items():
        dataset = COCOPersonDataset(coco_root, TRAIN, 48, cache=cache, options=DataOptions(negatives=text))
        empty = [i for i in range(len(dataset)) if not dataset.alpha(i).any()]
        assert (len(dataset), len(empty)) == (number, number - 10)
        for i in empty:
            square = letterbox(cv2.imread(str(dataset.path(i)), cv2.IMREAD_COLOR_RGB), 48)[0]
            assert torch.equal(dataset[i], to_sample(square, np.zeros((48, 48), np.uint8)))
            assert dataset.largest_person(i) == 0
        assert len({dataset.name(i) for i in range(number)}) == number
        left_out = sum(sum(source.index.left_out.values()) for source in dataset.sources)
        assert left_out == (nobody[1] in text)  # the broken one
    assert len(COCOPersonDataset(coco_root, TRAIN, 48)) == 10  # the indices are kept apart


def test_a_folder_of_negatives_that_is_missing_or_has_no_photo_is_refused(coco_root, tmp_path):
    def negatives(folder: Path) -> str:
        options = DataOptions(negatives=str(folder))
        return refusal(lambda: COCOPersonDataset(coco_root, TRAIN, options=options))

    missing = tmp_path / "none"
    assert negatives(missing) == f"there is no folder {missing}: --negatives names one of photos without persons"
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in negatives(tmp_path / "empty")
