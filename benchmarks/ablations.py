"""The paper's ablations: reuse of encoder and decoder (Fig. 4d, 10), key steps (Table 3), z_T (Table 4, Fig. 6).

    python -m benchmarks.ablations [--model PATH --prompts FILE] [--images N] [--output FOLDER]

Writes `ablations.md`, `ablations.json`, `strip.png` and `spectrum.png`. Measures no times.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.workbench import Made, Workbench
from fdcompile import Config, NoiseInjection
from fdcompile.cli.loading import load_pipe
from fdcompile.cli.options import ModelOptions
from fdcompile.cli.sheet import side_by_side
from fdcompile.measure.calls import OutputHook, run_call, seeded, seeded_batches
from fdcompile.measure.markdown import markdown_table
from fdcompile.measure.metrics import Images
from fdcompile.measure.quality import Evaluator, Networks, Quality, load_networks
from fdcompile.measure.variant import Variant, fewer_steps
from fdcompile.miniature import GUIDANCE
from fdcompile.miniature.scenes import draw, evaluation_scenes
from fdcompile.runtime.clock import Position
from fdcompile.tools.evaluate.captions import read_captions
from fdcompile.tools.evaluate.images import read_each, real_images
from fdcompile.tools.evaluate.variants import TABLE_3
from fdcompile.tools.generate.store import save_image
from fdcompile.tools.study.parts import BOTTLENECK, DECODER, EMBEDDINGS, ENCODER, counting_flops

STEPS = 50
BATCH = 12
KEYS = TABLE_3["non-uniform-iv"]
PARTS = (ENCODER, BOTTLENECK, DECODER, EMBEDDINGS)
SHOWN = 4
DRAWN = 4
"""Number of real images drawn of each scene."""

STANDARD, ENCODER_ARM, NOISE_ARM = "standard sampling", "encoder propagation", "encoder propagation, z_T injected"
DECODER_ARM, BOTH_ARM, DROPPED = "decoder propagation", "encoder and decoder propagation", "encoder and decoder dropped"


class Reused:
    """Replaces the predictions between key steps by that of the last key step, times `scale`."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._kept: Tensor | None = None

    def __call__(self, position: Position, output: Tensor) -> Tensor:
        if position.step in KEYS:
            self._kept = output
            return output
        assert self._kept is not None
        return self._kept * self._scale


@dataclass(frozen=True)
class Arm:
    """A sampling method of the ablation.

    Attributes:
        variant: variant of the pipeline.
        output_hook: hook that replaces the predictions of the UNet, see `OutputHook`; None for no hook.
        recompute: parts of the UNet that run at every step; the others run at key steps only. Ignored if `variant` has
            a configuration, whose FLOPs are counted.
    """

    variant: Variant
    output_hook: Callable[[Position, Tensor], Tensor] | None = None
    recompute: tuple[str, ...] = PARTS


def arms() -> list[Arm]:
    """Returns all arms; the first one is the reference."""
    return [
        Arm(Variant(STANDARD)),
        Arm(Variant(ENCODER_ARM, Config.paper())),
        Arm(Variant(DECODER_ARM), Reused(1.0), (ENCODER, BOTTLENECK, EMBEDDINGS)),
        Arm(Variant(BOTH_ARM), Reused(1.0), ()),
        Arm(Variant(DROPPED), Reused(0.0), ()),
        Arm(Variant(NOISE_ARM, Config.paper(noise_injection=NoiseInjection()))),
        *(Arm(Variant(name, Config(key_steps=steps))) for name, steps in TABLE_3.items() if steps != KEYS),
    ]


@dataclass(frozen=True)
class Row:
    """Results of an arm.

    Attributes:
        arm: name of the arm.
        key_steps: number of key steps, of `STEPS` steps.
        share: FLOPs of the UNet as a share of standard sampling's.
        quality: compared with real images, if there are any, and with those of standard sampling.
        fewer_steps: steps of standard sampling with at least the same work; None if that takes all steps.
        fewer: quality of standard sampling with `fewer_steps`.
        amplitudes: amplitude spectrum, mean over the images and over rings of equal frequency.
    """

    arm: str
    key_steps: int
    share: float
    quality: Quality
    fewer_steps: int | None
    fewer: Quality | None
    amplitudes: tuple[float, ...] = field(repr=False)


class Bench:
    """A pipeline with its prompts and the reference images."""

    def __init__(self, pipe: Any, prompts: Sequence[str], guidance: float, networks: Networks, real: Images | None):
        self._workbench = Workbench(Variant("", sampler="DDIM").of(pipe))
        self.prompts = prompts
        self._guidance = guidance
        self._evaluator = Evaluator(networks if real is not None else replace(networks, features=None))
        if real is not None:
            self._evaluator.update_real(real)
        self._fewer: dict[int, Quality] = {}
        self._flops = self._parts()
        self._standard: Made | None = None

    def run(self, arm: Arm) -> tuple[Row, Images]:
        """Makes the images of all prompts and measures them. The reference must run first."""
        made = self._made(arm.variant, arm.output_hook, STEPS)
        if self._standard is None:
            self._standard = made
        if arm.output_hook is None:
            share, keys = made.flops / self._standard.flops, made.unet_calls
        else:
            keys = len(KEYS)
            spent = sum(flops * (STEPS if part in arm.recompute else keys) for part, flops in self._flops.items())
            share = spent / STEPS / sum(self._flops.values())
        steps = fewer_steps(share, STEPS)
        fewer = self._with_fewer(steps) if steps < STEPS else None
        row = Row(
            arm=arm.variant.name,
            key_steps=keys,
            share=share,
            quality=self._look_at(made),
            fewer_steps=None if fewer is None else steps,
            fewer=fewer,
            amplitudes=tuple(spectrum(made.images).tolist()),
        )
        return row, made.images

    def _with_fewer(self, steps: int) -> Quality:
        if steps not in self._fewer:
            self._fewer[steps] = self._look_at(self._made(Variant(""), None, steps))
        return self._fewer[steps]

    def _look_at(self, made: Made) -> Quality:
        assert self._standard is not None
        self._evaluator.update(made.images, self.prompts, None if made is self._standard else self._standard.images)
        return self._evaluator.compute()

    def _made(self, variant: Variant, output_hook: OutputHook | None, steps: int) -> Made:
        common = {"num_inference_steps": steps, "guidance_scale": self._guidance}
        return self._workbench.run(variant, seeded_batches(self.prompts, 0, BATCH, **common), output_hook)

    def _parts(self) -> dict[str, int]:
        with counting_flops(self._workbench.stock.unet) as flops:
            run_call(self._workbench.stock, seeded(self.prompts[:BATCH], 0, num_inference_steps=1))
        return {part: flops[part] for part in PARTS}


def spectrum(images: Images) -> NDArray[np.float64]:
    """Returns mean amplitudes of the grayscale images at 1 to ``min(height, width) // 2`` cycles per image."""
    gray = images.astype(np.float64).mean(-1)
    amplitudes = np.abs(np.fft.fft2(gray, norm="ortho")).mean(0)
    height, width = amplitudes.shape
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(height) * height, np.fft.fftfreq(width) * width, indexing="ij"))
    rings = frequencies.round().astype(int)
    return np.array([amplitudes[rings == ring].mean() for ring in range(1, min(height, width) // 2 + 1)])


@dataclass(frozen=True)
class Ordering:
    """A claim of the paper that orders two arms, and whether it holds here."""

    says: str
    source: str
    figures: str
    holds: bool

    @property
    def cells(self) -> tuple[str, ...]:
        return self.says, self.source, self.figures, "yes" if self.holds else "**no**"


def orderings(rows: Sequence[Row]) -> list[Ordering]:
    """Checks the conclusions of the paper on `rows`. The Fréchet distance to real images stands in for FID."""
    row_of = {row.arm: row for row in rows}
    standard = np.array(row_of[STANDARD].amplitudes)

    def psnr(arm: str) -> float:
        value = row_of[arm].quality.psnr
        assert value is not None
        return value

    def distance(arm: str) -> float:
        value = row_of[arm].quality.frechet
        return math.nan if value is None else value

    def off(arm: str) -> float:
        """Mean relative distance from the spectrum of standard sampling in the upper half of the frequencies."""
        ratio = np.array(row_of[arm].amplitudes) / standard
        return float(np.abs(ratio[len(ratio) // 2 :] - 1).mean())

    def compare(says: str, source: str, one: float, other: float, unit: str = "") -> Ordering:
        return Ordering(says, source, f"{one:.4g} beside {other:.4g}{unit}", one < other)

    claims = [
        compare(
            "decoder propagation is further from standard sampling than encoder propagation",
            "Fig. 4c, 4d",
            psnr(DECODER_ARM),
            psnr(ENCODER_ARM),
            " dB",
        ),
        Ordering(
            "encoder and decoder propagation looks like decoder propagation",
            "Fig. 10d, 10e",
            f"{psnr(BOTH_ARM):.3g} beside {psnr(DECODER_ARM):.3g} dB",
            math.isclose(psnr(BOTH_ARM), psnr(DECODER_ARM)),
        ),
        compare(
            "dropping both does not denoise: the furthest of all",
            "Fig. 10f",
            psnr(DROPPED),
            min(psnr(arm) for arm in row_of if arm not in (DROPPED, STANDARD)),
            " dB",
        ),
        compare(
            "z_T brings fine detail closer to standard sampling's (mean distance of the upper half of the spectrum)",
            "Fig. 6",
            off(NOISE_ARM),
            off(ENCODER_ARM),
        ),
    ]
    if row_of[STANDARD].quality.frechet is None:
        return claims
    encoder, uniform = distance(ENCODER_ARM), [distance(f"uniform-{number}") for number in ("i", "ii", "iii")]
    others = [distance(f"non-uniform-{number}") for number in ("i", "ii", "iii")]
    return [
        *claims,
        compare("encoder propagation has a lower FID than standard sampling", "Table 1", encoder, distance(STANDARD)),
        compare(
            "uniform II has a lower FID than uniform I, which has more key steps", "Table 3", uniform[1], uniform[0]
        ),
        compare("uniform III, with five key steps, has a higher one than I", "Table 3", uniform[0], uniform[2]),
        compare("the paper's set has the lowest FID of the non-uniform ones", "Table 3", encoder, min(others)),
        compare("and a lower one than uniform II, which has nine key steps, too", "Table 3", encoder, uniform[1]),
        compare("non-uniform II has by far the highest FID of these", "Table 3", max(others[0], others[2]), others[1]),
        compare("z_T lowers the FID", "Table 4", distance(NOISE_ARM), encoder),
    ]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plots the spectra of Fig. 6 (right), relative to standard sampling's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    spectra = {row.arm: np.array(row.amplitudes) for row in rows}
    standard = spectra[STANDARD]
    for arm in (STANDARD, ENCODER_ARM, NOISE_ARM, DECODER_ARM):
        axes.plot(range(1, len(standard) + 1), spectra[arm] / standard, "o-", label=arm, markersize=3)
    axes.set(xlabel="frequency, cycles an image", ylabel="amplitude, as a share of standard sampling's")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def markdown(rows: Sequence[Row], claims: Sequence[Ordering], about: dict[str, Any]) -> str:
    measures = {"PSNR": ("psnr", ".1f"), "SSIM": ("ssim", ".3f"), about["distance"]: ("frechet", ".1f")}
    measures |= {"read correctly": ("read", ".1%")}
    known = {
        name: (measure, how)
        for name, (measure, how) in measures.items()
        if any(getattr(row.quality, measure) is not None for row in rows)
    }

    def cells(quality: Quality) -> list[str]:
        values = ((getattr(quality, measure), how) for measure, how in known.values())
        return ["" if value is None else format(value, how) for value, how in values]

    lines = []
    for row in rows:
        fewer = "" if row.fewer is None else f"{row.fewer_steps} steps: {', '.join(cells(row.fewer))}"
        lines.append((row.arm, f"{row.key_steps}", f"{row.share:.3f}", *cells(row.quality), fewer))
    table = markdown_table(("arm", "key steps", "FLOPs of standard", *known, "fewer steps at this work"), *lines)
    verdicts = markdown_table(("the paper", "where", "here", "so here?"), *(claim.cells for claim in claims))
    return f"""\
{table}

{about["model"]}, {about["images"]} prompts, {STEPS} steps of DDIM, guidance {about["guidance"]:g}, the same noise \
in every arm; torch {torch.__version__}, diffusers {diffusers.__version__}, {about["device"]}. PSNR (dB) and SSIM: \
medians, to the images of standard sampling.{about["real"]} The last column has the same measures, in this order, \
for standard sampling with as many steps as at least the same work buys. The nine key steps of the first five arms are \
the paper's; the sets of Table 3 go by their names there, non-uniform IV is the paper's own.

*Decoder propagation* keeps what the decoder ends with, and that is the prediction: after the last block come a \
normalization and a convolution that read nothing else. Under DDIM with eta = 0 a prediction that is used again goes \
on along the same straight step, so that decoder propagation **is** DDIM with the key steps alone, at the encoder's \
cost on top, and encoder and decoder propagation is the same without that cost. *Dropped*: at other steps the noise is \
predicted to be zero, and neither runs. Their FLOPs are those of the parts of the stock UNet that run.

## What the paper concludes

{verdicts}

{about["noise"]}![Images of each arm](strip.png)

![Amplitude spectra](spectrum.png)
"""


def prepare(arguments: argparse.Namespace) -> tuple[Bench, dict[str, Any]]:
    """Loads the pipeline, prompts and reference images, and describes them for the report."""
    pipe = load_pipe(ModelOptions(arguments.model))
    is_miniature = arguments.model is None
    networks = load_networks(arguments.inception, None, None, pipe.device, is_miniature)
    real: Images | None = None
    if is_miniature:
        scenes, rng = evaluation_scenes(arguments.images), np.random.default_rng(0)
        prompts = [scene.caption for scene in scenes]
        real = np.stack([draw(scene, rng) for scene in scenes for _ in range(DRAWN)])
        against = f"{DRAWN} drawn images of each prompt"
    else:
        prompts = [caption.text for caption in read_captions(arguments.prompts, 0, arguments.images)]
        if arguments.real is not None:
            real = np.concatenate(list(read_each(real_images(arguments.real))))
        against = f"the images in {arguments.real}"
    guidance = arguments.guidance or (GUIDANCE if is_miniature else 7.5)
    distance = networks.distance_name
    noise = f"FID is here the {distance} to {against}; differences of a few percent are noise at so few images.\n\n"
    about = {
        "model": arguments.model or "The bundled miniature",
        "images": arguments.images,
        "guidance": guidance,
        "device": pipe.device.type,
        "distance": distance,
        "real": f" {distance}: to {against}." if real is not None else "",
        "noise": noise if real is not None else "",
    }
    return Bench(pipe, prompts, guidance, networks, real), about


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a pipeline (default: the miniature)")
    parser.add_argument("--prompts", type=Path, help="prompts as for fdcompile evaluate (default: the miniature's)")
    parser.add_argument(
        "--guidance", type=float, default=None, help="guidance scale (default: the miniature's, or 7.5)"
    )
    parser.add_argument("--images", type=int, default=256, help="images of each arm (default: %(default)s)")
    parser.add_argument("--real", type=Path, help="folder of real images of one size (default: drawn scenes)")
    parser.add_argument("--inception", type=Path, help="Inception weights as for fdcompile evaluate")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ablations", help="folder")
    arguments = parser.parse_args(argv)
    if arguments.model is not None and arguments.prompts is None:
        parser.error("--prompts is required with --model")
    arguments.output.mkdir(parents=True, exist_ok=True)
    bench, about = prepare(arguments)
    rows, images = [], []
    for arm in arms():
        row, made = bench.run(arm)
        rows.append(row)
        images.append((row.arm, f"{row.share:.2f} of the FLOPs", made[:SHOWN]))
        print(f"{row.arm}: {row.share:.3f}, {row.quality}", flush=True)
    text = markdown(rows, orderings(rows), about)
    (arguments.output / "ablations.md").write_text(text, encoding="utf-8")
    (arguments.output / "ablations.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    save_image(side_by_side(images[:6], bench.prompts[:SHOWN]), arguments.output / "strip.png")
    plot(rows, arguments.output / "spectrum.png")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
