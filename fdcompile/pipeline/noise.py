"""Prior noise injection (paper, Sec. 3.3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fdcompile.config import Config, NoiseInjection
from fdcompile.runtime.executor import Executor
from fdcompile.runtime.run import Run


class PriorNoise:
    """Adds a share of a run's initial latent ``z_T`` to its latents once the run is past `tau`.

    It intercepts every ``scheduler.step`` and passes a new tensor; the caller's is not changed. With
    `text_to_image_only` it skips runs that start late in the schedule or reuse no step.
    """

    def __init__(self, setting: NoiseInjection, executor: Executor, text_to_image_only: bool) -> None:
        self._setting = setting
        self._executor = executor
        self._text_to_image_only = text_to_image_only
        self._generation: int | None = None
        self._initial: Tensor | None = None
        self._fractions: list[float] = []

    def inject(self, sample: Tensor, scheduler: Any) -> Tensor:
        """Returns ``z_t + alpha * z_T`` where noise is injected, else `sample`."""
        position = self._executor.clock.position
        run = self._executor.run
        if position is None or run is None:
            return sample
        if position.generation != self._generation:
            self._generation = position.generation
            self._initial = sample.clone()
            trained = scheduler.config.num_train_timesteps
            self._fractions = [t / trained for t in run.caller.values(run.timesteps)]
        assert self._initial is not None
        if self._initial.shape != sample.shape or not self._applies(run):
            return sample
        if self._fractions[position.step] >= self._setting.tau:
            return sample
        return sample + self._setting.alpha * self._initial

    def _applies(self, run: Run) -> bool:
        if not self._text_to_image_only:
            return True
        return run.record.start == 0 and len(run.key_steps) < run.record.num_steps


def prior_noise(config: Config, executor: Executor, pipe: Any) -> PriorNoise | None:
    """The noise injection that `config` sets for runs of `pipe`; None if there is none."""
    if config.noise_injection is None:
        return None
    if isinstance(config.noise_injection, NoiseInjection):
        return PriorNoise(config.noise_injection, executor, text_to_image_only=False)
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING  # imports every such pipeline

    latent_text_to_image = type(pipe) in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values() and hasattr(pipe, "vae")
    return PriorNoise(NoiseInjection(), executor, text_to_image_only=True) if latent_text_to_image else None
