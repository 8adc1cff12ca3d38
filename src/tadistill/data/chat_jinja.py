"""Run a chat template as transformers does, with the same names, filters and tags, and without access to the rest of Python."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template


THINKING = ("reasoning_content", "thinking", "reasoning")
"""Possible names of the field with a message's thinking, as in transformers."""


def text_of(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    prompt: bool = False,
    marks: tuple[str, str] = ("", ""),
) -> str:
    """Return a conversation as `apply_chat_template` of transformers writes it, with `marks` around each part in the tag {% generation %}.

    Args:
        variables: further variables of the template, such as the texts of special tokens.
        prompt: True to ask for the start of an answer at the end.
    """
    plain = [_with_thinking({name: value for name, value in message.items() if value is not None}) for message in messages]
    given: dict[str, Any] = {"tools": [*tools] or None, "documents": None, **variables}
    return compiled(template, marks).render(messages=plain, add_generation_prompt=prompt, **given)


def attempted(template: str, *given: Any, prompt: bool = False) -> str | None:
    """Return the text of `text_of`, or None if the template fails."""
    try:
        return text_of(template, *given, prompt=prompt)
    except Exception:  # a template may raise any error; `render` reports it for a row of the data
        return None


def thinking(message: Mapping[str, Any]) -> str | None:
    """Return the thinking of a message, if it is in one of the fields `THINKING`. Otherwise return None."""
    return next((message[name] for name in THINKING if message.get(name) is not None), None)


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    thought = thinking(message)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


@lru_cache
def compiled(template: str, marks: tuple[str, str] = ("", "")) -> "Template":
    """Return a chat template as a program. It writes `marks` around each part in the tag {% generation %}.

    Raises:
        jinja2.TemplateSyntaxError: the template is not valid Jinja.
    """
    import jinja2.ext  # not transformers: planning must start quickly
    from jinja2.exceptions import SecurityError
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Marks(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Callable[[], str]) -> str:
            return f"{marks[0]}{caller()}{marks[1]}"

    class Names(Namespace):  # anybody may write a template: names of Python's own attributes stay closed
        def __init__(*given: Any, **named: Any) -> None:  # without `self`, which a template may use as a name
            Namespace.__init__(given[0])  # type: ignore[arg-type]
            for name, value in dict(*given[1:], **named).items():
                given[0][name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace of a chat template cannot have the name {name!r}, because it begins with `_`")
            super().__setitem__(name, value)

    class Dicts:  # `dict` without the other attributes of the class
        def __call__(self, *given: Any, **named: Any) -> dict[Any, Any]:
            return dict(*given, **named)

        def fromkeys(self, *given: Any) -> dict[Any, Any]:
            return dict.fromkeys(*given)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Marks, jinja2.ext.loopcontrols])
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.globals |= {"dict": Dicts(), "namespace": Names}
    environment.filters["tojson"] = as_json
    return environment.from_string(template)
