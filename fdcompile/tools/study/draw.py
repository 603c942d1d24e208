"""A study as pictures: Figures 2 and 3 of the paper, for the model at hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fdcompile.io import atomic_write

if TYPE_CHECKING:
    from fdcompile.tools.study.study import Study

CHANGES, NORMS, COMPONENTS = "changes.png", "norms.png", "components.png"

_COLOURS = {"E": "Blues", "B": "Greens", "D": "Oranges"}


def draw(study: Study, folder: Path) -> list[Path]:
    """Draws the changes (Fig. 2a), the norms' spread (Fig. 2b, 2c) and the principal components (Fig. 3)."""
    drawn = {CHANGES: _changes(study), NORMS: _norms(study), COMPONENTS: _components(study)}
    for name, figure in drawn.items():
        with atomic_write(folder / name) as partial:
            figure.savefig(partial, dpi=120, format="png")
    return [folder / name for name in drawn]


def _changes(study: Study) -> Any:
    figure, panels = _panels(2, (11, 4))
    steps = range(1, len(study.timesteps))
    for name, block in study.blocks.items():
        for panel, values in zip(panels, (block.changes, block.relative), strict=True):
            panel.semilogy(steps, values[1:], label=name, color=_colour(study, name))
    for panel, title in zip(panels, ("mean squared change (Eq. 2)", "relative change"), strict=True):
        panel.set(title=title, xlabel="step")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8, ncols=2)
    return figure


def _norms(study: Study) -> Any:
    figure, panels = _panels(2, (11, 4))
    names = list(study.blocks)
    norms = [study.blocks[name].norms for name in names]
    boxes = panels[0].boxplot(norms, whis=(0, 100), patch_artist=True, medianprops={"color": "black"})
    panels[1].bar(names, [float(np.std(own)) for own in norms], color=[_colour(study, name) for name in names])
    for box, name in zip(boxes["boxes"], names, strict=True):
        box.set_facecolor(_colour(study, name))
    panels[0].set_xticks(range(1, len(names) + 1), names)
    for panel, title in zip(panels, ("Frobenius norm over the steps", "its standard deviation"), strict=True):
        panel.set(title=title)
        panel.tick_params(axis="x", rotation=45)
        panel.grid(axis="y", alpha=0.3)
    return figure


def _components(study: Study) -> Any:
    """A row a block, a column a step."""
    from matplotlib.figure import Figure

    rows, columns = len(study.components), len(study.shown)
    figure = Figure(figsize=(1.1 * columns + 0.8, 1.1 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, step in zip(axes[0], study.shown, strict=True):
        axis.set_title(f"step {step}", fontsize=9)
    for row, (name, pictures) in zip(axes, study.components.items(), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def _panels(count: int, size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure  # optional; without pyplot, which would look for a screen

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, count)


def _colour(study: Study, name: str) -> Any:
    """Darker from block to block."""
    from matplotlib import colormaps

    alike = [own for own in study.blocks if own[0] == name[0]]
    share = alike.index(name) / max(1, len(alike) - 1)
    return colormaps[_COLOURS[name[0]]](0.4 + 0.5 * share)
