"""Metrics of the user's own code. Their functions are imported by `tadistill.own_code`."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tadistill.config.common import FunctionName, Strict
from tadistill.metrics import BUILT_IN, PERCENT, POINTS, Metric


class OwnMetric(Strict):
    """A metric of the user's own code: `score(prediction, references)` returns a number for one answer. A string sets `function`."""

    function: FunctionName
    """MODULE:FUNCTION. MODULE is a file beside the recipe, or an installed module. FUNCTION is the metric's name in results."""
    title: str = Field(default="", max_length=60)
    """Name in reports; by default the function's name."""
    better: Literal["higher", "lower"] = "higher"
    unit: str = Field(default="", max_length=30)
    """`points` and `percentage points` mean 0 to 100; other units have no bounds."""
    decimals: int = Field(default=1, ge=0, le=6)
    """Decimals in reports."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"function": value} if isinstance(value, str) else value

    @field_validator("function")
    @classmethod
    def _new_name(cls, function: str) -> str:
        if (name := function.partition(":")[2]) in BUILT_IN:
            raise ValueError(f"tadistill has a metric `{name}`; give your function another name")
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
