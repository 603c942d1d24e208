"""Parts of a pipe that are exchanged, shared or copied, between images or by other pipes: followed, or run stock."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ControlNetModel, MultiControlNetModel, StableDiffusionControlNetPipeline
from models import assert_equal, ddim, sample, small_pipe, small_unet
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fdcompile
from fdcompile import Config, NoiseInjection
from fdcompile.pipeline.session import find_session

TWO_KEYS = Config(key_steps=(0, 3))
image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def controlnet(seed: int) -> ControlNetModel:
    """One that has an effect."""
    torch.manual_seed(seed)
    made = ControlNetModel.from_unet(small_pipe().unet, conditioning_embedding_out_channels=(16,))
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made.eval()


def controlled(controlnet: nn.Module, **parts: Any) -> Any:
    parts = {**small_pipe().components, "controlnet": controlnet, **parts}
    pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **arguments: Any) -> Tensor:
    return sample(pipe, **{"steps": 6, "image": image, "height": 8, "width": 8, **arguments})


def optimized(controlnet: nn.Module) -> Any:
    return fdcompile.optimize(controlled(controlnet), TWO_KEYS)


def test_another_controlnet_is_followed_from_its_first_image_on() -> None:
    first, second = controlnet(1), controlnet(2)
    pipe = optimized(first)
    draw(pipe)
    expected = draw(optimized(second))
    pipe.controlnet = second
    for _ in range(2):
        assert_equal(draw(pipe), expected)
        assert fdcompile.explain(pipe).controlnet_runs == 2
    assert "_diffusers_hook" not in vars(first)
    pipe.controlnet = MultiControlNetModel([first, second])
    scales = {"image": [image, image], "controlnet_conditioning_scale": [1.0, 1.0]}
    assert_equal(draw(pipe, **scales), draw(optimized(MultiControlNetModel([first, second])), **scales))
    assert fdcompile.explain(pipe).controlnet_runs == 2


def test_two_controlnet_pipes_on_one_unet_take_turns() -> None:
    first = optimized(controlnet(1))
    second = controlled(controlnet(2), **{k: v for k, v in first.components.items() if k != "controlnet"})
    expected = draw(optimized(controlnet(1))), draw(controlled(controlnet(2)))
    for _ in range(2):
        assert_equal(draw(first), expected[0])
        assert_equal(draw(second), expected[1])  # nobody follows its ControlNet: every step is a key step
        assert fdcompile.explain(second).encoder_runs == 6
    draw(second, batch=2)
    fdcompile.optimize(second, TWO_KEYS)
    planned = expected[0], draw(optimized(controlnet(2)))
    for _ in range(2):
        for pipe, latents in zip((first, second), planned, strict=True):
            assert_equal(draw(pipe), latents)
            assert fdcompile.explain(pipe).encoder_runs == 2


def test_residuals_of_a_controlnet_that_nobody_follows_make_key_steps() -> None:
    """The ControlNet came with `from_pipe`, after its base was optimized."""
    base = fdcompile.optimize(small_pipe(), Config(key_steps=(0, 1, 2)))
    sample(base, steps=6)
    pipe = StableDiffusionControlNetPipeline.from_pipe(base, controlnet=controlnet(1))
    stock = controlled(controlnet(1))
    pipe.set_progress_bar_config(disable=True)
    for when in ({"control_guidance_start": 0.4}, {}):
        assert_equal(draw(pipe, **when), draw(stock, **when))
        assert fdcompile.explain(pipe).forced_key_steps


def test_equal_residuals_keep_a_group() -> None:
    """As of a T2I-Adapter, which runs once and whose residuals are cloned for each step."""
    pipe = fdcompile.optimize(small_pipe(), TWO_KEYS)
    sizes = [(16, 8, 8), (16, 8, 8), (16, 4, 4), (32, 4, 4), (32, 4, 4)]
    residuals = [torch.randn(2, *size, generator=torch.Generator().manual_seed(3)) for size in sizes]
    unet = pipe.unet.forward

    def adapted(*args: Any, scale: float = 1.0, **kwargs: Any) -> Any:
        copies = tuple(residual.clone() for residual in residuals[:4])
        return unet(*args, down_block_additional_residuals=copies, mid_block_additional_residual=residuals[4], **kwargs)

    pipe.unet.forward = adapted
    sample(pipe, steps=6)
    assert fdcompile.explain(pipe).key_steps == (0, 3)

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            residuals[0].mul_(2)
        return {}

    sample(pipe, steps=6, callback_on_step_end=change)
    assert fdcompile.explain(pipe).key_steps == (0, 1, 3)


def test_after_another_unet_nothing_of_the_old_run_is_left() -> None:
    other = {"block_out_channels": (8, 16)}
    config = Config.paper(noise_injection=NoiseInjection(alpha=0.1, tau=1.0))
    pipe, twin = fdcompile.optimize(small_pipe(), config), small_pipe()
    sample(pipe)
    old = pipe.unet
    pipe.unet, twin.unet = small_unet(**other), small_unet(**other)
    assert torch.equal(sample(pipe), sample(twin))
    with pytest.raises(RuntimeError, match=r"pipe\.unet was replaced .* call fdcompile\.optimize\(pipe\) again"):
        fdcompile.explain(pipe)
    fdcompile.restore(pipe)
    assert "_diffusers_hook" not in vars(old)
    assert find_session(pipe) is None


def test_optimizing_for_another_unet_leaves_the_first_to_those_who_keep_it() -> None:
    first = fdcompile.optimize(small_pipe(), TWO_KEYS)
    second = type(first)(**first.components, requires_safety_checker=False)
    fdcompile.optimize(second, TWO_KEYS)
    second.unet = small_pipe().unet
    fdcompile.optimize(second, TWO_KEYS)
    for pipe in (first, second):
        pipe.set_progress_bar_config(disable=True)
        sample(pipe, steps=6)
        assert fdcompile.explain(pipe).key_steps == (0, 3)
    fdcompile.restore(second)
    sample(first, steps=6)
    assert fdcompile.explain(first).key_steps == (0, 3)


SCHEDULERS = ("DDIM", "EulerDiscrete", "DPMSolverMultistep", "EulerAncestralDiscrete")


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return fdcompile.optimize(small_pipe(), TWO_KEYS), small_pipe()


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda scheduler: type(scheduler).from_config(scheduler.config)]
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_copy_of_the_scheduler_steps_itself(pair: tuple[Any, Any], name: str, copied: Callable[[Any], Any]) -> None:
    pipe, twin = pair
    for each in pair:
        each.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(ddim().config)
    optimized = sample(pipe, steps=6)
    view = copy.copy(pipe)
    view.scheduler = copied(pipe.scheduler)
    assert torch.equal(sample(view, steps=6), sample(twin, steps=6))
    assert torch.equal(sample(pipe, steps=6), optimized)
    assert fdcompile.explain(pipe).key_steps == (0, 3)


def test_a_scheduler_class_is_as_it_was_once_nobody_watches() -> None:
    kind = diffusers.EulerDiscreteScheduler
    before = vars(kind)["step"], vars(kind)["set_timesteps"]
    pipes = [small_pipe() for _ in range(2)]
    for pipe in pipes:
        pipe.scheduler = kind.from_config(ddim().config)
        fdcompile.optimize(pipe)
    for pipe in pipes:
        assert vars(kind)["step"] is not before[0]
        fdcompile.restore(pipe)
    assert (vars(kind)["step"], vars(kind)["set_timesteps"]) == before
    fdcompile.optimize(pipes[0])
    del pipe, pipes[0]
    __import__("gc").collect()
    assert vars(kind)["step"] is before[0], "a pipe that was dropped is not held"


def test_a_users_step_on_the_scheduler_is_followed_and_stays() -> None:
    pipe = small_pipe()
    calls: list[Any] = []
    stock = pipe.scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return stock(*args, **kwargs)

    pipe.scheduler.step = step
    fdcompile.optimize(pipe, TWO_KEYS)
    sample(pipe, steps=6)
    assert len(calls) == 6
    assert pipe.scheduler.step is not step
    fdcompile.restore(pipe)
    assert pipe.scheduler.step is step


def test_pipes_that_share_only_a_scheduler_do_not_touch_each_other() -> None:
    first, second = small_pipe(), small_pipe()
    second.scheduler = first.scheduler
    fdcompile.optimize(first, TWO_KEYS)
    fdcompile.optimize(second, Config(key_steps=(0, 1), noise_injection=NoiseInjection(alpha=0.1, tau=1.0)))
    alone = sample(first, steps=6)
    sample(second, steps=6)
    assert torch.equal(sample(first, steps=6), alone)
    assert [fdcompile.explain(pipe).key_steps for pipe in (first, second)] == [(0, 3), (0, 1)]
    fdcompile.restore(second)
    assert torch.equal(sample(first, steps=6), alone)
    assert fdcompile.explain(first).key_steps == (0, 3)
    with pytest.raises(RuntimeError, match="not optimized"):
        fdcompile.explain(second)


class Made(TorchDispatchMode):
    """Keeps weak references to the storages of feature maps that operations make, with their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: list[tuple[StorageWeakRef, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.ndim == 4 and leaf.shape[1] > 7 and leaf.shape[2:] in ((8, 8), (4, 4)):
                self._storages.append((StorageWeakRef(leaf.untyped_storage()), tuple(leaf.shape)))
        return result

    @property
    def alive(self) -> list[tuple[int, ...]]:
        gc.collect()
        return [shape for storage, shape in self._storages if not storage.expired()]


@pytest.mark.usefixtures("modes_observe")
@pytest.mark.parametrize("with_controlnet", [False, True])
def test_no_feature_and_no_residual_outlives_a_run(with_controlnet: bool) -> None:
    pipe = optimized(controlnet(1)) if with_controlnet else fdcompile.optimize(small_pipe(), TWO_KEYS)
    run = draw if with_controlnet else partial(sample, steps=6)
    run(pipe)
    with Made() as made:
        run(pipe)
    assert fdcompile.explain(pipe).stock_calls == 0
    assert made.alive == []
