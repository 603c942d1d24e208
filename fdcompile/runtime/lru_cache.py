"""What answers a UNet's calls, as many as are to be kept."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

from fdcompile.capture.call import Signature, UNetCall

Entry = TypeVar("Entry")


class LRUCache(OrderedDict[Signature, Entry]):
    """Entries by the signature of the calls that they answer, the one used last at the end."""

    def find(self, call: UNetCall) -> Entry | None:
        """The entry that answers `call`, for any batch or for its batch alone."""
        signature = call.signature if call.signature in self else call.fixed_signature
        if signature not in self:
            return None
        self.move_to_end(signature)
        return self[signature]

    def trim(self, limit: int | None) -> int:
        """Drops those least recently used, if there are more than `limit`. How many that are."""
        excess = 0 if limit is None else max(0, len(self) - limit)
        for _ in range(excess):
            self.popitem(last=False)
        return excess
