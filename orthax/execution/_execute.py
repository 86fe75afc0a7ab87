"""Work on the matrices of leaves wherever they are: on one device or on many."""

import functools
from collections.abc import Callable, Sequence

import jax

from orthax.components import Matricisation
from orthax.execution._costs import Factors, Work
from orthax.execution._division import Division, sharded_like
from orthax.execution._layout import full_spec, layouts
from orthax.execution._mesh import Arrays, by_compiler, mesh_of
from orthax.execution._plan import carry_out, divisions_of
from orthax.execution._stacking import Stacking

P = jax.sharding.PartitionSpec
Cuts = tuple[Matricisation, ...]
Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
# Of every leaf, where the caller says them.
Shardings = tuple[jax.NamedSharding, ...] | None


def execute(
    xs: Arrays,
    work: Work | Factors,
    cuts: Cuts,
    stacking: Stacking,
    shardings: Shardings = None,
) -> Arrays:
    """Work on the matrices of leaves, divided among the devices that have them.

    How leaves are sharded is known in one of three ways: by their types, on a mesh of
    explicit axes; from the caller; or not at all, on a mesh of automatic axes, where
    the compiler is asked for stacks of matrices.

    Args:
      xs: the leaves.
      work: what is done to the matrices.
      cuts: how each leaf is cut.
      stacking: what the caller asks for.
      shardings: how each leaf is sharded, where the caller says so.

    Raises:
      ValueError: if `stacking` names axes that the mesh lacks, or that are taken, or
        its `max_bytes` is smaller than one matrix.
    """
    mesh = mesh_of(xs)
    stacking.check(shardings[0].mesh if shardings and mesh.empty else mesh)
    if not any(isinstance(x, jax.core.Tracer) for x in xs):
        alone = all(len(x.sharding.device_set) == 1 for x in xs)
        if alone and isinstance(work, Work):
            return _whole(work, cuts, stacking, *xs)
        if not alone and shardings is None:
            shardings = _of_arrays(xs)
        return _compiled(xs, work, cuts, stacking, None if alone else shardings)
    return _traced(xs, work, cuts, stacking, shardings)


def _of_arrays(xs: Arrays) -> Shardings:
    """Return the shardings of arrays that are not traced, all on one mesh."""
    found = tuple(x.sharding for x in xs)
    named = all(isinstance(sharding, jax.NamedSharding) for sharding in found)
    return found if named and len({s.mesh for s in found}) == 1 else None


def _traced(
    xs: Arrays,
    work: Work | Factors,
    cuts: Cuts,
    stacking: Stacking,
    shardings: Shardings,
) -> Arrays:
    mesh = mesh_of(xs)
    whole = by_compiler(functools.partial(_whole, work, cuts, stacking), xs)
    if stacking.sharding is None or (mesh.manual_axes and not mesh.explicit_axes):
        # Inside a shard_map the compiler knows more of the axes that are left.
        return whole(*xs)
    how = work, cuts, stacking
    if shardings is not None and not mesh.manual_axes:
        called = _by_shardings(*how, shardings)
    elif mesh.explicit_axes:
        called = _by_types(*how, mesh)
    elif mesh.auto_axes and mesh.size > 1:
        called = functools.partial(_by_constraints, *how, mesh)
    else:
        return whole(*xs)

    @jax.custom_batching.custom_vmap
    def batched(*xs: jax.Array) -> Arrays:
        return called(*xs)

    @batched.def_vmap
    def _(size, in_batched, *xs):
        # One more leading axis of a leaf is one more batch axis of its matrices.
        del size
        moved = tuple(
            c.batched() if b else c for c, b in zip(cuts, in_batched, strict=True)
        )
        said = shardings and tuple(
            jax.NamedSharding(s.mesh, P(None, *s.spec)) if b else s
            for s, b in zip(shardings, in_batched, strict=True)
        )
        return _traced(xs, work, moved, stacking, said), tuple(in_batched)

    # A derivative is whatever the compiler makes of that of the whole.
    divided = jax.custom_jvp(lambda *xs: batched(*xs))
    divided.defjvp(lambda primals, tangents: jax.jvp(whole, primals, tangents))
    return divided(*xs)


_compiled = jax.jit(_traced, static_argnums=(1, 2, 3, 4))


def _whole(
    work: Work | Factors, cuts: Cuts, stacking: Stacking, *xs: jax.Array
) -> Arrays:
    """Work on leaves that one device has, or that the compiler shards as it likes."""
    return _mapped(work, cuts, stacking, {}, [P()] * len(xs), lambda work: work, *xs)


def _by_types(
    work: Work | Factors,
    cuts: Cuts,
    stacking: Stacking,
    mesh: jax.sharding.AbstractMesh,
) -> Callable[..., Arrays]:
    """Divide the work as the types of the leaves say."""

    def called(*xs: jax.Array) -> Arrays:
        specs = tuple(jax.typeof(x).sharding.spec for x in xs)
        used = {name for spec in specs for axes in full_spec(spec, 0) for name in axes}
        over = functools.partial(_over, work, cuts, stacking, mesh, specs)
        try:
            return over(set(mesh.explicit_axes), *xs)
        except ValueError:
            # An axis that a vmap goes over cannot be used, and nothing says which.
            if used == set(mesh.explicit_axes):
                raise
            return over(used, *xs)

    return called


def _by_shardings(
    work: Work | Factors,
    cuts: Cuts,
    stacking: Stacking,
    shardings: tuple[jax.NamedSharding, ...],
) -> Callable[..., Arrays]:
    """Divide the work as the caller says that the leaves are sharded."""
    mesh = shardings[0].mesh
    specs = tuple(sharding.spec for sharding in shardings)
    names = set(mesh.axis_names)
    return functools.partial(_over, work, cuts, stacking, mesh, specs, names)


def _over(
    work: Work | Factors,
    cuts: Cuts,
    stacking: Stacking,
    mesh: Mesh,
    specs: Sequence[P],
    names: set[str],
    *xs: jax.Array,
) -> Arrays:
    """Divide the work over some axes of a mesh."""
    sizes = {name: n for name, n in mesh.shape.items() if name in names}
    mapped = functools.partial(_shard_map, mesh=mesh, specs=specs, names=names)
    return _mapped(work, cuts, stacking, sizes, specs, mapped, *xs)


def _mapped(
    work: Work | Factors,
    cuts: Cuts,
    stacking: Stacking,
    sizes: dict[str, int],
    specs: Sequence[P],
    mapped: Callable[[Callable[..., Arrays]], Callable[..., Arrays]],
    *xs: jax.Array,
) -> Arrays:
    known = layouts(xs, cuts, specs, sizes)
    divisions = divisions_of(known, work.on(None), stacking)

    def on_device(*local: jax.Array) -> Arrays:
        fetched = [d.fetch([local[i] for i in d.members]) for d in divisions]
        done = carry_out(divisions, work, stacking, fetched)
        return _leaves(divisions, local, done)

    return mapped(on_device)(*xs)


def _by_constraints(
    work: Work | Factors,
    cuts: Cuts,
    stacking: Stacking,
    mesh: jax.sharding.AbstractMesh,
    *xs: jax.Array,
) -> Arrays:
    """Divide stacks of matrices of one shape, however their leaves are sharded.

    The compiler moves a stack from where it finds its leaves to the devices, and back.
    """
    known = layouts(xs, cuts, [P()] * len(xs), mesh.shape)
    divisions = divisions_of(known, work.on(None), stacking, mesh)
    stacks = [d.fetch([xs[i] for i in d.members]) for d in divisions]

    def on_device(*shares: jax.Array) -> Arrays:
        fetched = [[share] for share in shares]
        return tuple(y for (y,) in carry_out(divisions, work, stacking, fetched))

    specs = tuple(P(division.axes) for division in divisions)
    mapped = _shard_map(on_device, mesh, specs, set(mesh.auto_axes))
    done = [[stack] for stack in mapped(*(stack for (stack,) in stacks))]
    out = _leaves(divisions, xs, done)
    return tuple(sharded_like(x, y) for x, y in zip(xs, out, strict=True))


def _leaves(
    divisions: Sequence[Division], xs: Arrays, done: Sequence[Sequence[jax.Array]]
) -> Arrays:
    """Return all leaves, from what was made of each division."""
    out = list(xs)
    for division, ys in zip(divisions, done, strict=True):
        pairs = zip(division.members, division.bring_back(ys), strict=True)
        for i, y in pairs:
            out[i] = y
    return tuple(out)


def _shard_map(
    work: Callable[..., Arrays], mesh: Mesh, specs: Sequence[P], names: set[str]
) -> Callable[..., Arrays]:
    how = {"mesh": mesh, "axis_names": names, "check_vma": False}
    return jax.shard_map(work, in_specs=specs, out_specs=specs, **how)
