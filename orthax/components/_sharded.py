"""Work on the matrices of leaves wherever they are: on one device or on many."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.shard_alike import shard_alike
from jax.experimental.xla_metadata import set_xla_metadata

from orthax.components._costs import Costs
from orthax.components._division import divided
from orthax.components._exchange import ManyFunction, carry_out, of_leaves, on_matrices
from orthax.components._layout import Layout, full_spec, layouts
from orthax.components._matricisation import Matricisation

Arrays = tuple[jax.Array, ...]
P = jax.sharding.PartitionSpec
Specs = Sequence[P]
# Of every leaf, where the caller says them.
Shardings = tuple[jax.NamedSharding, ...] | None
_number = itertools.count()


def over_devices(
    xs: Arrays,
    f: ManyFunction,
    cuts: tuple[Matricisation, ...],
    costs: Costs | None,
    shardings: Shardings = None,
) -> Arrays:
    """Call `f` on the matrices of leaves, divided among the devices that have them.

    How leaves are sharded is known in one of three ways: by their types, on a mesh of
    explicit axes; from the caller; or not at all, on a mesh of automatic axes, where
    the compiler is asked for stacks of matrices.

    Args:
      xs: the leaves.
      f: maps a list of stacks `(b, m, n)` to as many of equal shapes, matrix by matrix.
      cuts: how each leaf is cut.
      costs: what the division is decided by; None leaves it to the compiler.
      shardings: how each leaf is sharded, where the caller says so.

    Raises:
      ValueError: if `costs` name axes that the mesh lacks, or that are taken.
    """
    if costs is not None:
        mesh = mesh_of(xs)
        costs.check(shardings[0].mesh if shardings and mesh.empty else mesh)
    if any(isinstance(x, jax.core.Tracer) for x in xs):
        return _traced(xs, f, cuts, costs, shardings)
    if all(len(x.sharding.device_set) == 1 for x in xs):
        return on_matrices(f, cuts, *xs)
    if shardings is None:
        shardings = _of_arrays(xs)
    return _compiled(xs, f, cuts, costs, shardings)


def _of_arrays(xs: Arrays) -> Shardings:
    """Return the shardings of arrays that are not traced, all on one mesh."""
    found = tuple(x.sharding for x in xs)
    named = all(isinstance(sharding, jax.NamedSharding) for sharding in found)
    return found if named and len({s.mesh for s in found}) == 1 else None


def _traced(
    xs: Arrays,
    f: ManyFunction,
    cuts: tuple[Matricisation, ...],
    costs: Costs | None,
    shardings: Shardings,
) -> Arrays:
    mesh = mesh_of(xs)
    whole = by_compiler(functools.partial(on_matrices, f, cuts), xs)
    if costs is None or (mesh.manual_axes and not mesh.explicit_axes):
        # Inside a shard_map the compiler knows more of the axes that are left.
        return whole(*xs)
    if shardings is not None and not mesh.manual_axes:
        called = _by_shardings(f, cuts, costs, shardings)
    elif mesh.explicit_axes:
        called = _by_types(f, cuts, costs, mesh)
    elif mesh.auto_axes and mesh.size > 1:
        called = _by_constraints(f, cuts, costs, mesh)
    else:
        return whole(*xs)

    @jax.custom_batching.custom_vmap
    def batched(*xs: jax.Array) -> Arrays:
        return called(*xs)

    @batched.def_vmap
    def _(size, in_batched, *xs):
        # One more leading axis of a leaf is one more batch axis of its matrices.
        del size
        moved = [
            c.behind_axis() if b else c for c, b in zip(cuts, in_batched, strict=True)
        ]
        said = shardings and tuple(
            jax.NamedSharding(s.mesh, P(None, *s.spec)) if b else s
            for s, b in zip(shardings, in_batched, strict=True)
        )
        return _traced(xs, f, tuple(moved), costs, said), tuple(in_batched)

    # A derivative is whatever the compiler makes of that of the whole.
    divided = jax.custom_jvp(lambda *xs: batched(*xs))
    divided.defjvp(lambda primals, tangents: jax.jvp(whole, primals, tangents))
    return divided(*xs)


_compiled = jax.jit(_traced, static_argnums=(1, 2, 3, 4))


def mesh_of(xs: Sequence[jax.Array]) -> jax.sharding.AbstractMesh:
    """Return the mesh that the types of arrays name, or one without axes.

    Args:
      xs: arrays, traced or not.

    Returns:
      The mesh, with the names, sizes and kinds of its axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import components
      >>> components.mesh_of([jnp.ones(2)]).explicit_axes
      ()
    """
    meshes = [jax.typeof(x).sharding.mesh for x in xs]
    return next((m for m in meshes if not m.empty), meshes[0])


def by_compiler(
    g: Callable[..., Arrays], xs: Sequence[jax.Array]
) -> Callable[..., Arrays]:
    """Let the compiler shard what a function does, also where axes are explicit.

    Args:
      g: maps leaves to as many; each result is sharded like its argument.
      xs: what it will be called with.

    Returns:
      A function of as many leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax import components
      >>> x = jnp.ones((2, 3))
      >>> flat = components.by_compiler(lambda x: (x.ravel().reshape(2, 3) * 2,), [x])
      >>> float(flat(x)[0][0, 0])
      2.0
    """
    axes = mesh_of(xs).explicit_axes
    if not axes:
        return g

    def called(*xs: jax.Array) -> Arrays:
        like = tuple(jax.typeof(x).sharding for x in xs)
        return jax.sharding.auto_axes(g, axes=axes, out_sharding=like)(*xs)

    return called


def _by_types(
    f: ManyFunction,
    cuts: Sequence[Matricisation],
    costs: Costs,
    mesh: jax.sharding.AbstractMesh,
) -> Callable[..., Arrays]:
    """Divide the work as the types of the leaves say."""

    def called(*xs: jax.Array) -> Arrays:
        specs = tuple(jax.typeof(x).sharding.spec for x in xs)
        used = {name for spec in specs for axes in full_spec(spec, 0) for name in axes}
        work = functools.partial(_mapped, f, cuts, costs, mesh, specs)
        try:
            return work(set(mesh.explicit_axes), *xs)
        except ValueError:
            # An axis that a vmap goes over cannot be used, and nothing says which.
            if used == set(mesh.explicit_axes):
                raise
            return work(used, *xs)

    return called


def _by_shardings(
    f: ManyFunction,
    cuts: Sequence[Matricisation],
    costs: Costs,
    shardings: tuple[jax.NamedSharding, ...],
) -> Callable[..., Arrays]:
    """Divide the work as the caller says that the leaves are sharded."""
    mesh = shardings[0].mesh
    specs = tuple(sharding.spec for sharding in shardings)
    return functools.partial(_mapped, f, cuts, costs, mesh, specs, set(mesh.axis_names))


def _mapped(
    f: ManyFunction,
    cuts: Sequence[Matricisation],
    costs: Costs,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    specs: Specs,
    names: set[str],
    *xs: jax.Array,
) -> Arrays:
    sizes = {name: n for name, n in mesh.shape.items() if name in names}
    known = layouts(xs, cuts, specs, sizes)
    plans = divided(known, costs)

    def work(*local: jax.Array) -> Arrays:
        return tuple(carry_out(f, costs.split, local, known, plans))

    return _shard_map(work, mesh, specs, names)(*xs)


def _by_constraints(
    f: ManyFunction,
    cuts: Sequence[Matricisation],
    costs: Costs,
    mesh: jax.sharding.AbstractMesh,
) -> Callable[..., Arrays]:
    """Divide stacks of matrices of one shape, however their leaves are sharded.

    The compiler moves a stack from where it finds its leaves to the devices, and back.
    """
    names = costs.axes or mesh.auto_axes
    devices = math.prod(mesh.shape[name] for name in names)
    free = P.UNCONSTRAINED

    def called(*xs: jax.Array) -> Arrays:
        lots: dict[Layout, list[int]] = {}
        known = layouts(xs, cuts, [P()] * len(xs), {})
        for i, layout in enumerate(known):
            lots.setdefault(layout, []).append(i)
        stacks, kept = [], []
        for layout, members in lots.items():
            # Several leaves are joined where they are; those of one may be anywhere.
            first = None if len(members) > 1 else free
            spec = P(first, *[free] * len(layout.whole))
            kept.append(jax.NamedSharding(mesh, spec))
            units = [layout.to_units(xs[i]) for i in members]
            stack = _padded(jnp.concatenate(units), devices)
            stacks.append(jax.lax.with_sharding_constraint(stack, kept[-1]))
        work = functools.partial(on_matrices, f, [layout.unit for layout in lots])
        specs = (P(names),) * len(stacks)
        done = _shard_map(work, mesh, specs, set(mesh.auto_axes))(*stacks)
        out = list(xs)
        for (layout, members), keep, stack in zip(
            lots.items(), kept, done, strict=True
        ):
            stack = jax.lax.with_sharding_constraint(stack, keep)
            parts = of_leaves(stack, [layout] * len(members))
            for i, part in zip(members, parts, strict=True):
                out[i] = _sharded_like(xs[i], layout.from_units(part))
        return tuple(out)

    return called


def _sharded_like(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return `y`, sharded as the compiler finds `x`."""
    # JAX lowers equal calls once, which would make all leaves of one shape alike: a
    # number, of which the program shows nothing, tells them apart.
    with set_xla_metadata(pair=str(next(_number))):
        return shard_alike(x, y)[1]


def _padded(units: jax.Array, devices: int) -> jax.Array:
    """Return as many units as devices can share evenly."""
    return jnp.pad(units, [(0, -len(units) % devices)] + [(0, 0)] * (units.ndim - 1))


def _shard_map(
    work: Callable[..., Arrays],
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    specs: Specs,
    names: set[str],
) -> Callable[..., Arrays]:
    how = {"mesh": mesh, "axis_names": names, "check_vma": False}
    return jax.shard_map(work, in_specs=specs, out_specs=specs, **how)
