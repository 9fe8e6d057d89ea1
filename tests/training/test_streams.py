"""Streams that end no command: readers that go, full disks, lacking letters, streams that are not there."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import fresh_python

from training import streams

ROOT = Path(streams.__file__).parents[1]
TALKER = """
import sys
sys.path.insert(0, sys.argv[1])
from training.streams import steady_streams
steady_streams()
for number in range(3000):
    print("line", number, "f\\u00fcr \\udcff", flush=number % 7 == 0)
    print("error", number, file=sys.stderr)
"""


def talk(shell: str = "", code: str = TALKER, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs the code in a shell that makes something of its streams."""
    command = ["bash", "-c", f'"$@" {shell}', "bash", sys.executable, *options, "-c", code, str(ROOT)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, env={**buffered, **environment}, capture_output=True, timeout=60)


@pytest.mark.parametrize("options", [[], ["-u"]])
@pytest.mark.parametrize(
    "shell", [">/dev/full", ">/dev/full 2>&1", "2>/dev/full", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>&1 <&-"]
)
def test_a_stream_that_takes_nothing_is_no_failure(shell, options):
    done = talk(shell, TALKER, *options)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr + done.stdout
    assert b"Exception" not in done.stderr + done.stdout


@pytest.mark.parametrize("both", ["", "2>&1"])
def test_a_reader_that_ends_is_no_failure(both):
    done = talk(f"{both} | head -n 2; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 2
    assert b"Error" not in done.stderr


@pytest.mark.parametrize("options", [[], ["-u"]])
def test_errors_are_said_at_once_and_all_else_as_python_itself_would(options):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from training.streams import steady_streams\n"
        "steady_streams(); print('error', file=sys.stderr); print('part', end=''); os.write(1, b' between ')"
    )
    said = talk("2>&1", code, *options).stdout.decode().split()
    assert said == (["error", "part", "between"] if options else ["error", "between", "part"])


def test_all_is_said_where_all_can_be_and_lacking_letters_by_their_numbers():
    for encoding, first in (("ascii", rb"line 0 f\xfcr \udcff"), ("utf-8", "line 0 für \\udcff".encode())):
        done = talk(PYTHONIOENCODING=encoding)
        assert done.returncode == 0
        assert [len(text.splitlines()) for text in (done.stdout, done.stderr)] == [3000, 3000]
        assert done.stdout.splitlines()[0] == first


def test_no_file_gets_the_number_of_a_stream_that_is_not_there(tmp_path):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from training.streams import steady_streams\n"
        f"steady_streams(); file = open({str(tmp_path / 'checkpoint')!r}, 'w'); os.write(2, b'a library warns')\n"
        "os.write(1, b'as well'); sys.exit(0 if file.fileno() > 2 else 1)"
    )
    assert talk("<&- >&- 2>&-", code).returncode == 0
    assert (tmp_path / "checkpoint").read_bytes() == b""


def test_a_terminal_that_hangs_up_is_no_failure():
    code = TALKER.replace("for number", "sys.stdin.readline()\nfor number")  # until the terminal is gone
    master, slave = os.openpty()
    command = [sys.executable, "-c", code, str(ROOT)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    os.close(master)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0


def test_a_pipe_that_does_not_wait_loses_nothing_while_its_reader_goes_on():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process = subprocess.Popen([sys.executable, "-c", TALKER * 4, str(ROOT)], stdout=writing, stderr=subprocess.DEVNULL)
    os.close(writing)
    with open(reading, "rb") as file:
        text = file.read()
    assert process.wait(60) == 0
    assert text.count(b"line") == 12000


def test_a_disk_that_has_room_again_gets_what_comes_then(tmp_path, monkeypatch):
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(sys, "__stdout__", os.fdopen(full, "w"))
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    streams.steady_streams()
    print("lost", flush=True)
    room = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(room, full)
    os.close(room)
    print("said", flush=True)
    assert (tmp_path / "log").read_text().endswith("said\n")


def test_streams_of_another_program_are_left_to_it(monkeypatch):
    theirs = io.StringIO()
    monkeypatch.setattr(sys, "stdout", theirs)
    monkeypatch.setattr(sys, "stderr", None)
    streams.steady_streams()
    assert sys.stdout is theirs
    print("into nowhere", file=sys.stderr)


def test_it_needs_no_pytorch():
    assert fresh_python("import sys, training.streams; print('torch' in sys.modules, 'utils' in sys.modules)") == [
        "False False"
    ]


COMMANDS = ["trainer", "evaluate", "predict", "tools/export", "tools/download_coco", "tools/make_sample"]


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory) -> dict[str, str]:
    """An environment that keeps what Python compiles for -OO: of all of PyTorch that takes longer than the starts."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("compiled")), "PYTHONSAFEPATH": "1"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_starts_without_streams_docstrings_and_an_unsafe_path(name, tmp_path, compiled_once):
    start = f'{sys.executable} -OO "{ROOT / name}.py" --help'
    done = [subprocess.run(["bash", "-c", f"{start} {shell}"], cwd=tmp_path, capture_output=True, env=compiled_once)
            for shell in ("", ">/dev/full", ">&- 2>&-")]  # fmt: skip
    assert [one.returncode for one in done] == [0, 0, 0], done
    assert done[0].stdout
    assert done[0].stderr == done[1].stderr == b""
