"""A folder of masks as a person index: which mask is which photo's, and what is left out."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import refusal, save_picture, write_photo
from PIL import Image

from datasets import COCOPersonDataset
from loading.layout import DataOptions
from loading.masks import pair_files, same_shape

TRAIN, VAL = "train2017", "val2017"
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
    save_picture(root / "masks" / f"{name}.png", mask)


def opened(root: Path, **options: str) -> COCOPersonDataset:
    """Opens all photos, as those of the validation."""
    return COCOPersonDataset(root, VAL, 48, options=DataOptions(val_fraction=0.9999, **options))


def names_of(dataset: COCOPersonDataset) -> list[str]:
    return [dataset.file_name(i) for i in range(len(dataset))]


def test_the_masks_of_both_splits_decide_and_are_followed_together(tmp_path):
    for split in ("train", "val"):
        for name in "abc":
            add(tmp_path / split, name, BLOB // 255)
    train, val = (COCOPersonDataset(tmp_path, split, 48) for split in (TRAIN, VAL))
    assert all(np.array_equal(dataset.alpha(i), BLOB) for dataset in (train, val) for i in range(3))
    cv2.circle(car := BLOB // 255, (50, 40), 6, 2, -1)
    save_picture(tmp_path / "val" / "masks" / "a.png", car)  # of the validation, and what 1 means is no longer plain
    for split in (TRAIN, VAL):
        assert "more than two values that fill areas: 0 (" in refusal(COCOPersonDataset, tmp_path, split, 48)
    assert np.array_equal(COCOPersonDataset(tmp_path, VAL, 48, options=DataOptions(mask_values="1")).alpha(0), BLOB)


def test_an_odd_mask_is_left_out_and_counted_among_200_and_refused_among_8(own):
    save_picture(own / "masks" / "a.png", PICTURE[..., 0])
    message = refusal(opened, own)
    assert message.startswith(f"{own / 'masks'}: 1 photo whose mask is a picture (a.jpg), of ")
    assert message.endswith(": --mask-values says which values are persons, as in --mask-values 255")
    for number in range(192):
        add(own, f"{number}", BLOB)
    save_picture(own / "masks" / "a.png", PICTURE)
    save_picture(own / "masks" / "h.png", cv2.rectangle(BLOB.copy(), (50, 40), (56, 46), 128, -1))
    reasons = ("is a picture (a.jpg)", "has areas of other values than most (h.jpg)")
    assert opened(own).index.left_out == {f"photo whose mask {reason}": 1 for reason in reasons}
    assert len(opened(own)) == 198


def test_inverted_masks_are_left_out_and_more_than_half_refused(own):
    for name in "abc":
        add(own, name, 255 - BLOB)
    assert names_of(opened(own)) == [f"{name}.jpg" for name in "defgh"]
    reason = "photos whose mask covers the photo's border, as an inverted one does (a.jpg, ...)"
    assert opened(own).index.left_out == {reason: 3}
    for name in "de":
        add(own, name, 255 - BLOB)
    assert refusal(opened, own).endswith("--mask-values says which values are persons, as in --mask-values 0")
    assert np.array_equal(opened(own, mask_values="0").alpha(0), BLOB)


AFFIXES = {  # photos, of which the last has no mask; masks; and what a mask's name has beside its photo's
    "*_mask": (["1.jpg", "sub/12.png", "x.jpg"], ["1_mask.gif", "sub/12_mask.gif"]),
    "*.jpg": (["a.jpg", "b.jpg", "x.jpg"], ["a.jpg.png", "b.jpg.png"]),
    "mask_*": (["a.jpg", "b.jpg", "x.jpg"], ["mask_a.png", "mask_b.png"]),
    "*_seg": (["1_img.jpg", "2_img.jpg", "3_img.jpg"], ["1_seg.png", "2_seg.png"]),
    "gt-*-0": (["photo1.jpg", "photo12.jpg", "photo2.jpg"], ["gt-1-0.png", "gt-12-0.png"]),
    "": (["a.jpg", "a_mask.jpg", "sub/a.jpg", "x.jpg"], ["a.png", "a_mask.png", "sub/a.png"]),
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
def test_the_shape_of_a_mask_tells_whether_it_was_drawn_on_the_photo_as_shown(tmp_path, exif_applied):
    photo, exif = np.zeros((48, 64, 3), np.uint8), Image.Exif()
    photo[5:12, 30:45] = 255
    exif[0x0112] = 6
    for name, pixels in (("square.png", photo[:, :48]), ("wide.png", photo)):  # the size of a square does not tell
        save_picture(tmp_path / "photos" / name, pixels, exif=exif)
        save_picture(tmp_path / "masks" / name, np.rot90(pixels[..., 0], -1) if exif_applied else pixels[..., 0])
    dataset = opened(tmp_path)
    assert names_of(dataset) == ["square.png", "wide.png"]
    for rgba in map(dataset.original, range(2)):
        assert np.array_equal(rgba[..., 0], rgba[..., 3])


def test_unusable_photos_and_masks_are_counted_with_an_example(own):
    add(own, "i", BLOB)
    (own / "masks" / "b.png").unlink()
    (own / "photos" / "c.jpg").unlink()
    add(own, "d", BLOB * 0)
    add(own, "f", BLOB[:40])
    (own / "masks" / "g.png").write_bytes(b"\x89PNG and no more")
    os.truncate(own / "masks" / "i.png", 100)
    (own / "photos" / "h.jpg").write_bytes(b"no photo")
    save_picture(own / "masks" / "a.gif", BLOB)
    dataset = opened(own)
    assert names_of(dataset) == ["e.jpg"]
    assert dataset.index.left_out == {
        "masks with the same name as another (a.gif, ...)": 2,
        "photos without a mask (a.jpg, ...)": 2, "mask without a photo (c.png)": 1,
        "photo whose mask has another shape (f.jpg)": 1, "photos whose mask cannot be read (g.jpg, ...)": 2,
        "photo that cannot be read (h.jpg)": 1, "photo with an empty mask (d.jpg)": 1,
    }  # fmt: skip


def test_nothing_leads_out_of_the_two_folders_and_names_are_unicode(own, tmp_path):
    for kind, linked, copied in (("photos", "a.jpg", b"d.jpg"), ("masks", "b.png", b"d.png")):
        shutil.move(own / kind / linked, tmp_path / linked)
        (own / kind / linked).symlink_to(tmp_path / linked)
        source = os.fsencode(own / kind) + b"/" + copied
        shutil.copy(source, source.replace(b"/d.", b"/\xff."))
    assert names_of(opened(own)) == [f"{name}.jpg" for name in "cdefgh"]
    shutil.move(own / "masks", tmp_path / "elsewhere")  # the folder itself may be a link
    (own / "masks").symlink_to(tmp_path / "elsewhere")
    assert len(opened(own)) == 6


def test_the_index_follows_the_masks(own, capsys):
    assert len(opened(own)) == len(opened(own)) == 8
    (own / "masks" / "a.png").unlink()
    assert len(opened(own)) == len(opened(own)) == 7
    save_picture(own / "masks" / "b.png", BLOB * 0)
    assert len(opened(own)) == len(opened(own)) == 6
    assert capsys.readouterr().out.count(f"Reading {own / 'masks'} (once") == 3
