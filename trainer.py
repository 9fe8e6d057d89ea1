"""Trains an attention U-Net to cut persons out of photos: RGB in, RGBA out.

    python trainer.py                            # on data/coco, with the defaults below
    python trainer.py --batch-size 16            # any setting below, for this run
    python trainer.py --sample                   # on built-in drawings, minutes on a CPU, no network
    CUDA_VISIBLE_DEVICES=0 python trainer.py     # on one GPU of a box that others use as well
    torchrun trainer.py                          # on every visible GPU
    python trainer.py --resume                   # goes on from the newest usable checkpoint
"""

from __future__ import annotations

import math
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torch.utils.data import DataLoader

import evaluate
import utils
from datasets import COCOPersonDataset, batches, make_loader
from loading.unreadable import SKIPPED, TolerantDataset, dead_worker, name_bad_photos
from models import ENCODERS, SMALLEST_INPUT, UNetAutoencoder
from training import checkpoints, launching, report, step
from training.interruptions import Stopped, Watch
from training.report import describe, history_row
from training.resuming import (
    NEWEST,
    ConfigError,
    Run,
    claim_folder,
    contents,
    find_checkpoint,
    insist_on_saving,
    prepare_folder,
    save_epoch,
    save_unfinished,
    saved_when_stopped,
    tried,
)
from training.settings import flag, read_settings
from training.step import FiniteSteps, Tally, autocast, groups, split, to_device
from utils import LossCalculator, Processes, UserError, usable_cores


@dataclass
class Config:
    """Every setting and its default: edit it here, or override it for one run by its flag."""

    data_root: str = "data/coco"  # folder that holds annotations/ and the photo folders
    train_split: str = "train2017"  # photo folder to train on; annotations/instances_{split}.json goes with it
    val_split: str = "val2017"  # photo folder to validate on after every epoch
    image_size: int = 384  # pixels: side of the square that photos are fitted into
    batch_size: int = 32  # photos per process and step
    accumulate: int = 1  # batches whose gradients are added up before each step
    num_workers: int = 12  # processes per process that load photos; never more than its share of the cores
    cache: bool = False  # keep letterboxed photos on disk once, for faster epochs
    max_bad_photos: float = 0.01  # share of a split's photos; more that cannot be read stop the run
    pin_memory: bool = True  # page-locked batches, for faster copies to a CUDA GPU
    device: str = utils.EACH_ITS_GPU  # every process its own GPU; without a GPU it is mps or cpu; or e.g. cuda:1, cpu
    amp: bool = True  # on a CUDA GPU compute in bfloat16, or float16 where that is all it has
    bfloat16_on_cpu: bool = False  # compute in bfloat16 on a CPU too, where it has the instructions
    compile: bool = False  # compile the training with torch.compile: minutes at the start, faster steps after
    encoder: str = "resnet34"  # one of models.ENCODERS
    pretrained: bool = True  # start the encoder from ImageNet weights, downloaded once
    encoder_weights: str = ""  # file to take those weights from instead, for a machine without network
    use_attention: bool = True  # attention gates on the skips
    num_epochs: int = 100  # passes over the training photos
    learning_rate: float = 1e-4  # Adam's, at the start of each cosine cycle
    weight_decay: float = 1e-6  # Adam's L2 penalty; 0 is off
    restart_period: int = 0  # T_0: epochs of the first cosine cycle; 0 is one cycle over the whole run
    restart_mult: int = 1  # T_mult: each cycle is so many times as long as the one before it
    grad_clip: float = 1.0  # largest norm of the gradient; 0 is off
    colour_weight: float = 1.0  # of the colours' L1 inside the mask
    bce_weight: float = 1.0  # of alpha's binary cross-entropy
    dice_weight: float = 1.0  # of alpha's soft Dice
    seed: int = 0  # of the weights, the order of the photos and the augmentations
    checkpoint_dir: str = "checkpoints"  # folder of everything that a run writes
    checkpoint_minutes: float = 15.0  # between two checkpoints within an epoch, beside the one after it; 0 is none
    keep_checkpoints: int = 5  # newest epochs whose checkpoint is kept; 0 keeps all
    log_every: int = 20  # steps between two updates of the figures beside the progress bar
    resume: str = ""  # go on from the newest usable checkpoint, or from the FILE that is given
    evaluate: str = ""  # measure this checkpoint on the validation photos, in full, instead of training
    sample: bool = False  # train on built-in drawings with the small settings below


# What --sample sets instead; a flag still overrides it.
SAMPLE = dict(
    data_root="data/sample", checkpoint_dir="checkpoints/sample", encoder="resnet18", pretrained=False,
    image_size=128, batch_size=16, num_epochs=12, learning_rate=2e-3, log_every=5,
)  # fmt: skip

LIMITS = {  # smallest and largest value of each number
    "image_size": (SMALLEST_INPUT, 4096), "batch_size": (1, 65536), "accumulate": (1, 65536), "num_workers": (0, 1024),
    "max_bad_photos": (0, 1), "num_epochs": (1, 10**6),
    "learning_rate": (1e-12, 10), "weight_decay": (0, 1), "restart_period": (0, 10**6), "restart_mult": (1, 100),
    "grad_clip": (0, 1e6), "colour_weight": (0, 1e6), "bce_weight": (0, 1e6), "dice_weight": (0, 1e6),
    "seed": (0, 2**32 - 1), "checkpoint_minutes": (0, 1e6), "keep_checkpoints": (0, 10**6), "log_every": (1, 10**6),
}  # fmt: skip

PREVIEW_PHOTOS = 6


# --- the run ----------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    processes = launching.start_processes(config.device)
    train_loader, val_loader = open_data(config, processes)
    data = contents(config, train_loader.dataset.dataset, val_loader.dataset.dataset) if processes.is_main else None
    claim = utils.on_main(lambda: claim_folder(config), processes)
    run = start_run(config, processes, len(train_loader.dataset), data)
    run.train_on(train_loader.dataset)
    claim = utils.on_main(lambda: prepare_folder(config, run, claim), processes)  # held until this function ends
    criterion = LossCalculator(config.colour_weight, config.bce_weight, config.dice_weight)
    if processes.is_main:
        print(describe(run, config, processes, train_loader, val_loader), flush=True)
        if run.epochs_done >= config.num_epochs:
            print(f"all {config.num_epochs} epochs are done: a higher --num-epochs goes on", flush=True)
    with saved_when_stopped(run, config, processes) as watch:
        for epoch in range(run.epochs_done, config.num_epochs):
            training = train_one_epoch(run, train_loader, criterion, epoch, config, processes, watch)
            utils.share_buffers(run.model)
            validation = validate(run.model, val_loader, criterion, processes, run.amp_dtype, run.parts, watch)
            bad_photos = name_bad_photos(train_loader.dataset, val_loader.dataset, processes)
            run.end_epoch()
            if processes.is_main:
                watch.saved(write_down(run, training, validation, bad_photos, val_loader.dataset, config))
    if processes.is_main:
        insist_on_saving(run, config)
    launching.end_processes()


def train_one_epoch(
    run: Run,
    loader: DataLoader,
    criterion: LossCalculator,
    epoch: int,
    config: Config,
    processes: Processes,
    watch: Watch | None = None,
) -> dict[str, float]:
    """Trains on every photo once, or on those that are left. Returns the epoch's figures over all processes."""
    run.model.train()
    run.tally, steps = run.tally or Tally(processes.device), math.ceil(len(loader) / config.accumulate)
    run.finite = finite = FiniteSteps(run.model, processes.device, run.tally.skipped, run.broken_in_a_row)
    progress = report.Progress(loader, f"epoch {epoch + 1}/{config.num_epochs}", processes.is_main,
                                  config.log_every * config.accumulate, run.step * config.accumulate)  # fmt: skip
    left = progress.watch(batches(loader, epoch, run.step * config.accumulate))
    for group in groups(left, config.accumulate):
        torch.manual_seed(seed_from(config.seed, epoch, run.step, processes.rank))  # dropout: the same after a resume
        finite.remember()
        run.optimizer.zero_grad(set_to_none=True)
        parts, photos, losses = split(group, run.parts, config.batch_size), sum(map(len, group)), []
        for part in parts:
            images, target = to_device(part, processes.device)
            with step.gradients_shared(run.parallel_model, part is parts[-1]):
                with autocast(processes.device, run.amp_dtype):
                    raw = run.parallel_model(images)
                loss, terms = criterion(raw, target)
                run.scaler.scale(loss * (len(part) / photos)).backward()
            losses.append(loss.detach())
            run.tally.update(loss, terms, raw.detach(), target)

        run.scaler.unscale_(run.optimizer)  # before the clipping, which is meant for the real gradients
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
        finite.step(run.optimizer, run.scaler, torch.stack(losses), norm)
        run.step += 1
        if processes.device.type == "cpu" or run.step % config.log_every == 0:  # a GPU would be waited for
            run.tally.skipped = finite.fetch()
        run.learning_rate = run.scheduler.get_last_lr()[0]
        run.scheduler.step(epoch + (run.step - run.tally.skipped) / steps)
        progress.show(loss, run.learning_rate)
        if watch and watch.ask(finite.in_a_row):
            watch.saved(save_unfinished(run, config, processes))
    run.tally.skipped, run.broken_in_a_row = finite.fetch(), finite.in_a_row
    figures = run.tally.copy().compute()  # waits for the device, so that the clock below has seen all of its work
    speed = {"learning_rate": run.learning_rate, "seconds": progress.seconds, "data_wait": progress.data_wait,
             "images_per_second": progress.images_per_second * processes.world_size}  # fmt: skip
    return figures | speed | {"skipped_steps": run.tally.skipped}


@torch.inference_mode()
def validate(
    model: nn.Module,
    loader: DataLoader,
    criterion: LossCalculator,
    processes: Processes,
    dtype: torch.dtype | None,
    parts: int = 1,
    watch: Watch | None = None,
) -> dict[str, float]:
    """Measures a model on every validation photo, each in one process. Returns the figures over all of them."""
    model.eval()
    tally, progress = Tally(processes.device), report.Progress(loader, "validation", processes.is_main, 1)
    common = len(loader.dataset) // processes.world_size // loader.batch_size  # batches that every process has
    for number, batch in enumerate(progress.watch(batches(loader, 0))):
        for part in split([batch], parts, loader.batch_size):
            images, target = to_device(part, processes.device)
            with autocast(processes.device, dtype):
                raw = model(images)
            tally.update(*criterion(raw, target), raw, target)
        if watch and number < common:
            watch.ask()
    return tally.compute()


def seed_from(*numbers: int) -> int:
    """One seed from several numbers, so that (seed 1, epoch 2) is not (seed 2, epoch 1)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# --- before the epochs ------------------------------------------------------------------------------------


def open_data(config: Config, processes: Processes) -> tuple[DataLoader, DataLoader]:
    """The loaders of this process's share of the training and the validation photos."""
    with utils.one_process_first(processes):
        if config.sample:
            draw_sample(config)
        train, val = (
            TolerantDataset(
                COCOPersonDataset(
                    config.data_root, split, config.image_size, training, seed=config.seed, cache=config.cache
                ),
                training, config.max_bad_photos, config.checkpoint_dir,
            )
            for split, training in ((config.train_split, True), (config.val_split, False))
        )  # fmt: skip
    workers = workers_per_process(config.num_workers, usable_cores(), processes.local_world_size)
    pin_memory = config.pin_memory and processes.device.type == "cuda"
    place = {"rank": processes.rank, "world_size": processes.world_size, "pin_memory": pin_memory}
    train_loader = make_loader(train, config.batch_size, workers, training=True, **place)
    if len(train_loader.sampler) == 1 and config.image_size == SMALLEST_INPUT:
        raise ConfigError(f"one training photo a process at --image-size {SMALLEST_INPUT} leaves BatchNorm a single "
                          "value: make --image-size larger, or add photos")  # fmt: skip
    return train_loader, make_loader(val, config.batch_size, workers, training=False, **place)


def measure_checkpoint(config: Config) -> None:
    """--evaluate: the checkpoint's own settings, on the validation photos that are named."""
    processes = launching.start_processes(config.device)
    if config.sample:
        with utils.one_process_first(processes):
            draw_sample(config)
    evaluate.evaluate_checkpoint(config.evaluate, config.data_root, config.val_split, processes)
    launching.end_processes()


def workers_per_process(wanted: int, cores: int, processes: int) -> int:
    return min(wanted, max(1, cores // processes))


def draw_sample(config: Config) -> None:
    from tools import make_sample  # only a sample run needs it

    try:
        make_sample.draw_sample(Path(config.data_root))
    except OSError as error:
        raise ConfigError(f"the sample cannot be drawn: {error}") from None


def start_run(config: Config, processes: Processes, photos: int, data: dict[str, str] | None = None) -> Run:
    """The model and what trains it, from the first weights or from a checkpoint of these `contents`."""
    # The main process's disk decides: on several machines the others may have no checkpoint, or another one.
    found = utils.on_main(lambda: find_checkpoint(config, processes.world_size, photos, data), processes)
    source, checkpoint = utils.from_main(found)
    pretrained = config.pretrained and checkpoint is None
    weights_file = config.encoder_weights if pretrained and config.encoder_weights else None
    with utils.one_process_first(processes):  # one downloads, all load
        model = UNetAutoencoder(config.encoder, pretrained, config.use_attention, weights_file)
    model = model.to(processes.device, memory_format=utils.memory_format(processes.device))
    amp_dtype = utils.autocast_dtype(processes.device, config.amp, config.bfloat16_on_cpu)
    on_gpu = processes.device.type == "cuda"
    parts = step.find_parts(model, config.batch_size, config.image_size, processes.device, amp_dtype) if on_gpu else 1
    if utils.needs_sync_batchnorm(processes, config.batch_size // parts):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # Fused, it skips float16's overflows on the GPU itself, where others would wait for the answer at every step.
    optimizer = Adam(model.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True)
    scheduler = CosineAnnealingWarmRestarts(optimizer, config.restart_period or config.num_epochs, config.restart_mult)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=amp_dtype == torch.float16)
    run = Run(model, model, optimizer, scheduler, scaler, amp_dtype, parts, photos, processes.world_size, source, data)
    if checkpoint is not None:
        run.restore(checkpoint, config, processes)
    if processes.world_size > 1:
        devices = [processes.device] if on_gpu else None
        run.parallel_model = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
        # The main process's BatchNorm averages are shared once an epoch instead. The argument has another name in newer
        # releases of PyTorch than in older ones; the attribute has this one in all.
        run.parallel_model.broadcast_buffers = False
    if config.compile:  # a wrapper: validation and what is saved stay those of the plain model
        run.parallel_model = torch.compile(run.parallel_model)
    return run


# --- after each epoch -------------------------------------------------------------------------------------


def write_down(
    run: Run, training: dict, validation: dict, bad_photos: dict, dataset: TolerantDataset, config: Config
) -> bool:
    """An epoch's figures, checkpoints and pictures. Returns whether its checkpoint could be written."""
    row = history_row(run.epochs_done, training, validation) | bad_photos
    run.history.append(row)
    folder = Path(config.checkpoint_dir)
    has_best = run.best or (folder / checkpoints.BEST).exists()
    is_best = validation["iou"] > run.best_iou or not has_best
    if is_best:
        run.best_iou, run.best = validation["iou"], run.result(config, validation)
    run.saved = save_epoch(run, config)
    tried(lambda: report.save_preview(*preview(run, dataset), folder / "preview.png"))
    print(report.table_line(row, config.num_epochs, is_best), flush=True)
    if said := report.bad_photos_line(row, folder / SKIPPED):
        print(said, flush=True)
    if row["skipped_steps"]:
        print(f"{row['skipped_steps']} steps had no finite loss or gradient and were skipped", flush=True)
    return run.saved


@torch.inference_mode()
def preview(run: Run, dataset: TolerantDataset) -> tuple[Tensor, Tensor]:
    """The same few validation photos every time, or the next ones that can be read: targets and predictions."""
    chosen = np.linspace(0, len(dataset) - 1, min(PREVIEW_PHOTOS, len(dataset)), dtype=int)
    device = next(run.model.parameters()).device
    images, target = to_device(torch.stack([dataset[int(index)] for index in chosen]), device)
    model = run.model.eval()
    with autocast(device, run.amp_dtype):  # one at a time: they may be more than the memory holds at once
        return target, torch.cat([model.predict(image) for image in images.split(1)])


# --- the command line -------------------------------------------------------------------------------------


def parse(argv: list[str]) -> Config:
    """The settings: the defaults, those of --sample over them, the flags over both.

    Raises:
        UsageError, ConfigError: an unknown flag, a wrong type, a value out of range.
    """
    presets = {"--sample": SAMPLE}
    special = {"resume": {"nargs": "?", "const": NEWEST, "metavar": "FILE"}, "evaluate": {"metavar": "FILE"}}
    config = read_settings(argv, Config, __doc__, presets, special)
    if "--evaluate" in argv and not config.evaluate:
        raise ConfigError("argument --evaluate: no file is named")  # a shell's variable that is not set
    check(config)
    return config


def check(config: Config) -> None:
    """Refuses what cannot be, before anything is read or written."""
    for name, (low, high) in LIMITS.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise ConfigError(f"{flag(name)} {value} is out of range: from {low} to {high}")
    if config.encoder not in ENCODERS:
        raise ConfigError(f"--encoder {config.encoder} is not known: there are {', '.join(ENCODERS)}")
    if config.evaluate and config.resume:
        raise ConfigError("--evaluate measures and --resume trains: one of them only")
    if config.encoder_weights and not config.pretrained:
        raise ConfigError("--encoder-weights needs --pretrained, which --no-pretrained or --sample has turned off")
    if config.batch_size == 1 and config.image_size == SMALLEST_INPUT:
        raise ConfigError(f"--batch-size 1 at --image-size {SMALLEST_INPUT} leaves BatchNorm a single value: "
                          "make one of them larger")  # fmt: skip


def run_command(argv: list[str]) -> int:
    """The whole program. Returns its exit code: 0, 2 for a user's mistake, 128 and its number after a signal."""
    try:
        config = parse(argv[1:])
        if config.device in (utils.EACH_ITS_GPU, "cuda"):
            launching.use_every_gpu(argv)
        if config.evaluate:
            measure_checkpoint(config)
        else:
            main(config)
    except UserError as error:
        print(f"trainer.py: error: {last_line(error)}", file=sys.stderr)
        return 2
    except Stopped as stop:
        return stop.code
    except torch.OutOfMemoryError:  # after the trial at the start: another program has taken what was free then
        print("trainer.py: error: the GPU's memory is used up: free some, and --resume goes on", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not (advice := dead_worker(error)):
            raise
        print(f"trainer.py: error: {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would cut off the ending of the workers
        print("\nstopped; --resume goes on after the last whole epoch", file=sys.stderr)
        return 130
    return 0


def last_line(error: Exception) -> str:
    """An error's message; one from a loader worker comes wrapped in the worker's traceback."""
    return re.sub(r"^[\w.]*Error: ", "", str(error).strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
