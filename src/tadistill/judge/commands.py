"""Carry out the commands `tadistill judge` and `tadistill human`."""

import datetime
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tadistill.config.evaluate import REFERENCE, BlindSheet, Judge
from tadistill.disk import write_json
from tadistill.errors import ConfigError, JudgeFailed
from tadistill.judge.people import load_key, make_sheet, read_ratings, summarise_ratings, write_sheet
from tadistill.judge.questions import Answers, Question, make_questions, read_answers
from tadistill.judge.scores import RequestEstimate, Row, Verdicts, ask, ask_all, estimate_requests, stopped, summarise
from tadistill.models.chat_api import Unavailable, check_address, connect, knock
from tadistill.models.chat_api_replies import Cache, open_cache
from tadistill.results.study import find_study
from tadistill.terminal import Terminal
from tadistill.text import counted

if TYPE_CHECKING:
    from openai import OpenAI


def judge(
    study: str, settings: Judge, *, runs: Path | None, console: Terminal, confirm: Callable[[str], bool], command: str
) -> Path | None:
    """Let a model rate the answers of a study. Return the path of the summary, or None if the user does not confirm.

    `runs` is the option `--runs`, or None. `confirm` asks the user before the first request is sent.

    Raises:
        ConfigError, DataError: the input is wrong. Nothing has been sent.
        JudgeFailed: the endpoint stopped answering, refuses all questions, or gave too few scores for a summary. All replies are saved, and
            the same command continues with the other questions.
    """
    mode, model, against = settings.mode, settings.model, settings.against
    base_url = check_address(settings.base_url)
    directory, store = find_study(study, runs)
    name = settings.name or f"{mode}-{model.strip('/')}" + ("" if against == REFERENCE else f"-vs-{against}")
    path = directory / "judge" / f"judge-{_file_name(name)}.json"
    wanted = [*settings.arms, against] if settings.arms and against != REFERENCE else settings.arms
    answers = read_answers(directory, store, arms=wanted, sets=settings.sets, all_seeds=settings.all_seeds, limit=settings.limit)
    questions = make_questions(answers, mode=mode, against=against)
    client = connect(base_url, timeout=settings.timeout)
    with open_cache(directory / "judge" / "replies.jsonl") as cache:
        plan = estimate_requests(questions, settings, cache)
        _announce(console, answers, plan, model)
        if plan.requests:
            if not confirm(f"Send {counted(plan.requests, 'request')} to {base_url}?"):
                return None
            try:
                knock(client)
            except Unavailable as error:
                raise JudgeFailed(stopped(f"the endpoint {client.base_url} failed: {error}", plan.cached, plan.questions)) from error
        verdicts = _ask(console, questions, settings, cache, client)
    rows = summarise(answers, questions, verdicts, mode=mode, against=against)
    more = {
        "questions": plan.questions,
        "training_seeds": list(answers.seeds),
        "temperature": settings.temperature,
        "evaluations": answers.evaluations,
        "unparsed": len(verdicts.unparsed),
        "missing": len(verdicts.refused) + len(verdicts.unasked),
        "unfinished": list(answers.unfinished),
    }
    _conclude(console, verdicts, plan)
    if not rows:
        raise JudgeFailed(
            "no arm has a prompt with scores in both orders and for every training seed, so there is no summary; choose a judge that gives "
            "scores, or correct the limits of its endpoint, and run the command again"
        )
    write_summary(path, mode=mode, judge=model, arms=answers.arms, rows=rows, command=command, **more)
    console.print(_table(rows, f"{mode}, judged by {model}"))
    console.say(f"summary: {path}")
    return path


def export_sheet(study: str, sheet: BlindSheet, *, runs: Path | None, console: Terminal) -> Path:
    """Write a sheet (page, CSV and key) for raters who do not see which arm wrote an answer. Return the path of the page."""
    directory, store = find_study(study, runs)
    answers = read_answers(directory, store, arms=sheet.arms, sets=sheet.sets, limit=sheet.limit)
    name = _file_name(sheet.name)
    made = make_sheet(answers, name=name, with_reference=sheet.reference, seed=sheet.seed)
    page = write_sheet(directory / "judge", made, name=name)
    _name_unfinished(console, answers)
    each = counted(len(answers.arms) + sheet.reference, "answer")
    console.say(f"{counted(len(answers.items), 'prompt')}, {each} each")
    for text in (f"send to the raters: {page} (or {page.with_suffix('.csv')})", f"keep from the raters: {page.with_suffix('.key.json')}"):
        console.say(text)
    return page


def read_sheets(study: str, files: Sequence[Path], *, runs: Path | None, console: Terminal, command: str, name: str = "blind") -> Path:
    """Read the sheets that raters filled in, write a summary of the ratings to ``judge-human-NAME.json``, and return its path."""
    directory, name = find_study(study, runs)[0] / "judge", _file_name(name)
    key = load_key(directory / f"sheet-{name}.key.json")
    summary = summarise_ratings(read_ratings(files, key), key)
    path = directory / f"judge-human-{name}.json"
    write_summary(path, mode="human", judge=counted(len(summary["raters"]), "rater"), command=command, **summary)
    console.print(_table([row for row in summary["rows"] if "score" in row], f"ratings, {key['scale'][0]} to {key['scale'][1]}"))
    console.print(_table([row for row in summary["rows"] if "score" not in row], "arms compared"))
    found = summary["agreement"]
    value = "not defined" if found["value"] is None else f"{found['value']:.2f}"
    several = f"{counted(found['raters'], 'rater')}, {counted(found['shared'], 'answer')} with several ratings"
    console.say(f"{found['measure']}: {value} ({several})")
    console.say(f"summary: {path}")
    return path


def write_summary(path: Path, *, mode: str, judge: str, arms: Sequence[str], rows: Sequence[Row], command: str, **more: Any) -> None:
    """Write the summary of the ratings to `path` (``judge-NAME.json``). The report of the study reads this file."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"mode": mode, "judge": judge, "arms": list(arms), "rows": list(rows), **more, "created": created, "command": command}
    write_json(path, content, allow_nan=False)


def _ask(console: Terminal, questions: Sequence[Question], settings: Judge, cache: Cache, client: "OpenAI") -> Verdicts:
    columns = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len({question.text for question in questions}))
        return ask_all(questions, settings, cache, lambda text: ask(client, settings, text), tick=lambda: progress.advance(task))


def _announce(console: Terminal, answers: Answers, plan: RequestEstimate, model: str) -> None:
    _name_unfinished(console, answers)
    console.say(
        f"{model}: {counted(plan.questions, 'question')} ({counted(len(answers.arms), 'arm')}, {counted(len(answers.items), 'prompt')}, "
        f"training seed {', '.join(map(str, answers.seeds))}, each pair in both orders); {counted(plan.cached, 'is', 'are')} already "
        f"answered, and {counted(plan.requests, 'request')} will be sent"
    )
    if plan.requests:
        out = f"{plan.tokens_out:,} output tokens (at most {plan.most_out:,})"
        console.say(f"estimate: {plan.tokens_in:,} input tokens, {out}. If no scores can be read from a reply, its question is asked again")


def _conclude(console: Terminal, verdicts: Verdicts, plan: RequestEstimate) -> None:
    if verdicts.unparsed:
        count = f"{len(verdicts.unparsed)} of {counted(plan.questions, 'question')}"
        console.say(f"no scores can be read from the replies to {count}; these questions are left out")
    if verdicts.refused:
        reason = next(iter(verdicts.refused.values()))
        console.say(
            f"the endpoint refused {len(verdicts.refused)} of {counted(plan.questions, 'question')} ({reason}); these questions are left "
            "out"
        )
    for why, count in Counter(verdicts.unasked.values()).items():
        console.say(
            f"{counted(count, 'question was', 'questions were')} not asked, because {why}; correct its limits, then run the same command "
            "to ask the missing questions again"
        )


def _name_unfinished(console: Terminal, answers: Answers) -> None:
    if answers.unfinished:
        console.say(f"these arms are not evaluated yet and are left out: {', '.join(answers.unfinished)}")


def _file_name(name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
    if not plain:
        raise ConfigError(f"the name `{name}` has no letter and no digit (A-Z, a-z, 0-9); choose a name that has at least one")
    return plain


def _table(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=escape(title), title_justify="left", box=None)
    scores = bool(rows) and "score" in rows[0]
    for column in (
        ("arm", "set", "score", "95 %", "n") if scores else ("arm", "against", "set", "win rate", "95 %", "wins/ties/losses", "n")
    ):
        table.add_column(column, justify="left" if column in ("arm", "against", "set") else "right")
    for row in rows:
        arm, dataset = escape(row["arm"]), escape(row["set"])
        interval = "" if row["low"] == row["high"] else f"\\[{row['low']:.2f}, {row['high']:.2f}]"
        if scores:
            table.add_row(arm, dataset, f"{row['score']:.2f}", interval, str(row["n"]))
        else:
            counts = "/".join(str(row[field]) for field in ("wins", "ties", "losses"))
            table.add_row(arm, escape(row["other"]), dataset, f"{row['win_rate']:.2f}", interval, counts, str(row["n"]))
    return table
