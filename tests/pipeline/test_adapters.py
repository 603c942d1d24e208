"""Adapters loaded, scaled, fused, swapped: the next image is a stock twin's; captured again only if need be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tomesd
import torch
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from models import TEXT, assert_equal, flat_pipe, lora, sample, small_text_encoder
from torch import Tensor
from transformers import CLIPTokenizer

import fdcompile
from fdcompile import Config
from fdcompile.errors import CaptureError
from fdcompile.miniature import WEIGHTS
from fdcompile.pipeline.session import find_session


class Twins:
    """An optimized pipe and a stock one, to which the same is done."""

    def __init__(self) -> None:
        self.pipes = [fdcompile.optimize(flat_pipe(), Config(key_steps="all")), flat_pipe()]
        self._captured: list[Any] = []
        self._last: Tensor | None = None

    def both(self, do: Callable[[Any], Any]) -> None:
        for pipe in self.pipes:
            do(pipe)

    def draw(self, captures: int, changed: bool = True, **arguments: Any) -> None:
        """The same latents, other ones than before, and so many captures."""
        actual, expected = (sample(pipe, steps=4, **arguments) for pipe in self.pipes)
        largest = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * largest)
        graphs = list(find_session(self.pipes[0]).executor.runner_cache.graph_cache.graphs.values())
        assert sum(all(graph is not captured for captured in self._captured) for graph in graphs) == captures
        self._captured = graphs
        assert fdcompile.explain(self.pipes[0]).stock_reasons == {}
        if self._last is not None and self._last.shape == expected.shape:
            assert ((expected - self._last).abs().max() > 1e-3 * largest) == changed
        self._last = expected


@pytest.fixture
def twins() -> Twins:
    return Twins()


def add_text_encoder(pipe: Any) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", model_max_length=TEXT[0])
    pipe.register_modules(tokenizer=tokenizer, text_encoder=small_text_encoder(tokenizer))


def load(name: str, seed: int, **arguments: Any) -> Callable[[Any], None]:
    return lambda pipe: pipe.load_lora_weights(lora(flat_pipe().unet, seed), adapter_name=name, **arguments)


def test_lora_from_loading_to_unloading(twins: Twins) -> None:
    twins.draw(captures=1)
    twins.both(load("one", seed=1))
    twins.draw(captures=1)
    twins.draw(captures=0, changed=False)
    twins.both(lambda pipe: pipe.set_adapters(["one"], [0.3]))
    twins.draw(captures=1)
    twins.both(lambda pipe: pipe.fuse_lora())
    twins.draw(captures=1, changed=False)
    twins.both(lambda pipe: pipe.unfuse_lora())
    twins.draw(captures=1, changed=False)
    twins.both(lambda pipe: pipe.disable_lora())
    twins.draw(captures=1)
    twins.both(lambda pipe: pipe.unload_lora_weights())
    twins.draw(captures=1, changed=False)


@pytest.mark.tables
def test_lora_two_at_once(twins: Twins) -> None:
    twins.both(load("one", seed=1))
    twins.both(load("two", seed=2))
    twins.both(lambda pipe: pipe.set_adapters(["one", "two"], [0.7, 0.4]))
    twins.draw(captures=1)
    twins.both(lambda pipe: pipe.set_adapters("two"))
    twins.draw(captures=1)
    twins.both(lambda pipe: pipe.delete_adapters("one"))
    twins.draw(captures=1, changed=False)


@pytest.mark.tables
def test_lora_scaled_by_the_call(twins: Twins) -> None:
    twins.both(add_text_encoder)  # the pipeline scales its LoRA, too
    twins.both(load("one", seed=1))
    twins.draw(captures=1, cross_attention_kwargs={"scale": 0.5})
    twins.draw(captures=1, cross_attention_kwargs={"scale": 0.8})
    twins.draw(captures=0, cross_attention_kwargs={"scale": 0.5})
    twins.draw(captures=1)


def test_a_hot_swapped_lora_is_not_captured_again(twins: Twins) -> None:
    twins.both(load("one", seed=1))
    twins.draw(captures=1)
    twins.both(load("one", seed=2, hotswap=True))
    twins.draw(captures=0)


@pytest.mark.tables
def test_custom_diffusion(twins: Twins) -> None:
    def install(pipe: Any) -> None:
        torch.manual_seed(5)
        processors = dict(pipe.unet.attn_processors)
        for name, attention in pipe.unet.named_modules():
            if name.endswith("attn2"):
                width = attention.to_q.in_features
                processors[f"{name}.processor"] = CustomDiffusionAttnProcessor2_0(
                    hidden_size=width, cross_attention_dim=TEXT[1]
                )
        pipe.unet.set_attn_processor(processors)

    twins.draw(captures=1)
    twins.both(install)
    twins.draw(captures=1)


@pytest.mark.tables
def test_merged_tokens(twins: Twins) -> None:
    """ToMe's blocks look up their settings and a generator that they make at their first call."""
    twins.draw(captures=1)
    twins.both(lambda pipe: tomesd.apply_patch(pipe, ratio=0.5, use_rand=False))
    twins.draw(captures=1)
    twins.draw(captures=0, changed=False)
    twins.draw(captures=1, height=8, width=16)
    infos = {id(module._tome_info) for module in twins.pipes[0].unet.modules() if hasattr(module, "_tome_info")}
    assert len(infos) == 1, "a capture has put copies in their place"
    twins.both(tomesd.remove_patch)
    twins.draw(captures=1, height=8, width=16)


def test_merged_tokens_are_decoded_together() -> None:
    pipe = tomesd.apply_patch(flat_pipe(), ratio=0.5, use_rand=False)
    fdcompile.optimize(pipe, Config(key_steps=4, max_parallel_steps=1))
    expected = sample(pipe, steps=8)
    fdcompile.optimize(pipe, Config(key_steps=4, max_parallel_steps=16))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_equal(sample(pipe, steps=8), expected)
    assert fdcompile.explain(pipe).decoder_calls == 2


@pytest.mark.parametrize(
    ("switch", "operation"),
    [
        (lambda pipe: tomesd.apply_patch(pipe, ratio=0.5), r"transformer_blocks\.0 \(aten\.randint"),
        (
            lambda pipe: pipe.unet.down_blocks[0].resnets[0].dropout.train().__setattr__("p", 0.5),
            r"dropout \(aten\.dropout",
        ),
    ],
    ids=["ToMe", "dropout"],
)
def test_random_numbers_are_refused(switch: Callable[[Any], Any], operation: str) -> None:
    pipe = flat_pipe()
    switch(pipe)
    fdcompile.optimize(pipe)
    with pytest.raises(CaptureError, match=r"draws random numbers in \S*" + operation):
        sample(pipe, steps=2)


@pytest.mark.tables
def test_textual_inversion(twins: Twins) -> None:
    """An added token is the text encoder's affair: nothing is captured again."""

    def add_token(pipe: Any) -> None:
        embedding = torch.randn(TEXT[1], generator=torch.Generator().manual_seed(6))
        pipe.load_textual_inversion({"<red-thing>": embedding}, token="<red-thing>")

    words: dict[str, Any] = {"prompt": "a <red-thing>", "prompt_embeds": None, "negative_prompt_embeds": None}
    twins.both(add_text_encoder)
    twins.draw(captures=1, **words)
    twins.both(add_token)
    twins.draw(captures=0, **words)
    twins.both(lambda pipe: pipe.unload_textual_inversion())
    twins.draw(captures=0, **words)


SWITCHES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], bool]] = {
    "FreeU": (
        lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        lambda pipe: pipe.disable_freeu(),
        True,
    ),
    "attention slicing": (
        lambda pipe: pipe.enable_attention_slicing(1),
        lambda pipe: pipe.disable_attention_slicing(),
        False,
    ),
    "fused projections": (
        lambda pipe: pipe.fuse_qkv_projections(vae=False),
        lambda pipe: pipe.unfuse_qkv_projections(vae=False),
        False,
    ),
}


@pytest.mark.parametrize(
    "name", ["FreeU", *(pytest.param(switch, marks=pytest.mark.tables) for switch in SWITCHES if switch != "FreeU")]
)
def test_switched_on_and_off(twins: Twins, name: str) -> None:
    on, off, changes = SWITCHES[name]
    twins.draw(captures=1)
    for switch in (on, off):
        twins.both(switch)
        twins.draw(captures=1, changed=changes)
