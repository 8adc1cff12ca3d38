"""Collation: the mask is the predictions of response tokens, EOS once; padding changes no logit and no loss."""

import os

import numpy as np
import pytest
import torch
from tests.conftest import response_logits, tiny_model

from tadistill.data import batch
from tadistill.data.batch import Batch, Sequence, answered_rows, collate, responses
from tadistill.data.encoding import Encoded
from tadistill.disk import write_rows
from tadistill.errors import StoreError
from tadistill.objectives import cross_entropy

EOS = 0
ROWS = [Sequence((5, 6, 7), (8, 9, EOS)), Sequence((4,), (3, 2, 1, 11, EOS)), Sequence((12, 13, 14, 15, 16, 17), (18, EOS))]


def test_mask_marks_the_prediction_of_each_response_token():
    batch = collate(ROWS, pad=EOS)
    for b, s in enumerate(ROWS):
        predicted = batch.targets_BT[b][batch.mask_BT[b]].tolist()
        assert predicted == list(s.response)
        assert predicted.count(EOS) == 1


def test_responses_are_read_when_they_are_asked_for(tmp_path):
    write_rows(tmp_path / "r.jsonl", [{"prompt": s.prompt, "response": s.response} for s in ROWS])
    read = responses(tmp_path / "r.jsonl")
    assert len(read) == 3
    assert [*read] == read[:] == ROWS
    assert (read[2], read[-3], read[1:]) == (ROWS[2], ROWS[0], ROWS[1:])
    with pytest.raises(IndexError):
        read[3]
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write('{"prompt": [1')
    with pytest.raises(StoreError, match=r"r.jsonl cannot be read \(line 4"):
        responses(tmp_path / "r.jsonl")


def test_the_rows_of_answers_need_no_second_reading_of_the_file(tmp_path, monkeypatch):
    rows = [{"prompt": [1], "response": [2, 3], "row": 4}, {"prompt": [5], "response": [6]}]
    write_rows(tmp_path / "some.jsonl", [rows[0], rows[0] | {"row": 7}])
    write_rows(tmp_path / "all.jsonl", rows)
    encoded = [Encoded(i, (1,), (2,)) for i in (3, 9)]
    for name, numbers in (("some", [4, 7]), ("all", [3, 9])):
        assert len(responses(tmp_path / f"{name}.jsonl")) == 2
        with monkeypatch.context() as blind:
            blind.setattr(batch, "stream_jsonl", None)
            assert answered_rows(tmp_path / f"{name}.jsonl", encoded).tolist() == numbers
    write_rows(tmp_path / "all.jsonl", [rows[0]])
    os.utime(tmp_path / "all.jsonl", ns=(1, 1))
    assert len(responses(tmp_path / "all.jsonl")) == 1  # another content is read again


def test_text_without_a_prompt_counts_from_its_second_token():
    batch = collate([Sequence((), (5, 6, 7))], pad=EOS)
    assert batch.targets_BT[batch.mask_BT].tolist() == [6, 7]


def test_values_stand_where_their_token_is_predicted():
    two = Sequence((5, 6), (7, EOS), {"student": np.array([-1.0, -2.0], np.float32)})
    one = Sequence((5,), (EOS,), {"student": np.array([-3.0], np.float32)})
    batch = collate([two, one], pad=EOS)
    assert batch.values["student"][batch.mask_BT].tolist() == [-1.0, -2.0, -3.0]
    assert float(batch.values["student"].sum()) == -6.0


def test_places_are_those_of_the_mask():
    batch = collate([Sequence((5, 6), (7, EOS), {"student": np.array([-1.0, -2.0], np.float32)})], pad=EOS)
    assert batch.counted(batch.values["student"]).tolist() == [-1.0, -2.0]
    batch = collate(ROWS, pad=EOS)
    assert torch.equal(batch.counted(batch.ids_BT), batch.ids_BT[batch.mask_BT])
    places = batch.places
    assert (places.end, places.columns.tolist(), places.lengths) == (7, [0, 1, 2, 3, 4, 5, 6], (5, 5, 7))
    assert batch.ids_BT.flatten()[places.tokens].tolist() == [
        t for s in ROWS for t in (*s.prompt, *s.response)[:-1]
    ]  # EOS predicts nothing
    assert torch.equal(batch.to(torch.device("cpu")).places.loss, places.loss)


def test_a_batch_without_a_loss_still_has_one_token():
    places = collate([Sequence((), (5,)), Sequence((), (6,))], pad=EOS).places
    assert (places.end, places.loss.tolist(), places.tokens.tolist(), places.lengths) == (1, [], [0], (1,))
    places = collate([Sequence((), (5,)), Sequence((6,), (7,))], pad=EOS).places
    assert (places.loss.tolist(), places.tokens.tolist(), places.lengths) == ([2], [2], (1,))


def test_several_turns_have_the_logits_of_each_turn_alone(kind):
    model, whole = tiny_model(kind), (5, 6, 7, 8, EOS, 12, 13, 9, 3, EOS)
    turns = [Sequence(whole[:3], whole[3:5]), Sequence(whole[:7], whole[7:])]
    both = Sequence(whole[:7], whole[7:], spans=((3, 5), (7, 10)))
    assert both.counted == sum(turn.counted for turn in turns) == 5
    batch = collate([both, ROWS[0]], pad=EOS)
    assert batch.targets_BT[0][batch.mask_BT[0]].tolist() == [8, EOS, 9, 3, EOS]
    alone = torch.cat([response_logits(model, collate([s], pad=EOS), 31) for s in (*turns, ROWS[0])])
    torch.testing.assert_close(response_logits(model, batch, 31), alone, atol=1e-5, rtol=0)


def left_padded(batch: Batch, extra: int) -> Batch:
    """The same rows with padding moved to the left and `extra` columns more."""
    rows = []
    for b in range(len(batch.ids_BT)):
        n = int(batch.attention_BT[b].sum())
        pad = batch.ids_BT.shape[1] - n + extra
        rows.append([torch.nn.functional.pad(t[b, :n], (pad, 0)) for t in (batch.ids_BT, batch.attention_BT, batch.mask_BT)])
    return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))


@pytest.mark.parametrize("extra", [0, 5])
def test_padding_changes_nothing(kind, extra):
    model = tiny_model(kind)
    batch = collate(ROWS, pad=EOS)
    alone = torch.cat([response_logits(model, collate([s], pad=EOS), 31) for s in ROWS])
    torch.testing.assert_close(response_logits(model, batch, 31), alone, atol=1e-5, rtol=0)
    moved = left_padded(batch, extra)
    torch.testing.assert_close(response_logits(model, moved, 31), alone, atol=1e-5, rtol=0)
    loss = cross_entropy(alone, batch.targets_BT[batch.mask_BT])
    assert torch.allclose(cross_entropy(response_logits(model, moved, 31), moved.targets_BT[moved.mask_BT]), loss, atol=1e-5)


def test_logits_are_those_of_the_whole_model(kind):
    model, batch = tiny_model(kind), collate(ROWS, pad=EOS)
    whole = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, position_ids=batch.positions_BT).logits
    torch.testing.assert_close(response_logits(model, batch, 31), whole[batch.mask_BT])


def test_wide_logits_are_cut_and_renormalised():
    model, batch = tiny_model("llama"), collate(ROWS, pad=EOS)
    narrow = response_logits(model, batch, 20)
    assert narrow.shape[1] == 20
    assert torch.allclose(narrow.softmax(-1).sum(-1), torch.ones(len(narrow)))
