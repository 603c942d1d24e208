"""Least recently used cache by call signature."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

from fdcompile.capture.call import Signature, UNetCall

Entry = TypeVar("Entry")


class LRUCache(OrderedDict[Signature, Entry]):
    """Entries by call signature, the most recently used at the end.

    Attributes:
        epoch: epoch of the guards that the entries were made in.
        dropped: number of entries dropped because of a size limit.
    """

    epoch = 0
    dropped = 0

    def follow(self, epoch: int) -> None:
        """Drops all entries if they were made in another epoch."""
        if epoch != self.epoch:
            self.clear()
        self.epoch = epoch

    def find(self, call: UNetCall) -> Entry | None:
        """The entry for any batch size, or for that of `call`; None if there is neither. Marks it as used."""
        signature = call.signature if call.signature in self else call.fixed_signature
        if signature not in self:
            return None
        self.move_to_end(signature)
        return self[signature]

    def trim(self, limit: int | None) -> int:
        """Drops the least recently used entries beyond `limit`, and returns their number."""
        excess = 0 if limit is None else max(0, len(self) - limit)
        for _ in range(excess):
            self.popitem(last=False)
        self.dropped += excess
        return excess
