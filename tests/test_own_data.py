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
from tiny_runs import command_error, flags, small

import evaluate
import trainer
from datasets import COCOPersonDataset
from loading.layout import SPLITS, DataOptions
from models import read_checkpoint
from training import checkpoints, resuming
from training.command_line import UsageError

CPU = ("--device", "cpu")


@pytest.fixture
def export(coco_root) -> dict[str, str]:
    """The settings of a single annotation file without splits, whose category is the pedestrian."""
    path = coco_root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "pedestrian"
    (coco_root.parent / "export.json").write_text(json.dumps(content))
    shutil.copytree(coco_root / "train2017", coco_root.parent / "pictures")
    return {"annotations": str(coco_root.parent / "export.json"), "photos": str(coco_root.parent / "pictures"),
            "category": "pedestrian", "val_fraction": 0.3}  # fmt: skip


@pytest.fixture
def own(coco_root, tmp_path) -> Path:
    """The training photos of `coco_root` beside mask files of theirs, one of them of nobody."""
    dataset, root = COCOPersonDataset(coco_root, "train2017"), tmp_path / "own"
    for kind in ("photos", "masks"):
        (root / kind).mkdir(parents=True)
    for i in range(len(dataset)):
        shutil.copy(dataset.path(i), root / "photos" / f"{i}.jpg")
        cv2.imwrite(str(root / "masks" / f"{i}.png"), dataset.alpha(i))
    shutil.copy(root / "photos" / "0.jpg", root / "photos" / "nobody.jpg")
    cv2.imwrite(str(root / "masks" / "nobody.png"), dataset.alpha(0) * 0)
    return root


def printed(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def evaluated(run: Path, *options: str) -> tuple[str, int]:
    """Returns the folder of an evaluation of a run's best model, which is removed, and the number of photos."""
    assert evaluate.run_command(["evaluate.py", str(run / "best_model.pth"), *CPU, *options]) == 0
    (result,) = run.glob("best_model_on_*/metrics.json")
    photos = json.loads(result.read_text())["original"]["all"]["photos"]
    shutil.rmtree(result.parent)
    return result.parent.name, photos


@pytest.mark.usefixtures("tiny")
def test_a_single_file_is_trained_on_and_resumed(export, tmp_path, capsys):
    settings = small("data/coco", tmp_path / "run", num_epochs=1, **export)
    trainer.main(settings)
    text = printed(capsys)
    assert "6 photos to train on, 4 to validate" in text
    assert f"split made here: the names of the photos in {export['photos']} choose 0.3 of them to validate" in text
    more = flags(dataclasses.replace(settings, num_epochs=2, resume="newest"))
    assert "with --val-fraction 0.3 and cannot go on with 0.4" in command_error(capsys, *more, "--val-fraction=0.4")
    assert "with --category pedestrian and" in command_error(capsys, *more, "--category=dog")
    (path,) = Path(export["photos"]).glob("*03.jpg")
    shutil.move(path, tmp_path)
    assert f"{tmp_path / 'export.json'} for " in command_error(capsys, *more)
    shutil.move(tmp_path / path.name, path)
    assert trainer.run_command(["trainer.py", *more]) == 0
    assert read_checkpoint(tmp_path / "run" / "last.pth")["epoch"] == 2


@pytest.mark.usefixtures("tiny")
def test_photos_beside_masks_are_trained_on_and_resumed(own, tmp_path, capsys):
    settings = small(own, tmp_path / "run", num_epochs=1, val_fraction=0.3, cache=True)
    trainer.main(settings)
    train, val = (len(COCOPersonDataset(own, split, options=DataOptions(val_fraction=0.3))) for split in SPLITS)
    text = printed(capsys)
    assert f"{train} photos to train on, {val} to validate, in {own} " in text
    assert train + val == 10
    assert "photos: 1 photo with an empty mask (nobody.jpg)" in text
    error = command_error(capsys, *flags(settings), "--category=dog")
    assert f"--category dog was given, and the masks of {own / 'masks'} have no categories: leave it out" in error
    more = dataclasses.replace(settings, num_epochs=2, resume="newest")
    whole = (own / "masks" / "3.png").read_bytes()
    cv2.imwrite(str(own / "masks" / "3.png"), cv2.imread(str(own / "masks" / "3.png"))[::-1])
    assert f"{own / 'masks'} for " in command_error(capsys, *flags(more))
    (own / "masks" / "3.png").write_bytes(whole)
    shutil.move(own, tmp_path / "moved")
    trainer.main(dataclasses.replace(more, data_root=str(tmp_path / "moved")))
    assert read_checkpoint(tmp_path / "run" / "last.pth")["epoch"] == 2


@pytest.mark.slow
def test_an_evaluation_reads_the_data_as_the_training_did(export, coco_root, tmp_path):
    run = tmp_path / "run"
    trainer.main(small("data/coco", run, num_epochs=1, **export))
    assert evaluated(run) == ("best_model_on_pictures_val2017", 4)
    assert evaluated(run, "--split", "train2017")[1] == 6
    there = ("--data-root", str(coco_root), "--category", "person")  # the training's annotations do not count
    assert evaluated(run, *there) == ("best_model_on_coco_val2017", 5)
    other = ("--annotations", str(coco_root / "annotations" / "instances_val2017.json"))
    assert evaluate.run_command(["evaluate.py", str(run / "best_model.pth"), *other]) == 2
    other = (*other, "--photos", str(coco_root / "val2017"), "--category", "person", "--val-fraction", "0.999")
    assert evaluated(run, *other)[1] == 5


@pytest.mark.parametrize(
    "settings",
    [{}, {"category": "dog"}, {"val_split": "web"}, {"data_root": "own,coco"}, {"data_root": "own"},
     {"annotations": "export.json", "photos": "pictures", "category": "pedestrian"}],
)  # fmt: skip
@pytest.mark.usefixtures("export", "own")
def test_without_flags_an_evaluation_reads_what_the_training_validated(coco_root, tmp_path, monkeypatch, settings):
    shutil.copytree(coco_root / "val2017", coco_root / "web")
    shutil.copy(coco_root / "annotations/instances_val2017.json", coco_root / "annotations/instances_web.json")
    monkeypatch.chdir(tmp_path)
    opened = []
    monkeypatch.setattr(evaluate, "load", lambda *_: SimpleNamespace(image_size=32))
    monkeypatch.setattr(evaluate, "evaluate_shard", lambda _cutter, dataset, _: (opened.append(dataset), 1 / 0))
    config = dataclasses.replace(small("coco", "run", val_fraction=0.3), **settings)
    trained = trainer.open_data(config, trainer.Processes(torch.device("cpu")))[1].dataset.dataset
    checkpoints.save({"model": {}, "epoch": 1, "config": dataclasses.asdict(config)}, tmp_path / "model.pth")
    with pytest.raises(ZeroDivisionError):
        evaluate.main(evaluate.parse(["model.pth", *CPU]))
    assert resuming.describe_data(opened[0]) == resuming.describe_data(trained)
    assert [*map(opened[0].path, range(len(opened[0])))] == [*map(trained.path, range(len(trained)))]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("split", ["train2017", "link"])
def test_training_and_validating_on_the_same_photos_is_warned_of(coco_root, tmp_path, capsys, split):
    (coco_root / "link").symlink_to(coco_root / "train2017")
    shutil.copy(coco_root / "annotations/instances_train2017.json", coco_root / "annotations/instances_link.json")
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1, val_split=split))
    assert "are trained on and validated" in printed(capsys)


def test_photos_of_nobody_are_trained_on_and_not_validated(own, coco_root, tmp_path):
    def sizes(root: Path, negatives: str) -> list[int]:
        config = small(root, tmp_path / "run", negatives=negatives, val_fraction=0.3)
        loaders = trainer.open_data(config, trainer.Processes(torch.device("cpu")))
        return [len(loader.dataset) for loader in loaders]

    assert sizes(coco_root, "") == [10, 5]
    assert sizes(coco_root, f"data,{own / 'photos'}") == [10 + 1 + 11, 5]
    assert sum(sizes(own, "data")) - sum(sizes(own, "")) == 1  # nobody.jpg, whose name makes it a training photo


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--photos=a"], "--photos goes with --annotations, a COCO-format file, or --masks, a folder of mask files"),
     (["--annotations=a.json", "--photos=a", "--data-root=b"], "--photos and --data-root (or --sample) both name"),
     (["--masks=b", "--photos=a", "--sample"], "--photos and --data-root (or --sample) both name the data"),
     (["--val-fraction=0"], "--val-fraction 0.0 is out of range")],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(UsageError) as caught:
        trainer.parse(options)
    assert words in str(caught.value)
