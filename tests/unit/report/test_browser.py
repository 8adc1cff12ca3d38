"""The page in a real browser: from a file, without errors or requests, on a phone's width too, with the numbers of results.json."""

import json
from pathlib import Path

import numpy as np
import pytest

from tadistill.report import write_report
from tadistill.results.units import number
from tadistill.visible import visible

from .builder import NASTY, ArmSpec, Study, StudySpec, build_study

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

    def __init__(self, browser, path: Path):
        self.page = browser.new_page(viewport={"width": 1280, "height": 800})
        self.problems, self.requests = [], []
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.readyState === 'complete'")

    def assert_fits(self):
        """Neither the page nor a plot is wider than the window."""
        for width, height in ((1280, 800), (390, 844)):
            self.page.set_viewport_size({"width": width, "height": height})
            script = "[document.documentElement, ...document.querySelectorAll('.main-svg')].map((e) => e.getBoundingClientRect().right)"
            fits = f"Math.max(document.documentElement.scrollWidth, ...{script}) <= {width}"
            self.page.wait_for_function(fits, timeout=20_000)  # plots take a moment to follow the window

    def assert_quiet(self):
        """No error, and no request but for the page itself."""
        assert self.problems == []
        assert [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert len([url for url in self.requests if url.startswith("file:")]) == 1

    def traces(self, figure: str) -> dict[tuple[str, str], dict]:
        """(arm, what) -> x, y, base of a figure's traces, as plotly holds them."""
        script = f"document.getElementById('{figure}').data.filter((t) => t.meta).map((t) => [t.meta, t.x, t.y, t.base])"
        return {tuple(meta): {"x": x, "y": y, "base": base} for meta, x, y, base in self.page.evaluate(script)}


def means_of(study: Study) -> dict[tuple[str, str, str], float]:
    """(arm, set, metric) -> the mean over seeds, and over sets under ``mean``, from results.json alone."""
    rows = json.loads((study.study_dir / "results.json").read_text())["rows"]
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["set"], row["metric"]), []).append(row["value"])
    means = {key: float(np.mean(values)) for key, values in groups.items()}
    over_sets: dict[tuple[str, str, str], list[float]] = {}
    for (arm, _, metric), value in means.items():
        over_sets.setdefault((arm, "mean", metric), []).append(value)
    return means | {key: float(np.mean(values)) for key, values in over_sets.items()}


def test_page_in_a_browser(browser, shared):
    opened = Opened(browser, write_report(shared.results))
    page = opened.page
    page.wait_for_selector("#figure-paths .main-svg")
    assert page.locator("#sample-answers article").count() == 3
    answer = page.locator("#sample-answers article p:last-child").first
    assert answer.text_content() == f"direct answers 0 in dolly. {visible(NASTY)}"
    page.click("#sample-next")
    assert answer.text_content() == f"direct answers 1 in dolly. {visible(NASTY)}"
    page.select_option("#sample-set", "facts")
    assert answer.text_content() == f"direct answers 0 in facts. {visible(NASTY)}"
    assert page.locator("#sample-references pre").all_text_contents() == ["reference 0", "another"]
    assert page.evaluate("window.hacked") is None

    shown = "document.getElementById('figure-dev-loss').data.filter((trace) => trace.visible === true).length"
    before = page.evaluate(shown)
    page.click("#curves .chip >> nth=0")
    assert page.evaluate(shown) == before - 3  # the mean and two seeds
    page.click("#curves .every[data-shown=false]")
    assert page.evaluate(shown) == 0
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

    page.click(".pick[data-arm=direct]")
    assert page.locator("#sample-answers h4").all_inner_texts() == ["■︎chain", "◆︎direct-long"]
    page.click("#sample-next")
    assert page.locator("#sample-answers article").count() == 2
    opened.assert_quiet()


def test_a_study_of_twelve_arms(browser, tmp_path):
    sets = {"dolly": 40, "self_inst": 30, "vicuna": 20}
    spec = StudySpec(TWELVE, seeds=(10, 20, 30), sets=sets, fact_sets=(), steps=200)
    study = build_study(tmp_path, spec)
    path = write_report(study.read())
    assert path.stat().st_size < 10e6
    opened, means = Opened(browser, path), means_of(study)

    script = "[...document.querySelectorAll('td[data-arm]')].map((c) => [c.dataset, c.querySelector('.value')?.textContent])"
    cells = {(data["arm"], data["set"], data["metric"]): value for data, value in opened.page.evaluate(script)}
    assert len(cells) == 12 * (len(sets) + 1)
    assert cells == {key: number(means[key], key[2]) for key in cells}

    shown = opened.traces("figure-means")
    assert {arm.name: shown[arm.name, "mean"]["x"] for arm in TWELVE} == {
        arm.name: [pytest.approx(means[arm.name, "mean", "rouge_l"], abs=1e-5)] for arm in TWELVE
    }
    apart = opened.traces("figure-differences")
    pairs = [(arm, arm.replace("chain", "direct-as-chain")) for arm in ("chain-l", "chain-m", "chain-l-m")]
    for arm, other in [*pairs, ("chain-without-twin", "direct"), ("kd", "direct"), ("sft", "direct"), ("direct-as-chain-l", "direct")]:
        expected = means[arm, "mean", "rouge_l"] - means[other, "mean", "rouge_l"]
        assert apart[arm, "mean"]["x"] == [pytest.approx(expected, abs=1e-5)]
        assert np.mean(apart[arm, "seeds"]["x"]) == pytest.approx(expected, abs=1e-5)
    assert ("teacher", "mean") not in apart
    assert ("direct", "mean") not in apart

    chains = [arm for arm in TWELVE if len(arm.path) > 2]
    for index, arm in enumerate(chains):
        bars, at = opened.traces(f"figure-budget-{index}"), 0.0
        for hop in range(len(arm.path) - 1):
            bar = bars[arm.name, f"budget/{hop}"]
            assert bar["base"] == [pytest.approx(at, abs=1e-5)]
            assert bar["y"] == [pytest.approx(means[arm.name, "mean", f"budget/{hop}"], abs=1e-5)]
            at += bar["y"][0]
        assert bars[arm.name, "total"]["y"] == [pytest.approx(means[arm.name, "mean", "reverse_kl"], abs=1e-5)]
        assert bars[arm.name, "total"]["y"] == [pytest.approx(at, abs=1e-4)]

    plane = opened.traces("figure-plane")["chain-l", "plane"]
    for suffix in ("", "@greedy", "@t0.5"):
        x, y = (means["chain-l", "mean", f"{metric}{suffix}"] for metric in ("entropy", "rouge_l"))
        assert (pytest.approx(x, abs=1e-5), pytest.approx(y, abs=1e-5)) in list(zip(plane["x"], plane["y"], strict=True))
    cost = opened.traces("figure-cost")
    assert cost["chain-l", "cost"]["x"] == [7.4e17]
    assert cost["", "direct longer"]["x"] == [3.0e17, 5.1e17, 7.4e17, 1.1e18]
    opened.assert_fits()
    opened.assert_quiet()


@pytest.mark.parametrize(
    ("arms", "changes", "present", "absent"),
    [
        (
            [ArmSpec("gpt2", ("s",), flops=None)],
            {"seeds": (1,), "sets": {"dolly": 9}, "fact_sets": ()},
            ("results", "samples"),
            ("forest",),
        ),
        ([ArmSpec("ours", ("s",), flops=None), ArmSpec("theirs", ("m",), flops=None)], {"also": {}}, ("forest", "samples"), ("plane",)),
    ],
)
def test_models_alone(browser, tmp_path, arms, changes, present, absent):
    study = build_study(tmp_path, StudySpec(arms, teacher=None, trained=False, **changes))
    opened = Opened(browser, write_report(study.read()))
    sections = opened.page.evaluate("[...document.querySelectorAll('section')].map((section) => section.id)")
    assert set(present) <= set(sections)
    assert not {*absent, "paths", "budget", "cost", "curves"} & set(sections)
    links = opened.page.evaluate("[...document.querySelectorAll('nav a')].map((a) => a.hash.slice(1))")
    assert links == [name for name in sections if name != "headline"]
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
