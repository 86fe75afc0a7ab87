"""The library against its thirty lines of reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import orthax
from examples import reference
from orthax import components, polar

SHAPES = {
    "dense": {"kernel": (12, 7), "bias": (7,)},
    "conv": {"kernel": (3, 3, 4, 6)},
    "attention": {"query": {"kernel": (8, 2, 4)}, "out": {"kernel": (2, 4, 8)}},
    "embed": {"embedding": (20, 8)},
    "layers": {"mlp": {"kernel": (3, 8, 16)}},
}
RULES = {
    "names": components.ByName(stacked=("layers",)),
    "heads": components.ByName(stacked=("layers",), attention="per_head"),
    "blocks": components.ByPath(
        [
            ("dense", components.Matricisation((0,), (1,), blocks=(3, 4))),
            ("conv", components.Matricisation((0, 1, 2), (3,), groups=2)),
            ("", None),
        ]
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_the_library_gives_what_the_reference_gives(name, x64):
    rng = np.random.default_rng(0)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    draw = lambda shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    grads = jax.tree.map(draw, SHAPES, is_leaf=is_shape)
    tx, plain = (
        orthax.orthogonalise(polar.SVD(), rule=RULES[name]),
        reference.orthogonalise(RULES[name]),
    )
    ours, theirs = (t.update(grads, t.init(grads))[0] for t in (tx, plain))
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert np.abs(one - other).max() < 1e-12
    assert np.abs(ours["dense"]["kernel"] - grads["dense"]["kernel"]).max() > 0.1
