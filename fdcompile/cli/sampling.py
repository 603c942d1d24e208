"""What a pipeline is asked for, and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import fdcompile
from fdcompile.cli.errors import UserError, blame_user
from fdcompile.cli.loading import check_takes_prompt, load_pipe, make_config

if TYPE_CHECKING:
    from fdcompile.cli.options import Cut
    from fdcompile.config import Config
    from fdcompile.measure.metrics import Pictures
    from fdcompile.miniature.scenes import Scene

MINIATURE_GUIDANCE = 3.0
"""The guidance scale that the miniature's model card recommends."""

MINIATURE_SCENES = 8
"""Scenes that the miniature is asked for by default, the first of those it was not trained on."""

DEFAULT_PROMPT = "a photograph of an astronaut riding a horse"

MAX_PROMPTS = 16
"""All prompts are sampled in one batch; this many keep it below the batch at which diffusers' upsampler branches."""


@dataclass(frozen=True)
class Sampling:
    """What a pipeline is asked for.

    Attributes:
        prompts: one picture each.
        steps: sampling steps.
        guidance: guidance scale; None leaves it to the pipeline.
        seed: picture ``i`` starts from noise of seed ``seed + i``, whatever the batch.
    """

    prompts: tuple[str, ...]
    steps: int = 50
    guidance: float | None = None
    seed: int = 0

    def call(self) -> dict[str, Any]:
        """As keyword arguments of a pipeline, with new generators."""
        import torch

        seeds = range(self.seed, self.seed + len(self.prompts))
        guidance = {} if self.guidance is None else {"guidance_scale": self.guidance}
        return {
            "prompt": list(self.prompts),
            "num_inference_steps": self.steps,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            **guidance,
        }


def sample(pipe: Any, sampling: Sampling) -> Pictures:
    """Calls `pipe` once for all prompts and returns its pictures."""
    output = pipe(**sampling.call())
    return np.stack([np.asarray(image.convert("RGB")) for image in output.images])


def ask(model: str | None, prompts: Sequence[str] | None, steps: int, guidance: float | None, seed: int) -> Sampling:
    """What to ask `model` for, with what suits it where nothing was chosen.

    Raises:
        UserError: there are too many prompts.
    """
    from fdcompile.miniature.scenes import evaluation_scenes

    if prompts and len(prompts) > MAX_PROMPTS:
        raise UserError(f"{len(prompts)} prompts: one batch holds at most {MAX_PROMPTS}")
    if model is not None:
        return Sampling(tuple(prompts or (DEFAULT_PROMPT,)), steps, guidance, seed)
    captions = [scene.caption for scene in evaluation_scenes(MINIATURE_SCENES)]
    return Sampling(tuple(prompts or captions), steps, MINIATURE_GUIDANCE if guidance is None else guidance, seed)


def prepare(model: str | None, sampling: Sampling, recompute: Cut, **options: Any) -> tuple[Any, Config]:
    """`model` as a stock pipeline, and the configuration of these `options`, found fit for `sampling`.

    Raises:
        UserError: the model cannot be loaded, optimised like this, or asked for that.
    """
    _check_reached(options["key_steps"], sampling.steps)
    pipe = load_pipe(model)
    with blame_user(TypeError, ValueError):
        config = make_config(pipe, recompute, **options)
        fdcompile.restore(fdcompile.optimize(pipe, config))
        pipe.scheduler.set_timesteps(sampling.steps)
    check_takes_prompt(pipe)
    return pipe, config


def known_scenes(prompts: tuple[str, ...]) -> list[Scene] | None:
    """What the miniature's pictures must show, or None if a prompt is not a caption of its grammar."""
    from fdcompile.miniature.scenes import parse_caption

    try:
        return [parse_caption(prompt) for prompt in prompts]
    except ValueError:
        return None


def _check_reached(key_steps: Any, steps: int) -> None:
    if isinstance(key_steps, tuple) and key_steps[-1] >= steps:
        raise UserError(
            f"key_steps={list(key_steps)}: step {key_steps[-1]} is out of range, {steps} steps are 0 to {steps - 1}"
        )


def headline(pipe: Any, config: Config, sampling: Sampling) -> str:
    """Pipeline, sampler, steps, pictures, key steps and cut of a run, in two lines."""
    count = len(sampling.prompts)
    key_steps = config.key_steps_of(pipe.scheduler.timesteps.tolist())
    return (
        f"{type(pipe).__name__}, {type(pipe.scheduler).__name__}, {sampling.steps} steps, "
        f"{count} {'picture' if count == 1 else 'pictures'}, seed {sampling.seed}\n"
        f"key steps {' '.join(map(str, key_steps))}; recompute: {', '.join(config.recompute)}"
    )
