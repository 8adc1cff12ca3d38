"""The teacher's own prompts: placeholders, chat templates, BOS, limits and their counts."""

import pytest
from pydantic import ValidationError
from tests.byte_models import BOS, LLAMA2, byte_tokenizer

from tadistill.config import Data, DataRef
from tadistill.config.method_parts import TeacherContext
from tadistill.data.batch import collate, references
from tadistill.data.datasets import SplitRows
from tadistill.data.encoding import encode
from tadistill.data.encoding_rules import Rules
from tadistill.data.rows import Example, example
from tadistill.data.token_cache import keep
from tadistill.errors import DataError, ModelError

QUESTION = Example("Say red", "", ("red it is", "red"))
TURNS = Example("", "", ("four",), messages=({"role": "system", "content": "Be short."}, {"role": "user", "content": "2 + 2?"}))


def texts(context: dict | str, *rows: Example, template: str = "plain", **settings) -> list[str]:
    """Return the prompts of student and teacher as text, one after the other, for each row."""
    tokenizer = byte_tokenizer(settings.pop("chat", None) or byte_tokenizer().chat_template)
    found, _ = encode(rows, tokenizer, Rules(200, 400, context=TeacherContext.model_validate(context), template=template, **settings))
    return [tokenizer.decode(ids) for e in found for ids in (e.prompt, e.teacher_prompt)]


def test_placeholders_stand_for_columns():
    row = Example("Say red", "now", ("red it is",), extra={"document": "a {b} c"})
    (_, own) = texts("{document}|{instruction}|{input}|{output}|{prompt}|{{x}}", row)
    assert own == "a {b} c|Say red|now|red it is|Say red\nnow\n|{x}"  # braces in a row's own text stay


def test_a_context_of_the_students_prompt_has_its_tokens():
    for bos in (False, True):
        student, own = texts("{prompt}", QUESTION, bos=bos)
        assert student == own == f"{'<bos>' * bos}Say red\n"


def test_a_chat_template_may_write_the_teachers_prompt_alone():
    student, own = texts({"system": "You know it.", "template": "{instruction} ({output})"}, QUESTION, bos=True)
    assert student == "<bos>Say red\n"
    assert own == "<|im_start|>system\nYou know it.<|im_end|>\n<|im_start|>user\nSay red (red it is)<|im_end|>\n<|im_start|>assistant\n"
    (_, own) = texts({"chat": True}, QUESTION, chat=LLAMA2)
    assert own == "<bos>[INST] Say red [/INST]"
    student, own = texts({"chat": False, "template": "{prompt}{output}"}, QUESTION, template="chat")
    assert own == f"{student}red it is"


def test_a_conversation_keeps_its_other_turns():
    student, own = texts({"system": "Know.", "template": "{instruction} It is {output}."}, TURNS)
    assert own == student.replace("Be short.", "Know.").replace("2 + 2?", "2 + 2? It is four.")
    assert texts({"chat": True}, TURNS)[0] == texts({"chat": True}, TURNS)[1]


def test_long_prompts_of_the_teacher_are_left_out_or_cut_and_counted():
    rows = [QUESTION, Example("Say blue", "", ("blue " * 9,))]
    context = TeacherContext(template="{output}", max_prompt=12)
    found, counts = encode(rows, byte_tokenizer(), Rules(200, 400, context=context, template="plain"))
    assert [e.row for e in found] == [0]
    assert (counts.rows, counts.used, counts.long_context, counts.empty, counts.context_limit) == (2, 1, 1, 0, 12)
    assert "1 of 2 rows; 1 left out, because the teacher's prompt is longer than context.max_prompt (12)" in counts.text
    found, counts = encode(rows, byte_tokenizer(), Rules(200, 400, "cut", context=context, template="plain"))
    assert [len(e.teacher_prompt) for e in found] == [9, 12]
    assert (counts.used, counts.cut_context, counts.cut) == (2, 1, 0)
    assert [len(e.prompt) for e in found] == [8, 9]  # the student's prompts have their own limit
    with pytest.raises(DataError, match=r"no row of data has a teacher's prompt of at most 3 tokens; raise context.max_prompt"):
        encode(rows, byte_tokenizer(), Rules(200, 400, context=context.model_copy(update={"max_prompt": 3}), template="plain"))


def test_a_row_of_a_file_has_the_extra_columns(tmp_path):
    ref = DataRef(load="d", extra=("documents", "year"))
    row = {"instruction": "Q", "output": "A", "documents": ["one", "two"], "year": 1999}
    assert example(row, ref, 0).extra == {"documents": "one\n\ntwo", "year": "1999"}
    with pytest.raises(DataError, match=r"row 3 has no column `year`, which the recipe reads \(extra: \[year\]\)"):
        example({"instruction": "Q", "output": "A", "documents": "d"}, ref, 2)
    with pytest.raises(DataError, match=r"row 1: the column `year` is None; it must be a string"):
        example(row | {"year": None}, ref, 0)


def test_contexts_are_stored_with_the_tokens_of_a_large_set(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "Say red", "output": "red"}\n{"instruction": "Say blue", "output": "blue"}\n')
    split, tokenizer = SplitRows(DataRef(load=str(file)), "train"), byte_tokenizer()
    for template in ("{output}{prompt}", "{prompt}"):
        rules = Rules(200, 400, context=TeacherContext(template=template), template="plain")
        kept = keep(split, tokenizer, rules, name="d")
        assert [*kept.rows] == encode([*split.stream()], tokenizer, rules)[0]
        assert kept.longest.context == max(len(e.teacher_prompt) for e in kept.rows)
        assert kept.longest.context_whole == max(len(e.teacher_prompt) + len(e.response) for e in kept.rows)
    assert keep(split, tokenizer, Rules(200, 400, template="plain"), name="d").rows[0].teacher_prompt is None


@pytest.mark.parametrize(
    ("context", "sentence"),
    [
        ({}, "the context changes nothing; set `template`, `system` or `chat`"),
        ("", "the template is empty; write the teacher's prompt"),
        (" \n", "the template is empty"),
        ("{output", "the brace at character 1 has no partner; write `{{`"),
        ("a } b", "the brace at character 3 has no partner; write `}}`"),
        ("{}", "`{}` names no column"),
        ({"system": "x", "chat": False}, "`system` needs a chat template, but `chat` is false"),
        ({"chat": False}, "must contain the whole prompt of the teacher; set `template`"),
    ],
)
def test_a_context_that_cannot_work(context, sentence):
    with pytest.raises(ValidationError, match=sentence.replace("{", r"\{").replace("}", r"\}")):
        TeacherContext.model_validate(context)


def test_extra_columns_belong_to_the_training_set():
    with pytest.raises(ValidationError, match="data set `d` has `extra`, but `extra` is only used in a `context`, and a `context`"):
        Data(train="d", dev="d", test=[{"load": "d", "extra": ["x"]}])


def test_extra_columns_do_not_hide_known_ones():
    with pytest.raises(ValidationError, match="`extra` names `output`, but a `context` can use this column without `extra`"):
        DataRef(load="d", extra=("output",))


@pytest.mark.parametrize(
    ("context", "row", "sentence"),
    [
        (
            "{document}",
            QUESTION,
            r"data, row 1: context.template names `\{document\}`, but the row has only output, prompt, instruction, input",
        ),
        (
            "{input}",
            Example("whole", "", ("a",), verbatim=True),
            "names `{input}`, but the row has only output, prompt; correct the template",
        ),
        ("{input}", QUESTION, "data, row 1: the teacher's prompt is empty"),
    ],
)
def test_a_row_that_does_not_fit(context, row, sentence):
    with pytest.raises(DataError, match=sentence):
        texts(context, row)


def test_a_context_with_chat_needs_a_chat_template():
    tokenizer = byte_tokenizer(None)
    assert tokenizer.bos_token_id == BOS
    with pytest.raises(ModelError, match=r"data, row 1: the `context` needs a chat template, but the tokenizer has none"):
        encode([QUESTION], tokenizer, Rules(200, 400, context=TeacherContext(chat=True), template="plain"))


def test_a_masked_thought_stays_masked_behind_the_teachers_prompt():
    thinks = Example("Say red", "", ("<think>hm</think>red",))
    rules = Rules(200, 400, template="plain", thinking="mask", context=TeacherContext(template="Be kind. {prompt}"))
    ((row,), _) = encode([thinks], byte_tokenizer(), rules)
    (sequence,) = references([row])
    batch = collate([sequence], pad=0)
    for read in (batch, batch.of_teacher):
        assert byte_tokenizer().decode(read.targets_BT[read.mask_BT]) == "red<eos>"


def test_a_long_prompt_of_the_teacher_can_be_refused():
    rules = Rules(200, 400, "refuse", template="plain", context=TeacherContext(template="{prompt}{prompt}", max_prompt=9))
    with pytest.raises(DataError, match=r"d, row 1: the teacher's prompt has \d+ tokens, more than context.max_prompt \(9\); raise this"):
        encode([QUESTION], byte_tokenizer(), rules, name="d")
