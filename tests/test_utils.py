"""The loss by hand, the metrics against torchmetrics, devices, atomic files; test_two_processes.py has the rest."""

from __future__ import annotations

import errno
import math
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional import classification as reference

import utils
from utils import LaunchError, LossCalculator, SegmentationMetrics, UserError, near_contour, pick_device

EACH = utils.LOCAL_RANK_GPU
IN_A_WORKER = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\n  File\nutils.UserError: no photo"


def test_an_error_of_a_loader_worker_is_one_line_and_a_bug_none():
    shared_memory = RuntimeError("unable to open shared memory object </torch_7_9>\nin the worker")
    assert utils.user_message(UserError(IN_A_WORKER), "") == "no photo"
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    for error in (shared_memory, killed):
        assert re.fullmatch("a loader worker was killed: .*", utils.user_message(error, ""))
    assert utils.user_message(ValueError("out of memory"), "") == ""


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


@pytest.mark.parametrize(("logit", "mask", "expected"), [(0.0, 1, [0.5, math.log(2), 1 / 3, 0]),
                                                         (-1e4, 1, [1, 1e4, 1, 0]), (1e4, 0, [0, 1e4, 1, 0])])
def test_loss_is_computed_in_float32_and_has_a_finite_gradient(logit, mask, expected):
    raw = torch.full((1, 4, 512, 512), logit, dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        loss, terms = LossCalculator()(raw, torch.full_like(raw, mask))  # 512² pixels overflow float16
    loss.backward()
    assert {value.dtype for value in (loss, *terms.values())} == {torch.float32}
    assert not any(term.requires_grad for term in terms.values())
    assert [term.item() for term in terms.values()] == pytest.approx(expected, abs=1e-5)
    assert raw.grad.isfinite().all()


def measured(*batches: tuple[Tensor, Tensor]) -> dict[str, float]:
    metrics = SegmentationMetrics()
    for alpha, mask in batches:
        metrics.update(alpha, mask)
    return metrics.compute()


@pytest.mark.parametrize("kind", [torch.Tensor.bfloat16, lambda values: values > 0.5])
def test_metrics_over_batches_are_torchmetrics(kind):
    mask, noise = torch.rand(2, 6, 20, 30, generator=torch.Generator().manual_seed(7))
    mask = (mask < torch.linspace(0.1, 0.8, 6).view(6, 1, 1)).float()  # persons larger and guesses better by turns
    alpha, mask = kind((mask - noise * torch.linspace(1, 0.6, 6).view(6, 1, 1)).abs()), kind(mask)
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


def test_a_process_exits_where_rank_0_has_failed(monkeypatch):
    monkeypatch.setattr(utils, "broadcast_object", lambda _: (False, None))
    with pytest.raises(SystemExit, match="2"):
        utils.run_on_rank0(Mock(), utils.Processes(torch.device("cpu"), rank=1, world_size=2))


def test_only_who_wants_the_answer_waits_for_the_other_processes(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", reduce := Mock())
    answer = utils.all_reduce_max_async([3, 0])
    assert reduce.call_args.kwargs == {"async_op": True}
    reduce.return_value.wait.assert_not_called()
    assert answer() == [3, 0]
    reduce.return_value.wait.assert_called_once()


@pytest.mark.parametrize(("setting", "local_rank", "gpus", "has_mps", "name", "noted"), [
    (EACH, 3, 4, True, "cuda:3", ""), (EACH, 1, 0, False, "cpu", "CPU"), (EACH, 0, 0, True, "mps", "MPS"),
    ("cuda:1", 0, 2, False, "cuda:1", ""), ("cpu", 3, 4, True, "cpu", ""), ("mps", 0, 0, True, "mps", ""),
])  # fmt: skip
def test_device_is_the_one_asked_for_or_what_there_is(setting, local_rank, gpus, has_mps, name, noted):
    picked, note = pick_device(setting, local_rank, gpus, has_mps)
    assert (picked, bool(note)) == (name, bool(noted))
    assert noted in note


@pytest.mark.parametrize(("setting", "words"), [(EACH, "cuda:4"), ("mps", "--device mps")])
def test_device_that_is_not_there_is_refused(setting, words):
    with pytest.raises(LaunchError, match=words):
        pick_device(setting, 4, 4, has_mps=False)


def write(path: Path, content: bytes = b"new") -> Path:
    with utils.atomic_write(path) as file:
        file.write(content)
    return path


def test_a_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    path, calls = write(tmp_path / "last.pth", b"a longer old one"), []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    assert write(path).read_bytes() == b"new"
    assert calls[:2] == ["fsync", "replace"]
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("folders", [True, False])
def test_a_missing_fsync_is_no_failure_and_a_bad_disk_is_one(folders, tmp_path, monkeypatch):
    answers, path = [OSError(errno.EIO, os.strerror(errno.EIO))], tmp_path / "last.pth"

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise answers[-1]

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as failure:
        write(path)
    assert failure.value.filename == str(tmp_path if folders else path)
    assert [*tmp_path.iterdir()] == [path] * folders
    for number in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
        answers.append(OSError(number, os.strerror(number)))
        assert write(path).read_bytes() == b"new"


def test_a_failure_names_the_file_and_not_its_temporary_one(tmp_path):
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


@pytest.mark.parametrize("name", ["a", "写真" * 41 + ".png", "\udcff" * 255])
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
