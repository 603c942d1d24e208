"""Runs the stages of a call slot: those of the prompt, of a key step, and the decoder of a group."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fdcompile.capture.call import UNetCall
from fdcompile.graph.program import FORECAST_WEIGHT, BindingTime
from fdcompile.runtime.caller import Guidance
from fdcompile.runtime.clock import Position
from fdcompile.runtime.conditioning import Conditioning
from fdcompile.runtime.damping import damp, damping
from fdcompile.runtime.forecast import Forecaster
from fdcompile.runtime.policy import KeyStep, Reuse
from fdcompile.runtime.ranks import Ranks
from fdcompile.runtime.run import Run
from fdcompile.runtime.runner import Tensors
from fdcompile.runtime.slot import CallSlot, Group, KeyFeatures


def predict(
    run: Run,
    slot: CallSlot,
    call: UNetCall,
    position: Position,
    decision: KeyStep | Reuse,
    forecaster: Forecaster,
    ranks: Ranks,
) -> Tensor:
    """Computes the noise prediction of `call`, shape ``[batch, channels, ...]``."""
    slot.runner.answered[slot.batch] += 1
    run.last_call, run.last_step = call, position.step
    if isinstance(decision, KeyStep):
        if decision.new_prompt:
            _compute_prompt(run, slot, call)
        if not decision.continues:
            slot.forget()
        call, late = run.controlnets.complete(call, position)
        run.record.controlnet_runs += late
        slot.group = _begin_group(run, slot, call, position.step, forecaster)
    group = slot.group
    assert group is not None
    if position.step not in group.predictions:
        _decode(run, slot, group, call, position.step, ranks)
    prediction = group.predictions.pop(position.step)
    if position.step + 1 == group.stop:
        slot.group = None  # frees its features; `last_key` keeps those of a forecast
    run.release_if_over()
    return prediction


def _compute_prompt(run: Run, slot: CallSlot, call: UNetCall) -> None:
    """Computes the values of a new prompt, and drops those of the previous one."""
    slot.forget()
    inputs = slot.runner.bind_inputs(call, BindingTime.PROMPT)
    slot.prompt = slot.runner.run("prompt", inputs, slot.batch) | inputs
    known = slot.schedule | slot.prompt
    slot.schedule_prompt = slot.runner.run("schedule_prompt", known, slot.batch, len(run.timesteps))
    slot.conditioning = Conditioning(call.of_time(BindingTime.PROMPT))


def _begin_group(run: Run, slot: CallSlot, call: UNetCall, step: int, forecaster: Forecaster) -> Group:
    """Runs the encoder at key step `step`, and begins its group."""
    inputs = slot.runner.bind_inputs(call, BindingTime.LATENT, BindingTime.KEY)
    known = slot.at(step, slot.prompt | inputs)
    known |= slot.runner.run("shallow", known, slot.batch)
    known |= slot.runner.run("encoder", known, slot.batch)
    features = {spec.name: known[spec.name] for spec in slot.runner.program.features}
    features |= slot.runner.bind_inputs(call, BindingTime.KEY)
    features |= _features_before(run, slot, features, call.sample, step, forecaster)
    slot.residuals = Conditioning(call.of_time(BindingTime.KEY))
    slot.group = Group(step, run.end_of_group(step), features)
    run.record.add_group(step, slot.group.stop, features, planned=step in run.key_steps)
    if "shallow" in slot.runner.program.stages:  # it has just run for this step
        _decode_one(run, slot, slot.group, slot.at(step, known | features), step)
    return slot.group


def _features_before(
    run: Run, slot: CallSlot, features: Tensors, latents: Tensor, step: int, forecaster: Forecaster
) -> Tensors:
    """Returns the previous key step's features for the decoder, sets their weights, and keeps `features`."""
    reason = forecaster.why_held(slot.last_key.step if slot.last_key else None, step, run.caller)
    if reason is not None:
        run.record.held.append((step, reason))
    names = slot.runner.program.features_before
    before, slot.last_key = slot.last_key, KeyFeatures(step, {name: features[of] for name, of in names.items()})
    if not names:
        return {}
    feature = next(iter(slot.last_key.features.values()))
    if before is None or reason is not None:
        slot.weights = {FORECAST_WEIGHT: feature.new_zeros(len(run.timesteps))}
        return slot.last_key.features
    slot.weights = {FORECAST_WEIGHT: forecaster.weights(before.step, step).to(feature)}
    if not forecaster.damped:
        return before.features
    slot.last_key = replace(slot.last_key, before=before.features)
    if not before.before:
        return before.features
    return _damped(slot.last_key.features, before, forecaster.weight_of_check(step), latents, run.caller.guidance)


def _damped(
    features: Tensors, before: KeyFeatures, weight: float, latents: Tensor, guidance: Guidance | None
) -> Tensors:
    """Features of key step `before`, damped by how well a forecast would have predicted `features`."""
    scale = None if guidance is None else guidance[1]
    damped = dict(before.features)
    for name, now in features.items():
        last = before.features[name]
        if now.is_floating_point() and now.ndim and len(now) % len(latents) == 0:
            change = weight * (before.before[name] - last)
            damped[name] = damp(now, last, damping(now - last, change, latents, scale))
    return damped


def _decode(run: Run, slot: CallSlot, group: Group, call: UNetCall, step: int, ranks: Ranks) -> None:
    """Predicts `step` and, if no recomputed module reads the latents, further steps of the group."""
    program = slot.runner.program
    if not slot.runner.parallel:
        inputs = slot.runner.bind_inputs(call, BindingTime.LATENT)
        known = slot.at(step, slot.prompt | group.features | inputs)
        known |= slot.runner.run("shallow", known, slot.batch)
        _decode_one(run, slot, group, known, step)
    elif "decoder" not in program.stages:
        group.predictions[step] = group.features[program.output].clone()
    else:
        group.predictions.update(enumerate(_decode_together(run, slot, group, step, ranks), start=step))


def _decode_one(run: Run, slot: CallSlot, group: Group, known: Tensors, step: int) -> None:
    known |= slot.runner.run("decoder", known, slot.batch)
    group.predictions[step] = known[slot.runner.program.output]
    run.record.add_decode(1)


def _decode_together(run: Run, slot: CallSlot, group: Group, step: int, ranks: Ranks) -> Tensor:
    """Predicts `step` and the steps after it, as many as fit into memory, shape ``[steps, batch, ...]``.

    Ranks share the work; each gets all predictions.
    """
    stop = run.decode_until(step, group.stop)
    while True:
        most, reason = slot.runner.max_steps(slot.batch) if stop - step > 1 else (1, "")  # slow at its first call
        share, end = ranks.share(step, stop, most)
        count = share.stop - share.start
        if end < stop:
            run.record.decoded_at_most = end - step, reason
        known = slot.at(share, slot.prompt | group.features)
        try:
            outputs = slot.runner.run("decoder", known, slot.batch, count)
            break
        except torch.OutOfMemoryError:
            if count == 1 or ranks.count > 1:  # other ranks expect the agreed number of steps
                raise
        slot.runner.limit_steps(slot.batch, max(1, count // 2))
    run.record.add_decode(count)
    return ranks.gather(outputs[slot.runner.program.output], step, end)
