"""Align two tokenisations of one text, byte for byte.

    student, teacher = read_again(ids, token_bytes(student_tokenizer), token_bytes(teacher_tokenizer))
    spans = align(student, teacher)

Both tokenisations are cut at their common byte boundaries. The text between two cuts is a span. A span consists of whole tokens on both
sides, so its log-probability under a model is the sum of the log-probabilities of its tokens. `tadistill.objectives.spans` has the losses.
The page "Different tokenizers" of the documentation has the mathematics.

Related methods are: Boizard et al. 2024 (ULD, arXiv 2402.12030), which truncates to the shorter sequence; Zhang et al. 2024 (DSKD, arXiv
2406.17328), which learns an attention between the two sequences; GOLD (TRL 1.16), which uses byte offsets of byte-level tokenizers; and
SimCT (arXiv 2605.07711), whose released code cuts only after tokens with the same text.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from tadistill.data.token_bytes import END, Piece, Reading, TokenBytes, valid_runs

NO_SPAN = -1
"""The span number of a token that is in no span. Such tokens exist, for instance, if the teacher cannot process the text to its end."""


@dataclass(frozen=True)
class Alignment:
    """The spans of a text. A span is the text between two neighbouring boundaries that two tokenisations have in common."""

    student: tuple[int, ...]
    """The number of the span of each student token. The spans are numbered from 0. A token in no span has `NO_SPAN`."""
    teacher: tuple[int, ...]
    """The number of the span of each teacher token, as in `student`. A token in no span has `NO_SPAN`."""
    ends: tuple[int, ...]
    """The position in the text at which each span ends. A position counts the bytes before it, and the events before it (special tokens,
    the end of the text)."""


def align(student: Reading, teacher: Reading) -> Alignment:
    """Cut two tokenisations of one text into spans at the boundaries that they have in common.

    A token that covers no byte of the text, such as the token `▁` that Llama 2 adds before a text, belongs to the span of the next token.
    If one tokenisation covers more text than the other, its tokens after the last common boundary are in no span.
    """
    mine, theirs = _ends(student.pieces), _ends(teacher.pieces)
    ends = sorted(set(mine) & set(theirs) - {0})
    return Alignment(tuple(_spans(student.pieces, mine, ends)), tuple(_spans(teacher.pieces, theirs, ends)), tuple(ends))


def read_again(ids: Sequence[int], student: TokenBytes, teacher: TokenBytes) -> tuple[Reading, Reading]:
    """Return two tokenisations (`Reading`) of the text that the student's ids spell: the student's own, and the teacher's.

    `ids` are the student's tokens of a response, sampled or from a data set. They follow a prompt.

    If both models have the same tokenizer, the teacher gets the same ids. Otherwise the teacher's tokenizer tokenises the text:

    - The first end token of the student becomes the teacher's end token. All later tokens are left out.
    - Another special token becomes the teacher's special token of the same name. If there is none, both tokenisations stop before it.
    - Bytes that are not valid UTF-8, such as half a character at the end of a cut text, become one token each (`Reading.lone`). The text
      before and after them is tokenised separately. If the teacher has no tokens for bytes, both tokenisations stop before them.

    So the student's tokenisation can be shorter than `ids`. The caller counts the missing tokens.
    """
    own = student.spell(ids)
    if END in own.pieces:
        own = own.first(own.pieces.index(END) + 1)
    if student.same(teacher):
        return own, own
    found, place = Reading(), 0
    for piece in _joined(own.pieces):
        more, complete = _read_piece(piece, teacher)
        found += more
        if not complete:
            limit = place + sum(map(_width, more.pieces))
            return own.first(bisect_right(_ends(own.pieces), limit)), found
        place += _width(piece)
    return own, found


def shared_tokens(student: TokenBytes, teacher: TokenBytes) -> tuple[list[int], list[int]]:
    """Return the ids of the tokens that both vocabularies have: a list for the student, and a list for the teacher in the same order.

    Tokens are matched by their bytes, so `Ġthe` of GPT-2 and `▁the` of Gemma are a pair. Special tokens are matched by their names, except
    end tokens (`TokenBytes.ends`): the first end token of the student is matched with the first of the teacher, and so on. Where several
    tokens of a vocabulary have the same bytes (`A` and `<0x41>` of Gemma), ordinary tokens are matched first. Some tokenizers (WordLevel,
    WordPiece) drop the spaces between words. For such a tokenizer, the bytes of a word include one space before the word. If both models
    have the same tokenizer, every id is matched with itself.
    """
    if student.same(teacher):
        every = sorted(student.tokenizer.get_vocab().values())
        return every, every
    mine, theirs = _by_piece(student), _by_piece(teacher)
    pairs = sorted(pair for piece, ids in mine.items() for pair in zip(ids, theirs.get(piece, ()), strict=False))
    return [a for a, _ in pairs], [b for _, b in pairs]


def cells(student: TokenBytes, teacher: TokenBytes, sizes: tuple[int, int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Divide the tokens of two vocabularies into cells (`objectives.spelling`). Return one list for the student and one for the teacher. A
    list has one pair per token: (number of the token's cell, length of the cell's root).

    All tokens of a cell begin with the same bytes, the root of the cell. The cells are found in three steps:

    - The text of each token is tokenised with the other model's tokenizer. A link connects the token with the first token of the result
      (`_first_token`).
    - Tokens that links connect, directly or through other tokens, are put into one cell.
    - Tokens that no link connects with another token are put into two more cells, which come last: first a cell with all such tokens of
      the student, then one with those of the teacher. These two cells have no root, and its length is given as 1.

    Args:
        sizes: the number of logits of each model. Ids that are not in the tokenizer are in one of the last two cells.
    """
    sides = student, teacher
    links = [[_first_token(a, i, b) for i in range(min(size, len(a.pieces)))] for a, b, size in zip(sides, sides[::-1], sizes, strict=True)]
    roots: dict[tuple[int, int], tuple[int, int]] = {}

    def root(side: int, token: int) -> tuple[int, int]:
        path = list[tuple[int, int]]()
        place: tuple[int, int] = (side, token)
        while place not in path and place not in roots:
            path.append(place)
            after = links[place[0]][place[1]] if place[1] < len(links[place[0]]) else None
            if after is None:
                break
            place = 1 - place[0], after
        found = roots.get(place) or min(path[path.index(place) :])
        roots.update(dict.fromkeys(path, found))
        return found

    of_tokens = [[root(side, token) for token in range(size)] for side, size in enumerate(sizes)]
    both = sorted(set(of_tokens[0]) & set(of_tokens[1]))
    number = {found: cell for cell, found in enumerate(both)}
    lengths = [_width(sides[side].piece(token) or b"") for side, token in both]
    mine, theirs = (
        [(number[f], lengths[number[f]]) if f in number else (len(both) + side, 1) for f in found] for side, found in enumerate(of_tokens)
    )
    return mine, theirs


def _first_token(vocabulary: TokenBytes, token: int, other: TokenBytes) -> int | None:
    """Tokenise the text of a token with the other tokenizer. Return the first token of the result.

    Return None if the token has no text, or if the result is empty. Also return None if the token's text does not begin with the bytes of
    the result's first token, for example because a normaliser changed the text.
    """
    piece = vocabulary.piece(token)
    if not piece:
        return None
    found, _ = _read_piece(piece, other)
    first = other.piece(found.ids[0]) if found.ids and found.exact[0] else None
    begins = piece.startswith(first) if isinstance(piece, bytes) and isinstance(first, bytes) else piece == first
    return found.ids[0] if begins else None


def _by_piece(vocabulary: TokenBytes) -> dict[Piece, list[int]]:
    found: dict[Piece, list[int]] = {}
    rest = [i for i in range(len(vocabulary.pieces)) if i not in vocabulary.ends]
    for i in [*vocabulary.ends, *sorted(rest, key=lambda i: i in vocabulary.fallback)]:
        piece = vocabulary.piece(i)
        if piece:
            found.setdefault(piece, []).append(i)
    return found


def _read_piece(piece: Piece, teacher: TokenBytes) -> tuple[Reading, bool]:
    if isinstance(piece, str):
        token = teacher.of_event.get(piece)
        return (Reading(), False) if token is None else (Reading((token,), (piece,), (True,)), True)
    found = Reading()
    for run, valid in valid_runs(piece):
        if valid:
            more = teacher.read(run.decode())
        elif teacher.of_byte.keys() >= set(run):
            tokens = tuple(teacher.of_byte[byte] for byte in run)
            more = Reading(tokens, tuple(bytes([byte]) for byte in run), (True,) * len(run), lone=len(run))
        else:
            return found, False
        found += more
        if not more.ids:  # the tokenizer drops all of this text
            return found, False
    return found, True


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    runs: list[Piece] = []
    for piece in pieces:
        if runs and isinstance(piece, bytes) and isinstance(runs[-1], bytes):
            runs[-1] += piece
        elif piece:
            runs.append(piece)
    return runs


def _width(piece: Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else 1


def _ends(pieces: Sequence[Piece]) -> list[int]:
    return list(accumulate(map(_width, pieces)))


def _spans(pieces: Sequence[Piece], places: Sequence[int], ends: Sequence[int]) -> list[int]:
    found = []
    for piece, place in zip(pieces, places, strict=True):
        span = (bisect_left if piece else bisect_right)(ends, place)
        at_the_end = not piece and ends and span == len(ends) and place == ends[-1]
        found.append(span - 1 if at_the_end else span if span < len(ends) else NO_SPAN)
    return found
