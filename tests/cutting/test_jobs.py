"""Which outputs are kept, and what their notes say."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers import PICTURE, save_picture
from PIL import Image, PngImagePlugin

from cutting.jobs import BESIDE_INPUT, FOREIGN, OF_ANOTHER, UP_TO_DATE, origin, plan, split_jobs
from cutting.png import encode_png

HOW = "cutout, by 012345"


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    """An output that predict.py has made of in/a.jpg."""
    monkeypatch.chdir(tmp_path)
    photo, output = save_picture(Path("in/a.jpg")), Path("out/a.png")
    output.parent.mkdir()
    output.write_bytes(b"".join(encode_png(PICTURE, None, "; ".join([*origin(photo, HOW), "look at 64"]))))
    return output


def why_kept(photo: str = "in/a.jpg", output: str = "out/a.png", how: str = HOW, **options: bool) -> str | None:
    """The reason for which an output is kept, or None if it is to be made."""
    job = Path(photo), Path(output)
    todo, kept = split_jobs([job], how, **{"overwrite": False, "by_name": False} | options)
    assert (todo, kept) in (([job], {}), ([], {why: [job[1]] for why in kept}))
    return next(iter(kept), None)


def test_an_output_is_kept_if_it_is_what_would_be_made_or_made_of_another_photo(made):
    assert why_kept() == UP_TO_DATE
    assert why_kept(overwrite=True) is why_kept(how="mask, by 012345") is why_kept(output="out/b.png") is None
    os.rename("in", "elsewhere")
    assert why_kept("elsewhere/a.jpg") == UP_TO_DATE  # the same photo
    save_picture(Path("in/a.jpg"), PICTURE[:20])
    assert why_kept() is None  # the photo has changed
    save_picture(Path("two/a.jpg"), PICTURE[:20])
    assert why_kept("two/a.jpg", how="mask, by 012345") == OF_ANOTHER
    assert why_kept("two/a.jpg", overwrite=True) is None
    made.write_bytes(b"".join(encode_png(PICTURE, None, "; ".join(origin(Path("in/a.jpg"), HOW)))))
    assert why_kept() is None  # from before there were two looks


def edit(path: Path) -> None:
    """As a program does that keeps the text chunks it does not know."""
    with Image.open(path) as image:
        info = PngImagePlugin.PngInfo()
        info.add_text("Silueta", image.text["Silueta"])
        Image.fromarray(255 - np.asarray(image)).save(path, pnginfo=info)


@pytest.mark.parametrize("change", [edit, save_picture, lambda path: (path.unlink(), path.mkdir())])
def test_a_file_that_others_made_or_changed_is_kept(made, change):
    change(made)
    assert why_kept() == FOREIGN
    assert why_kept(overwrite=True) is None
    os.rename(made, "in/a.png")
    assert why_kept(output="in/a.png", overwrite=True) == BESIDE_INPUT  # it may be another photo
    assert why_kept(output="in/a.png", overwrite=True, by_name=True) is None


def test_a_users_photo_beside_other_photos_of_the_run_is_not_overwritten(tmp_path):
    for name in ("a/x.jpg", "a/y.png", "b/y.jpg"):
        save_picture(tmp_path / name)
    jobs, _ = plan([str(tmp_path / "a/x.jpg"), str(tmp_path / "b/y.jpg")], tmp_path / "a")
    todo, kept = split_jobs(jobs, HOW, overwrite=True, by_name=False)
    assert [made.name for _, made in todo] == ["x.png"]
    assert kept == {BESIDE_INPUT: [tmp_path / "a/y.png"]}
