"""Photos as Pillow and OpenCV read them, and the orientation that a set was annotated in."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import PICTURE, refusal, save_picture, write_annotations
from PIL import Image

from datasets import COCOPersonDataset
from loading import headers
from loading.headers import orientation
from loading.reading import read_photo

TRAIN, FIRST = "train2017", "000000000001.jpg"  # width 48, height 64 in `coco_root`
UNDONE = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_270}  # fmt: skip
WIDE, TALL, SQUARE = (96, 72), (72, 96), (80, 80)


@pytest.fixture
def content() -> dict:
    return {"images": [], "annotations": [], "categories": [{"id": 1, "name": "person"}]}


def add(
    content: dict, root: Path, name: str, size: tuple, turn: int, exif_applied: bool = True,
    low: float = 0.9, **record: object,
) -> None:  # fmt: skip
    """Adds a photo with a person, neither symmetric nor in the middle, that reaches down to `low` of the height.

    It has the size as annotated, and an orientation; `record` overrides what the annotations say of it.
    """
    outline = np.multiply([(0.1, 0.15), (0.5, 0.15), (0.5, 0.4), (0.7, low), (0.1, low)], size)
    pixels = np.full((*size[::-1], 3), 90, np.uint8)
    cv2.fillPoly(pixels, [outline.astype(np.int32)], (240, 40, 40))
    photo, exif = Image.fromarray(pixels), Image.Exif()
    exif[headers.ORIENTATION] = turn
    if exif_applied and turn > 1:
        photo = photo.transpose(UNDONE[turn])
    save_picture(root / TRAIN / name, np.asarray(photo), quality=95, exif=exif.tobytes())
    number, segmentation = len(content["images"]) + 1, [outline.ravel().tolist()]
    content["images"].append({"id": number, "file_name": name, "width": size[0], "height": size[1]} | record)
    content["annotations"].append({"image_id": number, "category_id": 1, "segmentation": segmentation})


def opened(content: dict, root: Path) -> COCOPersonDataset:
    write_annotations(root, TRAIN, content)
    return COCOPersonDataset(root, TRAIN, 80)


def checked_names(dataset: COCOPersonDataset) -> list[str]:
    """Returns the names of the photos, after checking that all masks lie on the persons."""
    for i in range(len(dataset)):
        red, _, blue, alpha = cv2.split(dataset.original(i).astype(np.int32))
        person, mask = (red > 170) & (blue < 110), alpha > 0
        assert (person & mask).sum() > 0.8 * (person | mask).sum(), dataset.file_name(i)
    return [dataset.file_name(i) for i in range(len(dataset))]


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_found_and_applied_as_pillow_applies_it(content, tmp_path, kind, turn):
    add(content, tmp_path, f"a.{kind}", WIDE, turn)
    add(content, tmp_path, f"b.{kind}", TALL, 6)
    assert orientation((tmp_path / TRAIN / f"a.{kind}").read_bytes()) == turn
    assert checked_names(opened(content, tmp_path)) == [f"a.{kind}", f"b.{kind}"]


@pytest.mark.parametrize(("order", "mark"), [("<", b"II"), (">", b"MM")])
def test_a_damaged_orientation_counts_as_none(order, mark):
    def photo(tag: int = 0x0112, kind: int = 3, value: int = 6, directory: int = 8) -> bytes:
        exif = struct.pack(f"{order}HIHHHIHH", 42, directory, 1, tag, kind, 1, value, 0)
        return b"\xff\xd8\xff\xe1\0\x22Exif\0\0" + mark + exif

    good, others = photo(), (photo(value=0), photo(value=9), photo(kind=2), photo(tag=0x0111), photo(directory=2**31))
    assert orientation(good) == 6
    assert {orientation(other) for other in others} == {1}
    behind = good[:2] + b"\xff\xed\xff\xff" + bytes(2**16 - 3) + good[2:]  # a segment that Photoshop writes
    assert orientation(behind) == 6
    assert orientation(good[:2] + b"\xff\xe1\0\2" * 10**7) == 1
    assert {orientation(good[:length]) for length in range(len(good) - 2)} == {1}


@pytest.mark.parametrize("exif_applied", [True, False])
def test_photos_that_a_quarter_turn_resizes_decide_for_the_others(content, tmp_path, capsys, exif_applied):
    names = [f"{turn}_{size[0]}.jpg" for turn in range(1, 9) for size in (WIDE, SQUARE)]
    for name in names:
        add(content, tmp_path, name, WIDE if "96" in name else SQUARE, int(name[0]), exif_applied)
    dataset = opened(content, tmp_path)
    assert checked_names(dataset) == names
    assert (dataset.index.exif_applied, dataset.index.left_out) == (exif_applied, {})
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith("10 photos (")
    assert ("rotated pixels" if exif_applied else "stored pixels") in printed


@pytest.mark.parametrize(
    ("deciding", "doubtful"),
    [([], (WIDE, 3)), ([], (SQUARE, 6)), ([(TALL, 6, True), (WIDE, 8, False)], (WIDE, 3))],
)
def test_where_no_photo_decides_or_two_disagree_the_others_are_left_out(content, tmp_path, deciding, doubtful):
    for number, photo in enumerate([(WIDE, 1), *deciding]):
        add(content, tmp_path, f"{number}.jpg", *photo)
    add(content, tmp_path, "turned.jpg", *doubtful)
    dataset = opened(content, tmp_path)
    assert checked_names(dataset) == [f"{number}.jpg" for number in range(1 + len(deciding))]
    reason = "photo with an EXIF orientation that the annotations may or may not follow (turned.jpg)"
    assert dataset.index.left_out == {reason: 1}


@pytest.mark.parametrize("exif_applied", [True, False])
def test_rotated_photos_whose_outlines_contradict_their_sizes_are_left_out(content, tmp_path, exif_applied):
    """A tool draws on the photo as shown and writes the stored size, or the other way round."""
    wrong = {"width": WIDE[0], "height": WIDE[1]}
    add(content, tmp_path, "whole.jpg", TALL, 6, exif_applied, **wrong)
    add(content, tmp_path, "inside.jpg", TALL, 8, exif_applied, low=0.7, **wrong)  # fits both sizes
    add(content, tmp_path, "half.jpg", WIDE, 3, exif_applied)
    add(content, tmp_path, "upright.jpg", TALL, 1)
    dataset = opened(content, tmp_path)
    assert checked_names(dataset) == ["upright.jpg"]
    assert [*dataset.index.left_out.values()] == [3]


def test_one_careless_outline_of_many_does_not_make_the_sizes_doubtful(content, tmp_path):
    for number in range(12):
        add(content, tmp_path, f"{number}.jpg", WIDE, 6)
    content["annotations"][0]["segmentation"][0][3] = 1.2 * WIDE[1]  # it reaches over a side
    dataset = opened(content, tmp_path)
    assert dataset.index.exif_applied
    assert len(dataset) == 12


@pytest.mark.parametrize(("rotated", "read"), [(7, {0, 4, 8}), (4, {*range(10)})])
def test_of_a_large_set_a_sample_tells_whether_any_photo_is_rotated(content, tmp_path, monkeypatch, rotated, read):
    opened_files, read_header = set(), headers.read_header
    monkeypatch.setattr(headers, "read_header", lambda path: (opened_files.add(path), read_header(path))[1])
    monkeypatch.setattr(headers, "SAMPLED_FILES", 3)
    for number in range(10):
        add(content, tmp_path, f"{number}.jpg", WIDE, 3 if number == rotated else 1)
    dataset = opened(content, tmp_path)
    assert opened_files == {f"{tmp_path / TRAIN / str(number)}.jpg" for number in read}
    if rotated in read:
        assert len(dataset) == 9
    else:  # it is refused when it is read
        assert f"{rotated}.jpg" in refusal(dataset.original, rotated)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_is_read_as_opencv_reads_it(tmp_path, mode):
    path, photo = tmp_path / "photo.jpg", Image.fromarray(PICTURE).convert(mode)
    photo.save(path)
    expected = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    assert np.array_equal(read_photo(path, photo.size), expected)
    path.write_bytes(path.read_bytes().replace(b"\xff\xda", b"\0\0\xff\xda", 1))  # OpenCV passes over the zeros
    assert np.array_equal(read_photo(path, photo.size), expected)


def test_an_unusable_photo_is_named_when_it_is_read(coco_root):
    dataset = COCOPersonDataset(coco_root, TRAIN, image_size=32)
    photo = coco_root / TRAIN / FIRST
    named = f"the photo {photo}"
    photo.write_bytes(cv2.imencode(".jpg", np.eye(65, 48))[1])
    assert refusal(dataset.__getitem__, 0) == f"{named} is 48 x 65 pixels, its annotation says 48 x 64"
    half_jpeg = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (64, 48, 3), np.uint8))[1][:1500]
    for content in (b"", b"a text", half_jpeg, cv2.imencode(".png", np.eye(64, 48))[1][:-60]):
        photo.write_bytes(content)
        assert refusal(dataset.__getitem__, 0) == f"{named} cannot be read: not an image, or damaged"
    photo.unlink()
    assert refusal(dataset.__getitem__, 0) == f"{named} cannot be read: No such file or directory"
    photo.mkdir()
    assert refusal(dataset.__getitem__, 0) == f"{named} cannot be read: Is a directory"
