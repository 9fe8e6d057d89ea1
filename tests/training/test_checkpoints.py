"""Checkpoints on disk: whole or not there, data only, and no run's files lost to another's."""

from __future__ import annotations

import os
import pickle
from datetime import datetime
from pathlib import Path

import pytest
import torch
from torch import nn

from training import checkpoints
from training.checkpoints import (
    disk_needed,
    epoch_files,
    in_the_way,
    move_aside,
    newest_usable,
    save,
    snapshot,
    write_epoch,
    write_last,
)
from utils import CheckpointError, atomic_write, read_checkpoint


def content(epoch: int = 1, **more) -> dict:
    model = {"weight": torch.arange(1000) / 7 + epoch, "steps": torch.tensor(epoch)}
    return {"epoch": epoch, "config": {"encoder": "resnet18", "amp": True, "seed": 0}, "model": model, **more}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# --- writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError(), KeyboardInterrupt()])
def test_a_writer_that_fails_midway_leaves_the_old_file_whole(error, tmp_path):
    path = tmp_path / "last.pth"
    path.write_bytes(b"old")

    def write_half():
        with atomic_write(path) as file:
            file.write(b"half of the n")
            file.flush()
            assert path.read_bytes() == b"old"
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["last.pth"]


def test_what_was_written_replaces_the_old_file(tmp_path):
    path = tmp_path / "last.pth"
    path.write_bytes(b"a longer old one")
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["last.pth"]


def test_it_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    with atomic_write(tmp_path / "last.pth") as file:
        file.write(b"new")
    assert calls[:2] == ["fsync", "replace"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    save(content(1), tmp_path / "last.pth")
    with pytest.raises(Exception, match="pickle"):
        save(content(2, broken=lambda: None), tmp_path / "last.pth")
    assert read_checkpoint(tmp_path / "last.pth")["epoch"] == 1
    assert names(tmp_path) == ["last.pth"]


def test_what_is_saved_of_a_gpu_is_saved_from_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.full_like(self, 7, device="cpu"))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    model.to("meta")  # stands for a GPU
    moments = {0: {"step": torch.ones((), device="meta"), "exp_avg": torch.ones(2, device="meta")}}
    tallies = [{"losses": torch.ones(3, device="meta"), "skipped": 2}]
    optimizer = {"state": moments, "param_groups": [{"betas": (0.9, 0.999), "params": [0]}]}
    whole = content(1, model=model.state_dict(), optimizer=optimizer, tallies=tallies)
    save(snapshot(whole), tmp_path / "a.pth")
    back = torch.load(tmp_path / "a.pth", weights_only=True)  # as README does it
    saved = [*back["model"].values(), *back["optimizer"]["state"][0].values(), back["tallies"][0]["losses"]]
    assert {value.device.type for value in saved} == {"cpu"}
    assert all((value == 7).all() for value in saved)
    assert back["model"]["0.weight"].stride() == model[0].weight.stride()
    assert back["model"]._metadata == model.state_dict()._metadata
    assert back["optimizer"]["param_groups"] == optimizer["param_groups"]
    assert model[0].weight.is_meta


def test_a_snapshot_stays_as_it_is_while_all_that_it_was_taken_of_changes():
    model = nn.BatchNorm2d(4)
    whole = content(1, model=model.state_dict(), history=[{"iou": 0.5}], tallies=[{"losses": torch.ones(3)}])
    before = snapshot(whole)
    model.running_var.mul_(2)
    whole["tallies"][0]["losses"].add_(1)
    whole["history"][0]["iou"] = 0.6
    whole["history"].append({"iou": 0.7})
    assert (before["model"]["running_var"] == 1).all()
    assert (before["tallies"][0]["losses"] == 1).all()
    assert before["history"] == [{"iou": 0.5}]


# --- reading ----------------------------------------------------------------------------------------------


def test_round_trip_is_exact_and_data_only(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    history = [{"epoch": 1, "val_iou": 0.1 + 0.2}]
    save(content(7, optimizer=optimizer.state_dict(), history=history, best_iou=1 / 3), tmp_path / "a.pth")
    for back in (read_checkpoint(tmp_path / "a.pth"), torch.load(tmp_path / "a.pth", weights_only=True)):
        assert torch.equal(back["model"]["weight"], content(7)["model"]["weight"])
        assert (back["epoch"], back["history"], back["best_iou"]) == (7, history, 1 / 3)
        assert back["config"] == content()["config"]
        moments = optimizer.state_dict()["state"][0]
        assert all(torch.equal(back["optimizer"]["state"][0][name], value) for name, value in moments.items())


def test_an_absent_one_is_named(tmp_path):
    refusal(tmp_path / "nothing.pth")
    refusal(tmp_path)  # a folder


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_one_cut_short_is_refused(share, tmp_path):
    save(content(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: int(share * len(whole))])
    refusal(tmp_path / "a.pth")


def test_a_flipped_bit_is_never_taken_for_a_weight(tmp_path):
    save(content(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    start = whole.index(content()["model"]["weight"].numpy().tobytes())
    for offset in range(start, start + 4000, 500):
        flipped = bytearray(whole)
        flipped[offset] ^= 64
        (tmp_path / "a.pth").write_bytes(flipped)
        refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("junk", [b"hello\n", b"<html>not found</html>", bytes(1000), pickle.dumps({"model": 1})])
def test_another_kind_of_file_is_refused(junk, tmp_path):
    (tmp_path / "a.pth").write_bytes(junk)
    refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("junk", [b"\x80\x02.", b"M"])
def test_bytes_that_resemble_a_pickle_are_refused(junk, tmp_path):
    (tmp_path / "a.pth").write_bytes(junk)
    refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("other", [{"epoch": 1}, [1, 2], torch.ones(3), {"state_dict": {}, "epoch": 3}])
def test_a_file_of_another_program_is_refused(other, tmp_path):
    torch.save(other, tmp_path / "a.pth")
    assert "not a checkpoint" in refusal(tmp_path / "a.pth")


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [lambda evil, file: file.write(pickle.dumps(evil)), torch.save])
def test_nothing_in_a_file_is_executed(write, tmp_path):
    with open(tmp_path / "a.pth", "wb") as file:
        write(content(evil=Evil(tmp_path / "executed")), file)
    refusal(tmp_path / "a.pth")
    assert not (tmp_path / "executed").exists()


# --- a run's epochs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4]), (0, [1, 2, 3, 4])])
def test_the_newest_are_kept_and_last_is_the_newest(keep, left, tmp_path):
    for epoch in range(1, 5):
        write_epoch(tmp_path, content(epoch), keep)
        newest = tmp_path / f"epoch_{epoch:04d}.pth"
        assert (tmp_path / "last.pth").read_bytes() == newest.read_bytes()
    assert names(tmp_path) == [*(f"epoch_{epoch:04d}.pth" for epoch in left), "last.pth"]
    assert [read_checkpoint(path)["epoch"] for path in epoch_files(tmp_path)] == left[::-1]


def test_order_is_by_number_beyond_four_digits(tmp_path):
    for epoch in (9998, 9999, 10000):
        write_epoch(tmp_path, content(epoch), 2)
    assert names(tmp_path) == ["epoch_10000.pth", "epoch_9999.pth", "last.pth"]
    assert [path.stem for path in epoch_files(tmp_path)] == ["epoch_10000", "epoch_9999"]


def test_last_is_a_copy_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    for epoch in (1, 2):
        write_epoch(tmp_path, content(epoch), 1)
    assert read_checkpoint(tmp_path / "last.pth")["epoch"] == 2
    assert names(tmp_path) == ["epoch_0002.pth", "last.pth", "previous.pth"]  # of a copy it is kept needlessly


def test_a_copy_that_the_user_made_is_no_epoch(tmp_path):
    (tmp_path / "epoch_0003_good.pth").write_bytes(b"the user's own")
    write_epoch(tmp_path, content(4), 1)
    assert names(tmp_path) == ["epoch_0003_good.pth", "epoch_0004.pth", "last.pth"]


def test_an_epoch_just_written_is_never_the_one_removed(tmp_path):
    for epoch in (3, 4, 5, 2):  # as after --resume epoch_0001.pth
        write_epoch(tmp_path, content(epoch), 2)
    assert (tmp_path / "epoch_0002.pth").exists()


def test_newest_usable_passes_over_the_damaged_and_names_it(tmp_path, capsys):
    assert newest_usable(tmp_path) is None
    assert newest_usable(tmp_path / "absent") is None
    for epoch in (1, 2, 3):
        write_epoch(tmp_path, content(epoch), 0)
    path, found = newest_usable(tmp_path)
    assert (path.name, found["epoch"]) == ("last.pth", 3)
    assert capsys.readouterr().out == ""

    (tmp_path / "last.pth").unlink()
    (tmp_path / "last.pth").write_bytes(b"")
    path, found = newest_usable(tmp_path)
    assert (path.name, found["epoch"]) == ("epoch_0003.pth", 3)
    assert "last.pth" in capsys.readouterr().out

    os.truncate(tmp_path / "epoch_0003.pth", 2000)
    path, found = newest_usable(tmp_path)
    assert (path.name, found["epoch"]) == ("epoch_0002.pth", 2)
    assert "epoch_0003.pth" in capsys.readouterr().out


def test_newest_usable_is_none_where_all_are_damaged(tmp_path, capsys):
    write_epoch(tmp_path, content(1), 0)
    os.truncate(tmp_path / "last.pth", 10)  # the same file as epoch_0001.pth
    assert newest_usable(tmp_path) is None
    assert "epoch_0001.pth" in capsys.readouterr().out


# --- an earlier run ---------------------------------------------------------------------------------------

LEFT = ["best_model.pth", "curves.png", "epoch_0001.pth", "epoch_12345.pth", "history.csv", "last.pth", "preview.png"]
OTHERS = [".gitkeep", "epoch_0003_good.pth", "epoch_notes.txt", "my_best_model.pth", "notes.md"]


class Noon(datetime):
    @classmethod
    def now(cls, *_):
        return cls(2026, 1, 2, 12, 0, 0)


def set_aside(folder: Path) -> Path | None:
    """What a new run does with an earlier one's files."""
    return move_aside(folder, in_the_way(folder, None, 0, False))


def test_all_of_a_run_is_moved_aside_and_nothing_else(tmp_path):
    assert set_aside(tmp_path) is None
    assert names(tmp_path) == []
    for name in LEFT + OTHERS:
        (tmp_path / name).write_text(name)
    aside = set_aside(tmp_path)
    assert aside.parent == tmp_path
    assert names(aside) == LEFT
    assert all((aside / name).read_text() == name for name in LEFT)
    assert names(tmp_path) == sorted([*OTHERS, aside.name])
    assert set_aside(tmp_path) is None


MEASURED = ["best_model_on_coco_val2017", "epoch_0001_on_a_val_at_512", "epoch_0007_on_a_val", "last_on_a_b_val"]


def measured(folder: Path) -> None:
    """What evaluate.py leaves, and what only has such a name."""
    for name in (*MEASURED, "my_model_on_coco_val2017"):
        (folder / name).mkdir()
        (folder / name / "metrics.json").touch()
    (folder / "last_on_tuesday").mkdir()  # a run by --run-name
    (folder / "best_model_on_paper.txt").touch()


def test_an_older_models_evaluations_are_moved_aside_with_it(tmp_path):
    (tmp_path / "best_model.pth").touch()
    measured(tmp_path)
    assert names(set_aside(tmp_path)) == sorted(["best_model.pth", *MEASURED])
    assert {"my_model_on_coco_val2017", "last_on_tuesday", "best_model_on_paper.txt"} < {*names(tmp_path)}
    assert set_aside(tmp_path) is None


def test_going_on_keeps_the_evaluations_and_going_back_those_of_before(tmp_path):
    measured(filled(tmp_path))
    found = in_the_way(tmp_path, tmp_path / "epoch_0003.pth", 3, False)
    assert not [path for path in found if path.is_dir()]
    found = in_the_way(tmp_path, tmp_path / "epoch_0002.pth", 2, True)
    assert [path.name for path in found if path.is_dir()] == sorted({*MEASURED} - {"epoch_0001_on_a_val_at_512"})


def test_moving_aside_twice_in_a_second_overwrites_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "datetime", Noon)
    asides = []
    for run in ("first", "second", "third"):
        (tmp_path / "last.pth").write_text(run)
        asides.append(set_aside(tmp_path))
    assert len(set(asides)) == 3
    assert [(aside / "last.pth").read_text() for aside in asides] == ["first", "second", "third"]


def filled(folder: Path) -> Path:
    """Three epochs and the step before them, and a newest checkpoint that is damaged."""
    save(content(2, step=1), folder / "previous.pth")
    for epoch in (1, 2, 3):
        save(content(epoch), folder / f"epoch_{epoch:04d}.pth")
    (folder / "last.pth").write_bytes(b"damaged")
    (folder / "history.csv").touch()
    return folder


@pytest.mark.parametrize(
    ("source", "epoch", "went_back", "moved"),
    [
        ("previous.pth", 3, True, ["last.pth"]),  # a link to it would take the place of the one that is whole
        ("previous.pth", 3, False, ["last.pth"]),
        ("epoch_0002.pth", 2, False, ["epoch_0003.pth", "last.pth"]),
        ("epoch_0002.pth", 2, True, ["epoch_0003.pth", "history.csv", "last.pth", "previous.pth"]),
        ("../elsewhere.pth", 2, True, ["epoch_0001.pth", "epoch_0002.pth", "epoch_0003.pth", "history.csv", "last.pth",
                                       "previous.pth"]),
    ],
)  # fmt: skip
def test_what_a_run_would_overwrite_and_does_not_go_on_from_is_in_the_way(source, epoch, went_back, moved, tmp_path):
    found = in_the_way(filled(tmp_path), tmp_path / source, epoch, went_back)
    assert sorted(path.name for path in found) == moved


# --- the disk ---------------------------------------------------------------------------------------------


def largest_use(folder: Path, keep: int, num_epochs: int, monkeypatch) -> tuple[int, int]:
    """The most bytes that a run's files take at any time, and those of the model's weights."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(1000, 200))
    optimizer = torch.optim.Adam(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    use, replace = [], os.replace

    def measured(*args):
        files = {path.stat().st_ino: path.stat().st_size for path in folder.iterdir()}
        use.append(sum(files.values()))
        replace(*args)

    monkeypatch.setattr(os, "replace", measured)
    for epoch in range(1, num_epochs + 1):
        state = {"epoch": epoch, "config": {}, "model": model.state_dict()}
        if epoch == 1:
            save(state, folder / "best_model.pth")
        whole = {**state, "optimizer": optimizer.state_dict()}
        for _ in range(2):
            write_last(folder, whole)
        write_epoch(folder, whole, keep)
    return max(use), 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("keep", "num_epochs"), [(1, 4), (2, 4), (0, 3), (3, 3), (5, 2)])
def test_disk_needed_is_what_real_files_take(keep, num_epochs, tmp_path, monkeypatch):
    used, model_bytes = largest_use(tmp_path, keep, num_epochs, monkeypatch)
    assert disk_needed(model_bytes, 3, keep, num_epochs) == pytest.approx(used, rel=0.1)
