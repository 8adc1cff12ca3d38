"""The page in a real browser: no errors or requests, a complete first screen, figures and numbers as in results.json, by keyboard too."""

import base64
import json
import re
import zlib
from html import escape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from tadistill.report import write_report
from tadistill.text import visible

from .builder import NASTY, PARAMETERS, SMALL, ArmSpec, Study, StudySpec, build_study

SIZES = ((1280, 800), (1920, 1080), (390, 844))
TWELVE = [
    ArmSpec("teacher", ("xl",), gain=6.0, flops=0.0),
    ArmSpec("sft", ("s",), gain=-3.0, flops=4.0e16),
    ArmSpec("direct", ("xl", "s")),
    ArmSpec("kd", ("xl", "s"), gain=-1.0, flops=1.2e17, method="forward_kl (dataset)"),
    ArmSpec("seqkd", ("xl", "s"), gain=-0.5, flops=1.5e17, method="cross_entropy (teacher)"),
    ArmSpec("chain-l", ("xl", "l", "s"), gain=1.0, flops=7.4e17),
    ArmSpec("direct-as-chain-l", ("xl", "s"), gain=0.8, compute="as chain-l", flops=7.4e17),
    ArmSpec("chain-m", ("xl", "m", "s"), gain=0.6, flops=5.1e17),
    ArmSpec("direct-as-chain-m", ("xl", "s"), gain=0.5, compute="as chain-m", flops=5.1e17),
    ArmSpec("chain-l-m", ("xl", "l", "m", "s"), gain=3.2, flops=1.1e18),
    ArmSpec("direct-as-chain-l-m", ("xl", "s"), gain=1.0, compute="as chain-l-m", flops=1.1e18),
    ArmSpec("chain-without-twin", ("xl", "l", "s"), gain=0.1, flops=8.1e17),
]


class Opened:
    """A page on a disk, opened; it remembers what went wrong and what was asked for."""

    def __init__(self, browser, path: Path, scheme: str = "light", fragment: str = ""):
        self.context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.problems, self.requests = [], []
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri() + fragment)
        self.page.wait_for_function("document.readyState === 'complete'")

    def resize(self, size: tuple[int, int]) -> None:
        """Change the window, and wait until the page has followed."""
        self.page.set_viewport_size(dict(zip(("width", "height"), size, strict=True)))
        self.page.wait_for_function(f"innerWidth === {size[0]}")

    def unfold(self) -> None:
        """Open everything that is folded."""
        self.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = !d.classList.contains('pop'); })")

    def assert_fits(self) -> None:
        """Neither the page nor a plot is wider than the window, and every plot in sight has a size."""
        for size in SIZES:
            self.resize(size)
            plots = "[...document.querySelectorAll('svg.plot')].map((e) => e.getBoundingClientRect()).filter((b) => b.height)"
            assert self.page.evaluate("document.documentElement.scrollWidth") <= size[0]
            assert self.page.evaluate(f"{plots}.every((b) => b.width > 150 && b.right <= innerWidth)")

    def assert_quiet(self) -> None:
        """No error, and no request but for the page itself."""
        assert self.problems == []
        assert [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert len([url for url in self.requests if url.startswith("file:")]) == 1
        self.context.close()

    def values(self, figure: str) -> dict:
        """Return the lines, points and bars that a figure draws."""
        return self.page.evaluate(f"JSON.parse(document.querySelector('#{figure} .values').textContent)")


def results_of(study: Study) -> dict:
    return json.loads((study.study_dir / "results.json").read_text())


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    spec = StudySpec(TWELVE, seeds=(10, 20, 30), sets={"dolly": 40, "self_inst": 30, "vicuna": 20}, fact_sets=(), steps=200)
    study = build_study(tmp_path_factory.mktemp("twelve"), spec)
    return study, write_report(study.results)


def test_page_in_a_browser(browser, shared):
    opened = Opened(browser, write_report(shared.results))
    page = opened.page
    assert page.locator("#sample-answers article").count() == 3
    answer = page.locator("#sample-answers article p:last-child").first
    assert answer.text_content() == f"direct answers 0 in dolly. {visible(NASTY)}"
    page.click("#sample-next")
    assert answer.text_content() == f"direct answers 1 in dolly. {visible(NASTY)}"
    page.select_option("#sample-set", "facts")
    assert answer.text_content() == f"direct answers 0 in facts. {visible(NASTY)}"
    assert page.locator("#sample-references pre").all_text_contents() == ["reference 0", "another"]
    assert page.evaluate("window.hacked") is None
    opened.assert_fits()
    opened.unfold()
    opened.assert_fits()
    opened.assert_quiet()


def test_a_packed_page_is_the_same_in_a_browser(browser, shared, monkeypatch):
    """It was unpacked after the page had loaded: what was printed had no packed part, and a link to a section ended elsewhere."""

    def shown(path: Path) -> tuple:
        opened = Opened(browser, path, fragment="#behaviour&hide=direct")
        page = opened.page
        page.wait_for_function("scrollY > 0 && scrollY === window.before || (window.before = scrollY, false)", polling=300)  # it is smooth
        elements = "[...document.querySelectorAll('main, main *:not(noscript)')]"
        found = [
            page.locator("[data-arm].off").count(),
            page.evaluate("Math.round(scrollY)"),
            len(re.findall(rb"/Type /Page\b", page.pdf())),
        ]
        found += page.evaluate(f"{elements}.map((e) => [e.tagName, e.id, e.getBoundingClientRect().top + scrollY])")
        opened.unfold()
        found.append(page.locator("body").inner_text())
        page.add_init_script(
            "addEventListener('load', () => { window.loaded = document.querySelectorAll('main *:not(noscript)').length; })"
        )
        page.reload()
        opened.requests.pop()
        found.append(page.evaluate("loaded"))
        opened.assert_quiet()
        return found

    plain = shown(write_report(shared.read()))
    monkeypatch.setattr("tadistill.report.page._LONG", 0)
    assert shown(write_report(shared.read())) == plain
    assert plain[0] > 10


def test_every_kind_of_packed_block_is_unpacked(browser, tmp_path):
    """DEFLATE has stored blocks, blocks with its own code, and blocks with codes of their own."""
    random = Random(1)
    texts = [
        "",
        "é",
        "a" * 70_000,
        "".join(random.choices("abcdefgh–é\u4e2d😀", k=100_000)),
        "".join(map(chr, random.choices(range(32, 127), k=99))),
    ]
    script = (files("tadistill.report") / "templates" / "unpack.js").read_text(encoding="utf-8")
    for level, strategy in (
        (0, zlib.Z_DEFAULT_STRATEGY),
        (9, zlib.Z_FIXED),
        (1, zlib.Z_DEFAULT_STRATEGY),
        (9, zlib.Z_HUFFMAN_ONLY),
        (9, zlib.Z_RLE),
    ):
        calls = ""
        for text in texts:
            packing = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
            packed = packing.compress(escape(text).encode()) + packing.flush()
            calls += f'<p><script>unpack("{base64.b64encode(packed).decode()}", {len(escape(text).encode())})</script></p>'
        (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8><script>{script}</script>{calls}", encoding="utf-8")
        opened = Opened(browser, tmp_path / "page.html")
        assert opened.page.locator("p").all_text_contents() == texts
        opened.assert_quiet()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_first_screen_is_complete(browser, twelve, scheme):
    study, path = twelve
    opened = Opened(browser, path, scheme)
    said = results_of(study)["answer"]
    for width, height in SIZES:
        opened.resize((width, height))
        wanted = {"h1": said["question"], ".lead": said["answer"], ".also >> nth=0": said["against_sft"], ".also >> nth=1": said["cost"]}
        for place, text in wanted.items():
            found = opened.page.locator(place)
            assert text in " ".join(found.inner_text().split())
            assert found.bounding_box()["y"] + found.bounding_box()["height"] <= height
        figure = opened.page.locator("#first-figure svg.plot").bounding_box()
        assert figure["y"] + figure["height"] <= height + (60 if width < 600 else 0)
        assert figure["width"] > 250
        first = opened.page.locator("#arms tbody tr[data-row]").first.bounding_box()
        assert width < 600 or first["y"] + first["height"] <= height
    opened.assert_quiet()


def test_figures_are_drawn_after_a_resize_and_when_they_are_unfolded(browser, twelve):
    opened = Opened(browser, twelve[1])
    figure = (
        "[...document.querySelectorAll('#details svg, #learning details svg.plot')].map((e) => Math.round(e.getBoundingClientRect().width))"
    )
    opened.resize((700, 800))
    opened.unfold()
    widths = opened.page.evaluate(figure)
    assert widths
    assert min(widths) > 200
    assert max(widths) < 700
    across = "[...document.querySelectorAll('#figure-cost svg.at')].map((e) => e.getBoundingClientRect().x).sort((a, b) => a - b)"
    narrow = opened.page.evaluate(across)
    opened.resize((1280, 800))
    wide = opened.page.evaluate(across)
    assert wide[-1] - wide[0] > 1.1 * (narrow[-1] - narrow[0]) or wide[0] != narrow[0]
    opened.assert_quiet()


def test_an_arm_is_hidden_everywhere_and_the_address_remembers_it(browser, shared):
    path = write_report(shared.results)
    opened = Opened(browser, path)
    page = opened.page
    gone = "[...document.querySelectorAll('[data-arm=chain]')].filter((e) => getComputedStyle(e).display !== 'none').length"
    assert page.evaluate(gone) > 20
    page.click("#arms [data-toggle=chain]")
    assert page.evaluate(gone) == 0
    assert page.locator("#arms [data-toggle=chain]").get_attribute("aria-pressed") == "false"
    page.click("nav a[href='#learning']")
    assert page.evaluate("location.hash") == "#learning&hide=chain"
    opened.assert_quiet()
    again = Opened(browser, path, fragment="#details&hide=chain")
    assert again.page.evaluate(gone) == 0
    in_sight = "((d) => d.open && Math.abs(d.getBoundingClientRect().y) < 700)(document.getElementById('details'))"
    again.page.wait_for_function(in_sight, timeout=5000)
    again.page.click("#arms [data-toggle=chain]")
    assert again.page.evaluate(gone) > 20
    again.assert_quiet()


def test_tables_are_sorted_and_filtered(browser, twelve):
    opened = Opened(browser, twelve[1])
    opened.unfold()
    page, column = opened.page, "[...document.querySelectorAll('table.scores tbody tr')].map((r) => parseFloat(r.cells[1].textContent))"
    page.click("table.scores thead th:nth-child(2) button")
    found = page.evaluate(column)
    assert found == sorted(found)
    page.click("table.scores thead th:nth-child(2) button")
    assert page.evaluate(column) == found[::-1]
    table = page.locator("#stages")
    page.locator("label.filter input").last.fill("seed 20")
    assert 0 < table.locator("tbody tr:visible").count() < table.locator("tbody tr").count()
    opened.assert_quiet()


def test_texts_of_figures_are_whole_and_apart(browser, tmp_path, monkeypatch):
    """A long name of an arm was cut at its left, and the texts below the bars of an error budget covered each other."""
    for name in (path := ("qwen3-4b-it", "qwen3-1.7b", "qwen3-0.6b")):
        monkeypatch.setitem(PARAMETERS, name, 10**8)
    teacher, long = path[0], "distilled-through-the-largest-assistant-with-its-own-answers-and-a-low-rate"
    arms = [ArmSpec("direct", (teacher, path[-1])), ArmSpec(long, path, gain=2, flops=7e17)]
    spec = StudySpec([*arms, ArmSpec("twin", (teacher, path[-1]), compute=f"as {long}")], sets={"dolly": 9}, fact_sets=(), teacher=teacher)
    opened = Opened(browser, write_report(build_study(tmp_path, spec).read()))
    opened.unfold()
    boxes = "((at) => [...document.querySelectorAll(at)].map((e) => e.getBoundingClientRect()).filter((b) => b.width))"
    for width in (390, 1024, 1600):
        opened.resize((width, 900))
        lefts = opened.page.evaluate(f"{boxes}('#first-figure, #first-figure .label').map((b) => b.left)")
        assert lefts[0] == min(lefts)
        ticks = opened.page.evaluate(f"{boxes}('#budget .tick[text-anchor=middle]').map((b) => [b.left, b.right])")
        assert len(ticks) == 3
        assert all(right < left for (_, right), (left, _) in pairwise(ticks))
    opened.assert_quiet()


def test_figures_are_saved(browser, shared):
    opened = Opened(browser, write_report(shared.results))
    page, saved = opened.page, {}
    for kind in ("svg", "png", "csv"):
        page.hover("#figure-cost")
        with page.expect_download() as download:
            page.click(f"#figure-cost [data-save={kind}]")
        assert download.value.suggested_filename == f"figure-cost.{kind}"
        saved[kind] = Path(download.value.path()).read_bytes()
    assert saved["png"].startswith(b"\x89PNG")
    assert len(saved["png"]) > 5000
    assert saved["svg"].count(b">direct-long</text>") == 1  # in the one placement of names that is shown
    assert b"var(--c" in saved["svg"]
    assert b"--c1:" in saved["svg"]
    lines = saved["csv"].decode().splitlines()
    assert lines[0].startswith("series,seed,training compute")
    assert len(lines) == 4
    opened.assert_quiet()


def test_the_keyboard_is_enough(browser, shared):
    opened = Opened(browser, write_report(shared.results))
    page = opened.page
    page.keyboard.press("Tab")
    reached = set()
    for _ in range(60):
        reached.add(page.evaluate("document.activeElement.dataset.toggle ?? document.activeElement.hash ?? document.activeElement.tagName"))
        if "#how" in reached:
            break
        page.keyboard.press("Tab")
    assert {"chain", "direct", "direct-long", "#against", "#how"} <= reached
    page.focus("#arms [data-toggle=chain]")
    page.keyboard.press("Enter")
    assert page.locator("[data-toggle=chain]").first.get_attribute("aria-pressed") == "false"
    page.focus("dfn >> nth=0")
    assert page.locator("#tip").inner_text() == page.locator("dfn").first.get_attribute("data-tip")
    page.focus("#against summary >> nth=0")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('#against details').open")
    opened.assert_quiet()


CONTRAST = r"""() => {
  const linear = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const parse = (text) => (text.match(/[\d.]+/g) ?? []).map(Number);
  const parents = (node) => (node ? [node, ...parents(node.parentElement)] : []);
  const colours = (node) => parents(node).map((up) => parse(getComputedStyle(up).backgroundColor));
  const behind = (node) => colours(node).find((c) => c.length && (c[3] ?? 1) === 1);
  return [...document.querySelectorAll("main *")].filter((node) => {
    const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    return text && node.getBoundingClientRect().width && !node.closest("[aria-hidden=true], script, option, svg .off, .saves, :disabled");
  }).map((node) => {
    const style = getComputedStyle(node), back = behind(node);
    const opacity = parents(node).reduce((all, up) => all * Number(getComputedStyle(up).opacity), 1);
    const seen = parse(node.closest("svg") ? style.fill : style.color).slice(0, 3).map((v, i) => v * opacity + back[i] * (1 - opacity));
    const [a, b] = [light(seen), light(back)].sort((x, y) => y - x);
    return [node.tagName, node.className.baseVal ?? node.className, node.textContent.slice(0, 30), (a + 0.05) / (b + 0.05)];
  }).filter(([, , , ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_and_controls_have_names(browser, shared, scheme):
    opened = Opened(browser, write_report(shared.results), scheme)
    opened.unfold()
    assert opened.page.evaluate(CONTRAST) == []
    controls = "[...document.querySelectorAll('button, input, select, a, svg[role=img]')]"
    nameless = f"{controls}.filter((e) => !(e.textContent.trim() || e.ariaLabel || e.labels?.length || e.title))"
    assert opened.page.evaluate(f"{nameless}.map((e) => e.outerHTML.slice(0, 80))") == []
    headings = opened.page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((e) => Number(e.tagName[1]))")
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))
    ids = opened.page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    opened.assert_quiet()


def test_print(browser, shared, tmp_path):
    opened = Opened(browser, write_report(shared.results))
    opened.page.emulate_media(media="print")
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.page.evaluate("document.querySelectorAll('#against details:not([open])').length") == 0
    assert not opened.page.locator("nav.sections").is_visible()
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(opened.page.pdf(path=tmp_path / "page.pdf")) > 20_000
    opened.assert_quiet()


def test_a_conversation_is_shown_in_turns(browser, tmp_path):
    study = build_study(tmp_path, StudySpec(SMALL, seeds=(1,), sets={"chats": 5}))
    turns = [{"role": "system", "text": "Be <i>brief</i>."}, {"role": "assistant", "text": "calls f({})", "thinking": "hmm"}]
    for file in study.store_dir.glob("*/*/predictions.jsonl"):
        lines = file.read_text().strip().split("\n")
        rows = [json.loads(line) | {"turns": turns, "prediction": "<think>so</think>\n\nthus"} for line in lines]
        for row in rows:
            row["prediction"] = "<think>so and" if row["index"] == 1 else row["prediction"]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = Opened(browser, write_report(study.read()))
    page = opened.page
    assert page.locator("#sample-prompt .turn").all_text_contents() == ["systemBe <i>brief</i>.", "assistantthinking hmmcalls f({})"]
    assert not page.locator("#sample-prompt details pre").is_visible()  # the text with the marks of the template
    cards = page.locator("#sample-answers article")
    assert {*cards.locator(".thinking").all_text_contents()} == {"thinking so"}
    assert {*cards.locator("p:last-child").all_text_contents()} == {"thus"}
    page.select_option("#sample-index", "1")
    assert {*cards.locator("p:last-child").all_text_contents()} == {"The text ends inside the thinking."}
    page.fill("#sample-search", "HMM")
    assert page.locator("#sample-prompt mark").all_text_contents() == ["hmm"]
    opened.assert_fits()
    opened.assert_quiet()


def test_samples_are_searched_and_put_side_by_side(browser, shared):
    opened = Opened(browser, write_report(shared.results))
    page = opened.page
    page.fill("#sample-search", "COUNTRY 7")
    assert page.locator("#sample-index option").all_text_contents() == ["7"]
    assert page.locator("#sample-prompt mark").all_text_contents() == ["country 7"]
    page.fill("#sample-search", "chain answers 11 in dolly")  # facts has nine prompts
    assert page.locator("#sample-set option").all_text_contents() == ["dolly (1)", "facts (0)"]
    page.select_option("#sample-set", "facts")
    assert page.locator("#sample-answers article").count() == 0
    page.fill("#sample-search", "answers 8 in facts")
    assert page.locator("#sample-set").input_value() == "facts"
    assert page.locator("#sample-answers article").count() == 3
    page.fill("#sample-search", "<b>bold</b> &")
    assert page.locator("#sample-answers b").count() == 0
    assert page.locator("#sample-answers mark").first.text_content() == "<b>bold</b> &"
    page.fill("#sample-search", "")
    assert page.locator("#sample-index option").count() == 9
    assert page.locator("#sample-prompt details").count() == 0

    page.click(".pick[data-pick=direct]")
    assert page.locator("#sample-answers h3").all_inner_texts() == ["■︎chain", "◆︎direct-long"]
    page.click("#sample-next")
    assert page.locator("#sample-answers article").count() == 2
    opened.assert_quiet()


@pytest.mark.parametrize(
    ("arms", "changes", "present", "absent"),
    [
        ([ArmSpec("gpt2", ("s",), flops=None)], {"seeds": (1,), "sets": {"dolly": 9}, "fact_sets": ()}, {"against", "answers"}, {"paths"}),
        ([ArmSpec("ours", ("s",), flops=None), ArmSpec("theirs", ("m",), flops=None)], {"also": {}}, {"against", "answers"}, {"paths"}),
    ],
)
def test_models_alone(browser, tmp_path, arms, changes, present, absent):
    study = build_study(tmp_path, StudySpec(arms, teacher=None, trained=False, **changes))
    opened = Opened(browser, write_report(study.read()))
    sections = opened.page.evaluate("[...document.querySelectorAll('section')].map((section) => section.id)")
    assert present <= set(sections)
    assert not {*absent, "learning"} & set(sections)
    assert opened.page.evaluate("[...document.querySelectorAll('nav a')].map((a) => a.hash.slice(1))") == ["answer", *sections]
    assert opened.page.locator("#first-figure").count() == 1
    assert opened.page.locator("#arms [data-row]").count() == (0 if len(arms) == 1 else 2)  # a single model has its numbers in the figure
    assert opened.page.locator("#how table").first.locator("th[scope=col]").all_inner_texts() == ["model", "parameters"]
    opened.assert_fits()
    opened.assert_quiet()


@pytest.mark.parametrize("finished", [False, True])
def test_unfinished_studies(browser, tmp_path, finished):
    open_ones = [(arm.name, seed) for arm in SMALL for seed in (10, 20) if not (finished and arm.name == "direct")]
    study = build_study(tmp_path, StudySpec(SMALL, unfinished=tuple(open_ones)))
    opened = Opened(browser, write_report(study.read()))
    assert opened.page.locator("progress").count() == (0 if finished else 5)
    said = "4 of 6 evaluations are not finished" if finished else "None of 6 evaluations is finished."
    assert said in opened.page.locator("#answer").inner_text()
    opened.assert_fits()
    opened.assert_quiet()


def test_judgements_are_shown_as_text(browser, study):
    (study.study_dir / "judge").mkdir()
    rows = [
        {
            "arm": "chain",
            "other": "direct",
            "set": "dolly",
            "wins": 7,
            "ties": 2,
            "losses": 3,
            "win_rate": 66.67,
            "low": 40,
            "high": 90,
            "n": 12,
        },
        {"arm": "chain", "set": "dolly", "score": 6.5, "low": 6.1, "high": 6.9, "n": 12},
    ]
    judged = {"mode": "pair", "judge": "<b>judge</b>", "arms": ["direct", "chain"], "rows": rows, "unparsed": 2, "missing": 0}
    (study.study_dir / "judge" / "judge-x.json").write_text(json.dumps(judged))
    opened = Opened(browser, write_report(study.read()))
    table = opened.page.locator("#judge tbody tr").all_inner_texts()
    assert table[0].split("\t") == ["chain against direct", "dolly", "7 – 2 – 3", "66.67", "[40.00, 90.00]", "12"]
    assert opened.page.locator("#judge b").count() == 0
    assert "2 replies of the judge could not be read" in opened.page.locator("#judge .note").first.inner_text()
    opened.assert_quiet()
