"""Which stacks are worked on together, and that nothing shows but time and memory."""

import dataclasses
import itertools
import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from matrices import factor, with_spectrum

import orthax
from orthax import components, polar
from orthax.execution import Stacking, Work
from orthax.execution._batches import Limits, batches_of, call, limits_of
from orthax.internal.execution import Factors

SHAPE = jax.ShapeDtypeStruct
cases = pytest.mark.parametrize("seed", range(80))


def drawn(seed):
    """Return stacks of random shapes, a random way to join them, and their batches."""
    rng = np.random.default_rng(seed)
    how = {
        "commutes_with_transpose": bool(rng.integers(2)),
        "join_bytes": [None, 0, 96, 200][rng.integers(4)],
        "pad_bytes": [0, 64, 300, 2**30][rng.integers(4)],
        "batch_bytes": [None, 1, 400][rng.integers(3)],
        "loop_from": int(rng.integers(2, 6)),
    }
    stacks = []
    for _ in range(rng.integers(1, 16)):
        sides = map(int, rng.choice([1, 2, 3, 4, 6, 8, 12], 2))
        dtype = rng.choice(["float32", "bfloat16", "complex64"])
        stacks.append(SHAPE((int(rng.integers(1, 4)), *sides), jnp.dtype(dtype)))
    return stacks, how, batched(stacks, **how)


def batched(stacks, f=abs, *, commutes_with_transpose=False, max_bytes=None, **limits):
    """Return the batches of stacks."""
    work = Work(
        f, commutes_with_transpose=commutes_with_transpose, zeros_for_zeros=True
    )
    return batches_of(stacks, work, Limits(**limits), max_bytes)


def each(f, stacks, *, in_turn=False, **how):
    """Call a function on every batch of stacks."""
    return call(f, batched(stacks, **how), in_turn, stacks)


def joins(stack, how):
    each = math.prod(stack.shape[1:]) * stack.dtype.itemsize
    return how["join_bytes"] is None or each <= how["join_bytes"]


def kind(stack, how):
    """Return what matrices that may share a stack have in common."""
    _, m, n = stack.shape
    return stack.dtype, m > n and not how["commutes_with_transpose"], min(m, n)


def oriented(stacks, group):
    """Return every member's `(b, m, n)` as it stands in the group."""
    for i, turn in zip(group.members, group.transposed, strict=True):
        b, m, n = stacks[i].shape
        yield (b, n, m) if turn else (b, m, n)


@cases
def test_every_stack_is_in_one_group_and_fits_it(seed):
    stacks, how, groups = drawn(seed)
    places = [i for group in groups for i in group.members]
    assert sorted(places) == [*range(len(stacks))]
    for group in groups:
        shapes = [*oriented(stacks, group)]
        assert group.shape[0] == sum(b for b, _, _ in shapes)
        assert len({kind(stacks[i], how) for i in group.members}) == 1
        # Padded on the long side alone, and no longer than the longest.
        assert {min(m, n) for _, m, n in shapes} == {min(group.shape[1:])}
        assert max((m, n) for _, m, n in shapes) == group.shape[1:]
        assert all(m <= group.shape[1] and n <= group.shape[2] for _, m, n in shapes)
        for i, turn in zip(group.members, group.transposed, strict=True):
            _, m, n = stacks[i].shape
            joined = joins(stacks[i], how)
            assert group.joined == joined
            other = (m > n) != (group.shape[1] > group.shape[2]) and m != n
            assert turn == other
            assert not turn or (how["commutes_with_transpose"] and joined)
            assert joined or (m, n) == group.shape[1:]
        turned = sum(
            stacks[i].shape[0]
            for i in itertools.compress(group.members, group.transposed)
        )
        square = sum(b for b, m, n in shapes if m == n)
        assert 2 * turned <= group.shape[0] - square


@cases
def test_padding_keeps_to_its_limit_and_equal_shapes_share(seed):
    stacks, how, groups = drawn(seed)
    homes = {}
    for at, group in enumerate(groups):
        itemsize = stacks[group.members[0]].dtype.itemsize
        padding = {}
        for i, (b, m, n) in zip(group.members, oriented(stacks, group), strict=True):
            missing = b * (math.prod(group.shape[1:]) - m * n) * itemsize
            padding[m, n] = padding.get((m, n), 0) + missing
            if joins(stacks[i], how):
                homes.setdefault((kind(stacks[i], how), m, n), set()).add(at)
        assert max(padding.values()) <= how["pad_bytes"]
    assert all(len(found) == 1 for found in homes.values())
    if how["pad_bytes"] == 2**30:
        joined = sum(group.joined for group in groups)
        assert joined == len({key for key, _, _ in homes})


@cases
def test_how_many_matrices_at_once(seed):
    """Large ones one at a time where a loop shares their program, else as they are."""
    stacks, how, groups = drawn(seed)
    equal = {}
    for x in stacks:
        equal[x.shape[1:], x.dtype] = equal.get((x.shape[1:], x.dtype), 0) + x.shape[0]
    for b, m, n in {group.shape for group in groups}:
        for group in (g for g in groups if g.shape == (b, m, n)):
            first = stacks[group.members[0]]
            wish = how["batch_bytes"]
            if group.joined:
                each = m * n * first.dtype.itemsize
                fits = b if wish is None else min(b, max(1, wish // each))
                assert group.at_once == fits
            elif equal[first.shape[1:], first.dtype] >= how["loop_from"]:
                assert group.at_once == 1
                assert b == equal[first.shape[1:], first.dtype]
            else:
                assert len(group.members) == 1
                assert group.at_once == b


@cases
def test_groups_do_not_depend_on_the_order(seed):
    stacks, how, groups = drawn(seed)
    order = np.random.default_rng(seed).permutation(len(stacks))
    shuffled = batched([stacks[i] for i in order], **how)

    def partition(groups, names):
        return {(frozenset(names[i] for i in g.members), *g[2:]) for g in groups}

    assert partition(groups, range(len(stacks))) == partition(shuffled, order)


def test_groups_of_an_example():
    stacks = [SHAPE((1, *s), jnp.float32) for s in [(4, 6), (6, 4), (4, 9), (4, 4)]]
    members = lambda **how: sorted(  # noqa: E731
        sorted(group.members) for group in batched(stacks, **how)
    )
    assert members() == [[0], [1], [2], [3]]
    assert members(commutes_with_transpose=True) == [[0, 1], [2], [3]]
    assert members(pad_bytes=79) == [[0, 2], [1], [3]] != members(pad_bytes=47)
    assert members(pad_bytes=80) == [[0, 2, 3], [1]]
    assert members(pad_bytes=80, commutes_with_transpose=True, join_bytes=96) == [
        [0, 1, 3],
        [2],
    ]


def by_norm(x, xp=jnp):
    """Tell matrices apart, and zeros not at all."""
    norm = xp.sqrt(xp.sum(xp.abs(x) ** 2, axis=(1, 2), keepdims=True))
    return (x * 2 + x / (1 + norm)).astype(x.dtype)


@pytest.mark.parametrize("seed", range(14))
def test_each_puts_everything_back(seed):
    shapes, how, _ = drawn(seed)
    rng = np.random.default_rng(seed)
    stacks = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in shapes]
    largest = max(x[:1].nbytes for x in stacks)
    limit = int(largest * rng.uniform(1, 3)) if seed % 2 else None
    calls = []

    def f(x):
        calls.append((x.shape[0] * x[:1].nbytes, x[:1].nbytes))
        return by_norm(x)

    how["batch_bytes"] = largest
    how = how | {"max_bytes": limit, "in_turn": True}
    out = jax.jit(lambda stacks: each(f, stacks, **how))(stacks)
    for x, y in zip(stacks, out, strict=True):
        assert y.dtype == x.dtype
        assert y.shape == x.shape
        allowed = 0.1 if x.dtype == jnp.bfloat16 else 1e-5
        x, y = np.asarray(x, np.complex128), np.asarray(y, np.complex128)
        assert np.abs(y - by_norm(x, np)).max() < allowed
    assert limit is None or max(whole for whole, _ in calls) <= limit
    # A wish that one matrix may exceed, and that is none for what is not joined.
    if how["join_bytes"] is None:
        assert all(whole <= max(largest, one) for whole, one in calls)


def test_each_hands_over_padding_and_takes_it_away():
    seen = []
    stacks = [jnp.ones((2, 3, 4)), jnp.ones((1, 9, 3))]
    how = {"commutes_with_transpose": True, "pad_bytes": 2**10}
    out = each(lambda x: seen.append(x) or x + 1, stacks, **how)
    assert [x.shape for x in seen] == [(3, 3, 9)]
    assert float(seen[0].sum()) == 2 * 12 + 27
    assert [x.shape for x in out] == [(2, 3, 4), (1, 9, 3)]
    assert all((x == 2).all() for x in out)


def test_what_is_not_finite_does_not_reach_the_next_group():
    stacks = [jnp.full((1, 2, 5), jnp.nan), jnp.ones((1, 3, 4)), jnp.ones((2, 9, 9))]
    stacks += [jnp.ones((1, 9, 9)), jnp.full((1, 9, 9), jnp.inf)]
    how = {"join_bytes": 0, "in_turn": True}
    out = jax.jit(lambda stacks: each(by_norm, stacks, **how))(stacks)
    finite = [bool(np.isfinite(x).all()) for x in out]
    assert finite == [False, True, True, True, False]


def test_large_matrices_are_replaced_where_they_are():
    """Each in its own place, also in stacks of several, by one program."""
    rng = np.random.default_rng(0)
    shapes = [(1, 6, 5), (3, 6, 5), (2, 5, 6), (1, 6, 5), (1, 6, 4)]
    stacks = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    seen = []

    def f(x):
        seen.append(x.shape)
        return by_norm(x)

    out = each(f, stacks, join_bytes=0, loop_from=3, in_turn=True)
    assert {*seen} == {(1, 6, 4), (2, 5, 6), (1, 6, 5)}
    for x, y in zip(stacks, out, strict=True):
        assert np.abs(by_norm(np.asarray(x, float), np) - y).max() < 1e-6


@pytest.mark.parametrize("how", [{}, {"join_bytes": 0, "in_turn": True}])
def test_bad_calls_of_each(how):
    stacks = [jnp.ones((3, 4, 6)), jnp.ones((2, 5, 5))]
    with pytest.raises(ValueError, match=r"=99\) is smaller than one 5 x 5 .* 100 b"):
        each(lambda x: x, stacks, max_bytes=99, **how)
    for limit in (None, 100):
        with pytest.raises(ValueError, match="must keep the shape"):
            each(lambda x: x[:, :2], stacks, max_bytes=limit, **how)
        with pytest.raises(ValueError, match="must keep the shape"):
            each(lambda x: x.mT, stacks[:1], max_bytes=limit, **how)


def kernels(*shapes):
    key = jax.random.key(0)
    return [{"kernel": jax.random.normal(key, shape)} for shape in shapes]


def update(grads, method=polar.Auto(), stacking=Stacking()):
    tx = orthax.orthogonalise(method, stacking=stacking)
    return jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0])(grads)


def test_orthogonalise_in_pieces_equals_the_whole():
    grads = kernels((9, 20), (20, 9), (9, 24), (9, 20), (300, 220))
    whole = update(grads)
    for limit, count in ((300 * 220 * 4, 5), (1200, 4)):
        pieces = update(grads[:count], stacking=Stacking(limit))
        assert len(pieces) == count
        for x, o, alone in zip(grads, pieces, whole, strict=False):
            x, o, alone = x["kernel"], o["kernel"], alone["kernel"]
            assert np.abs(o - alone).max() < 1e-5
            assert np.abs(o - factor(x)).max() < 1e-4
    half = jax.tree.map(jnp.bfloat16, kernels((8, 20)))
    with pytest.raises(ValueError, match="one 8 x 20 matrix of dtype float32"):
        update(half, stacking=Stacking(8 * 20 * 2))


FILLING = [polar.QDWH(), polar.SVD(null_space="complete")]
OTHERS = [polar.GramEigh(), polar.DWH(), polar.NewtonSchulz()]


@dataclasses.dataclass(frozen=True)
class Own:
    """A user's method, which writes down what it is given."""

    seen: tuple[list] = dataclasses.field(default=(), hash=False)

    def factor(self, x):
        self.seen[0].append(x.shape)
        return x

    def flops(self, m, n):
        return 0.0


class Padded(Own):
    fills_null_space = False


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu", "abacus"])
def test_who_may_be_padded(platform):
    for method in (*FILLING, Own()):
        assert not Factors(method).on(platform).zeros_for_zeros
    for method in (*OTHERS, Padded()):
        assert Factors(method).on(platform).zeros_for_zeros
    same = limits_of(platform) == limits_of("gpu")
    assert same == (platform not in ("cpu", "tpu"))


def test_methods_get_matrices_padded_only_where_they_say_so():
    grads = kernels((4, 6), (8, 4), (4, 9))
    plain, padded = Own(([],)), Padded(([],))
    for method in (plain, padded):
        update(grads, method)
    assert {*plain.seen[0]} == {(1, 4, 6), (1, 8, 4), (1, 4, 9)}
    assert {*padded.seen[0]} == {(3, 4, 9)}


@pytest.mark.parametrize("method", FILLING, ids=repr)
def test_what_fills_the_null_space_fills_that_of_the_leaf(method):
    """Padded, it would fill columns that are cut away."""
    shapes = [(4, 6), (8, 4), (4, 9)]
    grads = [{"kernel": jnp.float32(with_spectrum(*s, [1.0]))} for s in shapes]
    for x in jax.tree.leaves(update(grads, method)):
        x = np.asarray(x if len(x) < len(x.T) else x.T)
        assert np.abs(x @ x.T - np.eye(4)).max() < 1e-4


def temporary(*shapes, **options):
    """Return the temporary memory of one update, over the bytes of its matrices."""
    grads = [{"kernel": SHAPE(shape, jnp.float32)} for shape in shapes]
    stacked = components.ByName(stacked=("0",)) if len(shapes[0]) > 2 else None
    tx = orthax.orthogonalise(rule=stacked or components.ByName(), **options)
    program = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0])
    memory = program.lower(grads).compile().memory_analysis()
    return memory.temp_size_in_bytes / sum(4 * math.prod(shape) for shape in shapes)


@pytest.mark.parametrize("same", [1, 3, 6])
def test_temporary_memory_of_large_matrices(same):
    """One after another: with all at once it would be three times as much."""
    shapes = [(256, 2304 + 64 * i) for i in range(6 // same)] * same
    assert temporary(*shapes, (2304, 256), (256, 1152)) <= 1


def test_temporary_memory_of_a_stack_of_large_matrices():
    assert temporary((16, 256, 2304)) <= 1
    assert temporary((4, 512, 512)) <= 3


def test_max_bytes_saves_memory():
    one = 96 * 384 * 4
    limits = (None, 4 * one, 2 * one)
    used = [temporary((16, 96, 384), stacking=Stacking(limit)) for limit in limits]
    assert used[0] > 1.5 * used[1] > 2 * used[2]


def test_one_artefact_for_every_platform():
    tx = orthax.orthogonalise()
    grads = kernels((6, 20), (20, 6), (6, 24), (104, 220))
    step = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0])
    export = lambda *on: jax.export.export(step, platforms=on)(grads)  # noqa: E731
    for platform in ("cuda", "tpu"):
        text = export(platform).mlir_module()
        assert "dot_general" in text
        for foreign in ("lapack", "cholesky", "custom_call"):
            assert foreign not in text
    assert "lapack" in export("cpu").mlir_module()
    artefact = export("cpu", "cuda", "tpu")
    assert artefact.platforms == ("cpu", "cuda", "tpu")
    out, expected = artefact.call(grads), step(grads)
    error = jax.tree.map(lambda x, y: np.abs(x - y).max(), out, expected)
    assert max(jax.tree.leaves(error)) < 1e-6
