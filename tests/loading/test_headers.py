"""Which way up: what EXIF says, and what a set's annotations were drawn on, against persons painted in the photos."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import refusal, write_annotations
from PIL import Image, ImageOps

from datasets import COCOPersonDataset
from loading import headers
from loading.headers import orientation

TRAIN = "train2017"
UNDONE = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
          4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
          7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}  # fmt: skip
WIDE, TALL, SQUARE = (96, 72), (72, 96), (80, 80)


def outline(width: int, height: int, low: float = 0.9) -> list[float]:
    """Neither symmetric nor in the middle."""
    corners = [(0.1, 0.15), (0.5, 0.15), (0.5, 0.4), (0.7, low), (0.1, low)]
    return [value for x, y in corners for value in (x * width, y * height)]


def add(content: dict, root: Path, name: str, size: tuple, turn: int, is_shown: bool = True, **record: object) -> None:
    """A photo of that size as it is annotated, shown or stored; `record` overrides what is written of it."""
    low, number = record.pop("low", 0.9), len(content["images"]) + 1
    frame = np.full((*size[::-1], 3), 90, np.uint8)
    person = outline(*size, low)
    cv2.fillPoly(frame, [np.array(person).reshape(-1, 2).astype(np.int32)], (240, 40, 40))
    photo, exif = Image.fromarray(frame), Image.Exif()
    if is_shown and UNDONE[turn] is not None:
        photo = photo.transpose(UNDONE[turn])
    exif[headers.ORIENTATION] = turn
    path = root / TRAIN / name
    path.parent.mkdir(parents=True, exist_ok=True)
    photo.save(path, quality=95, exif=exif.tobytes())
    if is_shown:
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(Image.open(path))).shape, frame.shape)
    sizes = {"width": size[0], "height": size[1]}
    content["images"].append({"id": number, "file_name": name, **sizes} | record)
    content["annotations"].append({"image_id": number, "category_id": 1, "segmentation": [person]})


def opened(content: dict, root: Path, **options: object) -> COCOPersonDataset:
    write_annotations(root, TRAIN, content)
    return COCOPersonDataset(root, TRAIN, 80, **options)


def names_that_agree(dataset: COCOPersonDataset) -> list[str]:
    """The photos whose masks lie on the persons: all of them, or it fails."""
    for number in range(len(dataset)):
        red, _, blue, alpha = cv2.split(dataset.original(number).astype(np.int32))
        person, mask = (red > 170) & (blue < 110), alpha > 0
        assert (person & mask).sum() > 0.8 * (person | mask).sum(), dataset.index.file_name(number)
        assert np.array_equal(dataset.original(number).shape[1::-1], dataset.index.size(number))
    return [dataset.index.file_name(number) for number in range(len(dataset))]


@pytest.fixture
def content() -> dict:
    return {"images": [], "annotations": [], "categories": [{"id": 1, "name": "person"}]}


# --- what EXIF says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_found_and_shown_as_pillow_shows_it(content, tmp_path, kind, turn):
    add(content, tmp_path, f"a.{kind}", WIDE, turn)
    add(content, tmp_path, f"b.{kind}", TALL, 6)
    assert orientation((tmp_path / TRAIN / f"a.{kind}").read_bytes()) == turn
    assert names_that_agree(opened(content, tmp_path)) == [f"a.{kind}", f"b.{kind}"]


@pytest.mark.parametrize("order", "<>")
def test_an_orientation_that_is_none_turns_nothing(order):
    def photo(tag: int, kind: int, value: int, directory: int = 8) -> bytes:
        marks = b"II" if order == "<" else b"MM"
        entry = struct.pack(f"{order}HHIHH", tag, kind, 1, value, 0)
        return b"\xff\xd8\xff\xe1\0\x22Exif\0\0" + marks + struct.pack(f"{order}HIH", 42, directory, 1) + entry

    good = photo(0x0112, 3, 6)
    others = [(0x0112, 3, 0), (0x0112, 3, 9), (0x0112, 3, 65535), (0x0112, 2, 6), (0x0111, 3, 6), (0x0112, 3, 6, 2**31)]
    assert orientation(good) == 6
    assert {orientation(photo(*other)) for other in others} == {1}
    behind = good[:2] + b"\xff\xed\xff\xff" + bytes(2**16 - 3) + good[2:]  # what Photoshop puts there
    assert orientation(behind) == 6
    assert orientation(good[:2] + b"\xff\xe1\0\2" * 10**7) == 1
    assert {orientation(good[:length]) for length in range(len(good) - 2)} == {1}


# --- what a set was annotated on --------------------------------------------------------------------------


@pytest.mark.parametrize("is_shown", [True, False])
def test_those_that_can_be_told_decide_for_half_turns_mirrors_and_squares(content, tmp_path, capsys, is_shown):
    names = [f"{turn}_{size[0]}.jpg" for turn in range(1, 9) for size in (WIDE, SQUARE)]
    for name in names:
        add(content, tmp_path, name, WIDE if "96" in name else SQUARE, int(name[0]), is_shown)
    dataset = opened(content, tmp_path)
    assert names_that_agree(dataset) == names
    assert (dataset.index.is_shown, dataset.index.left_out) == (is_shown, {})
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("10 photos (")
    assert ("turned pixels" if is_shown else "stored pixels") in said


@pytest.mark.parametrize(("turn", "size"), [(3, WIDE), (2, TALL), (4, WIDE), (6, SQUARE), (5, SQUARE)])
def test_where_nothing_decides_the_photo_is_left_out_and_counted(content, tmp_path, turn, size):
    add(content, tmp_path, "upright.jpg", WIDE, 1)
    add(content, tmp_path, "turned.jpg", size, turn)
    dataset = opened(content, tmp_path)
    assert names_that_agree(dataset) == ["upright.jpg"]
    (reason,) = dataset.index.left_out
    assert reason.startswith("photo that EXIF turns")
    assert "turned.jpg" in reason
    content["images"].pop(0)
    assert "turned.jpg" in refusal(opened, content, tmp_path)


def test_where_those_that_can_be_told_disagree_the_others_are_left_out(content, tmp_path):
    add(content, tmp_path, "shown.jpg", TALL, 6, True)
    add(content, tmp_path, "stored.jpg", WIDE, 8, False)
    add(content, tmp_path, "half.jpg", WIDE, 3, True)
    add(content, tmp_path, "square.jpg", SQUARE, 6, False)
    dataset = opened(content, tmp_path)
    assert names_that_agree(dataset) == ["shown.jpg", "stored.jpg"]
    assert [*dataset.index.left_out.values()] == [2]


@pytest.mark.parametrize("is_shown", [True, False])
def test_an_outline_over_a_side_gives_away_sizes_of_the_other_reading(content, tmp_path, is_shown):
    """A tool that draws on the photo as shown and writes the stored size, or the other way round."""
    wrong = {"width": WIDE[0], "height": WIDE[1]}
    add(content, tmp_path, "whole.jpg", TALL, 6, is_shown, **wrong)
    add(content, tmp_path, "inside.jpg", TALL, 8, is_shown, low=0.7, **wrong)
    add(content, tmp_path, "half.jpg", WIDE, 3, is_shown)
    add(content, tmp_path, "upright.jpg", TALL, 1)
    dataset = opened(content, tmp_path)
    assert names_that_agree(dataset) == ["whole.jpg", "inside.jpg", "half.jpg", "upright.jpg"]
    assert (dataset.index.is_shown, dataset.index.left_out) == (is_shown, {})
    add(content, tmp_path, "other.jpg", TALL, 6, not is_shown, **wrong)  # a contradiction: none is believed
    dataset = opened(content, tmp_path)
    assert names_that_agree(dataset) == ["upright.jpg"]
    assert [*dataset.index.left_out.values()] == [4]


def test_a_careless_outline_does_not_outvote_the_sizes(content, tmp_path):
    for number in range(12):
        add(content, tmp_path, f"{number}.jpg", WIDE, 6)
    content["annotations"][0]["segmentation"][0][0] = 1.07 * WIDE[0]  # it reaches over a side
    content["annotations"][0]["segmentation"][0][3] = 1.2 * WIDE[1]
    dataset = opened(content, tmp_path)
    assert dataset.index.is_shown
    assert len(dataset) == 12


def test_exif_behind_other_segments_is_found_by_the_index_as_by_the_reader(content, tmp_path):
    add(content, tmp_path, "turned.jpg", WIDE, 6)
    add(content, tmp_path, "half.jpg", WIDE, 3)
    for name in ("turned.jpg", "half.jpg"):
        plain = (tmp_path / TRAIN / name).read_bytes()
        between = b"\xff\xed\xff\xff" + bytes(65533) + b"\xff\xff"  # a long segment, and a fill byte before the next
        (tmp_path / TRAIN / name).write_bytes(plain[:2] + between[:-1] + plain[2:])
    assert names_that_agree(opened(content, tmp_path)) == ["turned.jpg", "half.jpg"]


def test_a_large_set_is_opened_in_part_and_as_a_whole_where_a_photo_is_turned(content, tmp_path, monkeypatch):
    looked, look = [], headers._both_sizes
    monkeypatch.setattr(headers, "_both_sizes", lambda path: (looked.append(Path(path).name), look(path))[1])
    monkeypatch.setattr(headers, "EXAMINED", 3)
    for number in range(10):
        add(content, tmp_path, f"{number}.jpg", WIDE, 3 if number == 7 else 1)
    dataset = opened(content, tmp_path)
    assert sorted(looked) == ["0.jpg", "4.jpg", "8.jpg"]
    assert (len(dataset), dataset.index.left_out) == (10, {})
    assert "7.jpg" in refusal(dataset.original, 7)  # and by name whatever was not looked at
    add(content, tmp_path, "10.jpg", SQUARE, 1)
    add(content, tmp_path, "11.jpg", TALL, 6)
    content["images"].insert(0, content["images"].pop())
    content["annotations"].insert(0, content["annotations"].pop())
    looked.clear()
    assert len(names_that_agree(opened(content, tmp_path))) == 12
    assert {*looked} == {f"{number}.jpg" for number in range(12)}


def test_the_cache_and_other_processes_read_the_same(content, tmp_path):
    for turn in range(1, 9):
        add(content, tmp_path, f"{turn}.jpg", TALL if turn > 4 else WIDE, turn)
        add(content, tmp_path, f"{turn}_square.jpg", SQUARE, turn)
    plain, cached = (opened(content, tmp_path, cache=cache) for cache in (False, True))
    names_that_agree(plain)
    loader = torch.utils.data.DataLoader(plain, 16, num_workers=1, multiprocessing_context="spawn")
    for samples in (next(iter(loader)), torch.stack(list(cached))):
        assert torch.equal(samples, torch.stack(list(plain)))


def test_the_checksum_knows_what_the_set_was_annotated_on(content, tmp_path):
    sums = []
    for name, turn in (("a", 3), ("b", 4)):
        add(content, tmp_path, f"{name}.jpg", WIDE, turn)
    for is_shown in (True, False):
        add(content, tmp_path, "c.jpg", WIDE, 6, is_shown)
        sums.append(opened(content, tmp_path).index.checksum())
        content["images"].pop()
        content["annotations"].pop()
    assert len({*sums}) == 2
