"""The person index: built once, followed, repaired, and what is left out of it."""

from __future__ import annotations

import os
import pickle
import pwd
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import add_person, edit, persons_of, refusal

from datasets import COCOPersonDataset
from loading import index as person_index
from loading.index import PersonIndex
from loading.layout import find_layout

TRAIN, FIRST = "train2017", "000000000001.jpg"  # width 48, height 64 in `coco_root`


def open_index(root: Path) -> PersonIndex:
    return person_index.index_of(find_layout(root, TRAIN))


def hide_photo_1(content: dict) -> None:  # the file keeps its length
    for annotation in persons_of(content, 1):
        annotation["category_id"] = 8


def drop_photo_1(content: dict) -> None:
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 1]


def test_the_index_is_built_once_and_leaves_nothing_else_behind(coco_root, capsys, monkeypatch):
    index = open_index(coco_root)
    assert "Reading" in capsys.readouterr().out
    monkeypatch.setattr(person_index, "read_persons", lambda *_: pytest.fail("read again"))
    again = open_index(coco_root)
    assert all(np.array_equal(again.alpha(i), index.alpha(i)) for i in range(10))
    assert capsys.readouterr().out == ""
    assert [*index.path.parent.iterdir()] == [index.path] == person_index.index_candidates(coco_root, TRAIN)[:1]
    assert len(pickle.dumps(again)) < 1000


@pytest.mark.parametrize(
    "change",
    [lambda root: edit(root, hide_photo_1), lambda root: edit(root, drop_photo_1, keep_time=True),
     lambda root: (root / TRAIN / FIRST).unlink()],
    ids=["same length", "same time", "photo removed"],
)  # fmt: skip
def test_the_index_follows_the_annotations_and_the_photos(coco_root, change):
    (coco_root / TRAIN / FIRST).rename(coco_root / FIRST)
    assert len(open_index(coco_root)) == 9
    (coco_root / FIRST).rename(coco_root / TRAIN / FIRST)
    assert len(open_index(coco_root)) == 10
    os.utime(coco_root / TRAIN, ns=(0, 0))
    path = open_index(coco_root).path
    held = path.with_suffix(".held")
    os.link(path, held)  # as another process has it open
    before = held.read_bytes()
    change(coco_root)
    assert len(open_index(coco_root)) == 9
    assert held.read_bytes() == before


def test_a_change_while_the_annotations_are_read_is_not_missed(coco_root, monkeypatch):
    def read_then_change(*args: object) -> object:
        content = read_persons(*args)
        edit(coco_root, hide_photo_1)
        return content

    read_persons = person_index.read_persons
    monkeypatch.setattr(person_index, "read_persons", read_then_change)
    open_index(coco_root)
    monkeypatch.setattr(person_index, "read_persons", read_persons)
    assert len(open_index(coco_root)) == 9


@pytest.mark.parametrize(
    "damage",
    [lambda good: good[: len(good) // 2], lambda good: b"", lambda good: random.Random(0).randbytes(len(good)),
     lambda good: good.replace(b"fingerprint", b"fingerPRINT"), lambda good: good.replace(b"2.jpg", b"\xff.jpg")],
    ids=["cut", "empty", "random", "in the header", "in the middle"],
)  # fmt: skip
def test_a_damaged_index_is_built_again(coco_root, damage, capsys):
    index = open_index(coco_root)
    good = index.path.read_bytes()
    index.path.unlink()
    index.path.write_bytes(damage(good))
    assert open_index(coco_root).checksum() == index.checksum()
    assert "is built again" in capsys.readouterr().out


def test_an_older_index_is_built_again_without_a_complaint(coco_root, capsys):
    index = open_index(coco_root)
    content = torch.load(index.path, weights_only=True)
    del content["exif_applied"]
    content["fingerprint"]["version"] -= 1
    torch.save(content, index.path)
    capsys.readouterr()
    assert len(open_index(coco_root)) == 10
    assert re.fullmatch("Reading .*\n", capsys.readouterr().out)


def test_an_index_that_came_with_the_data_is_not_used(coco_root, tmp_path, capsys):
    """It could name any file and any run lengths, and an archive brings its times along."""
    path = open_index(coco_root).path
    content = torch.load(path, weights_only=True)
    content["arrays"]["names"][:16] = torch.tensor([*b"../../secret.jpg"], dtype=torch.uint8)
    torch.save(content, path)
    assert open_index(coco_root).file_name(0) == "../../secret.jpg"  # the owner's own would be used
    copy = shutil.copytree(coco_root, tmp_path / "copy")
    capsys.readouterr()
    assert open_index(copy).file_name(0) == FIRST
    assert "Reading" in capsys.readouterr().out


def make_unwritable(root: Path) -> None:
    shutil.rmtree(root / ".silueta", ignore_errors=True)
    (root / ".silueta").touch()  # root could write to a folder without write bits


def test_unwritable_roots_keep_their_indexes_apart_in_the_cache_folder(coco_root, tmp_path, capsys):
    other = shutil.copytree(coco_root, tmp_path / "other")
    edit(other, hide_photo_1, keep_time=True)  # to the byte count and the clock the same
    for root in (coco_root, other):
        make_unwritable(root)
    for root, length in [(coco_root, 10), (other, 9)] * 2:
        index = open_index(root)
        assert (len(index), index.path) == (length, person_index.index_candidates(root, TRAIN)[1])
        assert index.path.is_relative_to(os.environ["XDG_CACHE_HOME"])
    assert capsys.readouterr().out.count("Reading") == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos\nat 64")])
def test_a_full_disk_leaves_no_file_and_the_cache_folder_is_used(coco_root, monkeypatch, capsys, error):
    def save(content: dict, file: object) -> None:
        torch_save(content, file)
        if Path(file.name).is_relative_to(coco_root):
            raise error

    torch_save = torch.save
    monkeypatch.setattr(torch, "save", save)
    assert open_index(coco_root).path == person_index.index_candidates(coco_root, TRAIN)[1]
    assert [*(coco_root / ".silueta").iterdir()] == []
    assert str(error).splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize("cache", ["x" * 300, ""], ids=["no name", "no home"])
def test_an_unusable_cache_folder_matters_only_where_it_is_needed(coco_root, monkeypatch, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.delenv("HOME")  # a container's user may have none
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert len(open_index(coco_root)) == 10
    make_unwritable(coco_root)
    assert f"cannot be kept in {coco_root}" in refusal(open_index, coco_root)


def test_a_checksum_depends_on_every_photo_and_mask(coco_root, tmp_path):
    index = open_index(coco_root)
    expected = index.checksum()
    shutil.copy(index.path, tmp_path / "copy.index")
    assert PersonIndex(tmp_path / "copy.index").checksum() == expected
    content = torch.load(index.path, weights_only=True)
    for name in content["arrays"].keys() - {"largest"}:
        for place in (0, -1):
            changed = content["arrays"] | {name: content["arrays"][name].clone()}
            changed[name].view(-1)[place] += 1
            torch.save(content | {"arrays": changed}, tmp_path / "changed.index")
            assert PersonIndex(tmp_path / "changed.index").checksum() != expected, name
    torch.save(content | {"exif_applied": True}, tmp_path / "changed.index")
    assert PersonIndex(tmp_path / "changed.index").checksum() != expected


@pytest.mark.skipif(sys.platform != "linux", reason="the pages are found in /proc")
def test_all_processes_share_the_pages_of_an_open_index(coco_root):
    """Workers touch each object that they use, and so copy its page: there must be nothing to copy."""
    edit(coco_root, lambda content: [add_person(content, [[5, 5, n % 40, 5, 30, n % 50]]) for n in range(1000)])
    index = open_index(coco_root)
    for i in range(len(index)):
        index.file_name(i), index.alpha(i)
    mapped = Path("/proc/self/smaps").read_text().split(str(index.path))[1:]
    fields = [dict(re.findall(r"(\w+): +(\d+) kB", entry.split("VmFlags")[0])) for entry in mapped]
    assert sum(int(field["Rss"]) for field in fields) * 1024 > 0.9 * index.path.stat().st_size
    assert [field["Anonymous"] for field in fields] == ["0"]


def test_a_missing_coco_is_named_with_the_ways_to_get_one(coco_root, tmp_path, monkeypatch):
    assert "download" not in refusal(open_index, tmp_path / "nowhere")  # 20 GB into somebody's own folder
    monkeypatch.chdir(tmp_path)
    assert "`python tools/download_coco.py --root data/coco` fetches COCO" in refusal(open_index, Path("data/coco"))
    shutil.rmtree(coco_root / TRAIN)
    assert f"{coco_root / TRAIN} is missing" in refusal(COCOPersonDataset, coco_root, TRAIN)
    (coco_root / TRAIN).mkdir()
    message = refusal(COCOPersonDataset, coco_root, TRAIN)
    assert f"(10 photos not on disk ({FIRST}, tried as {coco_root / TRAIN / FIRST}, ...))" in message
