"""Ways side by side: their pictures, what they cost, how good they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fdcompile.io import atomic_write
from fdcompile.measure.cost import Cost, measure
from fdcompile.measure.quality import Judge, Networks, Quality
from fdcompile.measure.timeline import Step, Timeline
from fdcompile.tools.evaluate.pictures import Asked, Made, folder_name, show_each
from fdcompile.tools.evaluate.variants import Way, fewer_steps
from fdcompile.tools.generate.job import run
from fdcompile.tools.generate.store import Ledger

FILE = "evaluation.json"
_COST = "cost.json"


@dataclass(frozen=True)
class Row:
    """What a way came to.

    Attributes:
        way: its name.
        reference: name of the stock pipeline that it is held against; None: it is that.
        steps: sampling steps.
        pictures: how many of the captions have one.
        share: of the reference's FLOPs.
        cost, quality: measured.
    """

    way: str
    reference: str | None
    steps: int
    pictures: int
    share: float
    cost: Cost
    quality: Quality

    @property
    def ftc(self) -> float | None:
        """Fréchet distance times seconds of a picture over CLIP score (Table 3), where all are known."""
        if self.quality.frechet is None or not self.quality.clip:
            return None
        return self.quality.frechet * self.cost.seconds / self.quality.clip


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        rows: in the order in which they were made; a stock pipeline comes before what is held against it, and after
            each way that is cheaper the stock pipeline with as many steps as at least the same work buys.
        distance_name: of the Fréchet distance.
        missing: a sentence for each measure that is left out, and for each control that cannot be had.
    """

    rows: tuple[Row, ...]
    distance_name: str
    missing: tuple[str, ...]

    def tables(self) -> dict[str, list[list[str]]]:
        """What it costs and what it is like: names of columns, then a row for each way.

        A measure that no way has is no column.
        """
        ways: dict[str, Callable[[Row], str]] = {
            "way": lambda row: row.way,
            "steps": lambda row: str(row.steps),
            "of stock's FLOPs": lambda row: f"{row.share:.3f}",
        }
        cost: dict[str, Callable[[Row], str]] = {
            "GFLOP per image": lambda row: f"{row.cost.gflop:.4g}",
            "encoder runs": lambda row: str(row.cost.unet_calls),
            "s per image": lambda row: f"{row.cost.seconds:.3g}",
            "s of the UNet": lambda row: f"{row.cost.unet_seconds:.3g}",
            "time beside stock": lambda row: _cell(row.cost.ratio, ".2f"),
            "memory, MB": lambda row: _cell(row.cost.memory and row.cost.memory / 1e6, ".3g"),
        }
        quality: dict[str, Callable[[Row], str]] = {
            self.distance_name: lambda row: _cell(row.quality.frechet, ".4g"),
            "CLIP score": lambda row: _cell(row.quality.clip, ".3f"),
            "FTC": lambda row: _cell(row.ftc, ".3g"),
            "PSNR, dB": lambda row: _cell(row.quality.psnr, ".1f"),
            "SSIM": lambda row: _cell(row.quality.ssim, ".3f"),
            "LPIPS": lambda row: _cell(row.quality.lpips, ".3f"),
            "read correctly": lambda row: _cell(row.quality.read, ".1%"),
        }
        return {"Cost": self._table(ways | cost), "Quality": self._table(ways | quality)}

    def _table(self, columns: dict[str, Callable[[Row], str]]) -> list[list[str]]:
        cells = {name: [cell(row) for row in self.rows] for name, cell in columns.items()}
        shown = {name: own for name, own in cells.items() if any(own)}
        return [list(shown), *map(list, zip(*shown.values(), strict=True))]

    def save(self, path: Path) -> None:
        """Writes it as JSON, all of it or nothing."""
        values = asdict(self)
        for row, own in zip(self.rows, values["rows"], strict=True):
            own["ftc"] = row.ftc
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _cell(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def with_references(ways: Sequence[Way]) -> list[Way]:
    """`ways`, before each the stock pipeline that it is held against, if that is not there.

    Raises:
        ValueError: two of them have one name.
    """
    found: list[Way] = []
    for way in ways:
        if (reference := way.reference()) not in found:
            found.append(reference)
        if way not in found:
            found.append(way)
    names = [folder_name(way.name) for way in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two ways are called {sorted(twice)[0]}: rename one of the files")
    return found


def evaluate(
    pipe: Any,
    ways: Sequence[Way],
    asked: Asked,
    folder: Path,
    job: dict[str, Any],
    networks: Networks,
    real: Sequence[Path],
    ranks: Any,
    tell: Callable[[str], None],
    progress: Callable[[int, int | None], None],
) -> Evaluation | None:
    """Makes what is missing in `folder`, a subfolder for each way, and measures all of it.

    Args:
        pipe: a stock pipeline, which stays so.
        ways: whatever is compared, out of `with_references`.
        asked: what is made of it.
        folder: for pictures and costs; those that are there are not made again.
        job: what the pictures depend on beside the way, by name.
        networks: what they are looked at with.
        real: pictures that the distribution of features is held against; if there are none, the stock pipeline's.
        ranks: the processes that share the work, as ``accelerate.PartialState`` knows them.
        tell: is told of what goes wrong, and of what is begun.
        progress: is told how many pictures of a way are done, and of how many.

    Returns:
        In the main process, what was found.

    Raises:
        ValueError: `folder` holds pictures that were made otherwise.
        OSError: a picture cannot be written.
        RuntimeError: many pictures failed one after the other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    queue, costs, missing = list(ways), dict[Way, Cost](), list(networks.missing)
    for way in queue:  # which grows
        if ranks.is_main_process:
            tell(f"{way.name}: {asked.steps_of(way)} steps")
        own = way.of(pipe)
        own.set_progress_bar_config(disable=True)
        place = folder / folder_name(way.name)
        if way not in ways and not place.exists() and (why := _why_not(own, way, asked)):
            missing.append(f"{way.name}: {why}")
            continue
        _make(own, way, asked, place, job, ranks, tell, progress)
        reference = way.reference()
        if ranks.is_main_process and _read_cost(place, asked.batch) is None:
            beside = None if way == reference else reference.of(pipe)
            _write_cost(place, asked.batch, _measured(own, beside, way, asked))
        ranks.wait_for_everyone()
        cost = _read_cost(place, asked.batch)
        assert cost is not None
        costs[way] = cost
        control = _control(way, cost, costs[reference], asked)
        if control is not None and control not in queue:
            queue.insert(queue.index(way) + 1, control)
    if not ranks.is_main_process:
        return None
    rows, judges = [], dict[Way | None, Judge]()
    for way in costs:
        tell(f"{way.name}: looking at its pictures")
        against = None if real else way.reference()
        if against not in judges:
            judges[against] = _judge(networks, real or Made(folder / folder_name(way.reference().name)), asked)
        rows.append(_row(way, costs, asked, folder, judges[against], has_real=bool(real)))
    found = Evaluation(tuple(rows), networks.distance_name, tuple(missing))
    found.save(folder / FILE)
    return found


def _why_not(pipe: Any, way: Way, asked: Asked) -> str | None:
    """Why a way that nobody has asked for cannot be gone: some pipelines need a number of steps."""
    try:
        asked.call(pipe, way, asked.captions[:1])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _make(
    pipe: Any, way: Way, asked: Asked, folder: Path, job: dict[str, Any], ranks: Any, tell: Any, progress: Any
) -> None:
    ledger = Ledger(folder, ranks.process_index)
    config = None if way.config is None else way.config.to_dict()
    own = {"steps": asked.steps_of(way), "sampler": way.sampler, "merged": way.merged, "config": config}
    if ranks.is_main_process:
        ledger.begin(job | own)
    ranks.wait_for_everyone()
    ledger.check(job | own)
    about: dict[str, Any] = {}
    run(asked.maker(pipe, way, about), asked.captions, ledger, ranks, asked.batch, about, tell, progress)


def _measured(pipe: Any, beside: Any, way: Way, asked: Asked) -> Cost:
    captions = asked.captions[: asked.batch]
    stock = way.reference()

    def call(own: Any) -> None:
        asked.call(own, stock if own is beside else way, captions)

    if beside is not None:
        beside.set_progress_bar_config(disable=True)
    return measure(way.name, pipe, beside, call, len(captions))


def _control(way: Way, cost: Cost, reference: Cost, asked: Asked) -> Way | None:
    """The stock pipeline with the steps that at least the work of `way` buys; None where that is all of them."""
    steps = asked.steps_of(way)
    fewer = fewer_steps(cost.gflop / reference.gflop, steps)
    return way.control(fewer) if way.config is not None and fewer < steps else None


def _judge(networks: Networks, real: Sequence[Path] | Made, asked: Asked) -> Judge:
    """One that has been shown the real pictures, or those that stand for them."""
    judge = Judge(networks)
    if networks.features is None:
        return judge
    if isinstance(real, Made):
        for _, pictures in real.batches(asked.captions):
            judge.show_real(pictures)
    else:
        show_each(real, judge.show_real)
    return judge


def _row(way: Way, costs: dict[Way, Cost], asked: Asked, folder: Path, judge: Judge, has_real: bool) -> Row:
    reference = way.reference()
    is_reference = way == reference
    made, beside = Made(folder / folder_name(way.name)), Made(folder / folder_name(reference.name))
    both = [caption for caption in asked.captions if made.has(caption) and beside.has(caption)]
    for own, (captions, pictures) in zip(beside.batches(both), made.batches(both), strict=True):
        judge.show(pictures, [caption.text for caption in captions], None if is_reference else own[1])
    quality = judge.verdict()
    return Row(
        way=way.name,
        reference=None if is_reference else reference.name,
        steps=asked.steps_of(way),
        pictures=sum(map(made.has, asked.captions)),
        share=costs[way].gflop / costs[reference].gflop,
        cost=costs[way],
        quality=quality if has_real or not is_reference else replace(quality, frechet=None),
    )


def _read_cost(folder: Path, batch: int) -> Cost | None:
    path = folder / _COST
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.pop("batch") != batch:
        return None
    if (timeline := values["timeline"]) is not None:
        steps = tuple(Step(**step) for step in timeline["steps"])
        values["timeline"] = Timeline(timeline["name"], steps, timeline["says"], tuple(timeline["reasons"]))
    return Cost(**values)


def _write_cost(folder: Path, batch: int, cost: Cost) -> None:
    with atomic_write(folder / _COST) as partial:
        partial.write_text(json.dumps({"batch": batch, **asdict(cost)}, indent=1) + "\n", encoding="utf-8")
