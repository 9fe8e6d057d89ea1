"""Draws a small COCO-format data set of people, so that a training can be tried without a network.

    python tools/make_sample.py                                   300 photos into data/sample, some seconds
    python tools/make_sample.py --root DIR --train 1000 --seed 7

    data/sample/annotations/instances_train2017.json, instances_val2017.json
    data/sample/train2017/*.jpg, val2017/*.jpg                    160 to 256 pixels on the long side
    data/sample/sample.json                                       how it was drawn

A photo depends on (seed, split, number) alone. Some are greyscale, some show nobody, some have a crowd in the
distance that is annotated with `iscrowd: 1`. Balls, suitcases and plants stand around, each its own category.
"""

import argparse
import colorsys
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it is in tools/ that Python looks

from training.streams import steady_streams

VERSION = 1  # to be raised when the drawing changes: a sample of an older version is drawn anew
DRAWN_BY = "tools/make_sample.py"
SPLITS = ("train2017", "val2017")
PERSON, SUITCASE, BALL, PLANT = 1, 33, 37, 64  # COCO's own numbers
CATEGORIES = {PERSON: "person", SUITCASE: "suitcase", BALL: "sports ball", PLANT: "potted plant"}
FINE = 2  # things are painted this many times larger than the photo: shrinking it smooths their edges
INDEX_FOLDER = ".silueta"  # where datasets.py keeps its index of the photos, if it is in the sample's folder
TURN = np.linspace(0, 2 * np.pi, 20, endpoint=False)
CIRCLE = np.stack([np.cos(TURN), np.sin(TURN)], 1)  # (20, 2)
SLOPE = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])  # Sobel's, from left to right


# --- painting ---------------------------------------------------------------------------------------------


class Spot(NamedTuple):
    """A place to stand on, in pixels, and how tall a person is there: the unit of what is painted there."""

    x: float
    ground: float
    size: float

    def outline(self, circles: list[tuple]) -> np.ndarray:
        """The skin stretched over circles (right, up, radius), in units: its corners in pixels, (n, 2)."""
        places, radii = np.split(np.array(circles)[:, None], [2], axis=2)
        points = (self.x, self.ground) + (self.size, -self.size) * (places + radii * CIRCLE)
        return cv2.convexHull(points.reshape(-1, 2).astype(np.float32))[:, 0]


class Fabric(NamedTuple):
    """What a surface is made of: colours, (3,) BGR in 0..255, and how they alternate every `pitch` units."""

    first: np.ndarray
    second: np.ndarray | None = None
    kind: str = "plain"
    pitch: float = 0.03

    def colours(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Colours, (3, h, w) or (3, 1, 1), at the positions x (1, w) and y (h, 1)."""
        if self.kind == "plain":
            return self.first[:, None, None]
        across, down = np.sin(x * (np.pi / self.pitch)), np.sin(y * (np.pi / self.pitch))
        waves = {"stripes": down + 0 * x, "checks": across * down, "dots": across * down - 0.45}[self.kind]
        return np.where(waves > 0, self.second[:, None, None], self.first[:, None, None])


@dataclass
class Thing:
    """Something that gets an annotation. mask: bool (h, w), the part of it that can be seen."""

    category: int
    crowd: bool = False
    mask: np.ndarray | None = None


class Scene:
    """A picture in the making: colours, float32 (3, H, W) BGR 0..255, and the thing seen in each pixel."""

    def __init__(self, rng: np.random.Generator, colours: np.ndarray):
        self.rng, self.colours = rng, colours
        self.height, self.width = colours.shape[1:]
        self.owner = np.zeros((self.height, self.width), np.int16)  # 0: nothing that is annotated
        self.things: list[Thing] = []
        self.brush, self.rim = 0, 0.8
        self.light = rng.choice([-0.28, 0.28]) * SLOPE - 0.2 * SLOPE.T  # from one side and from above

    def begin(self, category: int | None, crowd: bool = False) -> None:
        """What is painted from here on belongs to a new thing of this category, or to none."""
        if category is not None:
            self.things.append(Thing(category, crowd))
        self.brush = 0 if category is None else len(self.things)
        self.rim = 0.35 if category == PERSON else 0.8  # people stand out by their dark rims

    def paint(self, spot: Spot, skins: list[list[tuple]], fabric: Fabric, depth: float) -> None:
        """Fills skins, given by their circles, as one surface whose rim looks round over `depth` units."""
        outlines = [spot.outline(circles) for circles in skins]
        corners = np.concatenate(outlines)
        low, high = corners.min(0), corners.max(0)
        left, top = np.maximum(low.astype(int) - 2, 0)
        right, bottom = np.minimum(high.astype(int) + 3, (self.width, self.height))
        if left >= right or top >= bottom:
            return
        inside = np.zeros((bottom - top, right - left), np.uint8)
        for outline in outlines:
            cv2.fillConvexPoly(inside, np.round((outline - (left, top)) * 16).astype(np.int32), 1, shift=4)
        x = (np.arange(left, right, dtype=np.float32)[None] - low[0]) / np.float32(spot.size)
        y = (np.arange(top, bottom, dtype=np.float32)[:, None] - low[1]) / np.float32(spot.size)
        colours = fabric.colours(x, y) * self._shade(inside, max(depth * spot.size, 1))
        np.copyto(self.colours[:, top:bottom, left:right], colours, where=inside.view(bool))
        np.copyto(self.owner[top:bottom, left:right], self.brush, where=inside.view(bool))

    def _shade(self, inside: np.ndarray, depth: float) -> np.ndarray:
        """Brightness (h, w) of a round surface: darker at its rim and on the side away from the light."""
        rise = np.minimum(cv2.distanceTransform(inside, cv2.DIST_L2, 5) / np.float32(depth), 1)
        bulge = np.sqrt(rise * (2 - rise))
        lean = cv2.filter2D(bulge, -1, self.light * np.float32(depth / 8))
        return np.float32(self.rim) + np.float32(1.06 - self.rim) * bulge - lean.clip(-0.3, 0.3)

    def shadow(self, spot: Spot, radius: float) -> None:
        """Darkens the ground softly around a spot."""
        x, y, reach = np.float32(spot.x), np.float32(spot.ground), np.float32(radius * spot.size)
        top, bottom = np.clip([int(y - reach / 3), int(y + reach / 3)], 0, self.height)
        across = (np.arange(self.width, dtype=np.float32)[None] - x) / reach
        down = (np.arange(top, bottom, dtype=np.float32)[:, None] - y) / (reach * np.float32(0.22))
        self.colours[:, top:bottom] *= 1 - 0.5 * np.exp(-2 * (across**2 + down**2))


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """BGR, float32 (3,) in 0..255, from hue, saturation and value in 0..1."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value)[::-1], np.float32) * 255


def between(start: np.ndarray, end: np.ndarray, share: float) -> np.ndarray:
    return start + share * (end - start)


# --- people -----------------------------------------------------------------------------------------------

# Upper arm, forearm, thigh and shin in degrees, on one side and on the other. 0 hangs straight down, positive
# goes away from the middle of the body; forearm and shin go on from the bone above them.
POSES = (
    ((10, 4, 5, 0), (10, 4, 5, 0)),  # standing
    ((14, -8, 3, 2), (6, 3, 12, -10)),  # with one leg at ease
    ((34, -20, 20, -6), (28, 10, 16, -2)),  # striding
    ((12, 2, 5, 0), (140, 28, 6, 0)),  # waving
    ((148, 14, 12, -2), (152, 10, 12, -2)),  # cheering
    ((48, -92, 9, -2), (48, -92, 9, -2)),  # hands on hips
    ((50, -94, 6, 0), (14, 4, 10, -4)),  # one hand on a hip
    ((88, 2, 24, -2), (90, 2, 24, -2)),  # a star
    ((70, 60, 46, -50), (40, -70, 26, 4)),  # running
    ((30, 70, 30, -34), (95, -10, 22, -8)),  # dancing
)

# Joints of a body of height 1, (right, up) from the hips; those of arms and legs follow from the pose.
HEAD = {
    "neck": (0, 0.33), "chin": (0, 0.385), "crown": (0, 0.432), "top": (0, 0.445), "brow": (0, 0.425),
    "eyel": (-0.024, 0.424), "eyer": (0.024, 0.424), "lipl": (-0.02, 0.39), "lip": (0, 0.383),
    "lipr": (0.02, 0.39), "domel": (-0.02, 0.492), "domer": (0.02, 0.492), "briml": (-0.085, 0.47),
    "brimr": (0.085, 0.47),
}  # fmt: skip

# What a body is painted with, the farthest first: the cut of clothes or hair it belongs to (None: always),
# its fabric, its joints with the radius at each. A limb, named without l and r, is painted on either side;
# what has four joints is filled between all of them.
PARTS = (
    ("long hair", "hair", {"crown": 0.082, "neck": 0.085}),
    (None, "shoes", {"ankle": 0.032, "toe": 0.024}),
    (None, "skin", {"hip": 0.058, "knee": 0.046, "shank": 0.033}),
    ("trousers", "bottom", {"hip": 0.062, "knee": 0.048, "shank": 0.037}),
    ("shorts", "bottom", {"hip": 0.064, "thigh": 0.058}),
    ("skirt", "bottom", {"hipl": 0.058, "hipr": 0.058, "heml": 0.03, "hemr": 0.03}),
    (None, "skin", {"chin": 0.034, "neck": 0.04}),
    (None, "top", {"shoulderl": 0.047, "shoulderr": 0.047, "hipl": 0.056, "hipr": 0.056}),
    (None, "skin", {"shoulder": 0.042, "elbow": 0.034, "hand": 0.027}),
    ("short sleeves", "top", {"shoulder": 0.047, "sleeve": 0.043}),
    ("long sleeves", "top", {"shoulder": 0.047, "elbow": 0.039, "cuff": 0.033}),
    (None, "skin", {"hand": 0.03, "fingers": 0.026}),
    (None, "hair", {"top": 0.074, "brow": 0.073}),
    (None, "skin", {"crown": 0.064, "chin": 0.05}),
    ("front", "ink", {"eye": 0.0085}),
    ("front", "lips", {"lipl": 0.005, "lip": 0.005, "lipr": 0.005}),
    ("back", "hair", {"crown": 0.076, "chin": 0.058}),
    ("hat", "bottom", {"domel": 0.052, "domer": 0.052}),
    ("hat", "bottom", {"briml": 0.013, "brimr": 0.013}),
)


def skeleton(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """All joints, (right, up), of a body of height 1 in a random pose that stands on (0, 0)."""
    joints = {name: np.array(place) for name, place in HEAD.items()}
    slender = rng.uniform(0.75, 1.05)  # less than 1 looks like being turned a little to the side
    for side, sign, pose in zip("lr", (-1, 1), rng.permutation(POSES[rng.integers(len(POSES))]), strict=True):
        upper, fore, thigh, shin = np.radians(pose + rng.normal(0, 4, 4))
        shoulder, elbow, hand = bones((0.1 * slender, 0.29), (upper, upper + fore), 0.165)
        hip, knee, ankle = bones((0.052 * slender, 0), (thigh, thigh + shin), 0.235)
        limbs = {
            "shoulder": shoulder, "elbow": elbow, "hand": hand, "sleeve": between(shoulder, elbow, 0.5),
            "cuff": between(elbow, hand, 0.85), "fingers": between(elbow, hand, 1.12),
            "hip": hip, "knee": knee, "ankle": ankle, "thigh": between(hip, knee, 0.8),
            "hem": between(hip, knee, 0.85) + (0.04, 0), "shank": between(knee, ankle, 0.92),
            "toe": ankle + (0.05, -0.022),
        }  # fmt: skip
        joints |= {name + side: place * (sign, 1) for name, place in limbs.items()}
    lean = rng.normal(0, 0.07)
    turn = np.array([[np.cos(lean), np.sin(lean)], [-np.sin(lean), np.cos(lean)]])
    sole = min(joints["toel"][1], joints["toer"][1]) - 0.024
    return {name: place @ turn - (0, sole) for name, place in joints.items()}


def bones(start: tuple, angles: tuple, length: float) -> list[np.ndarray]:
    """The three joints of a right arm or leg; angles in radians from straight down."""
    joints = [np.array(start)]
    for angle in angles:
        joints.append(joints[-1] + length * np.array([np.sin(angle), -np.cos(angle)]))
    return joints


def wardrobe(rng: np.random.Generator) -> tuple[set, dict[str, Fabric]]:
    """The cuts and the fabrics that a person wears."""
    hue, other, dark = rng.uniform(size=3)
    skin = between(hsv(0.065, 0.28, 0.97), hsv(0.065, 0.59, 0.48), dark)
    hair = hsv(rng.uniform(0.04, 0.11), rng.uniform(0.4, 0.75), rng.choice([0.15, 0.3, 0.5, 0.8]))
    head = rng.choice(["short hair", "short hair", "long hair", "bald", "hat"])
    legs = rng.choice(["trousers", "trousers", "shorts", "skirt"])
    cuts = {head, legs, rng.choice(["short sleeves", "long sleeves"]), rng.choice([*["front"] * 6, "back"])}
    pattern = rng.choice(["plain", "plain", "stripes", "checks", "dots"]), rng.uniform(0.02, 0.04)
    shirt, second = hsv(hue, rng.uniform(0.65, 0.95), rng.uniform(0.7, 0.98)), hsv(hue + 0.08, 0.2, 0.97)
    jeans = hsv(rng.choice([0.6, 0.62, other]), rng.uniform(0.6, 0.9), rng.uniform(0.4, 0.8))
    return cuts, {
        "skin": Fabric(skin),
        "hair": Fabric(skin if head == "bald" else hair),
        "top": Fabric(shirt, second, *pattern),
        "bottom": Fabric(jeans),
        "shoes": Fabric(hsv(other + 0.5, 0.5, rng.choice([0.25, 0.9]))),
        "ink": Fabric(hsv(0.05, 0.3, 0.15)),
        "lips": Fabric(hsv(0.98, 0.6, 0.5)),
    }


def draw_body(scene: Scene, spot: Spot) -> None:
    cuts, fabrics = wardrobe(scene.rng)
    joints = skeleton(scene.rng)
    for cut, fabric, shape in PARTS:
        if cut is not None and cut not in cuts:
            continue
        depth = max(shape.values()) * (1.8 if len(shape) == 4 else 1)
        for side in [""] if next(iter(shape)) in joints else "lr":
            circles = [(*joints[name + side], radius) for name, radius in shape.items()]
            limb = [circles[i : i + 2] for i in range(max(len(circles) - 1, 1))]
            scene.paint(spot, [circles] if len(circles) == 4 else limb, fabrics[fabric], depth)


def draw_person(scene: Scene, spot: Spot) -> None:
    scene.begin(PERSON)
    draw_body(scene, spot)


def draw_crowd(scene: Scene, spot: Spot) -> None:
    """Two rows of people, the farther one a little smaller, as one thing."""
    scene.begin(PERSON, crowd=True)
    for row in (0.86, 1.0):
        ground = spot.ground - (1 - row) * spot.size
        for place in scene.rng.permutation(9) - 4 + scene.rng.normal(0, 0.12, 9):
            size = row * spot.size * scene.rng.uniform(0.9, 1.05)
            draw_body(scene, Spot(spot.x + 0.3 * spot.size * place, ground, size))


# --- other things -----------------------------------------------------------------------------------------


def draw_ball(scene: Scene, spot: Spot) -> None:
    scene.begin(BALL)
    kind = scene.rng.choice(["plain", "stripes"])
    fabric = Fabric(hsv(scene.rng.uniform(), 0.25, 0.75), hsv(0, 0, 0.94), kind, 0.06)
    scene.paint(spot, [[(0, 0.1, 0.1)]], fabric, 0.1)


def draw_suitcase(scene: Scene, spot: Spot) -> None:
    scene.begin(SUITCASE)
    wide, tall = scene.rng.uniform(0.1, 0.17), scene.rng.uniform(0.28, 0.4)
    colour = hsv(scene.rng.uniform(), 0.15, scene.rng.uniform(0.55, 0.75))
    handle, case = Fabric(colour * 0.7), Fabric(colour, colour * 0.8, "stripes", tall / 5)
    for fabric, half, top in ((handle, 0.4 * wide, 1.2 * tall), (case, wide, tall)):
        corners = [(-half, 0.03), (half, 0.03), (-half, top), (half, top)]
        scene.paint(spot, [[(*corner, 0.02) for corner in corners]], fabric, 0.04)


def draw_plant(scene: Scene, spot: Spot) -> None:
    scene.begin(PLANT)
    for angle in scene.rng.permutation(np.linspace(-1.1, 1.1, 9)):
        green = hsv(scene.rng.uniform(0.25, 0.38), 0.38, scene.rng.uniform(0.55, 0.75))
        length = scene.rng.uniform(0.22, 0.36)
        tip = (length * np.sin(angle), 0.17 + length * np.cos(angle), 0.03)
        scene.paint(spot, [[(0, 0.17, 0.012), tip]], Fabric(green), 0.03)
    pot = [(-0.06, 0.01, 0.01), (0.06, 0.01, 0.01), (-0.09, 0.18, 0.01), (0.09, 0.18, 0.01)]
    scene.paint(spot, [pot], Fabric(hsv(0.05, 0.25, 0.75)), 0.08)


def draw_tree(scene: Scene, spot: Spot) -> None:
    scene.begin(None)
    bark = Fabric(hsv(0.07, 0.3, 0.58), hsv(0.07, 0.3, 0.5), "checks", 0.04)
    scene.paint(spot, [[(0, 0, 0.09), (0, 1, 0.06)]], bark, 0.08)
    hue = scene.rng.uniform(0.2, 0.35)
    for turn in scene.rng.permutation(30):  # tufts along a spiral, in any order
        out, radius = 0.62 * np.sqrt(turn / 30), scene.rng.uniform(0.12, 0.2)
        green = hsv(hue + scene.rng.normal(0, 0.01), 0.42, scene.rng.uniform(0.5, 0.7))
        tuft = (out * np.cos(turn * 2.4), 1.35 + 0.8 * out * np.sin(turn * 2.4), radius)
        scene.paint(spot, [[tuft]], Fabric(green), 0.12)


def draw_lamp(scene: Scene, spot: Spot) -> None:
    scene.begin(None)
    scene.paint(spot, [[(0, 0, 0.03), (0, 1.7, 0.02)]], Fabric(hsv(0.6, 0.08, 0.55)), 0.03)
    scene.paint(spot, [[(0, 1.7, 0.075)]], Fabric(hsv(0.13, 0.2, 0.96)), 0.06)


# --- grounds ----------------------------------------------------------------------------------------------


def noise(rng: np.random.Generator, height: int, width: int, cells: tuple = (4, 9, 30, 90)) -> np.ndarray:
    """Clouds of several sizes, float32 (height, width, 1), around 0; `cells` counts the blobs across."""
    field = np.zeros((height, width), np.float32)
    for octave, count in enumerate(cells):
        grid = rng.standard_normal((max(2, count * height // width), count), np.float32)
        field += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) * np.float32(0.6**octave)
    return field[..., None] / np.float32(1.6)


def tiles(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, shift: float, colours: tuple) -> np.ndarray:
    """Tiles of 1 by 1 in the units of x and y, (h, w, 3): each has its tone, each row moves by `shift`."""
    row = np.floor(y)
    x = x + shift * row
    tones = rng.uniform(0.86, 1.1, (31, 37, 1)).astype(np.float32)
    tile = colours[0] * tones[row.astype(int) % 31, np.floor(x).astype(int) % 37]
    return np.where(((x % 1 < 0.07) | (y % 1 < 0.07))[..., None], colours[1], tile)


def draw_wall(rng: np.random.Generator, height: int, width: int, kind: str) -> np.ndarray:
    """A brick wall, a house front, a wallpaper or plaster, float32 (height, width, 3)."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    stains = noise(rng, height, width)
    base = hsv(rng.uniform(), rng.uniform(0.06, 0.22), rng.uniform(0.6, 0.88))
    if kind == "bricks":
        base = hsv(rng.uniform(0, 0.1), rng.uniform(0.22, 0.34), rng.uniform(0.5, 0.7))
        return tiles(rng, x / 22, y / 9, 0.5, (base, base * 0.4 + 110)) * (1 + 0.08 * stains)
    if kind == "front":
        wall = tiles(rng, x / 38, y / 52, 0, (base, base * 0.8)) * (1 + 0.05 * stains)
        pane = (abs(x / 38 % 1 - 0.53) < 0.26) & (abs(y / 52 % 1 - 0.53) < 0.3)
        return np.where(pane[..., None], hsv(0.58, 0.25, 0.4) * (1 + 0.3 * stains), wall)
    stripes = np.sin(x / rng.uniform(2, 6))[..., None] > 0 if kind == "paper" else 0
    return base * (1 - 0.12 * stripes + 0.09 * stains)


def draw_sky(rng: np.random.Generator, height: int, width: int, horizon: int) -> np.ndarray:
    """A sky with clouds and two or three ridges of hills, float32 (height, width, 3)."""
    y, x = np.float32(np.arange(height))[:, None, None], np.float32(np.arange(width))[None, :, None]
    clouds = noise(rng, height, width)
    pale = 0.7 * np.minimum(y / horizon, 1) + np.clip(clouds, 0, 0.3)
    sky = between(hsv(0.58, 0.55, 0.9), hsv(0.1, 0.06, 0.95), pale)
    for near in np.linspace(0.2, 1, rng.integers(2, 4), dtype=np.float32):
        ridge = 1.3 + sum(np.sin(x * (f / width) + rng.uniform(0, 7)) / f**0.7 for f in (5, 11, 37))
        hill = between(hsv(0.56, 0.25, 0.75), hsv(0.27, 0.48, 0.55), near) * (1 + 0.13 * near * clouds)
        sky = np.where(y > horizon - 0.11 * height * (1.3 - near) * ridge, hill, sky)
    return sky


def draw_floor(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Grass, sand, asphalt, planks or slabs from the horizon down, float32 (height, width, 3)."""
    near = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    kinds = {"grass": hsv(0.25, 0.5, 0.62), "sand": hsv(0.12, 0.2, 0.85), "asphalt": hsv(0.6, 0.05, 0.53),
             "planks": hsv(0.09, 0.33, 0.68), "slabs": hsv(0.1, 0.08, 0.66)}  # fmt: skip
    kind = rng.choice(["grass", *kinds])
    colour = kinds[kind] * np.float32(rng.uniform(0.85, 1.1))
    grain = noise(rng, height, width, (5, 40, 120)) * (0.3 + 0.7 * near[..., None])
    ground = colour * (0.85 + 0.2 * near[..., None] + 0.13 * grain)
    if kind in ("planks", "slabs"):
        across, away = (0.35, 6) if kind == "slabs" else (0.15, 1.2)
        x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None] / (across * (near + 0.1))
        paved = tiles(rng, x, away / (near + 0.15) + 0 * x, 0.37, (colour, colour * 0.7))
        ground += (paved - colour) * np.minimum(near * 3, 1)[..., None]  # far away the joints blur
    return ground


def draw_ground(rng: np.random.Generator, height: int, width: int, horizon: int) -> np.ndarray:
    """A sky or a wall down to the row `horizon` and a floor below, float32 (height, width, 3)."""
    kind = rng.choice(["sky", "sky", "sky", "bricks", "paper", "front", "plaster"])
    ground = draw_sky(rng, height, width, horizon) if kind == "sky" else draw_wall(rng, height, width, kind)
    ground[horizon:] = draw_floor(rng, height - horizon, width)
    haze = rng.uniform(0.15, 0.35)  # pale and out of focus, as behind a portrait
    return cv2.GaussianBlur(np.float32(ground), (0, 0), rng.uniform(0.8, 1.6)) * (1 - haze) + 240 * haze


# --- photos -----------------------------------------------------------------------------------------------

# What else may stand there, how often, and how large: the height, as a share of the photo's, that a person
# would have in its place. What is smaller is farther away.
OBJECTS = (
    (draw_tree, 0.35, (0.25, 0.45)),
    (draw_tree, 0.35, (0.3, 0.5)),
    (draw_lamp, 0.25, (0.3, 0.6)),
    (draw_ball, 0.35, (0.4, 0.9)),
    (draw_suitcase, 0.3, (0.45, 0.9)),
    (draw_plant, 0.3, (0.45, 0.9)),
)


def draw_photo(seed: int, split: int, number: int) -> tuple[np.ndarray, list[Thing]]:
    """One photo, uint8 (h, w, 3) BGR or (h, w) grey, and the things seen in it, the farthest first."""
    rng = np.random.default_rng([seed, split, number])
    short, long = sorted(int(side) for side in rng.integers((160, 200), (200, 257)))
    height, width = (long, short) if rng.uniform() < 0.4 else (short, long)
    horizon = int(height * rng.uniform(0.32, 0.5))
    ground = cv2.resize(draw_ground(rng, height, width, horizon), None, fx=FINE, fy=FINE)
    scene = Scene(rng, np.stack(cv2.split(ground)))
    place_things(scene, horizon * FINE, nobody=number % 15 == 4, crowd=number % 10 == 3)  # never both
    for index, thing in enumerate(scene.things, 1):
        seen = (scene.owner == index).astype(np.float32)
        thing.mask = cv2.resize(seen, (width, height), interpolation=cv2.INTER_AREA) > 0.5
    photo = expose(rng, cv2.resize(cv2.merge(scene.colours), (width, height), interpolation=cv2.INTER_AREA))
    photo = cv2.cvtColor(photo, cv2.COLOR_BGR2GRAY) if number % 12 == 6 else photo
    return photo, [thing for thing in scene.things if thing.mask.any()]


def place_things(scene: Scene, horizon: int, nobody: bool, crowd: bool) -> None:
    """Paints what stands on the ground, the farthest first, in perspective: the larger, the lower."""
    rng = scene.rng
    chance = 2 if nobody else 1
    objects = [(draw, sizes) for draw, share, sizes in OBJECTS if rng.uniform() < share * chance]
    stands = [(draw, rng.uniform(), rng.uniform(*sizes)) for draw, sizes in objects]
    people = [] if nobody else place_people(rng, scene.width / scene.height)
    stands += [(draw_person, x, size) for x, size in people]
    stands += [(draw_crowd, rng.uniform(0.2, 0.8), rng.uniform(0.24, 0.3))] if crowd else []
    eye = rng.uniform(0.72, 0.92)  # how high the horizon is for a person of height 1
    for draw, x, size in sorted(stands, key=lambda stand: stand[2]):
        spot = Spot(x * scene.width, horizon + eye * size * scene.height, size * scene.height)
        scene.shadow(spot, 1.2 if draw is draw_crowd else 0.3)
        draw(scene, spot)


def place_people(rng: np.random.Generator, aspect: float) -> list[tuple[float, float]]:
    """(x, size) of one to four people, in shares of the photo's width and height; some stand close by."""
    people = [(rng.uniform(0.2, 0.8), rng.uniform(0.8, 1.3))]
    for _ in range(rng.choice(4, p=[0.4, 0.3, 0.2, 0.1])):
        x, size = people[-1]
        beside = x + rng.choice([-1, 1]) * rng.uniform(0.18, 0.34) * size / aspect
        x = beside if rng.uniform() < 0.5 else rng.uniform()
        people.append((np.clip(x, 0.03, 0.97), rng.uniform(0.55, 1.1)))
    return people


def expose(rng: np.random.Generator, colours: np.ndarray) -> np.ndarray:
    """What a camera makes of colours (h, w, 3): uneven light, a tint, a little blur and noise; uint8."""
    height, width = colours.shape[:2]
    slope = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None] * rng.uniform(-0.12, 0.12)
    fall = np.linspace(-1, 1, height, dtype=np.float32)[:, None, None] ** 2 * np.float32(0.08)
    tint = np.float32(rng.uniform(0.94, 1.08) * rng.uniform(0.95, 1.05, 3))
    blurred = cv2.GaussianBlur(colours * (1 + slope - fall) * tint, (0, 0), rng.uniform(0.3, 0.7))
    grain = rng.standard_normal(colours.shape, np.float32) * np.float32(rng.uniform(1, 5))
    return np.clip(blurred + grain, 0, 255).astype(np.uint8)


# --- the data set -----------------------------------------------------------------------------------------


def polygons(mask: np.ndarray) -> list[list[float]]:
    """Outlines [x, y, x, y, ...] of a mask, bool (h, w); cut in two at a hole, which COCO's have not."""
    double = mask.astype(np.uint8).repeat(2, 0).repeat(2, 1)  # outlines then run around the pixels' centres
    outlines, tree = cv2.findContours(double, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    for outline, node in zip(outlines, () if tree is None else tree[0], strict=True):
        if node[3] >= 0:  # it lies inside another one
            x, _, width, _ = cv2.boundingRect(outline)
            cut = np.arange(mask.shape[1]) < (x + width // 2) // 2
            return polygons(mask & cut) + polygons(mask & ~cut)
    return [((outline.ravel() + 0.5) / 2).tolist() for outline in outlines]


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed RLE of a mask, bool (h, w): runs down the columns, the first of zeros."""
    flat = mask.ravel(order="F").astype(np.int8)
    starts = np.flatnonzero(np.diff(flat, prepend=0))
    return {"counts": np.diff(starts, prepend=0, append=flat.size).tolist(), "size": list(mask.shape)}


def annotation(thing: Thing, image_id: int, place: int) -> dict:
    """The COCO record of the thing at this place in a photo."""
    x, y, width, height = cv2.boundingRect(thing.mask.astype(np.uint8))
    return {
        "id": 100 * image_id + place, "image_id": image_id, "category_id": thing.category,
        "iscrowd": int(thing.crowd), "area": float(thing.mask.sum()),
        "bbox": [float(x), float(y), float(width), float(height)],
        "segmentation": run_lengths(thing.mask) if thing.crowd else polygons(thing.mask),
    }  # fmt: skip


def image_ids(split: int, count: int) -> range:
    """Ids that no two splits share."""
    return range(split + 1, len(SPLITS) * count + split + 1, len(SPLITS))


def write_sample(root: Path, marker: dict) -> None:
    """Writes the whole sample that `marker` describes into the new folder `root`."""
    (root / "annotations").mkdir(parents=True)
    for split, name in enumerate(SPLITS):
        (root / name).mkdir()
        coco = draw_split(root / name, split, marker)
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(coco))
    (root / "sample.json").write_text(json.dumps(marker))


def draw_split(folder: Path, split: int, marker: dict) -> dict:
    """Draws the photos of one split into `folder` and returns the content of its annotation file."""
    categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    coco = {"info": marker, "licenses": [], "categories": categories, "images": [], "annotations": []}
    for number, image_id in enumerate(image_ids(split, marker[SPLITS[split]])):
        photo, things = draw_photo(marker["seed"], split, number)
        (height, width), name = photo.shape[:2], f"{image_id:012d}.jpg"
        (folder / name).write_bytes(cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes())
        coco["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
        coco["annotations"] += [annotation(thing, image_id, place) for place, thing in enumerate(things)]
    return coco


def files_of(marker: dict) -> set[str]:
    """Names, below its root, of all files of the sample that was drawn as `marker` says."""
    names = {"sample.json"} if marker else set()
    for split, name in enumerate(SPLITS):
        count = marker.get(name, 0)
        names |= {f"{name}/{image_id:012d}.jpg" for image_id in image_ids(split, count)}
        names |= {f"annotations/instances_{name}.json"} if count else set()
    return names


def read_marker(root: Path) -> dict:
    """How the sample in `root` was drawn; empty where this script has drawn none."""
    try:
        marker = json.loads((root / "sample.json").read_text())
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) and marker.get("drawn_by") == DRAWN_BY else {}


def refuse_what_is_not_ours(root: Path) -> None:
    """Raises FileExistsError where `root` is, or holds, anything but a sample that this script has drawn."""
    ours = files_of(read_marker(root))
    for path in [root] if root.is_file() else root.rglob("*"):
        name = path.relative_to(root).as_posix()
        if not path.is_dir() and name not in ours and not name.startswith(f"{INDEX_FOLDER}/"):
            raise FileExistsError(f"{path} is no part of a drawn sample: choose another folder than {root}")


def draw_sample(root: Path, train: int = 240, val: int = 60, seed: int = 0) -> Path:
    """Draws the sample into the folder `root`, whole or not at all, and returns `root`.

    A sample of the same settings is left as it is, one of other settings is replaced. FileExistsError where
    `root` holds anything else, ValueError for settings that cannot be.
    """
    if min(train, val) < 1 or seed < 0:
        raise ValueError(f"train and val must be 1 or more and seed 0 or more, not {train}, {val} and {seed}")
    marker = {"drawn_by": DRAWN_BY, "version": VERSION, "seed": seed, SPLITS[0]: train, SPLITS[1]: val}
    place = Path(root).resolve()
    if read_marker(place) == marker and all((place / name).is_file() for name in files_of(marker)):
        return root
    refuse_what_is_not_ours(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as work:
        new, old = Path(work, "new"), Path(work, "old")
        write_sample(new, marker)
        if place.exists():
            place.rename(old)
        new.rename(place)
    return root


def main() -> int:
    parser = argparse.ArgumentParser(description="Draws a small COCO-format data set of people.")
    parser.add_argument("--root", type=Path, default=Path("data/sample"), help="the new folder (%(default)s)")
    parser.add_argument("--train", type=int, default=240, help="photos to train on (%(default)s)")
    parser.add_argument("--val", type=int, default=60, help="photos to validate on (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other photos (%(default)s)")
    steady_streams()
    settings = parser.parse_args()
    try:
        print(f"The sample is in {draw_sample(**vars(settings))}")
    except (OSError, ValueError) as error:
        print(f"make_sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
