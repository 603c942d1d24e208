"""What a user may choose, validated before any work starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from numbers import Real
from typing import Any, Literal, TypeVar, cast, get_args

import torch

from fdcompile.key_steps import Choice, as_builtin, parse_key_steps, resolve_key_steps

Read = TypeVar("Read")

DECODER = ("up_blocks", "conv_norm_out", "conv_act", "conv_out")
"""Encoder propagation (paper, Sec. 3.3): the decoder is recomputed at every step, everything before it is reused."""

PARTIAL_ENCODER = ("conv_in", "down_blocks.0", *DECODER)
"""Partial encoder propagation: the shallow encoder is recomputed too, the deep encoder and bottleneck are reused."""


def deep_feature_caching(num_blocks: int, depth: int = 1) -> tuple[str, ...]:
    """The cut of deep-feature caching (DeepCache): the outermost `depth` of `num_blocks` levels are recomputed."""
    down = (f"down_blocks.{level}" for level in range(depth))
    up = (f"up_blocks.{level}" for level in range(num_blocks - depth, num_blocks))
    return ("conv_in", *down, *up, "conv_norm_out", "conv_act", "conv_out")


@dataclass(frozen=True)
class NoiseInjection:
    """Prior noise injection (paper, Sec. 3.3): ``z_t + alpha * z_T`` before the scheduler's step.

    Attributes:
        alpha: scale of the initial latent ``z_T``.
        tau: applied at steps whose timestep is below this fraction of the training timesteps.

    Raises:
        ValueError: `alpha` is negative or not finite, or `tau` is outside [0, 1].
        TypeError: one of them is no number.
    """

    alpha: float = 0.003
    tau: float = 0.5

    def __post_init__(self) -> None:
        alpha = _number("alpha", self.alpha, "a number of at least 0, such as the paper's 0.003")
        tau = _number("tau", self.tau, "a fraction of the training timesteps between 0 and 1", most=1.0)
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "tau", tau)


Forecast = Literal["auto", "hold", "linear"]

WORK = {"fast": 0.4, "balanced": 0.5, "close": 0.6}
"""Names of shares of the work."""


@dataclass(frozen=True)
class Planned:
    """What a plan says of one schedule. Plain data: lists become tuples, so that it survives JSON.

    Attributes:
        timesteps: the whole schedule that it was made for, ``scheduler.timesteps``.
        key_steps: indices into `timesteps`; the first is 0.
        weights: of each step, how much of the last key step and of the one before makes its features; the two sum to
            one. At key steps, and before the second of them, there is nothing to forecast: those are not read. None:
            features are held.
        guidance: smallest and largest guidance scale of the calls that it was made with; None for pipelines without.
        start: the first step that those calls ran; not 0 for img2img. It says nothing of runs that start before.
        made_for: what it was made with, as a digest of each property of the UNet and of the scheduler: (part, property,
            digest). None: unknown, and not compared.

    Raises:
        ValueError, TypeError: a value is not one of the above; the message names it and what was expected.
    """

    timesteps: tuple[float, ...]
    key_steps: tuple[int, ...]
    weights: tuple[tuple[float, float], ...] | None
    guidance: tuple[float, float] | None
    start: int = 0
    made_for: tuple[tuple[str, str, str], ...] | None = None

    def __post_init__(self) -> None:
        timesteps = _finite("timesteps", self.timesteps)
        key_steps = cast("tuple[int, ...]", parse_key_steps(tuple(self.key_steps)))
        if key_steps[-1] >= len(timesteps):
            raise ValueError(
                f"key_steps={key_steps}: step {key_steps[-1]} is out of range, the schedule has {len(timesteps)} steps"
            )
        object.__setattr__(self, "timesteps", timesteps)
        object.__setattr__(self, "key_steps", key_steps)
        if self.weights is not None:
            weights = tuple(_finite("weights", pair) for pair in self.weights)
            if len(weights) != len(timesteps):
                raise ValueError(f"weights: expected a pair for each of {len(timesteps)} steps, not {len(weights)}")
            if wrong := [pair for pair in weights if len(pair) != 2 or not math.isclose(sum(pair), 1, abs_tol=1e-6)]:
                raise ValueError(f"weights: {wrong[0]}: expected pairs that sum to 1")
            object.__setattr__(self, "weights", weights)
        if self.guidance is not None:
            guidance = _finite("guidance", self.guidance)
            if len(guidance) != 2 or guidance[0] > guidance[1]:
                raise ValueError(f"guidance={guidance}: expected the smallest and the largest guidance scale")
            object.__setattr__(self, "guidance", guidance)
        if type(self.start) is not int or not 0 <= self.start < len(timesteps):
            raise ValueError(f"start={self.start!r}: expected one of the steps 0 to {len(timesteps) - 1}")
        if self.made_for is not None:
            made_for = tuple(map(tuple, self.made_for))
            if not all(len(digest) == 3 and all(isinstance(text, str) for text in digest) for digest in made_for):
                raise TypeError(f"made_for={self.made_for!r}: expected (part, property, digest) of each, or None")
            object.__setattr__(self, "made_for", made_for)

    def is_for(self, timesteps: Sequence[float]) -> bool:
        """Whether `timesteps` is this schedule, as float32 knows it."""
        pairs = zip(self.timesteps, timesteps, strict=False)
        return len(self.timesteps) == len(timesteps) and all(math.isclose(*pair, rel_tol=1e-6) for pair in pairs)


def _finite(name: str, values: Sequence[float]) -> tuple[float, ...]:
    numbers = tuple(map(float, values))
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name}={numbers}: expected finite numbers")
    return numbers


@dataclass(frozen=True)
class Config:
    """How `optimize` runs a UNet.

    Attributes:
        key_steps: at which steps the encoder runs: ``"auto"``, chosen for `work` and the noise levels of the schedule;
            ``"paper"``, ``"all"``, an int (uniform stride), a sequence of step indices that begins with 0, or a
            callable from the number of steps to such a sequence. Steps are counted from the first one that a run
            executes: img2img, which starts late in its schedule, has fewer, and a run does not reach the indices after
            its last step. numpy's and torch's integers and arrays count as well. ``"paper"`` is the paper's set for
            Stable Diffusion, ``"paper-personalized"`` its set for DreamBooth and Custom Diffusion, and
            ``"paper-if-1"``, ``"paper-if-2"`` and ``"paper-if-3"`` those for the stages of DeepFloyd-IF.
        recompute: the cut: paths of the modules computed at every step; `DECODER` is encoder propagation, ``()``
            reuses the whole output. Whether a group can be decoded in parallel follows from it. None is ``()`` with
            ``key_steps="auto"``, else `DECODER`.
        forecast: what a step between key steps reads: ``"hold"``, the features of the last one; ``"linear"``, those of
            the last two extrapolated to its timestep; ``"auto"``, those of the last two weighed by their noise levels
            (kriging), and damped by how well that would have forecast the last key step. There is no forecast before
            the second key step, nor after one at which the conditioning changed. None is ``"auto"`` with
            ``key_steps="auto"``, else ``"hold"``.
        work: of ``key_steps="auto"``, the share of steps that are key steps, rounded to whole steps, at least 7 of
            them; with ``recompute=()`` it is about the share of the stock UNet's FLOPs. Or a name out of `WORK`:
            ``"fast"`` 0.4, ``"balanced"`` 0.5, ``"close"`` 0.6.
        plan: a `Planned`, or a tuple of them for several schedules: key steps and weights that were measured. A run
            with another schedule, or that starts before the plan's first step, has `key_steps` and `forecast`. A step
            that became a key step unplanned, or another guidance than the plan's, makes its features held.
        max_parallel_steps: upper bound on the steps decoded in one batch; 1 decodes them one by one. ``"auto"`` is the
            most that fits into `memory_budget`.
        memory_budget: how much more memory ``"auto"`` steps may use than the stock UNet needs for its weights and its
            largest set of live tensors, as a fraction of that, but no more than is free. The dense parts of weights
            that `split_skips` reads are on top. ``"auto"``: half of what is free on a CUDA device when a size is first
            decoded, because a group's features are held up to three times there; 0.15 on a CPU, and on each of
            several ranks, which must agree.
        noise_injection: None, a `NoiseInjection`, or ``"auto"``: the paper's values for latent text-to-image runs
            that have non-key steps. Off by default, because it moves pictures away from the stock pipeline's.
        backend: ``"auto"`` (inductor on CUDA, eager on a CPU), ``"eager"``, ``"inductor"`` or a backend object.
        disabled_passes: names of exact rewrites to leave out, of those in `OPTIONAL_PASSES`.
        cache_size_limit: how many graphs are kept, with their stages and whatever was made for them: one for each size
            and kind of call, the most recently used ones. None keeps all. A scale in ``cross_attention_kwargs`` makes
            another kind.
        process_group: of ``torch.distributed``, such as ``group.WORLD``: its ranks share the decoding of a group's
            steps. Each makes the same call, runs key steps itself and gets the predictions of all. None: alone.
        strict: whether a plan that was made for another UNet, scheduler, schedule or guidance is an error. Otherwise it
            is followed as far as it goes, with a warning and a line in `explain`.

    Raises:
        ValueError, TypeError: a value is not one of the above; the message names it and what was expected.
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
        replace = partial(object.__setattr__, self)  # the values as plain Python has them
        replace("key_steps", parse_key_steps(self.key_steps))
        auto = self.key_steps == "auto"
        if self.recompute is None:
            replace("recompute", () if auto else DECODER)
        if self.forecast is None:
            replace("forecast", "auto" if auto else "hold")
        if self.forecast not in get_args(Forecast):
            raise ValueError(f"forecast={self.forecast!r}: expected one of {', '.join(get_args(Forecast))}")
        replace("work", _work(self.work))
        if isinstance(self.plan, list):
            replace("plan", tuple(self.plan))
        self._check_plans()
        replace("recompute", _names("recompute", self.recompute, f"module paths such as {DECODER}"))
        replace("max_parallel_steps", _count("max_parallel_steps", self.max_parallel_steps, "auto", "1 is sequential"))
        if self.memory_budget != "auto":
            expected = "a fraction of what stock needs, of at least 0, such as 0.15"
            replace("memory_budget", _number("memory_budget", self.memory_budget, expected))
        if not (self.noise_injection in (None, "auto") or isinstance(self.noise_injection, NoiseInjection)):
            raise TypeError(f"noise_injection={self.noise_injection!r}: expected None, 'auto' or NoiseInjection(...)")
        replace("disabled_passes", _names("disabled_passes", self.disabled_passes, "names of optional passes"))
        replace("cache_size_limit", _count("cache_size_limit", self.cache_size_limit, None, "the one that runs"))
        if self.process_group is not None and not _is_process_group(self.process_group):
            raise TypeError(
                f"process_group={self.process_group!r}: expected one that this process is a rank of, such as "
                f"torch.distributed.group.WORLD after init_process_group"
            )

    @classmethod
    def paper(cls, **changes: Any) -> Config:
        """Encoder propagation at the paper's key steps, its features held; `changes` are other fields."""
        return cls(**{"key_steps": "paper", "recompute": DECODER, "forecast": "hold"} | changes)

    def to_dict(self) -> dict[str, Any]:
        """The configuration in values that ``json.dumps`` takes.

        Raises:
            ValueError: the key steps are a function, the backend is an object, or there is a process group.
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
        """What `to_dict` wrote, also after a way through JSON; what is left out has its default.

        Raises:
            ValueError, TypeError: there is no such field, or a value is refused; the message names it.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{values!r}: expected a dict, such as Config.to_dict or json.loads returns")
        values = _with_plan(values)
        noise, plan = values.get("noise_injection"), values.get("plan")
        if isinstance(noise, Mapping):
            values = {**values, "noise_injection": _read(NoiseInjection, noise)}
        if isinstance(plan, Mapping):
            values = {**values, "plan": _read(Planned, plan)}
        elif isinstance(plan, list | tuple):
            plans = [_read(Planned, each) if isinstance(each, Mapping) else each for each in plan]
            values = {**values, "plan": tuple(plans)}
        return _read(cls, values)

    def _check_plans(self) -> None:
        if not all(isinstance(plan, Planned) for plan in self.plans):
            raise TypeError(f"plan={self.plan!r}: expected a Planned, several, or None")
        for one, other in itertools.combinations(self.plans, 2):
            if one.is_for(other.timesteps):
                raise ValueError(f"plan: two plans are for the same schedule of {len(one.timesteps)} timesteps")

    @property
    def plans(self) -> tuple[Planned, ...]:
        """What is planned, by schedule."""
        if self.plan is None:
            return ()
        return self.plan if isinstance(self.plan, tuple) else (self.plan,)

    def plan_for(self, timesteps: Sequence[float]) -> Planned | None:
        """The plan of this schedule, if there is one."""
        return next((plan for plan in self.plans if plan.is_for(timesteps)), None)

    def key_steps_of(self, steps: int) -> tuple[int, ...] | None:
        """Key steps of a run of `steps` steps, counted from its first; None if they follow from its noise levels.

        Raises:
            ValueError: a callable returned an invalid set.
        """
        return None if self.key_steps == "auto" else resolve_key_steps(self.key_steps, steps)

    @property
    def program(self) -> tuple[object, ...]:
        """The part that the staged program and its lowered stages follow from; the rest only steers their use."""
        return self.recompute, self.forecasts, self.disabled_passes, self.backend

    @property
    def forecasts(self) -> bool:
        """Whether steps read a forecast of features instead of the features."""
        return self.forecast != "hold" or any(plan.weights is not None for plan in self.plans)


def _work(value: Any) -> float:
    """A share of the work as a number."""
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
    """Whether it is one, and this process is in it."""
    distributed = torch.distributed
    if not distributed.is_available() or not isinstance(value, distributed.ProcessGroup):
        return False
    return distributed.get_rank(value) >= 0


def _with_plan(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`values` with the plan in its own field: it was among the key steps once, and packages were written so."""
    key_steps = values.get("key_steps")
    first = key_steps[0] if isinstance(key_steps, list | tuple) and key_steps else key_steps
    if not isinstance(first, Mapping):
        return values
    rest = {name: value for name, value in values.items() if name not in ("key_steps", "forecast")}
    return {**rest, "key_steps": "all", "forecast": "hold", "plan": key_steps}


def _read(cls: type[Read], values: Mapping[str, Any]) -> Read:
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in names]:
        raise ValueError(f"{cls.__name__} has no {unknown[0]!r}: expected names out of {names}")
    return cls(**values)


def _count(name: str, value: Any, otherwise: str | None, least: str) -> int | str | None:
    """`value` as plain Python has it: `otherwise`, or an int of at least 1, which `least` explains."""
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
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(message)
    number = float(value)
    if not (math.isfinite(number) and 0 <= number <= most):
        raise ValueError(message)
    return number


def _names(name: str, value: object, expected: str) -> tuple[str, ...]:
    if not isinstance(value, tuple | list) or not all(isinstance(path, str) and path for path in value):
        raise TypeError(f"{name}={value!r}: expected a tuple of {expected}")
    return tuple(value)
