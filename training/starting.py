"""Trained weights that a new run starts from: a head start of its own, and no resume."""

from __future__ import annotations

from pathlib import Path

from models import UNetAutoencoder
from utils import CheckpointError, read_checkpoint, weights_of

OF_THE_MODEL = ("encoder", "use_attention", "image_size")


def settings_of(path: Path) -> dict:
    """The settings that the weights in a checkpoint were trained with and need again.

    None for a file that is not there: a run that is resumed needs these as flags then, and another one says so later.

    Raises:
        CheckpointError: it cannot be used.
    """
    if not path.exists():
        return {}
    config = read_checkpoint(path)["config"]
    return {name: config[name] for name in OF_THE_MODEL if name in config}


def load_weights(model: UNetAutoencoder, path: Path) -> None:
    """Takes over the weights of a checkpoint, in whatever precision they were saved.

    Raises:
        CheckpointError: it cannot be used, or its weights are another model's.
    """
    content = read_checkpoint(path)
    try:
        model.load_state_dict(weights_of(content))
    except (RuntimeError, TypeError, AttributeError):  # what PyTorch says lists every tensor
        config = content["config"]
        gates = "with" if config.get("use_attention", True) else "without"
        raise CheckpointError(f"the weights in {path} are those of {config.get('encoder')} {gates} attention gates: "
                              "another --encoder or --use-attention does not fit them") from None  # fmt: skip
