"""Cuts the persons out of photos with a trained model: any photo in, an RGBA PNG of the photo's own size out.

    python predict.py photo.jpg                          # cutouts/photo.png
    python predict.py holidays --output cut              # a folder with its subfolders; run again, it goes on
    python predict.py holidays --background white        # composed onto a colour, or onto a photo
    python predict.py holidays --mask --threshold 0.5    # the masks alone, with a hard edge

From Python:

    from predict import load
    cut = load("checkpoints/best_model.pth")
    rgba = cut("photo.jpg")  # uint8 (H, W, 4); a PIL image or an array (H, W, 3) will do as well

Memory: a photo at work takes up to 14 bytes a pixel (one of 50 megapixels 700 MB), and `PIXELS_AT_WORK` limits how many
there are: less than 2 GB beside the model, whatever the number of photos. A larger photo is worked on alone.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import os
import struct
import sys
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import cv2
import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from tqdm import tqdm

import checkpointing
import utils
from datasets import MAX_PIXELS, letterbox, resize, restore, to_rgba, usable_cores
from models import SMALLEST_INPUT, UNetAutoencoder

PIXELS_AT_WORK = 2**27  # of all photos that are read, cut or written at one moment
BATCH_PIXELS = 2**25  # of the photos of one batch
# OpenCV's own (level 1, run lengths, one filter; a level given here would turn on all filters). On COCO's photos over
# 2 times as fast as Pillow's level 1 and 8 times as fast as its default of 6, for files 6 and 14 % larger.
PNG_SETTINGS: list[int] = []
LARGEST_PROFILE = 2**20  # bytes: Pillow refuses to open a PNG with a larger colour profile
NO_PHOTOS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow names them, but cannot decode them by itself
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # after which no other file can be written either

Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above this and refuses above its double


class PredictError(ValueError):
    """A photo that cannot be read, or a request that cannot be met; the message is one line for the user."""


USER_ERRORS = (PredictError, checkpointing.CheckpointError, utils.LaunchError, torch.OutOfMemoryError)


# --- reading: every kind of photo as 8 bits of RGB, and its alpha where it has one ------------------------


@dataclass
class Photo:
    """A photo as it is shown: uint8 RGB (H, W, 3); straight alpha (H, W) and a colour profile where it has them."""

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None


def read_photo(path: str | Path) -> Photo:
    """Reads any photo that Pillow knows, its EXIF orientation applied; of several frames the first.

    Raises:
        PredictError: missing, damaged, cut short, no image, or of more than `MAX_PIXELS` pixels; names the file.
    """
    try:
        with Image.open(path, formats=photo_formats()) as image:
            scale_colour_key(image)
            return to_photo(image)
    except Exception as error:  # whatever a damaged file makes one of forty decoders raise
        raise PredictError(f"{path} cannot be read: {reason(error)}") from None


def reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image of a kind that Pillow knows"
    return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]


@functools.cache
def photo_formats() -> tuple[str, ...]:
    with contextlib.suppress(ImportError):  # HEIC is an extra: pip install pillow-heif
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return tuple(name for name in Image.ID if name not in NO_PHOTOS)


def scale_colour_key(image: Image.Image) -> None:
    """Brings a PNG's transparent colour to 8 bits, in place: Pillow does so for the pixels alone."""
    key, stored = image.info.get("transparency"), image.tile[0][3] if image.tile else None
    if key and stored == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif key and stored in ("L;2", "L;4"):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[stored]


def to_photo(image: Image.Image) -> Photo:
    """Any Pillow image as a `Photo`; the image itself may be turned."""
    image.load()
    with contextlib.suppress(Exception):  # an EXIF block that nobody can read does not spoil the photo
        ImageOps.exif_transpose(image, in_place=True)
    icc = fitting_profile(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers without a fixed white")
    if image.mode.startswith("I"):
        return Photo(*deep_grey(image), icc)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return Photo(*channels(image if image.mode == mode else image.convert(mode)), icc)


def fitting_profile(image: Image.Image) -> bytes | None:
    """The image's colour profile, if it describes RGB: one of CMYK or grey does not fit the pixels that come out."""
    icc = image.info.get("icc_profile") or b""
    return icc if icc[16:20] == b"RGB " and image.mode != "CMYK" and len(icc) <= LARGEST_PROFILE else None


def deep_grey(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Grey of more than 8 bits as `channels` gives it: its highest 8, as Pillow does it with 16-bit colours."""
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # a TIFF says how many; all else comes scaled to 16
    values = np.asarray(image)
    grey = np.clip(values >> (bits - 8), 0, 255).astype(np.uint8)
    key = image.info.get("transparency")
    alpha = None if key is None else np.where(values == key, 0, 255).astype(np.uint8)
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), alpha


def channels(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """An RGB or RGBA image as uint8 (H, W, 3) and (H, W) or None."""
    width, height = image.size
    rgb = np.empty((height, width, 3), np.uint8)
    alpha = np.empty((height, width), np.uint8) if image.mode == "RGBA" else None
    for rows in strips(height):
        strip = np.asarray(image.crop((0, rows.start, width, rows.stop)))
        rgb[rows] = strip[..., :3]
        if alpha is not None:
            alpha[rows] = strip[..., 3]
    return rgb, alpha


def strips(height: int, rows: int = 256) -> Iterator[slice]:
    """For what Pillow does with copies of the photo: they are of a few rows only."""
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def as_photo(photo: str | Path | Image.Image | np.ndarray) -> Photo:
    """A path, a Pillow image or a uint8 array (H, W, 3 or 4) as a `Photo`; what is given is not changed."""
    if isinstance(photo, Image.Image):
        try:
            return to_photo(photo.copy())
        except Exception as error:  # a file that was opened lazily is decoded only now
            raise PredictError(f"the photo cannot be read: {reason(error)}") from None
    if not isinstance(photo, np.ndarray):
        return read_photo(photo)
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] not in (3, 4) or not photo.size:
        raise PredictError(f"expected a uint8 array (H, W, 3) or (H, W, 4), got {photo.dtype} {photo.shape}")
    return Photo(np.ascontiguousarray(photo[..., :3]), photo[..., 3] if photo.shape[2] == 4 else None)


# --- cutting ----------------------------------------------------------------------------------------------


def load(checkpoint: str | Path, device: str = utils.EACH_ITS_GPU) -> Cutter:
    """The model of a checkpoint, ready to cut; the checkpoint itself says which model that is.

    Args:
        checkpoint: `best_model.pth`, or any other that a training wrote.
        device: e.g. "cpu", "cuda:1", "mps"; by default the first GPU, or the CPU where there is none.

    Raises:
        CheckpointError: no such file, damaged, or of another kind.
        LaunchError: no such device.
    """
    name, _ = utils.pick_device(device, 0, torch.cuda.device_count(), torch.backends.mps.is_available())
    content = checkpointing.load(checkpoint)
    try:
        config = content["config"]
        model = UNetAutoencoder(config["encoder"], pretrained=False, use_attention=config["use_attention"])
        model.load_state_dict(content["model"])
        return Cutter(model, config["image_size"], torch.device(name), config.get("amp", True))
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        text = " ".join(str(error).split())[:160]  # PyTorch lists every tensor that is missing, a line each
        raise checkpointing.CheckpointError(f"{checkpoint} holds no model that can be used here: {text}") from None


class Cutter:
    """Cuts the persons out of photos: `rgba = cut(photo)`.

    Args:
        image_size: pixels, the side of the square that the model was trained on.
        amp: whether to compute in bfloat16 or float16 on a GPU.
    """

    def __init__(self, model: UNetAutoencoder, image_size: int, device: torch.device, amp: bool = True):
        if image_size < SMALLEST_INPUT:
            raise ValueError(f"an image size of {image_size} pixels")
        self.model = model.eval().to(device, memory_format=utils.memory_format(device))
        self.image_size, self.device = image_size, device
        self.amp_dtype = utils.autocast_dtype(device, amp)
        # A GPU holds one batch at a time, whichever thread brings it; on a CPU every thread computes for itself.
        self._turn = contextlib.nullcontext() if device.type == "cpu" else threading.Lock()

    def __call__(self, photo: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        """A photo to uint8 RGBA (H, W, 4): its own colours everywhere, the persons as straight alpha.

        Raises:
            PredictError: the photo cannot be read.
        """
        photo = as_photo(photo)
        square, metadata = letterbox(photo.rgb, self.image_size)
        alpha = alpha_of(self.probabilities([square])[0], metadata, photo.rgb)
        return to_rgba(photo.rgb, to_opacity(alpha, photo.alpha))

    @torch.inference_mode()
    def probabilities(self, squares: list[np.ndarray]) -> np.ndarray:
        """uint8 RGB squares (S, S, 3) to the probabilities of a person, float32 (N, S, S)."""
        with self._turn, torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            images = torch.from_numpy(np.stack(squares)).to(self.device).permute(0, 3, 1, 2)
            return self.model.predict(images.float().div_(255))[:, 3].float().cpu().numpy()


def alpha_of(probabilities: np.ndarray, metadata: dict, rgb: np.ndarray) -> np.ndarray:
    """From the network's square to the photo's alpha: the one place where that happens.

    Args:
        probabilities: of a person, float32 (S, S).
        metadata: what `letterbox` returned for the photo.
        rgb: the photo, uint8 (H, W, 3).

    Returns:
        float32 (H, W) in [0, 1], never stretched: where the model sees nobody it stays empty.
    """
    return restore(probabilities, metadata)


def to_opacity(alpha: np.ndarray, photo_alpha: np.ndarray | None, threshold: float | None = None) -> np.ndarray:
    """Alpha in [0, 1], float32 (H, W), as uint8: rounded, or with a threshold 255 above it and 0 elsewhere.

    No more opaque than the photo was, by the smaller of the two: both draw the same person's edge, and a
    product would eat it away a little more each time that a cutout is cut out again.
    """
    if threshold is None:
        opacity = cv2.convertScaleAbs(alpha, alpha=255.0)  # rounds and saturates
    else:
        opacity = (alpha > threshold).astype(np.uint8) * np.uint8(255)
    return opacity if photo_alpha is None else np.minimum(opacity, photo_alpha)


# --- what is written --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """What is made of a photo and its alpha; by default a cutout."""

    mask: bool = False  # the alpha alone
    background: tuple[int, ...] | np.ndarray | None = None  # a colour, or a photo uint8 (H, W, 3), to compose onto
    threshold: float | None = None  # a hard edge at this probability

    def encode(self, photo: Photo, opacity: np.ndarray) -> list[bytes | memoryview]:
        """The pieces of a PNG file: mode L for a mask, RGB on a background, RGBA for a cutout."""
        if self.mask:
            return encode_png(opacity)
        if self.background is not None:
            return encode_png(compose(photo.rgb, opacity, self.background), photo.icc)
        bgra = cv2.cvtColor(photo.rgb, cv2.COLOR_RGB2BGRA)
        bgra[..., 3] = opacity
        return encode_png(bgra, photo.icc)


def compose(rgb: np.ndarray, opacity: np.ndarray, background: tuple[int, ...] | np.ndarray) -> np.ndarray:
    """The photo over a colour, or over a photo that covers all of it: uint8 BGR (H, W, 3)."""
    one_colour = isinstance(background, tuple)
    composed = np.full_like(rgb, background) if one_colour else cover(background, opacity.shape[::-1])
    for rows in strips(len(rgb)):
        canvas = Image.fromarray(composed[rows])
        canvas.paste(Image.fromarray(rgb[rows]), mask=Image.fromarray(opacity[rows]))
        composed[rows] = np.asarray(canvas)[..., ::-1]
    return composed


def cover(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crops the middle of a picture to the shape of (width, height) and scales it to that size; always a copy."""
    height, width = picture.shape[:2]
    scale = max(size[0] / width, size[1] / height)
    new_width, new_height = (min(old, max(1, round(n / scale))) for old, n in ((width, size[0]), (height, size[1])))
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return np.array(resize(picture[top : top + new_height, left : left + new_width], size))


def encode_png(picture: np.ndarray, icc: bytes | None = None) -> list[bytes | memoryview]:
    """The pieces of a PNG of uint8 (H, W), BGR (H, W, 3) or BGRA (H, W, 4), colours kept where alpha is 0 as well."""
    ok, encoded = cv2.imencode(".png", picture, PNG_SETTINGS)
    if not ok:
        raise ValueError("larger than a PNG may be")
    data = memoryview(encoded)
    if icc is None:
        return [data]
    profile = b"iCCP" + b"photo\0\0" + zlib.compress(icc)
    chunk = struct.pack(">I", len(profile) - 4) + profile + struct.pack(">I", zlib.crc32(profile))
    return [data[:33], chunk, data[33:]]  # right after the header, whose length is fixed


def write(pieces: list[bytes | memoryview], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with checkpointing.atomic_write(path) as file:
        file.writelines(pieces)


# --- which photos, and where to ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    photo: Path
    output: Path


def plan(arguments: list[str], output: Path) -> list[Job]:
    """What is to be done, decided by the photos' names alone, so that a second run decides alike.

    Raises:
        PredictError: no such path, no photo in a folder, two outputs of one name, an output among the photos.
    """
    folders = [Path(argument) for argument in arguments if os.path.isdir(argument)]
    names: dict[Path, Path] = {}  # in the output folder, by photo
    for argument in map(Path, arguments):
        if argument in folders:
            found = {photo: photo.relative_to(argument) for photo in photos_in(argument, output)}
        elif os.path.isfile(argument):
            found = {argument: Path(argument.name)}
        else:
            raise PredictError(f"there is no photo or folder {argument}")
        names |= found
    jobs = [Job(photo, output / name) for photo, name in with_png(names).items()]
    refuse_collisions(jobs)
    refuse_mixing(folders, jobs, output)
    return jobs


def photos_in(folder: Path, output: Path) -> list[Path]:
    """The photos in a folder and its subfolders, but for hidden ones and those in the output folder.

    Raises:
        PredictError: there is none.
    """
    formats, output = photo_formats(), os.path.realpath(output)
    extensions = {extension for extension, name in Image.registered_extensions().items() if name in formats}
    found, closed = [], []
    for place, folders, files in os.walk(folder, onerror=closed.append):
        folders[:] = sorted(n for n in folders if n[0] != "." and os.path.realpath(os.path.join(place, n)) != output)
        found += [Path(place, n) for n in sorted(files) if n[0] != "." and os.path.splitext(n)[1].lower() in extensions]
    # A subfolder that cannot be opened goes on the list as well: reading it fails, and is named and counted.
    found += [Path(error.filename) for error in closed]
    if not found or folder in found:
        raise PredictError(f"there is no photo in {folder}" if not found else f"{folder} cannot be opened")
    return found


def with_png(names: dict[Path, Path]) -> dict[Path, Path]:
    """a.jpg becomes a.png; beside another a it becomes a.jpg.png. No difference by capitals: some disks know none."""
    short = {photo: name.with_suffix(".png") for photo, name in names.items()}
    count = Counter(str(name).casefold() for name in short.values())
    full = {photo: name.with_name(name.name + ".png") for photo, name in names.items()}
    return {photo: short[photo] if count[str(short[photo]).casefold()] == 1 else full[photo] for photo in names}


def refuse_collisions(jobs: list[Job]) -> None:
    first: dict[Path, Path] = {}
    photos = {identity(job.photo) for job in jobs} - {None}
    for job in jobs:
        if first.setdefault(job.output, job.photo) != job.photo:
            raise PredictError(f"{first[job.output]} and {job.photo} would both become {job.output}: do them apart")
        if identity(job.output) in photos:
            raise PredictError(f"{job.output} would overwrite the photo of that name: choose another --output")


def identity(path: Path) -> tuple[int, int] | None:
    """The same for every path to one file, over links as well; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def refuse_mixing(folders: list[Path], jobs: list[Job], output: Path) -> None:
    """Outputs that lie among the photos of a folder would be taken for photos by the next run."""
    output = Path(os.path.realpath(output))
    for folder in [Path(os.path.realpath(folder)) for folder in folders]:
        among = (folder in Path(os.path.realpath(job.output)).parents for job in jobs)
        if folder not in output.parents and any(among):
            raise PredictError(f"--output {output} would mix the results with the photos of {folder}: choose another")


# --- the run ----------------------------------------------------------------------------------------------


def cut_all(cutter: Cutter, jobs: list[Job], style: Style, batch_size: int) -> int:
    """Does all jobs, several at a time, and names on stderr what could not be done. Returns how many.

    Each thread takes its photos from file to file: while one waits for the GPU or the disk, others decode and
    encode. On a CPU each thread runs the network by itself, a photo at a time, which is as fast as a batch
    and spares the cores waiting for each other.
    """
    on_cpu, cores = cutter.device.type == "cpu", usable_cores()
    threads = min(cores if on_cpu else cores + 1, len(jobs))
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(max(1, cores // threads),))
    failed, at_work = 0, {}
    try:
        with tqdm(total=len(jobs), unit="photo", disable=not sys.stderr.isatty()) as progress:
            for batch, pixels in batches(jobs, 1 if on_cpu else batch_size):
                while at_work and (len(at_work) > threads or sum(at_work.values()) + pixels > PIXELS_AT_WORK):
                    failed += collect(at_work, progress)
                at_work[pool.submit(cut_batch, cutter, batch, style)] = pixels
            while at_work:
                failed += collect(at_work, progress)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C: what has begun is completed, the rest not begun
    return failed


def batches(jobs: list[Job], size: int) -> Iterator[tuple[list[Job], int]]:
    """The jobs by `size`, fewer where the photos are large, and how many pixels these are."""
    batch, pixels = [], 0
    for job in jobs:
        more = count_pixels(job.photo)
        if batch and (len(batch) == size or pixels + more > BATCH_PIXELS):
            yield batch, pixels
            batch, pixels = [], 0
        batch.append(job)
        pixels += more
    yield batch, pixels


def count_pixels(path: Path) -> int:
    try:
        with Image.open(path, formats=photo_formats()) as image:
            return image.width * image.height
    except Exception:  # whoever reads the photo will say what is wrong
        return 0


def collect(at_work: dict[Future, int], progress: tqdm) -> int:
    """Waits until a batch is done, takes it off the list and names what failed in it. Returns how many did."""
    failed = 0
    for future in wait(at_work, return_when=FIRST_COMPLETED).done:
        del at_work[future]
        done, failures = future.result()
        for failure in failures:
            tqdm.write(failure, file=sys.stderr)
        progress.update(done)
        failed += len(failures)
    return failed


def cut_batch(cutter: Cutter, jobs: list[Job], style: Style) -> tuple[int, list[str]]:
    """Reads, cuts and writes a few photos. Returns how many were tried, and a line for each that failed."""
    failures, ready = [], []
    for job in jobs:
        try:
            photo = read_photo(job.photo)
            ready.append((job, photo, *letterbox(photo.rgb, cutter.image_size)))
        except PredictError as error:
            failures.append(str(error))
    for probabilities in cutter.probabilities([square for _, _, square, _ in ready]) if ready else ():
        job, photo, _, metadata = ready.pop(0)  # off the list, so that its memory is free as soon as it is written
        try:
            opacity = to_opacity(alpha_of(probabilities, metadata, photo.rgb), photo.alpha, style.threshold)
            write(style.encode(photo, opacity), job.output)
        except (OSError, ValueError, MemoryError, cv2.error) as error:
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise PredictError(f"{job.output} cannot be written: {error.strerror}") from None
            failures.append(f"{job.output} cannot be written: {reason(error)}")
    return len(jobs), failures


# --- the command line -------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise PredictError(message)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("predict.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTO_OR_FOLDER", help="folders with all their subfolders")
    add("--checkpoint", default=f"checkpoints/{checkpointing.BEST}", help="the trained model (%(default)s)")
    add("--output", default="cutouts", help="folder for the results (%(default)s)")
    add("--overwrite", action="store_true", help="make results again that are there already, instead of going on")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--mask", action="store_true", help="write the mask alone, in grey")
    kind.add_argument("--background", metavar="COLOUR_OR_PHOTO", help="compose onto e.g. white, #3366cc or beach.jpg")
    add("--threshold", type=float, help="a hard edge: opaque where the probability of a person exceeds it (0 to 1)")
    add("--device", default=utils.EACH_ITS_GPU, help="cpu, cuda:1, mps (the first GPU, or the CPU)")
    add("--batch-size", "--batch_size", type=int, default=8, help="photos at a time on a GPU (%(default)s)")
    options = parser.parse_args(argv)
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise PredictError(f"--threshold {options.threshold} is out of range: from 0 to 1")
    if options.batch_size < 1:
        raise PredictError(f"--batch-size {options.batch_size} is out of range: 1 at least")
    return options


def read_background(text: str | None) -> tuple[int, ...] | np.ndarray | None:
    """The photo of that name, or else a colour (red, green, blue)."""
    if text is None or os.path.isfile(text):
        return None if text is None else read_photo(text).rgb
    try:
        return ImageColor.getcolor(text, "RGB")
    except ValueError:
        raise PredictError(f"--background {text} is no colour and no photo") from None


def prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise PredictError(f"--output {folder} cannot be written: {error.strerror}") from None


def main(options: argparse.Namespace) -> int:
    """Returns how many photos could not be done."""
    output, failed = Path(options.output), 0
    jobs = plan(options.photos, output)
    todo = [job for job in jobs if options.overwrite or not os.path.exists(job.output)]
    style = Style(options.mask, read_background(options.background), options.threshold)
    if todo:
        cutter = load(options.checkpoint, options.device)
        prepare_folder(output)
        failed = cut_all(cutter, todo, style, options.batch_size)
    kept = len(jobs) - len(todo)
    notes = f", {kept} were there already (--overwrite makes them again)" if kept else ""
    notes += f", {failed} could not be done" if failed else ""
    print(f"{len(todo) - failed} of {len(jobs)} photos written to {output}{notes}", flush=True)
    return failed


def run_command(argv: list[str]) -> int:
    """The whole program. Returns its exit code: 0, 1 where photos failed, 2 for a user's mistake, 130 after Ctrl-C."""
    cv2.setNumThreads(1)  # each thread is a core's worth of work already
    warnings.filterwarnings("ignore", module="PIL")  # of odd metadata in photos that can be read all the same
    try:
        return 1 if main(parse(argv[1:])) else 0
    except USER_ERRORS as error:
        print(f"predict.py: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
