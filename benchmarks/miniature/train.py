"""Trains the miniature Stable Diffusion that ships with fdcompile, from the scene grammar and a seed.

    python benchmarks/miniature/train.py vae       --out build/miniature
    python benchmarks/miniature/train.py diffusion --out build/miniature
    python benchmarks/miniature/train.py checker   --out build/miniature
    python benchmarks/miniature/train.py package   --out build/miniature

Run `vae` first and `package` last. All stages read and write `--out`; only `package` writes into the package.
Takes about an hour and a half on two CPU cores, nearly all of it in `diffusion`. The shipped weights were made with the
default steps and seed; the model card has their results.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fdcompile.miniature import WEIGHTS
from fdcompile.miniature.checker import CHECKER_WEIGHTS, UNDEFINED, Checker, labels, normalize, read_scenes
from fdcompile.miniature.scenes import (
    COLORS,
    RELATIONS,
    SHAPES,
    SIZE,
    TEXTURES,
    draw,
    evaluation_scenes,
    parse_caption,
    sample_scene,
)

IMAGES = 60_000
LATENT_SIZE = SIZE // 2
LATENT_STD = 1.5  # of the UNet's input: 1 hides the layout for too long, much more reveals it at the last timestep
MAX_TOKENS = 16
TEXT_WIDTH = 64


def images(out: Path, seed: int) -> tuple[Tensor, list[str]]:
    """Draws or loads the training set: uint8 (N, 3, SIZE, SIZE) and captions, without the evaluation captions."""
    cache = out / f"images-{seed}.npz"
    if not cache.exists():
        rng = np.random.default_rng(seed)
        held_out = set(evaluation_scenes())
        scenes = [scene for scene in (sample_scene(rng) for _ in range(IMAGES)) if scene not in held_out]
        drawn = np.stack([draw(scene, rng) for scene in scenes])
        np.savez(cache, images=drawn, captions=[scene.caption for scene in scenes])
    data = np.load(cache)
    return torch.from_numpy(data["images"]).permute(0, 3, 1, 2), data["captions"].tolist()


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yields `steps` batches of indices below `count`, shuffled again every epoch."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = count // size
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(count, generator=generator)
        yield order[step % per_epoch * size :][:size]


def optimize(
    name: str,
    rates: dict[nn.Module, float],
    steps: int,
    backward: Callable[[], float],
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Runs AdamW with linear warm-up over a twentieth of the run and cosine decay to zero; prints mean loss and ETA.

    Args:
        name: name to print.
        rates: peak learning rate of each module.
        steps: number of optimizer steps.
        backward: adds the gradients of the next batch and returns its loss.
        after: called with the number of the step after each step.
    """
    groups = [{"params": list(module.parameters()), "lr": peak} for module, peak in rates.items()]
    weights = [weight for group in groups for weight in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    start = time.monotonic()
    recent: list[float] = []
    for step in range(1, steps + 1):
        optimizer.zero_grad(set_to_none=True)
        recent.append(backward())
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        after(step)
        if step % 50 == 0 or step == steps:
            left = (time.monotonic() - start) / step * (steps - step) / 60
            print(f"{name} {step}/{steps} loss {np.mean(recent):.5f}, {left:.1f} min left", flush=True)
            recent.clear()


def to_model(batch: Tensor) -> Tensor:
    """Converts uint8 images to the VAE's input: float32 in [-1, 1], channels last."""
    return (batch.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train_vae(out: Path, steps: int, batch: int, seed: int) -> None:
    """Trains an AutoencoderKL from (3, 32, 32) to (4, 16, 16), with latent channels whitened to mean 0 and std 1."""
    torch.manual_seed(seed)
    data, _ = images(out, seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(24, 48),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=LATENT_STD,
    ).to(memory_format=torch.channels_last)
    order = batches(len(data), batch, steps, seed)

    def backward() -> float:
        image = to_model(data[next(order)])
        posterior = vae.encode(image).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        loss = functional.mse_loss(rebuilt, image) + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        return loss.item()

    optimize("vae", {vae: 2e-3}, steps, backward)
    whiten(vae, data[:2048])
    rebuilt = rebuild(vae, data[-1024:])
    psnr = -10 * torch.log10(functional.mse_loss(rebuilt / 255, data[-1024:] / 255))
    print(f"vae: reconstruction {psnr:.1f} dB, {parameters(vae):.2f} M parameters")
    vae.save_pretrained(out / "vae")
    save_file({"latents": encode(vae, data).half().contiguous()}, out / "latents.safetensors")


@torch.no_grad()
def encode(vae: AutoencoderKL, data: Tensor) -> Tensor:
    """Returns the posterior means of uint8 images, unscaled: (N, 4, 16, 16)."""
    return torch.cat([vae.encode(to_model(part)).latent_dist.mean for part in data.split(256)])


@torch.no_grad()
def rebuild(vae: AutoencoderKL, data: Tensor) -> Tensor:
    """Encodes and decodes uint8 images; returns rounded float (N, 3, SIZE, SIZE) in [0, 255]."""
    rebuilt = torch.cat([vae.decode(part).sample for part in encode(vae, data).split(256)])
    return ((rebuilt + 1) * 127.5).round().clamp(0, 255)


@torch.no_grad()
def whiten(vae: AutoencoderKL, data: Tensor) -> None:
    """Folds the whitening of the latent channels to mean 0 and std 1 into the 1x1 convolutions around the latent."""
    latents = encode(vae, data)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into, out_of = vae.quant_conv, vae.post_quant_conv
    into.bias[:4] -= mean
    into.bias[4:] -= 2 * std.log()
    into.bias[:4] /= std
    into.weight[:4] /= std[:, None, None, None]
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean
    out_of.weight *= std[None, :, None, None]


def parameters(model: nn.Module) -> float:
    """Returns the number of parameters in millions."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def build_tokenizer(out: Path) -> CLIPTokenizer:
    """Builds CLIP's tokenizer with a byte-pair vocabulary in which every word of the grammar is one token."""
    words = sorted({"a", "on", "background", *COLORS, *SHAPES, *TEXTURES, *" ".join(RELATIONS).split()})
    folder = out / "bpe"
    if not folder.exists():  # ids differ between builds, and the text encoder must be trained with the shipped ones
        special = ["<|startoftext|>", "<|endoftext|>"]
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=special[1]))
        bpe.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(
            vocab_size=1000, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
        )
        bpe.train_from_iterator([" ".join(words + list(ascii_lowercase))] * 8, trainer)
        folder.mkdir(parents=True)
        bpe.model.save(str(folder))
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
    for word in words:
        if len(tokenizer.tokenize(word)) != 1:
            raise RuntimeError(f"{word!r} is not one token")
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """Builds a small UNet with SD 1.5's block types: three levels, transformers at the second and in the middle."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 96),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
    )


def build_scheduler() -> DDIMScheduler:
    """Builds a scheduler with Stable Diffusion 1.5's betas. Sampling starts at the last timestep, the noisiest one."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def train_diffusion(out: Path, steps: int, batch: int, seed: int) -> None:
    """Trains UNet and text encoder jointly: epsilon prediction, one caption in ten empty, weights averaged.

    Two threads process half a batch each, which is faster for such narrow layers than two threads in each operator.
    """
    torch.manual_seed(seed)
    _, captions = images(out, seed)
    latents = load_file(out / "latents.safetensors")["latents"]
    tokenizer = build_tokenizer(out)
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids
    scheduler = build_scheduler()
    model = nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)})
    model = model.to(memory_format=torch.channels_last)
    print(f"diffusion: {parameters(model['unet']):.2f} M + {parameters(model['text_encoder']):.2f} M parameters")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.996))
    order = batches(len(latents), batch, steps, seed)
    retained = scheduler.alphas_cumprod
    signal = retained / (1 - retained) * LATENT_STD**2
    weight = (1 + signal / 4).rsqrt()  # otherwise the nearly noiseless steps dominate, which determine only grain
    last = scheduler.config.num_train_timesteps - 1
    pool = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))

    def half(noisy: Tensor, times: Tensor, prompt: Tensor, noise: Tensor, importance: Tensor) -> float:
        predicted = model["unet"](noisy, times, model["text_encoder"](prompt)[0]).sample
        loss = (importance * (predicted - noise).square().mean((1, 2, 3))).mean() / 2
        loss.backward()
        return loss.item()

    def backward() -> float:
        chosen = next(order)
        clean = LATENT_STD * latents[chosen].float().contiguous(memory_format=torch.channels_last)
        prompt = torch.where(torch.rand(batch, 1) < 0.1, empty, tokens[chosen])
        noise = torch.randn_like(clean)
        times = (last * (1 - torch.rand(batch) ** 2)).long()  # dense at the timesteps where the text matters
        noisy = scheduler.add_noise(clean, noise, times)
        # The sampler starts from pure noise, but with these betas the last timestep still has a trace of the image.
        # Some samples start from pure noise, so that the model learns to use the text instead of the trace.
        start = torch.rand(batch) < 0.1
        times[start] = torch.randint(last - 50, last + 1, (int(start.sum()),))
        noisy[start] = torch.randn_like(noisy[start])
        kept, added = (share[times][:, None, None, None].sqrt() for share in (retained, 1 - retained))
        noise = torch.where(start[:, None, None, None], (noisy - kept * clean) / added, noise)
        importance = torch.where(start, 8.0, weight[times])
        return sum(pool.map(half, *(whole.chunk(2) for whole in (noisy, times, prompt, noise, importance))))

    def after(step: int) -> None:
        average.update_parameters(model)
        if step % 250 == 0 or step == steps:
            state = {name: value.contiguous() for name, value in average.module.state_dict().items()}
            save_file(state, out / "diffusion.safetensors")

    # At the UNet's rate the text encoder merges "striped" and "checked" before the UNet can draw either.
    optimize("diffusion", {model["unet"]: 1.4e-3, model["text_encoder"]: 2.8e-4}, steps, backward, after)


def train_checker(out: Path, steps: int, batch: int, seed: int) -> None:
    """Trains the checker on drawn images with some blur and noise, so that it judges content and not sharpness."""
    torch.manual_seed(seed)
    data, captions = images(out, seed)
    answers = torch.tensor([labels(parse_caption(caption)) for caption in captions])
    checker = Checker()
    held_out = 2048
    order = batches(len(data) - held_out, batch, steps, seed)

    def backward() -> float:
        chosen = next(order)
        image = normalize(data[chosen])
        soft = functional.avg_pool2d(functional.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        image = torch.lerp(image, soft, 0.5 * torch.rand(batch, 1, 1, 1))
        image = image + 0.15 * torch.rand(batch, 1, 1, 1) * torch.randn_like(image)
        questions = zip(checker.answers(image), answers[chosen].T, strict=True)
        losses = [functional.cross_entropy(logits, right, ignore_index=UNDEFINED) for logits, right in questions]
        loss = torch.stack(losses).sum()
        loss.backward()
        return loss.item()

    optimize("checker", {checker: 3e-3}, steps, backward)
    seen = read_scenes(data[-held_out:].permute(0, 2, 3, 1).numpy(), checker.eval())
    right = np.mean([scene.caption == caption for scene, caption in zip(seen, captions[-held_out:], strict=True)])
    print(f"checker: {right:.1%} of unseen images read without a mistake, {parameters(checker):.2f} M parameters")
    save_file(checker.state_dict(), out / "checker.safetensors")


def package(out: Path) -> None:
    """Writes all weights in half precision into the package's weights folder."""
    vae = AutoencoderKL.from_pretrained(out / "vae")
    tokenizer = build_tokenizer(out)
    model = nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)})
    model.load_state_dict(load_file(out / "diffusion.safetensors"))
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model["text_encoder"],
        tokenizer=tokenizer,
        unet=model["unet"],
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(WEIGHTS)
    for name in ("vocab.json", "merges.txt"):  # transformers before 5 reads these, from 5 on tokenizer.json
        shutil.copy(out / "bpe" / name, WEIGHTS / "tokenizer")
    checker = {name: value.half() for name, value in load_file(out / "checker.safetensors").items()}
    save_file(checker, CHECKER_WEIGHTS)
    size = sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file())
    print(f"package: {size / 1e6:.1f} MB in {WEIGHTS.name}/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "diffusion", "checker", "package"))
    parser.add_argument("--out", type=Path, required=True, help="folder for data, checkpoints and weights")
    parser.add_argument("--steps", type=int, help="optimizer steps instead of the stage's default")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "package":
        package(arguments.out)
        return
    train, steps, batch = {
        "vae": (train_vae, 2400, 16),
        "diffusion": (train_diffusion, 3600, 32),
        "checker": (train_checker, 1600, 64),
    }[arguments.stage]
    train(arguments.out, arguments.steps or steps, batch, arguments.seed)


if __name__ == "__main__":
    main()
