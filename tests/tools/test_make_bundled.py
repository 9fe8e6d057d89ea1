"""The bundled model: half the size, the same masks, and nothing of the machine that made it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import mistake

from cutting.cutter import BUNDLED, load
from tools import make_bundled

SECRET = "/home/somebody"


@pytest.fixture
def trained(small_checkpoint, tmp_path, monkeypatch):
    """Writes a checkpoint with some paths in it, changed by a function."""
    monkeypatch.setattr(make_bundled, "MAX_BYTES", 30_000_000)  # resnet18 is larger than what is bundled

    def trained(change=lambda content: None) -> Path:
        content = torch.load(small_checkpoint, weights_only=True)
        content["config"] |= {"data_root": f"{SECRET}/coco", "checkpoint_dir": f"{SECRET}/run"}
        change(content)
        torch.save(content, tmp_path / "best_model.pth")
        return tmp_path / "best_model.pth"

    return trained


def bundled(checkpoint: Path, *arguments: str) -> Path:
    output = checkpoint.with_name("bundled.pth")
    assert make_bundled.run_command(["make_bundled.py", str(checkpoint), "--output", str(output), *arguments]) == 0
    return output


def test_it_cuts_like_the_trained_one_from_half_the_bytes(trained):
    checkpoint = trained()
    made = bundled(checkpoint)
    assert made.stat().st_size < 0.6 * checkpoint.stat().st_size
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    alphas = [load(path, device="cpu").probabilities([photo])[0] for path in (checkpoint, made)]
    assert np.abs(alphas[0] - alphas[1]).max() < 0.01
    assert set(torch.load(made, weights_only=True)["config"]) == {"encoder", "use_attention", "image_size", "bars"}
    assert SECRET.encode() not in made.read_bytes()
    assert load(bundled(checkpoint, "--image-size", "96"), device="cpu").image_size == 96


def test_a_blend_is_the_mean_of_two_models_by_their_parts(trained, tmp_path):
    checkpoint, name = trained(), "encoder.stages.0.0.weight"
    other = torch.load(checkpoint, weights_only=True)
    before = other["model"][name].clone()
    other["model"][name] += 1
    torch.save(other, tmp_path / "other.pth")
    found = torch.load(bundled(checkpoint, "--blend", str(tmp_path / "other.pth"), "0.25"), weights_only=True)
    assert torch.allclose(found["model"][name].float(), before + 0.25, atol=1e-3)
    assert found["metrics"] is None  # they are not of these weights


@pytest.mark.parametrize(("change", "arguments", "words"), [
    (lambda content: None, ["--image-size", "9"], "an image size of 9 is out of range"),
    (lambda content: None, ["--blend", "{checkpoint}", "half"], "a part of the weights between 0 and 1"),
    (lambda content: None, ["--blend", "bundled", "0.5"], "a model of the same architecture"),
    (lambda content: None, ["--blend", "{checkpoint}", "0.5", f"--output={BUNDLED}"], "--blend needs --output FILE"),
    (lambda content: next(iter(content["model"].values())).fill_(1e6), [], "beyond the range of float16"),
    (lambda content: content["config"].update(sample=True), [], "trained on drawings"),
    (lambda content: content["model"].update(more=torch.zeros(20_000_000)), [], "MB, more than 30"),
])  # fmt: skip
def test_what_cannot_be_bundled_gets_one_line_and_no_file(trained, capsys, change, arguments, words):
    checkpoint = trained(change)
    output = checkpoint.with_name("bundled.pth")
    arguments = [text.format(checkpoint=checkpoint) for text in arguments]
    assert words in mistake(capsys, make_bundled, checkpoint, f"--output={output}", *arguments)
    assert not output.exists()
