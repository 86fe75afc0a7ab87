"""Figures 8 and 9: what is measured, that it can be stopped, and that it is drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.data import Dataset, Split
from examples.paper import probes
from examples.training import supervised
from examples.training.runs import Limits


def make_split(n, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
    return Split(jnp.asarray(images), jnp.asarray(rng.integers(0, 10, n, np.int32)))


DATA = Dataset(make_split(24, 0), make_split(8, 1), make_split(8, 2))


@pytest.fixture(scope="module")
def run():
    first = probes.PROBES["figure8"].runs[0]
    recipe = dataclasses.replace(first.recipe, batch_size=12)
    return dataclasses.replace(first, recipe=recipe, epochs=3)


def start(recipe):
    return jax.jit(lambda key: supervised.initialise(key, recipe))(jax.random.key(0))


def test_cosines_are_those_of_the_pairs_of_feature_maps(run):
    state = start(run.recipe)
    found = probes.cosines(state, DATA.validation, run.recipe)

    def representations(images):
        model = nnx.merge(state.graphdef, state.params, state.statistics, copy=True)
        model.eval()
        return model.representations(supervised.normalised(images, run.recipe))

    layers = jax.jit(representations)(DATA.validation.images)
    for number, maps in enumerate(layers, 1):
        x = np.asarray(maps, float).reshape(len(maps), -1, maps.shape[-1])
        norms = np.linalg.norm(x, axis=1, keepdims=True)
        x = x / np.where(norms == 0, 1, norms)
        pairs = np.triu_indices(x.shape[-1], 1)
        mean = np.abs(np.einsum("npi,npj->nij", x, x)[:, *pairs]).mean()
        assert found[f"layer {number}"] == pytest.approx(mean, rel=1e-4)
    assert set(found) == {"layer 1", "layer 2", "layer 3"}


def test_dead_parameters_are_those_of_the_layer_of_the_paper(monkeypatch):
    """On a small network: the path is that of resnet50's layer2[1].conv2 below."""
    monkeypatch.setattr(probes, "_DEAD_IN", "conv2/kernel")
    recipe = probes.PROBES["figure8"].runs[0].recipe
    state = start(recipe)

    def objective(params):
        images = supervised.normalised(DATA.train.images, recipe)
        logits, _ = supervised.forward(state, params, images, 1)
        chosen = jnp.take_along_axis(logits, DATA.train.labels[:, None], 1)[:, 0]
        return (jax.nn.logsumexp(logits, 1) - chosen).mean()

    grads = jax.jit(jax.grad(objective))(state.params)
    size = np.abs(np.asarray(grads["conv2"]["kernel"][...]))
    found = probes.dead(state, DATA.train, recipe)
    near = pytest.approx((size <= 1e-4).sum(), abs=3)  # rounding at the threshold
    assert found["at most 1e-4"] == near
    near = pytest.approx((size <= 1e-3 * size.max()).sum(), abs=3)
    assert found["at most a thousandth of the largest"] == near


def test_the_layer_of_figure_9_is_there():
    recipe = probes.PROBES["figure9"].runs[0].recipe
    state = jax.eval_shape(lambda: supervised.initialise(jax.random.key(0), recipe))
    paths = {
        "/".join(str(part) for part in path[:-1] if part != "value"): leaf
        for path, leaf in ((p, x) for p, x in _flat(state.params))
    }
    assert paths[probes._DEAD_IN] == (3, 3, 128, 128)


def _flat(params):
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        parts = [getattr(k, "key", getattr(k, "name", None)) for k in path]
        yield (*parts, None), leaf.shape


def test_a_probe_goes_on_and_is_drawn(run, tmp_path, monkeypatch):
    path = tmp_path / "probes.csv"
    short = dataclasses.replace(run, epochs=2)
    runs = [short, dataclasses.replace(short, seed=1)]
    stopped = Limits(tmp_path / "checkpoints", deadline=0.0)
    assert not probes.finish("figure8", runs, DATA, path, stopped)
    assert [row["epoch"] for row in probes.read(path)] == ["1"] * 3
    assert probes.finish("figure8", runs, DATA, path, Limits(tmp_path / "checkpoints"))
    rows = probes.read(path)
    assert [(row["seed"], row["epoch"]) for row in rows[::3]] == [
        *(("0", "1"), ("0", "2")),
        *(("1", "1"), ("1", "2")),
    ]
    monkeypatch.delattr(probes, "train_together")
    assert probes.finish("figure8", runs, DATA, path, Limits(tmp_path / "checkpoints"))
    figure = tmp_path / "figure8.png"
    assert probes.draw("figure8", rows, figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert not probes.draw("figure9", rows, tmp_path / "figure9.png")
