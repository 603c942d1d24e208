"""Pipelines with a ControlNet, a T2I-Adapter or an IP-Adapter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from case import Case
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPAGInpaintPipeline,
    StableDiffusionControlNetPAGPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionControlNetXSPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPAGImg2ImgPipeline,
    StableDiffusionXLControlNetPAGPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionInpaintPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLControlNetXSPipeline,
    T2IAdapter,
)
from models import TEXT
from parts import noise, quiet
from stable_diffusion import SIZE, image, pixels, pooled, repaint, run_of, sd, unet, xl, xl_unet
from torch import nn

UNION = {"num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
IMAGE_EMBEDDING = 12
"""Width of what an image encoder would say of an IP-Adapter's image."""


def as_if_trained(model: nn.Module) -> Any:
    """Fills the layers that start at zero, through which a ControlNet has no effect."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def controlnet(kind: type[Any], of: Callable[[], Any], seed: int = 4, **config: Any) -> Any:
    """One that fits the UNet, for images as large as the latents."""
    config = {"in_channels": 4, "conditioning_embedding_out_channels": (16,)} | config
    known = {name: value for name, value in of().config.items() if name in kind._get_init_keys(kind)}
    torch.manual_seed(seed)
    return as_if_trained(kind(**known | config))


def controlled(
    base: Callable[..., Any], of: Callable[[], Any], kind: type[Any], nets: int = 1, **components: Any
) -> Any:
    several = [controlnet(ControlNetModel, of, seed) for seed in range(4, 4 + nets)]
    return base(kind, of, controlnet=several if nets > 1 else several[0], **components)


def union(kind: type[Any], nets: int = 1) -> Any:
    several = [controlnet(ControlNetUnionModel, xl_unet, seed, **UNION) for seed in range(4, 4 + nets)]
    return xl(kind, controlnet=several if nets > 1 else several[0])


def controlnet_xs(base: Callable[..., Any], of: Callable[..., Any], kind: type[Any]) -> Any:
    """ControlNet-XS knows two layers a block only."""
    two_layers = of(layers_per_block=2)
    torch.manual_seed(4)
    adapter = ControlNetXSAdapter.from_unet(two_layers, size_ratio=0.5, conditioning_embedding_out_channels=(16,))
    return base(kind, lambda: two_layers, controlnet=as_if_trained(adapter))


def t2i_adapter(*channels: int, **config: Any) -> T2IAdapter:
    torch.manual_seed(5)
    return T2IAdapter(channels=list(channels), num_res_blocks=1, **config).eval()


def t2i() -> Any:
    return sd(StableDiffusionAdapterPipeline, adapter=t2i_adapter(16, 32, downscale_factor=1))


def three_level_xl_unet() -> Any:
    """SDXL's T2I-Adapter has features for exactly three levels and the middle."""
    return xl_unet(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
    )


def xl_t2i() -> Any:
    adapter = t2i_adapter(16, 32, 32, 32, downscale_factor=2, adapter_type="full_adapter_xl")
    return quiet(StableDiffusionXLAdapterPipeline(**xl(unet=three_level_xl_unet).components, adapter=adapter))


def with_ip_adapters(build: Callable[[], Any], adapters: int = 1) -> Any:
    """Loads IP-Adapters as from a checkpoint, of four tokens an image."""
    pipe = build()
    torch.manual_seed(6)
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet) for _ in range(adapters)], low_cpu_mem_usage=False)
    return pipe


def ip_adapter(unet: Any) -> dict[str, Any]:
    width = TEXT[1]
    projection = {
        "proj.weight": torch.randn(4 * width, IMAGE_EMBEDDING),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    attentions = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    weights = {
        f"{2 * index + 1}.to_{kind}_ip.weight": torch.randn(unet.get_submodule(name).inner_dim, width) / 4
        for index, name in enumerate(attentions)
        for kind in "kv"
    }
    return {"image_proj": projection, "ip_adapter": weights}


def control() -> dict[str, Any]:
    return {"control_image": pixels(30)}


def two_controls(name: str = "control_image") -> dict[str, Any]:
    return {name: [pixels(30), pixels(31)], "controlnet_conditioning_scale": [0.8, 0.5]}


def embedded_images(adapters: int = 1, images: int = 1) -> dict[str, Any]:
    """For each adapter its images' embeddings, after those of the empty image."""
    return {"ip_adapter_image_embeds": [noise(2, images, IMAGE_EMBEDDING, seed=40 + n) for n in range(adapters)]}


def masked_images() -> dict[str, Any]:
    """One image for the left half and one for the right."""
    left = (torch.arange(8) < 4).float().expand(8, 8)
    masks = torch.stack([left, 1 - left])[None]
    return embedded_images(images=2) | {"cross_attention_kwargs": {"ip_adapter_masks": [masks]}}


MIDDLE_ONLY = {"control_guidance_start": 0.2, "control_guidance_end": 0.6}

sd_control = partial(controlled, sd, unet, StableDiffusionControlNetPipeline)
xl_control = partial(controlled, xl, xl_unet, StableDiffusionXLControlNetPipeline)

CONTROLNETS: dict[str, Case] = {
    "ControlNet": Case(sd_control, run_of(image)),
    "ControlNet, guess mode": Case(sd_control, run_of(image, guess_mode=True)),
    "ControlNet, only at some steps": Case(sd_control, run_of(image, **MIDDLE_ONLY)),
    "ControlNet, image to image": Case(
        partial(controlled, sd, unet, StableDiffusionControlNetImg2ImgPipeline),
        run_of(image, control, steps=10, strength=0.8),
    ),
    "ControlNet, inpaint, 4 channels": Case(
        partial(controlled, sd, unet, StableDiffusionControlNetInpaintPipeline), run_of(repaint, control)
    ),
    "ControlNet, inpaint, 9 channels": Case(
        partial(controlled, sd, partial(unet, in_channels=9), StableDiffusionControlNetInpaintPipeline),
        run_of(repaint, control),
    ),
    "ControlNet, two nets": Case(partial(sd_control, nets=2), run_of(partial(two_controls, "image"))),
    "ControlNet, two nets, each at some steps": Case(
        partial(sd_control, nets=2),
        run_of(partial(two_controls, "image"), control_guidance_start=[0.0, 0.3], control_guidance_end=[0.6, 1.0]),
    ),
    "ControlNet, perturbed-attention guidance": Case(
        partial(controlled, sd, unet, StableDiffusionControlNetPAGPipeline, pag_applied_layers="mid"),
        run_of(image, pag_scale=3.0),
    ),
    "ControlNet, inpaint, perturbed-attention guidance": Case(
        partial(controlled, sd, unet, StableDiffusionControlNetPAGInpaintPipeline, pag_applied_layers="mid"),
        run_of(repaint, control, pag_scale=3.0),
    ),
    "ControlNet, IP-Adapter": Case(partial(with_ip_adapters, sd_control), run_of(image, embedded_images)),
    "ControlNet for SDXL": Case(xl_control, run_of(pooled, image)),
    "ControlNet for SDXL, guess mode": Case(xl_control, run_of(pooled, image, guess_mode=True)),
    "ControlNet for SDXL, only at some steps": Case(xl_control, run_of(pooled, image, **MIDDLE_ONLY)),
    "ControlNet for SDXL, image to image": Case(
        partial(controlled, xl, xl_unet, StableDiffusionXLControlNetImg2ImgPipeline),
        run_of(pooled, image, control, steps=10, strength=0.8),
    ),
    "ControlNet for SDXL, inpaint": Case(
        partial(controlled, xl, xl_unet, StableDiffusionXLControlNetInpaintPipeline), run_of(pooled, repaint, control)
    ),
    "ControlNet for SDXL, two nets": Case(partial(xl_control, nets=2), run_of(pooled, partial(two_controls, "image"))),
    "ControlNet for SDXL, perturbed-attention guidance": Case(
        partial(controlled, xl, xl_unet, StableDiffusionXLControlNetPAGPipeline, pag_applied_layers="mid"),
        run_of(pooled, image, pag_scale=3.0),
    ),
    "ControlNet for SDXL, image to image, perturbed-attention guidance": Case(
        partial(controlled, xl, xl_unet, StableDiffusionXLControlNetPAGImg2ImgPipeline, pag_applied_layers="mid"),
        run_of(pooled, image, control, steps=10, strength=0.8, pag_scale=3.0),
    ),
    "ControlNet for SDXL, IP-Adapter": Case(
        partial(with_ip_adapters, xl_control), run_of(pooled, image, embedded_images)
    ),
    "ControlNet Union": Case(
        partial(union, StableDiffusionXLControlNetUnionPipeline), run_of(pooled, control, control_mode=3)
    ),
    "ControlNet Union, image to image": Case(
        partial(union, StableDiffusionXLControlNetUnionImg2ImgPipeline),
        run_of(pooled, image, control, control_mode=3, steps=10, strength=0.8),
    ),
    "ControlNet Union, inpaint": Case(
        partial(union, StableDiffusionXLControlNetUnionInpaintPipeline),
        run_of(pooled, repaint, control, control_mode=3),
    ),
    "ControlNet Union, two nets, only at some steps": Case(
        partial(union, StableDiffusionXLControlNetUnionPipeline, nets=2),
        run_of(pooled, two_controls, control_mode=[0, 3], **MIDDLE_ONLY),
    ),
}

ADAPTERS: dict[str, Case] = {
    "T2I-Adapter": Case(t2i, run_of(image)),
    "T2I-Adapter for SDXL": Case(xl_t2i, run_of(pooled, image)),
    "T2I-Adapter for SDXL, at the first half of the steps": Case(
        xl_t2i, run_of(pooled, image, steps=7, adapter_conditioning_factor=0.5)
    ),
    "IP-Adapter": Case(partial(with_ip_adapters, sd), run_of(embedded_images)),
    "IP-Adapter, two adapters": Case(partial(with_ip_adapters, sd, 2), run_of(partial(embedded_images, 2))),
    "IP-Adapter, two images with masks": Case(partial(with_ip_adapters, sd), run_of(masked_images)),
    "IP-Adapter for SDXL": Case(partial(with_ip_adapters, xl), run_of(pooled, embedded_images, **SIZE)),
    "IP-Adapter for SDXL, two adapters": Case(
        partial(with_ip_adapters, xl, 2), run_of(pooled, partial(embedded_images, 2), **SIZE)
    ),
    "IP-Adapter for SDXL, two images with masks": Case(
        partial(with_ip_adapters, xl), run_of(pooled, masked_images, **SIZE)
    ),
}

CASES = CONTROLNETS | ADAPTERS
CONTROLLED = frozenset(CONTROLNETS)
"""Cases whose pipeline calls a ControlNet beside the UNet."""

REFUSED: dict[str, Case] = {
    "ControlNet-XS": Case(partial(controlnet_xs, sd, unet, StableDiffusionControlNetXSPipeline), run_of(image)),
    "ControlNet-XS for SDXL": Case(
        partial(controlnet_xs, xl, xl_unet, StableDiffusionXLControlNetXSPipeline), run_of(pooled, image)
    ),
}
"""Cases whose UNet has no encoder of its own."""
