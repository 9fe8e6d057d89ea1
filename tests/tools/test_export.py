"""ONNX of a small random model, run by onnxruntime and compared with PyTorch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import PICTURE, ROOT, mistake, save_picture

from datasets import COCOPersonDataset
from loading.letterbox import letterbox, restore
from tools import export
from utils import UserError


@pytest.fixture(scope="session")
def exported(small_checkpoint, tmp_path_factory) -> Path:
    """What the whole command writes by default, in a home of its own."""
    home = tmp_path_factory.mktemp("export")
    folders = {name: home / name for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "TMPDIR", "work")}
    for folder in folders.values():
        folder.mkdir()
    # A bare one: onnxruntime keeps quiet by itself where variables of CI say that the machine runs tests.
    environment = {name: str(folder) for name, folder in folders.items()} | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, export.__file__, str(small_checkpoint)]
    done = subprocess.run(command, cwd=folders["work"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return folders["work"] / "model.onnx"


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.slow
def test_a_whole_run_leaves_nothing_but_its_output(exported):
    """No device id, no events, no caches: neither in the home folder nor in the one for temporary files."""
    assert [path for path in exported.parents[1].rglob("*") if not path.is_dir()] == [exported]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(50, 90), (301, 200)])
def test_the_manuals_lines_give_the_networks_alpha(shape, cut, exported, tmp_path, monkeypatch):
    rgb = cv2.resize(PICTURE, shape[::-1], interpolation=cv2.INTER_CUBIC)
    save_picture(tmp_path / "photo.jpg", rgb, format="PNG")  # read by its content
    (tmp_path / "model.onnx").symlink_to(exported)
    monkeypatch.chdir(tmp_path)
    variables = {}
    exec(re.search(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)[1], variables)
    square, metadata = letterbox(rgb, 64)
    expected = restore(cut.probabilities([square])[0], metadata)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(variables["alpha"], expected, atol=1e-4)
    cutout = cv2.imread("cutout.png", cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(cutout[..., 2::-1], rgb)
    np.testing.assert_allclose(cutout[..., 3] / 255, expected, atol=0.004)


@pytest.mark.slow
def test_the_file_says_what_a_consumer_needs(exported):
    file, model = session(exported), onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    (images,), (rgba,) = file.get_inputs(), file.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(float)", ["batch", 3, "height", "width"])
    assert (rgba.name, rgba.type, rgba.shape) == ("rgba", "tensor(float)", ["batch", 4, "height", "width"])
    (opset,) = (str(entry.version) for entry in model.opset_import if entry.domain == "")
    metadata = file.get_modelmeta().custom_metadata_map
    del metadata["silueta"]
    assert metadata == {"image_size": "64", "encoder": "resnet18", "use_attention": "True", "bars": "reflect",
                        "epoch": "1", "precision": "float32", "opset": opset}  # fmt: skip


@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-4), ("int8", 0.02)])
def test_a_difference_is_refused_if_it_is_too_large(monkeypatch, precision, limit):
    model = SimpleNamespace(predict=lambda images: images[:, [0, 0, 0, 0]])

    def check(difference: float) -> None:
        session = SimpleNamespace(run=lambda _, inputs: [inputs["images"][:, [0, 0, 0, 0]] + np.float32(difference)])
        monkeypatch.setattr(export, "open_session", lambda _: session)
        export.check_export(None, precision, model, torch.zeros(1, 3, 64, 64))

    check(limit / 2)
    for difference in (2 * limit, np.nan):
        with pytest.raises(UserError, match=f"{precision} differs from PyTorch"):
            check(difference)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "size"), [("float16", 0.55), ("int8", 0.3)])
def test_a_reduced_precision_is_smaller_and_says_its_loss(
    precision, size, small_checkpoint, exported, coco_root, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(export, "to_onnx", lambda model: onnx.load(exported))  # instead of exporting once more
    monkeypatch.setattr(export, "MAX_IOU_LOSS", 1.0)  # of a random model it says nothing
    path = tmp_path / "small.onnx"
    flags = f"--precision={precision}", f"--data-root={coco_root}", f"--output={path}"
    assert export.run_command(["export.py", str(small_checkpoint), *flags]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert path.stat().st_size < size * exported.stat().st_size
    (images,), (rgba,) = session(path).get_inputs(), session(path).get_outputs()
    assert (images.shape, images.type, rgba.type) == (["batch", 3, "height", "width"], *["tensor(float)"] * 2)
    assert session(path).get_modelmeta().custom_metadata_map["precision"] == precision
    said = f"float32 {mean_iou(exported, coco_root):.4f}, {precision} {mean_iou(path, coco_root):.4f}, loss "
    assert said in printed.out
    if precision == "int8":
        names = [node.name for node in onnx.load(exported).graph.node if node.op_type == "Conv"]
        convolutions = [node for node in onnx.load(path).graph.node if node.op_type == "Conv"]
        in_float = {node.name for node in convolutions if "Dequantize" not in node.input[1]}
        assert in_float == {*names[:3], names[-1]}  # the first convolutions and the head


def mean_iou(path: Path, root: Path) -> float:
    """Works out the mean IoU photo by photo, with sets of pixels."""
    dataset, scores, network = COCOPersonDataset(root, "val2017", 64), [], session(path)
    for sample in (dataset[index].numpy() for index in range(len(dataset))):
        alpha = network.run(None, {"images": sample[None, :3].astype(np.float32) / 255})[0][0, 3]
        predicted, true = set(np.flatnonzero(alpha > 0.5)), set(np.flatnonzero(sample[3]))
        scores.append(len(predicted & true) / len(predicted | true))
    return float(np.mean(scores))


def test_too_large_a_loss_is_refused(monkeypatch):
    monkeypatch.setattr(export, "mean_iou", Mock(side_effect=[0.80, 0.75]))
    with pytest.raises(UserError, match=r"float16 loses 0\.050 of IoU"):
        export.check_loss(None, None, [], "float16")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--precision", "int8"], "needs --data-root"), (["--output", "no/such/folder/model.onnx"], "does not exist"),
    (["--output", "."], "is a folder"), (["--data-root", "nowhere"], "nowhere"),
])  # fmt: skip
def test_a_mistake_gets_one_line(small_checkpoint, capsys, arguments, words):
    assert words in mistake(capsys, export, small_checkpoint, *arguments)


def test_a_missing_package_is_named(small_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    named = "onnxscript must be installed first: pip install -r requirements-dev.txt"
    assert mistake(capsys, export, small_checkpoint) == named
