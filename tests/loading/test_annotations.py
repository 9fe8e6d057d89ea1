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


@pytest.fixture
def street(coco_root) -> Path:
    """A set of Pedestrian, rider and dog: the first person of each photo is a pedestrian, the second a rider."""

    def rename(content: dict) -> None:
        content["categories"] = [{"id": n, "name": name} for n, name in ((1, "Pedestrian"), (5, "rider"), (18, "dog"))]
        for annotation in content["annotations"][1::3]:
            annotation["category_id"] = 5

    edit(coco_root, rename)
    return coco_root


@pytest.mark.parametrize(
    ("category", "chosen"),
    [("pedestrian,rider", ["Pedestrian", "rider"]), (" RIDER ,", ["rider"]), ("dog", ["dog"])],
)
def test_categories_are_merged_as_pycocotools_merges_them(street, category, chosen):
    coco = COCO(street / "annotations" / f"instances_{TRAIN}.json")
    ids, index = coco.getCatIds(catNms=chosen), open_index(street, category)
    assert len(index) == 10
    for i in range(10):
        drawn = [coco.annToRLE(a) for a in coco.loadAnns(coco.getAnnIds(index.image_id(i), catIds=ids))]
        assert np.array_equal(index.alpha(i) > 0, coco_mask.decode(coco_mask.merge(drawn)))


def test_a_file_without_the_category_is_refused_with_the_names_that_it_has(street):
    message = refusal(open_index, street)
    assert f"{TRAIN}.json has no category named 'person': it has Pedestrian, dog, rider; --category names" in message
    assert "named 'car' or 'bus'" in refusal(open_index, street, "car,bus")
    assert "--category names no category" in refusal(open_index, street, " ,")
    edit(street, lambda content: content.update(categories=[{"id": n, "name": f"{n}\n"} for n in range(1000, 2000)]))
    assert "it has 1000, 1001, " in refusal(open_index, street)[:500]


def test_a_missing_one_of_several_categories_is_counted(street, capsys):
    index = open_index(street, "rider,car")
    assert (len(index), index.left_out) == (10, {"--category name that the file does not have (car)": 1})
    assert open_index(street, "rider").checksum() == index.checksum() != open_index(street, "dog").checksum()
    open_index(street, "rider,car")
    assert capsys.readouterr().out.count("Reading") == 3  # each choice has an index of its own


@pytest.mark.parametrize("names", [("person", "Person"), ("PERSON", " person\t"), ("person", "person")])
def test_categories_that_differ_in_case_and_spaces_are_one(coco_root, names):
    whole = [open_index(coco_root).alpha(i) for i in range(10)]

    def rename(content: dict) -> None:
        content["categories"] += [{"id": 5, "name": names[1], "supercategory": None}]
        content["categories"][0]["name"] = names[0]
        for annotation in content["annotations"][::3]:  # the first person of each photo
            annotation["category_id"] = 5

    edit(coco_root, rename)
    index = open_index(coco_root)
    assert all(np.array_equal(index.alpha(i), whole[i]) for i in range(10))
    assert index.left_out == {}


def test_one_id_of_a_person_and_another_category_is_refused(coco_root):
    edit(coco_root, lambda content: content["categories"].append({"id": 1, "name": "Dog "}))
    assert "one id for 'person' and another category, 1" in refusal(open_index, coco_root)


def add_image(content: dict, position: int = 11, **changes: object) -> None:
    content["images"].insert(position, content["images"][0] | changes)


def add_child(content: dict) -> None:
    content["categories"].append({"id": 5, "name": "child", "supercategory": "Person"})
    for image_id in (1, 11):  # there is nobody else on the last photo
        add_person(content, TRIANGLE, image_id)
        content["annotations"][-1]["category_id"] = 5


SHARED_ID, SIZE = "photos with the id of another photo", "photo record with an impossible size"
UNUSABLE = {  # what makes the first photo unusable; the reason; the number that is counted for it
    "id of another file": (lambda content: add_image(content, file_name="000000000002.jpg"), SHARED_ID, 2),
    "id of another size": (lambda content: add_image(content, width=64, height=48), SHARED_ID, 2),
    "id of one before": (lambda content: add_image(content, 0, file_name="absent.jpg"), SHARED_ID, 2),
    "another record": (lambda content: (add_image(content, id=77), add_person(content, TRIANGLE, 77)),
                       "photo records of a file that has several", 2),
    "no width": (lambda content: content["images"][0].update(width=0), SIZE, 1),
    "large": (lambda content: content["images"][0].update(width=10**6, height=10**6), SIZE, 1),
    "absurd": (lambda content: content["images"][0].update(width=10**30), SIZE, 1),
    "a child": (add_child, "photo with an object that is a person by its supercategory only", 1),
    "bbox": (lambda content: add_person(content, None), "photo with a person who has a bounding box and no mask", 1),
    "invalid": (lambda content: add_person(content, 7), "photo with a person whose segmentation is invalid", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_photo_whose_mask_may_be_wrong_is_left_out_and_counted(coco_root, name):
    change, reason, number = UNUSABLE[name]
    edit(coco_root, change)
    index = open_index(coco_root)
    assert ids_of(index) == [*range(2, 11)]
    ((described, counted),) = index.left_out.items()
    assert (described.partition(" (")[0], counted) == (reason, number)


@pytest.mark.parametrize("number", [4, 5, 10])
def test_rectangles_are_bounding_boxes_where_a_set_has_several(coco_root, number):
    def add_boxes(content: dict) -> None:
        for image_id in range(1, number + 1):
            add_person(content, [[5, 5, 25, 5, 25, 30, 5, 30]], image_id)

    edit(coco_root, add_boxes)
    reason = "photos with a person who has a bounding box and no mask"
    if number == 10:
        assert f"{number} {reason} ({FIRST}, ...)" in refusal(open_index, coco_root)
    else:
        index = open_index(coco_root)
        assert ids_of(index) == [*range(6 if number == 5 else 1, 11)]
        assert index.left_out == ({f"{reason} ({FIRST}, ...)": 5} if number == 5 else {})


def test_records_that_change_nothing_are_passed_over(coco_root):
    def change(content: dict) -> None:
        add_image(content)  # the same again
        add_image(content, id=78)  # another of its file, without persons
        add_person(content, TRIANGLE, 999)

    edit(coco_root, change)
    index = open_index(coco_root)
    assert (len(index), index.left_out) == (10, {"annotation of an unknown photo (image_id 999)": 1})


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
    for text in [*NOT_COCO, *beyond, whole + b"x", whole.replace(b": ", b" ", 1)]:
        path.write_bytes(text)
        assert str(path) in (message := refusal(open_index, coco_root))
        assert ("is cut short" in message) == (not text)
    for length in range(1, len(whole), 499):
        path.write_bytes(whole[:length])
        assert refusal(open_index, coco_root).startswith(f"{path} is cut short: ")


def test_numbers_may_be_texts_and_floats_and_a_wrong_one_is_named_with_its_record(coco_root):
    def write_differently(content: dict) -> None:
        for image in content["images"]:
            image.update(id=str(image["id"]), width=float(image["width"]), height=f"{image['height']}.0")

    checksum = open_index(coco_root).checksum()
    edit(coco_root, write_differently)
    assert open_index(coco_root).checksum() == checksum
    edit(coco_root, lambda content: content["images"][3].update(width="wide"))
    assert "is not a COCO annotation file: Expected `int`, got `str` - at `$.images[3].width`" in refusal(
        open_index, coco_root)  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
def test_a_byte_order_mark_and_other_encodings_are_read(coco_root, encoding):
    path = edit(coco_root, lambda content: content.update(info={"description": "Fotos äé"}))
    checksum = open_index(coco_root).checksum()
    path.write_bytes(path.read_text().encode(encoding))
    assert open_index(coco_root).checksum() == checksum
    path.write_bytes(path.read_bytes()[:-3])
    assert str(path) in refusal(open_index, coco_root)


@pytest.mark.parametrize("number", ["NaN", "-Infinity"])
def test_numbers_beyond_json_are_harmless_where_unread_and_named_elsewhere(coco_root, number):
    def spoil(content: dict) -> None:
        content["annotations"][0].update(area=float(number), note="NaN, Infinity")
        content["info"] = {"version": float(number)}

    checksum = open_index(coco_root).checksum()
    edit(coco_root, spoil)
    assert open_index(coco_root).checksum() == checksum
    edit(coco_root, lambda content: add_person(content, [[1, 1, 9, float(number), 9, 9]], 2))
    assert [*open_index(coco_root).left_out.values()] == [1]
    edit(coco_root, lambda content: content["images"][3].update(width=float(number)))
    assert "$.images[3].width" in refusal(open_index, coco_root)


NFC, NFD = (unicodedata.normalize(form, "Fotos äé/Việt Å.jpg") for form in ("NFC", "NFD"))
MIXED = "Fotos äé/Vi" + unicodedata.normalize("NFC", "ê") + "\u0323t Å.jpg"  # as some Windows keyboards write it
FOUND = {
    "1.jpg": ["1.jpg"], ".//1.jpg": ["1.jpg"], "export/images/1.jpg": ["1.jpg"], "project\\a\\2.jpg": ["a/2.jpg"],
    "x/3.jpg": ["a/b/3.jpg"], "x/b/3.jpg": ["a/b/3.jpg"],
    "x/4.jpg": ["day/4.jpg", "night/4.jpg"], "x/night/4.jpg": ["night/4.jpg"],
    "2.jpg": ["a/2.jpg"], "4.jpg": ["day/4.jpg", "night/4.jpg"],
    "gone.jpg": [], "x/gone.jpg": [], "a/1.jpg": [],  # a folder that exists is meant
    "inside.jpg": ["inside.jpg"], "link.jpg": [""], "x/link.jpg": [], "away/secret.jpg": [""], ".hidden/5.jpg": [""],
    "round.jpg": [], "pipe.jpg": [],
    # as tools write them: absolute, relative to another folder, with the disk, as an address, quoted, in another case
    "/home/me/a/2.jpg": ["a/2.jpg"], "../../upload/1.jpg": ["1.jpg"], "..\\..\\media\\night\\4.jpg": ["night/4.jpg"],
    "C:\\set\\a\\2.jpg": ["a/2.jpg"], "D:1.jpg": ["1.jpg"], "file:///C:/set/a/2.jpg": ["a/2.jpg"],
    "/data/local-files/?d=set/night/4.jpg": ["night/4.jpg"], "https://host/upload/1.jpg?key=a/2.jpg": ["1.jpg"],
    "s3://bucket/day/4.jpg": ["day/4.jpg"], "Jos%C3%A9%201.jpg": ["José 1.jpg"],
    "file:///x/b%2F3.jpg": ["a/b/3.jpg"], "100%.jpg": ["100%.jpg"], "1.JPG": ["1.jpg"], "A/2.jpg": ["a/2.jpg"],
    "x/Night/4.JPG": ["night/4.jpg"], "a/x\\1.jpg": ["1.jpg"],
    # nothing of these lies in the folder
    "../secret.jpg": [], "a/../../secret.jpg": [], "..\\secret.jpg": [], "file:///etc/passwd": [], "/etc/passwd": [],
    "..": [], "a/": [], "": [], "a": [], "x\0/2.jpg": ["a/2.jpg"], "a\0.jpg": [], "?d=": [], "/": [], "C:": [],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "secret.jpg").touch()
    root = tmp_path / "photos"
    names = ("1.jpg", "a/2.jpg", "a/b/3.jpg", "day/4.jpg", "night/4.jpg", ".hidden/5.jpg", "100%.jpg", "José 1.jpg")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    links = {"inside.jpg": "1.jpg", "link.jpg": "../secret.jpg", "round.jpg": "round.jpg", "away": ".."}
    for link, target in links.items():
        (root / link).symlink_to(target)
    os.mkfifo(root / "pipe.jpg")  # reading it would never end
    (tmp_path / "the folder").symlink_to(root)
    return tmp_path / "the folder"  # it may itself be a link


def test_names_are_found_wherever_they_may_lie_and_nowhere_else(folder):
    photos, outside = PhotoFolder(folder), {str(folder.parent / "secret.jpg"): []}
    assert {name: photos.find(name) for name in FOUND | outside} == FOUND | outside


@pytest.mark.parametrize(("written", "on_disk"), [(NFC, NFD), (NFD, NFC), (NFC, MIXED)])
def test_names_are_found_in_another_unicode_form(tmp_path, written, on_disk):
    (tmp_path / on_disk).parent.mkdir()
    (tmp_path / on_disk).touch()
    assert PhotoFolder(tmp_path).find(written) == PhotoFolder(tmp_path).find(f"export/{written}") == [on_disk]
    (tmp_path / written).parent.mkdir(exist_ok=True)
    (tmp_path / written).touch()
    assert PhotoFolder(tmp_path).find(written) == [written]  # the exact name comes first


def rename_photos(root: Path, names: dict[int, str]) -> None:
    def rename(content: dict) -> None:
        for image in content["images"]:
            image["file_name"] = names.get(image["id"], image["file_name"])

    edit(root, rename)


def test_photos_that_are_not_found_are_counted_with_an_example(coco_root, tmp_path):
    photos = coco_root / TRAIN
    for name in ("day", "night"):
        (photos / name).mkdir()
        os.link(photos / FIRST, photos / name / "x.jpg")
    (photos / "away").symlink_to(tmp_path)
    rename_photos(coco_root, {1: "a/x.jpg", 2: "gone\n.jpg", 3: "away/secret.jpg", 4: "gone.jpg", 5: f"x/{FIRST}"})
    index = open_index(coco_root)
    assert [index.image_id(i) for i in range(len(index))] == [5, 6, 7, 8, 9, 10]
    assert index.file_name(0) == FIRST
    assert index.left_out == {
        "photo whose name matches several files (a/x.jpg)": 1,
        "photo behind a link, or in a hidden folder (away/secret.jpg)": 1,
        f"photos not on disk (gone\\n.jpg, tried as {photos}/gone\\n.jpg, ...)": 2,
    }  # fmt: skip
    os.utime(photos / "night", ns=(0, 0))
    os.link(photos / FIRST, photos / "night" / "gone.jpg")  # a new file in any folder is noticed
    assert open_index(coco_root).fingerprint != index.fingerprint


def test_a_photo_without_a_name_has_the_one_of_its_address(coco_root):
    def move_names(content: dict) -> None:
        for image in content["images"]:
            image["coco_url"] = f"http://images.cocodataset.org/{TRAIN}/{image.pop('file_name')}"

    checksum = open_index(coco_root).checksum()
    edit(coco_root, move_names)
    assert open_index(coco_root).checksum() == checksum
    edit(coco_root, lambda content: content["images"][3].pop("coco_url"))
    assert refusal(open_index, coco_root).endswith(".json has an image without file_name: the one of id 4")
