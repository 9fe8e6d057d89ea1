"""Checks the program on ONE CUDA GPU and measures it there, in eight minutes: a line of JSON a check.

    python tools/gpu_check.py                              # CUDA_VISIBLE_DEVICES=1 before it: on another GPU
    python tools/gpu_check.py --only step,compile
    python tools/gpu_check.py --device cpu --quick         # tries the command itself where there is no GPU

First tests/test_gpu.py, then speeds. Each check is a process with a time limit: an error of CUDA's spoils the process
that meets it, and no other. Photos are drawn, in a temporary folder; COCO's are three times as wide and decode slower.
Exit code 1 if a check failed. On Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import gc
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it is in tools/ that Python looks

import cv2
import numpy as np
import torch
from torch import Tensor

import predict
import trainer
from cutting.cutter import Cutter
from datasets import COCOPersonDataset, batches, make_loader
from loading.unreadable import SkipUnreadable
from loading.workers import usable_cores
from models import UNetAutoencoder
from tools import make_sample
from tools.benchmark import Side, alternate, machine, smp_unet
from trainer import Config
from training import distributed
from training.batches import has_bfloat16
from training.checkpoints import HISTORY, RunFolder
from training.command_line import OneLineParser, UsageError, run_cli
from training.interruptions import Watch
from utils import Processes

DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


class Setup(NamedTuple):
    """What the checks run on."""

    device: torch.device
    quick: bool  # tiny sizes
    work: Path  # folder that they write to

    @property
    def shape(self) -> tuple[str, int, int]:
        """The encoder, the image size and the batch size."""
        return ("mobilenet_v2", 32, 4) if self.quick else ("resnet34", 384, 32)

    @property
    def rounds(self) -> int:
        return 1 if self.quick else 5

    @property
    def photos(self) -> Path:
        """The root of the drawn photos, in train2017 and val2017."""
        return make_sample.draw_sample(self.work / "photos", *((12, 4) if self.quick else (960, 32)))


# --- the trainer's own loop on a batch of noise -----------------------------------------------------------


class FixedLoader:
    """Yields one and the same batch, page-locked for a GPU, so many times: it costs no time."""

    sampler = multiprocessing_context = None

    def __init__(self, batch: Tensor, length: int):
        self.batch_size, self.dataset, self._batches = len(batch), self, [batch] * length

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._batches)

    def set_epoch(self, epoch: int) -> None: ...


class Loop:
    """The trainer's own run and steps, in float32, bfloat16 or float16; `shape` is as that of `Setup`."""

    def __init__(self, device: torch.device, precision: str, shape: tuple[str, int, int], **settings: Any):
        encoder, size, batch_size = shape
        shaped: dict[str, Any] = {"encoder": encoder, "image_size": size, "batch_size": batch_size}
        self.config = Config(pretrained=False, device=str(device), **shaped, **settings)
        with computing_in(precision):
            self.run = trainer.start_run(self.config, Processes(device))
        self.watch = Watch(self.run, RunFolder("unused", 0), 0)
        self.batch = noise(batch_size, size)
        if device.type == "cuda":
            self.batch = self.batch.pin_memory()

    def steps(self, number: int) -> dict[str, float]:
        """Trains for an epoch of so many steps and returns its metrics, for which it waits for the device."""
        self.run.steps_per_epoch = number
        loader: Any = FixedLoader(self.batch, number * self.config.grad_accum_steps)
        metrics = trainer.train_one_epoch(self.run, loader, 0, self.config, self.watch)
        self.run.end_epoch({self.run.best_metric: 0.0}, has_best=True)
        return metrics


def noise(photos: int, size: int) -> Tensor:
    """Returns a batch of noise, uint8 (N, 4, S, S), whose masks are rectangles."""
    batch = torch.randint(256, (photos, 4, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch[:, 3] = 0
    batch[:, 3, size // 4 : size // 2, size // 4 : size // 2] = 255
    return batch


def computing_in(precision: str) -> contextlib.AbstractContextManager:
    """Makes runs that start within the block compute in a precision, float16 on a GPU with bfloat16 as well."""
    dtype = None if precision == "float32" else getattr(torch, precision)
    return patch.object(trainer, "autocast_dtype", lambda *_: dtype)


def precisions(device: torch.device) -> list[str]:
    """Returns what a device computes in, that of training first; of a CPU float32 alone."""
    if device.type == "cpu":
        return ["float32"]
    return ["bfloat16"] * has_bfloat16(device) + ["float16", "float32"]


# --- checks; "ok" is false in the result of one that has failed -------------------------------------------


def facts(setup: Setup) -> dict:
    """Describes the machine."""
    found = {"machine": machine(), "usable_cores": usable_cores(), "compiler": shutil.which("gcc")}
    if setup.device.type == "cpu":
        return found
    distributed.take_gpu(setup.device)
    gpu, (free, total) = torch.cuda.get_device_properties(setup.device), torch.cuda.mem_get_info(setup.device)
    driver = subprocess.run(DRIVER, capture_output=True, text=True).stdout if shutil.which(DRIVER[0]) else ""
    return found | {
        "gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "gb": round(total / 1e9, 1),
        "gb_free": round(free / 1e9, 1), "driver": driver.strip(), "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "precisions": precisions(setup.device),
    }  # fmt: skip


def tests(setup: Setup) -> dict:
    """Runs tests/test_gpu.py on the device."""
    if not importlib.util.find_spec("pytest"):
        return {"ok": None, "skipped": "pytest is missing: pip install -r requirements-dev.txt"}
    command = [sys.executable, "-m", "pytest", "-vrA", "--tb=short", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    environment = {**os.environ, "GPU_TEST_DEVICE": str(setup.device), "COLUMNS": "300"}  # a line an error, and whole
    # Straight into this check's log: where the time is up, its last line names the test that took it.
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment)
    printed = (setup.work / "tests.log").read_text().splitlines()
    lines = {kind.lower(): [line.partition(" ")[2] for line in printed if line.startswith(kind)]
             for kind in ("PASSED", "SKIPPED", "FAILED", "ERROR")}  # fmt: skip
    return {"ok": done.returncode == 0, **lines}


def step(setup: Setup) -> dict:
    """Measures training steps without a loader in each precision, and smp's U-Net in the same loop."""
    makers = {name: functools.partial(training_steps, setup, name) for name in precisions(setup.device)}
    if importlib.util.find_spec("segmentation_models_pytorch"):
        makers |= {f"smp {name}": functools.partial(training_steps, setup, name, smp_unet)
                   for name in makers if name != "float16"}  # fmt: skip
    return compare(makers, setup)


def training_steps(
    setup: Setup, precision: str, network: Callable[..., torch.nn.Module] = UNetAutoencoder, **settings: Any
) -> Callable[[], int]:
    """Returns a function that does a round of steps and returns the number of their photos."""
    with patch.object(trainer, "UNetAutoencoder", network):
        loop, number = Loop(setup.device, precision, setup.shape, **settings), 1 if setup.quick else 10

    def work() -> int:
        loop.steps(number)
        return number * loop.config.batch_size

    return work


def compare(makers: Mapping[str, Callable[[], Callable[[], int]]], setup: Setup) -> dict:
    """Measures each way in turn: images a second, median, slowest and fastest round. One that fails spoils no other."""
    sides, errors = [], {}
    for name, make in makers.items():
        try:
            work = make()
            work()
            sides.append(Side(name, work))
        except Exception as error:
            errors[name] = one_line(error)
            work = None
            gc.collect()
            torch.cuda.empty_cache()  # does nothing where CUDA has not begun
    alternate(sides, setup.rounds)
    speeds = {side.name: [round(1 / value, 1) for value in (side.median, max(side.seconds), min(side.seconds))]
              for side in sides}  # fmt: skip
    return {"ok": not errors, "images_per_second": speeds, "shape": setup.shape, "errors": errors}


def compile_step(setup: Setup) -> dict:
    """Measures --compile beside the plain step, and how long its first steps take with nothing compiled before."""
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ[variable] = str(setup.work / variable.lower())
    precision, start = precisions(setup.device)[0], time.perf_counter()
    compiled = training_steps(setup, precision, compile=True)
    compiled()
    first = round(time.perf_counter() - start, 1)
    plain = functools.partial(training_steps, setup, precision)
    return {"first_steps_seconds": first, **compare({"plain": plain, "compiled": lambda: compiled}, setup)}


def epoch(setup: Setup) -> dict:
    """Measures epochs of the trainer on photos; `data_wait` is the fraction of the time that the GPU had no work."""
    encoder, size, batch_size = setup.shape
    folder, workers, epochs = setup.work / "epoch", *((1, 1) if setup.quick else (12, 3))
    trainer.main(Config(
        data_root=str(setup.photos), checkpoint_dir=str(folder), encoder=encoder, pretrained=False, image_size=size,
        batch_size=batch_size, num_workers=workers, num_epochs=epochs, device=str(setup.device),
    ))  # fmt: skip
    rows = list(csv.DictReader((folder / HISTORY).read_text().splitlines()))
    return {name: [float(row[name]) for row in rows] for name in ("images_per_second", "data_wait", "seconds")}


def load_photos(setup: Setup) -> dict:
    """Measures photos a second out of the augmenting loader and onto the device, by workers, in the second epoch."""
    _, size, batch_size = setup.shape
    dataset = COCOPersonDataset(setup.photos, "train2017", size, augment=True)
    samples, speeds, pin_memory = SkipUnreadable(dataset, True, 0.01, setup.work), {}, setup.device.type == "cuda"
    for workers in (1,) if setup.quick else (4, 8, 12, 16):
        loader = make_loader(samples, batch_size, workers, training=True, pin_memory=pin_memory)
        for number in (0, 1):
            start, photos = time.perf_counter(), 0
            for batch in batches(loader, number):
                batch.to(setup.device, non_blocking=True)
                photos += len(batch)
            speeds[workers] = round(photos / (time.perf_counter() - start), 1)
        del loader  # ends its workers
    return {"photos_per_second": speeds}


def predict_photos(setup: Setup) -> dict:
    """Measures photos a second of the network alone, by precision and photos of a batch, and from file to file."""
    cv2.setNumThreads(1)  # as predict.py does
    encoder, size, _ = setup.shape
    model = UNetAutoencoder(encoder, pretrained=False)
    cutters = {name: Cutter(model, size, setup.device, name == "half") for name in ("half", "float32")}
    network = {f"{name}, batches of {photos}": round(network_speed(cutter, photos, 4 * setup.rounds), 1)
               for name, cutter in cutters.items() for photos in (1, 8)}  # fmt: skip
    files = {}
    for name, style in (("cutouts", predict.Style()), ("masks", predict.Style(mask=True))):
        speeds = [folder_speed(cutters["half"], style, setup, f"{name}{number}") for number in range(setup.rounds)]
        files[name] = [round(value, 1) for value in (statistics.median(speeds), min(speeds), max(speeds))]
    return {"network": network, "file_to_file": files}


def network_speed(cutter: Cutter, photos: int, rounds: int) -> float:
    squares = [np.zeros((cutter.image_size, cutter.image_size, 3), np.uint8)] * photos
    cutter.probabilities(squares)  # warms up
    start = time.perf_counter()
    for _ in range(rounds):
        cutter.probabilities(squares)
    return photos * rounds / (time.perf_counter() - start)


def folder_speed(cutter: Cutter, style: predict.Style, setup: Setup, name: str) -> float:
    jobs = predict.plan([str(setup.photos / "train2017")], setup.work / name)[0][:96]
    start = time.perf_counter()
    outcomes = predict.cut_all(cutter, jobs, style, 8)
    if failures := [line for outcome in outcomes for line in outcome.failures]:
        raise RuntimeError(failures[0])
    return len(jobs) / (time.perf_counter() - start)


# --- all of them ------------------------------------------------------------------------------------------


class Check(NamedTuple):
    work: Callable[[Setup], dict]
    seconds: float  # that it takes on a GPU at most, as a rule
    needs_cuda: bool = False


CHECKS = {
    "facts": Check(facts, 10),
    "tests": Check(tests, 180),
    "step": Check(step, 60),
    "epoch": Check(epoch, 70),
    "loader": Check(load_photos, 40),
    "predict": Check(predict_photos, 20),
    "compile": Check(compile_step, 100, needs_cuda=True),
}


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def run_check(name: str, options: argparse.Namespace, work: Path, seconds_left: float) -> dict:
    """Returns a check's line."""
    check, start = CHECKS[name], time.monotonic()
    if check.needs_cuda and options.device != "cuda":
        return {"check": name, "ok": None, "skipped": "it needs CUDA"}
    if seconds_left < check.seconds:
        reason = f"it takes up to {check.seconds:g} s, and {max(seconds_left, 0):.0f} s of --minutes are left"
        return {"check": name, "ok": None, "skipped": reason}
    command = [sys.executable, __file__, "--one", name, "--work", str(work), "--device", options.device]
    command += ["--quick"] * options.quick
    found = run_process(command, work / f"{name}.json", min(seconds_left, max(120, 3 * check.seconds)))
    return {"check": name, "ok": found.pop("ok", True), "took": round(time.monotonic() - start, 1), **found}


def run_process(command: list[str], result: Path, limit: float) -> dict:
    """Returns what a process writes to the file `result`, or why it does not; ends all that it has started."""
    log = result.with_suffix(".log")
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        process.wait(limit)
        error = f"it ended with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        error = f"it was not done after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if result.exists():
        return json.loads(result.read_text())
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {"ok": False, "error": error, "last_line": lines[-1].strip() if lines else ""}


def run_one(name: str, setup: Setup) -> None:
    """Runs a check in this process, and writes what it found, or its error, to a file."""
    if setup.quick:
        torch.set_num_threads(1)  # more would wait for one another on a busy machine
    try:
        found = CHECKS[name].work(setup)
    except BaseException as error:  # a SystemExit of the trainer as well
        traceback.print_exc()
        found = {"ok": False, "error": one_line(error)}
    (setup.work / f"{name}.json").write_text(json.dumps(found, default=str))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("gpu_check.py", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="the first visible GPU, or none (%(default)s)")
    add("--quick", action="store_true", help="tiny sizes: they try the command, and measure nothing")
    add("--minutes", type=float, default=8.0, help="after which what is left is skipped (%(default)s)")
    add("--only", default=",".join(CHECKS), help="(%(default)s)")
    add("--one", help=argparse.SUPPRESS)  # the check that this process is for
    add("--work", type=Path, help=argparse.SUPPRESS)  # and its folder
    options = parser.parse_args(argv)
    options.names = options.only.split(",")
    if unknown := [name for name in options.names if name not in CHECKS]:
        raise UsageError(f"there is no check {unknown[0]}: there are {', '.join(CHECKS)}")
    return options


def main(argv: list[str]) -> int:
    """Prints a line a check as soon as it is done, and one that sums up. Returns the exit code."""
    options = parse(argv)
    if options.one:
        device = torch.device("cuda:0" if options.device == "cuda" else "cpu")
        run_one(options.one, Setup(device, options.quick, options.work))
        return 0
    start, lines = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as work:
        for name in options.names:
            seconds_left = 60 * options.minutes - (time.monotonic() - start)
            lines.append(run_check(name, options, Path(work), seconds_left))
            print(json.dumps(lines[-1]), flush=True)
    failed = [line["check"] for line in lines if line["ok"] is False]
    skipped = [line["check"] for line in lines if "skipped" in line and line["ok"] is None]
    print(json.dumps({"check": "all", "ok": not failed, "failed": failed, "skipped": skipped,
                      "took": round(time.monotonic() - start, 1)}), flush=True)  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_cli("gpu_check.py", lambda: main(sys.argv[1:])))
