"""The bundled model: small, whole, and good on a portrait that may be shown."""

from __future__ import annotations

from pathlib import Path

import cv2

from cutting.cutter import BUNDLED, load
from models import read_checkpoint

PICTURE = Path(__file__).resolve().parents[2] / ".github" / "astronaut.jpg"  # the photo, and its cutout beside it
PERSON = {"hair": (90, 200), "face": (150, 220), "collar": (255, 150), "badge": (390, 165), "sleeve": (330, 80)}
BACKGROUND = {"wall": (60, 60), "shuttle": (170, 410), "tank": (60, 415), "stand": (300, 450), "corner": (30, 500)}


def test_it_is_small_and_holds_only_what_a_prediction_needs():
    assert BUNDLED.stat().st_size <= 8_000_000
    content = read_checkpoint(BUNDLED)
    assert content.keys() == {"epoch", "config", "model", "metrics"}
    assert content["config"] == {"encoder": "mobilenet_v2", "use_attention": True, "image_size": 352, "bars": "reflect"}


def test_it_keeps_the_person_of_a_portrait_and_cuts_away_the_rest():
    alpha = load("bundled", "cpu")(cv2.imread(str(PICTURE), cv2.IMREAD_COLOR_RGB)[:, :512])[..., 3]
    mean = {name: alpha[y - 6 : y + 7, x - 6 : x + 7].mean() for name, (y, x) in (PERSON | BACKGROUND).items()}
    assert {name for name, value in mean.items() if value > 230} == PERSON.keys()
    assert {name for name, value in mean.items() if value < 25} == BACKGROUND.keys()
