"""Plots of a study: Figures 2 and 3 of the paper for the studied model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fdcompile.measure.metrics import Images
from fdcompile.measure.plot import Plot, render
from fdcompile.tools.study.parts import Block

Blocks = Mapping[str, Block]

CHANGES, NORMS, COMPONENTS = "changes.png", "norms.png", "components.png"

_COLORS = {"E": "Blues", "B": "Greens", "D": "Oranges"}


def plots(blocks: Blocks, components: Mapping[str, Images], shown: Sequence[int]) -> dict[str, Plot]:
    """Plots changes (Fig. 2a), norms (Fig. 2b, 2c) and principal components (Fig. 3); returns them by file name.

    Args:
        blocks: blocks by name, in execution order.
        components: images of each block at the steps `shown`, shape ``[steps, height, width, 3]``.
        shown: indices into the schedule.
    """
    size = 1.1 * len(shown) + 0.8, 1.1 * len(components) + 0.5
    return {
        CHANGES: render(partial(_changes, blocks), (11, 4), dpi=120),
        NORMS: render(partial(_norms, blocks), (11, 4), dpi=120),
        COMPONENTS: render(partial(_components, components, shown), size, dpi=120),
    }


def _changes(blocks: Blocks, figure: Any) -> None:
    panels = figure.subplots(1, 2)
    for name, block in blocks.items():
        for panel, values in zip(panels, (block.changes, block.relative), strict=True):
            panel.semilogy(range(1, len(values)), values[1:], label=name, color=_color(blocks, name))
    for panel, title in zip(panels, ("mean squared change (Eq. 2)", "relative change"), strict=True):
        panel.set(title=title, xlabel="step")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8, ncols=2)


def _norms(blocks: Blocks, figure: Any) -> None:
    panels = figure.subplots(1, 2)
    names = list(blocks)
    norms = [blocks[name].norms for name in names]
    boxes = panels[0].boxplot(norms, whis=(0, 100), patch_artist=True, medianprops={"color": "gray"})
    panels[1].bar(names, [float(np.std(values)) for values in norms], color=[_color(blocks, name) for name in names])
    for box, name in zip(boxes["boxes"], names, strict=True):
        box.set_facecolor(_color(blocks, name))
    panels[0].set_xticks(range(1, len(names) + 1), names)
    for panel, title in zip(panels, ("Frobenius norm over the steps", "its standard deviation"), strict=True):
        panel.set(title=title)
        panel.tick_params(axis="x", rotation=45)
        panel.grid(axis="y", alpha=0.3)


def _components(components: Mapping[str, Images], shown: Sequence[int], figure: Any) -> None:
    """One row for each block, one column for each step."""
    axes = figure.subplots(len(components), len(shown), squeeze=False)
    for axis, step in zip(axes[0], shown, strict=True):
        axis.set_title(f"step {step}", fontsize=9)
    for row, (name, images) in zip(axes, components.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")


def _color(blocks: Blocks, name: str) -> Any:
    """Returns the color of a block; blocks with the same letter get darker in execution order."""
    from matplotlib import colormaps

    alike = [other for other in blocks if other[0] == name[0]]
    share = alike.index(name) / max(1, len(alike) - 1)
    return colormaps[_COLORS[name[0]]](0.4 + 0.5 * share)
