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

DISC = cv2.circle(np.zeros((96, 96), np.uint8), (38, 43), 24, 255, -1)
RNG = np.random.default_rng(0)
PHOTO = np.zeros((96, 96, 3), np.uint8)  # a square of all colours and of greys, between two bands of padding
PHOTO[16:80] = cv2.resize(RNG.integers(0, 256, (16, 24, 3), dtype=np.uint8), (96, 64))
PHOTO[20:30] = PHOTO[20:30, :, :1]
PHOTO[70:80] = RNG.integers(0, 256, (10, 96, 3), dtype=np.uint8)


def test_the_augmentations_are_the_six_by_name():
    names = "HorizontalFlip RandomRotate90 ShiftScaleRotate RandomBrightnessContrast HueSaturationValue GaussianBlur"
    assert [type(transform).__name__ for transform in augmentations()] == names.split()


@pytest.mark.parametrize("bars", ["reflect", "black"])
def test_what_lies_beyond_a_square_of_white_is_white_as_in_a_mirror_or_black(bars):
    white, moved = np.full((96, 96, 3), 255, np.uint8), 0
    for seed in range(20):
        photo, mask = Augmenter(bars)(white, white[..., 0], [seed])
        moved += (mask == 0).any()
        assert photo[mask == 255].min() > 100 if bars == "reflect" else photo[mask == 0].max(initial=0) < 100
    assert (moved > 4) if bars == "black" else moved == 0


@pytest.mark.filterwarnings("ignore:ShiftScaleRotate")
@pytest.mark.parametrize("more", [{"fill": (9, 20, 30), "fill_mask": 255}, {"border_mode": cv2.BORDER_REFLECT_101}])
def test_our_warp_has_the_random_numbers_and_the_pixels_of_albumentations(more):
    settings = {"shift_limit": 0.3, "scale_limit": (-0.5, -0.3), "rotate_limit": 45, "p": 1, **more}
    for seed in range(8):
        results, states = [], []
        for transform in (A.ShiftScaleRotate(**settings), augmentation.ShiftScaleRotate(**settings)):
            A.Compose([transform], mask_interpolation=cv2.INTER_LINEAR)
            transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
            results.append(transform(image=PHOTO.copy(), mask=DISC.copy(), force_apply=True))
            states.append(transform.py_random.getstate())
        assert states[0] == states[1]
        for name in ("image", "mask"):
            assert results[1][name].flags.c_contiguous
            assert np.abs(results[1][name].astype(int) - results[0][name]).max() <= 1


def test_alpha_stays_on_its_pixels():
    mask = cv2.ellipse(DISC.copy(), (60, 66), (27, 10), 30, 0, 360, 255, -1)
    augment, white = Augmenter(), np.dstack([mask] * 3)  # the photo is white where the person is
    for seed in range(100):
        photo, moved = augment(white, mask, [seed])
        bright, person = photo[..., 1] > 127, moved > 127
        assert (bright & person).sum() / (bright | person).sum() > 0.85  # a blur eats of the ellipse's ends


def test_the_random_decisions_are_independent():
    grey, mask = np.full((32, 32, 3), 128, np.uint8), np.zeros((32, 32), np.uint8)
    mask[3:11, 4:13] = 255
    unmoved = [np.rot90(image, turns) for image in (mask, mask[:, ::-1]) for turns in range(4)]
    augment, decisions = Augmenter(), []
    for photo, moved in (augment(grey, mask, [seed]) for seed in range(500)):
        warped = not any(np.array_equal(moved > 127, image > 127) for image in unmoved)
        decisions.append((np.argwhere(moved > 127).mean(0)[1] > 15.5, warped, (photo[16, 16] != 128).any()))
    flipped, warped, toned = np.array(decisions, float).T
    assert [flipped.mean(), warped.mean(), toned.mean()] == pytest.approx([0.5, 0.5, 0.51], abs=0.08)
    for one, other in combinations((flipped, warped, toned), 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.2


def test_any_transform_of_albumentations_may_join_the_list(monkeypatch):
    more = [A.OneOf([A.GaussNoise(), A.CoarseDropout()], p=1), A.ElasticTransform(p=1), A.RandomResizedCrop((96, 96))]
    monkeypatch.setattr(augmentation, "augmentations", lambda: [*augmentations(), *more])
    first, second, again = (Augmenter()(PHOTO.copy(), DISC, [seed]) for seed in (1, 2, 1))
    assert all(map(np.array_equal, first, again))
    assert not any(map(np.array_equal, first, second))


@pytest.mark.parametrize("transform", [A.Normalize(), A.CenterCrop(32, 32), A.ToGray(num_output_channels=1)])
def test_a_transform_that_changes_the_size_or_the_dtype_is_refused(monkeypatch, transform):
    monkeypatch.setattr(augmentation, "augmentations", lambda: [transform])
    transform.p = 1
    with pytest.raises(TypeError, match=r"augmentations\(\) made"):
        Augmenter()(PHOTO.copy(), DISC, [0])
