"""The built-in sample: what it holds, that annotations fit the photos, that no file of a user is deleted."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from tools import make_sample
from tools.make_sample import CATEGORIES, PERSON, SPLITS, Thing, annotation, draw_photo, draw_sample, polygons

TRAIN, VAL = 24, 5


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return draw_sample(tmp_path_factory.mktemp("drawn") / "sample", TRAIN, VAL, seed=3)


@pytest.fixture(scope="module")
def coco(root) -> COCO:
    return COCO(root / "annotations" / "instances_train2017.json")


@pytest.fixture(scope="module")
def photos() -> list:
    return [draw_photo(3, 0, number) for number in range(TRAIN)]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def mask_of(coco: COCO, record: dict) -> np.ndarray:
    return coco.annToMask(record).astype(bool)


def annotations_of(coco: COCO, image_id: int) -> list[dict]:
    return coco.loadAnns(coco.getAnnIds(image_id))


# --- the same every time ----------------------------------------------------------------------------------


def test_same_seed_gives_the_same_bytes(tmp_path):
    first, second = (contents(draw_sample(tmp_path / name, 4, 2, seed=5)) for name in "ab")
    assert first == second


def test_another_seed_gives_other_photos(tmp_path):
    first, second = (contents(draw_sample(tmp_path / str(seed), 3, 1, seed)) for seed in (5, 6))
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first)


def test_a_photo_depends_on_seed_split_and_number_alone(root, photos, tmp_path):
    shorter = contents(draw_sample(tmp_path / "shorter", 5, 2, seed=3))
    longer = contents(root)
    assert all(longer[name] == content for name, content in shorter.items() if name.endswith(".jpg"))
    assert not np.array_equal(draw_photo(3, 0, 1)[0], draw_photo(3, 1, 1)[0])


# --- the annotations fit the photos -----------------------------------------------------------------------


def test_annotations_fit_what_was_drawn(coco, photos):
    for image_id, (_, things) in zip(sorted(coco.imgs), photos, strict=True):
        records = annotations_of(coco, image_id)
        assert [record["category_id"] for record in records] == [thing.category for thing in things]
        for record, thing in zip(records, things, strict=True):
            mask = mask_of(coco, record)
            assert (mask & thing.mask).sum() > 0.97 * (mask | thing.mask).sum()
            assert record["area"] == thing.mask.sum()


def test_outlines_lie_on_edges_of_the_photo(root, coco):
    """Grey levels change more across the outlines of people than across the same outlines moved away."""
    on, away = [], []
    for image_id, image in coco.imgs.items():
        records = [record for record in annotations_of(coco, image_id) if record["category_id"] == PERSON]
        if not records:
            continue
        grey = cv2.imread(root / "train2017" / image["file_name"], cv2.IMREAD_GRAYSCALE).astype(np.float32)
        change = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
        people = np.any([mask_of(coco, record) for record in records], 0).astype(np.uint8)
        outline = cv2.morphologyEx(people, cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0
        on.append(change[outline].mean())
        moves = [(dy, dx) for dy in (-5, 0, 5) for dx in (-5, 0, 5) if dy or dx]
        away.append(max(change[np.roll(outline, move, (0, 1))].mean() for move in moves))
    assert len(on) > 15
    assert np.mean(np.array(on) > away) > 0.9
    assert np.mean(on) > 1.3 * np.mean(away)


def test_things_never_share_a_pixel(photos):
    for _, things in photos:
        assert np.sum([thing.mask for thing in things], axis=0).max() <= 1


def test_mask_with_holes_and_islands_survives_as_polygons(tmp_path):
    mask = np.zeros((60, 80), bool)
    mask[5:50, 10:60] = True
    mask[10:20, 20:30] = mask[30:31, 40:41] = False  # a hole, and one of a single pixel
    mask[12:18, 22:28] = True  # an island in the hole
    mask[55, 70] = mask[0, 79] = mask[59, 0] = True
    assert np.array_equal(rasterised(mask, tmp_path), mask)
    assert len(polygons(mask)) > 4


def test_ragged_mask_survives_as_polygons(tmp_path):
    mask = np.random.default_rng(0).uniform(size=(40, 50)) < 0.6
    assert np.array_equal(rasterised(mask, tmp_path), mask)


@pytest.mark.parametrize("corner", [True, False])
def test_mask_survives_as_run_lengths(tmp_path, corner):
    mask = np.random.default_rng(0).uniform(size=(20, 30)) < 0.5
    mask[0, 0] = corner
    assert np.array_equal(rasterised(mask, tmp_path, crowd=True), mask)


def rasterised(mask: np.ndarray, folder: Path, crowd: bool = False) -> np.ndarray:
    """The mask as pycocotools reads it back from its annotation."""
    image = {"id": 1, "file_name": "", "height": mask.shape[0], "width": mask.shape[1]}
    categories = [{"id": PERSON, "name": "person"}]
    records = [annotation(Thing(PERSON, crowd, mask), 1, 0)]
    content = {"info": {}, "images": [image], "annotations": records, "categories": categories}
    path = folder / "coco.json"
    path.write_text(json.dumps(content))
    return mask_of(COCO(path), records[0])


# --- what COCO readers rely on ----------------------------------------------------------------------------


def test_records_are_as_coco_writes_them(root):
    ids = set()
    for split, count in zip(SPLITS, (TRAIN, VAL), strict=True):
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        names = {image["file_name"] for image in content["images"]}
        assert len(names) == count
        assert names == {path.name for path in (root / split).iterdir()}
        assert {category["id"]: category["name"] for category in content["categories"]} == CATEGORIES
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        assert not ids & sizes.keys()
        ids |= sizes.keys()
        assert len({record["id"] for record in content["annotations"]}) == len(content["annotations"])
        for record in content["annotations"]:
            check_record(record, *sizes[record["image_id"]])


def check_record(record: dict, width: int, height: int) -> None:
    x, y, wide, high = record["bbox"]
    assert x >= 0
    assert y >= 0
    assert x + wide <= width
    assert y + high <= height
    assert 0 < record["area"] <= wide * high
    if record["iscrowd"]:
        assert record["segmentation"]["size"] == [height, width]
        assert sum(record["segmentation"]["counts"]) == width * height
    else:
        assert all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in record["segmentation"])


def test_sizes_of_files_are_those_of_the_records(root, coco):
    for image in coco.imgs.values():
        photo = cv2.imread(root / "train2017" / image["file_name"], cv2.IMREAD_UNCHANGED)
        assert photo.shape[:2] == (image["height"], image["width"])
        assert 160 <= max(photo.shape[:2]) <= 256
        assert len(image["file_name"]) == len("000000000001.jpg")


# --- every kind that was promised -------------------------------------------------------------------------


def test_every_kind_of_photo_occurs(root, coco):
    paths = [root / "train2017" / image["file_name"] for image in coco.imgs.values()]
    files = [cv2.imread(path, cv2.IMREAD_UNCHANGED) for path in paths]
    assert any(file.ndim == 2 for file in files)
    assert np.mean([file.ndim == 3 for file in files]) > 0.8
    tall = np.mean([file.shape[0] > file.shape[1] for file in files])
    assert 0.1 < tall < 0.9
    people = [coco.getAnnIds(image_id, catIds=[PERSON], iscrowd=False) for image_id in coco.imgs]
    assert {0, 1, 2, 3} <= {len(records) for records in people}
    assert np.mean([len(records) == 0 for records in people]) < 0.15


def test_every_kind_of_annotation_occurs(coco):
    records = list(coco.anns.values())
    crowds = [record for record in records if record["iscrowd"]]
    assert crowds
    assert all(record["category_id"] == PERSON for record in crowds)
    assert {record["category_id"] for record in records} == set(CATEGORIES)
    assert any(not record["iscrowd"] and len(record["segmentation"]) > 1 for record in records)
    cut_off = [record for record in records if record["category_id"] == PERSON and record["bbox"][0] == 0]
    assert cut_off


def test_people_overlap(photos):
    """Some are near enough to others to touch them in the picture."""
    touching = 0
    for _, things in photos:
        people = [thing.mask for thing in things if thing.category == PERSON and not thing.crowd]
        wide = [cv2.dilate(mask.astype(np.uint8), np.ones((3, 3))) for mask in people]
        touching += any((a & b).any() for i, a in enumerate(wide) for b in wide[i + 1 :])
    assert touching >= 3


def test_people_are_large_enough_to_learn_from(photos):
    people = [[thing.mask for thing in things if thing.category == PERSON] for _, things in photos]
    shares = [np.any(masks, 0).mean() for masks in people if masks]
    assert min(shares) > 0.03
    assert 0.1 < np.median(shares) < 0.5


# --- whole or not at all, and never over anything of the user's -------------------------------------------


def test_second_call_changes_nothing(tmp_path, monkeypatch):
    root = draw_sample(tmp_path / "sample", 3, 1)
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    monkeypatch.setattr(make_sample, "draw_photo", lambda *_: pytest.fail("it draws again"))
    assert draw_sample(root, 3, 1) == root
    assert before == {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}


def test_other_settings_replace_the_sample(tmp_path, monkeypatch):
    root = draw_sample(tmp_path / "sample", 3, 2)
    (root / ".silueta").mkdir()
    (root / ".silueta" / "train2017.index").write_text("of the old photos")
    draw_sample(root, 2, 1, seed=1)
    assert contents(root) == contents(draw_sample(tmp_path / "fresh", 2, 1, seed=1))
    monkeypatch.setattr(make_sample, "VERSION", make_sample.VERSION + 1)
    draw_sample(root, 2, 1, seed=1)
    assert json.loads((root / "sample.json").read_text())["version"] == make_sample.VERSION


def test_missing_photo_is_drawn_again(tmp_path):
    root = draw_sample(tmp_path / "sample", 3, 1)
    before = contents(root)
    next((root / "train2017").iterdir()).unlink()
    draw_sample(root, 3, 1)
    assert contents(root) == before


@pytest.mark.parametrize("name", ["holiday.jpg", "train2017/000000000001.jpg", "sample.json", "a/b/c.txt"])
def test_folder_of_the_user_is_refused_and_untouched(tmp_path, name):
    file = tmp_path / "photos" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=r"^[^\n]*photos[^\n]*$"):
        draw_sample(tmp_path / "photos", 2, 1)
    assert contents(tmp_path) == {f"photos/{name}": b"mine"}


def test_sample_with_a_file_of_the_user_is_not_replaced(tmp_path):
    root = draw_sample(tmp_path / "sample", 2, 1)
    (root / "train2017" / "mine.jpg").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"mine\.jpg"):
        draw_sample(root, 2, 1, seed=1)
    assert contents(tmp_path) == before


def test_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "sample").write_text("mine")
    with pytest.raises(FileExistsError):
        draw_sample(tmp_path / "sample", 2, 1)
    assert (tmp_path / "sample").read_text() == "mine"


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "sample").mkdir()
    assert len(contents(draw_sample(tmp_path / "sample", 2, 1))) == 2 + 1 + 3


@pytest.mark.parametrize("there", [False, True])
def test_interrupted_run_leaves_everything_as_it_was(tmp_path, monkeypatch, there):
    if there:
        draw_sample(tmp_path / "sample", 2, 1)
    before = contents(tmp_path)

    def interrupted(seed: int, split: int, number: int) -> tuple:
        if split == 1:
            raise KeyboardInterrupt
        return draw_photo(seed, split, number)

    monkeypatch.setattr(make_sample, "draw_photo", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_sample(tmp_path / "sample", 2, 1, seed=1)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["sample"] if there else [])


@pytest.mark.parametrize("numbers", [{"train": 0}, {"val": -1}, {"seed": -1}])
def test_settings_that_cannot_be_are_refused(tmp_path, numbers):
    with pytest.raises(ValueError, match="train and val must be 1 or more"):
        draw_sample(tmp_path / "sample", **numbers)
    assert not any(tmp_path.iterdir())


# --- the command line -------------------------------------------------------------------------------------


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, make_sample.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line_draws_a_sample(tmp_path):
    result = run("--root", tmp_path / "new" / "sample", "--train", 2, "--val", 1, "--seed", 4)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "new" / "sample") in result.stdout
    assert contents(tmp_path / "new" / "sample") == contents(draw_sample(tmp_path / "same", 2, 1, seed=4))


def test_command_line_says_in_one_line_what_is_wrong(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for arguments in (["--root", tmp_path], ["--root", tmp_path / "sample", "--train", 0]):
        result = run(*arguments)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("make_sample.py: ")
        assert not result.stdout
