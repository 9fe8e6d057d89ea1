"""The checks of gpu.py of what is right or wrong, and the trainer's own loop, which those that measure run as well."""

from __future__ import annotations

import contextlib
import csv
import gc
import math
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import trainer
import utils
from loading import augmentation  # noqa: F401 - which takes seconds, once: each check is forked from here
from tools import make_sample
from trainer import Config
from training import launching
from training.checkpoints import BEST, LAST, RunFolder
from training.interruptions import BrokenNumbersError, Stopped, Watch
from training.run import Run
from utils import LossCalculator, Processes

IOU_APART = 0.1  # that short trainings of other precisions may


@dataclass(frozen=True)
class Place:
    """Where the checks are done."""

    cuda: bool
    quick: bool  # tiny sizes
    work: Path  # the folder of what they write

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.cuda else torch.device("cpu")

    @property
    def small(self) -> tuple[str, int, int]:
        """Encoder, image size and batch of what is not measured."""
        return ("mobilenet_v2", 32, 4) if self.quick else ("resnet18", 64, 16)

    @property
    def large(self) -> tuple[str, int, int]:
        """And of what is."""
        return ("mobilenet_v2", 32, 4) if self.quick else ("resnet34", 384, 32)


def one_line(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:300]}"


# --- the trainer's own loop ---------------------------------------------------------------------------------


class Fixed:
    """A loader of one and the same batch of noise, page-locked for a GPU: it costs nothing."""

    sampler = multiprocessing_context = None

    def __init__(self, batch: Tensor, steps: int):
        self.batch_size, self.dataset, self._batches = len(batch), self, [batch] * steps

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._batches)

    def set_epoch(self, epoch: int) -> None: ...


class Loop:
    """`epoch(steps)` runs so many steps of the trainer's own loop on noise, and returns its figures."""

    def __init__(self, place: Place, precision: str, shape: tuple[str, int, int], **settings: object):
        encoder, size, batch = shape
        self.config = Config(encoder=encoder, pretrained=False, image_size=size, batch_size=batch, **settings)
        with computing_in(precision):
            self.run = trainer.start_run(self.config, Processes(place.device))
        self.watch, self.batch = Watch(self.run, RunFolder("unused", 0), 0), noise(batch, size, place.cuda)

    def epoch(self, steps: int) -> dict[str, float]:
        loader = Fixed(self.batch, steps * self.config.accumulate)
        figures = trainer.train_one_epoch(self.run, loader, 0, self.config, self.watch)
        self.run.end_epoch({})
        return figures


def noise(photos: int, size: int, pinned: bool) -> Tensor:
    """uint8 (N, 4, S, S), a rectangle for the mask."""
    batch = torch.randint(256, (photos, 4, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch[:, 3] = 0
    batch[:, 3, size // 4 : size // 2, size // 4 : size // 2] = 255
    return batch.pin_memory() if pinned else batch


def precisions(place: Place) -> list[str]:
    if not place.cuda:
        return ["fp32"]
    return ["bf16"] * torch.cuda.is_bf16_supported(including_emulation=False) + ["fp16", "fp32"]


def computing_in(precision: str) -> AbstractContextManager:
    """What is started within computes in this, whatever the settings and the GPU say."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    return patch.object(utils, "autocast_dtype", lambda *_, **__: dtype)


def settings_of(place: Place, folder: str, **changes: object) -> Config:
    """Of a short training on the drawings."""
    encoder, size, batch = place.small
    short = {
        "data_root": str(place.work / "drawn"), "checkpoint_dir": str(place.work / folder), "pretrained": False,
        "encoder": encoder, "image_size": size, "batch_size": batch, "device": "cuda" if place.cuda else "cpu",
        "num_epochs": 2, "restart_period": 10, "num_workers": 0 if place.quick else 2, "learning_rate": 2e-3,
        "average_decay": 0.9, "log_every": 5,
    }  # fmt: skip
    return Config(**short | changes)


def train(place: Place, folder: str, **changes: object) -> list[dict[str, str]]:
    """The trainer itself, on the drawings; the rows of its history."""
    with patch.object(trainer.curves, "save_curves", lambda *_: None):  # matplotlib takes longer than such a run
        trainer.main(settings_of(place, folder, **changes))
    return list(csv.DictReader((place.work / folder / "history.csv").read_text().splitlines()))


# --- a run from end to end ----------------------------------------------------------------------------------


def drawings(place: Place) -> dict:
    photos = {"train": 12, "val": 4} if place.quick else {"train": 96, "val": 32}
    make_sample.draw_sample(place.work / "drawn", **photos)
    return photos


def sample(place: Place) -> dict:
    """Short trainings of one seed: on the CPU, then in each of the GPU's precisions."""
    epochs = {"num_epochs": 1 if place.quick else 8}
    iou = {"cpu": best_iou(train(Place(False, place.quick, place.work), "sample_cpu", **epochs))}
    for precision in precisions(place) if place.cuda else ():
        with computing_in(precision):
            iou[precision] = best_iou(train(place, f"sample_{precision}", **epochs))
    return {"ok": max(iou.values()) - min(iou.values()) < IOU_APART, "val_iou": iou}


def best_iou(history: list[dict[str, str]]) -> float:
    return max(float(row["val_iou"]) for row in history)


def portable(place: Place) -> dict:
    """Whether what was saved can be read as data only, and on a machine without a GPU."""
    folder = place.work / f"sample_{precisions(place)[0] if place.cuda else 'cpu'}"
    if not folder.exists():
        train(place, folder.name, num_epochs=1)
    found = {name: torch.load(folder / name, weights_only=True) for name in (BEST, LAST)}
    devices = {name: sorted({str(tensor.device) for tensor in tensors_of(content)}) for name, content in found.items()}
    return {"ok": all(names == ["cpu"] for names in devices.values()), "tensors_on": devices}


def tensors_of(content: object) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from tensors_of(value)


def resume(place: Place) -> dict:
    """A run that SIGTERM stops within its second epoch goes on from there with its weights, to the same end."""
    straight = train(place, "straight")
    with sending(signal.SIGTERM, at_step=math.ceil(drawings(place)["train"] / place.small[2]) + 2):
        try:
            train(place, "stopped")
            code = 0
        except Stopped as stop:
            code = stop.code
    last, begun = torch.load(place.work / "stopped" / LAST, weights_only=True), []
    with first_seen(trainer, "train_one_epoch", lambda run, *_: begun.append(same_weights(run, last))):
        resumed = train(place, "stopped", resume="newest")
    ious = [[float(row["val_iou"]) for row in rows] for rows in (straight, resumed)]
    apart = weights_apart(*(place.work / name / LAST for name in ("straight", "stopped")))
    facts = {"exit_code": code, "stopped_at": [last["epoch"], last["step"]], "val_iou": ious,
             "goes_on_with_its_weights": begun == [True], "weights_apart_from_a_straight_run": apart}  # fmt: skip
    alike = place.cuda or apart == 0  # a GPU adds up in another order every time, and short trainings drift apart
    ok = (code, last["epoch"]) == (143, 1) and last["step"] == 2 and begun == [True] and len(ious[1]) == len(ious[0])
    return {"ok": ok and alike, **facts}


@contextlib.contextmanager
def sending(number: int, at_step: int) -> Iterator[None]:
    """Sends this process a signal in the middle of its training step of that number."""
    plain, count = trainer.to_device, 0

    def to_device(*arguments: object) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += torch.is_grad_enabled()  # not the validation's
        if count == at_step and torch.is_grad_enabled():
            os.kill(os.getpid(), number)
        return plain(*arguments)

    with patch.object(trainer, "to_device", to_device):
        yield


@contextlib.contextmanager
def first_seen(owner: object, name: str, look: Callable) -> Iterator[None]:
    """Looks at the arguments of the function's first call."""
    plain, seen = getattr(owner, name), []

    def call(*arguments: object) -> object:
        if not seen:
            seen.append(look(*arguments))
        return plain(*arguments)

    with patch.object(owner, name, call):
        yield


def same_weights(run: Run, content: dict) -> bool:
    """Whether a run has the weights and the optimiser's moments of a checkpoint, and its place in the epoch."""
    ours, moments = run.model.state_dict(), run.optimizer.state_dict()["state"]
    pairs = [(ours[name], value) for name, value in content["model"].items()]
    for number, state in content["optimizer"]["state"].items():
        pairs += [(moments[number][name], value) for name, value in state.items()]
    place = (run.epochs_done, run.step) == (content["epoch"], content["step"])
    return place and all(torch.equal(a.cpu(), b) for a, b in pairs)


def weights_apart(one: Path, other: Path) -> float:
    a, b = (torch.load(path, weights_only=True)["model"] for path in (one, other))
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


# --- what goes wrong ----------------------------------------------------------------------------------------


class Breakable(LossCalculator):
    """The loss; not a number while `broken` is set."""

    broken = False

    def forward(self, raw: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = super().forward(raw, target)
        return (loss * math.nan if self.broken else loss), terms


def broken(place: Place) -> dict:
    """A step whose loss or gradient is not a number is skipped and counted, the run goes on, ten in a row end it."""
    found = {precision: broken_in(place, precision) for precision in precisions(place)}
    return {"ok": all(all(facts.values()) for facts in found.values()), **found}


def broken_in(place: Place, precision: str) -> dict[str, bool]:
    loop = Loop(place, precision, place.small, learning_rate=1e-3, log_every=5)
    loop.run.criterion = Breakable()
    loop.epoch(30 if precision == "fp16" else 2)  # it finds its scale first
    before = weights(loop.run)
    loop.run.criterion.broken = True
    found = {"loss_is_counted": loop.epoch(1)["skipped_steps"] == 1, "loss_leaves_no_trace": same(loop.run, before)}
    loop.run.criterion.broken = False
    hook = next(loop.run.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    by_scale = loop.run.scaler.get_scale() > 1  # float16 takes it for a scale that is too high
    found["gradient_is_counted"] = loop.epoch(1)["skipped_steps"] == (0 if by_scale else 1)
    found["gradient_leaves_no_trace"] = same(loop.run, before)
    hook.remove()
    loop.epoch(3)
    finite = all(value.isfinite().all().item() for value in loop.run.model.state_dict().values())
    found["goes_on"] = finite and not same(loop.run, before)
    loop.run.criterion.broken = True
    found["ten_in_a_row_end_it"] = raises(BrokenNumbersError, lambda: loop.epoch(15))
    return found


def weights(run: Run) -> list[Tensor]:
    return [value.detach().clone() for value in run.model.parameters()]


def same(run: Run, before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(run.model.parameters(), before, strict=True))


def raises(kind: type[Exception], work: Callable[[], object]) -> bool:
    try:
        work()
    except kind:
        return True
    return False


def memory(place: Place) -> dict:
    """A batch that half of the memory it takes must do for is computed in parts, and trains."""
    loop = Loop(place, "fp32", place.large)
    whole, most, before = loop.epoch(2), torch.cuda.max_memory_allocated(), loop.run.parts
    del loop
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.5 * most / torch.cuda.get_device_properties(0).total_memory)
    torch.cuda.reset_peak_memory_stats()
    loop = Loop(place, "fp32", place.large)
    parted, used = loop.epoch(2), torch.cuda.max_memory_allocated()
    losses = {"whole": whole["loss"], "in_parts": parted["loss"]}
    ok = loop.run.parts > before and abs(losses["whole"] - losses["in_parts"]) < 0.2 and not parted["skipped_steps"]
    return {"ok": ok, "parts": loop.run.parts, "gb_whole": round(most / 1e9, 2), "gb_in_parts": round(used / 1e9, 2),
            "loss": losses}  # fmt: skip


# --- two processes ------------------------------------------------------------------------------------------


def two_ranks(place: Place) -> dict:
    """Two processes on one GPU, over gloo because NCCL refuses that: one weights, and one skips what the other must."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start = multiprocessing.get_context("fork")  # nothing has touched CUDA here
    ranks = [start.Process(target=rank_of_two, args=(place, rank, common)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    codes = [rank.exitcode for rank in ranks]
    if codes != [0, 0]:
        return {"ok": False, "exit_codes": codes, "error": first_error(place)}
    states = [torch.load(place.work / f"rank{rank}.pth", weights_only=True) for rank in (0, 1)]
    equal = all(torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items())
    skipped = [state["skipped"] for state in states]
    return {"ok": equal and skipped[0] == skipped[1] and sum(skipped[0]) == 1, "equal_weights": equal,
            "skipped_steps": skipped, "sync_batchnorm": states[0]["sync_batchnorm"]}  # fmt: skip


def rank_of_two(place: Place, rank: int, common: dict[str, str]) -> None:
    """A training like any other, but for the device, the way to the other rank, and a loss that is none on rank 1."""
    os.environ.update(common, RANK=str(rank), LOCAL_RANK=str(rank))
    found_group, device = dist.init_process_group, str(place.device)

    def over_gloo(_backend: str, *, device_id: object = None, **options: object) -> None:
        found_group("gloo", **options)

    def leave(run: Run, _folder: RunFolder) -> None:
        state = {name: value.cpu() for name, value in run.model.state_dict().items()}
        synced = any(isinstance(module, torch.nn.SyncBatchNorm) for module in run.model.modules())
        skipped = [row["skipped_steps"] for row in run.history]
        torch.save({"model": state, "skipped": skipped, "sync_batchnorm": synced}, place.work / f"rank{rank}.pth")

    settings = {"device": utils.EACH_ITS_GPU if place.cuda else "cpu", "batch_size": min(place.small[2], 8)}
    settings["num_epochs"] = 1 if place.quick else 2
    try:
        with (
            patch.object(launching, "pick_device", lambda *_: (device, "")),
            patch.object(dist, "init_process_group", over_gloo),
            patch.object(trainer, "LossCalculator", Once if rank else LossCalculator),
            patch.object(trainer, "finish", leave),
        ):
            trainer.main(settings_of(place, "two", **settings))
    except BaseException as error:
        (place.work / f"rank{rank}.txt").write_text(one_line(error))
        raise


class Once(LossCalculator):
    """The loss, of which the second is not a number."""

    calls = 0

    def forward(self, raw: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = super().forward(raw, target)
        self.calls += 1
        return (loss * math.nan if self.calls == 2 else loss), terms


def first_error(place: Place) -> str:
    return "; ".join(f"{path.stem}: {path.read_text()}" for path in sorted(place.work.glob("rank?.txt")))
