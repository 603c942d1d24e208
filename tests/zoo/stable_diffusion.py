"""Stable Diffusion, Stable Diffusion XL, and what was built from their UNets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from case import Case
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionGLIGENPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPanoramaPipeline,
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from models import TEXT, ddim, small_text_encoder, small_unet, small_vae
from parts import image_encoder, miniature, noise, quiet
from torch import Tensor

ALL_BUT_TEXT = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
NO_TEXT = {"text_encoder": None, "tokenizer": None}
SD = NO_TEXT | ALL_BUT_TEXT
XL = NO_TEXT | {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}


def unet(**overrides: Any) -> UNet2DConditionModel:
    """Two levels of Stable Diffusion's, the upper one with attention."""
    blocks = {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return small_unet(**blocks | overrides)


def xl_unet(size_conditions: int = 6, **overrides: Any) -> UNet2DConditionModel:
    """Two levels of SDXL's: attention at the bottom only, deeper there, and linear projections."""
    config = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": size_conditions * 8 + TEXT[1],
    }
    return unet(**config | overrides)


def upscaler_unet() -> UNet2DConditionModel:
    """The x4 upscaler's: low-resolution image beside the latent, its noise level as a class, no self-attention."""
    return unet(in_channels=7, num_class_embeds=1000, only_cross_attention=(True, False), use_linear_projection=True)


def latent_upscaler_unet() -> UNet2DConditionModel:
    """The latent upscaler's: K-diffusion blocks, which take 32 channels a group and three levels."""
    return unet(
        block_out_channels=(32, 64, 64),
        in_channels=8,
        out_channels=5,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        mid_block_type=None,
        norm_num_groups=None,
        act_fn="gelu",
        center_input_sample=False,
        conv_in_kernel=1,
        conv_out_kernel=1,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        time_cond_proj_dim=128 + TEXT[1],
    )


def sd(kind: type[Any] = StableDiffusionPipeline, unet: Callable[[], Any] = unet, **components: Any) -> Any:
    """A pipeline of Stable Diffusion's parts."""
    return quiet(kind(**{"vae": small_vae(), "unet": unet(), "scheduler": ddim(), **SD, **components}))


def xl(kind: type[Any] = StableDiffusionXLPipeline, unet: Callable[[], Any] = xl_unet, **components: Any) -> Any:
    """A pipeline of SDXL's parts."""
    scheduler = EulerDiscreteScheduler.from_config(ddim().config)
    return quiet(kind(vae=small_vae(), unet=unet(), scheduler=scheduler, **XL, **components))


def depth2img() -> Any:
    components = NO_TEXT | {"depth_estimator": None, "feature_extractor": None}
    five_channels = unet(in_channels=5, use_linear_projection=True)
    return quiet(StableDiffusionDepth2ImgPipeline(vae=small_vae(), unet=five_channels, scheduler=ddim(), **components))


def image_variation() -> Any:
    components = ALL_BUT_TEXT | {"image_encoder": image_encoder()}
    pipe = StableDiffusionImageVariationPipeline(vae=small_vae(), unet=unet(), scheduler=ddim(), **components)
    return quiet(pipe)


def upscaler() -> Any:
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.08333).eval()
    low_res = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02)
    pipe = StableDiffusionUpscalePipeline(
        vae=vae, unet=upscaler_unet(), low_res_scheduler=low_res, scheduler=ddim(), **NO_TEXT
    )
    return quiet(pipe)


def latent_upscaler() -> Any:
    scheduler = EulerDiscreteScheduler.from_config(ddim().config)
    pipe = StableDiffusionLatentUpscalePipeline(
        vae=small_vae(), unet=latent_upscaler_unet(), scheduler=scheduler, **NO_TEXT
    )
    return quiet(pipe)


def gligen() -> Any:
    """Encodes the phrases itself, so it needs a text encoder."""
    tokenizer = miniature().tokenizer
    gated = partial(unet, attention_type="gated")
    pipe = sd(StableDiffusionGLIGENPipeline, gated, text_encoder=small_text_encoder(tokenizer), tokenizer=tokenizer)
    for module in pipe.unet.modules():  # as if trained: their gates start closed
        if hasattr(module, "alpha_attn"):
            torch.nn.init.constant_(module.alpha_attn, 0.5)
            torch.nn.init.constant_(module.alpha_dense, 0.5)
    return pipe


def pixels(seed: int = 20, channels: int = 3) -> Tensor:
    """An image as large as the latents, because the small VAE does not shrink it."""
    return torch.rand(1, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def mask() -> Tensor:
    """Repaints the left half."""
    return (torch.arange(8) < 4).float().expand(1, 1, 8, 8).contiguous()


def loop(steps: int = 8) -> dict[str, Any]:
    return {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}


def prompt(guidance: float = 5.0) -> dict[str, Any]:
    text, negative = noise(1, *TEXT, seed=10), noise(1, *TEXT, seed=11)
    return {"prompt_embeds": text, "negative_prompt_embeds": negative, "guidance_scale": guidance}


def pooled() -> dict[str, Any]:
    text, negative = noise(1, TEXT[1], seed=12), noise(1, TEXT[1], seed=13)
    return {"pooled_prompt_embeds": text, "negative_pooled_prompt_embeds": negative}


def image(**more: Any) -> dict[str, Any]:
    return {"image": pixels(), **more}


def repaint() -> dict[str, Any]:
    return image(mask_image=mask(), height=8, width=8, strength=1.0)


def run_of(*parts: Callable[[], dict[str, Any]], steps: int = 8, **more: Any) -> Callable[[], dict[str, Any]]:
    """Arguments of a run: prompt, noise and `parts`, each made anew."""

    def arguments() -> dict[str, Any]:
        made = prompt() | loop(steps)
        for part in parts:
            made |= part()
        return made | more

    return arguments


def without_prompt(arguments: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    return lambda: {name: value for name, value in arguments().items() if "prompt" not in name}


def upscaled_text() -> dict[str, Any]:
    return pooled() | {"image": noise(1, 4, 4, 4, seed=21)}


def panorama() -> dict[str, Any]:
    """Two overlapping views; the pipeline takes a latent for an eighth of the image, whatever the VAE."""
    return {"latents": noise(1, 4, 8, 72, seed=0), "height": 8 * 8, "width": 8 * 72}


def boxes() -> dict[str, Any]:
    return {"gligen_phrases": ["red circle", "blue square"], "gligen_boxes": [[0, 0, 0.5, 0.5], [0.4, 0.4, 0.9, 1.0]]}


SIZE = {"height": 8, "width": 8}

CASES: dict[str, Case] = {
    "Stable Diffusion, text to image": Case(sd, run_of()),
    "Stable Diffusion, text to image, guidance rescale": Case(sd, run_of(guidance_rescale=0.7)),
    "Stable Diffusion, text to image, guidance embedding": Case(
        partial(sd, unet=partial(unet, time_cond_proj_dim=32)), run_of()
    ),
    "Stable Diffusion, image to image": Case(
        partial(sd, StableDiffusionImg2ImgPipeline), run_of(image, steps=10, strength=0.8)
    ),
    "Stable Diffusion, inpaint, 4 channels": Case(partial(sd, StableDiffusionInpaintPipeline), run_of(repaint)),
    "Stable Diffusion, inpaint, 9 channels": Case(
        partial(sd, StableDiffusionInpaintPipeline, partial(unet, in_channels=9)), run_of(repaint)
    ),
    "Stable Diffusion, depth to image": Case(
        depth2img, run_of(lambda: image(depth_map=pixels(22, 1)[0]), steps=10, strength=0.8)
    ),
    "Stable Diffusion, image variation": Case(image_variation, without_prompt(run_of(image))),
    "Stable Diffusion, InstructPix2Pix": Case(
        partial(sd, StableDiffusionInstructPix2PixPipeline, partial(unet, in_channels=8)),
        run_of(image, image_guidance_scale=1.5),
    ),
    "Stable Diffusion, x4 upscaler": Case(upscaler, run_of(image)),
    "Stable Diffusion, latent upscaler": Case(
        latent_upscaler, run_of(upscaled_text), stock="the timestep is not an element of scheduler.timesteps"
    ),
    "Stable Diffusion, GLIGEN": Case(
        gligen, run_of(boxes, gligen_scheduled_sampling_beta=0.3), stock="was changed during the run"
    ),
    "Stable Diffusion, perturbed-attention guidance": Case(
        partial(sd, StableDiffusionPAGPipeline, pag_applied_layers="mid"), run_of(pag_scale=3.0)
    ),
    "Stable Diffusion, self-attention guidance": Case(
        partial(sd, StableDiffusionSAGPipeline), run_of(sag_scale=0.75), stock="has a forward hook"
    ),
    "Stable Diffusion, panorama": Case(
        partial(sd, StableDiffusionPanoramaPipeline),
        run_of(panorama),
        stock="the timestep is not an element of scheduler.timesteps",
    ),
    "Stable Diffusion XL, text to image": Case(xl, run_of(pooled, **SIZE)),
    "Stable Diffusion XL, image to image": Case(
        partial(xl, StableDiffusionXLImg2ImgPipeline), run_of(pooled, image, steps=10, strength=0.8)
    ),
    "Stable Diffusion XL, inpaint, 4 channels": Case(
        partial(xl, StableDiffusionXLInpaintPipeline), run_of(pooled, repaint)
    ),
    "Stable Diffusion XL, inpaint, 9 channels": Case(
        partial(xl, StableDiffusionXLInpaintPipeline, partial(xl_unet, in_channels=9)), run_of(pooled, repaint)
    ),
    "Stable Diffusion XL, base of base and refiner": Case(xl, run_of(pooled, steps=10, denoising_end=0.8, **SIZE)),
    "Stable Diffusion XL, refiner of base and refiner": Case(
        partial(xl, StableDiffusionXLImg2ImgPipeline, partial(xl_unet, 5), requires_aesthetics_score=True),
        run_of(pooled, lambda: {"image": noise(1, 4, 8, 8, seed=23)}, steps=16, denoising_start=0.5),
    ),
    "Stable Diffusion XL, InstructPix2Pix": Case(
        partial(xl, StableDiffusionXLInstructPix2PixPipeline, partial(xl_unet, in_channels=8)),
        run_of(pooled, image, image_guidance_scale=1.5, **SIZE),
    ),
    "Stable Diffusion XL, perturbed-attention guidance": Case(
        partial(xl, StableDiffusionXLPAGPipeline, pag_applied_layers="mid"), run_of(pooled, pag_scale=3.0, **SIZE)
    ),
    "Latent consistency model": Case(
        partial(
            sd,
            LatentConsistencyModelPipeline,
            partial(unet, time_cond_proj_dim=32),
            scheduler=LCMScheduler.from_config(ddim().config),
        ),
        run_of(),
    ),
}
