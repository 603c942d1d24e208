"""Exact figures of a small model on the stand-in for CUDA, compared with those in ``baseline.json``.

``run.sh`` builds the stand-in and runs this; ``run.sh --update`` writes the baseline. A figure that differs is an
error: captures, launches, waits and layouts do not depend on the machine. With ``--full``, Stable Diffusion 1.5 and
SDXL are compiled in full size instead, which takes long and 16 GB of memory.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline
from torch import Tensor

import fdcompile
from benchmarks.cuda_standin import device
from benchmarks.models import SD15, SDXL, SMALL, random_pipe, random_prompts, random_unet
from fdcompile import Config
from fdcompile.backends.cuda_graphs import CudaGraphs, cuda_device

BASELINE = Path(__file__).parent / "baseline.json"
STEPS = 50


def main(update: bool, full: bool) -> int:
    """Measures, and compares or writes. The exit status."""
    warnings.simplefilter("ignore")
    differing = 0
    for part, make in (FULL if full else SMALL_MODELS).items():
        figures = make()
        expected = json.loads(BASELINE.read_text(encoding="utf-8"))
        if update:
            expected[part] = figures
            BASELINE.write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
        for name, value in figures.items():
            known = expected.get(part, {}).get(name)
            differing += known != value
            print(f"{part:<9} {name:<40} {value}" + ("" if known == value else f"   EXPECTED {known}"), flush=True)
    return int(differing > 0)


def measure(backend: str, config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What a warm-up and the second image after it do, in bfloat16, up to 16 steps decoded at once."""
    with torch.device("cuda"):
        unet = random_unet(config).requires_grad_(False)
    pipe, prompts = still(random_pipe(unet.to(torch.bfloat16))), random_prompts(unet, 1)
    side = 8 * pipe.unet.config.sample_size
    arguments = {**prompts, "num_inference_steps": steps, "guidance_scale": 7.5, "output_type": "latent"}
    fdcompile.optimize(pipe, Config.paper(max_parallel_steps=16, backend=backend))
    device.reset()
    fdcompile.warmup(pipe, [(side, side)], **arguments)
    warm, first = device.counters(), device.kernels()
    with torch.inference_mode():
        pipe(**arguments, height=side, width=side)
    assert not fdcompile.explain(pipe).compile_seconds, "captured or compiled again after the warm-up"
    gc.collect()  # what the compiler leaves holds memory, and parts of weights that are copied at each run
    torch.cuda.reset_peak_memory_stats()
    device.reset()
    pipe(**arguments, height=side, width=side)
    counters = device.counters()
    return {
        "captures in warm-up": warm.get("captures begun", 0),
        "captures after it": counters.get("captures begun", 0),
        "illegal calls": sum(count for name, count in [*warm.items(), *counters.items()] if "ILLEGAL" in name),
        "graph launches": counters.get("graph launches", 0),
        "kernels in graphs": counters.get("kernels inside replayed graphs", 0),
        "kernels launched": counters.get("kernels", 0),
        "copies": counters.get("copies", 0),
        "waits": counters.get("syncs", 0),
        "peak MiB of torch's allocator": torch.cuda.max_memory_allocated() >> 20,
        **{name: count for name, count in sorted(first.items()) if name.startswith("convolution")},
    }


def still(pipe: Any) -> Any:
    """`pipe` with a scheduler that does not step: DDIM's own step indexes by values that it reads back."""
    pipe.set_progress_bar_config(disable=True)
    kind = type("Still", (type(pipe.scheduler),), {"step": lambda self, output, step, sample, **options: (sample,)})
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe


def waits() -> dict[str, int]:
    """Times that the CPU waits for the device in the second image, run eagerly, and those after its first step."""
    figures = {}
    for name, channels in (("text to image", 4), ("inpainting", 9)):
        pipe, arguments = tiny_pipe(channels)
        for method in ("stock", "default"):
            if method == "default":
                fdcompile.optimize(pipe, Config(backend="eager"))
            pipe(**arguments)
            device.reset()
            after: list[int] = []

            def note(pipe: Any, step: int, timestep: Tensor, tensors: Any, after: list[int] = after) -> Any:
                after.append(device.counters().get("syncs", 0))
                return tensors

            pipe(**arguments, callback_on_step_end=note)
            figures[f"{name}, {method}"] = device.counters().get("syncs", 0)
            figures[f"{name}, {method}, after the first step"] = after[-1] - after[0]
    return figures


def tiny_pipe(channels: int) -> tuple[Any, dict[str, Any]]:
    """One that draws text, or repaints an image where the UNet takes a mask and an image next to the latents."""
    with torch.device("cuda"):
        unet = random_unet({**SD15, **SMALL, "in_channels": channels})
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    pipe = random_pipe(unet)
    arguments = {**random_prompts(unet, 1), "num_inference_steps": STEPS, "output_type": "latent"}
    if channels == 4:
        return still(pipe), arguments
    pipe = StableDiffusionInpaintPipeline(**{**pipe.components, "vae": vae}, requires_safety_checker=False)
    arguments |= {"image": torch.rand(1, 3, 8, 8), "mask_image": torch.ones(1, 1, 8, 8), "height": 8, "width": 8}
    return still(pipe), arguments


def two_threads() -> dict[str, Any]:
    """Another thread allocates and waits while this one records a graph."""
    recording, done = threading.Event(), threading.Event()
    calls = 0
    failures: list[str] = []

    def run(x: Tensor) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        y = x * 2
        if calls == 2:
            recording.set()
            done.wait()
        return (y + 1,)

    def other() -> None:
        recording.wait()
        try:
            torch.empty(64 << 20, device="cuda")
            torch.ones(3, device="cuda").sum().item()
        except RuntimeError as error:
            failures.append(str(error))
        done.set()

    device.reset()
    thread = threading.Thread(target=other)
    thread.start()
    x = torch.ones(8, device="cuda")
    graphs = CudaGraphs(run, [], cuda_device(x.device))
    graphs(x)
    graphs(x)
    thread.join()
    counters = device.counters()
    return {
        "failures": [*failures, *graphs.notes],
        "graph launches": counters.get("graph launches", 0),
        "illegal calls": sum(count for name, count in counters.items() if "ILLEGAL" in name),
    }


WIDE = {**SD15, **SMALL, "block_out_channels": (128, 128)}
"""Two levels that are wide enough for tensor cores."""

SMALL_MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "eager": partial(measure, "eager", WIDE, STEPS),
    "inductor": partial(measure, "inductor", WIDE, STEPS),
    "waits": waits,
    "threads": two_threads,
}

FULL = {"SD 1.5": partial(measure, "inductor", SD15, 10), "SDXL": partial(measure, "inductor", SDXL, 10)}


if __name__ == "__main__":
    sys.exit(main(update="--update" in sys.argv[1:], full="--full" in sys.argv[1:]))
