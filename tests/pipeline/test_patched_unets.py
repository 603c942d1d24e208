"""Hooks, wrappers, patches and Python state in or around a UNet: run as the stock UNet runs them, or stock."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from capture.test_reach import READINGS
from capture.test_state import CachingModule, InAnArray, InAnObject, InATensor, Lazy
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from models import assert_equal, flat_pipe, sample
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import fdcompile
from fdcompile import Config

ALL = Config(key_steps="all")
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def draw(pipe: Any, **arguments: Any) -> Tensor:
    return sample(pipe, **{"steps": 6, **arguments})


@pytest.fixture
def pair() -> tuple[Any, Any]:
    return fdcompile.optimize(flat_pipe(), ALL), flat_pipe()


def reasons(pipe: Any) -> list[str]:
    return list(fdcompile.explain(pipe).stock_reasons)


def louder(module: nn.Module, args: Any, output: Any) -> Any:
    return (output[0] * 1.1,) if isinstance(output, tuple) else output * 1.1


def shifted(module: nn.Module, args: Any) -> Any:
    return (args[0] * 1.05, *args[1:])


@pytest.mark.parametrize(("hook", "first"), [(louder, True), (shifted, False)], ids=["before", "after"])
def test_hooks_on_the_unet_run_once(pair: tuple[Any, Any], hook: Any, first: bool) -> None:
    pipe, twin = pair
    if first:
        fdcompile.restore(pipe)
    for each in pair:
        unet = each.unet
        (unet.register_forward_hook if hook is louder else unet.register_forward_pre_hook)(hook)
    fdcompile.optimize(pipe, ALL)
    assert_equal(draw(pipe), draw(twin))
    assert_equal(draw(pipe, height=8, width=16), draw(twin, height=8, width=16))
    assert reasons(pipe) == []


def wrapping(old: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(old)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (old(*args, **kwargs)[0] * 1.1,)

    return forward


def bare(old: Callable[..., Any]) -> Callable[..., Any]:
    return lambda sample, *args, **kwargs: old(sample * 1.05, *args, **kwargs)


def relighting(old: Callable[..., Any]) -> Callable[..., Any]:
    """Takes entries of its own out of ``cross_attention_kwargs``."""

    def forward(sample: Tensor, timestep: Any, cross_attention_kwargs: Any = None, **kwargs: Any) -> Any:
        rest = dict(cross_attention_kwargs)
        return old(sample + rest.pop("light"), timestep, cross_attention_kwargs=rest, **kwargs)

    return forward


WRAPPERS = {wrapping: {}, bare: {}, relighting: {"cross_attention_kwargs": {"light": torch.full((1, 4, 8, 8), 0.1)}}}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_forward(pair: tuple[Any, Any], wrapper: Any) -> None:
    """Wrapped afterwards it runs at each call, around ours; wrapped before, inside, the stock UNet runs."""
    pipe, twin = pair
    arguments = WRAPPERS[wrapper]
    for each in pair:
        each.unet.forward = wrapper(each.unet.forward)
    for size in ({}, {"batch": 2}):
        assert_equal(draw(pipe, **arguments, **size), draw(twin, **arguments, **size))
    assert reasons(pipe) == []
    fdcompile.restore(pipe)
    assert torch.equal(draw(pipe, **arguments), draw(twin, **arguments))
    fdcompile.optimize(pipe, ALL)
    assert torch.equal(draw(pipe, **arguments), draw(twin, **arguments))
    (reason,) = reasons(pipe)
    assert "wrapped before optimize was called" in reason


class Strength:
    value = 2.0


def amplify(module: nn.Module) -> None:
    """As tiling patches and LoRA networks do that replace a forward."""
    old = module.forward
    module.forward = lambda x, *args, **kwargs: (old(x, *args, **kwargs)[0] * Strength.value,)  # type: ignore[assignment]


def test_a_parts_forward_that_is_replaced_and_put_back(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, twin = pair
    assert_equal(draw(pipe), draw(twin))
    for each in pair:
        amplify(each.unet.down_blocks[0].attentions[0])
    for strength in (2.0, 3.0):
        monkeypatch.setattr(Strength, "value", strength)
        assert torch.equal(draw(pipe), draw(twin))
        assert reasons(pipe) == [
            "the forward of a Transformer2DModel in it was replaced, and only the stock UNet calls the new one"
        ]
    for each in pair:
        del each.unet.down_blocks[0].attentions[0].forward
    assert_equal(draw(pipe), draw(twin))
    assert reasons(pipe) == []


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda unet: amplify(unet.down_blocks[0].attentions[0]),
    "hook": lambda unet: unet.up_blocks[0].resnets[0].register_forward_hook(louder),
    "pre-hook": lambda unet: unet.down_blocks[0].resnets[0].register_forward_pre_hook(shifted),
    "another part": lambda unet: setattr(unet.down_blocks[0].resnets[0], "nonlinearity", nn.ReLU()),
    "another processor": lambda unet: unet.get_submodule(ATTENTION).set_processor(Louder()),
    "a number of a part": lambda unet: setattr(unet.conv_norm_out, "eps", 1.0),
    "a number of an attention": lambda unet: setattr(unet.get_submodule(ATTENTION), "rescale_output_factor", 0.5),
    "configuration": lambda unet: unet.register_to_config(center_input_sample=True),
    "another parameter": lambda unet: setattr(unet.conv_out, "weight", nn.Parameter(unet.conv_out.weight * 1.3)),
}


class Louder(AttnProcessor2_0):
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs) * 3


@pytest.mark.parametrize("change", CHANGES)
def test_a_part_that_is_patched_within_a_run(pair: tuple[Any, Any], change: str) -> None:
    pipe, twin = pair
    fdcompile.optimize(pipe, ALL)

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            CHANGES[change](pipe.unet)
        return {}

    assert_equal(draw(pipe, callback_on_step_end=callback), draw(twin, callback_on_step_end=callback))
    ((_, steps),) = fdcompile.explain(pipe).stock_reasons.items()
    assert steps == (3, 4, 5)


def twice(*args: Any, **kwargs: Any) -> Tensor:
    """As those do who put an attention of their own in torch's place."""
    return attention(*args, **kwargs) * 2


attention = functional.scaled_dot_product_attention


def test_a_function_of_torch_that_is_replaced(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, twin = pair
    before = draw(pipe)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", twice)
    after = draw(pipe)
    assert_equal(after, draw(twin))
    assert (after - before).abs().max() > 1e-3 * before.abs().max()
    monkeypatch.undo()
    assert_equal(draw(pipe), before)
    assert reasons(pipe) == []


def test_a_function_of_torch_that_is_replaced_within_a_run(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            monkeypatch.setattr(functional, "scaled_dot_product_attention", twice)
        return {}

    images = []
    for each in pair:
        monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
        images.append(draw(each, callback_on_step_end=callback))
    assert_equal(*images)
    ((_, steps),) = fdcompile.explain(pair[0]).stock_reasons.items()
    assert steps == (3, 4, 5)


@pytest.fixture
def hook_on_all() -> Iterator[Callable[[], Any]]:
    """Registers a hook on all modules, which the test may remove before it ends."""
    handles: list[Any] = []

    def register() -> Any:
        def quieter(module: nn.Module, args: Any, output: Any) -> Any:
            return output * 0.95 if isinstance(module, nn.GroupNorm) else None

        handles.append(register_module_forward_hook(quieter))
        return handles[-1]

    yield register
    for handle in handles:
        handle.remove()


def test_a_hook_on_all_modules(pair: tuple[Any, Any], hook_on_all: Callable[[], Any]) -> None:
    pipe, twin = pair
    expected = draw(pipe)
    handle = hook_on_all()
    assert torch.equal(draw(pipe), draw(twin))
    assert reasons(pipe) == ["a hook on all modules is registered, which only the stock UNet calls"]
    handle.remove()
    assert_equal(draw(pipe), expected)
    assert reasons(pipe) == []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            handles.append(hook_on_all())
        return {}

    handles: list[Any] = []
    images = []
    for each in pair:
        images.append(draw(each, callback_on_step_end=callback))
        handles.pop().remove()
    assert_equal(*images)
    ((_, steps),) = fdcompile.explain(pipe).stock_reasons.items()
    assert steps == (3, 4, 5)


def test_torch_s_own_hooks_on_all_modules_only_look(pair: tuple[Any, Any]) -> None:
    pipe, twin = pair
    with FlopCounterMode(display=False):
        counted = draw(pipe)
    assert_equal(counted, draw(twin))
    assert reasons(pipe) == []


def test_a_class_that_is_patched(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, twin = pair
    expected = draw(pipe)
    old = ResnetBlock2D.forward
    monkeypatch.setattr(ResnetBlock2D, "forward", lambda self, *args, **kwargs: old(self, *args, **kwargs) * 1.1)
    assert torch.equal(draw(pipe), draw(twin))
    assert "ResnetBlock2D.forward was replaced" in reasons(pipe)[0]
    monkeypatch.undo()
    assert torch.equal(draw(pipe), expected)
    assert reasons(pipe) == []


def test_what_a_part_changes_in_itself_makes_the_unet_run_stock() -> None:
    images = []
    for optimized in (False, True):
        pipe = fdcompile.optimize(flat_pipe(), ALL) if optimized else flat_pipe()
        pipe.unet.get_submodule(ATTENTION).__class__ = CachingModule
        images.append([draw(pipe) for _ in range(2)])
    for expected, actual in zip(*images, strict=True):
        assert torch.equal(actual, expected)
    assert "keep values from one call to the next" in reasons(pipe)[0]


@pytest.mark.parametrize("kind", [InAnObject, InATensor, InAnArray])
def test_what_a_call_changes_anywhere_makes_the_unet_run_stock(kind: Callable[[], Any]) -> None:
    images = []
    for optimized in (False, True):
        pipe = fdcompile.optimize(flat_pipe(), ALL) if optimized else flat_pipe()
        pipe.unet.get_submodule(ATTENTION).set_processor(kind())
        images.append([draw(pipe) for _ in range(2)])
    for expected, actual in zip(*images, strict=True):
        assert torch.equal(actual, expected)
    assert "keep values from one call to the next" in reasons(pipe)[0]


def test_what_a_unet_only_makes_at_its_first_call_is_no_state(pair: tuple[Any, Any]) -> None:
    pipe, twin = pair
    for each in (pipe, twin):
        each.unet.get_submodule(ATTENTION).set_processor(Lazy())
    processor = pipe.unet.get_submodule(ATTENTION).processor
    assert_equal(draw(pipe), draw(twin))
    assert reasons(pipe) == []
    assert processor.settings == {}, "what a trace has made is not left behind"


@pytest.mark.parametrize("kind", ["object", "NumPy as a tensor"])
def test_what_a_processor_reads_elsewhere_is_followed_between_runs_and_noticed_within(
    pair: tuple[Any, Any], kind: str
) -> None:
    pipe, twin = pair
    for each in pair:
        each.unet.get_submodule(ATTENTION).set_processor(READINGS[kind]())
    for value in (0, 2):
        for each in pair:
            each.unet.get_submodule(ATTENTION).processor.write(value)
        assert_equal(draw(pipe), draw(twin))
        assert reasons(pipe) == []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            pipe.unet.get_submodule(ATTENTION).processor.write(1)
        return {}

    assert_equal(draw(pipe, callback_on_step_end=callback), draw(twin, callback_on_step_end=callback))
    ((reason, steps),) = fdcompile.explain(pipe).stock_reasons.items()
    assert "was changed during the run" in reason
    assert steps == (3, 4, 5)
