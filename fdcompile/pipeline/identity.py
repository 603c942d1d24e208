"""Which model is this? The same in another process for an equal one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

from fdcompile.backends.stored import tensor_bytes
from fdcompile.capture.guards import fingerprint


def describe_unet(unet: Any, with_weights: bool = True) -> dict[str, str]:
    """Class of `unet` and digests of its configuration, its modules and, which reads them all, its weights."""
    own = {"class": type(unet).__name__, "configuration": config_digest(unet), "modules": fingerprint(unet)}
    return own | ({"weights": weights_digest(unet)} if with_weights else {})


def config_digest(part: Any) -> str:
    """Sha256 of the configuration of a diffusers model or scheduler, without where and by what it was saved."""
    values = {name: value for name, value in dict(part.config).items() if not name.startswith("_")}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(unet: nn.Module) -> str:
    """Sha256 of all parameters and buffers: names, types, shapes, contents."""
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
