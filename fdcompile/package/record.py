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
        ValueError: the pipeline does not take one of `arguments`, or does not call its UNet.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    given = {"prompt": "a photograph"} if arguments is None and "prompt" in parameters else dict(arguments or {})
    sizes = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    if unknown := [name for name in (*sizes, *given) if name not in parameters]:
        raise ValueError(f"{type(pipe).__name__} takes no {unknown[0]}: leave it out")

    def interrupt(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Recorded(args, kwargs)

    handle = pipe.unet.register_forward_pre_hook(interrupt, with_kwargs=True)
    try:
        pipe(**given | sizes)
    except _Recorded as recorded:
        return UNetCall.parse(inspect.signature(type(pipe.unet).forward.__get__(pipe.unet)), *recorded.call)
    finally:
        handle.remove()
    raise ValueError(f"{type(pipe).__name__} made no call of its UNet with arguments {given}")
