"""The model that comes with the program: small, whole, and good on a portrait that may be shown."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from test_trainer import ALONE

import trainer
from cutting.cutter import BOX, load
from utils import read_checkpoint

PICTURE = Path(__file__).resolve().parents[2] / ".github" / "astronaut.jpg"  # the photo, and its cutout beside it
PERSON = {"hair": (90, 200), "face": (150, 220), "collar": (255, 150), "badge": (390, 165), "sleeve": (330, 80)}
OTHERS = {"wall": (60, 60), "shuttle": (170, 410), "tank": (60, 415), "stand": (300, 450), "corner": (30, 500)}


@pytest.fixture(scope="module")
def alpha() -> np.ndarray:
    photo = cv2.imread(str(PICTURE), cv2.IMREAD_COLOR_RGB)[:, :512]
    return load("box", "cpu")(photo)[..., 3]


def test_it_is_small_and_says_nothing_of_the_machine_that_made_it():
    assert BOX.stat().st_size <= 8_000_000
    content = read_checkpoint(BOX)
    assert content.keys() == {"epoch", "config", "model", "metrics"}
    assert content["config"] == {"encoder": "mobilenet_v2", "use_attention": True, "image_size": 352}


@pytest.mark.parametrize("place", PERSON.values(), ids=PERSON)
def test_what_is_of_the_person_stays(alpha, place):
    assert around(alpha, place) > 230


@pytest.mark.parametrize("place", OTHERS.values(), ids=OTHERS)
def test_what_is_not_is_cut_away(alpha, place):
    assert around(alpha, place) < 25


def around(alpha: np.ndarray, place: tuple[int, int]) -> float:
    """The mean of a small square, of 0 to 255, around (y, x)."""
    y, x = place
    return alpha[y - 6 : y + 7, x - 6 : x + 7].mean()


def test_a_training_begins_with_it():
    run = trainer.start_run(trainer.parse(["--start-from", "box", "--device", "cpu"]), ALONE)
    weights = read_checkpoint(BOX)["model"]
    assert all((value == weights[name]).all() for name, value in run.model.state_dict().items())
