"""The stock pipeline of a setting and its variants."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import fdcompile
from benchmarks.models import random_pipe, random_prompts, random_unet
from benchmarks.settings import Setting
from benchmarks.workbench import Workbench
from fdcompile.measure.calls import as_images
from fdcompile.measure.metrics import Images
from fdcompile.measure.variant import Variant
from fdcompile.miniature import GUIDANCE
from fdcompile.miniature.scenes import evaluation_scenes


class Bench:
    """Pipelines and calls of one setting.

    Attributes:
        setting: model, sizes and steps.
        stock: the stock pipeline, whose weights all variants share.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.stock, self._prompts = _miniature(setting) if setting.trained else _random(setting)
        self._workbench = Workbench(self.stock)

    @cached_property
    def reference(self) -> Tensor:
        """Latents of the stock pipeline."""
        return self.sample(self.stock, self.setting.steps)

    def pipe(self, variant: Variant) -> Any:
        return self._workbench.pipe(variant)

    def sample(self, pipe: Any, steps: int) -> Tensor:
        """Samples latents of fixed prompts from fixed noise. Only UNet and scheduler run."""
        size = self.setting.latents * pipe.vae_scale_factor
        latents: Tensor = pipe(
            **self._prompts,
            height=size,
            width=size,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        return latents

    def images(self, latents: Tensor) -> Images | None:
        """Decodes latents of the trained model to images; None for models with random weights."""
        if not self.setting.trained:
            return None
        vae = self.stock.vae
        with torch.no_grad():
            decoded = vae.decode(latents / vae.config.scaling_factor).sample
        return as_images(self.stock.image_processor.postprocess(decoded))


def _miniature(setting: Setting) -> tuple[Any, dict[str, Any]]:
    pipe = fdcompile.load_miniature(setting.dtype).to(setting.device)
    captions = [scene.caption for scene in evaluation_scenes(setting.batch)]
    with torch.no_grad():
        prompts, negative_prompts = pipe.encode_prompt(
            captions, setting.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    arguments = {"prompt_embeds": prompts, "negative_prompt_embeds": negative_prompts}
    return pipe, arguments | {"guidance_scale": GUIDANCE}


def _random(setting: Setting) -> tuple[Any, dict[str, Any]]:
    with torch.device(setting.device):
        unet = random_unet(setting.unet).to(setting.dtype)
    return random_pipe(unet), random_prompts(unet, setting.batch)
