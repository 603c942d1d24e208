"""A minimal diffusers pipeline with class conditioning and classifier-free guidance."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor


class ClassConditionalPipeline(DiffusionPipeline):
    """Samples images of given classes in pixel space.

    As in Stable Diffusion, a guidance scale above 1 doubles the batch: the first half has the empty class, which is the
    last one of the UNet's class embedding, the second half the given classes.
    """

    def __init__(self, unet: UNet2DModel, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self._guidance_scale = 1.0

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Samples images of `class_labels`: PIL images, or a NumPy array ``[N, H, W, C]`` in [0, 1]."""
        self._guidance_scale = guidance_scale
        config, device = self.unet.config, self.unet.device
        labels = torch.tensor(class_labels, device=device)
        if self.do_classifier_free_guidance:
            labels = torch.cat([torch.full_like(labels, config.num_class_embeds - 1), labels])
        shape = (len(class_labels), config.in_channels, config.sample_size, config.sample_size)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        sample = latents * self.scheduler.init_noise_sigma
        draws_noise = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if draws_noise else {}
        for timestep in self.progress_bar(self.scheduler.timesteps):
            stacked = torch.cat([sample, sample]) if self.do_classifier_free_guidance else sample
            stacked = self.scheduler.scale_model_input(stacked, timestep)
            prediction = self.unet(stacked, timestep, class_labels=labels).sample
            if self.do_classifier_free_guidance:
                empty, asked = prediction.chunk(2)
                prediction = empty + guidance_scale * (asked - empty)
            sample = self.scheduler.step(prediction, timestep, sample, **options).prev_sample
        images = (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=self.numpy_to_pil(images) if output_type == "pil" else images)
