"""The comparison of the recipe's variants: its table by hand, what each row changes, and that a result is kept."""

from __future__ import annotations

import json

import pytest

import trainer
from loading import augmentation
from tools import ablation
from training.command_line import UsageError
from utils import UserError

FLAGS = ["--device=cpu", "--encoder=mobilenet_v2", "--num-epochs=20"]


def runs(*scores: list[float]) -> list[dict]:
    return [{"sets": {"coco:val": {"iou": one, "boundary_iou": one}}, "seconds": 60.0} for one in scores]


def test_a_row_is_compared_photo_by_photo_and_seed_by_seed():
    base, row = runs([0.2, 0.4, 0.6], [0.4, 0.4, 0.4]), runs([0.3, 0.5, 0.7], [0.4, 0.5, 0.6])
    assert ablation.cell(base, base, "coco:val", "iou") == "0.400 (0.400 to 0.400)"
    # By photo the differences are 0.05, 0.1 and 0.15: standard deviation 0.05, over the root of three 0.029.
    assert ablation.cell(row, base, "coco:val", "iou") == "0.500, +0.100 ± 0.029 (+0.100 to +0.100)"
    head, line, first, second = ablation.table({"base": base, "dice_3+no_ema": row}).splitlines()
    assert head.count("|") == line.count("|") == first.count("|") == second.count("|")
    assert second.startswith("| dice_3+no_ema | dice_weight 3; no moving average of the weights | 0.500, +0.100")


def test_each_row_changes_a_setting_or_a_transform():
    options = ablation.parse(["base", "--", *FLAGS, "--encoder-weights=imagenet.pth"])
    results = {str(ablation.result_file(name, 0, options)).partition("_0_")[2]: name for name in ablation.ROWS}
    assert sorted(results.values()) == sorted(ablation.ROWS)  # no two have the same settings and transforms
    config = ablation.config_of("no_ema+cycles_1_4", 3, options, "folder")
    assert config == trainer.Config(
        device="cpu", encoder="mobilenet_v2", encoder_weights="imagenet.pth", num_epochs=20, ema_decay=0.0,
        restart_period=4, restart_mult=4, seed=3, checkpoint_dir="folder",
    )  # fmt: skip


@pytest.mark.slow
def test_a_training_has_its_rows_transforms_is_measured_on_every_set_and_not_repeated(
    coco_root, tmp_path, monkeypatch, capsys
):
    before = {type(transform).__name__: transform for transform in augmentation.augmentations()}
    monkeypatch.setattr(augmentation, "augmentations", augmentation.augmentations)  # put back at the end
    name, sets = "no_rotation+wide", [f"{coco_root}:val2017", f"{coco_root}:train2017"]
    argv = [name, f"--measure={','.join(sets)}", f"--folder={tmp_path / 'results'}"]
    flags = ["--", *FLAGS, f"--data-root={coco_root}", "--no-pretrained", "--num-epochs=1", "--image-size=32"]
    ablation.main([*argv, "--one", "7", *flags])
    after = {type(transform).__name__: transform for transform in augmentation.augmentations()}
    assert [*after] == [*before, "ToGray"]
    assert (after["RandomRotate90"].p, after["ShiftScaleRotate"].p, after["GaussianBlur"].p) == (0.0, 0.9, 0.1)
    assert after["ShiftScaleRotate"].border_mode == before["ShiftScaleRotate"].border_mode
    (file,) = (tmp_path / "results").iterdir()
    result = json.loads(file.read_text())
    assert [len(scores["iou"]) for scores in result["sets"].values()] == [5, 10]
    assert (result["row"], result["settings"]["seed"]) == (name, 7)
    options = ablation.parse([*argv, *flags])
    monkeypatch.setattr(ablation.sys, "executable", "false")  # every new training would fail
    assert ablation.result(name, 7, options) == result
    assert f"{name}, seed 7: IoU {sets[0]} 0." in capsys.readouterr().out
    with pytest.raises(UserError, match="with seed 8 was not measured: see above"):
        ablation.result(name, 8, options)


def test_an_unknown_row_and_a_set_without_a_split_are_refused():
    with pytest.raises(UsageError, match="there is no row dicee: there are base, lr_2e-5"):
        ablation.parse(["base", "dice_3+dicee"])
    with pytest.raises(UsageError, match="--measure data/coco is to be ROOT:SPLIT"):
        ablation.parse(["--measure", "data/coco"])
