"""Turns the result of the kit into docs/benchmarks/gpu.md.

python benchmarks/gpu/page.py gpu-kit/gpu.json      # keeps a copy of the result beside the page, as gpu.json. Of several results of one
                                                    # kind of GPU, the last one with a part gives this part,
                                                    # and what earlier ones found stands below it
python benchmarks/gpu/page.py                       # from that copy, or, without one, a page that says what will be measured
"""

import argparse
import ast
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "benchmarks"
COMMAND = "bash benchmarks/gpu/run.sh"
NOT_YET = "Not yet run on a GPU."


def described() -> dict[str, str]:
    """Return what each part measures, in the order of the parts: the docstrings of their functions."""
    names: dict[str, tuple[str, ...]] = {}
    texts: dict[str, str] = {}
    for path in sorted(HERE.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if path.stem == "kit" and isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names[node.targets[0].id] = ast.literal_eval(node.value) if isinstance(node.value, ast.Tuple) else ()
            elif isinstance(node, ast.FunctionDef) and [a.arg for a in node.args.args] == ["kit"]:
                texts[node.name] = ast.get_docstring(node) or ""
    return {name: texts[name] for name in (*names["CORRECT"], *names["SPEED"])}


def page(result: dict[str, Any] | None) -> str:
    """Return the page of a result, or the page before the first one."""
    if result is None or result["device"] == "cpu":
        lines = [f"{NOT_YET} The kit in `benchmarks/gpu` will fill this page. On a machine with a GPU, it runs with one command:"]
        lines += ["", f"```\n{COMMAND}\n```", "", "| part | what it measures |", "|---|---|"]
        lines += [f"| `{name}` | {text} |" for name, text in described().items()]
    else:
        lines = [f"This page shows the first correctness and then the speed of tadistill on one GPU: {result['device']}."]
        lines += ["", *(f"```\n{command}\n```" for command in result.get("commands", [COMMAND]))]
        lines += ["", ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + "."]
        lines += ["", verdict(result)]
        for name, part in result["parts"].items():
            lines += ["", f"## {name}", "", f"{part['title']} The part took {part['seconds']:.0f} s."]
            if "error" in part:
                lines += ["", f"The part ended early: `{part['error'].strip().splitlines()[-1]}`"]
            lines += table(part["lines"])
            for before in part.get("earlier", ()):
                lines += ["", "The same part in an earlier call:", *table(before)]
    return "\n".join(["# A GPU: correctness and speed", "", *lines, "", "`benchmarks/gpu/README.md` says what is measured, and how.", ""])


def joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one result with the parts of several. The last result with a part gives this part, with the lines of the former ones.

    Raises:
        SystemExit: the results are of different GPUs or versions.
    """
    if any((each["device"], each["versions"]) != (results[0]["device"], results[0]["versions"]) for each in results):
        raise SystemExit("the results are of different GPUs or versions; give results of one GPU")
    last = {name: at for at, each in enumerate(results) for name in each["parts"]}
    parts = {name: results[last[name]]["parts"][name] for name in described() if name in last}
    for name, part in parts.items():
        if before := [each["parts"][name]["lines"] for each in results[: last[name]] if name in each["parts"]]:
            parts[name] = part | {"earlier": before}
    options = [each["command"].partition(" --only ")[2] for each in results]
    commands = [f"{COMMAND} --only {option}" if option else COMMAND for option in options]
    return {key: value for key, value in results[-1].items() if key not in ("command", "budget")} | {"commands": commands, "parts": parts}


def verdict(result: dict[str, Any]) -> str:
    """Return how many rules hold, and which do not."""
    rules = [(name, line) for name, part in result["parts"].items() for line in part["lines"] if line["ok"] is not None]
    wrong = [f"`{name}`: {line['name']}" for name, line in rules if not line["ok"]]
    return f"{len(rules) - len(wrong)} of {len(rules)} rules hold." + (f" These do not: {'; '.join(wrong)}." if wrong else "")


def table(lines: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a part as the lines of a table."""
    return ["", "| | value | rule | holds |", "|---|---:|---|---|", *map(row, lines)]


def row(line: dict[str, Any]) -> str:
    """Return a line of a part as a row of a table."""
    value = line["value"]
    text = (
        f"{value:,.0f}" if isinstance(value, float) and abs(value) >= 1000 else f"{value:.3g}" if isinstance(value, float) else str(value)
    )
    cells = (line["name"], text, line["rule"], {True: "yes", False: "NO", None: ""}[line["ok"]])
    return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make docs/benchmarks/gpu.md from the result of the kit.")
    parser.add_argument("json", type=Path, nargs="*", help="the gpu.json of one or several runs on one kind of GPU")
    given, kept = parser.parse_args().json, DOCS / "gpu.json"
    if given:
        kept.write_text(json.dumps(joined([json.loads(path.read_text()) for path in given]), indent=1) + "\n", encoding="utf-8")
    (DOCS / "gpu.md").write_text(page(json.loads(kept.read_text()) if kept.exists() else None), encoding="utf-8")


if __name__ == "__main__":
    main()
