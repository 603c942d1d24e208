"""Small pipelines with random weights in the real architectures."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT = (7, 32)
"""Tokens and width of the text that the small UNets are conditioned on."""

TEXTS = {name: torch.zeros(1, *TEXT) for name in ("prompt_embeds", "negative_prompt_embeds")}
"""Of an empty prompt, for pipelines without a text encoder."""

BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}

THREE_LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32, 32),
}

FLAT = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
    "block_out_channels": (8,),
}
"""One level, no bottleneck, and attention in the encoder alone: most of what a capture takes is attention's."""


def small_unet(**overrides: Any) -> UNet2DConditionModel:
    """SD 1.5's block types at two levels, on 8x8 latents."""
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "cross_attention_dim": TEXT[1],
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        **BLOCKS,
        **overrides,
    }
    return UNet2DConditionModel(**config).eval()


def small_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()


def small_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT[1],
        intermediate_size=TEXT[1],
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def ddim() -> DDIMScheduler:
    """As in Stable Diffusion 1.5."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def small_pipe(kind: type[Any] = StableDiffusionPipeline) -> Any:
    """Stable Diffusion, text-to-image or another pipeline of the same parts; without text encoder."""
    pipe = kind(
        vae=small_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=small_unet(),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flat_pipe() -> Any:
    """Stable Diffusion with the least UNet that has all stages, for tests that compile, or capture very often."""
    pipe = small_pipe()
    pipe.register_modules(unet=small_unet(**FLAT))
    return pipe


class Float8Linear(nn.Module):
    """A linear layer as quantizers leave it: its weights in float8."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype), self.bias)


def lora(unet: nn.Module, seed: int, rank: int = 2, scale: float = 0.3) -> dict[str, Tensor]:
    """As in a checkpoint; strong enough to be seen, not so strong that attention amplifies rounding."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    weights = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            path = f"unet.{name}"
            weights[f"{path}.lora_A.weight"] = noise(rank, module.in_features)
            weights[f"{path}.lora_B.weight"] = noise(module.out_features, rank)
    return weights


def small_xl_pipe() -> StableDiffusionXLPipeline:
    """SDXL on two levels: linear projections, deeper transformers at the bottom, added text and size conditions."""
    unet = small_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT[1],
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    pipe = StableDiffusionXLPipeline(
        vae=small_vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(ddim().config),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, steps: int = 10, batch: int = 1, guidance: float = 5.0, seed: int = 0, **kwargs: Any) -> Tensor:
    """Final latents of a run with fixed prompts and noise."""
    text = torch.randn(2, batch, *TEXT, generator=torch.Generator().manual_seed(100 + seed))
    arguments = {
        "prompt_embeds": text[0],
        "negative_prompt_embeds": text[1],
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        **kwargs,
    }
    if isinstance(pipe, StableDiffusionXLPipeline):
        arguments |= {"pooled_prompt_embeds": text[0, :, 0], "negative_pooled_prompt_embeds": text[1, :, 0]}
        arguments |= {"height": 8, "width": 8}
    if isinstance(pipe, StableDiffusionImg2ImgPipeline):
        arguments |= {"image": torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(200 + seed))}
    latents: Tensor = pipe(**arguments).images
    return latents


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-4 of the largest value, fp32."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
