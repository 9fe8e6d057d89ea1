"""Evaluating a checkpoint: against masks that predict.py writes, boundaries counted by hand, sums over photos."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import save_random_model, sharpen, write_split

import evaluate
import predict
from cutting import cutter
from datasets import COCOPersonDataset
from utils import SegmentationMetrics

VAL = "val2017"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small random model, sure of itself, so that its masks have something of everything."""
    torch.manual_seed(3)
    return save_random_model(tmp_path_factory.mktemp("model") / "best_model.pth", change=sharpen)


def results(folder: Path) -> tuple[dict, list[dict]]:
    """The content of metrics.json and of photos.csv."""
    with open(folder / "photos.csv", newline="") as file:
        return json.loads((folder / "metrics.json").read_text()), list(csv.DictReader(file))


@pytest.fixture
def run(checkpoint, tmp_path) -> Callable[..., tuple[dict, list[dict]]]:
    """Runs evaluate.py on a data root. Returns what it writes."""

    def run(root: Path, *options: object, checkpoint: Path = checkpoint) -> tuple[dict, list[dict]]:
        folder = tmp_path / "results"
        arguments = (checkpoint, "--data-root", root, "--output", folder, "--device", "cpu", *options)
        assert evaluate.run_command(["evaluate.py", *map(str, arguments)]) == 0
        return results(folder)

    return run


@pytest.mark.parametrize(("data", "size"), [("coco_root", 64), ("coco_root", 96), ("coco_root", None),
                                            pytest.param("shared_coco", 64, marks=pytest.mark.slow)])  # fmt: skip
def test_the_masks_at_the_photos_own_size_are_those_that_predict_writes(
    request, run, checkpoint, tmp_path, monkeypatch, data, size
):
    monkeypatch.setattr(cutter, "SMALL_PERSONS", 0.14)  # two of five get a second look
    if size is None:
        content = torch.load(checkpoint, weights_only=True)
        torch.save(content | {"config": content["config"] | {"image_size": 40}}, tmp_path / "smaller.pth")
        checkpoint = tmp_path / "smaller.pth"
    root, given = request.getfixturevalue(data), ["--image-size", size] if size else []
    result, rows = run(root, *given, checkpoint=checkpoint)
    assert result["image_size"] == (size or 40)
    assert {row["look"] for row in rows} == ({str(size)} if size else {"40", "80"})
    options = ["--mask", "--threshold", "0.5", "--checkpoint", checkpoint, "--output", tmp_path / "masks"]
    arguments = [root / VAL, *options, *given, "--device", "cpu"]
    assert predict.run_command(["predict.py", *map(str, arguments)]) == 0
    dataset, ious = COCOPersonDataset(root, VAL), []
    for index, row in enumerate(rows):
        mask = cv2.imread(str((tmp_path / "masks" / row["file_name"]).with_suffix(".png")), cv2.IMREAD_GRAYSCALE)
        prediction, truth = mask > 127, dataset.alpha(index) > 0
        overlap = (prediction & truth, prediction & ~truth, ~prediction & truth)
        assert float(row["largest_person"]) == pytest.approx(dataset.largest_person(index) / truth.size, rel=1e-5)
        counts = [int(row[f"original_{name}"]) for name in ("tp", "fp", "fn")]
        assert counts == [np.count_nonzero(pixels) for pixels in overlap]
        ious.append(counts[0] / sum(counts))
    assert result["original"]["all"]["iou"] == pytest.approx(np.mean(ious), abs=1e-12)
    assert 0 < result["original"]["all"]["iou"] < 1


def test_the_networks_size_is_what_a_validation_measures(coco_root, checkpoint, run):
    model, metrics = cutter.load(checkpoint, "cpu").model, SegmentationMetrics()
    dataset = COCOPersonDataset(coco_root, VAL, 64)
    for index in range(len(dataset)):
        sample = dataset[index][None].float() / 255
        own = dataset.own_pixels([index])
        with torch.inference_mode():
            metrics.update(model.predict(sample[:, :3])[:, 3] * own, sample[:, 3] * own)
    result, _ = run(coco_root)
    for name in ("iou", "dice", "global_iou", "precision", "recall"):
        assert result["network"]["all"][name] == pytest.approx(metrics.compute()[name], abs=1e-6), name


def test_photos_are_grouped_by_their_largest_person():
    ious = {0.009: 0.2, 0.0099: 0.6, 0.01: 0.3, 0.1: 0.4, 1.0: 0.5}
    counts = {"boundary_iou": 1, "dice": 1, "tp": 1, "fp": 1, "fn": 2}
    rows = [{"largest_person": part, "network_iou": iou, **{f"network_{name}": n for name, n in counts.items()}}
            for part, iou in ious.items()]  # fmt: skip
    groups = evaluate.summarise_by_size(rows, "network")
    assert [group["photos"] for group in groups.values()] == [5, 2, 1, 2]
    assert [group["iou"] for group in groups.values()] == pytest.approx([0.4, 0.4, 0.3, 0.45])
    assert (groups["all"]["global_iou"], groups["all"]["precision"], groups["all"]["recall"]) == (1 / 4, 1 / 2, 1 / 3)
    assert {*evaluate.summarise_by_size(rows[:2], "network")["over 10 %"].values()} == {0, None}


def test_several_roots_are_evaluated_as_one_set(coco_root, run, tmp_path, monkeypatch):
    write_split(tmp_path / "other", VAL, 3, first_id=102)  # names that the first root has as well
    write_split(tmp_path / "bare", "train2017", 1, first_id=1)  # nothing to evaluate
    alone = [row for root in (coco_root, tmp_path / "other") for row in run(root)[1]]
    monkeypatch.chdir(tmp_path)
    result, rows = run("bare, coco,other")
    assert [row["folder"] for row in rows] == [f"coco/{VAL}"] * 5 + [f"other/{VAL}"] * 3
    assert [int(row["index"]) for row in rows] == [*range(8)]
    drop = {"index": 0, "folder": ""}
    assert [row | drop for row in rows] == [row | drop for row in alone]
    assert result["original"]["all"]["photos"] == 8


def test_a_photo_that_cannot_be_read_is_left_out_named_and_counted(coco_root, run, capsys):
    paths = sorted((coco_root / VAL).iterdir())[:5]
    paths[2].write_bytes(b"")
    result, _ = run(coco_root)
    assert (result["left_out"], result["original"]["all"]["photos"]) == (1, 4)
    error = capsys.readouterr().err
    assert error.startswith("1 left out of 5:\n")
    assert error.count(str(paths[2])) == 1
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(AssertionError):
        run(coco_root)
    assert capsys.readouterr().err.count("\n") == 1


def test_by_default_the_best_model_is_evaluated_on_the_data_of_its_training(coco_root, checkpoint, monkeypatch):
    config = {"encoder": "resnet18", "use_attention": True, "image_size": 64, "data_root": "coco", "val_split": VAL}
    content, folder = torch.load(checkpoint, weights_only=True) | {"config": config}, coco_root.parent / "checkpoints"
    folder.mkdir()
    torch.save(content, folder / "best_model.pth")
    monkeypatch.chdir(coco_root.parent)
    monkeypatch.setattr(cutter, "BUNDLED", folder / "best_model.pth")
    write_split(coco_root, "part/val", 1, first_id=201)
    for options in ([], ["--image_size=96"], ["bundled"], ["--split=part/val"]):
        assert evaluate.run_command(["evaluate.py", *options]) == 0
    names = (f"best_model_on_coco_{VAL}", f"best_model_on_coco_{VAL}_at_96", f"bundled_on_coco_{VAL}")
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {*names, "best_model_on_coco_part_val"}
    result, bundled = (results(folder / name)[0] for name in names[::2])
    assert bundled == result | {"checkpoint": "bundled"}


def test_the_table_fits_a_terminal_and_the_worst_are_shown_first(coco_root, run, tmp_path, capsys):
    _, rows = run(coco_root)
    printed = capsys.readouterr().out
    assert max(map(len, printed[printed.index("largest person") :].splitlines()[:-1])) <= 80
    sheet = cv2.imread(str(tmp_path / "results" / "worst.png"))
    worst = min(range(5), key=lambda index: float(rows[index]["original_iou"]))
    photo = COCOPersonDataset(coco_root, VAL, 64, bars="black")[worst][:3].permute(1, 2, 0).numpy()[..., ::-1]
    np.testing.assert_array_equal(sheet[48 : 48 + 64, :64], photo)
    assert (sheet[24:48] < 128).any()  # its caption is above it


def test_what_is_shown_of_the_worst_is_of_the_look_that_is_scored(coco_root, checkpoint, stub, monkeypatch):
    stub(lambda red: (red > 0.5) * (0.95 if red.shape[1] == 40 else 1.0))
    monkeypatch.setattr(cutter, "SMALL_PERSONS", 2)  # a second look at every photo with persons
    loaded = cutter.load(checkpoint, "cpu")
    loaded.image_size, loaded.second_size = 40, 80
    shown = evaluate.find_persons(loaded, COCOPersonDataset(coco_root, VAL, 40), 0)
    assert (shown.shape, shown.max()) == ((40, 40), 1)
    stub(torch.ones_like)
    dataset = COCOPersonDataset(coco_root, VAL, 40)
    np.testing.assert_array_equal(evaluate.find_persons(loaded, dataset, 0), dataset.own_pixels([0])[0])  # and no bar


def test_small_persons_are_a_few_of_the_worst():
    rows = [{"index": n, "original_iou": n / 100, "largest_person": 0.005 if n < 20 else 0.01} for n in range(40)][::-1]
    assert [row["index"] for row in evaluate.select_worst(rows)] == [0, 1, 2, 3, *range(20, 28)]
    assert [row["index"] for row in evaluate.select_worst(rows[-20:])] == [0, 1, 2, 3]


@pytest.mark.parametrize(("options", "words"), [
    (["no.pth"], "there is no checkpoint"), (["coco/annotations/instances_val2017.json"], "damaged or no checkpoint"),
    (["a.pth", "--split", "other"], "no data of the split other"), (["a.pth", "--splitt", "x"], "you mean --split?"),
    (["a.pth", "--device", "toaster"], "--device toaster"), (["a.pth", "--output="], "--output= is empty"),
    (["a.pth", "--image-size", "31"], "image size of 31 is out of range: from 32 to 4096"),
    (["a.pth", "--output", "a.pth"], "a.pth cannot be written: File exists; --output names another folder"),
])  # fmt: skip
@pytest.mark.usefixtures("coco_root")
def test_a_mistake_gets_one_line_before_the_work(checkpoint, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.setattr(evaluate, "evaluate_photos", None)
    monkeypatch.chdir(tmp_path)
    Path("a.pth").symlink_to(checkpoint)
    assert evaluate.run_command(["evaluate.py", "--data-root", "coco", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def rectangle(rows: slice, columns: slice, shape: tuple[int, int] = (20, 20)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[rows, columns] = True
    return mask


@pytest.mark.parametrize(("mask", "pixels"), [
    (rectangle(slice(4, 12), slice(5, 15)), 8 * 10 - 6 * 8),  # 2 % of the diagonal is less than one pixel
    (rectangle(slice(0, 8), slice(0, 10)), 8 * 10 - 6 * 8),  # the image's border is contour as well
    (rectangle(slice(20, 80), slice(20, 80), (120, 160)), 60 * 60 - 52 * 52),  # a diagonal of 200: 4 pixels
])  # fmt: skip
def test_a_boundary_by_hand(mask, pixels):
    assert np.count_nonzero(evaluate.boundary(mask)) == pixels


def test_scores_by_hand():
    prediction, truth = rectangle(slice(0, 2), slice(0, 4)), rectangle(slice(0, 4), slice(0, 2))
    scores = evaluate.compare_masks(prediction, truth)
    assert (scores["tp"], scores["fp"], scores["fn"]) == (4, 4, 4)
    assert (scores["iou"], scores["dice"]) == (4 / 12, 8 / 16)
    nothing = np.zeros_like(truth)
    assert {*evaluate.compare_masks(nothing, nothing).values()} == {1.0, 0}
    assert [evaluate.compare_masks(prediction, nothing)[name] for name in ("iou", "dice", "boundary_iou")] == [0, 0, 0]
    big, shifted = rectangle(slice(4, 14), slice(4, 14)), rectangle(slice(4, 14), slice(5, 15))
    scores = evaluate.compare_masks(big, shifted)
    assert scores["boundary_iou"] == 18 / (36 + 36 - 18)  # both contours have two rows' nine in common
