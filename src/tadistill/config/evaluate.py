"""The settings of evaluation: how responses to the test sets are sampled, metrics in the user's own code, and ratings of answers
(`tadistill judge` and `tadistill human`)."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tadistill.config.common import MOST, Decoding, FunctionName, Name, Precision, Seeds, Strict
from tadistill.errors import ConfigError
from tadistill.metrics import BUILT_IN, METRICS, PERCENT, POINTS, Metric, declare

TASK_FILE = (".yaml", ".yml")
"""Endings of files that define a task of lm-eval."""


class OtherDecoding(Decoding):
    """Another way to sample responses to the test sets. A field that is left out has the value of the main settings, `evaluate`."""

    seeds: Seeds = (10,)
    """Seeds of this sampling. The default is the first of the main seeds, `evaluate.seeds`."""


class Evaluate(Decoding):
    """Settings of evaluation on the test sets. The dev set uses them too, for metrics that need sampled text."""

    seeds: Seeds = (10, 20, 30, 40, 50)
    """Seeds for sampling responses (the default is MiniLLM's five). Each seed gives one response to every test prompt. On the dev set, only
    the first seed is used."""
    samples: int | None = Field(default=None, ge=1, le=10_000)
    """Number of responses to each test prompt. The default is one response for each seed in `seeds`. With more responses than seeds, the
    whole numbers after the largest seed are further seeds. With fewer responses than seeds, only the first seeds are used."""
    pass_at: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """The values of k for which reports show pass@k: the probability that at least one of k responses is right."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval that are measured too: names of its tasks, groups or tags, or YAML files of tasks."""
    fewshot: int | None = Field(default=None, ge=0, le=1000)
    """Number of examples in the prompts of lm-eval's tasks. By default, each task has its own number."""
    batch: int = Field(default=32, ge=1, le=MOST)
    """Number of sequences in a forward pass. If the recipe does not set it, a GPU samples as many responses at a time as fit into its
    memory, up to 512."""
    precision: Precision = "fp32"
    """Number format of the models in stages that only run models: tests, comparisons with the teacher, and the teacher's answers to the
    training prompts. With `bf16` the weights take half the memory, and a GPU is several times as fast. The probabilities are computed in
    float32 from the logits."""
    bits_per_byte: bool | None = None
    """True: also measure the bits per byte of the references, which can be compared between models with different tokenizers. By default,
    they are measured if the models of the study have different tokenizers."""
    also: dict[Annotated[Name, Field(pattern=r"^[A-Za-z0-9._-]+$")], OtherDecoding] = {
        "greedy": OtherDecoding(temperature=0),
        "t0.5": OtherDecoding(temperature=0.5),
    }
    """Other ways to sample responses to the test sets, each with a name. The report shows their metrics as METRIC@NAME."""

    @model_validator(mode="before")
    @classmethod
    def _as_many_seeds_as_samples(cls, values: Any) -> Any:
        seeds, samples = (values.get(name) for name in ("seeds", "samples")) if isinstance(values, dict) else (None, None)
        seeds = cls.model_fields["seeds"].default if seeds is None else seeds
        if not isinstance(samples, int) or not seeds or not all(isinstance(seed, int) for seed in seeds):
            return values  # without samples, or with a mistake that the fields name
        more = range(max(seeds) + 1, max(seeds) + 1 + samples)
        return values | {"seeds": [*seeds, *more][:samples]}

    @model_validator(mode="after")
    def _enough_samples(self):
        if twice := [k for k in self.pass_at if self.pass_at.count(k) > 1]:
            raise ValueError(f"pass_at has {twice[0]} twice; give each value only once")
        if (most := max(self.pass_at, default=0)) > len(self.seeds):
            raise ValueError(
                f"pass_at has {most}, but the number of responses to a prompt is {len(self.seeds)}; set `evaluate.samples` to {most}, or "
                "use smaller values"
            )
        self.check_engine()
        for name in self.also:
            try:
                self.other(name).check_engine()
            except ConfigError as error:
                raise ValueError(f"also.{name}: {error}") from error
        return self

    def check_sets(self, columns: Sequence[Mapping[Any, str]]) -> None:
        """Raise a ValueError if there are no test sets and no tasks, or if `pass_at` is set but no test set has a column of right answers.

        Args:
            columns: the value of `DataRef.columns` for each test set.
        """
        if not columns and not self.tasks:
            raise ValueError("data.test names no set, so nothing can be measured; name a test set, or tasks of lm-eval in `evaluate.tasks`")
        rules = [name for name, row in METRICS.items() if row.right_or_wrong]
        if self.pass_at and not any(rule in of_set for of_set in columns for rule in rules):
            raise ValueError(
                "evaluate.pass_at needs right answers, but no test set names a column that has them; add `columns` to a test set, such as "
                f"columns: {{numeric: answer}} for numbers in the column `answer` (possible keys: {', '.join(rules)})"
            )

    def other(self, name: str) -> "Evaluate":
        """Return the settings of the decoding `name` in `also`. A field that it leaves out has the value of the main settings."""
        changes = {field: getattr(self.also[name], field) for field in self.also[name].model_fields_set}
        return self.one_response.model_copy(update=changes)

    @property
    def during_training(self) -> "Evaluate":
        """A copy of these settings for the dev set: one response to each prompt, sampled without vLLM."""
        return self.one_response.model_copy(update={"engine": "native"})

    @property
    def one_response(self) -> "Evaluate":
        """A copy of these settings that gives one response to each prompt: only the first seed, and no `also`."""
        return self.model_copy(update={"seeds": self.seeds[:1], "also": {}, "samples": None, "pass_at": (), "tasks": ()})


class OwnMetric(Strict):
    """A metric in the user's own code. Its function `score(prediction, references)` returns a number for one answer. In a recipe, `NAME` is
    short for `{function: NAME}`."""

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
        """This metric in the form of the built-in metrics, `tadistill.metrics.Metric`."""
        bounded = self.unit in (POINTS, PERCENT)
        title = self.title or self.name.replace("_", " ")
        return Metric(self.name, title, "quality", self.unit, self.decimals, self.better, signed=not bounded)


def declare_own_metrics(recipe: Mapping[str, Any]) -> None:
    """Add the metrics of a recipe's own code to the table of metrics, given the recipe as plain data."""
    declare(*(OwnMetric.model_validate(entry).row for entry in recipe.get("metrics", ())))


REFERENCE = "reference"
"""The value of `against` for a comparison with the reference answers of the data set."""


class Judge(Strict):
    """Settings of the language model that rates answers. The options of `tadistill judge` and `--set KEY=VALUE` set these fields."""

    model: str = Field(pattern=r"\S")
    """Name of the judging model at its endpoint."""
    base_url: str = "https://api.openai.com/v1"
    """URL of an OpenAI-compatible endpoint."""
    mode: Literal["pair", "score"] = "pair"
    """How the judge's scores are used. In both modes, the judge sees two answers, in both orders, and gives each a score. `pair`: an answer
    wins if it has the higher score in both orders. `score`: the result is the sum of the arm's scores in percent of the sum of the
    reference's scores."""
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
