"""Chat templates of other people: what they refuse, leave out or lack, and the token with which they end an answer."""

from dataclasses import replace

import pytest
from jinja2 import TemplateError
from tests.byte_models import BOS, CHATML, EOS, IM_END, LLAMA2, TURNS, byte_tokenizer
from tests.chat_templates import QWEN3

from tadistill.data import chat
from tadistill.data.encoding import encode
from tadistill.data.encoding_rules import Rules
from tadistill.data.rows import Example
from tadistill.errors import DataError, ModelError

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be brief"}
HEADER = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
NO_SYSTEM = "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
MARKED = TURNS.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}") + CHATML[len(TURNS) :]


@pytest.mark.parametrize(
    ("template", "prompt", "end"),
    [
        (CHATML, HEADER, IM_END),
        (TURNS, HEADER, IM_END),  # it ignores the generation prompt, so the header comes from its answers
        (LLAMA2, "<bos>[INST] hi [/INST]", EOS),  # it needs no header
        (MARKED, HEADER, IM_END),
        ("{% if tools is not none %}{{ raise_exception('tools') }}{% endif %}" + TURNS, HEADER, IM_END),
        ("{% for m in messages %}{{ m.content }} {% endfor %}", "hi ", EOS),  # no token ends a turn
        ([{"name": "default", "template": CHATML}], HEADER, IM_END),
    ],
)
def test_prompt_and_end_of_a_template(template, prompt, end):
    tokenizer = byte_tokenizer({entry["name"]: entry["template"] for entry in template} if isinstance(template, list) else template)
    assert chat.closing(tokenizer) == end
    assert chat.render([USER], tokenizer, "row 1") == prompt
    assert chat.default_template(template) == chat.default_template(tokenizer.chat_template)


@pytest.mark.parametrize(
    "template",
    [
        {"default": MARKED, "tool_use": QWEN3},
        "{% filter trim %}" + MARKED + "{% endfilter %}{{ bos_token }}{{ documents | tojson }}{{ enable_thinking }}",
        "{{ tools | tojson(true, 2) }}{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}{{ strftime_now('%Y') }}",
    ],
)
@pytest.mark.parametrize("tools", [(), ({"type": "function", "function": {"name": "f", "description": "<é>"}},)])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_text_is_that_of_transformers(template, tools, prompt):
    call = {"type": "function", "function": {"name": "f", "arguments": {"é": [1.5e-7, None]}}}
    answer = {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call]}
    messages = [SYSTEM, USER, answer, {"role": "tool", "content": "<é>"}, {"role": "assistant", "content": " ok\ufdd0 "}]
    tokenizer, settings = byte_tokenizer(template), {"enable_thinking": False, "documents": [{"title": "t"}], "bos_token": "<b>"}
    theirs = tokenizer.apply_chat_template(messages, tools=[*tools] or None, add_generation_prompt=prompt, tokenize=False, **settings)
    assert chat.written(messages, tokenizer, "row 1", tools, settings, prompt=prompt) == theirs


@pytest.mark.parametrize(
    ("template", "messages", "error", "words"),
    [
        (
            STRICT,
            [SYSTEM, USER],
            DataError,
            r"row 7: the tokenizer's chat template refuses the turns system, user .System role not supported.;",
        ),
        (NO_SYSTEM, [SYSTEM, USER], DataError, "row 7: the tokenizer's chat template leaves out the turn of role `system`"),
        ("{% for m in messages %}{{ m.content }", [USER], ModelError, r"not valid Jinja \(line 1: .*correct `chat_template`"),
        ("{{ messages + 1 }}", [USER], DataError, "row 7: the tokenizer's chat template refuses the turns"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", [USER], DataError, "row 7: the tokenizer's chat template refuses the turns"),
        ("{{ 1 / 0 }}", [USER], DataError, "row 7: the tokenizer's chat template refuses the turns"),
    ],
)
def test_bad_templates_are_one_sentence(template, messages, error, words):
    with pytest.raises(error, match=words):
        chat.render(messages, byte_tokenizer(template), "row 7")


def test_the_template_for_tools_is_the_one_that_is_checked():
    tokenizer, tools = byte_tokenizer({"default": CHATML, "tool_use": NO_SYSTEM + "{{ tools }}"}), ({"function": {"name": "f"}},)
    with pytest.raises(DataError, match="leaves out the turn of role `system`"):
        chat.render([SYSTEM, USER], tokenizer, "row 7", tools)
    assert "be brief" in chat.render([SYSTEM, USER], tokenizer, "row 7")
    tokenizer = byte_tokenizer({"default": NO_SYSTEM, "tool_use": CHATML + "{{ tools }}"})
    assert "be brief" in chat.render([SYSTEM, USER], tokenizer, "row 7", tools)


def called(number: int = 0, **more: object) -> list:
    """A question, a call whose id and argument have this number, and the answer of the tool."""
    call = {"id": f"call{number:05}", "type": "function", "function": {"name": "weather", "arguments": {"city": f"Oslo {number}"}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [USER, answer | more, {"role": "tool", "content": f"-{number}", "tool_call_id": call["id"]}]


TOLD = "{% else %}{{ m.content }}{% if m.tool_call_id %} from {{ m.tool_call_id }}{% endif %}{% endif %};{% endfor %}"
BY_ID = (
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.id }}{{ c.function.arguments | tojson }}{% endfor %}"
    + TOLD
)
"""It writes the id of a call and not the function's name, as the template of Kimi K2 Thinking."""
NINE = "{% for m in messages if m.tool_call_id and m.tool_call_id | length != 9 %}{{ raise_exception('id') }}{% endfor %}"
KNOWN = (
    "{% for m in messages if m.tool_calls %}{% for c in m.tool_calls if c.id not in messages | map(attribute='tool_call_id') %}"
    "{{ raise_exception('no answer') }}{% endfor %}{% endfor %}"
)
"""Rules for ids in templates, such as those of Mistral and Gemma 4."""


def test_a_call_is_written_if_its_id_is():
    assert chat.render(called(), byte_tokenizer(BY_ID), "row 7") == 'hi;call00000{"city": "Oslo 0"};-0 from call00000;'
    text = called()
    text[1]["tool_calls"][0]["function"]["arguments"] = "{}"
    assert chat.render(text, byte_tokenizer(BY_ID), "row 7").startswith('hi;call00000"{}";')


@pytest.mark.parametrize("rule", ["", NINE, KNOWN])
def test_the_id_in_the_answer_of_a_tool_is_not_the_call(rule):
    left_out = rule + "{% for m in messages %}{% if m.tool_calls %}{{ m.content }}" + TOLD
    with pytest.raises(DataError, match="row 7: the tokenizer's chat template leaves out the call of `weather` of turn 2"):
        chat.render(called(), byte_tokenizer(left_out), "row 7")
    assert "call00000" in chat.render(called(), byte_tokenizer(rule + BY_ID), "row 7")


def test_rows_of_one_shape_are_checked_once(monkeypatch):
    tokenizer, run = byte_tokenizer(BY_ID.replace("{% for c", "{{ m.reasoning_content }}{% for c")), []
    monkeypatch.setattr(chat, "attempted", lambda *given, real=chat.attempted, **more: run.append(given) or real(*given, **more))
    chat.render(called(), tokenizer, "row 0")
    first = len(run)
    texts = [chat.render(called(i, reasoning_content=f"hm {i}"), tokenizer, "row 1") for i in range(5)]
    assert (first, len(run), len(set(texts))) == (4, 5, 5)  # three for the start of an answer; thinking is another shape


def test_a_row_is_named_with_the_templates_own_words():
    rows = [Example("", "", ("yo",), messages=(USER,)), Example("", "", ("yo",), messages=(SYSTEM, USER))]
    with pytest.raises(DataError, match=r"data set `d`, row 2: .*System role not supported"):
        encode(rows, byte_tokenizer(STRICT), Rules(99, 199, template="chat"), name="data set `d`")


@pytest.mark.parametrize("template", [None, {"rag": CHATML}])
def test_conversations_need_a_chat_template(template):
    row = [Example("", "", ("yo",), messages=(USER,))]
    with pytest.raises(ModelError, match="row 1: its rows are conversations, but the tokenizer has no chat template; set `tokenizer:`"):
        encode(row, byte_tokenizer(template), Rules(99, 199, template="plain"))


def test_one_template_for_tools_is_enough_for_rows_with_tools():
    tokenizer, tools = byte_tokenizer({"tool_use": QWEN3}), ({"type": "function", "function": {"name": "f"}},)
    row = Example("", "", ("yo",), messages=(USER,), tools=tools)
    assert encode([row], tokenizer, Rules(999, 1099, template="plain"))[0][0].response[-1] == IM_END
    with pytest.raises(ModelError, match="row 1: its rows are conversations, but the tokenizer has no chat template"):
        encode([replace(row, tools=())], tokenizer, Rules(999, 1099, template="plain"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ dict.keys({'a': 1}) }}",
        "{% set ns = namespace({'a': 1}, self=2) %}{% set ns.b = 3 %}{{ ns.a }}{{ ns.self }}{{ ns.b }}",
        "{{ dict(a=1) }}{{ dict([['b', 2]]) }}{{ dict.fromkeys('ab', 1) }}{{ dict['fromkeys']('ab') }}{{ dict.update }}",
    ],
)
def test_templates_reach_as_little_of_python_as_in_transformers(template):
    tokenizer = byte_tokenizer(template)
    try:
        theirs = tokenizer.apply_chat_template([USER], tokenize=False)
    except TemplateError:
        with pytest.raises(DataError, match="row 1: the tokenizer's chat template refuses the turns user"):
            chat.written([USER], tokenizer, "row 1")
    else:
        assert chat.written([USER], tokenizer, "row 1") == theirs


@pytest.mark.parametrize(
    ("example", "template", "end"),
    [
        (Example("hi", "", ("yo",)), "chat", IM_END),
        (Example("", "", ("yo",), messages=(USER,)), "alpaca", IM_END),
        (Example("hi", "", ("yo",)), "alpaca", EOS),
        (Example("hi", "", ("yo",), verbatim=True), "chat", EOS),
    ],
)
def test_a_reference_ends_as_its_prompt_asks(example, template, end):
    (encoded,) = encode([example], byte_tokenizer(), Rules(400, 500, template=template))[0]
    assert encoded.response[-1] == end
    assert len(encoded.response) == 3


@pytest.mark.parametrize("template", [CHATML, LLAMA2])
@pytest.mark.parametrize("style", ["alpaca", "plain", "chat", "verbatim", "with BOS"])
def test_bos_comes_first_and_once(template, style):
    tokenizer = byte_tokenizer(template, adds_bos=True)
    text = "<bos>hi" if style == "with BOS" else "hi"
    example = Example(text, "", ("yo",), verbatim=style in ("verbatim", "with BOS"), choices=("yo", "no"))
    template_name = style if style in ("alpaca", "plain", "chat") else "plain"
    rules = [Rules(400, 500, template=template_name, bos=bos) for bos in (False, True)]
    ((without,), (with_bos,)) = (encode([example], tokenizer, of_bos)[0] for of_bos in rules)
    wanted = 0 if style == "chat" and template == CHATML else 1  # a chat template says itself where BOS is
    assert with_bos.prompt.count(BOS) == wanted == int(with_bos.prompt[0] == BOS)
    assert with_bos.prompt[wanted:] == without.prompt[without.prompt.count(BOS) :]
    assert (with_bos.response, with_bos.choices) == (without.response, without.choices)
