"""The page in a real browser: from a file, without errors or requests, on a phone's width too."""

from pathlib import Path

import pytest

from tadistill.report import write_report

from .builder import NASTY

CHROMIUM = Path("/usr/bin/chromium")
ARGS = ["--no-sandbox", "--headless", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
        "--disable-sync"]  # fmt: skip


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGS)
        yield chromium
        chromium.close()


def test_page_in_a_browser(browser, study):
    address = write_report(study.study_dir, study.store_dir).as_uri()
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.wait_for_selector("#figure-paths .main-svg")

    assert page.locator("#sample-answers article").count() == 3
    answer = page.locator("#sample-answers article p:last-child").first
    assert answer.text_content() == f"direct answers 0 in dolly. {NASTY}"
    page.click("#sample-next")
    assert answer.text_content() == f"direct answers 1 in dolly. {NASTY}"
    page.select_option("#sample-set", "facts")
    assert answer.text_content() == f"direct answers 0 in facts. {NASTY}"
    assert page.locator("#sample-references pre").all_text_contents() == ["reference 0", "another"]
    assert page.evaluate("window.hacked") is None

    shown = "document.getElementById('figure-dev-loss').data.filter((trace) => trace.visible === true).length"
    before = page.evaluate(shown)
    page.click(".chip >> nth=0")
    assert page.evaluate(shown) == before - 3  # the mean and two seeds

    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wide = "[...document.querySelectorAll('.main-svg')].map((s) => s.getBoundingClientRect().right)"
        assert max(page.evaluate(wide)) <= width
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert len([url for url in requests if url.startswith("file:")]) == 1
