"""What tests of trainings on streamed images share: a tree, a network, processes."""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from examples.models import resnet


def make_tree(folder, train=24, val=7, classes=3):
    """Write a tree of noisy JPEG images of about 20 x 20 pixels, a colour a class."""
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            own = folder / part / f"n{label:02}"
            own.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 160, (20 + i % 3, 22, 3))
                pixels[:, :, label % 3] += 90
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(own / f"{label}_{i}.JPEG")
    return folder


def small(image_size=16, classes=3, *, dtype=None, rngs):
    """Return a network of two blocks, the second of stride 2 with a shortcut."""
    return resnet.ResNet(
        (1, 1), (8, 16), classes, cifar_stem=True, dtype=dtype, rngs=rngs
    )


class Jitted:
    """A program that is compiled once, whoever asks for that."""

    def __init__(self, f):
        self.f = f

    def lower(self, *_):
        return self

    def compile(self):
        return self.f


class KilledError(BaseException):
    pass


def table(path):
    """Return the rows of a file, without what is measured by the clock."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    clock = ("seconds", "images_per_s", "waited")
    return [{k: x for k, x in row.items() if k not in clock} for row in rows]


# --------------------------------------------------------------------- real processes

# Trains a small network, slowly where it is to be killed, and writes what it ends with.
PROCESS = """
import sys, time
import jax, numpy
from jax.experimental import multihost_utils
from examples.streaming import training
from examples.models import IMAGENET
from trainings import small
IMAGENET["resnet18"] = small
program, slow, path, *words = sys.argv[1:]
make, place = training.train, training.place
def sleepy(*args):
    time.sleep(float(slow))
    return place(*args)
def kept(*args):
    state = make(*args)
    leaves = multihost_utils.process_allgather(jax.tree.leaves(state), tiled=True)
    numpy.savez(path, *leaves)
    return state
training.place, training.train = sleepy, kept
if __name__ == "__main__":
    if program == "imagenet":
        from examples import train
        train.main(["imagenet", *words])
    else:
        from examples import barlow_twins
        barlow_twins.main(words)
"""


def start(program, stack, folder, name, options, words, devices=4, slow=0.0):
    """Start a process that trains; return it, its output and what it ends with."""
    given = [f"--{k.replace('_', '-')}={x}" for k, x in options.items()]
    tests = Path(__file__).parent
    flags = f"--xla_force_host_platform_device_count={devices}"
    flags += " --xla_backend_optimization_level=0"
    paths = os.pathsep.join(map(str, (tests.parent, tests)))
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths}
    out, last = folder / f"{name}.txt", folder / f"{name}.npz"
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, program, str(slow), last, *given, *words],
        stdout=stack.enter_context(out.open("w")),
        stderr=subprocess.STDOUT,
        env=env,
        cwd=tests.parent,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process, out, last


def train_in_two(program, stack, folder, name, options, words=()):
    """Train in two processes of two devices; return what each of them ends with."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [*words, f"--coordinator=localhost:{port}", "--processes=2"]
    started = [
        start(
            program,
            stack,
            folder,
            f"{name}{i}",
            options,
            [*words, f"--process={i}"],
            devices=2,
        )
        for i in range(2)
    ]
    codes = [process.wait(timeout=280) for process, _, _ in started]
    assert codes == [0, 0], "".join(out.read_text() for _, out, _ in started)
    found = []
    for _, _, path in started:
        with np.load(path) as arrays:
            found.append([arrays[name] for name in arrays.files])
    return found
