"""The pieces of a step: its batches and their parts, the figures that it adds to, numbers that are not finite."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Adam

from models import SMALLEST_INPUT
from utils import (
    LaunchError,
    LossCalculator,
    Processes,
    SegmentationMetrics,
    empty_sums,
    lacks_memory,
    largest_of_each,
    largest_over_processes,
    sum_over_processes,
)

SMALL_BATCH = 16  # photos; of fewer BatchNorm's statistics say too little for a trained encoder to give up its own
# A channel, of 16 photos at 224: from there on BatchNorm learns as well as with more (Wu and He 2018, "Group
# Normalization", figure 1).
FEW_VALUES = 16 * 7 * 7
NCCL_ROOM = 512 * 2**20  # bytes: what it takes for itself once the processes have begun to share gradients
# Of these cuBLAS and cuDNN say little else where the GPU is nearly full and their handles, kernels or workspaces do
# not fit; they may mean something else as well.
HALF_SAID = re.compile("CUBLAS_STATUS|CUDNN_STATUS|cuDNN Frontend error|unable to find an engine|valid cuDNN algorithm")

# --- batches and their parts ------------------------------------------------------------------------------


def to_device(batch: Tensor, device: torch.device, share: float = 0) -> tuple[Tensor, Tensor]:
    """uint8 (N, 4, S, S) to the input (N, 3, S, S) and the target (N, 4, S, S), float32 in [0, 1]; see `copy_paste`."""
    batch = copy_paste(batch.to(device, non_blocking=True), share)
    target = batch.float().div_(255)
    return target[:, :3].contiguous(memory_format=torch.channels_last), target


def copy_paste(batch: Tensor, share: float) -> Tensor:
    """On so many of the samples, by torch's dice, the persons of the sample that precedes them in the batch are pasted.

    Each is then another photo, of persons where they were not (Ghiasi et al. 2021, "Simple Copy-Paste"): what a small
    set lacks. uint8 RGBA (N, 4, S, S), the persons where A is not 0; a batch of one stays as it is.
    """
    if not share:
        return batch
    chosen = torch.rand(len(batch), 1, 1, 1, device=batch.device) < share
    other = batch.roll(1, dims=0)
    return torch.where(chosen & (other[:, 3:] > 0), other, batch)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def seed_dice(seed: int, device: torch.device) -> None:
    """Seeds what this process draws from. torch.manual_seed does so too, after all that other devices draw from."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def groups(batches: Iterator[Tensor], size: int) -> Iterator[list[Tensor]]:
    """So many batches at a time; the last group may be smaller."""
    return iter(lambda: list(islice(batches, size)), [])


def split(batches: list[Tensor], parts: int, batch_size: int) -> list[Tensor]:
    """The same photos in smaller batches: a full one as evenly as can be into `parts`, a shorter one into fewer."""
    batches = [batch for batch in batches if len(batch)]  # all photos of one may have been left out
    return [part for batch in batches for part in batch.tensor_split(-(-len(batch) * parts // batch_size))]


def find_parts(
    model: nn.Module, batch_size: int, image_size: int, device: torch.device, dtype: torch.dtype | None
) -> int:
    """Into how many parts a batch must be split for the device's memory: the same number on all processes.

    It is tried on black photos before the training, with the model not yet wrapped for several processes: those would
    wait for one that fails half-way. The model is left as it was, BatchNorm's averages included.

    Raises:
        LaunchError: not even one photo fits; on all processes together.
    """
    before = [buffer.clone() for buffer in model.buffers()]
    parts, most = 1, batch_size + 1  # the most stands for none that fits
    while parts < most and not fits(model, -(-batch_size // parts), image_size, device, dtype):
        recover(device)
        parts = most if parts == batch_size else min(2 * parts, batch_size)
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    torch.cuda.empty_cache()
    (parts,) = largest_of_each([parts])
    if parts == most:
        raise LaunchError(f"the free memory of {device} does not hold the training of a single photo of {image_size} "
                          "pixels: choose a smaller --image-size or --encoder, or another GPU")  # fmt: skip
    return parts


def fits(model: nn.Module, photos: int, image_size: int, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether a forward and a backward pass with so many photos have room beside the rest of a training.

    Raises:
        RuntimeError: not of the memory, or with a single photo perhaps not of it: by fewer nothing can be learnt.
    """
    try:
        # Adam's two moments, the average, and the gradients of the parts before.
        rest = [torch.empty_like(weights) for weights in model.parameters() for _ in range(4)]
        if dist.is_initialized():
            rest.append(torch.empty(NCCL_ROOM, dtype=torch.uint8, device=device))
        images, target = to_device(torch.zeros(photos, 4, image_size, image_size, dtype=torch.uint8), device)
        with autocast(device, dtype):
            raw = model(images)
        LossCalculator(contour_weight=1.0)(raw, target)[0].backward()  # with all terms that there may be
    except RuntimeError as error:
        if not (lacks_memory(error) or (photos > 1 and HALF_SAID.search(str(error)))):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True


def recover(device: torch.device) -> None:
    """Frees what a failed pass has let go of by now.

    Raises:
        RuntimeError: a GPU does not recover from what has happened (an access to a wrong address, say): every call
            fails from then on, and this one says what it was.
    """
    torch.cuda.empty_cache()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- several processes ------------------------------------------------------------------------------------


def gradients_shared(model: nn.Module, now: bool) -> AbstractContextManager:
    """Several processes average their gradients in a step's last backward pass, not in those that only add to them."""
    return nullcontext() if now or not hasattr(model, "no_sync") else model.no_sync()


def share_buffers(*models: nn.Module) -> None:
    """Gives every process the main one's BatchNorm averages: those that are saved are those that are measured."""
    if dist.is_initialized():
        for buffer in dict.fromkeys(buffer for model in models for buffer in model.buffers()):
            dist.broadcast(buffer, src=0)


def needs_sync_batchnorm(processes: Processes, photos: int, image_size: int) -> bool:
    """Whether so many photos at once in a process give BatchNorm too few values for the statistics of a channel.

    The deepest features have the fewest. PyTorch can share the statistics on GPUs only, and waits for the GPU three
    times a layer to do it.
    """
    values = photos * math.ceil(image_size / SMALLEST_INPUT) ** 2
    return processes.device.type == "cuda" and processes.world_size > 1 and values < FEW_VALUES


# --- an epoch's figures -----------------------------------------------------------------------------------


class LossMeter:
    """The mean of the loss and its terms over images, added up on the device.

    Args:
        terms: their names, known before the first batch: a process that got no image takes part as well.
    """

    def __init__(self, terms: list[str], device: torch.device | str = "cpu"):
        self.names = ("loss", *terms)
        self.sums = empty_sums(len(self.names) + 1, device)  # the losses, then the images

    def update(self, loss: Tensor, terms: dict[str, Tensor], images: int) -> None:
        """Counts a batch's means, scalars, as those of so many images."""
        means = torch.stack([loss.detach(), *(terms[name] for name in self.names[1:]), torch.ones_like(loss)])
        usable = torch.isfinite(means).all()  # a step that is skipped must not spoil the epoch's mean
        self.sums += torch.where(usable, means.detach() * images, 0)

    def synchronize(self) -> None:
        """Adds up over all processes; call it once, before `compute`."""
        sum_over_processes(self.sums)

    def compute(self) -> dict[str, float]:
        *sums, images = self.sums.tolist()
        return {name: total / images if images else 0.0 for name, total in zip(self.names, sums, strict=True)}


OLDER_TERMS = ("loss", "colour", "bce", "dice")  # of a checkpoint that does not name them


class Tally:
    """An epoch's figures so far: the loss and its terms, the metrics."""

    def __init__(self, criterion: LossCalculator, device: torch.device | str = "cpu"):
        self.losses, self.metrics = LossMeter([*criterion.weights], device), SegmentationMetrics(device)

    def update(self, loss: Tensor, terms: dict[str, Tensor], raw: Tensor, target: Tensor) -> None:
        """Counts a batch's loss, and alpha of its logits `raw` against `target`, both (N, 4, H, W)."""
        self.losses.update(loss, terms, len(target))
        self.metrics.update(raw.detach()[:, 3] > 0, target[:, 3] > 0.5)  # a logit above 0: a probability above one half

    def compute(self) -> dict[str, float]:
        """The figures over all processes: "loss", "colour_loss" and so on, and those of `SegmentationMetrics`."""
        whole = deepcopy(self)  # this one stays this process's own
        whole.losses.synchronize()
        whole.metrics.synchronize()
        terms = whole.losses.compute()
        losses = {name if name == "loss" else f"{name}_loss": value for name, value in terms.items()}
        return losses | whole.metrics.compute()

    def state(self) -> dict[str, Tensor | list[str]]:
        """This process's sums and the names of its losses, for a checkpoint."""
        return {"losses": self.losses.sums.cpu(), "names": [*self.losses.names], "metrics": self.metrics.sums.cpu()}

    def add(self, state: dict[str, Tensor | list[str]]) -> None:
        """Adds what a checkpoint holds."""
        *sums, images = state["losses"].to(self.losses.sums.device)
        found = dict(zip(state.get("names", OLDER_TERMS), sums, strict=True))  # a weight of 0 may come or go
        self.losses.sums += torch.stack([*(found.get(name, 0 * images) for name in self.losses.names), images])
        self.metrics.sums += state["metrics"].to(self.metrics.sums.device)


# --- numbers that break -----------------------------------------------------------------------------------


class FiniteGuard:
    """Lets the optimiser skip a step whose loss or gradient is not finite, on all processes alike.

    What is skipped is decided on the device. The counts are fetched from a GPU only when they are asked for.
    BatchNorm's averages are those of before such a step as well. float16's own skips, by which its scale is found,
    are no broken steps: there only the losses count, for as long as there is a scale above 1 that can be lowered.

    Args:
        model: whose steps these are, not wrapped for several processes.
        device: that it lies on.
        skipped, in_a_row: steps that were skipped before, in all and up to now without one that was not.

    Attributes:
        skipped, in_a_row, most_in_a_row: these and the longest row of them, wherever it ended; when last fetched.
    """

    def __init__(self, model: nn.Module, device: torch.device, skipped: int = 0, in_a_row: int = 0):
        self._counts, self._losses = torch.tensor([skipped, in_a_row, in_a_row], device=device), []
        self.skipped, self.in_a_row, self.most_in_a_row = skipped, in_a_row, in_a_row
        self._averages = [b for name, b in model.named_buffers() if name.rpartition(".")[2].startswith("running_")]
        # One behind the other: a GPU is started once for all of them, and not for each.
        self._before, self._after = (torch.cat(self._averages) if self._averages else None for _ in range(2))
        self._lengths = [len(average) for average in self._averages]

    def begin_step(self) -> None:
        """Before the forward pass."""
        self._losses = []
        if self._averages:
            torch.cat(self._averages, out=self._before)

    def add_loss(self, loss: Tensor) -> None:
        """Of each batch and part that the step is made of."""
        self._losses.append(loss.detach())

    def step(self, optimizer: Adam, scaler: torch.amp.GradScaler, norm: Tensor) -> None:
        """The optimiser's step, if the losses and the gradient's `norm` are finite."""
        excused = scaler.scale(torch.ones_like(norm)) > 1  # its scale, which no GPU has to be waited for; 1 for none
        finite = torch.isfinite(torch.stack(self._losses)).all() & (torch.isfinite(norm) | excused)
        found = (~finite).float()
        largest_over_processes(found)  # each has a loss of its own
        with self._skipped_where(found, optimizer):
            scaler.step(optimizer)
        scaler.update()
        broken = found.bool()
        if self._averages:
            torch.where(broken, self._before, torch.cat(self._averages), out=self._after)
            torch._foreach_copy_(self._averages, self._after.split(self._lengths))
        self._counts[:2] += broken
        self._counts[1] *= broken
        self._counts[2] = self._counts[1:].max()

    @staticmethod
    @contextmanager
    def _skipped_where(found: Tensor, optimizer: Adam) -> Iterator[None]:
        """A fused optimiser does nothing where `found_inf` is 1, which a scaler sets just before the step."""

        def add(optimizer: Adam, *_: object) -> None:
            by_scaler = optimizer.found_inf
            optimizer.found_inf = found if by_scaler is None else torch.maximum(found, by_scaler)

        optimizer.grad_scale = optimizer.found_inf = None  # a scaler that is not enabled sets neither
        hook = optimizer.register_step_pre_hook(add)
        try:
            yield
        finally:
            hook.remove()

    def fetch(self) -> None:
        """Brings the counts up to date; waits for the device."""
        self.skipped, self.in_a_row, self.most_in_a_row = self._counts.tolist()
