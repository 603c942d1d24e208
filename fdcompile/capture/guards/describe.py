"""What a UNet is, in words that are the same for an equal one in another process."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

from fdcompile.capture.guards.snapshot import is_baked


def fingerprint(unet: nn.Module) -> str:
    """Sha256 of the types of a UNet's modules and attention processors and of the plain values on them."""
    parts: list[Any] = []
    for path, module in unet.named_modules():
        for owner in filter(None, (module if path else None, vars(module).get("processor"))):
            values = {name: value for name, value in vars(owner).items() if is_baked(name, value)}
            parts.append((path, type(owner).__qualname__, values))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
