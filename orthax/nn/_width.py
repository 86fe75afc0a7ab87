"""Width nesting: every stage adds features, and reads its own and earlier ones."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from orthax.nn._stages import Activations, check_shapes, count, features_of, select


class _BlockTriangular(nnx.Module):
    """One block for each stage, from the features of all stages up to it to its own."""

    def __init__(
        self,
        in_stages: int | Sequence[int],
        out_stages: int | Sequence[int],
        make: Callable[[int, int], Callable[[jax.Array], jax.Array]],
    ):
        self.in_stages = features_of("in_stages", in_stages)
        self.out_stages = features_of("out_stages", out_stages)
        if len(self.in_stages) > len(self.out_stages):
            raise ValueError(
                f"`in_stages` {self.in_stages} has more stages than `out_stages` "
                f"{self.out_stages}: nothing would read the last ones."
            )
        self.stages = nnx.data(
            [
                make(sum(self.in_stages[: k + 1]), width)
                for k, width in enumerate(self.out_stages)
            ]
        )

    def __call__(
        self, xs: Activations, *, stages: int | None = None
    ) -> list[jax.Array]:
        xs, stages = select(xs, len(self.in_stages), len(self.out_stages), stages)
        check_shapes(xs, self.in_stages)
        # A product for each stage, never a part of a wider one: products of other
        # shapes may round differently.
        return [
            block(jnp.concatenate(xs[: k + 1], axis=-1))
            for k, block in enumerate(self.stages[:stages])
        ]


class NestedLinear(_BlockTriangular):
    """A dense layer whose stage k reads the features of stages 0 to k alone.

    Its kernel is block-triangular, and only the blocks that are not zero exist: one
    `nnx.Linear` for each stage, from all features up to it to its own, whose kernel
    `stages/k/kernel` has shape (sum(in_stages[:k + 1]), out_stages[k]). A head for each
    stage is such a layer too: `NestedLinear(widths, (classes,) * len(widths))`.

    Calling it with `xs`, the activations of the first stages, shape
    (*batch, in_stages[k]) each, gives a list of shapes (*batch, out_stages[k]). One
    array alone is the activation of stage 0. With `stages=n` (static under `jit`) the
    first n stages run; without, all whose inputs are there.

    Args:
      in_stages: features that each stage adds to the input; one number, or fewer stages
        than in `out_stages`, if later stages add none.
      out_stages: features that each stage adds to the output.
      rngs: random numbers for the kernels. Stages are drawn in order: the first ones do
        not depend on how many there are.
      **kwargs: arguments of `nnx.Linear`, for every stage.

    Raises:
      TypeError: if features or `stages` are not integers.
      ValueError: if features or `stages` are not positive, there are more input stages
        than output stages, or `xs` has not the activations or features that `stages`
        needs.

    Limits:
      Outputs of stage k are bit-identical whether later stages exist or run, tested on
      CPU, with `jit` and without (one against the other, XLA rounds differently).
      Elsewhere the compiler may choose another algorithm for the same product in
      another program; then they agree to rounding. NaN in stage k reaches stage k and
      later ones.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from orthax.nn import NestedLinear, doubling
      >>> widths, rngs = doubling(16, 3), nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...     NestedLinear(64, widths, rngs=rngs),  # all stages read the whole input
      ...     lambda xs: jax.tree.map(nnx.relu, xs),
      ...     NestedLinear(widths, (10, 10, 10), rngs=rngs),  # a head for each stage
      ... )
      >>> [logits.shape for logits in model(jnp.ones((5, 64)))]
      [(5, 10), (5, 10), (5, 10)]
      >>> len(model(jnp.ones((5, 64)), stages=2))  # costs two stages
      2

    References:
      Wan, Hoffmann, Lu, Maire: "Orthogonalized SGD and Nested Architectures for Anytime
      Neural Networks", ICML 2020, arXiv 2008.06635. A reconstruction from the abstract
      and the captions of the figures: how the authors connect stages we do not know.
    """

    def __init__(
        self,
        in_stages: int | Sequence[int],
        out_stages: int | Sequence[int],
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        def make(fan_in: int, fan_out: int) -> nnx.Linear:
            return nnx.Linear(fan_in, fan_out, rngs=rngs, **kwargs)

        super().__init__(in_stages, out_stages, make)


class NestedConv(_BlockTriangular):
    """A convolution whose stage k reads the features of stages 0 to k alone.

    `NestedLinear` with one `nnx.Conv` for each stage: `stages/k/kernel` has shape
    (*kernel_size, sum(in_stages[:k + 1]), out_stages[k]), activations have shape
    (*batch, *spatial, features), and the spatial axes of all stages are alike.

    Args:
      in_stages: features that each stage adds to the input; one number, or fewer stages
        than in `out_stages`, if later stages add none.
      out_stages: features that each stage adds to the output.
      kernel_size: the taps along each spatial axis.
      rngs: random numbers for the kernels, drawn in the order of the stages.
      **kwargs: arguments of `nnx.Conv` (`strides`, `padding`, ...), for every stage.

    Raises:
      TypeError: if features or `stages` are not integers.
      ValueError: as `NestedLinear`.

    Limits:
      As `NestedLinear`. `feature_group_count` must divide the features that each stage
      reads and gives; depthwise convolutions, one layer for each stage, are not nested.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from orthax.nn import NestedConv
      >>> conv = NestedConv(3, (8, 8, 16), (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> [y.shape for y in conv(jnp.ones((5, 32, 32, 3)), stages=2)]
      [(5, 16, 16, 8), (5, 16, 16, 8)]

    References:
      As `NestedLinear`: a reconstruction.
    """

    def __init__(
        self,
        in_stages: int | Sequence[int],
        out_stages: int | Sequence[int],
        kernel_size: int | Sequence[int],
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        def make(fan_in: int, fan_out: int) -> nnx.Conv:
            return nnx.Conv(fan_in, fan_out, kernel_size, rngs=rngs, **kwargs)

        super().__init__(in_stages, out_stages, make)


class NestedNorm(nnx.Module):
    """A norm for each stage, whose statistics never see another stage.

    Calling it with `xs`, shape (*batch, features[k]) each, gives a list of the same
    shapes. Statistics of a batch norm are those of the stages that run: running them
    with `stages=n` leaves the later ones as they were. Further keyword arguments go to
    every norm (`use_running_average=True`); `model.train()` and `model.eval()` work.

    Args:
      features: features that each stage has of its own, `out_stages` of the layer
        before.
      norm: makes the norm of a stage, `norm(features[k], rngs=rngs, **kwargs)`:
        `nnx.BatchNorm`, `nnx.LayerNorm`, `nnx.GroupNorm` or your own.
      rngs: random numbers, handed on.
      **kwargs: arguments of `norm`, for every stage.

    Raises:
      TypeError: if `features` are not integers or `norm` cannot be called.
      ValueError: if `features` are not positive, or `xs` are too few or of other
        features.

    Limits:
      As `NestedLinear`. A stage with one feature has no use for a layer norm: it is
      normalised to zero.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from orthax.nn import NestedConv, NestedNorm
      >>> widths, rngs = (4, 4, 8), nnx.Rngs(0)
      >>> conv = NestedConv(widths, widths, (3, 3), rngs=rngs)
      >>> norm = NestedNorm(widths, nnx.GroupNorm, num_groups=2, rngs=rngs)
      >>> xs = [jnp.ones((5, 6, 6, width)) for width in widths]
      >>> ys = jax.tree.map(nnx.relu, norm(conv(xs)))
      >>> [y.shape for y in jax.tree.map(jnp.add, xs, ys)]  # a residual
      [(5, 6, 6, 4), (5, 6, 6, 4), (5, 6, 6, 8)]

    References:
      As `NestedLinear`: a reconstruction.
    """

    def __init__(
        self,
        features: int | Sequence[int],
        norm: Callable[..., Callable[..., jax.Array]] = nnx.BatchNorm,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        if not callable(norm):
            raise TypeError(
                "`norm` must make a norm, as nnx.BatchNorm does, got "
                f"{norm!r} of type {type(norm).__name__}."
            )
        self.features = features_of("features", features)
        self.stages = nnx.data(
            [norm(width, rngs=rngs, **kwargs) for width in self.features]
        )

    def __call__(
        self, xs: Activations, *, stages: int | None = None, **kwargs: Any
    ) -> list[jax.Array]:
        xs, stages = select(xs, len(self.features), len(self.features), stages)
        check_shapes(xs, self.features)
        return [norm(x, **kwargs) for norm, x in zip(self.stages, xs, strict=False)]


def doubling(width: int, stages: int) -> tuple[int, ...]:
    """Return the features that each stage adds so that their sum doubles every time.

    Stages 0 to k have `width * 2**k` features together. A kernel between two such
    activations has, for stages 0 to k, `(2 * 4**k + 1) / 3` times the entries of stage
    0 alone: 1, 3, 11, 43, and so about four times as many with each further stage.

    Args:
      width: features of stage 0.
      stages: the number of stages.

    Returns:
      `stages` numbers: width, width, 2 width, 4 width, ...

    Raises:
      TypeError: if an argument is not an integer.
      ValueError: if an argument is not positive.

    Example:
      >>> from orthax.nn import doubling
      >>> doubling(16, 4)
      (16, 16, 32, 64)

    References:
      Wan et al. 2020, arXiv 2008.06635: stages grow exponentially. By two, and from
      which width, is a reconstruction.
    """
    width, stages = count("width", width), count("stages", stages)
    return (width, *(width << k for k in range(stages - 1)))
