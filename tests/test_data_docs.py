"""docs/data.md: each layout of its table is drawn and opened with its flags; its lists are the program's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import ROOT, write_photo
from PIL import Image

import trainer
from loading import class_lists, foreign, places

TEXT = (ROOT / "docs" / "data.md").read_text()
TABLE = TEXT.partition("## What trains as it is")[2].partition("- **Splits.**")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in TABLE.splitlines() if "`--" in line]
HEIGHT, WIDTH, NAMES = 48, 64, [f"t{n}" for n in range(9)] + [f"v{n}" for n in range(4)]  # v: to validate
PREFIXES = {"Label Studio": "..\\..\\media\\4\\", "pylabel": "/home/user/", "LVIS": "http://a.org/train2017/"}
EXTRA = {  # files that belong to a layout and are of no single photo
    "data.yaml": "names: [car, Person]", "class_names.txt": "__ignore__\n_background_\ncar\nperson",
    "labelmap.txt": "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:128,128,128::\nperson:192,128,128::\n",
    "_classes.csv": "Pixel Value, Class\n0, background\n1, car\n2, person\n",
    "train.txt": "\n".join(NAMES[:9]), "val.txt": "\n".join(NAMES[9:]),
}  # fmt: skip


def spans(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


def outline(n: int) -> np.ndarray:
    return cv2.ellipse2Poly((18 + 2 * n, 24), (9, 16), 5 * n, 0, 360, 20)


def filled(n: int) -> np.ndarray:
    return cv2.fillPoly(np.zeros((HEIGHT, WIDTH), np.uint8), [outline(n)], 1) > 0


def draw_mask(n: int, row: list[str]) -> np.ndarray:
    """Returns a mask's pixels as the row's data have them: with a car as well where the persons' value is told."""
    person, wanted = filled(n), re.search(r"--mask-values (\d+)(-?)", row[3])
    value, car = (int(wanted[1]), 0 if wanted[2] else 7) if wanted else (255, 0)
    if "labelmap.txt" in row[2] or "class" in row[2]:
        value, car = ((192, 128, 128), (128, 128, 128)) if "labelmap.txt" in row[2] else (2, 1)
    mask = np.zeros((HEIGHT, WIDTH, *np.shape(value)), np.uint8)
    mask[:8, -12:] = car
    mask[person] = value
    if wanted and wanted[2]:  # in a range the person has several values
        mask[24:][person[24:]] += 1
    if "Pascal VOC" in row[0]:
        cv2.polylines(mask, [outline(n)], True, 255, thickness=3)
    if "transparency" in row[0]:
        return np.dstack([np.full((HEIGHT, WIDTH, 3), 90, np.uint8), mask])
    return cv2.GaussianBlur(mask, (3, 3), 0) if "soft" in row[0] else mask


def coco(names: list[str], tool: str) -> str:
    """Returns an annotation file; the photos' names in it are as the tool writes them."""
    prefix, key = PREFIXES.get(tool.split(",")[0], ""), "coco_url" if tool == "LVIS" else "file_name"
    images = [{"id": n, "width": WIDTH, "height": HEIGHT, key: f"{prefix}{name}.jpg"} for n, name in enumerate(names)]
    polygons = [[outline(NAMES.index(name)).ravel().tolist()] for name in names]
    persons = [{"image_id": n, "category_id": 1, "segmentation": each} for n, each in enumerate(polygons)]
    return json.dumps({"images": images, "annotations": persons, "categories": [{"id": 1, "name": "person"}]})


def draw(root: Path, row: list[str]) -> bool:
    """Draws a row's layout. Returns whether it has a split."""
    photos, files = spans(row[1]), spans(row[2])
    data = [file for file in files if Path(file).name not in EXTRA]
    for path in (root / file for file in [*files, *photos]):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name in EXTRA:
            path.write_text(EXTRA[path.name])
    for n, name in enumerate(NAMES):
        photo, file = (each[(n > 8) * (len(each) > 1)] for each in (photos, data))
        write_photo(root / photo.replace("x.", f"{name}."), np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
        path = root / re.sub(r"\bx(?=[._])", name, file)
        if path.suffix == ".txt":
            path.write_text("1 " + " ".join(map(str, (outline(n) / (WIDTH, HEIGHT)).ravel())))
        elif path.suffix == ".json":
            path.write_text(coco(NAMES if len(data) == 1 else [each for each in NAMES if each[0] == name[0]], row[0]))
        else:
            Image.fromarray(draw_mask(n, row)).save(path)
    return max(len(photos), len(data)) > 1 or "ImageSets" in row[2]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_layout_opens_as_the_table_says(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    has_split, trained = draw(Path("my/set"), row), {}
    config, _ = trainer.parse([*shlex.split(spans(row[3])[0]), "--val-fraction=0.3"])
    for data in (trainer.open_split(config, is_training).dataset for is_training in (True, False)):
        assert not data.index.left_out
        for i, name in enumerate(data.path(i).stem for i in range(len(data))):
            assert trained.setdefault(name, data) is data
            mask, person = data.alpha(i) > 0, filled(NAMES.index(name))
            assert (mask & person).sum() / (mask | person).sum() > 0.85, name
    assert sorted(trained) == NAMES
    assert not has_split or all(trained[name] is trained[name[0] + "0"] for name in NAMES)


def test_its_lists_converters_and_messages_are_the_programs():
    assert {*spans(TEXT.partition("Photos lie in")[2].partition("; masks in")[0])} == {*places.PHOTO_FOLDERS}
    assert {*spans(TEXT.partition("; masks in")[2].partition("Other names")[0])} == {*places.MASK_FOLDERS}
    words = spans(TEXT.partition("that the data have are used.")[2].partition("others are named")[0])
    assert words == [word for synonyms in places.SPLIT_WORDS for word in synonyms]
    commands = [command for *_, how in foreign.FORMATS for command in spans(how.format(root="my/set"))]
    assert all(f"`{text}`" in TEXT for text in [*commands, *class_lists.READERS])
    assert all(name in TEXT for name, *_ in foreign.FORMATS if name != "YOLO's labels")  # those are read
    source = "".join((ROOT / "loading" / name).read_text() for name in ("masks.py", "mask_values.py"))
    messages = re.findall("`([a-z][^`]+)`", TEXT.partition("| it says |")[2].partition("| `--mask-values` |")[0])
    assert [message in source for message in messages] == [True] * 7
