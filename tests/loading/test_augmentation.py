"""The augmentations: against albumentations' own where ours is faster, and what they promise together."""

from __future__ import annotations

import random
from itertools import combinations

import albumentations as A
import cv2
import numpy as np
import pytest

from loading import augmentation
from loading.augmentation import Augmenter, augmentations


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return np.logical_and(a, b).sum() / np.logical_or(a, b).sum()


def centre(mask: np.ndarray) -> np.ndarray:
    """(x, y) of the centre of mass, counted from the image's corner."""
    return np.argwhere(mask).mean(0)[::-1] + 0.5


def disc(side: int) -> np.ndarray:
    return cv2.circle(np.zeros((side, side), np.uint8), (side * 2 // 5, side * 9 // 20), side // 4, 255, -1)


@pytest.fixture
def photo() -> np.ndarray:
    """A square of all colours, greys among them, between two bands of padding."""
    rng = np.random.default_rng(0)
    square = np.zeros((96, 96, 3), np.uint8)
    square[16:80] = cv2.resize(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8), (96, 64))
    square[20:30] = square[20:30, :, :1]
    square[70:80] = rng.integers(0, 256, (10, 96, 3), dtype=np.uint8)
    return square


def applied(transform: A.BasicTransform, photo: np.ndarray, mask: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    A.Compose([transform], mask_interpolation=cv2.INTER_LINEAR)
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
    return transform(image=photo.copy(), mask=mask.copy(), force_apply=True)


def test_the_list_is_the_six_by_name():
    names = "HorizontalFlip RandomRotate90 ShiftScaleRotate RandomBrightnessContrast HueSaturationValue GaussianBlur"
    assert [type(transform).__name__ for transform in augmentations()] == names.split()


@pytest.mark.filterwarnings("ignore:ShiftScaleRotate")
def test_our_warp_draws_and_gives_what_that_of_albumentations_does(photo):
    settings = dict(shift_limit=0.3, scale_limit=(-0.5, -0.3), rotate_limit=45, p=1)
    for more in (dict(fill=(10, 20, 30), fill_mask=255), dict(fill=7), dict(border_mode=cv2.BORDER_REFLECT_101)):
        both = A.ShiftScaleRotate(**settings, **more), augmentation.ShiftScaleRotate(**settings, **more)
        for seed in range(20):
            theirs, ours = (applied(transform, photo, disc(96), seed) for transform in both)
            assert both[0].py_random.getstate() == both[1].py_random.getstate()
            assert all(ours[name].flags.c_contiguous for name in ours)
            assert all(np.abs(ours[name].astype(int) - theirs[name]).max() <= 1 for name in ("image", "mask"))


def test_alpha_stays_on_its_pixels():
    mask = cv2.ellipse(disc(64), (40, 44), (18, 7), 30, 0, 360, 255, -1)
    augment, white = Augmenter(), np.dstack([mask] * 3)  # the photo is white where the person is
    for seed in range(200):
        photo, moved = augment(white, mask, [seed])
        assert (photo.dtype, photo.shape, moved.dtype, moved.shape) == (np.uint8, (64, 64, 3), np.uint8, (64, 64))
        assert iou(photo[..., 1] > 127, moved > 127) > 0.85  # a blur eats of the ellipse's ends


def test_the_decisions_are_independent():
    grey, mask = np.full((32, 32, 3), 128, np.uint8), np.zeros((32, 32), np.uint8)
    mask[3:11, 4:13] = 255
    unmoved = [np.rot90(image, turns) for image in (mask, mask[:, ::-1]) for turns in range(4)]
    augment, decisions = Augmenter(), []
    for photo, moved in (augment(grey, mask, [seed]) for seed in range(500)):
        warped = not any(np.array_equal(moved > 127, image > 127) for image in unmoved)
        decisions.append((centre(moved > 127)[0] > 16, warped, (photo[16, 16] != 128).any()))
    flipped, warped, toned = np.array(decisions, float).T
    assert [flipped.mean(), warped.mean(), toned.mean()] == pytest.approx([0.5, 0.5, 0.51], abs=0.08)
    for one, other in combinations((flipped, warped, toned), 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.2


def test_any_transform_of_albumentations_may_join_the_list(monkeypatch, photo):
    more = [A.OneOf([A.GaussNoise(), A.CoarseDropout()], p=1), A.ElasticTransform(p=1), A.RandomResizedCrop((96, 96))]
    monkeypatch.setattr(augmentation, "augmentations", lambda: [*augmentations(), *more])
    outcomes = {}
    for seed in (1, 2, 1):
        image, mask = Augmenter()(photo.copy(), disc(96), [seed])
        assert (image.shape, mask.shape) == ((96, 96, 3), (96, 96))
        assert outcomes.setdefault(seed, (image.tobytes(), mask.tobytes())) == (image.tobytes(), mask.tobytes())
    assert outcomes[1] != outcomes[2]


@pytest.mark.parametrize("transform", [A.Normalize(), A.CenterCrop(32, 32), A.ToGray(num_output_channels=1)])
def test_a_transform_that_changes_the_size_or_the_dtype_is_refused(monkeypatch, photo, transform):
    monkeypatch.setattr(augmentation, "augmentations", lambda: [transform])
    transform.p = 1
    with pytest.raises(TypeError, match=r"augmentations\(\) made"):
        Augmenter()(photo, disc(96), [0])
