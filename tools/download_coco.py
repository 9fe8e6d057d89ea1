"""Downloads the part of COCO 2017 that the trainer needs, to where it looks for it; started again, it goes on.

    python tools/download_coco.py                                the photos that show persons, into data/coco
    python tools/download_coco.py --limit 500                    a first look: 500 to train on, 100 to validate on
    python tools/download_coco.py --category cat,dog             the photos that show something else
    python tools/download_coco.py --root /disk/coco              elsewhere: trainer.py --data-root /disk/coco
    python tools/download_coco.py --url https://a.mirror/coco    from a mirror with the same folders

Of persons there are 66,808 photos, about 11 GB, beside 0.5 GB of annotations. A photo that is whole is kept as it is.
"""

from __future__ import annotations

import argparse
import http.client
import os
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks for imports in tools/

from loading.annotations import read_persons
from loading.headers import Size, claimed_size
from loading.layout import COCO_HOME, DEFAULT_OPTIONS, SPLITS
from training.command_line import OneLineParser, UsageError, run_cli
from utils import UserError, atomic_write, counted, explain_write_errors

URL = "http://images.cocodataset.org"
ANNOTATIONS_ZIP = "annotations/annotations_trainval2017.zip"  # on the server
ANNOTATION_BYTES = 750_000_000  # of the zip and of what is unpacked of it
PHOTO_BYTES = 170_000  # of a photo on average, with what it wastes in the blocks of a disk
CHUNK = 2**20  # bytes of the zip
THREADS = 32  # photos that are fetched at once: each waits for the server most of the time
TIMEOUT = 20  # seconds without a byte after which a connection counts as dropped
RETRY_DELAYS = (1, 3, 10)  # seconds before each further attempt
MAX_FAILED = 100  # photos; more is not about photos, but about the server or the network
JPEG_END = b"\xff\xd9"


class DownloadError(UserError):
    """Something cannot be downloaded, and trying again at once does not help."""


class WantedPhoto(NamedTuple):
    """A photo to fetch."""

    url: str
    path: Path
    size: Size  # according to the annotations


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the options, or raises a UsageError."""
    parser = OneLineParser("download_coco.py", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--root", type=Path, default=COCO_HOME, help="the folder (%(default)s)")
    add("--url", default=URL, help="the server, or a mirror of it (%(default)s)")
    add("--category", default=DEFAULT_OPTIONS.category, help="fetch photos that show it; several: a,b (%(default)s)")
    add("--limit", type=int, metavar="N", help="fetch N photos to train on, and a fifth as many to validate on")
    options = parser.parse_args(argv)
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit {options.limit} must be 1 or more")
    return options


def main(options: argparse.Namespace) -> int:
    """Downloads what is missing. Returns the exit code: 1 where photos did not come."""
    root, url, (train, val) = options.root, options.url.rstrip("/"), SPLITS
    with explain_write_errors(str(root)):
        for folder in (*SPLITS, "annotations"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        fetch_annotations(root, url)
    limits = {val: options.limit and -(-options.limit // 5), train: options.limit}
    photos = {split: find_photos(root, url, split, options.category)[:limit] for split, limit in limits.items()}
    missing = sum(not photo.path.exists() for wanted in photos.values() for photo in wanted)
    check_space(root, missing * PHOTO_BYTES, counted(missing, "photo"))
    if failed := sum(fetch_photos(wanted, split) for split, wanted in photos.items()):
        print(f"{counted(failed, 'photo')} did not come; the same command goes on", file=sys.stderr)
        return 1
    print("photos:", " and ".join(f"{len(wanted):,} in {root / split}" for split, wanted in photos.items()))
    return 0


def check_space(root: Path, needed: int, what: str) -> None:
    """Refuses now, with a DownloadError, what would fill the disk hours later."""
    free = shutil.disk_usage(root).free
    if free < needed:
        raise DownloadError(f"{root} has {free / 1e9:.1f} GB free and needs {needed / 1e9:.1f} GB for {what}")
    print(f"{what} to fetch: about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", flush=True)


def open_url(url: str, start: int = 0) -> http.client.HTTPResponse:
    """Returns the server's answer from this byte on, or from the first one if it has none there or knows no ranges.

    Raises a DownloadError if asking again would not help, else an OSError or HTTPException.
    """
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # it has no bytes there
            return open_url(url)
        if error.code >= 500 or error.code in (408, 429):  # it is busy
            raise
        raise DownloadError(f"{url}: HTTP {error.code} {error.reason}") from None
    except (ValueError, http.client.InvalidURL) as error:
        raise DownloadError(f"{url}: {error}") from None


def with_retries(fetch: Callable[[], Any], url: str, pause: Callable[[float], object]) -> Any:
    """Returns what `fetch` returns at one of several attempts; raises DownloadError if all fail.

    `pause` waits for so many seconds; if it returns True, there is no further attempt.
    """
    for delay in (*RETRY_DELAYS, None):
        try:
            return fetch()
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", "") or error
        if delay is None or pause(delay):
            break
    raise DownloadError(f"{url}: {reason}")


def progress_bar(name: str, total: int, unit: str, start: int = 0) -> tqdm:
    """Returns a progress bar; in a log file it appears twice a minute."""
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds
    return tqdm(desc=name, total=total, initial=start, unit=unit, unit_scale=True, mininterval=interval, maxinterval=30)


# --- annotations ------------------------------------------------------------------------------------------


def fetch_annotations(root: Path, url: str) -> None:
    """Downloads the zip with the annotation files, unless they are there, and unpacks these alone."""
    missing = [name for split in SPLITS if not (root / (name := f"annotations/instances_{split}.json")).exists()]
    if not missing:
        return
    check_space(root, ANNOTATION_BYTES, "annotations")
    archive, zip_url = root / "annotations" / ".annotations_trainval2017.zip", f"{url}/{ANNOTATIONS_ZIP}"
    with_retries(lambda: append_rest(zip_url, archive), zip_url, time.sleep)
    try:
        with zipfile.ZipFile(archive) as members:
            for name in missing:  # a damaged one is noticed by its checksum, and does not get its name
                with members.open(name) as source, atomic_write(root / name) as target:
                    shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        archive.unlink()
        raise DownloadError(f"{zip_url} is damaged or not COCO's ({error}): try again") from None
    archive.unlink()


def append_rest(url: str, path: Path) -> None:
    """Downloads what follows the bytes that an earlier attempt left in a file, or everything if that is impossible."""
    start = path.stat().st_size if path.exists() else 0
    with open_url(url, start) as response:
        start = start if response.status == 206 else 0
        total = start + int(response.headers["Content-Length"] or 0)  # without it the zip's checksums tell
        with open(path, "ab" if start else "wb") as file, progress_bar("annotations", total, "B", start) as progress:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                progress.update(len(chunk))
    if path.stat().st_size < total:
        raise ConnectionError(f"the connection ended after {path.stat().st_size:,} of {total:,} bytes")


# --- photos -----------------------------------------------------------------------------------------------


def find_photos(root: Path, url: str, split: str, category: str) -> list[WantedPhoto]:
    """Returns the photos of a split that the trainer uses, by name: the first ones are the same at every --limit."""
    annotations = root / "annotations" / f"instances_{split}.json"
    photos = {photo.file_name: photo for photo, _ in read_persons(annotations, defaultdict(list), category)}
    return [WantedPhoto(f"{url}/{split}/{quote(name)}", root / split / name, (photo.width, photo.height))
            for name, photo in sorted(photos.items())]  # fmt: skip


def fetch_photos(photos: list[WantedPhoto], name: str) -> int:
    """Fetches photos and prints a line for each that does not come. Returns their number, if it is not too large."""
    failed, stop = 0, threading.Event()
    with ThreadPoolExecutor(THREADS) as pool, progress_bar(name, len(photos), " photos") as progress:
        try:
            for future in as_completed([pool.submit(fetch_photo, photo, stop) for photo in photos]):
                if not (failure := future.result()):
                    progress.update()
                    continue
                failed += 1
                progress.write(failure, file=sys.stderr)
                if failed == MAX_FAILED:
                    raise DownloadError(f"{failed} photos did not come; the same command goes on")
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return failed


def fetch_photo(photo: WantedPhoto, stop: threading.Event) -> str:
    """Fetches a photo that is not there, or not whole. Returns why it did not come, or ""."""
    if is_whole(photo.path):
        return ""
    try:
        content = with_retries(lambda: read_photo(photo), photo.url, stop.wait)
    except DownloadError as error:
        return str(error)
    with explain_write_errors(str(photo.path)), atomic_write(photo.path) as file:
        file.write(content)
    return ""


def is_whole(path: Path) -> bool:
    """Returns whether there is a file that ends as a JPEG does."""
    with suppress(OSError), open(path, "rb") as file:
        file.seek(-len(JPEG_END), os.SEEK_END)
        return file.read() == JPEG_END
    return False


def read_photo(photo: WantedPhoto) -> bytes:
    """Returns the bytes of a photo; raises ValueError if they are not those of a photo of its size."""
    with open_url(photo.url) as response:
        content = response.read()
    if claimed_size(np.frombuffer(content, np.uint8)) not in (photo.size, photo.size[::-1]):
        raise ValueError("what came is no photo of {} x {} pixels".format(*photo.size))
    return content


def run_command(argv: list[str]) -> int:
    """Runs the whole program and returns its exit code: 0, 1 where photos did not come, 2 for a user's mistake."""
    interrupted = "stopped; the same command goes on from here"
    return run_cli("download_coco.py", lambda: main(parse(argv[1:])), interrupted=interrupted)


if __name__ == "__main__":
    sys.exit(run_command(sys.argv))
