"""Which record gets whose messages, and the mean of the others."""

from __future__ import annotations

import numpy as np
import pytest

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.running.controls import MeanMessages, exchange


@pytest.mark.parametrize("num", [2, 3, 10, 101])
@pytest.mark.parametrize("seed", [0, 1])
def test_records_with_different_answers_are_permuted(num: int, seed: int) -> None:
    found = exchange([[str(place)] for place in range(num)], seed=seed)
    assert sorted(found.senders) == list(range(num))
    assert all(sender != place for place, sender in enumerate(found.senders))
    assert (found.num_repeated, found.same_input) == (0, frozenset())
    assert found == exchange([[str(place)] for place in range(num)], seed=seed)


def test_it_is_no_neighbour_and_depends_on_the_seed() -> None:
    answers = [[str(place)] for place in range(100)]
    senders = exchange(answers, seed=0).senders
    steps = {(sender - place) % 100 for place, sender in enumerate(senders)}
    assert len(steps) > 40
    assert senders != exchange(answers, seed=1).senders


@pytest.mark.parametrize("classes", [(5, 5), (4, 3, 3), (5, 3, 1, 1), (2, 2, 2, 2, 2)])
def test_a_permutation_is_found_while_no_answer_is_that_of_more_than_half(
    classes: tuple[int, ...],
) -> None:
    answers = [f"answer {name}" for name, count in enumerate(classes) for _ in range(count)]
    for seed in range(20):
        found = exchange([[answer] for answer in answers], seed=seed)
        assert sorted(found.senders) == list(range(len(answers)))
        pairs = zip(answers, found.senders, strict=True)
        assert all(answers[sender] != answer for answer, sender in pairs)


def test_senders_are_repeated_where_one_answer_is_that_of_most() -> None:
    answers = ["yes"] * 7 + ["no"] * 3
    found = exchange([[answer] for answer in answers])
    pairs = zip(answers, found.senders, strict=True)
    assert all(answers[sender] != answer for answer, sender in pairs)
    assert found.num_repeated == 4


def test_any_right_answer_in_common_is_the_same_answer() -> None:
    answers = [["Paris", "the city of Paris"], ["PARIS."], ["Rome"], ["rome!", "Roma"]]
    for seed in range(10):
        senders = exchange(answers, seed=seed).senders
        assert {senders[0], senders[1]} == {2, 3}
        assert {senders[2], senders[3]} == {0, 1}


def test_an_answer_that_is_not_known_is_like_no_other() -> None:
    assert sorted(exchange([[], [], ["x"], ["x"]]).senders) == [0, 1, 2, 3]


def test_messages_about_the_same_passage_are_not_exchanged() -> None:
    answers = [[str(place)] for place in range(6)]
    passages = ["a", "a", "b", "b", "c", "c"]
    inputs = [[passage, "be brief"] for passage in passages]
    for seed in range(10):
        found = exchange(answers, inputs, seed=seed)
        assert sorted(found.senders) == list(range(6))
        assert all(passages[s] != passages[p] for p, s in enumerate(found.senders))
        assert not found.same_input


def test_the_same_passage_is_told_where_nothing_else_is_left() -> None:
    inputs = [["a"], ["a"], ["a"], ["a"], ["b"]]
    found = exchange([["1"], ["2"], ["3"], ["4"], ["5"]], inputs)
    assert all(sender != place for place, sender in enumerate(found.senders))
    # Four of a passage have one record outside of it, which all of them may get.
    assert (len(found.same_input), found.num_repeated) == (0, 3)
    found = exchange([["1"], ["2"], ["3"], ["3"], ["3"]], [["a"], ["a"], ["a"], ["b"], ["b"]])
    assert found.same_input == {2}


def test_what_cannot_be_exchanged() -> None:
    with pytest.raises(RecmasError, match=r"RM508.*there is only one"):
        exchange([["x"]])
    with pytest.raises(RecmasError, match=r"RM508.*of 3 and all others have the answer 'Yes'"):
        exchange([["Yes"]] * 3)
    with pytest.raises(RecmasError, match=r"RM508.*record 1 of 3"):
        exchange([["a", "b"], ["a"], ["b"]])


def vectors(*values: float) -> np.ndarray:
    return np.array([[value, 2 * value] for value in values], np.float32)


def test_the_mean_is_that_of_the_others() -> None:
    mean = MeanMessages()
    messages = [vectors(1, 2), vectors(3, 4), vectors(8, 9)]
    for message in messages:
        mean.add({"planner": message})
    np.testing.assert_array_equal(mean.of_others("planner", messages[0]), vectors(5.5, 6.5))
    np.testing.assert_array_equal(mean.of_others("planner", messages[2]), vectors(2, 3))


def test_a_mean_of_different_lengths_is_as_long_as_the_others_are_on_average() -> None:
    mean = MeanMessages()
    messages = [vectors(1), vectors(3, 5, 7, 11), vectors(5, 7), vectors(7, 9, 1)]
    for message in messages:
        mean.add({"reader": message})
    # Lengths 4, 2 and 3: the third vector is the mean of the two that have one.
    np.testing.assert_array_equal(mean.of_others("reader", messages[0]), vectors(5, 7, 4))
    np.testing.assert_array_equal(mean.of_others("reader", messages[1]), vectors(13 / 3, 8))
    empty = MeanMessages()
    for _ in range(2):
        empty.add({"reader": np.zeros((0, 2), np.float32)})
    assert empty.of_others("reader", np.zeros((0, 2), np.float32)).shape == (0, 2)
