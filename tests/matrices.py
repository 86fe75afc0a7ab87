"""Matrices with a prescribed spectrum, and their factors in float64 numpy."""

import numpy as np


def with_spectrum(m, n, values, *, seed=0, complex_=False):
    """Return an m x n matrix with the given singular values."""
    rng = np.random.default_rng(seed)

    def orthonormal(rows, columns):
        x = rng.normal(size=(rows, columns))
        if complex_:
            x = x + 1j * rng.normal(size=x.shape)
        return np.linalg.qr(x)[0]

    values = np.asarray(values, float)
    u, v = orthonormal(m, len(values)), orthonormal(n, len(values))
    return (u * values) @ v.conj().T


def gaussian(m, n, *, seed=0, complex_=False):
    """Return an m x n Gaussian matrix."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(m, n))
    return x + 1j * rng.normal(size=(m, n)) if complex_ else x


def factor(x, tol=1e-12):
    """Return the partial isometry of the polar decomposition, in double precision."""
    u, s, vh = np.linalg.svd(to_double(x), full_matrices=False)
    keep = s > tol * np.max(s, initial=0)
    return (u[:, keep]) @ vh[keep]


def to_double(x):
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
