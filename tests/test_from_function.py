"""`components.from_function` against models whose axes are written by hand."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from layers import Cut
from matrices import factor

import orthax
from orthax import components

DENSE, STACK, CONV, CONV1D = layers.DENSE, layers.STACK, layers.CONV, layers.CONV1D
ROW_DENSE, ROW_CONV = layers.ROW_DENSE, layers.ROW_CONV
TO_PAIR, FROM_PAIR = layers.TO_PAIR, layers.FROM_PAIR
TOKENS = jax.ShapeDtypeStruct((2, 7), "int32")
RAISES = layers.RAISES


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


@dataclasses.dataclass(frozen=True)
class Row:
    """A model, and how every leaf of rank 2 or more must be cut."""

    name: str
    build: Callable[[], tuple[Any, ...]]
    leaves: Mapping[str, Cut | str | None]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def plain(name, apply, params, inputs, leaves, **options):
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return Row(name, lambda: (apply, params, *inputs), leaves, options)


def of_linen(name, module, inputs, leaves, **options):
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)

    def build():
        variables = jax.eval_shape(module.init, layers.KEY, *inputs)
        params = variables.pop("params")

        def apply(params, *inputs):
            return module.apply({"params": params, **rest}, *inputs, mutable=[*rest])

        rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables)
        return apply, params, *inputs

    return Row(f"linen {name}", build, leaves, options)


def of_nnx(name, make, inputs, leaves, call=None, **options):
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)

    def build():
        model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def apply(params, rest, *inputs):
            model = nnx.merge(graph, params, rest)
            return (call or (lambda model, *x: model(*x)))(model, *inputs)

        return apply, params, rest, *inputs

    return Row(f"nnx {name}", build, leaves, options)


def of_haiku(name, function, inputs, leaves, **options):
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)

    def build():
        model = hk.transform_with_state(function)
        params, state = jax.eval_shape(model.init, layers.KEY, *inputs)

        def apply(params, state, *inputs):
            return model.apply(params, state, None, *inputs)

        return apply, params, state, *inputs

    return Row(f"haiku {name}", build, leaves, options)


def of_equinox(name, make, inputs, leaves, call=None, **options):
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)

    def build():
        model = layers.eqx_model(make)
        params = layers.eqx_params(model)
        static = eqx.filter(model, lambda leaf: not hasattr(leaf, "shape"))

        def apply(params, *inputs):
            model = eqx.combine(params, static)
            return (call or (lambda model, *x: model(*x)))(model, *inputs)

        return apply, params, *inputs

    return Row(f"equinox {name}", build, leaves, options)


def matrices(leaves):
    """Return the leaves that are not biases: those of rank 1 are never asked about."""
    return {path: cut for path, cut in leaves.items() if cut is not None}


# --- plain JAX ------------------------------------------------------------------------

D, H, K, X = 8, 2, 4, shape(2, 7, 8)


def attend(q, k, v):
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k)
    return jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(scores), v)


def by_einsum(p, x):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[n]) for n in "qkv")
    return jnp.einsum("bthk,hkd->btd", attend(q, k, v), p["o"])


def by_dense(p, x):
    q, k, v = ((x @ p[n]).reshape(2, 7, H, K) for n in "qkv")
    return attend(q, k, v).reshape(2, 7, H * K) @ p["o"]


def by_fused(p, x):
    q, k, v = jnp.split(x @ p["qkv"], 3, -1)
    q, k, v = (y.reshape(2, 7, H, K) for y in (q, k, v))
    return attend(q, k, v).reshape(2, 7, H * K) @ p["o"]


def by_reshape(p, x):
    q, k, v = jnp.moveaxis((x @ p["qkv"]).reshape(2, 7, 3, H, K), 2, 0)
    return jnp.einsum("bthk,hkd->btd", attend(q, k, v), p["o"].reshape(H, K, D))


def by_axis(p, x):
    qkv = jnp.einsum("btd,dchk->bcthk", x, p["qkv"])
    return jnp.einsum("bthk,hkd->btd", attend(*(qkv[:, i] for i in range(3))), p["o"])


def by_gemma(p, x):
    q = jnp.einsum("btd,ndh->btnh", x, p["q"])
    k, v = jnp.einsum("bsd,ckdh->cbskh", x, p["kv"])
    return jnp.einsum("btnh,nhd->btd", attend(q, k, v), p["o"])


def by_heads(p, x):
    def head(q, k, v, o):
        scores = jax.nn.softmax((x @ q) @ jnp.swapaxes(x @ k, 1, 2))
        return scores @ (x @ v) @ o

    return jax.vmap(head, (1, 1, 1, 0))(*(p[n] for n in "qkvo")).sum(0)


def by_library(p, x):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[n]) for n in "qkv")
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return jnp.einsum("bthk,hkd->btd", out, p["o"])


def rotated(x):
    """Return rotary embeddings of (..., time, heads, features)."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 10.0 ** -jnp.arange(half)
    sin, cos = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def by_rotation(p, x):
    q, k = (rotated((x @ p[n])[:, :, None]) for n in "qk")
    return attend(q, k, (x @ p["v"])[:, :, None])[:, :, 0] @ p["o"]


def grouped_query(p, x):
    q = (x @ p["q"]).reshape(2, 7, 4, K)
    k, v = jnp.split((x @ p["kv"]).reshape(2, 7, 4, K), 2, 2)
    k, v = (jnp.repeat(y, 2, 2) for y in (rotated(k), v))
    return attend(rotated(q), k, v).reshape(2, 7, 4 * K) @ p["o"]


def latent(p, x):
    """Multi-head latent attention: a compressed key-value, a shared rotary key."""
    q = jnp.einsum("btd,dhk->bthk", x, p["q"])
    plain_q, turned_q = q[..., :K], rotated(q[..., K:])
    down = x @ p["kv_down"]
    c, turned_k = down[..., :6], rotated(down[..., None, 6:])
    up = jnp.einsum("btc,chk->bthk", c * p["scale"], p["kv_up"])
    plain_k, v = up[..., :K], up[..., K:]
    turned_k = jnp.broadcast_to(turned_k, turned_q.shape)
    out = attend(
        jnp.concatenate([plain_q, turned_q], -1),
        jnp.concatenate([plain_k, turned_k], -1),
        v,
    )
    return jnp.einsum("bthk,hkd->btd", out, p["o"])


def square(*names):
    return dict.fromkeys(names, shape(D, D))


HEADED = {**dict.fromkeys("qkv", shape(D, H, K)), "o": shape(H, K, D)}
HEADED_CUTS = {**dict.fromkeys("qkv", TO_PAIR), "o": FROM_PAIR}
QKV = {"qkv": shape(D, 3 * D), "o": shape(D, D)}
FUSED3 = Cut((0,), (1,), blocks=3)

ATTENTION = [
    *(
        plain(
            f"attention by einsum, {name}",
            by_einsum,
            HEADED,
            X,
            {**dict.fromkeys("qkv", cuts[0]), "o": cuts[1]},
            attention=name,
        )
        for name, cuts in layers.HEADS.items()
    ),
    plain(
        "attention by dense layers",
        by_dense,
        square(*"qkvo"),
        X,
        dict.fromkeys("qkvo", DENSE),
    ),
    plain("fused attention", by_fused, QKV, X, {"qkv": FUSED3, "o": DENSE}),
    plain(
        "fused attention, one matrix",
        by_fused,
        QKV,
        X,
        {"qkv": DENSE, "o": DENSE},
        blocks=False,
    ),
    plain(
        "fused attention by reshape", by_reshape, QKV, X, {"qkv": FUSED3, "o": DENSE}
    ),
    plain(
        "fused attention, an axis of its own",
        by_axis,
        {"qkv": shape(D, 3, H, K), "o": shape(H, K, D)},
        X,
        {"qkv": Cut((0,), (2, 3)), "o": FROM_PAIR},
    ),
    plain(
        "fused attention, an axis of its own, one matrix",
        by_axis,
        {"qkv": shape(D, 3, H, K), "o": shape(H, K, D)},
        X,
        {"qkv": Cut((0,), (1, 2, 3)), "o": FROM_PAIR},
        blocks=False,
    ),
    plain(
        "attention as Gemma's",
        by_gemma,
        {"q": shape(H, D, K), "kv": shape(2, H, D, K), "o": shape(H, K, D)},
        X,
        {"q": Cut((1,), (0, 2)), "kv": Cut((2,), (1, 3)), "o": FROM_PAIR},
    ),
    plain(
        "attention by a map over heads",
        by_heads,
        HEADED,
        X,
        {**dict.fromkeys("qkv", Cut((0,), (2,))), "o": STACK},
    ),
    plain("attention by jax.nn", by_library, HEADED, X, HEADED_CUTS),
    plain(
        "rotary attention of one head",
        by_rotation,
        square(*"qkvo"),
        X,
        dict.fromkeys("qkvo", DENSE),
    ),
    plain(
        "grouped-query attention",
        grouped_query,
        {"q": shape(D, 16), "kv": shape(D, 16), "o": shape(16, D)},
        X,
        {"q": DENSE, "kv": Cut((0,), (1,), blocks=2), "o": DENSE},
    ),
    plain(
        "latent attention",
        latent,
        {
            "q": shape(D, H, K + 2),
            "kv_down": shape(D, 8),
            "scale": shape(6),
            "kv_up": shape(6, H, 2 * K),
            "o": shape(H, K, D),
        },
        X,
        {
            "q": TO_PAIR,
            "kv_down": Cut((0,), (1,), blocks=(6, 2)),
            "kv_up": TO_PAIR,
            "o": FROM_PAIR,
        },
    ),
]

TABLE = ATTENTION


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_table(row):
    apply, params, *inputs = row.build()
    rule = components.from_function(apply, params, *inputs, **row.options)
    found = {}
    for decided in components.decide_all(params, rule):
        if decided.error is not None:
            found[decided.path] = f"{RAISES}: {decided.error}"
        elif len(decided.value.shape) > 1 or decided.decision.cut is not None:
            found[decided.path] = decided.decision.cut
    found = {
        path: RAISES
        if str(cut).startswith(RAISES) and row.leaves.get(path) == RAISES
        else cut
        for path, cut in found.items()
    }
    assert found == dict(row.leaves)
