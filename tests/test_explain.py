"""The ledger's reasons say what decided."""

import pytest

from supsupd.explain import why
from supsupd.learning.continual import Change

CANDIDATE = {"task": 3, "errors": 40, "denied": 0.7, "denied_limit": 0.3, "consistent": False}
PROOF = {"provisional": 2, "provisional_batches": 4, "promotion_log_wealth_needed": 13.8}


def unsure(candidates, won):
    evidence = {"candidates": candidates, "rows": [0, 64], "provisional_log_wealth": won} | PROOF
    return why(Change("unsure", evidence), "unsure")


@pytest.mark.parametrize(
    ("candidates", "won", "said"),
    [
        ([], 0.0, "there is no task to compare with; provisional task 2 has 4 batches and evidence 0.0 of 13.8 nats"),
        ([CANDIDATE], 5.0, "task 3 has 40 of 64 wrong and denies the labels 0.70, at most 0.30 expected of its own; "),
        ([CANDIDATE | {"consistent": True}], 5.0, "task 3 does no better than chance on it; "),
    ],
)
def test_an_unsure_batch_is_told_what_speaks_against_the_nearest_task(candidates, won, said):
    assert unsure(candidates, won).startswith(said)


def test_a_proof_that_was_not_enough_is_told_why():
    assert unsure([CANDIDATE], 50.0).endswith("50.0 of 13.8 nats, but a known task predicts its newer batches better")
    assert "but a known task" not in unsure([CANDIDATE], 5.0)


def test_a_batch_that_was_given_up_is_undecided():
    assert why(Change("unsure", {}), "quarantined").startswith("undecided: ")
