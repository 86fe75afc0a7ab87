"""What from_model makes of classes of one's own, and of stacked axes anywhere.

Public models call their own classes `Linear`, `Einsum` or `Conv`, and stack layers
along any axis. Each leaf is cut as the hand-written axes say, or raises with advice.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
from flax import nnx

import orthax
from orthax import components, polar
from orthax.internal.components import decide_all

RAISES = layers.RAISES


def ones(*shape):
    return jnp.ones(shape)


def param(*shape):
    return nnx.Param(ones(*shape))


def tree_of(model):
    if isinstance(model, nnx.Module):
        return nnx.state(model, nnx.Param)
    return layers.eqx_params(model)


def decided(model, **how):
    """Return the cut of every leaf, or `RAISES` and the message."""
    all_leaves = decide_all(tree_of(model), components.from_model(model, **how))
    cuts = {x.path: RAISES if x.error else x.decision.cut for x in all_leaves}
    return cuts, {x.path: x.error for x in all_leaves if x.error}


# --- classes of one's own, by the library's names -------------------------------------


class Linear(nnx.Module):
    """As a public Qwen3 has it: input and output shapes of any rank."""

    def __init__(self, *shape):
        self.kernel = param(*shape)


class Einsum(nnx.Module):
    """As tunix has it: an equation at the call, and a shape that is no array's."""

    def __init__(self, *shape):
        self.w, self.shape = param(*shape), shape


class Conv(nnx.Module):
    def __init__(self, *shape):
        self.kernel = param(*shape)


class LayerNorm(nnx.Module):
    """Conditional: a matrix from the condition to the scale."""

    def __init__(self):
        self.kernel = param(8, 16)


class MultiHeadAttention(nnx.Module):
    def __init__(self, rngs):
        self.query = nnx.Linear(8, 8, rngs=rngs)
        self.out = nnx.Linear(8, 8, rngs=rngs)


class GeneralAttention(nnx.Module):
    def __init__(self, rngs):
        self.query = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.value = nnx.LinearGeneral((2, 3), 8, axis=(-2, -1), rngs=rngs)


class ShapeAndDtype(nnx.Module):
    def __init__(self):
        self.w, self.shape, self.dtype = param(8, 4), (8, 4), jnp.float32


class Named(nnx.Module):
    """Modules under names that tell ByName what they are."""

    def __init__(self, **parts):
        for name, part in parts.items():
            setattr(self, name, part)


class Heir(nnx.LinearGeneral):
    """A subclass of the library's: what the library says of it holds."""


class WithoutConstructor(nnx.Conv):
    """A subclass that is no convolution: its base was never constructed."""

    def __init__(self):
        self.kernel = param(8, 4)


class LinearHeir(nnx.Linear):
    """A subclass that puts a kernel of other axes in place of the library's."""

    def __init__(self, rngs):
        super().__init__(8, 8, rngs=rngs)
        self.kernel = param(8, 2, 4)


def equinox_class(name, **shapes):
    """Return an instance of an own Equinox class of this name."""
    annotations = dict.fromkeys(shapes, jax.Array)
    cls = type(name, (eqx.Module,), {"__annotations__": annotations})
    return cls(**{leaf: ones(*shape) for leaf, shape in shapes.items()})


@dataclasses.dataclass(frozen=True)
class Own:
    make: Any
    leaves: dict


OWN = {
    "Linear, kernel (D, H, K)": Own(
        lambda: Named(query=Linear(8, 2, 4), out=Linear(2, 4, 8)),
        {"query/kernel": layers.TO_PAIR, "out/kernel": layers.FROM_PAIR},
    ),
    "Linear, not told by its name": Own(lambda: Linear(8, 2, 4), {"kernel": RAISES}),
    "Einsum": Own(lambda: Named(mix=Einsum(2, 8, 4)), {"mix/w": RAISES}),
    "Einsum of two axes": Own(lambda: Einsum(8, 4), {"w": layers.DENSE}),
    "Conv": Own(lambda: Conv(3, 3, 8, 4), {"kernel": layers.CONV}),
    "MultiHeadAttention of Linears": Own(
        lambda: MultiHeadAttention(nnx.Rngs(0)),
        {
            **layers.below("query", layers.kernel(layers.DENSE)),
            **layers.below("out", layers.kernel(layers.DENSE)),
        },
    ),
    "MultiHeadAttention of Linears, three layers": Own(
        lambda: layers.nnx_stack(MultiHeadAttention)(nnx.Rngs(0)),
        {
            **layers.below("query", layers.kernel(layers.STACK)),
            **layers.below("out", layers.kernel(layers.STACK)),
        },
    ),
    "LayerNorm": Own(LayerNorm, {"kernel": layers.DENSE}),
    "a shape and a dtype": Own(lambda: Named(p=ShapeAndDtype()), {"p/w": layers.DENSE}),
    "a subclass": Own(
        lambda: Heir(6, (4, 5), rngs=nnx.Rngs(0)), layers.kernel(layers.TO_PAIR)
    ),
    "a subclass, not constructed": Own(WithoutConstructor, {"kernel": layers.DENSE}),
    "a subclass of other sizes": Own(
        lambda: LinearHeir(nnx.Rngs(0)), layers.kernel(RAISES)
    ),
    "Equinox Linear, weight (in, out)": Own(
        lambda: equinox_class("Linear", weight=(8, 3)), {"weight": RAISES}
    ),
    "Equinox Conv": Own(
        lambda: equinox_class("Conv", weight=(4, 3, 3, 3)), {"weight": RAISES}
    ),
    "Equinox LSTMCell, gates on an axis": Own(
        lambda: equinox_class("LSTMCell", weight_ih=(4, 6, 5)), {"weight_ih": RAISES}
    ),
    # The default for a leaf of two axes, and said to be a guess: see below.
    "Equinox GRUCell of two gates": Own(
        lambda: equinox_class("GRUCell", weight_ih=(8, 5)), {"weight_ih": layers.DENSE}
    ),
    "Equinox LayerNorm": Own(
        lambda: equinox_class("LayerNorm", weight=(8, 16)), {"weight": RAISES}
    ),
}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_classes_of_ones_own(own):
    cuts, errors = decided(own.make())
    assert cuts == own.leaves
    for path, message in errors.items():
        assert f"'{path}'" in message
        assert message.index("from_function") < message.index("overrides=[(")


def test_a_guess_is_said_to_be_one():
    model = equinox_class("GRUCell", weight_ih=(8, 5))
    (row,) = orthax.explain(tree_of(model), components.from_model(model)).rows
    assert row.guess and "module is not known" in row.reason


def test_heads_of_ones_own_attention():
    cuts, _ = decided(GeneralAttention(nnx.Rngs(0)), attention="per_head")
    query, out = layers.HEADS["per_head"]
    assert (cuts["query/kernel"], cuts["out/kernel"]) == (query, out)
    # From two axes to one: no heads, whatever its name.
    assert cuts["value/kernel"] == layers.FROM_PAIR


@pytest.mark.parametrize("name", ["flaxlike.nn", "equinox_extras", "flax_nnx.linear"])
def test_packages_whose_names_begin_alike(name):
    Alike = type("Linear", (nnx.Module,), {"__module__": name})
    model = Alike()
    model.kernel = param(8, 2, 4)
    assert decided(model)[0] == {"kernel": RAISES}


def test_overrides_come_before_sizes_that_do_not_fit():
    model = LinearHeir(nnx.Rngs(0))
    cuts, _ = decided(model, overrides=[("kernel", layers.TO_PAIR)])
    assert cuts["kernel"] == layers.TO_PAIR
    message = decided(model)[1]["kernel"]
    assert "(8, 2, 4)" in message and "(8, 8)" in message and "flax Linear" in message


# --- stacked axes ---------------------------------------------------------------------


def attention(leaves):
    query, out = leaves
    names = ("query", "key", "value")
    return {**{f"{name}/kernel": query for name in names}, "out/kernel": out}


# The layer, and the cuts of its leaves when it is not stacked.
STACKABLE = {
    "Linear": (lambda r: nnx.Linear(6, 5, rngs=r), {"kernel": layers.DENSE}),
    "LinearGeneral": (
        lambda r: nnx.LinearGeneral(8, (2, 4), rngs=r),
        {"kernel": layers.TO_PAIR},
    ),
    "Conv": (lambda r: nnx.Conv(4, 8, (3, 3), rngs=r), {"kernel": layers.CONV}),
    "grouped Conv": (
        lambda r: nnx.Conv(4, 6, (5, 5), feature_group_count=2, rngs=r),
        {"kernel": dataclasses.replace(layers.CONV, groups=2)},
    ),
    "ConvTranspose": (
        lambda r: nnx.ConvTranspose(4, 8, (5, 5), transpose_kernel=True, rngs=r),
        {"kernel": layers.TRANSPOSED},
    ),
    "Einsum": (
        lambda r: nnx.Einsum("btd,dhk->bthk", (8, 2, 4), rngs=r),
        {"kernel": layers.TO_PAIR},
    ),
    "MultiHeadAttention": (
        lambda r: nnx.MultiHeadAttention(2, 8, rngs=r),
        attention(layers.HEADS["whole"]),
    ),
    # Three layers of three heads: the query tells what the output leaves open.
    "MultiHeadAttention, as many heads as layers": (
        lambda r: nnx.MultiHeadAttention(3, 12, use_bias=False, rngs=r),
        attention(layers.HEADS["whole"]),
    ),
    "LoRA": (
        lambda r: nnx.LoRA(8, 2, 6, rngs=r),
        {"lora_a": layers.DENSE, "lora_b": layers.DENSE},
    ),
    "OptimizedLSTMCell": (
        lambda r: nnx.OptimizedLSTMCell(6, 5, rngs=r),
        {f"dense_{name}/kernel": layers.FUSED4 for name in "ih"},
    ),
    # The bias tells what the kernel leaves open.
    "LinearGeneral from as many heads as layers": (
        lambda r: nnx.LinearGeneral((3, 4), 8, axis=(-2, -1), rngs=r),
        {"kernel": layers.FROM_PAIR},
    ),
}


def moved(cut, axis, rank):
    """Return a cut of a leaf that gets one more axis, of rank `rank` then."""
    own = [i for i in range(rank) if i != axis % rank]
    rows, columns, spatial = (
        tuple(own[i] for i in part) for part in (cut.rows, cut.columns, cut.spatial)
    )
    return dataclasses.replace(cut, rows=rows, columns=columns, spatial=spatial)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("name", STACKABLE)
def test_one_stacked_axis(name, axis):
    make, cuts = STACKABLE[name]
    stack = nnx.split_rngs(splits=3)(nnx.vmap(make, out_axes=axis))
    model = layers.nnx_model(stack)
    found, errors = decided(model)
    assert not errors
    leaves = layers.leaves_of(tree_of(model))
    for path, cut in found.items():
        plain = cuts.get(path)
        assert cut == (plain and moved(plain, axis, len(leaves[path].shape))), path


@pytest.mark.parametrize("axes", [(0, 0), (0, 1), (1, 0), (-1, -1)])
def test_two_stacked_axes(axes):
    def stack(rngs, splits, make, axis):
        many = nnx.split_rngs(splits=splits)(nnx.vmap(make, out_axes=axis))
        return many(rngs)

    inner = lambda r: stack(r, 2, lambda r: nnx.Linear(6, 5, rngs=r), axes[0])  # noqa: E731
    model = layers.nnx_model(lambda r: stack(r, 3, inner, axes[1]))
    cut = moved(moved(layers.DENSE, axes[0], 3), axes[1], 4)
    assert decided(model)[0]["kernel"] == cut


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_sizes_that_do_not_tell_raise(axis):
    stack = nnx.vmap(lambda r: nnx.Linear(3, 3, rngs=r), out_axes=axis)
    model = layers.nnx_model(nnx.split_rngs(splits=3)(stack))
    cuts, errors = decided(model)
    assert cuts == {"kernel": RAISES, "bias": None}
    assert "does not tell" in errors["kernel"] and "overrides=[(" in errors["kernel"]
    cuts, _ = decided(model, overrides=[("kernel", layers.STACK)])
    assert cuts["kernel"] == layers.STACK


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_equinox_stacked_axes(axis):
    make = eqx.filter_vmap(
        lambda key: eqx.nn.Linear(6, 5, use_bias=False, key=key),
        out_axes=eqx.if_array(axis),
    )
    model = layers.eqx_model(lambda key: make(jax.random.split(key, 3)))
    assert decided(model)[0]["weight"] == moved(layers.ROW_DENSE, axis, 3)
    make = eqx.filter_vmap(
        lambda key: eqx.nn.LSTMCell(6, 5, use_bias=False, key=key),
        out_axes=eqx.if_array(axis),
    )
    model = layers.eqx_model(lambda key: make(jax.random.split(key, 3)))
    for cut in decided(model)[0].values():
        assert cut == moved(layers.ROW_FUSED4, axis, 3)


def test_scalar_features_of_equinox():
    model = layers.eqx_model(lambda key: eqx.nn.Linear("scalar", 5, key=key))
    assert decided(model)[0] == layers.weight(layers.ROW_DENSE)


def test_the_update_of_a_stack_is_the_stack_of_updates():
    stack = nnx.vmap(lambda r: nnx.LinearGeneral(8, (2, 4), rngs=r), out_axes=1)
    model = nnx.split_rngs(splits=3)(stack)(nnx.Rngs(0))
    grad = np.random.default_rng(0).standard_normal((8, 3, 2, 4))
    tx = orthax.orthogonalise(polar.SVD(), rule=components.from_model(model))
    grads = {"kernel": jnp.asarray(grad, jnp.float32), "bias": ones(3, 2, 4)}
    updates, _ = tx.update(grads, tx.init(grads))
    for layer in range(3):
        u, _, vt = np.linalg.svd(grad[:, layer].reshape(8, 8))
        found = np.reshape(updates["kernel"][:, layer], (8, 8))
        np.testing.assert_allclose(found, u @ vt, atol=1e-5)
