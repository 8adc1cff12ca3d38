"""Several training sets: the share of each set in what is drawn, the order of its rows, and the place of a row."""

import numpy as np
import pytest

from tadistill.data.training_sets import TrainingSets, joined, shuffled

ADDRESS = (3, "data order")


@pytest.mark.parametrize(
    "weights", [(0.3, 0.7), (0.5, 0.5), (1 / 3, 1 / 3, 1 / 3), (0.001, 0.999), (0.5, 0.25, 0.125, 0.125), (0.21, 0.13, 0.34, 0.02, 0.3)]
)
def test_each_set_has_its_share_after_every_update(weights):
    sets, total = TrainingSets(tuple(range(7, 7 + len(weights))), weights), np.zeros(len(weights))
    for number in range(1000):
        total += np.bincount([sets.set_of(row) for row in sets.rows(8, number, ADDRESS)], minlength=len(weights))
        assert np.abs(total - np.array(weights) * 8 * (number + 1)).max() < 1


def test_each_epoch_of_a_set_has_each_of_its_rows_once_in_a_new_order():
    sets = TrainingSets((5, 12), (0.25, 0.75))
    drawn = np.concatenate([sets.rows(8, number, ADDRESS) for number in range(10)])
    first, second = drawn[drawn < 5], drawn[drawn >= 5]
    assert (len(first), len(second)) == (20, 60)
    counts = np.bincount(drawn, minlength=17)
    assert set(counts[:5]) == {4}
    assert set(counts[5:]) == {5}
    small = TrainingSets((2, 3), (0.5, 0.5)).rows(12, 0, ADDRESS)  # several epochs in one update
    assert np.bincount(small).tolist() == [3, 3, 2, 2, 2]


def test_an_update_depends_only_on_its_number():
    fresh = [TrainingSets((50, 30), (0.6, 0.4)).rows(8, number, ADDRESS).tolist() for number in (7, 3, 7)]
    one = TrainingSets((50, 30), (0.6, 0.4))
    assert [one.rows(8, number, ADDRESS).tolist() for number in (7, 3, 7)] == fresh
    assert one.rows(8, 7, (4, "data order")).tolist() != fresh[0]


def test_processes_and_micro_batches_get_rows_of_every_set():
    """With equal weights the sets alternate, so a fixed distance of 2 would always meet the same set."""
    sets = TrainingSets((100, 100), (0.5, 0.5))
    even = [sets.set_of(row) for number in range(20) for row in sets.rows(8, number, ADDRESS)[::2]]
    assert 0.3 < np.mean(even) < 0.7


def test_one_set_is_drawn_as_ever():
    assert TrainingSets((11,)).rows(4, 3, ADDRESS).tolist() == shuffled(11, 4, 3, ADDRESS).tolist()


def test_rows_know_their_teacher_and_their_place_among_its_rows():
    sets = TrainingSets((2, 3, 2), (0.3, 0.3, 0.4), (1, 0, 1))
    assert [sets.set_of(row) for row in range(7)] == [0, 0, 1, 1, 1, 2, 2]
    assert [sets.teacher(row) for row in range(7)] == [1, 1, 0, 0, 0, 1, 1]
    assert [sets.place(row) for row in range(7)] == [0, 1, 0, 1, 2, 2, 3]
    assert sets.sets_of(1) == [0, 2]
    assert TrainingSets((2, 3), (0.5, 0.5)).teacher(4) is None


def test_joined_sequences_are_read_where_they_are():
    whole = joined([["a", "b"], ["c"], ["d", "e"]])
    assert [*whole] == ["a", "b", "c", "d", "e"] == whole[:]
    assert (whole[-1], whole[1:4], len(whole)) == ("e", ["b", "c", "d"], 5)
    with pytest.raises(IndexError):
        whole[5]
    alone = ["a"]
    assert joined([alone]) is alone
