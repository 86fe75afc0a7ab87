"""Pre-train with Barlow Twins: `python -m examples.barlow_twins`.

LARS beside Orthogonal-LARS, the paper's second large study (Tuddenham et al. 2022,
Section 2.3.5, https://arxiv.org/abs/2202.07052), on ImageNet or any tree of images: the
settings, what is learned and the program. The network and the loss are in
`examples/models/barlow_twins.py`, the changes of the two views in
`examples/data/views.py`; what a step computes, the loop and the checkpoints are those
of the ImageNet trainer, in `examples/streaming/`.

With `--probe` a linear layer is trained at the end on the features of the encoder,
which stays as it is, and tells how much they know of the classes. A finished training
that is started again with it trains that alone.
"""

import dataclasses
import functools
import operator
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import orthax
from benchmarks import tables
from examples.data.imagenet import Batch, normalised, training_batches, two_views
from examples.data.records import Records, load_imagenet
from examples.data.views import TWO_VIEWS, changed
from examples.models import IMAGENET
from examples.models.barlow_twins import BarlowTwins, LinearProbe, barlow_twins_loss
from examples.streaming.program import State, Sums, Task, make_mesh
from examples.streaming.results import PRETRAINING_KEY, make_pretraining_row
from examples.streaming.settings import Streamed, check_batches, half_cosine, join
from examples.streaming.task import Images, classification_loss, classification_score
from examples.streaming.training import Plan, make_plan, train
from examples.training import program
from examples.training.optimisers import METHODS, RULES, Layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining(Streamed):
    """Pre-train an encoder with Barlow Twins, and see what its features know.

    The settings are those of Zbontar et al. 2021, but for batches of 1024 and polar
    factors of the convolutions' gradients, both as in arXiv 2202.07052. Killed and
    started again with the same command, it goes on from the last checkpoint and ends
    with the same numbers; so it does on another mesh, up to rounding.
    """

    model: Literal["resnet18", "resnet34", "resnet50"] = "resnet50"
    """The encoder: one of `examples.models.IMAGENET`."""
    projector: tuple[int, ...] = (8192, 8192, 8192)
    """Features of the dense layers behind the encoder."""
    optimiser: Literal["lars", "orthogonal_lars"] = "orthogonal_lars"
    """Which optimiser."""
    layers: Layers = "convolutions"
    """The layers whose gradients are orthogonalised; the paper's are convolutions."""
    epochs: int = 1000
    """Passes over the training images."""
    learning_rate: float = 0.2
    """The highest of weights, for a batch of 256; it grows with the batch."""
    bias_learning_rate: float = 0.0048
    """The highest of biases and norms, for a batch of 256."""
    warmup_epochs: float = 10.0
    """Epochs in which the rates grow from zero, before a cosine to a thousandth."""
    weight_decay: float = 1e-6
    """On weights: L2 added to the gradient."""
    trust_coefficient: float = 1e-3
    """Of LARS: the norm of a weight's step, as a share of its own, at a rate of one."""
    redundancy: float = 0.0051
    """Weight in the loss of what is off the diagonal."""
    output: Path = Path("runs/barlow_twins")
    """Folder of checkpoints, CSV files, TensorBoard and curves.png; of all hosts."""
    probe: bool = False
    """Whether to train a linear layer on the features at the end."""
    probe_epochs: int = 100
    """Passes over the training images for that."""
    probe_learning_rate: float = 0.3
    """Of that, at first, for a batch of 256; it falls as a cosine."""

    def __post_init__(self):
        super().__post_init__()
        widths = self.projector
        wide = len(widths) > 0 and min(widths) >= 1
        self.expect(wide, "projector", "one width or more, of at least 1")
        self.expect_at_least(1, "probe_epochs")
        self.expect_positive("bias_learning_rate", "probe_learning_rate")
        self.expect_positive("redundancy", "trust_coefficient")

    @property
    def takes_method(self) -> bool:
        """Whether the optimiser takes polar factors."""
        return self.optimiser != "lars"

    def identity(self, records: Records) -> dict[str, Any]:
        """Return all upon which numbers depend; a checkpoint is of these."""
        values = super().identity(records)
        return {k: x for k, x in values.items() if not k.startswith("probe")}

    def rates(self, steps: int) -> np.ndarray:
        """Return the weights' learning rate of every step, given how many an epoch."""
        total, warmup = self.epochs * steps, self.warmup_epochs * steps
        # The very first step is of rate zero, as in the authors' code.
        grown = np.minimum(np.arange(total) / max(warmup, 1), 1.0) if warmup else 1.0
        falling = 1e-3 + (1 - 1e-3) * half_cosine(total, warmup)
        return self.learning_rate * self.batch_size / 256 * grown * falling


# --------------------------------------------------------------------- what is learned


def make_network(config: Pretraining, rngs: nnx.Rngs) -> BarlowTwins:
    """Return the encoder and the projector of the settings."""
    dtype = jnp.dtype(config.dtype)
    encoder = IMAGENET[config.model](config.image_size, 1, dtype=dtype, rngs=rngs)
    return BarlowTwins(encoder, config.projector, dtype=dtype, rngs=rngs)


def make_task(config: Pretraining) -> Task:
    """Return Barlow Twins with the network and the optimiser of the settings."""

    def loss(model: nnx.Module, batch: dict[str, jax.Array]) -> tuple[jax.Array, Sums]:
        images = batch["image"] / jnp.float32(255)  # (n, 2, size, size, 3)
        keys = jax.vmap(jax.random.split)(jax.vmap(jax.random.key)(batch["seed"]))
        # One view after the other: each has the statistics of its own batch.
        views = [
            model(normalised(changed(images[:, i], keys[:, i], chances)))
            for i, chances in enumerate(TWO_VIEWS)
        ]
        value = barlow_twins_loss(*views, redundancy=config.redundancy)
        n, unreadable = len(images), (batch["unreadable"] >= 0).sum()
        sums = {"loss": n * value, "images": jnp.int32(n), "unreadable": unreadable}
        return value, sums

    return Task(
        lambda key: make_network(config, nnx.Rngs(key)),
        loss,
        lambda model, batch: loss(model, batch)[1],
        lambda rate: make_optimiser(config, rate),
    )


def make_optimiser(
    config: Pretraining, rate: jax.Array
) -> optax.GradientTransformation:
    """Return the optimiser of the settings at a learning rate of the weights."""
    rates = rate, rate * (config.bias_learning_rate / config.learning_rate)
    options = {
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
        "trust_coefficient": config.trust_coefficient,
    }
    if config.optimiser == "lars":
        return lars(*rates, **options)
    method, rule = METHODS[config.method], RULES[config.layers]
    return orthax.orthogonal_lars(*rates, **options, method=method, rule=rule)


def lars(
    learning_rate: jax.Array,
    bias_learning_rate: jax.Array,
    *,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
) -> optax.GradientTransformation:
    """Return LARS: `orthax.orthogonal_lars`, whose arguments it has, but no factors.

    References:
      You, Gitman, Ginsburg: "Large batch training of convolutional networks", 2017,
      https://arxiv.org/abs/1708.03888; but for the place of the learning rates, as in
      the code of Barlow Twins.
    """

    def weights(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, params)

    scale = optax.scale_by_learning_rate
    rates = {True: scale(learning_rate), False: scale(bias_learning_rate)}
    ratio = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=weights),
        optax.masked(ratio, weights),
        optax.trace(momentum),
        optax.partition(rates, weights),
    )


class Pairs(Images):
    """Two views of every image. The loss is of a whole batch, and so is evaluated.

    The validation images are shuffled once, because those of a class stand together.
    """

    def validation(self) -> Generator[Batch, None, None]:
        """Yield the whole batches to evaluate with, the same in every epoch."""
        view = functools.partial(self.view, size=self.config.image_size)
        seed = self.config.seed
        return training_batches(self.held, view, self.reading, seed=seed, epochs=1)


# -------------------------------------------------------------------- the linear probe


def make_probe_task(config: Pretraining, classes: int) -> Task:
    """Return classification by a linear layer on the encoder's features."""

    def model(key: jax.Array) -> LinearProbe:
        rngs = nnx.Rngs(key)
        return LinearProbe(make_network(config, rngs), classes, rngs=rngs)

    return Task(
        model,
        functools.partial(classification_loss, smoothing=0.0),
        classification_score,
        lambda rate: optax.chain(
            optax.add_decayed_weights(1e-6), optax.sgd(rate, momentum=0.9)
        ),
        learned=LinearProbe.LEARNED,
    )


def make_probe_plan(config: Pretraining, plan: Plan) -> Plan:
    """Return the plan of the probe, given that of the training before it."""
    rate = config.probe_learning_rate * config.batch_size / 256
    settings = "probe_epochs", "probe_learning_rate"
    return dataclasses.replace(
        plan,
        rates=rate * half_cosine(config.probe_epochs * plan.steps),
        identity=plan.identity | {name: getattr(config, name) for name in settings},
        output=plan.output / "probe",
        merit=operator.itemgetter("top1"),
    )


def with_encoder(state: State, pretrained: State) -> State:
    """Return a state of the probe with a pre-trained encoder in it."""
    both = nnx.merge_state(pretrained.params, pretrained.statistics)
    leaves = jax.tree.leaves(both["encoder"])
    # Copied, because steps write into what they are given; in one program.
    copied = jax.jit(lambda leaves: [jnp.copy(x) for x in leaves])(leaves)
    structure = jax.tree.structure(state.statistics)
    return state._replace(statistics=jax.tree.unflatten(structure, copied))


# ------------------------------------------------------------------------- the program


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says, or end the program with what is wrong."""
    config = tyro.cli(
        Pretraining, prog="python -m examples.barlow_twins", args=arguments
    )
    try:
        run(config)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))


def run(config: Pretraining) -> tuple[State, State | None]:
    """Train, write a row of the results; return the last state, and that of the probe.

    Raises:
      FileNotFoundError: if there are no images.
      ValueError: if settings, data, devices and checkpoint do not go together.
    """
    join(config)
    training, validation = load_imagenet(config.data_dir)
    mesh = make_mesh(config.mesh)
    steps = check_batches(config, training, mesh)
    config.expect(
        config.batch_size <= len(validation),
        "batch_size",
        f"at most {len(validation)}, the number of validation images, of which the "
        "loss of a whole batch is taken",
    )
    plan = make_plan(config, training, steps, lambda scores: -scores["loss"])
    pairs = Pairs(config, config.epochs, training, validation, two_views)
    state, probe = train(make_task(config), pairs, plan, mesh), None
    if config.probe:
        task = make_probe_task(config, training.classes)
        images = Images(config, config.probe_epochs, training, validation)
        begin = functools.partial(with_encoder, pretrained=state)
        probe = train(task, images, make_probe_plan(config, plan), mesh, begin)
    if jax.process_index() == 0:
        path = config.results or config.output / "results.csv"
        row = make_pretraining_row(config, training, mesh)
        tables.write(path, [row], PRETRAINING_KEY)
        print(f"{path}: one row a run\n{config.output}: all of this run")
    return state, probe


if __name__ == "__main__":
    program.run(main)
