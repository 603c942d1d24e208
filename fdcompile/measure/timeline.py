"""The steps of a run, for reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdcompile.report import Report

KEY, FORCED, REUSED, STOCK = "key", "forced", "reused", "stock"

_SAYS = {
    KEY: "key step: computed from the current latents",
    FORCED: "unplanned key step: computed from the current latents",
    REUSED: "computed from the features of key steps",
}


@dataclass(frozen=True)
class Step:
    """A step of a run.

    Attributes:
        kind: class in the style sheet.
        says: description.
    """

    kind: str
    says: str


@dataclass(frozen=True)
class Timeline:
    """The steps of a run.

    Attributes:
        name: name of the run.
        steps: the steps in order.
        says: description of the whole run.
        reasons: differences from the pipeline of the plan, and reasons why steps ran stock or features were held.
    """

    name: str
    steps: tuple[Step, ...]
    says: str
    reasons: tuple[str, ...]

    @classmethod
    def of(cls, name: str, report: Report) -> Timeline:
        stock = {step: reason for reason, steps in report.stock_reasons.items() for step in steps}
        steps = []
        for step in range(report.num_steps):
            forced, key = step in report.forced_key_steps, step in report.key_steps
            kind = STOCK if step in stock else FORCED if forced else KEY if key else REUSED
            what = f"the stock UNet, {stock[step]}" if kind == STOCK else _SAYS[kind]
            steps.append(Step(kind, f"step {step}: {what}"))
        groups = ", ".join(
            f"{first}" if stop == first + 1 else f"{first} to {stop - 1}" for first, stop in report.groups
        )
        says = (
            f"{report.num_steps} steps, {report.encoder_runs} encoder runs; steps decoded from one key step: {groups}; "
            f"{report.decoder_evaluations} decoder evaluations in {report.decoder_calls} calls; "
            f"{report.stock_calls} stock UNet calls"
        )
        reasons = [*report.plan_notes, *(f"stock: {reason}" for reason in report.stock_reasons)]
        reasons += [f"held, not forecast: {reason}" for reason in report.held]
        return cls(name, tuple(steps), says, tuple(reasons))
