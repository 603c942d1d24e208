"""What an evaluation says first."""

from __future__ import annotations

from fdcompile.measure.cost import Cost
from fdcompile.measure.quality import Quality
from fdcompile.measure.timeline import Timeline
from fdcompile.tools.evaluate.table import Evaluation, Row


def row(name: str, share: float, psnr: float | None, steps: int = 8, optimized: bool = True) -> Row:
    timeline = Timeline(name, (), "", ()) if optimized else None
    cost = Cost(share, steps, 1.0, 1.0, None, None, timeline)
    reference = None if name == "stock" else "stock"
    return Row(name, reference, steps, 2, share, cost, Quality(psnr=psnr))


STOCK = row("stock", 1.0, None, optimized=False)
FEWER = row("stock, 7 steps", 0.875, 34.3, steps=7, optimized=False)


def test_a_variant_dearer_than_all_fewer_steps_is_compared_with_the_most_of_them() -> None:
    evaluation = Evaluation((STOCK, row("paper", 0.88, 44.0), row("caching", 0.8, 47.2), FEWER), "", ())
    assert [evaluation.baseline(variant) for variant in evaluation.rows[1:3]] == [FEWER, FEWER]
    assert evaluation.finding() == "Caching: 47.2 dB to stock at 0.80 of its FLOPs; stock with 7 steps: 34.3 dB."


def test_without_fewer_steps_the_finding_names_none() -> None:
    evaluation = Evaluation((STOCK, row("paper", 0.88, 44.0)), "", ())
    assert evaluation.baseline(evaluation.rows[1]) is None
    assert evaluation.finding() == "Paper: 44.0 dB to stock at 0.88 of its FLOPs."
