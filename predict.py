"""Cuts the persons out of photos with a trained model: any photo in, an RGBA PNG of the photo's own size out.

    python predict.py photo.jpg                          # cutouts/photo.png; --output result.png names the file
    python predict.py holidays --output cut              # a folder with its subfolders; run again, it does the rest
    python predict.py holidays --output white --background white      # composed onto a colour, or onto a photo
    python predict.py holidays --output masks --mask --threshold 0.5  # the masks alone, with a hard edge

The model is checkpoints/best_model.pth, or else the bundled one; --checkpoint names another. From Python:
`from predict import load`, then `load()("photo.jpg")`: uint8 RGBA (H, W, 4).
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib.util
import os
import sys
import warnings
from collections import Counter
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
from PIL import ImageColor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
PACKAGES = ("cutting", "loading", "models", "training", "utils")  # imported below, directly or by one another


@contextmanager
def own_modules() -> Iterator[None]:
    """Imports this folder's `utils` and so on even in a program that has its own; afterwards it finds its own again."""
    foreign = {name for name in PACKAGES if not is_own(name)}
    theirs = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in foreign}
    sys.path.insert(0, str(HERE))
    try:
        yield
    finally:
        sys.path.remove(str(HERE))
        for name in [name for name in sys.modules if name.partition(".")[0] in foreign]:
            del sys.modules[name]
        sys.modules.update(theirs)


def is_own(name: str) -> bool:
    """Returns whether `import name` gives this folder's module, whether or not it has been imported already."""
    module = sys.modules.get(name) or importlib.util.find_spec(name)
    path = getattr(module, "__file__", None) or getattr(module, "origin", None) or ""
    return Path(path).resolve() in (HERE / f"{name}.py", HERE / name / "__init__.py")


with own_modules():
    import utils
    from cutting.cutter import TRAINED, Cutter, Look, load, model_digest
    from cutting.edges import estimate_foreground, refine_alpha, to_opacity
    from cutting.jobs import UP_TO_DATE, Job, names_a_file, origin, plan, split_jobs
    from cutting.photos import DECODER_ADVICE, Photo, PhotoError, compose, open_image, open_photo, reason
    from cutting.png import encode_png
    from loading.workers import usable_cores
    from training.command_line import OneLineParser, run_cli
    from utils import UserError, atomic_write, counted, ensure_writable, explain_write_errors

MAX_PIXELS = 2**27  # of all photos at work, at up to 16 bytes each about 2 GB; a larger photo is cut alone
MAX_BATCH_PIXELS = 2**25  # of the photos of one batch
MAX_NAMED = 3  # photos that a line names; the others are counted
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # after which no other file can be written either


class Outcome(NamedTuple):
    """The result of one batch: a line for each photo that failed, and the photos in which nobody was found."""

    tried: int
    failures: list[str]
    empty: list[Path]


@dataclass(frozen=True)
class Style:
    """What is made of a photo and its alpha; by default a cutout."""

    mask: bool = False  # the alpha alone
    background: np.ndarray | None = None  # to compose onto: a photo, uint8 RGB (H, W, 3), of one pixel for a colour
    threshold: float | None = None  # probability at which to cut a hard edge, one pixel soft; None is a soft edge
    keep_background_colours: bool = False  # in a cutout, where alpha is 0
    model: str = ""  # the model's digest, the image size if it is not the model's, and whether all persons are kept

    @cached_property
    def how(self) -> str:
        """Says in a note how the output is made; it differs between any two styles, backgrounds or models."""
        kind = "mask" if self.mask else "cutout, background colours kept" if self.keep_background_colours else "cutout"
        if self.background is not None:
            kind = f"on background {hashlib.blake2b(self.background.tobytes(), digest_size=6).hexdigest()}"
        return kind + ("" if self.threshold is None else f", threshold {self.threshold}") + f", by {self.model}"

    def draw(self, look: Look, photo: Photo) -> tuple[np.ndarray, bool]:
        """Draws the output from where the network sees persons in the photo.

        Returns uint8 (H, W) for a mask, BGR (H, W, 3) on a background, BGRA (H, W, 4) for a cutout, and whether anybody
        was found: whether any pixel is more opaque than not.
        """
        probabilities, square, metadata, _ = look
        alpha = refine_alpha(probabilities, square, metadata, photo.rgb)
        opacity = to_opacity(alpha, photo.alpha, self.threshold, metadata["scale"])
        del alpha  # frees its memory before the colours take theirs
        anybody = bool((opacity > 127).any())
        if self.mask:
            return opacity, anybody
        hide = self.background is None and not self.keep_background_colours
        photo.rgb = estimate_foreground(photo, opacity, square, metadata, hide)  # frees the memory of the old colours
        if self.background is not None:
            return compose(photo.rgb, opacity, self.background), anybody
        bgra = cv2.cvtColor(photo.rgb, cv2.COLOR_RGB2BGRA)
        bgra[..., 3] = opacity
        return bgra, anybody


def cut_all(cutter: Cutter, jobs: list[Job], style: Style, batch_size: int) -> list[Outcome]:
    """Does all jobs in threads, and prints on stderr what fails; raises UserError if the disk takes no more files.

    A thread takes a batch from file to file: while one waits for the GPU or the disk, others decode and encode. On a
    CPU each runs the network on one core, a photo at a time, so the bits do not depend on how many cores there are.
    """
    on_cpu, cores = cutter.device.type == "cpu", usable_cores()
    threads = min(cores if on_cpu else cores + 1, len(jobs))
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    outcomes: list[Outcome] = []
    running: dict[Future, int] = {}
    try:
        with tqdm(total=len(jobs), unit="photo", disable=not sys.stderr.isatty()) as progress:
            for batch, pixels in group_jobs(jobs, 1 if on_cpu else batch_size):
                while running and (len(running) > threads or sum(running.values()) + pixels > MAX_PIXELS):
                    outcomes += collect(running, progress)
                running[pool.submit(cut_batch, cutter, batch, style)] = pixels
            while running:
                outcomes += collect(running, progress)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C: batches that run are completed, the others dropped
    return outcomes


def group_jobs(jobs: list[Job], batch_size: int) -> Iterator[tuple[list[Job], int]]:
    """Yields batches of jobs with the number of their photos' pixels; large photos are batches of one."""
    for batch in (jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)):
        pixels = [count_pixels(photo) for photo, _ in batch]
        if sum(pixels) <= MAX_BATCH_PIXELS:
            yield batch, sum(pixels)
        else:
            yield from zip(([job] for job in batch), pixels, strict=True)


def count_pixels(path: Path) -> int:
    """Returns the pixels of a photo, by its header; 0 if it cannot be read, which is reported when it is opened."""
    with suppress(Exception), open_image(path) as image:
        return image.width * image.height
    return 0


def collect(running: dict[Future, int], progress: tqdm) -> list[Outcome]:
    """Waits until a batch is done, and removes and returns all that are done, printing their failures."""
    outcomes = []
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        del running[future]
        outcomes.append(future.result())
        for failure in outcomes[-1].failures:
            tqdm.write(failure, file=sys.stderr)
        progress.update(outcomes[-1].tried)
    return outcomes


def cut_batch(cutter: Cutter, jobs: list[Job], style: Style) -> Outcome:
    """Reads, cuts and writes a few photos; raises UserError if the disk takes no more files."""
    failures, empty, ready = [], [], []
    for path, output in jobs:
        try:
            note = "; ".join(origin(path, style.how))  # before it is read: if it changes now, the next run sees that
            ready.append((path, output, note, open_photo(path)))
        except PhotoError as error:
            failures.append(str(error))
    looks = cutter.look([photo.rgb for *_, photo in ready])
    for look, (path, output, note, photo) in zip(looks, ready, strict=True):
        try:
            picture, anybody = style.draw(look, photo)
            output.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(output) as file:
                file.writelines(encode_png(picture, None if style.mask else photo.icc, f"{note}; look at {look.size}"))
            empty += [] if anybody else [path]
        except (OSError, ValueError, MemoryError, cv2.error) as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise UserError(f"{output} cannot be written: {error.strerror}") from None
            failures.append(f"{output} cannot be written: {reason(error)}")
    return Outcome(len(jobs), failures, empty)


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the options; raises UserError if one is unknown or out of range."""
    parser = OneLineParser("predict.py", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTO_OR_FOLDER", help="photos, and folders with all their subfolders")
    add("--checkpoint", help=f"the trained model, or bundled ({TRAINED} if it exists, else bundled)")
    add("--output", default="cutouts", help="folder for the results, or for one photo a file *.png (%(default)s)")
    add("--overwrite", action="store_true", help="make existing outputs again, and replace other files")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--mask", action="store_true", help="write the mask alone, in grey")
    kind.add_argument("--background", metavar="COLOUR_OR_PHOTO", help="compose onto e.g. white, #3366cc or beach.jpg")
    add("--threshold", type=float, help="a smooth hard edge: opaque where the probability of a person exceeds it")
    add("--keep-background-colours", action="store_true", help="keep a cutout's colours where its alpha is 0")
    add("--foreground-only", action="store_true", help="leave out persons much smaller than the largest one")
    add("--image-size", type=int, help="pixels of the square that photos are fitted into, in one look (the model's)")
    add("--device", default=utils.LOCAL_RANK_GPU, help="cpu, cuda:1, mps (the first GPU, or the CPU)")
    add("--batch-size", type=int, default=8, help="photos at a time on a GPU (%(default)s)")
    options = parser.parse_args(argv)
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold {options.threshold} is out of range: from 0 to 1")
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size} is out of range: 1 at least")
    return options


def read_background(text: str) -> np.ndarray:
    """Returns the photo of this name, uint8 RGB (H, W, 3), or a pixel of this colour; UserError if it is neither."""
    if os.path.isfile(text):
        return open_photo(text).rgb
    try:
        return np.array([[ImageColor.getcolor(text, "RGB")]], np.uint8)
    except ValueError:
        raise UserError(f"--background {text} is no colour and no photo") from None


def main(options: argparse.Namespace) -> int:
    """Cuts all photos that are still to be cut. Returns the exit code: 0, or 1 if some failed."""
    output, outcomes = Path(options.output), []
    jobs, unreadable = plan(options.photos, output)
    model = model_digest(options.checkpoint) + (f" at {options.image_size}" if options.image_size else "")
    model += ", foreground only" if options.foreground_only else ""
    background = None if options.background is None else read_background(options.background)
    style = Style(options.mask, background, options.threshold, options.keep_background_colours, model)
    todo, kept = split_jobs(jobs, style.how, options.overwrite, names_a_file(output))
    if todo:
        cutter = load(options.checkpoint, options.device, options.image_size, options.foreground_only)
        with explain_write_errors(f"--output {output}"):
            ensure_writable(output.parent if names_a_file(output) else output)
        print(f"model: {cutter.description}", flush=True)
        outcomes = cut_all(cutter, todo, style, options.batch_size)
    for extension, number in sorted(Counter(path.suffix.lower() for path in unreadable).items()):
        advice = DECODER_ADVICE[extension]
        print(f"{counted(number, f'{extension} photo')} cannot be read here: {advice}", file=sys.stderr)
    failed = len(unreadable) + sum(len(outcome.failures) for outcome in outcomes)
    empty = sorted({photo for outcome in outcomes for photo in outcome.empty})
    photos = counted(len(jobs) + len(unreadable), "photo")
    written = f"{len(todo) + len(unreadable) - failed} of {photos} written to {output}"
    print("; ".join([written, *describe_rest(kept, failed, empty)]), flush=True)
    return 1 if failed else 0


def describe_rest(kept: dict[str, list[Path]], failed: int, empty: list[Path]) -> list[str]:
    """Returns which outputs are kept and why, how many photos failed, and which show nobody."""
    rest = [f"{len(made)} kept, {why}" + ("" if why == UP_TO_DATE else f": {format_some(made)}")
            for why, made in kept.items()]  # fmt: skip
    if failed:
        rest.append(f"{failed} could not be done")
    if empty:
        rest.append(f"nobody was found in {counted(len(empty), 'photo')}: {format_some(empty)}")
    return rest


def format_some(paths: list[Path]) -> str:
    """Returns the first few of the paths in a line."""
    return ", ".join([str(path) for path in paths[:MAX_NAMED]] + ["..."] * (len(paths) > MAX_NAMED))


def run_command(argv: list[str]) -> int:
    """Runs the program. Returns its exit code: 0, 1 if photos failed, 2 for a user's mistake, 130 after Ctrl-C."""
    cv2.setNumThreads(1)  # the threads of `cut_all` keep all cores busy
    warnings.filterwarnings("ignore", module="PIL")  # odd metadata in photos that can be read all the same
    advice = "a smaller --batch-size needs less, --device cpu none; the same command does the rest"
    return run_cli("predict.py", lambda: main(parse(argv[1:])), advice, "stopped; the same command does the rest")


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
