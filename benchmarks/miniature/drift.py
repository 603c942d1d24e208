"""How much the features of the miniature's UNet change from one step to the next (Equation 2 of the paper).

    python benchmarks/miniature/drift.py --out build/miniature

Writes `drift.md` (a table) and `drift.png` (two plots). For every block of encoder, bottleneck and decoder, and every
pair of adjacent DDIM steps, the change is the mean square of the difference of the block's two outputs (Equation 2:
divided by channels and positions, here averaged over the prompts too). The relative change divides it by the mean
square of the later output, so that blocks of different scale can be compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor, nn

from fdcompile.miniature import load_miniature
from fdcompile.miniature.scenes import evaluation_scenes

GUIDANCE = 3.0

#: For each block, (steps - 1, 2): absolute and relative change between adjacent steps.
Drift = dict[str, NDArray[np.float64]]


def measure(pipe: StableDiffusionPipeline, prompts: list[str], steps: int) -> Drift:
    """Sample the prompts once and compare the outputs of all blocks at adjacent steps."""
    unet = pipe.unet
    blocks: dict[str, nn.Module] = {f"encoder {n}": block for n, block in enumerate(unet.down_blocks)}
    blocks["bottleneck"] = unet.mid_block
    blocks |= {f"decoder {n}": block for n, block in enumerate(unet.up_blocks)}
    previous: dict[str, Tensor] = {}
    changes: dict[str, list[tuple[float, float]]] = {name: [] for name in blocks}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            features = output[0] if isinstance(output, tuple) else output
            if name in previous:
                change = (features - previous[name]).square().mean().item()
                changes[name].append((change, change / features.square().mean().item()))
            previous[name] = features

        return blocks[name].register_forward_hook(record)

    handles = [watch(name) for name in blocks]
    try:
        pipe(
            prompts,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    finally:
        for handle in handles:
            handle.remove()
    return {name: np.array(pairs) for name, pairs in changes.items()}


def table(drift: Drift) -> str:
    """Markdown: for each block its mean and largest change over the run, absolute and relative."""
    lines = ["| block | mean change | largest change | mean relative | largest relative |", "|---|---|---|---|---|"]
    for name, changes in drift.items():
        (mean, relative_mean), (top, relative_top) = changes.mean(0), changes.max(0)
        lines.append(f"| {name} | {mean:.4f} | {top:.4f} | {relative_mean:.2%} | {relative_top:.2%} |")
    return "\n".join(lines) + "\n"


def plot(drift: Drift, path: Path) -> None:
    """Both changes against the step, logarithmic."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colours = {"encoder": "Blues", "bottleneck": "Greens", "decoder": "Oranges"}
    for kind, (panel, title) in enumerate(zip(panels, ("mean squared change (Eq. 2)", "relative change"), strict=True)):
        for name, changes in drift.items():
            part, *level = name.split()
            colour = plt.get_cmap(colours[part])(0.45 + 0.2 * int(level[0]) if level else 0.7)
            panel.semilogy(range(1, len(changes) + 1), changes[:, kind], label=name, color=colour)
        panel.set(title=title, xlabel="step")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for drift.md and drift.png")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--prompts", type=int, default=16, help="how many evaluation prompts to average over")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    prompts = [scene.caption for scene in evaluation_scenes(arguments.prompts)]
    drift = measure(load_miniature(), prompts, arguments.steps)
    (arguments.out / "drift.md").write_text(table(drift))
    plot(drift, arguments.out / "drift.png")
    print(table(drift))


if __name__ == "__main__":
    main()
