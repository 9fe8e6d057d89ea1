"""Writes a trained checkpoint as ONNX, checked against PyTorch before the file gets its name.

    python tools/export.py checkpoints/best_model.pth                               # model.onnx, float32
    python tools/export.py checkpoints/best_model.pth --data-root data/coco         # checked on photos, not on noise
    python tools/export.py checkpoints/best_model.pth --data-root data/coco --precision int8 --output small.onnx

docs/export.md shows how the file is used; batch, height and width are any, the latter from 32 on. --precision float16
halves it, for GPUs (a CPU computes it in float32); int8 makes it four times smaller, for CPUs. Both lose some IoU,
which --data-root measures.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks for imports in tools/
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime reads it when it is imported

from cutting.cutter import load, resolve_model
from datasets import COCOPersonDataset
from models import UNetAutoencoder, read_checkpoint
from training.batches import to_model_input
from training.command_line import OneLineParser, run_cli
from training.resuming import MODEL_FIELDS
from utils import SegmentationMetrics, UserError, atomic_write, counted, explain_write_errors

if TYPE_CHECKING:
    import onnx
    import onnxruntime

OPSET = 18  # the exporter's own: not every version of it can convert to a higher one
MAX_DIFFERENCE = 1e-4  # between float32 in ONNX and PyTorch, in any value
MAX_MEAN_DIFFERENCE = 0.02  # between a reduced precision and PyTorch, in alpha's mean: single pixels may flip
MAX_IOU_LOSS = 0.02  # of a reduced precision, in the mean over photos
CHECKED_PHOTOS = 8
CALIBRATION_PHOTOS = 48
INT8_OPERATORS = ["Conv", "Relu", "Clip"]  # a convolution's range is that of the ReLU or Clip behind it
# Convolutions that stay float32. The first ones see few channels of the widest range: in int8 they alone cost
# mobilenet_v2 0.01 of IoU, for no time. The last one is the head, whose logits are the result.
FLOAT_AT_START, FLOAT_AT_END = 3, 1


# --- writing ----------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """`UNetAutoencoder.predict` as a forward, which is what the exporter takes."""

    def __init__(self, model: UNetAutoencoder):
        super().__init__()
        self.model = model.to(memory_format=torch.contiguous_format)

    def forward(self, images: Tensor) -> Tensor:
        return self.model.predict(images)


def to_onnx(model: UNetAutoencoder) -> onnx.ModelProto:
    """Returns the model in float32, with BatchNorm folded into convolutions; batch, height and width are dynamic."""
    images = torch.rand(2, 3, 75, 101)  # an odd size, so that the padding to multiples of 32 becomes part of the graph
    axes = {"images": {0: "batch", 2: "height", 3: "width"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own internals
        for name in ("torch.onnx", "torch.fx.experimental.symbolic_shapes"):  # PyTorch 2.9 logs them as well
            logging.getLogger(name).setLevel(logging.ERROR)
        program: Any = torch.onnx.export(
            Predictor(model).eval(), (images,), dynamo=True, dynamic_shapes=axes, opset_version=OPSET,
            input_names=["images"], output_names=["rgba"], verbose=False,
        )  # fmt: skip
    return program.model_proto


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model with weights and activations in float16, input and output still in float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the float32 number")  # weights too small for float16 become 0
        return convert_float_to_float16(copy.deepcopy(model), keep_io_types=True)


def to_int8(model: onnx.ModelProto, photos: Iterator[Tensor]) -> onnx.ModelProto:
    """Returns the model with weights in int8 by channel and activations in uint8, of the ranges they have on photos."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(({"images": images.numpy()} for images in photos), None)

    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    in_float = convolutions[:FLOAT_AT_START] + convolutions[-FLOAT_AT_END:]
    logging.getLogger().addFilter(lambda record: "pre-processing" not in record.getMessage())  # it is done already
    with tempfile.TemporaryDirectory() as folder:
        source, quantised = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        onnx.save(model, source)
        quantize_static(
            source, quantised, Reader(), per_channel=True, op_types_to_quantize=INT8_OPERATORS,
            nodes_to_exclude=in_float, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        return onnx.load(quantised)


def add_metadata(model: onnx.ModelProto, checkpoint: dict, precision: str) -> None:
    """Adds what a consumer must know to the file's metadata, in place."""
    import onnx

    metadata = {name: checkpoint["config"][name] for name in MODEL_FIELDS}
    metadata |= {"epoch": checkpoint["epoch"], "opset": OPSET, "precision": precision}
    metadata["silueta"] = "UNetAutoencoder.predict: RGB in [0, 1] to R, G, B and the probability of a person"
    onnx.helper.set_model_props(model, {name: str(value) for name, value in metadata.items()})


# --- checking ---------------------------------------------------------------------------------------------


def open_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns of every shape that is not fixed
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def model_inputs(dataset: COCOPersonDataset, count: int) -> Iterator[Tensor]:
    """Yields the model's input, (1, 3, S, S), for a few photos at even distances."""
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=int):
        yield to_model_input(dataset[index][None])[0]


@torch.inference_mode()
def check_export(exported: onnx.ModelProto, precision: str, model: UNetAutoencoder, photos: Tensor) -> None:
    """Prints how far the exported model is from PyTorch; raises UserError if it is too far, or has a NaN.

    It is run on `photos`, (N, 3, S, S), in several batch sizes, and on some of them at other sizes down to 32.
    """
    session, differences, size = open_session(exported), [], photos.shape[-1]
    sizes = ((size + 1, size + 45), (size, size + 128), (33, 47), (32, 32))
    resized = [functional.interpolate(photos[:2], height_width, mode="bilinear") for height_width in sizes]
    for images in (*photos.split(3), *resized):
        (rgba,) = session.run(None, {"images": images.numpy()})
        difference = np.abs(model.predict(images).numpy() - rgba)
        differences.append((difference.max(), difference[:, 3].mean()))
    largest, mean = np.max(differences, axis=0)
    print(f"{precision} against PyTorch: largest difference {largest:.2g}, alpha's mean {mean:.2g}, "
          f"in {len(differences)} batches of several sizes", flush=True)  # fmt: skip
    value, limit = (largest, MAX_DIFFERENCE) if precision == "float32" else (mean, MAX_MEAN_DIFFERENCE)
    if not value <= limit:
        raise UserError(f"{precision} differs from PyTorch by {value:.2g}, more than {limit}: nothing was written")


def check_loss(exported: onnx.ModelProto, reduced: onnx.ModelProto, dataset: COCOPersonDataset, precision: str) -> None:
    """Prints the mean IoU that a reduced precision loses over a dataset; raises UserError if it is too much."""
    before, after = mean_iou(exported, dataset), mean_iou(reduced, dataset)
    print(f"mean IoU on {counted(len(dataset), 'photo')}: float32 {before:.4f}, {precision} {after:.4f}, "
          f"loss {before - after:+.4f}", flush=True)  # fmt: skip
    if before - after > MAX_IOU_LOSS:
        raise UserError(f"{precision} loses {before - after:.3f} of IoU, more than {MAX_IOU_LOSS}: nothing was written")


def mean_iou(model: onnx.ModelProto, dataset: COCOPersonDataset) -> float:
    session, metrics = open_session(model), SegmentationMetrics()
    for index, batch in enumerate(DataLoader(dataset)):
        (images, target), own = to_model_input(batch), dataset.own_pixels([index])
        (rgba,) = session.run(None, {"images": images.numpy()})
        metrics.update(torch.from_numpy(rgba[:, 3]) * own, target[:, 3] * own)
    return metrics.compute()["iou"]


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the options, or raises a UserError."""
    parser = OneLineParser("export.py", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("checkpoint", help="the trained model, e.g. checkpoints/best_model.pth, or bundled")
    add("--output", type=Path, default=Path("model.onnx"), help="the file to write (%(default)s)")
    add("--precision", choices=["float32", "float16", "int8"], default="float32", help="of the weights (%(default)s)")
    add("--data-root", help="photos with masks as for trainer.py, to check on instead of noise")
    add("--split", default="val2017", help="photos to measure on (%(default)s)")
    add("--calibration-split", default="train2017", help="photos that tell int8 its ranges (%(default)s)")
    options = parser.parse_args(argv)
    if options.precision == "int8" and not options.data_root:
        raise UserError("--precision int8 needs --data-root: its ranges and its loss are measured on photos")
    if options.output.is_dir() or not options.output.parent.is_dir():  # early: the export takes its time
        raise UserError(f"--output {options.output} is a folder, or in one that does not exist")
    return options


def main(options: argparse.Namespace) -> None:
    """Exports, checks and writes the model."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise UserError(f"{', '.join(missing)} must be installed first: pip install -r requirements-dev.txt")
    cutter, checkpoint = load(options.checkpoint, "cpu"), read_checkpoint(resolve_model(options.checkpoint))
    model, size = cutter.model, cutter.image_size
    open_split = functools.partial(COCOPersonDataset, options.data_root, image_size=size, bars=cutter.bars)
    dataset = open_split(options.split) if options.data_root else None
    if options.precision == "int8":
        calibration = open_split(options.calibration_split)
    noise = torch.rand(CHECKED_PHOTOS, 3, 6, 9, generator=torch.Generator().manual_seed(0))
    photos = functional.interpolate(noise, (size, size), mode="bilinear")
    if dataset is not None:
        photos = torch.cat([*model_inputs(dataset, CHECKED_PHOTOS)])
    exported = to_onnx(model)
    check_export(exported, "float32", model, photos)
    if options.precision != "float32":
        if options.precision == "float16":
            reduced = to_float16(exported)
        else:
            reduced = to_int8(exported, model_inputs(calibration, CALIBRATION_PHOTOS))
        check_export(reduced, options.precision, model, photos)
        if dataset is not None:
            check_loss(exported, reduced, dataset, options.precision)
        exported = reduced
    add_metadata(exported, checkpoint, options.precision)
    content = exported.SerializeToString()
    with explain_write_errors(f"--output {options.output}"), atomic_write(options.output) as file:
        file.write(content)
    print(f"{options.output}: {len(content) / 2**20:.1f} MB, opset {OPSET}", flush=True)


def run_command(argv: list[str]) -> int:
    """Runs the whole program and returns its exit code: 0, or 2 for a user's mistake."""
    return run_cli("export.py", lambda: main(parse(argv[1:])), interrupted="stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
