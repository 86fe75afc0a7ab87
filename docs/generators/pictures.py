"""The pictures of the mathematics page: what they show is computed, then drawn."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.data.digits import load_digits
from orthax import polar, tasks

SIZE = (7.0, 3.2)  # inches
# The methods whose maps are drawn, under the names that readers know.
METHODS: Mapping[str, polar.PolarMethod] = {
    "SVD()": polar.SVD(),
    "the default on CPU, DWH()": polar.DWH(),
    "the default elsewhere, NewtonSchulz()": polar.NewtonSchulz(),
    "five steps of polar_express()": polar.NewtonSchulz(polar.polar_express(steps=5)),
    "JORDAN, Muon's five steps": polar.NewtonSchulz(polar.JORDAN),
}


def draw_all(out: Path) -> None:
    """Write every picture as a PNG file."""
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure)
        figure.savefig(out / f"{name}.png", dpi=160)


def circle_and_images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a 2 x 2 matrix, its polar factor, and the points of a circle."""
    g = np.array([[1.6, 1.0], [0.1, 0.7]], np.float32)
    angle = np.linspace(0, 2 * np.pi, 200)
    points = np.stack([np.cos(angle), np.sin(angle)])
    return g, np.asarray(polar.polar_factor(jnp.asarray(g), polar.SVD())), points


def draw_polar_factor(figure: Figure) -> None:
    """Draw what a matrix and its polar factor make of a circle and of two arrows."""
    g, o, points = circle_and_images()
    titles = {"G": g, "O = U Vᵀ, its polar factor": o}
    for ax, (title, x) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        ax.plot(*points, color="0.8", lw=1)
        ax.plot(*(x @ points), color="C0")
        for column, colour in zip(x.T, ("C1", "C2"), strict=True):
            _arrow(ax, column, colour)
        ax.set(title=title, aspect="equal", xlim=(-2.1, 2.1), ylim=(-1.4, 1.4))


def singular_value_maps() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return singular values over the Frobenius norm, and what methods make of them."""
    x = jnp.diag(jnp.asarray(np.geomspace(1e-6, 1, 121), jnp.float32))
    x = x / jnp.linalg.norm(x)
    maps = {
        name: np.asarray(jnp.diagonal(polar.polar_factor(x, method)))
        for name, method in METHODS.items()
    }
    return np.asarray(jnp.diagonal(x)), maps


def draw_singular_values(figure: Figure) -> None:
    """Draw the maps of singular values."""
    sigma, maps = singular_value_maps()
    ax = figure.subplots()
    for name, mapped in maps.items():
        ax.semilogx(sigma, mapped, label=name)
    ax.axvline(1e-3, color="0.7", lw=1, ls="--")
    ax.set(xlabel="singular value / Frobenius norm", ylabel="singular value afterwards")
    ax.legend(fontsize=7)


def gradient_of_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the gradient of the first layer of an MLP on digits, and its factor."""
    data = load_digits().train
    images = jnp.asarray(data.images[:256].reshape(256, -1))
    labels = jnp.asarray(data.labels[:256])
    keys = jax.random.split(jax.random.key(0), 2)
    params = [
        jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, shape in zip(keys, [(64, 32), (32, 10)], strict=True)
    ]

    def loss(params: list[jax.Array]) -> jax.Array:
        logits = jax.nn.relu(images @ params[0]) @ params[1]
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(256), labels])

    g = jax.grad(loss)(params)[0]
    return np.asarray(g), np.asarray(polar.polar_factor(g))


def cosines(x: np.ndarray) -> np.ndarray:
    """Return the cosines between the columns of a matrix."""
    norms = np.linalg.norm(x, axis=0)
    x = x / np.where(norms == 0, 1, norms)  # a unit without gradient stays at zero
    return x.T @ x


def draw_gradients(figure: Figure) -> None:
    """Draw the cosines between units, and the singular values, before and after."""
    pair = gradient_of_digits()
    titles = ("cosines, gradient", "cosines, polar factor")
    first, second, third = figure.subplots(1, 3)
    for ax, x, title in zip((first, second), pair, titles, strict=True):
        image = ax.imshow(cosines(x), vmin=-1, vmax=1, cmap="RdBu")
        ax.set_title(title, fontsize=9)
    figure.colorbar(image, ax=second, shrink=0.6)
    for x, label in zip(pair, ("gradient", "polar factor"), strict=True):
        values = np.linalg.svd(x, compute_uv=False)
        third.semilogy(values / values[0], ".-", label=label)
    third.set_title("singular values", fontsize=9)
    third.set(ylim=(1e-5, 2), ylabel="over the largest")
    third.legend(fontsize=7)


def batch_and_whitened() -> tuple[np.ndarray, np.ndarray]:
    """Return a centred batch of two features, and sqrt(n) times its polar factor."""
    x = jax.random.normal(jax.random.key(1), (400, 2)) @ jnp.array(
        [[2.0, 1.2], [0.0, 0.4]]
    )
    x = x - x.mean(axis=0)
    return np.asarray(x), np.asarray(len(x) ** 0.5 * polar.polar_factor(x))


def draw_activations(figure: Figure) -> None:
    """Draw a batch before and after whitening."""
    titles = ("a centred batch X", "√n times its polar factor")
    pairs = zip(figure.subplots(1, 2), batch_and_whitened(), titles, strict=True)
    for ax, x, title in pairs:
        ax.plot(*x.T, ".", ms=3)
        ax.set(title=title, aspect="equal", xlim=(-6, 6), ylim=(-4, 4))


def task_updates() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return two gradients in conflict, and the update that each rule makes of them."""
    grads = jnp.array([[1.0, 0.0], [-1.4, 1.2]])
    rules = {
        "sum": tasks.Sum(),
        "OSGD": tasks.OSGD(),
        "symmetric": tasks.Symmetric(),
    }
    updates = {
        name: np.asarray(tasks.task_weights(grads @ grads.T, rule) @ grads)
        for name, rule in rules.items()
    }
    return np.asarray(grads), updates


def draw_tasks(figure: Figure) -> None:
    """Draw two gradients, and for each rule the update."""
    grads, updates = task_updates()
    axes = figure.subplots(1, len(updates))
    for ax, (name, update) in zip(axes, updates.items(), strict=True):
        for i, grad in enumerate(grads):
            _arrow(ax, grad, f"C{i + 1}")
            ax.annotate(f"g{i + 1}", grad, fontsize=9)
        _arrow(ax, update, "C0")
        ax.axvline(0, color="0.8", lw=1)
        ax.set(title=name, aspect="equal", xlim=(-1.7, 1.5), ylim=(-0.5, 2.4))


def _arrow(ax: Axes, to: np.ndarray, colour: str) -> None:
    arrow = {"arrowstyle": "->", "color": colour, "lw": 2}
    ax.annotate("", to, (0, 0), arrowprops=arrow)


PICTURES: Mapping[str, Callable[[Figure], None]] = {
    "polar_factor": draw_polar_factor,
    "singular_values": draw_singular_values,
    "gradients": draw_gradients,
    "activations": draw_activations,
    "tasks": draw_tasks,
}
