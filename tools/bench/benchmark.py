"""Measures Silueta beside what people use today, both in one run on this machine, and prints tables of ratios.

    python tools/bench/benchmark.py                                              # everything, hours
    python tools/bench/benchmark.py sample loader --data-root data/coco --split val2017 --rounds 3
    python tools/bench/benchmark.py predict edges --checkpoint checkpoints/best_model.pth
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, it is in tools/bench/ that Python looks

from models import read_weights
from tools.bench import data, edges, measuring, predict, start, step
from training.settings import OneLineParser, UsageError, answer

# Each takes the options, measures, and returns its tables as Markdown.
SECTIONS = {
    "sample": data.sample,
    "loader": data.loader,
    "predict": predict.photos,
    "edges": edges.edges,
    "start": start.start,
    "step": step.step,
    "waiting": step.waiting,
    "processes": step.processes,
    "growth": step.growth,
    "accuracy": step.accuracy,
}
ONLY_WHEN_NAMED = {"accuracy"}  # takes hours


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("benchmark.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (all but accuracy)")
    parser.add_argument("--data-root", default="data/coco", help="photos in COCO's layout (%(default)s)")
    parser.add_argument("--split", default="val2017", help="the photo folder (%(default)s)")
    parser.add_argument("--checkpoint", default="checkpoints/best_model.pth", help="a trained model (%(default)s)")
    parser.add_argument("--encoder-weights", default="", help="for accuracy: a file of mobilenet_v2's weights")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds of each way (%(default)s)")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        raise UsageError(f"there is no section {unknown[0]}: there are {', '.join(SECTIONS)}")
    if options.rounds < 1:
        raise UsageError(f"--rounds {options.rounds} is out of range: at least 1")
    if options.encoder_weights:
        read_weights(options.encoder_weights)  # now: the section that needs them may be the last of many
    return options


def main(options: argparse.Namespace) -> None:
    print(measuring.machine(), flush=True)
    for name in options.sections or [name for name in SECTIONS if name not in ONLY_WHEN_NAMED]:
        print(f"\n{SECTIONS[name](options)}", flush=True)


def run_command(argv: list[str]) -> int:
    """The whole program. Returns its exit code: 0, or 2 for a user's mistake."""
    return answer("benchmark.py", lambda: main(parse(argv[1:])))


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
