"""The page in a real browser, on the whole server: what a visitor does, once."""

import shutil
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="no browser's driver: pip install playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser for the page: apt install chromium")

WAIT_MS = 30_000


def test_a_visitor_makes_an_image_and_finds_it_again_by_its_seed(server_url: str, tmp_path: Path) -> None:
    faults: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: "Policy" in message.text and faults.append(message.text))
        page.goto(server_url)
        page.get_by_label("Model", exact=True).select_option("v_prediction")
        page.get_by_label("Class", exact=True).select_option("dog")
        page.get_by_label("Steps", exact=True).fill("40")
        page.get_by_label("Seed", exact=True).fill("7")
        page.get_by_role("button", name="Generate", exact=True).click()
        image = page.locator("#gallery img[src^='blob:']")
        sync_api.expect(image).to_have_count(1, timeout=WAIT_MS)
        assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [32, 32]
        sync_api.expect(page.get_by_role("button", name="Seed 7")).to_be_visible()
        page.screenshot(path=tmp_path / "page.png")
        browser.close()
    assert faults == []
