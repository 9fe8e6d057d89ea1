"""What a run consists of; how it is saved, stopped by a signal, and gone on with."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

import utils
from training import checkpoints, interruptions, report
from training.interruptions import BrokenNumbersError, Stopped, Watch
from training.settings import flag
from training.step import FiniteSteps, Tally
from utils import CheckpointError, Processes, UserError, read_checkpoint

if TYPE_CHECKING:
    from datasets import COCOPersonDataset
    from loading.unreadable import TolerantDataset
    from trainer import Config


class ConfigError(UserError):
    """A setting that cannot be; the message is one line for the user."""


@dataclass
class Run:
    """What is trained and how far it has come: everything that a checkpoint holds."""

    model: nn.Module
    parallel_model: nn.Module  # the same, wrapped where several processes share the work
    optimizer: Adam
    scheduler: CosineAnnealingWarmRestarts
    scaler: torch.amp.GradScaler
    amp_dtype: torch.dtype | None
    parts: int = 1  # that a batch is computed in, one after another, where the GPU's memory does not hold all of it
    photos: int = 0  # of the training
    world_size: int = 1
    source: Path | None = None  # the checkpoint that it goes on from
    data: dict[str, str] | None = None  # the `contents` of its data sets
    epochs_done: int = 0
    step: int = 0  # of the epoch that has begun, so many are done
    tally: Tally | None = None  # and these are its figures so far
    dataset: TolerantDataset | None = None  # of the training, which knows the photos that could not be read
    finite: FiniteSteps | None = None  # of the epoch that has begun
    broken_in_a_row: int = 0  # of the last steps before it, so many had no finite loss or gradient
    learning_rate: float = 0.0  # of the last step
    best_iou: float = -1.0
    best: dict | None = None  # the best model, until it is on the disk
    saved: bool = True  # whether the last epoch is
    history: list[dict] = dataclasses.field(default_factory=list)

    PARTS = ("model", "optimizer", "scheduler", "scaler")
    NUMBERS = ("photos", "learning_rate", "best_iou", "history")

    def checkpoint(self, config: Config, tallies: list[dict] | None = None) -> dict:
        """What is saved; `tallies` are those of all processes in the middle of an epoch."""
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        numbers = {name: getattr(self, name) for name in self.NUMBERS}
        place = {"epoch": self.epochs_done, "step": self.step, "tallies": tallies or []}
        place |= {"world_size": self.world_size, "data": self.data, "broken_in_a_row": self.broken_in_a_row}
        return {**place, "config": dataclasses.asdict(config), **parts, **numbers}

    def result(self, config: Config, metrics: dict[str, float]) -> dict:
        """What best_model.pth holds: enough to predict with, and what it is worth."""
        model = self.model.state_dict()
        return {"epoch": self.epochs_done, "config": dataclasses.asdict(config), "model": model, "metrics": metrics}

    def train_on(self, dataset: TolerantDataset) -> None:
        """Which photos of it cannot be read goes into the checkpoints within an epoch; a restored one's count again."""
        self.dataset = dataset
        dataset.go_on(self.tally.bad_photos if self.tally else [])

    def unfinished(self) -> list[dict]:
        """This process's figures of an epoch that has begun; none between two epochs."""
        if self.tally is None:
            return []
        if self.dataset is not None:
            self.tally.bad_photos = self.dataset.bad()
        if self.finite is not None:
            self.tally.skipped, self.broken_in_a_row = self.finite.fetch(), self.finite.in_a_row
        return [self.tally.state()]

    def end_epoch(self) -> None:
        self.epochs_done, self.step, self.tally, self.finite = self.epochs_done + 1, 0, None, None

    def restore(self, content: dict, config: Config, processes: Processes) -> None:
        """Takes over a checkpoint.

        Raises:
            CheckpointError: it does not fit this model.
        """
        try:
            self._restore(content, config, processes)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"the checkpoint does not fit this program's model: {reason}") from None

    def _restore(self, content: dict, config: Config, processes: Processes) -> None:
        for group in content["optimizer"]["param_groups"]:
            group["fused"] = self.optimizer.defaults["fused"]  # how the step is computed is this program's business
        for name in self.PARTS:
            if content[name]:  # a scaler that was not needed has no state, and one that now is starts anew
                getattr(self, name).load_state_dict(content[name])
        for name in self.NUMBERS:
            setattr(self, name, content[name])
        self.epochs_done, tallies = content["epoch"], content["tallies"]
        self.broken_in_a_row = content.get("broken_in_a_row", 0)  # an older checkpoint does not know
        photos_done = content["step"] * len(tallies) * photos_per_step(content["config"])
        self.step = photos_done // (processes.world_size * photos_per_step(dataclasses.asdict(config)))
        if tallies:
            self.tally = Tally.of(tallies, processes)


def photos_per_step(config: dict) -> int:
    """Of one process."""
    return config["batch_size"] * config.get("accumulate", 1)


# --- going on -----------------------------------------------------------------------------------------------


NEWEST = "newest"  # what a bare --resume means
# Settings that a continued run must share with the one before it, or it would be another run.
SAME_WHEN_RESUMED = (
    *("encoder", "use_attention", "image_size", "train_split", "val_split", "seed"),
    *("learning_rate", "weight_decay", "restart_period", "restart_mult", "accumulate"),
)


# Those whose change does not even change its bits.
SAME_BITS = {
    *("data_root", "num_workers", "pin_memory", "cache", "pretrained", "encoder_weights", "num_epochs"),
    *("checkpoint_dir", "checkpoint_minutes", "keep_checkpoints", "log_every", "sample"),
}


def restarted(config: Config) -> bool:
    """Whether torchrun --max-restarts has started this run anew, after a process of it died, on any machine."""
    return "TORCHELASTIC_RUN_ID" in os.environ and checkpoints.is_ours(Path(config.checkpoint_dir))


def contents(config: Config, train: COCOPersonDataset, val: COCOPersonDataset) -> dict[str, str]:
    """By annotation file what there is to train on and to validate, wherever it lies: a resume must find it again."""
    splits = {config.train_split: train, config.val_split: val}
    return {
        f"annotations/instances_{split}.json": f"{len(dataset)} photos of checksum {dataset.index.checksum()}"
        for split, dataset in splits.items()
    }


def find_checkpoint(
    config: Config, world_size: int, photos: int, data: dict[str, str] | None
) -> tuple[Path, dict] | tuple[None, None]:
    """What --resume, or a restart, goes on from; nothing where there is nothing yet: one command serves for ever.

    Args:
        config: the settings of the run that is to go on.
        world_size: its processes.
        photos: of its training.
        data: the `contents` of its data sets; None does not ask for the same.

    Raises:
        CheckpointError: the given file cannot be used.
        ConfigError: a setting or the data differs from the checkpoint's that must not.
    """
    folder, again = Path(config.checkpoint_dir), restarted(config)
    if not (config.resume or again):
        return None, None
    newest = config.resume in ("", NEWEST) or again  # not a given file for a second time
    path, checkpoint = (checkpoints.newest_usable(folder) if newest else None) or (None, None)
    if checkpoint is None and config.resume not in ("", NEWEST):
        path, checkpoint = Path(config.resume), read_checkpoint(config.resume)
    if checkpoint is None:
        print(f"nothing to resume in {folder}: starting from the beginning", flush=True)
        return None, None
    if not {*Run.PARTS, *Run.NUMBERS, "step", "tallies"} <= checkpoint.keys():
        raise CheckpointError(f"{path} holds a model only, no state of a training: resume from last.pth")
    refuse_another_run(path, checkpoint, config, photos, data)
    place = f"after epoch {checkpoint['epoch']}" + (f", step {checkpoint['step']}" if checkpoint["step"] else "")
    print(f"going on from {path}, {place}{differences(checkpoint, config, world_size)}", flush=True)
    return path, checkpoint


def refuse_another_run(path: Path, checkpoint: dict, config: Config, photos: int, data: dict | None) -> None:
    before = checkpoint["config"]
    set_to = {flag(key): (before_or_default(before, key, config), getattr(config, key)) for key in SAME_WHEN_RESUMED}
    found = {"the training photos:": (checkpoint["photos"], photos)}
    if data is not None:
        known = checkpoint.get("data") or {}  # an older one knows the number of photos alone
        found |= {f"{Path(config.data_root) / name}:": (then, data.get(name)) for name, then in known.items()}
    for name, (then, now) in (set_to | found).items():
        if then != now:
            advice = ": restore it, or begin a new run" if name in found else ""
            raise ConfigError(f"{path} was trained with {name} {then} and cannot go on with {now}{advice}")


def before_or_default(before: dict, name: str, config: Config) -> object:
    """A setting of an earlier run, which may be older than the setting."""
    return before.get(name, getattr(type(config), name))


def differences(checkpoint: dict, config: Config, world_size: int) -> str:
    """What is no longer as it was, and whether the bits will be other ones for it."""
    before, processes = checkpoint["config"], checkpoint.get("world_size", world_size)
    settings = dataclasses.asdict(config)
    pairs = {name: (before_or_default(before, name, config), now) for name, now in settings.items()}
    pairs = {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name != "resume"}
    if processes != world_size:
        pairs["processes"] = (processes, world_size)
    text = "".join(f", {name} {then} is now {now}" for name, (then, now) in pairs.items())
    return text + (" (so not bit for bit the run that it would have been)" if pairs.keys() - SAME_BITS else "")


@contextlib.contextmanager
def saved_when_stopped(run: Run, config: Config, processes: Processes) -> Iterator[Watch]:
    """Takes signals from now on; at the first one the run's state is saved, on all processes, before they end."""
    with Watch(processes, config.checkpoint_minutes) as watch:
        try:
            yield watch
        except Stopped as stop:
            saved = save_unfinished(run, config, processes)
            utils.largest_of_each([0])  # wait for all: torchrun, seeing one of them end, would end the one that saves
            watch.ignore_signals()
            if processes.is_main:
                outcome = "--resume goes on from there" if saved else "--resume goes on from the checkpoint before"
                print(f"stopped by {stop} after epoch {run.epochs_done}, step {run.step}: {outcome}", flush=True)
            raise
        except BrokenNumbersError as error:
            good = Path(config.checkpoint_dir) / checkpoints.LAST
            advice = f"{good} is the last good checkpoint" if good.exists() else "there is no checkpoint yet"
            raise BrokenNumbersError(f"{error}; {advice}; a lower --learning-rate may help") from None


def save_unfinished(run: Run, config: Config, processes: Processes) -> bool:
    """Saves an epoch that has begun. Returns whether that worked; a full disk is no reason to end a training."""
    tallies = utils.from_all(run.unfinished())
    if not processes.is_main:
        return True
    folder = Path(config.checkpoint_dir)
    # Not without the best model: a checkpoint that knows its score would never let it be written.
    return save_best(run, config) and tried(lambda: checkpoints.save_last(folder, run.checkpoint(config, tallies)))


def tried(save: Callable[[], None]) -> bool:
    try:
        save()
    except (CheckpointError, OSError) as error:
        print(f"{error}: the training goes on, and it will be tried again", flush=True)
        return False
    return True


def save_best(run: Run, config: Config) -> bool:
    """Writes the best model where that is still to be done; what cannot be written now is kept in memory."""
    path = Path(config.checkpoint_dir) / checkpoints.BEST
    if run.best is None or tried(lambda: checkpoints.save(run.best, path)):
        run.best = None
        return True
    run.best = copy.deepcopy(run.best)  # the model goes on changing
    return False


def save_epoch(run: Run, config: Config) -> bool:
    """Writes what a whole epoch leaves. The checkpoint last: cut off before it, the run does the epoch again."""
    folder = Path(config.checkpoint_dir)
    keep = config.keep_checkpoints
    return (
        save_best(run, config)
        and tried(lambda: report.write_history(run.history, folder / "history.csv"))
        and tried(lambda: checkpoints.save_epoch(folder, run.checkpoint(config), keep))
    )


def insist_on_saving(run: Run, config: Config) -> None:
    """At the end of the run there is no later checkpoint that would make up for one that could not be written.

    Raises:
        CheckpointError: an hour was not enough to make room.
    """
    for _ in range(int(3600 / interruptions.RETRY_SECONDS)):
        if run.saved:
            return
        time.sleep(interruptions.RETRY_SECONDS)
        run.saved = save_epoch(run, config)
    if not run.saved:
        raise CheckpointError(f"the last epoch cannot be written to {config.checkpoint_dir}")


def claim_folder(config: Config) -> BinaryIO | None:
    """Claims the folder before a checkpoint in it is read: no other run may write a newer one in between.

    None where no run has claimed it yet, so that a setting that is refused leaves no trace.

    Raises:
        ConfigError: it cannot be written.
        CheckpointError: another run is writing there.
    """
    folder = Path(config.checkpoint_dir)
    with writable(folder):
        return checkpoints.claim(folder) if (folder / checkpoints.LOCK).exists() else None


def prepare_folder(config: Config, run: Run, claim: BinaryIO | None) -> BinaryIO:
    """Makes the folder that the run writes to, and claims it now if not before; what is in the way is moved aside.

    Raises:
        ConfigError: it cannot be written.
        CheckpointError: another run is writing there.
    """
    folder = Path(config.checkpoint_dir)
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        claim = claim or checkpoints.claim(folder)
        aside = make_room(folder, run, went_back=Path(config.resume) == run.source)
        checkpoints.sign(claim)
    if aside:
        print(f"an earlier run's files were moved to {aside}", flush=True)
    return claim


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--checkpoint-dir {folder} cannot be written: {error.strerror}") from None


def make_room(folder: Path, run: Run, went_back: bool) -> Path | None:
    """Moves aside what the run would overwrite and does not go on from. Returns where to, None if there is nothing."""
    if run.source is None or run.source.resolve().parent != folder.resolve():
        return checkpoints.set_aside(folder)
    if went_back and checkpoints.epochs_after(folder, run.epochs_done):
        return checkpoints.set_aside(folder, after=run.epochs_done)
    return checkpoints.set_aside_damaged(folder, run.epochs_done, run.source)
