"""Fetches COCO 2017 and unpacks it where the trainer looks for it. Stopped halfway, it goes on when rerun.

    python tools/download_coco.py                                into data/coco
    python tools/download_coco.py --root /disk/coco              elsewhere: trainer.py --data-root /disk/coco
    python tools/download_coco.py --url https://a.mirror/coco    from a mirror with the same folders

About 20 GB come down and unpack to about the same; each zip is deleted once it is unpacked. A zip of your own
is used where it lies in the root (train2017.zip beside annotations/) and kept. What is there stays as it is.
"""

from __future__ import annotations

import argparse
import http.client
import re
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it is in tools/ that Python looks

from training.streams import steady_streams

URL = "http://images.cocodataset.org"
WORK = ".download_coco"  # in the root, for what is not complete yet; nothing outside of it is ever deleted
RETRY_DELAYS = (1, 3, 10, 30)  # seconds; they begin anew when an attempt brought something
TIMEOUT = 30  # seconds without a byte after which a connection counts as dropped
CHUNK = 2**20  # bytes
DROPPED = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError)  # as zipfile puts it


class Archive(NamedTuple):
    folder: str  # on the server
    name: str
    targets: tuple[str, ...]  # what of it the trainer needs: files, or folders with a slash at the end
    download: int  # bytes
    unpacked: int  # bytes, with what many small files lose to the blocks of a disk


ANNOTATIONS = ("annotations/instances_train2017.json", "annotations/instances_val2017.json")
ARCHIVES = (  # the small ones first: what goes wrong shows before the long download
    Archive("annotations", "annotations_trainval2017.zip", ANNOTATIONS, 252_907_541, 470_000_000),
    Archive("zips", "val2017.zip", ("val2017/",), 815_585_330, 830_000_000),
    Archive("zips", "train2017.zip", ("train2017/",), 19_336_861_798, 19_700_000_000),
)


class DownloadError(Exception):
    """It cannot go on; the message is one line for the user."""


def download(url: str, path: Path) -> None:
    """Fetch url to path, going on with what an earlier attempt left in path.part."""
    part = path.with_name(path.name + ".part")
    furthest, failures = size_of(part), 0
    while not path.exists():
        try:
            fetch(url, part)
            part.rename(path)
        except DROPPED as error:
            if size_of(part) > furthest:
                furthest, failures = size_of(part), 0
            reason = f"{url}: {getattr(error, 'reason', error)}"
            if failures == len(RETRY_DELAYS):
                raise DownloadError(f"{reason}; run this again to go on") from None
            print(f"{reason}; trying again in {RETRY_DELAYS[failures]} s", flush=True)
            time.sleep(RETRY_DELAYS[failures])
            failures += 1


def fetch(url: str, part: Path) -> None:
    """One attempt to add what part lacks."""
    offset = size_of(part)
    with open_at(url, offset) as response:
        start, total = extent(response)
        if offset and offset == total:
            return
        if start not in (0, offset):
            raise ConnectionError("the server sent another range than was asked for")
        # a server that knows no ranges begins at the first byte, and then so does the file
        with part.open("ab" if start else "wb") as file, bar(part.stem, total, "B", start) as progress:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                progress.update(len(chunk))
    if total is not None and size_of(part) != total:
        raise ConnectionError(f"the connection ended after {size_of(part):,} of {total:,} bytes")


def open_at(url: str, offset: int) -> http.client.HTTPResponse:
    """The answer to a request for the bytes from offset on; some servers answer with all of them."""
    try:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and offset:  # nothing after offset: the length of the whole tells if that is all
            return open_at(url, 0)
        if error.code >= 500 or error.code in (408, 429):  # busy
            raise
        raise DownloadError(f"{url}: HTTP {error.code} {error.reason}") from None
    except (ValueError, http.client.InvalidURL) as error:
        raise DownloadError(f"{url}: {error}") from None


def extent(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """The first byte of the answer and the size of the whole file, None where the server does not tell it."""
    given = re.match(r"bytes (\d+)-\d+/(\d+)?", response.headers.get("Content-Range", ""))
    size = given[2] if given else response.headers.get("Content-Length")
    return int(given[1]) if given else 0, int(size) if size else None


def unpack(archive: Path, root: Path, targets: Sequence[str]) -> None:
    """Bring the targets that root lacks out of the archive, each of them whole or not at all."""
    (root / WORK).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unpacking-", dir=root / WORK) as folder:
        try:
            extract(archive, Path(folder), targets)
        except DAMAGED as error:
            raise DownloadError(f"{archive} is damaged ({error}): delete it and run this again") from None
        for target in targets:
            if is_missing(root / target):
                (root / target).parent.mkdir(exist_ok=True)
                (Path(folder) / target).rename(root / target)


def extract(archive: Path, folder: Path, targets: Sequence[str]) -> None:
    """Write what the targets need into folder; zipfile checks the CRC of each file."""
    with zipfile.ZipFile(archive) as bundle:
        names = [name for name in bundle.namelist() if not name.endswith("/")]
        odd = [f"{n!r} leads out of it" for n in names if n.startswith("/") or ".." in n.split("/")]
        odd += [f"no {target} in it" for target in targets if not any(n.startswith(target) for n in names)]
        if odd:
            raise DownloadError(f"{archive} is not COCO's ({odd[0]}): delete it and run this again")
        wanted = [name for name in names if name.startswith(tuple(targets))]
        with bar(f"{archive.name} unpacked", len(wanted), " files") as progress:
            for name in wanted:
                bundle.extract(name, folder)
                progress.update()


def is_missing(place: Path) -> bool:
    """Nothing is there, or an empty folder; a filled one counts as whole, for unpack makes no other."""
    return not place.exists() or (place.is_dir() and not any(place.iterdir()))


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def bar(name: str, total: int | None, unit: str, start: int = 0) -> tqdm:
    """A progress bar; in a log file it shows up twice a minute only."""
    pause = 0.1 if sys.stderr.isatty() else 30  # seconds
    return tqdm(desc=name, total=total, initial=start, unit=unit, unit_scale=True,
                mininterval=pause, maxinterval=30)


def check_space(archives: Sequence[Archive], root: Path) -> None:
    """Say how much is needed, and refuse now what would fill the disk hours later."""
    to_come = unpacked = peak = 0
    for archive in archives:
        there = (root / archive.name, root / WORK / archive.name, root / WORK / f"{archive.name}.part")
        rest = max(0, archive.download - max(map(size_of, there)))
        peak = max(peak, unpacked + rest + archive.unpacked)  # the zips before this one are deleted by then
        to_come, unpacked = to_come + rest, unpacked + archive.unpacked
    free = shutil.disk_usage(root).free
    need = f"{peak / 1e9:.1f} GB in {root} meanwhile, {free / 1e9:.1f} GB are free"
    if free < peak:
        raise DownloadError(f"the disk is too small: COCO 2017 needs {need}")
    print(f"{to_come / 1e9:.1f} GB to download, {unpacked / 1e9:.1f} GB unpacked; needs {need}", flush=True)


def claim(lock: TextIO) -> None:
    """Refuse a second run into the same root: the two would write into each other's files."""
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DownloadError("another download into this root is running") from None
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks


def complete(root: Path, url: str, archives: Sequence[Archive]) -> None:
    """Download and unpack the archives, one after the other."""
    for left_by_a_killed_run in (root / WORK).glob("unpacking-*"):
        shutil.rmtree(left_by_a_killed_run)
    check_space(archives, root)
    for archive in archives:
        own, ours = root / archive.name, root / WORK / archive.name
        if not own.exists():
            download(f"{url}/{archive.folder}/{archive.name}", ours)
        unpack(own if own.exists() else ours, root, archive.targets)
        ours.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Download COCO 2017 for trainer.py; run it again to go on.")
    parser.add_argument("--root", type=Path, default=Path("data/coco"), help="the folder (%(default)s)")
    parser.add_argument("--url", default=URL, help="the server or a mirror of it (%(default)s)")
    steady_streams()
    args = parser.parse_args(argv)
    try:
        lacking = [a for a in ARCHIVES if any(is_missing(args.root / target) for target in a.targets)]
        if lacking:
            (args.root / WORK).mkdir(parents=True, exist_ok=True)
            with (args.root / WORK / "lock").open("w") as lock:
                claim(lock)
                complete(args.root, args.url.rstrip("/"), lacking)
        shutil.rmtree(args.root / WORK, ignore_errors=True)
    except KeyboardInterrupt:
        print("\nstopped; run this again to go on from here", file=sys.stderr)
        return 130
    except (DownloadError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"COCO 2017 is complete in {args.root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
