"""The gate in Python: what it measures of a plan."""

from __future__ import annotations

import pytest
from models import TEXTS, flat_pipe

import fdcompile
from fdcompile import Config, Planned
from fdcompile.tools.gate import measure
from fdcompile.tools.gate.measure import EXACTNESS


def test_every_step_is_a_key_step_for_exactness_whatever_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = flat_pipe()
    pipe.scheduler.set_timesteps(4)
    plan = Planned(tuple(pipe.scheduler.timesteps.tolist()), (0, 3), None, None)
    monkeypatch.setattr(measure, "time_pairs", lambda *_: None)
    call = TEXTS | {"num_inference_steps": 4, "output_type": "latent"}
    exact, fidelity, _ = measure.measure(pipe, Config("auto", (), plan=plan), call)
    assert fidelity[EXACTNESS] > 90, "dB"
    assert exact["encoder runs"] == 2


def test_what_is_no_configuration_is_refused_before_anything_runs() -> None:
    with pytest.raises(TypeError, match=r"config='plan.json': expected a fdcompile.Config, or a plan, from a file by"):
        fdcompile.gate(None, ["a sun"], "plan.json", baseline="gate.json")
