"""How many images a change of the model costs, with its uncertainty."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """The accuracies of two classifiers on the same images, 0 to 1.

    Attributes:
      images: how many.
      before, after: the two accuracies.
      difference: `after - before`.
      margin: the 95 % interval of the difference is `difference - margin` to `difference + margin`.
    """

    images: int
    before: float
    after: float
    difference: float
    margin: float

    def percent(self) -> dict[str, float]:
        """`float` and `int8`, accuracies in percent; points `lost` from the first to the second, and their `margin`."""
        return {
            "float": 100 * self.before,
            "int8": 100 * self.after,
            "lost": -100 * self.difference,
            "margin": 100 * self.margin,
        }


def paired_difference(labels: np.ndarray, before: np.ndarray, after: np.ndarray) -> PairedDifference:
    """Compares two classifiers image by image.

    With d = 1 for an image that only the second gets right, -1 for one that only the first does, and 0 else, the
    difference of the accuracies is the mean of d, and its 95 % interval the mean +- 1.96 std(d) / sqrt(n) (Wald's, for
    paired proportions). What both get right or wrong adds no uncertainty, so the interval is far narrower than that of
    two accuracies measured apart.

    Args:
      labels: `int[n]`.
      before, after: logits, `[n, classes]`.

    Raises:
      ValueError: fewer than two images, or lengths that differ.
    """
    return mean_paired_difference(labels, [before], [after])


def mean_paired_difference(
    labels: np.ndarray, before: Sequence[np.ndarray], after: Sequence[np.ndarray]
) -> PairedDifference:
    """The mean over several pairs of classifiers, say of several trainings, on the same images.

    As `paired_difference`, with the mean over the pairs as an image's d: an image that is hard for one training is hard
    for the others too, so d has to be averaged before its deviation is taken. The interval is for other images and
    these trainings.

    Args:
      labels: `int[n]`.
      before, after: a sequence of logits each, `[n, classes]`, of the first and the second of every pair.

    Raises:
      ValueError: fewer than two images, no pair, or lengths that differ.
    """
    if not before or len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} classifiers make no pairs")
    for pair in zip(before, after, strict=True):
        if len(labels) < 2 or any(len(logits) != len(labels) for logits in pair):
            raise ValueError(
                f"{len(labels)} labels, {len(pair[0])} and {len(pair[1])} rows of logits: need the same, at least 2"
            )
    right = [np.mean([np.argmax(x, axis=-1) == labels for x in side], axis=0) for side in (before, after)]
    d = right[1] - right[0]
    margin = 1.96 * np.std(d, ddof=1) / np.sqrt(len(d))
    accuracies = [float(np.mean(r)) for r in right]
    return PairedDifference(len(d), *accuracies, float(np.mean(d)), float(margin))


def jackknife_margin(statistic: Callable[[np.ndarray], float], count: int, groups: int = 20) -> float:
    """Half the 95 % interval of a statistic that is no mean over examples, such as a mean average precision.

    The delete-a-group jackknife (Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter 11): with
    t_k computed without group k of g, the variance is (g - 1) / g * sum((t_k - mean(t))**2).

    Args:
      statistic: `int[m]` places of examples to the number; of a difference, both sides on the same examples.
      count: of the examples.
      groups: how many times it is computed; the interval itself is uncertain by about 1 / sqrt(2 groups).

    Raises:
      ValueError: fewer than two groups, or fewer examples than groups.
    """
    if not 2 <= groups <= count:
        raise ValueError(
            f"{count} examples cannot be left out in {groups} groups: need 2 groups to as many as examples"
        )
    places = np.arange(count)
    found = np.array([statistic(places[places % groups != k]) for k in range(groups)])
    return float(1.96 * np.sqrt((groups - 1) / groups * np.sum((found - found.mean()) ** 2)))
