"""A configuration is refused when it is made."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from fdcompile import DECODER, PARTIAL_ENCODER, Config, NoiseInjection, Planned, deep_feature_caching
from fdcompile.backends.eager import EagerBackend

PLAN = Planned((900.0, 600.0, 300.0, 1.0), (0, 1, 3), ((1.0, 0.0), (1.0, 0.0), (1.9, -0.9), (1.0, 0.0)), (3.0, 5.0))
HELD = replace(PLAN, weights=None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_parallel_steps": 0}, ValueError, "max_parallel_steps=0"),
        ({"max_parallel_steps": 1.5}, TypeError, "max_parallel_steps=1.5"),
        ({"max_parallel_steps": True}, TypeError, "max_parallel_steps=True"),
        ({"noise_injection": 0.003}, TypeError, "noise_injection=0.003"),
        ({"recompute": "up_blocks"}, TypeError, "tuple of module paths"),
        ({"recompute": ("",)}, TypeError, "tuple of module paths"),
        ({"key_steps": (0, 2, 1)}, ValueError, "strictly increasing"),
        ({"recompute": 3}, TypeError, r"recompute=3: expected a tuple of module paths"),
        ({"recompute": {"up_blocks"}}, TypeError, r"recompute=\{'up_blocks'\}: expected a tuple of module paths"),
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
        ({"cache_size_limit": 0}, ValueError, r"cache_size_limit=0: expected at least 1"),
        ({"cache_size_limit": "all"}, TypeError, r"cache_size_limit='all': expected an int or None"),
        ({"forecast": "quadratic"}, ValueError, "forecast='quadratic': expected one of auto, hold, linear"),
        ({"work": 0}, ValueError, "work=0: expected a share of the steps .* fast, balanced, close"),
        ({"work": 1.5}, ValueError, "work=1.5: expected a share of the steps"),
        ({"work": "slow"}, ValueError, "work='slow': expected a share of the steps"),
        ({"work": None}, TypeError, "work=None: expected a share of the steps"),
        ({"work": 10**400}, ValueError, "work=1000.*: expected a share of the steps"),
        ({"memory_budget": np.ones(2)}, TypeError, r"memory_budget=array\(\[1., 1.\]\): expected a fraction"),
        ({"forecast": np.ones(2)}, ValueError, r"forecast=array\(\[1., 1.\]\): expected one of auto, hold, linear"),
        ({"noise_injection": np.ones(2)}, TypeError, r"noise_injection=array\(\[1., 1.\]\): expected None, 'auto'"),
        ({"strict": "no"}, TypeError, "strict='no': expected True or False"),
        ({"plan": (PLAN, 3)}, TypeError, "plan=.*expected a Planned, several, or None"),
        ({"plan": (PLAN, HELD)}, ValueError, "two plans are for the same schedule of 4 timesteps"),
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
    Config(key_steps=3, recompute=["up_blocks"], max_parallel_steps=1, noise_injection="auto", backend=EagerBackend())  # type: ignore[arg-type]
    assert (Config().key_steps, Config().recompute, Config().forecast) == ("auto", (), "auto")
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
            recompute=PARTIAL_ENCODER,
            max_parallel_steps=4,
            memory_budget=0.5,
            noise_injection=NoiseInjection(alpha=0.01, tau=0.25),
            backend="inductor",
            disabled_passes=("split_skips",),
        ),
        Config(key_steps=3, recompute=(), noise_injection="auto"),
    ],
)
def test_there_and_back_through_json(config: Config) -> None:
    text = json.dumps(config.to_dict())
    assert set(json.loads(text)) == {field.name for field in fields(Config)} - {"process_group"}
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
        ({"plan": {"start": 0}}, ValueError, r"Planned without 'timesteps': expected at least \['timesteps', 'key_st"),
        ("{}", TypeError, r"'\{\}': expected a dict, .*json.loads"),
    ],
)
def test_what_cannot_be_read_is_named(values: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"timesteps": ()}, ValueError, "step 3 is out of range, the schedule has 0 steps"),
        ({"timesteps": (900.0, float("nan"), 300.0, 1.0)}, ValueError, "timesteps=.*nan.*: expected finite numbers"),
        ({"key_steps": (1, 3)}, ValueError, "must begin with 0"),
        ({"key_steps": (0, 4)}, ValueError, "step 4 is out of range, the schedule has 4 steps"),
        ({"weights": ((1.0, 0.0),)}, ValueError, "expected a pair for each of 4 steps, not 1"),
        ({"weights": ((1.0, 0.1),) * 4}, ValueError, r"weights: \(1.0, 0.1\): expected pairs that sum to 1"),
        ({"weights": ((1.0,),) * 4}, ValueError, "expected pairs that sum to 1"),
        ({"weights": ((float("inf"), float("-inf")),) * 4}, ValueError, "weights=.*expected finite numbers"),
        ({"guidance": (5.0, 3.0)}, ValueError, r"guidance=\(5.0, 3.0\): expected the smallest and the largest"),
        ({"guidance": (5.0,)}, ValueError, "expected the smallest and the largest"),
        ({"timesteps": 5}, TypeError, "timesteps=5: expected the numbers of a schedule"),
        ({"timesteps": ("a",)}, TypeError, r"timesteps=\('a',\): expected the numbers of a schedule"),
        ({"timesteps": "4321"}, TypeError, "timesteps='4321': expected the numbers of a schedule"),
        ({"timesteps": (10**400, 3, 2, 1)}, ValueError, "timesteps=.*: expected finite numbers"),
        ({"key_steps": 0}, TypeError, r"key_steps=0: expected step indices such as \(0, 2, 4\)"),
        ({"key_steps": None}, TypeError, "key_steps=None: expected step indices"),
        ({"weights": 5}, TypeError, "weights=5: expected a pair of numbers for each step, or None"),
        ({"weights": (1, 2, 3)}, TypeError, "weights=1: expected a pair of numbers for each step, or None"),
        ({"guidance": 5}, TypeError, "guidance=5: expected the smallest and the largest guidance scale, or None"),
        ({"guidance": ("a", "b")}, TypeError, r"guidance=\('a', 'b'\): expected the smallest and the largest"),
        ({"made_for": 5}, TypeError, r"made_for=5: expected \(part, property, digest\) of each, or None"),
        ({"made_for": [1]}, TypeError, r"made_for=\[1\]: expected \(part, property, digest\) of each, or None"),
    ],
)
def test_a_bad_plan_is_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(PLAN, **changed)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("a",), TypeError, "num_blocks='a': expected an int"),
        ((2, 1.5), TypeError, "depth=1.5: expected an int"),
        ((0,), ValueError, "depth=1: expected 1 up to the number of levels, num_blocks=0"),
        ((2, 0), ValueError, "depth=0: expected 1 up to the number of levels, num_blocks=2"),
        ((2, 5), ValueError, "depth=5: expected 1 up to the number of levels, num_blocks=2"),
    ],
)
def test_deep_feature_caching_is_of_levels_that_exist(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        deep_feature_caching(*arguments)


def test_a_plan_survives_json() -> None:
    assert Planned(**json.loads(json.dumps(asdict(PLAN)))) == PLAN
    assert hash(Config(plan=[PLAN])) == hash(Config(plan=(PLAN,)))  # type: ignore[arg-type]


def test_a_plan_is_for_its_schedule_only() -> None:
    other = replace(PLAN, timesteps=(*PLAN.timesteps, 0.0), weights=None)
    config = Config(plan=(other, PLAN))
    assert config.plan_for(PLAN.timesteps) is PLAN
    assert config.plan_for([900.00001, 600.0, 300.0, 1.0]) is PLAN, "as another machine rounds it"
    assert config.plan_for([900.0, 600.0, 300.0, 2.0]) is None


def test_the_cut_and_the_forecast_follow_the_key_steps() -> None:
    assert (Config(key_steps="auto").recompute, Config(key_steps="auto").forecast) == ((), "auto")
    assert (Config(key_steps=3).recompute, Config(key_steps=3).forecast) == (DECODER, "hold")
    paper = Config.paper(max_parallel_steps=1)
    assert (paper.key_steps, paper.recompute, paper.forecast) == ("paper", DECODER, "hold")
    assert paper.max_parallel_steps == 1


def test_shares_of_the_work_have_names() -> None:
    assert Config(work="fast") == Config(work=0.4)  # type: ignore[arg-type]
