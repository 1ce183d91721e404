"""A mean with its standard error, of rows that are independent of each other."""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over tokens, or over rows where each row gives one number.

    Attributes:
      mean: the mean; NaN where there is nothing.
      stderr: its standard error, with rows as what was drawn; NaN for fewer than two rows.
      rows: rows that gave something.
      count: numbers in the mean.
    """

    mean: float
    stderr: float
    rows: int
    count: int


def estimate(
    values: Float[np.ndarray, "rows length"] | Bool[np.ndarray, "rows length"],
    mask: Bool[np.ndarray, "rows length"],
) -> Estimate:
    """Returns the mean of the masked values.

    Tokens of one row are not independent, so that the error is that of a ratio of two sums
    over rows: what a row's values sum up to, over how many there are. Where all rows have
    equally many it is the standard deviation of the rows' means over the root of their number.

    Args:
      values: any numbers; those outside the mask don't count, not even a NaN.
      mask: which count.
    """
    counts = mask.sum(axis=1)
    rows, count = int((counts > 0).sum()), int(counts.sum())
    if not count:
        return Estimate(math.nan, math.nan, 0, 0)
    sums = np.where(mask, values, 0).sum(axis=1, dtype=np.float64)
    mean = float(sums.sum() / count)
    if rows < 2:
        return Estimate(mean, math.nan, rows, count)
    squares = float(np.square(sums - mean * counts).sum())
    return Estimate(mean, math.sqrt(squares * rows / (rows - 1)) / count, rows, count)
