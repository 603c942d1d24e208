"""What `explain` says is what was counted."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from models import flat_pipe, sample
from torch import Tensor

import fdcompile
from fdcompile import Config
from fdcompile.backends.eager import EagerBackend
from fdcompile.capture.call import UNetCall
from fdcompile.capture.export import capture
from fdcompile.graph.flops import flop_counter
from fdcompile.graph.program import StagedProgram
from fdcompile.passes import OPTIONAL_PASSES, enabled_passes, run_passes


@pytest.mark.parametrize(
    "config", [Config.paper(), Config.paper(recompute=fdcompile.PARTIAL_ENCODER), Config.paper(max_parallel_steps=1)]
)
def test_flops_agree_with_a_counter_around_the_pipe(pipe: Any, stock: Any, config: Config) -> None:
    fdcompile.optimize(pipe, config)
    sample(pipe, steps=20)  # vmap is traced on the first run, and the counter would count the tracing
    with flop_counter() as counter:
        sample(pipe, steps=20)
    report = fdcompile.explain(pipe)
    assert report.flops == counter.get_total_flops()
    assert sum(report.stage_flops.values()) == report.flops
    with flop_counter() as stock_counter:
        sample(stock, steps=20)
    assert report.stock_flops == stock_counter.get_total_flops()
    assert report.flops < report.stock_flops


def test_attention_is_counted() -> None:
    with flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 2, 8, 16, 4).unbind())
    assert counter.get_total_flops() == 2 * (2 * 2 * 8 * 16 * 16 * 4)


def counts(pipe: Any) -> tuple[dict[str, int], int, dict[str, int]]:
    report = fdcompile.explain(pipe)
    return report.stage_flops, report.stock_flops, report.pass_flops


@pytest.mark.parametrize(
    "convert",
    [lambda pipe: pipe.to(torch.float16), lambda pipe: pipe.unet.conv_in.to(torch.float64)],
    ids=["pipe", "one module"],
)
def test_what_is_converted_after_the_run_changes_no_count(convert: Callable[[Any], object]) -> None:
    pipe, other = (fdcompile.optimize(flat_pipe(), Config.paper()) for _ in range(2))
    sample(pipe)
    sample(other)
    expected = counts(pipe)
    convert(other)
    assert counts(other) == expected


def test_a_run_under_autocast_is_counted_outside_of_it() -> None:
    pipe, other = (fdcompile.optimize(flat_pipe(), Config.paper()) for _ in range(2))
    sample(pipe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample(other)
    assert counts(other) == counts(pipe)
    assert "GFLOP per latent" in str(fdcompile.explain(other).programs[0])


def run_flops(program: StagedProgram, inputs: tuple[Tensor, ...], encoder_runs: int, steps: int) -> tuple[int, int]:
    """(FLOPs of a run, FLOPs of the stock UNet at as many steps), counted on the tensors' device."""
    known = dict(zip((value.name for value in program.inputs), inputs, strict=True))
    flops = {}
    for name, stage in program.stages.items():
        with flop_counter() as counter:
            outputs = stage.graph_module.forward(*(known[value.name] for value in stage.inputs))
        known |= zip((value.name for value in stage.outputs), outputs, strict=True)
        flops[name] = counter.get_total_flops()
    with flop_counter() as counter:
        program.graph_module.forward(*inputs)
    per_step = flops["decoder"] + flops["schedule"]
    return encoder_runs * flops["encoder"] + steps * per_step + flops["prompt"], steps * counter.get_total_flops()


@pytest.mark.tables  # `make bench-check` compares the exact figures
def test_sd15_shape_saves_what_the_paper_says_and_more() -> None:
    """SD 1.5's UNet at 64x64 latents, on the meta device: 9 key steps of 50 cost 0.73 of stock (paper: 0.738)."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()
        x, text = torch.randn(2, 4, 64, 64), torch.randn(2, 77, 768)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    arguments = {"encoder_hidden_states": text}
    call = UNetCall.parse(inspect.signature(unet.forward), (x, torch.tensor(1)), arguments)
    captured = capture(unet, call)
    ratio = {}
    for config in (Config.paper(), Config.paper(disabled_passes=OPTIONAL_PASSES)):
        flops, stock = run_flops(
            run_passes(captured, config.recompute, enabled_passes(config.disabled_passes)), call.tensors, 9, 50
        )
        ratio[config.disabled_passes] = flops / stock
    assert ratio[OPTIONAL_PASSES] == pytest.approx(0.73, abs=0.01)
    assert ratio[()] == pytest.approx(0.65, abs=0.01)


def test_what_a_backend_notes_is_said() -> None:
    class Noting(EagerBackend):
        def lower(self, graph_module: Any, name: str) -> Any:
            def run(*arguments: Any) -> Any:
                return graph_module(*arguments)

            run.notes = ("not replayed as CUDA graphs: the weights have moved",) if name == "encoder" else ()
            return run

    pipe = fdcompile.optimize(flat_pipe(), Config(key_steps=5, backend=Noting()))
    sample(pipe, steps=5)
    report = fdcompile.explain(pipe)
    assert report.backend_notes == {"encoder": ("not replayed as CUDA graphs: the weights have moved",)}
    assert "  encoder          not replayed as CUDA graphs: the weights have moved" in str(report)
