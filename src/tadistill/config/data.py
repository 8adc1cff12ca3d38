"""The data sets of a recipe, and how their rows become token sequences."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, PrivateAttr, Tag, field_validator, model_validator

from tadistill.config.common import MOST, Name, Strict
from tadistill.metrics import MEAN


class World(Strict):
    """The fictional world of the data sets whose names begin with tinyworld. These data sets are generated and need no download."""

    seed: int = 0
    """Seed of the world's facts and rows."""
    people: int = Field(default=120, ge=10, le=200)
    """Number of people in the world. With more people, there are more facts to learn."""


_LONGEST_SET = 200
_IN_TEMPLATES = ("instruction", "input", "output", "prompt")
Column = Literal["instruction", "input", "output", "prompt", "completion", "messages", "tools", "text", "choices", "facts",
                 "numeric", "choice", "math", "checks"]  # fmt: skip


class DataRef(Strict):
    """A data set. In a recipe, `NAME` is short for `{load: NAME}`."""

    text_sets: ClassVar[str] = "load"
    load: str
    """The data set: a known name (dolly, self_inst, vicuna, sinst, uinst, sinst/0_2, tinyworld…), a .jsonl file, a folder with SPLIT.jsonl
    files, or a hub id."""
    split: str | None = None
    """Name of the split to load. By default, it is the name of the key that uses the data set: train, dev or test."""
    revision: str = "main"
    """Hub revision: a branch, tag or commit."""
    columns: dict[Column, str] = {}
    """Maps tadistill's name of a column to the column's name in the file, if the two names differ. Some columns are loaded only if this
    mapping names them: `tools`, `choices`, `facts`, and the columns of right answers (`numeric`, `choice`, `math`, `checks`). For example,
    {choices: options, numeric: answer} loads the file's column `options` as `choices`, and its column `answer` as `numeric`."""
    choices: tuple[str, ...] = ()
    """Possible answers of a multiple-choice set, if they are the same for every row. An output that is an integer or a boolean is then an
    index into this list."""
    instruction: str | None = None
    """The instruction of every row, for a data set without instructions."""
    extra: tuple[str, ...] = ()
    """Names of further columns of the file, such as [document]. The template of a `context` can use them. A column contains a text, a
    number, or a list of texts. The texts of a list are joined with empty lines. Only training sets can have this key."""

    @model_validator(mode="after")
    def _check(self):
        if self.choices and (len(set(self.choices)) < max(2, len(self.choices)) or "" in self.choices):
            raise ValueError(f"`choices` are {list(self.choices)}; give at least two choices, all different and none of them empty")
        for name, given in (("choices", self.choices), ("instruction", self.instruction is not None)):
            if given and name in self.columns:
                raise ValueError(
                    f"`{name}` is set for every row, but `columns` also names a column for it (`{self.columns[name]}`); remove `{name}`, "
                    f"or remove it from `columns`"
                )
        if known := [name for name in self.extra if name in _IN_TEMPLATES]:
            raise ValueError(
                f"`extra` names `{known[0]}`, but a `context` can use this column without `extra`; remove the column from `extra`"
            )
        if len(self.name) > _LONGEST_SET:  # it becomes a part of file names
            raise ValueError(
                f"the name of the file or folder has {len(self.name)} characters; give it a name of at most {_LONGEST_SET} characters"
            )
        if self.instruction == "":
            raise ValueError("`instruction` is empty; write the instruction for every row, or remove the key")
        return self

    _folder: Path | None = PrivateAttr(default=None)
    """The folder of the recipe's file."""
    _called: str | None = PrivateAttr(default=None)
    """The name that the recipe gives to the data set, if it has one."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths at which a local data set is looked for: beside the recipe's file, and then in the working directory."""
        path = Path(self.load).expanduser()
        return tuple(dict.fromkeys([self._folder / path, Path.cwd() / path])) if self._folder else (path,)

    @property
    def name(self) -> str:
        """The short name of the data set in tables and file names."""
        if self._called:
            return self._called
        if self.load.startswith(("sinst/", "uinst/")):  # `0_2` alone would not name the set
            return self.load.replace("/", "_")
        return self.load.rsplit("/", 1)[-1].removesuffix(".jsonl")

    def plain(self, name: str) -> "DataRef":
        """Return a copy of this data set with the name `name`. The copy has no `weight`, even if this is a training set with a weight."""
        found = DataRef(**{field: getattr(self, field) for field in DataRef.model_fields})
        found._folder, found._called = self._folder, name
        return found


class TrainSet(DataRef):
    """One of several training sets, with its weight."""

    weight: float = Field(gt=0, le=1e6)
    """Weight of this set. The set's share of the training rows is its weight, divided by the sum of all weights. The number of its rows
    does not matter. After every update, the number of rows that were drawn from a set differs from its share by less than one."""


def _form(given: Any) -> str:
    # a mapping has names of sets, unless one of its keys is a key of a data set; a mapping of one key to a text is a mistyped data set
    if not isinstance(given, Mapping) or any(key in DataRef.model_fields for key in given):
        return ONE
    return SETS if len(given) > 1 or any(isinstance(part, Mapping | DataRef) for part in given.values()) else ONE


ONE, SETS = "<one set>", "<sets>"
"""Tags for the two forms of `data.train` and `data.dev`: one set, or several sets with names. Pydantic writes the tag into the location of
an error."""
TrainData = Annotated[Annotated[DataRef, Tag(ONE)] | Annotated[dict[Name, TrainSet], Tag(SETS)], Discriminator(_form)]
"""One training set, or several with names and weights."""
DevData = Annotated[Annotated[DataRef, Tag(ONE)] | Annotated[dict[Name, DataRef], Tag(SETS)], Discriminator(_form)]
"""One dev set, or one for each training set."""


OF_TRAINING = ("extra",)
"""Keys that only training sets have. `DataRef` is the class of all sets."""


def _without_extra(given: Any) -> Any:
    refs = given.values() if isinstance(given, dict) else given if isinstance(given, tuple) else (given,)
    for ref in refs:
        if ref and ref.extra:
            raise ValueError(
                f"data set `{ref.name}` has `extra`, but `extra` is only used in a `context`, and a `context` is only used in "
                "training; remove `extra`"
            )
    return given


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str | dict | DataRef) else value


def _distinct(test: tuple[DataRef, ...]) -> tuple[DataRef, ...]:
    names = [ref.name for ref in test]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two data sets have the name `{name}`; rename one of the files, or remove one data set")
    if MEAN in names:
        raise ValueError(f"a test set cannot be called `{MEAN}`, which means the mean over all test sets; rename the file or folder")
    return test


TestSets = Annotated[
    tuple[DataRef, ...],
    BeforeValidator(_listed, json_schema_input_type=DataRef | list[DataRef]),
    AfterValidator(_without_extra),
    AfterValidator(_distinct),
]
"""Test sets. A single one needs no list."""


class Limit(Strict):
    """The number of rows to use from the start of each data set, for quick trials. By default, all rows are used."""

    train: int | None = Field(default=None, ge=1, le=MOST)
    """Number of rows of each training set."""
    dev: int | None = Field(default=None, ge=1, le=MOST)
    """Number of rows of each dev set."""
    test: int | None = Field(default=None, ge=1, le=MOST)
    """Number of rows of each test set."""


Template = Literal["alpaca", "chat", "plain"]
LongText = Literal["drop", "cut", "refuse"]
Turns = Literal["answer", "last", "all"]
Thinking = Literal["keep", "drop", "mask"]


_OWN_VARIABLES = frozenset(("messages", "tools", "add_generation_prompt"))
"""Variables of a chat template that tadistill sets, so `chat_template_kwargs` must not set them."""


class Data(Strict):
    """The data sets of a study, and how their rows become token sequences."""

    train: TrainData
    """The data set on which models are trained. Write a name, a file, a folder or a hub id, or the keys of a data set. For several sets,
    choose a name for each set, and write the set's keys below this name: {maths: {load: maths.jsonl, weight: 1}, chat: {load: chat.jsonl,
    weight: 3}}. To split one file into train, dev and test, use the script in the page "Use your own data" of the documentation."""
    dev: Annotated[DevData, AfterValidator(_without_extra)]
    """The data set on which checkpoints and paths are chosen. A recipe in the short form (with `student`) may leave it out; it then keeps
    the last weights of the training. If there are several training sets, each may have a dev set of the same name:
    {maths: maths-dev.jsonl, chat: chat-dev.jsonl}. Dev values are then means over these sets, with the weights of the training sets."""
    test: TestSets
    """The data sets on which trained models are measured. A single data set needs no list."""
    corpus: Annotated[DataRef | None, AfterValidator(_without_extra)] = None
    """Plain text for the language-modelling part of MiniLLM's loss."""
    root: str | None = None
    """Folder of local data sets. The default is the environment variable TADISTILL_DATA."""
    template: Template = "alpaca"
    """Text around an instruction. `alpaca`: the Alpaca prompt, as in MiniLLM. `chat`: the tokenizer's chat template. `plain`: a line break
    after the instruction, and nothing else."""
    max_prompt: int = Field(default=256, ge=1, le=MOST)
    """Largest number of tokens in a prompt; 256 is MiniLLM's value."""
    long_prompts: LongText = "drop"
    """Treatment of a row whose prompt is longer than `max_prompt`. `drop`: the row is left out and counted. `cut`: the first `max_prompt`
    tokens are kept, as in MiniLLM's tests; a chat then loses its generation prompt. `refuse`: the study does not start."""
    max_length: int = Field(default=512, ge=2)
    """Largest number of tokens in a prompt together with its reference response. Sampled responses are not limited by it."""
    long_responses: LongText = "cut"
    """Treatment of a row whose prompt and reference response are longer than `max_length`. `cut`: the end of the response is cut off,
    together with its end token. `drop`: the row is left out and counted. `refuse`: the study does not start."""
    turns: Turns = "answer"
    """The part of a conversation on which the loss is computed. `answer`: the text of the last message and its end token. `last`: the last
    message as the chat template writes it, which can include thinking, tool calls and spaces. `all`: every message of the assistant, as the
    chat template writes it. Sampled text always answers the messages before the last one."""
    thinking: Thinking = "keep"
    """Treatment of the thinking before an answer, which is `reasoning_content` of a message, or `<think>…</think>` at the start of a text.
    `keep`: the chat template decides. `drop`: it is removed. `mask`: models read it, but it does not count in the loss."""
    chat_template_kwargs: dict[str, Any] = {}
    """Values for variables of the chat template, such as `{enable_thinking: false}`."""
    bos: Literal["auto", "never"] = "auto"
    """Use of the BOS token at the start of prompts and of plain text. `auto`: the tokenizer decides. `never`: no BOS, as in MiniLLM. With
    the template `chat`, the chat template decides."""
    limit: Limit = Limit()
    world: World = World()

    @property
    def sets(self) -> dict[str, DataRef]:
        """The training sets by name. A single set has the name of its data set."""
        if isinstance(self.train, DataRef):
            return {self.train.name: self.train}
        return {name: each.plain(name) for name, each in self.train.items()}

    @property
    def shares(self) -> dict[str, float]:
        """The share of each training set in the training rows, by name. The shares add up to 1."""
        if isinstance(self.train, DataRef):
            return {self.train.name: 1.0}
        total = sum(each.weight for each in self.train.values())
        return {name: each.weight / total for name, each in self.train.items()}

    @property
    def several(self) -> bool:
        """True if there are several training sets."""
        return not isinstance(self.train, DataRef)

    def dev_sets(self, sets: Collection[str] = ()) -> dict[str, DataRef]:
        """Return the dev sets by name, in the order of the training sets. A single dev set has the name of its data set.

        Args:
            sets: the names of the training sets whose dev sets are wanted. By default, all dev sets are returned.
        """
        if isinstance(self.dev, DataRef):
            return {self.dev.name: self.dev}
        return {name: self.dev[name].plain(name) for name in self.sets if name in sets or not sets}

    def splits(self, *, trains: bool = True) -> Iterator[tuple[Literal["train", "dev", "test"], DataRef]]:
        """Yield pairs of the name of a split and a data set. If `trains` is false, yield only the test sets."""
        if trains:
            for ref in self.sets.values():
                yield "train", ref
            for ref in self.dev_sets().values():
                yield "dev", ref
        for ref in self.test:
            yield "test", ref

    @model_validator(mode="before")
    @classmethod
    def _one_dev_set_by_name(cls, value: Any) -> Any:
        # in {maths: maths.jsonl}, maths is the name of a set and not a mistyped key, if it is one of several training sets
        train, dev = (value.get("train"), value.get("dev")) if isinstance(value, Mapping) else (None, None)
        if not (isinstance(train, Mapping) and isinstance(dev, Mapping)) or _form(train) != SETS or _form(dev) == SETS:
            return value
        return {**value, "dev": {name: {"load": given} for name, given in dev.items()}} if set(dev) <= set(train) else value

    @field_validator("train")
    @classmethod
    def _named(cls, train: Any) -> Any:
        if isinstance(train, dict) and len(train) == 1:
            raise ValueError(f"`{next(iter(train))}` is the only set; write its keys directly below `train`, without a name and a weight")
        for name in train if isinstance(train, dict) else ():
            if any(sign in f" {name} " for sign in (" + ", ">", " then ")):
                raise ValueError(
                    f"`{name}` cannot be used in a path, because paths are written with `+`, `>` and `then`; choose another name"
                )
        return train

    @field_validator("chat_template_kwargs")
    @classmethod
    def _plain(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name, value in given.items():
            if name in _OWN_VARIABLES:
                raise ValueError(f"tadistill sets `{name}` for each row, so a recipe cannot set it; remove this key")
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(f"`{name}` is {value!r}; write text, a number, true, false, null, or a list or map of these") from error
        return given

    @model_validator(mode="after")
    def _dev_of_each(self):
        if isinstance(self.dev, DataRef):
            return self
        if not self.several:
            raise ValueError("`data.dev` has sets with names, but `data.train` is one set; write one data set, without names")
        if unknown := [name for name in self.dev if name not in self.sets]:
            known = " and ".join(f"`{name}`" for name in self.sets)
            raise ValueError(
                f"`data.dev` has the set `{unknown[0]}`, but the sets of `data.train` are {known}; use the names of the training sets"
            )
        if missing := [name for name in self.sets if name not in self.dev]:
            raise ValueError(f"`data.dev` has no set `{missing[0]}`; add the dev set of this training set, or write one dev set for all")
        return self


def shares_text(shares: Mapping[str, float]) -> str:
    """Return the shares of training sets in words, such as "30 % of its rows from maths and 70 % from chat"."""
    first, *others = (f"{100 * share:.3g} %{{}} from {name}" for name, share in shares.items())
    *between, last = [first.format(" of its rows"), *(each.format("") for each in others)]
    return f"{', '.join(between)} and {last}" if between else last


def drawn_text(shares: Mapping[str, float], *, dev: bool) -> str:
    """Return a sentence about the shares of training sets. With `dev`, add a sentence: dev losses and metrics are means over several dev
    sets, weighted by these shares."""
    also = " Each dev value (loss or metric) is a mean over the dev sets of the same names, weighted by these shares." if dev else ""
    return f"Training draws {shares_text(shares)}.{also}"


def training_shares(data: Mapping[str, Any]) -> dict[str, float]:
    """Map each training set to its share of the training rows, given a recipe's `data` as plain data. Return {} for a single set."""
    weights = {} if "load" in data["train"] else {name: each["weight"] for name, each in data["train"].items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def training_refs(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the training sets of a recipe, given its `data` as plain data."""
    train = data["train"]
    return [train] if "load" in train else [*train.values()]
