"""Which photos there are, the file that each becomes, and what of that is still to be done."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cutting.photos import readable_extensions, what_helps
from cutting.png import read_note
from utils import UserError

Job = tuple[Path, Path]  # a photo and what is made of it
THERE = "made already"  # why an output is kept
OF_ANOTHER = "made of another photo"
FOREIGN = "not made by predict.py or changed since"
BESIDE = f"beside the photos and {FOREIGN}"


def plan(arguments: list[str], output: Path) -> tuple[list[Job], list[Path]]:
    """What is to be done, decided by the photos' names alone, so that a second run decides alike; and what cannot be.

    Raises:
        UserError: no such path, no photo in a folder, two outputs of one name, an output among the photos, a file as
            output of several.
    """
    names: dict[Path, Path] = {}  # in the output folder, by photo
    unknown = {}
    for argument in map(Path, arguments):
        if os.path.isdir(argument):
            photos, others = photos_in(argument, output)
            if not photos and not others:
                raise UserError(f"there is no photo in {argument}")
            names |= {photo: photo.relative_to(argument) for photo in photos}
            unknown |= dict.fromkeys(others)
        elif os.path.isfile(argument):
            names[argument] = Path(argument.name)
        else:
            raise UserError(f"there is no photo or folder {argument}")
    jobs = [(photo, output / name) for photo, name in with_png(names).items()]
    if names_a_file(output):
        if len(jobs) != 1 or any(map(os.path.isdir, arguments)):
            raise UserError(f"--output {output} is the name of one file: give one photo, or name a folder")
        jobs = [(photo, output) for photo in names]
    refuse_collisions(jobs)
    for folder in filter(os.path.isdir, arguments):
        refuse_mixing(folder, jobs, output)
    return jobs, list(unknown)


def names_a_file(output: Path) -> bool:
    """Whether it is a PNG that is to be written, not a folder for them.

    Raises:
        UserError: it is a file of another kind.
    """
    extension = output.suffix.lower()
    if os.path.isdir(output) or extension not in readable_extensions():
        return False
    if extension != ".png":
        raise UserError(f"--output {output}: what is written is a PNG, so name it *.png, or name a folder")
    return True


def photos_in(folder: Path, output: Path) -> tuple[list[Path], list[Path]]:
    """The photos in a folder and its subfolders, and those of kinds that cannot be read here.

    Without hidden ones and those in the output folder.

    Raises:
        UserError: the folder cannot be opened.
    """
    files, closed = files_under(folder, output)
    if folder in closed:
        raise UserError(f"{folder} cannot be opened")
    # What cannot be opened goes on the list as well, a folder or a link: reading it fails, and is named and counted.
    readable = readable_extensions()
    photos = [file for file in files if file.suffix.lower() in readable or not os.path.exists(file)]
    return photos + closed, [file for file in files if what_helps(file)]


def files_under(folder: Path, output: Path) -> tuple[list[Path], list[Path]]:
    """The files in a folder, its subfolders and those that are linked there; and the folders that cannot be opened."""
    output, files, closed = os.path.realpath(output), [], []
    for place, folders, names in os.walk(folder, onerror=closed.append, followlinks=True):
        shown = [Path(place, name) for name in sorted(folders) if name[0] != "."]
        folders[:] = [path.name for path in shown if os.path.realpath(path) != output and not leads_back(path, folder)]
        files += [Path(place, name) for name in sorted(names) if name[0] != "."]
    return files, [Path(error.filename) for error in closed]


def leads_back(path: Path, folder: Path) -> bool:
    """Whether a linked folder holds one that it was reached through, and so itself again and again."""
    if not path.is_symlink():
        return False
    passed = [Path(os.path.realpath(place)) for place in path.parents if place == folder or folder in place.parents]
    target = Path(os.path.realpath(path))
    return any(target == place or target in place.parents for place in passed)


def with_png(names: dict[Path, Path]) -> dict[Path, Path]:
    """a.jpg becomes a.png; beside another a it becomes a.jpg.png. No difference by capitals: some disks know none."""
    short = {photo: name.with_suffix(".png") for photo, name in names.items()}
    count = Counter(str(name).casefold() for name in short.values())
    full = {photo: name.with_name(name.name + ".png") for photo, name in names.items()}
    return {photo: short[photo] if count[str(short[photo]).casefold()] == 1 else full[photo] for photo in names}


def refuse_collisions(jobs: list[Job]) -> None:
    """Two photos must not become one file, and none be overwritten, over links or on disks without capitals neither."""
    first: dict[Path, Path] = {}
    photos = {os.path.realpath(photo).casefold() for photo, _ in jobs}
    for photo, output in jobs:
        if first.setdefault(output, photo) != photo:
            raise UserError(f"{first[output]} and {photo} would both become {output}: do them apart")
        if os.path.realpath(output).casefold() in photos:
            raise UserError(f"{output} would overwrite the photo of that name: choose another --output")


def refuse_mixing(folder: str, jobs: list[Job], output: Path) -> None:
    """Outputs that lie among the photos of a folder would be taken for photos by the next run."""
    inside, output = Path(os.path.realpath(folder)), Path(os.path.realpath(output))
    if inside not in output.parents and any(inside in Path(os.path.realpath(made)).parents for _, made in jobs):
        raise UserError(f"--output {output} would mix the results with the photos of {folder}: choose another")


# --- what is there already --------------------------------------------------------------------------------


class Origin(NamedTuple):
    """What an output was made of and how; it is noted in the output."""

    how: str  # by which model, in which style
    photo: str  # a digest of the photo's length and time, which cost no reading
    place: str  # a digest of where the photo lay

    def note(self) -> str:
        return "; ".join(self)


def origin_of(photo: Path, how: str) -> Origin:
    state = ""
    with suppress(OSError):  # whoever reads the photo will say so
        found = os.stat(photo)
        state = f"{found.st_size} {found.st_mtime_ns}"
    return Origin(how, digest(state), digest(os.path.realpath(photo)))


def digest(text: str) -> str:
    return hashlib.blake2b(os.fsencode(text), digest_size=6).hexdigest()


def remaining(jobs: list[Job], how: str, overwrite: bool, by_name: bool) -> tuple[list[Job], dict[str, list[Path]]]:
    """What is to be done, given what is there already; and the outputs that stay, by the reason.

    Args:
        how: by which model and in which style.
        overwrite: whatever is there is made again, but for files beside the photos that are not from predict.py.
        by_name: these as well: the user has named the file.
    """
    folders = set() if by_name else {os.path.realpath(photo.parent) for photo, _ in jobs}
    todo, kept = [], {}
    for photo, made in jobs:
        if reason := why_kept(photo, made, how, overwrite, os.path.realpath(made.parent) in folders):
            kept.setdefault(reason, []).append(made)
        else:
            todo.append((photo, made))
    return todo, kept


def why_kept(photo: Path, made: Path, how: str, overwrite: bool, beside: bool) -> str:
    """The reason for which an output stays; "" where it is to be made, or to be made again."""
    if not os.path.exists(made):
        return ""
    noted = read_note(made).split("; ")
    if len(noted) != len(Origin._fields):
        return BESIDE if beside else "" if overwrite else FOREIGN
    if overwrite:
        return ""
    before, now = Origin(*noted), origin_of(photo, how)
    if before.photo != now.photo:
        return "" if before.place == now.place else OF_ANOTHER  # it has changed since, or was never this one
    return THERE if before.how == now.how else ""
