"""How often a run waits for the device, exactly."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from device_reads import Counted, count_device_reads
from diffusers import EulerDiscreteScheduler, StableDiffusionInpaintPipeline
from models import FLAT, TEXT, ddim, flat_pipe, sample, small_pipe, small_unet
from torch import Tensor

import fdcompile
from fdcompile import Config
from fdcompile.capture.guards import TensorGuard, checksum
from fdcompile.config import Planned

STEPS = 50


def planned() -> Config:
    scheduler = ddim()
    scheduler.set_timesteps(STEPS)
    timesteps = tuple(map(float, scheduler.timesteps))
    plan = Planned(timesteps, (0, 1, 2, 10, 20, 30, 40), ((0.5, 0.5),) * STEPS, (1.0, 9.0))
    return Config.paper(plan=plan)


def inpainting_pipe() -> Any:
    pipe = small_pipe(StableDiffusionInpaintPipeline)
    pipe.register_modules(unet=small_unet(in_channels=9, **FLAT))
    return pipe


def euler_pipe() -> Any:
    pipe = flat_pipe()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


PICTURE = {"image": torch.rand(1, 3, 8, 8), "mask_image": torch.ones(1, 1, 8, 8), "height": 8, "width": 8}
TENSOR = {"guidance_scale": torch.tensor([5.0])}  # pipelines for videos have one for each frame


class Reads(NamedTuple):
    """How many are made up to the end of the first step, from there to the end of the last but one, and in the last."""

    first_step: int
    between: int
    last_step: int

    @classmethod
    def of(cls, after: list[int]) -> Reads:
        return cls(after[0], after[-2] - after[0], after[-1] - after[-2])


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are compared and summed up as they are where that waits."""
    monkeypatch.setattr(checksum, "_is_on_host", lambda tensor: False)
    monkeypatch.setattr(TensorGuard, "compares_content", staticmethod(Tensor.is_inference))


@pytest.mark.usefixtures("modes_observe", "as_on_a_gpu")
@pytest.mark.parametrize(
    ("make_pipe", "config", "arguments"),
    [
        pytest.param(flat_pipe, Config(key_steps="paper"), {}, id="paper"),
        pytest.param(flat_pipe, planned(), {}, id="planned"),
        pytest.param(flat_pipe, planned(), TENSOR, id="planned, tensor as guidance"),
        pytest.param(flat_pipe, Config(), {}, id="default"),
        pytest.param(flat_pipe, Config(), TENSOR, id="default, tensor as guidance"),
        pytest.param(euler_pipe, Config(), {}, id="default, sigmas"),
        pytest.param(inpainting_pipe, Config(), PICTURE, id="inpainting, 9 channels"),
    ],
)
def test_reads_of_a_warm_run(make_pipe: Any, config: Config, arguments: Any) -> None:
    """Once for the schedule and the guidance, once for the weights, both before the first step."""
    pipe = fdcompile.optimize(make_pipe(), config)
    assert reads(pipe, **arguments) == Reads(first_step=2, between=0, last_step=0)
    assert fdcompile.explain(pipe).stock_calls == 0


@pytest.mark.usefixtures("modes_observe", "as_on_a_gpu")
def test_reads_in_inference_mode() -> None:
    """Its tensors do not count writes: the prompt is compared at each step but the first, and the timesteps twice."""
    pipe = fdcompile.optimize(flat_pipe())
    with torch.inference_mode():
        assert reads(pipe) == Reads(first_step=4, between=STEPS - 2, last_step=1)


@pytest.mark.usefixtures("modes_observe", "as_on_a_gpu")
def test_reads_with_two_calls_a_step() -> None:
    """Once more after the first step, because the calls might be tiles."""
    pipe = flat_pipe()
    unet = pipe.unet
    fdcompile.optimize(unet, scheduler=pipe.scheduler)
    for _ in range(2):
        texts = torch.randn(2, 2, *TEXT)
        latents = torch.randn(2, 4, 8, 8)
        pipe.scheduler.set_timesteps(STEPS)
        after = []
        with torch.no_grad(), count_device_reads() as counted:
            for t in pipe.scheduler.timesteps:
                one, two = (unet(latents, t, encoder_hidden_states=text).sample for text in texts)
                latents = pipe.scheduler.step(one + 3 * (two - one), t, latents).prev_sample
                after.append(len(counted.own_reads))
    assert Reads.of(after) == Reads(first_step=2, between=1, last_step=0)


def reads(pipe: Any, **arguments: Any) -> Reads:
    """Of the second run, with another prompt."""
    sample(pipe, STEPS, **arguments)
    after: list[int] = []

    def note(*args: Any) -> Any:
        after.append(len(counted.own_reads))
        return args[-1]

    with count_device_reads() as counted:
        sample(pipe, STEPS, seed=1, callback_on_step_end=note, **arguments)
    print(_text(counted))
    assert len(counted.own_reads) == after[-1], "a read after the last step"
    return Reads.of(after)


def _text(counted: Counted) -> str:
    return "\n".join(f"{read.operation} of {read.shape} at {read.place}" for read in counted.own_reads)


def test_what_counts_as_a_read() -> None:
    x, mask = torch.arange(3.0), torch.tensor([True, False, True])
    reads = {
        "aten._local_scalar_dense.default": [lambda: x[0].item(), lambda: bool(mask[0]), lambda: int(x[1])],
        "aten.equal.default": [lambda: torch.equal(x, x)],
        "aten.nonzero.default": [lambda: mask.nonzero()],
        "aten.index.Tensor": [lambda: x[mask]],
        "tolist": [lambda: x.tolist()],
        "numpy": [lambda: x.numpy()],
        "cpu": [lambda: x.cpu()],
        "tensor": [lambda: torch.tensor([1.0], device=x.device)],
    }
    for operation, calls in reads.items():
        for call in calls:
            with count_device_reads() as counted:
                call()
            assert [read.operation for read in counted.reads] == [operation]
            assert "test_device_reads.py" in counted.reads[0].place
            assert not counted.own_reads
    with count_device_reads() as counted:
        x[torch.tensor([0, 2])].sum() + x.clone().mul_(2)[1:]
        torch.zeros(3, device=x.device)
    assert not counted.reads
    assert counted.operations["aten.mul_.Tensor"] == 1
