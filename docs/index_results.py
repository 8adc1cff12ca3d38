"""Writes docs/results/index.md and the list of results in README.md, from the titles and answers of the pages in docs/results.

    python docs/index_results.py

A page of results begins with its question as a heading. Its first paragraph in bold is the answer.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
HEAD = """# Results

Each page answers one question with one study: the answer, a figure or a table, the reasons, what the study does not say, and the commands
that repeat it. `docs/index_results.py` writes this page from their answers.

"""
BEGIN, END = "<!-- results: docs/index_results.py -->\n", "<!-- end of results -->"


def answers() -> dict[str, tuple[str, str]]:
    """Return the question and the answer of every page, by file name. Links are removed from the answers."""
    found = {}
    for path in sorted(RESULTS.glob("*.md")):
        if path.name == "index.md":
            continue
        text = path.read_text(encoding="utf-8")
        title, answer = re.match(r"# (.+)", text), re.search(r"^\*\*(.+?)\*\*", text, re.MULTILINE | re.DOTALL)
        if title is None or answer is None:
            raise ValueError(f"{path.name} needs a question as its heading, and an answer in bold")
        found[path.name] = (title[1], re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", " ".join(answer[1].split())))
    return found


def index() -> str:
    """Return docs/results/index.md."""
    return HEAD + "".join(f"- [{question}]({name}) {answer}\n" for name, (question, answer) in answers().items())


def readme() -> str:
    """Return README.md with a new list of results."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = "".join(f"- [{question}](docs/results/{name}) {answer}\n" for name, (question, answer) in answers().items())
    before, rest = text.split(BEGIN)
    return before + BEGIN + lines + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    (RESULTS / "index.md").write_text(index(), encoding="utf-8")
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
