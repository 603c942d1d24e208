"""Digests that identify a model, equal in every process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fdcompile.capture.guards import fingerprint
from fdcompile.graph.weights import plain_tensors, tensor_bytes
from fdcompile.runtime.caller import unwrap


def describe_unet(unet: Any, with_weights: bool = True) -> dict[str, str]:
    """Class of `unet` and digests of its configuration, its modules and, by reading all of them, its weights."""
    identity = {"class": type(unet).__name__, "configuration": config_digest(unet), "modules": fingerprint(unet)}
    return identity | ({"weights": weights_digest(unet)} if with_weights else {})


def describe_parts(pipe: Any) -> dict[str, dict[str, str]]:
    """Digests of the UNet of `pipe`, including its weights, and of the scheduler, which plans are made for."""
    scheduler = {"class": type(pipe.scheduler).__name__, "configuration": config_digest(pipe.scheduler)}
    return {"UNet": describe_unet(unwrap(pipe.unet)), "scheduler": scheduler}


def digests_of(parts: Mapping[str, Mapping[str, str]]) -> tuple[tuple[str, str, str], ...]:
    """Converts the result of `describe_parts` to triples (part, property, digest)."""
    return tuple((part, name, digest) for part, digests in parts.items() for name, digest in digests.items())


def differences_of(digests: Sequence[tuple[str, str, str]], others: Sequence[tuple[str, str, str]]) -> list[str]:
    """Names of those `digests` that are not in `others`."""
    return [f"{part}'s {name}" for part, name, digest in digests if (part, name, digest) not in others]


def describe_model(pipe: Any) -> dict[str, Any]:
    """Classes of `pipe` and its scheduler, and short digests of the scheduler's configuration and of all weights."""
    weights = {name: weights_digest(part)[:12] for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    scheduler = f"{type(pipe.scheduler).__name__} {config_digest(pipe.scheduler)[:12]}"
    return {"pipeline": type(pipe).__name__, "scheduler": scheduler, "weights": weights}


def config_digest(part: Any) -> str:
    """Sha256 of the configuration of a diffusers model or scheduler, without its path and version."""
    values = {name: value for name, value in dict(getattr(part, "config", {})).items() if not name.startswith("_")}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(module: nn.Module) -> str:
    """Sha256 of all parameters and buffers: names, types, shapes, contents."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for part in plain_tensors(tensor):
            digest.update(tensor_bytes(part))
    return digest.hexdigest()
