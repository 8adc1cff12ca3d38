"""The teacher's own prompt (`context`): what a teacher reads in place of the student's prompt."""

import re
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, field_validator, model_validator

from tadistill.config.common import MOST, Strict

_PARTS = re.compile(r"\{\{|\}\}|\{(?P<column>[^{}]*)\}|[{}]")


class TeacherContext(Strict):
    """A prompt of the teacher's own. The teacher reads it in place of the student's prompt, and then the same response tokens.

    With a reference answer in it, a model can teach itself (`path: s > s`), as in OPSD (arXiv 2601.18734) and SDFT (arXiv 2601.19897). Only
    training uses the context. Dev sets and test sets are measured with the student's prompts. `context: TEXT` is short for `context:
    {template: TEXT}`.
    """

    text_sets: ClassVar[str] = "template"
    template: str | None = None
    """The text of the prompt. `{column}` stands for a column of the row: `{instruction}`, `{input}`, `{output}` (the first reference
    answer), `{prompt}` (the whole prompt of the student), or a column in `data.train.extra`. Write `{{` and `}}` for braces. With a chat
    template, this text is the user's message. In a conversation, the text replaces the last message before the answer, and `{instruction}`
    stands for that message."""
    system: str | None = None
    """Text of the system message. It replaces the system message that a conversation has. With this key, the tokenizer's chat template
    writes the prompt."""
    chat: bool | None = None
    """True if the tokenizer's chat template writes the prompt. By default, the chat template writes the prompt if `system` is set, or if it
    also writes the student's prompt."""
    max_prompt: int = Field(default=1024, ge=1, le=MOST)
    """Largest number of tokens in the teacher's prompt. If the prompt of a row is longer, `data.long_prompts` decides what happens to this
    row in training with the context."""

    @field_validator("template")
    @classmethod
    def _complete(cls, template: str | None) -> str | None:
        if template is None:
            return None
        if not template.strip():
            raise ValueError("the template is empty; write the teacher's prompt, such as `{prompt}` for the prompt of the student")
        for part in _PARTS.finditer(template):
            if part[0] in ("{", "}"):
                raise ValueError(f"the brace at character {part.start() + 1} has no partner; write `{part[0] * 2}` for a brace in the text")
            if part["column"] is not None and not part["column"].strip():
                raise ValueError("`{}` names no column; write for instance `{output}`, or `{{}}` for two braces in the text")
        return template

    @model_validator(mode="after")
    def _check(self):
        if self.template is None and self.system is None and self.chat is None:
            raise ValueError("the context changes nothing; set `template`, `system` or `chat`")
        if self.chat is False and self.system is not None:
            raise ValueError("`system` needs a chat template, but `chat` is false; remove one of the two keys")
        if self.chat is False and self.template is None:
            raise ValueError("with `chat: false`, `template` must contain the whole prompt of the teacher; set `template`")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The names between braces in `template`, each once."""
        found = (part["column"] for part in _PARTS.finditer(self.template or "") if part["column"] is not None)
        return tuple(dict.fromkeys(found))

    def filled(self, columns: Mapping[str, str]) -> str:
        """Return the template with texts in place of the names in braces. `columns` maps names to texts. Braces in these texts are kept."""
        assert self.template is not None
        return _PARTS.sub(lambda part: part[0][0] if part["column"] is None else columns[part["column"]], self.template)
