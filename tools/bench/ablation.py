"""What each choice of the recipe is worth: trains with and without it from the same seeds, compares photo by photo.

    python tools/bench/ablation.py base rate_30 dice_3 --data-root data/coco --encoder-weights mobilenet_v2.pth
    python tools/bench/ablation.py --list

Each row changes one thing of the base, dice_2+start_gates two, recipe+zoom one of the program as it is. A run is the
trainer itself; what was measured is kept in --folder and not measured again. The last model counts, not the best: no
photo that is measured has chosen it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, it is in tools/bench/ that Python looks

import evaluate
import trainer
from cutting.cutter import Cutter
from datasets import COCOPersonDataset
from tools.bench import variants
from tools.bench.measuring import machine
from training.report import git_revision
from training.settings import OneLineParser, UsageError, answer
from training.step import Tally
from utils import atomic_write, usable_cores

METRICS = ("iou", "boundary_iou")  # at the photos' own size
PROJECT = Path(__file__).resolve().parents[2]


@dataclass
class Row:
    """One change of the base: settings, and what is patched while it trains."""

    what: str
    settings: dict = field(default_factory=dict)
    patched: Callable[[trainer.Config], contextlib.AbstractContextManager] = lambda _config: contextlib.nullcontext()
    epochs: float = 1.0  # of the base's, where a step takes another time: equal time is what is compared


ROWS = {
    "base": Row("decoder_rate 10, average_decay 0.999, one cycle; the rest as before any row was tried",
                {"dice_weight": 1.0, "contour_weight": 0.0, "copy_paste": 0.0}, variants.before),
    "recipe": Row("the program as it is, in one cycle"),
    "rate_1": Row("one rate for all", {"decoder_rate": 1.0}),
    "rate_3": Row("the decoder learns 3 times as fast", {"decoder_rate": 3.0}),
    "rate_30": Row("30 times as fast", {"decoder_rate": 30.0}),
    "high_1": Row("one rate for all, 1e-3", {"learning_rate": 1e-3, "decoder_rate": 1.0}),
    "encoder_3": Row("3e-4 for the encoder, 1e-3 for the decoder", {"learning_rate": 3e-4, "decoder_rate": 10 / 3}),
    "slow": Row("a fifth of the rate", {"learning_rate": 2e-5}),
    "decay": Row("weight_decay 1e-4", {"weight_decay": 1e-4}),
    "warm_up": Row("the rates rise over the first 200 steps", patched=variants.warm_up),
    "no_average": Row("the last weights themselves", {"average_decay": 0.0}),
    "average_99": Row("average_decay 0.99", {"average_decay": 0.99}),
    "cycles_5": Row("5 equal cycles", {"restart_period": 1 / 5}),
    "cycles_1_4": Row("2 cycles, the second 4 times as long", {"restart_period": 1 / 5, "restart_mult": 4}),
    "cycles_1_3": Row("2 cycles, the second 3 times as long", {"restart_period": 1 / 4, "restart_mult": 3}),
    "start_bias": Row("alpha's bias starts at a share of 11 %", patched=variants.start_bias),
    "start_gates": Row("attention gates start open (0.95)", patched=variants.start_gates),
    "fixed_batchnorm": Row("the encoder's BatchNorm uses its stored averages", patched=variants.fixed_batchnorm),
    "batch_4": Row("batches of 4", {"batch_size": 4}),
    "batch_16": Row("batches of 16", {"batch_size": 16}),
    "dice_2": Row("dice_weight 2", {"dice_weight": 2.0}),
    "dice_3": Row("dice_weight 3", {"dice_weight": 3.0}),
    "lovasz": Row("Lovasz hinge added in the last third", patched=variants.lovasz),
    "jaccard": Row("soft Jaccard in the place of Dice", patched=variants.jaccard),
    "contour": Row("contour_weight 3", {"contour_weight": 3.0}),
    "crowds": Row("crowd regions out of the loss", patched=variants.crowds),
    "deep": Row("deep supervision at strides 4, 8, 16", patched=variants.deep_supervision),
    "zoom": Row("scale_limit (-0.2, 1), shift_limit 0.2, p 0.8", patched=variants.zoom),
    "to_persons": Row("half of the samples zoomed 1 to 2.5 times toward a person", patched=variants.to_persons),
    "no_paste": Row("copy_paste 0", {"copy_paste": 0.0}),
    "paste": Row("half of the samples show another one's persons as well", {"copy_paste": 0.5}),
    "paste_all": Row("all of them do", {"copy_paste": 1.0}),
    "cutmix": Row("half of the samples have a rectangle of another one", patched=variants.cutmix),
    "colours": Row("brightness, contrast and colours change twice as far, twice as often", patched=variants.colours),
    "nobody": Row("8 % more photos, in which nobody is", patched=variants.nobody, epochs=1 / 1.08),
    "no_rotation": Row("no RandomRotate90", patched=variants.no_rotation),
    "context": Row("a pooled gate at the bottleneck", patched=variants.context),
    "dropout": Row("a fifth of the deepest channels left out of a step", patched=variants.dropout),
    "light": Row("half the decoder's widths", patched=variants.light, epochs=1.1),
    "no_attention": Row("no attention gates", {"use_attention": False}),
    "no_colour": Row("no loss of the colours", {"colour_weight": 0.0}),
    "margin": Row("a margin of 16 replicated pixels inside the model", patched=variants.margin),
    "replicate": Row("the decoder's convolutions replicate at the rim", patched=variants.replicate),
    "float32": Row("float32 in the place of bfloat16", {"bfloat16_on_cpu": False}),
    "trained": Row("starts from the trained weights of --start-from, with one rate for all"),
    "smp": Row("segmentation_models_pytorch's U-Net, two rates", patched=variants.smp, epochs=1 / 2.2),
    "smp_1": Row("the same with one rate of 1e-3 and no average", {"learning_rate": 1e-3, "decoder_rate": 1.0,
                 "average_decay": 0.0}, patched=variants.smp, epochs=1 / 2.2),
}  # fmt: skip


# --- one run ----------------------------------------------------------------------------------------------


def measured(name: str, seed: int, options: argparse.Namespace) -> dict:
    """A row's run with one seed: from --folder, or trained and measured in a process of its own."""
    path = result_file(name, seed, options)
    if not path.exists() or json.loads(path.read_text()).get("made_with") != made_with(name, options):
        one = ["--one", f"{seed}", *options.passed_on]
        subprocess.run([sys.executable, __file__, name, *one], check=True)
    return json.loads(path.read_text())


def result_file(name: str, seed: int, options: argparse.Namespace) -> Path:
    return Path(options.folder, f"{name}_{options.image_size}_{options.epochs}_{seed}.json")


def made_with(name: str, options: argparse.Namespace) -> list:
    """What else a result depends on, but for the program itself."""
    start = [options.start_from] if "trained" in name.split("+") else []
    return [options.data_root, options.train_split, options.measure, bool(options.encoder_weights), *start]


def run_one(name: str, options: argparse.Namespace) -> None:
    """Trains, measures each set, and writes what came out to the row's file."""
    rows = rows_of(name)
    config = config_of(rows, options)
    kept: list[trainer.Run] = []
    with (
        patch.object(trainer, "validate", lambda run, *_: Tally(run.criterion, run.device).compute()),
        patch.object(trainer, "finish", lambda run, _folder: kept.append(run)),
        contextlib.ExitStack() as changed,
    ):
        for row in rows:
            changed.enter_context(row.patched(config))
        start = time.perf_counter()
        trainer.main(config)
        seconds = time.perf_counter() - start
    cutter = Cutter(kept[0].evaluated, config.image_size, torch.device("cpu"))
    sets = {f"{root}:{split}": measure(cutter, root, split) for root, split in options.sets}
    facts = {"row": name, "seed": config.seed, "made_with": made_with(name, options)}
    facts |= {"settings": dataclasses.asdict(config), "git_revision": git_revision(PROJECT)}
    with atomic_write(result_file(name, config.seed, options)) as file:
        file.write(json.dumps({**facts, "seconds": seconds, "sets": sets}).encode())


def rows_of(name: str) -> list[Row]:
    """The rows of a name, dice_2 or dice_2+start_gates: changes of the base, or of the recipe if it is among them."""
    rows = [ROWS[part] for part in name.split("+")]
    return rows if {"base", "recipe"} & {*name.split("+")} else [ROWS["base"], *rows]


def config_of(rows: list[Row], options: argparse.Namespace) -> trainer.Config:
    """The base's settings, and those of the rows over them."""
    epochs = max(1, round(options.epochs * math.prod(row.epochs for row in rows)))
    base = trainer.Config(
        data_root=options.data_root, train_split=options.train_split, val_split=options.sets[0][1],
        image_size=options.image_size, batch_size=8, num_workers=options.workers, cache=True, device="cpu",
        encoder="mobilenet_v2", encoder_weights=options.encoder_weights, pretrained=bool(options.encoder_weights),
        num_epochs=epochs, bfloat16_on_cpu=True, seed=options.one, keep_checkpoints=1, checkpoint_minutes=5,
        checkpoint_dir=str(Path(options.folder, "run")), restart_period=epochs, restart_mult=1,
    )  # fmt: skip
    changes = {name: value for row in rows for name, value in row.settings.items()}
    if ROWS["trained"] in rows:
        changes |= {"start_from": options.start_from, "encoder_weights": ""}
    if "restart_period" in changes:  # as a share of the run
        shares = round(1 / changes["restart_period"])
        if epochs % shares:
            raise UsageError(f"{epochs} epochs are no {shares} shares of whole ones: choose other --epochs")
        changes["restart_period"] = epochs // shares
    return dataclasses.replace(base, **changes, checkpoint_dir=f"{base.checkpoint_dir}_{os.getpid()}")


def measure(cutter: Cutter, root: str, split: str) -> dict[str, list[float]]:
    dataset = COCOPersonDataset(root, split, cutter.image_size)
    rows = evaluate.measure(cutter, dataset, range(len(dataset)), usable_cores())
    return {metric: [row[f"original_{metric}"] for row in rows] for metric in METRICS}


# --- the table --------------------------------------------------------------------------------------------


def table(found: dict[str, list[dict]], reference: str) -> str:
    """Markdown: of each row the means over seeds and photos, and their differences from the reference, paired."""
    sets = list(found[reference][0]["sets"])
    head = ["row", "change", *(f"{name} {metric}" for name in sets for metric in METRICS), "minutes"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, runs in found.items():
        others, is_reference = found[reference], name == reference
        cells = [compared(runs, others, part, metric, is_reference) for part in sets for metric in METRICS]
        minutes = f"{np.mean([run['seconds'] for run in runs]) / 60:.1f}"
        what = "; ".join(ROWS[part].what for part in name.split("+"))
        lines.append("| " + " | ".join([name, what, *cells, minutes]) + " |")
    return "\n".join(lines)


def compared(runs: list[dict], reference: list[dict], part: str, metric: str, is_reference: bool) -> str:
    """The mean, and its difference from the reference's, +- the standard error over photos; the seeds' spread."""
    ours, theirs = (np.array([run["sets"][part][metric] for run in some]) for some in (runs, reference))
    seeds = ours.mean(axis=1)
    if is_reference:
        return f"{ours.mean():.3f} ({seeds.min():.3f} to {seeds.max():.3f})"
    pairs = min(len(ours), len(theirs))
    difference = ours[:pairs] - theirs[:pairs]
    by_photo, by_seed = difference.mean(axis=0), difference.mean(axis=1)
    error = by_photo.std(ddof=1) / np.sqrt(len(by_photo))
    return f"{ours.mean():.3f}, {by_photo.mean():+.3f} ± {error:.3f} ({by_seed.min():+.3f} to {by_seed.max():+.3f})"


# --- the command line -------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("ablation.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help="the first is what the others are compared with (base)")
    add("--list", action="store_true", help="name the rows")
    add("--data-root", default="data/coco", help="photos to train on (%(default)s)")
    add("--train-split", default="train2017", help="the folder of the photos to train on (%(default)s)")
    add("--measure", default="data/coco:val2017", help="ROOT:SPLIT,ROOT:SPLIT to measure on (%(default)s)")
    add("--encoder-weights", default="", help="a file of mobilenet_v2's ImageNet weights; without it random ones")
    add("--start-from", default="box", help="the row trained: FILE of a mobilenet_v2 with gates, or box (%(default)s)")
    add("--image-size", type=int, default=160, help="pixels (%(default)s)")
    add("--epochs", type=int, default=12, help="of the base (%(default)s)")
    add("--seeds", type=int, default=3, help="runs of each row (%(default)s)")
    add("--workers", type=int, default=1, help="loader processes (%(default)s)")
    add("--folder", default="checkpoints/ablation", help="where results are kept (%(default)s)")
    add("--one", type=int, help=argparse.SUPPRESS)  # the seed of the one run that this process is for
    options = parser.parse_args(argv)
    options.passed_on = [argument for argument in argv if argument not in options.rows]
    options.sets = [tuple(part.rsplit(":", 1)) for part in options.measure.split(",")]
    if not options.encoder_weights and any("rate" in name or name == "smp" for name in options.rows):
        raise UsageError("rows of two rates need --encoder-weights: without them the encoder is random as well")
    if unknown := [part for name in options.rows for part in name.split("+") if part not in ROWS]:
        raise UsageError(f"there is no row {unknown[0]}: there are {', '.join(ROWS)}")
    return options


def main(options: argparse.Namespace) -> None:
    if options.list:
        print("\n".join(f"{name:16} {row.what}" for name, row in ROWS.items()))
    elif options.one is not None:
        run_one(options.rows[0], options)
    else:
        rows = options.rows or [*ROWS]
        found: dict[str, list[dict]] = {name: [] for name in rows}
        for seed in range(options.seeds):
            for name in rows:
                found[name].append(measured(name, seed, options))
        print(f"{machine()}\n\n{table(found, rows[0])}", flush=True)


def run_command(argv: list[str]) -> int:
    """The whole program. Returns its exit code: 0, or 2 for a user's mistake."""
    return answer("ablation.py", lambda: main(parse(argv[1:])))


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
