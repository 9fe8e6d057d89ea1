"""From a batch of uint8 RGBA samples to the model's input and target, and how it is split to fit a GPU's memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import MIN_IMAGE_SIZE
from utils import LaunchError, LossCalculator, Processes, all_reduce_max, is_out_of_memory


def copy_paste(batch: Tensor, fraction: float) -> Tensor:
    """Pastes persons of the preceding sample in the batch onto a fraction of the samples, drawn by torch's RNG.

    The batch is uint8 RGBA (N, 4, S, S). This yields new combinations of persons and backgrounds, of which a small data
    set has few (Ghiasi et al. 2021, "Simple Copy-Paste").
    """
    if not fraction:
        return batch
    chosen = torch.rand(len(batch), 1, 1, 1, device=batch.device) < fraction
    other = batch.roll(1, dims=0)
    return torch.where(chosen & (other[:, 3:] > 0), other, batch)


def to_model_input(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the input (N, 3, S, S) and the target (N, 4, S, S) of uint8 RGBA (N, 4, S, S): float32 in [0, 1]."""
    target = batch.float().div_(255)
    return target[:, :3].contiguous(memory_format=torch.channels_last), target


def seed_rng(device: torch.device, *numbers: int) -> None:
    """Seeds the CPU's and the device's global RNG by several numbers: (seed 1, epoch 2) is not (seed 2, epoch 1)."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    torch.default_generator.manual_seed(seed)  # torch.manual_seed, for all devices, takes a hundred times as long
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def autocast_dtype(device: torch.device, precision: str) -> torch.dtype | None:
    """Returns the dtype of mixed precision, or None for float32, which "auto" is on all devices but CUDA's."""
    native = has_bfloat16(device)
    if precision == "bfloat16" and not native:
        raise LaunchError(f"--precision bfloat16: {device} has no instructions for it and would get slower")
    if precision == "float32" or (precision == "auto" and device.type != "cuda"):
        return None
    return torch.bfloat16 if native else torch.float16


def has_bfloat16(device: torch.device) -> bool:
    """Returns whether a device computes in bfloat16; a CPU by AVX-512 or AMX on a PC, by "bf16" on ARM."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return False
    return device.type == "cpu" and re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags) is not None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Returns the context in which a model is run in mixed precision; None is float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def group_batches(batches: Iterator[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Yields groups of `size` batches, one per optimiser step; the last group may be smaller."""
    return iter(lambda: list(islice(batches, size)), [])


def split_micro_batches(batches: list[Tensor], micro_batches: int, batch_size: int) -> list[Tensor]:
    """Splits batches into micro-batches: a full one evenly into `micro_batches`, a shorter one into fewer."""
    batches = [batch for batch in batches if len(batch)]  # all photos of one may have been left out
    return [micro for batch in batches for micro in batch.tensor_split(-(-len(batch) * micro_batches // batch_size))]


NCCL_RESERVE = 512 * 2**20  # bytes: what NCCL allocates once the processes have begun to exchange gradients
# What cuBLAS and cuDNN say where their handles, kernels or workspaces do not fit; it may mean something else as well.
MAYBE_OOM = re.compile("CUBLAS_STATUS|CUDNN_STATUS|cuDNN Frontend error|unable to find an engine|valid cuDNN algorithm")


def find_micro_batches(
    model: nn.Module, batch_size: int, image_size: int, device: torch.device, dtype: torch.dtype | None
) -> int:
    """Returns into how many micro-batches a batch must be split to fit the GPU's memory: the same on all processes.

    It tries with black photos, and leaves the model as it was, BatchNorm's statistics included. The model must not be
    wrapped by DDP yet, whose other processes would wait for one that fails half-way.
    """
    before = [buffer.clone() for buffer in model.buffers()]
    count, none_fits = 1, batch_size + 1
    while count < none_fits and not try_step(model, -(-batch_size // count), image_size, device, dtype):
        torch.cuda.empty_cache()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # it raises if the GPU cannot recover: from a wrong address, say
        count = none_fits if count == batch_size else min(2 * count, batch_size)
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    torch.cuda.empty_cache()
    (count,) = all_reduce_max([count])
    if count == none_fits:
        raise LaunchError(f"the free memory of {device} does not hold the training of a single photo of {image_size} "
                          "pixels: choose a smaller --image-size or --encoder, or another GPU")  # fmt: skip
    return count


def try_step(model: nn.Module, photos: int, image_size: int, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Returns whether forward and backward passes of this many photos fit in memory, with the rest of a training."""
    try:
        # An optimiser's two moments, the EMA, and the gradients of the micro-batches before.
        rest = [torch.empty_like(weights) for weights in model.parameters() for _ in range(4)]
        if dist.is_initialized():
            rest.append(torch.empty(NCCL_RESERVE, dtype=torch.uint8, device=device))
        batch = torch.zeros(photos, 4, image_size, image_size, dtype=torch.uint8, device=device)
        images, target = to_model_input(batch)
        with autocast(device, dtype):
            raw = model(images)
        LossCalculator()(raw, target)[0].backward()
    except RuntimeError as error:
        if not (is_out_of_memory(error) or (photos > 1 and MAYBE_OOM.search(str(error)))):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True


def sync_gradients(model: Any, is_last: bool) -> AbstractContextManager:
    """Returns the context of a backward pass: DDP averages gradients in a step's last one, not in those before it."""
    return nullcontext() if is_last or not hasattr(model, "no_sync") else model.no_sync()


def broadcast_buffers(*models: nn.Module) -> None:
    """Gives every process rank 0's BatchNorm statistics: those that are saved are those that are validated."""
    if dist.is_initialized():
        for buffer in dict.fromkeys(buffer for model in models for buffer in model.buffers()):
            dist.broadcast(buffer, src=0)


# Values per channel, those of 16 photos at 224 pixels: with more BatchNorm learns no better (Wu and He 2018, "Group
# Normalization", figure 1).
MIN_BN_VALUES = 16 * 7 * 7
MIN_BN_PHOTOS = 16  # with fewer the statistics of a batch are worse than those that a pretrained encoder brings along


def needs_sync_batchnorm(processes: Processes, photos: int, image_size: int) -> bool:
    """Returns whether this number of photos per process gives BatchNorm too few values for a channel's statistics.

    The deepest features have the fewest. SyncBatchNorm exists on GPUs only, and waits for them three times a layer.
    """
    values = photos * math.ceil(image_size / MIN_IMAGE_SIZE) ** 2
    return processes.device.type == "cuda" and processes.world_size > 1 and values < MIN_BN_VALUES
