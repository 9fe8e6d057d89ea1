"""Measures what a checkpoint is worth: on every validation photo, at the network's size and at the photo's own.

    python evaluate.py                      # checkpoints/best_model.pth, on the data that it was trained beside
    python evaluate.py FILE --data-root data/coco --split val2017 --image-size 512
    torchrun evaluate.py FILE               # shared out over every visible GPU

Leaves a folder beside the checkpoint: metrics.json, photos.csv (a row a photo), worst.png (the worst twelve).
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P, or PYTHONSAFEPATH, does not look here by itself

import utils
from cutting.cutter import TRAINED, Cutter, check_size, find_model, load
from cutting.edges import alpha_of, to_opacity
from datasets import COCOPersonDataset, DataError, letterbox
from loading.layout import Choices
from loading.sources import data_roots
from training import launching, pictures
from training.settings import OneLineParser
from training.streams import steady_streams
from utils import (
    Processes,
    UserError,
    atomic_write,
    one_line,
    read_checkpoint,
    usable_cores,
    write_csv,
    writing_to,
)

BOUNDARY_SHARE = 0.02  # of the image's diagonal: how far from the contour its boundary reaches (Cheng et al. 2021)
WORST = 12  # photos of the contact sheet
WORST_SMALL = 4  # of them at most, whose persons are all small: those are the worst as a rule, and little is seen there
LEVELS = ("network", "original")  # where the masks are compared: the network's square, the photo's own size
SMALL = 0.01  # of a photo's area: persons under it are the small ones
SIZES = {"all": (0.0, 2.0), "under 1 %": (0.0, SMALL), "1 to 10 %": (SMALL, 0.1), "over 10 %": (0.1, 2.0)}
METRICS = ("iou", "dice", "global_iou", "boundary_iou", "precision", "recall")


def main(options: argparse.Namespace) -> dict:
    """Measures, every process its share of the photos; the main one prints a table and writes the files.

    Returns:
        What metrics.json holds.

    Raises:
        CheckpointError: it cannot be used, or nothing can be written beside it.
        DataError: the photos cannot be used.
    """
    with launching.joined(options.device) as processes:
        cutter = load(options.checkpoint, str(processes.device), options.image_size)
        with launching.one_process_first(processes):
            dataset = COCOPersonDataset(options.data_root, options.split, cutter.image_size,
                                        other_splits=options.splits, choices=options.choices)  # fmt: skip
        folder = results_folder(options)
        if processes.is_main:
            with writing_to(str(folder)):
                utils.make_writable(folder)  # early: what was measured for an hour must find its place
        rows, left_out = measure_share(cutter, dataset, processes)
        facts = {"checkpoint": str(options.checkpoint), "data_root": str(options.data_root), "split": options.split,
                 "image_size": cutter.image_size, "left_out": len(left_out)}  # fmt: skip
        result = {**facts, **{level: by_size(rows, level) for level in LEVELS}}
        if processes.is_main:
            print(table(result), flush=True)
            if left_out:
                print(f"{len(left_out)} left out of {len(dataset)}:", *left_out, sep="\n  ", file=sys.stderr)
            write_files(result, rows, cutter, dataset, folder)
            print(f"written to {folder}: metrics.json, photos.csv, worst.png", flush=True)
    return result


def results_folder(options: argparse.Namespace) -> Path:
    """Beside the checkpoint, of the sets' names, and of the image size where it is not the checkpoint's."""
    roots = "_".join(root.resolve().name for root in data_roots(options.data_root))
    checkpoint = Path("checkpoints", "box") if options.checkpoint == "box" else Path(options.checkpoint)
    name = f"{checkpoint.stem}_on_{roots}_{options.split}"
    other_size = options.image_size not in (None, options.trained_size)
    return checkpoint.with_name(name + (f"_at_{options.image_size}" if other_size else ""))


def measure_share(cutter: Cutter, dataset: COCOPersonDataset, processes: Processes) -> tuple[list[dict], list[str]]:
    """Of all processes the rows, a photo each, and why the others could not be read."""
    cores = max(1, usable_cores() // launching.sharing_cores(processes))
    share = range(processes.rank, len(dataset), processes.world_size)
    found = utils.from_all(measure(cutter, dataset, share, cores))
    left_out = sorted(reason for reason in found if isinstance(reason, str))
    rows = sorted((row for row in found if isinstance(row, dict)), key=lambda row: row["index"])
    if not rows:
        folders = ", ".join(str(source.photos) for source in dataset.sources)
        raise DataError(f"no photo in {folders} can be read: {left_out[0]}")
    return rows, left_out


# --- a photo ----------------------------------------------------------------------------------------------


def measure(cutter: Cutter, dataset: COCOPersonDataset, indices: range, threads: int) -> list[dict | str]:
    """A row a photo, or why it cannot be read.

    One thread computes a photo from end to end, as in predict.py on a CPU: the same bits come out.
    """
    cv2.setNumThreads(1)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        rows = pool.map(lambda index: measure_or_leave_out(cutter, dataset, index), indices)
        return list(tqdm(rows, "evaluation", len(indices), leave=False, unit="photo", disable=None))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C the photos that wait are left


def measure_or_leave_out(cutter: Cutter, dataset: COCOPersonDataset, index: int) -> dict | str:
    try:
        return measure_photo(cutter, dataset, index)
    except DataError as error:
        return str(error)


def measure_photo(cutter: Cutter, dataset: COCOPersonDataset, index: int) -> dict:
    rgba = dataset.original(index)
    rgb, mask = np.ascontiguousarray(rgba[..., :3]), rgba[..., 3]
    square, metadata = letterbox(rgb, cutter.image_size)
    probabilities = cutter.probabilities([square])[0]
    opacity = to_opacity(alpha_of(probabilities, square, metadata, rgb), None, 0.5, metadata["scale"])
    scores = {
        "network": compare(probabilities > 0.5, letterbox(mask, cutter.image_size)[0] > 0),
        "original": compare(opacity > 127, mask > 0),  # what predict.py --threshold 0.5 cuts, without its soft pixel
    }
    largest = dataset.largest_person(index) / mask.size
    named = {f"{level}_{name}": value for level, found in scores.items() for name, value in found.items()}
    facts = {"file_name": dataset.file_name(index), "width": mask.shape[1], "height": mask.shape[0]}
    if len(dataset.sources) > 1:  # names may be the same in two of them
        facts["folder"] = str(dataset.path(index).parent)
    return {"index": index, "image_id": dataset.image_id(index), **facts, "largest_person": largest, **named}


def compare(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Two masks, bool (H, W): IoU, Dice, boundary IoU; pixels that are right, too many, missed."""
    right, many, missed = (int(np.count_nonzero(part)) for part in (found & truth, found & ~truth, truth & ~found))
    union = right + many + missed
    overlap = {"iou": right / union, "dice": 2 * right / (union + right)} if union else {"iou": 1.0, "dice": 1.0}
    return {**overlap, "boundary_iou": boundary_iou(found, truth), "right": right, "many": many, "missed": missed}


def boundary_iou(found: np.ndarray, truth: np.ndarray) -> float:
    """IoU of what lies within 2 % of the diagonal of each mask's contour, inside the mask (Cheng et al. 2021)."""
    found, truth = boundary(found), boundary(truth)
    union = np.count_nonzero(found | truth)
    return np.count_nonzero(found & truth) / union if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask that an erosion takes away; beyond the image's border there is no mask."""
    distance = max(1, round(BOUNDARY_SHARE * float(np.hypot(*mask.shape))))
    framed = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=distance)
    return mask & (eroded[1:-1, 1:-1] == 0)


# --- all photos -------------------------------------------------------------------------------------------


def by_size(rows: list[dict], level: str) -> dict[str, dict]:
    """The metrics of all photos, and of those whose largest person takes up so much of the photo."""
    groups = {name: [row for row in rows if low <= row["largest_person"] < high] for name, (low, high) in SIZES.items()}
    return {name: {"photos": len(group), **summarise(group, level)} for name, group in groups.items()}


def summarise(rows: list[dict], level: str) -> dict[str, float | None]:
    """Means over photos of IoU, Dice and boundary IoU; of all their pixels IoU, precision and recall."""
    if not rows:
        return dict.fromkeys(METRICS)
    means = {name: float(np.mean([row[f"{level}_{name}"] for row in rows])) for name in ("iou", "dice", "boundary_iou")}
    right, many, missed = (sum(row[f"{level}_{name}"] for row in rows) for name in ("right", "many", "missed"))
    shares = {"global_iou": right + many + missed, "precision": right + many, "recall": right + missed}
    return means | {name: right / whole if whole else 1.0 for name, whole in shares.items()}


def table(result: dict) -> str:
    """In 80 columns."""
    names = ("IoU", "Dice", "global", "boundary", "precis.", "recall")
    lines = [f"{result['checkpoint']} on {result['split']}"]
    lines.append(f"{'largest person':15} photos" + "".join(f"{name:>9}" for name in names))
    for level, title in zip(LEVELS, (f"at {result['image_size']} pixels", "at the photos' own size"), strict=True):
        lines.append(title)
        for name, found in result[level].items():
            figures = ("-" if found[metric] is None else f"{found[metric]:.3f}" for metric in METRICS)
            lines.append(f"  {name:13} {found['photos']:6}" + "".join(f"{figure:>9}" for figure in figures))
    return "\n".join(lines)


def write_files(result: dict, rows: list[dict], cutter: Cutter, dataset: COCOPersonDataset, folder: Path) -> None:
    with writing_to(str(folder)):
        with atomic_write(folder / "metrics.json") as file:
            file.write(json.dumps(result, indent=2).encode())
        write_csv(rows, folder / "photos.csv")
        save_worst(rows, cutter, dataset, folder / "worst.png")


def save_worst(rows: list[dict], cutter: Cutter, dataset: COCOPersonDataset, path: Path) -> None:
    """The photos of the lowest IoU at their own size: photo, truth, prediction, cutout."""
    worst = worst_of(rows)
    samples = torch.stack([dataset[row["index"]] for row in worst])
    found, targets = cutter.probabilities([*samples[:, :3].permute(0, 2, 3, 1).numpy()]), samples.float() / 255
    predictions = torch.cat([targets[:, :3], torch.from_numpy(found)[:, None]], dim=1)
    labels = [f"{row['file_name']}  IoU {row['original_iou']:.3f}" for row in worst]
    pictures.save_sheet(targets, predictions, path, labels)


def worst_of(rows: list[dict]) -> list[dict]:
    """The lowest first; only a few of them show small persons alone."""
    ordered = sorted(rows, key=lambda row: row["original_iou"])
    small = [row for row in ordered if row["largest_person"] < SMALL][:WORST_SMALL]
    others = [row for row in ordered if row["largest_person"] >= SMALL]
    return sorted(small + others, key=lambda row: row["original_iou"])[:WORST]


# --- the command line -------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; what is not said about the data is as the checkpoint was trained.

    Raises:
        UserError: an unknown flag, an image size out of range, no such checkpoint.
    """
    parser = OneLineParser("evaluate.py", description="Measures what a checkpoint is worth.", allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", nargs="?", default=TRAINED, help="the trained model, or box (%(default)s)")
    add("--data-root", "--data_root", help="folder of annotations/ and the photos; several: a,b (that of the training)")
    add("--split", help="the photo folder's name (that of the training's validation)")
    add("--image-size", "--image_size", type=int, help="pixels of the network's square (the checkpoint's)")
    add("--category", help="category of the annotations that is cut out; several: a,b (that of the training)")
    add("--annotations", help="a single COCO-format file without splits, instead of --data-root")
    add("--photos", help="folder of the photos of --annotations")
    add("--val-share", "--val_share", type=float, help="of photos without a split, as in training (as it was there)")
    add("--device", default=utils.EACH_ITS_GPU, help="cpu, cuda:1, mps (every process its own GPU, or the CPU)")
    options = parser.parse_args(argv)
    check_size(options.image_size)
    trained_with = read_checkpoint(find_model(options.checkpoint))["config"]
    options.choices = choices_of(options, trained_with)
    options.data_root = options.choices.photos or options.data_root or trained_with.get("data_root", "data/coco")
    options.split = options.split or trained_with.get("val_split", "val2017")
    options.splits = [trained_with.get(f"{name}_split", f"{name}2017") for name in ("train", "val")]
    options.trained_size = trained_with.get("image_size")
    return options


def choices_of(options: argparse.Namespace, trained_with: dict) -> Choices:
    """How the data are to be read: as in training, but for what is said; another data root has its own annotations.

    Raises:
        UserError: an annotation file without its photos, or beside a data root.
    """
    if bool(options.annotations) != bool(options.photos) or (options.annotations and options.data_root):
        raise UserError("--annotations and --photos go together, and without --data-root")
    if options.annotations or options.data_root:
        trained_with = trained_with | {"annotations": options.annotations or "", "photos": options.photos or ""}
    said = {name: value for name in Choices._fields if (value := getattr(options, name)) is not None}
    return Choices(**{name: trained_with[name] for name in Choices._fields if name in trained_with} | said)


def run_command(argv: list[str]) -> int:
    """The whole program. Returns its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    steady_streams()
    try:
        options = parse(argv[1:])
        launching.use_every_gpu(argv, options.device)
        main(options)
    except (UserError, RuntimeError) as error:
        if not (message := one_line(error, "free some and start evaluate.py again, or --device cpu does without")):
            raise
        print(f"evaluate.py: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
