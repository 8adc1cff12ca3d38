"""What `tadistill judge` and `tadistill human` do; the command line only names the options."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tadistill.errors import ConfigError, JudgeFailed
from tadistill.judge.answers import REFERENCE, Answers, read_answers
from tadistill.judge.asking import Estimate, Verdicts, ask_all, estimate, stopped
from tadistill.judge.cache import Cache, Settings, open_cache
from tadistill.judge.endpoint import Unavailable, ask, check_address, connect, knock
from tadistill.judge.questions import Question, make_questions
from tadistill.judge.ratings import load_key, read_ratings, summarise_ratings
from tadistill.judge.sheet import make_sheet, write_sheet
from tadistill.judge.summary import summarise, write_summary
from tadistill.judge.terminal import rows_table
from tadistill.results.files import find_study
from tadistill.store import store_of

if TYPE_CHECKING:
    from openai import OpenAI


def judge(
    study: str,
    *,
    root: Path,
    console: Console,
    confirm: Callable[[str], bool],
    command: str,
    model: str,
    base_url: str,
    mode: str = "pair",
    arms: Sequence[str] = (),
    against: str = REFERENCE,
    sets: Sequence[str] = (),
    all_seeds: bool = False,
    limit: int | None = None,
    name: str | None = None,
    temperature: float = 0.0,
    max_tokens: int = 256,
    jobs: int = 4,
    timeout: float = 120.0,
    price_in: float | None = None,
    price_out: float | None = None,
    yes: bool = False,
) -> Path | None:
    """Has a model rate the answers of a study; returns the summary's path, or None where the user said no.

    `root` holds the studies and the store; `confirm` is asked before anything is sent, unless `yes`.

    Raises:
        ConfigError, DataError: wrong input, before anything is asked.
        JudgeFailed: the endpoint stopped; replies are kept and the same command goes on.
    """
    _check_numbers(temperature=temperature, max_tokens=max_tokens, jobs=jobs, timeout=timeout, price_in=price_in, price_out=price_out)
    if not model.strip():
        raise ConfigError("--model is empty: name the judge as its endpoint knows it")
    base_url = check_address(base_url)
    directory = find_study(study, root)
    path = directory / "judge" / f"judge-{_file_name(name or _default_name(mode, model, against))}.json"
    wanted = [*arms, against] if arms and against != REFERENCE else arms
    answers = read_answers(directory, store_of(root).root, arms=wanted, sets=sets, all_seeds=all_seeds, limit=limit)
    questions = make_questions(answers, mode=mode, against=against)
    settings = Settings(model, temperature, max_tokens)
    client = connect(base_url, timeout=timeout)
    with open_cache(directory / "judge" / "replies.jsonl") as cache:
        plan = estimate(questions, settings, cache)
        _announce(console, answers, plan, model, price_in, price_out)
        if plan.requests:
            if not yes and not confirm(f"Send {plan.requests} requests to {base_url}?"):
                return None
            _find_endpoint(client, plan)
        verdicts = _ask(console, questions, settings, cache, lambda text: ask(client, settings, text), jobs)
    rows = summarise(answers, questions, verdicts, mode=mode, against=against)
    more = {"questions": plan.questions, "training_seeds": list(answers.seeds), "temperature": temperature}
    more |= {"unparsed": len(verdicts.unparsed), "missing": len(verdicts.refused), "unfinished": list(answers.unfinished)}
    write_summary(path, mode=mode, judge=model, arms=answers.arms, rows=rows, command=command, **more)
    _conclude(console, verdicts, plan)
    if rows:
        console.print(rows_table(rows, f"{mode}, judged by {model}"))
    console.print(f"summary: {path}", soft_wrap=True, highlight=False)
    return path


def export_sheet(
    study: str,
    *,
    root: Path,
    console: Console,
    name: str = "blind",
    arms: Sequence[str] = (),
    sets: Sequence[str] = (),
    limit: int | None = None,
    with_reference: bool = False,
    seed: int = 0,
) -> Path:
    """Writes a blind sheet (page, CSV and key) of a study's first training seed; returns the page's path."""
    directory = find_study(study, root)
    answers = read_answers(directory, store_of(root).root, arms=arms, sets=sets, limit=limit)
    name = _file_name(name)
    page = write_sheet(directory / "judge", make_sheet(answers, name=name, with_reference=with_reference, seed=seed), name=name)
    _name_unfinished(console, answers)
    console.print(f"{len(answers.items)} prompts, {len(answers.arms) + with_reference} answers each", highlight=False)
    for text in (f"for raters: {page} (or {page.with_suffix('.csv')})", f"keep to yourself: {page.with_suffix('.key.json')}"):
        console.print(text, soft_wrap=True, highlight=False)
    return page


def read_sheets(study: str, files: Sequence[Path], *, root: Path, console: Console, command: str, name: str = "blind") -> Path:
    """Reads filled-in sheets and writes ``judge-human-NAME.json``; returns its path."""
    directory, name = find_study(study, root) / "judge", _file_name(name)
    key = load_key(directory / f"sheet-{name}.key.json")
    summary = summarise_ratings(read_ratings(files, key), key)
    path = directory / f"judge-human-{name}.json"
    write_summary(path, mode="human", judge=f"{len(summary['raters'])} raters", command=command, **summary)
    console.print(rows_table([row for row in summary["rows"] if "score" in row], f"ratings, {key['scale'][0]} to {key['scale'][1]}"))
    console.print(rows_table([row for row in summary["rows"] if "score" not in row], "arms compared"))
    found = summary["agreement"]
    value = "not defined" if found["value"] is None else f"{found['value']:.2f}"
    console.print(f"{found['measure']}: {value} ({found['raters']} raters, {found['shared']} answers rated by several)", highlight=False)
    console.print(f"summary: {path}", soft_wrap=True, highlight=False)
    return path


def _find_endpoint(client: "OpenAI", plan: Estimate) -> None:
    try:
        knock(client)
    except Unavailable as error:
        raise JudgeFailed(stopped(f"{client.base_url} {error}", plan.cached, plan.questions)) from error


def _ask(
    console: Console, questions: Sequence[Question], settings: Settings, cache: Cache, ask_one: Callable, jobs: int
) -> Verdicts:  # fmt: skip
    columns = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len({question.text for question in questions}))
        return ask_all(questions, settings, cache, ask_one, jobs=jobs, tick=lambda: progress.advance(task))


def _announce(console: Console, answers: Answers, plan: Estimate, model: str, price_in: float | None, price_out: float | None) -> None:
    _name_unfinished(console, answers)
    console.print(
        f"{model}: {plan.questions} questions ({len(answers.arms)} arms, {len(answers.items)} prompts, training seed "
        f"{', '.join(map(str, answers.seeds))}, both orders), {plan.cached} already answered, {plan.requests} requests to send",
        highlight=False,
    )
    if plan.requests:
        out = f"{plan.tokens_out:,} tokens out (at most {plan.most_out:,})"
        console.print(f"estimated: {plan.tokens_in:,} tokens in, {out}; unparsable replies are asked again", highlight=False)
    if plan.requests and price_in is not None and price_out is not None:
        expected, most = plan.cost(price_in, price_out)
        digits = 2 if most >= 1 else 4
        console.print(f"estimated cost: {expected:.{digits}f} (at most {most:.{digits}f} without repeats)", highlight=False)


def _conclude(console: Console, verdicts: Verdicts, plan: Estimate) -> None:
    if verdicts.unparsed:
        console.print(f"{len(verdicts.unparsed)} of {plan.questions} questions have no reply that can be parsed; they are left out")
    if verdicts.refused:
        reason = next(iter(verdicts.refused.values()))
        console.print(f"{len(verdicts.refused)} of {plan.questions} questions were refused (the endpoint {reason}); they are left out")


def _name_unfinished(console: Console, answers: Answers) -> None:
    if answers.unfinished:
        console.print(f"not evaluated yet, so left out: {', '.join(answers.unfinished)}", highlight=False)


def _default_name(mode: str, model: str, against: str) -> str:
    return f"{mode}-{model.strip('/')}" + ("" if against == REFERENCE else f"-vs-{against}")


def _file_name(name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
    if not plain:
        raise ConfigError(f"--name is `{name}`: it must hold a letter or a digit")
    return plain


def _check_numbers(
    *, temperature: float, max_tokens: int, jobs: int, timeout: float, price_in: float | None, price_out: float | None
) -> None:
    rules = (
        ("temperature", temperature, 0 <= temperature <= 2, "from 0 to 2"),
        ("max-tokens", max_tokens, max_tokens >= 8, "at least 8"),
        ("jobs", jobs, 1 <= jobs <= 64, "from 1 to 64"),
        ("timeout", timeout, 0 < timeout < float("inf"), "a number of seconds above 0"),
        ("price-in", price_in, price_in is None or price_in >= 0, "0 or more"),
        ("price-out", price_out, price_out is None or price_out >= 0, "0 or more"),
    )
    for option, value, fine, rule in rules:
        if not fine:
            raise ConfigError(f"--{option} is {value}: it must be {rule}")
    if (price_in is None) != (price_out is None):
        raise ConfigError("give both --price-in and --price-out (per million tokens), or neither")
