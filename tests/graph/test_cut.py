"""A cut computes something recomputed, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import TEXTS, sample, small_pipe
from torch import fx

import fdcompile
from fdcompile import DECODER, PARTIAL_ENCODER, Config, deep_feature_caching
from fdcompile.graph.cut import check_cut
from fdcompile.passes import run_passes


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (("up_blocks", "conv_out"), r"'up_blocks'.* for nothing: 'conv_norm_out' reads it at key steps only"),
        (("conv_in",), r"'conv_in'.* for nothing: 'down_blocks\.0\.resnets\.0.*' reads it at key steps only"),
        (("conv_in", "mid_block"), r"'conv_in'.* for nothing: 'down_blocks\.0\.resnets\.0"),
        (("up_blocks.0", "conv_norm_out", "conv_out"), r"'up_blocks\.0'.*: 'up_blocks\.1\.resnets\.0"),
        (("conv_in", "down_blocks.0"), r"'conv_in'.*: 'down_blocks\.1\.resnets\.0"),
        (("conv_out",), r"'conv_out' reads nothing that is computed at every step"),
        (("conv_norm_out", "conv_act", "conv_out"), r"'conv_norm_out' reads nothing that is computed at every step"),
    ],
)
def test_a_cut_with_a_hole_is_refused(captured: fx.GraphModule, cut: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=r"recompute=\[.*" + message):
        check_cut(run_passes(captured, cut), cut)


@pytest.mark.parametrize(
    "cut",
    [
        (),
        DECODER,
        ("up_blocks", "conv_norm_out", "conv_out"),  # conv_act has no weights: it follows what it reads
        PARTIAL_ENCODER,
        deep_feature_caching(3),
        ("mid_block", *DECODER),
        ("conv_in", "down_blocks", "mid_block", *DECODER),
        ("up_blocks.1", "up_blocks.2", "conv_norm_out", "conv_out"),
    ],
)
def test_a_cut_without_one_is_not(captured: fx.GraphModule, cut: tuple[str, ...]) -> None:
    check_cut(run_passes(captured, cut), cut)


def test_a_forecast_makes_no_difference(captured: fx.GraphModule) -> None:
    check_cut(run_passes(captured, DECODER, forecast=True), DECODER)
    hole = ("up_blocks", "conv_out")
    with pytest.raises(ValueError, match="'conv_norm_out' reads it at key steps only"):
        check_cut(run_passes(captured, hole, forecast=True), hole)


def test_it_is_refused_where_the_program_is_made(tmp_path: Path) -> None:
    pipe = fdcompile.optimize(small_pipe(), Config.paper(recompute=("up_blocks", "conv_out")))
    with pytest.raises(ValueError, match="'conv_norm_out' reads it at key steps only"):
        sample(pipe)
    with pytest.raises(ValueError, match="'conv_norm_out' reads it at key steps only"):
        fdcompile.export(pipe, tmp_path / "package", format="onnx", arguments=TEXTS)
    assert list(tmp_path.iterdir()) == []
    fdcompile.optimize(pipe)
    sample(pipe, steps=2)
