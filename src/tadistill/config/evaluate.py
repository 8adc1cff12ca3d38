"""The evaluation of a recipe: how responses to the test sets are sampled, and metrics in the user's own code."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tadistill.config.common import MOST, Decoding, FunctionName, Name, Strict
from tadistill.metrics import BUILT_IN, PERCENT, POINTS, Metric


class OtherDecoding(Decoding):
    """Settings of another sampling of responses to the test sets. A field that is left out has the value of the main settings,
    `evaluate`."""

    seeds: tuple[int, ...] = Field(default=(10,), min_length=1)
    """Seeds of this sampling. The default is the first of the main seeds, `evaluate.seeds`."""


class Evaluate(Decoding):
    """Settings of evaluation on the test sets. The dev set uses them too, for metrics that need sampled text."""

    seeds: tuple[int, ...] = Field(default=(10, 20, 30, 40, 50), min_length=1)
    """Seeds for sampling responses (the default is MiniLLM's five). Each seed gives one response to every test prompt. On the dev set, only
    the first seed is used."""
    batch: int = Field(default=32, ge=1, le=MOST)
    """Number of sequences in a forward pass."""
    also: dict[Annotated[Name, Field(pattern=r"^[A-Za-z0-9._-]+$")], OtherDecoding] = {
        "greedy": OtherDecoding(temperature=0),
        "t0.5": OtherDecoding(temperature=0.5),
    }
    """Other ways to sample responses to the test sets, each with a name. The report shows their metrics as METRIC@NAME."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"decoding seeds {list(seeds)} contain a seed twice; give each seed only once")
        return seeds

    def other(self, name: str) -> "Evaluate":
        """Return the settings of the entry `name` of `also`. Fields that the entry leaves out have the values of the main settings."""
        changes = {field: getattr(self.also[name], field) for field in self.also[name].model_fields_set}
        return self.model_copy(update={"seeds": self.seeds[:1], "also": {}, **changes})


class OwnMetric(Strict):
    """A metric in the user's own code. Its function `score(prediction, references)` returns a number for one answer. In a recipe, a text is
    short for `{function: TEXT}`."""

    text_sets: ClassVar[str] = "function"
    function: FunctionName
    """The function, written as MODULE:FUNCTION. MODULE is a Python file beside the recipe, or an installed module. FUNCTION is also the
    name of the metric in results."""
    title: str = Field(default="", max_length=60)
    """Name in reports. The default is the function's name."""
    better: Literal["higher", "lower"] = "higher"
    """The direction of better values: `higher` or `lower`."""
    unit: str = Field(default="", max_length=30)
    """Unit in reports. With `points` or `percentage points`, values must be from 0 to 100. With any other unit, values have no bounds."""
    decimals: int = Field(default=1, ge=0, le=6)
    """Number of digits after the decimal point in reports."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {cls.text_sets: value} if isinstance(value, str) else value

    @field_validator("function")
    @classmethod
    def _new_name(cls, function: str) -> str:
        if (name := function.partition(":")[2]) in BUILT_IN:
            raise ValueError(f"tadistill already has a metric `{name}`; give your function another name")
        return function

    @property
    def name(self) -> str:
        return self.function.partition(":")[2]

    @property
    def row(self) -> Metric:
        """The metric as a row of the table in `tadistill.metrics`."""
        bounded = self.unit in (POINTS, PERCENT)
        title = self.title or self.name.replace("_", " ")
        return Metric(self.name, title, "quality", self.unit, self.decimals, self.better, signed=not bounded)
