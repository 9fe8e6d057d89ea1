"""Damaged and hostile annotation files and photos end in a DataError of one line, or are counted and left out.

They are read in a process of its own, which may not take more memory or time than is written here, and whose crash is
seen. `python tests/loading/test_hostile_files.py NUMBER SEED FOLDER` reads as many as it is told.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import random
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from helpers import refusal, write_photo, write_split
from PIL import Image

from datasets import COCOPersonDataset
from loading.annotations import DataError
from loading.headers import claimed_size, find_rotated
from loading.reading import read_photo

TRAIN = "train2017"
MOST_MEMORY = 600 * 2**20  # bytes that the process may grow by
MOST_SECONDS = 5  # of processor time for a file

BIG = [0, -1, 0.5, 2**15, 2**20, 2**28, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**30, 1e308, float("nan"),
       float("-inf"), "1", None, True, [], {}]  # fmt: skip
FAR = [[4096.0, 0.0, -4096.0, 256.0] * 5, [2.0**20, 0.0, 0.0, 256.0] * 5, [2.0**22, 1e308, -1e308] * 4]
VALUES = dict.fromkeys(("id", "image_id", "category_id", "width", "height", "name", "images"), BIG) | {
    "file_name": ["../secret.jpg", "secret.jpg/../../secret.jpg", "/etc/passwd", "..\\secret.jpg", "C:x.jpg", "\\x", "",
                  ".", "/", "a\0b", "\n", "x" * 5000, "x" * 5000 + "/y", "away/secret.jpg", "link.jpg", 1, None],
    "segmentation": [*BIG, "", [[]], *([points] for points in FAR), [[1, 1, 9, 1, 9, 9]] * 300, [BIG[:13] * 2]],
    "size": [*BIG, [48, 64], [2**20, 256], [2**31, 2**31], [-64, -48], [0, 0], [64]],
    "counts": [*BIG, [0] * 3000 + [3072], [2**32 + 3072], [2**63, -(2**63), 3072], "P" * 5000, "o" * 5000, "\x7f" * 9],
}  # fmt: skip
RAW = [b"1e999", b"-", b"01", b"nul", b'{"a":1,"a":2}', b'"\\ud800"', *(b"[" * n + b"]" * n for n in (10, 500, 10**5))]


def holders(content: object, key: str) -> Iterator[dict]:
    """Yields the objects of a JSON document that have a field, at any depth."""
    if isinstance(content, dict) and key in content:
        yield content
    for child in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from holders(child, key)


def hostile_annotations(text: str) -> Iterator[bytes]:
    """Yields annotation files with a field replaced, by turns in the first object that has it and in all."""
    for key, values in VALUES.items():
        for number, value in enumerate([*values, "@"]):
            content = json.loads(text)
            for holder in [*holders(content, key)][: 1 if number % 2 else None]:
                holder[key] = value
            data = json.dumps(content).encode()
            yield from [data.replace(b'"@"', raw) for raw in RAW] if value == "@" else [data]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Returns a file of which pieces are replaced, inserted, dropped, or all that follows."""
    for _ in range(rng.randrange(1, 6)):
        at = int(rng.choice((1, 0.05)) * rng.random() * len(data))  # headers are at the beginning
        what = rng.choice([rng.randbytes(rng.randrange(1, 7)), b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b""])
        data = data[:at] + what + data[rng.choice([at + len(what), at + len(what), at, at + 4, len(data)]) :]
    return data


def bomb(width: int, height: int) -> bytes:
    """Returns a small PNG that claims this size."""
    png = bytearray(cv2.imencode(".png", np.zeros((64, 48), np.uint8))[1])
    png[16:24] = struct.pack(">II", width, height)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return bytes(png)


def photo_bases() -> list[bytes]:
    """Returns one photo, 48 x 64, in the formats that are read, and two bombs."""
    photo = np.random.default_rng(0).integers(0, 255, (64, 48, 3), np.uint8)
    kinds = (".jpg", ".png", ".bmp", ".webp", ".tif", ".ppm", ".gif")
    bases = [cv2.imencode(kind, photo)[1].tobytes() for kind in kinds]
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(photo).save(stream := io.BytesIO(), "JPEG", progressive=True, exif=exif)
    return [*bases, stream.getvalue(), bomb(11_000, 11_000), bomb(30_000, 30_000)]


# --- the process that reads them --------------------------------------------------------------------------


def read_all(root: Path) -> str:
    """Reads a data set as a training does. Returns how that ended."""
    try:
        dataset, refused = COCOPersonDataset(root, TRAIN, image_size=32), ""
    except DataError as error:
        return "refused" if str(error).isprintable() else repr(error)
    for i in range(len(dataset)):
        try:
            rgba = dataset.original(i)
            assert rgba.shape[1::-1] == dataset.index.size(i)
            assert {*np.unique(rgba[..., 3])} <= {0, 255}
        except DataError:
            refused = ", photos refused"
    return ("left out" if dataset.index.left_out else "whole") + refused


def child(number: int, seed: int, root: Path) -> None:
    """Reads hostile files, and as many damaged at random, within limits; prints how that ended."""
    import resource

    faulthandler.enable()
    write_split(root, TRAIN, 4, first_id=1)
    for path in (root.parent / "secret.jpg", root / "secret.jpg"):  # what no annotation may reach
        write_photo(path, np.full((64, 48, 3), 200, np.uint8))
    (root / TRAIN / "link.jpg").symlink_to(root.parent / "secret.jpg")
    (root / TRAIN / "away").symlink_to(root.parent)
    annotations, photo = root / "annotations" / f"instances_{TRAIN}.json", min((root / TRAIN).glob("0*.jpg"))
    rng, bases, text, ends, opened = random.Random(seed), photo_bases(), annotations.read_text(), set(), set()

    def note(event: str, arguments: tuple) -> None:
        if event in ("open", "os.scandir", "os.listdir") and not isinstance(arguments[0], int):
            opened.add(os.fsdecode(arguments[0]))

    def read() -> set[str]:
        """Reads the set; returns what that opened outside its root, but for modules that it imported."""
        opened.clear()
        begun = time.process_time()
        ends.add(read_all(root))
        assert time.process_time() - begun < MOST_SECONDS
        outside = {path for path in opened if not Path(os.path.realpath(path)).is_relative_to(root)}
        return {path for path in outside if not path.endswith((".py", ".pyc"))}

    sys.addaudithook(note)
    usual = read() | read()  # building, then opening
    sys.stdout = io.StringIO()  # each index that is built prints a line
    resource.setrlimit(resource.RLIMIT_AS, (2**34,) * 2)  # PyTorch's libraries take several GB of addresses
    resource.setrlimit(resource.RLIMIT_CPU, (60 + number, 90 + number))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in chain(hostile_annotations(text), (damaged(text.encode(), rng) for _ in range(number))):
        annotations.write_bytes(content)
        shutil.rmtree(root / ".silueta", ignore_errors=True)
        assert read() <= usual
    annotations.write_text(text)
    for content in chain(bases, (damaged(rng.choice(bases), rng) for _ in range(number))):
        photo.write_bytes(content)
        assert read() <= usual
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"grown": grown, "ends": [*ends]}), file=sys.__stdout__)


@pytest.mark.skipif(sys.platform == "win32", reason="the limits are POSIX's")
def test_no_file_crashes_leaves_the_folder_or_takes_much(tmp_path, start_process):
    process = start_process(__file__, 40, 0, tmp_path.resolve() / "coco")
    output = process.communicate()[0]
    assert process.returncode == 0, f"exit code {process.returncode}, files in {tmp_path}:\n{output[-6000:]}"
    result = json.loads(output.splitlines()[-1])
    assert result["grown"] < MOST_MEMORY
    ends = {*result["ends"]} - {"left out, photos refused"}
    assert ends == {"refused", "left out", "whole", "whole, photos refused"}  # damage of every degree


def test_a_photo_that_claims_to_be_larger_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    for decoder in ((cv2, "imdecode"), (simplejpeg, "decode_jpeg")):
        monkeypatch.setattr(*decoder, lambda *_: pytest.fail("decoded"))
    jpeg = bytearray(photo_bases()[0])
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_000, 64_000)
    bare = b"\xff\xd8\xff\x01\xff\xfe" + jpeg[2:]  # 01 has no length: a reader that takes one skips the real size
    harmless = bare.ljust(2 + 2 + 0xFFFE, b"\0") + b"\xff\xc0\0\x11\x08" + struct.pack(">HH", 64, 48)
    contents = {"10000 x 9000": bomb(10_000, 9_000), "64000 x 65000": jpeg, "cannot be read": harmless}
    for words, content in contents.items():
        (tmp_path / "bomb.jpg").write_bytes(content)
        assert words in refusal(read_photo, tmp_path / "bomb.jpg", (48, 64))


def test_a_sparse_file_of_a_terabyte_is_not_read_as_a_whole(tmp_path):
    (tmp_path / "sparse.webp").write_bytes(b"RIFF\0\0\0\0WEBP")
    os.truncate(tmp_path / "sparse.webp", 2**40)
    assert find_rotated([str(tmp_path / name) for name in ("sparse.webp", "absent.jpg")]) == {}
    assert "sparse.webp" in refusal(read_photo, tmp_path / "sparse.webp", (48, 64))


def test_every_kind_of_photo_tells_its_size_and_endless_headers_end():
    def sizes(*contents: bytes) -> list:
        return [claimed_size(np.frombuffer(content, np.uint8)) for content in contents]

    assert sizes(*photo_bases()) == [(48, 64)] * 8 + [(11_000, 11_000), None]  # Pillow refuses the last one
    start, rest = photo_bases()[0][:2], photo_bases()[0][2:]
    profile = b"\xff\xe1\x00\x04ab" * 300  # the segments of a large one
    assert sizes(start + b"\xff" * 9 + rest, start + profile + rest) == [(48, 64)] * 2
    begun = time.process_time()
    assert sizes(*(start + endless * 10**7 for endless in (b"\xff\xe1\0\0", b"\xff\xe1\0\2", b"\xff"))) == [None] * 3
    assert time.process_time() - begun < MOST_SECONDS


if __name__ == "__main__":
    child(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
