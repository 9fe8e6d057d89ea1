"""Photos that are held out: the same ones whatever else the set holds, and nothing in both parts."""

from __future__ import annotations

import json

from datasets import COCOPersonDataset
from tools.bench import hold_out


def test_both_parts_are_the_whole_set(coco_root, tmp_path):
    assert hold_out.run_command(["hold_out.py", str(coco_root), "train2017", "3", str(tmp_path / "parted")]) == 0
    whole = COCOPersonDataset(coco_root, "train2017", 64)
    parts = [COCOPersonDataset(tmp_path / "parted", split, 64) for split in ("val2017", "train2017")]
    images = json.loads((tmp_path / "parted/annotations/instances_val2017.json").read_text())["images"]
    assert len(images) == 3
    names = [[part.file_name(index) for index in range(len(part))] for part in parts]
    assert sorted(names[0] + names[1]) == sorted(whole.file_name(index) for index in range(10))
    masks = {whole.file_name(index): whole[index] for index in range(10)}
    assert all((part[i] == masks[part.file_name(i)]).all() for part in parts for i in range(len(part)))


def test_a_photo_stays_held_out_when_others_go():
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(50)]
    content = {"images": images, "annotations": []}
    held = [image["id"] for image in hold_out.part(content, 10)["val2017"]["images"]]
    fewer = {"images": [image for image in images if image["id"] in held or image["id"] % 2], "annotations": []}
    assert [image["id"] for image in hold_out.part(fewer, 10)["val2017"]["images"]] == held


def test_a_mistake_gets_one_line_and_nothing_is_overwritten(coco_root, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for arguments, said in (
        ([str(tmp_path), "train2017", "3", str(tmp_path / "new")], "there is no"),
        ([str(coco_root), "train2017", "3", str(tmp_path / "there")], "is there already"),
        ([str(coco_root), "train2017", "99", str(tmp_path / "new")], "99 of "),
        ([str(coco_root), "train2017", "-3", str(tmp_path / "new")], "-3 of "),
    ):
        assert hold_out.run_command(["hold_out.py", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
