"""The start of a training at COCO's full size: the person index built, opened and used, beside pycocotools' COCO."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.bench.full_size import ANNOTATIONS, PHOTOS, make_split
from tools.bench.measuring import Way, table

ROUNDS = 3  # at most: a round takes half a minute
WORKERS, INDICES = 4, 5000
SPLIT = "train2017"

# Each is run by a Python of its own, so that its memory is its own, and prints what it found as JSON. The imports are
# not counted: a training has made them anyway.
THEIRS = """
from pycocotools.coco import COCO
start()
COCO(f"{root}/annotations/instances_{split}.json")
report()
"""
BUILD = """
import shutil
from loading.index import open_index
shutil.rmtree(f"{root}/.silueta", ignore_errors=True)
start()
index = open_index(root, split)
report(photos=len(index), megabytes=index.path.stat().st_size / 1e6)
"""
OPEN = """
from loading.index import open_index
start()
open_index(root, split)
report()
"""
PASS = """
import warnings
from datasets import COCOPersonDataset, make_loader

def private(pid):
    with open(f"/proc/{pid}/smaps_rollup") as file:
        fields = dict(line.split(":") for line in file if ":" in line and "kB" in line)
    return {name: int(fields[name].split()[0]) / 1e3 for name in ("Pss", "Private_Clean", "Private_Dirty")}

warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores are meant
dataset = COCOPersonDataset(root, split, image_size=64, augment=True)
loader = make_loader(dataset, batch_size=25, num_workers=workers, training=True)
batches, last = iter(loader), min(workers + indices // 25, len(loader))
pids = [worker.pid for worker in batches._workers]
start()
for number, batch in enumerate(batches, 1):
    if number == workers:  # every worker has made its first batch
        before = [private(pid) for pid in pids]
    if number == last:
        break
after = [private(pid) for pid in pids]
grown = [{name: b[name] - a[name] for name in a} for a, b in zip(before, after)]
report(pss=max(g["Pss"] for g in grown), private=max(g["Private_Clean"] + g["Private_Dirty"] for g in grown))
"""
FRAME = """
import contextlib, io, json, sys, time
sys.path.insert(0, {project!r})
root, split, workers, indices = {root!r}, {split!r}, {workers!r}, {indices!r}
begun = None

def start():
    global begun
    begun = time.perf_counter()

def report(**found):
    print(json.dumps(dict(found, seconds=time.perf_counter() - begun)))

{task}
"""


def start(options: argparse.Namespace) -> str:
    """An annotation file of train2017's size, made for the purpose in the folder for temporary files (0.6 GB)."""
    with tempfile.TemporaryDirectory() as folder:
        make_split(Path(folder), SPLIT, PHOTOS, ANNOTATIONS)
        theirs, build, again = Way("pycocotools' COCO()", int), Way("first start", int), Way("later starts", int)
        peaks: dict[str, float] = {}
        for _ in range(min(options.rounds, ROUNDS)):  # in turn, as measuring.alternate does
            for way, task in ((theirs, THEIRS), (build, BUILD), (again, OPEN)):
                found, peak = run(task, folder)
                way.seconds.append(found["seconds"])
                peaks[way.name] = max(peak, peaks.get(way.name, 0))
        used, _ = run(PASS, folder)
    title = f"Start with {PHOTOS:,} photos and {ANNOTATIONS:,} annotations"
    lines = [table(title, "start", theirs, [theirs, build, again])]
    lines += [f"Peak memory of {name}, with Python and its imports: {peak:.2f} GB." for name, peak in peaks.items()]
    lines.append(f"Later starts: {statistics.median(again.seconds):.3f} s, the check of every byte included.")
    lines.append(
        f"Each of {WORKERS} loader workers grows over {INDICES:,} photos by at most {used['pss']:.1f} MB of PSS, "
        f"{used['private']:.1f} MB of it private."
    )
    return "\n".join(lines)


def run(task: str, root: str) -> tuple[dict, float]:
    """Runs a task, and returns what it reports and the largest memory in GB, its processes together, sampled."""
    project = str(Path(__file__).resolve().parents[2])
    code = FRAME.format(project=project, root=root, split=SPLIT, workers=WORKERS, indices=INDICES, task=task)
    process, peak = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True), 0
    while process.poll() is None:
        peak = max(peak, _resident(process.pid))
        time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"a measurement failed with exit code {process.returncode}")
    return json.loads(process.stdout.read().splitlines()[-1]), peak / 1e9


def _resident(pid: int, parent: bytes = b"") -> int:
    """Bytes of RSS of a process and those that it started; shared pages count once for each."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        fields = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")
        started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0
    if command == parent or len(fields) == 1:  # not yet a program of its own, its memory is its parent's; or ended
        return 0
    return int(fields[1].split()[0]) * 1024 + sum(_resident(int(child), command) for child in started)
