"""Speed compared with the stock pipeline in one process: `make bench`, or `make bench-dry` for a dry run."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch.utils.benchmark.utils.timer import timer  # waits for the device

import fdcompile
from benchmarks.bench import Bench
from benchmarks.candidates import COUNTED_AS
from benchmarks.models import SD15, narrow, random_pipe, random_prompts, random_unet
from benchmarks.settings import Setting
from benchmarks.speed_report import CompileTime, Results, Row
from fdcompile import Config
from fdcompile.graph.flops import flop_counter
from fdcompile.measure.metrics import psnr, ssim
from fdcompile.measure.timing import PAIRS, Pairs, seconds
from fdcompile.measure.variant import Variant

ROOT = Path(__file__).parents[1]
OVERHEAD_STEPS = 50
OVERHEAD_RUNS = 20


@functools.lru_cache(maxsize=1)  # candidates of a setting run one after the other
def bench_of(setting: Setting) -> Bench:
    return Bench(setting)


@pytest.mark.benchmark(timer=timer)
def test_speed(setting: Setting, candidate: Variant, results: Results, benchmark: Any, dry: bool) -> None:
    """Alternates stock and candidate, so that each ratio is of two consecutive runs."""
    package = candidate.patch and candidate.patch.package
    if package and importlib.util.find_spec(package) is None:
        reason = f"{package} is not installed"
        results.rows.append(Row(str(setting), candidate.name, skipped=reason))
        pytest.skip(reason)
    bench = bench_of(setting)
    pipe, steps = bench.pipe(candidate), candidate.steps or setting.steps
    bench.sample(pipe, steps)  # captures, compiles, warms up
    counted_as = COUNTED_AS.get(candidate.name)
    latents, gflop, peak_mib = _measure_once(bench, pipe, steps, counted=counted_as is None)
    stock_seconds: list[float] = []

    def run_stock() -> None:
        stock_seconds.append(seconds(lambda: bench.sample(bench.stock, setting.steps), timer))

    benchmark.pedantic(bench.sample, (pipe, steps), setup=run_stock, rounds=1 if dry else PAIRS)
    pairs = Pairs(tuple(benchmark.stats.stats.data), tuple(stock_seconds))
    row = Row(
        setting=str(setting),
        candidate=candidate.name,
        ratios=pairs.ratios,
        gflop=gflop if counted_as is None else results.gflop(str(setting), counted_as),
        peak_mib=peak_mib,
        latent_error=((latents - bench.reference).norm() / bench.reference.norm()).item(),
        **_fidelity(bench, latents),
    )
    results.rows.append(row)
    benchmark.extra_info.update(asdict(row))


def _measure_once(bench: Bench, pipe: Any, steps: int, counted: bool) -> tuple[Tensor, float | None, float | None]:
    """Returns latents, GFLOP per image (None unless `counted`: compiled code cannot be), peak MiB (None on a CPU)."""
    on_cuda = bench.setting.device == "cuda"
    if on_cuda:
        gc.collect()  # memory of earlier candidates
        torch.cuda.reset_peak_memory_stats()
    counter = flop_counter() if counted else None
    with counter or contextlib.nullcontext():
        latents = bench.sample(pipe, steps)
    gflop = counter.get_total_flops() / bench.setting.batch / 1e9 if counter is not None else None
    peak_mib = torch.cuda.max_memory_allocated() / 2**20 if on_cuda else None
    return latents, gflop, peak_mib


def _fidelity(bench: Bench, latents: Tensor) -> dict[str, float]:
    """Returns median PSNR and SSIM to the stock images; empty for models with random weights."""
    images, references = bench.images(latents), bench.images(bench.reference)
    if images is None or references is None:
        return {}
    return {"psnr": float(np.median(psnr(images, references))), "ssim": float(np.median(ssim(images, references)))}


def test_compile_time(results: Results, tmp_path: Path, dry: bool) -> None:
    """Times the first image with empty on-disk caches, then in a new process with the caches filled."""
    if dry:
        pytest.skip("a dry run compiles nothing")
    command = [sys.executable, "-m", "benchmarks.compile_time", str(tmp_path)]
    subprocess.run([*command, "--export"], cwd=ROOT, check=True)
    cold, warm = (
        json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout) for _ in range(2)
    )
    results.compile_time = CompileTime(cold["model"], cold["seconds"], warm["seconds"])


class Replay:
    """Backend whose stages compute once for each number of steps and return the same tensors from then on."""

    name = "replay"

    def lower(self, graph_module: fx.GraphModule, name: str) -> Any:
        kept: dict[int, tuple[Tensor, ...]] = {}
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        stepwise = [index for index, node in enumerate(placeholders) if node.meta.get("stepwise")]

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            steps = len(inputs[stepwise[0]]) if stepwise else 0
            if steps not in kept:
                kept[steps] = graph_module(*inputs)
            return kept[steps]

        return run


@pytest.mark.benchmark(timer=timer)
def test_executor_overhead(results: Results, benchmark: Any) -> None:
    """Times UNet calls with free stages and as many modules, stages and features as Stable Diffusion 1.5."""
    unet = random_unet(narrow(SD15))
    pipe = fdcompile.optimize(random_pipe(unet), Config.paper(backend=Replay()))
    pipe.scheduler.set_timesteps(OVERHEAD_STEPS)
    text = random_prompts(unet, batch=2)["prompt_embeds"]
    latents = torch.zeros(len(text), unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)

    def run() -> None:
        for timestep in pipe.scheduler.timesteps:
            pipe.unet(latents, timestep, encoder_hidden_states=text, return_dict=False)

    with torch.no_grad():
        benchmark.pedantic(run, rounds=OVERHEAD_RUNS, warmup_rounds=2)
    results.overhead_us = benchmark.stats.stats.median / OVERHEAD_STEPS * 1e6
