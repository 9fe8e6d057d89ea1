"""What a training measures with, what a step is made of, and the processes it runs in."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from training import launching

# --- loss -------------------------------------------------------------------------------------------------


class LossCalculator(nn.Module):
    """The loss of RGBA logits against an RGBA target: colour, binary cross-entropy and soft Dice.

    Each term is a mean over images of what one image alone gives, so that a batch split over processes or
    into parts has the loss of the whole. Everything is computed in float32, under autocast too.

    Args:
        colour_weight: of L1 between the colours, inside the mask only: what lies around a person is not asked for.
        bce_weight: of the binary cross-entropy of alpha, a mean over pixels.
        dice_weight: of one minus soft Dice of alpha (Milletari et al. 2016), which small persons count in as well.
    """

    TERMS = ("colour", "bce", "dice")

    def __init__(self, colour_weight: float = 1.0, bce_weight: float = 1.0, dice_weight: float = 1.0):
        super().__init__()
        self.weights = dict(zip(self.TERMS, (colour_weight, bce_weight, dice_weight), strict=True))

    def forward(self, raw: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and its unweighted terms, detached: "colour", "bce", "dice".

        Args:
            raw: (N, 4, H, W) logits, as the model gives them.
            target: (N, 4, H, W) in [0, 1]: R, G, B and the mask.
        """
        with torch.autocast(raw.device.type, enabled=False):
            raw, target = raw.float(), target.float()
            mask = target[:, 3]
            terms = {
                "colour": colour_loss(torch.sigmoid(raw[:, :3]), target[:, :3], mask),
                "bce": F.binary_cross_entropy_with_logits(raw[:, 3], mask),
                "dice": soft_dice_loss(torch.sigmoid(raw[:, 3]), mask),
            }
            loss = sum(self.weights[name] * term for name, term in terms.items())
        return loss, {name: term.detach() for name, term in terms.items()}


def colour_loss(colours: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """L1 of colours (N, 3, H, W) inside masks (N, H, W), by the mask's area; 0 for an empty mask."""
    difference = ((colours - target).abs().mean(dim=1) * mask).sum(dim=(1, 2))
    return (difference / mask.sum(dim=(1, 2)).clamp(min=1)).mean()


def soft_dice_loss(alpha: Tensor, mask: Tensor, smooth: float = 1.0) -> Tensor:
    """One minus soft Dice of (N, H, W) in [0, 1], an image at a time; `smooth` pixels make two empty ones agree."""
    overlap = (alpha * mask).sum(dim=(1, 2))
    total = alpha.sum(dim=(1, 2)) + mask.sum(dim=(1, 2))
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()


# --- metrics: sums first, ratios last ---------------------------------------------------------------------


def _sums(length: int, device: torch.device | str) -> Tensor:
    # float64 holds pixel counts exactly up to 2**53; Apple's MPS has none.
    return torch.zeros(length, dtype=torch.float32 if "mps" in str(device) else torch.float64, device=device)


def sum_over_processes(sums: Tensor) -> None:
    """Adds up a tensor over all processes, in place; nothing to do for a process on its own."""
    if dist.is_initialized():
        dist.all_reduce(sums)


def largest_over_processes(number: Tensor) -> None:
    """The largest over all processes, in place and on the device: nobody waits for a GPU."""
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)


def largest_of_each(numbers: list[int]) -> list[int]:
    """Of each number the largest over all processes, without a GPU's having to finish its work first."""
    if not dist.is_initialized():
        return numbers
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


class SegmentationMetrics:
    """IoU and Dice as sums over images and pixels, which add up exactly over batches and processes."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.sums = _sums(6, device)  # images, their IoUs, their Dices, pixels tp, fp, fn

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


class LossMeter:
    """The mean of the loss and its terms over images, added up on the device."""

    NAMES = ("loss", *LossCalculator.TERMS)  # fixed, so that a process that got no image takes part as well

    def __init__(self, device: torch.device | str = "cpu"):
        self.sums = _sums(len(self.NAMES) + 1, device)  # the losses, then the images

    def update(self, loss: Tensor, terms: dict[str, Tensor], images: int) -> None:
        """Counts a batch's means, scalars, as those of so many images."""
        means = torch.stack([loss.detach(), *(terms[name] for name in LossCalculator.TERMS), torch.ones_like(loss)])
        usable = torch.isfinite(means).all()  # a step that is skipped must not spoil the epoch's mean
        self.sums += torch.where(usable, means.detach() * images, 0)

    def synchronize(self) -> None:
        """Adds up over all processes; call it once, before `compute`."""
        sum_over_processes(self.sums)

    def compute(self) -> dict[str, float]:
        *sums, images = self.sums.tolist()
        return {name: total / images if images else 0.0 for name, total in zip(self.NAMES, sums, strict=True)}


class Tally:
    """An epoch's figures so far: the loss and its terms, the metrics, the steps skipped, the photos not readable."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.losses, self.metrics, self.skipped = LossMeter(device), SegmentationMetrics(device), 0
        self.bad_photos: list[int] = []  # that this process met

    def update(self, loss: Tensor, terms: dict[str, Tensor], raw: Tensor, target: Tensor) -> None:
        """Counts a batch's loss, and alpha of its logits `raw` against `target`, both (N, 4, H, W)."""
        self.losses.update(loss, terms, len(target))
        self.metrics.update(raw[:, 3] > 0, target[:, 3] > 0.5)  # a logit above 0: a probability above one half

    def compute(self) -> dict[str, float]:
        """The figures over all processes; adds up over them, so call it once, or of a copy."""
        self.losses.synchronize()
        self.metrics.synchronize()
        terms = self.losses.compute()
        losses = {"loss": terms.pop("loss"), **{f"{name}_loss": value for name, value in terms.items()}}
        return losses | self.metrics.compute()

    def copy(self) -> Tally:
        return deepcopy(self)

    def state(self) -> dict:
        """This process's sums and what it met, for a checkpoint."""
        sums = {"losses": self.losses.sums.cpu(), "metrics": self.metrics.sums.cpu()}
        return {**sums, "skipped": self.skipped, "bad_photos": self.bad_photos}

    @classmethod
    def of(cls, states: list[dict], processes: Processes) -> Tally:
        """The sums that a checkpoint holds: each process its own, or the main one all where their number changed."""
        tally, same = cls(processes.device), len(states) == processes.world_size
        chosen = states[processes.rank : processes.rank + 1] if same else states if processes.is_main else []
        for state in chosen:
            tally.losses.sums += state["losses"].to(processes.device)
            tally.metrics.sums += state["metrics"].to(processes.device)
            tally.bad_photos += state.get("bad_photos", [])  # an older checkpoint does not know them
        tally.skipped = states[0]["skipped"]
        return tally


# --- the pieces of a step ---------------------------------------------------------------------------------


def to_device(batch: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """uint8 (N, 4, S, S) to the input (N, 3, S, S) and the target (N, 4, S, S), float32 in [0, 1]."""
    target = batch.to(device, non_blocking=True).float().div_(255)
    return target[:, :3].contiguous(memory_format=torch.channels_last), target


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def groups(batches: Iterator[Tensor], size: int) -> Iterator[list[Tensor]]:
    """So many batches at a time; the last group may be smaller."""
    return iter(lambda: list(islice(batches, size)), [])


def split(batches: list[Tensor], parts: int, batch_size: int) -> list[Tensor]:
    """The same photos in smaller batches: a full one as evenly as can be into `parts`, a shorter one into fewer."""
    batches = [batch for batch in batches if len(batch)]  # all photos of one may have been left out
    return [part for batch in batches for part in batch.tensor_split(-(-len(batch) * parts // batch_size))]


def gradients_shared(model: nn.Module, now: bool) -> AbstractContextManager:
    """Several processes average their gradients in a step's last backward pass, not in those that only add to them."""
    return nullcontext() if now or not hasattr(model, "no_sync") else model.no_sync()


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
        torch.cuda.empty_cache()  # only now, when the failed pass has let go of its tensors
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
    """Whether a forward and a backward pass with so many photos have room beside the rest of a training."""
    try:
        # Adam's two moments, and the gradients of the parts before.
        rest = [torch.empty_like(weights) for weights in model.parameters() for _ in range(3)]  # noqa: F841
        images, target = to_device(torch.zeros(photos, 4, image_size, image_size, dtype=torch.uint8), device)
        with autocast(device, dtype):
            raw = model(images)
        LossCalculator()(raw, target)[0].backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True


# --- processes and devices --------------------------------------------------------------------------------


class LaunchError(RuntimeError):
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


LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
)


def spread_command(
    environ: Mapping[str, str], parent_arguments: list[str], gpus: int, argv: list[str]
) -> list[str] | None:
    """The command by which a lone worker of a bare `torchrun trainer.py` replaces itself to use every GPU.

    Args:
        environ: the environment of this process.
        parent_arguments: the command line of the launcher.
        gpus: how many this process sees.
        argv: the script and its arguments.

    Returns:
        None where nothing is to be done: not under torchrun, one GPU or none, or a number was asked for.

    Raises:
        LaunchError: the same on several machines, where a new launch would need a meeting place of its own.
    """
    alone = "TORCHELASTIC_RUN_ID" in environ and environ.get("LOCAL_WORLD_SIZE") == "1"
    if not alone or gpus < 2 or _count_was_given(environ, parent_arguments, argv[0]):
        return None
    if environ.get("WORLD_SIZE") != "1":
        raise LaunchError(
            f"torchrun starts one process a machine unless told otherwise, and {gpus - 1} of the {gpus} GPUs here "
            "would stay idle: add --nproc-per-node=gpu on each machine (or --nproc-per-node=1 if you mean it)"
        )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    return [*launcher, *argv]


def _count_was_given(environ: Mapping[str, str], parent_arguments: list[str], script: str) -> bool:
    names = [os.path.basename(argument) for argument in parent_arguments]
    script_at = names.index(os.path.basename(script)) if os.path.basename(script) in names else len(names)
    options = [a.split("=")[0].replace("_", "-") for a in parent_arguments[:script_at] if a.startswith("--n")]
    abbreviated = any("--nproc-per-node".startswith(option) for option in options if option != "--n")
    return abbreviated or "PET_NPROC_PER_NODE" in environ


def use_every_gpu(argv: list[str]) -> None:
    """Replaces this process by a launch over all visible GPUs where a bare torchrun left it alone."""
    try:
        parent_arguments = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    except OSError:  # no Linux: nobody to ask, and hardly several GPUs
        return
    command = spread_command(os.environ, parent_arguments, torch.cuda.device_count(), argv)
    if command is not None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC") and k not in LAUNCHER_VARIABLES}
        os.execve(command[0], command, kept | {launching.LAUNCHER: launching.launcher()})


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
        raise LaunchError(f"{name} was asked for and {gpus} GPUs are visible: start at most one process a GPU, "
                          "or choose with --device or CUDA_VISIBLE_DEVICES")  # fmt: skip
    if device.type == "mps" and not has_mps:
        raise LaunchError("--device mps was asked for, and PyTorch finds no Apple GPU here")
    return name, ""


def start_processes(device_setting: str) -> Processes:
    """Finds this process's device and joins the others, if there are any."""
    place = {key: int(os.environ.get(key.upper(), default)) for key, default in
             {"rank": 0, "local_rank": 0, "world_size": 1, "local_world_size": 1}.items()}  # fmt: skip
    has_mps = torch.backends.mps.is_available()
    name, note = pick_device(
        device_setting, place["local_rank"], torch.cuda.device_count(), has_mps and place["local_world_size"] == 1
    )
    device = torch.device(name)
    if place["local_world_size"] > 1 and device.type != "cpu" and device_setting not in (EACH_ITS_GPU, "cuda"):
        raise LaunchError(f"--device {device_setting} would put {place['local_world_size']} processes on one device")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before anything is loaded, or every process would touch GPU 0
    if place["world_size"] > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            store = launching.meeting_place(place["rank"], place["world_size"])
        except dist.DistError as error:
            raise LaunchError(f"the processes do not find one another: {error}") from None
        ranks = {"rank": place["rank"], "world_size": place["world_size"]}
        dist.init_process_group(backend, store=store, device_id=device if device.type == "cuda" else None, **ranks)
    return Processes(device, note, **place)


def end_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def one_process_first(processes: Processes) -> Iterator[None]:
    """What fills a cache is done by one process of each machine; the others wait and then find it filled."""
    if dist.is_initialized() and processes.local_rank > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and processes.local_rank == 0:
        dist.barrier()


def on_main(work: Callable[[], Any], processes: Processes) -> Any:
    """What the main process alone does; None on the others. If it fails, they end as well, without a word."""
    try:
        result = work() if processes.is_main else None
    except Exception:
        from_main("failed")  # the others would wait for ever
        raise
    if from_main("done") == "failed":
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


def share_buffers(model: nn.Module) -> None:
    """Gives every process the main one's BatchNorm averages: those that are saved are those that are measured."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


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


def memory_format(device: torch.device) -> torch.memory_format:
    """How a model's weights are laid out: channels last, but for Apple's MPS, where they stay as they are."""
    return torch.preserve_format if device.type == "mps" else torch.channels_last


def needs_sync_batchnorm(processes: Processes, batch_size: int) -> bool:
    """Whether a process's own batch is too small for BatchNorm's statistics; PyTorch can share them on GPUs only."""
    return processes.device.type == "cuda" and processes.world_size > 1 and batch_size < 16
