"""What is said and kept of a run as a whole: the banner at its start, run.json, the last line."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import subprocess
import sys
import textwrap
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from datasets import COCOPersonDataset, PhotoLoader
from loading.annotations import describe_left_out
from loading.layout import Subset
from loading.sources import shared_folders
from training.checkpoints import BEST, disk_needed
from training.loggers import ConsoleLogger
from training.optim import describe_schedule
from training.run import Run, photos_per_step
from utils import SCORES, VERSION, atomic_write, counted

PACKAGES = ("torch", "torchvision", "albumentations", "numpy", "cv2", "simplejpeg", "PIL")  # that bits may depend on


def banner(run: Run, changed: dict, folder: Path, train_loader: PhotoLoader, val_loader: PhotoLoader) -> str:
    """Returns the facts of a run, with the settings that are `changed`, and the head of the epochs' table."""
    train, val, settings = train_loader.dataset.dataset, val_loader.dataset.dataset, run.settings
    processes, num_epochs, keep = run.processes, settings["num_epochs"], settings["keep_checkpoints"]
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    disk = disk_needed(4 * parameters, 3 + (run.ema is not None), keep, num_epochs)
    facts = {
        "settings": " ".join(f"{name}={value}" for name, value in changed.items()) or "all as in the file",
        **data_facts(train, val),
        "device": f"{processes.device}, {dtype_name(run.amp_dtype)}, {processes.world_size} process"
                  f"{'es' * (processes.world_size > 1)}, {counted(train_loader.num_workers, 'worker')} each",
        "note": "; ".join(filter(None, [processes.note, overlap_warning(train, val)])),
        "batch": f"{counted(photos_per_step(settings) * processes.world_size, 'photo')} a step, "
                 f"{counted(run.steps_per_epoch, 'step')} an epoch",
        "lr": describe_schedule(run.scheduler, num_epochs),
        "memory": f"{settings['batch_size']} photos at once do not fit in the free memory of {processes.device}: "
                  f"each batch is split into {run.micro_batches} micro-batches" if run.micro_batches > 1 else "",
        "model": f"{settings['encoder']}, {parameters / 1e6:.1f} million parameters"
                 f"{', from ' + settings['start_from'] if settings['start_from'] else ''}{frozen_bn_note(run)}",
        "disk": f"up to {readable_size(disk)} for checkpoints of {f'{keep} epochs' if keep else 'all epochs'} "
                f"in {folder}, {readable_size(shutil.disk_usage(folder).free)} free",
    }  # fmt: skip
    return wrapped(facts) + "\n" + ConsoleLogger.HEAD


def wrapped(facts: dict[str, str]) -> str:
    """Returns facts that are not empty, under one another, wrapped to the terminal: `{"data": "252 photos ..."}`."""
    facts = {name: text for name, text in facts.items() if text}
    margin, columns = max(map(len, facts)) + 2, min(shutil.get_terminal_size((100, 24)).columns, 100)
    layout: dict[str, Any] = {"subsequent_indent": " " * margin, "break_on_hyphens": False, "break_long_words": False}
    return "\n".join(textwrap.fill(f"{name:>{margin - 2}}  {text}", columns, **layout) for name, text in facts.items())


def data_facts(train: COCOPersonDataset, val: COCOPersonDataset) -> dict[str, str]:
    """Returns where the photos lie, how many there are, what their masks mean, and what is left out."""
    sources = [*train.sources, *val.sources]
    return {
        "data": data_fact(train, val),
        "read as": "; ".join(dict.fromkeys(source.meaning for source in sources)),
        "split": split_fact(val),
        "left out": "; ".join(f"{source.name}: {describe_left_out(source.index.left_out)}"
                              for source in sources if source.index.left_out),
    }  # fmt: skip


def data_fact(train: COCOPersonDataset, val: COCOPersonDataset) -> str:
    """Returns the numbers of photos, and where they lie; of several roots how many of them in which."""
    roots = {source.root for source in [*train.sources, *val.sources]}
    if len(roots) == 1:
        return f"{counted(len(train), 'photo')} to train on, {len(val)} to validate, in {roots.pop()}"
    counts = [", ".join(f"{len(source)} in {source.root}" for source in split.sources) for split in (train, val)]
    return f"{counted(len(train), 'photo')} to train on ({counts[0]}), {len(val)} to validate ({counts[1]})"


def split_fact(val: COCOPersonDataset) -> str:
    """Returns where and how a split was made, or "" where the data have one."""
    subsets = {str(source.photos): source.layout.subset for source in val.sources}
    made = {photos: subset.val_fraction for photos, subset in subsets.items() if isinstance(subset, Subset)}
    if not made:
        return ""
    fraction = f"{max(made.values()):g} of them to validate (--val-fraction)"
    return f"made here: the names of the photos in {' and '.join(made)} choose {fraction}"


def overlap_warning(train: COCOPersonDataset, val: COCOPersonDataset) -> str:
    """Returns a warning if photos are both trained on and validated, else ""."""
    folders = ", ".join(map(str, shared_folders(train.sources, val.sources)))
    return f"the photos in {folders} are trained on and validated: the metrics say nothing of others" * bool(folders)


def dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype or torch.float32).removeprefix("torch.")


def frozen_bn_note(run: Run) -> str:
    """Returns the banner's note on the modules whose BatchNorm is frozen, or ""."""
    module = run.pretrained_module
    if not run.frozen_bn or not any("running_mean" in name for name, _ in module.named_buffers()):
        return ""
    owner = "its" if module is run.model else "the encoder's"
    return f", {owner} BatchNorm statistics frozen"


def readable_size(size: float) -> str:
    """Returns a number of bytes as people say it: 1.5 GB."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def best_line(run: Run, folder: Path) -> str:
    """Returns the last line of a run that is complete."""
    best, name = run.best_row(), run.settings["best_metric"]
    return (f"the best epoch was {best['epoch']} of {run.epochs_done}: validation {SCORES[name]} "
            f"{best[run.best_metric]:.3f}, in {folder / BEST}")  # fmt: skip


def write_run_json(run: Run, path: Path) -> None:
    """Writes how a run was made: the command, all settings, versions, the git revision, and its earlier starts."""
    facts = {
        "command": sys.argv, "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "resumed_from": str(run.source) if run.source else None, "processes": run.processes.world_size,
        "device": str(run.device), "precision": dtype_name(run.amp_dtype),
        "git_revision": git_revision(Path(__file__).resolve().parents[1]),
        "version": VERSION,
        "versions": {"python": platform.python_version()}
                    | {name: sys.modules[name].__version__ for name in PACKAGES if name in sys.modules},
        "settings": run.settings, "data": run.data, "earlier_starts": [],
    }  # fmt: skip
    if run.source and path.exists():
        with contextlib.suppress(ValueError, AttributeError, OSError):  # somebody has edited it
            before = json.loads(path.read_text())
            facts["earlier_starts"] = [*before.pop("earlier_starts", []), before]
    with atomic_write(path) as file:
        file.write(json.dumps(facts, indent=2).encode())


def git_revision(project: Path) -> str | None:
    """Returns the commit, with "-dirty" if files were edited; None if git is not installed or this is no clone."""
    if not (project / ".git").exists():  # a folder of another repository would give that one's
        return None
    command = ["git", "-C", str(project), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return None
