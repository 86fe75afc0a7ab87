"""Compilation in haste, for tests of what is computed rather than how fast."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def compiled(f, **kwargs):
    """Return `jax.jit(f)` with options that cut compile time to a third."""
    return jax.jit(f, compiler_options=_quick(), **kwargs)


def hasty_jit():
    """Return `jax.jit` with these options, to be put in its place."""
    return functools.partial(jax.jit, compiler_options=_quick())


@functools.cache
def _quick() -> dict[str, Any] | None:
    """Return the options, or None where this jaxlib does not know them."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_cpu_parallel_codegen_split_count": 1,
        "xla_cpu_use_fusion_emitters": False,
    }
    try:
        jax.jit(jnp.sin, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:
        return None
    return options
