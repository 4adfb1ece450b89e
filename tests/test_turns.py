"""Who decodes when: each asker one at a time, all within bounds, and none waits for another's without need."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, settings
from hypothesis import strategies as st

from streams.turns import Turns

MOST, TOTAL = 3, 100


class Watched:
    """Turns, and what was ever running at the same time."""

    def __init__(self, most=MOST, total=TOTAL):
        self.turns = Turns(most, total)
        self._lock = threading.Lock()
        self._running = []
        self.seen = []

    def take(self, who, size):
        with self.turns.taken(who, size):
            with self._lock:
                self._running.append((who, size))
                self.seen.append(list(self._running))
            with self._lock:
                self._running.remove((who, size))


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 150)), min_size=1, max_size=30), st.integers())
def test_everybody_has_a_turn_and_the_bounds_hold(requests, seed):
    watched = Watched()
    random.Random(seed).shuffle(requests)
    with ThreadPoolExecutor(len(requests)) as pool:
        for done in [pool.submit(watched.take, *request) for request in requests]:
            done.result(60)
    for running in watched.seen:
        assert len(running) <= MOST
        assert len({who for who, _ in running}) == len(running)
        assert len(running) == 1 or sum(size for _, size in running) <= TOTAL


def in_thread(turns, who, size):
    """Whoever waits for a turn, and the event that it has had it."""
    had = threading.Event()

    def take():
        with turns.taken(who, size):
            had.set()

    thread = threading.Thread(target=take)
    thread.start()
    return thread, had


def test_a_small_one_passes_a_large_one_that_waits_and_nobody_passes_himself():
    turns = Turns(MOST, TOTAL)
    with turns.taken("a", 60):
        large, had_large = in_thread(turns, "b", 60)
        again, had_again = in_thread(turns, "a", 1)
        small, _ = in_thread(turns, "c", 40)
        small.join(60)
        assert not small.is_alive()
        assert not had_large.is_set()
        assert not had_again.is_set()
    for thread in (large, again):
        thread.join(60)
        assert not thread.is_alive()


def test_what_needs_more_than_all_has_its_turn_alone():
    turns = Turns(MOST, TOTAL)
    with turns.taken("a", 1):
        huge, had = in_thread(turns, "b", 10 * TOTAL)
        small, _ = in_thread(turns, "c", 1)
        small.join(60)
        assert not had.is_set()
    huge.join(60)
    assert had.is_set()
