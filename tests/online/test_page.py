"""The page in a real browser, against a real service."""

from pathlib import Path

import numpy as np
import pytest

from hope_jax import online
from hope_jax.online.service import build_app
from tests.online.serving import TOKEN, running

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser: pip install 'hope-jax[browser]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs a browser: there is no {CHROMIUM}"),
]
# What lights up is dark again in a moment.
REMEMBER = """() => {
    window.lit = new Set();
    const look = () => document.querySelectorAll('.level.lit').forEach(row => window.lit.add(row.dataset.level));
    const what = {subtree: true, attributes: true, childList: true};
    new MutationObserver(look).observe(document.getElementById('levels'), what);
}"""
UNNAMED = """() => [...document.querySelectorAll('input, textarea, button')].filter(one =>
    !(one.labels && one.labels.length) && !one.textContent.trim() && !one.getAttribute('aria-label')
).map(one => one.id)"""
# What is drawn: how high each chunk's loss lies on the curve, in the order of the stream (y points downwards).
HEIGHTS = """name => document.querySelector(`#curve polyline.${name}`).getAttribute("points").split(" ")
    .map(point => -Number(point.split(",")[1]))"""
LINE = "The password of the archive is swordfish.\n"


@pytest.fixture(scope="module")
def address(config, params, tmp_path_factory):
    app = build_app(online.Session(config, params), tmp_path_factory.mktemp("sessions"), token=TOKEN)
    with running(app) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with playwright.sync_playwright() as started:
        context = started.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("browser")),
            executable_path=str(CHROMIUM),
            args=FLAGS,
            viewport={"width": 1200, "height": 900},
        )
        yield context
        context.close()


@pytest.fixture
def page(browser, address):
    """The page, opened with the address that `hope serve` prints; it must not complain."""
    page, problems = browser.new_page(), []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{address}/#token={TOKEN}")
    page.problems = problems
    yield page
    page.close()


def read(page, text):
    page.fill("#text", text)
    page.click("#read")
    playwright.expect(page.locator("#status")).to_contain_text("tokens read,", timeout=120_000)


def test_levels_light_up_and_the_loss_falls(page, config, params, tmp_path):
    assert TOKEN not in page.url
    page.fill("#user", "ann")
    page.evaluate(REMEMBER)
    read(page, LINE * 8)
    assert page.evaluate("[...window.lit].sort()") == ["level_0", "level_1"]
    chunks = online.Session(config, params).observe(LINE * 8).chunks
    last = [float(word) for word in page.inner_text("#loss").removesuffix("nats per token").split("→")]
    assert last == pytest.approx([chunks.before[-1], chunks.after[-1]], abs=1e-3) and last[1] < last[0]
    before, after = (np.array(page.evaluate(HEIGHTS, name)) for name in ("before", "after"))
    assert len(before) == len(after) == len(chunks.before)
    assert before[-10:].mean() < before[:10].mean() and after[-10:].mean() < after[:10].mean()  # along the stream
    assert after.mean() < before.mean()  # and by each write
    assert page.locator(".level[data-level=level_1] .lane i.fired").count() == len(LINE) * 8 // 32
    assert float(page.inner_text(".level[data-level=level_0] .moved b")) > 0
    assert f"{len(LINE) * 8} tokens read so far" in page.inner_text("#tokens")
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert not page.problems


def test_ask_forget_and_delete(page):
    page.fill("#user", "ben")
    read(page, LINE * 4)
    page.fill("#prompt", "The password")
    page.fill("#length", "5")
    page.click("#go")
    playwright.expect(page.locator("#status")).to_have_text("answered", timeout=120_000)
    assert page.inner_text("#answer").startswith("The password")
    page.click("[data-forget=level_0]")
    playwright.expect(page.locator("#status")).to_have_text("forgot level_0")
    assert page.inner_text(".level[data-level=level_0] .moved b") == "0.0000"
    page.click("#delete")
    playwright.expect(page.locator("#status")).to_have_text("deleted")
    assert not page.problems


def test_a_wrong_token_is_said(page):
    page.fill("#token", "wrong")
    page.fill("#text", "x")
    page.click("#read")
    playwright.expect(page.locator("#status")).to_contain_text("missing or wrong token")
    page.problems.clear()  # the browser itself reports every status 401


def test_every_control_has_a_name(page):
    page.fill("#user", "cleo")
    read(page, LINE)
    assert page.evaluate(UNNAMED) == []
