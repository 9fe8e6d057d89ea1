"""The pictures of a run, pixel by pixel."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from training.pictures import on_checkerboard, save_sheet

SIDE, GAP, HEAD = 32, 4, 24  # pixels


def preview(tmp_path, targets: torch.Tensor, predictions: torch.Tensor) -> np.ndarray:
    save_sheet(targets, predictions, tmp_path / "preview.png")
    return cv2.imread(str(tmp_path / "preview.png"), cv2.IMREAD_UNCHANGED)[..., ::-1]


def cell(sheet: np.ndarray, line: int, column: str) -> np.ndarray:
    left = ["photo", "truth", "prediction", "cutout"].index(column) * (SIDE + GAP)
    top = HEAD + line * (SIDE + GAP)
    return sheet[top : top + SIDE, left : left + SIDE]


def rgba(alpha, colour=(1.0, 0.0, 0.0)) -> torch.Tensor:
    picture = torch.tensor([*colour, 0.0]).view(4, 1, 1).repeat(1, SIDE, SIDE)
    picture[3] = torch.as_tensor(alpha)
    return picture


def test_preview_shows_photo_and_mask_as_they_are(tmp_path):
    mask = torch.zeros(SIDE, SIDE)
    mask[5:20, 8:11] = 1
    targets = torch.stack([rgba(mask), rgba(1.0, (0.0, 0.2, 1.0))])
    sheet = preview(tmp_path, targets, targets.flip(0))
    assert sheet.shape == (HEAD + 2 * (SIDE + GAP), 4 * (SIDE + GAP), 3)
    assert (cell(sheet, 0, "photo") == (255, 0, 0)).all()
    assert (cell(sheet, 1, "photo") == (0, 51, 255)).all()
    assert np.array_equal(cell(sheet, 0, "truth"), np.repeat(mask.numpy()[..., None] * 255, 3, axis=2))
    assert (cell(sheet, 1, "truth") == 255).all()
    assert (cell(sheet, 0, "prediction") == 255).all()


@pytest.mark.parametrize(("alpha", "grey"), [(0.0, {0}), (0.3, {76, 77}), (0.6, {153}), (1.0, {255})])
def test_the_predicted_alpha_is_not_stretched(alpha, grey, tmp_path):
    dark = (0.1, 0.0, 0.0)  # so that nothing but the alpha is bright
    shown = cell(preview(tmp_path, rgba(1.0)[None], rgba(alpha, dark)[None]), 0, "prediction")
    assert set(shown.ravel().tolist()) <= grey


def test_the_predicted_alpha_is_not_thresholded(tmp_path):
    ramp = torch.linspace(0, 1, SIDE).expand(SIDE, SIDE)
    shown = cell(preview(tmp_path, rgba(1.0)[None], rgba(ramp)[None]), 0, "prediction")
    assert np.abs(shown[0, :, 0] - np.linspace(0, 255, SIDE)).max() <= 0.51


def test_the_cutout_lies_on_a_checkerboard(tmp_path):
    picture = np.zeros((16, 16, 4), np.uint8)
    picture[..., :3] = (200, 100, 0)
    # By hand, on white (255) and on grey (204): 128 / 255 of the colour and 127 / 255 of the ground.
    by_hand = {
        0: ((255, 255, 255), (204, 204, 204)),
        255: ((200, 100, 0), (200, 100, 0)),
        128: ((227, 177, 127), (202, 152, 102)),
    }
    for alpha, (on_white, on_grey) in by_hand.items():
        picture[..., 3] = alpha
        shown = on_checkerboard(picture)
        assert (shown[:8, :8] == on_white).all()
        assert (shown[8:, 8:] == on_white).all()
        assert (shown[:8, 8:] == on_grey).all()
        assert (shown[8:, :8] == on_grey).all()
    cutout = cell(preview(tmp_path, rgba(1.0)[None], rgba(0.0)[None]), 0, "cutout")
    assert set(cutout.ravel().tolist()) == {204, 255}
    own = cell(preview(tmp_path, rgba(1.0, (0.0, 0.0, 1.0))[None], rgba(1.0)[None]), 0, "cutout")
    assert (own == (255, 0, 0)).all()  # the prediction's colours
