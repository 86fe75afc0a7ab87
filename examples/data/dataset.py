"""What a data set is."""

from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """One part of a data set.

    Attributes:
      images: shape `(n, height, width, channels)`; float32 between 0 and 1, or uint8
        from 0 to 255, as the function that loads them says.
      labels: shape `(n,)`, int32.
    """

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """The three parts of a data set: to train on, to choose by, to report."""

    train: Split
    validation: Split
    test: Split
