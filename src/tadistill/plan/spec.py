"""The base classes of all kinds of stages (`plan.kinds`): a stage's key, its inputs and its predicted cost."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from tadistill.models.counting.cost import Cost
from tadistill.plan.inputs import INPUTS, Encoding, Handle, Output, Part, Split, stage_of
from tadistill.store import key_of

if TYPE_CHECKING:
    from tadistill.plan.costs import Ledger


class Spec(Part):
    """Base class of all kinds of stages. A stage is one step of a study, such as one training."""

    kind: ClassVar[str]
    version: ClassVar[int]
    """A number in the stage's key. Increase it if a change of the code changes the results of this kind of stage."""
    work: ClassVar[str]
    """MODULE:FUNCTION in `tadistill.stages`. It is a string, because the module imports torch and a plan must work without torch."""
    trains: ClassVar[bool] = False
    """True if the stage updates weights."""
    shared: ClassVar[bool] = False  # True if several processes may share the work
    measures: ClassVar[bool] = False
    """True if the stage only measures models. The plan predicts no cost for such a stage."""
    in_recipes: ClassVar[bool] = True
    """False for stages that only `tadistill advise` runs. The recipe's `resources` cannot name them."""

    data: Encoding

    @property
    def key(self) -> str:
        """The stage's key in the store: a hash of its kind, version and content."""
        return key_of({"kind": self.kind, "version": self.version, **self.content()})

    @property
    def models(self) -> dict[str, Handle]:
        """The models that the stage reads, by role. A role is a field's name, such as `teacher`; the first assistant is `assistant 1`."""
        return {role: part for role, part in self._inputs() if not isinstance(part, Output)}

    @property
    def parents(self) -> dict[str, str]:
        """Keys of the stages that write this stage's inputs, by role, such as `teacher`. These stages must finish first."""
        keys = {role: stage_of(part) for role, part in self._inputs()}
        return {role: key for role, key in keys.items() if key is not None}

    def _inputs(self) -> Iterator[tuple[str, Handle | Output]]:
        for name, value in self:
            if isinstance(value, INPUTS):
                yield name, value
            elif isinstance(value, tuple):
                yield from ((f"{name.removesuffix('s')} {i}", v) for i, v in enumerate(value, 1) if isinstance(v, INPUTS))

    @property
    def steps(self) -> int | None:
        """Number of optimizer updates. None if the stage trains nothing."""
        return None

    @property
    def checkpoints(self) -> int:
        """Number of checkpoints that are evaluated on dev. The best one is selected."""
        return 0

    @property
    def saves_memory(self) -> list[str]:
        """Changes of the recipe that save memory in this stage, such as `optim.micro_batch: 4`. The most useful change comes first."""
        return []

    def cost(self, ledger: "Ledger", model: str, teachers: tuple[str, ...]) -> Cost | None:
        """Return the predicted cost. Return None if it cannot be predicted, or if the stage only measures.

        Args:
            ledger: predicts costs from model sizes and text lengths.
            model: name of the model that the stage trains, makes or runs.
            teachers: names of the stage's teachers, from big to small.
        """
        return None


class OnTrainingSets(Spec):
    """Base class of the stages that read the training sets."""

    train: Split
    more: tuple[Split, ...] = ()
    """The other training sets, if there are several."""

    @property
    def sets(self) -> tuple[Split, ...]:
        """All training sets."""
        return (self.train, *self.more)

    @property
    def limit(self) -> int | None:
        """Number of rows to use of the only training set. None means all rows, or that there are several sets with limits of their own."""
        return None if self.more else self.train.limit

    def texts(self, ledger: "Ledger", weights: tuple[float, ...] = (), route: tuple[int, ...] = ()) -> "Ledger":
        """Return a ledger that predicts costs for the texts of this stage. `weights` and `route` are attributes of `TextLengths`."""
        return ledger.of_texts(tuple(split.ref.name for split in self.sets), self.data.context, weights, route)
