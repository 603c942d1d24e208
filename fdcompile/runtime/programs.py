"""What answers a UNet's calls: a staged UNet for each signature."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import fx, nn

from fdcompile.backends.protocols import Backend
from fdcompile.capture.call import Signature, UNetCall
from fdcompile.capture.export import capture_widest
from fdcompile.capture.structure import Structure
from fdcompile.config import Config
from fdcompile.runtime.compiled import CompiledUNet
from fdcompile.runtime.staged import TRACING, StagedUNet


class Programs(ABC):
    """The staged UNets that an executor may call.

    Attributes:
        structure: what is watched of the UNet.
        staged: those at hand, by the signature of the calls that they answer.
        captures: captured graphs by call signature, the fixed one where the batch is fixed.
        capturing: whether the UNet is being traced, so that its calls are not answered from here.
    """

    def __init__(self, unet: nn.Module, structure: Structure) -> None:
        self.structure = structure
        self.staged: dict[Signature, StagedUNet] = {}
        self.captures: dict[Signature, fx.GraphModule] = {}
        self.capturing = False
        self._unet = unet

    def find(self, call: UNetCall) -> StagedUNet | None:
        """The one that answers `call`, if it is at hand."""
        return self.staged.get(call.signature) or self.staged.get(call.fixed_signature)

    def capture(self, call: UNetCall) -> tuple[Signature, fx.GraphModule]:
        """The stock UNet's graph for `call`, for any batch if one can be had, and what calls it serves."""
        # Had a graph for any batch been possible, there would be none for a fixed one.
        tried = any(own.batch is not None and own.leaves == call.signature.leaves for own in self.captures)
        with TRACING:
            self.capturing = True
            try:
                for _ in range(2):  # what a UNet only makes at its first call is there at the second
                    captured = capture_widest(self._unet, call, symbolic_batch=not tried)
                    if not self.structure.undo_side_effects():
                        return captured
                self.structure.declare_stateful()
                return captured
            finally:
                self.capturing = False
                self.structure.undo_side_effects()

    @abstractmethod
    def make(self, call: UNetCall) -> StagedUNet:
        """One that answers `call`, where none is at hand.

        Raises:
            CaptureError: the UNet cannot be exported.
            PackageError: all there are come out of a package, and it holds none.
        """

    @abstractmethod
    def follow_unet(self) -> None:
        """Drops what no longer stands for the UNet, whose structure has changed.

        Raises:
            PackageError: it comes out of a package.
        """


class CapturedPrograms(Programs):
    """Captured from `unet` as calls need them, and compiled as `config` says."""

    def __init__(
        self, unet: nn.Module, structure: Structure, config: Config, backend: Callable[[torch.device], Backend]
    ) -> None:
        super().__init__(unet, structure)
        self._config = config
        self._backend = backend

    def make(self, call: UNetCall) -> StagedUNet:
        began = time.perf_counter()
        signature = next((own for own in (call.signature, call.fixed_signature) if own in self.captures), None)
        if signature is None:
            signature, graph_module = self.capture(call)
            self.captures[signature] = graph_module
        captured = time.perf_counter() - began
        compiled = CompiledUNet(self.captures[signature], self._config, self._backend(call.tensors[0].device))
        compiled.compile_seconds["capture"] = captured
        self.staged[signature] = compiled
        return compiled

    def follow_unet(self) -> None:
        self.captures, self.staged = {}, {}

    def adopt(self, other: CapturedPrograms) -> None:
        """Takes over what was captured of the same UNet for another config and, as far as this one allows, compiled."""
        self.captures, self.structure = other.captures, other.structure
        if self._config.program == other._config.program:
            self.staged = other.staged
            for compiled in self.staged.values():
                compiled.reconfigure(self._config)
