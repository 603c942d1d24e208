"""Every pipeline compared with its stock run; the results are the table in docs/pipelines.md."""

from __future__ import annotations

from typing import Any

import control
import others
import pytest
import stable_diffusion
import torch
from case import Case
from tables import Table

import fdcompile
from fdcompile import Config
from fdcompile.pipeline.session import find_session

pytestmark = [
    pytest.mark.usefixtures("few_key_steps_suffice"),
    pytest.mark.filterwarnings("ignore:key_steps='auto'. .* adds fresh noise"),
]

CASES: dict[str, Case] = stable_diffusion.CASES | control.CASES | others.CASES

DAILY = {
    "Stable Diffusion, inpaint, 9 channels": "channels beside the latent",
    "Stable Diffusion, perturbed-attention guidance": "a batch in three parts, which cannot be symbolic",
    "ControlNet, two nets, each at some steps": "residuals that come and go",
    "DeepFloyd IF, stage 2": "pixels, a predicted variance, text and image in one attention",
    "AnimateDiff": "motion between flat layers",
    "Latent diffusion, super-resolution": "no text at all",
}
"""Cases that `make test` runs, one for each kind of UNet and of call, and what each covers."""


@pytest.mark.parametrize(
    "name", [pytest.param(case, marks=() if case in DAILY else pytest.mark.tables) for case in CASES]
)
def test_pipeline(name: str, pipelines_table: Table) -> None:
    case = CASES[name]
    pipe = case.build()
    expected = case.run(pipe)
    tolerance = {"rtol": 0, "atol": 1e-4 * expected.abs().max().item()}
    assert (expected - run_with_another_unet(case, pipe)).abs().max() > tolerance["atol"], "the UNet has no effect"

    fdcompile.optimize(pipe, Config(key_steps="all"))
    torch.testing.assert_close(case.run(pipe), expected, **tolerance)
    check_reasons(case, pipe)
    captured = captures(pipe)

    fdcompile.optimize(pipe, Config.paper(max_parallel_steps=1))
    sequential = case.run(pipe)
    fdcompile.optimize(pipe, Config.paper(max_parallel_steps=16))
    torch.testing.assert_close(case.run(pipe), sequential, **tolerance)
    check_reasons(case, pipe)
    assert captures(pipe) == captured, "the UNet is captured anew for each call of the pipeline"
    report = fdcompile.explain(pipe)
    ratio = "1" if report.stock_flops == 0 else f"{report.flops / report.stock_flops:.3f}"
    if case.stock is None:
        assert report.encoder_runs < report.decoder_evaluations
        assert report.flops < report.stock_flops
    if name in control.CONTROLLED:
        assert report.controlnet_runs == report.encoder_runs

    forecast = check_linear_forecast(case, pipe, expected, sequential)
    default = check_default(case, pipe)
    assert captures(pipe) == captured

    fdcompile.restore(pipe)
    assert torch.equal(case.run(pipe), expected)
    pipelines_table.check(
        name,
        type(pipe).__name__,
        type(pipe.unet).__name__,
        f"{report.num_steps}",
        f"{report.encoder_runs}",
        ratio,
        forecast,
        default,
        f"{report.controlnet_runs}" if name in control.CONTROLLED else "",
        f"{report.stock_calls}, because {case.stock}" if case.stock else "none",
    )


def check_linear_forecast(case: Case, pipe: Any, expected: torch.Tensor, held: torch.Tensor) -> str:
    """Checks that a linear forecast differs from held features, and returns how many groups were held anyway."""
    fdcompile.optimize(pipe, Config(key_steps="all", forecast="linear"))
    torch.testing.assert_close(case.run(pipe), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    fdcompile.optimize(pipe, Config.paper(forecast="linear", max_parallel_steps=1))
    sequential = case.run(pipe)
    fdcompile.optimize(pipe, Config.paper(forecast="linear", max_parallel_steps=16))
    torch.testing.assert_close(case.run(pipe), sequential, rtol=0, atol=1e-4 * sequential.abs().max().item())
    check_reasons(case, pipe)
    report = fdcompile.explain(pipe)
    lost = sum(map(len, report.held.values()))
    assert lost < len(report.groups) or case.stock is not None
    assert not torch.equal(sequential, held) or case.stock is not None
    return f"{lost}"


def check_default(case: Case, pipe: Any) -> str:
    """Returns the encoder runs of the default configuration, or the reason why the encoder runs at every step."""
    fdcompile.optimize(pipe)
    assert case.run(pipe).isfinite().all()
    check_reasons(case, pipe)
    report = fdcompile.explain(pipe)
    if report.encoder_runs < report.num_steps or case.stock is not None:
        return f"{report.encoder_runs}"
    return f"all: {', '.join(report.held)}"


def captures(pipe: Any) -> list[int]:
    return [id(graph) for graph in find_session(pipe).executor.runner_cache.graph_cache.graphs.values()]


def run_with_another_unet(case: Case, pipe: Any) -> torch.Tensor:
    weights = pipe.unet.conv_out.weight
    before = weights.detach().clone()
    weights.data.mul_(2)
    try:
        return case.run(pipe)
    finally:
        weights.data.copy_(before)


def check_reasons(case: Case, pipe: Any) -> None:
    reasons = fdcompile.explain(pipe).stock_reasons
    assert bool(reasons) == (case.stock is not None)
    assert case.stock is None or any(case.stock in reason for reason in reasons)


def test_the_table_lists_nothing_else(pipelines_table: Table) -> None:
    pipelines_table.keep(list(CASES))


@pytest.mark.parametrize("name", control.REFUSED)
def test_refused(name: str) -> None:
    pipe = control.REFUSED[name].build()
    expected = control.REFUSED[name].run(pipe)
    with pytest.raises(TypeError, match=r"UNetControlNetXSModel has no .*: expected a diffusers UNet"):
        fdcompile.optimize(pipe)
    assert torch.equal(control.REFUSED[name].run(pipe), expected)
