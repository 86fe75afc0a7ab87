"""Work divided among the devices of a mesh: nothing shows but what is moved."""

import collections
import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

import orthax
from benchmarks import hlo
from orthax import components, polar, transforms
from orthax.components import Matricisation
from orthax.execution import Machine, Stacking

EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
# How a program knows where leaves are: by their types, from the caller, or not at all.
KINDS = {"explicit": (EXPLICIT, EXPLICIT), "auto": (AUTO, AUTO)}
UNSAID = {"unsaid": (AUTO, AUTO)}
MIXED = {"mixed": (EXPLICIT, AUTO), "mixed, turned": (AUTO, EXPLICIT)}
# Every step shows in the result, and few of them are soon compiled.
QUICK = polar.NewtonSchulz(polar.polar_express(1e-2, 2))
# Networks in which nothing, or everything, is worth moving.
SLOW = Machine(bandwidth=1e6)
FAST = Machine(flops=1e9, bandwidth=1e12, latency=1e-9)
COLLECTIVES = (
    "all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
)

both = pytest.mark.parametrize("kind", KINDS)
every = pytest.mark.parametrize("kind", [*KINDS, *UNSAID])


def mesh_of(kind, sizes=(4, 2)):
    types = {**KINDS, **UNSAID, **MIXED}[kind]
    types += types[:1] * (len(sizes) - len(types))
    names = ("x", "y", "z")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=types[: len(sizes)])


def drawn(shapes, seed=0):
    """Return a tree of random arrays for a tree of `ShapeDtypeStruct`s."""
    rng = np.random.default_rng(seed)

    def one(x):
        z = rng.normal(size=x.shape)
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            z = z + 1j * rng.normal(size=x.shape)
        return jnp.asarray(z, x.dtype)

    return jax.tree.map(one, shapes)


def kernels(*shapes):
    """Return a tree of kernels, alone or below names."""
    return {f"k{i}": {"kernel": struct(shape)} for i, shape in enumerate(shapes)}


def struct(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def placed(tree, specs, mesh):
    lie = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda s: type(s) is P
    )
    return jax.device_put(tree, lie)


def known(kind, xs, **options):
    """Return a Stacking that says how leaves are sharded where it is to say so."""
    silent = kind in ("explicit", "unsaid")
    return Stacking(shardings=None if silent else xs, **options)


def updating(method=QUICK, **how):
    tx = orthax.orthogonalise(method, **how)
    return lambda grads: tx.update(grads, tx.init(grads))[0]


def called(program):
    """Return how many of each collective a compiled program has.

    XLA joins sums that wait for nothing else: counted is what they are of.
    """
    counts = collections.Counter()
    for line in program.as_text().splitlines():
        for name in COLLECTIVES:
            if found := re.search(rf" {name}(?:-start)?\((.*?)\)", line):
                joined = len(found[1].split(", ")) if name == "all-reduce" else 1
                counts[name] += joined
    return dict(counts)


def distance(xs, ys):
    def between(x, y):
        wide = np.complex128 if jnp.iscomplexobj(x) else np.float64
        gap = np.abs(np.asarray(x, wide) - np.asarray(y, wide))
        return gap.max(initial=0)

    return max(jax.tree.leaves(jax.tree.map(between, xs, ys)))


def sharded_alike(xs, ys):
    def alike(x, y):
        same = x.sharding.is_equivalent_to(y.sharding, x.ndim)
        return same and jax.typeof(x) == jax.typeof(y)

    return all(jax.tree.leaves(jax.tree.map(alike, xs, ys)))


# What a leaf is like, how it is sharded (on the axes of a mesh of two), how it is cut.
LAYOUTS = {
    "replicated": ((24, 16), P(), None),
    "rows": ((32, 16), P("x"), None),
    "rows too": ((32, 16), P("x", None), None),
    "columns": ((16, 32), P(None, "x"), None),
    "square": ((16, 16), P(None, "x"), None),
    "rows and columns": ((16, 24), P("x", "y"), None),
    "turned": ((24, 16), P("y", "x"), None),
    "two axes": ((32, 16), P(("x", "y")), None),
    "two axes, turned": ((32, 16), P(("y", "x")), None),
    "odd number": ((32, 7), P("y"), None),
    "conv in": ((3, 3, 16, 8), P(None, None, "x"), None),
    "conv out": ((3, 3, 8, 16), P(None, None, None, "x"), None),
    "conv both": ((3, 3, 16, 8), P(None, None, "y", "x"), None),
    "layers": ((8, 8, 16), P("x"), None),
    "layers by matrix": ((3, 8, 16), P(None, None, "x"), None),
    "layers by both": ((8, 8, 16), P("x", None, "y"), None),
    "experts": ((8, 16, 8), P("x", "y"), Matricisation(1, 2)),
    "heads": ((16, 8, 8), P("y", "x"), Matricisation(0, 2)),
    "fused heads": ((16, 8, 4), P(None, "x", "y"), Matricisation(0, (1, 2))),
    "grouped": ((3, 3, 4, 16), P(None, None, "y", "x"), Matricisation(
        (0, 1, 2), 3, groups=4
    )),
    "blocks": ((16, 48), P("y", "x"), Matricisation(0, 1, blocks=3)),
    "sizes": ((16, 24), P(None, "x"), Matricisation(0, 1, blocks=(8, 16))),
    "rows of blocks": ((24, 8), P("x"), Matricisation(0, 1, blocks=3, split="rows")),
}  # fmt: skip
HALF = {"half": ((32, 16), P("x")), "half columns": ((16, 32), P("y", "x"))}
UNCUT = {"vector": ((16,), P("x")), "flat": ((3,), P()), "embedding": ((8, 4), P("x"))}


@dataclasses.dataclass(frozen=True)
class Known:
    """Cut what the table of layouts cuts, the rest by name."""

    def resolve(self, path, leaf):
        cut = LAYOUTS.get(path.split("/")[0], (None, None, None))[2]
        by_name = components.ByName(
            stacked=("layers", "layers by matrix", "layers by both")
        )
        return by_name.resolve(path, leaf) if cut is None else cut


def model():
    """Return a tree of all layouts, and their specs."""
    shapes = {k: {"kernel": struct(v[0])} for k, v in LAYOUTS.items()}
    shapes |= {k: {"kernel": struct(v[0], "bfloat16")} for k, v in HALF.items()}
    shapes |= {k: {"bias": struct(v[0])} for k, v in UNCUT.items()}
    shapes["embedding"] = {"embedding": shapes["embedding"]["bias"]}
    shapes["complex"] = {"kernel": struct((8, 24), "complex64")}
    specs = {k: v[1] for k, v in {**LAYOUTS, **HALF, **UNCUT}.items()}
    specs["complex"] = P(None, "x")
    return shapes, {k: dict.fromkeys(shape, specs[k]) for k, shape in shapes.items()}


def renamed(spec, sizes):
    """Return a spec for two axes on a mesh of one (`x`) or three (`xz`, `y`)."""
    names = {1: {"x": ("x",), "y": ()}, 2: {"x": ("x",), "y": ("y",)}}
    names[3] = {"x": ("x", "z"), "y": ("y",)}
    return P(
        *(
            sum((names[len(sizes)][n] for n in ([e] if type(e) is str else e)), ())
            if e
            else None
            for e in spec
        )
    )


@functools.cache
def whole_model(method):
    """Return the model and its update on one device."""
    grads = drawn(model()[0])
    return grads, updating(method, rule=Known())(grads)


def types_can_say(spec, mesh):
    """Whether a type can hold the explicit part of a spec: JAX's own limit."""
    explicit = [
        [n in mesh.explicit_axes for n in e] for e in spec if isinstance(e, tuple)
    ]
    return all(e == sorted(e, reverse=True) for e in explicit)


def placed_model(mesh, method):
    """Return the model on a mesh, and what one device makes of the same leaves."""
    sizes = tuple(mesh.shape.values())
    specs = jax.tree.map(
        lambda s: renamed(s, sizes), model()[1], is_leaf=lambda s: type(s) is P
    )
    known = [
        k
        for k, (s,) in zip(specs, map(dict.values, specs.values()), strict=True)
        if types_can_say(s, mesh)
    ]
    grads, expected = whole_model(method)
    chosen = [{k: tree[k] for k in known} for tree in (grads, specs, expected)]
    return placed(*chosen[:2], mesh), chosen[2]


@dataclasses.dataclass(frozen=True)
class Direct:
    """Two steps, soon compiled, by a method that cannot share a matrix."""

    any_scale = True
    fills_null_space = False

    def factor(self, x):
        norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
        x = x / jnp.where(norm > 0, norm, 1)
        for _ in range(2):
            x = 1.5 * x - 0.5 * (x @ x.conj().mT) @ x
        return x

    def flops(self, m, n):
        return 8.0 * m * n * min(m, n)


DIRECT = Direct()
MESHES = [(kind, sizes) for kind in KINDS for sizes in [(8,), (4, 2), (2, 2, 2)]]
MESHES += [(kind, (4, 2)) for kind in MIXED] + [("mixed", (2, 2, 2))]
MESHES += [("unsaid", (8,)), ("unsaid", (4, 2))]


def check(out, xs, expected):
    assert sharded_alike(out, xs)
    for name, grad in xs.items():
        far = distance(out[name], expected[name])
        assert far < (1e-2 if name in HALF else 1e-5), name
        changed = distance(out[name], grad)
        assert (changed == 0) if name in UNCUT else (changed > 0.1), name


@pytest.mark.parametrize(("kind", "sizes"), MESHES, ids=str)
def test_every_layout_gives_what_one_device_gives(kind, sizes):
    mesh = mesh_of(kind, sizes)
    xs, expected = placed_model(mesh, DIRECT)
    update = jax.jit(updating(DIRECT, rule=Known(), stacking=known(kind, xs)))
    program = update.lower(xs).compile()
    check(program(xs), xs, expected)
    if kind not in UNSAID:
        assert not {"all-gather", "collective-permute"} & {*called(program)}


def plans(tree, rule=Known(), method=QUICK, stacking=Stacking()):
    return orthax.explain(tree, rule, method=method, stacking=stacking).shares


def predicted(shares):
    return dict(collections.Counter(c for s in shares for c in s.collectives))


WAYS = {"stack": DIRECT, "split": QUICK}


@pytest.mark.parametrize(
    "kind", ["explicit", pytest.param("auto", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("way", WAYS)
def test_every_layout_alone_takes_the_plan_that_is_predicted(kind, way):
    xs, expected = placed_model(mesh_of(kind), WAYS[way])
    how = {"method": WAYS[way], "stacking": known(kind, xs, machine=FAST)}
    alone = [{name: x} for name, x in xs.items() if name not in UNCUT]
    update = updating(rule=Known(), **how)
    program = jax.jit(lambda trees: [update(tree) for tree in trees])
    program = program.lower(alone).compile()
    out = {name: x for tree in program(alone) for name, x in tree.items()}
    check(out, {name: xs[name] for name in out}, expected)
    shares = [share for tree in alone for share in plans(tree, **how)]
    assert len(shares) == len(alone)
    assert sum(share.plan == way for share in shares) >= 10
    assert called(program) == predicted(shares)


# A layer for each of what may happen to it, in a tree for the ways to call an update.
SMALL = {"a": (32, 16), "b": (16, 24), "layers": (8, 8, 16)}
SMALL = {k: {"kernel": struct(shape)} for k, shape in SMALL.items()}
SMALL["c"] = {"bias": struct((16,))}
LIE = {"a": P("x"), "b": P("x", "y"), "layers": P("x", None, "y"), "c": P("y")}
LIE = {k: dict.fromkeys(SMALL[k], spec) for k, spec in LIE.items()}
STACKED = {"rule": components.ByName(stacked=("layers",))}


@functools.cache
def small():
    grads = drawn(SMALL)
    return grads, updating(DIRECT, **STACKED)(grads)


@functools.cache
def small_on(kind):
    mesh = mesh_of(kind)
    return mesh, placed(small()[0], LIE, mesh)


def eager(how, mesh, xs):
    return updating(**how)(xs)


def surrounded(how, mesh, xs):
    with jax.set_mesh(mesh):
        return jax.jit(updating(**how))(xs)


def donated(how, mesh, xs):
    given = jax.tree.map(lambda x: x + 0, xs)
    out = jax.jit(updating(**how), donate_argnums=0)(given)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))
    return out


def accumulated(how, mesh, xs):
    """By `optax.MultiSteps`: 0.5 and 1.5 of the gradients, one update."""
    tx = optax.MultiSteps(orthax.orthogonalise(**how), 2)
    step = jax.jit(tx.update)
    out, state = step(jax.tree.map(lambda x: x / 2, xs), tx.init(xs), xs)
    assert distance(out, jax.tree.map(jnp.zeros_like, xs)) == 0
    return step(jax.tree.map(lambda x: x * 1.5, xs), state, xs)[0]


def scanned(how, mesh, xs):
    """As the body of a loop, which must not change how its state is sharded."""

    def step(carry, _):
        return carry, updating(**how)(carry)

    def last(xs):
        return jax.tree.map(lambda x: x[-1], jax.lax.scan(step, xs, length=2)[1])

    return jax.jit(last)(xs)


CALLS = [eager, surrounded, donated, accumulated, scanned]


@every
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_however_it_is_called(kind, call):
    mesh, xs = small_on(kind)
    how = {"method": DIRECT, "stacking": known(kind, xs), **STACKED}
    out = call(how, mesh, xs)
    assert distance(out, small()[1]) < 1e-5
    # What is inside of a condition is sharded as the compiler likes.
    assert sharded_alike(out, xs) or (kind in UNSAID and call is accumulated)


@pytest.fixture
def without_shardy():
    before = jax.config.jax_use_shardy_partitioner
    jax.config.update("jax_use_shardy_partitioner", False)
    yield
    jax.config.update("jax_use_shardy_partitioner", before)


@pytest.mark.usefixtures("without_shardy")
def test_with_the_partitioner_before_shardy():
    """Which may know nothing of a leaf: of one that only its result says a word on."""
    _, xs = small_on("auto")
    lie = jax.tree.map(lambda x: x.sharding, xs)
    for stacking in (known("auto", xs), Stacking()):
        update = updating(DIRECT, stacking=stacking, **STACKED)
        program = jax.jit(update).lower(xs).compile()
        out = program(xs)
        assert distance(out, small()[1]) < 1e-5
        assert sharded_alike(out, xs)
        assert {*called(program)} == {"all-to-all"} or stacking.shardings is None
        said = jax.jit(update, out_shardings=lie)(small()[0])
        assert distance(said, small()[1]) < 1e-5


@every
def test_exported(kind):
    """To bytes and back, where there is a package to write them with."""
    _, xs = small_on(kind)
    update = jax.jit(updating(DIRECT, stacking=known(kind, xs), **STACKED))
    exported = jax.export.export(update)(xs)
    if importlib.util.find_spec("flatbuffers"):
        exported = jax.export.deserialize(exported.serialize())
    out = exported.call(xs)
    assert distance(out, small()[1]) < 1e-5
    assert sharded_alike(out, xs)


# Compiles an update in each of the ways to know a layout.
PROCESS = """
import jax
import jax.numpy as jnp
import orthax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
for kind in ("explicit", "auto", "unsaid"):
    axes = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,)
    rows = NamedSharding(jax.make_mesh((8,), ("x",), axis_types=axes), P("x"))
    stacking = orthax.execution.Stacking(shardings=rows if kind == "auto" else None)
    method = orthax.polar.NewtonSchulz(orthax.polar.polar_express(1e-2, 2))
    tx = orthax.orthogonalise(method, stacking=stacking)
    leaf = jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=rows)
    step = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0])
    step.lower({"a": {"kernel": leaf}, "b": {"kernel": leaf}}).compile()
"""


def test_another_process_finds_what_one_has_compiled(tmp_path):
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
    }
    entries = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", PROCESS], env=env, check=True)
        entries.append(sorted(path.name for path in tmp_path.glob("*-cache")))
    assert len(entries[0]) >= 3
    assert entries[0] == entries[1]


def test_under_pmap():
    """Where every device has a whole gradient of its own."""
    many = jax.tree.map(lambda x: jnp.stack([x] * 8), small()[0])
    out = jax.pmap(updating(DIRECT, **STACKED))(many)
    assert distance(jax.tree.map(lambda x: x[3], out), small()[1]) < 1e-5


def layered():
    """Return a stack of layers, `(8, 16, 24)`, and its update on one device."""
    rule = components.ByName(stacked=("layers",))
    grads = drawn({"layers": {"kernel": struct((8, 16, 24))}})
    return grads, updating(DIRECT, rule=rule)(grads)


def of_layer(x, stacking=Stacking()):
    return updating(DIRECT, stacking=stacking)({"kernel": x})["kernel"]


@pytest.mark.parametrize("kind", [*KINDS, *UNSAID, *MIXED])
def test_layer_by_layer_in_a_loop(kind):
    grads, expected = layered()
    spec = {"layers": {"kernel": P(None, "x", "y")}}
    xs = placed(grads, spec, mesh_of(kind))
    one = functools.partial(of_layer, stacking=known(kind, P("x", "y")))
    update = jax.jit(lambda t: jax.tree.map(lambda x: jax.lax.map(one, x), t))
    program = update.lower(xs).compile()
    out = program(xs)
    assert distance(out, expected) < 1e-5
    assert sharded_alike(out, xs)
    assert kind in UNSAID or called(program) == {"all-to-all": 2}


@every
@pytest.mark.parametrize("over", [None, "x"])
def test_under_vmap(kind, over):
    """Also over a sharded axis, which the sharding of one layer does not mention."""
    grads, expected = layered()
    layer = P(None if over else "x", "y")
    xs = placed(grads, {"layers": {"kernel": P(over, *layer)}}, mesh_of(kind))
    one = functools.partial(of_layer, stacking=known(kind, layer))
    out = jax.jit(lambda t: jax.tree.map(jax.vmap(one), t))(xs)
    assert distance(out, expected) < 1e-5
    assert sharded_alike(out, xs) or (over and kind == "auto")


UNEVEN = {
    "slice": lambda x: x[:12],
    "longer": lambda x: jnp.concatenate([x, x[:3]]),
    "reshape": lambda x: x.reshape(12, 20),
}


@pytest.mark.parametrize("change", UNEVEN)
def test_what_the_compiler_divides_unevenly(change):
    """Eight devices, and twelve rows that the compiler divides as it likes."""
    x = drawn(struct((16, 15)))

    def update(x):
        return updating(DIRECT)({"kernel": UNEVEN[change](x)})["kernel"]

    out = jax.jit(update)(placed(x, P("x"), mesh_of("auto", (8,))))
    assert distance(out, update(x)) < 1e-5


@both
@pytest.mark.parametrize("axes", [("x", "y"), ("x",)])
def test_inside_a_shard_map(kind, axes):
    """Over all axes the work is local; over some the others are still divided."""
    mesh = mesh_of(kind)
    grads, expected = layered()
    spec = P(axes, None, None if "y" in axes else "y")
    xs = placed(grads, {"layers": {"kernel": spec}}, mesh)
    update = updating(DIRECT, rule=components.ByName(stacked=("layers",)))

    def mapped(f):
        outer = {"in_specs": P(axes), "out_specs": P(axes)}
        f = jax.shard_map(f, mesh=mesh, axis_names=set(axes), **outer)
        return jax.jit(f).lower(xs).compile()

    program = mapped(update)
    out = program(xs)
    assert distance(out, expected) < 1e-5
    assert sharded_alike(out, xs)
    # JAX itself gathers the axes that a shard_map leaves alone, whatever is in it.
    nothing = mapped(lambda tree: jax.tree.map(lambda x: x * 2, tree))
    added = collections.Counter(called(program)) - collections.Counter(called(nothing))
    if "y" in axes or kind == "explicit":
        assert added == ({} if "y" in axes else {"all-to-all": 2})


@both
def test_derivatives(kind):
    x, weight = drawn([struct((16, 8)), struct((16, 8))])
    method = polar.SVD()

    def loss(x):
        out = updating(method)({"kernel": x})["kernel"]
        # Not the trace, whose derivative vanishes.
        return jnp.sum(jnp.sin(out) * weight)

    expected = jax.jit(jax.grad(loss))(x)
    weight = placed(weight, P("x", "y"), mesh_of(kind))
    xs = placed(x, P("x", "y"), mesh_of(kind))
    out = jax.jit(jax.grad(loss))(xs)
    assert np.abs(expected).max() > 0.01
    assert distance(out, expected) < 1e-5
    if kind == "explicit":
        assert sharded_alike(out, xs)


@both
def test_shapes_alone(kind):
    _, xs = small_on(kind)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), xs
    )
    found = jax.eval_shape(updating(**STACKED), like)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(xs), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if kind == "explicit":
            assert x.sharding.spec == jax.typeof(y).sharding.spec


# Kernels, how they are sharded, the method, the machine, and what a program is to call.
NS = polar.NewtonSchulz()
# Seven steps, the Gram matrix computed anew after 2 and 4, and the norm.
SUMS = 3 + 1
EQUAL, OTHER = [(32, 16)] * 16, [(16, 24)] * 8
WIDE, TALL = (32, 1024), (1024, 32)
GATHERED, ALL_THREE = {"all-gather": 2}, {"all-to-all": 2, "all-gather": 1}
CASES = {
    "sharded": (EQUAL + OTHER, P("x"), DIRECT, Machine(), {"all-to-all": 4}),
    "sharded on both": (EQUAL + OTHER, P("y", "x"), DIRECT, SLOW, {"all-to-all": 4}),
    "padded": (EQUAL[:9], P("x", "y"), DIRECT, Machine(), {"all-to-all": 2}),
    "padded, divided": (EQUAL[:9], P("x"), DIRECT, FAST, ALL_THREE),
    "replicated, slow": (EQUAL + OTHER, P(), QUICK, SLOW, {}),
    "replicated, fast": (EQUAL + OTHER, P(), DIRECT, FAST, GATHERED),
    "layers": ([(8, 16, 24)] * 2, P("x"), DIRECT, SLOW, {}),
    "split": ([WIDE], P(None, ("x", "y")), NS, FAST, {"all-reduce": SUMS}),
    "split, short side": (
        [WIDE], P("y", "x"), NS, FAST, {"all-reduce": SUMS, "all-to-all": 2},
    ),
    "split, both ways": (
        [WIDE, TALL], P("x", "y"), NS, FAST,
        {"all-reduce": 2 * SUMS, "all-to-all": 4},
    ),
    "split, replicated": (
        [WIDE], P(), NS, FAST, {"all-reduce": SUMS, "all-gather": 1},
    ),
    "split, by two steps": (
        [TALL], P("y"), polar.DWH(), FAST, {"all-reduce": 4, "all-gather": 1},
    ),
}  # fmt: skip


@both
@pytest.mark.parametrize("case", CASES)
def test_collectives_are_those_that_explain_predicts(kind, case):
    shapes, spec, method, machine, expected = CASES[case]
    grads = drawn(kernels(*shapes))
    rule = components.ByName(stacked=("k0", "k1") if len(shapes[0]) > 2 else ())
    xs = placed(grads, jax.tree.map(lambda _: spec, grads), mesh_of(kind))
    how = {"rule": rule, "method": method, "stacking": known(kind, xs, machine=machine)}
    program = jax.jit(updating(**how)).lower(xs).compile()
    assert called(program) == expected
    shares = plans(xs, **how)
    assert predicted(shares) == expected
    out = program(xs)
    assert distance(out, updating(method, rule=rule)(grads)) < 1e-5
    assert sharded_alike(out, xs)


# What the compiler makes of leaves whose shardings it alone knows, on one mesh axis.
FEW = {"all-reduce": 1}
GUESSED = {
    "rows": ([(32, 16)] * 3, P("x"), {"all-to-all": 2}),
    "columns": ([(16, 24)] * 9, P(None, "x"), {"all-to-all": 2}),
    "one matrix": ([(16, 24)], P(None, "x"), {"all-to-all": 2}),
    "two shapes": (EQUAL[:3] + OTHER, P("x"), {"all-to-all": 4}),
    "conv in": ([(3, 3, 16, 8)] * 2, P(None, None, "x"), {"all-to-all": 2}),
    "conv out": ([(3, 3, 8, 16)] * 2, P(None, None, None, "x"), {"all-to-all": 2}),
    "scanned rows": ([(12, 16, 24)], P(None, "x"), {"all-to-all": 2}),
    "layers": ([(16, 16, 24)], P("x"), {}),
    "replicated": ([(16, 24)] * 9, P(), {"all-gather": 1}),
    "replicated, two shapes": (EQUAL[:3] + OTHER, P(), {"all-gather": 2}),
    "replicated layers": ([(12, 16, 24)], P(), {"all-gather": 1}),
    "replicated, one matrix": ([(16, 24)], P(), FEW),
    "replicated, few layers": ([(3, 16, 24)], P(), FEW),
}


@pytest.mark.parametrize("case", GUESSED)
def test_collectives_where_the_compiler_alone_knows_the_layout(case):
    shapes, spec, expected = GUESSED[case]
    grads = drawn(kernels(*shapes))
    rule = components.ByName(stacked=("k0",) if len(shapes[0]) == 3 else ())
    specs = jax.tree.map(lambda _: spec, grads)
    xs = placed(grads, specs, mesh_of("unsaid", (8,)))
    program = jax.jit(updating(DIRECT, rule=rule)).lower(xs).compile()
    shares = plans(xs, rule, DIRECT)
    assert {share.plan for share in shares} == {"compiler"}
    assert called(program) == predicted(shares) == expected
    sent = sum(share.bytes for share in shares)
    assert hlo.count(program.as_text()).sent == sent
    out = program(xs)
    assert distance(out, updating(DIRECT, rule=rule)(grads)) < 1e-5
    assert sharded_alike(out, xs)


def test_explain_says_where_the_compiler_chooses():
    mesh = mesh_of("unsaid")
    specs = {"rows": P("x"), "two axes": P(("x", "y")), "replicated": P()}
    tree = {name: {"kernel": struct(LAYOUTS[name][0])} for name in specs}

    def found(*names):
        lie = {name: {"kernel": NamedSharding(mesh, specs[name])} for name in names}
        shares = orthax.explain({name: tree[name] for name in names}, shardings=lie)
        return [share.collectives for share in shares.shares]

    assert found("rows") == [("compiler's choice",)]
    assert found("two axes") == [("all-to-all", "all-to-all")]
    # The last two have one shape, and are sharded in different ways.
    mixed = found("replicated", "rows", "two axes")
    assert mixed == [("all-reduce",), ("compiler's choice",)]


# Plans on meshes of devices that are not there.
def divisions(shapes, spec, sizes=(8,), machine=Machine(), method=DIRECT):
    names, kinds = ("x", "y", "z")[: len(sizes)], (EXPLICIT,) * len(sizes)
    mesh = AbstractMesh(sizes, names, axis_types=kinds)
    tree = kernels(*shapes)
    lie = jax.tree.map(lambda _: NamedSharding(mesh, spec), tree)
    how = {"method": method, "stacking": Stacking(machine=machine), "shardings": lie}
    return orthax.explain(tree, **how).shares


def operations(shapes, method=DIRECT):
    return sum(method.flops(m, n) for m, n in shapes)


@pytest.mark.parametrize("sizes", [(8,), (4, 2), (2, 2, 2), (16, 4)], ids=str)
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P()], ids=str)
def test_work_is_divided_evenly_where_the_count_divides(sizes, spec):
    shapes = [(64, 128)] * 64 + [(256, 64)] * 128
    whole = operations(shapes)

    def busiest(machine):
        return sum(share.flops for share in divisions(shapes, spec, sizes, machine))

    assert busiest(FAST) == pytest.approx(whole / math.prod(sizes), rel=0.05)
    assert busiest(SLOW) <= whole / (sizes[0] if any(spec) else 1)


def test_what_does_not_divide_is_padded():
    one = operations([(64, 32)])
    for count, turns in ((7, 1), (8, 1), (9, 2), (16, 2), (17, 3)):
        (share,) = divisions([(64, 32)] * count, P("x"))
        assert share.plan == "stack"
        assert share.flops == turns * one
        assert share.bytes == 2 * turns * 8 * (64 * 32 * 4 // 8) * 7 // 8


@pytest.mark.parametrize("seed", range(20))
def test_plans_do_not_depend_on_the_order_of_leaves(seed):
    rng = np.random.default_rng(seed)
    sides = [(16, 24), (24, 16), (32, 32), (8, 64), (512, 64)]
    shapes = [sides[i] for i in rng.integers(0, len(sides), rng.integers(2, 24))]
    spec = [P("x"), P("x", "y"), P(), P(("y", "x"))][seed % 4]
    machine = [Machine(), FAST, SLOW][seed % 3]
    order = rng.permutation(len(shapes))

    def found(shapes):
        shares = divisions(shapes, spec, (4, 2), machine, NS)
        alike = [(s.plan, sorted(s.shapes), *s[3:]) for s in shares]
        return sorted(alike, key=str)

    plain, turned = found(shapes), found([shapes[i] for i in order])
    for one, other in zip(plain, turned, strict=True):
        assert one[:5] == other[:5]
        assert one[5:] == pytest.approx(other[5:])


@pytest.mark.parametrize("seed", range(20))
def test_every_leaf_is_in_one_plan_that_does_no_more_than_all_of_it(seed):
    rng = np.random.default_rng(seed)
    shapes = [tuple(map(int, 8 * rng.integers(1, 9, 2))) for _ in range(12)]
    shapes += shapes[: rng.integers(12)]
    spec = [P("x"), P("x", "y"), P(), P(None, ("y", "x"))][seed % 4]
    shares = divisions(shapes, spec, (4, 2), [Machine(), FAST, SLOW][seed % 3], NS)
    paths = [path for share in shares for path in share.paths]
    assert sorted(paths) == sorted(f"k{i}/kernel" for i in range(len(shapes)))
    for share in shares:
        assert (share.plan == "local") == (not share.axes) == (not share.collectives)
        assert any(spec) or "all-to-all" not in share.collectives
        if share.plan != "split":
            total = sum(b * NS.flops(m, n) for b, m, n in share.shapes)
            assert total / 8 <= share.flops * (1 + 1e-9)
            assert share.flops <= total * (1 + 1e-9)


@every
@pytest.mark.parametrize("method", [NS, polar.DWH()], ids=lambda m: type(m).__name__)
def test_temporary_memory_is_that_of_a_share(kind, method):
    rule = components.ByName(stacked=("layers",))
    spec = NamedSharding(mesh_of(kind, (8,)), P(None, "x"))
    stack = jax.ShapeDtypeStruct((16, 256, 512), jnp.float32, sharding=spec)
    update = jax.jit(updating(method, rule=rule, stacking=known(kind, spec)))
    program = update.lower({"layers": {"kernel": stack}}).compile()
    share = 16 * 256 * 512 * 4 / 8
    limit = 4 if method == NS else 5
    assert program.memory_analysis().temp_size_in_bytes < limit * share


def replicated(kind, count=16):
    mesh = mesh_of(kind)
    grads = drawn(kernels(*[(16, 32)] * count))
    return mesh, grads, placed(grads, jax.tree.map(lambda _: P(), grads), mesh)


ASKED = {
    "x": (lambda mesh: "x", 4),
    "y": (lambda mesh: P("y"), 2),
    "both": (lambda mesh: ("x", "y"), 8),
    "one entry": (lambda mesh: P(("y", "x")), 8),
    "mesh": (lambda mesh: NamedSharding(mesh, P(None, "x")), 4),
}


@both
@pytest.mark.parametrize("asked", ASKED)
def test_replicated_leaves_are_divided_over_the_axes_that_are_asked_for(kind, asked):
    mesh, grads, xs = replicated(kind)
    sharding, parts = ASKED[asked]
    # Not where the machine would rather have every device work on all of them.
    asked = known(kind, xs, sharding=sharding(mesh), machine=SLOW)
    flops, counts = [], []
    for stacking in (asked, known(kind, xs, machine=SLOW)):
        with jax.set_mesh(mesh):
            update = jax.jit(updating(QUICK, stacking=stacking))
            program = update.lower(xs).compile()
        counts.append(called(program))
        flops.append(program.cost_analysis()["flops"])
        out = program(xs)
        assert distance(out, updating(QUICK)(grads)) < 1e-5
        assert sharded_alike(out, xs)
    assert counts == [{"all-gather": 1}, {}]
    assert flops[0] * parts == pytest.approx(flops[1], rel=0.1)
    (share,) = plans(xs, components.ByName(), QUICK, asked)
    assert math.prod(mesh.shape[name] for name in share.axes) == parts


@pytest.mark.parametrize("asked", ["y", "one entry", "mesh"])
def test_the_compiler_divides_over_the_axes_that_are_asked_for(asked):
    mesh, grads, xs = replicated("unsaid")
    sharding, parts = ASKED[asked]
    stacking = Stacking(sharding=sharding(mesh))
    program = jax.jit(updating(DIRECT, stacking=stacking)).lower(xs).compile()
    out = program(xs)
    assert distance(out, updating(DIRECT)(grads)) < 1e-5
    assert sharded_alike(out, xs)
    (share,) = plans(xs, components.ByName(), DIRECT, stacking)
    assert called(program) == predicted([share]) == {"all-gather": 1}
    assert math.prod(mesh.shape[name] for name in share.axes) == parts
    assert share.flops * parts == pytest.approx(16 * DIRECT.flops(16, 32))


@both
def test_axes_need_no_surrounding_mesh(kind):
    mesh, grads, xs = replicated(kind, 4)
    stacking = known(kind, xs, sharding="x", machine=SLOW)
    program = jax.jit(updating(stacking=stacking)).lower(xs).compile()
    assert called(program) == {"all-gather": 1}
    if kind == "auto":
        # Where arguments have no types yet, and the caller alone knows the mesh.
        lie = jax.tree.map(lambda x: x.sharding, xs)

        def found(sharding):
            stacking = known(kind, lie, sharding=sharding, machine=SLOW)
            update = jax.jit(updating(stacking=stacking), in_shardings=(lie,))
            return called(update.lower(grads).compile())

        for sharding in ("x", NamedSharding(mesh, P("x"))):
            assert found(sharding) == {"all-gather": 1}
        message = "mesh with the axes {'x': 2, 'y': 4}, but .* {'x': 4, 'y': 2}"
        with pytest.raises(ValueError, match=message):
            found(NamedSharding(OTHER_MESH, P("x")))
        with pytest.raises(ValueError, match="'w', but the mesh has the axes 'x', 'y'"):
            found("w")


OTHER_MESH = AbstractMesh((2, 4), ("x", "y"))


@both
def test_left_to_the_compiler(kind):
    _, xs = small_on(kind)
    update = updating(DIRECT, stacking=Stacking(sharding=None), **STACKED)
    out = jax.jit(update)(xs)
    assert distance(out, small()[1]) < 1e-5
    if kind == "explicit":
        assert sharded_alike(out, xs)
    assert plans(xs, STACKED["rule"], stacking=Stacking(sharding=None)) == ()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Stacking(sharding=3), TypeError, r'"stack", None.*got 3'),
        (lambda: Stacking(sharding=("x", 1)), TypeError, r"got \('x', 1\)"),
        (lambda: Stacking(sharding=["x"]), TypeError, r"got \['x'\]"),
        (lambda: Stacking(sharding=()), ValueError, "names no mesh axis.*use None"),
        (lambda: Stacking(sharding=P()), ValueError, "names no mesh axis"),
        (
            lambda: Stacking(sharding=NamedSharding(OTHER_MESH, P(None))),
            ValueError,
            "names no mesh axis",
        ),
        (lambda: Machine(flops=0), ValueError, "`flops` must be finite and pos.*got 0"),
        (lambda: Machine(bandwidth=-1.0), ValueError, "`bandwidth`.*got -1.0"),
        (lambda: Machine(latency=math.inf), ValueError, "`latency`.*got inf"),
        (lambda: Machine(latency=math.nan), ValueError, "`latency`.*got nan"),
        (lambda: Machine(flops="many"), ValueError, "`flops`.*got 'many'"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("sharding", "message"),
    [
        ("w", "asks for the mesh axes 'w', but the mesh has the axes 'x', 'y'"),
        (("x", "w"), "the mesh axes 'x', 'w', but the mesh has the axes 'x', 'y'"),
        (
            NamedSharding(OTHER_MESH, P("x")),
            r"mesh with the axes {'x': 2, 'y': 4}, but .* {'x': 4, 'y': 2}",
        ),
    ],
)
@both
@pytest.mark.parametrize("call", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_axes_that_the_mesh_does_not_have(kind, sharding, message, call):
    _, grads, xs = replicated(kind, 2)
    update = call(updating(stacking=Stacking(sharding=sharding)))
    with pytest.raises(ValueError, match=message):
        update(xs)
    if sharding == "w":
        with pytest.raises(ValueError, match=r"'w', but no mesh is known.*set_mesh\("):
            update(grads)


@both
def test_axes_that_a_shard_map_has_taken(kind):
    mesh, _, xs = replicated(kind, 2)
    for taken, asked in [(("x", "y"), "x"), (("x",), ("y", "x"))]:
        update = jax.shard_map(
            updating(stacking=Stacking(sharding=asked)),
            mesh=mesh,
            in_specs=P(),
            out_specs=P(),
            axis_names=set(taken),
        )
        with pytest.raises(ValueError, match="shard_map uses 'x': leave it out"):
            jax.eval_shape(update, xs)


def test_what_is_said_of_shardings_is_checked():
    mesh = mesh_of("auto")
    grads = drawn(kernels((32, 16), (32, 12)))
    xs = placed(grads, jax.tree.map(lambda _: P("x"), grads), mesh)
    lie = jax.tree.map(lambda x: x.sharding, xs)
    other = NamedSharding(OTHER_MESH, P("x"))
    cases = [
        ({"k0": lie["k0"]}, r"'k1/kernel' .*\(32, 12\) has no sharding.*'k0/kernel'"),
        (other, r"'k0/kernel' .*'x': 4, 'y': 2}, but .*'x': 2, 'y': 4}"),
        ({**lie, "k1": {"kernel": other}}, r"'k1/kernel' .*'x': 2.*others.*'x': 4"),
        (P(None, ("x", "y")), r"'k1/kernel' .*\(32, 12\): an axis of 12 .*of 8 dev"),
        (P(None, None, "x"), "'k0/kernel' .* has fewer axes than its sharding"),
    ]
    for said, message in cases:
        update = updating(DIRECT, stacking=Stacking(shardings=said))
        for call in (update, jax.jit(update)):
            with pytest.raises(ValueError, match=message):
                call(xs)
        with pytest.raises(ValueError, match=message):
            plans(xs, components.ByName(), DIRECT, Stacking(shardings=said))
    update = updating(DIRECT, stacking=Stacking(shardings=P("x")))
    with pytest.raises(ValueError, match=r"has .*'x'.* and no mesh: give .*set_mesh\("):
        update(grads)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"a": {"kernel": "x"}}, "got 'x' of type str for 'a/kernel'"),
        ({"a": P("x"), "b": struct((2, 2))}, "got ShapeDtypeStruct.* for 'b'"),
        ({"a": np.ones(2)}, "of type ndarray for 'a'"),
        (3, "got 3 of type int.$"),
    ],
)
def test_what_says_nothing_of_shardings(said, message):
    with pytest.raises(TypeError, match=message):
        Stacking(shardings=said)


def test_an_array_on_one_device_says_nothing_of_a_mesh():
    for said in (jnp.ones(3), jnp.ones(3).sharding):
        with pytest.raises(TypeError, match="got SingleDeviceSharding"):
            Stacking(shardings=said)


def test_what_is_said_of_shardings_is_a_value():
    """Which a method, a rule or a jitted function may be called with."""
    _, xs = small_on("auto")
    lie = jax.tree.map(lambda x: x.sharding, xs)
    one, same = Stacking(shardings=xs), Stacking(shardings=lie)
    assert one == same
    assert hash(one) == hash(same)
    assert dataclasses.replace(one, max_bytes=2**20) != one
    assert dataclasses.replace(one, max_bytes=None) == one
    assert "shardings=<shardings of 4 leaves>" in repr(one)
    assert len(repr(one)) < 200


def test_one_sharding_for_all():
    mesh, grads, xs = replicated("auto", 9)
    xs = jax.device_put(xs, NamedSharding(mesh, P("x")))
    for said in (P("x"), NamedSharding(mesh, P("x"))):
        update = jax.jit(updating(DIRECT, stacking=Stacking(shardings=said)))
        program = update.lower(xs).compile()
        assert called(program) == {"all-to-all": 2}
        assert distance(program(xs), updating(DIRECT)(grads)) < 1e-5


def test_explain_takes_specs_and_one_sharding_for_all():
    shapes = {"a": {"kernel": struct((16, 8)), "bias": struct((8,))}}
    mesh = AbstractMesh((8,), ("d",), axis_types=(EXPLICIT,))
    named = jax.NamedSharding(mesh, P("d"))
    expected = orthax.explain(shapes, shardings=jax.tree.map(lambda _: named, shapes))
    assert [share.plan for share in expected.shares] == ["stack"]
    with jax.sharding.use_abstract_mesh(mesh):
        specs = jax.tree.map(lambda _: P("d"), shapes)
        assert orthax.explain(shapes, shardings=specs).shares == expected.shares
    assert orthax.explain(shapes, shardings=named).shares == expected.shares
    with pytest.raises(ValueError, match="no mesh"):
        orthax.explain(shapes, shardings=P("d"))
    with pytest.raises(TypeError, match="of type str"):
        orthax.explain(shapes, shardings=jax.tree.map(lambda _: "d", shapes))


def test_explain_names_what_is_sharded_wrongly():
    tree = kernels((32, 16), (32, 12))
    mesh = AbstractMesh((4, 2), ("x", "y"), axis_types=(EXPLICIT,) * 2)
    lie = [NamedSharding(mesh, P("x")), NamedSharding(OTHER_MESH, P("x"))]

    def explained(*shardings, **how):
        trees = [{"kernel": sharding} for sharding in shardings]
        lie = dict(zip(tree, trees, strict=True))
        return orthax.explain(tree, shardings=lie, **how)

    with pytest.raises(ValueError, match=r"'k1/kernel' .*'x': 2.*others.*'x': 4"):
        explained(*lie)
    with pytest.raises(
        ValueError, match=r"'k1/kernel' .*\(32, 12\): an axis of 12 .*8"
    ):
        explained(lie[0], NamedSharding(mesh, P(None, ("x", "y"))))
    with pytest.raises(ValueError, match=r"'k1/kernel' of shape \(32, 12\)"):
        explained(lie[0], NamedSharding(mesh, P(None, None, "x")))
    with pytest.raises(ValueError, match="'w', but the mesh has the axes 'x', 'y'"):
        explained(lie[0], lie[0], stacking=Stacking(sharding="w"))
    # What has no sharding by name is on every device.
    assert [s.plan for s in explained(lie[0], None, method=DIRECT).shares] == [
        "stack",
        "local",
    ]
    assert explained(None, None).shares == ()


# Every shape once: a state leaf of the shape of a parameter is one of that parameter.
TREE = {"a": (32, 16), "b": (16, 24), "layers": (8, 8, 16), "conv": (3, 3, 16, 8)}
TREE = {k: {"kernel": struct(shape)} for k, shape in TREE.items()}
TREE["a"]["bias"] = struct((16,))
SPECS = {
    "a": {"kernel": P("x"), "bias": P("y")},
    "b": {"kernel": P("x", "y")},
    "layers": {"kernel": P("x", None, "y")},
    "conv": {"kernel": P(None, None, "y", "x")},
}
HOW = {"method": DIRECT, "rule": STACKED["rule"]}


def restoring(norm, stacking):
    return transforms.restore_norm(
        orthax.orthogonalise(stacking=stacking, **HOW), norm, **STACKED
    )


OPTIMISERS = {
    "sgd": lambda s: orthax.orthogonal_sgd(0.1, weight_decay=0.1, stacking=s, **HOW),
    "adam": lambda s: orthax.orthogonal_adam(0.1, stacking=s, **HOW),
    "lars": lambda s: orthax.orthogonal_lars(0.1, stacking=s, **HOW),
    "muon": lambda s: orthax.muon(0.1, weight_decay=0.1, stacking=s, **HOW),
    "normuon": lambda s: orthax.normuon(0.1, stacking=s, **HOW),
    "normalise": lambda s: orthax.normalise(**STACKED),
    "normalise_components": lambda s: orthax.normalise_components(**STACKED),
    "rows": lambda s: orthax.normalise_components(axis="rows", **STACKED),
    "to_weights": lambda s: transforms.scale_to_weights(**STACKED),
    "on_sphere": lambda s: transforms.on_sphere(**STACKED),
    "original": lambda s: restoring(transforms.OriginalNorm(), s),
    "nuclear": lambda s: restoring(transforms.NuclearNorm(), s),
    "shape": lambda s: orthax.scale_by_shape(transforms.Spectral(), **STACKED),
}


WITHOUT_EXCHANGE = ("normalise", "normalise_components", "shape", "rows")
WITHOUT_EXCHANGE += ("to_weights", "on_sphere")
# How many leaves of a state have the shape of a parameter.
STATES = {"sgd": 5, "adam": 10, "lars": 5, "muon": 6, "normuon": 6}


def two_steps(tx, params, grads, check=lambda program: None):
    """Return parameters and state after two steps, by one program."""
    state = tx.init(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    program = jax.jit(step).lower(params, state, grads[0]).compile()
    check(program)
    for grad in grads:
        params, state = program(params, state, grad)
    return params, state


@functools.cache
def on_one_device(name):
    trees = [drawn(TREE, seed) for seed in range(3)]
    tx = OPTIMISERS[name](Stacking())
    return trees, two_steps(tx, trees[0], trees[1:])


@both
@pytest.mark.parametrize("name", OPTIMISERS)
def test_two_steps_of_every_optimiser(kind, name):
    trees, (expected, _) = on_one_device(name)
    mesh = mesh_of(kind)
    params, *grads = (placed(tree, SPECS, mesh) for tree in trees)

    def check(program):
        counts = called(program)
        assert not {"all-gather", "collective-permute"} & {*counts}
        assert ("all-to-all" in counts) == (name not in WITHOUT_EXCHANGE)

    tx = OPTIMISERS[name](known(kind, params))
    out, state = two_steps(tx, params, grads, check)
    # NuclearNorm gives steps of the size of the matrices.
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    assert distance(out, expected) < 2e-6 * max(1, largest)
    assert distance(expected, trees[0]) > 0.01
    assert sharded_alike(out, params)
    like = {x.shape: x for x in jax.tree.leaves(params)}
    found = [x for x in jax.tree.leaves(state) if x.shape in like]
    assert len(found) == STATES.get(name, 0)
    assert all(
        x.sharding.is_equivalent_to(like[x.shape].sharding, x.ndim) for x in found
    )
