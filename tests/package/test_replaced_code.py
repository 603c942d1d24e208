"""A package does not contain code that somebody puts in the place of a library's, before or after it is loaded."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from models import TEXTS, assert_equal, flat_pipe, sample
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import fdcompile
from fdcompile import PackageError
from fdcompile.capture.guards import replaced_code


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "onnx"
    return fdcompile.export(flat_pipe(), folder, format="onnx", arguments=TEXTS)


def louder(old: Any) -> Any:
    @functools.wraps(old)
    def replacement(*args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = 2 * old(*args, **kwargs)
        return output

    return replacement


class OtherAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return output * 2 if func is functional.scaled_dot_product_attention else output


PLACES = [(functional, "scaled_dot_product_attention"), (AttnProcessor2_0, "__call__"), (ResnetBlock2D, "forward")]


def test_a_stock_process_has_none_replaced() -> None:
    assert replaced_code(flat_pipe().unet) == []


@pytest.mark.parametrize(("owner", "name"), PLACES)
def test_it_is_named(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, louder(getattr(owner, name)))
    path = f"{owner.__module__}.{owner.__name__}" if isinstance(owner, type) else owner.__name__
    assert replaced_code(flat_pipe().unet) == [f"{path}.{name}"]


def test_neither_exported_nor_loaded_under_a_patch(package: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(functional, "scaled_dot_product_attention", louder(functional.scaled_dot_product_attention))
    with pytest.raises(ValueError, match="scaled_dot_product_attention was replaced"):
        fdcompile.export(flat_pipe(), tmp_path / "package", format="onnx", arguments=TEXTS)
    with pytest.raises(PackageError, match="scaled_dot_product_attention was replaced"):
        fdcompile.load(flat_pipe(), package)


def test_patched_after_it_was_loaded(package: Path) -> None:
    refusing, pipe, stock = fdcompile.load(flat_pipe(), package), flat_pipe(), flat_pipe()
    fdcompile.load(pipe, package, fallback="stock")
    loaded = sample(pipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", louder(functional.scaled_dot_product_attention))
        assert_equal(sample(pipe), sample(stock))
        with pytest.raises(PackageError, match="scaled_dot_product_attention was replaced"):
            sample(refusing)
    assert_equal(sample(pipe), loaded)
    with OtherAttention():
        assert_equal(sample(pipe), sample(stock))
