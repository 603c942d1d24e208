"""Random sequences of runs with everything a user may change between or within them, beside a stock twin.

`make properties` tries 300 sequences; the test suite always tries the same few, without what needs many captures.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import TEXTS, Float8Linear, assert_equal, ddim, sample, small_pipe
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import fdcompile
from fdcompile import Config, Planned

SEQUENCES = int(os.environ.get("FDCOMPILE_SEQUENCES", "3"))
MANY = SEQUENCES >= 100
SCHEDULERS = ("DDIM", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "EulerAncestralDiscrete")
EVENTS = (
    "nothing",
    "another prompt",
    "prompt written to",
    "prompt written to unseen",
    "weights written to",
    "guidance dropped",
    "latents scaled",
    "a run within",
    "interrupt",
    "raise",
)
AROUND = (
    "nothing",
    "a copy of the scheduler",
    "a hook on the UNet",
    "a wrapper around the UNet",
    "another forward of a part",
    "a mode",
    "tiles in turns",
    "a delegating scheduler",
    "another thread",
    "autocast",
    "another attention of torch",
    "a quantized part",
)


STOCK = ("another forward of a part", "a mode")
"""Around these the stock UNet answers."""


class Louder(TorchFunctionMode):
    """Doubles attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return output * 2 if func is functional.scaled_dot_product_attention else output


class Tiles:
    """Calls the UNet for the left and the right half, every other step in the other order."""

    def __init__(self, forward: Any) -> None:
        self._forward, self._calls = forward, 0

    def __call__(self, sample: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        self._calls += 1
        halves = sample.chunk(2, -1)
        order = (0, 1) if self._calls % 2 else (1, 0)
        outputs = {half: self._forward(halves[half], *args, **kwargs)[0] for half in order}
        return (torch.cat([outputs[0], outputs[1]], -1),)


class Delegating:
    """What a server puts around a scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_scheduler"], name)


class Raised(Exception):
    """The event "raise"."""


@dataclass(frozen=True)
class Run:
    """One call of a pipe; `event` happens in the callback after step `at`, `around` is there for the whole call."""

    scheduler: str
    steps: int
    batch: int
    width: int
    guidance: float
    seed: int
    event: str
    at: int
    around: str
    inference_mode: bool
    dtype: torch.dtype
    freeu: bool

    def __call__(self, pipe: Any) -> Tensor | None:
        pipe.scheduler = getattr(diffusers, f"{self.scheduler}Scheduler").from_config(ddim().config)
        pipe.to(self.dtype)
        if self.freeu:
            pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        else:
            pipe.unet.disable_freeu()
        last: list[Tensor] = []
        raised: list[Raised] = []

        def draw() -> None:
            try:
                with torch.inference_mode(self.inference_mode):
                    sample(
                        pipe,
                        steps=self.steps,
                        batch=self.batch,
                        guidance=self.guidance,
                        seed=self.seed,
                        height=8,
                        width=self.width,
                        callback_on_step_end=self._callback(last),
                        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
                    )
            except Raised as error:
                raised.append(error)

        with self._around(pipe):
            if self.around == "another thread":
                thread = threading.Thread(target=draw)
                thread.start()
                thread.join()
            else:
                draw()
        return None if raised else last[-1].clone()

    @contextlib.contextmanager
    def _around(self, pipe: Any) -> Iterator[None]:
        unet, part = pipe.unet, pipe.unet.mid_block.attentions[0]
        with contextlib.ExitStack() as undo:
            weight = unet.conv_in.weight.data
            undo.callback(weight.copy_, weight.clone())
            match self.around:
                case "a copy of the scheduler":
                    pipe.scheduler = copy.copy(pipe.scheduler)
                case "a delegating scheduler":
                    pipe.scheduler = Delegating(pipe.scheduler)
                case "a mode":
                    undo.enter_context(Louder())
                case "a hook on the UNet":
                    undo.callback(unet.register_forward_hook(lambda module, args, output: (output[0] * 0.9,)).remove)
                case "a wrapper around the UNet" | "tiles in turns":
                    replaced, inner = vars(unet).get("forward"), unet.forward
                    wrapped = lambda sample, *args, **kwargs: inner(sample * 0.9, *args, **kwargs)  # noqa: E731
                    unet.forward = Tiles(inner) if self.around == "tiles in turns" else wrapped
                    back = (setattr, unet, "forward", replaced) if replaced else (delattr, unet, "forward")
                    undo.callback(*back)
                case "another attention of torch":
                    attention = functional.scaled_dot_product_attention
                    undo.callback(setattr, functional, "scaled_dot_product_attention", attention)
                    functional.scaled_dot_product_attention = lambda *args, **kwargs: 2 * attention(*args, **kwargs)
                case "a quantized part":
                    linear = unet.time_embedding.linear_1
                    undo.callback(setattr, unet.time_embedding, "linear_1", linear)
                    unet.time_embedding.linear_1 = Float8Linear(linear)
                case "another forward of a part":
                    old = part.forward
                    part.forward = lambda *args, **kwargs: (old(*args, **kwargs)[0] * 0.9,)
                    undo.callback(delattr, part, "forward")
                case "autocast" if self.dtype is torch.float32:
                    undo.enter_context(torch.autocast("cpu", torch.bfloat16))
            yield

    def _callback(self, last: list[Tensor]) -> Any:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            last.append(tensors["latents"])
            if step != self.at:
                return {}
            match self.event:
                case "another prompt":
                    return {"prompt_embeds": tensors["prompt_embeds"].flip(1)}
                case "prompt written to":
                    tensors["prompt_embeds"].mul_(0.5)
                case "prompt written to unseen":
                    tensors["prompt_embeds"].data.mul_(0.5)
                case "weights written to":
                    pipe.unet.conv_in.weight.data.neg_()
                case "guidance dropped" if self.guidance > 1:
                    pipe._guidance_scale = 0.0
                    return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}
                case "latents scaled":
                    return {"latents": tensors["latents"] * 0.9}
                case "a run within":
                    outer = pipe.scheduler
                    kind = type(vars(outer).get("_scheduler", outer))  # what a delegating one stands around
                    pipe.scheduler = kind.from_config(ddim().config)
                    sample(pipe, steps=3, guidance=self.guidance, seed=7, height=8, width=self.width)
                    pipe.scheduler = outer
                case "interrupt":
                    pipe._interrupt = True
                case "raise":
                    raise Raised
            return {}

        return callback


RUNS = st.builds(
    Run,
    scheduler=st.sampled_from(SCHEDULERS),
    steps=st.integers(2, 8),
    batch=st.integers(1, 3),
    width=st.sampled_from((8, 16) if MANY else (8,)),
    guidance=st.sampled_from((1.0, 5.0)),
    seed=st.integers(0, 3),
    event=st.sampled_from(EVENTS),
    at=st.integers(0, 5),
    around=st.sampled_from(AROUND if MANY else AROUND[:-3]),
    inference_mode=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.float64)),
    freeu=st.sampled_from((False,) * 19 + (True,) if MANY else (False,)),
)

sequences = settings(
    max_examples=SEQUENCES,
    derandomize=not MANY,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return small_pipe()


@pytest.fixture(scope="module")
def twin() -> Any:
    return small_pipe()


@sequences
@given(runs=st.lists(RUNS, min_size=1, max_size=4))
def test_no_sequence_of_runs_gives_another_image_than_stock(pipe: Any, twin: Any, runs: list[Run]) -> None:
    fdcompile.optimize(pipe, Config(key_steps="all"))
    for run in runs:
        expected, actual = run(twin), run(pipe)
        assert (actual is None) == (expected is None)
        if actual is not None and expected is not None:
            if run.around == "autocast":  # as far as bfloat16 lets them agree
                assert (actual - expected).abs().max() < 0.1 * expected.abs().max()
            else:
                assert_equal(actual, expected)
            assert bool(fdcompile.explain(pipe).stock_reasons) == (run.around in STOCK)


@pytest.mark.skipif(not MANY, reason="exports a package; make properties")
@sequences
@given(runs=st.lists(RUNS, min_size=1, max_size=4))
def test_a_package_draws_what_stock_draws_or_runs_stock(package: Path, twin: Any, runs: list[Run]) -> None:
    """Weights that are written to within a run aside: a package that holds its own notices at the next run."""
    loaded = small_pipe()
    fdcompile.load(loaded, package, fallback="stock")
    for run in runs:
        if run.event == "weights written to":
            run = replace(run, event="nothing")
        expected, actual = run(twin), run(loaded)
        assert (actual is None) == (expected is None)
        if actual is not None and expected is not None and run.around != "autocast":
            assert_equal(actual, expected)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    exported = fdcompile.optimize(small_pipe(), Config(key_steps="all"))
    folder = tmp_path_factory.mktemp("packages") / "onnx"
    return fdcompile.export(exported, folder, format="onnx", arguments=TEXTS, batch=(1, 1, 6))


WEIGHTS = ((1.0, 0.0), (1.0, 0.0), (1.5, -0.5), (1.0, 0.0), (1.5, -0.5), (2.0, -1.0))
"""Of a plan for six steps of DDIM at guidance 5: it is not for other runs."""


@sequences
@given(
    runs=st.lists(RUNS, min_size=2, max_size=3),
    parallel=st.sampled_from((1, 3, 16)),
    key_steps=st.sampled_from((3, "auto", "planned")),
)
def test_no_run_depends_on_the_runs_before_it(pipe: Any, runs: list[Run], parallel: int, key_steps: Any) -> None:
    """With features reused, which a stock twin cannot check: the last run against itself without a history."""
    scheduler = ddim()
    scheduler.set_timesteps(len(WEIGHTS))
    plan = Planned(tuple(scheduler.timesteps.tolist()), (0, 1, 3), WEIGHTS, (5.0, 5.0))
    config = Config("auto", plan=plan) if key_steps == "planned" else Config(key_steps)
    fdcompile.optimize(pipe, replace(config, max_parallel_steps=parallel))
    for run in runs:
        after_others = run(pipe)
    fdcompile.optimize(pipe, replace(config, max_parallel_steps=1))
    alone = runs[-1](pipe)
    assert (after_others is None) == (alone is None)
    if after_others is not None and alone is not None:
        assert_equal(after_others, alone)
