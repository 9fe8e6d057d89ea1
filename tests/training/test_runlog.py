"""run.log: what the console showed, of several processes, with and without a place to write it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training import runlog

ROOT = Path(runlog.__file__).parents[1]


def lines(path: Path) -> list[str]:
    """Without the line that a start begins with."""
    return [line for line in path.read_text("utf-8").splitlines() if not line.startswith("--- ")]


def test_every_line_is_kept_from_the_first_and_no_bar(tmp_path, capsys):
    path = tmp_path / "run.log"
    before = sys.stdout, sys.stderr
    with runlog.recorded():
        print("first", "of two", end=" ")
        print("\rbar  10%", end="", file=sys.stderr)
        print("error\nfür", file=sys.stderr)
        print("parts")
        assert not path.exists()
        runlog.keep_in(path, 0)
        print("\rbar 100%", end="", file=sys.stderr)
        print("\r        \r", end="", file=sys.stderr)
        print("last")
        assert sys.stdout.isatty() is False
    print("afterwards")
    assert lines(path) == ["error", "für", "first of two parts", "last"]
    assert path.read_text("utf-8").startswith("--- 2")
    assert "bar 100%" in capsys.readouterr().err
    assert (sys.stdout, sys.stderr) == before


def test_several_processes_and_starts_write_to_one_file(tmp_path):
    path = tmp_path / "run.log"
    for rank in (0, 1, 0):
        with runlog.recorded():
            print("before", rank)
            runlog.keep_in(path, rank)
            print("error\nafter", rank, file=sys.stderr)
    main = ["before 0", "error", "after 0"]
    assert lines(path) == [*main, "[rank 1] before 1", "[rank 1] error", "[rank 1] after 1", *main]
    assert path.read_text("utf-8").count("--- ") == 2


def test_a_traceback_is_kept(tmp_path):
    with pytest.raises(ZeroDivisionError), runlog.recorded():  # noqa: PT012
        runlog.keep_in(tmp_path / "run.log", 0)
        print(1 / 0)
    assert lines(tmp_path / "run.log")[0] == "Traceback (most recent call last):"
    assert lines(tmp_path / "run.log")[-1] == "ZeroDivisionError: division by zero"


def test_what_a_signals_handler_says(tmp_path, capfd):
    with runlog.recorded():
        runlog.keep_in(tmp_path / "run.log", 0)
        runlog.say_at_once("\nSIGTERM: saving\n")
    runlog.say_at_once("\nunrecorded\n")
    assert lines(tmp_path / "run.log") == ["SIGTERM: saving"]
    assert capfd.readouterr().out.split("\n") == ["", "SIGTERM: saving", "", "unrecorded", ""]


@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_place_to_write_all_goes_on(rank, tmp_path, capsys):
    with runlog.recorded():
        runlog.keep_in(tmp_path / "absent" / "run.log", rank)
        print("goes on")
    said = [f"{tmp_path / 'absent' / 'run.log'} cannot be written: No such file or directory: the training goes on "
            "without it"]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [*said[rank:], "goes on"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no Linux")
def test_a_full_disk_ends_nothing(capsys):
    with runlog.recorded():
        runlog.keep_in(Path("/dev/full"), 0)
        print("goes on")
    assert capsys.readouterr().out == "goes on\n"


def test_a_console_that_is_closed_leaves_the_log_whole(tmp_path):
    code = (
        "import pathlib, sys; from training import runlog; from training.streams import steady_streams\n"
        "steady_streams()\n"
        "with runlog.recorded():\n"
        "    runlog.keep_in(pathlib.Path(sys.argv[1]), 0)\n"
        "    for number in range(3000): print('line', number, flush=True)\n"
    )
    command = ["bash", "-c", '"$@" | head -n 1; exit ${PIPESTATUS[0]}', "bash", sys.executable, "-c", code]
    assert subprocess.run([*command, str(tmp_path / "run.log")], cwd=ROOT, capture_output=True).returncode == 0
    assert len(lines(tmp_path / "run.log")) == 3000
