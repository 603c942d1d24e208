"""Torch's side of the stand-in for CUDA: its counters, and stand-ins for what lies in cuDNN.

Import it before anything else uses CUDA, in a process that was started with the library preloaded (see `run.sh`).
Convolutions and cuDNN's attention return tensors of the right shape and layout, and are counted. Values are garbage; a
bool that is read back is True.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.library import Library

_library = ctypes.CDLL(os.environ["CUDA_STANDIN"])
_library.standin_dump.argtypes = [ctypes.c_char_p, ctypes.c_longlong, ctypes.c_int]
_library.standin_dump.restype = ctypes.c_longlong
_library.standin_launch.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
_library.standin_bool(1)


def counters() -> dict[str, int]:
    """Captures, graph launches, kernels, copies, waits and illegal calls since the last `reset`, by name."""
    return _dump(0)


def kernels() -> dict[str, int]:
    """Launches since the last `reset` by the name of the kernel; those captured begin with ``captured``."""
    return _dump(1)


def reset() -> None:
    _library.standin_reset()


def _dump(which: int) -> dict[str, int]:
    size = _library.standin_dump(None, 0, which) + 1000
    buffer = ctypes.create_string_buffer(size)
    _library.standin_dump(buffer, size, which)
    rows = (line.partition("\t") for line in buffer.value.decode().splitlines())
    return {name: int(count) for count, _, name in rows}


def _launch(name: str) -> None:
    _library.standin_launch(name.encode(), torch.cuda.current_stream().cuda_stream)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and suggest_memory_format(tensor) is torch.channels_last


def _convolution(
    x: Tensor,
    weight: Tensor,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *flags: bool,
) -> Tensor:
    """The answer is channels-last if either the input or the kernel is; the other one is copied for it."""
    turned = [_is_channels_last(tensor) for tensor in (x, weight)]
    either_way = [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (x, weight) if tensor.ndim == 4]
    layout = "contiguous" if not any(turned) else "channels_last" if all(either_way) else "copied to channels_last"
    _launch(f"convolution {layout}")
    sides = zip(x.shape[2:], weight.shape[2:], padding, stride, dilation, strict=True)
    size = [(side + 2 * pad - hole * (kernel - 1) - 1) // step + 1 for side, kernel, pad, step, hole in sides]
    chosen = torch.channels_last if any(turned) else torch.contiguous_format
    shape = (x.shape[0], weight.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=chosen)


def _convolution_out(*arguments: Any, out: Tensor) -> Tensor:
    _launch("convolution into a given tensor")
    return out


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Any, log_sum: bool, *args: Any, **kwargs: Any) -> Any:
    _launch("attention")
    lengths = (*query.shape[:-1], 1) if log_sum else (0,)
    seed = query.new_empty((), dtype=torch.int64)
    sums = query.new_empty(lengths, dtype=torch.float32)
    same_shape = value.shape[-1] == query.shape[-1]
    output = torch.empty_like(query) if same_shape else query.new_empty(*query.shape[:-1], value.shape[-1])
    return output, sums, Tensor(), Tensor(), query.shape[2], key.shape[2], seed, seed, Tensor()


_aten = Library("aten", "IMPL")
_aten.impl("cudnn_convolution", _convolution, "CUDA")
_aten.impl("cudnn_convolution.out", _convolution_out, "CUDA")
_aten.impl("_scaled_dot_product_cudnn_attention", _attention, "CUDA")
