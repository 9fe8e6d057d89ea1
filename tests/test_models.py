"""The model against numpy and torchvision's own networks; files of weights and checkpoints, damaged ones as well."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

import models
from models import ENCODERS, AttentionGate, CheckpointError, UNetAutoencoder, WeightsError, read_checkpoint


def settled(name: str) -> UNetAutoencoder:
    """An untrained model in eval mode whose BatchNorms know their input: its features neither vanish nor explode."""
    torch.manual_seed(0)
    model = UNetAutoencoder(name, pretrained=False)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(2, 3, 64, 64))
    return model.eval()


@pytest.fixture(scope="module", params=ENCODERS)
def model(request) -> UNetAutoencoder:
    return settled(request.param)


@pytest.fixture(scope="module")
def small() -> UNetAutoencoder:
    return settled("resnet18")


def test_every_encoder_gives_rgba_and_learns_everywhere(model):
    raw = model(torch.rand(2, 3, 65, 47))
    assert (raw.shape, raw.dtype) == ((2, 4, 65, 47), torch.float32)
    (raw * torch.randn_like(raw)).sum().backward()
    starved = [name for name, p in model.named_parameters() if p.grad is None or not 0 < p.grad.abs().sum() < np.inf]
    assert starved == []


@torch.no_grad()
@pytest.mark.parametrize("enabled", [False, True])
def test_untrained_colours_are_the_photos_own_in_float32(small, enabled):
    images = torch.rand(1, 3, 32, 32)
    images[..., :8], images[..., 8:16] = 0, 1  # where a logit is infinite
    with torch.autocast("cpu", enabled=enabled):
        raw, predicted = small(images), small.predict(images)
    assert raw.dtype == predicted.dtype == torch.float32
    assert raw.isfinite().all()
    assert (predicted[:, :3] - images).abs().max() <= 1 / 255
    np.testing.assert_allclose(predicted.numpy(), 1 / (1 + np.exp(-raw.double().numpy())), atol=1e-6)


def test_other_shapes_and_types_are_refused(small):
    whole = torch.zeros(1, 3, 64, 64)
    for images in (whole[..., 1:, 33:], whole[:, :, 33:], whole.permute(0, 2, 3, 1), whole[0], whole.byte()):
        with pytest.raises(ValueError, match=r"expected.*{}, {}\)".format(*images.shape[-2:])):
            small(images)


@torch.no_grad()
def test_the_encoder_sees_the_photo_normalised_and_an_odd_size_padded_by_its_edge(small):
    images, seen = np.random.default_rng(0).random((2, 3, 33, 47), np.float32), []
    padded = np.pad(images, ((0, 0), (0, 0), (0, 31), (0, 17)), mode="edge")
    with small.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy())):
        found, whole = small(torch.from_numpy(images)), small(torch.from_numpy(padded))
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 3, 1, 1)  # ImageNet's
    np.testing.assert_allclose(seen[1], (padded - mean) / std, atol=1e-5)
    torch.testing.assert_close(found, whole[..., :33, :47], rtol=0, atol=1e-5)


@torch.no_grad()
def test_features_are_torchvisions_last_at_each_stride(model, request):
    name = request.node.callspec.params["model"]
    network = torchvision.models.get_model(name, weights=None).eval()
    # The same order of tensors, the classifier last: it keeps its own.
    network.load_state_dict(dict(zip(network.state_dict(), model.encoder.state_dict().values(), strict=False)), False)
    layers = list(network.children())[:-2] if "resnet" in name else list(network.features)
    if "mobile" in name or "efficient" in name:
        layers.pop()  # a 1x1 convolution that only widens for the classifier
    images = features = torch.randn(1, 3, 64, 96)
    last = {}
    for layer in layers:
        features = layer(features)
        last[64 / features.shape[-2]] = features
    ours = dict(zip((2, 4, 8, 16, 32), model.encoder(images), strict=True))
    assert {stride for stride, feature in ours.items() if feature is not None} == last.keys()  # ConvNeXt has no 2
    for stride, feature in last.items():
        assert feature.std() > 1e-3
        torch.testing.assert_close(ours[stride], feature, rtol=1e-5, atol=1e-5)


def test_upsampling_that_a_gpu_does_in_float32_goes_on_in_half_precision(monkeypatch):
    real = functional.interpolate
    monkeypatch.setattr(functional, "interpolate", lambda values, **how: real(values.float(), **how))
    assert models.enlarge(torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


@torch.no_grad()
def test_the_gate_is_additive_attention():
    """Oktay et al. 2018: weights = sigmoid(psi(relu(theta(skip) + phi(gating)))), enlarged to the skip's grid."""
    torch.manual_seed(0)
    gate, skip, gating = AttentionGate(6, 10), torch.randn(2, 6, 8, 12), torch.randn(2, 10, 4, 6)
    theta = torch.einsum("nchiwj,ocij->nohw", skip.reshape(2, 6, 4, 2, 6, 2), gate.theta.weight)
    phi = torch.einsum("nchw,oc->nohw", gating, gate.phi.weight[..., 0, 0]) + gate.phi.bias.view(-1, 1, 1)
    psi = torch.einsum("nchw,c->nhw", (theta + phi).relu(), gate.psi.weight[0, :, 0, 0]) + gate.psi.bias
    weights = np.stack([cv2.resize(grid.numpy(), (12, 8)) for grid in 1 / (1 + (-psi).exp())])  # bilinearly
    np.testing.assert_allclose(gate(skip, gating).numpy(), skip.numpy() * weights[:, None], atol=1e-5)


@torch.no_grad()
def test_a_new_model_starts_at_the_foreground_prior_with_open_gates_or_none():
    torch.manual_seed(0)
    alpha = UNetAutoencoder("resnet18", pretrained=False, use_attention=False).predict(torch.rand(2, 3, 64, 64))[:, 3]
    assert 0.05 < alpha.median() < 0.2
    skip = torch.rand(1, 8, 16, 16) + 0.5
    assert (AttentionGate(8, 12)(skip, torch.rand(1, 12, 8, 8)) / skip).min() > 0.8


def trained(name: str) -> dict[str, Tensor]:
    """A torchvision network's state in which no value is what an untrained one would have."""
    torch.manual_seed(11)
    state = torchvision.models.get_model(name, weights=None).state_dict()
    return {key: (value + torch.rand(value.shape) * 0.1).to(value.dtype) for key, value in state.items()}


def torch_bytes(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def without(state: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not any(part in key for part in parts)}


def assert_encoder_holds(model: UNetAutoencoder, state: dict[str, Tensor]) -> None:
    ours = without(model.encoder.state_dict(), "num_batches_tracked").values()
    assert len(ours) > 50
    for mine, (key, theirs) in zip(ours, without(state, "num_batches_tracked").items(), strict=False):
        assert torch.equal(mine, theirs), key


def test_an_old_file_of_weights_without_counters_and_classifier_is_loaded_value_by_value(tmp_path):
    state = without(trained("resnet18"), "fc.", "num_batches_tracked")
    torch.save(state, tmp_path / "weights.pth")
    assert_encoder_holds(UNetAutoencoder("resnet18", encoder_weights=tmp_path / "weights.pth"), state)


@pytest.fixture
def origin(monkeypatch, tmp_path) -> Path:
    """The file at the address that the weights of mobilenet_v2 are downloaded from."""
    content = torch_bytes(trained("mobilenet_v2"))
    path = tmp_path / f"mobilenet_v2-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    path.write_bytes(content)
    monkeypatch.setattr(torchvision.models.get_model_weights("mobilenet_v2").DEFAULT.value, "url", path.as_uri())
    return path


def test_pretrained_weights_are_downloaded_once_and_a_damaged_copy_is_named(origin):
    assert_encoder_holds(UNetAutoencoder("mobilenet_v2"), trained("mobilenet_v2"))
    cached = origin.rename(Path(torch.hub.get_dir()) / "checkpoints" / origin.name)
    assert_encoder_holds(UNetAutoencoder("mobilenet_v2"), trained("mobilenet_v2"))
    os.truncate(cached, 1000)
    assert str(cached) in refusal(WeightsError, UNetAutoencoder, "mobilenet_v2")


def test_a_failed_download_names_three_ways_out_and_is_not_kept(origin):
    for damage in (lambda: os.truncate(origin, 1000), origin.unlink):
        damage()
        error = refusal(WeightsError, UNetAutoencoder, "mobilenet_v2")
        assert all(word in error for word in ("mobilenet_v2", "network", "--encoder-weights", "--no-pretrained"))


def refusal(error: type, call: Callable, *args: object, **options: object) -> str:
    """Returns the one line of the error that a call raises."""
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights_refusal(path: Path, name: str = "mobilenet_v2") -> str:
    return refusal(WeightsError, UNetAutoencoder, name, encoder_weights=path)


class Malice:
    """A pickle of it makes a folder when it is opened."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


CHECKPOINT = {"epoch": 7, "config": {"seed": 0}, "model": {"weight": torch.arange(1000) / 7}, "history": [{"iou": 0.3}]}
WHOLE = torch_bytes(CHECKPOINT)
MALICE = {**CHECKPOINT, "features.0.0.weight": Malice()}
DAMAGED = [b"", b"<html>not found</html>", b"\x80\2.", torch_bytes(MALICE), pickle.dumps(MALICE, 2),
           WHOLE[: len(WHOLE) // 2], WHOLE[:-50]]  # fmt: skip


def test_damaged_foreign_and_evil_files_are_refused_unexecuted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    for content in DAMAGED:
        path.write_bytes(content)
        assert f"{path} is damaged" in weights_refusal(path)
        assert f"{path} is damaged" in refusal(CheckpointError, read_checkpoint, path)
    for content in ([torch.ones(3)], {0: torch.ones(3)}, {"model": {}, "config": [], "epoch": 3}):
        torch.save(content, path)
        assert f"{path} holds no dictionary of tensors" in weights_refusal(path)
        assert f"{path} is not a checkpoint" in refusal(CheckpointError, read_checkpoint, path)
    path.unlink()
    assert f"there is no file {path}" in weights_refusal(path)
    assert f"there is no checkpoint {path}" in refusal(CheckpointError, read_checkpoint, path)
    assert not [*tmp_path.iterdir()]  # also nothing that a pickle has made


@pytest.mark.parametrize(("theirs", "ours"), [("resnet34", "resnet18"), ("resnet18", "resnet34")])
def test_weights_of_another_network_are_refused(theirs, ours, tmp_path):
    torch.save(torchvision.models.get_model(theirs, weights=None).state_dict(), tmp_path / "weights.pth")
    assert "are not those of" in weights_refusal(tmp_path / "weights.pth", ours)


def test_a_flipped_bit_is_never_taken_for_a_weight(tmp_path):
    path, start = tmp_path / "a.pth", WHOLE.index(CHECKPOINT["model"]["weight"].numpy().tobytes())
    path.write_bytes(WHOLE)
    content = read_checkpoint(path)
    assert torch.equal(content.pop("model")["weight"], CHECKPOINT["model"]["weight"])
    assert content.pop("config") == CHECKPOINT["config"] | {"bars": "black"}  # which it is too old to know
    assert content == {name: value for name, value in CHECKPOINT.items() if name not in ("model", "config")}
    path.write_bytes(WHOLE[: start + 500] + bytes([WHOLE[start + 500] ^ 64]) + WHOLE[start + 501 :])
    refusal(CheckpointError, read_checkpoint, path)


def test_a_checkpoints_weights_are_their_ema_where_it_holds_both():
    for ema, weights in (({}, "weights"), ({"ema": None}, "weights"), ({"ema": {"model": "averages"}}, "averages")):
        assert models.model_weights({"model": "weights", **ema}) == weights
