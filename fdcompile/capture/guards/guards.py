"""Detects changes of a UNet since its graphs were captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fdcompile.capture.guards.snapshot import Snapshot
from fdcompile.capture.guards.support import STATEFUL


class Guards:
    """Guards of the graphs of `unet`: everything that they are specialized to (see `Snapshot`) but tensor contents.

    All of it is compared at the start of a run; what callbacks may change is also compared at each step.

    Attributes:
        epoch: number of the UNet's state at the last `refresh`. It increases when the state has changed, and returns to
            its previous value when a change was undone.
        unsupported_reason: reason why no graph can replace the UNet, or None.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.epoch = 0
        self.unsupported_reason: str | None = None
        self._unet = unet
        self._snapshot: Snapshot | None = None
        self._facts: list[Any] = []
        self._before: tuple[int, list[Any], Any] = (0, [], None)
        self._values_read = False
        self._epochs = 0
        self._stateful: str | None = None
        self._contents: list[tuple[torch.Tensor, torch.Tensor]] = []

    def refresh(self) -> None:
        """Brings `epoch` and `unsupported_reason` up to date."""
        if self._snapshot is not None and self._snapshot.untouched():
            self.unsupported_reason = self._stateful or self._snapshot.unsupported_reason
            return
        last, self._snapshot = self._snapshot, Snapshot(self._unet, self._values_read)
        self.unsupported_reason = self._stateful or self._snapshot.unsupported_reason
        if self._snapshot.facts == self._facts:
            return
        known, facts, _ = self._before
        kept = None if last is None else last.kept  # so that no other object gets an address that is in the facts
        self._before, self._facts = (self.epoch, self._facts, kept), self._snapshot.facts
        if self._facts == facts:
            self.epoch = known
        else:
            self._epochs = self.epoch = self._epochs + 1

    def changed_within_run(self) -> bool:
        """Whether a `refresh` is needed. This runs at every step."""
        return not self._current.untouched_within_run()

    def prepare_capture(self) -> None:
        """Before a capture: saves the contents of the tensors that Python code reaches and may write to."""
        self._contents = [(tensor, tensor.clone()) for tensor in self._current.tensors]

    def touched(self) -> bool:
        """Whether anything that Python code reaches has changed since `refresh`."""
        return not self._current.state.untouched()

    def undo_side_effects(self) -> None:
        """After a capture: restores what the capture or the UNet has replaced or written."""
        self._current.state.restore()
        with torch.no_grad():
            for tensor, content in self._contents:
                if not torch.equal(tensor, content):
                    tensor.copy_(content)
        self._contents = []

    def declare_values_read(self) -> None:
        """After a capture in which Python code has read values of tensors: makes them part of the UNet's state."""
        if not self._values_read:
            self._values_read = True
            self.rebase()

    def rebase(self) -> None:
        """Takes the present state for that of the current epoch, after a change that was made on purpose."""
        self._snapshot = Snapshot(self._unet, self._values_read)
        self._facts = self._snapshot.facts

    def declare_stateful(self) -> None:
        """Marks the UNet as stateful: every call changes it."""
        self.unsupported_reason = self._stateful = STATEFUL

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Tensors that Python code reaches, other than the modules', as of the last `refresh`."""
        return self._current.tensors

    @property
    def _current(self) -> Snapshot:
        if self._snapshot is None:
            self.refresh()
        assert self._snapshot is not None
        return self._snapshot
