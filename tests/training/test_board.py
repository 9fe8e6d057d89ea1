"""TensorBoard's files: nothing unless wanted, what is written when, and failures that end nothing."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch

from training.board import Board
from utils import UserError

LOSS, TERMS = torch.tensor(0.5), {"bce": torch.tensor(0.25)}


@pytest.fixture
def writer(monkeypatch) -> Mock:
    """In the place of TensorBoard's own."""
    writer = Mock()
    package = SimpleNamespace(SummaryWriter=Mock(return_value=writer))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    return writer


def scalars(writer: Mock) -> list[tuple]:
    return [call.args for call in writer.add_scalar.mock_calls]


def begun(folder) -> Board:
    board = Board(wanted=True)
    board.begin(folder, {"log_every": 2, "encoder": "resnet18"}, 10)
    return board


def test_it_does_nothing_where_it_is_not_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    board = Board()
    board.begin(tmp_path, {}, 0)
    board.after_step(20, LOSS, TERMS, 1e-4)
    board.after_epoch({"epoch": 1}, tmp_path / "preview.png")
    assert not any(tmp_path.iterdir())


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"--tensorboard .* pip install tensorboard$"):
        Board(wanted=True)


def test_what_is_written(writer, tmp_path):
    preview = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    cv2.imwrite(str(tmp_path / "preview.png"), preview[..., ::-1])
    board = begun(tmp_path / "tensorboard")
    assert "| encoder | resnet18 |" in writer.add_text.call_args.args[1]
    for step in (11, 12, 13):
        board.after_step(step, LOSS, TERMS, 1e-4)
    assert scalars(writer) == [("step/loss", 0.5, 12), ("step/bce", 0.25, 12), ("step/learning_rate", 1e-4, 12)]
    writer.reset_mock()
    board.after_epoch({"epoch": 3, "train_iou": 0.5, "val_bce_loss": 0.75, "seconds": 9.0}, tmp_path / "preview.png")
    assert scalars(writer) == [("iou/train", 0.5, 3), ("bce_loss/val", 0.75, 3), ("run/seconds", 9.0, 3)]
    name, shown, epoch = writer.add_image.call_args.args
    assert (name, epoch, writer.add_image.call_args.kwargs) == ("preview", 3, {"dataformats": "HWC"})
    np.testing.assert_array_equal(shown, preview)
    writer.flush.assert_called_once()


def test_nothing_is_fetched_between(writer, tmp_path, monkeypatch):
    board = begun(tmp_path)
    monkeypatch.setattr(torch.Tensor, "tolist", None)  # on a GPU it would wait
    board.after_step(13, LOSS, TERMS, 1e-4)
    assert scalars(writer) == []


def test_what_cannot_be_written_is_said_once_and_ends_nothing(writer, tmp_path, capsys):
    board = begun(tmp_path)
    writer.add_scalar.side_effect = OSError(28, "No space left on device")
    for step in (12, 14):
        board.after_step(step, LOSS, TERMS, 1e-4)
    board.after_epoch({"epoch": 1}, tmp_path / "preview.png")
    assert capsys.readouterr().out.splitlines() == [
        "TensorBoard's files cannot be written: No space left on device: the training goes on without them"
    ]


def test_tensorboard_itself_reads_them(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cv2.imwrite(str(tmp_path / "preview.png"), np.zeros((4, 4, 3), np.uint8))
    board = begun(tmp_path / "tensorboard")
    board.after_step(12, LOSS, TERMS, 1e-4)
    board.after_epoch({"epoch": 1, "val_iou": 0.5}, tmp_path / "preview.png")
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("iou/val")] == [(1, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [(12, 0.5)]
    assert events.Tags()["images"] == ["preview"]
    assert events.Tags()["tensors"] == ["settings/text_summary"]
