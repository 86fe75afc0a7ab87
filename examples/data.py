"""Data sets of the trainers, as arrays in memory."""

from typing import NamedTuple

import numpy as np
from sklearn import datasets, model_selection


class Split(NamedTuple):
    """One part of a data set.

    Attributes:
      images: shape `(n, height, width, channels)`, float32 between 0 and 1.
      labels: shape `(n,)`, int32.
    """

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """The three parts of a data set: to train on, to choose by, to report."""

    train: Split
    validation: Split
    test: Split


def load_digits() -> Dataset:
    """Return scikit-learn's 1797 real handwritten digits, 8x8 pixels, ten classes.

    70 % are for training, 15 % for validation and 15 % for the test, every class in
    proportion. The split is the same for every run, whatever the run's seed.
    """
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = (pixels / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    whole = Split(images, labels.astype(np.int32))
    rest, test = _divide(whole, 0.15)
    train, validation = _divide(rest, 0.15 / 0.85)
    return Dataset(train, validation, test)


def _divide(split: Split, fraction: float) -> tuple[Split, Split]:
    """Return the two parts of a stratified division; the second has `fraction`."""
    images, held_images, labels, held_labels = model_selection.train_test_split(
        *split, test_size=fraction, stratify=split.labels, random_state=0
    )
    return Split(images, labels), Split(held_images, held_labels)
