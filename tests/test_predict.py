"""The command: photos to cutouts with a small random model, or a stub where the alpha must be known."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from helpers import PICTURE, save_picture, save_random_model, sharpen
from PIL import Image, ImageCms

import predict
from cutting import cutter, jobs, photos
from cutting.cutter import load
from predict import run_command

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture
def run(tmp_path, small_checkpoint, cut, capsys, monkeypatch) -> Callable[..., tuple[int, list[str], list[str]]]:
    """Runs the command line in a folder of its own. Returns its exit code, the lines on stdout and those on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cutter, "BUNDLED", small_checkpoint)

    def run(*arguments: object) -> tuple[int, list[str], list[str]]:
        loads_itself = re.search("--(checkpoint|device|image-size|foreground-only)", f"{arguments}")
        monkeypatch.setattr(predict, "load", load if loads_itself else lambda *_: cut)
        code = run_command(["predict.py", *map(str, arguments)])
        lines, errors = (text.strip("\n").splitlines() for text in capsys.readouterr())
        run.model = lines.pop(0) if lines and lines[0].startswith("model: ") else ""
        return code, lines, errors

    return run


def outputs(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def read_rgba(path: str) -> np.ndarray:
    """Decoded by OpenCV, which has no part in the reading of photos."""
    return cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), cv2.COLOR_BGRA2RGBA)


def save_pictures(*names: str, **options: str) -> None:
    for name in names:
        save_picture(Path(name), **options)


def save_model(name: str, seed: int) -> None:
    """Saves a random model, whose alpha tells it from others."""
    torch.manual_seed(seed)
    Path(name).parent.mkdir(exist_ok=True)
    save_random_model(Path(name), change=sharpen)


def test_mask_threshold_and_background_by_hand(run, stub):
    stub(lambda red: torch.tensor([0.0, 0.25, 0.5, 1.0]).repeat_interleave(16).expand_as(red))  # four bands
    save_picture(Path("a.png"), np.full((64, 64, 3), (200, 100, 0), np.uint8))

    def made(*options: str) -> Image.Image:
        assert run("a.png", "--output", "out", "--overwrite", *options)[0] == 0
        return Image.open("out/a.png")

    def bands(image: Image.Image) -> list:
        return [image.getpixel((x, y)) for x, y in ((0, 0), (18, 9), (45, 20), (63, 63))]

    assert (made("--mask").mode, bands(made("--mask"))) == ("L", [0, 57, 128, 255])  # 0.2 / 0.9 is 57
    assert bands(made("--mask", "--threshold", "0.25")) == [0, 0, 255, 255]
    assert bands(made("--threshold", "0")) == [(0, 0, 0, 0), *[(200, 100, 0, 255)] * 3]
    assert bands(made("--threshold", "0", "--keep_background_colours"))[0] == (200, 100, 0, 0)
    # 57 and 128 of 255 of the photo over blue: 200 * 57 / 255 = 44.7, 255 * 198 / 255 = 198, and so on
    assert bands(made("--background", "#00f")) == [(0, 0, 255), (45, 22, 198), (100, 50, 127), (200, 100, 0)]
    ground = np.full((4, 12, 3), 9, np.uint8)
    ground[:, 3:9] = (10, 20, 30)  # its middle covers the photo
    save_picture(Path("ground.png"), ground)
    assert bands(made("--background", "ground.png"))[0::3] == [(10, 20, 30), (200, 100, 0)]


def test_colour_profiles_go_where_they_fit(run, stub):
    stub()
    profiles = {"a.png": bytes(16) + b"GRAY" + bytes(200), "b.jpg": SRGB[:20] + bytes(2**20), "c.jpg": SRGB}
    for name, profile in profiles.items():  # b's is too large
        save_picture(Path("in", name), PICTURE[..., 1] if name == "a.png" else PICTURE, icc_profile=profile)
    Image.new("CMYK", (40, 40)).save("in/d.tif", icc_profile=SRGB)
    for option, expected in (([], SRGB), (["--mask"], None), (["--background", "red"], SRGB)):
        assert run("in", "--output", "out", *option)[0] == 0
        written = {path.stem: Image.open(path).info.get("icc_profile") for path in Path("out").iterdir()}
        assert written == {**dict.fromkeys("abd"), "c": expected}


def test_a_batch_has_the_cutouts_of_its_photos_alone(cut, tmp_path):
    pictures = {f"{n}.png": np.roll(PICTURE, 9 * n, axis=1)[: 20 + 5 * n] for n in range(5)}
    pictures["alpha.png"] = np.dstack([PICTURE, np.tile(np.arange(70, dtype=np.uint8) * 3, (50, 1))])
    batch = [(save_picture(tmp_path / name, picture), tmp_path / "out" / name) for name, picture in pictures.items()]
    assert predict.cut_batch(cut, batch, predict.Style())[:2] == (6, [])
    for photo, output in batch:
        np.testing.assert_allclose(read_rgba(output).astype(int), alone := cut(photo), atol=1)
        assert np.ptp(alone[..., 3]) > 50


def test_photos_without_anybody_are_counted_and_a_few_named(run, stub):
    stub(lambda red: (red > 0.5) * 0.6 + 0.35)
    for n in range(6):
        save_picture(Path(f"in/{n}.png"), np.full((40, 40, 3), 255 if n == 1 else 9, np.uint8))
    said = "6 of 6 photos written to out; nobody was found in 5 photos: in/0.png, in/2.png, in/3.png, ..."
    assert run("in", "--output", "out")[1] == [said]


def test_a_cutout_is_made_of_the_look_that_its_note_names(run, stub):
    stub(lambda red: (red > 0.5).float())
    for name, side in (("small", 40), ("large", 100)):
        photo = np.zeros((200, 300, 3), np.uint8)
        photo[60 : 60 + side, 100 : 100 + side] = 255
        photo[150 : 150 + side // 4, 250 : 250 + side // 4] = 255  # a child behind
        save_picture(Path("in", f"{name}.png"), photo)
    for option, looks, child in (("--checkpoint=bundled", [160, 64], 255), ("--image-size=96", [96, 96], 255),
                                 ("--foreground-only", [160, 64], 0)):  # fmt: skip
        assert run("in", "--output", "out", "--device", "cpu", option)[0] == 0
        notes = [jobs.read_note(Path(f"out/{name}.png")) for name in ("small", "large")]
        assert [note.rpartition("; ")[2] for note in notes] == [f"look at {size}" for size in looks]
        alpha = read_rgba("out/large.png")[..., 3]
        assert (alpha[110, 150], alpha[162, 262]) == (255, child)


def test_structure_and_names(run, stub):
    stub()
    names = ("a.jpg", "a.png", "B.JPG", "b.webp", "sub/deep/my.photo.jpg", "sub/a.jpg")
    others = (".hidden.jpg", ".thumbnails/a.jpg", "sub/@eaDir/a.jpg/THUMB_M.jpg", "__MACOSX/a.jpg")
    save_pictures(*(f"in/{name}" for name in names + others))
    save_pictures("single", format="JPEG")  # given by name: tried whatever it is called
    expected = {"a.jpg.png", "a.png.png", "B.JPG.png", "b.webp.png", "sub/deep/my.photo.png", "sub/a.png", "single.png"}
    assert run("in", "single", "single", "--output", "in/out") == (0, ["7 of 7 photos written to in/out"], [])
    assert outputs("in/out") == expected
    lines = [f"0 of 7 photos written to in/out; 7 {UP_TO_DATE}"]
    assert run("in", "single", "--output", "in/out") == (0, lines, [])  # the outputs inside the folder are no photos


def test_one_photo_goes_to_the_file_that_is_named(run, stub):
    stub()
    save_pictures("a.jpg")
    Path("folder.png").mkdir()
    for output in ("new/Result.PNG", "folder.png"):
        assert run("a.jpg", "a.jpg", "--output", output)[:2] == (0, [f"1 of 1 photo written to {output}"])
    assert outputs(".") == {"a.jpg", "new/Result.PNG", "folder.png/a.png"}


def test_linked_folders_are_followed_and_loops_are_not(run, stub, tmp_path, monkeypatch):
    stub()
    save_pictures("in/a.jpg", "in/sub/b.jpg", "album/c.jpg", "album/deep/d.jpg", "beside.jpg")
    links = {"in/album": "album", "in/again": "in/sub", "in/self": "in", "in/up": "", "in/sub/back": "in/sub",
             "album/deep/round": "in", "album/deep/album": "album", "in/off": "not_mounted"}  # fmt: skip
    for link, target in links.items():
        Path(link).symlink_to(tmp_path / target)
    Path("in/out").mkdir()
    Path("in/results").symlink_to(tmp_path / "in" / "out")  # the output folder holds no photos
    for written in (5, 0):
        code, (line,), errors = run("in", "--output", "in/out")
        assert line.startswith(f"{written} of 6 photos written")
        assert (code, errors) == (1, ["in/off cannot be read: No such file or directory"])
    assert outputs("in/out") == {"a.png", "sub/b.png", "album/c.png", "album/deep/d.png", "again/b.png"}
    monkeypatch.chdir("in/sub")
    assert run(".", "--output", "../../out")[0] == 0  # from within, where `back` leads to itself
    assert outputs("../../out") == {"b.png"}


def test_an_interrupted_run_leaves_whole_files_and_goes_on(run, stub, monkeypatch):
    stub()
    save_pictures(*(f"in/{n}.jpg" for n in range(12)))
    encode, numbers = predict.encode_png, itertools.count(1)

    def interrupt_the_fourth(*arguments):
        yield from encode(*arguments)[:2]  # in the middle of the file
        if next(numbers) == 4:
            raise KeyboardInterrupt
        yield encode(*arguments)[2]

    with monkeypatch.context() as patch:
        patch.setattr(signal, "signal", Mock())  # a command ignores further interrupts, but here the process goes on
        patch.setattr(predict, "encode_png", interrupt_the_fourth)
        code, lines, errors = run("in", "--output", "out")
    assert (code, lines, len(errors)) == (130, [], 1)
    done = outputs("out")
    assert 3 <= len(done) < 12
    assert all(read_rgba(f"out/{name}").shape == (50, 70, 4) for name in done)
    lines = [f"{12 - len(done)} of 12 photos written to out; {len(done)} {UP_TO_DATE}"]
    assert run("in", "--output", "out") == (0, lines, [])


def test_broken_files_are_named_and_the_rest_goes_on(run, stub):
    stub()
    folder, noise = Path("in"), np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    for kind in ("jpeg", "webp", "png"):
        whole = save_picture(folder / f"whole_{kind}.{kind}", noise).read_bytes()
        (folder / f"broken_{kind}.{kind}").write_bytes(whole[: len(whole) // 2])
    (folder / "broken_empty.jpg").touch()
    (folder / "broken_text.jpg").write_text("no photo at all\nnot at all")
    header = b"IHDR" + (20000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    (folder / "broken_bomb.png").write_bytes(whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:])
    code, lines, errors = run("in", "--output", "out")
    assert outputs("out") == {"whole_jpeg.png", "whole_webp.png", "whole_png.png"}
    assert (code, lines) == (1, ["3 of 9 photos written to out; 6 could not be done"])
    assert sorted(line.split(" cannot be read: ")[0] for line in errors) == sorted(map(str, folder.glob("broken*")))
    assert any(line.endswith("could be decompression bomb DOS attack.") for line in errors)


def test_a_folder_that_cannot_be_opened_is_named(run, stub, monkeypatch):
    stub()
    save_pictures("in/a.jpg", "in/sub/b.jpg")
    scandir, refuse = os.scandir, Mock(side_effect=PermissionError(13, "Permission denied", "in/sub"))
    monkeypatch.setattr(os, "scandir", lambda path: refuse() if Path(path) == Path("in/sub") else scandir(path))
    code, _, (error,) = run("in", "--output", "out")
    assert (code, outputs("out")) == (1, {"a.png"})
    assert error.startswith("in/sub cannot be read")
    assert run("in/sub", "--output", "out") == (2, [], ["predict.py: error: in/sub cannot be opened"])


def test_a_file_that_cannot_be_written_is_named_and_a_full_disk_ends_the_run(run, stub, monkeypatch):
    stub()
    save_pictures("in/a.jpg")
    save_picture(Path(f"in/{'n' * 252}.im"), format="BMP")  # .png is one letter more
    code, _, errors = run("in", "--output", "out")
    assert (code, outputs("out")) == (1, {"a.png"})
    assert errors == [f"out/{'n' * 252}.png cannot be written: File name too long"]
    monkeypatch.setattr(predict, "atomic_write", Mock(side_effect=OSError(28, "No space left on device")))
    errors = ["predict.py: error: new/a.png cannot be written: No space left on device"]
    assert run("in/a.jpg", "--output", "new") == (2, [], errors)


def test_photos_of_kinds_that_cannot_be_read_are_counted_with_what_helps(run, stub, monkeypatch):
    stub()
    known = frozenset(e for e in photos.readable_extensions() if e not in photos.DECODER_ADVICE)
    for module in (photos, jobs):  # as without Pillow's plug-in
        monkeypatch.setattr(module, "readable_extensions", lambda: known)
    save_pictures("in/z.jpg", "in/sub/z.jpg")
    for name in ("a.HEIC", "sub/b.heic", "d.CR3", "f.jxl", "notes.txt", ".hidden.heic"):
        Path("in", name).write_bytes(b"\0\0\0\x18ftypheic")
    errors = ["1 .cr3 photo cannot be read here: camera raw, develop them to JPEG, PNG or TIFF",
              "2 .heic photos cannot be read here: pip install pillow-heif",
              "1 .jxl photo cannot be read here: save them as JPEG, PNG or TIFF"]  # fmt: skip
    assert run("in", "in", "--output", "out") == (1, ["2 of 6 photos written to out; 4 could not be done"], errors)
    assert run("in", "--output", "out")[::2] == (1, errors)  # a second run says it again
    assert run("in/a.HEIC", "--output", "out")[::2] == (1, ["in/a.HEIC cannot be read: pip install pillow-heif"])


@pytest.fixture
def work(tmp_path) -> list[jobs.Job]:
    """Seven photos of 3500 pixels."""
    return [(save_picture(tmp_path / f"{n}.png"), tmp_path / f"out{n}.png") for n in range(7)]


def test_large_photos_are_batches_of_one(work, monkeypatch):
    monkeypatch.setattr(predict, "MAX_BATCH_PIXELS", 3 * 3500)
    assert [(len(batch), pixels) for batch, pixels in predict.group_jobs(work, 2)] == [(2, 7000)] * 3 + [(1, 3500)]
    assert [len(batch) for batch, _ in predict.group_jobs(work, 4)] == [1] * 4 + [3]


@pytest.mark.parametrize(("limit", "most"), [(3500 * 2, 2), (1, 1), (10**9, 4)])
def test_no_more_photos_are_at_work_than_pixels_and_cores_allow(work, cut, monkeypatch, limit, most):
    running, met = threading.Semaphore(most), threading.Barrier(most)

    def cut_batch(cutter, batch, style):
        assert running.acquire(blocking=False)  # or more than allowed are at work
        if work.index(batch[0]) < most:
            met.wait(60)  # so many are
        running.release()
        return predict.Outcome(len(batch), [], [])

    for name, value in (("cut_batch", cut_batch), ("usable_cores", lambda: 4), ("MAX_PIXELS", limit)):
        monkeypatch.setattr(predict, name, value)
    assert predict.cut_all(cut, work, predict.Style(), 1) == [(1, [], [])] * 7


STYLES = ("", "--image-size=96", "--image-size=96 --checkpoint=other.pth", "--mask", "--mask --threshold=0.5",
          "--background=red", "--background=in/b.png", "--background=other.png", "--keep-background-colours",
          "--threshold=0.5", "--threshold=0.5 --foreground-only")  # fmt: skip
UP_TO_DATE = "kept, made already (--overwrite to replace)"


def test_an_output_of_another_style_or_model_is_made_again(run):
    save_pictures("in/b.png")
    save_picture(Path("other.png"), PICTURE[::-1].copy())
    save_model("other.pth", 7)
    made = []
    for style in STYLES:  # each differs little from the one before it
        assert run("in", "--output", "out", *style.split())[0] == 0
        made.append(Path("out/b.png").read_bytes())
    assert len(set(made)) == len(STYLES)
    shutil.copy("other.pth", "copy.pth")
    for style in (["other.pth", "--background", "white"], ["copy.pth", "--background", "#ffffff"]):  # the same
        lines = run("in", "--output", "out", "--checkpoint", *style)[1]
    assert lines == [f"0 of 1 photo written to out; 1 {UP_TO_DATE}"]
    save_pictures("out/b.png")
    why = "not made by predict.py or changed since (--overwrite to replace): out/b.png"
    assert run("in", "--output", "out")[1] == [f"0 of 1 photo written to out; 1 kept, {why}"]


def test_the_model_is_the_trained_one_or_else_the_bundled_one(run, monkeypatch):
    save_pictures("a.png")
    save_model("small.pth", 1)
    monkeypatch.setattr(cutter, "BUNDLED", Path("small.pth"))

    def check(model: str, file: str, *options: str) -> None:
        assert run("a.png", "--device", "cpu", "--overwrite", *options)[0] == 0
        assert run.model == f"model: {model} (resnet18 at 64)"
        np.testing.assert_array_equal(read_rgba("cutouts/a.png"), load(file, "cpu")("a.png"))

    check("the bundled one", "small.pth")
    save_model("checkpoints/best_model.pth", 2)
    Path("bundled").write_text("a file of that name is not meant")
    check("checkpoints/best_model.pth", "checkpoints/best_model.pth")
    np.testing.assert_array_equal(load(device="cpu")("a.png"), read_rgba("cutouts/a.png"))
    check("the bundled one", "small.pth", "--checkpoint", "bundled")


MISTAKES = {
    "none.jpg": "no photo or folder none.jpg", "empty": "no photo in empty", "a.png --threshold=nan": "out of range",
    "a.png --batch-size=0": "--batch-size 0", "a.png --background=no_colour": "no_colour is no colour and no photo",
    "a.png --background=text.jpg": "text.jpg cannot be read", "a.png --mask --background=red": "not allowed",
    "a.png --checkpoint=none.pth": "there is no checkpoint none.pth", "a.png --output=text.jpg": "is a PNG",
    "one two --output=out": "would both become", "four --output=out": "would both become",
    "one --output=two/../one": "would overwrite", "link.png --output=. --overwrite": "would overwrite",
    "three --output=three": "would mix", "top/s --output=top": "would mix", "one --output=b.png": "one file",
    "one/a.png --output=one/a.png --overwrite": "would overwrite", "one/a.png two/a.png --output=b.png": "one file",
    "a.png --output=text.jpg/c.png": "cannot be written",
}  # fmt: skip


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_gets_one_line_and_nothing_is_written(run, stub, arguments):
    stub()
    save_pictures("a.png", "one/a.png", "two/a.png", "three/a.jpg", "four/a.jpg", "four/a.png", "four/a.jpg.webp",
                  "top/s/s/q.jpg")  # fmt: skip
    os.symlink("one/a.png", "link.png")
    Path("empty").mkdir()
    Path("text.jpg").write_text("no photo")
    before = {name: Path(name).read_bytes() for name in outputs(".")}
    code, lines, (error,) = run(*arguments.split())
    assert (code, lines) == (2, [])
    assert error.startswith("predict.py: error: ")
    assert MISTAKES[arguments] in error
    assert {name: Path(name).read_bytes() for name in outputs(".")} == before


PROGRAM = """
import sys, types
import models.large, training.mine  # a package, and a folder without __init__.py
sys.modules["utils"] = types.ModuleType("utils")  # one that cannot say where it is from
theirs = {name: sys.modules[name] for name in ("models", "models.large", "training", "training.mine", "utils")}
sys.path.append(sys.argv[1])
before = list(sys.path)  # PyTorch 2.9 adds a folder of its own behind them
from predict import load
print(load(sys.argv[2], "cpu")(sys.argv[3]).shape, sys.path[: len(before)] == before, "loading" in sys.modules)
print(all(sys.modules[name] is module for name, module in theirs.items()))
print({"pycocotools", "albumentations", "msgspec", "simplejpeg", "datasets", "trainer"} & {*sys.modules})
import loading, models.small  # only now
print(loading.MINE + models.small.MINE)
"""


@pytest.mark.slow
def test_a_program_may_have_modules_of_the_same_names_and_gets_few_others(tmp_path, small_checkpoint):
    for name in ("script", "loading", "models/__init__", "models/large", "models/small", "training/mine"):
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(PROGRAM if name == "script" else "MINE = 1\n")
    photo, script = save_picture(tmp_path / "a.jpg"), tmp_path / "script.py"
    command = [sys.executable, script, predict.HERE, small_checkpoint, photo]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["(50, 70, 4) True False", "True", "set()", "2"], done.stderr
