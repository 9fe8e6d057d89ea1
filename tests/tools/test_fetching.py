"""COCO's photos one by one, from a server that drops, stalls, lies and refuses: a folder that is right in the end."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import serving
from test_trainer import Tiny, small

import trainer
import utils
from datasets import COCOPersonDataset
from tools import download_coco, fetching
from tools.download_coco import ONE_BY_ONE, WORK, main
from utils import draft_of

ZIP = "/annotations/annotations_trainval2017.zip"
TRAIN, VAL = "train2017", "val2017"
CATEGORIES = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
ANOTHER = cv2.imencode(".jpg", np.zeros((40, 40, 3), np.uint8))[1].tobytes()  # a photo of no one's size
HTML = b"<html>log in to this network</html>"


def make_split(split: str, persons: int, dogs: int, first: int) -> tuple[dict[str, bytes], bytes]:
    """Photos by their address, and the annotation file: the persons' first, in an order of its own."""
    rng, photos, images, annotations = np.random.default_rng(first), {}, [], []
    for number in range(first, first + persons + dogs):
        name, height, width = f"{number:012d}.jpg", 16 + number % 5, 24 + number % 3
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        photos[f"/{split}/{name}"] = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 5])[1].tobytes()
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        category = 1 if number < first + persons else 18
        annotations.append({"image_id": number, "category_id": category, "segmentation": [[2, 2, 12, 2, 12, 12]]})
    random.Random(first).shuffle(annotations)
    return photos, json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}).encode()


def make_files(train: int, val: int, dogs: int = 3) -> dict[str, bytes]:
    """What a server holds, of so many photos with persons."""
    (photos, of_train), (more, of_val) = (make_split(TRAIN, train, dogs, 1), make_split(VAL, val, dogs, 10_001))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        bundle.writestr(f"annotations/instances_{TRAIN}.json", of_train)
        bundle.writestr(f"annotations/instances_{VAL}.json", of_val)
    return {ZIP: buffer.getvalue()} | photos | more


FEW = make_files(20, 6)


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; server.troubles say what goes wrong with a path, at one request after another."""

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(self.path)
        body, troubles = server.files.get(self.path), server.troubles.get(self.path)
        trouble = troubles.pop(0) if troubles else server.always
        if body is None or isinstance(trouble, int):
            self.send_error(trouble if isinstance(trouble, int) else 404)
            return
        sent = {"drop": body[: len(body) // 2], "stall": b"", "short": body[:-20], "html": HTML,
                "another": ANOTHER}.get(trouble, body)  # fmt: skip
        length = {"drop": len(body), "stall": len(body), "long": len(body) + 1}.get(trouble, len(sent))
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(sent)
        if trouble == "stall":
            server.stalled.set()
            server.release.wait(20)

    def log_message(self, *args) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *args) -> None:
        """Who asked has gone: that is what a timeout does."""


@pytest.fixture(autouse=True)
def surroundings(monkeypatch) -> None:
    monkeypatch.setattr(fetching, "RETRY_DELAYS", (0, 0, 0))
    monkeypatch.setattr(download_coco, "RETRY_DELAYS", ())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.troubles, server.always = dict(FEW), [], {}, ""
    with serving(server):
        yield server


def run(server: Server, root: Path, *flags: str) -> int:
    server.requests.clear()
    return main(["--root", str(root), "--url", f"{server.url}/", *flags])


def photos_in(root: Path) -> dict[str, bytes]:
    """What lies in the photo folders, drafts as well."""
    return {f"/{p.parent.name}/{p.name}": p.read_bytes() for split in (TRAIN, VAL) for p in (root / split).glob("*")}


def persons(files: dict[str, bytes], train: int = 20, val: int = 6) -> dict[str, bytes]:
    """The first photos with persons of either split."""
    names = [f"/{TRAIN}/{n:012d}.jpg" for n in range(1, train + 1)]
    names += [f"/{VAL}/{n:012d}.jpg" for n in range(10_001, 10_001 + val)]
    return {name: files[name] for name in names}


PERSONS = persons(FEW)
ONE = f"/{TRAIN}/000000000007.jpg"


def lines(text: str) -> list[str]:
    """Without progress bars."""
    return [line for line in text.replace("\r", "\n").splitlines() if line.strip() and "photos/s" not in line
            and "B/s" not in line and "files" not in line and "?" not in line]  # fmt: skip


# --- what is fetched --------------------------------------------------------------------------------------


def test_the_photos_with_persons_alone_come_and_a_second_run_asks_for_nothing(server, tmp_path, capsys):
    assert run(server, tmp_path) == 0
    assert photos_in(tmp_path) == PERSONS
    assert sorted(server.requests) == sorted([ZIP, *PERSONS])
    assert "20 in" in capsys.readouterr().out.splitlines()[-1]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}
    assert run(server, tmp_path) == 0
    assert server.requests == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")} == before


def test_a_limit_takes_a_part_that_a_later_run_completes(server, tmp_path):
    assert run(server, tmp_path, "--limit", "7") == 0
    assert photos_in(tmp_path) == persons(FEW, 7, 2)
    assert run(server, tmp_path) == 0
    assert photos_in(tmp_path) == PERSONS
    assert sorted(server.requests) == sorted(PERSONS.keys() - persons(FEW, 7, 2).keys())


def test_another_category_is_fetched_beside_the_first(server, tmp_path, capsys):
    run(server, tmp_path, "--limit", "1")
    assert run(server, tmp_path, "--category", "dog") == 0
    dogs = FEW.keys() - PERSONS.keys() - {ZIP}
    assert photos_in(tmp_path).keys() == dogs | persons(FEW, 1, 1).keys()
    capsys.readouterr()
    assert run(server, tmp_path, "--category", "horse") == 2
    assert "no category named 'horse'" in lines(capsys.readouterr().err)[-1]


def test_what_a_limit_leaves_is_trained_on_at_once(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "UNetAutoencoder", Tiny)
    monkeypatch.setattr(trainer.curves, "save_curves", lambda *_: None)  # which would take most of the time
    assert run(server, tmp_path / "coco", "--limit", "8") == 0
    trainer.main(small(tmp_path / "coco", tmp_path / "run", num_epochs=1))
    said = " ".join(capsys.readouterr().out.split())
    assert "8 photos to train on, 2 to validate" in said
    assert f"{TRAIN}: 12 photos not on disk (" in said
    assert (tmp_path / "run" / "best_model.pth").exists()
    run(server, tmp_path / "coco")  # the index is made again
    assert [len(COCOPersonDataset(tmp_path / "coco", split, 32)) for split in (TRAIN, VAL)] == [20, 6]


# --- what goes wrong --------------------------------------------------------------------------------------


def test_two_thousand_photos_from_a_bad_server_are_complete_and_right_after_a_second_call(
    server, tmp_path, capsys, monkeypatch
):
    server.files = make_files(1800, 200)
    wanted, chance = persons(server.files, 1800, 200), random.Random(0)
    kinds = ["drop", "short", "long", "html", "another", 500, 503]
    server.troubles = {path: [chance.choice(kinds)] for path in wanted if chance.random() < 0.3}
    server.troubles |= {path: ["stall"] for path in list(wanted)[:20]}
    monkeypatch.setattr(fetching, "RETRY_DELAYS", ())
    monkeypatch.setattr(fetching, "TIMEOUT", 1)
    troubled = set(server.troubles)
    assert run(server, tmp_path) == 1
    there = photos_in(tmp_path)
    assert there == {path: content for path, content in wanted.items() if path not in troubled}
    said = lines(capsys.readouterr().err)
    assert said[0] == f"{len(troubled)} photos did not come; the same command goes on:"
    assert len(said) == 1 + download_coco.LISTED + 1
    assert run(server, tmp_path) == 0
    assert sorted(server.requests) == sorted(troubled)
    assert photos_in(tmp_path) == wanted


@pytest.mark.parametrize("trouble", ["drop", "short", "long", "html", "another", 408, 429, 500, 503])
def test_a_photo_that_comes_wrong_is_tried_again_with_growing_pauses(trouble, server, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(fetching, "RETRY_DELAYS", (1, 3, 10))
    monkeypatch.setattr(fetching.time, "sleep", slept.append)
    asked_twice = [""] * (trouble == "short")  # it may be all that the server has
    server.troubles = {ONE: [trouble, *asked_twice] * 2}
    assert run(server, tmp_path) == 0
    assert photos_in(tmp_path) == PERSONS
    assert slept == [1, 3]
    assert server.requests.count(ONE) == (5 if trouble == "short" else 3)


def test_pauses_begin_anew_when_a_round_has_brought_something(server, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(fetching, "RETRY_DELAYS", (1, 3))
    monkeypatch.setattr(fetching.time, "sleep", slept.append)
    server.troubles = {path: [500] * n for n, path in enumerate(list(PERSONS)[:4])}
    assert run(server, tmp_path) == 0
    assert slept == [1, 1, 1]


def test_a_photo_that_never_comes_is_named_and_the_others_are_there(server, tmp_path, capsys):
    server.troubles = {ONE: [500] * 4}
    del server.files[other := f"/{VAL}/000000010003.jpg"]
    assert run(server, tmp_path) == 1
    said = lines(capsys.readouterr().err)
    assert said[0] == "2 photos did not come; the same command goes on:"
    assert sorted(said[1:]) == sorted([f"  {server.url}{ONE}: HTTP Error 500: Internal Server Error",
                                       f"  {server.url}{other}: HTTP 404 Not Found"])  # fmt: skip
    assert (server.requests.count(ONE), server.requests.count(other)) == (4, 1)
    assert photos_in(tmp_path).keys() == PERSONS.keys() - {ONE, other}
    assert run(server, tmp_path) == 1
    assert sorted(server.requests) == [ONE, other]


@pytest.mark.parametrize("status", [404, 503])
def test_a_server_that_fails_every_photo_is_not_asked_for_all_of_them(status, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetching, "MANY_IN_A_ROW", 5)
    run(server, tmp_path, "--limit", "1")
    # In turn: on a busy machine threads are far ahead of who counts.
    monkeypatch.setattr(fetching, "side_by_side", lambda work, items, threads: ((item, work(item)) for item in items))
    server.always = status
    assert run(server, tmp_path) == 1
    assert len(server.requests) == 2 * 5 * (1 if status == 404 else 4)  # of 2 folders, and 3 pauses
    assert lines(capsys.readouterr().err)[0].startswith("24 photos did not come")


def test_a_photo_that_the_server_itself_has_without_an_end_is_taken(server, tmp_path):
    server.files[ONE] = server.files[ONE].removesuffix(b"\xff\xd9")
    assert run(server, tmp_path) == 0
    assert photos_in(tmp_path)[ONE] == server.files[ONE]
    assert run(server, tmp_path) == 0
    assert server.requests == [ONE]  # it looks like one that was cut short: asked once whether it is


@pytest.mark.parametrize("content", [b"", b"\xff", PERSONS[ONE][:100], HTML])
def test_a_photo_that_is_damaged_on_disk_is_fetched_again(content, server, tmp_path):
    run(server, tmp_path)
    (tmp_path / ONE[1:]).write_bytes(content)
    assert run(server, tmp_path) == 0
    assert server.requests == [ONE]
    assert photos_in(tmp_path) == PERSONS


def test_an_answer_that_never_ends_is_given_up(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetching, "MOST_BYTES", 150)
    assert run(server, tmp_path) == 1
    assert "bytes came, and no end" in capsys.readouterr().err


# --- the disk, and what ends a run ------------------------------------------------------------------------


def test_two_threads_that_have_fetched_the_same_photo_write_it_one_after_the_other(tmp_path, monkeypatch):
    photo = fetching.Wanted("http://nowhere/1.jpg", tmp_path / "1.jpg", (40, 40))
    drafts, most = [], []
    monkeypatch.setattr(fetching, "get", lambda _: ANOTHER)

    @contextlib.contextmanager
    def slow(path: Path) -> Iterator:
        drafts.append(path)
        most.append(len(drafts))
        with utils.atomic_write(path) as file:
            yield file
            time.sleep(0.2)  # until it is safe on the disk
        drafts.remove(path)

    monkeypatch.setattr(fetching, "atomic_write", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetching.bring(photo))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [None] * 3
    assert most == [1]  # who comes later finds it there
    assert photo.path.read_bytes() == ANOTHER


def test_a_full_disk_is_one_line_and_leaves_nothing_half(server, tmp_path, capsys, monkeypatch):
    run(server, tmp_path, "--limit", "1")
    count, flush = [], utils.flush

    def full(descriptor: int) -> None:
        count.append(descriptor)
        if len(count) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(utils, "flush", full)
        assert run(server, tmp_path) == 2
    (line,) = lines(capsys.readouterr().err)
    assert line.startswith(f"error: {tmp_path}")
    assert line.endswith(".jpg cannot be written: No space left on device")
    there = photos_in(tmp_path)
    assert there == {path: content for path, content in PERSONS.items() if path in there}
    assert 2 <= len(there) < len(PERSONS)
    assert run(server, tmp_path) == 0
    assert photos_in(tmp_path) == PERSONS


def test_a_disk_that_is_too_small_for_the_photos_is_refused_before_the_first(server, tmp_path, capsys, monkeypatch):
    run(server, tmp_path, "--limit", "5")
    need = 20 * download_coco.PHOTO_BYTES
    for free, code in ((need - 1, 2), (need, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert run(server, tmp_path) == code
        assert len(server.requests) == (0 if code else 20)
    assert "the disk is too small: 20 photos need" in capsys.readouterr().err


def test_ctrl_c_ends_in_one_line_without_waiting_for_the_server_and_is_gone_on_with(
    server, tmp_path, capsys, monkeypatch
):
    run(server, tmp_path, "--limit", "1")
    server.troubles = {path: ["stall"] for path in list(PERSONS)[10:20]}
    capsys.readouterr()
    before, handler = {*threading.enumerate()}, signal.signal(signal.SIGINT, signal.default_int_handler)
    ctrl_c = threading.Thread(target=lambda: server.stalled.wait(20) and os.kill(os.getpid(), signal.SIGINT))
    ctrl_c.start()
    start = time.monotonic()
    try:
        assert run(server, tmp_path) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - start < 10  # seconds; the server would have taken 20
    assert lines(capsys.readouterr().err) == ["stopped; run this again to go on from here"]
    waiting = [thread for thread in {*threading.enumerate()} - before if thread.name.endswith("(run)")]
    assert waiting  # for the server
    assert all(thread.daemon for thread in waiting)  # and the program does not wait for them
    server.release.set()
    for thread in waiting:
        thread.join()
    there = photos_in(tmp_path)
    assert there == {path: content for path, content in PERSONS.items() if path in there}
    assert run(server, tmp_path) == 0
    assert photos_in(tmp_path) == PERSONS


def test_a_draft_that_a_killed_run_left_is_no_photo_and_goes(server, tmp_path):
    draft = draft_of(tmp_path / ONE[1:])
    draft.parent.mkdir(parents=True)
    draft.write_bytes(b"half")
    assert run(server, tmp_path) == 0
    assert photos_in(tmp_path) == PERSONS


# --- beside the zips --------------------------------------------------------------------------------------


def test_folders_of_single_photos_are_not_taken_for_unpacked_zips(server, tmp_path, capsys):
    run(server, tmp_path, "--limit", "5")
    capsys.readouterr()
    assert run(server, tmp_path, "--zips") == 2
    assert "one by one: go on without --zips, or delete" in capsys.readouterr().err
    assert server.requests == []


def test_photos_that_are_all_there_leave_the_folders_to_the_zips(server, tmp_path):
    run(server, tmp_path)
    (tmp_path / WORK / ONE_BY_ONE).unlink()  # as if they came from zips
    run(server, tmp_path)
    assert run(server, tmp_path, "--zips") == 0
    assert not (tmp_path / WORK).exists()


@pytest.mark.parametrize("flags", [["--limit", "0"], ["--zips", "--limit", "3"], ["--zips", "--category", "dog"]])
def test_flags_that_cannot_be_are_refused(flags, tmp_path, capsys):
    assert main(["--root", str(tmp_path), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: --" in line
