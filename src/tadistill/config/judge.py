"""The settings of `tadistill judge` and `tadistill human`."""

from typing import Literal

from pydantic import Field

from tadistill.config.common import Strict

REFERENCE = "reference"
"""The name under which the reference answers take part."""


class Judge(Strict):
    """Settings of a language model that judges. Options of the command and `--set KEY=VALUE` give these fields."""

    model: str = Field(pattern=r"\S")
    """The judge's name at its endpoint."""
    base_url: str = "https://api.openai.com/v1"
    """An OpenAI-compatible endpoint."""
    mode: Literal["pair", "score"] = "pair"
    """`pair`: wins in both orders; `score`: MiniLLM's score, in % of the reference's."""
    arms: tuple[str, ...] = ()
    """Arms to judge; all of them by default."""
    against: str = REFERENCE
    """The other side: an arm, or `reference`."""
    sets: tuple[str, ...] = ()
    """Test sets; all of them by default."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts of each set, at even distances; all of them by default."""
    all_seeds: bool = False
    """Judge every training seed for which all arms are finished, not only the first one."""
    name: str | None = None
    """The summary is judge-NAME.json; mode and judge by default."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """Sampling temperature of the judge."""
    max_tokens: int = Field(default=256, ge=8)
    """Most tokens of a reply; raise it for judges that think aloud."""
    jobs: int = Field(default=4, ge=1, le=64)
    """Requests at a time."""
    timeout: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """Seconds that a reply may take."""


class BlindSheet(Strict):
    """A sheet for people to rate, as the options of `tadistill human` describe it."""

    name: str = "blind"
    """The files are sheet-NAME.html, .csv and .key.json."""
    arms: tuple[str, ...] = ()
    """Arms whose answers are shown; all of them by default."""
    sets: tuple[str, ...] = ()
    """Test sets; all of them by default."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts of each set, at even distances; all of them by default."""
    reference: bool = False
    """Show the reference among the answers."""
    seed: int = 0
    """Seed of the random order."""
