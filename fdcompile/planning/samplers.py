"""Compares samplers at the same work, stock and with the default configuration, by PSNR to converged images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fdcompile.config import Config
from fdcompile.forecasting.noise_levels import fresh_noise
from fdcompile.measure.fidelity import Fidelity
from fdcompile.measure.variant import scheduler_of
from fdcompile.planning.plan import SamplerRow
from fdcompile.planning.trials import Trials

SHARES = (0.4, 0.5, 0.6)
"""Work of a row, as a share of the sampler's steps."""


def schedulers_of(pipe: Any, samplers: Sequence[str]) -> list[Any]:
    """Returns the schedulers of the given names for `pipe`, without its own.

    Raises:
        TypeError: `samplers` is not a list of names.
        ValueError: a name is unknown, or a scheduler adds fresh noise at each step and so does not converge.
    """
    if not isinstance(samplers, list | tuple) or not all(isinstance(sampler, str) for sampler in samplers):
        raise TypeError(f"samplers={samplers!r}: expected a list of names, such as ['DDIM', 'Euler']")
    schedulers = [scheduler_of(pipe, sampler) for sampler in samplers]
    for scheduler in (pipe.scheduler, *schedulers) if schedulers else ():
        if fresh_noise(scheduler):
            raise ValueError(
                f"{type(scheduler).__name__} adds fresh noise at each step: its images do not converge to those of "
                f"other samplers, so it cannot be compared with them"
            )
    return [scheduler for scheduler in schedulers if type(scheduler) is not type(pipe.scheduler)]


def compare_sampler(trials: Trials) -> Iterator[SamplerRow]:
    """Runs the calls of `trials` stock with all steps, and at each of `SHARES` stock and with the default."""
    steps = trials.stock[0].steps

    def row(method: str, steps_taken: int, work: float, fidelity: Fidelity) -> SamplerRow:
        assert fidelity.converged is not None
        return SamplerRow(trials.sampler, method, steps_taken, steps * work, fidelity.converged)

    yield row("stock", steps, 1.0, trials.fidelity(trials.stock))
    for share in SHARES:
        if (baseline := trials.baseline(share)) is not None:
            yield row("stock", baseline.steps, baseline.work, baseline.fidelity)
        report, fidelity = trials.run(Config(work=share, max_parallel_steps=1, backend="eager"))
        if report.flops < report.stock_flops:
            yield row("default", steps, report.flops / report.stock_flops, fidelity)
