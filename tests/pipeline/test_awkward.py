"""Pipes that are offloaded, shared, nested, copied, run in threads, converted, and installations that fail."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor2_0
from models import TEXT, assert_equal, ddim, flat_pipe, sample
from torch import Tensor, nn

import fdcompile
from fdcompile import Config
from fdcompile.errors import CaptureError
from fdcompile.pipeline.hook import attach
from fdcompile.pipeline.session import find_session

ALL = Config(key_steps="all")


@pytest.fixture(scope="module")
def twin() -> Any:
    return flat_pipe()


@pytest.fixture(scope="module")
def shared() -> Any:
    """Optimized and captured once; tests leave it so."""
    return fdcompile.optimize(flat_pipe(), ALL)


def draw(pipe: Any, **arguments: Any) -> Tensor:
    return sample(pipe, steps=6, **arguments)


def installed(pipe: Any) -> dict[str, Any]:
    """What an installation would change."""
    parts = {
        name: part for name in ("unet", "scheduler", "controlnet") if (part := getattr(pipe, name, None)) is not None
    }
    modules = [module for part in parts.values() if isinstance(part, nn.Module) for module in part.modules()]
    return {name: sorted(vars(part)) for name, part in parts.items()} | {
        "pipe": sorted(vars(pipe)),
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
    }


OFFLOADED: dict[str, tuple[Callable[[nn.Module], Any], str | None]] = {
    "as a whole": (lambda unet: accelerate.cpu_offload_with_hook(unet, torch.device("cpu")), None),
    "one by one": (
        lambda unet: [accelerate.cpu_offload(block, torch.device("cpu")) for block in unet.down_blocks],
        "offloaded one by one",
    ),
    "by leaves": (
        lambda unet: apply_group_offloading(unet, onload_device=torch.device("cpu"), offload_type="leaf_level"),
        "diffusers hooks manage its parts",
    ),
    "by blocks": (
        lambda unet: apply_group_offloading(
            unet, onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        ),
        "diffusers hooks manage its parts",
    ),
}


@pytest.mark.parametrize("name", OFFLOADED)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_offloaded(twin: Any, name: str, first: bool) -> None:
    """On a CPU nothing moves, but the same hooks are called."""
    offload, reason = OFFLOADED[name]
    pipe, expected = flat_pipe(), draw(twin)
    if first:
        offload(pipe.unet)
    fdcompile.optimize(pipe, ALL)
    if not first:
        offload(pipe.unet)
    assert_equal(draw(pipe), expected)
    (*reasons,) = fdcompile.explain(pipe).stock_reasons
    assert reasons == [] if reason is None else reason in reasons[0]
    assert torch.equal(draw(fdcompile.restore(pipe)), expected)


def test_with_gradients_the_stock_unet_runs(shared: Any, twin: Any) -> None:
    text, latents = torch.randn(1, *TEXT), torch.randn(1, 4, 8, 8, requires_grad=True)
    shared.scheduler.set_timesteps(6)
    timestep = shared.scheduler.timesteps[0]
    outputs = [each.unet(latents, timestep, encoder_hidden_states=text).sample for each in (shared, twin)]
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(output.sum(), latents)[0] for output in outputs]
    assert torch.equal(*gradients)
    (reason,) = fdcompile.explain(shared).stock_reasons
    assert "gradients are enabled" in reason


def test_tiles_that_take_turns_at_each_step(shared: Any, twin: Any) -> None:
    """Each has its own latent and its own scheduler step: nothing of one may answer for another."""

    def run(pipe: Any) -> Tensor:
        text = torch.randn(1, *TEXT, generator=torch.Generator().manual_seed(4))
        tiles = list(torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(5)))
        pipe.scheduler.set_timesteps(6)
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                for index, tile in enumerate(tiles):
                    noise = pipe.unet(tile, t, encoder_hidden_states=text).sample
                    tiles[index] = pipe.scheduler.step(noise, t, tile).prev_sample
        return torch.stack(tiles)

    fdcompile.optimize(shared, Config(key_steps=3))
    try:
        assert_equal(run(shared), run(twin))
        report = fdcompile.explain(shared)
        ((reason, steps),) = report.stock_reasons.items()
        assert "several latents may take turns" in reason
        assert len(steps) == 3 * 6 - 1
        assert reason in str(report)
        draw(shared)
        assert fdcompile.explain(shared).stock_reasons == {}
    finally:
        fdcompile.optimize(shared, ALL)


class Counting(AttnProcessor2_0):
    """An attention processor that draws something else at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return super().__call__(*args, **kwargs) * self.calls


def test_a_unet_that_keeps_values_runs_stock_however_often_it_is_optimized() -> None:
    pipe, stock = flat_pipe(), flat_pipe()
    for each in (pipe, stock):
        each.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.set_processor(Counting())
    for _ in range(2):
        fdcompile.optimize(pipe, ALL)
        for _ in range(2):
            assert torch.equal(draw(pipe), draw(stock))
            (reason,) = fdcompile.explain(pipe).stock_reasons
            assert "keep values from one call to the next" in reason


class Scaling(AttnProcessor2_0):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs) * self.factor


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return AttnProcessor2_0()(*args, **kwargs) * self.factor


def scaling(factor: float) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: AttnProcessor2_0()(*args, **kwargs) * factor


@pytest.mark.parametrize(
    ("kind", "captures"), [(Scaling, 2), pytest.param(Slotted, 3, marks=pytest.mark.tables), (scaling, 3)]
)
def test_new_attention_processors_are_captured_if_they_may_be_others(
    kind: Callable[[float], Any], captures: int
) -> None:
    """Of an object with a number in it one can tell, of a function or slots one cannot."""
    pipe, stock = fdcompile.optimize(flat_pipe(), ALL), flat_pipe()
    seen = []
    for factor in (0.5, 0.5, 2.0):
        for each in (pipe, stock):
            each.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.set_processor(kind(factor))
        assert_equal(draw(pipe), draw(stock))
        (graph,) = find_session(pipe).executor.runner_cache.graph_cache.graphs.values()
        seen.append(graph)
    assert len({id(graph) for graph in seen}) == captures


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("part", ["pipe", "unet"])
def test_copying_is_refused(shared: Any, copied: Callable[[Any], Any], part: str) -> None:
    with pytest.raises(TypeError, match=r"cannot be copied or pickled: call fdcompile\.restore\(pipe\)"):
        copied(shared if part == "pipe" else shared.unet)


@pytest.mark.parametrize("compiled", ["module", "in place"])
def test_a_compiled_unet_is_refused(compiled: str) -> None:
    pipe = flat_pipe()
    if compiled == "module":
        pipe.unet = torch.compile(pipe.unet)
    else:
        pipe.unet.compile()
    before = installed(pipe)
    with pytest.raises(TypeError, match="compiled already"):
        fdcompile.optimize(pipe)
    assert installed(pipe) == before


def test_two_pipes_share_a_unet(shared: Any, twin: Any) -> None:
    image, stock_image = (StableDiffusionImg2ImgPipeline.from_pipe(each) for each in (shared, twin))
    for each in (image, stock_image):
        each.set_progress_bar_config(disable=True)
    for _ in range(2):
        assert_equal(draw(shared), draw(twin))
        assert_equal(draw(image), draw(stock_image))
        assert fdcompile.explain(image).stock_reasons == {}
    fdcompile.restore(image)
    assert find_session(shared) is None
    fdcompile.optimize(shared, ALL)
    image.scheduler = DDIMScheduler.from_config(ddim().config)
    assert torch.equal(draw(image), draw(stock_image))
    with pytest.raises(RuntimeError, match="not optimized"):
        fdcompile.explain(image)
    fdcompile.restore(image)
    assert find_session(shared) is not None


def test_a_pipe_that_leaves_a_session_does_not_reconfigure_it() -> None:
    stays = flat_pipe()
    leaves = StableDiffusionPipeline(**stays.components, requires_safety_checker=False)
    leaves.set_progress_bar_config(disable=True)
    fdcompile.optimize(stays, Config.paper(key_steps=3, max_parallel_steps=1))
    fdcompile.optimize(leaves, Config.paper(key_steps=3, max_parallel_steps=1))
    sample(leaves, steps=6)
    leaves.scheduler = DDIMScheduler.from_config(ddim().config)
    fdcompile.optimize(leaves, Config.paper(key_steps=3, max_parallel_steps=3))
    for pipe, calls in ((stays, 6), (leaves, 2), (stays, 6)):
        sample(pipe, steps=6)
        assert fdcompile.explain(pipe).decoder_calls == calls


def test_two_pipes_in_two_threads() -> None:
    """Each captures in its own thread, at the same time."""
    pipes = [fdcompile.optimize(flat_pipe(), ALL) for _ in range(2)]
    expected = [draw(flat_pipe(), seed=seed) for seed in range(2)]
    actual: dict[int, list[Tensor]] = {0: [], 1: []}

    def work(index: int) -> None:
        for _ in range(3):
            actual[index].append(draw(pipes[index], seed=index))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(actual[index]) == 3
        for latents in actual[index]:
            assert_equal(latents, expected[index])


@pytest.mark.parametrize("other", ["another pipe", "a pipe of the same UNet"])
def test_a_pipe_in_the_callback_of_another(shared: Any, twin: Any, other: str) -> None:
    def run(pipe: Any, within: Any) -> tuple[Tensor, Tensor]:
        inner: list[Tensor] = []

        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 2:
                inner.append(draw(within, seed=4))
            return {}

        return draw(pipe, callback_on_step_end=callback), inner[0]

    if other == "another pipe":
        pairs = zip(run(shared, fdcompile.optimize(flat_pipe(), ALL)), run(twin, flat_pipe()), strict=True)
    else:
        within = [type(each)(**{**each.components, "scheduler": ddim()}) for each in (shared, twin)]
        pairs = zip(run(shared, within[0]), run(twin, within[1]), strict=True)
    for actual, expected in pairs:
        assert_equal(actual, expected)


def test_converted_to_double_and_back(shared: Any, twin: Any) -> None:
    for dtype in (torch.float64, torch.float32, torch.float64, torch.float32):
        actual, expected = (draw(each.to(dtype)) for each in (shared, twin))
        assert actual.dtype == dtype
        assert_equal(actual, expected)
    assert len(find_session(shared).executor.runner_cache.graph_cache.graphs) == 2


def test_many_images_leave_nothing_behind(shared: Any) -> None:
    fdcompile.optimize(shared, Config(key_steps=2))

    def held() -> tuple[int, int]:
        gc.collect()
        tensors = [tensor for tensor in gc.get_objects() if issubclass(type(tensor), Tensor)]
        return len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    counts = []
    for image in range(8):
        sample(shared, steps=2, seed=image)
        if image in (3, 7):
            counts.append(held())
    fdcompile.optimize(shared, ALL)
    assert counts[0] == counts[1]


class Fault(Exception):
    """On purpose."""


FAULTS = (
    "fdcompile.runtime.executor.Executor.__init__",
    "fdcompile.pipeline.session.prior_noise",
    "fdcompile.pipeline.session.SessionHandler.__init__",
    "fdcompile.pipeline.session.attach",
    "fdcompile.pipeline.session.watch",
    "fdcompile.pipeline.scheduler._replace",
)


@pytest.mark.parametrize("optimized", [False, True], ids=["stock", "optimized"])
@pytest.mark.parametrize("place", FAULTS)
def test_a_failed_installation_changes_nothing(place: str, optimized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = flat_pipe()
    pipe.controlnet = nn.Linear(1, 1)
    stock = installed(pipe)
    if optimized:
        fdcompile.optimize(pipe)
    before, hook = installed(pipe), find_session(pipe)

    def fail(*args: Any) -> None:
        monkeypatch.undo()
        raise Fault

    monkeypatch.setattr(place, fail)
    with pytest.raises(Fault):
        fdcompile.optimize(pipe)
    assert installed(pipe) == before
    assert find_session(pipe) is hook
    fdcompile.restore(fdcompile.optimize(pipe))
    assert installed(pipe) == stock


def test_a_failed_second_registration_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = flat_pipe()
    pipe.controlnet = nn.Linear(1, 1)
    before = installed(pipe)

    def fail(part: nn.Module, answer: Any) -> None:
        attach(part, answer)
        if part is pipe.controlnet:
            raise Fault

    monkeypatch.setattr("fdcompile.pipeline.session.attach", fail)
    with pytest.raises(Fault):
        fdcompile.optimize(pipe)
    assert installed(pipe) == before


def test_two_pipes_share_a_controlnet() -> None:
    first, second = flat_pipe(), flat_pipe()
    first.controlnet = second.controlnet = nn.Linear(1, 1)
    before = installed(first)
    fdcompile.optimize(first)
    fdcompile.optimize(second)
    fdcompile.restore(first)
    assert "_diffusers_hook" in vars(second.controlnet)
    fdcompile.restore(second)
    assert installed(first) == before


class Branching:
    """An attention processor that looks at values to decide."""

    def __call__(self, attention: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden_states.sum() > 0:
            return hidden_states
        return hidden_states * 2


def test_a_capture_error_names_module_and_line(twin: Any) -> None:
    pipe, stock = flat_pipe(), flat_pipe()
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    for each in (pipe, stock):
        each.unet.get_submodule(path).set_processor(Branching())
    fdcompile.optimize(pipe, ALL)
    with pytest.raises(
        CaptureError, match=r"in " + path + r" at 'if hidden_states\.sum\(\) > 0:' \(.*test_awkward\.py"
    ):
        draw(pipe)
    pipe.unet.get_submodule(path).set_processor(twin.unet.get_submodule(path).processor)
    assert_equal(draw(pipe), draw(twin))
    pipe.unet.get_submodule(path).set_processor(Branching())
    assert torch.equal(draw(fdcompile.restore(pipe)), draw(stock))
