"""The regression gate: figures and fidelity of a pipeline, compared with a baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdcompile.io import check_target
from fdcompile.measure.calls import seeded
from fdcompile.miniature import scenes_of
from fdcompile.pipeline.plans import as_config
from fdcompile.tools.gate.baseline import Baseline, Finding, compare, difference_table
from fdcompile.tools.gate.measure import measure
from fdcompile.version import versions

if TYPE_CHECKING:
    from fdcompile.config import Config
    from fdcompile.measure.timing import Pairs
    from fdcompile.planning.plan import Plan

_SLOWER = 1.0
"""Time as a share of stock above which there is a warning."""


@dataclass(frozen=True)
class GateResult:
    """Result of `gate`; ``print(result)`` writes Markdown.

    Attributes:
        measured: the new figures, as a baseline.
        findings: one for each figure; empty if a baseline was written.
        time: times of optimized calls of the pipeline, each after a stock one.
        versions: differences from the versions of the baseline, as text.
    """

    measured: Baseline
    findings: tuple[Finding, ...]
    time: Pairs
    versions: str = ""

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    def __str__(self) -> str:
        parts = [difference_table(self.findings) or f"All {len(self.findings)} figures are as in the baseline."]
        if not self.passed:
            parts.append("If this is meant, the same command with --update writes a new baseline.")
            if self.versions:
                parts.append(f"Made with other versions: {self.versions}.")
        line = f"Time of an optimized call: {self.time.ratio:.2f} of stock (median of {len(self.time.ratios)} pairs)."
        parts.append(line if (self.time.ratio or 0.0) <= _SLOWER else f"WARNING: slower than stock. {line}")
        return "\n\n".join(parts)


def gate(
    pipe: Any,
    prompts: Sequence[str],
    config: Config | Plan | None = None,
    *,
    baseline: str | Path,
    update: bool = False,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda what, done: None,
    **common: Any,
) -> GateResult:
    """Measures `config` on `pipe` and compares it with a file: exact figures must be equal, fidelity may fall a little.

    Args:
        pipe: a stock pipeline; it is not changed.
        prompts: prompts of one call; image ``i`` starts from noise of seed ``seed + i``.
        config: as in `fdcompile.optimize`.
        baseline: file with the baseline.
        update: whether to write the baseline instead of comparing.
        seed: seed of the first image.
        progress: callback with a description of the current work and the share of all work done.
        common: keyword arguments of the call, such as ``num_inference_steps=20, guidance_scale=5``.

    Raises:
        OSError: the baseline cannot be read or written.
        TypeError: `config` is not a configuration.
        ValueError: the file is not a baseline, or was made with other prompts, steps, guidance or seed. Raised before
            anything runs.
        CaptureError: the UNet cannot be exported.
    """
    config = as_config(config)
    path = Path(baseline)
    check_target(path)
    asked = {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "prompts": list(prompts),
        "steps": common.get("num_inference_steps"),
        "guidance": common.get("guidance_scale"),
        "seed": seed,
    } | {name: value for name, value in common.items() if name not in ("num_inference_steps", "guidance_scale")}
    known = None if update else Baseline.load(path)
    if known is not None:
        known.check_asked(asked)
    progress("making the images stock, optimized, and with every step a key step", 0.0)
    exact, fidelity, time = measure(pipe, config, seeded(prompts, seed, **common), scenes_of(pipe, prompts))
    now = Baseline(asked, exact, fidelity, versions())
    if known is None:
        now.save(path)
        return GateResult(now, (), time)
    return GateResult(now, tuple(compare(known, now)), time, known.version_differences())
