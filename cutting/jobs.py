"""Decides which photos become which files, and which of these are still to be made."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

from cutting.photos import decoder_advice, readable_extensions
from cutting.png import read_note
from loading.files import NO_PHOTOS_IN
from utils import UserError

Job = tuple[Path, Path]  # a photo and its output
# Why an output is kept:
UP_TO_DATE = "made already (--overwrite to replace)"
OF_ANOTHER = "made of another photo (--overwrite to replace)"
FOREIGN = "not made by predict.py or changed since (--overwrite to replace)"
BESIDE_INPUT = "beside the photos, not made by predict.py or changed since (--output FILE --overwrite to replace)"


def plan(arguments: list[str], output: Path) -> tuple[list[Job], list[Path]]:
    """Returns the jobs for photos and folders of photos, and the photos of kinds that cannot be read here.

    Raises UserError if a path does not exist, a folder holds no photo, or an output would do harm.
    """
    names: dict[Path, Path] = {}  # photo: its path below the output folder
    unreadable: dict[Path, None] = {}
    folders = [Path(argument) for argument in arguments if os.path.isdir(argument)]
    for argument in map(Path, arguments):
        if argument in folders:
            photos, others = photos_in(argument, output)
            if not photos and not others:
                raise UserError(f"there is no photo in {argument}")
            names |= {photo: photo.relative_to(argument) for photo in photos}
            unreadable |= dict.fromkeys(others)
        elif os.path.isfile(argument):
            names[argument] = Path(argument.name)
        else:
            raise UserError(f"there is no photo or folder {argument}")
    jobs = [(photo, output / name) for photo, name in with_png(names).items()]
    if names_a_file(output):
        if len(jobs) != 1 or folders:
            raise UserError(f"--output {output} is the name of one file: give one photo, or name a folder")
        jobs = [(photo, output) for photo in names]
    check_outputs(jobs, folders, output)
    return jobs, list(unreadable)


def names_a_file(output: Path) -> bool:
    """Returns whether --output names a PNG rather than a folder; raises UserError for a picture of another kind."""
    extension = output.suffix.lower()
    if os.path.isdir(output) or extension not in readable_extensions():
        return False
    if extension != ".png":
        raise UserError(f"--output {output}: what is written is a PNG, so name it *.png, or name a folder")
    return True


def photos_in(folder: Path, output: Path) -> tuple[list[Path], list[Path]]:
    """Returns a folder's photos, also those of its subfolders, and those of kinds that cannot be read here.

    Hidden ones, thumbnails and those in the output folder are left out. Raises UserError if the folder cannot be
    opened.
    """
    files: list[Path] = []
    errors: list[OSError] = []
    for parent, subfolders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        paths = [Path(parent, name) for name in sorted(subfolders) if name[0] != "." and name not in NO_PHOTOS_IN]
        subfolders[:] = [path.name for path in paths if not (is_same(path, output) or loops(path, folder))]
        files += [Path(parent, name) for name in sorted(names) if name[0] != "."]
    closed = [Path(error.filename) for error in errors]
    if folder in closed:
        raise UserError(f"{folder} cannot be opened")
    # Folders and links that cannot be opened are listed too: reading them fails, and is reported and counted.
    readable = readable_extensions()
    photos = [file for file in files if file.suffix.lower() in readable or not os.path.exists(file)]
    return photos + closed, [file for file in files if decoder_advice(file)]


def is_same(path: Path, other: Path) -> bool:
    """Returns whether two paths, whether or not they exist, lead to the same place."""
    return os.path.realpath(path) == os.path.realpath(other)


def loops(path: Path, top: Path) -> bool:
    """Returns whether a linked folder contains one on the way to it from `top`, and so itself again and again."""
    if not path.is_symlink():
        return False
    passed = (Path(os.path.realpath(parent)) for parent in path.parents if parent.is_relative_to(top))
    return any(folder.is_relative_to(os.path.realpath(path)) for folder in passed)


def with_png(names: dict[Path, Path]) -> dict[Path, Path]:
    """Renames a.jpg to a.png, or to a.jpg.png if another photo becomes a.png too; or A.png, the same on some disks."""
    stems = {photo: str(name.with_suffix("")).casefold() for photo, name in names.items()}
    count = Counter(stems.values())
    return {photo: name.with_suffix(".png") if count[stems[photo]] == 1 else name.with_name(f"{name.name}.png")
            for photo, name in names.items()}  # fmt: skip


def check_outputs(jobs: list[Job], folders: list[Path], output: Path) -> None:
    """Raises UserError if an output is that of two photos, overwrites one, or is put among them."""
    first: dict[Path, Path] = {}
    photos = {os.path.realpath(photo).casefold() for photo, _ in jobs}
    for photo, made in jobs:
        if first.setdefault(made, photo) != photo:
            raise UserError(f"{first[made]} and {photo} would both become {made}: do them apart")
        if os.path.realpath(made).casefold() in photos:
            raise UserError(f"{made} would overwrite the photo of that name: choose another --output")
    for folder in (Path(os.path.realpath(folder)) for folder in folders):
        lands_inside = any(folder in Path(os.path.realpath(made)).parents for _, made in jobs)
        if lands_inside and folder not in Path(os.path.realpath(output)).parents:
            raise UserError(f"--output {output} would mix the results with the photos of {folder}: choose another")


def origin(photo: Path, how: str) -> tuple[str, str, str]:
    """Returns what an output's note holds: how it is made, digests of the photo's size and time and of its path."""
    state = ""
    with suppress(OSError):  # whoever reads the photo reports it
        stat = os.stat(photo)
        state = f"{stat.st_size} {stat.st_mtime_ns}"
    digests = [hashlib.blake2b(os.fsencode(text), digest_size=6) for text in (state, os.path.realpath(photo))]
    return how, digests[0].hexdigest(), digests[1].hexdigest()


def split_jobs(jobs: list[Job], how: str, overwrite: bool, by_name: bool) -> tuple[list[Job], dict[str, list[Path]]]:
    """Returns the jobs that are to be done, and the outputs that are kept, by the reason.

    `how` says by which model and in which style outputs are made, `by_name` whether the user has named the output file.
    """
    folders = set() if by_name else {os.path.realpath(photo.parent) for photo, _ in jobs}
    todo: list[Job] = []
    kept: dict[str, list[Path]] = {}
    for photo, output in jobs:
        if why := why_kept(photo, output, how, overwrite, os.path.realpath(output.parent) in folders):
            kept.setdefault(why, []).append(output)
        else:
            todo.append((photo, output))
    return todo, kept


def why_kept(photo: Path, output: Path, how: str, overwrite: bool, beside_photos: bool) -> str:
    """Returns the reason for which an output is kept, or "" if it is to be made."""
    if not os.path.exists(output):
        return ""
    noted, now = read_note(output).split("; "), origin(photo, how)  # it ends with which look was taken
    if len(noted) < 3:  # beside the photos it may be one itself: then --overwrite is not enough
        return BESIDE_INPUT if beside_photos else "" if overwrite else FOREIGN
    if overwrite:
        return ""
    if noted[1] == now[1]:
        return UP_TO_DATE if noted[0] == how and len(noted) == 4 else ""  # of 3: made before there were two looks
    return "" if noted[2] == now[2] else OF_ANOTHER  # the same path: its photo has changed
