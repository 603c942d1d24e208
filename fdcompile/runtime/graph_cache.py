"""Cache of the graphs captured from a UNet, one for each signature."""

from __future__ import annotations

from torch import fx, nn

from fdcompile.capture.call import Signature, UNetCall
from fdcompile.capture.export import AnySize, StatefulError, capture_widest
from fdcompile.capture.guards import STATEFUL, Guards
from fdcompile.capture.value_reads import VALUES_READ
from fdcompile.errors import CaptureError
from fdcompile.runtime.lru_cache import LRUCache
from fdcompile.runtime.runner import TRACING
from fdcompile.runtime.static_weights import StaticWeights


class GraphCache:
    """The graphs of one UNet, shared by all sessions that run it.

    Attributes:
        unet: the UNet.
        guards: the guards of its graphs.
        graphs: graphs by call signature, which includes the batch if that is fixed.
        static_weights: copies of parts of weights that the programs share.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.guards = Guards(unet)
        self.graphs: LRUCache[fx.GraphModule] = LRUCache()
        self.static_weights = StaticWeights()
        self.unet = unet

    def follow_unet(self) -> None:
        """Drops the graphs if the UNet has changed since they were captured, and refreshes the parts of weights."""
        self.guards.refresh()
        self.graphs.follow(self.guards.epoch)
        self.static_weights.refresh()

    def graph(self, call: UNetCall, limit: int | None) -> tuple[Signature, fx.GraphModule]:
        """Returns the graph that answers `call`, captured if it is not cached, and the signature that it serves.

        After a capture only the `limit` most recently used graphs are kept.
        """
        if self.graphs.find(call) is None:
            signature, graph = self.capture(call)
            self.graphs[signature] = graph
            self.graphs.trim(limit)
        return next(reversed(self.graphs.items()))

    def capture(self, call: UNetCall, sizes: AnySize | None = None) -> tuple[Signature, fx.GraphModule]:
        """Captures the stock UNet for `call`, with a symbolic batch size if possible.

        With `sizes` the graph serves several heights and widths.

        Returns:
            The signature that the graph serves, and the graph.

        Raises:
            CaptureError: the UNet cannot be exported.
            StatefulError: the UNet keeps values from one call to the next; ``guards.unsupported_reason`` is set.
        """
        with TRACING:
            self.guards.prepare_capture()
            try:
                captured = self._trace(call, sizes)
                if self.guards.touched():  # by a value that is only made at the first call, or at every call
                    after = Guards(self.unet)
                    after.refresh()
                    captured = self._trace_again(call, sizes)
                    if after.touched():
                        raise StatefulError(f"{type(self.unet).__name__} could not be exported: {STATEFUL}")
            except StatefulError:
                self.guards.declare_stateful()
                raise
            finally:
                self.guards.undo_side_effects()
            if captured[1].meta.get(VALUES_READ):
                self.guards.declare_values_read()
            return captured

    def _trace(self, call: UNetCall, sizes: AnySize | None) -> tuple[Signature, fx.GraphModule]:
        # A graph with a fixed batch size means that a symbolic one has failed.
        tried = any(
            signature.batch is not None and signature.leaves == call.signature.leaves for signature in self.graphs
        )
        return capture_widest(self.unet, call, symbolic_batch=not tried, sizes=sizes)

    def _trace_again(self, call: UNetCall, sizes: AnySize | None) -> tuple[Signature, fx.GraphModule]:
        try:
            return self._trace(call, sizes)
        except CaptureError as error:  # it read values that the first trace left behind
            raise StatefulError(str(error)) from error
