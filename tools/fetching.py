"""Many photos from a server, side by side: each is checked before it gets its name, and tried again if it failed."""

from __future__ import annotations

import http.client
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from loading.headers import JPEG_START, Size, claimed_size
from utils import UserError, atomic_write, writing_to

RETRY_DELAYS = (1, 3, 10, 30)  # seconds; they begin anew when an attempt brought something
TIMEOUT = 30  # seconds without a byte after which a connection counts as dropped
LONGEST = 300  # seconds that a photo may take as a whole
MOST_BYTES = 2**26  # of a photo: more is something else
THREADS = 32  # photos at a time: the server's distance costs more than its bytes
MANY_IN_A_ROW = 100  # photos that failed one after another: it is the server, or the network
LAST_MOMENT = 1.0  # seconds for the threads to finish what they write
CHUNK = 2**16  # bytes
JPEG_END = b"\xff\xd9"
DROPPED = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)

Item, Result = TypeVar("Item"), TypeVar("Result")


class DownloadError(UserError):
    """It cannot go on; the message is one line for the user."""


class Wanted(NamedTuple):
    """A photo to fetch."""

    url: str
    path: Path
    size: Size  # that the annotations give it


class Failure(NamedTuple):
    """A photo that did not come."""

    photo: Wanted
    reason: str  # with the address
    is_final: bool = False  # to ask again is of no use


# --- all of them ------------------------------------------------------------------------------------------


def fetch_all(photos: list[Wanted], name: str) -> list[Failure]:
    """Brings the photos that are not there, or not whole. Returns those that did not come after all attempts.

    Raises:
        DownloadError: one cannot be written.
    """
    given_up, left, delays = [], photos, list(RETRY_DELAYS)
    with bar(name, len(photos), " photos") as progress:
        while True:
            before = progress.n
            failures, untried = fetch_once(left, progress)
            given_up += [failure for failure in failures if failure.is_final]
            again = [failure for failure in failures if not failure.is_final]
            delays = list(RETRY_DELAYS) if progress.n > before else delays
            if not again or not delays:
                return given_up + again + [Failure(photo, f"{photo.url}: not tried any more") for photo in untried]
            left, delay = [failure.photo for failure in again] + untried, delays.pop(0)
            progress.write(f"{again[0].reason}; {len(left)} left, trying again in {delay} s", file=sys.stdout)
            time.sleep(delay)


def fetch_once(photos: list[Wanted], progress: tqdm) -> tuple[list[Failure], list[Wanted]]:
    """Tries each, until too many in a row have failed. Returns what failed, and the photos that it did not come to."""
    failures, tried, in_a_row = [], set(), 0
    with closing(side_by_side(bring, photos, THREADS)) as results:
        for photo, failure in results:
            tried.add(photo)
            in_a_row = in_a_row + 1 if failure else 0
            failures += [failure] if failure else []
            progress.update(not failure)
            if in_a_row >= MANY_IN_A_ROW:
                break
    return failures, [photo for photo in photos if photo not in tried]


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[tuple[Item, Result]]:
    """Each item with what the work makes of it, as they are done. The first error ends it.

    The threads end with the program, whatever they wait for: Ctrl-C need not wait for a server that does not answer.
    """
    waiting, done, stopped = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
    number = sum(1 for item in items if waiting.put(item) is None)

    def run() -> None:
        with suppress(queue.Empty):
            while not stopped.is_set():
                item = waiting.get_nowait()
                try:
                    done.put((item, work(item), None))
                except BaseException as error:
                    done.put((item, None, error))

    pool = []
    try:
        for _ in range(min(threads, number)):
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            pool.append(thread)
        for _ in range(number):
            item, result, error = done.get()
            if error:
                raise error
            yield item, result
    finally:
        stopped.set()
        end = time.monotonic() + LAST_MOMENT
        for thread in pool:
            thread.join(max(0, end - time.monotonic()))


# --- one of them ------------------------------------------------------------------------------------------

WRITING: dict[Path, threading.Lock] = {}  # two threads may have fetched the same photo: each has one draft


def bring(photo: Wanted) -> Failure | None:
    """Fetches a photo that is not there, or not whole.

    Raises:
        DownloadError: it cannot be written.
    """
    if looks_whole(photo.path):
        return None
    try:
        content = get(photo.url)
        problem = what_is_wrong(content, photo)
    except DownloadError as error:
        return Failure(photo, str(error), is_final=True)
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a length that is no number
        problem = described(error)
    if problem:
        return Failure(photo, f"{photo.url}: {problem}")
    with WRITING.setdefault(photo.path, threading.Lock()), writing_to(str(photo.path)):
        if looks_whole(photo.path):  # a thread of the round before, that was waiting for the server, has brought it
            return None
        photo.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(photo.path) as file:
            file.write(content)
    return None


def looks_whole(path: Path) -> bool:
    """Whether a JPEG is there from its first bytes to its last; what lies between was checked when it came."""
    with suppress(OSError), open(path, "rb", buffering=0) as file:
        start = file.read(2)
        file.seek(-2, os.SEEK_END)
        return start == JPEG_START and file.read(2) == JPEG_END
    return False


def what_is_wrong(content: bytes, photo: Wanted) -> str:
    """Why what came is not the photo; "" if it is."""
    size = claimed_size(np.frombuffer(content, np.uint8)) if content.startswith(JPEG_START) else None
    if not size or photo.size not in (size, size[::-1]):
        found = "{} x {} pixels".format(*size) if size else "no JPEG"
        return f"{found} came, and not {photo.size[0]} x {photo.size[1]} pixels"
    if not content.endswith(JPEG_END) and content != of_disk(photo.path) and content != get(photo.url):
        return "it ends too early"  # and a photo that the server itself has so comes twice alike
    return ""


def of_disk(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def get(url: str) -> bytes:
    """The whole answer.

    Raises:
        DownloadError: as `open_at`.
        OSError, HTTPException: there was none, or not all of it.
    """
    end, content = time.monotonic() + LONGEST, bytearray()
    with open_at(url, 0) as response:
        total = response.headers.get("Content-Length")
        while chunk := response.read1(CHUNK):
            content += chunk
            if time.monotonic() > end or len(content) > MOST_BYTES:
                raise ConnectionError(f"{len(content):,} bytes came, and no end")
    if total is not None and len(content) != int(total):
        raise ConnectionError(f"the connection ended after {len(content):,} of {int(total):,} bytes")
    return bytes(content)


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


def described(error: Exception) -> str:
    """What the network, or Python, says of it."""
    reason = "" if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", "")
    return str(reason or error) or type(error).__name__


def bar(name: str, total: int | None, unit: str, start: int = 0) -> tqdm:
    """A progress bar; in a log file it shows up twice a minute only."""
    pause = 0.1 if sys.stderr.isatty() else 30  # seconds
    return tqdm(desc=name, total=total, initial=start, unit=unit, unit_scale=True, mininterval=pause, maxinterval=30)
