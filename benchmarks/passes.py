"""FLOPs and time of a run with each optional pass, relative to the same run without it.

    python -m benchmarks.passes [--latents SIZE ...] [--pairs N] [--output FOLDER]

Writes `passes.md`. Both pipelines share one process and one set of weights, and run alternately. On a CPU the process
time is measured, so that other processes on the machine do not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.benchmark.utils.timer import timer as device_timer  # waits for the device

import fdcompile
from benchmarks.bench import Bench
from benchmarks.report import about
from benchmarks.settings import Setting
from fdcompile import Config
from fdcompile.measure.markdown import markdown_table
from fdcompile.measure.timing import time_pairs
from fdcompile.passes import OPTIONAL_PASSES
from fdcompile.pipeline.clone import clone


@dataclass(frozen=True)
class Worth:
    """A run with a pass compared with the same run without it.

    Attributes:
        setting: description of the setting.
        name: name of the pass.
        times: time with the pass over time without it, for each pair of consecutive runs.
        flops: FLOPs with the pass over FLOPs without it.
        decoder_calls: decoder calls with and without the pass; they depend on the memory that is available.
    """

    setting: str
    name: str
    times: tuple[float, ...]
    flops: float
    decoder_calls: tuple[int, int]

    @property
    def cells(self) -> tuple[str, ...]:
        spread = f"{min(self.times):.3f} to {max(self.times):.3f}"
        calls = "{} and {}".format(*self.decoder_calls)
        return self.setting, self.name, f"{statistics.median(self.times):.3f} ({spread})", f"{self.flops:.3f}", calls


def measure(setting: Setting, pairs: int) -> Iterator[Worth]:
    """Measures every optional pass in eager mode, with all other passes enabled."""
    bench = Bench(setting)
    timer = time.process_time if setting.device == "cpu" else device_timer

    def optimized(*disabled: str) -> Any:
        config = Config(key_steps=setting.key_steps, backend="eager", disabled_passes=disabled)
        return fdcompile.optimize(clone(bench.stock), config)

    whole = optimized()
    bench.sample(whole, setting.steps)  # captures and warms up
    for name in OPTIONAL_PASSES:
        without = optimized(name)
        bench.sample(without, setting.steps)
        times = time_pairs(
            lambda: bench.sample(whole, setting.steps),
            lambda without=without: bench.sample(without, setting.steps),
            timer,
            pairs,
        ).ratios
        reports = [fdcompile.explain(pipe) for pipe in (whole, without)]
        flops = reports[0].flops / reports[1].flops
        yield Worth(str(setting), name, times, flops, (reports[0].decoder_calls, reports[1].decoder_calls))


def markdown(rows: list[Worth], pairs: int) -> str:
    table = markdown_table(("setting", "pass", "time", "FLOPs", "decoder calls"), *(row.cells for row in rows))
    machine = ", ".join(f"{name} {value}" for name, value in about().items())
    return f"""\
{table}

Eager, one step of the run a key step, everything else as by default. *Time* and *FLOPs*: of a run with the pass over
those of the same run without it, the other passes on; of the time (of the process, on a CPU) the median of {pairs}
pairs of neighboring runs, the smallest and the largest in brackets. *Decoder calls*: with and without it.

{machine}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, nargs="+", default=[16, 32], help="sizes of latents (default: 16 32)")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of consecutive runs (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of passes.md")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for latents in arguments.latents:
        for row in measure(Setting("SD 1.5", latents, batch=1, steps=6, key_steps=6), arguments.pairs):
            print(*row.cells, sep="  ", flush=True)
            rows.append(row)
    (arguments.output / "passes.md").write_text(markdown(rows, arguments.pairs), encoding="utf-8")


if __name__ == "__main__":
    main()
