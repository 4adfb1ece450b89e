"""The references, tools and list of the experiments in benchmarks/, on scikit-learn's digits."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import draw, held_out
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import coding  # noqa: E402 - only found from here on
import documents  # noqa: E402
import mnist_tasks  # noqa: E402
import paper  # noqa: E402
import paper_report  # noqa: E402
import paper_stream  # noqa: E402
import references  # noqa: E402

SHAPE = references.Shape((64, 50, 10), seed=3)
TRAINING = references.Training(steps=120, minibatch=64, lr=1e-3, seed=0)
TASKS = 3
WANTED = {"permuted", "permuted-nn", "rotated", "split", "cifar", "reservoir", "density", "recognition", "baselines"}

MEASURED = {"bank", "train_step", "scaling", "serve", "serve_peers", "serve_crowd", "hostile", "codec", "intake"}


def rows(task):
    batch = draw(task, seed=0, rows=1000)
    return batch["x"].astype(np.float32), batch["y"].astype(np.int64)


def learned(kind):
    """A reference after all tasks, and the accuracy matrix [after task][on task]."""
    reference, matrix = kind(SHAPE), []
    for task in range(TASKS):
        references.train(reference, task, rows(task), TRAINING)
        matrix.append([references.accuracy(reference, seen, *held_out(seen)) for seen in range(task + 1)])
    return reference, matrix


@pytest.fixture(scope="module")
def matrices():
    return {name: learned(kind)[1] for name, kind in references.REFERENCES.items()}


def test_every_experiment_has_a_module_that_runs_and_plots():
    assert set(paper.EXPERIMENTS) == WANTED
    for experiment in paper.EXPERIMENTS:
        spec = importlib.util.find_spec(paper.stem(experiment))
        assert spec is not None, experiment
        source = Path(spec.origin).read_text(encoding="utf-8")
        assert "\ndef run(" in source, experiment
        assert "\ndef plot(" in source, experiment


def test_an_unknown_experiment_or_folder_is_refused(tmp_path, capsys):
    for arguments in (["nothing", "--data", str(tmp_path)], ["split", "--data", str(tmp_path / "absent")]):
        with pytest.raises(SystemExit):
            paper.parse_options(arguments)
    assert "absent is no folder" in capsys.readouterr().err


def test_every_reference_learns(matrices):
    for name, matrix in matrices.items():
        assert matrix[0][0] > 0.8, name


def test_fine_tuning_forgets_and_own_tensors_do_not(matrices):
    assert matrices["fine-tuning"][-1][0] < matrices["fine-tuning"][0][0] - 0.1
    for name in ("one network per task", "BatchE"):
        assert matrices[name][-1][0] == matrices[name][0][0]


def test_superposed_weights_forget_less_than_fine_tuned_ones(matrices):
    lost = {name: matrices[name][0][0] - matrices[name][-1][0] for name in ("fine-tuning", "PSP")}
    assert lost["PSP"] < lost["fine-tuning"]


def test_batch_ensemble_is_the_outer_product_on_the_shared_weights():
    reference = references.BatchE(references.Shape((4, 3), seed=0))
    _, r, s = reference.begin(0)
    r.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    s.copy_(torch.tensor([2.0, 1.0, -1.0]))
    x = torch.arange(8.0).view(2, 4)
    expected = x @ (reference.weights[0] * torch.outer(s, r)).T
    torch.testing.assert_close(reference.run(x, 0), expected)


def test_batch_ensemble_trains_the_shared_weights_on_the_first_task_only():
    reference = references.BatchE(SHAPE)
    layers = len(SHAPE.pairs)
    assert len(reference.begin(0)) == 3 * layers
    assert len(reference.begin(1)) == 2 * layers


def test_contexts_are_signs_that_differ_between_tasks_and_repeat():
    first, again = references.Superposed(SHAPE), references.Superposed(SHAPE)
    for reference in (first, again):
        reference.begin(0), reference.begin(1)
    context = first.contexts[0][0]
    assert set(context.unique().tolist()) == {-1.0, 1.0}
    assert not torch.equal(context, first.contexts[1][0])
    assert torch.equal(context, again.contexts[0][0])


def test_what_a_task_costs_is_what_its_tensors_weigh():
    def weigh(tensors):
        return references.FLOAT_BYTES * sum(tensor.numel() for tensor in tensors)

    for kind in (references.Separate, references.BatchE):
        reference = kind(SHAPE)
        reference.begin(0)
        assert weigh(reference.begin(1)) == reference.task_bytes


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 300), st.floats(0, 1)), min_size=1, max_size=4), st.integers(0, 99))
def test_coded_masks_come_back(layers, seed):
    rng = np.random.default_rng(seed)
    masks = [rng.random((3, size)) < density for size, density in layers]
    decoded = coding.decode(coding.encode(masks), [mask.shape for mask in masks])
    assert all(np.array_equal(a, b) for a, b in zip(masks, decoded, strict=True))


def test_a_sparse_mask_costs_little_more_than_its_entropy():
    mask = np.random.default_rng(0).random((300, 784)) < 0.05
    share = mask.mean()
    bound = -mask.size * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
    assert bound <= len(coding.encode([mask])) < 1.001 * bound + 16


def stream_tasks(lengths):
    return [
        paper_stream.TrueTask(np.full((n, 2), i, np.float32), np.arange(n), np.empty(0), np.empty(0))
        for i, n in enumerate(lengths)
    ]


def test_unaligned_batches_hold_every_row_once_in_order():
    pieces = list(paper_stream.iter_pieces(stream_tasks([10, 7, 4]), rows=4, aligned=False))
    assert [len(piece.y) for piece in pieces] == [4] * 5
    assert np.concatenate([p.truth for p in pieces]).tolist() == [0] * 10 + [1] * 7 + [2] * 3
    assert all((piece.x[:, 0] == piece.truth).all() for piece in pieces)


def test_aligned_batches_never_straddle():
    pieces = list(paper_stream.iter_pieces(stream_tasks([10, 7, 4]), rows=4, aligned=True))
    assert [set(piece.truth) for piece in pieces] == [{0}, {0}, {1}, {2}]


def test_turning_by_a_matrix_is_turning():
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    expected = mnist_tasks.rotated(mnist_tasks.Images(images, np.arange(3)), np.random.default_rng(0), 12)[1]
    np.testing.assert_allclose(mnist_tasks.turned(images, 30), expected.transform(images.astype(np.float32)), atol=1e-3)


@pytest.mark.parametrize(
    ("ours", "sense", "reached"), [(2, "≥", False), (3, "=", True), (4, "≤", False), (None, "≥", False)]
)
def test_a_target_is_reached_in_its_own_sense(ours, sense, reached):
    row = paper_report.measure("masks", ours, 3, sense=sense)
    assert row["reached"] is reached
    assert paper_report.target_text(row) == f"{sense} 3"


def test_the_table_shows_ours_target_and_published():
    row = paper_report.measure("accuracy", 95.6, 95.5, (94.91, "them"))
    table = paper_report.make_table({"experiment": "permuted", "measures": [row]})
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["accuracy", "[green]95.6[/]", "≥ 95.5", "94.91", "them"]


@pytest.mark.parametrize(("document", "prefix"), documents.DOCUMENTS.items())
def test_the_tables_of_a_document_are_those_of_the_results(document, prefix):
    text = document.read_text(encoding="utf-8")
    named = {name for _, name, _ in documents.BLOCK.findall(text)}
    assert named == (WANTED if prefix else MEASURED)
    assert documents.renew(text, documents.RESULTS, prefix) == text
