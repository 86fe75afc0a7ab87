"""Use the installed package once, with nothing but what it depends on."""

import importlib.util
import sys
from pathlib import Path

import jax.numpy as jnp
import optax

import orthax

if not Path(orthax.__file__).is_relative_to(sys.prefix):
    sys.exit(f"{orthax.__file__} is not the installed package")
if importlib.util.find_spec("flax") is not None:
    sys.exit("flax was installed, which the package does not need")
tx = optax.chain(orthax.orthogonalise(), optax.sgd(0.1))
params = {"kernel": jnp.eye(3, 2) * 7, "bias": jnp.ones(2)}
updates, _ = tx.update(params, tx.init(params), params)
print(orthax.explain(params))
if not jnp.allclose(updates["kernel"], -0.1 * jnp.eye(3, 2), atol=1e-5):
    sys.exit(f"the update is wrong: {updates}")
