"""examples/barlow_twins.py: the loss, the network, the views."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image, ImageEnhance, ImageOps

from examples.data import views
from examples.models.barlow_twins import BarlowTwins, barlow_twins_loss
from examples.models.resnet import Bottleneck, ResNet

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


def test_changes_are_as_likely_as_said():
    images = jnp.broadcast_to(UNIT, (400, *UNIT.shape))
    chances = views.Changes(blur=0.0, solarise=0.25, jitter=0.0, grey=0.0)
    found = views.changed(images, jax.random.key(0), chances)
    same = (jnp.abs(found - images).max((1, 2, 3)) == 0).mean()
    assert 0.68 < same < 0.82
    none = views.Changes(blur=0.0, solarise=0.0, jitter=0.0, grey=0.0)
    assert jnp.array_equal(
        views.changed(images[:2], jax.random.key(0), none), images[:2]
    )


def test_two_views_differ_and_stay_in_range():
    images = jnp.broadcast_to(UNIT, (8, *UNIT.shape))
    keys = jax.random.split(jax.random.key(1))
    for key, chances in zip(keys, views.TWO_VIEWS, strict=True):
        found = views.changed(images, key, chances)
        assert found.shape == images.shape
        assert found.min() >= 0 and found.max() <= 1 + 1e-6
        assert len({x.tobytes() for x in np.asarray(found)}) > 4
        again = views.changed(images, key, chances)
        assert jnp.array_equal(found, again)
