"""Measures what each choice of the recipe is worth: trains with and without it, and compares photo by photo.

    python tools/ablation.py base dice_3 no_ema+batch_4 --measure data/coco:val2017 --seeds 3 \\
        -- --data-root data/coco --encoder mobilenet_v2 --image-size 160 --batch-size 8 --num-epochs 12 --cache
    python tools/ablation.py --list

A row is the flags of trainer.py that it changes; what follows `--` are the flags of all rows. A new row is a line of
ROWS. Each result is kept in --folder and is not measured again with the same settings, so an interrupted comparison
goes on where it was. The last weights are measured, not the best: no photo that is measured has chosen them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import albumentations
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it is in tools/ that Python looks

import trainer
from cutting.cutter import load
from datasets import COCOPersonDataset
from evaluate import evaluate_photos
from loading import augmentation
from loading.augmentation import augmentations
from loading.workers import usable_cores
from tools.benchmark import machine
from training.checkpoints import LAST
from training.command_line import OneLineParser, UsageError, run_cli
from training.run_info import git_revision
from utils import UserError, atomic_write

METRICS = ("iou", "boundary_iou")  # at the photos' own size


class Row(NamedTuple):
    """One change of the program as it is."""

    change: str
    flags: str = ""  # of trainer.py; {epochs} is --num-epochs, {fifth} a fifth of it
    transforms: dict[str, dict] | None = None  # arguments of transforms in loading/augmentation.py, by their name


ROWS = {
    "base": Row("the program as it is"),
    # --- learning rate, schedule, weights
    "lr_2e-5": Row("a fifth of the learning rate", "--learning-rate 2e-5"),
    "lr_1e-3": Row("one learning rate of 1e-3 for all", "--learning-rate 1e-3 --decoder-lr-mult 1"),
    "lr_mult_1": Row("one learning rate for all", "--decoder-lr-mult 1"),
    "lr_mult_3": Row("decoder_lr_mult 3", "--decoder-lr-mult 3"),
    "lr_mult_30": Row("decoder_lr_mult 30", "--decoder-lr-mult 30"),
    "encoder_3e-4": Row("3e-4 for the encoder, 1e-3 for the decoder", "--learning-rate 3e-4 --decoder-lr-mult 3.3333"),
    "one_cycle": Row("one cosine cycle", "--restart-period {epochs}"),
    "cycles_1_4": Row("two cycles, the second 4 times as long", "--restart-period {fifth} --restart-mult 4"),
    "cycles_5": Row("five equal cycles", "--restart-period {fifth} --restart-mult 1"),
    "weight_decay": Row("weight_decay 1e-4", "--weight-decay 1e-4"),
    "no_ema": Row("no moving average of the weights", "--ema-decay 0"),
    "ema_99": Row("ema_decay 0.99", "--ema-decay 0.99"),
    "batch_4": Row("batches of 4", "--batch-size 4"),
    "batch_16": Row("batches of 16", "--batch-size 16"),
    "fine_tuned": Row("starts from the bundled model, at its learning rate", "--start-from bundled --encoder-weights="),
    "bfloat16": Row("bfloat16", "--precision bfloat16"),
    # --- loss, model
    "dice_1": Row("dice_weight 1", "--dice-weight 1"),
    "dice_3": Row("dice_weight 3", "--dice-weight 3"),
    "no_contour": Row("contour_weight 0", "--contour-weight 0"),
    "no_colour": Row("colour_weight 0", "--colour-weight 0"),
    "no_attention": Row("no attention gates", "--no-use-attention"),
    # --- squares, augmentations
    "black_bars": Row("black bars, in which nobody is", "--bars black"),
    "no_copy_paste": Row("copy_paste 0", "--copy-paste 0"),
    "copy_paste_all": Row("copy_paste 1", "--copy-paste 1"),
    "no_rotation": Row("no RandomRotate90", transforms={"RandomRotate90": {"p": 0.0}}),
    "zoom": Row("scale_limit (-0.2, 1), shift_limit 0.2, p 0.8", transforms={
        "ShiftScaleRotate": {"shift_limit": 0.2, "scale_limit": (-0.2, 1.0), "rotate_limit": 15, "p": 0.8},
    }),
    "wide": Row("zoom from 0.6 to 2.5, light and colours change further, 5 % grey", transforms={
        "ShiftScaleRotate": {"shift_limit": 0.2, "scale_limit": (-0.4, 1.5), "rotate_limit": 15, "p": 0.9},
        "RandomBrightnessContrast": {"brightness_limit": (-0.5, 0.3), "contrast_limit": 0.4, "p": 0.5},
        "HueSaturationValue": {"hue_shift_limit": 20, "sat_shift_limit": 40, "val_shift_limit": 20, "p": 0.4},
        "ToGray": {"p": 0.05},
    }),
    "colours": Row("brightness, contrast and colours change twice as far, twice as often", transforms={
        "RandomBrightnessContrast": {"brightness_limit": 0.4, "contrast_limit": 0.4, "p": 0.6},
        "HueSaturationValue": {"hue_shift_limit": 20, "sat_shift_limit": 40, "val_shift_limit": 20, "p": 0.6},
    }),
}  # fmt: skip


# --- one training -----------------------------------------------------------------------------------------


def result(name: str, seed: int, options: argparse.Namespace) -> dict:
    """Returns what was measured of a row with one seed: from --folder, or by a process of its own."""
    path = result_file(name, seed, options)
    if not path.exists():
        command = [sys.executable, __file__, name, "--one", str(seed), "--measure", options.measure]
        if subprocess.run([*command, "--folder", options.folder, "--", *options.flags]).returncode or not path.exists():
            raise UserError(f"{name} with seed {seed} was not measured: see above")
    found = json.loads(path.read_text())
    scores = (f"{part} {np.mean(scores['iou']):.3f}" for part, scores in found["sets"].items())
    print(f"{name}, seed {seed}: IoU", ", ".join(scores), f"({path})", flush=True)
    return found


def result_file(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Returns a file whose name depends on all that the result depends on, but for the program itself."""
    settings = dataclasses.asdict(config_of(name, seed, options, "checkpoints"))
    facts = json.dumps([settings, transforms_of(name), options.measure])
    return Path(options.folder, f"{name}_{seed}_{hashlib.sha256(facts.encode()).hexdigest()[:8]}.json")


def config_of(name: str, seed: int, options: argparse.Namespace, checkpoint_dir: str) -> trainer.Config:
    """Returns a row's settings: the flags of all rows, and its own over them.

    Raises:
        UsageError: they are no flags of trainer.py.
    """
    epochs = trainer.parse(options.flags)[0].num_epochs
    own = " ".join(ROWS[part].flags for part in name.split("+")).format(epochs=epochs, fifth=epochs // 5)
    return trainer.parse([*options.flags, *own.split(), f"--seed={seed}", f"--checkpoint-dir={checkpoint_dir}"])[0]


def transforms_of(name: str) -> dict[str, dict]:
    """Returns the arguments of transforms that a row changes, by the transform's name."""
    rows = [ROWS[part] for part in name.split("+")]
    return {transform: arguments for row in rows for transform, arguments in (row.transforms or {}).items()}


def edited_augmentations(arguments: dict[str, dict]) -> list:
    """Returns the list of loading/augmentation.py as if its lines had these arguments, by the transform's name.

    Transforms of albumentations that the list does not have come after its own.
    """
    transforms, missing = augmentations(), dict(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as the list itself does
        for index, transform in enumerate(transforms):
            own = {"border_mode": transform.border_mode} if hasattr(transform, "border_mode") else {}
            if changed := missing.pop(type(transform).__name__, None):
                transforms[index] = type(transform)(**own | changed)
        return transforms + [getattr(albumentations, name)(**changed) for name, changed in missing.items()]


def run_one(name: str, seed: int, options: argparse.Namespace) -> None:
    """Trains a row, evaluates it on each set, and writes its result file."""
    augmentation.augmentations = functools.partial(edited_augmentations, transforms_of(name))
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="run_") as folder:
        config = config_of(name, seed, options, folder)
        start = time.perf_counter()
        trainer.main(config)
        facts = {"row": name, "seconds": time.perf_counter() - start, "settings": dataclasses.asdict(config),
                 "git_revision": git_revision(Path(__file__).parents[1])}  # fmt: skip
        sets = {f"{root}:{split}": evaluate(Path(folder, LAST), config, root, split) for root, split in options.sets}
    with atomic_write(result_file(name, seed, options)) as file:
        file.write(json.dumps(facts | {"sets": sets}).encode())


def evaluate(checkpoint: Path, config: trainer.Config, root: str, split: str) -> dict[str, list[float]]:
    """Returns each metric of a set's photos, at their own size."""
    cutter = load(checkpoint, config.device, config.image_size)  # one look, as for all rows of docs/ablation.md
    dataset = COCOPersonDataset(root, split, cutter.image_size)
    rows = evaluate_photos(cutter, dataset, range(len(dataset)), usable_cores())
    readable = [row for row in rows if isinstance(row, dict)]
    return {metric: [row[f"original_{metric}"] for row in readable] for metric in METRICS}


# --- the table --------------------------------------------------------------------------------------------


def table(results: dict[str, list[dict]]) -> str:
    """Returns a Markdown table of the rows, each with its differences from the first one."""
    reference, *_ = results.values()
    sets = [*reference[0]["sets"]]
    head = ["row", "change", *(f"{part} {metric}" for part in sets for metric in METRICS), "minutes"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, runs in results.items():
        cells = [cell(runs, reference, part, metric) for part in sets for metric in METRICS]
        change = "; ".join(ROWS[part].change for part in name.split("+"))
        minutes = f"{np.mean([run['seconds'] for run in runs]) / 60:.1f}"
        lines.append("| " + " | ".join([name, change, *cells, minutes]) + " |")
    return "\n".join(lines)


def cell(runs: list[dict], reference: list[dict], part: str, metric: str) -> str:
    """Returns a row's mean over seeds and photos, and its difference from the reference's.

    The difference is a mean over photos ± its standard error, and in brackets the smallest and the largest of a seed;
    of the reference itself it is the seeds' means that are in brackets.
    """
    scores, before = (np.array([run["sets"][part][metric] for run in some]) for some in (runs, reference))
    if runs is reference:
        return f"{scores.mean():.3f} ({scores.mean(axis=1).min():.3f} to {scores.mean(axis=1).max():.3f})"
    difference = scores - before
    by_photo, by_seed = difference.mean(axis=0), difference.mean(axis=1)
    error = by_photo.std(ddof=1) / np.sqrt(len(by_photo))
    return f"{scores.mean():.3f}, {by_photo.mean():+.3f} ± {error:.3f} ({by_seed.min():+.3f} to {by_seed.max():+.3f})"


# --- the command line -------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the options; `flags` are those of trainer.py, behind a --."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = OneLineParser("ablation.py", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help="the first is what the others are compared with; a+b makes both changes")
    add("--list", action="store_true", help="name the rows")
    add("--measure", default="data/coco:val2017", help="ROOT:SPLIT,ROOT:SPLIT to measure on (%(default)s)")
    add("--seeds", type=int, default=3, help="trainings of each row (%(default)s)")
    add("--folder", default="checkpoints/ablation", help="of the results (%(default)s)")
    add("--one", type=int, help=argparse.SUPPRESS)  # the seed of the one training that this process is for
    options = parser.parse_args(argv[:end])
    options.flags = argv[end + 1 :]
    options.sets = [tuple(part.rsplit(":", 1)) for part in options.measure.split(",")]
    options.rows = options.rows or [*ROWS]
    if unknown := [part for name in options.rows for part in name.split("+") if part not in ROWS]:
        raise UsageError(f"there is no row {unknown[0]}: there are {', '.join(ROWS)}")
    if any(len(part) != 2 for part in options.sets) or options.seeds < 1:
        raise UsageError(f"--measure {options.measure} is to be ROOT:SPLIT, --seeds {options.seeds} 1 or more")
    return options


def main(argv: list[str]) -> None:
    options = parse(argv)
    if options.list:
        print("\n".join(f"{name:16} {row.change}" for name, row in ROWS.items()))
    elif options.one is not None:
        run_one(options.rows[0], options.one, options)
    else:
        results: dict[str, list[dict]] = {name: [] for name in options.rows}
        for seed in range(options.seeds):
            for name, runs in results.items():
                runs.append(result(name, seed, options))
        print(f"\n{machine()}\n\n{table(results)}", flush=True)


if __name__ == "__main__":
    sys.exit(run_cli("ablation.py", lambda: main(sys.argv[1:])))
