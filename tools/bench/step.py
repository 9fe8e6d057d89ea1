"""The training step: beside smp's U-Net, what it waits for, on two processes, and how its cost grows."""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, Dataset

import trainer
import utils
from datasets import COCOPersonDataset, make_loader
from models import IMAGENET_MEAN, IMAGENET_STD, read_weights
from tools.bench.measuring import Way, alternate, table
from trainer import Config
from training import launching
from training.checkpoints import RunFolder
from training.interruptions import Watch
from utils import LossCalculator, Processes, UserError

ROOT = Path(__file__).resolve().parents[2]
ENCODERS, SIZES, BATCH = ("resnet34", "mobilenet_v2"), (256, 384), 8
SEEDS, ACCURACY_SIZE = 3, 160  # of `accuracy`: 256 pixels take hours
MOST_ROUNDS = 3  # a step takes seconds on one core


# --- one training, on samples that cost nothing -------------------------------------------------------------


class Noise(Dataset):
    """Always the same sample, so that nothing but the step is measured."""

    def __init__(self, length: int, size: int):
        generator = torch.Generator().manual_seed(0)
        self.length, self.sample = length, torch.randint(256, (4, size, size), dtype=torch.uint8, generator=generator)
        self.sample[3] = 0
        self.sample[3, size // 4 : size // 2, size // 4 : size // 2] = 255

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return self.sample

    def set_epoch(self, epoch: int) -> None: ...


class Training:
    """The trainer's own loop: `epoch(steps)` runs so many of its steps and returns the figures that it gives."""

    def __init__(self, encoder: str, size: int, processes: Processes | None = None, **settings: object):
        self.processes = processes or Processes(torch.device("cpu"))
        sizes = {"image_size": size, "batch_size": BATCH, "num_workers": 0}
        self.config = Config(encoder=encoder, pretrained=False, device="cpu", **sizes, **settings)
        torch.manual_seed(0)
        self.run = trainer.start_run(self.config, self.processes)
        self.watch = Watch(self.run, RunFolder("unused", 0), 0)

    def epoch(self, steps: int) -> dict[str, float]:
        loader = DataLoader(Noise(steps * BATCH, self.config.image_size), BATCH)
        figures = trainer.train_one_epoch(self.run, loader, 0, self.config, self.watch)
        self.run.end_epoch({})
        return figures

    def step(self) -> int:
        self.epoch(1)
        return BATCH


# --- step: beside segmentation_models_pytorch ---------------------------------------------------------------


def step(options: argparse.Namespace) -> str:
    """Whole training steps on one thread: same encoder, loss, batch and optimiser, so that the models differ."""
    with one_thread():
        tables = [step_table(encoder, size, min(options.rounds, MOST_ROUNDS)) for size in SIZES for encoder in ENCODERS]
    return "\n".join(tables)


def step_table(encoder: str, size: int, rounds: int) -> str:
    theirs, ours = Way("smp", smp_step(encoder, size)), Way("Silueta", Training(encoder, size).step)
    ways = [theirs, Way("smp, channels last", smp_step(encoder, size, torch.channels_last)), ours]
    if utils.cpu_has_bfloat16():
        ways.append(Way("Silueta, --bfloat16-on-cpu", Training(encoder, size, bfloat16_on_cpu=True).step))
    alternate(ways, rounds)
    return table(f"A training step of {encoder} at {size}, batch {BATCH}, one thread", "image", theirs, ways)


def smp_step(encoder: str, size: int, layout: torch.memory_format = torch.contiguous_format) -> Callable[[], int]:
    """A step as the users of segmentation_models_pytorch write it; float32 batches that are already normalised."""
    model = smp_unet(encoder).to(memory_format=layout)
    optimizer, criterion = Adam(model.parameters(), 1e-4, weight_decay=1e-6), LossCalculator()
    target = Noise(1, size)[0].float().div(255).expand(BATCH, -1, -1, -1).contiguous()
    images = target[:, :3].contiguous(memory_format=layout)

    def work() -> int:
        loss, _ = criterion(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return BATCH

    return work


def smp_unet(encoder: str) -> nn.Module:
    try:
        import segmentation_models_pytorch as smp
    except ModuleNotFoundError:
        raise UserError("segmentation_models_pytorch is missing: pip install -r requirements-dev.txt") from None
    return smp.Unet(encoder, encoder_weights=None, decoder_attention_type="scse", classes=4)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- waiting: what is neither forward, backward nor optimiser -----------------------------------------------


def waiting(options: argparse.Namespace) -> str:
    """The shares of the trainer's own loop on one thread, mobilenet_v2 at 256."""
    training, seconds = Training("mobilenet_v2", 256), {}
    with one_thread():
        training.epoch(2)
        with watched(training, seconds):
            whole = training.epoch(steps := 3 * min(options.rounds, MOST_ROUNDS))
    fetching = whole["seconds"] * whole["data_wait"]
    rest = whole["seconds"] - fetching - sum(seconds.values())
    rows = {**seconds, "waiting for data": fetching, "all else": rest}
    lines = [f"| {name} | {1e3 * spent / steps:.1f} | {spent / whole['seconds']:.1%} |" for name, spent in rows.items()]
    head = f"### Where a step of mobilenet_v2 at 256 goes, batch {BATCH}, one thread, {steps} steps\n"
    return "\n".join([head, "| | ms a step | share |", "| --- | --- | --- |", *lines, ""])


@contextlib.contextmanager
def watched(training: Training, seconds: dict[str, float]) -> Iterator[None]:
    """Counts in `seconds` what the parts of a step take while the block runs."""
    calls = {
        "forward": (training.run.model, "forward"), "loss": (training.run.criterion, "forward"),
        "backward": (Tensor, "backward"), "clipping": (nn.utils, "clip_grad_norm_"),
        "optimiser": (training.run.optimizer, "step"),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, (owner, method) in calls.items():
            stack.enter_context(patch.object(owner, method, counted(getattr(owner, method), name, seconds)))
        yield


def counted(call: Callable, name: str, seconds: dict[str, float]) -> Callable:
    def wrapper(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        result = call(*args, **kwargs)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return result

    return wrapper


# --- processes: two beside one ------------------------------------------------------------------------------


def processes(options: argparse.Namespace) -> str:
    """The trainer's own loop under torchrun on the CPU, one thread a process; both cores must be free."""
    return "\n".join(processes_table(encoder, min(options.rounds, MOST_ROUNDS)) for encoder in ENCODERS)


def processes_table(encoder: str, rounds: int) -> str:
    one, two = Way("one process", int), Way("two processes", int)
    for _ in range(rounds):
        for way, count in ((one, 1), (two, 2)):
            way.seconds.append(1 / images_per_second(encoder, count))
    return table(f"{encoder} at 256, batch {BATCH} a process, one thread a process", "image", one, [one, two])


def images_per_second(encoder: str, count: int) -> float:
    """Of all processes together, started anew, without their start and their first steps."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run([*launcher, "-m", "tools.bench.step", encoder], cwd=ROOT, stdout=subprocess.PIPE, check=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)  # fmt: skip
    return float(done.stdout.split()[-1])


def one_of_several(encoder: str) -> None:
    """What each of the processes does."""
    with launching.joined("cpu") as processes:
        training = Training(encoder, 256, processes)
        training.epoch(3)
        figures = training.epoch(8)
        if processes.is_main:
            print(figures["images_per_second"])


# --- growth: with the image, the workers, the data set ------------------------------------------------------


def growth(options: argparse.Namespace) -> str:
    """Images a second of loader and step, and what a sample costs as the data set grows."""
    with one_thread():
        return "\n".join([growth_with_size(options), growth_with_data(options)])


def growth_with_size(options: argparse.Namespace) -> str:
    lines = []
    for size in (256, 384, 512):
        dataset = COCOPersonDataset(options.data_root, options.split, size, augment=True)
        loaded = [loader_speed(dataset, workers) for workers in (0, 1, 2)]
        trained = step_speed(size, min(options.rounds, MOST_ROUNDS))
        lines.append("| " + " | ".join([str(size), *(f"{speed:.4g}" for speed in (*loaded, trained))]) + " |")
    head = ["### Images a second by image size: the augmented loader, and the step of mobilenet_v2 on one thread", "",
            "| size | no worker | 1 worker | 2 workers | step |", "| --- | --- | --- | --- | --- |"]  # fmt: skip
    return "\n".join([*head, *lines, ""])


def loader_speed(dataset: COCOPersonDataset, workers: int) -> float:
    """Images a second of the second pass: the first starts the workers."""
    loader = make_loader(dataset, BATCH, workers, training=True)
    for _ in range(2):
        start = time.perf_counter()
        images = sum(map(len, loader))
    return images / (time.perf_counter() - start)


def step_speed(size: int, steps: int) -> float:
    training = Training("mobilenet_v2", size)
    training.epoch(1)
    return training.epoch(steps)["images_per_second"]


def growth_with_data(options: argparse.Namespace) -> str:
    """The same photos listed 1, 10 and 100 times; as many samples of each, taken in turn."""
    with tempfile.TemporaryDirectory() as folder:
        ways = []
        for times in (1, 10, 100):
            root = repeated(Path(options.data_root), options.split, times, Path(folder, str(times)))
            dataset = COCOPersonDataset(root, options.split, 384, augment=True)
            ways.append(Way(f"{times}×: {len(dataset)} photos", samples_of(dataset, times)))
        alternate(ways, options.rounds)
    return table("An augmented sample at 384 by size of the data set", "image", ways[0], ways)


def samples_of(dataset: COCOPersonDataset, times: int, count: int = 100) -> Callable[[], int]:
    """A round of samples from all over the list; the same photos, however many times the list holds them."""
    photos, rng = len(dataset) // times, np.random.default_rng(0)
    chosen = rng.integers(photos, size=count) + photos * rng.integers(times, size=count)
    return lambda: len([dataset[index] for index in chosen.tolist()])


def repeated(root: Path, split: str, times: int, folder: Path) -> Path:
    """A data set that lists the photos of `root` so many times, under new ids; the photo folder is a link."""
    content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    step = 1 + max(image["id"] for image in content["images"])
    marks = 1 + max(annotation["id"] for annotation in content["annotations"])
    images = [{**image, "id": image["id"] + step * n} for n in range(times) for image in content["images"]]
    annotations = [{**annotation, "id": annotation["id"] + marks * n, "image_id": annotation["image_id"] + step * n}
                   for n in range(times) for annotation in content["annotations"]]  # fmt: skip
    (folder / "annotations").mkdir(parents=True)
    target = folder / "annotations" / f"instances_{split}.json"
    target.write_text(json.dumps({**content, "images": images, "annotations": annotations}))
    (folder / split).symlink_to((root / split).resolve())
    return folder


# --- accuracy: the same training with either model (hours; only when asked for) ------------------------------


class SmpUNet(nn.Module):
    """smp's U-Net in the place of ours: the same arguments, the normalisation inside, the same encoder weights."""

    def __init__(self, encoder: str, pretrained: bool, _use_attention: bool, weights_file: str | None):
        super().__init__()
        self.network = smp_unet(encoder)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        if pretrained:
            state = read_weights(weights_file)
            wanted = self.network.encoder.state_dict().keys()
            self.network.encoder.load_state_dict({key: state[key] for key in wanted})

    @property
    def encoder(self) -> nn.Module:
        return self.network.encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)

    def predict(self, images: Tensor) -> Tensor:
        return torch.sigmoid(self(images))


def accuracy(options: argparse.Namespace) -> str:
    """Validation IoU of 12 epochs of mobilenet_v2 at 160 on train2017, the same seeds with either model."""
    models = {"smp": SmpUNet, "Silueta": trainer.UNetAutoencoder}
    lines = []
    for seed, name in itertools.product(range(SEEDS), models):
        best, last = trained(models[name], seed, options)
        lines.append(f"| {seed} | {name} | {best:.4f} | {last:.4f} |")
        print(lines[-1], file=sys.stderr, flush=True)  # an hour's work is not kept for the table alone
    head = ["### Validation IoU of the best and of the last of 12 epochs", "",
            "| seed | model | best | last |", "| --- | --- | --- | --- |"]  # fmt: skip
    return "\n".join([*head, *lines, ""])


def trained(model: type[nn.Module], seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """The trainer itself, with that model. Returns the best and the last epoch's IoU."""
    with tempfile.TemporaryDirectory() as folder, patch.object(trainer, "UNetAutoencoder", model):
        config = Config(
            data_root=options.data_root, checkpoint_dir=folder, encoder="mobilenet_v2", image_size=ACCURACY_SIZE,
            pretrained=bool(options.encoder_weights), encoder_weights=options.encoder_weights, seed=seed,
            num_epochs=12, batch_size=BATCH, num_workers=2, device="cpu", keep_checkpoints=1,
        )  # fmt: skip
        trainer.main(config)
        rows = list(csv.DictReader(Path(folder, "history.csv").read_text().splitlines()))
    scores = [float(row["val_iou"]) for row in rows]
    return max(scores), scores[-1]


if __name__ == "__main__":
    one_of_several(sys.argv[1])
