"""Draws a small COCO-format data set of people, so that a training can be tried without a network.

    python tools/make_sample.py                  300 photos into data/sample, as trainer.py --sample does

A photo depends on (seed, split, number) alone. Some are greyscale, some show nobody.
"""

from __future__ import annotations

import colorsys
import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks for imports in tools/

from training.command_line import OneLineParser, run_cli
from utils import UserError, explain_write_errors

VERSION = 3  # raised when the drawing changes
SPLITS = ("train2017", "val2017")
PERSON = 1  # COCO's own id
ANGLES = np.linspace(0, 2 * np.pi, 20, endpoint=False)
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)  # (20, 2)
# Upper arm, forearm, thigh and shin in degrees, on one side of the body and on the other. 0 hangs straight down,
# positive goes outwards; forearm and shin are relative to the bone above them.
POSES = (
    ((10, 4, 5, 0), (10, 4, 5, 0)),  # standing
    ((34, -20, 20, -6), (28, 10, 16, -2)),  # striding
    ((12, 2, 5, 0), (140, 28, 6, 0)),  # waving
    ((148, 14, 12, -2), (152, 10, 12, -2)),  # cheering
    ((48, -92, 9, -2), (48, -92, 9, -2)),  # hands on hips
    ((88, 2, 24, -2), (90, 2, 24, -2)),  # a star
    ((70, 60, 46, -50), (40, -70, 26, 4)),  # running
)


class Scene:
    """A picture in the making: its colours, and the person who is visible in each pixel."""

    def __init__(self, rng: np.random.Generator, background: np.ndarray):
        self.rng, self.colours = rng, background  # float32 (H, W, 3), BGR in 0..255
        self.owner = np.zeros(background.shape[:2], np.int16)  # a person's number from 1 on; else background
        self.number = 0  # of the person who is being painted
        self.foot, self.unit = (0.0, 0.0), 1.0  # pixels: the point it stands on, and a person's height there

    def paint(self, hulls: Sequence[Sequence[tuple]], colour: np.ndarray, stripes: np.ndarray | None = None) -> None:
        """Fills convex hulls of circles (x, height, radius), in units from the foot point, as one round surface."""
        outlines = []
        for circles in map(np.array, hulls):
            points = (circles[:, None, :2] + circles[:, None, 2:] * CIRCLE).reshape(-1, 2)
            outlines.append(cv2.convexHull(np.float32(self.foot + self.unit * points * (1, -1)))[:, 0])
        corners = np.concatenate(outlines)
        left, top = np.maximum(corners.min(0).astype(int) - 2, 0)
        right, bottom = np.minimum(corners.max(0).astype(int) + 3, self.owner.shape[::-1])
        if left >= right or top >= bottom:
            return
        inside = np.zeros((bottom - top, right - left), np.uint8)
        for outline in outlines:
            cv2.fillConvexPoly(inside, np.round((outline - (left, top)) * 16).astype(np.int32), 1, shift=4)
        if stripes is not None:
            rows = (np.arange(top, bottom) - corners[:, 1].min()) / (0.03 * self.unit)
            colour = np.where((rows % 2 < 1)[:, None, None], colour, stripes)
        depth = max(radius for circles in hulls for *_, radius in circles) * self.unit
        bulge = np.sqrt(np.minimum(cv2.distanceTransform(inside, cv2.DIST_L2, 5) / depth, 1))[..., None]
        area, inside = np.s_[top:bottom, left:right], inside.view(bool)
        np.copyto(self.colours[area], np.float32(colour * (0.5 + 0.55 * bulge)), where=inside[..., None])
        np.copyto(self.owner[area], self.number, where=inside)


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """Returns BGR, float32 (3,) in 0..255, of hue, saturation and value in 0..1."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value)[::-1], np.float32) * 255


def draw_person(scene: Scene) -> None:
    """Draws a body of random pose, skin, hair and clothes."""
    rng, legs, arms = scene.rng, [], []
    for side, pose in zip((-1, 1), rng.permutation(POSES[rng.integers(len(POSES))]), strict=True):
        upper_arm, forearm, thigh, shin = np.radians(pose + rng.normal(0, 5, 4))
        legs.append(joints((0.05, 0.5), 0.235, thigh, shin) * (side, 1))  # hip, knee, ankle
        arms.append(joints((0.09, 0.78), 0.165, upper_arm, forearm) * (side, 1))  # shoulder, elbow, hand
    skin = hsv(0.065, rng.uniform(0.3, 0.6), rng.uniform(0.5, 0.97))
    hair = skin if rng.uniform() < 0.1 else hsv(rng.uniform(0.04, 0.11), 0.6, rng.uniform(0.15, 0.8))
    shirt = hsv(rng.uniform(), rng.uniform(0.65, 0.95), rng.uniform(0.7, 0.98))
    stripes = hsv(rng.uniform(), 0.2, 0.97) if rng.uniform() < 0.5 else None
    trousers = hsv(rng.choice([0.6, rng.uniform()]), rng.uniform(0.6, 0.9), rng.uniform(0.4, 0.8))
    if rng.uniform() < 0.3:  # long hair, behind the shoulders
        scene.paint([[(0, 0.92, 0.082), (0, 0.8, 0.085)]], hair)
    trouser_joints, sleeve_joints = rng.choice([2, 3, 3]), rng.choice([2, 3])  # 2: short, 3: long
    for leg in legs:
        scene.paint(limb(leg, (0.055, 0.046, 0.033)), skin)
        scene.paint([[(*leg[2], 0.035), (1.1 * leg[2][0], leg[2][1] - 0.02, 0.03)]], trousers * 0.5)
        scene.paint(limb(leg[:trouser_joints], (0.062, 0.053, 0.037)), trousers)
    scene.paint([[(*arm[0], 0.047) for arm in arms] + [(*leg[0], 0.057) for leg in legs]], shirt, stripes)
    scene.paint([[(0, 0.875, 0.034), (0, 0.82, 0.04)]], skin)
    for arm in arms:
        scene.paint(limb(arm, (0.042, 0.034, 0.034)), skin)
        scene.paint(limb(arm[:sleeve_joints], (0.047, 0.039, 0.033)), shirt, stripes)
    scene.paint([[(0, 0.935, 0.075), (0, 0.915, 0.073)]], hair)
    if rng.uniform() < 0.85:  # else seen from behind
        scene.paint([[(0, 0.918, 0.063), (0, 0.872, 0.05)]], skin)
        for x, height in ((-0.024, 0.914), (0.024, 0.914), (0, 0.874)):
            scene.paint([[(x, height, 0.009)]], hsv(0.02, 0.5, 0.25))


def joints(start: tuple[float, float], length: float, upper: float, lower: float) -> np.ndarray:
    """Returns the three joints (x, height) of an arm or leg of two bones: (3, 2)."""
    bones = [(length * np.sin(angle), -length * np.cos(angle)) for angle in (upper, upper + lower)]
    return np.cumsum([start, *bones], axis=0)


def limb(points: np.ndarray, radii: tuple[float, ...]) -> list[tuple[tuple, tuple]]:
    """Returns the hulls along the bones between points (n, 2)."""
    return list(pairwise((*point, radius) for point, radius in zip(points, radii, strict=False)))


def draw_tree(scene: Scene) -> None:
    scene.paint([[(0, 0, 0.09), (0, 1, 0.06)]], hsv(0.07, 0.3, 0.58))
    for x, height in scene.rng.normal((0, 1.35), (0.25, 0.2), (30, 2)):  # tufts of leaves
        green = hsv(scene.rng.normal(0.28, 0.02), 0.42, scene.rng.uniform(0.5, 0.7))
        scene.paint([[(x, height, scene.rng.uniform(0.12, 0.2))]], green)


def draw_background(rng: np.random.Generator, height: int, width: int, horizon: int) -> np.ndarray:
    """Returns hills or a wall down to the row `horizon`, and a floor below it: float32 (height, width, 3)."""
    y, x = np.mgrid[:height, :width].astype(np.float32)[..., None]
    clouds = noise(rng, height, width)
    wall = hsv(rng.uniform(), rng.uniform(0.06, 0.25), rng.uniform(0.55, 0.88)) * (1 + 0.08 * clouds)
    if rng.uniform() < 0.6:  # hills below a sky
        ridge = 1.3 + sum(np.sin(x * (waves / width) + rng.uniform(0, 7)) / waves**0.7 for waves in (5, 11, 37))
        sky = hsv(0.58, 0.5, 0.9) + (60 * y / horizon + 250 * clouds.clip(0, 0.3)) * (0.1, 0.5, 1)
        wall = np.where(y > horizon - 0.1 * height * ridge, hsv(0.3, 0.4, 0.6) * (1 + 0.1 * clouds), sky)
    elif rng.uniform() < 0.5:  # bricks
        wall = np.where((y % 14 < 2) | ((x + 15 * (y // 14)) % 30 < 2), wall * 0.4 + 120, wall)
    floor = hsv(rng.choice([0.1, 0.12, 0.25, 0.6]), rng.uniform(0.05, 0.5), rng.uniform(0.5, 0.85))
    grain = 0.2 * (y - horizon) / (height - horizon) + 0.13 * noise(rng, height, width)
    haze = rng.uniform(0.15, 0.35)  # pale and out of focus, as behind a portrait
    background = np.float32(np.where(y < horizon, wall, floor * (0.85 + grain)) * (1 - haze) + 240 * haze)
    return cv2.GaussianBlur(background, (0, 0), rng.uniform(0.8, 1.6))


def noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns clouds of several sizes, float32 (height, width, 1), around 0."""
    grids = [0.6**octave / 1.6 * rng.standard_normal((blobs, blobs)) for octave, blobs in enumerate((4, 9, 30, 90))]
    layers = [cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) for grid in grids]
    return np.float32(sum(layers))[..., None]


def draw_photo(seed: int, split: int, number: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns a photo, uint8 (h, w, 3) BGR or (h, w) grey, and the mask of each visible person, bool (h, w)."""
    rng = np.random.default_rng([seed, split, number])
    short, long = sorted(int(side) for side in rng.integers((160, 200), (200, 257)))
    width, height = (short, long) if rng.uniform() < 0.4 else (long, short)
    horizon = int(height * rng.uniform(0.32, 0.5))
    scene = Scene(rng, draw_background(rng, height, width, horizon))
    nobody = number % 15 == 4
    trees = [(rng.uniform(0.25, 0.5), rng.uniform(), draw_tree) for _ in range(rng.integers(nobody, 3))]
    people = [] if nobody else place_people(rng, width / height)
    people.sort(key=lambda person: person[0])  # who is small is far away, and painted first
    eye_level = rng.uniform(0.72, 0.92)  # how high the horizon is for a person of height 1
    for scene.number, (size, x, draw) in enumerate(trees + people, 1 - len(trees)):  # trees have no positive number
        scene.unit = size * height
        scene.foot = (x * width, horizon + eye_level * scene.unit)
        draw(scene)
    light = 1 + rng.uniform(-0.12, 0.12) * np.linspace(-1, 1, width)[:, None]  # from one side
    photo = cv2.GaussianBlur(scene.colours * light * rng.uniform(0.9, 1.1, 3), (0, 0), rng.uniform(0.5, 0.8))
    photo = (photo + rng.uniform(1, 5) * rng.standard_normal(photo.shape)).clip(0, 255).astype(np.uint8)
    photo = cv2.cvtColor(photo, cv2.COLOR_BGR2GRAY) if number % 12 == 6 else photo
    masks = [scene.owner == person for person in range(1, len(people) + 1)]
    return photo, [mask for mask in masks if mask.any()]


def place_people(rng: np.random.Generator, aspect: float) -> list[tuple]:
    """Returns (height, x, draw_person) of one to four people, in fractions of the photo's height and width."""
    people, x = [], rng.uniform(0.2, 0.8)
    for index in range(rng.choice([1, 2, 3, 4], p=[0.4, 0.3, 0.2, 0.1])):
        size = rng.uniform(0.55, 1.1) if index else rng.uniform(0.8, 1.3)
        people.append((size, x, draw_person))
        beside = x + rng.choice([-1, 1]) * rng.uniform(0.18, 0.34) * size / aspect
        x = np.clip(beside if rng.uniform() < 0.5 else rng.uniform(), 0.03, 0.97)
    return people


def segmentation(mask: np.ndarray) -> list[list[float]] | dict:
    """Returns a mask, bool (h, w), as COCO has it: polygons, or RLE for what has a hole."""
    doubled = mask.astype(np.uint8).repeat(2, 0).repeat(2, 1)  # outlines then run around the pixels' centres
    outlines, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if (hierarchy[0, :, 3] < 0).all():  # no outline lies within another
        return [((outline.ravel() + 0.5) / 2).tolist() for outline in outlines]
    flat = mask.ravel(order="F").astype(np.int8)
    starts = np.flatnonzero(np.diff(flat, prepend=0))  # of runs down the columns; the first one is of zeros
    return {"counts": np.diff(starts, prepend=0, append=flat.size).tolist(), "size": list(mask.shape)}


def draw_split(folder: Path, split: int, count: int, seed: int) -> dict:
    """Draws the photos of a split into a new folder and returns the content of its annotation file."""
    folder.mkdir()
    images: list[dict] = []
    annotations: list[dict] = []
    for number in range(count):
        image_id = number * len(SPLITS) + split + 1  # no two splits share one
        photo, masks = draw_photo(seed, split, number)
        (height, width), name = photo.shape[:2], f"{image_id:012d}.jpg"
        (folder / name).write_bytes(cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes())
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for mask in masks:
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id, "category_id": PERSON, "iscrowd": 0,
                "area": float(mask.sum()), "bbox": [float(side) for side in cv2.boundingRect(mask.astype(np.uint8))],
                "segmentation": segmentation(mask),
            })  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": [{"id": PERSON, "name": "person"}]}


def draw_sample(root: Path, train: int = 240, val: int = 60, seed: int = 0) -> Path:
    """Draws the sample into the folder `root`, whole or not at all, and returns `root`.

    One that these settings have drawn before is left as it is. Raises UserError if the folder holds anything else.
    """
    settings = {"drawn_by": "tools/make_sample.py", "version": VERSION, "train": train, "val": val, "seed": seed}
    folder, marker = Path(root).resolve(), json.dumps(settings)
    with explain_write_errors(str(root)):
        if folder.exists() and any(folder.iterdir()):
            if (folder / "sample.json").is_file() and (folder / "sample.json").read_text() == marker:
                return root
            raise UserError(f"{root} is not empty and not this sample: move it away, or choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            new = Path(temporary, "new")
            (new / "annotations").mkdir(parents=True)
            for split, (name, count) in enumerate(zip(SPLITS, (train, val), strict=True)):
                content = draw_split(new / name, split, count, seed)
                (new / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
            (new / "sample.json").write_text(marker)
            new.rename(folder)
    return root


def run_command(argv: list[str]) -> int:
    """Runs the whole program and returns its exit code: 0, or 2 for a user's mistake."""
    parser = OneLineParser("make_sample.py", description="Draws a small COCO-format data set of people.")
    parser.add_argument("--root", type=Path, default=Path("data/sample"), help="the new folder (%(default)s)")
    return run_cli("make_sample.py", lambda: print("sample:", draw_sample(parser.parse_args(argv[1:]).root)))


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
