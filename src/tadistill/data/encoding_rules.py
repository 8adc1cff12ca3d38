"""The rules with which text becomes token ids, and counts of the rows that they leave out or cut."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tadistill.config.data import LongText, Template, Thinking, Turns
from tadistill.config.method_parts import TeacherContext
from tadistill.text import counted


@dataclass(frozen=True)
class Rules:
    """The settings of a recipe (in `data`) that decide how a row becomes token ids. `config.data.Data` explains each of them."""

    max_prompt: int
    max_length: int
    long_prompts: LongText = "drop"
    long_responses: LongText = "cut"
    bos: bool = False
    """Put BOS before a prompt that does not begin with BOS. Prompts from a chat template are not changed, because the template decides
    about BOS."""
    template: Template = "alpaca"
    turns: Turns = "answer"
    thinking: Thinking = "keep"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    context: TeacherContext | None = None
    """The teacher's own prompt, which is encoded too. It may have up to `context.max_prompt` tokens. `long_prompts` says what happens to
    a longer prompt."""

    @classmethod
    def of(cls, data: Any, role: str, *, bos: bool, context: TeacherContext | None = None) -> "Rules":
        """Return the rules for one role of data sets: train, dev or test. Only training sets can have more than one learnt turn per row,
        and only without a `context`.

        Args:
            data: the key `data` of a recipe, or the `Encoding` of a stage.
        """
        found = {each.name: getattr(data, each.name) for each in fields(cls) if each.name not in ("bos", "context")}
        if role != "train" or context:
            found["turns"] = of_one_turn(data.turns)
        return cls(**found, bos=bos, context=context)

    @property
    def lenient(self) -> "Rules":
        """These rules with `drop` in place of `refuse`, so that a text that is too long raises no error."""
        prompts, responses = (("drop" if given == "refuse" else given) for given in (self.long_prompts, self.long_responses))
        return replace(self, long_prompts=prompts, long_responses=responses)

    @property
    def limit(self) -> int:
        """Largest number of tokens in a prompt. It is below `max_length`, so that an answer has room for at least one token."""
        return min(self.max_prompt, self.max_length - 1)


def of_one_turn(turns: Turns) -> Turns:
    """Return the value of `turns` for a use that needs exactly one turn of each row, such as evaluation or sampling: `last` in place of
    `all`. Other values are returned unchanged."""
    return "last" if turns == "all" else turns


def limit_key(limit: int, max_length: int) -> str:
    """Return the recipe's key that limits prompts to `limit` tokens, with its value, as in ``data.max_prompt (256)``."""
    return f"data.max_prompt ({limit})" if limit + 1 < max_length else f"data.max_length ({max_length})"


@dataclass(frozen=True)
class Counts:
    """Counts of a split's rows for one tokenizer: all rows, and the rows that were left out or cut."""

    rows: int
    long: int = 0
    """Number of rows that were left out because their prompt has more than `limit` tokens. A row with several turns is left out only if
    all its turns are left out. If the turns have different reasons (`long`, `empty`, `answers`), the row is counted only under the most
    frequent reason."""
    empty: int = 0
    """Number of rows that were left out because their prompt has no tokens."""
    cut: int = 0
    """Number of rows whose prompt was cut to `limit` tokens."""
    unopened: int = 0
    """Number of the rows in `cut` that lost the generation prompt (the start of the assistant's turn), because a chat template wrote the
    prompt and its end was cut off."""
    shortened: int = 0
    """Number of rows whose response was cut, because prompt and response had more than `max_length` tokens. A cut response has no end
    token."""
    long_context: int = 0
    """Number of rows that were left out because the teacher's own prompt has more than `context_limit` tokens."""
    cut_context: int = 0
    """Number of rows whose teacher's prompt was cut to `context_limit` tokens."""
    limit: int = 0
    max_length: int = 0
    context_limit: int = 0
    turns: int = 0
    """Number of turns that were left out because they are too long, although other turns of the same row are learnt."""
    answers: int = 0
    """Number of rows that were left out because prompt and response have more than `max_length` tokens."""
    more: int = 0
    """Number of additional sequences. A row becomes more than one sequence if the chat template rewrites its earlier turns."""
    unlearnt: int = 0
    """Number of rows whose last message has thinking or tool calls that are not learnt."""
    silent: int = field(default=0, compare=False)
    """Number of rows with an empty response. Training learns only the token that ends it."""
    marked: int = field(default=0, compare=False)
    """Number of rows with the text of a special token, such as `</s>`, in an instruction, a message or a response. The text is encoded as
    this token."""
    roles: int = field(default=0, compare=False)
    """Number of rows with a message whose role is unusual, and which the chat template does not name."""
    unknown: int = field(default=0, compare=False)
    """Number of tokens of the kept prompts that are the tokenizer's unknown token, which replaces text that the tokenizer cannot read."""
    tokens: int = field(default=0, compare=False)
    """Number of all tokens of the kept prompts."""

    @property
    def used(self) -> int:
        """The number of rows that are not left out."""
        return self.rows - self.long - self.empty - self.answers - self.long_context

    def plus(self, **numbers: int) -> "Counts":
        """Return these counts, with each of the `numbers` added to the field of its name."""
        return replace(self, **{name: getattr(self, name) + number for name, number in numbers.items()})

    @property
    def text(self) -> str:
        """Return text such as ``476 of 500 rows; 24 longer than data.max_prompt (256)``. The text is empty if no row was left out,
        cut or unusual."""
        key = limit_key(self.limit, self.max_length)
        parts = [
            (self.long, f"{self.long} longer than {key}"),
            (self.answers, f"{self.answers} left out, with a reference longer than data.max_length ({self.max_length})"),
            (self.empty, f"{self.empty} with an empty prompt"),
            (self.cut, f"{self.cut} with a prompt cut at {key}"),
            (
                self.unopened,
                f"{self.unopened} of the cut prompts lost the chat's generation prompt, which was at their end (data.long_prompts)",
            ),
            (self.long_context + self.cut_context, self.of_contexts),
            (self.shortened, f"{self.shortened} with a reference cut at data.max_length ({self.max_length})"),
            (
                self.turns,
                f"{counted(self.turns, 'turn')} longer than {key} or data.max_length ({self.max_length}), left out of rows whose other "
                "turns are used",
            ),
            (
                self.more,
                f"{counted(self.more, 'additional sequence')}, because the chat template rewrites earlier turns (`epochs` counts rows)",
            ),
            (self.unlearnt, f"{self.unlearnt} with thinking or tool calls that are not learnt (data.turns: last learns them)"),
            (self.silent, f"{self.silent} with an empty answer"),
            (self.marked, f"{self.marked} with the text of a special token (such as an end token), which the model reads as this token"),
            (self.roles, f"{self.roles} with a message of an unusual role (not system, developer, user, assistant, tool or function)"),
        ]
        found = [text for count, text in parts if count]
        return "; ".join([f"{self.used} of {counted(self.rows, 'row')}", *found]) if found else ""

    @property
    def of_contexts(self) -> str:
        """Return the part of `text` about the teacher's own prompts, such as ``24 with a teacher's prompt longer than …``."""
        key = f"context.max_prompt ({self.context_limit})"
        if self.long_context:
            return f"{self.long_context} left out, because the teacher's prompt is longer than {key}"
        return f"{self.cut_context} with a teacher's prompt that is cut at {key}" if self.cut_context else ""

    @property
    def unknown_text(self) -> str:
        """Return text such as ``12 of 345 tokens of the prompts are unknown to the tokenizer``. It is empty if no token is unknown."""
        return f"{self.unknown} of {self.tokens} tokens of the prompts are unknown to the tokenizer" if self.unknown else ""


def nothing_left(counts: Counts, shortest: int, name: str) -> str:
    """Return the error message for the split `name`, of which all rows are left out. `shortest` is the length of its shortest prompt in
    tokens."""
    if counts.long_context:
        return (
            f"no row of {name} has a teacher's prompt of at most {counts.context_limit} tokens; raise context.max_prompt, or set "
            "data.long_prompts: cut"
        )
    if counts.answers:
        return f"every row of {name} is too long for data.max_length ({counts.max_length}); raise it, or set data.long_responses: cut"
    if not counts.long:
        return f"every row of {name} has an empty prompt; give the rows an instruction or a prompt, or set data.template: alpaca"
    key = limit_key(counts.limit, counts.max_length).partition(" ")[0]
    return (
        f"no row of {name} has a prompt of at most {counts.limit} tokens (the shortest has {shortest}); raise {key}, or set "
        "data.long_prompts: cut"
    )
