"""Run by a test in a process of its own: load a package into the miniature, draw, and write what was drawn."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

import fdcompile

PROMPTS = ["two red circles", "a blue square"]


def draw(pipe: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPTS, num_inference_steps=20, guidance_scale=3.0, generator=generator, output_type="np").images


if __name__ == "__main__":
    package, output = sys.argv[1:]
    pipe = fdcompile.load(fdcompile.load_miniature(), package)
    pictures = draw(pipe)
    report = fdcompile.explain(pipe)
    assert report.full_calls == 0, report
    assert report.encoder_runs < report.decoder_evaluations, report
    np.save(output, pictures)
