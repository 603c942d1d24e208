"""What a graph was captured under, besides the UNet's modules: modes, code, layouts, and writes past any counter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from models import assert_equal, flat_pipe, sample, small_pipe
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fdcompile
from fdcompile import Config
from fdcompile.capture.guards import Guards

ALL = Config(key_steps="all")


def draw(pipe: Any, **arguments: Any) -> Tensor:
    return sample(pipe, **{"steps": 6, **arguments})


def reasons(pipe: Any) -> list[str]:
    return list(fdcompile.explain(pipe).stock_reasons)


@pytest.fixture(scope="module")
def unchanged() -> Iterator[tuple[Any, Any]]:
    """A pair of pipes that no test changes for good."""
    yield fdcompile.optimize(flat_pipe(), ALL), flat_pipe()


@pytest.fixture
def pair() -> tuple[Any, Any]:
    return fdcompile.optimize(flat_pipe(), ALL), flat_pipe()


@pytest.fixture(scope="module")
def two_levels() -> tuple[Any, Any]:
    """As `unchanged`, where the time has an effect: one channel a group of a normalization hides it."""
    return fdcompile.optimize(small_pipe(), ALL), small_pipe()


class OtherAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return output * 2 if func is functional.scaled_dot_product_attention else output


class OtherSiLU(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return output * 1.1 if func is torch.ops.aten.silu.default else output


@pytest.mark.parametrize("mode", [OtherAttention, OtherSiLU])
def test_a_mode_that_may_change_operations_makes_the_unet_run_stock(unchanged: tuple[Any, Any], mode: Any) -> None:
    pipe, twin = unchanged
    before = draw(pipe)
    assert reasons(pipe) == []
    with mode():
        actual, expected = draw(pipe), draw(twin)
    assert torch.equal(actual, expected)
    assert (actual - before).abs().max() > 1e-3 * before.abs().max()
    assert f"a {mode.__name__} is active" in reasons(pipe)[0]
    assert_equal(draw(pipe), before)
    assert reasons(pipe) == []


@pytest.mark.parametrize("mode", [OtherAttention, OtherSiLU])
def test_a_mode_under_which_a_size_is_first_drawn(pair: tuple[Any, Any], mode: Any) -> None:
    pipe, twin = pair
    with mode():
        draw(pipe)
    assert_equal(draw(pipe), draw(twin))
    assert reasons(pipe) == []


@pytest.mark.parametrize("mode", [OtherAttention, OtherSiLU])
def test_a_mode_that_is_entered_within_a_run(unchanged: tuple[Any, Any], mode: Any) -> None:
    images = []
    for each in unchanged:
        with contextlib.ExitStack() as entered:

            def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                if step == 2:
                    entered.enter_context(mode())
                return {}

            images.append(draw(each, callback_on_step_end=callback))
    assert_equal(*images)
    ((_, steps),) = fdcompile.explain(unchanged[0]).stock_reasons.items()
    assert steps == (3, 4, 5)


@pytest.mark.parametrize("context", [lambda: FlopCounterMode(display=False), lambda: torch.device("cpu")])
def test_modes_that_only_look_change_nothing(unchanged: tuple[Any, Any], context: Callable[[], Any]) -> None:
    pipe, twin = unchanged
    with context():
        actual = draw(pipe)
    assert_equal(actual, draw(twin))
    assert reasons(pipe) == []


class Doubled(Tensor):
    """Whatever it takes part in comes out twice as large, if it is an addition."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs or {})
        return output * 2 if func is functional.linear else output


def test_a_conditioning_of_a_class_of_its_own_makes_the_unet_run_stock(unchanged: tuple[Any, Any]) -> None:
    pipe, twin = unchanged
    for each in (pipe, twin):
        each.scheduler.set_timesteps(4)
    text = torch.randn(2, 7, 32).as_subclass(Doubled)
    with torch.no_grad():
        actual, expected = (
            each.unet(torch.ones(2, 4, 8, 8), each.scheduler.timesteps[0], text).sample for each in (pipe, twin)
        )
    assert torch.equal(actual, expected)
    assert "encoder_hidden_states, a Doubled" in reasons(pipe)[0]


def _another_parameter(unet: nn.Module) -> None:
    unet.conv_out._parameters["weight"] = nn.Parameter(unet.conv_out.weight * 1.3)


def _another_part(unet: nn.Module) -> None:
    unet.down_blocks[0].resnets[0]._modules["nonlinearity"] = nn.ReLU()


@pytest.mark.parametrize("change", [_another_parameter, _another_part])
def test_what_is_put_into_a_module_past_its_methods_within_a_run(pair: tuple[Any, Any], change: Any) -> None:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            change(pipe.unet)
        return {}

    images = [draw(each, callback_on_step_end=callback) for each in pair]
    assert_equal(*images)
    ((_, steps),) = fdcompile.explain(pair[0]).stock_reasons.items()
    assert steps == (3, 4, 5)


def _louder(old: Any) -> Any:
    return lambda *args, **kwargs: old(*args, **kwargs) * 1.3


CODE = {
    "a processor's call": (AttnProcessor2_0, "__call__"),
    "a part's method of torch": (nn.Conv2d, "_conv_forward"),
}

GUARDED = {
    **CODE,
    "a method that a forward calls": (diffusers.models.attention_processor.Attention, "head_to_batch_dim"),
    "a function that a module knows by name": (diffusers.models.embeddings, "get_timestep_embedding"),
    "a method of tensors": (Tensor, "transpose"),
    "an operation of torch": (torch, "baddbmm"),
}


@pytest.mark.parametrize("name", GUARDED)
def test_code_that_a_forward_goes_through_is_guarded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guards = Guards(flat_pipe().unet)
    guards.refresh()
    before = guards.epoch
    assert not guards.changed_within_run()
    owner, attribute = GUARDED[name]
    monkeypatch.setattr(owner, attribute, _louder(getattr(owner, attribute)))
    assert guards.changed_within_run()
    guards.refresh()
    assert guards.epoch > before
    monkeypatch.undo()
    guards.refresh()
    assert guards.epoch == before


@pytest.mark.parametrize("name", CODE)
def test_code_that_is_replaced_is_followed_between_runs_and_noticed_within(
    unchanged: tuple[Any, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, twin = unchanged
    owner, attribute = CODE[name]
    original = vars(owner)[attribute]
    before = draw(pipe)
    monkeypatch.setattr(owner, attribute, _louder(original))
    after = draw(pipe)
    assert_equal(after, draw(twin))
    assert (after - before).abs().max() > 1e-3 * before.abs().max()
    monkeypatch.undo()

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            monkeypatch.setattr(owner, attribute, _louder(original))
        return {}

    images = []
    for each in unchanged:
        images.append(draw(each, callback_on_step_end=callback))
        monkeypatch.undo()
    assert_equal(*images)
    ((_, steps),) = fdcompile.explain(pipe).stock_reasons.items()
    assert steps == (3, 4, 5)


def _channels_last(unet: nn.Module) -> None:
    unet.to(memory_format=torch.channels_last)


def _transposed(unet: nn.Module) -> None:
    """The same values in the same parameter."""
    weight = unet.time_embedding.linear_1.weight
    weight.data = weight.data.t().contiguous().t()


def _one_in_double(unet: nn.Module) -> None:
    """Calls of a UNet that is converted as a whole differ themselves."""
    unet.time_embedding.linear_1.double()


@pytest.mark.parametrize("change", [_channels_last, _transposed, _one_in_double])
def test_layouts_of_weights_are_guarded(change: Callable[[nn.Module], Any]) -> None:
    guards = Guards(unet := flat_pipe().unet)
    guards.refresh()
    before = guards.epoch
    change(unet)
    guards.refresh()
    assert guards.epoch > before


def test_a_parameter_that_is_replaced_by_an_equal_one_is_noticed() -> None:
    """GLIGEN's gates have a single value, which compares as one; later writes go to the new parameter."""
    module = nn.Module()
    module.part = nn.Module()
    module.part.gate = nn.Parameter(torch.zeros(()))
    guards = Guards(module)
    guards.refresh()
    before = guards.epoch
    module.part.gate = nn.Parameter(torch.zeros(()))
    guards.refresh()
    assert guards.epoch > before


@pytest.mark.tables
def test_memory_format_is_part_of_what_a_graph_is_for() -> None:
    """Inductor assumes the strides of the weights."""
    config = Config(key_steps="all", backend="inductor")
    pipe, twin = fdcompile.optimize(flat_pipe(), config), flat_pipe()
    assert_equal(draw(pipe, steps=2), draw(twin, steps=2))
    for each in (pipe, twin):
        each.unet.to(memory_format=torch.channels_last)
    assert_equal(draw(pipe, steps=2), draw(twin, steps=2))
    assert reasons(pipe) == []


def _negated(unet: nn.Module) -> None:
    unet.time_embedding.linear_1.weight.data.neg_()


def _permuted(unet: nn.Module) -> None:
    weight = unet.time_embedding.linear_2.weight.data
    weight.copy_(weight.flip(0))


def _one_sign(unet: nn.Module) -> None:
    unet.down_blocks[0].resnets[0].time_emb_proj.weight.data[0].neg_()


def _turned(unet: nn.Module) -> None:
    """Rows of two, by 90 degrees."""
    weight = unet.time_embedding.linear_1.weight.data
    weight[:2] = torch.stack([-weight[1], weight[0]])


@pytest.mark.parametrize("change", [_negated, _permuted, _one_sign, _turned])
def test_a_write_between_runs_that_keeps_the_norm(two_levels: tuple[Any, Any], change: Any) -> None:
    pipe, twin = two_levels
    before = draw(pipe)
    kept = {name: tensor.clone() for name, tensor in twin.unet.state_dict().items()}
    for each in two_levels:
        change(each.unet)
    after = draw(pipe)
    assert_equal(after, draw(twin))
    assert (after - before).abs().max() > 1e-3 * before.abs().max()
    for each in two_levels:
        for name, tensor in each.unet.state_dict().items():
            tensor.copy_(kept[name])
