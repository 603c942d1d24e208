"""How long the first image takes when everything is compiled for it: stock, all stages of fdcompile, and a package.

    python -m benchmarks.compile_time FOLDER

Prints the model and seconds as JSON. Inductor's caches live in FOLDER, one for each of the two: the first call is a
cold start, another call is a warm one. The package is made by the first call, before the clock runs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fdcompile
from benchmarks.candidates import compile_unet
from benchmarks.models import SD15, SMALL, random_pipe, random_prompts, random_unet
from fdcompile import Config

STEPS = 20
MODELS = {"cuda": ("SD 1.5's shape", SD15), "cpu": ("a small UNet", SMALL)}


def make_pipe(device: str) -> Any:
    _, config = MODELS[device]
    with torch.device(device):
        pipe = random_pipe(random_unet(config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(folder: Path, device: str) -> None:
    pipe = make_pipe(device)
    fdcompile.export(pipe, folder, format="aot_inductor", batch=1, arguments=random_prompts(pipe.unet, 1))


def first_image(change: Callable[[Any], Any], device: str, cache: Path) -> float:
    """Seconds of the first image of a new pipeline that `change` was applied to."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    torch._dynamo.reset()
    pipe = make_pipe(device)
    began = time.perf_counter()
    change(pipe)
    pipe(**random_prompts(pipe.unet, 1), num_inference_steps=STEPS, output_type="latent").images.cpu()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    changes: dict[str, Callable[[Any], Any]] = {
        "nothing": lambda pipe: torch.compile(torch.sin)(torch.zeros(2)),  # loads the compiler before the clock runs
        "stock": compile_unet,
        "fdcompile": lambda pipe: fdcompile.optimize(pipe, Config(backend="inductor")),
        "package": lambda pipe: fdcompile.load(pipe, folder / "stages"),
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (folder / "stages").exists():
        export(folder / "stages", device)
    seconds = {name: first_image(change, device, folder / name) for name, change in changes.items()}
    print(json.dumps({"model": MODELS[device][0], "seconds": seconds}))


if __name__ == "__main__":
    main()
