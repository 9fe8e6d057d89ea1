"""A folder of masks as a person index: against the arrays that the masks were written from, and COCO's own layout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import refusal, write_photo, write_split
from PIL import Image

from datasets import COCOPersonDataset
from loading.layout import DataOptions
from loading.masks import read_mask, same_shape
from loading.run_lengths import draw_mask

TRAIN, VAL = "train2017", "val2017"
HALF, NEARLY_ALL = DataOptions(val_fraction=0.5), DataOptions(val_fraction=0.999)
BLOB = cv2.circle(np.zeros((48, 64), np.uint8), (30, 20), 12, 255, -1)
WHITE = np.full_like(BLOB, 255)


@pytest.fixture
def own(tmp_path) -> Path:
    """Eight photos of 64 x 48 and their masks."""
    for name in "abcdefgh":
        add(tmp_path / "own", name, BLOB)
    return tmp_path / "own"


def add(root: Path, name: str, mask: np.ndarray) -> None:
    write_photo(root / "photos" / f"{name}.jpg", np.full((48, 64, 3), 90, np.uint8))
    save(root / "masks" / f"{name}.png", mask)


def save(path: Path, mask: np.ndarray | Image.Image, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(path, **options)


def both(root: Path, options: DataOptions = HALF, **more: object) -> list[COCOPersonDataset]:
    return [COCOPersonDataset(root, split, 48, options=options, **more) for split in (TRAIN, VAL)]


def alphas(root: Path) -> dict[str, np.ndarray]:
    return {dataset.file_name(i): dataset.alpha(i) for dataset in both(root) for i in range(len(dataset))}


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


def test_folders_of_splits_and_an_annotation_file_come_before_masks(own):
    shutil.copytree(own, own / TRAIN)
    shutil.copytree(own / TRAIN, own / VAL)
    (own / VAL / "photos" / "a.jpg").unlink()
    assert [len(dataset) for dataset in both(own)] == [8, 7]
    write_split(own, TRAIN, 3, first_id=1)
    assert len(COCOPersonDataset(own, TRAIN, 48)) == 3


def test_a_category_is_refused_where_there_are_masks(own):
    masks = f"the masks of {own / 'masks'} have no categories"
    message = refusal(both, own, DataOptions("dog"))
    assert message == f"--category dog was given, and {masks}: leave it out, or give --category person"


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


def drawn(path: Path) -> np.ndarray:
    return draw_mask(read_mask(path, (64, 48)).counts, 48, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mask_is_read(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == "turned" else 1  # shown a quarter turn clockwise
    path = tmp_path / ("a.tif" if kind == "floats" else "a.png")
    save(path, KINDS[kind], exif=exif)
    assert np.array_equal(drawn(path), (KINDS[kind] > 127) * np.uint8(255) if kind == "soft" else BLOB)


@pytest.mark.parametrize("suffix", ["bmp", "gif", "tif", "webp", "jpg", "PNG", "pgm"])
def test_masks_may_have_any_format_that_pillow_reads(own, suffix):
    (own / "masks" / "a.png").unlink()
    save(own / "masks" / f"a.{suffix}", BLOB, **({"lossless": True} if suffix == "webp" else {}))
    assert np.count_nonzero(alphas(own)["a.jpg"] != BLOB) < 3


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.5, 3])
def test_a_mask_of_another_size_is_resized_to_its_photo(tmp_path, factor):
    save(tmp_path / "a.png", cv2.resize(BLOB, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA))
    alpha = drawn(tmp_path / "a.png")
    assert np.count_nonzero(alpha & BLOB) / np.count_nonzero(alpha | BLOB) > 0.85


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
    (own / "masks" / "b.png").unlink()
    (own / "photos" / "c.jpg").unlink()
    add(own, "d", BLOB * 0)
    add(own, "e", BLOB // 3)
    add(own, "f", BLOB[:40])
    (own / "masks" / "g.png").write_bytes(b"\x89PNG and no more")
    (own / "photos" / "h.jpg").write_bytes(b"no photo")
    save(own / "masks" / "a.gif", BLOB)
    add(own, "i", BLOB)
    (own / "photos" / "notes.txt").touch()
    (own / "photos" / ".hidden.jpg").touch()
    dataset = COCOPersonDataset(own, VAL, 48, options=NEARLY_ALL)
    assert [dataset.file_name(i) for i in range(len(dataset))] == ["i.jpg"]
    assert dataset.index.left_out == {
        "masks with the same name as another (a.gif, ...)": 2,
        "photos without a mask (a.jpg, ...)": 2, "mask without a photo (c.png)": 1,
        "photo whose mask has another shape (f.jpg)": 1, "photo whose mask cannot be read (g.jpg)": 1,
        "photo that cannot be read (h.jpg)": 1, "photo with an empty mask (d.jpg)": 1,
        "photo whose mask is dark everywhere but not empty (e.jpg)": 1,
    }  # fmt: skip


def test_where_nothing_fits_the_refusal_says_what_there_is(own):
    for path in (own / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    message = refusal(both, own)
    assert f"of 0 in {own / 'masks'} none can be used in {own / 'photos'} (8 photos without a mask (a.jpg," in message
    assert "8 masks without a photo (a_mask.png, ...)" in message
    (own / "images").mkdir()
    assert "in one folder beside it, photos or images: there are both" in refusal(both, own)
    shutil.rmtree(own / "photos")
    (own / "images").rmdir()
    assert "there is none" in refusal(both, own)


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
