"""Versions: the package's own, for its metadata, and those that are written to files of results."""

from __future__ import annotations

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    import diffusers  # loaded neither by `import fdcompile` nor to build the package
    import torch

    return {"fdcompile": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
