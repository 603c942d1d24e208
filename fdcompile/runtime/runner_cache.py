"""Caches of runners, one for each call signature."""

from __future__ import annotations

import gc
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from fdcompile.backends import check_backend
from fdcompile.backends.protocols import Backend
from fdcompile.capture.call import UNetCall
from fdcompile.capture.export import StatefulError
from fdcompile.config import Config
from fdcompile.passes import enabled_passes
from fdcompile.runtime.compiled_runner import CompiledRunner
from fdcompile.runtime.graph_cache import GraphCache
from fdcompile.runtime.layout import to_channels_last
from fdcompile.runtime.lru_cache import LRUCache
from fdcompile.runtime.runner import ProgramRunner

_log = logging.getLogger("fdcompile")


class NoProgram(Exception):
    """No program can answer a call, and the stock UNet must run. The message gives the reason."""


class RunnerCache(ABC):
    """Runners that an executor may call.

    Attributes:
        graph_cache: graphs and guards of the UNet.
        runners: runners by call signature.
    """

    def __init__(self, graph_cache: GraphCache) -> None:
        self.graph_cache = graph_cache
        self.runners: LRUCache[ProgramRunner] = LRUCache()

    def get(self, call: UNetCall) -> ProgramRunner:
        """Returns the runner that answers `call`, made if it is not cached.

        Raises:
            NoProgram: the stock UNet must run.
            CaptureError, PackageError: see `make`.
        """
        self.graph_cache.graphs.find(call)  # marks the graph as used
        try:
            return self.runners.find(call) or self.make(call)
        except StatefulError as error:
            raise NoProgram(str(self.graph_cache.guards.unsupported_reason)) from error

    def begin_run(self) -> None:
        """Follows changes of the UNet, and resets the counts of the runners.

        Raises:
            PackageError: see `follow_unet`.
        """
        self.follow_unet()
        for runner in self.runners.values():
            runner.begin_run()

    @abstractmethod
    def make(self, call: UNetCall) -> ProgramRunner:
        """Makes and caches a runner that answers `call`.

        Raises:
            CaptureError: the UNet cannot be exported.
            NoProgram: the stock UNet must run.
            PackageError: no loaded package answers `call`.
        """

    @abstractmethod
    def follow_unet(self) -> None:
        """Drops runners that are out of date because the UNet has changed.

        Raises:
            PackageError: a loaded package does not match the changed UNet.
        """

    def _make_room(self, limit: int | None) -> None:
        if self.runners.trim(limit):
            gc.collect()  # a graph, its modules and its nodes refer to each other


class CompiledRunnerCache(RunnerCache):
    """Captures and compiles runners on demand, as configured by `config`."""

    def __init__(self, graph_cache: GraphCache, config: Config, backend: Callable[[torch.device], Backend]) -> None:
        super().__init__(graph_cache)
        check_backend(config.backend)
        enabled_passes(config.disabled_passes)  # refuses unknown ones before any work
        self._config = config
        self._backend = backend

    def make(self, call: UNetCall) -> ProgramRunner:
        began = time.perf_counter()
        _log.info("capturing the UNet for %d latents of %s", call.batch, [*call.sample.shape[1:]])
        if call.sample.device.type == "cuda":
            to_channels_last(self.graph_cache.unet)
            self.graph_cache.guards.rebase()
        signature, graph = self.graph_cache.graph(call, self._config.cache_size_limit)
        captured = time.perf_counter() - began
        backend = self._backend(call.tensors[0].device)
        runner = CompiledRunner(graph, self._config, backend, self.graph_cache.static_weights)
        runner.compile_seconds["capture"] = captured
        _log.info("captured in %.1f s, staged in %.1f s", captured, runner.compile_seconds["passes"])
        self.runners[signature] = runner
        self._make_room(self._config.cache_size_limit)
        return runner

    def follow_unet(self) -> None:
        self.graph_cache.follow_unet()
        self.runners.follow(self.graph_cache.guards.epoch)

    def adopt(self, other: RunnerCache) -> None:
        """Takes over the runners of `other`, a cache of the same UNet, if they have the same programs."""
        if isinstance(other, CompiledRunnerCache) and self._config.program == other._config.program:
            self.runners = other.runners
            self._make_room(self._config.cache_size_limit)
            for runner in self.runners.values():
                runner.reconfigure(self._config)
