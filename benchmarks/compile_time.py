"""Times the first image including compilation: stock, fdcompile with inductor, and a package.

    python -m benchmarks.compile_time FOLDER --export
    python -m benchmarks.compile_time FOLDER

The first command exports the package, in its own process because exporting warms the compiler up. The second prints
the model and the seconds as JSON. The caches of inductor are in FOLDER, separate for stock and fdcompile: the first run
of the command is a cold start, further ones are warm.
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
    """Returns the seconds that `change` and the first image of a new pipeline take."""
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
    parser.add_argument("--export", action="store_true")
    arguments = parser.parse_args()
    folder, device = arguments.folder, "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.export:
        export(folder / "stages", device)
        return
    changes: dict[str, Callable[[Any], Any]] = {
        "nothing": lambda pipe: torch.compile(torch.sin)(torch.zeros(2)),  # loads the compiler before anything is timed
        "stock": compile_unet,
        "fdcompile": lambda pipe: fdcompile.optimize(pipe, Config.paper(backend="inductor")),
        "package": lambda pipe: fdcompile.load(pipe, folder / "stages"),
    }
    seconds = {name: first_image(change, device, folder / name) for name, change in changes.items()}
    print(json.dumps({"model": MODELS[device][0], "seconds": seconds}))


if __name__ == "__main__":
    main()
