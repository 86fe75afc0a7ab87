"""The examples' convolution: against XLA's own, and against float64 numpy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export, lax

from examples.models import convolution
from examples.models.convolution import convolve
from orthax import tasks

LAYOUT = ("NHWC", "HWIO", "NHWC")
EPS = np.finfo(np.float32).eps

# height, width, channels; kernel; features; strides; padding.
CASES = {
    "3x3": ((7, 6, 3), (3, 3), 5, (1, 1), ((1, 1), (1, 1))),
    "3x3, same": ((7, 6, 3), (3, 3), 5, (1, 1), "SAME"),
    "3x3, valid": ((7, 6, 3), (3, 3), 5, (1, 1), "VALID"),
    "3x3, stride 2": ((8, 8, 5), (3, 3), 3, (2, 2), ((1, 1), (1, 1))),
    "3x3, stride 2, same": ((9, 8, 3), (3, 3), 2, (2, 2), "SAME"),
    "3x3, stride 2, last pixel unused": ((8, 6, 3), (3, 3), 2, (2, 2), "VALID"),
    "7x7, stride 2": ((15, 12, 3), (7, 7), 2, (2, 2), ((3, 3), (3, 3))),
    "1x1": ((4, 5, 3), (1, 1), 2, (1, 1), "VALID"),
    "1x1, stride 2": ((5, 6, 3), (1, 1), 2, (2, 2), ((0, 0), (0, 0))),
    "kernel within the stride": ((9, 8, 1), (2, 1), 3, (3, 2), "VALID"),
    "unequal": ((8, 9, 3), (2, 4), 1, (1, 3), ((0, 2), (3, 1))),
    "more padding than taps": ((5, 5, 2), (2, 2), 3, (2, 2), ((3, 4), (2, 5))),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def reference(x, kernel, strides, padding, **options):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=LAYOUT, **options
    )


def draw(case, n=4, seed=0):
    """Return images, kernel and the gradient of the output."""
    shape, taps, features, strides, padding = case
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, *shape), np.float32)
    kernel = rng.standard_normal((*taps, shape[-1], features), np.float32)
    y = jax.eval_shape(lambda: reference(x, kernel, strides, padding))
    return x, kernel, rng.standard_normal(y.shape, np.float32)


def both(f, case, **options):
    """Return a compiled function: output and the two gradients."""
    strides, padding = case[3:]

    @jax.jit
    def run(x, kernel, g):
        y, pull = jax.vjp(lambda x, k: f(x, k, strides, padding, **options), x, kernel)
        return y, *pull(g)

    return run


ours = functools.partial(both, convolve, dimension_numbers=LAYOUT)
theirs = functools.partial(both, reference)


def in_numpy(x, kernel, g, strides, padding):
    """Return output and gradients by the definition, tap for tap, in float64."""
    x, kernel, g = (np.asarray(each, np.float64) for each in (x, kernel, g))
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    y, dx, dk = np.zeros_like(g), np.zeros_like(padded), np.zeros_like(kernel)
    for i, j in np.ndindex(*kernel.shape[:2]):
        rows = slice(i, i + strides[0] * g.shape[1], strides[0])
        columns = slice(j, j + strides[1] * g.shape[2], strides[1])
        seen = padded[:, rows, columns]
        y += np.einsum("nhwc,cd->nhwd", seen, kernel[i, j])
        dk[i, j] = np.einsum("nhwc,nhwd->cd", seen, g)
        dx[:, rows, columns] += np.einsum("nhwd,cd->nhwc", g, kernel[i, j])
    top, left = padding[0][0], padding[1][0]
    return y, dx[:, top : top + x.shape[1], left : left + x.shape[2]], dk


@pytest.fixture(params=["whole", "in pieces"])
def piece(request, monkeypatch):
    if request.param == "in pieces":
        monkeypatch.setattr(convolution, "_PIECE", 1)  # one image each


# --- what it computes -----------------------------------------------------------------


def check(found, arrays, case):
    """Hold outputs and gradients to the definition."""
    expected = in_numpy(*arrays, *case[3:])
    # Rounding is in proportion to the sum of absolute products: up to 1.6 eps here.
    scale = in_numpy(*map(np.abs, arrays), *case[3:])
    for one, other, size in zip(found, expected, scale, strict=True):
        assert one.shape == other.shape and one.dtype == jnp.float32
        assert (np.abs(one - other) <= 4 * EPS * size).all()


@every_case
def test_equals_the_definition_and_lax(case):
    arrays = draw(case)
    check(ours(case)(*arrays), arrays, case)
    check(theirs(case)(*arrays), arrays, case)


@pytest.mark.parametrize("name", ["3x3", "3x3, stride 2", "unequal"])
def test_pieces_change_nothing(name, monkeypatch):
    monkeypatch.setattr(convolution, "_PIECE", 1)
    case = CASES[name]
    arrays = draw(case)
    check(ours(case)(*arrays), arrays, case)


@pytest.mark.parametrize(
    "n, pieces",
    {0: 1, 1: 1, 33: 1, 64: 2, 100: 2, 128: 4, 1000: 25, 1024: 32, 1021: 1}.items(),
)
def test_pieces_are_equal_and_neither_tiny_nor_huge(n, pieces):
    assert convolution._count_pieces(n) == pieces
    assert n % pieces == 0 and (pieces == 1 or 32 <= n / pieces < 64)


def test_an_empty_batch():
    case = CASES["3x3, stride 2"]
    y, dx, dk = ours(case)(*draw(case, n=0))
    assert y.shape == (0, 4, 4, 3) and dx.shape == (0, 8, 8, 5) and not dk.any()


@pytest.mark.parametrize(
    "padding", [1, "SAME", "VALID", (2, 1), ((0, 1), (2, 1)), "CIRCULAR"]
)
def test_takes_what_flax_gives(padding):
    x, kernel, _ = draw(CASES["3x3"])
    options = {"strides": 2, "padding": padding}
    options["kernel_init"] = lambda *_: jnp.asarray(kernel)  # quicker than to draw

    def logits(f, x):
        rngs = nnx.Rngs(0)
        conv = nnx.Conv(3, 5, (3, 3), conv_general_dilated=f, rngs=rngs, **options)
        return conv(x)

    run = jax.jit(logits, static_argnums=0)
    one, other = (run(f, x) for f in (convolve, lax.conv_general_dilated))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "shape, kernel, options",
    [
        ((2, 6, 6, 4), (3, 3, 2, 4), {"feature_group_count": 2}),
        ((2, 6, 6, 4), (3, 3, 4, 4), {"batch_group_count": 2}),
        ((2, 6, 6, 4), (3, 3, 4, 4), {"rhs_dilation": (2, 2)}),
        ((2, 6, 6, 4), (3, 3, 4, 4), {"lhs_dilation": (2, 1)}),
        ((2, 6, 6, 4), (3, 3, 4, 4), {"preferred_element_type": jnp.float32}),
        ((2, 4, 6, 6), (4, 4, 3, 3), {"dimension_numbers": None}),
        ((2, 6, 4), (3, 4, 4), {"dimension_numbers": ("NHC", "HIO", "NHC")}),
    ],
    ids=str,
)
def test_all_else_is_left_to_lax(shape, kernel, options):
    options = {"dimension_numbers": LAYOUT, **options}
    strides, padding = (1,) * (len(shape) - 2), ((1, 0),) * (len(shape) - 2)
    one, other = (
        jax.make_jaxpr(lambda x, k, f=f: f(x, k, strides, padding, **options))(
            jnp.ones(shape), jnp.ones(kernel)
        )
        for f in (convolve, lax.conv_general_dilated)
    )
    assert str(one) == str(other)


def test_forward_mode_is_refused():
    x, kernel, _ = draw(CASES["1x1"])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(
            lambda x: convolve(x, kernel, (1, 1), "VALID", dimension_numbers=LAYOUT),
            (x,),
            (x,),
        )


def test_tasks_in_two_passes_need_no_forward_mode():
    x, kernel, _ = draw(CASES["3x3, stride 2"])

    def losses(kernel):
        y = convolve(x, kernel, (2, 2), "SAME", dimension_numbers=LAYOUT)
        return jnp.stack([(y**2).mean(), jnp.tanh(y[0]).mean(), -y[-1, 0].mean()])

    _, found = tasks.combined_value_and_grad(losses)(kernel)
    _, grads = tasks.task_value_and_grad(losses)(kernel)
    tx = tasks.combine_tasks()
    expected, _ = tx.update(grads, tx.init(kernel))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


# --- where it is used -----------------------------------------------------------------


def test_under_vmap(piece):
    case = CASES["3x3, stride 2"]
    drawn = [draw(case, seed=i) for i in range(3)]
    arrays = [np.stack(each) for each in zip(*drawn, strict=True)]
    found = jax.jit(jax.vmap(ours(case)))(*arrays)
    for i in range(3):
        expected = ours(case)(*(each[i] for each in arrays))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one[i], other, rtol=0, atol=1e-4)


def test_bfloat16_is_added_up_in_float32(monkeypatch):
    monkeypatch.setattr(convolution, "_PIECE", 1)
    case = ((2, 2, 1), (1, 1), 1, (1, 1), "VALID")
    # 1024 images add four each: in bfloat16 the sum would stop at 2^8 times four.
    ones = [jnp.ones(shape, jnp.bfloat16) for shape in ((1024, 2, 2, 1), (1, 1, 1, 1))]
    y, dx, dk = ours(case)(*ones, ones[0])
    assert {each.dtype for each in (y, dx, dk)} == {jnp.dtype("bfloat16")}
    assert float(dk[0, 0, 0, 0]) == 4096


def training_loop(f, case):
    """Return images, kernel and a loop over two steps of gradient descent."""
    strides, padding = case[3:]
    x, kernel, _ = draw(case)

    def run(x, kernel):
        def loss(x, kernel):
            y = f(x, kernel, strides, padding, dimension_numbers=LAYOUT)
            return (y**2).sum()

        def step(carry, _):
            grads = jax.grad(loss, argnums=(0, 1))(*carry)
            return jax.tree.map(lambda p, g: p - 1e-4 * g, carry, grads), None

        return lax.scan(step, (x, kernel), None, length=2)[0]

    return run, x, kernel


@pytest.mark.parametrize("name", ["3x3", "3x3, stride 2"])
def test_every_convolution_of_a_loop_is_the_fast_one(name, piece):
    run, *arrays = training_loop(convolve, CASES[name])
    compiled = jax.jit(run).lower(*arrays).compile()
    labels = re.findall(r"dim_labels=(\S+?),? ", compiled.as_text())
    assert len(labels) == 3 and set(labels) == {"b01f_01io->b01f"}
    plain, *_ = training_loop(lax.conv_general_dilated, CASES[name])
    for one, other in zip(jax.jit(run)(*arrays), jax.jit(plain)(*arrays), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_elsewhere_it_is_the_convolution_of_lax(platform, piece):
    case = CASES["3x3, stride 2"]
    arrays = draw(case, n=64)

    def operations(f):
        exported = export.export(both(f, case), platforms=[platform])(*arrays)
        text = re.sub(r"%\w+|loc\(.*\)", "", str(exported.mlir_module()))
        return sorted(re.findall(r"stablehlo\.(?:convolution.*|\w+)", text))

    # A choice of one branch, which XLA takes away.
    choice = {"case", "return", "constant", "optimization_barrier"}
    f = functools.partial(convolve, dimension_numbers=LAYOUT)
    one, other = (
        [line for line in operations(each) if line.split(".")[1] not in choice]
        for each in (f, reference)
    )
    assert one == other
    assert sum("convolution" in line for line in one) == 3
