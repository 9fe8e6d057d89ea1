"""The person index: built once, followed, repaired, and what is left out of it."""

from __future__ import annotations

import os
import pickle
import pwd
import random
import re
import shutil
import sys
import unicodedata
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import (
    add_person,
    compressed_rle,
    edit,
    fresh_python,
    persons_of,
    refusal,
)

from datasets import COCOPersonDataset
from loading import index as person_index
from loading.annotations import describe_left_out
from loading.index import PersonIndex, open_index
from tools.bench.full_size import make_split

TRAIN = "train2017"
FIRST = "000000000001.jpg"  # width 48, height 64 in `coco_root`


def hide_photo_1(content: dict) -> None:  # the file keeps its length
    for annotation in persons_of(content, 1):
        annotation["category_id"] = 8


def drop_photo_1(content: dict) -> None:
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 1]


def test_the_index_is_built_once_and_mapped_and_leaves_nothing_else_behind(coco_root, capsys, monkeypatch):
    index = open_index(coco_root, TRAIN)
    assert "Reading" in capsys.readouterr().out
    monkeypatch.setattr(person_index, "read_persons", lambda *_: pytest.fail("read again"))
    again = open_index(coco_root, TRAIN)
    assert all(np.array_equal(again.alpha(i), index.alpha(i)) for i in range(10))
    assert capsys.readouterr().out == ""
    assert [*index.path.parent.iterdir()] == [index.path] == person_index.index_places(coco_root, TRAIN)[:1]
    assert sys.platform != "linux" or str(index.path) in Path("/proc/self/maps").read_text()
    assert len(pickle.dumps(again)) < 1000


@pytest.mark.parametrize(
    "change",
    [lambda root: edit(root, hide_photo_1), lambda root: edit(root, drop_photo_1, keep_time=True),
     lambda root: (root / TRAIN / FIRST).unlink()],
    ids=["same length", "same time", "photo removed"],
)  # fmt: skip
def test_the_index_follows_the_annotations_and_the_photos(coco_root, change):
    os.utime(coco_root / TRAIN, ns=(0, 0))
    path = open_index(coco_root, TRAIN).path
    held = path.with_suffix(".held")
    os.link(path, held)  # as another process has it open
    before = held.read_bytes()
    change(coco_root)
    assert len(open_index(coco_root, TRAIN)) == 9
    assert held.read_bytes() == before


@pytest.mark.parametrize("folder", ["old", "new"])
def test_the_index_follows_photos_that_are_added(coco_root, folder):
    def into_folders(content: dict) -> None:
        for image in content["images"]:
            image["file_name"] = f"{folder if image['id'] == 1 else 'old'}/{image['file_name']}"

    edit(coco_root, into_folders)
    (coco_root / TRAIN).rename(coco_root / "old")
    (coco_root / "old" / FIRST).rename(coco_root / FIRST)
    (coco_root / TRAIN).mkdir()
    (coco_root / "old").rename(coco_root / TRAIN / "old")
    os.utime(coco_root / TRAIN / "old", ns=(0, 0))
    assert len(open_index(coco_root, TRAIN)) == 9
    (coco_root / TRAIN / folder).mkdir(exist_ok=True)
    (coco_root / FIRST).rename(coco_root / TRAIN / folder / FIRST)
    assert len(open_index(coco_root, TRAIN)) == 10


@pytest.mark.parametrize(
    "damage",
    [lambda good: good[: len(good) // 2], lambda good: b"", lambda good: random.Random(0).randbytes(len(good)),
     lambda good: good.replace(b"fingerprint", b"fingerPRINT"),
     lambda good: good.replace(b"2.jpg", b"\xff.jpg")],
    ids=["cut", "empty", "random", "in the header", "in the middle"],
)  # fmt: skip
def test_a_damaged_index_is_built_again(coco_root, damage):
    index = open_index(coco_root, TRAIN)
    good = index.path.read_bytes()
    index.path.unlink()
    index.path.write_bytes(damage(good))
    again = open_index(coco_root, TRAIN)
    assert [again.file_name(i) for i in range(10)] == [index.file_name(i) for i in range(10)]
    assert all(np.array_equal(again.alpha(i), index.alpha(i)) for i in range(10))


def test_an_index_of_another_version_is_built_again(coco_root, monkeypatch, capsys):
    for version in (person_index.INDEX_VERSION, person_index.INDEX_VERSION + 1):
        monkeypatch.setattr(person_index, "INDEX_VERSION", version)
        open_index(coco_root, TRAIN)
    assert capsys.readouterr().out.count("Reading") == 2


def test_an_older_programs_index_is_no_damaged_one(coco_root, capsys):
    index = open_index(coco_root, TRAIN)
    content = torch.load(index.path, weights_only=True)
    del content["is_shown"]
    content["fingerprint"]["version"] -= 1
    torch.save(content, index.path)
    capsys.readouterr()
    assert len(open_index(coco_root, TRAIN)) == 10
    said = capsys.readouterr().out
    assert said.startswith("Reading ")
    assert said.count("\n") == 1


def test_read_only_roots_keep_their_indexes_apart_in_the_cache(coco_root, tmp_path, capsys):
    other = shutil.copytree(coco_root, tmp_path / "other")
    edit(other, hide_photo_1, keep_time=True)  # to the byte count and the clock the same
    for root in (coco_root, other):
        root.chmod(0o555)  # root could write there all the same
    cache = Path(os.environ["XDG_CACHE_HOME"])
    for root, length in [(coco_root, 10), (other, 9)] * 2:
        index = open_index(root, TRAIN)
        assert len(index) == length
        assert index.path == person_index.index_places(root, TRAIN)[1]
        assert index.path.is_relative_to(cache)
        assert not (root / ".silueta").exists()
    assert capsys.readouterr().out.count("Reading") == 2
    shutil.rmtree(cache)
    cache.mkdir(mode=0o555)
    assert all(text in refusal(open_index, other, TRAIN) for text in (str(other), str(cache), "XDG_CACHE_HOME"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos\nat 64")])
def test_a_full_disk_leaves_no_part_and_the_cache_takes_over(coco_root, monkeypatch, error):
    def save(content: dict, path: Path) -> None:
        if Path(path).is_relative_to(coco_root):
            Path(path).write_bytes(b"a part")
            raise error
        genuine_save(content, path)

    genuine_save = torch.save
    monkeypatch.setattr(torch, "save", save)
    assert open_index(coco_root, TRAIN).path == person_index.index_places(coco_root, TRAIN)[1]
    assert [*(coco_root / ".silueta").iterdir()] == []


@pytest.mark.parametrize("cache", ["a file", "x" * 300, None], ids=["a file", "no name", "no home"])
def test_a_cache_folder_that_cannot_be_had_matters_only_where_it_is_needed(coco_root, tmp_path, monkeypatch, cache):
    (tmp_path / "a file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache) if cache else "")
    if cache is None:  # a container's user that has no home
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert len(open_index(coco_root, TRAIN)) == 10
    shutil.rmtree(coco_root / ".silueta")
    coco_root.chmod(0o555)
    assert str(coco_root) in refusal(open_index, coco_root, TRAIN)


def test_many_photos_are_drawn_by_several_processes_with_the_same_result(coco_root, monkeypatch, capfd):
    edit(coco_root, lambda content: [add_person(content, [[n % 30 + 12, 1, 9, 1, 9, 9]], n % 9) for n in range(3000)])
    edit(coco_root, lambda content: add_person(content, 7, 9))
    shared_out, draw_all = [], person_index.draw_all
    monkeypatch.setattr(person_index, "draw_all", lambda work, processes: (shared_out.append(processes),
                                                                           draw_all(work, processes))[1])  # fmt: skip
    first = open_index(coco_root, TRAIN)
    masks, left_out = [first.alpha(i) for i in range(9)], first.left_out
    monkeypatch.setattr(person_index, "MANY_PHOTOS", 1)
    for cores, processes in [(1, 1), (2, 2), (64, 4)]:
        monkeypatch.setattr(person_index, "usable_cores", lambda cores=cores: cores)
        first.path.unlink()
        index = open_index(coco_root, TRAIN)
        assert all(np.array_equal(index.alpha(i), masks[i]) for i in range(9))
        assert (index.left_out, shared_out.pop()) == (left_out, processes)
    assert len(left_out) == 2
    assert capfd.readouterr().err == ""


def test_a_drawing_process_that_dies_is_named_with_the_file(coco_root, monkeypatch):
    def draw_all(*_):
        raise BrokenProcessPool("ended")

    monkeypatch.setattr(person_index, "draw_all", draw_all)
    assert "instances_train2017.json" in refusal(open_index, coco_root, TRAIN)
    assert not (coco_root / ".silueta").exists()


GROWTH = """if True:
    import gc, sys
    from loading.index import open_index
    indexes = []
    for root in sys.argv[2:]:
        gc.collect()
        before = len(gc.get_objects())
        indexes.append(open_index(root, sys.argv[1]))
        gc.collect()
        print(len(gc.get_objects()) - before)"""


def test_an_open_index_is_a_few_objects_and_pages_that_every_process_shares(tmp_path):
    """So that workers, which touch every object that they use, and copy its page by that, have nothing to copy."""
    indexes, roots = [], []
    for photos in (2000, 20, 2000):  # the first time makes what lasts, and more of it for many photos
        roots.append(tmp_path / str(photos) / str(len(roots)))
        make_split(roots[-1], TRAIN, photos, photos)
        indexes.append(open_index(roots[-1], TRAIN))
    objects = [int(line) for line in fresh_python(GROWTH, TRAIN, *roots)]  # here other threads make some too
    assert 0 < objects[1] == objects[2] < 100
    index = indexes[-1]
    for number in range(len(index)):
        index.file_name(number), index.alpha(number)
    if sys.platform == "linux":
        mapped = Path("/proc/self/smaps").read_text().split(str(index.path))[1:]
        fields = [dict(re.findall(r"(\w+): +(\d+) kB", entry.split("VmFlags")[0])) for entry in mapped]
        assert sum(int(field["Rss"]) for field in fields) * 1024 > 0.9 * index.path.stat().st_size
        assert [field["Anonymous"] for field in fields] == ["0"]


# --- data that cannot be used -----------------------------------------------------------------------------


def test_a_missing_coco_is_named_with_the_ways_to_get_one(coco_root, tmp_path, monkeypatch):
    message = refusal(open_index, tmp_path / "nowhere", TRAIN)
    assert all(text in message for text in (str(tmp_path / "nowhere"), "--annotations", "--sample"))
    assert "download" not in message  # 20 GB into somebody's own folder
    monkeypatch.chdir(tmp_path)
    assert "`python tools/download_coco.py --root data/coco` fetches COCO" in refusal(open_index, "data/coco", TRAIN)
    shutil.rmtree(coco_root / TRAIN)
    assert f"{coco_root / TRAIN} is missing" in refusal(COCOPersonDataset, coco_root, TRAIN)
    (coco_root / TRAIN).mkdir()
    assert str(coco_root / TRAIN) in refusal(COCOPersonDataset, coco_root, TRAIN)


NOT_COCO = [
    b"", b"[]", b"null", b'{"info": ' + b"[" * 99_999, b'{"images": [], "annotations": []}', b'{"images": [NaN]}',
    b'{"images": {"1": 2}, "annotations": [], "categories": []}',
    b'{"images": [], "annotations": [], "categories": []}',
    b'{"images": [{"id": "x", "file_name": 1}], "annotations": [], "categories": []}',
]  # fmt: skip


def test_an_annotation_file_that_is_cut_or_not_coco_is_named(coco_root):
    path = coco_root / "annotations" / f"instances_{TRAIN}.json"
    whole = path.read_bytes()
    beyond = [whole.replace(b"1.jpg", b"\xff.jpg"), whole.replace(b'd": 1,', b'd": 9223372036854775808,')]
    for text in NOT_COCO + beyond + [whole[:length] for length in range(1, len(whole), 97)]:
        path.write_bytes(text)
        assert str(path) in refusal(open_index, coco_root, TRAIN)
    path.write_bytes(whole.replace(b'"person"', b'"human"'))
    assert all(text in refusal(open_index, coco_root, TRAIN) for text in (str(path), "'person'"))


@pytest.mark.parametrize(
    "name", ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "..\\x.jpg", "C:\\x.jpg", "", "a/", "..", "x\0.jpg", "../\n"]
)
def test_names_that_leave_the_photo_folder_are_refused(coco_root, name):
    edit(coco_root, lambda content: content["images"][3].update(file_name=name))
    assert repr(name) in refusal(open_index, coco_root, TRAIN)


def test_links_out_of_the_photo_folder_are_not_followed(coco_root, tmp_path):
    photos = coco_root / TRAIN
    (photos / FIRST).rename(tmp_path / FIRST)
    (photos / FIRST).symlink_to(tmp_path / FIRST)
    (photos / "away").symlink_to(tmp_path)
    (photos / "000000000002.jpg").rename(photos / "held.jpg")
    (photos / "000000000002.jpg").symlink_to("held.jpg")
    (photos / "000000000003.jpg").unlink()
    (photos / "000000000003.jpg").symlink_to("000000000003.jpg")  # a link to itself
    (photos / "000000000005.jpg").unlink()
    os.mkfifo(photos / "000000000005.jpg")  # to read it would wait for ever
    edit(coco_root, lambda content: content["images"][3].update(file_name=f"away/{FIRST}"))
    photos.rename(tmp_path / "the photos")  # the folder as a whole may lie wherever its owner wants it
    photos.symlink_to(tmp_path / "the photos")
    index = open_index(coco_root, TRAIN)
    assert [index.image_id(i) for i in range(len(index))] == [2, 6, 7, 8, 9, 10]
    away = f"photos behind a link out of the photo folder ({FIRST}, ...)"
    missing = f"photos not on disk (000000000003.jpg, tried as {photos}/000000000003.jpg, ...)"
    assert index.left_out == {away: 2, missing: 2}


UNDRAWABLE = [
    7, "person", [["1"] * 6], [[1, 1, 9, 9]], [[1, 1, 9, 1, 9, 9, 5]], [[1, 1], []], [[90] * 6],
    [[5, 5, 5, 5, 5, 5]], [[1, 1, 9, 1, 9, 9], [1, 2, 3, 4, 5]], {"size": [64, 48], "counts": [3072]},
    [[1, 1, 1e9, 1, 9, 9]], [[1, 1, 9, -1e300, 9, 9]], [[1, 1, 9, 1, 9, 2**70]], {"size": [64, 48]},
    {"size": [48, 64], "counts": [3072]}, {"size": [64], "counts": [3072]}, {"size": [64, 48], "counts": [3071]},
    {"size": [64, 48], "counts": []}, {"size": [64, 48], "counts": [4000, -928]},
    {"size": [64, 48], "counts": [1.5, 3070.5]}, {"size": [64, 48], "counts": [2**32 + 3072]},
    {"size": [64, 48], "counts": ""}, {"size": [64, 48], "counts": "P" * 99}, {"size": [64, 48], "counts": "é\0"},
]  # fmt: skip


BOX_ALONE = (None, [], [[]])  # as detectors' annotation files have it


@pytest.mark.parametrize("segmentation", [*UNDRAWABLE, *BOX_ALONE], ids=ascii)
def test_a_photo_with_a_person_who_cannot_be_drawn_is_left_out_and_counted(coco_root, segmentation):
    why = "has a box and no mask" if segmentation in BOX_ALONE else "cannot be drawn"
    edit(coco_root, lambda content: add_person(content, segmentation))
    for beside in ("good ones", "bad ones"):
        index = open_index(coco_root, TRAIN)
        assert (len(index), index.image_id(0)) == (9, 2), beside
        assert index.left_out == {f"photo with a person who {why} ({FIRST})": 1}
        edit(coco_root, lambda content: [a.update(segmentation=segmentation) for a in persons_of(content, 1)])


@pytest.mark.parametrize(
    "others",
    [[{"file_name": "000000000002.jpg"}], [{"width": 64, "height": 48}], [{"file_name": "absent.jpg"}] * 2,
     [{"width": 0}, {}], [{"file_name": "000000000011.jpg"}, {}, {"height": 65}]],
    ids=["another file", "another size", "absent", "no size", "three"],
)  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_of_photos_under_one_id_none_is_trusted(coco_root, others, first):
    def take_id_1(content: dict) -> None:
        place = 0 if first else len(content["images"])
        content["images"][place:place] = [content["images"][0] | other for other in others]

    edit(coco_root, take_id_1)
    index = open_index(coco_root, TRAIN)
    assert [index.image_id(i) for i in range(len(index))] == [*range(2, 11)]
    assert [*index.left_out][-1].startswith("photos under an id that another has (")


def test_a_record_that_is_written_twice_is_one(coco_root):
    edit(coco_root, lambda content: content["images"].append(content["images"][0]))
    index = open_index(coco_root, TRAIN)
    assert (len(index), index.left_out) == (10, {})


@pytest.mark.parametrize("name", [FIRST, f"./{FIRST}", f".//{FIRST}"])
def test_of_several_records_of_a_file_with_persons_none_is_trusted(coco_root, name):
    """Its persons may be shared out among them, or belong to another file: that nobody can tell."""

    def record_again(content: dict) -> None:
        content["images"].append(content["images"][0] | {"id": 77, "file_name": name})
        content["images"].append(content["images"][1] | {"id": 78})  # no persons: the other has them all
        add_person(content, [[1, 1, 9, 1, 9, 9]], 77)

    edit(coco_root, record_again)
    index = open_index(coco_root, TRAIN)
    assert [index.image_id(i) for i in range(len(index))] == [*range(2, 11)]
    assert index.left_out == {f"photo records of a file that has several ({FIRST}, ...)": 2}


@pytest.mark.parametrize("names", [("person", "Person"), ("PERSON", " person\t"), ("person", "person")])
def test_categories_that_differ_in_case_and_spaces_are_one(coco_root, names):
    whole = [open_index(coco_root, TRAIN).alpha(i) for i in range(10)]

    def rename(content: dict) -> None:
        content["categories"] += [{"id": 5, "name": names[1], "supercategory": None}]
        content["categories"][0]["name"] = names[0]
        for annotation in content["annotations"][::3]:  # the first of each photo's persons
            annotation["category_id"] = 5

    edit(coco_root, rename)
    index = open_index(coco_root, TRAIN)
    assert all(np.array_equal(index.alpha(i), whole[i]) for i in range(10))
    assert index.left_out == {}


def test_what_is_a_person_by_its_supercategory_alone_is_neither_person_nor_background(coco_root):
    def add_a_child(content: dict) -> None:
        content["categories"] += [{"id": 5, "name": "child", "supercategory": "Person"}]
        for number in (1, 11):  # on the last there is no other
            add_person(content, [[1, 1, 9, 1, 9, 9]], number)
            content["annotations"][-1]["category_id"] = 5

    edit(coco_root, add_a_child)
    index = open_index(coco_root, TRAIN)
    assert [index.image_id(i) for i in range(len(index))] == [*range(2, 11)]
    assert index.left_out == {f"photo with what is a person by its supercategory alone ({FIRST})": 1}


def test_one_category_id_for_a_person_and_another_thing_is_refused(coco_root):
    edit(coco_root, lambda content: content["categories"].append({"id": 1, "name": "Dog "}))
    assert "one id for 'person' and another category, 1" in refusal(open_index, coco_root, TRAIN)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", None)])
def test_names_are_found_in_another_unicode_form(coco_root, forms):
    written, there = (unicodedata.normalize(form or "NFC", "Fotos äé/Việt Å.jpg") for form in forms)
    if forms[1] is None:  # of some Windows keyboards: neither composed nor decomposed
        there = "Fotos äé/Vi" + unicodedata.normalize("NFC", "ê") + "\u0323t Å.jpg"
    (coco_root / TRAIN / there).parent.mkdir()
    (coco_root / TRAIN / FIRST).rename(coco_root / TRAIN / there)
    edit(coco_root, lambda content: content["images"][0].update(file_name=written))
    index = open_index(coco_root, TRAIN)
    assert (len(index), index.left_out, index.file_name(0)) == (10, {}, there)
    os.utime(coco_root / TRAIN / Path(there).parent, ns=(0, 0))
    assert open_index(coco_root, TRAIN).fingerprint != index.fingerprint  # its folder is watched under its own name


def test_the_exact_name_comes_before_another_form_and_one_file_is_not_two(coco_root):
    names = [unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD")]
    for number, name in enumerate(names):
        (coco_root / TRAIN / f"{number + 1:012d}.jpg").rename(coco_root / TRAIN / name)

    def rename(content: dict) -> None:
        for number, name in enumerate(names):
            content["images"][number]["file_name"] = name

    edit(coco_root, rename)
    index = open_index(coco_root, TRAIN)
    assert [index.file_name(i) for i in range(2)] == names
    (coco_root / TRAIN / names[0]).unlink()
    index = open_index(coco_root, TRAIN)
    assert (len(index), [*index.left_out.values()]) == (8, [2])


def test_every_reason_has_an_example_and_the_number_its_grammar(coco_root):
    def spoil(content: dict) -> None:
        content["images"][0].update(file_name="gone\n.jpg")
        for number in (2, 3):
            content["images"][number - 1].update(width=0)
        for number in (998, 999):
            add_person(content, [[1, 1, 9, 1, 9, 9]], number)

    edit(coco_root, spoil)
    assert describe_left_out(open_index(coco_root, TRAIN).left_out) == (
        "2 photo records of an impossible size (000000000002.jpg, ...), "
        "2 annotations of an unknown photo (image_id 998, ...), "
        f"1 photo not on disk (gone\\n.jpg, tried as {coco_root / TRAIN}/gone\\n.jpg)"
    )


# --- how the file is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_a_byte_order_mark_and_other_encodings_are_read(coco_root, encoding):
    path = edit(coco_root, lambda content: content.update(info={"description": "Fotos äé"}))
    checksum = open_index(coco_root, TRAIN).checksum()
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    path.write_bytes((mark + path.read_text()).encode(encoding))
    assert open_index(coco_root, TRAIN).checksum() == checksum
    path.write_bytes(path.read_bytes()[:-3])
    assert str(path) in refusal(open_index, coco_root, TRAIN)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_has_not_are_harmless_where_nobody_reads_them_and_named_elsewhere(coco_root, number):
    def spoil(content: dict) -> None:
        content["annotations"][0].update(area=float(number), note="NaN, Infinity")
        content["info"] = {"version": float(number)}

    checksum = open_index(coco_root, TRAIN).checksum()
    path = edit(coco_root, spoil)
    whole = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + whole)
    assert open_index(coco_root, TRAIN).checksum() == checksum
    path.write_bytes(whole)
    edit(coco_root, lambda content: add_person(content, [[1, 1, 9, float(number), 9, 9]], 2))
    assert open_index(coco_root, TRAIN).left_out == {"photo with a person who cannot be drawn (000000000002.jpg)": 1}
    edit(coco_root, lambda content: content["images"][3].update(width=float(number)))
    assert "$.images[3].width" in refusal(open_index, coco_root, TRAIN)


@pytest.mark.parametrize(
    ("change", "length"),
    [(lambda content: add_person(content, [[1, 1, 9, 1, 9, 9]], image_id=999), 10),
     (lambda content: content["images"][0].update(file_name="absent.jpg"), 9),
     (lambda content: content["images"][0].update(width=0), 9),
     (lambda content: content["images"][0].update(width=-48, height=-64), 9),
     (lambda content: content["images"][0].update(width=10**6, height=10**6), 9),
     (lambda content: content["images"][0].update(width=10**30), 9)],
    ids=["unknown photo", "absent", "no width", "negative", "too large", "absurd"],
)  # fmt: skip
def test_records_that_lead_nowhere_are_left_out_and_counted(coco_root, change, length):
    edit(coco_root, change)
    index = open_index(coco_root, TRAIN)
    assert [index.image_id(i) for i in range(len(index))] == [*range(11 - length, 11)]
    assert [index.file_name(i) for i in range(len(index))] == [f"{n:012d}.jpg" for n in range(11 - length, 11)]
    assert next(iter(index.left_out.values())) == 1


def test_damaged_run_lengths_never_crash(coco_root):
    disc = cv2.circle(np.zeros((64, 48), np.uint8), (19, 28), 12, 255, -1)
    dice, good = random.Random(0), compressed_rle(disc)["counts"]
    texts = ["".join(chr(dice.randrange(40, 120)) for _ in range(dice.randrange(30))) for _ in range(300)]
    texts += [good[:k] + "".join(map(chr, dice.choices(range(48, 112), k=2))) + good[k + 1 :] for k in range(len(good))]
    texts += [good[:k] for k in range(len(good))]
    drawn = [{"size": [64, 48], "counts": text} for text in texts]

    def one_a_photo(content: dict) -> None:
        content["images"] = [content["images"][0] | {"id": n, "file_name": f"{n}.jpg"} for n in range(len(drawn) + 1)]
        content["annotations"] = []
        for n, segmentation in enumerate([*drawn, [[1, 1, 9, 1, 9, 9]]]):
            os.link(coco_root / TRAIN / FIRST, coco_root / TRAIN / f"{n}.jpg")
            add_person(content, segmentation, n)

    edit(coco_root, one_a_photo)
    index = open_index(coco_root, TRAIN)
    assert index.left_out == {"photos with a person who cannot be drawn (0.jpg, ...)": len(drawn)}
    assert index.image_id(0) == len(drawn)


def test_a_photo_as_thin_as_a_thread_does_not_crash(coco_root):  # pycocotools overflows an int, with a segfault
    edit(coco_root, lambda content: content["images"][0].update(width=2**28, height=1))
    edit(coco_root, lambda content: add_person(content, [[0, 0, 1e9, 0, 1e9, 1e9]]))
    code = """if True:
        import resource, sys
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        from loading import index as person_index
        print(len(person_index.open_index(sys.argv[1], "train2017")) >= 9)"""
    assert fresh_python(code, coco_root)[-1:] == ["True"]


def test_a_change_while_the_annotations_are_read_is_not_missed(coco_root, monkeypatch):
    def parse_then_change(*args: object) -> object:
        content = genuine_parse(*args)
        edit(coco_root, hide_photo_1)
        return content

    genuine_parse = person_index.read_persons
    monkeypatch.setattr(person_index, "read_persons", parse_then_change)
    open_index(coco_root, TRAIN)
    monkeypatch.setattr(person_index, "read_persons", genuine_parse)
    assert len(open_index(coco_root, TRAIN)) == 9


def test_an_annotation_file_that_is_a_folder_is_named(coco_root):
    path = coco_root / "annotations" / f"instances_{TRAIN}.json"
    path.unlink()
    path.mkdir()
    assert str(path) in refusal(open_index, coco_root, TRAIN)


def test_a_checksum_is_of_every_photo_and_mask(coco_root, tmp_path):
    index = open_index(coco_root, "train2017")
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
