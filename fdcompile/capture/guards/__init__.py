"""Guards: detect changes of a UNet since its graphs were captured."""

from fdcompile.capture.guards.checksum import checksum_of
from fdcompile.capture.guards.describe import fingerprint, replaced_code, user_state
from fdcompile.capture.guards.guards import Guards
from fdcompile.capture.guards.support import STATEFUL
from fdcompile.capture.guards.tensors import TensorGuard, equal

__all__ = ["STATEFUL", "Guards", "TensorGuard", "checksum_of", "equal", "fingerprint", "replaced_code", "user_state"]
