"""What `explain` says an update costs: stacks, operations and bytes, by hand."""

import jax
import jax.numpy as jnp
import pytest

import orthax
from orthax import components, polar

TREE = {
    "a": {"kernel": jax.ShapeDtypeStruct((3, 3, 16, 64), "float32")},  # 144 x 64
    "b": {"kernel": jax.ShapeDtypeStruct((64, 100), "bfloat16")},
    "c": {"kernel": jax.ShapeDtypeStruct((512, 1024), "float32")},
    "d": {"kernel": jax.ShapeDtypeStruct((512, 1024), "float32")},
    "e": {"bias": jax.ShapeDtypeStruct((64,), "float32")},
}


def shapes(found):
    return {stack.shape: stack.paths for stack in found.stacks}


def test_on_cpu_small_matrices_are_padded_together_and_large_ones_stay_alone():
    found = orthax.explain(TREE, platform="cpu")
    assert found.platform == "cpu"
    assert found.method == polar.DWH()
    small = {(2, 64, 144): ("a/kernel", "b/kernel")}
    assert shapes(found).keys() == {*small, (1, 512, 1024)}
    assert shapes(found)[2, 64, 144] == small[2, 64, 144]
    assert [s.paths for s in found.stacks if s.shape == (1, 512, 1024)] == [
        ("c/kernel",),
        ("d/kernel",),
    ]
    more = TREE | {f"d{i}": TREE["d"] for i in range(2)}
    (stack,) = (s for s in orthax.explain(more).stacks if s.shape[1] == 512)
    assert stack.shape == (4, 512, 1024)
    assert stack.at_once == 1
    (stack,) = (s for s in found.stacks if s.shape[1] == 64)
    assert stack.bytes == 2 * 64 * 144 * 4
    assert stack.dtype == "float32"
    # Two Gram matrices and two products (8 k^2 l), two inverses and four products.
    assert stack.flops == pytest.approx(
        2 * (8 * 64**2 * 144 + (4 + 8) * 64**3), rel=1e-12
    )


@pytest.mark.parametrize("platform", ["gpu", "tpu", "something new"])
def test_on_accelerators_equal_matrices_share_a_stack(platform):
    found = orthax.explain(TREE, platform=platform)
    assert found.method == polar.NewtonSchulz()
    assert shapes(found) == {
        (2, 64, 144): ("a/kernel", "b/kernel"),
        (2, 512, 1024): ("c/kernel", "d/kernel"),
    }


def test_a_method_that_fills_the_null_space_is_not_padded():
    found = orthax.explain(TREE, method=polar.QDWH(), platform="gpu")
    assert (1, 64, 144) in shapes(found)
    assert (1, 64, 100) in shapes(found)


def test_the_table_adds_up():
    found = orthax.explain(TREE, platform="gpu")
    *_, last = str(found).splitlines()
    flops = sum(stack.flops for stack in found.stacks)
    assert last.split()[:2] == ["one", "update"]
    assert float(last.split()[2]) == pytest.approx(flops / 1e6, rel=1e-2)
    assert float(last.split()[3]) == pytest.approx(
        sum(stack.bytes for stack in found.stacks) / 2**20, rel=1e-2
    )
    assert "by NewtonSchulz(" in str(found)


@pytest.mark.parametrize("same", [1, 4])
def test_stacks_are_what_orthogonalise_works_on(monkeypatch, same):
    """Every stack that the default method of this platform gets, and no other."""
    tree = TREE | {f"d{i}": TREE["d"] for i in range(same)}
    seen = []
    factor = polar.DWH.factor
    monkeypatch.setattr(
        polar.DWH, "factor", lambda self, x: seen.append(x.shape) or factor(self, x)
    )
    tx = orthax.orthogonalise()
    jax.eval_shape(lambda g: tx.update(g, tx.init(g))[0], tree)
    stacks = orthax.explain(tree, platform="cpu").stacks
    assert {*seen} == {(s.at_once, *s.shape[1:]) for s in stacks}


def test_a_tree_without_matrices_costs_nothing():
    found = orthax.explain({"bias": jnp.ones(3)})
    assert found.stacks == ()
    assert "Worked on" not in str(found)


def test_the_rule_and_the_method_are_checked():
    with pytest.raises(TypeError, match="polar method"):
        orthax.explain(TREE, method="svd")
    ambiguous = {"conv": {"kernel": jnp.ones((3, 4, 5))}}
    found = orthax.explain(ambiguous, components.ByName())
    assert found.rows[0].error
    assert found.stacks == ()
