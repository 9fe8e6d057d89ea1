"""The model that comes with the program: half the size, the same masks, and nothing of the machine that made it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import save_random_model

from cutting.cutter import load
from tools import make_box


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.setattr(make_box, "LARGEST", 30_000_000)  # of the encoder that other tests use as well
    path = tmp_path / "best_model.pth"
    save_random_model(path)
    content = torch.load(path, weights_only=True)
    content["config"] |= {"data_root": "/home/somebody/coco", "checkpoint_dir": "/home/somebody/run"}
    torch.save(content, path)
    return path


def test_it_cuts_as_the_trained_one_does_from_half_the_file(trained, tmp_path):
    box = tmp_path / "box.pth"
    assert make_box.run_command(["make_box.py", str(trained), "--output", str(box)]) == 0
    assert box.stat().st_size < 0.6 * trained.stat().st_size
    photo = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    masks = [load(path, device="cpu").probabilities([photo[:64, :64]])[0] for path in (trained, box)]
    assert np.abs(masks[0] - masks[1]).max() < 0.01


def test_it_holds_no_path_of_the_machine(trained, tmp_path):
    box = tmp_path / "box.pth"
    make_box.run_command(["make_box.py", str(trained), "--output", str(box)])
    assert set(torch.load(box, weights_only=True)["config"]) == {"encoder", "use_attention", "image_size"}
    assert b"somebody" not in box.read_bytes()


def test_another_square_may_be_better_than_that_of_the_training(trained, tmp_path, capsys):
    box = tmp_path / "box.pth"
    make_box.run_command(["make_box.py", str(trained), "--output", str(box), "--image-size", "96"])
    assert load(box, device="cpu").image_size == 96
    assert make_box.run_command(["make_box.py", str(trained), "--output", str(box), "--image-size", "9"]) == 2
    assert "an image size of 9 is out of range" in capsys.readouterr().err


def test_a_weight_that_float16_has_not_is_named(trained, tmp_path, capsys):
    content = torch.load(trained, weights_only=True)
    name = next(iter(content["model"]))
    content["model"][name].fill_(1e6)
    torch.save(content, trained)
    assert make_box.run_command(["make_box.py", str(trained), "--output", str(tmp_path / "box.pth")]) == 2
    assert capsys.readouterr().err == f"make_box.py: error: {name} holds values that float16 has not\n"
    assert not (tmp_path / "box.pth").exists()


def test_a_model_of_drawings_is_refused(trained, tmp_path, capsys):
    content = torch.load(trained, weights_only=True)
    content["config"]["sample"] = True
    torch.save(content, trained)
    assert make_box.run_command(["make_box.py", str(trained), "--output", str(tmp_path / "box.pth")]) == 2
    assert "trained on drawings" in capsys.readouterr().err


def test_a_file_too_large_for_every_clone_is_said(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(make_box, "LARGEST", 1000)
    assert make_box.run_command(["make_box.py", str(trained), "--output", str(tmp_path / "box.pth")]) == 2
    assert "more than 0: take a smaller encoder" in capsys.readouterr().err
    assert not (tmp_path / "box.pth").exists()
