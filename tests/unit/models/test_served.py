"""Served teachers against a small server: what travels, and one sentence for every way in which a server fails."""

import json
import re
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from tests.byte_models import byte_model, byte_tokenizer, save

from tadistill.config.remote import Serve
from tadistill.config.sampling import TopKSignal
from tadistill.constants import LOG_ZERO
from tadistill.data.batch import Sequence, collate
from tadistill.errors import ConfigError, ModelError, ServerFailed
from tadistill.models import served_model, served_model_requests
from tadistill.models.served_model import check_servers, fetch_config, names_of, read_head, served_teacher
from tadistill.models.served_model_requests import Servers
from tadistill.models.teachers import teacher_of, top_k_target
from tadistill.objectives import top_k
from tadistill.train.monitoring import Meter

from .conftest import random_model, word_tokenizer
from .served import as_json, refusal, serving

ROWS = [Sequence((50, 60), (70, 80, 90, 0)), Sequence((40,), (110, 0)), Sequence((), (17, 18, 19, 20, 0)), Sequence((9, 8, 7), (1,))]
BATCH = collate(ROWS, pad=0)
VOCAB = 262


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory with a tiny model, and a server of it. Requests are repeated at once."""
    directory = save(tmp_path_factory.mktemp("teacher"), byte_model(seed=3), byte_tokenizer())
    with serving(byte_model(seed=3), byte_tokenizer(), directory) as server:
        server.directory = directory
        yield server


@pytest.fixture(autouse=True)
def as_new(here, monkeypatch):
    monkeypatch.setattr(served_model_requests, "PAUSES", (0.0, 0.0))
    here.fault, here.name, here.longest = (lambda number, path, body, reply: reply), here.directory, 128
    here.asked.clear()
    here.keys.clear()


def connected(here, gives="hidden", *, dtype=torch.float32, **settings):
    serve = Serve(at=here.at, gives=gives, **settings)
    where = {"load": here.directory, "revision": "main", "device": torch.device("cpu")}
    return served_teacher(Servers(here.directory, serve), byte_tokenizer(), dtype=dtype, **where)


def texts(here, path):
    found = sorted(tuple(*(body.get("input") or body["prompt"])) for asked, body in here.asked if asked == path)
    return [ids for ids in found if ids != (130, VOCAB - 1)]  # without the probe


def test_hidden_states_are_those_of_the_model_and_only_the_needed_tokens_travel(here):
    teacher, local = connected(here), teacher_of(byte_model(seed=3))
    found, log_p = teacher.scored(BATCH, VOCAB)
    expected, local_log_p = local.scored(BATCH, VOCAB)
    torch.testing.assert_close(found.states, expected.states, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(log_p, local_log_p, atol=1e-5, rtol=1e-4)
    assert torch.equal(found.head.weight, expected.head.weight)
    assert texts(here, "/pooling") == [(9, 8, 7), (17, 18, 19, 20), (40, 110), (50, 60, 70, 80, 90)]
    assert teacher.width == VOCAB


@pytest.mark.parametrize("gives", ["hidden", "top_k"])
def test_the_meter_counts_each_logit_once(here, gives):
    def counted(teacher):
        meter = Meter(byte_model(seed=4), (teacher,))
        with meter.counting():
            teacher.scored(BATCH, VOCAB)
        return meter.state()["parts"]["training/teacher"]

    served, local = (counted(teacher) for teacher in (connected(here, gives), teacher_of(byte_model(seed=3))))
    assert served["heads"] == local["heads"] == int(BATCH.mask_BT.sum())


def test_a_stage_does_not_start_with_a_server_of_shorter_texts(here):
    where = {"load": here.directory, "revision": "main", "device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.raises(ServerFailed, match="takes at most 128 tokens, but a text of the recipe may have 129"):
        served_teacher(Servers(here.directory, Serve(at=here.at)), byte_tokenizer(), longest=129, **where)


def test_half_precision_travels_as_half_precision(here):
    teacher = connected(here, dtype=torch.bfloat16)
    assert teacher.target(BATCH).states.dtype == teacher.head.weight.dtype == torch.bfloat16
    assert here.asked[-1][1]["embed_dtype"] == "bfloat16"


@pytest.mark.parametrize("tail", ["lump", "drop"])
def test_top_k_is_that_of_the_model(here, tail):
    found, log_p = connected(here, "top_k", k=5, tail=tail).scored(BATCH, VOCAB)
    local, expected_log_p = teacher_of(byte_model(seed=3)).scored(BATCH, VOCAB)
    expected = top_k(local.head.logits(local.states), 5, tail=tail)
    order = found.log_probs.argsort(-1, descending=True)
    assert torch.equal(found.ids.gather(-1, order), expected.ids)
    torch.testing.assert_close(found.log_probs.gather(-1, order), expected.log_probs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(log_p, expected_log_p, atol=1e-5, rtol=1e-4)
    if tail == "drop":
        assert found.tail is None
    else:
        torch.testing.assert_close(found.tail, expected.tail, atol=1e-4, rtol=1e-4)
    assert texts(here, "/v1/completions") == [(9, 8, 7, 1), (17, 18, 19, 20, 0), (40, 110, 0), (50, 60, 70, 80, 90, 0)]


def test_tokens_are_in_order_of_their_probability_although_a_server_sends_the_text_first():
    from tadistill.models.teachers import _Scores

    scores = _Scores(np.array([[7, 3, 5]]), np.log([[0.1, 0.6, 0.2]]), np.log([0.1]))
    found = top_k_target(scores, TopKSignal(k=3), 9)
    assert found.ids.tolist() == [[3, 5, 7]]
    assert found.first(2).ids.tolist() == [[3, 5]]
    torch.testing.assert_close(found.first(2).tail.exp(), torch.tensor([0.2]))


def test_a_token_outside_the_vocabulary_is_counted_with_the_tail():
    from tadistill.models.teachers import _Scores

    scores = _Scores(np.array([[0, 9, 2]]), np.log([[0.5, 0.3, 0.1]]), np.zeros(1))
    found = top_k_target(scores, TopKSignal(k=3), 5)
    assert found.ids.tolist() == [[0, 2, 1]]
    assert found.log_probs[0, 2] == LOG_ZERO
    assert float(found.tail.exp()) == pytest.approx(0.4)


def test_tokens_that_a_student_lacks_are_counted_with_the_tail(here):
    teacher = connected(here, "top_k", k=90)
    teacher.compare(200)
    found, everything = teacher.target(BATCH), connected(here, "top_k", k=90).target(BATCH)
    assert int(everything.ids.max()) > 200
    assert int(found.ids.max()) < 200
    known = torch.where(everything.ids < 200, everything.log_probs.exp(), 0).sum(-1)
    torch.testing.assert_close(found.tail.exp(), 1 - known, atol=1e-5, rtol=0)


def test_a_target_has_at_most_the_tokens_that_are_compared():
    from tadistill.models.teachers import _Scores

    scores = _Scores(np.array([[8, 1, 2, 0, 9]]), np.log([[0.4, 0.3, 0.1, 0.1, 0.05]]), np.zeros(1))
    found = top_k_target(scores, TopKSignal(k=5), 3)
    assert sorted(found.ids[0].tolist()) == [0, 1, 2]
    assert found.ids[0, 0] == 1
    assert float(found.tail.exp()) == pytest.approx(0.5)


@pytest.mark.parametrize("takes", [64, 128])
def test_a_teacher_reads_as_much_as_its_model_whatever_its_server_takes(here, takes):
    """A server that takes less was asked for the beginning of a text, and the stage had the key of the whole text."""
    positions, here.longest = fetch_config(here.directory, "main").max_position_embeddings, takes
    found = connected(here).longest, connected(here, "top_k").longest, teacher_of(byte_model(seed=3)).longest
    assert found == (positions, positions - 1, positions)


def test_a_server_needs_no_more_tokens_than_its_model_has_positions(here):
    here.longest = fetch_config(here.directory, "main").max_position_embeddings
    assert [server.longest for server in checked(here, longest=4 * here.longest)] == [here.longest]
    here.longest -= 1
    with pytest.raises(ServerFailed, match=f"may have {here.longest + 1}; start"):
        checked(here, longest=4 * here.longest)


def test_a_tail_is_never_below_the_rounding_of_the_server():
    from tadistill.models.teachers import _Scores

    found = top_k_target(_Scores(np.array([[0]]), np.log([[1.0000001]]), np.zeros(1)), TopKSignal(k=1), 5)
    assert float(found.tail.exp()) == pytest.approx(2**-23)


def test_several_servers_share_the_work(here):
    with serving(byte_model(seed=3), byte_tokenizer(), here.directory) as other:
        both = threading.Barrier(2, timeout=20)

        def wait(number, path, body, reply):
            if path == "/pooling" and len(body["input"][0]) > 2:
                both.wait()  # each server has one of the two longest texts
            return reply

        teacher = served_teacher(
            Servers(here.directory, Serve(at=(here.at, other.at), requests=1)), byte_tokenizer(),
            load=here.directory, revision="main", dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
        here.fault = other.fault = wait
        batch = collate(ROWS[:1] + ROWS[2:3], pad=0)
        torch.testing.assert_close(teacher.target(batch).states, teacher_of(byte_model(seed=3)).target(batch).states, atol=1e-6, rtol=1e-4)


# --- faults that pass -------------------------------------------------------------------------------------------------------


def once(number_of_faults, make):
    """Replace the first replies after the checks."""
    left = [number_of_faults]

    def fault(number, path, body, reply):
        if left[0] and path != "/tokenize":
            left[0] -= 1
            return make(body, reply)
        return reply

    return fault


PASSING = {
    "an error": lambda body, reply: refusal(500, "out of memory"),
    "busy": lambda body, reply: refusal(429, "later"),
    "a broken connection": lambda body, reply: None,
    "half an answer": lambda body, reply: (reply[0], reply[1] | {"content-length": str(len(reply[2]))}, reply[2][: len(reply[2]) // 2]),
    "an answer for another request": lambda body, reply: (
        200,
        {"metadata": reply[1]["metadata"].replace("pooling-", "pooling-x")[:-9]},
        reply[2],
    ),
    "not a number": lambda body, reply: (200, reply[1], reply[2][:4] + b"\x00\x00\xc0\x7f" + reply[2][8:]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSING)
def test_a_request_is_sent_again_after(name, here):
    teacher = connected(here, seconds=2)
    here.fault = once(2, PASSING[name])
    expected = teacher_of(byte_model(seed=3)).target(BATCH).states
    torch.testing.assert_close(teacher.target(BATCH).states, expected, atol=1e-6, rtol=1e-4)


# --- faults that stay: one sentence each ----------------------------------------------------------------------------------------


def other_states(body, reply):
    facts = json.loads(reply[1]["metadata"])
    facts["data"][0]["shape"][0] += 1
    return 200, {"metadata": json.dumps(facts)}, reply[2]


STAYING = {
    "an error": (
        lambda body, reply: refusal(500, "out of memory"),
        r"failed, also when the request was repeated: it answers 500 \(out of memory\)",
    ),
    "a broken connection": (lambda body, reply: None, "cannot be reached, or broke the connection"),
    "states of another text": (other_states, r"the server's answer has states of shape \[\d, 32\], but the shape must be \[\d, 32\]"),
    "another request": (
        lambda body, reply: (200, {"metadata": reply[1]["metadata"].replace(body["request_id"], "f00")}, reply[2]),
        "the server's answer belongs to another request",
    ),
    "no description": (lambda body, reply: (200, {}, reply[2]), "the server's answer is not complete JSON"),
    "too few bytes": (lambda body, reply: (200, reply[1], reply[2][:-4]), r"answer has \d+ bytes of float32, but \d tokens need \d+ bytes"),
    "a refusal": (
        lambda body, reply: refusal(400, "Token id 999 is out of vocabulary"),
        r"refuses a request to /pooling \(400, Token id 999",
    ),
    "a redirection": (lambda body, reply: (307, {"location": "http://other.invalid/"}, b""), "redirections are not followed"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAYING)
def test_one_sentence_for(name, here):
    teacher, (make, message) = connected(here, seconds=2), STAYING[name]
    here.fault = lambda number, path, body, reply: make(body, reply)
    with pytest.raises(ServerFailed, match=message) as caught:
        teacher.target(BATCH)
    assert len(caught.value.problems) == 1
    assert here.at in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_sentence_for_a_slow_answer(here):
    teacher, release = connected(here, seconds=0.2), threading.Event()
    here.fault = lambda number, path, body, reply: release.wait(10) and reply
    started = time.monotonic()
    with pytest.raises(ServerFailed, match=r"failed, also when .*: it did not answer within 0\.2 seconds; raise `serve\.seconds`, lower"):
        teacher.target(BATCH)
    release.set()
    assert time.monotonic() - started < 8


OTHER = {"5": {"logprob": -1.0}, "6": {"logprob": -2.0}}
SCORES = {
    "another text": (lambda rows: [*rows[:1], OTHER, *rows[2:]], "the server's answer is about another text"),
    "a shorter text": (lambda rows: rows[:-1], "the server's answer is about another text"),
    "too few tokens": (lambda rows: [None, *(dict([*row.items()][:1]) for row in rows[1:])], "asks for the 2 most probable"),
    "nothing": (lambda rows: None, "the server's answer has no `prompt_logprobs`"),
}


@pytest.mark.parametrize("name", SCORES)
def test_one_sentence_for_scores_of(name, here):
    teacher, (change, message) = connected(here, "top_k", k=2), SCORES[name]

    def fault(number, path, body, reply):
        content = json.loads(reply[2])
        content["choices"][0]["prompt_logprobs"] = change(content["choices"][0]["prompt_logprobs"])
        return as_json(content)

    here.fault = fault
    with pytest.raises(ServerFailed, match=message):
        teacher.target(BATCH)


def test_one_sentence_for_half_an_answer_with_scores(here):
    teacher = connected(here, "top_k", k=2)
    here.fault = lambda number, path, body, reply: (200, {}, reply[2][: len(reply[2]) // 2])
    with pytest.raises(ServerFailed, match="the server's answer is not complete JSON") as caught:
        teacher.target(BATCH)
    assert len(caught.value.problems) == 1


# --- checks before work ---------------------------------------------------------------------------------------------------------


def checked(here, *, tokenizer=None, longest=0, gives="hidden", name=None):
    serve = Serve(at=here.at, gives=gives, name=name)
    names = names_of(here.directory, None, "main", serve)
    config = fetch_config(here.directory, "main")
    return check_servers(Servers(here.directory, serve, again=False), names, tokenizer or byte_tokenizer(), config, longest)


def test_a_good_server_passes(here):
    (found,) = checked(here, longest=128)
    assert (found.at, found.name, found.longest, found.same_tokens) == (here.at, here.directory, 128, True)


def test_another_model_is_refused(here):
    here.name = "org/other"
    with pytest.raises(ServerFailed, match=re.escape("runs `org/other`, but the recipe has `")) as caught:
        checked(here)
    assert str(caught.value).count("start the server") == 1
    assert "if it is the same model, set `serve.name` to its name on the server, or start the server with `tadistill serve" in str(
        caught.value
    )
    assert checked(here, name="org/other")[0].name == "org/other"


def test_https_to_a_server_without_tls_names_the_scheme(here):
    servers = Servers("org/m", Serve(at=here.at.replace("http:", "https:")), again=False)
    with pytest.raises(ServerFailed, match=r"begins with https, but it answers without TLS .*; write http:// in `serve.at`"):
        servers.get("/v1/models", lambda answer: answer)


def test_another_tokenizer_is_refused(here):
    here.tokenizer = byte_tokenizer(adds_bos=True)
    checked(here)  # no token is added to a text
    here.tokenizer = lambda text, **_: {"input_ids": [5, *byte_tokenizer()(text)["input_ids"]]}
    with pytest.raises(ServerFailed, match="has another tokenizer than the recipe: token 0 of a test sentence has the id 5 on the server"):
        checked(here)
    here.tokenizer = byte_tokenizer()


def test_a_smaller_vocabulary_is_refused(here):
    here.fault = lambda number, path, body, reply: refusal(400, "Token id 261 is out of vocabulary") if path == "/pooling" else reply
    with pytest.raises(ServerFailed, match="Token id 261 is out of vocabulary"):
        checked(here)
    assert here.asked[-1][1]["input"] == [[130, VOCAB - 1]]


def test_too_short_texts_are_refused(here):
    with pytest.raises(ServerFailed, match="128 tokens, but a text of the recipe may have 129; start it with `--max-model-len 129`"):
        checked(here, longest=129)
    with pytest.raises(ServerFailed, match="may have 129"):
        checked(here, longest=128, gives="top_k")


def test_a_server_that_cannot_give_it_is_refused(here):
    here.fault = lambda number, path, body, reply: reply if path == "/tokenize" else refusal(404, "Not Found")
    with pytest.raises(ServerFailed, match=r"cannot give `hidden` \(404\); start it with `--runner pooling`"):
        checked(here)


def test_a_server_without_scores_of_prompts_is_refused(here):
    here.fault = lambda number, path, body, reply: reply if path == "/tokenize" else as_json({"choices": [{"text": "x"}]})  # as SGLang
    with pytest.raises(ServerFailed, match="the server's answer has no `prompt_logprobs`"):
        checked(here, gives="top_k")


def test_normalised_states_are_refused(here):
    def normalised(number, path, body, reply):
        if path != "/pooling":
            return reply
        states = torch.frombuffer(bytearray(reply[2]), dtype=torch.float32).reshape(-1, 32)
        return 200, reply[1], torch.nn.functional.normalize(states, dim=-1).numpy().tobytes()

    here.fault = normalised
    with pytest.raises(ServerFailed, match="normalises the hidden states; start it with `--pooler-config"):
        checked(here)


def test_a_server_without_tokenize_passes_and_says_so(here):
    here.fault = lambda number, path, body, reply: refusal(404, "Not Found") if path == "/tokenize" else reply
    assert checked(here)[0].same_tokens is False


def test_a_stranger_is_refused(here):
    class Stranger:
        directory, at = here.directory, "http://127.0.0.1:9"

    with pytest.raises(ServerFailed, match=r"the server http://127.0.0.1:9 of `.*` failed: it cannot be reached"):
        checked(Stranger)


def test_the_key_comes_from_the_environment_and_stays_there(here, monkeypatch):
    with pytest.raises(ConfigError, match="environment variable OUR_KEY, which is not set"):
        connected(here, key="OUR_KEY")
    monkeypatch.setenv("OUR_KEY", "s3cret")
    teacher = connected(here, key="OUR_KEY")
    assert here.keys == {"Bearer s3cret"}
    here.fault = lambda number, path, body, reply: refusal(401, "Unauthorized")
    with pytest.raises(ServerFailed, match="correct the key in OUR_KEY") as caught:
        teacher.target(BATCH)
    assert "s3cret" not in str(caught.value)


# --- the head without the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_that_of_the_model(kind, tied, tmp_path):
    model = random_model(kind, tie_word_embeddings=tied)
    save(tmp_path, model, word_tokenizer())
    found, expected = read_head(str(tmp_path), "main", torch.float32), teacher_of(model).head
    assert torch.equal(found.weight, expected.weight)
    assert (found.bias, found.scale, found.softcap) == (expected.bias, expected.scale, expected.softcap)


def test_soft_caps_and_scales_are_read_from_the_configuration(tmp_path):
    model = random_model("llama")
    save(tmp_path, model, word_tokenizer())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": 30.0, "head_dim": 4}
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_types": ["full_attention"] * 4}))
    assert read_head(str(tmp_path), "main", torch.float32).softcap == 30.0


def test_a_model_without_its_head_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save(tmp_path, random_model("llama", tie_word_embeddings=False), word_tokenizer())
    left = load_file(tmp_path / "model.safetensors")
    del left["lm_head.weight"]
    save_file(left, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="do not contain its output head"):
        read_head(str(tmp_path), "main", torch.float32)


def test_of_a_model_of_the_hub_only_the_file_with_the_head_is_downloaded(tmp_path, monkeypatch):
    whole, here, downloaded = tmp_path / "whole", tmp_path / "here", []
    model = random_model("llama", tie_word_embeddings=False)
    model.save_pretrained(whole, max_shard_size="6KB")
    word_tokenizer().save_pretrained(whole)
    files = sorted(path.name for path in whole.glob("*.safetensors"))
    shutil.copytree(whole, here, ignore=shutil.ignore_patterns("*.safetensors"))

    def download(name, file, revision):
        downloaded.append((name, file, revision))
        shutil.copy(whole / file, here / file)

    monkeypatch.setattr(served_model, "_download", download)
    monkeypatch.setattr(served_model.sources, "locate", lambda *_: None)
    monkeypatch.setattr(served_model.sources, "fetch", lambda *_, weights=True: here if not weights else pytest.fail("all weights"))
    found = read_head("org/name", "main", torch.float32)
    assert torch.equal(found.weight, teacher_of(model).head.weight)
    ((name, file, revision),) = downloaded
    assert (name, revision) == ("org/name", "main")
    assert file in files
    assert len(files) > 2


@pytest.mark.parametrize(
    ("places", "message"), [(["lm_head.weight"], "does not map weights to files"), ({"lm_head.weight": "../x"}, "outside the folder")]
)
def test_a_damaged_index_is_refused_before_a_download(tmp_path, monkeypatch, places, message):
    save(tmp_path, random_model("llama", tie_word_embeddings=False), word_tokenizer())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    monkeypatch.setattr(served_model, "_download", lambda *_: pytest.fail("a download"))
    monkeypatch.setattr(served_model.sources, "locate", lambda *_: None)
    monkeypatch.setattr(served_model.sources, "fetch", lambda *_, weights=True: tmp_path if not weights else pytest.fail("all weights"))
    with pytest.raises(ModelError, match=message):
        read_head("org/name", "main", torch.float32)
