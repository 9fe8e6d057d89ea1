"""The loss by hand, the metrics against torchmetrics, what two processes exchange, devices, atomic files."""

from __future__ import annotations

import errno
import math
import os
import stat
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import utils
from utils import LaunchError, LossCalculator, Processes, SegmentationMetrics, UserError, near_contour, pick_device

EACH = utils.LOCAL_RANK_GPU
LONG = 60.0  # seconds: a test that waits for so long has failed


# --- errors -----------------------------------------------------------------------------------------------

IN_A_WORKER = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\n  File\nutils.UserError: no photo"


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (UserError("no photo"), "no photo"), (UserError(IN_A_WORKER), "no photo"), (RuntimeError("a bug"), ""),
        (torch.OutOfMemoryError("CUDA out of memory."), "the GPU is out of memory: advice"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "the GPU is out of memory: advice"),
        (RuntimeError("CUDA error: out of shared memory"), ""), (ValueError("out of memory"), ""),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a loader worker was killed"),
        (RuntimeError("unable to open shared memory object </torch_7_9>"), "a loader worker was killed"),
    ],
)  # fmt: skip
def test_a_users_error_is_one_line_and_a_bug_none(error, start):
    message = utils.user_message(error, "advice")
    assert message.startswith(start)
    assert bool(message) == bool(start)
    assert "\n" not in message


# --- loss -------------------------------------------------------------------------------------------------


def pictures() -> tuple[Tensor, Tensor]:
    """Logits and targets (4, 4, 16, 16) of persons of different sizes; nobody is in the third."""
    raw, target = torch.randn(2, 4, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    return raw, torch.cat([target[:, :3].sigmoid(), target[:, 3:] > torch.tensor([1, 0, 9, -1]).view(4, 1, 1, 1)], 1)


def test_loss_terms_by_hand():
    # Two pixels: the left one a person of colour (1/2, 1/4, 3/4), guessed grey; the alphas guessed 1/2 and 3/4.
    target = torch.tensor([[0.5, 0.9], [0.25, 0.9], [0.75, 0.9], [1, 0]]).view(1, 4, 1, 2)
    raw = torch.tensor([[0, 5], [0, 5], [0, 5], [0, math.log(3)]]).view(1, 4, 1, 2)
    loss, terms = LossCalculator(colour_weight=2, bce_weight=3, dice_weight=5, contour_weight=7)(raw, target)
    bce = (math.log(2) + math.log(4)) / 2
    by_hand = {"colour": (0 + 0.25 + 0.25) / 3, "bce": bce, "dice": 1 - (2 * 0.5 + 1) / (0.5 + 0.75 + 1 + 1),
               "contour": bce}  # fmt: skip
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(by_hand)
    assert loss.item() == pytest.approx(2 * by_hand["colour"] + 3 * bce + 5 * by_hand["dice"] + 7 * bce)


def test_contour_is_opencvs_within_two_percent_of_the_width():
    mask = np.zeros((100, 100), np.uint8)
    cv2.circle(mask, (40, 50), 20, 1, -1)
    mask[60:, 90:] = 1  # it reaches over the rim, where there is no contour
    square = np.ones((5, 5), np.uint8)
    near = near_contour(torch.from_numpy(mask)[None].float())[0]
    assert np.array_equal(near.numpy(), cv2.dilate(mask, square) - cv2.erode(mask, square))
    assert (near[70, 99], near[70, 90]) == (0, 1)
    raw, target = torch.randn(1, 4, 100, 100), torch.from_numpy(mask).expand(1, 4, 100, 100)
    entropy = F.softplus(raw[:, 3]) - raw[:, 3] * target[:, 3]
    assert LossCalculator()(raw, target)[1]["contour"].item() == pytest.approx((entropy * near).mean().item(), rel=1e-5)


def test_colours_outside_the_mask_do_not_count():
    raw, target = pictures()
    loss, terms = LossCalculator()(raw.requires_grad_(), target)
    loss.backward()
    outside = (target[:, 3:] == 0).expand(-1, 3, -1, -1)
    assert torch.equal(raw.grad[:, :3] == 0, outside)
    assert not any(term.requires_grad for term in terms.values())
    target[:, :3][outside] = 0.123
    assert LossCalculator()(raw, target)[1]["colour"] == terms["colour"]
    assert 0 <= LossCalculator()(torch.logit(target, eps=1e-6), target)[0] < 1e-3  # a perfect prediction


@pytest.mark.parametrize("split", [1, 2, 3])
def test_a_batch_costs_the_mean_of_its_images(split):
    raw, target = pictures()
    losses = [LossCalculator()(raw[images], target[images]) for images in (slice(4), slice(split), slice(split, 4))]
    whole, first, rest = (np.array([loss, *terms.values()]) for loss, terms in losses)
    np.testing.assert_allclose(whole, (split * first + (4 - split) * rest) / 4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_computed_in_float32_under_autocast(dtype):
    raw, target = torch.zeros(1, 4, 512, 512, dtype=dtype), torch.ones(1, 4, 512, 512, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss, terms = LossCalculator()(raw, target)  # 512² pixels overflow float16
    assert {value.dtype for value in (loss, *terms.values())} == {torch.float32}
    assert [term.item() for term in terms.values()] == pytest.approx([0.5, math.log(2), 1 / 3, 0], abs=1e-5)


@pytest.mark.parametrize("logit", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_extreme_logits_have_their_loss_and_a_finite_gradient(logit, mask):
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
    metrics.synchronize()  # alone
    assert metrics.compute() == metrics.compute()
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
    assert utils.SCORES.keys() <= expected.keys()


@pytest.mark.parametrize(("alpha", "mask", "score"), [(0.5, 0, 1), (0.51, 0, 0), (0, 1, 0), (0.5, 1, 0), (0.51, 1, 1)])
def test_two_empty_masks_agree_and_a_person_is_above_one_half(alpha, mask, score):
    metrics = measured((torch.full((1, 4, 4), alpha * 1.0), torch.full((1, 4, 4), mask * 1.0)))
    assert (metrics["iou"], metrics["dice"], metrics["global_iou"]) == (score, score, score)
    assert all(map(math.isfinite, measured().values()))  # of no image


def test_pixels_beyond_2_to_the_24_are_counted_exactly():
    everyone, one = torch.ones(1, 4096, 4097, dtype=torch.bool), torch.ones(1, 1, 1, dtype=torch.bool)
    metrics = measured((everyone, everyone), (one, one), (one, ~one))
    assert metrics["precision"] == metrics["global_iou"] == 16781313 / 16781314


def test_update_does_not_wait_for_the_device():
    with torch.device("meta"):  # where nothing has a value: to ask for one, as `.item()` or an `if` does, raises
        SegmentationMetrics("meta").update(torch.rand(2, 8, 8), torch.rand(2, 8, 8))


# --- two processes ----------------------------------------------------------------------------------------


def one_of_two(rank: int, folder: Path) -> None:
    """What each of two processes does; what comes of it goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=LONG), rank=rank, world_size=2)
    results = {"metrics": measured(tuple(values[(slice(4), slice(4, 6))[rank]] for values in guesses()))}
    largest = torch.tensor([float(rank), -float(rank)])
    utils.all_reduce_max_(largest)
    results |= {"largest": largest.tolist(), "object": utils.broadcast_object({rank: rank}),
                "list": utils.all_gather_list([rank] * (rank + 1))}  # fmt: skip
    end = time.monotonic() + LONG
    while rank == 0 and not (folder / "asked").exists() and time.monotonic() < end:
        time.sleep(0.01)  # the other one goes on before this one asks as well
    answer = utils.all_reduce_max_async([rank, 5 - rank])
    (folder / "asked").touch()
    results["async"] = (time.monotonic() < end, answer())
    processes = Processes(torch.device("cpu"), rank=rank, world_size=2)
    results["rank 0"] = utils.run_on_rank0(lambda: f"of {rank}", processes)
    try:
        utils.run_on_rank0(lambda: {}["missing"], processes)
    except BaseException as error:
        results["failure"] = repr(error)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_exchange_values(tmp_path):
    processes = torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2, join=False).processes
    for process in processes:
        process.join(2 * LONG)
    for process in processes:
        process.kill()
    results, alone = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)], measured(guesses())
    for result in results:
        assert result["metrics"] == pytest.approx(alone, rel=1e-14)
        assert result["metrics"]["global_iou"] == alone["global_iou"]
        assert (result["largest"], result["object"], result["list"]) == ([1, 0], {0: 0}, [0, 1, 1])
        assert (result["async"], result["rank 0"]) == ((True, [1, 5]), "of 0")
    assert [result["failure"] for result in results] == ["KeyError('missing')", "SystemExit(2)"]


def test_alone_nothing_is_exchanged():
    assert (utils.all_reduce_max([3, 0]), utils.all_gather_list([1])) == ([3, 0], [1])
    assert utils.broadcast_object("own") == "own"
    with pytest.raises(KeyError):
        utils.run_on_rank0(lambda: {}["missing"], Processes(torch.device("cpu")))


# --- devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "local_rank", "gpus", "has_mps", "name", "noted"),
    [(EACH, 3, 4, False, "cuda:3", ""), (EACH, 0, 1, True, "cuda:0", ""), (EACH, 1, 0, False, "cpu", "CPU"),
     (EACH, 0, 0, True, "mps", "MPS"), ("cuda:1", 0, 2, False, "cuda:1", ""), ("cpu", 3, 4, True, "cpu", "")],
)  # fmt: skip
def test_device_is_the_one_asked_for_or_what_there_is(setting, local_rank, gpus, has_mps, name, noted):
    picked, note = pick_device(setting, local_rank, gpus, has_mps)
    assert picked == name
    assert (noted in note) if noted else note == ""


@pytest.mark.parametrize(("setting", "gpus"), [(EACH, 4), ("cuda:1", 1), ("cuda", 0), ("mps", 4), ("gpu", 4), ("", 4)])
def test_device_that_is_not_there_is_refused(setting, gpus):
    with pytest.raises(LaunchError) as refusal:
        pick_device(setting, 4, gpus, has_mps=False)
    assert setting.format(local_rank=4) in str(refusal.value)


# --- files ------------------------------------------------------------------------------------------------


def write(path: Path, content: bytes = b"new") -> Path:
    with utils.atomic_write(path) as file:
        file.write(content)
    return path


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError(), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_whole(error, tmp_path):
    path = write(tmp_path / "last.pth", b"old")
    with pytest.raises(type(error)), utils.atomic_write(path) as file:  # noqa: PT012
        file.write(b"half of the n")
        file.flush()
        assert path.read_bytes() == b"old"
        raise error
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    path, calls = write(tmp_path / "last.pth", b"a longer old one"), []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    assert write(path).read_bytes() == b"new"
    assert calls[:2] == ["fsync", "replace"]
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("folders", [True, False])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO, errno.ENOSPC])
def test_a_missing_fsync_is_no_failure_and_a_bad_disk_is_one(number, folders, tmp_path, monkeypatch):
    real, path = os.fsync, tmp_path / "last.pth"

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if number not in (errno.EIO, errno.ENOSPC):
        assert write(path).read_bytes() == b"new"
        return
    with pytest.raises(OSError, match=os.strerror(number)) as failure:
        write(path)
    assert failure.value.filename == str(tmp_path if folders else path)
    assert [*tmp_path.iterdir()] == [path] * folders


def test_a_failure_names_the_file_and_not_its_temporary_one(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "last.pth", tmp_path / ("n" * 300)):
        with pytest.raises(OSError, match=r"\[Errno") as failure:
            write(path)
        assert str(failure.value.filename) == str(path)
    line = rf"^--output out cannot be written: No such .* \({tmp_path}/none/a\)$"
    with pytest.raises(UserError, match=line), utils.explain_write_errors("--output out"):
        write(tmp_path / "none" / "a")


def test_a_folder_that_may_not_be_listed_can_be_written_to(tmp_path, monkeypatch):
    def refused(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "open", refused)
    assert write(tmp_path / "last.pth").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["a", "n" * 251 + ".png", "写真" * 41 + ".png", "\udcff" * 255])
def test_a_file_has_one_writers_content_whatever_its_name(name, tmp_path):
    path = tmp_path / name
    with utils.atomic_write(path) as file:
        file.write(b"slow")
        (temporary,) = tmp_path.glob(".*.part")  # what is left of a killed run is known by that
        assert write(path, b"fast").read_bytes() == b"fast"  # by another process, which began later
    assert len(os.fsencode(temporary.name)) <= 143  # eCryptfs allows no more
    assert path.read_bytes() == b"slow"
    assert [*tmp_path.iterdir()] == [path]


def test_what_a_dead_process_was_writing_is_removed_and_what_others_write_is_not(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    mine = utils.temporary_path(tmp_path / "last.pth")
    left = mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{int(dead.stdout)}."))
    elsewhere = left.with_name(left.name.replace(utils.machine(), "01234567"))
    old = elsewhere.with_name(elsewhere.name.replace("last", "best"))
    for path in (mine, left, elsewhere, old, tmp_path / ".a.part"):
        path.touch()
    os.utime(old, (0, 0))
    path = write(tmp_path / "last.pth")
    assert {*tmp_path.iterdir()} == {path, mine, elsewhere, tmp_path / ".a.part"}
