"""The ImageNet trainer: images, batches, meshes, checkpoints, processes."""

import contextlib
import functools
import io
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trainings
from flax import nnx
from PIL import Image
from trainings import Jitted, KilledError, make_tree, small, table

pytest.importorskip("grain")
pytest.importorskip("tensorboardX")

from benchmarks import tables
from examples import train
from examples.data import imagenet as batches, records
from examples.models import IMAGENET
from examples.streaming import (
    imagenet,
    log as imagenet_log,
    rates as imagenet_rates,
    report as imagenet_report,
    training as imagenet_training,
)
from examples.streaming.log import Log, Table
from examples.streaming.program import make_mesh, make_program, place
from examples.streaming.results import Rows
from examples.streaming.task import classification_score, make_task
from examples.training.optimisers import make_optimiser

# ---------------------------------------------------------------------------- records


class Numbers:
    """Records whose images are of one colour, the number of the record."""

    classes = 10

    def __init__(self, n, damaged=()):
        self.n, self.damaged = n, damaged

    def __len__(self):
        return self.n

    def read(self, i):
        file = io.BytesIO()
        Image.new("L", (8, 8), i).save(file, "PNG")
        return file.getvalue()[: 40 if i in self.damaged else None], i % 10

    def name(self, i):
        return f"number {i}"


def number_and_chance(image, random):
    return np.array([image.getpixel((0, 0))[0], random.random()])


def number(image):
    return np.array(image.getpixel((0, 0))[0])


def read(n=23, *, first=0, epochs=3, seed=5, damaged=(), **how):
    reading = batches.Reading(**{"batch_size": 8} | how)
    found = batches.training_batches(
        Numbers(n, damaged),
        number_and_chance,
        reading,
        seed=seed,
        epochs=epochs,
        first=first,
    )
    return list(found)


def test_every_epoch_is_another_order_without_repetition():
    found = np.stack([batch["image"] for batch in read()])
    assert found.shape == (3 * 2, 8, 2)
    orders = found[:, :, 0].reshape(3, 16)
    for order in orders:
        assert len(set(order)) == 16
    assert len({tuple(order) for order in orders}) == 3
    assert len(set(found[:, :, 1].ravel())) == 48  # no chance comes twice
    labels = np.stack([batch["label"] for batch in read()])
    assert (labels == found[:, :, 0] % 10).all() and labels.dtype == np.int32
    np.testing.assert_array_equal(found, [batch["image"] for batch in read()])
    assert (found != [batch["image"] for batch in read(seed=6)]).any()


def test_a_position_is_exact():
    whole = read()
    for first in (1, 2, 5, 6):
        rest = read(first=first)
        assert len(rest) == 6 - first
        for batch, wanted in zip(rest, whole[first:], strict=True):
            np.testing.assert_array_equal(batch["image"], wanted["image"])


def test_hosts_share_the_batch_that_one_would_have():
    alone = read()
    parts = [read(host=host, hosts=4) for host in range(4)]
    for i, batch in enumerate(alone):
        assert all(part[i]["image"].shape == (2, 2) for part in parts)
        together = np.concatenate([part[i]["image"] for part in parts])
        assert len(set(together[:, 0])) == 8
        # The same images, each with the same crop.
        assert set(map(tuple, together)) == set(map(tuple, batch["image"]))


@pytest.mark.slow  # each process takes seconds to start
def test_processes_make_the_batches_that_threads_make():
    found = read(workers=2, first=1)
    for batch, wanted in zip(found, read(first=1), strict=True):
        np.testing.assert_array_equal(batch["image"], wanted["image"])
    with pytest.raises(batches.UnreadableImageError, match=r"number \d+ is not a"):
        read(workers=1, damaged=range(23))


def test_a_damaged_record_is_named_or_replaced():
    with pytest.raises(batches.UnreadableImageError, match="number 4 is not a"):
        read(damaged=(4,), n=16)
    usual, found = read(n=16), read(n=16, damaged=(4, 5), unreadable="skip")
    for batch, wanted in zip(found, usual, strict=True):
        hit = np.isin(wanted["image"][:, 0], (4, 5))
        np.testing.assert_array_equal(batch["image"][~hit], wanted["image"][~hit])
        assert (batch["image"][hit, 0] == 6).all()
        assert (batch["label"][hit] == 6).all()
        bad = np.where(hit, wanted["image"][:, 0], -1)
        np.testing.assert_array_equal(batch["unreadable"], bad)
    assert sum((batch["unreadable"] >= 0).sum() for batch in found) == 3 * 2
    with pytest.raises(batches.UnreadableImageError, match="the 99 records behind"):
        read(damaged=range(23), unreadable="skip")


@pytest.mark.parametrize("hosts", [1, 2])
def test_validation_has_every_record_once(hosts):
    found = [
        batch
        for host in range(hosts)
        for batch in batches.validation_batches(
            Numbers(21, damaged=(3,)),
            number,
            batches.Reading(8, host=host, hosts=hosts, unreadable="skip"),
        )
    ]
    assert [len(batch["label"]) for batch in found] == [8 // hosts] * 3 * hosts
    joined = {k: np.concatenate([batch[k] for batch in found]) for k in found[0]}
    known = joined["label"] >= 0
    wanted = sorted(set(range(21)) - {3})
    assert sorted(joined["image"][known]) == wanted
    assert (joined["label"][known] == joined["image"][known] % 10).all()
    assert joined["unreadable"].tolist().count(3) == 1
    assert (joined["unreadable"] >= 0).sum() == 1
    stop = batches.validation_batches(
        Numbers(21, damaged=(3,)), number, batches.Reading(8)
    )
    with pytest.raises(batches.UnreadableImageError, match="number 3 is"):
        list(stop)


# ------------------------------------------------------------------------------- views


def ramp(width, height):
    """Return an image whose red is the column and whose green is the row."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def box_of(view):
    """Return left, top, right, bottom of what a view shows of a ramp; if mirrored.

    Pixel k of n shows the coordinate `low + (k + 1/2) (high - low) / n - 1/2`.
    """
    view = view.astype(float)
    n = len(view)
    inner = slice(n // 4, -(n // 4))  # resampling bends the ends
    ends = []
    for line in (view[n // 2, :, 0], view[:, n // 2, 1]):
        slope, start = np.polyfit(np.arange(n)[inner], line[inner], 1)
        ends.append((start + 0.5 - slope / 2, start + 0.5 + slope * (n - 0.5)))
    (left, right), (top, bottom) = ends
    return min(left, right), top, max(left, right), bottom, right < left


def test_random_views_are_of_the_shares_and_shapes_they_are_asked_for():
    image, random = ramp(250, 200), np.random.default_rng(0)
    make = functools.partial(batches.random_view, image, random, size=48)
    found = [box_of(make()) for _ in range(200)]
    left, top, right, bottom, mirrored = np.array(found).T
    assert left.min() > -2 and right.max() < 252
    assert top.min() > -2 and bottom.max() < 202
    area = (right - left) * (bottom - top) / (250 * 200)
    aspect = (right - left) / (bottom - top)
    assert 0.06 < area.min() < 0.15 and 0.85 < area.max() < 1.02
    assert 0.4 < area.mean() < 0.6
    assert 0.72 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.37
    assert 0.35 < mirrored.mean() < 0.65
    small = area < 0.5
    for start, length in ((left, 250 - right + left), (top, 200 - bottom + top)):
        share = (start / length)[small]
        assert 0.35 < share.mean() < 0.65 and 0.2 < share.std() < 0.4  # uniform: 0.29
    whole = make(area=(0.25, 0.25), aspect=(1.0, 1.0))
    assert whole.shape == (48, 48, 3) and whole.dtype == np.uint8
    left, top, right, bottom, _ = box_of(whole)
    assert abs(right - left - 111.8) < 2 and abs(bottom - top - 111.8) < 2


def test_of_a_long_image_a_random_view_shows_the_middle():
    random = np.random.default_rng(0)
    view = batches.random_view(ramp(250, 20), random, size=48, area=(0.9, 1.0))
    left, top, right, bottom, _ = box_of(view)
    np.testing.assert_allclose(
        [left, top, right, bottom], [125 - 40 / 3, 0, 125 + 40 / 3, 20], atol=1
    )


def test_the_centre_view_is_the_middle_of_the_resized_image():
    # 200 x 100 resized to 64 x 32, of which the middle 24 x 24.
    view = batches.centre_view(ramp(200, 100), size=24, resize=32)
    left, top, right, bottom, mirrored = box_of(view)
    side = 24 / 32 * 100
    wanted = [100 - side / 2, 50 - side / 2, 100 + side / 2, 50 + side / 2]
    np.testing.assert_allclose([left, top, right, bottom], wanted, atol=1)
    assert not mirrored


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1", "I;16"])
def test_images_of_all_modes_have_three_colours(mode, tmp_path):
    colour = {"CMYK": (0, 255, 255, 0), "RGBA": (255, 0, 0, 255), "LA": (255, 255)}
    colour |= {"P": 1, "1": 1, "I;16": 65535}
    image = Image.new(mode, (8, 8), colour.get(mode, 255))
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0])
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    red = mode in ("CMYK", "P", "RGBA")

    class One(Numbers):
        def read(self, i):
            return path.read_bytes(), 0

    view = functools.partial(batches.centre_view, size=8, resize=8)
    (batch,) = batches.validation_batches(One(1), view, batches.Reading(1))
    assert batch["image"].shape == (1, 8, 8, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["image"][0, 4, 4].tolist() == ([255, 0, 0] if red else [255] * 3)


def test_normalised_colours_have_the_mean_and_deviation_of_imagenet():
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3), np.uint8)
    found = batches.normalised(jnp.asarray(x))
    np.testing.assert_allclose(found, (x / 255.0 - mean) / deviation, atol=1e-5)
    assert found.dtype == jnp.float32


# ------------------------------------------------------------------------------- trees


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree"))


def test_a_tree_of_folders_is_in_the_order_of_names(tree, monkeypatch):
    for found in (records.load_imagenet(tree), None):
        if found is None:
            monkeypatch.setenv("ORTHAX_DATA", str(tree))
            found = records.load_imagenet()
        train, val = found
        assert (len(train), len(val), train.classes, val.classes) == (72, 21, 3, 3)
        labels = [train.read(i)[1] for i in range(72)]
        assert labels == [0] * 24 + [1] * 24 + [2] * 24
        names = [train.name(i) for i in range(72)]
        assert names == sorted(map(str, (tree / "train").rglob("*.JPEG")))
        assert train.read(30)[0] == Path(names[30]).read_bytes()


def test_trees_that_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"(?s)train/<class>.*imagenet2012"):
        records.load_imagenet(tmp_path / "none")
    make_tree(tmp_path, 1, 1)
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "n00" / ".DS_Store").touch()
    assert len(records.load_imagenet(tmp_path)[0]) == 3
    (tmp_path / "val" / "n09").mkdir()
    with pytest.raises(ValueError, match=r"val has other classes .*: n09"):
        records.load_imagenet(tmp_path)
    (tmp_path / "val" / "n09").rmdir()
    (tmp_path / "train" / "n01" / "1_0.JPEG").unlink()
    with pytest.raises(ValueError, match=r"train/n01 has no images; .* remove the fol"):
        records.load_imagenet(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty has no folders of classes"):
        records.ImageFolder(empty)


@pytest.mark.parametrize("content", ["text", "half", "empty", "zeros"])
def test_files_that_are_no_whole_images(content, tmp_path):
    make_tree(tmp_path, 4, 1, 1)
    path = tmp_path / "train" / "n00" / "0_1.JPEG"
    whole = path.read_bytes()
    contents = {
        "text": b"not an image",
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "zeros": bytes(100),
    }
    path.write_bytes(contents[content])
    view = functools.partial(batches.random_view, size=8)

    def read(unreadable):
        reading = batches.Reading(4, unreadable=unreadable)
        own = records.ImageFolder(tmp_path / "train")
        (batch,) = batches.training_batches(own, view, reading, seed=0, epochs=1)
        return batch

    with pytest.raises(batches.UnreadableImageError, match=r"n00/0_1\.JPEG is not a w"):
        read("stop")
    assert sorted(read("skip")["unreadable"]) == [-1, -1, -1, 1]


@pytest.mark.slow  # of the whole of ImageNet
def test_real_images_all_decode():
    folder = Path(os.environ.get("ORTHAX_DATA", "none"))
    if not (folder / "train").is_dir() or not (folder / "val").is_dir():
        pytest.skip("ORTHAX_DATA has no train/<class>/* and val/<class>/*")
    train_records, val = records.load_imagenet()
    view = functools.partial(batches.random_view, size=64)
    found = batches.training_batches(
        train_records, view, batches.Reading(32), seed=0, epochs=1
    )
    batch = next(found)
    assert batch["image"].shape == (32, 64, 64, 3)
    assert batch["image"].std((1, 2, 3)).min() > 1
    view = functools.partial(batches.centre_view, size=64, resize=64)
    labels = [
        x["label"] for x in batches.validation_batches(val, view, batches.Reading(64))
    ]
    labels = np.concatenate(labels)
    assert (labels >= 0).sum() == len(val)
    assert set(labels[labels >= 0]) == set(range(val.classes))


# ------------------------------------------------------------------ steps on any mesh


def settings(data_dir=None, **others):
    usual = {
        "model": "resnet18",
        "data_dir": data_dir,
        "epochs": 2,
        "batch_size": 16,
        "image_size": 16,
        "learning_rate": 0.02,
        "dtype": "float32",
        "workers": 0,
        "threads": 2,
    }
    return imagenet.Imagenet(**usual | others)


@pytest.fixture(autouse=True, scope="module")
def _small_network():
    with pytest.MonkeyPatch.context() as patch:
        yield patch.setitem(IMAGENET, "resnet18", small)


USUAL = {
    "epochs": 3,
    "ema": 0.9,
    "schedule": "cosine",
    "label_smoothing": 0.1,
    "checkpoint_steps": 3,
}


@functools.cache
def program_of(config, shape):
    program = make_program(make_task(config, 3), make_mesh(shape))
    return program._replace(step=Jitted(program.step))


def random_batches(count, n=16, classes=3):
    random = np.random.default_rng(0)
    return [
        {
            "image": random.integers(0, 256, (n, 16, 16, 3), np.uint8),
            "label": random.integers(0, classes, n, dtype=np.int32),
            "unreadable": np.full(n, -1, np.int32),
        }
        for _ in range(count)
    ]


@functools.cache
def one_device():
    """Return parameters, statistics, average, losses of a loop without a mesh."""
    model = small(rngs=nnx.Rngs(jax.random.key(0)))
    graphdef, params, statistics = nnx.split(model, nnx.Param, ...)
    tx = make_optimiser("orthogonal_sgd", 0.02, momentum=0.9, weight_decay=5e-4)
    mean = jnp.array([0.485, 0.456, 0.406])
    deviation = jnp.array([0.229, 0.224, 0.225])

    def loss(params, statistics, batch):
        model = nnx.merge(graphdef, params, statistics, copy=True)
        logits = model((batch["image"] / 255.0 - mean) / deviation)
        smooth = 0.9 * jax.nn.one_hot(batch["label"], 3) + 0.1 / 3
        value = -(smooth * jax.nn.log_softmax(logits)).sum(-1).mean()
        return value, nnx.split(model, nnx.Param, ...)[2]

    def step(params, statistics, state, batch):
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, statistics), grads = gradient(params, statistics, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), statistics, state, value

    step, state, losses = jax.jit(step), tx.init(params), []
    average = jax.tree.map(np.asarray, (params, statistics))
    for i, batch in enumerate(random_batches(10)):
        params, statistics, state, value = step(params, statistics, state, batch)
        losses.append(float(value))
        new = jax.tree.map(np.asarray, (params, statistics))
        old = min(0.9, (1 + i) / (10 + i))
        mixed = functools.partial(lambda old, x, y: old * x + (1 - old) * y, old)
        average = jax.tree.map(mixed, average, new)
    return (params, statistics, average), losses


@pytest.mark.parametrize(
    "shape", [(8, 1), pytest.param((2, 4), marks=pytest.mark.slow)]
)
def test_ten_steps_on_eight_devices_are_those_of_one(shape):
    mesh, program = make_mesh(shape), program_of(settings(**USUAL), shape)
    state, losses = program.initialise(jax.random.key(0)), []
    rate = np.float32(0.02)
    for i, batch in enumerate(random_batches(10)):
        state, sums = program.step.f(state, place(batch, mesh), rate, np.int32(i))
        losses.append(float(sums["loss"]) / float(sums["images"]))
    wanted, wanted_losses = one_device()
    np.testing.assert_allclose(losses, wanted_losses, rtol=0, atol=1e-4)
    found = state.params, state.statistics, state.average
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)
    # Mean and variance of six norms. Those of an eighth of a batch would be others.
    assert len(jax.tree.leaves(state.statistics)) == 2 * 6
    last = state.params["blocks"]["layers"][1]["conv2"]["kernel"]
    last = last.get_value() if hasattr(last, "get_value") else last.value
    assert last.shape == (3, 3, 16, 16)
    per_device = {(8, 1): (3, 3, 16, 16), (2, 4): (3, 3, 4, 16)}
    assert last.sharding.shard_shape(last.shape) == per_device[shape]
    kept = [x for x in jax.tree.leaves(state.optimiser) if x.shape == last.shape]
    assert kept[-1].sharding.is_equivalent_to(last.sharding, 4)


def test_scores_are_top_1_and_top_5_of_what_has_a_label():
    nan = np.nan
    logits = np.array(
        [
            [6.0, 5, 4, 3, 2, 1],  # right
            [6, 5, 4, 3, 2, 1],  # fifth
            [6, 5, 4, 3, 2, 1],  # sixth
            [1, 1, 1, 1, 1, 1],  # among equals the first counts as the answer
            [1, 1, 1, 1, 1, 1],
            [nan, nan, nan, nan, nan, nan],
            [nan, 1, 1, 1, 1, 9],  # something is wrong, though the largest is right
            [9, 5, 4, 3, 2, 1],  # fills up
        ]
    )
    labels = np.array([0, 4, 5, 0, 5, 0, 5, -1])
    unreadable = np.array([-1] * 7 + [3])
    images = np.zeros((8, 1, 1, 3), np.uint8)
    batch = {"image": images, "label": labels, "unreadable": unreadable}
    found = classification_score(lambda x: jnp.asarray(logits), batch)
    assert float(found["top1"]) == 2 and float(found["top5"]) == 4
    assert float(found["images"]) == 7 and float(found["unreadable"]) == 1
    finite = classification_score(
        lambda x: jnp.asarray(logits[[0, 1, 7, 7]]),
        {name: x[[0, 1, 7, 7]] for name, x in batch.items()},
    )
    whole = np.exp(logits[0]).sum()
    wanted = -np.log(np.exp(6) / whole) - np.log(np.exp(2) / whole)
    np.testing.assert_allclose(finite["loss"], wanted, rtol=1e-6)


def test_rates():
    flat = settings(learning_rate=2.0, epochs=3).rates(4)
    np.testing.assert_array_equal(flat, [2.0] * 12)
    warm = settings(learning_rate=2.0, epochs=3, warmup_epochs=1.0).rates(4)
    np.testing.assert_allclose(warm, [0.5, 1.0, 1.5] + [2.0] * 9)
    config = settings(learning_rate=2.0, epochs=3, warmup_epochs=0.5, schedule="cosine")
    found = config.rates(4)
    wanted = [1.0, 2.0, 2.0, 1 + np.cos(np.pi / 10)]
    np.testing.assert_allclose(found[:4], wanted)
    np.testing.assert_allclose(found[7], 1.0)
    np.testing.assert_allclose(found[-1], 1 + np.cos(np.pi * 9 / 10))


# ------------------------------------------------------------------------ the training


def program_once(_, mesh):
    return program_of(settings(**USUAL), tuple(mesh.shape.values()))


@pytest.fixture(scope="module")
def train_in(tree):
    """Return a function that trains in a folder, with programs compiled before."""

    def run(output, draw=False, **others):
        config = settings(**{"data_dir": tree, "output": output} | USUAL | others)
        with pytest.MonkeyPatch.context() as patch:
            if not draw:
                patch.setattr(imagenet_log, "plot", lambda *_: None)
            patch.setattr(imagenet_training, "make_program", program_once)
            return imagenet.run(config)

    return run


@pytest.fixture(scope="module")
def never_killed(train_in, tmp_path_factory):
    """Return the folder and the last state of a training of twelve steps."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train_in(folder, draw=True, profile_steps=1)


def assert_same_training(folder, state, never_killed):
    wanted_folder, wanted = never_killed
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True)
    for x, y in pairs:
        np.testing.assert_array_equal(x, y)
    for name in ("steps.csv", "epochs.csv"):
        assert table(folder / name) == table(wanted_folder / name)
    for name in ("last", "best"):
        names = [
            sorted(path.name for path in (own / "checkpoints" / name).iterdir())
            for own in (folder, wanted_folder)
        ]
        assert names[0] == names[1]


def test_what_a_training_writes(never_killed, tree):
    folder, state = never_killed
    steps, epochs = table(folder / "steps.csv"), table(folder / "epochs.csv")
    assert [int(row["step"]) for row in steps] == list(range(1, 13))
    rates = [float(row["learning_rate"]) for row in steps]
    np.testing.assert_allclose(rates, settings(**USUAL).rates(4))
    assert [row["epoch"] for row in epochs] == ["1", "2", "3"]
    losses = np.array([float(row["loss"]) for row in steps]).reshape(3, 4)
    found = [float(row["train_loss"]) for row in epochs]
    np.testing.assert_allclose(found, losses.mean(1))
    assert losses[-1].mean() < losses[0].mean()

    # The last evaluation, one image after another, of the average.
    _, val = records.load_imagenet(tree)
    graphdef = nnx.split(small(rngs=nnx.Rngs(0)))[0]
    model = nnx.merge(graphdef, *state.average)
    model.eval()
    logits, labels = [], []
    for i in range(len(val)):
        content, label = val.read(i)
        image = Image.open(io.BytesIO(content)).convert("RGB")
        pixels = batches.centre_view(image, size=16, resize=18)
        logits.append(np.asarray(model(batches.normalised(pixels[None])))[0])
        labels.append(label)
    logits, labels = np.array(logits, float), np.array(labels)
    likely = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -np.log(likely[np.arange(21), labels]).mean()
    last = {name: float(x) for name, x in epochs[-1].items()}
    assert last["validation_images"] == 21 and last["train_images"] == 64
    np.testing.assert_allclose(last["validation_loss"], loss, rtol=1e-4)
    accuracy = (logits.argmax(1) == labels).mean()
    np.testing.assert_allclose(last["validation_top1"], accuracy)
    assert last["validation_top5"] == 1.0

    assert (folder / "curves.png").stat().st_size > 0
    assert list((folder / "tensorboard").glob("events*"))
    assert any(path.stat().st_size > 0 for path in (folder / "profile").rglob("*.pb"))
    (row,) = Rows(folder / "results.csv").rows()
    assert row["optimiser"] == "orthogonal_sgd" and row["classes"] == "3"
    assert float(row["validation_accuracy"]) == pytest.approx(accuracy, rel=1e-5)
    kept = sorted(int(x.name) for x in (folder / "checkpoints" / "last").iterdir())
    assert kept == [8, 9, 12]
    best = max(float(row["validation_top1"]) for row in epochs)
    first = next(r for r in epochs if float(r["validation_top1"]) == best)
    (path,) = (folder / "checkpoints" / "best").iterdir()
    assert path.name == first["step"]


@pytest.mark.parametrize(
    "where, at, missing",
    [
        ("step", 8, 6),
        pytest.param("step", 5, 8, marks=pytest.mark.slow),
        pytest.param("epoch", 2, 4, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_is_never_killed(
    where, at, missing, train_in, never_killed, tmp_path, monkeypatch
):
    calls = []

    def killed(self, *args):
        calls.append(args)
        if len(calls) == at:
            raise KilledError
        return original(self, *args)

    original, step = getattr(Log, where), Log.step
    with monkeypatch.context() as patch:
        patch.setattr(Log, where, killed)
        with pytest.raises(KilledError):
            train_in(tmp_path)
    steps = table(tmp_path / "steps.csv")
    assert len(steps) < 12
    # Half a row, of a machine that lost power.
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("9,0.01,16.0,1.")
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(Log, "step", lambda *args: again.append(step(*args)))
        state = train_in(tmp_path)
    # From the last checkpoint on, and not from the start.
    assert len(again) == missing
    assert_same_training(tmp_path, state, never_killed)


def test_a_finished_training_stays_as_it_is(train_in, never_killed, tmp_path):
    shutil.copytree(never_killed[0], tmp_path / "copy")
    state = train_in(tmp_path / "copy")
    assert_same_training(tmp_path / "copy", state, never_killed)
    assert len(Rows(tmp_path / "copy" / "results.csv").rows()) == 1


def test_a_checkpoint_goes_on_on_another_mesh(train_in, never_killed, tmp_path):
    with pytest.raises(KilledError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "epoch", lambda *_: (_ for _ in ()).throw(KilledError))
        train_in(tmp_path)
    state = train_in(tmp_path, mesh=(2, 4), threads=1)
    kernels = [x for x in jax.tree.leaves(state.params) if x.shape == (3, 3, 16, 16)]
    assert kernels[0].sharding.shard_shape(kernels[0].shape) == (3, 3, 4, 16)
    losses, wanted = (
        [float(row["loss"]) for row in table(folder / "steps.csv")]
        for folder in (tmp_path, never_killed[0])
    )
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-4)
    assert losses[:4] == wanted[:4]


def test_a_checkpoint_of_another_training(train_in, never_killed, tmp_path):
    shutil.copytree(never_killed[0], tmp_path / "copy")
    before = sorted((tmp_path / "copy").rglob("*"))
    with pytest.raises(ValueError, match="`model` is 'resnet34' here and 'res"):
        train_in(tmp_path / "copy", model="resnet34")
    with pytest.raises(ValueError, match=r"`seed` is 1 here and 0 there\. Go on with"):
        train_in(tmp_path / "copy", seed=1)
    with pytest.raises(ValueError, match="`epochs` is 4 here and 3"):
        train_in(tmp_path / "copy", epochs=4)
    assert before == sorted((tmp_path / "copy").rglob("*"))


@pytest.mark.slow
def test_a_damaged_file_stops_a_training_that_then_skips_it(
    tree, train_in, never_killed, tmp_path, capsys
):
    own = tmp_path / "tree"
    shutil.copytree(tree, own)
    # The record that comes last in the first epoch.
    order = [x["image"][:, 0] for x in read(72, epochs=1, seed=0, batch_size=16)]
    train_records, _ = records.load_imagenet(own)
    path = Path(train_records.name(int(order[-1][-1])))
    path.write_bytes(path.read_bytes()[:200])
    damaged = {"data_dir": own, "output": tmp_path / "out", "epochs": 3}
    with pytest.raises(batches.UnreadableImageError, match=path.name):
        train_in(**damaged)
    assert len(table(tmp_path / "out" / "steps.csv")) == 3
    train_in(**damaged, unreadable="skip")
    found = table(tmp_path / "out" / "steps.csv")
    wanted = table(never_killed[0] / "steps.csv")
    assert found[:3] == wanted[:3] and found[3] != wanted[3]
    assert sum(float(row["unreadable"]) for row in found) >= 1
    assert found[3]["unreadable"] == "1.0"
    assert f"{path} is not a whole image; skipped" in capsys.readouterr().err


# --------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    "others, match",
    [
        (
            {"batch_size": 12},
            "`batch_size` is 12; expected a multiple of 8, the",
        ),
        ({"batch_size": 80}, "`batch_size` is 80; expected at most 72, the number of"),
        ({"mesh": (3, 2)}, r"`mesh` is \(3, 2\); expected two .* product is 8"),
    ],
)
def test_batches_and_meshes_that_cannot_be(others, match, train_in, tmp_path):
    with pytest.raises(ValueError, match=match):
        train_in(tmp_path, **others)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "others, match",
    [
        ({"model": "vgg"}, "`model` is 'vgg'; expected one of resnet18, resnet34"),
        ({"schedule": "steps"}, "`schedule` is 'steps'"),
        ({"unreadable": "cry"}, "`unreadable` is 'cry'; expected one of stop, skip"),
        ({"epochs": 0}, "`epochs` is 0; expected at least 1"),
        ({"workers": -1}, "`workers` is -1; expected at least 0"),
        ({"momentum": 1.0}, "`momentum` is 1.0"),
        ({"ema": 1.5}, "`ema` is 1.5; expected between 0 and 1"),
        ({"learning_rate": 0.0}, "`learning_rate` is 0.0"),
        ({"warmup_epochs": 3.0}, "`warmup_epochs` is 3.0; expected at most `epochs`"),
        ({"seed": -1}, "`seed` is -1"),
        ({"resize": 8}, "`resize` is 8; expected at least `image_size`, 16"),
        (
            {"model": "vit_s16", "image_size": 20},
            "`image_size` is 20; .* of 16",
        ),
        ({"processes": 2}, "`coordinator` is None; expected HOST:PORT"),
        ({"process": 1, "coordinator": "a:1"}, "`process` is 1"),
    ],
)
def test_settings_that_cannot_be(others, match):
    with pytest.raises(ValueError, match=match):
        settings(**others)


def test_a_wrong_command_ends_the_program(tmp_path):
    for words in (("--data-dir", str(tmp_path)), ("--batch-size", "0")):
        with pytest.raises(SystemExit) as stopped:
            train.main(["imagenet", *words])
        assert stopped.value.code not in (0, None)


def test_a_training_that_diverges_says_so(train_in, tmp_path, monkeypatch):
    def infinite(*_):
        return {"images": 21.0, "loss": np.nan, "top1": 0.0}

    monkeypatch.setattr(imagenet_training, "evaluate", infinite)
    with pytest.raises(imagenet_training.DivergedError, match="Diverged by step 4"):
        train_in(tmp_path)
    assert not list((tmp_path / "checkpoints" / "best").iterdir())


@pytest.mark.parametrize(
    "model", ["resnet18", pytest.param("vit_s16", marks=pytest.mark.slow)]
)
def test_networks_compute_in_bfloat16_and_keep_float32(model):
    config = settings(model=model, dtype="bfloat16", image_size=32)
    program = make_program(make_task(config, 7), make_mesh((2, 4)))
    kept = jax.tree.leaves(program.state)
    assert {x.dtype for x in kept} == {np.dtype("float32")}
    batch = {
        "image": jax.ShapeDtypeStruct((8, 32, 32, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((8,), np.int32),
        "unreadable": jax.ShapeDtypeStruct((8,), np.int32),
    }
    step = jax.make_jaxpr(program.step)(
        program.state, batch, np.float32(0.1), np.int32(0)
    )
    assert "bf16" in str(step)
    assert [x.dtype for x in step.out_avals[: len(kept)]] == [x.dtype for x in kept]


def test_a_table_forgets_what_is_behind_the_checkpoint(tmp_path):
    path = tmp_path / "steps.csv"
    Table(path, 0).append([{"step": i, "loss": 0.1 * i} for i in range(1, 6)])
    with path.open("a") as file:
        file.write("6,0.")
    found = Table(path, 4, since=2)
    assert found.rows == [{"step": 3.0, "loss": 0.1 * 3}, {"step": 4.0, "loss": 0.4}]
    found.append([{"step": 5, "loss": 7.0}])
    steps = [int(row["step"]) for row in table(path)]
    assert steps == [1, 2, 3, 4, 5]


# ------------------------------------------------------------------------------- TFDS


def test_imagenet_of_tfds(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.core import registered

    registered_class = tfds.builder_cls("imagenet2012")
    with registered.skip_registration():

        class Imagenet2012(registered_class):
            def _split_generators(self, dl_manager):
                return {"train": self._few(6), "validation": self._few(3)}

            def _few(self, n):
                for i in range(n):
                    image = Image.new("L" if i == 1 else "RGB", (30 + i, 40))
                    file = io.BytesIO()
                    image.save(file, "JPEG")
                    file.seek(0)
                    yield i, {"image": file, "label": 10 * i, "file_name": f"{i}.JPEG"}

    Imagenet2012(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setenv("ORTHAX_DATA", str(tmp_path))
    train_records, val = records.load_imagenet()
    assert (len(train_records), len(val), val.classes) == (6, 3, 1000)
    assert "imagenet2012" in val.name(2) and "validation, example 2" in val.name(2)

    def sizes(image, random):
        return np.array(image.size)

    found = batches.training_batches(
        train_records, sizes, batches.Reading(6), seed=0, epochs=1
    )
    (batch,) = found
    pairs = sorted(
        zip(batch["label"].tolist(), batch["image"][:, 0].tolist(), strict=True)
    )
    assert pairs == [(10 * i, 30 + i) for i in range(6)]
    assert "tensorflow" not in sys.modules


# --------------------------------------------------------------------- real processes


def start(stack, tmp_path, tree, name, words, slow=0.0):
    """Start a process that trains; return it, its output and what it ends with."""
    return trainings.start(
        "imagenet", stack, tmp_path, name, process_options(tree), words, slow=slow
    )


def process_options(tree):
    usual = {"model": "resnet18", "batch_size": 16, "image_size": 16}
    usual |= {"learning_rate": 0.02, "dtype": "float32", "workers": 0, "threads": 2}
    return USUAL | usual | {"data_dir": tree}


@pytest.mark.slow
def test_kill_9_loses_nothing(tree, tmp_path):
    with contextlib.ExitStack() as stack:
        begin = functools.partial(start, stack, tmp_path, tree)
        whole, out, wanted = begin("whole", [f"--output={tmp_path / 'whole'}"])
        assert whole.wait(timeout=280) == 0, out.read_text()
        folder = tmp_path / "killed"
        process, out, last = begin("killed", [f"--output={folder}"], slow=0.4)
        saved = folder / "checkpoints" / "last"
        deadline = time.monotonic() + 280
        while not (saved / "6").exists():  # a folder under way has another name
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not last.exists() and not (saved / "12").exists()
        again, out, last = begin("again", [f"--output={folder}"])
        assert again.wait(timeout=280) == 0, out.read_text()
        assert "| 6/12" in out.read_text() and "| 0/12" not in out.read_text()
    with np.load(wanted) as x, np.load(last) as y:
        assert x.files == y.files
        for name in x.files:
            np.testing.assert_array_equal(x[name], y[name])
    for name in ("steps.csv", "epochs.csv"):
        assert table(folder / name) == table(tmp_path / "whole" / name)


def train_in_two(tmp_path, tree, folder, name):
    """Train in two processes of two devices; return what each of them ends with."""
    words = ["--mesh", "2", "2", f"--output={folder}"]
    options = process_options(tree)
    with contextlib.ExitStack() as stack:
        return trainings.train_in_two("imagenet", stack, tmp_path, name, options, words)


@pytest.mark.slow
def test_two_processes_train_as_one(tree, tmp_path, train_in, never_killed):
    folder = tmp_path / "two"
    first, second = train_in_two(tmp_path, tree, folder, "whole")
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)
    found, wanted = (
        [float(row["loss"]) for row in table(own / "steps.csv")]
        for own in (folder, never_killed[0])
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)
    np.testing.assert_allclose(found[:4], wanted[:4], rtol=0, atol=1e-4)
    epochs = table(folder / "epochs.csv")
    assert [row["validation_images"] for row in epochs] == ["21.0"] * 3
    # One process goes on with what two have saved.
    state = train_in(folder)
    for x, y in zip(first, jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x, y)
    # So do two, from the ninth step.
    shutil.rmtree(folder / "checkpoints" / "last" / "12")
    again, _ = train_in_two(tmp_path, tree, folder, "again")
    for x, y in zip(first, again, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
    assert "| 9/12" in (tmp_path / "again0.txt").read_text()
    assert len(table(folder / "steps.csv")) == 12


# ----------------------------------------------------------------- rates and the page


def rate(optimiser, seconds, **others):
    row = {"kind": "step", "model": "resnet34", "optimiser": optimiser}
    row |= {"method": "auto" if optimiser == "orthogonal_sgd" else "", "load": "1"}
    row |= {"dtype": "bfloat16", "image_size": "224", "batch_size": "256"}
    row |= {"devices": "2", "seconds": str(seconds), "images_per_s": "9", "cpus": "1"}
    row |= {"platform": "gpu", "device": "X", "lapack_threads": "1", "jax": "1"}
    return row | {"jaxlib": "1", "optax": "1"} | others


def test_estimates_of_all_of_imagenet():
    rates = [rate("sgd", 2.0), rate("orthogonal_sgd", 3.0), rate("sgd", 9, device="Y")]
    step = "model", "optimiser", "method", "dtype", "devices"
    reading = {k: x for k, x in rate("", 0.1, kind="input").items() if k not in step}
    rates.insert(0, reading | {"data": "Z", "workers": "2"})
    config = imagenet.Imagenet(optimiser="orthogonal_sgd")
    (found,) = imagenet_report.estimates(config, rates)
    # 1251 steps an epoch; 4 x 2 s for 1024 images, and one second more.
    assert found.startswith("125100 steps: 313 h on 2 of X")
    assert len(list(imagenet_report.estimates(imagenet.Imagenet(), rates))) == 1
    assert len(list(imagenet_report.estimates(settings(), rates))) == 0
    page = imagenet_report.page([], rates)
    assert (
        "| +50% |" in page
        and "| input, 2 workers | Z |" in page
        and "313 h on 2 of X" in page
        and "| 67.5 |" in page
    )
    # Of what there is to run on a GPU, one rate is known.
    assert "images/s; orthogonal_sgd" in page
    assert page.count("not yet run") == 1 + 3 + len(imagenet_report.FULL)


def test_the_page_has_the_runs(never_killed, tmp_path):
    rows = Rows(never_killed[0] / "results.csv").rows()
    page = imagenet_report.page(rows, [])
    assert (
        "`python -m examples.train imagenet --data-dir TREE --model resnet18 "
        "--optimiser orthogonal_sgd --epochs 3 --batch-size 16 --learning-rate 0.02 "
        "--schedule cosine --label-smoothing 0.1 --ema 0.9 --dtype float32 "
        "--image-size 16` | 72 of 3 classes |"
    ) in page
    accuracy = 100 * float(rows[0]["validation_accuracy"])
    assert f"| {accuracy:.1f} | 100.0 |" in page
    imagenet_report.plot(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0


def test_rates_of_input(tree, tmp_path, capsys):
    words = ["input", f"--data-dir={tree}", "--called=noise", "--workers", "0"]
    words += ["--batch-size=8", "--batches=2", f"--results={tmp_path / 'rates.csv'}"]
    imagenet_rates.main(words)
    (row,) = tables.read(tmp_path / "rates.csv")
    assert row["data"] == "noise" and row["workers"] == "0"
    seconds = float(row["seconds"])
    np.testing.assert_allclose(float(row["images_per_s"]), 8 / seconds, rtol=1e-2)
    assert float(row["images_per_cpu_s"]) > 0
    with pytest.raises(SystemExit, match="There are no images"):
        imagenet_rates.main(["input", f"--data-dir={tmp_path}", "--called=none"])


@pytest.mark.slow
def test_rates_of_steps(tmp_path):
    path = tmp_path / "rates.csv"
    words = ["step", "--model=resnet18", "--batch-size=8", "--image-size=16"]
    imagenet_rates.main([*words, "--rounds=2", f"--results={path}"])
    found = {row["optimiser"]: row for row in tables.read(path)}
    assert set(found) == {"sgd", "orthogonal_sgd"}
    assert found["sgd"]["method"] == "" and found["sgd"]["devices"] == "8"
