"""Handwritten digits, which scikit-learn ships."""

import numpy as np
from sklearn import datasets, model_selection

from examples.data.dataset import Dataset, Split


def load_digits(split: int = 0) -> Dataset:
    """Return scikit-learn's 1797 real handwritten digits, 8x8 pixels, ten classes.

    Images are float32 between 0 and 1. 70 % are for training, 15 % for validation and
    15 % for the test, every class in proportion. The split is the same for every run,
    whatever the run's seed; other numbers give other splits.
    """
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = (pixels / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    whole = Split(images, labels.astype(np.int32))
    rest, test = _divide(whole, 0.15, split)
    train, validation = _divide(rest, 0.15 / 0.85, split)
    return Dataset(train, validation, test)


def _divide(whole: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Return the two parts of a stratified division; the second has `fraction`."""
    images, held_images, labels, held_labels = model_selection.train_test_split(
        *whole, test_size=fraction, stratify=whole.labels, random_state=seed
    )
    return Split(images, labels), Split(held_images, held_labels)
