"""How often a run waits for the device, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_reads import Counted, count_device_reads
from diffusers import StableDiffusionInpaintPipeline
from models import FLAT, ddim, flat_pipe, sample, small_pipe, small_unet

import fdcompile
from fdcompile import Config
from fdcompile.capture.guards import checksum, tensors
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


PICTURE = {"image": torch.rand(1, 3, 8, 8), "mask_image": torch.ones(1, 1, 8, 8), "height": 8, "width": 8}


@pytest.mark.usefixtures("modes_observe")
@pytest.mark.parametrize(
    ("make_pipe", "config", "arguments", "between", "whole"),
    [
        pytest.param(flat_pipe, Config(key_steps="paper"), {}, 0, 2, id="paper"),
        pytest.param(flat_pipe, planned(), {}, 0, 4, id="planned"),
        pytest.param(flat_pipe, Config(), {}, 0, 5, id="default"),
        pytest.param(inpainting_pipe, Config(key_steps="paper"), PICTURE, 49, 52, id="inpainting, 9 channels"),
    ],
)
def test_reads_of_a_warm_run(
    make_pipe: Any, config: Config, arguments: Any, between: int, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The goal is none between the first and the last step, and at most two a run."""
    monkeypatch.setattr(checksum, "_checksum", checksum.weighted_sum)  # as on a GPU
    monkeypatch.setattr(tensors.TensorGuard, "untouched", lambda guard: True)  # compares contents on a CPU only
    pipe = fdcompile.optimize(make_pipe(), config)
    sample(pipe, STEPS, **arguments)
    after: list[int] = []

    def note(*args: Any) -> Any:
        after.append(len(counted.own_reads))
        return args[-1]

    with count_device_reads() as counted:
        sample(pipe, STEPS, seed=1, callback_on_step_end=note, **arguments)  # another prompt
    assert (after[-2] - after[0], len(counted.own_reads)) == (between, whole), _text(counted)


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
