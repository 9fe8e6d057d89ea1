"""COCO-format files from other hands: their categories, ids, encodings and names of photos."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from helpers import add_person, edit, refusal
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from loading.files import PhotoFolder
from loading.index import PersonIndex, index_of
from loading.layout import DataOptions, find_layout

TRAIN, FIRST = "train2017", "000000000001.jpg"
TRIANGLE = [[1, 1, 9, 1, 9, 9]]


def ids_of(index: PersonIndex) -> list[int]:
    return [index.image_id(i) for i in range(len(index))]


def open_index(root: Path, category: str = "person") -> PersonIndex:
    return index_of(find_layout(root, TRAIN, options=DataOptions(category)))


def rename_categories(root: Path, first: str = "Pedestrian", second: str = "rider") -> Path:
    """Makes the second person of each photo one of another category than the first."""

    def rename(content: dict) -> None:
        names = {1: first, 5: second, 18: "dog"}
        content["categories"] = [{"id": n, "name": name, "supercategory": None} for n, name in names.items()]
        for annotation in content["annotations"][1::3]:
            annotation["category_id"] = 5

    return edit(root, rename)


@pytest.mark.parametrize(
    ("first", "second", "category", "ids"),
    [("Pedestrian", "rider", "pedestrian,rider", [1, 5]), ("Pedestrian", "rider", " RIDER ,car", [5]),
     ("PERSON", " person\t", "person", [1, 5]), ("CAT", "Cat", "Cat", [5]), ("cat", "cat", "cat", [1, 5])],
)  # fmt: skip
def test_categories_are_merged_as_pycocotools_merges_them(coco_root, first, second, category, ids):
    coco = COCO(rename_categories(coco_root, first, second))
    open_index(coco_root, "dog")  # each choice has an index of its own
    index = open_index(coco_root, category)
    for i in range(10):
        drawn = [coco.annToRLE(a) for a in coco.loadAnns(coco.getAnnIds(index.image_id(i), catIds=ids))]
        assert np.array_equal(index.alpha(i) > 0, coco_mask.decode(coco_mask.merge(drawn)))
    missing = {"--category name that the file does not have (car)": 1}
    assert (len(index), index.left_out) == (10, missing if "car" in category else {})


def test_a_file_without_the_category_is_refused_with_the_names_that_it_has(coco_root):
    rename_categories(coco_root)
    message = refusal(open_index, coco_root)
    assert f"{TRAIN}.json has no category named 'person': it has Pedestrian, dog, rider; --category names" in message
    assert "named 'car' or 'bus'" in refusal(open_index, coco_root, "car,bus")
    assert "--category names no category" in refusal(open_index, coco_root, " ,")
    edit(coco_root, lambda content: content["categories"].append({"id": 5, "name": "Dog "}))
    assert "one id for 'rider' and another category, 5" in refusal(open_index, coco_root, "rider")
    many = [{"id": n, "name": f"{n}\n"} for n in range(1000, 2000)]
    edit(coco_root, lambda content: content.update(categories=many))
    assert "it has 1000, 1001, " in refusal(open_index, coco_root)[:500]


def add_image(content: dict, position: int = 11, **changes: object) -> None:
    content["images"].insert(position, content["images"][0] | changes)


def add_child(content: dict) -> None:
    content["categories"].append({"id": 5, "name": "child", "supercategory": "Person"})
    for image_id in (1, 11):  # there is nobody else on the last photo
        add_person(content, TRIANGLE, image_id)
        content["annotations"][-1]["category_id"] = 5


SHARED_ID, SIZE = "photos with the id of another photo", "photo record with an impossible size"
INVALID = "photo with a person whose segmentation is invalid"
UNUSABLE = {  # what makes the first photo unusable; the reason; the number that is counted for it
    "id of another size": (lambda content: add_image(content, width=64, height=48), SHARED_ID, 2),
    "id of one before": (lambda content: add_image(content, 0, file_name="absent.jpg"), SHARED_ID, 2),
    "another record": (lambda content: (add_image(content, id=77), add_person(content, TRIANGLE, 77)),
                       "photo records of a file that has several", 2),
    "no width": (lambda content: content["images"][0].update(width=0), SIZE, 1),
    "large": (lambda content: content["images"][0].update(width=10**6, height=10**6), SIZE, 1),
    "a child": (add_child, "photo with an object that is a person by its supercategory only", 1),
    "not a number": (lambda content: add_person(content, [[1, 1, 9, float("nan"), 9, 9]]), INVALID, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_photo_whose_mask_may_be_wrong_is_left_out_and_counted(coco_root, name):
    change, reason, number = UNUSABLE[name]
    edit(coco_root, change)
    index = open_index(coco_root)
    assert ids_of(index) == [*range(2, 11)]
    ((described, counted),) = index.left_out.items()
    assert (described.partition(" (")[0], counted) == (reason, number)


def test_five_rectangles_of_a_set_are_bounding_boxes(coco_root):
    rectangle, reason = [[5, 5, 25, 5, 25, 30, 5, 30]], "photos with a person who has a bounding box and no mask"
    edit(coco_root, lambda content: [add_person(content, rectangle, image_id) for image_id in range(1, 5)])
    assert open_index(coco_root).left_out == {}
    edit(coco_root, lambda content: add_person(content, rectangle, 5))
    assert ids_of(open_index(coco_root)) == [*range(6, 11)]
    assert open_index(coco_root).left_out == {f"{reason} ({FIRST}, ...)": 5}


def test_an_annotation_file_that_is_cut_or_not_coco_is_named(coco_root):
    path = coco_root / "annotations" / f"instances_{TRAIN}.json"
    whole = path.read_bytes()
    not_coco = [
        b"", b"[]", b'{"info": ' + b"[" * 99_999, b'{"images": [], "annotations": []}', b'{"images": [NaN]}',
        b'{"images": [], "annotations": [], "categories": []}', whole + b"x", whole.replace(b": ", b" ", 1),
        whole.replace(b"1.jpg", b"\xff.jpg"), whole.replace(b'd": 1,', b'd": 9223372036854775808,'),
    ]  # fmt: skip
    for text in not_coco:
        path.write_bytes(text)
        assert str(path) in (message := refusal(open_index, coco_root))
        assert ("is cut short" in message) == (not text)
    for length in range(1, len(whole), 499):
        path.write_bytes(whole[:length])
        assert refusal(open_index, coco_root).startswith(f"{path} is cut short: ")


def write_numbers_as_texts(content: dict) -> None:
    for image in content["images"]:
        image.update(id=str(image["id"]), width=float(image["width"]), height=f"{image['height']}.0")


def write_numbers_beyond_json(content: dict) -> None:
    content["annotations"][0].update(area=float("nan"), note="NaN, Infinity")
    content["info"] = {"version": float("-inf")}


def write_names_as_addresses(content: dict) -> None:
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/{TRAIN}/{image.pop('file_name')}"


def write_records_that_change_nothing(content: dict) -> None:
    add_image(content)  # the same again
    add_image(content, id=78)  # another of its file, without persons


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-be"])
@pytest.mark.parametrize("write", [write_numbers_as_texts, write_numbers_beyond_json, write_names_as_addresses,
                                   write_records_that_change_nothing])  # fmt: skip
def test_what_tools_write_differently_is_the_same(coco_root, write, encoding):
    checksum, path = open_index(coco_root).checksum(), edit(coco_root, write)
    path.write_bytes(path.read_text().encode(encoding))
    index = open_index(coco_root)
    assert (index.checksum(), index.left_out) == (checksum, {})
    path.write_bytes(path.read_bytes()[:-3])
    assert str(path) in refusal(open_index, coco_root)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"width": "wide"}, " is not a COCO annotation file: Expected `int`, got `str` - at `$.images[3].width`"),
     ({"width": float("inf")}, "$.images[3].width"), ({"file_name": None}, " without file_name: the one of id 4")],
)  # fmt: skip
def test_a_wrong_field_is_named_with_its_record(coco_root, change, words):
    edit(coco_root, lambda content: content["images"][3].update(change))
    assert words in refusal(open_index, coco_root)


NFC, NFD = (unicodedata.normalize(form, "Fotos äé/Việt Å.jpg") for form in ("NFC", "NFD"))
MIXED = "Fotos äé/Vi" + unicodedata.normalize("NFC", "ê") + "\u0323t Å.jpg"  # as some Windows keyboards write it
FOUND = {
    "1.jpg": ["1.jpg"], ".//1.jpg": ["1.jpg"], "export/images/1.jpg": ["1.jpg"], "2.jpg": ["a/2.jpg"],
    "x/b/3.jpg": ["a/b/3.jpg"], "x/4.jpg": ["day/4.jpg", "night/4.jpg"], "x/night/4.jpg": ["night/4.jpg"],
    "gone.jpg": [], "a/1.jpg": [],  # a folder that exists is meant
    "inside.jpg": ["inside.jpg"], "link.jpg": [""], "x/link.jpg": [], "away/secret.jpg": [""], ".hidden/5.jpg": [""],
    "round.jpg": [], "pipe.jpg": [],
    # as tools write them: absolute, relative to another folder, with the disk, as an address, quoted, in another case
    "/home/me/a/2.jpg": ["a/2.jpg"], "../../upload/1.jpg": ["1.jpg"], "..\\..\\media\\night\\4.jpg": ["night/4.jpg"],
    "C:\\set\\a\\2.jpg": ["a/2.jpg"], "D:1.jpg": ["1.jpg"], "file:///C:/set/a/2.jpg": ["a/2.jpg"],
    "/data/local-files/?d=set/night/4.jpg": ["night/4.jpg"], "https://host/upload/1.jpg?key=a/2.jpg": ["1.jpg"],
    "Jos%C3%A9%201.jpg": ["José 1.jpg"], "file:///x/b%2F3.jpg": ["a/b/3.jpg"], "100%.jpg": ["100%.jpg"],
    "A/2.jpg": ["a/2.jpg"], "x/Night/4.JPG": ["night/4.jpg"], "a/x\\1.jpg": ["1.jpg"],
    NFC: [MIXED], NFD: [MIXED], f"export/{NFC}": [MIXED], "\xc5.jpg": ["\xc5.jpg"], "\u212b.jpg": ["\u212b.jpg"],
    # nothing of these lies in the folder
    "../secret.jpg": [], "a/../../secret.jpg": [], "..\\secret.jpg": [], "file:///etc/passwd": [], "..": [], "a/": [],
    "": [], "a": [], "x\0/2.jpg": ["a/2.jpg"], "a\0.jpg": [], "?d=": [], "/": [], "C:": [],
}  # fmt: skip


def test_names_are_found_wherever_they_may_lie_and_nowhere_else(tmp_path):
    root, folder = tmp_path / "photos", tmp_path / "the folder"  # it may itself be a link
    for name in ("1.jpg", "a/2.jpg", "a/b/3.jpg", "day/4.jpg", "night/4.jpg", ".hidden/5.jpg", "100%.jpg", "José 1.jpg",
                 MIXED, "\xc5.jpg", "\u212b.jpg", "../secret.jpg"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    links = {"inside.jpg": "1.jpg", "link.jpg": "../secret.jpg", "round.jpg": "round.jpg", "away": "..", folder: root}
    for link, target in links.items():
        (root / link).symlink_to(target)
    os.mkfifo(root / "pipe.jpg")  # reading it would never end
    expected = FOUND | {str(tmp_path / "secret.jpg"): []}
    assert {name: PhotoFolder(folder).find(name) for name in expected} == expected


def test_photos_that_are_not_found_are_counted_with_an_example(coco_root, tmp_path):
    def change(content: dict) -> None:
        names = ("a/x.jpg", "gone\n.jpg", "away/secret.jpg", "gone.jpg", f"x/{FIRST}")
        for image, name in zip(content["images"], names, strict=False):
            image["file_name"] = name
        add_person(content, TRIANGLE, 999)

    photos = coco_root / TRAIN
    for name in ("day", "night"):
        (photos / name).mkdir()
        os.link(photos / FIRST, photos / name / "x.jpg")
    (photos / "away").symlink_to(tmp_path)
    edit(coco_root, change)
    index = open_index(coco_root)
    assert (ids_of(index), index.file_name(0)) == ([5, 6, 7, 8, 9, 10], FIRST)
    assert index.left_out == {
        "annotation of an unknown photo (image_id 999)": 1,
        "photo whose name matches several files (a/x.jpg)": 1,
        "photo behind a link, or in a hidden folder (away/secret.jpg)": 1,
        f"photos not on disk (gone\\n.jpg, tried as {photos}/gone\\n.jpg, ...)": 2,
    }  # fmt: skip
    os.utime(photos / "night", ns=(0, 0))
    os.link(photos / FIRST, photos / "night" / "gone.jpg")  # a new file in any folder is noticed
    assert open_index(coco_root).fingerprint != index.fingerprint
