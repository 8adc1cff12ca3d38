"""Words of other programs, such as TRL: a recipe refuses them, and the message names the key that is meant."""

import re
from pathlib import Path

import pytest

from tadistill.config import load
from tadistill.config.key_help import SYNONYMS, WORDS, explain
from tadistill.config.method import METHODS
from tadistill.config.reference import dotted, reference
from tadistill.errors import ConfigError

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "from-trl.md"
KEYS = {dotted(place, key.name) for part in reference() for place in part.places for key in part.keys}
NAMES = {key.rsplit(".", 1)[-1] for key in KEYS}
RECIPE = """\
study: t
seeds: [1]
models: {xl: {load: "scratch:llama", tokenizer: tinyworld}, s: {load: "scratch:llama", tokenizer: tinyworld}}
data: {train: tinyworld, dev: tinyworld, test: [tinyworld]}
method: {name: gkd}
arms: {a: xl > s}
"""


def words_of_trl() -> list[tuple[str, str]]:
    """Return each setting of TRL that the left column of the page's table names, with the right column of its row."""
    rows = [line.strip("|\n ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    named = [(word, right) for left, right in rows for code in re.findall("`(.+?)`", left) for word in re.findall(r"\b[a-z_]{4,}\b", code)]
    return [(word, right) for word, right in named if word not in NAMES]


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def test_every_word_means_a_key_of_a_recipe():
    """`lmbda` meant `fraction`, which was no key any more."""
    for meant in WORDS:
        key, _, value = meant.partition(": ")
        assert key in KEYS | NAMES
        assert not value or value in METHODS or value.strip("{}").partition(": ")[2] in {part.type for part in reference()}


def test_the_table_has_words():
    assert {"lmbda", "learning_rate", "seq_kd", "peft_config", "load_best_model_at_end", "use_vllm"} <= {word for word, _ in words_of_trl()}


@pytest.mark.parametrize(("word", "right"), words_of_trl())
def test_a_setting_of_trl_is_refused_with_the_key_that_its_row_names(recipe, word, right):
    keys = set(re.findall(r"\w+", " ".join(re.findall("`(.+?)`", right))))
    for place in ("", "method.", "method.optim.", "method.sampler."):
        with pytest.raises(ConfigError, match="is not a known key; did you mean `") as error:
            load(recipe, [f"{place}{word}=1"])
        assert keys & set(re.findall(r"\w+", str(error.value).partition("did you mean `")[2].partition("`")[0]))
    with pytest.raises(ConfigError, match=f"did you mean `{re.escape(SYNONYMS[word])}`"):
        explain(word)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("method.sampler={type: mix, lmbda: 0.5}", "did you mean `lam`?"),
        ("method.lmbda=0.5", "did you mean `method.sampler.lam`?"),
        ("method.batch_size=4", "did you mean `method.optim.batch`?"),
        ("evaluate.per_device_eval_batch_size=4", "did you mean `batch`?"),
        ("method.optim.bf16=true", "did you mean `precision`?"),
        ("bf16=true", "did you mean `method.optim.precision`?"),
        ("evaluate.bf16=true", "did you mean `precision`?"),
        *(
            (f"models.{place}", "did you mean `method.optim.precision`?")
            for place in ("xl.bf16=1", "s.fp16=1", "s.lora={r: 2, bf16: true}")
        ),
        ("models.s={load: x, serve: {at: http://a:1, bf16: true}}", "did you mean `method.optim.precision`?"),
        ("models.s.sft={bf16: true}", "did you mean `models.NAME.sft.optim.precision`?"),
        ("batch_size=4", "did you mean `method.optim.batch`?"),
        ("seed=3", "did you mean `seeds`?"),
        ("seq_kd=true", "did you mean `method: seqkd`?"),
    ],
)
def test_the_key_that_is_meant_is_the_nearest(recipe, override, hint):
    with pytest.raises(ConfigError, match=re.escape(hint)):
        load(recipe, [override])
