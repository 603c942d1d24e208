"""The loop over prompts, with a pipeline that draws at once."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from accelerate import PartialState
from PIL import Image

from fdcompile.tools.generate.generate import generate
from fdcompile.tools.generate.job import GIVE_UP, Summary, run
from fdcompile.tools.generate.prompts import BadLine, Prompt
from fdcompile.tools.generate.store import ResultStore


def draw(prompts: list[Prompt]) -> list[Image.Image]:
    return [Image.new("RGB", (2, 2), (prompt.seed % 256, 0, 0)) for prompt in prompts]


def prompts(count: int) -> Iterator[Prompt]:
    return (Prompt(number, f"image {number}", number) for number in range(count))


class Rank:
    """One of several processes, as far as sharing goes; a barrier is for all of them."""

    def __init__(self, number: int, barrier: threading.Barrier) -> None:
        self.process_index = number
        self.num_processes = barrier.parties
        self.is_main_process = number == 0
        self._barrier = barrier

    split_between_processes = PartialState.split_between_processes

    def wait_for_everyone(self) -> None:
        self._barrier.wait(timeout=60)


def one(folder: Path, lines: Any, make: Any = draw, batch: int = 3, told: list[str] | None = None) -> Summary:
    ledger = ResultStore(folder, 0)
    ledger.begin({"steps": 1})
    tell: Callable[[str], None] = (told if told is not None else []).append
    return run(make, lines, ledger, Rank(0, threading.Barrier(1)), batch, {"config": "x"}, tell, lambda *_: None)


def numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*.png"))


def lines_of(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"manifest-{rank:05}.jsonl").read_text().splitlines()]


def test_an_image_and_a_line_for_each_prompt(tmp_path: Path) -> None:
    tally = one(tmp_path, prompts(7))
    assert numbers(tmp_path) == list(range(7))
    assert [line["number"] for line in lines_of(tmp_path)] == list(range(7))
    first = lines_of(tmp_path)[0]
    assert first.pop("seconds") >= 0
    assert first == {"number": 0, "prompt": "image 0", "seed": 0, "file": "00000000.png", "config": "x"}
    assert (sum(tally.images.values()), tally.skipped, tally.bad) == (7, 0, 0)
    assert not list(tmp_path.glob(".*"))


def test_a_second_run_makes_what_is_missing_and_nothing_twice(tmp_path: Path) -> None:
    one(tmp_path, prompts(5))
    (tmp_path / "00000003.png").unlink()
    made: list[int] = []

    def make(share: list[Prompt]) -> list[Image.Image]:
        made.extend(prompt.number for prompt in share)
        return draw(share)

    changed = [Prompt(1, "another", 1) if prompt.number == 1 else prompt for prompt in prompts(7)]
    tally = one(tmp_path, changed, make)
    assert made == [1, 3, 5, 6]
    assert tally.skipped == 3
    assert one(tmp_path, changed).skipped == 7


def test_a_line_that_was_cut_off_is_written_again(tmp_path: Path) -> None:
    one(tmp_path, prompts(3))
    path = tmp_path / "manifest-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert one(tmp_path, prompts(3)).skipped == 2
    assert one(tmp_path, prompts(3)).skipped == 3


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_share_and_none_is_made_twice(count: int, tmp_path: Path) -> None:
    barrier = threading.Barrier(count)
    ResultStore(tmp_path, 0).begin({})
    tallies: list[Summary] = []

    def work(rank: int) -> None:
        done = run(draw, prompts(11), ResultStore(tmp_path, rank), Rank(rank, barrier), 2, {}, print, lambda *_: None)
        if rank == 0:
            tallies.append(done)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers(tmp_path) == list(range(11))
    shares = [len(lines_of(tmp_path, rank)) for rank in range(count)]
    assert sum(shares) == 11
    assert max(shares) - min(shares) <= 2
    assert sum(tallies[0].images.values()) == 11, "the main process waits for the others"


def test_lines_are_read_no_further_than_they_are_worked_on(tmp_path: Path) -> None:
    read = 0

    def stream() -> Iterator[Prompt]:
        nonlocal read
        for prompt in prompts(10_000):
            read += 1
            yield prompt

    def make(share: list[Prompt]) -> list[Image.Image]:
        assert read <= share[-1].number + 1
        return [image] * len(share)

    image = Image.new("1", (1, 1))
    assert sum(one(tmp_path, stream(), make, batch=100).images.values()) == 10_000


def test_where_a_batch_fails_the_others_of_it_are_made(tmp_path: Path) -> None:
    def make(share: list[Prompt]) -> list[Image.Image]:
        if any(prompt.number == 4 for prompt in share):
            raise ValueError("no such thing")
        return draw(share)

    told: list[str] = []
    tally = one(tmp_path, [*prompts(6), BadLine(6, "line 7: is bad")], make, told=told)
    assert numbers(tmp_path) == [0, 1, 2, 3, 5]
    assert told == ["line 5: ValueError: no such thing", "line 7: is bad"]
    assert (sum(tally.failed.values()), tally.bad) == (1, 1)
    assert one(tmp_path, prompts(6)).skipped == 5, "what failed is tried again"
    assert numbers(tmp_path) == list(range(6))


def test_where_all_fails_it_stops(tmp_path: Path) -> None:
    def make(share: list[Prompt]) -> list[Image.Image]:
        raise ValueError("wrong size")

    with pytest.raises(RuntimeError, match=f"{GIVE_UP} prompts failed one after the other.*wrong size"):
        one(tmp_path, prompts(100), make)
    assert len(lines_of(tmp_path)) == GIVE_UP


def test_a_full_disk_stops_it_and_leaves_what_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saved = Image.Image.save, []

    def full(self: Image.Image, path: Path) -> None:
        save(self, path)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        saved.append(path)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        one(tmp_path, prompts(5))
    assert numbers(tmp_path) == [0, 1]
    assert not list(tmp_path.glob(".*"))
    monkeypatch.setattr(Image.Image, "save", save)
    assert one(tmp_path, prompts(5)).skipped == 2


def test_another_job_is_refused_in_the_same_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    ResultStore(folder, 0).begin({"steps": 20, "config": {"a": (1,)}})
    ResultStore(folder, 0).begin({"steps": 20, "config": {"a": (1,)}})
    with pytest.raises(ValueError, match=r"holds images of another job: steps was 20, not 50\. Choose another"):
        ResultStore(folder, 0).begin({"steps": 50, "config": {"a": (1,)}})
    with pytest.raises(ValueError, match="holds something else"):
        ResultStore(tmp_path, 0).begin({})


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_job_that_cannot_be_read_is_said(text: str, tmp_path: Path) -> None:
    one(tmp_path, prompts(1))
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(ValueError, match=r"job\.json cannot be read"):
        one(tmp_path, prompts(1))


def test_images_of_other_prompts_or_seeds_are_refused_where_they_must_not_be_replaced(tmp_path: Path) -> None:
    one(tmp_path, prompts(3))
    store = ResultStore(tmp_path, 0)
    store.check_prompts(prompts(5))
    for other in (Prompt(2, "image 2", 7), Prompt(2, "another", 2)):
        with pytest.raises(ValueError, match="number 2 is of another prompt or seed"):
            store.check_prompts([other])


def test_a_reason_is_told_once(tmp_path: Path) -> None:
    def make(share: list[Prompt]) -> list[Image.Image]:
        raise ValueError("out of memory" if share[0].number % 2 else "no such thing")

    told: list[str] = []
    summary = one(tmp_path, prompts(5), make, batch=1, told=told)
    assert told == ["line 1: ValueError: no such thing", "line 2: ValueError: out of memory"]
    assert sum(summary.failed.values()) == 5


class Model:
    """As much of a pipeline as `generate` needs."""

    components: ClassVar[dict[str, Any]] = {}

    def __init__(self, weight: float) -> None:
        self.unet = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(self.unet.weight, weight)
        self.components = {"unet": self.unet}
        self.scheduler = SimpleNamespace(config={})

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    def __call__(self, prompt: list[str], generator: Any, **_: Any) -> Any:
        return SimpleNamespace(images=[Image.new("RGB", (2, 2))] * len(prompt))


def test_a_job_knows_its_model(tmp_path: Path) -> None:
    generate(Model(1.0), ["one", "two"], tmp_path, num_inference_steps=3)
    assert generate(Model(1.0), ["one", "two"], tmp_path, num_inference_steps=3).skipped == 2
    with pytest.raises(ValueError, match="weights was"):
        generate(Model(2.0), ["one", "two"], tmp_path, num_inference_steps=3)
    with pytest.raises(ValueError, match="num_inference_steps was 3, not 4"):
        generate(Model(1.0), ["one", "two"], tmp_path, num_inference_steps=4)


def test_no_prompts_are_refused_before_there_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no prompts"):
        generate(Model(1.0), [], tmp_path / "images")
    assert list(tmp_path.iterdir()) == []
