"""Find the bytes of a text that each token stands for, for any tokenizer of `transformers`.

Two models with different tokenizers have only the text in common, and the smallest common unit of text is the byte. A token stands for
bytes (`b" the"`), or for an event: a special token, or the end of the text (`END`). There are three kinds of tokenizers, with different
decoders:

    byte-level BPE (GPT-2, SmolLM2, Qwen)           a token is a string of characters, one for each byte
    SentencePiece (Llama 2, Gemma, Mistral)         `▁` is a space, and `<0xE2>` is a byte
    all others (WordLevel, WordPiece, T5)           a token has no bytes of its own; the tokenizer's offsets say which text it covers

The third kind drops text, mostly spaces. Normalisers (NFC in Qwen) change text. A token then still gets a piece of the original text, and
`Reading.exact` is False for this token.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tadistill.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = bytes | str
"""The bytes of the text for which a token stands. For a token that stands for an event (a special token, the end of the text), the name of
the event."""
END = "the end of the text"
"""The event of every token that ends a text. Each model has its own end tokens."""


@dataclass(frozen=True)
class Reading:
    """One tokenisation of a text. The text consists of the pieces of the tokens, one after the other."""

    ids: tuple[int, ...] = ()
    pieces: tuple[Piece, ...] = ()
    exact: tuple[bool, ...] = ()
    """True for a token that spells its piece. False if a normaliser changed the text, or if the token is the unknown token."""
    dropped: int = 0
    """Number of bytes that no token covers, such as the spaces between words. They belong to the piece of a neighbouring token."""
    lone: int = 0
    """Number of bytes that are not valid UTF-8. Each has a token of its own, because a tokenizer can only encode valid text."""

    def __add__(self, other: "Reading") -> "Reading":
        """Return the tokenisation of the first text followed by the second text."""
        joined = (self.ids + other.ids, self.pieces + other.pieces, self.exact + other.exact)
        return Reading(*joined, self.dropped + other.dropped, self.lone + other.lone)

    def first(self, count: int) -> "Reading":
        """Return the first `count` tokens. `dropped` and `lone` are not changed."""
        return replace(self, ids=self.ids[:count], pieces=self.pieces[:count], exact=self.exact[:count])

    @property
    def changed(self) -> int:
        """Number of bytes in pieces that their tokens do not spell (`exact` is False)."""
        return sum(len(piece) for piece, exact in zip(self.pieces, self.exact, strict=True) if not exact)


@dataclass(frozen=True)
class TokenBytes:
    """A tokenizer, and the bytes or the event of each of its tokens. `token_bytes` creates it."""

    tokenizer: "PreTrainedTokenizerBase"
    tokens: tuple[str | None, ...]
    """The tokenizer's own string for each id. None for an id without a token."""
    pieces: tuple[Piece | None, ...]
    """The bytes or the event of each id. None for ids without a token, and for tokens without bytes of their own (WordLevel and others)."""
    ends: tuple[int, ...]
    """Ids of the tokens that end a text. The first of them is put at the end when a text is encoded."""
    fallback: frozenset[int]
    """Ids of tokens such as `<0xE2>`, which a tokenizer writes only for bytes without any other token."""
    spelled: bool
    """True if text tokens have bytes of their own, so that token ids alone give the exact text."""
    adds_space: bool
    """True if the tokenizer writes a space before the first word of a text, as Llama 2 does."""

    def same(self, other: "TokenBytes") -> bool:
        """Return True if every id is the same token in both vocabularies, and the same tokens end a text."""
        return self is other or (self.ends == other.ends and self.tokens == other.tokens and self.pieces == other.pieces)

    @cached_property
    def of_byte(self) -> dict[int, int]:
        """Maps a byte to the id of the token that is this byte alone."""
        return {piece[0]: i for i, piece in enumerate(self.pieces) if isinstance(piece, bytes) and len(piece) == 1}

    @cached_property
    def of_event(self) -> dict[str, int]:
        """Maps the name of an event to the id of its token. The end of the text is mapped to the first id in `ends`."""
        found = {piece: i for i, piece in enumerate(self.pieces) if isinstance(piece, str)}
        return found | ({END: self.ends[0]} if self.ends else {})

    def piece(self, token: int) -> Piece | None:
        """Return the bytes or the event of a token inside a text. A word of WordLevel or WordPiece gets a space before it.

        Return None for an id without a token, and for an unknown token. Return None for words too if the tokenizer has a normaliser,
        because a word then stands for several texts.
        """
        name, known = self.tokens[token], self.pieces[token]
        backend: Any = self.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        if known is not None or self.spelled or name is None or token == self.tokenizer.unk_token_id or backend.normalizer:
            return known
        return name.removeprefix("##").encode() if name.startswith("##") or name.isspace() else f" {name}".encode()

    def spell(self, ids: Sequence[int]) -> Reading:
        """Return the text of token ids that follow a prompt, for instance of sampled tokens. Stop before the first token with unknown
        bytes."""
        if not self.spelled:
            return self._spell_by_text(ids)
        found: list[Piece] = []
        for i in ids:
            piece = self.pieces[i] if i < len(self.pieces) else None
            if piece is None:
                break
            found.append(piece)
        return Reading(tuple(ids[: len(found)]), tuple(found), (True,) * len(found))

    def read(self, text: str, *, first: bool = False) -> Reading:
        """Tokenise a text. The name of a special token in it, such as `</s>`, is tokenised as ordinary text.

        Args:
            first: True if nothing comes before the text; the tokenizer may then add a space. False if the text follows a prompt; no space
                is then added.
        """
        before = "\n" if self.adds_space and not first else ""
        found = self.tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
        ids: list[int] = list(found["input_ids"])
        data = (before + text).encode()
        pieces: list[Any] = [self.pieces[i] for i in ids]
        if self.adds_space and pieces and isinstance(pieces[0], bytes):
            pieces[0] = pieces[0].removeprefix(b" ")
        if all(isinstance(piece, bytes) for piece in pieces) and b"".join(pieces) == data:
            reading = Reading(tuple(ids), tuple(pieces), (True,) * len(ids))
        else:
            reading = self._by_offsets(before + text, ids, pieces, found["offset_mapping"])
        if not before:
            return reading
        return _without(reading, before.encode()) or self.read(text, first=True)

    def _by_offsets(self, text: str, ids: list[int], spelled: list[Any], offsets: Sequence[tuple[int, int]]) -> Reading:
        cuts, dropped = _clean_cuts(text, offsets)
        pieces: list[Piece] = []
        exact: list[bool] = []
        for (start, first), (stop, last) in pairwise(cuts):
            whole, own = text[start:stop].encode(), spelled[first:last]
            if all(isinstance(piece, bytes) for piece in own) and b"".join(own) == whole:
                pieces += own
                exact += [True] * len(own)
            else:
                pieces += [b""] * (last - first - 1) + [whole]
                covered = text[offsets[first][0] : offsets[last - 1][1]]
                exact += [own == [None] and self._is_word(ids[first], covered)] * (last - first)
        return Reading(tuple(ids), tuple(pieces), tuple(exact), dropped)

    def _is_word(self, token: int, covered: str) -> bool:
        return str(self.tokenizer.convert_ids_to_tokens(token)).removeprefix("##") == covered and token != self.tokenizer.unk_token_id

    def _spell_by_text(self, ids: Sequence[int]) -> Reading:
        # decode the ids between two events, and tokenise this text again; stop if this gives other ids
        empty = whole = Reading()
        at = 0
        for stop, event in [
            *((k, i) for k, i in enumerate(ids) if i < len(self.pieces) and isinstance(self.pieces[i], str)),
            (len(ids), None),
        ]:
            run = tuple(ids[at:stop])
            again = self.read(str(self.tokenizer.decode([*run], clean_up_tokenization_spaces=False))) if run else empty
            if again.ids != run:
                return whole
            whole += again
            if event is not None:
                name = self.pieces[event]
                assert isinstance(name, str)
                whole += Reading((event,), (name,), (True,))
            at = stop + 1
        return whole


def token_bytes(tokenizer: "PreTrainedTokenizerBase", ends: Sequence[int] | None = None) -> TokenBytes:
    """Return the bytes or the event of each token of a tokenizer.

    Args:
        ends: ids that end a text. The default is the tokenizer's EOS. A model can have more, such as the end of a chat turn.

    Raises:
        DataError: the tokenizer is not a fast one (of the library `tokenizers`), or an end is not one of its ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"the tokenizer is a {type(tokenizer).__name__}, which gives no offsets; load the fast tokenizer of the same model")
    eos: Any = tokenizer.eos_token_id
    ends = tuple(ends) if ends is not None else () if eos is None else (eos,)
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    unknown = [i for i in ends if i not in by_id]
    if unknown:
        raise DataError(f"`ends` has the id {unknown[0]}, but the tokenizer has {len(by_id)} tokens; give ids of its own tokens")
    steps = _steps(backend.decoder)
    kinds = {step["type"] for step in steps}
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    tokens = tuple(by_id.get(i) for i in range(max(by_id, default=-1) + 1))
    pieces: list[Piece | None] = [None if token is None else _piece(token, kinds) for token in tokens]
    for i, token in added.items():
        pieces[i] = token.content if token.special else token.content.encode()
    for i in ends:
        pieces[i] = END
    fallback = frozenset(i for i, token in enumerate(tokens) if token and "ByteFallback" in kinds and _BYTE_NAME.fullmatch(token))
    adds = any(
        (step["type"] == "Strip" and step["start"] > 0)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        or (step["type"] == "ByteLevel" and step["add_prefix_space"])
        for step in [*(step for step in steps if step["type"] != "ByteLevel"), *_steps(backend.pre_tokenizer)]
    )
    return TokenBytes(tokenizer, tokens, tuple(pieces), ends, fallback, bool(kinds & {"ByteLevel", *_WORDS}), adds)


def valid_runs(data: bytes) -> list[tuple[bytes, bool]]:
    """Cut bytes into parts that are valid UTF-8 and parts that are not. Return pairs (part, True if it is valid). Between two valid parts
    there is always an invalid part."""
    runs: list[tuple[bytes, bool]] = []
    while data:
        try:
            data.decode()
            return [*runs, (data, True)]
        except UnicodeDecodeError as error:
            if error.start:
                runs.append((data[: error.start], True))
            runs.append((data[error.start : error.end], False))
            data = data[error.end :]
    return runs


def _steps(part: Any) -> list[dict[str, Any]]:
    """Return the settings of a decoder or pre-tokenizer as a list of single steps."""
    state: dict[str, Any] = json.loads(part.__getstate__()) if part is not None else {"type": "none"}
    return state.get("decoders") or state.get("pretokenizers") or [state]


def _byte_level() -> dict[str, int]:
    # GPT-2 writes printable characters of Latin-1 as themselves, and the other 68 bytes as the characters from 256 on
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + k): byte for k, byte in enumerate(other)}


_BYTE_OF = _byte_level()


_WORDS = ("Metaspace", "ByteFallback")
_BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")


def _piece(token: str, kinds: set[str]) -> bytes | None:
    if "ByteLevel" in kinds:
        found = [_BYTE_OF.get(character) for character in token]
        return None if None in found else bytes(byte for byte in found if byte is not None)
    if "ByteFallback" in kinds and _BYTE_NAME.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode() if kinds & {*_WORDS} else None


def _without(reading: Reading, before: bytes) -> Reading | None:
    """Return `reading` without the tokens of the text `before`, with which it begins. Return None if one token covers the end of `before`
    and later text."""
    found = b""
    for k, piece in enumerate(reading.pieces):
        if found == before:
            return replace(reading, ids=reading.ids[k:], pieces=reading.pieces[k:], exact=reading.exact[k:])
        found += piece if isinstance(piece, bytes) else b""
    return Reading() if found == before else None


def _clean_cuts(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], int]:
    """Find the places at which the text can be cut without cutting a token. Return them as pairs (index of a character, index of a token).
    Also return the number of bytes that no token covers.

    Between two tokens there can be text that no token covers. The part of it before the first white space belongs to the previous token,
    because it consists of marks, such as accents, that a normaliser joined with a letter. The rest, which begins with the white space,
    belongs to the next token.
    """
    if not offsets:
        return [(0, 0)], len(text.encode())
    later = [*offsets]
    for k in range(len(offsets) - 2, -1, -1):
        later[k] = (min(offsets[k][0], later[k + 1][0]), 0)
    cuts, reached, dropped = [(0, 0)], 0, len(text[: offsets[0][0]].encode())
    for k, (_, stop) in enumerate(offsets[:-1]):
        reached = max(reached, stop)
        following = later[k + 1][0]
        if reached <= following and reached > cuts[-1][0]:
            gap = text[reached:following]
            dropped += len(gap.encode())
            marks = next((n for n, character in enumerate(gap) if character.isspace()), len(gap))
            cuts.append((reached + marks, k + 1))
    reached = max(reached, offsets[-1][1])
    return [*cuts, (len(text), len(offsets))], dropped + len(text[reached:].encode())
