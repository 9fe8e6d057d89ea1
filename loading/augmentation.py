"""The augmentations of the training photos, and how they are applied to a photo and its mask."""

from __future__ import annotations

import math
import os
import random
import warnings
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before its import: it would ask the network

import albumentations as A
import cv2
import numpy as np
from albucore import sz_lut

from loading.letterbox import to_rgba


def augmentations() -> list:
    """The augmentations, applied in this order to the letterboxed square. Add or remove one by its line.

    Any of albumentations' transforms will do that keeps the photo's size and its dtype, uint8.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ShiftScaleRotate is a special case of Affine")
        return [
            A.HorizontalFlip(p=0.5),
            RandomRotate90(p=0.1),
            ShiftScaleRotate(shift_limit=0.0625, scale_limit=0.2, rotate_limit=15, p=0.5),
            A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.3),
            HueSaturationValue(hue_shift_limit=10, sat_shift_limit=20, val_shift_limit=10, p=0.3),
            A.GaussianBlur(blur_limit=(3, 5), p=0.1),
        ]


class RandomRotate90(A.RandomRotate90):
    """albumentations' own, turned by OpenCV: six times as fast as numpy's turned view and the copy that follows it."""

    TURNS = (None, cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)

    def apply(self, img: np.ndarray, factor: int, **params: Any) -> np.ndarray:
        return cv2.rotate(img, self.TURNS[factor]) if factor else img


class ShiftScaleRotate(A.ShiftScaleRotate):
    """albumentations' own, drawn in one go: OpenCV warps an RGBA image in less than half the time of RGB and A."""

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """The same draws in the same order; the matrix is written out, as there are no boxes and no shear."""
        height, width = params["shape"][:2]
        shift = self._get_translate_params((height, width))
        self._get_shear_params()
        scale = self._get_scale(self.scale, self.keep_ratio, self.balanced_scale, self.py_random)
        angle = math.radians(self.py_random.uniform(*self.rotate))
        cos, sin, x, y = math.cos(angle), math.sin(angle), width / 2 - 0.5, height / 2 - 0.5
        a, b, c, d = scale["x"] * cos, scale["y"] * sin, -scale["x"] * sin, scale["y"] * cos
        return {"matrix": np.array([[a, b, x + shift["x"] - a * x - b * y], [c, d, y + shift["y"] - c * x - d * y]])}

    def apply_with_params(self, params: dict[str, Any], image: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        fill = self.fill if isinstance(self.fill, Sequence) else (self.fill,) * 3
        warped = cv2.warpAffine(
            to_rgba(image, mask), params["matrix"], mask.shape[::-1], flags=self.interpolation,
            borderMode=self.border_mode, borderValue=(*fill, self.fill_mask),
        )  # fmt: skip
        return {"image": cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB), "mask": cv2.extractChannel(warped, 3)}


class HueSaturationValue(A.HueSaturationValue):
    """albumentations' own, each channel by one look-up table; stringzilla's are ten times as fast as OpenCV's."""

    def apply(self, img: np.ndarray, hue_shift: float, sat_shift: float, val_shift: float, **params: Any) -> np.ndarray:
        hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV)
        channels = cv2.split(hsv)
        for channel, table in zip(channels, hsv_tables(hue_shift, sat_shift, val_shift), strict=True):
            sz_lut(channel, table, inplace=True)
        return cv2.cvtColor(cv2.merge(channels, dst=hsv), cv2.COLOR_HSV2RGB, dst=hsv)


def hsv_tables(hue_shift: float, sat_shift: float, val_shift: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What becomes of the 256 values of hue, saturation and value: uint8; what is grey stays grey."""
    hue = np.mod(VALUES + hue_shift, 180)
    saturation, value = (np.minimum(np.maximum(VALUES + int(shift), 0), 255) for shift in (sat_shift, val_shift))
    saturation[0] = 0
    return hue.astype(np.uint8), saturation.astype(np.uint8), value.astype(np.uint8)


VALUES = np.arange(256)


class Augmenter:
    """Applies `augmentations()` to a square photo and its mask; what comes out depends on the seed alone."""

    def __init__(self) -> None:
        self._transforms = A.Compose(augmentations(), mask_interpolation=cv2.INTER_LINEAR, is_check_shapes=False)
        # One pair of generators for the whole list: set_random_seed() would give each transform the same
        # seed, so that a photo that is flipped would always be rotated as well.
        self._bits, self._dice = np.random.PCG64(), random.Random()
        self._transforms.set_random_state(np.random.Generator(self._bits), self._dice)

    def __call__(self, photo: np.ndarray, mask: np.ndarray, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (S, S, 3) and (S, S) to the same, maybe the very same arrays; the mask is interpolated, not yet cut.

        `seed` is any list of non-negative numbers.

        Raises:
            TypeError: a transform changed a shape or a dtype.
        """
        self._seed(seed)
        out = {"image": photo, "mask": mask}
        for transform in self._transforms.transforms:  # what Compose does, without what it checks
            out = transform(**out)
        for before, after in ((photo, out["image"]), (mask, out["mask"])):
            if (after.shape, after.dtype) != (before.shape, before.dtype):
                raise TypeError(f"augmentations() made {after.dtype} {after.shape} of {before.dtype} {before.shape}")
        return out["image"], out["mask"]

    def _seed(self, numbers: list[int]) -> None:
        self._dice.seed(repr(numbers))  # hashed by SHA-512; a fifth of the time of numpy's SeedSequence
        state = {"state": self._dice.getrandbits(128), "inc": 1}
        self._bits.state = {"bit_generator": "PCG64", "state": state, "has_uint32": 0, "uinteger": 0}
