"""What every command shares: exit codes, one-line errors, streams that end nothing, the run's log."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from training import command_line
from training.command_line import OneLineParser, RunLog, UsageError, closest_flag, open_run_log, run_cli
from utils import UserError

# --- exit codes and flags ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        (None, 0, ""), (3, 3, ""), (SystemExit(143), 143, ""), (SystemExit(), 0, ""),
        (KeyboardInterrupt(), 130, "\nbye\n"), (UserError("no such photo"), 2, "cut: error: no such photo\n"),
        (RuntimeError("CUDA out of memory."), 2, "cut: error: the GPU is out of memory: free some\n"),
    ],
    ids=repr,
)  # fmt: skip
def test_the_exit_code_says_how_a_command_ended(ending, code, said, monkeypatch, capsys):
    monkeypatch.setattr(command_line.signal, "signal", lambda *_: None)

    def work() -> int | None:
        if isinstance(ending, BaseException):
            raise ending
        return ending

    assert run_cli("cut", work, "free some", "bye") == code
    assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        run_cli("cut", lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_flags_take_dashes_or_underscores_and_mistakes_get_one_line(capsys):
    parser = OneLineParser()
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--root")
    for arguments in (["--batch_size=4", "--root", "a_b"], ["--batch-size", "4", "--root=a_b"]):
        assert vars(parser.parse_args(arguments)) == {"batch_size": 4, "root": "a_b"}
    for mistake, line in [("--batch-size=lots", "argument --batch-size: invalid int value: 'lots'"),
                          ("--batch=4", "unknown argument --batch=4: did you mean --batch-size?"),
                          ("--frob", "unknown argument --frob: --help lists them all")]:  # fmt: skip
        with pytest.raises(UsageError, match=f"^{re.escape(line)}$"):
            parser.parse_args([mistake])
    with pytest.raises(SystemExit):
        parser.parse_args(["--version"])
    assert capsys.readouterr().out.startswith("Silueta ")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("--lr", "--learning-rate"), ("--epochs", "--num-epochs"), ("--learning-rat", "--learning-rate"),
        ("--batchsize", "--batch-size"), ("--no-samplq", "--no-sample"), ("--learn", "--learning-rate"),
        ("--batches", "--batch-size"), ("--size", ""), ("--name", ""), ("--wandb", ""),
    ],
)  # fmt: skip
def test_the_closest_flag_is_the_only_one_that_may_be_meant(name, meant):
    flags = ["--learning-rate", "--batch-size", "--image-size", "--num-epochs", "--sample", "--no-sample"]
    assert closest_flag(name, flags) == meant


# --- streams ----------------------------------------------------------------------------------------------

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
@pytest.mark.parametrize(
    "shell", [">/dev/full", ">/dev/full 2>&1", "2>/dev/full", ">&-", ">&- 2>&-", "<&- >&- 2>&-",
              "| head -n 2; exit ${PIPESTATUS[0]}", "2>&1 | head -n 2; exit ${PIPESTATUS[0]}"]
)  # fmt: skip
def test_a_stream_that_takes_nothing_is_no_failure(shell, options, tmp_path):
    done = talk(shell, tmp_path / "run.log", options=options)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr + done.stdout
    assert b"Exception" not in done.stderr + done.stdout
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


def test_streams_of_another_program_are_left_to_it(monkeypatch):
    theirs = io.StringIO()
    monkeypatch.setattr(sys, "stdout", theirs)
    monkeypatch.setattr(sys, "stderr", None)
    command_line.ignore_write_errors()
    assert sys.stdout is theirs
    print("into nowhere", file=sys.stderr)
    sys.stderr.close()


# Starts all commands in one process, as Python -OO compiles all of PyTorch anew: each by its own way to its modules.
COMMANDS = """
import io, pathlib, runpy, sys
root, log, path = pathlib.Path(sys.argv[1]), open(sys.argv[2], "w"), [*sys.path]
own = {file.stem for file in root.iterdir()}
for name in ["trainer.py", "evaluate.py", "predict.py", *sorted(root.glob("tools/[a-z]*.py"))]:
    for stream in (None, io.StringIO()):
        for module in [module for module in sys.modules if module.partition(".")[0] in own]:
            del sys.modules[module]
        sys.path[:], sys.argv, sys.stdout, sys.stderr = path, [name, "--help"], stream, stream
        try:
            runpy.run_path(str(root / name), run_name="__main__")
        except BaseException as ending:
            said = "silent" if stream is None else stream.getvalue().split()[0]
            print(pathlib.Path(name).name, repr(ending), said, __doc__, file=log)
"""


@pytest.mark.slow
def test_every_command_starts_without_streams_and_docstrings(tmp_path):
    environment = {"PYTHONSAFEPATH": "1", "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    log = tmp_path / "log"
    talk(">&- 2>&-", log, COMMANDS, ("-OO",), **environment)
    names = ["trainer.py", "evaluate.py", "predict.py", *sorted(path.name for path in ROOT.glob("tools/[a-z]*.py"))]
    expected = [f"{name} SystemExit(0) {said} None" for name in names for said in ("silent", "usage:")]
    assert log.read_text().splitlines() == expected


# --- run.log ----------------------------------------------------------------------------------------------


def lines(path: Path) -> list[str]:
    """Without the line that a start begins with."""
    return [line for line in path.read_text("utf-8").splitlines() if not line.startswith("--- ")]


def test_the_log_keeps_every_line_from_the_first_and_no_bar(tmp_path, capfd):
    path, before = tmp_path / "run.log", (sys.stdout, sys.stderr)
    with RunLog():
        print("first", "of two", end=" ")
        print("\rbar  10%", end="", file=sys.stderr)
        print("error\nfür", file=sys.stderr)
        print("parts")
        assert not path.exists()
        open_run_log(path, 0)
        print("\rbar 100%", end="", file=sys.stderr)
        print("\r        \r", end="", file=sys.stderr)
        command_line.say_from_signal_handler("\nSIGTERM: saving\n")
        print("last")
        assert sys.stdout.isatty() is False
    print("afterwards")
    command_line.say_from_signal_handler("as well\n")
    assert lines(path) == ["error", "für", "first of two parts", "SIGTERM: saving", "last"]
    assert path.read_text("utf-8").startswith("--- 2")
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
    rank0 = ["before 0", "error", "after 0"]
    assert lines(path) == [*rank0, "[rank 1] before 1", "[rank 1] error", "[rank 1] after 1", *rank0]
    assert path.read_text("utf-8").count("--- ") == 2


def test_the_log_keeps_a_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLog():  # noqa: PT012
        open_run_log(tmp_path / "run.log", 0)
        print(1 / 0)
    assert lines(tmp_path / "run.log")[0] == "Traceback (most recent call last):"
    assert lines(tmp_path / "run.log")[-1] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_log_that_cannot_be_written_ends_nothing(rank, tmp_path, capsys):
    for path in (tmp_path / "absent" / "run.log", Path("/dev/full")):
        with RunLog():
            open_run_log(path, rank)
            print("goes on")
    said = [f"{tmp_path}/absent/run.log cannot be written: No such file or directory: the training goes on without it"]
    assert capsys.readouterr().out.splitlines() == [*said[rank:], "goes on", "goes on"]
