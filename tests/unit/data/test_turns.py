"""Several turns of a conversation: ids and loss masks beside sequences that are written by hand, for the templates of five families."""

import itertools
import json

import pytest
from tests.chat_templates import CHATML, GEMMA, LLAMA3, MISTRAL, QWEN3, chat_tokenizer

from tadistill.config import DataRef
from tadistill.data.batch import collate, references
from tadistill.data.encoding import encode
from tadistill.data.encoding_rules import Rules
from tadistill.data.rows import example
from tadistill.errors import DataError, ModelError

TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather “now”", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TALK = [("user", "Where is Oslo?"), ("assistant", "In Norway."), ("user", "Is it cold?"), ("assistant", "Yes, it is.")]


def rules(turns: str = "all", **more) -> Rules:
    return Rules(600, 900, template="chat", turns=turns, **more)  # type: ignore[arg-type]


def row(messages: list, tools: list | None = None) -> dict:
    turns = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    return {"messages": turns} | ({"tools": tools} if tools else {})


def examples(*rows: dict) -> list:
    ref = DataRef(load="d", columns={"tools": "tools"} if any("tools" in each for each in rows) else {})
    return [example({"tools": None} | each, ref, i) for i, each in enumerate(rows)]


def learnt(
    messages: list, template: str, *, family: str | None = None, tools: list | None = None, **more
) -> list[tuple[list[int], list[bool]]]:
    """The ids of a row's sequences, and for each token whether a batch counts it in the loss."""
    tokenizer, found = chat_tokenizer(template, family), []
    for sequence in references(encode(examples(row(messages, tools)), tokenizer, rules(**more))[0]):
        batch = collate([sequence], pad=0)
        found.append((batch.ids_BT[0].tolist(), [False, *batch.mask_BT[0, :-1].tolist()]))
    return found


def by_hand(tokenizer, *pieces: str) -> tuple[list[int], list[bool]]:
    """The whole text as one tokenisation. Every second piece counts, from the second one."""
    text, spans, at = "".join(pieces), [], 0
    for i, piece in enumerate(pieces):
        spans += [(at, at + len(piece))] if i % 2 else []
        at += len(piece)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return found["input_ids"], [any(start <= a and b <= end for start, end in spans) for a, b in found["offset_mapping"]]


def runs(tokenizer, ids: list[int], counted: list) -> list[str]:
    """The text of each run of tokens that count."""
    groups = itertools.groupby(zip(ids, counted, strict=True), key=lambda pair: bool(pair[1]))
    return [tokenizer.decode([i for i, _ in group]) for counts, group in groups if counts]


def qwen(*pieces: str) -> tuple[list[int], list[bool]]:
    return by_hand(chat_tokenizer(QWEN3), *pieces)


@pytest.mark.parametrize("role", ["bot", "tool", "developer", "observation"])
def test_unusual_roles_are_counted_unless_the_template_names_them(role):
    template = CHATML + "{# 'observation' #}"
    talk = examples(row([TALK[0], ("assistant", "Yes."), (role, "12"), TALK[1]]))
    counts = encode(talk, chat_tokenizer(template, CHATML), rules("answer"))[1]
    assert counts.roles == (role == "bot")
    assert ("1 with a message of an unusual role" in counts.text) == (role == "bot")


SYSTEM = ("system", "Be brief.")
IM = "<|im_end|>\n<|im_start|>"
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n".format


@pytest.mark.parametrize(
    ("template", "messages", "pieces"),
    [
        (
            CHATML,
            [SYSTEM, *TALK],
            [f"<|im_start|>system\nBe brief.{IM}user\nWhere is Oslo?{IM}assistant\n", "In Norway.<|im_end|>",
             "\n<|im_start|>user\nIs it cold?" + IM + "assistant\n", "Yes, it is.<|im_end|>"],
        ),
        (
            LLAMA3,
            [SYSTEM, *TALK[:3], ("assistant", " Yes, it is. ")],
            ["<|begin_of_text|>" + HEAD("system") + "Be brief.<|eot_id|>" + HEAD("user") + "Where is Oslo?<|eot_id|>" + HEAD("assistant"),
             "In Norway.<|eot_id|>", HEAD("user") + "Is it cold?<|eot_id|>" + HEAD("assistant"), "Yes, it is.<|eot_id|>"],
        ),
        (
            GEMMA,
            TALK,
            ["<bos><start_of_turn>user\nWhere is Oslo?<end_of_turn>\n<start_of_turn>model\n", "In Norway.<end_of_turn>",
             "\n<start_of_turn>user\nIs it cold?<end_of_turn>\n<start_of_turn>model\n", "Yes, it is.<end_of_turn>"],
        ),
        (
            MISTRAL,
            TALK,
            ["<s>[INST] Where is Oslo? [/INST]", "In Norway.</s>", "[INST] Is it cold? [/INST]", "Yes, it is.</s>"],
        ),
    ],
)  # fmt: skip
def test_all_turns_are_one_sequence(template, messages, pieces):
    tokenizer = chat_tokenizer(template)
    (found,) = learnt(messages, template)
    assert found == by_hand(tokenizer, *pieces)
    ids, counted = found
    end = tokenizer(pieces[1], add_special_tokens=False)["input_ids"][-1]
    assert [counted[i] for i, token in enumerate(ids) if token == end].count(True) == 2  # once a turn
    assert tokenizer.bos_token_id is None or ids.count(tokenizer.bos_token_id) == 1
    (last,) = learnt(messages, template, turns="last")
    assert last == by_hand(tokenizer, "".join(pieces[:3]), pieces[3])


def test_a_template_that_rewrites_earlier_turns_gets_a_sequence_for_each():
    talk = [SYSTEM, TALK[0], {"role": "assistant", "content": "In Norway.", "reasoning_content": "Easy."}, *TALK[2:]]
    start = f"<|im_start|>system\nBe brief.{IM}user\nWhere is Oslo?{IM}assistant\n"
    again = f"In Norway.{IM}user\nIs it cold?{IM}assistant\n"
    first, second = "<think>\nEasy.\n</think>\n\nIn Norway.<|im_end|>", "<think>\n\n</think>\n\nYes, it is.<|im_end|>"
    assert learnt(talk, QWEN3) == [qwen(start, first), qwen(start + again, second)]
    assert learnt(talk, QWEN3, turns="last") == [qwen(start + again, second)]
    counts = encode(examples(row(talk)), chat_tokenizer(QWEN3), rules())[1]
    assert (counts.used, counts.more) == (1, 1)
    assert counts.text.endswith("1 additional sequence, because the chat template rewrites earlier turns (`epochs` counts rows)")


def test_variables_of_the_template():
    think = f"<|im_start|>user\nWhere is Oslo?{IM}assistant\n<think>\n\n</think>\n\n"
    again = f"<|im_start|>user\nWhere is Oslo?{IM}assistant\nIn Norway.{IM}user\nIs it cold?{IM}assistant\n<think>\n\n</think>\n\n"
    found = learnt(TALK, QWEN3, chat_template_kwargs={"enable_thinking": False})
    assert found == [qwen(think, "In Norway.<|im_end|>"), qwen(again, "Yes, it is.<|im_end|>")]


THINKS = [*TALK[:3], {"role": "assistant", "content": "Yes, it is.", "reasoning_content": "Winter."}]
INSIDE = [*TALK[:3], ("assistant", "<think>\nWinter.\n</think>\n\nYes, it is.")]
ASKED = f"<|im_start|>user\nWhere is Oslo?{IM}assistant\nIn Norway.{IM}user\nIs it cold?{IM}assistant\n"


@pytest.mark.parametrize("messages", [THINKS, INSIDE])
def test_thinking_is_kept_dropped_or_masked(messages):
    thought = "<think>\nWinter.\n</think>\n\n"
    kept, dropped, masked = (learnt(messages, QWEN3, turns="last", thinking=each) for each in ("keep", "drop", "mask"))
    assert kept == [qwen(ASKED, f"{thought}Yes, it is.<|im_end|>")]
    assert dropped == [qwen(ASKED, "<think>\n\n</think>\n\nYes, it is.<|im_end|>")]
    assert masked == [qwen(ASKED + thought, "Yes, it is.<|im_end|>")]
    (encoded,) = encode(examples(row(messages)), chat_tokenizer(QWEN3), rules("last", thinking="mask"))[0]
    assert list(encoded.prompt) == qwen(ASKED)[0]  # answers are sampled from here


def test_the_thinking_that_a_prompt_begins_is_masked():
    opened = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}").replace("{{'<|im_start|>'", "{{'<|im_start|>'")
    told = [("user", "Is it cold?"), ("assistant", "<think>\nWinter.\n</think>\n\nYes.")]
    (found,) = learnt(told, opened, family=CHATML, thinking="mask")
    assert found == by_hand(
        chat_tokenizer(CHATML), f"<|im_start|>user\nIs it cold?{IM}assistant\n<think>\nWinter.\n</think>\n\n", "Yes.<|im_end|>"
    )


def test_tools_and_their_calls():
    calls = {"role": "assistant", "content": None, "reasoning_content": "Look.", "tool_calls": [CALL]}
    answers = {"role": "assistant", "content": "Yes, -3.", "reasoning_content": "So yes."}
    talk = [SYSTEM, ("user", "Is it cold in Oslo?"), calls, {"role": "tool", "content": "-3"}, answers]
    start = (
        "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided "
        f"with function signatures within <tools></tools> XML tags:\n<tools>\n{json.dumps(TOOL, ensure_ascii=False)}\n</tools>\n\nFor each "
        "function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        f'{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>{IM}user\nIs it cold in Oslo?{IM}assistant\n'
    )
    call = '<think>\nLook.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    between = f"\n<|im_start|>user\n<tool_response>\n-3\n</tool_response>{IM}assistant\n"
    whole = start, call, between, "<think>\nSo yes.\n</think>\n\nYes, -3.<|im_end|>"
    assert learnt(talk, QWEN3, tools=[TOOL]) == [qwen(*whole)]
    assert learnt(talk[:3], QWEN3, tools=[TOOL], turns="last") == [qwen(start, call)]


MARKED = CHATML.replace("message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}", "message['role'] + '\n'}}BODY{{'\n'}}")
MARKS = {
    "answer": "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ message['content'] }}<|im_end|>{% endif %}",
    "without end": "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}"
    "{{ message['content'] }}{% endif %}<|im_end|>",
}
HEADER = (  # the mark begins before the header, as SmolLM3's
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m['content'] }}<|im_end|>\n\n"
    "{%- endgeneration %}{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [*(MARKED.replace("BODY", marks) for marks in MARKS.values()), HEADER])
def test_marks_of_the_template(template):
    (found,) = learnt([SYSTEM, *TALK], template, family=CHATML)
    (plain,) = learnt([SYSTEM, *TALK], CHATML)
    assert found == plain
    assert "generation" in template


def test_marks_say_what_counts():
    # only the marked part of an answer counts, and the template need not begin an answer as its prompt does
    marks = MARKS["without end"].replace("{% generation %}", "A: {% generation %}")
    (found,) = learnt(TALK[:2], MARKED.replace("BODY", marks), family=CHATML)
    assert found == by_hand(chat_tokenizer(CHATML), f"<|im_start|>user\nWhere is Oslo?{IM}assistant\nA: ", "In Norway.<|im_end|>")


APART = "{% generation %}{{ message['content'] }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}"
FIRST = f"{{% if message['role'] == 'assistant' and not loop.last %}}{APART}{{% else %}}{{{{ message['content'] }}}}<|im_end|>{{% endif %}}"
ENDED = "{% if messages[-1]['role'] == 'assistant' %}{% generation %}<|endoftext|>{% endgeneration %}{% endif %}"


@pytest.mark.parametrize(
    "template",
    [
        MARKED.replace("BODY", MARKS["answer"]),
        MARKED.replace(
            "BODY", f"{{% if message['role'] == 'assistant' %}}{APART}{{% else %}}{{{{ message['content'] }}}}<|im_end|>{{% endif %}}"
        ),
        HEADER.replace("{{ '\n' }}{% endfor %}", "{% endfor %}" + ENDED),  # as Phi 3's of TRL: EOS after the last turn is a mark of its own
    ],
)
def test_marks_are_those_of_transformers(template):
    tokenizer = chat_tokenizer(template, CHATML)
    messages = [{"role": role, "content": content} for role, content in [SYSTEM, *TALK]]
    theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ((ids, counted),) = learnt([SYSTEM, *TALK], tokenizer.chat_template, family=CHATML)
    assert theirs["input_ids"][: len(ids)] == ids
    start = "<|im_start|>assistant\n"
    said = [text.removeprefix(start) for text in runs(tokenizer, theirs["input_ids"], theirs["assistant_masks"])]
    assert runs(tokenizer, ids, counted) == said == ["In Norway.<|im_end|>", said[1]]
    assert said[1].startswith("Yes, it is.<|im_end|>")


def test_turns_of_the_assistant_that_touch_are_two():
    header = HEADER.replace("{{ '\n' }}{% endfor %}", "{% endfor %}")
    (found,) = learnt([*TALK[:2], TALK[3]], header, family=CHATML)
    start, between = "<|im_start|>user\nWhere is Oslo?<|im_end|><|im_start|>assistant\n", "<|im_start|>assistant\n"
    assert found == by_hand(chat_tokenizer(CHATML), start, "In Norway.<|im_end|>", between, "Yes, it is.<|im_end|>")


def test_an_instruction_in_the_chat_template_is_one_turn():
    (encoded,) = encode(examples({"instruction": "Is it cold?", "output": "Yes."}), chat_tokenizer(QWEN3), rules())[0]
    assert [*encoded.prompt, *encoded.response] == qwen(
        f"<|im_start|>user\nIs it cold?{IM}assistant\n<think>\n\n</think>\n\nYes.<|im_end|>"
    )[0]


FORGETS = MARKED.replace(  # it marks an earlier turn without its thinking, as GLM 4.5's of TRL
    "BODY",
    MARKS["answer"].replace(
        "{{ message['content'] }}", "{{ message['content'].split('</think>')[-1] if not loop.last else message['content'] }}"
    ),
)
LOOKED_UP = [
    TALK[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL | {"function": {"name": "time", "arguments": {}}}]},
    {"role": "tool", "content": "-3"},
    TALK[3],
]
LATER = (  # it writes the answers of tools behind their call, as Gemma 4, but the first call alone, as gpt-oss, and no text beside a call
    "{% for m in messages if m['role'] != 'tool' %}<|im_start|>{{ m['role'] }}\n{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}"
    "{% for t in messages if t['role'] == 'tool' %}: {{ t['content'] }}{% endfor %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_may_write_the_answers_of_tools_behind_their_call():
    talk = [TALK[0], LOOKED_UP[1] | {"tool_calls": [CALL]}, *LOOKED_UP[2:]]
    whole = f"<|im_start|>user\nWhere is Oslo?{IM}assistant\nweather: -3{IM}assistant\n", "Yes, it is.<|im_end|>"
    tokenizer = chat_tokenizer(LATER, CHATML)
    assert learnt(talk, LATER, family=CHATML, turns="answer") == [by_hand(tokenizer, *whole)]
    assert learnt(talk, LATER, family=CHATML, turns="last") == [by_hand(tokenizer, *whole)]


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_the_thinking_beside_an_earlier_call_is_not_left_out_without_a_word(field):
    """As by the templates of Llama 3.1 and 3.2, which know no thinking. In tags, it was refused."""
    talk = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [CALL], field: "Maps."}, *LOOKED_UP[2:]]
    for turns in ("answer", "last"):
        words = r"leaves out the thinking of turn 2 of `messages`; .*set data.thinking: drop"
        with pytest.raises(DataError, match=words):
            learnt(talk, LATER, family=CHATML, turns=turns)
        learnt(talk, LATER, family=CHATML, turns=turns, thinking="drop")
    written = f"{{{{ m.{field} }}}}"
    knows = LATER.replace("{% if m.tool_calls %}", "{% if m.tool_calls %}" + written + " ")
    whole = f"<|im_start|>user\nWhere is Oslo?{IM}assistant\nMaps. weather: -3{IM}assistant\n", "Yes, it is.<|im_end|>"
    assert learnt(talk, knows, family=CHATML, turns="answer") == [by_hand(chat_tokenizer(knows, CHATML), *whole)]
    once = knows.replace(written, "{% if loop.last or messages[-1].role == 'tool' %}" + written + "{% endif %}")
    learnt([*talk, *TALK[:2]], once, family=CHATML, turns="answer")  # dropped once another answer follows, as by that of Qwen 3


@pytest.mark.parametrize(("said", "thinking"), [("\n\n", "keep"), (" ", "mask"), ("<think>Maps.</think>\n\n", "drop")])
def test_white_space_beside_a_call_is_no_text(said, thinking):
    talk = [TALK[0], {"role": "assistant", "content": said, "tool_calls": [CALL]}, *LOOKED_UP[2:]]
    whole = f"<|im_start|>user\nWhere is Oslo?{IM}assistant\nweather: -3{IM}assistant\n", "Yes, it is.<|im_end|>"
    found = learnt(talk, LATER, family=CHATML, turns="answer", thinking=thinking)
    assert found == [by_hand(chat_tokenizer(LATER, CHATML), *whole)]


ANALYSIS = (  # it writes the text beside a call only until an answer follows, as gpt-oss
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m.tool_calls %}"
    "{% for l in messages[loop.index:] if l.role == 'assistant' and not l.tool_calls %}{% else %}{{ m['content'] }} {% endfor %}"
    "{{ m.tool_calls[0].function.name }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_may_drop_the_text_beside_a_call_once_an_answer_follows():
    talk = [TALK[0], {"role": "assistant", "content": "Look.", "tool_calls": [CALL]}, *LOOKED_UP[2:], *TALK[:2]]
    start = f"<|im_start|>user\nWhere is Oslo?{IM}assistant\n"
    later = f"weather{IM}tool\n-3{IM}assistant\nYes, it is.{IM}user\nWhere is Oslo?{IM}assistant\n"
    tokenizer = chat_tokenizer(ANALYSIS, CHATML)
    assert learnt(talk, ANALYSIS, family=CHATML, turns="answer") == [by_hand(tokenizer, start + later, "In Norway.<|im_end|>")]
    assert learnt(talk[:2], ANALYSIS, family=CHATML, turns="last") == [by_hand(tokenizer, start, "Look. weather<|im_end|>")]


@pytest.mark.parametrize(
    ("messages", "template", "more", "error", "words"),
    [
        ([*TALK[:2], ("tool", "-3"), *TALK[:2], ("user", "x"), ("tool", "y"), ("assistant", "z")], CHATML, {}, DataError,
         r"data, row 1: turn 7 of `messages` has the role tool, but the turn before it is not a tool call of the assistant"),
        ([("assistant", "Hello."), *TALK[:2]], CHATML, {}, DataError, "row 1: the first turn of `messages` is the assistant's"),
        ([TALK[0], *TALK], GEMMA, {}, DataError, "row 1: .* refuses the turns user.*must alternate"),
        ([TALK[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}], CHATML, {}, DataError,
         "row 1: the tokenizer's chat template leaves out the call of `weather` of turn 2"),
        ([*LOOKED_UP, *TALK[2:]], CHATML, {"turns": "answer"}, DataError,
         "row 1: the tokenizer's chat template leaves out the call of `weather` of turn 2 of `messages`; use a tokenizer with another"),
        ([*LOOKED_UP, *TALK[2:]], CHATML, {"turns": "last", "tools": [TOOL]}, DataError, "leaves out the call of `weather` of turn 2"),
        (LOOKED_UP, LATER, {"turns": "last"}, DataError, "leaves out the call of `time` of turn 2"),
        ([TALK[0], LOOKED_UP[1] | {"content": "Let me look."}, *LOOKED_UP[2:]], LATER, {"turns": "answer"}, DataError,
         "leaves out the text of turn 2"),
        ([TALK[0], {**LOOKED_UP[1], "content": "<think>Maps.</think>\n\n", "tool_calls": [CALL]}, *LOOKED_UP[2:]], LATER,
         {"turns": "answer"}, DataError, "leaves out the thinking of turn 2 of `messages`; .*set data.thinking: drop"),
        ([TALK[0], ("tool", "-3"), TALK[1]], LATER, {"turns": "answer"}, DataError, "leaves out the turn of role `tool`"),
        ([TALK[0], {"role": "assistant", "content": "No.", "reasoning_content": "Hm."}], CHATML, {}, DataError,
         "leaves out the thinking of turn 2 .*set data.thinking: drop"),
        ([TALK[0], ("assistant", "<think>\nMaps.\n</think>\n\nIn Norway."), *INSIDE[2:]], FORGETS, {}, DataError,
         "leaves out the thinking of turn 2 of `messages`; .*set data.thinking: drop"),
        ([TALK[0], ("assistant", "<think>Maps.</think>In Norway.")], FORGETS.replace("not loop.last", "true"), {"turns": "last"}, DataError,
         "leaves out the thinking of turn 2 of `messages`; .*set data.thinking: drop"),
        ([("user", "How is the weather?"), TALK[3]], CHATML, {"tools": [TOOL]}, DataError, "template leaves out the tool `weather`"),
        ([TALK[0], LOOKED_UP[1] | {"tool_calls": [CALL]}, *LOOKED_UP[2:]], LATER, {"tools": [TOOL], "turns": "last"}, DataError,
         "leaves out the tool `weather`"),
        (TALK, CHATML, {"tools": [TOOL]}, DataError, "row 1: the tokenizer's chat template leaves out the tool `weather`"),
        (THINKS, QWEN3, {"chat_template_kwargs": {"enable_thinking": False}}, DataError,
         r"row 1: .* does not write turn 4 of `messages` after the template's own generation prompt.*set data.thinking: drop"),
        (TALK, QWEN3, {"chat_template_kwargs": {"enable_thinkng": False}}, ModelError,
         r"sets `enable_thinkng`, but the chat template .* has no such variable; did you mean `enable_thinking`\?"),
        (TALK, "{% if mode != 1 %}{{ raise_exception('no mode') }}{% endif %}" + CHATML, {"chat_template_kwargs": {"mode": 2}}, DataError,
         r"refuses the turns user, .* and data.chat_template_kwargs \(no mode\)"),
        (TALK, MARKED.replace("BODY", MARKS["answer"]).replace("'assistant' %}{% gen", "'assistant' and loop.last %}{% gen"), {}, DataError,
         "marks 1 part with {% generation %}, but the row has 2 turns"),
        (TALK, MARKED.replace("BODY", FIRST), {}, DataError, "marks 1 part with {% generation %}, but the row has 2 turns"),
        ([TALK[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}], QWEN3, {"turns": "answer"}, DataError,
         "row 1: the last message has no text; set data.turns: last to learn its tool calls"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_is_one_sentence(messages, template, more, error, words):
    with pytest.raises(error, match=words) as caught:
        learnt(messages, template, family=next((f for f in (GEMMA, QWEN3) if f == template), CHATML), **more)
    assert "\n" not in str(caught.value)


def test_the_default_learns_the_text_alone_and_says_what_it_leaves_out():
    encoded, counts = encode(examples(row(THINKS), row(TALK)), chat_tokenizer(QWEN3), rules("answer"))
    assert [*encoded[0].prompt, *encoded[0].response] == qwen(ASKED + "Yes, it is.<|im_end|>")[0]
    assert encoded[0].spans == ()
    assert counts.text == "2 of 2 rows; 1 with thinking or tool calls that are not learnt (data.turns: last learns them)"


def test_long_turns_are_left_out_cut_or_refused():
    tokenizer, rows = chat_tokenizer(CHATML), examples(row(TALK), row(TALK[:2]))
    whole, short = encode(rows, tokenizer, rules())[0]
    second = len(whole.prompt)

    def encoded(max_prompt: int = second, max_length: int = 900, **more):
        return encode(rows, tokenizer, Rules(max_prompt, max_length, template="chat", turns="all", **more), name="d")

    (left, other), counts = encoded(second - 1)
    assert (left.prompt, left.response, left.spans) == (other.prompt, other.response, other.spans) == (short.prompt, short.response, ())
    few = f"1 turn longer than data.max_prompt ({second - 1}) or data.max_length (900), left out of rows whose other turns are used"
    assert counts.text == f"2 of 2 rows; {few}"
    (cut, _), counts = encoded(max_length=second + 3)
    assert (cut.prompt, cut.response) == (whole.prompt, whole.response[:3])
    assert cut.spans == (whole.spans[0], (second, second + 3))
    assert counts.text == f"2 of 2 rows; 1 with a reference cut at data.max_length ({second + 3})"
    (dropped, _), counts = encoded(max_length=second + 3, long_responses="drop")
    assert (dropped.response, counts.turns) == (short.response, 1)
    length = second + len(whole.response)
    for changes, words in (
        ({"max_prompt": second - 1, "long_prompts": "refuse"}, rf"d, row 1: its prompt has {second} tokens, more than data.max_prompt "),
        (
            {"max_length": second + 3, "long_responses": "refuse"},
            rf"d, row 1: its prompt and response have {length} tokens, more than data",
        ),
    ):
        with pytest.raises(DataError, match=words):
            encoded(**changes)


def test_rows_with_a_long_answer_are_left_out_and_counted():
    tokenizer, rows = chat_tokenizer(CHATML), examples(row(TALK), row(TALK[:2]))
    _, short = encode(rows, tokenizer, rules("last"))[0]
    length = len(short.prompt) + len(short.response)
    found, counts = encode(rows, tokenizer, Rules(900, length, "cut", "drop", template="chat"))
    assert [e.row for e in found] == [1]
    assert (counts.used, counts.text) == (1, f"1 of 2 rows; 1 left out, with a reference longer than data.max_length ({length})")
    with pytest.raises(DataError, match=r"every row of d is too long for data\.max_length"):
        encode(rows, tokenizer, Rules(900, length - 1, "cut", "drop", template="chat"), name="d")


def test_chats_that_lose_their_generation_prompt_are_counted():
    tokenizer, rows = chat_tokenizer(CHATML), examples(row(TALK), row(TALK[:2]))
    whole, short = encode(rows, tokenizer, rules("last"))[0]
    most = len(whole.prompt) - 1
    (cut, kept), counts = encode(rows, tokenizer, Rules(most, 900, "cut", template="chat"), name="d")
    assert (cut.prompt, kept.prompt) == (whole.prompt[:most], short.prompt)
    assert tokenizer.decode(whole.prompt).endswith("<|im_start|>assistant\n")
    assert not tokenizer.decode(cut.prompt).endswith("<|im_start|>assistant\n")
    assert (counts.cut, counts.unopened) == (1, 1)
    assert counts.text.endswith("1 of the cut prompts lost the chat's generation prompt, which was at their end (data.long_prompts)")
    assert encode(rows, tokenizer, Rules(900, 900, "cut", template="chat"))[1].text == ""


def test_a_turn_whose_tokens_depend_on_the_next_text_begins_a_sequence():
    # GPT-2 divides "\n\n" before a word, so the prompt as the model reads it is no part of the longer text
    tokenizer = chat_tokenizer(LLAMA3, words=False)
    found = encode(examples(row(TALK)), tokenizer, rules())[0]
    start = "<|begin_of_text|>" + HEAD("user") + "Where is Oslo?<|eot_id|>" + HEAD("assistant")
    prompts = start, f"{start}In Norway.<|eot_id|>" + HEAD("user") + "Is it cold?<|eot_id|>" + HEAD("assistant")
    assert [list(e.prompt) for e in found] == [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    assert [tokenizer.decode(e.response) for e in found] == ["In Norway.<|eot_id|>", "Yes, it is.<|eot_id|>"]
    (masked,) = encode(examples(row(INSIDE)), chat_tokenizer(QWEN3, words=False), rules("last", thinking="mask"))[0]
    ((start, end),) = masked.spans
    assert tokenizer.decode((*masked.prompt, *masked.response)[start:end]) == "Yes, it is.<|im_end|>"
