"""Makes the pipeline, the configuration and the call arguments of a command."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fdcompile
from fdcompile.cli.errors import UserError, blame_user
from fdcompile.cli.options import CHECKPOINTS, PLANNED_WORK, Asking, Choosing, Cut, Loading, Running, read_lines
from fdcompile.cli.progress import tell
from fdcompile.miniature import GUIDANCE

if TYPE_CHECKING:
    import torch

    from fdcompile.config import Config
    from fdcompile.miniature.scenes import Scene
    from fdcompile.planning.plan import Plan, Point

MINIATURE_SCENES = 8
"""Default number of scenes for the miniature, the first ones that it was not trained on."""

DEFAULT_PROMPT = "a photograph of an astronaut riding a horse"

MAX_PROMPTS = 16
"""Largest number of prompts, sampled in one batch; diffusers' upsampler branches at larger batches."""


_ALIKE = 0.75
"""Least similarity of names to be suggested, from 0 to 1."""


def load_pipe(loading: Loading, device: torch.device | None = None) -> Any:
    """Loads the pipeline of these options, by default the miniature, on `device` or the best available device.

    Raises:
        UserError: the pipeline cannot be loaded, or diffusers has no such scheduler.
    """
    import diffusers
    import torch
    import transformers

    scheduler = None if loading.scheduler is None else scheduler_class(loading.scheduler)
    name = loading.model or "the miniature"
    tell(f"loading {name}")
    for library in (diffusers, transformers):
        library.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    dtype = None if loading.precision is None else getattr(torch, loading.precision)
    try:
        if loading.model is None:
            pipe: Any = fdcompile.load_miniature(dtype)
        else:
            pipe = _read(loading, dtype or (torch.float16 if cuda else torch.float32))
        if loading.lora is not None:
            if not hasattr(pipe, "load_lora_weights"):
                raise ValueError(f"{type(pipe).__name__} takes no LoRA")
            pipe.load_lora_weights(loading.lora)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load {name}: {error}") from error
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(leave=False, disable=None)  # only on a terminal
    return pipe.to(device or ("cuda" if cuda else "cpu"))


def _read(loading: Loading, dtype: torch.dtype) -> Any:
    import diffusers

    model = loading.model or ""
    if Path(model).suffix in CHECKPOINTS:
        from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint

        is_xl = infer_diffusers_model_type(load_single_file_checkpoint(model)).startswith("xl_")
        kind = diffusers.StableDiffusionXLPipeline if is_xl else diffusers.StableDiffusionPipeline
        return kind.from_single_file(model, torch_dtype=dtype)
    options = {} if loading.variant is None else {"variant": loading.variant}
    return diffusers.DiffusionPipeline.from_pretrained(model, dtype=dtype, use_safetensors=True, **options)


def scheduler_class(name: str) -> Any:
    """Returns the scheduler class of diffusers with the given name.

    Raises:
        UserError: there is no such class; the message suggests similar names.
    """
    import diffusers

    known = [other for other in dir(diffusers) if other.endswith("Scheduler") and not other.startswith("Flax")]
    if name not in known:
        alike = sorted((other for other in known if name.lower() in other.lower()), key=len)[:3]
        alike = alike or _alike(name, known)
        also = f", did you mean {' or '.join(alike)}?" if alike else ", expected one like DDIMScheduler"
        raise UserError(f"--scheduler {name}: diffusers has none of that name{also}")
    return getattr(diffusers, name)


def _alike(name: str, known: Sequence[str]) -> list[str]:
    """Returns names in `known` that are similar to `name`, or begin similarly."""

    def likeness(other: str) -> float:
        beginning = other.lower()[: len(name) + 1]
        return max(difflib.SequenceMatcher(None, name.lower(), text).ratio() for text in (other.lower(), beginning))

    alike = sorted(known, key=lambda other: (-likeness(other), len(other)))
    return [other for other in alike if likeness(other) >= _ALIKE][:3]


def choose_config(pipe: Any, choosing: Choosing, steps: int | None = None, guidance: float | None = None) -> Config:
    """Makes the configuration of these options. A plan replaces key steps, cut and forecast.

    Options that are None have their defaults.

    Raises:
        UserError: an option is invalid, or the plan is not for `pipe`, `steps` and `guidance`.
    """
    levels = len(getattr(getattr(pipe, "unet", None), "up_blocks", ()))
    cuts: dict[Cut | None, tuple[str, ...] | None] = {
        None: None,
        "output": (),
        "encoder-propagation": fdcompile.DECODER,
        "partial-encoder": fdcompile.PARTIAL_ENCODER,
        "deep-feature-caching": fdcompile.deep_feature_caching(levels),
    }
    options: dict[str, Any] = {"recompute": cuts[choosing.recompute], "key_steps": choosing.key_steps}
    if choosing.plan is None:
        options["work"] = choosing.work
    if isinstance(choosing, Running):
        options |= {"max_parallel_steps": choosing.max_parallel_steps, "backend": choosing.backend}
    with blame_user(ValueError):
        config = fdcompile.Config(**{name: value for name, value in options.items() if value is not None})
    if choosing.plan is None:
        return config
    work = choosing.work or PLANNED_WORK
    plan, point = read_plan(choosing.plan, pipe, work, steps, guidance, strict=choosing.strict)
    return replace(plan.configured(point), max_parallel_steps=config.max_parallel_steps, backend=config.backend)


def check_choice(choosing: Choosing, steps: int | None = None) -> None:
    """Checks that the options do not contradict each other, before anything is loaded.

    Raises:
        UserError: key steps are given in addition to a plan's, or are not among `steps`; or the plan cannot be read.
    """
    key_steps = choosing.key_steps
    if choosing.plan is not None:
        if key_steps is not None:
            raise UserError("--plan has key steps of its own: leave --key-steps out")
        with blame_user(ValueError, OSError):
            fdcompile.Plan.load(choosing.plan)
    if steps is not None and isinstance(key_steps, tuple) and key_steps[-1] >= steps:
        raise UserError(
            f"key_steps={list(key_steps)}: step {key_steps[-1]} is out of range, {steps} steps are 0 to {steps - 1}"
        )


def read_plan(
    path: Path,
    pipe: Any,
    work: float,
    steps: int | None = None,
    guidance: float | None = None,
    *,
    strict: bool = False,
) -> tuple[Plan, Point]:
    """Reads a plan and returns it with its point for `work`.

    Raises:
        UserError: the plan cannot be read or has no point for `work`; or, if `strict`, was made for another pipeline, a
            schedule other than that of `steps` steps, or another guidance scale.
    """
    with blame_user(ValueError, OSError):
        plan = fdcompile.Plan.load(path)
        if strict:
            plan.check(pipe)
        point = plan.point(work=work)
    if not strict or steps is None:
        return plan, point
    pipe.scheduler.set_timesteps(steps)
    config = plan.configured(point)
    if config.plans and config.plan_for(pipe.scheduler.timesteps.tolist()) is None:
        raise UserError(f"{path} is for {len(plan.timesteps)} steps, and not for those of --steps {steps}")
    default = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
    scale = default.default if guidance is None and default is not None else guidance
    if plan.guidance is not None and scale is not None and not plan.guidance[0] <= scale <= plan.guidance[1]:
        low, high = plan.guidance
        planned = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        raise UserError(f"{path} is for guidance {planned}, and not for {scale:g}")
    return plan, point


def check_takes_prompt(pipe: Any) -> None:
    """Checks that the pipeline takes a prompt.

    Raises:
        UserError: it does not.
    """
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise UserError(f"{type(pipe).__name__} takes no prompt")


@dataclass(frozen=True)
class Sampling:
    """Arguments of a pipeline call.

    Attributes:
        prompts: one picture each.
        steps: sampling steps.
        guidance: guidance scale; None for the pipeline's default.
        seed: picture ``i`` starts from noise of seed ``seed + i``, whatever the batch.
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


def ask(loading: Loading, asking: Asking) -> Sampling:
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


def suited_guidance(loading: Loading, guidance: float | None) -> float | None:
    """Returns the guidance scale, by default the miniature's own or None for other models."""
    return GUIDANCE if guidance is None and loading.model is None else guidance


def asked_prompts(loading: Loading, prompts: Path | None, captions: Sequence[str]) -> list[str]:
    """Reads prompts from a file; returns `captions` for the miniature by default.

    Raises:
        UserError: no file is given for a model other than the miniature.
    """
    if loading.model is not None and prompts is None:
        raise UserError("--prompts is required with --model")
    return read_lines(prompts) if prompts else list(captions)


def prepare(loading: Loading, sampling: Sampling, choosing: Choosing) -> tuple[Any, Config]:
    """Loads a stock pipeline, and makes the configuration of these options; checks them with `sampling`.

    Raises:
        UserError: the model cannot be loaded or optimized, or the call is invalid.
    """
    check_choice(choosing, sampling.steps)
    pipe = load_pipe(loading)
    check_takes_prompt(pipe)
    with blame_user(TypeError, ValueError):
        config = choose_config(pipe, choosing, sampling.steps, sampling.guidance)
        fdcompile.restore(fdcompile.optimize(pipe, config))
        pipe.scheduler.set_timesteps(sampling.steps)
    return pipe, config


def known_scenes(loading: Loading, prompts: tuple[str, ...]) -> list[Scene] | None:
    """Returns the scenes of the prompts; None for other models, and if a prompt is not a caption of the grammar."""
    from fdcompile.miniature.scenes import parse_caption

    try:
        return None if loading.model is not None else [parse_caption(prompt) for prompt in prompts]
    except ValueError:
        return None


def headline(pipe: Any, config: Config, sampling: Sampling) -> str:
    """Describes pipeline, sampler, steps, pictures, key steps and cut of a run in two lines.

    Uses the current schedule of `pipe`, so call it before anything else is sampled.
    """
    from fdcompile.runtime.forecast import key_steps_of  # loads diffusers

    count = len(sampling.prompts)
    key_steps = key_steps_of(config, pipe.scheduler)
    return (
        f"{type(pipe).__name__}, {type(pipe.scheduler).__name__}, {sampling.steps} steps, "
        f"{count} {'picture' if count == 1 else 'pictures'}, seed {sampling.seed}\n"
        f"key steps {' '.join(map(str, key_steps))}; recompute: {', '.join(config.recompute) or 'nothing'}"
    )
