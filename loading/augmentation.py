"""The augmentations of the training photos, and how they are applied to a photo and its mask."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before its import, which would ask the network

import albumentations as A
import cv2
import numpy as np

from loading.letterbox import BARS, to_rgba


def augmentations() -> list:
    """Returns the augmentations, applied in this order to the letterboxed square. Add or remove one by its line.

    Any of albumentations' transforms may be one that keeps the photo's size and its dtype, uint8. One that brings in
    what lies beyond the square takes `border_mode`, as below: otherwise it brings in black.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ShiftScaleRotate is a special case of Affine")
        return [
            A.HorizontalFlip(p=0.5),
            A.RandomRotate90(p=0.02),
            ShiftScaleRotate(shift_limit=0.0625, scale_limit=0.2, rotate_limit=15, border_mode=BARS["reflect"], p=0.5),
            A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.3),
            A.HueSaturationValue(hue_shift_limit=10, sat_shift_limit=20, val_shift_limit=10, p=0.3),
            A.GaussianBlur(blur_limit=(3, 5), p=0.1),
        ]


class ShiftScaleRotate(A.ShiftScaleRotate):
    """albumentations' own, as one warp of an RGBA image: OpenCV takes less than half the time of RGB and A.

    The pixels are the same. A sample at 384 takes 10 % less time for it, a cached one 26 % (medians of 30 rounds).
    """

    def apply_with_params(self, params: dict[str, Any], image: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        fill = self.fill if isinstance(self.fill, Sequence) else (self.fill,) * 3
        warped = cv2.warpAffine(
            to_rgba(image, mask), params["matrix"][:2], mask.shape[::-1], flags=self.interpolation,
            borderMode=self.border_mode, borderValue=(*fill, self.fill_mask),
        )  # fmt: skip
        return {"image": cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB), "mask": cv2.extractChannel(warped, 3)}


class Augmenter:
    """Applies `augmentations()` to a square photo and its mask; the result depends on them and on the seed only.

    Beyond the square lies what the list says, or, where `bars` is "black", nothing.
    """

    def __init__(self, bars: str = "reflect") -> None:
        transforms = augmentations()
        for transform in transforms:
            if bars == "black" and hasattr(transform, "border_mode"):  # as older checkpoints were trained
                transform.border_mode = BARS[bars]
        self._transforms = A.Compose(transforms, mask_interpolation=cv2.INTER_LINEAR)
        # One pair of generators for the whole list: set_random_seed() would give each transform the same seed, so
        # that a photo that is flipped would always be rotated as well.
        self._np_bits, self._py_rng = np.random.PCG64(), random.Random()
        self._transforms.set_random_state(np.random.Generator(self._np_bits), self._py_rng)

    def __call__(self, photo: np.ndarray, mask: np.ndarray, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns an augmented photo, uint8 (S, S, 3), and mask (S, S), interpolated and not yet thresholded.

        They may be the arrays that were given. A TypeError says that a transform changed a shape or a dtype.
        """
        self._py_rng.seed(repr(seed))  # hashed by SHA-512, in a fifth of the time of numpy's SeedSequence
        state = {"state": self._py_rng.getrandbits(128), "inc": 1}
        self._np_bits.state = {"bit_generator": "PCG64", "state": state, "has_uint32": 0, "uinteger": 0}
        out = {"image": photo, "mask": mask}
        for transform in self._transforms.transforms:
            out = transform(**out)
        for before, after in ((photo, out["image"]), (mask, out["mask"])):
            if (after.shape, after.dtype) != (before.shape, before.dtype):
                raise TypeError(f"augmentations() made {after.dtype} {after.shape} of {before.dtype} {before.shape}")
        return out["image"], out["mask"]
