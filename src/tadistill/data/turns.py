"""Split an example into the turns that a model learns, as text.

An example with one answer has one turn. With `data.turns: all`, each message of the assistant is a turn. A turn has three parts: the
prompt; text that does not count in the loss, such as thinking with `data.thinking: mask`; and the answer.

For each turn, the chat template writes the conversation up to the answer, with its generation prompt at the end: this text is the prompt.
The template then writes the conversation up to the end of the turn. This second text must begin with the prompt, and the rest of it is the
answer. So if a template rewrites earlier turns (Qwen3 removes their thinking), each prompt has them as the template writes them at that
turn. If a template marks the answers with {% generation %}, the marks say where the answers are.
"""

import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tadistill.data import chat
from tadistill.data.chat_jinja import thinking
from tadistill.data.encoding_rules import Rules
from tadistill.data.prompts import OPEN, before_answer, check_template, in_chat, render, split_thought
from tadistill.data.rows import Example
from tadistill.errors import DataError
from tadistill.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""The usual roles of messages."""
_REST = re.compile(r".*?</think>\s*", re.DOTALL)  # the rest of a thought that begins in the prompt


@dataclass(frozen=True)
class Turn:
    """A prompt and the answer to it, as text."""

    prompt: str
    answer: str
    """The answer without the token that ends it."""
    end: int
    """The id of the token that ends the answer."""
    hidden: str = ""
    """Text between the prompt and the answer that does not count in the loss."""


def without_thinking(example: Example) -> Example:
    """Return the example without the thinking of the assistant, in its messages and its references."""
    answer = chat.without_thinking(example.last) if example.last else example.last
    references = tuple(map(chat.without_thought, example.references))
    messages = tuple(chat.without_thinking(m) if m.get("role") == "assistant" else m for m in example.messages)
    return replace(example, messages=messages, last=answer, references=references)


def unlearnt(example: Example, rules: Rules) -> bool:
    """Return True if training does not learn all parts of the last message. With `data.turns: answer`, training leaves out tool calls, and
    thinking that is in a field of its own."""
    if rules.turns != "answer" or not in_chat(example, rules.template):
        return False
    return bool(example.last.get("tool_calls")) or (rules.thinking != "drop" and bool(thinking(example.last)))


def has_unknown_role(example: Example, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return True if a message has a role that is not among `ROLES` and that the chat template does not name. Most templates write such a
    role without an error."""
    unusual = {message["role"] for message in example.messages if message["role"] not in ROLES}
    return any(re.search(rf"['\"]{re.escape(role)}['\"]", str(tokenizer.chat_template)) is None for role in unusual)


class TurnReader:
    """The conversion of examples into turns, for one tokenizer and its chat template."""

    def __init__(self, rules: Rules, tokenizer: "PreTrainedTokenizerBase"):
        """Raises ModelError if the tokenizer has no EOS token, or if its chat template does not use a variable that the recipe sets."""
        self.rules, self.tokenizer = rules, tokenizer
        self.closing, self._eos = chat.closing(tokenizer), int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        chat.check_settings(tokenizer, rules.chat_template_kwargs)
        added: Any = tokenizer.added_tokens_decoder
        self.specials = {str(token): i for i, token in added.items() if str(token) and (token.special or i in (self.closing, self._eos))}
        """The text and the id of each special token."""

    def turns(self, example: Example, where: str) -> list[Turn]:
        """Return the turns that training learns. `where` is the name of the row in messages.

        Raises:
            DataError: the chat template refuses the row, or does not begin a turn with its own generation prompt.
            ModelError: the prompt needs a chat template, but the tokenizer has none.
        """
        rules = self.rules
        if rules.turns != "answer" and in_chat(example, rules.template):
            return self._of_conversation(example, where)
        if example.last and example.last.get("content") is None:
            raise DataError(f"{where}: the last message has no text; set data.turns: last to learn its tool calls, or delete the row")
        prompt = render(example, rules.template, self.tokenizer, where, rules.chat_template_kwargs)
        end = self.closing if in_chat(example, rules.template) else self._eos
        return [self._turn(prompt, example.references[0], end)]

    def _of_conversation(self, example: Example, where: str) -> list[Turn]:
        check_template(example, self.tokenizer, where)
        messages = [*before_answer(example), example.last or {"role": "assistant", "content": example.references[0]}]
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        _check_order(messages, where, first=self.rules.turns == "all")
        context = self.tokenizer, where, example.tools, self.rules.chat_template_kwargs
        entire = chat.written(messages, *context)
        spans, found = self._spans(messages, places, example, where), list[Turn]()
        for place in places if self.rules.turns == "all" else places[-1:]:
            prompt = chat.render(messages[:place], *context)
            whole = entire if spans else chat.written(messages[: place + 1], *context)
            start, end = spans[place] if spans else (len(prompt), len(whole))
            if not whole.startswith(prompt):
                if not spans or place == places[-1]:
                    raise _unverified(place, messages[place], where)
                prompt = whole[:start]  # the template rewrites earlier turns such as this one, but marks it
            start = max(start, len(prompt))  # a generation prompt that is marked is not learnt
            answer, token = self._ended(whole[start:end], whole[end:])
            found.append(self._turn(prompt, answer, token, whole[len(prompt) : start]))
            _check_written(messages[place], place, found[-1], where)
        return found

    def _spans(self, messages: Seq[Mapping[str, Any]], places: list[int], example: Example, where: str) -> dict[int, tuple[int, int]]:
        # the part of each assistant's turn that the template marks; empty if it marks nothing
        spans = chat.marked(messages, self.tokenizer, example.tools, self.rules.chat_template_kwargs)
        parts = None if spans is None else _joined(spans, places)
        if spans is not None and parts is not None and len(parts) != len(places):
            raise DataError(
                f"{where}: the tokenizer's chat template marks {counted(len(parts), 'part')} with {{% generation %}}, but the row has "
                f"{counted(len(places), 'turn')} of the assistant; use a tokenizer whose template marks each turn once, or set data.turns: "
                "answer"
            )
        return dict(zip(places, parts or (), strict=False))

    def _ended(self, answer: str, rest: str = "") -> tuple[str, int]:
        # the answer without its end token, and the end token, which ends the answer or begins the text after it
        text = answer.rstrip()
        if found := [end for end in self.specials if text.endswith(end)]:
            end = max(found, key=len)
            return text.removesuffix(end), self.specials[end]
        following = [end for end in self.specials if rest.startswith(end)]
        return (answer, self.specials[max(following, key=len)]) if following else (text, self.closing)

    def _turn(self, prompt: str, answer: str, end: int, hidden: str = "") -> Turn:
        if self.rules.thinking == "mask":
            opened = (prompt + hidden).rstrip().endswith(OPEN)
            thought = (_REST if opened else chat.THOUGHT).match(answer)
            if thought:
                hidden, answer = hidden + thought[0], answer[thought.end() :]
        return Turn(prompt, answer, end, hidden)


def _joined(spans: Seq[tuple[int, int]], places: Seq[int]) -> Seq[tuple[int, int]]:
    # parts that touch are one, as in the mask of transformers: some templates mark a text and its end token apart
    touch = [end == start for (_, end), (start, _) in pairwise(spans)]
    if len(spans) == len(places) and all(b == a + 1 for (a, b), one in zip(pairwise(places), touch, strict=True) if one):
        return spans  # two messages of the assistant with nothing between them are two turns
    found = list[tuple[int, int]]()
    for start, end in spans:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return [(start, end) for start, end in found if start < end]


def _check_order(messages: Seq[Mapping[str, Any]], where: str, *, first: bool) -> None:
    # `first`: True if the first turn is learnt too, so that it cannot be the assistant's
    before = ""
    for i, role in enumerate((message["role"] for message in messages), 1):
        if first and role == "assistant" and not before:
            raise DataError(f"{where}: the first turn of `messages` is the assistant's, so it has no prompt; delete this turn")
        if role == "tool" and before not in ("assistant", "tool"):
            raise DataError(
                f"{where}: turn {i} of `messages` has the role tool, but the turn before it is not a tool call of the assistant; add "
                "the call, or delete the row"
            )
        before = role


def _check_written(message: Mapping[str, Any], place: int, turn: Turn, where: str) -> None:
    # a template that does not know a part of a message leaves it out without an error
    said, content = turn.hidden + turn.answer, chat.without_thinking(message).get("content")
    thought = thinking(message) or split_thought(str(message.get("content") or ""))[0]
    missing = [f"the call of `{name}`" for name in chat.called(message.get("tool_calls") or ()) if name not in said]
    missing += ["the thinking"] if thought.strip() not in said else []
    missing += ["the text"] if str(content or "").strip() not in said else []
    if missing:
        raise chat.missing(missing[0], place, where)


def _unverified(place: int, message: Mapping[str, Any], where: str) -> DataError:
    drop = "set data.thinking: drop, or " if thinking(message) or chat.THOUGHT.match(str(message.get("content") or "")) else ""
    return DataError(
        f"{where}: the tokenizer's chat template does not write turn {place + 1} of `messages` after the template's own generation prompt, "
        f"so it is unknown where the answer begins; {drop}use a tokenizer whose template marks answers with {{% generation %}}, or "
        "set data.turns: answer"
    )
