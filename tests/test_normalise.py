"""Input normalisation: one frozen rule, whatever comes in."""

import numpy as np
import pytest

from supsupd.learning.index import InputDensity, InputMoments
from supsupd.learning.normalise import Normaliser, ShapeMismatch, standardise_rows, standardise_rows_by_numpy
from supsupd.learning.statistics import InputStatistics
from supsupd.learning.transforms import Transforms


def rows(count=20, shape=(6, 6), seed=0):
    return np.random.default_rng(seed).random((count, *shape)) * 200


def test_each_row_is_standardised_by_itself_so_scale_and_offset_do_not_matter():
    x = rows()
    normalise = Normaliser("sample", x.shape[1:])
    np.testing.assert_allclose(normalise(x * 1000 - 7), normalise(x), atol=1e-5)
    np.testing.assert_allclose(normalise(x).mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(normalise(x).std(axis=1), 1, atol=1e-5)


def test_a_rule_from_features_is_frozen_and_survives_being_stored():
    first = rows()
    rule = Normaliser.fitted("feature", first)
    again = Normaliser.from_stored(*rule.to_stored())
    other = rows(seed=1) * 3
    assert np.array_equal(rule(other), again(other))
    np.testing.assert_allclose(rule(first).mean(axis=0), 0, atol=1e-6)
    assert abs(rule(other).mean()) > 0.5  # later data do not move it


def test_no_rule_only_flattens():
    x = rows()
    assert np.array_equal(Normaliser("none", (6, 6))(x), x.reshape(20, 36).astype(np.float32))


@pytest.mark.parametrize("rule", ["sample", "feature", "none"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float64, np.bool_])
def test_every_numeric_type_gives_finite_float32(rule, dtype):
    x = rows().astype(dtype)
    out = Normaliser.fitted(rule, x)(x)
    assert out.dtype == np.float32
    assert np.isfinite(out).all()


@pytest.mark.parametrize("rule", ["sample", "feature", "none"])
@pytest.mark.parametrize("x", [np.zeros((4, 9)), np.full((4, 9), 1e300), np.full((4, 9), 7)])
def test_constant_and_enormous_rows_stay_finite(rule, x):
    assert np.isfinite(Normaliser.fitted(rule, x)(x)).all()
    mixed = np.where(np.arange(9) % 2, x, -x)
    assert np.isfinite(Normaliser(rule, (9,), np.zeros(9), np.ones(9))(mixed)).all()


def test_images_and_vectors_of_one_width_are_the_same_rows():
    x = rows()
    normalise = Normaliser("sample", (6, 6))
    assert np.array_equal(normalise(x), normalise(x.reshape(20, 36)))


@pytest.mark.parametrize("shape", [(5, 6), (37,), (6, 6, 3)])
def test_another_width_is_refused_with_both_shapes(shape):
    with pytest.raises(ShapeMismatch, match=r"the network takes \(6, 6\)"):
        Normaliser("sample", (6, 6))(rows(shape=shape))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.bool_])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (20, 64), (2, 785)])
@pytest.mark.parametrize("read_only", [False, True])
def test_rows_are_standardised_as_plain_numpy_does_it(dtype, shape, read_only):
    x = (np.random.default_rng(shape[1]).random(shape) * 200).astype(dtype)
    x.flags.writeable = not read_only
    np.testing.assert_allclose(standardise_rows(x), standardise_rows_by_numpy(x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("x", [0.0, 7.0, 1e300, -1.7e308, 1e-300])
def test_rows_at_the_edge_of_numbers_are_standardised_as_plain_numpy_does_it(x):
    for rows in (
        np.full((2, 9), x),
        np.where(np.arange(9) % 2, x, -x)[None],
        np.where(np.arange(9) == 4, x, 1.0)[None],
    ):
        assert np.array_equal(standardise_rows(rows), standardise_rows_by_numpy(rows))


def test_rows_that_do_not_lie_together_in_memory_are_standardised_alike():
    x = rows(shape=(36,))
    assert np.array_equal(standardise_rows(x[::2, ::-1]), standardise_rows(x[::2, ::-1].copy()))


# --- hostile numbers --------------------------------------------------------------------------------------

HOSTILE = [
    *((np.float64, value) for value in (1.7e308, -1.7e308, 1e300, 5e-324, -0.0)),
    *((np.float32, value) for value in (3.4e38, -3.4e38, 1e-45)),
    *((np.float16, value) for value in (65504, -65504, 6e-8)),
    *((np.int64, value) for value in (2**63 - 1, -(2**63))),
    (np.uint64, 2**64 - 1),
]


def hostile(dtype, value, shape):
    """Rows of it alone; of it and its opposite by turns, down and across; of it once in each row."""
    whole = np.full((7, *shape), value, dtype)
    with np.errstate(over="ignore"):
        other = -whole
    turns, place = np.arange(7) % 2, np.arange(np.prod(shape)).reshape(shape)
    yield whole
    yield np.where(turns.reshape(-1, *(1 for _ in shape)), whole, other)
    yield np.where(place % 2, whole, other)
    yield np.where(place == 4, whole, np.ones_like(whole))


@pytest.mark.parametrize("dtype, value", HOSTILE)
@pytest.mark.parametrize("rule", ["sample", "feature", "none"])
@pytest.mark.parametrize("transforms", [Transforms(), Transforms(resize=(5, 4), mean=(0.5,), sd=(0.1,))])
@pytest.mark.filterwarnings("error")
def test_all_that_is_stored_of_hostile_numbers_is_finite(dtype, value, rule, transforms):
    for x in hostile(dtype, value, (3, 3)):
        normaliser = Normaliser.fitted(rule, x, transforms)
        rows = normaliser(x)
        moments, inputs = InputMoments.of(rows), InputStatistics.of(rows)
        moments = moments.joined(InputMoments.of(-rows))
        inputs = inputs.joined(InputStatistics.of(-rows))
        frozen = [] if normaliser.mean is None else [normaliser.mean, normaliser.sd]
        constants = [InputDensity.of(moments).constant, inputs.freedom]
        kept = [rows, *frozen, moments.mean, moments.square, inputs.mean, inputs.variance, *constants]
        assert all(np.isfinite(numbers).all() for numbers in kept)


def test_a_rule_from_features_has_the_bits_of_a_plain_mean_and_deviation():
    x = rows().reshape(20, 36)
    rule = Normaliser.fitted("feature", x)
    assert np.array_equal(rule.mean, x.mean(axis=0))
    assert np.array_equal(rule.sd, x.std(axis=0))
