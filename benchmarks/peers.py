"""What others do to a tree of gradients, every kernel cut as ours.

Torch runs in a process of its own (`torch_muon.py`), whose interpreter may be another
one: its threads and XLA's would else share a process, and JAX's environment needs none.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orthax import components

OPTAX = "optax.contrib.scale_by_muon()"
OPTAX_ROWS = "optax.contrib.scale_by_muon(JORDAN)"
OPTAX_EXACT = "optax.contrib.scale_by_muon(polar_express())"
SVD_PER_LEAF = "jnp.linalg.svd per leaf"
SVD_STACKED = "jnp.linalg.svd stacked"
QDWH_PER_LEAF = "jax.scipy.linalg.polar per leaf"
TORCH = "torch.optim.Muon"

_SERVER = pathlib.Path(__file__).with_name("torch_muon.py")


def optax_muon(
    params: Any,
    rule: components.Rule,
    coefficients: Sequence[Sequence[float]] | None = None,
    precision: str | None = None,
) -> optax.GradientTransformation:
    """Return optax's Muon with our axes for its dimension numbers.

    Vectors are left alone. With `coefficients`, those instead of its own five steps,
    and `precision` for its products, which on an accelerator are else rounded.

    Raises:
      ValueError: for a leaf of groups or blocks, which dimension numbers cannot say.
    """
    leaves = components.resolve(params, rule)
    for path, _, cut in leaves:
        if cut and (cut.groups != 1 or cut.blocks != 1):
            raise ValueError(f"optax's Muon cannot cut '{path}' as {cut}.")
    structure = jax.tree.structure(params)
    numbers = [
        optax.contrib.MuonDimensionNumbers(cut.rows, cut.columns)
        if cut
        else optax.MaskedNode()
        for _, _, cut in leaves
    ]
    steps = {}
    if coefficients is not None:
        rows = tuple(tuple(map(float, row)) for row in coefficients)
        steps = {"ns_coeffs": rows, "ns_steps": len(rows)}
    muon = optax.contrib.scale_by_muon(
        weight_dimension_numbers=jax.tree.unflatten(structure, numbers), **steps
    )
    mask = [cut is not None for _, _, cut in leaves]
    masked = optax.masked(muon, jax.tree.unflatten(structure, mask))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        with jax.default_matmul_precision(precision):
            return masked.update(updates, state, params)

    return optax.GradientTransformation(masked.init, update)


def per_leaf(
    factor: Callable[[jax.Array], jax.Array], rule: components.Rule
) -> optax.GradientTransformation:
    """Return `factor` of every leaf, a matrix or a stack of them, one by one."""

    def orthogonal(leaf: components.Leaf) -> jax.Array:
        if leaf.cut is None:
            return leaf.value
        stacks = [
            factor(x[0])[None] if len(x) == 1 else factor(x)
            for x in leaf.cut.fold(leaf.value)
        ]
        return leaf.cut.unfold(stacks, leaf.value.shape)

    def update(updates: Any, _: Any) -> Any:
        leaves = [orthogonal(leaf) for leaf in components.resolve(updates, rule)]
        return jax.tree.unflatten(jax.tree.structure(updates), leaves)

    return optax.stateless(update)


def stacked(
    factor: Callable[[jax.Array], jax.Array], rule: components.Rule
) -> optax.GradientTransformation:
    """Return `factor` of every matrix, those of equal shape in one batched call."""

    def update(updates: Any, _: Any) -> Any:
        leaves = components.resolve(updates, rule)
        folded = [leaf.cut.fold(leaf.value) if leaf.cut else () for leaf in leaves]
        groups: dict[Any, list[tuple[int, int]]] = {}
        for i, stacks in enumerate(folded):
            for j, x in enumerate(stacks):
                groups.setdefault((x.shape[1:], x.dtype), []).append((i, j))
        results = [list(stacks) for stacks in folded]
        for members in groups.values():
            whole = factor(jnp.concatenate([folded[i][j] for i, j in members]))
            start = 0
            for i, j in members:
                end = start + len(folded[i][j])
                results[i][j] = whole[start:end]
                start = end
        values = [
            leaf.cut.unfold(stacks, leaf.value.shape) if leaf.cut else leaf.value
            for leaf, stacks in zip(leaves, results, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(updates), values)

    return optax.stateless(update)


def svd(x: jax.Array) -> jax.Array:
    """Return `U V^T` of the singular value decomposition."""
    u, _, vh = jnp.linalg.svd(x, full_matrices=False)
    return u @ vh


def qdwh(x: jax.Array) -> jax.Array:
    """Return `jax.scipy.linalg.polar` of a matrix, or of every one of a stack.

    It refuses wide matrices, and batches.
    """
    if x.ndim > 2:
        return jax.lax.map(qdwh, x)
    if x.shape[0] < x.shape[1]:
        return qdwh(x.T).T
    return jax.scipy.linalg.polar(x, method="qdwh")[0]


def find_torch(python: str = sys.executable) -> str | None:
    """Return the version of the torch that an interpreter imports, if it has Muon."""
    program = "import torch; torch.optim.Muon; print(torch.__version__)"
    done = subprocess.run(
        [python, "-c", program], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


@contextlib.contextmanager
def torch_muon(
    matrices: Sequence[np.ndarray], python: str = sys.executable
) -> Iterator[tuple[list[np.ndarray], Callable[[], None]]]:
    """Yield what torch's Muon makes of some gradients, and a call of its `step`.

    The call returns when the step is done; the pipe between adds less than 0.1 ms.
    """
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{i:05d}" for i in range(len(matrices))]
        gradients, factors = (pathlib.Path(folder, f) for f in ("in.npz", "out.npz"))
        np.savez(gradients, **dict(zip(names, matrices, strict=True)))
        with subprocess.Popen(
            # -P: this folder is not where the server looks for modules.
            [python, "-P", str(_SERVER), str(gradients), str(factors), str(cores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server:

            def wait() -> None:
                if server.stdout.readline() != "done\n":
                    raise RuntimeError("torch's process ended: see what it printed.")

            def step() -> None:
                server.stdin.write("step\n")
                server.stdin.flush()
                wait()

            wait()
            with np.load(factors) as file:
                found = [file[name] for name in names]
            try:
                yield found, step
            finally:
                server.stdin.close()
                server.wait()
