"""A fast substitute for a tokenizer, used only to count tokens. The tokenizers of transformers load slowly and need torch.

Texts are split into tokens with tokenizer.json. If this file is not on the disk, a token is assumed to have four characters. Conversations
are written with the model's chat template if it is on the disk, or else as ChatML.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tadistill.config import ModelConfig, Recipe
from tadistill.config.data import World
from tadistill.data import chat, tinyworld
from tadistill.data.encoding_rules import Rules
from tadistill.data.tinyworld import TOKENIZERS, WORDS, backend
from tadistill.data.tinyworld import vocabulary as world_vocabulary
from tadistill.models import sources, tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN = -2
_WORD = r"\S+|\n"  # a token of tinyworld's words
Ids = Callable[[list[str]], Sequence[Sequence[Any]]]
"""A function that splits each text into tokens. The type of the tokens does not matter, because they are only counted and compared.
A piece of text that has no token becomes UNKNOWN."""
_CHATML = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['reasoning_content'] }}"
    "{{ m['content'] }}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class StandIn:
    """Splits texts into tokens, and applies a chat template. `data.encoding.encode` uses it in place of a tokenizer."""

    eos_token_id, bos_token_id, unk_token_id = -1, None, UNKNOWN

    def __init__(self, recipe: Recipe):
        loaded = [model for model in recipe.models.values() if model.load]  # models that teach each other share their tokenizer
        first, world = loaded[0], recipe.data.world
        ids, backend = _ids_of(first, world), _backend(first, world)
        self._source = first.load, first.tokenizer_source, first.revision, world.seed, world.people
        self.known, self.ids, self._backend = ids is not None, ids or _pieces, backend
        """`known`: the study's tokenizer is on this disk. `ids`: splits texts into tokens."""
        self.added_tokens_decoder: dict[int, Any] = backend.get_added_tokens_decoder() if backend else {}
        self.added_tokens_encoder = {token.content: i for i, token in self.added_tokens_decoder.items()}
        found = ((model, _chat(str(model.tokenizer_source), model.revision)) for model in loaded)
        self._chats, (template, self.special_tokens_map) = next(
            ((model, chats) for model, chats in found if chats[0]), (None, (None, dict[str, str]()))
        )
        self.chat_template, self.name_or_path = template or _CHATML, self._chats.tokenizer_source if self._chats else ""

    @property
    def identity(self) -> tuple[Any, ...]:
        """A value that is equal for two objects that split all texts alike and write all conversations alike."""
        return self._source, self.known, self.chat_template, str(self.special_tokens_map)

    def readable(self, rules: Rules) -> Rules:
        """Return `rules`, without `chat_template_kwargs` if none of the models has a chat template on this disk."""
        return rules if self._chats else replace(rules, chat_template_kwargs={})

    def cuts(self, text: str) -> list[int]:
        """Return the position at which each token of a text ends, in characters from the start of the text."""
        if self._backend:
            return [end for _, end in self._backend.encode(text, add_special_tokens=False).offsets]
        if self.known:
            return [match.end() for match in re.finditer(_WORD, text)]
        return [min(k + 4, len(text)) for k in range(0, len(text), 4)]

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict[str, Sequence[Sequence[Any]]]:
        return {"input_ids": [list(ids) for ids in self.ids(texts)]}

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        **variables: Any,
    ) -> str:
        known = {**self.special_tokens_map, **variables}
        return chat.unmarked(self.chat_template, messages, known, tools=tools, prompt=add_generation_prompt)


@lru_cache
def _chat(source: str, revision: str) -> tuple[str | None, Mapping[str, str]]:
    directory = None if source in TOKENIZERS else sources.locate(source, revision, weights=False)
    found = tokens.read(None, directory) if directory else tokens.Tokens(None)
    return found.template, found.specials


def _backend(model: ModelConfig, world: World) -> "Tokenizer | None":
    source = model.tokenizer_source
    if source in TOKENIZERS:
        return None if source == WORDS else backend(source, seed=world.seed, people=world.people)
    file = _tokenizer_file(model)
    return _from_file(file) if file else None


def _ids_of(model: ModelConfig, world: World) -> Ids | None:
    if model.tokenizer_source == WORDS:  # without `tokenizers`, which loads slowly
        words = {*tinyworld.words(seed=world.seed, people=world.people), *tinyworld.SPECIALS}
        return lambda texts: [[word if word in words else UNKNOWN for word in re.findall(_WORD, text)] for text in texts]
    found = _backend(model, world)
    if found is None:
        return None
    name = getattr(found.model, "unk_token", None)
    unknown = found.token_to_id(name) if name else None
    return lambda texts: [[UNKNOWN if i == unknown else i for i in e.ids] for e in found.encode_batch(texts, add_special_tokens=False)]


def vocabulary(model: ModelConfig, world: World) -> int | None:
    """Return the vocabulary size of a model's tokenizer. Return None if no JSON file on this disk has its tokens."""
    if model.tokenizer_source in TOKENIZERS:
        return len(world_vocabulary(model.tokenizer_source, seed=world.seed, people=world.people))
    if file := _tokenizer_file(model):
        content = json.loads(file.read_text(encoding="utf-8"))
        return len({*content["model"]["vocab"], *(t["content"] for t in content["added_tokens"])})
    directory = _directory(model)
    found = tokens.vocabulary_of(directory) if directory else None
    return len(found) if found else None


def _directory(model: ModelConfig) -> Path | None:
    source = model.tokenizer_source
    assert source is not None
    return sources.locate(source, model.revision, weights=False)


def _tokenizer_file(model: ModelConfig) -> Path | None:
    directory = _directory(model)
    file = directory / "tokenizer.json" if directory else None
    return file if file and file.is_file() else None


@lru_cache
def _from_file(file: Path) -> "Tokenizer":
    from tokenizers import Tokenizer  # not at the top, because not every study needs it

    backend = Tokenizer.from_file(str(file))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _pieces(texts: list[str]) -> list[list[str]]:
    return [[text[i : i + 4] for i in range(0, len(text), 4)] for text in texts]
