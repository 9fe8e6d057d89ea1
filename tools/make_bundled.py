"""Makes the bundled model of a trained one: half as large, without anything of the machine that trained it.

    python tools/make_bundled.py checkpoints/best_model.pth --image-size 384
    python tools/make_bundled.py checkpoints/mine/last.pth --blend bundled 0.5 --output checkpoints/mine/mixed.pth
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks for imports in tools/

from cutting.cutter import BUNDLED, check_size, resolve_model
from models import model_weights, read_checkpoint
from training.checkpoints import save
from training.command_line import OneLineParser, run_cli
from training.resuming import MODEL_FIELDS
from utils import UserError

MAX_BYTES = 8_000_000  # of its weights: every clone of the repository holds it


def make_bundled(content: dict, image_size: int | None, blend: tuple[dict, float] | None = None) -> dict:
    """Returns a checkpoint's epoch, metrics, the settings that its weights need, and these in float16.

    `blend` is another checkpoint and its part of the weights, from 0 to 1.
    """
    if content["config"].get("sample"):
        raise UserError("this model was trained on drawings (trainer.py --sample): it does not work on photos")
    weights = model_weights(content) if blend is None else blended(model_weights(content), *blend)
    model = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    if too_large := [name for name, value in model.items() if not torch.isfinite(value).all()]:
        raise UserError(f"{too_large[0]} has values beyond the range of float16")
    config = {name: content["config"][name] for name in MODEL_FIELDS}
    config["image_size"] = image_size or config["image_size"]
    metrics = content.get("metrics") if blend is None else None  # of these weights, not of others
    return {"epoch": content["epoch"], "config": config, "model": model, "metrics": metrics}


def blended(weights: dict[str, Tensor], content: dict, part: float) -> dict[str, Tensor]:
    """Returns a mean of two models' weights, of which one was trained further from the other.

    It is often better than either, on photos unlike those of the training above all (Wortsman et al. 2022, "Robust
    fine-tuning of zero-shot models").
    """
    other = model_weights(content)
    if not 0 < part < 1 or {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in other.items()}:
        raise UserError("--blend takes a model of the same architecture and a part of the weights between 0 and 1")
    return {name: torch.lerp(value.float(), other[name].float(), part) if value.is_floating_point() else value
            for name, value in weights.items()}  # fmt: skip


def part_of(text: str) -> float:
    """Returns a number that was given as text; 0, which `blended` refuses, for any other text."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def main(options: argparse.Namespace) -> None:
    """Writes the bundled model, unless it is too large."""
    check_size(options.image_size)
    if options.blend and options.output == BUNDLED:
        raise UserError("--blend needs --output FILE, another file than the bundled model")
    blend = (read_checkpoint(resolve_model(options.blend[0])), part_of(options.blend[1])) if options.blend else None
    bundled = make_bundled(read_checkpoint(options.checkpoint), options.image_size, blend)
    size = sum(value.nbytes for value in bundled["model"].values())
    if size > MAX_BYTES:
        raise UserError(f"its weights take {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}: use a smaller encoder")
    save(bundled, options.output)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")


def run_command(argv: list[str]) -> int:
    """Runs the whole program and returns its exit code: 0, or 2 for a user's mistake."""
    parser = OneLineParser("make_bundled.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="the trained model")
    parser.add_argument("--image-size", type=int, help="side of the square in pixels (that of the training)")
    parser.add_argument("--blend", nargs=2, metavar=("FILE", "PART"),
                        help="mix in a part, 0 to 1, of the weights of another FILE, or of bundled")  # fmt: skip
    parser.add_argument("--output", type=Path, default=BUNDLED, help="the file to make (%(default)s)")
    return run_cli("make_bundled.py", lambda: main(parser.parse_args(argv[1:])))


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
