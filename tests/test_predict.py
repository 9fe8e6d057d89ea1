"""Photos to cutouts, without a training: a small random model, or a stub where the alpha must be known."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import save_random_model, sharpen
from PIL import Image, ImageCms, features

import predict
from cutting import photos
from cutting.cutter import Cutter, load
from cutting.photos import PhotoError, read_photo
from datasets import letterbox
from models import UNetAutoencoder
from predict import run_command
from training import checkpoints
from utils import CheckpointError, read_checkpoint

RNG = np.random.default_rng(0)
PICTURE = cv2.resize(RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8), (70, 50), interpolation=cv2.INTER_CUBIC)
GREY, RAMP = PICTURE[..., 1], np.tile(np.linspace(0, 255, 70).astype(np.uint8), (50, 1))
DEEP = (np.arange(50 * 70, dtype=np.uint16) * 18).reshape(50, 70)  # 0 to 62982
DEEP_RGB = np.dstack([DEEP, DEEP[::-1], DEEP[:, ::-1]])
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # as in each thread of a run
    yield
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return save_random_model(tmp_path_factory.mktemp("model") / "best_model.pth", change=sharpen)


@pytest.fixture(scope="module")
def cut(checkpoint) -> Cutter:
    return load(checkpoint, "cpu")


@pytest.fixture
def stub(monkeypatch):
    """Replaces the network by a function of (N, H, W) to alpha (N, H, W); by default all of it is a person."""
    return lambda alpha=torch.ones_like: set_stub(monkeypatch, alpha)


def set_stub(monkeypatch, alpha) -> None:
    def predicted(self, images):
        return torch.cat([images, alpha(images[:, 0])[:, None]], dim=1)

    monkeypatch.setattr(UNetAutoencoder, "predict", predicted)


@pytest.fixture
def run(checkpoint, cut, capsys, monkeypatch):
    """Runs the command line. Returns its exit code and the lines that it wrote to stdout and stderr."""

    def run(*arguments) -> tuple[int, list[str], list[str]]:
        loads_itself = {"--checkpoint", "--device"} & set(arguments)
        monkeypatch.setattr(predict, "load", load if loads_itself else lambda *_: cut)
        defaults = ["--checkpoint", checkpoint] if "--checkpoint" not in arguments else []
        code = run_command([str(part) for part in ("predict.py", *arguments, *defaults)])
        return code, *(text.strip("\n").splitlines() for text in capsys.readouterr())

    return run


def save(path: Path, picture=PICTURE, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **options)
    return path


def outputs(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def read_rgba(path: Path) -> np.ndarray:
    """Decoded by OpenCV, which has no part in the reading of photos."""
    return cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), cv2.COLOR_BGRA2RGBA)


def constant(value: float):
    return lambda red: torch.full_like(red, value)


# --- every kind of photo ----------------------------------------------------------------------------------


def png_file(size: tuple[int, int], bits: int, colour: int, rows: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written out by hand, for what Pillow does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*c) for c in chunks) + data + chunk(b"IEND", b"")


def encoded(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def opened_by_cv2(content: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)


def as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.dstack([grey] * 3)


def kinds() -> dict[str, tuple[bytes, np.ndarray, np.ndarray | None]]:
    """File name: (content, the RGB that must come out, the alpha that it has)."""
    palette = Image.fromarray(PICTURE).quantize(16)
    colours, numbers = np.array(palette.getpalette()).reshape(-1, 3), np.asarray(palette)
    from_palette, see_through = colours[numbers].astype(np.uint8), np.where(numbers == 3, 0, 255)
    bilevel, four_greys = GREY > 100, GREY >> 6
    packed = (four_greys[:, :68].reshape(50, 17, 4) << np.array([6, 4, 2, 0])).sum(axis=2).astype(np.uint8)
    ink = np.dstack([PICTURE, GREY // 2])  # cyan, magenta, yellow, black
    from_ink = ((255 - PICTURE.astype(int)) * (255 - as_rgb(GREY // 2)) / 255 + 0.5).astype(np.uint8)
    big_endian, rgb_key = DEEP.astype(">u2"), DEEP_RGB.astype(">u2")
    key_places = np.where((DEEP_RGB[0, 0] >> 8 == DEEP_RGB >> 8).all(axis=2), 0, 255)
    jpegs = {"baseline.jpg": {}, "progressive.jpg": {"progressive": True}, "CAPITALS.JPEG": {"quality": 95}}
    lossy = {name: encoded(PICTURE, "JPEG", **options) for name, options in jpegs.items()}
    lossy["grey.jpg"] = encoded(GREY, "JPEG")
    lossy["rgb16.png"] = cv2.imencode(".png", DEEP_RGB)[1].tobytes()
    rgba, la = np.dstack([PICTURE, RAMP]), Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(RAMP)])
    frames = {"save_all": True, "append_images": [palette.rotate(180)]}
    found = {
        "rgb.png": (encoded(PICTURE, "PNG"), PICTURE, None),
        "rgb.bmp": (encoded(PICTURE, "BMP"), PICTURE, None),
        "lzw.tiff": (encoded(PICTURE, "TIFF", compression="tiff_lzw"), PICTURE, None),
        "lossless.webp": (encoded(PICTURE, "WEBP", lossless=True), PICTURE, None),
        "grey.png": (encoded(GREY, "PNG"), as_rgb(GREY), None),
        "bilevel.tif": (encoded(bilevel, "TIFF"), as_rgb(bilevel.astype(np.uint8) * 255), None),
        "palette.png": (encoded(palette, "PNG"), from_palette, None),
        "palette_key.png": (encoded(palette, "PNG", transparency=3), from_palette, see_through),
        "palette_alpha.png": (encoded(palette, "PNG", transparency=bytes(range(16))), from_palette, numbers),
        "two_frames.gif": (encoded(palette, "GIF", **frames), from_palette, None),
        "key.gif": (encoded(palette, "GIF", transparency=3), from_palette, see_through),
        "ink.tif": (encoded(Image.frombytes("CMYK", (70, 50), ink.tobytes()), "TIFF"), from_ink, None),
        "rgba.png": (encoded(rgba, "PNG"), PICTURE, RAMP),
        "rgba.tif": (encoded(rgba, "TIFF"), PICTURE, RAMP),
        "rgba.webp": (encoded(rgba, "WEBP", lossless=True, exact=True), PICTURE, RAMP),
        "la.png": (encoded(la, "PNG"), as_rgb(GREY), RAMP),
        "rgb_key.png": (encoded(PICTURE, "PNG", transparency=tuple(map(int, PICTURE[9, 9]))), PICTURE,
                        np.where((PICTURE[9, 9] == PICTURE).all(axis=2), 0, 255)),
        "grey_key.png": (encoded(GREY, "PNG", transparency=int(GREY[9, 9])), as_rgb(GREY),
                         np.where(GREY[9, 9] == GREY, 0, 255)),
        "two_bits_key.png": (png_file((68, 50), 2, 0, packed, (b"tRNS", b"\0\1")), as_rgb(four_greys[:, :68] * 85),
                             np.where(four_greys[:, :68] == 1, 0, 255)),
        "grey16.png": (encoded(DEEP, "PNG"), as_rgb(DEEP // 256), None),
        "grey16_key.png": (png_file((70, 50), 16, 0, big_endian, (b"tRNS", big_endian[7, 7:8].tobytes())),
                           as_rgb(DEEP // 256), np.where(DEEP[7, 7] == DEEP, 0, 255)),
        "grey16.tif": (encoded(DEEP, "TIFF"), as_rgb(DEEP // 256), None),
        "grey16_big_endian.tif": (encoded(Image.frombytes("I;16B", (70, 50), big_endian.tobytes()), "TIFF"),
                                  as_rgb(DEEP // 256), None),
        "grey16.pgm": (b"P5 70 50 65535\n" + big_endian.tobytes(), as_rgb(DEEP // 256), None),
        "rgb16_key.png": (png_file((70, 50), 16, 2, rgb_key, (b"tRNS", rgb_key[0, 0].tobytes())), DEEP_RGB // 256,
                          key_places),
        "rgba16.png": (cv2.imencode(".png", np.dstack([DEEP_RGB[..., ::-1], DEEP]))[1].tobytes(), DEEP_RGB // 256,
                       DEEP // 256),
        "wide.png": (encoded(PICTURE.reshape(1, -1, 3), "PNG"), PICTURE.reshape(1, -1, 3), None),
        "high.png": (encoded(PICTURE.reshape(-1, 1, 3), "PNG"), PICTURE.reshape(-1, 1, 3), None),
        "dot.png": (encoded(PICTURE[:1, :1], "PNG"), PICTURE[:1, :1], None),
    }  # fmt: skip
    return found | {name: (content, opened_by_cv2(content), None) for name, content in lossy.items()}


KINDS = kinds()


@pytest.fixture(scope="module")
def cutouts(tmp_path_factory, cut) -> Path:
    """Every kind in one folder, cut out by one run in which all is a person."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, (content, _, _) in KINDS.items():
        (folder / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        set_stub(patch, torch.ones_like)
        patch.setattr(predict, "load", lambda *_: cut)
        assert run_command(["predict.py", str(folder), "--output", str(folder / "out")]) == 0
    return folder / "out"


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_keeps_size_colours_and_its_own_alpha(cutouts, name):
    _, rgb, alpha = KINDS[name]
    stem = Path(name).with_suffix(".png").name
    path = next(path for path in (cutouts / f"{name}.png", cutouts / stem) if path.exists())
    assert Image.open(path).mode == "RGBA"
    found = read_rgba(path)
    np.testing.assert_array_equal(found[..., :3], rgb)
    np.testing.assert_array_equal(found[..., 3], np.full(rgb.shape[:2], 255) if alpha is None else alpha)


def test_lossy_kinds_without_a_second_decoder(tmp_path):
    flat = Image.new("CMYK", (32, 32), (0, 255, 255, 0))  # red; its JPEG is stored inverted, as Adobe does
    flat.save(tmp_path / "red.jpg")
    np.testing.assert_allclose(read_photo(tmp_path / "red.jpg").rgb, np.full((32, 32, 3), [255, 0, 0]), atol=3)
    if features.check("avif"):
        found = read_photo(save(tmp_path / "photo.avif", quality=95)).rgb
        assert np.abs(found.astype(int) - PICTURE).mean() < 4


def test_grey_of_twelve_bits_and_floating_point(tmp_path):
    image = Image.fromarray(DEEP // 16)
    image.tag_v2 = {258: (12,)}
    np.testing.assert_array_equal(photos.to_photo(image).rgb, as_rgb(DEEP // 256))
    with pytest.raises(PhotoError, match=r"float.tif cannot be read: .* floating-point"):
        read_photo(save(tmp_path / "float.tif", PICTURE[..., 0].astype(np.float32)))


UPRIGHT = {  # what the orientation's number does to the stored pixels, by the EXIF standard
    1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1), 6: lambda p: np.rot90(p, -1), 7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p),
}  # fmt: skip


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientations(tmp_path, cut, stub, orientation):
    stub()
    exif = Image.Exif()
    exif[274] = orientation
    expected = UPRIGHT[orientation](PICTURE)
    for name in ("a.png", "a.tif", "a.webp"):
        path = save(tmp_path / name, exif=exif, **({"lossless": True} if name == "a.webp" else {}))
        image = Image.open(path)
        size = image.size
        for photo in (path, image):
            np.testing.assert_array_equal(cut(photo)[..., :3], expected, err_msg=name)
        assert image.size == size  # the caller's image is not turned
    jpeg = save(tmp_path / "a.jpg", exif=exif)
    np.testing.assert_array_equal(cut(jpeg)[..., :3], cv2.imread(str(jpeg), cv2.IMREAD_COLOR_RGB))
    deep = save(tmp_path / "deep.png", DEEP, exif=exif)
    np.testing.assert_array_equal(cut(deep)[..., 0], UPRIGHT[orientation](DEEP // 256))


def test_unreadable_exif_does_not_spoil_a_photo(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*garbage")
    np.testing.assert_array_equal(read_photo(path).rgb, PICTURE)
    monkeypatch.setattr(Image.Image, "getexif", lambda self: struct.unpack(">I", b""))
    np.testing.assert_array_equal(read_photo(path).rgb, PICTURE)


def test_colour_profiles_go_where_they_fit(tmp_path, run, stub):
    stub()
    fake = {space: bytes(16) + space + bytes(200) for space in (b"GRAY", b"CMYK", b"RGB ")}
    save(tmp_path / "in" / "c.png", GREY, icc_profile=fake[b"GRAY"])
    for name, space in (("a.tif", b"CMYK"), ("b.tif", b"RGB ")):
        Image.new("CMYK", (40, 40)).save(tmp_path / "in" / name, icc_profile=fake[space])
    save(tmp_path / "in" / "d.jpg", icc_profile=SRGB[:20] + bytes(2**20))
    save(tmp_path / "in" / "e.jpg", icc_profile=SRGB)
    save(tmp_path / "in" / "f.png", icc_profile=SRGB)
    assert run(tmp_path / "in", "--output", tmp_path / "out")[0] == 0
    found = {path.name: Image.open(path).info.get("icc_profile") for path in (tmp_path / "out").iterdir()}
    assert found == {**dict.fromkeys(("a.png", "b.png", "c.png", "d.png")), "e.png": SRGB, "f.png": SRGB}
    for option, expected in ((["--mask"], None), (["--background", "red"], SRGB)):
        run(tmp_path / "in" / "e.jpg", "--output", tmp_path / "out", "--overwrite", *option)
        image = Image.open(tmp_path / "out" / "e.png")
        image.load()
        assert image.info.get("icc_profile") == expected


def test_heic_where_its_library_is_installed(monkeypatch):
    registered = []
    library = SimpleNamespace(register_heif_opener=lambda: registered.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", library)
    photos.photo_formats.cache_clear()
    assert "JPEG" in photos.photo_formats()
    assert "EPS" not in photos.photo_formats()
    assert registered == [1]


# --- alpha ------------------------------------------------------------------------------------------------


def test_nobody_stays_empty_and_faint_stays_faint(cut, stub):
    for probability, alpha in ((0.0, 0), (0.05, 0), (0.2, 43), (0.5, 128), (0.95, 255), (1.0, 255)):  # 0.15 / 0.9 is 43
        stub(constant(probability))
        rgba = cut(PICTURE)
        assert (rgba[..., 3] == alpha).all()
        np.testing.assert_array_equal(rgba[..., :3], PICTURE)  # where nothing is opaque as well


def test_padding_is_cropped_and_the_rest_enlarged(cut, stub):
    """A 128 x 64 photo lies in rows 16 to 48 of the square; its left quarter is a person."""

    def alpha(red):
        square = torch.ones_like(red)  # in the padding too, where it must not be seen
        square[:, 16:48, 16:] = 0
        return square

    stub(alpha)
    found = cut(np.zeros((64, 128, 3), np.uint8))[..., 3]
    by_hand = np.full(128, 0)
    # linear, pixel centres at a quarter and three quarters, of which a margin of 0.05 is taken
    by_hand[:31], by_hand[31], by_hand[32] = 255, 0.7 / 0.9 * 255, 0.2 / 0.9 * 255
    np.testing.assert_allclose(found, np.broadcast_to(by_hand, (64, 128)), atol=3)


def test_never_more_opaque_than_the_photo(tmp_path, run, stub, cut):
    stub(constant(0.5))
    path = save(tmp_path / "a.png", np.dstack([PICTURE, RAMP]))
    for photo in (path, np.dstack([PICTURE, RAMP])):
        np.testing.assert_array_equal(cut(photo)[..., 3], np.minimum(RAMP, 128))
    run(path, "--mask", "--output", tmp_path / "m", "--threshold", "0.4")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "m" / "a.png")), RAMP)


def test_load_takes_paths_images_and_arrays_and_changes_none(tmp_path, checkpoint):
    cut = load(str(checkpoint), device="cpu")
    path = save(tmp_path / "a.png")
    expected = cut(PICTURE.copy())
    assert expected.dtype == np.uint8
    assert expected.shape == (50, 70, 4)
    image, with_alpha = Image.open(path), np.dstack([PICTURE, np.full_like(GREY, 255)])
    for photo in (path, str(path), image, with_alpha, PICTURE[:, ::-1][:, ::-1]):
        np.testing.assert_array_equal(cut(photo), expected)
    np.testing.assert_array_equal(np.asarray(image), PICTURE)
    for wrong in (PICTURE / 255, GREY, PICTURE[:0]):
        with pytest.raises(PhotoError, match="expected a uint8 array"):
            cut(wrong)
    (tmp_path / "cut.png").write_bytes(path.read_bytes()[:-900])
    with pytest.raises(PhotoError, match="the photo cannot be read"):
        cut(Image.open(tmp_path / "cut.png"))


def test_single_call_folder_and_batch_agree(tmp_path, cut, run):
    photos = [save(tmp_path / "in" / f"{n}.png", np.roll(PICTURE, 9 * n, axis=1)[: 20 + 5 * n]) for n in range(5)]
    assert run(tmp_path / "in", "--output", tmp_path / "folder")[0] == 0
    jobs = [predict.Job(photo, tmp_path / "batch" / photo.name) for photo in photos]
    assert predict.cut_batch(cut, jobs, predict.Style()) == (5, [])
    for photo in photos:
        alone = cut(photo)
        assert np.ptp(alone[..., 3]) > 50
        for folder in ("folder", "batch"):
            np.testing.assert_allclose(read_rgba(tmp_path / folder / photo.name).astype(int), alone, atol=1)


def test_network_sees_the_letterboxed_photo(cut, stub):
    seen = []
    stub(lambda red: seen.append(red) or torch.zeros_like(red))
    cut(PICTURE)
    assert torch.equal(seen[0], torch.from_numpy(letterbox(PICTURE, 64)[0][None, ..., 0]).float() / 255)


# --- names, folders, going on -----------------------------------------------------------------------------


def test_structure_and_names(tmp_path, run, stub):
    stub()
    photos, out = tmp_path / "photos", tmp_path / "photos" / "out"
    for name in ("a.jpg", "a.png", "B.JPG", "b.webp", "sub/deep/my.photo.jpg", "sub/a.jpg", ".hidden.jpg", ".no/a.jpg"):
        save(photos / name)
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
    save(tmp_path / "in" / "a.jpg")
    save(tmp_path / "in" / "b.jpg")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_text("mine")
    code, lines, _ = run(tmp_path / "in", "--output", tmp_path / "out")
    assert (code, lines[0].split(" written")[0]) == (0, "1 of 2 photos")
    assert (tmp_path / "out" / "a.png").read_text() == "mine"
    assert run(tmp_path / "in", "--output", tmp_path / "out", "--overwrite")[0] == 0
    assert Image.open(tmp_path / "out" / "a.png").mode == "RGBA"


def test_refused_before_anything_is_written(tmp_path, run, stub):
    stub()
    save(tmp_path / "one" / "a.png")
    save(tmp_path / "two" / "a.png")
    save(tmp_path / "three" / "a.jpg")
    for name in ("a.jpg", "a.png", "a.jpg.webp"):
        save(tmp_path / "four" / name)
    save(tmp_path / "five" / "five" / "a.jpg")
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
        save(tmp_path / "in" / f"{n}.jpg")
    real, lock, count = predict.encode_png, threading.Lock(), [0]

    def interrupted(picture, icc):
        with lock:
            count[0] += 1
            if count[0] != 4:
                return real(picture, icc)
        if moment == "before":
            raise KeyboardInterrupt
        return cut_off(real(picture, icc))

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
    for kind in ("jpg", "png", "webp", "tif", "bmp", "gif"):
        content = encoded(noise, {"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind))
        (photos / f"whole_{kind}.{kind}").write_bytes(content)
        (photos / f"broken_{kind}.{kind}").write_bytes(content[: len(content) // 2])
    (photos / "broken_empty.jpg").touch()
    (photos / "broken_link.jpg").symlink_to("nowhere.jpg")
    (photos / "broken_text.jpg").write_text("no photo at all\nnot at all")
    (photos / "broken_bomb.png").write_bytes(png_file((20000, 20000), 8, 2, noise[:1]))
    code, lines, errors = run(photos, "--output", tmp_path / "out", "--batch-size", "3")
    assert code == 1
    assert outputs(tmp_path / "out") == {f"whole_{kind}.png" for kind in ("jpg", "png", "webp", "tif", "bmp", "gif")}
    assert lines == [f"6 of 16 photos written to {tmp_path / 'out'}, 10 could not be done"]
    assert sorted(line.split(" cannot be read: ")[0] for line in errors) == sorted(map(str, photos.glob("broken*")))
    assert next(line for line in errors if "bomb" in line).endswith("could be decompression bomb DOS attack.")


def test_folder_that_cannot_be_opened_is_named(tmp_path, run, stub, monkeypatch):
    stub()
    save(tmp_path / "in" / "a.jpg")
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
    save(tmp_path / "in" / f"{'n' * 249}.jpg")  # its output's draft has too long a name
    save(tmp_path / "in" / "a.jpg")
    code, _, errors = run(tmp_path / "in", "--output", tmp_path / "out")
    assert (code, len(errors), outputs(tmp_path / "out")) == (1, 1, {"a.png"})
    assert errors[0].endswith("cannot be written: File name too long")

    def full(pieces, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict, "write", full)
    code, lines, errors = run(tmp_path / "in" / "a.jpg", "--output", tmp_path / "out2")
    assert (code, lines) == (2, [])
    assert errors == [f"predict.py: error: {tmp_path / 'out2' / 'a.png'} cannot be written: No space left on device"]


def test_work_is_bounded_by_pixels(tmp_path, cut, monkeypatch):
    jobs = [predict.Job(save(tmp_path / f"{n}.png"), tmp_path / f"out{n}.png") for n in range(7)]
    monkeypatch.setattr(predict, "BATCH_PIXELS", 3 * 3500)
    assert [(len(batch), pixels) for batch, pixels in predict.batches(jobs, 2)] == [(2, 7000)] * 3 + [(1, 3500)]
    assert [len(batch) for batch, _ in predict.batches(jobs, 9)] == [3, 3, 1]
    lock, at_work, most = threading.Lock(), [0], [0]

    def counted(cutter, batch, style):
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        threading.Event().wait(0.02)
        with lock:
            at_work[0] -= 1
        return len(batch), []

    monkeypatch.setattr(predict, "cut_batch", counted)
    monkeypatch.setattr(predict, "usable_cores", lambda: 4)
    for limit, expected in ((3500 * 2, 2), (1, 1), (10**9, 4)):
        monkeypatch.setattr(predict, "PIXELS_AT_WORK", limit)
        most[0] = 0
        assert predict.cut_all(cut, jobs, predict.Style(), 1) == 0
        assert most[0] == expected


# --- mask, background, threshold --------------------------------------------------------------------------


def by_columns(red: torch.Tensor) -> torch.Tensor:
    """0, 0.25, 0.5 and 1 in four bands of a 64 x 64 square."""
    return torch.tensor([0.0, 0.25, 0.5, 1.0]).repeat_interleave(16).expand_as(red)


def test_mask_threshold_and_background_by_hand(tmp_path, run, stub):
    stub(by_columns)
    photo = save(tmp_path / "a.png", np.full((64, 64, 3), (200, 100, 0), np.uint8))

    def made(*options) -> Image.Image:
        assert run(photo, "--output", tmp_path / "out", "--overwrite", *options)[0] == 0
        return Image.open(tmp_path / "out" / "a.png")

    def bands(image: Image.Image) -> list:
        assert image.size == (64, 64)
        return [image.getpixel((x, y)) for x, y in ((0, 0), (16, 9), (47, 20), (63, 63))]

    assert (made("--mask").mode, bands(made("--mask"))) == ("L", [0, 57, 128, 255])  # 0.2 / 0.9 is 57
    assert bands(made("--mask", "--threshold", "0.5")) == [0, 0, 0, 255]
    assert bands(made("--mask", "--threshold", "0.25")) == [0, 0, 255, 255]
    assert bands(made("--threshold", "0")) == [(200, 100, 0, alpha) for alpha in (0, 255, 255, 255)]
    # 57 and 128 of 255 of the photo over blue: 200 * 57 / 255 = 44.7, 255 * 198 / 255 = 198, and so on
    assert made("--background", "blue").mode == "RGB"
    assert bands(made("--background", "#00f")) == [(0, 0, 255), (45, 22, 198), (100, 50, 127), (200, 100, 0)]
    assert bands(made("--background", "#00f", "--threshold", "0.3"))[1:3] == [(0, 0, 255), (200, 100, 0)]
    # a background of 4 x 2, whose middle half covers the photo
    grounds = np.repeat(np.array([[[9, 9, 9], [10, 20, 30], [10, 20, 30], [8, 8, 8]]], np.uint8), 2, axis=0)
    ground = save(tmp_path / "ground.png", grounds)
    assert bands(made("--background", ground))[0::3] == [(10, 20, 30), (200, 100, 0)]


@pytest.mark.parametrize(
    ("size", "expected"), [((2, 2), [[2, 3], [6, 7]]), ((4, 1), [[1, 2, 3, 4]]), ((1, 2), [[2], [6]])]
)
def test_cover_crops_the_middle(size, expected):
    picture = np.repeat(np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.uint8)[..., None], 3, axis=2)
    found = photos.cover(picture, size)[..., 0]
    assert found.shape == (size[1], size[0])
    np.testing.assert_array_equal(found, expected)


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
        (["a.png", "--mask", "--background", "red"], "not allowed"), (["a.png", "--output", "text.jpg"], "written"),
        (["a.png", "--checkpoint", "none.pth"], "there is no checkpoint none.pth"),
        (["a.png", "--checkpoint", "text.jpg"], "damaged or no checkpoint"), (["a.png", "--device", "tpu9"], "tpu9"),
        (["a.png", "--device", "meta"], "meta"), (["a.png", "--device", "cuda:99"], "cuda:99"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(tmp_path, run, stub, monkeypatch, arguments, words):
    stub()
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no photo")
    code, lines, errors = run(*arguments)
    assert (code, lines, len(errors)) == (2, [], 1)
    assert errors[0].startswith("predict.py: error: ")
    assert words in errors[0]


@pytest.mark.parametrize("change", [
    {"model": {}}, {"model": 5}, {"config": {}}, {"config": None}, {"config": {"encoder": "vgg", "use_attention": 1}},
    {"config": {"encoder": "resnet18", "use_attention": False, "image_size": 64}},
    {"config": {"encoder": "mobilenet_v2", "use_attention": True, "image_size": 64}},
    {"config": {"encoder": "resnet18", "use_attention": True, "image_size": 0}},
    {"config": {"encoder": "resnet18", "use_attention": True, "image_size": "large"}},
])  # fmt: skip
def test_checkpoint_of_another_kind_gets_one_line(tmp_path, run, checkpoint, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    checkpoints.save(read_checkpoint(checkpoint) | change, tmp_path / "other.pth")
    code, lines, errors = run(save(tmp_path / "a.png"), "--checkpoint", "other.pth")
    assert (code, lines, len(errors)) == (2, [], 1)
    assert "other.pth holds no model that can be used here" in errors[0]
    with pytest.raises(CheckpointError, match=r"\A.{1,300}\Z"):  # one line for Python as well
        load("other.pth", "cpu")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        load(tmp_path / "weights.pth", "cpu")


def test_as_a_program(tmp_path, checkpoint):
    program = Path(predict.__file__)
    command = [sys.executable, str(program), str(save(tmp_path / "a.jpg")), "--checkpoint", str(checkpoint)]
    done = subprocess.run([*command, "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 of 1 photos written to cutouts\n", "")
    assert outputs(tmp_path / "cutouts") == {"a.png"}


# --- genuine photos ---------------------------------------------------------------------------------------


def test_all_genuine_photos_keep_size_mode_and_colours(tmp_path, run, stub, shared_coco):
    stub(by_columns)
    code, _, errors = run(shared_coco, "--output", tmp_path)
    assert (code, errors) == (0, [])
    photos = sorted(shared_coco.rglob("*.jpg"))
    assert len(photos) == 415
    for photo in photos:
        path = (tmp_path / photo.relative_to(shared_coco)).with_suffix(".png")
        found = read_rgba(path)
        assert Image.open(path).mode == "RGBA"
        assert {0, 255} <= set(np.unique(found[..., 3]))
        changed = (found[..., :3] != cv2.imread(str(photo), cv2.IMREAD_COLOR_RGB)).any(axis=2)
        assert not changed[(found[..., 3] == 0) | (found[..., 3] == 255)].any(), photo
