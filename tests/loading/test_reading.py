"""Photos as OpenCV reads them, in the orientation of their annotations, or refused by name."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from conftest import refusal, write_photo
from PIL import Image

from datasets import COCOPersonDataset
from loading.reading import read_photo

TRAIN, FIRST = "train2017", "000000000001.jpg"  # width 48, height 64 in `coco_root`


@pytest.mark.parametrize(("annotated", "quarter_turns"), [((64, 48), 0), ((48, 64), -1)])
def test_a_turned_photo_is_read_in_the_orientation_of_its_annotation(tmp_path, annotated, quarter_turns):
    photo = np.zeros((48, 64, 3), np.uint8)
    photo[:16, :20, 0] = 250
    write_photo(tmp_path / "stored.jpg", photo)
    tags = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 0x0112, 3, 1, 6, 0, 0)  # orientation 6: shown turned right
    exif = b"\xff\xe1" + struct.pack(">H", len(tags) + 8) + b"Exif\0\0" + tags
    stored = (tmp_path / "stored.jpg").read_bytes()
    (tmp_path / "turned.jpg").write_bytes(stored[:2] + exif + stored[2:])
    expected = np.rot90(read_photo(tmp_path / "stored.jpg", (64, 48)), quarter_turns)
    assert np.array_equal(read_photo(tmp_path / "turned.jpg", annotated), expected)


def jpegs() -> dict[str, bytes]:
    """A photo of 47 x 61 pixels as JPEGs of every kind, whole and damaged."""
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
    if kind == "cut in half":  # which imread takes for whole
        assert "cannot be read" in refusal(read_photo, photo, (47, 61))
    else:
        assert np.array_equal(read_photo(photo, (47, 61)), expected)


def png_of_zeros(width: int, height: int) -> bytes:
    """A hundred of them, whatever the size says."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(100))]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in [*chunks, b"IEND"]]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"a text", png_of_zeros(48, 64), png_of_zeros(10**5, 10**5),
     cv2.imencode(".jpg", np.zeros((65, 48), np.uint8))[1].tobytes()],
    ids=["a folder", "empty", "text", "damaged", "beyond OpenCV", "48 x 65"],
)  # fmt: skip
def test_a_photo_that_cannot_be_used_is_named_when_it_is_read(coco_root, content, request):
    dataset = COCOPersonDataset(coco_root, TRAIN, image_size=32)
    photo = coco_root / TRAIN / FIRST
    photo.unlink()
    assert str(photo) in refusal(dataset.__getitem__, 0)
    photo.mkdir() if content is None else photo.write_bytes(content)
    sizes = ("48 x 65", "48 x 64") if "48 x 65" in request.node.name else ()
    assert all(text in refusal(dataset.__getitem__, 0) for text in (str(photo), *sizes))
    assert dataset[1].shape == (4, 32, 32)
