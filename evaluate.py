"""Evaluates a checkpoint on every validation photo, at the network's size and at the photo's own.

    python evaluate.py                      # checkpoints/best_model.pth, on the validation photos of its training
    python evaluate.py FILE --data-root data/coco --split val2017 --image-size 512     # one look at this size
    torchrun evaluate.py FILE               # on every visible GPU

Writes metrics.json, photos.csv (a row a photo) and worst.png (the worst twelve) into a folder beside the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P, or PYTHONSAFEPATH, does not look here by itself

import utils
from cutting.cutter import TRAINED, Cutter, load, resolve_model
from cutting.edges import refine_alpha, to_opacity
from datasets import COCOPersonDataset, DataError, letterbox
from loading.layout import DataOptions
from loading.letterbox import resize, unpadded
from loading.sources import data_roots
from loading.workers import usable_cores
from models import read_checkpoint
from training import distributed, launching, pictures
from training.command_line import OneLineParser, run_cli
from utils import Processes, UserError, atomic_write, explain_write_errors, ratio, write_csv

BOUNDARY_FRACTION = 0.02  # of the image's diagonal: the width of a mask's boundary (Cheng et al. 2021)
WORST = 12  # photos in worst.png
WORST_SMALL = 4  # of them at most show small persons only: those are the worst as a rule, and hard to see there
LEVELS = ("network", "original")  # where masks are compared: the network's square, the photo's own size
SMALL = 0.01  # of a photo's area: a person below it is small
SIZES = {"all": (0.0, 2.0), "under 1 %": (0.0, SMALL), "1 to 10 %": (SMALL, 0.1), "over 10 %": (0.1, 2.0)}
METRICS = ("iou", "dice", "global_iou", "boundary_iou", "precision", "recall")


def main(options: argparse.Namespace) -> None:
    """Evaluates a shard of the photos on each process; rank 0 prints a table and writes the files.

    Raises UserError if the checkpoint or the photos cannot be used.
    """
    with distributed.process_group(options.device) as processes:
        cutter = load(options.checkpoint, str(processes.device), options.image_size)
        with distributed.local_rank0_first(processes):
            # Its squares are for pictures only, and show the photo alone; the cutter makes its own.
            dataset = COCOPersonDataset(options.data_root, options.split, cutter.image_size,
                                        other_splits=options.splits, options=options.data_options,
                                        bars="black")  # fmt: skip
        folder = Path(options.output) if options.output else default_folder(options)
        if processes.is_rank0:
            check_writable(folder)  # before the work, which may take an hour
        rows, unreadable = evaluate_shard(cutter, dataset, processes)
        if processes.is_rank0:
            result = {"checkpoint": str(options.checkpoint), "data_root": str(options.data_root),
                      "split": options.split, "image_size": cutter.image_size, "left_out": len(unreadable),
                      **{level: summarise_by_size(rows, level) for level in LEVELS}}  # fmt: skip
            print(format_table(result), flush=True)
            if unreadable:
                print(f"{len(unreadable)} left out of {len(dataset)}:", *unreadable, sep="\n  ", file=sys.stderr)
            write_files(result, rows, cutter, dataset, folder)
            print(f"written to {folder}: metrics.json, photos.csv, worst.png", flush=True)


def default_folder(options: argparse.Namespace) -> Path:
    """Returns the results' folder, beside the checkpoint: the name says what was evaluated, and --image-size."""
    roots = "_".join(root.resolve().name for root in data_roots(options.data_root))
    checkpoint = Path("checkpoints", "bundled") if options.checkpoint == "bundled" else Path(options.checkpoint)
    split = "_".join(filter(None, re.split(r"[/\\]", options.split)))  # of images/val: one folder all the same
    name = f"{checkpoint.stem}_on_{roots}_{split}"
    return checkpoint.with_name(name + (f"_at_{options.image_size}" if options.image_size else ""))


def check_writable(folder: Path) -> None:
    """Makes the results' folder; raises UserError if nothing can be written there, as beside a shared checkpoint."""
    try:
        utils.ensure_writable(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; --output names another folder") from None


def evaluate_shard(cutter: Cutter, dataset: COCOPersonDataset, processes: Processes) -> tuple[list[dict], list[str]]:
    """Evaluates this process's photos. Returns the rows of all processes, and why photos could not be read.

    Raises DataError if none can be read.
    """
    threads = max(1, usable_cores() // distributed.processes_sharing_cores(processes))
    shard = range(processes.rank, len(dataset), processes.world_size)
    results = utils.all_gather_list(evaluate_photos(cutter, dataset, shard, threads))
    unreadable = sorted(result for result in results if isinstance(result, str))
    rows = sorted((result for result in results if isinstance(result, dict)), key=lambda row: row["index"])
    if not rows:
        folders = ", ".join(str(source.photos) for source in dataset.sources)
        raise DataError(f"no photo in {folders} can be read: {unreadable[0]}")
    return rows, unreadable


def evaluate_photos(cutter: Cutter, dataset: COCOPersonDataset, indices: range, threads: int) -> list[dict | str]:
    """Returns for each photo its row, or why it cannot be read."""
    cv2.setNumThreads(1)  # each thread runs all on one core, as in predict.py on a CPU, and gets the same bits
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = pool.map(lambda index: evaluate_photo(cutter, dataset, index), indices)
        return list(tqdm(results, "evaluation", len(indices), leave=False, unit="photo", disable=None))


def evaluate_photo(cutter: Cutter, dataset: COCOPersonDataset, index: int) -> dict | str:
    """Returns a photo's row of photos.csv, or why it cannot be read."""
    try:
        rgba = dataset.original(index)
    except DataError as error:
        return str(error)
    rgb, mask = np.ascontiguousarray(rgba[..., :3]), rgba[..., 3]
    look = cutter.look([rgb])[0]
    alpha = refine_alpha(look.probabilities, look.square, look.metadata, rgb)
    opacity = to_opacity(alpha, None, 0.5, look.metadata["scale"])
    fitted, metadata = letterbox(mask, cutter.image_size)
    padding = metadata["padding"]  # only the photo's own pixels count
    scores = {
        "network": compare_masks(unpadded(look.first, padding) > 0.5, unpadded(fitted, padding) > 0),
        "original": compare_masks(opacity > 127, mask > 0),  # predict.py --threshold 0.5, without its soft pixel
    }
    return {"index": index, "image_id": dataset.image_id(index), "file_name": dataset.file_name(index),
            "folder": str(dataset.path(index).parent), "width": mask.shape[1], "height": mask.shape[0],
            "largest_person": dataset.largest_person(index) / mask.size, "look": look.size,
            **{f"{level}_{name}": value for level in LEVELS for name, value in scores[level].items()}}  # fmt: skip


def compare_masks(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Returns the scores of a mask, bool (H, W), and its true positive, false positive and false negative pixels."""
    tp, fp, fn = count_overlap(prediction, truth)
    edge_tp, *edge_errors = count_overlap(boundary(prediction), boundary(truth))
    scores = {"iou": ratio(tp, tp + fp + fn), "dice": ratio(2 * tp, 2 * tp + fp + fn)}
    return {**scores, "boundary_iou": ratio(edge_tp, edge_tp + sum(edge_errors)), "tp": tp, "fp": fp, "fn": fn}


def count_overlap(prediction: np.ndarray, truth: np.ndarray) -> list[int]:
    """Returns the true positive, false positive and false negative pixels of a mask, bool (H, W)."""
    return [int(np.count_nonzero(pixels)) for pixels in (prediction & truth, prediction & ~truth, truth & ~prediction)]


def boundary(mask: np.ndarray) -> np.ndarray:
    """Returns the pixels of a mask within 2 % of the diagonal of its contour; the image's border is contour too."""
    distance = max(1, round(BOUNDARY_FRACTION * float(np.hypot(*mask.shape))))
    framed = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=distance)
    return mask & (eroded[1:-1, 1:-1] == 0)


def summarise_by_size(rows: list[dict], level: str) -> dict[str, dict]:
    """Returns the metrics of all photos, and of those whose largest person takes up a fraction of `SIZES`."""
    groups = {name: [row for row in rows if low <= row["largest_person"] < high] for name, (low, high) in SIZES.items()}
    return {name: {"photos": len(group), **summarise(group, level)} for name, group in groups.items()}


def summarise(rows: list[dict], level: str) -> Mapping[str, float | None]:
    """Returns the metrics of some photos: IoU, Dice and boundary IoU are means over photos, the others over pixels."""
    if not rows:
        return dict.fromkeys(METRICS)
    means = {name: float(np.mean([row[f"{level}_{name}"] for row in rows])) for name in ("iou", "dice", "boundary_iou")}
    tp, fp, fn = (sum(row[f"{level}_{name}"] for row in rows) for name in ("tp", "fp", "fn"))
    wholes = {"global_iou": tp + fp + fn, "precision": tp + fp, "recall": tp + fn}
    return means | {name: ratio(tp, whole) for name, whole in wholes.items()}


def format_table(result: dict) -> str:
    """Returns the metrics as a table of 80 columns."""
    titles = ("IoU", "Dice", "global", "boundary", "precis.", "recall")
    lines = [f"{result['checkpoint']} on {result['split']}"]
    lines.append(f"{'largest person':15} photos" + "".join(f"{title:>9}" for title in titles))
    for level, heading in zip(LEVELS, (f"at {result['image_size']} pixels", "at the photos' own size"), strict=True):
        lines.append(heading)
        for name, group in result[level].items():
            values = ("-" if group[metric] is None else f"{group[metric]:.3f}" for metric in METRICS)
            lines.append(f"  {name:13} {group['photos']:6}" + "".join(f"{value:>9}" for value in values))
    return "\n".join(lines)


def write_files(result: dict, rows: list[dict], cutter: Cutter, dataset: COCOPersonDataset, folder: Path) -> None:
    """Writes metrics.json, photos.csv and worst.png: of the worst photos the truth, the prediction and the cutout."""
    worst = select_worst(rows)
    samples = torch.stack([cast(torch.Tensor, dataset[row["index"]]) for row in worst])  # it has no metadata
    targets = samples.float() / 255
    alpha = torch.from_numpy(np.stack([find_persons(cutter, dataset, row["index"]) for row in worst]))
    predictions = torch.cat([targets[:, :3], alpha[:, None]], dim=1)
    labels = [f"{row['file_name']}  IoU {row['original_iou']:.3f}" for row in worst]
    with explain_write_errors(str(folder)):
        with atomic_write(folder / "metrics.json") as file:
            file.write(json.dumps(result, indent=2).encode())
        write_csv(rows, folder / "photos.csv")
        pictures.save_sheet(targets, predictions, folder / "worst.png", labels)


def find_persons(cutter: Cutter, dataset: COCOPersonDataset, index: int) -> np.ndarray:
    """Returns what a photo's cutout is made of, float32 (S, S), at the dataset's size whichever look was taken."""
    look = cutter.look([np.ascontiguousarray(dataset.original(index)[..., :3])])[0]
    own = dataset.own_pixels([index])[0].numpy()  # what is seen in a bar that goes on with the photo is not shown
    return resize(look.probabilities, own.shape) * own


def select_worst(rows: list[dict]) -> list[dict]:
    """Returns the rows with the lowest IoU at the photo's own size, the lowest first; a few show small persons only."""
    ordered = sorted(rows, key=lambda row: row["original_iou"])
    small = [row for row in ordered if row["largest_person"] < SMALL][:WORST_SMALL]
    return [row for row in ordered if row["largest_person"] >= SMALL or row in small][:WORST]


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the options, completed by the settings of the checkpoint's training."""
    parser = OneLineParser("evaluate.py", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("checkpoint", nargs="?", default=TRAINED, help="the trained model, or bundled (%(default)s)")
    add("--output", help="folder for the results (CHECKPOINT_on_DATA_SPLIT, beside the checkpoint)")
    add("--data-root", help="folder of annotations/ and the photos; several: a,b (that of the training)")
    add("--split", help="the photo folder's name (that of the training's validation)")
    add("--image-size", type=int, help="pixels of the network's square, in one look (the checkpoint's)")
    add("--category", help="category of the annotations that is cut out; several: a,b (that of the training)")
    add("--annotations", help="a single COCO-format file without splits, instead of --data-root")
    add("--photos", help="folder of the photos of --annotations or --masks")
    add("--masks", help="folder of mask files for --photos, instead of --data-root")
    add("--mask-values", help="values of mask files that are persons (those of the training)")
    add("--val-fraction", type=float, help="of photos without a split, to validate on (that of the training)")
    add("--device", default=utils.LOCAL_RANK_GPU, help="cpu, cuda:1, mps (every process its own GPU, or the CPU)")
    options = parser.parse_args(argv)
    config = read_checkpoint(resolve_model(options.checkpoint))["config"]
    options.data_options = data_options(options, config)
    options.data_root = options.data_options.photos or options.data_root or config.get("data_root", "data/coco")
    options.split = options.split or config.get("val_split", "val2017")
    options.splits = [config.get(f"{name}_split", f"{name}2017") for name in ("train", "val")]
    return options


def data_options(options: argparse.Namespace, config: dict) -> DataOptions:
    """Returns how the data are read: as in training, unless the options say otherwise or name another data root."""
    named = bool(options.annotations) + bool(options.masks)
    if named != bool(options.photos) or (named and options.data_root):
        raise UserError("--photos goes with --annotations or with --masks, and without --data-root")
    if named or options.data_root:
        config = config | {name: getattr(options, name) or "" for name in ("annotations", "photos", "masks")}
    options.negatives = ""  # photos without persons are trained on, and not evaluated
    given = {name: value for name in DataOptions._fields if (value := getattr(options, name)) is not None}
    return DataOptions(**{name: config[name] for name in DataOptions._fields if name in config} | given)


def run_command(argv: list[str]) -> int:
    """Runs the program. Returns its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""

    def work() -> None:
        options = parse(argv[1:])
        launching.spread_over_gpus(argv, options.device)
        main(options)

    advice = "free some and start evaluate.py again, or --device cpu does without"
    return run_cli("evaluate.py", work, advice, "stopped: nothing was written")


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
