"""ONNX of a small random model, run by onnxruntime and held against PyTorch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import save_random_model

from cutting.cutter import load
from datasets import COCOPersonDataset
from loading.letterbox import letterbox, restore
from models import UNetAutoencoder
from tools import export
from training import checkpoints
from utils import UserError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    def change(state: dict) -> None:
        state["decoder.head.conv.weight"][12:] *= 20  # or alpha would be about one half everywhere
        state["decoder.head.conv.weight"][:12] = 0.02 * torch.randn(12, 32, 3, 3)  # the colours' corrections

    torch.manual_seed(0)
    return save_random_model(tmp_path_factory.mktemp("model") / "best_model.pth", epoch=7, change=change)


@pytest.fixture(scope="module")
def model(checkpoint) -> UNetAutoencoder:
    return load(checkpoint, "cpu").model


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    """What the command writes by default; made once, because it takes PyTorch ten seconds."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert export.run_command(["export.py", str(checkpoint), "--output", str(path)]) == 0
    return path


@pytest.fixture
def command(checkpoint, exported, tmp_path, monkeypatch, capsys):
    """Runs the command line without the slow step. Returns its exit code, its lines, and the output's path."""
    monkeypatch.setattr(export, "to_onnx", lambda model: onnx.load(exported))
    monkeypatch.chdir(tmp_path)

    def command(*arguments, checkpoint=checkpoint) -> tuple[int, list[str], list[str]]:
        code = export.run_command(["export.py", str(checkpoint), *map(str, arguments)])
        return code, *(text.splitlines() for text in capsys.readouterr())

    return command


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def noise(*shape: int) -> torch.Tensor:
    """Blocks of colours from 0 to 1, both ends included: edges that a wrong padding or grid would move."""
    small = torch.rand(shape[0], 3, 7, 5, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    return torch.nn.functional.interpolate(small.clamp(0, 1), shape[1:]).contiguous()


# --- float32 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 32, 32), (2, 33, 47), (1, 96, 130), (4, 61, 32), (1, 31 * 5, 64)])
def test_onnx_equals_pytorch_at_any_size_and_batch(exported, model, shape):
    images = noise(*shape)
    with torch.inference_mode():
        expected = model.predict(images).numpy()
    (rgba,) = session(exported).run(None, {"images": images.numpy()})
    assert rgba.shape == (shape[0], 4, *shape[1:])
    assert rgba.dtype == np.float32
    assert expected[:, 3].std() > 0.01  # an alpha that says something
    np.testing.assert_allclose(rgba, expected, rtol=0, atol=1e-4)


README = Path(export.__file__).parents[1] / "README.md"


@pytest.mark.parametrize("shape", [(50, 90), (301, 200), (33, 40)])
def test_the_lines_of_the_readme_give_predicts_alpha(shape, checkpoint, exported, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    rgb = cv2.resize(noise, shape[::-1], interpolation=cv2.INTER_CUBIC)
    (tmp_path / "photo.jpg").write_bytes(cv2.imencode(".png", rgb[..., ::-1])[1].tobytes())  # read by its content
    (tmp_path / "model.onnx").symlink_to(exported)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(next(block for block in blocks if "InferenceSession" in block), found)
    square, metadata = letterbox(rgb, 64)
    expected = restore(load(checkpoint, "cpu").probabilities([square])[0], metadata)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found["alpha"], expected, atol=export.TOLERANCE)
    cutout = cv2.imread("cutout.png", cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(cutout[..., 2::-1], rgb)
    np.testing.assert_allclose(cutout[..., 3] / 255, expected, atol=0.004)


def test_a_whole_run_leaves_nothing_but_its_output(checkpoint, tmp_path):
    """No device id, no events, no caches: neither in the home folder nor in the one for temporary files."""
    places = {name: tmp_path / name for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "TMPDIR", "work")}
    for place in places.values():
        place.mkdir()
    # onnxruntime keeps quiet by itself where it takes the machine for one that runs tests
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ORT_") and k not in ("CI", "GITHUB_ACTIONS")}
    environment = kept | {name: str(place) for name, place in places.items()} | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, export.__file__, str(checkpoint)]
    done = subprocess.run(command, cwd=places["work"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == [places["work"] / "model.onnx"]


def test_file_says_what_a_consumer_needs(exported):
    file = session(exported)
    (images,), (rgba,) = file.get_inputs(), file.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(float)", ["batch", 3, "height", "width"])
    assert (rgba.name, rgba.type, rgba.shape) == ("rgba", "tensor(float)", ["batch", 4, "height", "width"])
    facts = file.get_modelmeta().custom_metadata_map
    wanted = {"image_size": "64", "encoder": "resnet18", "use_attention": "True", "epoch": "7", "precision": "float32"}
    assert wanted.items() <= facts.items()
    assert "UNetAutoencoder" in facts["silueta"]
    (opset,) = (entry.version for entry in onnx.load(exported).opset_import if entry.domain == "")
    assert facts["opset"] == str(opset)
    onnx.checker.check_model(onnx.load(exported), full_check=True)


def test_genuine_photos(command, shared_coco):
    code, lines, _ = command("--check", shared_coco / "val2017")
    assert code == 0
    assert "8 photos of" in lines[0]
    assert float(lines[0].split("largest difference ")[1].split(",")[0]) < 1e-4


def test_disagreement_leaves_no_file(command, exported, tmp_path, monkeypatch):
    wrong = onnx.load(exported)
    head = [node for node in wrong.graph.node if node.op_type == "Conv"][-1]
    weights = next(tensor for tensor in wrong.graph.initializer if tensor.name == head.input[1])
    assert tuple(weights.dims) == (16, 32, 3, 3)
    weights.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights) * 1.05, weights.name))
    monkeypatch.setattr(export, "to_onnx", lambda model: wrong)
    (tmp_path / "model.onnx").write_bytes(b"the one before")
    code, _, errors = command()
    assert code == 2
    assert len(errors) == 1
    assert "disagrees with PyTorch" in errors[0]
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"the one before"


def test_nan_is_a_disagreement(checkpoint, monkeypatch):
    monkeypatch.setattr(export, "disagreements", lambda *_: np.array([[0, 0], [np.nan, np.nan]]))
    with pytest.raises(UserError, match="float32 disagrees with PyTorch by nan"):
        export.check_export(None, "float32", load(checkpoint, "cpu"), [], "photos")


# --- reduced precision ------------------------------------------------------------------------------------


def test_float16_is_half_the_size_and_nearly_as_good(command, exported, model, tmp_path):
    code, lines, errors = command("--precision", "float16", "--output", tmp_path / "half.onnx")
    assert (code, errors) == (0, [])
    assert any(line.startswith("float16 against PyTorch") for line in lines)
    half, images = session(tmp_path / "half.onnx"), noise(2, 70, 90)
    assert (tmp_path / "half.onnx").stat().st_size < 0.55 * exported.stat().st_size
    assert (half.get_inputs()[0].type, half.get_outputs()[0].type) == ("tensor(float)", "tensor(float)")
    assert half.get_modelmeta().custom_metadata_map["precision"] == "float16"
    with torch.inference_mode():
        np.testing.assert_allclose(half.run(None, {"images": images.numpy()})[0], model.predict(images), atol=0.02)


def test_int8_is_a_quarter_of_the_size_and_says_its_loss(command, exported, coco_root, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST_LOSS", 1.0)  # a random model's IoU is no measure
    path = tmp_path / "small.onnx"
    code, lines, errors = command("--precision", "int8", "--data-root", coco_root, "--output", path)
    assert (code, errors) == (0, [])
    assert path.stat().st_size < 0.3 * exported.stat().st_size
    assert session(path).get_modelmeta().custom_metadata_map["precision"] == "int8"
    assert session(path).get_inputs()[0].shape == ["batch", 3, "height", "width"]
    for name, file in (("float32", exported), ("int8", path)):
        assert f"{name} {mean_iou(file, coco_root):.4f}" in next(line for line in lines if "mean IoU" in line)


def mean_iou(path: Path, root: Path) -> float:
    """Worked out anew, photo by photo, with sets of pixels."""
    dataset, scores = COCOPersonDataset(root, "val2017", 64), []
    for sample in (dataset[i].numpy() for i in range(len(dataset))):
        alpha = session(path).run(None, {"images": sample[None, :3].astype(np.float32) / 255})[0][0, 3]
        found, true = set(np.flatnonzero(alpha > 0.5)), set(np.flatnonzero(sample[3]))
        scores.append(len(found & true) / len(found | true))
    return float(np.mean(scores))


def test_first_convolutions_and_head_stay_float(exported):
    names = [node.name for node in onnx.load(exported).graph.node if node.op_type == "Conv"]
    graph = export.to_int8(onnx.load(exported), iter([noise(1, 64, 64).numpy()])).graph
    kinds = {output: node.op_type for node in graph.node for output in node.output}
    in_float = {n.name for n in graph.node if n.op_type == "Conv" and kinds.get(n.input[1]) != "DequantizeLinear"}
    assert in_float == {*names[:3], names[-1]}
    assert len(names) > 30


def test_too_large_a_loss_leaves_no_file(command, coco_root, tmp_path, monkeypatch):
    figures = [{"iou": 0.80, "ms": 1.0}, {"iou": 0.75, "ms": 1.0}]
    monkeypatch.setattr(export, "measure_both", lambda *_: figures)
    monkeypatch.setattr(export, "to_float16", lambda model: model)
    monkeypatch.setattr(export, "check_export", lambda *_: None)
    code, _, errors = command("--precision", "float16", "--data-root", coco_root, "--output", tmp_path / "half.onnx")
    assert code == 2
    assert "loses 0.050 of IoU" in errors[0]
    assert not (tmp_path / "half.onnx").exists()


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--precision", "int8"], "needs --data-root"),
        (["--precision", "int4"], "invalid choice"),
        (["--output", "no/such/folder/model.onnx"], "there is no folder"),
        (["--output", "."], "is a folder"),
        (["--check", "nowhere"], "nowhere"),
        (["--data-root", "nowhere"], "nowhere"),
        (["--colour"], "--colour"),
    ],
)
def test_mistake_gets_one_line_and_exit_code_2(command, arguments, words):
    code, lines, errors = command(*arguments)
    assert (code, lines, len(errors)) == (2, [], 1)
    assert errors[0].startswith("export.py: error: ")
    assert words in errors[0]


def test_bad_checkpoint(command, tmp_path):
    code, _, errors = command(checkpoint=tmp_path / "none.pth")
    assert (code, len(errors)) == (2, 1)
    assert "there is no checkpoint" in errors[0]


def test_missing_packages_are_named_with_the_command_that_brings_them(command, monkeypatch):
    find = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    code, _, errors = command()
    assert code == 2
    assert errors == ["export.py: error: onnxscript must be installed first: pip install -r requirements-dev.txt"]


def test_full_disk_gets_one_line(command, exported, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    monkeypatch.setattr(export, "check_export", lambda *_: None)
    code, _, errors = command()
    assert (code, len(errors)) == (2, 1)
    assert "No space left" in errors[0]
    assert not list(tmp_path.glob("*.onnx*")) + list(tmp_path.glob(".*.part"))
