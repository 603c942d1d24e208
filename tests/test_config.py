"""A configuration is refused when it is made."""

from __future__ import annotations

from typing import Any

import pytest

from fdcompile import Config, NoiseInjection
from fdcompile.backends.eager import EagerBackend


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_parallel_steps": 0}, ValueError, "max_parallel_steps=0"),
        ({"max_parallel_steps": 1.5}, TypeError, "max_parallel_steps=1.5"),
        ({"max_parallel_steps": True}, TypeError, "max_parallel_steps=True"),
        ({"backend": "tensorflow"}, ValueError, "'tensorflow'.*auto, eager, inductor"),
        ({"backend": EagerBackend}, TypeError, "backend="),
        ({"backend": 3}, TypeError, "backend=3"),
        ({"noise_injection": 0.003}, TypeError, "noise_injection=0.003"),
        ({"fresh": "up_blocks"}, TypeError, "tuple of module paths"),
        ({"fresh": ("",)}, TypeError, "tuple of module paths"),
        (
            {"disabled_passes": ("bind",)},
            ValueError,
            r"\['bind'\]: expected names out of \['split_skips', 'share_guidance'\]",
        ),
        ({"key_steps": (0, 2, 1)}, ValueError, "strictly increasing"),
    ],
)
def test_bad_values(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Config(**arguments)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_alpha_must_be_finite(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha="):
        NoiseInjection(alpha=alpha)


@pytest.mark.parametrize("tau", [-0.1, 1.5, float("nan")])
def test_tau_is_a_fraction(tau: float) -> None:
    with pytest.raises(ValueError, match="tau="):
        NoiseInjection(tau=tau)


def test_good_values() -> None:
    Config(key_steps=3, fresh=["up_blocks"], max_parallel_steps=1, noise_injection="auto", backend=EagerBackend())  # type: ignore[arg-type]
    assert Config().key_steps == "paper"
    assert hash(Config()) == hash(Config())
