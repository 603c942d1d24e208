"""Loads the pipeline of a command."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fdcompile
from fdcompile.cli.errors import UserError
from fdcompile.cli.options import CHECKPOINTS, ModelOptions
from fdcompile.cli.progress import tell

if TYPE_CHECKING:
    import torch


_ALIKE = 0.75
"""Least similarity of names to be suggested, from 0 to 1."""


def load_pipe(loading: ModelOptions, device: torch.device | None = None) -> Any:
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


def _read(loading: ModelOptions, dtype: torch.dtype) -> Any:
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
        containing = sorted((other for other in known if name.lower() in other.lower()), key=len)
        alike = containing[:3] or _alike(name, known)
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
