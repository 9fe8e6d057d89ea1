"""Measuring a checkpoint: against masks that predict.py writes, boundaries counted by hand, sums over photos."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import add_person, edit, save_random_model, sharpen, write_split
from test_trainer import run_of, unwatched

import evaluate as evaluation
import predict
import trainer
from cutting import cutter
from datasets import COCOPersonDataset

VAL = "val2017"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A small random model, sure of itself, so that its masks have something of everything."""
    torch.manual_seed(3)
    path = tmp_path / "run" / "best_model.pth"
    path.parent.mkdir()
    return save_random_model(path, change=sharpen)


@pytest.fixture
def evaluate(checkpoint, capsys):
    """Runs evaluate.py. Returns its exit code, metrics.json, photos.csv and what it printed."""

    def evaluate(root: Path, *options: str) -> tuple[int, dict, list[dict], str]:
        options = (str(checkpoint), "--data-root", str(root), "--device", "cpu", *options)
        code = evaluation.run_command(["evaluate.py", *options])
        size = options[options.index("--image-size") + 1] if "--image-size" in options else "64"
        folder = checkpoint.with_name(f"best_model_on_{root.name}_{VAL}" + (f"_at_{size}" if size != "64" else ""))
        with open(folder / "photos.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        return code, json.loads((folder / "metrics.json").read_text()), rows, capsys.readouterr().out

    return evaluate


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return np.logical_and(a, b).sum() / np.logical_or(a, b).sum()


def test_iou_at_the_photos_own_size_is_that_of_the_masks_that_predict_writes(coco_root, checkpoint, evaluate, tmp_path):
    check_against_predict(coco_root, checkpoint, evaluate, tmp_path)


def test_the_same_of_genuine_photos(shared_coco, checkpoint, evaluate, tmp_path):
    check_against_predict(shared_coco, checkpoint, evaluate, tmp_path)


def test_the_same_at_another_image_size_in_a_folder_of_its_own(coco_root, checkpoint, evaluate, tmp_path):
    _, own, _, _ = evaluate(coco_root, "--image-size", "64")  # the checkpoint's
    check_against_predict(coco_root, checkpoint, evaluate, tmp_path, 96)
    assert evaluate(coco_root)[1] == own  # not overwritten, and the same without the flag
    other = json.loads((checkpoint.parent / f"best_model_on_coco_{VAL}_at_96" / "metrics.json").read_text())
    assert (own["image_size"], other["image_size"]) == (64, 96)
    assert own["network"] != other["network"]
    assert {path.name for path in checkpoint.parent.iterdir() if path.is_dir()} == {
        f"best_model_on_coco_{VAL}", f"best_model_on_coco_{VAL}_at_96"}  # fmt: skip


def check_against_predict(root: Path, checkpoint: Path, evaluate, tmp_path: Path, image_size: int = 64) -> None:
    size = ["--image-size", str(image_size)] if image_size != 64 else []
    code, result, rows, _ = evaluate(root, *size)
    options = ["--mask", "--threshold", "0.5", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "masks")]
    assert (code, predict.run_command(["predict.py", str(root / VAL), *options, *size, "--device", "cpu"])) == (0, 0)
    dataset = COCOPersonDataset(root, VAL)
    found = []
    for index, row in enumerate(rows):
        mask = cv2.imread(str((tmp_path / "masks" / row["file_name"]).with_suffix(".png")), cv2.IMREAD_GRAYSCALE)
        truth = dataset.index.alpha(index)
        assert int(row["original_right"]) == np.count_nonzero((mask > 127) & (truth > 0))
        assert int(row["original_many"]) == np.count_nonzero((mask > 127) & (truth == 0))
        assert int(row["original_missed"]) == np.count_nonzero((mask < 128) & (truth > 0))
        found.append(iou(mask > 127, truth > 0))
    assert result["original"]["all"]["iou"] == pytest.approx(np.mean(found), abs=1e-12)
    assert 0 < result["original"]["all"]["iou"] < 1


def test_the_networks_size_is_what_the_training_measures(coco_root, checkpoint, evaluate):
    _, result, _, _ = evaluate(coco_root)
    config = trainer.parse(["--data-root", str(coco_root), "--num-workers", "0", "--image-size", "64"])
    processes = trainer.Processes(torch.device("cpu"))
    run = run_of(evaluation.load(checkpoint, "cpu").model)
    figures = trainer.validate(run, trainer.open_data(config, processes)[1], unwatched(run))
    for name in ("iou", "dice", "global_iou", "precision", "recall"):
        assert result["network"]["all"][name] == pytest.approx(figures[name], abs=1e-6), name


def test_photos_are_told_apart_by_their_largest_person(coco_root, evaluate):
    square = [20, 20, 24, 20, 24, 24, 20, 24]  # 4 x 4 pixels of 64 x 48 or 50 x 50: under 1 %

    def shrink(content: dict) -> None:
        small = [image["id"] for image in content["images"]][:2]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in small]
        for image_id in small:
            add_person(content, [square], image_id)

    edit(coco_root, shrink, split=VAL)
    _, result, rows, _ = evaluate(coco_root)
    assert [result["original"][name]["photos"] for name in evaluation.SIZES] == [5, 2, 0, 3]
    assert result["original"]["1 to 10 %"]["iou"] is None
    small = [row for row in rows if float(row["largest_person"]) < 0.01]
    for row in small:
        share = 16 / (int(row["width"]) * int(row["height"]))
        assert float(row["largest_person"]) == pytest.approx(share, rel=1e-4)
    mean = sum(float(row["original_iou"]) for row in small) / 2
    assert mean == pytest.approx(result["original"]["under 1 %"]["iou"], rel=1e-4)


def test_the_table_fits_a_terminal_and_the_worst_are_shown_first(coco_root, checkpoint, evaluate):
    _, _, rows, printed = evaluate(coco_root)
    lines = printed[printed.index("largest person") :].replace(str(checkpoint.parent), "").splitlines()
    assert max(map(len, lines)) <= 80
    sheet = cv2.imread(str(checkpoint.with_name(f"best_model_on_coco_{VAL}") / "worst.png"))
    worst = min(range(5), key=lambda index: float(rows[index]["original_iou"]))
    photo = COCOPersonDataset(coco_root, VAL, 64)[worst][:3].permute(1, 2, 0).numpy()[..., ::-1]
    np.testing.assert_array_equal(sheet[48 : 48 + 64, :64], photo)
    assert (sheet[24:48] < 128).any()  # its caption is above it
    assert (sheet[48 + 64 : 48 + 64 + 4] == 255).all()


def test_small_persons_are_a_few_of_the_worst():
    rows = [{"index": n, "original_iou": n / 100, "largest_person": 0.005 if n < 20 else 0.01} for n in range(40)][::-1]
    assert [row["index"] for row in evaluation.worst_of(rows)] == [0, 1, 2, 3, *range(20, 28)]
    assert [row["index"] for row in evaluation.worst_of(rows[-20:])] == [0, 1, 2, 3]
    assert [row["index"] for row in evaluation.worst_of(rows[:20])] == [*range(20, 32)]


def test_a_mistake_gets_one_line(coco_root, checkpoint, tmp_path, capsys):
    for options, words in (
        ([str(tmp_path / "no.pth")], "there is no checkpoint"),
        ([str(coco_root / "annotations" / f"instances_{VAL}.json")], "damaged or no checkpoint"),
        ([str(checkpoint), "--split", "other"], "no COCO data"),
        ([""], "checkpoint"),
        ([str(checkpoint), "--splitt", "other"], "did you mean --split?"),
        ([str(checkpoint), "--device", "toaster"], "--device toaster"),
        ([str(checkpoint), "--image-size", "31"], "image size of 31 is out of range: from 32 to 4096 pixels"),
        ([str(checkpoint), "--image-size", "4097"], "image size of 4097"),
    ):
        code = evaluation.run_command(["evaluate.py", "--data-root", str(coco_root), *options])
        errors = capsys.readouterr().err.splitlines()
        assert (code, len(errors)) == (2, 1)
        assert words in errors[0]


# --- single masks -----------------------------------------------------------------------------------------


def disc(*pixels: tuple[slice, slice], shape: tuple[int, int] = (20, 20)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for part in pixels:
        mask[part] = True
    return mask


def test_a_boundary_by_hand():
    mask = disc((slice(4, 12), slice(5, 15)))  # 8 x 10 pixels; 2 % of the diagonal of 20 x 20 is less than one pixel
    assert np.count_nonzero(evaluation.boundary(mask)) == 8 * 10 - 6 * 8
    mask = disc((slice(0, 8), slice(0, 10)))  # at the border of the image there is a contour as well
    assert np.count_nonzero(evaluation.boundary(mask)) == 8 * 10 - 6 * 8
    mask = disc((slice(20, 80), slice(20, 80)), shape=(120, 160))  # a diagonal of 200: 4 pixels
    assert np.count_nonzero(evaluation.boundary(mask)) == 60 * 60 - 52 * 52


def test_boundary_iou_by_hand():
    big, shifted = disc((slice(4, 14), slice(4, 14))), disc((slice(4, 14), slice(5, 15)))
    # contours of 36 pixels; in common are the top and bottom rows' nine
    assert evaluation.boundary_iou(big, shifted) == 18 / (36 + 36 - 18)
    assert evaluation.boundary_iou(big, big) == 1
    assert evaluation.boundary_iou(big, np.zeros_like(big)) == 0
    assert evaluation.boundary_iou(np.zeros_like(big), np.zeros_like(big)) == 1


def test_boundary_iou_sees_what_iou_hides():
    """Cheng et al.'s point: of a large object an error of fixed width at the contour must still show."""
    large = disc((slice(10, 190), slice(10, 190)), shape=(200, 200))
    ragged = disc((slice(14, 186), slice(14, 186)), shape=(200, 200))
    assert iou(large, ragged) > 0.9
    assert evaluation.boundary_iou(large, ragged) < 0.3


def test_comparison_by_hand():
    found, truth = disc((slice(0, 2), slice(0, 4))), disc((slice(0, 4), slice(0, 2)))
    scores = evaluation.compare(found, truth)
    assert (scores["right"], scores["many"], scores["missed"]) == (4, 4, 4)
    assert (scores["iou"], scores["dice"]) == (4 / 12, 8 / 16)
    nothing = np.zeros_like(found)
    assert evaluation.compare(nothing, nothing)["iou"] == evaluation.compare(nothing, nothing)["dice"] == 1
    assert evaluation.compare(found, nothing)["iou"] == 0


def test_a_folder_that_cannot_be_written_is_named_before_the_work(coco_root, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "measure", None)
    place = checkpoint.with_name(f"best_model_on_coco_{VAL}")
    place.write_text("in the way")
    assert evaluation.run_command(["evaluate.py", str(checkpoint), "--data-root", str(coco_root)]) == 2
    assert f"{place} cannot be written" in capsys.readouterr().err


def test_a_photo_that_cannot_be_read_is_left_out_named_and_counted(coco_root, checkpoint, capsys):
    options = [str(checkpoint), "--data-root", str(coco_root), "--device", "cpu"]
    result = checkpoint.with_name(f"best_model_on_coco_{VAL}") / "metrics.json"
    names = [path.name for path in sorted((coco_root / VAL).iterdir())][:5]
    for left_out in (names[2:3], names):
        for name in left_out:
            (coco_root / VAL / name).write_bytes(b"")
        capsys.readouterr()
        code, error = evaluation.run_command(["evaluate.py", *options]), capsys.readouterr().err
        assert code == (2 if left_out == names else 0)
        assert error.count(str(coco_root / VAL / left_out[0])) == 1
        assert (error.count("\n") == 1) == (left_out == names)
        metrics = json.loads(result.read_text())
        assert (metrics["left_out"], metrics["original"]["all"]["photos"]) == (1, 4)


def test_without_options_it_is_the_best_model_on_the_data_of_its_training(coco_root, checkpoint, monkeypatch):
    config = {"encoder": "resnet18", "use_attention": True, "image_size": 64, "data_root": "coco", "val_split": VAL}
    content = torch.load(checkpoint, weights_only=True) | {"config": config}
    (coco_root.parent / "checkpoints").mkdir()
    torch.save(content, coco_root.parent / "checkpoints" / "best_model.pth")
    monkeypatch.chdir(coco_root.parent)
    assert evaluation.run_command(["evaluate.py"]) == 0
    assert (coco_root.parent / "checkpoints" / f"best_model_on_coco_{VAL}" / "metrics.json").exists()


def test_the_programs_own_model_is_measured_as_well_and_beside_the_others(
    coco_root, checkpoint, evaluate, tmp_path, monkeypatch
):
    measured = evaluate(coco_root)[1]
    monkeypatch.setattr(cutter, "BOX", checkpoint.rename(tmp_path / "person.pth"))
    monkeypatch.chdir(tmp_path)
    assert evaluation.run_command(["evaluate.py", "box", "--data-root", str(coco_root), "--device", "cpu"]) == 0
    own = json.loads(Path("checkpoints", f"box_on_{coco_root.name}_val2017", "metrics.json").read_text())
    assert (own.pop("checkpoint"), measured.pop("checkpoint")) == ("box", str(checkpoint))
    assert own == measured


def test_several_roots_are_measured_as_one_set(coco_root, checkpoint, evaluate, tmp_path, monkeypatch):
    other, bare = tmp_path / "other", tmp_path / "bare"
    write_split(other, VAL, 3, first_id=102)  # names that the first root has as well
    write_split(bare, "train2017", 1, first_id=1)  # nothing to measure
    alone = [row for root in (coco_root, other) for row in evaluate(root)[2]]
    monkeypatch.chdir(tmp_path)
    options = ["--data-root", "bare, coco,other", "--device", "cpu"]
    assert evaluation.run_command(["evaluate.py", str(checkpoint), *options]) == 0
    folder = checkpoint.with_name(f"best_model_on_bare_coco_other_{VAL}")
    with open(folder / "photos.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row.pop("folder") for row in rows] == [f"coco/{VAL}"] * 5 + [f"other/{VAL}"] * 3
    assert [int(row["index"]) for row in rows] == [*range(8)]
    assert [{**row, "index": 0} for row in rows] == [{**row, "index": 0} for row in alone]
    mean = np.mean([float(row["original_iou"]) for row in alone])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["original"]["all"]["iou"] == pytest.approx(mean, rel=1e-4)


def test_the_trainer_says_what_to_type_instead(capsys):
    for arguments in (["--evaluate", "a.pth"], ["--evaluate=a.pth"], ["--evaluate"]):
        assert trainer.run_command(["trainer.py", *arguments]) == 2
        error = capsys.readouterr().err
        assert "python evaluate.py" in error
        assert error.count("\n") == 1
