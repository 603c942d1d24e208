"""The demo's image: the images of each run, side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fdcompile.measure.metrics import AMPLIFICATION, difference

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    from fdcompile.cli.comparison import Run
    from fdcompile.measure.metrics import Images

_TILE = 160  # pixels that a narrower image is scaled up to
_MARGIN = 14
_HEADER = 56
_LABEL_WIDTH = 260
_LABEL_CHARACTERS = 34
_LINE = 20
_TITLE_CHARACTER = 9  # its width
_INK, _GRAY, _PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


def sheet(runs: Sequence[Run], prompts: Sequence[str]) -> Image.Image:
    """Draws a row for each prompt with the images of all runs; with two runs also their difference."""
    stock, *others = runs
    columns = [(run.variant.name, f"{run.work.unet_calls} encoder runs", run.images) for run in runs]
    if len(others) == 1:
        note = f"amplified {AMPLIFICATION} times"
        columns.append(("difference", note, difference(others[0].images, stock.images)))
    return side_by_side(columns, prompts)


def side_by_side(columns: Sequence[tuple[str, str, Images]], prompts: Sequence[str]) -> Image.Image:
    """Draws a row for each prompt; each of `columns` has a title, a note, and an image for each prompt."""
    from PIL import Image, ImageDraw

    count, height, width = columns[0][2].shape[:3]
    scale = max(1, _TILE // width)
    tile = (width * scale, height * scale)
    titles = [textwrap.wrap(title, tile[0] // _TITLE_CHARACTER) for title, _, _ in columns]
    header = _HEADER + (max(map(len, titles)) - 1) * _LINE
    page = (_LABEL_WIDTH + len(columns) * (tile[0] + _MARGIN), header + count * (tile[1] + _MARGIN))
    sheet = Image.new("RGB", page, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(prompts):
        _draw_label(draw, prompt, header + row * (tile[1] + _MARGIN), tile[1])
    for column, (lines, (_, note, images)) in enumerate(zip(titles, columns, strict=True)):
        left = _LABEL_WIDTH + column * (tile[0] + _MARGIN)
        middle = left + tile[0] // 2
        for number, line in enumerate(reversed(lines)):
            draw.text((middle, header - 36 - number * _LINE), line, _INK, _font(17), anchor="mm")
        draw.text((middle, header - 15), note, _GRAY, _font(13), anchor="mm")
        for row, image in enumerate(images):
            scaled = Image.fromarray(image).resize(tile, Image.Resampling.NEAREST)
            sheet.paste(scaled, (left, header + row * (tile[1] + _MARGIN)))
    return sheet


def _draw_label(draw: ImageDraw.ImageDraw, prompt: str, top: int, height: int) -> None:
    """Draws the prompt in the left margin, wrapped, cut to the lines that fit, and centered vertically."""
    lines = textwrap.wrap(prompt, _LABEL_CHARACTERS, max_lines=max(1, height // _LINE), placeholder=" ...")
    first = top + (height - (len(lines) - 1) * _LINE) // 2
    for number, line in enumerate(lines):
        draw.text((_MARGIN, first + number * _LINE), line, _INK, _font(14), anchor="lm")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)
