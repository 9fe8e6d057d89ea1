"""What lies in a photo folder, under the names that annotations give; nothing that lies outside of it."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Collection
from functools import cached_property
from itertools import takewhile
from pathlib import Path

Files = dict[str, str]  # by a name, and by the composed Unicode form of it, the file's; "" for one that lies outside


class PhotoFolder:
    """A folder's files by the names that annotations give them.

    Args:
        path: the folder, which itself may lie wherever its owner wants it.
        names: all that will be asked for.

    Attributes:
        watched: the plain names of the folders whose change may change what is found.
    """

    def __init__(self, path: Path, names: Collection[str]):
        self.path = path
        self._plain = {folder: _on_disk(path, folder) for folder in {os.path.dirname(name) for name in names}}
        self._absent = {plain for plain in self._plain.values() if not (path / plain).is_dir()}
        self._tree = folders_of(path) if any(map(self._may_lie_elsewhere, names)) else []
        self.watched = sorted({*self._plain.values(), *self._tree})

    @cached_property
    def _files(self) -> dict[str, Files | None]:
        """By folder, listed when the first is asked for: whoever notes the folders' times has done so by then."""
        home = os.path.realpath(self.path)
        return {folder: files_in(self.path / folder, home) for folder in self.watched}

    @cached_property
    def _by_last(self) -> dict[str, list[str]]:
        return _by_last_part({folder: self._files[folder] for folder in self._tree})

    def find(self, name: str) -> list[str]:
        """The files that a name may mean, relative to the folder; [""] for one that does not lie in it.

        A name with folders that are not there is looked up by its last parts: annotation tools write their own.
        """
        folder, last = os.path.split(name)
        plain = self._plain[folder]
        files = self._files[plain]
        found = "" if files is None else files.get(last, files.get(composed(last)))
        if found is not None:
            return [f"{plain}/{found}" if plain and found else found]
        return _sharing_most(name, self._by_last) if self._may_lie_elsewhere(name) else []

    def _may_lie_elsewhere(self, name: str) -> bool:
        folder, last = os.path.split(name)
        return self._plain[folder] in self._absent or "\\" in last  # Windows' separator, elsewhere a letter


def _on_disk(photos: Path, folder: str) -> str:
    """A folder's plain name in the Unicode form of the disk: macOS takes letters apart that JSON writes as one."""
    forms = [folder, *(unicodedata.normalize(form, folder) for form in ("NFC", "NFD"))]
    found = os.path.normpath(next((form for form in forms if (photos / form).is_dir()), folder))
    return "" if found == "." else found


def folders_of(path: Path) -> list[str]:
    """The plain names of a folder, "", and of those under it; what is hidden or linked is none of them."""
    found = []
    for folder, names, _ in os.walk(path):
        names[:] = sorted(name for name in names if not name.startswith("."))
        found.append(Path(os.path.relpath(folder, path)).as_posix())
    return ["" if name == "." else name for name in found]


def files_in(folder: Path, home: str) -> Files | None:
    """None for a folder that does not lie under `home`: it is not even listed."""
    if not folder.is_dir():
        return {}
    if not _lies_in(folder, home):
        return None
    files = {}
    with os.scandir(folder) as entries:  # tells files and links apart without opening any
        for entry in entries:
            if entry.is_file(follow_symlinks=False):  # a pipe or a device would never end
                files[entry.name] = entry.name
            elif entry.is_symlink() and os.path.isfile(entry.path):
                files[entry.name] = entry.name if _lies_in(entry.path, home) else ""
    return {composed(name): found for name, found in files.items() if not name.isascii()} | files


def _lies_in(path: str | Path, home: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(home)


def composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _by_last_part(folders: dict[str, Files | None]) -> dict[str, list[str]]:
    """The relative paths of files by their last part, in composed form."""
    found = defaultdict(set)
    for folder, files in folders.items():
        for name in filter(None, (files or {}).values()):
            found[composed(name)].add(f"{folder}/{name}" if folder else name)
    return {name: sorted(paths) for name, paths in found.items()}


def _sharing_most(name: str, by_last: dict[str, list[str]]) -> list[str]:
    """Of the files of the name's last part those that have most of the parts before it as well."""
    parts = composed(name).replace("\\", "/").split("/")[::-1]
    shared = {}
    for path in by_last.get(parts[0], []):
        both = zip(parts, composed(path).split("/")[::-1], strict=False)
        shared[path] = len([*takewhile(lambda pair: pair[0] == pair[1], both)])
    return [path for path, number in shared.items() if number == max(shared.values())]
