"""The settings of `tadistill judge` and `tadistill human`."""

from typing import Literal

from pydantic import Field

from tadistill.config.common import MOST, Strict

REFERENCE = "reference"
"""Name of the reference answers when arms are compared with them."""


class Judge(Strict):
    """Settings of the language model that rates answers. The options of `tadistill judge` and `--set KEY=VALUE` set these fields."""

    model: str = Field(pattern=r"\S")
    """Name of the judging model at its endpoint."""
    base_url: str = "https://api.openai.com/v1"
    """An OpenAI-compatible endpoint."""
    mode: Literal["pair", "score"] = "pair"
    """`pair` compares two answers: an answer wins if the judge prefers it in both orders. `score` rates each answer: the result is its
    score in percent of the reference answer's score."""
    arms: tuple[str, ...] = ()
    """Arms whose answers are judged; all arms by default."""
    against: str = REFERENCE
    """The opponent in the comparison: an arm, or `reference`."""
    sets: tuple[str, ...] = ()
    """Test sets to use; all test sets by default."""
    limit: int | None = Field(default=None, ge=1, le=MOST)
    """Number of prompts per test set, evenly spaced; all prompts by default."""
    all_seeds: bool = False
    """Judge every training seed for which all arms are finished, not only the first training seed."""
    name: str | None = None
    """Part of the summary's file name judge-NAME.json. By default it is made from the mode and the model's name."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """Sampling temperature of the judge."""
    max_tokens: int = Field(default=256, ge=8)
    """Largest number of tokens in a reply. Raise it for judges that write their reasoning."""
    jobs: int = Field(default=4, ge=1, le=64)
    """Number of requests that are sent at the same time."""
    timeout: float = Field(default=120.0, gt=0, le=86400)
    """Largest number of seconds to wait for a reply."""


class BlindSheet(Strict):
    """Settings of a sheet of answers that people rate without knowing the models. The options of `tadistill human` set these fields."""

    name: str = "blind"
    """Part of the file names sheet-NAME.html, sheet-NAME.csv and sheet-NAME.key.json."""
    arms: tuple[str, ...] = ()
    """Arms whose answers are shown; all arms by default."""
    sets: tuple[str, ...] = ()
    """Test sets to use; all test sets by default."""
    limit: int | None = Field(default=None, ge=1, le=MOST)
    """Number of prompts per test set, evenly spaced; all prompts by default."""
    reference: bool = False
    """Show the reference as one of the answers."""
    seed: int = 0
    """Seed of the random order of the answers."""
