"""The two tokenizers of tinyworld. Both encode the same rows, so models with different tokenizers can be compared on the same text.

    tinyworld        each word is one token, and so is each line break; spaces are not tokens
    tinyworld-bpe    byte-level BPE with 512 tokens, learnt from the training rows of the world; rare words have several tokens

Both tokenizers have the special tokens `SPECIALS`, with the same ids. A world of another seed or size has other words, and so its
tokenizers have other tokens.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from tadistill.data.tinyworld import SPECIALS, words, world_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

WORDS, PIECES = "tinyworld", "tinyworld-bpe"
TOKENIZERS = (WORDS, PIECES)
"""The values of `tokenizer` in a recipe that name a tokenizer of tinyworld."""
_SIZE = 512


def tokenizer(source: str = WORDS, *, seed: int = 0, people: int = 120) -> "PreTrainedTokenizerFast":
    """Return a tokenizer of a world. `source` is one of `TOKENIZERS`. No special tokens are added to a text."""
    from tokenizers import Tokenizer  # imported here, because rows are also needed without these packages
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_saved(source, seed, people)),  # a copy, because the caller may change it
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,  # " ." is a word here, not a spacing mistake
    )


def backend(source: str, *, seed: int = 0, people: int = 120) -> "Tokenizer":
    """Return a tokenizer of a world as an object of the library `tokenizers`, which needs no torch. It must not be changed."""
    return _built(source, seed, people)


def vocabulary(source: str, *, seed: int = 0, people: int = 120) -> Mapping[str, int]:
    """Return a mapping from each token of a tokenizer to its id. It includes the special tokens."""
    if source == WORDS:
        return {word: i for i, word in enumerate((*SPECIALS, *words(seed=seed, people=people)))}
    return _built(source, seed, people).get_vocab()


@lru_cache
def _saved(source: str, seed: int, people: int) -> str:
    return _built(source, seed, people).to_str()


@lru_cache
def _built(source: str, seed: int, people: int) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if source == WORDS:
        found = Tokenizer(models.WordLevel(dict(vocabulary(source, seed=seed, people=people)), unk_token="<unk>"))
        found.pre_tokenizer = pre_tokenizers.Split(Regex(r"\S+|\n"), behavior="removed", invert=True)
        return found
    assert source == PIECES, f"tinyworld has no tokenizer `{source}`"
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    # the library breaks ties by the ids of tokens, so the same rows give the same tokens on every machine
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZE, special_tokens=[*SPECIALS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    rows = world_rows("tinyworld", "train", seed=seed, people=people)
    found.train_from_iterator((text for row in rows for text in (row["instruction"], row["input"], *row["outputs"])), trainer)
    return found
