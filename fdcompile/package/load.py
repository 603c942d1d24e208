"""Runs packages made by `export` in a stock pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from fdcompile.backends import package_format
from fdcompile.backends.protocols import PackageFormat
from fdcompile.capture.call import UNetCall
from fdcompile.capture.guards import checksum_of
from fdcompile.config import Config
from fdcompile.errors import PackageError
from fdcompile.io import as_path
from fdcompile.package.manifest import Manifest, differences
from fdcompile.package.opened import Package, PackagedRunner, check_code
from fdcompile.pipeline.check import check_pipe
from fdcompile.pipeline.exchange import exchange
from fdcompile.pipeline.identity import describe_unet
from fdcompile.pipeline.plans import as_config
from fdcompile.pipeline.record import pixels_per_latent
from fdcompile.pipeline.session import Session, find_session, graph_cache_of
from fdcompile.runtime.caller import unwrap
from fdcompile.runtime.graph_cache import GraphCache
from fdcompile.runtime.runner import ProgramRunner
from fdcompile.runtime.runner_cache import NoProgram, RunnerCache

Pipeline = TypeVar("Pipeline")


def load(
    pipe: Pipeline,
    directory: str | Path | Sequence[str | Path],
    config: Config | None = None,
    fallback: Literal["raise", "stock"] = "raise",
) -> Pipeline:
    """Makes `pipe` run the stages of a package instead of its UNet. Nothing is compiled.

    As with `optimize`, class and call of the pipeline are unchanged, and `restore` undoes it.

    Args:
        pipe: a diffusers pipeline with the UNet that was exported.
        directory: a directory made by `export` on the same kind of device, or several. A call is answered by the first
            package that supports its size.
        config: configuration with other key steps, plans or noise injection, which the stages do not depend on. The
            number of steps to decode at once and the backend are those of the package. None: as exported.
        fallback: behavior for calls that no package supports, because of their size or because the UNet has changed:
            ``"raise"`` a `PackageError`, or run the ``"stock"`` UNet (`explain` gives the reason).

    Returns:
        `pipe`.

    Raises:
        TypeError: `pipe` is not accepted by `optimize`, `directory` is not a path, or `config` is not a `Config`.
        ValueError: `fallback` is invalid, or `directory` is empty.
        PackageError: a package does not match, and nothing was opened or installed. It is damaged, has another schema,
            or was made for another UNet or device; its stages have another cut, forecast or choice of passes than
            `config`; several packages have different configurations and `config` is None; parts of the UNet are
            offloaded, cast or hooked; or user code in the UNet, or what that reads, has changed since the export.
            Packages with weights (``onnx``, ``tensorrt``, ``tensorrt_rtx``) are also rejected if the weights of the
            UNet differ; engines of ``tensorrt_onnx`` and ``tensorrt_rtx_refit`` are refitted. Packages of
            ``tensorrt_rtx`` and ``tensorrt_rtx_refit`` are also rejected, before they are read, if their engines cannot
            run on the GPU.
        ImportError: a library that the package needs is not installed.
    """
    given = [directory] if isinstance(directory, str | Path) or not isinstance(directory, Sequence) else directory
    folders = [as_path(path, "load") for path in given]
    check_pipe(pipe)
    config = None if config is None else as_config(config)
    if fallback not in ("raise", "stock"):
        raise ValueError(f"fallback={fallback!r}: expected 'raise' or 'stock'")
    if not folders:
        raise ValueError(f"directory={directory!r}: expected one or more")
    manifests = [Manifest.read(folder) for folder in folders]
    config = _config(manifests, config)
    formats = [package_format(manifest.format) for manifest in manifests]
    unet = unwrap(pipe.unet)  # type: ignore[attr-defined]
    graph_cache = graph_cache_of(unet)
    graph_cache.follow_unet()
    if (reason := graph_cache.guards.unsupported_reason) is not None:  # before any weight is read
        raise PackageError(f"this package cannot stand in for the pipeline's UNet: {reason}")
    device = next(unet.parameters()).device
    other_weights = []
    for manifest, folder, chosen in zip(manifests, folders, formats, strict=True):
        chosen.check()
        _refuse((name, manifest.made_with.get(name), value) for name, value in chosen.made_with(device).items())
        chosen.check_files(folder, manifest.description, device)
        manifest.check_files(folder)
        other_weights.append(_check_unet(manifest, unet, chosen))
    packages = [
        Package(manifest, folder, graph_cache, chosen, other, pixels_per_latent(pipe))
        for manifest, folder, chosen, other in zip(manifests, folders, formats, other_weights, strict=True)
    ]
    runner_cache = PackagedRunnerCache(graph_cache, packages, config, fallback == "stock")
    exchange(find_session(pipe), Session(pipe, config, runner_cache))
    return pipe


def _refuse(pairs: Iterable[tuple[str, object, object]]) -> None:
    """Raises PackageError if the values in one of `pairs` (name, package's value, pipeline's value) differ."""
    if different := differences(pairs):
        raise PackageError(
            f"this package is for another UNet or machine: {different}. Export again, or load that model"
        )


def _check_unet(manifest: Manifest, unet: Any, chosen: PackageFormat) -> bool:
    """Checks that a package is for `unet`; returns whether its engines must be refitted because the weights differ."""
    check_code(unet, manifest)
    described = describe_unet(unet, with_weights=chosen.weights in ("held", "copied"))
    other_weights = chosen.weights == "copied" and described.pop("weights") != manifest.unet["weights"]
    _refuse((name, manifest.unet[name][:24], described[name][:24]) for name in described)
    for stage in manifest.stages.values():
        for weight in stage.weights:
            if weight.path is not None and weight.part is None:  # parts are checked when they are copied
                weight.of(unet)
    return other_weights


class PackagedRunnerCache(RunnerCache):
    """Runners of packages: one for each size, from the first package that was made for it."""

    def __init__(self, graph_cache: GraphCache, packages: list[Package], config: Config, stock: bool) -> None:
        super().__init__(graph_cache)
        self._packages = packages
        self._config = config
        self._stock = stock
        self._unfit: str | None = None
        self._checked = self._state()

    def make(self, call: UNetCall) -> ProgramRunner:
        whys = []
        for package in () if self._unfit else self._packages:
            if why := package.why_not(call):
                whys.append(why)
                continue
            runner = self.runners[call.fixed_signature] = PackagedRunner(package, call, self._config)
            self._make_room(self._config.cache_size_limit)
            return runner
        why = self._unfit or _why_none(whys)
        raise NoProgram(why) if self._stock else PackageError(why)

    def follow_unet(self) -> None:
        self.graph_cache.follow_unet()
        if self.graph_cache.guards.unsupported_reason is not None:
            return  # the stock UNet runs; its weights may be offloaded and cannot be compared
        state = self._state()
        try:
            if state != self._checked:
                self.runners.clear()
                for package in self._packages:
                    package.check_modules()
            for package in self._packages:
                package.follow_weights()
        except PackageError as error:
            self._unfit = str(error)
            self.runners.clear()
            if not self._stock:
                raise
        else:
            self._unfit = None
            self._checked = state

    def _state(self) -> tuple[int, int]:
        """A value that changes when modules change, or tensors that attention processors hold."""
        return self.graph_cache.guards.epoch, checksum_of(self.graph_cache.guards.tensors)


def _why_none(whys: list[str]) -> str:
    if len(whys) == 1:
        return f"the package was exported for another call: {whys[0]}. Export one for it"
    listed = "; ".join(f"{number}. {why}" for number, why in enumerate(whys, start=1))
    return f"no package was exported for this call: {listed}. Export one for it"


def _config(manifests: list[Manifest], asked: Config | None) -> Config:
    """The configuration that the packages were exported with, or `asked` if their stages support it."""
    try:
        exported = [Config.from_dict(manifest.config) for manifest in manifests]
    except (TypeError, ValueError) as error:
        raise PackageError(f"the package's configuration is malformed ({error}): export again") from error
    if asked is None:
        asked = exported[0]
        if any(other != asked for other in exported):
            raise PackageError("the packages were exported with different configurations: choose one, load(config=...)")
    names = ("recompute", "forecasts", "disabled_passes")
    pairs = [(name, getattr(other, name), getattr(asked, name)) for other in exported for name in names]
    if different := differences(pairs):
        raise PackageError(f"the package's stages were made with another configuration: {different}. Export with it")
    most = max(manifest.parallel_steps.max for manifest in manifests)
    return replace(asked, max_parallel_steps=most, backend=exported[0].backend)
