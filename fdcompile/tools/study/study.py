"""Runs a pipeline stock and measures how the features of its UNet change between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from fdcompile.io import write_json
from fdcompile.measure.calls import Call, in_batches, parse_calls, run_call
from fdcompile.measure.markdown import markdown_table
from fdcompile.measure.metrics import Images
from fdcompile.measure.plot import Plot
from fdcompile.pipeline.check import check_pipe
from fdcompile.pipeline.exchange import running_stock
from fdcompile.tools.study import draw
from fdcompile.tools.study.parts import PARTS, Block, Part, counting_flops, parameters_of
from fdcompile.tools.study.watch import Watch
from fdcompile.version import versions

SCHEMA = 1


@dataclass(frozen=True)
class Study:
    """Results of a study (Section 3.2 of the paper).

    Attributes:
        made_for: classes of the pipeline and of the scheduler.
        made_with: versions of fdcompile, torch and diffusers.
        timesteps: timesteps of the steps that were run.
        calls: number of calls of the pipeline.
        blocks: blocks by their names in Table 5, such as ``E_64``, in execution order.
        parts: encoder, bottleneck, decoder and embeddings (Table 8).
        shown: steps with principal components, as indices into the schedule.
        components: principal components of each block, shape ``[steps, height, width, 3]``; not written by `save`.
    """

    made_for: dict[str, str]
    made_with: dict[str, str]
    timesteps: tuple[float, ...]
    calls: int
    blocks: dict[str, Block]
    parts: dict[str, Part]
    shown: tuple[int, ...]
    components: dict[str, Images] = field(repr=False, compare=False)

    def save(self, path: str | Path) -> None:
        """Writes everything except the principal components as JSON, atomically."""
        values = {"schema": SCHEMA} | asdict(self)
        del values["components"]
        write_json(Path(path), values)

    def plots(self) -> dict[str, Plot]:
        """Plots Figures 2 and 3 of the paper for this model; returns them by file name.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return draw.plots(self.blocks, self.components, self.shown)

    def draw(self, folder: str | Path) -> list[Path]:
        """Writes `plots` into `folder`, which must exist, and returns the files.

        Raises:
            ImportError: matplotlib is not installed.
        """
        plots = {Path(folder) / name: plot for name, plot in self.plots().items()}
        for path, plot in plots.items():
            plot.save(path)
        return list(plots)

    def tables(self) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """Returns the tables of blocks (Eq. 2 of the paper) and parts: column names, then rows."""
        blocks: list[tuple[str, ...]] = [("block", "mean change", "largest", "mean relative", "largest relative")]
        for name, block in self.blocks.items():
            change, relative = block.changes[1:], block.relative[1:]
            figures = f"{fmean(change):.4f}", f"{max(change):.4f}", f"{fmean(relative):.2%}", f"{max(relative):.2%}"
            blocks.append((name, *figures))
        parts = [(name, f"{part.parameters / 1e6:.4g}", f"{part.flops / 1e9:.4g}") for name, part in self.parts.items()]
        return blocks, [("part", "parameters, millions", "GFLOP of a call, per latent"), *parts]

    def finding(self) -> str:
        """Describes the mean change of encoder and decoder between steps, in one sentence."""
        means = {
            letter: fmean(fmean(block.relative[1:]) for name, block in self.blocks.items() if name.startswith(letter))
            for letter in ("E", "D")
        }
        return (
            f"From step to step the encoder's features change by {means['E']:.2%} of their mean square, "
            f"the decoder's by {means['D']:.2%}."
        )

    def __str__(self) -> str:
        """Both tables in Markdown."""
        return "\n\n".join(markdown_table(*rows) for rows in self.tables())


def study(
    pipe: Any,
    calls: Sequence[str | Call],
    *,
    progress: Callable[[str, float], None] = lambda what, done: None,
    **common: Any,
) -> Study:
    """Measures how the features of `pipe`'s UNet change from step to step (Section 3.2 of the paper).

    Features are reduced during the runs: memory holds those of the last step of each block, and in the first call those
    of a few steps for their principal components.

    Args:
        pipe: a diffusers pipeline, stock or optimized; it is left unchanged.
        calls: prompts, or keyword arguments of the pipeline for each call, all with the same schedule. A call without
            ``generator`` gets its own seed.
        progress: callback with a description of the current work and the share of all work done.
        common: keyword arguments of every call, such as ``num_inference_steps=20, guidance_scale=5``.

    Raises:
        TypeError, ValueError: `optimize` does not accept `pipe`, or `calls` are invalid. A call with another schedule
            is detected when it runs.
    """
    check_pipe(pipe)
    batches = in_batches(calls, parse_calls(pipe, calls, common), common)
    watch, timesteps = Watch(pipe.unet, lambda: len(pipe.scheduler.timesteps)), None
    with running_stock(pipe), counting_flops(pipe.unet) as flops:
        for number, call in enumerate(batches):
            progress("watching stock runs", number / len(batches))
            with watch.watching():
                run_call(pipe, call, watch.output_hook)
            schedule = tuple(map(float, pipe.scheduler.timesteps.tolist()))
            if timesteps not in (None, schedule):
                raise ValueError("the calls have different schedules: study each by itself")
            timesteps = schedule
    assert timesteps is not None
    steps = sorted(next(iter(watch.blocks.values())).norms)
    if len(steps) < 2:
        raise ValueError(f"the calls run {len(steps)} steps: expected at least 2, between which features change")
    parameters = parameters_of(pipe.unet)
    return Study(
        made_for={"pipeline": type(pipe).__name__, "scheduler": type(pipe.scheduler).__name__},
        made_with=versions(),
        timesteps=tuple(timesteps[step] for step in steps),
        calls=len(batches),
        blocks={
            name: Block(*(tuple(sums[step] / watch.calls for step in steps) for sums in block.sums))
            for name, block in watch.blocks.items()
        },
        parts={part: Part(parameters[part], flops[part] // watch.first_batch) for part in PARTS},
        shown=tuple(step for step in watch.shown if step in steps),  # some pipelines stop before the last one
        components=watch.components(),
    )
