"""Key steps: the steps at which the encoder runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

Preset = Literal["auto", "paper", "paper-personalized", "paper-if-1", "paper-if-2", "paper-if-3", "all"]

PRESETS: tuple[str, ...] = get_args(Preset)

Choice = Preset | int | Sequence[int] | Callable[[int], Sequence[int]]
"""Values of ``Config.key_steps``."""

PAPER: dict[str, dict[int, tuple[int, ...]]] = {
    "paper": {50: (0, 1, 2, 3, 5, 10, 15, 25, 35), 20: (0, 1, 2, 3, 5, 10, 15)},
    "paper-personalized": {50: (0, 1, 2, 3, 5, 10, 15, 25, 35, 40)},
    "paper-if-1": {100: (*range(10), *range(10, 85, 5), *range(85, 100))},
    "paper-if-2": {50: tuple(range(50))},
    "paper-if-3": {75: (0, 2, 5, 9, 14, 20, 27, 35, 44, 54, 65)},
}
"""The paper's key steps (Supp. C.1) by number of steps, as indices from the first step."""

FEW_STEPS = 5
"""Number of steps up to which reuse loses quality (paper, Sec. 5, Limitations)."""

FEWEST_KEY_STEPS = 7
"""Smallest number of key steps of ``"auto"``. With fewer, under strong guidance, as many stock steps are better."""


def paper_key_steps(num_steps: int, preset: str = "paper") -> tuple[int, ...]:
    """The paper's key steps for a run of `num_steps` steps.

    For numbers of steps that are not in the paper, the first set of the preset is scaled, rounding up, and key steps
    are added where a group would be longer than the longest group of that set as a share of the run (15 of 50 steps).
    With `FEW_STEPS` or fewer steps, every step is a key step.
    """
    sets = PAPER[preset]
    if num_steps in sets:
        return sets[num_steps]
    if num_steps <= FEW_STEPS:
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


def number_of_key_steps(work: float, num_steps: int) -> int:
    """Number of key steps of ``"auto"``: the share `work` of `num_steps` steps, but at least `FEWEST_KEY_STEPS`."""
    return min(num_steps, max(FEWEST_KEY_STEPS, round(work * num_steps)))


def few_steps_warning(choice: object, num_steps: int) -> str | None:
    """Warning if a preset makes every step a key step because there are few steps; None otherwise."""
    few = max(FEW_STEPS, FEWEST_KEY_STEPS) if choice == "auto" else FEW_STEPS
    if (
        num_steps > few
        or not isinstance(choice, str)
        or choice not in ("auto", *PAPER)
        or num_steps in PAPER.get(choice, ())
    ):
        return None
    return (
        f"{num_steps} steps: every step is a key step, because reuse loses quality at so few steps "
        f"(Faster Diffusion, Limitations); pass key_steps explicitly to reuse all the same"
    )


def parse_key_steps(value: Any) -> Choice:
    """Converts integers, arrays and tensors of numpy and torch to plain ints and tuples, and checks `value`.

    The checks are those that do not depend on the number of steps.

    Raises:
        ValueError, TypeError: `value` is invalid; the message names it and what was expected.
    """
    plain = as_builtin(value)
    if isinstance(plain, str):
        if plain not in PRESETS:
            raise ValueError(f"key_steps={plain!r}: known presets are {', '.join(map(repr, PRESETS))}")
    elif type(plain) is int:
        if plain < 1:
            raise ValueError(f"key_steps={plain}: a uniform stride must be at least 1")
    elif isinstance(plain, tuple):
        if not all(type(index) is int for index in plain):
            raise TypeError(f"key_steps={value!r}: step indices must be ints")
        _check_indices(plain)
    elif not callable(plain):
        raise TypeError(f"key_steps={value!r}: expected a preset's name, an int, step indices or a callable")
    choice: Choice = plain
    return choice


def as_builtin(value: Any) -> Any:
    """Converts numbers, arrays and tensors to Python's types, and sequences to tuples."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(map(as_builtin, value))
    return value


def _check_indices(indices: tuple[int, ...]) -> None:
    if not indices:
        raise ValueError("key_steps is empty: it must contain at least step 0")
    if indices[0] != 0:
        raise ValueError(f"key_steps={list(indices)}: must begin with 0, there is nothing to reuse before it")
    if any(later <= earlier for earlier, later in itertools.pairwise(indices)):
        raise ValueError(f"key_steps={list(indices)}: step indices must be strictly increasing")


def resolve_key_steps(choice: Choice, num_steps: int) -> tuple[int, ...]:
    """Key steps of a run of `num_steps` steps, as indices from its first step. Indices beyond its end are ignored.

    Raises:
        ValueError, TypeError: a callable returned invalid indices.
    """
    if choice == "all":
        return tuple(range(num_steps))
    if isinstance(choice, str):
        return paper_key_steps(num_steps, choice)
    if isinstance(choice, int):
        return tuple(range(0, num_steps, choice))
    if callable(choice):
        choice = _ask(choice, num_steps)
    return tuple(index for index in choice if index < num_steps)


def _ask(choose: Callable[[int], Any], num_steps: int) -> tuple[int, ...]:
    answer = choose(num_steps)
    indices = as_builtin(answer)
    if not isinstance(indices, tuple) or not all(type(index) is int for index in indices):
        raise TypeError(
            f"key_steps={choose!r}: called with {num_steps} steps it returned {answer!r}: "
            f"expected step indices such as (0, 2, 4)"
        )
    _check_indices(indices)
    return indices
