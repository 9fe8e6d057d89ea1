"""What every benchmark shares: two ways of doing one thing, taken in turn, and the ratio between them."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch


@dataclass
class Way:
    """One way of doing the work: `work()` does a round of it and returns how many units that were."""

    name: str
    work: Callable[[], int]
    seconds: list[float] = field(default_factory=list)  # a unit, of each round

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def alternate(ways: list[Way], rounds: int) -> None:
    """Fills in `seconds`. One round of each in turn, so that a change in the machine's speed meets them alike.

    The first round warms up (caches, allocators, lazy imports) and is not counted.
    """
    for number in range(rounds + 1):
        for way in ways:
            start = time.perf_counter()
            units = way.work()
            if number:
                way.seconds.append((time.perf_counter() - start) / units)


def ratios(reference: Way, way: Way) -> tuple[float, float, float]:
    """How many times as fast as the reference, pair by pair: median, smallest, largest."""
    pairs = [theirs / ours for theirs, ours in zip(reference.seconds, way.seconds, strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def table(title: str, unit: str, reference: Way, ways: list[Way]) -> str:
    """Markdown: of each way the median milliseconds a unit, units a second, and the ratio with its spread."""
    lines = [
        f"### {title}",
        "",
        f"| | ms a {unit} | {unit}s a second | times {reference.name} |",
        "| --- | --- | --- | --- |",
    ]
    for way in ways:
        times, low, high = ratios(reference, way)
        spread = "1" if way is reference else f"**{times:.2f}** ({low:.2f} to {high:.2f})"
        lines.append(f"| {way.name} | {1e3 * way.median:.4g} | {1 / way.median:.4g} | {spread} |")
    return "\n".join([*lines, "", f"Medians of {len(reference.seconds)} rounds taken in turn.", ""])


def machine() -> str:
    """One line of what the figures depend on."""
    versions = f"torch {torch.__version__}, OpenCV {cv2.__version__}, numpy {np.__version__}"
    return f"{_processor()}, {os.cpu_count()} cores seen, Python {platform.python_version()}, {versions}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(": ")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not a PC
        return platform.processor() or platform.machine()
