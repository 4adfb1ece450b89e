"""Task inference: the fast ways equal the slow ones, and evidence means what it says."""

import numpy as np
import pytest
import torch
from learning_stream import small_network
from test_network import random_mask

from supsupd.learning.bank import Mask, Masks
from supsupd.learning.inference import (
    EVIDENCE,
    KERNEL_ROWS,
    NoSuperfluousNeurons,
    Scorer,
    Slopes,
    entropy,
    halving,
    reference_logits,
    reference_slopes,
)


def bank_of(network, count):
    return Masks.of([network.pack(random_mask(network, 0.5, seed)) for seed in range(count)])


def rows_of(network, count, scale=1.0):
    rng = np.random.default_rng(count)
    return (scale * rng.standard_normal((count, network.architecture.inputs))).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, KERNEL_ROWS, KERNEL_ROWS + 1, 50])
@pytest.mark.parametrize("masks", [1, 4, 7])
@pytest.mark.parametrize("widths", [(64, (100,), 10), (13, (7, 9), 3), (5, (), 4)])
def test_exact_scoring_from_bits_equals_the_dense_reference(widths, masks, rows):
    network = small_network(widths[0], widths[1], widths[2])
    bank, x = bank_of(network, masks), rows_of(network, rows)
    found = Scorer(network, threads=2).logits(x, bank.load())
    assert len(found) == masks
    for logits, mask in zip(found, bank, strict=True):
        np.testing.assert_allclose(logits, reference_logits(network, mask.packed, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("x", [np.zeros((1, 13)), np.full((1, 13), 7.0), np.full((1, 13), 1e-42)])
def test_constant_and_denormal_inputs_score_like_any_other(x):
    network = small_network(13, (7,), 3)
    bank, x = bank_of(network, 3), x.astype(np.float32)
    for logits, mask in zip(Scorer(network, 1).logits(x, bank.load()), bank, strict=True):
        np.testing.assert_allclose(logits, reference_logits(network, mask.packed, x), rtol=1e-4, atol=1e-6)


def test_scores_do_not_depend_on_threads_or_on_the_other_masks():
    network = small_network(64, (30,), 20)
    bank, x = bank_of(network, 200), rows_of(network, 3)
    one = Scorer(network, 1)
    alone = np.stack([one.logits(x, Masks([mask]).load())[0] for mask in bank])
    for threads in (1, 3):
        together = Scorer(network, threads).logits(x, bank.load()).numpy()
        assert np.array_equal(together, alone)


@pytest.mark.parametrize("masks", [1, 2501])
@pytest.mark.parametrize("rows", [1, 5, 9])
def test_repeated_runs_give_the_same_bits_and_those_of_the_reference(masks, rows):
    network = small_network(13, (7,), 5)
    bank, x = bank_of(network, masks), rows_of(network, rows)
    first = Scorer(network, 1).logits(x, bank.load())
    again = Scorer(network, 3)
    assert all(torch.equal(again.logits(x, bank.load()), first) for _ in range(3))
    for place in {0, masks // 2, masks - 1}:
        np.testing.assert_allclose(first[place], reference_logits(network, bank[place].packed, x), rtol=1e-4, atol=1e-5)


def test_no_masks_give_no_scores():
    network = small_network(13, (7,), 3)
    scores = Scorer(network, 1).score(rows_of(network, 2), bank_of(network, 0), 3)
    assert scores.evidence["entropy"].shape == (0, 2)


@pytest.mark.parametrize("objective", EVIDENCE)
@pytest.mark.parametrize("rows", [1, KERNEL_ROWS, KERNEL_ROWS + 1])
@pytest.mark.parametrize("masks", [0, 1, 70])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("outputs", [4, 16, 37])
def test_evidence_from_bits_equals_that_of_the_reference_logits(objective, rows, masks, scale, outputs):
    network = small_network(13, (7,), outputs)
    bank, x = bank_of(network, masks), rows_of(network, rows, scale)
    found = Scorer(network, 2).evidence(objective, x, bank, classes=3)
    assert found.shape == (masks, rows)
    for values, mask in zip(found, bank, strict=True):
        logits = torch.from_numpy(reference_logits(network, mask.packed, x))
        np.testing.assert_allclose(values, EVIDENCE[objective](logits, 3), rtol=1e-4, atol=1e-4 * max(1.0, scale))


@pytest.mark.parametrize("objective", EVIDENCE)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_one_shot_from_bits_equals_the_gradient_in_alpha(count, objective):
    network = small_network(13, (7, 9), 5)
    slopes = Slopes(Scorer(network, 1), bank_of(network, count), objective, classes=3)
    x, places = rows_of(network, 6), np.arange(count)
    reference = reference_slopes(slopes, x, places)
    np.testing.assert_allclose(slopes.descent(x, places), reference, rtol=1e-4, atol=1e-6)
    assert slopes.one_shot(x) == reference.argmax()


def reference_binary(slopes, x):
    """The rounds of Binary on the dense reference: the kept half of the masks after each."""
    places, rounds = list(range(len(slopes.masks))), []
    while len(places) > 1:
        descent = reference_slopes(slopes, x, np.array(places))
        best = sorted(range(len(places)), key=lambda i: (-descent[i], i))[: (len(places) + 1) // 2]
        places = sorted(places[i] for i in best)
        rounds.append(places)
    return rounds


@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_binary_keeps_the_half_that_the_reference_keeps_round_for_round(count):
    network = small_network(13, (7, 9), 5)
    slopes, x = Slopes(Scorer(network, 1), bank_of(network, count), "entropy", classes=3), rows_of(network, 6)
    rounds = reference_binary(slopes, x)
    assert len(rounds) == int(np.ceil(np.log2(count)))
    assert slopes.binary(x) == (rounds[-1][0] if rounds else 0)


def test_binary_among_a_thousand_masks_takes_ten_rounds_to_one():
    network = small_network(13, (7,), 5)
    slopes, x = Slopes(Scorer(network, 1), bank_of(network, 1000), "entropy", classes=3), rows_of(network, 4)
    rounds = reference_binary(slopes, x)
    assert [len(kept) for kept in rounds] == [500, 250, 125, 63, 32, 16, 8, 4, 2, 1]
    assert slopes.binary(x) in rounds[-3]  # near ties may fall otherwise in float32


def test_objective_g_looks_at_the_superfluous_outputs_alone():
    network = small_network(13, (7,), 5)
    slopes, x = Slopes(Scorer(network, 1), bank_of(network, 3), "g", classes=5), rows_of(network, 2)
    with pytest.raises(NoSuperfluousNeurons, match="more outputs than classes"):
        slopes.one_shot(x)
    logits = torch.tensor([[50.0, -3.0, 1.0, 2.0]])
    moved = torch.tensor([[-9.0, 70.0, 1.0, 2.0]])
    assert torch.equal(EVIDENCE["g"](logits, 2), EVIDENCE["g"](moved, 2))


def test_without_superfluous_outputs_there_is_no_evidence_g():
    network = small_network(13, (7,), 5)
    scorer, bank, x = Scorer(network, 1), bank_of(network, 2), rows_of(network, 3)
    assert "g" in scorer.score(x, bank, 4).evidence
    assert "g" not in scorer.score(x, bank, 5).evidence


@pytest.mark.parametrize("rows", [1, 4, KERNEL_ROWS, KERNEL_ROWS + 1])
def test_one_mask_alone_gives_what_the_reference_gives_the_first_time_and_the_next(rows):
    network = small_network(13, (7, 9), 5)
    scorer, x = Scorer(network, 1, ready_bytes=1), rows_of(network, rows)
    for mask in [*bank_of(network, 2), *bank_of(network, 2)]:
        for _ in range(2):
            np.testing.assert_allclose(
                scorer.run(x, mask), reference_logits(network, mask.packed, x), rtol=1e-4, atol=1e-5
            )


def test_ready_weights_never_answer_for_another_mask():
    network = small_network(13, (7,), 5)
    scorer, x = Scorer(network, 1), rows_of(network, 20)
    for seed in range(50):  # each is gone before the next, which may lie where it lay
        mask = Mask(network.pack(random_mask(network, 0.5, seed)))
        np.testing.assert_allclose(scorer.run(x, mask), reference_logits(network, mask.packed, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masks", [1, 2, 3, 50])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 100])
def test_halving_finds_the_mask_that_is_clearly_best(masks, rows):
    rng = np.random.default_rng(masks)
    values = rng.standard_normal((masks, rows)) + 9.0 * (np.arange(masks) != masks // 2)[:, None]
    asked = []

    def evidence(part, places):
        asked.append(len(places) * len(range(*part.indices(rows))))
        return values[places, part]

    assert halving(evidence, masks, rows, first=8) == masks // 2
    assert sum(asked) <= masks * rows


def test_halving_ends_once_one_mask_leads_by_more_than_chance():
    rng, asked = np.random.default_rng(0), []
    values = rng.standard_normal((6, 128)) + 9.0 * (np.arange(6) != 4)[:, None]

    def evidence(part, places):
        asked.append((part, len(places)))
        return values[places, part]

    assert halving(evidence, 6, 128, first=8) == 4
    assert asked == [(slice(0, 8), 6)]


def test_a_lead_by_chance_is_hardly_ever_taken_for_one():
    rng = np.random.default_rng(0)
    early = 0
    for _ in range(4000):
        asked = []
        values = rng.standard_normal((2, 9))  # two masks that explain the rows alike
        halving(lambda part, places, v=values, asked=asked: asked.append(part) or v[places, part], 2, 9, first=8)
        early += len(asked) == 1
    assert early <= 3  # 2 in 10,000 are expected: one of both may lead


def test_halving_over_few_rows_is_the_plain_mean():
    values = np.random.default_rng(0).standard_normal((40, 8))
    assert halving(lambda part, places: values[places, part], 40, 8, first=8) == values.mean(axis=1).argmin()


def test_entropy_is_log_n_for_even_logits_and_zero_for_certain_ones():
    assert float(entropy(torch.zeros(1, 8))[0]) == pytest.approx(np.log(8), rel=1e-5)
    assert float(entropy(torch.tensor([[100.0, 0.0]]))[0]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", EVIDENCE)
def test_all_evidence_is_lower_where_one_output_stands_out(name):
    sure, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    assert float(EVIDENCE[name](sure, 1)[0]) < float(EVIDENCE[name](unsure, 1)[0])
