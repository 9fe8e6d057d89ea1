"""The checks of gpu.py that measure: the machine, waits, half precision, the step, an epoch, loader, prediction."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import os
import shutil
import statistics
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import torch

import predict
import trainer
from cutting.cutter import Cutter, load
from datasets import COCOPersonDataset, batches, make_loader
from loading.unreadable import TolerantDataset
from models import UNetAutoencoder
from tools.bench.gpu_checks import Loop, Place, one_line, precisions, train
from tools.bench.measuring import Way, alternate, machine
from tools.bench.step import SmpUNet, repeated
from training import launching
from training.checkpoints import BEST
from training.interruptions import Watch
from training.step import FiniteGuard
from utils import usable_cores

WORKERS = (4, 8, 12, 16)
HALF_APART = 1e-3  # that float16's probabilities may differ from float32's of the CPU, in the mean
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


# --- the machine --------------------------------------------------------------------------------------------


def facts(place: Place) -> dict:
    found = {"machine": machine(), "cores_usable": usable_cores()}
    found["compiler"] = shutil.which("gcc") or shutil.which("cc")  # which torch.compile needs
    found["packages"] = {name: version(name) for name in ("torchvision", "triton", "segmentation_models_pytorch")}
    if not place.cuda:
        return found
    launching.take_gpu(place.device)
    card, (free, total) = torch.cuda.get_device_properties(place.device), torch.cuda.mem_get_info(place.device)
    return found | {
        "card": card.name, "capability": f"{card.major}.{card.minor}", "gb": round(total / 1e9, 1),
        "gb_free": round(free / 1e9, 1), "multiprocessors": card.multi_processor_count, "driver": driver(),
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "precisions": precisions(place),
    }  # fmt: skip


def version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def driver() -> str:
    if not shutil.which(NVIDIA_SMI[0]):
        return "nvidia-smi is not installed"
    done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=15)
    return done.stdout.partition("\n")[0] or done.stderr.strip()


# --- waiting for the GPU ------------------------------------------------------------------------------------


def waits(place: Place) -> dict:
    """How often a step waits for the GPU, by CUDA's own warnings: not once, but where figures are shown."""
    found = {precision: waits_in(place, precision) for precision in precisions(place)}
    return {"ok": not any(found.values()), "synchronisations_a_step": found}


def waits_in(place: Place, precision: str) -> dict[str, float]:
    loop, counts = Loop(place, precision, place.small, log_every=10**6), []
    loop.epoch(3)
    for steps in (5, 15):  # what the longer one has more of is the steps'
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            loop.epoch(steps)
            torch.cuda.set_sync_debug_mode("default")
        lines = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message)]
        counts.append(Counter(lines))
    each = {line: (counts[1][line] - counts[0][line]) / 10 for line in counts[1]}
    return {line: number for line, number in each.items() if number}


# --- half precision -----------------------------------------------------------------------------------------


def half(place: Place) -> dict:
    """What a trained model finds on the device beside what it finds on the CPU."""
    best = place.work / "sample_cpu" / BEST
    if not best.exists():
        train(Place(False, place.quick, place.work), "sample_cpu", num_epochs=1 if place.quick else 4)
    ours, theirs = load(best, "cuda:0" if place.cuda else "cpu"), load(best, "cpu")
    photos = COCOPersonDataset(place.work / "drawn", "val2017", ours.image_size)
    squares = [np.ascontiguousarray(photos[n][:3].permute(1, 2, 0).numpy()) for n in range(len(photos))]
    found, expected = ours.probabilities(squares), np.concatenate([theirs.probabilities([one]) for one in squares])
    apart = np.abs(found - expected)
    figures = {"mean": apart.mean(), "most": apart.max(), "masks": ((found > 0.5) != (expected > 0.5)).mean()}
    return {"ok": bool(apart.mean() < HALF_APART), "dtype": str(ours.amp_dtype),
            "apart": {name: float(value) for name, value in figures.items()}}  # fmt: skip


# --- the step -----------------------------------------------------------------------------------------------


def step(place: Place) -> dict:
    """Whole training steps without a loader, in each precision; smp's U-Net in the same loop."""
    makers = {precision: functools.partial(stepping, place, precision) for precision in precisions(place)}
    makers |= {f"smp {precision}": functools.partial(stepping_smp, place, precision)
               for precision in makers if precision != "fp16"}  # fmt: skip
    return compared(makers, place)


def compiled(place: Place) -> dict:
    """--compile beside the plain step, and how long the first compiled one takes with nothing compiled before."""
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ[variable] = str(place.work / variable.lower())
    precision, begin = precisions(place)[0], time.perf_counter()
    compiling = stepping(place, precision, compile=True)
    compiling()
    first = time.perf_counter() - begin
    makers = {precision: functools.partial(stepping, place, precision), f"{precision} --compile": lambda: compiling}
    return {"first_steps_seconds": round(first, 1), **compared(makers, place)}


def stepping(place: Place, precision: str, **settings: object) -> Callable[[], int]:
    """A round of steps, at whose end the GPU has done them: the figures of an epoch are fetched."""
    loop, steps = Loop(place, precision, place.large, **settings), 1 if place.quick else 10

    def work() -> int:
        loop.epoch(steps)
        return steps * loop.config.batch_size

    return work


def stepping_smp(place: Place, precision: str) -> Callable[[], int]:
    with patch.object(trainer, "UNetAutoencoder", SmpUNet):
        return stepping(place, precision)


def compared(makers: dict[str, Callable[[], Callable[[], int]]], place: Place) -> dict:
    """Images a second of each way, taken in turn: median, slowest, fastest round. One that fails spoils no other."""
    ways, errors = [], {}
    for name, make in makers.items():
        try:
            work = make()
            work()  # warms up
            ways.append(Way(name, work))
        except Exception as error:
            errors[name] = one_line(error)
            work = None
            gc.collect()
            torch.cuda.empty_cache()  # does nothing where CUDA has not begun
    alternate(ways, 1 if place.quick else 5)
    speeds = {way.name: [round(1 / s, 1) for s in (way.median, max(way.seconds), min(way.seconds))] for way in ways}
    missing = {name for name, line in errors.items() if "segmentation_models_pytorch is missing" in line}
    found = {"ok": not errors.keys() - missing, "images_per_second": speeds, "batch": place.large}
    return found | ({"errors": errors} if errors else {})


# --- a whole epoch ------------------------------------------------------------------------------------------


def epoch(place: Place) -> dict:
    """Epochs of the trainer on photos: its own figures, and by CUDA's clock how long the GPU stood still in between."""
    encoder, size, batch = place.large
    root, idle = many_photos(place), []
    with idle_shares(idle) if place.cuda else contextlib.nullcontext():
        rows = train(place, "epoch", data_root=str(root), encoder=encoder, image_size=size, batch_size=batch,
                     **{"num_workers": 1, "num_epochs": 1} if place.quick else {"num_workers": 12, "num_epochs": 3})
    found = {name: [float(row[name]) for row in rows] for name in ("images_per_second", "data_wait", "seconds")}
    return {"gpu_idle": idle if place.cuda else "it needs CUDA", **found, "photos": PHOTOS_ARE}


PHOTOS_ARE = "drawn, of 160 x 200 to 200 x 256: COCO's are three times as wide, and decode slower"


def many_photos(place: Place) -> Path:
    """The drawings listed again and again, or once for a try; those to validate on once."""
    drawn, root = place.work / "drawn", place.work / "many"
    if not root.exists():
        repeated(drawn, "train2017", 1 if place.quick else 20, root)
        shutil.copy(drawn / "annotations" / "instances_val2017.json", root / "annotations")
        (root / "val2017").symlink_to(drawn / "val2017")
    return root


@contextlib.contextmanager
def idle_shares(shares: list[float]) -> Iterator[None]:
    """Adds each training epoch's share of the time that the GPU had nothing to do between two steps."""
    marks, plain = [], trainer.train_one_epoch

    def mark(kind: str) -> None:
        marks.append((kind, torch.cuda.Event(enable_timing=True)))
        marks[-1][1].record()

    def marked(method: Callable, kind: str) -> Callable:
        def call(*arguments: object) -> object:
            mark(kind)
            return method(*arguments)

        return call

    def train_one_epoch(*arguments: object) -> dict:
        marks.clear()
        mark("end")  # so that the wait for the first batch counts
        figures = plain(*arguments)
        torch.cuda.synchronize()
        shares.append(round(idle_share(marks), 4))
        return figures

    with (
        patch.object(FiniteGuard, "begin_step", marked(FiniteGuard.begin_step, "begin")),
        patch.object(Watch, "between_steps", marked(Watch.between_steps, "end")),
        patch.object(trainer, "train_one_epoch", train_one_epoch),
    ):
        yield


def idle_share(marks: list[tuple]) -> float:
    """Of the time from the first mark to the last, what lies between a step's end and the next one's begin."""
    pairs = [(a[1], b[1]) for a, b in pairwise(marks) if (a[0], b[0]) == ("end", "begin")]
    return sum(a.elapsed_time(b) for a, b in pairs) / marks[0][1].elapsed_time(marks[-1][1])


# --- the loader ---------------------------------------------------------------------------------------------


def loader(place: Place) -> dict:
    """Photos a second out of the augmenting loader and onto the device, by workers; the second pass counts."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores are meant
    _, size, batch = place.large
    dataset = COCOPersonDataset(many_photos(place), "train2017", size, augment=True)
    tolerant = TolerantDataset(dataset, True, 0.01, place.work)
    speeds = {}
    for workers in (1,) if place.quick else WORKERS:
        ours = make_loader(tolerant, batch, workers, training=True, pin_memory=place.cuda)
        speeds[workers] = round([one_pass(ours, number, place) for number in (0, 1)][-1], 1)
        del ours
    return {"photos_per_second": speeds, "photos": PHOTOS_ARE}


def one_pass(ours: torch.utils.data.DataLoader, number: int, place: Place) -> float:
    start, photos = time.perf_counter(), 0
    for batch in batches(ours, number):
        batch.to(place.device, non_blocking=True)
        photos += len(batch)
    return photos / (time.perf_counter() - start)


# --- the prediction -----------------------------------------------------------------------------------------


def predict_photos(place: Place) -> dict:
    """Photos a second from file to file, and of the network alone by the photos of a batch."""
    cv2.setNumThreads(1)  # as predict.py itself does
    encoder, size, _ = place.large
    model = UNetAutoencoder(encoder, pretrained=False)
    cutter, whole = Cutter(model, size, place.device), Cutter(model, size, place.device, amp=False)
    sizes = (1, 2 if place.quick else 8)
    network = {f"{way}, {photos} a batch": round(network_speed(one, photos, place), 1)
               for way, one in (("half", cutter), ("float32", whole)) for photos in sizes}  # fmt: skip
    rounds = 1 if place.quick else 5
    speeds = {name: [folder_speed(cutter, style, place, f"{name}{n}") for n in range(rounds)]
              for name, style in (("cutouts", predict.Style()), ("masks", predict.Style(mask=True)))}  # fmt: skip
    files = {name: [round(f(found), 1) for f in (statistics.median, min, max)] for name, found in speeds.items()}
    return {"network": network, "file_to_file": files, "dtype": str(cutter.amp_dtype), "photos": PHOTOS_ARE}


def network_speed(cutter: Cutter, photos: int, place: Place) -> float:
    squares, rounds = [np.zeros((cutter.image_size, cutter.image_size, 3), np.uint8)] * photos, 1 if place.quick else 20
    for count in (rounds, rounds):  # the first warms up
        start = time.perf_counter()
        for _ in range(count):
            cutter.probabilities(squares)
    return photos * rounds / (time.perf_counter() - start)


def folder_speed(cutter: Cutter, style: predict.Style, place: Place, name: str) -> float:
    jobs, _ = predict.plan([str(place.work / "drawn" / "train2017")], place.work / f"cut_{name}")
    start = time.perf_counter()
    outcomes = predict.cut_all(cutter, jobs, style, 8)
    if failures := [line for outcome in outcomes for line in outcome.failures]:
        raise RuntimeError(failures[0])
    return len(jobs) / (time.perf_counter() - start)
