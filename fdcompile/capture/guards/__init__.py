"""Is the UNet still what its graphs were captured from?"""

from fdcompile.capture.guards.checksum import checksums
from fdcompile.capture.guards.guards import STATEFUL, Guards, fingerprint

__all__ = ["STATEFUL", "Guards", "checksums", "fingerprint"]
