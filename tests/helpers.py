"""What tests of several folders share: small data sets, checkpoints, and a Python of their own.

They lie here and not in conftest.py: with several files of that name `import conftest` means whichever came last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

ROOT = Path(__file__).resolve().parents[1]

# --- COCO-format data -------------------------------------------------------------------------------------


def write_split(root: Path, split: str, count: int, first_id: int) -> dict:
    """Writes photos of noise with bright blobs for persons, drawn as polygons and as both kinds of RLE."""
    rng = np.random.default_rng(first_id)
    images, annotations = [], []
    for image_id in range(first_id, first_id + count + 1):
        height, width = ((48, 64), (64, 48), (50, 50))[image_id % 3]
        photo = rng.integers(0, 120, (height, width, 3), dtype=np.uint8)
        images.append({"id": image_id, "file_name": f"{image_id:012d}.jpg", "width": width, "height": height})
        if image_id < first_id + count:
            annotations += _persons(photo, image_id, len(annotations) + first_id * 1000)
        write_photo(root / split / f"{image_id:012d}.jpg", photo)
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_annotations(root, split, content)
    return content


def _persons(photo: np.ndarray, image_id: int, first_id: int) -> list[dict]:
    """Draws two persons and returns their annotations (of a polygon, a crowd and an RLE by turns) and a dog's."""
    height, width = photo.shape[:2]
    blob = np.zeros((height, width), np.uint8)
    cv2.circle(blob, (width // 2 - 4, height // 2 + 3), 12, 1, -1)
    photo[blob > 0] = (230, 200, 170)
    polygon = [[width / 2 - 16.5, 8.0, width / 2 + 2, 10.25, width / 2 - 3, height - 6.0]]
    points = np.array(polygon[0]).reshape(-1, 2).round().astype(np.int32)
    cv2.fillPoly(photo, [points], (240, 210, 180))
    kinds = [
        {"segmentation": polygon, "iscrowd": 0},
        {"segmentation": uncompressed_rle(blob), "iscrowd": 1},
        {"segmentation": compressed_rle(blob), "iscrowd": 0},
    ]
    chosen = [kinds[image_id % 3], kinds[(image_id + 1) % 3]]
    chosen.append({"segmentation": [[1, 1, 9, 1, 9, 9]], "iscrowd": 0})  # the dog
    shared = {"image_id": image_id, "area": 100.0, "bbox": [0, 0, 10, 10]}
    return [{"id": first_id + n, "category_id": (1, 1, 18)[n], **shared, **kind} for n, kind in enumerate(chosen)]


def uncompressed_rle(mask: np.ndarray) -> dict:
    """Returns COCO's run lengths, column by column and zeros first: counted out here, not by pycocotools."""
    runs = [(value, len([*pixels])) for value, pixels in groupby(mask.T.ravel())]
    counts = [0] * bool(runs[0][0]) + [length for _, length in runs]
    return {"counts": counts, "size": list(mask.shape)}


def compressed_rle(mask: np.ndarray) -> dict:
    """Returns COCO's run lengths as pycocotools compresses them."""
    encoded = coco_mask.encode(np.asfortranarray(mask))
    return {"counts": encoded["counts"].decode(), "size": encoded["size"]}


def write_photo(path: Path, rgb: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))


def write_annotations(root: Path, split: str, content: dict) -> Path:
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def edit(root: Path, change: Callable[[dict], object], keep_time: bool = False, split: str = "train2017") -> Path:
    """Lets `change` edit a split's annotations in place. Returns their file."""
    path = root / "annotations" / f"instances_{split}.json"
    content, time = json.loads(path.read_text()), path.stat().st_mtime_ns
    change(content)
    write_annotations(root, split, content)
    os.utime(path, ns=(time, time if keep_time else time + 10**9))  # a fast test stays within a tick of the clock
    return path


def persons_of(content: dict, image_id: int) -> list[dict]:
    return [a for a in content["annotations"] if a["image_id"] == image_id and a["category_id"] == 1]


def add_person(content: dict, segmentation: object, image_id: int = 1) -> None:
    content["annotations"].append({"id": 1, "image_id": image_id, "category_id": 1, "segmentation": segmentation})


def refusal(call: Callable, *args: object) -> str:
    """Returns the one line of the DataError that a call raises."""
    from loading.annotations import DataError  # which imports PyTorch, and takes seconds

    with pytest.raises(DataError) as caught:
        call(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def mistake(capsys: pytest.CaptureFixture, tool: ModuleType, *arguments: object) -> str:
    """Returns the one line by which a program refuses its arguments, without the program's name."""
    capsys.readouterr()
    program = tool.__name__.replace("tools.", "") + ".py"
    assert tool.run_command([program, *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{program}: error: ")
    return line.partition(": error: ")[2]


# --- checkpoints, pictures, processes ---------------------------------------------------------------------


def save_random_model(path: Path, epoch: int = 1, change: Callable[[dict], object] = lambda state: None) -> Path:
    """Saves a small model of random weights, after `change` has edited them in place. Returns the file."""
    from models import UNetAutoencoder
    from training import checkpoints

    config = {"encoder": "resnet18", "use_attention": True, "image_size": 64, "bars": "reflect"}
    state = UNetAutoencoder("resnet18", pretrained=False).state_dict()
    change(state)
    checkpoints.save({"epoch": epoch, "config": config, "model": state, "metrics": {}}, path)
    return path


def sharpen(state: dict) -> None:
    """Makes a random model's alpha differ from one half."""
    state["decoder.head.conv.weight"] *= 50


PICTURE = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
PICTURE = cv2.resize(PICTURE, (70, 50), interpolation=cv2.INTER_CUBIC)


def save_picture(path: Path, picture: np.ndarray = PICTURE, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **options)
    return path


def fresh_python(code: str, *args: object) -> list[str]:
    """Returns the lines that a new Python prints for this code."""
    environment = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout.splitlines()
