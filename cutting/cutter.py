"""Loads a checkpoint and cuts the persons out of a photo: the network, alpha at the photo's size, the colours."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import utils
from cutting.edges import estimate_foreground, refine_alpha, to_opacity
from cutting.photos import open_photo
from loading.letterbox import letterbox, to_rgba
from models import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE, CheckpointError, UNetAutoencoder, model_weights, read_checkpoint
from utils import UserError

TRAINED = "checkpoints/best_model.pth"  # the model that a training leaves, in the working directory
BUNDLED = Path(__file__).with_name("bundled.pth")  # the model that comes with the program; bundled.md is its card


def load(
    checkpoint: str | Path | None = None, device: str = utils.LOCAL_RANK_GPU, image_size: int | None = None
) -> Cutter:
    """Returns the model of a checkpoint, ready to cut.

    Args:
        checkpoint: `best_model.pth` or any other that a training wrote, or "bundled", the model that comes with the
            program; None is `checkpoints/best_model.pth` if it exists, else "bundled".
        device: e.g. "cpu", "cuda:1", "mps"; by default the first GPU, or the CPU if there is none.
        image_size: the side in pixels of the square that photos are fitted into; by default that of the training.

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
        use_float16 = config.get("precision") != "float32"
        return Cutter(model, size, torch.device(name), use_float16, describe_model(path, content, size))
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


class Cutter:
    """Cuts the persons out of photos: `rgba = cut(photo)`. `load` makes one; several threads may use it at once."""

    def __init__(
        self, model: UNetAutoencoder, image_size: int, device: torch.device, use_float16: bool, description: str = ""
    ):
        self.model = model.eval().to(device, memory_format=utils.memory_format(device))
        self.image_size, self.device, self.description = image_size, device, description
        # Not bfloat16: its mantissa is shorter, and alpha near 1 would come in steps of 1/256 instead of 1/2048.
        self.amp_dtype = torch.float16 if use_float16 and device.type == "cuda" else None
        # A GPU computes one batch at a time, whichever thread brings it; on a CPU each thread computes for itself.
        self._gpu_lock = contextlib.nullcontext() if device.type == "cpu" else threading.Lock()

    def __call__(self, photo: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        """Returns the cutout of a photo: uint8 RGBA (H, W, 4), alpha straight, colours its own except at soft edges.

        The photo is a path, a Pillow image or a uint8 array (H, W, 3 or 4). Raises PhotoError if it cannot be read.
        """
        photo = open_photo(photo)
        square, metadata = letterbox(photo.rgb, self.image_size)
        alpha = refine_alpha(self.probabilities([square])[0], square, metadata, photo.rgb)
        opacity = to_opacity(alpha, photo.alpha)
        return to_rgba(estimate_foreground(photo, opacity, square, metadata, hide_background=True), opacity)

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
