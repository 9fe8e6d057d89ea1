"""Loads a checkpoint and cuts the persons out of a photo: the network, alpha at the photo's size, the colours."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import utils
from cutting.edges import estimate_foreground, refine_alpha, to_opacity
from cutting.persons import BAR_DEPTHS, continue_to_borders, keep_persons, largest_component
from cutting.photos import open_photo
from loading.letterbox import letterbox, to_rgba
from models import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE, CheckpointError, UNetAutoencoder, model_weights, read_checkpoint
from utils import UserError

TRAINED = "checkpoints/best_model.pth"  # the model that a training leaves, in the working directory
BUNDLED = Path(__file__).with_name("bundled.pth")  # the model that comes with the program; bundled.md is its card
SMALL_PERSONS = 0.1  # of a photo, covered by the largest component: below, a second look (chosen in docs/looks.md)
SECOND_LOOK = 2.4  # times the size of the first one


def load(
    checkpoint: str | Path | None = None,
    device: str = utils.LOCAL_RANK_GPU,
    image_size: int | None = None,
    foreground_only: bool = False,
) -> Cutter:
    """Returns the model of a checkpoint, ready to cut.

    Args:
        checkpoint: `best_model.pth` or any other that a training wrote, or "bundled", the model that comes with the
            program; None is `checkpoints/best_model.pth` if it exists, else "bundled".
        device: e.g. "cpu", "cuda:1", "mps"; by default the first GPU, or the CPU if there is none.
        image_size: the side in pixels of the square that photos are fitted into; by default that of the training, and
            2.4 times that in a second look at photos whose persons are small.
        foreground_only: whether persons who are much smaller than the largest one are left out.

    Raises:
        CheckpointError: the file is missing, damaged or of another program.
        LaunchError: there is no such device.
        UserError: the image size is out of range.
    """
    name, _ = utils.pick_device(device, 0, torch.cuda.device_count(), torch.backends.mps.is_available())
    path = resolve_model(checkpoint)
    content = read_checkpoint(path)
    try:
        config = content["config"]
        model = UNetAutoencoder(config["encoder"], pretrained=False, use_attention=config["use_attention"])
        model.load_state_dict(model_weights(content))  # may be float16: the model stays float32
        size = config["image_size"] if image_size is None else image_size
        check_size(size)
        second_size = second_look_size(size) if image_size is None else None
        return Cutter(model, size, torch.device(name), config.get("precision") != "float32",
                      describe_model(path, content, size), second_size=second_size, bars=config["bars"],
                      foreground_only=foreground_only)  # fmt: skip
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        text = " ".join(str(error).split())[:160]  # PyTorch lists every tensor that is missing, a line each
        raise CheckpointError(f"{path} holds no model that can be used here: {text}") from None


def resolve_model(checkpoint: str | Path | None) -> str | Path:
    """Returns the path of the file that `load` reads."""
    if checkpoint is None:
        checkpoint = TRAINED if os.path.exists(TRAINED) else "bundled"
    return BUNDLED if checkpoint == "bundled" else checkpoint


def model_digest(checkpoint: str | Path | None) -> str:
    """Returns a digest of the file that `load` reads, from its archive's checksums; "" if it is no such archive."""
    try:
        with zipfile.ZipFile(resolve_model(checkpoint)) as archive:
            checksums = [entry.CRC for entry in archive.infolist()]
    except (OSError, zipfile.BadZipFile):  # `load` says what is wrong with it
        return ""
    return hashlib.blake2b(repr(checksums).encode(), digest_size=6).hexdigest()


def describe_model(path: str | Path, content: dict, image_size: int) -> str:
    """Returns a line on a checkpoint's model and its score: "a.pth (mobilenet_v2 at 256, validation IoU 0.61)"."""
    config = content["config"]
    trained_at, metric = config.get("image_size"), config.get("best_metric", "iou")
    score = (content.get("metrics") or {}).get(metric)
    facts = f"{config['encoder']} at {image_size}"
    facts += f", trained at {trained_at}" if trained_at != image_size else ""
    facts += f", validation {utils.SCORES.get(metric, metric)} {score:.2f}" if score is not None else ""
    facts += ", trained on the drawings of --sample: it does not work on photos" if config.get("sample") else ""
    return f"{'the bundled one' if path == BUNDLED else path} ({facts})"


def check_size(image_size: int | None) -> None:
    """Raises UserError if an image size is out of the network's range; None, the checkpoint's own, is accepted."""
    if image_size is not None and image_size not in range(MIN_IMAGE_SIZE, MAX_IMAGE_SIZE + 1):
        raise UserError(f"an image size of {image_size} is out of range: from {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE}")


def second_look_size(image_size: int) -> int | None:
    """Returns the side of the second look's square, which the network need not pad; None if none may be so large."""
    size = MIN_IMAGE_SIZE * round(SECOND_LOOK * image_size / MIN_IMAGE_SIZE)
    return size if size <= MAX_IMAGE_SIZE else None


class Look(NamedTuple):
    """A photo in its square, and where the network sees persons."""

    probabilities: np.ndarray  # float32 (S, S), persons continued to the borders, specks left out
    square: np.ndarray  # uint8 RGB (S, S, 3)
    metadata: dict  # that of `letterbox`
    first: np.ndarray  # the network's own probabilities in the first look, float32 (T, T), T its image size

    @property
    def size(self) -> int:
        return len(self.square)


def has_small_persons(look: Look) -> bool:
    """Returns whether a second look is worth it: persons are small, and the photo has more pixels than the square.

    Not where the first look finds nobody: the second one then finds more of what is no person than of what is.
    """
    covered = largest_component(look.probabilities, look.metadata["padding"])
    return look.metadata["scale"] < 1 and 0 < covered < SMALL_PERSONS


class Cutter:
    """Cuts the persons out of photos: `rgba = cut(photo)`. `load` makes one; several threads may use it at once."""

    def __init__(
        self, model: UNetAutoencoder, image_size: int, device: torch.device, use_float16: bool, description: str = "",
        *, second_size: int | None = None, bars: str = "reflect", foreground_only: bool = False,
    ):  # fmt: skip
        self.model = model.eval().to(device).to(memory_format=utils.memory_format(device))
        self.image_size, self.device, self.description = image_size, device, description
        self.second_size = second_size  # of the second look's square; None: one look at every photo
        self.bars, self.bar_depth = bars, BAR_DEPTHS[bars]  # what filled the letterbox in the model's training
        self.foreground_only = foreground_only  # whether persons much smaller than the largest one are left out
        # Not bfloat16: its mantissa is shorter, and alpha near 1 would come in steps of 1/256 instead of 1/2048.
        self.amp_dtype = torch.float16 if use_float16 and device.type == "cuda" else None
        # A GPU computes one batch at a time, whichever thread brings it; on a CPU each thread computes for itself.
        self._gpu_lock = contextlib.nullcontext() if device.type == "cpu" else threading.Lock()

    def __call__(self, photo: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        """Returns the cutout of a photo: uint8 RGBA (H, W, 4), alpha straight, colours its own except at soft edges.

        The photo is a path, a Pillow image or a uint8 array (H, W, 3 or 4). Raises PhotoError if it cannot be read.
        """
        opened = open_photo(photo)
        probabilities, square, metadata, _ = self.look([opened.rgb])[0]
        opacity = to_opacity(refine_alpha(probabilities, square, metadata, opened.rgb), opened.alpha)
        return to_rgba(estimate_foreground(opened, opacity, square, metadata, hide_background=True), opacity)

    def look(self, photos: list[np.ndarray]) -> list[Look]:
        """Returns where the network sees persons in photos, uint8 RGB (H, W, 3): what a cutout is made of.

        Where a first look finds small persons only, a second one at `second_size` takes its place.
        """
        looks = self._look_at(photos, self.image_size)
        if self.second_size is not None:
            small = [index for index, look in enumerate(looks) if has_small_persons(look)]
            pixels = len(photos) * self.image_size**2  # of the first look: for no more memory, if it had enough photos
            step = max(1, pixels // self.second_size**2)
            for some in (small[start : start + step] for start in range(0, len(small), step)):
                again = self._look_at([photos[index] for index in some], self.second_size)
                for index, look in zip(some, again, strict=True):
                    if largest_component(look.probabilities, look.metadata["padding"]) > 0:  # else it has lost them
                        looks[index] = look._replace(first=looks[index].first)
        return [self._keep_persons(look) for look in looks]

    def _look_at(self, photos: list[np.ndarray], size: int) -> list[Look]:
        squares = [letterbox(photo, size, self.bars) for photo in photos]
        raw = self.probabilities([square for square, _ in squares]) if photos else ()
        return [self._continue(Look(alpha, *square, alpha)) for alpha, square in zip(raw, squares, strict=True)]

    def _continue(self, look: Look) -> Look:
        padding = look.metadata["padding"]
        return look._replace(probabilities=continue_to_borders(look.probabilities, padding, self.bar_depth))

    def _keep_persons(self, look: Look) -> Look:
        kept = keep_persons(look.probabilities, look.metadata["padding"], self.foreground_only)
        return look._replace(probabilities=kept)

    def probabilities(self, squares: list[np.ndarray]) -> np.ndarray:
        """Returns each pixel's probability of a person, float32 (N, S, S), for uint8 RGB squares (S, S, 3)."""
        probabilities = self._predict(squares, self.amp_dtype)
        if self.amp_dtype is not None and not np.isfinite(probabilities).all():  # beyond float16's 65,504
            probabilities = self._predict(squares, None)
        return probabilities

    @torch.inference_mode()
    def _predict(self, squares: list[np.ndarray], dtype: torch.dtype | None) -> np.ndarray:
        on_cuda = self.device.type == "cuda"
        batch = torch.from_numpy(np.stack(squares))
        if on_cuda:  # only pinned memory is copied while the GPU computes
            batch = batch.pin_memory()
        with self._gpu_lock, torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            images = batch.to(self.device, non_blocking=on_cuda).permute(0, 3, 1, 2)
            probabilities = self.model.predict(images.float().div_(255))[:, 3].float()
        return probabilities.cpu().numpy()  # waits for the GPU outside the lock: the next thread's batch can start
