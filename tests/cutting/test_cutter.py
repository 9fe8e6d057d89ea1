"""A model and a photo: known alphas, every way to give a photo, checkpoints of other kinds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import PICTURE, save_picture
from PIL import Image
from torch import nn

import utils
from cutting.cutter import describe_model, load
from cutting.photos import PhotoError
from loading.letterbox import letterbox
from models import CheckpointError, read_checkpoint


@pytest.mark.parametrize(("probability", "alpha"), [(0.05, 0), (0.2, 43), (0.95, 255)])
def test_alpha_has_a_margin_and_is_never_stretched_nor_more_than_the_photos(tmp_path, cut, stub, probability, alpha):
    stub(lambda red: torch.full_like(red, probability))  # 0.15 / 0.9 of 255 is 43
    rgba = cut(PICTURE)
    assert (rgba[..., 3] == alpha).all()
    np.testing.assert_array_equal(rgba[..., :3], PICTURE if alpha else 0)  # what was cut away is not in the file
    own = np.tile(np.linspace(0, 255, 70).astype(np.uint8), (50, 1))
    photo = save_picture(tmp_path / "a.png", np.dstack([PICTURE, own]))
    np.testing.assert_array_equal(cut(photo)[..., 3], np.minimum(own, alpha))


def test_paths_images_and_arrays_give_the_same_and_are_not_modified(tmp_path, cut):
    path, picture = save_picture(tmp_path / "a.png"), PICTURE.copy()
    image, with_alpha = Image.open(path), np.dstack([PICTURE, np.full_like(PICTURE[..., 0], 255)])
    expected = cut(picture)
    assert (expected.dtype, expected.shape) == (np.uint8, (50, 70, 4))
    for photo in (path, str(path), image, with_alpha, PICTURE[:, ::-1][:, ::-1]):
        np.testing.assert_array_equal(cut(photo), expected)
    np.testing.assert_array_equal(np.asarray(image), PICTURE)
    np.testing.assert_array_equal(picture, PICTURE)


def test_several_threads_may_use_one_cutter(cut):
    photos = [np.roll(PICTURE, 9 * n, axis=1) for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for found, photo in zip(pool.map(cut, photos), photos, strict=True):
            np.testing.assert_array_equal(found, cut(photo))


def test_what_is_no_photo_is_refused(tmp_path, cut):
    for wrong in (PICTURE / 255, PICTURE[..., 0], PICTURE[:0]):
        with pytest.raises(PhotoError, match="expected a uint8 array"):
            cut(wrong)
    path = save_picture(tmp_path / "cut.png")
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(PhotoError, match="the photo cannot be read"):
        cut(Image.open(path))


@pytest.fixture
def model(small_checkpoint, tmp_path) -> Callable[..., Path]:
    """Returns a checkpoint whose settings differ from those of `small_checkpoint`: one that is None is not known."""

    def model(weights: object = None, **settings: object) -> Path:
        content = read_checkpoint(small_checkpoint)
        config = {name: value for name, value in (content["config"] | settings).items() if value is not None}
        torch.save({**content, "config": config, "model": weights or content["model"]}, tmp_path / "model.pth")
        return tmp_path / "model.pth"

    return model


@pytest.mark.parametrize(("size", "side", "bars"), [(None, 64, "reflect"), (100, 100, "black")])
def test_the_network_sees_the_letterboxed_photo(stub, model, size, side, bars):
    seen = []
    stub(lambda red: seen.append(red) or torch.zeros_like(red))
    assert load(model(bars=bars), "cpu", size)(PICTURE).shape == (50, 70, 4)
    assert torch.equal(seen[0], torch.from_numpy(letterbox(PICTURE, side, bars)[0][None, ..., 0]).float() / 255)


def bright(side: int) -> np.ndarray:
    photo = np.zeros((200, 400, 3), np.uint8)
    photo[60 : 60 + side, 100 : 100 + side] = 255
    return photo


def test_a_second_look_is_taken_where_persons_are_small(stub, small_checkpoint, monkeypatch):
    stub(lambda red: (red > 0.5).float())

    def size_of_look(photo: np.ndarray, **options: object) -> int:
        return load(small_checkpoint, "cpu", **options).look([photo])[0].size

    assert size_of_look(bright(80)) == 160  # 8 % of the photo
    assert size_of_look(bright(100)) == 64  # 12.5 %
    assert size_of_look(bright(60), image_size=64) == 64
    assert size_of_look(cv2.resize(bright(60), (64, 32))) == 64  # there is no more to see
    stub(lambda red: (red > 0.5) * (1.0 if red.shape[1] == 64 else 0.0))
    assert size_of_look(bright(80)) == 64  # the second one has lost them
    stub(lambda red: (red > 0.5).float())
    monkeypatch.setattr("cutting.cutter.MAX_IMAGE_SIZE", 159)
    assert size_of_look(bright(80)) == 64  # no square is larger than the network takes


def test_a_second_look_takes_the_place_of_the_first_photo_by_photo(stub, small_checkpoint):
    batches: list[tuple[int, int]] = []

    def alpha(red: torch.Tensor) -> torch.Tensor:
        batches.append((len(red), red.shape[1]))
        return (red > 0.5) * (0.95 if red.shape[1] == 64 else 1.0)

    stub(alpha)
    cutter, sides = load(small_checkpoint, "cpu"), 2 * (100, 80, 0, 70, 60, 140, 50, 75, 65, 55)
    photos = [bright(side) for side in sides]
    looks = cutter.look(photos)
    assert batches == [(20, 64), *[(3, 160)] * 4, (2, 160)]  # 6.25 times the pixels
    for photo, look in zip(photos, looks, strict=True):
        assert look.size == (160 if 0 < photo.mean() / 255 < 0.1 else 64)
        square, metadata = letterbox(photo, look.size)
        np.testing.assert_array_equal(look.square, square)
        assert look.metadata == metadata
        np.testing.assert_allclose(look.probabilities, (square[..., 0] > 127) * (0.95 if look.size == 64 else 1.0))
        np.testing.assert_allclose(look.first, (letterbox(photo, 64)[0][..., 0] > 127) * 0.95)
    assert cutter.look([]) == []


@pytest.mark.parametrize(("bars", "last_row"), [(None, 255), ("reflect", 57)])  # None: an old one, of black bars
def test_persons_are_continued_to_the_border_if_the_network_was_trained_with_black_bars(model, stub, bars, last_row):
    fade = torch.ones(64, 1)
    fade[46:] = 0.25  # in the last two rows of the photo, and in the bar below it
    stub(fade.expand_as)
    alpha = load(model(bars=bars), "cpu")(np.full((32, 64, 3), 99, np.uint8))[..., 3]
    assert (alpha[-1] == last_row).all()  # 0.2 / 0.9 of 255 is 56.7
    assert (alpha[:-2] == 255).all()


@pytest.mark.parametrize(("settings", "words"), [
    ({"encoder": "vgg"}, "no encoder named 'vgg'; there are resnet18,"), ({"use_attention": False}, "Unexpected key"),
    ({"bars": "mean"}, "mean"), ({"use_attention": None}, "use_attention"), ({"weights": 5}, "Expected state_dict"),
])  # fmt: skip
def test_a_checkpoint_of_another_kind_is_refused_in_a_line(model, settings, words):
    with pytest.raises(CheckpointError, match=rf"\A.*model.pth holds no model that can be used here.*{words}.*\Z"):
        load(model(**settings), "cpu")


@pytest.mark.parametrize(("config", "metrics", "facts"), [
    ({"image_size": 64}, {"iou": 0.614}, "resnet18 at 96, trained at 64, validation IoU 0.61"),
    ({"best_metric": "global_dice"}, {"iou": 0.5, "global_dice": 0.7}, "resnet18 at 96, validation global Dice 0.70"),
    ({"sample": True}, {}, "resnet18 at 96, trained on the drawings of --sample: it does not work on photos"),
])  # fmt: skip
def test_a_model_is_described_in_a_line(config, metrics, facts):
    content = {"config": {"encoder": "resnet18", "image_size": 96} | config, "metrics": metrics}
    assert describe_model("a.pth", content, 96) == f"a.pth ({facts})"


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.float16), ("float32", None)])
def test_a_gpu_computes_in_float16_unless_the_training_did_not(model, monkeypatch, precision, dtype):
    monkeypatch.setattr(utils, "pick_device", lambda *_: ("cuda:0", ""))
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)  # as if there were a GPU
    assert load(model(precision=precision)).amp_dtype == dtype


def test_what_float16_cannot_hold_is_computed_again_in_float32(stub, small_checkpoint):
    precisions = []

    def alpha(red):
        precisions.append(torch.is_autocast_enabled("cpu"))
        return torch.full_like(red, float("nan") if precisions[-1] else 0.25)

    stub(alpha)
    cutter = load(small_checkpoint, "cpu")
    cutter.amp_dtype = torch.float16
    assert (cutter.probabilities([np.zeros((64, 64, 3), np.uint8)]) == 0.25).all()
    assert precisions == [True, False]
