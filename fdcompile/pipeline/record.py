"""What a pipeline hands its UNet."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from fdcompile.capture.call import UNetCall


class _Recorded(BaseException):
    """Ends the pipeline's call at its first UNet call. No pipeline catches it."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call = args, kwargs


def record_call(pipe: Any, height: int | None, width: int | None, arguments: dict[str, Any] | None) -> UNetCall:
    """What the pipeline hands its UNet in a call for one picture.

    Raises:
        ValueError: the pipeline does not take one of `arguments`, does not call its UNet, or calls it for another size.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    given = {"prompt": "a photograph"} if arguments is None and "prompt" in parameters else dict(arguments or {})
    given |= {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    if unknown := [name for name in given if name not in parameters]:
        raise ValueError(f"{type(pipe).__name__} takes no {unknown[0]}: leave it out")

    def interrupt(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Recorded(args, kwargs)

    handle = pipe.unet.register_forward_pre_hook(interrupt, with_kwargs=True)
    try:
        pipe(**given)
    except _Recorded as recorded:
        call = UNetCall.parse(inspect.signature(type(pipe.unet).forward.__get__(pipe.unet)), *recorded.call)
    else:
        raise ValueError(f"{type(pipe).__name__} made no call of its UNet with arguments {given}")
    finally:
        handle.remove()
    _check_size(pipe, call, given)
    return call


def _check_size(pipe: Any, call: UNetCall, given: dict[str, Any]) -> None:
    """Some pipelines fall back to their own size if they are given a height without a width, or round what they get."""
    pixels = getattr(pipe, "vae_scale_factor", getattr(pipe, "movq_scale_factor", 1))  # of a side, in one of a latent
    sample = call.tensors[call.signature.names.index("sample")]
    sizes = {name: pixels * side for name, side in zip(("height", "width"), sample.shape[-2:], strict=True)}
    for name, size in sizes.items():
        if given.get(name) not in (None, size):
            raise ValueError(
                f"{name}={given[name]}: {type(pipe).__name__} would make a picture of {sizes['height']}x"
                f"{sizes['width']} pixels (height x width): give both, of a size that it makes"
            )
