"""One line to turn it on, one to turn it off, clear words for what cannot be done."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from models import flat_pipe, sample, small_pipe, small_unet
from torch.nn.modules.module import _global_module_registration_hooks

import fdcompile
from fdcompile import Config
from fdcompile.pipeline.scheduler import followers
from fdcompile.pipeline.session import find_session


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def attributes(pipe: Any) -> dict[str, set[str]]:
    return {name: set(vars(getattr(pipe, name))) for name in ("unet", "scheduler", "vae")} | {"pipe": set(vars(pipe))}


def test_optimize_and_restore_leave_no_trace(stock: Any, tmp_path: Path) -> None:
    pipe = small_pipe()
    expected = sample(pipe)  # a run leaves attributes of the pipeline's own
    before = attributes(pipe)
    assert fdcompile.optimize(pipe, Config.paper()) is pipe
    assert type(pipe) is type(stock)
    optimized = sample(pipe)
    pipe.save_pretrained(tmp_path / "optimized")
    stock.save_pretrained(tmp_path / "stock")
    assert files(tmp_path / "optimized") == files(tmp_path / "stock")
    assert fdcompile.restore(pipe) is pipe
    assert attributes(pipe) == before
    assert pipe.unet.forward.__func__ is type(pipe.unet).forward
    restored = sample(pipe)
    assert torch.equal(restored, expected)
    assert not torch.equal(restored, optimized)


def test_no_hook_is_put_on_all_of_torch_s_modules() -> None:
    gc.collect()  # what other tests have left
    before = len(_global_module_registration_hooks)
    pipe = flat_pipe()
    sample(fdcompile.optimize(pipe, Config.paper()), steps=6)
    assert len(_global_module_registration_hooks) == before, "nor while it is optimized"
    fdcompile.restore(pipe)
    gc.collect()
    assert len(_global_module_registration_hooks) == before


def test_restore_of_a_stock_pipe_does_nothing() -> None:
    pipe = small_pipe()
    before = attributes(pipe)
    assert fdcompile.restore(pipe) is pipe
    assert attributes(pipe) == before


def test_optimizing_again_replaces_the_configuration() -> None:
    pipe = small_pipe()
    sample(pipe)
    before = attributes(pipe)
    fdcompile.optimize(pipe, Config(key_steps=5))
    fdcompile.optimize(pipe, Config(key_steps=2))
    sample(pipe, steps=6)
    assert fdcompile.explain(pipe).key_steps == (0, 2, 4)
    fdcompile.restore(pipe)
    assert attributes(pipe) == before


def test_other_hooks_survive() -> None:
    from diffusers.hooks.hooks import HookRegistry, ModelHook

    pipe = small_pipe()
    HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(ModelHook(), "users_own")
    fdcompile.optimize(pipe)
    fdcompile.restore(pipe)
    assert list(pipe.unet._diffusers_hook.hooks) == ["users_own"]


def test_a_swapped_scheduler_is_followed_and_restored(pipe: Any, stock: Any) -> None:
    from diffusers import EulerDiscreteScheduler

    first = pipe.scheduler
    fdcompile.optimize(pipe, Config(key_steps="all"))
    second = pipe.scheduler = EulerDiscreteScheduler.from_config(first.config)
    sample(pipe)
    assert followers(first) == []
    assert followers(second) == [find_session(pipe)]
    assert fdcompile.explain(pipe).encoder_runs == 10


@pytest.mark.parametrize(
    ("pipe", "message"),
    [
        (SimpleNamespace(transformer=object(), scheduler=object()), "transformer.*enable_cache"),
        (SimpleNamespace(scheduler=object()), "no unet"),
        (SimpleNamespace(unet=small_unet()), "no scheduler"),
        (SimpleNamespace(unet=torch.nn.Linear(1, 1), scheduler=object()), "Linear has no down_blocks"),
        (SimpleNamespace(unet=UNet2DConditionModel, scheduler=object()), "unet is the class UNet2DConditionModel"),
    ],
)
def test_pipes_without_a_unet_are_refused(pipe: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fdcompile.optimize(pipe)


def test_a_scheduler_that_is_a_class_is_refused_and_left_as_it_was() -> None:
    before = set(vars(DDIMScheduler))
    with pytest.raises(TypeError, match=r"scheduler is the class DDIMScheduler: expected an instance of it"):
        fdcompile.optimize(small_unet(), scheduler=DDIMScheduler)
    assert set(vars(DDIMScheduler)) == before


def test_unknown_modules_and_configs_are_refused_and_nothing_is_installed() -> None:
    pipe = small_pipe()
    before = attributes(pipe)
    with pytest.raises(ValueError, match="no module 'up_block'"):
        fdcompile.optimize(pipe, Config.paper(recompute=("up_block",)))
    with pytest.raises(TypeError, match=r"expected a fdcompile\.Config"):
        fdcompile.optimize(pipe, {"key_steps": "all"})  # type: ignore[arg-type]
    assert attributes(pipe) == before


def test_a_refused_configuration_leaves_the_old_one(pipe: Any) -> None:
    fdcompile.optimize(pipe, Config(key_steps=5))
    hook = find_session(pipe)
    with pytest.raises(ValueError, match="no module"):
        fdcompile.optimize(pipe, Config.paper(recompute=("up_block",)))
    assert find_session(pipe) is hook


def test_a_callables_key_steps_are_checked_before_the_unet_runs(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fdcompile.optimize(pipe, Config(key_steps=lambda n: n // 2))  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(pipe.unet.conv_in, "forward", lambda x: pytest.fail("the UNet ran"))
    with pytest.raises(TypeError, match="called with 10 steps it returned 5: expected step indices"):
        sample(pipe)


def test_explain_needs_a_run() -> None:
    pipe = small_pipe()
    with pytest.raises(RuntimeError, match="not optimized"):
        fdcompile.explain(pipe)
    fdcompile.optimize(pipe)
    with pytest.raises(RuntimeError, match="has not run"):
        fdcompile.explain(pipe)
