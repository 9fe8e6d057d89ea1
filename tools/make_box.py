"""Makes the model that comes with the program of a trained one: half as large, with nothing of the machine in it.

    python tools/make_box.py checkpoints/best_model.pth --image-size 384
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it is in tools/ that Python looks

from cutting.cutter import BOX, check_size
from training.checkpoints import save
from training.settings import OneLineParser, answer
from training.starting import OF_THE_MODEL
from utils import UserError, read_checkpoint, weights_of

LARGEST = 8_000_000  # bytes: it is in every clone


def halved(value: Tensor) -> Tensor:
    """float16, which `predict.load` turns back; whole numbers as they are."""
    return value.half() if value.is_floating_point() else value


def make_box(content: dict, image_size: int | None = None) -> dict:
    """What a checkpoint holds, as the model that comes with the program: weights, their settings, what they are worth.

    Args:
        image_size: pixels of the square that photos are fitted into; None is that of the training.

    Raises:
        UserError: a weight is too large for float16, or the model was trained on drawings.
    """
    if content["config"].get("sample"):
        raise UserError("this model was trained on drawings (trainer.py --sample): it does not work on photos")
    model = {name: halved(value) for name, value in weights_of(content).items()}
    if too_large := [name for name, value in model.items() if not torch.isfinite(value).all()]:
        raise UserError(f"{too_large[0]} holds values that float16 has not")
    config = {name: content["config"][name] for name in OF_THE_MODEL}
    config["image_size"] = image_size or config["image_size"]
    return {"epoch": content["epoch"], "config": config, "model": model, "metrics": content.get("metrics")}


def main(options: argparse.Namespace) -> None:
    check_size(options.image_size)
    box = make_box(read_checkpoint(options.checkpoint), options.image_size)
    size = sum(value.nbytes for value in box["model"].values())
    if size > LARGEST:
        raise UserError(f"its weights take {size / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f}: take a smaller encoder")
    save(box, options.output)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")


def run_command(argv: list[str]) -> int:
    """The whole program. Returns its exit code: 0, or 2 for a user's mistake."""
    parser = OneLineParser("make_box.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="the trained model")
    parser.add_argument("--image-size", "--image_size", type=int, help="pixels of the square (that of the training)")
    parser.add_argument("--output", type=Path, default=BOX, help="the file to make (%(default)s)")
    return answer("make_box.py", lambda: main(parser.parse_args(argv[1:])))


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
