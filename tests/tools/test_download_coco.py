"""The COCO download from a small server that drops, lies and refuses: a folder that is right in the end."""

from __future__ import annotations

import io
import json
import re
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

import utils
from datasets import COCOPersonDataset
from tools import download_coco
from tools.download_coco import ANNOTATIONS_ZIP, PHOTO_BYTES, run_command

ZIP, TRAIN, VAL = f"/{ANNOTATIONS_ZIP}", "train2017", "val2017"
HTML = b"<html>log in to this network</html>"
OTHER_PHOTO = cv2.imencode(".jpg", np.zeros((40, 40, 3), np.uint8))[1].tobytes()  # of another size than all others


def make_split(split: str, first: int, persons: int) -> tuple[dict[str, bytes], bytes]:
    """Returns photos by their path on the server, two with dogs at the end, and their annotation file."""
    photos, images, annotations = {}, [], []
    for number in range(first, first + persons + 2):
        name, height, width = f"{number:012d}.jpg", 16 + number % 5, 24 + number % 3
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        photos[f"/{split}/{name}"] = cv2.imencode(".jpg", pixels)[1].tobytes()
        images.insert(0, {"id": number, "file_name": name, "width": width, "height": height})
        category = 1 if number < first + persons else 18
        annotations.append({"image_id": number, "category_id": category, "segmentation": [[2, 2, 9, 2, 9, 9]]})
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    return photos, json.dumps({"images": images, "annotations": annotations, "categories": categories}).encode()


def make_zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored, not compressed: a test damages a member's bytes
        for name, content in members.items():
            archive.writestr(f"annotations/{name}.json", content)
    return buffer.getvalue()


TRAIN_PHOTOS, TRAIN_JSON = make_split(TRAIN, 1, persons=12)
VAL_PHOTOS, VAL_JSON = make_split(VAL, 101, persons=4)
PHOTOS = TRAIN_PHOTOS | VAL_PHOTOS
PERSONS = dict([*TRAIN_PHOTOS.items()][:12] + [*VAL_PHOTOS.items()][:4])
ONE = f"/{TRAIN}/000000000007.jpg"
WHOLE_ZIP = make_zip({f"instances_{TRAIN}": TRAIN_JSON, f"instances_{VAL}": VAL_JSON, "captions_val2017": b"{}"})


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; server.troubles say what goes wrong at the first, second, ... request for a path."""

    def do_GET(self) -> None:
        server, byte_range = self.server, self.headers.get("Range")
        server.requests.append(self.path)
        trouble = server.troubles[self.path].pop(0) if server.troubles.get(self.path) else server.always
        body = server.files.get(self.path, b"")
        start = int(re.fullmatch(r"bytes=(\d+)-", byte_range)[1]) if byte_range and server.knows_ranges else 0
        if isinstance(trouble, int) or start >= len(body):
            self.send_error(trouble or (416 if start else 404))
            return
        body = {"html": HTML, "other": OTHER_PHOTO}.get(trouble, body)[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if trouble == "drop" else body)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # more than there are threads, which all connect at once


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.requests, server.troubles, server.always = {ZIP: WHOLE_ZIP, **PHOTOS}, [], {}, ""
        server.knows_ranges, server.url = True, f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def download(server, tmp_path, capsys, monkeypatch):
    """Runs the command on a large disk. Returns its exit code and the lines on stderr, without progress bars."""
    monkeypatch.setattr(download_coco, "RETRY_DELAYS", (0, 0, 0))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def download(*flags: str) -> tuple[int, list[str]]:
        server.requests.clear()
        code = run_command(["download_coco.py", "--root", str(tmp_path), "--url", f"{server.url}/", *flags])
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        return code, [line for line in lines if line.strip() and not re.search(r"\d+.*\[.*\]\s*$", line)]

    return download


def photos_in(root: Path) -> dict[str, bytes]:
    """Returns all files in the photo folders, temporary ones as well."""
    return {f"/{path.parent.name}/{path.name}": path.read_bytes() for path in root.glob("*2017/*")}


def test_only_photos_with_persons_are_fetched_and_again_only_if_damaged(server, download, tmp_path):
    assert download() == (0, [])
    assert photos_in(tmp_path) == PERSONS
    assert sorted(server.requests) == sorted([ZIP, *PERSONS])
    annotations = {path.name: path.read_bytes() for path in (tmp_path / "annotations").iterdir()}
    assert annotations == {f"instances_{TRAIN}.json": TRAIN_JSON, f"instances_{VAL}.json": VAL_JSON}
    assert download() == (0, [])
    assert server.requests == []
    damaged = dict(zip(PERSONS, (b"", b"\xff", PERSONS[ONE][:100], HTML), strict=False))
    for path, content in damaged.items():
        (tmp_path / path[1:]).write_bytes(content)
    assert download() == (0, [])
    assert sorted(server.requests) == sorted(damaged)
    assert photos_in(tmp_path) == PERSONS


def test_a_limited_set_can_be_trained_on_and_completed(server, download, tmp_path):
    assert download("--limit", "6") == (0, [])
    some = [*list(PERSONS)[:6], *list(PERSONS)[12:14]]  # the first ones of both splits, by name
    assert photos_in(tmp_path) == {path: PERSONS[path] for path in some}
    assert [len(COCOPersonDataset(tmp_path, split, 32)) for split in (TRAIN, VAL)] == [6, 2]
    assert download() == (0, [])
    assert sorted(server.requests) == sorted(PERSONS.keys() - some)
    assert download("--category", "dog") == (0, [])
    assert photos_in(tmp_path) == PHOTOS


def test_annotations_are_continued_by_later_attempts_and_runs(server, download, tmp_path, monkeypatch):
    monkeypatch.setattr(download_coco.time, "sleep", (slept := []).append)
    monkeypatch.setattr(download_coco, "RETRY_DELAYS", (1, 3, 10))
    server.troubles = {ZIP: [503, "drop", 429, "drop"]}
    code, (line,) = download("--limit", "1")
    assert (code, slept) == (2, [1, 3, 10])
    assert "the connection ended after" in line
    part = (tmp_path / "annotations" / ".annotations_trainval2017.zip").read_bytes()
    assert part == WHOLE_ZIP[: len(part)]
    server.files[ZIP] = bytes(1000) + WHOLE_ZIP[1000:]  # its beginning is not asked for again
    assert download("--limit", "1") == (0, [])


@pytest.mark.parametrize(("part", "knows_ranges"), [(bytes(100), False), (bytes(10**6), True)])
def test_a_part_that_cannot_be_continued_is_begun_anew(server, download, tmp_path, part, knows_ranges):
    server.knows_ranges = knows_ranges
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / ".annotations_trainval2017.zip").write_bytes(part)
    assert download("--limit", "1") == (0, [])


@pytest.mark.parametrize(
    "content", [HTML, WHOLE_ZIP.replace(VAL_JSON[50:70], b"?" * 20), make_zip({"captions_val2017": b"{}"})],
    ids=["html", "damaged", "another"],
)  # fmt: skip
def test_a_zip_that_is_not_what_it_should_be_is_one_line(server, download, tmp_path, content):
    server.files[ZIP] = content
    code, (line,) = download()
    assert code == 2
    assert "annotations_trainval2017.zip is damaged or not COCO's" in line
    assert not (tmp_path / "annotations" / f"instances_{VAL}.json").exists()
    server.files[ZIP] = WHOLE_ZIP
    assert download() == (0, [])


@pytest.mark.parametrize("trouble", ["drop", "html", "other", 429, 503])
def test_a_photo_that_comes_wrong_is_fetched_again(server, download, tmp_path, trouble):
    server.troubles = {ONE: [trouble, 500]}
    assert download() == (0, [])
    assert photos_in(tmp_path) == PERSONS
    assert server.requests.count(ONE) == 3


def test_photos_that_never_come_are_named_and_the_others_are_there(server, download, tmp_path):
    missing = f"/{VAL}/000000000102.jpg"
    server.troubles = {ONE: [500] * 4}
    del server.files[missing]
    code, lines = download()
    assert code == 1
    assert lines[:2] == [f"{server.url}{missing}: HTTP 404 Not Found", f"{server.url}{ONE}: Internal Server Error"]
    assert lines[2:] == ["2 photos did not come; the same command goes on"]
    assert (server.requests.count(ONE), server.requests.count(missing)) == (4, 1)
    assert photos_in(tmp_path).keys() == PERSONS.keys() - {ONE, missing}


def test_a_server_that_fails_every_photo_is_not_asked_for_all_of_them(server, download, monkeypatch):
    monkeypatch.setattr(download_coco, "MAX_FAILED", 3)
    download("--limit", "1")
    server.always = 404
    code, lines = download()
    assert (code, len(lines)) == (2, 4)  # of 14 that fail
    assert lines[-1] == "download_coco.py: error: 3 photos did not come; the same command goes on"


@pytest.mark.parametrize(("flags", "words"), [
    (["--url", "images.cocodataset.org"], "unknown url type"), (["--url", "http://127.0.0.1:port"], "nonnumeric port"),
    (["--url", "http://127.0.0.1:1"], "refused"),
    (["--category", "horse"], "no category named 'horse'"), (["--limit", "0"], "--limit 0 must be 1 or more"),
])  # fmt: skip
def test_a_mistake_is_one_line(download, flags, words):
    code, (line,) = download(*flags)
    assert code == 2
    assert line.startswith("download_coco.py: error: ")
    assert words in line


def find_the_disk_full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")  # one for each thread, which each write their photo's name into it


def test_a_full_disk_is_one_line_and_leaves_nothing_half(download, tmp_path, monkeypatch):
    download("--limit", "1")
    before = photos_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(utils, "fsync", find_the_disk_full)
        code, (line,) = download()
    assert code == 2
    assert re.search(rf"error: {tmp_path}/.*\.jpg cannot be written: No space left on device$", line)
    assert photos_in(tmp_path) == before
    assert download() == (0, [])


def test_a_disk_that_is_too_small_is_refused_before_the_first_photo(server, download, monkeypatch):
    download("--limit", "2")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=13 * PHOTO_BYTES - 1))
    assert download()[0] == 2
    assert server.requests == []
