"""Programs of every kind, with the axes of their parameters written by hand.

Rows are what a product sums over, columns are its outputs, whatever the leaves are
called. `test_from_function.py` holds `components.from_function` against this table.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import layers
from flax import linen, nnx
from jax import lax
from layers import Cut

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


def of_nnx(name, make, inputs, leaves, call=None, concrete=False, **options):
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)

    def build():
        model = make(nnx.Rngs(0)) if concrete else layers.nnx_model(make)
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


# --- plain JAX: dense layers, experts, loops ------------------------------------------


def mlp(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"]


def swiglu(p, x):
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def fused_swiglu(p, x):
    gate, up = jnp.split(x @ p["up"] + p["bias"], 2, -1)
    return (jax.nn.silu(gate) * up) @ p["down"]


def paired_geglu(p, x):
    gate, up = jnp.einsum("btd,cfd->cbtf", x, p["up"])
    return jnp.einsum("btf,fd->btd", jax.nn.gelu(gate) * up, p["down"])


def loss(p, x, y):
    logits = mlp(p, x)
    logp = jax.nn.log_softmax(logits)
    decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))
    return -jnp.take_along_axis(logp, y[..., None], -1).mean() + 1e-4 * decay


def dense_experts(p, x):
    gates = jax.nn.softmax(x @ p["router"])
    h = jax.nn.relu(jnp.einsum("btd,edf->btef", x, p["up"]))
    out = jnp.einsum("btef,efd->bted", h, p["down"])
    return jnp.einsum("bte,bted->btd", gates, out)


def dispatched_experts(p, x):
    x = x.reshape(-1, D)
    _, best = lax.top_k(x @ p["router"], 1)
    slots = jax.nn.one_hot(best[:, 0], 3)[:, :, None] * jnp.ones((1, 1, 5))
    inside = jnp.einsum("tec,td->ecd", slots, x)
    h = jax.nn.relu(jnp.einsum("ecd,edf->ecf", inside, p["up"]))
    return jnp.einsum("tec,ecd->td", slots, jnp.einsum("ecf,efd->ecd", h, p["down"]))


def ragged_experts(p, x):
    x = x.reshape(-1, D)
    best = jnp.argmax(x @ p["router"], -1)
    sizes = jnp.bincount(best, length=3)
    x = x[jnp.argsort(best)]
    gate, up = jnp.split(lax.ragged_dot(x, p["up"], sizes), 2, -1)
    return lax.ragged_dot(jax.nn.silu(gate) * up, p["down"], sizes)


def chosen_experts(p, x):
    best = jnp.argmax(x @ p["router"], -1)
    h = jnp.einsum("btd,btdf->btf", x, p["up"][best])
    return jnp.einsum("btf,btfd->btd", jax.nn.relu(h), p["down"][best])


def scanned(p, x):
    def layer(x, p):
        return x + fused_swiglu(p, x), None

    return lax.scan(jax.checkpoint(layer), x, p)[0]


def looped(p, x):
    def layer(i, x):
        return x + mlp(jax.tree.map(lambda leaf: leaf[i], p), x)

    return lax.fori_loop(0, 3, layer, x)


def while_loop(p, x):
    def layer(state):
        i, x = state
        at = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, 0, False), p)
        return i + 1, x + mlp(at, x)

    return lax.while_loop(lambda state: state[0] < 3, layer, (0, x))[1]


def ensemble(axes):
    return lambda p, x: jax.vmap(mlp, (axes, None))(p, x)


def branches(p, x):
    return lax.cond(x.sum() > 0, mlp, lambda p, x: x @ p["up"] @ p["down"], p, x)


@jax.custom_vjp
def custom(x, w):
    return x @ w


custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


@jax.custom_jvp
def forward(x, w):
    return x @ w


forward.defjvp(lambda x, dx: (forward(*x), forward(dx[0], x[1])))


def lora(p, x):
    return x @ (p["w"] + 2.0 * p["a"] @ p["b"])


def lora_apart(p, x):
    return x @ p["w"] + (x @ p["a"]) @ p["b"]


def weight_norm(p, x):
    w = p["v"] / jnp.linalg.norm(p["v"], axis=0) * p["g"]
    return x @ w


def spectral_norm(p, x, u):
    v = p["w"] @ u
    v = v / jnp.linalg.norm(v)
    sigma = v @ (p["w"] @ u)
    return x @ (p["w"] / lax.stop_gradient(sigma))


def tied(p, tokens):
    x = p["embed"][tokens] + p["position"][: tokens.shape[1]]
    return jnp.tanh(x @ p["w"]) @ p["embed"].T


def tied_one_hot(p, tokens):
    x = jax.nn.one_hot(tokens, 11) @ p["embed"]
    return (x @ p["w"]) @ p["embed"].T


def autoencoder(p, x):
    return jax.nn.relu(x @ p["w"]) @ p["w"].T


def flat(p, x):
    up, bias, down = p
    return jax.nn.relu(x @ up + bias) @ down


def noisy(p, x, key):
    noise = jax.random.normal(key, p["sigma"].shape)
    return x @ (p["mu"] + p["sigma"] * noise)


def row_slices(p, x, h):
    return jnp.tanh(x @ p["w"][:D] + h @ p["w"][D:])


def rows_apart(p, x):
    first, second = p["w"].reshape(2, D, 5)
    return jnp.tanh(x @ first), x @ second


def column_slices(p, x):
    return x @ p["w"][:, :6] + jnp.tanh((x @ p["w"][:, 6:])[..., :6])


def shared(p, x):
    joint = jnp.concatenate([p["q"], p["k"], p["v"]], 1)
    q, k, v = jnp.split(x @ joint, [4, 6], -1)
    return jax.nn.softmax(q)[..., :2] * k + v


def perceiver(p, x):
    z = p["latents"]
    q, k, v = z @ p["q"], x @ p["k"], x @ p["v"]
    z = z + jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v
    return z @ p["out"]


def relative(p, x):
    table = p["bias"][jnp.arange(7)[:, None] - jnp.arange(7) + 6]
    q, k = ((x @ p[n]).reshape(2, 7, H, K) for n in "qk")
    scores = jnp.einsum("bthk,bshk->bhts", q + p["u"], k) + table.transpose(2, 0, 1)
    return jax.nn.softmax(scores)


def resized(p, x):
    position = jax.image.resize(p["position"], (7, D), "bilinear")
    return mlp(p, x + position)


def penalised(p, x):
    slope = jax.grad(lambda x: mlp(p, x).sum())(x)
    return jnp.sum(slope**2) + mlp(p, x).sum()


def residual(p, x):
    """The sum of a residual stream is taken apart, not the products in it."""
    x = x @ p["in"]
    a, b = jnp.split(x + mlp(p, x), 2, -1)
    return a * jax.nn.gelu(b)


def heads_and_parts(p, x):
    y = (x @ p["w"]).reshape(2, 7, 2, 12)
    a, b, c = jnp.split(y, 3, -1)
    return a * b + c, jnp.tanh(y[:, :, 0]), jnp.exp(y[:, :, 1])


def convolved(x, w, groups=1):
    return lax.conv_general_dilated(
        x,
        w,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def penalised_groups(p, x):
    def energy(x):
        return jnp.sum(
            jnp.tanh(convolved(jnp.tanh(convolved(x, p["w"], 2)), p["v"], 6))
        )

    return jnp.sum(jax.grad(energy)(x) ** 2)


def tied_convolution(p, x):
    y = jax.nn.relu(convolved(x, p["w"]))
    return convolved(y, jnp.flip(p["w"], (0, 1)).swapaxes(2, 3))


def swapped(p, x):
    def step(_, state):
        a, b, x = state
        return b, a, jnp.tanh(x @ a)

    return lax.fori_loop(0, 4, step, (p["a"], p["b"], x))[2]


def cast_in_loop(p, x):
    kernels = lax.map(lambda w: (2 * w).astype("bfloat16"), p["w"])
    return jnp.einsum("bed,edf->bf", x, kernels)


def kernel_rejoined(p, x):
    """Columns masked apart, and put together again."""
    left, right = jnp.split(p["w"], 2, 1)
    return x @ jnp.concatenate([2 * left, 2 * right], 1)


def lora_scaled(p, x, s):
    return x @ p["w"] + x @ ((p["a"] @ p["b"]) * s)


def adapted(p, x):
    """A step of gradient descent within the program."""
    slope = jax.grad(lambda p: jnp.mean(mlp(p, x) ** 2))(p)
    return mlp(jax.tree.map(lambda w, g: w - 0.1 * g, p, slope), x)


def embedded(p, tokens):
    return by_fused(p, p["embed"][tokens])


def embedded_once(p, token):
    q, k, v = jnp.split(p["embed"][token] @ p["qkv"], 3, -1)
    return jnp.tanh(q * k) + v


def halves_by_scalar(p, x):
    """Slices at starts that the program computes, from what it knows."""
    y, start = x @ p["w"], jnp.int32(0)
    a = lax.dynamic_slice_in_dim(y, start, 5, -1)
    b = lax.dynamic_slice_in_dim(y, start + 5, 5, -1)
    return a * jax.nn.sigmoid(b)


def bilinear(p, x):
    return jnp.einsum("btkj,btj->btk", jnp.einsum("bti,kij->btkj", x, p["w"]), x)


def mixed_up(p, x):
    """Einsums with any letters, in any order."""
    x = jnp.einsum("zyx,xw->wyz", x, p["a"])
    return jnp.einsum("wyz,uwv->vyuz", x, p["b"])


def sharded(p, x):
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("i",))
    spec = jax.sharding.PartitionSpec
    up, down = spec(None, "i"), spec("i", None)

    def local(w, v, x):
        return lax.psum(jax.nn.relu(x @ w) @ v, "i")

    return jax.shard_map(
        local, mesh=mesh, in_specs=(up, down, spec()), out_specs=spec()
    )(p["up"], p["down"], x)


def style(p, x, s):
    """Kernels modulated by each example, as one grouped convolution."""
    b, n, m, c = x.shape
    w = p["w"] * s[:, None, None, :, None]
    w = w * lax.rsqrt(jnp.sum(w**2, (1, 2, 3), keepdims=True) + 1e-8)
    w = jnp.moveaxis(w, 0, 3).reshape(3, 3, c, b * 5)
    x = jnp.moveaxis(x, 0, 2).reshape(1, n, m, b * c)
    return convolved(x, w, b)


def conv_ensemble(p, x):
    """Convolutional networks with one input, a depthwise and a grouped layer."""

    def conv(x, w, groups=1):
        how = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", feature_group_count=groups, **how
        )

    def one(p, x):
        return conv(jax.nn.relu(conv(conv(x, p["a"]), p["d"], 8)), p["c"], 2)

    return jax.vmap(one, in_axes=(0, None))(p, x)


def mamba(p, x):
    x, z = jnp.split(x @ p["in"], 2, -1)
    x = lax.conv_general_dilated(
        x,
        p["conv"],
        (1,),
        [(3, 0)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=16,
    )
    x = jax.nn.silu(x)
    dt, b, c = jnp.split(x @ p["x"], [3, 7], -1)
    dt = jax.nn.softplus(dt @ p["dt"] + p["dt_bias"])
    decay = jnp.exp(dt[..., None] * -jnp.exp(p["log_a"]))
    drive = (dt * x)[..., None] * b[:, :, None]

    def step(h, at):
        decay, drive, c = at
        h = decay * h + drive
        return h, jnp.einsum("bdn,bn->bd", h, c)

    steps = jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), (decay, drive, c))
    y = jnp.moveaxis(lax.scan(step, jnp.zeros((2, 16, 4)), steps)[1], 0, 1)
    return ((y + x * p["d"]) * jax.nn.silu(z)) @ p["out"]


def mamba2(p, x):
    z, x, dt = jnp.split(x @ p["in"], [16, 40], -1)
    return (x[..., :16] * jax.nn.silu(z) * dt.mean(-1, keepdims=True)) @ p["out"]


def s5(p, x):
    b, c = (p[n][..., 0] + 1j * p[n][..., 1] for n in "bc")
    decay = jnp.exp(jnp.exp(p["log_step"]) * p["a"])
    drive = jax.vmap(jax.vmap(lambda u: b @ u))(x.astype(complex))
    decay = jnp.broadcast_to(decay, drive.shape)

    def join(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    _, h = lax.associative_scan(join, (decay, drive), axis=1)
    return jax.vmap(jax.vmap(lambda h: (c @ h).real))(h) + p["d"] * x


def s4d(p, x):
    """A convolution by the Fourier transform, one kernel for every channel."""
    time = jnp.arange(7) * jnp.exp(p["log_step"])[:, None]
    c = (p["c"][..., 0] + 1j * p["c"][..., 1]) * p["b"]
    kernel = jnp.einsum(
        "hn,hnt->ht", c, jnp.exp(p["a"][..., None] * time[:, None])
    ).real
    y = jnp.fft.rfft(x, 14, axis=1) * jnp.fft.rfft(kernel, 14, axis=1).T
    return jnp.fft.irfft(y, 14, axis=1)[:, :7] @ p["out"]


def spectral(p, x):
    y = jnp.fft.rfft(x, axis=1)
    y = jnp.einsum("bmi,iom->bmo", y, p["re"] + 1j * p["im"])
    return jnp.fft.irfft(y, 7, axis=1) + x @ p["w"]


MLP = {"up": shape(D, 12), "down": shape(12, D)}
MLP_CUTS = {"up": DENSE, "down": DENSE}
GATED = {"up": shape(D, 24), "bias": shape(24), "down": shape(12, D)}
GATED_CUTS = {"up": Cut((0,), (1,), blocks=2), "down": DENSE}
EXPERTS = {"router": shape(D, 3), "up": shape(3, D, 12), "down": shape(3, 12, D)}
EXPERT_CUTS = {"router": DENSE, "up": STACK, "down": STACK}


def stacked(tree, n=3, axis=0):
    return jax.tree.map(
        lambda leaf: shape(*leaf.shape[:axis], n, *leaf.shape[axis:]), tree
    )


DENSE_LAYERS = [
    plain("MLP", mlp, MLP, X, MLP_CUTS),
    plain(
        "MLP of a flat list",
        flat,
        [shape(D, 12), shape(12), shape(12, D)],
        X,
        {"0": DENSE, "2": DENSE},
    ),
    plain("loss", loss, MLP, (X, TOKENS), MLP_CUTS),
    plain(
        "SwiGLU", swiglu, {**MLP, "gate": shape(D, 12)}, X, {**MLP_CUTS, "gate": DENSE}
    ),
    plain("SwiGLU, fused", fused_swiglu, GATED, X, GATED_CUTS),
    plain(
        "GEGLU, an axis of its own",
        paired_geglu,
        {"up": shape(2, 12, D), "down": shape(12, D)},
        X,
        {"up": Cut((2,), (1,)), "down": DENSE},
    ),
    plain("experts, dense", dense_experts, EXPERTS, X, EXPERT_CUTS),
    plain("experts, dispatched", dispatched_experts, EXPERTS, X, EXPERT_CUTS),
    plain(
        "experts, ragged",
        ragged_experts,
        {**EXPERTS, "up": shape(3, D, 24)},
        X,
        {**EXPERT_CUTS, "up": Cut((1,), (2,), blocks=2)},
    ),
    plain("experts, chosen by index", chosen_experts, EXPERTS, X, EXPERT_CUTS),
    plain(
        "scan with remat",
        scanned,
        stacked(GATED),
        X,
        {"up": Cut((1,), (2,), blocks=2), "bias": None, "down": STACK},
    ),
    plain("fori_loop", looped, stacked(MLP), X, {"up": STACK, "down": STACK}),
    plain("while_loop", while_loop, stacked(MLP), X, {"up": STACK, "down": STACK}),
    *(
        plain(
            f"ensemble on axis {axis}",
            ensemble(axis),
            stacked(MLP, axis=axis),
            X,
            dict.fromkeys(
                MLP,
                Cut(*([a for a in range(3) if a != axis][i : i + 1] for i in (0, 1))),
            ),
        )
        for axis in range(3)
    ),
    plain(
        "mapped layer, one input",
        lambda p, x: jax.vmap(lambda w: x @ w, 1)(p["w"]),
        {"w": shape(D, 3, 5)},
        X,
        {"w": Cut((0,), (2,))},
    ),
    plain("cond", branches, MLP, X, MLP_CUTS),
    plain("custom_vjp", lambda p, x: custom(x, p["w"]), square("w"), X, {"w": DENSE}),
    plain("custom_jvp", lambda p, x: forward(x, p["w"]), square("w"), X, {"w": DENSE}),
    plain("jit", lambda p, x: jax.jit(jax.jit(mlp))(p, x), MLP, X, MLP_CUTS),
    plain("shard_map", sharded, MLP, X, MLP_CUTS),
    plain(
        "LoRA, merged",
        lora,
        {"w": shape(D, 6), "a": shape(D, 2), "b": shape(2, 6)},
        X,
        dict.fromkeys("wab", DENSE),
    ),
    plain(
        "LoRA, apart",
        lora_apart,
        {"w": shape(D, 6), "a": shape(D, 2), "b": shape(2, 6)},
        X,
        dict.fromkeys("wab", DENSE),
    ),
    plain(
        "weight norm", weight_norm, {"v": shape(D, 6), "g": shape(6)}, X, {"v": DENSE}
    ),
    plain(
        "spectral norm", spectral_norm, {"w": shape(D, 6)}, (X, shape(6)), {"w": DENSE}
    ),
    plain(
        "mask and cast",
        lambda p, x: (
            x.astype("bfloat16")
            @ jnp.where(jnp.tril(jnp.ones((D, D))) > 0, p["w"], 0).astype("bfloat16")
        ),
        square("w"),
        X,
        {"w": DENSE},
    ),
    plain(
        "tied embedding",
        tied,
        {"embed": shape(11, D), "position": shape(9, D), "w": shape(D, D)},
        TOKENS,
        {"embed": None, "position": None, "w": DENSE},
    ),
    plain(
        "tied embedding, one-hot",
        tied_one_hot,
        {"embed": shape(11, D), "w": shape(D, D)},
        TOKENS,
        {"embed": None, "w": DENSE},
    ),
    plain("tied autoencoder", autoencoder, {"w": shape(D, 3)}, X, {"w": DENSE}),
    plain(
        "noisy layer",
        noisy,
        {"mu": shape(D, 3), "sigma": shape(D, 3)},
        (X, jax.random.key(0)),
        {"mu": DENSE, "sigma": DENSE},
    ),
    plain("rows sliced", row_slices, {"w": shape(2 * D, 5)}, (X, X), {"w": DENSE}),
    plain(
        "rows apart",
        rows_apart,
        {"w": shape(2 * D, 5)},
        X,
        {"w": Cut((0,), (1,), blocks=2, split="rows")},
    ),
    plain(
        "columns sliced",
        column_slices,
        {"w": shape(D, 16)},
        X,
        {"w": Cut((0,), (1,), blocks=(6, 10))},
    ),
    plain(
        "kernels joined",
        shared,
        {"q": shape(D, 4), "k": shape(D, 2), "v": shape(D, 2)},
        X,
        dict.fromkeys("qkv", DENSE),
    ),
    plain(
        "Perceiver",
        perceiver,
        {"latents": shape(4, D), **square("q", "k", "v", "out")},
        X,
        {"latents": None, **dict.fromkeys(("q", "k", "v", "out"), DENSE)},
    ),
    plain(
        "relative positions",
        relative,
        {"q": shape(D, D), "k": shape(D, D), "u": shape(H, K), "bias": shape(13, H)},
        X,
        {"q": DENSE, "k": DENSE, "u": None, "bias": None},
    ),
    plain(
        "resized positions",
        resized,
        {**MLP, "position": shape(5, D)},
        X,
        {**MLP_CUTS, "position": None},
    ),
    plain("gradient penalty", penalised, MLP, X, MLP_CUTS),
    plain(
        "residual stream, split",
        residual,
        {**MLP, "in": shape(D, D)},
        X,
        {**MLP_CUTS, "in": DENSE},
    ),
    plain(
        "heads apart, and parts of all heads",
        heads_and_parts,
        {"w": shape(D, 24)},
        X,
        {"w": Cut((0,), (1,), blocks=2)},
    ),
    plain(
        "gradient penalty, grouped and depthwise convolutions",
        penalised_groups,
        {"w": shape(3, 3, 2, 6), "v": shape(3, 3, 1, 12)},
        shape(2, 6, 6, 4),
        {"w": dataclasses.replace(CONV, groups=2), "v": None},
    ),
    plain(
        "tied convolutions",
        tied_convolution,
        {"w": shape(3, 3, 4, 6)},
        shape(2, 6, 6, 4),
        {"w": CONV},
    ),
    plain(
        "kernels swapped in a loop",
        swapped,
        square("a", "b"),
        X,
        {"a": DENSE, "b": DENSE},
    ),
    plain(
        "kernels cast in a loop",
        cast_in_loop,
        {"w": shape(3, D, 5)},
        shape(2, 3, D),
        {"w": FROM_PAIR},
    ),
    plain("kernel rejoined", kernel_rejoined, square("w"), X, {"w": DENSE}),
    plain(
        "LoRA, scaled by data",
        lora_scaled,
        {"w": shape(D, 6), "a": shape(D, 2), "b": shape(2, 6)},
        (X, shape(1, 6)),
        dict.fromkeys("wab", DENSE),
    ),
    plain("adapted by a gradient", adapted, MLP, X, MLP_CUTS),
    plain(
        "embedding and fused attention",
        embedded,
        {"embed": shape(11, D), **QKV},
        TOKENS,
        {"embed": None, "qkv": FUSED3, "o": DENSE},
    ),
    plain(
        "embedding of one token",
        embedded_once,
        {"embed": shape(11, D), "qkv": shape(D, 3 * D)},
        shape(dtype="int32"),
        {"embed": None, "qkv": FUSED3},
    ),
    plain(
        "halves at known starts",
        halves_by_scalar,
        {"w": shape(D, 10)},
        X,
        {"w": Cut((0,), (1,), blocks=2)},
    ),
    plain("bilinear", bilinear, {"w": shape(5, D, D)}, X, {"w": Cut((1,), (0, 2))}),
    plain(
        "einsums of any letters",
        mixed_up,
        {"a": shape(D, 5), "b": shape(3, 5, 4)},
        X,
        {"a": DENSE, "b": Cut((1,), (0, 2))},
    ),
    plain(
        "convolutional ensemble, one input",
        conv_ensemble,
        {
            "a": shape(3, 3, 3, 4, 8),
            "d": shape(3, 3, 3, 1, 8),
            "c": shape(3, 3, 3, 4, 6),
        },
        shape(2, 6, 6, 4),
        {
            "a": Cut((1, 2, 3), (4,), spatial=(1, 2)),
            "d": None,
            "c": Cut((1, 2, 3), (4,), groups=2, spatial=(1, 2)),
        },
    ),
    plain(
        "modulated convolution",
        style,
        {"w": shape(3, 3, 4, 5)},
        (shape(2, 6, 6, 4), shape(2, 4)),
        {"w": CONV},
    ),
    plain(
        "Mamba",
        mamba,
        {
            "in": shape(D, 32),
            "conv": shape(4, 1, 16),
            "x": shape(16, 11),
            "dt": shape(3, 16),
            "dt_bias": shape(16),
            "log_a": shape(16, 4),
            "d": shape(16),
            "out": shape(16, D),
        },
        X,
        {
            "in": Cut((0,), (1,), blocks=2),
            "conv": None,
            "x": Cut((0,), (1,), blocks=(3, 4, 4)),
            "dt": DENSE,
            "log_a": None,
            "out": DENSE,
        },
    ),
    plain(
        "Mamba 2's projections",
        mamba2,
        {"in": shape(D, 44), "out": shape(16, D)},
        X,
        {"in": Cut((0,), (1,), blocks=(16, 24, 4)), "out": DENSE},
    ),
    plain(
        "S5",
        s5,
        {
            "a": shape(6),
            "log_step": shape(6),
            "b": shape(6, D, 2),
            "c": shape(D, 6, 2),
            "d": shape(D),
        },
        X,
        {"b": Cut((1,), (0,)), "c": Cut((1,), (0,))},
    ),
    plain(
        "S4D",
        s4d,
        {
            "a": shape(D, 3),
            "b": shape(D, 3),
            "c": shape(D, 3, 2),
            "log_step": shape(D),
            "out": shape(D, D),
        },
        X,
        {"a": None, "b": None, "c": None, "out": DENSE},
    ),
    plain(
        "Fourier operator",
        spectral,
        {"re": shape(D, 5, 4), "im": shape(D, 5, 4), "w": shape(D, 5)},
        X,
        {"re": Cut((0,), (1,)), "im": Cut((0,), (1,)), "w": DENSE},
    ),
]


# --- Flax Linen -----------------------------------------------------------------------


class Stacked(linen.Module):
    """Three dense layers, by `linen.scan` along any axis."""

    axis: int = 0

    @linen.compact
    def __call__(self, x):
        def layer(module, x, _):
            return linen.relu(linen.Dense(6, name="dense")(x)), None

        scan = linen.scan(
            linen.remat(layer),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return scan(self, x, None)[0]


def linen_mha(**options):
    return linen.MultiHeadDotProductAttention(2, qkv_features=8, **options)


class Spectral(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.SpectralNorm(linen.Dense(5))(x, update_stats=False)


def of_cell(name, module, leaves):
    carry, x = layers.cell(module)
    return of_linen(name, module, (carry, x), matrices(leaves))


CONV_FUSED4 = dataclasses.replace(CONV, blocks=4)
LINEN_HEADS = {
    name: matrices(layers.attention(cuts))
    | {f"{part}/bias": None for part in ("query", "key", "value")}
    for name, cuts in layers.HEADS.items()
}
CUTS_APART = ((1, 2), (0, 2), (0, 1))  # of (3, in, out), (in, 3, out), (in, out, 3)


def linen_transformer(*scopes, dense=DENSE, cuts=layers.HEADS["whole"], stacked=False):
    leaves = {"embed/embedding": None, "pos_embedding": None, "head/kernel": DENSE}
    for scope in scopes:
        block = layers.block(scope, dense, cuts)
        tables = ("query/bias", "key/bias", "value/bias")
        leaves |= {
            path: cut
            for path, cut in block.items()
            if cut is not None or stacked or path.endswith(tables)
        }
    return leaves


LINEN_TRANSFORMER = linen_transformer(*layers.BLOCKS)
LINEN_SCANNED = linen_transformer(
    "layers", dense=STACK, cuts=layers.SCANNED_WHOLE, stacked=True
)
LINEN_SCANNED_1 = linen_transformer(
    "layers", dense=Cut((0,), (2,)), cuts=layers.SECOND_WHOLE, stacked=True
)


LINEN = [
    of_linen("Dense", linen.Dense(5), layers.VECTORS, {"kernel": DENSE}),
    of_linen(
        "DenseGeneral, output pair",
        linen.DenseGeneral((4, 5)),
        layers.VECTORS,
        {"kernel": TO_PAIR, "bias": None},
    ),
    of_linen(
        "DenseGeneral, input pair",
        linen.DenseGeneral(5, axis=(-2, -1)),
        layers.PAIRS,
        {"kernel": FROM_PAIR},
    ),
    of_linen(
        "DenseGeneral, both",
        linen.DenseGeneral((4, 5), axis=(-2, -1)),
        layers.PAIRS,
        {"kernel": Cut((0, 1), (2, 3)), "bias": None},
    ),
    of_linen(
        "DenseGeneral, batched",
        layers.BATCHED,
        layers.PAIRS,
        {"kernel": STACK, "bias": None},
    ),
    of_linen(
        "Einsum",
        linen.Einsum((6, 2, 4), "btd,dhk->bthk"),
        layers.SEQUENCES,
        {"kernel": TO_PAIR, "bias": None},
    ),
    *(
        of_linen(
            f"attention, {name}", linen_mha(), layers.SEQUENCES, leaves, attention=name
        )
        for name, leaves in LINEN_HEADS.items()
    ),
    of_linen(
        "attention, normalised",
        linen_mha(normalize_qk=True),
        layers.SEQUENCES,
        LINEN_HEADS["whole"],
    ),
    of_linen("Conv 1d", linen.Conv(5, (3,)), layers.SIGNALS, {"kernel": CONV1D}),
    of_linen("Conv 2d", linen.Conv(5, (3, 3)), layers.IMAGES, {"kernel": CONV}),
    of_linen(
        "Conv 2d, strided, circular",
        linen.Conv(5, (3, 3), 2, padding="CIRCULAR"),
        layers.IMAGES,
        {"kernel": CONV},
    ),
    of_linen("Conv 1x1", linen.Conv(5, (1, 1)), layers.IMAGES, {"kernel": CONV}),
    of_linen(
        "Conv 3d", linen.Conv(5, (3, 3, 3)), layers.VOLUMES, {"kernel": layers.CONV3D}
    ),
    of_linen("Conv, one channel", linen.Conv(5, (3, 3)), layers.GREY, {"kernel": CONV}),
    of_linen(
        "Conv, groups",
        linen.Conv(6, (3, 3), feature_group_count=2),
        layers.IMAGES,
        {"kernel": dataclasses.replace(CONV, groups=2)},
    ),
    of_linen(
        "Conv, depthwise",
        linen.Conv(4, (3, 3), feature_group_count=4),
        layers.IMAGES,
        {"kernel": None},
    ),
    of_linen(
        "Conv, depthwise, two each",
        linen.Conv(8, (3, 3), feature_group_count=4),
        layers.IMAGES,
        {"kernel": None},
    ),
    of_linen(
        "ConvLocal",
        linen.ConvLocal(5, (3, 3)),
        layers.IMAGES,
        {"kernel": Cut((2,), (3,)), "bias": None},
    ),
    of_linen(
        "ConvTranspose", linen.ConvTranspose(5, (3, 3)), layers.IMAGES, {"kernel": CONV}
    ),
    of_linen(
        "ConvTranspose, transposed",
        linen.ConvTranspose(5, (3, 3), transpose_kernel=True),
        layers.IMAGES,
        {"kernel": layers.TRANSPOSED},
    ),
    of_linen("Embed", linen.Embed(7, 5), TOKENS, {"embedding": None}),
    of_linen("normalisations", layers.Norms(), layers.IMAGES, {}),
    of_cell("LSTMCell", layers.LSTM, layers.LSTM_LEAVES),
    of_cell("OptimizedLSTMCell", layers.OPTIMISED_LSTM, layers.LSTM_LEAVES),
    of_cell(
        "GRUCell",
        layers.GRU,
        layers.gates(["ir", "iz", "in"], ["hr", "hz", "hn"], [], []),
    ),
    of_cell("MGUCell", layers.MGU, layers.gates(["if", "in"], ["hf", "hn"], [], [])),
    of_cell("SimpleCell", layers.SIMPLE, layers.gates(["i"], ["h"], [], [])),
    of_cell(
        "ConvLSTMCell",
        layers.CONV_LSTM,
        {"ih/kernel": CONV_FUSED4, "hh/kernel": CONV_FUSED4},
    ),
    of_linen(
        "RNN",
        linen.RNN(linen.LSTMCell(5)),
        layers.SEQUENCES,
        {f"cell/{path}": cut for path, cut in matrices(layers.LSTM_LEAVES).items()},
    ),
    of_linen(
        "WeightNorm",
        layers.Inside(lambda: linen.WeightNorm(linen.Dense(5))),
        layers.VECTORS,
        {"Dense_0/kernel": DENSE},
    ),
    of_linen("SpectralNorm", Spectral(), layers.VECTORS, {"Dense_0/kernel": DENSE}),
    of_linen("transformer", layers.Transformer(), TOKENS, LINEN_TRANSFORMER),
    of_linen(
        "transformer, scanned", layers.Transformer(scan_axis=0), TOKENS, LINEN_SCANNED
    ),
    of_linen(
        "transformer, scanned on axis 1",
        layers.Transformer(scan_axis=1),
        TOKENS,
        LINEN_SCANNED_1,
    ),
    *(
        of_linen(
            f"scan on axis {axis}",
            Stacked(axis),
            layers.VECTORS,
            {"dense/kernel": Cut(*CUTS_APART[axis]), "dense/bias": None},
        )
        for axis in range(2)
    ),
    *(
        of_linen(
            f"experts on axis {axis}",
            layers.Experts(axis),
            layers.VECTORS,
            {"experts/kernel": Cut(*CUTS_APART[axis]), "experts/bias": None},
        )
        for axis in range(2)
    ),
    *(
        of_linen(
            f"scanned experts, axes {axis} and {inner}",
            layers.ScannedExperts(axis, inner),
            layers.VECTORS,
            {"layers/experts/kernel": cut, "layers/experts/bias": None},
        )
        for axis, inner, cut in (
            (0, 0, Cut((2,), (3,))),
            (1, 0, Cut((2,), (3,))),
            (0, 1, Cut((1,), (3,))),
            (1, 1, Cut((0,), (3,))),
        )
    ),
]


# --- Flax NNX -------------------------------------------------------------------------


def mapped(in_axes=(0, None), out_axes=0):
    """Return a call of a stack of layers."""
    return nnx.vmap(lambda model, x: model(x), in_axes=in_axes, out_axes=out_axes)


def scanned_nnx(model, x):
    scan = nnx.scan(
        lambda x, model: nnx.relu(model(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    return scan(x, model)


def recurrent(model, x):
    carry = model.initialize_carry(x.shape, nnx.Rngs(0))
    return model(carry, x)


def linear(i=6, o=5):
    return lambda rngs: nnx.Linear(i, o, rngs=rngs)


FUSED4 = Cut((0,), (1,), blocks=4)
NNX = [
    of_nnx("Linear", linear(), layers.VECTORS, {"kernel": DENSE}),
    of_nnx(
        "LinearGeneral",
        lambda r: nnx.LinearGeneral(6, (4, 5), rngs=r),
        layers.VECTORS,
        {"kernel": TO_PAIR, "bias": None},
    ),
    of_nnx(
        "LinearGeneral, batched",
        lambda r: nnx.LinearGeneral(3, 5, batch_axis={0: 4}, rngs=r),
        layers.PAIRS,
        {"kernel": STACK, "bias": None},
    ),
    of_nnx(
        "Einsum, output first",
        lambda r: nnx.Einsum("...d, kd -> ...k", (5, 6), rngs=r),
        layers.VECTORS,
        {"kernel": ROW_DENSE},
    ),
    of_nnx(
        "attention",
        layers.nnx_mha,
        layers.SEQUENCES,
        LINEN_HEADS["per_head"],
        call=lambda m, x: m(x, decode=False),
        attention="per_head",
    ),
    of_nnx(
        "Conv, groups",
        lambda r: nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=r),
        layers.IMAGES,
        {"kernel": dataclasses.replace(CONV, groups=2)},
    ),
    of_nnx(
        "Conv, depthwise",
        lambda r: nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=r),
        layers.IMAGES,
        {"kernel": None},
    ),
    of_nnx(
        "ConvTranspose, transposed",
        lambda r: nnx.ConvTranspose(4, 5, (3, 3), transpose_kernel=True, rngs=r),
        layers.IMAGES,
        {"kernel": layers.TRANSPOSED},
    ),
    of_nnx(
        "Embed, tied",
        lambda r: nnx.Embed(7, 5, rngs=r),
        TOKENS,
        {"embedding": None},
        call=lambda m, x: m.attend(m(x)),
    ),
    of_nnx(
        "LSTMCell",
        lambda r: nnx.LSTMCell(6, 5, rngs=r),
        layers.VECTORS,
        matrices(layers.NNX_LSTM),
        call=recurrent,
    ),
    of_nnx(
        "OptimizedLSTMCell",
        lambda r: nnx.OptimizedLSTMCell(6, 5, rngs=r),
        layers.VECTORS,
        {"dense_i/kernel": FUSED4, "dense_h/kernel": FUSED4},
        call=recurrent,
    ),
    of_nnx(
        "GRUCell",
        lambda r: nnx.GRUCell(6, 5, rngs=r),
        layers.VECTORS,
        {"dense_i/kernel": FUSED3, "dense_h/kernel": FUSED3},
        call=recurrent,
    ),
    of_nnx(
        "SimpleCell",
        lambda r: nnx.SimpleCell(6, 5, rngs=r),
        layers.VECTORS,
        {"dense_i/kernel": DENSE, "dense_h/kernel": DENSE},
        call=recurrent,
    ),
    of_nnx(
        "RNN",
        lambda r: nnx.RNN(nnx.GRUCell(6, 5, rngs=r), rngs=r),
        layers.SEQUENCES,
        {"cell/dense_i/kernel": FUSED3, "cell/dense_h/kernel": FUSED3},
    ),
    of_nnx(
        "LoRALinear",
        lambda r: nnx.LoRALinear(6, 5, lora_rank=2, rngs=r),
        layers.VECTORS,
        {"kernel": DENSE, "lora/lora_a": DENSE, "lora/lora_b": DENSE},
    ),
    of_nnx(
        "Linear, mapped over one input",
        layers.nnx_stack(linear()),
        layers.VECTORS,
        {"kernel": STACK, "bias": None},
        call=mapped(),
    ),
    of_nnx(
        "Linear, mapped with its input",
        layers.nnx_stack(linear()),
        shape(3, 2, 6),
        {"kernel": STACK, "bias": None},
        call=mapped((0, 0), 1),
    ),
    of_nnx(
        "Conv, mapped",
        layers.nnx_stack(
            lambda r: nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=r)
        ),
        layers.IMAGES,
        {"kernel": Cut((1, 2, 3), (4,), groups=2, spatial=(1, 2)), "bias": None},
        call=mapped(),
    ),
    of_nnx(
        "LSTM, mapped",
        layers.nnx_stack(lambda r: nnx.OptimizedLSTMCell(6, 5, rngs=r)),
        layers.VECTORS,
        {
            "dense_i/kernel": Cut((1,), (2,), blocks=4),
            "dense_h/kernel": Cut((1,), (2,), blocks=4),
            "dense_h/bias": None,
        },
        call=nnx.vmap(recurrent, in_axes=(0, None)),
    ),
    of_nnx(
        "Linear, scanned",
        layers.nnx_stack(linear(6, 6)),
        layers.VECTORS,
        {"kernel": STACK, "bias": None},
        call=scanned_nnx,
    ),
]
if hasattr(nnx, "WeightNorm"):
    NNX += [
        of_nnx(
            name,
            lambda r, norm=getattr(nnx, name): norm(nnx.Linear(6, 5, rngs=r), rngs=r),
            layers.VECTORS,
            {"layer_instance/kernel": DENSE},
            concrete=True,
        )
        for name in ("WeightNorm", "SpectralNorm")
    ]


# --- Equinox --------------------------------------------------------------------------


def over(axis=0):
    """Return a call of an Equinox model on a batch of examples."""
    return lambda model, x: jax.vmap(model, axis)(x)


def over_stack(model, x):
    return eqx.filter_vmap(lambda model: jax.vmap(model)(x))(model)


def attend_eqx(model, x):
    return jax.vmap(lambda x: model(x, x, x))(x)


def cell_eqx(model, x):
    def one(x):
        h = jnp.zeros(5)
        return model(x, (h, h) if isinstance(model, eqx.nn.LSTMCell) else h)

    return jax.vmap(one)(x)


ROW_FUSED4, ROW_FUSED3 = Cut((1,), (0,), blocks=4), Cut((1,), (0,), blocks=3)
EQX_IMAGES = shape(2, 4, 8, 8)
EQUINOX = [
    of_equinox(
        "Linear",
        lambda k: eqx.nn.Linear(6, 5, key=k),
        layers.VECTORS,
        {"weight": ROW_DENSE},
        call=over(),
    ),
    of_equinox(
        "Linear, one example",
        lambda k: eqx.nn.Linear(6, 5, key=k),
        shape(6),
        {"weight": ROW_DENSE},
    ),
    of_equinox(
        "MLP",
        lambda k: eqx.nn.MLP(6, 5, 8, 2, key=k),
        layers.VECTORS,
        {f"layers/{i}/weight": ROW_DENSE for i in range(3)},
        call=over(),
    ),
    of_equinox(
        "Conv2d",
        lambda k: eqx.nn.Conv2d(4, 5, 3, key=k),
        EQX_IMAGES,
        {"weight": ROW_CONV, "bias": None},
        call=over(),
    ),
    of_equinox(
        "Conv2d, groups",
        lambda k: eqx.nn.Conv2d(4, 6, 3, groups=2, key=k),
        EQX_IMAGES,
        {"weight": layers.ROW_GROUPS, "bias": None},
        call=over(),
    ),
    of_equinox(
        "Conv2d, depthwise",
        lambda k: eqx.nn.Conv2d(4, 8, 3, groups=4, key=k),
        EQX_IMAGES,
        {"weight": None, "bias": None},
        call=over(),
    ),
    of_equinox(
        "ConvTranspose2d",
        lambda k: eqx.nn.ConvTranspose2d(4, 5, 3, key=k),
        EQX_IMAGES,
        {"weight": ROW_CONV, "bias": None},
        call=over(),
    ),
    of_equinox(
        "ConvTranspose2d, groups",
        lambda k: eqx.nn.ConvTranspose2d(4, 6, 3, groups=2, key=k),
        EQX_IMAGES,
        {"weight": layers.ROW_GROUPS, "bias": None},
        call=over(),
    ),
    of_equinox(
        "attention",
        layers.eqx_mha,
        layers.SEQUENCES,
        matrices(layers.projections(ROW_DENSE, ROW_DENSE)),
        call=attend_eqx,
    ),
    of_equinox(
        "Embedding",
        lambda k: eqx.nn.Embedding(7, 5, key=k),
        shape(3, dtype="int32"),
        {"weight": None},
        call=over(),
    ),
    of_equinox(
        "LSTMCell",
        lambda k: eqx.nn.LSTMCell(6, 5, key=k),
        layers.VECTORS,
        {"weight_ih": ROW_FUSED4, "weight_hh": ROW_FUSED4},
        call=cell_eqx,
    ),
    of_equinox(
        "GRUCell",
        lambda k: eqx.nn.GRUCell(6, 5, key=k),
        layers.VECTORS,
        {"weight_ih": ROW_FUSED3, "weight_hh": ROW_FUSED3},
        call=cell_eqx,
    ),
    of_equinox(
        "WeightNorm",
        lambda k: eqx.nn.WeightNorm(eqx.nn.Linear(6, 5, key=k)),
        layers.VECTORS,
        {"layer/weight": ROW_DENSE, "g": None},
        call=over(),
    ),
    of_equinox(
        "LayerNorm",
        lambda k: eqx.nn.LayerNorm((7, 6)),
        layers.SEQUENCES,
        {"weight": None, "bias": None},
        call=over(),
    ),
    of_equinox(
        "stack of Linear",
        layers.eqx_stack(lambda k: eqx.nn.Linear(6, 5, key=k)),
        layers.VECTORS,
        {"weight": Cut((2,), (1,)), "bias": None},
        call=over_stack,
    ),
    of_equinox(
        "stack of MLP",
        layers.eqx_stack(lambda k: eqx.nn.MLP(6, 5, 8, 1, key=k)),
        layers.VECTORS,
        {
            f"layers/{i}/{n}": Cut((2,), (1,)) if n == "weight" else None
            for i in range(2)
            for n in ("weight", "bias")
        },
        call=over_stack,
    ),
    of_equinox(
        "stack of Conv2d",
        layers.eqx_stack(lambda k: eqx.nn.Conv2d(4, 6, 3, groups=2, key=k)),
        EQX_IMAGES,
        {"weight": Cut((2, 3, 4), (1,), groups=2, spatial=(3, 4)), "bias": None},
        call=over_stack,
    ),
]


# --- Haiku ----------------------------------------------------------------------------


def haiku_core(make):
    def function(x):
        core = make()
        return hk.dynamic_unroll(core, jnp.moveaxis(x, 1, 0), core.initial_state(2))

    return function


HAIKU = [
    of_haiku(
        "MLP",
        lambda x: hk.nets.MLP([8, 5])(x),
        layers.VECTORS,
        {"mlp/~/linear_0/w": DENSE, "mlp/~/linear_1/w": DENSE},
    ),
    of_haiku(
        "Conv2D, channels first",
        lambda x: hk.Conv2D(5, 3, data_format="NCHW")(x),
        layers.IMAGES,
        {"conv2_d/w": CONV, "conv2_d/b": None},
    ),
    of_haiku(
        "Conv1DTranspose",
        lambda x: hk.Conv1DTranspose(5, 3)(x),
        layers.SIGNALS,
        {"conv1_d_transpose/w": Cut((0, 2), (1,), spatial=(0,))},
    ),
    of_haiku(
        "Conv2DTranspose",
        lambda x: hk.Conv2DTranspose(5, 3)(x),
        layers.IMAGES,
        {"conv2_d_transpose/w": layers.TRANSPOSED},
    ),
    of_haiku(
        "SeparableDepthwiseConv2D",
        lambda x: hk.SeparableDepthwiseConv2D(2, 3)(x),
        layers.IMAGES,
        {
            "separable_depthwise_conv2_d/~/depthwise_conv2_d_1/w": None,
            "separable_depthwise_conv2_d/~/depthwise_conv2_d/w": None,
        },
    ),
    of_haiku(
        "MultiHeadAttention",
        layers.haiku_attention,
        layers.SEQUENCES,
        {
            f"multi_head_attention/{n}/w": DENSE
            for n in ("query", "key", "value", "linear")
        },
    ),
    of_haiku(
        "LSTM",
        haiku_core(lambda: hk.LSTM(5)),
        layers.SEQUENCES,
        {"lstm/linear/w": FUSED4},
    ),
    of_haiku(
        "GRU",
        haiku_core(lambda: hk.GRU(5)),
        layers.SEQUENCES,
        {"gru/w_i": FUSED3, "gru/w_h": FUSED3},
    ),
    of_haiku(
        "VanillaRNN",
        haiku_core(lambda: hk.VanillaRNN(5)),
        layers.SEQUENCES,
        {"vanilla_rnn/linear/w": DENSE, "vanilla_rnn/linear_1/w": DENSE},
    ),
    of_haiku(
        "Conv2DLSTM",
        lambda x: hk.Conv2DLSTM((8, 8), 5, 3)(
            x, hk.Conv2DLSTM((8, 8), 5, 3).initial_state(2)
        )[0],
        layers.IMAGES,
        {
            "conv2_dlstm/input_to_hidden/w": CONV_FUSED4,
            "conv2_dlstm/hidden_to_hidden/w": CONV_FUSED4,
        },
    ),
    of_haiku("Embed", lambda x: hk.Embed(7, 5)(x), TOKENS, {"embed/embeddings": None}),
    of_haiku(
        "normalisations",
        layers.haiku_norms,
        layers.IMAGES,
        {"batch_norm/scale": None, "batch_norm/offset": None},
    ),
    of_haiku(
        "layer_stack",
        layers.haiku_stack,
        layers.VECTORS,
        {
            "__layer_stack_no_per_layer/linear/w": STACK,
            "__layer_stack_no_per_layer/linear/b": None,
        },
    ),
]

TABLE = ATTENTION + DENSE_LAYERS + LINEN + NNX + EQUINOX + HAIKU
