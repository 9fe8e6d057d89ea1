"""Everything that matters on ONE GPU, in eight minutes: a line of JSON a check, and none stops the rest. On Linux.

    python tools/bench/gpu.py                                    # CUDA_VISIBLE_DEVICES=1 before it: on another GPU
    python tools/bench/gpu.py --only step,compiled --minutes 5
    python tools/bench/gpu.py --device cpu --quick               # the command itself, tried where there is no GPU

First what is right or wrong, then figures. Each check is a process of its own with a time limit, because an error of
CUDA's spoils the process that meets it. Photos are drawn, in a temporary folder. Exit code 1 where a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, it is in tools/bench/ that Python looks

from tools.bench import gpu_checks, gpu_figures
from tools.bench.gpu_checks import Place, one_line
from training.settings import OneLineParser, UsageError
from training.streams import steady_streams


class Check(NamedTuple):
    work: Callable[[Place], dict]  # what it found; "ok" is whether that is as it should be
    seconds: float  # that it takes on a GPU, at most as a rule
    needs_cuda: bool = False


CHECKS = {
    "facts": Check(gpu_figures.facts, 5),
    "drawings": Check(gpu_checks.drawings, 10),
    "sample": Check(gpu_checks.sample, 50),
    "portable": Check(gpu_checks.portable, 10),
    "broken": Check(gpu_checks.broken, 25),
    "memory": Check(gpu_checks.memory, 25, needs_cuda=True),
    "resume": Check(gpu_checks.resume, 35),
    "two_ranks": Check(gpu_checks.two_ranks, 35),
    "waits": Check(gpu_figures.waits, 15, needs_cuda=True),
    "half": Check(gpu_figures.half, 20),
    "step": Check(gpu_figures.step, 50),
    "epoch": Check(gpu_figures.epoch, 35),
    "predict": Check(gpu_figures.predict_photos, 25),
    "loader": Check(gpu_figures.loader, 30),
    "compiled": Check(gpu_figures.compiled, 100, needs_cuda=True),
}
ALWAYS = ("facts", "drawings")  # the first of which others speak, the second of which others use
PATIENCE = 3  # times its seconds, after which a check is ended


# --- one check --------------------------------------------------------------------------------------------


def outcome(name: str, place: Place, left: float) -> dict:
    """A check's line, `left` seconds before the end."""
    check = CHECKS[name]
    if check.needs_cuda and not place.cuda:
        return {"check": name, "ok": None, "skipped": "it needs CUDA"}
    if left < check.seconds:
        reason = f"it takes up to {check.seconds:g} s, and {max(left, 0):.0f} s are left: --minutes, or --only {name}"
        return {"check": name, "ok": None, "skipped": reason}
    begin = time.monotonic()
    found = in_a_process(check.work, place, place.work / name, min(left, PATIENCE * check.seconds))
    return {"check": name, "ok": found.pop("ok", True), "took": round(time.monotonic() - begin, 1), **found}


def in_a_process(work: Callable[[Place], dict], place: Place, files: Path, limit: float) -> dict:
    """What the work found, or why it did not. It leaves files.json, and in files.log what it printed."""
    result, log = files.with_suffix(".json"), files.with_suffix(".log")
    process = multiprocessing.get_context("fork").Process(target=do, args=(work, place, result, log))
    process.start()  # of a parent that leaves CUDA alone, or no child could use it
    try:
        process.join(limit)
        late = process.is_alive()
    finally:
        end(process)
    if late:
        return {"ok": False, "error": f"it was not done after {limit:.0f} s", "last_line": last_line(log)}
    if not result.exists():
        return {"ok": False, "error": f"it ended with exit code {process.exitcode}", "last_line": last_line(log)}
    return json.loads(result.read_text())


def do(work: Callable[[Place], dict], place: Place, result: Path, log: Path) -> None:
    """The child's part. It ends with all that it has started, loader workers too."""
    os.setsid()
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - for as long as it lives
    if place.quick:
        torch.set_num_threads(1)  # more would wait for one another on a busy machine
    try:
        found = work(place)
    except BaseException as error:  # SystemExit of the trainer as well: a check never ends so
        traceback.print_exc()
        found = {"ok": False, "error": one_line(error)}
    result.write_text(json.dumps(found, default=str))
    os.killpg(0, signal.SIGKILL)


def end(process: multiprocessing.Process) -> None:
    """With all that it has started, where it still lives."""
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join()


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


# --- all of them ------------------------------------------------------------------------------------------


def check_all(names: list[str], place: Place, seconds: float) -> list[dict]:
    """Prints a line a check as soon as it is done, and one that sums up."""
    begin, lines = time.monotonic(), []
    for name in names:
        lines.append(outcome(name, place, seconds - (time.monotonic() - begin)))
        print(json.dumps(lines[-1]), flush=True)
    failed = [line["check"] for line in lines if line["ok"] is False]
    skipped = [line["check"] for line in lines if "skipped" in line]
    print(json.dumps({"check": "all", "ok": not failed, "checks": len(lines), "failed": failed, "skipped": skipped,
                      "took": round(time.monotonic() - begin, 1)}), flush=True)  # fmt: skip
    return lines


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("gpu.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="the first visible GPU, or none (%(default)s)")
    add("--quick", action="store_true", help="tiny sizes: they try the command, and measure nothing")
    add("--minutes", type=float, default=8.0, help="after which what is left is skipped (%(default)s)")
    add("--only", default="", help=f"of {','.join(CHECKS)} (all)")
    options = parser.parse_args(argv)
    options.names = [*dict.fromkeys([*ALWAYS, *options.only.split(",")])] if options.only else [*CHECKS]
    if unknown := [name for name in options.names if name not in CHECKS]:
        raise UsageError(f"there is no check {unknown[0]}: there are {', '.join(CHECKS)}")
    if not 0 < options.minutes <= 1440:
        raise UsageError(f"--minutes {options.minutes:g} is out of range: above 0, up to 1440")
    return options


def run_command(argv: list[str]) -> int:
    """The whole program. Returns its exit code: 0, 1 where a check failed, 2 for a user's mistake, 130 after Ctrl-C."""
    steady_streams()
    try:
        options = parse(argv[1:])
        with tempfile.TemporaryDirectory(prefix="gpu_", ignore_cleanup_errors=True) as work:
            place = Place(options.device == "cuda", options.quick, Path(work))
            lines = check_all(options.names, place, 60 * options.minutes)
    except UsageError as error:
        print(f"gpu.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 1 if any(line["ok"] is False for line in lines) else 0


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
