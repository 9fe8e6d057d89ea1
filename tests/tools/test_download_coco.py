"""The COCO download from a small server that drops, lies and refuses: a folder that is right in the end."""

from __future__ import annotations

import re
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import edit

import utils
from datasets import COCOPersonDataset
from tools import download_coco
from tools.download_coco import ANNOTATIONS_ZIP, PHOTO_BYTES, run_command

ZIP, TRAIN, VAL = f"/{ANNOTATIONS_ZIP}", "train2017", "val2017"
HTML = b"<html>log in to this network</html>"
ONE, OTHER = f"/{TRAIN}/000000000007.jpg", f"/{TRAIN}/000000000008.jpg"  # of different sizes
NOBODY = {f"/{TRAIN}/000000000011.jpg", f"/{VAL}/000000000106.jpg"}


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; server.troubles say what goes wrong at the first, second, ... request for a path."""

    def do_GET(self) -> None:
        server, body = self.server, self.server.files.get(self.path, b"")
        server.requests.append(self.path)
        trouble = server.troubles[self.path].pop(0) if server.troubles.get(self.path) else server.always
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if isinstance(trouble, int) or start >= len(body):
            self.send_error(trouble or (416 if start else 404))
            return
        body = {"html": HTML, "other": server.files[OTHER]}.get(trouble, body)[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if trouble == "drop" else body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(coco_root, monkeypatch) -> Iterator[ThreadingHTTPServer]:
    """Serves `coco_root`; server.persons are its photos with persons."""
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 64)  # more than there are threads
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        photos = photos_in(coco_root)
        server.persons = {path: photos[path] for path in sorted(photos.keys() - NOBODY)}
        server.files, server.requests, server.troubles, server.always = photos, [], {}, ""
        server.url = f"http://127.0.0.1:{server.server_port}"
        archive = coco_root / "stored.zip"  # not compressed: a test damages a member's bytes
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(coco_root.glob("annotations/*.json")):
                file.write(path, f"annotations/{path.name}")
        server.files[ZIP] = archive.read_bytes()
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


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


def test_only_photos_with_persons_are_fetched_and_again_only_if_damaged(server, download, tmp_path, coco_root):
    assert download() == (0, [])
    assert photos_in(tmp_path) == server.persons
    assert sorted(server.requests) == sorted([ZIP, *server.persons])
    for path in (tmp_path / "annotations").iterdir():
        assert path.read_bytes() == (coco_root / "annotations" / path.name).read_bytes()
    assert download() == (0, [])
    assert server.requests == []
    damaged = dict(zip(server.persons, (b"", b"\xff", server.persons[ONE][:100], HTML), strict=False))
    for path, content in damaged.items():
        (tmp_path / path[1:]).write_bytes(content)
    assert download() == (0, [])
    assert sorted(server.requests) == sorted(damaged)
    assert photos_in(tmp_path) == server.persons


def test_a_limited_set_can_be_trained_on_and_completed(server, download, tmp_path):
    assert download("--limit", "6") == (0, [])
    some = [*list(server.persons)[:6], *list(server.persons)[10:12]]  # the first ones of both splits, by name
    assert photos_in(tmp_path).keys() == {*some}
    assert [len(COCOPersonDataset(tmp_path, split, 32)) for split in (TRAIN, VAL)] == [6, 2]
    assert download() == (0, [])
    assert sorted(server.requests) == sorted(server.persons.keys() - some)
    dog = {"id": 9000, "image_id": 11, "category_id": 18, "segmentation": [[1, 1, 9, 1, 9, 9]]}
    edit(tmp_path, lambda content: content["annotations"].append(dog))
    assert download("--category", "dog") == (0, [])
    assert server.requests == [f"/{TRAIN}/000000000011.jpg"]


def test_annotations_are_continued_by_later_attempts_and_runs(server, download, tmp_path, monkeypatch):
    monkeypatch.setattr(download_coco.time, "sleep", (slept := []).append)
    monkeypatch.setattr(download_coco, "RETRY_DELAYS", (1, 3, 10))
    server.troubles, whole = {ZIP: [503, "drop", 429, "drop"]}, server.files[ZIP]
    code, (line,) = download("--limit", "1")
    assert (code, slept) == (2, [1, 3, 10])
    assert "the connection ended after" in line
    part = (tmp_path / "annotations" / ".annotations_trainval2017.zip").read_bytes()
    assert part == whole[: len(part)]
    server.files[ZIP] = bytes(1000) + whole[1000:]  # its beginning is not asked for again
    assert download("--limit", "1") == (0, [])


def test_a_part_that_cannot_be_continued_is_begun_anew(download, tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / ".annotations_trainval2017.zip").write_bytes(bytes(10**6))
    assert download("--limit", "1") == (0, [])


@pytest.mark.parametrize(
    ("old", "new"), [(b"PK", b"HTML"), (b"000000000102", b"?" * 12), (b"instances_val2017", b"captions_val2017_")]
)
def test_a_zip_that_is_not_what_it_should_be_is_one_line(server, download, tmp_path, old, new):
    whole = server.files[ZIP]
    server.files[ZIP] = whole.replace(old, new)
    code, (line,) = download()
    assert code == 2
    assert "annotations_trainval2017.zip is damaged or not COCO's" in line
    assert not (tmp_path / "annotations" / f"instances_{VAL}.json").exists()
    server.files[ZIP] = whole
    assert download() == (0, [])


@pytest.mark.parametrize("trouble", ["drop", "html", "other", 429, 503])
def test_a_photo_that_comes_wrong_is_fetched_again(server, download, tmp_path, trouble):
    server.troubles = {ONE: [trouble, 500]}
    assert download() == (0, [])
    assert photos_in(tmp_path) == server.persons
    assert server.requests.count(ONE) == 3


def test_photos_that_never_come_are_named_and_the_others_are_there(server, download, tmp_path):
    missing = f"/{VAL}/000000000102.jpg"
    server.troubles = {ONE: [500] * 4}
    del server.files[missing]
    named = f"{server.url}{missing}: HTTP 404 Not Found", f"{server.url}{ONE}: Internal Server Error"
    assert download() == (1, [*named, "2 photos did not come; the same command goes on"])
    assert (server.requests.count(ONE), server.requests.count(missing)) == (4, 1)
    assert photos_in(tmp_path).keys() == server.persons.keys() - {ONE, missing}


def test_a_server_that_fails_every_photo_is_not_asked_for_all_of_them(server, download, monkeypatch):
    monkeypatch.setattr(download_coco, "MAX_FAILED", 3)
    download("--limit", "1")
    server.always = 404
    code, (*failed, last) = download()
    assert (code, len(failed)) == (2, 3)  # of 13 that fail
    assert last == "download_coco.py: error: 3 photos did not come; the same command goes on"


@pytest.mark.parametrize(("flags", "words"), [
    (["--url", "images.cocodataset.org"], "unknown url type"), (["--url", "http://127.0.0.1:port"], "nonnumeric port"),
    (["--url", "http://127.0.0.1:1"], "refused"), (["--limit", "0"], "--limit 0 must be 1 or more"),
])  # fmt: skip
def test_a_mistake_is_one_line(download, flags, words):
    code, (line,) = download(*flags)
    assert code == 2
    assert re.match(f"download_coco.py: error: .*{words}", line)


def test_a_full_disk_is_one_line_and_leaves_nothing_half(download, tmp_path, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")  # one for each thread, which each write their photo's name into it

    download("--limit", "1")
    before = photos_in(tmp_path)
    monkeypatch.setattr(utils, "fsync", fail)
    code, (line,) = download()
    assert code == 2
    assert re.search(rf"error: {tmp_path}/.*\.jpg cannot be written: No space left on device$", line)
    assert photos_in(tmp_path) == before


def test_a_disk_that_is_too_small_is_refused_before_the_first_photo(server, download, monkeypatch):
    download("--limit", "2")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=12 * PHOTO_BYTES - 1))
    assert download()[0] == 2
    assert server.requests == []
