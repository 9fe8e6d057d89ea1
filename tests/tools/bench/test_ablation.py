"""The comparison of the recipe's variants: the figures of its table by hand, and that each variant trains."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from types import SimpleNamespace
from unittest.mock import patch

import albumentations as A
import numpy as np
import pytest
import torch
from test_trainer import ALONE

import trainer
from tools.bench import ablation, hold_out, variants
from training import report
from training.settings import UsageError
from utils import UserError


def runs(*scores: list[float]) -> list[dict]:
    return [{"sets": {"coco:val": {"iou": one, "boundary_iou": one}}, "seconds": 60.0} for one in scores]


def test_a_row_is_compared_photo_by_photo_and_seed_by_seed():
    base, row = runs([0.2, 0.4, 0.6], [0.4, 0.4, 0.4]), runs([0.3, 0.5, 0.7], [0.4, 0.5, 0.6])
    assert ablation.compared(base, base, "coco:val", "iou", True) == "0.400 (0.400 to 0.400)"
    # By photo the differences are 0.05, 0.1 and 0.15: standard deviation 0.05, over the root of three 0.029.
    assert ablation.compared(row, base, "coco:val", "iou", False) == "0.500, +0.100 ± 0.029 (+0.100 to +0.100)"
    table = ablation.table({"base": base, "dice_2": row}, "base").splitlines()
    assert table[0].count("|") == table[2].count("|") == table[3].count("|")
    assert table[3].startswith("| dice_2 | dice_weight 2 | 0.500, +0.100")


@pytest.mark.parametrize("wrong", [[], [0], [3], [0, 3], [0, 1, 2, 3, 4, 5]])
def test_the_lovasz_hinge_of_clear_answers_is_twice_one_minus_iou(wrong):
    truth = torch.tensor([[1, 1, 1, 0, 0, 0]])
    found = truth.clone()
    found[0, wrong] = 1 - found[0, wrong]
    union = int((truth | found).sum())
    expected = 2 * (1 - int((truth & found).sum()) / union)
    assert variants.lovasz_hinge(2.0 * found - 1, truth.float()).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", [name for name in ablation.ROWS if not name.startswith("smp")])
def test_each_row_trains(name, coco_root, tmp_path):
    options = ablation.parse([name, "--data-root", str(coco_root), "--measure", f"{coco_root}:val2017",
                              "--encoder-weights", "random", "--image-size", "32", "--epochs", "20",
                              "--folder", str(tmp_path), "--one", "0"])  # fmt: skip
    options.encoder_weights = ""
    config = ablation.config_of(ablation.rows_of(name), options)
    config.bfloat16_on_cpu = False  # not every machine has it
    with ablation.ROWS[name].patched(config):
        run = trainer.start_run(config, ALONE)
        raw = run.model(torch.rand(2, 3, 32, 32))
        loss, _ = run.criterion(raw, (torch.rand(2, 4, 32, 32) > 0.5).float())
        loss.backward()
        run.optimizer.step()
    assert torch.isfinite(loss)
    assert any(parameter.grad is not None for parameter in run.model.decoder.parameters())
    assert run.evaluated.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 4, 32, 32)


@pytest.mark.parametrize(
    ("name", "epochs", "lengths"),
    [("base", 12, [12]), ("cycles_5", 20, [4] * 5), ("cycles_1_4", 20, [4, 16]), ("cycles_1_3", 12, [3, 9])],
)
def test_cycles_are_those_of_the_row_and_end_with_the_run(name, epochs, lengths):
    config = ablation.config_of(ablation.rows_of(name), ablation.parse([name, "--epochs", str(epochs), "--one", "0"]))
    cycle = SimpleNamespace(T_0=config.restart_period, T_mult=config.restart_mult)
    assert report.cycles(cycle, epochs) == lengths
    with pytest.raises(UsageError, match="choose other --epochs"):
        ablation.config_of(ablation.rows_of("cycles_5"), ablation.parse(["cycles_5", "--epochs", "12", "--one", "0"]))


@pytest.mark.parametrize("name", ["zoom", "to_persons", "no_rotation", "colours"])
def test_the_augmentations_of_a_row_are_other_samples(name, coco_root):
    before = augmented(coco_root)
    with ablation.ROWS[name].patched(trainer.Config()):
        after = augmented(coco_root)
    assert before.shape == after.shape
    assert not torch.equal(before, after)


def test_crowds_are_neither_persons_nor_background(coco_root):
    with variants.crowds(trainer.Config()), turned():
        dataset = trainer.COCOPersonDataset(coco_root, "train2017", 64, augment=True)
        criterion = trainer.LossCalculator(contour_weight=3.0)
    samples = torch.stack([dataset[index] for index in range(len(dataset))])
    crowd = samples[:, 3] == variants.CROWD
    assert crowd.any(dim=2).any(dim=1).tolist() == [image % 3 != 2 for image in range(1, 11)]  # as the fixture draws
    with turned():
        whole = trainer.COCOPersonDataset(coco_root, "train2017", 64, augment=True)
    for index, place in enumerate(crowd):
        assert (whole[index][3][place] == 255).all()  # a crowd was among the persons, and is still where it was
        assert (whole[index][:3] == samples[index][:3]).all()
    raw = torch.zeros(1, 4, 64, 64, requires_grad=True)
    criterion(raw, samples[:1] / 255)[0].backward()
    assert not raw.grad[:, :, crowd[0]].any()
    assert raw.grad[:, 3, ~crowd[0]].all()


def turned():
    """Of the augmentations a quarter turn that every photo gets: a mask that is not turned along lies elsewhere."""
    return variants.list_with(lambda _found: [A.RandomRotate90(p=1.0)])


def test_half_of_a_batchs_samples_have_a_rectangle_of_another():
    batch = torch.zeros(400, 4, 16, 16, dtype=torch.uint8)
    batch[:, 0] = torch.arange(400)[:, None, None] % 200  # each sample tells its own colour from its neighbours'
    batch[:, 3, 4:8, 2:12] = 255
    with variants.cutmix(trainer.Config()):
        images, target = trainer.to_device(batch, torch.device("cpu"))
    taken = (target[:, 0] * 255).round() != batch[:, 0]
    mixed = taken.flatten(1).any(1)
    assert 150 < mixed.sum() < 250
    for number in mixed.nonzero().flatten().tolist():
        other = batch[number - 1]
        assert (images[number][:, taken[number]] * 255).round().byte().equal(other[:3, taken[number]])
        rows, columns = taken[number].nonzero().T
        assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert (target[number, 3] * 255).byte().equal(torch.where(taken[number], other[3], batch[number, 3]))


def test_photos_of_nobody_are_added_and_no_others(coco_root, tmp_path):
    assert hold_out.run_command(["hold_out.py", str(coco_root), "train2017", "3", str(tmp_path / "parted")]) == 0
    content = json.loads((tmp_path / "parted/annotations/instances_train2017.json").read_text())
    empty = [image["id"] == 11 for image in content["images"]].count(True)  # the fixture's photo without persons
    with_persons = len(content["images"]) - empty
    with variants.nobody(trainer.Config(), empty / with_persons):
        dataset = trainer.COCOPersonDataset(tmp_path / "parted", "train2017", 64, augment=True)
    assert [bool(sample[3].any()) for sample in dataset] == [True] * with_persons + [False] * empty
    with variants.nobody(trainer.Config(), 0.1):
        dataset = trainer.COCOPersonDataset(coco_root, "train2017", 64, augment=True)
        assert len(trainer.COCOPersonDataset(coco_root, "val2017", 64)) == 5
    assert [bool(sample[3].any()) for sample in dataset] == [True] * 10 + [False]
    for root, share in ((coco_root, 0.2), (tmp_path / "parted", (empty + 1) / with_persons)):  # one that there is not
        with variants.nobody(trainer.Config(), share), pytest.raises(UserError, match="photos in which nobody is"):
            trainer.COCOPersonDataset(root, "train2017", 64, augment=True)


def test_a_row_starts_from_trained_weights():
    files = {}
    for name, start in (("recipe", ""), ("recipe+trained", "some.pth"), ("recipe+trained", "other.pth")):
        argv = [name, "--start-from", start or "box", "--encoder-weights", "imagenet.pth", "--one", "0"]
        options = ablation.parse(argv)
        config = ablation.config_of(ablation.rows_of(name), options)
        assert (config.start_from, config.encoder_weights) == (start, "" if start else "imagenet.pth")
        files[start] = ablation.made_with(name, options)
    assert files["some.pth"] != files["other.pth"]  # nothing that was measured of one is taken for the other's


def augmented(root) -> torch.Tensor:
    """The ten photos, each as it is in another epoch."""
    dataset, samples = trainer.COCOPersonDataset(root, "train2017", 64, augment=True), []
    for index in range(len(dataset)):
        dataset.set_epoch(index)
        samples.append(dataset[index])
    return torch.stack(samples)


def test_a_run_is_measured_on_every_set_and_kept(coco_root, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation.trainer.utils, "cpu_has_bfloat16", lambda: False)
    monkeypatch.setitem(ablation.ROWS, "base", ablation.Row("", {"bfloat16_on_cpu": False, "cache": False}))
    options = ablation.parse(["base", "--data-root", str(coco_root), "--measure",
                              f"{coco_root}:val2017,{coco_root}:train2017", "--image-size", "32", "--epochs", "1",
                              "--folder", str(tmp_path), "--one", "7", "--workers", "0"])  # fmt: skip
    ablation.run_one("base", options)
    found = json.loads((tmp_path / "base_32_1_7.json").read_text())
    assert [len(scores["iou"]) for scores in found["sets"].values()] == [5, 10]
    assert np.isfinite([found["seconds"]]).all()


@pytest.mark.parametrize(
    ("name", "dice_weight", "bias", "kept"),
    [
        ("base", 1.0, 0.0, False),
        ("dice_3", 3.0, 0.0, False),
        ("fixed_batchnorm+start_gates+dice_2", 2.0, 3.0, True),
        ("recipe", 2.0, 3.0, True),
        ("recipe+dice_3", 3.0, 3.0, True),
    ],
)
def test_rows_are_changes_of_the_base_or_of_the_program(name, dice_weight, bias, kept, coco_root):
    rows = ablation.rows_of(name)
    config = ablation.config_of(rows, ablation.parse([name, "--data-root", str(coco_root), "--one", "0"]))
    assert config.dice_weight == dice_weight
    config.pretrained = True
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(trainer, "from_imagenet", lambda _config: False))
        for row in rows:
            stack.enter_context(row.patched(config))
        run = trainer.start_run(dataclasses.replace(config, bfloat16_on_cpu=False), ALONE)
    assert {block.gate.psi.bias.item() for block in run.model.decoder.blocks if block.gate} == {bias}
    assert run.keeps_statistics is kept


def test_an_unknown_row_is_refused_with_those_that_there_are():
    with pytest.raises(UsageError, match="rows of two rates need --encoder-weights"):
        ablation.parse(["rate_30"])
    with pytest.raises(UsageError, match="no row dicee: there are base, recipe, rate_1"):
        ablation.parse(["dicee"])
