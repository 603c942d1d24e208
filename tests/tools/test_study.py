"""The study of features: Equation 2, the names of Table 5, the parts of Table 8, and what it keeps in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FLAT, TEXT, THREE_LEVELS, small_pipe, small_unet
from PIL import Image
from torch import Tensor, nn

import fdcompile
from benchmarks.check import example_call, meta_unet
from benchmarks.models import SD15, TOKENS
from fdcompile import Study, study
from fdcompile.graph.flops import flop_counter
from fdcompile.measure.calls import run_call
from fdcompile.tools.study.parts import counting_flops, parameters_of
from fdcompile.tools.study.watch import SHOWN_STEPS, Watch, _principal

STEPS = 5
COMMON: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "latent"}


def call(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(1, *TEXT, generator=generator) for name in ("prompt_embeds", "negative_prompt_embeds")}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = small_pipe()
    pipe.register_modules(unet=small_unet(**THREE_LEVELS))
    return pipe


@pytest.fixture(scope="module")
def studied(pipe: Any) -> Study:
    return study(pipe, [call(0), call(1)], **COMMON)


def test_changes_are_those_of_equation_2(pipe: Any, studied: Study) -> None:
    """Beside all features kept, and the sums written out."""
    kept: list[list[Tensor]] = []
    hook = pipe.unet.up_blocks[1].register_forward_hook(lambda module, args, output: kept[-1].append(output))
    for seed in (0, 1):
        kept.append([])
        run_call(pipe, {"generator": torch.Generator().manual_seed(seed)} | call(seed) | COMMON)
    hook.remove()
    block = studied.blocks["D_4"]
    for step in range(1, STEPS):
        expected, relative = 0.0, 0.0
        for features in kept:
            now, before = features[step], features[step - 1]
            latents, channels, height, width = now.shape
            change = ((now - before) ** 2).sum() / (latents * channels * height * width)
            expected += change.item() / 2
            relative += (change / (now**2).mean()).item() / 2
        assert block.changes[step] == pytest.approx(expected, rel=1e-4)
        assert block.relative[step] == pytest.approx(relative, rel=1e-4)
    norms = [torch.linalg.vector_norm(features[2], dim=(1, 2, 3)).mean().item() for features in kept]
    assert block.norms[2] == pytest.approx(sum(norms) / 2, rel=1e-4)
    assert block.changes[0] == 0


def test_blocks_have_the_names_of_table_5(studied: Study) -> None:
    assert [*studied.blocks] == ["E_8", "E_4", "E_2", "B_2", "D_2", "D_4", "D_8"]
    assert len(studied.timesteps) == STEPS


def test_names_and_parts_of_stable_diffusion() -> None:
    """Encoder 250 M, bottleneck 97 M, decoder 0.51 G parameters, as in Table 8."""
    unet = meta_unet(SD15)
    watch = Watch(unet, lambda: 1)
    arguments = example_call(unet, TOKENS).arguments
    with watch.watching(), counting_flops(unet) as flops:
        unet(**arguments)
    assert [*watch.blocks] == ["E_64", "E_32", "E_16", "E_8", "B_8", "D_8", "D_16", "D_32", "D_64"]
    parameters = parameters_of(unet)
    millions = {part: round(count / 1e6) for part, count in parameters.items()}
    assert millions == {"encoder": 250, "bottleneck": 97, "decoder": 511, "embeddings": 2}
    with flop_counter() as counter, torch.no_grad():
        unet(**arguments)
    assert flops.total() == counter.get_total_flops()
    assert flops["encoder"] / flops["bottleneck"] > 10


def test_parts_add_up_to_the_unet(pipe: Any, studied: Study) -> None:
    assert sum(part.parameters for part in studied.parts.values()) == sum(
        parameter.numel() for parameter in pipe.unet.parameters()
    )
    assert [*studied.parts] == ["encoder", "bottleneck", "decoder", "embeddings"]
    assert all(part.flops > 0 for part in studied.parts.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


@pytest.mark.parametrize("overrides", [FLAT, {"down_block_types": ("DownBlock2D",) * 2, "layers_per_block": 2}])
def test_other_unets(overrides: dict[str, Any]) -> None:
    unet = small_unet(**overrides)
    watch = Watch(unet, lambda: 1)
    with watch.watching(), torch.no_grad():
        unet(torch.randn(2, 4, 8, 8), torch.tensor(1), encoder_hidden_states=torch.randn(2, *TEXT))
    levels = len(unet.config.block_out_channels)
    assert len(watch.blocks) == 2 * levels + (unet.mid_block is not None)
    assert next(iter(watch.blocks)) == "E_8"


def test_memory_does_not_grow_with_steps_or_calls(pipe: Any) -> None:
    held = []
    for steps, calls in ((SHOWN_STEPS, 1), (3 * SHOWN_STEPS, 3)):
        watch = Watch(pipe.unet, lambda: len(pipe.scheduler.timesteps))
        most = 0

        def see(position: Any, output: Tensor, watch: Watch = watch) -> Tensor:
            nonlocal most
            result = watch.output_hook(position, output)
            kept = (tensor for block in watch.blocks.values() for tensor in (block.before, *block.shown))
            most = max(most, sum(tensor.nbytes for tensor in kept if tensor is not None))
            return result

        for seed in range(calls):
            with watch.watching():
                run_call(pipe, call(seed) | COMMON | {"num_inference_steps": steps}, see)
        held.append(most)
    assert held[0] == held[1] > 0


def test_principal_components_are_those_that_vary_most() -> None:
    """Three directions of known variance among eight; the largest is red."""
    generator = torch.Generator().manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    weights = torch.randn(2, 8, 16, 16, generator=generator) * torch.tensor([9.0, 3, 1, *[0.01] * 5])[:, None, None]
    features = torch.einsum("cd,sdhw->schw", directions, weights)
    images = torch.from_numpy(_principal(features)).double()
    assert images.shape == (2, 16, 16, 3)
    for color in range(3):
        pair = torch.stack([images[..., color].flatten(), weights[:, color].flatten().double()])
        assert abs(torch.corrcoef(pair)[0, 1].item()) > 0.99


def test_a_run_that_stops_early_shows_the_steps_it_has(pipe: Any) -> None:
    """As with ``denoising_end``: the schedule goes on where the calls do not."""
    watch = Watch(pipe.unet, lambda: 3 * STEPS)
    with watch.watching():
        run_call(pipe, call(0) | COMMON, watch.output_hook)
    assert max(watch.shown) == 3 * STEPS - 1
    assert {len(images) for images in watch.components().values()} == {sum(step < STEPS for step in watch.shown)}


def test_it_is_written_and_drawn(studied: Study, tmp_path: Path) -> None:
    studied.save(tmp_path / "study.json")
    values = json.loads((tmp_path / "study.json").read_text())
    assert values["blocks"]["B_2"]["changes"] == list(studied.blocks["B_2"].changes)
    assert values["parts"]["decoder"]["parameters"] == studied.parts["decoder"].parameters
    drawn = studied.draw(tmp_path)
    assert [path.name for path in drawn] == ["changes.png", "norms.png", "components.png"]
    for path in drawn:
        with Image.open(path) as image:
            assert min(image.size) > 300
    assert str(studied).count("\n| ") == len(studied.blocks) + len(studied.parts) + 1


def test_what_cannot_be_studied_is_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        study(pipe, [])
    with pytest.raises(ValueError, match="takes no color"):
        study(pipe, [call(0)], color="red")
    with pytest.raises(ValueError, match="expected at least 2, between which features change"):
        study(pipe, [call(0)], **COMMON | {"num_inference_steps": 1})
    with pytest.raises(ValueError, match="different schedules"):
        study(pipe, [call(0), call(1) | {"num_inference_steps": 3}], output_type="latent")
    assert not any(isinstance(module, nn.Module) and module._forward_hooks for module in pipe.unet.modules())


def test_an_optimized_pipe_is_studied_as_the_stock_one(pipe: Any, studied: Study) -> None:
    fdcompile.optimize(pipe)
    again = study(pipe, [call(0), call(1)], **COMMON)
    assert again.blocks == studied.blocks
    run_call(pipe, call(0) | COMMON)
    assert fdcompile.explain(pipe).num_steps == COMMON["num_inference_steps"]
    fdcompile.restore(pipe)
