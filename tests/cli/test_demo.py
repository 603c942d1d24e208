"""fdcompile demo."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.conftest import rows
from PIL import Image

from fdcompile.cli.cli import main
from fdcompile.tools.generate.store import save_image


def test_demo_compares_stock_and_optimized(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, page = tmp_path / "demo.png", tmp_path / "demo.html"
    options = ["--steps", "6", "--key-steps", "0,1,3", "--max-parallel-steps", "8", "--output", str(image)]
    options += ["--report", str(page)]
    assert main(["demo", "--model", model, "--prompt", "a red circle", "--prompt", "a square", *options]) == 0
    captured = capsys.readouterr()
    table = rows(captured.out)
    assert table["encoder runs"] == ["6", "3"]
    assert table["decoder evaluations"] == ["6 in 6 calls", "6 in 3 calls"]
    for name in ("GFLOP per image", "time of a pipeline call", "PSNR to stock, median", "SSIM to stock, median"):
        assert name in table
    assert "scenes read correctly" not in table  # only the miniature has a checker
    assert captured.err.count("optimized, timed") == 3
    with Image.open(image) as image:
        assert image.size == (260 + 3 * 174, 56 + 2 * 174)  # label and 3 tiles of 160 + 14; header and 2 rows
    html = page.read_text()
    assert "key steps 0 1 3; recompute" in html, "those that ran, whatever else was sampled since"
    assert "key steps 0 1 3; recompute" in captured.out
    assert html.count("<img ") == 2 * 3  # stock, optimized, difference
    assert "6 steps, 3 encoder runs; steps decoded from one key step: 0, 1 to 2, 3 to 5" in html
    assert "How it was made" in html


def test_demo_of_the_miniature_reads_its_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = "a striped red circle left of a blue square on a green background"
    options = ["--steps", "2", "--key-steps", "all", "--output", str(tmp_path / "demo.png")]
    assert main(["demo", "--prompt", scene, *options]) == 0
    table = rows(capsys.readouterr().out)
    assert float(table["SSIM to stock, median"][0]) == 1
    stock, optimized = table["scenes read correctly"]
    assert stock == optimized
    assert stock in ("0 of 1", "1 of 1")


@pytest.mark.usefixtures("few_key_steps_suffice")
def test_demo_of_the_default_shows_what_it_is_compared_with(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    options = ["--steps", "6", "--work", "0.34", "--output", str(tmp_path / "demo.png")]
    assert main(["demo", "--model", model, "--prompt", "a square", *options]) == 0
    printed = capsys.readouterr().out
    assert ["paper's keys", "stock, 2 steps", "default"] in rows(printed).values(), "the table's head"
    assert rows(printed)["encoder runs"][2:] == ["2", "2"]


def test_an_image_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, image = tmp_path / "demo.png", Image.new("RGB", (4, 4))
    save_image(image, path)
    before = path.read_bytes()

    def half(self: Image.Image, path: Path) -> None:
        path.write_bytes(before[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save_image(image, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
