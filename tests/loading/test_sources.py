"""Where data are looked for: data without a split against hashes worked out here, several roots against each alone."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import unicodedata
from pathlib import Path

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


def opened(options: DataOptions, split: str = TRAIN, splits: tuple = (), root: str = "", **more) -> COCOPersonDataset:
    return COCOPersonDataset(root, split, 48, other_splits=splits, options=options, **more)


def both(options: DataOptions, **more: object) -> list[COCOPersonDataset]:
    return [opened(options, split, **more) for split in (TRAIN, VAL)]


def test_a_single_file_is_split_and_its_photos_have_the_samples_of_the_whole(coco_root, export):
    whole, (train, val) = COCOPersonDataset(coco_root, TRAIN, 48), both(export)
    samples = {dataset.file_name(i): dataset[i] for dataset in (train, val) for i in range(len(dataset))}
    assert all(torch.equal(samples[whole.file_name(i)], whole[i]) for i in range(10))
    assert (len(train), len(val)) == (6, 4)
    assert len(opened(export, "val", ("a", "val"))) == 4


def test_each_subset_and_fraction_has_an_index_and_a_cache_of_its_own(export, capsys):
    caches = [dataset.sources[0].cache.path for dataset in both(export, cache=True)]
    assert [dataset.sources[0].cache.path for dataset in both(export, cache=True)] == caches
    assert capsys.readouterr().out.count("Reading") == 2  # the index does not change the folder that it lies in
    assert len({path.name for path in caches if path.exists()}) == 2
    other = shutil.copytree(export.photos, Path(export.photos).with_name("other"))
    (other / opened(export).file_name(0)).unlink()
    for changes in ({"val_fraction": 0.6}, {"photos": str(other)}):
        changed = both(export._replace(**changes))
        assert [*map(len, changed)] != [*map(len, both(export))]
    assert sum(sum(dataset.index.left_out.values()) for dataset in changed) == 1  # in one of the subsets


def test_a_photo_stays_in_its_subset_when_others_come_and_on_every_disk():
    names = [f"{folder}/é{n}.jpg" for folder in ("a", "b") for n in range(2000)]
    val, train = Subset("validation", 0.1), Subset("training", 0.1)
    chosen = {name for name in names if int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) < 0.1 * 16**12}
    assert chosen == {name for name in names if val.contains(name)}
    assert all(val.contains(name) != train.contains(name) for name in names)
    assert chosen == {name for name in names if val.contains(unicodedata.normalize("NFD", name))}
    assert chosen < {name for name in names if Subset("validation", 0.2).contains(name)}


@pytest.mark.parametrize(
    ("changes", "split", "splits", "words"),
    [({"val_fraction": 0.001}, VAL, (), "is for validation: their names decide, with --val-fraction 0.001; try a larg"),
     ({"val_fraction": 0.999}, TRAIN, (), "is for training: their names decide, with --val-fraction 0.999; try a sma"),
     ({}, "val", (), f"no split val: what is made of them is {TRAIN} to train on, and {VAL} to validate"),
     ({}, "a", ("a", "a"), "--train-split and --val-split are both a"),
     ({"photos": "none"}, TRAIN, (), "there is no folder none: --annotations names a file, --photos its photos'"),
     ({"annotations": "/"}, TRAIN, (), "there is no file /: --annotations names a file, --photos its photos'")],
)  # fmt: skip
def test_what_a_single_file_does_not_have_is_refused(export, changes, split, splits, words):
    assert words in refusal(opened, export._replace(**changes), split, splits)


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
    assert both.largest_person(1) != both.largest_person(2)


def test_photos_of_two_roots_have_augmentations_of_their_own(coco_root, tmp_path):
    twin = shutil.copytree(coco_root, tmp_path / "twin")
    both = COCOPersonDataset(f"{coco_root},{twin}", TRAIN, 48, augment=True, seed=3)
    both.set_epoch(2)
    square, _ = letterbox(both.original(7), 48)  # of the same photo in the first root
    photo, mask = Augmenter()(square[..., :3].copy(), square[..., 3].copy(), [3, 2, 17])
    assert torch.equal(both[17], to_sample(photo, mask))


def test_a_text_names_one_folder_or_several_and_none_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my, photos").mkdir()
    Path("link").symlink_to("a")
    texts = {" a , b c/d": ["a", "b c/d"], "my, photos": ["my, photos"], " a": [" a"], ",": [","]}
    assert {text: [*map(str, data_roots(text))] for text in texts} == texts
    assert data_roots(tmp_path) == [tmp_path]
    for text in ("a,b,a", "a,b/../a", "link,a"):
        assert refusal(data_roots, text) == f"a data root is named twice in {text}"


def test_a_root_may_lack_a_split_only_if_it_has_another(coco_root, other, tmp_path):
    def folders(split: str, *roots: Path, splits: tuple = (TRAIN, VAL)) -> list[Path]:
        dataset = COCOPersonDataset(",".join(map(str, roots)), split, 48, other_splits=splits)
        return [source.photos for source in dataset.sources]

    third, none = shutil.copytree(other, tmp_path / "third"), tmp_path / "none"
    assert folders(VAL, other, coco_root) == [coco_root / VAL]
    assert folders(TRAIN, other, coco_root) == [other / TRAIN, coco_root / TRAIN]
    assert refusal(folders, VAL, other, third).endswith(f"{third} has the split {VAL}")
    lacking = f"no data of the split {VAL}: {other} holds annotations/"
    assert lacking in refusal(folders, VAL, other)
    assert lacking in refusal(lambda: folders(VAL, coco_root, other, splits=()))
    assert str(none) in refusal(folders, VAL, coco_root, none)
    (other / "annotations" / f"instances_{TRAIN}.json").rename(other / "train.json")  # of which alone a split is made
    assert folders(VAL, coco_root, other) == [coco_root / VAL]


@pytest.mark.parametrize("cache", [False, True])
def test_photos_without_persons_are_samples_of_an_empty_alpha(coco_root, tmp_path, cache):
    streets, rooms = tmp_path / "streets", tmp_path / "rooms"
    for path in (streets / "a.jpg", streets / "sub/b.png", rooms / "a.jpg"):
        write_photo(path, np.full((30, 40, 3), 90, np.uint8))
    (rooms / "broken.jpg").write_bytes(b"no photo")
    options = DataOptions(negatives=f"data, {streets},{rooms}")
    dataset = COCOPersonDataset(coco_root, TRAIN, 48, cache=cache, options=options)
    empty = [i for i in range(len(dataset)) if not dataset.alpha(i).any()]
    assert (len(dataset), len(empty)) == (14, 4)  # one of the data themselves
    for i in empty:
        assert np.array_equal(dataset[i].permute(1, 2, 0), letterbox(dataset.original(i), 48)[0])
        assert dataset.largest_person(i) == 0
    assert len({dataset.name(i) for i in range(14)}) == 14
    assert [sum(source.index.left_out.values()) for source in dataset.sources] == [0, 0, 1]


def test_negatives_that_are_missing_empty_or_the_data_themselves_are_refused(coco_root, tmp_path):
    (tmp_path / "empty").mkdir()
    words = {"none": "none: --negatives names one of photos without persons", "empty": str(tmp_path / "empty"),
             "coco": "holds the photos with persons"}  # fmt: skip
    for name, said in words.items():
        assert said in refusal(opened, DataOptions(negatives=str(tmp_path / name)), TRAIN, (), str(coco_root))
