"""Prompt-to-Prompt on an optimized pipeline: an edited image keeps the layout of its source.

    python examples/prompt_to_prompt.py edited.png

Hertz et al. (2022) draw a source and an edited prompt in one batch and give the edited one the source's attention maps:
those between pixels and words for the first 80 % of the steps, those among pixels for the first 40 %. Faster Diffusion
shows it in Supp. C.4.

What differs between steps is a tensor that is handed to the UNet, here through ``cross_attention_kwargs``. `fdcompile`
sees it change and makes that step a key step. An attribute of the processor would be a constant of the captured graph:
if it changes during a run, the rest of that run is stock.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from PIL import Image, ImageDraw
from torch import Tensor

import fdcompile
from fdcompile.miniature import GUIDANCE, load_miniature

PROMPTS = (
    "a striped red circle left of a blue square on a green background",
    "a striped yellow circle left of a blue square on a green background",
)
"""Source and edited: of as many words."""

STEPS = 50
CROSS_UNTIL, SELF_UNTIL = 40, 20


class EditedAttention:
    """Attention processor for a batch of unconditional source, unconditional edited, source and edited."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        cross_share: Tensor,
        self_share: Tensor,
    ) -> Tensor:
        text, share = (
            (hidden_states, self_share) if encoder_hidden_states is None else (encoder_hidden_states, cross_share)
        )
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key, value = (attn.head_to_batch_dim(project(text)) for project in (attn.to_k, attn.to_v))
        *unconditional, source, edited = attn.get_attention_scores(query, key, attention_mask).chunk(4)
        maps = torch.cat([*unconditional, source, share * source + (1 - share) * edited])
        linear, dropout = attn.to_out
        output: Tensor = dropout(linear(attn.batch_to_head_dim(maps @ value)))
        return output


def draw(pipe: Any, cross_until: int = CROSS_UNTIL, self_until: int = SELF_UNTIL, seed: int = 1) -> list[Image.Image]:
    """Images of `PROMPTS`; the edited one takes its attention maps from the source up to the steps given."""
    shares = {"cross_share": torch.tensor(float(cross_until > 0)), "self_share": torch.tensor(float(self_until > 0))}

    def stop_sharing(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, until in (("cross_share", cross_until), ("self_share", self_until)):
            if step + 1 == until:
                shares[name].zero_()
        return tensors

    images: list[Image.Image] = pipe(
        list(PROMPTS),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for _ in PROMPTS],
        cross_attention_kwargs=shares,
        callback_on_step_end=stop_sharing,
    ).images
    return images


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    pipe = load_miniature()
    pipe.unet.set_attn_processor(EditedAttention())
    source, unrelated = draw(pipe, cross_until=0, self_until=0)
    _, stock = draw(pipe)
    # An edit shows in details, which need fresher features than the layout does.
    fdcompile.optimize(pipe, fdcompile.Config(key_steps=3))
    _, optimized = draw(pipe)
    print(fdcompile.explain(pipe))
    columns = (
        ("source", source),
        ("new prompt alone", unrelated),
        ("edited, stock", stock),
        ("edited, optimized", optimized),
    )
    sheet = Image.new("RGB", (170 * len(columns), 190), "white")
    for number, (title, image) in enumerate(columns):
        sheet.paste(image.resize((160, 160), Image.Resampling.NEAREST), (5 + 170 * number, 25))
        ImageDraw.Draw(sheet).text((85 + 170 * number, 13), title, "black", anchor="mm")
    sheet.save(sys.argv[1])


if __name__ == "__main__":
    main()
