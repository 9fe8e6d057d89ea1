"""What is said and kept of a run as a whole: the banner, run.json, the revision of the program."""

from __future__ import annotations

import json
import subprocess

import pytest
from tiny_runs import run_of, small
from torch import nn

import trainer
from training import run_info


def test_the_banners_facts_stand_under_one_another(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = run_info.wrapped({"data": "10 photos", "device": "cpu " * 40}).splitlines()
    assert [line.index(text) for line, text in zip(lines, ("10", "cpu", "cpu"), strict=True)] == [8, 8, 8]
    assert max(map(len, lines)) <= 100


@pytest.mark.usefixtures("tiny")
def test_the_banner_tells_the_facts_of_a_run(coco_root, tmp_path, capsys):
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1, grad_accum_steps=2, keep_checkpoints=1))
    said = " ".join(capsys.readouterr().out.split())
    for fact in (
        f"data 10 photos to train on, 5 to validate, in {coco_root} ", "device cpu, float32, 1 process, 0 workers each",
        "batch 8 photos a step, 2 steps an epoch", "lr 0.0001, in cosine cycles of 1 epoch ",
        "grad_accum_steps=2", f"in {tmp_path / 'run'}", "model resnet18, 0.0 million parameters",
    ):  # fmt: skip
        assert fact in said
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["settings"]["grad_accum_steps"], facts["processes"], facts["precision"]) == (2, 1, "float32")
    assert {"torch", "numpy", "python"} <= facts["versions"].keys()


@pytest.mark.parametrize(
    ("size", "text"),
    [(999, "999 bytes"), (1500, "1.5 KB"), (168_027_175, "168 MB"), (1.062e9, "1.06 GB"), (1.5e12, "1.5 TB"),
     (999_400, "999 KB"), (999_999, "1 MB")],
)  # fmt: skip
def test_readable_size(size, text):
    assert run_info.readable_size(size) == text


def test_run_json_keeps_the_earlier_starts(tmp_path):
    path, run = tmp_path / "run.json", run_of(nn.Conv2d(3, 4, 1))
    for run.source in (None, "a.pth", "b.pth"):
        run_info.write_run_json(run, path)
    facts = json.loads(path.read_text())
    assert [start["resumed_from"] for start in [*facts["earlier_starts"], facts]] == [None, "a.pth", "b.pth"]
    path.write_text("edited {")
    run_info.write_run_json(run, path)
    assert json.loads(path.read_text())["earlier_starts"] == []
    run.source = None  # a new run in the same folder
    run_info.write_run_json(run, path)
    assert json.loads(path.read_text())["earlier_starts"] == []


def test_the_git_revision_tells_edited_files(tmp_path):
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-m", "a")
    git("tag", "v1")
    revision = git("rev-parse", "HEAD")
    assert run_info.git_revision(tmp_path) == revision
    (tmp_path / "a.py").write_text("2")
    assert run_info.git_revision(tmp_path) == f"{revision}-dirty"
    (tmp_path / "inside").mkdir()
    assert run_info.git_revision(tmp_path / "inside") is None
