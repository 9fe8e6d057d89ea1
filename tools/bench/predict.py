"""A folder of photos cut out by predict.py, beside rembg's way of working with the same network in its place."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

import predict
from cutting.cutter import Cutter, load
from tools.bench.measuring import Way, alternate, table
from utils import UserError


def photos(options: argparse.Namespace) -> str:
    """Decoding and PNG writing included, on all cores that this process may use."""
    cv2.setNumThreads(1)  # as predict.py itself does
    cutter = load(options.checkpoint, "cpu")
    files = sorted(Path(options.data_root, options.split).glob("*.jpg"))
    if not files:
        raise UserError(f"there is no *.jpg in {Path(options.data_root, options.split)}: see --data-root and --split")
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        rembg = Way("rembg's way", lambda: one_at_a_time(cutter, files, Path(folder, "theirs"), threads))
        ours = Way("predict.py", lambda: all_at_once(cutter, files, Path(folder, "ours")))
        alternate([rembg, ours], options.rounds)
    return table(f"Cutting out {len(files)} photos, file to file", "photo", rembg, [rembg, ours])


def one_at_a_time(cutter: Cutter, files: list[Path], output: Path, threads: int) -> int:
    """As rembg 2.0 does it for a folder: squash by Lanczos, network, mask back by Lanczos, composite, Pillow's PNG."""
    torch.set_num_threads(threads)
    output.mkdir(exist_ok=True)
    for file in files:
        photo = Image.open(file).convert("RGB")
        square = np.asarray(photo.resize((cutter.image_size, cutter.image_size), Image.Resampling.LANCZOS))
        mask = Image.fromarray((cutter.probabilities([square])[0] * 255).astype(np.uint8))
        mask = mask.resize(photo.size, Image.Resampling.LANCZOS)
        Image.composite(photo.convert("RGBA"), Image.new("RGBA", photo.size, 0), mask).save(output / f"{file.stem}.png")
    return len(files)


def all_at_once(cutter: Cutter, files: list[Path], output: Path) -> int:
    jobs, _ = predict.plan([str(file) for file in files], output)
    if any(outcome.failures for outcome in predict.cut_all(cutter, jobs, predict.Style(), batch_size=8)):
        raise RuntimeError("a photo could not be cut out")
    return len(files)
