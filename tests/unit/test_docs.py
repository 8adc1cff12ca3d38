"""What the package, its recipes and its pages say about other files: every file that they name exists."""

import ast
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tadistill.config.objective import MiniLLM
from tadistill.config.reference import _TITLES, reference
from tadistill.data import tinyworld
from tadistill.metrics import METRICS
from tadistill.report.answer import BADGES
from tadistill.text import listed

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"(?<![\w/])((?:docs|recipes|examples|benchmarks)/[\w./-]*\w\.\w+)")
GENERATED = {"code.md", "commands.md", "glossary.md", "keys.md"}
"""Pages that docs/hooks.py writes."""


def texts() -> list[Path]:
    """Return the files that users read: messages and comments of the package, recipes, pages."""
    folders = [ROOT / name for name in ("src", "recipes", "examples", "benchmarks", "docs")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".yaml", ".md", ".j2")]
    return sorted([*files, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml", "Makefile"))])


def test_files_that_a_text_names_exist():
    missing = {}
    for path in texts():
        named = set(NAMED.findall(re.sub(r"\]\([^)]*\)", "", path.read_text(encoding="utf-8"))))  # links are relative to the page
        if wrong := sorted(name for name in named if not (ROOT / name).exists() and Path(name).name not in GENERATED):
            missing[str(path.relative_to(ROOT))] = wrong
    assert not missing


def test_examples_of_python_load_arms_of_the_quickstart():
    arms = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))["arms"]
    places = [ROOT / name for name in ("src/tadistill/__init__.py", "src/tadistill/api/__init__.py", "docs/reference/python.md")]
    named = [re.findall(r'load_student\(study, "(.+?)"\)', path.read_text(encoding="utf-8")) for path in places]
    assert all(len(found) == 1 and found[0] in arms for found in named)


def test_pages_name_the_fields_in_which_the_presets_of_minillm_differ():
    """The page for users of MiniLLM's code said ten."""
    paper, official = (MiniLLM(type="minillm", preset=preset).model_dump() for preset in ("paper", "official"))
    differ = {name for name in paper if paper[name] != official[name]} - {"preset"}
    page = (ROOT / "docs" / "concepts" / "minillm.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if re.match(r"\| \d+ \|", line)]
    assert {name for row in rows if row[2] != row[3] for name in re.findall(r"`(.+?)`", row[1])} == differ
    assert f"rows {listed([row[0] for row in rows if row[2] == row[3]])} are the same" in page
    assert (len(differ), "in nine fields" in page) == (9, True)
    assert "differ in nine fields" in (ROOT / "docs" / "how-to" / "from-minillm.md").read_text(encoding="utf-8")


def test_the_blocks_about_two_tokenizers_run_one_after_the_other():
    page = (ROOT / "docs" / "concepts" / "tokenizers.md").read_text(encoding="utf-8")
    tokenizers = tinyworld.tokenizer("tinyworld"), tinyworld.tokenizer("tinyworld-bpe")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    models = [LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)) for tokenizer in tokenizers]
    names = dict(zip(("student_tokenizer", "teacher_tokenizer", "student_model", "teacher_model"), (*tokenizers, *models), strict=True))
    names |= {
        f"{side}_prompt": tokenizer("who is it ?")["input_ids"] for side, tokenizer in zip(("student", "teacher"), tokenizers, strict=True)
    }
    names["ids"] = [*tokenizers[0]("bavan lives in the old town")["input_ids"], tokenizers[0].eos_token_id]
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert names["total"].item() > 0


@pytest.mark.parametrize("prompts", [2, 3])
def test_the_script_that_splits_a_file_writes_no_empty_part(tmp_path, monkeypatch, prompts):
    """With two prompts, the training set was empty. A byte order mark, which data files may have, ended the script."""
    monkeypatch.chdir(tmp_path)
    Path("all.jsonl").write_text("".join(f'{{"instruction": "{i}", "output": "a"}}\n' for i in range(prompts)), encoding="utf-8-sig")
    (script,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/how-to/own-data.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    with pytest.raises(SystemExit, match="fewer than three different prompts") if prompts < 3 else nullcontext():
        exec(script, {})
    assert len({*Path("parts").glob("*.jsonl")}) == (3 if prompts == 3 else 0)
    assert all(part.read_text("utf-8").count("\n") == 1 for part in Path("parts").glob("*.jsonl"))


def test_the_script_that_splits_a_file_keeps_equal_prompts_in_one_part(tmp_path, monkeypatch):
    """An empty input, a null and none are the same prompt for the package, but were three for the script."""
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": "a"}, {"instruction": "a", "input": ""}, {"instruction": "a", "input": None, "messages": None}]
    rows += [{"instruction": "b", "messages": []}, {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}]
    Path("all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (script,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/how-to/own-data.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    exec(script, {})
    assert sorted(part.read_text("utf-8").count("\n") for part in Path("parts").glob("*.jsonl")) == [1, 1, 3]


@pytest.mark.slow
def test_the_command_that_converts_csv_keeps_texts(tmp_path, monkeypatch):
    """`None` and `NA` became null, and `007` the number 7."""
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("instruction,input,output\nx,,None\ny,NA,007\n")
    (script,) = re.findall(r'`python -c "(import pandas; .*?)"`', (ROOT / "docs/how-to/own-data.md").read_text("utf-8"))
    exec(script, {})
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert rows == [{"instruction": "x", "input": "", "output": "None"}, {"instruction": "y", "input": "NA", "output": "007"}]


def test_messages_name_pages_by_their_titles():
    """An installed package has no `docs/`, so what a user reads names a page by its title. Comments and other docstrings name files."""
    heads = {found[1] for path in (ROOT / "docs").rglob("*.md") if (found := re.search(r"^# (.+)$", path.read_text("utf-8"), re.MULTILINE))}
    titles, named, paths = heads | {"Glossary", "Keys of a recipe", "Commands"}, set(page_titles()), []
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")}
    for path, source in sources.items():
        if "docs/" not in source and "page" not in source:
            continue
        tree = ast.parse(source)
        hidden = set() if "cli" in path.parts else {id(text) for text in docstrings(tree)}
        texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in hidden]
        paths += [f"{path.name}: {text.value}" for text in texts if "docs/" in text.value and ".md" in text.value]
        named |= {title for text in texts for title in re.findall(r'page "([^"]+)" of the doc', text.value)}
    named |= {
        t for p in (ROOT / "recipes").rglob("*.yaml") for t in re.findall(r'page "([^"]+)" of the doc', p.read_text(encoding="utf-8"))
    }
    assert not paths
    assert len(named) > 9
    assert named <= titles


def page_titles() -> Iterator[str]:
    """Return the titles that `tadistill explain` names. Their pages must be those of the groups of keys."""
    for page, title in _TITLES.items():
        assert (ROOT / "docs" / page).read_text(encoding="utf-8").startswith(f"# {title}\n")
        yield title
    assert {part.page.partition("#")[0] for part in reference()} <= set(_TITLES)


def docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Return the strings that are expressions of their own: docstrings of modules, classes, functions and fields."""
    return (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def test_links_of_a_page_lead_to_files():
    """`make docs` also checks anchors and generated pages, but only where mkdocs is installed."""
    missing = {}
    for path in (ROOT / "docs").rglob("*.md"):
        targets = re.findall(r"\]\(([^)\s#]+)", re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL))
        local = {target for target in targets if "://" not in target and Path(target).name not in GENERATED}
        if wrong := sorted(target for target in local if not (path.parent / target).exists()):
            missing[str(path.relative_to(ROOT))] = wrong
    assert not missing


def test_the_index_of_results_has_the_pages_answers():
    script = runpy.run_path(str(ROOT / "docs/index_results.py"))
    advice = "run `python docs/index_results.py`"
    assert (ROOT / "docs/results/index.md").read_text(encoding="utf-8") == script["index"](), advice
    assert (ROOT / "README.md").read_text(encoding="utf-8") == script["readme"](), advice


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "docs").glob("*.py") if "from results_page" in path.read_text()))
def test_scripts_of_results_pages_can_be_imported(script, monkeypatch):
    for name in re.findall(r"^(?:import|from) (matplotlib|playwright)", (ROOT / "docs" / script).read_text(), re.MULTILINE):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(ROOT / "docs")
    runpy.run_path(str(ROOT / "docs" / script))


def test_a_script_without_its_runs_says_which_commands_make_them(tmp_path):
    script = ROOT / "docs/tabulate_quickstart.py"
    found = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert re.search(r"plan.json does not exist, .* The first lines of \S+ have the commands\.$", found.stderr.strip())


def test_the_page_about_reports_has_every_word_that_an_answer_begins_with():
    page = (ROOT / "docs/how-to/read-report.md").read_text("utf-8")
    table = page.partition("| word | meaning |")[2].partition("\n\n")[0]
    assert {word for row in re.findall(r"^\| ([A-Z].*?) \|", table, re.MULTILINE) for word in row.split(", ")} == set(BADGES.values())


def test_the_page_names_the_metrics_in_the_order_that_decides():
    """It said "in the order of the table", which begins with ROUGE-L and had no fact accuracy."""
    (order,) = re.findall(
        r"^The verdict and the main figures .*?: the first of (.*?) that$",
        (ROOT / "docs/reference/evaluation.md").read_text("utf-8"),
        re.MULTILINE,
    )
    quality = [name for name, metric in METRICS.items() if metric.group == "quality"]
    named = re.findall("`(.+?)`", order)  # other tests may have registered metrics of their own, which come last
    assert [*named, "rouge_l_unicode"] == quality[: len(named) + 1]
