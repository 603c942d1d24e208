"""What answers a UNet's calls: a runner for each signature."""

from __future__ import annotations

import gc
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import fx, nn

from fdcompile.backends import check_backend
from fdcompile.backends.protocols import Backend
from fdcompile.capture.call import Signature, UNetCall
from fdcompile.capture.export import AnySize, StatefulError, capture_widest
from fdcompile.capture.guards import STATEFUL, Guards
from fdcompile.config import Config
from fdcompile.errors import CaptureError
from fdcompile.passes import enabled_passes
from fdcompile.runtime.compiled_runner import CompiledRunner
from fdcompile.runtime.layout import to_channels_last
from fdcompile.runtime.lru_cache import LRUCache
from fdcompile.runtime.runner import TRACING, ProgramRunner
from fdcompile.runtime.static_weights import StaticWeights

_log = logging.getLogger("fdcompile")


class GraphCache:
    """The graphs of one UNet, for all who run it.

    Attributes:
        unet: the UNet.
        guards: what is watched of it.
        epoch: that of the graphs.
        graphs: by call signature, the fixed one where the batch is fixed.
        static_weights: what the programs made of the graphs hold of the weights.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.guards = Guards(unet)
        self.epoch = self.guards.epoch
        self.graphs: LRUCache[fx.GraphModule] = LRUCache()
        self.static_weights = StaticWeights()
        self.unet = unet

    def follow_unet(self) -> None:
        """Drops the graphs, if the UNet is no longer what they were captured from."""
        self.guards.refresh()
        if self.guards.epoch != self.epoch:
            self.graphs.clear()
        self.epoch = self.guards.epoch
        self.static_weights.refresh()

    def graph(self, call: UNetCall, limit: int | None) -> tuple[Signature, fx.GraphModule]:
        """The graph that answers `call`, captured if it is not at hand, and what calls it serves.

        Of the others the `limit` - 1 used last are kept.
        """
        if self.graphs.find(call) is None:
            signature, graph = self.capture(call)
            self.graphs[signature] = graph
            self.graphs.trim(limit)
        return next(reversed(self.graphs.items()))

    def capture(self, call: UNetCall, sizes: AnySize | None = None) -> tuple[Signature, fx.GraphModule]:
        """The stock UNet's graph for `call`, for any batch if one can be had, and what calls it serves.

        With `sizes` it is for several heights and widths.

        Raises:
            CaptureError: the UNet cannot be exported.
            StatefulError: it keeps values from one call to the next, which ``guards.unsupported_reason`` then says.
        """
        with TRACING:
            self.guards.prepare_capture()
            try:
                captured = self._trace(call, sizes)
                if self.guards.touched():  # some only make a value at their first call: a second one changes nothing
                    after = Guards(self.unet)
                    after.refresh()
                    captured = self._trace_again(call, sizes)
                    if after.touched():
                        raise StatefulError(f"{type(self.unet).__name__} could not be exported: {STATEFUL}")
                return captured
            except StatefulError:
                self.guards.declare_stateful()
                raise
            finally:
                self.guards.undo_side_effects()

    def _trace(self, call: UNetCall, sizes: AnySize | None) -> tuple[Signature, fx.GraphModule]:
        # Had a graph for any batch been possible, there would be none for a fixed one.
        tried = any(own.batch is not None and own.leaves == call.signature.leaves for own in self.graphs)
        return capture_widest(self.unet, call, symbolic_batch=not tried, sizes=sizes)

    def _trace_again(self, call: UNetCall, sizes: AnySize | None) -> tuple[Signature, fx.GraphModule]:
        try:
            return self._trace(call, sizes)
        except CaptureError as error:  # it used what the trace before had left
            raise StatefulError(str(error)) from error


class NoProgram(Exception):
    """Nothing answers a call but the stock UNet; the message says why."""


class RunnerCache(ABC):
    """The runners that an executor may call.

    Attributes:
        graph_cache: of their UNet.
        runners: those at hand.
        dropped: how many were let go to make room.
    """

    def __init__(self, graph_cache: GraphCache) -> None:
        self.graph_cache = graph_cache
        self.runners: LRUCache[ProgramRunner] = LRUCache()
        self.dropped = 0

    def find(self, call: UNetCall) -> ProgramRunner | None:
        """The one that answers `call`, if it is at hand."""
        self.graph_cache.graphs.find(call)  # it is used, too
        return self.runners.find(call)

    @abstractmethod
    def make(self, call: UNetCall) -> ProgramRunner:
        """One that answers `call`, where none is at hand.

        Raises:
            CaptureError: the UNet cannot be exported.
            NoProgram: the stock UNet is to answer it.
            PackageError: all there are come out of packages, and these hold none.
        """

    @abstractmethod
    def follow_unet(self) -> None:
        """Drops what no longer stands for the UNet.

        Raises:
            PackageError: it comes out of a package.
        """

    def _make_room(self, limit: int | None) -> None:
        if dropped := self.runners.trim(limit):
            self.dropped += dropped
            gc.collect()  # a graph, its modules and its nodes refer to each other


class CompiledRunnerCache(RunnerCache):
    """Captured as calls need them, and compiled as `config` says."""

    def __init__(self, graph_cache: GraphCache, config: Config, backend: Callable[[torch.device], Backend]) -> None:
        super().__init__(graph_cache)
        check_backend(config.backend)
        enabled_passes(config.disabled_passes)  # refuses unknown ones before any work
        self._config = config
        self._backend = backend
        self._epoch = graph_cache.epoch

    def make(self, call: UNetCall) -> ProgramRunner:
        began = time.perf_counter()
        _log.info("capturing the UNet for %d latents of %s", call.batch, [*call.sample.shape[1:]])
        if call.sample.device.type == "cuda":
            to_channels_last(self.graph_cache.unet)
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
        if self._epoch != self.graph_cache.epoch:
            self.runners.clear()
        self._epoch = self.graph_cache.epoch

    def adopt(self, other: CompiledRunnerCache) -> None:
        """Takes over what was compiled of the same UNet for another config, as far as this one allows."""
        if self._config.program == other._config.program:
            self.runners, self._epoch, self.dropped = other.runners, other._epoch, other.dropped
            self._make_room(self._config.cache_size_limit)
            for runner in self.runners.values():
                runner.reconfigure(self._config)
