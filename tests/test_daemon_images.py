"""Batches as people have them: a folder of pictures for each class."""

import numpy as np
import pytest
from daemon_process import DaemonProcess
from digits import draw
from PIL import Image

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def save_batch(folder, seed, rows=64):
    """FOLDER/CLASS/ROW.png, put in place by a rename."""
    batch = draw(0, seed, rows)
    making = folder.with_name(f".{folder.name}.tmp")
    for row, (x, y) in enumerate(zip(batch["x"], batch["y"], strict=True)):
        path = making / NAMES[y] / f"{row:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((x.reshape(8, 8) * 255).astype(np.uint8)).save(path)
    making.rename(folder)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with DaemonProcess(tmp_path_factory.mktemp("images")) as daemon:
        with daemon.config.open("a") as config:
            config.write("input_shape = [8, 8]\n")
        daemon.drop("first", **draw(0, 90))  # rows of 64: not the shape that is set
        for seed in range(4):
            save_batch(daemon.watch / f"batch-{seed}", seed)
        yield daemon.start().wait()


def test_folders_of_images_are_learned_under_the_names_of_their_classes(daemon):
    rows = {row["name"]: row for row in daemon.client.batches()}
    assert [rows[f"batch-{seed}"]["state"] for seed in range(4)] == ["committed"] * 4
    probe = draw(0, 50, 40)
    images = (probe["x"].reshape(-1, 8, 8) * 255).astype(np.uint8)
    labels = [row["label"] for row in daemon.client.predict(images)]
    assert np.mean([label == NAMES[y] for label, y in zip(labels, probe["y"], strict=True)]) > 0.7


def test_a_first_batch_of_another_shape_than_is_set_does_not_found_the_network(daemon):
    row = daemon.row("first")
    assert row["state"] == "quarantined"
    assert row["reason"] == "schema_mismatch: rows of shape (64,) came, (8, 8) is set"
    assert daemon.client.status()["network"]["widths"][0] == 64
