"""Pipelines that make videos."""

from __future__ import annotations

from typing import Any

import torch
from case import Case
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    I2VGenXLPipeline,
    I2VGenXLUNet,
    MotionAdapter,
    StableVideoDiffusionPipeline,
    TextToVideoSDPipeline,
    TextToVideoZeroPipeline,
    TextToVideoZeroSDXLPipeline,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from models import TEXT, ddim, small_vae, small_xl_pipe
from parts import arguments, guided, image, image_encoder, image_processor, miniature, noise, quiet, with_text
from stable_diffusion import unet as two_levels

FRAMES = 3

BLOCKS_3D = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT[1],
    "attention_head_dim": 4,
}


def text_to_video() -> Any:
    torch.manual_seed(0)
    return with_text(TextToVideoSDPipeline, unet=UNet3DConditionModel(**BLOCKS_3D).eval())


def animate() -> Any:
    torch.manual_seed(3)
    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=8,
    )
    return with_text(AnimateDiffPipeline, unet=two_levels(), motion_adapter=adapter.eval())


def image_to_video() -> Any:
    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),  # normalization has 32 groups
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=3 * 8,
        layers_per_block=1,
        cross_attention_dim=TEXT[1],
        num_attention_heads=(2, 4),
        num_frames=FRAMES,
    )
    torch.manual_seed(1)
    pipe = StableVideoDiffusionPipeline(
        vae=AutoencoderKLTemporalDecoder(block_out_channels=(32,)).eval(),
        image_encoder=image_encoder(),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
        ),
        feature_extractor=image_processor(),
    )
    return quiet(pipe)


def image_and_text_to_video() -> Any:
    torch.manual_seed(0)
    unet = I2VGenXLUNet(**BLOCKS_3D).eval()
    parts = {"image_encoder": image_encoder(), "feature_extractor": image_processor()}
    return with_text(I2VGenXLPipeline, unet=unet, **parts)


def text_to_video_zero() -> Any:
    unet = two_levels(cross_attention_dim=miniature().text_encoder.config.hidden_size)
    pipe = TextToVideoZeroPipeline(
        vae=small_vae(),
        text_encoder=miniature().text_encoder,
        tokenizer=miniature().tokenizer,
        unet=unet,
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return quiet(pipe)


def text_to_video_zero_xl() -> Any:
    return quiet(TextToVideoZeroSDXLPipeline(**small_xl_pipe().components, add_watermarker=False))


ZERO = {"num_inference_steps": 10, "t0": 5, "t1": 7, "video_length": FRAMES, "output_type": "latent"}
"""Two steps and two more for the first frame, then eight for all frames, on a copy of the scheduler and from its third
step on: that is the run that is reported."""


CASES = {
    "AnimateDiff": Case(animate, guided(output_type="latent", num_frames=FRAMES, height=8, width=8)),
    "Stable Video Diffusion": Case(
        image_to_video,
        arguments(output_type="latent", image=image(), height=8, width=8, num_frames=FRAMES, max_guidance_scale=3.0),
        output=torch.as_tensor,
    ),
    "Text-to-video, 3D UNet": Case(text_to_video, guided(output_type="latent", num_frames=FRAMES, height=8, width=8)),
    "I2VGen-XL": Case(
        image_and_text_to_video,
        guided(output_type="latent", image=image(), num_frames=FRAMES, height=8, width=8),
    ),
    "Text2Video-Zero": Case(
        text_to_video_zero,
        arguments(prompt="a red circle", height=8, width=8, **ZERO),
    ),
    "Text2Video-Zero, SDXL": Case(
        text_to_video_zero_xl,
        guided(
            prompt=None,
            pooled_prompt_embeds=noise(1, TEXT[1], seed=3),
            negative_pooled_prompt_embeds=noise(1, TEXT[1], seed=4),
            height=8,
            width=8,
            **ZERO,
        ),
    ),
}
