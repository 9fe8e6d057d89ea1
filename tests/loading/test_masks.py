"""A folder of masks as a person index: which mask is which photo's, what is left out, and COCO's own layout."""

from __future__ import annotations

import os
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import refusal, write_photo
from PIL import Image

from datasets import COCOPersonDataset
from loading.layout import DataOptions
from loading.masks import pair_files, same_shape

TRAIN, VAL = "train2017", "val2017"
HALF, NEARLY_ALL = DataOptions(val_fraction=0.5), DataOptions(val_fraction=0.999)
BLOB = cv2.circle(np.zeros((48, 64), np.uint8), (30, 20), 12, 255, -1)
PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


@pytest.fixture
def own(tmp_path) -> Path:
    """Eight photos of 64 x 48 and their masks."""
    for name in "abcdefgh":
        add(tmp_path / "own", name, BLOB)
    return tmp_path / "own"


def add(root: Path, name: str, mask: np.ndarray) -> None:
    write_photo(root / "photos" / f"{name}.jpg", np.full((48, 64, 3), 90, np.uint8))
    save(root / "masks" / f"{name}.png", mask)


def save(path: Path, mask: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path, **options)


def both(root: Path, options: DataOptions = HALF, **more: object) -> list[COCOPersonDataset]:
    return [COCOPersonDataset(root, split, 48, options=options, **more) for split in (TRAIN, VAL)]


def alphas(root: Path, options: DataOptions = HALF) -> dict[str, np.ndarray]:
    return {dataset.file_name(i): dataset.alpha(i) for dataset in both(root, options) for i in range(len(dataset))}


def left_out(root: Path, options: DataOptions = HALF) -> Counter[str]:
    """Returns what both subsets leave out together, without the examples."""
    counts = Counter()
    for dataset in both(root, options):
        reasons = dataset.index.left_out.items()
        counts.update({reason.partition(" (")[0].replace("photos", "photo"): number for reason, number in reasons})
    return counts


def test_coco_written_as_masks_gives_the_same_samples(coco_root, tmp_path):
    whole, expected = COCOPersonDataset(coco_root, TRAIN, 48), {}
    for i in range(len(whole)):
        folder = ("", "sub", "sub/deep")[i % 3]
        photo = tmp_path / "own" / "images" / folder / whole.file_name(i)
        photo.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole.path(i), photo)
        save((tmp_path / "own" / "masks" / folder / photo.name).with_suffix(".png"), whole.alpha(i))
        expected[f"{folder}/{photo.name}".lstrip("/")] = whole[i]
    for cache in (False, True):
        datasets = both(tmp_path / "own", cache=cache)
        samples = {dataset.file_name(i): dataset[i] for dataset in datasets for i in range(len(dataset))}
        assert samples.keys() == expected.keys()
        assert all(torch.equal(samples[name], sample) for name, sample in expected.items())
        assert min(map(len, datasets)) > 0


def test_the_masks_of_both_splits_decide_and_are_followed_together(tmp_path):
    for split in ("train", "val"):
        for name in "abc":
            add(tmp_path / split, name, BLOB // 255)
    train, val = (COCOPersonDataset(tmp_path, split, 48) for split in (TRAIN, VAL))
    assert all(np.array_equal(dataset.alpha(i), BLOB) for dataset in (train, val) for i in range(3))
    cv2.circle(car := BLOB // 255, (50, 40), 6, 2, -1)
    save(tmp_path / "val" / "masks" / "a.png", car)  # of the validation, and what 1 means is no longer plain
    for split in (TRAIN, VAL):
        assert "more than two values that fill areas: 0 (" in refusal(COCOPersonDataset, tmp_path, split, 48)
    chosen = DataOptions(mask_values="1")
    assert np.array_equal(COCOPersonDataset(tmp_path, VAL, 48, options=chosen).alpha(0), BLOB)


CLASSES = cv2.rectangle(BLOB.copy(), (50, 40), (56, 46), 128, -1)
ONE_ODD = [  # trained on, or validated
    ("a", PICTURE, "photo whose mask is a picture"), ("h", PICTURE, "photo whose mask is a picture"),
    ("h", CLASSES, "photo whose mask has areas of other values than most"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "odd", "reason"), ONE_ODD)
def test_one_odd_mask_among_200_is_left_out_and_counted(own, name, odd, reason):
    for number in range(192):
        add(own, f"{number}", BLOB)
    save(own / "masks" / f"{name}.png", odd)
    assert len(alphas(own, DataOptions(val_fraction=0.1))) == 199
    assert left_out(own, DataOptions(val_fraction=0.1)) == {reason: 1}


def test_a_few_odd_masks_of_a_small_set_are_refused(own):
    save(own / "masks" / "a.png", PICTURE)
    message = refusal(both, own)
    assert message.startswith(f"{own / 'masks'}: 1 photo whose mask is a picture (a.jpg), of ")
    assert message.endswith(": --mask-values says which values are persons, as in --mask-values 255")


def test_inverted_masks_are_left_out_and_more_than_half_refused(own):
    for name in "abc":
        add(own, name, 255 - BLOB)
    assert {*alphas(own)} == {f"{name}.jpg" for name in "defgh"}
    assert left_out(own) == {"photo whose mask covers the photo's border, as an inverted one does": 3}
    for name in "defg":
        add(own, name, 255 - BLOB)
    assert refusal(both, own).endswith("--mask-values says which values are persons, as in --mask-values 0")
    add(own, "h", 255 - BLOB)
    assert all(np.array_equal(alpha, BLOB) for alpha in alphas(own, HALF._replace(mask_values="0")).values())


def test_photos_of_nobody_are_used_where_they_are_asked_for(own):
    add(own, "a", BLOB * 0)
    assert left_out(own) == {"photo with an empty mask": 1}
    found = alphas(own, HALF._replace(negatives="data"))
    assert len(found) == 8
    assert not found["a.jpg"].any()


AFFIXES = {  # photos, of which the last has no mask; masks; and what a mask's name has beside its photo's
    "*_mask": (["1.jpg", "sub/12.png", "x.jpg"], ["1_mask.gif", "sub/12_mask.gif"]),
    "*.jpg": (["a.jpg", "b.jpg", "x.jpg"], ["a.jpg.png", "b.jpg.png"]),
    "mask_*": (["a.jpg", "b.jpg", "x.jpg"], ["mask_a.png", "mask_b.png"]),
    "*_seg": (["1_img.jpg", "2_img.jpg", "3_img.jpg"], ["1_seg.png", "2_seg.png"]),
    "gt-*-0": (["photo1.jpg", "photo12.jpg", "photo2.jpg"], ["gt-1-0.png", "gt-12-0.png"]),
    "": (["a.jpg", "a_mask.jpg", "x.jpg"], ["a.png", "a_mask.png"]),
}


@pytest.mark.parametrize("affix", AFFIXES)
def test_masks_have_the_names_of_photos_or_one_beginning_and_ending_beside_them(tmp_path, affix):
    photos, masks = AFFIXES[affix]
    for path in [*(tmp_path / "photos" / name for name in photos), *(tmp_path / "masks" / name for name in masks)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    unused = defaultdict(list)
    pairs = pair_files(tmp_path / "photos", tmp_path / "masks", unused)
    assert pairs == ([*zip(photos[:-1], masks, strict=True)], affix)
    assert {reason: names for reason, names in unused.items() if names} == {"photo{s} without a mask": photos[-1:]}
    if affix:
        (tmp_path / "masks" / "another 7.png").touch()  # then it is not of all masks, and pairs none
        assert pair_files(tmp_path / "photos", tmp_path / "masks", unused) == ([], "")


def test_sizes_of_one_shape():
    for first, second in (((4000, 3000), (640, 480)), ((4032, 3024), (1001, 751)), ((427, 640), (853, 1280))):
        assert {same_shape(first, second), same_shape(second, first)} == {True}  # 750.75 is 751
    assert not any(same_shape((640, 480), other) for other in ((480, 640), (640, 482), (480, 480)))


@pytest.mark.parametrize("exif_applied", [True, False])
def test_the_shape_of_a_mask_tells_whether_it_was_drawn_on_the_photo_as_shown(own, exif_applied):
    photo, exif = np.zeros((48, 64, 3), np.uint8), Image.Exif()
    photo[5:12, 40:60] = 255
    exif[0x0112] = 6
    save(own / "photos" / "a.jpg", photo, exif=exif, quality=98)
    save(own / "photos" / "b.png", np.ascontiguousarray(photo[:, :48]), exif=exif)  # a square's size does not tell
    (own / "photos" / "b.jpg").unlink()
    for name, mask in (("a", photo[..., 0]), ("b", photo[:, :48, 0])):
        save(own / "masks" / f"{name}.png", np.rot90(mask, -1) if exif_applied else mask)
    dataset = COCOPersonDataset(own, VAL, 48, options=NEARLY_ALL)
    assert [dataset.file_name(i) for i in range(2)] == ["a.jpg", "b.png"]
    for i in range(2):
        rgba = dataset.original(i)
        assert np.count_nonzero((rgba[..., 0] > 127) != (rgba[..., 3] > 0)) < 20


def test_unusable_photos_and_masks_are_counted_with_an_example(own):
    for name in "ijkl":
        add(own, name, BLOB)
    (own / "masks" / "b.png").unlink()
    (own / "photos" / "c.jpg").unlink()
    add(own, "d", BLOB * 0)
    add(own, "f", BLOB[:40])
    (own / "masks" / "g.png").write_bytes(b"\x89PNG and no more")
    (own / "photos" / "h.jpg").write_bytes(b"no photo")
    save(own / "masks" / "a.gif", BLOB)
    cut = (own / "masks" / "i.png").read_bytes()[:-40]
    (own / "masks" / "i.png").write_bytes(cut)
    (own / "photos" / "notes.txt").touch()
    (own / "photos" / ".hidden.jpg").touch()
    dataset = COCOPersonDataset(own, VAL, 48, options=NEARLY_ALL)
    assert [dataset.file_name(i) for i in range(len(dataset))] == ["e.jpg", "j.jpg", "k.jpg", "l.jpg"]
    assert dataset.index.left_out == {
        "masks with the same name as another (a.gif, ...)": 2,
        "photos without a mask (a.jpg, ...)": 2, "mask without a photo (c.png)": 1,
        "photo whose mask has another shape (f.jpg)": 1, "photos whose mask cannot be read (g.jpg, ...)": 2,
        "photo that cannot be read (h.jpg)": 1, "photo with an empty mask (d.jpg)": 1,
    }  # fmt: skip


def test_nothing_leads_out_of_the_two_folders_and_names_are_unicode(own, tmp_path):
    add(tmp_path / "away", "x", BLOB)
    for name in ("photos/a.jpg", "masks/b.png", "masks/c.png"):
        (own / name).unlink()
    (own / "photos" / "a.jpg").symlink_to(tmp_path / "away" / "photos" / "x.jpg")
    (own / "masks" / "b.png").symlink_to(tmp_path / "away" / "masks" / "x.png")
    os.mkfifo(own / "masks" / "c.png")  # reading it would never end
    for kind, suffix in (("photos", ".jpg"), ("masks", ".png")):
        (own / kind / "linked").symlink_to(tmp_path / "away" / kind)
        source = os.fsencode(own / kind / f"d{suffix}")
        shutil.copy(source, source.replace(b"/d.", b"/\xff."))
    assert sorted(alphas(own)) == [f"{name}.jpg" for name in "defgh"]
    shutil.move(own / "masks", tmp_path / "elsewhere")  # the folder itself may be a link
    (own / "masks").symlink_to(tmp_path / "elsewhere")
    assert len(alphas(own)) == 5


@pytest.mark.parametrize(
    ("change", "length"),
    [(lambda root: add(root, "sub/x", BLOB), 9), (lambda root: (root / "masks" / "a.png").unlink(), 7),
     (lambda root: (root / "photos" / "a.jpg").unlink(), 7), (lambda root: add(root, "a", BLOB * 0), 7)],
    ids=["added", "mask removed", "photo removed", "mask edited"],
)  # fmt: skip
def test_the_index_follows_the_photos_and_the_masks(own, change, length, capsys):
    os.utime(own / "photos", ns=(0, 0))
    assert len(alphas(own)) == 8
    change(own)
    assert len(alphas(own)) == len(alphas(own)) == length
    assert capsys.readouterr().out.count(f"Reading {own / 'masks'} (once") == 4  # of two subsets, twice
