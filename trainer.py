"""Trains an attention U-Net to cut persons out of photos: RGB in, RGBA out.

    python trainer.py                            # on data/coco, with the defaults below
    python trainer.py --batch-size 16            # any setting below, for this run
    python trainer.py --show-data                # writes a sheet of samples with their masks, and trains nothing
    python trainer.py --sample                   # on built-in drawings, minutes on a CPU, no network
    CUDA_VISIBLE_DEVICES=0 python trainer.py     # on one GPU of a machine that others use as well
    torchrun trainer.py                          # on every visible GPU
    srun python trainer.py                       # as one of the tasks of a SLURM job, each on a GPU
    python trainer.py --resume                   # goes on from the newest usable checkpoint
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P, or PYTHONSAFEPATH, does not look here by itself

import utils
from cutting.cutter import resolve_model
from datasets import COCOPersonDataset, PhotoLoader, batches, make_loader
from loading.layout import DataOptions
from loading.sources import data_roots
from loading.unreadable import SkipUnreadable, count_unreadable
from loading.workers import usable_cores
from models import MIN_IMAGE_SIZE, UNetAutoencoder
from training import distributed, launching, pictures, resuming, run_info
from training.batches import (
    MIN_BN_PHOTOS,
    autocast,
    autocast_dtype,
    broadcast_buffers,
    copy_paste,
    find_micro_batches,
    group_batches,
    needs_sync_batchnorm,
    seed_rng,
    split_micro_batches,
    sync_gradients,
    to_model_input,
)
from training.checkpoints import CURVES, DATA_SHEET, RUN_JSON, RUN_LOG, RunFolder, try_write
from training.command_line import UsageError, open_run_log, run_cli
from training.epoch_metrics import EpochMetrics
from training.interruptions import Watch
from training.loggers import HISTORY, PREVIEW, Progress, build_loggers, check_tensorboard, history_row, log_all
from training.optim import ModelEma, Schedule, build_param_groups, first_cycle
from training.run import Run
from training.settings import check, read_settings
from utils import LossCalculator, Processes, write_csv


@dataclass
class Config:
    """Every setting and its default: edit it here, or override it for one run by its flag."""

    # --- data
    data_root: str = "data/coco"  # folder of annotations/ and the photo folders, or of photos/ and masks/; several: a,b
    train_split: str = "train2017"  # photo folder to train on; annotations/instances_{split}.json goes with it
    val_split: str = "val2017"  # photo folder to validate on after every epoch
    category: str = "person"  # category of the annotations to cut out; several become one: person,pedestrian
    annotations: str = ""  # a single COCO-format FILE without splits, instead of data_root
    photos: str = ""  # folder of the photos of --annotations or of --masks
    masks: str = ""  # folder of mask files for --photos, instead of data_root
    mask_values: str = ""  # values of mask files that are persons: 15, 1-19, 24,25, or a colour: 250,50,83
    negatives: str = ""  # FOLDER of photos without persons to train on too; data: those that the data have
    val_fraction: float = 0.1  # fraction of photos without a split to validate on; their names decide which
    image_size: int = 384  # pixels: side of the square that photos are fitted into
    bars: str = "reflect"  # what fills the square beside a photo: the photo and its mask reflected, or black
    # --- batches
    batch_size: int = 32  # photos per process and batch
    grad_accum_steps: int = 1  # batches whose gradients are accumulated for each optimiser step
    copy_paste: float = 0.5  # fraction of the training samples that another one's persons are pasted on; 0 disables it
    num_workers: int = 12  # loader workers per process, no more than its share of the cores; 0 loads without workers
    cache: bool = False  # keep letterboxed photos on disk after the first use, for faster epochs
    max_unreadable_fraction: float = 0.01  # more unreadable photos stop the run; a set under 200 may have one
    pin_memory: bool = True  # page-locked batches, for faster copies to a CUDA GPU
    # --- device
    device: str = utils.LOCAL_RANK_GPU  # each process its own GPU, or mps or cpu without one; else cuda:1, cpu, ...
    precision: str = "auto"  # auto: bfloat16 (or float16) on a CUDA GPU, float32 elsewhere
    compile: bool = False  # torch.compile the training: minutes at the start, faster steps after
    # --- model
    encoder: str = "resnet34"  # torchvision encoder
    pretrained: bool = True  # start the encoder from ImageNet weights, downloaded once
    encoder_weights: str = ""  # FILE with those weights, for a machine without network
    start_from: str = ""  # FILE, or bundled: begin with its weights, encoder and image size, and with FINE_TUNING
    use_attention: bool = True  # attention gates on the skips
    # --- training
    num_epochs: int = 100  # passes over the training photos
    learning_rate: float = 1e-4  # of a pretrained encoder, at the start of each cosine cycle
    decoder_lr_mult: float = 10.0  # multiplier for all that starts from random values, if the encoder is pretrained
    weight_decay: float = 1e-6  # L2 penalty; 0 disables it
    restart_period: int = 0  # T_0: epochs of the first cosine cycle; 0: two cycles that end with the run, or one
    restart_mult: int = 3  # T_mult: length of each cycle, in lengths of the one before it
    grad_clip: float = 1.0  # maximum norm of the gradient; 0 disables clipping
    ema_decay: float = 0.999  # exponential moving average of the weights, which is validated and saved; 0 disables it
    # --- loss: weights of its terms
    colour_weight: float = 1.0  # L1 of the colours inside the mask
    bce_weight: float = 1.0  # binary cross-entropy of alpha
    dice_weight: float = 2.0  # soft Dice of alpha
    contour_weight: float = 3.0  # binary cross-entropy of alpha near the contour
    # --- run
    seed: int = 0  # of the weights, the order of the photos and the augmentations
    checkpoint_dir: str = "checkpoints"  # folder of everything that a run writes
    run_name: str = ""  # subfolder of checkpoint_dir for this run alone
    best_metric: str = "iou"  # validation metric that picks best_model.pth
    save_every_minutes: float = 15.0  # between checkpoints within an epoch, which has one at its end anyway; 0: none
    keep_checkpoints: int = 5  # number of newest epochs whose checkpoint is kept; 0 keeps all
    log_every: int = 20  # steps between two logs of the loss within an epoch
    tensorboard: bool = False  # log to tensorboard/ in the run's folder as well
    resume: str = ""  # resume from the newest usable checkpoint, or from FILE
    show_data: bool = False  # write data.png, a sheet of samples with their masks, and end
    sample: bool = False  # train on built-in drawings with the small settings of SAMPLE


FIELDS = tuple(field.name for field in dataclasses.fields(Config))

# What --sample sets instead; a flag still overrides it.
SAMPLE = dict(
    data_root="data/sample", checkpoint_dir="checkpoints/sample", encoder="resnet18", pretrained=False,
    image_size=128, batch_size=16, num_epochs=12, learning_rate=2e-3, log_every=5,
)  # fmt: skip

# What --start-from sets instead of the defaults above, for some ten to hundred photos (docs/fine_tuning.md).
FINE_TUNING = dict(batch_size=8, num_epochs=40, learning_rate=5e-5)


def main(config: Config, explicit: Collection[str] = FIELDS) -> None:
    """Trains; `explicit` names the settings that a resumed run takes from `config`, and not from its checkpoint."""
    folder = RunFolder(folder_of(config), config.keep_checkpoints)
    with distributed.process_group(config.device) as processes, folder:
        config, checkpoint = resuming.find_start(config, explicit, processes, folder)
        folder.keep = config.keep_checkpoints
        train_loader, val_loader = open_data(config, processes, checkpoint)
        run = start_run(config, processes, checkpoint)
        open_run_folder(run, config, folder, train_loader, val_loader)
        with Watch(run, folder, config.save_every_minutes) as watch:
            for epoch in range(run.epochs_done, config.num_epochs):
                training = train_one_epoch(run, train_loader, epoch, config, watch)
                broadcast_buffers(run.model, run.eval_model)
                validation = validate(run, val_loader, watch)
                save_epoch(run, training, validation, train_loader.dataset, val_loader.dataset, folder)
                watch.restart_clock()
        finish(run, folder)


def train_one_epoch(run: Run, loader: PhotoLoader, epoch: int, config: Config, watch: Watch) -> dict[str, float]:
    """Trains on every photo once, or on those that are left. Returns the epoch's metrics over all processes."""
    run.begin_epoch()
    first = run.step * config.grad_accum_steps
    progress = Progress(loader, f"epoch {epoch + 1}/{config.num_epochs}", run.processes.is_rank0, first, run.device)
    for group in group_batches(progress.track(batches(loader, epoch, first)), config.grad_accum_steps):
        seed_rng(run.device, config.seed, epoch, run.step, run.processes.rank)  # copy-paste is the same after a resume
        run.guard.begin_step()
        run.optimizer.zero_grad(set_to_none=True)
        pasted = [copy_paste(batch.to(run.device, non_blocking=True), config.copy_paste) for batch in group]
        micro_batches, outputs = split_micro_batches(pasted, run.micro_batches, config.batch_size), []
        for micro_batch in micro_batches:
            images, target = to_model_input(micro_batch)
            with sync_gradients(run.ddp_model, is_last=micro_batch is micro_batches[-1]):
                with autocast(run.device, run.amp_dtype):
                    raw = run.ddp_model(images)
                loss, terms = run.criterion(raw, target)
                run.scaler.scale(loss * (len(micro_batch) / sum(map(len, group)))).backward()
            outputs.append((loss.detach(), terms, raw.detach()[:, 3] > 0, target[:, 3] > 0.5))
        run.scaler.unscale_(run.optimizer)  # before the clipping, which is meant for the real gradients
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)  # the guard needs it
        if run.guard.should_step(run.optimizer, [loss for loss, *_ in outputs], norm, run.scaler):
            run.optimizer.step()
        run.scaler.update()
        run.scheduler.step(run.count_step(fetch_every=config.log_every))
        if run.ema:
            run.ema.update(run.model)
        for output in outputs:
            run.metrics.update(*output)
        run.log_step(progress, loss, terms, every=config.log_every)
        watch.between_steps()
    watch.after_steps()
    return run.training_metrics() | progress.speed(run.processes.world_size)


@torch.inference_mode()
def validate(run: Run, loader: PhotoLoader, watch: Watch) -> dict[str, float]:
    """Validates on every photo, each in one process. Returns the metrics over all processes."""
    model, metrics = run.eval_model.eval(), EpochMetrics(run.criterion, run.device)
    progress = Progress(loader, "validation", run.processes.is_rank0)
    common = len(loader.dataset) // run.processes.world_size // loader.batch_size  # batches that every process has
    tracked = zip(progress.track(batches(loader, 0)), loader.batch_sampler, strict=True)
    for number, (batch, indices) in enumerate(tracked):
        own_pixels = loader.dataset.own_pixels(indices)  # what a bar shows is scored nowhere
        parts = (split_micro_batches([part.to(run.device, non_blocking=True)], run.micro_batches, loader.batch_size)
                 for part in (batch, own_pixels))  # fmt: skip
        for micro_batch, own in zip(*parts, strict=True):
            images, target = to_model_input(micro_batch)
            with autocast(run.device, run.amp_dtype):
                raw = model(images)
            loss, terms = run.criterion(raw, target)
            metrics.update(loss, terms, (raw[:, 3] > 0) & own, (target[:, 3] > 0.5) & own)
        if number < common:
            watch.between_steps()
    watch.after_steps()
    return metrics.compute()


def open_data(
    config: Config, processes: Processes, checkpoint: resuming.Checkpoint | None = None
) -> tuple[PhotoLoader, PhotoLoader]:
    """Returns the loaders of this process's shard of the training and the validation photos."""
    with distributed.local_rank0_first(processes):
        train, val = open_splits(config)
    resuming.refuse_unshared_data(processes, train.dataset, val.dataset)
    if checkpoint:
        splits: Any = train.dataset, val.dataset
        utils.run_on_rank0(lambda: resuming.refuse_other_data(checkpoint, vars(config), *splits), processes)
    cores = usable_cores() // distributed.processes_sharing_cores(processes)
    options: dict[str, Any] = {
        "num_workers": min(config.num_workers, max(1, cores)), "rank": processes.rank,
        "world_size": processes.world_size, "pin_memory": config.pin_memory and processes.device.type == "cuda",
    }  # fmt: skip
    train_loader = make_loader(train, config.batch_size, training=True, **options)
    if min(config.batch_size, len(train_loader.sampler)) == 1 and config.image_size == MIN_IMAGE_SIZE:
        raise UsageError(f"one training photo per process at --image-size {MIN_IMAGE_SIZE} leaves BatchNorm a single "
                         "value: make --image-size or --batch-size larger, or add photos")  # fmt: skip
    return train_loader, make_loader(val, config.batch_size, training=False, **options)


def open_splits(config: Config) -> tuple[SkipUnreadable, SkipUnreadable]:
    """Returns the samples of the training and of the validation split."""
    if config.sample:
        from tools import make_sample  # only a sample run needs it

        make_sample.draw_sample(data_roots(config.data_root)[0])
    return open_split(config, True), open_split(config, False)


def open_split(config: Config, is_training: bool) -> SkipUnreadable:
    """Returns the samples of the training or the validation split."""
    dataset = COCOPersonDataset(
        config.data_root,
        config.train_split if is_training else config.val_split,
        config.image_size,
        augment=is_training,
        seed=config.seed,
        cache=config.cache,
        other_splits=(config.train_split, config.val_split),
        options=data_options(config, is_training),
        bars=config.bars,
    )
    return SkipUnreadable(dataset, is_training, config.max_unreadable_fraction, folder_of(config))


def data_options(config: Config, is_training: bool) -> DataOptions:
    """Returns how the data are to be read; photos without persons are trained on, and not validated."""
    settings = {name: getattr(config, name) for name in DataOptions._fields}
    return DataOptions(**settings)._replace(negatives=config.negatives if is_training else "")


def start_run(config: Config, processes: Processes, checkpoint: resuming.Checkpoint | None = None) -> Run:
    """Returns the model and what trains it, from the first weights or from a checkpoint."""
    torch.manual_seed(config.seed)
    device, is_new = processes.device, checkpoint is None
    model = build_model(config, processes, is_new)
    amp_dtype = autocast_dtype(device, config.precision)
    micro_batches = 1
    if device.type == "cuda":  # without cudnn.benchmark, for which an H200 compiled for minutes before the second step
        micro_batches = find_micro_batches(model, config.batch_size, config.image_size, device, amp_dtype)
    if needs_sync_batchnorm(processes, config.batch_size // micro_batches, config.image_size):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = build_optimizer(model, config)
    period = first_cycle(config.num_epochs, config.restart_period, config.restart_mult)
    weights = {name: value for name, value in vars(config).items() if name.endswith("_weight")}
    run = Run(
        processes, dataclasses.asdict(config), model, model, LossCalculator(**weights), optimizer,
        Schedule(optimizer, period, config.restart_mult),
        torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16), amp_dtype,
        ema=ModelEma(model, config.ema_decay) if config.ema_decay else None, micro_batches=micro_batches,
        frozen_bn=bool(config.pretrained or config.start_from) and config.batch_size // micro_batches < MIN_BN_PHOTOS,
    )  # fmt: skip
    if checkpoint:
        run.restore(*checkpoint)
    run.ddp_model = wrap_ddp(model, processes)
    if config.compile:  # validation and checkpoints stay the plain model's
        # Static shapes: an epoch's shorter last batch compiles once more, and the others stay as fast as they were.
        run.ddp_model = torch.compile(run.ddp_model, dynamic=False)
    return run


def build_model(config: Config, processes: Processes, is_new: bool = True) -> UNetAutoencoder:
    """Returns the model on its device, with the weights to start from unless a checkpoint brings them."""
    pretrained = is_new and resuming.starts_from_imagenet(vars(config))
    weights_file = config.encoder_weights or None if pretrained else None
    with distributed.local_rank0_first(processes):  # one downloads, all load
        model = UNetAutoencoder(config.encoder, pretrained, config.use_attention, weights_file)
    if config.start_from and is_new:
        resuming.load_weights(model, Path(resolve_model(config.start_from)))
    return model.to(processes.device, memory_format=utils.memory_format(processes.device))


def build_optimizer(model: UNetAutoencoder, config: Config) -> Optimizer:
    """Returns the optimiser: any of torch's, with or without `fused`, may take Adam's place here."""
    decoder_lr_mult = config.decoder_lr_mult if resuming.starts_from_imagenet(vars(config)) else 1
    param_groups = build_param_groups(model, config.learning_rate, decoder_lr_mult)
    return Adam(param_groups, weight_decay=config.weight_decay, fused=True)


def wrap_ddp(model: nn.Module, processes: Processes) -> nn.Module:
    """Returns the model as several processes train it together; as it is where there is one."""
    if processes.world_size == 1:
        return model
    devices = [processes.device] if processes.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = False  # done once an epoch; in newer PyTorch the constructor's argument is renamed
    return wrapped


def open_run_folder(run: Run, config: Config, folder: RunFolder, train: PhotoLoader, val: PhotoLoader) -> None:
    """Gives the run its photos, claims its folder, prints the banner and opens the logs."""
    run.dataset, run.steps_per_epoch = train.dataset, math.ceil(len(train) / config.grad_accum_steps)
    went_back = run.source == Path(config.resume)
    folder.warn_if_unshared(run.processes)
    utils.run_on_rank0(lambda: folder.claim_for(run, went_back), run.processes)
    open_run_log(folder.path / RUN_LOG, run.processes.rank)
    if not run.processes.is_rank0:
        return
    run.data = resuming.describe_data(train.dataset.dataset, val.dataset.dataset)
    changed = {name: value for name, value in run.settings.items() if value != getattr(Config, name)}
    print(run_info.banner(run, changed, folder.path, train, val), flush=True)
    if run.epochs_done >= config.num_epochs:
        print(f"{utils.counted(run.epochs_done, 'epoch')} done: a higher --num-epochs goes on", flush=True)
        return
    try_write(lambda: run_info.write_run_json(run, folder.path / RUN_JSON))
    run.loggers = build_loggers(folder.path, run.settings, run.history, run.global_step)


def show_data(config: Config) -> None:
    """Writes a sheet of samples with their masks, and prints what the data are; nothing is trained."""
    train, val = open_splits(config)
    path = folder_of(config) / DATA_SHEET
    with utils.explain_write_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.save_samples(train, val, path)
    print(run_info.wrapped(run_info.data_facts(train.dataset, val.dataset) | {"samples": str(path)}), flush=True)


def save_epoch(
    run: Run, training: dict, validation: dict, train: SkipUnreadable, val: SkipUnreadable, folder: RunFolder
) -> None:
    """Logs an epoch's metrics, saves its checkpoint and draws pictures now and then."""
    unreadable = count_unreadable(train, val, run.processes)
    row = history_row(run.epochs_done + 1, training, validation, unreadable)
    is_best = run.end_epoch(row, folder.has_best())
    if not run.processes.is_rank0:
        return
    folder.save_epoch(run, run.best_model(validation) if is_best else None)
    if folder.pictures_due() or run.epochs_done == run.settings["num_epochs"]:
        history, best_metric = [*run.history], run.settings["best_metric"]
        preview = pictures.preview(run.eval_model, val, run.device, run.amp_dtype)
        folder.draw(lambda: pictures.save_sheet(*preview, folder.path / PREVIEW))
        folder.draw(lambda: pictures.save_curves(history, folder.path / CURVES, best_metric))
    if run.epochs_done == 1:
        try_write(lambda: pictures.save_samples(train, val, folder.path / DATA_SHEET))
    log_all(run.loggers, run.history[-1], run.global_step)


def finish(run: Run, folder: RunFolder) -> None:
    """Makes sure that the last epoch is saved, and names the best one."""
    if run.processes.is_rank0:
        folder.retry_final_save(run)
        try_write(lambda: write_csv(run.history, folder.path / HISTORY))  # the disk may have been full meanwhile
        for logger in run.loggers:
            try_write(logger.close)
        print(run_info.best_line(run, folder.path), flush=True)


def parse(argv: list[str]) -> tuple[Config, set[str]]:
    """Returns the settings, and the names of those that were given as flags."""
    presets = {"sample": lambda _: SAMPLE, "start_from": fine_tuning}
    special = {"resume": {"nargs": "?", "const": resuming.NEWEST, "metavar": "FILE"}}
    config, explicit = read_settings(argv, Config, __doc__, presets, special)
    if config.resume not in ("", resuming.NEWEST) and not {"checkpoint_dir", "run_name"} & explicit:
        config = dataclasses.replace(config, checkpoint_dir=str(Path(config.resume).parent), run_name="")
    check(config)
    if config.tensorboard:
        check_tensorboard()
    return config, explicit


def folder_of(config: Config) -> Path:
    """Returns the folder that a run writes to."""
    return Path(config.checkpoint_dir, config.run_name)


def fine_tuning(name: str) -> dict[str, Any]:
    """Returns what --start-from sets: how few photos are trained on, and what the weights need."""
    return FINE_TUNING | resuming.settings_of(Path(resolve_model(name)))


def run_command(argv: list[str]) -> int:
    """Runs the whole program. Returns its exit code: 0, 2 for a user's mistake, 128 + number after a signal."""

    def work() -> None:
        config, explicit = parse(argv[1:])
        if config.show_data:
            show_data(config)
        else:
            launching.spread_over_gpus(argv, config.device)
            main(config, explicit)

    oom_advice, interrupted = "free some, and --resume goes on", "stopped; --resume goes on after the last whole epoch"
    return run_cli("trainer.py", work, oom_advice, interrupted, keeps_log=True)


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
