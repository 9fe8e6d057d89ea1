"""The model against numpy, against torchvision's own networks, and against weights that are not what they should be."""

from __future__ import annotations

import hashlib
import io
import pickle
import socketserver
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from models import ENCODERS, AttentionGate, UNetAutoencoder, WeightsError


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Two of them would wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (100, 75)])
def test_every_encoder_gives_rgba_of_the_input_size(model, size):
    raw = model(torch.rand(2, 3, *size))
    assert (raw.shape, raw.dtype) == ((2, 4, *size), torch.float32)
    assert raw.isfinite().all()


def test_gradients_reach_every_parameter(model):
    raw = model(torch.rand(1, 3, 64, 64))
    (raw * torch.randn_like(raw)).sum().backward()
    starved = [name for name, p in model.named_parameters() if p.grad is None or not 0 < p.grad.abs().sum() < np.inf]
    assert starved == []


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_untrained_it_gives_the_photos_own_colours_in_float32_under_autocast_too(small, dtype):
    images = torch.rand(1, 3, 32, 32)
    images[..., :8], images[..., 8:16] = 0, 1  # where a logit is infinite
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        raw, predicted = small(images), small.predict(images)
    assert raw.dtype == predicted.dtype == torch.float32
    assert raw.isfinite().all()
    assert (predicted[:, :3] - images).abs().max() <= 1 / 255


OTHER_IMAGES = [torch.rand(s) for s in [(1, 3, 31, 64), (1, 3, 64, 31), (1, 4, 64, 64), (1, 64, 64, 3), (3, 64, 64)]]
OTHER_IMAGES += [torch.zeros(1, 3, 64, 64, dtype=dtype) for dtype in (torch.uint8, torch.bool)]


@pytest.mark.parametrize("images", OTHER_IMAGES, ids=lambda images: f"{images.dtype} {tuple(images.shape)}")
def test_other_shapes_and_types_are_refused_by_name(small, images):
    with pytest.raises(ValueError, match=r"expected.*{}, {}\)".format(*images.shape[-2:])):
        small(images)


@torch.no_grad()
def test_other_floats_give_what_float32_gives(small):
    images = torch.rand(1, 3, 32, 32).half()  # holds fewer digits than the others
    assert torch.equal(small(images), small(images.float()))
    assert torch.equal(small(images.double()), small(images.float()))


@torch.no_grad()
def test_an_odd_size_is_padded_by_repeating_the_edge(small):
    images = np.random.default_rng(0).random((2, 3, 33, 47), np.float32)
    padded = np.pad(images, ((0, 0), (0, 0), (0, 31), (0, 17)), mode="edge")
    whole = small(torch.from_numpy(padded))
    torch.testing.assert_close(small(torch.from_numpy(images)), whole[..., :33, :47], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_encoder_sees_the_photo_by_imagenets_mean_and_deviation(small):
    first = next(module for module in small.encoder.modules() if isinstance(module, nn.Conv2d))
    seen = []
    images = torch.rand(1, 3, 64, 96)  # multiples of 32: seen as they are, without padding
    with first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy().copy())):
        small(images)
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 3, 1, 1)
    np.testing.assert_allclose(seen[0], (images.numpy() - mean) / std, atol=1e-5)


@torch.no_grad()
def test_predict_is_the_sigmoid_of_forward(small):
    images = torch.rand(2, 3, 40, 40).round(decimals=1)
    predicted = small.predict(images)
    np.testing.assert_allclose(predicted.numpy(), 1 / (1 + np.exp(-small(images).double().numpy())), atol=1e-6)
    assert 0 <= predicted.min() < predicted.max() <= 1


@torch.no_grad()
def test_an_image_alone_gives_what_it_gives_in_a_batch(small):
    images = torch.rand(3, 3, 64, 64) * torch.tensor([1, 0.1, 1]).view(3, 1, 1, 1)
    batch = small.predict(images)
    assert (batch[0, 3] - batch[1, 3]).abs().max() > 0.01  # or the comparison would say nothing
    alone = torch.cat([small.predict(image[None]) for image in images])
    torch.testing.assert_close(alone, batch, rtol=0, atol=1e-5)


@torch.no_grad()
def test_features_are_torchvisions_last_at_strides_2_4_8_16_32(model, request):
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


def test_an_unknown_encoder_is_refused_with_the_list():
    with pytest.raises(ValueError, match="resnet19.*" + ".*".join(ENCODERS)):
        UNetAutoencoder("resnet19", pretrained=False)


def untrained(seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return list(UNetAutoencoder("mobilenet_v2", pretrained=False).parameters())


def test_the_same_seed_gives_the_same_weights_and_another_others():
    assert all(map(torch.equal, untrained(3), untrained(3)))
    assert not all(map(torch.equal, untrained(3), untrained(4)))


@torch.no_grad()
def test_a_state_dict_is_all_that_a_model_is(small):
    other, images = UNetAutoencoder("resnet18", pretrained=False).eval(), torch.rand(1, 3, 50, 50)
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(images), small(images))
    assert not any("module." in key for key in small.state_dict())


def doubling(size: int) -> np.ndarray:
    """(2 size, size): bilinear enlargement along one axis, each new pixel a quarter of a step off an old one."""
    positions = np.clip(np.arange(2 * size) / 2 - 0.25, 0, size - 1)
    return np.clip(1 - np.abs(positions[:, None] - np.arange(size)), 0, 1)


@torch.no_grad()
def test_the_gate_is_additive_attention():
    """Oktay et al. 2018: weights = sigmoid(psi(relu(theta(skip) + phi(gating)))), enlarged to the skip's grid."""
    torch.manual_seed(0)
    gate, skip, gating = AttentionGate(6, 10), torch.randn(2, 6, 8, 12), torch.randn(2, 10, 4, 6)
    p = {name: value.double().numpy() for name, value in gate.state_dict().items()}
    blocks = skip.double().numpy().reshape(2, 6, 4, 2, 6, 2)
    theta = np.einsum("nchiwj,ocij->nohw", blocks, p["theta.weight"])
    phi = np.einsum("nchw,ocij->nohw", gating.double().numpy(), p["phi.weight"]) + p["phi.bias"].reshape(1, -1, 1, 1)
    psi = np.einsum("nchw,ocij->nohw", np.maximum(theta + phi, 0), p["psi.weight"]) + p["psi.bias"]
    weights = np.einsum("yh,nchw,xw->ncyx", doubling(4), 1 / (1 + np.exp(-psi)), doubling(6))
    np.testing.assert_allclose(gate(skip, gating).numpy(), skip.numpy() * weights, atol=1e-5)


@torch.no_grad()
def test_the_gates_weights_lie_between_0_and_1_and_depend_on_the_gating():
    gate, ones, zeros = AttentionGate(4, 4), torch.ones(1, 4, 16, 16), torch.zeros(1, 4, 16, 16)
    weights, other = (gate(ones, torch.randn(1, 4, 8, 8) * 3) for _ in range(2))
    assert 0 < weights.min() < weights.max() < 1
    assert not torch.allclose(weights, other, atol=1e-3)
    assert not gate(zeros, torch.randn(1, 4, 8, 8)).any()


@torch.no_grad()
def test_what_is_enlarged_in_float32_as_on_a_gpu_goes_on_in_half_precision(small, monkeypatch):
    images, precisions = torch.rand(1, 3, 32, 32), []
    hooks = [block.fuse.register_forward_pre_hook(lambda _, inputs: precisions.append(inputs[0].dtype))
             for block in small.decoder.blocks]  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        expected = small(images)
        real = functional.interpolate
        monkeypatch.setattr(functional, "interpolate", lambda values, **how: real(values.float(), **how))
        raw = small(images)
    for hook in hooks:
        hook.remove()
    assert set(precisions) == {torch.bfloat16}
    assert torch.equal(raw, expected)


def test_without_attention_there_are_fewer_parameters(small):
    plain = UNetAutoencoder("resnet18", pretrained=False, use_attention=False)
    assert plain(torch.rand(2, 3, 64, 64)).shape == (2, 4, 64, 64)
    assert sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in small.parameters())


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


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("absent", [(), ("fc.", "classifier."), ("num_batches_tracked",)])  # old files have no counters
def test_a_file_of_weights_is_loaded_value_by_value(tmp_path, name, absent):
    state = without(trained(name), *absent)
    torch.save(state, tmp_path / "weights.pth")
    assert_encoder_holds(UNetAutoencoder(name, encoder_weights=tmp_path / "weights.pth"), state)


def test_the_genuine_imagenet_weights_are_loaded(shared_weights):
    model = UNetAutoencoder("mobilenet_v2", encoder_weights=shared_weights)
    assert_encoder_holds(model, torch.load(shared_weights, weights_only=True))


def assert_refused(path: Path, name: str = "mobilenet_v2") -> str:
    with pytest.raises(WeightsError) as refusal:
        UNetAutoencoder(name, encoder_weights=path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_an_absent_file_is_refused_and_not_called_damaged(tmp_path):
    assert "damaged" not in assert_refused(tmp_path / "absent.pth")


@pytest.mark.parametrize("content", [b"", b"no weights", torch_bytes([0])[:99], b"\x80\2.", b"G"])
def test_damaged_files_and_other_bytes_are_refused(tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    assert_refused(tmp_path / "weights.pth")


@pytest.mark.parametrize("content", [[torch.ones(3)], {"epoch": 3}, {}, {0: torch.ones(3)}])
def test_a_file_that_holds_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    assert_refused(tmp_path / "weights.pth")


class Malice:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("dump", [torch_bytes, lambda content: pickle.dumps(content, 2)], ids=["torch", "pickle"])
def test_a_file_that_would_execute_code_is_refused_unexecuted(tmp_path, monkeypatch, dump):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").write_bytes(dump({"features.0.0.weight": Malice()}))
    assert_refused(tmp_path / "weights.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("theirs", "ours"), [("resnet34", "resnet18"), ("resnet18", "resnet34")])
def test_another_networks_weights_are_refused(tmp_path, theirs, ours):
    with torch.device("meta"):
        state = torchvision.models.get_model(theirs, weights=None).state_dict()
    torch.save({key: torch.zeros(()).expand(value.shape) for key, value in state.items()}, tmp_path / "weights.pth")
    assert_refused(tmp_path / "weights.pth", ours)


FOUND, NOT_FOUND = b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 404 Not Found\r\n\r\n"
CUT_CHUNK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n63\r\ncut"


@pytest.fixture
def serve(monkeypatch):
    """Puts a server in the place of torchvision's that gives every request for weights the same reply."""
    replies, requests = [], []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            requests.append(self.request.recv(4096))
            self.request.sendall(replies[0])

    def start(reply: bytes | None, digest: str = "0123abcd") -> list[bytes]:
        replies.append(reply)
        port = 1 if reply is None else server.server_address[1]  # nobody listens on port 1
        url = f"http://127.0.0.1:{port}/mobilenet_v2-{digest}.pth"
        monkeypatch.setattr(torchvision.models.get_model_weights("mobilenet_v2").DEFAULT.value, "url", url)
        monkeypatch.setenv("no_proxy", "*")
        return requests

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield start
        server.shutdown()


def test_pretrained_weights_are_downloaded_once(serve):
    content = torch_bytes(trained("mobilenet_v2"))
    requests = serve(FOUND + content, hashlib.sha256(content).hexdigest()[:8])
    for _ in range(2):
        assert_encoder_holds(UNetAutoencoder("mobilenet_v2"), trained("mobilenet_v2"))
    assert len(requests) == 1


@pytest.mark.parametrize(
    "reply",
    [None, b"", NOT_FOUND, FOUND + torch_bytes({}), CUT_CHUNK, b"no HTTP\r\n\r\n"],
    ids=["nobody there", "nothing", "404", "wrong hash", "cut short", "no HTTP"],
)
def test_a_failed_download_is_told_with_the_three_ways_out_and_not_kept(serve, reply):
    serve(reply)
    for _ in range(2):
        with pytest.raises(WeightsError) as refusal:
            UNetAutoencoder("mobilenet_v2")
        assert all(w in str(refusal.value) for w in ("mobilenet_v2", "network", "--encoder-weights", "--no-pretrained"))
        assert "\n" not in str(refusal.value)


def test_a_damaged_file_in_the_cache_is_named(serve):
    serve(NOT_FOUND)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / "mobilenet_v2-0123abcd.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"cut")
    with pytest.raises(WeightsError, match=str(cached)):
        UNetAutoencoder("mobilenet_v2")


def test_a_new_model_starts_at_the_share_of_person_pixels_with_open_gates():
    torch.manual_seed(0)
    model = UNetAutoencoder("resnet18", pretrained=False).eval()
    alpha = model.predict(torch.rand(2, 3, 64, 64))[:, 3]
    assert 0.05 < alpha.median() < 0.2
    skip = torch.rand(1, 8, 16, 16) + 0.5
    gated = AttentionGate(8, 12)(skip, torch.rand(1, 12, 8, 8))
    assert (gated / skip).min() > 0.8
