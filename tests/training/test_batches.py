"""From a batch to the model's input, the precision, micro-batches that fit a memory, what DDP exchanges."""

from __future__ import annotations

import contextlib
import copy
import itertools
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from tiny_runs import same
from torch import Tensor, nn

from training import batches
from training.batches import find_micro_batches, split_micro_batches
from utils import LaunchError, Processes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_copy_paste_pastes_persons_of_the_preceding_sample():
    batch = torch.randint(0, 256, (400, 4, 6, 5), dtype=torch.uint8)
    batch[:, 3] = torch.randint(0, 2, (400, 6, 5)) * 255
    changed = 0
    for number, (before, after) in enumerate(zip(batch, batches.copy_paste(batch, 0.5), strict=True)):
        expected = torch.where(batch[number - 1, 3] == 255, batch[number - 1], before)
        assert after.equal(before) or after.equal(expected)
        changed += after.equal(expected)
    assert 150 < changed < 250
    assert batches.copy_paste(batch, 0) is batch
    assert batches.copy_paste(batch[:1], 1).equal(batch[:1])


def test_rng_is_seeded_by_all_numbers_in_order_and_on_no_other_device(monkeypatch):
    def drawn(*numbers: int) -> float:
        batches.seed_rng(CPU, *numbers)
        return torch.rand(1, dtype=torch.float64).item()

    gpu, triples = Mock(), list(itertools.product(range(4), repeat=3))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("every GPU is seeded"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    assert len({drawn(*triple) for triple in triples}) == len(triples)
    gpu.manual_seed.assert_not_called()
    batches.seed_rng(CUDA, 7)
    gpu.manual_seed.assert_called_once()


@pytest.mark.parametrize(
    ("device", "precision", "native", "dtype"),
    [(CUDA, "auto", True, torch.bfloat16), (CUDA, "auto", False, torch.float16), (CUDA, "float32", True, None),
     (CPU, "auto", True, None), (CPU, "bfloat16", True, torch.bfloat16), (torch.device("mps"), "auto", False, None),
     (CUDA, "bfloat16", False, LaunchError)],  # it would be emulated
)  # fmt: skip
def test_precision_is_what_was_asked_for_and_the_device_has(device, precision, native, dtype, monkeypatch):
    monkeypatch.setattr(batches, "has_bfloat16", lambda _: native)
    refused = pytest.raises(LaunchError, match=f"--precision bfloat16: {device}")
    with refused if dtype is LaunchError else contextlib.nullcontext():
        assert batches.autocast_dtype(device, precision) == dtype


@pytest.mark.parametrize(("flags", "has_it"), [("fma avx512_bf16", True), ("bf16 i8mm", True), ("avx512f", False)])
def test_a_device_says_whether_it_has_bfloat16(flags, has_it, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_: f"flags : {flags}\n")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_it)
    assert batches.has_bfloat16(CPU) is batches.has_bfloat16(CUDA) is has_it


@pytest.mark.parametrize(("photos", "count", "sizes"), [(8, 3, [3, 3, 2]), (5, 4, [2, 2, 1]), (2, 4, [2])])
def test_micro_batches_are_even_and_a_short_batch_has_fewer(photos, count, sizes):
    batch = torch.arange(photos)
    split = split_micro_batches([batch, batch[:0], batch], count, batch_size=8)
    assert list(map(len, split)) == 2 * sizes
    assert torch.equal(torch.cat(split), torch.cat([batch, batch]))


# What PyTorch makes of the answers of CUDA, cuBLAS, cuDNN and NCCL: those that name the memory, those that may mean it.
NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    dist.DistBackendError("NCCL error in: NCCLUtils.cpp:94\nLast error:\nCuda failure 2 'out of memory'"),
]  # fmt: skip
MAYBE_NO_MEMORY = [
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
]
ILLEGAL = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


class Cramped(nn.Conv2d):
    """A model on a device that holds so many photos in the backward pass: the forward one has left its traces then."""

    def __init__(self, room: int, error: Exception = NO_MEMORY[0]):
        super().__init__(3, 4, 1)
        self.norm, self.room, self.error, self.passes = nn.BatchNorm2d(3), room, error, 0

    def forward(self, images: Tensor) -> Tensor:
        raw = super().forward(self.norm(images + 1))
        raw.register_hook(lambda gradient: self.fill(len(gradient)))
        return raw

    def fill(self, photos: int) -> None:
        self.passes += 1
        if photos > self.room:
            raise self.error


@pytest.mark.parametrize(("room", "count"), [(10, 1), (9, 2), (5, 2), (3, 4), (1, 10)])
def test_a_batch_is_halved_until_it_fits_and_the_model_stays(room, count):
    model = Cramped(room)
    before = copy.deepcopy(model.state_dict())
    assert find_micro_batches(model, 10, 32, CPU, None) == count
    assert same(model.state_dict(), before)
    assert all(weights.grad is None for weights in model.parameters())
    assert max(map(len, split_micro_batches([torch.zeros(10), torch.zeros(3)], count, 10))) <= room


def test_processes_agree_on_the_number_of_micro_batches(monkeypatch):
    monkeypatch.setattr(batches, "all_reduce_max", lambda numbers: [8] if numbers in ([1], [2]) else numbers)
    assert find_micro_batches(Cramped(4), 8, 32, CPU, None) == 8
    with pytest.raises(LaunchError, match="--image-size"):  # another one has no room for a single photo
        find_micro_batches(Cramped(7), 7, 32, CPU, None)


@pytest.mark.parametrize("error", [*NO_MEMORY, *MAYBE_NO_MEMORY], ids=str)
def test_a_full_gpu_is_known_by_the_words_of_every_library(error):
    assert find_micro_batches(Cramped(2, error), 8, 32, CPU, None) == 4
    with pytest.raises(LaunchError if error in NO_MEMORY else RuntimeError) as caught:
        find_micro_batches(Cramped(0, error), 4, 64, CPU, None)
    assert caught.value is error or "single photo of 64 pixels" in str(caught.value)


def test_an_error_of_another_kind_or_that_the_gpu_does_not_recover_from_is_raised(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", Mock(side_effect=ILLEGAL))
    monkeypatch.setattr(torch, "zeros", lambda *size, real=torch.zeros, **kind: real(*size, **kind | {"device": CPU}))
    monkeypatch.setattr(batches, "autocast", lambda *_: contextlib.nullcontext())
    for device, error in ((CPU, ILLEGAL), (CUDA, RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"))):
        model = Cramped(2, error)
        with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
            find_micro_batches(model, 8, 32, device, None)
        assert model.passes == 1


def test_memory_is_kept_for_nccl_beside_other_processes(monkeypatch):
    monkeypatch.setattr(torch, "empty", empty := Mock(wraps=torch.empty))
    for several in (False, True):
        monkeypatch.setattr(dist, "is_initialized", lambda several=several: several)
        assert batches.try_step(Cramped(4), 4, 32, CPU, None)
        assert any(call.args == (batches.NCCL_RESERVE,) for call in empty.mock_calls) is several


@pytest.mark.parametrize(
    ("device", "world_size", "photos", "size", "needed"),
    [("cuda", 2, 15, 224, True), ("cuda", 2, 16, 224, False), ("cuda", 1, 4, 384, False), ("cpu", 2, 4, 384, False),
     ("cuda", 2, 87, 70, True), ("cuda", 2, 88, 70, False)],  # of a side that is no multiple of 32
)  # fmt: skip
def test_small_batches_of_gpus_need_a_common_batchnorm(device, world_size, photos, size, needed):
    processes = Processes(torch.device(device), world_size=world_size)
    assert batches.needs_sync_batchnorm(processes, photos, size) is needed
