"""What a run tells: the banner, the progress bar, a line an epoch, the rows of history.csv, run.json."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import shutil
import subprocess
import sys
import textwrap
import time
from collections import deque
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import COCOPersonDataset
from loading.annotations import describe_left_out
from loading.sources import shared_folders
from loading.unreadable import SKIPPED
from training.checkpoints import BEST, disk_needed
from training.run import Run
from training.schedule import Schedule, cycles
from utils import atomic_write, counted

TABLE_HEAD = "  epoch | train loss   IoU  Dice | val loss   IoU  Dice |      lr    time wait"  # and a star
PACKAGES = ("torch", "torchvision", "albumentations", "numpy", "cv2", "simplejpeg", "PIL")  # that bits may depend on

# --- at the start -----------------------------------------------------------------------------------------


def banner(facts: dict[str, str]) -> str:
    """The facts of a run under one another, wrapped to the terminal: `{"data": "252 photos ...", ...}`."""
    margin, columns = max(map(len, facts)) + 2, min(shutil.get_terminal_size((100, 24)).columns, 100)
    layout = {"width": columns, "subsequent_indent": " " * margin, "break_on_hyphens": False, "break_long_words": False}
    return "\n".join(textwrap.fill(f"{name:>{margin - 2}}  {text}", **layout) for name, text in facts.items())


def describe(run: Run, changed: dict, folder: Path, train_loader: DataLoader, val_loader: DataLoader) -> str:
    """The start banner: the settings that differ from their defaults, the data, the processes, the model, the disk."""
    train, val, settings = train_loader.dataset.dataset, val_loader.dataset.dataset, run.settings
    batch_size, accumulate, keep = settings["batch_size"], settings["accumulate"], settings["keep_checkpoints"]
    parameters, processes = sum(parameter.numel() for parameter in run.model.parameters()), run.processes
    epochs = settings["num_epochs"]
    disk = disk_needed(4 * parameters, 3 + (run.average is not None), keep, epochs)
    caches = ", ".join(str(source.cache.path.parent) for source in train.sources if source.cache)
    facts = {
        "settings": " ".join(f"{name}={value}" for name, value in changed.items()) or "all as in the file",
        "data": data_fact(train, val),
        "split": split_fact(val),
        "samples": f"letterboxed once, in {caches}" if caches else "from the photos every time",
        "left out": "; ".join(f"{source.name}: {describe_left_out(source.index.left_out)}"
                              for source in [*train.sources, *val.sources] if source.index.left_out),
        "device": f"{processes.device}, {computed_in(run)}, {processes.world_size} process"
                  f"{'es' if processes.world_size > 1 else ''}, {counted(train_loader.num_workers, 'worker')} each",
        "note": "; ".join(filter(None, [
            processes.note, unfinished_cycle(run.scheduler, epochs) * (run.scheduler.end == math.inf),
            seen_twice(train, val)])),
        "batch": f"{counted(batch_size * accumulate * processes.world_size, 'photo')} a step, "
                 f"{counted(math.ceil(len(train_loader) / accumulate), 'step')} an epoch",
        "rates": f"{described_rates(run.scheduler)}, in {described_cycles(run.scheduler, epochs)}"
                 f"{', weights averaged' if run.average is not None else ''}",
        "memory": f"{batch_size} photos at once do not fit in the free memory of {processes.device}: "
                  f"each batch is computed in {run.parts} parts" if run.parts > 1 else "",
        "model": f"{settings['encoder']}, {parameters / 1e6:.1f} million parameters"
                 f"{', from ' + settings['start_from'] if settings['start_from'] else ''}"
                 f"{', ' + kept_batchnorm(run) if kept_batchnorm(run) else ''}",
        "disk": f"up to {readable_size(disk)} of checkpoints in {folder} "
                f"({what_is_kept(keep)} kept), {readable_size(shutil.disk_usage(folder).free)} free",
    }  # fmt: skip
    return banner({name: text for name, text in facts.items() if text}) + "\n" + TABLE_HEAD


def kept_batchnorm(run: Run) -> str:
    """Whose BatchNorm statistics stay; "" for nobody's."""
    if not run.keeps_statistics or not any("running_mean" in name for name, _ in run.came_trained.named_buffers()):
        return ""
    return f"{'' if run.came_trained is run.model else 'the encoder '}keeping its BatchNorm statistics"


def described_rates(scheduler: Schedule) -> str:
    """1e-04 for the encoder, 1e-03 for the decoder."""
    encoder, *decoder = (f"{rate:.2g}" for rate in scheduler.base_lrs)
    return f"{encoder} for the encoder, {decoder[0]} for the decoder" if decoder else encoder


def data_fact(train: COCOPersonDataset, val: COCOPersonDataset) -> str:
    """The numbers of photos, and where they lie: of several roots how many of them in which."""
    roots = {source.root for source in [*train.sources, *val.sources]}
    if len(roots) == 1:
        return f"{counted(len(train), 'photo')} to train on, {len(val)} to validate, in {roots.pop()}"
    shares = [", ".join(f"{len(it)} in {it.root}" for it in part.sources) for part in (train, val)]
    return f"{counted(len(train), 'photo')} to train on ({shares[0]}), {len(val)} to validate ({shares[1]})"


def split_fact(val: COCOPersonDataset) -> str:
    """What is said where the data have no split."""
    made = {str(source.photos): source.layout.part.val_share for source in val.sources if source.layout.part}
    if not made:
        return ""
    share = f"{max(made.values()):g} of them to validate (--val-share)"
    return f"made here: the names of the photos in {' and '.join(made)} choose {share}"


def seen_twice(train: COCOPersonDataset, val: COCOPersonDataset) -> str:
    """A warning where the figures of the validation are none."""
    folders = ", ".join(map(str, shared_folders(train.sources, val.sources)))
    return f"the photos in {folders} are trained on and validated: the figures say nothing of others" * bool(folders)


def what_is_kept(keep: int) -> str:
    if keep == 1:
        return "the newest epoch is"
    return f"the {keep} newest epochs are" if keep else "all epochs are"


def precision(dtype: torch.dtype | None) -> str:
    return str(dtype or torch.float32).removeprefix("torch.")


def computed_in(run: Run) -> str:
    """The precision; of a CUDA GPU's float32 whether it is all of it, which a run's settings do not say."""
    if run.device.type != "cuda" or run.amp_dtype is not None:
        return precision(run.amp_dtype)
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32" and torch.cuda.get_device_capability(run.device) >= (8, 0)
    return f"{precision(run.amp_dtype)} ({'convolutions in TF32' if tf32 else 'no TF32'})"


def described_cycles(scheduler: Schedule, num_epochs: int) -> str:
    """In cosine cycles of 25 and 75 epochs; of 1, 2, 4 ... 64 epochs; or one that was made to end with the run."""
    if scheduler.end < math.inf:
        return f"a last cosine cycle from epoch {scheduler.begin + 1} to the end of epoch {scheduler.end}"
    *first, last = (str(length) for length in cycles(scheduler, num_epochs))
    if len(first) > 3:
        return f"cosine cycles of {', '.join(first[:3])} ... {last} epochs"
    return f"cosine cycles of {', '.join(first)} and {last} epochs" if first else f"cosine cycles of {last} epochs"


def unfinished_cycle(scheduler: Schedule, num_epochs: int) -> str:
    """A warning where the run ends in the middle of a cosine cycle, with a learning rate that is still high."""
    lengths = cycles(scheduler, num_epochs)
    end = sum(lengths)
    if end == num_epochs:
        return ""
    ends = f"{end - lengths[-1]} and {end}" if len(lengths) > 1 else end
    run = f"{num_epochs} epochs end" if num_epochs > 1 else "1 epoch ends"
    return f"{run} within a cosine cycle (cycles end after {ends})"


def write_run(run: Run, path: Path) -> None:
    """run.json: everything that says how a run was made: the command, all settings, versions, the git revision."""
    facts = {
        "command": sys.argv, "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "resumed_from": str(run.source) if run.source else None, "processes": run.processes.world_size,
        "device": str(run.device), "precision": precision(run.amp_dtype),
        "git_revision": git_revision(Path(__file__).resolve().parents[1]),
        "versions": {"python": platform.python_version()}
                    | {name: sys.modules[name].__version__ for name in PACKAGES if name in sys.modules},
        "settings": run.settings, "data": run.data, "earlier_starts": [],
    }  # fmt: skip
    if run.source and path.exists():  # it goes on: how it began is kept
        with contextlib.suppress(ValueError, AttributeError, OSError):  # somebody has edited it
            before = json.loads(path.read_text())
            facts["earlier_starts"] = [*before.pop("earlier_starts", []), before]
    with atomic_write(path) as file:
        file.write(json.dumps(facts, indent=2).encode())


def git_revision(project: Path) -> str | None:
    """With "-dirty" where files were edited; None where git is not installed, or this is no clone of its own."""
    if not (project / ".git").exists():  # a folder of another repository would give that one's
        return None
    command = ["git", "-C", str(project), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return None


# --- during an epoch --------------------------------------------------------------------------------------


class Waiting:
    """How long a device has waited for data: on a CUDA GPU the time without work, which the CPU's waiting is not.

    The CPU runs ahead of a GPU, and what it waits for costs nothing while that has work. So a GPU notes itself when it
    comes to the end of the step before and when it comes to the batch; it is asked for the times, never waited for.
    """

    def __init__(self, device: torch.device):
        self._has_events = device.type == "cuda"
        self._seconds, self._unread = 0.0, deque()

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """The block waits for a batch; no work is given to the device in it."""
        start = self._now() if self._has_events else time.perf_counter()
        yield
        if self._has_events:
            self._unread.append((start, self._now()))
        else:
            self._seconds += time.perf_counter() - start

    def seconds(self) -> float:
        """So far; of a GPU as far as it has come."""
        while self._unread and self._unread[0][1].query():
            start, end = self._unread.popleft()
            self._seconds += start.elapsed_time(end) / 1000
        return self._seconds


class Progress:
    """Hands out a loader's batches and shows, on the main process, how fast they go.

    Args:
        loader: its length is the bar's.
        label: what the bar is of.
        visible: whether to show anything: on the main process.
        log_every: batches between two updates of the figures; each waits for the device once.
        first: batches that were done before.
        device: that works on the batches.
    """

    SILENT_SECONDS = 60  # between two lines where the output is a file, which a bar would fill

    def __init__(
        self, loader: DataLoader, label: str, visible: bool, log_every: int = 1, first: int = 0,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=len(loader), initial=first, desc=label, disable=not (visible and is_terminal), leave=False,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {remaining}{postfix}",
        )  # fmt: skip
        self._label, self._log_every, self._batches = label, log_every, len(loader)
        self._visible, self._prints_lines = visible, not is_terminal
        self._start = self._last_line = time.perf_counter()
        self._waiting, self._images, self._batch = Waiting(torch.device(device)), 0, first

    def over(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """The batches, with the time counted for which the training waits for each."""
        while True:
            with self._waiting.counted():
                batch = next(batches, None)
            if batch is None:
                self._bar.close()
                return
            self._batch += 1
            self._images += len(batch)
            yield batch
            self._bar.update()

    def show(self, loss: Tensor, terms: dict[str, Tensor], learning_rate: float) -> None:
        """Shows the figures every `log_every` batches: only then are they fetched from the device."""
        if not self._visible or self._batch % self._log_every:
            return
        values = torch.stack([loss.detach(), *terms.values()]).tolist()
        losses = " ".join(f"{name} {value:.3g}" for name, value in zip(("loss", *terms), values, strict=True))
        _, rate, waiting = self.speed().values()
        figures = f"{losses} lr {learning_rate:.1e} {rate:.3g} img/s wait {waiting:.0%}"
        self._bar.set_postfix_str(figures, refresh=False)
        if self._prints_lines and time.perf_counter() - self._last_line > self.SILENT_SECONDS:
            self._last_line = time.perf_counter()
            print(f"{self._label} step {self._batch}/{self._batches} {figures}", flush=True)

    def speed(self, processes: int = 1) -> dict[str, float]:
        """Seconds until now, images a second of so many processes, the share of the time spent waiting for data."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rate = self._images / seconds * processes
        return {"seconds": seconds, "images_per_second": rate, "data_wait": self._waiting.seconds() / seconds}


# --- after an epoch ---------------------------------------------------------------------------------------

FIRST_COLUMNS = ("loss", "iou", "dice")  # of the training, then of the validation
RUN_COLUMNS = (  # of the training alone
    *("learning_rate", "seconds", "decoder_learning_rate", "images_per_second", "data_wait", "skipped_steps"),
)


def history_row(epoch: int, training: dict, validation: dict, bad_photos: dict[str, int]) -> dict[str, float]:
    """A row of history.csv: whatever figures there are, those that are looked at most first."""
    of_both = {"train": {k: v for k, v in training.items() if k not in RUN_COLUMNS}, "val": validation}
    row = {"epoch": epoch, **{f"{part}_{name}": of_both[part][name] for part in of_both for name in FIRST_COLUMNS}}
    row |= {name: training[name] for name in RUN_COLUMNS}
    row |= {f"{part}_{name}": value for part, figures in of_both.items() for name, value in figures.items()}
    return row | bad_photos


def epoch_lines(row: dict, num_epochs: int, is_best: bool, folder: Path) -> str:
    """What is said of an epoch: its line of the table, and what went wrong in it."""
    lines = [table_line(row, num_epochs, is_best)]
    said = {"train_bad_photos": "replaced", "val_bad_photos": "left out of the validation"}
    if bad := [f"{row[name]} {what}" for name, what in said.items() if row[name]]:
        lines.append(f"{'':7} | unreadable photos: {', '.join(bad)} ({folder / SKIPPED})")
    if row["skipped_steps"]:
        were = "was" if row["skipped_steps"] == 1 else "were"
        lines.append(f"{counted(row['skipped_steps'], 'step')} had no finite loss or gradient and {were} skipped")
    return "\n".join(lines)


def table_line(row: dict, num_epochs: int, is_best: bool) -> str:
    """An epoch's row of history.csv as a line under `TABLE_HEAD`; a star marks the best epoch so far."""
    counter = f"{row['epoch']}/{num_epochs}"
    return (
        f"{counter:>7} |   {short(row['train_loss'])} {row['train_iou']:.3f} {row['train_dice']:.3f} "
        f"| {short(row['val_loss'])} {row['val_iou']:.3f} {row['val_dice']:.3f} | {row['learning_rate']:.1e} "
        f"{clock(row['seconds']):>7} {row['data_wait']:4.0%}{' *' if is_best else ''}"
    )


def best_line(run: Run, folder: Path) -> str:
    """The last line of a run that is through."""
    best = next((row["epoch"] for row in run.history if row["val_iou"] == run.best_iou), "?")
    return f"the best epoch was {best} of {run.epochs_done}: validation IoU {run.best_iou:.3f}, in {folder / BEST}"


def short(loss: float) -> str:
    """A loss in eight characters, whatever became of it."""
    return f"{loss:8.4f}" if abs(loss) < 1000 else f"{loss:8.1e}"


def clock(seconds: float) -> str:
    """A duration as people say it: 42 s, 3:05, 2:03:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


def readable_size(size: float) -> str:
    """Bytes as people say them."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
