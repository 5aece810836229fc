"""How many images a change of the model costs, with its uncertainty."""

import dataclasses

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
    if len(labels) < 2 or not len(labels) == len(before) == len(after):
        raise ValueError(
            f"{len(labels)} labels, {len(before)} and {len(after)} rows of logits: need the same, at least 2"
        )
    right = [np.argmax(logits, axis=-1) == labels for logits in (before, after)]
    d = right[1].astype(np.float64) - right[0].astype(np.float64)
    margin = 1.96 * np.std(d, ddof=1) / np.sqrt(len(d))
    accuracies = [float(np.mean(r)) for r in right]
    return PairedDifference(len(d), *accuracies, float(np.mean(d)), float(margin))
