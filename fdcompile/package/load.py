"""Run a package made by `export` in a stock pipeline."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn

from fdcompile.backends import package_format
from fdcompile.backends.protocols import Lowered, PackageFormat
from fdcompile.backends.stored import CONSTANTS, PackagedStage, PackageError, Port, Weight, spell_dtype
from fdcompile.capture.call import Signature, UNetCall
from fdcompile.capture.structure import fingerprint
from fdcompile.config import Config
from fdcompile.graph.program import BindingTime, Stage, StagedProgram, Value
from fdcompile.package.directory import as_path
from fdcompile.package.manifest import Manifest, differences
from fdcompile.pipeline.check import check_pipe
from fdcompile.pipeline.identity import describe_unet, weights_digest
from fdcompile.pipeline.session import Session, find_session
from fdcompile.runtime.programs import Captures, Programs
from fdcompile.runtime.staged import StageCall, StagedUNet, Values, norms

Pipeline = TypeVar("Pipeline")


def load(pipe: Pipeline, directory: str | Path, config: Config | None = None) -> Pipeline:
    """Makes `pipe` run its UNet by the package in `directory`, without compiling anything, and returns it.

    As `optimize`, with what `export` wrote: same object, same class, same call; `restore` takes it off again. A call of
    another size than the package was made for raises `PackageError`.

    Args:
        pipe: a diffusers pipeline with the UNet that was exported.
        directory: made by `export` on the same kind of device.
        config: with other key steps, a plan's, or other noise than were exported: the stages do not depend on them. How
            many steps are decoded at once and the backend are the package's. None: as exported.

    Raises:
        TypeError: `pipe` is not one that `optimize` accepts, `directory` no path, or `config` no `Config`.
        PackageError: the package is damaged, of another schema, made for another UNet or device, or its stages are of
            another cut, forecast or choice of passes than `config`. Nothing is opened or installed then. A package that
            holds weights (ONNX, TensorRT) is also refused where they differ; the engines of a ``tensorrt_onnx`` package
            are refitted.
        ImportError: a library that opens the package is not installed.
    """
    folder = as_path(directory, "load")
    check_pipe(pipe)
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"config={config!r}: expected a fdcompile.Config")
    manifest = Manifest.read(folder)
    config = _config(manifest, config)
    chosen = package_format(manifest.format)
    chosen.check()
    unet: Any = pipe.unet  # type: ignore[attr-defined]
    other_weights = _check_unet(manifest, unet, chosen)
    packaged = PackagedUNet(manifest, config, folder, unet, chosen, other_weights)
    if (previous := find_session(pipe)) is not None:
        previous.detach()
    Session(pipe, config, PackagedPrograms(unet, packaged)).attach()
    return pipe


def _check_unet(manifest: Manifest, unet: Any, chosen: PackageFormat) -> bool:
    """Refuses a package that is not for `unet`. Whether the engines must be refitted with its weights."""
    own, device = describe_unet(unet, with_weights=chosen.weights != "live"), next(unet.parameters()).device
    other_weights = chosen.weights == "copied" and own.pop("weights") != manifest.unet["weights"]
    pairs: list[tuple[str, object, object]] = [(name, manifest.unet[name][:24], own[name][:24]) for name in own]
    made_with = chosen.made_with(device)
    pairs += [(name, manifest.made_with.get(name), value) for name, value in made_with.items()]
    if different := differences(pairs):
        raise PackageError(
            f"this package is for another UNet or machine: {different}. Export again, or load that model"
        )
    for stage in manifest.stages.values():
        for weight in stage.weights:
            if weight.path is not None and weight.part is None:  # a part is a copy, and checked where it is used
                weight.of(unet)
    return other_weights


@dataclass
class _PackagedStage(Stage):
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def op_counts(self) -> Counter[str]:
        return self.counts


class PackagedPrograms(Programs):
    """The only one that a package holds."""

    def __init__(self, unet: nn.Module, packaged: PackagedUNet) -> None:
        super().__init__(Captures(unet))
        self.captures.follow_unet()
        self.staged[packaged.signature] = self._packaged = packaged
        self._baked = self.captures.baked

    def make(self, call: UNetCall) -> NoReturn:
        raise self._packaged.mismatch(call)

    def follow_unet(self) -> None:
        self.captures.follow_unet()
        if self._baked != self.captures.baked:
            self._packaged.check_modules()
        self._baked = self.captures.baked


class PackagedUNet(StagedUNet):
    """The UNet of a package: its stages are files.

    Attributes:
        signature: of the calls it answers.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: Config,
        folder: Path,
        unet: nn.Module,
        chosen: PackageFormat,
        other_weights: bool,
    ) -> None:
        self._device = device = next(unet.parameters()).device
        super().__init__(config, _program(manifest, device))
        self.signature = _signature(manifest, device)
        self._manifest = manifest
        self._folder = folder
        self._unet = unet
        self._format = chosen
        self._constants = load_file(folder / CONSTANTS, device=str(device)) if CONSTANTS in manifest.files else {}
        self._paths = sorted({w.path for stage in manifest.stages.values() for w in stage.weights if w.path})
        self._seen: list[float] | None = None
        self._open(with_weights=other_weights or chosen.weights == "live")

    def begin_run(self) -> None:
        """Counts from zero, and follows weights that have changed, or refuses those it does not hold.

        Raises:
            PackageError: the package holds weights, and the UNet's have changed.
        """
        super().begin_run()
        if self._seen == self._weights_state():
            return
        if self._format.weights == "held":
            if weights_digest(self._unet) == self._manifest.unet["weights"]:
                self._seen = self._weights_state()
                return
            raise PackageError(
                f"the UNet's weights have changed since the package was loaded, and it holds the old ones "
                f"(format {self._manifest.format}): export again, or call fdcompile.restore(pipe)"
            )
        self._open(with_weights=True)

    def check_modules(self) -> None:
        """Whether the package still stands for the UNet, whose modules or their attributes have changed.

        Raises:
            PackageError: it does not.
        """
        if (actual := fingerprint(self._unet)) != self._manifest.unet["modules"]:
            raise PackageError(
                f"the UNet's modules have changed since they were exported (digest {actual[:12]}, the package has "
                f"{self._manifest.unet['modules'][:12]}): fuse an adapter and unload it "
                f"(pipe.fuse_lora(); pipe.unload_lora_weights()), or call fdcompile.restore(pipe)"
            )
        self._schedules.clear()
        self._seen = None

    def mismatch(self, call: UNetCall) -> PackageError:
        """What to raise at a call that the package was not made for: it names the arguments that differ."""
        expected = {path: _show(value) for path, value in self.signature.leaves}
        actual = {path: _show(value) for path, value in call.signature.leaves}
        pairs = [
            ("_".join(map(str, path)), expected.get(path, "none"), actual.get(path, "none"))
            for path in expected | actual
        ]
        if call.batch not in self._manifest.batch:
            pairs.append(("latents", str(self._manifest.batch), str(call.batch)))
        return PackageError(f"the package was exported for another call: {differences(pairs)}. Export one for it")

    def schedule(self, call: UNetCall, timesteps: Tensor) -> Values:
        if call.batch not in self._manifest.batch:
            raise self.mismatch(call)
        return super().schedule(call, timesteps)

    def max_steps(self, batch: int) -> int:
        """What the package was made for, or fewer after the device ran out of memory."""
        return min(self._manifest.steps.max, self._max_steps.get(batch, self._manifest.steps.max))

    def _why_max_steps(self) -> str:
        return "what the package was exported for"

    def flops(self, call: StageCall) -> int:
        stage_name, steps, batch = call
        fixed, per_step = self._manifest.stages[stage_name].flops
        return batch * (fixed + (steps or 0) * per_step)

    def stock_flops(self, batch: int) -> int:
        return batch * self._manifest.stock_flops

    def _open(self, with_weights: bool) -> None:
        stages = self._manifest.stages if with_weights else {}
        tensors = {
            name: {weight.name: self._tensor(name, weight) for weight in stage.weights}
            for name, stage in stages.items()
        }
        self._lowered = self._format.open(self._folder, self._manifest.stages, tensors, self._device)
        self._seen = self._weights_state()

    def _tensor(self, stage_name: str, weight: Weight) -> Tensor:
        return self._constants[f"{stage_name}.{weight.name}"] if weight.path is None else weight.of(self._unet)

    def _weights_state(self) -> list[float]:
        """What changes when live weights move in memory, and when others are written to."""
        weights = [operator.attrgetter(path)(self._unet) for path in self._paths]
        return [weight.data_ptr() for weight in weights] if self._format.weights == "live" else norms(weights)

    def _lower(self, stage_name: str, steps: int | None) -> Lowered:
        return self._lowered[stage_name]

    def _schedule_weights(self) -> Iterable[Tensor]:
        stage = self._manifest.stages.get("schedule")
        return [operator.attrgetter(w.path)(self._unet) for w in stage.weights if w.path] if stage is not None else []


def _config(manifest: Manifest, asked: Config | None) -> Config:
    """What the package was exported with, or `asked`, if its stages serve that."""
    try:
        exported = Config.from_dict(manifest.config)
    except (TypeError, ValueError) as error:
        raise PackageError(f"the package's configuration is malformed ({error}): export again") from error
    asked = exported if asked is None else asked
    names = ("fresh", "forecasts", "disabled_passes")
    if different := differences([(name, getattr(exported, name), getattr(asked, name)) for name in names]):
        raise PackageError(f"the package's stages were made with another configuration: {different}. Export with it")
    return replace(asked, max_parallel_steps=manifest.steps.max, backend=exported.backend)


def _program(manifest: Manifest, device: torch.device) -> StagedProgram:
    stages: dict[str, Stage] = {name: _stage(name, stage, device) for name, stage in manifest.stages.items()}
    return StagedProgram(_values(manifest.inputs, device), stages, manifest.output, fx.GraphModule({}, fx.Graph()))


def _stage(name: str, stage: PackagedStage, device: torch.device) -> Stage:
    inputs, outputs = _values(stage.inputs, device), _values(stage.outputs, device)
    return _PackagedStage(name, fx.GraphModule({}, fx.Graph()), inputs, outputs, Counter(stage.op_counts))


def _values(ports: tuple[Port, ...], device: torch.device) -> tuple[Value, ...]:
    return tuple(
        Value(port.name, port.shape, getattr(torch, port.dtype), device, BindingTime(port.time)) for port in ports
    )


def _signature(manifest: Manifest, device: torch.device) -> Signature:
    leaves = []
    for leaf in manifest.signature:
        value = leaf.get("value")
        if tensor := leaf.get("tensor"):
            dtype = getattr(torch, tensor["dtype"])
            value = dtype, device, tensor["per_latent"], torch.Size(tensor["shape"])
        leaves.append((tuple(leaf["path"]), value))
    return Signature(tuple(leaves), manifest.fixed_batch)


def _show(value: Any) -> str:
    if not isinstance(value, tuple):
        return repr(value)
    dtype, device, _, shape = value
    return f"{spell_dtype(dtype)}{list(shape)} on {device.type}"
