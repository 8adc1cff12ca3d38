"""The base classes of the settings of objectives (losses)."""

from typing import ClassVar

from tadistill.config.common import Share, Strict, Temperature


class ObjectiveBase(Strict):
    """Base class of all objectives. Plans, checks and samplers read its class attributes."""

    needs_teacher: ClassVar[bool] = True
    """True if the loss compares the student with a teacher."""
    needs_scores: ClassVar[bool] = False
    """True if the loss needs the teacher's log-probability of every sampled token before each update."""
    needs_rounds: ClassVar[bool] = False
    """True if the loss needs a sampler that works in rounds. A round samples many sequences, and then uses them for several updates."""
    needs_pairs: ClassVar[bool] = False
    """True if the loss needs two responses to each prompt: one from the teacher and one from the student."""
    needs_own_samples: ClassVar[bool] = False
    """True if the loss is an estimate that is correct only if every token is sampled from the student's own distribution."""
    only_by_token: ClassVar[str] = ""
    """End of the error message about a student and a teacher with different tokenizers: why the loss needs one tokenizer, and what to use
    instead. Empty if the loss is also defined over spans of text."""

    @property
    def label(self) -> str:
        return self.type  # type: ignore[attr-defined]

    @property
    def needs_distribution(self) -> bool:
        """True if the loss needs the teacher's distribution over the vocabulary at every token."""
        return self.needs_teacher and not self.needs_scores

    @property
    def needs_corpus(self) -> bool:
        """True if a part of the loss is computed on the plain text of `data.corpus`."""
        return False

    @property
    def imitates_text(self) -> bool:
        """True if cross-entropy on the training text is a part of the loss."""
        return False


class Divergence(ObjectiveBase):
    """Base class of all divergences between the distributions of teacher and student at every token."""

    temperature: Temperature = 1.0
    """Number by which the logits of both models are divided. The loss is not multiplied by the temperature squared."""
    kd_ratio: Share = 1.0
    """Weight of the divergence in the loss. Cross-entropy on the tokens has the weight 1 - kd_ratio. (MiniLLM's KD baseline uses 0.5.)"""

    @property
    def imitates_text(self) -> bool:
        return self.kd_ratio < 1
