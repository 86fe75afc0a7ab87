"""examples/sharded.py: every layout trains as one device does; checkpoints; hosts."""

import contextlib
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from examples import sharded
from examples.data import load_digits
from examples.models.gpt import GPT, GPTConfig
from examples.training.optimisers import make_optimiser

SIZES = {"batch_size": 8, "context": 16, "depth": 1, "heads": 4, "width": 32}
STEPS = 4

# What one of 2 x 4 devices has of two kernels, of shapes (32, 128) and (32, 4, 8).
SHARDS = {
    "data": ((32, 128), (32, 4, 8)),
    "fsdp": ((32, 16), (4, 4, 8)),
    "tensor": ((32, 32), (32, 1, 8)),
    "fsdp_tensor": ((16, 32), (16, 1, 8)),
}


def config(**settings):
    return sharded.Config(**{"steps": STEPS} | SIZES | settings)


def train(**settings):
    return sharded.train(config(**settings))


@functools.cache
def one_device():
    """Return the losses and the last parameters of a loop that knows of no mesh."""
    model = GPT(GPTConfig(17, 16, 1, 4, 32), rngs=nnx.Rngs(jax.random.key(0)))
    graphdef, params = nnx.split(model)
    tx = make_optimiser("muon", 0.01, momentum=0.9, weight_decay=0.0)
    images = load_digits().train.images
    digits = (images.reshape(len(images), 64)[:, :16] * 16).astype(int)

    def loss(params, tokens):
        before = jnp.concatenate([jnp.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)
        likely = jax.nn.log_softmax(nnx.merge(graphdef, params)(before))
        return -(jax.nn.one_hot(tokens, 17) * likely).sum(-1).mean()

    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step, state, losses = jax.jit(step), tx.init(params), []
    for i in range(STEPS):
        rows = np.random.default_rng((0, i)).integers(len(digits), size=8)
        params, state, value = step(params, state, jnp.asarray(digits[rows]))
        losses.append(float(value))
    return losses, params


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


def assert_same(found):
    """Compare parameters with those that one device ends with."""
    wanted = by_path(one_device()[1])
    for (path, x), y in zip(wanted.items(), found, strict=True):
        # The gradient of a key's bias is rounding alone, which Adam makes large.
        near = 1e-3 if "key/bias" in path else 1e-5
        np.testing.assert_allclose(y, x, rtol=0, atol=near, err_msg=path)


@pytest.mark.parametrize("axis_types", ["explicit", "auto"])
@pytest.mark.parametrize("layout", list(SHARDS))
def test_every_layout_trains_as_one_device(layout, axis_types, monkeypatch, capsys):
    run = train(layout=layout, axis_types=axis_types)
    losses, _ = one_device()
    np.testing.assert_allclose(run.losses, losses, rtol=0, atol=1e-5)
    assert losses[-1] < losses[0] - 0.5
    assert_same(jax.tree.leaves(run.state.params))

    lie = by_path(run.state.params)
    for name, shard in zip(("up/kernel", "query/kernel"), SHARDS[layout], strict=True):
        (found,) = (x for path, x in lie.items() if name in path)
        assert found.sharding.shard_shape(found.shape) == shard
    kept = {p: x for p, x in by_path(run.state.optimiser).items() if x.ndim}
    # A momentum for every kernel, two for each of the other fourteen.
    assert len(kept) == 6 + 2 * 14
    for path, x in kept.items():
        (like,) = (y for name, y in lie.items() if path.endswith("/" + name))
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)

    # The optimiser's: there and back, for four kinds of kernels: queries, keys and
    # values; what their heads give; up; down.
    assert run.collectives.get("all-to-all", 0) == (0 if layout == "data" else 8)
    if layout == "data":
        assert set(run.collectives) == {"all-reduce"}
    if layout == "tensor":
        assert set(run.collectives) == {"all-reduce", "all-to-all"}
    if "fsdp" in layout:
        assert run.collectives["all-gather"] > 0
    printed = capsys.readouterr().out
    assert "6 of 20 leaves cut into 6 matrices" in printed
    assert "Divided among devices" in printed
    assert f"loss of step {STEPS}: {run.losses[-1]:.6f}" in printed


def test_what_normuon_keeps_is_sharded_like_its_parameter():
    tx = make_optimiser("normuon", 0.01, momentum=0.9, weight_decay=0.0)
    params = {"up": {"kernel": jax.ShapeDtypeStruct((32, 128), "float32")}}
    found = sharded.optimiser_specs(tx, params, config(layout="fsdp_tensor"))
    specs = [spec for spec in jax.tree.leaves(found) if spec != P()]
    assert specs == [P("data", "model"), P(None, "model")]


def test_a_checkpoint_goes_on_in_another_layout(tmp_path, monkeypatch):
    losses, _ = one_device()
    folder = {"checkpoints": tmp_path}
    run = train(layout="fsdp", steps=2, **folder)
    assert len(run.losses) == 2
    other = {"layout": "tensor", "axis_types": "auto", "mesh": (4, 2)}
    run = train(**other, **folder)
    np.testing.assert_allclose(run.losses, losses[2:], rtol=0, atol=1e-5)
    assert_same(jax.tree.leaves(run.state.params))
    (up,) = (x for p, x in by_path(run.state.params).items() if "up/kernel" in p)
    assert up.sharding.shard_shape(up.shape) == (32, 64)


def test_checkpoints_are_of_the_same_numbers():
    same = config(layout="tensor", mesh=(4, 2), steps=9, axis_types="auto")
    assert config().identity() == same.identity()
    for other in ({"seed": 1}, {"optimiser": "adam"}, {"text": Path("a")}):
        assert config().identity() != config(**other).identity()


# Trains, and writes what one process has of the whole parameters.
PROCESS = """
import sys
import jax, numpy
from jax.experimental import multihost_utils
from examples import sharded
run = sharded.main(sys.argv[2:])
leaves = jax.tree.leaves(run.state.params)
assert not all(x.is_fully_addressable for x in leaves)
numpy.savez(sys.argv[1], *multihost_utils.process_allgather(leaves, tiled=True))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, monkeypatch, capsys):
    losses, _ = one_device()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[1]
    quick = "--xla_backend_optimization_level=0"
    env = os.environ | {"XLA_FLAGS": quick, "PYTHONPATH": str(root)}
    sizes = [f"--{name.replace('_', '-')}={size}" for name, size in SIZES.items()]
    common = [*sizes, "--layout=fsdp_tensor", f"--steps={STEPS}", "--processes=2"]
    common += [f"--coordinator=localhost:{port}", f"--checkpoints={tmp_path / 'saved'}"]
    with contextlib.ExitStack() as stack:
        processes = []
        for i in range(2):
            out = stack.enter_context((tmp_path / f"{i}.txt").open("w"))
            command = [sys.executable, "-c", PROCESS, tmp_path / f"{i}.npz", *common]
            process = subprocess.Popen(
                [*command, f"--process={i}"],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=root,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        codes = [process.wait(timeout=240) for process in processes]
    printed = [(tmp_path / f"{i}.txt").read_text() for i in range(2)]
    assert codes == [0, 0], "\n".join(printed)
    last = printed[0].rsplit(f"loss of step {STEPS}: ", 1)[1]
    assert abs(float(last.split()[0]) - losses[-1]) < 1e-5
    assert "loss of step" not in printed[1]
    for i in range(2):
        with np.load(tmp_path / f"{i}.npz") as found:
            assert_same(found.values())
    # One process goes on with what two have saved.
    run = train(layout="data", checkpoints=tmp_path / "saved")
    assert run.losses == []
    assert (
        f"nothing to do: the checkpoint is of step {STEPS}" in capsys.readouterr().out
    )
    assert_same(jax.tree.leaves(run.state.params))


def test_a_text_is_its_bytes(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"abcde")
    windows = sharded.load_sequences(config(text=text, context=4))
    assert windows.tolist() == [[97, 98, 99, 100], [98, 99, 100, 101]]
    with pytest.raises(ValueError, match="`context` is 6"):
        sharded.load_sequences(config(text=text, context=6))
    with pytest.raises(FileNotFoundError):
        sharded.load_sequences(config(text=tmp_path / "none"))


def test_digits_are_pixels_in_the_order_of_reading():
    found = sharded.load_sequences(config(context=64))
    images = load_digits().train.images
    assert found.shape == (len(images), 64)
    np.testing.assert_allclose(found[7, 11] / 16, images[7, 1, 3, 0])
    with pytest.raises(ValueError, match="`context` is 65"):
        sharded.load_sequences(config(context=65))


def test_a_mesh_of_other_than_all_devices():
    for mesh, needed in (((4, 4), 16), ((1, 2), 2)):
        with pytest.raises(ValueError, match=rf"`mesh` is .* 8 devices, not {needed}"):
            sharded.train(config(mesh=mesh, batch_size=16))


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"layout": "other"}, "`layout` is 'other'; expected one of data, fsdp"),
        ({"axis_types": "manual"}, "`axis_types` is 'manual'"),
        ({"layout": "tensor", "heads": 2}, "`heads` is 2; .* mesh's 4"),
        ({"batch_size": 12}, "`batch_size` is 12; expected a multiple of 8"),
        ({"width": 30}, "`width` is 30"),
        ({"steps": 0}, "`steps` is 0"),
        ({"processes": 2}, "`coordinator` is None"),
        ({"processes": 3, "coordinator": "a:1"}, "`devices` is 8"),
        ({"process": 1}, "`process` is 1"),
    ],
)
def test_settings_that_cannot_be(settings, match):
    with pytest.raises(ValueError, match=match):
        config(**settings)


@pytest.mark.parametrize(
    "words", [("--layout", "other"), ("--heads", "3"), ("--mesh", "0", "8")]
)
def test_a_wrong_command_line_ends_the_program(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        sharded.main(words)
    assert stopped.value.code not in (0, None)
