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
    torch.manual_seed(3)  # its masks have something of everything
    return save_random_model(tmp_path_factory.mktemp("model") / "best_model.pth", change=sharpen)


def results(folder: Path) -> tuple[dict, list[dict]]:
    with open(folder / "photos.csv", newline="") as file:
        return json.loads((folder / "metrics.json").read_text()), list(csv.DictReader(file))


@pytest.fixture
def run(checkpoint, tmp_path) -> Callable[..., tuple[dict, list[dict]]]:
    """Runs evaluate.py on a data root. Returns what it writes."""

    def run(root: Path, *options: object, checkpoint: Path = checkpoint) -> tuple[dict, list[dict]]:
        arguments = (checkpoint, "--data-root", root, "--output", tmp_path / "results", "--device", "cpu", *options)
        assert evaluate.run_command(["evaluate.py", *map(str, arguments)]) == 0
        return results(tmp_path / "results")

    return run


@pytest.mark.parametrize(("given", "looks"), [((), {"40", "96"}), (("--image-size", 96), {"96"})])
def test_the_masks_at_the_photos_own_size_are_those_that_predict_writes(
    run, coco_root, checkpoint, tmp_path, monkeypatch, given, looks
):
    monkeypatch.setattr(cutter, "SMALL_PERSONS", 0.14)  # two of five get a second look
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"config": content["config"] | {"image_size": 40}}, tmp_path / "smaller.pth")
    result, rows = run(coco_root, *given, checkpoint=tmp_path / "smaller.pth")
    assert {row["look"] for row in rows} == looks
    assert str(result["image_size"]) == min(looks, key=int)
    options = ["--mask", "--threshold", "0.5", "--checkpoint", tmp_path / "smaller.pth", "--output", tmp_path / "masks"]
    arguments = [coco_root / VAL, *options, *given, "--device", "cpu"]
    assert predict.run_command(["predict.py", *map(str, arguments)]) == 0
    dataset, ious = COCOPersonDataset(coco_root, VAL), []
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
    counts = {"network_boundary_iou": 1, "network_dice": 1, "network_tp": 1, "network_fp": 1, "network_fn": 2}
    rows = [{"largest_person": part, "network_iou": iou, **counts}
            for part, iou in ((0.009, 0.2), (0.0099, 0.6), (0.01, 0.3), (0.1, 0.4), (1.0, 0.5))]  # fmt: skip
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
    _, rows = run("bare, coco,other")
    folders = [f"coco/{VAL}"] * 5 + [f"other/{VAL}"] * 3
    assert rows == [row | {"index": str(n), "folder": folders[n]} for n, row in enumerate(alone)]


def test_a_photo_that_cannot_be_read_is_left_out_named_and_counted(coco_root, run, capsys):
    paths = sorted((coco_root / VAL).iterdir())[:5]
    paths[2].write_bytes(b"")
    result, _ = run(coco_root)
    assert (result["left_out"], result["original"]["all"]["photos"]) == (1, 4)
    assert capsys.readouterr().err.startswith(f"1 left out of 5:\n  the photo {paths[2]} cannot be read")
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
    np.testing.assert_array_equal(sheet[48 : 48 + 64, :64], photo)  # below its caption


def test_what_is_shown_of_the_worst_is_of_the_look_that_is_scored(coco_root, checkpoint, stub, monkeypatch):
    stub(lambda red: (red > 0.5) * (0.95 if red.shape[1] == 40 else 1.0))
    monkeypatch.setattr(cutter, "SMALL_PERSONS", 2)  # a second look at every photo with persons
    loaded = cutter.load(checkpoint, "cpu")
    loaded.image_size, loaded.second_size = 40, 80
    shown = evaluate.find_persons(loaded, dataset := COCOPersonDataset(coco_root, VAL, 40), 0)
    assert (shown.shape, shown.max()) == ((40, 40), 1)
    stub(torch.ones_like)
    np.testing.assert_array_equal(evaluate.find_persons(loaded, dataset, 0), dataset.own_pixels([0])[0])  # and no bar


def test_small_persons_are_a_few_of_the_worst():
    rows = [{"index": n, "original_iou": n / 100, "largest_person": 0.005 if n < 20 else 0.01} for n in range(40)][::-1]
    assert [row["index"] for row in evaluate.select_worst(rows)] == [0, 1, 2, 3, *range(20, 28)]
    assert [row["index"] for row in evaluate.select_worst(rows[-20:])] == [0, 1, 2, 3]


@pytest.mark.parametrize(("options", "words"), [
    (["no.pth"], "there is no checkpoint"), (["a.pth", "--split", "other"], "no data of the split other"),
    (["a.pth", "--device", "toaster"], "--device toaster"), (["a.pth", "--image-size", "31"], "from 32 to 4096"),
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


def rectangle(top: int, left: int, bottom: int, right: int, shape: tuple[int, int] = (20, 20)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[top:bottom, left:right] = True
    return mask


def test_scores_by_hand():
    big, shifted, nothing = rectangle(0, 4, 10, 14), rectangle(0, 6, 10, 16), rectangle(0, 0, 0, 0)
    border = 100 - 64  # one pixel, though 2 % of the diagonal are less; the image's border is contour as well
    edge_iou = 16 / (2 * border - 16)  # eight pixels of two rows in common
    assert evaluate.compare_masks(big, shifted) == {"iou": 80 / 120, "dice": 160 / 200, "boundary_iou": edge_iou,
                                                    "tp": 80, "fp": 20, "fn": 20}  # fmt: skip
    assert {*evaluate.compare_masks(nothing, nothing).values()} == {1.0, 0}
    assert [evaluate.compare_masks(big, nothing)[name] for name in ("iou", "dice", "boundary_iou")] == [0, 0, 0]
    wide = evaluate.boundary(rectangle(20, 20, 80, 80, (120, 160)))
    assert np.count_nonzero(wide) == 60 * 60 - 52 * 52  # a diagonal of 200: 4 pixels
