"""Shared by every other file: errors for people, the loss, the metrics, process groups and devices, atomic files."""

from __future__ import annotations

import csv
import errno
import functools
import hashlib
import io
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

VERSION = "0.9.0"  # of the program; CHANGELOG.md says what each brought


class UserError(Exception):
    """A mistake that only the user can fix; the message is one line that says what is wrong and what to do."""


def reason(error: BaseException) -> str:
    """Returns what went wrong, in one line."""
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]


# How PyTorch, CUDA's driver and NCCL say it; how cuBLAS and cuDNN do.
OOM_MESSAGES = re.compile("out of memory|STATUS_ALLOC_FAILED|ALLOCATION_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that a GPU is out of memory, whichever of its libraries reported it."""
    return isinstance(error, RuntimeError) and OOM_MESSAGES.search(str(error)) is not None


def user_message(error: Exception, oom_advice: str) -> str:
    """Returns an error as one line for the user, or "" if it is a bug and deserves its traceback."""
    if is_out_of_memory(error):
        return f"the GPU is out of memory: {oom_advice}"
    if isinstance(error, UserError):  # one from a loader worker comes wrapped in the worker's traceback
        return re.sub(r"^[\w.]*Error: ", "", str(error).strip().splitlines()[-1])
    if re.search(r"DataLoader worker \(pid|</?torch_\d", str(error)):  # the latter is a piece of shared memory
        return ("a loader worker was killed: memory or shared memory ran out, as a rule; use fewer --num-workers (0 "
                "needs none), in a container docker run --ipc=host or --shm-size=2g")  # fmt: skip
    return ""


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: "1 photo", "2 photos"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"

CONTOUR_FRACTION = 0.02  # of a mask's width: pixels this close to its contour are near it
EPSILON = 1e-6  # rounding error of a mean of zeros and ones; a single pixel of the largest mask weighs more


class LossCalculator(nn.Module):
    """The loss of RGBA logits against an RGBA target: a weighted sum of named terms.

    Each term is a mean over images of what one image alone gives, so a batch that is split over processes or
    micro-batches has the loss of the whole. Everything is computed in float32, under autocast too.

    A new term is a weight here and in `Config`, and its value in `terms`.

    Args:
        colour_weight: of L1 between the colours, inside the mask only: what lies around a person is not asked for.
        bce_weight: of the binary cross-entropy of alpha, a mean over pixels.
        dice_weight: of one minus soft Dice of alpha (Milletari et al. 2016), in which small persons count as well.
        contour_weight: of the binary cross-entropy of alpha near the mask's contour, a mean over all pixels.
    """

    def __init__(
        self, *, colour_weight: float = 1.0, bce_weight: float = 1.0, dice_weight: float = 2.0,
        contour_weight: float = 3.0,
    ):  # fmt: skip
        super().__init__()
        self.weights = {"colour": colour_weight, "bce": bce_weight, "dice": dice_weight, "contour": contour_weight}

    def forward(self, raw: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the scalar to minimise, and its unweighted terms by name, detached.

        `raw` are logits (N, 4, H, W) as the model gives them, `target` is (N, 4, H, W) in [0, 1]: R, G, B, the mask.
        """
        with torch.autocast(raw.device.type, enabled=False):
            raw, target = raw.float(), target.float()
            mask = target[:, 3]
            entropy = F.binary_cross_entropy_with_logits(raw[:, 3], mask, reduction="none")
            terms = {
                "colour": colour_loss(torch.sigmoid(raw[:, :3]), target[:, :3], mask),
                "bce": entropy.mean(),
                "dice": soft_dice_loss(torch.sigmoid(raw[:, 3]), mask),
                "contour": (entropy * near_contour(mask)).mean(),
            }
            loss = functools.reduce(torch.add, (self.weights[name] * term for name, term in terms.items()))
        return loss, {name: term.detach() for name, term in terms.items()}


def colour_loss(colours: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean L1 distance of colours (N, 3, H, W) inside masks (N, H, W); 0 for an empty mask."""
    difference = ((colours - target).abs().mean(dim=1) * mask).sum(dim=(1, 2))
    return (difference / mask.sum(dim=(1, 2)).clamp(min=1)).mean()


def near_contour(mask: Tensor) -> Tensor:
    """Returns 1 where both sides of the contour of masks (N, H, W) lie within 2 % of their width, else 0.

    The border of the square is no contour; where a black bar of the letterbox cuts a person off is one.
    """
    reach = max(1, round(CONTOUR_FRACTION * mask.shape[-1]))
    fraction = mask[:, None]
    for kernel, padding in (((2 * reach + 1, 1), (reach, 0)), ((1, 2 * reach + 1), (0, reach))):
        fraction = F.avg_pool2d(fraction, kernel, stride=1, padding=padding, count_include_pad=False)
    return ((fraction > EPSILON) & (fraction < 1 - EPSILON))[:, 0].float()


def soft_dice_loss(alpha: Tensor, mask: Tensor, smooth: float = 1.0) -> Tensor:
    """Returns one minus soft Dice of alpha and mask (N, H, W) in [0, 1], a mean over images; two empty masks agree."""
    overlap = (alpha * mask).sum(dim=(1, 2))
    total = alpha.sum(dim=(1, 2)) + mask.sum(dim=(1, 2))
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()

# Of `SegmentationMetrics`, as people write them: each of these may pick the best model.
SCORES = {"iou": "IoU", "dice": "Dice", "global_iou": "global IoU", "global_dice": "global Dice"}


def zero_sums(length: int, device: torch.device | str) -> Tensor:
    """Returns zeros to add up counts in: float64 is exact up to 2**53; Apple's MPS has none of it."""
    return torch.zeros(length, dtype=torch.float32 if "mps" in str(device) else torch.float64, device=device)


def overlap_scores(tp: Tensor, fp: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each image's IoU and Dice from its true positives, false positives and false negatives (N,)."""
    union = tp + fp + fn  # 0 where both masks are empty, which counts as 1
    iou = torch.where(union > 0, tp / union.clamp(min=1), 1)
    dice = torch.where(union > 0, 2 * tp / (union + tp).clamp(min=1), 1)
    return iou, dice


class SegmentationMetrics:
    """IoU and Dice as sums over images and pixels, which add up exactly over batches and processes."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.sums = zero_sums(6, device)  # images, their IoUs, their Dices, pixels tp, fp, fn

    def update(self, alpha: Tensor, mask: Tensor) -> None:
        """Counts predictions against ground truth (N, H, W), without waiting for the device.

        Both are bools, or probabilities: a person where they exceed 0.5.
        """
        alpha, mask = (values if values.dtype == torch.bool else values > 0.5 for values in (alpha, mask))
        counts = torch.stack([alpha & mask, alpha & ~mask, ~alpha & mask]).sum(dim=(2, 3))  # int64 (3, N)
        tp, fp, fn = counts.to(self.sums.dtype)
        iou, dice = overlap_scores(tp, fp, fn)
        self.sums += torch.stack([torch.ones_like(iou), iou, dice, tp, fp, fn]).sum(dim=1)

    def synchronize(self) -> None:
        """Adds up over all processes; call it once, before `compute`."""
        all_reduce_sum_(self.sums)

    def compute(self) -> dict[str, float]:
        """Returns the metrics: `iou` and `dice` are means over images, all others ratios over all pixels."""
        images, iou, dice, tp, fp, fn = self.sums.tolist()
        return {
            "iou": ratio(iou, images),
            "dice": ratio(dice, images),
            "global_iou": ratio(tp, tp + fp + fn),
            "global_dice": ratio(2 * tp, 2 * tp + fp + fn),
            "precision": ratio(tp, tp + fp),
            "recall": ratio(tp, tp + fn),
            "images": images,
        }


def ratio(part: float, whole: float) -> float:
    """Returns part / whole; 1 where there was nothing to find and nothing was found."""
    return part / whole if whole else 1.0


# --- process group and devices ----------------------------------------------------------------------------


class LaunchError(UserError):
    """The processes and devices that were asked for do not fit the machine."""


@dataclass(frozen=True)
class Processes:
    """This process's device, and its rank among the processes of the run."""

    device: torch.device
    note: str = ""  # what the user should know about the choice of the device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0


LOCAL_RANK_GPU = "cuda:{local_rank}"  # the default device: each process its own GPU


def pick_device(setting: str, local_rank: int, gpus: int, has_mps: bool) -> tuple[str, str]:
    """Returns the name of the device that --device means on this machine, and a note on it for the user, or ""."""
    if setting == LOCAL_RANK_GPU and gpus == 0:
        name = "mps" if has_mps else "cpu"
        return name, f"no CUDA GPU is visible: training on {'Apple MPS' if has_mps else 'the CPU'}"
    name = (LOCAL_RANK_GPU if setting == "cuda" else setting).replace("{local_rank}", str(local_rank))
    if not re.fullmatch(r"cpu|mps|cuda:\d+", name):
        raise LaunchError(f"--device {setting} is not known: it is cpu, mps, cuda:0, cuda:1 and so on")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise LaunchError(f"{name} was asked for, with {counted(gpus, 'GPU')} visible: start at most one process a "
                          "GPU, or choose with --device or CUDA_VISIBLE_DEVICES")  # fmt: skip
    if device.type == "mps" and not has_mps:
        raise LaunchError("--device mps was asked for, and PyTorch finds no Apple GPU here")
    return name, ""


def memory_format(device: torch.device) -> torch.memory_format:
    """Returns the memory format for a model's weights: channels last, but on Apple's MPS, where they stay as is."""
    return torch.preserve_format if device.type == "mps" else torch.channels_last


# Each of these is a no-op in a run of one process.


def all_reduce_sum_(sums: Tensor) -> None:
    """Adds up a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(sums)


def all_reduce_max_(number: Tensor) -> None:
    """Takes the maximum over all processes, in place and on the device: no process waits for a GPU."""
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)


def all_reduce_max_async(numbers: list[int]) -> Callable[[], list[int]]:
    """Starts taking the maximum of each number over all processes, on the CPU; what it returns waits for the result."""
    largest = torch.tensor(numbers)
    work = dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True) if dist.is_initialized() else None

    def result() -> list[int]:
        if work is not None:
            work.wait()
        return largest.tolist()

    return result


def all_reduce_max(numbers: list[int]) -> list[int]:
    """Returns the maximum of each number over all processes."""
    return all_reduce_max_async(numbers)()


def broadcast_object(value: Any) -> Any:
    """Returns rank 0's value on every process."""
    payload = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(payload, src=0)
    return payload[0]


def all_gather_list(rows: list) -> list:
    """Returns the lists of all processes, joined by rank, on every process."""
    gathered = [rows]
    if dist.is_initialized():
        gathered = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, rows)
    return [row for rows in gathered for row in rows]


def run_on_rank0(work: Callable[[], Any], processes: Processes) -> Any:
    """Runs `work` on rank 0 and returns its result on every process; if it fails, the others exit with code 2."""
    result, failure = None, None
    try:
        result = work() if processes.is_rank0 else None
    except Exception as error:  # the others would wait for ever
        failure = error
    succeeded, result = broadcast_object((failure is None, result))
    if failure:
        raise failure
    if not succeeded:
        raise SystemExit(2)
    return result


# --- files that are whole or not there --------------------------------------------------------------------


MAX_STEM_BYTES = 100  # of a file's name that its temporary file takes over: file systems allow 143 to 255 in all
TEMPORARY_NAME = re.compile(r"\..+\.([0-9a-f]{8})\.(\d{1,9})\.[0-9a-f]{8}\.part")  # of which machine and process
LEFTOVER_SECONDS = 24 * 3600.0  # since the last write to a temporary file: then nobody is writing it any more
# What a file system without fsync answers; what was written is there all the same.
FSYNC_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file that replaces `path` only when it is complete and on the disk.

    If it cannot be written, OSError names `path`, and what was there is untouched.
    """
    remove_leftovers(path.parent)
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # a disk that has gone must not hide what went wrong
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and str(error.filename) in ("None", str(temporary)):
            error.filename = str(path)
        raise
    fsync_folder(path.parent)


def temporary_path(path: Path) -> Path:
    """Returns where a file is written before it replaces `path`: a new name each time, that no other process uses.

    It names the process, and is no longer than a file's name may be.
    """
    name = os.fsencode(path.name)
    stem = path.name if len(name) <= MAX_STEM_BYTES else hashlib.blake2b(name, digest_size=8).hexdigest()
    return path.with_name(f".{stem}.{machine()}.{os.getpid()}.{os.urandom(4).hex()}.part")


@functools.cache
def machine() -> str:
    """Returns a digest of where process numbers are unique: this machine, or a container on it."""
    name = socket.gethostname()
    with suppress(OSError):  # not Linux, where containers that share the host's name have process numbers of their own
        name += os.readlink("/proc/self/ns/pid")
    return hashlib.blake2b(name.encode(), digest_size=4).hexdigest()


@functools.lru_cache(1024)  # a look at each folder: one may hold a hundred thousand files
def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of a folder whose process was killed; of another machine those of the day before."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = TEMPORARY_NAME.fullmatch(entry.name)
            if match and (is_dead(match[1], int(match[2])) or time.time() - entry.stat().st_mtime > LEFTOVER_SECONDS):
                os.unlink(entry.path)


def is_dead(machine_name: str, pid: int) -> bool:
    """Returns whether a process is known to have ended: one of this machine."""
    if machine_name != machine() or os.name != "posix":  # elsewhere `os.kill` would end it
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False


def fsync(descriptor: int) -> None:
    """Flushes a file to the disk, if its file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in FSYNC_UNSUPPORTED:
            raise


def fsync_folder(folder: Path) -> None:
    """Flushes a folder's names to the disk, after a rename in it."""
    if os.name != "posix":  # elsewhere a folder cannot be opened, and a rename needs no flushing
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # it may be written to and not be listed
        return
    try:
        fsync(descriptor)
    except OSError as error:
        error.filename = str(folder)
        raise
    finally:
        os.close(descriptor)


@contextmanager
def explain_write_errors(target: str) -> Iterator[None]:
    """Turns an OSError within the block into a UserError that begins with `target`."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) not in target else ""
        raise UserError(f"{target} cannot be written: {error.strerror}{where}") from None


def ensure_writable(folder: Path) -> None:
    """Makes a folder with its parents; raises an OSError early if nothing can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def write_csv(rows: list[dict], path: Path) -> None:
    """Writes one line per row, floats in six digits, with a column for every key that any row has."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
