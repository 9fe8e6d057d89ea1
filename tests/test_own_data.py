"""Whole runs on a user's own data: trained, resumed and evaluated by the commands."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch
from test_trainer import Tiny, flags, quick, refusal, small  # noqa: F401

import evaluate
import trainer
from datasets import COCOPersonDataset
from loading.layout import SPLITS, Choices
from training import checkpoints, resuming
from training.settings import UsageError
from utils import read_checkpoint

CPU = ("--device", "cpu")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(trainer, "UNetAutoencoder", Tiny)


@pytest.fixture
def export(coco_root) -> dict[str, str]:
    """The settings of a single annotation file without splits, whose category is the pedestrian."""
    path = coco_root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "pedestrian"
    (coco_root.parent / "export.json").write_text(json.dumps(content))
    shutil.copytree(coco_root / "train2017", coco_root.parent / "pictures")
    return {"annotations": str(coco_root.parent / "export.json"), "photos": str(coco_root.parent / "pictures"),
            "category": "pedestrian", "val_share": 0.3}  # fmt: skip


def said_by(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def measured(folder: Path, *options: str) -> dict:
    """metrics.json of the only evaluation in the folder of a run, which is removed."""
    assert evaluate.run_command(["evaluate.py", str(folder / "best_model.pth"), *CPU, *options]) == 0
    (result,) = folder.glob("best_model_on_*/metrics.json")
    content = json.loads(result.read_text()) | {"folder": result.parent.name}
    shutil.rmtree(result.parent)
    return content


def test_a_single_file_is_trained_on_resumed_and_evaluated(export, tmp_path, capsys):
    settings = small("data/coco", tmp_path / "run", num_epochs=1, **export)
    trainer.main(settings)
    said = said_by(capsys)
    assert "6 photos to train on, 4 to validate" in said
    assert f"split made here: the names of the photos in {export['photos']} choose 0.3 of them to validate" in said
    more = dataclasses.replace(settings, num_epochs=2, resume="newest")
    assert "with --val-share 0.3 and cannot go on with 0.4" in refusal(capsys, *flags(more), "--val-share=0.4")
    assert "with --category pedestrian and" in refusal(capsys, *flags(more), "--category=dog")
    (gone,) = Path(export["photos"]).glob("*03.jpg")
    shutil.move(gone, tmp_path)
    assert f"{tmp_path / 'export.json'} for " in refusal(capsys, *flags(more))
    shutil.move(tmp_path / gone.name, gone)
    trainer.main(more)
    assert read_checkpoint(tmp_path / "run" / "last.pth")["epoch"] == 2


def test_evaluation_takes_the_choices_of_the_training(export, coco_root, tmp_path):
    folder = tmp_path / "run"
    trainer.main(small("data/coco", folder, num_epochs=1, **export))
    own = measured(folder)
    assert (own["folder"], own["original"]["all"]["photos"]) == ("best_model_on_pictures_val2017", 4)
    assert measured(folder, "--split", "train2017")["original"]["all"]["photos"] == 6
    assert measured(folder, "--val-share", "0.999")["original"]["all"]["photos"] > 6
    there = measured(folder, "--data-root", str(coco_root), "--category", "person")  # no annotations of the training
    assert (there["folder"], there["original"]["all"]["photos"]) == ("best_model_on_coco_val2017", 5)
    other = ("--annotations", str(coco_root / "annotations" / "instances_val2017.json"))
    assert evaluate.run_command(["evaluate.py", str(folder / "best_model.pth"), *other]) == 2
    other = (*other, "--photos", str(coco_root / "val2017"), "--category", "person", "--val-share", "0.999")
    assert measured(folder, *other)["original"]["all"]["photos"] == 5


def write_own(root: Path, coco_root: Path) -> Path:
    """The training photos of `coco_root` beside masks of theirs, one of them of nobody."""
    dataset = COCOPersonDataset(coco_root, "train2017")
    for i in range(len(dataset)):
        for kind, suffix in (("photos", "jpg"), ("masks", "png")):
            (root / kind).mkdir(parents=True, exist_ok=True)
            place = root / kind / f"{i}.{suffix}"
            shutil.copy(dataset.path(i), place) if kind == "photos" else cv2.imwrite(str(place), dataset.alpha(i))
    shutil.copy(root / "photos" / "0.jpg", root / "photos" / "nobody.jpg")
    cv2.imwrite(str(root / "masks" / "nobody.png"), dataset.alpha(0) * 0)
    return root


def test_photos_beside_masks_are_trained_on_resumed_and_evaluated(coco_root, tmp_path, capsys):
    root, folder = write_own(tmp_path / "own", coco_root), tmp_path / "run"
    settings = small(root, folder, num_epochs=1, val_share=0.3, cache=True)
    trainer.main(settings)
    said = said_by(capsys)
    train, val = (len(COCOPersonDataset(root, split, choices=Choices(val_share=0.3))) for split in SPLITS)
    assert train + val == 10
    assert f"{train} photos to train on, {val} to validate, in {root} " in said
    assert f"split made here: the names of the photos in {root / 'photos'} choose 0.3 of them to validate" in said
    assert "photos: 1 photo without anybody (an empty mask) (nobody.jpg)" in said
    assert measured(folder)["folder"] == "best_model_on_own_val2017"
    assert measured(folder)["original"]["all"]["photos"] == val
    more = dataclasses.replace(settings, num_epochs=2, resume="newest")
    whole = (root / "masks" / "3.png").read_bytes()
    cv2.imwrite(str(root / "masks" / "3.png"), cv2.imread(str(root / "masks" / "3.png"))[::-1])
    assert f"{root / 'masks'} for " in refusal(capsys, *flags(more))
    (root / "masks" / "3.png").write_bytes(whole)
    shutil.move(root, tmp_path / "moved")
    trainer.main(dataclasses.replace(more, data_root=str(tmp_path / "moved")))
    assert read_checkpoint(folder / "last.pth")["epoch"] == 2


def test_without_flags_evaluation_reads_what_the_training_validated(coco_root, export, tmp_path, monkeypatch):
    write_own(tmp_path / "own", coco_root)
    shutil.copytree(coco_root / "val2017", coco_root / "web")
    shutil.copy(coco_root / "annotations/instances_val2017.json", coco_root / "annotations/instances_web.json")
    monkeypatch.chdir(tmp_path)
    read = []
    monkeypatch.setattr(evaluate, "load", lambda *_: SimpleNamespace(image_size=32))
    monkeypatch.setattr(evaluate, "measure_share", lambda _cutter, dataset, _processes: (read.append(dataset), 1 / 0))
    for choice in ({}, {"category": "dog"}, {"val_split": "web"}, {"data_root": "own,coco", "val_share": 0.3},
                   {"data_root": "own", "val_share": 0.5}, export | {"data_root": "data/coco"}):  # fmt: skip
        settings = dataclasses.replace(small("coco", "run"), **choice)
        trained = trainer.open_data(settings, trainer.Processes(torch.device("cpu")))[1].dataset.dataset
        checkpoints.save({"model": {}, "epoch": 1, "config": dataclasses.asdict(settings)}, tmp_path / "model.pth")
        with pytest.raises(ZeroDivisionError):
            evaluate.main(evaluate.parse(["model.pth", *CPU]))
        found = read.pop()
        assert resuming.contents(found) == resuming.contents(trained)
        assert [*map(found.path, range(len(found)))] == [*map(trained.path, range(len(trained)))]


@pytest.mark.parametrize(
    ("config", "told"),
    [({"data_root": "coco"}, "--data-root names another folder"),
     ({"annotations": "a.json", "photos": "b"}, "--annotations names a file, --photos")],
)  # fmt: skip
def test_data_that_are_not_found_from_here_are_told_with_the_flag_that_names_them(
    config, told, tmp_path, monkeypatch, capsys
):
    checkpoints.save({"model": {}, "epoch": 1, "config": config}, tmp_path / "model.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load", lambda *_: SimpleNamespace(image_size=32))
    assert evaluate.run_command(["evaluate.py", "model.pth", *CPU]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("tiny")
def test_photos_beside_masks_are_one_of_several_roots(coco_root, tmp_path, capsys):
    root = write_own(tmp_path / "own", coco_root)
    trainer.main(small(f"{coco_root},{root}", tmp_path / "run", num_epochs=1, val_share=0.3))
    train, val = (len(COCOPersonDataset(root, split, choices=Choices(val_share=0.3))) for split in SPLITS)
    said = f"{10 + train} photos to train on (10 in {coco_root}, {train} in {root}), {5 + val} to validate"
    assert said in said_by(capsys)


@pytest.mark.usefixtures("tiny")
def test_training_and_validating_on_the_same_photos_is_said(coco_root, tmp_path, capsys):
    settings = small(coco_root, tmp_path / "run", num_epochs=1)
    trainer.main(settings)
    assert "trained on and validated" not in said_by(capsys)
    (coco_root / "link").symlink_to(coco_root / "train2017")
    shutil.copy(coco_root / "annotations" / "instances_train2017.json", coco_root / "annotations/instances_link.json")
    for split in ("train2017", "link"):
        trainer.main(dataclasses.replace(settings, val_split=split))
        assert "are trained on and validated: the figures say nothing of others" in said_by(capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--photos=a"], "--annotations and --photos go together"),
     (["--annotations=a.json", "--photos=a", "--data-root=b"], "--annotations and --data-root"),
     (["--annotations=a.json", "--photos=a", "--sample"], "--annotations and --data-root (or --sample)"),
     (["--val-share=0"], "--val-share 0.0 is out of range")],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(options, words):
    with pytest.raises(UsageError) as caught:
        trainer.parse(options)
    assert words in str(caught.value)
