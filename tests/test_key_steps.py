"""Key-step schedules."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdcompile.key_steps import (
    FEW_STEPS,
    few_steps_warning,
    number_of_key_steps,
    paper_key_steps,
    parse_key_steps,
    resolve_key_steps,
)


def test_the_papers_own_sets() -> None:
    assert paper_key_steps(50) == (0, 1, 2, 3, 5, 10, 15, 25, 35)
    assert paper_key_steps(20) == (0, 1, 2, 3, 5, 10, 15)
    assert paper_key_steps(50, "paper-personalized") == (0, 1, 2, 3, 5, 10, 15, 25, 35, 40)


def test_the_papers_sets_for_deepfloyd_if() -> None:
    first, third = paper_key_steps(100, "paper-if-1"), paper_key_steps(75, "paper-if-3")
    assert first == tuple(i for i in range(100) if i < 10 or i > 85 or i % 5 == 0)
    assert third == tuple(k * (k + 3) // 2 for k in range(11))
    for num_steps in (50, 30):
        assert paper_key_steps(num_steps, "paper-if-2") == tuple(range(num_steps))


@given(
    st.integers(FEW_STEPS + 1, 1000),
    st.sampled_from([("paper", 15 / 50), ("paper-if-1", 0.05), ("paper-if-3", 11 / 75)]),
)
def test_rescaled_sets_keep_the_papers_longest_share(num_steps: int, preset: tuple[str, float]) -> None:
    keys = paper_key_steps(num_steps, preset[0])
    groups = [stop - start for start, stop in zip(keys, [*keys[1:], num_steps], strict=True)]
    assert keys[0] == 0
    assert min(groups) >= 1
    assert sum(groups) == num_steps
    assert max(groups) <= max(1, num_steps * preset[1])


def test_rescaled_set_is_denser_early() -> None:
    assert paper_key_steps(100) == (0, 2, 4, 6, 10, 20, 30, 50, 70)
    assert paper_key_steps(30) == (0, 1, 2, 3, 6, 9, 15, 21)


@pytest.mark.parametrize("num_steps", [1, 4, 5])
def test_few_steps_are_all_key_which_is_said(num_steps: int) -> None:
    assert paper_key_steps(num_steps) == tuple(range(num_steps))
    for choice in ("paper", "auto"):
        message = few_steps_warning(choice, num_steps)
        assert message is not None
        assert f"{num_steps} steps: every step is a key step" in message


def test_seven_of_few_steps_are_key_steps_by_default() -> None:
    assert [number_of_key_steps(0.5, steps) for steps in (3, 7, 8, 14, 20)] == [3, 7, 7, 7, 10]
    assert "7 steps: every step is a key step" in str(few_steps_warning("auto", 7))


@pytest.mark.parametrize(
    ("choice", "num_steps"), [("paper", 6), ("auto", 8), ("all", 4), ((0, 2), 4), (2, 4), ("paper-if-2", 50)]
)
def test_there_is_nothing_to_say_of_more_steps_or_another_choice(choice: Any, num_steps: int) -> None:
    assert few_steps_warning(choice, num_steps) is None


@pytest.mark.parametrize(
    ("choice", "num_steps", "expected"),
    [
        ("all", 4, (0, 1, 2, 3)),
        ("paper", 4, (0, 1, 2, 3)),
        (3, 7, (0, 3, 6)),
        (100, 7, (0,)),
        ([0, 2, 5], 7, (0, 2, 5)),
        (range(0, 6, 2), 7, (0, 2, 4)),
        (lambda n: range(0, n, 2), 5, (0, 2, 4)),
        (lambda n: np.arange(0, n, 2), 5, (0, 2, 4)),
        (lambda n: torch.arange(0, n, 2), 5, (0, 2, 4)),
    ],
)
def test_choices(choice: Any, num_steps: int, expected: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_key_steps(parse_key_steps(choice), num_steps) == expected


@pytest.mark.parametrize(
    ("choice", "plain"),
    [
        (np.int64(3), 3),
        (torch.tensor(3), 3),
        (np.array(3), 3),
        (np.array([0, 3, 7]), (0, 3, 7)),
        (torch.tensor([0, 3, 7]), (0, 3, 7)),
        ((np.int64(0), torch.tensor(3)), (0, 3)),
        ([0, 3], (0, 3)),
        (np.str_("all"), "all"),
    ],
)
def test_numbers_of_other_libraries_become_plain_ones(choice: Any, plain: Any) -> None:
    parsed = parse_key_steps(choice)
    assert parsed == plain
    assert {type(parsed)} | ({type(number) for number in parsed} if isinstance(parsed, tuple) else set()) <= {
        int,
        str,
        tuple,
    }


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("papers", "'papers'"),
        (0, "at least 1"),
        (-2, "at least 1"),
        (np.int64(0), "at least 1"),
        ((), "empty"),
        (np.array([], int), "empty"),
        ((1, 2), "must begin with 0"),
        ((0, 3, 2), "strictly increasing"),
        ((0, 3, 3), "strictly increasing"),
        (np.array([0, 3, 2]), "strictly increasing"),
    ],
)
def test_bad_choices_are_refused_at_once(choice: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_key_steps(choice)


@pytest.mark.parametrize(
    "choice",
    [
        *(None, True, 2.5, (0, 1.5), (0, True), {0, 1}, b"all", (0, "1")),
        *(np.float64(3.0), np.array([0.0, 3.0]), np.array([[0, 3]]), torch.tensor([True]), torch.tensor(2.5)),
    ],
)
def test_bad_types_are_refused_at_once(choice: Any) -> None:
    with pytest.raises(TypeError, match="key_steps"):
        parse_key_steps(choice)


@given(st.sets(st.integers(1, 60)), st.integers(1, 60))
def test_indices_beyond_the_run_are_not_reached(later: set[int], num_steps: int) -> None:
    """As in a run that starts late or ends early in the schedule that they were written for."""
    keys = (0, *sorted(later))
    assert resolve_key_steps(keys, num_steps) == tuple(key for key in range(num_steps) if key in keys)


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        (lambda n: (1, 2), ValueError, r"key_steps=\[1, 2\]: must begin with 0"),
        (lambda n: n // 2, TypeError, r"key_steps=.*: called with 10 steps it returned 5: expected step indices"),
        (lambda n: None, TypeError, r"returned None: expected step indices"),
        (lambda n: "all", TypeError, r"returned 'all': expected step indices"),
        (lambda n: (0, 2.5), TypeError, r"returned \(0, 2.5\): expected step indices"),
        (lambda n: {0, 3}, TypeError, r"returned \{0, 3\}: expected step indices"),
    ],
)
def test_a_callables_answer_is_checked(choice: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve_key_steps(choice, 10)
