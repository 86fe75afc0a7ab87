"""Every method against float64 numpy, by properties and at the edges."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices import factor, gaussian, to_double, with_spectrum

import orthax
from orthax import polar

# Compiled once for every method and shape, whichever test comes first.
polar_factor = jax.jit(orthax.polar_factor, static_argnames="method")

NS = polar.NewtonSchulz
# Method, and its largest error per entry on matrices of condition 10 in float32.
METHODS = {
    "svd": (polar.SVD(), 2e-6),
    "svd complete": (polar.SVD(null_space="complete"), 2e-6),
    "qdwh": (polar.QDWH(), 2e-6),
    "gram eigh": (polar.GramEigh(), 2e-5),
    "newton-schulz": (NS(gram=False), 2e-6),
    "newton-schulz gram": (NS(gram=True), 2e-5),
    "newton-schulz adaptive": (NS(tolerance=1e-5), 2e-6),
    "newton-schulz cubic": (NS(polar.CLASSIC_CUBIC), 5e-6),
    "newton-schulz quintic": (NS(polar.CLASSIC_QUINTIC), 5e-6),
    "deepseek": (NS(polar.DEEPSEEK_V4), 1e-3),
    "cans": (NS(polar.CANS), 0.13),
    "dion": (NS(polar.DION), 0.04),
    "jordan": (NS(polar.JORDAN), 0.35),
    "bfloat16": (NS(dtype="bfloat16"), 5e-2),
    "auto": (polar.Auto(), 2e-5),
    "auto fast": (polar.Auto("fast"), 0.04),
}
SHAPES = [(24, 8), (8, 24), (12, 12), (40, 5), (1, 7), (7, 1)]
each_method = pytest.mark.parametrize(
    ("method", "bound"), METHODS.values(), ids=METHODS.keys()
)
exact_methods = pytest.mark.parametrize(
    "method",
    [method for method, bound in METHODS.values() if bound < 1e-4],
    ids=[name for name, (_, bound) in METHODS.items() if bound < 1e-4],
)


def conditioned(m, n, condition=10.0, **kwargs):
    return with_spectrum(m, n, np.geomspace(1, 1 / condition, min(m, n)), **kwargs)


@each_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_numpy(method, bound, shape):
    x = conditioned(*shape).astype(np.float32)
    out = np.asarray(polar_factor(x, method))
    assert out.shape == shape
    assert np.abs(out - factor(x)).max() < bound


@exact_methods
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        ("bfloat16", 4e-3),
        ("float16", 5e-4),
        ("float32", 2e-5),
        ("float64", 2e-6),
        ("complex64", 2e-5),
        ("complex128", 2e-6),
    ],
)
def test_every_dtype(method, dtype, bound, x64):
    x = conditioned(2 * 9, 6, complex_="complex" in dtype)
    x = jnp.asarray(np.stack([x, x[::-1]])).astype(dtype)
    for stack in (x, x.mT):
        out = polar_factor(stack, method)
        assert out.dtype == x.dtype
        expected = np.stack([factor(y) for y in to_double(stack.astype(x64_of(dtype)))])
        assert np.abs(to_double(out.astype(x64_of(dtype))) - expected).max() < bound


def x64_of(dtype):
    return "complex128" if "complex" in dtype else "float64"


@exact_methods
def test_properties_of_the_factor(method):
    """Orthonormal, definite remainder, nearest, equivariant, idempotent."""
    x = conditioned(20, 8).astype(np.float32)
    f = jax.jit(lambda x: polar_factor(x, method))
    o = np.asarray(f(x), np.float64)
    assert np.abs(o.T @ o - np.eye(8)).max() < 5e-5
    p = o.T @ x
    assert np.abs(p - p.T).max() < 5e-5
    assert np.linalg.eigvalsh((p + p.T) / 2).min() > -5e-5
    rng = np.random.default_rng(1)
    distance = np.linalg.norm(x - o)
    for _ in range(20):
        nearby = factor(o + 0.1 * rng.normal(size=o.shape))
        assert np.linalg.norm(x - nearby) > distance
    q, r = factor(gaussian(20, 20)), factor(gaussian(8, 8, seed=2))
    turned = f((q @ x @ r).astype(np.float32))
    assert np.abs(np.asarray(turned) - q @ o @ r).max() < 5e-5
    assert np.abs(np.asarray(polar_factor(x.T, method)) - o.T).max() < 5e-5
    assert np.abs(np.asarray(f(o.astype(np.float32))) - o).max() < 5e-5


@each_method
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e37])
def test_scale_does_not_matter(method, bound, scale):
    x = conditioned(12, 5).astype(np.float32)
    x /= np.abs(x).max()
    plain = np.asarray(polar_factor(x, method))
    scaled = np.asarray(polar_factor(x * np.float32(scale), method))
    # Rounding of the scaled input, and bfloat16's own rounding, is all that may differ.
    assert np.abs(scaled - plain).max() < max(1e-5, bound / 2)
    assert np.abs(plain).max() > 0.1


@each_method
def test_zero_gives_zero_except_where_completion_is_asked_for(method, bound):
    out = np.asarray(polar_factor(jnp.zeros((2, 6, 4)), method))
    if method == polar.SVD(null_space="complete"):
        assert np.allclose(np.linalg.norm(out, axis=(1, 2)), 2)
    else:
        assert (out == 0).all()


@each_method
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_matrix(method, bound, bad):
    x = np.stack([conditioned(9, 5, seed=i) for i in range(3)]).astype(np.float32)
    clean = np.asarray(polar_factor(x[[0, 2]], method))
    x[1, 2, 3] = bad
    out = np.asarray(polar_factor(x, method))
    assert np.isnan(out[1]).all()
    assert np.abs(out[[0, 2]] - clean).max() < 1e-6


@each_method
@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0), (0, 3), (2, 0, 0, 3)], ids=str)
def test_empty_comes_back(method, bound, shape):
    assert polar_factor(jnp.zeros(shape), method).shape == shape


def slope(method):
    """Return the largest derivative of the composed table on [0, 0.95], or one."""
    value, derivative = np.linspace(0, 0.95, 10_001), 1
    for row in getattr(method, "coefficients", ()):
        p = np.polynomial.Polynomial(np.ravel([(0, a) for a in row]))
        value, derivative = p(value), derivative * p.deriv()(value)
    return np.abs(derivative).max()


@each_method
def test_batch_vmap_loop_and_jit_agree(method, bound):
    x = np.stack([conditioned(9, 4, seed=i) for i in range(6)])
    x = x.reshape(3, 2, 9, 4).astype(np.float32)
    f = lambda x: polar_factor(x, method)  # noqa: E731
    loop = np.stack([[np.asarray(f(y)) for y in row] for row in x])
    # Other orders of summation, amplified by the slope of the table; rounding to
    # bfloat16 makes of each a difference as large as its own error.
    half = "bfloat16" in repr(method)
    rounding = 4 * np.finfo(np.float32).eps * slope(method)
    allowed = max(1e-4, bound if half else min(bound, rounding))
    eager = orthax.polar_factor
    for other in (f(x), eager(x, method), jax.vmap(f)(x), jax.vmap(jax.vmap(f))(x)):
        assert np.abs(np.asarray(other) - loop).max() < allowed


def per_direction(x, o):
    """Return singular values over the Frobenius norm, and O in the singular basis."""
    u, s, vh = np.linalg.svd(np.asarray(x, np.float64))
    return s / np.linalg.norm(s), u.T @ np.asarray(o, np.float64) @ vh.T


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (24, 24), (1024, 16)], ids=str)
@pytest.mark.parametrize(
    "spectrum", ["gaussian", "1e2", "1e4", "1e6", "half rank", "rank one"]
)
def test_the_contract_of_the_default(shape, spectrum):
    """DESIGN's contract per singular direction, with the tighter bound for CPU."""
    k = min(shape)
    values = {
        "1e2": np.geomspace(1, 1e-2, k),
        "1e4": np.geomspace(1, 1e-4, k),
        "1e6": np.geomspace(1, 1e-6, k),
        "half rank": np.geomspace(1, 1e-1, k // 2),
        "rank one": [1.0],
    }.get(spectrum)
    x = gaussian(*shape) if values is None else with_spectrum(*shape, values)
    x = x.astype(np.float32)
    s, inside = per_direction(x, polar_factor(x))
    diagonal = np.diag(inside)
    lifted = s >= 1e-3
    assert np.abs(diagonal[lifted] - 1).max() < 1e-4
    assert (diagonal[~lifted] > -1e-3).all()
    assert (diagonal[~lifted] < 1.001).all()
    coupling = inside.copy()
    coupling[np.arange(k), np.arange(k)] = 0
    assert np.abs(coupling).max() < 1e-3
    null = s < 1e-7
    assert (
        np.linalg.norm(inside[:k, :k][null][:, null], 2 if null.any() else None) < 1e-2
    )


def test_null_space_of_svd():
    x = with_spectrum(10, 6, [3.0, 2.0]).astype(np.float32)
    zero = np.asarray(polar_factor(x, polar.SVD()))
    complete = np.asarray(polar_factor(x, polar.SVD(null_space="complete")))
    assert np.abs(zero - factor(x, tol=1e-5)).max() < 1e-5
    assert np.abs(complete.T @ complete - np.eye(6)).max() < 1e-5
    x = with_spectrum(10, 6, [1.0, 0.2, 0.05, 0.01, 0.005, 0.002]).astype(np.float32)
    cut = np.asarray(polar_factor(x, polar.SVD(rank_tol=0.03)))
    assert np.abs(cut - factor(x, tol=0.03)).max() < 1e-5


def test_rank_tolerance_is_numpys_at_its_own_threshold():
    """Values on both sides of max(m, n) eps, which only that formula splits."""
    tol = 50 * np.finfo(np.float32).eps
    x = np.zeros((50, 4), np.float32)
    x[range(4), range(4)] = [1, 1.1 * tol, 0.9 * tol, 0]
    out = np.asarray(polar_factor(x, polar.SVD()))
    assert np.allclose(out[range(4), range(4)], [1, 1, 0, 0])


def test_gram_eigh_drops_what_the_gram_matrix_cannot_hold():
    x = with_spectrum(64, 4, [1.0, 0.3, 1e-1, 1e-4]).astype(np.float32)
    out = np.asarray(polar_factor(x, polar.GramEigh()))
    assert np.abs(out - factor(x, tol=1e-3)).max() < 1e-4
    kept = polar_factor(x, polar.GramEigh(rank_tol=0.2))
    assert np.abs(np.asarray(kept) - factor(x, tol=0.2)).max() < 1e-4


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_adaptive_stops_at_its_tolerance_whatever_the_condition(condition):
    x = conditioned(32, 12, condition).astype(np.float32)
    error = np.abs(np.asarray(polar_factor(x, NS(tolerance=1e-5))) - factor(x)).max()
    # Directions of relative size s come out of float32 input with an error of eps / s.
    assert error < 20 * condition * np.finfo(np.float32).eps + 1e-6
    loose = polar_factor(x, NS(polar.CLASSIC_CUBIC[:1], tolerance=0.3))
    assert np.abs(np.asarray(loose) - factor(x)).max() > 1e-3


def test_adaptive_leaves_what_has_arrived_alone():
    """A table's rows do not fix one: an orthonormal matrix must not go through them."""
    x = np.stack([factor(gaussian(8, 4)), conditioned(8, 4, 1e4)]).astype(np.float32)
    out = np.asarray(polar_factor(x, NS(polar.JORDAN, tolerance=1e-4)))
    assert np.abs(out[0] - x[0]).max() < 1e-5
    assert np.abs(out[1] - factor(x[1])).max() < 5e-3


def test_adaptive_does_not_depend_on_its_neighbours():
    """A slow neighbour must not push noise into the null space of one that is done."""
    easy = with_spectrum(24, 12, np.geomspace(1, 0.1, 6)).astype(np.float32)
    hard = conditioned(24, 12, 1e6).astype(np.float32)
    alone = np.asarray(polar_factor(easy, NS(tolerance=1e-5)))
    together = np.asarray(polar_factor(np.stack([hard, easy]), NS(tolerance=1e-5)))
    # Rounding of other sums, amplified in the null space; noise there is of order one.
    assert np.abs(together[1] - alone).max() < 3e-4


@pytest.mark.parametrize("lower", [1e-4, 1e-6])
def test_long_tables_keep_their_accuracy_in_gram_space(lower):
    """Half the rank: restarts after 3 and 8 steps give 6e-6 and 1e-2 here."""
    x = with_spectrum(256, 64, np.geomspace(1, 0.1, 32)).astype(np.float32)
    method = NS(polar.polar_express(lower), gram=True)
    s, inside = per_direction(x, polar_factor(x, method))
    assert np.abs(np.diag(inside)[s > 1e-3] - 1).max() < 3e-6


def test_restarts_and_symmetry_keep_the_gram_iteration_bounded():
    """One rank, where an iteration without restarts is known to go astray."""
    x = with_spectrum(96, 32, [1.0]).astype(np.float32)
    for restarts in (None, (3,), (2, 4, 6)):
        out = np.asarray(polar_factor(x, NS(gram=True, restarts=restarts)))
        assert np.linalg.norm(out, 2) < 1.001
    s = np.geomspace(1, 1e-2, 32)
    y = with_spectrum(96, 32, s).astype(np.float32)
    few = np.abs(np.asarray(polar_factor(y, NS(gram=True, restarts=()))) - factor(y))
    more = np.abs(np.asarray(polar_factor(y, NS(gram=True))) - factor(y))
    assert more.max() < few.max()


def test_aspect_ratio_chooses_the_gram_iteration():
    text = {
        shape: str(jax.make_jaxpr(lambda x: NS().factor(x))(jnp.zeros((1, *shape))))
        for shape in [(8, 8), (8, 11), (8, 12), (12, 8)]
    }
    rolled = {shape: "scan" in jaxpr for shape, jaxpr in text.items()}
    assert rolled == {(8, 8): True, (8, 11): True, (8, 12): False, (12, 8): False}


def test_flops_are_those_of_the_products():
    """Against the dimensions of every product in the traced program."""

    def counted(method, m, n):
        total = 0
        jaxpr = jax.make_jaxpr(method.factor)(jnp.zeros((1, m, n))).jaxpr

        def visit(jaxpr, times):
            nonlocal total
            for eqn in jaxpr.eqns:
                if eqn.primitive.name == "dot_general":
                    a = eqn.invars[0].aval.shape
                    contracted = eqn.params["dimension_numbers"][0][0]
                    inner = int(np.prod([a[i] for i in contracted]))
                    total += 2 * times * inner * int(np.prod(eqn.outvars[0].aval.shape))
                inside = eqn.params.get("jaxpr")
                if inside is not None:
                    length = eqn.params.get("length", 1)
                    visit(getattr(inside, "jaxpr", inside), times * length)

        visit(jaxpr, 1)
        return total

    for method in (NS(), NS(polar.CLASSIC_CUBIC), NS(polar.JORDAN), NS(gram=True)):
        for m, n in ((8, 8), (8, 24), (24, 8)):
            assert method.flops(m, n) == counted(method, m, n)
    for method, _ in METHODS.values():
        assert method.flops(64, 128) == method.flops(128, 64) > 64 * 64 * 128


GRADIENT_CASES = {
    "tall": gaussian(6, 4),
    "wide": gaussian(4, 6),
    "square": gaussian(5, 5),
    "equal singular values": with_spectrum(6, 4, [2.0, 2.0, 1.0, 1.0]),
    "orthonormal": factor(gaussian(6, 4)),
    "complex": gaussian(5, 3, complex_=True),
    "complex wide": gaussian(3, 5, complex_=True),
    "tiny": 1e-30 * gaussian(6, 4),
}


@pytest.mark.parametrize(
    ("case", "method"),
    [(case, polar.Auto()) for case in GRADIENT_CASES]
    + [("tall", polar.SVD()), ("wide", polar.QDWH()), ("tall", NS(polar.JORDAN))],
    ids=repr,
)
def test_derivative_against_finite_differences(case, method, x64):
    """The rule is one for all methods, the inexact too: the exact factor's."""
    x = GRADIENT_CASES[case]
    size = np.abs(x).max()
    d = size * gaussian(*x.shape, seed=3, complex_=np.iscomplexobj(x))
    w = gaussian(*x.shape, seed=4, complex_=np.iscomplexobj(x))
    h = 1e-6
    expected = (factor(x + h * d) - factor(x - h * d)) / (2 * h)
    f = lambda x: polar_factor(x, method)  # noqa: E731
    _, forward = jax.jvp(f, (jnp.asarray(x),), (jnp.asarray(d),))
    assert np.abs(forward - expected).max() < 1e-7 * np.abs(expected).max()
    grad = jax.grad(lambda x: jnp.sum(w.conj() * f(x)).real)(jnp.asarray(x))
    reverse = np.sum(np.asarray(grad) * d).real
    assert np.isclose(reverse, np.sum(w.conj() * expected).real, rtol=1e-6, atol=1e-7)


def test_derivative_along_matrices_of_one_rank(x64):
    u, v = gaussian(6, 2), gaussian(4, 2, seed=1)
    du, dv = gaussian(6, 2, seed=2), gaussian(4, 2, seed=3)
    h = 1e-6
    ahead, behind = ((u + s * du) @ (v + s * dv).T for s in (h, -h))
    expected = (factor(ahead, 1e-9) - factor(behind, 1e-9)) / (2 * h)
    tangent = du @ v.T + u @ dv.T
    _, out = jax.jvp(polar_factor, (jnp.asarray(u @ v.T),), (jnp.asarray(tangent),))
    assert np.abs(out - expected).max() < 1e-6


@pytest.mark.parametrize(
    "x", [np.zeros((4, 3)), with_spectrum(4, 3, [1.0]), np.eye(3)], ids=["0", "1", "I"]
)
def test_derivative_is_finite_where_the_factor_is_not_differentiable(x):
    x = jnp.asarray(x, jnp.float32)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(polar_factor(x) * jnp.arange(3.0))))(x)
    assert np.isfinite(grad).all()
    if not x.any():
        assert (grad == 0).all()


def test_second_derivative_against_finite_differences(x64):
    x, d = jnp.asarray(gaussian(5, 3)), jnp.asarray(gaussian(5, 3, seed=1))
    grad = jax.grad(lambda x: jnp.sum(polar_factor(x) ** 3))
    _, second = jax.jvp(grad, (x,), (d,))
    h = 1e-5
    expected = (grad(x + h * d) - grad(x - h * d)) / (2 * h)
    assert np.abs(second - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    "name",
    [
        "auto",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("svd", "gram eigh", "newton-schulz adaptive")
        ),
    ],
)
def test_inside_shard_map(name):
    method, _ = METHODS[name]
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.asarray(gaussian(8 * 12, 6).reshape(8, 12, 6), jnp.float32)
    spec = jax.sharding.PartitionSpec("d")
    f = lambda x: polar_factor(x, method)  # noqa: E731
    mapped = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
    assert np.abs(jax.jit(mapped)(x) - f(x)).max() < 5e-6
    loss = lambda f: lambda x: jnp.sum(f(x)[:, :3] ** 3)  # noqa: E731
    assert np.abs(jax.grad(loss(mapped))(x) - jax.grad(loss(f))(x)).max() < 1e-5


@pytest.mark.parametrize("method", [polar.Auto(), polar.Auto("fast"), polar.SVD()])
def test_lowers_for_other_platforms(method):
    import jax.export

    f = jax.jit(lambda x: polar_factor(x, method))
    shape = jax.ShapeDtypeStruct((2, 16, 8), jnp.float32)
    exported = jax.export.export(f, platforms=("tpu", "cuda", "cpu"))(shape)
    assert exported.platforms == ("tpu", "cuda", "cpu")
    text = exported.mlir_module()
    assert ("bf16" in text) == (method == polar.Auto("fast"))


@pytest.mark.parametrize(
    ("call", "methods"),
    [
        ("f(x, m)", "polar.SVD(), polar.GramEigh()"),
        pytest.param("f(x, m)", "polar.QDWH(), polar.Auto()", marks=pytest.mark.slow),
        pytest.param(  # the default is under vmap in tests/test_dwh.py
            "jax.vmap(lambda x: f(x, m))(x)",
            "polar.QDWH(), polar.GramEigh()",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "jax.grad(lambda x: f(x, m)[0, :3].sum())(x)",
            "polar.Auto()",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["stack", "stack, others", "vmap", "grad"],
)
def test_many_groups_do_not_deadlock_on_cpu(call, methods):
    """Six stacks in one program; batched LAPACK calls would hang there."""
    script = f"""
        import jax, jax.numpy as jnp
        from orthax import polar
        from orthax.polar import polar_factor as f
        xs = [jax.random.normal(jax.random.key(i), (4, 128 + 16 * i, 64 + 8 * i))
              for i in range(6)]
        for m in [{methods}]:
            out = jax.jit(lambda xs: [{call} for x in xs])(xs)
            assert all(jnp.isfinite(o).all() for o in out)
        print("finished")
    """
    # With one device: eight of them have threads enough for anything. Batched eigh
    # hangs without optimisation as it does with it.
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "finished", done.stderr


def test_own_methods_are_welcome():
    @dataclasses.dataclass(frozen=True)
    class Sign:
        def factor(self, x):
            return jnp.sign(x)

        def flops(self, m, n):
            return 0.0

    out = polar_factor(jnp.array([[3.0, -2.0]]), Sign())
    assert out.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: polar.SVD(null_space="full"), ValueError, "'zero', 'complete'"),
        (lambda: polar.SVD("complete", rank_tol=0.1), ValueError, "has no effect"),
        (lambda: polar.SVD(rank_tol=-1.0), ValueError, "finite and positive"),
        (lambda: polar.GramEigh(rank_tol=0.0), ValueError, "finite and positive"),
        (lambda: polar.QDWH(max_iterations=0), ValueError, "finite and positive"),
        (lambda: polar.Auto("best"), ValueError, "'exact', 'fast'"),
        (lambda: NS(()), ValueError, r"one row .* got \(\)"),
        (lambda: NS(polar.JORDAN[0]), TypeError, "one row"),
        (lambda: NS(((1.5, -0.5), (1, 2, 3))), ValueError, "one row"),
        (lambda: NS(((1.5, float("nan")),)), ValueError, "finite Python numbers"),
        (lambda: NS((("a", "b"),)), TypeError, "Python numbers"),
        (lambda: NS(tolerance=-1e-3), ValueError, "finite and positive"),
        (lambda: NS(gram=True, tolerance=0.1), ValueError, "gram=False"),
        (lambda: NS(gram=True, dtype="bfloat16"), ValueError, "amplifies rounding"),
        (
            lambda: NS(gram=True, precision="default"),
            ValueError,
            "the highest `precision`",
        ),
        (lambda: NS(restarts=(2,), tolerance=0.1), ValueError, "not used"),
        (lambda: NS(gram=False, restarts=(2,)), ValueError, "not used"),
        (lambda: NS(restarts=(0, 2)), ValueError, "between 1 and 6"),
        (lambda: NS(restarts=(3, 2)), ValueError, "ascending"),
        (lambda: NS(restarts=(9,)), ValueError, "between 1 and 6"),
        (lambda: NS(dtype="float32"), ValueError, "'bfloat16', 'float16'"),
        (lambda: NS(precision="exquisite"), ValueError, "exquisite"),
        (lambda: polar_factor(jnp.ones(3)), ValueError, r"\(\*batch, m, n\)"),
        (lambda: polar_factor(jnp.ones((3, 3), int)), TypeError, "convert it"),
        (lambda: polar_factor(jnp.eye(2), polar.SVD), TypeError, r"write SVD\(\)"),
        (lambda: polar_factor(jnp.eye(2), "svd"), TypeError, "of type str"),
        (lambda: polar_factor(jnp.eye(2), lambda x: x), TypeError, "polar method"),
        (
            lambda: polar_factor(jnp.eye(2) * 1j, NS(dtype="bfloat16")),
            TypeError,
            "cannot hold complex",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_traced_coefficients_are_refused_with_the_reason():
    with pytest.raises(TypeError, match="Python numbers"):
        jax.jit(lambda a: NS(((a, -0.5),)).factor(jnp.eye(2)[None]))(1.5)


def test_methods_are_hashable_printable_and_not_callable():
    for method, _ in METHODS.values():
        assert hash(method) == hash(dataclasses.replace(method))
        assert type(method).__name__ in repr(method)
        assert not callable(method)
    half = NS(dtype=jnp.bfloat16)
    assert half == NS(dtype="bfloat16")
    from_list = NS([[1.5, -0.5]] * 3, restarts=[1, 2])
    assert from_list == NS(((1.5, -0.5),) * 3, restarts=(1, 2))
    assert hash(from_list)


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "float64"])
def test_fast_rounds_products_of_float32_alone(dtype, x64):
    """Every platform's branch is traced; half precision cannot hold complex numbers."""
    import jax.export

    x = jnp.asarray(conditioned(24, 8), dtype)
    out = polar_factor(x, polar.Auto("fast"))
    assert out.dtype == dtype
    assert np.abs(np.asarray(out) - factor(np.asarray(x))).max() < 0.04
    shapes = jax.ShapeDtypeStruct(x.shape, x.dtype)
    step = jax.jit(lambda x: polar_factor(x, polar.Auto("fast")))
    text = jax.export.export(step, platforms=["cuda"])(shapes).mlir_module()
    assert "bf16" not in text
