"""The benchmark of a training step, and the paper's own code that it stands beside."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import peer
import train_step

CHECKOUT = os.environ.get("SUPSUP_PEER", "")
"""A checkout of RAIVNLab/supsup; what needs it is skipped without."""
with_peer = pytest.mark.skipif(not CHECKOUT, reason="SUPSUP_PEER names no checkout of the paper's code")


def row(**changes):
    fields = {"network": "LeNet", "rule": "top-k", "step_ms": 2.0, "dense_ms": 1.6, "peer_step_ms": None}
    return fields | changes


def test_every_network_and_rule_is_measured():
    names = {(case.network, case.rule) for case in train_step.CASES}
    assert names == {(n, r) for n in ("LeNet", "FC 1024") for r in ("threshold", "top-k")}


def test_a_case_gives_both_times_and_none_of_a_peer_that_is_not_there(monkeypatch):
    monkeypatch.setattr(train_step, "ROUNDS", 1)
    monkeypatch.setattr(train_step, "BURST", 1)
    found = train_step.measured(train_step.CASES[0], None)
    assert found["step_ms"] > 0 < found["dense_ms"]
    assert found["peer_step_ms"] is None


def test_the_first_round_is_not_counted(monkeypatch):
    monkeypatch.setattr(train_step, "ROUNDS", 3)
    times = iter(range(4))
    assert train_step.in_turns({"ours": lambda: next(times)}) == {"ours": [1, 2, 3]}


def test_a_target_is_a_ratio_of_what_was_measured_side_by_side():
    alone = {m["what"]: m for m in train_step.measures([row()])}
    assert alone["LeNet, top-k: times the dense one's"]["ours"] == 1.25
    assert not any("paper" in what or "faster" in what for what in alone)
    beside = {m["what"]: m for m in train_step.measures([row(peer_step_ms=10.0)])}
    faster = beside["LeNet, top-k: times faster than it"]
    assert (faster["ours"], faster["target"], faster["reached"]) == (5.0, 10.0, False)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(peer.PeerFailed, match="no checkout"):
        peer.Peer(tmp_path, peer.PeerModel())


def test_code_that_stops_is_told(tmp_path):
    (tmp_path / "args.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
    with pytest.raises(peer.PeerFailed, match="exit status 3"):
        peer.Peer(tmp_path, peer.PeerModel())


@with_peer
@pytest.mark.parametrize("rule", ["threshold", "edge-popup"])
def test_the_peer_trains_as_often_as_it_is_told(rule):
    with peer.Peer(Path(CHECKOUT), peer.PeerModel(rule=rule, threads=1)) as running:
        assert len(running.train(2)) == 2
        assert len(running.train(3)) == 3


@with_peer
def test_the_peers_memory_grows_with_its_masks():
    few, many = (peer.one_shot(Path(CHECKOUT), tasks, threads=1) for tasks in (2, 60))
    assert few["one_shot_ms"] < many["one_shot_ms"]
    floats = 4 * (784 * 300 + 300 * 100 + 100 * 500)
    assert many["resident_bytes"] - few["resident_bytes"] > 1.9 * 58 * floats
    assert many["rss_bytes"] >= many["resident_bytes"]
