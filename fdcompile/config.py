"""Configuration. Values are checked when it is made, names of modules, passes and backends by `optimize`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from numbers import Real
from typing import Any, Literal, TypeVar, cast, get_args

import torch

from fdcompile.key_steps import Choice, as_builtin, parse_key_steps, resolve_key_steps

Read = TypeVar("Read")

DECODER = ("up_blocks", "conv_norm_out", "conv_act", "conv_out")
"""Encoder propagation (paper, Sec. 3.3): only the decoder is recomputed at every step."""

PARTIAL_ENCODER = ("conv_in", "down_blocks.0", *DECODER)
"""Partial encoder propagation: the shallow encoder is also recomputed; deep encoder and bottleneck are reused."""


def deep_feature_caching(num_blocks: int, depth: int = 1) -> tuple[str, ...]:
    """Deep-feature caching (DeepCache): returns a cut that recomputes the outermost `depth` of `num_blocks` levels.

    Raises:
        ValueError, TypeError: `depth` is not 1 to `num_blocks`.
    """
    for name, value in (("num_blocks", num_blocks), ("depth", depth)):
        if type(value) is not int:
            raise TypeError(f"{name}={value!r}: expected an int")
    if not 1 <= depth <= num_blocks:
        raise ValueError(f"depth={depth}: expected 1 up to the number of levels, num_blocks={num_blocks}")
    down = (f"down_blocks.{level}" for level in range(depth))
    up = (f"up_blocks.{level}" for level in range(num_blocks - depth, num_blocks))
    return ("conv_in", *down, *up, "conv_norm_out", "conv_act", "conv_out")


@dataclass(frozen=True)
class NoiseInjection:
    """Prior noise injection (paper, Sec. 3.3): ``z_t + alpha * z_T`` before the scheduler's step.

    Attributes:
        alpha: scale of the initial latent ``z_T``.
        tau: fraction of the training timesteps below which noise is injected.

    Raises:
        ValueError: `alpha` is negative or not finite, or `tau` is outside of [0, 1].
        TypeError: `alpha` or `tau` is not a number.
    """

    alpha: float = 0.003
    tau: float = 0.5

    def __post_init__(self) -> None:
        replace = partial(object.__setattr__, self)
        replace("alpha", _number("alpha", self.alpha, "a number of at least 0, such as the paper's 0.003"))
        replace("tau", _number("tau", self.tau, "a fraction of the training timesteps between 0 and 1", most=1.0))


Forecast = Literal["auto", "hold", "linear"]

WORK = {"fast": 0.4, "balanced": 0.5, "close": 0.6}
"""Named values of ``Config.work``."""


@dataclass(frozen=True)
class Planned:
    """Key steps and forecast weights of a plan for one schedule. Lists are converted to tuples, for JSON.

    Attributes:
        timesteps: the whole schedule, ``scheduler.timesteps``.
        key_steps: key steps, as indices into `timesteps`; the first is 0.
        weights: for each step, the weights of the features of the last key step and of the key step before it, which
            sum to one. Weights at key steps and before the second key step are not used. None: features are held.
        guidance: smallest and largest guidance scale of the calls that the plan was made with; None for pipelines
            without guidance.
        start: first step of those calls; not 0 for img2img. The plan does not apply to runs that start earlier.
        made_for: digests (part, property, digest) of the UNet and the scheduler that the plan was made with. None:
            unknown, not compared.

    Raises:
        ValueError, TypeError: a value is invalid; the message names it and what was expected.
    """

    timesteps: tuple[float, ...]
    key_steps: tuple[int, ...]
    weights: tuple[tuple[float, float], ...] | None
    guidance: tuple[float, float] | None
    start: int = 0
    made_for: tuple[tuple[str, str, str], ...] | None = None

    def __post_init__(self) -> None:
        replace = partial(object.__setattr__, self)
        timesteps = _finite("timesteps", self.timesteps, "the numbers of a schedule")
        indices = _tuple("key_steps", self.key_steps, "step indices such as (0, 2, 4)")
        key_steps = cast("tuple[int, ...]", parse_key_steps(indices))
        if key_steps[-1] >= len(timesteps):
            raise ValueError(
                f"key_steps={key_steps}: step {key_steps[-1]} is out of range, the schedule has {len(timesteps)} steps"
            )
        replace("timesteps", timesteps)
        replace("key_steps", key_steps)
        if self.weights is not None:
            expected = "a pair of numbers for each step, or None"
            weights = tuple(_finite("weights", pair, expected) for pair in _tuple("weights", self.weights, expected))
            if len(weights) != len(timesteps):
                raise ValueError(f"weights: expected a pair for each of {len(timesteps)} steps, not {len(weights)}")
            if wrong := [pair for pair in weights if len(pair) != 2 or not math.isclose(sum(pair), 1, abs_tol=1e-6)]:
                raise ValueError(f"weights: {wrong[0]}: expected pairs that sum to 1")
            replace("weights", weights)
        if self.guidance is not None:
            expected = "the smallest and the largest guidance scale, or None"
            guidance = _finite("guidance", self.guidance, expected)
            if len(guidance) != 2 or guidance[0] > guidance[1]:
                raise ValueError(f"guidance={guidance}: expected {expected}")
            replace("guidance", guidance)
        if type(self.start) is not int or not 0 <= self.start < len(timesteps):
            raise ValueError(f"start={self.start!r}: expected one of the steps 0 to {len(timesteps) - 1}")
        if self.made_for is not None:
            expected = "(part, property, digest) of each, or None"
            made_for = _tuple("made_for", self.made_for, expected)
            if not all(isinstance(digest, tuple) and [*map(type, digest)] == [str] * 3 for digest in made_for):
                raise TypeError(f"made_for={self.made_for!r}: expected {expected}")
            replace("made_for", made_for)

    def is_for(self, timesteps: Sequence[float]) -> bool:
        """Whether `timesteps` is this schedule, within the precision of float32."""
        pairs = zip(self.timesteps, timesteps, strict=False)
        return len(self.timesteps) == len(timesteps) and all(math.isclose(*pair, rel_tol=1e-6) for pair in pairs)


def _tuple(name: str, values: object, expected: str) -> tuple[Any, ...]:
    plain = as_builtin(values)
    if not isinstance(plain, tuple):
        raise TypeError(f"{name}={values!r}: expected {expected}")
    return plain


def _finite(name: str, values: object, expected: str) -> tuple[float, ...]:
    plain = _tuple(name, values, expected)
    if not all(map(_is_number, plain)):
        raise TypeError(f"{name}={values!r}: expected {expected}")
    numbers = tuple(map(_float, plain))
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name}={numbers}: expected finite numbers")
    return numbers


@dataclass(frozen=True)
class Config:
    """Configuration of `optimize`.

    Attributes:
        key_steps: steps at which the encoder runs: ``"auto"`` chooses them for `work` and the noise levels of the
            schedule; an int is a uniform stride; a sequence contains step indices and begins with 0; a callable maps
            the number of steps to such a sequence; ``"all"`` is every step. ``"paper"`` is the paper's set for Stable
            Diffusion, ``"paper-personalized"`` its set for DreamBooth and Custom Diffusion, and ``"paper-if-1"``,
            ``"paper-if-2"`` and ``"paper-if-3"`` are those for the stages of DeepFloyd-IF. Steps are counted from the
            first step of a run, which is not that of the schedule in img2img; indices beyond the last step are ignored.
            Integers and arrays of numpy and torch are accepted.
        recompute: the cut: paths of the modules that are computed at every step. `DECODER` is encoder propagation,
            ``()`` reuses the whole output. It determines whether a group can be decoded in parallel. None is ``()``
            with ``key_steps="auto"``, else `DECODER`.
        forecast: features that steps between key steps read: ``"hold"``, those of the last key step; ``"linear"``,
            those of the last two key steps, extrapolated to the timestep; ``"auto"``, those of the last two key steps,
            weighted by the noise levels (kriging) and damped by how well this would have predicted the last key step.
            Features are held before the second key step, and after a key step at which the conditioning has changed.
            None is ``"auto"`` with ``key_steps="auto"``, else ``"hold"``.
        work: share of the steps that are key steps with ``key_steps="auto"``, rounded to whole steps, at least 7. With
            ``recompute=()`` it is about the share of the stock UNet's FLOPs. Names in `WORK` are also accepted:
            ``"fast"`` is 0.4, ``"balanced"`` 0.5, ``"close"`` 0.6. Below 0.4, as many stock steps may be closer.
        plan: measured key steps and weights: a `Planned`, or a tuple of them for several schedules. Runs with another
            schedule, or that start before the plan's first step, use `key_steps` and `forecast`. Features are held
            after an unplanned key step, and with a guidance scale outside of the plan's range.
        max_parallel_steps: largest number of steps to decode in one batch; 1 decodes them sequentially. ``"auto"`` is
            the largest number that fits into `memory_budget`.
        memory_budget: additional memory for ``max_parallel_steps="auto"``, as a fraction of the memory that the stock
            UNet needs for its weights and its live tensors; never more than is free. Dense parts of weights that
            `split_skips` reads are not included. ``"auto"`` is half of the free memory of a CUDA device when a size is
            first decoded, because the features of a group are held up to three times there, and 0.15 on a CPU and for
            several ranks, which must decode the same number of steps.
        noise_injection: None, a `NoiseInjection`, or ``"auto"`` for the paper's values in latent text-to-image runs
            that have non-key steps. None by default, because it changes images relative to the stock pipeline.
        backend: ``"auto"`` (inductor on CUDA, eager on a CPU), ``"eager"``, ``"inductor"`` or a backend object.
        disabled_passes: names of exact rewrites to disable, out of `OPTIONAL_PASSES`.
        cache_size_limit: number of graphs to keep, with their stages, one for each size and kind of call; the least
            recently used are dropped. None keeps all. Each scale in ``cross_attention_kwargs`` is another kind of call.
        process_group: process group of ``torch.distributed``, such as ``group.WORLD``, whose ranks share the decoding
            of a group's steps. All ranks make the same calls, run key steps themselves and get all predictions. None:
            this process only.
        strict: whether a plan for another UNet, scheduler, schedule or guidance raises an error, instead of a warning
            and a line in `explain`.

    Raises:
        ValueError, TypeError: a value is invalid; the message names it and what was expected.
    """

    key_steps: Choice = "auto"
    recompute: tuple[str, ...] = None  # type: ignore[assignment] # replaced below
    forecast: Forecast = None  # type: ignore[assignment] # replaced below
    work: float = 0.5
    plan: Planned | tuple[Planned, ...] | None = None
    max_parallel_steps: int | Literal["auto"] = "auto"
    memory_budget: float | Literal["auto"] = "auto"
    noise_injection: NoiseInjection | Literal["auto"] | None = None
    backend: Any = "auto"
    disabled_passes: tuple[str, ...] = ()
    cache_size_limit: int | None = 16
    process_group: Any = None
    strict: bool = False

    def __post_init__(self) -> None:
        replace = partial(object.__setattr__, self)  # values are stored as plain Python types
        replace("key_steps", parse_key_steps(self.key_steps))
        auto = self.key_steps == "auto"
        if self.recompute is None:
            replace("recompute", () if auto else DECODER)
        if self.forecast is None:
            replace("forecast", "auto" if auto else "hold")
        if not _is_one_of(self.forecast, get_args(Forecast)):
            raise ValueError(f"forecast={self.forecast!r}: expected one of {', '.join(get_args(Forecast))}")
        replace("work", _work(self.work))
        if isinstance(self.plan, list):
            replace("plan", tuple(self.plan))
        self._check_plans()
        replace("recompute", _names("recompute", self.recompute, f"module paths such as {DECODER}"))
        replace("max_parallel_steps", _count("max_parallel_steps", self.max_parallel_steps, "auto", "1 is sequential"))
        if not _is_one_of(self.memory_budget, ("auto",)):
            expected = "a fraction of what stock needs, of at least 0, such as 0.15"
            replace("memory_budget", _number("memory_budget", self.memory_budget, expected))
        noise = self.noise_injection
        if not (noise is None or isinstance(noise, NoiseInjection) or _is_one_of(noise, ("auto",))):
            raise TypeError(f"noise_injection={noise!r}: expected None, 'auto' or NoiseInjection(...)")
        replace("disabled_passes", _names("disabled_passes", self.disabled_passes, "names of optional passes"))
        replace("cache_size_limit", _count("cache_size_limit", self.cache_size_limit, None, "the one that runs"))
        if self.process_group is not None and not _is_process_group(self.process_group):
            raise TypeError(
                f"process_group={self.process_group!r}: expected one that this process is a rank of, such as "
                f"torch.distributed.group.WORLD after init_process_group"
            )
        if not isinstance(self.strict, bool):
            raise TypeError(f"strict={self.strict!r}: expected True or False")

    @classmethod
    def paper(cls, **changes: Any) -> Config:
        """Encoder propagation at the paper's key steps, with held features; `changes` replace fields."""
        return cls(**{"key_steps": "paper", "recompute": DECODER, "forecast": "hold"} | changes)

    def to_dict(self) -> dict[str, Any]:
        """Converts the configuration to values that ``json.dumps`` accepts.

        Raises:
            ValueError: `key_steps` is a callable, `backend` an object, or `process_group` is set.
        """
        if callable(self.key_steps):
            raise ValueError(
                f"key_steps={self.key_steps!r}: a function cannot be written: give its steps, a name or a stride"
            )
        if not isinstance(self.backend, str):
            raise ValueError(f"backend={self.backend!r}: a backend object cannot be written: give a name")
        if self.process_group is not None:
            raise ValueError("process_group: it cannot be written: give it where the configuration is read")
        return {name: value for name, value in asdict(self).items() if name != "process_group"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Makes a configuration from the result of `to_dict`, also after JSON. Missing fields have their defaults.

        Raises:
            ValueError, TypeError: a field does not exist or a value is invalid; the message names it.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{values!r}: expected a dict, such as Config.to_dict or json.loads returns")
        noise = _read_nested(NoiseInjection, values.get("noise_injection"))
        plan = _read_nested(Planned, values.get("plan"))
        if isinstance(plan, list | tuple):
            plan = tuple(_read_nested(Planned, each) for each in plan)
        return _read(cls, {**values, "noise_injection": noise, "plan": plan})

    def _check_plans(self) -> None:
        if not all(isinstance(plan, Planned) for plan in self.plans):
            raise TypeError(f"plan={self.plan!r}: expected a Planned, several, or None")
        for one, other in itertools.combinations(self.plans, 2):
            if one.is_for(other.timesteps):
                raise ValueError(f"plan: two plans are for the same schedule of {len(one.timesteps)} timesteps")

    @property
    def plans(self) -> tuple[Planned, ...]:
        """`plan` as a tuple."""
        if self.plan is None:
            return ()
        return self.plan if isinstance(self.plan, tuple) else (self.plan,)

    def plan_for(self, timesteps: Sequence[float]) -> Planned | None:
        """The plan for the schedule `timesteps`; None if there is none."""
        return next((plan for plan in self.plans if plan.is_for(timesteps)), None)

    def key_steps_of(self, steps: int) -> tuple[int, ...] | None:
        """Key steps of a run of `steps` steps, counted from its first; None if they depend on its noise levels.

        Raises:
            ValueError, TypeError: a callable returned invalid indices.
        """
        return None if self.key_steps == "auto" else resolve_key_steps(self.key_steps, steps)

    @property
    def program(self) -> tuple[object, ...]:
        """Values that staged programs and lowered stages depend on; configurations with equal values can share them."""
        return self.recompute, self.forecasts, self.disabled_passes, self.backend

    @property
    def forecasts(self) -> bool:
        """Whether steps may read a forecast of the features."""
        return self.forecast != "hold" or any(plan.weights is not None for plan in self.plans)


def _work(value: Any) -> float:
    """Parses `Config.work`."""
    expected = f"a share of the steps above 0 and up to 1, or one of {', '.join(WORK)}"
    if isinstance(value, str):
        if value not in WORK:
            raise ValueError(f"work={value!r}: expected {expected}")
        return WORK[value]
    share = _number("work", value, expected, most=1.0)
    if share == 0:
        raise ValueError(f"work={value!r}: expected {expected}")
    return share


def _is_process_group(value: object) -> bool:
    """Whether `value` is a process group with this process."""
    distributed = torch.distributed
    if not distributed.is_available() or not isinstance(value, distributed.ProcessGroup):
        return False
    return distributed.get_rank(value) >= 0


def _read(cls: type[Read], values: Mapping[str, Any]) -> Read:
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in names]:
        raise ValueError(f"{cls.__name__} has no {unknown[0]!r}: expected names out of {names}")
    needed = [field.name for field in fields(cls) if field.default is MISSING]  # type: ignore[arg-type]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{cls.__name__} without {missing[0]!r}: expected at least {needed}")
    return cls(**values)


def _read_nested(cls: type[Read], value: Any) -> Any:
    return _read(cls, value) if isinstance(value, Mapping) else value


def _count(name: str, value: Any, otherwise: str | None, least: str) -> int | str | None:
    """Parses `value`: `otherwise`, or an int of at least 1, which `least` explains in the message."""
    count: int | str | None = as_builtin(value)
    if count == otherwise:
        return count
    if type(count) is not int:
        raise TypeError(f"{name}={count!r}: expected an int or {otherwise!r}")
    if count < 1:
        raise ValueError(f"{name}={count}: expected at least 1 ({least})")
    return count


def _number(name: str, value: object, expected: str, most: float = math.inf) -> float:
    message = f"{name}={value!r}: expected {expected}"
    if not _is_number(value):
        raise TypeError(message)
    number = _float(value)
    if not (math.isfinite(number) and 0 <= number <= most):
        raise ValueError(message)
    return number


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _float(number: Any) -> float:
    """Converts `number`; those beyond the largest float are infinite."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _is_one_of(value: object, names: tuple[str, ...]) -> bool:
    """Whether `value` is one of `names`; arrays cannot be compared with them."""
    return isinstance(value, str) and value in names


def _names(name: str, value: object, expected: str) -> tuple[str, ...]:
    if not isinstance(value, tuple | list) or not all(isinstance(path, str) and path for path in value):
        raise TypeError(f"{name}={value!r}: expected a tuple of {expected}")
    return tuple(value)
