"""What the samples of a layer's input are: rows of a dense layer, patches of a conv."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from orthax._linalg import replicated
from orthax.internal.decorrelation import (
    DecorrelationRule,
    DecorrelationState,
    apply_decorrelation,
)
from orthax.nn._folding import folded


@dataclasses.dataclass(frozen=True)
class Rows:
    """The samples of a dense layer are the vectors along the last axis."""

    features: int

    def check(self, x: jax.Array) -> None:
        """Raise unless `x` is an input of the layer."""
        _check_input(x, ("*batch", str(self.features)))

    def count(self, shape: tuple[int, ...]) -> int:
        """Return how many samples an input of that shape has."""
        return math.prod(shape[:-1])

    def mean(self, x: jax.Array) -> jax.Array:
        """Return the mean of the samples, shape (features,)."""
        return jnp.mean(x, axis=tuple(range(x.ndim - 1)))

    def take(self, x: jax.Array, index: jax.Array | None) -> jax.Array:
        """Return samples by number, or all, shape (n, features)."""
        x = replicated(x).reshape(-1, self.features)
        return x if index is None else x[index]

    def run(
        self,
        layer: nnx.Module,
        rule: DecorrelationRule,
        state: DecorrelationState,
        x: jax.Array,
        mean: jax.Array,
        **kwargs: Any,
    ) -> jax.Array:
        """Return the layer's output for the decorrelated input."""
        return layer(apply_decorrelation(state, x, rule, mean=mean), **kwargs)


@dataclasses.dataclass(frozen=True)
class Patches:
    """The samples of a convolution are the patches that its kernel meets.

    A patch has `prod(taps) * channels` features, the channels last, as the kernel
    reshaped to a matrix has rows. What padding adds belongs to it.
    """

    channels: int
    taps: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]

    @property
    def features(self) -> int:
        """The features of a patch."""
        return math.prod(self.taps) * self.channels

    def check(self, x: jax.Array) -> None:
        """Raise unless `x` is an input of the layer."""
        axes = (f"axis_{i}" for i in range(len(self.taps)))
        _check_input(x, ("*batch", *axes, str(self.channels)))

    def count(self, shape: tuple[int, ...]) -> int:
        """Return how many samples an input of that shape has."""
        images = math.prod(shape[: -len(self.taps) - 1])
        return images * math.prod(len(table) for table in self._tables(shape))

    def mean(self, x: jax.Array) -> jax.Array:
        """Return the mean of the patches: of the patches of the mean image."""
        image = jnp.mean(self._images(x), axis=0, keepdims=True)
        return jnp.mean(self.take(image, None), axis=0)

    def take(self, x: jax.Array, index: jax.Array | None) -> jax.Array:
        """Return patches by number, or all, shape (n, features).

        Only these are gathered: entries of the patch, the channels in one piece.
        """
        tables = self._tables(x.shape)
        x = self._images(replicated(x))
        if index is None:
            index = jnp.arange(self.count(x.shape))
        counts = (len(x), *map(len, tables))
        image, *positions = jnp.unravel_index(index, counts)
        nd = len(tables)
        where = [image.reshape(-1, *(1,) * nd)]
        for i, (table, position) in enumerate(zip(tables, positions, strict=True)):
            shape = [-1, *(1,) * nd]
            shape[i + 1] = self.taps[i]
            where.append(jnp.asarray(table)[position].reshape(shape))
        patches = x.at[tuple(where)].get(mode="fill", fill_value=0)
        return patches.reshape(-1, self.features)

    def run(
        self,
        layer: nnx.Module,
        rule: DecorrelationRule,
        state: DecorrelationState,
        x: jax.Array,
        mean: jax.Array,
        **kwargs: Any,
    ) -> jax.Array:
        """Return the layer's output: one convolution, with R in its kernel."""
        return folded(layer, rule, state, mean)(x, **kwargs)

    def _images(self, x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[-len(self.taps) - 1 :])

    def _tables(self, shape: tuple[int, ...]) -> list[np.ndarray]:
        """Return, for each spatial axis, the inputs that every output position reads.

        Of shape (positions, taps); an index beyond the axis stands for a zero.
        """
        spatial = shape[-len(self.taps) - 1 : -1]
        reach = [(k - 1) * d + 1 for k, d in zip(self.taps, self.dilation, strict=True)]
        pads, mode = self._pads(spatial, reach)
        tables = []
        for size, k, s, d, r, (low, high) in zip(
            spatial, self.taps, self.strides, self.dilation, reach, pads, strict=True
        ):
            positions = max(0, (size + low + high - r) // s + 1)
            read = s * np.arange(positions)[:, None] + d * np.arange(k) - low
            if mode is None:
                read = np.where((read >= 0) & (read < size), read, size)
            else:
                read = np.pad(np.arange(size), (low, high), mode=mode)[read + low]
            tables.append(read)
        return tables

    def _pads(
        self, spatial: Sequence[int], reach: Sequence[int]
    ) -> tuple[Sequence[tuple[int, int]], str | None]:
        """Return the padding of each spatial axis, and numpy's mode unless zeros."""
        modes = {"CIRCULAR": "wrap", "REFLECT": "reflect"}
        if self.padding in modes:
            return [((r - 1) // 2, r // 2) for r in reach], modes[self.padding]
        if self.padding == "CAUSAL":
            return [(reach[0] - 1, 0)], None
        if isinstance(self.padding, str):
            pads = jax.lax.padtype_to_pads(spatial, reach, self.strides, self.padding)
            return pads, None
        return self.padding, None


def samples_of(layer: nnx.Module) -> Rows | Patches:
    """Return what the samples of a layer's input are, or raise if it has none."""
    if not isinstance(layer, nnx.Linear | nnx.Conv):
        raise TypeError(
            "`layer` must be an nnx.Linear or an nnx.Conv, got "
            f"{type(layer).__name__}: only the input of these is decorrelated."
        )
    taps = layer.kernel_size if isinstance(layer, nnx.Conv) else ()
    rank = len(layer.kernel.shape)
    if rank != len(taps) + 2:
        raise ValueError(
            f"`layer` has a kernel of rank {rank}: it was made under nnx.vmap or "
            "nnx.scan. Decorrelate it there, in the function that is mapped."
        )
    return _patches_of(layer) if taps else Rows(layer.in_features)


def _patches_of(layer: nnx.Conv) -> Patches:
    if type(layer).__call__ is not nnx.Conv.__call__:
        raise ValueError(
            f"`layer` is a {type(layer).__name__} with a `__call__` of its own: that R "
            "can be folded into its kernel is known of nnx.Conv alone."
        )
    nd = len(layer.kernel_size)
    if layer.feature_group_count != 1 or any(
        d != 1 for d in _each(layer.input_dilation, nd)
    ):
        raise ValueError(
            "`layer` is a convolution with feature_group_count="
            f"{layer.feature_group_count} and input_dilation={layer.input_dilation}: "
            "groups, and dilated inputs, are not decorrelated; leave it as it is."
        )
    return Patches(
        layer.in_features,
        tuple(layer.kernel_size),
        _each(layer.strides, nd),
        _each(layer.kernel_dilation, nd),
        _padding(layer.padding, nd),
    )


def _check_input(x: jax.Array, shape: tuple[str, ...]) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating, got dtype {x.dtype}: convert it first.")
    if x.ndim < len(shape) - 1 or str(x.shape[-1]) != shape[-1]:
        raise ValueError(
            f"`x` must have shape ({', '.join(shape)}), as the layer, got {x.shape}."
        )


def _each(value: int | Sequence[int] | None, nd: int) -> tuple[int, ...]:
    """Return a number for each spatial axis, 1 for None, as nnx.Conv has it."""
    if value is None or isinstance(value, int):
        return (1 if value is None else value,) * nd
    return tuple(value)


def _padding(
    value: str | int | Sequence[int | tuple[int, int]], nd: int
) -> str | tuple[tuple[int, int], ...]:
    if isinstance(value, str):
        return value
    sides = (value,) * nd if isinstance(value, int) else tuple(value)
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in sides)
