"""The person index: built once, followed, repaired, and what is left out of it."""

from __future__ import annotations

import os
import pickle
import pwd
import re
import shutil
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import add_person, edit, persons_of, refusal

from loading import index as person_index
from loading.index import PersonIndex
from loading.layout import find_layout

TRAIN, FIRST = "train2017", "000000000001.jpg"  # width 48, height 64 in `coco_root`


def open_index(root: Path) -> PersonIndex:
    return person_index.index_of(find_layout(root, TRAIN))


def hide_photo_1(content: dict) -> None:  # the file keeps its length
    for annotation in persons_of(content, 1):
        annotation["category_id"] = 8


def test_the_index_is_built_once_and_leaves_nothing_else_behind(coco_root, capsys, monkeypatch):
    index = open_index(coco_root)
    assert "Reading" in capsys.readouterr().out
    monkeypatch.setattr(person_index, "read_persons", lambda *_: pytest.fail("read again"))
    again = open_index(coco_root)
    assert all(np.array_equal(again.alpha(i), index.alpha(i)) for i in range(10))
    assert capsys.readouterr().out == ""
    assert [*index.path.parent.iterdir()] == [index.path] == person_index.index_candidates(coco_root, TRAIN)[:1]
    assert len(pickle.dumps(again)) < 1000


@pytest.mark.parametrize("change", [lambda root: edit(root, hide_photo_1, keep_time=True),
                                    lambda root: (root / TRAIN / FIRST).unlink()], ids=["annotations", "photos"])
def test_the_index_follows_the_annotations_and_the_photos(coco_root, change):
    os.utime(coco_root / TRAIN, ns=(0, 0))
    path = open_index(coco_root).path
    os.link(path, held := path.with_suffix(".held"))  # as another process has it open
    before = held.read_bytes()
    change(coco_root)
    assert len(open_index(coco_root)) == 9
    assert held.read_bytes() == before


def test_a_change_while_the_annotations_are_read_is_not_missed(coco_root, monkeypatch):
    read = person_index.read_persons
    with monkeypatch.context() as patch:
        patch.setattr(person_index, "read_persons", lambda *args: (read(*args), edit(coco_root, hide_photo_1))[0])
        open_index(coco_root)
    assert len(open_index(coco_root)) == 9


@pytest.mark.parametrize("damage", [lambda good: good[: len(good) // 2],
                                    lambda good: good.replace(b"fingerprint", b"fingerPRINT"),
                                    lambda good: good.replace(b"2.jpg", b"\xff.jpg")])
def test_a_damaged_index_is_built_again(coco_root, damage, capsys):
    index = open_index(coco_root)
    good = index.path.read_bytes()
    index.path.unlink()
    index.path.write_bytes(damage(good))
    assert open_index(coco_root).checksum() == index.checksum()
    assert "is built again" in capsys.readouterr().out


def test_an_older_index_is_built_again_without_a_complaint(coco_root, capsys):
    path = open_index(coco_root).path
    content = torch.load(path, weights_only=True)
    del content["exif_applied"]
    content["fingerprint"]["version"] -= 1
    torch.save(content, path)
    capsys.readouterr()
    open_index(coco_root)
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
    make_unwritable(coco_root)
    other = shutil.copytree(coco_root, tmp_path / "other")
    edit(other, hide_photo_1, keep_time=True)  # to the byte count and the clock the same
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
    def checksum(**changes: object) -> str:
        torch.save(content | changes, tmp_path / "changed.index")
        return PersonIndex(tmp_path / "changed.index").checksum()

    index = open_index(coco_root)
    content = torch.load(index.path, weights_only=True)
    assert checksum() == index.checksum() != checksum(exif_applied=True)
    for name, place in product(content["arrays"].keys() - {"largest"}, (0, -1)):
        array = content["arrays"][name].clone()
        array.view(-1)[place] += 1
        assert checksum(arrays=content["arrays"] | {name: array}) != index.checksum(), name


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
