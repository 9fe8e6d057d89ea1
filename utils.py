"""The ground floor: the loss and the metrics, processes and devices, files that are whole or not there."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class UserError(Exception):
    """What only the user can mend: the message is one line that says what is wrong and what to do."""


def counted(number: int, noun: str) -> str:
    """1 photo, 2 photos."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


# --- loss -------------------------------------------------------------------------------------------------


CONTOUR_SHARE = 0.02  # of a mask's width: how far from its contour a pixel is near it
ROUNDING = 1e-6  # of a mean of zeros and ones; a single pixel of the largest mask weighs more


class LossCalculator(nn.Module):
    """The loss of RGBA logits against an RGBA target: colour, binary cross-entropy and soft Dice.

    Each term is a mean over images of what one image alone gives, so that a batch split over processes or
    into parts has the loss of the whole. Everything is computed in float32, under autocast too.

    Args:
        colour_weight: of L1 between the colours, inside the mask only: what lies around a person is not asked for.
        bce_weight: of the binary cross-entropy of alpha, a mean over pixels.
        dice_weight: of one minus soft Dice of alpha (Milletari et al. 2016), which small persons count in as well.
        contour_weight: of the binary cross-entropy of alpha near the mask's contour, a mean over all pixels as well;
            with 0 there is no such term.
    """

    def __init__(
        self, colour_weight: float = 1.0, bce_weight: float = 1.0, dice_weight: float = 1.0, contour_weight: float = 0.0
    ):
        super().__init__()
        self.weights = {"colour": colour_weight, "bce": bce_weight, "dice": dice_weight}
        if contour_weight:
            self.weights["contour"] = contour_weight

    def forward(self, raw: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and its unweighted terms, detached: "colour", "bce", "dice", and "contour" if any.

        Args:
            raw: (N, 4, H, W) logits, as the model gives them.
            target: (N, 4, H, W) in [0, 1]: R, G, B and the mask.
        """
        with torch.autocast(raw.device.type, enabled=False):
            raw, target = raw.float(), target.float()
            mask = target[:, 3]
            entropy = F.binary_cross_entropy_with_logits(raw[:, 3], mask, reduction="none")
            terms = {
                "colour": colour_loss(torch.sigmoid(raw[:, :3]), target[:, :3], mask),
                "bce": entropy.mean(),
                "dice": soft_dice_loss(torch.sigmoid(raw[:, 3]), mask),
            }
            if "contour" in self.weights:
                terms["contour"] = (entropy * near_contour(mask)).mean()
            loss = sum(self.weights[name] * term for name, term in terms.items())
        return loss, {name: term.detach() for name, term in terms.items()}


def colour_loss(colours: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """L1 of colours (N, 3, H, W) inside masks (N, H, W), by the mask's area; 0 for an empty mask."""
    difference = ((colours - target).abs().mean(dim=1) * mask).sum(dim=(1, 2))
    return (difference / mask.sum(dim=(1, 2)).clamp(min=1)).mean()


def near_contour(mask: Tensor) -> Tensor:
    """1 where both sides of the contour of masks (N, H, W) lie within 2 % of their width, else 0.

    The rim of the square is no contour; where a letterbox's bar cuts a person off is one.
    """
    reach = max(1, round(CONTOUR_SHARE * mask.shape[-1]))
    share = mask[:, None]
    for kernel, padding in (((2 * reach + 1, 1), (reach, 0)), ((1, 2 * reach + 1), (0, reach))):
        share = F.avg_pool2d(share, kernel, stride=1, padding=padding, count_include_pad=False)
    return ((share > ROUNDING) & (share < 1 - ROUNDING))[:, 0].float()


def soft_dice_loss(alpha: Tensor, mask: Tensor, smooth: float = 1.0) -> Tensor:
    """One minus soft Dice of (N, H, W) in [0, 1], an image at a time; `smooth` pixels make two empty ones agree."""
    overlap = (alpha * mask).sum(dim=(1, 2))
    total = alpha.sum(dim=(1, 2)) + mask.sum(dim=(1, 2))
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()


# --- metrics: sums first, ratios last ---------------------------------------------------------------------


def empty_sums(length: int, device: torch.device | str) -> Tensor:
    # float64 holds pixel counts exactly up to 2**53; Apple's MPS has none.
    return torch.zeros(length, dtype=torch.float32 if "mps" in str(device) else torch.float64, device=device)


class SegmentationMetrics:
    """IoU and Dice as sums over images and pixels, which add up exactly over batches and processes."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.sums = empty_sums(6, device)  # images, their IoUs, their Dices, pixels tp, fp, fn

    def update(self, alpha: Tensor, mask: Tensor) -> None:
        """Counts (N, H, W) predictions against truths, without waiting for the device.

        Args:
            alpha, mask: probabilities, a person where they exceed 0.5; or bools.
        """
        alpha, mask = (values if values.dtype == torch.bool else values > 0.5 for values in (alpha, mask))
        counts = torch.stack([alpha & mask, alpha & ~mask, ~alpha & mask]).sum(dim=(2, 3))  # int64 (3, N)
        tp, fp, fn = counts.to(self.sums.dtype)
        union = tp + fp + fn
        # Where both are empty the prediction is right: 1. Where one is, tp is 0 and so is the score.
        iou = torch.where(union > 0, tp / union.clamp(min=1), 1)
        dice = torch.where(union > 0, 2 * tp / (union + tp).clamp(min=1), 1)
        images = torch.ones_like(iou)
        self.sums += torch.stack([images, iou, dice, tp, fp, fn]).sum(dim=1)

    def synchronize(self) -> None:
        """Adds up over all processes; call it once, before `compute`."""
        sum_over_processes(self.sums)

    def compute(self) -> dict[str, float]:
        """`iou` and `dice` are means over images; the `global_` ones, precision and recall are over all pixels."""
        images, iou, dice, tp, fp, fn = self.sums.tolist()
        return {
            "iou": _ratio(iou, images),
            "dice": _ratio(dice, images),
            "global_iou": _ratio(tp, tp + fp + fn),
            "global_dice": _ratio(2 * tp, 2 * tp + fp + fn),
            "precision": _ratio(tp, tp + fp),
            "recall": _ratio(tp, tp + fn),
            "images": images,
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0  # nothing to find and nothing found


# --- processes and devices --------------------------------------------------------------------------------


class LaunchError(UserError):
    """The processes and devices that were asked for do not fit the machine; one line for the user."""


@dataclass(frozen=True)
class Processes:
    """This process and its place among the others."""

    device: torch.device
    note: str = ""  # what the user should know of the choice of the device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


EACH_ITS_GPU = "cuda:{local_rank}"  # the device setting that means: every process its own GPU


def pick_device(setting: str, local_rank: int, gpus: int, has_mps: bool) -> tuple[str, str]:
    """The device's name and what to tell the user about it.

    Raises:
        LaunchError: a GPU was asked for that is not there.
    """
    if setting == EACH_ITS_GPU and gpus == 0:
        name = "mps" if has_mps else "cpu"
        return name, f"no CUDA GPU is visible: training on {'Apple MPS' if has_mps else 'the CPU'}"
    name = (EACH_ITS_GPU if setting == "cuda" else setting).replace("{local_rank}", str(local_rank))
    if not re.fullmatch(r"cpu|mps|cuda:\d+", name):
        raise LaunchError(f"--device {setting} is not known: it is cpu, mps, cuda:0, cuda:1 and so on")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= gpus:
        there = f"{counted(gpus, 'GPU')} {'is' if gpus == 1 else 'are'}"
        raise LaunchError(f"{name} was asked for and {there} visible: start at most one process a GPU, "
                          "or choose with --device or CUDA_VISIBLE_DEVICES")  # fmt: skip
    if device.type == "mps" and not has_mps:
        raise LaunchError("--device mps was asked for, and PyTorch finds no Apple GPU here")
    return name, ""


def sum_over_processes(sums: Tensor) -> None:
    """Adds up a tensor over all processes, in place; nothing to do for a process on its own."""
    if dist.is_initialized():
        dist.all_reduce(sums)


def largest_over_processes(number: Tensor) -> None:
    """The largest over all processes, in place and on the device: nobody waits for a GPU."""
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)


def ask_largest(numbers: list[int]) -> Callable[[], list[int]]:
    """Asks all processes for the largest of each number, and waits for none; the answer is what the result returns.

    A GPU need not finish its work first.
    """
    largest = torch.tensor(numbers)
    work = dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True) if dist.is_initialized() else None

    def answer() -> list[int]:
        if work is not None:
            work.wait()
        return largest.tolist()

    return answer


def largest_of_each(numbers: list[int]) -> list[int]:
    """Of each number the largest over all processes, which wait for one another."""
    return ask_largest(numbers)()


def on_main(work: Callable[[], Any], processes: Processes) -> Any:
    """What the main process alone does; all get its result. If it fails, the others end as well, without a word."""
    result = failure = None
    try:
        result = work() if processes.is_main else None
    except Exception as error:  # the others would wait for ever
        failure = error
    worked, result = from_main((failure is None, result))
    if failure:
        raise failure
    if not worked:
        raise SystemExit(2)
    return result


def from_main(value: object) -> object:
    """The main process's value, on every process: what only its disk may hold."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(rows: list) -> list:
    """The lists of all processes as one, on every process."""
    boxes = [rows]
    if dist.is_initialized():
        boxes = [None] * dist.get_world_size()
        dist.all_gather_object(boxes, rows)
    return [row for box in boxes for row in box]


def usable_cores() -> int:
    """The cores that this process may use: its affinity, and a container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(map(core_quota, control_groups()))
    return min(cores, max(1, int(quota))) if math.isfinite(quota) else cores


CONTROL_GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # of Linux


def control_groups() -> Iterator[Path]:
    """The groups of Linux whose limits may hold for this process, of both versions: its own, and all above it."""
    own = {""}  # a container's own group is the topmost that it sees, whatever the host calls it
    with suppress(OSError):  # no Linux
        for line in OWN_GROUPS.read_text().splitlines():  # "4:cpu,cpuacct:/a/b"; version 2 has "0::/a/b"
            kinds, _, place = line.partition(":")[2].partition(":")
            own |= {place} if kinds == "" or "cpu" in kinds.split(",") else set()
    for parts in (place.strip("/").split("/") for place in own):
        for version in ("", "cpu", "cpu,cpuacct"):
            yield from (CONTROL_GROUPS.joinpath(version, *parts[:depth]) for depth in range(len(parts) + 1))


def core_quota(group: Path) -> float:
    """The cores that a control group may use, of whichever version; infinite where it sets no limit."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        with suppress(OSError, ValueError, ZeroDivisionError):  # without a limit version 2 says "max", version 1 "-1"
            quota, period = " ".join((group / name).read_text() for name in names).split()
            if int(quota) > 0:
                return int(quota) / int(period)
    return math.inf


def autocast_dtype(device: torch.device, wanted: bool, on_cpu: bool = False) -> torch.dtype | None:
    """bfloat16 on a CUDA GPU that has it, else float16; None where the training stays in float32.

    Args:
        wanted: half precision on a GPU.
        on_cpu: bfloat16 on a CPU.

    Raises:
        LaunchError: it is wanted on a CPU that would have to emulate it.
    """
    if device.type == "cpu" and on_cpu:
        if not cpu_has_bfloat16():
            raise LaunchError("--bfloat16-on-cpu: this CPU has no instructions for bfloat16 and would get slower")
        return torch.bfloat16
    if not wanted or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def cpu_has_bfloat16() -> bool:
    """Whether this machine says so: as AVX-512 or AMX on a PC, as "bf16" on ARM."""
    try:
        return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text()) is not None
    except OSError:  # no Linux
        return False


# The words of PyTorch, CUDA's driver and NCCL; those of cuBLAS and cuDNN.
USED_UP = re.compile("out of memory|STATUS_ALLOC_FAILED|ALLOCATION_FAILED")


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's memory is used up, whichever of the libraries on it has noticed."""
    return isinstance(error, RuntimeError) and USED_UP.search(str(error)) is not None


def one_line(error: Exception, memory_advice: str) -> str:
    """An error as one line for the user; "" for one that is no user's."""
    if lacks_memory(error):
        return f"the GPU's memory is used up: {memory_advice}"
    return str(error).splitlines()[0] if isinstance(error, UserError) else ""


def memory_format(device: torch.device) -> torch.memory_format:
    """How a model's weights are laid out: channels last, but for Apple's MPS, where they stay as they are."""
    return torch.preserve_format if device.type == "mps" else torch.channels_last


# --- files ------------------------------------------------------------------------------------------------


LONGEST_NAME = 100  # bytes that a draft takes over from its file's name: file systems allow 143 to 255 for all of it
# What a file system says that has no flushing: what was written is there all the same.
NO_FLUSHING = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes its place only when it is complete and on the disk.

    Raises:
        OSError: it cannot be written; `filename` is its path.
    """
    draft = draft_of(path)
    try:
        draft.unlink(missing_ok=True)  # one that a killed run left may be a second name of a whole checkpoint
        with open(draft, "wb") as file:
            yield file
            file.flush()
            flush(file.fileno())
        os.replace(draft, path)
    except BaseException as error:
        with suppress(OSError):  # the disk that is gone must not hide what went wrong
            draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and str(error.filename) in ("None", str(draft)):
            error.filename = str(path)
        raise
    flush_folder(path.parent)


def draft_of(path: Path) -> Path:
    """Where a file is written before it takes its place. Its name is no longer than a file's may be."""
    name = os.fsencode(path.name)
    short = path.name if len(name) <= LONGEST_NAME else hashlib.blake2b(name, digest_size=8).hexdigest()
    return path.with_name(f".{short}.part")


def flush(descriptor: int) -> None:
    """Onto the disk, as far as its file system can be asked for that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FLUSHING:
            raise


def flush_folder(folder: Path) -> None:
    """The names in a folder, after one of them has taken its place.

    Raises:
        OSError: the disk fails; `filename` is the folder.
    """
    if os.name != "posix":  # elsewhere a folder cannot be opened, and a rename needs no flushing
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # one that may be written to and not be listed
        return
    try:
        flush(descriptor)
    except OSError as error:
        error.filename = str(folder)
        raise
    finally:
        os.close(descriptor)


@contextmanager
def writing_to(what: str) -> Iterator[None]:
    """What cannot be written within the block is told as one line, `what` at its beginning.

    Raises:
        CheckpointError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) not in what else ""
        raise CheckpointError(f"{what} cannot be written: {error.strerror}{where}") from None


def make_writable(folder: Path) -> None:
    """Makes a folder, with those above it, and sees early that something can be written there.

    Raises:
        OSError: it cannot; `strerror` says why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message is one line for the user."""


def read_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint to the CPU, as data only: nothing in it is executed.

    Raises:
        CheckpointError: no such file, damaged, or not one of ours.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load itself takes flipped bits for weights
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}: trainer.py makes one, or name another") from None
    except Exception as error:  # whatever a damaged or foreign file makes the readers raise
        raise CheckpointError(f"the checkpoint {path} is damaged or no checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict) or not {"model", "config", "epoch"} <= content.keys() \
            or not isinstance(content["config"], dict):  # fmt: skip
        raise CheckpointError(f"{path} is not a checkpoint of this program: it holds no model, config and epoch")
    return content


def weights_of(content: dict) -> dict[str, Tensor]:
    """The weights that a checkpoint's model was measured with: the averaged ones, where it holds both."""
    return content["average"]["model"] if content.get("average") else content["model"]


def write_csv(rows: list[dict], path: Path) -> None:
    """A row a line, floats in six digits; a column for every name that any row has."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
