"""Fetches of COCO 2017 what the trainer needs, to where it looks for it. Stopped halfway, it goes on when rerun.

    python tools/download_coco.py                                the photos that show persons, into data/coco
    python tools/download_coco.py --limit 500                    a first look: 500 to train on, 100 to validate on
    python tools/download_coco.py --category cat,dog             the photos that show something else
    python tools/download_coco.py --root /disk/coco              elsewhere: trainer.py --data-root /disk/coco
    python tools/download_coco.py --url https://a.mirror/coco    from a mirror with the same folders
    python tools/download_coco.py --zips                         all 123,287 photos, in COCO's two zips

Of persons there are 66,808 photos, about 11 GB, beside 0.7 GB of annotations and their zip. A photo that is there and
whole stays as it is. With --zips about 20 GB come down and unpack to about the same; each zip is deleted once it is
unpacked. A zip of your own is used where it lies in the root (train2017.zip beside annotations/) and kept.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import shutil
import sys
import tempfile
import time
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it is in tools/ that Python looks

from loading.annotations import read_persons, safe_name
from loading.layout import AS_COCO, COCO_HOME, SPLITS
from tools.fetching import DROPPED, RETRY_DELAYS, DownloadError, Failure, Wanted, bar, described, fetch_all, open_at
from training.settings import OneLineParser, UsageError
from training.streams import steady_streams
from utils import UserError, counted

URL = "http://images.cocodataset.org"
WORK = ".download_coco"  # in the root, for what is not complete yet; nothing outside of it is ever deleted
ONE_BY_ONE = "one_by_one"  # in there, where the photo folders are not what the zips hold
CHUNK = 2**20  # bytes
PHOTO_BYTES = 170_000  # of one of COCO's as a rule, with what it loses to the blocks of a disk
LISTED = 50  # photos that did not come: of more the number is told
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
            reason = f"{url}: {described(error)}"
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
    """Download and unpack those of the archives that root lacks, one after the other."""
    lacking = [a for a in archives if any(is_missing(root / target) for target in a.targets)]
    if not lacking:
        return
    for left_by_a_killed_run in (root / WORK).glob("unpacking-*"):
        shutil.rmtree(left_by_a_killed_run)
    check_space(lacking, root)
    for archive in lacking:
        own, ours = root / archive.name, root / WORK / archive.name
        if not own.exists():
            download(f"{url}/{archive.folder}/{archive.name}", ours)
        unpack(own if own.exists() else ours, root, archive.targets)
        ours.unlink(missing_ok=True)


def fetch_zips(root: Path, url: str) -> int:
    """All of COCO's photos. Returns the exit code."""
    filled = [root / split for split in SPLITS if not is_missing(root / split)]
    if filled and (root / WORK / ONE_BY_ONE).exists():
        raise DownloadError(f"{filled[0]} holds photos that were fetched one by one: go on without --zips, or delete "
                            f"{' and '.join(map(str, filled))}")  # fmt: skip
    complete(root, url, ARCHIVES)
    shutil.rmtree(root / WORK, ignore_errors=True)
    print(f"COCO 2017 is complete in {root}")
    return 0


# --- the photos one by one --------------------------------------------------------------------------------


def fetch_photos(root: Path, url: str, category: str, limit: int | None) -> int:
    """The annotations and the photos that show the category, those to validate on first. Returns the exit code."""
    complete(root, url, ARCHIVES[:1])
    limits = dict(zip(SPLITS, (limit, limit and -(-limit // 5)), strict=True))
    photos = {split: find_photos(root, url, split, category)[: limits[split]] for split in SPLITS[::-1]}
    check_space_for([photo for wanted in photos.values() for photo in wanted], root)
    failures = [failure for split, wanted in photos.items() for failure in fetch_all(wanted, split)]
    if not failures:
        numbers = " and ".join(f"{len(wanted):,} in {root / split}" for split, wanted in photos.items())
        print(f"all photos that show {category} are there: {numbers}" if not limit else f"photos: {numbers}")
    return tell(failures)


def find_photos(root: Path, url: str, split: str, category: str) -> list[Wanted]:
    """The photos that the trainer takes of a split, by name: a small number of them is a part of a larger one."""
    annotations = root / "annotations" / f"instances_{split}.json"
    persons = read_persons(annotations, defaultdict(list), category)
    photos = {safe_name(photo, annotations): photo for photo, _ in persons}
    return [Wanted(f"{url}/{split}/{quote(name)}", root / split / name, (photo.width, photo.height))
            for name, photo in sorted(photos.items())]  # fmt: skip


def check_space_for(photos: list[Wanted], root: Path) -> None:
    """Say how much is to come, refuse what would fill the disk, and note that the folders are no longer the zips'."""
    there = {name for split in SPLITS if (root / split).is_dir() for name in os.listdir(root / split)}
    missing = sum(photo.path.name not in there for photo in photos)
    need, free = missing * PHOTO_BYTES, shutil.disk_usage(root).free
    sizes = f"about {need / 1e9:.1f} GB in {root}, {free / 1e9:.1f} GB are free"
    if free < need:
        raise DownloadError(f"the disk is too small: {missing:,} photos need {sizes}")
    print(f"{missing:,} of {len(photos):,} photos to fetch: {sizes}", flush=True)
    if missing:
        (root / WORK / ONE_BY_ONE).touch()


def tell(failures: list[Failure]) -> int:
    """Lists the photos that did not come. Returns the exit code."""
    if not failures:
        return 0
    more = [f"and {len(failures) - LISTED:,} more"] * (len(failures) > LISTED)
    print(f"{counted(len(failures), 'photo')} did not come; the same command goes on:",
          *[failure.reason for failure in failures[:LISTED]], *more, sep="\n  ", file=sys.stderr)  # fmt: skip
    return 1


# --- the command line -------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options.

    Raises:
        UsageError: flags that cannot be.
    """
    parser = OneLineParser(description="Fetch of COCO 2017 what trainer.py needs; the same command again goes on.")
    add = parser.add_argument
    add("--root", type=Path, default=COCO_HOME, help="the folder (%(default)s)")
    add("--url", default=URL, help="the server or a mirror of it (%(default)s)")
    add("--category", default=AS_COCO.category, help="fetch the photos that show it; several: a,b (%(default)s)")
    add("--limit", type=int, metavar="N", help="for a first look N photos to train on, and a fifth as many to validate")
    add("--zips", action="store_true", help="fetch all photos in COCO's zips instead, whatever they show")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit {args.limit}: at least 1 photo")
    if args.zips and (args.limit or args.category != AS_COCO.category):
        raise UsageError("--zips takes all photos: --category and --limit choose among them")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    steady_streams()
    try:
        args = parse(argv)
        root, url = args.root, args.url.rstrip("/")
        (root / WORK).mkdir(parents=True, exist_ok=True)
        with (root / WORK / "lock").open("w") as lock:
            claim(lock)
            return fetch_zips(root, url) if args.zips else fetch_photos(root, url, args.category, args.limit)
    except KeyboardInterrupt:
        print("\nstopped; run this again to go on from here", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
