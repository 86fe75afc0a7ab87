"""Show what will happen to every leaf of a tree, why, and at what cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import optax

from orthax import components, polar
from orthax.execution._costs import Factors
from orthax.execution._division import Constrained, Local, Shared, Split
from orthax.execution._explanation import Explanation, Row, Share, Stack
from orthax.execution._layout import layouts, named_layouts
from orthax.execution._plan import Plan, divisions_of, plan_of
from orthax.execution._stacking import Stacking
from orthax.internal.components import check_rule, decide_all
from orthax.internal.polar import check_method

_PLANS = {Local: "local", Shared: "stack", Split: "split", Constrained: "compiler"}


def explain(
    params: Any,
    rule: components.RuleOrTree = components.ByName(),
    *,
    method: polar.PolarMethod = polar.Auto(),
    stacking: Stacking = Stacking(),
    platform: str | None = None,
    shardings: Any = None,
) -> Explanation:
    """Show what will happen to every leaf of a tree, why, and at what cost.

    Args:
      params: parameters or gradients, or a tree of `jax.ShapeDtypeStruct`.
      rule: how leaves form matrices.
      method: how polar factors are computed.
      stacking: how matrices are batched and divided among devices.
      platform: `"cpu"`, `"gpu"` or `"tpu"`; default: JAX's default backend.
      shardings: one for all leaves, or a tree like `params`, of `jax.NamedSharding`s
        (an `AbstractMesh` will do) or of `jax.P`s for the surrounding mesh; default:
        those of `params`. `stacking.shardings` take precedence.

    Returns:
      A row for each leaf, and one for each batch that `orthogonalise` would form on one
      device, or for each way in which it would divide leaves among the devices of a
      mesh. Prints as two tables, 100 characters wide, and in notebooks as HTML. A leaf
      that the rule cannot decide is a row with the error that `orthogonalise` would
      raise. Operations are an upper bound where the method decides at run time. Names
      and patterns of the rule that match no leaf are listed: they are probably typos.

    Raises:
      TypeError: if `rule` is not a rule, `method` not a polar method, a leaf not an
        array, or a sharding something else.
      ValueError: if `stacking.max_bytes` is smaller than one matrix, or if shardings
        are on different meshes, do not fit their leaf, or have no mesh.

    Example:
      >>> import jax.numpy as jnp
      >>> import orthax
      >>> params = {
      ...     "conv": {"kernel": jnp.ones((3, 3, 8, 16)), "bias": jnp.ones(16)},
      ...     "embed": {"embedding": jnp.ones((100, 8))},
      ... }
      >>> print(orthax.explain(params))
      leaf             shape          rows   columns  matrices       why
      conv/bias        (16,)          -      -        -              rank below 2
      conv/kernel      (3, 3, 8, 16)  0,1,2  3        1 x (72 x 16)  convolution kernel
      embed/embedding  (100, 8)       -      -        -              'embedding'...
      <BLANKLINE>
      1 of 3 leaves cut into 1 matrices.
      <BLANKLINE>
      Batches on cpu, by DWH(restart=True, polish=True):
      <BLANKLINE>
      batch          at once  leaves  dtype    MFLOP  MiB
      1 x (72 x 16)  1        1       float32  0.213  0.00439
      one update                               0.213  0.00439
    """
    method, rule = check_method(method), check_rule(rule)
    _check_call(params)
    platform = jax.default_backend() if platform is None else platform
    method = method.on(platform)
    leaves = decide_all(params, rule)
    if shardings is None:
        shardings = [getattr(leaf.value, "sharding", None) for leaf in leaves]
    else:
        shardings = _given(params, shardings)
    pairs = zip(leaves, shardings, strict=True)
    cut = [(x, s) for x, s in pairs if x.decision and x.decision.cut]
    plan = _plan([x for x, _ in cut], [s for _, s in cut], method, stacking, platform)
    rows = tuple(map(_row, leaves))
    paths = [leaf.path for leaf, _ in cut]
    unused = getattr(rule, "unused", lambda paths: ())([row.path for row in rows])
    return Explanation(
        rows,
        tuple(_stacks(plan, paths)),
        tuple(_shares(plan, [leaf for leaf, _ in cut])),
        method,
        platform,
        unused,
    )


def _plan(
    leaves: Sequence[Any],
    shardings: Sequence[Any],
    method: polar.PolarMethod,
    stacking: Stacking,
    platform: str,
) -> Plan:
    """Return the plan of what `orthogonalise` would do with leaves that are cut."""
    given = [components.Leaf(x.path, x.value, x.decision.cut) for x in leaves]
    named = [s for s in shardings if isinstance(s, jax.NamedSharding)]
    mesh = named[0].mesh.abstract_mesh if named else jax.sharding.get_abstract_mesh()
    known = stacking.known(given, mesh)
    laid = named_layouts(given, known or shardings)
    work, unseen = Factors(method), None
    if laid is None or stacking.sharding is None:
        cuts = [leaf.cut for leaf in given]
        plain = [jax.sharding.PartitionSpec()] * len(given)
        laid = layouts([leaf.value for leaf in given], cuts, plain, {})
    else:
        mesh = next(s for s in known or named).mesh
        mesh = jax.sharding.AbstractMesh(
            mesh.axis_sizes, mesh.axis_names, axis_types=mesh.axis_types
        )
        stacking.check(mesh)
        automatic = {*mesh.axis_types} == {jax.sharding.AxisType.Auto}
        unseen = mesh if automatic and known is None else None
    divisions = divisions_of(laid, work.on(platform), stacking, unseen)
    return plan_of(divisions, work, stacking, platform)


def _check_call(params: Any) -> None:
    if isinstance(params, optax.GradientTransformation):
        raise TypeError(
            "`params` must be parameters or gradients, got a gradient transformation: "
            "use explain(params, rule, method=...) with the transformation's rule and "
            "method."
        )


def _given(params: Any, shardings: Any) -> list[Any]:
    """Return the sharding of every leaf, with a mesh where it is a spec alone."""
    kinds = jax.sharding.Sharding | jax.sharding.PartitionSpec
    structure = jax.tree.structure(params)
    if isinstance(shardings, kinds):
        found = [shardings] * structure.num_leaves
    else:
        found = structure.flatten_up_to(shardings)
    mesh = jax.sharding.get_abstract_mesh()
    for i, sharding in enumerate(found):
        if sharding is not None and not isinstance(sharding, kinds):
            raise TypeError(
                "`shardings` must be jax.NamedShardings or jax.Ps, got "
                f"{sharding!r} of type {type(sharding).__name__}."
            )
        if isinstance(sharding, jax.sharding.PartitionSpec):
            if mesh.empty:
                raise ValueError(
                    f"`shardings` has {sharding} and no mesh: give jax.NamedSharding("
                    "mesh, spec), or surround the call by jax.set_mesh(mesh)."
                )
            found[i] = jax.NamedSharding(mesh, sharding)
    return found


def _shares(plan: Plan, leaves: Sequence[Any]) -> Iterator[Share]:
    """Yield how leaves are divided among the devices of a mesh, if there is one."""
    for division in plan.divisions:
        if not division.layouts[0].sizes:
            return
        counts: dict[tuple[int, int], int] = {}
        for leaf in (leaves[i] for i in division.members):
            for b, m, n in leaf.decision.cut.matrices(leaf.value.shape):
                counts[m, n] = counts.get((m, n), 0) + b
        yield Share(
            _PLANS[type(division)],
            tuple(leaves[i].path for i in division.members),
            tuple((b, m, n) for (m, n), b in counts.items()),
            division.axes,
            division.collectives,
            division.bytes,
            division.flops,
            division.seconds,
        )


def _stacks(plan: Plan, paths: Sequence[str]) -> Iterator[Stack]:
    """Yield the batches that a device works on, but for matrices that it shares."""
    for batch in plan.batches:
        b, m, n = batch.shape
        owners = [i for stack in batch.members for i in plan.owners[stack]]
        dtype = plan.dtypes[batch.members[0]]
        yield Stack(
            batch.shape,
            tuple(dict.fromkeys(paths[i] for i in owners)),
            dtype.name,
            batch.at_once,
            b * plan.work.flops(m, n),
            b * m * n * dtype.itemsize,
        )


def _row(leaf: Any) -> Row:
    shape = tuple(getattr(leaf.value, "shape", ()))
    if leaf.error:
        reason, guess, cut = "AMBIGUOUS", False, None
    else:
        cut, reason, guess = leaf.decision
    if cut is None:
        return Row(leaf.path, shape, None, None, None, (), reason, guess, leaf.error)
    used = cut.rows + cut.columns
    batch = tuple(axis for axis in range(len(shape)) if axis not in used)
    return Row(
        leaf.path,
        shape,
        cut.rows,
        cut.columns,
        batch,
        cut.matrices(shape),
        reason,
        guess,
        None,
    )
