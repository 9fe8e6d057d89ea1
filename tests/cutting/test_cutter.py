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


@pytest.mark.parametrize(("probability", "alpha"), [(0.0, 0), (0.05, 0), (0.2, 43), (0.5, 128), (0.95, 255), (1, 255)])
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


def test_what_is_no_photo_is_refused(tmp_path, cut):
    for wrong in (PICTURE / 255, PICTURE[..., 0], PICTURE[:0]):
        with pytest.raises(PhotoError, match="expected a uint8 array"):
            cut(wrong)
    path = save_picture(tmp_path / "cut.png")
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(PhotoError, match="the photo cannot be read"):
        cut(Image.open(path))


@pytest.mark.parametrize("bars", ["reflect", "black"])
@pytest.mark.parametrize(("size", "side"), [(None, 64), (32, 32), (100, 100)])  # the checkpoint's, smallest, no power
def test_the_network_sees_the_letterboxed_photo(stub, small_checkpoint, tmp_path, size, side, bars):
    seen = []
    stub(lambda red: seen.append(red) or torch.zeros_like(red))
    assert load(with_bars(small_checkpoint, bars, tmp_path), "cpu", size)(PICTURE).shape == (50, 70, 4)
    assert torch.equal(seen[0], torch.from_numpy(letterbox(PICTURE, side, bars)[0][None, ..., 0]).float() / 255)


def with_bars(checkpoint: Path, bars: str | None, folder: Path) -> Path:
    """Returns a checkpoint of a model that was trained with such bars; None: of a version that did not know them."""
    content = read_checkpoint(checkpoint)
    del content["config"]["bars"]
    torch.save(content | {"config": content["config"] | ({"bars": bars} if bars else {})}, folder / "a.pth")
    return folder / "a.pth"


def test_unknown_bars_are_refused(small_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="mean"):
        load(with_bars(small_checkpoint, "mean", tmp_path), "cpu")


@pytest.fixture
def looks_of(stub, small_checkpoint) -> Callable[..., list[int]]:
    """Returns the sizes of the squares in which a network that finds what is bright looks at photos together."""

    def looks_of(*photos: np.ndarray, **options: object) -> list[int]:
        seen: list[int] = []
        stub(lambda red: seen.extend([red.shape[1]] * len(red)) or (red > 0.5).float())
        assert [look.size for look in load(small_checkpoint, "cpu", **options).look([*photos])] == expected_last(seen)
        return seen

    def expected_last(seen: list[int]) -> list[int]:
        return seen if len({*seen}) == 1 else seen[-1:]

    return looks_of


def bright(side: int, height: int = 200, width: int = 400) -> np.ndarray:
    photo = np.zeros((height, width, 3), np.uint8)
    photo[60 : 60 + side, 100 : 100 + side] = 255
    return photo


def test_a_second_look_is_taken_where_persons_are_small(looks_of):
    assert looks_of(bright(80)) == [64, 128]  # 8 % of the photo
    assert looks_of(bright(100)) == [64]  # 12.5 %
    assert looks_of(bright(0)) == [64]  # nobody
    assert looks_of(bright(60), image_size=64) == looks_of(bright(60), image_size=64, foreground_only=True) == [64]
    assert looks_of(cv2.resize(bright(60), (64, 32))) == [64]  # there is no more to see


def test_a_second_look_takes_the_place_of_the_first_photo_by_photo(stub, small_checkpoint):
    batches: list[tuple[int, int]] = []

    def alpha(red: torch.Tensor) -> torch.Tensor:
        batches.append((len(red), red.shape[1]))
        return (red > 0.5) * (0.95 if red.shape[1] == 64 else 1.0)

    stub(alpha)
    cutter, sides = load(small_checkpoint, "cpu"), (100, 80, 0, 70, 60, 140, 50, 75, 65, 55)
    photos = [bright(side) for side in sides]
    looks = cutter.look(photos)
    assert batches == [(10, 64), (2, 128), (2, 128), (2, 128), (1, 128)]  # four times the pixels
    for photo, look in zip(photos, looks, strict=True):
        assert look.size == (128 if 0 < photo.mean() / 255 < 0.1 else 64)
        square, metadata = letterbox(photo, look.size)
        np.testing.assert_array_equal(look.square, square)
        assert look.metadata == metadata
        np.testing.assert_allclose(look.probabilities, (square[..., 0] > 127) * (0.95 if look.size == 64 else 1.0))
        np.testing.assert_allclose(look.first, (letterbox(photo, 64)[0][..., 0] > 127) * 0.95)
    assert cutter.look([]) == []


def test_no_square_is_larger_than_the_network_takes(stub, small_checkpoint, monkeypatch):
    stub(lambda red: (red > 0.5).float())
    monkeypatch.setattr("cutting.cutter.MAX_IMAGE_SIZE", 127)
    assert load(small_checkpoint, "cpu").look([bright(60)])[0].size == 64


@pytest.mark.parametrize(("bars", "last_row"), [(None, 255), ("black", 255), ("reflect", 57)])  # None: an old one
def test_persons_are_continued_to_the_border_if_the_network_was_trained_with_black_bars(
    tmp_path, small_checkpoint, stub, bars, last_row
):
    def fade(red: torch.Tensor) -> torch.Tensor:
        alpha = torch.ones_like(red)
        alpha[:, 46:] = 0.25  # in the last two rows of the photo, and in the bar below it
        return alpha

    stub(fade)
    alpha = load(with_bars(small_checkpoint, bars, tmp_path), "cpu")(np.full((32, 64, 3), 99, np.uint8))[..., 3]
    assert (alpha[-1] == last_row).all()  # 0.2 / 0.9 of 255 is 56.7
    assert (alpha[:-2] == 255).all()


def test_with_the_foreground_only_persons_who_are_much_smaller_are_left_out(stub, small_checkpoint):
    stub(lambda red: (red > 0.5).float())
    photo = bright(100)
    photo[60:100, 300:340] = 255
    both, alone = (load(small_checkpoint, "cpu", foreground_only=only)(photo)[..., 3] for only in (False, True))
    assert both[80, 320] == both[110, 150] == alone[110, 150] == 255
    assert not alone[:, 250:].any()


def test_several_threads_may_cut_with_one_model(cut):
    photos = [np.roll(PICTURE, 7 * n, axis=1)[: 20 + n] for n in range(12)]
    expected = [cut(photo) for photo in photos]
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for found, alone in zip(pool.map(cut, photos), expected, strict=True):
            np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("change", [
    {"model": {}}, {"model": 5}, {"config": None}, {"config": {"encoder": "vgg", "use_attention": True}},
    {"config": {"encoder": "resnet18", "use_attention": False}},
])  # fmt: skip
def test_a_checkpoint_of_another_kind_is_refused_in_a_line(tmp_path, small_checkpoint, change):
    torch.save(read_checkpoint(small_checkpoint) | change, tmp_path / "other.pth")
    line = r"\A.*other.pth (holds no model that can be used here|is not a checkpoint).{1,200}\Z"
    with pytest.raises(CheckpointError, match=line):
        load(tmp_path / "other.pth", "cpu")


@pytest.mark.parametrize(("config", "metrics", "facts"), [
    ({}, None, "resnet18 at 96"),
    ({"image_size": 64}, {"iou": 0.614}, "resnet18 at 96, trained at 64, validation IoU 0.61"),
    ({"best_metric": "global_dice"}, {"iou": 0.5, "global_dice": 0.7}, "resnet18 at 96, validation global Dice 0.70"),
    ({"sample": True}, {}, "resnet18 at 96, trained on the drawings of --sample: it does not work on photos"),
])  # fmt: skip
def test_a_model_is_described_in_a_line(config, metrics, facts):
    content = {"config": {"encoder": "resnet18", "image_size": 96} | config, "metrics": metrics}
    assert describe_model("a.pth", content, 96) == f"a.pth ({facts})"


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.float16), ("float32", None)])
def test_a_gpu_computes_in_float16_unless_the_training_did_not(
    tmp_path, small_checkpoint, monkeypatch, precision, dtype
):
    content = read_checkpoint(small_checkpoint)
    content["config"]["precision"] = precision
    torch.save(content, tmp_path / "a.pth")
    monkeypatch.setattr(utils, "pick_device", lambda *_: ("cuda:0", ""))
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)  # as if there were a GPU
    assert load(tmp_path / "a.pth").amp_dtype == dtype


def test_what_float16_cannot_hold_is_computed_again_in_float32(stub, small_checkpoint):
    precisions = []

    def alpha(red):
        precisions.append(torch.is_autocast_enabled("cpu"))
        return torch.full_like(red, float("nan") if precisions[-1] else 0.25)

    stub(alpha)
    cutter = load(small_checkpoint, "cpu")
    assert cutter.amp_dtype is None  # float32
    cutter.amp_dtype = torch.float16
    assert (cutter.probabilities([np.zeros((64, 64, 3), np.uint8)]) == 0.25).all()
    assert precisions == [True, False]
