"""Work on the matrices of leaves wherever they lie: on one device or on many."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.experimental.custom_partitioning import custom_partitioning

from orthax.components._costs import Costs
from orthax.components._division import divided
from orthax.components._exchange import ManyFunction, carry_out
from orthax.components._layout import found_spec, full_spec, layouts
from orthax.components._matricisation import Matricisation

Arrays = tuple[jax.Array, ...]
Specs = Sequence[jax.sharding.PartitionSpec]


def over_devices(
    xs: Arrays, f: ManyFunction, cuts: tuple[Matricisation, ...], costs: Costs | None
) -> Arrays:
    """Call `f` on the matrices of leaves, divided among the devices that have them.

    Under a mesh of explicit axes the type of a leaf says where it lies. Otherwise only
    the compiler knows, which asks once it does.

    Args:
      xs: the leaves.
      f: maps a list of stacks `(b, m, n)` to as many of equal shapes, matrix by matrix.
      cuts: how each leaf is cut.
      costs: what the division is decided by; None leaves it to the compiler.

    Raises:
      ValueError: if `costs` name axes that the mesh lacks, or that are taken.
    """
    mesh = mesh_of(xs)
    if costs is not None:
        costs.check(mesh)
    if any(isinstance(x, jax.core.Tracer) for x in xs):
        return _traced(xs, f, cuts, costs)
    if all(len(x.sharding.device_set) == 1 for x in xs):
        return _whole(f, cuts, *xs)
    return _compiled(xs, f, cuts, costs)


def _traced(
    xs: Arrays, f: ManyFunction, cuts: tuple[Matricisation, ...], costs: Costs | None
) -> Arrays:
    mesh = mesh_of(xs)
    explicit, manual = mesh.explicit_axes, mesh.manual_axes
    whole = by_compiler(functools.partial(_whole, f, cuts), xs)
    if costs is None or (manual and not explicit):
        # Inside a shard_map the compiler cannot ask; what it knows, it uses.
        return whole(*xs)
    if explicit and (manual or not mesh.auto_axes):
        called = _by_types(f, cuts, costs, mesh)
    elif max(mesh.size, jax.device_count()) > 1:
        called = by_compiler(_by_asking(f, cuts, costs), xs)
    else:
        return whole(*xs)

    @jax.custom_batching.custom_vmap
    def batched(*xs: jax.Array) -> Arrays:
        return called(*xs)

    @batched.def_vmap
    def _(size, in_batched, *xs):
        # One more axis in front of a leaf is one more batch axis of its matrices.
        del size
        moved = [
            c.behind_axis() if b else c for c, b in zip(cuts, in_batched, strict=True)
        ]
        return _traced(xs, f, tuple(moved), costs), tuple(in_batched)

    # A derivative is whatever the compiler makes of that of the whole.
    divided = jax.custom_jvp(lambda *xs: batched(*xs))
    divided.defjvp(lambda primals, tangents: jax.jvp(whole, primals, tangents))
    return divided(*xs)


_compiled = jax.jit(_traced, static_argnums=(1, 2, 3))


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


def _whole(f: ManyFunction, cuts: Sequence[Matricisation], *xs: jax.Array) -> Arrays:
    """Call `f` on the matrices of whole leaves."""
    folded = [cut.fold(x) for cut, x in zip(cuts, xs, strict=True)]
    results = iter(f([stack for stacks in folded for stack in stacks]))
    return tuple(
        cut.unfold([next(results) for _ in stacks], x.shape)
        for cut, x, stacks in zip(cuts, xs, folded, strict=True)
    )


def by_compiler(
    g: Callable[..., Arrays], xs: Sequence[jax.Array]
) -> Callable[..., Arrays]:
    """Let the compiler shard what a function does, also where axes are explicit.

    Args:
      g: maps leaves to as many; each result lies like its argument.
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
        lies = tuple(jax.typeof(x).sharding for x in xs)
        return jax.sharding.auto_axes(g, axes=axes, out_sharding=lies)(*xs)

    return called


def _by_types(
    f: ManyFunction,
    cuts: Sequence[Matricisation],
    costs: Costs,
    mesh: jax.sharding.AbstractMesh,
) -> Callable[..., Arrays]:
    """Divide the work as the types of the leaves say."""

    def mapped(specs: Specs, names: set[str], *xs: jax.Array) -> Arrays:
        sizes = {name: n for name, n in mesh.shape.items() if name in names}
        work = _device_work(f, xs, cuts, specs, costs, sizes)
        how = {"mesh": mesh, "axis_names": names, "check_vma": False}
        return jax.shard_map(work, in_specs=specs, out_specs=specs, **how)(*xs)

    def called(*xs: jax.Array) -> Arrays:
        specs = tuple(jax.typeof(x).sharding.spec for x in xs)
        used = {name for spec in specs for axes in full_spec(spec, 0) for name in axes}
        try:
            return mapped(specs, set(mesh.explicit_axes), *xs)
        except ValueError:
            # An axis that a vmap goes over cannot be used, and nothing says which.
            if used == set(mesh.explicit_axes):
                raise
            return mapped(specs, used, *xs)

    return called


def _device_work(
    f: ManyFunction,
    shapes: Sequence[jax.Array | jax.ShapeDtypeStruct],
    cuts: Sequence[Matricisation],
    specs: Specs,
    costs: Costs,
    sizes: Mapping[str, int],
) -> Callable[..., Arrays]:
    lays = layouts(shapes, cuts, specs, sizes)
    plans = divided(lays, costs)
    return lambda *own: tuple(carry_out(f, costs.split, own, lays, plans))


def _by_asking(
    f: ManyFunction, cuts: Sequence[Matricisation], costs: Costs
) -> Callable[..., Arrays]:
    """Divide the work as the compiler says that the leaves lie."""
    whole = functools.partial(_whole, f, cuts)

    def partition(mesh, shapes, results):
        del results
        if mesh.empty:
            raise ValueError(
                "orthogonalise() cannot see how leaves lie on the devices: give them "
                "jax.NamedShardings, or write Stacking(sharding=None)."
            )
        costs.check(jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names))
        specs = [found_spec(x.sharding, x.shape, mesh) for x in shapes]
        work = _device_work(f, shapes, cuts, specs, costs, mesh.shape)
        lie = tuple(jax.NamedSharding(mesh, spec) for spec in specs)
        return mesh, work, lie, lie

    def kept(mesh, shapes, results):
        # For compilers before Shardy, which may know nothing yet of a leaf.
        del results
        everywhere = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return tuple(x.sharding or everywhere for x in shapes)

    asked = custom_partitioning(lambda *xs: whole(*xs))
    asked.def_partition(
        partition,
        infer_sharding_from_operands=kept,
        decode_shardings=False,
        sharding_rule=_elementwise,
    )

    return asked


def _elementwise(mesh, operands, results) -> str:
    """Return the rule that every result lies like its operand."""
    del mesh, results
    names = (f"a{i}" for i in range(10**9))
    terms = [" ".join(next(names) for _ in x.shape) for x in operands]
    return f"{', '.join(terms)} -> {', '.join(terms)}"
