"""The page of a report: what it says, and that a browser shows all of it, on a phone and in the dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import TEXT, small_pipe
from PIL import Image

import fdcompile
from fdcompile import Config, Report
from fdcompile.measure.plot import Plot
from fdcompile.measure.report import HtmlReport
from fdcompile.measure.timeline import FORCED, KEY, REUSED, STOCK, Timeline

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
PHONE, DESK = (390, 844), (1280, 900)
_LINES_AND_WORDS = """
return [...document.querySelectorAll("th[scope=row]")].map(name => {
  const text = document.createRange();
  text.selectNodeContents(name);
  const tops = new Set([...text.getClientRects()].map(box => Math.round(box.top)));
  return [tops.size, name.textContent.trim().split(" ").length];
});
"""
HOSTILE = '<script>document.title = "changed"</script> & "quotes"'


@pytest.fixture(scope="module")
def report() -> Report:
    pipe = fdcompile.optimize(small_pipe(), Config(key_steps=(0, 3)))
    texts = {"prompt_embeds": torch.randn(1, *TEXT), "negative_prompt_embeds": torch.randn(1, *TEXT)}
    pipe(**texts, num_inference_steps=6, output_type="latent")
    return fdcompile.explain(pipe)


@pytest.fixture(scope="module")
def path(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of section, wider than a phone."""
    page = HtmlReport("Stock and optimized", "A page with all there is.")
    page.text("Words", "One paragraph.", HOSTILE)
    figures = [[name, *(["1.234"] * 12)] for name in ("GFLOP per image", "0.199", "decoder evaluations")]
    page.table("Figures", ["", *(f"configuration {n}" for n in range(12))], figures, "A note.")
    image = Image.effect_mandelbrot((1200, 700), (-2, -1, 1, 1), 20)
    file = tmp_path_factory.mktemp("page") / "plot.png"
    image.save(file)
    page.plot("A plot", Plot(file.read_bytes(), file.read_bytes()), "A fractal")
    small = np.full((2, 32, 32, 3), (255, 0, 0), np.uint8)
    page.compared("Images", ("stock", small), [("paper", small)], [HOSTILE, "a square"])
    stock = Timeline.of("stock", replace(report, stock_reasons={"gradients": (1, 2)}))
    page.timeline("Steps", [Timeline.of("paper", report), stock])
    page.made("fdcompile demo --report page.html", {"torch": torch.__version__})
    page.save(file.with_name("page.html"))
    return file.with_name("page.html")


def test_a_timeline_says_what_ran_at_each_step(report: Report) -> None:
    assert [step.kind for step in Timeline.of("", report).steps] == [KEY, REUSED, REUSED, KEY, REUSED, REUSED]
    other = replace(report, forced_key_steps=(3,), stock_reasons={"gradients are enabled": (5, None)})
    timeline = Timeline.of("", other)
    assert [step.kind for step in timeline.steps] == [KEY, REUSED, REUSED, FORCED, REUSED, STOCK]
    assert timeline.steps[5].says == "step 5: the stock UNet, gradients are enabled"
    assert timeline.reasons == ("stock: gradients are enabled",)
    assert "steps decoded from one key step: 0 to 2, 3 to 5" in timeline.says


def test_what_users_write_is_text(path: Path) -> None:
    html = path.read_text()
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", ""), "it needs no network"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("Chromium and its driver are not installed: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    quiet = ("background-networking", "component-update", "sync", "gpu", "dev-shm-usage")
    for switch in ("headless=new", "no-sandbox", "no-first-run", *(f"disable-{name}" for name in quiet)):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_all_of_it(browser: Any, path: Path, size: tuple[int, int], scheme: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size is PHONE},
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []
    assert browser.title == "Stock and optimized"
    images = browser.execute_script("return [...document.images].map(own => [own.complete, own.naturalWidth, own.alt])")
    assert len(images) == 7
    assert all(complete and width and alt for complete, width, alt in images)
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= size[0], "only tables may be wider, and scroll by themselves"
    lines_and_words = browser.execute_script(_LINES_AND_WORDS)
    assert len(lines_and_words) == 5
    assert all(lines <= words for lines, words in lines_and_words), "names of rows break between words only"
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]


def test_the_keyboard_reaches_content_and_tables(browser: Any, path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.get(path.as_uri())
    reached = []
    for _ in range(10):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(browser.execute_script("return document.activeElement.className || document.activeElement.text"))
    assert reached[0] == "skip"
    assert "wide" in reached
    assert "wide gallery" in reached
