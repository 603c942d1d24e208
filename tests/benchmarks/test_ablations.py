"""The ablations: what their arms are, and that their verdicts can go either way."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import fdcompile
from benchmarks.ablations import (
    BOTH_ARM,
    DECODER_ARM,
    DROPPED,
    ENCODER_ARM,
    NOISE_ARM,
    STANDARD,
    Bench,
    Row,
    arms,
    orderings,
    spectrum,
)
from fdcompile import Config
from fdcompile.measure.quality import Quality, load_networks
from fdcompile.measure.variant import Variant
from fdcompile.miniature.scenes import evaluation_scenes

ARMS = {arm.variant.name: arm for arm in arms()}


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[Row, Any]]:
    """Of those that reuse predictions, and of the product's own output reuse, for two prompts."""
    networks = load_networks(None, None, None, torch.device("cpu"), reads=True)
    prompts = [scene.caption for scene in evaluation_scenes(2)]
    bench = Bench(fdcompile.load_miniature(), prompts, 3.0, networks, None)
    wanted = [ARMS[name] for name in (STANDARD, DECODER_ARM, BOTH_ARM, DROPPED)]
    wanted.append(replace(wanted[0], variant=Variant("output reuse", Config.paper(recompute=()))))
    return {arm.variant.name: bench.run(arm) for arm in wanted}


@pytest.mark.tables
def test_decoder_propagation_is_ddim_on_the_key_steps(results: dict[str, tuple[Row, Any]]) -> None:
    images = results["output reuse"][1]
    assert np.array_equal(results[DECODER_ARM][1], images)
    assert np.array_equal(results[BOTH_ARM][1], images)
    assert not np.array_equal(results[STANDARD][1], images)


@pytest.mark.tables
def test_flops_are_those_of_the_parts_that_run(results: dict[str, tuple[Row, Any]]) -> None:
    assert results[STANDARD][0].share == 1
    assert results[BOTH_ARM][0].share == pytest.approx(9 / 50)
    assert results["output reuse"][0].share == pytest.approx(results[BOTH_ARM][0].share, rel=1e-3)
    assert results[BOTH_ARM][0].share < results[DECODER_ARM][0].share < 0.5
    assert (results[STANDARD][0].fewer, results[BOTH_ARM][0].fewer_steps) == (None, 9)


@pytest.mark.tables
def test_dropping_does_not_denoise(results: dict[str, tuple[Row, Any]]) -> None:
    dropped, kept = results[DROPPED][0].quality, results[BOTH_ARM][0].quality
    assert dropped.psnr is not None
    assert kept.psnr is not None
    assert dropped.psnr < 15 < kept.psnr


def test_a_spectrum_has_its_peak_at_a_wave_s_frequency() -> None:
    wave = 100 + 50 * np.cos(2 * np.pi * 5 * np.arange(32) / 32)
    image = np.broadcast_to(wave[None, None, :, None], (2, 32, 32, 3)).round().astype(np.uint8)
    amplitudes = spectrum(image)
    assert len(amplitudes) == 16
    assert amplitudes.argmax() + 1 == 5


def made_up(arm: str, psnr: float | None, frechet: float | None, detail: float) -> Row:
    return Row(arm, 9, 0.5, Quality(psnr=psnr, frechet=frechet), None, None, (1.0, 1.0, detail, detail))


def test_a_verdict_can_go_either_way() -> None:
    rows = [
        made_up(STANDARD, None, 10.0, 1.0),
        made_up(ENCODER_ARM, 30.0, 9.0, 0.8),
        made_up(DECODER_ARM, 25.0, 12.0, 0.8),
        made_up(BOTH_ARM, 25.0, 12.0, 0.8),
        made_up(DROPPED, 5.0, 90.0, 3.0),
        made_up(NOISE_ARM, 31.0, 8.0, 0.9),
    ]
    sets = {"uniform-i": 12.0, "uniform-ii": 11.0, "uniform-iii": 13.0}
    sets |= {"non-uniform-i": 14.0, "non-uniform-ii": 40.0, "non-uniform-iii": 13.0}
    rows += [made_up(name, 20.0, distance, 0.8) for name, distance in sets.items()]
    assert all(claim.holds for claim in orderings(rows))
    turned = [
        replace(
            row,
            quality=Quality(
                psnr=None if row.quality.psnr is None else -row.quality.psnr - (row.arm == BOTH_ARM),
                frechet=-(row.quality.frechet or 0),
            ),
            amplitudes=tuple(1 / amplitude for amplitude in row.amplitudes)
            if row.arm == ENCODER_ARM
            else row.amplitudes,
        )
        for row in rows
    ]
    assert not any(claim.holds for claim in orderings(turned) if "fine detail" not in claim.says)
    without = [replace(row, quality=replace(row.quality, frechet=None)) for row in rows]
    assert len(orderings(without)) == 4
    assert not math.isnan(sum(row.share for row in without))
