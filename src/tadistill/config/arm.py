"""The arms of a recipe: which model teaches which, and which starts from which. Nothing here imports torch."""

from typing import Any

from pydantic import Field, field_validator, model_validator

from tadistill.config.method import Dense, MethodPatch, Optim, Select
from tadistill.config.objective import Objective
from tadistill.config.sampling import Sampler
from tadistill.config.strict import Strict

ModelPath = tuple[str, ...]


class Published(Strict):
    """What somebody else reported for an arm, for the report to compare with."""

    source: str
    rouge_l: dict[str, float]
    """Test set -> Rouge-L."""


class Arm(Strict):
    """One named path and method. A path of a single model evaluates it, or trains it on with `objective`.

    Edges, in any mix: `xl > l > s` is two `teach` edges; `l > s then xl > s` lets s go on with another teacher (a curriculum);
    `init: {s: l}` starts s from the l of this arm, pruned to the size of s. With `dense` all models before a learner in its path teach it.
    """

    path: tuple[ModelPath, ...] = Field(min_length=1)
    """The paths, one after the other; a name means the same model in all of them. A learner that is taught more than once divides its
    updates equally."""
    init: dict[str, str] = {}
    """Learner: the model of this arm that it starts from, instead of its own weights. Its own `sft` follows as ever."""
    objective: Objective | None = None
    sampler: Sampler | None = None
    optim: Optim | None = None
    select: Select | None = None
    dense: Dense | None = None
    compute: str | None = None
    """`as ARM`: choose the number of steps so that total training FLOPs equal that arm's."""
    published: Published | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("path", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return (value,) if isinstance(value, list | tuple) and value and isinstance(value[0], str) else value
        return tuple(tuple(part.strip() for part in chain.split(">")) for chain in value.split(" then "))

    @model_validator(mode="after")
    def _check(self):
        for path in self.path:
            for a in path:
                if path.count(a) > 1:
                    raise ValueError(f"path `{' > '.join(path)}` names {a} twice; a model cannot teach itself")
        if len(self.path) > 1 and any(len(path) < 2 for path in self.path):
            raise ValueError(f"path `{self.text}` has a part in which nothing is taught; write each as A > B")
        for i, path in enumerate(self.path[:-1]):
            used = {m for later in self.path[i + 1 :] for m in later} | set(self.init.values())
            if path[-1] not in used:
                raise ValueError(f"path `{self.text}` teaches {path[-1]} and then leaves it; go on with it, or start another from it")
        return self

    @model_validator(mode="after")
    def _check_init(self):
        for learner, source in self.init.items():
            first = next((i for i, path in enumerate(self.path) if learner in path[1:]), None)
            if first is None:
                raise ValueError(f"init names {learner}, which is not taught in `{self.text}`")
            before = [m for path in self.path[:first] for m in path] + [*self.path[first][: self.path[first].index(learner)]]
            if source not in before:
                raise ValueError(f"init starts {learner} from {source}, which is not in `{self.text}` before {learner}; name one that is")
        return self

    @field_validator("compute")
    @classmethod
    def _as_arm(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("as "):
            raise ValueError(f"compute is `{value}`; write `as ARM`")
        return value

    @property
    def last(self) -> ModelPath:
        """The path that ends with the arm's model."""
        return self.path[-1]

    @property
    def models(self) -> tuple[str, ...]:
        """All models of the arm, each once."""
        return tuple(dict.fromkeys(m for path in self.path for m in path))

    @property
    def learners(self) -> tuple[str, ...]:
        """The model that each distillation of the arm teaches, in order."""
        return tuple(m for path in self.path for m in path[1:])

    @property
    def text(self) -> str:
        """The path as a recipe writes it."""
        return " then ".join(" > ".join(path) for path in self.path)

    @property
    def patch(self) -> MethodPatch:
        """What this arm changes of the recipe's method."""
        return MethodPatch(objective=self.objective, sampler=self.sampler, optim=self.optim, select=self.select, dense=self.dense)
