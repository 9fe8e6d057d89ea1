"""A folder of masks as a person index: against the arrays that the masks were written from, and COCO's own layout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import edit, refusal, write_photo, write_split
from PIL import Image

from datasets import COCOPersonDataset
from loading.index import PersonIndex
from loading.layout import Choices
from loading.masks import EMPTY, have_one_shape

TRAIN, VAL = "train2017", "val2017"
HALF = Choices(val_share=0.5)
BLOB = cv2.circle(np.zeros((48, 64), np.uint8), (30, 20), 12, 255, -1)
WHITE = np.full_like(BLOB, 255)


@pytest.fixture
def own(tmp_path) -> Path:
    """Photos of 64 x 48 and their masks; the first two are called a and b."""
    for name in "abcdefgh":
        add(tmp_path / "own", name, BLOB)
    return tmp_path / "own"


def add(root: Path, name: str, mask: np.ndarray | Image.Image, suffix: str = ".png", **options: object) -> None:
    write_photo(root / "photos" / f"{name}.jpg", np.full((48, 64, 3), 90, np.uint8))
    save(root / "masks" / f"{name}{suffix}", mask, **options)


def save(path: Path, mask: np.ndarray | Image.Image, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(path, **options)


def parts(root: Path, choices: Choices = HALF, **options: object) -> list[COCOPersonDataset]:
    return [COCOPersonDataset(root, split, 48, choices=choices, **options) for split in (TRAIN, VAL)]


def alphas(root: Path) -> dict[str, np.ndarray]:
    return {it.file_name(i): it.alpha(i) for it in parts(root) for i in range(len(it))}


def left_out(root: Path) -> dict[str, int]:
    """Of both parts, without the examples."""
    counts: dict[str, int] = {}
    for dataset in parts(root):
        for reason, number in dataset.index.left_out.items():
            reason = reason.rpartition(" (")[0].replace("photos", "photo").replace("masks", "mask")
            counts[reason] = counts.get(reason, 0) + number
    return counts


# --- the same as COCO's -----------------------------------------------------------------------------------


def test_coco_written_as_masks_gives_the_same_samples(coco_root, tmp_path):
    whole = COCOPersonDataset(coco_root, TRAIN, 48)
    expected = {}
    for i in range(len(whole)):
        folder = ("", "sub", "sub/deep")[i % 3]
        place = tmp_path / "own" / "images" / folder / whole.file_name(i)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole.path(i), place)
        save((tmp_path / "own" / "masks" / folder / place.name).with_suffix(".png"), whole.alpha(i))
        expected[f"{folder}/{place.name}".lstrip("/")] = whole[i]
    for cache in (False, True):
        datasets = parts(tmp_path / "own", cache=cache)
        found = {it.file_name(i): it[i] for it in datasets for i in range(len(it))}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], sample) for name, sample in expected.items())
        assert min(map(len, datasets)) > 0
    assert len({it.cache.path for it in datasets}) == 2


def test_it_is_one_of_several_roots(coco_root, own):
    train, val = (COCOPersonDataset(f"{coco_root},{own}", it, 48, other_splits=(TRAIN, VAL), choices=HALF)
                  for it in (TRAIN, VAL))  # fmt: skip
    sizes = [*map(len, parts(own))]
    assert (len(train), len(val), sum(sizes)) == (10 + sizes[0], 5 + sizes[1], 8)
    assert train.path(10).parent == own / "photos"
    assert torch.equal(train[10], parts(own)[0][0])
    assert len({train.name(i) for i in range(len(train))}) == len(train)


def test_folders_of_splits_are_taken_as_they_are(own):
    shutil.copytree(own, own / TRAIN)
    shutil.copytree(own / TRAIN, own / VAL)
    (own / VAL / "photos" / "a.jpg").unlink()
    assert [len(it) for it in parts(own)] == [8, 7]
    assert [it.sources[0].layout.part for it in parts(own)] == [None, None]


# --- kinds of masks ---------------------------------------------------------------------------------------


def palette(colours: list[int]) -> Image.Image:
    image = Image.fromarray(BLOB // 255, "P")
    image.putpalette(colours)
    return image


KINDS = {
    "grey": BLOB, "black and white": Image.fromarray(BLOB).convert("1"), "zeros and ones": BLOB // 255,
    "colours": np.dstack([BLOB, BLOB * 0, BLOB * 0]), "16 bits": BLOB.astype(np.uint16) * 257,
    "16 bits, ones": (BLOB // 255).astype(np.uint16), "floats": (BLOB / 255).astype(np.float32),
    "palette": palette([0, 0, 0, 192, 128, 128]), "palette of zeros and ones": palette([0, 0, 0, 1, 1, 1]),
    "cutout": np.dstack([WHITE // 3] * 3 + [BLOB]), "grey cutout": np.dstack([WHITE * 0, BLOB]),
    "opaque": np.dstack([BLOB] * 3 + [WHITE]), "soft": cv2.GaussianBlur(BLOB, (5, 5), 0),
    "twice as large": cv2.resize(BLOB, (128, 96), interpolation=cv2.INTER_NEAREST),
    "turned": Image.fromarray(np.rot90(BLOB)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mask_is_read(own, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    (own / "masks" / "a.png").unlink()
    suffix = ".tif" if kind == "floats" else ".png"
    add(own, "a", KINDS[kind], suffix, **({"exif": exif} if kind == "turned" else {}))
    found = alphas(own)["a.jpg"]
    if kind == "soft":
        assert np.array_equal(found > 0, KINDS[kind] > 127)
    else:
        assert np.array_equal(found, BLOB)
    assert left_out(own) == {}


@pytest.mark.parametrize("suffix", [".bmp", ".gif", ".tif", ".webp", ".jpg", ".PNG", ".pgm"])
def test_masks_may_be_of_any_kind_that_pillow_reads(own, suffix):
    (own / "masks" / "a.png").unlink()
    add(own, "a", BLOB, suffix, **({"lossless": True} if suffix == ".webp" else {}))
    assert np.count_nonzero(alphas(own)["a.jpg"] != BLOB) < 3


def test_a_mask_of_another_size_is_brought_to_the_photos(own):
    for factor in (0.25, 0.5, 1.5, 3):
        size = (round(64 * factor), round(48 * factor))
        add(own, "a", cv2.resize(BLOB, size, interpolation=cv2.INTER_AREA))
        both = alphas(own)["a.jpg"] & BLOB
        assert np.count_nonzero(both) / np.count_nonzero(alphas(own)["a.jpg"] | BLOB) > 0.85, factor


def test_one_shape():
    assert have_one_shape((4000, 3000), (640, 480))
    assert have_one_shape((4032, 3024), (1001, 751))  # 750.75
    assert have_one_shape((1001, 751), (4032, 3024))
    assert have_one_shape((427, 640), (853, 1280))
    assert not have_one_shape((4000, 3000), (480, 640))
    assert not have_one_shape((640, 480), (640, 482))
    assert not have_one_shape((640, 480), (480, 480))


@pytest.mark.parametrize("shown", [True, False])
def test_the_shape_of_a_mask_tells_whether_it_was_drawn_on_the_photo_as_shown(own, shown):
    photo, exif = np.zeros((48, 64, 3), np.uint8), Image.Exif()
    photo[5:12, 40:60] = 255
    exif[0x0112] = 6
    save(own / "photos" / "a.jpg", photo, exif=exif, quality=98)
    save(own / "photos" / "b.png", np.ascontiguousarray(photo[:, :48]), exif=exif)  # a square's own size does not tell
    (own / "photos" / "b.jpg").unlink()
    for name, mask in (("a", photo[..., 0]), ("b", photo[:, :48, 0])):
        save(own / "masks" / f"{name}.png", np.rot90(mask, -1) if shown else mask)
    dataset = COCOPersonDataset(own, VAL, 48, choices=Choices(val_share=0.999))
    assert [dataset.file_name(i) for i in range(2)] == ["a.jpg", "b.png"]
    for i in range(2):
        rgba = dataset.original(i)
        assert np.count_nonzero((rgba[..., 0] > 127) != (rgba[..., 3] > 0)) < 20


# --- what cannot be used ----------------------------------------------------------------------------------


def test_what_has_no_counterpart_or_nobody_on_it_is_counted_and_named(own):
    (own / "masks" / "b.png").unlink()
    (own / "photos" / "c.jpg").unlink()
    add(own, "d", BLOB * 0)
    add(own, "e", BLOB // 3)
    add(own, "f", BLOB[:40])
    (own / "masks" / "g.png").write_bytes(b"\x89PNG and no more")
    (own / "photos" / "h.jpg").write_bytes(b"no photo")
    save(own / "masks" / "a.gif", BLOB)
    add(own, "i", BLOB)
    add(own, "j", BLOB)
    (own / "photos" / "notes.txt").touch()
    (own / "photos" / ".hidden.jpg").touch()
    choices = Choices(val_share=0.999)
    (dataset,) = [COCOPersonDataset(own, VAL, 48, choices=choices)]
    assert [dataset.file_name(i) for i in range(len(dataset))] == ["i.jpg", "j.jpg"]
    empty = EMPTY.replace("{s}", "")
    assert dataset.index.left_out == {
        "masks of a name that another has (a.gif, ...)": 2,
        "photos without a mask (a.jpg, ...)": 2, "mask without a photo (c.png)": 1,
        "photo whose mask has another shape (f.jpg)": 1, "photo whose mask cannot be read (g.jpg)": 1,
        "photo that cannot be read (h.jpg)": 1, f"{empty} (d.jpg)": 1,
        "photo whose mask is dark everywhere and not empty (e.jpg)": 1,
    }  # fmt: skip


def test_where_nothing_fits_the_refusal_says_what_there_is(own):
    for path in (own / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    message = refusal(parts, own)
    assert f"of 0 in {own / 'masks'} none can be used in {own / 'photos'} (" in message
    assert "8 photos without a mask (a.jpg, ...), 8 masks without a photo (a_mask.png, ...)" in message
    (own / "images").mkdir()
    assert "in one folder beside it, photos or images: there are both" in refusal(parts, own)
    shutil.rmtree(own / "photos")
    shutil.rmtree(own / "images")
    assert "there is none" in refusal(parts, own)


def test_nothing_leads_out_of_the_two_folders(own, tmp_path):
    away = tmp_path / "away"
    add(away, "x", BLOB)
    add(own, "x", BLOB)
    for place in ("photos/a.jpg", "masks/b.png", "photos/x.jpg", "masks/x.png"):
        (own / place).unlink()
    (own / "photos" / "a.jpg").symlink_to(away / "photos" / "x.jpg")
    (own / "masks" / "b.png").symlink_to(away / "masks" / "x.png")
    for kind in ("photos", "masks"):
        (own / kind / "linked").symlink_to(away / kind)
    (own / "photos" / "round").symlink_to(own / "photos")
    os.mkfifo(own / "masks" / "x.png")  # to read it would wait for ever
    assert sorted(alphas(own)) == [f"{name}.jpg" for name in "cdefgh"]
    shutil.move(own / "masks", tmp_path / "elsewhere")  # the folder as a whole may lie wherever its owner wants it
    (own / "masks").symlink_to(tmp_path / "elsewhere")
    assert len(alphas(own)) == 6


def test_names_that_are_no_text_are_left_out(own):
    for kind, suffix in (("photos", b".jpg"), ("masks", b".png")):
        source = os.fsencode(own / kind / "a") + suffix
        shutil.copy(source, source.replace(b"/a.", b"/\xff."))
    assert len(alphas(own)) == 8
    assert sum(left_out(own).values()) == 2


# --- kept current -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "length"),
    [(lambda root: add(root, "sub/x", BLOB), 9), (lambda root: (root / "masks" / "a.png").unlink(), 7),
     (lambda root: (root / "photos" / "a.jpg").unlink(), 7), (lambda root: add(root, "a", BLOB * 0), 7)],
    ids=["added", "mask removed", "photo removed", "mask edited"],
)  # fmt: skip
def test_the_index_follows_the_photos_and_the_masks(own, change, length, capsys):
    before = {it.file_name(i): part for part, it in enumerate(parts(own)) for i in range(len(it))}
    for folder in (own / "photos", own / "masks"):
        os.utime(folder, ns=(0, 0))
    assert sum(map(len, parts(own))) == sum(map(len, parts(own))) == 8
    capsys.readouterr()
    change(own)
    after = {it.file_name(i): part for part, it in enumerate(parts(own)) for i in range(len(it))}
    assert len(after) == length
    assert all(before[name] == after[name] for name in before.keys() & after.keys())
    assert capsys.readouterr().out.count(f"Reading {own / 'masks'} (once") == 2
    parts(own)
    assert capsys.readouterr().out == ""


def test_an_index_that_came_with_the_data_is_not_believed(own, tmp_path):
    path = parts(own)[0].index.path
    there = shutil.copytree(own, tmp_path / "there")
    assert PersonIndex(there / ".silueta" / path.name).fingerprint == PersonIndex(path).fingerprint
    assert parts(there)[0].index.fingerprint != PersonIndex(path).fingerprint


def test_an_annotation_file_comes_before_masks(own):
    write_split(own, TRAIN, 3, first_id=1)
    edit(own, lambda content: None)
    assert len(COCOPersonDataset(own, TRAIN, 48)) == 3
    assert f"instances_{VAL}.json is missing" in refusal(COCOPersonDataset, own, VAL)
