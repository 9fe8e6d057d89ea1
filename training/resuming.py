"""Where a run goes on: which checkpoint, with which settings, and whether on the same data."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from datasets import COCOPersonDataset
from loading.sources import data_roots
from training.checkpoints import is_ours, newest_usable
from training.run import REQUIRED
from training.settings import flag
from utils import CheckpointError, UserError, read_checkpoint

NEWEST = "newest"  # what a bare --resume means
# What no checkpoint says: what this start goes on from, where it writes, and on which of this machine's devices, which
# has to be known before the processes meet and can ask the main one for its checkpoint.
OF_THIS_START = ("resume", "checkpoint_dir", "run_name", "device")
# Settings that a continued run must share with the one before it, or it would be another run.
SAME_WHEN_RESUMED = (
    *("encoder", "use_attention", "image_size", "train_split", "val_split", "category", "val_share", "sample", "seed"),
    *("restart_period", "restart_mult", "accumulate"),
)
THE_DATA = ("data_root", "annotations", "photos")  # one of them that is said stands for all: the data may have moved
# What a checkpoint that is older than a setting was trained with, where that is not the default.
BEFORE = {"decoder_rate": 1.0, "average_decay": 0.0, "contour_weight": 0.0, "copy_paste": 0.0}
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


def find_checkpoint(folder: Path, resume: str, defaults: dict) -> tuple[Path, dict] | None:
    """What --resume, or a restart, goes on from; nothing where there is nothing yet: one command serves for ever.

    Args:
        folder: of the run.
        resume: the setting.
        defaults: of the settings, for a checkpoint that is older than some of them.

    Returns:
        The checkpoint's path and content, or None.

    Raises:
        CheckpointError: the given file cannot be used.
    """
    found = asked_for(folder, resume)
    if found is None:
        return None
    path, content = found
    if not content.keys() >= REQUIRED:
        raise CheckpointError(f"{path} holds a model only, no state of a training: resume from last.pth")
    content["config"] = defaults | BEFORE | content["config"]
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


def settings_to_go_on_with(found: tuple[Path, dict], settings: dict, typed: Collection[str]) -> dict:
    """The checkpoint's settings, but for those of this start and those that were typed, which are changes.

    Args:
        found: the checkpoint.
        settings: what the run would have if it began now.
        typed: the names of those of them that the user has said for this start, and not in the file.

    Raises:
        ResumeError: some of these must not change; all are named at once.
    """
    before, changes = found[1]["config"], {*typed} - {*OF_THE_BEGINNING}
    if not changes.isdisjoint(THE_DATA):
        changes |= {*THE_DATA}
    changes |= {*OF_THIS_START}
    now = {name: value if name in changes else before[name] for name, value in settings.items()}
    names = [*SAME_WHEN_RESUMED]
    if (before["decoder_rate"] == 1) != (now["decoder_rate"] == 1) and not one_rate(before):
        names.append("decoder_rate")  # to 1, or away from it: the optimiser has one group of weights, or two
    refuse_changes(found[0], {flag(name): (before[name], now[name]) for name in names})
    return now


def one_rate(config: dict) -> bool:
    """Whether encoder and decoder learn equally fast, whatever the setting of the decoder's."""
    return not config["pretrained"] or bool(config["start_from"])


def refuse_other_data(found: tuple[Path, dict], settings: dict, *datasets: COCOPersonDataset) -> None:
    """Compares what there is to train on and to validate; the first difference says enough.

    Raises:
        ResumeError: it is not what the checkpoint was trained beside.
    """
    (path, content), now = found, contents(*datasets)
    advice = ": restore it, or begin a new run"
    refuse_changes(path, {"the training photos:": (content["photos"], len(datasets[0]))}, advice)
    single = settings["annotations"]
    roots = [Path(single).parent] if single else data_roots(settings["data_root"])
    for name, then in (content.get("data") or {}).items():  # an older one knows the number of photos alone
        files = ", ".join(str(root / name) for root in roots)
        refuse_changes(path, {f"{files}:": (then, now.get(name))}, advice)


def refuse_changes(path: Path, pairs: dict[str, tuple], advice: str = "") -> None:
    """Raises a ResumeError where, of what a name stands for, the value of before and today's differ."""
    others = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if others:
        then = ", ".join(f"{name} {pair[0]}" for name, pair in others.items())
        now = ", ".join(str(pair[1]) for pair in others.values())
        raise ResumeError(f"{path} was trained with {then} and cannot go on with {now}{advice}")


def described(found: tuple[Path, dict], settings: dict, in_the_file: dict, processes: int) -> str:
    """Where a run goes on, what has changed since, and what has not though this file would have it so.

    Args:
        settings: with which it goes on.
        in_the_file: those that it would have if it began now.
        processes: their number.
    """
    path, content = found
    names = [name for name in settings if name not in ("resume", *OF_THE_BEGINNING)]
    before, now, file = ({name: it[name] for name in names} for it in (content["config"], settings, in_the_file))
    text = f"going on from {path}, after epoch {content['epoch']}"
    text += f", step {content['step']}" if content["step"] else ""
    text += "".join(f", {name} {before[name]} is now {now[name]}" for name in names if before[name] != now[name])
    then = content.get("world_size", processes)
    if then != processes:
        text += f", processes {then} is now {processes} (so not bit for bit the run that it would have been)"
    kept = ", ".join(f"{name} {now[name]} ({file[name]})" for name in names if now[name] != file[name])
    return text + (f"; from the checkpoint, and not from the defaults: {kept}" if kept else "")
