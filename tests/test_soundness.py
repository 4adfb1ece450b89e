"""What a daemon stores of any numbers is sound: verified, exported and taken in elsewhere."""

import math
import sqlite3

import numpy as np
import pytest
from daemon_process import ask
from learned_state import copy_of, learn_stream, settings_in
from safetensors.numpy import load, save
from test_portable import moved_from, moved_to, supsupd
from test_worker import learn_all, worker_of

from storage.db import upgrade

HOSTILE = {
    "enormous": np.where(np.arange(64) % 2, 1.7e308, -1.7e308),
    "enormous in one input": np.where(np.arange(64) == 5, 1.7e308, 1.0),
    "tiny": np.full(64, 5e-324),
    "minus nothing": np.full(64, -0.0),
    "float16": np.full(64, 65504, np.float16),
}


def batch(row, turn):
    """Rows of two classes: as it is, and its opposite."""
    y = np.random.default_rng(turn).integers(0, 2, 64)
    return {"x": np.where(y[:, None] == 1, row, -row).astype(row.dtype), "y": y}


@pytest.mark.parametrize("row", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("rule", ["sample", "feature", "none"])
@pytest.mark.parametrize("features", [False, True])
def test_a_state_that_learned_hostile_numbers_is_verified_exported_and_imported(tmp_path, rule, row, features):
    settings = settings_in(tmp_path / "here")
    network = settings.network.model_copy(update={"normalisation": rule, "feature_rows": 64})
    recognition = settings.recognition.model_copy(update={"features": features})
    settings = settings.model_copy(update={"network": network, "recognition": recognition})
    upgrade(settings.store)
    with worker_of(settings, batches=[batch(row, turn) for turn in range(4)]) as worker:
        learn_all(worker)
    assert {state for (state,) in ask(settings.state, "SELECT state FROM batch")} <= {"committed", "unsure"}
    assert supsupd("db", "verify", "--state", settings.state) == (0, "ok\n", "")
    if ask(settings.state, "SELECT 1 FROM task"):
        assert moved_from(settings, tmp_path / "masks")[0] == 0
        assert moved_to(settings_in(tmp_path / "there"), tmp_path / "masks")[0] == 0


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return learn_stream(tmp_path_factory.mktemp("learned"))


def poison(data):
    """The same arrays, one number of which is none."""
    arrays = {name: array.copy() for name, array in load(data).items()}
    next(array for _, array in sorted(arrays.items()) if array.dtype.kind == "f" and array.size).flat[0] = math.nan
    return save(arrays)


@pytest.mark.parametrize(
    "table, column, told",
    [
        ("task", "inputs", "task.1: inputs: of no rows"),
        ("training_state", "payload", "task.1: training state: expected finite numbers"),
    ],
)
def test_numbers_that_are_none_are_found(learned, tmp_path, table, column, told):
    settings = copy_of(learned, tmp_path / "copy")
    key = "id" if table == "task" else "task_id"
    with sqlite3.connect(settings.state / "supsup.db") as database:
        ((data,),) = database.execute(f"SELECT {column} FROM {table} WHERE {key} = 1").fetchall()
        database.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = 1", (poison(data),))
    assert supsupd("db", "verify", "--state", settings.state) == (65, "", f"{told}\n")


def test_a_network_whose_normalisation_is_no_number_is_found(learned, tmp_path):
    settings = copy_of(learned, tmp_path / "copy")
    data = save({"mean": np.full(64, math.inf), "sd": np.ones(64)})
    rule = "json_set(normalisation, '$.rule', 'feature')"
    with sqlite3.connect(settings.state / "supsup.db") as database:
        database.execute(f"UPDATE network SET normalisation = {rule}, normalisation_data = ?", (data,))
    told = "network: normalisation: expected arrays of (64,) finite numbers\n"
    assert supsupd("db", "verify", "--state", settings.state) == (65, "", told)
