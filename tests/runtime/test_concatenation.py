"""What a pipeline has concatenated with its latents, read from its source."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fdcompile.runtime.concatenation import _concatenated, concatenated_with

MASKED = ("mask", "masked_image_latents")
X, SCALED = "latent_model_input", "scaled_latent_model_input"
PIPELINES = {
    "StableDiffusionInpaintPipeline": (X, MASKED),
    "StableDiffusionXLInpaintPipeline": (X, MASKED),
    "StableDiffusionControlNetInpaintPipeline": (X, MASKED),
    "StableDiffusionXLControlNetInpaintPipeline": (X, MASKED),
    "StableDiffusionPAGInpaintPipeline": (X, MASKED),
    "StableDiffusionInstructPix2PixPipeline": (SCALED, ("image_latents",)),
    "StableDiffusionXLInstructPix2PixPipeline": (SCALED, ("image_latents",)),
    "StableDiffusionDepth2ImgPipeline": (X, ("depth_mask",)),
    "StableDiffusionUpscalePipeline": (X, ("image",)),
    "StableVideoDiffusionPipeline": (X, ("image_latents",)),
    "KandinskyV22InpaintPipeline": (X, ("masked_image", "mask_image")),
    "PaintByExamplePipeline": (X, ("masked_image_latents", "mask")),
    "IFSuperResolutionPipeline": ("model_input", ()),
    "LDMSuperResolutionPipeline": ("latents_input", ()),
}
"""What they call the UNet with, and what is in it besides the latents. Of the last two the values are compared."""


@pytest.mark.parametrize("name", PIPELINES)
def test_what_pipelines_of_diffusers_concatenate(name: str) -> None:
    variable, expected = PIPELINES[name]
    call = inspect.unwrap(getattr(diffusers, name).__call__)
    lines, first = inspect.getsourcelines(call)
    line = next(at for at, line in enumerate(lines, first) if "self.unet(" in line)
    axis = 2 if name == "StableVideoDiffusionPipeline" else 1
    assert _concatenated(call.__code__, variable, axis, line) == expected


LATENTS, MASK, image = torch.zeros(2, 4, 8, 8), torch.ones(2, 1, 8, 8), torch.ones(2, 4, 8, 8)


def asked(sample: Tensor) -> Any:
    return concatenated_with(sample, 1, 5)


def passed_on(sample: Tensor) -> Any:
    return asked(sample)


def plain(mask: Tensor, image: Tensor, nine: bool = True) -> Any:
    x = torch.cat([LATENTS[:1]] * 2)
    if nine:
        x = torch.cat([x, mask, image], dim=1)
    return passed_on(x)


def written(mask: Tensor, image: Tensor) -> Any:
    x = LATENTS
    x = torch.cat([x, mask, image], dim=1)
    x[:, 4:] *= 0.5
    return asked(x)


def scaled_afterwards(mask: Tensor, image: Tensor) -> Any:
    x = LATENTS
    x = torch.cat([x, mask, image], dim=1)
    x = x * 0.5
    return asked(x)


def scaled_by_a_hook(mask: Tensor, image: Tensor) -> Any:
    x = LATENTS
    x = torch.cat([x, mask, image], dim=1)
    return asked(x * 0.5)


def of_expressions(mask: Tensor, image: Tensor) -> Any:
    x = LATENTS
    x = torch.cat([x, mask * 0.5, image], dim=1)
    return asked(x)


def in_one_of_two_ways(mask: Tensor, image: Tensor, half: bool = True) -> Any:
    x = LATENTS
    if half:
        x = torch.cat([x, mask * 0.5, image], dim=1)
    elif mask is not None:
        x = torch.cat([x, mask, image], dim=1)
    return asked(x)


def replaced_afterwards(mask: Tensor, image: Tensor) -> Any:
    x, half = LATENTS, mask * 0.5
    x = torch.cat([x, half, image], dim=1)
    half = MASK
    return asked(x)


def under_another_name(mask: Tensor, image: Tensor) -> Any:
    x = torch.cat([LATENTS, mask, image], dim=1)
    return asked(x)


def of_other_channels(mask: Tensor, image: Tensor) -> Any:
    x = LATENTS
    x = torch.cat([x, mask, mask], dim=1)
    return asked(x)


def test_callers_that_show_what_they_concatenate() -> None:
    parts = plain(MASK, image)
    assert parts is not None
    assert parts[0] is MASK
    assert parts[1] is image


HIDING = [written, scaled_afterwards, scaled_by_a_hook, of_expressions, in_one_of_two_ways, replaced_afterwards]


@pytest.mark.parametrize("caller", [*HIDING, under_another_name, of_other_channels])
def test_callers_that_do_not(caller: Any) -> None:
    """Their values are compared."""
    assert caller(MASK, image) is None


def test_inference_tensors_do_not_tell_whether_they_were_written_to() -> None:
    with torch.inference_mode():
        assert plain(MASK, image) is None


def test_a_script_and_a_string(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("x = torch.cat([x, m, p], dim=1)\nresult = asked(x)\n")
    for source, file, expected in (
        (script.read_text(), str(script), (MASK, image)),
        (f"\n{script.read_text()}", "<string>", None),
    ):
        names: dict[str, Any] = {"torch": torch, "asked": asked, "x": LATENTS, "m": MASK, "p": image}
        exec(compile(source, file, "exec"), names)
        assert names["result"] == expected
