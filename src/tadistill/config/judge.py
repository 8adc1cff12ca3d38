"""The settings of `tadistill judge` and `tadistill human`."""

from typing import Literal

from pydantic import Field

from tadistill.config.common import MOST, Strict

REFERENCE = "reference"
"""The value of `against` for a comparison with the reference answers of the data set."""


class Judge(Strict):
    """Settings of the language model that rates answers. The options of `tadistill judge` and `--set KEY=VALUE` set these fields."""

    model: str = Field(pattern=r"\S")
    """Name of the judging model at its endpoint."""
    base_url: str = "https://api.openai.com/v1"
    """URL of an OpenAI-compatible endpoint."""
    mode: Literal["pair", "score"] = "pair"
    """`pair`: the judge compares two answers in both orders. An answer wins if the judge prefers it in both. `score`: the judge rates each
    answer alone. The result is the answer's score in percent of the score of the reference answer."""
    arms: tuple[str, ...] = ()
    """Arms whose answers are judged. By default, the answers of all arms are judged."""
    against: str = REFERENCE
    """The other side of the comparison: the name of an arm, or `reference` for the reference answers of the data set."""
    sets: tuple[str, ...] = ()
    """Test sets to use. By default, all test sets are used."""
    limit: int | None = Field(default=None, ge=1, le=MOST)
    """Number of prompts to use from each test set, evenly spaced. By default, all prompts are used."""
    all_seeds: bool = False
    """Judge every training seed for which all arms are finished. By default, only the first training seed is judged."""
    name: str | None = None
    """The part NAME of the file judge-NAME.json, which contains the result. The default is made from the mode and the model's name."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """Sampling temperature of the judge."""
    max_tokens: int = Field(default=256, ge=8)
    """Largest number of tokens in a reply. Raise it for judges that write down their reasoning."""
    jobs: int = Field(default=4, ge=1, le=64)
    """Number of requests that are sent at the same time."""
    timeout: float = Field(default=120.0, gt=0, le=86400)
    """Largest number of seconds to wait for a reply."""


class BlindSheet(Strict):
    """Settings of a sheet of answers that people rate without knowing which model wrote them. The options of `tadistill human` set these
    fields."""

    name: str = "blind"
    """The part NAME of the file names sheet-NAME.html, sheet-NAME.csv and sheet-NAME.key.json."""
    arms: tuple[str, ...] = ()
    """Arms whose answers are shown. By default, the answers of all arms are shown."""
    sets: tuple[str, ...] = ()
    """Test sets to use. By default, all test sets are used."""
    limit: int | None = Field(default=None, ge=1, le=MOST)
    """Number of prompts to use from each test set, evenly spaced. By default, all prompts are used."""
    reference: bool = False
    """Show the reference answer of the data set as one of the answers."""
    seed: int = 0
    """Seed of the random order in which answers are shown."""
