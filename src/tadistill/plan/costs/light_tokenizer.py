"""A fast substitute for a tokenizer, used only to count tokens. The tokenizers of transformers load slowly and need torch.

Texts are split into tokens with tokenizer.json. If this file is not on the disk, a token is assumed to have four characters. Conversations
are written with the model's chat template if it is on the disk, or else as ChatML.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tadistill.config import ModelConfig, Recipe
from tadistill.config.data import World
from tadistill.data.encoding_rules import Rules
from tadistill.data.tinyworld import TOKENIZERS, backend
from tadistill.models import sources, tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN = -2
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
        self._source = first.load, first.tokenizer_source, first.revision, world.seed, world.people
        self._backend = backend = _backend(first, world)
        self.known = backend is not None
        """True if the study's tokenizer is on this disk."""
        unknown = getattr(backend.model, "unk_token", None) if backend else None
        self._unknown = backend.token_to_id(unknown) if backend and unknown else None
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

    def ids(self, texts: list[str]) -> list[list[Any]]:
        """Split each text into tokens. Their type does not matter, because they are only counted and compared. A piece of text that has no
        token becomes UNKNOWN."""
        if self._backend is None:
            return [[text[i : i + 4] for i in range(0, len(text), 4)] for text in texts]
        found = self._backend.encode_batch(texts, add_special_tokens=False)
        return [[UNKNOWN if i == self._unknown else i for i in each.ids] for each in found]

    def cuts(self, text: str) -> list[int]:
        """Return the position at which each token of a text ends, in characters from the start of the text."""
        if self._backend:
            return [end for _, end in self._backend.encode(text, add_special_tokens=False).offsets]
        return [min(k + 4, len(text)) for k in range(0, len(text), 4)]

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict[str, Sequence[Sequence[Any]]]:
        return {"input_ids": self.ids(texts)}


@lru_cache
def _chat(source: str, revision: str) -> tuple[str | None, Mapping[str, str]]:
    directory = None if source in TOKENIZERS else sources.locate(source, revision, weights=False)
    found = tokens.read(None, directory) if directory else tokens.Tokens(None)
    return found.template, found.specials


def _backend(model: ModelConfig, world: World) -> "Tokenizer | None":
    source = model.tokenizer_source
    assert source is not None
    if source in TOKENIZERS:
        return backend(source, seed=world.seed, people=world.people)
    directory = sources.locate(source, model.revision, weights=False)
    return tokens.fast_tokenizer(directory) if directory else None


def vocabulary(source: str, revision: str, world: World) -> tokens.Vocabulary | None:
    """Return the tokens of a tokenizer. Return None if no JSON file on this disk has them."""
    if source in TOKENIZERS:
        return tokens.of_tinyworld(source, **world.model_dump())
    directory = sources.locate(source, revision, weights=False)
    return tokens.vocabulary_of(directory) if directory else None
