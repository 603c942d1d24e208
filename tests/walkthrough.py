"""docs/walkthrough.md: one small UNet from the call to the first steps of a run, as the code really takes it there."""

from __future__ import annotations

import difflib
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from models import TEXT, sample, small_pipe
from torch import fx

import fdcompile
from fdcompile import DECODER, Config
from fdcompile.capture.call import UNetCall
from fdcompile.capture.export import capture
from fdcompile.graph.program import StagedProgram, module_path
from fdcompile.graph.text import graph_text
from fdcompile.graph.weights import copy_of
from fdcompile.passes import PASSES, batch_steps, run_passes
from fdcompile.passes.record import Record, snapshot
from fdcompile.runtime.runner import ProgramRunner

RESNET = "up_blocks.1.resnets.1"
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
STEPS, KEY_STEPS = 6, 3
SHOWN = 5
"""Entries of a long list."""

PASSES_SHOWN = {
    "simplify": (
        RESNET,
        """
        Assertions, dropout in evaluation mode, divisions by 1 and the like hide the patterns that later passes look
        for. What is gone from the resnet:
        """,
    ),
    "bind": (
        RESNET,
        """
        Every value is labeled with its *binding time*, the earliest time at which it is known. It follows from those of
        its inputs and from the cut: the modules that run at every step (`Config.recompute`, here the decoder). All
        other modules that read the latent run at key steps. The skip connection comes from the encoder: `key`. The time
        embedding follows from the timestep: `schedule`. What reads both a step's time and the decoder's own values is
        known at the `step`:
        """,
    ),
    "split_skips": (
        RESNET,
        """
        The convolution reads the decoder's half and the skip's half of `cat`. One changes at every step, the other once
        per group. A convolution is a sum over its input channels, and group normalization treats groups of channels one
        by one, so both split; the skip's half is now `key`. The same for the shortcut:
        """,
    ),
}


def page() -> str:
    """The whole document."""
    pipe = small_pipe()
    arguments = {"encoder_hidden_states": torch.zeros(2, *TEXT)}
    positional = (torch.zeros(2, 4, 8, 8), torch.tensor(981))
    call = UNetCall.parse(inspect.signature(pipe.unet.forward), positional, arguments)
    captured = capture(pipe.unet, call)
    program = run_passes(captured, DECODER)
    sections = [_intro(), _call(call), _capture(captured), *_passes(captured), _stages(program), _batched(program)]
    return "\n".join([*sections, _run(pipe)])


def _intro() -> str:
    return _prose(
        f"""
        # A UNet on its way through the compiler

        Made by `make tables` out of `tests/walkthrough.py`: the graphs below are those that the code makes, and a test
        compares them. The UNet is Stable Diffusion's, small: two levels, one layer a block, random weights, latents of
        8x8. `FDCOMPILE_DUMP=folder` before any command writes the same for a UNet of your own, whole.

        Two places are followed, and their paths shortened:

        - `resnet` is `{RESNET}`, the decoder's last: it reads the decoder's values so far, the encoder's first
          skip connection, and the time embedding;
        - `attn2` is `{ATTENTION}`, the first place where the latent meets the prompt.

        A line reads `%name [binding time] : operation(arguments)  # type in module`; `B` is the number of latents, and
        `...` stands for lines left out.
        """
    )


def _call(call: UNetCall) -> str:
    names = {"sample": "the latent, at this step", "timestep": "when the schedule is set", "encoder": "with the prompt"}
    rows = [
        f"| `{name}` | {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} | `{time}`: "
        f"{next(text for start, text in names.items() if name.startswith(start))} |"
        for name, tensor, time in zip(call.signature.names, call.tensors, call.signature.times, strict=True)
    ]
    return _prose(
        """
        ## 1. The call

        The pipeline calls `unet(sample, timestep, encoder_hidden_states=...)`, and a hook takes the call apart
        (`capture/call.py`). Everything follows from when its three tensors are known:

        | argument | type | known |
        |---|---|---|
        """
    ) + "\n".join([*rows, ""])


def _capture(captured: fx.GraphModule) -> str:
    cat = next(node for node in _inside(captured, RESNET) if node.target is torch.ops.aten.cat.default)
    so_far, skip = cat.args[0]
    time = next(node for node in captured.graph.nodes if module_path(node) == "time_embedding.linear_2")
    return _prose(
        f"""
        ## 2. Capture

        `torch.export` turns the call into one graph of ATen operations, with a symbolic batch
        (`capture/export.py`): {_size(captured)}. It keeps convolution, normalization and attention whole, and remembers
        which module each operation came from, because the cut consists of modules. The resnet as exported, where
        `%{so_far.name}` is what the decoder has computed so far, `%{skip.name}` the skip connection (out of
        `{module_path(skip)}`), and `%{time.name}` the time embedding:
        """
    ) + _graph(_excerpt(captured, RESNET))


def _passes(captured: fx.GraphModule) -> Iterator[str]:
    graph_module = copy_of(captured)
    for number, row in enumerate(PASSES, start=3):
        place, about = PASSES_SHOWN[row.name]
        shown, before = _excerpt(graph_module, place), snapshot(graph_module)
        row.run(graph_module, DECODER)
        record = Record.of(row.name, 0.0, before, snapshot(graph_module))
        head = _prose(f"## {number}. Pass `{row.name}`") + "\n" + _prose(about)
        changes = f"\nIn the whole graph, now of {_size(graph_module)}: {record.changes}.\n"
        yield head + _difference(shown, _excerpt(graph_module, place)) + changes


def _stages(program: StagedProgram) -> str:
    head = _prose(
        f"""
        ## {len(PASSES) + 3}. Stages: `partition`

        The labels say where each operation belongs. `partition` moves it there and names what crosses the borders.
        This is `print(fdcompile.explain(pipe).programs[0])`, long lists cut short. *Hoisted* is what runs less often
        than in the stock UNet, and why:
        """
    )
    decoder = _excerpt(program.stages["decoder"].graph_module, RESNET)
    lines = _prose("What is left of the resnet in the decoder; the skip's halves have become inputs:") + _graph(decoder)
    return head + _graph("\n".join(_shortened(str(program).splitlines()))) + "\n" + lines


def _batched(program: StagedProgram) -> str:
    batched = batch_steps(program.stages["decoder"])
    chosen = [node for node in batched.graph.nodes if node.op == "call_function"][:10]
    return _prose(
        f"""
        ## {len(PASSES) + 4}. Steps at once: `batch_steps`

        Nothing in the decoder reads the current latent, so the decoders of a whole group can run together. `vmap` gives
        what differs between the steps a leading axis, and the rules in `passes/batch_steps.py` fold it into the batch,
        so that every operation stays one operation. How the decoder begins:
        """
    ) + _graph(graph_text(batched, chosen))


def _run(pipe: Any) -> str:
    done: list[str] = []
    rows: list[str] = []
    run = ProgramRunner.run

    def recorded(self: ProgramRunner, stage: str, known: Any, batch: int, steps: int | None = None) -> Any:
        if stage in self.program.stages:
            times = f" for {steps} steps" if steps is not None else ""
            done.append(f"{stage}{times} ({batch} {'latent' if batch == 1 else 'latents'})")
        return run(self, stage, known, batch, steps)

    def end_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        rows.append(f"| {step} | {', '.join(done) or 'none (already decoded)'} |")
        done.clear()
        return kwargs

    fdcompile.optimize(pipe, Config(key_steps=KEY_STEPS, max_parallel_steps=KEY_STEPS))
    with patch.object(ProgramRunner, "run", recorded):
        sample(pipe, steps=STEPS, callback_on_step_end=end_step)
    report = fdcompile.explain(pipe)
    return (
        _prose(
            f"""
            ## {len(PASSES) + 5}. The first steps of a run

            `runtime/executor.py` answers the pipeline's UNet calls from the stages. {STEPS} steps with every
            {KEY_STEPS}rd a key step, one prompt with guidance (a batch of two latents). What ran for each call:

            | step | stages |
            |---|---|
            """
        )
        + "\n".join([*rows, "", ""])
        + _prose(
            f"""
            The features of a key step serve its group of {KEY_STEPS} steps, whose decoders run in one call; the
            pipeline's later calls are answered from what it returned. In all {report.flops / 1e9:.4f} GFLOP, where the
            stock UNet takes {report.stock_flops / 1e9:.4f}: {report.flops / report.stock_flops:.3f} of it. By stage:
            {", ".join(f"{name} {flops / 1e9:.4f}" for name, flops in report.stage_flops.items())}.

            Next: [CONTRIBUTING.md](../CONTRIBUTING.md) has the order in which to read the code.
            """
        )
    )


def _prose(text: str) -> str:
    parts = textwrap.dedent(text).strip().split("\n\n")
    return "\n\n".join(part if part[0] in "#|-" else _wrapped(part) for part in parts) + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _graph(text: str, kind: str = "") -> str:
    return f"\n```{kind}\n{text}\n```\n"


def _size(graph_module: fx.GraphModule) -> str:
    operations = sum(node.op == "call_function" for node in graph_module.graph.nodes)
    return f"{operations} operations"


def _inside(graph_module: fx.GraphModule, place: str) -> set[fx.Node]:
    """The operations of the module `place`, and a concatenation that it reads."""
    nodes = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    inside = {node for node in nodes if f"{module_path(node)}.".startswith(f"{place}.")}
    cat = torch.ops.aten.cat.default
    return inside | {source for node in inside for source in node.all_input_nodes if source.target is cat}


def _excerpt(graph_module: fx.GraphModule, place: str) -> str:
    operations = (node for node in graph_module.graph.nodes if node.op == "call_function")
    runs = itertools.groupby(operations, key=_inside(graph_module, place).__contains__)
    parts = [graph_text(graph_module, list(run)) if shown else "..." for shown, run in runs]
    return "\n".join(parts).replace(RESNET, "resnet").replace(ATTENTION, "attn2")


def _difference(before: str, after: str) -> str:
    if not set(before.splitlines()) & set(after.splitlines()) - {"..."}:
        return _graph(after)
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=len(before), lineterm="")
    return _graph("\n".join(itertools.islice(lines, 3, None)), "diff")


def _shortened(lines: list[str]) -> Iterator[str]:
    """At most `SHOWN` neighbors of a kind: inputs, outputs or paths."""
    kinds = itertools.groupby(lines, key=lambda line: line[:6] if line.startswith(("  in", "  out")) else line[:2])
    for kind, group in kinds:
        alike = list(group)
        if not kind.startswith("  ") or len(alike) <= SHOWN:
            yield from alike
        else:
            yield from alike[: SHOWN - 1]
            yield f"  ... and {len(alike) - SHOWN + 1} more"
