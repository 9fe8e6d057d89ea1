"""Annotation files and photos from strangers: damaged at random, they end in a DataError, or are counted and left out.

The files are read in a process of its own, which may not take more memory or time than is written here, and whose end
by a crash is seen. `HOSTILE_FILES=50000 pytest tests/test_hostile_files.py` tries that many, new ones each time.
"""

from __future__ import annotations

import codecs
import faulthandler
import functools
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
from conftest import edit, refusal, write_photo, write_split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets import COCOPersonDataset
from loading.annotations import DataError
from loading.headers import which_way_up
from loading.index import open_index
from loading.reading import claimed_size, read_photo

TRAIN = "train2017"
ASKED = int(os.environ.get("HOSTILE_FILES", 0))
ANNOTATION_FILES, PHOTOS = (ASKED * 4 // 5, ASKED // 5) if ASKED else (1000, 250)
MOST_MEMORY = 600 * 2**20  # bytes that the process may grow by
MOST_SECONDS = 5  # of processor time for a file

# --- what a stranger may write ----------------------------------------------------------------------------

NAMES = ["../secret.jpg", "secret.jpg/../../secret.jpg", "/etc/passwd", "..\\secret.jpg", "C:\\x.jpg", "C:x.jpg", "\\x",
         "", ".", "/", "a\0b", "\n", "x" * 5000, "é", "away/secret.jpg", "link.jpg", "CON", "\ud800"]  # fmt: skip
NUMBERS = [0, -1, 1, 0.5, -0.0, 255, 2**15, 2**20, 2**28, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63 - 1, 2**63,
           -(2**63), 2**64, 10**30, 1e-308, 1e308, -1e308, float("nan"), float("inf"), float("-inf")]  # fmt: skip
SIZES = [[64, 48], [48, 64], [2**20, 256], [256, 2**20], [2**31, 2**31], [-64, -48], [0, 0], [64]]
DEEP = {f"@deep {depth}@": b"[" * depth + b"]" * depth for depth in (10, 500, 5000, 100_000)}  # json cannot write them
RAW = {f"@raw {text}@": text.encode() for text in ("1e999", "-", "01", "nul", "1.5.5", '{"a":1,"a":2}', '"\\ud800"')}

numbers = st.one_of(st.sampled_from(NUMBERS), st.integers(-100, 5000), st.floats(-100, 100, width=16))
texts = st.one_of(st.sampled_from(NAMES), st.text(max_size=9))
counts = st.one_of(
    st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=40),
    st.lists(numbers, max_size=9),
    st.integers(1, 3000).map(lambda n: [n, 3072 - n]),
    st.sampled_from([[0] * 3000 + [3072], [2**32 + 3072], [2**28], [2**63, -(2**63), 3072], "P" * 5000, "o" * 5000]),
)
polygons = st.lists(st.lists(st.one_of(numbers, st.floats(-300, 300, width=16)), max_size=14), max_size=3)
far = st.lists(st.sampled_from([-4096.0, 0.0, 256.0, 4096.0, 2.0**20, 2.0**22]), min_size=6, max_size=40)
segmentations = st.one_of(
    polygons, far.map(lambda p: [p[: len(p) // 2 * 2]] * 3),
    st.fixed_dictionaries({"size": st.sampled_from(SIZES), "counts": counts}),
)  # fmt: skip
dimensions = st.sampled_from([-48, 0, 1, 47, 48, 64, 2**15, 2**20, 2**28, 2**31, 2**64])
values = st.one_of(
    numbers, texts, segmentations, st.sampled_from([None, True, [], {}, [[]], *DEEP, *RAW]),
    st.recursive(numbers | texts, lambda some: st.lists(some, max_size=3) | st.dictionaries(texts, some, max_size=3)),
)  # fmt: skip


def places(content: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of everything in a JSON document."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def kinds_of_places(content: dict) -> list[list[tuple]]:
    """The same by what they are (the width of a photo, a point of a polygon ...): there are many more points."""
    kinds: dict[tuple, list[tuple]] = {}
    for path in places(content):
        kinds.setdefault(tuple("*" if isinstance(key, int) else key for key in path), []).append(path)
    return [*kinds.values()]


def change(content: object, path: tuple, how: str, value: object) -> object:
    """Replaces, removes or repeats one thing in a document; what an earlier change took away stays away."""
    if not path:
        return value if how == "replace" else content
    for key in path[:-1]:
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):
            return None
    with_key = isinstance(content, dict) and path[-1] in content
    if not with_key and not (isinstance(content, list) and isinstance(path[-1], int) and path[-1] < len(content)):
        return None
    if how == "replace":
        content[path[-1]] = value
    elif how == "remove":
        del content[path[-1]]
    elif isinstance(content, list):
        content += [content[path[-1]]] * (value if isinstance(value, int) and 0 < value < 300 else 2)
    return None


def written(content: object) -> bytes:
    text = json.dumps(content).encode()
    for token, literal in (DEEP | RAW).items():
        text = text.replace(json.dumps(token).encode(), literal)
    return text


# --- what may become of its bytes -------------------------------------------------------------------------

byte_changes = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "number", "drop"]),
        st.one_of(st.floats(0, 1, exclude_max=True), st.floats(0, 0.05)),  # headers are at the beginning
        st.one_of(st.binary(min_size=1, max_size=6), st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])),
    ),
    min_size=1, max_size=5,
)  # fmt: skip


def damaged(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for how, where, what in changes:
        at = int(where * len(data))
        if how == "flip":
            data = data[:at] + bytes(a ^ b for a, b in zip(data[at:], what, strict=False)) + data[at + len(what) :]
        elif how == "cut":
            data = data[:at] if where > 0.05 else data
        else:
            data = data[:at] + (b"" if how == "drop" else what) + data[at + (0 if how == "insert" else len(what)) :]
    return data


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_right_sums(png: bytes) -> bytes:
    """A damaged PNG with the checksums that its chunks should have: the damage goes deeper."""
    fixed, at = png[:8], 8
    while at + 12 <= len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        fixed += chunk(png[at + 4 : at + 8], png[at + 8 : at + 8 + length])
        at += 12 + length
    return fixed


@functools.cache
def bomb(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel: a few kilobytes that claim to be gigabytes."""
    packer, row = zlib.compressobj(), bytes(1 + (width + 7) // 8)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def photo_bases() -> list[bytes]:
    """One photo, 48 x 64, in the forms that OpenCV and Pillow read."""
    photo = np.random.default_rng(0).integers(0, 255, (64, 48, 3), np.uint8)
    bases = [cv2.imencode(kind, photo)[1].tobytes() for kind in (".jpg", ".png", ".bmp", ".webp", ".tif", ".ppm")]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    forms = [("JPEG", {"progressive": True, "exif": exif}), ("GIF", {}), ("TIFF", {"compression": "tiff_lzw"})]
    for form, options in forms:
        Image.fromarray(photo).save(stream := io.BytesIO(), form, **options)
        bases.append(stream.getvalue())
    return [*bases, bomb(11_000, 11_000), bomb(30_000, 30_000)]


# --- the process that reads them --------------------------------------------------------------------------


class Reader:
    """Reads a data set as a training does, and watches what that opens and what it takes."""

    def __init__(self, root: Path):
        self.root, self.seen, self.ends = root, [], Counter()
        self.usual: set[str] = set()  # what reading good files opens elsewhere: the cgroup's quota
        self._watching = False
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple) -> None:
        if self._watching and event in ("open", "os.scandir", "os.listdir") and not isinstance(arguments[0], int):
            self.seen.append(os.fsdecode(arguments[0]))

    def read(self) -> None:
        """Opens the index and every sample, and counts how that ended."""
        self.seen.clear()
        begun, self._watching = time.process_time(), True
        try:
            self.ends[self._samples()] += 1
        except DataError as error:
            self.ends["DataError" if len(str(error).splitlines()) == 1 else "more than a line"] += 1
        finally:
            self._watching = False
            self.seconds = time.process_time() - begun

    def check(self) -> None:
        outside = {path for path in self.seen if not Path(os.path.realpath(path)).is_relative_to(self.root)}
        assert outside <= self.usual, outside - self.usual
        assert self.seconds < MOST_SECONDS
        assert "more than a line" not in self.ends

    def _samples(self) -> str:
        dataset, refused = COCOPersonDataset(self.root, TRAIN, image_size=32), 0
        for index in range(len(dataset)):
            try:
                rgba = dataset.original(index)
            except DataError:
                refused += 1
                continue
            assert rgba.shape[1::-1] == dataset.index.size(index)
            assert {*np.unique(rgba[..., 3])} <= {0, 255}
        left_out = "counted" if dataset.index.left_out else "whole"
        return f"{left_out}, photos refused" if refused else left_out


def property_of_annotations(reader: Reader) -> Callable:
    path = reader.root / "annotations" / f"instances_{TRAIN}.json"
    text = path.read_text()
    kinds = kinds_of_places(json.loads(text))
    any_place = st.sampled_from(kinds).flatmap(st.sampled_from)
    how = st.sampled_from(["replace"] * 4 + ["remove", "repeat"])
    of_right_type = {"segmentation": segmentations, "file_name": texts, "counts": counts, "id": st.integers(-9, 9),
                     "width": dimensions, "height": dimensions, "image_id": st.integers(-9, 9)}  # fmt: skip
    deeper = [  # a wrong type ends the reading; these get further
        st.tuples(st.sampled_from([p for kind in kinds for p in kind if p[-1:] == (name,)]), st.just("replace"), likely)
        for name, likely in of_right_type.items()
    ]
    anything = st.lists(st.tuples(any_place, how, values), max_size=3)
    changes = st.one_of(anything, *[st.lists(st.one_of(deeper), min_size=1, max_size=4)] * 2)

    @given(changes, st.one_of(st.just([]), st.just([]), st.just([]), byte_changes))
    def holds(changes: list[tuple], bytewise: list[tuple]) -> None:
        content = json.loads(text)
        for change_path, change_how, value in changes:
            content = change(content, change_path, change_how, value) or content
        path.write_bytes(damaged(written(content), bytewise))
        shutil.rmtree(reader.root / ".silueta", ignore_errors=True)
        reader.read()
        reader.check()

    return holds


def property_of_photos(reader: Reader) -> Callable:
    names = sorted((reader.root / TRAIN).glob("0*.jpg"))
    bases = photo_bases()

    @given(st.integers(0, len(bases) - 1), st.one_of(st.just([]), *[byte_changes] * 5), st.booleans())
    def holds(number: int, changes: list[tuple], right_sums: bool) -> None:
        data = damaged(bases[number], changes)
        names[0].write_bytes(with_right_sums(data) if right_sums and data[:4] == b"\x89PNG" else data)
        reader.read()
        reader.check()

    return holds


def child(kind: str, number: int, root: Path) -> None:
    """Tries that many files, within limits, and prints how they ended."""
    import resource

    faulthandler.enable()
    Image.init()  # its readers are modules, imported when they are needed, as are the encodings
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
        codecs.lookup(encoding)
    warnings.simplefilter("ignore")  # a warning opens the module that it comes from, to show the line
    cv2.setNumThreads(1)
    reader = Reader(root.resolve())
    holds = {"annotations": property_of_annotations, "photos": property_of_photos}[kind](reader)
    for _ in range(2):  # building, then opening: whatever is imported late is imported now
        reader.read()
        reader.usual |= {*reader.seen}
    sys.stdout = io.StringIO()  # the loader says for each that it reads it
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 2**25
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**32,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (60 + number, 90 + number))
    before, reader.ends = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Counter()
    run = settings(max_examples=number, derandomize=not ASKED, database=None, deadline=None,
                   suppress_health_check=[*HealthCheck])(holds)  # fmt: skip
    run()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"grown": grown, "ends": reader.ends}), file=sys.__stdout__)


# --- the tests --------------------------------------------------------------------------------------------


@pytest.fixture
def hostile_root(tmp_path) -> Path:
    """Photos with persons, and beside their folder what no annotation may reach."""
    root = tmp_path / "coco"
    write_split(root, TRAIN, 4, first_id=1)
    secret = np.full((64, 48, 3), 200, np.uint8)
    for path in (tmp_path / "secret.jpg", root / "secret.jpg"):
        write_photo(path, secret)
    (root / TRAIN / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / TRAIN / "away").symlink_to(tmp_path)
    return root


@pytest.mark.skipif(sys.platform == "win32", reason="the limits are POSIX's")
@pytest.mark.parametrize(("kind", "number"), [("annotations", ANNOTATION_FILES), ("photos", PHOTOS)])
def test_no_file_crashes_leaves_the_folder_or_takes_much(hostile_root, kind, number):
    project = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(project), str(project / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, kind, str(number), str(hostile_root)]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert run.returncode == 0, f"exit code {run.returncode}, files in {hostile_root}:\n{run.stderr[-6000:]}"
    found = json.loads(run.stdout.splitlines()[-1])
    assert sum(found["ends"].values()) >= number
    assert found["grown"] < MOST_MEMORY
    assert len(found["ends"]) > 1, found  # neither all refused nor all whole: the damage is of every degree


def test_a_photo_that_claims_to_be_larger_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    for decoder in ((cv2, "imdecode"), (simplejpeg, "decode_jpeg")):
        monkeypatch.setattr(*decoder, lambda *_: pytest.fail("decoded"))
    (tmp_path / "bomb.jpg").write_bytes(bomb(10_000, 9_000))
    assert "10000 x 9000" in refusal(read_photo, tmp_path / "bomb.jpg", (48, 64))
    jpeg = bytearray(photo_bases()[0])
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_000, 64_000)
    (tmp_path / "bomb.jpg").write_bytes(jpeg)
    assert "64000 x 65000" in refusal(read_photo, tmp_path / "bomb.jpg", (48, 64))
    bare = b"\xff\xd8\xff\x01\xff\xfe" + jpeg[2:]  # no length comes after 01: who takes one skips the real size
    harmless = b"\xff\xc0\0\x11\x08" + struct.pack(">HH", 64, 48)
    (tmp_path / "bomb.jpg").write_bytes(bare.ljust(2 + 2 + 0xFFFE, b"\0") + harmless)
    assert "cannot be read" in refusal(read_photo, tmp_path / "bomb.jpg", (48, 64))
    with (tmp_path / "sparse.webp").open("wb") as file:
        file.write(b"RIFF\0\0\0\0WEBP")
        file.truncate(2**40)
    unread = [str(tmp_path / name) for name in ("sparse.webp", "absent.jpg")]
    assert which_way_up(unread, [(48, 64)] * 2, None) == (None, {})
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(2**40)
    assert "sparse.jpg" in refusal(read_photo, tmp_path / "sparse.jpg", (48, 64))


def test_every_kind_of_photo_tells_its_size_and_endless_headers_end():
    sizes = [claimed_size(np.frombuffer(base, np.uint8)) for base in photo_bases()]
    assert sizes == [(48, 64)] * 9 + [(11_000, 11_000), None]  # of the last one Pillow will not hear
    jpeg = photo_bases()[0]
    for before in (b"\xff" * 9, b"\xff\xe1\x00\x04ab" * 300):  # filling, and the segments of a large profile
        assert claimed_size(np.frombuffer(jpeg[:2] + before + jpeg[2:], np.uint8)) == (48, 64)
    begun = time.process_time()
    for endless in (b"\xff\xe1\0\0", b"\xff\xe1\0\2", b"\xff" * 4):
        assert claimed_size(np.frombuffer(b"\xff\xd8" + endless * 10**7, np.uint8)) is None
    assert time.process_time() - begun < MOST_SECONDS


def test_an_index_that_came_with_the_data_is_not_believed(coco_root, tmp_path, capsys):
    """It could name any file and any run lengths, and a stranger's archive brings its times along."""
    path = open_index(coco_root, TRAIN).path
    content = torch.load(path, weights_only=True)
    names = content["arrays"]["names"]
    names[:16] = torch.tensor([*b"../../secret.jpg"], dtype=torch.uint8)
    torch.save(content, path)
    assert open_index(coco_root, TRAIN).file_name(0) == "../../secret.jpg"  # the owner's own would be
    there = shutil.copytree(coco_root, tmp_path / "there")
    capsys.readouterr()
    assert open_index(there, TRAIN).file_name(0) == "000000000001.jpg"
    assert "Reading" in capsys.readouterr().out


@pytest.mark.parametrize("depth", [400, 100_000])
def test_deep_nesting_is_refused_or_left_out(coco_root, depth):
    path = edit(coco_root, lambda content: content["annotations"][0].update(segmentation="@"))
    path.write_bytes(path.read_bytes().replace(b'"@"', b"[" * depth + b"]" * depth))
    if depth > 1000:
        assert str(path) in refusal(open_index, coco_root, TRAIN)
    else:
        assert [*open_index(coco_root, TRAIN).left_out.values()] == [1]


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
