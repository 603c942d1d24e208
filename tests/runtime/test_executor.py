"""The optimized pipe against its stock twin."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import diffusers
import pytest
import torch
from models import TEXTS, assert_equal, flat_pipe, sample, small_pipe
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fdcompile
from fdcompile import Config
from fdcompile.capture.call import UNetCall
from fdcompile.capture.export import capture
from fdcompile.capture.guards import tensors
from fdcompile.errors import CaptureError
from fdcompile.graph.flops import flop_counter
from fdcompile.graph.weights import lift_weights
from fdcompile.passes import OPTIONAL_PASSES
from fdcompile.pipeline.record import record_call
from fdcompile.pipeline.session import find_session
from fdcompile.runtime.executor import Executor

SCHEDULERS = ["DDIM", "PNDM", "DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete"]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_all_key_steps_equal_stock(pipe: Any, stock: Any, name: str, batch: int, guidance: float) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(stock.scheduler.config)
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    fdcompile.optimize(pipe, Config(key_steps="all"))
    actual = sample(pipe, batch=batch, guidance=guidance, seed=3)
    original, stock.scheduler = stock.scheduler, scheduler
    try:
        expected = sample(stock, batch=batch, guidance=guidance, seed=3)
    finally:
        stock.scheduler = original
    assert_equal(actual, expected)
    report = fdcompile.explain(pipe)
    assert report.encoder_runs == report.decoder_calls == len(scheduler.timesteps)
    assert report.stock_calls == 0


def test_stochastic_scheduler_with_a_generator(pipe: Any, stock: Any) -> None:
    fdcompile.optimize(pipe, Config(key_steps="all"))
    assert_equal(sample(pipe, eta=1.0), sample(stock, eta=1.0))


def test_callback_sees_and_changes_the_same_latents(pipe: Any, stock: Any) -> None:
    def run(pipe: Any) -> tuple[list[Tensor], Tensor]:
        seen: list[Tensor] = []

        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append(tensors["latents"])
            return {"latents": tensors["latents"] * 0.9}

        latents = sample(pipe, callback_on_step_end=callback)
        return seen, latents

    fdcompile.optimize(pipe, Config(key_steps="all"))
    (seen, latents), (stock_seen, stock_latents) = run(pipe), run(stock)
    assert len(seen) == 10
    for latent, expected in zip([*seen, latents], [*stock_seen, stock_latents], strict=True):
        assert_equal(latent, expected)


def test_parallel_equals_sequential_and_encodes_once_a_key_step(pipe: Any) -> None:
    fdcompile.optimize(pipe, Config.paper(max_parallel_steps=1))
    sequential = sample(pipe, steps=50, batch=2)
    report = fdcompile.explain(pipe)
    assert (report.encoder_runs, report.decoder_evaluations, report.decoder_calls) == (9, 50, 50)
    fdcompile.optimize(pipe, Config.paper(max_parallel_steps=16))
    parallel = sample(pipe, steps=50, batch=2)
    report = fdcompile.explain(pipe)
    assert report.key_steps == (0, 1, 2, 3, 5, 10, 15, 25, 35)
    assert (report.encoder_runs, report.decoder_evaluations, report.decoder_calls) == (9, 50, 9)
    assert_equal(parallel, sequential)


def test_bounded_parallel_steps(pipe: Any) -> None:
    fdcompile.optimize(pipe, Config(max_parallel_steps=4, key_steps=10))
    bounded = sample(pipe, steps=20)
    assert fdcompile.explain(pipe).decoder_calls == 2 * 3
    fdcompile.optimize(pipe, Config(max_parallel_steps=1, key_steps=10))
    assert_equal(bounded, sample(pipe, steps=20))


def test_propagation_is_not_the_stock_run(pipe: Any, stock: Any) -> None:
    """The equalities above would also hold if nothing were ever reused."""
    fdcompile.optimize(pipe, Config.paper())
    assert (sample(pipe, steps=50) - sample(stock, steps=50)).abs().max() > 1e-3


def reference_run(pipe: Any, key_steps: tuple[int, ...], reuse: Any, steps: int) -> Tensor:
    """A sampling loop on the stock UNet in which `reuse(unet, cache, recompute)` replaces its forward."""
    unet, cache = pipe.unet, {}
    stock_forward = unet.forward
    step = iter(range(steps))

    def forward(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor]:
        key = next(step) in key_steps
        return (reuse(unet, stock_forward, cache, key, sample, timestep, encoder_hidden_states),)

    unet.forward = forward
    try:
        return sample(pipe, steps=steps)
    finally:
        del unet.forward


def encoder_propagation(
    unet: Any, forward: Any, cache: dict[str, Any], key: bool, x: Tensor, t: Tensor, text: Tensor
) -> Tensor:
    emb = unet.time_embedding(unet.time_proj(t.expand(x.shape[0])))
    if key:
        h = unet.conv_in(x)
        skips = [h]
        for block in unet.down_blocks:
            arguments = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
            h, new = block(h, emb, **arguments)
            skips += new
        cache.update(h=unet.mid_block(h, emb, encoder_hidden_states=text), skips=tuple(skips))
    h, skips = cache["h"], cache["skips"]
    for block in unet.up_blocks:
        count = len(block.resnets)
        arguments = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
        h = block(h, skips[-count:], emb, **arguments)
        skips = skips[:-count]
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


def deep_feature_caching(
    unet: Any, forward: Any, cache: dict[str, Any], key: bool, x: Tensor, t: Tensor, text: Tensor
) -> Tensor:
    emb = unet.time_embedding(unet.time_proj(t.expand(x.shape[0])))
    last = unet.up_blocks[-1]
    if key:
        hook = last.register_forward_pre_hook(
            lambda module, args, kwargs: cache.update(deep=kwargs["hidden_states"]), with_kwargs=True
        )
        forward(x, t, encoder_hidden_states=text)
        hook.remove()
    h = unet.conv_in(x)
    _, new = unet.down_blocks[0](h, emb, encoder_hidden_states=text)
    skips = (h, *new)[: len(last.resnets)]
    h = last(cache["deep"], skips, emb, encoder_hidden_states=text)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


@pytest.mark.parametrize(
    ("recompute", "reference"),
    [
        (fdcompile.DECODER, encoder_propagation),
        (fdcompile.deep_feature_caching(2), deep_feature_caching),
    ],
)
def test_cut_equals_a_reference_written_against_the_modules(
    pipe: Any, stock: Any, recompute: Any, reference: Any
) -> None:
    fdcompile.optimize(pipe, Config(recompute=recompute, key_steps=(0, 1, 4, 8)))
    expected = reference_run(stock, (0, 1, 4, 8), reference, steps=12)
    assert_equal(sample(pipe, steps=12), expected)


def test_output_reuse_under_ddim_is_ddim_on_the_key_steps(pipe: Any, stock: Any) -> None:
    key_steps = (0, 1, 4, 8)
    fdcompile.optimize(pipe, Config(recompute=(), key_steps=key_steps))
    actual = sample(pipe, steps=12)
    assert fdcompile.explain(pipe).decoder_calls == 0
    scheduler = stock.scheduler
    scheduler.set_timesteps(12)
    timesteps = scheduler.timesteps[list(key_steps)].tolist()

    class KeyStepDDIM(diffusers.DDIMScheduler):
        """DDIM that jumps from each key step to the next, and from the last to the end."""

        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            super().set_timesteps(12)
            self.timesteps = torch.tensor(timesteps)

        def step(self, model_output: Tensor, timestep: Tensor, x: Tensor, **kwargs: Any) -> Any:
            following = [t for t in timesteps if t < timestep]
            previous = following[0] if following else -1
            alpha = self.alphas_cumprod[timestep]
            alpha_previous = self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod
            clean = (x - (1 - alpha).sqrt() * model_output) / alpha.sqrt()
            return (alpha_previous.sqrt() * clean + (1 - alpha_previous).sqrt() * model_output,)

    stock.scheduler = KeyStepDDIM.from_config(scheduler.config)
    try:
        expected = sample(stock, steps=12)
    finally:
        stock.scheduler = scheduler
    assert_equal(actual, expected)


def test_partial_encoder_reads_the_current_latent(pipe: Any, stock: Any) -> None:
    stock_latents = sample(stock, steps=20)
    distance = {}
    for name, recompute in {"decoder": fdcompile.DECODER, "partial": fdcompile.PARTIAL_ENCODER}.items():
        fdcompile.optimize(pipe, Config.paper(recompute=recompute, max_parallel_steps=8))
        distance[name] = (sample(pipe, steps=20) - stock_latents).norm().item()
        calls = fdcompile.explain(pipe).decoder_calls
        assert calls == (7 if name == "decoder" else 20)
    assert distance["partial"] < distance["decoder"]


def test_every_module_recomputed_is_stock(pipe: Any, stock: Any) -> None:
    everything = tuple(name for name, _ in stock.unet.named_children())
    fdcompile.optimize(pipe, Config.paper(recompute=everything))
    assert_equal(sample(pipe), sample(stock))


def test_few_steps_are_warned_of_once(pipe: Any) -> None:
    fdcompile.optimize(pipe)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for steps in (8, 4, 4, 3):
            sample(pipe, steps=steps)
    assert [str(warning.message)[:40] for warning in caught] == ["4 steps: every step is a key step, becau"]


def test_a_signature_is_captured_once(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fdcompile.optimize(pipe, Config.paper())
    sample(pipe)

    def refuse(*args: Any) -> None:
        raise AssertionError("captured again")

    monkeypatch.setattr("fdcompile.runtime.graph_cache.capture_widest", refuse)
    sample(pipe, batch=2, seed=9, guidance=2.0)
    fdcompile.optimize(pipe, Config.paper(recompute=fdcompile.PARTIAL_ENCODER))
    sample(pipe)


def test_a_symbolic_batch_that_cannot_be_had_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    real = capture

    def capturing(unet: nn.Module, call: UNetCall, symbolic_batch: bool = True, sizes: Any = None) -> fx.GraphModule:
        tried.append(symbolic_batch)
        if symbolic_batch:
            raise CaptureError
        return real(unet, call, symbolic_batch, sizes)

    monkeypatch.setattr("fdcompile.capture.export.capture", capturing)
    pipe, twin = fdcompile.optimize(flat_pipe(), Config(key_steps="all")), flat_pipe()
    for batch in (1, 2, 1):
        assert_equal(sample(pipe, steps=2, batch=batch), sample(twin, steps=2, batch=batch))
    assert tried == [True, False, False]


def test_a_graph_for_any_batch_can_be_had_again() -> None:
    """As `export` does with a pipe that has run."""
    pipe = fdcompile.optimize(flat_pipe())
    sample(pipe, steps=1)
    captures = find_session(pipe).executor.runner_cache.graph_cache
    signature, _ = captures.capture(record_call(pipe, None, None, TEXTS))
    assert signature in captures.graphs
    assert signature.batch is None


def test_timestep_from_elsewhere_runs_the_stock_unet(pipe: Any, stock: Any) -> None:
    fdcompile.optimize(pipe, Config.paper())
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    with torch.no_grad():
        for timestep in (500, torch.tensor(500), torch.tensor([500, 100])):
            actual = pipe.unet(x, timestep, encoder_hidden_states=text)
            assert torch.equal(actual.sample, stock.unet(x, timestep, encoder_hidden_states=text).sample)


def test_batch_beyond_the_upsamplers_branch() -> None:
    pipe = fdcompile.optimize(flat_pipe(), Config(key_steps="all"))
    arguments = {"batch": 33, "steps": 6}  # 66 latents with guidance, and captured with them
    assert_equal(sample(pipe, **arguments), sample(flat_pipe(), **arguments))


def test_inference_mode() -> None:
    pipe = fdcompile.optimize(flat_pipe(), Config(key_steps="all"))
    with torch.inference_mode():
        assert_equal(sample(pipe), sample(flat_pipe()))  # captured inside
        fdcompile.optimize(pipe, Config.paper(max_parallel_steps=3))
        sample(pipe)  # batched inside
    parallel = sample(pipe)
    fdcompile.optimize(pipe, Config.paper(max_parallel_steps=1))
    assert_equal(parallel, sample(pipe))


@pytest.mark.filterwarnings("ignore:stage 'schedule' runs step by step")
def test_what_cannot_be_batched_runs_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    kept_whole = importlib.import_module("fdcompile.passes.batch_steps")._WRAPPED
    monkeypatch.delitem(kept_whole, torch.ops.aten.cat.default)
    config = Config(key_steps=(0, 3), max_parallel_steps=3)
    pipe = fdcompile.optimize(small_pipe(), config)
    with pytest.warns(UserWarning, match=r"stage 'decoder' runs step by step: .* at aten\.cat"):
        actual = sample(pipe, steps=5)
    with flop_counter() as counter:
        sample(pipe, steps=5)
    assert fdcompile.explain(pipe).flops == counter.get_total_flops()
    monkeypatch.undo()
    assert_equal(actual, sample(fdcompile.optimize(small_pipe(), config), steps=5))


def test_a_decoder_that_runs_out_of_memory_takes_fewer_steps_at_once(pipe: Any) -> None:
    class Small:
        name = "small"

        def lower(self, graph_module: Any, name: str) -> Any:
            def run(*arguments: Tensor) -> Any:
                steps = max(len(tensor) for tensor in arguments if tensor.ndim == 5) if name == "decoder" else 1
                if steps > 2:
                    raise torch.OutOfMemoryError("on purpose")
                return graph_module(*arguments)

            return run

    fdcompile.optimize(pipe, Config(key_steps=(0, 1), max_parallel_steps=1))
    expected = sample(pipe, steps=9)
    fdcompile.optimize(pipe, Config(key_steps=(0, 1), max_parallel_steps=8, backend=Small()))
    assert_equal(sample(pipe, steps=9), expected)
    assert fdcompile.explain(pipe).decoder_calls == 1 + 4
    sample(pipe, steps=9)
    assert fdcompile.explain(pipe).decoder_calls == 1 + 4, "the limit is remembered"


def test_exact_passes_change_nothing() -> None:
    pipe, latents = flat_pipe(), []
    for disabled in ((), OPTIONAL_PASSES):
        fdcompile.optimize(pipe, Config.paper(disabled_passes=disabled))
        latents.append(sample(pipe, steps=20))
    assert (latents[0] - latents[1]).norm() <= 1e-3 * latents[1].norm()


def test_half_precision_is_as_close_to_the_truth_as_stock_is() -> None:
    """bfloat16 against the stock pipe in fp32, all passes on, every step a key step; mean over four prompts."""
    truth, half = flat_pipe(), flat_pipe().to(torch.bfloat16)
    exact = [sample(truth, seed=seed) for seed in range(4)]

    def error() -> float:
        return sum(float((sample(half, seed=s).float() - exact[s]).norm() / exact[s].norm()) for s in range(4)) / 4

    stock_error = error()
    fdcompile.optimize(half, Config(key_steps="all"))
    assert 0 < error() <= 1.1 * stock_error


def test_channels_last() -> None:
    """The graph keeps the layout that the weights are given before `optimize`."""
    truth, pipe = flat_pipe(), flat_pipe()
    pipe.unet.to(memory_format=torch.channels_last)
    fdcompile.optimize(pipe, Config(key_steps="all"))
    assert_equal(sample(pipe), sample(truth))
    (runner,) = find_session(pipe).executor.runner_cache.runners.values()
    weights = lift_weights(runner.program.stages["decoder"].graph_module)[1]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights if weight.ndim == 4)
    fdcompile.optimize(pipe, Config.paper(max_parallel_steps=1))
    sequential = sample(pipe)
    fdcompile.optimize(pipe, Config.paper(max_parallel_steps=16))
    assert_equal(sample(pipe), sequential)


@pytest.mark.usefixtures("modes_observe")
def test_nothing_waits_for_the_device_between_key_steps(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a value back makes the CPU wait for a GPU."""
    waits: dict[int, list[str]] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
                waits.setdefault(len(steps), []).append(str(func))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(tensors.TensorGuard, "untouched", lambda guard: True)  # compares contents on a CPU only
    steps: list[int] = []
    call = Executor.unet_called

    def watched(self: Executor, *args: Any) -> Any:
        with Watch():
            answer = call(self, *args)
        steps.append(len(steps))
        return answer

    fdcompile.optimize(pipe, Config(key_steps=(0, 2, 6)))
    sample(pipe)
    monkeypatch.setattr(Executor, "unet_called", watched)
    sample(pipe)
    assert len(steps) == 10
    assert not waits
