"""The command: photos to cutouts with a small random model, or a stub where the alpha must be known."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from conftest import PICTURE, fresh_python, save_picture, save_random_model, sharpen
from PIL import Image, ImageCms, PngImagePlugin

import evaluate
import predict
import trainer
from cutting import cutter, jobs, photos
from cutting.cutter import load
from predict import run_command

RNG = np.random.default_rng(0)
RAMP = np.tile(np.linspace(0, 255, 70).astype(np.uint8), (50, 1))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture
def run(small_checkpoint, cut, capsys, monkeypatch):
    """Runs the command line. Returns its exit code and the lines that it wrote to stdout and stderr.

    Of stdout without the model's line.
    """

    def run(*arguments) -> tuple[int, list[str], list[str]]:
        loads_itself = {"--checkpoint", "--device", "--image-size"} & set(arguments)
        monkeypatch.setattr(predict, "load", load if loads_itself else lambda *_: cut)
        defaults = ["--checkpoint", small_checkpoint] if "--checkpoint" not in arguments else []
        code = run_command([str(part) for part in ("predict.py", *arguments, *defaults)])
        lines, errors = (text.strip("\n").splitlines() for text in capsys.readouterr())
        return code, [line for line in lines if not line.startswith("model: ")], errors

    return run


def outputs(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def read_rgba(path: Path) -> np.ndarray:
    """Decoded by OpenCV, which has no part in the reading of photos."""
    return cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), cv2.COLOR_BGRA2RGBA)


def encoded(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def test_colour_profiles_go_where_they_fit(tmp_path, run, stub):
    stub()
    fake = {space: bytes(16) + space + bytes(200) for space in (b"GRAY", b"CMYK", b"RGB ")}
    save_picture(tmp_path / "in" / "c.png", PICTURE[..., 1], icc_profile=fake[b"GRAY"])
    for name, space in (("a.tif", b"CMYK"), ("b.tif", b"RGB ")):
        Image.new("CMYK", (40, 40)).save(tmp_path / "in" / name, icc_profile=fake[space])
    save_picture(tmp_path / "in" / "d.jpg", icc_profile=SRGB[:20] + bytes(2**20))
    save_picture(tmp_path / "in" / "e.jpg", icc_profile=SRGB)
    save_picture(tmp_path / "in" / "f.png", icc_profile=SRGB)
    assert run(tmp_path / "in", "--output", tmp_path / "out")[0] == 0
    found = {path.name: Image.open(path).info.get("icc_profile") for path in (tmp_path / "out").iterdir()}
    assert found == {**dict.fromkeys(("a.png", "b.png", "c.png", "d.png")), "e.png": SRGB, "f.png": SRGB}
    for option, expected in ((["--mask"], None), (["--background", "red"], SRGB)):
        run(tmp_path / "in" / "e.jpg", "--output", tmp_path / "out", "--overwrite", *option)
        image = Image.open(tmp_path / "out" / "e.png")
        image.load()
        assert image.info.get("icc_profile") == expected


def test_a_mask_is_never_more_opaque_than_the_photo(tmp_path, run, stub):
    stub()
    path = save_picture(tmp_path / "a.png", np.dstack([PICTURE, RAMP]))
    run(path, "--mask", "--output", tmp_path / "m", "--threshold", "0.4")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "m" / "a.png")), RAMP)


def test_single_call_folder_and_batch_agree(tmp_path, cut, run):
    pictures = {f"{n}.png": np.roll(PICTURE, 9 * n, axis=1)[: 20 + 5 * n] for n in range(5)}
    photos = [save_picture(tmp_path / "in" / name, picture) for name, picture in pictures.items()]
    assert run(tmp_path / "in", "--output", tmp_path / "folder")[0] == 0
    jobs = [(photo, tmp_path / "batch" / photo.name) for photo in photos]
    assert predict.cut_batch(cut, jobs, predict.Style())[:2] == (5, [])
    for photo in photos:
        alone = cut(photo)
        assert np.ptp(alone[..., 3]) > 50
        for folder in ("folder", "batch"):
            np.testing.assert_allclose(read_rgba(tmp_path / folder / photo.name).astype(int), alone, atol=1)


# --- names, folders, going on -----------------------------------------------------------------------------


def test_structure_and_names(tmp_path, run, stub):
    stub()
    photos, out = tmp_path / "photos", tmp_path / "photos" / "out"
    for name in ("a.jpg", "a.png", "B.JPG", "b.webp", "sub/deep/my.photo.jpg", "sub/a.jpg", ".hidden.jpg", ".no/a.jpg"):
        save_picture(photos / name)
    for name in ("notes.txt", "film.mpg"):
        (photos / name).write_text("no photo")
    single = tmp_path / "single"
    single.write_bytes(encoded(PICTURE, "JPEG"))  # given by name: tried whatever it is called
    expected = {"a.jpg.png", "a.png.png", "B.JPG.png", "b.webp.png", "sub/deep/my.photo.png", "sub/a.png", "single.png"}
    code, lines, errors = run(photos, single, single, "--output", out)
    assert (code, errors, outputs(out)) == (0, [], expected)
    assert lines == [f"7 of 7 photos written to {out}"]
    code, lines, errors = run(photos, single, "--output", out)  # the outputs inside the folder are no photos
    assert (code, errors, outputs(out)) == (0, [], expected)
    assert lines == [f"0 of 7 photos written to {out}, 7 were there already (--overwrite makes them again)"]


def test_existing_outputs_are_kept_unless_told_otherwise(tmp_path, run, stub):
    stub()
    save_picture(tmp_path / "in" / "a.jpg")
    save_picture(tmp_path / "in" / "b.jpg")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_text("mine")
    code, lines, _ = run(tmp_path / "in", "--output", tmp_path / "out")
    kept = f"1 kept, not made by predict.py or changed since: {tmp_path / 'out' / 'a.png'} (--overwrite replaces it)"
    assert (code, lines) == (0, [f"1 of 2 photos written to {tmp_path / 'out'}, {kept}"])
    assert (tmp_path / "out" / "a.png").read_text() == "mine"
    assert run(tmp_path / "in", "--output", tmp_path / "out", "--overwrite")[0] == 0
    assert Image.open(tmp_path / "out" / "a.png").mode == "RGBA"


def test_refused_before_anything_is_written(tmp_path, run, stub):
    stub()
    save_picture(tmp_path / "one" / "a.png")
    save_picture(tmp_path / "two" / "a.png")
    save_picture(tmp_path / "three" / "a.jpg")
    for name in ("a.jpg", "a.png", "a.jpg.webp"):
        save_picture(tmp_path / "four" / name)
    save_picture(tmp_path / "five" / "five" / "a.jpg")
    os.symlink(tmp_path / "one" / "a.png", tmp_path / "a.png")
    before = {name: (tmp_path / name).read_bytes() for name in outputs(tmp_path)}
    cases = {
        "would both become": ([tmp_path / "one", tmp_path / "two", "--output", tmp_path / "out"],
                              [tmp_path / "four", "--output", tmp_path / "out"]),
        "would overwrite": ([tmp_path / "one" / "a.png", "--output", tmp_path / "one"],
                            [tmp_path / "a.png", "--output", tmp_path, "--overwrite"],
                            [tmp_path / "a.png", "--output", tmp_path / "one", "--overwrite"],
                            [tmp_path / "one", "--output", tmp_path / "three" / ".." / "one"]),
        "would mix": ([tmp_path / "three", "--output", tmp_path / "three"],
                      [tmp_path / "five", "--output", tmp_path]),
    }  # fmt: skip
    for words, commands in cases.items():
        for command in commands:
            code, lines, errors = run(*command)
            assert (code, lines, len(errors)) == (2, [], 1), command
            assert words in errors[0]
    assert {name: (tmp_path / name).read_bytes() for name in outputs(tmp_path)} == before


@pytest.mark.parametrize("moment", ["before", "within"])
def test_interrupted_run_leaves_whole_files_and_goes_on(tmp_path, run, stub, monkeypatch, moment):
    stub()
    for n in range(12):
        save_picture(tmp_path / "in" / f"{n}.jpg")
    real, lock, count = predict.encode_png, threading.Lock(), [0]

    def interrupted(*arguments):
        with lock:
            count[0] += 1
            if count[0] != 4:
                return real(*arguments)
        if moment == "before":
            raise KeyboardInterrupt
        return cut_off(real(*arguments))

    def cut_off(pieces):
        yield pieces[0][:50]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict, "encode_png", interrupted)
        code, lines, errors = run(tmp_path / "in", "--output", tmp_path / "out")
    assert (code, lines, len(errors)) == (130, [], 1)
    done = outputs(tmp_path / "out")
    assert 3 <= len(done) < 12
    assert all(read_rgba(tmp_path / "out" / name).shape == (50, 70, 4) for name in done)
    code, lines, _ = run(tmp_path / "in", "--output", tmp_path / "out")
    assert (code, lines[0].split()[0]) == (0, str(12 - len(done)))
    assert outputs(tmp_path / "out") == {f"{n}.png" for n in range(12)}


def test_broken_files_are_named_and_the_rest_goes_on(tmp_path, run, stub):
    stub()
    photos, noise = tmp_path / "in", RNG.integers(0, 256, (90, 90, 3), dtype=np.uint8)
    photos.mkdir()
    header = b"IHDR" + (20000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    whole = encoded(noise, "PNG")
    bomb = whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:]
    for kind in ("jpg", "png", "webp", "tif", "bmp", "gif"):
        content = encoded(noise, {"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind))
        (photos / f"whole_{kind}.{kind}").write_bytes(content)
        (photos / f"broken_{kind}.{kind}").write_bytes(content[: len(content) // 2])
    (photos / "broken_empty.jpg").touch()
    (photos / "broken_link.jpg").symlink_to("nowhere.jpg")
    (photos / "broken_text.jpg").write_text("no photo at all\nnot at all")
    (photos / "broken_bomb.png").write_bytes(bomb)
    code, lines, errors = run(photos, "--output", tmp_path / "out", "--batch-size", "3")
    assert code == 1
    assert outputs(tmp_path / "out") == {f"whole_{kind}.png" for kind in ("jpg", "png", "webp", "tif", "bmp", "gif")}
    assert lines == [f"6 of 16 photos written to {tmp_path / 'out'}, 10 could not be done"]
    assert sorted(line.split(" cannot be read: ")[0] for line in errors) == sorted(map(str, photos.glob("broken*")))
    assert next(line for line in errors if "bomb" in line).endswith("could be decompression bomb DOS attack.")


def test_folder_that_cannot_be_opened_is_named(tmp_path, run, stub, monkeypatch):
    stub()
    save_picture(tmp_path / "in" / "a.jpg")
    real, closed = os.scandir, [str(tmp_path / "in" / "sub")]
    (tmp_path / "in" / "sub").mkdir()

    def scandir(path):
        if os.fspath(path) in closed:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    code, _, errors = run(tmp_path / "in", "--output", tmp_path / "out")
    assert (code, len(errors), outputs(tmp_path / "out")) == (1, 1, {"a.png"})
    assert str(tmp_path / "in" / "sub") in errors[0]
    closed.append(str(tmp_path / "in"))
    code, _, errors = run(tmp_path / "in", "--output", tmp_path / "out")
    assert (code, errors) == (2, [f"predict.py: error: {tmp_path / 'in'} cannot be opened"])


def test_writing_that_fails(tmp_path, run, stub, monkeypatch):
    stub()
    save_picture(tmp_path / "in" / f"{'n' * 251}.jpg")
    save_picture(tmp_path / "in" / f"{'n' * 252}.im", format="BMP")  # .png is one letter more
    code, _, errors = run(tmp_path / "in", "--output", tmp_path / "out")
    assert (code, len(errors), outputs(tmp_path / "out")) == (1, 1, {"n" * 251 + ".png"})
    assert errors[0] == f"{tmp_path / 'out' / ('n' * 252)}.png cannot be written: File name too long"

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict, "atomic_write", full)
    code, lines, errors = run(save_picture(tmp_path / "a.jpg"), "--output", tmp_path / "out2")
    assert (code, lines) == (2, [])
    assert errors == [f"predict.py: error: {tmp_path / 'out2' / 'a.png'} cannot be written: No space left on device"]


# --- nothing is passed over in silence --------------------------------------------------------------------

UNKNOWN = ("a.HEIC", "sub/b.heif", "c.nef", "d.CR3", "e.dng", "f.jxl")  # whatever is in them


@pytest.fixture
def without_extras(monkeypatch):
    """As where neither of Pillow's plug-ins is installed."""
    known = frozenset(e for e in photos.readable_extensions() if e not in photos.OTHER_KINDS or e == ".avif")
    monkeypatch.setattr(photos, "readable_extensions", lambda: known)
    monkeypatch.setattr(jobs, "readable_extensions", lambda: known)


@pytest.mark.usefixtures("without_extras")
def test_photos_of_kinds_that_cannot_be_read_are_counted_with_what_helps(tmp_path, run, stub):
    stub()
    save_picture(tmp_path / "in" / "a.jpg")
    for name in (*UNKNOWN, "notes.txt", ".hidden.heic"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"\0\0\0\x18ftypheic")
    out = tmp_path / "out"
    for said in ("1 of 7 photos written to", "0 of 7 photos written to"):  # a second run says it again
        code, lines, errors = run(tmp_path / "in", tmp_path / "in", "--output", out)
        assert (code, outputs(out)) == (1, {"a.png"})
        assert errors == [
            "2 photos (.heic, .heif) cannot be read here: pip install pillow-heif",
            "3 photos (.cr3, .dng, .nef) cannot be read here: camera raw, develop them to JPEG, PNG or TIFF",
            "1 photo (.jxl) cannot be read here: pip install pillow-jxl-plugin",
        ]
        assert lines[0].startswith(said)
        assert lines[0].endswith(", 6 could not be done")
    shutil.rmtree(out)
    (tmp_path / "in" / "a.jpg").unlink()
    code, lines, errors = run(tmp_path / "in", "--output", out)  # nothing else is there
    assert (code, lines, len(errors)) == (1, [f"0 of 6 photos written to {out}, 6 could not be done"], 3)
    code, _, errors = run(tmp_path / "in" / "a.HEIC", "--output", out)  # given by name
    assert (code, errors) == (1, [f"{tmp_path / 'in' / 'a.HEIC'} cannot be read: pip install pillow-heif"])


def test_linked_folders_are_followed_and_loops_are_not(tmp_path, run, stub):
    stub()
    for name in ("in/a.jpg", "in/sub/b.jpg", "album/c.jpg", "album/deep/d.jpg", "beside.jpg"):
        save_picture(tmp_path / name)
    links = {"in/album": "album", "in/again": "in/sub", "in/self": "in", "in/up": "", "in/sub/back": "in/sub",
             "album/deep/round": "in", "album/deep/album": "album", "in/off": "not_mounted"}  # fmt: skip
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    code, _, errors = run(tmp_path / "in", "--output", tmp_path / "in" / "out")
    expected = {"a.png", "sub/b.png", "album/c.png", "album/deep/d.png", "again/b.png"}
    assert outputs(tmp_path / "in" / "out") == expected
    assert (code, errors) == (1, [f"{tmp_path / 'in' / 'off'} cannot be read: No such file or directory"])
    (tmp_path / "in" / "off").unlink()
    (tmp_path / "in" / "results").symlink_to(tmp_path / "in" / "out")  # the output folder is none of the photos'
    code, lines, _ = run(tmp_path / "in", "--output", tmp_path / "in" / "out")
    assert (code, lines[0].split(",")[0]) == (0, f"0 of 5 photos written to {tmp_path / 'in' / 'out'}")


def test_a_folder_that_is_a_link_itself_or_is_given_from_within(tmp_path, run, stub, monkeypatch):
    stub()
    save_picture(tmp_path / "photos" / "sub" / "a.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "sub" / "loop").symlink_to("..")
    assert run(tmp_path / "link", "--output", tmp_path / "out")[0] == 0
    monkeypatch.chdir(tmp_path / "photos" / "sub")
    for given, made in ((".", "a.png"), ("..", "sub/a.png")):
        assert run(given, "--output", tmp_path / f"out{len(given)}")[0] == 0
        assert outputs(tmp_path / f"out{len(given)}") == {made}
    assert outputs(tmp_path / "out") == {"sub/a.png"}


def test_an_output_folder_that_cannot_be_flushed_is_no_failure(tmp_path, run, stub, monkeypatch):
    stub()
    save_picture(tmp_path / "a.jpg")

    def fsync(_descriptor):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "fsync", fsync)
    assert run(tmp_path / "a.jpg", "--output", tmp_path / "out")[0] == 0
    assert outputs(tmp_path / "out") == {"a.png"}


def test_work_is_bounded_by_pixels(tmp_path, cut, monkeypatch):
    jobs = [(save_picture(tmp_path / f"{n}.png"), tmp_path / f"out{n}.png") for n in range(7)]
    monkeypatch.setattr(predict, "BATCH_PIXELS", 3 * 3500)
    assert [(len(batch), pixels) for batch, pixels in predict.grouped(jobs, 2)] == [(2, 7000)] * 3 + [(1, 3500)]
    assert [len(batch) for batch, _ in predict.grouped(jobs, 4)] == [1] * 4 + [3]
    lock, at_work, most = threading.Lock(), [0], [0]

    def counted(cutter, batch, style):
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        threading.Event().wait(0.02)
        with lock:
            at_work[0] -= 1
        return predict.Outcome(len(batch), [], [])

    monkeypatch.setattr(predict, "cut_batch", counted)
    monkeypatch.setattr(predict, "usable_cores", lambda: 4)
    for limit, expected in ((3500 * 2, 2), (1, 1), (10**9, 4)):
        monkeypatch.setattr(predict, "PIXELS_AT_WORK", limit)
        most[0] = 0
        assert predict.cut_all(cut, jobs, predict.Style(), 1) == [(1, [], [])] * 7
        assert most[0] == expected


# --- one file, nobody -------------------------------------------------------------------------------------


def test_one_photo_goes_to_the_file_that_is_named(tmp_path, run, stub):
    stub()
    photo, other = save_picture(tmp_path / "a.jpg"), save_picture(tmp_path / "b.jpg")
    made = tmp_path / "new" / "Result.PNG"
    assert run(photo, photo, "--output", made)[:2] == (0, [f"1 of 1 photo written to {made}"])
    assert outputs(tmp_path) == {"a.jpg", "b.jpg", "new/Result.PNG"}
    assert read_rgba(made).shape == (50, 70, 4)
    made.write_text("mine")
    said = f"0 of 1 photo written to {made}, 1 kept, {jobs.FOREIGN}: {made} (--overwrite replaces it)"
    assert run(photo, "--output", made)[:2] == (0, [said])
    assert made.read_text() == "mine"
    assert run(photo, "--output", made, "--overwrite")[0] == 0
    assert read_rgba(made).shape == (50, 70, 4)
    before = {name: (tmp_path / name).read_bytes() for name in outputs(tmp_path)}
    cases = {
        "one file": ([photo, other, "--output", made], [tmp_path, "--output", made]),
        "would overwrite": ([made, "--output", made, "--overwrite"],),
        "is a PNG": ([photo, "--output", tmp_path / "c.jpg"], [photo, "--output", other, "--overwrite"]),
        "cannot be written": ([photo, "--output", photo / "c.png"],),
    }
    for words, commands in cases.items():
        for command in commands:
            code, lines, errors = run(*command)
            assert (code, lines, len(errors)) == (2, [], 1), command
            assert words in errors[0]
    assert {name: (tmp_path / name).read_bytes() for name in outputs(tmp_path)} == before
    (tmp_path / "folder.png").mkdir()  # as every folder
    assert run(photo, "--output", tmp_path / "folder.png")[0] == 0
    assert outputs(tmp_path / "folder.png") == {"a.png"}


@pytest.mark.parametrize("options", [[], ["--mask"], ["--background", "red"], ["--threshold", "0.5"]])
def test_photos_without_anybody_are_counted_and_a_few_named(options, tmp_path, run, stub):
    stub(lambda red: (red > 0.5).float() if "--threshold" in options else (red > 0.5) * 0.6 + 0.35)
    for n in range(6):
        save_picture(tmp_path / "in" / f"{n}.png", np.full((40, 40, 3), 255 if n == 1 else 9, np.uint8))
    named = ", ".join(str(tmp_path / "in" / f"{n}.png") for n in (0, 2, 3))
    code, lines, _ = run(tmp_path / "in", "--output", tmp_path / "out", *options)
    said = f"6 of 6 photos written to {tmp_path / 'out'}; nobody was found in 5 photos: {named}, ..."
    assert (code, lines) == (0, [said])
    _, lines, _ = run(tmp_path / "in" / "0.png", "--output", tmp_path / "one", *options)
    assert lines[0].endswith(f"; nobody was found in 1 photo: {tmp_path / 'in' / '0.png'}")


# --- what made an output -----------------------------------------------------------------------------------

SIZE, OTHER = ["--image-size", "96"], ["--checkpoint", "other.pth"]
# Each differs little from the one before it.
STYLES = ([], SIZE, SIZE + OTHER, ["--mask"], ["--mask", "--threshold", "0.5"], ["--mask", "--threshold", "0.501"],
          ["--background", "red"], ["--background", "ground.png"], ["--background", "other.png"],
          ["--keep-background-colours"], ["--keep-background-colours", "--threshold", "0.5"],
          ["--threshold", "0.5"])  # fmt: skip
THERE = ", 2 were there already (--overwrite makes them again)"
AGAIN = "of another model or style, or of a photo that has changed: made again"


@pytest.fixture
def folder(tmp_path, run, monkeypatch):
    """The working directory: two photos, two backgrounds, two models."""
    monkeypatch.chdir(tmp_path)
    save_model(Path("other.pth"), 7)
    for name in ("in/a.png", "in/sub/b.png", "ground.png"):
        save_picture(Path(name))
    save_picture(Path("other.png"), PICTURE[::-1].copy())
    return tmp_path


def test_outputs_of_another_style_or_model_are_made_again_and_others_stay(folder, run):
    fresh = []
    for n, style in enumerate(STYLES):
        assert run("in", "--output", f"fresh{n}", *style)[0] == 0
        fresh.append(Path(f"fresh{n}/sub/b.png").read_bytes())
    for n, style in enumerate(STYLES):
        code, lines, errors = run("in", "--output", "out", *style)
        again = [f"2 outputs {AGAIN}"] if n else []
        assert (code, lines[:-1], errors) == (0, again, [])
        assert lines[-1].startswith("2 of 2 photos written to out")
        assert Path("out/sub/b.png").read_bytes() == fresh[n], style
        assert run("in", "--output", "out", *style)[1] == [f"0 of 2 photos written to out{THERE}"]
    assert len(set(fresh)) == len(STYLES)


def test_equal_ways_are_told_by_what_they_mean(folder, run):
    run("in", "--output", "out", "--background", "white")
    assert run("in", "--output", "out", "--background", "#ffffff")[1][-1].endswith(THERE)
    run("in", "--output", "out", "--checkpoint", "other.pth", "--overwrite")
    shutil.copy("other.pth", "moved.pth")
    assert run("in", "--output", "out", "--checkpoint", "moved.pth")[1][-1].endswith(THERE)
    save_model(Path("moved.pth"), 8)
    assert run("in", "--output", "out", "--checkpoint", "moved.pth")[1][0] == f"2 outputs {AGAIN}"
    os.rename("in", "elsewhere")
    assert run("elsewhere", "--output", "out", "--checkpoint", "moved.pth")[1][-1].endswith(THERE)


def test_half_a_run_in_another_style_goes_on_with_what_is_left(folder, run):
    run("in", "--output", "out")
    run("in/a.png", "--output", "out", "--mask")
    lines = run("in", "--output", "out", "--mask")[1]
    said = "1 of 2 photos written to out, 1 was there already (--overwrite makes it again)"
    assert (lines[0], lines[1].partition(";")[0]) == (f"1 output {AGAIN}", said)


def test_a_photo_that_has_changed_is_cut_again(folder, run):
    run("in", "--output", "out", "--mask")
    save_picture(Path("in/a.png"), PICTURE[:, ::-1].copy())
    os.utime("in/a.png", ns=(1, 1))
    code, lines, _ = run("in", "--output", "out", "--mask")
    assert (code, lines[0]) == (0, f"1 output {AGAIN}")
    assert lines[1].startswith("1 of 2 photos written to out, 1 was there already")
    run("in/a.png", "--output", "fresh", "--mask")
    assert Path("out/a.png").read_bytes() == Path("fresh/a.png").read_bytes()


def test_the_output_of_another_photo_stays_and_is_named(folder, run):
    run("in/a.png", "--output", "out")
    before = Path("out/a.png").read_bytes()
    save_picture(Path("two/a.png"), PICTURE[:20])
    for options in ([], ["--mask"]):
        said = "0 of 1 photo written to out, 1 kept, made of another photo: out/a.png (--overwrite replaces it)"
        assert run("two/a.png", "--output", "out", *options)[:2] == (0, [said])
    assert Path("out/a.png").read_bytes() == before
    run("two/a.png", "--output", "out", "--overwrite")
    assert read_rgba(Path("out/a.png")).shape == (20, 70, 4)


def test_what_was_changed_since_is_the_users(folder, run):
    run("in", "--output", "out")
    image = Image.open("out/a.png")
    image.save("out/a.png", pnginfo=noted(image))
    edited = Path("out/a.png").read_bytes()
    assert b"tEXtSilueta" in edited[:100]  # as of programs that keep what they do not know
    Path("out/sub/b.png").write_bytes(Path("out/sub/b.png").read_bytes()[:-20])
    (Path("out") / "folder").mkdir()
    code, lines, _ = run("in", "--output", "out", "--mask")
    kept = f"2 kept, {jobs.FOREIGN}: out/a.png, out/sub/b.png (--overwrite replaces them)"
    assert (code, lines) == (0, [f"0 of 2 photos written to out, {kept}"])
    assert Path("out/a.png").read_bytes() == edited


def noted(image: Image.Image) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Silueta", image.text["Silueta"])
    return info


def test_a_file_of_the_users_beside_a_photo_is_replaced_only_if_it_is_named(folder, run):
    save_picture(Path("in/a.jpg"))
    mine = Path("in/a.png").read_bytes()
    for options in ([], ["--overwrite"]):
        code, lines, _ = run("in/a.jpg", "--output", "in", *options)
        kept = f"1 kept, beside the photos and {jobs.FOREIGN}: in/a.png (--output FILE --overwrite replaces it)"
        assert (code, lines) == (0, [f"0 of 1 photo written to in, {kept}"])
    assert run("in/a.jpg", "--output", "in/a.png")[1][0].endswith("in/a.png (--overwrite replaces it)")
    assert Path("in/a.png").read_bytes() == mine
    assert run("in/a.jpg", "--output", "in/a.png", "--overwrite")[0] == 0
    assert Path("in/a.png").read_bytes() != mine
    assert run("in/a.jpg", "--output", "in", "--mask")[1][0] == f"1 output {AGAIN}"  # it is predict.py's now


def test_any_reader_finds_the_note(folder, run, small_checkpoint):
    run("in/a.png", "--output", "out", "--threshold", "0.5")
    image = Image.open("out/a.png")
    how, photo, place, length = image.text["Silueta"].split("; ")
    assert how == f"cutout, threshold 0.5, by {cutter.identity(small_checkpoint)}"
    assert (photo, place) == jobs.origin_of(Path("in/a.png"), how)[1:]
    whole = Path("out/a.png").read_bytes()
    assert length == f"{len(whole) - 12 - len('Silueta') - 1 - len(image.text['Silueta'])} bytes"
    assert whole.index(b"tEXt") == 37  # read by a look at the file's beginning
    assert whole.index(b"tEXt") < whole.index(b"IDAT")


# --- mask, background, threshold --------------------------------------------------------------------------


def by_columns(red: torch.Tensor) -> torch.Tensor:
    """0, 0.25, 0.5 and 1 in four bands of a 64 x 64 square."""
    return torch.tensor([0.0, 0.25, 0.5, 1.0]).repeat_interleave(16).expand_as(red)


def test_mask_threshold_and_background_by_hand(tmp_path, run, stub):
    stub(by_columns)
    photo = save_picture(tmp_path / "a.png", np.full((64, 64, 3), (200, 100, 0), np.uint8))

    def made(*options) -> Image.Image:
        assert run(photo, "--output", tmp_path / "out", "--overwrite", *options)[0] == 0
        return Image.open(tmp_path / "out" / "a.png")

    def bands(image: Image.Image) -> list:
        assert image.size == (64, 64)
        return [image.getpixel((x, y)) for x, y in ((0, 0), (18, 9), (45, 20), (63, 63))]

    assert (made("--mask").mode, bands(made("--mask"))) == ("L", [0, 57, 128, 255])  # 0.2 / 0.9 is 57
    assert bands(made("--mask", "--threshold", "0.5")) == [0, 0, 0, 255]
    assert bands(made("--mask", "--threshold", "0.25")) == [0, 0, 255, 255]
    assert bands(made("--threshold", "0")) == [(0, 0, 0, 0), *[(200, 100, 0, 255)] * 3]
    kept = made("--threshold", "0", "--keep-background-colours")
    assert bands(kept) == [(200, 100, 0, alpha) for alpha in (0, 255, 255, 255)]
    # 57 and 128 of 255 of the photo over blue: 200 * 57 / 255 = 44.7, 255 * 198 / 255 = 198, and so on
    assert made("--background", "blue").mode == "RGB"
    assert bands(made("--background", "#00f")) == [(0, 0, 255), (45, 22, 198), (100, 50, 127), (200, 100, 0)]
    assert bands(made("--background", "#00f", "--threshold", "0.3"))[1:3] == [(0, 0, 255), (200, 100, 0)]
    # a background of 4 x 2, whose middle half covers the photo
    grounds = np.repeat(np.array([[[9, 9, 9], [10, 20, 30], [10, 20, 30], [8, 8, 8]]], np.uint8), 2, axis=0)
    ground = save_picture(tmp_path / "ground.png", grounds)
    assert bands(made("--background", ground))[0::3] == [(10, 20, 30), (200, 100, 0)]


def test_image_size_is_the_squares(tmp_path, run, stub):
    """A person in the square's columns from 24 on: of a square of 48 the last half, of one of 96 the last 3/4."""
    stub(lambda red: (torch.arange(red.shape[-1]) >= 24).float().expand_as(red))
    photo = save_picture(tmp_path / "a.png", np.zeros((192, 192, 3), np.uint8))
    for size, first in ((48, 96), (96, 48)):
        run(photo, "--mask", "--image-size", size, "--output", tmp_path / str(size))
        mask = np.asarray(Image.open(tmp_path / str(size) / "a.png"))
        assert np.flatnonzero(mask[50] > 127)[0] == pytest.approx(first, abs=1)


# --- which model ------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """Runs the command line in a folder with one photo, a model at the place of the program's own, and no other."""
    monkeypatch.chdir(tmp_path)
    save_picture(tmp_path / "a.png")
    save_model(tmp_path / "box.pth", 1, metrics={"iou": 0.614}, config={"sample": False, "data_root": "data/coco"})
    monkeypatch.setattr(cutter, "BOX", tmp_path / "box.pth")

    def command(*arguments: str) -> tuple[int, list[str], list[str]]:
        code = run_command(["predict.py", "--device", "cpu", "--overwrite", "a.png", *arguments])
        return code, *(text.splitlines() for text in capsys.readouterr())

    return command


def save_model(path: Path, seed: int, **parts: dict) -> Path:
    """A random model, whose alpha tells it from others; `parts` of the checkpoint are added to what is there."""
    torch.manual_seed(seed)
    path.parent.mkdir(exist_ok=True)
    content = torch.load(save_random_model(path, change=sharpen), weights_only=True)
    torch.save({name: part | parts.get(name, {}) if name in parts else part for name, part in content.items()}, path)
    return path


BOX_LINE = "model: the one that comes with Silueta (resnet18 at 64, validation IoU 0.61)"


def test_the_model_is_the_trained_one_or_else_the_programs_own(tmp_path, command):
    def made() -> np.ndarray:
        return read_rgba(tmp_path / "cutouts" / "a.png")

    def alone(path: str) -> np.ndarray:
        return load(path, "cpu")("a.png")

    assert command()[1][0] == BOX_LINE
    np.testing.assert_array_equal(made(), alone("box.pth"))
    np.testing.assert_array_equal(load(device="cpu")("a.png"), alone("box.pth"))
    save_model(tmp_path / "checkpoints" / "best_model.pth", 2)
    assert command()[1][0] == "model: checkpoints/best_model.pth (resnet18 at 64)"
    np.testing.assert_array_equal(made(), alone("checkpoints/best_model.pth"))
    np.testing.assert_array_equal(load(device="cpu")("a.png"), made())
    assert (made() != alone("box.pth")).any()
    assert command("--checkpoint", "box")[1][0] == BOX_LINE
    np.testing.assert_array_equal(made(), alone("box.pth"))
    (tmp_path / "box").write_text("a file of that name is none")
    line = command("--checkpoint", "box", "--image-size", "96")[1][0]
    assert line == BOX_LINE.replace("at 64,", "at 96, trained at 64,")
    assert command("--checkpoint", "./box")[0] == 2


def test_no_model_at_all_gets_one_line(tmp_path, command):
    (tmp_path / "box.pth").unlink()
    for arguments in ((), ("--checkpoint", "box")):
        code, lines, errors = command(*arguments)
        assert (code, lines, len(errors)) == (2, [], 1)
        for words in ("there is no model", "trainer.py", "checkpoints/best_model.pth", "--checkpoint"):
            assert words in errors[0]


def test_a_damaged_model_is_not_passed_over_for_another(tmp_path, command):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best_model.pth").write_bytes(b"damaged")
    code, _, errors = command()
    assert (code, len(errors)) == (2, 1)
    assert "checkpoints/best_model.pth is damaged" in errors[0]


def test_a_model_of_drawings_says_so_before_photos_and_not_before_its_drawings(tmp_path, command):
    drawn = {"config": {"sample": True, "data_root": "data/sample"}}
    save_model(tmp_path / "drawn.pth", 3, **drawn)
    save_picture(tmp_path / "data" / "sample" / "val2017" / "b.png")
    save_picture(tmp_path / "data" / "sample2" / "c.png")
    cases = (("drawn.pth", ("data/sample2",), True), ("drawn.pth", (), True), ("box.pth", (), False))
    for checkpoint, more, warned in cases:
        code, lines, errors = command(*more, "--checkpoint", checkpoint)
        assert (code, len(lines), len(errors)) == (0, 2, int(warned))
        assert all("trained on drawings" in line for line in errors)
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png").symlink_to(tmp_path / "data" / "sample" / "val2017" / "b.png")  # lies there
    assert command("data/sample", "--checkpoint", "drawn.pth")[2] == []
    assert len(command("data/sample", "data/sample2", "--checkpoint", "drawn.pth")[2]) == 1


# --- the user's mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "PHOTO_OR_FOLDER"), (["none.jpg"], "no photo or folder none.jpg"), (["empty"], "no photo in empty"),
        (["a.png", "--foo"], "unknown argument --foo: --help lists them all"),
        (["a.png", "--treshold", "0.5"], "unknown argument --treshold: did you mean --threshold?"),
        (["a.png", "--batchsize=4"], "unknown argument --batchsize=4: did you mean --batch-size?"),
        (["a.png", "--threshold", "1.5"], "--threshold 1.5 is out of range"),
        (["a.png", "--threshold", "nan"], "out of range"), (["a.png", "--threshold", "soft"], "invalid float"),
        (["a.png", "--batch-size", "0"], "--batch-size 0"), (["a.png", "--background", "no_colour"], "no_colour"),
        (["a.png", "--background", "text.jpg"], "text.jpg cannot be read"),
        (["a.png", "--image-size", "31"], "image size of 31 is out of range: from 32 to 4096 pixels"),
        (["a.png", "--image-size", "4097"], "image size of 4097"), (["a.png", "--image-size", "big"], "invalid int"),
        (["a.png", "--mask", "--background", "red"], "not allowed"), (["a.png", "--output", "text.jpg"], "written"),
        (["a.png", "--checkpoint", "none.pth"], "there is no checkpoint none.pth"),
        (["a.png", "--checkpoint", "text.jpg"], "damaged or no checkpoint"), (["a.png", "--device", "tpu9"], "tpu9"),
        (["a.png", "--device", "meta"], "meta"), (["a.png", "--device", "cuda:99"], "cuda:99"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(tmp_path, run, stub, monkeypatch, arguments, words):
    stub()
    monkeypatch.chdir(tmp_path)
    save_picture(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no photo")
    code, lines, errors = run(*arguments)
    assert (code, lines, len(errors)) == (2, [], 1)
    assert errors[0].startswith("predict.py: error: ")
    assert words in errors[0]


FULL = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")]  # fmt: skip


@pytest.mark.parametrize("error", FULL)
@pytest.mark.parametrize(("command", "advice"), [
    (predict, "a smaller --batch-size"), (evaluate, "evaluate.py again"), (trainer, "trainer.py --resume goes on"),
])  # fmt: skip
def test_a_full_gpu_is_one_line_and_an_advice_that_the_command_can_take(
    command, advice, error, small_checkpoint, monkeypatch, capsys
):
    name = Path(command.__file__).name
    arguments = {predict: ["a.png"], evaluate: [str(small_checkpoint)], trainer: []}[command]
    monkeypatch.setattr(command, "main", Mock(side_effect=error))
    assert command.run_command([name, *arguments, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{name}: error: the GPU's memory is used up: ")
    assert advice in said
    assert said.count("\n") == 1
    monkeypatch.setattr(command, "main", Mock(side_effect=RuntimeError("a mistake of this program")))
    with pytest.raises(RuntimeError, match="a mistake of this program"):
        command.run_command([name, *arguments, "--device", "cpu"])


def test_as_a_program(tmp_path, small_checkpoint):
    photo = save_picture(tmp_path / "a.jpg")
    command = [sys.executable, predict.__file__, photo, "--checkpoint", small_checkpoint, "--device", "cpu"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = f"model: {small_checkpoint} (resnet18 at 64)\n1 of 1 photo written to cutouts"
    said = done.stdout.partition(";")[0].strip()  # after it, that nobody may be found
    assert (done.returncode, said, done.stderr) == (0, lines, "")
    assert outputs(tmp_path / "cutouts") == {"a.png"}


# --- in other programs ------------------------------------------------------------------------------------


def test_a_prediction_needs_little_and_shares_its_modules_with_the_project():
    names = "pycocotools albumentations msgspec simplejpeg datasets trainer loading.index"
    code = f"""if True:
        import sys, utils, models, predict
        print([name for name in {names.split()} if name in sys.modules])
        print(predict.utils is utils is sys.modules["utils"], sys.modules["cutting.cutter"].UNetAutoencoder.__module__)
        print(predict.UserError is utils.UserError, sys.path.count(str(predict.HERE)))"""
    assert fresh_python(code) == ["[]", "True models", "True 0"]


LOADED_BEFORE = """
import sys, types
import models.large, loading, training.mine  # a package, a module, a folder without __init__.py
sys.modules["utils"] = types.ModuleType("utils")  # one that cannot say where it is from
names = ("models", "models.large", "loading", "training", "training.mine", "utils")
theirs = {name: sys.modules[name] for name in names}
sys.path.append(sys.argv[1])
from predict import load
print(load(sys.argv[2], "cpu")(sys.argv[3]).shape)
print(all(sys.modules[name] is module for name, module in theirs.items()), "models.small" in sys.modules)
import models.small
print(models.small.MINE)
"""
FOUND_FIRST = """
import sys
sys.path.append(sys.argv[1])
before, sys.modules["torchvision"] = list(sys.path), None
try:
    import predict
except ImportError as error:
    print("torchvision" in str(error), "utils" in sys.modules, sys.path == before)
del sys.modules["torchvision"]
from predict import load
print(load(sys.argv[2], "cpu")(sys.argv[3]).shape)
import loading, models.large, utils  # only now
print(loading.MINE + models.large.MINE + utils.MINE, sys.path == before)
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (LOADED_BEFORE, ["(50, 70, 4)", "True False", "1"]),
        (FOUND_FIRST, ["True False True", "(50, 70, 4)", "3 True"]),
    ],
)
def test_load_works_in_a_program_that_has_modules_of_the_same_names(tmp_path, small_checkpoint, code, expected):
    names = ("script", "loading", "utils", "models/__init__", "models/large", "models/small", "training/mine")
    for name in names:
        (tmp_path / "app" / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "app" / f"{name}.py").write_text(code if name == "script" else "MINE = 1\n")
    arguments = [str(predict.HERE), str(small_checkpoint), str(save_picture(tmp_path / "a.png"))]
    command = [sys.executable, str(tmp_path / "app" / "script.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == expected, done.stderr


# --- genuine photos ---------------------------------------------------------------------------------------


def test_genuine_photos_keep_size_mode_and_colours(tmp_path, run, stub, shared_coco):
    stub(by_columns)
    photos = sorted((shared_coco / "val2017").glob("*.jpg"))
    code, lines, errors = run(shared_coco / "val2017", "--output", tmp_path)
    assert (code, errors, lines) == (0, [], [f"{len(photos)} of {len(photos)} photos written to {tmp_path}"])
    for photo in photos:
        path = tmp_path / f"{photo.stem}.png"
        found = read_rgba(path)
        assert Image.open(path).mode == "RGBA"
        assert {0, 255} <= set(np.unique(found[..., 3]))
        changed = (found[..., :3] != cv2.imread(str(photo), cv2.IMREAD_COLOR_RGB)).any(axis=2)
        assert not changed[found[..., 3] == 255].any(), photo
