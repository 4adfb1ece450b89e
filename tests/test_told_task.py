"""A batch belongs to the task that it names itself, or else to that of its folder, where anybody asks."""

import pytest

from streams.batch import BatchRejected
from streams.tasks import told_task


@pytest.mark.parametrize(
    ("own", "labelled", "name", "rule", "task"),
    [
        ("mine", True, "folder/b.npz", "ignored", None),
        ("mine", True, "folder/b.npz", "labelled", "mine"),
        ("mine", False, "b.npz", "labelled", "mine"),
        (None, True, "folder/b.npz", "labelled", "folder"),
        (None, True, "plant/line/b.npz", "all", "plant/line"),
        (None, False, "folder/b.npz", "labelled", None),
        (None, False, "folder/b.npz", "all", "folder"),
    ],
)
def test_a_batchs_own_word_wins_over_its_folder(own, labelled, name, rule, task):
    assert told_task(own, labelled, name, rule) == task


def test_a_batch_that_has_to_name_its_task_and_does_not_is_refused():
    for rule, labelled in (("labelled", True), ("all", True), ("all", False)):
        with pytest.raises(BatchRejected, match="no_task: expected a member task, or a folder"):
            told_task(None, labelled, "b.npz", rule)


def test_a_folder_of_a_long_name_is_no_task():
    with pytest.raises(BatchRejected, match="bad_task: a folder of 256 characters, at most 255 expected"):
        told_task(None, True, "f" * 256 + "/b.npz", "all")
