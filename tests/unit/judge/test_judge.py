"""The command against an endpoint of this machine, whole and in all the ways endpoints fail."""

import json
import re
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

from tadistill.cli import app
from tadistill.config.evaluate import Judge
from tadistill.config.load import read_settings
from tadistill.errors import ConfigError, JudgeFailed, StoreError
from tadistill.judge import commands
from tadistill.judge.questions import Question
from tadistill.judge.scores import ask_all, question_key
from tadistill.models.chat_api import Refused, Reply, Unavailable, connect
from tadistill.results.sample_answers import judgements

from .fake import as_json, completion, error, serve, slow


@pytest.fixture(autouse=True)
def few_retries(monkeypatch):
    """The client's back-off is its own affair; two retries show that there are any."""
    monkeypatch.setattr(commands, "connect", lambda url, timeout: connect(url, timeout=timeout, retries=2))


def honest(number: int, text: str):
    """Prefers `fine` to the reference to `poor`, wherever they stand."""
    worth = {"fine": 9, "refe": 6, "poor": 3}
    shown = [text.split(f"[Assistant {n}'s answer]\n")[1][:4] for n in (1, 2)]
    return completion(f"{worth[shown[0]]} {worth[shown[1]]}\nBecause.")


def replies(judged):
    return (judged.study.study_dir / "judge" / "replies.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_pair_against_the_reference(judged):
    with serve(honest) as fake:
        found = judged(fake.url)
    assert len(fake.asked) == len(set(fake.asked)) == 2 * 10 * 2
    assert fake.bodies[0]["temperature"] == 0.0
    assert {(r["arm"], r["set"]): (r["wins"], r["ties"], r["losses"]) for r in found["rows"]} == {
        ("good", "dolly"): (4, 0, 0), ("good", "facts"): (6, 0, 0), ("good", "mean"): (10, 0, 0),
        ("bad", "dolly"): (0, 0, 4), ("bad", "facts"): (0, 0, 6), ("bad", "mean"): (0, 0, 10),
    }  # fmt: skip
    assert (found["mode"], found["judge"], found["arms"]) == ("pair", "judge-1", ["good", "bad"])
    assert (found["unparsed"], found["missing"], found["unfinished"]) == (0, 0, ["late"])
    assert "these arms are not evaluated yet and are left out: late" in judged.said
    assert found["command"] == "tadistill judge demo"


def test_arm_against_arm_and_scores(judged):
    with serve(honest) as fake:
        pair = judged(fake.url, arms=["good"], against="bad", sets=["dolly"], all_seeds=True)
        score = judged(fake.url, mode="score", sets=["dolly"])
    assert [(r["arm"], r["other"], r["wins"], r["n"]) for r in pair["rows"]] == [("good", "bad", 8, 8)]
    assert [(r["arm"], r["score"], r["low"], r["high"], r["n"]) for r in score["rows"]] == [
        ("good", 150, 150, 150, 4),
        ("bad", 50, 50, 50, 4),
    ]


def test_ratings_of_answers_that_the_study_no_longer_has_are_left_out(judged):
    with serve(honest) as fake:
        found = judged(fake.url, sets=["dolly"])
    plan_path = judged.study.study_dir / "plan.json"
    plan = json.loads(plan_path.read_text())
    keys = {arm["name"]: [arm["evaluate"]["10"]] for arm in plan["arms"]}
    assert found["evaluations"] == {name: keys[name] for name in ("good", "bad")}

    def shown() -> tuple[list[str], str]:
        (table,) = judgements(judged.study.read())
        return [row[0] for row in table.rows], table.note

    assert shown() == (["good against reference", "bad against reference"], "Intervals are 95 %.")
    arms = {arm["name"]: arm for arm in plan["arms"]}
    arms["bad"]["evaluate"]["10"] = "0" * 16  # trained again with other settings
    plan_path.write_text(json.dumps(plan))
    left_out = "The ratings of {} are left out, because the study no longer has the rated answers."
    assert shown() == (["good against reference"], f"Intervals are 95 %. {left_out.format('bad')}")
    plan["arms"] = [arm for arm in plan["arms"] if arm["name"] != "good"]
    plan_path.write_text(json.dumps(plan))
    assert shown() == ([], left_out.format("good and bad"))

    del found["evaluations"]  # a file of an earlier version
    (judged.study.study_dir / "judge" / "judge-pair-judge-1.json").write_text(json.dumps(found))
    rows, note = shown()
    assert rows == ["bad against reference"]
    assert left_out.format("good") in note
    assert note.endswith("An earlier version wrote this file, so the ratings may be of answers that the study no longer has.")


def test_position_bias_is_a_tie(judged):
    with serve(lambda number, text: completion("9 3")) as fake:
        found = judged(fake.url, sets=["dolly"])
    assert [(r["wins"], r["ties"], r["losses"], r["win_rate"]) for r in found["rows"]] == [(0, 4, 0, 50), (0, 4, 0, 50)]


def test_nothing_is_asked_twice_and_pairs_share_scores(judged):
    with serve(honest) as fake:
        before = judged(fake.url, limit=2)
        count = len(fake.asked)
        assert count == 16
        judged(fake.url, limit=2, mode="score")
        assert len(fake.asked) == count  # score asks the same questions
        again = judged(fake.url, limit=2)
        assert "16 are already answered, and 0 requests will be sent" in judged.said
        judged(fake.url, limit=2, temperature=0.5)
        assert len(fake.asked) == 2 * count
    assert again["rows"] == before["rows"]
    assert judged(fake.url, limit=2)["rows"] == before["rows"]  # the endpoint is gone, and not needed


@pytest.mark.slow
def test_order_of_replies_does_not_matter(judged):
    with serve(honest) as fake:
        one = judged(fake.url, jobs=1)
        (judged.study.study_dir / "judge" / "replies.jsonl").unlink()
        many = judged(fake.url, jobs=8)
    assert one["rows"] == many["rows"]


def test_unparsable_then_fine(judged):
    seen = set()

    def shy(number, text):
        first = text.split("An earlier reply")[0].strip()
        if first in seen:
            return honest(number, text)
        seen.add(first)
        return completion("Both are lovely.")

    with serve(shy) as fake:
        found = judged(fake.url, sets=["dolly"])
    assert len(fake.asked) == 32
    assert (found["unparsed"], found["rows"][0]["wins"]) == (0, 4)


def test_unparsable_for_ever_is_counted_not_guessed(judged):
    def moody(number, text):
        return completion(None) if "dolly 1 of" in text and "fine" in text else honest(number, text)

    with serve(moody) as fake:
        found = judged(fake.url, sets=["dolly"])
        asked = len(fake.asked)
        judged(fake.url, sets=["dolly"])
        assert len(fake.asked) == asked == 14 + 2 * 3
    assert len(set(fake.asked)) == asked  # a judge at temperature 0 would say the same to the same words
    assert found["unparsed"] == 2
    assert {r["arm"]: r["n"] for r in found["rows"]} == {"good": 3, "bad": 4}
    assert "no scores can be read from the replies to 2 of 16 questions" in judged.said


def test_429_then_fine(judged):
    def busy(number, text):
        return error(429, "slow down", retry_after="0.01") if number % 3 == 0 else honest(number, text)

    with serve(busy) as fake:
        found = judged(fake.url, sets=["dolly"], jobs=1)
    assert found["rows"][0]["wins"] == 4


def test_429_half_way_keeps_what_is_answered(judged):
    def spent(number, text):
        return honest(number, text) if number < 7 else error(429, "quota", retry_after="0.01")

    with serve(spent) as fake, pytest.raises(JudgeFailed) as caught:
        judged(fake.url, sets=["dolly"], jobs=2)
    assert "(429)" in str(caught.value)
    assert "7 of 16 questions are answered and saved, 9 are missing; run the same command to continue" in str(caught.value)
    assert len(replies(judged)) == 7
    assert not list((judged.study.study_dir / "judge").glob("judge-*.json"))
    with serve(honest) as fake:
        found = judged(fake.url, sets=["dolly"])
    assert len(fake.asked) == 9
    assert found["rows"][0]["wins"] == 4


def test_retry_after_is_respected(judged):
    with serve(lambda number, text: error(429, "later", retry_after="9999")) as fake, pytest.raises(JudgeFailed, match="a pause of 9999 s"):
        judged(fake.url, jobs=1)
    assert len(fake.asked) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {"content-type": "text/html"}, b"<html>welcome</html>"), "not a chat completion"),
        ((200, {"content-type": "application/json"}, b"{broken"), "not a chat completion"),
        ((200, {"content-type": "application/json"}, b""), "not a chat completion"),
        (as_json(None), "not a chat completion"),
        (as_json({"choices": None}), "not a chat completion"),
        (as_json({"choices": [None]}), "not a chat completion"),
        (as_json({"choices": [{"message": "8 5"}]}), "not a chat completion"),
        ((200, {"content-type": "application/json"}, b"[1, 2]"), "not a chat completion"),
        (as_json({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []}), "contains no answer"),
        (as_json({"hello": "world"}), "not a chat completion"),
        (error(404, "no model judge-1"), "does not know the model or the path"),
        (error(403, "not for you"), "forbids"),
        (error(401, "bad key"), "does not accept the key"),
        (error(400, "temperature is out of range"), "has refused all questions so far"),
        ((503, {"content-type": "text/html", "retry-after": "0.01"}, b"<html>down</html>"), "503"),
    ],
)
def test_faults_are_one_sentence(judged, answer, message):
    with serve(lambda number, text: answer) as fake, pytest.raises(JudgeFailed, match=message) as caught:
        judged(fake.url, sets=["dolly"])
    assert "0 of 16 questions are answered and saved, 16 are missing" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refused_question_does_not_stop_the_others(judged):
    def picky(number, text):
        return error(400, "too long") if "dolly 1 of" in text and "fine" in text else honest(number, text)

    with serve(picky) as fake:
        found = judged(fake.url, sets=["dolly"], jobs=1)
    assert (found["missing"], found["unparsed"]) == (2, 0)
    assert {r["arm"]: r["n"] for r in found["rows"]} == {"good": 3, "bad": 4}
    assert "refused 2 of 16 questions (it answers 400 (too long))" in " ".join(judged.said.split())


def test_a_refused_first_prompt_of_all_arms_does_not_stop_the_others(judged):
    with serve(lambda number, text: error(400, "filtered") if "reference 0" in text else honest(number, text)) as fake:
        found = judged(fake.url, sets=["dolly"], jobs=1)
        assert (found["missing"], {r["arm"]: r["n"] for r in found["rows"]}) == (4, {"good": 3, "bad": 3})
        assert judged(fake.url, sets=["dolly"], jobs=1)["rows"] == found["rows"]  # the same command asks only the refused ones again
    assert len(fake.asked) == 16 + 4


def test_first_prompts_that_are_all_refused_do_not_stop_the_others(judged):
    """A filter, or a first set of long prompts. The command failed, however often it was repeated."""
    filtered = re.compile("dolly [0-3] of|facts [0-2] of")
    with serve(lambda number, text: error(400, "content_filter") if filtered.search(text) else honest(number, text)) as fake:
        found = judged(fake.url, jobs=1)
    assert (found["missing"], {(r["arm"], r["set"]): r["n"] for r in found["rows"]}) == (28, {("good", "facts"): 3, ("bad", "facts"): 3})


class Memory(dict):
    """Replies that are kept in memory."""

    put = dict.__setitem__


def remembered(reply: str, questions) -> Memory:
    """Return the memory of an earlier run that got this reply to each of these questions."""
    settings = Judge(model="j", base_url="http://j")
    return Memory({question_key(settings, text): Reply(reply, 1, 1) for text in questions})


def ask_about(sizes, refused, *, jobs=1, memory=None, questions=2, seconds=0.0, reply="8 5"):
    """Ask about sets of prompts, and return the verdicts, what was sent, and the number of complete prompts.

    `refused(set, index, question)` says which questions are refused. All reminders are refused.
    """
    sent = []

    def answer(text: str) -> Reply:
        sent.append(text)
        name, index, number, *reminder = text.split()
        if reminder or refused(name, int(index), int(number)):
            raise Refused("it answers 400 (content_filter)")
        time.sleep(seconds)
        return Reply(reply, 1, 1)

    asked = [
        Question(name, i, 0, "a", "b", f"{name} {i} {n}") for name, size in sizes.items() for i in range(size) for n in range(questions)
    ]
    settings = Judge(model="j", base_url="http://j", jobs=jobs)
    found = ask_all(asked, settings, Memory() if memory is None else memory, answer)
    complete = sum(all(f"{name} {i} {n}" in found.scores for n in range(questions)) for name, size in sizes.items() for i in range(size))
    return found, sent, complete


@pytest.mark.parametrize("refused", [15, 25, 40, 80])
def test_a_filter_that_refuses_the_first_prompts_of_many_does_not_stop_the_others(refused):
    """None of the other prompts was complete, however often the command was repeated."""
    memory = Memory()
    for _ in range(2):
        found, _, complete = ask_about({"dolly": 100}, lambda name, index, number: index < refused, memory=memory)
        assert (complete, len(found.refused), found.unasked) == (100 - refused, 2 * refused, {})


@pytest.mark.parametrize("prompts", [50, 100])
def test_a_set_that_is_refused_at_once_does_not_stop_one_that_is_answered_slowly(prompts):
    """Ten refusals came before the first answer, and ended the command."""
    found, _, complete = ask_about({"a": prompts, "b": 20}, lambda name, index, number: name == "a", jobs=8, seconds=0.01)
    assert (complete, len(found.scores)) == (20, 40)


def test_refusals_that_come_before_slow_answers_do_not_close_a_set():
    found, _, complete = ask_about({"a": 300}, lambda name, index, number: index % 5 > 0, jobs=32, seconds=0.02)
    assert (complete, found.unasked) == (60, {})


def test_a_small_set_is_among_the_first_questions():
    """Ten prompts that were spread over all prompts were of the large set."""
    found, _, complete = ask_about({"large": 500, "small": 40}, lambda name, index, number: name == "large")
    assert complete == 40
    assert {text.split()[0] for text in found.unasked} == {"large"}


@pytest.mark.parametrize(("prompts", "arms"), [(1, 2), (100, 2), (120, 12)])
def test_arms_whose_answers_are_refused_do_not_stop_the_last_one(prompts, arms):
    refused = 2 * (arms - 1)
    found, sent, _ = ask_about({"dolly": prompts}, lambda name, index, number: number < refused, questions=2 * arms)
    assert (len(found.scores), len(found.refused)) == (2 * prompts, refused * prompts)
    assert len(sent) == len(set(sent)) == 2 * arms * prompts


def test_the_first_questions_about_each_set_are_about_several_arms():
    """With four sets and four questions about each prompt, the first questions about a set had the same arm and order."""
    sent = []
    with pytest.raises(JudgeFailed, match="it has refused all questions so far"):
        ask_about(dict.fromkeys("abcd", 50), lambda name, index, number: sent.append((name, number)) or True, questions=4)
    assert set(sent) == {(name, number) for name in "abcd" for number in range(4)}


def test_refused_reminders_do_not_close_a_set():
    """The endpoint answers each question, but without scores, and refuses the longer text."""
    found, _, _ = ask_about({"dolly": 300}, lambda name, index, number: False, reply="Both are lovely.")
    assert (len(found.refused), found.unasked) == (600, {})


def test_an_interrupted_run_behind_many_filtered_prompts_asks_the_others():
    memory, left = Memory(), 200

    def refused(name, index, number):
        nonlocal left
        left -= 1
        if left < 0:
            raise Unavailable("it answers 429")
        return index % 5 > 0

    with pytest.raises(JudgeFailed, match="the endpoint failed: it answers 429"):
        ask_about({"dolly": 300}, refused, memory=memory)
    found, _, complete = ask_about({"dolly": 300}, lambda name, index, number: index % 5 > 0, memory=memory)
    assert (complete, found.unasked) == (60, {})


def test_saved_replies_show_that_the_endpoint_does_not_refuse_everything(judged):
    with serve(honest) as fake:
        judged(fake.url, sets=["facts"], limit=1)
    with serve(lambda number, text: error(400, "filtered")) as fake:
        found = judged(fake.url, sets=["facts"], jobs=1)
        assert (found["missing"], {r["arm"]: r["n"] for r in found["rows"]}) == (20, {"good": 1, "bad": 1})
        with pytest.raises(JudgeFailed, match=r"has refused all questions so far, .*0 of 16 questions are answered"):
            judged(fake.url, sets=["dolly"], jobs=1)
        assert len(fake.asked) == 20 + 16  # the first questions are about fewer prompts
        with pytest.raises(JudgeFailed, match=r"has refused all questions so far, .*0 of 4 questions are answered"):
            judged(fake.url, sets=["dolly"], limit=1)


@pytest.mark.parametrize(("prompts", "requests"), [(9, 18), (30, 50), (300, 50)])
def test_an_endpoint_that_refuses_everything_is_asked_few_questions(prompts, requests):
    sent = []
    with pytest.raises(JudgeFailed, match="it has refused all questions so far"):
        ask_about({"dolly": prompts}, lambda name, index, number: sent.append(index) or True)
    assert (len(sent), len(set(sent))) == (requests, min(prompts, requests))


def test_the_number_of_arms_does_not_change_how_often_an_endpoint_that_refuses_everything_is_asked():
    """It was asked all questions about 50 prompts of a set, and all questions about smaller sets."""
    memory = remembered("8 5", ["a 0 0"])
    _, sent, _ = ask_about({"a": 100, "b": 20}, lambda name, index, number: True, memory=memory, questions=24)
    assert len(sent) <= 2 * 200 + 20


@pytest.mark.parametrize(
    ("prompts", "questions", "answers", "whole"), [(150, 8, 640, 77), (80, 6, 400, 64), (99, 24, 2000, 82), (49, 24, 1100, 45)]
)
def test_an_endpoint_that_begins_to_refuse_everything_leaves_complete_prompts(prompts, questions, answers, whole):
    """All prompts of a group stayed incomplete until the group was done."""
    left = answers

    def refused(name, index, number):
        nonlocal left
        left -= 1
        return left < 0

    found, sent, complete = ask_about({"dolly": prompts}, refused, questions=questions)
    assert (complete, len(found.scores)) == (whole, answers)
    assert len(found.refused) <= 200  # it was asked all questions about the group, up to 99 prompts
    assert len(sent) <= answers + 201
    if prompts == 99:  # in the others, the set itself ends at the same time, or before
        assert {*found.unasked.values()} == {"the endpoint refuses everything, also a question that it had answered"}


def test_an_endpoint_that_answered_an_earlier_run_and_refuses_everything_now_is_asked_few_questions():
    """It was asked all 1,100 other questions, because a question that it had answered was known only after an answer of this run."""
    memory = remembered("8 5", (f"d {i} 0" for i in range(100)))
    found, sent, _ = ask_about({"d": 100}, lambda name, index, number: True, memory=memory, questions=12)
    assert (len(found.scores), len(found.refused), len(sent)) == (100, 200, 201)
    assert {*found.unasked.values()} == {"the endpoint refuses everything, also a question that it had answered"}


def test_an_endpoint_that_is_gone_when_a_question_is_asked_again_is_a_failure():
    left = 100

    def refused(name, index, number):
        nonlocal left
        left -= 1
        if left < -200:
            raise Unavailable("it cannot be reached")
        return left < 0

    with pytest.raises(JudgeFailed, match="the endpoint failed: it cannot be reached; 100 of 1200 questions are answered and saved"):
        ask_about({"dolly": 100}, refused, questions=12)


def test_arms_that_are_refused_in_a_row_are_asked_if_another_question_is_still_answered():
    found, sent, complete = ask_about({"dolly": 60}, lambda name, index, number: index % 10 > 0, questions=60)
    assert (complete, found.unasked) == (6, {})
    assert len(sent) - len(set(sent)) < 3600 / 200  # each is one request more


def test_reminders_of_an_earlier_run_that_are_refused_close_a_set():
    memory = remembered("Lovely.", (f"d {i} {n}" for i in range(200) for n in range(24)))
    _, sent, _ = ask_about({"d": 200}, lambda name, index, number: True, memory=memory, questions=24)
    assert len(sent) == 200


def test_an_endpoint_that_begins_to_refuse_everything_is_asked_no_more():
    memory = remembered("8 5", ["a 0 0", "a 1 0", "b 0 0"])
    found, sent, _ = ask_about({"a": 900, "b": 900}, lambda name, index, number: True, memory=memory)
    assert len(sent) <= 2 * (200 + 3)
    assert (len(found.scores), len(found.refused) + len(found.unasked)) == (3, 3600 - 3)


def test_a_set_that_the_endpoint_refuses_keeps_no_summary_from_being_written(judged):
    """All its prompts may be too long for the judge. The command failed, however often it was repeated."""
    with serve(lambda number, text: error(400, "too long") if "facts" in text else honest(number, text)) as fake:
        alone = judged(fake.url, sets=["dolly"], jobs=1)
        for _ in range(2):
            both = judged(fake.url, jobs=1)
            assert (both["rows"], both["missing"]) == (alone["rows"], 24)


def test_sets_beside_one_that_is_refused_are_asked():
    found, _, complete = ask_about(dict.fromkeys(("short", "long", "last"), 140), lambda name, index, number: name == "long")
    assert (complete, len(found.refused), len(found.unasked)) == (280, 200, 80)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (completion("Both are lovely."), "no scores can be read from the replies to 1 of 2 questions"),
        (error(400, "filtered"), "the endpoint refused 1 of 2 questions"),
    ],
)
def test_too_few_scores_for_a_summary_are_a_failure(judged, second, said):
    """It wrote a summary without a row over the one of an earlier run."""
    with serve(honest) as fake:
        before = judged(fake.url, sets=["dolly"])
    failed = pytest.raises(JudgeFailed, match="no arm has a prompt with scores in both orders and for every training seed, so there is no")
    with serve(lambda number, text: second if number else honest(number, text)) as fake, failed:
        judged(fake.url, sets=["facts"], limit=1, arms=["good"], jobs=1)
    assert said in judged.said
    assert json.loads((judged.study.study_dir / "judge" / "judge-pair-judge-1.json").read_text()) == before


def test_questions_that_were_not_asked_are_counted(judged, monkeypatch):
    monkeypatch.setattr("tadistill.judge.scores._REFUSALS", 2)
    monkeypatch.setattr("tadistill.judge.scores._REFUSALS_IN_A_ROW", 4)
    with serve(lambda number, text: honest(number, text) if number < 8 else error(400, "filtered")) as fake:
        assert judged(fake.url, sets=["dolly"], jobs=1)["missing"] == 8  # the first two prompts are answered
    text = "4 questions were not asked, because the endpoint refused too many questions of a test set in a row; correct its limits"
    assert text in " ".join(judged.said.split())


def test_newer_name_of_the_token_limit(judged):
    def modern(number, text):
        if "max_tokens" in fake.bodies[number]:
            return error(400, "Unsupported parameter: use 'max_completion_tokens' instead.")
        return honest(number, text)

    with serve(modern) as fake:
        found = judged(fake.url, sets=["dolly"], jobs=1)
    assert found["rows"][0]["wins"] == 4


def test_timeout(judged):
    with serve(lambda number, text: slow(0.4)) as fake, pytest.raises(JudgeFailed, match="did not answer in time"):
        judged(fake.url, sets=["dolly"], jobs=1, timeout=0.1)


def test_nobody_there(judged):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(JudgeFailed, match="cannot be reached"):
            judged(url)


def test_wrong_key_is_found_before_anything_is_asked(judged):
    with serve(honest) as fake:
        fake.models = error(401, "bad key")
        with pytest.raises(JudgeFailed, match=r"OPENAI_API_KEY \(401\); 0 of 40 questions"):
            judged(fake.url)
        fake.models = error(404, "no such path")
        judged(fake.url, limit=1)
    assert len(fake.asked) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"max_tokens": 0}, "`max_tokens` is 0"),
        ({"jobs": 0}, "`jobs` is 0"),
        ({"timeout": float("nan")}, "`timeout` is nan"),
        ({"limit": 0}, "`limit` is 0"),
        ({"mode": "rank"}, "`mode` is 'rank': write 'pair' or 'score'"),
        ({"model": " "}, "`model` is ' '"),
        ({"timout": 3}, "`timout` is not a known key; did you mean `timeout`?"),
        ({"against": "nobody"}, "`nobody` is neither an arm"),
        ({"name": "//"}, "the name `//`"),
    ],
)
def test_wrong_input_asks_nothing(judged, options, message):
    with serve(honest) as fake, pytest.raises(ConfigError, match=message):
        judged(fake.url, **options)
    assert fake.asked == []


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host/v1", "http://", "http://host:port/v1", "http://host:99999/v1"])
def test_wrong_address(judged, url):
    with pytest.raises(ConfigError, match="write it in the form"):
        judged(url)


def test_public_endpoint_needs_a_key(judged):
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        judged("https://api.openai.com/v1")


def test_without_the_package(judged, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'tadistill\[judge\]'"):
        judged("http://127.0.0.1:1/v1")


def test_no_such_study(judged):
    judged.study.study_dir.rename(judged.study.study_dir.with_name("other"))
    with pytest.raises(ConfigError, match="no study `demo`"):
        judged("http://127.0.0.1:1/v1")


def test_says_what_it_costs_and_asks_first(judged):
    with serve(honest) as fake:
        assert judged(fake.url, yes=False) is None
        assert fake.asked == []
        tokens = int(judged.said.split("estimate: ")[1].split(" input tokens")[0].replace(",", ""))
        assert f"{40 * 50:,} output tokens (at most {40 * 256:,})" in judged.said
        judged(fake.url)
    assert tokens == sum(map(len, fake.asked)) // 4
    assert tokens > 100


def test_set_gives_every_other_setting_and_unknown_keys_fail():
    given = {"model": "judge-1", "arms": ["good"], "limit": None}
    found = read_settings(Judge, given, ["all_seeds=true", "temperature=0.5", "limit=3"], source="tadistill judge")
    assert (found.all_seeds, found.temperature, found.limit, found.arms, found.jobs) == (True, 0.5, 3, ("good",), 4)
    with pytest.raises(ConfigError, match=r"tadistill judge: `temprature` is not a known key; did you mean `temperature`\?"):
        read_settings(Judge, given, ["temprature=1"], source="tadistill judge")
    with pytest.raises(ConfigError, match="override `jobs` has no `=`"):
        read_settings(Judge, given, ["jobs"], source="tadistill judge")


def test_the_command_line_passes_options_and_settings_on(judged, tmp_path):
    root = judged.study.study_dir.parent
    with serve(honest) as fake:
        options = [
            "--model",
            "judge-1",
            "--base-url",
            fake.url,
            "--on",
            "dolly",
            "--limit",
            "2",
            "--arm",
            "good",
            "--yes",
            "--runs",
            str(root),
        ]
        done = CliRunner().invoke(app, ["judge", "demo", *options, "--set", "all_seeds=true", "--set", "name=mine"])
        assert done.exit_code == 0, done.output
    assert len(fake.asked) == 2 * 2 * 2
    found = json.loads((root / "demo" / "judge" / "judge-mine.json").read_text())
    assert (found["arms"], found["training_seeds"]) == (["good"], [10, 20])
    wrong = CliRunner().invoke(app, ["judge", "demo", *options, "--set", "seeds=all"])
    assert "`seeds` is not a known key; did you mean `all_seeds`?" in str(wrong.exception)


def test_several_threads_keep_what_is_on_its_way(judged):
    """One thread meets the failure while three wait for good replies: those are kept too."""
    gate = threading.Barrier(4)

    def late(number, text):
        if number < 4:
            gate.wait(timeout=10)
        if number == 0:
            return error(404, "gone")
        time.sleep(0.3)
        return honest(number, text)

    with serve(late) as fake, pytest.raises(JudgeFailed, match="3 of 16 questions are answered and saved, 13 are missing"):
        judged(fake.url, sets=["dolly"], jobs=4)


def test_half_a_line_is_dropped_and_asked_again(judged):
    with serve(honest) as fake:
        judged(fake.url, sets=["dolly"])
        path = judged.study.study_dir / "judge" / "replies.jsonl"
        whole = path.read_text()
        path.write_text(whole[:-20])
        judged(fake.url, sets=["dolly"])
        assert len(fake.asked) == 17
        assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())
        path.write_text("nonsense\n" + whole)
        with pytest.raises(StoreError, match="line 1 is not a reply"):
            judged(fake.url)


def test_two_at_once_are_refused(judged):
    def during(number, text):
        if number == 0:
            with ThreadPoolExecutor(1) as pool, pytest.raises(StoreError, match="another process"):
                pool.submit(type(judged)(judged.study), fake.url).result()
        return honest(number, text)

    with serve(during) as fake:
        assert judged(fake.url, limit=1, jobs=1)["rows"][0]["wins"] == 1
    assert all(json.loads(line)["out"] == 5 for line in replies(judged))
