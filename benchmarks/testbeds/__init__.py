"""Small trained models in pixel space, so that claims are tested on more models than the bundled miniature.

``load_testbed("digits")`` loads a model of handwritten digits, 8x8, trained with linear betas to predict the noise;
``load_testbed("emoji")`` one of color emoji, 16x16, trained with a cosine schedule to predict the velocity. Both are
conditioned on a class, and use an empty class for guidance. `train.py` trains them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file

from benchmarks.testbeds.pipeline import ClassConditionalPipeline

WEIGHTS = Path(__file__).parent / "weights"

EMOJI_CLASSES = (
    *("FACE", "CLOCK", "HEART", "MOON", "HAND", "FLAG", "SQUARED", "LETTER", "ARROW", "SQUARE", "CIRCLE", "BALL"),
    *("CLOUD", "STAR", "SUN", "PERSON", "MAN", "MARK", "IDEOGRAPH", "SIGN", "SYMBOL", "OTHER"),
)
"""Classes of glyphs: the first of these words in the Unicode name of the glyph."""


@dataclass(frozen=True)
class Testbed:
    """A model's configuration.

    Attributes:
        classes: number of classes, without the empty one, which is the last.
        unet: arguments of `UNet2DModel`.
        scheduler: arguments of `DDIMScheduler`.
    """

    classes: int
    unet: dict[str, Any]
    scheduler: dict[str, Any]


TESTBEDS = {
    "digits": Testbed(
        10,
        {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        {"beta_schedule": "linear", "clip_sample": False, "timestep_spacing": "trailing"},
    ),
    "emoji": Testbed(
        len(EMOJI_CLASSES),
        {
            "sample_size": 16,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (32, 64, 96),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
        {
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction",
            "clip_sample": False,
            "timestep_spacing": "trailing",
        },
    ),
}


def build_unet(name: str) -> UNet2DModel:
    """Makes the UNet of a test bed with random weights."""
    testbed = TESTBEDS[name]
    return UNet2DModel(
        num_class_embeds=testbed.classes + 1, norm_num_groups=8, attention_head_dim=16, **testbed.unet
    ).eval()


def build_scheduler(name: str) -> DDIMScheduler:
    """Makes the scheduler that a test bed was trained with."""
    return DDIMScheduler(**TESTBEDS[name].scheduler)


def load_testbed(name: str) -> ClassConditionalPipeline:
    """Loads the trained test bed ``"digits"`` or ``"emoji"`` as a pipeline in float32."""
    unet = build_unet(name)
    weights = load_file(WEIGHTS / f"{name}.safetensors")
    unet.load_state_dict({key: value.to(torch.float32) for key, value in weights.items()})
    pipe = ClassConditionalPipeline(unet, build_scheduler(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe
