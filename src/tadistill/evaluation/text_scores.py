"""Compute scores of generated text, from 0 to 100: agreement with references, correct facts, repetition and variety.

`score_answers` computes the scores of one decoding seed. `score_seeds` and `score_set` need the answers of all decoding seeds. To add a
text metric, add a line to one of these functions, and a row to `tadistill.metrics`. Except in ROUGE-L, words are separated by white space.
"""

import math
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from tadistill.data.answers import RULES
from tadistill.data.rows import Example, Facts, beyond_ascii, is_symbol, repeated_grams
from tadistill.errors import ConfigError
from tadistill.text import named, without_spaces
from tadistill.user_code import OwnFunction

_BLEU_ORDER = 4
_DISTINCT = (1, 2, 4)
_PUNCTUATION = str.maketrans("", "", string.punctuation)

# --- all scores of a set --------------------------------------------------------------------------------------------------


def score_quality(predictions: Sequence[str], examples: Sequence[Example], *, metric: str = "") -> dict[str, list[float]]:
    """Return several scores of every prediction. Dev evaluations use only these scores.

    `rouge_l` is always included, and `fact_accuracy` if every example has facts. If the examples have right answers, there is one score
    per rule of `data.answers`. `rouge_l_unicode` is added if `metric` is its name, or if `rouge_l` ignores too many letters (`UNSEEN`).
    """
    references = [e.references for e in examples]
    scores = {"rouge_l": rouge_l(predictions, references)}
    if metric == "rouge_l_unicode" or unseen(references) >= UNSEEN:
        scores["rouge_l_unicode"] = rouge_l_unicode(predictions, references)
    if all(e.facts for e in examples):
        scores["fact_accuracy"] = fact_accuracy(predictions, [e.facts for e in examples])
    return scores | {rule: answer_accuracy(rule, predictions, [e.answers[rule] for e in examples]) for rule in examples[0].answers}


def score_answers(predictions: Sequence[str], tokens: Sequence[Sequence[int]], examples: Sequence[Example]) -> dict[str, list[float]]:
    """Return all scores of the answers of one decoding seed, with one value per prompt. `tokens` are the token ids of the answers."""
    return score_quality(predictions, examples) | {
        "exact_match": exact_match(predictions, [e.references for e in examples]),
        "length": [float(len(ids)) for ids in tokens],
        "repetition": repetition(tokens),
    }


def score_seeds(predictions: Mapping[int, Sequence[str]]) -> dict[str, list[float]]:
    """Compare the answers of several decoding seeds. Return scores with one value per prompt, or an empty dict if there is one seed."""
    return {"self_bleu": self_bleu(list(zip(*predictions.values(), strict=True)))} if len(predictions) > 1 else {}


def score_set(predictions: Mapping[int, Sequence[str]]) -> dict[str, float]:
    """Return the scores of a whole set: the percentage of different n-grams (`distinct`), averaged over the decoding seeds."""
    return {f"distinct_{n}": float(np.mean([distinct(of_seed, n) for of_seed in predictions.values()])) for n in _DISTINCT}


# --- agreement with references ----------------------------------------------------------------------------------------------


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return ROUGE-L of each prediction as MiniLLM computes it: the F-measure with Porter stemming, times 100.

    If a prediction has several references, the best score counts.
    """
    return _best_rouge(_ascii_words, predictions, references)


UNSEEN = 0.01
"""Limit for the share (0-1) of letters and digits that rouge_l ignores (`unseen`). If the share reaches the limit, reports warn about
rouge_l, and rouge_l_unicode is computed too."""


def unseen(references: Sequence[Sequence[str]]) -> float:
    """Return the share (0-1) of the references' letters and digits that `rouge_l` ignores, averaged over the rows.

    `rouge_l` reads only a-z, A-Z and 0-9.
    """
    shares = [beyond_ascii("".join(of_row)) for of_row in references]
    return sum(shares) / len(shares) if shares else 0.0


def rouge_l_unicode(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return ROUGE-L over words of any script, times 100. If there are several references, the best score counts. On ASCII text it equals
    `rouge_l`.

    Texts are first normalised (Unicode NFKC) and converted to lower case. A word is then a run of letters, marks and digits. There are two
    exceptions. In scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan), each character is a word. Each symbol
    that is not ASCII, such as an emoji, is a word too. Only ASCII words are stemmed.
    """
    return _best_rouge(_unicode_words, predictions, references)


def _best_rouge(split: Callable[[str], list[str]], predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    pairs = zip(predictions, references, strict=True)
    return [100 * max(_f_measure(answer, split(r)) for r in refs) for answer, refs in ((split(p), refs) for p, refs in pairs)]


def _f_measure(answer: Sequence[str], reference: Sequence[str]) -> float:
    # equals rouge_score's value, whose own table of n x m numbers takes seconds and hundreds of MB for thousands of words
    from rouge_score import scoring

    if not (answer and reference):
        return 0.0
    common = _longest_common(answer, reference)
    return scoring.fmeasure(common / len(answer), common / len(reference))


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    # length of the longest common subsequence (Hyyrö 2004, "Bit-parallel LCS-length computation revisited"): one integer is a row of the
    # usual table, and bit i is 0 where the length grows at word i of `one`
    places: dict[str, int] = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    row = full = (1 << len(one)) - 1
    for word in other:
        if word in places:
            equal = row & places[word]
            row = (row + equal | row - equal) & full
    return len(one) - row.bit_count()


_PRESENTATION = "\ufe0e\ufe0f"  # they choose between the text form and the colour form of a symbol


def words(text: str) -> list[str]:
    """Split a text into words as `rouge_l_unicode` does, without stemming."""
    found: list[str] = []
    open_word = False
    for c in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower()):
        if c in _PRESENTATION:
            continue
        if unicodedata.category(c)[0] == "M" and found and open_word:  # a mark belongs to the letter before it
            found[-1] += c
        elif not (c.isalnum() or is_symbol(c)):
            open_word = False
        elif _stands_alone(c) or not open_word or _stands_alone(found[-1][0]):
            found.append(c)
            open_word = True
        else:
            found[-1] += c
    return found


def _stands_alone(c: str) -> bool:
    return is_symbol(c) or without_spaces(c)


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return 100 for each prediction that equals one of its references after normalisation, else 0.

    Normalisation converts to lower case, removes ASCII punctuation, and replaces white space by single spaces. Articles are kept, as in
    MiniLLM. SQuAD's rule (arXiv:1606.05250) removes them.
    """
    return [100.0 * (_plain(p) in map(_plain, refs)) for p, refs in zip(predictions, references, strict=True)]


def fact_accuracy(predictions: Sequence[str], facts: Sequence[Facts]) -> list[float]:
    """Return one percentage per prediction: the share of its prompt's facts that the prediction states.

    A prediction states a fact if it contains the fact's value and none of the wrong values that are listed with the fact. It contains a
    value that stands in it as words of its own: `Paris` is in "(Paris)", but not in "Parisian". Capital and small letters differ.
    """

    def says(text: str, phrase: str) -> bool:
        return phrase != "" and phrase in text and any(named(phrase, text))

    def states(text: str, value: str, rivals: Sequence[str]) -> bool:
        return says(text, value) and not any(says(text, rival) for rival in rivals)

    return [100 * sum(states(p, *fact) for fact in known) / len(known) for p, known in zip(predictions, facts, strict=True)]


def answer_accuracy(rule: str, predictions: Sequence[str], answers: Sequence[Any]) -> list[float]:
    """Return 100 for each prediction that is right by a rule of `data.answers`, else 0. `answers` are the right answers."""
    return [100.0 * RULES[rule].right(p, right) for p, right in zip(predictions, answers, strict=True)]


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())


@lru_cache
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer  # here: it imports scipy.stats, which most stages do not need

    # the stems of frequent words are kept, because stemming takes longer than the rest of a score
    return SimpleNamespace(stem=lru_cache(maxsize=2**16)(PorterStemmer().stem))


def _ascii_words(text: str) -> list[str]:
    from rouge_score import tokenize

    return tokenize.tokenize(text, _stemmer())


def _unicode_words(text: str) -> list[str]:
    stem = _stemmer().stem
    return [stem(word) if word.isascii() and len(word) > 3 else word for word in words(text)]


# --- repetition and variety -------------------------------------------------------------------------------------------------


def repetition(responses: Sequence[Sequence[int]]) -> list[float]:
    """Return the percentage of each answer's 4-grams of tokens that occurred earlier in the same answer.

    It is 0 for an answer with fewer than 4 tokens.
    """
    return [100 * (1 - (total - again) / total) if total else 0.0 for total, again in map(repeated_grams, responses)]


def distinct(predictions: Sequence[str], n: int) -> float:
    """Return distinct-n (Li et al., arXiv:1510.03055): the number of different word n-grams, as a percentage of all word n-grams.

    An n-gram lies inside one prediction. The result is 0 if no prediction has n words.
    """
    different: set[tuple[str, ...]] = set()
    total = 0
    for words in map(str.split, predictions):
        count = max(len(words) - n + 1, 0)
        different.update(tuple(words[i : i + n]) for i in range(count))
        total += count
    return 100 * len(different) / total if total else 0.0


def self_bleu(answers: Sequence[Sequence[str]]) -> list[float]:
    """Return Self-BLEU (Zhu et al., arXiv:1802.01886) of each prompt. High values mean that the answers to a prompt are similar.

    It is the mean of BLEU-4 over the answers: each answer is compared with the other answers to its prompt. BLEU is nltk's, with smoothing
    method 1 (Chen & Cherry 2014), which replaces a count of 0 by 0.1. An answer with fewer than four words uses only n-grams up to its
    length. An empty answer scores 100 if another answer is empty too, else 0.

    Args:
        answers: for each prompt its answers, one per decoding seed. There are at least two.

    Returns:
        One value per prompt, from 0 (no common word) to 100 (all answers are equal).
    """
    split = [[answer.split() for answer in of_prompt] for of_prompt in answers]
    return [100 * sum(_bleu(own, row[:i] + row[i + 1 :]) for i, own in enumerate(row)) / len(row) for row in split]


def _bleu(answer: list[str], others: list[list[str]]) -> float:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu  # here: it imports scipy.stats, which most stages do not need

    if not answer:
        return float([] in others)
    order = min(_BLEU_ORDER, len(answer))
    score = sentence_bleu(others, answer, weights=(1 / order,) * order, smoothing_function=SmoothingFunction().method1)
    return float(score)  # type: ignore[arg-type]  # a list only for a list of weights


# --- metrics of the user's own code ----------------------------------------------------------------------------------------


def score_own(functions: Mapping[str, OwnFunction], predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, list[float]]:
    """Return the scores of the user's own metrics, with one value per prediction.

    A metric is called with a prediction and the list of its references.

    Raises:
        ConfigError: a metric fails, or returns something other than a finite number.
    """
    return {
        name: [_own_score(function, text, list(example.references)) for text, example in zip(predictions, examples, strict=True)]
        for name, function in functions.items()
    }


def _own_score(function: OwnFunction, prediction: str, references: list[str]) -> float:
    given = f"metric `{function.name}` in {function.file}, for the answer {prediction!r} and the references {references!r},"
    try:
        found = function.call(prediction, references)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise ConfigError(f"{given} failed with {type(error).__name__}: {error}; correct the function") from error
    if isinstance(found, str | bytes | bytearray):  # `float` would read the number in a text
        raise ConfigError(f"{given} returned {found!r}; return a number")
    try:
        value = float(found)
    except OverflowError as error:
        raise ConfigError(f"{given} returned a number beyond the range of float64; return a finite number") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{given} returned {found!r}; return a number") from error
    if not math.isfinite(value):
        raise ConfigError(f"{given} returned {value}; return a finite number")
    return value
