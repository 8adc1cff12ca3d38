"""The requests to a teacher behind an API, against an endpoint of this machine with the faults of real ones."""

import json
import threading
from typing import Any

import pytest
from tests.unit.judge.fake import as_json, error, serve

from tadistill.config.common import Decoding
from tadistill.config.remote import Api
from tadistill.errors import ConfigError, ServerFailed, StoreError
from tadistill.models.chat_api_replies import open_cache, read_replies
from tadistill.rollout import api_teacher as module
from tadistill.rollout.api_teacher import Asking, Pace, replies_file, requests, same_model

PROMPTS = [[{"role": "user", "content": f"Say {i}"}] for i in range(6)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "PAUSES", (0.0, 0.0))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "THE_KEY"):
        monkeypatch.delenv(name, raising=False)


def reply(number, text: str | None = "", finish="stop", model="m", **more):
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 10, "completion_tokens": 3}
    return as_json(
        {"id": f"chat-{number}", "object": "chat.completion", "created": 0, "model": model, "choices": [choice], "usage": usage} | more
    )


def honest(number, text):
    return reply(number, f"{text}: yes")


def asked(fake, path, prompts=PROMPTS, seed=1, decoding=None, **settings):
    given: Any = {"requests": 2} | settings
    api = Api(at=fake.url, model="m", seconds=20, **given)
    wanted = requests(prompts, api, decoding or Decoding(max_new_tokens=8), seed=seed)
    with open_cache(path) as cache:
        return Asking(api, cache, "`m`").all(wanted)


def test_every_answer_comes_once_and_is_kept(tmp_path):
    seen = []
    with serve(honest) as fake:
        found = asked(fake, tmp_path / "a.jsonl")
        again = asked(fake, tmp_path / "a.jsonl")
        assert [r.text for r in found] == [r.text for r in again] == [f"Say {i}: yes" for i in range(6)]
        assert len(fake.asked) == 6
        seen = [(body["temperature"], body["top_p"], body["max_tokens"], body["model"]) for body in fake.bodies]
        assert len({body["seed"] for body in fake.bodies}) == 6
        asked(fake, tmp_path / "a.jsonl", PROMPTS[2:])  # other rows, the same requests
        assert len(fake.asked) == 6
        asked(fake, tmp_path / "a.jsonl", seed=2)
        assert len(fake.asked) == 12
    assert set(seen) == {(1.0, 1.0, 8, "m")}
    assert [(r.tokens_in, r.tokens_out, r.finish) for r in again] == [(10, 3, "stop")] * 6


def test_equal_prompts_are_one_request_only_without_randomness(tmp_path):
    twice = [PROMPTS[0], PROMPTS[0]]
    with serve(lambda number, text: reply(number, f"answer {number}")) as fake:
        drawn = asked(fake, tmp_path / "a.jsonl", twice, requests=1)
        greedy = asked(fake, tmp_path / "a.jsonl", twice, decoding=Decoding(temperature=0))
        assert "seed" not in fake.bodies[-1]
    assert {r.text for r in drawn} == {"answer 0", "answer 1"}
    assert [r.text for r in greedy] == ["answer 2", "answer 2"]


def test_omitted_settings_are_not_sent_and_change_no_key(tmp_path):
    with serve(honest) as fake:
        asked(fake, tmp_path / "a.jsonl", omit=("seed", "top_p"))
        asked(fake, tmp_path / "a.jsonl")
    assert len(fake.bodies) == 6
    assert not {"seed", "top_p"} & fake.bodies[0].keys()


@pytest.mark.parametrize(
    "fault",
    [
        error(429, "slow down", retry_after="0.01"),
        error(500, "oh"),
        (200, {"content-type": "application/json"}, b'{"choices": [{"mess'),
        as_json({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []}),
        as_json({"choices": [{"message": {"content": "a"}}, {"message": {"content": "b"}}]}),
        reply(0, ""),
    ],
    ids=["429", "500", "half", "no choice", "two choices", "empty"],
)
def test_a_fault_that_passes_is_no_fault(tmp_path, fault):
    with serve(lambda number, text: fault if number == 2 else honest(number, text)) as fake:
        found = asked(fake, tmp_path / "a.jsonl")
        assert len(fake.asked) == 7
    assert [r.text for r in found] == [f"Say {i}: yes" for i in range(6)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (error(429, "quota", retry_after="0"), r"rate limit or out of quota \(429\)"),
        (error(429, "quota", retry_after="9999"), "asks for a pause of 9999 s"),
        (error(503, "down"), "answers 503"),
        (error(401, "no"), "does not accept the key in `api.key`, which is not set"),
        (error(404, "no m here"), "does not know the model or the path"),
        (as_json({}, 307, location="http://127.0.0.1:9/v1"), "redirects to http://127.0.0.1:9/v1; write the address"),
        ((200, {"content-type": "text/html"}, b"<html>"), "not a chat completion"),
        (reply(9, "hello", model="other"), "it answers as the model `other`, but the recipe has `m`"),
        (reply(9, "the same for all"), "sends exactly the same reply to two different requests"),
    ],
)
def test_a_fault_that_stays_is_one_sentence_and_what_was_paid_is_kept(tmp_path, fault, message):
    path, whole = tmp_path / "a.jsonl", 3
    with serve(lambda number, text: honest(number, text) if number < whole else fault) as fake, pytest.raises(ServerFailed) as caught:
        asked(fake, path, requests=1)
    kept = len(read_replies(path))
    text = str(caught.value)
    assert f"{kept} of 6 answers are saved, {6 - kept} are missing; run the same command to continue" in text
    assert kept in (whole, whole + 1)  # one of the equal answers belongs to its request
    assert "\n" not in text
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(text)
    with serve(honest) as fake:
        assert len(asked(fake, path)) == 6
        assert len(fake.asked) == 6 - kept


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (error(400, "too long"), r"row 3: it answers 400 \(too long\)"),
        (reply(9, "", "length"), "row 3: the answer is empty; raise `max_new_tokens`"),
        (reply(9, "I can", "content_filter"), "row 3: the answer ends by `content_filter`"),
        (reply(9, None, "tool_calls"), "row 3: the answer ends by `tool_calls`"),
        (reply(9, " "), "row 3: the answer is empty"),
    ],
)
def test_a_row_without_an_answer_does_not_stop_the_others(tmp_path, fault, message):
    path = tmp_path / "a.jsonl"
    with serve(lambda number, text: fault if text == "Say 2" else honest(number, text)) as fake:
        with pytest.raises(ServerFailed, match=message) as caught:
            asked(fake, path)
        assert "gives no usable answer to row 3 of the training set" in str(caught.value)
        assert len(read_replies(path)) == 5
        assert len(fake.asked) <= 7  # an empty answer is asked for twice


def test_rows_that_are_refused_again_do_not_stop_a_continued_run(tmp_path):
    path = tmp_path / "a.jsonl"
    with serve(honest) as fake:
        asked(fake, path, PROMPTS[:1])
    last = serve(lambda number, text: honest(number, text) if text == "Say 5" else error(400, "too long"))
    with last as fake, pytest.raises(ServerFailed, match=r"rows 2, 3, 4, 5 of the training set.*2 of 6 answers are saved"):
        asked(fake, path, requests=1)


def test_settings_that_are_refused_end_the_stage_at_once(tmp_path):
    with serve(lambda number, text: error(422, "extra field `seed`")) as fake:
        with pytest.raises(
            ServerFailed, match=r"no usable answer so far \(rows .*accept `seed`, write `omit: \[seed\]` below `api`\); 0 of 6 answers"
        ):
            asked(fake, tmp_path / "a.jsonl", requests=1)
        assert len(fake.asked) == 3
        with pytest.raises(ServerFailed, match="gives no usable answer to rows 1, 2, 3, 4, 5 and 1 more"):
            asked(fake, tmp_path / "a.jsonl", requests=1, omit=("seed",))  # `seed` is in its message, but was not sent


@pytest.mark.parametrize(
    "fault",
    [
        error(400, "This model's maximum context length is 4096 tokens"),
        error(400, "The response was filtered"),
    ],
)
def test_rows_that_are_refused_first_do_not_stop_the_others(tmp_path, fault):
    """After the first three rows, the command ended, however often it was repeated, and blamed a setting."""
    prompts = [[{"role": "user", "content": f"Say {i}"}] for i in range(60)]
    filtered = {f"Say {i}" for i in range(40)}
    with serve(lambda number, text: fault if text in filtered else honest(number, text)) as fake:
        with pytest.raises(ServerFailed, match="gives no usable answer to rows 1, 2, 3, 4, 5 and 35 more") as caught:
            asked(fake, tmp_path / "a.jsonl", prompts)
        assert "20 of 60 answers are saved" in str(caught.value)
        assert "omit" not in str(caught.value)


def test_an_api_that_refuses_every_row_is_asked_few_rows(tmp_path):
    prompts = [[{"role": "user", "content": f"Say {i}"}] for i in range(60)]
    with serve(lambda number, text: error(400, "billing hard limit reached")) as fake:
        with pytest.raises(
            ServerFailed,
            match=r"so far \(rows .* and 25 more of the .*\), because it answers 400 \(billing hard limit reached\); 0 of 60",
        ):
            asked(fake, tmp_path / "a.jsonl", prompts, requests=1)
        assert len(fake.asked) == 30


def test_a_model_that_thinks_longer_than_max_new_tokens_is_paid_for_few_answers(tmp_path):
    """Thirty cut answers without a text were paid for, and no repetition of the command can give others."""
    prompts = [[{"role": "user", "content": f"Say {i}"}] for i in range(60)]
    with serve(lambda number, text: reply(number, "", "length")) as fake:
        with pytest.raises(
            ServerFailed,
            match=r"so far \(rows [\d, ]* of the .*\), because the answer is empty; raise `max_new_tokens`; 0 of 60",
        ):
            asked(fake, tmp_path / "a.jsonl", prompts, requests=1)
        assert len(fake.asked) == 3
    later = serve(lambda number, text: reply(number, "", "length") if number > 0 else honest(number, text))
    with later as fake, pytest.raises(ServerFailed, match=r"gives no usable answer to rows .* and 54 more of the training set"):
        asked(fake, tmp_path / "a.jsonl", prompts, requests=1)


def test_a_model_that_answers_nothing_is_paid_for_few_answers(tmp_path):
    """Sixty answers without a text were paid for, as each row is asked twice. A repeated command asked the same rows."""
    prompts = [[{"role": "user", "content": f"Say {i}"}] for i in range(60)]
    with serve(lambda number, text: reply(number, "")) as fake:
        for _ in range(2):
            with pytest.raises(
                ServerFailed, match=r"so far \(rows .* and 10 more of the .*\), because the answer is empty; 0 of 60 answers"
            ):
                asked(fake, tmp_path / "a.jsonl", prompts, requests=1)
        assert len(fake.asked) == 30
        assert fake.asked[:15] != fake.asked[15:]
    later = serve(lambda number, text: reply(number, "") if number > 0 else honest(number, text))
    with later as fake, pytest.raises(ServerFailed, match=r"gives no usable answer to rows .* and 54 more of the training set"):
        asked(fake, tmp_path / "a.jsonl", prompts, requests=1)


def test_rows_with_an_empty_answer_that_come_first_do_not_stop_the_others(tmp_path):
    """After the first five rows, the command ended, however often it was repeated, and named no row."""
    prompts, empty = [[{"role": "user", "content": f"Say {i}"}] for i in range(60)], set()

    def answer(number, text):
        if number < 14:
            empty.add(text)
        return reply(number, "") if text in empty else honest(number, text)

    with serve(answer) as fake:
        with pytest.raises(ServerFailed, match=r"gives no usable answer to rows .* and 9 more .*: the answer is empty\); 46 of 60 answers"):
            asked(fake, tmp_path / "a.jsonl", prompts, requests=1)
        assert len(fake.asked) == 60 + 14  # after all others, each is asked again


@pytest.mark.parametrize("finish", ["stop", "length", "content_filter"])
def test_a_refusal_that_overtakes_an_answer_ends_nothing(tmp_path, monkeypatch, finish):
    """With parallel requests, many rows without an answer were settled before the first long answer came."""
    for name in ("_REFUSALS", "_REFUSALS_OF_A_SETTING", "_EMPTY_ROWS"):
        monkeypatch.setattr(module, name, 4)
    prompts, refused, seen = [[{"role": "user", "content": f"Say {i}"}] for i in range(12)], set(), threading.Event()

    def answer(number, text):
        if number == 0:
            seen.wait(timeout=10)
        elif number <= 7:
            refused.add(text)
        if number == 8:
            seen.set()
        return reply(number, "", finish) if text in refused else honest(number, text)

    with serve(answer) as fake, pytest.raises(ServerFailed, match=r"gives no usable answer to rows .* and 2 more .*; 5 of 12 answers"):
        asked(fake, tmp_path / "a.jsonl", prompts)


def test_a_request_without_a_reply_does_not_make_all_others_be_paid_for(tmp_path):
    prompts, go = [[{"role": "user", "content": f"Say {i}"}] for i in range(60)], threading.Event()

    def answer(number, text):
        if number == 0:
            go.wait(timeout=1)
        if number == 50:
            go.set()
        return reply(number, "")

    with serve(answer) as fake:
        with pytest.raises(ServerFailed, match=r"so far \(rows .*\), because the answer is empty; 0 of 60 answers"):
            asked(fake, tmp_path / "a.jsonl", prompts)
        assert len(fake.asked) == 31


def test_refusals_of_other_kinds_do_not_blame_a_setting(tmp_path):
    prompts = [[{"role": "user", "content": f"Say {i}"}] for i in range(60)]
    faults = [error(400, "filtered"), error(400, "filtered"), reply(2, "", "length")]
    first = serve(lambda number, text: faults[number] if number < 3 else honest(number, text))
    with first as fake, pytest.raises(ServerFailed, match=r"gives no usable answer to rows .*; 57 of 60 answers are saved"):
        asked(fake, tmp_path / "a.jsonl", prompts, requests=1)


def test_cut_answers_are_marked(tmp_path):
    with serve(lambda number, text: reply(number, text, "length" if text == "Say 1" else "stop")) as fake:
        asked(fake, tmp_path / "a.jsonl")
        found = asked(fake, tmp_path / "a.jsonl")
    assert [r.finish for r in found] == ["stop", "length", "stop", "stop", "stop", "stop"]


def test_half_a_line_of_a_killed_process_is_asked_again(tmp_path):
    path = tmp_path / "a.jsonl"
    with serve(honest) as fake:
        asked(fake, path)
        path.write_bytes(path.read_bytes()[:-9])
        assert len(asked(fake, path)) == 6
        assert len(fake.asked) == 7
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 6


def test_two_processes_pay_once(tmp_path):
    path, found = tmp_path / "a.jsonl", []

    def other():
        with open_cache(path, lambda: None) as cache:
            found.extend(Asking(api, cache, "`m`").all(wanted))

    with serve(honest) as fake:
        api = Api(at=fake.url, model="m")
        wanted = requests(PROMPTS, api, Decoding(max_new_tokens=8), seed=1)
        second = threading.Thread(target=other)
        with open_cache(path) as cache:
            second.start()
            with pytest.raises(StoreError, match="another process"), open_cache(path):
                pass
            Asking(api, cache, "`m`").all(wanted)
        second.join()
        assert len(fake.asked) == len(found) == 6


def test_a_stopped_run_keeps_the_answers_on_their_way(tmp_path):
    class Enough(Exception):
        pass

    path, begun, go = tmp_path / "a.jsonl", threading.Barrier(3), threading.Event()

    def slow(number, text):
        begun.wait(timeout=10)
        go.wait(timeout=10)
        return honest(number, text)

    def look(done):
        if begun.n_waiting == 2:
            begun.wait(timeout=10)
            go.set()
            raise Enough

    with serve(slow) as fake, open_cache(path) as cache:
        api = Api(at=fake.url, model="m", requests=2)
        wanted = requests(PROMPTS, api, Decoding(max_new_tokens=8), seed=1)
        with pytest.raises(Enough):
            Asking(api, cache, "`m`").all(wanted, look)
    assert len(fake.asked) == len(read_replies(path)) == 2


def test_the_key_is_sent_and_never_written(tmp_path, monkeypatch):
    monkeypatch.setenv("THE_KEY", "top-secret-1")
    with serve(honest) as fake:
        asked(fake, tmp_path / "a.jsonl", key="THE_KEY")
    assert "top-secret-1" not in (tmp_path / "a.jsonl").read_text()
    monkeypatch.delenv("THE_KEY")
    with serve(honest) as fake, pytest.raises(ConfigError, match="set the environment variable THE_KEY"):
        asked(fake, tmp_path / "b.jsonl", key="THE_KEY")
    with pytest.raises(ConfigError, match=r"name the environment variable with your key in `api\.key`"):
        module.client_of(Api(at="https://api.openai.com/v1", model="m"))


def test_the_pace_is_the_limit_of_all_threads():
    pace = Pace(30)
    assert [pace.delay(100.0) for _ in range(3)] == [0.0, 2.0, 4.0]
    assert pace.delay(107.0) == 0.0
    pace.hold(110.0)
    assert pace.held(107.5) == 2.5
    assert pace.held(111.0) < 0
    assert [Pace(None).delay(5.0) for _ in range(2)] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "answered", "same"),
    [
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4o", "gpt-4o-mini-2024-07-18", False),
        ("large-latest", "large-2411", True),
        ("org/Model-7B", "model-7b", True),
        ("m", "", True),
        ("m", "mm", False),
        ("m", "n", False),
    ],
)
def test_names_of_one_model(name, answered, same):
    assert same_model(name, answered) == same


def test_each_model_has_its_own_file(tmp_path):
    names = ["org/a", "org-a", "Ö", "x" * 300]
    files = [replies_file(tmp_path, name) for name in names]
    assert len(set(files)) == 4
    assert all(file.parent == tmp_path / "api" and len(file.name) < 90 for file in files)
