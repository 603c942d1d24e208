"""A configuration is refused when it is made."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from fdcompile import PARTIAL_ENCODER, Config, NoiseInjection
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
        ({"fresh": None}, TypeError, r"fresh=None: expected a tuple of module paths"),
        ({"fresh": 3}, TypeError, r"fresh=3: expected a tuple of module paths"),
        ({"fresh": {"up_blocks"}}, TypeError, r"fresh=\{'up_blocks'\}: expected a tuple of module paths"),
        ({"disabled_passes": "split_skips"}, TypeError, r"disabled_passes='split_skips': expected a tuple of names"),
        ({"disabled_passes": None}, TypeError, r"disabled_passes=None: expected a tuple of names"),
        ({"disabled_passes": (3,)}, TypeError, r"disabled_passes=\(3,\): expected a tuple of names"),
        ({"memory_budget": "1GB"}, TypeError, r"memory_budget='1GB': expected a fraction .* such as 0.15"),
        ({"memory_budget": None}, TypeError, r"memory_budget=None: expected a fraction"),
        ({"memory_budget": True}, TypeError, r"memory_budget=True: expected a fraction"),
        ({"memory_budget": -0.1}, ValueError, r"memory_budget=-0.1: expected a fraction"),
        ({"memory_budget": float("nan")}, ValueError, r"memory_budget=nan: expected a fraction"),
        ({"max_parallel_steps": None}, TypeError, r"max_parallel_steps=None"),
        ({"max_parallel_steps": "many"}, TypeError, r"max_parallel_steps='many'"),
    ],
)
def test_bad_values(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Config(**arguments)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -1, -0.003])
def test_alpha_is_finite_and_not_negative(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha=.*: expected .* such as the paper's 0.003"):
        NoiseInjection(alpha=alpha)


@pytest.mark.parametrize("tau", [-0.1, 1.5, float("nan")])
def test_tau_is_a_fraction(tau: float) -> None:
    with pytest.raises(ValueError, match="tau="):
        NoiseInjection(tau=tau)


@pytest.mark.parametrize("name", ["alpha", "tau"])
@pytest.mark.parametrize("value", ["0.5", None, True])
def test_noise_injection_takes_numbers(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}={value!r}: expected"):
        NoiseInjection(**{name: value})


def test_good_values() -> None:
    Config(key_steps=3, fresh=["up_blocks"], max_parallel_steps=1, noise_injection="auto", backend=EagerBackend())  # type: ignore[arg-type]
    assert Config().key_steps == "paper"
    assert hash(Config()) == hash(Config())
    assert hash(Config(key_steps=[0, 3])) == hash(Config(key_steps=(0, 3)))


def test_numbers_of_other_libraries_are_plain_ones() -> None:
    plain = Config(key_steps=(0, 3, 7), max_parallel_steps=4, memory_budget=0.5)
    for steps, most in ((np.array([0, 3, 7]), np.int64(4)), (torch.tensor([0, 3, 7]), torch.tensor(4))):
        config = Config(key_steps=steps, max_parallel_steps=most, memory_budget=np.float32(0.5))  # type: ignore[arg-type]
        assert config == plain
        assert json.dumps(config.to_dict()) == json.dumps(plain.to_dict())


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(
            key_steps=(0, 3, 7),
            fresh=PARTIAL_ENCODER,
            max_parallel_steps=4,
            memory_budget=0.5,
            noise_injection=NoiseInjection(alpha=0.01, tau=0.25),
            backend="inductor",
            disabled_passes=("split_skips",),
        ),
        Config(key_steps=3, fresh=(), noise_injection="auto"),
    ],
)
def test_there_and_back_through_json(config: Config) -> None:
    text = json.dumps(config.to_dict())
    assert set(json.loads(text)) == {field.name for field in fields(Config)}
    assert Config.from_dict(json.loads(text)) == config


def test_what_is_left_out_has_its_default() -> None:
    assert Config.from_dict({"key_steps": 3}) == Config(key_steps=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key_steps": lambda n: (0,)}, r"key_steps=<function .*>: a function cannot be written: give its steps"),
        ({"backend": EagerBackend()}, r"backend=<.*EagerBackend.*>: a backend object cannot be written: give a name"),
    ],
)
def test_what_cannot_be_written_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**arguments).to_dict()


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"key_step": 3}, ValueError, r"Config has no 'key_step': expected names out of .*key_steps"),
        ({"noise_injection": {"alfa": 1}}, ValueError, r"NoiseInjection has no 'alfa': expected names out of .*alpha"),
        ({"memory_budget": "1GB"}, TypeError, r"memory_budget='1GB'"),
        (["key_steps"], TypeError, r"\['key_steps'\]: expected a dict"),
        ("{}", TypeError, r"'\{\}': expected a dict, .*json.loads"),
    ],
)
def test_what_cannot_be_read_is_named(values: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Config.from_dict(values)
