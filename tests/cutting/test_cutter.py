"""A model and a photo: what becomes of known alphas, of every way to give a photo, of checkpoints of other kinds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import PICTURE, save_picture
from PIL import Image
from torch import nn

from cutting.cutter import Cutter, load
from cutting.photos import PhotoError
from loading.letterbox import letterbox
from models import UNetAutoencoder
from training import checkpoints
from utils import CheckpointError, UserError, read_checkpoint


def constant(value: float):
    return lambda red: torch.full_like(red, value)


def test_nobody_stays_empty_and_faint_stays_faint(cut, stub):
    for probability, alpha in ((0.0, 0), (0.05, 0), (0.2, 43), (0.5, 128), (0.95, 255), (1.0, 255)):  # 0.15 / 0.9 is 43
        stub(constant(probability))
        rgba = cut(PICTURE)
        assert (rgba[..., 3] == alpha).all()
        np.testing.assert_array_equal(rgba[..., :3], PICTURE if alpha else 0)  # what was cut away is not in it
        np.testing.assert_array_equal(cut(PICTURE, keep_background_colours=True)[..., :3], PICTURE)


def test_padding_is_cropped_and_the_rest_enlarged(cut, stub):
    """A 128 x 64 photo lies in rows 16 to 48 of the square; its left quarter is a person."""

    def alpha(red):
        square = torch.ones_like(red)  # in the padding too, where it must not be seen
        square[:, 16:48, 16:] = 0
        return square

    stub(alpha)
    found = cut(np.zeros((64, 128, 3), np.uint8))[..., 3]
    # Of one colour: the edge is filtered to 1, 0.75, 0.25, 0 on the square, then enlarged linearly, pixel centres at a
    # quarter and three quarters; of which a margin of 0.05 is taken.
    edge = np.array([0.9375, 0.8125, 0.625, 0.375, 0.1875, 0.0625])
    by_hand = np.repeat([255.0, 0.0], (29, 99))
    by_hand[29:35] = (edge - 0.05) / 0.9 * 255
    np.testing.assert_allclose(found, np.broadcast_to(by_hand, (64, 128)), atol=3)


def test_never_more_opaque_than_the_photo(tmp_path, cut, stub):
    stub(constant(0.5))
    rgba = np.dstack([PICTURE, np.tile(np.linspace(0, 255, 70).astype(np.uint8), (50, 1))])
    for photo in (save_picture(tmp_path / "a.png", rgba), rgba):
        np.testing.assert_array_equal(cut(photo)[..., 3], np.minimum(rgba[..., 3], 128))


def test_load_takes_paths_images_and_arrays_and_changes_none(tmp_path, small_checkpoint):
    cut = load(str(small_checkpoint), device="cpu")
    path = save_picture(tmp_path / "a.png")
    expected = cut(PICTURE.copy())
    assert expected.dtype == np.uint8
    assert expected.shape == (50, 70, 4)
    image, with_alpha = Image.open(path), np.dstack([PICTURE, np.full_like(PICTURE[..., 0], 255)])
    for photo in (path, str(path), image, with_alpha, PICTURE[:, ::-1][:, ::-1]):
        np.testing.assert_array_equal(cut(photo), expected)
    np.testing.assert_array_equal(np.asarray(image), PICTURE)
    for wrong in (PICTURE / 255, PICTURE[..., 0], PICTURE[:0]):
        with pytest.raises(PhotoError, match="expected a uint8 array"):
            cut(wrong)
    (tmp_path / "cut.png").write_bytes(path.read_bytes()[:-900])
    with pytest.raises(PhotoError, match="the photo cannot be read"):
        cut(Image.open(tmp_path / "cut.png"))


def test_network_sees_the_letterboxed_photo(cut, stub):
    seen = []
    stub(lambda red: seen.append(red) or torch.zeros_like(red))
    cut(PICTURE)
    assert torch.equal(seen[0], torch.from_numpy(letterbox(PICTURE, 64)[0][None, ..., 0]).float() / 255)


def test_another_image_size_is_what_the_network_sees(stub, small_checkpoint):
    seen = []
    stub(lambda red: seen.append(red) or torch.zeros_like(red))
    for size in (32, 100, None):  # a multiple of nothing as well; None is the 64 of the checkpoint
        assert load(small_checkpoint, "cpu", size)(PICTURE).shape == (50, 70, 4)
        expected = torch.from_numpy(letterbox(PICTURE, size or 64)[0][None, ..., 0]).float() / 255
        assert torch.equal(seen.pop(), expected)
    assert load(small_checkpoint, "cpu", image_size=4096).image_size == 4096
    for wrong in (31, 4097, 0, -1, "64", 64.5):
        with pytest.raises(UserError, match=rf"\Aan image size of {wrong} is out of range: from 32 to 4096 pixels\Z"):
            load(small_checkpoint, "cpu", wrong)


def test_several_threads_may_cut_with_one_model(cut):
    photos = [np.roll(PICTURE, 7 * n, axis=1)[: 20 + n] for n in range(12)]
    expected = [cut(photo) for photo in photos]
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for found, alone in zip(pool.map(cut, photos), expected, strict=True):
            np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("change", [
    {"model": {}}, {"model": 5}, {"config": {}}, {"config": None}, {"config": {"encoder": "vgg", "use_attention": 1}},
    {"config": {"encoder": "resnet18", "use_attention": False, "image_size": 64}},
    {"config": {"encoder": "mobilenet_v2", "use_attention": True, "image_size": 64}},
    {"config": {"encoder": "resnet18", "use_attention": True, "image_size": 0}},
    {"config": {"encoder": "resnet18", "use_attention": True, "image_size": "large"}},
])  # fmt: skip
def test_checkpoint_of_another_kind_is_refused(tmp_path, small_checkpoint, change):
    checkpoints.save(read_checkpoint(small_checkpoint) | change, tmp_path / "other.pth")
    line = r"\A.*other.pth (holds no model that can be used here|is not a checkpoint).{1,200}\Z"
    with pytest.raises(CheckpointError, match=line):
        load(tmp_path / "other.pth", "cpu")


def test_weights_of_16_bits_fill_a_model_of_32(tmp_path, small_checkpoint):
    content = read_checkpoint(small_checkpoint)
    half = {name: t.half() if t.is_floating_point() else t for name, t in content["model"].items()}
    torch.save(content | {"model": half}, tmp_path / "half.pth")
    cut, whole = load(tmp_path / "half.pth", "cpu"), load(small_checkpoint, "cpu")
    for name, tensor in cut.model.state_dict().items():
        assert tensor.dtype == content["model"][name].dtype
        np.testing.assert_array_equal(tensor.numpy(), content["model"][name].numpy().astype(half[name].numpy().dtype))
    np.testing.assert_allclose(cut(PICTURE)[..., 3].astype(int), whole(PICTURE)[..., 3], atol=4)
    assert np.ptp(whole(PICTURE)[..., 3]) > 50


def test_weights_alone_are_no_checkpoint(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        load(tmp_path / "weights.pth", "cpu")


# --- the network's turn -----------------------------------------------------------------------------------

SQUARES = [np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8) for n in range(3)]


def test_on_a_cpu_it_is_the_network_in_float32(cut):
    images = torch.from_numpy(np.stack(SQUARES)).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        expected = cut.model.predict(images)[:, 3].numpy()
    assert cut.amp_dtype is None
    np.testing.assert_array_equal(cut.probabilities(SQUARES), expected)


class OnGpu:
    """A tensor of a GPU that is not there."""

    device, dtype = torch.device("cuda:1"), torch.float32

    def __init__(self, values: torch.Tensor):
        self.values, self.shape = values, values.shape

    def __getitem__(self, place: object) -> OnGpu:
        return OnGpu(self.values[place])

    def float(self) -> OnGpu:
        return self


@pytest.fixture
def gpu(monkeypatch):
    """A cutter on that GPU and what it is told. What is copied from there arrives when an event is waited for."""
    told, coming, empty, cuda = [], [], torch.empty, OnGpu.device
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)
    cutter = Cutter(UNetAutoencoder("mobilenet_v2", pretrained=False), 64, cuda)

    class Event:
        def __init__(self, blocking: bool):
            told.append(("event", blocking))

        def synchronize(self) -> None:
            told.append(("wait", "in turn" if cutter._turn.locked() else "out of turn"))
            host, values = coming.pop()
            host.numpy()[...] = values.numpy()

    class Stream:
        def __init__(self, device: torch.device):
            told.append(("stream", device))

        def record_event(self, event: Event) -> Event:
            return event

    def new(*arguments, pin_memory: bool = False, **options) -> torch.Tensor:
        told.append(("empty", pin_memory))
        return empty(*arguments, **options).zero_()

    def to(self, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        told.append(("to", device, non_blocking))
        return self

    def copy_(self, values: OnGpu, non_blocking: bool = False) -> None:
        told.append(("copy", non_blocking))
        coming.append((self, values.values))

    def autocast(*arguments, enabled: bool) -> object:
        told.append(("autocast", *arguments, enabled))
        return torch.no_grad()

    def predict(self, images: torch.Tensor) -> OnGpu:
        told.append("network")
        return OnGpu(images[:, [0, 0, 0, 1]])

    for owner, names in ((torch, {"empty": new, "autocast": autocast}), (torch.Tensor, {"to": to, "copy_": copy_}),
                         (torch.cuda, {"Event": Event, "current_stream": Stream}),
                         (UNetAutoencoder, {"predict": predict})):  # fmt: skip
        for name, value in names.items():
            monkeypatch.setattr(owner, name, value)
    return cutter, told


def test_a_gpu_computes_in_float16_and_copies_by_itself(gpu):
    cutter, told = gpu
    found = cutter.probabilities(SQUARES)
    np.testing.assert_array_equal(found, np.stack(SQUARES)[..., 1] / np.float32(255))
    assert told == [
        ("empty", True), ("autocast", "cuda", torch.float16, True), ("to", OnGpu.device, True), "network",
        ("empty", True), ("copy", True), ("stream", OnGpu.device), ("event", True), ("wait", "out of turn"),
    ]  # fmt: skip


def test_without_amp_a_gpu_computes_in_float32(gpu):
    cutter, told = gpu
    Cutter(cutter.model, 64, OnGpu.device, amp=False).probabilities(SQUARES)
    assert ("autocast", "cuda", None, False) in told


def test_what_float16_does_not_hold_is_computed_again(stub, monkeypatch, small_checkpoint):
    precisions = []

    def alpha(red):
        precisions.append(torch.is_autocast_enabled("cpu"))
        return torch.full_like(red, float("nan") if precisions[-1] else 0.25)

    stub(alpha)
    cutter = load(small_checkpoint, "cpu")
    cutter.amp_dtype = torch.float16
    assert (cutter.probabilities(SQUARES) == 0.25).all()
    assert precisions == [True, False]
