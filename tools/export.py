"""Writes a trained checkpoint as ONNX, checked against PyTorch before the file takes its place.

    python tools/export.py checkpoints/best_model.pth                               # model.onnx, float32
    python tools/export.py checkpoints/best_model.pth --check holidays              # checked on photos of yours
    python tools/export.py checkpoints/best_model.pth --data-root data/coco --precision int8 --output small.onnx

Input `images`, float32 (N, 3, H, W): RGB in [0, 1]. Output `rgba`, float32 (N, 4, H, W): R, G, B and the probability of
a person, in [0, 1]. Normalisation, padding and sigmoid are inside; N is any, H and W are any from 32 on, though
photos are meant to come letterboxed into squares of the metadata's `image_size`.

--precision float16 halves the file, for GPUs (a CPU computes it in float32); int8 quarters it, for CPUs. Both
are worth less than float32 to a degree that --data-root measures.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it is in tools/ that Python looks
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before onnxruntime's import: it would note events and send them

from cutting.cutter import Cutter, find_model, load
from cutting.jobs import photos_in
from cutting.photos import open_photo
from datasets import COCOPersonDataset
from loading.letterbox import letterbox, resize
from models import UNetAutoencoder
from training.settings import OneLineParser
from training.streams import steady_streams
from utils import SegmentationMetrics, UserError, atomic_write, counted, read_checkpoint

if TYPE_CHECKING:
    import onnx
    import onnxruntime

PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # of requirements-dev.txt; imported where they are needed
PRECISIONS = ("float32", "float16", "int8")
OPSET = 18  # of the exporter itself: a higher one is converted to, which not every version of it could
TOLERANCE = 1e-4  # of float32 in ONNX against PyTorch: the largest difference of a value in [0, 1]
MEAN_TOLERANCE = 0.02  # of a reduced precision, in alpha's mean: single pixels at an edge may flip
LARGEST_LOSS = 0.02  # of mean IoU by a reduced precision
CHECKED_PHOTOS = 8
CALIBRATION_PHOTOS = 48
# Quantised with their activations: a convolution's range is that of the ReLU or Clip behind it, so these belong along.
INT8_OPERATORS = ["Conv", "Relu", "Clip"]
# The first convolutions see few channels of the widest range: in int8 they alone cost mobilenet_v2 0.01 of IoU, for
# no time. The last one is the head, whose logits are the result.
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
    """The model in float32, with BatchNorm folded into its convolutions; batch, height and width are dynamic."""
    # An odd size, so that the padding to multiples of 32 becomes part of the graph.
    images = torch.rand(2, 3, 75, 101)
    dynamic = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own internals
        program = torch.onnx.export(
            Predictor(model).eval(), (images,), dynamo=True, dynamic_shapes={"images": dynamic}, opset_version=OPSET,
            input_names=["images"], output_names=["rgba"], verbose=False,
        )  # fmt: skip
    return name_axes(program.model_proto)


def name_axes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Calls the dynamic axes batch, height and width, which the exporter numbers; in place."""
    given = [axis.dim_param for axis in model.graph.input[0].type.tensor_type.shape.dim]
    names = {old: new for old, new in zip(given, ("batch", "", "height", "width"), strict=True) if new}
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in names:
                axis.dim_param = names[axis.dim_param]
    del model.graph.value_info[:]  # they speak of the old names; every consumer infers them anew
    return model


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and activations in float16, input and output still in float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the float32 number")  # weights too small for float16 become 0
        return convert_float_to_float16(copy.deepcopy(model), keep_io_types=True)


def to_int8(model: onnx.ModelProto, images: Iterator[np.ndarray]) -> onnx.ModelProto:
    """Static quantisation (QDQ): weights in int8 a channel, activations in uint8 by their ranges on the images.

    These are float32 (N, 3, H, W) in [0, 1]: better genuine photos than noise.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(({"images": batch} for batch in images), None)

    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    in_float = convolutions[:FLOAT_AT_START] + convolutions[-FLOAT_AT_END:]
    logging.getLogger().addFilter(lambda record: "pre-processing" not in record.getMessage())  # is done already
    with tempfile.TemporaryDirectory() as folder:
        given, quantised = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        onnx.save(model, given)
        quantize_static(
            given, quantised, Reader(), per_channel=True, op_types_to_quantize=INT8_OPERATORS,
            nodes_to_exclude=in_float, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        return onnx.load(quantised)


def add_facts(model: onnx.ModelProto, content: dict, precision: str) -> None:
    """Adds what a consumer must know to the file's metadata, in place. `content` is the checkpoint."""
    import onnx

    config = content["config"]
    model.producer_name = "silueta"
    facts = {
        "silueta": "UNetAutoencoder.predict: RGB in [0, 1] to R, G, B and the probability of a person",
        "image_size": config["image_size"],
        "sizes": "any batch, height and width from 32 on; trained on letterboxed squares of image_size",
        "encoder": config["encoder"],
        "use_attention": config["use_attention"],
        "epoch": content["epoch"],
        "opset": OPSET,
        "precision": precision,
    }
    onnx.helper.set_model_props(model, {name: str(value) for name, value in facts.items()})


# --- checking ---------------------------------------------------------------------------------------------


def open_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns of every shape that is not fixed
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def check_batches(photos: list[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Photos as float32 (N, 3, H, W) in several sizes and batches: the square that the model was trained on
    and sizes that are no multiples of 32, down to the smallest that the model takes."""
    squares = [letterbox(photo, size)[0] for photo in photos]
    yield from (to_batch(squares[first : first + 3]) for first in range(0, len(squares), 3))
    for width, height in ((size + 45, size + 1), (47, 33), (32, 32)):
        yield to_batch([resize(photo, (width, height)) for photo in photos[:2]])
    yield to_batch([resize(photos[0], (size + 128, size))])


def to_batch(photos: list[np.ndarray]) -> np.ndarray:
    """uint8 RGB or RGBA photos (H, W, C) of one size to the model's input, float32 (N, 3, H, W) in [0, 1]."""
    return np.ascontiguousarray(np.stack(photos)[..., :3].transpose(0, 3, 1, 2), np.float32) / np.float32(255)


@torch.inference_mode()
def disagreements(exported: onnx.ModelProto, model: UNetAutoencoder, photos: list[np.ndarray], size: int) -> np.ndarray:
    """Largest absolute difference between ONNX and PyTorch, and the mean one of alpha, a row for each of
    `check_batches`: (batches, 2)."""
    session, found = open_session(exported), []
    for images in check_batches(photos, size):
        ours, (theirs,) = model.predict(torch.from_numpy(images)).numpy(), session.run(None, {"images": images})
        if theirs.shape != ours.shape:
            raise UserError(f"the exported model gives {theirs.shape} where PyTorch gives {ours.shape}")
        gap = np.abs(ours - theirs)
        found.append((gap.max(), gap[:, 3].mean()))
    return np.array(found)


def measure_both(reference: onnx.ModelProto, reduced: onnx.ModelProto, dataset: COCOPersonDataset) -> list[dict]:
    """The mean IoU over a dataset's photos, and the median milliseconds that one takes, of each of the two models."""
    sessions = [open_session(model) for model in (reference, reduced)]
    metrics, seconds = [SegmentationMetrics(), SegmentationMetrics()], ([], [])
    for sample in (dataset[index] for index in range(len(dataset))):
        images, mask = to_batch([sample.permute(1, 2, 0).numpy()]), sample[None, 3] > 127
        for session, metric, times in zip(sessions, metrics, seconds, strict=True):  # in turn: both meet the same load
            begin = time.perf_counter()
            alpha = session.run(None, {"images": images})[0][:, 3]
            times.append(time.perf_counter() - begin)
            metric.update(torch.from_numpy(alpha) > 0.5, mask)
    return [{"iou": m.compute()["iou"], "ms": 1e3 * np.median(t)} for m, t in zip(metrics, seconds, strict=True)]


# --- the command line -------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("export.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", help="the trained model, e.g. checkpoints/best_model.pth, or box")
    add("--output", type=Path, default=Path("model.onnx"), help="the file to write (%(default)s)")
    add("--precision", choices=PRECISIONS, default="float32", help="of weights and activations (%(default)s)")
    add("--check", type=Path, metavar="FOLDER", help="photos to compare with PyTorch on")
    add("--data-root", "--data_root", help="photos with masks as for trainer.py, to measure the loss of IoU on")
    add("--split", default="val2017", help="photos to measure on (%(default)s)")
    add("--calibration-split", "--calibration_split", default="train2017", help="photos for int8 (%(default)s)")
    options = parser.parse_args(argv)
    if options.precision == "int8" and not options.data_root:
        raise UserError("--precision int8 needs --data-root: its ranges and its loss are measured on photos")
    return options


def choose_photos(options: argparse.Namespace, dataset: COCOPersonDataset | None) -> tuple[list[np.ndarray], str]:
    """A few photos, uint8 RGB (H, W, 3), to check on, and what they are."""
    if options.check:
        files, _ = photos_in(options.check, options.output)
        if not files:
            raise UserError(f"there is no photo in {options.check}")
        chosen = evenly(files)
        return [open_photo(file).rgb for file in chosen], f"{counted(len(chosen), 'photo')} of {options.check}"
    if dataset is not None:
        chosen = evenly(range(len(dataset)))
        photos = [dataset.original(i)[..., :3] for i in chosen]
        return photos, f"{counted(len(chosen), 'photo')} of {options.split}"
    noise = np.random.default_rng(0).integers(0, 256, (CHECKED_PHOTOS, 6, 9, 3), dtype=np.uint8)
    photos = [resize(picture, (640, 427)) for picture in noise]
    return photos, f"{len(photos)} pictures of noise (give photos with --check FOLDER)"


def evenly(items: list | range, count: int = CHECKED_PHOTOS) -> list:
    """A few of many, at even distances."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items)), dtype=int)]


def main(options: argparse.Namespace) -> None:
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"{', '.join(missing)} must be installed first: pip install -r requirements-dev.txt")
    refuse_unwritable(options.output)
    cutter, content = load(options.checkpoint, "cpu"), read_checkpoint(find_model(options.checkpoint))
    dataset = open_split(options, options.split, cutter) if options.data_root else None
    # Opened early: the export takes its time.
    calibration = open_split(options, options.calibration_split, cutter) if options.precision == "int8" else None
    photos, kind = choose_photos(options, dataset)
    exported = to_onnx(cutter.model)
    check_export(exported, "float32", cutter, photos, kind)
    if options.precision != "float32":
        reference, exported = exported, reduce(exported, calibration)
        check_export(exported, options.precision, cutter, photos, kind)
        if dataset is not None:
            measure_loss(reference, exported, dataset, options.precision)
    add_facts(exported, content, options.precision)
    write_onnx(exported, options.output)


def refuse_unwritable(path: Path) -> None:
    """Early, because the export takes its time."""
    if path.is_dir():
        raise UserError(f"--output {path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"--output {path} cannot be written: there is no folder {path.parent}")


def open_split(options: argparse.Namespace, split: str, cutter: Cutter) -> COCOPersonDataset:
    return COCOPersonDataset(options.data_root, split, cutter.image_size)


def reduce(exported: onnx.ModelProto, calibration: COCOPersonDataset | None) -> onnx.ModelProto:
    """To int8 by photos of a data set; to float16 without one."""
    if calibration is None:
        return to_float16(exported)
    chosen = evenly(range(len(calibration)), CALIBRATION_PHOTOS)
    return to_int8(exported, (to_batch([calibration[i].permute(1, 2, 0).numpy()]) for i in chosen))


def check_export(exported: onnx.ModelProto, precision: str, cutter: Cutter, photos: list, kind: str) -> None:
    """Says how far the exported model is from PyTorch; a UserError where that is too far, and for a NaN."""
    found = disagreements(exported, cutter.model, photos, cutter.image_size)
    largest, mean = found.max(axis=0)
    print(f"{precision} against PyTorch: largest difference {largest:.2g}, alpha's mean {mean:.2g}, "
          f"in {len(found)} batches of several sizes, {kind}", flush=True)  # fmt: skip
    value, limit = (largest, TOLERANCE) if precision == "float32" else (mean, MEAN_TOLERANCE)
    if not value <= limit:
        raise UserError(f"{precision} disagrees with PyTorch by {value:.2g}, more than {limit}: nothing was written")


def measure_loss(reference: onnx.ModelProto, reduced: onnx.ModelProto, dataset: COCOPersonDataset, name: str) -> None:
    whole, less = measure_both(reference, reduced, dataset)
    loss = whole["iou"] - less["iou"]
    print(f"mean IoU on {counted(len(dataset), 'photo')}: float32 {whole['iou']:.4f}, {name} {less['iou']:.4f}, "
          f"loss {loss:+.4f}; ms a photo: float32 {whole['ms']:.1f}, {name} {less['ms']:.1f}", flush=True)  # fmt: skip
    if loss > LARGEST_LOSS:
        raise UserError(f"{name} loses {loss:.3f} of IoU, more than {LARGEST_LOSS}: nothing was written")


def write_onnx(model: onnx.ModelProto, path: Path) -> None:
    data = model.SerializeToString()
    try:
        with atomic_write(path) as file:
            file.write(data)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}") from None
    print(f"{path}: {len(data) / 2**20:.1f} MB, opset {OPSET}", flush=True)


def run_command(argv: list[str]) -> int:
    """The whole program. Returns its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    steady_streams()
    try:
        main(parse(argv[1:]))
    except UserError as error:
        print(f"export.py: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
