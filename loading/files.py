"""Lists the files of a folder, and finds them by the names that annotations give them; none outside the folder."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from operator import attrgetter
from pathlib import Path


class PhotoFolder:
    """Finds the files of a folder, which may itself be a link, by the names that annotations give them."""

    def __init__(self, path: Path):
        self.path = path
        self._folders = {composed(folder) for folder in subfolders(path)}

    @cached_property
    def _files(self) -> dict[str, str]:
        """The files' relative paths by themselves and in composed form; "" for a link that leaves the folder."""
        files = {name: name if is_inside else "" for name, is_inside in all_files(self.path)}
        return {composed(name): file for name, file in files.items() if not name.isascii()} | files

    @cached_property
    def _by_suffix(self) -> dict[str, set[str]]:
        """The files' relative paths by each of their last parts: c.jpg, b/c.jpg and a/b/c.jpg, in composed form."""
        paths = defaultdict(set)
        for file in filter(None, self._files.values()):
            for suffix in suffixes(file):
                paths[suffix].add(file)
        return paths

    def find(self, name: str) -> list[str]:
        """Returns the relative paths of the files that a name may mean; [""] if it leads through a link or is hidden.

        Annotation tools write folders of their own before the name: where these do not exist, the files of the same
        base name that share most of the folders before it are returned.
        """
        path = name if name in self._files else posixpath.normpath(name)
        file = self._files.get(path, self._files.get(composed(path)))
        if file is not None:
            return [file]
        folder, basename = posixpath.split(path)
        if composed(folder) in self._folders:
            return self._closest(path) if "\\" in basename else []  # Windows' separator, a letter elsewhere
        return [""] if os.path.isdir(self.path / folder) else self._closest(path)

    def _closest(self, name: str) -> list[str]:
        return next((sorted(self._by_suffix[end]) for end in suffixes(name) if end in self._by_suffix), [])


def suffixes(name: str) -> list[str]:
    """Returns a path in composed form, and without its first folders, longest first; \\ separates folders as well."""
    parts = composed(name).replace("\\", "/").split("/")
    return ["/".join(parts[first:]) for first in range(len(parts))]


def composed(name: str) -> str:
    """Returns a name in composed Unicode form (NFC): macOS stores letters decomposed, JSON files do not."""
    return unicodedata.normalize("NFC", name)


def subfolders(root: Path) -> list[str]:
    """Returns the relative paths of a folder ("") and all folders below it, without hidden and linked ones."""
    paths = []
    for folder, names, _ in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith("."))
        paths.append(Path(os.path.relpath(folder, root)).as_posix())
    return ["" if path == "." else path for path in paths]


def all_files(root: Path) -> Iterator[tuple[str, bool]]:
    """Yields the relative paths of the files below a folder, without hidden ones, and whether each lies in it.

    A linked file lies in it if its target does.
    """
    target = os.path.realpath(root)
    for folder in subfolders(root):
        prefix = f"{folder}/" if folder else ""
        with os.scandir(root / folder) as entries:  # tells files and links apart without opening any
            for entry in sorted(entries, key=attrgetter("name")):
                is_file = entry.is_file(follow_symlinks=False)  # no pipe or device: reading one would never end
                if (is_file or (entry.is_symlink() and os.path.isfile(entry.path))) and not entry.name.startswith("."):
                    yield prefix + entry.name, is_file or Path(os.path.realpath(entry.path)).is_relative_to(target)
