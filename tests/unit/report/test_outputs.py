"""report.html, report.md and the terminal table: the numbers of results.json, the sentences, and their gaps."""

import base64
import json
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import rich.console

from tadistill.errors import StoreError
from tadistill.report import summary_table, write_report
from tadistill.report.answer import answer
from tadistill.report.explain import verdict_text
from tadistill.report.page import arm_groups
from tadistill.report.plain_text import pipe_table, side_by_side
from tadistill.report.tables import interval_method
from tadistill.results.compare import difference
from tadistill.results.number_text import flops_text, number, parameters_text, signed
from tadistill.results.sample_answers import samples
from tadistill.results.verdict import comparisons
from tadistill.text import visible

from .builder import NASTY, PARAMETERS, SMALL, ArmSpec, StudySpec, build_study, key_of


class _Cells(HTMLParser):
    """The text of every score cell, by (metric, arm, set); and of the embedded JSON."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.cells, self.data, self.tags, self.text = {}, "", [], ""
        self._metric = self._cell = None
        self._in_data = False

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "table":
            self._metric = attrs.get("data-metric")
        if tag == "td":
            self._cell = (self._metric, attrs["data-arm-cell"], attrs["data-set"]) if "data-arm-cell" in attrs else None
        if tag == "script":
            self._in_data = attrs.get("id") == "data"

    def handle_endtag(self, tag):
        if tag == "td":
            self._cell = None

    def handle_data(self, data):
        self.text += data
        if self._in_data:
            self.data += data
            self._in_data = False
        if self._cell:
            self.cells[self._cell] = (self.cells.get(self._cell, "") + " " + data).strip()


def parse(path):
    parser = _Cells()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.text = " ".join(parser.text.split())
    return parser


def means_of(study):
    """(metric, arm, set) -> the mean over seeds, from results.json alone."""
    rows = json.loads((study.study_dir / "results.json").read_text())["rows"]
    groups = {}
    for row in rows:
        groups.setdefault((row["metric"], row["arm"], row["set"]), []).append(row["value"])
    return {key: float(np.mean(values)) for key, values in groups.items()}


def test_page_shows_the_numbers_of_results_json(shared):
    cells = parse(write_report(shared.results)).cells
    means = means_of(shared)
    checked = 0
    for (metric, arm, set_name), mean in means.items():
        if metric in ("fact_accuracy", "rouge_l"):
            assert re.sub(r"\s+\[.*", "", cells[metric, arm, set_name]) == number(mean, metric)
            checked += 1
    assert checked == 3 * (2 + 1)
    mean_over_sets = np.mean([means["rouge_l", "chain", name] for name in ("dolly", "facts")])
    assert cells["rouge_l", "chain", "mean"].startswith(number(mean_over_sets, "rouge_l"))


def test_markdown_shows_the_numbers_of_results_json(shared):
    write_report(shared.results)
    markdown = (shared.study_dir / "report.md").read_text(encoding="utf-8")
    means = means_of(shared)
    table = markdown.split("### ROUGE-L")[1].split("###")[0].strip().splitlines()
    assert table[0] == "| arm | mean over sets | dolly | facts |"
    for line in table[2:]:
        arm, _, dolly, facts = (cell.strip(" *") for cell in line.strip("|").split("|"))
        assert dolly.startswith(number(means["rouge_l", arm, "dolly"], "rouge_l") + " [")
        assert facts.startswith(number(means["rouge_l", arm, "facts"], "rouge_l") + " [")
    assert "7.4e17" in markdown
    assert "2.47" in markdown
    assert "tadistill run recipes/demo.yaml" in markdown
    assert f"`{key_of('evaluate', 'chain', 10)}`" in markdown


def test_the_report_names_the_method_of_its_intervals(shared, tmp_path):
    page = write_report(shared.results).read_text(encoding="utf-8")
    markdown = (shared.study_dir / "report.md").read_text(encoding="utf-8")
    sentence = "The 95 % intervals are t intervals over training seeds and prompts. They stay inside the bounds of their metric."
    assert page.count(sentence.replace("'", "&#39;")) == 3  # below the scores, the comparisons and the arms
    assert sentence in markdown
    assert "hierarchical" not in page + markdown
    models = build_study(
        tmp_path, StudySpec([ArmSpec("xl", ("xl",))], seeds=(0,), sets={"dolly": 12}, teacher=None, trained=False, also={})
    )
    assert (
        interval_method(models.results) == "The 95 % intervals are t intervals over prompts. They stay inside the bounds of their metric."
    )


@pytest.mark.slow
def test_reports_are_deterministic(shared):
    def contents():
        write_report(shared.read())
        return [(shared.study_dir / name).read_bytes() for name in ("results.json", "report.html", "report.md")]

    assert contents() == contents()


def test_a_packed_page_has_the_same_content(shared, monkeypatch):
    """The page of 200 arms was 8 to 20 MB large."""
    plain = write_report(shared.read()).read_text(encoding="utf-8")
    monkeypatch.setattr("tadistill.report.page._LONG", 0)
    page = write_report(shared.read()).read_text(encoding="utf-8")

    def unpacked(found: re.Match) -> str:
        part = zlib.decompress(base64.b64decode(found["packed"]), wbits=-zlib.MAX_WBITS)
        assert len(part) == int(found["size"])
        return part.decode()

    call = r'<script>unpack\("(?P<packed>[^"]*)", (?P<size>\d+)\)</script>\s*<noscript>.*?</noscript>'
    assert len(re.findall(call, page)) == len(re.findall("<section ", page)) + 1
    text = re.sub(call, unpacked, page)
    text = re.sub(r"<script>(?:(?!</script>).)*window\.unpack.*?</script>", "", text, count=1, flags=re.DOTALL)
    assert text.split() == plain.split()


def test_text_of_a_model_cannot_leave_its_element(shared):
    page = write_report(shared.results)
    parser = parse(page)
    samples = json.loads(parser.data)["samples"]
    assert samples["dolly"][3]["answers"]["chain"]["text"] == f"chain answers 3 in dolly. {visible(NASTY)}"
    assert samples["dolly"][3]["references"] == ["reference 3", "another"]
    assert [len(prompts) for prompts in samples.values()] == [12, 9]
    assert "<script>window.hacked" not in page.read_text(encoding="utf-8")


def test_names_are_escaped(tmp_path):
    name = "<img src=x onerror=alert(1)>|a"
    study = build_study(tmp_path, StudySpec([ArmSpec(name, ("xl", "s")), *SMALL]))
    parser = parse(write_report(study.read()))
    assert not [tag for tag, _ in parser.tags if tag == "img"]
    assert ("rouge_l", name, "dolly") in parser.cells
    rows = [line for line in (study.study_dir / "report.md").read_text().splitlines() if "onerror" in line]
    assert rows
    assert not [line for line in rows if "<img" in line]
    assert all("\\|a" in line for line in rows if line.startswith("|"))


def test_page_needs_no_network(shared):
    parser = parse(write_report(shared.results))
    addresses = [attrs.get("src") or attrs.get("href") for _, attrs in parser.tags if "src" in attrs or "href" in attrs]
    assert [address for address in addresses if not address.startswith(("#", "data:"))] == []
    assert len([tag for tag, _ in parser.tags if tag == "link"]) == 1  # the empty icon


def test_the_answer_comes_first_everywhere(shared):
    page = write_report(shared.results)
    results = shared.results
    content = json.loads((shared.study_dir / "results.json").read_text())
    assert content["verdicts"][0]["sentence"] == verdict_text(results, comparisons(results)[0])
    found = answer(results)
    assert found.question == (
        "Is s (124 M parameters) better when xl (1.56 B) teaches it through l (774 M) "
        "than when xl teaches it directly with the same compute?"
    )
    assert found.kind == "open"
    assert re.fullmatch(
        r"Distillation through l \(chain\) is not clearly better or worse than direct distillation with the same compute \(direct-long\): "
        r"the difference in fact accuracy is \S+ percentage points \(95 % interval \S+ to \S+\)\. "
        r"2 seeds are too few for a claim \(at least 3 are needed\)\.",
        found.answer,
    )
    markdown = (shared.study_dir / "report.md").read_text(encoding="utf-8").split("\n\n")
    assert markdown[2:4] == [f"**{found.question}**", f"**Undecided.** {found.answer}"]
    text = " ".join(render(summary_table(shared.results), 80).split())
    assert text.startswith(f"demo {found.question} Undecided. {found.answer} {found.against_sft}")
    assert f" {found.next}" in text
    shown = parse(page).text
    assert all(sentence.replace("`", "") in shown for sentence in (found.question, *found.sentences))


def test_a_chain_without_anything_to_compare_with(tmp_path):
    study = build_study(tmp_path, StudySpec([ArmSpec("alone", ("xl", "m", "s"))], seeds=(1, 2, 3), fact_sets=()))
    found = answer(study.read())
    assert found.question == "How good is s (124 M parameters) when xl (1.56 B) teaches it through m (355 M)?"
    assert found.answer.startswith("alone scores ")
    assert found.answer.endswith("The study has no arm to compare it with; add a direct arm with `compute: as alone`.")


def test_the_terminal_fits_80_columns(tmp_path):
    arms = [*SMALL, ArmSpec("direct-with-a-rather-long-name-of-its-own", ("xl", "s"))]
    study = build_study(tmp_path, StudySpec(arms))
    lines = render(summary_table(study.read()), 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if line.rstrip().endswith("×")]) == 4  # no number is cut
    assert not [line for line in lines if "…" in line and "95 %" not in line and "+" not in line]


def test_answers_side_by_side(shared):
    text = render(side_by_side(shared.results, 2), 200)
    assert text.count("chain answers 1 in facts. </script>") == 1
    assert "chain answers 2 in facts" not in text
    assert text.count("reference 0") == 2  # one in each set


def test_conversations_side_by_side(tmp_path):
    study = build_study(tmp_path, StudySpec(SMALL, seeds=(1,), sets={"chats": 5}))
    for file in study.store_dir.glob("*/*/predictions.jsonl"):
        more = {"turns": [{"role": "user", "text": "hi", "thinking": "hmm"}], "prediction": "<think>so</think>thus"}
        file.write_text("".join(json.dumps(json.loads(line) | more) + "\n" for line in file.read_text().strip().split("\n")))
    text = " ".join(render(side_by_side(study.read(), 1), 200).split())
    assert "user: [thinking: hmm] hi" in text
    assert "[thinking: so] thus" in text


@pytest.mark.parametrize(("template", "asked", "shown"), [("chat", "add", ["add\n\n5 + 5"]), ("chat", "", []), ("alpaca", "add", [])])
def test_an_instruction_in_a_chat_template_is_shown_as_a_turn(tmp_path, template, asked, shown):
    """Predictions have turns only for conversations. A row that has only a prompt is in no template."""
    study = build_study(tmp_path, StudySpec(SMALL[:1], seeds=(1,), sets={"sums": 5}, fact_sets=()))
    for file in study.store_dir.glob("*/*/predictions.jsonl"):
        rows = map(json.loads, file.read_text().strip().split("\n"))
        more = [row | {"instruction": asked or row["prompt"], "input": "5 + 5" if asked else ""} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in more))
    plan = json.loads((study.study_dir / "plan.json").read_text())
    plan["recipe"]["data"]["template"] = template
    (study.study_dir / "plan.json").write_text(json.dumps(plan))
    assert [turn["text"] for turn in samples(study.read())["sums"][0]["turns"]] == shown


def test_columns_of_numbers_are_aligned_right_and_text_left():
    body = [["a", "dolly", "▲ better", "**+0.3 [−0.1, 0.7]**", "`3f2a`", "12 s"], ["b", "mean", "○ undecided", "–", "`a1`", "not finished"]]
    line = pipe_table(["arm", "where", "is", "difference", "stage", "time"], body).split("\n")[1]
    assert line == "| --- | --- | --- | ---: | --- | ---: |"


def test_models_alone_in_every_output(tmp_path):
    study = build_study(tmp_path, StudySpec([ArmSpec("xl", ("xl",))], seeds=(0,), sets={"dolly": 12}, teacher=None, trained=False, also={}))
    write_report(study.read())
    terminal, markdown = render(summary_table(study.read()), 80), (study.study_dir / "report.md").read_text("utf-8")
    for text in (terminal, markdown):
        flat = " ".join(text.split())
        assert re.search(r"xl scores \d+\.\d ROUGE-L \(95 % interval \d+\.\d to \d+\.\d\)\.", flat)
        assert "too few" not in text
        assert "training seed" not in text
    content = json.loads((study.study_dir / "results.json").read_text())
    assert (content["comparisons"], content["verdicts"]) == ([], [])


def test_missing_evaluations_are_named_everywhere(unfinished):
    page = write_report(unfinished.results)
    sentence = "3 of 6 evaluations are not finished: direct (seed 20); chain (seeds 10, 20)."
    for name in ("report.html", "report.md"):
        assert sentence in (unfinished.study_dir / name).read_text(encoding="utf-8")
    cells = parse(page).cells
    assert not re.search(r"\d", cells["rouge_l", "chain", "dolly"])
    text = render(summary_table(unfinished.results))
    assert re.search(r"chain \(0/2 seeds\) +missing", text)
    assert re.search(r"direct \(1/2 seeds\) +\d", text)


def test_failed_stages_are_named(tmp_path):
    study = build_study(tmp_path, StudySpec(SMALL, unfinished=(("direct", 20),)))
    run = {"pid": 1, "host": "h", "born": 1.0, "command": "tadistill run", "started": "", "stages": {}}
    failed = {key_of("evaluate", "direct", 20): "out of memory\nat step 3", key_of("evaluate", "direct", 10): "finished later"}
    folder = study.study_dir / "local"
    folder.mkdir()
    (folder / "h-1.json").write_text(json.dumps(run | {"failed": failed}))
    found, page = answer(study.read()), parse(write_report(study.read())).text
    assert found.failed == "1 stage failed: evaluate direct, seed 20 (out of memory\\nat step 3)."
    assert found.next.startswith("1 of 6 evaluations are not finished: direct (seed 20).")
    assert found.failed in page
    assert found.failed in " ".join(render(summary_table(study.read())).split())


def test_nothing_finished_still_makes_a_report(tmp_path):
    everything = tuple((arm.name, seed) for arm in SMALL for seed in (10, 20))
    study = build_study(tmp_path, StudySpec(SMALL, unfinished=everything))
    page = write_report(study.read())
    assert "no arm is evaluated, and" in page.read_text(encoding="utf-8")
    assert "no arm is evaluated, and" in render(summary_table(study.read()))


def test_a_teacher_as_an_arm_is_not_the_best_student(tmp_path):
    study = build_study(tmp_path, StudySpec([*SMALL, ArmSpec("teacher", ("xl",), gain=20, flops=None)]))
    assert not [sentence for sentence in answer(study.read()).sentences if "teacher" in sentence]
    assert write_report(study.read()).is_file()


def _final_stage_file(study, name):
    key = json.loads((study.study_dir / "plan.json").read_text())["arms"][0]["final"]["10"]
    return study.store_dir / key[:2] / key / name


def test_a_damaged_training_log_is_named(study):
    path = _final_stage_file(study, "metrics.jsonl")
    path.write_text('{"step": 1}\n{"step"')
    with pytest.raises(StoreError, match=rf"{path.parent.name}.metrics\.jsonl cannot be read"):
        write_report(study.read())


def test_a_stage_with_a_damaged_manifest_is_not_finished(study):
    """As for `tadistill plan`, which would run it again."""
    path = _final_stage_file(study, "manifest.json")
    path.write_text('{"step": 1}\n{"step"')
    write_report(study.read())
    (line,) = (line for line in (study.study_dir / "report.md").read_text().splitlines() if f"`{path.parent.name}`" in line)
    assert line.endswith("| not finished |")


def test_numbers_in_words():
    assert [parameters_text(count) for count in (124_439_808, 1_557_611_200, 12_345, 999)] == [
        "124 M",
        "1.56 B",
        "12.3 k",
        "999",
    ]
    assert [flops_text(value) for value in (3.14e17, 0, None)] == ["3.1e17", "0", "\N{EN DASH}"]
    assert flops_text(9.96e17) == "1.0e18"
    assert number(-0.01, "rouge_l") == "0.0"
    assert number(-1.26, "rouge_l") == "\N{MINUS SIGN}1.3"


def render(table, width=140):
    console = rich.console.Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_question_has_the_whole_name_of_a_teacher(tmp_path, monkeypatch):
    teacher = "Mein Lehrer"
    monkeypatch.setitem(PARAMETERS, teacher, 10**9)
    arms = [ArmSpec("chain", (teacher, "l", "s")), ArmSpec("direct", (teacher, "s"))]
    found = answer(build_study(tmp_path, StudySpec(arms, teacher=teacher)).read())
    assert found.question.endswith(" than when Mein Lehrer teaches it directly?")


def test_the_answer_of_many_arms_without_chains(tmp_path):
    arms = [ArmSpec(f"arm{i}", ("xl", "s"), gain=8.0 * (i == 4)) for i in range(5)]
    spec = StudySpec(arms, seeds=(10, 20, 30, 40), sets={"dolly": 60}, fact_sets=())
    found = answer(build_study(tmp_path, spec).read())
    assert found.question == "Which of 5 ways to train s (124 M parameters) gives the best model?"
    assert (found.kind, found.answer.split(",")[0]) == ("best", "arm4 has the highest mean")
    assert found.answer.endswith("and clearly beats all others.")
    assert found.against_sft == "The study does not compare distillation with plain fine-tuning (SFT), because no arm only fine-tunes s."


@pytest.mark.parametrize(("gain", "claim"), [(9.0, "clearly better"), (0.0, "not clearly better"), (-9.0, "clearly worse")])
def test_the_answer_says_if_distillation_beat_fine_tuning(tmp_path, gain, claim):
    arms = [ArmSpec("sft", ("s",), flops=1e15), ArmSpec("kd", ("xl", "s"), gain=gain)]
    spec = StudySpec(arms, seeds=(10, 20, 30, 40), sets={"dolly": 60}, fact_sets=())
    results = build_study(tmp_path, spec).read()
    sampled, greedy = (signed(difference(results, "kd", "sft", m).mean, m) for m in ("rouge_l", "rouge_l@greedy"))
    assert re.fullmatch(
        rf"Distillation is {claim} than plain fine-tuning \(SFT, sft\)\. With sampled answers, kd differs by {re.escape(sampled)} points "
        rf"of ROUGE-L \(95 % interval \S+ to \S+\)\. With greedy answers, kd differs by {re.escape(greedy)} points "
        r"\(95 % interval \S+ to \S+\)\.",
        answer(results).against_sft,
    )


@pytest.mark.parametrize("width", [40, 60, 79])
def test_a_narrow_terminal_has_fewer_columns(tmp_path, width):
    arms = [*SMALL, ArmSpec("direct-with-a-rather-long-name-of-its-own", ("xl", "s"))]
    lines = render(summary_table(build_study(tmp_path, StudySpec(arms)).read()), width).splitlines()
    assert max(map(len, lines)) <= width
    intervals = [line for line in lines if re.search(r"\d\.\d \[\d+\.\d, \d+\.\d\] ", line)]
    assert len(intervals) == len(arms)  # the main metric keeps its interval
    assert len([line for line in lines if line.rstrip().endswith("×")]) == (0 if width == 40 else len(arms))


def test_models_of_the_same_size_are_in_the_order_of_the_plan(tmp_path, monkeypatch):
    for model in ("xl", "l", "m"):
        monkeypatch.setitem(PARAMETERS, model, 354_823_168)
    arms = [ArmSpec("kd", ("xl", "s")), *(ArmSpec(f"plain-{model}", (model,)) for model in ("m", "xl", "l"))]
    groups = arm_groups(build_study(tmp_path, StudySpec(arms)).results)
    assert [group.model for group in groups] == ["s", "m", "xl", "l"]
