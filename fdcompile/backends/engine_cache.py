"""Cache of TensorRT engines and kernel timings on disk, shared by all packages."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import platformdirs

from fdcompile.backends.stored import StageExport
from fdcompile.graph.weights import tensor_bytes
from fdcompile.io import atomic_write

CACHE_VARIABLE = "FDCOMPILE_CACHE"
"""Environment variable with the folder of the cache; by default ``fdcompile`` in the user's cache folder."""

_MOST_BYTES = 16 << 30

_TOOLS = ("fdcompile", "torch", "torch-tensorrt", "torch_tensorrt", "onnx-ir", "onnxscript")


def cache_folder() -> Path:
    """Returns the folder of the cache, which it creates if necessary."""
    named = os.environ.get(CACHE_VARIABLE)
    folder = Path(named) if named else platformdirs.user_cache_path("fdcompile", appauthor=False)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class EngineCache:
    """Engines of one `builder`, for the device and TensorRT version in `made_with`.

    The key of an engine covers everything that it depends on: the graph of the stage with its constants, the weights,
    the profile, and the versions of the installed tools. Beyond 16 GiB the least recently used engines are deleted.
    """

    def __init__(self, builder: str, made_with: Mapping[str, str]) -> None:
        self.folder = cache_folder()
        versions = {tool.name: tool.version for tool in metadata.distributions() if tool.name in _TOOLS}
        self._origin = f"{builder} {sorted(made_with.items())} {sorted(versions.items())}"

    @property
    def timings(self) -> Path:
        """File of kernel timings, which TensorRT reads and writes."""
        return self.folder / f"{hashlib.sha256(self._origin.encode()).hexdigest()}.timings"

    def write(
        self,
        stages: Sequence[StageExport],
        folder: Path,
        progress: Callable[[str], None],
        build: Callable[[StageExport], bytes],
    ) -> None:
        """Writes the engines of `stages` to `folder`; `build` makes those that are not cached."""
        for stage in stages:
            progress(f"building stage {stage.name}")
            (folder / f"{stage.name}.engine").write_bytes(self.get(stage, functools.partial(build, stage)))

    def get(self, stage: StageExport, build: Callable[[], bytes]) -> bytes:
        """Returns the engine of `stage`; calls `build` if it is not cached."""
        path = self.folder / f"{self._key(stage)}.engine"
        if path.is_file():
            path.touch()
            return path.read_bytes()
        engine = build()
        with atomic_write(path) as partial:
            partial.write_bytes(engine)
        self._shrink()
        return engine

    def _key(self, stage: StageExport) -> str:
        digest = hashlib.sha256(self._origin.encode())
        inputs = [(example.dtype, sizes) for example, sizes in zip(stage.examples, stage.shapes, strict=True)]
        digest.update(f"{stage.program.graph} {inputs}".encode())
        for name, weight in stage.weights.items():
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(tensor_bytes(weight))
        return digest.hexdigest()

    def _shrink(self) -> None:
        total = 0
        for path in sorted(self.folder.glob("*.engine"), key=lambda path: path.stat().st_mtime, reverse=True):
            total += path.stat().st_size
            if total > _MOST_BYTES:
                path.unlink(missing_ok=True)
