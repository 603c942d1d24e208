"""Reports as one HTML file with sections; the template is ``report.html.j2``."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdcompile.io import atomic_write
from fdcompile.measure.metrics import AMPLIFICATION, Images, difference

if TYPE_CHECKING:
    from fdcompile.measure.plot import Plot
    from fdcompile.measure.timeline import Timeline

_TEMPLATE = "report.html.j2"
_SMALL = 128
"""Width in pixels below which images are enlarged, without interpolation."""


@dataclass
class HtmlReport:
    """One HTML file with embedded images and plots. Sections are in the order of the method calls.

    Attributes:
        title: model, sampler and guidance.
        finding: the result in one sentence.
    """

    title: str
    finding: str
    _sections: list[dict[str, Any]] = field(default_factory=list)

    def _add(self, kind: str, heading: str, note: str = "", **content: Any) -> None:
        self._sections.append({"kind": kind, "heading": heading, "note": note, "content": content})

    def text(self, heading: str, *paragraphs: str) -> None:
        self._add("text", heading, paragraphs=paragraphs)

    def table(self, heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
        """Adds a table; the first cell of a row is its name."""
        self._add("table", heading, note, columns=columns, rows=rows)

    def plot(self, heading: str, plot: Plot, alt: str, note: str = "") -> None:
        """Adds a plot, light or dark depending on the browser's setting."""
        from PIL import Image

        with Image.open(io.BytesIO(plot.light)) as image:
            light = _image(plot.light, alt, *image.size)
        self._add("plot", heading, note, image=light, dark=_source(plot.dark))

    def compared(
        self, heading: str, stock: tuple[str, Images], others: Sequence[tuple[str, Images]], prompts: Sequence[str]
    ) -> None:
        """Adds a row for each prompt, with the stock image, the others and their differences from it."""
        differences = [(f"{name}, difference", difference(images, stock[1])) for name, images in others]
        columns = [stock, *others, *differences]
        rows = [
            (prompt, [_embedded(images[row], f"{name}: {prompt}") for name, images in columns])
            for row, prompt in enumerate(prompts)
        ]
        note = f"Differences are from the stock image, amplified {AMPLIFICATION} times."
        self._add("gallery", heading, note, columns=[name for name, _ in columns], rows=rows)

    def timeline(self, heading: str, timelines: Sequence[Timeline]) -> None:
        """Adds the steps of each run."""
        self._add("timeline", heading, timelines=timelines)

    def made(self, command: str, facts: Mapping[str, str]) -> None:
        """Adds the command and the versions that the report was made with."""
        self._add("made", "How it was made", command=command, facts=facts)

    def html(self) -> str:
        from jinja2 import Environment, PackageLoader, StrictUndefined  # torch needs it, too

        options: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
        environment = Environment(loader=PackageLoader("fdcompile.measure", "."), undefined=StrictUndefined, **options)
        template = environment.get_template(_TEMPLATE)
        return template.render(title=self.title, finding=self.finding, sections=self._sections)

    def save(self, path: Path) -> None:
        """Writes the file, atomically."""
        with atomic_write(path) as partial:
            partial.write_text(self.html(), encoding="utf-8")


def _embedded(pixels: Images, alt: str) -> dict[str, Any]:
    from PIL import Image

    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.save(buffer, "png")
    scale = max(1, _SMALL // image.width)
    return _image(buffer.getvalue(), alt, image.width * scale, image.height * scale, sharp=scale > 1)


def _image(png: bytes, alt: str, width: int, height: int, sharp: bool = False) -> dict[str, Any]:
    return {"source": _source(png), "alt": alt, "width": width, "height": height, "sharp": sharp}


def _source(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def finding(name: str, psnr: float, share: float, baseline: tuple[int, float] | None) -> str:
    """Describes the result of a comparison in one sentence.

    Args:
        name: name of the variant.
        psnr: PSNR in dB to the stock images.
        share: FLOPs as a share of stock's.
        baseline: steps and PSNR of the fewer-steps baseline, if there is one.
    """
    fewer = "" if baseline is None else f"; stock with {baseline[0]} steps: {baseline[1]:.1f} dB"
    return f"{name[:1].upper()}{name[1:]}: {psnr:.1f} dB to stock at {share:.2f} of its FLOPs{fewer}."
