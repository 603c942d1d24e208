"""Makes the call arguments of a command from its options."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdcompile.cli.errors import UserError
from fdcompile.cli.options import ModelOptions, SamplingOptions, read_lines
from fdcompile.miniature import GUIDANCE

if TYPE_CHECKING:
    from fdcompile.config import Config

MINIATURE_SCENES = 8
"""Default number of scenes for the miniature, the first ones that it was not trained on."""

DEFAULT_PROMPT = "a photograph of an astronaut riding a horse"

MAX_PROMPTS = 16
"""Largest number of prompts, sampled in one batch; diffusers' upsampler branches at larger batches."""


@dataclass(frozen=True)
class Sampling:
    """Arguments of a pipeline call.

    Attributes:
        prompts: one image each.
        steps: sampling steps.
        guidance: guidance scale; None for the pipeline's default.
        seed: image ``i`` starts from noise of seed ``seed + i``, whatever the batch.
    """

    prompts: tuple[str, ...]
    steps: int = 50
    guidance: float | None = None
    seed: int = 0

    def common(self) -> dict[str, Any]:
        """Returns the arguments of every call."""
        return call_arguments(self.steps, self.guidance)

    def call(self) -> dict[str, Any]:
        """Returns the keyword arguments of the pipeline, with new generators."""
        from fdcompile.measure.calls import seeded

        return seeded(self.prompts, self.seed, **self.common())


def call_arguments(
    steps: int, guidance: float | None, height: int | None = None, width: int | None = None
) -> dict[str, Any]:
    """Returns the arguments of every call, without those that are None."""
    given = {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width}
    return {name: value for name, value in given.items() if value is not None}


def ask(loading: ModelOptions, asking: SamplingOptions) -> Sampling:
    """Makes the call of these options, with defaults that suit the model.

    Raises:
        UserError: there are too many prompts.
    """
    from fdcompile.miniature.scenes import evaluation_scenes

    prompts = asking.prompts
    if prompts and len(prompts) > MAX_PROMPTS:
        raise UserError(f"{len(prompts)} prompts: one batch holds at most {MAX_PROMPTS}")
    if not prompts and loading.model is None:
        prompts = [scene.caption for scene in evaluation_scenes(MINIATURE_SCENES)]
    chosen = tuple(prompts or (DEFAULT_PROMPT,))
    return Sampling(chosen, asking.steps, suited_guidance(loading, asking.guidance), asking.seed)


def suited_guidance(loading: ModelOptions, guidance: float | None) -> float | None:
    """Returns the guidance scale, by default the miniature's own or None for other models."""
    return GUIDANCE if guidance is None and loading.model is None else guidance


def asked_prompts(loading: ModelOptions, prompts: Path | None, captions: Sequence[str]) -> list[str]:
    """Reads prompts from a file; returns `captions` for the miniature by default.

    Raises:
        UserError: no file is given for a model other than the miniature.
    """
    if loading.model is not None and prompts is None:
        raise UserError("--prompts is required with --model")
    return read_lines(prompts) if prompts else list(captions)


def check_takes_prompt(pipe: Any) -> None:
    """Checks that the pipeline takes a prompt.

    Raises:
        UserError: it does not.
    """
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise UserError(f"{type(pipe).__name__} takes no prompt")


def headline(pipe: Any, config: Config, sampling: Sampling) -> str:
    """Describes pipeline, sampler, steps, images, key steps and cut of a run in two lines.

    Uses the current schedule of `pipe`, so call it before anything else is sampled.
    """
    from fdcompile.runtime.forecast import key_steps_of  # loads diffusers

    count = len(sampling.prompts)
    key_steps = key_steps_of(config, pipe.scheduler)
    return (
        f"{type(pipe).__name__}, {type(pipe.scheduler).__name__}, {sampling.steps} steps, "
        f"{count} {'image' if count == 1 else 'images'}, seed {sampling.seed}\n"
        f"key steps {' '.join(map(str, key_steps))}; recompute: {', '.join(config.recompute) or 'nothing'}"
    )
