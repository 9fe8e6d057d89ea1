"""Whose setting counts when a run goes on: the checkpoint's, or one that was typed, or none of both."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from trainer import Config
from training.resuming import ResumeError, described, settings_to_go_on_with

DEFAULTS = dataclasses.asdict(Config())


def found(**config: object) -> tuple[Path, dict]:
    content = {"config": DEFAULTS | config, "epoch": 3, "step": 0, "world_size": 1}
    return Path("last.pth"), content


def go_on(before: dict, typed: dict, **in_the_file: object) -> dict:
    """The settings that differ from the defaults."""
    now = settings_to_go_on_with(found(**before), DEFAULTS | in_the_file | typed, typed)
    assert now.keys() == DEFAULTS.keys()
    return {name: value for name, value in now.items() if value != DEFAULTS[name]}


def test_all_is_as_the_checkpoint_has_it_whatever_the_file_says():
    before = {"encoder": "resnet18", "image_size": 64, "num_workers": 3, "learning_rate": 1.0, "cache": True, "seed": 4}
    assert go_on(before, {}) == before
    assert go_on(before, {}, encoder="resnet50", learning_rate=2.0, batch_size=8) == before


def test_what_is_typed_is_a_change_a_default_too():
    before = {"num_workers": 3, "batch_size": 8, "learning_rate": 1.0}
    assert go_on(before, {"num_workers": DEFAULTS["num_workers"], "batch_size": 4}) == {
        "batch_size": 4, "learning_rate": 1.0}  # fmt: skip
    harmless = {"learning_rate": 0.5, "decoder_rate": 3.0, "weight_decay": 0.1, "num_epochs": 7, "amp": False}
    assert go_on({}, harmless) == harmless


def test_where_it_writes_and_on_which_device_is_this_starts():
    before = {"checkpoint_dir": "there", "run_name": "first", "device": "cuda:7", "resume": "a.pth"}
    assert go_on(before, {}) == {}
    assert go_on(before, {"run_name": "second"}, device="cpu") == {"run_name": "second", "device": "cpu"}


def test_what_counted_at_the_beginning_stays():
    before = {"pretrained": False, "start_from": "a.pth", "encoder_weights": ""}
    assert go_on(before, {"pretrained": True, "start_from": "box", "encoder_weights": "b"}) == {
        "pretrained": False, "start_from": "a.pth"}  # fmt: skip


def test_data_that_have_moved_are_named_by_one_of_their_flags():
    single = {"annotations": "a.json", "photos": "photos"}
    assert go_on({"data_root": "a"}, {}, data_root="b") == {"data_root": "a"}
    assert go_on({"data_root": "a"}, {"data_root": "b"}) == {"data_root": "b"}
    assert go_on(single, {}) == single
    assert go_on(single, {"annotations": "b.json", "photos": "c"}) == {"annotations": "b.json", "photos": "c"}
    assert go_on(single, {"data_root": "b"}) == {"data_root": "b"}


def test_all_that_cannot_change_is_refused_at_once_with_both_values():
    typed = {"encoder": "resnet18", "image_size": 64, "seed": 1, "sample": True, "num_workers": 1, "accumulate": 2}
    with pytest.raises(ResumeError) as caught:
        go_on({"image_size": 128}, typed)
    assert str(caught.value) == (
        "last.pth was trained with --encoder resnet34, --image-size 128, --sample False, --seed 0, --accumulate 1 "
        "and cannot go on with resnet18, 64, True, 1, 2")  # fmt: skip


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [({}, 1.0, True), ({"decoder_rate": 1.0}, 2.0, True), ({}, 2.0, False), ({"pretrained": False}, 1.0, False)],
)
def test_a_rate_of_its_own_is_not_taken_from_the_decoder_nor_given_to_it(before, now, refused):
    if refused:
        with pytest.raises(ResumeError, match="--decoder-rate"):
            go_on(before, {"decoder_rate": now})
    else:
        assert go_on(before, {"decoder_rate": now})["decoder_rate"] == now


def test_it_says_what_has_changed_and_what_has_not_though_the_file_says_so():
    file = DEFAULTS | {"num_workers": 1, "learning_rate": 0.5, "checkpoint_dir": "b"}
    start = found(encoder="resnet18", pretrained=False)
    now = settings_to_go_on_with(start, file, ["num_workers"])
    assert described(start, now, file, 1) == (
        "going on from last.pth, after epoch 3, num_workers 12 is now 1, checkpoint_dir checkpoints is now b; "
        "from the checkpoint, and not from the defaults: encoder resnet18 (resnet34), "
        "learning_rate 0.0001 (0.5)")  # fmt: skip
