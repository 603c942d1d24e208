"""Trains a test bed: handwritten digits from scikit-learn, or color emoji from a font file.

    python -m benchmarks.testbeds.train digits
    python -m benchmarks.testbeds.train emoji --font NotoColorEmoji.ttf

The font is in Debian's package fonts-noto-color-emoji. Writes half-precision weights into `weights/`; takes about ten
minutes on one core for each.
"""

from __future__ import annotations

import argparse
import math
import time
import unicodedata
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.testbeds import EMOJI_CLASSES, TESTBEDS, WEIGHTS, build_scheduler, build_unet

BATCH = {"digits": 64, "emoji": 32}
GLYPH = 109
"""Size of the font's bitmaps in pixels."""


def digits() -> tuple[Tensor, Tensor]:
    """Loads images ``[N, 1, 8, 8]`` in [-1, 1] and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)


def emoji(font: Path) -> tuple[Tensor, Tensor]:
    """Renders images ``[N, 3, 16, 16]`` in [-1, 1] on white, and derives their classes from their Unicode names."""
    import numpy as np
    from fontTools.ttLib import TTFont
    from PIL import Image, ImageDraw, ImageFont

    drawer = ImageFont.truetype(str(font), GLYPH)
    size = TESTBEDS["emoji"].unet["sample_size"]
    images, classes = [], []
    for code in TTFont(font).getBestCmap():
        words = unicodedata.name(chr(code), "").replace("-", " ").split()
        if code <= 0xFF or not words:
            continue
        canvas = Image.new("RGB", (136, 128), "white")
        ImageDraw.Draw(canvas).text((0, 0), chr(code), font=drawer, embedded_color=True)
        image = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 127.5 - 1
        if image.min() > 0.9:  # the glyph is empty
            continue
        images.append(torch.from_numpy(image).permute(2, 0, 1))
        classes.append(next((i for i, word in enumerate(EMOJI_CLASSES) if word in words), len(EMOJI_CLASSES) - 1))
    return torch.stack(images), torch.tensor(classes)


def target(scheduler: DDIMScheduler, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Returns the training target of the UNet."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(clean, noise, times)
    return noise


def train(name: str, images: Tensor, classes: Tensor, steps: int, seed: int) -> None:
    """Trains with AdamW, warm-up and cosine decay, one class in ten empty, and a moving average of the weights."""
    torch.manual_seed(seed)
    unet, scheduler = build_unet(name).train(), build_scheduler(name)
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    print(f"{name}: {len(images)} images, {parameters / 1e6:.2f} M parameters")
    average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.997))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1.5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    began, total = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images), (BATCH[name],))
        clean, labels = images[chosen], classes[chosen]
        labels = torch.where(torch.rand(len(labels)) < 0.1, TESTBEDS[name].classes, labels)
        noise, times = torch.randn_like(clean), torch.randint(scheduler.config.num_train_timesteps, (len(clean),))
        predicted = unet(scheduler.add_noise(clean, noise, times), times, class_labels=labels).sample
        loss = mse_loss(predicted, target(scheduler, clean, noise, times))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(unet)
        total += loss.item()
        if step % 100 == 0 or step == steps:
            left = (time.monotonic() - began) / step * (steps - step) / 60
            print(f"{step}/{steps} loss {total / ((step - 1) % 100 + 1):.4f}, {left:.1f} min left", flush=True)
            total = 0.0
    WEIGHTS.mkdir(exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in average.module.state_dict().items()}
    save_file(weights, WEIGHTS / f"{name}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(TESTBEDS))
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, for emoji")
    parser.add_argument("--steps", type=int, default=3500, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.name == "emoji" and arguments.font is None:
        parser.error("emoji: expected --font, a file such as NotoColorEmoji.ttf")
    images, classes = digits() if arguments.name == "digits" else emoji(arguments.font)
    train(arguments.name, images, classes, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
