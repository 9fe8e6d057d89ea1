"""Measures Silueta beside what people use today, both in one run on this machine, and prints tables of ratios.

python tools/bench/benchmark.py predict --data-root data/coco --checkpoint checkpoints/best_model.pth
python tools/bench/benchmark.py --data-root data/coco            # everything
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, it is in tools/ that Python looks

from tools.bench import data, edges, measuring, predict, start, step
from utils import UserError

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
    parser = argparse.ArgumentParser("benchmark.py", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (all)")
    parser.add_argument("--data-root", default="data/coco", help="photos in COCO's layout (%(default)s)")
    parser.add_argument("--split", default="val2017", help="the photo folder (%(default)s)")
    parser.add_argument("--checkpoint", default="checkpoints/best_model.pth", help="a trained model (%(default)s)")
    parser.add_argument("--encoder-weights", default="", help="for accuracy: a file of mobilenet_v2's weights")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds of each way (%(default)s)")
    options = parser.parse_args(argv)
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"there is no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    return options


def main(options: argparse.Namespace) -> None:
    print(measuring.machine(), flush=True)
    for name in options.sections or [name for name in SECTIONS if name not in ONLY_WHEN_NAMED]:
        print(f"\n{SECTIONS[name](options)}", flush=True)


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except (UserError, FileNotFoundError) as error:
        print(f"benchmark.py: error: {error} (see --data-root, --split and --checkpoint)", file=sys.stderr)
        sys.exit(2)
