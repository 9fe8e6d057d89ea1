"""Every kind of photo in: files made by hand, by Pillow and by OpenCV."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from helpers import PICTURE, fresh_python, save_picture
from PIL import Image

from cutting import photos
from cutting.photos import PhotoError, open_photo
from loading import headers

GREY, RAMP = PICTURE[..., 1], np.tile(np.linspace(0, 255, 70).astype(np.uint8), (50, 1))
DEEP = (np.arange(50 * 70, dtype=np.uint16) * 18).reshape(50, 70)  # 0 to 62982
DEEP_RGB = np.dstack([DEEP, DEEP[::-1], DEEP[:, ::-1]])


def encoded(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.dstack([grey] * 3)


def kinds() -> dict[str, tuple[bytes, np.ndarray, np.ndarray | None]]:
    """File name: (content, the RGB that must come out, the alpha that it has)."""
    palette, grey16 = Image.fromarray(PICTURE).quantize(16), as_rgb(DEEP // 256)
    colours, numbers = np.array(palette.getpalette()).reshape(-1, 3), np.asarray(palette)
    from_palette, big_endian = colours[numbers].astype(np.uint8), DEEP.astype(">u2").tobytes()
    ink = np.dstack([PICTURE, GREY // 2])  # cyan, magenta, yellow, black
    from_ink = ((255 - PICTURE.astype(int)) * (255 - as_rgb(GREY // 2)) / 255 + 0.5).astype(np.uint8)
    la = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(RAMP)])
    frames = {"save_all": True, "append_images": [palette.rotate(180)]}
    key = {"transparency": tuple(map(int, PICTURE[9, 9]))}
    return {
        "dot.png": (encoded(PICTURE[:1, :1], "PNG"), PICTURE[:1, :1], None),
        "bilevel.tif": (encoded(GREY > 100, "TIFF"), as_rgb((GREY > 100).astype(np.uint8) * 255), None),
        "palette_alpha.png": (encoded(palette, "PNG", transparency=bytes(range(16))), from_palette, numbers),
        "two_frames.gif": (encoded(palette, "GIF", **frames), from_palette, None),
        "ink.tif": (encoded(Image.frombytes("CMYK", (70, 50), ink.tobytes()), "TIFF"), from_ink, None),
        "rgba.png": (encoded(np.dstack([PICTURE, RAMP]), "PNG"), PICTURE, RAMP),
        "la.png": (encoded(la, "PNG"), as_rgb(GREY), RAMP),
        "key.png": (encoded(PICTURE, "PNG", **key), PICTURE, np.where((PICTURE[9, 9] == PICTURE).all(2), 0, 255)),
        "grey16.png": (encoded(DEEP, "PNG"), grey16, None),
        "grey16.tif": (encoded(Image.frombytes("I;16B", (70, 50), big_endian), "TIFF"), grey16, None),
        "grey16.pgm": (b"P5 70 50 65535\n" + big_endian, grey16, None),
        "rgba16.png": (cv2.imencode(".png", np.dstack([DEEP_RGB[..., ::-1], DEEP]))[1], DEEP_RGB // 256, DEEP // 256),
    }


@pytest.mark.parametrize(("name", "kind"), kinds().items(), ids=kinds())
def test_every_kind_keeps_size_colours_and_its_own_alpha(tmp_path, name, kind):
    content, rgb, alpha = kind
    (tmp_path / name).write_bytes(content)
    photo = open_photo(tmp_path / name)
    found = np.full(rgb.shape[:2], 255, np.uint8) if photo.alpha is None else photo.alpha
    assert photo.rgb.dtype == found.dtype == np.uint8
    np.testing.assert_array_equal(photo.rgb, rgb)
    np.testing.assert_array_equal(found, 255 if alpha is None else alpha)


def test_a_jpeg_of_inks_keeps_colours(tmp_path):
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "red.jpg")  # stored inverted, as Adobe does
    np.testing.assert_allclose(open_photo(tmp_path / "red.jpg").rgb, np.full((32, 32, 3), [255, 0, 0]), atol=3)


def test_grey_of_twelve_bits_is_scaled_and_of_floating_point_refused(tmp_path):
    image = Image.fromarray(DEEP // 16)
    image.tag_v2 = {258: (12,)}
    np.testing.assert_array_equal(photos.convert(image).rgb, as_rgb(DEEP // 256))
    with pytest.raises(PhotoError, match=r"float.tif cannot be read: .* floating-point"):
        open_photo(save_picture(tmp_path / "float.tif", PICTURE[..., 0].astype(np.float32)))


def test_exif_orientation_is_applied_and_the_callers_image_not_turned(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # by the EXIF standard a quarter turn to the right makes it upright
    for name, options in (("a.png", {}), ("a.tif", {}), ("a.webp", {"lossless": True})):
        with Image.open(save_picture(tmp_path / name, exif=exif, **options)) as image:
            size = image.size
            for photo in (tmp_path / name, image):
                np.testing.assert_array_equal(open_photo(photo).rgb, np.rot90(PICTURE, -1), err_msg=name)
            assert image.size == size
    jpeg = save_picture(tmp_path / "a.jpg", exif=exif)
    np.testing.assert_array_equal(open_photo(jpeg).rgb, cv2.imread(str(jpeg), cv2.IMREAD_COLOR_RGB))
    deep = save_picture(tmp_path / "deep.png", DEEP, exif=exif)
    np.testing.assert_array_equal(open_photo(deep).rgb[..., 0], np.rot90(DEEP // 256, -1))


def test_damaged_exif_does_not_spoil_a_photo(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "getexif", lambda self: struct.unpack(">I", b""))
    np.testing.assert_array_equal(open_photo(save_picture(tmp_path / "a.png")).rgb, PICTURE)


def test_photos_of_200_megapixels_are_opened_and_pillows_limit_is_left_to_the_program(tmp_path, monkeypatch):
    path = save_picture(tmp_path / "a.png")  # of 3500 pixels
    own = "from PIL import Image; before = Image.MAX_IMAGE_PIXELS; import cutting.photos as photos"
    assert fresh_python(f"{own}; print(before == photos.PILLOW_LIMIT == Image.MAX_IMAGE_PIXELS)") == ["True"]
    assert photos.MAX_PIXELS == headers.MAX_PIXELS > 200e6
    monkeypatch.setattr(photos, "PILLOW_LIMIT", 1000)
    for limit, is_refused in ((1000, False), (1001, True)):  # Pillow's own, and one that a program has set
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(PhotoError, match="limit of 2002 pixels") if is_refused else contextlib.nullcontext():
            assert open_photo(path).rgb.shape == (50, 70, 3)
        assert limit == Image.MAX_IMAGE_PIXELS


def test_heic_is_registered_if_its_plugin_is_installed(monkeypatch):
    registered = []
    library = SimpleNamespace(register_heif_opener=lambda: registered.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", library)
    photos.readable_formats.cache_clear()
    assert {"JPEG", "EPS"} & {*photos.readable_formats()} == {"JPEG"}
    assert registered == [1]
