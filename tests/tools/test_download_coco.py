"""The COCO download against a small server of its own: complete, resumable, and never a half for a whole."""

from __future__ import annotations

import io
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import serving

from tools import download_coco
from tools.download_coco import ARCHIVES, WORK, DownloadError, check_space, download, main, unpack

REPOSITORY = Path(__file__).resolve().parents[2]
LAYOUT = {
    "annotations/instances_train2017.json": b'{"images": ["train"]}',
    "annotations/instances_val2017.json": b'{"images": ["val"]}',
    "train2017/000000000009.jpg": random.Random(1).randbytes(200_000),
    "train2017/000000000025.jpg": random.Random(2).randbytes(200_000),
    "val2017/000000000139.jpg": random.Random(3).randbytes(10_000),
    "val2017/000000000285.jpg": random.Random(4).randbytes(10_000),
}
TRAIN, VAL = "/zips/train2017.zip", "/zips/val2017.zip"
ANNOTATIONS = "/annotations/annotations_trainval2017.zip"


def make_zip(members: dict[str, bytes]) -> bytes:
    """Stored, not compressed, so that a test finds the bytes of a member to damage them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        for name, content in members.items():
            bundle.writestr(name, content)
    return buffer.getvalue()


def of(folder: str) -> dict[str, bytes]:
    return {name: content for name, content in LAYOUT.items() if name.startswith(f"{folder}/")}


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; server.hooks say what goes wrong."""

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        self.path = self.requestline.split()[1]  # as it was asked: http.server forgives two slashes
        server.requests.append((self.path, asked))
        status = server.statuses.pop(0) if server.statuses else 200
        body = server.files.get(self.path)
        if status != 200 or body is None or len(server.requests) > 50:  # 50: an endless loop fails, too
            self.send_error(status if status != 200 else 404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) + server.shift if asked and server.ranges else 0
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.send_body(body[start:])

    def send_body(self, body: bytes) -> None:
        server = self.server
        if server.drops and server.drops[0][0] == self.path:
            _, how = server.drops.pop(0)
            self.wfile.write(body[: len(body) // 2])
            if how == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif how == "stall":
                server.stalled.set()
                server.release.wait(20)
            return
        self.wfile.write(body)

    def finish(self) -> None:
        super().finish()
        self.connection.close()  # at once and without a farewell, for the reset

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(autouse=True)
def surroundings(monkeypatch) -> None:
    monkeypatch.setattr(download_coco, "RETRY_DELAYS", (0, 0, 0))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {
        ANNOTATIONS: make_zip(of("annotations") | {"annotations/captions_val2017.json": b"{}"}),
        VAL: make_zip({"val2017/": b""} | of("val2017")),
        TRAIN: make_zip({"train2017/": b""} | of("train2017")),
    }
    server.requests, server.ranges, server.shift, server.statuses, server.drops = [], True, 0, [], []
    with serving(server):
        yield server


def run(server, root: Path) -> int:
    return main(["--zips", "--root", str(root), "--url", f"{server.url}/"])


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def error_line(capsys) -> str:
    """The one line on the error stream beside the progress bars."""
    errors = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in errors if line and not re.search(r"\d+.*\[.*\]$", line)]
    assert len(lines) == 1, errors
    assert lines[0].startswith("error: ")
    return lines[0]


# --- the whole run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_a_run_yields_the_layout_and_nothing_else(server, tmp_path, ranges):
    server.ranges = ranges
    assert run(server, tmp_path / "data" / "coco") == 0
    assert files_in(tmp_path / "data" / "coco") == LAYOUT
    assert {p.name for p in (tmp_path / "data" / "coco").iterdir()} == {"annotations", "train2017", "val2017"}


def test_the_second_run_asks_for_nothing(server, tmp_path):
    run(server, tmp_path)
    server.requests.clear()
    assert run(server, tmp_path) == 0
    assert server.requests == []
    assert files_in(tmp_path) == LAYOUT


def test_what_is_there_stays_and_only_the_rest_is_fetched(server, tmp_path):
    names = ("annotations/instances_val2017.json", "annotations/notes.txt", "val2017/1.jpg")
    there = {name: b"mine" for name in names}
    for name, content in there.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "train2017").mkdir()  # empty: as good as missing
    assert run(server, tmp_path) == 0
    val = of("val2017")
    assert files_in(tmp_path) == {name: LAYOUT[name] for name in LAYOUT if name not in val} | there
    assert [path for path, _ in server.requests] == [ANNOTATIONS, TRAIN]


def test_a_zip_of_the_users_own_is_used_and_kept(server, tmp_path):
    (tmp_path / "train2017.zip").write_bytes(server.files[TRAIN])
    assert run(server, tmp_path) == 0
    assert files_in(tmp_path) == LAYOUT | {"train2017.zip": server.files[TRAIN]}
    assert [path for path, _ in server.requests] == [ANNOTATIONS, VAL]


# --- the download -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_is_resumed(server, tmp_path, ranges):
    server.ranges, whole = ranges, server.files[TRAIN]
    # A first half that is not the server's shows which bytes came from where.
    (tmp_path / "x.zip.part").write_bytes(b"?" * 150_000)
    download(server.url + TRAIN, tmp_path / "x.zip")
    assert server.requests == [(TRAIN, "bytes=150000-")]
    assert files_in(tmp_path) == {"x.zip": b"?" * 150_000 + whole[150_000:] if ranges else whole}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_that_is_complete_is_not_fetched_again(server, tmp_path, ranges):
    server.ranges, mark = ranges, b"?" * len(server.files[TRAIN])
    (tmp_path / "x.zip.part").write_bytes(mark)
    download(server.url + TRAIN, tmp_path / "x.zip")
    assert files_in(tmp_path) == {"x.zip": mark}


def test_a_part_that_is_too_long_is_begun_anew(server, tmp_path):
    (tmp_path / "x.zip.part").write_bytes(b"?" * 500_000)
    download(server.url + TRAIN, tmp_path / "x.zip")
    assert files_in(tmp_path) == {"x.zip": server.files[TRAIN]}


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_dropped_connection_is_taken_up_again(server, tmp_path, ranges, how):
    server.ranges, server.drops = ranges, [(TRAIN, how)]
    download(server.url + TRAIN, tmp_path / "x.zip")
    assert files_in(tmp_path) == {"x.zip": server.files[TRAIN]}
    assert len(server.requests) == 2
    if how == "end":
        assert server.requests[1] == (TRAIN, f"bytes={len(server.files[TRAIN]) // 2}-")


def test_many_drops_are_fine_as_long_as_something_comes(server, tmp_path):
    server.drops = [(TRAIN, "end")] * 10
    download(server.url + TRAIN, tmp_path / "x.zip")
    assert files_in(tmp_path) == {"x.zip": server.files[TRAIN]}


def test_a_run_that_gave_up_is_gone_on_with(server, tmp_path, capsys):
    server.ranges, server.drops = False, [(TRAIN, "end")] * 4
    assert run(server, tmp_path) == 2
    assert "run this again" in error_line(capsys)
    assert len(server.requests) == 2 + 4
    server.ranges = True
    assert run(server, tmp_path) == 0
    assert server.requests[6:] == [(TRAIN, f"bytes={len(server.files[TRAIN]) // 2}-")]
    assert files_in(tmp_path) == LAYOUT


def test_another_range_than_asked_for_is_not_written(server, tmp_path):
    server.shift = 1
    (tmp_path / "x.zip.part").write_bytes(b"?" * 1000)
    with pytest.raises(DownloadError, match="another range"):
        download(server.url + TRAIN, tmp_path / "x.zip")
    assert files_in(tmp_path) == {"x.zip.part": b"?" * 1000}


def test_a_busy_server_is_asked_again_after_a_while(server, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(download_coco, "RETRY_DELAYS", (1, 3, 10))
    monkeypatch.setattr(download_coco.time, "sleep", slept.append)
    server.statuses = [503, 429]
    download(server.url + VAL, tmp_path / "x.zip")
    assert files_in(tmp_path) == {"x.zip": server.files[VAL]}
    assert slept == [1, 3]


def test_a_file_that_the_server_has_not_is_asked_for_once(server, tmp_path, capsys):
    server.files.pop(TRAIN)
    assert run(server, tmp_path) == 2
    assert "404" in error_line(capsys)
    assert [path for path, _ in server.requests] == [ANNOTATIONS, VAL, TRAIN]
    assert not list(tmp_path.rglob("*.zip"))  # those before are unpacked and gone: their room is needed


def test_an_unreachable_server_is_one_line(tmp_path, capsys):
    with socket.socket() as taken:  # bound but not listening: nobody else answers there
        taken.bind(("127.0.0.1", 0))
        assert main(["--zips", "--root", str(tmp_path), "--url", f"http://127.0.0.1:{taken.getsockname()[1]}"]) == 2
    assert "refused" in error_line(capsys)


@pytest.mark.parametrize("url", ["images.cocodataset.org", "http://127.0.0.1:port"])
def test_an_address_that_is_none_is_one_line(tmp_path, capsys, url):
    assert main(["--zips", "--root", str(tmp_path), "--url", url]) == 2
    assert url in error_line(capsys)


def test_ctrl_c_leaves_a_download_that_is_gone_on_with(server, tmp_path):
    server.drops = [(TRAIN, "stall")]
    program = (
        "import shutil, signal, sys, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=10**12);"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a suite in the background ignores it
        "from tools import download_coco; download_coco.CHUNK = 1000; sys.exit(download_coco.main())"
    )
    command = [sys.executable, "-c", program, "--zips", "--root", str(tmp_path), "--url", server.url]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert server.stalled.wait(60)  # it imports PyTorch first
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=10)[1]
    assert process.returncode == 130, errors
    assert "again" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert run(server, tmp_path) == 0
    assert files_in(tmp_path) == LAYOUT


# --- unpacking --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["val2017", "train2017"])
def test_an_interrupted_unpack_is_not_taken_for_complete(server, tmp_path, monkeypatch, folder):
    extract = zipfile.ZipFile.extract

    def interrupted(self, name, path):
        if name == max(of(folder)):
            raise KeyboardInterrupt
        return extract(self, name, path)

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", interrupted)
        assert run(server, tmp_path) == 130
    assert not (tmp_path / folder).exists()
    server.requests.clear()
    assert run(server, tmp_path) == 0
    assert files_in(tmp_path) == LAYOUT
    assert f"/zips/{folder}.zip" not in [path for path, _ in server.requests]  # its zip was there


def test_what_a_killed_run_left_is_cleared_away_before_the_disk_is_measured(server, tmp_path, monkeypatch):
    left = tmp_path / WORK / "unpacking-killed" / "train2017"
    left.mkdir(parents=True)
    (left / "half.jpg").write_bytes(b"half")
    free = {True: 0, False: 10**12}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[left.exists()]))
    assert run(server, tmp_path) == 0
    assert files_in(tmp_path) == LAYOUT


def test_only_what_the_trainer_needs_is_unpacked(server, tmp_path, monkeypatch):
    unpacked, extract = [], zipfile.ZipFile.extract

    def noted(self, name, path):
        unpacked.append(name)
        return extract(self, name, path)

    monkeypatch.setattr(zipfile.ZipFile, "extract", noted)
    run(server, tmp_path)
    assert sorted(unpacked) == sorted(LAYOUT)


@pytest.mark.parametrize("evil", ["../evil", "val2017/../../evil", "/evil"])
def test_a_member_that_leads_out_is_refused(server, tmp_path, capsys, evil):
    root = tmp_path / "a" / "root"
    server.files[VAL] = make_zip(of("val2017") | {evil: b"evil"})
    assert run(server, root) == 2
    assert "leads out" in error_line(capsys)
    assert not list(tmp_path.rglob("evil"))
    assert not Path("/evil").exists()
    assert not (root / "val2017").exists()


WHOLE = make_zip(of("val2017"))
NOT_VAL = {
    "damaged": WHOLE.replace(LAYOUT["val2017/000000000285.jpg"][5000:5020], b"?" * 20),
    "cut": WHOLE[:15_000],
    "html": b"<html>log in to this network</html>",
    "another": make_zip(of("train2017")),
}


@pytest.mark.parametrize("what", NOT_VAL)
def test_a_zip_that_is_not_what_it_should_be_is_one_line(server, tmp_path, capsys, what):
    server.files[VAL] = NOT_VAL[what]
    assert run(server, tmp_path) == 2
    assert "val2017.zip" in error_line(capsys)
    assert not (tmp_path / "val2017").exists()


def test_unpack_never_replaces_a_file(tmp_path):
    (tmp_path / "x.zip").write_bytes(make_zip(of("annotations")))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val2017.json").write_bytes(b"mine")
    unpack(tmp_path / "x.zip", tmp_path, ARCHIVES[0].targets)
    assert (tmp_path / "annotations/instances_val2017.json").read_bytes() == b"mine"
    assert (tmp_path / "annotations/instances_train2017.json").exists()


# --- the disk ---------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30 * 10**9))
    assert run(server, tmp_path) == 2
    assert "30.0 GB are free" in error_line(capsys)
    assert server.requests == []


def test_what_was_downloaded_already_is_not_asked_of_the_disk_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30 * 10**9))
    with pytest.raises(DownloadError, match=r"40\.3 GB"):
        check_space(ARCHIVES, tmp_path)
    (tmp_path / WORK).mkdir()
    with (tmp_path / WORK / "train2017.zip.part").open("wb") as part:
        part.truncate(19 * 10**9)  # a file of holes: it takes no space
    check_space(ARCHIVES, tmp_path)
    assert "1.4 GB to download, 21.0 GB unpacked; needs 21.3 GB" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_not_tried_again(server, tmp_path, capsys, monkeypatch):
    def full(path, mode):
        return open("/dev/full", mode) if path.suffix == ".part" else open(path, mode)

    monkeypatch.setattr(Path, "open", full)
    assert run(server, tmp_path) == 2
    assert "No space left" in error_line(capsys)
    assert len(server.requests) == 1


def test_a_second_run_into_the_same_root_is_refused(server, tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / WORK).mkdir()
    with (tmp_path / WORK / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(server, tmp_path) == 2
    assert "another" in error_line(capsys)
    assert server.requests == []
    assert run(server, tmp_path) == 0
