"""What every command shares: exit codes, one-line errors, streams that end nothing, the run's log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from helpers import ROOT

from training import command_line
from training.command_line import OneLineParser, RunLog, UsageError, open_run_log, run_cli
from utils import UserError


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [(None, 0, ""), (3, 3, ""), (SystemExit(143), 143, ""), (SystemExit(), 0, ""),
     (KeyboardInterrupt(), 130, "\nbye\n"), (UserError("no such photo"), 2, "cut: error: no such photo\n"),
     (RuntimeError("CUDA out of memory."), 2, "cut: error: the GPU is out of memory: free some\n")],
    ids=repr,
)  # fmt: skip
def test_the_exit_code_says_how_a_command_ended(ending, code, said, monkeypatch, capsys):
    monkeypatch.setattr(command_line.signal, "signal", lambda *_: None)
    assert run_cli("cut", Mock(side_effect=[ending]), "free some", "bye") == code
    assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        run_cli("cut", Mock(side_effect=RuntimeError("a bug")))


def test_every_command_has_a_version(capsys):
    with pytest.raises(SystemExit):
        OneLineParser().parse_args(["--version"])
    assert capsys.readouterr().out.startswith("Silueta ")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("--lr", "did you mean --learning-rate?"), ("--epochs", "did you mean --num-epochs?"),
     ("--no-samplq", "did you mean --no-sample?"), ("--batches", "did you mean --batch-size?"),
     ("--size", "--help lists them all"), ("--wandb", "--help lists them all")],
)  # fmt: skip
def test_an_unknown_flag_is_refused_with_the_only_one_that_may_be_meant(name, hint):
    parser = OneLineParser()
    for flag in ("--learning-rate", "--batch-size", "--image-size", "--num-epochs", "--sample", "--no-sample"):
        parser.add_argument(flag)
    with pytest.raises(UsageError, match=f"^{re.escape(f'unknown argument {name}=4: {hint}')}$"):
        parser.parse_args([f"{name}=4"])


# A command of 3000 lines on each stream, without the second that PyTorch takes to import.
TALKER = """
import sys, types
sys.path.insert(0, sys.argv[1])
sys.modules["utils"] = types.SimpleNamespace(UserError=Exception, VERSION="", user_message=str)
from training.command_line import open_run_log, run_cli
def work():
    open_run_log(sys.argv[2], 0)
    for number in range(3000):
        print("line", number, "f\\u00fcr \\udcff", flush=number % 7 == 0)
        print("error", number, file=sys.stderr)
sys.exit(run_cli("talker", work, keeps_log=True))
"""


def talk(shell: str = "", log: Path = Path("/dev/null"), code: str = TALKER, options: tuple[str, ...] = (),
         **environment: str) -> subprocess.CompletedProcess:  # fmt: skip
    """Runs the code in a shell that redirects its streams."""
    command = ["bash", "-c", f'"$@" {shell}', "bash", sys.executable, *options, "-c", code, str(ROOT), str(log)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, env={**buffered, **environment}, capture_output=True, timeout=600)


@pytest.mark.parametrize("options", [(), ("-u",)])
@pytest.mark.parametrize("shell", [">/dev/full 2>&1", ">&-", "<&- >&- 2>&-", "| head -n 2; exit ${PIPESTATUS[0]}"])
def test_a_stream_that_takes_nothing_is_no_failure(shell, options, tmp_path):
    done = talk(shell, tmp_path / "run.log", options=options)
    assert done.returncode == 0
    assert not re.search(b"Traceback|Exception", done.stderr + done.stdout)
    assert len((tmp_path / "run.log").read_text().splitlines()) == 1 + 6000


def test_all_is_printed_and_a_letter_that_is_missing_by_its_number():
    for encoding, first in (("ascii", rb"line 0 f\xfcr \udcff"), ("utf-8", "line 0 für \\udcff".encode())):
        done = talk(PYTHONIOENCODING=encoding)
        assert [len(text.splitlines()) for text in (done.stdout, done.stderr)] == [3000, 3000]
        assert done.stdout.splitlines()[0] == first


def test_no_file_gets_the_descriptor_of_a_closed_stream(tmp_path):
    code = TALKER.replace("    open_run_log", f"    import os; file = open({str(tmp_path / 'checkpoint')!r}, 'w')\n"
                          "    os.write(1, b'a library warns'); os.write(2, b'as well'); return file.fileno() <= 2\n"
                          "    open_run_log")  # fmt: skip
    assert talk("<&- >&- 2>&-", code=code).returncode == 0
    assert (tmp_path / "checkpoint").read_bytes() == b""


# Starts all commands in one process, as Python -OO compiles all of PyTorch anew: each by its own way to its modules.
COMMANDS = """
import io, pathlib, runpy, sys
root, log, path = pathlib.Path(sys.argv[1]), open(sys.argv[2], "w"), [*sys.path]
own = {file.stem for file in root.iterdir()}
for script in [root / "trainer.py", root / "evaluate.py", root / "predict.py", *root.glob("tools/[a-z]*.py")]:
    for stream in (None, io.StringIO()):
        for module in [module for module in sys.modules if module.partition(".")[0] in own]:
            del sys.modules[module]
        sys.path[:], sys.argv, sys.stdout, sys.stderr = path, [script.name, "--help"], stream, stream
        try:
            runpy.run_path(str(script), run_name="__main__")
        except BaseException as ending:
            print(script.name, repr(ending), stream and stream.getvalue().split()[0], __doc__, file=log)
"""


@pytest.mark.slow
def test_every_command_starts_without_streams_and_docstrings_and_leaves_anothers_streams(tmp_path):
    log, names = tmp_path / "log", {"trainer.py", "evaluate.py", "predict.py"}
    names |= {path.name for path in ROOT.glob("tools/[a-z]*.py")}
    talk(">&- 2>&-", log, COMMANDS, ("-OO",), PYTHONSAFEPATH="1", PYTHONPYCACHEPREFIX=str(tmp_path / "compiled"))
    expected = {f"{name} SystemExit(0) {said} None" for name in names for said in (None, "usage:")}
    assert {*log.read_text().splitlines()} == expected


def lines(path: Path) -> list[str]:  # without those that a start begins with
    return [line for line in path.read_text("utf-8").splitlines() if not line.startswith("--- 2")]


def test_the_log_keeps_every_line_from_the_first_and_a_traceback_and_no_bar(tmp_path, capfd):
    path, before = tmp_path / "run.log", (sys.stdout, sys.stderr)
    with pytest.raises(ZeroDivisionError), RunLog():  # noqa: PT012
        print("first", "of two", end=" ")
        print("\rbar  10%", end="", file=sys.stderr)
        print("error\nfür", file=sys.stderr)
        print("parts")
        assert not path.exists()
        open_run_log(path, 0)
        print("\rbar 100%", end="", file=sys.stderr)
        command_line.say_from_signal_handler("\nSIGTERM: saving\n")
        assert sys.stdout.isatty() is False
        print(1 / 0)
    print("afterwards")
    command_line.say_from_signal_handler("as well\n")
    assert lines(path)[:4] == ["error", "für", "first of two parts", "SIGTERM: saving"]
    assert lines(path)[4] == "Traceback (most recent call last):"
    assert lines(path)[-1] == "ZeroDivisionError: division by zero"
    assert (sys.stdout, sys.stderr) == before
    console = capfd.readouterr()
    assert "bar 100%" in console.err
    assert "\nSIGTERM: saving\n" in console.out


def test_several_processes_and_starts_write_to_one_log(tmp_path):
    path = tmp_path / "run.log"
    for rank in (0, 1, 0):
        with RunLog():
            print("before", rank)
            open_run_log(path, rank)
            print("error\nafter", rank, file=sys.stderr)
    said = ["before 0", "error", "after 0", "[rank 1] before 1", "[rank 1] error", "[rank 1] after 1"]
    assert lines(path) == said + said[:3]
    assert path.read_text("utf-8").count("--- ") == 2


def test_a_log_that_cannot_be_written_ends_nothing_and_is_named_once(tmp_path, capsys):
    absent = tmp_path / "absent" / "run.log"
    for path, rank in ((absent, 0), (absent, 1), (Path("/dev/full"), 0)):
        with RunLog():
            open_run_log(path, rank)
            print("goes on")
    said = f"{absent} cannot be written: No such file or directory: the training goes on without it"
    assert capsys.readouterr().out.splitlines() == [said, "goes on", "goes on", "goes on"]
