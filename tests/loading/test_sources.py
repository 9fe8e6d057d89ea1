"""Several roots as one set: against the data sets of each root alone."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import add_person, edit, refusal, write_split

from datasets import COCOPersonDataset, letterbox, to_sample
from loading.augmentation import Augmenter
from loading.sources import data_roots

TRAIN, VAL = "train2017", "val2017"


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
    expected = [sample for dataset in alone for sample in dataset]
    found = list(pickle.loads(pickle.dumps(both)))  # as a spawned worker gets it
    assert (len(both), len(found)) == (16, 16)
    for (sample, metadata), (same, told) in zip(found, expected, strict=True):
        assert torch.equal(sample, same)
        assert metadata == told
    names = [f"{n:012d}.jpg" for n in (*range(3, 9), *range(1, 11))]
    assert [both.file_name(i) for i in range(16)] == names
    assert [both.image_id(i) for i in range(16)] == [int(name[:12]) for name in names]
    assert [both.path(i) for i in (5, 6)] == [other / TRAIN / names[5], coco_root / TRAIN / names[6]]
    largest = [part.largest_person(i) for part in alone for i in range(len(part))]
    assert [both.largest_person(i) for i in range(16)] == largest
    assert len(set(largest)) == 2
    assert (both.original(7)[..., 3] == both.alpha(7)).all()
    assert len({both.name(i) for i in range(16)}) == 16
    assert [bool([*root.glob(".silueta/*.photos")]) for root in (other, coco_root)] == [cache, cache]


def test_photos_of_two_roots_have_augmentations_of_their_own(coco_root, tmp_path):
    shutil.copytree(coco_root, tmp_path / "twin")
    alone = COCOPersonDataset(coco_root, TRAIN, 48, augment=True, seed=3)
    both = COCOPersonDataset(f"{coco_root},{tmp_path / 'twin'}", TRAIN, 48, augment=True, seed=3)
    for dataset in (alone, both):
        dataset.set_epoch(2)
    augment, samples = Augmenter(), list(both)
    assert all(map(torch.equal, alone, samples[:10]))
    assert sum(map(torch.equal, samples[:10], samples[10:])) < 5
    for index in range(10, 20):
        square, _ = letterbox(alone.original(index - 10), 48)
        photo, mask = augment(square[..., :3].copy(), square[..., 3].copy(), [3, 2, index])
        assert torch.equal(samples[index], to_sample(photo, mask))


def test_a_text_names_one_folder_or_several(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my, photos").mkdir()
    texts = {"data/coco": ["data/coco"], "a,b/c": ["a", "b/c"], " a , b c,": ["a", "b c"], "my, photos": ["my, photos"],
             " a": [" a"], ",": [","]}  # fmt: skip
    assert {text: [*map(str, data_roots(text))] for text in texts} == texts
    assert data_roots(tmp_path) == [tmp_path]


@pytest.mark.parametrize("second", ["coco", "./coco", "other/../coco", "link"])
def test_the_same_root_twice_is_refused(second, coco_root, other, monkeypatch):
    monkeypatch.chdir(coco_root.parent)
    Path("link").symlink_to("coco")
    assert f"{second} is named twice" in refusal(COCOPersonDataset, f"coco,other,{second}", TRAIN)


def test_a_root_may_lack_a_split_only_if_it_has_another(coco_root, other, tmp_path):
    def opened(split: str, *roots: Path, others: tuple = (TRAIN, VAL)) -> list[Path]:
        dataset = COCOPersonDataset(",".join(map(str, roots)), split, 48, other_splits=others)
        return [source.photos for source in dataset.sources]

    assert opened(VAL, other, coco_root) == [coco_root / VAL]
    assert opened(TRAIN, other, coco_root) == [other / TRAIN, coco_root / TRAIN]
    lacking = other / "annotations" / f"instances_{VAL}.json"
    assert f"no COCO data: {lacking} is missing. Expected are" in refusal(opened, VAL, other)
    shutil.copytree(other, tmp_path / "third")
    assert f"no COCO data: {lacking} is missing. Expected are" in refusal(opened, VAL, other, tmp_path / "third")
    assert str(lacking) in refusal(lambda: opened(VAL, coco_root, other, others=()))
    none = tmp_path / "none"
    write_split(none, "test2017", 1, first_id=1)
    for split in (TRAIN, VAL):
        message = refusal(opened, split, coco_root, none)
        assert message == refusal(opened, split, none)
        assert message.startswith(f"no COCO data: {none / 'annotations' / f'instances_{split}.json'} is missing")
    (other / VAL).mkdir()  # photos without annotations are no lack that is passed over
    assert str(lacking) in refusal(opened, VAL, coco_root, other)
