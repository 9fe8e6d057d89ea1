"""From a checkpoint and a photo to the persons on it: the network, its alpha at the photo's size, their colours."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import utils
from cutting.edges import alpha_of, foreground, to_opacity
from cutting.photos import open_photo
from loading.letterbox import letterbox, to_rgba
from models import LARGEST_INPUT, SMALLEST_INPUT, UNetAutoencoder
from utils import CheckpointError, UserError, read_checkpoint, weights_of

TRAINED = "checkpoints/best_model.pth"  # what a training leaves, in the working directory
BOX = Path(__file__).with_name("person.pth")  # the model that comes along; person.md is its card


def load(
    checkpoint: str | Path | None = None, device: str = utils.EACH_ITS_GPU, image_size: int | None = None
) -> Cutter:
    """The model of a checkpoint, ready to cut; the checkpoint itself says which model that is.

    Args:
        checkpoint: `best_model.pth`, or any other that a training wrote; "box" is the one that comes with
            the program, `cutting/person.pth`, which None takes as well where there is no `checkpoints/best_model.pth`.
        device: e.g. "cpu", "cuda:1", "mps"; by default the first GPU, or the CPU where there is none.
        image_size: pixels, the side of the square that photos are fitted into; by default that of the training.

    Raises:
        CheckpointError: no such file, damaged, or of another kind.
        LaunchError: no such device.
        UserError: an image size out of range.
    """
    check_size(image_size)
    name, _ = utils.pick_device(device, 0, torch.cuda.device_count(), torch.backends.mps.is_available())
    checkpoint = find_model(checkpoint)
    content = read_checkpoint(checkpoint)
    try:
        config = content["config"]
        model = UNetAutoencoder(config["encoder"], pretrained=False, use_attention=config["use_attention"])
        model.load_state_dict(weights_of(content))  # of float16 too: the model stays float32
        size = config["image_size"] if image_size is None else image_size
        drawings = config["data_root"] if config.get("sample") else None
        about = introduce(checkpoint, content, size)
        return Cutter(model, size, torch.device(name), config.get("amp", True), about, drawings)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        text = " ".join(str(error).split())[:160]  # PyTorch lists every tensor that is missing, a line each
        raise CheckpointError(f"{checkpoint} holds no model that can be used here: {text}") from None


def find_model(checkpoint: str | Path | None) -> str | Path:
    """The file that `load` reads.

    Raises:
        CheckpointError: none was named, and there is none; or the program has come without its own.
    """
    if checkpoint is None:
        checkpoint = TRAINED if os.path.exists(TRAINED) else "box"
    if checkpoint == "box" and not BOX.exists():
        raise CheckpointError(f"there is no model: trainer.py makes {TRAINED}, or name one (--checkpoint FILE)")
    return BOX if checkpoint == "box" else checkpoint


def identity(checkpoint: str | Path | None) -> str:
    """What tells the file that `load` would read from any other, without reading it; "" where it cannot be used.

    Raises:
        CheckpointError: as `find_model`.
    """
    try:
        with zipfile.ZipFile(find_model(checkpoint)) as archive:
            sums = [part.CRC for part in archive.infolist()]
    except (OSError, zipfile.BadZipFile):  # `load` will say what is wrong with it
        return ""
    return hashlib.blake2b(repr(sums).encode(), digest_size=6).hexdigest()


def introduce(checkpoint: str | Path, content: dict, image_size: int) -> str:
    """Which model that is and what it is worth: e.g. "a.pth (mobilenet_v2 at 256, validation IoU 0.61)"."""
    trained_at, iou = content["config"].get("image_size"), (content.get("metrics") or {}).get("iou")
    facts = f"{content['config']['encoder']} at {image_size}"
    facts += f", trained at {trained_at}" if trained_at != image_size else ""
    facts += f", validation IoU {iou:.2f}" if iou is not None else ""
    return f"{'the one that comes with Silueta' if checkpoint == BOX else checkpoint} ({facts})"


def check_size(image_size: int | None) -> None:
    """Refuses a square that is too small for the network, or larger than any; None is the checkpoint's own.

    Raises:
        UserError: it is out of range.
    """
    if image_size is not None and image_size not in range(SMALLEST_INPUT, LARGEST_INPUT + 1):
        limits = f"from {SMALLEST_INPUT} to {LARGEST_INPUT} pixels"
        raise UserError(f"an image size of {image_size} is out of range: {limits}")


class Cutter:
    """Cuts the persons out of photos: `rgba = cut(photo)`.

    Args:
        image_size: pixels, the side of the square that photos are fitted into.
        amp: whether to compute in float16 on a CUDA GPU.
        about: the model in a line, for a person.
        drawings: the folder of those that it was trained on (`trainer.py --sample`): photos are foreign to it.
    """

    def __init__(
        self,
        model: UNetAutoencoder,
        image_size: int,
        device: torch.device,
        amp: bool = True,
        about: str = "",
        drawings: str | None = None,
    ):
        if not isinstance(image_size, int) or image_size < SMALLEST_INPUT:
            raise ValueError(f"an image size of {image_size} pixels")
        self.model = model.eval().to(device, memory_format=utils.memory_format(device))
        self.image_size, self.device = image_size, device
        self.about, self.drawings = about, drawings
        # Of the two halves the one with the finer mantissa: it draws alpha in steps of 1/2048, bfloat16 of 1/256.
        self.amp_dtype = torch.float16 if amp and device.type == "cuda" else None
        # A GPU is given one batch at a time, whichever thread brings it; on a CPU every thread computes for itself.
        self._turn = contextlib.nullcontext() if device.type == "cpu" else threading.Lock()

    def __call__(
        self, photo: str | Path | Image.Image | np.ndarray, keep_background_colours: bool = False
    ) -> np.ndarray:
        """A photo to uint8 RGBA (H, W, 4): the persons as straight alpha, the colours its own but at soft edges.

        Args:
            photo: what `open_photo` takes.
            keep_background_colours: where alpha is 0, which they are gone from otherwise.

        Raises:
            PhotoError: the photo cannot be read.
        """
        photo = open_photo(photo)
        square, metadata = letterbox(photo.rgb, self.image_size)
        alpha = alpha_of(self.probabilities([square])[0], square, metadata, photo.rgb)
        opacity = to_opacity(alpha, photo.alpha)
        colours = foreground(photo.rgb, opacity, square, metadata, photo.alpha, not keep_background_colours)
        return to_rgba(colours, opacity)

    def probabilities(self, squares: list[np.ndarray]) -> np.ndarray:
        """uint8 RGB squares (S, S, 3) to the probabilities of a person, float32 (N, S, S)."""
        found = self._computed(squares, self.amp_dtype)
        if self.amp_dtype is not None and not np.isfinite(found).all():  # beyond float16's 65,504
            found = self._computed(squares, None)
        return found

    @torch.inference_mode()
    def _computed(self, squares: list[np.ndarray], dtype: torch.dtype | None) -> np.ndarray:
        """The probabilities. A GPU is waited for out of turn: it goes on with the next thread's photos meanwhile."""
        pinned = self.device.type == "cuda"
        batch = stacked(squares, pinned)
        with self._turn, torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            images = batch.to(self.device, non_blocking=pinned).permute(0, 3, 1, 2)
            arrived = fetch(self.model.predict(images.float().div_(255))[:, 3].float())
        return arrived()


# From and to page-locked memory a CUDA GPU copies by itself; otherwise the thread waits for all that it has been given.


def stacked(squares: list[np.ndarray], pinned: bool) -> Tensor:
    """uint8 squares (S, S, 3) as one batch (N, S, S, 3)."""
    batch = torch.empty((len(squares), *squares[0].shape), dtype=torch.uint8, pin_memory=pinned)
    np.stack(squares, out=batch.numpy())
    return batch


def fetch(values: Tensor) -> Callable[[], np.ndarray]:
    """Begins to copy values from a CUDA GPU; what is returned waits for them. From elsewhere they are there at once."""
    if values.device.type != "cuda":
        return values.cpu().numpy
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    # Not the current device's stream: each thread begins with GPU 0. Blocking: an event that spins would take a core.
    done = torch.cuda.current_stream(values.device).record_event(torch.cuda.Event(blocking=True))

    def arrived() -> np.ndarray:
        done.synchronize()
        return host.numpy()

    return arrived
