"""Reading what images are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fdcompile.tools.evaluate.captions import Caption, read_captions

COCO: dict[str, Any] = {
    "images": [{"id": 9, "file_name": "000009.jpg"}, {"id": 4, "file_name": "000004.jpg"}],
    "annotations": [
        {"id": 31, "image_id": 9, "caption": "A dog runs. "},
        {"id": 12, "image_id": 9, "caption": "A dog on the beach."},
        {"id": 20, "image_id": 4, "caption": "Two cats."},
    ],
}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    path = tmp_path / "captions_val2017.json"
    path.write_text(json.dumps(COCO))
    return path


def test_of_coco_the_first_caption_of_each_image(coco: Path) -> None:
    assert read_captions(coco, seed=5, most=None) == [
        Caption(0, "Two cats.", 5, "000004.jpg"),
        Caption(1, "A dog on the beach.", 6, "000009.jpg"),
    ]
    assert len(read_captions(coco, seed=0, most=1)) == 1


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"images": []}, "a caption is of the image 4"),
        ({"annotations": [{"id": 1}]}, "no file of COCO captions.*KeyError"),
        ({"annotations": []}, "0 captions"),
        ({"images": {"id": 1}}, "no file of COCO captions.*TypeError"),
    ],
)
def test_another_file_is_refused(coco: Path, changed: dict[str, Any], expected: str) -> None:
    coco.write_text(json.dumps(COCO | changed))
    with pytest.raises(ValueError, match=expected):
        read_captions(coco, seed=0, most=None)


def test_text_and_json_lines(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("one\n\ntwo\n")
    assert read_captions(text, 7, None) == [Caption(0, "one", 7, "00000000.png"), Caption(2, "two", 9, "00000002.png")]
    lines.write_text('{"prompt": "one", "seed": 3}\n{"prompt": "two"}\n')
    assert [caption.seed for caption in read_captions(lines, 7, 2)] == [3, 8]
    with pytest.raises(ValueError, match="2 captions, expected at least 3"):
        read_captions(lines, 0, 3)
    lines.write_text("no object\n")
    with pytest.raises(ValueError, match="line 1"):
        read_captions(lines, 0, None)
