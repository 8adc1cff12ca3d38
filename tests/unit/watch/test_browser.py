"""The page in a real browser: it follows the study by itself, fits a phone, and says when its server has gone."""

import time

import pytest

from .folder import D1, NASTY, PLAN, S1, S2, XL

SMALL, LARGE = {"width": 390, "height": 844}, {"width": 1280, "height": 800}


class Opened:
    """The page in a browser; it remembers what went wrong and what was asked for."""

    def __init__(self, browser, server, **options):
        self.page, self.server = browser.new_page(viewport=LARGE, **options), server
        self.problems, self.requests = [], []
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(server.url)
        self.wait("document.getElementById('live').textContent.startsWith('updated')")

    def wait(self, script: str) -> None:
        """Wait until a script returns true (the page's policy forbids `eval`, which playwright's own waiting uses)."""
        end = time.monotonic() + 15
        while not self.page.evaluate(script):
            assert time.monotonic() < end, f"never true: {script}"
            self.page.wait_for_timeout(30)

    def assert_quiet(self):
        assert self.problems == []
        assert [url for url in self.requests if not url.startswith(self.server.url) and not url.startswith("data:")] == []
        assert self.page.evaluate("window.hacked") is None

    def assert_fits(self):
        for size in (LARGE, SMALL):
            self.page.set_viewport_size(size)
            self.wait(f"document.documentElement.scrollWidth <= {size['width']}")


@pytest.fixture
def quick(monkeypatch):
    """The page asks again after a tenth of a second."""
    from tadistill.watch import server

    monkeypatch.setattr(server, "_PAUSES", {})
    monkeypatch.setattr(server, "_REST", 0.1)


def test_a_running_study_is_followed(browser, folder, server, quick):
    folder.finish(XL)
    folder.log(XL, 1, 100)
    folder.log(S1, 1, 20, loss=2.0)
    folder.run(S1)
    opened = Opened(browser, server)
    page = opened.page
    assert page.locator("h1").inner_text() == "The study is running."
    assert page.title() == "1/6 running · small"
    last = "JSON.parse(document.querySelector('#sft-train-loss .values').textContent).lines.map((line) => line[2].at(-1))"
    assert page.evaluate(last) == [20]  # the running stage
    folder.log(S1, 21, 40, loss=1.5)
    opened.wait(f"{last}[0] === 40")
    folder.sampled(D1, f"first answer {NASTY}")
    opened.wait("document.querySelector('#samples').textContent.includes('first answer')")
    folder.sampled(D1, "second answer")
    opened.wait("document.querySelector('#samples').textContent.includes('second answer')")
    boxes = "['.prompt span', '.prompt'].map((name) => document.querySelector(name).getBoundingClientRect())"
    text, box = page.evaluate(boxes)
    assert text["height"] > box["height"]
    assert text["bottom"] <= box["bottom"]  # a long prompt shows its end, with the question

    folder.finish(S1)
    folder.run(S2)
    folder.log(S2, 1, 5)
    opened.wait("document.title.startsWith('2/6 running')")
    opened.wait("document.querySelector('#now').textContent.includes('sft s, seed 2')")
    folder.run(S2, dead=True)
    opened.wait("document.querySelector('h1').textContent === 'The run was killed, or its machine stopped.'")
    assert "killed" in page.locator("#alerts").inner_text().lower()
    assert "tadistill run small.yaml" in page.locator("#head").inner_text()
    assert page.locator("#now").inner_text() == ""
    assert page.locator(".node.bad").count() == 1
    opened.assert_fits()
    opened.assert_quiet()


def test_a_stage_is_chosen_by_pointer_and_key(browser, folder, server, quick):
    for key in (XL, S1, S2):
        folder.log(key, 1, 100)
    folder.run(S1)
    opened = Opened(browser, server)
    page = opened.page
    names = "[...document.querySelectorAll('.legend li')].map((item) => item.innerText.slice(3)).join()"
    opened.wait(f"{names} === 'sft s, seed 1'")
    page.click(f"[data-node='{XL}']")
    opened.wait(f"{names} === 'sft xl, seed 1'")
    assert page.url.endswith(f"?node={XL}")
    page.focus(f"[data-node='{S1}']")
    page.keyboard.press("Enter")
    opened.wait(f"{names} === 'sft xl, seed 1,sft s, seed 1,sft s, seed 2'")
    assert page.evaluate("document.activeElement.dataset.node") == S1  # the focus survives the new part
    page.click("#every summary")
    folder.log(S1, 101, 102)
    opened.wait("document.querySelector('#stages details').open")
    assert page.locator("#every li").count() == len(PLAN)
    page.reload()
    opened.wait(f"{names} === 'sft xl, seed 1,sft s, seed 1,sft s, seed 2'")
    page.click("[data-clear]")
    opened.wait(f"{names} === 'sft s, seed 1'")
    opened.assert_quiet()


def test_a_phone_in_the_dark_and_a_server_that_has_gone(browser, folder, server, quick):
    folder.finish(XL)
    folder.log(S1, 1, 20)
    folder.run(S1)
    opened = Opened(browser, server, color_scheme="dark")
    page = opened.page
    page.set_viewport_size(SMALL)
    assert page.locator("h1").bounding_box()["y"] < 200
    assert page.locator("#now .card").bounding_box()["y"] < 844
    assert page.locator(".arcs").is_visible()
    assert not page.locator(".edges").is_visible()
    opened.assert_fits()
    opened.assert_quiet()
    server.shutdown()
    server.server_close()
    opened.wait("document.getElementById('live').textContent === 'The server does not answer. This is the state of its last answer.'")
    assert page.locator("h1").inner_text() == "The study is running."
