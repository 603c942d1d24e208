"""Records the arguments that a pipeline calls its UNet with."""

from __future__ import annotations

import inspect
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from fdcompile.capture.call import UNetCall
from fdcompile.graph.ranges import Range


class _Recorded(BaseException):
    """Ends the pipeline's call at its first UNet call. No pipeline catches it."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call = args, kwargs


def record_call(pipe: Any, height: int | None, width: int | None, arguments: dict[str, Any] | None) -> UNetCall:
    """Records the first UNet call of a pipeline call.

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


def side_axes(
    pipe: Any, call: UNetCall, heights: Range, widths: Range, arguments: dict[str, Any] | None
) -> tuple[dict[int, tuple[str, Fraction]], ...]:
    """Finds the axes of the tensors of `call` that are a height or width of the latents, or a fraction of it.

    They are those that change if the pipeline is called with another height or width.

    Raises:
        ValueError: see `record_call`; or a size is not proportional to the height or width; or more than sizes changes.
    """
    axes_of: tuple[dict[int, tuple[str, Fraction]], ...] = tuple({} for _ in call.tensors)
    for name, span, axis in (("height", heights, -2), ("width", widths, -1)):
        if span.fixed:
            continue
        size = span.max if span.max != span.opt else span.min
        sizes = {"height": heights.opt, "width": widths.opt, name: size}
        other = record_call(pipe, sizes["height"], sizes["width"], arguments)
        if _but_sizes(other) != _but_sizes(call):
            raise ValueError(f"{name}={size}: the UNet is not called with the same arguments as at {span.opt}: {_ONE}")
        one, two = call.sample.shape[axis], other.sample.shape[axis]
        for argument, tensor, changed, axes in zip(
            call.signature.names, call.tensors, other.tensors, axes_of, strict=True
        ):
            for number, (before, after) in enumerate(zip(tensor.shape, changed.shape, strict=True)):
                if before == after:
                    continue
                if number in axes or before * two != after * one:
                    raise ValueError(f"{name}={size}: {argument} has {list(changed.shape)} then: {_ONE}")
                axes[number] = "HW"[axis], Fraction(before, one)
    return axes_of


_ONE = "this UNet can be exported for one height and width only"


def _but_sizes(call: UNetCall) -> list[Any]:
    return [(path, (value.dtype, value.ndim) if isinstance(value, Tensor) else value) for path, value in call.leaves]


def pixels_per_latent(pipe: Any) -> int:
    """Pixels of a side of the image per latent."""
    return int(getattr(pipe, "vae_scale_factor", getattr(pipe, "movq_scale_factor", 1)))


def _check_size(pipe: Any, call: UNetCall, given: dict[str, Any]) -> None:
    """Checks the size of `call`, since some pipelines round sizes or use a default if only one side is given."""
    pixels = pixels_per_latent(pipe)
    sizes = {name: pixels * side for name, side in zip(("height", "width"), call.sample.shape[-2:], strict=True)}
    for name, size in sizes.items():
        if given.get(name) not in (None, size):
            raise ValueError(
                f"{name}={given[name]}: {type(pipe).__name__} would make an image of {sizes['height']}x"
                f"{sizes['width']} pixels (height x width): give both, of a size that it makes"
            )
