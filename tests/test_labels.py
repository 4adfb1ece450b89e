"""The class list: the user's own labels, in and out."""

import numpy as np
import pytest

from supsupd.learning.labels import ClassList, LabelMismatch


@pytest.mark.parametrize("y", [np.array([7, 3, 3, 0]), np.array(["dog", "cat", "dog"]), np.array([10_000, -5])])
def test_labels_come_back_as_they_went_in(y):
    classes = ClassList((), 100).extended(y)
    assert classes.decode(classes.encode(y)) == y.tolist()


def test_the_list_only_grows_at_its_end():
    first = ClassList((), 100).extended(np.array([5, 2]))
    second = first.extended(np.array([9, 0, 5]))
    assert first.labels == (2, 5)
    assert second.labels == (2, 5, 0, 9)


def test_another_kind_of_label_is_refused():
    with pytest.raises(LabelMismatch, match="kind str came"):
        ClassList((1, 2), 100).extended(np.array(["a"]))


def test_more_classes_than_outputs_are_refused_with_both_numbers():
    with pytest.raises(LabelMismatch, match=r"2 new classes .* 3 are known and the network has 4 outputs"):
        ClassList(("a", "b", "c"), 4).extended(np.array(["d", "e"]))


@pytest.mark.parametrize("wrong", [-1, 100, 10_000])
def test_class_numbers_stay_below_the_outputs(wrong):
    with pytest.raises(LabelMismatch, match=f"label {wrong} is out of range: .* expected 0 to 99"):
        ClassList((0, 1, 2), 100).extended(np.array([0, wrong]))


def test_a_stream_that_begins_with_codes_may_use_any():
    codes = ClassList((), 100).extended(np.array([4711, -1]))
    assert codes.extended(np.array([123_456])).labels == (-1, 4711, 123_456)
