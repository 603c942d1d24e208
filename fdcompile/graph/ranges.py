"""Ranges of sizes that a graph serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.export import Dim


@dataclass(frozen=True)
class Range:
    """Smallest, usual and largest size of a dynamic axis."""

    min: int
    opt: int
    max: int

    @classmethod
    def parse(cls, name: str, value: Any) -> Range:
        """Parses the argument `name`: an int, or three ints in ascending order.

        Raises:
            ValueError: `value` is neither.
        """
        numbers = (value,) * 3 if type(value) is int else value
        whole = isinstance(numbers, tuple | list) and len(numbers) == 3 and all(type(n) is int for n in numbers)
        if not whole or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
            raise ValueError(f"{name}={value!r}: expected an int, or (min, opt, max) with 1 <= min <= opt <= max")
        return cls(*numbers)

    @property
    def fixed(self) -> bool:
        return self.min == self.max

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max

    def __str__(self) -> str:
        return f"{self.min}" if self.fixed else f"{self.min} to {self.max}"


@dataclass(frozen=True)
class Sides:
    """Heights and widths of latents that one graph serves.

    Attributes:
        latent_height: range of the number of rows.
        latent_width: range of the number of columns.
        latent_multiple: number that sides with a range are a multiple of, because the UNet halves them.
        pixels_per_latent: pixels of a side of the image per latent.
    """

    latent_height: Range
    latent_width: Range
    latent_multiple: int
    pixels_per_latent: int

    @property
    def ranges(self) -> dict[str, Range]:
        """Both ranges, by name in the shape of a `TensorSpec`."""
        return {"H": self.latent_height, "W": self.latent_width}

    def dims(self) -> dict[str, Any]:
        """Dynamic dimensions for ``torch.export``, in multiples of `latent_multiple`, of sides that are not fixed."""
        multiple = self.latent_multiple
        return {
            name: Dim(name.lower(), min=allowed.min // multiple, max=allowed.max // multiple)
            for name, allowed in self.ranges.items()
            if not allowed.fixed
        }

    def of(self, which: str) -> tuple[int, int]:
        """The smallest (``"min"``), usual (``"opt"``) or largest (``"max"``) height and width."""
        return getattr(self.latent_height, which), getattr(self.latent_width, which)

    def cells(self, height: int, width: int) -> int:
        """Area of latents of this size, in squares with sides of `latent_multiple`."""
        return height * width // self.latent_multiple**2

    def why_not(self, height: int, width: int) -> str | None:
        """Message, in pixels, if latents of this size are not supported; None if they are."""
        for name, allowed, size in (("height", self.latent_height, height), ("width", self.latent_width, width)):
            if size not in allowed or (not allowed.fixed and size % self.latent_multiple):
                pixels, step = self.pixels_per_latent, self.latent_multiple * self.pixels_per_latent
                taken = Range(pixels * allowed.min, pixels * allowed.opt, pixels * allowed.max)
                return f"{name}={pixels * size}: it takes {taken}{'' if allowed.fixed else f' in steps of {step}'}"
        return None
