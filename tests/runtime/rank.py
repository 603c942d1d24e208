"""Run by a test once for each rank: decode with the others, and print what came of it as JSON."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from models import flat_pipe, sample

import fdcompile
from fdcompile import Config, key_steps

KEYS = (0, 1, 4, 9)

STEPS = 12


def equal(rank: int) -> dict[str, Any]:
    """Largest difference to one process alone, over the largest value, and what was run, for each kind of run."""
    results = {}
    key_steps.FEWEST_KEY_STEPS = 1  # the run is short, and reuses by default, too
    for forecast, most in (("hold", 16), ("hold", 1), ("linear", 16), ("auto", 16)):
        keys = "auto" if forecast == "auto" else KEYS
        config: dict[str, Any] = {"key_steps": keys, "forecast": forecast, "max_parallel_steps": most, "work": 0.34}
        shared = sample(fdcompile.optimize(PIPE, Config(**config, process_group=dist.group.WORLD)), steps=STEPS)
        report = fdcompile.explain(PIPE)
        alone = shared.clone() if rank else sample(fdcompile.optimize(PIPE, Config(**config)), steps=STEPS)
        dist.broadcast(alone, src=0)
        error = float((shared - alone).abs().max() / alone.abs().max())
        results[f"{forecast} {most}"] = error, report.decoder_evaluations, report.decoder_calls, report.stock_calls
    return results


def other(rank: int) -> str:
    """What a rank says of a run in which rank 1 has another seed."""
    fdcompile.optimize(PIPE, Config(key_steps=KEYS, process_group=dist.group.WORLD))
    try:
        sample(PIPE, steps=STEPS, seed=int(rank == 1))
    except RuntimeError as error:
        return str(error)
    return "it was not noticed"


def drifted(rank: int) -> list[str]:
    """What a rank says where rank 1 draws other noise, gets another prompt or is nudged in the middle of a run."""

    def nudge(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] + 0.01} if rank == 1 and step == 2 else {}

    def reword(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"] + 0.1} if rank == 1 and step == 2 else {}

    def ancestral(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        noise = torch.randn(tensors["latents"].shape, generator=torch.Generator().manual_seed(rank))
        return {"latents": tensors["latents"] + 0.01 * noise}

    said = []
    for change in (nudge, reword, ancestral):
        names = ["latents", "prompt_embeds"]
        fdcompile.optimize(PIPE, Config(key_steps=KEYS, process_group=dist.group.WORLD))
        try:
            sample(PIPE, STEPS, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
            said.append("it was not noticed")
        except RuntimeError as error:
            said.append(str(error))
    return said


def dead(rank: int) -> str:
    """What rank 0 says where rank 1 dies in the middle of a run."""
    fdcompile.optimize(PIPE, Config(key_steps=KEYS, process_group=dist.group.WORLD))

    def die(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if rank == 1 and step == 3:
            os._exit(9)
        return {}

    try:
        sample(PIPE, steps=STEPS, callback_on_step_end=die)
    except RuntimeError as error:
        return str(error)
    return "it was not noticed"


if __name__ == "__main__":
    what, rank, count, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    PIPE = flat_pipe()
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timeout)
    for part in {"equal": [equal], "faults": [other, drifted, dead]}[what]:
        print(json.dumps(part(rank)), flush=True)
    os._exit(0)  # a group with a dead rank cannot be left
