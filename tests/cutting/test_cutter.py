"""A model and a photo: known alphas, every way to give a photo, checkpoints of other kinds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

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
def test_alpha_has_a_margin_and_is_never_stretched(cut, stub, probability, alpha):
    stub(lambda red: torch.full_like(red, probability))  # 0.15 / 0.9 of 255 is 43
    rgba = cut(PICTURE)
    assert (rgba[..., 3] == alpha).all()
    np.testing.assert_array_equal(rgba[..., :3], PICTURE if alpha else 0)  # what was cut away is not in the file


def test_a_cutout_is_never_more_opaque_than_the_photo(tmp_path, cut, stub):
    stub(lambda red: torch.full_like(red, 0.5))
    rgba = np.dstack([PICTURE, np.tile(np.linspace(0, 255, 70).astype(np.uint8), (50, 1))])
    for photo in (save_picture(tmp_path / "a.png", rgba), rgba):
        np.testing.assert_array_equal(cut(photo)[..., 3], np.minimum(rgba[..., 3], 128))


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


@pytest.mark.parametrize(("size", "side"), [(None, 64), (32, 32), (100, 100)])  # the checkpoint's, smallest, no power
def test_the_network_sees_the_letterboxed_photo(stub, small_checkpoint, size, side):
    seen = []
    stub(lambda red: seen.append(red) or torch.zeros_like(red))
    assert load(small_checkpoint, "cpu", size)(PICTURE).shape == (50, 70, 4)
    assert torch.equal(seen[0], torch.from_numpy(letterbox(PICTURE, side)[0][None, ..., 0]).float() / 255)


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
