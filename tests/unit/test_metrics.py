"""The table of metrics: it holds what evaluation makes, and an unknown metric is an error."""

import pytest

from tadistill.config.method_parts import Select
from tadistill.data.answers import RULES
from tadistill.errors import StoreError
from tadistill.glossary import ALIASES, GLOSSARY
from tadistill.metrics import (
    BUILT_IN,
    LOGS,
    METRICS,
    NOT_COMPARABLE,
    SELECTABLE,
    higher_is_better,
    improves,
    metric_of,
    metric_title,
    metric_unit,
)


def test_an_unknown_metric_is_an_error():
    for name in ("novelty", "novelty@greedy", "novelty/1"):
        with pytest.raises(StoreError, match=f"metric `{name}` is not known"):
            metric_of(name)
        with pytest.raises(StoreError, match="not known"):
            metric_title(name)


def test_suffixes_name_the_decoding_and_the_hop():
    assert metric_of("rouge_l@greedy") is METRICS["rouge_l"]
    assert metric_title("rouge_l@greedy") == "ROUGE-L, greedy"
    assert metric_title("budget/0") == "KL to the last assistant"
    assert metric_title("budget/2") == "error of step 2 above it"
    assert (metric_unit("budget/2"), metric_of("budget/2").stage) == ("nats/token", "analyse")


def test_selection_reads_the_table():
    quality = {"rouge_l", "rouge_l_unicode", "fact_accuracy", *RULES}
    assert set(SELECTABLE) == {"last", "loss", "reverse_kl", *quality}
    assert [Select(metric=name).metric for name in SELECTABLE] == list(SELECTABLE)
    assert {name for name in SELECTABLE if higher_is_better(name)} == quality
    assert set(NOT_COMPARABLE) == {"last", "reverse_kl"}
    with pytest.raises(ValueError, match="metric"):
        Select(metric="length")


def test_the_glossary_explains_every_metric():
    assert {name for name in BUILT_IN if METRICS[name].title not in GLOSSARY} == set()


def test_every_other_word_means_one_of_the_glossary():
    assert set(ALIASES.values()) <= GLOSSARY.keys()
    assert not ALIASES.keys() & GLOSSARY.keys()


def test_directions():
    assert improves("loss", -0.1)
    assert improves("rouge_l", 0.1)
    assert not improves("reverse_kl", 0.1)


def test_panels_of_learning_curves():
    answers = [f"dev/{rule}" for rule in RULES]
    assert LOGS[:9] == ("dev/fact_accuracy", *answers, "dev/rouge_l", "dev/rouge_l_unicode", "dev/loss", "train/loss")
    assert set(LOGS[9:]) == {"rollout/reverse_kl", "rollout/length", "rollout/entropy", "rollout/repetition"}
