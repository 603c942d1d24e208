"""Runs the tests that need a GPU, then measures speed and memory of SD 1.5's architecture with random weights.

Writes ``benchmarks/results/gpu.md``, to be committed. Takes under ten minutes. Has not been run on a GPU yet.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fdcompile
from benchmarks.models import SD15, random_pipe, random_prompts, random_unet
from fdcompile import Config
from fdcompile.measure.timing import seconds

RESULTS = Path(__file__).parent / "results" / "gpu.md"
STEPS = 50
TESTS = ("tests/test_cuda.py", "tests/backends/test_cuda_graphs.py", "tests/backends/test_inductor.py")


class Outcomes:
    """Pytest plugin that records the outcome of each test."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            reason = report.longreprtext.strip().splitlines()[-1] if report.failed else ""
            if report.skipped and isinstance(report.longrepr, tuple):
                reason = report.longrepr[2]
            self.rows.append((report.nodeid, report.outcome, reason))


def main() -> int:
    """Runs tests and measurements. Returns the exit status of the tests."""
    if not torch.cuda.is_available():
        print("no CUDA device: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    outcomes = Outcomes()
    status = int(pytest.main(["-m", "gpu", "-q", *TESTS], plugins=[outcomes]))
    lines = [*_head(outcomes), ""]
    try:
        lines += _table(_speed())  # keeps the rows before a failure
    except Exception as error:
        lines.append(f"The speed could not be measured: {type(error).__name__}: {error}")
        status = status or 1
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), f"\nwritten to {RESULTS}")
    return status


def _head(outcomes: Outcomes) -> Iterator[str]:
    yield "# On a GPU\n\nWritten by `make gpu`.\n"
    yield f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
    yield f"fdcompile {fdcompile.__version__}\n"
    counts = Counter(outcome for _, outcome, _ in outcomes.rows)
    yield "Tests: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + "\n"
    for name, outcome, reason in outcomes.rows:
        if outcome != "passed":
            yield f"- {outcome}: `{name}` {reason}"


def _speed() -> Iterator[tuple[str, float, float, float]]:
    """Yields name, median seconds per image, peak GiB, and seconds of the first image."""
    with torch.device("cuda"):
        unet = random_unet(SD15).requires_grad_(False)
    pipe = random_pipe(unet.to(torch.float16))
    pipe.set_progress_bar_config(disable=True)
    prompts = random_prompts(unet, 1)

    def draw() -> None:
        pipe(**prompts, num_inference_steps=STEPS, guidance_scale=7.5, output_type="latent", height=512, width=512)
        torch.cuda.synchronize()

    configs: dict[str, Config | None] = {
        "stock": None,
        "fdcompile, eager": Config.paper(backend="eager"),
        "fdcompile, inductor": Config.paper(backend="inductor"),
        "fdcompile, inductor, step by step": Config.paper(backend="inductor", max_parallel_steps=1),
    }
    for name, config in configs.items():
        fdcompile.restore(pipe)
        if config is not None:
            fdcompile.optimize(pipe, config)
        yield name, *_measure(draw)
    fdcompile.restore(pipe)


def _measure(draw: Callable[[], None]) -> tuple[float, float, float]:
    first = seconds(draw)
    torch.cuda.reset_peak_memory_stats()
    median = statistics.median(seconds(draw) for _ in range(5))
    return median, torch.cuda.max_memory_allocated() / 2**30, first


def _table(rows: Iterator[tuple[str, float, float, float]]) -> Iterator[str]:
    yield f"SD 1.5's shape, float16, 512x512, {STEPS} steps, one image with guidance:\n"
    yield "| | seconds an image | of stock | peak GiB | first image, seconds |\n|---|---|---|---|---|"
    stock: float | None = None
    for name, spent, peak, first in rows:
        stock = spent if stock is None else stock
        yield f"| {name} | {spent:.3f} | {spent / stock:.3f} | {peak:.2f} | {first:.1f} |"


if __name__ == "__main__":
    sys.exit(main())
