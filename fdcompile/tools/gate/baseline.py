"""The gate's baseline file, and the comparison of new figures with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fdcompile.io import write_json
from fdcompile.measure.markdown import markdown_table
from fdcompile.tools.gate.measure import EXACTNESS, PSNR, READ, SSIM
from fdcompile.version import versions

SCHEMA = 1

TOLERANCES = {PSNR: 0.5, SSIM: 0.002, READ: 0.0, EXACTNESS: 6.0}
"""How far each figure may fall below the baseline, because rounding differs between machines and versions."""


@dataclass(frozen=True)
class Baseline:
    """Figures of one call of one model.

    Attributes:
        asked: pipeline, scheduler, prompts, steps, guidance and seed, which must be equal to be comparable.
        exact: counts by name, which depend only on the compiler, the model and the call.
        fidelity: medians over the images by name; 100 dB for equal ones.
        made_with: versions of fdcompile, torch and diffusers; empty in older files.
    """

    asked: dict[str, Any]
    exact: dict[str, int]
    fidelity: dict[str, float]
    made_with: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Baseline:
        """Reads a file written by `save`.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is not a baseline, or has another schema.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            schema, baseline = values.pop("schema"), cls(**values)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no baseline of fdcompile gate: write one with --update") from error
        if schema != SCHEMA:
            raise ValueError(f"{path} has schema {schema}, expected {SCHEMA}: write it anew with --update")
        return baseline

    def save(self, path: Path) -> None:
        """Writes JSON, atomically."""
        write_json(path, {"schema": SCHEMA} | asdict(self), sort_keys=True)

    def version_differences(self) -> str:
        """Describes versions that differ from the baseline's; empty if none differ or the baseline has no versions."""
        now = versions()
        return ", ".join(
            f"{name} {made} then, {now[name]} now" for name, made in self.made_with.items() if made != now.get(name)
        )

    def check_asked(self, asked: Mapping[str, Any]) -> None:
        """Checks that the baseline was made for the same pipeline and call.

        Raises:
            ValueError: it was not; the message names the first difference.
        """
        wanted = json.loads(json.dumps(dict(asked)))
        for name in sorted(self.asked.keys() | wanted.keys()):
            if self.asked.get(name) != wanted.get(name):
                raise ValueError(
                    f"the baseline is for {name} {self.asked.get(name)!r}, not {wanted.get(name)!r}: ask for the same, "
                    f"or write another with --update"
                )


@dataclass(frozen=True)
class Finding:
    """A figure compared with the baseline's.

    Attributes:
        figure: name of the figure.
        expected: value in the baseline; None if it has no such figure.
        measured: new value; None if there is no such figure.
        tolerance: how far the figure may fall; None if it must be equal.
    """

    figure: str
    expected: float | None
    measured: float | None
    tolerance: float | None = None

    @property
    def passed(self) -> bool:
        if self.expected is None or self.measured is None:
            return False
        if self.tolerance is None:
            return self.measured == self.expected
        return self.measured >= self.expected - self.tolerance


def compare_exact(expected: Mapping[str, int], measured: Mapping[str, int]) -> list[Finding]:
    """Compares exact figures, which must be equal."""
    return [Finding(name, expected.get(name), measured.get(name)) for name in sorted(expected.keys() | measured.keys())]


def compare(baseline: Baseline, measured: Baseline) -> list[Finding]:
    """Compares all figures: exact ones must be equal, fidelity may fall by its tolerance."""
    names = sorted(baseline.fidelity.keys() | measured.fidelity.keys())
    fidelity = [
        Finding(name, baseline.fidelity.get(name), measured.fidelity.get(name), TOLERANCES.get(name)) for name in names
    ]
    return compare_exact(baseline.exact, measured.exact) + fidelity


def difference_table(findings: Sequence[Finding]) -> str:
    """Formats the findings that have not passed as a Markdown table; empty if all have passed."""
    rows = [
        (finding.figure, _cell(finding.expected, finding.tolerance), _cell(finding.measured))
        for finding in findings
        if not finding.passed
    ]
    return markdown_table(("figure", "expected", "found"), *rows) if rows else ""


def _cell(value: float | None, tolerance: float | None = None) -> str:
    if value is None:
        return "none"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{text} (less {tolerance:g} at most)" if tolerance else text
