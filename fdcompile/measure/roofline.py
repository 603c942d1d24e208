"""Roofline of the last run on a named card, by stage, compared with stock."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from fdcompile.graph.roofline import CARDS, Roofline, roofline
from fdcompile.report import Report
from fdcompile.runtime.compiled_runner import CompiledRunner

_COLUMNS = "calls", "kernels", "GFLOP", "GB", "ms"


@dataclass(frozen=True)
class RooflineReport:
    """Calculated lower bounds on work and time of a run in half precision; nothing was run on the card.

    Attributes:
        card: name of the card in `CARDS`.
        stages: number of calls and their total by stage; with CUDA graphs a call is one launch.
        stock: number of UNet calls that the stages replaced, and the total of the stock UNet for them.
    """

    card: str
    stages: dict[str, tuple[int, Roofline]]
    stock: tuple[int, Roofline]

    @property
    def total(self) -> Roofline:
        """The sum over all stages."""
        return sum((least for _, least in self.stages.values()), Roofline())

    def __str__(self) -> str:
        calls = sum(count for count, _ in self.stages.values())
        rows = [*self.stages.items(), ("optimized", (calls, self.total)), ("stock", self.stock)]
        lines = [f"{self.card}, half precision: at least", " " * 16 + "".join(map("{:>10}".format, _COLUMNS))]
        lines += [
            f"{name:<16}{count:>10}{least.operations:>10}{least.flops / 1e9:>10.1f}{least.bytes / 1e9:>10.2f}"
            f"{least.seconds * 1e3:>10.2f}"
            for name, (count, least) in rows
        ]
        stock = self.stock[1].seconds
        return "\n".join([*lines, f"{self.total.seconds / stock:.3f} of stock's least time"] if stock else lines)


def roofline_report(report: Report, card: str) -> RooflineReport:
    """Calculates the roofline of the run of `report`.

    Raises:
        ValueError: the card is unknown, or the stages are from a package, which has no graphs.
    """
    if card not in CARDS:
        raise ValueError(f"roofline={card!r}: expected one of {', '.join(CARDS)}")
    stages: dict[str, tuple[int, Roofline]] = defaultdict(lambda: (0, Roofline()))
    answered = 0
    stock = Roofline()
    for runner, call, count in report._calls:
        if not isinstance(runner, CompiledRunner):
            raise ValueError(f"roofline={card!r}: the stages are from a package, which has no graphs to count")
        graph_module, inputs, times = runner.runs(call)
        before, total = stages[call[0]]
        stages[call[0]] = before + count, total + roofline(graph_module, inputs, CARDS[card]).times(count * times)
    for runner, batch, count in report._answered:
        assert isinstance(runner, CompiledRunner)
        answered += count
        inputs = runner.program.input_shapes(batch)
        stock += roofline(runner.captured, inputs, CARDS[card]).times(count)
    return RooflineReport(card, dict(stages), (answered, stock))
