"""Manifest of a package, ``manifest.json``, which is checked before any other file is opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fdcompile.backends import FORMATS
from fdcompile.backends.stored import PackagedStage, Polynomial
from fdcompile.errors import PackageError
from fdcompile.graph.program import ProgramSpec, TensorSpec
from fdcompile.graph.ranges import Range, Sides

SCHEMA = 4
FILE = "manifest.json"


_UNET = {"class", "configuration", "modules", "weights"}
"""Names of the digests of a UNet."""


@dataclass(frozen=True)
class Manifest:
    """Description of a package.

    Attributes:
        schema: version of the manifest's layout.
        format: format of the package, one of `FORMATS`.
        made_with: versions of libraries, and the device that the package is for.
        unet: class of the UNet, and digests of its configuration, its modules and its weights.
        signature: arguments of supported calls: path, and value or type and shape of each.
        config: configuration.
        latents: range of the UNet's batch size; guidance doubles that of the pipeline.
        parallel_steps: range of the number of steps to decode at once.
        sides: heights and widths; None for those in `signature`.
        inputs: tensor inputs of the UNet.
        output: name of the prediction.
        stages: stages by name, in the order in which a key step runs them.
        stock_flops: FLOPs of the stock UNet per latent, as a polynomial in the area (see `Sides.cells`).
        files: sha256 of each file.
        description: further description of the files by the format.
        state: digests of the state that user code in the UNet reads, by name (see `user_state`).
    """

    schema: int
    format: str
    made_with: dict[str, str]
    unet: dict[str, str]
    signature: list[dict[str, Any]]
    config: dict[str, Any]
    latents: Range
    parallel_steps: Range
    sides: Sides | None
    inputs: tuple[TensorSpec, ...]
    output: str
    stages: dict[str, PackagedStage]
    stock_flops: Polynomial
    files: dict[str, str]
    description: dict[str, Any]
    state: dict[str, str]

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r}: expected one of {', '.join(FORMATS)}")
        if any(Path(name).name != name for name in self.files):
            raise ValueError("a file lies outside of the package")
        if missing := _UNET - self.unet.keys():
            raise ValueError(f"the digests of the UNet lack {', '.join(sorted(missing))}")

    @property
    def program(self) -> ProgramSpec:
        return ProgramSpec(self.inputs, self.stages, self.output)

    def write(self, folder: Path) -> None:
        (folder / FILE).write_bytes(_ADAPTER.dump_json(self, indent=1) + b"\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads the manifest in `folder`.

        Raises:
            PackageError: it does not exist, has another schema, or is malformed.
        """
        path = folder / FILE
        if not path.is_file():
            raise PackageError(f"{folder}: no package (no {FILE}): make one with fdcompile.export(pipe, directory)")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            schema = values["schema"]
        except (ValueError, KeyError, TypeError) as error:
            raise PackageError(f"{path} is damaged ({error}): export again") from error
        if schema != SCHEMA:
            raise PackageError(f"{path} has schema {schema!r}, this fdcompile reads {SCHEMA}: export again")
        try:
            return _ADAPTER.validate_python(values)
        except ValidationError as error:
            listed = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
            raise PackageError(f"{path} is malformed ({listed}): export again") from error

    def check_files(self, folder: Path) -> None:
        """Checks every listed file.

        Raises:
            PackageError: a file is missing or damaged.
        """
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                raise PackageError(f"{path} is missing: export again")
            if (actual := file_digest(path)) != expected:
                raise PackageError(
                    f"{path} is damaged: sha256 {actual[:12]}, the manifest says {expected[:12]}: export again"
                )


_ADAPTER = TypeAdapter(Manifest)


def file_digest(path: Path) -> str:
    """Sha256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(pairs: Iterable[tuple[str, object, object]]) -> str:
    """Formats those of `pairs` (name, package's value, pipeline's value) that differ; empty if none does."""
    return "; ".join(
        f"{what}: the package has {packaged}, the pipe {other}" for what, packaged, other in pairs if packaged != other
    )
