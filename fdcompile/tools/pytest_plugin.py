"""A pytest fixture for benchmarks with pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fdcompile.config import Config
    from fdcompile.report import Report

Benchmark = Callable[..., "Report"]


@pytest.fixture
def fdcompile_benchmark(request: pytest.FixtureRequest) -> Benchmark:
    """``fdcompile_benchmark(pipe, config, **call)`` times optimized calls ``pipe(**call)``, each after a stock call.

    `pipe` is a stock pipeline and is not changed. pytest-benchmark reports the time of the optimized calls; its
    ``extra_info`` has the ratios to the stock calls (``time_ratios`` and their median ``time_ratio``), the FLOPs of the
    UNet (``flops``, ``stock_flops``), ``encoder_runs`` and ``stage_calls``. Returns the `fdcompile.explain` report of
    the last call.
    """
    if not request.config.pluginmanager.hasplugin("benchmark"):
        pytest.skip("fdcompile_benchmark needs pytest-benchmark: pip install pytest-benchmark")
    return paired(request.getfixturevalue("benchmark"))


def paired(benchmark: Any) -> Benchmark:
    """See `fdcompile_benchmark`; `benchmark` is pytest-benchmark's fixture."""

    def run(pipe: Any, config: Config | None = None, **call: Any) -> Report:
        from fdcompile.api import explain, optimize
        from fdcompile.measure.calls import run_call
        from fdcompile.measure.timing import PAIRS, Pairs, device_timer, seconds
        from fdcompile.pipeline.clone import clone

        optimized = optimize(clone(pipe), config)
        run_call(optimized, call)  # captures and compiles
        stock: list[float] = []
        timer = device_timer(pipe.device)

        benchmark.pedantic(
            lambda: run_call(optimized, call),
            setup=lambda: stock.append(seconds(lambda: run_call(pipe, call), timer)),
            rounds=PAIRS,
        )
        report = explain(optimized)
        if benchmark.stats is not None:  # not with --benchmark-disable, nor under xdist
            pairs = Pairs(tuple(benchmark.stats.stats.data), tuple(stock))
            benchmark.extra_info.update(time_ratio=pairs.ratio, time_ratios=list(pairs.ratios))
        benchmark.extra_info.update(
            flops=report.flops,
            stock_flops=report.stock_flops,
            encoder_runs=report.encoder_runs,
            stage_calls=report.stage_calls,
        )
        return report

    return run
