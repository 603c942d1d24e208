"""Opened packages and their runners."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fdcompile.backends.protocols import Lowered, PackageFormat
from fdcompile.backends.stored import CONSTANTS, Weight, value_at
from fdcompile.capture.call import UNetCall
from fdcompile.capture.guards import checksum_of, fingerprint, replaced_code, user_state
from fdcompile.config import Config
from fdcompile.errors import PackageError
from fdcompile.graph.program import at_sides, spell_dtype
from fdcompile.graph.ranges import Range
from fdcompile.package.manifest import Manifest, differences
from fdcompile.pipeline.identity import weights_digest
from fdcompile.runtime.graph_cache import GraphCache
from fdcompile.runtime.layout import to_channels_last
from fdcompile.runtime.runner import ProgramRunner, StageCall


def check_code(unet: nn.Module, manifest: Manifest) -> None:
    """Checks that user code in `unet`, and the values that it reads, are those of the package.

    Raises:
        PackageError: library code that `unet` calls was replaced, or attention processors or other user code differ
            from those at export.
    """
    if replaced := replaced_code(unet):
        raise PackageError(
            f"{', '.join(replaced)} was replaced by other code, which the package does not contain: "
            f"put the library's back, or call fdcompile.restore(pipe)"
        )
    if (state := user_state(unet)) != manifest.state:
        changed = sorted(name for name in state | manifest.state if state.get(name) != manifest.state.get(name))
        raise PackageError(
            f"{', '.join(changed)} differ from what the package was exported with: set them back, export again, or "
            f"call fdcompile.restore(pipe)"
        )


class Package:
    """An opened package.

    Attributes:
        manifest: manifest of the package.
        lowered: one callable per stage.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        graph_cache: GraphCache,
        chosen: PackageFormat,
        other_weights: bool,
        pixels_per_latent: int,
    ) -> None:
        self.manifest = manifest
        self.lowered: dict[str, Lowered] = {}
        self._device = device = next(graph_cache.unet.parameters()).device
        self._folder = folder
        self._unet = graph_cache.unet
        self._static_weights = graph_cache.static_weights
        self._format = chosen
        self._pixels_per_latent = pixels_per_latent
        self._constants = load_file(folder / CONSTANTS, device=str(device)) if CONSTANTS in manifest.files else {}
        self._paths = sorted({w.path for stage in manifest.stages.values() for w in stage.weights if w.path})
        self._seen: object = None
        self._open(with_weights=other_weights or chosen.weights in ("live", "refitted"))

    def follow_weights(self) -> None:
        """Updates changed weights, or rejects them if the package contains its own.

        Raises:
            PackageError: the package contains weights, and those of the UNet have changed.
        """
        if self._seen == self._weights_state():
            return
        if self._format.weights == "held":
            if weights_digest(self._unet) == self.manifest.unet["weights"]:
                self._seen = self._weights_state()
                return
            raise PackageError(
                f"the UNet's weights have changed since the package was loaded, and it holds the old ones "
                f"(format {self.manifest.format}): export again, or call fdcompile.restore(pipe)"
            )
        self._open(with_weights=True)

    def check_modules(self) -> None:
        """Checks that the package still matches the UNet after its modules or their attributes have changed.

        Raises:
            PackageError: it does not, or library code that the UNet calls was replaced.
        """
        if (actual := fingerprint(self._unet)) != self.manifest.unet["modules"]:
            raise PackageError(
                f"the UNet's modules have changed since they were exported (digest {actual[:12]}, the package has "
                f"{self.manifest.unet['modules'][:12]}): fuse an adapter and unload it "
                f"(pipe.fuse_lora(); pipe.unload_lora_weights()), or call fdcompile.restore(pipe)"
            )
        check_code(self._unet, self.manifest)
        self._seen = None

    def why_not(self, call: UNetCall) -> str:
        """Message if the package does not support `call`; empty if it does."""
        height, width = call.sample.shape[-2:]
        if why := self._other_size(height, width):
            return why
        expected = {tuple(leaf["path"]): self._show(leaf, height, width) for leaf in self.manifest.signature}
        actual = {path: _show(value) for path, value in call.signature.leaves}
        pairs = [
            ("_".join(map(str, path)), expected.get(path, "none"), actual.get(path, "none"))
            for path in expected | actual
        ]
        if call.batch not in self.manifest.latents:
            pairs.append(("batch", _images(self.manifest.latents), _images(call.batch)))
        if call.signature.environment:
            pairs.append(("autocast or the default type", "none", repr(call.signature.environment)))
        return differences(pairs)

    def _other_size(self, height: int, width: int) -> str | None:
        """Message, in pixels, if latents of this size are not supported; None if they are."""
        if self.manifest.sides is not None:
            return self.manifest.sides.why_not(height, width)
        made_for = next(leaf["tensor"]["shape"][-2:] for leaf in self.manifest.signature if leaf["path"][0] == "sample")
        if [height, width] == made_for:
            return None
        (rows, columns), pixels = made_for, self._pixels_per_latent
        return (
            f"{pixels * height}x{pixels * width} pixels (height x width): it takes {pixels * rows}x{pixels * columns}"
        )

    def _show(self, leaf: dict[str, Any], height: int, width: int) -> str:
        """Formats an argument like `_show`, for latents of this size."""
        if "tensor" not in leaf:
            return _show(leaf["value"])
        tensor = leaf["tensor"]
        shape = at_sides(tensor["shape"], height, width)
        return _show((getattr(torch, tensor["dtype"]), self._device, tensor["per_latent"], shape))

    def schedule_weights(self) -> Iterable[Tensor]:
        """Weights of stage ``schedule``."""
        stage = self.manifest.stages.get("schedule")
        return [operator.attrgetter(w.path)(self._unet) for w in stage.weights if w.path] if stage is not None else []

    def _open(self, with_weights: bool) -> None:
        if self._device.type == "cuda" and self._format.weights == "live":
            to_channels_last(self._unet)  # as at export
        stages = self.manifest.stages if with_weights else {}
        tensors = {
            name: {weight.name: self._tensor(name, weight) for weight in stage.weights}
            for name, stage in stages.items()
        }
        self.lowered.update(self._format.open(self._folder, self.manifest.stages, tensors, self._device))
        self._seen = self._weights_state()

    def _tensor(self, stage_name: str, weight: Weight) -> Tensor:
        if weight.path is None:
            return self._constants[f"{stage_name}.{weight.name}"]
        return weight.of(self._unet, self._static_weights.part_of)

    def _weights_state(self) -> object:
        """A value that changes when live weights move in memory, or other weights are written to."""
        weights = [operator.attrgetter(path)(self._unet) for path in self._paths]
        return [weight.data_ptr() for weight in weights] if self._format.weights == "live" else checksum_of(weights)


class PackagedRunner(ProgramRunner):
    """Runs the stages of a package for latents of the size of `call`."""

    def __init__(self, package: Package, call: UNetCall, config: Config) -> None:
        self._manifest = package.manifest
        height, width = call.sample.shape[-2:]
        super().__init__(config, self._manifest.program)
        self._package = package
        self._lowered = package.lowered
        sides = self._manifest.sides
        self._area = 1 if sides is None else sides.cells(height, width)

    def _find_max_steps(self, batch: int) -> tuple[int, str]:
        return self._manifest.parallel_steps.max, "what the package was exported for"

    def flops(self, call: StageCall) -> int:
        stage_name, steps, batch = call
        fixed, per_step = (value_at(polynomial, self._area) for polynomial in self._manifest.stages[stage_name].flops)
        return batch * (fixed + (steps or 0) * per_step)

    def stock_flops(self, batch: int) -> int:
        return batch * value_at(self._manifest.stock_flops, self._area)

    def _lower(self, stage_name: str, steps: int | None) -> Lowered:
        return self._lowered[stage_name]

    def _schedule_weights(self) -> Iterable[Tensor]:
        return self._package.schedule_weights()


def _images(latents: Range | int) -> str:
    """Formats a number of latents, with the corresponding numbers of images."""
    most = latents if isinstance(latents, int) else latents.max
    return f"{latents} latents ({most} images without guidance, {most // 2} with)"


def _show(value: Any) -> str:
    """Formats an entry of a `Signature`."""
    if not isinstance(value, tuple):
        return repr(value)
    dtype, device, per_latent, shape = value
    batch = {0: [], 1: ["B"]}.get(per_latent, [f"{per_latent}*B"])
    return f"{spell_dtype(dtype)}[{', '.join(map(str, [*batch, *shape]))}] on {device.type}"
