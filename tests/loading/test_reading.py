"""Photos as Pillow and OpenCV read them, and the orientation that a set was annotated in."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import refusal, write_annotations
from PIL import Image, ImageOps

from datasets import COCOPersonDataset
from loading import headers
from loading.headers import orientation
from loading.reading import read_photo

TRAIN, FIRST = "train2017", "000000000001.jpg"  # width 48, height 64 in `coco_root`
UNDONE = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
          4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
          7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}  # fmt: skip
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
    corners = [(0.1, 0.15), (0.5, 0.15), (0.5, 0.4), (0.7, low), (0.1, low)]
    person = [value for x, y in corners for value in (x * size[0], y * size[1])]
    frame = np.full((*size[::-1], 3), 90, np.uint8)
    cv2.fillPoly(frame, [np.array(person).reshape(-1, 2).astype(np.int32)], (240, 40, 40))
    photo, exif = Image.fromarray(frame), Image.Exif()
    if exif_applied and UNDONE[turn] is not None:
        photo = photo.transpose(UNDONE[turn])
    exif[headers.ORIENTATION] = turn
    path = root / TRAIN / name
    path.parent.mkdir(parents=True, exist_ok=True)
    photo.save(path, quality=95, exif=exif.tobytes())
    if exif_applied:
        assert ImageOps.exif_transpose(Image.open(path)).size == size
    number = len(content["images"]) + 1
    content["images"].append({"id": number, "file_name": name, "width": size[0], "height": size[1]} | record)
    content["annotations"].append({"image_id": number, "category_id": 1, "segmentation": [person]})


def opened(content: dict, root: Path, **options: object) -> COCOPersonDataset:
    write_annotations(root, TRAIN, content)
    return COCOPersonDataset(root, TRAIN, 80, **options)


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


@pytest.mark.parametrize("order", "<>")
def test_a_damaged_orientation_counts_as_none(order):
    def photo(tag: int, kind: int, value: int, directory: int = 8) -> bytes:
        marks = b"II" if order == "<" else b"MM"
        entry = struct.pack(f"{order}HHIHH", tag, kind, 1, value, 0)
        return b"\xff\xd8\xff\xe1\0\x22Exif\0\0" + marks + struct.pack(f"{order}HIH", 42, directory, 1) + entry

    good = photo(0x0112, 3, 6)
    others = [(0x0112, 3, 0), (0x0112, 3, 9), (0x0112, 3, 65535), (0x0112, 2, 6), (0x0111, 3, 6), (0x0112, 3, 6, 2**31)]
    assert orientation(good) == 6
    assert {orientation(photo(*other)) for other in others} == {1}
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


@pytest.mark.parametrize(("turn", "size"), [(3, WIDE), (2, TALL), (6, SQUARE)])
def test_where_no_photo_decides_the_rotated_ones_are_left_out_and_counted(content, tmp_path, turn, size):
    add(content, tmp_path, "upright.jpg", WIDE, 1)
    add(content, tmp_path, "turned.jpg", size, turn)
    dataset = opened(content, tmp_path)
    assert checked_names(dataset) == ["upright.jpg"]
    reason = "photo with an EXIF orientation that the annotations may or may not follow (turned.jpg)"
    assert dataset.index.left_out == {reason: 1}
    content["images"].pop(0)
    assert reason in refusal(opened, content, tmp_path)


def test_where_the_deciding_photos_disagree_the_others_are_left_out(content, tmp_path):
    add(content, tmp_path, "shown.jpg", TALL, 6, True)
    add(content, tmp_path, "stored.jpg", WIDE, 8, False)
    add(content, tmp_path, "half.jpg", WIDE, 3, True)
    add(content, tmp_path, "square.jpg", SQUARE, 6, False)
    dataset = opened(content, tmp_path)
    assert checked_names(dataset) == ["shown.jpg", "stored.jpg"]
    assert [*dataset.index.left_out.values()] == [2]


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


def test_of_a_large_set_a_sample_tells_whether_any_photo_is_rotated(content, tmp_path, monkeypatch):
    opened_files, read = [], headers.read_header
    monkeypatch.setattr(headers, "read_header", lambda path: (opened_files.append(Path(path).name), read(path))[1])
    monkeypatch.setattr(headers, "SAMPLED_FILES", 3)
    for number in range(10):
        add(content, tmp_path, f"{number}.jpg", WIDE, 3 if number == 7 else 1)
    dataset = opened(content, tmp_path)
    assert sorted(opened_files) == ["0.jpg", "4.jpg", "8.jpg"]
    assert (len(dataset), dataset.index.left_out) == (10, {})
    assert "7.jpg" in refusal(dataset.original, 7)  # a rotated photo beside the sample is refused when it is read
    add(content, tmp_path, "10.jpg", SQUARE, 1)
    add(content, tmp_path, "11.jpg", TALL, 6)
    content["images"].insert(0, content["images"].pop())
    content["annotations"].insert(0, content["annotations"].pop())
    assert len(checked_names(opened(content, tmp_path))) == 12
    assert {*opened_files} == {f"{number}.jpg" for number in range(12)}


def jpegs() -> dict[str, bytes]:
    """Returns a photo of 47 x 61 pixels as JPEGs of every kind, whole and damaged."""
    pixels = np.random.default_rng(0).integers(0, 256, (61, 47, 3), np.uint8)
    photo = Image.fromarray(cv2.GaussianBlur(pixels, (5, 5), 0))

    def written(mode: str = "RGB", **options: object) -> bytes:
        photo.convert(mode).save(file := io.BytesIO(), "JPEG", **options)
        return file.getvalue()

    turned = Image.Exif()
    turned[0x0112] = 6
    whole = written()
    return {
        "4:2:0": whole, "4:2:2": written(subsampling=1), "4:4:4": written(subsampling=0),
        "progressive": written(progressive=True), "grey": written("L"), "CMYK": written("CMYK"),
        "turned": written(exif=turned.tobytes()), "restarts": written(restart_marker_blocks=2),
        "more behind": whole + b"abc", "more before": whole.replace(b"\xff\xda", b"\0\0\xff\xda", 1),
        "cut in half": whole[: len(whole) // 2],
    }  # fmt: skip


@pytest.mark.parametrize("kind", jpegs())
def test_a_jpeg_is_read_as_opencv_reads_it(tmp_path, kind):
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(jpegs()[kind])
    expected = cv2.imread(str(photo), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if kind == "cut in half":  # imread takes it for whole
        assert "cannot be read" in refusal(read_photo, photo, (47, 61))
    else:
        assert np.array_equal(read_photo(photo, (47, 61)), expected)


UNUSABLE = {
    "empty": b"", "text": b"a text", "a damaged PNG": cv2.imencode(".png", np.eye(64, 48))[1].tobytes()[:-60],
    "another size": cv2.imencode(".jpg", np.zeros((65, 48), np.uint8))[1].tobytes(),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_photo_is_named_when_it_is_read(coco_root, kind):
    dataset = COCOPersonDataset(coco_root, TRAIN, image_size=32)
    photo = coco_root / TRAIN / FIRST
    photo.write_bytes(UNUSABLE[kind])
    why = "is 48 x 65 pixels, its annotation says 48 x 64" if kind == "another size" else "cannot be read: not an image"
    assert f"the photo {photo} {why}" in refusal(dataset.__getitem__, 0)
    photo.unlink()
    assert f"the photo {photo} cannot be read: No such file" in refusal(dataset.__getitem__, 0)
    photo.mkdir()
    assert f"the photo {photo} cannot be read: Is a directory" in refusal(dataset.__getitem__, 0)
    assert dataset[1].shape == (4, 32, 32)
