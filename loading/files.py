"""Lists the files of a folder, and finds them by the names that annotations give them; none outside the folder."""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from urllib.parse import unquote

NO_PHOTOS_IN = ("@eaDir", "__MACOSX", "@Recycle", "#recycle", "$RECYCLE.BIN")  # thumbnails, and what was thrown away


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
        paths: dict[str, set[str]] = defaultdict(set)
        for file in filter(None, self._files.values()):
            for suffix in suffixes(file):
                paths[suffix].add(file)
        return paths

    @cached_property
    def _by_folded_suffix(self) -> dict[str, set[str]]:
        """The same without regard to case."""
        paths: dict[str, set[str]] = defaultdict(set)
        for suffix, files in self._by_suffix.items():
            paths[suffix.casefold()] |= files
        return paths

    def find(self, name: str) -> list[str]:
        """Returns the relative paths of the files that a name may mean; [""] if it leads through a link or is hidden.

        Annotation tools write folders, disks and addresses of their own before the name: where these do not exist, the
        files of the same base name that share most of the folders before it are returned, and if there is none, those
        whose name differs in its case alone. What lies outside the folder is never returned.
        """
        path = name if name in self._files else posixpath.normpath(name)
        file = self._files.get(path, self._files.get(composed(path)))
        if file is not None:
            return [file]
        folder, basename = posixpath.split(path)
        if folder and is_relative(path) and "\\" not in basename:  # Windows' separator, a letter elsewhere
            if composed(folder) in self._folders:
                return self._with_other_case(path)
            if os.path.isdir(self.path / folder):
                return [""]
        part = relative_part(name)
        return self._closest(part) or self._closest(unquote(part))

    def _with_other_case(self, path: str) -> list[str]:
        folded = composed(path).casefold()
        return sorted(file for file in self._by_folded_suffix.get(folded, ()) if composed(file).casefold() == folded)

    def _closest(self, name: str) -> list[str]:
        for by_suffix, key in ((self._by_suffix, str), (self._by_folded_suffix, str.casefold)):
            for end in map(key, suffixes(name)):
                if end in by_suffix:
                    return sorted(by_suffix[end])
        return []


def is_relative(name: str) -> bool:
    """Returns whether a name lies below the folder that it is relative to, on any system."""
    return not re.match(r"/|[A-Za-z]:|\\\\|[a-z]+://", name) and ".." not in re.split(r"[/\\]", name)


def relative_part(name: str) -> str:
    """Returns what of a name may lie below any folder: without the disk, address and ..; as the tool has quoted it.

    "file:///C:/photos/a%20b.jpg" -> "photos/a b.jpg", "/data/local-files/?d=set/a.jpg" -> "set/a.jpg".
    """
    if re.match(r"[a-z]+://|/.*\?", name):  # an address
        name = unquote(name.rpartition("?d=")[2].partition("?")[0])
    parts = re.split(r"[/\\]", re.sub(r"^([a-z]+://|[A-Za-z]:)", "", name))
    return "/".join(part for part in parts if part not in ("", ".", "..") and not re.fullmatch("[A-Za-z]:", part))


def suffixes(name: str) -> list[str]:
    """Returns a path in composed form, and without its first folders, longest first; \\ separates folders as well."""
    parts = composed(name).replace("\\", "/").split("/")
    return ["/".join(parts[first:]) for first in range(len(parts))]


def read_text(path: Path) -> str:
    """Returns a small text file that people or tools have written, in UTF-8 or UTF-16 with a mark; other bytes as ?."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return content.decode(encoding, errors="replace")


def composed(name: str) -> str:
    """Returns a name in composed Unicode form (NFC): macOS stores letters decomposed, JSON files do not."""
    return unicodedata.normalize("NFC", name)


def subfolders(root: Path) -> list[str]:
    """Returns the relative paths of a folder ("") and all folders below it, without hidden and linked ones."""
    paths = []
    for folder, names, _ in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in NO_PHOTOS_IN)
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
