"""Where a run starts from: the checkpoint and settings of --resume, the weights of --start-from."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from datasets import COCOPersonDataset
from loading.annotations import DataError
from loading.sources import data_roots
from models import CheckpointError, UNetAutoencoder, model_weights, read_checkpoint
from training.checkpoints import RunFolder, newest_usable, same_launcher
from training.command_line import flag
from training.run import REQUIRED
from utils import Processes, UserError, all_gather_list, broadcast_object, run_on_rank0

Settings = TypeVar("Settings", bound=Any)  # a dataclass, as `Config`
Checkpoint = tuple[Path, dict]  # a file and its content

NEWEST = "newest"  # what a bare --resume means
# Settings that are always this start's: a checkpoint neither knows where it lies now nor this machine's devices.
NOT_RESTORED = ("resume", "checkpoint_dir", "run_name", "device")
# Settings that a resumed run must share with the one before it, or it would be another run.
SAME_WHEN_RESUMED = (
    *("encoder", "use_attention", "image_size", "bars", "train_split", "val_split", "category", "mask_values"),
    *("val_fraction", "sample", "seed", "restart_period", "restart_mult", "grad_accum_steps"),
)
DATA_FIELDS = ("data_root", "annotations", "photos", "masks")  # one explicit flag stands for all: data may have moved
INIT_ONLY = ("pretrained", "encoder_weights", "start_from")  # what a run began from cannot change later


class ResumeError(UserError):
    """The checkpoint belongs to another run than the one that was asked for."""


def find_start(
    config: Settings, explicit: Collection[str], processes: Processes, folder: RunFolder
) -> tuple[Settings, Checkpoint | None]:
    """Returns the settings of this start, and the checkpoint to resume from, if any; rank 0's disk decides.

    `explicit` names the settings of `config` that replace a checkpoint's: the flags on the command line.
    """

    def find() -> tuple[dict, Checkpoint | None]:
        folder.claim_existing()
        wanted = dataclasses.asdict(config)
        checkpoint = find_checkpoint(folder.path, config.resume, dataclasses.asdict(type(config)()))
        if checkpoint is None:
            return wanted, None
        settings = merge_settings(checkpoint, wanted, explicit)
        print(resume_message(checkpoint, settings, wanted, processes.world_size), flush=True)
        return settings, checkpoint

    settings, checkpoint = run_on_rank0(find, processes)
    own = {name: getattr(config, name) for name in NOT_RESTORED}
    return type(config)(**settings | own), checkpoint


def find_checkpoint(folder: Path, resume: str, defaults: dict) -> Checkpoint | None:
    """Returns the checkpoint that `resume` ("", `NEWEST` or a file) means, with defaults for settings that it lacks."""
    checkpoint = resolve_checkpoint(folder, resume)
    if checkpoint is None:
        return None
    path, content = checkpoint
    if not content.keys() >= REQUIRED:
        raise CheckpointError(f"{path} holds a model only, or is of an older version: resume from a last.pth of this "
                              f"one, or begin a new run with its weights (--start-from {path})")  # fmt: skip
    content["config"] = defaults | content["config"]
    return checkpoint


def resolve_checkpoint(folder: Path, resume: str) -> Checkpoint | None:
    """Returns the checkpoint that --resume means, or the newest of a run that torchrun has restarted."""
    # torchrun --max-restarts restarted this run after a process died: it must not return to a file named at the start.
    restarted = "TORCHELASTIC_RUN_ID" in os.environ and same_launcher(folder)
    if not (resume or restarted):
        return None
    named = resume not in ("", NEWEST)
    checkpoint = newest_usable(folder) if restarted or not named else None
    if checkpoint is None and named:
        checkpoint = Path(resume), read_checkpoint(resume)
    if checkpoint is None:
        print(f"nothing to resume in {folder}: starting from the beginning", flush=True)
    return checkpoint


def merge_settings(checkpoint: Checkpoint, settings: dict, explicit: Collection[str]) -> dict:
    """Returns the checkpoint's settings with the changes of this start: `NOT_RESTORED` and the explicit ones."""
    before, changes = checkpoint[1]["config"], {*explicit} - {*INIT_ONLY}
    if not changes.isdisjoint(DATA_FIELDS):
        changes |= {*DATA_FIELDS}
    changes |= {*NOT_RESTORED}
    now = {name: value if name in changes else before[name] for name, value in settings.items()}
    names = [*SAME_WHEN_RESUMED]
    if (before["decoder_lr_mult"] == 1) != (now["decoder_lr_mult"] == 1) and starts_from_imagenet(before):
        names.append("decoder_lr_mult")  # to 1, or away from it: the optimiser has one group of weights, or two
    refuse_changes(checkpoint[0], {flag(name): (before[name], now[name]) for name in names})
    return now


def starts_from_imagenet(settings: dict) -> bool:
    """Returns whether a run starts with a trained encoder and a random decoder."""
    return settings["pretrained"] and not settings["start_from"]


def refuse_other_data(checkpoint: Checkpoint, settings: dict, *datasets: COCOPersonDataset) -> None:
    """Raises a ResumeError if the photos or masks are not those that the checkpoint was trained with."""
    (path, content), now = checkpoint, describe_data(*datasets)
    advice = ": restore it, or begin a new run"
    refuse_changes(path, {"the training photos:": (content["photos"], len(datasets[0]))}, advice)
    single = settings["annotations"]
    roots = [Path(single).parent] if single else data_roots(settings["data_root"])
    for name, before in (content["data"] or {}).items():
        files = ", ".join(str(root / name) for root in roots)
        refuse_changes(path, {f"{files}:": (before, now.get(name))}, advice)


def refuse_unshared_data(processes: Processes, *datasets: COCOPersonDataset) -> None:
    """Raises a DataError if another machine has other photos or masks than rank 0's."""
    if processes.world_size == processes.local_world_size:
        return
    described = describe_data(*datasets)
    same = described == broadcast_object(described)
    others = all_gather_list([] if same else [f"{datasets[0].sources[0].root} of {socket.gethostname()}"])
    run_on_rank0(lambda: refuse_others(sorted({*others}), described), processes)


def refuse_others(others: list[str], described: dict[str, str]) -> None:
    """Raises a DataError that names the folders whose data are not rank 0's, if there are any."""
    if others:
        raise DataError(f"other photos or masks than rank 0's machine has ({'; '.join(described.values())}) are in "
                        f"{' and '.join(others)}: give all machines the same data")  # fmt: skip


def describe_data(*datasets: COCOPersonDataset) -> dict[str, str]:
    """Returns the number of photos and a checksum of their names, sizes and masks, by annotation file."""
    return {
        dataset.sources[0].layout.label: ", ".join(
            f"{len(source)} photos of checksum {source.index.checksum()}" for source in dataset.sources
        )
        for dataset in datasets
    }


def refuse_changes(path: Path, pairs: dict[str, tuple], advice: str = "") -> None:
    """Raises a ResumeError with all pairs of a value before and now that differ, by what they are of."""
    changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if changed:
        before = ", ".join(f"{name} {pair[0]}" for name, pair in changed.items())
        now = ", ".join(str(pair[1]) for pair in changed.values())
        raise ResumeError(f"{path} was trained with {before} and cannot go on with {now}{advice}")


def resume_message(checkpoint: Checkpoint, settings: dict, defaults: dict, world_size: int) -> str:
    """Returns the line that says where a run resumes, what has changed since, and which defaults do not apply."""
    path, content = checkpoint
    names = [name for name in settings if name not in ("resume", "device", *INIT_ONLY)]
    before = content["config"]
    text = f"going on from {path}, after epoch {content['epoch']}"
    text += f", step {content['step']}" if content["step"] else ""
    text += "".join(f", {name} {before[name]} is now {settings[name]}" for name in names
                    if before[name] != settings[name])  # fmt: skip
    if content["world_size"] != world_size:
        text += (f", processes {content['world_size']} is now {world_size} "
                 "(so not bit for bit the run that it would have been)")  # fmt: skip
    kept = [f"{name} {settings[name]} ({defaults[name]})" for name in names if settings[name] != defaults[name]]
    return text + (f"; from the checkpoint, and not from the defaults: {', '.join(kept)}" if kept else "")


MODEL_FIELDS = ("encoder", "use_attention", "image_size", "bars")  # settings that trained weights need again


def settings_of(path: Path) -> dict:
    """Returns the settings that a trained model's weights need; none for a file that is not there."""
    if not path.exists():  # a resumed run no longer needs it, and a new one will say so
        return {}
    config = read_checkpoint(path)["config"]
    return {name: config[name] for name in MODEL_FIELDS if name in config}


def load_weights(model: UNetAutoencoder, path: Path) -> None:
    """Loads the weights of a checkpoint, in whatever precision they were saved."""
    content = read_checkpoint(path)
    try:
        model.load_state_dict(model_weights(content))
    except (RuntimeError, TypeError, AttributeError):  # what PyTorch says lists every tensor
        config = content["config"]
        gates = "with" if config.get("use_attention", True) else "without"
        raise CheckpointError(f"the weights in {path} are those of {config.get('encoder')} {gates} attention gates: "
                              "another --encoder or --use-attention does not fit them") from None  # fmt: skip
