"""The graphs captured of a UNet: one for each signature."""

from __future__ import annotations

from torch import fx, nn

from fdcompile.capture.call import Signature, UNetCall
from fdcompile.capture.export import AnySize, StatefulError, capture_widest
from fdcompile.capture.guards import STATEFUL, Guards
from fdcompile.errors import CaptureError
from fdcompile.runtime.lru_cache import LRUCache
from fdcompile.runtime.runner import TRACING
from fdcompile.runtime.static_weights import StaticWeights


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
        tried = any(
            signature.batch is not None and signature.leaves == call.signature.leaves for signature in self.graphs
        )
        return capture_widest(self.unet, call, symbolic_batch=not tried, sizes=sizes)

    def _trace_again(self, call: UNetCall, sizes: AnySize | None) -> tuple[Signature, fx.GraphModule]:
        try:
            return self._trace(call, sizes)
        except CaptureError as error:  # it used what the trace before had left
            raise StatefulError(str(error)) from error
