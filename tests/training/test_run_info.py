"""What is said and kept of a run as a whole: the banner, run.json, the revision of the program."""

from __future__ import annotations

import json
import subprocess

import pytest
from tiny_runs import run_of, small
from torch import nn

import trainer
from training import run_info


@pytest.mark.usefixtures("tiny")
def test_the_banner_tells_the_facts_of_a_run(coco_root, tmp_path, capsys):
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1, grad_accum_steps=2, keep_checkpoints=1))
    said = capsys.readouterr().out
    assert "\n    data  10 photos" in said  # under "settings"
    for fact in (
        f"data 10 photos to train on, 5 to validate, in {coco_root} ", "device cpu, float32, 1 process, 0 workers each",
        "batch 8 photos a step, 2 steps an epoch", "lr 0.0001, in cosine cycles of 1 epoch ",
        "grad_accum_steps=2", f"in {tmp_path / 'run'}", "model resnet18, 0.0 million parameters",
    ):  # fmt: skip
        assert fact in " ".join(said.split())
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["settings"]["grad_accum_steps"], facts["processes"], facts["precision"]) == (2, 1, "float32")
    assert {"torch", "numpy", "python"} <= facts["versions"].keys()


@pytest.mark.parametrize(("size", "text"), [(999, "999 bytes"), (999_999, "1 MB"), (1.062e12, "1.06 TB")])
def test_readable_size(size, text):
    assert run_info.readable_size(size) == text


def test_run_json_keeps_the_earlier_starts(tmp_path):
    path, run = tmp_path / "run.json", run_of(nn.Conv2d(3, 4, 1))
    path.write_text("edited {")
    for source, kept in (("a", ["a"]), ("b", ["a", "b"]), ("c", ["a", "b", "c"]), (None, [None])):  # the last is new
        run.source = source
        run_info.write_run_json(run, path)
        facts = json.loads(path.read_text())
        assert [start["resumed_from"] for start in [*facts["earlier_starts"], facts]] == kept


def test_the_git_revision_tells_edited_files(tmp_path):
    def git(arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a", *arguments.split()]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "inside").mkdir()
    (tmp_path / "a.py").write_text("1")
    for arguments in ("init", "add a.py", "commit -m a", "tag v1"):
        git(arguments)
    revision = git("rev-parse HEAD")
    assert run_info.git_revision(tmp_path) == revision
    (tmp_path / "a.py").write_text("2")
    assert run_info.git_revision(tmp_path) == f"{revision}-dirty"
    assert run_info.git_revision(tmp_path / "inside") is None
