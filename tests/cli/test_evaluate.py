"""fdcompile evaluate: made, interrupted, resumed, shown."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

import fdcompile
from fdcompile.cli import loading
from fdcompile.cli.cli import main
from fdcompile.measure.variant import Variant
from fdcompile.tools.evaluate.captions import caption, read_captions
from fdcompile.tools.evaluate.images import Spec, StoredImages
from fdcompile.tools.generate.store import ResultStore

OPTIONS = ["--images", "4", "--batch", "2", "--steps", "8", "--seed", "4"]
COMPARED = ["--compare", "output-reuse", "--compare", "5"]


def evaluate(output: Path, *more: str) -> int:
    return main(["evaluate", "--output", str(output), *OPTIONS, *COMPARED, *more])


class Interrupting:
    """Counts the pipelines' calls, and presses Ctrl-C instead of one."""

    def __init__(self) -> None:
        self.calls = 0
        self.last: int | None = None

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.last:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call


@pytest.fixture(scope="module")
def counted() -> Iterator[Interrupting]:
    counter = Interrupting()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusionPipeline, "__call__", counter(StableDiffusionPipeline.__call__))
        yield counter


@pytest.fixture(scope="module")
def output(counted: Interrupting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interrupted half-way through the first one, resumed, with a report."""
    folder = tmp_path_factory.mktemp("evaluation") / "own"
    counted.last = 2
    assert evaluate(folder) == 130
    assert not (folder / "evaluation.json").exists()
    assert not list(folder.rglob(".partial*"))
    first = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert len(first) == 2
    counted.last = None
    assert evaluate(folder, "--report", str(folder.with_name("report.html"))) == 0
    assert {path: path.stat().st_mtime_ns for path in first} == first, "what was there was not made again"
    return folder


def test_an_interrupted_evaluation_goes_on(output: Path, counted: Interrupting) -> None:
    folders = sorted(path.name for path in output.iterdir() if path.is_dir())
    assert {"stock", "output-reuse", "stock-5-steps"} <= set(folders)
    assert all(len(list((output / folder).glob("*.png"))) == 4 for folder in folders)
    before = counted.calls
    assert evaluate(output) == 0
    assert counted.calls == before, "all images and costs were there"


def test_each_way_stands_beside_stock_and_fewer_steps(output: Path) -> None:
    values = json.loads((output / "evaluation.json").read_text())
    rows = {row["variant"]: row for row in values["rows"]}
    assert rows["stock"]["reference"] is None
    assert rows["stock"]["share"] == 1
    assert all(row["reference"] == "stock" for name, row in rows.items() if name != "stock")
    reuse = rows["output-reuse"]
    steps = math.ceil(8 * reuse["share"] - 1e-9)
    assert rows[f"stock, {steps} steps"]["share"] == pytest.approx(steps / 8)
    assert reuse["quality"]["frechet"] is not None
    assert reuse["quality"]["psnr"] > 20
    assert reuse["cost"]["ratio"] > 0
    assert values["missing"] == ["CLIP score: no CLIP model (--clip)", "LPIPS: no network for it (--lpips)"]


def test_the_report_shows_all_of_it(output: Path) -> None:
    page = output.with_name("report.html").read_text()
    ways = len(json.loads((output / "evaluation.json").read_text())["rows"])
    assert page.count("<img") == 1 + 4 * (2 * ways - 1)
    for words in ("Fréchet distance (checker)", "Left out", "Images next to stock", "What ran at which step"):
        assert words in page


def test_images_of_another_job_are_refused(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(output, "--guidance", "5") == 2
    assert "guidance_scale was 3.0, not 5.0" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
    assert evaluate(output, "--seed", "5") == 2
    assert "number 0 is of another prompt or seed" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.png")} == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--compare", "papers"], "'papers': expected a number of steps"),
        (["--compare", "broken.json"], "expected a plan or a configuration"),
        (["--compare", "paper", "--preset", "table-1"], "leave --compare out"),
        (["--real", "."], "0 images, expected at least 2"),
        (["--images", "1"], "of at least 2"),
        (["--prompts", "missing.txt"], "does not exist"),
        (["--inception", "broken.pt"], "expected TorchScript of the Inception network"),
        (["--report", "report.png"], "expected the name of a file such as report.html"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(
    options: list[str],
    expected: str,
    tmp_path: Path,
    refusal: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_pipe", lambda *_, **__: pytest.fail("it was loaded"))
    Path("broken.pt").write_text("no network")
    Path("broken.json").write_text("[]")
    assert expected in refusal("evaluate", "--output", "own", *options)
    assert not Path("own").exists()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"real": Path()}, "0 images, expected at least 2"),
        ({"inception": Path("broken.pt")}, "expected TorchScript of the Inception network"),
        ({"clip": Path()}, "expected a CLIP model"),
        ({"inputs": Path()}, "no such image to start from"),
    ],
)
def test_bad_files_are_refused_before_anything_is_made(
    files: dict[str, Any], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.pt").write_text("no network")
    with pytest.raises(ValueError, match=expected):
        fdcompile.evaluate(fdcompile.load_miniature(), [2], ["a red circle on a blue background"], "own", **files)
    assert not Path("own").exists()


def test_what_the_checker_cannot_read_is_not_read(tmp_path: Path) -> None:
    """The miniature, with a prompt that is no caption of its own."""
    pipe = fdcompile.load_miniature()
    prompts = ["a red circle on a blue background", "a horse"]
    for number, known in ((1, True), (2, False)):
        evaluation = fdcompile.evaluate(pipe, [1], prompts[:number], tmp_path / str(number), num_inference_steps=2)
        assert evaluation is not None
        assert [row.quality.read is not None for row in evaluation.rows] == [known, known]


def test_a_model_starts_from_given_images_and_is_held_against_real_ones(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An img2img pipeline, with a COCO file whose images have names of their own."""
    images = [{"id": number, "file_name": f"coco-{number}.png"} for number in range(2)]
    captions = [{"id": number, "image_id": number, "caption": f"caption {number}"} for number in range(2)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for number, value in enumerate((40, 200)):
        Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(inputs / f"coco-{number}.png")
    seen: list[Any] = []

    def img2img(options: Any, _: Any) -> Any:
        from diffusers import StableDiffusionImg2ImgPipeline

        pipe = StableDiffusionImg2ImgPipeline.from_pretrained(options.model)
        preprocess = pipe.image_processor.preprocess
        pipe.image_processor.preprocess = lambda image, *a, **k: seen.append(image) or preprocess(image, *a, **k)
        return pipe

    monkeypatch.setattr(loading, "load_pipe", img2img)
    with pytest.raises(ValueError, match=r"coco-0\.png: there is no such image"):
        captions_of = read_captions(tmp_path / "captions.json", 0, None)
        Spec(captions_of, {}, 3, inputs=tmp_path).check_inputs([Variant("stock")])
    options = ["--prompts", str(tmp_path / "captions.json"), "--inputs", str(inputs), "--real", str(inputs)]
    output = tmp_path / "own"
    arguments = ["--model", model, "--output", str(output), "--steps", "3", "--batch", "2", "--compare", "2", *options]
    assert main(["evaluate", *arguments]) == 0
    assert [np.asarray(image).mean() for image in seen[0]] == [40, 200]
    assert len(list((output / "stock-2-steps").glob("*.png"))) == 2


def test_each_way_starts_from_its_own_images_or_stock_s(tmp_path: Path) -> None:
    asked = Spec([caption(0, "one", 0)], {}, 3, inputs=tmp_path)
    way = Variant("paper", sampler="DDPM")
    for folder, value in (("", 1), ("stock-ddpm", 2), ("paper", 3)):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / folder / "00000000.png")
        given: list[Any] = []

        def pipe(*_: Any, image: Any, given: list[Any] = given, **__: Any) -> Any:
            given.extend(image)
            return SimpleNamespace(images=image)

        asked.call(pipe, way, asked.captions)
        assert given[0].getpixel((0, 0)) == (value,) * 3


def test_a_control_that_cannot_be_had_is_left_out_and_said(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text2Video-Zero, for one, cannot do with few steps."""
    call = StableDiffusionPipeline.__call__

    @functools.wraps(call)
    def picky(*args: Any, num_inference_steps: int, **kwargs: Any) -> Any:
        if num_inference_steps < 8:
            raise IndexError("too few steps")
        return call(*args, num_inference_steps=num_inference_steps, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", picky)
    (tmp_path / "prompts.txt").write_text("a sun\na moon\n")
    options = ["--model", model, "--prompts", str(tmp_path / "prompts.txt"), "--steps", "8", "--batch", "2"]
    output = tmp_path / "own"
    assert main(["evaluate", *options, "--compare", "output-reuse", "--output", str(output)]) == 0
    assert "left out: stock, 6 steps: IndexError: too few steps" in capsys.readouterr().out
    values = json.loads((output / "evaluation.json").read_text())
    assert [row["variant"] for row in values["rows"]] == ["stock", "output-reuse"]


def test_frames_of_a_video_lie_in_one_file(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).random((2, 5, 8, 12, 3))
    captions = [caption(0, "one", 0), caption(1, "two", 1)]
    ledger, about = ResultStore(tmp_path / "own", 0), dict[str, Any]()
    ledger.begin({})
    make = Spec(captions, {}, 3).maker(lambda *_, **__: SimpleNamespace(frames=frames), Variant("stock"), about)
    for entry, image in zip(captions, make(captions), strict=True):
        ledger.save(entry, image, about)
    [(texts, images)] = StoredImages(tmp_path / "own").batches(captions)
    assert [entry.text for entry in texts] == ["one"] * 5 + ["two"] * 5
    assert np.abs(images / 255 - frames.reshape(10, 8, 12, 3)).max() < 0.01
