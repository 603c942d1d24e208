"""Key-step schedules."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdcompile.key_steps import FEW_STEPS, check_key_steps, paper_key_steps, resolve_key_steps


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
def test_few_steps_are_all_key_and_warn(num_steps: int) -> None:
    with pytest.warns(UserWarning, match="every step is a key step"):
        assert paper_key_steps(num_steps) == tuple(range(num_steps))


@pytest.mark.parametrize(
    ("choice", "num_steps", "expected"),
    [
        ("all", 4, (0, 1, 2, 3)),
        (3, 7, (0, 3, 6)),
        (100, 7, (0,)),
        ([0, 2, 5], 7, (0, 2, 5)),
        (lambda n: range(0, n, 2), 5, (0, 2, 4)),
    ],
)
def test_choices(choice: Any, num_steps: int, expected: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_key_steps(choice)
        assert resolve_key_steps(choice, num_steps) == expected


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("papers", "'papers'"),
        (0, "at least 1"),
        (-2, "at least 1"),
        ((), "empty"),
        ((1, 2), "must begin with 0"),
        ((0, 3, 2), "strictly increasing"),
        ((0, 3, 3), "strictly increasing"),
    ],
)
def test_bad_choices_are_refused_at_once(choice: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_key_steps(choice)


@pytest.mark.parametrize("choice", [None, True, 2.5, (0, 1.5), {0, 1}])
def test_bad_types_are_refused_at_once(choice: Any) -> None:
    with pytest.raises(TypeError, match="key_steps"):
        check_key_steps(choice)


def test_indices_beyond_the_run_are_refused() -> None:
    with pytest.raises(ValueError, match="step 35 is out of range, this run has 20 steps"):
        resolve_key_steps((0, 10, 35), 20)


def test_a_callables_answer_is_checked() -> None:
    with pytest.raises(ValueError, match="must begin with 0"):
        resolve_key_steps(lambda n: (1, 2), 10)
