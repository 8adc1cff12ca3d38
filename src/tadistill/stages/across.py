"""Prepare the texts and vocabularies of a training whose student and teacher have different tokenizers."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tadistill.data.batch import Sequence, answered_rows, responses
from tadistill.data.encoded import row_numbers
from tadistill.data.second_readings import Behind, Rereader
from tadistill.data.templates import Encoded
from tadistill.data.token_bytes import token_bytes
from tadistill.errors import DataError, ModelError
from tadistill.evaluation.scoring import Subject
from tadistill.models.loading import shared_vocabulary
from tadistill.models.teacher import Teacher
from tadistill.plan.inputs import Encoding, Split
from tadistill.stages.context import Context
from tadistill.train.spans import Vocabularies


@dataclass(frozen=True)
class Across:
    """The texts and vocabularies of a training whose student and teacher have different tokenizers."""

    context: Context[Any]
    tokenizer: PreTrainedTokenizerBase
    """The teacher's tokenizer."""
    data: Encoding
    """The rules by which the teacher's texts are encoded."""
    again: Rereader
    """Encodes the student's responses with the teacher's tokenizer."""
    vocabularies: Vocabularies

    @classmethod
    def of(cls, context: Context[Any], student: Subject, teacher: Teacher, tokenizer: PreTrainedTokenizerBase, data: Encoding) -> "Across":
        """Prepare a training of `student` with `teacher`. `tokenizer` and `data` belong to the teacher.

        Raises:
            ModelError: the tokenizers have no token in common.
        """
        mine, theirs = token_bytes(student.tokenizer, student.eos), token_bytes(tokenizer, data.ends)
        sizes = student.vocab, shared_vocabulary(tokenizer, widths=(teacher.width,))
        config = teacher.config if teacher.model is None else teacher.model.config.get_text_config().to_dict()
        most = config.get("max_position_embeddings", config.get("n_positions"))
        again = Rereader(mine, theirs, sizes, most)
        if not again.shared:
            raise ModelError(
                f"the tokenizers of student and teacher ({sizes[0]:,} and {sizes[1]:,} tokens) have no token in common, so no loss can "
                "compare them; choose models whose tokenizers read the same characters"
            )
        return cls(context, tokenizer, data, again, Vocabularies(again))

    def rows(self, rows: Seq[Encoded], split: Split) -> Seq[Encoded]:
        """Add the teacher's prompts to the student's rows of a training set. Rows with a prompt that is too long for the teacher are left
        out, and an alarm gives their number.

        Raises:
            DataError: all rows are left out.
        """
        found, where = Behind(rows, row_numbers(rows), self._of_teacher(split)), f"data set `{split.ref.name}`"
        if found.left_out:
            why = "because the prompt is too long in the teacher's tokens"
            self.context.alarm(f"{where}: {found.left_out} of {len(rows)} rows are left out, {why}")
        if not len(found):
            raise DataError(
                f"{where}: the teacher can read none of the student's rows, because the prompts are too long; raise data.max_prompt"
            )
        return found

    def answers(self, file: Path, rows: Seq[Encoded], split: Split) -> Seq[Sequence]:
        """Return the responses in `file` to the prompts of the student's `rows`, with the teacher's prompts added."""
        return Behind(responses(file), answered_rows(file, rows), self._of_teacher(split))

    def _of_teacher(self, split: Split) -> Seq[Encoded]:
        counts = dict(self.context.counts)  # the manifest gets the counts of the student's rows
        found = self.context.split(split, self.tokenizer, contexts=True, data=self.data).encoded
        self.context.counts = counts
        return found
