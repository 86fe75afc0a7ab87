"""The worst matrix for the default methods keeps a third of what is promised."""

import numpy as np
import pytest
from matrices import with_spectrum

from benchmarks import contract
from benchmarks.polar import measure, reference

SMALL = ((64, 4), (97, 97), (1024, 10), (4000, 8), (300, 192))
each_method = pytest.mark.parametrize("method", contract.METHODS)


def check(method, found):
    wrong = [(str(at), contract.broken(row, method)) for at, row in found]
    assert not [pair for pair in wrong if pair[1]]


@each_method
@pytest.mark.parametrize("name", contract.FAMILIES)
def test_families(method, name):
    check(method, contract.family(method, name, "float32", SMALL, seeds=1))


@pytest.mark.slow
@each_method
@pytest.mark.parametrize("dtype", contract.DTYPES)
@pytest.mark.parametrize("name", contract.FAMILIES)
def test_families_in_every_shape(method, name, dtype):
    check(method, contract.family(method, name, dtype, contract.SHAPES, seeds=3))


# Spectra that a first step with c = 16,000 couples by 1.6e-3 to 6.7e-3 where a kernel
# adds up one row after another: sides, singular values, seed.
KNOWN = {
    "64 x 4": (64, 4, [1, 8e-3, 8e-3, 1e-5], 2),
    "4000 x 3": (4000, 3, [1, 8e-3, 1e-5], 3),
    "4000 x 8": (4000, 8, [1, *[8e-3] * 6, 1e-5], 6),
    "1024 x 16": (1024, 16, np.geomspace(1, 1e-6, 16), 0),
    # Duplicated directions: sums of one large number and many small ones.
    "512 x 256": (512, 256, np.r_[np.geomspace(1, 0.4, 128), np.zeros(128)], 0),
}


@each_method
@pytest.mark.parametrize("case", KNOWN)
def test_matrices_that_were_once_too_hard(method, case):
    m, n, values, seed = KNOWN[case]
    x = with_spectrum(m, n, values, seed=seed)
    check(method, [(case, contract.errors(method, contract.stored(x, "float32")))])


@each_method
def test_long_sums_of_equal_terms(method):
    """Each is rounded in the same direction: 2e-4 where a kernel adds up 65,536."""
    name = "one magnitude a column"
    shapes = ((65536, 3), (1900, 3), (4000, 16))
    check(method, contract.family(method, name, "float32", shapes, seeds=1))


@each_method
@pytest.mark.parametrize("shape", SMALL[:1] + SMALL[2:4], ids=str)
def test_climbs(method, shape):
    check(method, contract.climb(method, shape, matrices=60))


@pytest.mark.slow
@each_method
@pytest.mark.parametrize("shape", contract.CLIMBED, ids=str)
def test_long_climbs(method, shape):
    for seed in (1, 2):
        check(method, contract.climb(method, shape, matrices=400, seed=seed))


def test_bounds_are_a_third_of_the_promise():
    for name, promise in contract.PROMISE.items():
        one = name == "small_max"
        assert (contract.BOUND[name] - one) / (promise - one) < 0.34


def test_what_is_worse_is_found():
    """A factor whose directions are turned by 1e-3, and one with a wrong value."""
    x = with_spectrum(20, 3, [1, 0.5, 1e-2])
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    angle = np.array([[1, 1e-3, 0], [-1e-3, 1, 0], [0, 0, 1]])
    turned, short = measure(u @ angle @ vh, ref := reference(x)), None
    assert contract.broken(turned) == ["coupling 0.001"]
    short = measure(u * [1, 1, 0.9999] @ vh, ref)
    assert contract.broken(short) == ["kept_error 0.0001"]
    assert contract.used(turned) == pytest.approx(1, rel=1e-3)
    assert contract.used(short) == pytest.approx(1, rel=1e-3)
    assert contract.used(short | {"kept_error": np.nan}) == np.inf
    assert contract.broken(short, contract.HIGH) == []
    assert contract.broken(contract.worst([turned, short])) == [
        "kept_error 0.0001",
        "coupling 0.001",
    ]


def test_a_climb_climbs():
    """It finds matrices that use up more than any that it started from."""
    shape = (64, 4)
    found = [contract.used(row) for _, row in contract.climb("DWH()", shape, 80)]
    begin = len(contract.starts(shape))
    assert max(found[begin:]) > max(found[:begin])
