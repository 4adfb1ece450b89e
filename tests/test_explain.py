"""The ledger's reasons say what decided."""

import pytest

from supsupd.explain import why
from supsupd.learning.records import Change, LabelledBatch, Member
from supsupd.story import tell

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


BATCH = {
    "batch": 17,
    "name": "n/7.npz",
    "samples": 64,
    "labelled": True,
    "state": "committed",
    "task": 4,
    "reason": "because",
}
FULL = {
    "rows": [0, 40],
    "batch_rows": 64,
    "false_alarm": 0.001,
    "decided_with": 19,
    "candidates": [
        CANDIDATE | {"log_wealth": -3.25, "log_wealth_needed": 7.6, "better_than_chance": False},
        CANDIDATE | {"task": 5, "denied": 0.25, "log_wealth": 9.0, "log_wealth_needed": 7.6, "consistent": True}
        | {"better_than_chance": True},
    ],
    "held_out": {"rows": 8, "loss_before": 0.82, "loss_after": 0.8, "taken": True},
    "provisional_log_wealth": 5.0,
    "provisional_accuracy": 0.71,
} | PROOF  # fmt: skip


def story(*evidence, versions=()):
    decided = [{"decision": "known", "task": 4, "at": "noon", "reason": "so", "evidence": one} for one in evidence]
    return tell({"batch": BATCH, "decisions": decided, "versions": list(versions)})


def test_a_story_tells_every_limit_and_the_margin_to_it():
    version = {"task": 4, "version": 2, "batch": 19, "density": 0.4968, "reason": None}
    assert story(FULL, versions=[version]) == [
        "batch 17, n/7.npz (64 rows, labelled): committed, task 4: because",
        "1. noon: known, task 4: so",
        "   rows 0 to 39 of 64 were taken",
        "   it was decided when batch 19 came; the numbers are those of that batch",
        "   task 3: 40 wrong before training; labels denied 0.7000, limit 0.3000: 0.4000 beyond; "
        "-3.2 nats for knowing the labels, 7.6 needed: 10.8 short -> not its own",
        "   task 5: 40 wrong before training; labels denied 0.2500, limit 0.3000: 0.0500 inside; "
        "9.0 nats for knowing the labels, 7.6 needed: 1.4 more -> its own",
        "   a batch of the task itself is beyond its limit with chance 0.001",
        "   on 8 rows held out from training the loss went from 0.82 to 0.8 (-0.0200): the new mask was taken",
        "   provisional task 2 had 4 batches; 5.0 nats for knowing their labels, 13.8 needed: 8.8 short; "
        "0.71 of its rows right before training",
        "afterwards: version 2 of task 4's mask, 0.4968 of the weights kept, when batch 19 came",
    ]


def test_a_story_tells_what_an_operator_did():
    split = {"operation": "split", "from_task": 3, "to_task": 4, "batch": 17, "rows": [0, 64], "batch_rows": 64}
    told = story(split, {"operation": "merge", "from_task": 4, "to_task": 1})
    assert "   an operator split task 3 at batch 17; task 4 has this batch from then on" in told
    assert "   an operator merged task 4 into task 1, which has this batch from then on" in told


def test_a_story_of_an_unlabelled_batch_tells_how_far_it_is_from_its_task():
    evidence = {"evidence": "entropy", "surprise": -0.5, "surprise_limit": 0.62, "entropy": 1.3}
    assert story(evidence)[2] == (
        "   entropy -0.50 sd above the task's own mean, limit 0.62: 1.12 inside; mean entropy 1.30 nats"
    )


@pytest.mark.parametrize("missing", FULL)
def test_a_story_does_without_what_was_not_recorded(missing):
    assert story({key: value for key, value in FULL.items() if key != missing})


def test_evidence_without_words_of_its_own_is_told_as_it_is():
    assert "   late by batches: 3" in story({"late_by_batches": 3})
    assert story({"candidates": [{"task": 3, "nu": 0.2}]})[2] == "   task 3: nu 0.2"


def test_a_batch_about_which_nothing_was_decided_tells_its_reason():
    batch = BATCH | {"state": "quarantined", "task": None, "samples": None, "reason": "truncated: 0 bytes"}
    told = tell({"batch": batch, "decisions": [], "versions": []})
    assert told == ["batch 17, n/7.npz: quarantined: truncated: 0 bytes"]


ALARM = {"task": 3, "batches": 5, "log_wealth": 8.2, "log_wealth_needed": 6.9}


def test_a_late_alarm_tells_what_was_set_back_and_why():
    member = Member(LabelledBatch(1, "", None), 0, 64)
    change = Change("unsure", {"alarm": ALARM, "recalled_from": 3}, recalled=(member,))
    assert why(change, "unsure") == (
        "late alarm: task 3 was set back to the mask it had before, its newest 5 batches together do not fit its "
        "record (8.2 of 6.9 nats)"
    )


def test_what_has_to_wait_for_the_cap_says_so():
    evidence = {"candidates": [], "rows": [0, 64], "provisional_log_wealth": 50.0} | PROOF
    told = why(Change("unsure", evidence | {"found_last_hour": 4, "max_new_per_hour": 4}), "unsure")
    assert told.endswith("; it has to wait: 4 tasks were found in the last hour, at most 4 may be")


@pytest.mark.parametrize(
    ("kind", "paper", "said"),
    [
        ("known", {"current": 3, "next_check_after": 7}, "trained the current task 0, the next check comes after 7"),
        ("known", {"k_max_nu": 1.2, "threshold": 1.125}, "k max nu is 1.200 of 1.125: the inputs are those of task 0"),
        ("new", {"k_max_nu": 1.1, "threshold": 1.125}, "k max nu is 1.100 of 1.125: the inputs are of no task"),
        ("new", {"k_max_nu": 1.2, "threshold": 1.125}, "k max nu is 1.200 of 1.125: a mask that nothing has trained"),
        ("new", {}, "the first batch begins a task"),
    ],
)
def test_the_papers_rule_tells_height_and_threshold(kind, paper, said):
    assert why(Change(kind, {"paper": paper}), "committed").startswith(said)
