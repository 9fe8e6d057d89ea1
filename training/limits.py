"""Which settings there can be, each for itself and together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models import ENCODERS, LARGEST_INPUT, SMALLEST_INPUT
from training.settings import UsageError, flag

LIMITS = {  # smallest and largest value of each number
    "image_size": (SMALLEST_INPUT, LARGEST_INPUT), "batch_size": (1, 65536), "accumulate": (1, 65536),
    "copy_paste": (0, 1), "num_workers": (0, 1024), "val_share": (0.001, 0.999), "max_bad_photos": (0, 1),
    "num_epochs": (1, 10**6), "learning_rate": (1e-12, 10), "decoder_rate": (1, 1000), "weight_decay": (0, 1),
    "restart_period": (0, 10**6), "restart_mult": (1, 100), "grad_clip": (0, 1e6), "average_decay": (0, 1 - 1e-9),
    "colour_weight": (0, 1e6), "bce_weight": (0, 1e6), "dice_weight": (0, 1e6), "contour_weight": (0, 1e6),
    "seed": (0, 2**32 - 1), "checkpoint_minutes": (0, 1e6), "keep_checkpoints": (0, 10**6), "log_every": (1, 10**6),
}  # fmt: skip


def check(config: Any) -> None:
    """Refuses what cannot be, before anything is read or written."""
    for name, (low, high) in LIMITS.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise UsageError(f"{flag(name)} {value} is out of range: from {low} to {high}")
    if config.encoder not in ENCODERS:
        raise UsageError(f"--encoder {config.encoder} is not known: there are {', '.join(ENCODERS)}")
    if bool(config.annotations) != bool(config.photos):
        raise UsageError("--annotations and --photos go together: a COCO-format file, and the folder of its photos")
    if config.annotations and config.data_root != type(config).data_root:
        raise UsageError("--annotations and --data-root (or --sample) both name the data: choose one")
    if config.encoder_weights and not config.pretrained:
        raise UsageError("--encoder-weights needs --pretrained, which --no-pretrained or --sample has turned off")
    if config.encoder_weights and config.start_from:
        raise UsageError("--encoder-weights and --start-from both name the weights to start from: choose one")
    folder = Path(config.checkpoint_dir, config.run_name).resolve()
    if config.start_from and Path(config.start_from).resolve().parent == folder:
        raise UsageError(f"--start-from {config.start_from} lies in the run's own folder, whose files a new run moves "
                         "aside: give it a --run-name")  # fmt: skip
    if {*config.run_name} & {*"/\\"} or config.run_name in (".", ".."):
        raise UsageError(f"--run-name {config.run_name} is not the name of a folder: --checkpoint-dir takes a path")
    check_batch(config)


def check_batch(config: Any) -> None:
    if config.batch_size == 1 and config.image_size == SMALLEST_INPUT:
        raise UsageError(f"--batch-size 1 at --image-size {SMALLEST_INPUT} leaves BatchNorm a single value: "
                         "make one of them larger")  # fmt: skip
