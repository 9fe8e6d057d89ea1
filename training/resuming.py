"""Where a run goes on: which checkpoint, and whether it is one of this run."""

from __future__ import annotations

import os
from pathlib import Path

from datasets import COCOPersonDataset
from loading.sources import data_roots
from training.checkpoints import is_ours, newest_usable
from training.run import REQUIRED
from training.settings import flag
from utils import CheckpointError, UserError, read_checkpoint

NEWEST = "newest"  # what a bare --resume means
# Settings that a continued run must share with the one before it, or it would be another run.
SAME_WHEN_RESUMED = (
    *("encoder", "use_attention", "image_size", "train_split", "val_split", "category", "val_share", "seed"),
    *("learning_rate", "decoder_rate", "weight_decay", "restart_period", "restart_mult", "accumulate"),
)
# What a checkpoint that is older than a setting was trained with, where that is not the default.
BEFORE = {"decoder_rate": 1.0, "average_decay": 0.0, "contour_weight": 0.0}
OF_THE_BEGINNING = ("pretrained", "encoder_weights", "start_from")  # nothing to be changed later


class ResumeError(UserError):
    """What is to be gone on with is another run."""


def contents(*datasets: COCOPersonDataset) -> dict[str, str]:
    """By annotation file what there is to train on and to validate, wherever it lies: a resume must find it again."""
    return {it.sources[0].layout.label: content_of(it) for it in datasets}


def content_of(dataset: COCOPersonDataset) -> str:
    """Root by root, in the order that makes the samples."""
    found = (f"{len(source)} photos of checksum {source.index.checksum()}" for source in dataset.sources)
    return ", ".join(found)


def find_checkpoint(
    folder: Path, settings: dict, defaults: dict, processes: int, photos: int, data: dict[str, str]
) -> tuple[Path, dict] | None:
    """What --resume, or a restart, goes on from; nothing where there is nothing yet: one command serves for ever.

    Args:
        folder: of the run.
        settings: of the run that is to go on.
        defaults: of the settings, for a checkpoint that is older than some of them.
        processes: their number.
        photos: of its training.
        data: the `contents` of its data sets.

    Returns:
        The checkpoint's path and content, or None.

    Raises:
        CheckpointError: the given file cannot be used.
        ResumeError: a setting or the data differs from the checkpoint's that must not.
    """
    found = asked_for(folder, settings["resume"])
    if found is None:
        return None
    path, content = found
    if not content.keys() >= REQUIRED:
        raise CheckpointError(f"{path} holds a model only, no state of a training: resume from last.pth")
    content["config"] = defaults | BEFORE | content["config"]
    refuse_another_run(path, content, settings, photos, data)
    place = f"after epoch {content['epoch']}" + (f", step {content['step']}" if content["step"] else "")
    print(f"going on from {path}, {place}{differences(content, settings, processes)}", flush=True)
    return found


def asked_for(folder: Path, resume: str) -> tuple[Path, dict] | None:
    """The checkpoint that the setting means, or the newest of a run that torchrun has started anew."""
    # torchrun --max-restarts has started this run anew after a process of it died: not a given file for a second time.
    again = "TORCHELASTIC_RUN_ID" in os.environ and is_ours(folder)
    if not (resume or again):
        return None
    named = resume not in ("", NEWEST)
    found = newest_usable(folder) if again or not named else None
    if found is None and named:
        found = Path(resume), read_checkpoint(resume)
    if found is None:
        print(f"nothing to resume in {folder}: starting from the beginning", flush=True)
    return found


def refuse_another_run(path: Path, content: dict, settings: dict, photos: int, data: dict[str, str]) -> None:
    """All settings that differ are named at once; of the data the first difference says enough."""
    before = content["config"]
    one_rate = not before["pretrained"] or before["start_from"]  # of the decoder's nothing was taken
    names = [name for name in SAME_WHEN_RESUMED if not (one_rate and name == "decoder_rate")]
    refuse_changes(path, {flag(name): (before[name], settings[name]) for name in names})
    advice = ": restore it, or begin a new run"
    refuse_changes(path, {"the training photos:": (content["photos"], photos)}, advice)
    single = settings.get("annotations")
    roots = [Path(single).parent] if single else data_roots(settings["data_root"])
    for name, then in (content.get("data") or {}).items():  # an older one knows the number of photos alone
        files = ", ".join(str(root / name) for root in roots)
        refuse_changes(path, {f"{files}:": (then, data.get(name))}, advice)


def refuse_changes(path: Path, pairs: dict[str, tuple], advice: str = "") -> None:
    """Raises a ResumeError where, of what a name stands for, the value of before and today's differ."""
    others = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if others:
        then = ", ".join(f"{name} {pair[0]}" for name, pair in others.items())
        now = ", ".join(str(pair[1]) for pair in others.values())
        raise ResumeError(f"{path} was trained with {then} and cannot go on with {now}{advice}")


def beginning(found: tuple[Path, dict] | None) -> dict:
    """The settings by which the run began that goes on from a checkpoint, whatever is said now."""
    config = found[1]["config"] if found else {}
    return {name: config[name] for name in OF_THE_BEGINNING if name in config}


def differences(content: dict, settings: dict, processes: int) -> str:
    """What is no longer as it was."""
    names = [name for name in settings if name not in ("resume", *OF_THE_BEGINNING)]
    pairs = {name: (content["config"][name], settings[name]) for name in names}
    text = "".join(f", {name} {then} is now {now}" for name, (then, now) in pairs.items() if then != now)
    then = content.get("world_size", processes)
    if then != processes:
        text += f", processes {then} is now {processes} (so not bit for bit the run that it would have been)"
    return text
