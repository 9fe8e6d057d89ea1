"""One of the two sides that versions.py measures, as a process of its own: it does a round when it is told the number.

It runs in the folder of a checkout, whose modules it imports, and uses only names that every version has.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, os.getcwd())  # the checkout's modules are measured, not those beside this file

import cv2
import torch
from torch import nn

from datasets import COCOPersonDataset, batches, make_loader
from models import UNetAutoencoder
from utils import LossCalculator

SIZE, BATCH, WORKERS = 384, 8, 2  # of samples
STEP_SIZE, STEPS = 256, 2  # of training steps, and how many are a round
OPENINGS = 20  # of an index that is there, in a round: one takes milliseconds

Round = Callable[[int], int]  # does the round of that number, and returns how many units that were


def sample(root: str, split: str, cache: bool = False) -> Round:
    """One augmented sample after the other, on one core, by a process that begins as a loader's worker does."""
    dataset = COCOPersonDataset(root, split, SIZE, augment=True, cache=cache)
    make_loader(dataset, BATCH, WORKERS, training=True).worker_init_fn(0)

    def work(number: int) -> int:
        dataset.set_epoch(number)  # the same draws on both sides
        return len([dataset[index] for index in range(len(dataset))])

    return work


def cached(root: str, split: str) -> Round:
    return sample(root, split, cache=True)


def loader(root: str, split: str) -> Round:
    """Batches of augmented samples, from the workers into this process."""
    dataset = COCOPersonDataset(root, split, SIZE, augment=True)
    ours = make_loader(dataset, BATCH, WORKERS, training=True)
    return lambda number: sum(map(len, batches(ours, number)))


def build(root: str, split: str) -> Round:
    """The person index, from nothing."""

    def work(_number: int) -> int:
        shutil.rmtree(Path(root, ".silueta"), ignore_errors=True)
        COCOPersonDataset(root, split)
        return 1

    return work


def opened(root: str, split: str) -> Round:
    """The person index, as every later start finds it."""
    return lambda _number: len([COCOPersonDataset(root, split) for _ in range(OPENINGS)])


def step(_root: str, _split: str) -> Round:
    """The plain training step of mobilenet_v2: model, loss, clipping, fused Adam."""
    torch.manual_seed(0)
    model = UNetAutoencoder("mobilenet_v2", pretrained=False).to(memory_format=torch.channels_last)
    optimizer, criterion = torch.optim.Adam(model.parameters(), fused=True), LossCalculator()
    target = torch.rand(BATCH, 4, STEP_SIZE, STEP_SIZE).contiguous(memory_format=torch.channels_last)
    target[:, 3].round_()

    def work(_number: int) -> int:
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            loss, _ = criterion(model(target[:, :3]), target)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return STEPS * BATCH

    return work


SECTIONS = {work.__name__: work for work in (sample, cached, loader, build, opened, step)}


def main(section: str, root: str, split: str) -> None:
    """Does the round of every number that comes in, and says how many units that were."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    work = SECTIONS[section](root, split)
    for line in sys.stdin:
        print(f"\ndone {work(int(line))}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
