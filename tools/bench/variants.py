"""The variants of the recipe that `ablation.py` compares, each a patch of the program while it trains.

What won is in the program itself; what lost is here, so that anyone can see it lose again.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

import albumentations as A
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pycocotools.coco import COCO
from torch import Tensor, nn

import models
import trainer
from datasets import letterbox, to_sample
from loading import augmentation
from loading.reading import read_photo
from loading.sources import Source
from models import AttentionGate, UNetAutoencoder
from trainer import Config
from utils import LossCalculator, UserError

Patched = AbstractContextManager


def model_with(change: Callable[[UNetAutoencoder], object]) -> Patched:
    """The model is changed when it is made; by hooks, which go along when it is copied for the average."""
    before = trainer.UNetAutoencoder  # that of another variant, maybe

    def made(*args: object) -> UNetAutoencoder:
        model = before(*args)
        change(model)
        return model

    return patch.object(trainer, "UNetAutoencoder", made)


def loss_of(kind: type[LossCalculator] | Callable[..., LossCalculator]) -> Patched:
    return patch.object(trainer, "LossCalculator", kind)


# --- the schedule -----------------------------------------------------------------------------------------


def warm_up(_config: Config, steps: int = 200) -> Patched:
    class WarmedUp(trainer.Schedule):
        taken = 0

        def step(self, epoch: float | None = None) -> None:
            super().step(epoch)
            self.taken += 1
            for group in self.optimizer.param_groups:
                group["lr"] *= min(1, self.taken / steps)

    return patch.object(trainer, "Schedule", WarmedUp)


# --- starting values --------------------------------------------------------------------------------------


@contextlib.contextmanager
def before(_config: Config) -> Iterator[None]:
    """As the program was: alpha from one half on, half-open gates, an encoder that learns BatchNorm's averages."""

    def change(model: UNetAutoencoder) -> None:
        nn.init.zeros_(model.decoder.head.conv.bias)
        for gate in gates_of(model):
            nn.init.zeros_(gate.psi.bias)

    turned = list_with(lambda found: [A.RandomRotate90(p=0.1) if is_quarter_turn(one) else one for one in found])
    with model_with(change), turned, patch.object(trainer, "SMALL_BATCH", 0):
        yield


def is_quarter_turn(transform: object) -> bool:
    return isinstance(transform, A.RandomRotate90)


def start_bias(_config: Config) -> Patched:
    def change(model: UNetAutoencoder) -> None:
        with torch.no_grad():
            model.decoder.head.conv.bias[-4:] = math.log(models.PERSON_SHARE / (1 - models.PERSON_SHARE))

    return model_with(change)


def start_gates(_config: Config) -> Patched:
    def change(model: UNetAutoencoder) -> None:
        for gate in gates_of(model):
            nn.init.constant_(gate.psi.bias, models.OPEN)

    return model_with(change)


def gates_of(model: UNetAutoencoder) -> list[AttentionGate]:
    return [part for part in model.modules() if isinstance(part, AttentionGate)]


def fixed_batchnorm(_config: Config) -> Patched:
    return patch.object(trainer, "SMALL_BATCH", 16)


# --- the loss ---------------------------------------------------------------------------------------------


def loss_with(extra: Callable[[Tensor, Tensor], Tensor]) -> Patched:
    """The loss and one more term of logits and masks (N, H, W), which is not told apart in the figures."""

    class WithExtra(LossCalculator):
        def forward(self, raw: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss, terms = super().forward(raw, target)
            return loss + extra(raw[:, 3].float(), target[:, 3]), terms

    return loss_of(WithExtra)


def lovasz(config: Config) -> Patched:
    photos = config.num_epochs * len(trainer.COCOPersonDataset(config.data_root, config.train_split))
    seen = 0

    def in_the_last_third(raw: Tensor, mask: Tensor) -> Tensor:
        nonlocal seen
        seen += len(raw)
        return raw.sum() * 0 if seen < photos * 2 / 3 else lovasz_hinge(raw, mask)

    return loss_with(in_the_last_third)


def lovasz_hinge(raw: Tensor, mask: Tensor) -> Tensor:
    """An image at a time (Berman et al. 2018, algorithm 1), of logits and masks (N, H, W)."""
    raw, mask = raw.flatten(1), mask.flatten(1)
    errors, order = (1 - raw * (2 * mask - 1)).sort(dim=1, descending=True)
    truth = mask.gather(1, order)
    missed = truth.sum(1, keepdim=True) - truth.cumsum(1)
    jaccard = 1 - missed / (truth.sum(1, keepdim=True) + (1 - truth).cumsum(1))
    steps = torch.cat([jaccard[:, :1], jaccard[:, 1:] - jaccard[:, :-1]], dim=1)
    return (F.relu(errors) * steps).sum(1).mean()


def jaccard(_config: Config) -> Patched:
    class Jaccard(LossCalculator):
        def forward(self, raw: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss, terms = super().forward(raw, target)
            pairs = zip(torch.sigmoid(raw[:, 3:].float()), target[:, 3:], strict=True)
            dice = torch.stack([1 - trainer.utils.soft_dice_loss(*pair) for pair in pairs])
            return loss + self.weights["dice"] * (dice - dice / (2 - dice)).mean(), terms

    return loss_of(Jaccard)


CROWD = 128  # alpha where a sample's loss does not look


@contextlib.contextmanager
def crowds(_config: Config) -> Iterator[None]:
    """What COCO outlines as one crowd counts neither as persons nor as background. Not to be joined with to_persons.

    Where a person stands before a crowd, the edge between them counts as contour; the figures of the training take
    crowds for persons.
    """

    class Marked(trainer.COCOPersonDataset):
        def __getitem__(self, index: int) -> Tensor:
            sample = super().__getitem__(index)
            if self._augment is not None and index < self._ends[-1]:  # others have been added behind, maybe
                sample[3][torch.from_numpy(self.crowd(index) > 127)] = CROWD
            return sample

        def crowd(self, index: int) -> np.ndarray:
            """Of a photo, augmented as the photo is: its dice do not depend on the pixels."""
            source, place = self._find(index)
            known = coco_of(source.layout.masks)
            numbers = known.getAnnIds([self.image_id(index)], known.getCatIds(["person"]), iscrowd=True)
            regions = [known.annToMask(one) for one in known.loadAnns(numbers)]
            width, height = source.index.size(place)
            crowd = np.max([np.zeros((height, width), np.uint8), *regions], axis=0) * np.uint8(255)
            square, _ = letterbox(crowd, self.image_size)
            photo = np.zeros((*square.shape, 3), np.uint8)
            return self._augment(photo, square, [self.seed, int(self._epoch), index])[1]

    class Blind(LossCalculator):
        def forward(self, raw: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            crowd = ((target[:, 3:] * 255).round() == CROWD) & ALPHA
            return super().forward(raw.masked_fill(crowd, -20), target.masked_fill(crowd, 0))

    with patch.object(trainer, "COCOPersonDataset", Marked), loss_of(Blind):
        yield


ALPHA = torch.tensor([False, False, False, True])[:, None, None]  # of a sample's four channels


@contextlib.contextmanager
def deep_supervision(_config: Config) -> Iterator[None]:
    sides: list[Tensor] = []

    def change(model: UNetAutoencoder) -> None:
        model.side_heads = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in models.DECODER_WIDTHS[:3])
        model.register_forward_pre_hook(lambda *_: sides.clear())
        for block, head in zip(model.decoder.blocks, model.side_heads, strict=False):
            block.register_forward_hook(lambda _block, _input, output, head=head: sides.append(head(output)))

    def of_sides(_raw: Tensor, mask: Tensor) -> Tensor:
        small = [F.adaptive_avg_pool2d(mask[:, None], side.shape[-2:]) for side in sides]
        pairs = zip(sides, small, strict=True)
        return 0.3 * sum(F.binary_cross_entropy_with_logits(side.float(), truth) for side, truth in pairs)

    with model_with(change), loss_with(of_sides):
        yield


# --- the augmentations ------------------------------------------------------------------------------------


def list_with(change: Callable[[list], list]) -> Patched:
    changed = change(augmentation.augmentations())
    return patch.object(augmentation, "augmentations", lambda: changed)


def zoom(_config: Config) -> Patched:
    closer = augmentation.ShiftScaleRotate(shift_limit=0.2, scale_limit=(-0.2, 1.0), rotate_limit=15, p=0.8)
    return list_with(lambda found: [closer if isinstance(one, A.ShiftScaleRotate) else one for one in found])


def no_rotation(_config: Config) -> Patched:
    return list_with(lambda found: [one for one in found if not is_quarter_turn(one)])


def to_persons(_config: Config) -> Patched:
    before = augmentation.Augmenter.__call__

    def closer(
        self: augmentation.Augmenter, photo: np.ndarray, mask: np.ndarray, seed: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        dice, inside = np.random.default_rng(seed), np.flatnonzero(mask > 127)
        if len(inside) and dice.random() < 0.5:
            times, size = dice.uniform(1, 2.5), len(mask)
            y, x = divmod(int(dice.choice(inside)), size)
            left, top = (int(np.clip(c - dice.random() * size / times, 0, size - size / times)) for c in (x, y))
            side = int(size / times)
            part = np.s_[top : top + side, left : left + side]
            photo, mask = (cv2.resize(image[part], (size, size)) for image in (photo, mask))
        return before(self, photo, mask, seed)

    return patch.object(augmentation.Augmenter, "__call__", closer)


def cutmix(_config: Config, share: float = 0.5) -> Patched:
    """So many of a batch's samples have a rectangle of the one that precedes them (Yun et al. 2019)."""
    before = trainer.to_device

    def mix(batch: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        chosen = torch.rand(len(batch), 1, 1, 1) < share
        return before(torch.where(chosen & rectangles(batch), batch.roll(1, dims=0), batch), *rest)

    return patch.object(trainer, "to_device", mix)


def rectangles(batch: Tensor) -> Tensor:
    """Of each sample one anywhere and of any size: bool (N, 1, S, S)."""
    size = batch.shape[-1]
    share, *centre = torch.rand(3, len(batch), 1, 1, 1)
    y, x = ((torch.arange(size) - c * size).abs() < share.sqrt() * size / 2 for c in centre)
    return y.transpose(-1, -2) & x


def colours(_config: Config) -> Patched:
    """Brightness, contrast and colours twice as far from the photo's own, and in twice as many samples."""
    others = {
        A.RandomBrightnessContrast: A.RandomBrightnessContrast(brightness_limit=0.4, contrast_limit=0.4, p=0.6),
        A.HueSaturationValue: A.HueSaturationValue(hue_shift_limit=20, sat_shift_limit=40, val_shift_limit=20, p=0.6),
    }
    return list_with(lambda found: [others.get(type(one), one) for one in found])


def nobody(_config: Config, share: float = 0.08) -> Patched:
    """So many photos more, of the first root's annotation file, in which nobody is outlined."""

    class WithOthers(trainer.COCOPersonDataset):
        def __init__(self, *args: object, **settings: object):
            super().__init__(*args, **settings)
            self.others = [] if self._augment is None else empty_photos(self.sources[0], round(share * self._ends[-1]))

        def __len__(self) -> int:
            return super().__len__() + len(self.others)

        def __getitem__(self, index: int) -> Tensor:
            if (number := index - super().__len__()) < 0:
                return super().__getitem__(index)
            photo, _ = letterbox(read_photo(*self.others[number]), self.image_size)
            empty = np.zeros(photo.shape[:2], np.uint8)
            return to_sample(*self._augment(photo, empty, [self.seed, int(self._epoch), index]))

    return patch.object(trainer, "COCOPersonDataset", WithOthers)


def empty_photos(source: Source, number: int) -> list[tuple[Path, tuple[int, int], bool | None]]:
    """So many photos without persons, as `read_photo` takes them."""
    known = coco_of(source.layout.masks)
    empty = sorted({*known.getImgIds()} - {*known.getImgIds(catIds=known.getCatIds(["person"]))})
    images = known.loadImgs(empty[:number])
    if len(images) < number:
        raise UserError(f"{source.layout.masks} has {len(images)} photos in which nobody is, not {number}")
    return [
        (source.photos / image["file_name"], (image["width"], image["height"]), source.index.is_shown)
        for image in images
    ]


@functools.cache
def coco_of(annotations: Path) -> COCO:
    """An annotation file as pycocotools reads it, without its words."""
    with contextlib.redirect_stdout(None):
        return COCO(annotations)


# --- the model --------------------------------------------------------------------------------------------


def context(_config: Config) -> Patched:
    """What the whole photo shows weighs the deepest channels (Howard et al. 2019, LR-ASPP)."""

    def weighed(decoder: nn.Module, args: tuple) -> tuple:
        *skips, deepest = args[0]
        return ([*skips, deepest * decoder.weigh(deepest)],)

    def change(model: UNetAutoencoder) -> None:
        width = model.encoder.channels[-1]
        model.decoder.weigh = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.Sigmoid())
        nn.init.constant_(model.decoder.weigh[1].bias, 2)
        model.decoder.register_forward_pre_hook(weighed)

    return model_with(change)


def dropout(_config: Config, share: float = 0.2) -> Patched:
    """So many of the deepest channels are left out of a step (Tompson et al. 2015, SpatialDropout)."""

    def without(decoder: nn.Module, args: tuple) -> tuple:
        *skips, deepest = args[0]
        return ([*skips, F.dropout2d(deepest, share, decoder.training)],)

    return model_with(lambda model: model.decoder.register_forward_pre_hook(without))


def light(_config: Config) -> Patched:
    return patch.object(models, "DECODER_WIDTHS", tuple(width // 2 for width in models.DECODER_WIDTHS))


def margin(_config: Config, pixels: int = 16) -> Patched:
    def change(model: UNetAutoencoder) -> None:
        model.register_forward_pre_hook(lambda _, args: (F.pad(args[0], (pixels,) * 4, mode="replicate"),))
        model.register_forward_hook(lambda *passed: passed[-1][..., pixels:-pixels, pixels:-pixels])

    return model_with(change)


def replicate(_config: Config) -> Patched:
    def change(model: UNetAutoencoder) -> None:
        for layer in model.decoder.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                layer.padding_mode = "replicate"
                layer._reversed_padding_repeated_twice = [1, 1, 1, 1]

    return model_with(change)


def smp(_config: Config) -> Patched:
    from tools.bench.step import SmpUNet  # needs segmentation_models_pytorch

    return patch.object(trainer, "UNetAutoencoder", SmpUNet)
