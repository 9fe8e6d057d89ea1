"""Cuts the persons out of photos with a trained model: any photo in, an RGBA PNG of the photo's own size out.

    python predict.py photo.jpg                          # cutouts/photo.png; --output result.png names the file
    python predict.py holidays --output cut              # a folder with its subfolders; run again, it does what is left
    python predict.py holidays --output white --background white      # composed onto a colour, or onto a photo
    python predict.py holidays --output masks --mask --threshold 0.5  # the masks alone, with a hard edge

The model is checkpoints/best_model.pth, or else the one that comes along; --checkpoint names another.

From Python: `from predict import load`, then `load()("photo.jpg")`: uint8 RGBA (H, W, 4).

Memory: a photo at work takes up to 14 bytes a pixel (one of 50 megapixels 700 MB), and `PIXELS_AT_WORK` limits how many
there are: less than 2 GB beside the model, whatever the number of photos. A larger photo is worked on alone.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, ImageColor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
NEEDED = ("cutting", "loading", "models", "training", "utils")  # where the names of what is imported below begin


@contextmanager
def our_modules() -> Iterator[None]:
    """Within, `import utils` finds this folder's even in a program that has its own; behind, the program finds its own.

    Where no other module of these names is loaded or comes first on the path, nothing changes.
    """
    taken = {name for name in NEEDED if not is_from_here(name)}
    theirs = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in taken}
    sys.path.insert(0, str(HERE))
    try:
        yield
    finally:
        sys.path.remove(str(HERE))
        for name in [name for name in sys.modules if name.partition(".")[0] in taken]:
            del sys.modules[name]
        sys.modules.update(theirs)


def is_from_here(name: str) -> bool:
    """Whether an import would give this folder's module, be it loaded already or not."""
    found = sys.modules.get(name) or importlib.util.find_spec(name)
    origin = getattr(found, "__file__", None) or getattr(found, "origin", None) or ""
    return Path(origin).resolve() in (HERE / f"{name}.py", HERE / name / "__init__.py")


with our_modules():
    import utils
    from cutting.cutter import TRAINED, Cutter, check_size, identity, load
    from cutting.edges import alpha_of, foreground, to_opacity
    from cutting.jobs import BESIDE, THERE, Job, names_a_file, origin_of, plan, remaining
    from cutting.photos import Photo, PhotoError, compose, open_photo, photo_formats, reason, what_helps
    from cutting.png import encode_png
    from loading.letterbox import letterbox
    from training.settings import OneLineParser
    from training.streams import steady_streams
    from utils import UserError, atomic_write, counted, make_writable, one_line, usable_cores

PIXELS_AT_WORK = 2**27  # of all photos that are read, cut or written at one moment
BATCH_PIXELS = 2**25  # of the photos of one batch
NAMED = 3  # photos in which nobody was found, or outputs that stay; the others are counted
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # after which no other file can be written either


class Outcome(NamedTuple):
    """What became of a few photos."""

    tried: int
    failures: list[str]  # a line for each that could not be done
    empty: list[Path]  # those in which nobody was found


@dataclass(frozen=True)
class Style:
    """What is made of a photo and its alpha; by default a cutout."""

    mask: bool = False  # the alpha alone
    background: tuple[int, ...] | np.ndarray | None = None  # a colour, or a photo uint8 (H, W, 3), to compose onto
    threshold: float | None = None  # a hard edge, one pixel soft, at this probability
    keep_background_colours: bool = False  # in a cutout, under an alpha of 0
    model: str = ""  # what tells it from others

    @cached_property
    def how(self) -> str:
        """What tells its outputs from those of another style, background or model."""
        kind = "mask" if self.mask else "cutout, background colours kept" if self.keep_background_colours else "cutout"
        if isinstance(self.background, tuple):
            kind = "on #{:02x}{:02x}{:02x}".format(*self.background)
        elif self.background is not None:
            kind = f"on photo {hashlib.blake2b(self.background, digest_size=6).hexdigest()}"
        return kind + ("" if self.threshold is None else f", threshold {self.threshold}") + f", by {self.model}"

    def draw(
        self, probabilities: np.ndarray, photo: Photo, square: np.ndarray, metadata: dict
    ) -> tuple[np.ndarray, bytes | None, bool]:
        """What the file will hold: uint8 (H, W) of a mask, BGR on a background, BGRA of a cutout. It uses up `photo`.

        `probabilities` are the network's, `square` and `metadata` what `letterbox` returned for the photo. Returned as
        well are the colour profile, and whether anybody was found: whether any pixel is more opaque than not.
        """
        alpha = alpha_of(probabilities, square, metadata, photo.rgb)
        opacity = to_opacity(alpha, photo.alpha, self.threshold, metadata["scale"])
        del alpha  # its memory
        somebody = bool((opacity > 127).any())
        if self.mask:
            return opacity, None, somebody
        return self._coloured(photo, opacity, square, metadata), photo.icc, somebody

    def _coloured(self, photo: Photo, opacity: np.ndarray, square: np.ndarray, metadata: dict) -> np.ndarray:
        hide = self.background is None and not self.keep_background_colours
        photo.rgb = foreground(photo.rgb, opacity, square, metadata, photo.alpha, hide)  # frees the old colours
        if self.background is not None:
            return compose(photo.rgb, opacity, self.background)
        bgra = cv2.cvtColor(photo.rgb, cv2.COLOR_RGB2BGRA)
        bgra[..., 3] = opacity
        return bgra


# --- the run ----------------------------------------------------------------------------------------------


def cut_all(cutter: Cutter, jobs: list[Job], style: Style, batch_size: int) -> list[Outcome]:
    """Does all jobs, several at a time, and names on stderr what could not be done.

    Each thread takes its photos from file to file: while one waits for the GPU or the disk, others decode and encode.
    On a CPU a thread runs the network by itself, a photo at a time: as fast as a batch, and no core waits for another.
    """
    on_cpu, cores = cutter.device.type == "cpu", usable_cores()
    threads = min(cores if on_cpu else cores + 1, len(jobs))
    # One thread a photo, however many there are: a photo's result does not depend on its neighbours.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    outcomes, at_work = [], {}
    try:
        with tqdm(total=len(jobs), unit="photo", disable=not sys.stderr.isatty()) as progress:
            for batch, pixels in grouped(jobs, 1 if on_cpu else batch_size):
                while at_work and (len(at_work) > threads or sum(at_work.values()) + pixels > PIXELS_AT_WORK):
                    outcomes += collect(at_work, progress)
                at_work[pool.submit(cut_batch, cutter, batch, style)] = pixels
            while at_work:
                outcomes += collect(at_work, progress)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C: what has begun is completed, the rest not begun
    return outcomes


def grouped(jobs: list[Job], size: int) -> Iterator[tuple[list[Job], int]]:
    """The jobs by `size`, but one by one where the photos are large; and how many pixels these are."""
    for batch in (jobs[start : start + size] for start in range(0, len(jobs), size)):
        pixels = [count_pixels(photo) for photo, _ in batch]
        if sum(pixels) <= BATCH_PIXELS:
            yield batch, sum(pixels)
        else:
            yield from zip(([job] for job in batch), pixels, strict=True)


def count_pixels(path: Path) -> int:
    with suppress(Exception), Image.open(path, formats=photo_formats()) as image:
        return image.width * image.height
    return 0  # whoever reads the photo will say what is wrong


def collect(at_work: dict[Future, int], progress: tqdm) -> list[Outcome]:
    """Waits until a batch is done, takes all that are off the list and names what failed in them."""
    outcomes = []
    for future in wait(at_work, return_when=FIRST_COMPLETED).done:
        del at_work[future]
        outcomes.append(future.result())
        for failure in outcomes[-1].failures:
            tqdm.write(failure, file=sys.stderr)
        progress.update(outcomes[-1].tried)
    return outcomes


def cut_batch(cutter: Cutter, jobs: list[Job], style: Style) -> Outcome:
    """Reads, cuts and writes a few photos.

    Raises:
        UserError: nothing more can be written to this disk.
    """
    failures, empty, ready = [], [], []
    for path, output in jobs:
        try:
            note = origin_of(path, style.how).note()  # before it is read: should it change now, the next run will see
            photo = open_photo(path)
            ready.append((path, output, note, photo, *letterbox(photo.rgb, cutter.image_size)))
        except PhotoError as error:
            failures.append(str(error))
    for probabilities in cutter.probabilities([square for *_, square, _ in ready]) if ready else ():
        path, output, note, *letterboxed = ready.pop(0)  # off the list: its memory is free as soon as it is written
        try:
            empty += [] if write(output, note, *style.draw(probabilities, *letterboxed)) else [path]
        except (OSError, ValueError, MemoryError, cv2.error) as error:
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise UserError(f"{output} cannot be written: {error.strerror}") from None
            failures.append(f"{output} cannot be written: {reason(error)}")
    return Outcome(len(jobs), failures, empty)


def write(output: Path, note: str, picture: np.ndarray, icc: bytes | None, somebody: bool) -> bool:
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as file:
        file.writelines(encode_png(picture, icc, note))
    return somebody


# --- the command line -------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("predict.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTO_OR_FOLDER", help="folders with all their subfolders")
    add("--checkpoint", help=f"the trained model ({TRAINED}, or else the one that comes along: box)")
    add("--output", default="cutouts", help="folder for the results, or of one photo a file *.png (%(default)s)")
    add("--overwrite", action="store_true", help="make again what is there already, and replace other files")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--mask", action="store_true", help="write the mask alone, in grey")
    kind.add_argument("--background", metavar="COLOUR_OR_PHOTO", help="compose onto e.g. white, #3366cc or beach.jpg")
    add("--threshold", type=float, help="a smooth hard edge: opaque where the probability of a person exceeds it")
    keep = "--keep-background-colours", "--keep_background_colours"
    add(*keep, action="store_true", help="leave in a cutout the photo's colours under an alpha of 0")
    add("--image-size", "--image_size", type=int, help="pixels of the square that photos are fitted into (the model's)")
    add("--device", default=utils.EACH_ITS_GPU, help="cpu, cuda:1, mps (the first GPU, or the CPU)")
    add("--batch-size", "--batch_size", type=int, default=8, help="photos at a time on a GPU (%(default)s)")
    options = parser.parse_args(argv)
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold {options.threshold} is out of range: from 0 to 1")
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size} is out of range: 1 at least")
    check_size(options.image_size)
    return options


def style_of(options: argparse.Namespace) -> Style:
    size = f" at {options.image_size}" if options.image_size else ""
    return Style(options.mask, read_background(options.background), options.threshold, options.keep_background_colours,
                 identity(options.checkpoint) + size)  # fmt: skip


def read_background(text: str | None) -> tuple[int, ...] | np.ndarray | None:
    """The photo of that name, or else a colour (red, green, blue)."""
    if text is None or os.path.isfile(text):
        return None if text is None else open_photo(text).rgb
    try:
        return ImageColor.getcolor(text, "RGB")
    except ValueError:
        raise UserError(f"--background {text} is no colour and no photo") from None


def main(options: argparse.Namespace) -> int:
    """Returns how many photos could not be done."""
    output, outcomes = Path(options.output), []
    jobs, unknown = plan(options.photos, output)
    style = style_of(options)
    todo, kept = remaining(jobs, style.how, options.overwrite, names_a_file(output))
    if todo:
        cutter = load(options.checkpoint, options.device, options.image_size)
        try:
            make_writable(output.parent if names_a_file(output) else output)
        except OSError as error:
            raise UserError(f"--output {output} cannot be written: {error.strerror}") from None
        tell_model(cutter, [photo for photo, _ in jobs])
        if not options.overwrite and (again := sum(os.path.exists(made) for _, made in todo)):
            outputs = counted(again, "output")
            print(f"{outputs} of another model or style, or of a photo that has changed: made again", flush=True)
        outcomes = cut_all(cutter, todo, style, options.batch_size)
    for advice, paths in by_advice(unknown).items():
        kinds = ", ".join(sorted({path.suffix.lower() for path in paths}))
        print(f"{counted(len(paths), 'photo')} ({kinds}) cannot be read here: {advice}", file=sys.stderr)
    failed = len(unknown) + sum(len(outcome.failures) for outcome in outcomes)
    empty = {photo for outcome in outcomes for photo in outcome.empty}
    photos = len(jobs) + len(unknown)
    print(f"{len(todo) + len(unknown) - failed} of {counted(photos, 'photo')} written to {output}"
          + notes(kept, failed, [photo for photo, _ in todo if photo in empty]), flush=True)  # fmt: skip
    return failed


def notes(kept: dict[str, list[Path]], failed: int, empty: list[Path]) -> str:
    """The rest of the last line: how many stay and why, could not be done, and show nobody; of these a few."""
    text = ""
    for reason, made in kept.items():
        was, them = ("was", "it") if len(made) == 1 else ("were", "them")
        if reason == THERE:
            text += f", {len(made)} {was} there already (--overwrite makes {them} again)"
        else:
            flags = "--output FILE --overwrite" if reason == BESIDE else "--overwrite"
            text += f", {len(made)} kept, {reason}: {a_few(made)} ({flags} replaces {them})"
    if failed:
        text += f", {failed} could not be done"
    if empty:
        text += f"; nobody was found in {counted(len(empty), 'photo')}: {a_few(empty)}"
    return text


def a_few(paths: list[Path]) -> str:
    return ", ".join([str(path) for path in paths[:NAMED]] + ["..."] * (len(paths) > NAMED))


def tell_model(cutter: Cutter, photos: list[Path]) -> None:
    """Which model it is; and on stderr, should it have been trained on drawings, that these are others than its own."""
    print(f"model: {cutter.about}", flush=True)
    if cutter.drawings is not None and not all(is_under(cutter.drawings, photo) for photo in photos):
        print("this model was trained on drawings (trainer.py --sample): it does not work on photos", file=sys.stderr)


def is_under(folder: str, path: Path) -> bool:
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents


def by_advice(paths: list[Path]) -> dict[str, list[Path]]:
    found = {}
    for path in paths:
        found.setdefault(what_helps(path), []).append(path)
    return found


def run_command(argv: list[str]) -> int:
    """The whole program. Returns its exit code: 0, 1 where photos failed, 2 for a user's mistake, 130 after Ctrl-C."""
    steady_streams()
    cv2.setNumThreads(1)  # each thread is a core's worth of work already
    warnings.filterwarnings("ignore", module="PIL")  # of odd metadata in photos that can be read all the same
    try:
        return 1 if main(parse(argv[1:])) else 0
    except (UserError, RuntimeError) as error:
        advice = "a smaller --batch-size needs less, --device cpu none; the same predict.py goes on where it stopped"
        if not (message := one_line(error, advice)):
            raise
        print(f"predict.py: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
