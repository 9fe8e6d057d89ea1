"""Kills trainings at random moments until they are through, and compares them with one that was left in peace.

    python tools/torture.py --kills 100
"""

from __future__ import annotations

import argparse
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from checkpointing import load, newest_usable  # noqa: E402

SETTINGS = (
    *("--sample", "--image-size=32", "--batch-size=8", "--num-epochs=2"),
    *("--num-workers=1", "--checkpoint-minutes=0.005"),
)
LONGEST = 12.0  # seconds until a kill; Python and torch take the first few


def start(folder: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "trainer.py", *SETTINGS, f"--checkpoint-dir={folder}", "--resume"]
    with open(out, "w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def place(folder: Path) -> tuple[int, int] | None:
    """The epoch and step of the newest checkpoint."""
    found = newest_usable(folder)
    return (found[1]["epoch"], found[1]["step"]) if found else None


def resumed_at(out: str) -> tuple[int, int] | None:
    found = re.search(r"going on from .*?, after epoch (\d+)(?:, step (\d+))?", out)
    return (int(found[1]), int(found[2] or 0)) if found else None


def same_bits(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights."""
    weights = [load(folder / "last.pth")["model"] for folder in (one, other)]
    return all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def kill_once(folder: Path, out: Path, seconds: float, tally: dict[str, list]) -> bool:
    """Runs for so long. Returns whether the run was killed, and not through before."""
    newest, process = place(folder), start(folder, out)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    text = out.read_text()
    begun = "train loss" in text or process.returncode == 0
    if begun:
        tally["right place"].append(resumed_at(text) == newest)
    if process.returncode == -9:
        tally["while writing"].append(any(folder.glob(".*.part")))
        return True
    if process.returncode:
        tally["failures"].append(text)
    return False


def torture(kills: int, seed: int) -> bool:
    """Prints the table. Returns whether all went well."""
    random.seed(seed)
    names = ("right place", "while writing", "failures", "same bits", "kills a run")
    tally: dict[str, list] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as work:
        straight, out = Path(work, "straight"), Path(work, "out")
        start(straight, out).wait()
        while len(tally["while writing"]) < kills and not tally["failures"]:
            folder, before = Path(work, f"run{time.time_ns()}"), len(tally["while writing"])
            while len(tally["while writing"]) < kills and kill_once(folder, out, random.uniform(0, LONGEST), tally):
                pass
            if kill_once(folder, out, 600, tally) or not tally["failures"]:
                tally["same bits"].append(same_bits(folder, straight))
                tally["kills a run"].append(len(tally["while writing"]) - before)
    report(tally)
    return not tally["failures"] and all(tally["right place"]) and all(tally["same bits"])


def report(tally: dict[str, list]) -> None:
    right, bits = tally["right place"], tally["same bits"]
    print(f"kills                       {len(tally['while writing'])}, {sum(tally['while writing'])} within a write")
    print(f"starts at the newest place  {sum(right)} of {len(right)}")
    print(f"runs with the same bits     {sum(bits)} of {len(bits)}")
    if tally["kills a run"]:
        print(f"kills a run                 {statistics.median(tally['kills a run']):g} (median)")
    print(*tally["failures"], sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(not torture(arguments.kills, arguments.seed))
