"""Writes docs/scaling.md: calculated times of decoding on several devices.

    python -m benchmarks.scaling

The time of a stage is its exact FLOPs from `baseline.json` at one rate; communication is counted in bytes.
"""

from __future__ import annotations

import itertools
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

from fdcompile.key_steps import resolve_key_steps
from fdcompile.measure.markdown import markdown_table

ROOT = Path(__file__).parent
PAGE = ROOT.parent / "docs" / "scaling.md"
STEPS = 50
RANKS = (1, 2, 4, 8)
RATE = 250e12
"""Assumed FLOP/s of a device: a quarter of the specified half-precision rate of an H100's tensor cores."""


@dataclass(frozen=True)
class Link:
    """A link between devices, with assumed bandwidth (bytes per second in one direction) and latency (seconds)."""

    name: str
    bandwidth: float
    latency: float

    def gather(self, total: float, ranks: int) -> float:
        """Returns the seconds of a ring all-gather after which each of `ranks` has `total` bytes."""
        return 0.0 if ranks == 1 else (ranks - 1) * (total / ranks / self.bandwidth + self.latency)


NVLINK = Link("NVLink", 400e9, 10e-6)
PCIE = Link("PCIe", 25e9, 30e-6)


@dataclass(frozen=True)
class Model:
    """FLOPs of one image with guidance, and bytes of one step's prediction in half precision."""

    name: str
    stock: float
    once: float
    encoder: float
    decoder: float
    prediction: int

    @classmethod
    def of(cls, name: str, latents: int, figures: dict[str, int]) -> Model:
        keys = len(groups())
        flops = {
            key.rpartition(", ")[2]: value
            for key, value in figures.items()
            if key.startswith(f"{name} / {STEPS} steps")
        }
        once = sum(flops.get(stage, 0) for stage in ("prompt", "schedule", "schedule_prompt"))
        encoder = flops["encoder"] / keys
        return cls(name, flops["stock"], once, encoder, flops["decoder"] / STEPS, 2 * 4 * latents**2 * 2)

    def seconds(self, ranks: int, link: Link, share: float = 1.0) -> float:
        """Returns the seconds of an image whose decoding `ranks` devices share, each with `share` of the batch."""
        flops = self.once + sum(self.encoder + -(-steps // ranks) * self.decoder for steps in groups())
        sent = sum(link.gather(share * steps * self.prediction, ranks) for steps in groups() if steps > 1)
        return share * flops / RATE + sent

    def halves(self, ranks: int, link: Link) -> float:
        """Seconds of an image with each half of guidance on half of the devices, which share the decoding."""
        exchanged = STEPS * link.gather(self.prediction, 2)
        return self.seconds(ranks // 2, link, share=0.5) + exchanged


def groups() -> list[int]:
    """Returns the number of steps of each group at the paper's key steps."""
    keys = resolve_key_steps("paper", STEPS)
    return [after - key for key, after in itertools.pairwise([*keys, STEPS])]


def page() -> str:
    """Returns the whole document."""
    figures = json.loads((ROOT / "baseline.json").read_text(encoding="utf-8"))
    models = [Model.of("SD 1.5, 64x64", 64, figures), Model.of("SDXL, 128x128", 128, figures)]
    keys, longest = len(groups()), max(groups())
    bounds = [
        f"{model.name}: {(model.once + keys * (model.encoder + model.decoder)) / model.stock:.3f}" for model in models
    ]
    sent = [
        f"{model.name}: {model.prediction / 2**10:.0f} KiB a step, at most "
        f"{longest * model.prediction / 2**20:.1f} MiB a group"
        for model in models
    ]
    links = [
        f"{link.bandwidth / 1e9:.0f} GB/s after {link.latency * 1e6:.0f} µs ({link.name})" for link in (NVLINK, PCIE)
    ]
    paragraphs = [
        f"Made by `make tables` with `benchmarks/scaling.py`. **Nothing here was measured on a GPU**: a stage takes "
        f"its FLOPs (exact, `benchmarks/baseline.json`) at {RATE / 1e12:.0f} TFLOP/s, which is assumed for all stages "
        f"and any number of steps at once; a hop of a ring is assumed to carry {' or '.join(links)}. What the executor "
        f"and the launches of kernels cost is left out.",
        f"`Config(process_group=...)` lets the ranks of a process group share the decoding of each group of steps. "
        f"Every rank runs the encoder of key steps itself, so that no features travel, and one all-gather a group "
        f"brings the predictions together. {STEPS} steps, the paper's {keys} key steps (groups of "
        f"{', '.join(map(str, groups()))} steps), time of an image over that of stock on one device:",
        _table(models),
        "*Guidance in halves too*: the two halves of the batch on two devices, or on two sets of devices that share "
        "the decoding; their predictions are exchanged at every step. `fdcompile` does not do that, other libraries "
        "do. *Other prompts*: each device generates another image (`fdcompile generate` under `torchrun`): throughput, "
        "not latency.",
        f"- **Little data is sent**: {'; '.join(sent)}. The latency of the link matters, not its bandwidth.",
        f"- **Lower bound**: encoder and bottleneck run at every key step, and each group decodes at least one step. "
        f"With any number of devices this takes, of stock's time: {'; '.join(bounds)}. More devices than the longest "
        f"group has steps ({longest}) are idle.",
        "- **Compared with other prompts**: with several prompts, give each device its own, so that no device is idle. "
        "Sharing one image reduces its latency, but every rank repeats the encoder.",
        "- **Compared with guidance in halves**: two devices should share the guidance, because that halves the whole "
        "UNet and not only the decoder; from four devices on, use both.",
    ]
    filled = [_fill(paragraph) for paragraph in paragraphs]
    return "\n\n".join(["# One image on several devices, on paper", *filled[:4], "\n".join(filled[4:])]) + "\n"


def _table(models: list[Model]) -> str:
    heads = (
        "model",
        "devices",
        "decoding shared, NVLink",
        "PCIe",
        "guidance in halves too, NVLink",
        "PCIe",
        "other prompts",
    )
    rows = []
    for model in models:
        stock = model.stock / RATE
        for ranks in RANKS:
            shared = [f"{model.seconds(ranks, link) / stock:.3f}" for link in (NVLINK, PCIE)]
            halves = [f"{model.halves(ranks, link) / stock:.3f}" if ranks > 1 else "" for link in (NVLINK, PCIE)]
            alone = f"{model.seconds(1, NVLINK) / stock / ranks:.3f}"
            rows.append((model.name, str(ranks), *shared, *halves, alone))
    return markdown_table(heads, *rows)


def _fill(paragraph: str) -> str:
    if paragraph.startswith("|"):
        return paragraph
    return textwrap.fill(paragraph, 120, subsequent_indent="  " if paragraph.startswith("- ") else "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
