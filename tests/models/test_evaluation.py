import numpy as np
import pytest

from qcompiler.models.evaluation import jackknife_margin, mean_paired_difference, paired_difference


def logits_of(predicted):
    return np.eye(3, dtype=np.float32)[predicted]


def test_by_hand():
    labels = np.zeros(10, np.int32)
    before = logits_of([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])
    after = logits_of([0, 0, 0, 0, 0, 1, 2, 0, 1, 2])
    found = paired_difference(labels, before, after)
    assert (found.images, found.before, found.after) == (10, 0.7, 0.6)
    assert found.difference == pytest.approx(-0.1)
    # d has two -1 and one +1: sum of squares 3, mean -0.1, so the variance is (3 - 10 * 0.01) / 9.
    assert found.margin == pytest.approx(1.96 * np.sqrt(2.9 / 9 / 10))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    n, runs, covered = 2000, 400, 0
    labels = np.zeros(n, np.int32)
    for _ in range(runs):
        before = rng.random(n) < 0.95
        # Two of a hundred right ones are lost and a quarter of the wrong ones gained: -0.019 + 0.0125.
        after = np.where(before, rng.random(n) >= 0.02, rng.random(n) < 0.25)
        found = paired_difference(labels, logits_of(1 - before), logits_of(1 - after))
        covered += abs(found.difference + 0.0065) <= found.margin
    # 95 %, within four deviations of a share of 400 runs.
    assert abs(covered / runs - 0.95) < 4 * np.sqrt(0.95 * 0.05 / runs)


def test_equal_classifiers_differ_by_nothing():
    labels = np.arange(6, dtype=np.int32) % 3
    found = paired_difference(labels, logits_of(labels), logits_of(labels))
    assert (found.before, found.difference, found.margin) == (1, 0, 0)


@pytest.mark.parametrize(("labels", "before", "after"), [(1, 1, 1), (3, 3, 2), (3, 2, 3)])
def test_lengths_must_fit(labels, before, after):
    rows = lambda n: np.zeros((n, 3), np.float32)
    with pytest.raises(ValueError, match="rows of logits"):
        paired_difference(np.zeros(labels, np.int32), rows(before), rows(after))


def test_several_trainings_by_hand():
    labels = np.zeros(4, np.int32)
    before = [logits_of([0, 0, 0, 1]), logits_of([0, 0, 1, 1])]
    after = [logits_of([1, 0, 0, 0]), logits_of([1, 0, 1, 1])]
    found = mean_paired_difference(labels, before, after)
    assert (found.before, found.after) == (0.625, 0.5)
    # d is -1, 0, 0, 1/2: sum of squares 5/4, mean -1/8.
    assert found.difference == pytest.approx(-0.125)
    assert found.margin == pytest.approx(1.96 * np.sqrt((1.25 - 4 / 64) / 3 / 4))


def test_trainings_that_err_alike_are_no_more_certain_than_one():
    rng = np.random.default_rng(0)
    labels = np.zeros(500, np.int32)
    before, after = logits_of(rng.integers(0, 2, 500)), logits_of(rng.integers(0, 2, 500))
    one = paired_difference(labels, before, after)
    assert mean_paired_difference(labels, [before] * 3, [after] * 3).margin == pytest.approx(one.margin)


def test_what_makes_no_pairs_is_refused():
    labels = np.zeros(3, np.int32)
    with pytest.raises(ValueError, match="1 and 2 classifiers"):
        mean_paired_difference(labels, [logits_of(labels)], [logits_of(labels)] * 2)


def test_the_jackknife_of_a_mean_is_its_deviation():
    x = np.random.default_rng(0).normal(3, 2, 4000)
    margin = jackknife_margin(lambda places: float(np.mean(x[places])), len(x), groups=100)
    # 1 / sqrt(2 * 100) = 7 %, three times.
    assert margin == pytest.approx(1.96 * 2 / np.sqrt(4000), rel=0.21)
    # Every example left out alone gives the very formula.
    by_hand = 1.96 * np.std(x[:50], ddof=1) / np.sqrt(50)
    assert jackknife_margin(lambda places: float(np.mean(x[places])), 50, groups=50) == pytest.approx(by_hand)


def test_more_groups_than_examples_are_refused():
    with pytest.raises(ValueError, match="3 examples cannot be left out in 20 groups"):
        jackknife_margin(lambda places: 0.0, 3)
