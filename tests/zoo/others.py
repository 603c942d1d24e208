"""Pipelines whose UNet is not Stable Diffusion's: pixel diffusion, Kandinsky, audio, unconditional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import video
from case import Case
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2UNet2DConditionModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    IFImg2ImgPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22Pipeline,
    LDMPipeline,
    LDMSuperResolutionPipeline,
    LDMTextToImagePipeline,
    MarigoldDepthPipeline,
    PaintByExamplePipeline,
    StableUnCLIPImg2ImgPipeline,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from models import TEXT, ddim, small_vae
from parts import arguments, guided, image, image_encoder, image_processor, miniature, noise, quiet, with_text
from stable_diffusion import unet as two_levels
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

PIXEL_BLOCKS = {
    "out_channels": 6,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "scale_shift",
}
"""As in DeepFloyd IF and Kandinsky 2: a predicted variance, and attention to the text and the image in one."""


def deepfloyd(kind: type[Any] = IFPipeline, solver: bool = False, **overrides: Any) -> Any:
    config = {
        "in_channels": 3,
        "act_fn": "gelu",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
        "cross_attention_norm": "group_norm",
        "encoder_hid_dim": TEXT[1],
        "encoder_hid_dim_type": "text_proj",
        "resnet_skip_time_act": True,
        "time_embedding_act_fn": "gelu",
    }
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, sample_max_value=1.5, variance_type="learned_range"
    )
    parts = {"image_noising_scheduler": scheduler} if kind is IFSuperResolutionPipeline else {}
    if solver:
        scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
    pipe = kind(
        tokenizer=None,
        text_encoder=None,
        unet=two_levels(**PIXEL_BLOCKS | config | overrides),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
        **parts,
    )
    return quiet(pipe)


def vq_model(channels: int = 4) -> VQModel:
    torch.manual_seed(1)
    model = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, num_vq_embeddings=64)
    torch.nn.init.normal_(model.quantize.embedding.weight, std=10)  # as far apart as random UNets' latents
    return model.eval()


def kandinsky2(kind: type[Any] = KandinskyV22Pipeline) -> Any:
    unet = two_levels(
        **PIXEL_BLOCKS | {"out_channels": 8},
        addition_embed_type="image",
        encoder_hid_dim=TEXT[1],
        encoder_hid_dim_type="image_proj",
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        thresholding=True,
        sample_max_value=2.0,
        variance_type="learned_range",
    )
    return quiet(kind(unet=unet, scheduler=scheduler, movq=vq_model()))


def by_image(**more: Any) -> Callable[[], dict[str, Any]]:
    embeds = {"image_embeds": noise(1, TEXT[1], seed=1), "negative_image_embeds": noise(1, TEXT[1], seed=2)}
    return arguments(**embeds, height=8, width=8, output_type="latent", **more)


def kandinsky3() -> Any:
    torch.manual_seed(0)
    unet = Kandinsky3UNet(
        time_embedding_dim=32,
        groups=4,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(16, 16, 16, 16),  # four, because cross-attention is wired for four levels
        cross_attention_dim=TEXT[1],
        encoder_hid_dim=TEXT[1],
    )
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False)
    pipe = Kandinsky3Pipeline(tokenizer=None, text_encoder=None, unet=unet.eval(), scheduler=scheduler, movq=vq_model())
    return quiet(pipe)


MASKS = {
    "attention_mask": torch.ones(1, TEXT[0], dtype=torch.int64),
    "negative_attention_mask": (torch.arange(TEXT[0]) < 3).long()[None],
}


def marigold() -> Any:
    unet = two_levels(in_channels=8, cross_attention_dim=miniature().text_encoder.config.hidden_size)
    pipe = MarigoldDepthPipeline(
        unet=unet,
        vae=small_vae(),
        scheduler=DDIMScheduler.from_config(ddim().config, prediction_type="v_prediction"),
        text_encoder=miniature().text_encoder,
        tokenizer=miniature().tokenizer,
        prediction_type="depth",
    )
    return quiet(pipe)


def audio() -> Any:
    torch.manual_seed(0)
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, *TEXT[1:], 24), (None, *TEXT[1:], 24)),
        attention_head_dim=4,
        norm_num_groups=8,
    )
    t5 = T5Config(vocab_size=8, d_model=24, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    pipe = AudioLDM2Pipeline(
        vae=small_vae(),
        text_encoder=None,
        text_encoder_2=T5EncoderModel(t5).eval(),
        projection_model=None,
        language_model=GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=TEXT[1], n_layer=1, n_head=1)).eval(),
        tokenizer=None,
        tokenizer_2=None,
        feature_extractor=None,
        unet=unet.eval(),
        scheduler=ddim(),
        vocoder=SpeechT5HifiGan(SpeechT5HifiGanConfig(model_in_dim=8, upsample_initial_channel=16)).eval(),
    )
    return quiet(pipe)


AUDIO_TEXT = {
    "prompt_embeds": noise(1, TEXT[0], 24, seed=1),
    "negative_prompt_embeds": noise(1, TEXT[0], 24, seed=2),
    "generated_prompt_embeds": noise(1, 4, TEXT[1], seed=3),
    "negative_generated_prompt_embeds": noise(1, 4, TEXT[1], seed=4),
    **MASKS,
}


def unconditional_unet(**overrides: Any) -> UNet2DModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        **overrides,
    }
    return UNet2DModel(**config).eval()


def latent_text_to_image() -> Any:
    torch.manual_seed(2)
    config = LDMBertConfig(
        vocab_size=len(miniature().tokenizer),
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=TEXT[1],
    )
    pipe = LDMTextToImagePipeline(
        vqvae=small_vae(),
        bert=LDMBertModel(config).eval(),
        tokenizer=miniature().tokenizer,
        unet=two_levels(),
        scheduler=ddim(),
    )
    return quiet(pipe)


def stable_unclip() -> Any:
    return with_text(
        StableUnCLIPImg2ImgPipeline,
        unet=two_levels(class_embed_type="projection", projection_class_embeddings_input_dim=2 * TEXT[1]),
        feature_extractor=image_processor(),
        image_encoder=image_encoder(),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=TEXT[1]),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )


def paint_by_example() -> Any:
    pipe = PaintByExamplePipeline(
        vae=small_vae(),
        image_encoder=image_encoder(PaintByExampleImageEncoder),
        unet=two_levels(in_channels=9),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=image_processor(),
    )
    return quiet(pipe)


CASES = {
    "DeepFloyd IF, stage 1": Case(deepfloyd, guided(output_type="pt")),
    "DeepFloyd IF, stage 1, DPM-Solver++": Case(lambda: deepfloyd(solver=True), guided(output_type="pt")),
    "DeepFloyd IF, stage 2": Case(
        lambda: deepfloyd(IFSuperResolutionPipeline, in_channels=6, class_embed_type="timestep"),
        guided(output_type="pt", image=image(size=4), noise_level=250),
    ),
    "DeepFloyd IF, img2img": Case(
        lambda: deepfloyd(IFImg2ImgPipeline),
        guided(output_type="pt", image=image(), num_inference_steps=12, strength=0.7),
    ),
    **video.CASES,
    "Kandinsky 2.2": Case(kandinsky2, by_image()),
    "Kandinsky 2.2, img2img": Case(
        lambda: kandinsky2(KandinskyV22Img2ImgPipeline),
        by_image(image=image(size=8), num_inference_steps=12, strength=0.7),
    ),
    "Kandinsky 3": Case(kandinsky3, guided(height=64, width=64, output_type="latent", **MASKS)),
    "Marigold depth": Case(
        marigold,
        arguments(image=image(), processing_resolution=0, output_type="pt", output_latent=True),
        output=lambda result: result[2],
    ),
    "AudioLDM 2": Case(audio, arguments(**AUDIO_TEXT, output_type="latent", guidance_scale=3.5)),
    "DDPM, unconditional": Case(
        lambda: quiet(DDPMPipeline(unconditional_unet(), DDPMScheduler())), arguments(output_type="pt")
    ),
    "DDIM, unconditional": Case(
        lambda: quiet(DDIMPipeline(unconditional_unet(), DDIMScheduler())), arguments(output_type="pt")
    ),
    "Latent diffusion, unconditional": Case(
        lambda: quiet(LDMPipeline(vq_model(3), unconditional_unet(), ddim())), arguments(output_type="np")
    ),
    "Latent diffusion, super-resolution": Case(
        lambda: quiet(
            LDMSuperResolutionPipeline(vq_model(3), unconditional_unet(in_channels=6, out_channels=3), ddim())
        ),
        arguments(output_type="pt", image=image()),
    ),
    "Latent diffusion, text-to-image": Case(
        latent_text_to_image,
        arguments(output_type="np", prompt="a red circle", guidance_scale=5.0, height=64, width=64),
    ),
    "Stable unCLIP": Case(stable_unclip, guided(output_type="latent", image_embeds=noise(1, TEXT[1], seed=3))),
    "Paint by Example": Case(
        paint_by_example,
        arguments(
            output_type="latent",
            example_image=image(),
            image=2 * image() - 1,
            mask_image=(image(1) > 0.5).float(),
        ),
    ),
}
