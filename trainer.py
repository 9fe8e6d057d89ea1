"""Trains an attention U-Net to cut persons out of photos: RGB in, RGBA out.

    python trainer.py                            # on data/coco, with the defaults below
    python trainer.py --batch-size 16            # any setting below, for this run
    python trainer.py --sample                   # on built-in drawings, minutes on a CPU, no network
    CUDA_VISIBLE_DEVICES=0 python trainer.py     # on one GPU of a box that others use as well
    torchrun trainer.py                          # on every visible GPU
    srun python trainer.py                       # as one of the tasks of a SLURM job, each on a GPU
    python trainer.py --resume                   # goes on from the newest usable checkpoint
"""

from __future__ import annotations

import dataclasses
import math
import re
import signal
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P, or PYTHONSAFEPATH, does not look here by itself

import utils
from cutting.cutter import BOX
from datasets import COCOPersonDataset, batches, make_loader
from loading.layout import Choices
from loading.sources import data_roots
from loading.unreadable import TolerantDataset, dead_worker, name_bad_photos
from models import SMALLEST_INPUT, UNetAutoencoder
from training import curves, launching, pictures, report, resuming, runlog, starting
from training.board import Board
from training.checkpoints import BOARD, CURVES, PREVIEW, RUN_JSON, RUN_LOG, RunFolder
from training.interruptions import Stopped, Watch
from training.limits import LIMITS, check, check_batch  # noqa: F401 - the limits are asked for here
from training.run import Run
from training.schedule import Schedule, first_cycle
from training.settings import UsageError, read_settings, typed_in
from training.step import (
    SMALL_BATCH,
    Tally,
    autocast,
    find_parts,
    gradients_shared,
    groups,
    needs_sync_batchnorm,
    seed_dice,
    share_buffers,
    split,
    to_device,
)
from training.streams import steady_streams
from training.weights import WeightAverage, weight_groups
from training.writing import tried
from utils import LossCalculator, Processes, UserError, usable_cores


@dataclass
class Config:
    """Every setting and its default: edit it here, or override it for one run by its flag."""

    # --- the data
    data_root: str = "data/coco"  # folder of annotations/ and the photo folders, or of photos/ and masks/; several: a,b
    train_split: str = "train2017"  # photo folder to train on; annotations/instances_{split}.json goes with it
    val_split: str = "val2017"  # photo folder to validate on after every epoch
    category: str = "person"  # category of the annotations that is cut out; several become one: person,pedestrian
    annotations: str = ""  # a single COCO-format FILE without splits, instead of data_root
    photos: str = ""  # folder of the photos of --annotations
    val_share: float = 0.1  # of photos that have no split: so many are validated on, and their names decide which
    image_size: int = 384  # pixels: side of the square that photos are fitted into
    # --- batches
    batch_size: int = 32  # photos per process and step
    accumulate: int = 1  # batches whose gradients are added up before each step
    copy_paste: float = 0.5  # share of the training samples that another one's persons are pasted on
    num_workers: int = 12  # processes per process that load photos; never more than its share of the cores
    cache: bool = False  # keep letterboxed photos on disk once, for faster epochs
    max_bad_photos: float = 0.01  # share of a split's photos; more that cannot be read stop the run (below 200 one may)
    pin_memory: bool = True  # page-locked batches, for faster copies to a CUDA GPU
    # --- the device
    device: str = utils.EACH_ITS_GPU  # every process its own GPU; without a GPU it is mps or cpu; or e.g. cuda:1, cpu
    amp: bool = True  # on a CUDA GPU compute in bfloat16, or float16 where that is all it has
    bfloat16_on_cpu: bool = False  # compute in bfloat16 on a CPU too, where it has the instructions
    compile: bool = False  # compile the training with torch.compile: minutes at the start, faster steps after
    # --- the model
    encoder: str = "resnet34"  # one of models.ENCODERS
    pretrained: bool = True  # start the encoder from ImageNet weights, downloaded once
    encoder_weights: str = ""  # file to take those weights from instead, for a machine without network
    start_from: str = ""  # start from all weights of a trained FILE, or of the one that comes along: box
    use_attention: bool = True  # attention gates on the skips
    # --- the training
    num_epochs: int = 100  # passes over the training photos
    learning_rate: float = 1e-4  # Adam's, at the start of each cosine cycle; of a pretrained encoder
    decoder_rate: float = 10.0  # times as fast learns what starts from random values beside a pretrained encoder
    weight_decay: float = 1e-6  # Adam's L2 penalty; 0 is off
    restart_period: int = 0  # T_0: epochs of the first cosine cycle; 0 makes two that end with the run, or one
    restart_mult: int = 3  # T_mult: each cycle is so many times as long as the one before it
    grad_clip: float = 1.0  # largest norm of the gradient; 0 is off
    average_decay: float = 0.999  # of the moving average of the weights, which is measured and saved; 0 is off
    # --- the loss
    colour_weight: float = 1.0  # of the colours' L1 inside the mask
    bce_weight: float = 1.0  # of alpha's binary cross-entropy
    dice_weight: float = 2.0  # of alpha's soft Dice
    contour_weight: float = 3.0  # of alpha's binary cross-entropy near the contour alone
    # --- the run
    seed: int = 0  # of the weights, the order of the photos and the augmentations
    checkpoint_dir: str = "checkpoints"  # folder of everything that a run writes
    run_name: str = ""  # of a folder in checkpoint_dir that this run has for itself
    checkpoint_minutes: float = 15.0  # between two checkpoints within an epoch, beside the one after it; 0 is none
    keep_checkpoints: int = 5  # newest epochs whose checkpoint is kept; 0 keeps all
    log_every: int = 20  # steps between two updates of the figures beside the progress bar
    tensorboard: bool = False  # write what TensorBoard shows to tensorboard/ in the run's folder
    resume: str = ""  # go on from the newest usable checkpoint, or from the FILE that is given
    sample: bool = False  # train on built-in drawings with the small settings below


FIELDS = tuple(field.name for field in dataclasses.fields(Config))

# What --sample sets instead; a flag still overrides it.
SAMPLE = dict(
    data_root="data/sample", checkpoint_dir="checkpoints/sample", encoder="resnet18", pretrained=False,
    image_size=128, batch_size=16, num_epochs=12, learning_rate=2e-3, log_every=5,
)  # fmt: skip


# --- the run ----------------------------------------------------------------------------------------------


def main(config: Config, typed: Collection[str] = FIELDS) -> None:
    """Trains; `typed` are the settings that a run which goes on takes from `config`, and not from its checkpoint."""
    folder = RunFolder(folder_of(config), config.keep_checkpoints)
    with launching.joined(config.device) as processes, folder:
        config, found = find_start(config, typed, processes, folder)
        folder.keep = config.keep_checkpoints
        train_loader, val_loader = open_data(config, processes, found)
        run = start_run(config, processes, found)
        begin(run, config, folder, train_loader, val_loader)
        with Watch(run, folder, config.checkpoint_minutes) as watch:
            for epoch in range(run.epochs_done, config.num_epochs):
                training = train_one_epoch(run, train_loader, epoch, config, watch)
                share_buffers(run.model, run.evaluated)
                validation = validate(run, val_loader, watch)
                write_down(run, training, validation, val_loader.dataset, folder)
                watch.restart_clock()
        finish(run, folder)


def train_one_epoch(run: Run, loader: DataLoader, epoch: int, config: Config, watch: Watch) -> dict[str, float]:
    """Trains on every photo once, or on those that are left. Returns the epoch's figures over all processes."""
    run.begin_epoch()
    done, steps = run.step * config.accumulate, math.ceil(len(loader) / config.accumulate)
    progress = report.Progress(loader, f"epoch {epoch + 1}/{config.num_epochs}", run.processes.is_main,
                               config.log_every * config.accumulate, done, run.device)  # fmt: skip
    for group in groups(progress.over(batches(loader, epoch, done)), config.accumulate):
        seed_dice(seed_from(config.seed, epoch, run.step, run.processes.rank), run.device)  # dropout after a resume
        run.guard.begin_step()
        run.optimizer.zero_grad(set_to_none=True)
        parts, photos = split(group, run.parts, config.batch_size), sum(map(len, group))
        for part in parts:
            images, target = to_device(part, run.device, config.copy_paste)
            with gradients_shared(run.parallel_model, part is parts[-1]):
                with autocast(run.device, run.amp_dtype):
                    raw = run.parallel_model(images)
                loss, terms = run.criterion(raw, target)
                run.scaler.scale(loss * (len(part) / photos)).backward()
            run.guard.add_loss(loss)
            run.tally.update(loss, terms, raw, target)
        run.scaler.unscale_(run.optimizer)  # before the clipping, which is meant for the real gradients
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
        run.guard.step(run.optimizer, run.scaler, norm)
        run.end_step(epoch, steps, config.log_every)
        progress.show(loss, terms, run.learning_rate)
        run.board.after_step(epoch * steps + run.step, loss, terms, run.learning_rate)
        watch.between_steps()
    watch.after_steps()
    return run.end_training() | progress.speed(run.processes.world_size)


@torch.inference_mode()
def validate(run: Run, loader: DataLoader, watch: Watch) -> dict[str, float]:
    """Measures the model on every validation photo, each in one process. Returns the figures over all of them."""
    model = run.evaluated.eval()
    tally, progress = Tally(run.criterion, run.device), report.Progress(loader, "validation", run.processes.is_main)
    common = len(loader.dataset) // run.processes.world_size // loader.batch_size  # batches that every process has
    for number, batch in enumerate(progress.over(batches(loader, 0))):
        for part in split([batch], run.parts, loader.batch_size):
            images, target = to_device(part, run.device)
            with autocast(run.device, run.amp_dtype):
                raw = model(images)
            tally.update(*run.criterion(raw, target), raw, target)
        if number < common:
            watch.between_steps()
    watch.after_steps()
    return tally.compute()


def seed_from(*numbers: int) -> int:
    """One seed from several numbers, so that (seed 1, epoch 2) is not (seed 2, epoch 1)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# --- before the epochs ------------------------------------------------------------------------------------


def find_start(
    config: Config, typed: Collection[str], processes: Processes, folder: RunFolder
) -> tuple[Config, tuple[Path, dict] | None]:
    """The checkpoint to go on from, if any, and the settings, which are then its own but for what was typed.

    The main process's disk decides: others may have none, or another one.
    """

    def find() -> tuple[dict, tuple[Path, dict] | None]:
        folder.claim()
        wanted = dataclasses.asdict(config)
        found = resuming.find_checkpoint(folder.path, config.resume, dataclasses.asdict(Config()))
        if found is None:
            return wanted, None
        settings = resuming.settings_to_go_on_with(found, wanted, typed)
        check_batch(Config(**settings))
        print(resuming.described(found, settings, wanted, processes.world_size), flush=True)
        return settings, found

    settings, found = utils.on_main(find, processes)
    own = {name: getattr(config, name) for name in resuming.OF_THIS_START}
    return Config(**settings | own), found


def open_data(
    config: Config, processes: Processes, found: tuple[Path, dict] | None = None
) -> tuple[DataLoader, DataLoader]:
    """The loaders of this process's share of the training and the validation photos: those of the checkpoint, if any.

    Raises:
        DataError: they cannot be used.
        ResumeError: they are not those that the checkpoint to go on from was trained beside.
    """
    with launching.one_process_first(processes):
        if config.sample:
            draw_sample(config)
        choices = Choices(config.category, config.annotations, config.photos, config.val_share)
        options = {"seed": config.seed, "cache": config.cache, "other_splits": (config.train_split, config.val_split),
                   "choices": choices}  # fmt: skip
        train, val = (
            TolerantDataset(
                COCOPersonDataset(config.data_root, split, config.image_size, training, **options),
                training, config.max_bad_photos, folder_of(config),
            )
            for split, training in ((config.train_split, True), (config.val_split, False))
        )  # fmt: skip
    if found:
        settings = dataclasses.asdict(config)
        utils.on_main(lambda: resuming.refuse_other_data(found, settings, train.dataset, val.dataset), processes)
    workers = workers_per_process(config.num_workers, usable_cores(), launching.sharing_cores(processes))
    pin_memory = config.pin_memory and processes.device.type == "cuda"
    place = {"rank": processes.rank, "world_size": processes.world_size, "pin_memory": pin_memory}
    train_loader = make_loader(train, config.batch_size, workers, training=True, **place)
    if len(train_loader.sampler) == 1 and config.image_size == SMALLEST_INPUT:
        raise UsageError(f"one training photo a process at --image-size {SMALLEST_INPUT} leaves BatchNorm a single "
                         "value: make --image-size larger, or add photos")  # fmt: skip
    return train_loader, make_loader(val, config.batch_size, workers, training=False, **place)


def folder_of(config: Config) -> Path:
    """Where a run writes."""
    return Path(config.checkpoint_dir, config.run_name)


def workers_per_process(wanted: int, cores: int, processes: int) -> int:
    return min(wanted, max(1, cores // processes))


def draw_sample(config: Config) -> None:
    from tools import make_sample  # only a sample run needs it

    try:
        make_sample.draw_sample(data_roots(config.data_root)[0])
    except OSError as error:
        raise UsageError(f"the sample cannot be drawn: {error}") from None


def start_run(config: Config, processes: Processes, found: tuple[Path, dict] | None = None) -> Run:
    """The model and what trains it, from the first weights or from the checkpoint that was found."""
    torch.manual_seed(config.seed)
    model = build_model(config, processes, is_new=found is None)
    amp_dtype = utils.autocast_dtype(processes.device, config.amp, config.bfloat16_on_cpu)
    parts = 1
    if processes.device.type == "cuda":
        # The fastest convolutions for the few shapes that batches have are found by trying them, once for each; the
        # sample is over before that pays. The memory that they want is in the trial.
        torch.backends.cudnn.benchmark = not config.sample
        parts = find_parts(model, config.batch_size, config.image_size, processes.device, amp_dtype)
    if needs_sync_batchnorm(processes, config.batch_size // parts, config.image_size):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = build_optimizer(model, config)
    first = first_cycle(config.num_epochs, config.restart_period, config.restart_mult)
    scheduler = Schedule(optimizer, first, config.restart_mult)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=amp_dtype == torch.float16)
    criterion = LossCalculator(config.colour_weight, config.bce_weight, config.dice_weight, config.contour_weight)
    average = WeightAverage(model, config.average_decay) if config.average_decay else None
    is_trained = bool(config.pretrained or config.start_from)
    keeps_statistics = is_trained and config.batch_size < SMALL_BATCH and found is None  # else the checkpoint knows
    run = Run(processes, dataclasses.asdict(config), model, model, criterion, optimizer, scaler=scaler,
              scheduler=scheduler, average=average, amp_dtype=amp_dtype, parts=parts,
              keeps_statistics=keeps_statistics, board=Board(config.tensorboard))  # fmt: skip
    if found:
        run.restore(*found)
    run.parallel_model = parallel(model, processes)
    if config.compile:  # a wrapper: validation and what is saved stay those of the plain model
        # Static: for an epoch's shorter last batch it compiles once more, and the others stay as fast as they were.
        run.parallel_model = torch.compile(run.parallel_model, dynamic=False)
    return run


def build_model(config: Config, processes: Processes, is_new: bool) -> UNetAutoencoder:
    """The model on its device; a new run's with the weights to start from, which a resume brings along itself."""
    pretrained = from_imagenet(config) and is_new
    weights_file = config.encoder_weights or None if pretrained else None
    with launching.one_process_first(processes):  # one downloads, all load
        model = UNetAutoencoder(config.encoder, pretrained, config.use_attention, weights_file)
    if config.start_from and is_new:
        starting.load_weights(model, trained_file(config.start_from))
    return model.to(processes.device, memory_format=utils.memory_format(processes.device))


def build_optimizer(model: UNetAutoencoder, config: Config) -> Adam:
    decoder_rate = config.decoder_rate if from_imagenet(config) else 1  # else all is random, or nothing
    groups = weight_groups(model, config.learning_rate, decoder_rate)
    # Fused, it skips float16's overflows on the GPU itself, where others would wait for the answer at every step.
    return Adam(groups, weight_decay=config.weight_decay, fused=True)


def from_imagenet(config: Config) -> bool:
    """Whether the encoder is trained and the rest of the model random."""
    return config.pretrained and not config.start_from


def parallel(model: nn.Module, processes: Processes) -> nn.Module:
    """The model as several processes train it together; as it is where there is one."""
    if processes.world_size == 1:
        return model
    devices = [processes.device] if processes.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
    # The main process's BatchNorm averages are shared once an epoch instead. The argument has another name in newer
    # releases of PyTorch than in older ones; the attribute has this one in all.
    wrapped.broadcast_buffers = False
    return wrapped


def begin(run: Run, config: Config, folder: RunFolder, train_loader: DataLoader, val_loader: DataLoader) -> None:
    """Gives the run its photos and makes the folder its own; tells of it."""
    run.dataset = train_loader.dataset
    went_back = run.source == Path(config.resume)
    utils.on_main(lambda: folder.take_over(run, went_back), run.processes)
    runlog.keep_in(folder.path / RUN_LOG, run.processes.rank)
    if not run.processes.is_main:
        return
    run.data = resuming.contents(train_loader.dataset.dataset, val_loader.dataset.dataset)
    changed = {name: value for name, value in run.settings.items() if value != getattr(Config, name)}
    print(report.describe(run, changed, folder.path, train_loader, val_loader), flush=True)
    if run.epochs_done >= config.num_epochs:
        done = "the epoch is" if config.num_epochs == 1 else f"all {config.num_epochs} epochs are"
        print(f"{done} done: a higher --num-epochs goes on", flush=True)
    else:
        tried(lambda: report.write_run(run, folder.path / RUN_JSON))
        steps = math.ceil(len(train_loader) / config.accumulate)
        run.board.begin(folder.path / BOARD, run.settings, run.epochs_done * steps + run.step)


# --- after each epoch -------------------------------------------------------------------------------------


def write_down(run: Run, training: dict, validation: dict, val: TolerantDataset, folder: RunFolder) -> None:
    """An epoch's figures, checkpoints and pictures. The disk is not waited for."""
    bad_photos = name_bad_photos(run.dataset, val, run.processes)
    run.end_epoch(report.history_row(run.epochs_done + 1, training, validation, bad_photos))
    if not run.processes.is_main:
        return
    is_best = validation["iou"] > run.best_iou or not folder.has_best()
    run.best_iou = validation["iou"] if is_best else run.best_iou
    folder.save_epoch(run, run.result(validation) if is_best else None)
    draw(run, val, folder)
    print(report.epoch_lines(run.history[-1], run.settings["num_epochs"], is_best, folder.path), flush=True)


def draw(run: Run, val: TolerantDataset, folder: RunFolder) -> None:
    """An epoch's pictures, and its figures for TensorBoard, which shows one of them."""
    shown, history = pictures.preview(run, val), [*run.history]
    folder.later(lambda: pictures.save_sheet(*shown, folder.path / PREVIEW))
    folder.later(lambda: curves.save_curves(history, folder.path / CURVES))
    folder.later(lambda: run.board.after_epoch(history[-1], folder.path / PREVIEW))


def finish(run: Run, folder: RunFolder) -> None:
    if run.processes.is_main:
        folder.insist(run)
        print(report.best_line(run, folder.path), flush=True)


# --- the command line -------------------------------------------------------------------------------------


SPECIAL = {"resume": {"nargs": "?", "const": resuming.NEWEST, "metavar": "FILE"}}  # argparse's options of a flag


def parse(argv: list[str]) -> Config:
    """The settings: the defaults, those of --sample over them, the flags over both.

    A run that goes on from a file which is named writes beside it, unless a folder is named as well.

    Raises:
        UsageError: an unknown flag, a wrong type, a value out of range.
    """
    if any(argument.split("=")[0] == "--evaluate" for argument in argv):
        raise UsageError("--evaluate is a command of its own: python evaluate.py checkpoints/best_model.pth")
    presets = {"sample": lambda _: SAMPLE, "start_from": lambda name: starting.settings_of(trained_file(name))}
    config = read_settings(argv, Config, __doc__, presets, SPECIAL)
    file_named = config.resume not in ("", resuming.NEWEST)
    if file_named and not {"checkpoint_dir", "run_name"} & {*typed_in(argv, Config, SPECIAL)}:
        config = dataclasses.replace(config, checkpoint_dir=str(Path(config.resume).parent), run_name="")
    check(config)
    return config


def trained_file(name: str) -> Path:
    """What --start-from names."""
    return BOX if name == "box" else Path(name)


def run_command(argv: list[str]) -> int:
    """The whole program. Returns its exit code: 0, 2 for a user's mistake, 128 and its number after a signal."""
    steady_streams()
    with runlog.recorded():
        try:
            config = parse(argv[1:])
            launching.use_every_gpu(argv, config.device)
            main(config, typed_in(argv[1:], Config, SPECIAL))
        except Stopped as stop:
            return stop.code
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would cut off the ending of the workers
            print("\nstopped; --resume goes on after the last whole epoch", file=sys.stderr)
            return 130
        except (UserError, RuntimeError) as error:
            if not (message := for_the_user(error)):
                raise
            print(f"trainer.py: error: {message}", file=sys.stderr)
            return 2
    return 0


def for_the_user(error: Exception) -> str:
    """An error as one line; "" for one that is no user's."""
    if utils.lacks_memory(error):  # after the trial at the start: another has taken what was free then
        return "the GPU's memory is used up: free some, and trainer.py --resume goes on"
    if isinstance(error, UserError):  # one from a loader worker comes wrapped in the worker's traceback
        return re.sub(r"^[\w.]*Error: ", "", str(error).strip().splitlines()[-1])
    return dead_worker(error)


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
