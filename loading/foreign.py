"""Recognises the formats of other tools, to name what converts them to one that is read here."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

SUPERVISION = (
    "`pip install supervision`, then in Python: import supervision as sv; data = sv.DetectionDataset.{source}, "
    "force_masks=True); data.as_coco('OUT/images', 'OUT/annotations/instances_default.json')"
)
DATUM = "`pip install 'datumaro[cli]'`, `datum convert -i {root} -if {format} -f coco_instances -o OUT -- --save-media`"
OUT = ", then --data-root OUT"


def converter(root: Path) -> str:
    """Returns what a folder's format is and what converts it, as text; "" if it is not known."""
    for name, is_it, how in FORMATS:
        if root.is_dir() and is_it(root):
            return f"It looks like {name}: {how.format(root=root)}"
    return ""


def _has(*patterns: str) -> Callable[[Path], bool]:
    return lambda root: any(next(root.glob(pattern), None) for pattern in patterns)


def _holds(text: bytes, *patterns: str) -> Callable[[Path], bool]:
    """Returns whether one of the first files of a pattern has a text near its beginning."""

    def is_it(root: Path) -> bool:
        files = (islice(filter(Path.is_file, root.glob(pattern)), 3) for pattern in patterns)
        return any(text in _head(path) for path in chain.from_iterable(files))

    return is_it


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2**14)


FORMATS = (  # a name, how to tell it, and what was tried and works
    ("LabelMe's JSON", _holds(b'"shapes"', "*.json", "*/*.json"),
     "`pip install labelme2coco`, `cd {root} && labelme2coco . --export_dir ../coco`, then --annotations "
     "{root}/../coco/dataset.json --photos {root}"),
    ("a Supervisely project", _holds(b'"objects"', "ann/*.json", "*/ann/*.json"),
     "`pip install supervisely`, `python -c \"import supervisely; supervisely.convert.to_coco('PROJECT', dest_dir="
     "'OUT')\"` with the folder of meta.json, then for a data set --annotations "
     "OUT/NAME/annotations/coco_instances.json --photos OUT/NAME/images"),
    ("Open Images", _has("annotations/*bbox*.csv", "*-annotations-*.csv", "annotations/*hierarchy.json"),
     DATUM.replace("{format}", "open_images") + OUT),
    ("CVAT's XML", _holds(b"<annotations", "*.xml", "*/*.xml"), DATUM.replace("{format}", "cvat") + OUT),
    ("Pascal VOC's XML", _holds(b"<annotation", "Annotations/*.xml", "*/Annotations/*.xml", "*.xml", "labels/*.xml",
                               "*/labels/*.xml"),
     SUPERVISION.replace("{source}", "from_pascal_voc('{root}/JPEGImages', '{root}/Annotations'")
     + OUT + "; bounding boxes stay boxes, which are no masks"),
    ("YOLO's labels", _has("data.yaml", "dataset.yaml", "labels/*.txt", "labels/*/*.txt", "*/labels/*.txt"),
     "photos in {root}/images and polygons in {root}/labels, or with train/ and val/ above or below them, are read"),
    ("a Hugging Face data set", _has("metadata.jsonl", "*/metadata.jsonl", "*.parquet", "*/*.parquet", "*/*.arrow"),
     "`pip install datasets`, then in Python for each row of datasets.load_dataset: row['image'].save(...) into "
     "photos/ and row['mask'].save(...), as PNG, into masks/"),
    ("arrays of NumPy", _has("*.npy", "*/*.npy"),
     "save each as a PNG of 0 and 255: PIL.Image.fromarray(numpy.uint8(numpy.load(FILE) > 0) * 255).save(NAME)"),
)  # fmt: skip
