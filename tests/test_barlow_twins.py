"""examples/barlow_twins.py: loss, network, views, LARS, training, linear probe."""

import colorsys
import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trainings
from flax import nnx
from PIL import Image, ImageEnhance, ImageOps
from trainings import Jitted, KilledError, make_tree, small, table

pytest.importorskip("grain")
pytest.importorskip("tensorboardX")

import orthax
from benchmarks import tables
from examples import barlow_twins
from examples.data import imagenet as batches, views
from examples.data.records import load_imagenet
from examples.models import IMAGENET
from examples.models.barlow_twins import BarlowTwins, LinearProbe, barlow_twins_loss
from examples.models.resnet import Bottleneck, ResNet
from examples.streaming import log, pretraining_report, training
from examples.streaming.program import make_mesh, make_program, place
from orthax import components

# ---------------------------------------------------------------------------- the loss


def test_the_loss_is_that_of_the_definition():
    random = np.random.default_rng(0)
    one, other = random.normal(size=(2, 12, 5))
    c = np.corrcoef(one.T, other.T)[:5, 5:]
    apart = (c - np.eye(5)) ** 2
    expected = np.trace(apart) + 0.0051 * (apart.sum() - np.trace(apart))
    found = barlow_twins_loss(jnp.asarray(one), jnp.asarray(other), eps=0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_equal_whitened_views_cost_nothing_and_scale_changes_nothing():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 6)))[0]
    white = jnp.asarray(np.linalg.qr(q - q.mean(0))[0] * 40**0.5)
    assert barlow_twins_loss(white, white) < 1e-6
    assert barlow_twins_loss(white, -white) > 4 * 6 - 1e-2
    skewed = white * jnp.arange(1.0, 7.0) + 3
    assert (
        abs(barlow_twins_loss(skewed, white) - barlow_twins_loss(white, white)) < 1e-4
    )


# ------------------------------------------------------------------------- the network


@pytest.fixture(scope="module")
def network():
    rngs = nnx.Rngs(0)
    encoder = ResNet((1, 1), (4, 8), 10, block=Bottleneck, cifar_stem=True, rngs=rngs)
    return BarlowTwins(encoder, (16, 16, 12), rngs=rngs)


def test_the_encoder_gives_features_and_the_projector_embeddings(network):
    network.eval()
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    assert network.features == 32
    assert network.encoder(images).shape == (2, 32)
    assert network(images).shape == (2, 12)
    biases = [x for x in network.projector.layers if getattr(x, "bias", None)]
    assert len(biases) == 2 and all(isinstance(x, nnx.BatchNorm) for x in biases)


def test_every_block_starts_as_its_shortcut(network):
    network.eval()
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 4))
    first = network.encoder.blocks.layers[0]
    assert jnp.allclose(first(x), nnx.relu(first.shortcut(x)), atol=1e-6)


# --------------------------------------------------------------------------- the views

IMAGE = np.random.default_rng(3).integers(0, 256, (9, 11, 3), np.uint8)
UNIT = jnp.asarray(IMAGE / np.float32(255))


def bytes_of(image):
    return np.asarray(jnp.round(image * 255))


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (views.brightened, ImageEnhance.Brightness),
        (views.contrasted, ImageEnhance.Contrast),
        (views.saturated, ImageEnhance.Color),
    ],
)
def test_colours_change_as_pillow_changes_them(ours, theirs, factor):
    expected = np.asarray(theirs(Image.fromarray(IMAGE)).enhance(factor), float)
    assert np.abs(bytes_of(ours(UNIT, factor)) - expected).max() <= 2  # it rounds twice


@pytest.mark.parametrize("turn", [-0.1, 0.0, 0.04, 1 / 3])
def test_hue_turns_as_python_says(turn):
    def turned(pixel):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb((h + turn) % 1, s, v)

    expected = np.apply_along_axis(turned, -1, np.asarray(UNIT, float))
    np.testing.assert_allclose(views.hued(UNIT, turn), expected, atol=1e-5)
    grey = jnp.full((2, 2, 3), 0.4)
    np.testing.assert_allclose(views.hued(grey, turn), grey, atol=1e-6)


@pytest.mark.parametrize("deviation", [0.1, 1.0, 2.0])
def test_blur_is_a_gaussian(deviation):
    ndimage = pytest.importorskip("scipy.ndimage")
    expected = ndimage.gaussian_filter(
        np.asarray(UNIT, float),
        (deviation, deviation, 0),
        mode="nearest",
        radius=(6, 6, 0),
    )
    np.testing.assert_allclose(views.blurred(UNIT, deviation), expected, atol=1e-5)


def test_solarisation_inverts_the_bright_half():
    expected = np.asarray(ImageOps.solarize(Image.fromarray(IMAGE), 128))
    np.testing.assert_array_equal(bytes_of(views.solarised(UNIT)), expected)


def keys_of(seed, n):
    return jax.random.split(jax.random.key(seed), n)


def test_changes_are_as_likely_as_said():
    images = jnp.broadcast_to(UNIT, (400, *UNIT.shape))
    chances = views.Changes(blur=0.0, solarise=0.25, jitter=0.0, grey=0.0)
    found = views.changed(images, keys_of(0, 400), chances)
    same = (jnp.abs(found - images).max((1, 2, 3)) == 0).mean()
    assert 0.68 < same < 0.82
    none = views.Changes(blur=0.0, solarise=0.0, jitter=0.0, grey=0.0)
    assert jnp.array_equal(views.changed(images[:2], keys_of(0, 2), none), images[:2])


def test_two_views_differ_and_stay_in_range():
    images = jnp.broadcast_to(UNIT, (8, *UNIT.shape))
    for seed, chances in enumerate(views.TWO_VIEWS):
        keys = keys_of(seed, 8)
        found = views.changed(images, keys, chances)
        assert found.shape == images.shape
        assert found.min() >= 0 and found.max() <= 1 + 1e-6
        assert len({x.tobytes() for x in np.asarray(found)}) > 4
        # The change of an image is that of its key, in whatever batch it is.
        again = views.changed(images, keys[::-1], chances)
        np.testing.assert_allclose(again[::-1], found, atol=1e-6)


# ---------------------------------------------------------------------------- the data


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(autouse=True, scope="module")
def _small_network():
    with pytest.MonkeyPatch.context() as patch:
        yield patch.setitem(IMAGENET, "resnet18", small)


USUAL = {
    "model": "resnet18",
    "projector": (12, 8),
    "epochs": 2,
    "batch_size": 16,
    "warmup_epochs": 1.0,
    "image_size": 8,
    "dtype": "float32",
    "workers": 0,
    "threads": 2,
    "checkpoint_steps": 3,
    "probe_epochs": 2,
    "probe_learning_rate": 20.0,
}


def settings(**others):
    return barlow_twins.Pretraining(**USUAL | others)


def pairs_of(tree, **others):
    return barlow_twins.Pairs(
        settings(**others), 2, *load_imagenet(tree), batches.two_views
    )


def test_pairs_are_two_crops_of_every_image_and_a_seed(tree):
    pairs = pairs_of(tree)
    found = list(pairs.training(0))
    assert len(found) == 2 * 4
    first = found[0]
    assert first["image"].shape == (16, 2, 8, 8, 3)
    assert first["image"].dtype == np.uint8
    apart = first["image"][:, 0].astype(float) - first["image"][:, 1]
    assert (np.abs(apart).mean((1, 2, 3)) > 1).all()
    seeds = np.concatenate([batch["seed"] for batch in found])
    assert seeds.dtype == np.uint32 and len(set(seeds)) == len(seeds)
    assert seeds.max() > 2**31
    for batch, wanted in zip(pairs.training(5), found[5:], strict=True):
        for name in wanted:
            np.testing.assert_array_equal(batch[name], wanted[name])


def test_a_loss_of_whole_batches_is_evaluated_on_whole_batches(tree):
    (first,), (again,) = list(pairs_of(tree).validation()), pairs_of(tree).validation()
    assert len(first["label"]) == 16 and (first["label"] >= 0).all()
    assert (np.diff(first["label"]) < 0).any()  # shuffled
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])


# ------------------------------------------------------------------------------- LARS

PARAMS = {
    "conv": {"kernel": np.random.default_rng(0).normal(size=(3, 3, 2, 4))},
    "dense": {"kernel": np.random.default_rng(1).normal(size=(6, 5))},
    "norm": {"scale": np.ones(4), "bias": np.zeros(4)},
}
KERNELS = ("conv", "dense")


def lars_by_hand(gradients, rates, orthogonalised):
    """Return parameters after steps of the authors' LARS, in double precision."""
    params = {k: dict(x) for k, x in PARAMS.items()}
    traces = {k: dict.fromkeys(x, 0.0) for k, x in params.items()}
    for gradient, rate in zip(gradients, rates, strict=True):
        for layer, own in params.items():
            for name, p in own.items():
                step = np.asarray(gradient[layer][name], float)
                if layer in orthogonalised:
                    u, _, v = np.linalg.svd(
                        step.reshape(-1, p.shape[-1]), full_matrices=False
                    )
                    step = (u @ v).reshape(p.shape)
                if p.ndim > 1:
                    step = step + 0.1 * p
                    step = step * 1e-3 * np.linalg.norm(p) / np.linalg.norm(step)
                traces[layer][name] = 0.9 * traces[layer][name] + step
                share = 1.0 if p.ndim > 1 else 0.0048 / 0.2
                own[name] = p - rate * share * traces[layer][name]
    return params


@pytest.mark.parametrize(
    "optimiser, layers, orthogonalised",
    [
        ("lars", "convolutions", ()),
        ("orthogonal_lars", "convolutions", ("conv",)),
        ("orthogonal_lars", "all", KERNELS),
    ],
)
def test_lars_is_that_of_the_authors_behind_polar_factors_of(
    optimiser, layers, orthogonalised
):
    usual = {"method": "svd", "weight_decay": 0.1}
    config = settings(optimiser=optimiser, layers=layers, **usual)
    random = np.random.default_rng(2)
    gradients = [
        jax.tree.map(lambda x: jnp.float32(random.normal(size=x.shape)), PARAMS)
        for _ in range(3)
    ]
    rates = [50.0, 20.0, 70.0]  # behind the momentum, not in it
    params = jax.tree.map(jnp.float32, PARAMS)
    state = barlow_twins.make_optimiser(config, jnp.float32(1.0)).init(params)
    for gradient, rate in zip(gradients, rates, strict=True):
        tx = barlow_twins.make_optimiser(config, jnp.float32(rate))
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    wanted = lars_by_hand(gradients, rates, orthogonalised)
    moved = np.abs(wanted["conv"]["kernel"] - PARAMS["conv"]["kernel"]).max()
    assert moved > 1e-2
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


def test_rates_warm_up_and_fall_as_a_cosine():
    config = settings(epochs=20, warmup_epochs=10.0, batch_size=512)
    found, base = config.rates(3), 0.2 * 512 / 256
    assert len(found) == 60
    np.testing.assert_allclose(found[:30], base * np.arange(30) / 30)
    for i in range(30):
        q = (1 + math.cos(math.pi * i / 30)) / 2
        np.testing.assert_allclose(found[30 + i], base * (q + 0.001 * (1 - q)))
    np.testing.assert_allclose(settings(warmup_epochs=0.0).rates(4)[0], 0.2 / 16)


# ------------------------------------------------------------------- steps on any mesh


def random_batches(count, n=16):
    random = np.random.default_rng(0)
    return [
        {
            "image": random.integers(0, 256, (n, 2, 8, 8, 3), np.uint8),
            "label": np.zeros(n, np.int32),
            "seed": random.integers(0, 2**32, n, np.uint32),
            "unreadable": np.full(n, -1, np.int32),
        }
        for _ in range(count)
    ]


@functools.cache
def program_of(config, shape, probe=False):
    make = functools.partial(barlow_twins.make_probe_task, classes=3)
    task = (make if probe else barlow_twins.make_task)(config)
    program = make_program(task, make_mesh(shape))
    return program._replace(step=Jitted(program.step))


def views_of(batch):
    """Return the two views of a batch as the network gets them."""
    keys = jnp.stack([jax.random.split(jax.random.key(x)) for x in batch["seed"]])
    mean = np.float32([0.485, 0.456, 0.406])
    deviation = np.float32([0.229, 0.224, 0.225])
    for i, chances in enumerate(views.TWO_VIEWS):
        images = batch["image"][:, i] / np.float32(255)
        yield (views.changed(images, keys[:, i], chances) - mean) / deviation


@functools.cache
def one_device():
    """Return parameters, statistics and losses of a loop without a mesh."""
    rngs = nnx.Rngs(jax.random.key(0))
    model = BarlowTwins(small(classes=1, rngs=rngs), (12, 8), rngs=rngs)
    graphdef, params, statistics = nnx.split(model, nnx.Param, ...)
    rule = components.OnlyConvolutions(components.ByName())
    tx = orthax.orthogonal_lars(3.0, 3.0 * 0.0048 / 0.2, rule=rule)

    def loss(params, statistics, one, other):
        model = nnx.merge(graphdef, params, statistics, copy=True)
        value = barlow_twins_loss(model(one), model(other))
        return value, nnx.split(model, nnx.Param, ...)[2]

    def step(params, statistics, state, images):
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, statistics), grads = gradient(params, statistics, *images)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), statistics, state, value

    step, state, losses = jax.jit(step), tx.init(params), []
    for batch in random_batches(10):
        images = tuple(views_of(batch))
        params, statistics, state, value = step(params, statistics, state, images)
        losses.append(float(value))
    return (params, statistics), losses


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_ten_steps_on_eight_devices_are_those_of_one(shape):
    mesh, program = make_mesh(shape), program_of(settings(), shape)
    state, losses = program.initialise(jax.random.key(0)), []
    rate = np.float32(3.0)
    for i, batch in enumerate(random_batches(10)):
        state, sums = program.step.f(state, place(batch, mesh), rate, np.int32(i))
        losses.append(float(sums["loss"]) / float(sums["images"]))
    wanted, wanted_losses = one_device()
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-4)
    found = state.params, state.statistics
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)
    # Mean and variance of six norms of the encoder and one of the projector.
    assert len(jax.tree.leaves(state.statistics)) == 2 * 7


# ----------------------------------------------------------- the training, the probe


def program_once(task, mesh):
    shape = tuple(mesh.shape.values())
    return program_of(settings(), shape, task.learned is LinearProbe.LEARNED)


@pytest.fixture(scope="module")
def train_in(tree):
    """Return a function that trains in a folder, with programs compiled before."""

    def run(output, **others):
        config = settings(
            **{"data_dir": tree, "output": output, "probe": True} | others
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(log, "plot", lambda *_: None)
            patch.setattr(training, "make_program", program_once)
            return barlow_twins.run(config)

    return run


@pytest.fixture(scope="module")
def never_killed(train_in, tmp_path_factory):
    """Return the folder and the last states of a training and of its probe."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train_in(folder)


def leaves_of(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def assert_same(found, wanted):
    for x, y in zip(leaves_of(found), leaves_of(wanted), strict=True):
        np.testing.assert_array_equal(x, y)


def test_what_a_training_writes(never_killed, tree):
    folder, (state, _) = never_killed
    steps, epochs = table(folder / "steps.csv"), table(folder / "epochs.csv")
    found = [float(row["learning_rate"]) for row in steps]
    np.testing.assert_allclose(found, settings().rates(4))
    losses = np.array([float(row["loss"]) for row in steps])
    np.testing.assert_allclose(
        [float(row["train_loss"]) for row in epochs], losses.reshape(2, 4).mean(1)
    )
    # Of the last evaluation, in evaluation mode and on the one whole batch.
    (row,) = tables.read(folder / "results.csv")
    assert row["validation_images"] == epochs[-1]["validation_images"][:-2] == "16"
    rngs = nnx.Rngs(0)
    network = BarlowTwins(small(classes=1, rngs=rngs), (12, 8), rngs=rngs)
    model = nnx.merge(nnx.split(network)[0], state.params, state.statistics)
    model.eval()
    (batch,) = pairs_of(tree).validation()
    embedded = map(jax.jit(model), views_of(batch))
    wanted = barlow_twins_loss(*embedded)
    np.testing.assert_allclose(float(epochs[-1]["validation_loss"]), wanted, rtol=1e-3)
    best = min(epochs, key=lambda row: float(row["validation_loss"]))
    (path,) = (folder / "checkpoints" / "best").iterdir()
    assert path.name == best["step"]
    assert len(row["loss_curve"].split()) == 8
    assert row["optimiser"] == "orthogonal_lars" and row["layers"] == "convolutions"
    assert row["projector"] == "12 8"


def test_the_probe_leaves_the_encoder_as_it_is_and_learns(never_killed):
    folder, (state, probe) = never_killed
    both = nnx.merge_state(state.params, state.statistics)
    assert_same(probe.statistics["encoder"], both["encoder"])
    assert len(jax.tree.leaves(probe.statistics)) == len(
        jax.tree.leaves(both["encoder"])
    )
    assert [x.shape for x in jax.tree.leaves(probe.params)] == [(3,), (16, 3)]
    first, last = table(folder / "probe" / "epochs.csv")
    assert float(last["validation_top1"]) > 0.5 > 0.34
    assert float(last["train_loss"]) < float(first["train_loss"])
    (row,) = tables.read(folder / "results.csv")
    accuracy = float(last["validation_top1"])
    assert float(row["probe_accuracy"]) == pytest.approx(accuracy, abs=1e-4)
    assert row["probe_images"] == "21"


@pytest.mark.parametrize(
    "at, done", [(7, (6, 0)), pytest.param(14, (8, 4), marks=pytest.mark.slow)]
)
def test_killed_and_resumed_is_never_killed(
    at, done, train_in, never_killed, tmp_path, monkeypatch
):
    calls, step = [], log.Log.step

    def killed(*args):
        calls.append(args)
        if len(calls) == at:
            raise KilledError
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(log.Log, "step", killed)
        with pytest.raises(KilledError):
            train_in(tmp_path)
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(log.Log, "step", lambda *args: again.append(step(*args)))
        found = train_in(tmp_path)
    assert len(again) == 8 + 8 - sum(done)
    folder, wanted = never_killed
    assert_same(found, wanted)
    for name in ("steps.csv", "epochs.csv", "probe/steps.csv", "probe/epochs.csv"):
        assert table(tmp_path / name) == table(folder / name)


@pytest.mark.slow
def test_a_probe_can_come_later(train_in, never_killed, tmp_path):
    _, none = train_in(tmp_path, probe=False)
    assert none is None
    (row,) = tables.read(tmp_path / "results.csv")
    assert row["probe_accuracy"] == ""
    assert_same(train_in(tmp_path), never_killed[1])
    (row,) = tables.read(tmp_path / "results.csv")
    assert row["probe_accuracy"] != ""


@pytest.mark.slow
def test_two_processes_train_as_one(tree, tmp_path, never_killed):
    options = USUAL | {"data_dir": tree, "output": tmp_path / "two"}
    del options["projector"]
    words = ["--mesh", "2", "2", "--projector", "12", "8", "--probe"]
    with contextlib.ExitStack() as stack:
        first, second = trainings.train_in_two(
            "barlow_twins", stack, tmp_path, "two", options, words
        )
    assert_same(first, second)  # of the probe, encoder included
    for x, y in zip(first, leaves_of(never_killed[1][1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-3)
    found, wanted = (
        [float(row["loss"]) for row in table(own / "steps.csv")]
        for own in (tmp_path / "two", never_killed[0])
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


# ------------------------------------------------------------------------ the settings


def test_the_full_scale_is_what_the_authors_train():
    config = barlow_twins.Pretraining()
    shapes = nnx.eval_shape(lambda: barlow_twins.make_network(config, nnx.Rngs(0)))

    def size(x):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(x))

    assert size(nnx.state(shapes.encoder, nnx.Param)) == 25_557_032 - 2049 * 1000
    dense = 2048 * 8192 + 2 * 8192**2
    assert size(nnx.state(shapes.projector, nnx.Param)) == dense + 2 * 2 * 8192
    rates = config.rates(1251)
    assert rates.argmax() == 10 * 1251 and rates.max() == 0.2 * 4
    assert len(rates) == 1000 * 1251


@pytest.mark.parametrize(
    "others, match",
    [
        ({"model": "vit_s16"}, "`model` is 'vit_s16'; expected one of resnet18, resn"),
        (
            {"optimiser": "sgd"},
            "`optimiser` is 'sgd'; expected one of lars, orth",
        ),
        ({"layers": "dense"}, "`layers` is 'dense'"),
        ({"projector": ()}, r"`projector` is \(\); expected one width or more"),
        ({"projector": (8, 0)}, r"`projector` is \(8, 0\)"),
        ({"probe_epochs": 0}, "`probe_epochs` is 0; expected at least 1"),
        ({"bias_learning_rate": 0.0}, "`bias_learning_rate` is 0.0; expected a pos"),
        ({"trust_coefficient": math.inf}, "`trust_coefficient` is inf"),
        ({"redundancy": -1.0}, "`redundancy` is -1.0"),
        ({"warmup_epochs": 4.0}, "`warmup_epochs` is 4.0; expected at most `epochs`"),
        ({"weight_decay": -1.0}, "`weight_decay` is -1.0; expected at least 0"),
    ],
)
def test_settings_that_cannot_be(others, match):
    with pytest.raises(ValueError, match=match):
        settings(**others)


def test_trainings_that_cannot_be(train_in, never_killed, tmp_path):
    for size, match in (
        (24, "`batch_size` is 24; expected at most 21, the number of validation"),
        (12, "`batch_size` is 12; expected a multiple of 8, the number of devices"),
    ):
        with pytest.raises(ValueError, match=match):
            train_in(tmp_path, batch_size=size)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"`redundancy` is 0\.1 here"):
        train_in(never_killed[0], redundancy=0.1)
    with pytest.raises(SystemExit, match="There are no images"):
        barlow_twins.main(["--data-dir", str(tmp_path)])


# ---------------------------------------------------------------------------- the page


def test_the_page_has_the_runs_and_what_was_not_run(never_killed, tmp_path):
    rows = tables.read(never_killed[0] / "results.csv")
    rate = {"kind": "step", "model": "resnet50", "projector": "8192 8192 8192"}
    rate |= {"dtype": "bfloat16", "image_size": "224", "batch_size": "256"}
    rate |= {"devices": "2", "seconds": "2.0", "images_per_s": "9", "cpus": "1"}
    rate |= {"platform": "gpu", "device": "X", "lapack_threads": "1", "jax": "1"}
    rate |= {"jaxlib": "1", "optax": "1", "load": "1", "optimiser": "lars"}
    slower = rate | {"optimiser": "orthogonal_lars", "seconds": "3.0"}
    rates = [rate | {"method": ""}, slower | {"method": "auto"}]
    page = pretraining_report.page(rows, rates)
    accuracy = 100 * float(rows[0]["probe_accuracy"])
    assert f"| {accuracy:.1f} | 100.0 |" in page
    assert (
        "--data-dir TREE --model resnet18 --projector 12 8 --optimiser orthogonal_lars "
        "--epochs 2 --batch-size 16 --warmup-epochs 1.0 --dtype float32 "
        "--image-size 8 --probe --probe-epochs 2 --probe-learning-rate 20`"
    ) in page
    # 1251 steps an epoch; 4 x 2 s for 1024 images, and one second more.
    assert "1251000 steps: 3.13e+03 h on 2 of X" in page and "| +50% |" in page
    assert page.count("not yet run") == len(pretraining_report.FULL)
    assert "--optimiser orthogonal_lars --method svd --probe --output" in page
    assert pretraining_report.page([], []).count("no rate measured") == 4
    pretraining_report.plot(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0
