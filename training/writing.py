"""Files that a run does not wait for: they are written in a thread of their own, while the training goes on."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from concurrent import futures

from utils import CheckpointError


class Writer:
    """Does one piece of work after another in its thread; what comes of them is told where it is asked for.

    No process is forked before it rests: it would begin with whatever lock the thread holds, and for ever.
    """

    def __init__(self):
        self._pool = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._works: list[tuple[str, futures.Future]] = []
        if hasattr(os, "register_at_fork"):
            writer = weakref.ref(self)
            os.register_at_fork(before=lambda: writer() and writer().rest())

    def submit(self, name: str, work: Callable[[], object]) -> None:
        """To be done once all that was handed over before is. What it needs must not change any more."""
        self._works.append((name, self._pool.submit(work)))

    def rest(self) -> None:
        """Waits until all is done, well or not."""
        futures.wait([work for _, work in self._works])

    def collect(self) -> list[str]:
        """Tells of what could not be written, of all that was done since the last time. Returns the names of it.

        Raises:
            Exception: whatever else a piece of work has met, once.
        """
        failed = []
        while self._works and self._works[0][1].done():
            name, work = self._works.pop(0)
            if not tried(work.result):
                failed.append(name)
        return failed

    def close(self) -> None:
        """Waits and collects for the last time; raises as `collect`."""
        self._pool.shutdown()
        self.collect()


def tried(save: Callable[[], object]) -> bool:
    """Whether a file could be written; if not, it is said, and the training goes on."""
    try:
        save()
    except (CheckpointError, OSError) as error:
        named = isinstance(error, OSError) and error.filename
        what = f"{error.filename} cannot be written: {error.strerror}" if named else error
        print(f"{what}: the training goes on, and it will be tried again", flush=True)
        return False
    return True
