"""The loss by hand, the metrics against torchmetrics, and processes as they are really started."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import stat
import time
import weakref
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import utils
from models import UNetAutoencoder
from training import launching, step
from training.step import LossMeter
from utils import LaunchError, LossCalculator, Processes, SegmentationMetrics, near_contour, pick_device

CPU = torch.device("cpu")
EACH = utils.EACH_ITS_GPU


# --- loss -------------------------------------------------------------------------------------------------


def pictures() -> tuple[Tensor, Tensor]:
    """Logits and targets (4, 4, 16, 16) of persons of different sizes; nobody is in the second."""
    raw, target = torch.randn(2, 4, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    return raw, torch.cat([target[:, :3].sigmoid(), target[:, 3:] > torch.tensor([1, 9, 0, -1]).view(4, 1, 1, 1)], 1)


def test_the_terms_are_those_worked_by_hand():
    # Two pixels: the left one a person of colour (1/2, 1/4, 3/4), guessed grey; the alphas guessed 1/2 and 3/4.
    target = torch.tensor([[0.5, 0.9], [0.25, 0.9], [0.75, 0.9], [1, 0]]).view(1, 4, 1, 2)
    raw = torch.tensor([[0, 5], [0, 5], [0, 5], [0, math.log(3)]]).view(1, 4, 1, 2)
    _, terms = LossCalculator()(raw, target)
    assert terms["colour"].item() == pytest.approx((0 + 0.25 + 0.25) / 3)
    assert terms["bce"].item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert terms["dice"].item() == pytest.approx(1 - (2 * 0.5 + 1) / (0.5 + 0.75 + 1 + 1))


def test_the_loss_is_the_weighted_sum_of_three_terms_that_are_detached():
    raw, target = pictures()
    loss, terms = LossCalculator(2, 3, 5)(raw.requires_grad_(), target)
    colour, bce, dice = (terms[name].item() for name in ("colour", "bce", "dice"))
    assert loss.item() == pytest.approx(2 * colour + 3 * bce + 5 * dice)
    assert [value.requires_grad for value in (loss, *terms.values())] == [True, False, False, False]


def test_colours_outside_the_mask_do_not_count():
    raw, target = pictures()
    loss, terms = LossCalculator()(raw.requires_grad_(), target)
    loss.backward()
    outside = (target[:, 3:] == 0).expand(-1, 3, -1, -1)
    assert torch.equal(raw.grad[:, :3] == 0, outside)
    target[:, :3][outside] = 0.123
    assert LossCalculator()(raw, target)[1]["colour"] == terms["colour"]


def test_a_perfect_prediction_costs_next_to_nothing():
    _, target = pictures()
    assert 0 <= LossCalculator()(torch.logit(target, eps=1e-6), target)[0] < 1e-3


@pytest.mark.parametrize("split", [1, 2, 3])
def test_a_batch_costs_the_mean_of_its_parts(split):
    raw, target = pictures()
    parts = [LossCalculator()(raw[part], target[part]) for part in (slice(4), slice(split), slice(split, 4))]
    whole, first, rest = (np.array([loss, *terms.values()]) for loss, terms in parts)
    np.testing.assert_allclose(whole, (split * first + (4 - split) * rest) / 4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_many_pixels_cost_what_float32_does(dtype):
    raw, target = torch.zeros(1, 4, 512, 512, dtype=dtype), torch.ones(1, 4, 512, 512, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss, terms = LossCalculator()(raw, target)  # 512² pixels overflow float16
    assert {value.dtype for value in (loss, *terms.values())} == {torch.float32}
    assert [term.item() for term in terms.values()] == pytest.approx([0.5, math.log(2), 1 / 3], abs=1e-5)


@pytest.mark.parametrize("logit", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_extreme_logits_and_empty_masks_have_their_loss_and_a_finite_gradient(logit, mask):
    raw = torch.full((2, 4, 8, 8), logit, requires_grad=True)
    loss, terms = LossCalculator()(raw, torch.full((2, 4, 8, 8), mask))
    loss.backward()
    assert terms["bce"].item() == pytest.approx(np.logaddexp(0, logit) - logit * mask)
    assert raw.grad.isfinite().all()
    assert mask or terms["colour"] == 0


# --- metrics ----------------------------------------------------------------------------------------------


def guesses() -> tuple[Tensor, Tensor]:
    """Probabilities and masks (6, 20, 30), the persons larger and the guesses better from one to the next."""
    mask, noise = torch.rand(2, 6, 20, 30, generator=torch.Generator().manual_seed(7))
    mask = (mask < torch.linspace(0.1, 0.8, 6).view(6, 1, 1)).float()
    return (mask - noise * torch.linspace(1, 0.6, 6).view(6, 1, 1)).abs(), mask


def measured(*batches: tuple[Tensor, Tensor]) -> dict[str, float]:
    metrics = SegmentationMetrics()
    for alpha, mask in batches:
        metrics.update(alpha, mask)
    return metrics.compute()


@pytest.mark.parametrize("kind", [torch.Tensor.float, torch.Tensor.bfloat16, lambda values: values > 0.5])
def test_metrics_over_batches_are_torchmetrics(kind):
    from torchmetrics.functional import classification as reference  # slow to import, and not for the processes below

    alpha, mask = (kind(values) for values in guesses())
    guess, truth = (alpha > 0.5).int(), mask.int()
    expected = {
        "iou": np.mean([reference.binary_jaccard_index(*pair).item() for pair in zip(guess, truth, strict=True)]),
        "dice": np.mean([reference.binary_f1_score(*pair).item() for pair in zip(guess, truth, strict=True)]),
        "global_iou": reference.binary_jaccard_index(guess, truth).item(),
        "global_dice": reference.binary_f1_score(guess, truth).item(),
        "precision": reference.binary_precision(guess, truth).item(),
        "recall": reference.binary_recall(guess, truth).item(),
        "images": 6,
    }
    assert len({round(value, 2) for value in expected.values()}) == 7  # or two could be exchanged unseen
    assert measured((alpha[:4], mask[:4]), (alpha[4:], mask[4:])) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("alpha", "mask", "score"), [(0, 0, 1.0), (1, 0, 0.0), (0, 1, 0.0), (1, 1, 1.0)])
def test_two_empty_masks_agree_and_one_does_not(alpha, mask, score):
    figures = measured((torch.full((1, 4, 4), float(alpha)), torch.full((1, 4, 4), float(mask))))
    assert (figures["iou"], figures["dice"], figures["global_iou"]) == (score, score, score)


def test_the_threshold_is_a_probability_above_one_half():
    figures = measured((torch.tensor([[[0.4, 0.5, 0.6, 0.6]]]), torch.tensor([[[1.0, 1.0, 1.0, 0.0]]])))
    assert (figures["iou"], figures["dice"], figures["precision"], figures["recall"]) == (1 / 4, 2 / 5, 1 / 2, 1 / 3)


def test_counts_beyond_2_to_the_24_are_exact():
    everyone, one = torch.ones(1, 4096, 4097, dtype=torch.bool), torch.ones(1, 1, 1, dtype=torch.bool)
    figures = measured((everyone, everyone), (one, one), (one, ~one))
    assert figures["precision"] == figures["global_iou"] == 16781313 / 16781314


def test_computing_changes_nothing_and_no_images_are_no_error():
    metrics = SegmentationMetrics()
    assert all(math.isfinite(value) for value in metrics.compute().values())
    metrics.update(*guesses())
    metrics.synchronize()  # alone
    assert metrics.compute() == metrics.compute() == measured(guesses())


def test_counting_does_not_wait_for_the_device():
    with torch.device("meta"):  # where nothing has a value: to ask for one, as `.item()` or an `if` does, raises
        SegmentationMetrics("meta").update(torch.rand(2, 8, 8), torch.rand(2, 8, 8))
        LossMeter(TERMS, "meta").update(*spent(1.0), images=2)


def test_the_contour_is_what_opencv_finds_within_two_percent_of_the_width():
    mask = np.zeros((100, 100), np.uint8)
    cv2.circle(mask, (40, 50), 20, 1, -1)
    mask[60:, 90:] = 1  # it reaches over the rim, where there is no contour
    square = np.ones((5, 5), np.uint8)
    expected = cv2.dilate(mask, square) - cv2.erode(mask, square)
    found = near_contour(torch.from_numpy(mask)[None].float())[0]
    assert np.array_equal(found.numpy(), expected)
    assert (found[70, 99], found[70, 90]) == (0, 1)


def test_the_contour_counts_as_a_term_of_its_own_where_it_is_wanted():
    raw, target = torch.randn(2, 4, 60, 60), (torch.rand(2, 4, 60, 60) > 0.5).float()
    target[:, 3] = 0
    target[:, 3, 20:40, 20:40] = 1
    plain, terms = LossCalculator()(raw, target)
    weighted, more = LossCalculator(contour_weight=3.0)(raw, target)
    assert "contour" not in terms
    band = torch.zeros(60, 60)
    band[19:41, 19:41] = 1
    band[21:39, 21:39] = 0
    by_hand = (torch.nn.functional.softplus(raw[:, 3]) - raw[:, 3] * target[:, 3]) * band
    assert more["contour"].item() == pytest.approx(by_hand.mean().item(), rel=1e-5)
    assert weighted.item() == pytest.approx(plain.item() + 3 * by_hand.mean().item(), rel=1e-5)


TERMS = ("colour", "bce", "dice")


def spent(loss: float) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.tensor(loss), {name: torch.tensor(loss + n) for n, name in enumerate(TERMS, 1)}


def test_the_loss_is_a_mean_over_images_not_batches():
    meter = LossMeter(TERMS)
    meter.update(*spent(2.0), images=1)
    meter.update(*spent(6.0), images=3)
    assert meter.compute() == {"loss": 5.0, "colour": 6.0, "bce": 7.0, "dice": 8.0}


def one_of_two(rank: int, folder: Path) -> None:
    """What each of two processes does; what comes of it goes into files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", timedelta(seconds=60), rank=rank, world_size=2)
    with launching.one_process_first(Processes(CPU, rank=rank, local_rank=rank, world_size=2)):
        time.sleep(0.5 if rank == 0 else 0)  # the other one is quicker, unless it waits
        (folder / f"place{rank}").write_text(str(len(list(folder.glob("place*")))))
    norm, metrics, meter, idle = nn.BatchNorm2d(3), SegmentationMetrics(), LossMeter(TERMS), LossMeter(TERMS)
    norm.running_mean.fill_(rank + 1)
    norm.num_batches_tracked.fill_(rank + 5)
    step.share_buffers(norm)
    metrics.update(*(values[(slice(4), slice(4, 6))[rank]] for values in guesses()))
    meter.update(*spent([2.0, 5.0][rank]), images=[4, 2][rank])
    metrics.synchronize()
    meter.synchronize()
    torch.save([norm.state_dict(), metrics.compute(), meter.compute(), utils.from_main(rank)], folder / f"{rank}.pt")
    torch.save([three_passes(rank), parts_in([4, 1][rank]), parts_in([0, 4][rank])], folder / f"steps{rank}.pt")
    start = time.monotonic()
    time.sleep(2 if rank == 0 else 0)
    answer = utils.ask_largest([rank, 5 - rank])
    asking = time.monotonic() - start
    torch.save([asking, answer(), time.monotonic() - start], folder / f"asked{rank}.pt")
    if rank == 0:
        idle.update(*spent(3.0), images=1)  # one image for two processes
    idle.synchronize()
    (folder / f"idle{rank}").write_text(str(idle.compute()["loss"]))
    dist.destroy_process_group()
    dist.init_process_group("gloo", f"file://{folder}/again", timedelta(seconds=5), rank=rank, world_size=2)
    with launching.one_process_first(Processes(CPU, rank=rank, local_rank=rank, world_size=2)):
        time.sleep(7 if rank == 0 else 0)  # longer than at a step
    (folder / f"patient{rank}").touch()


def three_passes(rank: int) -> tuple[Tensor, list[int]]:
    """The gradient of w * x summed up over passes with x = 1, 2, 4, or ten times that; and how often it was shared."""
    model, shared = DistributedDataParallel(nn.Linear(1, 1, bias=False), gradient_as_bucket_view=True), []

    def share(_, bucket):  # PyTorch takes no annotations that are texts
        shared.append(len(bucket.gradients()))
        return default_hooks.allreduce_hook(None, bucket)

    model.register_comm_hook(None, share)
    for number, x in enumerate((1.0, 2.0, 4.0)):
        with step.gradients_shared(model, now=number == 2):
            model(torch.full((1, 1), x * 10**rank)).sum().backward()
    return model.module.weight.grad.clone(), shared


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")


class Cramped(nn.Conv2d):
    """A device whose memory holds so many photos, in the backward pass: the forward one has already left its traces."""

    def __init__(self, room: int, error: Exception = OUT_OF_MEMORY):
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


def parts_in(room: int) -> int | str:
    try:
        return step.find_parts(Cramped(room), 4, 32, CPU, None)
    except LaunchError as error:
        return str(error)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for process in torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2, join=False).processes:
        process.join(120)
    return folder


def test_metrics_of_uneven_shares_are_those_of_one_process(two):
    for rank in range(2):
        figures, alone = torch.load(two / f"{rank}.pt")[1], measured(guesses())
        assert figures == pytest.approx(alone, rel=1e-14)
        assert figures["global_iou"] == alone["global_iou"]


def test_losses_of_uneven_shares_are_weighted_by_images(two):
    assert [torch.load(two / f"{rank}.pt")[2]["dice"] for rank in range(2)] == [6.0, 6.0]


def test_a_process_without_images_does_not_hold_up_the_others(two):
    assert [(two / f"idle{rank}").read_text() for rank in range(2)] == ["3.0", "3.0"]


def test_the_main_process_goes_first_and_the_others_have_its_averages_and_its_word(two):
    for rank in range(2):
        assert (two / f"place{rank}").read_text() == str(rank)
        buffers, *_, word = torch.load(two / f"{rank}.pt")
        assert buffers["running_mean"].tolist() == [1, 1, 1]
        assert buffers["num_batches_tracked"] == 5
        assert word == 0


def test_the_others_wait_for_the_first_one_longer_than_at_a_step(two):
    assert all((two / f"patient{rank}").exists() for rank in range(2))


def test_who_asks_for_the_largest_waits_for_the_answer_only_when_it_is_wanted(two):
    (_, *first), (asking, *second) = (torch.load(two / f"asked{rank}.pt") for rank in range(2))
    assert first[0] == second[0] == [1, 5]
    assert asking < 1 < second[1]


def test_gradients_of_several_passes_are_shared_once(two):
    for rank in range(2):
        gradient, shared = torch.load(two / f"steps{rank}.pt")[0]
        assert gradient.item() == (7 + 70) / 2
        assert shared == [1]


def test_processes_agree_on_the_parts(two):
    steps = [torch.load(two / f"steps{rank}.pt") for rank in range(2)]
    assert [parts for _, parts, _ in steps] == [4, 4]
    assert all("--image-size" in error for _, _, error in steps)  # on the one that has room as well


# --- a batch in parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("room", "parts"), [(10, 1), (9, 2), (5, 2), (4, 4), (3, 4), (2, 8), (1, 10)])
def test_a_batch_is_halved_until_it_fits_and_the_model_is_left_alone(room, parts):
    model = Cramped(room)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert step.find_parts(model, 10, 32, CPU, None) == parts
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weights.grad is None for weights in model.parameters())
    largest = max(map(len, step.split([torch.zeros(10, 1), torch.zeros(3, 1)], parts, 10)))
    assert largest <= room


def test_where_not_one_photo_fits_the_user_is_told():
    assert "single photo of 32 pixels" in parts_in(0)
    with pytest.raises(RuntimeError, match="channels"):  # another mistake is none of memory
        step.find_parts(nn.Conv2d(5, 4, 1), 4, 32, CPU, None)


# What PyTorch makes of the answers of CUDA, cuBLAS, cuDNN and NCCL: those that name the memory, those that may mean it.
NO_MEMORY = [
    OUT_OF_MEMORY, torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in"),
    RuntimeError("CUDA driver error: out of memory"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    dist.DistBackendError("NCCL error in: NCCLUtils.cpp:94\nLast error:\nCuda failure 2 'out of memory'"),
]  # fmt: skip
PERHAPS_NO_MEMORY = [
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
]
NOT_OF_MEMORY = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    torch.AcceleratorError("CUDA error: unspecified launch failure"),
]


@pytest.mark.parametrize("error", [*NO_MEMORY, *PERHAPS_NO_MEMORY], ids=str)
def test_a_full_gpu_is_known_by_the_words_of_every_library(error):
    model = Cramped(2, error)
    assert step.find_parts(model, 8, 32, CPU, None) == 4
    assert model.passes == 3


@pytest.mark.parametrize("error", [*NO_MEMORY, *PERHAPS_NO_MEMORY], ids=str)
def test_where_a_single_photo_fails_only_what_names_the_memory_is_taken_for_it(error):
    with pytest.raises(LaunchError if error in NO_MEMORY else RuntimeError) as caught:
        step.find_parts(Cramped(0, error), 4, 64, CPU, None)
    assert caught.value is error or error in NO_MEMORY


@pytest.mark.parametrize("error", NOT_OF_MEMORY, ids=str)
def test_an_error_that_a_gpu_does_not_recover_from_is_not_tried_again(error):
    model = Cramped(2, error)
    with pytest.raises(torch.AcceleratorError) as caught:
        step.find_parts(model, 8, 32, CPU, None)
    assert caught.value is error
    assert model.passes == 1


def test_nor_is_one_that_a_library_tells_in_words_of_its_own(monkeypatch):
    model = Cramped(2, RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"))
    monkeypatch.setattr(torch.cuda, "synchronize", Mock(side_effect=NOT_OF_MEMORY[0]))
    monkeypatch.setattr(step, "to_device", lambda batch, _, real=step.to_device: real(batch, CPU))
    monkeypatch.setattr(step, "autocast", lambda *_: contextlib.nullcontext())
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        step.find_parts(model, 8, 32, torch.device("cuda:0"), None)
    assert model.passes == 1


@pytest.mark.parametrize("several", [False, True])
def test_beside_other_processes_room_is_left_for_nccl(several, monkeypatch):
    kept, alive, empty = [], [], torch.empty

    def remembered(*size: int, **kind: object) -> Tensor:
        made = empty(*size, **kind)
        kept.append(weakref.ref(made))
        return made

    monkeypatch.setattr(torch, "empty", remembered)
    monkeypatch.setattr(dist, "is_initialized", lambda: several)
    model = Cramped(4)
    monkeypatch.setattr(model, "fill", lambda _: alive.append(sum(it().nbytes for it in kept if it() is not None)))
    assert step.fits(model, 4, 32, CPU, None)
    assert alive == [step.NCCL_ROOM * several]
    assert not any(it() is not None for it in kept)


@pytest.mark.parametrize(("photos", "parts", "sizes"), [(8, 1, [8]), (8, 4, [2, 2, 2, 2]), (8, 3, [3, 3, 2]),
                                                        (5, 4, [2, 2, 1]), (2, 4, [2]), (8, 8, [1] * 8)])  # fmt: skip
def test_parts_are_even_and_a_short_batch_has_fewer(photos, parts, sizes):
    batch = torch.arange(photos)
    split = step.split([batch, batch], parts, batch_size=8)
    assert list(map(len, split)) == 2 * sizes
    assert torch.equal(torch.cat(split), torch.cat([batch, batch]))


def test_groups_take_everything_once():
    assert list(step.groups(iter("abcde"), 2)) == [["a", "b"], ["c", "d"], ["e"]]


@pytest.mark.parametrize(
    ("setting", "local_rank", "gpus", "has_mps", "name", "told"),
    [(EACH, 3, 4, False, "cuda:3", ""), (EACH, 0, 1, True, "cuda:0", ""), (EACH, 1, 0, False, "cpu", "CPU"),
     (EACH, 0, 0, True, "mps", "MPS"), ("cuda:1", 0, 2, False, "cuda:1", ""), ("cpu", 3, 4, True, "cpu", "")],
)  # fmt: skip
def test_the_device_is_the_one_asked_for_or_what_there_is(setting, local_rank, gpus, has_mps, name, told):
    picked, note = pick_device(setting, local_rank, gpus, has_mps)
    assert picked == name
    assert (told in note) if told else note == ""


@pytest.mark.parametrize(("setting", "gpus"), [(EACH, 4), ("cuda:1", 1), ("cuda", 0), ("mps", 4), ("gpu", 4), ("", 4)])
def test_a_device_that_is_not_there_is_refused(setting, gpus):
    with pytest.raises(LaunchError) as refusal:
        pick_device(setting, 4, gpus, has_mps=False)
    assert setting.format(local_rank=4) in str(refusal.value)


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_half_precision_is_the_one_that_the_gpu_itself_has(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert utils.autocast_dtype(torch.device("cuda"), wanted=True) == dtype
    assert utils.autocast_dtype(torch.device("cuda"), wanted=False) is None
    assert utils.autocast_dtype(CPU, wanted=True) is None


def test_bfloat16_on_a_cpu_is_for_those_who_ask_and_have_it(monkeypatch):
    monkeypatch.setattr(utils, "cpu_has_bfloat16", lambda: True)
    assert utils.autocast_dtype(CPU, wanted=False, on_cpu=True) == torch.bfloat16
    assert utils.autocast_dtype(torch.device("cuda"), wanted=False, on_cpu=True) is None
    monkeypatch.setattr(utils, "cpu_has_bfloat16", lambda: False)
    with pytest.raises(LaunchError, match="--bfloat16-on-cpu"):
        utils.autocast_dtype(CPU, wanted=True, on_cpu=True)
    assert utils.autocast_dtype(CPU, wanted=True) is None


@pytest.mark.parametrize(
    ("flags", "has_it"),
    [("fma avx512_bf16 sse2", True), ("amx_bf16 amx_tile", True), ("asimd bf16 i8mm", True), ("avx512f sse2", False)],
)
def test_a_cpu_says_whether_it_has_bfloat16(monkeypatch, flags, has_it):
    monkeypatch.setattr(Path, "read_text", lambda *_: f"flags : {flags}\n")
    assert utils.cpu_has_bfloat16() is has_it


@pytest.mark.parametrize(("device", "world_size", "needed"), [("cuda", 2, True), ("cuda", 1, False), ("cpu", 2, False)])
def test_batchnorm_is_shared_where_a_gpus_batch_is_small(device, world_size, needed):
    processes = Processes(torch.device(device), world_size=world_size)
    assert step.needs_sync_batchnorm(processes, 4, 384) is needed
    assert not step.needs_sync_batchnorm(processes, 32, 384)


@pytest.mark.parametrize(
    ("photos", "size", "values"),
    [(8, 384, 8 * 144), (5, 384, 5 * 144), (16, 224, 16 * 49), (15, 224, 15 * 49), (32, 128, 512), (1, 4096, 16384)],
)
def test_what_counts_for_batchnorm_are_the_values_of_the_deepest_features(photos, size, values):
    processes = Processes(torch.device("cuda"), world_size=2)
    assert step.needs_sync_batchnorm(processes, photos, size) is (values < 784)


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenet_v2"])
def test_the_deepest_features_are_those_of_a_32nd_of_the_side(encoder, monkeypatch):
    model, values = UNetAutoencoder(encoder, pretrained=False), []
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, inputs: values.append(inputs[0].numel() // inputs[0].shape[1]))
    model(torch.zeros(2, 3, 70, 70))
    processes = Processes(torch.device("cuda"), world_size=2)
    for few, needed in ((min(values), False), (min(values) + 1, True)):
        monkeypatch.setattr(step, "FEW_VALUES", few)
        assert step.needs_sync_batchnorm(processes, 2, 70) is needed


# --- the cores of a container -----------------------------------------------------------------------------

QUOTAS = {
    "no control groups": ({}, "", 8),
    "version 2, a container's own": ({"cpu.max": "250000 100000"}, "0::/\n", 2),
    "version 2, no limit": ({"cpu.max": "max 100000"}, "0::/\n", 8),
    "version 2, the group above": ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b\n", 3),
    "version 2, the strictest": ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "150000 100000"}, "0::/a/b\n", 1),
    "version 2, another's group": ({"a/cpu.max": "100000 100000"}, "0::/b\n", 8),
    "version 2, of a host": ({"cpu.max": "400000 100000"}, "0::/../../elsewhere\n", 4),
    "version 1, a container's own": ({"cpu/cpu.cfs_quota_us": "765000", "cpu/cpu.cfs_period_us": "100000"},
                                     "5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n", 7),
    "version 1, half a core": ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, "", 1),
    "version 1, no limit": ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/\n", 8),
    "version 1, nested": ({"cpu,cpuacct/a/cpu.cfs_quota_us": "40000", "cpu,cpuacct/a/cpu.cfs_period_us": "20000",
                           "cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/b/cpu.cfs_period_us": "20000"},
                          "4:cpu,cpuacct:/a/b\n0::/c\n", 2),
    "damaged": ({"cpu.max": "x", "cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "0"}, "nonsense\n", 8),
}  # fmt: skip


@pytest.mark.parametrize("name", QUOTAS)
def test_a_quota_counts_in_both_versions_at_every_height(name, tmp_path, monkeypatch):
    files, own, cores = QUOTAS[name]
    for place, text in files.items():
        (tmp_path / "groups" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / place).write_text(text + "\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(utils, "CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(utils, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(8)}, raising=False)
    assert utils.usable_cores() == cores


# --- files ------------------------------------------------------------------------------------------------


def refusing(monkeypatch, number: int, folders: bool) -> None:
    """A file system that answers so when its folders, or its files, are to be flushed."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def write(path: Path, content: bytes = b"new") -> Path:
    with utils.atomic_write(path) as file:
        file.write(content)
    return path


@pytest.mark.parametrize("folders", [True, False])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_flushing_is_no_failure(number, folders, tmp_path, monkeypatch):
    refusing(monkeypatch, number, folders)
    assert write(tmp_path / "last.pth").read_bytes() == b"new"


@pytest.mark.parametrize("folders", [True, False])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_is_one_and_the_path_is_named(number, folders, tmp_path, monkeypatch):
    write(tmp_path / "last.pth", b"old")
    refusing(monkeypatch, number, folders)
    with pytest.raises(OSError, match=os.strerror(number)) as failure:
        write(tmp_path / "last.pth")
    assert failure.value.filename == str(tmp_path if folders else tmp_path / "last.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]


def test_whatever_fails_the_path_that_is_named_is_the_files_own(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "last.pth", tmp_path / ("n" * 300)):
        with pytest.raises(OSError, match=r"\[Errno") as failure:
            write(path)
        assert str(failure.value.filename) == str(path)


def test_a_folder_that_may_not_be_listed_can_be_written_to(tmp_path, monkeypatch):
    def refused(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "open", refused)
    assert write(tmp_path / "last.pth").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["a", "n" * 251 + ".png", "写真" * 41 + ".png", "\udcff" * 255, "😀" * 63])
def test_a_file_may_have_as_long_a_name_as_the_file_system_allows(name, tmp_path):
    with utils.atomic_write(tmp_path / name) as file:
        file.write(b"new")
        (draft,) = tmp_path.glob(".*.part")  # what is left of a killed run is known by that
    assert len(os.fsencode(draft.name)) <= max(len(os.fsencode(name)) + 6, 143)
    assert (tmp_path / name).read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 1


def test_drafts_of_long_names_are_not_one(tmp_path):
    assert utils.draft_of(tmp_path / ("n" * 250 + "1")) != utils.draft_of(tmp_path / ("n" * 250 + "2"))


def test_counts_are_said_as_people_say_them():
    assert [utils.counted(n, "photo") for n in (0, 1, 2)] == ["0 photos", "1 photo", "2 photos"]
