"""At which steps the encoder runs."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

Preset = Literal["paper", "paper-personalized", "paper-if-1", "paper-if-2", "paper-if-3", "all"]

Choice = Preset | int | Sequence[int] | Callable[[int], Sequence[int]]
"""What a user may ask for; see `fdcompile.Config`."""

PAPER: dict[str, dict[int, tuple[int, ...]]] = {
    "paper": {50: (0, 1, 2, 3, 5, 10, 15, 25, 35), 20: (0, 1, 2, 3, 5, 10, 15)},
    "paper-personalized": {50: (0, 1, 2, 3, 5, 10, 15, 25, 35, 40)},
    "paper-if-1": {100: (*range(10), *range(10, 85, 5), *range(85, 100))},
    "paper-if-2": {50: tuple(range(50))},
    "paper-if-3": {75: (0, 2, 5, 9, 14, 20, 27, 35, 44, 54, 65)},
}
"""The paper's own sets (Supp. C.1) by number of steps, as indices counted from the first step."""

FEW_STEPS = 5
"""At so few steps encoder propagation loses quality (paper, Sec. 5, Limitations)."""


def paper_key_steps(num_steps: int, preset: str = "paper") -> tuple[int, ...]:
    """The paper's key steps for a run of `num_steps` steps.

    Sets for some numbers of steps are the paper's. For any other number the preset's first set is scaled, rounding up,
    and a key step is added wherever a group would be longer than that set's longest share of a run (15 of 50 steps).
    """
    sets = PAPER[preset]
    if num_steps in sets:
        return sets[num_steps]
    if num_steps <= FEW_STEPS:
        warnings.warn(
            f"{num_steps} steps: every step is a key step, because encoder propagation loses quality at so few steps "
            f"(Faster Diffusion, Limitations); pass key_steps explicitly to propagate all the same",
            stacklevel=2,
        )
        return tuple(range(num_steps))
    steps, indices = next(iter(sets.items()))
    longest = max(later - earlier for earlier, later in itertools.pairwise((*indices, steps)))
    cap = max(1, num_steps * longest // steps)
    keys: list[int] = []
    for scaled in [*(math.ceil(index * num_steps / steps) for index in indices), num_steps]:
        while keys and scaled - keys[-1] > cap:
            keys.append(keys[-1] + cap)
        if scaled < num_steps and (not keys or scaled > keys[-1]):
            keys.append(scaled)
    return tuple(keys)


def check_key_steps(key_steps: object) -> None:
    """Refuses what can be seen to be wrong before the number of steps is known.

    Raises:
        ValueError, TypeError: naming the value and what was expected.
    """
    if isinstance(key_steps, str):
        if key_steps not in (*PAPER, "all"):
            raise ValueError(f"key_steps={key_steps!r}: known presets are {', '.join(map(repr, (*PAPER, 'all')))}")
    elif isinstance(key_steps, bool) or not (isinstance(key_steps, int | Sequence) or callable(key_steps)):
        raise TypeError(f"key_steps={key_steps!r}: expected a preset's name, an int, step indices or a callable")
    elif isinstance(key_steps, int):
        if key_steps < 1:
            raise ValueError(f"key_steps={key_steps}: a uniform stride must be at least 1")
    elif isinstance(key_steps, Sequence):
        _check_indices(key_steps)


def _check_indices(indices: Sequence[Any]) -> None:
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
        raise TypeError(f"key_steps={indices!r}: step indices must be ints")
    if not indices:
        raise ValueError("key_steps is empty: it must contain at least step 0")
    if indices[0] != 0:
        raise ValueError(f"key_steps={list(indices)}: must begin with 0, there is nothing to reuse before it")
    if any(later <= earlier for earlier, later in itertools.pairwise(indices)):
        raise ValueError(f"key_steps={list(indices)}: step indices must be strictly increasing")


def resolve_key_steps(choice: Choice, num_steps: int) -> tuple[int, ...]:
    """Key steps of a run of `num_steps` steps.

    Raises:
        ValueError: an index is not a step of this run, or a callable returned an invalid set.
    """
    if choice == "all":
        return tuple(range(num_steps))
    if isinstance(choice, str):
        return paper_key_steps(num_steps, choice)
    if isinstance(choice, int):
        return tuple(range(0, num_steps, choice))
    indices = tuple(choice(num_steps) if callable(choice) else choice)
    _check_indices(indices)
    if indices[-1] >= num_steps:
        raise ValueError(
            f"key_steps={list(indices)}: step {indices[-1]} is out of range, this run has {num_steps} steps "
            f"(0 to {num_steps - 1})"
        )
    return indices
