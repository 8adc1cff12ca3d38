"""The evaluation of a recipe: how the test sets are decoded, and metrics of the user's own code."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tadistill.config.common import MOST, Decoding, FunctionName, Name, Strict
from tadistill.metrics import BUILT_IN, PERCENT, POINTS, Metric


class OtherDecoding(Decoding):
    """Another decoding of the test sets. Fields that are not given have the values of the main decoding."""

    seeds: tuple[int, ...] = Field(default=(10,), min_length=1)
    """Seeds of this decoding. By default, it is the first seed of the main decoding."""


class Evaluate(Decoding):
    """Settings of evaluation. They apply to the test sets, and to dev for metrics that need sampled text."""

    seeds: tuple[int, ...] = Field(default=(10, 20, 30, 40, 50), min_length=1)
    """Decoding seeds (MiniLLM's five). Each seed gives one response to every test prompt. On dev, only the first seed is used."""
    batch: int = Field(default=32, ge=1, le=MOST)
    """Number of sequences in a forward pass."""
    also: dict[Annotated[Name, Field(pattern=r"^[A-Za-z0-9._-]+$")], OtherDecoding] = {
        "greedy": OtherDecoding(temperature=0),
        "t0.5": OtherDecoding(temperature=0.5),
    }
    """Other decodings by name. The report shows their metrics as METRIC@NAME."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"decoding seeds {list(seeds)} contain a seed twice; give every seed once")
        return seeds

    def other(self, name: str) -> "Evaluate":
        """Return the settings of one of the other decodings."""
        changes = {field: getattr(self.also[name], field) for field in self.also[name].model_fields_set}
        return self.model_copy(update={"seeds": self.seeds[:1], "also": {}, **changes})


class OwnMetric(Strict):
    """A metric of the user's own code: `score(prediction, references)` returns a number for one answer. A string sets `function`."""

    text_sets: ClassVar[str] = "function"
    function: FunctionName
    """MODULE:FUNCTION. MODULE is a file beside the recipe, or an installed module. FUNCTION is the metric's name in results."""
    title: str = Field(default="", max_length=60)
    """Name in reports. By default it is the function's name."""
    better: Literal["higher", "lower"] = "higher"
    """The direction in which values are better."""
    unit: str = Field(default="", max_length=30)
    """Unit in reports. `points` and `percentage points` mean values from 0 to 100. Other units have no bounds."""
    decimals: int = Field(default=1, ge=0, le=6)
    """Number of decimals in reports."""

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
        """The metric's row in the table of metrics."""
        bounded = self.unit in (POINTS, PERCENT)
        title = self.title or self.name.replace("_", " ")
        return Metric(self.name, title, "quality", self.unit, self.decimals, self.better, signed=not bounded)
