"""Generates the images of several variants and measures their cost and quality."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fdcompile.api import restore
from fdcompile.io import write_json
from fdcompile.measure.cost import Cost, measure
from fdcompile.measure.quality import Evaluator, Networks, load_networks
from fdcompile.measure.variant import Variant, fewer_steps
from fdcompile.miniature import scenes_of
from fdcompile.pipeline.identity import describe_model
from fdcompile.tools.evaluate.captions import Caption, caption
from fdcompile.tools.evaluate.images import Spec, StoredImages, folder_name, read_each, real_images
from fdcompile.tools.evaluate.table import Evaluation, Row
from fdcompile.tools.evaluate.variants import parse_variant
from fdcompile.tools.generate.job import Progress, Tell, open_store, processes, run

logger = logging.getLogger(__name__)

FILE = "evaluation.json"
_COST = "cost.json"


def with_references(variants: Sequence[Variant]) -> list[Variant]:
    """Returns `variants`, each preceded by its reference, the stock pipeline, unless that is listed before.

    Raises:
        ValueError: two variants have the same name.
    """
    ordered = list(dict.fromkeys(each for variant in variants for each in (variant.reference(), variant)))
    names = [folder_name(variant.name) for variant in ordered]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two variants are called {sorted(twice)[0]}: rename one of the files")
    return ordered


def evaluate(
    pipe: Any,
    variants: Sequence[str | int | Variant],
    prompts: Sequence[str | Caption],
    output: str | Path,
    *,
    work: float = 0.35,
    batch: int = 1,
    seed: int = 0,
    inputs: Path | None = None,
    real: Path | None = None,
    inception: Path | None = None,
    clip: Path | None = None,
    lpips: Path | None = None,
    tell: Tell = logger.warning,
    progress: Progress = lambda what, done: None,
    **common: Any,
) -> Evaluation | None:
    """Compares variants of `pipe`: FLOPs, time, memory and quality, next to fewer steps at the same work.

    Args:
        pipe: a stock pipeline; it is not changed.
        variants: names such as ``"paper"``, numbers of steps of stock, files with a plan or a configuration, or
            `Variant` objects.
        prompts: one image each; image ``i`` starts from noise of seed ``seed + i``.
        output: folder for images and ``evaluation.json``; existing results are reused.
        work: largest share of stock's FLOPs for plans.
        batch: number of prompts per call.
        seed: seed of the first image.
        inputs: see `Spec`.
        real: folder with the reference images of the Fréchet distance; None for the stock pipeline's images.
        inception: see `load_networks`.
        clip: see `load_networks`.
        lpips: see `load_networks`.
        tell: callback with messages about failures, once for each reason.
        progress: callback with a description of the current work and the share of it done, None while unknown.
        common: keyword arguments of every call, such as ``num_inference_steps=20, guidance_scale=5``.

    Returns:
        The evaluation in the main process; None in the others.

    Raises:
        ValueError, OSError: a variant or a file cannot be read, or `output` holds images of another job.
        TypeError, ImportError: a variant cannot be made of `pipe`, or needs a package that is not installed.
        RuntimeError: many consecutive images failed.
    """
    ranks = processes()
    steps = common.pop("num_inference_steps", 50)
    captions = [caption(n, prompt, seed + n) if isinstance(prompt, str) else prompt for n, prompt in enumerate(prompts)]
    spec = Spec(captions, common, steps, inputs, batch)
    chosen = with_references(
        [variant if isinstance(variant, Variant) else parse_variant(str(variant), pipe, work) for variant in variants]
    )
    for variant in chosen:
        if variant.config is not None:
            restore(variant.of(pipe))
    spec.check_inputs(chosen)
    compared = [] if real is None else real_images(real)
    reads = scenes_of(pipe, [each.text for each in captions]) is not None
    networks = load_networks(inception, clip, lpips, ranks.device, reads)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    costs, left_out = _generate(pipe, chosen, spec, folder, ranks, tell, progress)
    if not ranks.is_main_process:
        return None
    rows = _evaluate(costs, spec, folder, networks, compared, progress)
    evaluation = Evaluation(tuple(rows), networks.distance_name, (*networks.missing, *left_out))
    evaluation.save(folder / FILE)
    return evaluation


def _generate(
    pipe: Any, variants: Sequence[Variant], spec: Spec, folder: Path, ranks: Any, tell: Tell, progress: Progress
) -> tuple[dict[Variant, Cost], list[str]]:
    """Generates the missing images and measures the missing costs of `variants` and of their baselines.

    Returns:
        The costs in the order of measurement, and a sentence for each baseline that cannot run.
    """
    job = describe_model(pipe) | {"inputs": None if spec.inputs is None else str(spec.inputs), **spec.arguments}
    queue, costs, left_out = list(variants), dict[Variant, Cost](), list[str]()
    for variant in queue:  # which grows
        if ranks.is_main_process:
            progress(f"{variant.name}: {spec.steps_of(variant)} steps", None)
        variant_pipe = variant.of(pipe)
        variant_pipe.set_progress_bar_config(disable=True)
        place = folder / folder_name(variant.name)
        if variant not in variants and not place.exists() and (why := _why_not(variant_pipe, variant, spec)):
            left_out.append(f"{variant.name}: {why}")
            continue
        store = open_store(place, job | _facts(variant, spec), ranks)
        store.check_prompts(spec.captions)
        about: dict[str, Any] = {}
        run(spec.maker(variant_pipe, variant, about), spec.captions, store, ranks, spec.batch, about, tell, progress)
        reference = variant.reference()
        if ranks.is_main_process and _read_cost(place, spec.batch) is None:
            stock_pipe = None if variant == reference else reference.of(pipe)
            measured = _measured(variant_pipe, stock_pipe, variant, spec)
            write_json(place / _COST, {"batch": spec.batch, **asdict(measured)})
        ranks.wait_for_everyone()
        cost = _read_cost(place, spec.batch)
        assert cost is not None
        costs[variant] = cost
        baseline = _baseline(variant, cost, costs[reference], spec)
        if baseline is not None and baseline not in queue:
            queue.insert(queue.index(variant) + 1, baseline)
    return costs, left_out


def _evaluate(
    costs: dict[Variant, Cost], spec: Spec, folder: Path, networks: Networks, real: Sequence[Path], progress: Progress
) -> Iterator[Row]:
    """Yields the results of each variant. Reference images of the Fréchet distance are `real` or, if empty, stock."""
    evaluators = dict[Variant | None, Evaluator]()
    for variant in costs:
        progress(f"{variant.name}: measuring its images", None)
        against = None if real else variant.reference()
        if against not in evaluators:
            evaluators[against] = Evaluator(networks)
            if networks.features is not None:
                stored = StoredImages(folder / folder_name(variant.reference().name)).batches(spec.captions)
                for images in read_each(real) if real else (images for _, images in stored):
                    evaluators[against].update_real(images)
        yield _row(variant, costs, spec, folder, evaluators[against], has_real=bool(real))


def _why_not(pipe: Any, variant: Variant, spec: Spec) -> str | None:
    """Returns why an automatically added baseline fails, if it does; some pipelines need a minimum number of steps."""
    try:
        spec.call(pipe, variant, spec.captions[:1])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _facts(variant: Variant, spec: Spec) -> dict[str, Any]:
    """What the images of a variant depend on."""
    config = None if variant.config is None else variant.config.to_dict()
    patch = variant.patch and variant.patch.name
    return {"steps": spec.steps_of(variant), "sampler": variant.sampler, "patch": patch, "config": config}


def _measured(pipe: Any, stock_pipe: Any, variant: Variant, spec: Spec) -> Cost:
    captions = spec.captions[: spec.batch]

    def call(timed: Any) -> None:
        spec.call(timed, variant.reference() if timed is stock_pipe else variant, captions)

    if stock_pipe is not None:
        stock_pipe.set_progress_bar_config(disable=True)
    return measure(variant.name, pipe, stock_pipe, call, len(captions))


def _baseline(variant: Variant, cost: Cost, reference: Cost, spec: Spec) -> Variant | None:
    """Returns the fewer-steps baseline with at least the work of `variant`; None if that takes all steps."""
    steps = spec.steps_of(variant)
    fewer = fewer_steps(cost.gflop / reference.gflop, steps)
    return variant.baseline(fewer) if variant.config is not None and fewer < steps else None


def _row(
    variant: Variant, costs: dict[Variant, Cost], spec: Spec, folder: Path, evaluator: Evaluator, has_real: bool
) -> Row:
    reference = variant.reference()
    is_reference = variant == reference
    made, stock = (StoredImages(folder / folder_name(each.name)) for each in (variant, reference))
    both = [caption for caption in spec.captions if made.has(caption) and stock.has(caption)]
    for (captions, images), (_, references) in zip(made.batches(both), stock.batches(both), strict=True):
        evaluator.update(images, [caption.text for caption in captions], None if is_reference else references)
    quality = evaluator.compute()
    return Row(
        variant=variant.name,
        reference=None if is_reference else reference.name,
        steps=spec.steps_of(variant),
        images=sum(map(made.has, spec.captions)),
        share=costs[variant].gflop / costs[reference].gflop,
        cost=costs[variant],
        quality=quality if has_real or not is_reference else replace(quality, frechet=None),
    )


def _read_cost(folder: Path, batch: int) -> Cost | None:
    path = folder / _COST
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return None if values.pop("batch") != batch else TypeAdapter(Cost).validate_python(values)
